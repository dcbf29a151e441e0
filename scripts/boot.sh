#!/bin/sh
# Linux, and of all the files a system has only two: the static program, as
# init, and a model.  Boots that in an emulator and compares what the machine
# says with what the program says here.
#     make static
#     scripts/boot.sh [MODEL.gguf [QUESTION]]
#     ARCH=arm64 RUN=path/to/static/run scripts/boot.sh
# KERNEL=path names the kernel; without it Debian's is fetched with apt-get.
# QEMU="qemu-system-x86_64 -enable-kvm" is faster where it is allowed.
set -u

cd "$(dirname "$0")/.." || exit 1
model=${1:-test/tiny.gguf}
question=${2:-What is a short convolution?}
run=${RUN:-build/run-static}
arch=${ARCH:-amd64}
dir=build/boot/$arch
case $arch in
amd64) console=ttyS0 here=$run
    qemu=${QEMU:-qemu-system-x86_64 -cpu max} ;;
arm64) console=ttyAMA0 here=./run
    qemu=${QEMU:-qemu-system-aarch64 -M virt -cpu max} ;;
*) echo "ARCH=$arch: expected amd64 or arm64" >&2; exit 2 ;;
esac

for command in "${qemu%% *}" cpio; do
    command -v "$command" >/dev/null && continue
    echo "skipped: a machine with Linux alone, $command is not installed"
    exit 0
done
for file in "$run" "$here" "$model"; do
    [ -e "$file" ] && continue
    echo "$file: not there" >&2
    exit 1
done

# fetch_kernel: Debian's for virtual machines into $dir, with lists of its own, so
# that nothing changes of what is installed here.
fetch_kernel() {
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    (
        cd "$dir" || exit
        printf '%s\n' "APT::Architecture \"$arch\";" \
            "APT::Architectures { \"$arch\"; };" \
            "Dir::State::Lists \"$PWD/lists\";" \
            "Dir::Cache \"$PWD/cache\";" >apt.conf
        export APT_CONFIG="$PWD/apt.conf"
        apt-get -q update
        package=$(apt-cache depends "linux-image-cloud-$arch" |
            sed -n 's/.*Depends: //p' | head -1)
        apt-get -q download "${package:?}" && dpkg -x ./linux-image-*.deb . &&
            rm -r ./linux-image-*.deb lib lists cache
    ) >"$dir.log" 2>&1
}

mkdir -p "$dir/root"
kernel=${KERNEL:-$(ls "$dir"/boot/vmlinuz-* 2>/dev/null)}
if [ -z "$kernel" ]; then
    fetch_kernel
    kernel=$(ls "$dir"/boot/vmlinuz-* 2>/dev/null)
fi
if [ -z "$kernel" ]; then
    echo "skipped: a machine with Linux alone, no kernel came ($dir.log)"
    exit 0
fi

# A kernel starts init with what follows -- on its command line.
cp "$run" "$dir/root/run"
cp "$model" "$dir/root/model.gguf"
(cd "$dir/root" && printf 'run\nmodel.gguf\n' | cpio --quiet -o -H newc) \
    >"$dir/initramfs"
began=$(date +%s)
# shellcheck disable=SC2086
timeout 300 $qemu -m 512 -nographic -no-reboot -nodefaults -serial stdio \
    -kernel "$kernel" -initrd "$dir/initramfs" -append \
    "console=$console quiet panic=-1 rdinit=/run -- model.gguf --temp 0 -v \
\"$question\"" </dev/null 2>&1 | tr -d '\r' >"$dir/console"
echo "$arch, $(wc -c <"$dir/initramfs") bytes of initramfs," \
    "$(($(date +%s) - began)) s from power on to off:"
sed -n 's/.*run: template/run: template/; /^run: template/,/Kernel panic/p' "$dir/console"
"$here" "$model" --temp 0 -q "$question" >"$dir/answer" || exit 1
echo >>"$dir/answer"
if grep -qFx -f "$dir/answer" "$dir/console" &&
    grep -q 'Attempted to kill init! exitcode=0x00000000' "$dir/console"; then
    echo "ok: the same answer as here, and init ended well"
else
    echo "FAIL: here it is: $(cat "$dir/answer")"
    exit 1
fi
