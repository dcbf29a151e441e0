#!/bin/sh
# What the library may not do, read off the object file that make has compiled:
# print, exit, assert, keep writable globals, call functions whose results differ
# between machines, or export a name that lfm2.h does not declare.  And what the
# program may not do either: call others over a network, or start a program.
. test/lib.sh

# Say what is wrong, if there are lines in the file.
none() {
    if [ -s "$dir/$2" ]; then
        echo "FAIL: $1: $(tr '\n' ' ' <"$dir/$2")"
        failed=$((failed + 1))
    else
        passed=$((passed + 1))
    fi
}

if ! command -v nm >/dev/null || ! command -v size >/dev/null; then
    skip "the symbols of the library, which need nm and size"
fi
[ -e build/lfm2.o ] || skip "the symbols of the library, which need make"
# A name may be decorated by the compiler: _exit on one system, __exit on
# another, __printf_chk where the C library is hardened.
nm -u build/lfm2.o | sed 's/.* //' >"$dir/wanted"
nm -g build/lfm2.o | grep -v ' U ' | sed 's/.* //; s/^_lfm2/lfm2/' |
    sort >"$dir/given"

functions="v?f?d?printf|f?puts|f?putc|putchar|fwrite|write|perror"
grep -E "^_*($functions)(_chk|_unlocked)?\$|^_*std(out|err)p?\$" \
    "$dir/wanted" >"$dir/prints"
none "the library prints" prints

functions="exit|_exit|_Exit|quick_exit|abort|assert|assert_fail|assert_rtn"
functions="$functions|raise|kill|longjmp|signal|sigaction"
grep -E "^_*($functions)\$" "$dir/wanted" >"$dir/exits"
none "the library ends the program" exits

functions="exp|exp2|expm1|log|log2|log10|pow|sin|cos|tan|sincos|tanh|cbrt"
grep -E "^_*($functions)[fl]?(_finite)?\$" "$dir/wanted" >"$dir/inexact"
none "the library calls what differs between C libraries" inexact

functions="rand|random|srand|time|gettimeofday|getenv|setlocale"
grep -E "^_*($functions)\$" "$dir/wanted" >"$dir/outside"
none "the library looks at the clock or the environment" outside

# Constants that need relocation (.data.rel.ro) are read-only once loaded.
size -A build/lfm2.o | awk '$1 ~ /^\.(data|bss|tdata|tbss|sdata|sbss)/ &&
    $1 !~ /^\.data\.rel\.ro/ && $2 > 0 { print $1, $2 }' >"$dir/writable"
nm build/lfm2.o | awk '$2 == "C" { print $3 }' >>"$dir/writable"
none "the library has writable globals" writable

# The library listens to nobody; the program does with --serve, and never calls.
functions="connect|getaddrinfo|gethostbyname|send|sendto|sendmsg|sendmmsg"
functions="$functions|system|popen|vfork|exec[a-z]*|posix_spawnp?|dlopen"
nm -u build/run.o | sed 's/.* //' | cat - "$dir/wanted" |
    grep -E "^_*($functions)\$" >"$dir/outside"
none "it opens connections or starts programs" outside
grep -E '^_*(socket|bind|listen|accept4?|recv[a-z]*)$' "$dir/wanted" \
    >"$dir/listens"
none "the library listens to a network" listens

sed -e 's:/\*.*\*/::' -e '/^typedef/d' lfm2.h |
    grep -oE '\blfm2_[a-z0-9_]+\(' | tr -d '(' | sort -u >"$dir/declared"
comm -23 "$dir/given" "$dir/declared" >"$dir/extra"
none "exported but not in lfm2.h" extra
comm -13 "$dir/given" "$dir/declared" >"$dir/missing"
none "in lfm2.h but not defined" missing

finish
