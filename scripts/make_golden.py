#!/usr/bin/env python3
"""make_golden.py - traces of tiny random models by the official implementation.

    python3 scripts/make_golden.py test/golden [--models DIR]

Writes lfm2.jsonl and lfm2moe.jsonl, which test/check_golden.c compares with what the engine
computes.  The weights are those of tiny_model() in test/util.c, so nothing large is kept: the
same random numbers, in the same order.  With --models, DIR gets both models as they would be
published (config.json, model.safetensors) and as GGUF, to try compare_trace.py with.

Needs PyTorch, NumPy and transformers from 5.0 on.  The files in test/golden are by transformers
5.2.0 (7d9754a05193) with PyTorch 2.6.0 on x86-64.
"""
import argparse
import json
import os

import numpy as np
import torch
import transformers

import compare_trace
import gguf

# ---------------------------------------------------- the models, as in test/util.c

N_LAYER, N_EMBD, N_FF, N_VOCAB, N_HEAD, N_KV, HEAD_DIM = 4, 64, 128, 264, 4, 2, 16
N_EXPERT, N_USED, N_DENSE, N_FF_EXPERT = 6, 2, 1, 64
EPS, BASE, EXPERT_SCALE = 1e-5, 1e6, 1.5
ATTENTION = (1, 3)                               # the layers that attend
MODELS = {"lfm2": (False, 21), "lfm2moe": (True, 22)}       # with experts, seed

TEXT = "A short convolution, an attention, again."          # every byte is a token
BOS = 256
POSITIONS = (0, 1, 2, 3, 20, 41)                 # of which everything is recorded


class Random:
    """splitmix64, its upper halves."""

    def __init__(self, seed):
        self.state = seed

    def floats(self, n):
        """-1 .. 1, float32."""
        with np.errstate(over="ignore"):
            step = np.uint64(0x9e3779b97f4a7c15)
            z = np.uint64(self.state) + step * np.arange(1, n + 1, dtype=np.uint64)
            self.state = int(z[-1])
            z = (z ^ z >> np.uint64(30)) * np.uint64(0xbf58476d1ce4e5b9)
            z = (z ^ z >> np.uint64(27)) * np.uint64(0x94d049bb133111eb)
        return ((z >> np.uint64(32)).astype(np.float64) / 2147483648.0 - 1.0).astype(np.float32)

    def matrix(self, *shape):
        x = self.floats(int(np.prod(shape))).astype(np.float64)
        return (1.7 * x / np.sqrt(np.float64(shape[-1]))).astype(np.float32).reshape(shape)

    def vector(self, n, middle, spread):
        return np.float32(middle) + np.float32(spread) * self.floats(n)


def operator(rng, il):
    n, kv = N_EMBD, N_KV * HEAD_DIM
    if il in ATTENTION:
        return {"attn_q.weight": rng.matrix(n, n), "attn_k.weight": rng.matrix(kv, n),
                "attn_v.weight": rng.matrix(kv, n), "attn_output.weight": rng.matrix(n, n),
                "attn_q_norm.weight": rng.vector(HEAD_DIM, 2, 0.5),
                "attn_k_norm.weight": rng.vector(HEAD_DIM, 2, 0.5)}
    return {"shortconv.in_proj.weight": rng.matrix(3 * n, n),
            "shortconv.conv.weight": rng.matrix(n, 3),
            "shortconv.out_proj.weight": rng.matrix(n, n)}


def feed_forward(rng, il, moe):
    n, e, ff = N_EMBD, N_EXPERT, N_FF_EXPERT
    if moe and il >= N_DENSE:
        return {"ffn_gate_inp.weight": rng.matrix(e, n),
                "exp_probs_b.bias": rng.vector(e, 0, 0.2),
                "ffn_gate_exps.weight": rng.matrix(e, ff, n),
                "ffn_up_exps.weight": rng.matrix(e, ff, n),
                "ffn_down_exps.weight": rng.matrix(e, n, ff)}
    return {"ffn_gate.weight": rng.matrix(N_FF, n), "ffn_up.weight": rng.matrix(N_FF, n),
            "ffn_down.weight": rng.matrix(n, N_FF)}


