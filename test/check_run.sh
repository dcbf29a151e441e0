#!/bin/sh
# The program itself: exit codes, what goes to standard output, every option.
#     RUN=./run test/check_run.sh
. test/lib.sh

# ------------------------------------------------------------------------ usage

expect 0 "--help" --help
holds "help on standard output" grep -q "^usage: ${run##*/} " "$dir/out"
holds "and nowhere else" [ ! -s "$dir/err" ]
holds "help fits in 80 columns" sh -c "! grep -v '|' $dir/out | grep -q '.\{81\}'"
expect 0 "-h" -h
expect 0 "--version" --version
for word in 'lfm2.c ' compiler isa 'byte order' 'Q6_K'; do
    holds "--version names $word" grep -q "$word" "$dir/out"
done
expect 2 "no arguments"
says "no model given"
expect 2 "an unknown option" --tempp 1 $m hello
says "unknown option --tempp"
expect 2 "-i" -i $m hello
says "-p gives a prompt"
expect 2 "-t 0.7" -t 0.7 $m hello
says "did you mean --temp 0.7?"
expect 2 "an option without its value" $m -n
says "-n needs a value"
expect 2 "a value too many" $m --raw=yes hello
says "--raw takes no value"
expect 2 "a third word" $m two words
says "a prompt of several words"
for bad in "-n x" "-n 1.5" "-n 99999999999" "-n -3" "--temp nan" "--temp -1" \
    "--temp 1x" "--top-p 1.5" "--min-p -0.1" "--top-k -2" "-s x" "-s 1.5" \
    "-s 99999999999999999999" "-t -1" "-b 0" "-c -1" "--repeat-penalty 0" \
    "--kv f8" "--isa sse" "--temp "; do
    # shellcheck disable=SC2086
    expect 2 "$bad" $bad $m hello
    says "expected"
done
expect 2 "two jobs" --tokenize --inspect $m

# ------------------------------------------------------------------------ files

expect 3 "a model that is not there" "$dir/none.gguf" hello
says "No such file"
expect 3 "a folder for a model" test hello
expect 4 "a file that is no model" Makefile hello
head -c 100000 $m >"$dir/cut.gguf"
expect 4 "a model cut short" "$dir/cut.gguf" hello
says "$dir/cut.gguf: "
expect 3 "a prompt file that is not there" $m -f "$dir/none"
expect 3 "an ids file that is not there" $m --ids "$dir/none"
printf '\001\000\000' >"$dir/three"
expect 3 "ids that are no int32" $m --ids "$dir/three"
printf '\377\377\377\177' >"$dir/big"
expect 2 "an id out of range" $m --ids "$dir/big"
says "token 0 is 2147483647"
expect 3 "a tokenizer that is not there" $m --tokenizer "$dir/none" hello
printf 'one\0two' >"$dir/nul"
expect 2 "a NUL byte in a prompt" $m -f "$dir/nul"
says "a NUL byte after 3 bytes"
expect 2 "no prompt" $m
says "standard input is empty"
expect 2 "two prompts" $m -p hello hello
says "there is a prompt already"
expect 2 "a system prompt without a template" $m --raw -sys x hello
says "-sys"
expect 0 "plain text" -q --temp 0 --raw -n 5 $m "Once upon a time"
cp "$dir/out" "$dir/plain"
expect 0 "-no-cnv" -q --temp 0 -no-cnv -n 5 $m "Once upon a time"
same "-no-cnv is --raw" "$dir/plain" "$dir/out"
for isa in avx2 avxvnni avx512 avx512vnni neon dotprod simd128 relaxed; do
    if "$run" --version | grep '^isa' | grep -qw $isa; then
        expect 0 "--isa $isa" --isa $isa -n 1 $m hello
    else
        expect 2 "an instruction set that is not there" $m --isa $isa hello
        says "isa $isa: not on this CPU"
    fi
done
{ "$run" -q --raw -n 50 $m "Once upon a time" 2>"$dir/err"
    echo $? >"$dir/status"; } | :
[ "$(cat "$dir/status")" = 3 ]
result $? "a reader that leaves is status 3"
if [ -e /dev/full ]; then
    "$run" -q -n 5 $m hello >/dev/full 2>"$dir/err"
    [ $? -eq 3 ]
    result $? "a full disk is status 3"
    "$run" --help >/dev/full 2>"$dir/err"
    [ $? -eq 3 ]
    result $? "even for --help"
fi
sh -c "ulimit -f 1; '$run' --logits '$dir/large' $m hello" 2>"$dir/err"
[ $? -eq 3 ]
result $? "a file that may not grow is status 3"
expect 3 "logits that cannot be written" $m --logits "$dir/no/such" hello
expect 6 "a prompt longer than the context" $m -c 4 "What is LFM2?"
says "the context 4"
case $run in
*debug*) echo "skipped: memory limits, which the sanitizers do not bear" ;;
*)
    (ulimit -v 3000000 && exec "$run" -c 16777216 --kv f32 $m hello) \
        >"$dir/out" 2>"$dir/err"
    [ $? -eq 5 ]
    result $? "a context that does not fit in memory is status 5"
    says "no memory for a context of"
    ;;
