#!/bin/sh
# The manual has the options of --help, and a form that readers of manuals take.
#     RUN=./run test/check_man.sh
. test/lib.sh

page=scripts/lfm2.1
scripts/make_man.sh "$run" >"$dir/page"
holds "make man writes the same page again" diff $page "$dir/page"
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
