#!/bin/sh
# The program's own test, on this machine.
#     RUN=./run test/check_selftest.sh
. test/lib.sh

"$run" --selftest >"$dir/out" 2>"$dir/err"
status=$?
holds "the self-test passes" [ $status -eq 0 ]
holds "and says nothing else" [ ! -s "$dir/err" ]
holds "nothing failed" [ "$(grep -c '^FAIL' "$dir/out")" = 0 ]
holds "every weight type was tried" \
    [ "$(grep -c '^ok .* in plain C: ' "$dir/out")" = \
      "$("$run" --version | sed -n 's/^weights  *//p' | wc -w)" ]
for what in 'a\*b+c' exp sin cos; do
    holds "$what has its bits" grep -q "^ok    $what: " "$dir/out"
done
for isa in $("$run" --version | sed -n 's/^isa  *scalar//p'); do
    holds "with $isa" [ "$(grep -c "^ok .* with $isa\$" "$dir/out")" = 15 ]
    holds "a long text with $isa" grep -q "^ok    a long text, by $isa\$" \
        "$dir/out"
done
holds "the compiler and the C library are named" [ \
    "$(grep -cE '^(compiler|isa|libc)  *[^ ]' "$dir/out")" = 3 ]
holds "the hash is that of all machines" grep -q \
    '^hash  *f7e0c42c140c71ed, expected f7e0c42c140c71ed on every machine$' "$dir/out"
for with in "-t 1" "-t 3" $("$run" --version | sed -n 's/^isa  *//p' |
    sed 's/[^ ]*/--isa=&/g'); do
    # shellcheck disable=SC2086
    "$run" --json --temp 0 $with test/tiny.gguf \
        "What is a short convolution?" >"$dir/json" 2>"$dir/err"
    holds "so is that of an answer, with $with" grep -q \
        '"logits_hash": "ef30ffbb98d9a48e"' "$dir/json"
done
"$run" --selftest >"$dir/again"
holds "twice the same" cmp "$dir/out" "$dir/again"
finish
