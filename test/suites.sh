#!/bin/sh
# The suites of make check on another machine: cross-compiled with Check's own
# source, and run in an emulator.
#     test/suites.sh DIR EMULATOR COMPILER FLAGS...
# Without arguments it only fetches that source.  SUITES="check_math check_gguf"
# chooses some; CHECK_SOURCE is where the source lies, if not from Debian.
set -u

cd "$(dirname "$0")/.." || exit 1
source=${CHECK_SOURCE:-$PWD/build/check-source}
limit=
timeout -k 1 1 true 2>/dev/null && limit="timeout -k 10 7200"

# fetch_check: with lists of its own, so that nothing changes of what is
# installed here.
fetch_check() {
    mkdir -p "$source/lists/partial" "$source/cache/archives/partial"
    (
        . /etc/os-release
        cd "$source" || exit
        printf 'deb-src [signed-by=%s] http://deb.debian.org/debian %s main\n' \
            /usr/share/keyrings/debian-archive-keyring.gpg \
            "$VERSION_CODENAME" >sources.list
        printf '%s\n' "Dir::State::Lists \"$PWD/lists\";" \
            "Dir::Cache \"$PWD/cache\";" \
            "Dir::Etc::SourceList \"$PWD/sources.list\";" \
            "Dir::Etc::SourceParts \"/dev/null\";" >apt.conf
        export APT_CONFIG="$PWD/apt.conf"
        apt-get -q update && apt-get -q source --download-only check &&
            tar -xf check_*.orig.tar.gz --strip-components=1
    ) >"$source.log" 2>&1
}

[ -x "$source/configure" ] || fetch_check
if [ ! -x "$source/configure" ]; then
    echo "skipped: the source of Check could not be had"
    exit 0
fi
[ $# -gt 0 ] || exit 0
source=$(cd "$source" && pwd)
dir=$1 emulator=$2
shift 2
mkdir -p "$dir" build/test
host=$("$1" -dumpmachine)
[ -n "$emulator" ] || host=$(cc -dumpmachine)
(
    cd "$dir" || exit
    "$source/configure" --host="$host" CC="$*" CFLAGS="-O1 -w" \
        --disable-shared --disable-subunit --disable-build-docs &&
        make -C lib && make -C src libcheck.la
) >"$dir/check.log" 2>&1
if [ ! -e "$dir/src/.libs/libcheck.a" ]; then
    echo "Check cannot be built: $(tail -1 "$dir/check.log")"
    exit 1
fi

# build SUITE FILE...: with the library, if it does not include it.
build() {
    name=$1
    shift
    grep -q '"\.\./lfm2\.c"' "test/$name.c" || set -- "$@" lfm2.c
    flags=$1
    shift
    # shellcheck disable=SC2086
    $flags -std=c11 -O2 -ffp-contract=off -pthread \
        -DSUITE="${name#check_}_suite" -I"$dir/src" -I"$source/src" \
        -o "$dir/$name" "test/$name.c" test/main.c test/util.c \
        test/reference.c "$@" "$dir/src/.libs/libcheck.a" \
        "$dir/lib/.libs/libcompat.a" -lm
}

export CK_TIMEOUT_MULTIPLIER=30
all=0 failed=0
for name in ${SUITES:-$(cd test && ls check_*.c)}; do
    name=${name%.c}
    began=$(date +%s)
    if build "$name" "$*" >"$dir/$name.log" 2>&1; then
        # shellcheck disable=SC2086
        $limit $emulator "$dir/$name" >"$dir/$name.log" 2>&1
    else
        false
    fi
    status=$?
    all=$((all + 1))
    [ $status = 0 ] || { failed=$((failed + 1)); tail -5 "$dir/$name.log"; }
    echo "$name, $(($(date +%s) - began)) s:" \
        "$(grep '^[0-9]*%: Checks' "$dir/$name.log" || echo "status $status")"
done
echo "$failed failed of $all suites"
