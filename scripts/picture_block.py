"""picture_block.py - the blocks of a model with its real sizes, for picture.py."""
import collections
import html
import re

from svg import (FAINT, INK, LINE, MONO, MOST_LAYERS, PAPER, Unfit, cut, document, path, read_json,
                 real, rect, tag, text, whole)

CONV, ATTN, DENSE, MOE = "#0f766e", "#c2570c", "#475569", "#7c3aed"
TINT = {CONV: "#e3f4f1", ATTN: "#fdeee2", DENSE: "#eceff3", MOE: "#f1eafe"}
PANEL_W, PANEL_H, STRIP_W, TOP = 368, 456, 176, 76
ROLES = {"embedding": ("embedding", "#9a6700"), "output": ("output", "#bc8c1f"),
         "conv": ("convolutions", CONV), "attention": ("attention", ATTN),
         "dense_ffn": ("dense", DENSE), "router": ("router", "#b794f6"),
         "experts": ("experts", MOE), "norms": ("norms", "#d0d7de")}

# Of a box: where it is (left and right edge, from 0 to 1, and row), what it does, to what size,
# and with which tensor.  Of an arrow: the rows it joins, where, and what flows.
Box = collections.namedtuple("Box", "left right row what size tensor")
Arrow = collections.namedtuple("Arrow", "start end at label")


def conv_block(m):
    """Boxes and arrows of a short convolution; the other three are alike."""
    n = m["n_embd"]
    boxes = [Box(0, 1, 0, "rms_norm", "%d" % n, "attn_norm"),
             Box(0, 1, 1, "in_proj", "%d \u00d7 %d" % (n, 3 * n), "shortconv.in_proj"),
             Box(0, .66, 2, "u = b \u00b7 x", "", ""),
             Box(0, .66, 3, "%d taps a channel" % m["l_cache"], "%d \u00d7 %d" % (m["l_cache"], n),
                 "shortconv.conv"),
             Box(0, 1, 4, "c \u00b7 v", "", ""),
             Box(0, 1, 5, "out_proj", "%d \u00d7 %d" % (n, n), "shortconv.out_proj")]
    arrows = [Arrow(0, 1, .5, "%d" % n), Arrow(1, 2, .1, "b  %d" % n), Arrow(1, 2, .4, "x  %d" % n),
              Arrow(1, 4, .76, "c  %d" % n), Arrow(2, 3, .3, "u  %d, and the %d before" %
                                                   (n, m["l_cache"] - 1)),
              Arrow(3, 4, .3, "v  %d" % n), Arrow(4, 5, .5, "%d" % n), Arrow(5, 6, .5, "%d" % n)]
    return boxes, arrows


def heads(n):
    return "%d head%s" % (n, "s"[:n > 1])


