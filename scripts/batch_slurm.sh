#!/bin/sh
#SBATCH --job-name=lfm2 --array=0-7 --nodes=1 --ntasks=1
#SBATCH --requeue --open-mode=append --signal=B:TERM@60
# A batch of requests as an array of Slurm jobs, in a folder that all nodes see:
#
#     sbatch --array=0-63 --cpus-per-task=8 scripts/batch_slurm.sh \
#         MODEL.gguf IN.jsonl OUT [ARGUMENT...]
#     scripts/batch_slurm.sh join IN.jsonl OUT
#
# Task I of N, counted from 0, answers every N-th line of IN.jsonl into
# OUT.I-of-N.jsonl; join writes all to OUT.jsonl, if each line has been answered
# once.  ARGUMENTs are options of run, such as -n 200 --temp 0.  RUN names the
# program (./run).
#
# Answers that are there are never computed again.  A task that was moved to
# another node goes on where it was; after a time limit or a failure, submit the
# same line once more, the whole array: tasks that are done end at once.
#
# Exit status: that of run (7: some lines could not be answered), or of join
# 1, if lines are missing or there twice.
#
# Kubernetes: an Indexed Job of 64 completions, with a podFailurePolicy that
# fails the job on exit codes 2, 4 and 5, and this in the container:
#
#     sh -c 'i=$JOB_COMPLETION_INDEX; ./run MODEL.gguf --batch -f in.jsonl \
#         --shard $i/64 --resume out.$i-of-64.jsonl
#         s=$?; [ $s -eq 7 ] || exit $s'
set -eu

fail() {
    code=$1
    shift
    echo "batch_slurm.sh: $*" >&2
    exit "$code"
}

# join IN OUT: OUT.jsonl from its parts, all of one array.
join() {
    n=$(for part in "$2".*-of-*.jsonl; do
        part=${part##*-of-}
        echo "${part%.jsonl}"
    done | sort -u)
    case $n in
    '*') fail 3 "no parts $2.I-of-N.jsonl" ;;
    *[!0-9]*) fail 1 "$2: parts of arrays of several sizes:" "$n" ;;
    esac
    cat "$2".*-of-"$n".jsonl >"$2.jsonl"
    twice=$(grep -o '"custom_id": *"\([^"\\]\|\\.\)*"' "$2.jsonl" | sort |
        uniq -d | head -n 1)
    [ -z "$twice" ] || fail 1 "$2.jsonl: twice $twice"
    has=$(wc -l <"$2.jsonl") wants=$(grep -c '[^[:space:]]' "$1")
    [ "$has" -eq "$wants" ] ||
        fail 1 "$2.jsonl: $has lines, expected the $wants of $1"
}

if [ "${1-}" = join ] && [ $# -eq 3 ]; then
    join "$2" "$3"
    exit
fi
[ $# -ge 3 ] && [ -n "${SLURM_ARRAY_TASK_ID-}" ] ||
    fail 2 "sbatch $0 MODEL.gguf IN.jsonl OUT [ARGUMENT...], or" \
        "$0 join IN.jsonl OUT"
model=$1 in=$2 out=$3
shift 3

# The whole array, in whatever steps it counts.
n=$SLURM_ARRAY_TASK_COUNT
first=$SLURM_ARRAY_TASK_MIN step=${SLURM_ARRAY_TASK_STEP:-1}
[ $((first + (n - 1) * step)) -eq "$SLURM_ARRAY_TASK_MAX" ] ||
    fail 2 "--array: expected all tasks of the array, not a part of them"
i=$(((SLURM_ARRAY_TASK_ID - first) / step))

# In place of this shell, so that Slurm's SIGTERM reaches it.
exec "${RUN:-./run}" "$model" --batch -f "$in" --shard "$i/$n" \
    --resume "$out.$i-of-$n.jsonl" "$@"
