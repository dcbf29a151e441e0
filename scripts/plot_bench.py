#!/usr/bin/env python3
"""Draw tokens a second against depth and against threads, from the records of --bench.

    ./run --bench MODEL.gguf -d 0,1024,4096 -o json > ours.json
    llama-bench -m MODEL.gguf -d 0,1024,4096 -o json > llama.json
    python3 scripts/plot_bench.py -o speed.svg ours.json llama.json

Reads JSON and JSON lines, ours and llama-bench's, and needs nothing but Python.  A line is
drawn for everything that was measured at two depths, or with two numbers of threads, at least.
"""
import argparse
import collections
import json
import math
import os
import statistics
from xml.sax.saxutils import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b5b5b", "#7a3db8")
WIDTH, HEIGHT = 460, 290                          # of a chart, without its legend
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 36, 46         # margins around its axes
LINE = 18                                         # of the legend

NAMES = {"depth": "tokens in the cache before", "threads": "threads"}

# What tells lines apart; the rest of a label is left out where it is the same for all.
Line = collections.namedtuple("Line", "engine source model test other")


# ---------------------------------------------------------------------- the records

def parse(text):
    """A JSON list, or one record a line."""
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def test_name(r):
    """tg128 or pp512; nothing for both in one, which is no rate of either."""
    if bool(r["n_prompt"]) == bool(r["n_gen"]):
        return None
    name = "pp%d" % r["n_prompt"] if r["n_prompt"] else "tg%d" % r["n_gen"]
    return name + (" x %d" % r["n_sequences"] if r.get("n_sequences", 1) > 1 else "")


def read(path):
    """The records of a file as (engine, source, model, test, threads, depth, tokens a second)."""
    try:
        with open(path, encoding="utf-8") as f:
            records = parse(f.read())
        found = [("lfm2.c " + r["isa"] if "isa" in r else "llama.cpp", os.path.basename(path),
                  str(r["model_type"]), test_name(r), int(r["n_threads"]),
                  int(r.get("n_depth", 0)), float(r["avg_ts"])) for r in records]
    except OSError as e:
        raise SystemExit("plot_bench.py: %s: %s" % (path, e.strerror))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit("plot_bench.py: %s: no records of a benchmark (%s: %s)" %
                         (path, type(e).__name__, e))
    return [f for f in found if f[3] and math.isfinite(f[6])]


def lines(records, kind, against):
    """{Line: [(x, y), ...]} of the tests of a kind, "pp" or "tg", with two points at least."""
    points = collections.defaultdict(lambda: collections.defaultdict(list))
    for engine, source, model, test, threads, depth, speed in records:
        x, other = (depth, "%d thread%s" % (threads, "s"[:threads > 1])) if against == "depth" else \
                   (threads, "depth %d" % depth)
        if test.startswith(kind):
            points[Line(engine, source, model, test, other)][x].append(speed)
    return {line: sorted((x, statistics.median(y)) for x, y in at.items())
            for line, at in points.items() if len(at) > 1}


def labels(of):
    """The parts of every line's name in which the lines differ; the engine in any case."""
    differ = [len(set(part)) > 1 for part in zip(*of)]
    differ[0] = True
    same = collections.Counter(line._replace(source="") for line in of)
    differ[1] = max(same.values()) > 1
    return {line: ", ".join(part for part, tell in zip(line, differ) if tell) for line in of}


# ---------------------------------------------------------------------- the drawing

def ticks(most, whole):
    """Round numbers from 0 to just above `most`, four to seven of them."""
    step = 10 ** math.floor(math.log10(most / 4)) if most > 0 else 1
    step = next(step * k for k in (1, 2, 5, 10) if most / (step * k) <= 6)
    step = max(1, math.ceil(step)) if whole else step
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def text(x, y, what, anchor="middle", size=12, more=""):
    return '<text x="%.1f" y="%.1f" text-anchor="%s" font-size="%d"%s>%s</text>' % (
        x, y, anchor, size, more, escape(what))


def axes(title, against, xs, ys):
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    out = [text(WIDTH / 2, 20, title, size=14, more=' font-weight="bold"')]
    for v in ys:
        y = bottom - (bottom - TOP) * v / ys[-1]
        out += ['<path d="M%d %.1fH%d" stroke="#dddddd"/>' % (LEFT, y, right),
                text(LEFT - 6, y + 4, "%g" % v, "end")]
    for v in xs:
        x = LEFT + (right - LEFT) * v / xs[-1]
        out += ['<path d="M%.1f %dv4" stroke="#333333"/>' % (x, bottom),
                text(x, bottom + 18, "%d" % v)]
    out += ['<path d="M%d %dV%dH%d" fill="none" stroke="#333333"/>' % (LEFT, TOP, bottom, right),
            text((LEFT + right) / 2, bottom + 38, NAMES[against]),
            text(0, 0, "tokens/s", more=' transform="translate(14 %d) rotate(-90)"' %
                 ((TOP + bottom) / 2))]
    return out


def chart(title, against, data):
    """One chart at the origin, and how high it is."""
    xs = ticks(max(x for points in data.values() for x, _ in points), True)
    ys = ticks(max(y for points in data.values() for _, y in points), False)
    out, name = axes(title, against, xs, ys), labels(data)
    for i, (line, points) in enumerate(data.items()):
        colour, at = COLOURS[i % len(COLOURS)], HEIGHT + LINE * i + 8
        dash = ' stroke-dasharray="6 3"' if i // len(COLOURS) % 2 else ""
        where = [(LEFT + (WIDTH - RIGHT - LEFT) * x / xs[-1],
                  HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * y / ys[-1]) for x, y in points]
        out.append('<polyline points="%s" fill="none" stroke="%s" stroke-width="2"%s/>' % (
            " ".join("%.1f,%.1f" % p for p in where), colour, dash))
        out += ['<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>' % (x, y, colour) for x, y in where]
        out += ['<path d="M%d %dh24" stroke="%s" stroke-width="2"%s/>' % (LEFT, at, colour, dash),
                text(LEFT + 30, at + 4, name[line], "start")]
    return out, HEIGHT + LINE * len(data) + 16


def draw(records):
    """All charts for which there are lines, in rows of two; "" if there are none."""
    body, y, width = [], 0, 0
    for against in ("depth", "threads"):
        row = [(title, lines(records, kind, against)) for kind, title in
               (("tg", "Generating"), ("pp", "Reading a prompt"))]
        made = [chart(title, against, data) for title, data in row if data]
        for i, (parts, _) in enumerate(made):
            body += ['<g transform="translate(%d %d)">' % (i * WIDTH, y), *parts, "</g>"]
        y += max((height for _, height in made), default=0)
        width = max(width, len(made) * WIDTH)
    return '\n'.join((
        '<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" '
        'font-family="sans-serif" fill="#222222">' % (width, y, width, y),
        '<rect width="100%" height="100%" fill="#ffffff"/>', *body, "</svg>\n")) if body else ""


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("-o", "--output", required=True, metavar="OUT.svg")
    p.add_argument("files", nargs="+", metavar="FILE", help="JSON or JSON lines of --bench")
    a = p.parse_args()
    drawing = draw([record for path in a.files for record in read(path)])
    if not drawing:
        raise SystemExit("plot_bench.py: nothing to draw, as no test was measured at two depths "
                         "(-d 0,1024,4096) or with two numbers of threads (-t 1,2,4)")
    try:
        with open(a.output, "w", encoding="utf-8") as f:
            f.write(drawing)
    except OSError as e:
        raise SystemExit("plot_bench.py: %s: %s" % (a.output, e.strerror))


if __name__ == "__main__":
    main()
