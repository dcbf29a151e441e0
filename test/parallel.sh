#!/bin/sh
# --batch with GNU parallel, and scripts/batch_hosts.sh on this machine and over
# ssh: the answers are those of one process, also after some parts failed.  Not
# part of make check: run it as root on Debian, where it installs GNU parallel,
# ssh and rsync if they are missing.
#     RUN=./run test/parallel.sh
. test/lib.sh

[ "$(id -u)" = 0 ] || skip "sshd, which needs root"
for name in parallel sshd ssh rsync; do
    command -v $name >/dev/null && continue
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        parallel openssh-server openssh-client rsync >"$dir/said" 2>&1 ||
        skip "$name, which apt cannot install"
done

m=$PWD/test/tiny.gguf hosts=$PWD/scripts/batch_hosts.sh
case $run in /*) ;; *) run=$PWD/$run ;; esac
options="-n 30 --temp 0.5"
cd "$dir" || exit 1
awk 'BEGIN {
    for (i = 1; i <= 60; i++)
        printf "{\"custom_id\":\"q%d\",\"method\":\"POST\",\"url\":" \
            "\"/v1/chat/completions\",\"body\":{\"messages\":[{\"role\":" \
            "\"user\",\"content\":\"Tell story number %d.\"}]}}\n", i, i
}' >in.jsonl

# A program that fails for the part with q17 while the file "down" is there.
cat >flaky <<END
#!/bin/sh
cat >"$dir/lines.\$\$"
if [ -e "$dir/down" ] && grep -q '"q17"' "$dir/lines.\$\$"; then
    exit 3
fi
echo part >>"$dir/calls"
exec "$run" "\$@" <"$dir/lines.\$\$"
END
chmod +x flaky

# as_one WHAT FILE: it has the answers of one process, in the order of in.jsonl,
# but for the ids, which tell the line of a part.
as_one() {
    no_ids "$2" >"$dir/answers"
    same "$1: the answers of one process" one "$dir/answers"
}

no_ids() {
    sed 's/"\(request_\)\{0,1\}id": "[^"]*"//g' "$1"
}

# ends STATUS WHAT COMMAND...
ends() {
    want=$1 what=$2
    shift 2
    limited "$@" >"$dir/said" 2>"$dir/err"
    status=$?
    [ $status -eq "$want" ]
    result $? "$what: status $status, expected $want"
}

# shellcheck disable=SC2086
"$run" "$m" --batch $options <in.jsonl 2>"$dir/err" | no_ids - >one
holds "one process answers all" [ "$(wc -l <one)" -eq 60 ]

parallel --will-cite -j 4 --pipepart -a in.jsonl --block -1 -k \
    "$run $m --batch $options -t 1" >piped 2>"$dir/err"
result $? "--pipepart"
as_one "--pipepart" piped
split -n l/6 -d in.jsonl part.
: >down
ends 1 "a part fails" parallel --will-cite -j 4 --joblog log --resume-failed \
    "./flaky $m --batch $options -t 1 <{} >{}.out" ::: part.??
rm down
ends 0 "--resume-failed" parallel --will-cite -j 4 --joblog log \
    --resume-failed "./flaky $m --batch $options -t 1 <{} >{}.out" ::: part.??
holds "repeats only that part" [ "$(wc -l <calls)" -eq 6 ]
cat part.??.out >joined
as_one "--joblog and --resume-failed" joined

# ------------------------------------------------------------------- the script

export RUN="$run"
# shellcheck disable=SC2086
ends 0 "the script" "$hosts" -j 4 -n 7 "$m" in.jsonl out $options -t 1
as_one "the script" out
holds "leaves nothing else" [ ! -e out.parts ]
rm out calls
: >down
export RUN="$dir/flaky"
# shellcheck disable=SC2086
ends 1 "with a part that fails" "$hosts" -j 4 -n 7 "$m" in.jsonl out $options
holds "there is no result" [ ! -e out ]
ends 3 "nothing is overwritten" "$hosts" -j 4 -n 7 "$m" in.jsonl out
rm down
sed 1d in.jsonl >other.jsonl
ends 3 "-r with another file" "$hosts" -r "$m" other.jsonl out
# shellcheck disable=SC2086
ends 0 "-r" "$hosts" -r "$m" in.jsonl out $options
as_one "-r" out
holds "repeats only the part that failed" [ "$(wc -l <calls)" -eq 7 ]
rm out
echo '{"prompt":"hello"}' >bare.jsonl
ends 3 "no custom_id" "$hosts" "$m" bare.jsonl out
holds "is told, by its line" grep -q 'line 1 has no custom_id' "$dir/err"
{ cat in.jsonl; echo '{"custom_id":"x"'; } >bad.jsonl
export RUN="$run"
# shellcheck disable=SC2086
ends 7 "a line that cannot be answered" "$hosts" "$m" bad.jsonl out $options
head -n 60 out >most
as_one "the others are" most
ends 2 "no files" "$hosts" "$m"
ends 2 "-n x" "$hosts" -n x "$m" in.jsonl out

# --------------------------------------------------------------------- over ssh

mkdir -p /run/sshd
ssh-keygen -q -t ed25519 -N '' -f "$dir/key"
ssh-keygen -q -t ed25519 -N '' -f "$dir/host"
"$(command -v sshd)" -D -e -p 16822 -h "$dir/host" -f /dev/null \
    -o ListenAddress=127.0.0.1 -o AuthorizedKeysFile="$dir/key.pub" \
    -o StrictModes=no -o PidFile=none >"$dir/sshd.log" 2>&1 &
sshd=$!
trap 'kill $sshd; rm -rf "$dir"' EXIT
ssh="ssh -p 16822 -i $dir/key -o StrictHostKeyChecking=no \
-o ConnectTimeout=5 \
-o UserKnownHostsFile=$dir/known 127.0.0.1"
# shellcheck disable=SC2086
within 30 $ssh true
rm out
# shellcheck disable=SC2086
ends 0 "over ssh, and here" "$hosts" -S "$ssh,:" -n 7 "$m" in.jsonl out $options
as_one "over ssh" out
echo "$ssh" >names
# shellcheck disable=SC2086
ends 0 "hosts in a file" "$hosts" -F names -n 3 "$m" in.jsonl "$dir/out" \
    $options
as_one "hosts in a file" out
finish
