#!/bin/sh
# Conversations by the command line: prompts, thoughts, stop strings, JSON.
#     RUN=./run test/check_cli.sh
. test/lib.sh

unset NO_COLOR

always="-t 1"

# Without a template, and with one that opens a thought: the file, edited.
export LC_ALL=C
sed 's/tokenizer\.chat_template/tokenizer.chat_tempIate/' $m >"$dir/base.gguf"
sed "s/add_generation_prompt -%}{{- '<|im_start|>assistant.n'/add_generation \
-%}{{- '<|im_start|>assistant\\\\n<think>'/" $m >"$dir/thinks.gguf"
holds "edited models have the size of the model" \
    [ "$(cat "$dir/base.gguf" "$dir/thinks.gguf" | wc -c)" -eq \
    $((2 * $(wc -c <$m))) ]

# --------------------------------------------------------------------- messages

user='{"role": "user", "content": "What is LFM2?"}'
echo "{\"messages\": [$user]}" >"$dir/object"
echo "[$user]" >"$dir/array"
expect 0 "-p" --temp 0 $m -p "What is LFM2?"
cp "$dir/out" "$dir/answer"
answer=$(cat "$dir/answer")
expect 0 "--messages" --temp 0 $m --messages "$dir/object"
same "an object with messages is as -p" "$dir/answer" "$dir/out"
expect 0 "--messages" --temp 0 $m --messages "$dir/array"
same "so is a bare array" "$dir/answer" "$dir/out"
"$run" --temp 0 $m --messages - <"$dir/object" >"$dir/out" 2>"$dir/err"
same "so is standard input" "$dir/answer" "$dir/out"
prompt='<|startoftext|><|im_start|>user
What is LFM2?<|im_end|>
<|im_start|>assistant'
expect 0 "--dump-prompt" --dump-prompt $m "What is LFM2?"
prints "--dump-prompt" "$prompt"
expect 0 "-sys" --dump-prompt $m "What is LFM2?" -sys "Be brief."
prints "-sys" "<|startoftext|><|im_start|>system
Be brief.<|im_end|>
${prompt#<|startoftext|>}"
cp "$dir/out" "$dir/with_system"
echo "Be brief." >"$dir/system"
expect 0 "-sysf" --dump-prompt $m "What is LFM2?" -sysf "$dir/system"
same "-sysf" "$dir/with_system" "$dir/out"
expect 2 "-sys and -sysf" $m hi -sys a -sysf "$dir/system"
says "more than one system prompt"
expect 3 "-sysf" $m hi -sysf "$dir/none"
printf 'a\0b' >"$dir/system"
expect 2 "-sysf" $m hi -sysf "$dir/system"
says "NUL byte after 1"
echo '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "",
    "tool_calls": [{"name": "f", "arguments": {}}]}]' >"$dir/calls"
