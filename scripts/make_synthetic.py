"""make_synthetic.py - a GGUF of the exact shape of a released LFM2, random inside.

    python3 scripts/make_synthetic.py 24b-a2b q4_0 OUT.gguf          (13.5 GB)
    python3 scripts/make_synthetic.py 24b-a2b q4_0 OUT.gguf --layers 4 --vocab 2048

Metadata, tensor names, shapes and weight types are those of a converted and
quantised model, so loading, memory and speed can be measured without it.  What
is computed means nothing, but stays finite and takes as long as the real thing.
The same arguments give the same bytes, on every machine.

Not published, so assumed: that the layers 2, 6, 10, ..., 38 of 24b-a2b attend, the
rope base of 230m, and that all of the 128000 tokens of lfm2.5 are used.
"""
import argparse
import functools
import itertools
import math
import os
import re
import shutil

import numpy as np

import gguf

# ------------------------------------------------------------------- the family

L16, L24, L40 = (2, 5, 8, 10, 12, 14), (2, 6, 10, 14, 18, 21), tuple(range(2, 40, 4))
L30 = (2, 5, 9, 13, 17, 21, 24, 27)
OLD, NEW = 65536, 128000                                  # the two vocabularies
KV_HEADS, HEAD_DIM, L_CACHE, N_CTX = 8, 64, 3, 128000

# attn: the layers that attend; experts: how many, used, their ff, dense layers before
MODELS = {name: dict(zip("layers attn n ff vocab base experts".split(), row)) for name, row in {
    "230m":          (14, (2, 4, 6, 8, 10, 12), 1024, 2560, OLD, 1e6, None),
    "350m":          (16, L16, 1024, 4608, OLD, 1e6, None),
    "700m":          (16, L16, 1536, 6912, OLD, 1e6, None),
    "1.2b":          (16, L16, 2048, 8192, OLD, 1e6, None),
    "2.6b":          (30, L30, 2048, 10752, OLD, 1e6, None),
    "8b-a1b":        (24, L24, 2048, 7168, OLD, 1e6, (32, 4, 1792, 2)),
    "24b-a2b":       (40, L40, 2048, 11776, OLD, 1e6, (64, 4, 1536, 2)),
    "lfm2.5-2.6b":   (30, L30, 2048, 10752, NEW, 1e7, None),
    "lfm2.5-8b-a1b": (24, L24, 2048, 7168, NEW, 5e6, (32, 4, 1792, 2)),
}.items()}


def shapes(m):
    """Name, layer (-1: none) and shape of every tensor, in the order of the file."""
    n, kv, ff = m["n"], KV_HEADS * HEAD_DIM, m["ff"]
    yield "token_embd.weight", -1, (m["vocab"], n)
    yield "token_embd_norm.weight", -1, (n,)              # the last norm, in fact
    for i in range(m["layers"]):
        rows = [("attn_norm.weight", n), ("ffn_norm.weight", n)]
        if i in m["attn"]:
            rows += [("attn_q.weight", n, n), ("attn_k.weight", kv, n), ("attn_v.weight", kv, n),
                     ("attn_q_norm.weight", HEAD_DIM), ("attn_k_norm.weight", HEAD_DIM),
                     ("attn_output.weight", n, n)]
        else:
            rows += [("shortconv.in_proj.weight", 3 * n, n), ("shortconv.out_proj.weight", n, n),
                     ("shortconv.conv.weight", n, L_CACHE)]
        if m["experts"] and i >= m["experts"][3]:
            e, _, ffe, _ = m["experts"]
            rows += [("ffn_gate_inp.weight", e, n), ("exp_probs_b.bias", e)]
            rows += [("ffn_%s_exps.weight" % s, e, ffe, n) for s in ("gate", "up")]
            rows += [("ffn_down_exps.weight", e, n, ffe)]
        else:
            rows += [("ffn_%s.weight" % s, ff, n) for s in ("gate", "up")]
            rows += [("ffn_down.weight", n, ff)]
        for name, *shape in rows:
            yield "blk.%d.%s" % (i, name), i, tuple(shape)


