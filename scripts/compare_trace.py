#!/usr/bin/env python3
"""compare_trace.py - where do two computations of the same model part?

    python3 scripts/compare_trace.py A.jsonl B.jsonl [--bound X] [--all] [--raw A.f32 B.f32]
    python3 scripts/compare_trace.py A.jsonl --transformers MODEL_DIR [--write B.jsonl]

A and B are traces of the same tokens, from `run --trace`: one record for every module and
position.  With --transformers the second is a run of the official implementation, in float32,
on the tokens of the first; it needs PyTorch, transformers and the model as published, and can
be kept with --write.  The rest needs nothing but Python.

Records are paired by module and position; the table says for every module at which
position it is furthest off, in the order of computation.  The last line names the first module
that differs by more than the bound.  All that comes before it agrees, so the error is there.

The distance is the largest |a - b| of the values both records tell of (the first, the last,
smallest, largest, mean and root mean square), over the root mean square of the vector.  None of
them can be further apart than some two elements are, so it never says too much, but may say too
little; with --raw, the files of --trace-raw, it is the largest of all elements.  Equal hashes
(FNV-1a over the bits of the numbers) are no distance.

The bound of 1e-3 lies between what rounding does and what errors do: sums of float32 in another
order part by 2e-5 after 4 layers and 2e-4 after 30, a wrong formula by 1e-2 or more.  Keys and
values rounded to f16 (5e-3) and activations to int8 are above it: trace an F32 model with
--kv f32, or give a larger bound.  Where two experts are nearly equal rounding may choose, and
selected_experts is the first that differs.

Exit status: 0 nothing differs, 1 something does, 2 the input cannot be compared.
"""
import argparse
import array
import collections
import io
import json
import math
import re
import sys

BOUND = 1e-3


class Unreadable(Exception):
    """One sentence: the thing, what was found, what was expected."""


# ------------------------------------------------------------------- the order

# Of what a layer computes.  Module after module, whatever the trace's own order,
# which follows the batches: the first of these that differs has only inputs that
# do not.
ORDER = {name: i for i, name in enumerate(
    "operator_norm conv.in_proj conv.conv conv.out_proj self_attn.q_proj self_attn.k_proj "
    "self_attn.v_proj self_attn.q_layernorm self_attn.k_layernorm self_attn.out_proj ffn_norm "
    "feed_forward.gate feed_forward.selected_experts feed_forward.routing_weights "
    "feed_forward.w1 feed_forward.w3 feed_forward.w2 feed_forward.experts.*.w1 "
    "feed_forward.experts.*.w3 feed_forward.experts.*.w2".split())}
ORDER.update({"feed_forward": 101, "": 102})               # after names not known here
UNKNOWN = 100
LAST = {"model.embedding_norm": 1, "lm_head": 2}           # after the layers

LAYER = re.compile(r"model\.layers\.(\d+)(?:\.(.*))?$")
EXPERT = re.compile(r"\.experts\.(\d+)\.(?=w)")


def fold(name):
    """All experts as one."""
    return EXPERT.sub(".experts.*.", name)


def place(name):
    """A key to sort by: layer, place in the layer, name or expert."""
    m = LAYER.match(name)
    if not m:
        return (math.inf, LAST[name], name, 0) if name in LAST else (-1, 0, name, 0)
    expert = EXPERT.search(name)
    rest = fold(m.group(2) or "")
    rank = ORDER.get(rest, UNKNOWN)
    return int(m.group(1)), rank, rest, int(expert.group(1)) if expert else 0


def is_traced(name):
    m = LAYER.match(name)
    return name == "model.embed_tokens" or name in LAST or \
        bool(m) and fold(m.group(2) or "") in ORDER


# --------------------------------------------------------------------- reading

# What is compared of a record.  l2 becomes the root mean square.
Record = collections.namedtuple("Record", "shape values rms hash offset")


def number(x):
    return float(x)                            # also of "nan", "inf" and "-inf"


