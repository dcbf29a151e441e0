#!/bin/sh
# scripts/make_synthetic.py: whole models have the published numbers of
# parameters and bytes, a few layers of one open and run, and a file of the
# shape of the largest is described as it should be.
. test/lib.sh

needs_python numpy "the synthetic models"
script=scripts/make_synthetic.py

# MODEL QUANT PARAMETERS TENSORS BYTES, without writing the file.
shape() {
    "$python" $script "$1" "$2" "$dir/none.gguf" --dry-run >"$dir/shape"
    grep ": $3 parameters in $4 tensors, $5 bytes" "$dir/shape" ||
        { cat "$dir/shape"; return 1; }
}

while read -r model quant n_params n_tensors n_bytes; do
    holds "$model $quant has its published size" \
        shape "$model" "$quant" "$n_params" "$n_tensors" "$n_bytes"
done <<'END'
230m q4_0 229693184 132 146693120
350m q8_0 354483968 148 376830976
700m q4_k_m 742489344 148 466240512
1.2b q4_0 1170340608 148 693365760
1.2b q4_k_m 1170340608 148 728509440
2.6b q4_k_m 2569272320 266 1561276416
8b-a1b q4_0 8339930560 256 4731500288
24b-a2b q4_0 23843661440 428 13465000448
24b-a2b q4_k_m 23843661440 428 14413068800
lfm2.5-2.6b q4_k_m 2697198592 266 1666215936
lfm2.5-8b-a1b q4_k_m 8467856832 256 5147326208
END

# Three layers, the last of which attends: 21 MB, written in a second.
write() {
    "$python" $script 230m "$1" "$dir/$2.gguf" --layers 3 --vocab 2048
}
size_line() {
    "$run" --inspect "$1" >"$dir/inspect" && cat "$dir/inspect" &&
        grep -q "^  parameters  *$2\$" "$dir/inspect" &&
        grep -q "^  active  *$3\$" "$dir/inspect"
}
holds "a file is written" write q4_0 a
holds "and again" write q4_0 b
holds "with the same bytes" cmp "$dir/a.gguf" "$dir/b.gguf"
holds "it has its parameters" size_line "$dir/a.gguf" "37.24 M" "37.24 M"
holds "it continues text" "$run" -q --raw --temp 0 -n 2 "$dir/a.gguf" hello
holds "so does one of mixed types" write q4_k_m b
holds "which opens" "$run" -q --raw --temp 0 -n 2 "$dir/b.gguf" hello

# The largest, with a hole where the weights are: it takes no room on the disk
# and, as nothing but the head is read, no time.
hole() {
    "$python" - "$dir/hole.gguf" <<'END'
import os, sys
sys.path.insert(0, "scripts")
import gguf, make_synthetic as s

class Hole:
    def __init__(self, size):
        self.size = size
    def __len__(self):
        return self.size
    def parts(self):
        return []

path, m = sys.argv[1], s.MODELS["24b-a2b"]
made = [(name, s.tensor_type("q4_0", name, layer, m), shape)
        for name, layer, shape in s.shapes(m)]
made = [gguf.Tensor(name, t, shape, Hole(gguf.n_bytes(t, shape)))
        for name, t, shape in made]
gguf.write(path, s.metadata("24b-a2b", m, "q4_0", True), made)
os.truncate(path, os.path.getsize(path) + sum(len(x.raw) for x in made))
END
}
case $(uname -s)-$(uname -m) in
    Linux-*64*)
        holds "a file with a hole is written" hole
        holds "it is the 24B model" \
            size_line "$dir/hole.gguf" "23.84 B" "2.33 B"
        holds "a token reads a tenth of it" grep -q \
            "^  bytes_per_token  *1.36 GB\$" "$dir/inspect"
        ;;
    *)  echo "skipped: files with holes need a 64-bit Linux" ;;
esac
finish
