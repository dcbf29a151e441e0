#!/bin/sh
# The drawings of scripts/picture.py: well-formed, with as many cells as there
# is to show, whatever it is given.
#     RUN=./run test/check_pictures.sh
. test/lib.sh

needs_python xml.dom.minidom "the pictures"

draw() {
    kind=$1
    shift
    "$python" scripts/picture.py "$kind" "$@"
}

# drawn N ELEMENT WORD FILE: the file is XML with so many such elements that
# tell the word where the pointer rests.
drawn() {
    "$python" - "$@" <<'END'
import sys
import xml.dom.minidom
n, name, word, path = sys.argv[1:]
found = [e for e in xml.dom.minidom.parse(path).getElementsByTagName(name)
         if any(t.parentNode is e and word in t.firstChild.data
                for t in e.getElementsByTagName("title"))]
print(len(found), "of", n)
sys.exit(len(found) != int(n))
END
}

# pieces N FILE: the same for cells that share an element with their colour.
pieces() {
    "$python" - "$@" <<'END'
import sys
import xml.dom.minidom
paths = xml.dom.minidom.parse(sys.argv[2]).getElementsByTagName("path")
found = sum(p.getAttribute("d").count("M") for p in paths
            if p.parentNode.hasAttribute("stroke-width"))
print(found, "of", sys.argv[1])
sys.exit(found != int(sys.argv[1]))
END
}

# small N FILE: the file has fewer than N bytes.
small() {
    [ "$(wc -c <"$2")" -lt "$1" ]
}

# refused WHAT KIND FILE OPTION...: one sentence, status 1, and no drawing.  They
# are tried together, by all_refused: Python takes longer to start than to refuse.
n_refused=0
refused() {
    n_refused=$((n_refused + 1))
    what=$(echo "$1" | tr '\n\t' '  ') kind=$2 file=$3
    shift 3
    if [ -f "$file" ]; then
        cp "$file" "$dir/refused$n_refused"
        file=$dir/refused$n_refused
    fi
    printf '%s\t%s\n' "$what" "$kind $file $*" >>"$dir/refused"
}

