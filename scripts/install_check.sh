#!/bin/sh
# Make sure that libcheck, the unit test library, can be compiled against;
# install it with whatever package manager is here if it cannot.
set -u

have_check() {
    # shellcheck disable=SC2046
    echo '#include <check.h>
int main(void) { srunner_free(srunner_create(suite_create("x"))); }' |
        ${CC:-cc} -x c - -o /dev/null \
            $(pkg-config --cflags --libs check 2>/dev/null || echo -lcheck) \
            -lm -pthread 2>/dev/null
}

have_check && exit 0
echo "libcheck is missing: installing it" >&2
root=
[ "$(id -u)" = 0 ] || root=sudo
if command -v apt-get >/dev/null; then
    $root apt-get update -qq
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
        --no-install-recommends check pkg-config
elif command -v dnf >/dev/null; then
    $root dnf install -y check-devel pkgconf
elif command -v apk >/dev/null; then
    $root apk add check-dev pkgconf
elif command -v brew >/dev/null; then
    brew install check pkg-config
fi >&2
have_check && exit 0
echo "libcheck cannot be installed from here; please install it (Debian:" \
     "check, Fedora: check-devel, Alpine: check-dev, Homebrew: check)" >&2
exit 1
