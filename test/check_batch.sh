#!/bin/sh
# --batch: lines in, lines out, whatever the lines are, and the same answers
# however they are shared out, stopped and taken up again.
#     RUN=./run test/check_batch.sh
. test/lib.sh

# answers N WHAT: there are as many lines, all of them whole.
answers() {
    [ "$(wc -l <"$dir/out")" -eq "$1" ] && whole "$dir/out"
    result $? "$2: expected $1 lines, found $(wc -l <"$dir/out")"
}

whole() {
    ! grep -qvE '^\{"id": "batch_req_[0-9a-f]{16}", .*(null|\})\}$' "$1" &&
        [ -z "$(tail -c 1 "$1")" ]
}

# no_ids: the lines without the ids that each has of its own.
no_ids() {
    sed 's/"\(request_\)\{0,1\}id": "[^"]*"//g'
}

# ids FILE: the custom_id of every line.
ids() {
    sed 's/^[^,]*, "custom_id": "\([^"]*\)".*/\1/' "$1"
}

# message FILE: the JSON strings of all answers.
message() {
    sed -n 's/.*"content": \("\([^"\\]\|\\.\)*"\).*/\1/p
            s/.*"text": \("\([^"\\]\|\\.\)*"\).*/\1/p' "$1"
}

# wrong LINE TEXT: it becomes an error that has TEXT.
wrong() {
    printf '%s\n' "$1" >"$dir/in"
    batch 7 "$2"
    has "$1" "$2"
    has "$1" '"response": null, "error": {"code": "'
    answers 1 "$1"
}

# ------------------------------------------------------------- forms of a line

hello='{"messages":[{"role":"user","content":"What is LFM2?"}]}'
ids=$("$run" --tokenize --bos $m "Once upon a time" | tr ' ' ,)
cat >"$dir/in" <<END
{"custom_id":"a \"b\"","method":"POST","url":"/v1/chat/completions","body":$hello}
{"custom_id":"bare","messages":[{"role":"user","content":"What is LFM2?"}]}
  
$hello

{"custom_id":"text","method":"POST","url":"/v1/completions","body":{"prompt":"Once upon a time","max_tokens":8}}
{"prompt":[$ids],"max_tokens":8}
END
printf '{"prompt":"Once upon a time","max_tokens":8}' >>"$dir/in"
batch 0 "all forms" --temp 0
answers 6 "blank lines have no answer, the last line needs no newline"
says "6 answered, 0 failed"
has "custom_id" '"custom_id": "a \"b\"", "response": {"status_code": 200'
printf '%s\n' 'a \' bare line-4 text line-7 line-8 >"$dir/expected"
ids "$dir/out" >"$dir/ids"
same "custom_id, or the number of the line" "$dir/expected" "$dir/ids"
[ "$(message "$dir/out" | sort -u | wc -l)" -eq 2 ]
result $? "the same question in other forms, the same answer"
has "a conversation" '"object": "chat.completion"'
has "its answer" '"message": {"role": "assistant", "content": "LFM2 is a'
has "a text" '"object": "text_completion"'
has "its end" '"finish_reason": "length"'
has "its usage" '"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13'
cp "$dir/out" "$dir/first"
sed 's/$/\r/' "$dir/in" >"$dir/crlf"
cp "$dir/crlf" "$dir/in"
batch 0 "CRLF" --temp 0 -q
same "CRLF" "$dir/first" "$dir/out"
holds "-q says nothing" [ ! -s "$dir/err" ]
: >"$dir/in"
batch 0 "no lines"
answers 0 "no lines"
cp "$dir/crlf" "$dir/in"
"$run" $m --batch -f "$dir/in" --temp 0 -q >"$dir/out" 2>"$dir/err" </dev/null
same "-f" "$dir/first" "$dir/out"

# -------------------------------------------------------- lines that are wrong

wrong 'not JSON' 'column 1: found'
wrong '{"prompt":"a"' '"code": "invalid_request", "line": 1, "message"'
wrong '[1]' 'expected a JSON object as the request'
wrong '17' 'expected a JSON object as the request'
wrong '{"messages":[]}' 'messages is empty'
wrong '{"messages":"a"}' 'an array'
wrong '{"model":"x"}' 'expected either \"messages\" or \"prompt\"'
wrong '{"prompt":"a","messages":[{"role":"user","content":"a"}]}' \
    'expected either'
