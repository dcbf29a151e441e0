"""train_tiny.py - trains the tiny LFM2-MoE of test/ from nothing, on a CPU.

    python3 scripts/train_tiny.py train  [--minutes M] [--steps N] [--resume]
    python3 scripts/train_tiny.py export [--out test]

`train` makes a byte-level BPE vocabulary from the text of corpus.py, trains the
model, and leaves a checkpoint; an interrupted run goes on with --resume.  In
its last part the weights are rounded to the types of the file, and activations
to 8 bits, so that the model learns to live with that.  `export` writes

    tiny.gguf       the quantised model, with tokenizer and chat template
    tiny.ids        int32 token ids: conversations and the start of a story
    tiny.logits     float32 logits of every one of these, by the code below
    questions.txt   question TAB answer, for all that are answered exactly

The files in test/ come from 53 minutes on two cores, the last ten of them with
--resume and --stories 600.  Needs PyTorch (1.13 or later) and NumPy.
"""
import argparse
import ctypes
import math
import os
import random
import re
import tempfile
import time

# Before torch is loaded.  Training runs one process per core with one thread
# each, which wastes less time on waiting than one process with many threads.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
try:            # keep big buffers (M_MMAP_MAX, M_TRIM_THRESHOLD), do not return them
    for option, value in ((-4, 0), (-1, 2**31 - 1)):
        ctypes.CDLL(None).mallopt(option, value)
except AttributeError:
    pass                                         # no mallopt() here: just slower

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import corpus
import gguf

SEED = 2
CHECKPOINT = os.path.join(tempfile.gettempdir(), "lfm2-tiny.pt")

# ------------------------------------------------------------- the model's shape

N_EMBD, HEAD_DIM, N_HEAD, N_HEAD_KV = 256, 64, 4, 2
HEAD_COUNT_KV = [0, 0, N_HEAD_KV, 0, N_HEAD_KV, 0]   # 0: short convolution
N_LAYER = len(HEAD_COUNT_KV)
N_DENSE, N_FF = 2, 512                               # leading dense layers
N_EXPERT, N_USED, N_FF_EXPERT = 8, 2, 256
L_CACHE, ROPE_BASE, EPS, N_CTX = 3, 1e6, 1e-5, 2048
N_VOCAB = 2048

# ----------------------------------------------------------------- the tokenizer

SPECIALS = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>",
            "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>", "<|im_end|>",
            "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>",
            "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"]
PAD, BOS, EOT, IM_START, IM_END = 0, 1, 2, 6, 7
USER_DEFINED = "lfm2.c"                  # matched literally, before any splitting
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5           # tokenizer.ggml.token_type

