#!/bin/sh
# Fuzz the targets for so many seconds each.  What is found stays in
# build/fuzz/found/TARGET; what was learnt, in build/fuzz/corpus/TARGET.
#     test/fuzz.sh SECONDS TARGET...
set -u

seconds=$1
shift
status=0
for target in "$@"; do
    known=build/fuzz/corpus/$target found=build/fuzz/found/$target
    mkdir -p "$known" "$found"
    case $target in
    gguf | inspect) longest=65536 ;;
    vocab | state) longest=16384 ;;
    text | calls) longest=512 ;;
    *) longest=4096 ;;
    esac
    FUZZ_TARGET=$target build/fuzz/fuzz -max_total_time="$seconds" \
        -max_len=$longest -timeout=20 -rss_limit_mb=2500 \
        -print_final_stats=1 -artifact_prefix="$found/" "$known" \
        "test/corpus/$target" 2>"$found/log"
    if [ $? = 0 ]; then
        sed -n 's/^stat::number_of_executed_units: *\(.*\)/\1 inputs/p' \
            "$found/log" | sed "s/^/$target: /"
    else
        tail -30 "$found/log"
        echo "$target: FAILED, see $found; add the input to" \
            "test/corpus/$target when it is repaired"
        status=1
    fi
done
exit $status
