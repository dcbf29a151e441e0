#!/bin/sh
# --lookup: tokens guessed from the text so far change no byte of any answer.
#     RUN=./run test/check_lookup.sh
. test/lib.sh

always='-t 1'                    # which is not slower for this model
guessed=0 right=0

# answers FILE: what is to be the same, and $guesses, of which $good were right.
answers() {
    sed 's/, "timings": {[^}]*}//; s/"created": [0-9]*//' "$dir/out" >"$1"
    # shellcheck disable=SC2046
    set -- $(sed 's/.*"draft_n": \([0-9]*\), "draft_n_accepted": \([0-9]*\).*/\1 \2/' \
                 "$dir/out")
    guesses=${1:-none} good=${2:-none}
}

# agrees WHAT OPTIONS...: whatever N is, the answer and the hash of all logits
# it was chosen from are the same as without guesses.
agrees() {
    name=$1
    shift
    expect 0 "$name" $m --json -s 5 --lookup 0 "$@"
    answers "$dir/plain"
    holds "$name: none guessed" [ "$guesses" = 0 ]
    for n in 1 4 15; do
        expect 0 "$name, $n" $m --json -s 5 --lookup $n "$@"
        answers "$dir/looked-up"
        same "$name, $n" "$dir/plain" "$dir/looked-up"
        [ "$guesses" = none ] && continue
        guessed=$((guessed + guesses)) right=$((right + good))
    done
}

# A text that says the same things again and again.
story='Tom the cat had a warm scarf. "My warm scarf! I want it back," said Tom.'
printf '%s\n' "$story" "$story" "$story" >"$dir/story"

q="What is a short convolution?"
agrees "a greedy answer" --temp 0 "$q"
agrees "one that goes on" --temp 0 --ignore-eos -n 200 "$q"
agrees "a copied text" --raw --temp 0 --ignore-eos -n 150 -f "$dir/story"
holds "a copied text: $good of $guesses guesses were right" \
    [ "$good" -gt 20 ]
agrees "sampled words" --temp 0.7 --top-k 40 --top-p 0.9 --ignore-eos -n 150 "$q"
agrees "a copied text, sampled" --raw --temp 0.4 --min-p 0.1 --ignore-eos \
    -n 150 -f "$dir/story"
agrees "a penalty" --raw --temp 0.4 --repeat-penalty 1.05 --repeat-last-n 20 \
    --ignore-eos -n 150 -f "$dir/story"
agrees "a penalty on everything" --raw --temp 0 --repeat-penalty 1.02 \
    --repeat-last-n -1 --ignore-eos -n 150 -f "$dir/story"
agrees "log probabilities" --raw --temp 0 --logprobs 3 -n 40 -f "$dir/story"
agrees "a closed thought" --temp 0 --ignore-eos --think-budget 3 -n 60 \
    --template lfm2 -p "<think>$q"
agrees "two threads, floats" --raw --temp 0 --kv f32 -t 2 -n 60 -f "$dir/story"
agrees "small batches" --raw --temp 0 -b 3 -n 60 -f "$dir/story"

# Wherever it ends: by count, by a stop string within what was guessed right, by
# the context.
loop="--raw --temp 0 --repeat-penalty 0.5 --ignore-eos -f $dir/story"
for n in 1 2 5 6 7 8 40; do
    # shellcheck disable=SC2086
    agrees "$n tokens" $loop -n $n
done
for stop in scarf want '," s' m; do
    # shellcheck disable=SC2086
    agrees "before $stop" $loop -n 60 --stop "$stop"
done
for n in 110 111 112 113 114; do
    # shellcheck disable=SC2086
    agrees "a context of $n" $loop -n -1 -c $n
done

holds "some of $guessed guesses were wrong, $right right" \
    [ "$right" -gt 200 ] && holds "and not all" [ "$guessed" -gt "$right" ]

# On a screen, in a session, in a chat, whose next turns go on from the cache.
talk() {
    n=$1
    shift
    printf '%s\n' "$q" "Say it again." "Say it again." "/regen" "/stats" "$q" |
        "$run" $m -t 1 -cnv --temp 0.3 -s 7 -n 60 --ignore-eos --lookup "$n" "$@" \
        >"$dir/out" 2>"$dir/err"
}

holds "a chat" talk 0
cp "$dir/out" "$dir/plain"
grep 'in the context' "$dir/err" >"$dir/plain.stats"
for n in 3 15; do
    holds "a chat, $n" talk $n -v
    same "a chat, $n" "$dir/plain" "$dir/out"
    says "guessed"
    for part in 1 2; do
        expect 0 "session $n, $part" $m --session "$dir/session-$n" --temp 0 \
            --ignore-eos -n 80 --lookup $n "$q"
        cp "$dir/out" "$dir/session-$n-$part"
        expect 0 "session 0, $part" $m --session "$dir/session-0-$n" --temp 0 \
            --ignore-eos -n 80 --lookup 0 "$q"
        same "session $n, $part" "$dir/session-$n-$part" "$dir/out"
    done
done

# Many at once share the guesses; more of them than guesses have none.
for i in 1 2 3 4 5 6 7 8 9; do
    cat <<END
{"prompt": "$i. Tom the cat. Tom the cat. Tom the", "max_tokens": $((20 * i)), "temperature": 0.$i, "ignore_eos": true}
{"messages": [{"role": "user", "content": "$q"}], "max_tokens": 60, "temperature": 0, "presence_penalty": 0.$i, "frequency_penalty": 0.1, "ignore_eos": true}
{"prompt": "$i. Tom the cat. Tom the cat. Tom the", "max_tokens": 40, "temperature": 0, "logprobs": 2, "prompt_logprobs": 1, "echo": true, "stop": ["cat", "."]}
END
done >"$dir/in"
for parallel in 1 2 5 32; do
    for n in 0 7 15; do
        expect 0 "a batch of $parallel, $n" $m --batch -f "$dir/in" -v \
            --parallel $parallel --lookup $n
        [ $parallel = 1 ] && [ $n = 0 ] && cp "$dir/out" "$dir/plain"
        same "a batch of $parallel, $n" "$dir/plain" "$dir/out"
        holds "guesses, or none" [ "$(grep -c 'guessed [1-9]' "$dir/err")" = \
            $((n > 0)) ]
    done
done

# With experts it takes the option; what looks inside shows no guesses.
expect 0 "without the option" $m --json --raw --temp 0 -n 40 -f "$dir/story"
answers "$dir/plain"
holds "experts: none guessed" [ "$guesses" = 0 ]
for n in 0 7; do
    expect 0 "a trace, $n" $m --raw --temp 0 -n 30 -f "$dir/story" \
        --trace "$dir/trace-$n" --trace-filter lm_head --lookup $n
done
same "a trace" "$dir/trace-0" "$dir/trace-7"
refuses 2 "expected a whole number from 0 to 15" $m --lookup 16 hello

finish