def attention_block(m):
    n, d, q, kv = m["n_embd"], m["head_dim"], m["n_head"] * m["head_dim"], m["n_head_kv"]
    boxes = [Box(0, 1, 0, "rms_norm", "%d" % n, "attn_norm"),
             Box(0, .32, 1, "q", "%d \u00d7 %d" % (n, q), "attn_q"),
             Box(.34, .66, 1, "k", "%d \u00d7 %d" % (n, kv * d), "attn_k"),
             Box(.68, 1, 1, "v", "%d \u00d7 %d" % (n, kv * d), "attn_v"),
             Box(0, .32, 2, "norm, rope", "%d" % d, "attn_q_norm"),
             Box(.34, .66, 2, "norm, rope", "%d" % d, "attn_k_norm"),
             Box(.34, 1, 3, "cache of all k and v", "", ""),
             Box(0, 1, 4, "softmax(q k / \u221a%d) v" % d, "", ""),
             Box(0, 1, 5, "output", "%d \u00d7 %d" % (q, n), "attn_output")]
    arrows = [*(Arrow(0, 1, at, "%d" % n) for at in (.16, .5, .84)),
              Arrow(1, 2, .16, "%d" % q), *(Arrow(1, 2 + i, .5 + .34 * i, "%d" % (kv * d))
                                            for i in (0, 1)),
              Arrow(2, 4, .16, "%s of %d" % (heads(m["n_head"]), d)), Arrow(2, 3, .5, ""),
              Arrow(3, 4, .5, "%s, each for %d of q" % (heads(kv), m["n_head"] // kv)),
              Arrow(4, 5, .5, "%d" % q), Arrow(5, 6, .5, "%d" % n)]
    return boxes, arrows


def ffn_block(m):
    n, f = m["n_embd"], m["n_ff"]
    boxes = [Box(0, 1, 0, "rms_norm", "%d" % n, "ffn_norm"),
             Box(0, .49, 1, "gate", "%d \u00d7 %d" % (n, f), "ffn_gate"),
             Box(.51, 1, 1, "up", "%d \u00d7 %d" % (n, f), "ffn_up"),
             Box(0, 1, 2, "silu(gate) \u00b7 up", "", ""),
             Box(0, 1, 3, "down", "%d \u00d7 %d" % (f, n), "ffn_down")]
    arrows = [Arrow(0, 1, .25, "%d" % n), Arrow(0, 1, .75, "%d" % n), Arrow(1, 2, .25, "%d" % f),
              Arrow(1, 2, .75, "%d" % f), Arrow(2, 3, .5, "%d" % f), Arrow(3, 4, .5, "%d" % n)]
    return boxes, arrows


def moe_block(m):
    """The residual goes to the router and, past it, to the experts that it chooses."""
    n, f, e, k = m["n_embd"], m["n_ff_expert"], m["n_expert"], m["n_expert_used"]
    boxes = [Box(0, 1, 0, "rms_norm", "%d" % n, "ffn_norm"),
             Box(.26, 1, 1, "router", "%d \u00d7 %d" % (n, e), "ffn_gate_inp"),
             Box(.26, 1, 2, "the largest %d of s + bias" % k, "%d" % e, "exp_probs_b"),
             Box(0, .78, 3, "gate and up", "%d \u00d7 %d \u00d7 %d" % (n, f, e),
                 "ffn_gate_exps, ffn_up_exps"),
             Box(0, .78, 4, "silu(gate) \u00b7 up", "", ""),
             Box(0, .78, 5, "down", "%d \u00d7 %d \u00d7 %d" % (f, n, e), "ffn_down_exps"),
             Box(0, 1, 6, "sum by s / \u03a3s", "", "")]
    arrows = [Arrow(0, 3, .12, "%d" % n), Arrow(0, 1, .63, "%d" % n),
              Arrow(1, 2, .63, "s = sigmoid, %d" % e), Arrow(2, 3, .52, "which %d" % k),
              Arrow(2, 6, .89, "their s"), Arrow(3, 4, .39, "%d \u00d7 2 \u00d7 %d" % (k, f)),
              Arrow(4, 5, .39, "%d \u00d7 %d" % (k, f)), Arrow(5, 6, .39, "%d \u00d7 %d" % (k, n)),
              Arrow(6, 7, .5, "%d" % n)]
    return boxes, arrows


HEAD = '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" ' \
       'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="%s"/></marker></defs>' % LINE


def rows_of(boxes):
    """(top, height) of every row, the rest of the panel shared out between them, and where the
    sum is."""
    n = max(b.row for b in boxes) + 1
    high = [max(38 if b.tensor else 26 for b in boxes if b.row == row) for row in range(n)]
    gap = (PANEL_H - 86 - sum(high)) / n
    tops = [56 + sum(high[:i]) + gap * i for i in range(n)]
    return list(zip(tops, high)) + [(PANEL_H - 30, 20)]


def draw_box(b, x, width, at, colour):
    """A box that holds weights is tinted and has two lines: what it does, and what they are."""
    left, w = x + b.left * width, (b.right - b.left) * width
    top, middle = at[0], x + (b.left + b.right) / 2 * width
    if not b.tensor:
        return [rect(left, top, w, 26, fill=PAPER, stroke=colour, rx=13),
                text(middle, top + 17, cut(b.what, w, 11), 12, text_anchor="middle")]
    what = html.escape(cut(b.what, w, 11)) + " " + tag("tspan", html.escape(b.size), fill=FAINT,
                                                         font_size=11)
    return [rect(left, top, w, 38, "blk.N." + b.tensor.replace(", ", ", blk.N."), stroke=colour,
                 fill=TINT[colour], rx=4),
            tag("text", what, x=middle, y=top + 16, font_size=12, text_anchor="middle",
                pointer_events="none"),
            text(middle, top + 31, cut(b.tensor, w, 10), 10, text_anchor="middle",
                 font_family=MONO, fill=colour, pointer_events="none")]


def draw_panel(x, y, title, note, colour, block):
    """A block with what flows from box to box, and around it to the sum."""
    boxes, arrows = block
    left, width = x + 36, PANEL_W - 54
    rows = [(y + top, high) for top, high in rows_of(boxes)]
    middle, end = left + width / 2, rows[-1][0] + 10
    out = [rect(x, y, PANEL_W, PANEL_H, fill="#fbfcfd", stroke="#d0d7de", rx=6),
           path("M%g %gh%g" % (x + 1, y + 15, PANEL_W - 2), colour, stroke_width=28),
           text(x + 12, y + 20, title, 13, font_weight="bold", fill=PAPER),
           text(x + PANEL_W - 12, y + 20, note, 11, text_anchor="end", fill=PAPER),
           path("M%g %gV%g" % (middle, y + 29, rows[0][0]), marker_end="url(#to)"),
           path("M%g %gH%gV%gH%g" % (middle, y + 42, x + 18, end, middle - 10),
                marker_end="url(#to)"),
           text(middle + 8, y + 46, "x", 11, fill=FAINT)]
    for a in arrows:
        at, start, stop = left + a.at * width, sum(rows[a.start]), rows[a.end][0]
        out += [path("M%g %.1fV%.1f" % (at, start, stop), marker_end="url(#to)"),
                text(at + 6, (start + rows[a.start + 1][0]) / 2 + 3, a.label, 10, fill=FAINT)]
    for b in boxes:
        out += draw_box(b, left, width, rows[b.row], colour)
    return out + [tag("circle", cx=middle, cy=end, r=10, fill=PAPER, stroke=LINE),
                  path("M%g %gh10m-5 -5v10" % (middle - 5, end), INK),
                  path("M%g %gV%g" % (middle, end + 10, y + PANEL_H))]


def draw_layer(x, y, w, h, i, m):
    """A layer of the strip: what mixes time in it, and what follows, below it or beside."""
    a, e = m["layer_map"][i] == "A", m["ffn_map"][i] == "e"
    parts = ((ATTN if a else CONV, "attention" if a else "short conv"),
             (MOE if e else DENSE, "%d experts" % m["n_expert"] if e else "dense"))
    tall = h >= 40
    step, w, high = (0, w, h / 2 - 2) if tall else (w / 2, w / 2 - 1, h - 1.5)
    size, out = min(12, high - 1.5), []
    for k, (colour, name) in enumerate(parts):
        left, top = x + k * step, y + tall * k * (high + 1)
        out.append(rect(left, top, w, high, "layer %d: %s" % (i, name), fill=colour))
        if size >= 7:
            out.append(text(left + w / 2, top + high / 2 + size * .36, cut(name, w, size * .85),
                            size, text_anchor="middle", fill=PAPER, pointer_events="none"))
    if size >= 7:
        out.append(text(x - 5, y + h / 2 + size / 3, "%d" % i, size, text_anchor="end", fill=FAINT))
    return out


def draw_strip(x, y, height, m):
    """The way of a token through the whole model, one row for each layer."""
    left, w, n = x + 24, STRIP_W - 34, m["n_layer"]
    room = min(96 * n, height - 152)
    ends = ((y, "token_embd", "%d \u00d7 %d" % (m["n_embd"], m["n_vocab"])),
            (y + 70 + room, m["last_norm"], "%d" % m["n_embd"]),
            (y + 118 + room, "token_embd" if m["tied"] else "output",
             "%d \u00d7 %d" % (m["n_embd"], m["n_vocab"])))
    out = []
    for top, name, size in ends:
        out += [rect(left, top, w, 34, name + ".weight", fill="#f6f8fa", stroke=LINE, rx=4),
                text(left + w / 2, top + 15, size, 11, text_anchor="middle", pointer_events="none"),
                text(left + w / 2, top + 28, name, 10, text_anchor="middle", font_family=MONO,
                     fill=FAINT, pointer_events="none")]
    for start, stop in ((34, 52), (52 + room, 70 + room), (104 + room, 118 + room)):
        out.append(path("M%g %gV%g" % (left + w / 2, y + start, y + stop), marker_end="url(#to)"))
    for i in range(n):
        out += draw_layer(left, y + 52 + room * i / n, w, room / n, i, m)
    return out


def draw_facts(x, y, m):
    """In the place of a block that the model does not have."""
    out = [rect(x, y, PANEL_W, PANEL_H, fill="#fbfcfd", stroke="#d0d7de", rx=6)]
    for i, (name, value) in enumerate(m["facts"]):
        out += [text(x + 24, y + 44 + 28 * i, name, 13, fill=FAINT),
                text(x + PANEL_W - 24, y + 44 + 28 * i, cut(value, 160, 13), 13, text_anchor="end")]
    return out


def draw_shares(x, y, width, m):
    """Bars of the parameters by role: all of them, and those that a token meets."""
    out, everything = [], sum(m["parameters"].values())
    for what, total in (("parameters", "in all"), ("active", "for a token")):
        at = x + 150
        out.append(text(x, y + 13, "%s %s" % (short(sum(m[what].values())), total), 12))
        for role, n in m[what].items():
            (name, colour), w = ROLES[role], (width - 150) * n / everything
            if w >= 0.5:
                out.append(rect(at, y, max(w - 0.5, 0.5), 18, "%s: %d parameters" % (name, n),
                                fill=colour))
            at += w
        y += 24
    at = x + 150
    for role, n in m["parameters"].items():
        if n:
            said = "%s %s" % (ROLES[role][0], short(n))
            out += [rect(at, y + 4, 9, 9, fill=ROLES[role][1]), text(at + 13, y + 12, said, 10)]
            at += 24 + 5.9 * len(said)
    return out


def short(n, unit=""):
    """1234567 as 1.23 M."""
    for power, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "K")):
        if n >= power:
            return "%.3g %s%s" % (n / power, letter, unit)
    return ("%d %s" % (n, unit)).strip()


