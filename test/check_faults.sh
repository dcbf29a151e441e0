#!/bin/sh
# What once went wrong, and what users of such programs ran into: options, bodies
# of requests, speeds, stop strings, sessions, chats, batches, interrupts.
#     RUN=./run PARROT=build/test/parrot test/check_faults.sh
. test/lib.sh

unset NO_COLOR
always="-t 1"
q="What is LFM2?"

# body TEXT: a request with TEXT behind its question, in $dir/m.
body() {
    echo "{\"messages\":[{\"role\":\"user\",\"content\":\"$q\"}]$1}" >"$dir/m"
}

# field NAME: the first number of that name in the last output.
field() {
    sed -n "s/.*\"$1\": \([-0-9.e+]*\).*/\1/p" "$dir/out"
}

# --------------------------------------------------------------------- options

expect 0 "an answer" --temp 0 $m "$q"
cp "$dir/out" "$dir/answer"

printf '%s\n' "$q" >"$dir/in"
input=$dir/in
expect 0 "- is standard input" --temp 0 $m -
same "- is standard input" "$dir/answer" "$dir/out"
expect 0 "-p -" --temp 0 $m -p -
same "-p - is standard input" "$dir/answer" "$dir/out"
input=/dev/null
refuses 2 "-p" $m -p one -p two
refuses 2 "--file" --batch --file one --file two $m
expect 0 "-n -2, as llama.cpp has it" --temp 0 -n -2 $m "$q"
same "-n -2 is no limit" "$dir/answer" "$dir/out"
expect 0 "-t 9" -t 9 -n 1 --temp 0 $m "$q"
says "-t 9"                               # more threads than CPUs are slow
refuses 2 "batch" --batch $m hello
hushes "-p"                               # which was not given