# How text is cut before merging.  LFM2's expression speaks of \p{L} and \p{N},
# which Python's re lacks; the text here is ASCII, where this one is the same.
SPLIT = re.compile(r"'(?i:[sdmt]|ll|ve|re)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,3}"
                   r"| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_alphabet():
    """The 256 characters that stand for bytes in a GPT-2 style vocabulary:
    printable ones for themselves, the rest moved up to 256, 257, ..."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    table = {b: chr(b) for b in plain}
    table.update({b: chr(256 + i) for i, b in enumerate(rest)})
    return [table[b] for b in range(256)]


class Tokenizer:
    def __init__(self, merges):
        """merges: [(left, right)] in order of rank."""
        self.alphabet = byte_alphabet()
        self.merges = merges
        self.tokens = SPECIALS + self.alphabet + [a + b for a, b in merges]
        self.types = ([CONTROL] * len(SPECIALS) +
                      [NORMAL] * (256 + len(merges)) + [USER])
        self.tokens.append(USER_DEFINED)
        while len(self.tokens) < N_VOCAB:
            self.tokens.append("[PAD%d]" % len(self.tokens))
            self.types.append(UNUSED)
        assert len(self.tokens) == N_VOCAB == len(set(self.tokens))
        self.ids = {t: i for i, t in enumerate(self.tokens)}
        self.rank = {m: i for i, m in reversed(list(enumerate(merges)))}
        self.cache = {}

    def word(self, word):
        """Ids of one piece that SPLIT has cut out."""
        s = [self.alphabet[b] for b in word.encode()]
        if "".join(s) in self.ids:
            return [self.ids["".join(s)]]
        while len(s) > 1:
            rank, i = min((self.rank.get(p, 1 << 30), i)
                          for i, p in enumerate(zip(s, s[1:])))
            if rank == 1 << 30:
                break
            s[i:i + 2] = [s[i] + s[i + 1]]
        return [self.ids[t] for t in s]

    def encode(self, text):
        out = []
        for k, part in enumerate(text.split(USER_DEFINED)):
            if k:
                out.append(self.ids[USER_DEFINED])
            for w in SPLIT.findall(part):
                if w not in self.cache:
                    self.cache[w] = self.word(w)
                out += self.cache[w]
        return out

    def decode(self, ids):
        back = {c: b for b, c in enumerate(self.alphabet)}
        out = b""
        for i in ids:
            if self.types[i] == NORMAL:
                out += bytes(back[c] for c in self.tokens[i])
            elif self.types[i] == USER:
                out += self.tokens[i].encode()
        return out.decode(errors="replace")

    def message(self, role, content):
        return ([IM_START] + self.encode(role + "\n" + content) + [IM_END] +
                self.encode("\n"))

    def ask(self, question, system=None):
        """The prompt for one question, ready for the answer to follow."""
        head = self.message("system", system) if system else []
        return ([BOS] + head + self.message("user", question) +
                [IM_START] + self.encode("assistant\n"))


def train_merges(texts, n_merges):
    """The n most frequent pairs, one after the other: byte pair encoding."""
    alphabet = byte_alphabet()
    count = {}
    for text in texts:
        for part in text.split(USER_DEFINED):
            for w in SPLIT.findall(part):
                count[w] = count.get(w, 0) + 1
    words = [[[alphabet[b] for b in w.encode()], n] for w, n in sorted(count.items())]
    pairs, where = {}, {}                  # pair -> count, pair -> words with it
    for k, (s, n) in enumerate(words):
        for p in zip(s, s[1:]):
            pairs[p] = pairs.get(p, 0) + n
            where.setdefault(p, set()).add(k)
    merges, made = [], set()
    while len(merges) < n_merges:
        # Most frequent first; equal ones in the order of their characters.
        best = max((p for p in pairs if p[0] + p[1] not in made),
                   key=lambda p: (pairs[p], p), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        made.add(best[0] + best[1])
        for k in where.pop(best):
            s, n = words[k]
            for p in zip(s, s[1:]):
                pairs[p] = pairs.get(p, 0) - n
            i = 0
            while i < len(s) - 1:
                if (s[i], s[i + 1]) == best:
                    s[i:i + 2] = [s[i] + s[i + 1]]
                i += 1
            for p in zip(s, s[1:]):
                pairs[p] = pairs.get(p, 0) + n
                where.setdefault(p, set()).add(k)
        pairs.pop(best, None)
    return merges


# --------------------------------------------------------------------- the model
#
# The parameters are a dictionary with the names of the GGUF file; matrices are
# [out][in] and experts [expert][out][in], as they lie there.

def new_parameters():
    g = torch.Generator().manual_seed(SEED)
    def normal(*shape, std=0.05):
        return torch.randn(*shape, generator=g) * std
    small = 0.05 / math.sqrt(2 * N_LAYER)             # for what adds to the stream
    d, kv = N_EMBD, N_HEAD_KV * HEAD_DIM
    p = {"token_embd.weight": normal(N_VOCAB, d),
         "token_embd_norm.weight": torch.ones(d)}
    for i, n_kv in enumerate(HEAD_COUNT_KV):
        b = "blk.%d." % i
        p[b + "attn_norm.weight"] = torch.ones(d)
        if n_kv:
            p[b + "attn_q.weight"] = normal(N_HEAD * HEAD_DIM, d)
            p[b + "attn_k.weight"] = normal(kv, d)
            p[b + "attn_v.weight"] = normal(kv, d)
            p[b + "attn_output.weight"] = normal(d, N_HEAD * HEAD_DIM, std=small)
            p[b + "attn_q_norm.weight"] = torch.ones(HEAD_DIM)
            p[b + "attn_k_norm.weight"] = torch.ones(HEAD_DIM)
        else:
            p[b + "shortconv.in_proj.weight"] = normal(3 * d, d)
            p[b + "shortconv.conv.weight"] = normal(d, L_CACHE, std=0.5)
            p[b + "shortconv.out_proj.weight"] = normal(d, d, std=small)
        p[b + "ffn_norm.weight"] = torch.ones(d)
        if i < N_DENSE:
            p[b + "ffn_gate.weight"] = normal(N_FF, d)
            p[b + "ffn_up.weight"] = normal(N_FF, d)
            p[b + "ffn_down.weight"] = normal(d, N_FF, std=small)
        else:
            p[b + "ffn_gate_inp.weight"] = normal(N_EXPERT, d)
            p[b + "exp_probs_b.bias"] = torch.zeros(N_EXPERT)
            p[b + "ffn_gate_exps.weight"] = normal(N_EXPERT, N_FF_EXPERT, d)
            p[b + "ffn_up_exps.weight"] = normal(N_EXPERT, N_FF_EXPERT, d)
            p[b + "ffn_down_exps.weight"] = normal(N_EXPERT, d, N_FF_EXPERT, std=small)
    return p


def through(x, rounded):
    """The rounded value, with the gradient of x."""
    return x + (rounded - x).detach()


def to_int8(x):
    """What the engine does to the input of a quantised matrix: groups of 32
    become signed bytes with a scale of their own."""
    g = x.reshape(*x.shape[:-1], -1, 32)
    dx = g.abs().amax(-1, keepdim=True) / 127
    return through(x, (torch.round(g / dx.clamp_min(1e-30)) * dx).reshape(x.shape))


def rmsnorm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def rope(x):
    """x: [batch, time, head, 64].  Value i turns with value i + 32."""
    half = HEAD_DIM // 2
    freq = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * freq
    cos, sin = (f(angle).to(x.dtype)[None, :, None, :] for f in (torch.cos, torch.sin))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Model:
    def __init__(self, p, noisy=False):
        self.p, self.noisy = p, noisy
        self.load = {}                       # layer -> how often each expert ran

    def linear(self, x, w):
        return F.linear(to_int8(x) if self.noisy else x, w)

    def short_conv(self, x, b):
        p = self.p
        B, C, X = self.linear(x, p[b + "shortconv.in_proj.weight"]).chunk(3, -1)
        u = F.pad(B * X, (0, 0, L_CACHE - 1, 0))      # zeros before the first token
        w = p[b + "shortconv.conv.weight"]            # the last tap is the newest
        T = x.shape[1]
        v = sum(u[:, k:k + T] * w[:, k] for k in range(L_CACHE))
        return self.linear(C * v, p[b + "shortconv.out_proj.weight"])

    def attention(self, x, b):
        p = self.p
        n, T, _ = x.shape
        q, k, v = (self.linear(x, p[b + "attn_%s.weight" % c]).view(n, T, -1, HEAD_DIM)
                   for c in "qkv")
        q = rope(rmsnorm(q, p[b + "attn_q_norm.weight"]))
        k = rope(rmsnorm(k, p[b + "attn_k_norm.weight"]))
        if self.noisy:                                # the cache holds half floats
            k, v = through(k, k.half().to(k.dtype)), through(v, v.half().to(v.dtype))
        share = N_HEAD // N_HEAD_KV                   # query heads per kv head
        k, v = (t.repeat_interleave(share, 2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        s = q @ k.transpose(2, 3) / math.sqrt(HEAD_DIM)
        s = s + torch.full((T, T), -math.inf, dtype=s.dtype).triu(1)
        y = (s.softmax(-1) @ v).transpose(1, 2).reshape(n, T, -1)
        return self.linear(y, p[b + "attn_output.weight"])

    def swiglu(self, x, gate, up, down):
        if self.noisy:
            x = to_int8(x)
        h = F.silu(F.linear(x, gate)) * F.linear(x, up)
        return self.linear(h, down)

    def moe(self, x, i):
        """x: [token, n_embd]."""
        p, b = self.p, "blk.%d." % i
        s = torch.sigmoid(F.linear(x, p[b + "ffn_gate_inp.weight"]))
        chosen = (s.detach() + p[b + "exp_probs_b.bias"]).topk(N_USED).indices
        w = s.gather(1, chosen)
        w = w / (w.sum(1, keepdim=True) + 1e-6)
        self.load[i] = torch.bincount(chosen.reshape(-1), minlength=N_EXPERT)
        y = torch.zeros_like(x)
        experts = zip(*(p[b + "ffn_%s_exps.weight" % k].unbind(0)
                        for k in ("gate", "up", "down")))
        for e, (gate, up, down) in enumerate(experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            if len(token):
                ye = self.swiglu(x[token], gate, up, down) * w[token, slot, None]
                y = y.index_add(0, token, ye)
        return y

    def hidden(self, ids, real=None):
        """ids [batch, time] -> normalised hidden vectors.  `real` marks what is
        not padding; padding is on the right, where nothing can see it."""
        p = self.p
        h = F.embedding(ids, p["token_embd.weight"])
        rows = (torch.ones_like(ids) if real is None else real).reshape(-1).nonzero()[:, 0]
        for i, n_kv in enumerate(HEAD_COUNT_KV):
            b = "blk.%d." % i
            x = rmsnorm(h, p[b + "attn_norm.weight"])
            h = h + (self.attention(x, b) if n_kv else self.short_conv(x, b))
            x = rmsnorm(h, p[b + "ffn_norm.weight"])
            if i < N_DENSE:
                h = h + self.swiglu(x, *(p[b + "ffn_%s.weight" % k]
                                         for k in ("gate", "up", "down")))
            else:
                flat = x.reshape(-1, N_EMBD)
                y = self.moe(flat[rows], i)
                h = h + torch.zeros_like(flat).index_copy(0, rows, y).view_as(h)
        return rmsnorm(h, p["token_embd_norm.weight"])

    def logits(self, h):
        return self.linear(h, self.p["token_embd.weight"])


# ---------------------------------------------------------------- weight types

def weight_type(name):
    """The type of each tensor in the file: mostly Q4_K, finer where it matters,
    and some others so that a test of this file exercises many formats."""
    if (name.endswith(("norm.weight", ".bias", "conv.weight")) or
            "ffn_gate_inp" in name):
        return "F32"
    special = {"token_embd.weight": "Q6_K",
               "blk.0.shortconv.in_proj.weight": "Q8_0",
               "blk.0.shortconv.out_proj.weight": "Q5_0",
               "blk.1.shortconv.in_proj.weight": "Q5_K",
               "blk.1.shortconv.out_proj.weight": "Q4_1",
               "blk.3.shortconv.out_proj.weight": "Q5_1",
               "blk.5.shortconv.in_proj.weight": "Q4_0",
               "blk.1.ffn_gate.weight": "Q4_0",
               "blk.1.ffn_up.weight": "Q4_0",
               "blk.0.ffn_down.weight": "Q6_K",
               "blk.4.attn_q.weight": "IQ4_NL",
               "blk.4.attn_output.weight": "F16",
               "blk.4.ffn_gate_exps.weight": "IQ4_XS"}
    if name in special:
        return special[name]
    if "attn_v" in name or name == "blk.2.ffn_down_exps.weight":
        return "Q6_K"
    return "Q5_K" if "attn_k" in name else "Q4_K"


def rounded(p):
    """The parameters as they will come out of the file."""
    out = {}
    for name, w in p.items():
        a, t = w.detach().numpy(), weight_type(name)
        if t != "F32":
            a = gguf.dequantise(gguf.quantise(a, t), t, a.shape)
        out[name] = torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32))
    return out


# -------------------------------------------------------------------- the data

def conversation(tok, turns, system=None):
    """(ids, wanted): wanted marks the tokens that the model must predict."""
    ids = [BOS] + (tok.message("system", system) if system else [])
    wanted = [0] * len(ids)
    for question, answer in turns:
        head = tok.message("user", question) + [IM_START] + tok.encode("assistant\n")
        body = tok.encode(answer) + [IM_END]
        tail = tok.encode("\n")
        ids += head + body + tail
        wanted += [0] * len(head) + [1] * len(body) + [0] * len(tail)
    return ids[:-1], wanted[:-1]


def epoch_examples(tok, pairs, rng, n_stories):
    """Every question of `pairs` once and some random ones: most alone, others
    in conversations of 2 to 6 turns.  And some stories."""
    pairs = pairs + corpus.random_dialogues(rng)
    rng.shuffle(pairs)
    out = []
    while pairs:
        n = rng.randint(2, 6) if rng.random() < 0.2 else 1
        system = rng.choice(corpus.SYSTEM_PROMPTS) if rng.random() < 0.15 else None
        out.append(conversation(tok, pairs[:n], system))
        del pairs[:n]
    for _ in range(n_stories):
        ids = [BOS] + tok.encode(corpus.story(rng)) + [EOT]
        out.append((ids, [0] + [1] * (len(ids) - 1)))
    return out


def batches(examples, rng, n_tokens):
    """Examples of similar length together, padded to at most n_tokens."""
    out, batch = [], []
    for e in sorted(examples, key=lambda e: len(e[0]) + rng.random() * 4):
        if batch and (len(batch) + 1) * len(e[0]) > n_tokens:
            out.append(batch)
            batch = []
        batch.append(e)
    out.append(batch)
    rng.shuffle(out)
    return out


def tensors(batch):
    """ids, wanted (both [example][time]) and the mask of real tokens."""
    T = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), T), PAD)
    wanted = torch.zeros(len(batch), T, dtype=torch.bool)
    real = torch.zeros(len(batch), T, dtype=torch.bool)
    for k, (i, w) in enumerate(batch):
        ids[k, :len(i)] = torch.tensor(i)
        wanted[k, :len(i)] = torch.tensor(w, dtype=torch.bool)
        real[k, :len(i)] = True
    return ids, wanted, real


@torch.no_grad()
def exact(model, examples, n_tokens=6000):
    """For every example: would greedy decoding give exactly the wanted tokens,
    and by what margin (smallest lead over the second best logit)?  Greedy text
    is exact if, and only if, every wanted token is the best after the ones
    before it, so one pass over the known text is enough."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    result, k = [None] * len(examples), 0
    while k < len(order):
        group = []
        while k < len(order) and (len(group) + 1) * len(examples[order[k]][0]) <= n_tokens:
            group.append(order[k])
            k += 1
        ids, wanted, real = tensors([examples[i] for i in group])
        at = wanted[:, 1:]
        z = model.logits(model.hidden(ids, real)[:, :-1][at])
        want = ids[:, 1:][at]
        z_want = z.gather(1, want[:, None])[:, 0]
        z_rest = z.scatter(1, want[:, None], -math.inf).amax(1)
        lead = torch.full(at.shape, math.inf)
        lead[at] = (z_want - z_rest).float()
        for i, m in zip(group, lead.amin(1).tolist()):
            result[i] = m
    return result


# ---------------------------------------------------------------------- training

def build_tokenizer():
    pairs = corpus.dialogues()
    rng = random.Random(SEED)
    texts = [q for _, q, _ in pairs] + [a for _, _, a in pairs]
    texts += [q for q, _ in corpus.random_dialogues(rng)]
    texts += [corpus.story(rng) for _ in range(300)]
    texts += list(corpus.SYSTEM_PROMPTS)
    texts += ["system\n", "user\n", "assistant\n", "tool\n"] * 50
    return Tokenizer(train_merges(texts, N_VOCAB - len(SPECIALS) - 256 - 1 - 3))


def train(args):
    torch.manual_seed(SEED)
    state = torch.load(CHECKPOINT) if args.resume else None
    tok = Tokenizer(state["merges"]) if state else build_tokenizer()
    p = state["p"] if state else new_parameters()
    names = [n for n in p if not n.endswith(".bias")]
    W = args.workers
    shared = {                       # what all processes see
        "p": p,
        "grad": torch.zeros(W, sum(p[n].numel() for n in names)),
        "delta": {n: torch.zeros_like(p[n]) for n in names if weight_type(n) != "F32"},
        "load": torch.zeros(W, N_LAYER, N_EXPERT),
        "loss": torch.zeros(W), "seen": torch.zeros(W),
        "progress": torch.zeros(1, dtype=torch.float64)}
    for v in shared.values():
        for t in v.values() if isinstance(v, dict) else [v]:
            t.share_memory_()
    print("%d parameters, %d merges" % (sum(w.numel() for w in p.values()),
                                        len(tok.merges)), flush=True)
    context = mp.get_context("fork")
    barrier = context.Barrier(W)
    for rank in range(1, W):
        context.Process(target=work, daemon=True,
                        args=(rank, args, tok, shared, names, state, barrier)).start()
    work(0, args, tok, shared, names, state, barrier)


def work(rank, args, tok, shared, names, state, barrier):
    """One of the processes: gradients of its share of the batches.  Number 0
    also averages all gradients, takes the step, and reports."""
    torch.set_num_threads(1)
    W, p, delta = args.workers, shared["p"], shared["delta"]
    pairs = [(q, a) for _, q, a in corpus.dialogues()]
    probe = [conversation(tok, [pairs[i]]) for i in range(0, len(pairs), 10)]
    own = {n: p[n].detach().requires_grad_(n in names) for n in p}   # same memory
    flat = shared["grad"].split([p[n].numel() for n in names], 1)
    step, spent, epoch = ((state["step"], state["spent"], state["epoch"])
                          if state else (0, 0.0, 0))
    if rank == 0:
        opt = torch.optim.AdamW(
            [{"params": [own[n] for n in names if p[n].dim() > 1], "weight_decay": 0.02},
             {"params": [own[n] for n in names if p[n].dim() == 1], "weight_decay": 0.0}],
            lr=args.lr, betas=(0.9, 0.98), eps=1e-9)
        if state:
            opt.load_state_dict(state["opt"])
        start, last, seen, losses = time.time() - spent, time.time(), 0, []

    def save():
        torch.save({"p": {n: w.detach().clone() for n, w in p.items()},
                    "merges": tok.merges, "opt": opt.state_dict(), "step": step,
                    "spent": spent, "epoch": epoch}, CHECKPOINT + ".new")
        os.replace(CHECKPOINT + ".new", CHECKPOINT)

    while True:
        rng = random.Random(1000 * SEED + epoch)
        epoch += 1
        todo = batches(epoch_examples(tok, pairs, rng, args.stories), rng, args.batch)
        for k in range(0, len(todo) - W + 1, W):
            if rank == 0:
                spent = time.time() - start
                shared["progress"][0] = max(step / args.steps, spent / (60 * args.minutes))
            barrier.wait()
            progress = shared["progress"].item()
            if progress >= 1:
                if rank == 0:
                    save()
                return
            noisy = progress > 1 - args.noisy
            if noisy and step % 20 == 0:                 # round the weights again
                for n in sorted(delta)[rank::W]:
                    delta[n].copy_(rounded({n: p[n]})[n] - p[n])
                barrier.wait()
            model = Model({n: own[n] + delta[n] if noisy and n in delta else own[n]
                           for n in p}, noisy)
            ids, wanted, real = tensors(todo[k + rank])
            at = wanted[:, 1:]
            z = model.logits(model.hidden(ids, real)[:, :-1][at])
            loss = F.cross_entropy(z, ids[:, 1:][at])
            for n in names:
                own[n].grad = None
            loss.backward()
            for n, g in zip(names, flat):
                g[rank].copy_(own[n].grad.reshape(-1))
            for i, load in model.load.items():
                shared["load"][rank, i] = load
            shared["loss"][rank], shared["seen"][rank] = loss.item(), real.sum()
            step += 1
            barrier.wait()
            if rank:
                continue
            for n, g in zip(names, flat):
                own[n].grad = g.mean(0).view_as(own[n])
            torch.nn.utils.clip_grad_norm_([own[n] for n in names], 1.0)
            lr = args.lr * min(1, step / 150) * (       # warm up, then half a cosine
                0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in opt.param_groups:
                group["lr"] = lr
            opt.step()
            # No loss term balances the experts: the selection bias of those
            # that ran too often goes down a little, and the others' up.
            load = shared["load"].sum(0)
            for i in range(N_DENSE, N_LAYER):
                p["blk.%d.exp_probs_b.bias" % i] += (
                    0.002 * (1 - progress) * torch.sign(load[i].mean() - load[i]))
            seen += int(shared["seen"].sum())
            losses.append(shared["loss"].mean().item())
            if step % 50 == 0:
                now = time.time()
                print("step %5d  %4.1f min  %3.0f %%  loss %.4f  lr %.1e  %5.0f tok/s"
                      "  busiest expert %.2f" %
                      (step, spent / 60, 100 * progress, sum(losses) / len(losses), lr,
                       seen / (now - last), load.max() / load[N_DENSE:].mean()), flush=True)
                seen, losses, last = 0, [], now
            if step % 400 == 0:
                save()
                q = {n: w + delta[n] if noisy and n in delta else w for n, w in p.items()}
                lead = exact(Model(q, noisy), probe)
                print("      exact %d of %d, median margin %.1f" %
                      (sum(m > 0 for m in lead), len(lead), np.median(lead)), flush=True)


# -------------------------------------------------------------------- the files

TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def metadata(tok):
    return {
        "general.architecture": ("str", "lfm2moe"),
        "general.type": ("str", "model"),
        "general.name": ("str", "LFM2-Tiny-MoE"),
        "general.description": ("str", "A very small model of the LFM2-MoE architecture, trained "
                                "for lfm2.c on text that was written for it."),
        "general.license": ("str", "MIT"),
        "general.languages": ("arr:str", ["en"]),
        "lfm2moe.block_count": ("u32", N_LAYER),
        "lfm2moe.context_length": ("u32", N_CTX),
        "lfm2moe.embedding_length": ("u32", N_EMBD),
        "lfm2moe.feed_forward_length": ("u32", N_FF),
        "lfm2moe.attention.head_count": ("u32", N_HEAD),
        "lfm2moe.attention.head_count_kv": ("arr:i32", HEAD_COUNT_KV),
        "lfm2moe.attention.layer_norm_rms_epsilon": ("f32", EPS),
        "lfm2moe.rope.freq_base": ("f32", ROPE_BASE),
        "lfm2moe.vocab_size": ("u32", N_VOCAB),
        "lfm2moe.shortconv.l_cache": ("u32", L_CACHE),
        "lfm2moe.leading_dense_block_count": ("u32", N_DENSE),
        "lfm2moe.expert_count": ("u32", N_EXPERT),
        "lfm2moe.expert_used_count": ("u32", N_USED),
        "lfm2moe.expert_feed_forward_length": ("u32", N_FF_EXPERT),
        "lfm2moe.expert_gating_func": ("u32", 2),                       # sigmoid
        "general.file_type": ("u32", 15),                               # mostly Q4_K
        "general.quantization_version": ("u32", 2),
        "tokenizer.ggml.model": ("str", "gpt2"),
        "tokenizer.ggml.pre": ("str", "lfm2"),
        "tokenizer.ggml.tokens": ("arr:str", tok.tokens),
        "tokenizer.ggml.token_type": ("arr:i32", tok.types),
        "tokenizer.ggml.merges": ("arr:str", [a + " " + b for a, b in tok.merges]),
        "tokenizer.ggml.bos_token_id": ("u32", BOS),
        "tokenizer.ggml.eos_token_id": ("u32", IM_END),
        "tokenizer.ggml.padding_token_id": ("u32", PAD),
        "tokenizer.ggml.add_bos_token": ("bool", True),
        "tokenizer.ggml.add_eos_token": ("bool", False),
        "tokenizer.chat_template": ("str", TEMPLATE.strip()),
    }


def golden_ids(tok):
    """A short conversation, and then the start of a story."""
    said = {q: a for _, q, a in corpus.dialogues()}
    ids = conversation(tok, [(q, said[q]) for q in
                             ("Bye", "What does exit code 3 mean?")])[0]
    return ids + [EOT] + tok.encode(corpus.story(random.Random(SEED)))[:12]


def export(args):
    state = torch.load(CHECKPOINT)
    tok, p = Tokenizer(state["merges"]), state["p"]
    path = lambda name: os.path.join(args.out, name)
    gguf.write(path("tiny.gguf"), metadata(tok),
               [gguf.Tensor(n, weight_type(n), w.shape, gguf.quantise(w.numpy(), weight_type(n)))
                for n, w in p.items()])
    tensors = gguf.File(path("tiny.gguf")).tensors
    print("step %d, %.1f minutes; tiny.gguf has %d bytes" %
          (state["step"], state["spent"] / 60, os.path.getsize(path("tiny.gguf"))))

    # The logits of the file's weights, in double precision.
    double = {n: torch.from_numpy(t.array(np.float64)) for n, t in tensors.items()}
    ids = golden_ids(tok)
    np.array(ids, "<i4").tofile(path("tiny.ids"))
    with torch.no_grad():
        model = Model(double)
        model.logits(model.hidden(torch.tensor([ids])))[0].numpy().astype("<f4").tofile(
            path("tiny.logits"))
    print("%d golden ids: %r" % (len(ids), tok.decode(ids)))

    # How many answers are exact: as trained, from the file, and from the file
    # with 8-bit activations and a 16-bit cache?
    pairs = [(q, a) for _, q, a in corpus.dialogues()]
    other = corpus.random_dialogues(random.Random(12345))
    stored = {n: torch.from_numpy(t.array()) for n, t in tensors.items()}
    lead = {}
    for name, model in (("as trained", Model(p)), ("from the file", Model(stored)),
                        ("with 8-bit activations", Model(stored, noisy=True))):
        lead[name] = exact(model, [conversation(tok, [x]) for x in pairs])
        rest = exact(model, [conversation(tok, [x]) for x in other])
        print("%-24s %d of %d exact, %d of %d others; margin: median %.1f, lowest percent %.2f" %
              (name, sum(m > 0 for m in lead[name]), len(pairs), sum(m > 0 for m in rest),
               len(other), np.median(lead[name]), np.percentile(lead[name], 1)))

    # Questions for a test: every ninth, and some that should never be missing;
    # all with a comfortable margin.
    must = ("What is LFM2?", "What is a short convolution?", "Hello", "Who are you?",
            "What is lfm2.c?", "What is the capital of France?")
    n = 0
    with open(path("questions.txt"), "w") as f:
        for i, (q, a) in enumerate(pairs):
            if (i % 9 == 0 or q in must) and min(v[i] for v in lead.values()) > args.margin:
                f.write("%s\t%s\n" % (q, a))
                n += 1
    print("questions.txt has %d lines" % n)
    for i, (q, a) in enumerate(pairs):
        if min(v[i] for v in lead.values()) <= 0:
            print("  not exact: " + q)


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("what", choices=["train", "export"])
    a.add_argument("--minutes", type=float, default=1e9)
    a.add_argument("--steps", type=int, default=4000)
    a.add_argument("--batch", type=int, default=1000,
                   help="tokens per step and process")
    a.add_argument("--lr", type=float, default=2e-3)
    a.add_argument("--noisy", type=float, default=0.2,
                   help="share of the run with rounded weights and activations")
    a.add_argument("--stories", type=int, default=40, help="stories per epoch")
    a.add_argument("--workers", type=int, default=2, help="processes")
    a.add_argument("--resume", action="store_true")
    a.add_argument("--margin", type=float, default=1.0,
                   help="lead that an answer needs for questions.txt")
    a.add_argument("--out", default="test")
    args = a.parse_args()
    train(args) if args.what == "train" else export(args)


if __name__ == "__main__":
    main()
