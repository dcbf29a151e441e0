#!/bin/sh
# Conversations that last: --session between processes, and chats at a terminal.
#     RUN=./run test/check_session.sh
. test/lib.sh

s=$dir/session
unset NO_COLOR
export TERM=xterm

always="-t 1 --temp 0"

# alone WHAT: no file of a session but the session itself is left.
alone() {
    [ "$(ls "$dir" | grep -c '^session')" -le 1 ]
    result $? "$1: temporary files are left"
}

# dumps WHAT OPTIONS...: the prompt, which no temperature changes.
dumps() {
    always="-t 1"
    expect 0 "$@"
    always="-t 1 --temp 0"
}

# few WHAT FILE: the last prompt in the messages had old tokens, and few new.
few() {
    sed -n 's/.*prompt of \([0-9]*\) tokens, \([0-9]*\) of them new.*/\1 \2/p' \
        "$2" >"$dir/counts"
    tail=$(tail -1 "$dir/counts")
    new=${tail#* }
    [ -n "$new" ] && [ "$new" -lt 25 ] && [ "${tail% *}" -gt $((new + 20)) ]
    result $? "$1: prompt of $tail new tokens"
}

# --------------------------------------------------------------------- sessions

# Five turns in five processes; each answer is that of one process that reads
# the whole conversation.
questions='What is LFM2?
What is inference?
Define training.
What is grouped-query attention?
What does depthwise mean?'
turn=0 talk=
while read -r question; do
    turn=$((turn + 1))
    expect 0 "turn $turn" -v --session "$s" $m "$question"
    [ $turn -eq 1 ] || few "turn $turn" "$dir/err"
    cp "$dir/out" "$dir/answer$turn"
    talk="$talk{\"role\": \"user\", \"content\": \"$question\"}"
    echo "[$talk]" >"$dir/talk$turn"
    said=$(cat "$dir/out")
    talk="$talk, {\"role\": \"assistant\", \"content\": \"$said\"}, "
    expect 0 "turn $turn at once" $m --messages "$dir/talk$turn"
    same "turn $turn" "$dir/answer$turn" "$dir/out"
    alone "turn $turn"
done <<END
$questions
END
holds "it is for its owner" [ "$(ls -l "$s" | cut -c1-10)" = -rw------- ]
cp "$s" "$dir/kept"
dumps "--dump-prompt" --session "$s" --dump-prompt $m hello
holds "shows all that was said" [ "$(grep -c 'im_start|>' "$dir/out")" = 12 ]
same "and changes nothing" "$s" "$dir/kept"
dumps "-sys in the middle" --session "$s" --dump-prompt -sys "Be brief." \
    $m hello
says "goes on as it began, so -sys is not used"
holds "-sys in the middle" [ "$(grep -c 'Be brief' "$dir/out")" = 0 ]
expect 0 "--messages" -v --session "$s" --messages "$dir/talk5" $m
same "--messages is the conversation" "$dir/answer5" "$dir/out"
chmod 644 "$s"
rm "$s"
expect 0 "no answer" --session "$s" -n 0 $m "What is LFM2?"
dumps "no answer is no message" --session "$s" --dump-prompt $m hello
holds "no answer is no message" \
    [ "$(grep -c 'start|>assistant' "$dir/out")" = 1 ]
printf '[%s, %s]' '{"role": "user", "content": "What is LFM2?"}' \
    '{"role": "assistant", "content": "LFM2 is"}' |
    sed 's/.*/{"messages": &, "continue_final_message": true}/' >"$dir/half"
rm "$s"
expect 0 "an answer that goes on" --session "$s" $m --messages "$dir/half"
dumps "is one message" --session "$s" --dump-prompt $m hello
holds "is one message" grep -qF "LFM2 is$(cat "$dir/answer1" |
    sed 's/^LFM2 is//')" "$dir/out"