def make_record(r):
    shape = [int(n) for n in r["shape"]]
    rms = number(r["l2"]) / math.sqrt(max(1, math.prod(shape)))
    values = [number(x) for x in r["first"]] + [number(x) for x in r["last"]]
    values += [number(r[key]) for key in ("min", "max", "mean")] + [rms]
    return Record(shape, values, rms, r.get("hash"), r.get("offset"))


class Trace:
    """header; records: {(name, position, how many times before): Record}; tokens:
    {(position, how many times before): id}."""

    def __init__(self, path, lines=None):
        self.path, self.header, self.records, self.tokens = path, None, {}, {}
        seen = collections.Counter()
        try:
            with open(path, encoding="utf-8") if lines is None else io.StringIO(lines) as f:
                for n, line in enumerate(f, 1):
                    if line.strip():
                        self.add(line, n, seen)
        except (OSError, UnicodeDecodeError) as e:
            raise Unreadable("%s: %s" % (path, getattr(e, "strerror", None) or e))
        if self.header is None:
            raise Unreadable("%s: no header, expected {\"trace\":1,...}" % path)
        if not self.records:
            raise Unreadable("%s: no record, expected one for every module" % path)

    def add(self, line, n, seen):
        try:
            r = json.loads(line)
            if "trace" in r:                   # the first, or, sorted, the last
                if r["trace"] != 1:
                    raise Unreadable("%s: format %s, expected 1" % (self.path, r["trace"]))
                self.header = r
                return
            name, pos = str(r["name"]), int(r["pos"])
            record = make_record(r)
            token = int(r["token"]) if "token" in r else None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise Unreadable("%s: line %d is no record of a trace (%s: %s)" %
                             (self.path, n, type(e).__name__, e))
        again = seen[name, pos]                # a position that was computed twice
        self.records[name, pos, again] = record
        if token is not None:
            self.tokens[pos, again] = token
        seen[name, pos] += 1

    def title(self):
        h = self.header
        return ", ".join([self.path, str(h.get("program", "?"))] +
                         ["%s %s" % (key.replace("_", " "), h[key])
                          for key in ("arch", "model_hash", "kv") if key in h])


class Vectors:
    """The whole vectors of a trace, in a file of --trace-raw."""

    def __init__(self, path):
        self.path = path
        try:
            self.file = path and open(path, "rb")
        except OSError as e:
            raise Unreadable("%s: %s" % (path, e.strerror))

    def vector(self, name, pos, record):
        n = math.prod(record.shape)
        if record.offset is None:
            raise Unreadable("%s: no offset in the record of %s, expected a trace made with "
                             "--trace-raw" % (self.path, name))
        self.file.seek(record.offset)
        x = array.array("f", self.file.read(4 * n))
        if sys.byteorder == "big":
            x.byteswap()
        if len(x) != n or not all(map(same, x[:4], array.array("f", record.values))):
            raise Unreadable("%s: at %d is not what the trace has of %s" %
                             (self.path, record.offset, name))
        return x


# -------------------------------------------------------------------- distance

def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


def distance(a, b, rms):
    """The largest difference of two lists, over the root mean square."""
    worst = max((0.0 if same(x, y) else abs(x - y) for x, y in zip(a, b)), default=0.0,
                key=lambda d: math.inf if math.isnan(d) else d)
    if worst == 0:
        return 0.0
    return worst / rms if math.isfinite(worst) and math.isfinite(rms) and rms > 0 else math.inf


def compare_records(a, b, whole=None):
    """How far; whole: both vectors, if there are."""
    if a.shape != b.shape:
        return math.inf
    if a.hash is not None and a.hash == b.hash:
        return 0.0
    rms = max(a.rms, b.rms)
    return distance(*(whole or (a.values, b.values)), rms)


# What is told of a pair: how far off, and whether that is too far.
Pair = collections.namedtuple("Pair", "name pos far over note")


def check_same_model(a, b):
    for key in ("arch", "n_layer", "n_embd", "n_vocab"):
        if key in a.header and key in b.header and a.header[key] != b.header[key]:
            raise Unreadable("%s: %s is %s, but %s in %s" %
                             (a.path, key, a.header[key], b.header[key], b.path))
    for at in sorted(set(a.tokens) & set(b.tokens)):
        if a.tokens[at] != b.tokens[at]:
            raise Unreadable("%s: position %d is token %d, but %d in %s" %
                             (a.path, at[0], a.tokens[at], b.tokens[at], b.path))


