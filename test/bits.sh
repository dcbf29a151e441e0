#!/bin/sh
# The same logits, byte for byte, from every compiler, level and machine that is
# at hand as from the scalar code: builds run.c in each way, reads the shipped
# model's golden tokens and a few random models in other formats, compares the
# files of logits, and the hashes of the self-test and of an answer.
#     test/bits.sh
# With `ports` it takes longer, and tries more machines.
#     test/bits.sh ports
set -u

dir=build/bits
shared=${LFM2_SHARED:-../shared}
rm -rf "$dir"
mkdir -p "$dir/models"
question="What is a short convolution?"
limit=
timeout -k 1 1 true 2>/dev/null && limit="timeout -k 10 1800"

# object FILE FLAGS...: of a file of the source, for compile().
object() {
    file=$1
    shift
    "$cc" -std=c11 -ffp-contract=off -Wall -Wextra -pedantic -Wshadow \
        -Wno-missing-field-initializers -Werror -pthread "$@" \
        -c -o "$dir/$name-$file.o" "$file.c"
}

# compile NAME COMPILER FLAGS...: the program is $dir/NAME.  The compiler may be
# make, and the flags what to make and the file it is.  No bit depends on run.c,
# which compiles in half the time with -O1.
compile() {
    name=$1 cc=$2
    shift 2
    if [ "$cc" = make ]; then
        make -s "$1" CFLAGS=-O2 &&
            cp "build/$2" "$dir/$name"
    else
        object lfm2 "$@" && object run "$@" -O1 &&
            "$cc" -pthread "$@" -o "$dir/$name" "$dir/$name-lfm2.o" \
                "$dir/$name-run.o" -lm
    fi >"$dir/$name.log" 2>&1 && return
    cat "$dir/$name.log"
    false
}

# compiles COMPILER FLAGS...: any program at all.
compiles() {
    if [ "$1" = make ] && [ "${3%.wasm}" != "$3" ]; then
        # shellcheck disable=SC2086
        set -- ${WASM_CC:-clang --target=wasm32-wasi}
    elif [ "$1" = make ]; then
        return
    fi
    printf '#include <errno.h>\nint main(void) { return 0; }\n' |
        "$@" -o "$dir/$name.any" -x c - 2>/dev/null
}

# logits NAME [EMULATOR]: all of them in $dir/NAME.logits.
logits() {
    name=$1
    shift
    $limit "$@" "$dir/$name" -q test/tiny.gguf --ids test/tiny.ids --logits - \
        >"$dir/$name.logits" || return 1
    for m in "$dir"/models/*.gguf; do
        [ -e "$m" ] || continue
        $limit "$@" "$dir/$name" -q "$m" -b 33 --ids "$dir/models/tokens.i32" \
            --logits - >>"$dir/$name.logits" || return 1
    done
}

# hashes NAME [EMULATOR]: that of the self-test and those of the shipped model's
# answer with every instruction set, which are one, in $dir/NAME.hashes.
hashes() {
    name=$1
    shift
    $limit "$@" "$dir/$name" --selftest >"$dir/$name.selftest" ||
        { grep '^FAIL' "$dir/$name.selftest"; return 1; }
    sets=$("$@" "$dir/$name" --version | sed -n 's/^isa  *//p')
    for isa in $sets; do
        $limit "$@" "$dir/$name" test/tiny.gguf --json --temp 0 --isa "$isa" \
            "$question" || return 1
    done >"$dir/$name.json"
    sed -n 's/^hash *\([0-9a-f]*\).*/\1/p' "$dir/$name.selftest" \
        >"$dir/$name.hashes"
    sed -n 's/.*"logits_hash": "\([0-9a-f]*\)".*/\1/p' "$dir/$name.json" |
        sort -u >>"$dir/$name.hashes"
    [ "$(grep -c . "$dir/$name.hashes")" = 2 ]
}

# The multiply-add of WebAssembly's kernels is exact.
exact_fma() {
    [ -e "$dir/wasm32.ok" ] || return
    name=wasm32-fma
    touch "$dir/$name.taken"
    if make -s build/wasm_fma.wasm 2>"$dir/$name.log" &&
        node scripts/run_wasm.mjs build/wasm_fma.wasm; then
        echo "ok     $name" | tee "$dir/$name.ok"
    else
        echo "FAIL   $name"
    fi
}

# What a program says of itself, on one line.
describe() {
    awk '/^(compiler|libc|byte order)/ { sub(/^(compiler|libc|byte order) */, "")
                                         line = line ", " $0 }
         END { print substr(line, 3) }' "$dir/$1.selftest"
}

