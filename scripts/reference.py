"""reference.py - LFM2 in double precision, straight from the equations.

    python3 scripts/reference.py MODEL.gguf IDS.i32 OUT.f32 [--int8]

Reads int32 token ids, writes the float32 logits of every position, [n][vocab].
There is no cache and no cleverness: the whole sequence at once, exactly
dequantised weights, float64 throughout.  This is what an engine is compared with.

--int8 rounds the input of every quantised matrix to signed bytes in groups of
32, and keys and values to half floats, as lfm2.c does: a measure of how much of
a difference is to be expected.
"""
import sys

import numpy as np

import gguf


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Reference:
    def __init__(self, path, int8=False):
        self.file = f = gguf.File(path)
        self.int8, self.arrays = int8, {}
        arch = f.get("general.architecture")
        if arch not in ("lfm2", "lfm2moe"):
            raise ValueError("architecture %s is not LFM2" % arch)
        key = lambda name, default=None: f.get(arch + "." + name, default)
        self.n_layer = key("block_count")
        self.eps = key("attention.layer_norm_rms_epsilon")
        self.base = key("rope.freq_base", 10000.0)
        heads = key("attention.head_count")          # one number, or one per layer
        self.n_head = max(heads) if isinstance(heads, list) else heads
        kv = key("attention.head_count_kv", self.n_head)
        self.n_kv = kv if isinstance(kv, list) else [kv] * self.n_layer
        self.head_dim = key("attention.key_length", key("embedding_length") // self.n_head)
        self.window = key("attention.sliding_window", 0)
        self.n_dense = key("leading_dense_block_count", 0) if arch == "lfm2moe" else self.n_layer
        self.n_used = key("expert_used_count", 0)
        self.expert_scale = key("expert_weights_scale", 1.0) or 1.0

    def has(self, name):
        return name in self.file.tensors

    def w(self, name):
        if name not in self.arrays:
            self.arrays[name] = self.file.tensors[name].array(np.float64)
        return self.arrays[name]

    def product(self, x, name, part=slice(None)):
        """x [token][in] times the matrix `name` [out][in], or a part of it."""
        if self.int8 and self.file.tensors[name].type in gguf.BLOCKS:
            g = x.reshape(len(x), -1, 32)
            dx = np.abs(g).max(-1, keepdims=True) / 127
            x = (np.rint(g / np.where(dx > 0, dx, 1)) * dx).reshape(x.shape)
        return x @ self.w(name)[part].T

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w(name)

    def rope(self, x):
        """x [token][head][dim]: the pair (i, i + dim/2) turns by an angle that
        grows with the position, quickly for small i."""
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * self.base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def short_conv(self, x, b):
        B, C, X = np.split(self.product(x, b + "shortconv.in_proj.weight"), 3, axis=1)
        taps = self.w(b + "shortconv.conv.weight")   # [channel][tap], newest last
        L = taps.shape[1]
        u = np.concatenate([np.zeros((L - 1, x.shape[1])), B * X])
        v = sum(u[k:k + len(x)] * taps[:, k] for k in range(L))
        return self.product(C * v, b + "shortconv.out_proj.weight")

    def attention(self, x, b, n_kv):
        n, dim = len(x), self.head_dim
        if self.has(b + "attn_qkv.weight"):          # rows of q, then k, then v
            qkv = self.product(x, b + "attn_qkv.weight")
            q, k, v = np.split(qkv, [self.n_head * dim, (self.n_head + n_kv) * dim], axis=1)
        else:
            q, k, v = (self.product(x, b + "attn_%s.weight" % c) for c in "qkv")
        q = self.rope(self.norm(q.reshape(n, self.n_head, dim), b + "attn_q_norm.weight"))
        k = self.rope(self.norm(k.reshape(n, n_kv, dim), b + "attn_k_norm.weight"))
        v = v.reshape(n, n_kv, dim)
        if self.int8:
            k, v = (t.astype(np.float16).astype(np.float64) for t in (k, v))
        past = np.arange(n)[:, None] - np.arange(n)  # how far back key j is from query i
        hidden = (past < 0) | (past >= self.window if self.window else False)
        out = np.empty_like(q)
        for h in range(self.n_head):
            j = h // (self.n_head // n_kv)           # the kv head it shares
            score = q[:, h] @ k[:, j].T / np.sqrt(dim)
            out[:, h] = softmax(np.where(hidden, -np.inf, score)) @ v[:, j]
        return self.product(out.reshape(n, -1), b + "attn_output.weight")

    def swiglu(self, x, b, suffix="", part=slice(None)):
        gate, up, down = (b + "ffn_%s%s.weight" % (s, suffix) for s in ("gate", "up", "down"))
        h = silu(self.product(x, gate, part)) * self.product(x, up, part)
        return self.product(h, down, part)

    def moe(self, x, b):
        score = sigmoid(x @ self.w(b + "ffn_gate_inp.weight").T)
        biased = score + (self.w(b + "exp_probs_b.bias") if self.has(b + "exp_probs_b.bias") else 0)
        y = np.zeros_like(x)
        chosen = np.argsort(-biased, axis=1, kind="stable")[:, :self.n_used]
        weight = np.take_along_axis(score, chosen, 1)           # without the bias
        weight = weight / (weight.sum(1, keepdims=True) + 1e-6) * self.expert_scale
        for e in range(score.shape[1]):
            token, slot = np.nonzero(chosen == e)
            if len(token):
                y[token] += weight[token, slot, None] * self.swiglu(x[token], b, "_exps", e)
        return y

    def logits(self, ids):
        h = self.w("token_embd.weight")[ids]
        for i in range(self.n_layer):
            b = "blk.%d." % i
            x = self.norm(h, b + "attn_norm.weight")
            h = h + (self.attention(x, b, self.n_kv[i]) if self.n_kv[i] else self.short_conv(x, b))
            x = self.norm(h, b + "ffn_norm.weight")
            h = h + (self.swiglu(x, b) if i < self.n_dense else self.moe(x, b))
        final = "token_embd_norm.weight"             # two names for the last norm
        h = self.norm(h, final if self.has(final) else "output_norm.weight")
        return self.product(h, "output.weight" if self.has("output.weight") else "token_embd.weight")


if __name__ == "__main__":
    args = [a for a in sys.argv[1:] if a != "--int8"]
    if len(args) != 3:
        sys.exit("usage: python3 scripts/reference.py MODEL.gguf IDS.i32 OUT.f32 [--int8]")
    model = Reference(args[0], "--int8" in sys.argv)
    model.logits(np.fromfile(args[1], "<i4")).astype("<f4").tofile(args[2])
