#!/bin/sh
# The same logits, byte for byte, from every compiler, level and machine that is
# at hand as from the scalar code: builds run.c in each way, reads the shipped
# model's golden tokens and a few random models in other formats, and compares
# the files of logits.
#     test/bits.sh
set -u

dir=build/bits
shared=${LFM2_SHARED:-../shared}
rm -rf "$dir"
mkdir -p "$dir"

# compile NAME COMPILER FLAGS...: the program is $dir/NAME.
compile() {
    name=$1 cc=$2
    shift 2
    "$cc" -std=c11 -ffp-contract=off -pthread "$@" -o "$dir/$name" \
        run.c lfm2.c -lm 2>"$dir/$name.log" && return
    cat "$dir/$name.log"
    false
}

# logits NAME [EMULATOR]: all of them in $dir/NAME.logits.
logits() {
    name=$1
    shift
    "$@" "$dir/$name" -q test/tiny.gguf --ids test/tiny.ids --logits - \
        >"$dir/$name.logits" || return 1
    for m in dense-Q4_0 dense-Q2_K dense-Q6_K dense-IQ4_XS dense-F16 \
        moe-Q4_K_M small_moe-F32; do
        [ -e "$shared/golden/$m.gguf" ] || continue
        "$@" "$dir/$name" -q "$shared/golden/$m.gguf" -b 33 \
            --ids "$shared/golden/tokens.i32" --logits - \
            >>"$dir/$name.logits" || return 1
    done
}

# try NAME EMULATOR COMPILER FLAGS...: if no other lane has taken it.
try() {
    name=$1 emulator=$2
    shift 2
    mkdir "$dir/$name.taken" 2>/dev/null || return
    if ! command -v "$1" >/dev/null; then
        echo "skipped: $name, $1 is not installed" | tee "$dir/$name.skipped"
    elif [ -n "$emulator" ] && ! command -v "${emulator%% *}" >/dev/null; then
        echo "skipped: $name, ${emulator%% *} is not installed" |
            tee "$dir/$name.skipped"
    elif compile "$name" "$@" && logits "$name" $emulator &&
        cmp "$dir/reference.logits" "$dir/$name.logits"; then
        echo "ok     $name" | tee "$dir/$name.ok"
    else
        echo "FAIL   $name"
    fi
}

# number SUFFIX: how many files of $dir end so.
number() {
    ls "$dir" | grep -c "\\.$1\$"
}

[ -e "$shared/golden" ] || echo "skipped: $shared/golden is not there"
compile reference "${CC:-cc}" -O2 -DLFM2_NO_SIMD && logits reference || exit 1
# All ways, the slowest first.
lane() {
    try s390x-big-endian qemu-s390x s390x-linux-gnu-gcc -O2 -static \
        -fexcess-precision=fast
    try aarch64-dotprod "qemu-aarch64 -cpu max" aarch64-linux-gnu-gcc -O2 \
        -static
    try aarch64-neon "qemu-aarch64 -cpu cortex-a53" aarch64-linux-gnu-gcc -O2 \
        -static
    try aarch64-no-simd qemu-aarch64 aarch64-linux-gnu-gcc -O2 -static \
        -DLFM2_NO_SIMD
    for cc in gcc clang; do
        for level in 0 2 3; do
            try "$cc-O$level" "" "$cc" "-O$level"
        done
    done
    case $(uname -m) in
    x86_64)
        if grep -qw fma /proc/cpuinfo 2>/dev/null; then
            try gcc-fma "" gcc -O3 -mavx2 -mfma
            try clang-fma "" clang -O3 -mavx2 -mfma
            try gcc-fma-no-simd "" gcc -O3 -mavx2 -mfma -DLFM2_NO_SIMD
            try gcc-native "" gcc -O3 -march=native
        fi
        try musl "" musl-gcc -O2 -static
        ;;
    esac
    try no-threads-no-mmap "" "${CC:-cc}" -O2 -DLFM2_NO_THREADS -DLFM2_NO_MMAP
}

# Two lanes side by side: two CPUs are half the wait.
lane &
lane
wait
passed=$(number ok)
failed=$(($(number taken) - passed - $(number skipped)))
echo "logits: $(cksum <"$dir/reference.logits")"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
