#!/bin/sh
# A model file that becomes shorter while it is used; and all modes inside of
# the sandbox, where they must do what they do outside.
#     RUN=./run test/check_sandbox.sh
. test/lib.sh

m=test/tiny.gguf
unset LFM2_MODEL LFM2_THREADS NO_COLOR
export TERM=xterm
trap '' PIPE                    # who is written to may have ended already

# waits_for TEXT FILE: within a while, the file has it.
waits_for() {
    within 30 grep -qF -- "$1" "$2"
    result $? "waits for \"$1\""
}

# ------------------------------------------------------- a file becomes shorter

# shrinks STATUS OPTIONS...: of two questions, the file is cut after the first.
mkfifo "$dir/keys"
shrinks() {
    want=$1
    shift
    cp $m "$dir/m.gguf"
    : >"$dir/out"                         # the last answer is not waited for
    "$run" -cnv -q --temp 0 -n 5 "$@" "$dir/m.gguf" <"$dir/keys" \
        >"$dir/out" 2>"$dir/err" &
    pid=$!
    exec 3>"$dir/keys"
    echo "What is LFM2?" >&3
    waits_for LFM2 "$dir/out"
    dd if=/dev/null of="$dir/m.gguf" bs=1 seek=5000 2>/dev/null
    echo "What is inference?" 2>/dev/null >&3
    exec 3>&-
    wait_within 60 $pid
    status=$?
    [ $status -eq "$want" ]
    result $? "$*, and the file is cut: status $status, expected $want"
}

for threads in 1 4; do
    shrinks 3 -t $threads
    holds "it says so, once" [ "$(grep -c \
        'm.gguf: it became shorter while it was used' "$dir/err")" -eq 1 ]
    holds "and nothing else" [ "$(wc -l <"$dir/err")" -eq 1 ]
done
shrinks 0 -t 4 --no-mmap
holds "what was read is no matter" [ ! -s "$dir/err" ]
holds "both are answered" [ "$(wc -l <"$dir/out")" -eq 2 ]

# ---------------------------------------------------------- where there is none

"$run" --bench --sandbox require $m >"$dir/out" 2>"$dir/err"
holds "--bench with --sandbox require" [ $? -eq 2 ]
"$run" --sandbox require -v -n 1 $m hello >"$dir/out" 2>"$dir/err"
status=$?
if grep -q 'sandbox require: no' "$dir/err"; then
    holds "what is missing ends it" [ $status -eq 1 ]
    holds "without an answer" [ ! -s "$dir/out" ]
    "$run" -v -n 1 $m hello >"$dir/out" 2>"$dir/told"
    holds "--sandbox auto goes on" [ $? -eq 0 ]
    holds "and says so with -v" grep -q 'sandbox: no' "$dir/told"
    skip "all modes in the sandbox: $(sed -n 's/.*require: //p' "$dir/err")"
fi

# ---------------------------------------------------------------- in all modes

head -c 600 test/questions.txt >"$dir/text"
echo "What is LFM2?" >"$dir/question"
printf '%s\n' 'What is LFM2?' /regen 'What is inference?' >"$dir/lines"
echo '[{"role": "user", "content": "Define training."}]' >"$dir/talk"
echo '[{"name": "f", "parameters": {"type": "object"}}]' >"$dir/tools"
printf '%s\n' '{"custom_id": "a", "prompt": "Once", "max_tokens": 4}' \
    '{"custom_id": "b", "messages": [{"role": "user", "content": "Hi"}]}' \
    >"$dir/requests"
head -n 1 "$dir/requests" >"$dir/first"

# in_all_modes NAME PROGRAM OPTIONS...: results, messages and status in files of
# $dir/NAME.
in_all_modes() {
    to=$dir/$1
    program=$2
    shift 2
    mkdir "$to"
    mode() {
        what=$1
        shift
        "$@" >"$to/$what" 2>"$to/$what.err" </dev/null || echo $? >>"$to/$what"
    }
    chat() {
        "$@" <"$dir/lines"
    }
    inspect() {
        "$@" | sed -n 1,12p                # head would close the pipe
    }
    set -- "$program" -q --temp 0 -n 6 "$@"
    mode answer "$@" $m "What is LFM2?"
    mode read "$@" --no-mmap $m "What is LFM2?"
    mode file "$@" -f "$dir/question" -e $m
    mode messages "$@" --messages "$dir/talk" --tools "$dir/tools" $m
    mode session1 "$@" --session "$to/session" $m "What is LFM2?"
    mode session2 "$@" --session "$to/session" -f "$dir/question" $m
    mode chat chat "$@" -cnv $m
    mode chat_session chat "$@" -cnv --session "$to/talk" -f "$dir/question" $m
    mode ids "$@" --ids test/tiny.ids --logits "$to/logits" $m
    mode trace "$@" --trace "$to/records" --trace-raw "$to/numbers" \
        --trace-filter 'model.layers.3.*' $m hello
    mode batch "$@" --batch -f "$dir/requests" $m
    mode resume1 "$@" --batch -f "$dir/first" --resume "$to/answers" $m
    mode resume2 "$@" --batch -f "$dir/requests" --resume "$to/answers" $m
    mode ppl "$@" --ppl "$dir/text" -c 40 $m
    mode tokenize "$@" --tokenize -f "$dir/text" $m
    mode export "$@" --export-tokenizer "$to/vocabulary" $m
    mode words "$@" --tokenizer "$to/vocabulary" $m "What is LFM2?"
    mode dump "$@" --dump-prompt $m "What is LFM2?"
    mode inspect inspect "$@" --inspect $m
}