# No option is passed over in silence: option, what is asked for.
while read -r option rest; do
    [ "${rest#*hi}" = "$rest" ] || rest="${rest%hi} hi"
    # shellcheck disable=SC2086
    expect 2 "$rest $option" $rest $m ${option%,*} ${option#*,}
    says "${option%,*}"
    holds "and no output" [ ! -s "$dir/out" ]
done <<END
--parallel,2 -p hi
--shard,0/2 -p hi
--resume,$dir/none -p hi
--null,--quiet -p hi
--stop,x --tokenize
--json,--quiet --tokenize
--json,--quiet --batch
--json,--quiet -cnv
--temp,1 --tokenize
--temp,1 --inspect
--temp,1 --bench
--session,$dir/none --tokenize
--session,$dir/none --batch
--session,$dir/none --ppl README.md
--messages,$dir/none --ppl README.md
--messages,$dir/none --batch
--think,hide --inspect
--seed,1 --export-tokenizer $dir/none
--bos,--quiet --inspect
--shard,0/2 --bench
-n,3 --tokenize
--lookup,3 --ppl README.md
--trace,$dir/none --batch
END
holds "nothing was written" [ ! -e "$dir/none" ]

# What other programs take: nothing to do, or a word on what to do instead.
expect 0 "flags of model cards" --temp 0 --jinja -fa on -st --mlock --no-warmup \
    $m "$q"
for flag in --jinja -fa -st --mlock --no-warmup; do
    says $flag
done
same "flags of model cards" "$dir/answer" "$dir/out"
refuses 2 "scripts/download.sh" -hf LiquidAI/LFM2-350M-GGUF "$q"
refuses 2 "--session" --prompt-cache "$dir/none" $m "$q"

# Names of models hold other words.
export LC_ALL=C
for name in LFM2-Ragdoll1 LFM2-Toolbox1 LFM2-Tiny-MTP; do
    sed "s/LFM2-Tiny-MoE/$name/" $m >"$dir/named.gguf"
    expect 0 "$name" --json -n 1 "$dir/named.gguf" hi
    holds "$name has no preset of its own" [ "$(field temperature)" = 0.3 ]
done
expect 0 "a preset" -v --temp 0.9 -n 1 $m hi
holds "is not shown with what was given instead" \
    sh -c "! grep -q 'preset.*0\.9' $dir/err"
printf 'I say\n' | "$parrot" "$dir/p.gguf"
expect 0 "a template is named" -v -n 1 "$dir/p.gguf" hi
holds "once" sh -c "! grep -q 'template lfm2.*template lfm2' $dir/err"

# ------------------------------------------------------- what is said, and where

expect 0 "-n 0" --temp 0 -n 0 $m "$q"
holds "nothing is no line" [ ! -s "$dir/out" ]
"$run" -v -n 3 --temp 0 -t 1 $m "$q" >"$dir/out" 2>&1
holds "statistics begin a line" sh -c "! grep -q '[^ ]run[^ ]*: ' $dir/out"

# A speed is of the tokens that were computed: the first comes with the prompt.
expect 0 "a token" --json --temp 0 -n 1 $m "$q"
has "a single token has no speed" '"predicted_per_second": null'
expect 0 "three tokens" --json --temp 0 -n 3 $m "$q"
echo "$(field predicted_per_second) $(field predicted_ms)" |
    awk '{ exit !($1 > 1990 / $2 && $1 < 2010 / $2) }'
result $? "two steps for three tokens: $(field predicted_per_second) a second"

# -q: nothing but errors.
s=$dir/session
expect 0 "a full context" -q --temp 0 -c 20 --raw -n 100 $m "Once upon a time"
holds "-q: a full context" [ ! -s "$dir/err" ]
expect 0 "a session" -q --session "$s" -n 2 $m hello
expect 0 "it goes on" -q --session "$s" -n 2 -sys "Be brief." --kv f32 $m hello
holds "-q: a session that is read again" [ ! -s "$dir/err" ]

# ------------------------------------------------------------ bodies of requests

# A file of --messages is a request, as a line of a batch is.
for wish in '"max_tokens":2' '"stop":["small"]' '"temperature":3,"seed":7' \
    '"temperature":3,"top_k":1' '"repetition_penalty":9,"temperature":3,"seed":2' \
    '"logit_bias":{"9":100},"max_tokens":3' '"max_completion_tokens":4'; do
    body ",$wish"
    expect 0 "$wish" --json --temp 0 $m --messages "$dir/m"
    sed 's/.*"content": \("\([^"\\]\|\\.\)*"\).*/\1/' "$dir/out" >"$dir/said_by_it"
    cp "$dir/m" "$dir/in"
    batch 0 "$wish, in a batch" --temp 0
    sed 's/.*"content": \("\([^"\\]\|\\.\)*"\).*/\1/' "$dir/out" >"$dir/expected"
    same "--messages honours $wish" "$dir/expected" "$dir/said_by_it"
done
for wish in '"grammar":"x"' '"max_tokens":"x"' '"top_p":7' '"n":2' \
    '"continue_final_message":"yes"' '"add_generation_prompt":1' \
    '"response_format":{"type":"xml"}'; do
    body ",$wish"
    name=${wish#?}
    refuses 2 "${name%%\"*}" $m --messages "$dir/m"
done
echo '[{"role":"user"}]' >"$dir/m"
refuses 2 "content" $m --messages "$dir/m"
echo '[{"role":"user","content":null}]' >"$dir/m"
refuses 2 "content" $m --messages "$dir/m"
echo '[{"type":"function","function":{"description":"x"}}]' >"$dir/m"
refuses 2 "name" $m --tools "$dir/m" "$q"

# What would change an answer and is not known is refused, on every line; what
# would not is named once.
{
    for wish in '"json_schema":{}' '"grammar":"x"' '"guided_json":{}' \
        '"num_predict":2' '"suffix":"x"' '"best_of":3' '"echo":1' \
        '"ignore_eos":"yes"' '"grammar":"x"' '"frobs":1'; do
        echo "{\"custom_id\":\"wrong\",\"prompt\":\"a\",\"max_tokens\":1,$wish}"
    done
    for i in 1 2 3; do
        echo "{\"custom_id\":\"good\",\"prompt\":\"a\",\"max_tokens\":1,"\
"\"cache_prompt\":true,\"user\":\"u$i\"}"
    done
} >"$dir/in"
batch 7 "unknown members"
holds "ten are refused" [ "$(grep -c '"wrong".*"error": {"code"' "$dir/out")" = 10 ]
holds "three are not" [ "$(grep -c '"good".*"error": null' "$dir/out")" = 3 ]
for name in json_schema grammar guided_json num_predict suffix best_of echo \
    ignore_eos frobs; do
    has "the member is named" "\\\"$name\\\""
done
for name in cache_prompt user; do
    holds "$name is named once" [ "$(grep -c "\"$name\"" "$dir/err")" = 1 ]
done
echo '{"messages":[{"role":"user","content":"What is LFM2?"}],"max_tokens":-1}' \
    >"$dir/in"
batch 0 "max_tokens -1 is no limit" --temp 0
has "max_tokens -1" '"finish_reason": "stop"'

# Objects of many members.
awk 'BEGIN { printf "{\"prompt\":\"a\",\"max_tokens\":1,\"metadata\":["
             for (i = 0; i < 150; i++) {
                 printf "%s{", i ? "," : ""
                 for (k = 0; k < 4096; k++) printf "%s\"k%d\":1", k ? "," : "", k
                 printf "}"
             }
             print "]}" }' >"$dir/in"
longest=3
limited "$run" $m --batch -t 1 <"$dir/in" >"$dir/out" 2>"$dir/err"
holds "many members are read, or refused, in no time" lines "$dir/out" 1
longest=300

# Every call has a name of its own.
printf '<|tool_call_start|>\t[f(a=1), f(a=1)]\t<|tool_call_end|>\n' |
    "$parrot" "$dir/p.gguf"
for i in 1 2; do
    echo '{"messages":[{"role":"user","content":"hi"}]}'
done >"$dir/in"
m=$dir/p.gguf batch 0 "calls" -q --temp 0 --template lfm2
m=test/tiny.gguf
holds "four calls, four ids" [ "$(grep -o '"id": "call_[^"]*"' "$dir/out" |
    sort -u | wc -l)" = 4 ]

# ---------------------------------------------------------------- stop strings

# Control tokens are not seen, and stop when they are asked for by name.
printf 'one\t<|fim_pre|>\ttwo\t<|fim_mid|>\tthree\n' | "$parrot" "$dir/p.gguf"
stopped() {
    expect 0 "--stop $1" -q --temp 0 --template lfm2 "$dir/p.gguf" hi --stop "$1"
    printf '%s' "$2" >"$dir/expected"
    tr -d '\n' <"$dir/out" >"$dir/flat"
    same "--stop $1" "$dir/expected" "$dir/flat"
}
stopped zzz onetwothree
stopped '<|fim_pre|>' one
stopped '<|fim_mid|>' onetwo
stopped 'netw' o
stopped '<|im_end|>' onetwothree
stopped '|>' onetwothree

# What stops is a text: a token that is the same is counted as any other.
echo '{"prompt":"Once upon a time","max_tokens":20,"stop":[" a"]}' >"$dir/in"
batch 0 "a stop string that is a token" --temp 0
whole=$(field completion_tokens)
echo '{"prompt":"Once upon a time","max_tokens":20,"stop":[" a "," a"]}' >"$dir/in"
batch 0 "or two" --temp 0
holds "are counted alike: $whole" [ "$(field completion_tokens)" = "$whole" ]

# -------------------------------------------------------------------- sessions

# What a run writes, the next one reads: numbers beyond all, and deep values.
# called VALUE: a conversation with a call of that argument.
called() {
    echo "[{\"role\":\"user\",\"content\":\"hi\"},{\"role\":\"assistant\","\
"\"content\":\"\",\"tool_calls\":[{\"name\":\"f\",\"arguments\":{\"a\":$1}}]},"\
"{\"role\":\"user\",\"content\":\"go on\"}]" >"$dir/m"
}
deep=$(awk 'BEGIN { while (n++ < 59) s = "[" s "]"; print s }')
printf '/save %s\n/clear\n/load %s\n/save %s\n' "$dir/a" "$dir/a" "$dir/b" \
    >"$dir/in"
for value in 1e400 "$deep"; do
    called "$value"
    rm -f "$s" "$dir/a" "$dir/b"
    input=$dir/in
    limited "$run" -cnv -q --temp 0 -n 3 --messages "$dir/m" $m <"$dir/in" \
        >"$dir/out" 2>"$dir/err"
    [ ! -s "$dir/a" ] || cmp -s "$dir/a" "$dir/b"
    result $? "/load reads what /save wrote"
    input=/dev/null
    limited "$run" --temp 0 -n 3 --session "$s" --messages "$dir/m" $m \
        </dev/null >"$dir/out" 2>"$dir/err"
    if [ $? -eq 0 ]; then
        expect 0 "a session of it" --temp 0 -v -n 1 --session "$s" $m "What else?"
        has_all=$(sed -n 's/.*prompt[^0-9]*\([0-9]*\) tokens, \([0-9]*\) of.*/\1/p' \
            "$dir/err")
        holds "goes on: a prompt of $has_all tokens" [ "${has_all:-0}" -gt 25 ]
        hushes "anew"
    fi
done

# Long files are refused before they are read.
rm -f "$s"
expect 0 "a session" -q --session "$s" -n 2 $m hello
truncate -s 1100M "$s"
longest=5
expect 3 "a session of 1.1 GB" -n 2 --session "$s" $m hello
longest=300
rm -f "$s"

# ----------------------------------------------------------------------- chats

printf '/save %s\n' "$dir/nothing" >"$dir/in"
input=$dir/in
expect 0 "/save of nothing" -cnv $m
input=/dev/null
holds "saves nothing" [ ! -e "$dir/nothing" ]
hushes "nothing: saved"

# --------------------------------------------------------------------- batches

# Conversations that take turns keep their caches: A, B, A, B, with room for four.
# Each line is written once that before it is answered.
mkfifo "$dir/pipe"
"$run" $m --batch -v -t 1 --temp 0 --parallel 4 -n 8 <"$dir/pipe" >"$dir/out" \
    2>"$dir/err" &
pid=$!
exec 3>"$dir/pipe"
n=0 known_a= known_b=
for i in 1 2 3 4; do
    for who in a b; do
        n=$((n + 1))
        eval "talk=\$known_$who"
        [ -n "$talk" ] ||
            talk="{\"role\":\"system\",\"content\":\"$(yes "I am $who, and tell" |
                head -n 30 | tr '\n' ' ')\"}"
        talk="$talk,{\"role\":\"user\",\"content\":\"What is $i?\"}"
        echo "{\"messages\":[$talk]}" >&3
        within 30 lines "$dir/out" $n
        said=$(tail -n 1 "$dir/out" |
            sed 's/.*"content": \("\([^"\\]\|\\.\)*"\).*/\1/')
        eval "known_$who='$(echo "$talk,{\"role\":\"assistant\",\"content\":$said}" |
            sed "s/'/'\\\\''/g")'"
    done
done
exec 3>&-
wait_within 60 $pid
reused=$(sed -n 's/.* \([0-9]*\) of them reused.*/\1/p' "$dir/err")
# What was read in the six turns that are not the first of their talk.
prompts=$(sed -n 's/.*"prompt_tokens": \([0-9]*\).*/\1/p' "$dir/out" |
    awk 'NR <= 6 { n += $1 } END { print n }')
holds "taking turns: $reused tokens reused of $prompts" \
    [ "${reused:-0}" -ge "$prompts" ]

# While anything is written, prompts are read in pieces; check_jobs.c counts them.
awk 'BEGIN { print "{\"prompt\":\"Once upon\",\"max_tokens\":12,\"ignore_eos\":true}"
             printf "{\"max_tokens\":1,\"prompt\":["
             for (i = 0; i < 900; i++) printf "%s%d", i ? "," : "", 20 + i
             print "]}" }' >"$dir/in"
