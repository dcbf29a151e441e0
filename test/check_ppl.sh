#!/bin/sh
# --ppl: perplexity and KL divergence against a computation from --logits, files
# of saved logits, and what is refused.
#     RUN=./run test/check_ppl.sh
. test/lib.sh

m=test/tiny.gguf text=$dir/text saved=$dir/saved
always="$m --ppl $text -c 32"
head -c 1500 test/questions.txt >"$text"

# prints WHAT WORDS...: the last output has a line that begins so.
prints() {
    what=$1
    shift
    grep -qE -- "^$*" "$dir/out"
    result $? "$what: expected \"$*\""
}

# ---------------------------------------------------------------------- results

expect 0 "a perplexity"
cp "$dir/out" "$dir/first"
holds "is all that is said" [ ! -s "$dir/err" ]
for how in "-b 1" "-b 7" "-b 64" "-b 2048" "-t 1" "-t 3" "--isa scalar" -q; do
    # shellcheck disable=SC2086
    expect 0 "$how" $how
    same "the same with $how" "$dir/first" "$dir/out"
done
"$run" $m --ppl - -c 32 <"$text" >"$dir/out" 2>"$dir/err"
same "the same from a pipe" "$dir/first" "$dir/out"
expect 0 "-v" -v
same "-v changes nothing on standard output" "$dir/first" "$dir/out"
holds "and says what comes of each window" \
    grep -q 'window 2 of [0-9]*: perplexity' "$dir/err"

expect 0 "--ppl-save" --ppl-save "$saved"
same "the same while it is saved" "$dir/first" "$dir/out"
for how in "-b 5 -t 1" "-b 512"; do
    # shellcheck disable=SC2086
    expect 0 "--ppl-save $how" --ppl-save "$dir/again" $how
    same "the same file with $how" "$saved" "$dir/again"
done
expect 0 "a run against itself" --ppl-compare "$saved" -b 9
prints "a run against itself" 'difference +0\.000000 \+/- 0\.000000$'
prints "a run against itself" 'KL divergence +0 \+/- 0$'
prints "a run against itself" ' +maximum +0$'
prints "a run against itself" 'same top token 100\.000 \+/- 0\.000 %$'
expect 0 "another precision against it" --ppl-compare "$saved" --kv f32 \
    --ppl-save "$dir/again"
cp "$dir/out" "$dir/compared"

# ---------------------------------------------------------------------- refused

refuses 2 "at least 1600, two windows" -c 800
refuses 2 "at least 3 tokens" -c 2
refuses 2 "takes no other text" hello
refuses 2 "more than one of" --tokenize
refuses 2 "need a file" --ppl-save -
refuses 2 "would overwrite" --ppl-save "$saved" --ppl-compare "$saved"
refuses 3 "No such file" --ppl-save "$dir/no/such"
refuses 3 "No such file" --ppl-compare "$dir/none"
refuses 3 "$dir" --ppl-compare "$dir"
"$run" $m --ppl-save "$saved" hello >"$dir/out" 2>"$dir/err"
[ $? -eq 2 ] && grep -q 'are for --ppl' "$dir/err"
result $? "--ppl-save alone"
"$run" $m --ppl "$dir/none" >"$dir/out" 2>"$dir/err"
[ $? -eq 3 ]
result $? "a text that is not there"
[ ! -e /dev/full ] || refuses 3 "/dev/full: " --ppl-save /dev/full

size=$(wc -c <"$saved")
for n in 0 7 20; do
    head -c $n "$saved" >"$dir/bad"
    refuses 3 "not a file of --ppl-save" --ppl-compare "$dir/bad"
done
head -c 1000 "$saved" >"$dir/bad"
refuses 3 "cut short after 1000 bytes" --ppl-compare "$dir/bad"
head -c $((size - 1)) "$saved" >"$dir/bad"
refuses 3 "$((size - 1)) bytes, expected $size" --ppl-compare "$dir/bad"
{ cat "$saved"; echo; } >"$dir/bad"
refuses 3 "$((size + 1)) bytes, expected $size" --ppl-compare "$dir/bad"

# poke OFFSET: a copy of the saved file with another byte there.
poke() {
    cp "$saved" "$dir/bad"
    printf '\001' | dd of="$dir/bad" bs=1 seek="$1" conv=notrunc 2>"$dir/said"
    ! cmp -s "$saved" "$dir/bad"
    result $? "byte $1 was another"
}

