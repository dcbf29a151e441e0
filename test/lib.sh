# What the test scripts share: sourced first, from the root of the checkout.
#
#     . test/lib.sh
#     needs_python numpy "the tests of scripts/"      (or skip, and say so)
#     holds "two and two" [ $((2 + 2)) = 4 ]
#     finish
#
# $dir is a temporary folder, gone at the end; $run the program under test; $m
# the model that comes with it; $parrot makes others, test/parrot.c says how.
set -u

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 143' TERM
passed=0 failed=0
run=${RUN:-./run} m=test/tiny.gguf
parrot=${PARROT:-build/test/parrot}
export PYTHONDONTWRITEBYTECODE=1

# skip WHAT: nothing more can be tested here.
skip() {
    echo "skipped: $1"
    [ $((passed + failed)) -gt 0 ] || exit 0
    finish
}

# needs_python MODULE WHAT: $python is one that has the module.
needs_python() {
    for python in python3 /usr/bin/python3; do
        "$python" -c "import $1" 2>/dev/null && return
    done
    skip "$2, which needs python3 with $1"
}

# counted COMMAND...: tests in another language, whose last line is their count.
counted() {
    "$@" >"$dir/tests" 2>"$dir/tests.err"
    status=$?
    sed '$d' "$dir/tests"
    n=$(sed -n '$s/ passed.*//p' "$dir/tests")
    bad=$(sed -n '$s/.* \([0-9]*\) failed/\1/p' "$dir/tests")
    [ $status -le 1 ] && [ -n "$n" ] || {
        tail -1 "$dir/tests"
        cat "$dir/tests.err"
        n=0 bad=1
    }
    passed=$((passed + n)) failed=$((failed + bad))
}

# limited COMMAND...: a program that takes longer than $longest seconds is ended,
# with status 124, where there is a timeout.
longest=300
if timeout --foreground -k 1 1 true 2>/dev/null; then
    limited() { timeout --foreground -k 5 $longest "$@"; }
else
    limited() { "$@"; }
fi

# within SECONDS COMMAND...: the command succeeds before long.
within() {
    deadline=$(($(date +%s) + $1))
    shift
    until "$@" >"$dir/said" 2>&1; do
        [ "$(date +%s)" -le $deadline ] || return 1
        sleep 0.05
    done
}

# wait_within SECONDS PID: the status of a process in the background, which is
# killed if it takes longer.
wait_within() {
    within "$1" has_ended "$2" || kill -KILL "$2"
    wait "$2"
}

# interruptible COMMAND...: one in the background that SIGINT ends: a shell that
# runs a script starts those with SIGINT ignored, and so they stay.
interruptible() {
    if env --default-signal=INT true 2>/dev/null; then
        exec env --default-signal=INT "$@"
    fi
    exec "$@"
}

has_ended() {
    ! kill -0 "$1"
}

