"""gguf.py - reads and writes GGUF files, quantises and dequantises their tensors.

    python3 scripts/gguf.py show FILE                          list metadata and tensors
    python3 scripts/gguf.py FILE --tensor NAME [--rows A-B]    what is in one of them

A GGUF file, version 3, all numbers little-endian:

    "GGUF"  u32 version  u64 n_tensors  u64 n_entries
    entries   key: string, u32 type, value          string = u64 length, bytes
              (an array value: u32 element type, u64 count, elements)
    tensors   name: string, u32 n_dims, u64 dims[n_dims] (fastest first),
              u32 type, u64 offset from the start of the data
    padding to general.alignment (32 if absent), then the data; every tensor
    starts at a multiple of the alignment

In Python a tensor has its dimensions the other way round, slowest first, as
NumPy has them: [out][in] for a matrix, [expert][out][in] for experts.
"""
import argparse
import difflib
import hashlib
import re
import struct
import sys

import numpy as np

# ------------------------------------------------------------------ weight types
#
# A row of a quantised tensor is a run of blocks.  The fields of each kind of
# block, in file order (f2: half float; u1, i1: byte; the last number: how many):

BLOCKS = {
    # 32 weights: one scale, or a scale and a minimum.  A byte of qs holds weight
    # i in its low half and weight i + 16 in its high half; bit i of qh is the
    # fifth bit of weight i.
    "Q4_0":   [("d", "<f2"), ("qs", "u1", 16)],                        # d (q - 8)
    "Q4_1":   [("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)],          # d q + m
    "Q5_0":   [("d", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)],         # d (q - 16)
    "Q5_1":   [("d", "<f2"), ("m", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)],
    "Q8_0":   [("d", "<f2"), ("qs", "i1", 32)],                        # d q
    "IQ4_NL": [("d", "<f2"), ("qs", "u1", 16)],                        # d table[q]
    # 256 weights: groups of 16 or 32 with small integer scales (and minima),
    # which d (and dmin) bring to size.
    "Q2_K":   [("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")],
    "Q3_K":   [("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")],
    "Q4_K":   [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)],
    "Q5_K":   [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32),
               ("qs", "u1", 128)],
    "Q6_K":   [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")],
    "IQ4_XS": [("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)],
}
BLOCKS = {name: np.dtype(fields) for name, fields in BLOCKS.items()}
PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
TYPE_ID = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8,
           "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20,
           "IQ4_XS": 23, "BF16": 30}
TYPE_NAME = {i: name for name, i in TYPE_ID.items()}

# The 16 values of IQ4_NL and IQ4_XS: dense near zero, where most weights are.
TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10,
                  1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


def block_size(t):
    return 1 if t in PLAIN else 256 if t.endswith("_K") or t == "IQ4_XS" else 32


def n_bytes(t, shape):
    n = int(np.prod(shape, dtype=np.int64))
    return n * PLAIN[t].itemsize if t in PLAIN else n // block_size(t) * BLOCKS[t].itemsize


def usable_type(t, n_columns):
    """The type that takes t's place where rows do not consist of whole blocks."""
    if n_columns % block_size(t):
        t = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.get(t, "IQ4_NL")
    return "F16" if n_columns % block_size(t) else t


# ---------------------------------------------------------- integers in and out
#
# For every quantised type: unpack(blocks) gives (scale, minimum, q), pack() is
# the inverse.  q has the shape [block][group][weight]; scale and minimum
# [block][group][1], already multiplied out.  weight = scale * q - minimum.

def nibbles(qs, run):
    """Bytes -> 4-bit numbers.  In every `run` bytes all low halves come first."""
    qs = qs.reshape(len(qs), -1, 1, run)
    return np.concatenate([qs & 15, qs >> 4], 2).reshape(len(qs), -1)


def pack_nibbles(q, run):
    q = q.astype(np.uint8).reshape(len(q), -1, 2, run)
    return (q[:, :, 0] | q[:, :, 1] << 4).reshape(len(q), -1)


def crumbs(qs):
    """Bytes -> 2-bit numbers: 32 bytes hold 4 runs of 32, lowest bits first."""
    qs = qs.reshape(len(qs), -1, 1, 32)
    return np.concatenate([qs >> s & 3 for s in (0, 2, 4, 6)], 2).reshape(len(qs), -1)


def pack_crumbs(q):
    q = q.astype(np.uint8).reshape(len(q), -1, 4, 32)
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(len(q), -1)


def bits(qh):
    """32 bytes -> 256 bits: bit k of byte i belongs to weight 32 k + i."""
    return np.concatenate([qh >> k & 1 for k in range(8)], 1)


def pack_bits(b):
    b = b.astype(np.uint8).reshape(len(b), 8, 32)
    return sum(b[:, k] << k for k in range(8)).astype(np.uint8)


def bits32(qh):
    """One 32-bit number -> 32 bits."""
    return (qh[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(np.uint8)


def pack_bits32(b):
    return (b.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)


def k4_scales(s):
    """The 12 bytes of Q4_K and Q5_K: 8 scales and 8 minima of 6 bits.
    Bytes 0-3 and 4-7 hold scales and minima 0-3; bytes 8-11 the low halves of
    scales and minima 4-7, whose upper two bits sit on top of bytes 0-7."""
    a, b, c = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    return (np.concatenate([a & 63, c & 15 | (a >> 6) << 4], 1),
            np.concatenate([b & 63, c >> 4 | (b >> 6) << 4], 1))


def pack_k4_scales(sc, m):
    sc, m = sc.astype(np.uint8), m.astype(np.uint8)
    return np.concatenate([sc[:, :4] | (sc[:, 4:] >> 4) << 6,
                           m[:, :4] | (m[:, 4:] >> 4) << 6,
                           sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4], 1)


def q3_scales(s):
    """The 12 bytes of Q3_K: 16 scales of 6 bits, stored with 32 added.  The low
    halves are in bytes 0-7 (0-7 low, 8-15 high), the upper bits in bytes 8-11."""
    low = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], 1)
    high = np.concatenate([s[:, 8:] >> k & 3 for k in (0, 2, 4, 6)], 1)
    return (low | high << 4).astype(np.int32) - 32


def pack_q3_scales(sc):
    u = (sc + 32).astype(np.uint8)
    high = (u >> 4).reshape(len(u), 4, 4)
    return np.concatenate([u[:, :8] & 15 | (u[:, 8:] & 15) << 4,
                           high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6], 1)


def unpack(b, t, dtype=np.float32):
    """Blocks -> (scale, minimum, q)."""
    d = b["d"].astype(dtype)[:, None]
    m = np.zeros_like(d)
    if t in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"):
        q = nibbles(b["qs"], 16).astype(np.int32)
        if t[:2] == "Q5":
            q += bits32(b["qh"]).astype(np.int32) << 4
        if t[-1] == "1":
            m = -b["m"].astype(dtype)[:, None]
        if t[-1] == "0":
            q -= 8 if t == "Q4_0" else 16
        if t == "IQ4_NL":
            q = TABLE[q]
        scale = d
    elif t == "Q8_0":
        scale, q = d, b["qs"]
    elif t == "Q2_K":
        scale = d * (b["scales"] & 15)
        m = b["dmin"].astype(dtype)[:, None] * (b["scales"] >> 4)
        q = crumbs(b["qs"])
    elif t == "Q3_K":
        scale = d * q3_scales(b["scales"])
        q = crumbs(b["qs"]).astype(np.int32) + (bits(b["hmask"]).astype(np.int32) << 2) - 4
    elif t in ("Q4_K", "Q5_K"):
        sc, mn = k4_scales(b["scales"])
        scale, m = d * sc, b["dmin"].astype(dtype)[:, None] * mn
        q = nibbles(b["qs"], 32)
        if t == "Q5_K":
            q = q | bits(b["qh"]) << 4
    elif t == "Q6_K":
        scale = d * b["scales"]
        q = (nibbles(b["ql"], 64) | crumbs(b["qh"]) << 4).astype(np.int32) - 32
    elif t == "IQ4_XS":
        low = nibbles(b["scales_l"], 1).astype(np.int32)
        high = b["scales_h"][:, None].astype(np.int32) >> np.arange(0, 16, 2) & 3
        scale = d * (low + (high << 4) - 32)
        q = TABLE[nibbles(b["qs"], 16)]
    n = scale.shape[1]
    return (scale[:, :, None], np.broadcast_to(m, scale.shape)[:, :, None],
            q.reshape(len(b), n, -1).astype(dtype))


def dequantise(raw, t, shape, dtype=np.float32):
    """Bytes of a tensor -> array.  In float64 the result is exact."""
    raw = np.frombuffer(raw, np.uint8)
    if t == "BF16":
        x = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(dtype)
    elif t in PLAIN:
        x = raw.view(PLAIN[t]).astype(dtype)
    else:
        blocks, step = raw.view(BLOCKS[t]), 1 << 13          # in pieces, to stay small
        x = np.empty((len(blocks), block_size(t)), dtype)
        for i in range(0, len(blocks), step):
            scale, m, q = unpack(blocks[i:i + step], t, dtype)
            x[i:i + step] = (scale * q - m).reshape(-1, block_size(t))
    return x.reshape(shape)


# ------------------------------------------------------------------- quantisers
#
# Each group is fitted by weighted least squares: round with a few trial scales,
# solve for the scale (and minimum) that suits the integers best, and keep the
# best fit.  Large weights count more: an error in them is felt more.

TRIALS = np.linspace(-0.08, 0.08, 9).astype(np.float32)


def ratio(a, b):
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def fit_scale(x, lo, hi, rounding=None):
    """x [...][n] -> scale [...][1] so that x is close to scale * q, lo <= q <= hi.
    lo is the longer side: the weight of largest magnitude is put there, so the
    scale may be negative."""
    rounding = rounding or (lambda v: np.clip(np.rint(v), lo, hi))
    w = x * x + 0.25 * (x * x).mean(-1, keepdims=True)
    peak = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)
    best = np.full_like(peak, -1)
    scale = np.zeros_like(peak)
    for trial in TRIALS:
        q = rounding(x * ratio(np.full_like(peak, lo * (1 + trial)), peak))
        xq, qq = (w * x * q).sum(-1, keepdims=True), (w * q * q).sum(-1, keepdims=True)
        gain = ratio(xq * xq, qq)              # how much of the error goes away
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, ratio(xq, qq), scale)
    return scale


