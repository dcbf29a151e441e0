#!/bin/sh
# --ppl: perplexity against a computation from --logits, what is refused; and
# scripts/compare_logits.py against the definitions.
#     RUN=./run test/check_ppl.sh
. test/lib.sh

text=$dir/text
always="$m --ppl $text -c 32"
head -c 1500 test/questions.txt >"$text"

# ---------------------------------------------------------------------- results

expect 0 "a perplexity"
cp "$dir/out" "$dir/first"
holds "is all that is said" [ ! -s "$dir/err" ]
for how in "-b 1" "-b 2048" "-t 3" "--isa scalar"; do
    # shellcheck disable=SC2086
    expect 0 "$how" $how
    same "the same with $how" "$dir/first" "$dir/out"
done
"$run" $m --ppl - -c 32 <"$text" >"$dir/out" 2>"$dir/err"
same "the same from a pipe" "$dir/first" "$dir/out"
expect 0 "-v" -v
same "-v changes nothing on standard output" "$dir/first" "$dir/out"
says 'window 2 of '
expect 0 "as JSON" --json
json_has n_ctx 32
cp "$dir/out" "$dir/json"

# ---------------------------------------------------------------------- refused

refuses 2 "at least 1600, two windows" -c 800
refuses 2 "at least 3 tokens" -c 2
refuses 2 "PROMPT means nothing with --ppl" hello
refuses 2 "cannot be combined with the options before" --tokenize
always=$m
expect 3 "a text that is not there" --ppl "$dir/none"

# ------------------------------------------------------------- the same by hand

needs_python struct "the values of --ppl and compare_logits.py"
cat >"$dir/by_hand.py" <<'END'
"""The perplexity of windows that are each read alone, and the divergence of one
run from another, from their definitions; and whether that is what was said."""
import json
import math
import re
import struct
import subprocess
import sys

run, model, text, directory = sys.argv[1:]
n_ctx, n_vocab = 32, 2048


def output_of(*arguments):
    return subprocess.run(arguments, check=True, stdout=subprocess.PIPE).stdout


def log_probs(window, kv, first=0):
    with open(directory + "/window", "wb") as f:
        f.write(struct.pack("<%di" % len(window), *window))
    out = "%s/%s" % (directory, kv)
    output_of(run, model, "-q", "--ids", directory + "/window", "--logits", out,
              "--kv", kv)
    with open(out, "rb") as f:
        x = struct.unpack("<%df" % (len(window) * n_vocab), f.read())
    for i in range(first, len(window)):
        row = x[i * n_vocab:(i + 1) * n_vocab]
        total = math.log(math.fsum(math.exp(x) for x in row))
        yield [x - total for x in row]


def mean(values):
    return math.fsum(values) / len(values)


def error(values):
    centre = mean(values)
    return math.sqrt(mean([(x - centre) ** 2 for x in values]) /
                     (len(values) - 1))


def check(name, said, *values):
    for value, word in zip(values, re.findall(r"-?\d[\d.]*(?:e-?\d+)?", said)):
        digits, _, power = word.partition("e")
        unit = 10.0 ** -len(digits.partition(".")[2]) * float("1e" + (power or "0"))
        assert abs(value - float(word)) <= 0.51 * unit + 1e-5 * abs(value), \
            (name, said, value)


ids = [int(x) for x in output_of(run, model, "-q", "--tokenize", "--bos", "-f",
                                 text).split()]
new = []
for start in range(0, len(ids) - n_ctx + 1, n_ctx):
    window = [1] + ids[start + 1:start + n_ctx]
    rows = log_probs(window, "f16", n_ctx // 2)
    new += [-row[i] for row, i in zip(rows, window[n_ctx // 2 + 1:])]
ppl = math.exp(mean(new))
first = open(directory + "/first").read().splitlines()
check("perplexity", first[0], ppl, ppl * error(new))
check("scored", first[1], len(new))
said = json.load(open(directory + "/json"))
assert abs(said["perplexity"] - ppl) < 1e-5 * ppl and said["scored"] == len(new)

window = ids[:100]
pairs = list(zip(log_probs(window, "f16"), log_probs(window, "f32")))
kl = [math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q)) for p, q in pairs]
same = [p.index(max(p)) == q.index(max(q)) for p, q in pairs]
nll = [[-x[t] for x, t in zip(rows, window[1:])] for rows in zip(*pairs)]
ppl = [math.exp(mean(x)) for x in nll]
between = [ppl[1] * b - ppl[0] * a for a, b in zip(*nll)]
rank = 0.99 * (len(kl) - 1)
ordered = sorted(kl)
low, high = ordered[int(rank):int(rank) + 2]
files = [directory + "/f16", directory + "/f32"]
lines = {line[:14].rstrip(): line[15:] for line in output_of(
    sys.executable, "scripts/compare_logits.py", "--ids", directory + "/window",
    *files).decode().splitlines()}
check("A", lines["perplexity A"], ppl[0], ppl[0] * error(nll[0]))
check("B", lines["perplexity B"], ppl[1], ppl[1] * error(nll[1]))
check("difference", lines["difference"], ppl[1] - ppl[0], error(between))
check("KL", lines["KL divergence"], mean(kl), error(kl))
check("99", lines["  99 %"], low + (rank - int(rank)) * (high - low))
check("maximum", lines["  maximum"], ordered[-1])
check("same", lines["same top token"], 100 * mean(same))
END
holds "perplexity and divergence as computed from --logits" "$python" \
    "$dir/by_hand.py" "$run" $m "$text" "$dir"

# compare STATUS TEXT ARGUMENT...
compare() {
    want=$1 words=$2
    shift 2
    "$python" scripts/compare_logits.py "$@" >"$dir/out" 2>"$dir/err"
    [ $? -eq "$want" ] && cat "$dir/err" >>"$dir/out" &&
        grep -qF -- "$words" "$dir/out"
    result $? "compare_logits.py $*: expected \"$words\""
}
compare 0 "KL divergence  0 +/- 0" --ids "$dir/window" "$dir/f16" "$dir/f16"
compare 0 "same top token 100.000" --n-vocab 2048 --from 50 "$dir/f16" "$dir/f16"
head -c 8000 "$dir/f16" >"$dir/cut"
compare 1 "8000 bytes, but " --ids "$dir/window" "$dir/f16" "$dir/cut"
compare 1 "expected float32" --ids "$dir/window" "$dir/cut" "$dir/cut"
compare 1 "No such file" --ids "$dir/window" "$dir/none" "$dir/f16"
compare 2 "expected --ids or --n-vocab" "$dir/f16" "$dir/f16"
finish