def weights(moe, seed):
    """{GGUF's name: array}; the one with experts has an output matrix of its own."""
    rng = Random(seed + 1)
    w = {"token_embd.weight": rng.matrix(N_VOCAB, N_EMBD)}
    for il in range(N_LAYER):
        layer = {"attn_norm.weight": rng.vector(N_EMBD, 1, 0.3),
                 "ffn_norm.weight": rng.vector(N_EMBD, 1, 0.3)}
        layer.update(operator(rng, il))
        layer.update(feed_forward(rng, il, moe))
        w.update(("blk.%d.%s" % (il, name), x) for name, x in layer.items())
    w["token_embd_norm.weight"] = rng.vector(N_EMBD, 4, 1)
    if moe:
        w["output.weight"] = rng.matrix(N_VOCAB, N_EMBD)
    return w


# ------------------------------------------------------------------ as published

OFFICIAL = {"attn_norm": "operator_norm", "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.out_proj", "attn_q_norm": "self_attn.q_layernorm",
            "attn_k_norm": "self_attn.k_layernorm", "shortconv.in_proj": "conv.in_proj",
            "shortconv.conv": "conv.conv", "shortconv.out_proj": "conv.out_proj",
            "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3",
            "ffn_down": "feed_forward.w2", "ffn_gate_inp": "feed_forward.gate"}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight",
         "token_embd_norm.weight": "model.embedding_norm.weight"}


def layer_state(prefix, w):
    """The parameters of a layer; of experts in both ways they are known."""
    ff = prefix + "feed_forward."
    for name, x in w.items():
        base = name.rsplit(".", 1)[0]
        if base == "shortconv.conv":
            x = x[:, None]                       # [channel][1][tap]
        if base in OFFICIAL:
            yield prefix + OFFICIAL[base] + ".weight", x
    if "exp_probs_b.bias" in w:
        gate, up, down = (w["ffn_%s_exps.weight" % s] for s in ("gate", "up", "down"))
        yield ff + "expert_bias", w["exp_probs_b.bias"]
        yield ff + "experts.gate_up_proj", np.concatenate([gate, up], 1)
        yield ff + "experts.down_proj", down
        for e in range(N_EXPERT):
            for s, x in (("w1", gate), ("w3", up), ("w2", down)):
                yield "%sexperts.%d.%s.weight" % (ff, e, s), x[e]


def official(moe, w):
    kind = transformers.Lfm2MoeConfig if moe else transformers.Lfm2Config
    own = dict(moe_intermediate_size=N_FF_EXPERT, num_dense_layers=N_DENSE, num_experts=N_EXPERT,
               num_experts_per_tok=N_USED, routed_scaling_factor=EXPERT_SCALE) if moe else \
        dict(block_auto_adjust_ff_dim=False)
    config = kind(
        vocab_size=N_VOCAB, hidden_size=N_EMBD, intermediate_size=N_FF, norm_eps=EPS,
        num_hidden_layers=N_LAYER, num_attention_heads=N_HEAD, num_key_value_heads=N_KV,
        conv_L_cache=3, max_position_embeddings=4096, tie_word_embeddings=not moe,
        layer_types=["full_attention" if i in ATTENTION else "conv" for i in range(N_LAYER)],
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
        bos_token_id=BOS, eos_token_id=BOS + 2, pad_token_id=BOS + 7, **own)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    given = {OUTER[name]: x for name, x in w.items() if name in OUTER}
    for il in range(N_LAYER):
        start = "blk.%d." % il
        given.update(layer_state("model.layers.%d." % il, {
            name[len(start):]: x for name, x in w.items() if name.startswith(start)}))
    if not moe:
        given["lm_head.weight"] = w["token_embd.weight"]
    wanted = model.state_dict()
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(given[name]))
                           for name in wanted})
    return model.float().eval()


# ----------------------------------------------------------------------- as GGUF

