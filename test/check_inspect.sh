#!/bin/sh
# --inspect: counts made here from the shapes, JSON and its text, and files that
# are damaged; and what scripts/gguf.py shows of a tensor.
#     RUN=./run test/check_inspect.sh
. test/lib.sh

m=test/tiny.gguf
always=--inspect
shared=${LFM2_SHARED:-../shared}/golden

# ------------------------------------------------------- counts from the shapes

# role NAME PARAMETERS ACTIVE: what the JSON says of it.
role() {
    holds "$what: $1 has $2 parameters, $3 active" grep -qE -- \
        "\"$1\": \{\"n_tensors\": [0-9]+, \"parameters\": $2, \"active\": $3," \
        "$dir/out"
}

# counts FILE D VOCAB FF CONV ATTN Q KV DENSE MOE EXPERTS USED FF_EXPERT: width,
# layers of each kind, sizes of q and k, and of experts.
counts() {
    file=$1 d=$2 v=$3 ff=$4 conv=$5 attn=$6 q=$7 kv=$8
    shift 8
    dense=$1 moe=$2 n=$3 used=$4 ffe=$5
    expect 0 "$file" --json "$file"
    role embedding $((v * d)) $((v * d))
    p=$((conv * (4 * d * d + 3 * d)))
    role conv $p $p
    all=$((v * d + p))
    p=$((attn * (2 * d * q + 2 * d * kv)))
    role attention $p $p
    all=$((all + p))
    p=$((dense * 3 * d * ff))
    role dense_ffn $p $p
    all=$((all + p)) active=$all
    if [ "$moe" -gt 0 ]; then
        p=$((moe * (d * n + n)))
        role router $p $p
        e=$((moe * 3 * d * ffe))
        role experts $((e * n)) $((e * used))
        all=$((all + p + e * n)) active=$((active + p + e * used))
    fi
    p=$(((2 * (conv + attn) + 1) * d + attn * 2 * 64))
    role norms $p $p
    role weights $((all + p)) $((active + p))
    json_has kv_bytes_per_token $((attn * 2 * kv * 2))
    json_has conv_state_bytes $((conv * 2 * d * 4))
}

counts $m 256 2048 512 4 2 256 128 2 4 8 2 256
json_has layer_map '"ccAcAc"'
json_has ffn_map '"ddeeee"'
json_has last_norm '"token_embd_norm.weight"'
json_has tied true
json_has n_tensors 64
json_has tensors_read 64
json_has bytes 5768000
json_has largest_context 2048
holds "nothing is odd" grep -qF '"anomalies": []' "$dir/out"
holds "it is one line" [ "$(wc -l <"$dir/out")" -eq 1 ]
for model in dense-Q4_0 dense-Q4_K_M dense-F16; do
    [ ! -e "$shared/$model.gguf" ] ||
        counts "$shared/$model.gguf" 256 512 512 3 2 256 128 5 0 0 0 0
done
for model in moe-Q4_0 moe-Q4_K_M; do
    [ ! -e "$shared/$model.gguf" ] ||
        counts "$shared/$model.gguf" 256 512 512 4 2 256 64 2 4 8 2 256
done
[ -e "$shared/moe-Q4_0.gguf" ] || echo \
    "skipped: models of other shapes, which do not come with the source"

# Bytes from the list of tensors, by the bits of each type; a token reads a
# quarter of the experts.
expect 0 "the list of tensors" -v $m
awk '
BEGIN {
    n = split("F32 32 F16 16 Q4_0 4.5 Q4_1 5 Q5_0 5.5 Q5_1 6 Q8_0 8.5 " \
              "Q4_K 4.5 Q5_K 5.5 Q6_K 6.5625 IQ4_NL 4.5 IQ4_XS 4.25", a, " ")
    for (i = 1; i < n; i += 2)
        bits[a[i]] = a[i + 1]
}
/^tensors/ { on = 1; next }
on && $1 != "name" {
    b = bits[$2] / 8
    for (i = 3; i < NF - 2; i++)
        b *= $i
    all += b
    read += $1 ~ /_exps/ ? b / 4 : b
}
END { printf "%d %d\n", all, read }' "$dir/out" >"$dir/sum"
read -r all read <"$dir/sum"
expect 0 "the sum" --json $m
json_has bytes "$all"
json_has bytes_per_token "$read"
expect 0 "other contexts" --json -c 100 --kv f32 $m
json_has kv_bytes_per_token 2048
json_has context 100
json_has context 2048
json_has assumed_gb_per_s 50