expect 0 "calls" --dump-prompt --template lfm2 --messages "$dir/calls" $m
says "tool_calls"
expect 0 "calls" --dump-prompt --template lfm2.5-new --messages "$dir/calls" $m
holds "calls are written down" grep -q 'tool_call_start|>\[f()\]' "$dir/out"
holds "and nothing is told" [ ! -s "$dir/err" ]
echo '[{"type": "function", "name": "f"}]' >"$dir/tools"
expect 0 "--tools" --dump-prompt --messages "$dir/array" --tools "$dir/tools" $m
prints "--tools" '<|startoftext|><|im_start|>system
List of tools: <|tool_list_start|>[{"type": "function", "name": "f"}]'\
"<|tool_list_end|><|im_end|>
${prompt#<|startoftext|>}"
echo "{\"tools\": $(cat "$dir/tools")}" >"$dir/tools_object"
cp "$dir/out" "$dir/with_tools"
expect 0 "--tools" --dump-prompt $m "What is LFM2?" --tools "$dir/tools_object"
same "tools as an object" "$dir/with_tools" "$dir/out"
sed 's/^{/{"tools": [{"type": "function", "name": "f"}], /' "$dir/object" \
    >"$dir/both"
expect 0 "tools in --messages" --dump-prompt $m --messages "$dir/both"
same "tools beside the messages" "$dir/with_tools" "$dir/out"
expect 0 "--date" --template lfm2.5-new --date 2031-01-02 --dump-prompt $m \
    --tools "$dir/tools" hello
holds "--date is the day" grep -q "Today's date: 2031-01-02" "$dir/out"
expect 0 "no --date" --template lfm2.5-new --dump-prompt $m \
    --tools "$dir/tools" hello
holds "else it is today" grep -q "Today's date: $(date +%Y-%m-)" "$dir/out"
expect 0 "--dump-tokens" --dump-tokens $m "What is LFM2?"
cp "$dir/out" "$dir/tokens"
printf '%s\n' "$prompt" >"$dir/prompt"
always=
expect 0 "--tokenize" --tokenize --special $m -f "$dir/prompt"
always="-t 1"
same "--dump-tokens" "$dir/tokens" "$dir/out"
expect 0 "both" --dump-prompt --dump-tokens $m "What is LFM2?"
holds "the prompt and then its tokens" \
    sh -c "cat $dir/prompt $dir/tokens | cmp -s - $dir/out"

# What a user types is text; the id of <|im_end|> is 7.
expect 0 "a marker" --dump-tokens $m 'a<|im_end|>'
holds "typed is text" sh -c "[ \"\$(tr ' ' '\n' <$dir/out | grep -cx 7)\" = 1 ]"
expect 0 "a marker" --dump-tokens --special $m 'a<|im_end|>'
holds "with --special it counts" \
    sh -c "[ \"\$(tr ' ' '\n' <$dir/out | grep -cx 7)\" = 2 ]"
expect 0 "a backslash" --dump-prompt $m 'a\nb'
holds "is one" grep -qx 'a\\nb<|im_end|>' "$dir/out"

# Every conversation by every template, as the templates themselves print them.
python=
for p in python3 /usr/bin/python3; do
    [ -z "$python" ] && "$p" -c 'import json' 2>/dev/null && python=$p
done
if [ -n "$python" ]; then
    golden=${LFM2_SHARED:-../shared}/chat/golden.json
    if [ ! -e "$golden" ]; then
        echo "skipped: official renderings, which do not come with the source"
        golden=
    fi
    # shellcheck disable=SC2086
    "$python" - "$dir" test/chat.json $golden <<'END'
import json, sys
n = 0
for path in sys.argv[2:]:
    data = json.load(open(path, encoding="utf-8"))
    for template, texts in data["rendered"].items():
        for name, text in texts.items():
            talk = data["conversations"][name]
            parts = any(isinstance(m.get("content"), list)
                        for m in talk["messages"])
            if path != sys.argv[2] and parts:
                continue                  # clients' parts are joined instead
            n += 1
            base = "%s/g%d" % (sys.argv[1], n)
            json.dump(talk, open(base + ".json", "w"))
            open(base + ".txt", "wb").write(text.encode())
            open(base + ".name", "w").write(template)
END
    n=0 wrong=0
    while [ -e "$dir/g$((n + 1)).json" ]; do
        n=$((n + 1))
        "$run" -q --dump-prompt --date 2026-11-20 $m \
            --template "$(cat "$dir/g$n.name")" --messages "$dir/g$n.json" \
            >"$dir/out" 2>"$dir/err"
        cmp -s "$dir/out" "$dir/g$n.txt" || wrong=$((wrong + 1))
    done
    holds "$n renderings, $wrong of them wrong" \
        [ "$((n >= 65 && wrong == 0))" = 1 ]
else
    echo "skipped: golden renderings and JSON, which need python3"
fi

# ------------------------------------------------------------------ no template

expect 0 "--template none" --template none --temp 0 -n 8 $m "What is LFM2?"
cp "$dir/out" "$dir/none"
expect 0 "--raw" --raw --temp 0 -n 8 $m "What is LFM2?"
same "--template none is --raw" "$dir/none" "$dir/out"
expect 0 "a base model" --temp 0 -n 8 "$dir/base.gguf" "What is LFM2?"
same "a model without a template goes on" "$dir/none" "$dir/out"
says "no chat template, the prompt is continued"
refuses 2 "no chat template, so -sys" "$dir/base.gguf" hello -sys x
refuses 2 "no chat template, so --messages" "$dir/base.gguf" \
    --messages "$dir/array"
refuses 2 "expected a file" $m hello --session -
refuses 2 "--tools needs a chat template" --template none $m \
    hello --tools "$dir/tools"
expect 0 "a base model with --template" --temp 0 --template lfm2 \
    "$dir/base.gguf" "What is LFM2?"
same "--template makes it chat" "$dir/answer" "$dir/out"

# --------------------------------------------------------------- where it stops

expect 0 "--stop" --temp 0 $m "What is LFM2?" --stop small
prints "--stop" "${answer%%small*}"
expect 0 "--stop" --temp 0 $m "What is LFM2?" --stop zzz --stop fast -r ", fa"
prints "the first of several" "${answer%%, fa*}"
expect 0 "--stop" --temp 0 $m "What is LFM2?" --stop "${answer%% *}"
holds "at the very beginning" [ ! -s "$dir/out" ]
tail=${answer##* }
expect 0 "--stop" --temp 0 $m "What is LFM2?" --stop "$tail"
prints "at the very end" "${answer%"$tail"}"
expect 0 "--stop" --temp 0 $m "What is LFM2?" --stop "$tail and more"
same "what was held back is let go" "$dir/answer" "$dir/out"
expect 0 "--stop" --temp 0 --raw -n 40 $m "What is LFM2?" --stop zzz
expect 0 "--ignore-eos" --temp 0 $m "What is LFM2?" --ignore-eos -n 60
holds "--ignore-eos goes on" [ "$(wc -c <"$dir/out")" -gt \
    "$(wc -c <"$dir/answer")" ]
expect 0 "-n 0" --temp 0 $m "What is LFM2?" -n 0
holds "-n 0" [ ! -s "$dir/out" ]
expect 0 "-n 1" --temp 0 $m "What is LFM2?" -n 1
holds "-n 1" sh -c "grep -q . $dir/out && [ \$(wc -c <$dir/out) -lt 20 ]"
refuses 2 "not empty" $m hello --stop ""

# --------------------------------------------------------------------- thoughts

# thinking FIELDS: a conversation whose answer goes on within a thought.
echo "[$user, {\"role\": \"assistant\", \"content\": \"<think>hm\"}]" |
    sed 's/.*/{"messages": &, "continue_final_message": true}/' >"$dir/hm"
expect 0 "an answer goes on" --dump-prompt $m --messages "$dir/hm"
printf '%s\n<think>hm' "$prompt" >"$dir/expected"
same "an answer goes on" "$dir/expected" "$dir/out"
think() {
    expect 0 "thinking $*" -s 3 --temp 0 -n 60 --think-budget 4 $m \
        --messages "$dir/hm" "$@"
}
think --think raw
cp "$dir/out" "$dir/raw"
holds "raw has all of it" grep -q '^</think>$' "$dir/raw"
think
cp "$dir/out" "$dir/hidden"
holds "piped, there is no thought" sh -c "! grep -q think $dir/hidden"
holds "but the answer behind it" [ "$(sed '1,/<.think>/d' "$dir/raw" |
    sed 1d)" = "$(cat "$dir/hidden")" ]
holds "nor elsewhere" [ ! -s "$dir/err" ]
think --think hide
same "--think hide" "$dir/hidden" "$dir/out"
think --think show
same "--think show: the answer" "$dir/hidden" "$dir/out"
holds "and the thought beside it" sh -c "grep -q '^<think>' $dir/err &&
    grep -q '^</think>' $dir/err"
think --think show --color on
holds "dim with --color" grep -q "$(printf '\033')\[2m" "$dir/err"
think --color on
same "nothing is dim in an answer" "$dir/hidden" "$dir/out"
expect 0 "no thought at all" --temp 0 -n 40 --think-budget 0 $m \
    --messages "$dir/hm" --think raw
holds "a budget of none" [ "$(head -2 "$dir/out" | tail -1)" = "</think>" ]
expect 0 "a template that opens the thought" --dump-prompt \
    "$dir/thinks.gguf" "What is LFM2?"
printf '%s\n<think>' "$prompt" >"$dir/expected"
same "a template that opens the thought" "$dir/expected" "$dir/out"
expect 0 "its thought is none of the answer" --temp 0 -n 20 --think-budget 2 \
    "$dir/thinks.gguf" "What is LFM2?"
holds "its thought is none of the answer" sh -c "! grep -q think $dir/out"

# ------------------------------------------------------------------------- JSON

expect 0 "--json" --json -s 5 --temp 0 $m "What is LFM2?"
printf '%s' "$answer" >"$dir/text"
json "text" 'd["choices"][0]["message"]["content"] == open(sys.argv[1] + "/text").read()'
json "parts" 'list(d["choices"][0]["message"]) == ["role", "content"]'
json "finish" 'd["choices"][0]["finish_reason"] == "stop"'
json "usage" 'd["usage"]["prompt_tokens"] == 14 and \
    d["usage"]["total_tokens"] == 14 + d["usage"]["completion_tokens"]'
json "timings" 'd["lfm2"]["timings"]["prompt_n"] == 14 and \
    d["lfm2"]["timings"]["cache_n"] == 0 and d["lfm2"]["timings"]["prompt_ms"] > 0 and d["lfm2"]["timings"]["predicted_ms"] > 0'
json "origin" 'd["lfm2"]["seed"] == 5 and d["lfm2"]["template"] == "lfm2" and \
    d["lfm2"]["date"] is None and d["model"] == "LFM2-Tiny-MoE" and len(d["lfm2"]["model_hash"]) == 16 and \
    len(d["lfm2"]["logits_hash"]) == 16'
json "no logprobs unless asked for" '"logprobs" not in d["choices"][0]'
sed -n 's/.*"logits_hash": "\([0-9a-f]*\)".*/\1/p' "$dir/out" >"$dir/hash"
expect 0 "--json" --json -s 6 --temp 0 -b 3 --isa scalar $m "What is LFM2?"
sed -n 's/.*"logits_hash": "\([0-9a-f]*\)".*/\1/p' "$dir/out" >"$dir/hash2"
same "the same logits" "$dir/hash" "$dir/hash2"
expect 0 "--json" --json -n 3 $m "What is LFM2?"
json "length" 'd["choices"][0]["finish_reason"] == "length" and \
    d["usage"]["completion_tokens"] == 3'
expect 0 "--json" --json -n 0 $m "What is LFM2?"
json "-n 0" 'd["choices"][0]["finish_reason"] == "length" and d["choices"][0]["message"]["content"] == "" and \
    d["usage"]["completion_tokens"] == 0 and d["lfm2"]["timings"]["prompt_ms"] > 0'
expect 0 "--json" --json --temp 0 $m "What is LFM2?" --stop small
json "a stop string" 'd["choices"][0]["finish_reason"] == "stop" and "small" not in d["choices"][0]["message"]["content"]'
expect 0 "--json" --json --temp 0 $m --messages "$dir/hm" --think-budget 4 -n 30
json "reasoning" 'd["choices"][0]["message"]["reasoning_content"] and "think" not in d["choices"][0]["message"]["reasoning_content"] + d["choices"][0]["message"]["content"] \
    and d["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 4'
expect 0 "--json" --json --date 2030-04-05 --template lfm2.5-new -n 1 $m hello \
    --tools "$dir/tools"
json "the date, where it matters" 'd["lfm2"]["date"] == "2030-04-05"'
expect 0 "--json" --json --raw --temp 2 --min-p 0 -n 50 -s 2 $m Once
json "any bytes are JSON" 'd["lfm2"]["template"] == "none" and \
    d["usage"]["completion_tokens"] == 50'
expect 0 "a random seed" --json --raw --temp 1.5 --min-p 0 -n 20 $m Once
seed=$(sed -n 's/.*"seed": \([0-9]*\).*/\1/p' "$dir/out")
json "text for the seed" 'open(sys.argv[1] + "/text", "w").write(d["choices"][0]["text"])'
cp "$dir/out" "$dir/seeded"
expect 0 "its seed" --json --raw --temp 1.5 --min-p 0 -n 20 $m Once -s "$seed"
json "the seed gives the same text" \
    'd["choices"][0]["text"] == json.load(open(sys.argv[1] + "/seeded"))["choices"][0]["text"]'

# Log probabilities against those from --logits.
for how in "-b 512" "-b 5"; do
    # shellcheck disable=SC2086
    expect 0 "--logprobs" --json --logprobs 3 --temp 0 -n 4 $m \
        "What is LFM2?" $how
    cp "$dir/out" "$dir/probs"
    json "logprobs" 'len(d["choices"][0]["logprobs"]["content"]) == 4 and \
        len(d["choices"][0]["prompt_logprobs"]) == 14 and \
        d["choices"][0]["prompt_logprobs"][0] is None and \
        all(len(x["top_logprobs"]) == 3 and
            [y["logprob"] for y in x["top_logprobs"]] ==
            sorted((y["logprob"] for y in x["top_logprobs"]), reverse=True)
            for x in d["choices"][0]["prompt_logprobs"][1:] + d["choices"][0]["logprobs"]["content"]) and \
        all(x["logprob"] == x["top_logprobs"][0]["logprob"]
            for x in d["choices"][0]["logprobs"]["content"]) and \
        "".join(x["token"] for x in d["choices"][0]["logprobs"]["content"]) == d["choices"][0]["message"]["content"] and \
        all(bytes(x["bytes"]).decode() == x["token"]
            for x in d["choices"][0]["logprobs"]["content"])'
done
if [ -n "$python" ]; then
    "$python" - "$dir" <<'END'
import json, struct, sys
d = json.load(open(sys.argv[1] + "/probs"))
ids = [int(x) for x in open(sys.argv[1] + "/tokens").read().split()]
ids += [x["id"] for x in d["choices"][0]["logprobs"]["content"]]
open(sys.argv[1] + "/ids", "wb").write(struct.pack("<%di" % len(ids), *ids))
END
    expect 0 "--logits" $m --ids "$dir/ids" --logits "$dir/logits"
    cp "$dir/probs" "$dir/out"
    json "they are those of the logits" '(lambda ids, said, rows: all(
        abs(x["logprob"] - (row[i] - math.log(sum(map(math.exp, row))))) < 1e-4
        for x, i, row in zip(said, ids[1:], rows)) and
        [x["id"] for x in said] == list(ids[1:]))(
        struct.unpack("<18i", open(sys.argv[1] + "/ids", "rb").read()),
        d["choices"][0]["prompt_logprobs"][1:] + d["choices"][0]["logprobs"]["content"],
        list(struct.iter_unpack("<2048f",
            open(sys.argv[1] + "/logits", "rb").read())))'
