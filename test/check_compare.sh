#!/bin/sh
# scripts/compare_trace.py, on traces of the shipped model.  (What the official
# implementation computes is compared in check_golden.c, without Python.)
. test/lib.sh

needs_python json "the comparison of traces"
d=$dir

# trace NAME OPTION...: $d/NAME, and $d/NAME.f32.
trace() {
    name=$1
    shift
    "$run" -q --raw --temp 0 -n 3 -t 1 --trace "$d/$name" \
        --trace-raw "$d/$name.f32" "$@" $m "What is a short convolution?" \
        >/dev/null
}

# compare STATUS PATTERN ARGUMENT...: it ends so, its last line like that.
compare() {
    status=$1 pattern=$2
    shift 2
    "$python" scripts/compare_trace.py "$@" >"$d/out" 2>&1
    got=$?
    tail -3 "$d/out"
    [ $got = "$status" ] && tail -1 "$d/out" | grep -q "$pattern"
}

holds "a trace" trace a --kv f32
holds "one of other batches" trace b --kv f32 -b 3
holds "one of another cache" trace c --kv f16
attention='^the first that differs: model.layers.2.self_attn.out_proj '

holds "batches change no bit" compare 0 '^no module differs by more than 0$' \
    "$d/a" "$d/b" --bound 0
holds "nor is the order of the lines looked at" sh -c \
    "sort '$d/b' >'$d/sorted' && $python scripts/compare_trace.py --bound 0 \
    '$d/a' '$d/sorted'"
holds "rounded keys and values show in the first attention" \
    compare 1 "$attention" "$d/a" "$d/c" --bound 0
holds "in the whole vectors, too" compare 1 "$attention" "$d/a" "$d/c" \
    --bound 0 --raw "$d/a.f32" "$d/c.f32"
holds "a large bound allows that" compare 0 '^no module .* (the furthest: ' \
    "$d/a" "$d/c" --bound 10
holds "every position can be shown" sh -c \
    "$python scripts/compare_trace.py --all '$d/a' '$d/b' |
    grep -c '^model.layers.5.ffn_norm ' >'$d/n' && [ \$(cat '$d/n') -gt 5 ]"

# The whole is no less than what the records tell.
further() {
    "$python" scripts/compare_trace.py "$d/a" "$d/c" >"$d/few"
    "$python" scripts/compare_trace.py "$d/a" "$d/c" \
        --raw "$d/a.f32" "$d/c.f32" >"$d/whole"
    paste "$d/few" "$d/whole" | awk '/^model\.|^lm_head/ {
        for (i = 4; $i !~ /^model|^lm_head/; i++)
            ;
        n++
        if ($3 > 1.01 * $(i + 2)) { print; bad = 1 }
    } END { exit bad || n < 50 }'
}
holds "whole vectors are no nearer than their summaries" further

# What cannot be compared is said in one sentence.
sed '5s/"pos"/"position"/' "$d/a" >"$d/bad"
holds "a broken record" compare 2 'bad: line 5 is no record' "$d/bad" "$d/a"
head -c 5000 "$d/a" >"$d/cut"
holds "a cut one" compare 2 'cut: line [0-9]* is no record' "$d/cut" "$d/a"
holds "no trace" compare 2 'no header' /dev/null "$d/a"
holds "no file" compare 2 'No such file' "$d/none" "$d/a"
sed '1s/lfm2moe/lfm2/' "$d/a" >"$d/other"
holds "another model" compare 2 'arch is lfm2, but lfm2moe' "$d/other" "$d/a"
sed 's/"token":[0-9]*/"token":1/' "$d/a" >"$d/other"
holds "another prompt" compare 2 'position 1 is token 1, but' "$d/other" "$d/a"
holds "other vectors than the trace's" compare 2 'not what the trace has' \
    "$d/a" "$d/c" --raw "$d/c.f32" "$d/a.f32"
grep -v embed_tokens "$d/a" >"$d/cut"
holds "no tokens for the official run" compare 2 'no token at position 0' \
    "$d/cut" --transformers "$d/none"
finish
