#!/bin/sh
# How lfm2.c is compiled: flags that must be refused, and no more than C11 where
# the system is compiled out.
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
    holds "$cc, C11 without the system's headers" limited "$cc" -std=c11 -O1 \
        -pedantic -Werror $flags -I "$dir/without" -c -o "$dir/$cc.o" lfm2.c
    nm -u "$dir/$cc.o" | sed 's/.* //' |
        grep -E "^_*($functions)(64)?(_2|_chk)?\$" >"$dir/err"
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

# clang tells a source of some only; make check-bits tries the others.
for flags in -ffast-math -Ofast -freciprocal-math -ffinite-math-only \
    -funsafe-math-optimizations \
    "-fassociative-math -fno-signed-zeros -fno-trapping-math"; do
    for cc in $compilers; do
        # shellcheck disable=SC2086
        if announced $cc -O3 $flags; then
            holds "$cc $flags is refused" refused $cc -O3 $flags
        fi
    done
done
finish
