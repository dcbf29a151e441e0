#!/bin/sh
# scripts/make_synthetic.py: the first layers of a big model open and run, and
# the parameters add up to the published numbers.
set -u

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
python=python3
[ -x /usr/bin/python3 ] && python=/usr/bin/python3
if ! $python -c 'import numpy' 2>/dev/null; then
    echo "skipped: the synthetic models need python3 and numpy"
    echo "0 passed, 0 failed"
    exit 0
fi

holds() {
    what=$1
    shift
    if "$@" >"$dir/said" 2>&1; then
        passed=$((passed + 1))
        echo "ok     $what"
    else
        failed=$((failed + 1))
        echo "FAIL   $what"
        cat "$dir/said"
    fi
}

write() {
    $python scripts/make_synthetic.py "$@"
}

# NAME PARAMETERS-IN-ALL: without writing the file.
total() {
    $python - "$1" "$2" <<'END'
import sys
sys.path.insert(0, "scripts")
import math
import make_synthetic as s
n = sum(math.prod(shape) for _, _, shape in s.shapes(s.MODELS[sys.argv[1]]))
print(n)
sys.exit(n != int(sys.argv[2]))
END
}

holds "230m has its parameters" total 230m 229693184
holds "350m has its parameters" total 350m 354483968
holds "700m has its parameters" total 700m 742489344
holds "1.2b has its parameters" total 1.2b 1170340608
holds "2.6b has its parameters" total 2.6b 2569272320
holds "8b-a1b has its parameters" total 8b-a1b 8339930560
holds "24b-a2b has its parameters" total 24b-a2b 23843661440
holds "a file is written" write 230m q4_k_m "$dir/a.gguf" --layers 3
holds "twice the same" write 230m q4_k_m "$dir/b.gguf" --layers 3
holds "twice the same bytes" cmp "$dir/a.gguf" "$dir/b.gguf"
holds "it opens" "${RUN:-./run}" --inspect "$dir/a.gguf"
grep -q '^size .*parameters' "$dir/said"
holds "and continues text" "${RUN:-./run}" -q --raw -n 2 "$dir/a.gguf" hello
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
