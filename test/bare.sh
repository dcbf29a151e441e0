#!/bin/sh
# The README's first two commands on a bare Debian: the smallest that debootstrap
# makes, with git, a compiler and make.  Tests what is committed.  Not part of make
# check: it needs root and half an hour.
#     test/bare.sh
# DEBIAN=bookworm names another release than the stable one, MIRROR=URL says where
# to get it.
. test/lib.sh

mirror=${MIRROR:-http://deb.debian.org/debian}
enter="unshare --mount --pid --fork --kill-child --mount-proc"
[ "$(id -u)" = 0 ] || skip "a bare Debian, which needs root"
$enter true 2>"$dir/err" || skip "a bare Debian, which needs unshare"
command -v debootstrap >/dev/null ||
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        debootstrap >"$dir/said" 2>&1 ||
    skip "a bare Debian, which needs debootstrap"

bare=$PWD/build/bare
rm -rf "$bare"
mkdir -p "$bare"
trap 'rm -rf "$dir" "$bare"' EXIT
trap 'exit 130' INT

# What is mounted and started here ends with the command, and that with its time.
longest=5400

# inside COMMAND: in the bare system, with nothing of this one's environment.
inside() {
    # shellcheck disable=SC2016
    limited $enter sh -c '
        mount -t proc proc "$1/proc" &&
        mount -t devpts -o newinstance,ptmxmode=666 devpts "$1/dev/pts" &&
        exec chroot "$1" env -i HOME=/root http_proxy="${http_proxy-}" \
            PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -c "cd && $2"
    ' inside "$bare" "$1" </dev/null
}

# step WHAT COMMAND...: as holds, with the time it takes; what it says goes to
# build/bare.log.
step() {
    what=$1 began=$(date +%s)
    shift
    echo "-- $what begins"
    "$@" >>build/bare.log 2>&1
    status=$?
    tail -n 40 build/bare.log >"$dir/said"
    result $status "$what: status $status"
    [ $status != 0 ] || echo "ok     $what, $(($(date +%s) - began)) s"
    return $status
}

: >build/bare.log
packages=git,gcc,libc6-dev,make,ca-certificates
step "Debian" limited $enter debootstrap --variant=minbase --include=$packages \
    "${DEBIAN:-stable}" "$bare" "$mirror" || finish

# The way to packages is this machine's.
cp -L /etc/resolv.conf /etc/hosts "$bare/etc"
apt-config dump Acquire 2>/dev/null | grep -E '^Acquire::(https?|Check)' \
    >"$bare/etc/apt/apt.conf.d/99here"

# A bundle, for this may be a worktree, whose repository lies elsewhere.
git bundle create -q "$bare/root/lfm2.bundle" HEAD
step "git clone" inside "git clone -q lfm2.bundle lfm2.c" || finish
for target in demo check; do
    holds "the README names make $target" grep -q "^    make $target " README.md
    step "make $target" inside "cd lfm2.c && make $target"
done
grep -E '^(FAIL|skipped:)' build/bare.log
tail -n 1 build/bare.log
finish
