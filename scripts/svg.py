"""svg.py - elements, scales and cells of the drawings of picture.py, and reading with care.

What is drawn may come from anywhere: tokens with control characters, numbers that are none,
lines without end.  So all text goes through shown() and is escaped, numbers through whole()
and real(), and lines through numbered_lines(); what does not fit raises Unfit.
"""
import collections
import html
import json
import math
import unicodedata

INK, FAINT, LINE, PAPER = "#24292f", "#656d76", "#8c959f", "#ffffff"
SANS = "Helvetica,Arial,sans-serif"
MONO = "ui-monospace,Menlo,Consolas,monospace"
BLUES = ("#f4f8fd", "#c9def2", "#78b3dc", "#2f7bbd", "#0a3a75")
REDS = ("#ffffff", "#ffedb0", "#fdbb63", "#ee6a3b", "#a1131f")
LEVELS = 40                                       # shades of a scale

MOST_BYTES = 1 << 28                              # of a JSON document
MOST_LINE = 1 << 16                               # of a line of a table or trace
MOST_LAYERS = 256


class Unfit(Exception):
    """What was read cannot be drawn; the message is a sentence for whoever asked."""


# ---------------------------------------------------------------------- what is read

def numbered_lines(f):
    """(number, line) of all lines that are not blank."""
    number = 0
    while line := f.readline(MOST_LINE):
        number += 1
        if len(line) == MOST_LINE:
            raise Unfit("line %d has %d characters or more" % (number, MOST_LINE))
        if line.strip():
            yield number, line.strip()


def read_json(f):
    """A JSON object: all of the file, or its first line."""
    data = f.read(MOST_BYTES)
    if len(data) == MOST_BYTES:
        raise Unfit("more than %d MiB of JSON" % (MOST_BYTES >> 20))
    for part in (data, data.lstrip().split("\n")[0]):
        try:
            found = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    raise Unfit("no JSON object")


def whole(x, name, low=0, high=1 << 31):
    """x, a whole number from low to high."""
    if type(x) is not int or not low <= x <= high:
        raise Unfit("%s is %.40r, expected a whole number from %d to %d" % (name, x, low, high))
    return x


def real(x, name):
    """x as a float that is a number."""
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x):
        raise Unfit("%s is %.40r, expected a number" % (name, x))
    return float(x)


# ---------------------------------------------------------------------- the drawing

def shown(text):
    """The text with all that cannot be seen, or would move what stands beside it, spelt out."""
    out = []
    for c in text:
        if c == "\n":
            out.append("\u23ce")
        elif c == "\t":
            out.append("\u21e5")
        elif unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            out.append("\\x%02x" % ord(c) if ord(c) < 256 else "\\u%04x" % ord(c))
        else:
            out.append(c)
    return "".join(out)


def tag(name, inner="", **at):
    """An element; of the names of attributes, _ becomes -, and a float has one decimal."""
    at = "".join(' %s="%s"' % (
        key.strip("_").replace("_", "-"),
        ("%.1f" % v).replace(".0", "") if isinstance(v, float) else html.escape(shown(str(v))))
        for key, v in at.items())
    return "<%s%s>%s</%s>" % (name, at, inner, name) if inner else "<%s%s/>" % (name, at)


def text(x, y, what, size=12, **at):
    return tag("text", html.escape(shown(what)), x=float(x), y=float(y), font_size=size, **at)


def rect(x, y, w, h, tip="", **at):
    return tag("rect", tag("title", html.escape(shown(tip))) if tip else "",
               x=float(x), y=float(y), width=float(w), height=float(h), **at)


def path(d, stroke=LINE, **at):
    return tag("path", d=d, stroke=stroke, **{"fill": "none", **at})


def cut(what, width, size):
    """What fits into that many pixels; letters are taken to be as wide as they get."""
    what, most = shown(what), max(1, int(width / (size * 0.6)))
    return what if len(what) <= most else what[:most - 1] + "\u2026"


def document(width, height, title, body):
    """The whole file: a white card that stands out from a dark page and melts into a light one."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" ' \
           'font-family="%s" fill="%s">' % (width, height, width, height, SANS, INK)
    return "\n".join((head, tag("title", html.escape(shown(title))),
                      rect(0.5, 0.5, width - 1, height - 1, fill=PAPER, stroke="#d0d7de", rx=8),
                      *body, "</svg>\n"))


def shade(scale, v):
    """A colour of the scale, from 0 to 1, in LEVELS steps."""
    at = round(min(max(v, 0), 1) * LEVELS) / LEVELS * (len(scale) - 1)
    i = min(int(at), len(scale) - 2)
    a, b = ([int(c[k:k + 2], 16) for k in (1, 3, 5)] for c in scale[i:i + 2])
    return "#" + "".join("%02x" % round(p + (q - p) * (at - i)) for p, q in zip(a, b))


def readable(back):
    """The colour of letters on that one."""
    r, g, b = (int(back[k:k + 2], 16) for k in (1, 3, 5))
    return INK if 0.3 * r + 0.59 * g + 0.11 * b > 140 else "#ffffff"


def legend(x, y, width, scale, ticks):
    """A strip of the scale; ticks are (where from 0 to 1, label)."""
    step = width / LEVELS
    out = [rect(x + i * step, y, step + 0.3, 12, fill=shade(scale, i / (LEVELS - 1)))
           for i in range(LEVELS)]
    out.append(rect(x, y, width, 12, fill="none", stroke=LINE))
    for at, label in ticks:
        out += [path("M%.1f %dv5" % (x + at * width, y + 12)),
                text(x + at * width, y + 28, label, 11, text_anchor="middle")]
    return out


def cells(values, scale, w, h, tip=None, label=None):
    """A row of cells at the origin, for each value from 0 to 1; None leaves a gap.

    With `tip`, a function of the column, every cell tells it; without, the cells of a colour
    are one line with gaps, so that thousands of them remain a small file.
    """
    out, same = [], collections.defaultdict(list)
    for i, v in enumerate(values):
        if v is None:
            continue
        colour = shade(scale, v)
        if not tip:
            same[colour].append("M%g %gh%g" % (round(i * w, 1), h / 2, w - 1))
            continue
        out.append(tag("rect", tag("title", tip(i)), x=float(i * w), width=w - 1, height=h - 1,
                       fill=colour))
        if label:
            out.append(text(i * w + (w - 1) / 2, h / 2 + 4, label(i), 11, text_anchor="middle",
                            fill=readable(colour), pointer_events="none"))
    return out + [tag("g", "".join(tag("path", d="".join(d), stroke=colour)
                                   for colour, d in same.items()), stroke_width=h - 1)]


def crosses(at, w, h):
    """A cross in each of these cells of a row."""
    if not at:
        return ""
    r = min(w, h, 14) / 4
    return path("".join("M%.1f %.1fl%.1f %.1fm0 %.1fl%.1f %.1f" % (
        e * w + (w - 1) / 2 - r, h / 2 - r, 2 * r, 2 * r, -2 * r, -2 * r, 2 * r) for e in at),
        "#cf222e", stroke_width=1.2)


def size_of_cells(rows, columns):
    """How wide and high cells are for a drawing that is neither tiny nor too large to see."""
    return min(max(int(640 / columns), 3), 56), 28 if rows <= 12 else 20 if rows <= 26 else 15
