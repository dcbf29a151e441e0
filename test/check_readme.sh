#!/bin/sh
# What the README promises: its C program compiles against the installed library
# and answers, its commands work, its numbers are those of the small model, and
# what it names exists.
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
if command -v pkg-config >/dev/null; then
    # This root is none of the system's, so what it holds is named in full.
    line=$(sed -n "s|^    cc \(-o program .*\)|$cc \1|p" README.md)
    holds "it compiles as the README says" env \
        PKG_CONFIG_SYSROOT_DIR="$dir/root" \
        PKG_CONFIG_PATH="$dir/root/usr/lib/pkgconfig" \
        PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1 PKG_CONFIG_ALLOW_SYSTEM_LIBS=1 \
        sh -c "cd '$dir' && $line"
else
    echo "skipped: the line that compiles it, there is no pkg-config"
fi
if command -v c++ >/dev/null; then
    holds "the header is good C++" c++ -x c++ -std=c++11 -Wall -Wextra \
        -pedantic -fsyntax-only -include "$dir/root/usr/include/lfm2.h" \
        /dev/null
else
    echo "skipped: the header as C++, there is no c++"
fi
LD_LIBRARY_PATH="$dir/root/usr/lib" "$dir/program" test/tiny.gguf \
    "What is LFM2?" >"$dir/answer" 2>&1
"$run" -q --temp 0 test/tiny.gguf "What is LFM2?" >"$dir/expected"
holds "and answers as the command line does" cmp "$dir/expected" "$dir/answer"
holds "the shared library exports the header and nothing else" sh -c "
    nm -D --defined-only build/liblfm2.so | sed 's/.* //' | sort >'$dir/has'
    sed '/^typedef/d' lfm2.h | grep -o 'lfm2_[a-z0-9_]*(' | tr -d '(' |
        sort -u >'$dir/all'
    diff '$dir/all' '$dir/has'"
holds "make uninstall" make -s uninstall DESTDIR="$dir/root" PREFIX=/usr
holds "leaves no file" [ -z "$(find "$dir/root" ! -type d)" ]
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
for function in $(grep -o '`[a-z0-9_]*()`' README.md | tr -d '`()' |
    sort -u); do
    holds "$function() exists" grep -q "^[a-z].*[ *]$function(" lfm2.c
done
for script in $(grep -o 'scripts/[a-z_]*\.[a-z]*' README.md | sort -u); do
    holds "$script exists" [ -e "$script" ]
done
for target in $(grep -o 'make [a-z][a-z-]*' README.md | sort -u |
    sed 's/make //'); do
    holds "make $target exists" grep -q "^$target:" Makefile
done

# Each command is run with the small model for every other, and standard input
# for those that want it.  --bench and chats would take long, or a terminal.
root=$PWD
case $run in /*) ;; *) run=$root/$run ;; esac
mkdir "$dir/here"
cd "$dir/here" || exit 1
ln -s "$run" run
ln -s "$root/test" "$root/scripts" .
for name in $(grep -o '[A-Za-z0-9._-]*\.gguf' "$root/README.md" | sort -u); do
    ln -s test/tiny.gguf "$name"
done
echo "What is GGUF?" | tee question >notes.txt
echo '{"custom_id": "a1", "prompt": "GGUF is", "max_tokens": 3}' >in.jsonl
sed -n '/^```/,/^```/d; s/^    //p' "$root/README.md" |
    sed -e :more -e '/[|\\]$/N; s/\\*\n */ /; t more' |
    grep '^\./run ' | grep -v -e --bench -e --serve >"$dir/commands"
holds "there are commands" [ "$(wc -l <"$dir/commands")" -ge 12 ]
while read -r command; do
    limited sh -c "$command" <question >"$dir/out" 2>"$dir/said"
    result $? "$command"
done <"$dir/commands"
cd "$root" || exit 1
finish
