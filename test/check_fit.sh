#!/bin/sh
# Answers in a schema: of models that say what fits, what does not, or anything.
#     RUN=./run PARROT=build/test/parrot NOISE=build/test/noise test/check_fit.sh
# SCHEMAS=10000 tries so many random schemas, instead of a few.
. test/lib.sh

noise=${NOISE:-build/test/noise} n=${SCHEMAS:-500}

# wants SCRIPT [KEY=TEXT...]: $m is a model that wants to say this, ~ between
# its tokens.
wants() {
    printf '%s\n' "$1" | tr '~' '\t' >"$dir/script"
    shift
    m=$dir/parrot.gguf
    "$parrot" "$m" think=1 "$@" <"$dir/script"
}

# answers WHAT SCRIPT TEXT [OPTIONS...]: who wants to say SCRIPT says TEXT.
answers() {
    wants "$2"
    what=$1 text=$3
    shift 3
    expect 0 "$what" -q --temp 0 "$m" "hello" --json-schema "$dir/schema" "$@"
    prints "$what" "$text"
}

# --------------------------------------------------------------- --json-schema

cat >"$dir/schema" <<'END'
{"type": "object", "properties": {
    "a": {"type": "integer"},
    "b": {"type": "array", "items": {"enum": ["x", "yz"]}, "maxItems": 2}},
 "required": ["a"], "additionalProperties": false}
END
answers "what fits stays as it is" '{"~a~": ~1~2~, "~b~": ["~x~"]}' \
    '{"a": 12, "b": ["x"]}'
answers "no more is said than fits" '{"~a~":~1~}~}~ and more' '{"a":1}'
answers "what does not fit is not said" 'Sure~! ~{"~a~":~7~}' \
    '{"a": -0, "b": ["x", "x"]}'
answers "nor a new line" '{~\n~"a":~7~}' '{"a": -0, "b": ["x", "x"]}'
answers "an end that comes too early is none" '{"~a~": ~5' \
    '{"a": 5, "b": ["x", "x"]}'
answers "the limit holds" '{"~a~": ~5~0~0~}' '{"a": 5' -n 4
answers "it begins behind a thought" \
    '<think>~{"a~ hm~</think>~\n\n~{"~a~": ~1~}' '{"a": 1}' --think hide
answers "the thought is as it was" '<think>~hm\n~</think>~\n\n~{"~a~": ~1~}' \
    '<think>hm
</think>

{"a": 1}' --think raw
answers "a thought that is closed" '<think>~hm~ hm~ hm~ hm~ hm' \
    '{"a": -0, "b": ["x", "x"]}' --think hide --think-budget 3
answers "--raw" '{"~a~": ~1~2~}' '{"a": 12}' --raw
echo '{"type":"string"}' >"$dir/schema"
answers "marks of calls" '"~<|~tool_call_start~|>~ is no call~"' \
    '"<|tool_call_start|> is no call"'
echo '{"type":"number"}' >"$dir/schema"
answers "a number ends where the model ends it" '1~.~5' '1.5'
answers "of any length that is good" '1~.~5~5~.~5~e' '1.55'
expect 0 "-v" -v --temp 0 "$m" hello --json-schema "$dir/schema" -n 9
says "did not fit the schema"
m=test/tiny.gguf

schema='{"type":"object","properties":{"n":{"type":"string","pattern":"x"}}}'
echo "$schema" >"$dir/schema"
refuses 2 "schema: \"pattern\" at properties.n is not known here" "$m" hello \
    --json-schema "$dir/schema"
echo '{' >"$dir/schema"
refuses 2 "schema: line 1, column 2" "$m" hello --json-schema "$dir/schema"
refuses 3 "no such schema" "$m" hello --json-schema "no such schema"
refuses 2 "--json-schema FILE makes" "$m" hello --grammar x

# ---------------------------------------------------------------------- bodies

# body MEMBERS: $dir/in is a line with them.
body() {
    printf '{"messages":[{"role":"user","content":"hello"}]%s}\n' "$1" \
        >"$dir/in"
}

format=',"response_format":{"type":"json_schema","json_schema":{"name":"x",
    "strict":true,"schema":{"type":"object","properties":{"a":{"type":"integer"}},
    "required":["a"],"additionalProperties":false}}}'
format=$(echo "$format" | tr -d '\n')
tools=',"tools":[{"type":"function","function":{"name":"look","strict":true,
    "parameters":{"type":"object","properties":{"at":{"type":"string"},
    "n":{"type":["integer","null"]}},"required":["at","n"],
    "additionalProperties":false}}},{"type":"function","function":
    {"name":"look_up","parameters":{"type":"object","properties":
    {"a b":{"type":"boolean"}},"required":["a b"]}}}]'
tools=$(echo "$tools" | tr -d '\n')
start='<|tool_call_start|>' end='<|tool_call_end|>'

# said WHAT MEMBERS EXPRESSION: of a message that is the answer to them.
said() {
    body "$2"
    batch 0 "$1" --temp 0 -n 60 -q
    json "$1" "(lambda m, finish: $3)(b[0]['choices'][0]['message'],
        b[0]['choices'][0]['finish_reason'])"
}

# called NAME ARGUMENTS: an expression for the only call, and no text.
called() {
    echo "[(c['function']['name'], c['function']['arguments'])
        for c in m['tool_calls']] == [('$1', '$2')] and m['content'] == '' and
        finish == 'tool_calls'"
}

