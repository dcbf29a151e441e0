#!/bin/sh
# A model file that becomes shorter while it is used; and all modes inside of
# the sandbox, where they must do what they do outside.
#     RUN=./run test/check_sandbox.sh
. test/lib.sh

unset NO_COLOR
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

refuses 2 "means nothing with --bench" --bench --sandbox require $m
"$run" --sandbox require -v -n 1 $m hello >"$dir/out" 2>"$dir/err"
status=$?
if grep -q 'sandbox require: no' "$dir/err"; then
    holds "what is missing ends it" [ $status -eq 1 ]
    holds "without an answer" [ ! -s "$dir/out" ]
    why=$(sed -n 's/.*require: //p' "$dir/err")
    expect 0 "--sandbox auto goes on" -v -n 1 $m hello
    says "sandbox: no"
    skip "all modes in the sandbox: $why"
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
    runs="$program -q $* " words="$program -q $3 $4"
    set -- "$program" -q --temp 0 -n 6 "$@"
    mode answer "$@" $m "What is LFM2?"
    mode read "$@" --no-mmap $m "What is LFM2?"
    mode file "$@" -f "$dir/question" $m
    mode messages "$@" --messages "$dir/talk" --tools "$dir/tools" $m
    mode session1 "$@" --session "$to/session" $m "What is LFM2?"
    mode session2 "$@" --session "$to/session" -f "$dir/question" $m
    mode chat chat "$@" -cnv $m
    mode chat_session chat "$@" -cnv --session "$to/talk" -f "$dir/question" $m
    mode ids $runs --ids test/tiny.ids --logits "$to/logits" $m
    mode trace "$@" --trace "$to/records" --trace-raw "$to/numbers" \
        --trace-filter 'model.layers.3.*' $m hello
    mode batch "$@" --batch -f "$dir/requests" $m
    mode resume1 "$@" --batch -f "$dir/first" --resume "$to/answers" $m
    mode resume2 "$@" --batch -f "$dir/requests" --resume "$to/answers" $m
    mode ppl $runs --ppl "$dir/text" -c 40 $m
    mode tokenize $words --tokenize -f "$dir/text" $m
    mode export $words --export-tokenizer "$to/vocabulary" $m
    mode words "$@" --tokenizer "$to/vocabulary" $m "What is LFM2?"
    mode dump $runs --dump-prompt $m "What is LFM2?"
    mode inspect inspect $runs --inspect $m
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

# The directory it began in, unless that is a home or holds one; else none but
# that of --save-dir.
here=$PWD
case $run in
/*) program=$run ;;
*) program=$here/$run ;;
esac
mkdir "$dir/home" "$dir/home/work" "$dir/saves"
printf 'hello\n/save in\n/save %s/saves/in\n/save %s/escaped\n/load /etc/passwd\n' \
    "$dir" "$dir" >"$dir/lines"
# chat_in DIRECTORY OPTIONS...: with a home of its own.
chat_in() {
    (cd "$dir/$1" && shift && HOME=$dir/home "$program" -cnv -q "$@" \
        "$here/$m" <"$dir/lines" 2>"$dir/err")
}
# saved WHAT DIRECTORY...: files were saved there, and nowhere else.
saved() {
    what=$1
    shift
    found=$(cd "$dir" && find home saves escaped -type f 2>/dev/null | sort)
    holds "$what" [ "$(echo $found)" = "$*" ]
    rm -f "$dir"/home/in "$dir"/home/work/in "$dir"/saves/in
}
chat_in home/work
saved "/save in the working directory" home/work/in
holds "but not outside of it" [ "$(grep -c 'Permission denied' "$dir/err")" = 3 ]
holds "which is explained" [ "$(grep -c 'files only in \.;' "$dir/err")" = 3 ]
chat_in home
saved "not in the home directory"
holds "which is explained" [ "$(grep -c 'open no files' "$dir/err")" = 4 ]
chat_in .
saved "nor in one that has it inside"
chat_in home --save-dir "$dir/saves"
saved "--save-dir names another" saves/in
chat_in home/work --sandbox require
saved "nothing with require"
holds "which is explained" [ "$(grep -c 'open no files' "$dir/err")" = 4 ]
chat_in home --sandbox require --save-dir "$dir/saves"
saved "but what is named" saves/in

# A session takes nothing but its own file, not even in a home directory.
(cd "$dir/home" && HOME=$dir/home "$program" -q --sandbox require -n 1 \
    --session talk "$here/$m" hello >"$dir/out" 2>"$dir/err" </dev/null)
holds "a session in a home directory" [ -s "$dir/home/talk" ]

# Descriptors that somebody left open are closed, those that are named are not.
"$run" -q --temp 0 -n 6 -f /dev/fd/7 $m 7<"$dir/question" >"$dir/out" \
    2>"$dir/err"
same "a descriptor that is named" "$dir/out" "$dir/off/answer"
"$run" -q -cnv $m 7<"$dir/question" <"$dir/keys" >"$dir/out" 2>"$dir/err" &
pid=$!
exec 3>"$dir/keys"
echo "What is LFM2?" >&3
waits_for LFM2 "$dir/out"
holds "another is closed" [ ! -e /proc/$pid/fd/7 ]
exec 3>&-
wait_within 60 $pid

# A sandbox above this one, which answers Landlock with a signal, as Android
# does.
if ${CC:-cc} -o "$dir/deny" test/deny.c 2>"$dir/err"; then
    for how in trap kill 1 38; do
        "$dir/deny" $how 444,445,446 "$run" -q --temp 0 -n 6 $m \
            "What is LFM2?" >"$dir/out" 2>"$dir/err" </dev/null
        holds "Landlock is answered with $how" [ $? = 0 ]
        same "and the program answers" "$dir/out" "$dir/off/answer"
        "$dir/deny" $how 444,445,446 "$run" -q --sandbox require $m hello \
            >"$dir/out" 2>"$dir/err" </dev/null
        holds "which require refuses" [ $? = 1 ]
        says "--sandbox require: no Landlock"
    done
    case $(uname -m) in
    x86_64) forks=56,57,58 ;;
    aarch64 | riscv64) forks=220 ;;
    *) forks=-1 ;;
    esac
    "$dir/deny" 1 $forks "$run" -q -t 1 --temp 0 -n 6 --session "$dir/s" $m \
        "What is LFM2?" >"$dir/out" 2>"$dir/err" </dev/null
    holds "without processes of its own" [ $? = 0 ]
    holds "the session is kept" [ -s "$dir/s" ]
else
    echo "skipped: a sandbox above this one, which needs a compiler"
fi

always="--sandbox require"
refuses 3 "no: No such file" -q $m -f "$dir/no"
input=$dir/question
expect 0 "/dev/stdin" -q --temp 0 -n 6 -f /dev/stdin $m
input=/dev/null
same "/dev/stdin" "$dir/out" "$dir/off/answer"
"$run" --sandbox require -q --ids test/tiny.ids $m \
    --logits /dev/stdout 2>"$dir/err" | cmp -s - "$dir/off/logits"
holds "/dev/stdout" [ $? -eq 0 ]
expect 0 "-v" -v -n 1 $m hello
holds "-v tells what there is" [ "$(grep -c ' sandbox: ' "$dir/err")" -eq 2 ]
(trap '' BUS; shrinks 3 -t 4 --sandbox require)
says "it became shorter"

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
    holds "and its session" [ "$(head -c 7 "$dir/session")" = LFM2SES ]
else
    echo "skipped: a chat at a terminal, which needs script of util-linux"
fi
finish