all_refused() {
    "$python" - "$dir" >"$dir/out" 2>"$dir/err" <<'END'
import contextlib
import io
import os
import sys
sys.path.insert(0, "scripts")
import picture
folder, good = sys.argv[1], 0
for line in open(folder + "/refused", encoding="utf-8", errors="replace"):
    arguments = line.split("\t")[1].split()
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["picture.py", *arguments, "-o", folder + "/none.svg"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = picture.main()
    except SystemExit as e:
        code = e.code
        if isinstance(code, str):
            err.write(code + "\n")
            code = 1
    said = err.getvalue()
    if (code == 1 and said.startswith("picture.py: ") and said.count("\n") == 1
            and not out.getvalue() and not os.path.exists(folder + "/none.svg")):
        good += 1
    else:
        print("not refused: %s: %r, %s" % (line, code, said), file=sys.stderr)
print(good)
END
    holds "refused: $n_refused of them" [ "$(cat "$dir/out")" = "$n_refused" ]
}

# ------------------------------------------------------------------- surprisal

"$run" test/tiny.gguf --raw -n 4 --temp 0 --json --logprobs 3 \
    "A short <convolution> & \"more\"" >"$dir/text.json" 2>"$dir/err"
n=$("$python" -c 'import json, sys
d = json.load(sys.stdin)["choices"][0]
print(len(d["prompt_logprobs"]) - 1 + len(d["logprobs"]["tokens"]))' \
    <"$dir/text.json")
holds "a text is drawn" draw surprisal "$dir/text.json" -o "$dir/text.svg"
holds "all its tokens" drawn "$n" rect bits, "$dir/text.svg"
holds "a part of it" draw surprisal "$dir/text.json" -o "$dir/text.svg" \
    --tokens 1-3
holds "has so many" drawn 3 rect bits, "$dir/text.svg"
holds "as a page" draw surprisal "$dir/text.json" -o "$dir/text.html"
holds "with all tokens" [ "$(grep -o '<span' "$dir/text.html" | wc -l)" = "$n" ]
draw surprisal - -o - <"$dir/text.json" >"$dir/piped.svg" 2>"$dir/err"
holds "through a pipe" drawn "$n" rect bits, "$dir/piped.svg"
echo '{"prompt": "A short convolution", "echo": true, "logprobs": 2,
       "max_tokens": 1}' | tr -d '\n' |
    "$run" -q test/tiny.gguf --batch >"$dir/batch.jsonl" 2>"$dir/err"
holds "the answer to a line of --batch" draw surprisal "$dir/batch.jsonl" \
    -o "$dir/text.svg"
holds "with the first token, of which nothing is known" \
    drawn 1 rect "nothing to expect" "$dir/text.svg"

"$python" - "$dir" <<'END'
import json
import sys
texts = ["</text><script>", "&amp;", "\0\1\33[31m", "\u202eevil", "a\tb",
         "\r\n", "  two  ", "\u65e5\u672c", "\u0301", "x" * 300, "\ud800",
         "\ufffe\uffff", "]]>", "'\"<>", "\n\n", "end"]
best = [{"token": t, "logprob": -1} for t in texts[:3]]
def save(name, what):
    with open("%s/%s.json" % (sys.argv[1], name), "w") as f:
        json.dump(what, f)
save("hostile", {"prompt_logprobs": [None] + [
    {"token": t, "logprob": -i, "top_logprobs": best}
    for i, t in enumerate(texts)]})
save("partial", {"prompt_logprobs": [
    {"token": "?", "bytes": [0xe2, 0x82], "logprob": -1}]})
save("long", {"logprobs": {"tokens": texts * 1000,
                           "token_logprobs": [-1] * 16000}})
save("nan", {"prompt_logprobs": [{"token": "a", "logprob": float("nan")}]})
save("word", {"prompt_logprobs": [{"token": "a", "logprob": "b"}]})
save("bytes", {"prompt_logprobs": [
    {"token": "a", "bytes": [1 << 70], "logprob": 0}]})
save("none", {"prompt_logprobs": [None], "logprobs": None})
save("list", {"choices": [[]]})
with open(sys.argv[1] + "/deep.json", "w") as f:
    f.write('{"a":' * 100000)
END
holds "hostile tokens are drawn" draw surprisal "$dir/hostile.json" \
    -o "$dir/hostile.svg"
# 300 letters take four lines more.
holds "each of them" drawn 19 rect bits, "$dir/hostile.svg"
holds "and nothing that could run" \
    sh -c "! grep -q '<script' '$dir/hostile.svg'"
draw surprisal "$dir/hostile.json" -o "$dir/hostile.html" 2>"$dir/err"
holds "nor in a page" sh -c "[ -s '$dir/hostile.html' ] &&
    ! grep -q '<script' '$dir/hostile.html'"
holds "bytes that are no character" draw surprisal "$dir/partial.json" \
    -o "$dir/partial.svg"
holds "are told" drawn 1 rect '\xe2\x82' "$dir/partial.svg"
holds "a long text" draw surprisal "$dir/long.json" -o "$dir/long.svg"
holds "is cut" small 150000 "$dir/long.svg"
for bad in nan word bytes none list deep; do
    refused "log probabilities: $bad" surprisal "$dir/$bad.json"
done
refused "no such tokens" surprisal "$dir/text.json" --tokens 99999-
refused "no such file" surprisal "$dir/none.json"
refused "a folder" surprisal "$dir"

# ----------------------------------------------------------------------- block

"$run" --inspect --json test/tiny.gguf >"$dir/model.json" 2>"$dir/err"
holds "a model is drawn" draw block "$dir/model.json" -o "$dir/model.svg"
holds "its six layers, each of two halves" drawn 12 rect "layer " \
    "$dir/model.svg"
for tensor in attn_norm shortconv.conv attn_q_norm ffn_down ffn_gate_inp \
    exp_probs_b ffn_up_exps; do
    holds "and $tensor" grep -q "blk\.N\.$tensor" "$dir/model.svg"
done

# changed NAME PYTHON: the description d of the model, changed.
changed() {
    "$python" -c 'import json, sys
d = json.load(open(sys.argv[1] + "/model.json"))
exec(sys.argv[3])
json.dump(d, open("%s/%s.json" % tuple(sys.argv[1:3]), "w"))' "$dir" "$@" \
        2>"$dir/err"
}
changed dense 'd["ffn_map"] = "d" * 6; d["sizes"]["n_expert"] = 0'
holds "one without experts" draw block "$dir/dense.json" -o "$dir/dense.svg"
holds "has none" drawn 6 rect ": dense" "$dir/dense.svg"
changed deep 'd["layer_map"] = "cccA" * 64; d["ffn_map"] = "e" * 256
d["sizes"]["n_layer"] = 256'
holds "256 layers" draw block "$dir/deep.json" -o "$dir/deep.svg"
holds "are drawn" drawn 512 rect "layer " "$dir/deep.svg"
changed named 'd["name"] = "</text><script>\0\u202e" * 99'
holds "a hostile name" draw block "$dir/named.json" -o "$dir/named.svg"
holds "does nothing" sh -c "[ -s '$dir/named.svg' ] &&
    ! grep -q '<script' '$dir/named.svg'"
for change in 'del d["sizes"]' 'd["sizes"]["n_embd"] = "256"' \
    'd["sizes"]["n_embd"] = 0' 'd["sizes"]["n_head"] = 1 << 40' \
    'd["layer_map"] = "ccAcA"' 'd["layer_map"] = ["c"]' \
    'd["ffn_map"] = "x" * 6' \
    'd["sizes"]["n_layer"] = 1 << 19' 'd["roles"] = {}' 'd["roles"] = 5' \
    'd["weights"]["bytes"] = float("nan")' 'd = {}'; do
    changed bad "$change"
    refused "a model with $change" block "$dir/bad.json"
done
"$run" --inspect test/tiny.gguf >"$dir/bad.json" 2>"$dir/err"
refused "the text of --inspect" block "$dir/bad.json"

# --------------------------------------------------------------------- routing

# experts LAYERS EXPERTS TOKENS: a dump where token t in layer l goes to experts
# l and l + t, counted around.
experts() {
    "$python" - "$@" <<'END'
import sys
layers, n, tokens = map(int, sys.argv[1:])
print("position,token,layer,rank,expert,score,bias,weight")
for t in range(tokens):
    for l in range(2, 2 + layers):
        for rank, e in enumerate((l % n, (l + t + 1) % n)):
            print("%d,%d,%d,%d,%d,0.5,0,0.5" % (t, 7, l, rank, e))
END
}
experts 4 8 6 >"$dir/small.csv"
experts 22 32 40 >"$dir/8b.csv"
experts 38 64 40 >"$dir/24b.csv"
holds "experts are drawn" draw routing "$dir/small.csv" -o "$dir/small.svg"
holds "every one" drawn 32 rect times "$dir/small.svg"
holds "with what it was used for" drawn 1 rect \
    "L2 E2: 6 times, 50.00 %; weight 3" "$dir/small.svg"
holds "by weight" draw routing "$dir/small.csv" -o "$dir/small.svg" --by weight
holds "and those that were never chosen" draw routing "$dir/small.csv" \
    -o "$dir/small.svg" --n-expert 16
holds "are told" drawn 36 rect ": 0 times" "$dir/small.svg"
holds "22 layers with 32 experts" draw routing "$dir/8b.csv" -o "$dir/8b.svg"
holds "have 704 cells" drawn 704 rect times "$dir/8b.svg"
holds "38 layers with 64 experts" draw routing "$dir/24b.csv" -o "$dir/24b.svg"
holds "have 2432" pieces 2432 "$dir/24b.svg"
holds "and tell of the layers" drawn 38 g "never" "$dir/24b.svg"
for file in 8b 24b; do
    holds "in less than 100 KB" small 100000 "$dir/$file.svg"
done

head='position,token,layer,rank,expert,score,bias,weight'
for bad in "" "$head" "a,b,c" "$head
1,2,3" "$head
0,1,2,0,x,0.5,0,0.5" "$head
0,1,2,0,3,0.5,0,nan" "$head
0,1,2,0,3,0.5,0,-1" "$head
0,1,2,0,3,0.5,0,1e999" "$head
0,1,2,0,999999999,0.5,0,1" "$head
0,1,-1,0,3,0.5,0,1"; do
    echo "$bad" >"$dir/bad.csv"
    refused "experts: $(echo "$bad" | tail -1)" routing "$dir/bad.csv"
done
: >"$dir/bad.csv"
refused "an empty file" routing "$dir/bad.csv"
"$python" -c 'print("a," * 1000000)' >"$dir/bad.csv"
refused "a million columns" routing "$dir/bad.csv"
head -c 100000 test/tiny.gguf >"$dir/bad.csv"
refused "a model instead" routing "$dir/bad.csv"
printf '%s\n0,1,2,0,3,0.5,0,0\n' "$head" >"$dir/bad.csv"
refused "weights of zero" routing "$dir/bad.csv" --by weight


# ----------------------------------------------------------------------- trace

trace() {
    "$python" - "$@" <<'END'
import json
import sys
layers, n, value = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
print(json.dumps({"trace": 1, "n_layer": layers}))
for pos in range(n):
    print(json.dumps({"name": "model.embed_tokens", "pos": pos, "shape": [4],
                      "l2": 0.5, "token": 7}))
for i in range(layers):
    for name in ("conv.conv", "feed_forward"):
        for pos in range(n):
            print(json.dumps({"name": "model.layers.%d.%s" % (i, name),
                              "pos": pos, "shape": [16], "l2": 8}))
    for pos in range(n):
        print(json.dumps({"name": "model.layers.%d" % i, "pos": pos,
                          "shape": [4],
                          "l2": value if i + pos == 1 else i + pos}))
END
}
trace 6 20 3 >"$dir/trace.jsonl"
holds "a trace is drawn" draw trace "$dir/trace.jsonl" -o "$dir/trace.svg"
holds "all layers and tokens" drawn 140 rect position "$dir/trace.svg"
holds "with the root mean square" drawn 1 rect \
    "layer 5, position 19: 12" "$dir/trace.svg"
holds "another module" draw trace "$dir/trace.jsonl" -o "$dir/trace.svg" \
    --module feed_forward
holds "is drawn, too" drawn 120 rect ": 2" "$dir/trace.svg"
trace 40 1000 '"nan"' >"$dir/trace.jsonl"
holds "a long one, and what is no number" draw trace "$dir/trace.jsonl" \
    -o "$dir/trace.svg"
holds "in less than 100 KB" small 100000 "$dir/trace.svg"
refused "no such module" trace "$dir/trace.jsonl" --module none
for bad in '{' '[]' \
    '{"name": "model.layers.0", "pos": -1, "shape": [4], "l2": 1}' \
    '{"name": "model.layers.0", "pos": 1, "shape": [], "l2": 1}' \
    '{"name": "model.layers.0", "pos": 1, "shape": [0], "l2": 1}' \
    '{"name": "model.layers.0", "pos": 1, "shape": [4], "l2": NaN}' \
    '{"name": "model.layers.0", "pos": 1, "shape": [4], "l2": -1}' \
    '{"name": "model.layers.0", "pos": 1, "shape": [4], "l2": 1e308}' \
    '{"name": "model.layers.0", "pos": 1, "shape": [4]}'; do
    echo "$bad" >"$dir/bad.jsonl"
    refused "trace: $bad" trace "$dir/bad.jsonl"
done

all_refused

# ---------------------------------------------------------- those of the README

# The same bits everywhere, so the same pictures.
story="--raw -n 0 -f scripts/pictures/story.txt"
"$run" $story test/tiny.gguf --json --logprobs 3 >"$dir/story.json" 2>"$dir/err"
draw surprisal "$dir/story.json" -o "$dir/surprisal.svg" 2>"$dir/err"
"$run" $story test/tiny.gguf --trace "$dir/story.jsonl" \
    --trace-raw "$dir/story.f32" 2>"$dir/err"
"$python" scripts/trace.py experts "$dir/story.jsonl" "$dir/story.f32" \
    -o "$dir/story.csv" 2>"$dir/err"
draw routing "$dir/story.csv" -o "$dir/routing.svg" 2>"$dir/err"
cp "$dir/model.svg" "$dir/block.svg"
for name in surprisal routing block; do
    same "$name.svg is what it was" "$dir/$name.svg" scripts/pictures/$name.svg
    holds "it is small" small 40000 "scripts/pictures/$name.svg"
done
finish
