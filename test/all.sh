#!/bin/sh
# Run suites and scripts of tests, print what they print, add up.
#     test/all.sh RUN TEST...
# RUN is the program that the scripts test.  Each test is ended after half an hour,
# where there is a timeout: one that hangs has failed.
set -u

export RUN="$1"
shift
total=0 failed=0 skipped=0
dir=$(mktemp -d)
other=
longest=1800 limit=
timeout -k 1 1 true 2>/dev/null && limit="timeout -k 10 $longest"

# A python3 that is a script which looks for one, as pyenv's is, takes longer than
# most of what it is started for.
python=$(python3 -c 'import sys; print(sys.executable)' 2>/dev/null)
case $python in
"" | "$(command -v python3)") ;;
*) PATH=$(dirname "$python"):$PATH ;;
esac

# Whoever ends this, ends the tests with it.
# shellcheck disable=SC2046,SC2086
stop() {
    kill $other $(cat "$dir"/*.pid 2>/dev/null) 2>/dev/null
    rm -rf "$dir"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# lane TEST...: those that no other lane has taken, one after the other, each
# with its output and status in $dir.
lane() {
    for test in "$@"; do
        log=$dir/$(basename "$test")
        mkdir "$log.taken" 2>/dev/null || continue
        began=$(date +%s) sh=
        case $test in
        *.sh) sh="sh" ;;
        esac
        echo "-- $test begins"
        $limit $sh "$test" >"$log.log" 2>&1 &
        echo $! >"$log.pid"
        wait $!
        echo $? >"$log.status"
        rm "$log.pid"
        { echo "== $test, $(($(date +%s) - began)) s"; cat "$log.log"; } >"$log.shown"
        cat "$log.shown"
    done
}

# The last line that has all of the named numbers decides; without one, the test
# has failed.
count() {
    name=$(basename "$1") log=$dir/$(basename "$1").log
    status=$(cat "$dir/$name.status")
    skips=$(grep -c '^skipped:' "$log")
    n=$(sed -n 's/.*Checks: \([0-9]*\), Failures.*/\1/p
                s/^\([0-9]*\) passed, \([0-9]*\) failed.*/\1/p' "$log" | tail -1)
    bad=$(sed -n 's/.*Failures: \([0-9]*\), Errors: \([0-9]*\).*/\1 + \2/p
                  s/^\([0-9]*\) passed, \([0-9]*\) failed.*/\2/p' "$log" |
          tail -1)
    bad=$((${bad:-0}))
    case $(tail -1 "$log") in
        *" passed, "*) n=$((${n:-0} + bad)) ;;
    esac
    if [ "$status" -ne 0 ] && [ "$bad" -eq 0 ]; then
        why="ended with status $status"
        [ "$status" -ne 124 ] || why="took longer than $longest s"
        echo "FAIL: $name $why"
        bad=1 n=$((${n:-0} + 1))
    fi
    total=$((total + ${n:-0})) failed=$((failed + bad))
    skipped=$((skipped + skips))
}

# Two side by side: two CPUs are half the wait.
lane "$@" &
other=$!
lane "$@"
wait
other=
for test in "$@"; do
    count "$test"
done
echo
echo "$((total - failed)) passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