# result STATUS WHAT: count a test; if it failed, show what was said, by the
# command of holds() and by the program, in $dir/err.
result() {
    if [ "$1" = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL   $2"
        cat "$dir/said" "$dir/err" 2>/dev/null | sed 's/^/       | /'
    fi
}

# holds WHAT COMMAND...: the command succeeds.
holds() {
    what=$1
    shift
    "$@" >"$dir/said" 2>&1
    result $? "$what"
}

# same WHAT A B: the files have the same bytes.
same() {
    cmp "$2" "$3" >"$dir/said" 2>&1
    result $? "$1: other bytes"
}

# expect STATUS WHAT ARGUMENTS...: the program ends so; it reads $input, output is
# in $dir/out, messages in $dir/err.  It gets the options in $always, too.
always= input=/dev/null
expect() {
    want=$1 what=$2
    shift 2
    # shellcheck disable=SC2086
    limited "$run" $always "$@" <"$input" >"$dir/out" 2>"$dir/err"
    status=$?
    [ $status -eq "$want" ]
    result $? "$what: status $status, expected $want"
}

# says TEXT: the messages of the last call have TEXT; hushes TEXT: they have not.
says() {
    grep -qF -- "$1" "$dir/err"
    result $? "expected \"$1\""
}

hushes() {
    ! grep -qF -- "$1" "$dir/err"
    result $? "expected no \"$1\""
}

# out_has TEXT: the output of the last call has TEXT.
out_has() {
    grep -qF -- "$1" "$dir/out"
    result $? "$what: expected \"$1\""
}

# json_has KEY VALUE: so the JSON says, in one place at least.
json_has() {
    out_has "\"$1\": $2"
}

# has WHAT TEXT: the last output has TEXT; hasnt WHAT TEXT: it has not.
has() {
    grep -qF -- "$2" "$dir/out"
    result $? "$1: expected $2"
}

hasnt() {
    ! grep -qF -- "$2" "$dir/out"
    result $? "$1: expected no $2"
}

# prints WHAT TEXT: the last output is exactly that, and a line break.
prints() {
    printf '%s\n' "$2" >"$dir/expected"
    same "$1" "$dir/expected" "$dir/out"
}

# refuses STATUS TEXT ARGUMENTS...: one sentence with TEXT, and no output.
refuses() {
    code=$1 words=$2
    shift 2
    expect "$code" "$*" "$@"
    grep -qF -- "$words" "$dir/err" && [ ! -s "$dir/out" ]
    result $? "$*: expected \"$words\""
}

# batch STATUS WHAT OPTIONS...: the lines of $dir/in are answered.  By one thread,
# which is not slower for this model.
batch() {
    want=$1 what=$2
    shift 2
    input=$dir/in
    expect "$want" "$what" "$m" --batch -t 1 "$@"
    input=/dev/null
}

# json WHAT EXPRESSION: it holds in Python, where d is the last output, and b the
# bodies of its lines if it has many.  Counts nothing without a Python.
json() {
    for python in python3 /usr/bin/python3 ""; do
        [ -z "$python" ] || "$python" -c 'import json' 2>/dev/null && break
    done
    [ -n "$python" ] || return 0
    "$python" -c '
import json, math, struct, sys
said = open(sys.argv[1] + "/out", encoding="utf-8").read()
lines = [json.loads(line) for line in said.splitlines()]
d = lines[0]
b = [(x.get("response") or {}).get("body") for x in lines]
holds = eval(sys.argv[2])
if not holds:
    print(said[:2000])
sys.exit(not holds)' "$dir" "$2" >"$dir/said" 2>&1
    result $? "$1"
}

# lines FILE N: there are as many.
lines() {
    [ "$(wc -l <"$1")" -ge "$2" ]
}

# A terminal for one program: what is typed goes into a pipe, what it shows to
# $dir/tty, and its number is in $dir/pid.
needs_terminal() {
    script -qec true /dev/null </dev/null >"$dir/tty" 2>&1 ||
        skip "$1, which need script of util-linux"
    mkfifo "$dir/keys"
}

open_terminal() {
    : >"$dir/tty"                         # shows() must not see the last one
    interruptible script -qec "echo \$\$ >$dir/pid; exec $run $always $*" \
        /dev/null <"$dir/keys" >"$dir/tty" 2>&1 &
    pid=$!
    exec 3>"$dir/keys"
}

# types TEXT: as printf writes it; to one who may have left.
types() {
    # shellcheck disable=SC2059
    (printf "$1" >&3) 2>/dev/null
}

# shows N TEXT: within a while, $dir/tty has N lines with TEXT.
shows() {
    within 30 has_lines "$@" || cp "$dir/tty" "$dir/err"
    has_lines "$@"
    result $? "the terminal shows \"$2\""
}

has_lines() {
    [ "$(grep -cF -- "$2" "$dir/tty")" -ge "$1" ]
}

# leaves STATUS WHAT: the program ends.
leaves() {
    wait_within 60 $pid
    status=$?
    [ $status -eq "$1" ]
    result $? "$2: status $status, expected $1"
    exec 3>&-
}

finish() {
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ]
    exit $?
}
