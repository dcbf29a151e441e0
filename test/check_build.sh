#!/bin/sh
# How lfm2.c is compiled: the same bits without the Makefile's flags, flags that
# must be refused, no more than C11 where the system is compiled out, and small
# frames on the stack.
#     test/check_build.sh
. test/lib.sh

longest=900
compilers=
for cc in gcc clang; do
    if command -v $cc >/dev/null; then
        compilers="$compilers $cc"
    else
        echo "skipped: what $cc makes of lfm2.c, it is not installed"
    fi
done

# gcc may be clang by another name.
is_gcc() {
    gcc -dM -E -x c /dev/null 2>/dev/null >"$dir/macros" &&
        ! grep -q __clang__ "$dir/macros"
}

# The kernels take long: they are compiled while others are tested.
all_kernels() {
    gcc -O3 -fstack-usage -c -o "$dir/lfm2-O3.o" lfm2.c &&
        gcc -O2 -std=c11 -ffp-contract=off -fstack-usage -c \
            -o "$dir/lfm2-O2.o" lfm2.c
}
if is_gcc; then
    all_kernels 2>"$dir/kernels" &
    kernels=$!
fi

# ---------------------------------------------------------------- only C11 left

mkdir -p "$dir/without/sys"
for name in unistd fcntl sys/stat sys/mman pthread sched stdatomic; do
    echo "#error \"there is no <$name.h>\"" >"$dir/without/$name.h"
done
functions="open(at)?|creat|f?l?stat(at)?|fdopen|p?read|close|lseek|mmap|munmap|m?advise"
functions="$functions|mprotect|mremap|posix_(madvise|fadvise|memalign)|fileno"
functions="$functions|pthread_.*|sysconf|getpagesize|sched_.*|syscall|getauxval"
for cc in $compilers; do
    flags="-DLFM2_NO_SIMD -DLFM2_NO_THREADS -DLFM2_NO_MMAP"
    # shellcheck disable=SC2086
    holds "$cc, C11 without the system's headers" limited "$cc" -std=c11 \
        -pedantic -Werror $flags -I "$dir/without" -c -o "$dir/c11.o" lfm2.c
    # shellcheck disable=SC2086
    limited "$cc" -O1 -w $flags -c -o "$dir/$cc.o" lfm2.c
    nm -u "$dir/$cc.o" | sed 's/.* //' |
        grep -E "^_*($functions)(64)?(_2|_chk)?\$" >"$dir/err"
    holds "$cc compiles it" [ -s "$dir/$cc.o" ]
    holds "$cc, no functions of the system" [ ! -s "$dir/err" ]
done

# C++ and compilers that know less of C11.
for cc in g++ clang++; do
    command -v $cc >/dev/null || continue
    for file in lfm2.c run.c; do
        "$cc" -c -o "$dir/c++.o" $file 2>"$dir/err"
        holds "$cc is told, in a few lines: $file" [ "$(wc -l <"$dir/err")" -lt 12 ]
        says "compile it with a C compiler"
    done
done
if command -v tcc >/dev/null; then
    holds "tcc" tcc -DLFM2_NO_THREADS -DLFM2_NO_SIMD -o "$dir/tcc" run.c lfm2.c -lm
    holds "tcc's program answers" sh -c "$dir/tcc -q -n 1 test/tiny.gguf hi \
        </dev/null | grep ."
fi

# -------------------------------------------------------- the bits, any flags

# exact COMPILER FLAGS...: the program has its bits, with every instruction set,
# when lfm2.c is compiled so.
exact() {
    object=$dir/lfm2.o
    rm -f "$object"
    limited "$@" -w -c -o "$object" lfm2.c 2>"$dir/err"
    bits_of "$object" "$1" "$*"
}

# bits_of OBJECT COMPILER WHAT
bits_of() {
    program=$dir/program label=$3
    rm -f "$program"
    "$2" -o "$program" "$dir/run-$2.o" "$1" -lm -pthread 2>>"$dir/err"
    holds "$label: a program" [ -x "$program" ]
    limited "$program" --selftest >"$dir/out" 2>"$dir/err"
    status=$?
    grep '^FAIL' "$dir/out" >>"$dir/err"
    holds "$label: the self-test" [ $status = 0 ]
    holds "$label: its hash" grep -q '^hash  *f7e0c42c140c71ed' "$dir/out"
    for isa in $("$program" --version | sed -n 's/^isa  *//p'); do
        limited "$program" --json --temp 0 --isa "$isa" test/tiny.gguf \
            "What is a short convolution?" >"$dir/out" 2>"$dir/err"
        holds "$label: an answer with $isa" grep -q \
            '"logits_hash": "ef30ffbb98d9a48e"' "$dir/out"
    done
}

# fusing COMPILER: this CPU multiplies and adds in one, and is told to.
fusing() {
    fused=-march=haswell
    "$1" $fused -fsyntax-only -x c /dev/null 2>/dev/null || return
    for flag in fma avx2 bmi2 movbe; do
        grep -qw $flag /proc/cpuinfo 2>/dev/null || return
    done
}

for cc in $compilers; do
    if ! fusing "$cc"; then
        echo "skipped: $cc -march=haswell, which is not for this machine"
        fused=
    fi
    # shellcheck disable=SC2086
    limited "$cc" -O2 $fused -w -c -o "$dir/run-$cc.o" run.c
    exact "$cc" -O3 -DLFM2_NO_SIMD
    [ -z "$fused" ] || exact "$cc" -O3 $fused -DLFM2_AVX2_ONLY
done

# ------------------------------------------------------------ flags not allowed

# refused COMPILER FLAGS...: lfm2.c says so itself.
refused() {
    ! "$@" -DLFM2_NO_SIMD -fsyntax-only lfm2.c 2>"$dir/err" &&
        grep -q '#error' "$dir/err"
}

# announced COMPILER FLAGS...: the compiler tells the source.
announced() {
    "$@" -dM -E -x c /dev/null | grep -qE \
        '__(FAST|ASSOCIATIVE|RECIPROCAL)_MATH__ 1|__FINITE_MATH_ONLY__ 1'
}

# clang tells a source of some only; with the others its bits must be right.
for flags in -ffast-math -Ofast -freciprocal-math -ffinite-math-only \
    -funsafe-math-optimizations \
    "-fassociative-math -fno-signed-zeros -fno-trapping-math"; do
    for cc in $compilers; do
        # shellcheck disable=SC2086
        if announced $cc -O3 $flags; then
            holds "$cc $flags is refused" refused $cc -O3 $flags
        else
            exact $cc -O3 $flags -DLFM2_NO_SIMD
        fi
    done
done

# -------------------------------------------- all kernels: their bits, the stack

# large FILE: its functions with more than 4 KiB, or as much as they like.
large() {
    awk -F '\t' '$2 > 4096 || ($3 ~ /dynamic/ && $3 !~ /bounded/) {
        print $1 ": " $2 " bytes, " $3 }' "$1"
}

if is_gcc; then
    wait_within 900 $kernels
    holds "all kernels compile" [ $? -eq 0 ]
    : >"$dir/err"
    bits_of "$dir/lfm2-O3.o" gcc "gcc -O3, all kernels"
    for level in O2 O3; do
        holds "-$level, all frames are known" [ -s "$dir/lfm2-$level.su" ]
        large "$dir/lfm2-$level.su" >"$dir/err"
        holds "-$level, none is larger than 4 KiB" [ ! -s "$dir/err" ]
    done
fi
finish