def compare(a, b, bound, vectors=()):
    """The pairs of two traces, in the order of computation."""
    check_same_model(a, b)
    common = [key for key in a.records if key in b.records]
    if not common:
        raise Unreadable("%s: no record of a module and position that %s has" % (a.path, b.path))
    pairs = []
    for key in sorted(common, key=lambda k: (place(k[0]), k[1:])):
        x, y = a.records[key], b.records[key]
        whole = None
        if vectors and x.shape == y.shape:
            whole = [v.vector(key[0], key[1], r) for v, r in zip(vectors, (x, y))]
        far = compare_records(x, y, whole)
        bytes_differ = None not in (x.hash, y.hash) and x.hash != y.hash
        note = "shapes %s and %s" % (x.shape, y.shape) if x.shape != y.shape else \
            "other bytes" if bytes_differ and far == 0 else ""
        pairs.append(Pair(key[0], key[1], far, far > bound or (bound == 0 and bytes_differ), note))
    return pairs


# -------------------------------------------------- the official implementation

def tokens_of(trace):
    """Its prompt: the token of every position from 0."""
    n = sum(1 for _, again in trace.tokens if again == 0)
    ids = [trace.tokens.get((i, 0)) for i in range(n)]
    if not ids or None in ids:
        raise Unreadable("%s: no token at position %d, expected model.embed_tokens of every "
                         "position from 0" % (trace.path, ids.index(None) if ids else 0))
    return ids


def text(x):
    """A float as the traces have it."""
    return float("%.9g" % x) if math.isfinite(x) else str(x)


def hash_of(data):
    """FNV-1a over the bits of each float32."""
    h = 0xcbf29ce484222325
    for i in range(0, len(data), 4):
        h = (h ^ int.from_bytes(data[i:i + 4], "little")) * 0x100000001b3 & (1 << 64) - 1
    return "%016x" % h


def describe(name, pos, v, hashed=True):
    """The record of a vector, a float32 tensor of one dimension."""
    d = v.double()
    r = {"name": name, "pos": pos, "shape": [len(v)],
         "first": [text(x) for x in d[:4].tolist()], "last": [text(x) for x in d[-4:].tolist()],
         "min": text(d.min().item()), "max": text(d.max().item()),
         "mean": text(d.mean().item()), "l2": text(d.norm().item())}
    if hashed:
        r["hash"] = hash_of(v.numpy().astype("<f4").tobytes())
    return r


def watch_linear(see):
    """Within this context, see(x, weight, y) is called for every product."""
    import torch

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            if function is torch.nn.functional.linear and len(args) >= 2:
                see(args[0], args[1], y)
            return y
    return Watch()


