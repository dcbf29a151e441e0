#!/bin/sh
# Two servers behind nginx, as scripts/nginx.conf has them: one is killed, and
# one stopped, while they answer.  make check-replicas runs it; it needs nginx.
#     RUN=./run test/replicas.sh
. test/lib.sh

PATH=$PATH:/usr/sbin
command -v nginx >"$dir/said" || skip "replicas, which need nginx"
needs_python ssl "replicas"
"$python" test/replicas.py "$run" $m "$dir" >"$dir/tests" 2>&1
status=$?
sed '$d' "$dir/tests"
passed=$(sed -n '$s/ passed.*//p' "$dir/tests")
failed=$(sed -n '$s/.* \([0-9]*\) failed/\1/p' "$dir/tests")
[ $status -le 1 ] && [ -n "$passed" ] || {
    tail -1 "$dir/tests"
    passed=0 failed=1
}
finish
