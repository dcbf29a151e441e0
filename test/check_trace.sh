#!/bin/sh
# --trace and what scripts make of it, and that three planted errors are found
# where they are.
#     RUN=./run test/check_trace.sh
. test/lib.sh

prompt='What is a short convolution?'
export LC_ALL=C

# look NAME ARGUMENTS...: the trace of the prompt, which has 7 tokens.
look() {
    name=$1
    shift
    expect 0 "$name" -t 1 $m --raw --bos -n 0 "$prompt" \
        --trace "$dir/$name.jsonl" "$@"
}

names() {
    sed -n 's/^{"name":"\([^"]*\)".*/\1/p' "$dir/$1.jsonl"
}

# field NAME TRACE: of the first record.
field() {
    sed -n "2s/.*\"$1\":\"\\{0,1\\}\\([^,\"]*\\).*/\\1/p" "$dir/$2.jsonl"
}

# --------------------------------------------------------------------- --trace

look plain
n=$("$run" $m --tokenize --bos "$prompt" | wc -w)
n=$((n))
head -1 "$dir/plain.jsonl" >"$dir/head"
model='"arch":"lfm2moe","model_hash":"[0-9a-f]{16}","n_layer":6,"n_embd":256,'
model=$model'"n_vocab":2048,"kv":"f16"'
holds "the first line tells of the model" grep -qxE \
    "\{\"trace\":1,\"program\":\"lfm2.c [0-9.]*\",$model\}" "$dir/head"
number='(-?[0-9][0-9.e+-]*|"-?inf"|"nan")'
four="\\[$number(,$number){0,3}\\]"
form='"name":"[a-zA-Z0-9._]*","pos":[0-9]*(,"token":[0-9]*)?,'
form=$form"\"shape\":\\[[0-9]*\\],\"first\":$four,\"last\":$four,"
for key in min max mean l2; do
    form="$form\"$key\":$number,"
done
form="\{$form\"hash\":\"[0-9a-f]{16}\"\}"
grep -cxE "$form" "$dir/plain.jsonl" >"$dir/count"
holds "all others have one form" \
    [ "$(cat "$dir/count")" = $(($(wc -l <"$dir/plain.jsonl") - 1)) ]
sed -n 's/.*"token":\([0-9]*\).*/\1/p' "$dir/plain.jsonl" | tr '\n' ' ' \
    >"$dir/ids"
"$run" $m --tokenize --bos "$prompt" | sed 's/$/ /' | tr -d '\n' >"$dir/list"
same "and the tokens" "$dir/ids" "$dir/list"
# Of every token: 4 convolutions and 2 attentions, 2 dense networks and 4 with
# experts; the last token has logits.
holds "a record for each module and position" [ "$(names plain | wc -l)" -eq \
    $((n * (1 + 4 * 3 + 2 * 6 + 6 * 3 + 2 * 3 + 4 * 10) + 2)) ]
look one -b 1
look three -b 3 -t 3
look scalar --isa scalar -b 5
for cut in one three scalar; do
    for trace in plain $cut; do
        sort "$dir/$trace.jsonl" >"$dir/$trace.sorted"
    done
    same "$cut: the same records" "$dir/plain.sorted" "$dir/$cut.sorted"
done

look filter --trace-filter '*.conv.conv' --trace-filter 'lm_h?ad'
names filter | sort -u >"$dir/names"
holds "only these names" [ "$(tr '\n' ' ' <"$dir/names")" = "lm_head \
model.layers.0.conv.conv model.layers.1.conv.conv model.layers.3.conv.conv \
model.layers.5.conv.conv " ]
holds "nothing else is other" sh -c "tail -n +2 '$dir/filter.jsonl' | sort |
    comm -23 - '$dir/plain.sorted' | wc -l | grep -qx ' *0'"
expect 0 "a name that no module has" -n 0 --trace "$dir/none.jsonl" \
    --trace-filter 'layers.*' $m x
holds "is told" grep -q "no module has this name" "$dir/err"
# positions RANGE WANTED
positions() {
    look range --trace-filter model.embed_tokens --trace-tokens "$1"
    sed -n 's/.*"pos":\([0-9]*\).*/\1/p' "$dir/range.jsonl" | tr '\n' ' ' \
        >"$dir/positions"
    holds "--trace-tokens $1" [ "$(cat "$dir/positions")" = "$2 " ]
}
positions 2-3 "2 3"
positions 4 4
positions $((n - 2))- "$((n - 2)) $((n - 1))"
positions $((n - 1))-2147483647 $((n - 1))

