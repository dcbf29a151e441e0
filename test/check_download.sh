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

# downloads STATUS WHAT ARGUMENTS...: what download.sh says is in $dir/said.now; with
# $tools as its search path.
tools=
downloads() {
    want=$1 what=$2
    shift 2
    limited env PATH="${tools:-$PATH}" sh scripts/download.sh "$@" >"$dir/said" 2>&1
    status=$?
    cp "$dir/said" "$dir/said.now"
    [ $status -eq "$want" ]
    result $? "$what: status $status, expected $want"
}

file=$dir/out/LFM2-350M-Q4_0.gguf
downloads 0 "a fresh download" 350m q4_0 "$dir/out"
holds "has the right bytes" cmp -s "$good" "$file"
: >"$dir/port.log"
downloads 0 "a second one" 350m q4_0 "$dir/out"
holds "downloads nothing" [ ! -s "$dir/port.log" ]
rm "$file"
head -c 60000 "$good" >"$file.part"
downloads 0 "a cut one goes on" 350m q4_0 "$dir/out"
holds "where it stopped" grep -q 'Q4_0.gguf 60000' "$dir/port.log"
holds "and has the right bytes" cmp -s "$good" "$file"
mv "$file" "$file.part"
downloads 0 "one that only lacked its name" 350m q4_0 "$dir/out"
holds "has it now" cmp -s "$good" "$file"
rm "$file"
cat "$good" "$good" >"$file.part"
downloads 4 "a part that is no beginning of it is refused" 350m q4_0 "$dir/out"
holds "and deleted" [ ! -e "$file.part" ]
downloads 0 "a checksum from a file" 350m f16 "$dir/out"
downloads 4 "a wrong checksum is refused" 350m q8_0 "$dir/out"
holds "and nothing is kept" [ ! -e "$dir/out/LFM2-350M-Q8_0.gguf" ]
holds "not even a part" [ ! -e "$dir/out/LFM2-350M-Q8_0.gguf.part" ]
downloads 3 "a file the server does not have" 1.2b q4_0 "$dir/out"
holds "is told" grep -q "the server has no such file" "$dir/said.now"
downloads 2 "an unknown name" 9b q4_0
cp "$dir/said" "$dir/names"
holds "lists the known ones" grep -q '24b-a2b' "$dir/names"
downloads 2 "an unknown quant" 350m q9
downloads 2 "no arguments"
mirror=$LFM2_MIRROR
LFM2_MIRROR=http://127.0.0.1:1
downloads 3 "a server that is not there" 350m q4_0 "$dir/none"
holds "is told" grep -q "refuses connections" "$dir/said.now"
LFM2_MIRROR=http://nowhere.invalid
downloads 3 "no server of this name" 350m q4_0 "$dir/none"
holds "is told" grep -q "no such server" "$dir/said.now"

# only TOOLS...: a search path with these and what the script takes beside them.
only() {
    rm -rf "$dir/tools"
    mkdir "$dir/tools"
    for tool in sh awk sed tr tail head cut mkdir mv rm sha256sum shasum "$@"; do
        there=$(command -v $tool) && ln -s "$there" "$dir/tools/$tool"
    done
}
if command -v wget >/dev/null && only wget; then
    LFM2_MIRROR=$mirror
    rm -f "$file" "$file.part"
    tools=$dir/tools downloads 0 "with wget" 350m q4_0 "$dir/out"
    holds "has the right bytes" cmp -s "$good" "$file"
    tools=$dir/tools downloads 3 "with wget, no such file" 1.2b q4_0 "$dir/out"
    holds "is told" grep -q "the server has no such file" "$dir/said.now"
fi
only
tools=$dir/tools downloads 1 "with neither" 350m q4_0 "$dir/out"
holds "what to install" grep -q "apt-get install curl" "$dir/said.now"
finish
