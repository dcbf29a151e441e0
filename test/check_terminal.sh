#!/bin/sh
# Lines that are edited at a terminal.
#     RUN=./run test/check_terminal.sh
. test/lib.sh

needs_python pty "lines edited at a terminal"
unset NO_COLOR
counted "$python" test/terminal.py "$run" test/tiny.gguf "$dir"
finish