look raw --trace-raw "$dir/raw.f32"
sed 's/,"offset":[0-9]*//' "$dir/raw.jsonl" >"$dir/without"
same "the same records, with an offset" "$dir/without" "$dir/plain.jsonl"
cp "$dir/raw.f32" "$dir/before"
look raw --trace-raw "$dir/raw.f32"
same "files that were there are replaced" "$dir/raw.f32" "$dir/before"

expect 0 "--logits" --ids test/tiny.ids --logits "$dir/logits" $m
cp "$dir/logits" "$dir/without"
expect 0 "--logits" --ids test/tiny.ids --logits "$dir/logits" $m \
    --trace "$dir/logits.jsonl" --trace-filter lm_head \
    --trace-raw "$dir/logits.f32"
same "logits do not change" "$dir/logits" "$dir/without"
same "and are what is traced" "$dir/logits" "$dir/logits.f32"
holds "all of them" [ "$(names logits | wc -l)" -eq \
    $(($(wc -c <test/tiny.ids) / 4)) ]
expect 0 "an answer" -t 1 $m --temp 0 -n 12 "$prompt"
cp "$dir/out" "$dir/answer"
expect 0 "an answer" -t 1 $m --temp 0 -n 12 "$prompt" \
    --trace "$dir/answer.jsonl" --trace-filter model.embed_tokens
same "is the same" "$dir/out" "$dir/answer"
n_prompt=$("$run" $m --dump-tokens "$prompt" | wc -w)
holds "each of its tokens is traced" [ "$(names answer | wc -l)" -eq \
    $((n_prompt + 11)) ]
printf 'hello\nand again\n' | "$run" -t 1 -q $m --temp 0 -n 4 -cnv \
    --trace "$dir/chat.jsonl" --trace-filter model.embed_tokens \
    >"$dir/out" 2>"$dir/err"
holds "a chat is one text" [ "$(sed -n 's/.*"pos":\([0-9]*\).*/\1/p' \
    "$dir/chat.jsonl" | sort -nu | tail -1)" -eq \
    $(($(sed -n 's/.*"pos":\([0-9]*\).*/\1/p' "$dir/chat.jsonl" | sort -nu |
        wc -l) - 1)) ]

# Whatever ends the program, lines are whole, and their numbers are there.  Only
# the kernel may cut the last write of a process that is killed.
"$run" -t 1 $m --raw --bos -n 100000 -c 0 --ignore-eos "$prompt" \
    --trace "$dir/killed.jsonl" --trace-raw "$dir/killed.f32" >"$dir/out" \
    2>"$dir/err" &
pid=$!
within 20 [ -s "$dir/killed.f32" ]
kill -KILL $pid
wait $pid 2>/dev/null
sed '$d' "$dir/killed.jsonl" >"$dir/whole"
holds "killed at any time: lines are whole" \
    [ "$(grep -cE '^\{.*\}$' "$dir/whole")" = "$(wc -l <"$dir/whole")" ]
last=$(tail -1 "$dir/whole")
n_last=${last#*shape\":[} at=${last#*offset\":}
holds "and its numbers are there" [ "$(wc -c <"$dir/killed.f32")" -ge \
    $((${at%\}} + 4 * ${n_last%%]*})) ]

# -------------------------------------------------------------------- refusals

for option in "--trace-raw F" "--trace-filter x" "--trace-tokens 1"; do
    refuses 2 "needs --trace" $option $m x
done
for range in "" - 3-2 -1 1-2-3 x 1-x " 1" 99999999999; do
    refuses 2 "expected positions like" --trace "$dir/t" \
        --trace-tokens="$range" $m x
done
for mode in --tokenize --inspect --bench --batch --dump-prompt "--ppl x"; do
    refuses 2 "--trace means nothing with" --trace "$dir/t" $mode $m
done
refuses 2 "--trace -: expected a file" --trace - $m x
refuses 3 "/there: No such file" --trace "$dir/not/there" $m x
refuses 3 "/there: No such file" --trace "$dir/t" --trace-raw "$dir/not/there" \
    $m x
if [ -c /dev/full ]; then
    refuses 3 "/dev/full: No space left" --trace /dev/full $m x
    holds "which ends the work at once" [ ! -s "$dir/out" ]
    refuses 3 "/dev/full: No space left" --trace /dev/full -n 0 \
        --trace-filter lm_head $m x
    refuses 3 "/dev/full: No space left" --trace "$dir/t" \
        --trace-raw /dev/full -n 0 $m x
