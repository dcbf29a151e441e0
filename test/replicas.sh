#!/bin/sh
# Two servers behind nginx, as scripts/nginx.conf has them: one is killed, and
# one stopped, while they answer.  make check-replicas runs it; it needs nginx.
#     RUN=./run test/replicas.sh
. test/lib.sh

PATH=$PATH:/usr/sbin
command -v nginx >"$dir/said" || skip "replicas, which need nginx"
needs_python ssl "replicas"
counted "$python" test/replicas.py "$run" $m "$dir"
finish