def shape_of(doc):
    """What the drawing needs of a model: counts by their names, and the maps of its layers."""
    at, most = doc["sizes"], 1 << 20
    m = {k: whole(at[k], k, 1, most) for k in ("n_layer", "n_embd", "n_vocab", "l_cache")}
    m["layer_map"], m["ffn_map"], n = str(doc["layer_map"]), str(doc["ffn_map"]), m["n_layer"]
    if n > MOST_LAYERS or not re.fullmatch("[cA]{%d}" % n, m["layer_map"]) or \
            not re.fullmatch("[de]{%d}" % n, m["ffn_map"]):
        raise Unfit("%d layers with the maps %.40s and %.40s, expected c or A, and d or e, for "
                    "each of at most %d" % (n, m["layer_map"], m["ffn_map"], MOST_LAYERS))
    for needs, where, letter in ((("n_head", "n_head_kv", "head_dim"), "layer_map", "A"),
                                 (("n_ff",), "ffn_map", "d"),
                                 (("n_expert", "n_expert_used", "n_ff_expert"), "ffn_map", "e")):
        m.update({k: whole(at[k], k, 1, most) for k in needs if letter in m[where]})
    for what in ("parameters", "active"):
        m[what] = {r: whole(doc["roles"][r][what], what, 0, 1 << 60) for r in ROLES
                   if r in doc["roles"]}
    if not any(m["parameters"].values()):
        raise Unfit("a model without parameters")
    return m