def fit_range(x, hi, below_zero):
    """x [...][n] -> (scale, minimum) so that x is close to scale * q - minimum,
    0 <= q <= hi.  With below_zero the minimum may not be negative."""
    w = np.abs(x) + np.sqrt((x * x).mean(-1, keepdims=True)) + 1e-30
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    if below_zero:
        low = np.minimum(low, 0)
    best = np.full_like(low, np.inf)
    scale, minimum = (high - low) / hi, -low
    sw, sx = w.sum(-1, keepdims=True), (w * x).sum(-1, keepdims=True)
    for trial in TRIALS:
        q = np.clip(np.rint((x - low) * ratio(np.full_like(low, hi * (1 + trial)), high - low)), 0, hi)
        wq = w * q
        sq, sqq, sxq = (v.sum(-1, keepdims=True) for v in (wq, wq * q, wq * x))
        det = sw * sqq - sq * sq
        d, m = ratio(sw * sxq - sx * sq, det), -ratio(sqq * sx - sq * sxq, det)
        if below_zero:                         # the best scale without a minimum
            d, m = np.where(m < 0, ratio(sxq, sqq), d), np.maximum(m, 0)
        error = (w * (x - d * q + m) ** 2).sum(-1, keepdims=True)
        better = (error < best) & (d > 0)
        best = np.where(better, error, best)
        scale, minimum = np.where(better, d, scale), np.where(better, m, minimum)
    return scale, minimum


