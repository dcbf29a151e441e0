#!/bin/sh
# The program and hostile input under valgrind, which sees what is read before
# it was written.  Minutes; not part of make check.
#     RUN=./run test/valgrind.sh
. test/lib.sh

command -v valgrind >/dev/null || skip "what needs valgrind"
m=test/tiny.gguf longest=1800
printf '%s\n' '{"prompt": "a", "max_tokens": 2, "logprobs": 1, "echo": true}' \
    '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}' \
    '{"messages": 7}' >"$dir/lines"
head -c 90000 $m >"$dir/cut"

# clean STATUS WHAT COMMAND...
clean() {
    want=$1 what=$2
    shift 2
    limited valgrind -q --error-exitcode=99 --leak-check=full \
        --errors-for-leak-kinds=definite,indirect,possible \
        "$@" >"$dir/said" 2>"$dir/err" </dev/null
    status=$?
    [ $status -eq "$want" ]
    result $? "$what: status $status, expected $want"
}

# answers STATUS WHAT ARGUMENTS...: without a sandbox, for valgrind is in it.
answers() {
    want=$1 what=$2
    shift 2
    clean "$want" "$what" "$run" --sandbox off --temp 0 "$@"
}

for isa in scalar auto; do
    answers 0 "an answer, $isa" $m --isa $isa -t 1 -n 2 hi
    answers 7 "a batch, $isa" $m --isa $isa -t 1 --batch --parallel 2 \
        -f "$dir/lines"
done
answers 0 "two threads" $m -t 2 -n 1 hi
answers 0 "a session" $m -t 1 -n 1 --session "$dir/session" hi
answers 0 "that goes on" $m -t 1 -n 1 --session "$dir/session" hi
answers 4 "a file cut short" "$dir/cut" hi
clean 0 "tokens" "$run" --tokenize --special $m "<|im_start|>user"
clean 0 "a look inside" "$run" --inspect $m
clean 0 "hostile input" build/test/replay -m 20
finish
