#!/bin/sh
# What becomes of the bytes that a model says: thought, text and calls, wherever
# its tokens are cut, and where it stops.  And the settings that a model brings.
#     RUN=./run PARROT=build/test/parrot test/check_answer.sh
. test/lib.sh

needs_python json "the parts of answers"
always="-t 1 --temp 0"

# Rows: what is said; text, thought and calls that come of it; where it is to stop.
# Each is said in several ways: as one token, as one a byte, and cut at random.
# Calls are marks of the vocabulary, tokens of their own.
"$python" - "$dir" <<'END'
import json, random, sys
T, O, C, E = "<think>", "</think>", "<|tool_call_start|>", "<|tool_call_end|>"
f, g = ["f", {}], ["g", {}]
rows = [                       # said, text, thought, calls, stop strings
    ("Hello.", "Hello.", "", [], []),
    (T + "hm" + O + "Hi", "Hi", "hm", [], []),
    # blanks around a thought belong to none, those inside of it stay
    ("\n " + T + "\nhm\n" + O + "\r\n\tHi \n", "Hi \n", "\nhm\n", [], []),
    ("\n Hi", "\n Hi", "", [], []),
    (" \n", " \n", "", [], []),
    (T + "hm" + O + " \n", "", "hm", [], []),
    (T + O + "Hi", "Hi", "", [], []),
    (T + "hm", "", "hm", [], []),
    # what ends while it is held back
    ("<thin", "<thin", "", [], []),
    (" <", " <", "", [], []),
    (T + "hm</thin", "", "hm</thin", [], []),
    ("aST", "aST", "", [], ["STOP"]),
    # words in other places are text
    ("Hi" + T + "hm" + O, "Hi" + T + "hm" + O, "", [], []),
    ("hm" + O + "Hi", "hm" + O + "Hi", "", [], []),
    (T + "a" + T + "b" + O + "c" + O + "d", "c" + O + "d", "a" + T + "b", [], []),
    (T + "a" + O + T + "b", T + "b", "a", [], []),
    ("<<think>x", "<<think>x", "", [], []),
    (T + "<</think>x", "x", "<", [], []),
    # calls
    ("a" + C + "[f()]" + E + "b", "ab", "", [f], []),
    (T + "x" + O + C + "[f()]" + E, "", "x", [f], []),
    (C + "[f()]" + E + C + "[g()]" + E, "", "", [f, g], []),
    (C + "[f(), g()]" + E, "", "", [f, g], []),
    (C + "[f(a='" + T + O + "')]" + E, "", "", [["f", {"a": T + O}]], []),
    (C + "no call" + E, C + "no call" + E, "", [], []),
    # stop strings
    ("one STOP two", "one ", "", [], ["STOP"]),
    ("STOP", "", "", [], ["STOP"]),
    ("one SSTOP", "one S", "", [], ["STOP"]),
    ("one STSTOP", "one ST", "", [], ["STOP"]),
    ("a\n\nb", "a", "", [], ["\n\n"]),
    ("\n\nb", "", "", [], ["\n\n"]),
    ("abcde", "ab", "", [], ["abcdef", "cd"]),
    ("abcde", "", "", [], ["cd", "abcd"]),
    ("aab", "", "", [], ["aa", "b"]),
    ("<thin", "", "", [], ["<th"]),
    ("\u20ac!", "", "", [], ["\u20ac"]),
    ("a\u20ac", "a\u20ac", "", [], ["\u20ad"]),
    # not in thoughts or calls, but right behind them
    (T + "STOP" + O + "a", "a", "STOP", [], ["STOP"]),
    (T + "ST" + O + "OP", "OP", "ST", [], ["STOP"]),
    (T + "a" + O + "\n\nSTOP", "", "a", [], ["STOP"]),
    (C + "[f()]" + E + "STOP", "", "", [f], ["STOP"]),
    ("a" + C + "[f()]" + E, "a", "", [], [C]),
]
random.seed(1)

def escape(piece):
    if piece in (C, E):
        return piece
    return "".join("\\x%02x" % b for b in piece)

def cut(said, way):
    """Tokens: marks of calls whole, the rest in pieces of bytes."""
    out = []
    for k, part in enumerate(said.replace(C, "\0c\0").replace(E, "\0e\0").split("\0")):
        if k % 2:
            out.append({"c": C, "e": E}[part])
            continue
        b = part.encode()
        while b:
            n = len(b) if way == 0 else 1 if way == 1 else random.randint(1, 5)
            out.append(b[:n])
            b = b[n:]
    return out

