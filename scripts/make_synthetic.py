"""make_synthetic.py - a GGUF of the exact shape of a released LFM2, random inside.

    python3 scripts/make_synthetic.py 24b-a2b q4_0 OUT.gguf [--layers N] [--no-vocab]

Metadata, tensor names, shapes and weight types are those that a converted and
quantised model has, so memory, speed and loading can be measured without the
model.  The weights are random, small enough that activations stay finite, and
repeat with a period of a few megabytes: what is computed means nothing, but
takes as long as the real thing.  The same arguments give the same bytes.

The published configurations leave open which ten layers of the 24B model
attend; here they are 2, 6, 10, ..., 38.
"""
import argparse
import itertools
import os
import shutil
import sys

import numpy as np

import gguf

# name: layers, attention layers, n_embd, heads, n_ff, vocabulary, rope base, and
# of a mixture of experts: experts, used, their n_ff, dense layers before them
DENSE = dict(vocab=65536, base=1e6, experts=None)
L16 = (2, 5, 8, 10, 12, 14)
L24 = (2, 6, 10, 14, 18, 21)
L30 = (2, 5, 9, 13, 17, 21, 24, 27)
MODELS = {
    "230m": dict(DENSE, layers=14, attn=(2, 4, 6, 8, 10, 12), n=1024, heads=16, ff=2560),
    "350m": dict(DENSE, layers=16, attn=L16, n=1024, heads=16, ff=4608),
    "700m": dict(DENSE, layers=16, attn=L16, n=1536, heads=24, ff=6912),
    "1.2b": dict(DENSE, layers=16, attn=L16, n=2048, heads=32, ff=8192),
    "2.6b": dict(DENSE, layers=30, attn=L30, n=2048, heads=32, ff=10752),
    "lfm2.5-2.6b": dict(DENSE, layers=30, attn=L30, n=2048, heads=32, ff=10752,
                        vocab=128000, base=1e7),
    "8b-a1b": dict(DENSE, layers=24, attn=L24, n=2048, heads=32, ff=7168,
                   experts=(32, 4, 1792, 2)),
    "lfm2.5-8b-a1b": dict(DENSE, layers=24, attn=L24, n=2048, heads=32, ff=7168,
                          experts=(32, 4, 1792, 2), vocab=128000, base=5e6),
    "24b-a2b": dict(DENSE, layers=40, attn=tuple(range(2, 40, 4)), n=2048, heads=32,
                    ff=11776, experts=(64, 4, 1536, 2)),
}
KV_HEADS, HEAD_DIM = 8, 64

# quant: the number in general.file_type, the usual weight type
QUANTS = {"f32": (0, "F32"), "f16": (1, "F16"), "q4_0": (2, "Q4_0"), "q4_1": (3, "Q4_1"),
          "q8_0": (7, "Q8_0"), "q5_0": (8, "Q5_0"), "q5_1": (9, "Q5_1"),
          "q2_k": (10, "Q2_K"), "q3_k_m": (12, "Q3_K"), "q4_k_s": (14, "Q4_K"),
          "q4_k_m": (15, "Q4_K"), "q5_k_s": (16, "Q5_K"), "q5_k_m": (17, "Q5_K"),
          "q6_k": (18, "Q6_K"), "iq4_nl": (25, "IQ4_NL"), "iq4_xs": (30, "IQ4_XS"),
          "bf16": (32, "BF16")}