else
    echo "skipped: full disks, which need /dev/full"
fi

# ---------------------------------------------------------- what records tell

needs_python json "the numbers in records"
cat >"$dir/check.py" <<'END'
import array, json, math, sys

names, wrong = set(), 0

def same(a, b):
    return abs(a - b) <= 1e-8 * max(abs(a), abs(b), 1e-3)

raw = open(sys.argv[2], "rb")
for line in list(open(sys.argv[1]))[1:]:
    r = json.loads(line)
    n = r["shape"][0]
    names.add(r["name"])
    wrong += raw.tell() != r["offset"]
    x, h = raw.read(4 * n), 0xcbf29ce484222325
    for i in range(0, len(x), 4):
        h = (h ^ int.from_bytes(x[i:i + 4], "little")) * 0x100000001b3 % 2 ** 64
    wrong += "%016x" % h != r["hash"]
    x = array.array("f", x)
    if sys.byteorder == "big":
        x.byteswap()
    for key, is_ in (("min", min(x)), ("max", max(x)), ("mean", sum(x) / n),
                     ("l2", math.sqrt(sum(v * v for v in x)))):
        wrong += not same(r[key], is_)
    wrong += len(x) != n
    wrong += array.array("f", r["first"] + r["last"]) != x[:4] + x[-4:]
sys.exit(wrong or raw.read(1) != b"" or len(names) < 50)
END
holds "are those of the vector" "$python" "$dir/check.py" "$dir/raw.jsonl" \
    "$dir/raw.f32"

# ------------------------------------------------------------- scripts/trace.py

# make STATUS KIND ARGUMENT...: of the trace in $made.
make() {
    want=$1 what="trace.py $2"
    kind=$2
    shift 2
    "$python" scripts/trace.py "$kind" "$dir/$made.jsonl" "$dir/raw.f32" "$@" \
        >"$dir/out" 2>"$dir/err"
    status=$?
    [ $status -eq "$want" ]
    result $? "$what: status $status, expected $want"
}

made=raw
make 0 npy -o "$dir/npy"
holds "a file for each name" [ "$(ls "$dir/npy" | wc -l)" -eq \
    "$(names raw | sort -u | wc -l)" ]
array=$dir/npy/model.layers.1.conv.in_proj.npy
head -c 128 "$array" | tail -c +11 >"$dir/head"
about="{'descr': '<f4', 'fortran_order': False, 'shape': ($n, 768), }"
printf '%-117s\n' "$about" >"$dir/about"
same "the head says how many" "$dir/head" "$dir/about"
holds "and so many follow" [ "$(tail -c +129 "$array" | wc -c)" -eq \
    $((n * 768 * 4)) ]
model=
"$python" -c 'import numpy' 2>/dev/null && model="--model $m"
# shellcheck disable=SC2086
make 0 experts -o "$dir/experts.csv" $model
holds "the columns" [ "$(head -1 "$dir/experts.csv")" = \
    position,token,layer,rank,expert,score,bias,weight ]
holds "two of eight experts in four layers" [ "$(wc -l <"$dir/experts.csv")" \
    -eq $((n * 4 * 2 + 1)) ]
cat >"$dir/sums.awk" <<'END'
NR > 1 {
    key = $1 * 10 + $3
    if (key < last || ($4 != 0 && $4 != 1) || $5 < 0 || $5 > 7 ||
        $6 <= 0 || $6 >= 1)
        exit 1
    by = $6 + $7
    if ($4 == 1 && ((by > first && $7 != "") || sum + $8 < 0.9999 ||
                    sum + $8 > 1.0001 ||
                    $6 * sum / ($8 * score) < 0.9999 ||
                    $6 * sum / ($8 * score) > 1.0001))
        exit 1
    last = key
    first = by
    sum = $8
    score = $6
}
END
holds "weights are shares of the scores, chosen by score and bias" \
    awk -F, -f "$dir/sums.awk" "$dir/experts.csv"
make 0 summary
holds "has a line for each layer" [ "$(grep -cE \
    '^ *[2-5]  \|[ .:+*#-]{8}\|  +[0-3]\.[0-9]{2}  +[0-7]  +[0-9]+%$' \
    "$dir/out")" = 4 ]
