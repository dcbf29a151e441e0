# What the test scripts share: sourced first, from the root of the checkout.
#
#     . test/lib.sh
#     needs_python numpy "the tests of scripts/"      (or skip, and say so)
#     holds "two and two" [ $((2 + 2)) = 4 ]
#     finish
#
# $dir is a temporary folder, gone at the end; $run the program under test.
set -u

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 143' TERM
passed=0 failed=0
run=${RUN:-./run}
export PYTHONDONTWRITEBYTECODE=1

# skip WHAT: nothing can be tested here.
skip() {
    echo "skipped: $1"
    finish
}

# needs_python MODULE WHAT: $python is one that has the module.
needs_python() {
    for python in python3 /usr/bin/python3; do
        "$python" -c "import $1" 2>/dev/null && return
    done
    skip "$2, which needs python3 with $1"
}

# limited COMMAND...: a program that takes longer than $longest seconds is ended,
# with status 124, where there is a timeout.
longest=300
if timeout --foreground -k 1 1 true 2>/dev/null; then
    limited() { timeout --foreground -k 5 $longest "$@"; }
else
    limited() { "$@"; }
fi

# interruptible COMMAND... &: what a shell runs in the background ignores SIGINT,
# which the program leaves as it is; not this one, where env can do that.
interruptible() {
    if env --default-signal=INT true 2>/dev/null; then
        exec env --default-signal=INT "$@"
    fi
    exec "$@"
}

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

# expect STATUS WHAT ARGUMENTS...: the program ends so; output in $dir/out,
# messages in $dir/err.  It gets the options in $always, too.
always=
expect() {
    want=$1 what=$2
    shift 2
    # shellcheck disable=SC2086
    limited "$run" $always "$@" >"$dir/out" 2>"$dir/err" </dev/null
    status=$?
    [ $status -eq "$want" ]
    result $? "$what: status $status, expected $want"
}

# says TEXT: the messages of the last call have TEXT.
says() {
    grep -qF -- "$1" "$dir/err"
    result $? "expected \"$1\""
}

# prints TEXT: the output of the last call has TEXT.
prints() {
    grep -qF -- "$1" "$dir/out"
    result $? "$what: expected \"$1\""
}

# has KEY VALUE: so the JSON says, in one place at least.
has() {
    prints "\"$1\": $2"
}

# refuses STATUS TEXT ARGUMENTS...: one sentence with TEXT, and no output.
refuses() {
    code=$1 words=$2
    shift 2
    expect "$code" "$*" "$@"
    grep -qF -- "$words" "$dir/err" && [ ! -s "$dir/out" ]
    result $? "$*: expected \"$words\""
}

finish() {
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ]
    exit $?
}
