"""picture_heat.py - heat maps of experts and of a trace, by layer, for picture.py."""
import collections
import json
import math
import re

from svg import (BLUES, FAINT, MOST_LAYERS, Unfit, cells, crosses, cut, document, legend,
                 numbered_lines, path, real, size_of_cells, tag, text, whole)

MOST_EXPERTS, MOST_POSITIONS = 1024, 1 << 20

# ---------------------------------------------------------------------- routing

STATS = (("busiest", 94), ("effective", 164), ("unused", 222), ("again", 274))   # and their ends
WIDE = 18                                         # cells that tell their number


class Layer:
    """What the tokens chose in one layer."""

    def __init__(self):
        self.chosen, self.weight = collections.Counter(), collections.Counter()
        self.tokens, self.position = 0, None
        self.now, self.before = set(), set()      # of this token, and of the one before it
        self.again = self.could = 0               # choices that the token before made, too

    def add(self, position, expert, weight):
        if position != self.position:
            self.before = self.now if self.tokens and position == self.position + 1 else set()
            self.tokens, self.position, self.now = self.tokens + 1, position, set()
        self.chosen[expert] += 1
        self.weight[expert] += weight
        self.now.add(expert)
        if self.before:
            self.could += 1
            self.again += expert in self.before


def read_experts(f):
    """{layer: Layer} of what trace.py experts wrote."""
    lines, layers = numbered_lines(f), collections.defaultdict(Layer)
    names = next(lines, (0, ""))[1].split(",")
    try:
        at = [names.index(name) for name in ("position", "layer", "expert", "weight")]
    except ValueError:
        raise Unfit("the first line is %.60r, expected position,token,layer,rank,expert,score,"
                    "bias,weight" % ",".join(names)) from None
    for number, line in lines:
        fields = line.split(",")
        try:
            if len(fields) != len(names):
                raise ValueError
            position, layer, expert = (int(fields[i]) for i in at[:3])
            weight = float(fields[at[3]])
        except ValueError:
            raise Unfit("line %d is %.60r, expected %d numbers" %
                        (number, line, len(names))) from None
        if not (0 <= layer < MOST_LAYERS and 0 <= expert < MOST_EXPERTS and 0 <= weight < math.inf):
            raise Unfit("line %d is %.60r, expected a layer below %d, an expert below %d and a "
                        "weight" % (number, line, MOST_LAYERS, MOST_EXPERTS))
        layers[layer].add(position, expert, weight)
    if not layers:
        raise Unfit("no expert was chosen")
    return layers


def effective(share):
    """How many experts, used evenly, would have the same entropy."""
    return math.exp(-sum(s * math.log(s) for s in share if s > 0))


def told(number, layer, share):
    """What a layer says of itself where its cells do not."""
    busy = sorted(range(len(share)), key=lambda e: -share[e])[:5]
    never = [str(e) for e in range(len(share)) if not layer.chosen[e]]
    return tag("title", "layer %d: most %s; never %s" % (
        number, ", ".join("%d (%.1f %%)" % (e, 100 * share[e]) for e in busy),
        ", ".join(never) or "none"))


def routing_row(number, layer, share, most, w, h):
    """A layer: its cells, crosses where nobody went, and what that comes to."""
    n, out = len(share), []
    never = [e for e in range(n) if not layer.chosen[e]]
    if w >= WIDE:
        out += cells([s / most for s in share], BLUES, w, h, lambda e: (
            "L%d E%d: %d times, %.2f %%; weight %.4g" % (
                number, e, layer.chosen[e], 100 * share[e], layer.weight[e])),
            (lambda e: "%.1f" % (100 * share[e])) if w >= 36 else None)
    else:
        out += [told(number, layer, share), *cells([s / most for s in share], BLUES, w, h)]
    out.append(crosses(never, w, h))
    best = max(range(n), key=lambda e: share[e])
    again = "%.0f %%" % (100 * layer.again / layer.could) if layer.could else "\u2013"
    for (_, at), said in zip(STATS, ("%.1f %%  (%d)" % (100 * share[best], best),
                                     "%.1f" % effective(share), "%d" % len(never), again)):
        out.append(text(n * w + at, h / 2 + 4, said, 11, text_anchor="end"))
    return out + [text(-10, h / 2 + 4, "layer %d" % number, 11, text_anchor="end", fill=FAINT)]


def shares(layer, by, n):
    """The share of every expert in the choices of a layer, or in their weight."""
    counts = [getattr(layer, by)[e] for e in range(n)]
    total = sum(counts)
    if not 0 < total < math.inf:
        raise Unfit("the weights of a layer add up to %g" % total)
    return [c / total for c in counts]


def routing_legend(y, n, used, most, width):
    """What the colours and the columns of numbers mean."""
    even, chance = 1 / n / most, 100 * used / n
    out = legend(80, y, 260, BLUES, [(0, "0")] * (even > 0.2) + [(even, "even")] * (even < 0.8) +
                 [(1, "%.3g %%" % (100 * most))])
    said = ("busiest: the share of the expert used most (even: %.3g %%), and which" % (100 / n),
            "effective: so many experts, used evenly, have the same entropy",
            "unused: experts that no token chose, \u00d7",
            "again: choices that the token before had made, too (by chance %.0f %%)" % chance)
    return out + [text(400, y + 6 + 17 * i, cut(s, width - 410, 9.5), 11, fill=FAINT)
                  for i, s in enumerate(said)]


