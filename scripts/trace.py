#!/usr/bin/env python3
"""trace.py - arrays and tables of what a trace keeps.

    ./run MODEL.gguf -f TEXT --raw -n 0 --trace T.jsonl --trace-raw T.f32

    python3 scripts/trace.py npy     T.jsonl T.f32 -o DIR           DIR/NAME.npy, [records][n]
    python3 scripts/trace.py experts T.jsonl T.f32 -o experts.csv   which experts tokens chose
    python3 scripts/trace.py summary T.jsonl T.f32                  how evenly, layer by layer

The columns of the CSV are position, token, layer, rank, expert, score (the sigmoid of the
router's logit), bias and weight.  The bias only chooses and is in no activation: --model
MODEL.gguf looks it up (that needs numpy), and without it the column is empty.  A filter must
leave model.embed_tokens and model.layers.*.feed_forward.* in the trace.

The raw file holds float32, little-endian; "offset" in a record says where its numbers begin.
"""
import argparse
import array
import collections
import json
import math
import os
import re
import sys


class Unfit(Exception):
    """One sentence: the thing, what was found, what was expected."""


def read_vector(raw, record):
    """The numbers of a record."""
    n = math.prod(record["shape"])
    raw.seek(record["offset"])
    x = array.array("f", raw.read(4 * n))
    if len(x) != n:
        raise Unfit("%s ends before the %d numbers of %s at position %d" %
                    (raw.name, n, record["name"], record["pos"]))
    if sys.byteorder == "big":
        x.byteswap()
    return x


def records(path):
    """The records of a trace."""
    with open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            try:
                r = json.loads(line)
                if "trace" not in r:
                    yield {"name": str(r["name"]), "pos": int(r["pos"]), "shape": r["shape"],
                           "offset": int(r["offset"]), "token": r.get("token")}
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise Unfit("%s: line %d is no record with an offset (%s: %s)" %
                            (path, n, type(e).__name__, e)) from None


# ---------------------------------------------------------------------- arrays

def save_arrays(args):
    """One file in NumPy's format 1.0 for each name."""
    rows = collections.defaultdict(list)
    for r in records(args.trace):
        rows[r["name"]].append(r)
    os.makedirs(args.output, exist_ok=True)
    with open(args.raw, "rb") as raw:
        for name, some in rows.items():
            about = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d), }" % (
                len(some), math.prod(some[0]["shape"]))
            with open(os.path.join(args.output, name + ".npy"), "wb") as f:
                f.write(b"\x93NUMPY\1\0v\0" + b"%-117s\n" % about.encode())
                for r in some:
                    x = read_vector(raw, r)
                    if sys.byteorder == "big":
                        x.byteswap()
                    f.write(x.tobytes())


# --------------------------------------------------------------------- experts

PART = re.compile(r"model\.layers\.(\d+)\.feed_forward\.(gate|selected_experts|routing_weights)")


def read_choices(args):
    """(position, token, layer, [(expert, score, weight), ...]) in this order."""
    tokens, at = {}, collections.defaultdict(dict)
    for r in records(args.trace):
        found = PART.fullmatch(r["name"])
        if found:
            at[r["pos"], int(found[1])][found[2]] = r
        elif r["token"] is not None:
            tokens[r["pos"]] = r["token"]
    if not at:
        raise Unfit("%s: no record of a router" % args.trace)
    with open(args.raw, "rb") as raw:
        for (pos, layer), parts in sorted(at.items()):
            if len(parts) != 3:
                raise Unfit("%s: position %d in layer %d has no %s" % (args.trace, pos, layer, (
                    {"gate", "selected_experts", "routing_weights"} - set(parts)).pop()))
            gate, chosen, weights = (read_vector(raw, parts[key]) for key in (
                "gate", "selected_experts", "routing_weights"))
            yield pos, tokens.get(pos, ""), layer, [
                (int(e), array.array("f", [1 / (1 + math.exp(-gate[int(e)]))])[0], w)
                for e, w in zip(chosen, weights)], len(gate)


def read_biases(path):
    """{layer: bias of every expert} of a model."""
    if not path:
        return {}
    from gguf import File
    return {int(name.split(".")[1]): t.array() for name, t in File(path).tensors.items()
            if name.endswith("exp_probs_b.bias")}


def save_experts(args):
    """The CSV."""
    biases = read_biases(args.model)
    lines = ["position,token,layer,rank,expert,score,bias,weight\n"]
    for pos, token, layer, choices, _ in read_choices(args):
        bias = biases.get(layer)
        for rank, (e, score, weight) in enumerate(choices):
            lines.append("%d,%s,%d,%d,%d,%.9g,%s,%.9g\n" % (
                pos, token, layer, rank, e, score, "" if not args.model else
                "0" if bias is None else "%.9g" % bias[e], weight))
    if args.output == "-":
        sys.stdout.writelines(lines)
        return
    with open(args.output, "w", encoding="utf-8") as f:
        f.writelines(lines)


def heat(load):
    """The load of an expert, 1 for an even share."""
    return " .:-+*#"[sum(load > limit for limit in (0, .25, .5, 1, 2, 4))] if load > 0 else " "


def summarise(args):
    """How the load is shared, and how often the expert of a token is that of the one before,
    whose weights are still near."""
    count, again = collections.defaultdict(collections.Counter), collections.Counter()
    tokens, before, n = collections.Counter(), {}, 0
    for pos, _, layer, choices, n in read_choices(args):
        now = {e for e, _, _ in choices}
        last = before.get(layer, (None, set()))
        again[layer] += len(now & last[1]) if last[0] == pos - 1 else 0
        before[layer] = pos, now
        count[layer].update(now)
        tokens[layer] += 1
    print("layer  |%-*s|  entropy  unused  again" % (n, "experts"[:n]))
    for layer, c in sorted(count.items()):
        total = sum(c.values())
        p = [c[e] / total for e in range(n)]
        could = total - total // tokens[layer]
        print("%5d  |%s|  %7.2f  %6d  %s" % (
            layer, "".join(heat(x * n) for x in p), -sum(x * math.log2(x) for x in p if x),
            p.count(0), "%4.0f%%" % (100 * again[layer] / could) if could else "   -"))
    print("\nexperts: of an even share, . up to 1/4, : 1/2, - 1, + 2, * 4, # more\n"
          "entropy: in bits, %.2f if all are used alike\n"
          "again:   of the experts of a token, those that the one before it chose, too" %
          math.log2(n))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = p.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, do in (("npy", save_arrays), ("experts", save_experts), ("summary", summarise)):
        k = kinds.add_parser(kind, help=do.__doc__)
        k.add_argument("trace", metavar="T.jsonl")
        k.add_argument("raw", metavar="T.f32")
        if kind != "summary":
            k.add_argument("-o", "--output", required=True)
        if kind == "experts":
            k.add_argument("--model", metavar="MODEL.gguf")
        k.set_defaults(do=do)
    args = p.parse_args()
    try:
        args.do(args)
    except Unfit as e:
        sys.exit("trace.py: %s" % e)
    except OSError as e:
        sys.exit("trace.py: %s: %s" % (e.filename, e.strerror))


if __name__ == "__main__":
    main()
