#!/bin/sh
# Run suites and scripts of tests, print what they print, add up.
#     test/all.sh RUN TEST...
# RUN is the program that the scripts test.
set -u

export RUN="$1"
shift
total=0 failed=0 skipped=0
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

# lane TEST...: those that no other lane has taken, one after the other, each
# with its output and status in $dir.
lane() {
    for test in "$@"; do
        log=$dir/$(basename "$test")
        mkdir "$log.taken" 2>/dev/null || continue
        began=$(date +%s)
        case $test in
        *.sh) sh "$test" ;;
        *) "$test" ;;
        esac >"$log.log" 2>&1
        echo $? >"$log.status"
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
        echo "FAIL: $name ended with status $status"
        bad=1 n=$((${n:-0} + 1))
    fi
    total=$((total + ${n:-0})) failed=$((failed + bad))
    skipped=$((skipped + skips))
}

# Two side by side: two CPUs are half the wait.
lane "$@" &
lane "$@"
wait
for test in "$@"; do
    count "$test"
done
echo
echo "$((total - failed)) passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
