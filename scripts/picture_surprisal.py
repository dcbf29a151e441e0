"""picture_surprisal.py - a text, each token in the colour of its surprise, for picture.py."""
import collections
import html
import math
import unicodedata

from svg import (FAINT, INK, MONO, REDS, SANS, Unfit, document, legend, path, read_json, real,
                 readable, rect, shade, shown, text)

Token = collections.namedtuple("Token", "text bits likeliest answer")
COLUMNS, CHAR, ROW = 92, 8, 24                    # letters in a row, and their size in pixels
MOST_BITS, MOST_TOKENS, MOST_LETTERS = 16, 350, 400


def token_text(t):
    """The bytes of a token as text, also where they are no whole characters."""
    if isinstance(t.get("bytes"), list):
        return bytes(t["bytes"]).decode("utf-8", "backslashreplace")[:MOST_LETTERS]
    return str(t["token"])[:MOST_LETTERS]


def bits(logprob):
    """The surprisal of a natural log probability; None of None."""
    return None if logprob is None else max(0.0, -real(logprob, "a log probability")) / math.log(2)


def tokens_of(content, answer):
    """Of a list of {"token": ..., "logprob": ..., "top_logprobs": ...}; null stands for the
    first token, for which nothing was expected."""
    return [Token(token_text(t), bits(t["logprob"]), [
        (token_text(o), bits(o["logprob"])) for o in t.get("top_logprobs") or ()], answer)
            for t in content if t is not None]


def tokens_of_columns(log, answer):
    """Of the log probabilities of /v1/completions."""
    best = log.get("top_logprobs") or [None] * len(log["tokens"])
    return [Token(str(t)[:MOST_LETTERS], bits(l),
                  [(str(k), bits(v)) for k, v in (b or {}).items()], answer)
            for t, l, b in zip(log["tokens"], log["token_logprobs"], best)]


def read_tokens(f):
    """All tokens of an answer of --json, --batch or a server, the prompt's first."""
    doc = read_json(f)
    try:
        doc = doc["response"]["body"] if "response" in doc else doc
        said = doc["choices"][0] if "choices" in doc else doc
        log = said.get("logprobs") or {}
        prompt = tokens_of(said.get("prompt_logprobs") or (), False)
        if "tokens" in log:               # of the prompt, too, if that was told with "echo"
            return prompt + tokens_of_columns(log, len(prompt) > 0)
        return prompt + tokens_of(log.get("content") or (), True)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as e:
        raise Unfit("no log probabilities of tokens (%s: %.60s)" % (type(e).__name__, e))


def explained(t):
    """What is told of a token."""
    name = shown(t.text[:60])
    if t.bits is None:
        return '"%s": nothing to expect it from' % name
    out = '"%s": %.2f bits, %s' % (name, t.bits, percent(t.bits))
    if t.likeliest:
        out += "; likeliest: " + ", ".join('"%s" %s' % (shown(o[:60]), percent(b))
                                           for o, b in t.likeliest[:3])
    return out


def percent(bits):
    """The probability of a surprisal."""
    p = 2 ** -bits
    return "%.3g %%" % (100 * p) if p > 1e-6 else "less than one in a million"