wrong '{"messages":[{"role":"user","content":"a\u0000b"}]}' 'NUL'
wrong '{"custom_id":7,"prompt":"a"}' '\"custom_id\": expected a string'
wrong '{"custom_id":"x","url":"/v1/embeddings","body":{"prompt":"a"}}' \
    '"custom_id": "x", "response": null'
has "a url" '\"url\": expected'
wrong '{"method":"GET","body":{"prompt":"a"}}' '\"method\": expected'
wrong '{"body":[]}' 'expected a JSON object'
wrong '{"prompt":["a","b"]}' 'expected one prompt on a line'
wrong '{"prompt":[1,2.5]}' 'token ids'
wrong '{"prompt":[1,99999999]}' 'token 1 is 99999999, expected 0 to'
wrong '{"prompt":[]}' 'no tokens'
wrong '{"prompt":{}}' 'expected a string, or an array'
for member in '"n":2' '"stream":true' '"temperature":-1' '"temperature":"hot"' \
    '"temperature":101' '"top_p":1.5' '"min_p":-0.1' '"top_k":1.5' \
    '"max_tokens":-3' '"max_tokens":1e99' '"seed":1.5' '"stop":7' \
    '"stop":[""]' '"stop":[7]' '"logprobs":21' '"logprobs":"x"' \
    '"top_logprobs":21' '"repeat_penalty":0' '"presence_penalty":-101' \
    '"logit_bias":[]' '"logit_bias":{"x":1}' '"logit_bias":{"99999999":1}' \
    '"logit_bias":{"5":2000}' '"response_format":{"type":"xml"}' \
    '"tool_choice":"required"'; do
    name=${member%%:*}
    wrong "{\"prompt\":\"a\",$member}" "\\${name%?}\\\""
done
wrong "{\"prompt\":\"a\",\"stop\":[$(yes '"a",' | head -n 16 | tr -d '\n')\"b\"]}" \
    'expected at most 16'
awk 'BEGIN { while (n++ < 65) printf "["; print "" }' >"$dir/in"
batch 7 "65 levels"
has "65 levels" "invalid_request"
printf '{"prompt":"\377"}\n{"prompt":"a\0b"}\n\0\n{"prompt":"\\ud800"}\n' \
    >"$dir/in"
batch 7 "bytes that are no text"
answers 4 "bytes that are no text"
says "0 answered, 4 failed"
awk 'BEGIN { printf "{\"custom_id\":\"long\",\"prompt\":\""
             while (n++ < 3000) printf "a b c "
             print "\"}\n{\"prompt\":\"a\",\"max_tokens\":1}" }' >"$dir/in"
batch 7 "a prompt that is too long"
has "a prompt that is too long" '"custom_id": "long", "response": null, "error": {"code": "context_length_exceeded"'
answers 2 "the others are answered"
says "1 answered, 1 failed"
echo '{"messages":[{"role":"user","content":"a"}]}' >"$dir/in"
LC_ALL=C sed 's/<|im_start|>/<|im_stort|>/' $m >"$dir/unmarked.gguf"
m="$dir/unmarked.gguf" batch 7 "no markers in the vocabulary" --template lfm2
m=test/tiny.gguf
has "no markers" '"error": {"code": "bad_model", "line": 1, "message": "the chat'
awk 'BEGIN { while (n++ < 5000) printf "%c{]%c\"\n", n % 100 + 33, n % 90 + 35 }' \
    >"$dir/in"
batch 7 "garbage"
answers 5000 "garbage"
awk 'BEGIN { while (n++ < 1000) s = s "x y z 0123"; printf "{\"prompt\":\""
             for (n = 0; n < 6800; n++) printf "%s", s
             print "\"}\n{\"prompt\":\"a\",\"max_tokens\":1}" }' >"$dir/in"
batch 7 "a line of 68 MB"
has "a line of 68 MB" "longer than 67108864 bytes"
answers 2 "the next one is answered"
echo '{"prompt":"c","max_tokens":1,"n":null,"stop":null,"seed":null,"x":null}' \
    >"$dir/in"
batch 0 "null is not given"

# ------------------------------------------------------- members of a request

# asks MEMBERS: of a text to go on with; $text is what comes.
asks() {
    printf '{"prompt":"Once upon a time",%s}\n' "$1" >"$dir/in"
    batch 0 "$1" --temp 0
    text=$(message "$dir/out")
}