# What does not fit.  A state that is not this model's is only read again.
export LC_ALL=C
sed 's/LFM2-Tiny-MoE/LFM2-Tiny-Mo3/' $m >"$dir/foreign.gguf"
cp "$dir/kept" "$s"
expect 0 "another model" --session "$s" "$dir/foreign.gguf" "Define training."
says "the conversation is read again"
same "another model" "$dir/answer3" "$dir/out"
cp "$dir/kept" "$s"
expect 0 "another --kv" --kv f32 --session "$s" $m "Define training."
says "the conversation is read again"
cp "$dir/kept" "$s"
expect 6 "a short context" -c 64 --session "$s" $m "Define training."
says "the conversation is read again"
same "and what there was stays" "$s" "$dir/kept"
expect 0 "turn 1" $m "What is LFM2?"
{ printf LFM2CHT9; tail -c +9 "$dir/kept"; } >"$s"
cp "$s" "$dir/other"
refuses 3 "another version of this program" --session "$s" $m "What is LFM2?"
same "another version is left alone" "$s" "$dir/other"
: >"$s"
expect 0 "an empty file" --session "$s" $m "What is LFM2?"
holds "is an empty session" [ ! -s "$dir/err" ]
expect 0 "and becomes one" --session "$s" -v $m "What is inference?"
same "and becomes one" "$dir/answer2" "$dir/out"
few "and becomes one" "$dir/err"
size=$(wc -c <"$dir/kept")
for n in 1 7 8 9 97 970 1500 $((size / 2)) $((size - 1)); do
    head -c "$n" "$dir/kept" >"$s"
    cp "$s" "$dir/other"
    refuses 3 "it is left as it is" --session "$s" $m "What is LFM2?"
    same "cut after $n bytes it is left alone" "$s" "$dir/other"
done
{ cat "$dir/kept"; echo; } >"$s"
refuses 3 "it is left as it is" --session "$s" $m "What is LFM2?"
cp Makefile "$s"
refuses 3 "it is left as it is" --session "$s" $m "What is LFM2?"
same "no session is left alone" Makefile "$s"
cp "$dir/kept" "$s"
refuses 2 "needs a chat template" --raw -n 3 --session "$s" $m "What is LFM2?"
rm "$s"
mkdir "$s"
expect 3 "a directory" --session "$s" $m hello
says "a directory"
rmdir "$s"
expect 3 "a directory that is not there" -n 1 --session "$dir/no/s" $m hello
says "cannot be written"
holds "which is told before the answer" [ ! -s "$dir/out" ]
for bad in "--ids test/tiny.ids" "--logits -"; do
    # shellcheck disable=SC2086
    "$run" --session "$s" $bad $m </dev/null >"$dir/out" 2>"$dir/err"
    holds "--session with $bad" [ $? -eq 2 ]
done
cp "$dir/kept" "$s"
(trap '' XFSZ; ulimit -f 16; "$run" --session "$s" -n 1 $m hello \
    >"$dir/out" 2>"$dir/err")
holds "a full disk" [ $? -eq 3 ]
same "leaves what there was" "$dir/kept" "$s"
alone "a full disk"

# Killed while saving: what there was, or what there is.
bad=0
for n in 0 1 2 3 4 5 6 7 8 9; do
    for delay in 0.00$n 0.02$n 0.04$n; do
        cp "$dir/kept" "$s"
        "$run" -t 1 --session "$s" -n 1 $m hello >"$dir/out" 2>"$dir/err" &
        pid=$!
        sleep "$delay"
        kill -9 $pid 2>/dev/null
        wait_within 60 $pid 2>/dev/null
        for try in 1 2; do      # it may be replaced just now, and be refused
            "$run" --session "$s" -v --dump-tokens $m hello >"$dir/out" \
                2>"$dir/err"
            grep -q "session: [0-9]* tokens" "$dir/err" && break
        done || bad=$((bad + 1))
        rm -f "$s".*
    done
done
holds "killed while saving: $bad times neither old nor new" [ $bad -eq 0 ]

# ------------------------------------------------------------- chat from a pipe

echo "$questions" | "$run" -cnv -v -t 1 --temp 0 $m >"$dir/out" 2>"$dir/err"
holds "a chat from a pipe" [ $? -eq 0 ]
cat "$dir"/answer[12345] >"$dir/expected"
same "has the same five answers" "$dir/expected" "$dir/out"
holds "and no prompt" sh -c "! grep -q '^>' $dir/err"
few "feeds only new tokens" "$dir/err"
holds "each time" [ "$(grep -c 'prompt of .* of them new' "$dir/err")" = 5 ]
# ... | chat ARGUMENTS...: in a process of its own, so it cannot count tests.
chat() {
    limited "$run" -cnv -t 1 --temp 0 --save-dir "$dir" $m "$@" >"$dir/out" 2>"$dir/err" ||
        echo "status $?" >>"$dir/chats"
}
one=$(cat "$dir/answer1") two=$(cat "$dir/answer2")
printf 'What is LFM2?\n/regen\nWhat is inference?\n/save %s\n/clear\n/regen\n' \
    "$dir/saved" | chat