batch 0 "a prompt in pieces" -q --temp 0 --prompt-piece 16
cp "$dir/out" "$dir/expected"
batch 0 "or at once" -q --temp 0 --prompt-piece 65536
same "the pieces of a prompt change nothing" "$dir/expected" "$dir/out"

# What is resumed has the order of its input.
awk 'BEGIN { while (i++ < 60)
    printf "{\"custom_id\":\"q%d\",\"prompt\":\"Story %d\",\"ignore_eos\":true,"\
           "\"max_tokens\":%d}\n", i, i, i % 4 == 1 ? 120 : 3 }' >"$dir/in"
batch 0 "undisturbed" -q --temp 0
cp "$dir/out" "$dir/whole"
sed 's/.*"custom_id": "\([^"]*\)".*/\1/' "$dir/whole" >"$dir/order"
: >"$dir/part"
"$run" $m --batch -q -t 1 --parallel 3 --isa scalar --temp 0 \
    --resume "$dir/part" <"$dir/in" >"$dir/out" 2>"$dir/err" &
pid=$!
within 300 lines "$dir/part" 1
kill -TERM $pid
wait_within 60 $pid
n=$(wc -l <"$dir/part")
holds "stopped in the middle: $n" [ "$n" -gt 0 ]
holds "and not done" [ "$n" -lt 60 ]
batch 0 "resumed" -q --temp 0 --resume "$dir/part"
sed 's/.*"custom_id": "\([^"]*\)".*/\1/' "$dir/part" >"$dir/ids"
same "the order of a resumed batch" "$dir/order" "$dir/ids"