fi
expect 0 "--logprobs of one token" --json --logprobs 0 -n 0 --raw --bos $m \
    -f /dev/null
json "of one token" 'd["choices"][0]["prompt_logprobs"] == [None] and \
    d["choices"][0]["logprobs"]["tokens"] == []'

# ----------------------------------------------------------------------- errors

echo '{"messages": 1}' >"$dir/bad"
refuses 2 "expected a JSON array, or an object with one" $m \
    --messages "$dir/bad"
echo '[]' >"$dir/bad"
refuses 2 "messages is empty" $m --messages "$dir/bad"
echo '[{"role": "user", "content": ["x"]}]' >"$dir/bad"
refuses 2 "messages[0].content[0]" $m --messages "$dir/bad"
echo '[{"role": null, "content": "x"}]' >"$dir/bad"
refuses 2 "messages[0].role is null" $m --messages "$dir/bad"
echo '[{' >"$dir/bad"
refuses 2 "found the end" $m --messages "$dir/bad"
refuses 3 "No such file" $m --messages "$dir/no"
refuses 3 "s a directory" $m --messages "$dir"
refuses 3 "No such file" $m hello --tools "$dir/no"
echo '{"tools": {}}' >"$dir/bad"
refuses 2 "expected a JSON array" $m hello --tools "$dir/bad"
echo '[1]' >"$dir/bad"
refuses 2 "tools[0] is a number" $m hello --tools "$dir/bad"
echo "{\"messages\": [$user], \"continue_final_message\": true}" >"$dir/bad"
refuses 2 "is of role user, expected" $m --messages "$dir/bad"
refuses 2 "more than one prompt" $m hello --messages "$dir/array"
refuses 2 "has its own system" $m --messages "$dir/array" -sys x
refuses 2 "--logprobs needs --json" $m hello --logprobs 1
refuses 2 "from 0 to 20" $m hello --json --logprobs 21
refuses 2 "--json means nothing with -cnv" $m --json -cnv
refuses 2 "expected a day" $m hello --date 2026-13-01
refuses 2 "expected a day" $m hello --date -026-01-01
refuses 2 "expected auto|show" $m hello --think maybe
refuses 2 "expected auto|lfm2" $m hello --template chatml
refuses 2 "--logits" $m hello --dump-prompt --logits -
refuses 6 "the prompt has 14 tokens, the context 13" $m "What is LFM2?" -c 13

# Files that are none.
mkfifo "$dir/pipe"
for bad in "$dir" "$dir/pipe" /dev/zero /dev/random; do
    refuses 3 "expected a regular file" "$bad" hello
    refuses 3 "expected a regular file" "$bad" --inspect
    refuses 3 "expected a regular file" $m hello --tokenizer "$bad"
done
refuses 3 "s a directory" $m -f "$dir"
refuses 3 "s a directory" $m --ids "$dir"
refuses 3 "s a directory" $m hello --tools "$dir"
if [ -e /dev/full ]; then
    "$run" --json -n 1 $m hello >/dev/full 2>"$dir/err"
    holds "a full disk is status 3" [ $? -eq 3 ]
fi
# A file gets the number of a descriptor that was closed: no words in it.
"$run" -n 9 -v $m "What is LFM2?" --trace "$dir/trace" <&- >&- 2>&-
holds "a closed standard output is status 3" [ $? -eq 3 ]
holds "a trace is written all the same" [ -s "$dir/trace" ]
sed '/^{.*}$/d' "$dir/trace" >"$dir/words"
holds "and has no words in it" [ ! -s "$dir/words" ]

finish
