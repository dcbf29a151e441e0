#!/bin/sh
# A batch of requests over several machines or over this one, with GNU parallel:
# the file is cut into parts, each is answered by a process of its own, and the
# answers are joined in the order of the questions.
#
#     scripts/batch_hosts.sh [OPTIONS] MODEL.gguf IN.jsonl OUT.jsonl \
#         [ARGUMENT...]
#
#     -S HOSTS   as ssh knows them, by commas; : is this machine (:)
#     -F FILE    the hosts in a file, one a line
#     -j N       processes on a host at a time (1: one keeps all CPUs busy)
#     -n PARTS   how many parts to cut the file into (16)
#     -r         do what is left to do of an earlier call
#
# ARGUMENTs are options of run, such as -n 200 --temp 0.  RUN names the program;
# it and MODEL.gguf have the same absolute paths on every host.  The hosts need
# rsync, by which they get their parts.  Until all is done, the parts, their
# answers and a log are in OUT.jsonl.parts.  Every line needs a custom_id, by
# which its answer is known; this gives them to lines without:
#
#     awk '{ sub(/{/, "{\"custom_id\":\"" NR "\","); print }' IN >IN.jsonl
#
# On one machine the same goes without this script (not with --resume-failed or
# --retries: with --pipepart, parallel 20221122 then repeats the wrong parts):
#
#     parallel --pipepart -a IN.jsonl --block -1 -k -j4 \
#         ./run MODEL.gguf --batch -t 1 >OUT.jsonl
#
# Spark, where a part of the text is a file of its own, in Python:
#
#     sc.textFile("IN.jsonl").pipe(
#         "sh -c './run MODEL.gguf --batch || [ $? -eq 7 ]'", checkCode=True)
#
# Exit status: 0 done, 1 some parts failed (-r tries them again), 2 usage,
# 3 a file, 7 done, but some lines could not be answered.
set -eu

say() {
    echo "batch_hosts.sh: $*" >&2
}

usage() {
    say "$*"
    echo "usage: scripts/batch_hosts.sh [-S HOSTS | -F FILE] [-j N]" \
        "[-n PARTS] [-r] MODEL.gguf IN.jsonl OUT.jsonl [ARGUMENT...]" >&2
    exit 2
}

fail() {
    say "$*"
    exit 3
}

a_count() {
    case $2 in
    '' | *[!0-9]* | 0*) usage "$1 $2: expected a whole number from 1" ;;
    esac
}

# absolute PATH: the same, from the root.
absolute() {
    case $1 in
    /*) echo "$1" ;;
    *) echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")" ;;
    esac
}

# quote WORDS...: in quotes, for the shell that a host will run them in.
quote() {
    for word; do
        printf "'%s' " "$(printf %s "$word" | sed "s/'/'\\\\''/g")"
    done
}

hosts=: jobs=1 parts=16 again=''
while getopts :S:F:j:n:r option; do
    case $option in
    S) hosts=$OPTARG ;;
    F) hosts=$(absolute "$OPTARG") ;;
    j) a_count -j "$OPTARG"; jobs=$OPTARG ;;
    n) a_count -n "$OPTARG"; parts=$OPTARG ;;
    r) again=--resume-failed ;;
    :) usage "-$OPTARG needs a value" ;;
    *) usage "unknown option -$OPTARG" ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 3 ] || usage "a model and two files are needed"
model=$(absolute "$1") in=$2 out=$3
run=$(absolute "${RUN:-$(dirname "$0")/../run}")
shift 3
case "$run $model $out $*" in
*[{}]*) usage "names and arguments cannot have { or }" ;;
esac
case $(parallel --version 2>/dev/null </dev/null) in
"GNU parallel"*) ;;
*) fail "GNU parallel is needed (Debian: apt install parallel)" ;;
esac
[ -f "$in" ] || fail "$in: not a regular file"
[ -s "$in" ] || fail "$in: empty"
line=$(grep -nvm 1 '"custom_id"' "$in" | cut -d: -f1)
[ -z "$line" ] || fail "$in: line $line has no custom_id; awk can give it" \
    "one, see the head of $0"

# The parts are cut as they were before, or others would be skipped.  Cut by us:
# to --pipepart --resume-failed, parallel 20221122 gives the wrong parts.
dir=$out.parts
if [ -z "$again" ]; then
    [ ! -e "$dir" ] || fail "$dir is there; -r goes on with it"
    mkdir "$dir" "$dir/in" "$dir/out"
    echo "$(($(grep -c '' "$in") / parts + 1)) $(cksum <"$in")" >"$dir/cut"
fi
[ -e "$dir/cut" ] || fail "$dir: nothing to go on with"
read -r lines sum <"$dir/cut"
[ "$sum" = "$(cksum <"$in")" ] || fail "$in: not the file that $dir is of"
split -a 4 -l "$lines" "$in" "$dir/in/"

# Lines that cannot be answered (status 7) make no part a failure.
case $hosts in
:) where='' ;;
/*) where="--transferfile {} --cleanup --sshloginfile" ;;
*) where="--transferfile {} --cleanup --sshlogin" ;;
esac
# shellcheck disable=SC2086
parallel --will-cite $where ${where:+"$hosts"} -j "$jobs" --retries 3 \
    --joblog "$dir/log" $again --results "$dir/out/{/}" \
    "$(quote "$run" "$model" --batch "$@") <{} || [ \$? -eq 7 ]" \
    ::: "$dir"/in/* >/dev/null || {
    say "parts failed, see $dir/log; -r tries them again"
    exit 1
}
cat "$dir"/out/???? >"$dir/all"
lines=$(grep -c '' "$dir/all") wanted=$(grep -c '' "$in")
[ "$lines" -eq "$wanted" ] || {
    say "$in has $wanted lines, but $dir/all $lines"
    exit 1
}
mv "$dir/all" "$out"
rm -r "$dir"
wrong=$(grep -cv '"error": *null' "$out") || exit 0
say "$wrong of $lines lines could not be answered"
exit 7
