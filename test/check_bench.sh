#!/bin/sh
# --bench: its table, records and refusals; the comparison with a llama-bench
# whose speeds are known; the plot.
#     RUN=./run test/check_bench.sh
. test/lib.sh

always="--bench $m"

# row TEST: the table has a line for it, with a speed that is not 0.
row() {
    grep -q "^| lfm2moe .* | CPU  *|  *[0-9]* |  *$1 |  *[1-9][0-9.]* ± " \
        "$dir/out"
}

# -------------------------------------------------------------------- the table

expect 0 "a table" -p 16 -n 4 -npl 1,3 -d 0,40 -r 2 -t 2
for name in pp16 tg4 "tg4 x 3" "pp16 @ d40" "tg4 @ d40" "tg4 x 3 @ d40"; do
    holds "it has $name" row "$name"
done
holds "llama-bench's columns" sh -c \
    "head -1 $dir/out | tr -d ' ' |
     grep -qF '|model|size|params|backend|threads|test|t/s|GB/s|GMAC/s|share|'"
for word in "usable CPU" kernels "2 threads read" \
    "first token after a prompt of 8" "resident at most" "GB/s a core" \
    "of the read bandwidth for answers"; do
    holds "it says $word" grep -qF "$word" "$dir/out"
done
holds "and nothing else" [ ! -s "$dir/err" ]
expect 0 "other kernels and cache" --isa scalar --kv f32 -p 4 -n 2 -r 1
holds "are named" grep -q "scalar, KV in f32" "$dir/out"
expect 0 "only prompts" -p 4,8 -n 0 -r 1
holds "no answers" sh -c "! grep -q tg $dir/out"
expect 0 "threads" -p 8 -n 0 -r 1 -t 1,2
holds "a limit for each number of them" \
    [ "$(grep -c '^limits ' "$dir/out")" -eq 2 ]
# A model that fits in the caches is faster than memory, which needs a word.
holds "a share above 100 % is explained" sh -c "! cut -d '|' -f 12 '$dir/out' |
    grep -q '[1-9][0-9][1-9] %' || grep -q 'above 100 %' '$dir/out'"

# ---------------------------------------------------------------------- records

odd="$dir/a \"b\" \\ c.gguf"
cp $m "$odd"
if command -v python3 >/dev/null; then
    "$run" --bench "$odd" -p 16 -n 4 -r 3 -o json >"$dir/json" 2>"$dir/err"
    holds "JSON" python3 -m json.tool "$dir/json"
    holds "its fields are llama-bench's and ours" python3 - "$dir/json" "$odd" \
        <<'END'
import json, math, sys
records = json.load(open(sys.argv[1]))
theirs = """build_commit build_number cpu_info backends model_filename
    model_type model_size model_n_params n_batch n_threads type_k type_v
    n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts stddev_ts
    samples_ns samples_ts""".split()
ours = """n_sequences isa read_bandwidth int8_rate gb_per_s share rss_peak
    rss_anon load_ms first_token_ms l2_gbs_core""".split()
assert [(r["n_prompt"], r["n_gen"]) for r in records] == [(16, 0), (0, 4)]
for r in records:
    assert not set(theirs + ours) - set(r), set(theirs + ours) - set(r)
    assert r["model_filename"] == sys.argv[2]
    assert len(r["samples_ns"]) == len(r["samples_ts"]) == 3
    mean = sum(r["samples_ts"]) / 3
    assert math.isclose(r["avg_ts"], mean, rel_tol=1e-4)
    assert all(v > 0 for v in r["samples_ts"])
    assert r["l2_gbs_core"] > 0
END
    expect 0 "memory" -p 0 -n 1 -npl 1,64 -d 1024 -r 1 -o json
    holds "is that of now" python3 -c "
import json
one, many = [r['rss_anon'] for r in json.load(open('$dir/out'))]
assert one is None or many > one + 64 * 1024 * 100, (one, many)"
else
    echo "skipped: the records, there is no python3"
fi

# --------------------------------------------------------------------- refusals

refuses 2 "expected a whole number from 1" -r 0
refuses 2 "expected at most 16 whole numbers from 1" -t 0
refuses 2 "whole numbers from 0" -p 8,
refuses 2 "whole numbers from 0" -n 8,x
refuses 2 "whole numbers from 0" -d -1
refuses 2 "whole numbers from 1" -npl 0
refuses 2 "at most 16" -p 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17
refuses 2 "unknown option -pg" -pg 8,2
refuses 2 "expected md|json" -o csv
refuses 2 "nothing to measure" -p 0 -n 0
refuses 2 "longer than any context" -d 16777216
refuses 2 "-c means nothing with --bench" -c 100
refuses 2 "PROMPT means nothing" hello
refuses 2 "-f means nothing" -f Makefile
refuses 2 "cannot be combined" --inspect
"$run" -d 8 $m hello >"$dir/out" 2>"$dir/err"
[ $? -eq 2 ] && grep -q -- "-d means nothing" "$dir/err"
result $? "its options are not for others"

# After a signal the list is closed.
for signal in INT:130 TERM:143; do
    interruptible "$run" --bench $m -p 0 -n 2000 -r 100000 -o json >"$dir/out" \
        2>"$dir/err" &
    pid=$!
    sleep 2
    kill -${signal%:*} $pid
    wait_within 60 $pid
    [ $? -eq "${signal#*:}" ] && [ "$(cat "$dir/out")" = "[]" ]
    result $? "SIG${signal%:*}: status ${signal#*:}, and the list is closed"
done

