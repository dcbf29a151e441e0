#!/bin/sh
# The manual and --help name the same options, arguments and exit status.
#     RUN=./run test/check_man.sh
. test/lib.sh

page=scripts/lfm2.1
"$run" --help >"$dir/help"

# Names and argument of each option, in their order, under their headings.
awk '
/^[A-Z].*/ && !/^(Answers|Write|LFM2_)/ { print }
/^  -/ {
    sub(/^  /, "")
    for (out = ""; match($0, /^-[^ ]+/);) {
        out = out " " substr($0, 1, RLENGTH)
        $0 = substr($0, RLENGTH + 1)
        if (!sub(/^ -/, "-"))
            break
    }
    print out (match($0, /^ [^ ]+/) ? substr($0, 1, RLENGTH) : "")
}' "$dir/help" | grep -v '^at a terminal' >"$dir/in_help"
awk '
/^\.Ss / { sub(/^\.Ss /, ""); gsub(/\\/, ""); print }
/^\.It Fl / {
    sub(/^\.It/, "")
    gsub(/ Fl /, " -")
    gsub(/ ,/, "")
    sub(/ Ar /, " ")
    print
}' $page >"$dir/in_page"
holds "the manual has the options of --help, and no others" \
    diff "$dir/in_help" "$dir/in_page"
holds "at least 60 of them" [ "$(grep -c '^ -' "$dir/in_page")" -ge 60 ]
sed -n '/Exit status:/,/terminated/p' "$dir/help" | tr ' ' '\n' |
    grep -x '[0-9][0-9]*' >"$dir/in_help"
sed -n '/^\.Sh EXIT STATUS/,/^\.El/s/^\.It //p' $page >"$dir/in_page"
holds "the same exit status" diff "$dir/in_help" "$dir/in_page"
sed -n '/DONE = 0/,/}/p' run.c | grep -o '[0-9][0-9]*' >"$dir/in_code"
holds "which are those of the program" diff "$dir/in_code" "$dir/in_page"
for name in LFM2_MODEL LFM2_THREADS NO_COLOR; do
    holds "both tell of $name" sh -c \
        "grep -q $name $dir/help && grep -q '^.It Ev $name' $page"
done
for command in help clear regen system save load stats quit; do
    holds "the manual has /$command" grep -q "^.It /$command" $page
done
if command -v mandoc >/dev/null; then
    holds "mandoc has nothing against it" mandoc -Tlint -W warning $page
elif man --version 2>/dev/null | grep -q '^man '; then
    MANROFFSEQ='' MANWIDTH=80 LC_ALL=C man --warnings -l $page >"$dir/out" \
        2>"$dir/warnings"
    holds "man has nothing against it" [ ! -s "$dir/warnings" ]
    holds "and shows it" grep -q 'EXIT STATUS' "$dir/out"
else
    echo "skipped: the form of the manual, which needs mandoc or man"
fi
finish