# ------------------------------------------------------------------------- text

expect 0 "in text" $m
for line in "name          LFM2-Tiny-MoE" "layer_map     ccAcAc" \
    "ffn_map       ddeeee" "  parameters       9.06 M" "  n_expert        8" \
    "  bytes_per_token  2.96 MB" "  bits_per_weight  5.03" "last_norm     " \
    "  experts           12      6.29 M    1.57 M    3.66 MB        914.43 KB" \
    "4.65  Q4_K 10, Q6_K 1, IQ4_XS 1" "  kv_bytes_per_token  1.02 KB" \
    "       2048   2.10 MB" "  bos      1  <|startoftext|>" \
    "  name   lfm2" "  by     hash" "  temperature     0.3"; do
    out_has "$line"
done
holds "nothing is odd" sh -c "! grep -E '^(tolerated|fatal)' $dir/out"
holds "and there are no messages" [ ! -s "$dir/err" ]
holds "nothing stands at the end of a line" sh -c "! grep -q ' $' $dir/out"
expect 0 "with all it has" -v $m
out_has "  blk.0.ffn_down.weight            Q6_K    512, 256"
out_has "  lfm2moe.block_count                       6"

# ------------------------------------------------------------------- gguf.py

for python in python3 /usr/bin/python3; do
    "$python" -c 'import numpy' 2>/dev/null && break
    python=
done
if [ "$python" ]; then
    gguf() {
        what="gguf.py $*"
        "$python" scripts/gguf.py $m "$@" >"$dir/out" 2>"$dir/err"
        status=$?
    }
    name=blk.3.ffn_gate_inp.weight
    gguf --tensor $name --rows 2-5
    out_has "$name: F32, 256 x 8, 8192 bytes, sha256 af929fc3ab18433a"
    out_has "min -0.299587429, max 0.294693053, mean -0.00462498135, rms 0.0951"
    out_has "       2   -0.06334  -0.04004  -0.05643    0.1114"
    holds "four rows" [ "$(grep -c '^ ' "$dir/out")" -eq 4 ]
    gguf --tensor token_embd.weight
    holds "eight rows unless asked" [ "$(grep -c '^ ' "$dir/out")" -eq 8 ]
    gguf --tensor $name --rows 3-
    holds "five to the end" [ "$(grep -c '^ ' "$dir/out")" -eq 5 ]
    for rows in 8 2-8 5-4 x 1-2-3 ''; do
        gguf --tensor $name "--rows=$rows"
        says "of the rows from 0 to 7"
    done
    gguf --tensor blk.2.atn_q.weight
    says "the nearest are blk.2.attn_q.weight"
else
    echo "skipped: gguf.py, which needs python3 with numpy"
fi

# ------------------------------------------------------------------------- JSON

odd="$dir/a \"b\" \\ c.gguf"
cp $m "$odd"
expect 0 "all of it" --json -v "$odd"
cp "$dir/out" "$dir/json"
if command -v python3 >/dev/null; then
    holds "and what Python makes of it" python3 - "$dir/json" "$odd" <<'END'
import json, sys
r = json.load(open(sys.argv[1]))
data = open(sys.argv[2], "rb").read()
assert r["opens"] is True and r["file"]["path"] == sys.argv[2]
assert r["file"]["bytes"] == len(data)
assert len(r["tensors"]) == r["file"]["n_tensors"] == 64
assert len(r["metadata"]) == r["file"]["n_keys"]
roles = r["roles"].values()
for key in ("n_tensors", "parameters", "active", "bytes", "bytes_per_token"):
    assert sum(x[key] for x in roles) == r["weights"][key], key
assert sum(r["weights"]["types"].values()) == 64
assert sum(t["bytes"] for t in r["tensors"]) == r["weights"]["bytes"]
special = {(x["role"], x["piece"]): x["id"] for x in r["vocabulary"]["special"]}
assert special["bos", "<|startoftext|>"] == 1
assert special["end", "<|im_end|>"] == 7
assert r["template"]["by"] == "hash" and len(r["template"]["hash"]) == 16
assert r["preset"]["temperature"] == 0.3 and r["preset"]["from_file"] is False
assert r["memory"]["contexts"][0]["context"] == 0
assert r["memory"]["free_bytes"] is None or r["memory"]["free_bytes"] > 0
END
else
    echo "skipped: Python's view of the JSON, there is no python3"
