#!/bin/sh
# scripts/download.sh against a file server on this machine.
. test/lib.sh

command -v curl >/dev/null || skip "the downloader, which needs curl"
needs_python http.server "the downloader"
mkdir "$dir/files" "$dir/out"
"$python" test/serve.py "$dir/files" "$dir/port" &
server=$!
trap 'kill $server 2>/dev/null; rm -rf "$dir"' EXIT
within 30 [ -s "$dir/port" ]
LFM2_MIRROR=http://127.0.0.1:$(cat "$dir/port")
export LFM2_MIRROR
for name in 350M-Q4_0 350M-Q8_0 350M-F16; do
    head -c 100000 lfm2.c >"$dir/files/LFM2-$name.gguf"
done
good=$dir/files/LFM2-350M-Q4_0.gguf
sha256sum <"$dir/files/LFM2-350M-F16.gguf" \
    >"$dir/files/LFM2-350M-F16.gguf.sha256"

# expect STATUS WHAT ARGUMENTS...: what download.sh says is in $dir/said.
expect() {
    want=$1 what=$2
    shift 2
    limited sh scripts/download.sh "$@" >"$dir/said" 2>&1
    status=$?
    [ $status -eq "$want" ]
    result $? "$what: status $status, expected $want"
}

file=$dir/out/LFM2-350M-Q4_0.gguf
expect 0 "a fresh download" 350m q4_0 "$dir/out"
holds "has the right bytes" cmp -s "$good" "$file"
: >"$dir/port.log"
expect 0 "a second one" 350m q4_0 "$dir/out"
holds "downloads nothing" [ ! -s "$dir/port.log" ]
rm "$file"
head -c 60000 "$good" >"$file.part"
expect 0 "a cut one goes on" 350m q4_0 "$dir/out"
holds "where it stopped" grep -q 'Q4_0.gguf 60000' "$dir/port.log"
holds "and has the right bytes" cmp -s "$good" "$file"
mv "$file" "$file.part"
expect 0 "one that only lacked its name" 350m q4_0 "$dir/out"
holds "has it now" cmp -s "$good" "$file"
rm "$file"
cat "$good" "$good" >"$file.part"
expect 4 "a part that is no beginning of it is refused" 350m q4_0 "$dir/out"
holds "and deleted" [ ! -e "$file.part" ]
expect 0 "a checksum from a file" 350m f16 "$dir/out"
expect 4 "a wrong checksum is refused" 350m q8_0 "$dir/out"
holds "and nothing is kept" [ ! -e "$dir/out/LFM2-350M-Q8_0.gguf" ]
holds "not even a part" [ ! -e "$dir/out/LFM2-350M-Q8_0.gguf.part" ]
expect 3 "a file the server does not have" 1.2b q4_0 "$dir/out"
expect 2 "an unknown name" 9b q4_0
cp "$dir/said" "$dir/names"
holds "lists the known ones" grep -q '24b-a2b' "$dir/names"
expect 2 "an unknown quant" 350m q9
expect 2 "no arguments"
LFM2_MIRROR=http://127.0.0.1:1
expect 3 "a server that is not there" 350m q4_0 "$dir/none"
finish
