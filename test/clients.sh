#!/bin/sh
# Clients that others have written, from the npm registry, against a server:
# OpenAI's, Vercel's AI SDK and LangChain's.  make check-clients runs it; it
# needs node 20 or newer, npm, and the registry for the first time.
#     RUN=./run test/clients.sh
. test/lib.sh

to=build/clients
node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' 2>"$dir/err" ||
    skip "clients, which need node 20 or newer"
mkdir -p $to
echo '{ "private": true, "dependencies": { "openai": "6.49.0", "ai": "6.0.326",
"@ai-sdk/openai-compatible": "2.0.92", "@langchain/openai": "1.5.8",
"@langchain/core": "1.4.0", "zod": "4.6.7" } }' >"$dir/package.json"
if ! cmp -s "$dir/package.json" $to/asked.json; then
    cp "$dir/package.json" $to/package.json
    (cd $to && npm install --no-audit --no-fund --loglevel=error) \
        >"$dir/err" 2>&1 || {
        cat "$dir/err"
        skip "clients, which npm could not install"
    }
    cp "$dir/package.json" $to/asked.json
fi

# The parrot calls a function, and when it has heard "AB" from it, thinks and
# answers.
printf '%s\n' '<|tool_call_start|>	[weather(city="Oslo", days=3)]	<|tool_call_end|>' \
    '<think>	Cold.	</think>	Take a coat.' | "$parrot" "$dir/parrot.gguf" think=1

# serves NAME OPTIONS...: a server, whose address is then in $at.
servers=
trap 'kill $servers 2>/dev/null; rm -rf "$dir"' EXIT
serves() {
    name=$1
    shift
    "$run" "$@" --serve 0 -t 1 2>"$dir/$name" &
    servers="$servers $!"
    within 30 grep -q "listening on" "$dir/$name" || cat "$dir/$name"
    at=$(sed -n 's/.*listening on //p' "$dir/$name")
}

echo "a-key" >"$dir/keys"
serves model $m --api-key-file "$dir/keys"
model=$at
serves parrot "$dir/parrot.gguf" --temp 0
cp test/clients.mjs $to/clients.mjs
counted node $to/clients.mjs "$model" a-key "$at"
kill $servers
for server in $servers; do
    wait_within 10 "$server"
    holds "the server ends well" [ $? = 0 ]
done
servers=
finish
