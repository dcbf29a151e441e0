#!/bin/sh
# Lines that are edited at a terminal.
#     RUN=./run test/check_terminal.sh
. test/lib.sh

needs_python pty "lines edited at a terminal"
unset NO_COLOR
"$python" test/terminal.py "$run" test/tiny.gguf "$dir" >"$dir/said"
status=$?
sed '$d' "$dir/said"
passed=$(sed -n '$s/ passed.*//p' "$dir/said")
failed=$(sed -n '$s/.* \([0-9]*\) failed/\1/p' "$dir/said")
[ $status -le 1 ] && [ -n "$passed" ] || { passed=0 failed=1; }
finish
