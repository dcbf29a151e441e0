#!/bin/sh
# A server under load: a thousand clients at once, and ordinary ones beside
# hundreds that never finish, never read, leave or reset.  make check-load runs
# it; all of it stays on this machine, and ends after a minute or two.
#     RUN=./run test/load.sh
. test/lib.sh

needs_python ssl "a server's load"
counted "$python" test/load.py "$run" $m "$dir"
finish