def half(v):
    """What a half float makes of v, for computing on with it."""
    return v.astype("<f2").astype(np.float32)


def nearest(x, scale, minimum, lo, hi):
    return np.clip(np.rint(ratio(x + minimum, np.broadcast_to(scale, x.shape))), lo, hi)


def to_table(v):
    """Index of the nearest value in TABLE."""
    return np.searchsorted((TABLE[1:] + TABLE[:-1]) / 2, v)


def quantise_blocks(x, t):
    """x [block][block_size] -> blocks."""
    b = np.zeros(len(x), BLOCKS[t])
    if t in ("Q4_0", "Q5_0", "Q8_0"):
        lo, hi = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-127, 127)}[t]
        d = half(np.abs(x).max(1, keepdims=True) / 127 if t == "Q8_0" else fit_scale(x, lo, hi))
        q = nearest(x, d, 0, lo, hi)
        b["d"] = d[:, 0]
        if t == "Q8_0":
            b["qs"] = q
        else:
            q = (q - lo).astype(np.uint8)
            b["qs"] = pack_nibbles(q & 15, 16)
            if t == "Q5_0":
                b["qh"] = pack_bits32(q >> 4)
    elif t in ("Q4_1", "Q5_1"):
        hi = 15 if t == "Q4_1" else 31
        d, m = fit_range(x, hi, False)
        d, m = half(d), half(m)
        q = nearest(x, d, m, 0, hi).astype(np.uint8)
        b["d"], b["m"], b["qs"] = d[:, 0], -m[:, 0], pack_nibbles(q & 15, 16)
        if t == "Q5_1":
            b["qh"] = pack_bits32(q >> 4)
    elif t == "IQ4_NL":
        d = half(fit_scale(x, -127, 113, lambda v: TABLE[to_table(v)]))
        b["d"] = d[:, 0]
        b["qs"] = pack_nibbles(to_table(ratio(x, np.broadcast_to(d, x.shape))), 16)
    elif t in ("Q2_K", "Q4_K", "Q5_K"):        # scale and minimum per group
        group, hi, top = {"Q2_K": (16, 3, 15), "Q4_K": (32, 15, 63), "Q5_K": (32, 31, 63)}[t]
        g = x.reshape(len(x), -1, group)
        sc, m = fit_range(g, hi, True)
        d, dmin = half(sc.max(1, keepdims=True) / top), half(m.max(1, keepdims=True) / top)
        sc, m = nearest(sc, d, 0, 0, top), nearest(m, dmin, 0, 0, top)
        q = nearest(g, d * sc, dmin * m, 0, hi).reshape(len(x), 256).astype(np.uint8)
        sc, m = sc[:, :, 0].astype(np.uint8), m[:, :, 0].astype(np.uint8)
        b["d"], b["dmin"] = d[:, 0, 0], dmin[:, 0, 0]
        if t == "Q2_K":
            b["scales"], b["qs"] = sc | m << 4, pack_crumbs(q)
        else:
            b["scales"], b["qs"] = pack_k4_scales(sc, m), pack_nibbles(q & 15, 32)
            if t == "Q5_K":
                b["qh"] = pack_bits(q >> 4)
    else:                                      # Q3_K, Q6_K, IQ4_XS: a signed scale
        group, lo, hi, low, top = {"Q3_K": (16, -4, 3, -32, 31), "Q6_K": (16, -32, 31, -128, 127),
                                   "IQ4_XS": (32, -127, 113, -32, 31)}[t]
        g = x.reshape(len(x), -1, group)
        table = t == "IQ4_XS"
        sc = fit_scale(g, lo, hi, (lambda v: TABLE[to_table(v)]) if table else None)
        peak = np.take_along_axis(sc, np.abs(sc).argmax(1)[:, None], 1)
        d = half(peak / low)
        sc = nearest(sc, d, 0, low, top)
        if table:
            q = to_table(ratio(g, np.broadcast_to(d * sc, g.shape)))
        else:
            q = nearest(g, d * sc, 0, lo, hi) - lo
        q = q.reshape(len(x), 256).astype(np.uint8)
        sc = sc[:, :, 0].astype(np.int32)
        b["d"] = d[:, 0, 0]
        if t == "Q3_K":
            b["scales"], b["qs"], b["hmask"] = pack_q3_scales(sc), pack_crumbs(q & 3), pack_bits(q >> 2)
        elif t == "Q6_K":
            b["scales"], b["ql"], b["qh"] = sc, pack_nibbles(q & 15, 64), pack_crumbs(q >> 4)
        else:
            u = (sc + 32).astype(np.uint16)
            b["scales_l"] = pack_nibbles(u & 15, 1)
            b["scales_h"] = ((u >> 4) << np.arange(0, 16, 2, dtype=np.uint16)).sum(1)
            b["qs"] = pack_nibbles(q, 16)
    return b