asks '"max_tokens":20'
long=$text
asks '"max_tokens":0'
holds "max_tokens 0" [ "$text" = '""' ]
has "max_tokens 0" '"completion_tokens": 0'
asks '"max_tokens":1'
has "max_tokens 1" '"completion_tokens": 1'
asks '"max_completion_tokens":3'
has "max_completion_tokens" '"completion_tokens": 3'
asks '"max_tokens":20,"stop":"ever"'
[ "$text\"" = "${long%%ever*}\"\"" ] || [ "$text" = "${long%%ever*}\"" ]
result $? "stop"
has "stop" '"finish_reason": "stop"'
asks '"max_tokens":20,"stop":["xyzzy"," mouse"]'
holds "stops" [ "$text" = "${long%% mouse*}\"" ]
asks '"max_tokens":4,"echo":true'
case $text in '"Once upon a time '*) true ;; *) false ;; esac
result $? "echo"
asks '"max_tokens":12,"logit_bias":{"5":100}'
holds "logit_bias" [ "$text" != "$long" ]
asks '"max_tokens":60,"presence_penalty":2,"frequency_penalty":2'
has "penalties" '"completion_tokens"'
asks '"max_tokens":30,"ignore_eos":true'
has "ignore_eos" '"completion_tokens": 30'
asks '"max_tokens":20,"temperature":5,"seed":1'
one=$text
asks '"max_tokens":20,"temperature":5,"seed":1,"user":"z"'
holds "the same seed" [ "$text" = "$one" ]
asks '"max_tokens":20,"temperature":5,"seed":-2'
holds "another seed" [ "$text" != "$one" ]
asks '"max_tokens":20,"temperature":5'
one=$text
asks '"max_tokens":20,"temperature":5'
holds "a seed of the line itself" [ "$text" = "$one" ]
asks '"max_tokens":20,"temperature":5,"user":"z"'
holds "and of all of it" [ "$text" != "$one" ]

# Log probabilities: of a conversation, and of a text in columns.
echo "${hello%\}},\"max_tokens\":2,\"logprobs\":true,\"top_logprobs\":2}" \
    >"$dir/in"
batch 0 "logprobs of a conversation" --temp 0
has "they" '"logprobs": {"content": [{"token": "L'
has "and two besides" '"top_logprobs": [{"token": "L'
echo "${hello%\}},\"max_tokens\":2,\"logprobs\":false}" >"$dir/in"
batch 0 "logprobs false" --temp 0
hasnt "logprobs false" '"logprobs"'
asks '"max_tokens":1,"logprobs":2'
has "columns" '"logprobs": {"tokens": [" there"], "token_logprobs": [-'
has "of the best" '"top_logprobs": [{" there": -'
has "and offsets" '"text_offset": [0]}'
asks '"max_tokens":0,"logprobs":1,"echo":true'
has "with echo and nothing new" '"text": "Once upon a time", "logprobs": {"tokens": ["<|startoftext|>", "Once", " upon", " a", " time"], "token_logprobs": [null, -'
has "the first has none" '"top_logprobs": [null, {"'
has "offsets in the text" '"text_offset": [0, 0, 4, 9, 11]}'
hasnt "and nothing else" '"prompt_logprobs"'
cp "$dir/out" "$dir/expected"
asks '"max_tokens":1,"logprobs":1,"echo":true'
has "with echo" '" time", " there"], "token_logprobs": [null'
has "offsets" '11, 16]}'
asks '"max_tokens":0,"logprobs":0,"echo":true'
has "logprobs 0: the token itself" '"top_logprobs": [null, {"Once": -'
asks '"max_tokens":0,"prompt_logprobs":1'
has "prompt_logprobs" '"prompt_logprobs": [null, {"token": "Once"'
printf '{"prompt":[1],"echo":true,"logprobs":1,"max_tokens":0}\n' >"$dir/in"
batch 0 "of one token"
has "of one token" '"text": "", "logprobs": {"tokens": ["<|startoftext|>"], "token_logprobs": [null], "top_logprobs": [null], "text_offset": [0]}'
printf '{"prompt":"\303\251 \360\237\230\200!","echo":true,"logprobs":1,"max_tokens":0}\n' >"$dir/in"
batch 0 "of parts of characters"
has "of parts of characters" '"bytes:\\x'
has "the text" "$(printf '"text": "\303\251 \360\237\230\200!"')"
echo "${hello%\}},\"logprobs\":true}" >"$dir/in"
batch 0 "the end of an answer" --temp 0
hasnt "is no part of it" '"token": "<|im_end|>"'
printf '{"prompt":[%s],"logprobs":1,"max_tokens":90}\n' "$("$run" --dump-tokens \
    $m "What is LFM2?" | tr ' ' ,)" >"$dir/in"