def model_of(doc):
    """The same with its name and what else is told of it."""
    try:
        m, of, memory = shape_of(doc), doc["weights"], doc["memory"]
        m["tied"], m["name"] = bool(doc["tied"]), str(doc["name"] or "a model without a name")
        m["last_norm"] = cut(str(doc["last_norm"]).replace(".weight", ""), STRIP_W - 34, 10)
        size, read, kv, conv = (real(x, "a number of bytes") for x in (
            of["bytes"], of["bytes_per_token"], memory["kv_bytes_per_token"],
            memory["conv_state_bytes"]))
        m["facts"] = (("architecture", str(doc["architecture"])), ("weights", short(size, "B")),
                      ("bits per weight", "%.2f" % real(of["bits_per_weight"], "bits_per_weight")),
                      ("read for a token", short(read, "B")),
                      ("KV cache of a token", short(kv, "B")),
                      ("state of the convolutions", short(conv, "B")),
                      ("vocabulary", "%d" % m["n_vocab"]),
                      ("trained for", "%d tokens" % whole(doc["sizes"]["n_ctx_train"],
                                                          "n_ctx_train")))
    except (KeyError, TypeError, AttributeError) as e:
        raise Unfit("not what --inspect --json says of a model (%s: %.60s)" %
                    (type(e).__name__, e)) from None
    return m