def quantise(x, t):
    """Array [...][columns] -> bytes (a uint8 array).  Rows must be whole blocks."""
    x = np.ascontiguousarray(x, np.float32)
    if t == "BF16":                            # round to nearest, ties to even
        u = x.view(np.uint32)
        return np.frombuffer(((u + 0x7fff + (u >> 16 & 1)) >> 16).astype("<u2").tobytes(), np.uint8)
    if t in PLAIN:
        return np.frombuffer(x.astype(PLAIN[t]).tobytes(), np.uint8)
    n = block_size(t)
    if x.shape[-1] % n:
        raise ValueError("%d columns are no multiple of %d" % (x.shape[-1], n))
    x, step = x.reshape(-1, n), 1 << 18 >> n.bit_length()
    parts = [quantise_blocks(x[i:i + step], t) for i in range(0, len(x), step)]
    return np.frombuffer(np.concatenate(parts).tobytes(), np.uint8)


# -------------------------------------------------------------------- the file

SCALARS = ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr",
           "u64", "i64", "f64"]                # their place is their number
CODES = dict(zip(SCALARS, "BbHhIif?..Qqd"))


class Tensor:
    def __init__(self, name, t, shape, raw):
        self.name, self.type, self.shape, self.raw = name, t, tuple(shape), raw

    def array(self, dtype=np.float32):
        return dequantise(self.raw, self.type, self.shape, dtype)


