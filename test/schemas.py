#!/usr/bin/env python3
"""Random schemas for answers, and whether answers are good.

    schemas.py make N SEED      N lines of --batch; of some the schema has a
                                keyword that is to be refused
    schemas.py check LINES ANSWERS
                                every answer that is complete is valid, by the
                                jsonschema module, and every refusal names its
                                keyword
"""
import json
import random
import sys

WORDS = ["a", "ab", "name", "value", "it's", 'say "x"', "\u00e4", "", "next",
         "a/b", "x-y", "Stra\u00dfe", "\U0001f600", "line\nbreak", "back\\slash"]
NAMES = ["city", "days", "a_b", "x-y", "unit", "from", "\u00e4"]
UNKNOWN = ["pattern", "format", "minimum", "maximum", "multipleOf", "oneOf",
           "allOf", "not", "if", "patternProperties", "propertyNames",
           "uniqueItems", "contains", "prefixItems", "minProperties",
           "dependentRequired", "unevaluatedProperties", "nullable"]


class Maker:
    def __init__(self, rng):
        self.rng = rng
        self.defs = rng.sample(["node", "leaf", "a/b", "t~u"], rng.randint(0, 3))

    def some(self, words, most):
        return self.rng.sample(words, self.rng.randint(0, min(most, len(words))))

    def literal(self, depth=1):
        rng = self.rng
        return rng.choice([
            lambda: rng.choice(WORDS), lambda: rng.randint(-1000, 1000),
            lambda: rng.choice([0.5, -1.25, 1e20, 1, 10, 100]),
            lambda: None, lambda: rng.random() < 0.5,
            lambda: [self.literal(0) for _ in range(2)] if depth else "leaf",
            lambda: {w: self.literal(0) for w in self.some(WORDS, 2)}
            if depth else 0])()

    def bounds(self, schema, least, most):
        a, b = sorted((self.rng.randint(0, 4), self.rng.randint(0, 6)))
        if self.rng.random() < 0.4:
            schema[least] = a
        if self.rng.random() < 0.5:
            schema[most] = b
        return schema

    def object(self, depth, words):
        rng = self.rng
        if rng.random() < 0.15:
            schema = {"type": "object"}
            if rng.random() < 0.5:
                schema["additionalProperties"] = self.schema(depth - 1)
            return schema
        keys = self.some(words, 6)
        schema = {"type": "object", "properties":
                  {k: self.schema(depth - 1) for k in keys}}
        if rng.random() < 0.8:
            schema["required"] = [k for k in keys if rng.random() < 0.6]
        if rng.random() < 0.7:
            schema["additionalProperties"] = False
        return schema

    def types(self):
        rng = self.rng
        types = rng.sample(["string", "integer", "number", "boolean", "null",
                            "array"], rng.randint(1, 4))
        schema = {"type": types}
        if "string" in types:
            self.bounds(schema, "minLength", "maxLength")
        if "array" in types:
            self.bounds(schema, "minItems", "maxItems")
        return schema

    def schema(self, depth):
        rng = self.rng
        kinds = ["string", "number", "integer", "boolean", "null", "enum",
                 "const", "types"]
        if depth > 0:
            kinds += ["object", "object", "array", "array", "anyOf", "ref"]
        kind = rng.choice(kinds)
        if kind == "object":
            schema = self.object(depth, WORDS)
        elif kind == "array":
            schema = self.bounds({"type": "array"}, "minItems", "maxItems")
            if rng.random() < 0.9:
                schema["items"] = self.schema(depth - 1)
        elif kind == "string":
            schema = self.bounds({"type": "string"}, "minLength", "maxLength")
        elif kind == "enum":
            schema = {"enum": [self.literal() for _ in
                               range(rng.randint(1, 9))]}
        elif kind == "const":
            schema = {"const": self.literal()}
        elif kind == "anyOf":
            schema = {"anyOf": [self.schema(depth - 1) for _ in
                                range(rng.randint(1, 4))]}
        elif kind == "types":
            schema = self.types()
        elif kind == "ref" and self.defs:
            name = rng.choice(self.defs)
            return {"$ref": "#/$defs/" +
                    name.replace("~", "~0").replace("/", "~1")}
        elif kind == "ref":
            schema = {}
        else:
            schema = {"type": kind}
        if rng.random() < 0.2:
            schema["description"] = "something"
        return schema

    def definition(self):
        """One that does not lead to others at once, and maybe to itself."""
        schema = self.schema(2)
        while leads_on(schema):
            schema = self.schema(2)
        return schema

    def whole(self, names=None):
        schema = self.object(2, names) if names else self.schema(3)
        if self.defs:
            schema["$defs"] = {d: self.definition() for d in self.defs}
        return schema


