"""Random tool calls and what they should be read as, for check_chat.

    python3 test/calls.py -n COUNT [-s SEED]

A line of JSON for each: {"text": what stands between the markers, "calls":
[[name, arguments], ...], or null if it has to stay text, or "any" where Python
sees an error of syntax: then no value is known, and the reader may still find
the call clear}.  The values are those of ast.literal_eval()."""

import argparse
import ast
import json
import random
import sys
import warnings

warnings.simplefilter("ignore")
WORDS = {"true": True, "false": False, "null": None}


class NoValue(Exception):
    """What JSON has no value for."""


def plain(value):
    """A value of Python as one of JSON."""
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, dict):
        if not all(type(k) in (str, int) for k in value):
            raise NoValue
        return {str(k): plain(x) for k, x in value.items()}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and value - value == 0:
        return value
    raise NoValue


def literal(node):
    """As literal_eval(), and JSON's words, strings with an f that have no
    placeholder, and sets in the order they are written in."""
    if isinstance(node, ast.Name) and node.id in WORDS:
        return WORDS[node.id]
    if isinstance(node, ast.JoinedStr):
        if all(isinstance(part, ast.Constant) for part in node.values):
            return "".join(part.value for part in node.values)
        raise NoValue
    if isinstance(node, (ast.List, ast.Tuple)):
        return [literal(x) for x in node.elts]
    if isinstance(node, ast.Set):
        elements = [literal(x) for x in node.elts]
        if {type(x) for x in elements} not in ({str}, {int}):
            raise NoValue
        return list(dict.fromkeys(elements))
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise NoValue
        keys = [literal(k) for k in node.keys]
        if not all(type(k) in (str, int) for k in keys):
            raise NoValue
        return dict(zip(keys, map(literal, node.values)))
    try:
        value = ast.literal_eval(node)
        return [] if isinstance(value, set) else plain(value)
    except (ValueError, TypeError, SyntaxError, MemoryError) as error:
        raise NoValue from error


def name_of(node):
    if isinstance(node, ast.Attribute):
        return name_of(node.value) + "." + node.attr
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        return name_of(node.left) + "-" + name_of(node.right)
    if isinstance(node, ast.Name):
        return node.id
    raise NoValue


def call_in(value):
    """(name, arguments) of a call as JSON has it."""
    value = value.get("function", value)
    args = value.get("arguments", value.get("parameters")) or {}
    name = value.get("name")
    if not name or not isinstance(name, str) or not isinstance(args, dict):
        raise NoValue
    return name, args