class File:
    """metadata: {key: (type, value)}, where the type of an array is "arr:i32",
    say; tensors: {name: Tensor}."""

    def __init__(self, path):
        self.data = np.memmap(path, np.uint8, "r")
        self.at = 0
        if bytes(self.take(4)) != b"GGUF":
            raise ValueError("%s: not a GGUF file" % path)
        self.version = self.number("u32")
        if self.version not in (2, 3):
            raise ValueError("%s: GGUF version %d" % (path, self.version))
        n_tensors, n_entries = self.number("u64"), self.number("u64")
        self.metadata, self.tensors = {}, {}
        for _ in range(n_entries):
            key = self.string()
            self.metadata[key] = self.value(SCALARS[self.number("u32")])
        places = []
        for _ in range(n_tensors):
            name = self.string()
            dims = [self.number("u64") for _ in range(self.number("u32"))]
            places.append((name, dims[::-1], TYPE_NAME[self.number("u32")], self.number("u64")))
        align = self.get("general.alignment", 32)
        start = (self.at + align - 1) // align * align
        for name, shape, t, offset in places:
            self.at = start + offset
            self.tensors[name] = Tensor(name, t, shape, self.take(n_bytes(t, shape)))

    def take(self, n):
        if n > len(self.data) - self.at:
            raise ValueError("the file ends too early")
        self.at += n
        return self.data[self.at - n:self.at]

    def number(self, t):
        code = "<" + CODES[t]
        return struct.unpack(code, bytes(self.take(struct.calcsize(code))))[0]

    def string(self):
        return bytes(self.take(self.number("u64"))).decode("utf-8", "surrogateescape")

    def value(self, t):
        if t == "str":
            return t, self.string()
        if t != "arr":
            return t, self.number(t)
        t, n = SCALARS[self.number("u32")], self.number("u64")
        return "arr:" + t, [self.value(t)[1] for _ in range(n)]

    def get(self, key, default=None):
        return self.metadata[key][1] if key in self.metadata else default


