#!/bin/sh
# --inspect: counts made here from the shapes, digests by sha256sum, values by
# od, JSON, and files that are damaged.
#     RUN=./run test/check_inspect.sh
. test/lib.sh

m=test/tiny.gguf
always=--inspect
shared=${LFM2_SHARED:-../shared}/golden

# says TEXT: a line of the output has it.
says() {
    holds "$what: \"$1\"" grep -qF -- "$1" "$dir/out"
}

# has KEY VALUE: so the JSON says, in one place at least.
has() {
    holds "$what: $1 is $2" grep -qF -- "\"$1\": $2" "$dir/out"
}

# numbers WANT GOT: equal but for rounding, line by line.
numbers() {
    paste "$1" "$2" | awk '
        { n++ }
        NF != 2 { bad = 1 }
        { d = $1 - $2; s = ($1 < 0 ? -$1 : $1) + 1e-6 }
        d > s * 1e-5 || d < -s * 1e-5 { print; bad = 1 }
        END { exit bad || n == 0 }'
}

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
    has kv_bytes_per_token $((attn * 2 * kv * 2))
    has conv_state_bytes $((conv * 2 * d * 4))
}

counts $m 256 2048 512 4 2 256 128 2 4 8 2 256
has layer_map '"ccAcAc"'
has ffn_map '"ddeeee"'
has last_norm '"token_embd_norm.weight"'
has tied true
has n_tensors 64
has tensors_read 64
has bytes 5768000
has largest_context 2048
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
[ -e "$shared/moe-Q4_0.gguf" ] || echo "skipped: $shared is not there"

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
on {
    b = bits[$2] / 8
    for (i = 3; i <= NF; i += 2)
        b *= $i
    all += b
    read += $1 ~ /_exps/ ? b / 4 : b
}
END { printf "%d %d\n", all, read }' "$dir/out" >"$dir/sum"
read -r all read <"$dir/sum"
expect 0 "bandwidth" --json --bandwidth 40 $m
has bytes "$all"
has bytes_per_token "$read"
grep -o '"tokens_per_s": \[[^]]*' "$dir/out" | sed 's/.*\[//' >"$dir/got"
awk -v read="$read" 'BEGIN {
    print 40e9 / read
    print 40e9 / (read + 2048 * 1024) }' >"$dir/want"
holds "the speed is the bandwidth by the bytes" \
    numbers "$dir/want" "$dir/got"
expect 0 "other contexts" --json -c 100 --kv f32 $m
has kv_bytes_per_token 2048
has context 100
has context 2048
has gb_per_s "[20, 50, 100]"

# ------------------------------------------------------------------------- text

expect 0 "in text" $m
for line in "name          LFM2-Tiny-MoE" \
    "size          9.06 M parameters, 4.34 M active per token" \
    "layer map     ccAcAc" "  and FFN     ddeeee" \
    "experts       8 of n_ff 256, 2 used per token" \
    "last norm     token_embd_norm.weight" \
    "weights       5.70 MB, 5.03 bits per weight; a token reads 2.96 MB" \
    "experts         6.29 M     1.57 M     3.66 MB   4.65   914.43 KB  Q4_K, " \
    "1.02 KB a token; conv state 8.19 KB" \
    "2048             2.10 MB" "fits now      " \
    "vocabulary    2048 tokens, 1774 merges, type gpt2, pre lfm2" \
    "begins with   1 <|startoftext|>" \
    "ends with     2 <|endoftext|>, 7 <|im_end|>" "padding       0 <|pad|>" \
    "template      lfm2: a known one, by its hash" \
    "preset        LFM2, as its name says no other" \
    "temperature 0.3, min-p 0.15, repeat penalty 1.05"; do
    says "$line"
done
holds "nothing is odd" sh -c "! grep -E '^(tolerated|fatal)' $dir/out"
holds "and there are no messages" [ ! -s "$dir/err" ]
holds "nothing stands at the end of a line" sh -c "! grep -q ' $' $dir/out"

# ---------------------------------------------------------------------- digests

if command -v sha256sum >/dev/null; then
    sum=$(sha256sum <$m | cut -d ' ' -f 1)
    expect 0 "digests" --sha256 $m
    says "sha256        $sum"
    cp "$dir/out" "$dir/list"
    n=$(grep -c '^  [0-9a-f]\{64\}  [A-Z0-9_]*  *[0-9x ]*  [a-z0-9_.]*$' \
        "$dir/list")
    holds "of all 64 tensors" [ "$n" -eq 64 ]
    for name in token_embd.weight blk.0.attn_norm.weight \
        blk.5.ffn_down_exps.weight; do
        expect 0 "$name" --tensor $name $m
        place=$(sed -n 's/^place  *\([0-9]*\) bytes at offset /\1 /p' "$dir/out")
        sum=$(tail -c "+$((${place#* } + 1))" $m | head -c "${place% *}" |
            sha256sum | cut -d ' ' -f 1)
        says "sha256        $sum"
        holds "$name: the same in the list" grep -q "^  $sum .* $name\$" \
            "$dir/list"
    done
    printf 'short' >"$dir/short"
    sum=$(sha256sum <"$dir/short" | cut -d ' ' -f 1)
    expect 4 "a file that is no model" --sha256 --json "$dir/short"
    has sha256 "\"$sum\""
