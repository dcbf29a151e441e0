#!/bin/sh
# A server under load: a thousand clients at once, and ordinary ones beside
# hundreds that never finish, never read, leave or reset.  make check-load runs
# it; all of it stays on this machine, and ends after a minute or two.
#     RUN=./run test/load.sh
. test/lib.sh

needs_python ssl "a server's load"
"$python" test/load.py "$run" $m "$dir" >"$dir/tests" 2>&1
status=$?
sed '$d' "$dir/tests"
passed=$(sed -n '$s/ passed.*//p' "$dir/tests")
failed=$(sed -n '$s/.* \([0-9]*\) failed/\1/p' "$dir/tests")
[ $status -le 1 ] && [ -n "$passed" ] || {
    tail -1 "$dir/tests"
    passed=0 failed=1
}
finish