awk -F, '$3 == 2 { print $5 }' "$dir/experts.csv" | sort | uniq -c |
    awk -v all=$((n * 2)) '{ p = $1 / all; h -= p * log(p) / log(2) }
                           END { printf "%.2f", h }' >"$dir/entropy"
holds "its entropy" grep -qE "^ *2  .*\|  +$(cat "$dir/entropy")  " "$dir/out"
awk -F, '$3 == 2 { hit += ($5 in was) && was[$5] == $1; was[$5] = $1 + 1 }
         END { printf "%.0f%%", 100 * hit / '$((n * 2 - 2))' }' \
    "$dir/experts.csv" >"$dir/again"
holds "and how many were chosen again" \
    grep -qE "^ *2  .* $(cat "$dir/again")\$" "$dir/out"
made=plain
make 1 npy -o "$dir/npy"
says "no record with an offset"
made=logits
make 1 summary
says "no record of a router"

# ------------------------------------------------- scripts/compare_trace.py
#
# Three errors that are easily made, each in a program of its own, and the
# module that the comparison must name.

# compare STATUS A B: two traces.
compare() {
    "$python" scripts/compare_trace.py "$dir/$2.jsonl" "$dir/$3.jsonl" \
        >"$dir/compared" 2>"$dir/err"
    status=$?
    [ $status -eq "$1" ]
    result $? "$2 and $3: status $status, expected $1"
}

# plant NAME SED LINES: $dir/NAME is a program with that error in so many lines.
plant() {
    sed "$2" lfm2.c >"$dir/lfm2.c"
    [ "$(diff lfm2.c "$dir/lfm2.c" | grep -c '^>')" = "$3" ]
    result $? "$1: $3 lines of lfm2.c were to be changed"
    ${CC:-cc} -O1 -std=c11 -ffp-contract=off -DLFM2_NO_SIMD -pthread -I. \
        -o "$dir/$1" "$dir/run.o" "$dir/lfm2.c" -lm 2>"$dir/err"
    result $? "$1: to be compiled"
}

# finds NAME MODULE GOOD ARGUMENTS...: the first that differs from trace GOOD.
finds() {
    name=$1 module=$2 good=$3
    shift 3
    "$dir/$name" -t 1 -n 0 "$@" --trace "$dir/$name.jsonl" >"$dir/out" \
        2>"$dir/err"
    result $? "$name: a trace"
    compare 1 "$good" "$name"
    cp "$dir/compared" "$dir/said"
    grep -qE "first that differs: ($module) at position" "$dir/compared"
    result $? "$name: expected $module"
}

compare 0 plain three
${CC:-cc} -O0 -std=c11 -I. -c -o "$dir/run.o" run.c 2>"$dir/err"
result $? "run.c: to be compiled"
plant taps \
    's/v = w\[i\] \* u\[0\]\[i\];/v = w[last * n + i] * u[0][i];/
     s/v = fma_f32(w\[k \* n + i\], u/v = fma_f32(w[(last - k) * n + i], u/' 2
plant softmax 's/^ *score\[e\] = sigmoid(score\[e\]);/'"\
        score[e] = exp_f32(score[e]), sum += score[e]; \
    for (int e = 0; e < c->n_expert; e++) score[e] \/= sum; sum = 0;/" 1
plant q_norm '/rms_norm(ctx->isa, q, q, l->attn_q_norm/s/rms_norm/(void)/' 1
set -- $m --raw --bos "$prompt"
finds taps model.layers.0.conv.conv plain "$@"
finds softmax 'model.layers.2.feed_forward.(selected_experts|routing_weights)' \
    plain "$@"
finds q_norm model.layers.2.self_attn.q_layernorm plain "$@"

golden=${LFM2_SHARED:-../shared}/golden
if [ ! -f "$golden/small_dense-F32.gguf" ]; then
    echo "skipped: traces of other models, which do not come with the source"
    finish
fi
set -- "$golden/small_dense-F32.gguf" --ids "$golden/tokens.i32"
expect 0 "a dense model" -t 1 -n 0 "$@" --trace "$dir/dense.jsonl"
finds taps model.layers.0.conv.conv dense "$@"
finds q_norm model.layers.1.self_attn.q_layernorm dense "$@"
set -- "$golden/small_moe-F32.gguf" --ids "$golden/tokens.i32"
expect 0 "experts" -t 1 -n 0 "$@" --trace "$dir/moe.jsonl"
finds softmax 'model.layers.2.feed_forward.(selected_experts|routing_weights)' \
    moe "$@"
finish
