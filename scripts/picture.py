#!/usr/bin/env python3
"""Draw what a model is and what it does: its blocks, its experts, its surprise, its numbers.

    ./run --inspect --json MODEL.gguf > model.json
    ./run MODEL.gguf -f TEXT --raw -n 0 --json --logprobs 3 > text.json
    ./run MODEL.gguf -f TEXT --raw -n 0 --trace trace.jsonl --trace-raw trace.f32
    python3 scripts/trace.py experts trace.jsonl trace.f32 -o experts.csv

    python3 scripts/picture.py block      model.json   -o block.svg
    python3 scripts/picture.py surprisal  text.json    -o text.svg      (or text.html)
    python3 scripts/picture.py routing    experts.csv  -o routing.svg
    python3 scripts/picture.py trace      trace.jsonl  -o trace.svg

`-` stands for standard input and output.  In a browser, a cell or a token tells its numbers
where the pointer rests on it.  Needs nothing but Python; tables and traces may be of any
length, as they are read line by line.
"""
import argparse
import re
import sys

from picture_block import block
from picture_heat import MOST_EXPERTS, routing, trace
from picture_surprisal import surprisal
from svg import Unfit, shown


def opened(path):
    """The file, or standard input; bytes that are no UTF-8 are replaced."""
    if path == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        return sys.stdin
    return open(path, encoding="utf-8", errors="replace", newline="\n")


def span(given):
    """A-B, A- or A as a slice."""
    found = re.fullmatch(r"([0-9]{1,9})(-?)([0-9]{0,9})", given)
    if not found:
        raise argparse.ArgumentTypeError("expected A-B, A- or A")
    a, dash, b = found.groups()
    return slice(int(a), int(b) + 1 if b else None if dash else int(a) + 1)


def n_expert(given):
    """A number of experts."""
    if not re.fullmatch("[0-9]{1,9}", given) or int(given) > MOST_EXPERTS:
        raise argparse.ArgumentTypeError("expected a number up to %d" % MOST_EXPERTS)
    return int(given)


def arguments():
    """The command line; --help tells it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    kinds = p.add_subparsers(dest="kind", required=True, metavar="KIND")
    for draw, what in ((block, "MODEL.json"), (surprisal, "TEXT.json"), (routing, "EXPERTS.csv"),
                       (trace, "TRACE.jsonl")):
        k = kinds.add_parser(draw.__name__, help=draw.__doc__, description=draw.__doc__)
        k.add_argument("file", metavar=what)
        k.add_argument("-o", "--output", required=True, metavar="OUT.svg")
        k.set_defaults(draw=draw)
        if draw is routing:
            k.add_argument("--by", choices=("chosen", "weight"), default="chosen",
                           help="count choices, or add up weights")
            k.add_argument("--n-expert", type=n_expert, default=0, metavar="N",
                           help="experts of a layer, if the last ones are never chosen")
        if draw is surprisal:
            k.add_argument("--tokens", type=span, default=slice(None), metavar="A-B",
                           help="only these, from 0; A- is to the end")
        if draw is trace:
            k.add_argument("--module", default="", metavar="NAME",
                           help="such as conv.conv or feed_forward, not the residual stream")
    return p.parse_args()


def put(path, drawing):
    """Write it all at once, when nothing can go wrong any more."""
    if path == "-":
        sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.write(drawing)
        sys.stdout.flush()
    else:
        with open(path, "w", encoding="utf-8") as f:
            f.write(drawing)


def main():
    args = arguments()
    at = args.file
    try:
        with opened(args.file) as f:
            drawing = args.draw(f, args)
        at = args.output
        put(args.output, drawing)
    except Unfit as e:
        raise SystemExit("picture.py: %s: %s" % (shown(at), shown(str(e)))) from None
    except OSError as e:
        raise SystemExit("picture.py: %s: %s" % (shown(at), e.strerror)) from None


if __name__ == "__main__":
    main()