def write(path, metadata, tensors, align=32):
    """metadata as in File; tensors: an iterable of Tensor.  A Tensor too large for
    memory has a raw with a length and a method parts() that yields its bytes."""
    def string(s):
        b = s.encode("utf-8", "surrogateescape")
        return struct.pack("<Q", len(b)) + b

    def value(t, v):
        return string(v) if t == "str" else struct.pack("<" + CODES[t], v)

    tensors = list(tensors)
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, (t, v) in metadata.items():
        head.append(string(key))
        if t.startswith("arr:"):
            t = t[4:]
            head.append(struct.pack("<IIQ", SCALARS.index("arr"), SCALARS.index(t), len(v)))
            head += [value(t, e) for e in v]
        else:
            head.append(struct.pack("<I", SCALARS.index(t)) + value(t, v))
    offset = 0
    for x in tensors:
        dims = x.shape[::-1]
        head.append(string(x.name) + struct.pack("<I%dQIQ" % len(dims), len(dims), *dims,
                                                 TYPE_ID[x.type], offset))
        offset += (len(x.raw) + align - 1) // align * align
    head = b"".join(head)
    with open(path, "wb") as f:
        f.write(head + bytes(-len(head) % align))
        for x in tensors:
            for part in x.raw.parts() if hasattr(x.raw, "parts") else [bytes(x.raw)]:
                f.write(part)
            f.write(bytes(-len(x.raw) % align))


def show(path):
    f = File(path)
    print("GGUF version %d, %d tensors, %d entries" % (f.version, len(f.tensors), len(f.metadata)))
    for key, (t, v) in f.metadata.items():
        text = repr(v[:8])[:-1] + ", ...]" if t[:4] == "arr:" and len(v) > 8 else repr(v)
        print("  %-44s %-8s %s" % (key, t, text[:100]))
    for x in f.tensors.values():
        print("  %-44s %-8s %s" % (x.name, x.type, " x ".join(map(str, x.shape[::-1]))))


def show_tensor(path, name, rows="0-7"):
    """What a tensor holds: its place, the range of its weights, and the first columns of some
    of its rows."""
    f = File(path)
    if name not in f.tensors:
        near = difflib.get_close_matches(name, f.tensors, 3, 0)
        sys.exit("gguf.py: %s: no tensor %s; the nearest are %s" % (path, name, ", ".join(near)))
    t = f.tensors[name]
    x = t.array(np.float64).reshape(-1, t.shape[-1] if t.shape else 1)
    found = re.fullmatch(r"([0-9]{1,18})(-?)([0-9]{0,18})", rows)
    first, last = (int(found[1]), int(found[3] or len(x) - 1 if found[2] else found[1])) \
        if found else (1, 0)
    last = min(last, len(x) - 1) if rows == "0-7" else last
    if not first <= last < len(x):
        sys.exit("gguf.py: --rows %s: expected A-B, of the rows from 0 to %d" % (rows, len(x) - 1))
    good = x[np.isfinite(x)]
    print("%s: %s, %s, %d bytes, sha256 %s" % (
        name, t.type, " x ".join(map(str, t.shape[::-1])), len(t.raw),
        hashlib.sha256(t.raw).hexdigest()))
    if good.size:
        print("min %.9g, max %.9g, mean %.9g, rms %.9g, not finite %d" % (
            good.min(), good.max(), good.mean(), np.sqrt((good * good).mean()),
            x.size - good.size))
    for i in range(first, last + 1):
        print("%8d  %s" % (i, " ".join("%9.4g" % v for v in x[i, :8])))


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "show":
        return show(sys.argv[2])
    p = argparse.ArgumentParser(description="What is in a tensor; `show FILE` lists them.")
    p.add_argument("file")
    p.add_argument("--tensor", required=True, metavar="NAME")
    p.add_argument("--rows", default="0-7", metavar="A-B")
    args = p.parse_args()
    show_tensor(args.file, args.tensor, args.rows)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, IndexError, KeyError) as e:
        sys.exit("gguf.py: %s" % e)