scripts, asked, expected = [["hi"]], [], []
name = lambda k: chr(65 + k // 26) + chr(65 + k % 26)
for said, text, thought, calls, stop in rows:
    for way in range(4):
        k = len(scripts)
        scripts.append([escape(p) for p in cut(said, way)])
        asked.append({"custom_id": "%d by %d: %s" % (k, way, said), "body": {
            "messages": [{"role": "user", "content": name(k)}],
            "stop": stop or None}})
        expected.append([text, thought, calls])
open(sys.argv[1] + "/scripts", "w").write("".join("\t".join(s) + "\n" for s in scripts))
open(sys.argv[1] + "/in", "w").write("".join(json.dumps(a) + "\n" for a in asked))
json.dump(expected, open(sys.argv[1] + "/parts", "w"))
END
"$parrot" "$dir/p.gguf" <"$dir/scripts"
m=$dir/p.gguf
batch 0 "parts" -q --template lfm2
cp "$dir/out" "$dir/whole"
cat >"$dir/check.py" <<'END'
import json, sys
bad, n = 0, 0
lines = [json.loads(x) for x in open(sys.argv[1] + "/out", encoding="utf-8")]
expected = json.load(open(sys.argv[1] + "/parts"))
for line, want in zip(lines, expected):
    c = line["response"]["body"]["choices"][0]
    m = c["message"]
    got = [m["content"] or "", m.get("reasoning_content") or "",
           [[x["function"]["name"], json.loads(x["function"]["arguments"])]
            for x in m.get("tool_calls") or []]]
    finish = "tool_calls" if want[2] else "stop"
    n += 1
    if got != want or c["finish_reason"] != finish:
        bad += 1
        print("%r: %r, expected %r" % (line["custom_id"], [got, c["finish_reason"]], want))
print("%d answers, %d wrong" % (n, bad))
sys.exit(bad > 0 or n != len(expected) or n < 150)
END
holds "thought, text and calls are told apart in any pieces" \
    "$python" "$dir/check.py" "$dir"
batch 0 "parts, eight at once" -q --template lfm2 --parallel 8
cut() {
    sed 's/"id": "[^"]*"//g; s/"request_id": "[^"]*"//g' "$1"
}
cut "$dir/whole" >"$dir/expected"
cut "$dir/out" >"$dir/has"
same "whoever else is answered" "$dir/expected" "$dir/has"

# With --think raw all is text, and stop strings work as ever.
"$python" - "$dir" <<'END'
import json, sys
expected = []
for line in open(sys.argv[1] + "/in"):
    d = json.loads(line)
    said = d["custom_id"].split(": ", 1)[1]
    begin = max(0, said.find("</think>"))             # not within a thought
    stops = [said.find(s, begin) for s in d["body"]["stop"] or []
             if s in said[begin:]]
    expected.append([said[:min(stops)] if stops else said, "", []])
json.dump(expected, open(sys.argv[1] + "/parts", "w"))
END
batch 0 "as it was said" -q --template lfm2 --think raw
holds "--think raw leaves all where it was" "$python" "$dir/check.py" "$dir"

# On a screen: words are the same, a thought stays away, calls are a line.
expect 0 "a thought" -q --template lfm2 "$m" AE
prints "a thought is not printed" "$(sed -n '1p' "$dir/out")"
hasnt "a thought" "hm"

# Bytes that are no characters, and those that steer a terminal.
printf 'a\\xc2\t\\x9bb\t\\xf0\\x9f\t\\x98\t\\x80\t\\x1b[31mc\t\\xc3\n<|tool_call_start|>\t[f(a="\\xc2\\x9b31m")]\t<|tool_call_end|>\n' |
    "$parrot" "$m"
expect 0 "any bytes" -q --template lfm2 "$m" hi
printf 'a\302\233b\360\237\230\200\033[31mc\303\n' >"$dir/expected"
same "any bytes come out as they are" "$dir/expected" "$dir/out"
expect 0 "any bytes" -q --json --template lfm2 "$m" hi
json "in JSON what is none is U+FFFD" \
    'd["choices"][0]["message"]["content"] == "a\x9bb\U0001f600\x1b[31mc\ufffd"'
if script -qec true /dev/null </dev/null >"$dir/tty" 2>&1; then
    for name in hi AB; do
        script -qec "$run -q $always --template lfm2 $m $name" /dev/null \
            </dev/null >"$dir/tty" 2>&1
        holds "something is shown" grep -q '31m' "$dir/tty"
        holds "and steers nothing" sh -c "LC_ALL=C; export LC_ALL
            ! grep -q '$(printf '\033')' $dir/tty &&
            ! grep -q '$(printf '\302\233')' $dir/tty"
    done
else
    echo "skipped: a terminal, which needs script of util-linux"
fi

# ------------------------------------------------- the settings a model brings

# preset TEMPERATURE TOP_K MIN_P REPEAT KEY=TEXT...: as the makers advise.
preset() {
    temp=$1 top_k=$2 min_p=$3 repeat=$4
    shift 4
    printf 'I\n' | "$parrot" "$dir/named.gguf" "$@"
    # shellcheck disable=SC2086
    "$run" -q --json -t 1 -n 1 --template lfm2 "$dir/named.gguf" hi $options \
        >"$dir/out" 2>"$dir/err" </dev/null
    has "$*" "\"temperature\": $temp, \"top_k\": $top_k, \"top_p\": 1, \"min_p\": $min_p, \"repeat_penalty\": $repeat"
}

options=
while read -r temp top_k min_p repeat name; do
    preset "$temp" "$top_k" "$min_p" "$repeat" "general.name=$name"
done <<END
0.3 0 0.15 1.05 LFM2 350M
0.3 0 0.15 1.05 LFM2_1.2B
0.3 0 0.15 1.05 LFM2-8B-A1B
0.1 50 0 1.05 LFM2-24B-A2B
0.1 50 0 1.05 lfm2 24b a2b
0.1 50 0 1.05 LFM2.5-230M
0.1 50 0 1.05 LFM2.5-1.2B-Instruct
0.1 50 0 1.05 LFM2.5_1.2B_JP_202606
0.05 50 0 1.05 LFM2.5-1.2B-Thinking
0.3 0 0.15 1.05 LFM2.5_1.2B_JP
0.2 80 0 1.05 LFM2.5-8B-A1B
0.1 50 0 1.1 LFM2.5_2.6B
0.1 0 0.15 1.05 LFM2-VL-450M
0 0 0 1 LFM2-1.2B-Extract
0 0 0 1 LFM2_1.2B_RAG
0 0 0 1 LFM2 350M PII Extract JP
0 0 0 1 LFM2-350M-ENJP-MT
0.3 0 0.15 1.05 something else
END
preset 0.2 80 0 1.05 general.basename=LFM2.5-8B-A1B
preset 0 0 0 1 general.name=LFM2 general.finetune=Extract
preset 0.1 50 0 1.05 general.name=LFM2 general.size_label=24B-A2B
# Options win.  A greedy choice is not penalised, unless somebody asks for it.
options="--temp 0"
preset 0 50 0 1 general.name=LFM2-24B-A2B
options="--temp 0 --repeat-penalty 1.3"
preset 0 50 0 1.3 general.name=LFM2-24B-A2B
options="--top-k 7 --min-p 0.5"
preset 0.1 7 0.5 1.05 general.name=LFM2-24B-A2B
# So does what the file says; wishes out of bounds are none.
options=
number=general.sampling
preset 0.5 33 0.25 1.5 general.name=LFM2 $number.temp=#0.5 \
    $number.top_k=#33. $number.min_p=#0.25 $number.penalty_repeat=#1.5
for bad in temp=#-1 temp=#1e9 temp=hot top_k=#-5. top_p=#2 min_p=#2 \
    penalty_repeat=#0; do
    preset 0.3 0 0.15 1.05 general.name=LFM2 $number.$bad
done

# Templates by what the file says.
template() {
    want=$1
    shift
    printf 'I\n' | "$parrot" "$dir/named.gguf" "$@"
    "$run" -q --json -t 1 -n 1 "$dir/named.gguf" hi >"$dir/out" 2>"$dir/err" \
        </dev/null
    has "template of $*" "\"template\": \"$want\""
}
template lfm2 "tokenizer.chat_template=<|tool_list_start|>"
template none tokenizer.chat_template=
template lfm2.5-8b-a1b \
    "tokenizer.chat_template=preserve_thinking <|im_start|>assistant\\n<think>"
always=
expect 0 "a template that opens the thought" -q --dump-prompt "$dir/named.gguf" hi
holds "a template that opens the thought" [ "$(tail -n 1 "$dir/out")" = "<think>" ]

finish