def more_bits(i, n):
    """Which of n tensors the mixed quants give more bits: the outer eighths and
    every third between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def weight_type(quant, name, layer, m):
    """What llama-quantize chooses for a matrix."""
    usual = QUANTS[quant][1]
    if name == "token_embd.weight":
        return usual if quant in ("f32", "f16", "bf16", "q8_0") else "Q6_K"
    is_v, is_down = "attn_v" in name, "ffn_down" in name
    rank = m["attn"].index(layer) if layer in m["attn"] else 0
    place, of = (rank, len(m["attn"])) if is_v else (layer, m["layers"])
    if quant in ("q4_k_m", "q5_k_m") and (is_v or is_down) and more_bits(place, of):
        return "Q6_K"
    if quant == "q4_k_s" and (is_v and rank < 4 or is_down and layer < m["layers"] // 8):
        return "Q5_K"
    if quant == "q3_k_m":
        if is_v:
            return "Q5_K" if rank < 2 else "Q4_K"
        if is_down:
            return "Q5_K" if layer < m["layers"] // 16 else "Q4_K"
        if "attn_output" in name:
            return "Q4_K"
    return usual


class Repeated:
    """size bytes: a chunk over and over, from block `first` on."""

    def __init__(self, chunk, block_bytes, size, first):
        start = first * block_bytes % len(chunk)
        self.chunk, self.size = chunk[start:] + chunk[:start], size

    def __len__(self):
        return self.size

    def parts(self):
        view = memoryview(self.chunk)
        for at in range(0, self.size, len(view)):
            yield view[:min(len(view), self.size - at)]


def random_chunk(t, rng):
    """About 4 MB of blocks whose weights are spread by about 0.02."""
    if t in gguf.PLAIN:
        x = rng.normal(0, 0.02, 1 << 20)
        return gguf.quantise(x.astype(np.float32).reshape(1, -1), t).tobytes()
    x = rng.normal(0, 0.02, (128, 2048)).astype(np.float32)
    some = np.frombuffer(gguf.quantise(x, t).tobytes(), np.uint8)
    blocks = some.reshape(-1, gguf.BLOCKS[t].itemsize)
    order = rng.permutation(np.repeat(np.arange(len(blocks)), max(1, (4 << 20) // some.size)))
    return blocks[order].tobytes()


def shapes(m):
    """Name, layer and shape of every matrix; name and length of every vector."""
    n, kv = m["n"], KV_HEADS * HEAD_DIM
    yield "token_embd.weight", -1, (m["vocab"], n)
    for i in range(m["layers"]):
        yield "blk.%d.attn_norm.weight" % i, i, (n,)
        yield "blk.%d.ffn_norm.weight" % i, i, (n,)
        if i in m["attn"]:
            names = {"attn_q.weight": (n, n), "attn_k.weight": (kv, n),
                     "attn_v.weight": (kv, n), "attn_output.weight": (n, n),
                     "attn_q_norm.weight": (HEAD_DIM,), "attn_k_norm.weight": (HEAD_DIM,)}
        else:
            names = {"shortconv.in_proj.weight": (3 * n, n), "shortconv.conv.weight": (n, 3),
                     "shortconv.out_proj.weight": (n, n)}
        if m["experts"] and i >= m["experts"][3]:
            e, _, ff, _ = m["experts"]
            names.update({"ffn_gate_inp.weight": (e, n), "exp_probs_b.bias": (e,),
                          "ffn_gate_exps.weight": (e, ff, n), "ffn_up_exps.weight": (e, ff, n),
                          "ffn_down_exps.weight": (e, n, ff)})
        else:
            names.update({"ffn_gate.weight": (m["ff"], n), "ffn_up.weight": (m["ff"], n),
                          "ffn_down.weight": (n, m["ff"])})
        for name, shape in names.items():
            yield "blk.%d.%s" % (i, name), i, shape
    yield "token_embd_norm.weight", -1, (n,)


def small_tensor(name, shape, rng):
    """Those that are never quantised."""
    x = rng.normal(0, 1, shape)
    if "norm" in name:
        x = 1 + 0.1 * x
    elif "exp_probs_b" in name:
        x *= 0.1
    elif "ffn_gate_inp" in name:
        x /= shape[1] ** 0.5
    else:
        x *= 0.6                          # three taps
    return gguf.Tensor(name, "F32", shape, x.astype("<f4").tobytes())


def tensors(m, quant):
    rng = np.random.default_rng(2025)
    chunks = {}
    for number, (name, layer, shape) in enumerate(shapes(m)):
        if len(shape) == 1 or "shortconv.conv" in name or "ffn_gate_inp" in name:
            yield small_tensor(name, shape, rng)
            continue
        t = gguf.usable_type(weight_type(quant, name, layer, m), shape[-1])
        if t not in chunks:
            chunks[t] = random_chunk(t, rng)
        bytes_of_block = gguf.n_bytes(t, (gguf.block_size(t),))
        raw = Repeated(chunks[t], bytes_of_block, gguf.n_bytes(t, shape), 7919 * number)
        yield gguf.Tensor(name, t, shape, raw)


def vocabulary(size):
    """The 256 bytes, the markers in their places, pairs and triples of letters,
    each with the merge that makes it; UNUSED ones up to the size."""
    first = 0 if size == 65536 else 124893
    markers = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>",
               "<|fim_suf|>", "<|im_start|>", "<|im_end|>", "<|tool_list_start|>",
               "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
               "<|tool_response_start|>", "<|tool_response_end|>"]
    spare = itertools.count(256)
    alphabet = [chr(b if 33 <= b < 127 or b > 160 and b != 173 else next(spare))
                for b in range(256)]
    letters = "\u0120abcdefghijklmnopqrstuvwxyz"
    merges = [(a, b) for a in letters for b in letters[1:]]
    merges += [(a + b, c) for a in letters for b in letters[1:] for c in letters[1:]]
    texts = iter(alphabet + [a + b for a, b in merges])
    tokens, types = [], []
    for i in range(size):
        if first <= i < first + len(markers):
            token, kind = markers[i - first], 3
        else:
            token, kind = next(texts, None), 1
            if token is None:
                token, kind = "[PAD%d]" % i, 5
        tokens.append(token)
        types.append(kind)
    return {
        "tokenizer.ggml.model": ("str", "gpt2"), "tokenizer.ggml.pre": ("str", "lfm2"),
        "tokenizer.ggml.tokens": ("arr:str", tokens),
        "tokenizer.ggml.token_type": ("arr:i32", types),
        "tokenizer.ggml.merges": ("arr:str", ["%s %s" % pair for pair in merges]),
        "tokenizer.ggml.bos_token_id": ("u32", first + 1),
        "tokenizer.ggml.eos_token_id": ("u32", first + 7),
        "tokenizer.ggml.padding_token_id": ("u32", first),
        "tokenizer.ggml.add_bos_token": ("bool", True),
    }


def metadata(name, m, quant, with_vocab):
    arch = "lfm2moe" if m["experts"] else "lfm2"
    out = {
        "general.architecture": ("str", arch),
        "general.name": ("str", "synthetic %s, random weights" % name),
        "general.file_type": ("u32", QUANTS[quant][0]),
        "general.quantization_version": ("u32", 2),
    }
    of_arch = {
        "block_count": ("u32", m["layers"]), "context_length": ("u32", 128000),
        "embedding_length": ("u32", m["n"]), "feed_forward_length": ("u32", m["ff"]),
        "attention.head_count": ("u32", m["heads"]),
        "attention.head_count_kv": ("arr:i32", [KV_HEADS if i in m["attn"] else 0
                                                for i in range(m["layers"])]),
        "attention.layer_norm_rms_epsilon": ("f32", 1e-5), "rope.freq_base": ("f32", m["base"]),
        "vocab_size": ("u32", m["vocab"]), "shortconv.l_cache": ("u32", 3),
    }
    if m["experts"]:
        count, used, ff, dense = m["experts"]
        of_arch.update({
            "expert_count": ("u32", count), "expert_used_count": ("u32", used),
            "expert_feed_forward_length": ("u32", ff),
            "leading_dense_block_count": ("u32", dense), "expert_gating_func": ("u32", 2)})
    out.update({"%s.%s" % (arch, key): value for key, value in of_arch.items()})
    if with_vocab:
        out.update(vocabulary(m["vocab"]))
    return out


def main():
    args = argparse.ArgumentParser(description="Write a GGUF of the shape of a released "
                                               "LFM2 with random weights.")
    args.add_argument("model", choices=MODELS)
    args.add_argument("quant", choices=QUANTS)
    args.add_argument("file")
    args.add_argument("--layers", type=int, help="only the first N layers")
    args.add_argument("--no-vocab", action="store_true", help="without a tokenizer")
    a = args.parse_args()
    m = dict(MODELS[a.model])
    if a.layers:
        m["layers"] = min(m["layers"], a.layers)
        m["attn"] = tuple(i for i in m["attn"] if i < m["layers"])
    all_tensors = list(tensors(m, a.quant))
    size = sum(len(t.raw) for t in all_tensors)
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(a.file))).free
    params = sum(int(np.prod(t.shape, dtype=np.int64)) for t in all_tensors)
    print("%s: %d tensors, %.2f B parameters, %.2f GB" %
          (a.file, len(all_tensors), params / 1e9, size / 1e9))
    if free < size + (64 << 20):
        sys.exit("%s: %.2f GB free on the disk, expected %.2f" % (a.file, free / 1e9, size / 1e9))
    gguf.write(a.file, metadata(a.model, m, a.quant, not a.no_vocab), all_tensors)


if __name__ == "__main__":
    main()