def columns(text):
    """How many columns of a terminal the text takes."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
               for c in text) or 1


def words(tokens):
    """Lists of tokens that should stay on one line."""
    word = []
    for t in tokens:
        if word and (t.text[:1].isspace() or word[-1].text.endswith("\n")):
            yield word
            word = []
        word.append(t)
    if word:
        yield word


def laid_out(tokens):
    """(token, text, row, column) of every piece of the text: a token, or part of a long one."""
    row = column = 0
    wrapped = False                               # begins this row in the middle of a line?
    for word in words(tokens):
        if column and column + sum(columns(shown(t.text)) for t in word) > COLUMNS:
            row, column, wrapped = row + 1, 0, True
        for t in word:
            start, piece = column, ""
            for c in shown(t.text[wrapped and column == 0 and t.text[:1] == " ":]):
                if piece and start + columns(piece + c) > COLUMNS:
                    yield t, piece, row, start
                    row, start, piece = row + 1, 0, ""
                piece += c
            yield t, piece, row, start
            column, wrapped = start + columns(piece), False
            if t.text.endswith("\n") or column >= COLUMNS:
                row, column, wrapped = row + 1, 0, not t.text.endswith("\n")


def draw_piece(t, piece, row, column):
    """A box as wide as its columns are, and letters fitted into it, whatever the font."""
    colour = shade(REDS, t.bits / MOST_BITS) if t.bits is not None else "#e8ebee"
    x, y, wide = 20 + column * CHAR, 74 + row * ROW, columns(piece) * CHAR
    bare = piece.lstrip(" ")
    skip = (len(piece) - len(bare)) * CHAR
    out = rect(x, y, wide - 0.5, ROW - 4, explained(t), fill=colour)
    if t.answer:
        out += path("M%d %dh%g" % (x, y + ROW - 3, wide - 0.5), "#0969da", stroke_width=2)
    if bare.strip():
        out += text(x + skip, y + 14.5, bare, 13, fill=readable(colour), textLength=wide - skip)
    return out


def text_summary(tokens):
    """How many tokens, and how much of a surprise they were."""
    known = [t.bits for t in tokens if t.bits is not None]
    if not known:
        raise Unfit("no log probabilities of tokens: they come with --json --logprobs 3")
    mean = sum(known) / len(known)
    return "%d token%s, %.2f bits each (perplexity %s), %.0f bits in all" % (
        len(known), "s"[:len(known) > 1], mean, "%.4g" % 2 ** mean if mean < 1000 else "huge",
        sum(known))


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Surprisal</title>
<body style="max-width:50em;margin:2em auto;background:#fff;color:%s;font:16px/1.7 %s">
<p>%s</p>
<p style="white-space:pre-wrap">%s</p>
</html>
"""


def surprisal_page(tokens):
    """The text as HTML, for longer ones."""
    out = []
    for t in tokens:
        colour = shade(REDS, t.bits / MOST_BITS) if t.bits is not None else "#e8ebee"
        line = ";border-bottom:2px solid #0969da" if t.answer else ""
        said = shown(t.text) + "\n" * t.text.endswith("\n")
        out.append('<span title="%s" style="background:%s;color:%s%s">%s</span>' % (
            html.escape(explained(t)), colour, readable(colour), line, html.escape(said)))
    return PAGE % (INK, SANS, html.escape(text_summary(tokens)), "".join(out))


def surprisal(f, args):
    """The drawing of a text, each token in the colour of how little it was expected."""
    tokens = read_tokens(f)[args.tokens]
    summary = text_summary(tokens)
    if args.output.endswith((".html", ".htm")):
        return surprisal_page(tokens)
    if len(tokens) > MOST_TOKENS:
        summary += "; here the first %d (.html has all)" % MOST_TOKENS
    pieces = list(laid_out(tokens[:MOST_TOKENS]))
    width, bottom = 40 + COLUMNS * CHAR, 74 + ROW * (1 + max(row for _, _, row, _ in pieces))
    out = [text(20, 32, "How much each token surprised the model", 16, font_weight="bold"),
           text(20, 54, summary, 12, fill=FAINT),
           '<g font-family="%s" xml:space="preserve">' % MONO,
           *(draw_piece(*p) for p in pieces), "</g>"]
    out += legend(width - 320, bottom + 18, 280, REDS, [
        (b / MOST_BITS, "%d%s" % (b, " bits" if not b else " +"[:2 * (b == MOST_BITS)]))
        for b in range(0, MOST_BITS + 1, 4)])
    if any(t.answer for t in tokens):
        out += [path("M20 %dh24" % (bottom + 28), "#0969da", stroke_width=2),
                text(50, bottom + 32, "written by the model", 11, fill=FAINT)]
    return document(width, bottom + 62, "Surprisal of a text, token by token", out)