def vocabulary():
    """The 256 bytes, no merges, and what a chat needs."""
    other = iter(range(256, 512))
    tokens = [chr(b) if 33 <= b < 127 or b > 160 and b != 173 else chr(next(other))
              for b in range(256)]
    tokens += ["<|%s|>" % s for s in ("startoftext", "im_start", "im_end", "endoftext")]
    tokens += ["<|unused%d|>" % i for i in range(N_VOCAB - len(tokens))]
    return {"tokenizer.ggml.model": ("str", "gpt2"), "tokenizer.ggml.pre": ("str", "lfm2"),
            "tokenizer.ggml.tokens": ("arr:str", tokens),
            "tokenizer.ggml.token_type": ("arr:i32", [1] * 256 + [3] * (N_VOCAB - 256)),
            "tokenizer.ggml.merges": ("arr:str", []),
            "tokenizer.ggml.bos_token_id": ("u32", BOS),
            "tokenizer.ggml.eos_token_id": ("u32", BOS + 2)}


def write_gguf(path, moe, w):
    own = {"block_count": ("u32", N_LAYER), "context_length": ("u32", 4096),
           "embedding_length": ("u32", N_EMBD), "feed_forward_length": ("u32", N_FF),
           "attention.head_count": ("u32", N_HEAD), "shortconv.l_cache": ("u32", 3),
           "attention.head_count_kv": ("arr:i32", [N_KV if i in ATTENTION else 0
                                                   for i in range(N_LAYER)]),
           "attention.layer_norm_rms_epsilon": ("f32", EPS), "rope.freq_base": ("f32", BASE),
           "vocab_size": ("u32", N_VOCAB)}
    if moe:
        own.update({"expert_count": ("u32", N_EXPERT), "expert_used_count": ("u32", N_USED),
                    "expert_feed_forward_length": ("u32", N_FF_EXPERT),
                    "leading_dense_block_count": ("u32", N_DENSE),
                    "expert_gating_func": ("u32", 2),                   # sigmoid
                    "expert_weights_scale": ("f32", EXPERT_SCALE)})
    arch = "lfm2moe" if moe else "lfm2"
    gguf.write(path, {"general.architecture": ("str", arch), "general.name": ("str", "tiny"),
                      **{arch + "." + key: value for key, value in own.items()}, **vocabulary()},
               [gguf.Tensor(name, "F32", x.shape, x.astype("<f4").tobytes())
                for name, x in w.items()])


# ---------------------------------------------------------------------- the trace

def shorten(line):
    """Seven digits are enough for a bound of 1e-5."""
    r = json.loads(line, parse_float=lambda s: float("%.7g" % float(s)))
    return json.dumps(r, separators=(",", ":")) + "\n"


def clear_choice(run):
    """The smallest step between the last expert chosen and the first that is not: where it
    is near zero, rounding would choose."""
    gaps = [1.0]
    for name, rows in run.kept.items():
        if name.endswith("feed_forward.gate"):
            block = run.model.get_submodule(name.rsplit(".", 1)[0])
            score = torch.sigmoid(torch.stack([rows[i] for i in range(run.n)]))
            best = (score + block.expert_bias).sort(-1, descending=True).values
            gaps += (best[:, :N_USED] - best[:, 1:N_USED + 1]).flatten().tolist()
    return min(gaps)


def main():
    p = argparse.ArgumentParser(description="Write the golden traces.")
    p.add_argument("folder", help="where to")
    p.add_argument("--models", metavar="DIR", help="write the models, too")
    args = p.parse_args()
    torch.set_num_threads(1)
    ids = [BOS] + list(TEXT.encode())
    for name, (moe, seed) in MODELS.items():
        w = weights(moe, seed)
        model = official(moe, w)
        if args.models:
            model.save_pretrained(os.path.join(args.models, name))
            write_gguf(os.path.join(args.models, name + ".gguf"), moe, w)
        run = compare_trace.Official(model, ids).run()
        lines = run.lines(transformers.__version__, False, lambda name, pos:
                          pos in POSITIONS or name == "model.embed_tokens")
        path = os.path.join(args.folder, name + ".jsonl")
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(map(shorten, lines.splitlines()))
        print("%s: %d records, %d bytes, choice of experts by %.2g at least" %
              (path, lines.count("\n") - 1, os.path.getsize(path), clear_choice(run)))
        for what in run.left_out:
            print("left out: %s" % what)


if __name__ == "__main__":
    main()