fi

# ---------------------------------------------------------------- what is wrong

for option in --sha256 "--tensor x" "--rows 1" "--bandwidth 5"; do
    # shellcheck disable=SC2086
    refuses 2 "unknown option" $option $m
done

# patch KEY SKIP BYTES: bytes (for printf) behind a key of the metadata.
patch() {
    cp $m "$dir/odd.gguf"
    at=$(LC_ALL=C grep -abo "$1" $m | head -1 | cut -d : -f 1)
    printf "$3" | dd of="$dir/odd.gguf" bs=1 seek=$((at + ${#1} + $2)) \
        conv=notrunc 2>/dev/null
}

patch lfm2moe.feed_forward_length 4 '\0\060\0\0'
expect 0 "a width that is wrong" "$dir/odd.gguf"
out_has "tolerated: lfm2moe.feed_forward_length: u32 12288, but blk.0.ffn_gate"
out_has "  n_ff            512"
expect 0 "a width that is wrong" --json "$dir/odd.gguf"
json_has level '"tolerated", "message": "lfm2moe.feed_forward_length: u32 12288,'
patch tokenizer.ggml.pre 12 'qwen'
expect 0 "another pre-tokenizer" "$dir/odd.gguf"
out_has 'tolerated: tokenizer.ggml.pre: "qwen", expected "lfm2"; treated as that'
patch tokenizer.chat_template 12 '  '
expect 0 "a blank in the template" "$dir/odd.gguf"
out_has "  by     model"
out_has "tolerated: tokenizer.chat_template: not a known one, treated as lfm2"
patch tokenizer.chat_template 12 '<|tool_list_start|>'
expect 0 "an edited template" "$dir/odd.gguf"
out_has "  words  <|tool_list_start|>"
out_has "tolerated: tokenizer.chat_template: "
# shellcheck disable=SC2016
patch general.name 12 '\033[31m\302\233\377'
expect 0 "a name that would steer the terminal" "$dir/odd.gguf"
holds "does not" sh -c "! LC_ALL=C grep -q '[[:cntrl:]]' $dir/out"
expect 0 "nor does it in JSON" --json "$dir/odd.gguf"
json_has name '"\u001b[31m'

patch lfm2moe.embedding_length 4 '\0\0\0\0'
expect 4 "a width of 0" "$dir/odd.gguf"
out_has "fatal: lfm2moe.embedding_length: 0, expected 1 to 1048576"
out_has "architecture  lfm2moe"
out_has "  keys_read     34"
out_has "  tensors_read  64"
holds "the sentence is in the report alone" [ ! -s "$dir/err" ]
expect 4 "a width of 0" --json -v "$dir/odd.gguf"
json_has opens false
json_has level '"fatal", "message": "lfm2moe.embedding_length: 0'
json_has lfm2moe.block_count '"6"'
patch general.architecture 12 'llama3x'
expect 4 "another architecture" "$dir/odd.gguf"
out_has "architecture  llama3x"
out_has "fatal: general.architecture: llama3x, expected lfm2 or lfm2moe"
patch tokenizer.ggml.model 12 'bert'
expect 4 "another tokenizer" "$dir/odd.gguf"
out_has "layer_map     ccAcAc"
out_has 'fatal: tokenizer.ggml.model: "bert"'
expect 0 "with a vocabulary from elsewhere" --tokenizer $m "$dir/odd.gguf"
out_has "  bos      1  <|startoftext|>"

for n in 4 23 24 100 20000 80000 5767999; do
    head -c $n $m >"$dir/cut.gguf"
    expect 4 "cut to $n bytes" "$dir/cut.gguf"
    out_has "fatal: "
    expect 4 "cut to $n bytes" --json "$dir/cut.gguf"
    json_has opens false
done
out_has '"tensors_read": 64'
: >"$dir/empty"
"$run" --inspect "$dir/empty" >"$dir/out" 2>"$dir/err"
status=$?
holds "an empty file is refused" [ $status -eq 4 ]
for path in "$dir/none" "$dir"; do
    expect 3 "no file" "$path"
    holds "there is no report on it" [ ! -s "$dir/out" ]
done
finish