def summary(facts):
    """The facts as a line."""
    say = dict(facts)
    return "%s: %s of weights, %s bits each, %s read for a token; a KV cache of %s a token" % (
        say["architecture"], say["weights"], say["bits per weight"], say["read for a token"],
        say["KV cache of a token"])


def block(f, args):
    """The drawing of a model from what --inspect --json says of it."""
    m = model_of(read_json(f))
    panels = (("short convolution", m["layer_map"].count("c"), CONV, conv_block),
              ("attention", m["layer_map"].count("A"), ATTN, attention_block),
              ("feed-forward, dense", m["ffn_map"].count("d"), DENSE, ffn_block),
              ("feed-forward, experts", m["ffn_map"].count("e"), MOE, moe_block))
    width, height = STRIP_W + 2 * PANEL_W + 44, TOP + 2 * PANEL_H + 148
    out = [HEAD, text(20, 32, cut(m["name"], width - 40, 18), 18, font_weight="bold"),
           text(20, 52, cut(summary(m["facts"]), width - 40, 11), 12, fill=FAINT)]
    out += draw_strip(12, TOP, 2 * PANEL_H + 16, m)
    for i, (title, n, colour, draw) in enumerate(panels):
        x, y = STRIP_W + 20 + i % 2 * (PANEL_W + 12), TOP + i // 2 * (PANEL_H + 16)
        out += draw_panel(x, y, title, "%d of %d layers" % (n, m["n_layer"]), colour, draw(m)) \
            if n else draw_facts(x, y, m)
    out += draw_shares(20, height - 118, width - 40, m)
    out += [text(20, height - 30, "Each layer is one operator of the upper row and then one feed-"
                 "forward of the lower; x is what flows from layer to layer.", 11, fill=FAINT),
            text(20, height - 14, "Weights are columns \u00d7 rows, as in the file, where their "
                 "names are blk.N.NAME.weight.", 11, fill=FAINT)]
    return document(width, height, "The blocks of " + m["name"], out)