in_all_modes off "$run" -t 1 --sandbox off
holds "all modes work outside" sh -c "! cat $dir/off/*.err | grep ."
in_all_modes require1 "$run" -t 1 --sandbox require
in_all_modes require4 "$run" -t 4 --sandbox require
in_all_modes auto4 "$run" -t 4 --sandbox auto
for how in require1 require4 auto4; do
    holds "the same in $how" diff -r "$dir/off" "$dir/$how"
done
if command -v musl-gcc >/dev/null; then
    holds "a static program" musl-gcc -O1 -std=c11 -ffp-contract=off -static \
        -w -DLFM2_NO_SIMD -o "$dir/static" run.c lfm2.c -lm
    in_all_modes musl "$dir/static" -t 4 --sandbox require
    holds "the same in a static one" diff -r "$dir/off" "$dir/musl"
else
    echo "skipped: a static program in the sandbox, there is no musl-gcc"
fi

# ------------------------------------------------------- what a chat may open

# Under `auto` the working directory and that for temporary files, under
# `require` nothing.
here=$PWD
case $run in
/*) program=$run ;;
*) program=$here/$run ;;
esac
printf '/save %s\n/save %s/tmp/in\n/save %s/escaped\n/load /etc/passwd\n' in \
    "$dir" "$dir" >"$dir/lines"
mkdir "$dir/work" "$dir/tmp"
(cd "$dir/work" && TMPDIR=$dir/tmp "$program" -cnv -q "$here/$m" \
    <"$dir/lines" 2>"$dir/err")
holds "/save in the working directory" [ -s "$dir/work/in" ]
holds "and in that for temporary files" [ -s "$dir/tmp/in" ]
holds "but not outside of them" [ ! -e "$dir/escaped" ]
holds "nor /load" [ "$(grep -c 'Permission denied' "$dir/err")" -eq 2 ]
holds "which is explained" [ "$(grep -c 'opens files in the dir' "$dir/err")" \
    -eq 2 ]
rm "$dir/work/in"
(cd "$dir/work" && "$program" -cnv -q --sandbox require "$here/$m" \
    <"$dir/lines" 2>"$dir/err")
holds "nothing with require" [ ! -e "$dir/work/in" ]
holds "which is explained" [ "$(grep -c 'opens no files' "$dir/err")" -eq 4 ]

"$run" --sandbox require -q $m -f "$dir/no" >"$dir/out" 2>"$dir/err"
holds "a file that is not there" [ $? -eq 3 ]
holds "is called so" grep -q 'no: No such file' "$dir/err"
echo "What is LFM2?" | "$run" --sandbox require -q --temp 0 -n 6 -f /dev/stdin \
    $m >"$dir/out" 2>"$dir/err"
holds "/dev/stdin" cmp "$dir/out" "$dir/off/answer"
"$run" --sandbox require -q -n 6 --temp 0 --ids test/tiny.ids $m \
    --logits /dev/stdout 2>"$dir/err" | cmp -s - "$dir/off/logits"
holds "/dev/stdout" [ $? -eq 0 ]
"$run" --sandbox require -v -n 1 $m hello >"$dir/out" 2>"$dir/err"
holds "-v tells what there is" [ "$(grep -c ' sandbox: ' "$dir/err")" -eq 2 ]
shrinks 3 -t 4 --sandbox require
holds "a file that is cut, told from inside" grep -q 'it became shorter' \
    "$dir/err"

if script -qec true /dev/null </dev/null >"$dir/tty" 2>&1; then
    script -qec "exec $run --sandbox require -t 4 --temp 0 -n 6 --session \
        $dir/session $m" /dev/null <"$dir/keys" >"$dir/tty" 2>&1 &
    pid=$!
    exec 3>"$dir/keys"
    echo "What is LFM2?" >&3
    waits_for "LFM2 is" "$dir/tty"
    echo "What is inference?" >&3
    printf '\004' >&3
    wait_within 60 $pid
    holds "a chat at a terminal" [ $? -eq 0 ]
    exec 3>&-
    holds "and its session" [ "$(head -c 8 "$dir/session")" = LFM2CHT1 ]
else
    echo "skipped: a chat at a terminal, which needs script of util-linux"
fi
finish