def routing(f, args):
    """The heat map of what the experts of every layer were used for."""
    layers = read_experts(f)
    n = max(1 + max(max(layer.chosen) for layer in layers.values()), args.n_expert)
    share = {i: shares(layer, args.by, n) for i, layer in layers.items()}
    most = max(map(max, share.values()))
    tokens = max(layer.tokens for layer in layers.values())
    used = max(sum(layer.chosen.values()) / layer.tokens for layer in layers.values())
    w, h = size_of_cells(len(layers), n)
    width, y = 80 + n * w + 300, 104
    out = [text(20, 32, "Which experts the tokens went to", 16, font_weight="bold"),
           text(20, 54, "%d token%s, %.3g of %d experts for each, in %d layer%s; colour: share in "
                "the %s of a layer, in percent" % (
                    tokens, "s"[:tokens > 1], used, n, len(layers), "s"[:len(layers) > 1],
                    "choices" if args.by == "chosen" else "weights"), 12, fill=FAINT)]
    out += [text(80 + n * w + at, y - 10, name, 11, text_anchor="end", font_weight="bold")
            for name, at in STATS]
    out += [text(80 + e * w + (w - 1) / 2, y - 10, "%d" % e, 10, text_anchor="middle", fill=FAINT)
            for e in range(0, n, 1 if w >= WIDE else 4 if w >= 8 else 16)]
    for i in sorted(layers):
        out += ['<g transform="translate(80 %d)">' % y,
                *routing_row(i, layers[i], share[i], most, w, h), "</g>"]
        y += h
    return document(width, y + 96, "Routing by layer and expert",
                    out + routing_legend(y + 16, n, used, most, width))


# ---------------------------------------------------------------------- trace

def read_trace(f, module):
    """{layer: {position: root mean square}} of a module, such as ".conv.conv", or of the residual
    stream, "", where layer -1 is the embedding."""
    pattern = re.compile(r"model\.layers\.([0-9]{1,3})%s" % re.escape(module))
    found = collections.defaultdict(dict)
    for number, line in numbered_lines(f):
        try:
            r = json.loads(line)
            name = r.get("name") or ""
            layer = pattern.fullmatch(name)
            if not layer and (module or name != "model.embed_tokens"):
                continue
            position = whole(r["pos"], "pos", 0, MOST_POSITIONS)
            n = whole(r["shape"][0], "shape", 1)
            l2 = math.inf if r["l2"] in ("nan", "inf") else real(r["l2"], "l2")
            if l2 < 0 or 1e300 < l2 < math.inf:
                raise Unfit("l2 is %g" % l2)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError,
                Unfit) as e:
            raise Unfit("line %d is no record of a trace (%s: %.60s)" %
                        (number, type(e).__name__, e)) from None
        found[int(layer[1]) if layer else -1][position] = l2 / math.sqrt(n)
    if not found:
        raise Unfit("no record of model.layers.N%s" % module)
    return found


def gathered(rows, most):
    """The rows with at most so many columns, each the mean of neighbours: (first position,
    positions a column, {layer: [...]})."""
    first = min(map(min, rows.values()))
    last = max(map(max, rows.values()))
    per = (last - first) // most + 1
    out = {}
    for layer, values in rows.items():
        columns = [[] for _ in range((last - first) // per + 1)]
        for position, v in values.items():
            columns[(position - first) // per].append(v)
        out[layer] = [sum(c) / len(c) if c else None for c in columns]
    return first, per, out


def trace_rows(y, rows, level, w, h, where):
    """A row for each layer, with the mean of its values; `where` tells of a column."""
    out = []
    for layer in sorted(rows):
        row, name = rows[layer], "layer %d" % layer if layer >= 0 else "embedding"
        known = [v for v in row if v is not None]
        out += ['<g transform="translate(80 %d)">' % y,
                *cells([None if v is None else level(v) for v in row], BLUES, w, h,
                       (lambda i: "%s, %s: %.4g" % (name, where(i), row[i])) if w >= 9 else None),
                crosses([i for i, v in enumerate(row) if v == math.inf], w, h),
                text(-10, h / 2 + 4, name, 11, text_anchor="end", fill=FAINT),
                text(len(row) * w + 10, h / 2 + 4, "%.3g" % (sum(known) / len(known)), 11), "</g>"]
        y += h
    return out


def trace(f, args):
    """The heat map of how large the output of a module is, by layer and position."""
    module = "." * bool(args.module) + args.module
    first, per, rows = gathered(read_trace(f, module), 128)
    good = [v for layer, row in rows.items() for v in row
            if v and math.isfinite(v) and (layer >= 0 or len(rows) == 1)]
    if not good:
        raise Unfit("no value is a number other than zero")
    low, high = math.log(min(good)), math.log(max(good) * 1.000001)
    n = len(next(iter(rows.values())))
    w, h = size_of_cells(len(rows), n)
    out = [text(20, 32, "How large the numbers are" if args.module else "The residual stream", 16,
                font_weight="bold"),
           text(20, 54, "root mean square of %s by position%s" % (
               cut("model.layers.N" + module, 280, 12),
               ", %d in a column" % per if per > 1 else ""), 12, fill=FAINT)]
    out += [text(80 + i * w + (w - 1) / 2, 90, "%d" % (first + i * per), 10, text_anchor="middle",
                 fill=FAINT) for i in range(0, n, -(-36 // w))]
    out.append(text(90 + n * w, 90, "mean", 11, font_weight="bold"))
    out += trace_rows(100, rows, lambda v: (math.log(v) - low) / (high - low) if v else 0, w, h,
                      lambda i: "position %d" % (first + i * per))
    bottom = 100 + h * len(rows)
    out += legend(80, bottom + 16, 260, BLUES, [
        (at, "%.3g" % math.exp(low + at * (high - low))) for at in (0, .5, 1)])
    return document(max(80 + n * w + 80, 480), bottom + 64,
                    "Root mean square by layer and position", out)