# ------------------------------------------------------------------ interrupts

# An answer that is interrupted is an object all the same, in OpenAI's words.
interruptible "$run" -q --json --raw --temp 0 --ignore-eos --isa scalar -t 1 \
    -c 60000 -n 50000 $m Once >"$dir/out" 2>"$dir/err" &
pid=$!
sleep 0.7
kill -INT $pid
wait_within 20 $pid
holds "interrupted: status 130" [ $? -eq 130 ]
hasnt "interrupted" '"finish_reason": "interrupted"'
has "interrupted" '"finish_reason": null'

needs_terminal "interrupts at a terminal"
export TERM=xterm
always="-t 1 --temp 0"

open_terminal -q $m
shows 1 "> "                              # also with -q
types '\004'
leaves 0 "-q"

# A command forgets a Ctrl-C before it, and so does a line that was typed.
open_terminal $m
shows 1 "LFM2-Tiny-MoE"                   # what is talked to
types '\003'
sleep 0.3
types '/stats\n'
shows 1 "in the context"
types '\003'
sleep 0.3
types 'What is LFM2?\n'
shows 1 "LFM2 is a family"
types '\004'
leaves 0 "Ctrl-C, a command, Ctrl-C"

# The files of one that is left by Ctrl-C are whole.
open_terminal --trace "$dir/trace" -n 3 $m
shows 1 "/help"
types 'hello\n'
shows 1 "Hello"
sleep 0.3
types '\003'
sleep 0.5
types '\003'
leaves 130 "Ctrl-C twice"
holds "leaves a trace" [ "$(wc -l <"$dir/trace")" -gt 100 ]
sed '/^{.*}$/d' "$dir/trace" >"$dir/words"
holds "of whole lines" [ ! -s "$dir/words" ]

# Speeds are for -v; nothing from the vocabulary steers a terminal.
script -qec "$run -t 1 --temp 0 -n 3 $m hello" /dev/null </dev/null >"$dir/tty" \
    2>&1
holds "no speeds at a terminal" sh -c "! grep -q 'tok/s' $dir/tty"
printf '\033[31m' >"$dir/in"
input=$dir/in
always=
expect 0 "an escape sequence" --tokenize $m
script -qec "$run --detokenize $m <$dir/out" /dev/null </dev/null >"$dir/tty" \
    2>&1
holds "--detokenize at a terminal" \
    sh -c "! grep -q '$(printf '\033')' $dir/tty && grep -q '31m' $dir/tty"

finish