poke 2
refuses 3 "not a file of --ppl-save" --ppl-compare "$dir/bad"
poke 10
refuses 3 "version 65537, expected 1" --ppl-compare "$dir/bad"
poke 14
refuses 3 "a vocabulary of 67584, expected 2048" --ppl-compare "$dir/bad"
poke 26
refuses 3 "damaged, its checksum is wrong" --ppl-compare "$dir/bad"
poke $((size - 50))
refuses 3 "damaged, the checksum of row" --ppl-compare "$dir/bad"
poke $((size - 3))
refuses 3 "damaged, the checksum of row" --ppl-compare "$dir/bad"
refuses 3 "windows of (-c) 32, expected 33" --ppl-compare "$saved" -c 33
tr a e <"$text" | head -c 1480 >"$dir/other"
always="$m --ppl $dir/other -c 32"
expect 3 "another text" --ppl-compare "$saved"
holds "is told" grep -qE "another text|windows: " "$dir/err"
always="$m --ppl $text -c 32"

# ------------------------------------------------------------- the same by hand

needs_python struct "the values of --ppl"
cat >"$dir/by_hand.py" <<'END'
"""Perplexity and divergence of --kv f32 from f16, from logits of each window
read alone; and whether the program printed the same."""
import math
import re
import struct
import subprocess
import sys

run, model, text, compared, directory = sys.argv[1:]
n_ctx, n_vocab = 32, 2048
first = n_ctx // 2


def output_of(*arguments):
    return subprocess.run([run, model, "-q", *arguments], check=True,
                          stdout=subprocess.PIPE).stdout


def log_probs(window, kv):
    with open(directory + "/window", "wb") as f:
        f.write(struct.pack("<%di" % n_ctx, *window))
    raw = output_of("--ids", directory + "/window", "--logits", "-", "--kv", kv)
    logits = struct.unpack("<%df" % (n_ctx * n_vocab), raw)
    for i in range(first, n_ctx - 1):
        row = logits[i * n_vocab:(i + 1) * n_vocab]
        total = math.log(math.fsum(math.exp(x) for x in row))
        yield [x - total for x in row]


def mean(values):
    return math.fsum(values) / len(values)


def error(values):
    centre = mean(values)
    return math.sqrt(mean([(x - centre) ** 2 for x in values]) /
                     (len(values) - 1))


ids = [int(x) for x in output_of("--tokenize", "--bos", "-f", text).split()]
new, old, kl, same = [], [], [], 0
for start in range(0, len(ids) - n_ctx + 1, n_ctx):
    window = [1] + ids[start + 1:start + n_ctx]
    pairs = zip(log_probs(window, "f32"), log_probs(window, "f16"))
    for i, (q, p) in enumerate(pairs, first + 1):
        new.append(-q[window[i]])
        old.append(-p[window[i]])
        kl.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q)))
        same += p.index(max(p)) == q.index(max(q))
kl.sort()
rank = 0.99 * (len(kl) - 1)
below = kl[int(rank)]
ppl, base = math.exp(mean(new)), math.exp(mean(old))
ratio = [ppl * a - base * b for a, b in zip(new, old)]
expected = {
    "perplexity": (ppl, ppl * error(new)), "scored": (len(new),),
    "saved run": (base, base * error(old)),
    "difference": (ppl - base, error(ratio)),
    "KL divergence": (mean(kl), error(kl)), "  maximum": (kl[-1],),
    "  99 %": (below + (rank - int(rank)) * (kl[int(rank) + 1] - below),),
    "same top token": (100 * same / len(kl),),
}
wrong = 0
for line in open(compared):
    for name, values in expected.items():
        if not line.startswith(name):
            continue
        said = re.findall(r"-?\d[\d.]*(?:e-?\d+)?", line[len(name):])
        for value, word in zip(values, said):
            digits = len(word.partition("e")[0].partition(".")[2])
            unit = 10.0 ** -digits * float("1e" + (word.partition("e")[2] or
                                                   "0"))
            if abs(value - float(word)) > 0.51 * unit + 1e-5 * abs(value):
                wrong += 1
                print("%r, but %s is %.9g" % (line, name, value))
        values = expected[name] = ()
if any(expected.values()):
    print("not all was printed")
sys.exit(wrong or any(expected.values()))
END
holds "perplexity and divergence as computed from --logits" "$python" \
    "$dir/by_hand.py" "$run" $m "$text" "$dir/compared" "$dir"
finish
