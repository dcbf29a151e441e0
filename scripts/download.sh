#!/bin/sh
# Download a model from Hugging Face, with resume and checksum.
#
#     scripts/download.sh                      the names it knows
#     scripts/download.sh 1.2b q4_0 [FOLDER]   into FOLDER, else here
#
# LFM2_MIRROR sets another server with the same paths (https://huggingface.co).
# The checksum comes from the server: the X-Linked-Etag header of the hub, else a
# file FILE.sha256 beside the model.
set -eu

mirror=${LFM2_MIRROR:-https://huggingface.co}

# name: repository and the beginning of its files
models='
350m            LFM2-350M
700m            LFM2-700M
1.2b            LFM2-1.2B
2.6b            LFM2-2.6B
8b-a1b          LFM2-8B-A1B
24b-a2b         LFM2-24B-A2B
2.5-230m        LFM2.5-230M
2.5-350m        LFM2.5-350M
2.5-1.2b        LFM2.5-1.2B-Instruct
2.5-1.2b-base   LFM2.5-1.2B-Base
2.5-thinking    LFM2.5-1.2B-Thinking
2.5-2.6b        LFM2.5-2.6B
2.5-8b-a1b      LFM2.5-8B-A1B
'
quants='q4_0 q4_k_m q5_k_m q6_k q8_0 f16'

say() {
    echo "download.sh: $*" >&2
}

usage() {
    {
        echo "usage: scripts/download.sh NAME QUANT [FOLDER]"
        echo "names:  $(echo "$models" | awk 'NF { printf "%s ", $1 }')"
        echo "quants: $quants"
    } >&2
    exit 2
}

[ $# -ge 2 ] && [ $# -le 3 ] || usage
base=$(echo "$models" | awk -v name="$1" '$1 == name { print $2 }')
[ -n "$base" ] || { say "no model named $1"; usage; }
case " $quants " in
*" $2 "*) ;;
*) say "no quant named $2"; usage ;;
esac
folder=${3:-.}
file=$base-$(echo "$2" | tr a-z A-Z).gguf
url=$mirror/LiquidAI/$base-GGUF/resolve/main/$file
target=$folder/$file

# get URL FILE: the rest of FILE, or all of it.  head_of URL: what is said of it.
# why STATUS: what went wrong.
if command -v curl >/dev/null; then
    head_of() { curl -fsSIL "$1"; }
    text_of() { curl -fsL "$1"; }
    # 416: the part has all the bytes there are, or more; the checksum will tell.
    get() {
        code=$(curl -fL --retry 5 --retry-delay 1 -C - -o "$2" -w '%{http_code}' \
            "$1") || [ "$code" = 416 ]
    }
    why() {
        case $1 in
        5 | 6) echo "no network, or no such server" ;;
        7) echo "the server refuses connections, or a firewall does" ;;
        22) echo "the server has no such file, or does not give it away" ;;
        28) echo "the server does not answer in time" ;;
        35 | 51 | 60) echo "no safe connection: is the clock right, and are" \
            "ca-certificates installed?" ;;
        *) echo "curl ends with status $1" ;;
        esac
    }
elif command -v wget >/dev/null; then
    head_of() { wget -q -S --spider "$1" 2>&1; }
    text_of() { wget -qO - "$1"; }
    get() { wget -q -c -O "$2" "$1"; }
    why() {
        case $1 in
        4) echo "no network, no such server, or it refuses connections" ;;
        5) echo "no safe connection: is the clock right, and are" \
            "ca-certificates installed?" ;;
        6 | 8) echo "the server has no such file, or does not give it away" ;;
        *) echo "wget ends with status $1" ;;
        esac
    }
else
    say "needs curl or wget: apt-get install curl, dnf install curl, apk add" \
        "curl or brew install curl"
    exit 1
fi
if command -v sha256sum >/dev/null; then
    hash_of() { sha256sum "$1" | cut -d' ' -f1; }
else
    hash_of() { shasum -a 256 "$1" | cut -d' ' -f1; }
fi

# 64 hexadecimal digits, or nothing.
status=0
head=$(head_of "$url" 2>/dev/null) || status=$?
[ $status -eq 0 ] || { say "$url: $(why $status)"; exit 3; }
expected=$(echo "$head" | tr -d '\r"' |
    sed -n 's/^ *[Xx]-[Ll]inked-[Ee][Tt]ag: *\([0-9a-f]\{64\}\)$/\1/p' | tail -1)
[ -n "$expected" ] || expected=$(text_of "$url.sha256" |
    sed -n 's/^\([0-9a-f]\{64\}\).*/\1/p' | head -1)

if [ -e "$target" ] && [ "$(hash_of "$target")" = "$expected" ]; then
    say "$target is there already, checksum right"
    exit 0
fi
[ -n "$expected" ] || { say "$url: the server gives no checksum"; exit 3; }
mkdir -p "$folder"
say "$url"
status=0
get "$url" "$target.part" || status=$?
if [ $status -ne 0 ]; then
    say "$url: interrupted: $(why $status); the same command goes on where it" \
        "stopped"
    exit 3
fi
found=$(hash_of "$target.part")
if [ "$found" != "$expected" ]; then
    rm -f "$target.part"
    say "$file: SHA-256 $found, expected $expected; deleted"
    exit 4
fi
mv "$target.part" "$target"
say "$target, checksum right; now: ./run $target \"a question\""