batch 0 "the end of a text" --temp 0
has "is a token, too" '"<|im_end|>"], "token_logprobs"'

# ---------------------------------------------------------- always the same

# 40 lines of all kinds, less for the sanitizers.  Half of them share more than
# 300 tokens.
n=40 sentences=28
case $run in *debug*) n=12 sentences=14 ;; esac
awk -v n=$n -v sentences=$sentences 'BEGIN {
    while (i++ < sentences)
        shared = shared "You know a lot of stories, and tell them. "
    known = "{\"role\":\"system\",\"content\":\"" shared "\"},"
    for (i = 1; i <= n; i++) {
        printf "{\"custom_id\":\"q%d\",\"method\":\"POST\",\"url\":\"/v1/x\"," \
            "\"body\":{\"max_tokens\":%d,\"temperature\":%g,", i,
            i % 7 * 4 + 1, i % 3 ? 0 : i / 10
        if (i % 5 == 0) printf "\"seed\":%d,", i
        if (i % 6 == 1) printf "\"stop\":[\" the\",\"xyz\"],"
        if (i % 8 == 2) printf "\"logprobs\":%s,", i % 4 < 2 ? "true" : "2"
        if (i % 8 == 6) printf "\"echo\":true,\"logprobs\":1,"
        if (i % 9 == 4) printf "\"presence_penalty\":1,"
        if (i % 4 == 3) printf "\"prompt\":\"Once upon a time %d\"}}\n", i % 6
        else printf "\"messages\":[%s{\"role\":\"user\",\"content\":" \
            "\"Tell story number %d.\"}]}}\n", i % 4 == 1 ? "" : known, i
    } }' | sed 's|/v1/x|/v1/chat/completions|
        s|chat/\(.*"prompt"\)|\1|' >"$dir/lines"
cp "$dir/lines" "$dir/in"
batch 0 "lines of all kinds" -v
answers $n "lines of all kinds"
says " of them reused"
reused=$(sed -n 's/.* tokens, \([0-9]*\) of them reused.*/\1/p' "$dir/err")
holds "is read once: $reused" \
    [ "${reused:-0}" -ge $((3 * n * sentences)) ]
cp "$dir/out" "$dir/answers"
no_ids <"$dir/answers" | sort >"$dir/sorted"
for how in "--parallel 1" "--parallel 3 -b 1" "-b 3" "--parallel 2" \
    "--parallel 40" "--parallel 7 -t 2" "-b 64" "-t 3 --parallel 5" "-t 4"; do
    # shellcheck disable=SC2086
    batch 0 "$how" $how
    same "the same answers with $how" "$dir/answers" "$dir/out"
    [ $n -lt 40 ] && [ "$how" != "--parallel 1" ] && break
done
awk '{ print NR * 17 % 41 "\t" $0 }' "$dir/lines" | sort -n | cut -f 2- \
    >"$dir/in"
batch 0 "in another order"
holds "another order" sh -c "! cmp -s $dir/answers $dir/out"
no_ids <"$dir/out" | sort >"$dir/has"
same "the same answers in another order" "$dir/sorted" "$dir/has"
cp "$dir/lines" "$dir/in"
: >"$dir/has"
for i in 0 1 2; do
    batch 0 "--shard $i/3" --shard $i/3
    cat "$dir/out" >>"$dir/has"
done
no_ids <"$dir/has" | sort >"$dir/out"
same "the same answers in three parts" "$dir/sorted" "$dir/out"
for i in 3 8 12 18 24 30; do
    [ $i -le $n ] || break
    sed -n ${i}p "$dir/lines" >"$dir/in"
    batch 0 "line $i alone"
    sed -n ${i}p "$dir/answers" | no_ids >"$dir/expected"
    no_ids <"$dir/out" >"$dir/has"
    same "line $i alone" "$dir/expected" "$dir/has"