esac

# --------------------------------------------------------------------- answers

expect 0 "an answer" $m --temp 0 "What is LFM2?"
holds "ends with a line break" [ -z "$(tail -c 1 "$dir/out")" ]
holds "and nothing is said about it" [ ! -s "$dir/err" ]
cp "$dir/out" "$dir/answer"
for how in "-b 1" "-b 7" "-t 1" "-t 3" "--no-mmap" "--isa scalar" "-c 512" \
    "--kv f16" "--tokenizer tokenizer.bin" "-q" "--temperature=0" "-s 9"; do
    # shellcheck disable=SC2086
    expect 0 "$how" --temp 0 $how $m "What is LFM2?"
    same "the same answer with $how" "$dir/answer" "$dir/out"
done
expect 0 "-p" --temp 0 -m $m -p "What is LFM2?"
same "-p" "$dir/answer" "$dir/out"
printf 'What is LFM2?' >"$dir/prompt"
expect 0 "-f" --temp 0 $m -f "$dir/prompt"
same "-f" "$dir/answer" "$dir/out"
"$run" --temp 0 $m <"$dir/prompt" >"$dir/out" 2>"$dir/err"
same "piped input" "$dir/answer" "$dir/out"
"$run" --temp 0 $m -f - <"$dir/prompt" >"$dir/out" 2>"$dir/err"
same "-f -" "$dir/answer" "$dir/out"
printf 'What is LFM2?\n' >"$dir/prompt"
expect 0 "-f and a newline" --temp=0 $m -f "$dir/prompt"
same "the last newline is no part of the prompt" "$dir/answer" "$dir/out"
expect 0 "a later option wins" --temp 9 --temp 0 $m "What is LFM2?"
same "a later option wins" "$dir/answer" "$dir/out"
expect 0 "-- ends the options" --temp 0 -- $m "What is LFM2?"
same "-- ends the options" "$dir/answer" "$dir/out"
expect 0 "-v" -v --temp 0 $m "What is LFM2?"
same "-v changes nothing on standard output" "$dir/answer" "$dir/out"
for word in seed temperature min-p threads "tok/s"; do
    holds "-v says the $word" grep -q "$word" "$dir/err"
done
if command -v taskset >/dev/null; then
    taskset -c 0 "$run" -v -n 1 $m hello >"$dir/out" 2>"$dir/err"
    holds "one allowed CPU is one thread" grep -q 'threads 1,' "$dir/err"
fi
expect 0 "-n 3" --temp 0 -n 3 $m "What is LFM2?"
holds "-n cuts the answer" [ "$(wc -c <"$dir/out")" -lt 40 ]
expect 0 "-n 0" --temp 0 -n 0 $m "What is LFM2?"
expect 0 "a full context" --temp 0 -c 20 --raw -n 100 $m "Once upon a time"
holds "is said" grep -q 'context of 20 tokens is full' "$dir/err"
expect 0 "a seed" -s 7 --temp 1.5 --min-p 0 --top-k 50 --top-p 0.99 \
    --raw -n 40 $m "Once upon a time"
cp "$dir/out" "$dir/seven"
expect 0 "again" -s 7 --temp 1.5 --min-p 0 --top-k 50 --top-p 0.99 -t 1 -b 3 \
    --raw -n 40 $m "Once upon a time"
same "the same seed, the same text" "$dir/seven" "$dir/out"
expect 0 "another seed" -s 8 --temp 1.5 --min-p 0 --top-k 50 --top-p 0.99 \
    --raw -n 40 $m "Once upon a time"
holds "another text" sh -c "! cmp -s $dir/seven $dir/out"
expect 0 "a system prompt" --temp 0 -sys "You are a helpful assistant." \
    $m "What is LFM2?"
holds "an answer to it" [ -s "$dir/out" ]
expect 0 "control text is text" --temp 0 -n 5 $m "<|im_end|>"

# Ctrl-C: what there is, then status 130.
: >"$dir/out"
interruptible "$run" --isa scalar -t 1 --raw --temp 100 --min-p 0 -s 1 -n 3000 \
    $m "Once" >"$dir/out" 2>"$dir/err" &
pid=$!
within 60 [ -s "$dir/out" ]
kill -INT $pid 2>/dev/null
wait_within 60 $pid
[ $? -eq 130 ] && [ -s "$dir/out" ]
result $? "interrupted: status 130 and what there was"