else
    echo "skipped: the digests, there is no sha256sum"
fi

# ----------------------------------------------------------------------- values

# F32 as od reads them.  The machine of od must have the file's byte order.
name=blk.3.ffn_gate_inp.weight
expect 0 "values" --tensor $name --rows 2-5 --json $m
at=$(sed 's/.*"offset": \([0-9]*\).*/\1/' "$dir/out")
od -An -v -tf4 -w4 -j "$at" -N 8192 $m 2>/dev/null >"$dir/all"
one=$(printf '\0\0\200\077' | od -An -tf4 | tr -d ' ')
if [ "$one" = 1 ] && [ -s "$dir/all" ]; then
    awk 'NR > 512 && NR <= 1536 && (NR - 1) % 256 < 8' "$dir/all" >"$dir/want"
    sed 's/.*"values": //' "$dir/out" | tr -d '[]}' | tr ',' '\n' |
        sed 's/ //' >"$dir/got"
    holds "rows 2 to 5" numbers "$dir/want" "$dir/got"
    awk '{ x = $1 + 0; s += x; q += x * x }
        NR == 1 || x < least { least = x }
        NR == 1 || x > most { most = x }
        END { print least; print most; print s / NR; print sqrt(q / NR) }' \
        "$dir/all" >"$dir/want"
    for key in min max mean rms; do
        sed "s/.*\"$key\": \([^,]*\),.*/\1/" "$dir/out"
    done >"$dir/got"
    holds "range, mean and root mean square" numbers "$dir/want" "$dir/got"
else
    echo "skipped: values, od cannot read floats of the file"
fi
has shape "[256, 8]"
has first_row 2
expect 0 "one row" --tensor $name --rows 7 $m
says "       7 "
holds "alone" [ "$(grep -c '^  *[0-9]' "$dir/out")" -eq 1 ]
expect 0 "to the end" --tensor $name --rows 3- $m
holds "five rows" [ "$(grep -c '^  *[0-9]' "$dir/out")" -eq 5 ]
expect 0 "a vector" --tensor blk.3.exp_probs_b.bias $m
holds "one row" [ "$(grep -c '^  *[0-9]' "$dir/out")" -eq 1 ]
for rows in 8 2-8 5-4 x -1 1-x 1-2-3 '' 99999999999999999999; do
    refuses 2 "of the rows from 0 to 7" --tensor $name --rows "$rows" $m
done
refuses 2 "the nearest are blk.2.attn_q.weight, blk.2.attn_k.weight and" \
    --tensor blk.2.atn_q.weight $m
refuses 2 "no such tensor" --tensor "" $m
refuses 2 "no such tensor" --tensor "$(printf '%0500d' 0)" $m
refuses 2 "--rows are those of --tensor" --rows 1 $m
refuses 2 "expected a number" --bandwidth 0 $m
for option in --sha256 "--tensor x" "--rows 1" "--bandwidth 5"; do
    # shellcheck disable=SC2086
    "$run" $option $m hello >"$dir/out" 2>"$dir/err"
    [ $? -eq 2 ] && grep -qF "is for --inspect" "$dir/err"
    result $? "$option is not for others"
done

# ------------------------------------------------------------------------- JSON

odd="$dir/a \"b\" \\ c.gguf"
cp $m "$odd"
expect 0 "all of it" --json -v --sha256 "$odd"
cp "$dir/out" "$dir/json"
# Our own reader finds no fault with how it is written.
"$run" --messages "$dir/json" $m >"$dir/out" 2>"$dir/err"
holds "good JSON" sh -c "! grep -q column $dir/err && grep -q . $dir/err"
if command -v python3 >/dev/null; then
    holds "and what Python makes of it" python3 - "$dir/json" "$odd" <<'END'
import hashlib, json, sys
r = json.load(open(sys.argv[1]))
data = open(sys.argv[2], "rb").read()
assert r["opens"] is True and r["file"]["path"] == sys.argv[2]
assert r["file"]["bytes"] == len(data)
assert r["file"]["sha256"] == hashlib.sha256(data).hexdigest()
assert len(r["tensors"]) == r["file"]["n_tensors"] == 64
for t in r["tensors"]:
    piece = data[t["offset"]:t["offset"] + t["bytes"]]
    assert t["sha256"] == hashlib.sha256(piece).hexdigest(), t["name"]
assert len(r["metadata"]) == r["file"]["n_keys"]
roles = r["roles"].values()
for key in ("n_tensors", "parameters", "active", "bytes", "bytes_per_token"):
    assert sum(x[key] for x in roles) == r["weights"][key], key