done
for i in 2 5 8 12 28 30; do
    [ $i -le $n ] || break
    sed -n "${i}s/.*\"body\"://p" "$dir/lines" | sed 's/}$//' >"$dir/body"
    limit=$(sed 's/.*"max_tokens":\([0-9]*\).*/\1/' "$dir/body")
    temp=$(sed 's/.*"temperature":\([0-9.]*\).*/\1/' "$dir/body")
    [ "$temp" = 0 ] || grep -q '"seed"' "$dir/body" || continue
    "$run" -q -t 1 $m --messages "$dir/body" --json -n "$limit" --temp "$temp" -s "$i" \
        </dev/null 2>"$dir/err" | sed 's/, "logprobs".*//' >"$dir/out"
    sed -n "${i}s/, \"logprobs\".*//p" "$dir/answers" >"$dir/expected"
    [ -s "$dir/expected" ] || sed -n ${i}p "$dir/answers" >"$dir/expected"
    [ "$(message "$dir/out")" = "$(message "$dir/expected")" ]
    result $? "line $i is what --messages --json answers"
done
cp "$dir/lines" "$dir/in"

# ------------------------------------------------------------------------ parts

for bad in 3/3 -1/3 x 1 1/ /2 1/2x auto 1/0; do
    batch 2 "--shard $bad" --shard $bad
    says "expected"
done
batch 2 "--batch and a prompt" hello
batch 2 "--batch and -sys" -sys "Be brief."
says "-sys"
batch 2 "--batch and --tools" --tools test/chat.json
batch 3 "an input that is not there" -f "$dir/none"
"$run" $m --batch <./test >"$dir/out" 2>"$dir/err"
[ $? -eq 3 ]
result $? "an input that cannot be read is status 3"

# ------------------------------------------------------------- as lines arrive

mkfifo "$dir/pipe"
"$run" $m --batch -n 5 <"$dir/pipe" >"$dir/out" 2>"$dir/err" &
pid=$!
exec 3>"$dir/pipe"
for i in 1 2 3; do
    echo "{\"prompt\":\"Once upon a time $i\"}" >&3
    within 5 lines "$dir/out" $i
    result $? "line $i is answered while more may come"
done
printf '{"prompt":' >&3
sleep 0.2
echo '"In pieces"}' >&3
within 5 lines "$dir/out" 4
result $? "a line in pieces"
kill -TERM $pid
wait_within 60 $pid
[ $? -eq 143 ]
result $? "SIGTERM while waiting is status 143"
exec 3>&-
{ "$run" -q $m --batch 2>"$dir/err" <"$dir/in"; echo $? >"$dir/status"; } |
    head -n 1 >"$dir/out"
[ "$(cat "$dir/status")" = 3 ] || [ "$(cat "$dir/status")" = 0 ]
result $? "a reader that leaves: status $(cat "$dir/status")"
{ "$run" -q $m --batch 2>"$dir/err" <"$dir/in"; echo $? >"$dir/status"; } | :
holds "at once: status 3" [ "$(cat "$dir/status")" = 3 ]
if [ -e /dev/full ]; then
    "$run" $m --batch <"$dir/in" >/dev/full 2>"$dir/err"
    [ $? -eq 3 ]
    result $? "a full disk is status 3"
    says "No space left"
fi

# ---------------------------------------------------------- stopped and resumed

# Enough work for a second.
n_slow=150
awk -v n=$n_slow 'BEGIN {
    while (i++ < n)
        printf "{\"custom_id\":\"q%d\",\"prompt\":\"Story number %d\"," \
            "\"ignore_eos\":true,\"max_tokens\":%d,\"temperature\":1}\n", \
            i, i, 20 + i * 7 % 50 }' >"$dir/slow"
cp "$dir/slow" "$dir/in"
batch 0 "a slow job" --parallel 4
cp "$dir/out" "$dir/whole"
sort "$dir/whole" >"$dir/sorted"

# start OPTIONS...: the slow job, in the background.
start() {
    interruptible "$run" $m --batch -t 1 --parallel 4 "$@" <"$dir/in" >"$dir/out" \
        2>"$dir/err" &
    pid=$!
}

# Killed after some lines, or none; once, as if in the middle of one.
for tenths in 0 1 3 4 6; do
    : >>"$dir/part"
    start --resume "$dir/part"
    [ $tenths = 4 ] && sleep 0.02
    within 20 lines "$dir/part" $((n_slow * tenths / 10))
    kill -KILL $pid
    wait_within 60 $pid 2>/dev/null
    [ $tenths = 3 ] && tail -n 1 "$dir/whole" | head -c 70 >>"$dir/part"