# ------------------------------------------------- the types llama-quantize picks

# its number in general.file_type, and the type of most matrices
QUANTS = {"f32": (0, "F32"), "f16": (1, "F16"), "bf16": (32, "BF16"), "q8_0": (7, "Q8_0"),
          "q6_k": (18, "Q6_K"), "q5_k_m": (17, "Q5_K"), "q5_k_s": (16, "Q5_K"),
          "q4_k_m": (15, "Q4_K"), "q4_k_s": (14, "Q4_K"), "q3_k_m": (12, "Q3_K"),
          "q2_k": (10, "Q2_K"), "q4_0": (2, "Q4_0"), "q4_1": (3, "Q4_1"), "q5_0": (8, "Q5_0"),
          "q5_1": (9, "Q5_1"), "iq4_nl": (25, "IQ4_NL"), "iq4_xs": (30, "IQ4_XS")}
NEVER = re.compile("norm|shortconv.conv|ffn_gate_inp|exp_probs_b")    # quantised


def more_bits(i, n):
    """Of n tensors, those of the outer eighths, and every third between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def tensor_type(quant, name, layer, m):
    usual = QUANTS[quant][1]
    if NEVER.search(name):
        return "F32"
    if name == "token_embd.weight":                       # also the output matrix
        return usual if usual in gguf.PLAIN or usual == "Q8_0" else "Q6_K"
    more = some = False
    if "attn_v" in name:
        rank = m["attn"].index(layer)                     # among those that attend
        more = more_bits(rank, len(m["attn"]))
        some = rank < {"q4_k_s": 4, "q3_k_m": 2}.get(quant, 0)
    elif "ffn_down" in name:
        more = more_bits(layer, m["layers"])
        part = {"q4_k_s": 8, "iq4_nl": 8, "iq4_xs": 8, "q3_k_m": 16}.get(quant, 1000)
        some = layer < m["layers"] // part
    elif "attn_output" not in name:
        return usual
    if more and quant in ("q5_k_m", "q4_k_m"):
        return "Q6_K"
    return "Q5_K" if some else {"q3_k_m": "Q4_K", "q2_k": "Q3_K"}.get(quant, usual)


# ------------------------------------------------------------------- the weights
#
# One chunk of random blocks for each type is written over and over, every tensor
# beginning at another block.  The number of blocks is prime and larger than the
# vocabulary, so no two rows of the embedding are the same.  All bits are random
# but the scales of a block, which give weights of mean 0 and standard deviation
# 1 / sqrt(columns): activations keep their size from layer to layer.

N_BLOCKS, N_PLAIN = 131101, 2097143
LEVELS = {"Q2_K": 4, "Q4_1": 16, "Q4_K": 16, "Q5_1": 32, "Q5_K": 32}   # with a minimum


def spread(rng, shape):
    """Mean 0, standard deviation 1; uniform, to be the same on every machine."""
    return (rng.random(shape) - 0.5) * np.sqrt(12)


@functools.lru_cache(8)
def chunk(t, columns, seed):
    """The chunk for rows of so many columns, as bytes."""
    rng = np.random.default_rng([seed, gguf.TYPE_ID[t]])
    if t in gguf.PLAIN:
        return gguf.quantise(spread(rng, N_PLAIN) / np.sqrt(columns), t).tobytes()
    b = np.frombuffer(bytearray(rng.bytes(N_BLOCKS * gguf.BLOCKS[t].itemsize)), gguf.BLOCKS[t])
    d, middle = 0.5 + rng.random(N_BLOCKS), (LEVELS.get(t, 0) - 1) / 2
    scales = {"d": d if t in LEVELS else d * rng.choice([-1, 1], N_BLOCKS),
              "dmin": d * middle, "m": -d * middle}       # half of the range
    if t == "Q8_0":
        b["qs"] = np.maximum(b["qs"], -127)               # -128 is not used
    for field in set(scales) & set(b.dtype.names):
        b[field] = scales[field]
    some = gguf.dequantise(b[:2048].tobytes(), t, -1, np.float64)
    factor = 1 / (round(float(some.std()), 3) * np.sqrt(columns))
    for field in set(scales) & set(b.dtype.names):
        b[field] = scales[field] * factor
    return b.tobytes()


class Matrix:
    """The bytes of a tensor, made when gguf.write() asks for them."""

    def __init__(self, t, shape, seed, first):
        self.chunk, self.size = (t, shape[-1], seed), gguf.n_bytes(t, shape)
        self.first = first * gguf.n_bytes(t, (gguf.block_size(t),))

    def __len__(self):
        return self.size

    def parts(self):
        view, at, left = memoryview(chunk(*self.chunk)), self.first, self.size
        while left:
            part = view[at:at + left]
            yield part
            left, at = left - len(part), 0


def tensors(m, quant, seed):
    for number, (name, layer, shape) in enumerate(shapes(m)):
        rng = np.random.default_rng([seed, 1000 + number])
        t = tensor_type(quant, name, layer, m)
        if NEVER.search(name):
            x = spread(rng, shape) * (0.05 if "exp_probs_b" in name else 1 / np.sqrt(shape[-1]))
            raw = gguf.quantise(1 + x if "norm" in name else x, t).tobytes()
        else:
            raw = Matrix(t, shape, seed, int(rng.integers(N_BLOCKS)))
        yield gguf.Tensor(name, t, shape, raw)


# ---------------------------------------------------------------- the vocabulary

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
MARKERS = ("pad startoftext endoftext fim_pre fim_mid fim_suf im_start im_end tool_list_start "
           "tool_list_end tool_call_start tool_call_end tool_response_start tool_response_end")
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>"
            "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def special_tokens(size):
    """The first id, and {id: (text, type)}.  One cut short begins like the old one."""
    first = 124893 if size == NEW else 0
    special = {first + i: ("<|%s|>" % s, CONTROL) for i, s in enumerate(MARKERS.split())}
    special.update((first + i, ("<|reserved_%d|>" % (i - 10), CONTROL)) for i in range(16, 501))
    if size == OLD:
        names = ("%s_%s" % (s, end) for s in ("cot", "review", "file") for end in ("start", "end"))
        special.update((64394 + i, ("<|%s|>" % s, CONTROL)) for i, s in enumerate(names))
        special.update({64011: ("Mathias", USER_DEFINED), 64014: ("python", USER_DEFINED)})
        special.update((i, ("[PAD%d]" % i, UNUSED)) for i in range(64400, OLD))
    return first, special


def normal_tokens():
    """The characters that stand for bytes, then words and numbers after their parts."""
    spare = itertools.count(256)
    for b in range(256):
        yield chr(b if 33 <= b < 127 or b > 160 and b != 173 else next(spare))
    letters, digits, space = "etaoinshrdlcumwfgypbvkjxqz", "0123456789", "\u0120"
    for start, alphabet, n in (("", letters, 2), (space, letters, 1), ("", digits, 2),
                               ("", letters, 3), (space, letters, 2), ("", digits, 3),
                               (space, letters, 3), ("", letters[:19], 4)):
        yield from (start + "".join(word) for word in itertools.product(alphabet, repeat=n))


def vocabulary(size):
    first, special = special_tokens(size)
    normal = list(itertools.islice(normal_tokens(), size - len(special)))
    rest = iter(normal)
    tokens = [special[i] if i in special else (next(rest), NORMAL) for i in range(size)]
    # each merged from its halves; up to the published number, from other parts, too
    splits = [(s, len(s) // 2) for s in normal[256:]]
    others = ((s, k) for s, half in splits[:] for k in range(1, len(s)) if k != half)
    n = {OLD: 63683, NEW: 293320}.get(size, len(splits))
    splits += itertools.islice(others, n - len(splits))
    return {
        "tokenizer.ggml.model": ("str", "gpt2"), "tokenizer.ggml.pre": ("str", "lfm2"),
        "tokenizer.ggml.tokens": ("arr:str", [text for text, _ in tokens]),
        "tokenizer.ggml.token_type": ("arr:i32", [kind for _, kind in tokens]),
        "tokenizer.ggml.merges": ("arr:str", [s[:k] + " " + s[k:] for s, k in splits]),
        **{"tokenizer.ggml.%s_token_id" % s: ("u32", first + i)
           for s, i in (("bos", 1), ("eos", 7), ("padding", 0))},
        "tokenizer.ggml.add_bos_token": ("bool", True),
        "tokenizer.chat_template": ("str", TEMPLATE)}


# ---------------------------------------------------------------------- the file

def metadata(name, m, quant, with_vocab):
    arch = "lfm2moe" if m["experts"] else "lfm2"
    own = {
        "block_count": ("u32", m["layers"]), "context_length": ("u32", N_CTX),
        "embedding_length": ("u32", m["n"]), "feed_forward_length": ("u32", m["ff"]),
        "attention.head_count": ("u32", m["n"] // HEAD_DIM),
        "attention.head_count_kv": ("arr:i32", [KV_HEADS if i in m["attn"] else 0
                                                for i in range(m["layers"])]),
        "attention.layer_norm_rms_epsilon": ("f32", 1e-5), "rope.freq_base": ("f32", m["base"]),
        "vocab_size": ("u32", m["vocab"]), "shortconv.l_cache": ("u32", L_CACHE)}
    if m["experts"]:
        keys = ("expert_count", "expert_used_count", "expert_feed_forward_length",
                "leading_dense_block_count", "expert_gating_func")
        own.update((key, ("u32", v)) for key, v in zip(keys, m["experts"] + (2,)))   # 2: sigmoid
    return {
        "general.architecture": ("str", arch),
        "general.name": ("str", "synthetic %s, random weights" % name),
        "general.file_type": ("u32", QUANTS[quant][0]), "general.quantization_version": ("u32", 2),
        **{arch + "." + key: value for key, value in own.items()},
        **(vocabulary(m["vocab"]) if with_vocab else {})}


def arguments():
    p = argparse.ArgumentParser(description="Write an LFM2 model of random weights.")
    p.add_argument("model", choices=MODELS, help=" ".join(MODELS), metavar="MODEL")
    p.add_argument("quant", choices=QUANTS, help=" ".join(QUANTS), metavar="QUANT")
    p.add_argument("file", metavar="OUT.gguf")
    p.add_argument("--layers", type=int, metavar="N", help="only the first N layers, at least 3")
    p.add_argument("--vocab", type=int, metavar="N", help="only N tokens, at least 1024")
    p.add_argument("--no-vocab", action="store_true", help="no tokenizer in the file")
    p.add_argument("--seed", type=int, default=1, metavar="N", help="other weights (1)")
    p.add_argument("--dry-run", action="store_true", help="only say what would be written")
    a = p.parse_args()
    m = dict(MODELS[a.model])
    for key, least in (("layers", 3), ("vocab", 1024)):
        n = m[key] if getattr(a, key) is None else getattr(a, key)
        if not least <= n <= m[key]:
            p.error("--%s %d: expected %d to %d" % (key, n, least, m[key]))
        m[key] = n
    m["attn"] = tuple(i for i in m["attn"] if i < m["layers"])
    return a, m


def main():
    a, m = arguments()
    made = list(tensors(m, a.quant, a.seed))
    size = sum(len(t.raw) for t in made)
    n_params = sum(math.prod(t.shape) for t in made)
    free, part = shutil.disk_usage(os.path.dirname(os.path.abspath(a.file))).free, a.file + ".part"
    print("%s: %d parameters in %d tensors, %d bytes; the disk has %.2f GB" %
          (a.file, n_params, len(made), size, free / 1e9), flush=True)
    if a.dry_run:
        return
    if free < size + (32 << 20):                          # and at most this for metadata
        raise SystemExit("%s: needs %.2f GB, the disk has %.2f" % (a.file, size / 1e9, free / 1e9))
    try:                                                  # under its name once complete
        gguf.write(part, metadata(a.model, m, a.quant, not a.no_vocab), made)
        os.replace(part, a.file)
    finally:
        if os.path.exists(part):
            os.remove(part)


if __name__ == "__main__":
    main()