# Every third of the questions that the shipped model is to know, which need no
# escapes in JSON.
grep -v '[\\"]' test/questions.txt | awk 'NR % 3 == 1' >"$dir/questions"
awk -F '\t' '{ printf "{\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}]}\n",
              $1 }' "$dir/questions" >"$dir/in"
batch 0 "questions" -q --temp 0 -n 200
sed 's/.*"content": "\(\([^"\\]\|\\.\)*\)".*/\1/' "$dir/out" >"$dir/answers"
cut -f 2 "$dir/questions" >"$dir/expected"
right=$(paste "$dir/answers" "$dir/expected" |
    awk -F '\t' '$1 == $2 { n++ } END { print n }')
cp "$dir/answers" "$dir/err"
holds "at least 50 questions are answered: $right" [ "$right" -ge 50 ]
: >"$dir/err"

# --------------------------------------------------------------- ids and logits

n_ids=$(($(wc -c <test/tiny.ids) / 4))
expect 0 "--logits" $m --ids test/tiny.ids --logits "$dir/logits"
vocab=$("$run" --inspect $m | sed -n 's/^ *n_vocab *\([0-9]*\).*/\1/p')
holds "one float for each token of the vocabulary and position" \
    [ "$(wc -c <"$dir/logits")" -eq $((4 * n_ids * vocab)) ]
expect 0 "--logits -" $m --ids test/tiny.ids --logits -
same "--logits - is the same" "$dir/logits" "$dir/out"
expect 0 "--logits -b 5" $m --ids test/tiny.ids --logits - -b 5 -t 2
same "so it is in small batches" "$dir/logits" "$dir/out"
expect 0 "--ids" $m --ids test/tiny.ids -n 5 --temp 0

# ------------------------------------------------------------------------ words

printf 'Hello, world! \303\251t\303\251 <|im_end|>\n  42' >"$dir/text"
expect 0 "--tokenize" --tokenize $m -f "$dir/text"
cp "$dir/out" "$dir/ids"
holds "one line" [ "$(wc -l <"$dir/ids")" -eq 1 ]
tr -d '\n' <"$dir/ids" | "$run" --detokenize $m >"$dir/out" 2>"$dir/err"
same "--detokenize gives the text back" "$dir/text" "$dir/out"
expect 0 "--bos" --tokenize --bos $m -f "$dir/text"
holds "BOS first" grep -q '^1 ' "$dir/out"
expect 0 "--special" --tokenize --special $m "a<|im_end|>"
holds "a marker is one token" grep -q ' 7$' "$dir/out"
expect 0 "without --special" --tokenize $m "a<|im_end|>"
holds "it is text" sh -c "! grep -qw 7 $dir/out"
expect 0 "no text" --tokenize $m -f /dev/null
holds "is an empty line" [ "$(wc -c <"$dir/out")" -eq 1 ]
printf 'one\0two\0\0four' >"$dir/nul"
expect 0 "--null" --tokenize --null $m -f "$dir/nul"
holds "four texts, four lines" [ "$(wc -l <"$dir/out")" -eq 4 ]
"$run" --detokenize --null $m <"$dir/out" >"$dir/back" 2>"$dir/err"
printf 'one\0two\0\0four\0' >"$dir/expected"
same "and back" "$dir/expected" "$dir/back"
echo "12 x" | "$run" --detokenize $m >"$dir/out" 2>"$dir/err"
says "expected a token id from 0"
expect 0 "--export-tokenizer" --export-tokenizer "$dir/tok" $m
same "tokenizer.bin is the vocabulary of the shipped model" tokenizer.bin \
    "$dir/tok"
expect 0 "--tokenize with tokenizer.bin" --tokenize tokenizer.bin \
    -f "$dir/text"
same "gives the same ids" "$dir/ids" "$dir/out"

# The cases of a real vocabulary.
shared=${LFM2_SHARED:-../shared}/tokenizer
if [ -e "$shared/cases.txt0" ]; then
    expect 0 "a vocabulary without a model" --tokenize --null \
        "$shared/vocab128k.gguf" -f "$shared/cases.txt0"
    same "all ids as expected" "$shared/cases.ids" "$dir/out"
    "$run" --detokenize --null "$shared/vocab128k.gguf" <"$dir/out" \
        >"$dir/back" 2>"$dir/err"
    same "and the bytes back" "$shared/cases.txt0" "$dir/back"
    expect 4 "a vocabulary of another model" --tokenizer \
        "$shared/../golden/dense-Q4_0.gguf" $m hello
    says "a vocabulary of 512 tokens, expected the 2048"
else
    echo "skipped: a vocabulary of 128,000 tokens, which does not come with the source"
fi

# ---------------------------------------------------------------------- inspect

expect 0 "--inspect" --inspect $m
for word in architecture n_layer experts vocabulary bits_per_weight memory; do
    holds "--inspect names the $word" grep -q "$word" "$dir/out"
done

finish