done
n=$(wc -l <"$dir/part")
[ "$n" -gt 0 ] && [ "$n" -lt $n_slow ]
result $? "killed with some lines done: $n of $n_slow"
batch 0 "resumed" --resume "$dir/part"
says "$n lines are there already"
holds "nothing on standard output" [ ! -s "$dir/out" ]
holds "all lines are whole" whole "$dir/part"
sort "$dir/part" >"$dir/has"
same "every line once, as if undisturbed" "$dir/sorted" "$dir/has"
batch 0 "resumed once more" --resume "$dir/part"
says "0 answered, 0 failed, $n_slow skipped"
sort "$dir/part" >"$dir/has"
same "nothing has changed" "$dir/sorted" "$dir/has"

for signal in TERM INT; do
    : >"$dir/part"
    start --resume "$dir/part"
    within 10 lines "$dir/part" 2
    if [ $signal = TERM ]; then
        batch 3 "two that resume one file" --resume "$dir/part"
        says "another process is writing to it"
    fi
    kill -$signal $pid
    kill -0 $pid 2>/dev/null && sleep 0.5
    ! kill -0 $pid 2>/dev/null
    result $? "SIG$signal ends it soon"
    status=143
    [ $signal = INT ] && status=130
    wait_within 60 $pid
    [ $? -eq $status ]
    result $? "SIG$signal: status $status"
    whole "$dir/part"
    result $? "SIG$signal leaves whole lines"
    n=$(wc -l <"$dir/part")
    holds "but not all: $n" [ "$n" -lt $n_slow ]
    [ $signal = TERM ] || break
    batch 0 "resumed after SIG$signal" --resume "$dir/part" -q
    sort "$dir/part" >"$dir/has"
    same "resumed after SIG$signal" "$dir/sorted" "$dir/has"
done

# What was killed in the middle of a line, by every length of what is left.
head -n 3 "$dir/in" >"$dir/three"
mv "$dir/three" "$dir/in"
head -n 3 "$dir/whole" >"$dir/three"
for n in 0 1 5 17 40 300; do
    { head -n 2 "$dir/whole"; sed -n 3p "$dir/whole" | head -c $n; } \
        >"$dir/part"
    batch 0 "a line torn after $n bytes" --resume "$dir/part"
    same "a line torn after $n bytes" "$dir/three" "$dir/part"
done
{ head -n 2 "$dir/whole"; sed -n 3p "$dir/whole" | head -c 300
    head -c 70000000 /dev/zero | tr '\0' x; } >"$dir/part"
batch 0 "a torn line of 70 MB" --resume "$dir/part"
same "a torn line of 70 MB" "$dir/three" "$dir/part"

# Files of others.
for text in 'not ours\n' '{"custom_id":"q1","prompt":"x"}\n' 'no newline' \
    '{"id": "batch_req_1", "custom_id": 5}\n' '\n' '\000\001\002' '{"id": "b"'; do
    # shellcheck disable=SC2059
    printf "$text" >"$dir/part"
    cp "$dir/part" "$dir/before"
    batch 3 "a file of others: $text" --resume "$dir/part"
    says "was not written by --batch"
    same "is left as it was: $text" "$dir/before" "$dir/part"
done
batch 3 "a folder" --resume "$dir"
[ ! -e /dev/full ] || batch 3 "a device" --resume /dev/full
: >"$dir/part"
batch 0 "an empty file" --resume "$dir/part"
same "an empty file" "$dir/three" "$dir/part"

# Lines with the same id, some of them wrong.
cat >"$dir/in" <<'END'
{"custom_id":"twice","prompt":"a","max_tokens":1}
{"custom_id":"twice","prompt":"a","max_tokens":1}
{"custom_id":"wrong","prompt":"a","max_tokens":-3}
{"custom_id":"twice","prompt":"a","max_tokens":1}
END
batch 7 "the same id" --temp 0
cp "$dir/out" "$dir/three"
head -n 2 "$dir/three" >"$dir/part"
batch 7 "the same id, resumed" --resume "$dir/part" --temp 0
sort "$dir/three" >"$dir/sorted"
sort "$dir/part" >"$dir/has"
same "each counts once" "$dir/sorted" "$dir/has"
batch 7 "a wrong line of the run before" --resume "$dir/part"
says "0 answered, 0 failed, 4 skipped"

# Nothing grows with the square of the number of lines.
n=3000
case $run in *debug*) n=300 ;; esac
awk -v n=$n 'BEGIN { while (i++ < n)
    printf "{\"custom_id\":\"q%d\",\"prompt\":\"a\",\"max_tokens\":0}\n", i }' \
    >"$dir/in"
batch 0 "many lines"
answers $n "many lines"
cp "$dir/out" "$dir/part"
batch 0 "many lines that are there" --resume "$dir/part"
says "$n skipped"

finish
