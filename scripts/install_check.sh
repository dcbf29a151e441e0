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
case $(command -v apt-get || command -v dnf || command -v apk ||
    command -v brew) in
*apt-get) install="apt-get install -y --no-install-recommends check pkg-config" ;;
*dnf) install="dnf install -y check-devel pkgconf" ;;
*apk) install="apk add check-dev pkgconf" ;;
*brew) install="brew install check pkg-config" ;;
*) install= ;;
esac

# Only root may install; Homebrew is for everybody.
if [ -n "$install" ] && [ "${install#brew}" = "$install" ] &&
    [ "$(id -u)" != 0 ]; then
    echo "the tests need libcheck; please run: sudo $install" >&2
    exit 1
fi
if [ -n "$install" ]; then
    echo "libcheck is missing: $install" >&2
    case $install in
    apt-get*) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $install -qq ;;
    *) $install ;;
    esac >&2
fi
have_check && exit 0
echo "libcheck cannot be installed from here; please install it (Debian:" \
     "check, Fedora: check-devel, Alpine: check-dev, Homebrew: check)" >&2
exit 1