def leads_on(schema):
    return "$ref" in schema or any(map(leads_on, schema.get("anyOf", [])))


def places(schema):
    """Schemas within one that are always looked at."""
    found = [schema] if "$ref" not in schema else []
    for part in list(schema.get("properties", {}).values()) + \
            schema.get("anyOf", []) + [schema.get("items", {})]:
        if isinstance(part, dict) and part:
            found += places(part)
    return found


def make(n, seed):
    rng = random.Random(seed)
    for i in range(n):
        maker = Maker(rng)
        calls = rng.random() < 0.3
        names = NAMES + (WORDS if rng.random() < 0.3 else [])
        schema = maker.whole(names if calls else None)
        name = f"good-{i}"
        if rng.random() < 0.1:
            where, word = rng.choice(places(schema) or [schema]), \
                rng.choice(UNKNOWN)
            where[word] = 1
            name = f"{word}-{i}"
        body = {"messages": [{"role": "user", "content": "What is it?"}],
                "max_tokens": rng.randint(50, 400), "temperature": 2.5}
        if calls:
            body["tools"] = [{"type": "function", "function":
                              {"name": "look.up", "parameters": schema}},
                             {"type": "function", "function":
                              {"name": "look", "parameters": {
                                  "type": "object", "properties": {}}}}]
            body["tool_choice"] = rng.choice(["required", {
                "type": "function", "function": {"name": "look.up"}}])
        else:
            body["response_format"] = {"type": "json_schema", "json_schema": {
                "name": "x", "strict": True, "schema": schema}}
        print(json.dumps({"custom_id": name, "body": body}))


def refusal(name, schema, message):
    """Is this a good reason?  Some schemas have no values."""
    word = name.rsplit("-", 1)[0]
    return f'"{word}"' in message or (
        word == "good" and "no value of this schema ends" in message)


def values(body, choice):
    """Pairs of a schema and what should be a value of it."""
    message = choice["message"]
    if choice["finish_reason"] == "length":
        return []
    if "response_format" in body:
        schema = body["response_format"]["json_schema"]["schema"]
        return [(schema, json.loads(message["content"]))]
    tools = {t["function"]["name"]: t["function"]["parameters"]
             for t in body["tools"]}
    assert message["tool_calls"] and not message["content"]
    return [(tools[c["function"]["name"]], json.loads(
        c["function"]["arguments"])) for c in message["tool_calls"]]


def check(lines, answers):
    from jsonschema import Draft202012Validator
    good = cut = refused = bad = 0
    lines, answers = open(lines).readlines(), open(answers).readlines()
    bad += len(lines) != len(answers)
    for line, answer in zip(lines, answers):
        line, answer = json.loads(line), json.loads(answer)
        if answer["error"]:
            body = line["body"]
            why = answer["error"]["message"]
            refused += 1
            if not refusal(line["custom_id"], body, why):
                bad += 1
                print("refused:", why, json.dumps(line))
            continue
        choice = answer["response"]["body"]["choices"][0]
        try:
            pairs = values(line["body"], choice)
            for schema, value in pairs:
                Draft202012Validator(schema).validate(value)
            if not line["custom_id"].startswith("good"):
                raise ValueError("it was to be refused")
        except Exception as e:
            bad += 1
            print("bad:", repr(e)[:300], json.dumps(line), json.dumps(choice))
            continue
        good += bool(pairs)
        cut += not pairs
    print(f"{good} good, {cut} cut, {refused} refused, {bad} bad")
    sys.exit(bad > 0 or good == 0 or refused == 0)


if sys.argv[1] == "make":
    make(int(sys.argv[2]), int(sys.argv[3]))
else:
    check(sys.argv[2], sys.argv[3])
