#!/bin/sh
# A file that is not in memory is read ahead, inside of every sandbox, if there is
# memory for it; the answer is the same.
#     RUN=./run test/check_cold.sh
. test/lib.sh

[ "$(uname)" = Linux ] || skip "files not in memory, which needs Linux"
q="What is a short convolution?"
expect 0 "a file in memory" test/tiny.gguf --temp 0 -v "$q"
cp "$dir/out" "$dir/warm"
holds "is not read ahead" sh -c "! grep -q 'read ahead' $dir/err"

# cold: a file most of which is a hole that nobody has read.
cold() {
    rm -f "$dir/m.gguf"
    cp test/tiny.gguf "$dir/m.gguf"
    truncate -s "$1" "$dir/m.gguf"
}

modes="auto off"
"$run" --sandbox require -q -n 1 test/tiny.gguf hello >"$dir/said" 2>&1 &&
    modes="$modes require"
for sandbox in $modes; do
    cold 256M
    expect 0 "a cold file, sandbox $sandbox" "$dir/m.gguf" --temp 0 -v \
        --sandbox $sandbox "$q"
    says "m.gguf: not all in memory, read ahead"
    same "a cold file, sandbox $sandbox" "$dir/warm" "$dir/out"
done
cold 256M
expect 0 "--no-mmap" "$dir/m.gguf" --temp 0 -v --no-mmap "$q"
holds "reads it at once" sh -c "! grep -q 'read ahead' $dir/err"

# More than there is memory for.
cold 256M
if truncate -s 4T "$dir/m.gguf" 2>/dev/null; then
    expect 0 "a large file" "$dir/m.gguf" --temp 0 -v "$q"
    holds "is left to itself" sh -c "! grep -q 'read ahead' $dir/err"
    same "a large file" "$dir/warm" "$dir/out"
fi
finish
