#!/bin/sh
# scripts/batch_slurm.sh without Slurm: which part a task answers, and that all
# parts are the answers of one process.  test/slurm.sh tries it with Slurm.
#     RUN=./run test/check_slurm.sh
. test/lib.sh

script=$PWD/scripts/batch_slurm.sh model=$PWD/test/tiny.gguf
case $run in /*) ;; *) run=$PWD/$run ;; esac
cd "$dir" || exit 1

# task ID COUNT MIN MAX STEP PROGRAM: one task of an array.
task() {
    SLURM_ARRAY_TASK_ID=$1 SLURM_ARRAY_TASK_COUNT=$2 SLURM_ARRAY_TASK_MIN=$3 \
        SLURM_ARRAY_TASK_MAX=$4 SLURM_ARRAY_TASK_STEP=$5 RUN=$6 \
        "$script" "$model" in.jsonl out -n 9 --temp 0.5
}

# answers PART ID COUNT MIN MAX STEP: this task answers that part.
answers() {
    part=$1
    shift
    task "$@" echo >said
    holds "task $1 of $3-$4:$5 answers $part" [ "$(cat said)" = "$model \
--batch -f in.jsonl --shard $part --resume out.$(echo "$part" |
        sed 's,/,-of-,').jsonl -n 9 --temp 0.5" ]
}

answers 0/1 0 1 0 0 1
answers 1/3 1 3 0 2 1
answers 63/64 63 64 0 63 1
answers 0/5 1 5 1 5 1
answers 4/5 5 5 1 5 1
answers 2/3 8 3 2 8 3
task 7 2 5 7 1 echo >said 2>&1
holds "two tasks of an array are refused" [ $? -eq 2 ]
"$script" "$model" in.jsonl out >said 2>&1
holds "and no array" [ $? -eq 2 ]

for i in 1 2 3 4 5 6 7; do
    echo "{\"custom_id\": \"q$i\", \"prompt\": \"Story number $i\"}"
done >in.jsonl
"$run" -q "$model" --batch -f in.jsonl -n 9 --temp 0.5 >whole.jsonl 2>said
holds "one process answers all" [ "$(wc -l <whole.jsonl)" -eq 7 ]
for id in 1 2 3; do
    task $id 3 1 3 1 "$run" 2>>said
    holds "task $id ends" [ $? -eq 0 ]
done
holds "the parts join" "$script" join in.jsonl out
sort whole.jsonl >whole.sorted
sort out.jsonl >out.sorted
holds "to the answers of one process" cmp whole.sorted out.sorted
rm out.1-of-3.jsonl
"$script" join in.jsonl out >said 2>&1
holds "not without one of them" [ $? -eq 1 ]
cd - >/dev/null || exit 1
finish
