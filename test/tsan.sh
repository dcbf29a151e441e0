#!/bin/sh
# The program under ThreadSanitizer: what it does while threads work.
#     RUN=build/tsan/run test/tsan.sh
. test/lib.sh

always="--sandbox off --temp 0 -t 3 test/tiny.gguf"
printf '%s\n' '{"prompt": "a b c", "max_tokens": 3}' \
    '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}' \
    '{"prompt": "once", "max_tokens": 4}' >"$dir/lines"
expect 0 "requests side by side" --batch --parallel 2 -f "$dir/lines"
expect 0 "a trace" --trace "$dir/trace" --trace-raw "$dir/raw" -n 2 hi
expect 0 "a session" --session "$dir/session" -n 2 hi

# Ended, in the middle of an answer or before it.
for wait in 0.5 2 4; do
    # shellcheck disable=SC2086
    "$run" $always -n 200 "Why?" >"$dir/out" 2>"$dir/err" </dev/null &
    sleep $wait
    kill -TERM $!
    wait_within 60 $!
    status=$?
    [ $status -eq 143 ]
    result $? "ended after $wait s: status $status, expected 143"
done
finish