assert sum(r["weights"]["types"].values()) == 64
assert sum(t["bytes"] for t in r["tensors"]) == r["weights"]["bytes"]
special = {(x["role"], x["piece"]): x["id"] for x in r["vocabulary"]["special"]}
assert special["bos", "<|startoftext|>"] == 1
assert special["end", "<|im_end|>"] == 7
assert r["template"]["by"] == "hash" and len(r["template"]["sha256"]) == 64
assert r["preset"]["temperature"] == 0.3 and r["preset"]["from_file"] is False
assert r["memory"]["contexts"][0]["context"] == 0
assert r["memory"]["free_bytes"] is None or r["memory"]["free_bytes"] > 0
END
else
    echo "skipped: Python's view of the JSON, there is no python3"
fi

# ---------------------------------------------------------------- what is wrong

# patch KEY SKIP BYTES: bytes (for printf) behind a key of the metadata.
patch() {
    cp $m "$dir/odd.gguf"
    at=$(LC_ALL=C grep -abo "$1" $m | head -1 | cut -d : -f 1)
    printf "$3" | dd of="$dir/odd.gguf" bs=1 seek=$((at + ${#1} + $2)) \
        conv=notrunc 2>/dev/null
}

patch lfm2moe.feed_forward_length 4 '\0\060\0\0'
expect 0 "a width that is wrong" "$dir/odd.gguf"
says "tolerated: lfm2moe.feed_forward_length: u32 12288, but blk.0.ffn_gate"
says "dense FFN     n_ff 512"
expect 0 "a width that is wrong" --json "$dir/odd.gguf"
has level '"tolerated", "message": "lfm2moe.feed_forward_length: u32 12288,'
patch tokenizer.ggml.pre 12 'qwen'
expect 0 "another pre-tokenizer" "$dir/odd.gguf"
says 'tolerated: tokenizer.ggml.pre: "qwen", expected "lfm2", as which'
patch tokenizer.chat_template 12 '  '
expect 0 "a blank in the template" "$dir/odd.gguf"
says "template      lfm2: unknown; chosen by name and vocabulary"
says "tolerated: tokenizer.chat_template: none that is known, taken as lfm2"
patch tokenizer.chat_template 12 '<|tool_list_start|>'
expect 0 "an edited template" "$dir/odd.gguf"
says 'template      lfm2: unknown, but it has the words "<|tool_list_start|>"'
says "tolerated: tokenizer.chat_template: "
# shellcheck disable=SC2016
patch general.name 12 '\033[31m\302\233\377'
expect 0 "a name that would steer the terminal" "$dir/odd.gguf"
holds "does not" sh -c "! LC_ALL=C grep -q '[[:cntrl:]]' $dir/out"
expect 0 "nor does it in JSON" --json "$dir/odd.gguf"
has name '"\u001b[31m'

patch lfm2moe.embedding_length 4 '\0\0\0\0'
expect 4 "a width of 0" "$dir/odd.gguf"
says "fatal: lfm2moe.embedding_length: 0, expected 1 to 1048576"
says "architecture  lfm2moe"
says "readable      34 of 34 keys, 64 of 64 tensors"
holds "the sentence is in the report alone" [ ! -s "$dir/err" ]
expect 4 "a width of 0" --json -v "$dir/odd.gguf"
has opens false
has level '"fatal", "message": "lfm2moe.embedding_length: 0'
has lfm2moe.block_count '"6"'
expect 4 "a tensor of it" --tensor token_embd.weight "$dir/odd.gguf"
holds "the sentence is a message" grep -q "embedding_length: 0" "$dir/err"
patch general.architecture 12 'llama3x'
expect 4 "another architecture" "$dir/odd.gguf"
says "architecture  llama3x"
says "fatal: general.architecture: llama3x, expected lfm2 or lfm2moe"
patch tokenizer.ggml.model 12 'bert'
expect 4 "another tokenizer" "$dir/odd.gguf"
says "layer map     ccAcAc"
says "vocabulary    none"
says 'fatal: tokenizer.ggml.model: "bert"'
expect 0 "with a vocabulary from elsewhere" --tokenizer $m "$dir/odd.gguf"
says "begins with   1 <|startoftext|>"

for n in 4 23 24 100 20000 80000 5767999; do
    head -c $n $m >"$dir/cut.gguf"
    expect 4 "cut to $n bytes" "$dir/cut.gguf"
    says "fatal: "
    expect 4 "cut to $n bytes" --json "$dir/cut.gguf"
    has opens false
done
says '"tensors_read": 64'
: >"$dir/empty"
"$run" --inspect "$dir/empty" >"$dir/out" 2>"$dir/err"
status=$?
holds "an empty file is refused" [ $status -eq 4 ]
for path in "$dir/none" "$dir"; do
    expect 3 "no file" "$path"
    holds "there is no report on it" [ ! -s "$dir/out" ]
done
finish