# try NAME EMULATOR COMPILER FLAGS...: if no other lane has taken it.
try() {
    name=$1 emulator=$2
    shift 2
    mkdir "$dir/$name.taken" 2>/dev/null || return
    if [ -n "$emulator" ] && ! command -v "${emulator%% *}" >/dev/null; then
        echo "skipped: $name, ${emulator%% *} is not installed" |
            tee "$dir/$name.skipped"
    elif ! compiles "$@"; then
        echo "skipped: $name, $1 is not installed, or not all it needs" |
            tee "$dir/$name.skipped"
    elif compile "$name" "$@" && hashes "$name" $emulator &&
        cmp "$dir/reference.hashes" "$dir/$name.hashes" &&
        logits "$name" $emulator &&
        cmp "$dir/reference.logits" "$dir/$name.logits"; then
        echo "ok     $name: $(describe "$name")" | tee "$dir/$name.ok"
    else
        echo "FAIL   $name"
    fi
}

# suites NAME EMULATOR COMPILER FLAGS...: the suites of make check there, if the
# program could be made, and no other lane has them.
suites() {
    [ -e "$dir/$1.ok" ] || return
    name=$1-suites
    shift
    mkdir "$dir/$name.taken" 2>/dev/null || return
    sh test/suites.sh "$dir/$name" "$@" | sed "s/^/$name: /" |
        tee "$dir/$name.log"
    if grep -q ": 0 failed of" "$dir/$name.log"; then
        touch "$dir/$name.ok"
    elif grep -q '^[^:]*: skipped' "$dir/$name.log"; then
        touch "$dir/$name.skipped"
    fi
}

# alone NAME: the program and a model in a file system with nothing else.
alone() {
    enter=chroot name=$1-alone
    [ "$(id -u)" = 0 ] || enter="unshare -r chroot"
    [ -e "$dir/$1.ok" ] || return
    touch "$dir/$name.taken"
    mkdir "$dir/box"
    cp "$dir/$1" "$dir/box/run"
    cp test/tiny.gguf "$dir/box"
    if ! $enter / true 2>/dev/null; then
        echo "skipped: $name, chroot is not permitted" |
            tee "$dir/$name.skipped"
    elif $enter "$dir/box" /run --selftest >"$dir/$name.selftest" &&
        [ "$($enter "$dir/box" /run -q tiny.gguf --temp 0 "$question")" = \
          "$("$dir/reference" -q test/tiny.gguf --temp 0 "$question")" ]; then
        echo "ok     $name" | tee "$dir/$name.ok"
    else
        echo "FAIL   $name"
    fi
}

# frames NAME: its functions of lfm2.c take 4 KiB of stack at most each, and none
# as much as it likes.
frames() {
    name=$1-frames sizes=$dir/$1-lfm2.su
    [ -e "$dir/$1.ok" ] || return
    touch "$dir/$name.taken"
    large=$(awk -F '\t' '$2 > 4096 || ($3 ~ /dynamic/ && $3 !~ /bounded/) {
        print $1 ": " $2 " bytes, " $3 }' "$sizes")
    if [ ! -e "$sizes" ]; then
        echo "skipped: $name, which this compiler does not tell" |
            tee "$dir/$name.skipped"
    elif [ -s "$sizes" ] && [ -z "$large" ]; then
        echo "ok     $name" | tee "$dir/$name.ok"
    else
        echo "FAIL   $name: $large"
    fi
}

# number SUFFIX: how many files of $dir end so.
number() {
    ls "$dir" | grep -c "\.$1\$"
}

# gcc finds some headers of -m32 only with help where cross compilers are.
m32="-m32 -msse2 -mfpmath=sse -idirafter /usr/include/x86_64-linux-gnu -static"
# Not every kernel of 64 bits runs programs of 32.
on32=
echo 'int main(void) { return 0; }' >"$dir/small.c"
# shellcheck disable=SC2086
if gcc $m32 -o "$dir/small" "$dir/small.c" 2>/dev/null &&
    ! "$dir/small" 2>/dev/null; then
    on32=qemu-i386
fi