printf '%s\n%s\n%s\n' "$one" "$one" "$two" >"$dir/expected"
same "/regen answers once more" "$dir/expected" "$dir/out"
says "there is no message to answer"
printf '{"messages": [%s, %s, %s, %s]}\n' \
    '{"role": "user", "content": "What is LFM2?"}' \
    "{\"role\": \"assistant\", \"content\": \"$one\"}" \
    '{"role": "user", "content": "What is inference?"}' \
    "{\"role\": \"assistant\", \"content\": \"$two\"}" >"$dir/expected"
same "/save" "$dir/expected" "$dir/saved"
printf '/load %s\n/save %s\n' "$dir/saved" "$dir/again" | chat
same "/load" "$dir/saved" "$dir/again"
says "4 messages"
printf 'What is LFM2?\n/stats\n/load %s\n/stats\n' "$dir/talk1" | chat
holds "/stats is about the last answer, not what was loaded" \
    [ "$(grep -c 'prompt of' "$dir/err")" = 1 ]
printf '/load %s\n/load Makefile\n/load /no\n/load\n/save\n/save %s\n' \
    "$dir/saved" "$dir/again" | chat
same "a file that is none changes nothing" "$dir/saved" "$dir/again"
echo '[{"role": "user", "content": 3}]' >"$dir/bad"
printf '/load %s\n/load %s\n/save %s\n' "$dir/saved" "$dir/bad" "$dir/again" |
    chat
same "nor do messages that are none" "$dir/saved" "$dir/again"
{ printf '[1'; yes ,1 | head -n 4000000 | tr -d '\n'; echo ']'; } >"$dir/big"
printf '/load %s\n/load %s\n/system  Be brief.\n/save %s\n' "$dir/saved" \
    "$dir/big" "$dir/again" | chat
says "no more values"
sed 's/\[/[{"role": "system", "content": "Be brief."}, /' "$dir/saved" \
    >"$dir/expected"
same "/system comes first, and all else stays" "$dir/expected" "$dir/again"
printf '/load %s\n/system\n/save %s\n' "$dir/again" "$dir/third" | chat
same "/system without a text takes it away" "$dir/saved" "$dir/third"
{
    printf '"""What is\nLFM2?"""\n"""\na\n"""\n"""b"""\nc\\\nd\n""""""\n'
    echo "/save $dir/again"
} | chat -n 1 -sys "Be brief."
holds "several lines" [ "$(tr ',' '\n' <"$dir/again" | sed -n \
    's/.*"content": "\(.*\)"}.*/\1/p' | sed -n '1p;2p;4p;6p;8p' |
    tr '\n' '|')" = 'Be brief.|What is\nLFM2?|a|b|c\nd|' ]
printf '/hello\n/help\n/stats\n/quit\nWhat is LFM2?\n' | chat
says "/hello: no such command; /help lists them"
says "/regen        answer the last message again"
says "in the context"
holds "/quit leaves" [ ! -s "$dir/out" ]
printf '/save %s\n' "$dir/empty" | chat
says "nothing to save"
printf 'hello\n/save %s/no/where\n' "$dir" | chat
says "No such file"
holds "nothing said is nothing saved" [ ! -e "$dir/empty" ]
printf 'What is inference?\n' | chat -p "What is LFM2?"
printf '%s\n%s\n' "$one" "$two" >"$dir/expected"
same "-p is the first message" "$dir/expected" "$dir/out"
printf 'What is LFM2?\n' >"$dir/first"
printf 'What is inference?\n' | chat -f "$dir/first"
same "so is -f" "$dir/expected" "$dir/out"
printf 'What is inference?\n' | chat --messages "$dir/talk1"
same "and the end of --messages" "$dir/expected" "$dir/out"
printf 'What is inference?\n/save %s\n' "$dir/again" |
    chat --messages "$dir/half"
same "and an answer that goes on is one message" "$dir/saved" "$dir/again"
echo '[{"role": null}]' >"$dir/bad"
echo '/regen' | "$run" -cnv -q $m --messages "$dir/bad" >"$dir/out" 2>"$dir/err"
holds "messages that are none end it" [ $? -eq 2 ]
printf 'a\0b\nWhat is LFM2?\n' | chat
says "NUL"
same "a message with a NUL is left out" "$dir/answer1" "$dir/out"
{ head -c 3000 test/questions.txt | tr '\n' ' '; echo; echo "What is LFM2?"; } |
    chat -c 300
