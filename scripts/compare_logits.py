#!/usr/bin/env python3
"""compare_logits.py - how far one run's predictions are from another's.

    ./run A.gguf --ids TEXT.i32 --logits A.f32
    ./run B.gguf --ids TEXT.i32 --logits B.f32
    python3 scripts/compare_logits.py --ids TEXT.i32 A.f32 B.f32

A is what is taken for right, B what other weights, another format or another cache make of the
same tokens.  The files hold float32, little-endian: the logits of every position of the text.
Told are the perplexity of both (with --ids: each position by the token after it), their
difference, the mean, the 99th percentile and the largest of the KL divergence of B from A, and
how often both hold the same token for the likeliest.  Behind +/- is the standard error.

Uses numpy if it is there; the standard library does, too, and takes longer.
"""
import argparse
import array
import math
import os
import sys

try:
    import numpy
except ImportError:
    numpy = None


def rows(f, n, width):
    """n rows of a file, one after the other."""
    for _ in range(n):
        data = f.read(4 * width)
        if len(data) < 4 * width:
            raise SystemExit("compare_logits.py: %s: cut short" % f.name)
        if numpy:
            yield numpy.frombuffer(data, "<f4").astype("f8")
            continue
        x = array.array("f", data)
        if sys.byteorder == "big":
            x.byteswap()
        yield x


def log_sum(x, top):
    """The logarithm of the sum of exp(x), x[top] being the largest."""
    if numpy:
        return x[top] + math.log(numpy.exp(x - x[top]).sum())
    return x[top] + math.log(math.fsum(math.exp(v - x[top]) for v in x))


def top_of(x):
    """The likeliest; of equals, the first."""
    return int(x.argmax()) if numpy else max(range(len(x)), key=x.__getitem__)


def divergence(a, b, all_a, all_b):
    """The sum of p (log p - log q), for p of a and q of b; exactly 0 where they are equal."""
    if numpy:
        return float((numpy.exp(a - all_a) * (a - b)).sum()) - (all_a - all_b)
    return math.fsum(math.exp(x - all_a) * (x - y) for x, y in zip(a, b)) - (all_a - all_b)


def mean(values):
    """The mean and its standard error."""
    centre = math.fsum(values) / len(values)
    square = math.fsum((x - centre) ** 2 for x in values) / len(values)
    return centre, math.sqrt(square / (len(values) - 1)) if len(values) > 1 else 0


def told(name, value, form="%.6g +/- %.2g"):
    print("%-14s %s" % (name, form % value))


def report(kl, same, nll):
    if nll[0]:
        ppl = [math.exp(mean(x)[0]) for x in nll]
        for name, x, p in zip(("perplexity A", "perplexity B"), nll, ppl):
            told(name, (p, p * mean(x)[1]), "%.4f +/- %.5f")
        both = [ppl[1] * b - ppl[0] * a for a, b in zip(*nll)]
        told("difference", (ppl[1] - ppl[0], mean(both)[1]), "%.6f +/- %.6f")
    told("KL divergence", mean(kl))
    kl = sorted(kl)
    at = 0.99 * (len(kl) - 1)
    below, above = kl[int(at)], kl[min(int(at) + 1, len(kl) - 1)]
    told("  99 %", below + (at - int(at)) * (above - below), "%.6g")
    told("  maximum", kl[-1], "%.6g")
    told("same top token", tuple(100 * x for x in mean(same)), "%.3f +/- %.3f %%")


def read_ids(path):
    with open(path, "rb") as f:
        ids = array.array("i", f.read())
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("a", metavar="A.f32")
    p.add_argument("b", metavar="B.f32")
    p.add_argument("--ids", metavar="TEXT.i32", help="the tokens of the text")
    p.add_argument("--n-vocab", type=int, metavar="N", help="tokens in the vocabulary, without "
                   "--ids")
    p.add_argument("--from", type=int, default=0, metavar="POS", dest="first",
                   help="leave out the positions before (0)")
    args = p.parse_args()
    ids = read_ids(args.ids) if args.ids else None
    size = os.path.getsize(args.a)
    if os.path.getsize(args.b) != size:
        raise ValueError("%s: %d bytes, but %s has %d" % (args.b, os.path.getsize(args.b), args.a,
                                                          size))
    if not ids and not args.n_vocab:
        p.error("expected --ids or --n-vocab")
    n = len(ids) if ids else size // 4 // args.n_vocab
    width = size // 4 // max(n, 1)
    if n == 0 or size != n * width * 4 or width <= max(ids or [1]):
        raise ValueError("%s: %d bytes, expected float32 for each of %d positions" %
                         (args.a, size, n))
    if not ids and width != args.n_vocab:
        raise ValueError("%s: %d numbers are not rows of %d; n_vocab of --inspect is the width" %
                         (args.a, size // 4, args.n_vocab))
    kl, same, nll = [], [], ([], [])
    with open(args.a, "rb") as fa, open(args.b, "rb") as fb:
        for i, (a, b) in enumerate(zip(rows(fa, n, width), rows(fb, n, width))):
            if i < args.first:
                continue
            top = top_of(a), top_of(b)
            total = log_sum(a, top[0]), log_sum(b, top[1])
            if not all(map(math.isfinite, total)):
                raise ValueError("position %d has logits that are not finite" % i)
            kl.append(divergence(a, b, *total))
            same.append(top[0] == top[1])
            if ids and i + 1 < n:
                for x, t, to in zip((a, b), total, nll):
                    to.append(t - x[ids[i + 1]])
    if not kl:
        raise ValueError("no position from %d on" % args.first)
    report(kl, same, nll)


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        sys.exit("compare_logits.py: %s: %s" % (e.filename, e.strerror))
    except (ValueError, IndexError) as e:
        sys.exit("compare_logits.py: %s" % e)
