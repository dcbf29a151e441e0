#!/bin/sh
# scripts/batch_slurm.sh on a Slurm cluster of one node, made for the occasion:
# the answers of an array are those of one process, also when tasks were stopped
# or put back into the queue.  Not part of make check: run it as root on Debian,
# where it installs Slurm and munge if they are missing.  It takes two minutes.
#     RUN=./run test/slurm.sh
. test/lib.sh

[ "$(id -u)" = 0 ] || skip "Slurm, which needs root"
for name in slurmctld slurmd sbatch munged; do
    command -v $name >/dev/null && continue
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        slurmctld slurmd slurm-client munge >"$dir/said" 2>&1 ||
        skip "Slurm, which apt cannot install"
done

# The daemons talk as root and through files that others may see.
chmod 755 "$dir"
host=$(hostname -s)
export SLURM_CONF="$dir/slurm.conf"
cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MailProg=/bin/true
ReturnToService=2
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
mkdir "$dir/state" "$dir/spool" "$dir/work"

daemons=
stop_all() {
    scancel --user=root 2>/dev/null
    for pid in $daemons; do
        kill "$pid" 2>/dev/null
    done
    for pid in $daemons; do
        wait_within 20 "$pid"
    done
    rm -rf "$dir"
}
trap stop_all EXIT
trap 'exit 1' INT TERM

# start NAME COMMAND...: in the background, until the end of this script.
start() {
    name=$1
    shift
    "$@" >"$dir/$name.out" 2>&1 &
    daemons="$! $daemons"
}

idle() {
    sinfo -h -o %T | grep -q idle
}

gone() {
    [ -z "$(squeue -h -j "$1" 2>/dev/null)" ]
}

dd if=/dev/urandom of="$dir/munge.key" bs=1024 count=1 2>/dev/null
chmod 600 "$dir/munge.key"
start munged munged --foreground --force --key-file="$dir/munge.key" \
    --socket="$dir/munge.socket" --pid-file="$dir/munge.pid" \
    --log-file="$dir/munge.log" --seed-file="$dir/munge.seed"
within 10 [ -S "$dir/munge.socket" ]
start slurmctld slurmctld -D -f "$SLURM_CONF"
start slurmd slurmd -D -f "$SLURM_CONF" -N "$host"
if ! within 60 idle; then
    tail -n 20 "$dir"/*.out "$dir"/*.log
    result 1 "a cluster of one node starts"
    finish
fi
result 0 "a cluster of one node starts"

# ------------------------------------------------------------------- the batch

root=$PWD
case $run in /*) ;; *) run=$root/$run ;; esac
model=$root/test/tiny.gguf
cd "$dir/work" || exit 1
awk 'BEGIN {
    for (i = 1; i <= 120; i++)
        printf "{\"custom_id\":\"q%d\",\"method\":\"POST\",\"url\":" \
            "\"/v1/chat/completions\",\"body\":{\"messages\":[{\"role\":" \
            "\"user\",\"content\":\"Tell story number %d.\"}]}}\n", i, i
}' >in.jsonl
options="-n 100 --temp 0.5 -t 1"
# shellcheck disable=SC2086
"$run" "$model" --batch $options <in.jsonl >whole.jsonl 2>"$dir/err"
result $? "one process answers all"

# submit ARGUMENTS...: the batch, in an array of 4; prints its id.
submit() {
    # shellcheck disable=SC2086
    RUN=$run sbatch --parsable --array=0-3 --output="$dir/work/%A_%a.log" \
        "$root/scripts/batch_slurm.sh" "$model" in.jsonl out $options "$@"
}

joined() {
    sh "$root/scripts/batch_slurm.sh" join in.jsonl out >"$dir/said" 2>&1
    result $? "$1: the parts join"
    for file in whole out; do
        sort $file.jsonl >"$file.sorted"
    done
    cmp whole.sorted out.sorted >"$dir/said" 2>&1
    result $? "$1: each answer once, as of one process"
}

id=$(submit)
within 120 gone "$id"
result $? "an array of 4 ends"
cat ./*.log >"$dir/err" 2>/dev/null
joined "an array"
holds "four parts" [ "$(find . -name 'out.*-of-4.jsonl' | wc -l)" -eq 4 ]
before=$(cat out.*-of-4.jsonl | cksum)
id=$(submit)
within 60 gone "$id"
[ "$before" = "$(cat out.*-of-4.jsonl | cksum)" ]
result $? "submitted again, it has nothing to do"

# begun TASK: it has answered something, but not all.
begun() {
    n=$(wc -l <"out.$1-of-4.jsonl")
    [ "$n" -gt 0 ] && [ "$n" -lt 30 ]
}

# Slowly: one task is ended as at its time limit, one is put back into the queue.
rm -f out.*
id=$(submit --parallel 1 --isa scalar)
within 60 begun 1 && scancel --batch --signal=TERM "${id}_1"
within 60 begun 2 && scontrol requeue "${id}_2"
within 180 gone "$id"
result $? "an array of which tasks were stopped and requeued ends"
n=$(wc -l <out.1-of-4.jsonl)
[ "$n" -gt 0 ] && [ "$n" -lt 30 ]
result $? "the task that was stopped has answered some of its lines: $n"
sh "$root/scripts/batch_slurm.sh" join in.jsonl out >"$dir/said" 2>&1
[ $? -eq 1 ] && grep -q 'expected the 120' "$dir/said"
result $? "so the parts do not join"
[ "$(wc -l <out.2-of-4.jsonl)" -eq 30 ]
result $? "the task that was requeued has answered all"
id=$(submit)
within 120 gone "$id"
result $? "submitted again, it ends"
joined "submitted again"
cd "$root" || exit 1
finish