# The slowest first.
quick() {
    try s390x-big-endian qemu-s390x s390x-linux-gnu-gcc -O2 -static \
        -fexcess-precision=fast
    try aarch64-dotprod "qemu-aarch64 -cpu max" aarch64-linux-gnu-gcc -O2 \
        -static
    try aarch64-neon "qemu-aarch64 -cpu cortex-a53" aarch64-linux-gnu-gcc -O2 \
        -static
    for level in 2 3; do
        try gcc-O$level "" gcc -O$level -fstack-usage
    done
    try clang-O3 "" clang -O3
    # Without the Makefile's flags, and where compilers fuse what they like.  The
    # three before have the kernels of all CPUs, which take long to compile.
    case $(uname -m) in
    x86_64)
        if grep -qw fma /proc/cpuinfo 2>/dev/null; then
            try gcc-fma "" gcc -O3 -march=native -std=gnu11 -ffp-contract=fast \
                -DLFM2_AVX2_ONLY
            try clang-fma "" clang -O3 -mavx2 -mfma -ffp-contract=on \
                -DLFM2_AVX2_ONLY
            try gcc-fma-no-simd "" gcc -O3 -mavx2 -mfma -ffp-contract=fast \
                -DLFM2_NO_SIMD
        fi
        try musl "" musl-gcc -O2 -static -DLFM2_AVX2_ONLY
        try i386-gcc "$on32" gcc -O2 $m32 -DLFM2_AVX2_ONLY
        ;;
    *)
        try gcc-fma "" gcc -O3 -std=gnu11 -ffp-contract=fast
        try clang-fma "" clang -O3 -ffp-contract=on
        ;;
    esac
    # clang does not tell the source of these.  (With -funsafe-math-optimizations,
    # which is all of them, it would link code that makes denormal numbers 0.)
    try clang-unsafe-math "" clang -O3 -fassociative-math -freciprocal-math \
        -fno-signed-zeros -fno-trapping-math -fapprox-func -DLFM2_NO_SIMD
    try no-threads-no-mmap "" "${CC:-cc}" -O2 -DLFM2_NO_THREADS \
        -DLFM2_NO_MMAP -DLFM2_AVX2_ONLY
}

more() {
    try gcc-O0 "" gcc -O0
    try clang-O0 "" clang -O0
    try aarch64-no-simd qemu-aarch64 aarch64-linux-gnu-gcc -O2 -static \
        -DLFM2_NO_SIMD
    try armhf qemu-arm arm-linux-gnueabihf-gcc -O2 -static
    try ppc64le qemu-ppc64le powerpc64le-linux-gnu-gcc -O2 -static
    try riscv64 qemu-riscv64 riscv64-linux-gnu-gcc -O2 -static
    try wasm32 "node scripts/run_wasm.mjs" make wasm run.wasm
    try wasm32-relaxed "node scripts/run_wasm.mjs" make \
        build/run_relaxed.wasm run_relaxed.wasm
    try wasm32-no-simd "node scripts/run_wasm.mjs" make \
        build/run_no_simd.wasm run_no_simd.wasm
    try static "" make static run-static
    [ "$(uname -m)" != x86_64 ] || try i386-clang "$on32" clang -O2 $m32
    for cc in gcc clang; do
        [ $cc = gcc ] || try "$cc-O2" "" "$cc" -O2
        for without in SIMD THREADS MMAP; do
            try "$cc-no-$without" "" "$cc" -O1 "-DLFM2_NO_$without"
        done
        try "$cc-bare" "" "$cc" -O1 -DLFM2_NO_SIMD -DLFM2_NO_THREADS \
            -DLFM2_NO_MMAP
    done
}

# The slowest first, here too.
all_suites() {
    suites s390x-big-endian qemu-s390x s390x-linux-gnu-gcc \
        -fexcess-precision=fast -static
    suites ppc64le qemu-ppc64le powerpc64le-linux-gnu-gcc -static
    suites armhf qemu-arm arm-linux-gnueabihf-gcc -static
    suites riscv64 qemu-riscv64 riscv64-linux-gnu-gcc -static
    suites aarch64-dotprod "qemu-aarch64 -cpu max" aarch64-linux-gnu-gcc -static
    suites i386-gcc "$on32" gcc $m32
}

lane() {
    [ "$what" = quick ] || more
    quick
}

what=${1:-quick}
if [ -e "$shared/golden" ]; then
    for m in dense-Q4_0 dense-Q2_K dense-Q6_K dense-IQ4_XS dense-F16 \
        moe-Q4_K_M small_moe-F32; do
        cp "$shared/golden/$m.gguf" "$dir/models"
    done
    cp "$shared/golden/tokens.i32" "$dir/models"
else
    echo "skipped: models of other formats, which do not come with the source"
fi
compile reference "${CC:-cc}" -O2 -DLFM2_NO_SIMD && hashes reference &&
    logits reference || exit 1

# Two lanes side by side: two CPUs are half the wait.
lane &
lane
wait
# Unoptimised, kernels keep every register on the stack.
for level in 2 3; do
    frames gcc-O$level
done
if [ "$what" = ports ]; then
    alone static
    exact_fma
    sh test/suites.sh
    all_suites &
    all_suites
    wait
fi
passed=$(number ok)
failed=$(($(number taken) - passed - $(number skipped)))
echo "logits:    $(cksum <"$dir/reference.logits")"
echo "self-test: $(sed -n 1p "$dir/reference.hashes"), an answer:" \
    "$(sed -n 2p "$dir/reference.hashes")"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