def call_of(node):
    """(name, arguments): all are named, or the only one is a dict."""
    if isinstance(node, ast.Dict):
        return call_in(plain(literal(node)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        name, args = call_of(node.right)          # a name like get-time
        return name_of(node.left) + "-" + name, args
    if not isinstance(node, ast.Call):
        raise NoValue
    names = [k.arg for k in node.keywords]
    if node.args:
        if names or len(node.args) > 1 or \
                not isinstance(node.args[0], ast.Dict):
            raise NoValue
        return name_of(node.func), plain(literal(node.args[0]))
    if None in names or len(set(names)) < len(names):
        raise NoValue
    return name_of(node.func), {k.arg: plain(literal(k.value))
                                for k in node.keywords}


def read_json(text):
    """As JSON, which has other escapes; or None."""
    try:
        found = json.loads(text if text.startswith("[") else "[" + text + "]")
        return [call_in(plain(x)) for x in found]
    except (NoValue, ValueError, AttributeError):
        return None


def read(text):
    found = read_json(text)
    if not text.strip() or text.lstrip("[ \t\f\n").startswith("("):
        return None
    if found is not None:
        return found
    try:
        tree = ast.parse(text.strip(" \t\f\r\n"), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "any"
    if isinstance(tree, ast.Tuple) and (not tree.elts or (
            tree.lineno, tree.col_offset) != (
            tree.elts[0].lineno, tree.elts[0].col_offset)):
        return None
    if isinstance(tree, (ast.List, ast.Tuple)):
        calls = tree.elts
    else:
        calls = [tree]
    try:
        found = [call_of(call) for call in calls]
        if not all(name in text for name, _ in found if set(name) & set("-.")):
            return None                           # get - time()
        json.dumps(found, ensure_ascii=False).encode("utf-8")
        return found
    except (NoValue, ValueError, UnicodeEncodeError):
        return None


# ------------------------------------------------------------ random calls

PIECES = [
    "a", "it's", '"', "'", "\\", "\\\\", "\n", "\\n", "\\'", '\\"', "x y",
    "\\101", "\\0", "\\377", "\\x41", "\\u00e9", "\\U0001F600", "\\q", "\u00e9",
    "\U0001f600", "{", "}", "]", ")", ",", " ", "#", "\\\n", "=", "\\/", "\\N",
    "0", "\\a\\b\\f\\v", "\t", "f(", "\r\n", "if", " in ", "\\x4", "\\8"]
NUMBERS = [
    "0", "1", "00", "007", "1_000", "1__0", "0x1F", "0X_ff", "0o17", "0b101",
    "0b2", "1.", ".5", "1.5e3", "1e5", "1E-7", "1_0.0_1", "1e", "1e999", "1j",
    "12345678901234567890123", "0xfffffffffffff", "01.5", "0_0",
    "1e1_0", "5._1", "0.1", "1e22", "123456789.0"]
OTHERS = ["True", "False", "None", "true", "null", "x", "...", "set()", "nan",
          "Truex", "b'a'", "lambda: 0", "f'{x}'", "()", "__debug__"]


def string(rng):
    prefix = rng.choice([""] * 12 + ["r", "R", "u", "f", "rf", "Fr", "b", "ur"])
    quote = rng.choice(['"', "'", "'", '"""', "'''"])
    inside = "".join(rng.choice(PIECES) for _ in range(rng.randrange(5)))
    if rng.random() < 0.7:
        inside = inside.replace(quote[0], "\\" + quote[0])
    return prefix + quote + inside + quote


def blank(rng):
    return rng.choice([""] * 9 + [" ", "  ", "\n", "\t", " # x\n", "\\\n",
                                  "\f"])


def sequence(rng, depth, item):
    parts = [blank(rng) + item(rng, depth + 1) + blank(rng)
             for _ in range(rng.randrange(4))]
    return ",".join(parts) + rng.choice(["", "", ",", ""])


def value(rng, depth=0):
    kind = rng.randrange(12 if depth < 4 else 7)
    if kind < 3:
        return string(rng)
    if kind == 3:
        return blank(rng).join([string(rng) for _ in range(2)])
    if kind == 4:
        return rng.choice(["", "", "-", "+", "- ", "--", "-("]) + \
            rng.choice(NUMBERS) + rng.choice([""] * 9 + [")", "+1", "-2j"])
    if kind == 5:
        return rng.choice(OTHERS)
    if kind == 6:
        return str(rng.randrange(100))
    if kind == 7:
        return "[" + sequence(rng, depth, value) + "]"
    if kind == 8:
        return "(" + sequence(rng, depth, value) + ")"
    if kind == 9:
        return "{" + sequence(rng, depth, value) + "}"
    if kind == 10:
        return "(" + value(rng, depth + 1) + ")"
    return "{" + sequence(rng, depth, lambda rng, depth: (
        rng.choice([string, string, lambda rng: rng.choice(NUMBERS)])(rng) +
        blank(rng) + ":" + blank(rng) + value(rng, depth))) + "}"


def call(rng):
    if rng.random() < 0.1:
        return '{"name": "f", "arguments": {"x": %s}}' % value(rng)
    name = rng.choice(["f", "f", "get_time", "a.b", "get-time", "\u00e9"])
    names = [rng.choice(["x", "y", "from_", "z1"]) for _ in
             range(rng.randrange(4))]
    return name + blank(rng) + "(" + ",".join(
        blank(rng) + n + blank(rng) + "=" + blank(rng) + value(rng) +
        blank(rng) for n in names) + ")"


def damage(rng, text):
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(["", rng.choice("[](){}'\"\\,=:+-.fx1 #")]
                                      ) + text[at + rng.randrange(2):]
    return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=3000)
    parser.add_argument("-s", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.s)
    for _ in range(args.n):
        text = "[" + ", ".join(call(rng) for _ in range(rng.choice(
            [1, 1, 1, 2]))) + "]"
        if rng.random() < 0.1:
            text = text[1:-1]
        if rng.random() < 0.3:
            text = damage(rng, text)
        sys.stdout.write(json.dumps({"text": text, "calls": read(text)}) + "\n")


main()
