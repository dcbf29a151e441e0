#!/bin/sh
# --serve: what it answers to whom, byte for byte, and what it refuses.
#     RUN=./run test/check_serve.sh
. test/lib.sh

# ---------------------------------------------------- places that are refused

refuses 2 "api-key-file" $m --serve 0.0.0.0:0
refuses 2 "api-key-file" $m --serve "[::]:0"
refuses 2 "expected a PORT" $m --serve example.org:80
refuses 2 "expected a PORT" $m --serve 65536
refuses 2 "expected a PORT" $m --serve -1
refuses 2 "at most 107 bytes" $m --serve "/$(printf %0200d 0)"
refuses 3 "No such file" $m --serve "$dir/none/socket"
: >"$dir/keys"
refuses 2 "no key in it" $m --serve 0 --api-key-file "$dir/keys"
refuses 3 "No such file" $m --serve 0 --api-key-file "$dir/none"
refuses 3 "No such file" $m --serve 0 --page "$dir/none"

needs_python ssl "a server's clients"
counted "$python" test/check_serve.py "$run" $m "$parrot" "$dir"
finish
