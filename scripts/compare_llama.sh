#!/bin/sh
# Our --bench and a llama-bench in turn on the same files, several rounds, and
# the medians beside each other: a machine that is slower for a while is so for
# both.
#
#     scripts/compare_llama.sh [OPTIONS] LLAMA_BENCH MODEL.gguf...
#
#     -r ROUNDS   how many (5)              -p N,..   prompts of N tokens (512)
#     -t N        threads (one per CPU)     -n N,..   N tokens generated (128)
#     -d N,..     after N tokens (0)
#
# In each round both measure each test once, after a warm-up; the one that went
# first goes second in the next.  RUN names another program than ./run.
set -eu

run=${RUN:-$(dirname "$0")/../run}

say() {
    echo "compare_llama.sh: $*" >&2
}

usage() {
    [ $# -eq 0 ] || say "$*"
    {
        echo "usage: scripts/compare_llama.sh [-r ROUNDS] [-t N] [-p N,..]" \
            "[-n N,..] [-d N,..] \\"
        echo "           LLAMA_BENCH MODEL.gguf..."
    } >&2
    exit 2
}

# a_list OPTION VALUE: the value is one whole number or some, by commas.
a_list() {
    case $2 in
    '' | *[!0-9,]* | ,* | *, | *,,*)
        usage "$1 $2: expected whole numbers, by commas" ;;
    esac
}

# a_count OPTION VALUE: the value is a whole number from 1.
a_count() {
    case $2 in
    '' | *[!0-9]* | 0*) usage "$1 $2: expected a whole number from 1" ;;
    esac
}

rounds=5 threads='' prompt=512 gen=128 depth=0
while getopts :r:t:p:n:d: option; do
    case $option in
    r) a_count -r "$OPTARG"; rounds=$OPTARG ;;
    t) a_count -t "$OPTARG"; threads=$OPTARG ;;
    p) a_list -p "$OPTARG"; prompt=$OPTARG ;;
    n) a_list -n "$OPTARG"; gen=$OPTARG ;;
    d) a_list -d "$OPTARG"; depth=$OPTARG ;;
    :) usage "-$OPTARG needs a value" ;;
    *) usage "unknown option -$OPTARG" ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 2 ] || usage "a llama-bench and a model are needed"
theirs=$1
shift
command -v "$theirs" >/dev/null || usage "$theirs: no program to run"
command -v "$run" >/dev/null || usage "$run: no program to run; make it first"
for model in "$@"; do
    [ -r "$model" ] || usage "$model: no file to read"
done

# Both get the same number of threads: they would count CPUs each in its way.
[ -n "$threads" ] || threads=$(nproc 2>/dev/null ||
    getconf _NPROCESSORS_ONLN)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# measure WHO PROGRAM...: a line for each test goes to $dir/results.  With a line
# break for each comma the JSON has a key a line; avg_ts comes after the others.
measure() {
    who=$1
    shift
    "$@" -m "$model" -p "$prompt" -n "$gen" -t "$threads" -r 1 -o json \
        >"$dir/json" 2>"$dir/messages" || {
        status=$?
        tail -3 "$dir/messages" >&2
        say "$1 failed with status $status on $model"
        exit 1
    }
    tr , '\n' <"$dir/json" | awk -v who="$who" -v model="$n_model" '
        function number() { sub(/^[^:]*: */, ""); return $0 + 0 }
        /^ *"n_prompt": /   { prompt = number() }
        /^ *"n_gen": /      { gen = number() }
        /^ *"n_depth": /    { depth = number() }
        /^ *"model_type": / { type = $0; sub(/^[^:]*: *"/, "", type)
                              sub(/" *$/, "", type) }
        /^ *"avg_ts": /     {
            speed = number()
            test = prompt ? "pp" prompt : ""
            test = test (prompt && gen ? "+" : "") (gen ? "tg" gen : "")
            test = test (depth ? " @ d" depth : "")
            print who "\t" model "\t" type "\t" test "\t" speed
            depth = 0
        }' >"$dir/lines"
    [ -s "$dir/lines" ] || {
        say "$1 gave no results on $model"
        exit 1
    }
    cat "$dir/lines" >>"$dir/results"
}

# An older llama-bench does not know -d.
ours() {
    measure ours "$run" --bench -d "$depth"
}
theirs() {
    if [ "$depth" = 0 ]; then
        measure theirs "$theirs" -ngl 0
    else
        measure theirs "$theirs" -ngl 0 -d "$depth"
    fi
}

round=1
while [ "$round" -le "$rounds" ]; do
    n_model=0
    for model in "$@"; do
        n_model=$((n_model + 1))
        say "round $round of $rounds, $model"
        if [ $((round % 2)) -eq 1 ]; then
            ours
            theirs
        else
            theirs
            ours
        fi
    done
    round=$((round + 1))
done

echo "| model | test | threads | lfm2.c t/s | llama.cpp t/s | ratio |"
echo "| --- | ---: | ---: | ---: | ---: | ---: |"
awk -F '\t' -v threads="$threads" '
    function median(list, n, i, j, x, v) {
        n = split(list, v, " ")
        for (i = 2; i <= n; i++) {
            x = v[i] + 0
            for (j = i - 1; j > 0 && v[j] + 0 > x; j--)
                v[j + 1] = v[j]
            v[j + 1] = x
        }
        return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
    }
    {
        key = $2 FS $4
        if (!(key in seen)) {
            seen[key] = 1
            order[++n_keys] = key
        }
        if ($1 == "ours" || !(key in type))
            type[key] = $3
        speeds[$1, key] = speeds[$1, key] " " $5
    }
    END {
        for (i = 1; i <= n_keys; i++) {
            key = order[i]
            split(key, part, FS)
            a = median(speeds["ours", key])
            b = median(speeds["theirs", key])
            ratio = b > 0 ? sprintf("%.2f", a / b) : "-"
            printf "| %s | %s | %d | %.2f | %.2f | %s |\n", type[key], part[2],
                threads, a, b, ratio
        }
    }' "$dir/results"
