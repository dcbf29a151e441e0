#!/bin/sh
# What the README promises: its C program compiles against the installed library
# and answers; the commands it names exist.
. test/lib.sh

sed -n '/^```c$/,/^```$/p' README.md | sed '/^```/d' >"$dir/program.c"
holds "there is a program" [ -s "$dir/program.c" ]
holds "make install" make -s install DESTDIR="$dir/root" PREFIX=/usr
for file in bin/lfm2 include/lfm2.h lib/liblfm2.a lib/liblfm2.so \
    lib/pkgconfig/lfm2.pc; do
    holds "installs $file" [ -e "$dir/root/usr/$file" ]
done
cc=${CC:-cc}
holds "it compiles without a warning" "$cc" -std=c11 -Wall -Wextra -Werror \
    -pedantic -I "$dir/root/usr/include" -o "$dir/program" "$dir/program.c" \
    "$dir/root/usr/lib/liblfm2.a" -lm -pthread
if command -v c++ >/dev/null; then
    holds "the header is good C++" c++ -x c++ -std=c++11 -Wall -Wextra \
        -pedantic -fsyntax-only -include "$dir/root/usr/include/lfm2.h" \
        /dev/null
else
    echo "skipped: the header as C++, there is no c++"
fi
"$dir/program" test/tiny.gguf "What is LFM2?" >"$dir/answer" 2>&1
"$run" -q --temp 0 test/tiny.gguf "What is LFM2?" >"$dir/expected"
holds "and answers as the command line does" cmp "$dir/expected" "$dir/answer"
holds "the shared library exports the header and nothing else" sh -c "
    nm -D --defined-only build/liblfm2.so | sed 's/.* //' | sort >'$dir/has'
    sed '/^typedef/d' lfm2.h | grep -o 'lfm2_[a-z0-9_]*(' | tr -d '(' |
        sort -u >'$dir/all'
    diff '$dir/all' '$dir/has'"
# One token, step by step: names, sizes and numbers are those of a trace.
"$run" -q test/tiny.gguf --raw -n 0 --trace "$dir/trace" --trace-tokens 2 \
    "A short convolution"
sed -n 's/^{"name":"model\.\([^"]*\)".*"shape":\[\([0-9]*\)\],"first":\[\([^]]*\).*/\1 \2 \3/p' \
    "$dir/trace" | tr , ' ' | awk '{
        printf "`%s`|%d", $1, $2
        for (i = 3; i <= NF && i < 6; i++)
            printf "%s%.4g", i == 3 ? "|" : ", ", $i
        print "" }' | sort >"$dir/numbers"
sed -n 's/^| \(`embed_tokens`\|`layers[^|]*`\) |.*|.*| \([0-9]*\) | \(.*\) |$/\1|\2|\3/p' \
    README.md | sort >"$dir/told"
holds "it follows one token" [ "$(wc -l <"$dir/told")" -ge 20 ]
comm -23 "$dir/told" "$dir/numbers" >"$dir/wrong"
holds "with the numbers of a trace" sh -c "cat '$dir/wrong'; [ ! -s '$dir/wrong' ]"
for function in $(sed -n '/^## One token/,/^## /p' README.md |
    grep -o '`[a-z_]*()`' | tr -d '`()' | sort -u); do
    holds "$function() exists" grep -q "^static .*[ *]$function(" lfm2.c
done
for script in $(grep -o 'scripts/[a-z_]*\.[a-z]*' README.md | sort -u); do
    holds "$script exists" [ -e "$script" ]
done
for target in $(grep -o 'make [a-z][a-z-]*' README.md | sort -u |
    sed 's/make //'); do
    holds "make $target exists" grep -q "^$target:" Makefile
done
holds "make uninstall" make -s uninstall DESTDIR="$dir/root" PREFIX=/usr
holds "leaves nothing" [ -z "$(find "$dir/root" ! -type d)" ]
finish