class Official(Vectors):
    """What the modules of a model in transformers put out, recorded by hooks."""

    def __init__(self, model, ids):
        super().__init__(None)
        self.model, self.ids, self.n = model, ids, len(ids)
        self.kept, self.left_out, self.inputs, self.stacks = {}, [], None, []

    def run(self):
        import torch
        for name, module in self.model.named_modules():
            dense = name.endswith("feed_forward") and hasattr(module, "w2")    # the same as w2
            if is_traced(name) and not dense:
                module.register_forward_hook(self.hook(name))
            if hasattr(module, "route_tokens_to_experts"):
                self.watch_router(name, module)
            if hasattr(module, "gate_up_proj"):
                self.stacks.append((name, module))
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")     # one after the other
        with torch.no_grad(), watch_linear(self.keep_stacked):
            self.model(torch.tensor([self.ids]), use_cache=False)
        for what in (".routing_weights", ".experts."):
            if self.inputs is not None and not any(what in name for name in self.kept):
                self.left_out.append("*%s*: this version of transformers hides them" % what)
        return self

    def hook(self, name):
        def keep(module, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            if EXPERT.search(name):            # rows: the tokens that chose it
                self.keep_expert(name, inputs[0], x)
                return
            if name.endswith("feed_forward.gate"):
                self.inputs = inputs[0].reshape(self.n, -1)
            if x.dim() > 2:                    # one sequence
                x = x[0]
            if name.endswith("conv.conv"):     # [n_embd][T + padding]
                x = x.transpose(0, 1)[:self.n]
            elif x.dim() == 3 and x.shape[0] != self.n:
                x = x.transpose(0, 1)          # [head][T][head_dim]
            if x.shape[0] == self.n:
                self.keep(name, range(self.n), x)
            else:
                self.left_out.append("%s: shape %s" % (name, list(x.shape)))
        return keep

    def keep(self, name, positions, x):
        rows = x.detach().float().reshape(x.shape[0], -1).contiguous()
        self.kept.setdefault(name, {}).update(zip(positions, rows))

    def keep_expert(self, name, x, y):
        """Which rows of the router's input these are is not told, but easily found.  w2
        has other inputs, but the same rows as w1."""
        if not name.endswith(".w2"):
            where = collections.defaultdict(list)
            for i, row in enumerate(self.inputs):
                where[row.numpy().tobytes()].append(i)
            rows = [where[row.numpy().tobytes()] for row in x]
            self.positions = [row.pop(0) for row in rows if row]
        if len(self.positions) == len(y):
            self.keep(name, self.positions, y)

    def keep_stacked(self, x, weight, y):
        """Experts of one tensor are no modules, but products with a part of it."""
        for name, module in self.stacks:
            for whole in (module.gate_up_proj, module.down_proj):
                size = weight.numel() * weight.element_size()
                e, rest = divmod(weight.data_ptr() - whole.data_ptr(), size)
                if rest or not 0 <= e < len(whole) or weight.shape != whole.shape[1:]:
                    continue
                parts = ("w2",) if whole is module.down_proj else ("w1", "w3")
                for part, z in zip(parts, y.chunk(len(parts), -1)):
                    self.keep_expert("%s.%d.%s" % (name, e, part), x, z)

    def watch_router(self, name, block):
        """The choice of experts is no module but a method."""
        route = block.route_tokens_to_experts

        def watched(*args, **kwargs):
            chosen, weights = route(*args, **kwargs)
            self.keep(name + ".selected_experts", range(self.n), chosen)
            self.keep(name + ".routing_weights", range(self.n), weights)
            return chosen, weights
        block.route_tokens_to_experts = watched

    def vector(self, name, pos, record):       # as Vectors
        return self.kept[name][pos].tolist()

    def header(self, version):
        c = self.model.config
        return {"trace": 1, "program": "transformers " + version,
                "arch": c.model_type.replace("lfm2_moe", "lfm2moe"),
                "n_layer": c.num_hidden_layers, "n_embd": c.hidden_size,
                "n_vocab": c.vocab_size, "kv": "f32"}

    def lines(self, version, hashed=True, wanted=lambda name, pos: True):
        """The trace."""
        records = [self.header(version)]
        for name in sorted(self.kept, key=place):
            for pos in sorted(self.kept[name]):
                if wanted(name, pos):
                    records.append(describe(name, pos, self.kept[name][pos], hashed))
                    if name == "model.embed_tokens":
                        records[-1]["token"] = self.ids[pos]
        return "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records)


def run_official(folder, ids):
    """The run and its trace."""
    try:
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager").float().eval()
    except ImportError as e:
        raise Unreadable("transformers cannot be imported: %s" % e)
    except (OSError, ValueError, KeyError) as e:
        raise Unreadable("%s: %s" % (folder, str(e).splitlines()[0]))
    if max(ids) >= model.config.vocab_size:
        raise Unreadable("%s: %d tokens, but the trace has token %d" %
                         (folder, model.config.vocab_size, max(ids)))
    run = Official(model, ids).run()
    for what in run.left_out:
        print("left out: %s" % what)
    return run, run.lines(transformers.__version__)


# ---------------------------------------------------------------------- telling

def show_table(pairs, every):
    """A line for each module, its experts together, or for each pair."""
    groups = collections.OrderedDict()
    for i, p in enumerate(pairs):
        groups.setdefault(i if every else fold(p.name), []).append(p)
    rows = []
    for group in groups.values():
        worst = max(group, key=lambda p: p.far)
        over = sum(p.over for p in group)
        note = [worst.note] if worst.note else []
        if over:
            note.append("TOO FAR" if every else "TOO FAR, %d of %d" % (over, len(group)))
        rows.append((worst.name if every else fold(worst.name),
                     str(worst.pos) if every or worst.far > 0 else "-",
                     "%.2g" % worst.far, ", ".join(note)))
    width = max(len(r[0]) for r in rows)
    print("%-*s %8s  how far" % (width, "module", "position"))
    for name, pos, far, note in rows:
        print(("%-*s %8s  %-8s %s" % (width, name, pos, far, note)).rstrip())


def show_unpaired(a, b):
    for one, other in ((a, b), (b, a)):
        names = {}
        for key in one.records:
            if key not in other.records:
                names[fold(key[0])] = names.get(fold(key[0]), 0) + 1
        if names:
            some = sorted(names, key=place)
            print("only in %s: %d records (%s%s)" % (one.path, sum(names.values()), some[0],
                  ", and %d more" % (len(some) - 1) if len(some) > 1 else ""))


def show(a, b, pairs, bound, every):
    """All of the report; the exit status."""
    print("A: %s\nB: %s" % (a.title(), b.title()))
    show_table(pairs, every)
    show_unpaired(a, b)
    for p in pairs:
        if p.over:
            print("the first that differs: %s at position %d, by %.2g (bound %g)%s" %
                  (p.name, p.pos, p.far, bound, ", " + p.note if p.note else ""))
            return 1
    worst = max(pairs, key=lambda p: p.far)
    print("no module differs by more than %g" % bound +
          (" (the furthest: %s at position %d, by %.2g)" % (worst.name, worst.pos, worst.far)
           if worst.far > 0 else ""))
    return 0


# -------------------------------------------------------------------------- main

def not_negative(text):
    x = float(text)
    if not x >= 0:
        raise argparse.ArgumentTypeError("%s: expected a number from 0" % text)
    return x


def arguments():
    p = argparse.ArgumentParser(description="Compare two traces, module by module.")
    p.add_argument("a", metavar="A", help="a trace")
    p.add_argument("b", metavar="B", nargs="?", help="another")
    p.add_argument("--transformers", metavar="MODEL_DIR",
                   help="in place of B: what transformers makes of the model in this folder")
    p.add_argument("--write", metavar="FILE", help="keep that as a trace")
    p.add_argument("--bound", type=not_negative, default=BOUND, metavar="X",
                   help="the relative distance allowed; 0: the same bytes (%g)" % BOUND)
    p.add_argument("--all", action="store_true", help="a line for every position")
    p.add_argument("--raw", nargs="+", metavar="FILE", default=[],
                   help="compare the whole vectors in A's file and B's; only the first of "
                   "these with --transformers")
    args = p.parse_args()
    if (args.b is None) == (args.transformers is None):
        p.error("expected a second trace or --transformers MODEL_DIR")
    if args.write and not args.transformers:
        p.error("--write: there is nothing to write without --transformers")
    if args.raw and len(args.raw) != (1 if args.transformers else 2):
        p.error("--raw: expected the file of every trace")
    return args


def write(path, lines):
    try:
        with open(path, "w", encoding="utf-8") as f:
            f.write(lines)
    except OSError as e:
        raise Unreadable("%s: %s" % (path, e.strerror))


def main():
    args = arguments()
    try:
        a, vectors = Trace(args.a), [Vectors(path) for path in args.raw]
        if args.transformers:
            official, lines = run_official(args.transformers, tokens_of(a))
            b = Trace(args.transformers, lines)
            vectors += [official] if vectors else []
            if args.write:
                write(args.write, lines)
        else:
            b = Trace(args.b)
        pairs = compare(a, b, args.bound, vectors)
    except Unreadable as e:
        print("compare_trace.py: %s" % e, file=sys.stderr)
        return 2
    return show(a, b, pairs, args.bound, args.all)


if __name__ == "__main__":
    sys.exit(main())