says "the context 300"
same "a message that is too long is taken back" "$dir/answer1" "$dir/out"

holds "all of these chats end well" [ ! -e "$dir/chats" ]

# ------------------------------------------------------------ chat at a terminal

needs_terminal "chats at a terminal"

open_terminal -v $m
shows 1 "/help lists"
n=0
while read -r question; do
    n=$((n + 1))
    types "$question\\n"
    shows $n "of them new"
    shows 1 "$(cat "$dir/answer$n")"
    [ $n -eq 1 ] || few "turn $n at a terminal" "$dir/tty"
done <<END
$questions
END
shows 5 "> "
types '/help\n'
shows 1 "continue a saved conversation"
types '/hm\n'
shows 1 "no such command"
types '"""\nWhat is LFM2?\n'
shows 2 ". "
types '"""\n'
shows 6 "of them new"
types 'What is \\\n'
types 'LFM2?\n'
shows 7 "of them new"
types '/stats\n'
shows 1 "in the context"
types '\004'
leaves 0 "Ctrl-D"

open_terminal -v --ignore-eos --isa scalar $m
shows 1 "/help lists"
types 'What is LFM2?\n'
shows 1 "LFM2 is a family"
types '\003'
shows 1 "tok/s"
types '/stats\n'
shows 1 "in the context"
types '\003'
shows 1 "once more"
types '\003'
leaves 130 "Ctrl-C twice"

open_terminal -v --ignore-eos --isa scalar $m
shows 1 "/help lists"
types '\003'
shows 1 "once more"
types 'What is LFM2?\n'
shows 1 "LFM2 is a family"
types '\003'
shows 1 "tok/s"
types '\004'
leaves 0 "Ctrl-D after a stopped answer"

open_terminal $m
shows 1 "/help lists"
kill -TERM "$(cat "$dir/pid")"
leaves 143 "SIGTERM"

# Thoughts are dim at a terminal, unless colours are not wanted.
half="$dir/think"
sed 's/LFM2 is/<think>hm/' "$dir/half" >"$half"
for how in "" "NO_COLOR=1" "TERM=dumb"; do
    script -qec "env $how $run -t 1 --temp 0 -n 20 --think-budget 3 $m \
        --messages $half" /dev/null </dev/null >"$dir/tty" 2>&1
    holds "a thought is shown $how" grep -q "$([ -z "$how" ] &&
        printf '\033\\[2m' || printf '<think>')" "$dir/tty"
    [ -z "$how" ] || holds "$how: no colour" \
        sh -c "! grep -q '$(printf '\033')' $dir/tty"
done

# A model's words cannot steer the terminal: this one says an escape character.
noise="--raw --temp 100 --min-p 0 --top-k 0 -n 150 -s 14 $m Once"
# shellcheck disable=SC2086
"$run" -q $noise >"$dir/out" 2>"$dir/err"
holds "the words have an escape character" grep -q "$(printf '\033')" "$dir/out"
script -qec "$run -q $noise" /dev/null </dev/null >"$dir/tty" 2>&1
holds "which does not reach the terminal" [ -s "$dir/tty" ]
holds "nor other control characters" \
    [ "$(tr -cd '\000-\010\013\014\016-\037\177' <"$dir/tty" | wc -c)" -eq 0 ]

# Nor do those that JSON leaves as they are, DEL and U+0080 to U+009F, nor those of
# a prompt.
c1=$(printf '\177\302\233')
printf '{"messages": [{"role": "user", "content": "%s"}]}\n' "$c1" >"$dir/c1"
printf '{"prompt": "%s", "echo": true, "max_tokens": 1}\n' "$c1" >"$dir/c1line"
for what in "--messages $dir/c1 --dump-prompt" "--batch --file $dir/c1line"; do
    # shellcheck disable=SC2086
    "$run" -q $m $what >"$dir/out" 2>"$dir/err" </dev/null
    holds "$what: as it is in a file" grep -q "$c1" "$dir/out"
    script -qec "$run -q $m $what" /dev/null </dev/null >"$dir/tty" 2>&1
    holds "$what: at a terminal" [ -s "$dir/tty" ]
    holds "$what: without controls" \
        sh -c "! grep -q '$(printf '\302\233')' $dir/tty &&
               ! grep -q '$(printf '\177')' $dir/tty"
done

finish
