#!/bin/sh
# The Python beside the program: it reads the shipped model, computes the same
# logits from the equations, and its tables are those in lfm2.c.
. test/lib.sh

needs_python numpy "the tests of scripts/"

# close A B BOUND: the largest difference of two files of float32.
close() {
    "$python" - "$@" <<'END'
import sys
import numpy as np
a, b = (np.fromfile(f, "<f4") for f in sys.argv[1:3])
worst = np.abs(a - b).max() if a.shape == b.shape else np.inf
print(worst)
sys.exit(not worst < float(sys.argv[3]))
END
}

holds "gguf.py shows the tensors of the shipped model" sh -c \
    "$python scripts/gguf.py show test/tiny.gguf | grep -q ffn_gate_exps"
holds "reference.py computes its logits" "$python" scripts/reference.py \
    test/tiny.gguf test/tiny.ids "$dir/logits"
holds "which are those of the training script" \
    close test/tiny.logits "$dir/logits" 1e-4
holds "corpus.py prints its numbers" "$python" scripts/corpus.py
if head -1 /usr/share/unicode/PropList.txt 2>/dev/null | grep -q 15.0; then
    holds "the Unicode tables in lfm2.c are the generated ones" \
        "$python" scripts/make_unicode.py --check lfm2.c
else
    echo "skipped: the Unicode tables, there is no Unicode 15.0 here"
fi
finish