# ------------------------------------------------------------------- comparison

# fake FILE SPEEDS...: a llama-bench that reads prompts at these speeds in turn,
# and generates at a tenth of them.
fake() {
    file=$1
    shift
    echo "$*" >"$file.speeds"
    cat >"$file" <<'END'
#!/bin/sh
echo "$*" >>"$0.calls"
speed=$(cut -d ' ' -f "$(wc -l <"$0.calls" | tr -d ' ')" "$0.speeds")
record() {
    printf '  {\n    "model_filename": "a\\nb",\n    "model_type": "lfm2 X",\n'
    printf '    "n_prompt": %d,\n    "n_gen": %d,\n    "n_depth": %d,\n' \
        "$1" "$2" "$3"
    printf '    "avg_ts": %s,\n    "samples_ts": [ 1, 2 ]\n  }%s\n' "$4" "$5"
}
echo "["
record 16 0 "$(case "$*" in *"-d 32"*) echo 32 ;; *) echo 0 ;; esac)" \
    "$speed.5" ,
record 0 4 0 "$((speed / 10)).25" ""
echo "]"
END
    chmod +x "$file"
}

compare=scripts/compare_llama.sh
folder="$dir/a folder"
theirs="$folder/llama bench"
mkdir "$folder"
cp $m "$folder/a model.gguf"
fake "$folder/ours" 40 100 50
fake "$theirs" 10 30 20
RUN="$folder/ours" sh $compare -r 3 -t 2 -p 16 -n 4 "$theirs" \
    "$folder/a model.gguf" >"$dir/out" 2>"$dir/err"
result $? "a comparison"
holds "the medians of prompts, and their ratio" \
    grep -qxF "| lfm2 X | pp16 | 2 | 50.50 | 20.50 | 2.46 |" "$dir/out"
holds "and of answers" \
    grep -qxF "| lfm2 X | tg4 | 2 | 5.25 | 2.25 | 2.33 |" "$dir/out"
holds "nothing else is in the table" [ "$(wc -l <"$dir/out")" -eq 4 ]
holds "three rounds" [ "$(wc -l <"$theirs.calls")" -eq 3 ]
holds "of the same tests" grep -qF -- "-p 16 -n 4 -t 2 -r 1" "$theirs.calls"
fake "$folder/ours" 40 100
fake "$theirs" 10 30
rm "$folder"/*.calls
RUN="$folder/ours" sh $compare -r 2 -t 2 -p 16 -n 4 -d 32 "$theirs" \
    "$folder/a model.gguf" >"$dir/out" 2>"$dir/err"
holds "of two rounds the mean, at a depth" \
    grep -qxF "| lfm2 X | pp16 @ d32 | 2 | 70.50 | 20.50 | 3.44 |" "$dir/out"
rm "$folder"/*.calls
RUN="$run" sh $compare -r 1 -p 16 -n 4 "$theirs" $m "$folder/a model.gguf" \
    >"$dir/out" 2>"$dir/err"
holds "with the program itself, two models" \
    [ "$(grep -c '^| lfm2moe .* | [0-9.]* | [0-9.]* |$' "$dir/out")" -eq 4 ]

# complains STATUS TEXT ARGUMENTS...
complains() {
    want=$1 text=$2
    shift 2
    RUN="$run" limited sh $compare "$@" >"$dir/out" 2>"$dir/err"
    [ $? -eq "$want" ] && grep -qF -- "$text" "$dir/err"
    result $? "compare_llama.sh $*: expected \"$text\""
}
complains 2 "are needed"
complains 2 "are needed" "$theirs"
complains 2 "expected a whole number from 1" -r 0 "$theirs" $m
complains 2 "expected whole numbers" -p 1,,2 "$theirs" $m
complains 2 "unknown option -x" -x "$theirs" $m
complains 2 "-n needs a value" -n
complains 2 "no program to run" "$dir/none" $m
complains 2 "no file to read" "$theirs" "$dir/none"
complains 1 "failed with status 1" -p 4 -n 0 false $m
complains 1 "gave no results" -p 4 -n 0 true $m

# ------------------------------------------------------------------------- plot

if command -v python3 >/dev/null; then
    plot=scripts/plot_bench.py
    expect 0 "at depths and with threads" -p 8 -n 2 -r 1 -d 0,64 -t 1,2 -o json
    sed 's/"isa": "[^"]*", //; s/lfm2moe/<\&>/' "$dir/out" >"$dir/theirs.json"
    holds "a plot" python3 $plot -o "$dir/a plot.svg" "$dir/out" \
        "$dir/theirs.json"
    holds "is good XML, has four charts and names both" python3 -c "
import sys, xml.dom.minidom as dom
of = dom.parse(sys.argv[1]).getElementsByTagName
assert len(of('g')) == 4 and len(of('polyline')) == 16
said = ''.join(t.firstChild.data for t in of('text'))
assert 'lfm2.c' in said and 'llama.cpp' in said and '<&> ' in said" \
        "$dir/a plot.svg"
    expect 0 "one depth" -p 8 -n 2 -r 1 -o json
    holds "nothing to draw is said" sh -c "
        ! python3 $plot -o $dir/none.svg $dir/out 2>$dir/err &&
        grep -q 'nothing to draw' $dir/err && [ ! -e $dir/none.svg ]"
    holds "so is a file that has no records" sh -c "
        ! python3 $plot -o $dir/none.svg Makefile 2>$dir/err &&
        grep -q 'Makefile: no records' $dir/err"
else
    echo "skipped: the plot, there is no python3"
fi
finish