wants 'I~ will~: ~{"~a~":~ 1~}'
said "text" ',"response_format":{"type":"text"}' \
    "m['content'] == 'I will: {\"a\": 1}'"
said "text in spite of --json-schema" ',"response_format":null' \
    "m['content'] == 'I will: {\"a\": 1}'"
wants '{"~a~":~ 1~}~ more'
said "a schema" "$format" "m['content'] == '{\"a\": 1}' and finish == 'stop'"
said "any object" ',"response_format":{"type":"json_object"}' \
    "m['content'] == '{\"a\": 1}' and finish == 'stop'"
wants '[{"~a~":~ 1~}]'
said "no array is an object" ',"response_format":{"type":"json_object"}' \
    "m['content'].startswith('{')"

wants "$start~[~look~(~at~=~\"~x~\", ~n~=~None~)~]~$end~ more"
said "a call" "$tools,\"tool_choice\":\"required\"" \
    "$(called look '{\"at\": \"x\", \"n\": null}')"
said "a call of the model's own wish" "$tools" \
    "len(m['tool_calls']) == 1 and m['content'] == ' more'"
said "no more than one" "$tools,\"parallel_tool_calls\":false" \
    "$(called look '{\"at\": \"x\", \"n\": null}')"
said "none" "$tools,\"tool_choice\":\"none\"" "'tool_calls' in m"
named='"tool_choice":{"type":"function","function":{"name":"look_up"}}'
said "of this name" "$tools,$named" \
    "m['tool_calls'][0]['function']['name'] == 'look_up'"
said "either" "$tools$format" "$(called look '{\"at\": \"x\", \"n\": null}')"
wants "$start~[~look~(~n~=~True~)~]~$end"
said "strict arguments, in a call of the model's own wish" "$tools" \
    "finish == 'length' or all('at' in c['function']['arguments']
     for c in m['tool_calls'])"
strict() {
    printf '{"type":"function","function":{"name":"f","strict":true,"parameters":'
    printf '{"type":"object","properties":{"%s":{"type":"%s"}},"required":["%s"],' \
        "$1" "$2" "$1"
    printf '"additionalProperties":false}}}'
}
wants "$start~[~f~(~a~=~True~)~]~$end"
said "the first of two of one name" \
    ",\"tools\":[$(strict a boolean),$(strict b integer)],\"tool_choice\":\"required\"" \
    "$(called f '{\"a\": true}')"
wants "<think>~$start~</think>~$start~[~look_up~({~'a b'~: ~True~})~, ~look_up~(~{\"a b\":~ False~})~]~$end"
said "behind a thought" "$tools,\"tool_choice\":\"required\"" \
    "[c['function']['arguments'] for c in m['tool_calls']] ==
     ['{\"a b\": true}', '{\"a b\": false}']"
wants "Let~ me~: ~$start~[~look~(~at~='~it~\\\\'s~', ~n~=~-3~)~]~$end~."
said "text before a call" "$tools" \
    "m['content'] == 'Let me: .' and m['tool_calls'][0]['function']['arguments']
     == '{\"at\": \"it\\'s\", \"n\": -3}'"
wants '{"~a~":~ 1~}'
said "an answer instead of a call" "$tools$format" \
    "m['content'] == '{\"a\": 1}' and finish == 'stop'"
m=test/tiny.gguf

# wrong MEMBERS TEXT
wrong() {
    body "$1"
    batch 7 "$1" -q
    has "$1" "$2"
}
wrong ',"response_format":{"type":"xml"}' 'expected a \"type\"'
wrong ',"response_format":"json_object"' 'expected a \"type\"'
wrong ',"response_format":{"type":"json_schema"}' '\"schema\"'
wrong ',"response_format":{"type":"json_object","pattern":1}' \
    '\"pattern\" in \"response_format\"'
wrong "$(echo "$format" | sed 's/"integer"/"integer","minimum":1/')" \
    '\"minimum\" at properties.a is not known here'
wrong ',"tool_choice":"required"' 'there are no tools'
wrong "$tools,\"tool_choice\":\"any\"" 'expected none, auto, required'
wrong "$tools,\"tool_choice\":{\"function\":{\"name\":\"f\"}}" \
    'no tool is called f'
wrong "$(echo "$tools" | sed 's/"string"/"string","format":"x"/')" \
    '\"format\" at look.properties.at is not known here'
wrong "$(echo "$tools" | sed 's/"look"/"2 x"/')" 'a tool is called 2 x'
wrong "$tools,\"parallel_tool_calls\":1" 'parallel_tool_calls'

# --------------------------------------------------------------- random schemas

needs_python jsonschema "random schemas"

# The same answers, whoever is answered at the same time and whatever is guessed.
"$python" test/schemas.py make $((n / 10)) 1 >"$dir/in"
expect 7 "a model" -q "$m" --batch -f "$dir/in"
cp "$dir/out" "$dir/first"
holds "answers of a model fit" "$python" test/schemas.py check "$dir/in" \
    "$dir/first"
expect 7 "one by one, with guesses" -q "$m" --batch -f "$dir/in" --parallel 1 \
    --lookup 15 -t 1
same "answers of a model do not depend on others" "$dir/first" "$dir/out"

"$python" test/schemas.py make "$n" 2 >"$dir/in"
"$noise" "$m" 2 <"$dir/in" >"$dir/out" 2>"$dir/err"
holds "answers of noise fit" "$python" test/schemas.py check "$dir/in" \
    "$dir/out"
finish
