/* A mutator that knows GGUF.  It takes a file apart, as far as it is one, puts
 * something odd into one to four places, and writes the rest as it was: counts
 * and offsets still agree unless they were what was changed.  So most of what
 * it makes gets past the first check, to the many behind it. */
#include "fuzz.h"
#include "util.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_PARTS = 512 };

/* Lengths are what the file says, which need not be true. */
struct kv {
    struct bytes key, value;              /* value: all elements of an array */
    uint64_t key_len, n;                  /* n: elements, of an array        */
    uint32_t type, elem;
};

struct info {
    struct bytes name;
    uint64_t name_len, dims[8], offset;
    uint32_t n_dims, type;
};

struct gguf {
    uint32_t magic, version;
    uint64_t n_infos, n_kvs;              /* as the header says              */
    struct kv kv[MAX_PARTS];
    struct info info[MAX_PARTS];
    int kvs, infos;
    struct bytes data;
    uint64_t alignment, rng;
};

static uint32_t below(struct gguf *g, size_t n)
{
    return random_u32(&g->rng) % (uint32_t)(n ? n : 1);
}

/* ------------------------------------------------------------- taking apart */

struct reader { const uint8_t *p; size_t n; int past; };

static uint64_t get(struct reader *r, int bytes)
{
    uint64_t x = 0;

    r->past |= r->n < (size_t)bytes;
    if (!r->past) {
        x = fuzz_get(r->p, bytes);
        r->p += bytes;
        r->n -= (size_t)bytes;
    }
    return x;
}

static void get_bytes(struct reader *r, uint64_t n, struct bytes *out)
{
    r->past |= n > r->n;
    if (r->past)
        return;
    bytes_put(out, r->p, (size_t)n);
    r->p += n;
    r->n -= (size_t)n;
}

static uint64_t scalar_bytes(uint32_t type)
{
    static const uint8_t size[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    return type < COUNT(size) ? size[type] : 0;
}

static void get_kv(struct reader *r, struct kv *kv)
{
    const uint8_t *from;

    kv->key_len = get(r, 8);
    get_bytes(r, kv->key_len, &kv->key);
    kv->type = (uint32_t)get(r, 4);
    kv->elem = kv->type == T_ARRAY ? (uint32_t)get(r, 4) : kv->type;
    kv->n = kv->type == T_ARRAY ? get(r, 8) : 1;
    from = r->p;
    if (kv->elem == T_STRING) {
        for (uint64_t i = 0; i < kv->n && !r->past; i++) {
            const uint64_t n = get(r, 8);
            r->past |= n > r->n;
            r->p += r->past ? 0 : n;
            r->n -= r->past ? 0 : n;
        }
        bytes_put(&kv->value, from, (size_t)(r->p - from));
        return;
    }
    r->past |= scalar_bytes(kv->elem) == 0 || kv->n > r->n;
    get_bytes(r, r->past ? 0 : kv->n * scalar_bytes(kv->elem), &kv->value);
}

static void get_info(struct reader *r, struct info *t)
{
    t->name_len = get(r, 8);
    get_bytes(r, t->name_len, &t->name);
    t->n_dims = (uint32_t)get(r, 4);
    r->past |= t->n_dims > COUNT(t->dims);
    for (uint32_t d = 0; d < t->n_dims && !r->past; d++)
        t->dims[d] = get(r, 8);
    t->type = (uint32_t)get(r, 4);
    t->offset = get(r, 8);
}

static void free_gguf(struct gguf *g)
{
    for (int i = 0; i < g->kvs; i++) {
        free(g->kv[i].key.p);
        free(g->kv[i].value.p);
    }
    for (int i = 0; i < g->infos; i++)
        free(g->info[i].name.p);
    free(g->data.p);
    free(g);
}

static int is_named(const struct bytes *name, const char *text)
{
    return name->n == strlen(text) && memcmp(name->p, text, name->n) == 0;
}

/* NULL if it is no GGUF at all, or something else from some point on. */
static struct gguf *take_apart(const uint8_t *data, size_t n, unsigned seed)
{
    struct gguf *g = calloc(1, sizeof *g);
    struct reader r = { data, n, 0 };

    REQUIRE(g);
    g->rng = seed;
    g->alignment = 32;
    g->magic = (uint32_t)get(&r, 4);
    g->version = (uint32_t)get(&r, 4);
    g->n_infos = get(&r, 8);
    g->n_kvs = get(&r, 8);
    r.past |= g->n_kvs > MAX_PARTS - 8 || g->n_infos > MAX_PARTS - 8;
    for (uint64_t i = 0; i < g->n_kvs && !r.past; i++) {
        struct kv *kv = &g->kv[g->kvs++];
        get_kv(&r, kv);
        if (is_named(&kv->key, "general.alignment") && kv->value.n == 4)
            g->alignment = fuzz_get(kv->value.p, 4);
    }
    for (uint64_t i = 0; i < g->n_infos && !r.past; i++)
        get_info(&r, &g->info[g->infos++]);
    if (r.past || g->alignment == 0 || g->alignment > 1 << 16) {
        free_gguf(g);
        return NULL;
    }
    while ((n - r.n) % g->alignment != 0 && r.n > 0)
        get(&r, 1);
    get_bytes(&r, r.n, &g->data);
    return g;
}

/* --------------------------------------------------------- putting together */

static struct bytes put_together(const struct gguf *g)
{
    struct bytes b = { 0 };

    bytes_int(&b, g->magic, 4);
    bytes_int(&b, g->version, 4);
    bytes_int(&b, g->n_infos, 8);
    bytes_int(&b, g->n_kvs, 8);
    for (int i = 0; i < g->kvs; i++) {
        const struct kv *kv = &g->kv[i];
        bytes_int(&b, kv->key_len, 8);
        bytes_put(&b, kv->key.p, kv->key.n);
        bytes_int(&b, kv->type, 4);
        if (kv->type == T_ARRAY) {
            bytes_int(&b, kv->elem, 4);
            bytes_int(&b, kv->n, 8);
        }
        bytes_put(&b, kv->value.p, kv->value.n);
    }
    for (int i = 0; i < g->infos; i++) {
        const struct info *t = &g->info[i];
        bytes_int(&b, t->name_len, 8);
        bytes_put(&b, t->name.p, t->name.n);
        bytes_int(&b, t->n_dims, 4);
        for (uint32_t d = 0; d < t->n_dims && d < COUNT(t->dims); d++)
            bytes_int(&b, t->dims[d], 8);
        bytes_int(&b, t->type, 4);
        bytes_int(&b, t->offset, 8);
    }
    while (b.n % g->alignment != 0)
        bytes_int(&b, 0, 1);
    bytes_put(&b, g->data.p, g->data.n);
    return b;
}

/* --------------------------------------------------------------- odd things */

/* Near what it was, near a limit, or anything. */
static uint64_t odd_number(struct gguf *g, uint64_t was)
{
    static const uint64_t edge[] = {
        0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 63, 64, 127, 128, 255, 256, 1023,
        4096, 8192, 65535, 65536, 1000000, 1u << 20, 1u << 30, INT32_MAX,
        1u << 31, UINT32_MAX, 1ull << 32, 1ull << 56, 1ull << 60, INT64_MAX,
        1ull << 63, UINT64_MAX - 31, UINT64_MAX, 0x7fc00000, 0x7f800000,
        0xff800000, 0x3f800000, 0xbf800000, 0x00000001, 0x7f7fffff
    };

    switch (below(g, 8)) {
    case 0:  return was + 1;
    case 1:  return was - 1;
    case 2:  return was * 2;
    case 3:  return was / 2;
    case 4:  return random_u32(&g->rng) >> below(g, 32);
    case 5:  return was ^ 1ull << below(g, 64);
    default: return edge[below(g, COUNT(edge))];
    }
}

static void set_bytes(struct bytes *b, const void *p, size_t n)
{
    b->n = 0;
    bytes_put(b, p, n);
}

/* Names that lead somewhere in lfm2.c. */
static const char *odd_name(struct gguf *g)
{
    static const char *const name[] = {
        "general.alignment", "general.architecture", "general.name",
        "split.count", "lfm2.block_count", "lfm2.attention.head_count_kv",
        "lfm2.attention.key_length", "lfm2.rope.dimension_count",
        "lfm2.rope.scaling.type", "lfm2.attention.sliding_window",
        "lfm2moe.expert_weights_scale", "lfm2moe.leading_dense_block_count",
        "lfm2.expert_shared_count", "lfm2.rope.freq_base", "lfm2.vocab_size",
        "lfm2.unknown", "tokenizer.ggml.tokens", "tokenizer.ggml.merges",
        "tokenizer.ggml.token_type", "tokenizer.ggml.scores",
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template",
        "blk.1.attn_qkv.weight", "blk.0.ffn_up.weight", "output.weight",
        "output_norm.weight", "token_embd_norm.weight", "token_embd.weight",
        "blk.0.attn_sinks.weight", "blk.1.exp_probs_b.bias",
        "blk.1.ffn_gate_inp.weight", "blk.127.attn_norm.weight", "rope_freqs",
        "x", ""
    };

    return name[below(g, COUNT(name))];
}

/* Where the i-th string of a value begins, and how long it is. */
static size_t string_at(const struct kv *kv, uint64_t i, uint64_t *len)
{
    size_t at = 0;

    for (;; i--, at += 8 + (size_t)*len) {
        if (kv->value.n - at < 8)
            *len = 0;
        else
            *len = fuzz_get(kv->value.p + at, 8);
        if (kv->value.n - at < 8 || *len > kv->value.n - at - 8)
            *len = 0;
        if (i == 0 || kv->value.n - at < 16 + *len)
            return at;
    }
}

/* Put a[n] in place of `cut` bytes at `at`. */
static void splice(struct bytes *b, size_t at, size_t cut, const void *a,
                   size_t n)
{
    struct bytes out = { 0 };

    cut = cut < b->n - at ? cut : b->n - at;
    bytes_put(&out, b->p, at);
    bytes_put(&out, a, n);
    if (b->n > at + cut)
        bytes_put(&out, b->p + at + cut, b->n - at - cut);
    free(b->p);
    *b = out;
}

/* A string that may be in a vocabulary: a part of another, bytes, a word. */
static struct bytes odd_string(struct gguf *g, const struct kv *kv)
{
    static const char *const word[] = {
        "", " ", "h e", "he  l", "\xc4\xa0", "\xc4", "\xff", "<0x-1>",
        "<0xZZ>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "a b",
        "\xc4\xa0 \xc4\xa0", "gpt2", "lfm2", "lfm2moe", "none"
    };
    struct bytes s = { 0 };
    uint64_t len = 0;
    size_t at = 0;

    if (kv->elem == T_STRING && kv->n > 0)
        at = string_at(kv, below(g, (size_t)(kv->n & 0xffff)), &len);
    switch (below(g, 4)) {
    case 0:
        for (uint32_t k = 1 + below(g, 40); k > 0 && len > 0 && len < 1000; k--)
            bytes_put(&s, kv->value.p + at + 8, (size_t)len);
        break;
    case 1:
        for (uint32_t k = below(g, 6); k > 0; k--)
            bytes_int(&s, random_u32(&g->rng), 1);
        break;
    default:
        at = below(g, COUNT(word));
        bytes_put(&s, word[at], strlen(word[at]));
    }
    return s;
}

/* -------------------------------------------------- one change to one thing */

static void change_header(struct gguf *g)
{
    switch (below(g, 4)) {
    case 0:  g->version = (uint32_t)odd_number(g, g->version); break;
    case 1:  g->n_kvs = odd_number(g, g->n_kvs); break;
    case 2:  g->n_infos = odd_number(g, g->n_infos); break;
    default: g->data.n = below(g, g->data.n + 1); break;
    }
}

/* The first four bytes are left: below that there is only one check. */
static void change_scalar(struct gguf *g, struct kv *kv)
{
    const uint64_t size = scalar_bytes(kv->elem);
    uint64_t i;

    if (size == 0 || kv->value.n < size)
        return;
    i = below(g, kv->value.n / size);
    fuzz_put(kv->value.p + i * size,
             odd_number(g, fuzz_get(kv->value.p + i * size, (int)size)),
             (int)size);
}

static void change_string(struct gguf *g, struct kv *kv)
{
    uint64_t len;
    const size_t at = string_at(kv, below(g, (size_t)(kv->n & 0xffff)), &len);
    struct bytes s = odd_string(g, kv);
    uint8_t prefix[8];

    if (at + 8 <= kv->value.n && below(g, 8) == 0)
        fuzz_put(kv->value.p + at, odd_number(g, len), 8);
    else if (at + 8 <= kv->value.n) {
        fuzz_put(prefix, s.n, 8);
        splice(&kv->value, at, 8 + (size_t)len, s.p, s.n);
        splice(&kv->value, at, 0, prefix, 8);
    }
    free(s.p);
}

/* One element more or fewer; a claim of another number; another type. */
static void change_array(struct gguf *g, struct kv *kv)
{
    const uint64_t i = below(g, (size_t)(kv->n & 0xffff));
    uint64_t len = scalar_bytes(kv->elem);
    size_t at = (size_t)(i * len);

    if (kv->elem == T_STRING) {
        at = string_at(kv, i, &len);
        len += 8;
    }
    if (at + len > kv->value.n || below(g, 4) == 0)
        kv->n = odd_number(g, kv->n);
    else if (below(g, 6) == 0)
        kv->elem = below(g, 14);
    else if (below(g, 2)) {
        splice(&kv->value, at, (size_t)len, NULL, 0);
        kv->n--;
    } else {
        struct bytes twice = { 0 };
        bytes_put(&twice, kv->value.p + at, (size_t)len);
        splice(&kv->value, at, 0, twice.p, twice.n);
        free(twice.p);
        kv->n++;
    }
}

/* A value of another type, with as many bytes as it takes. */
static void change_type(struct gguf *g, struct kv *kv)
{
    uint64_t value = kv->value.n >= 4 ? fuzz_get(kv->value.p, 4) : 1;

    if (below(g, 6) == 0) {
        kv->type = kv->elem = (uint32_t)odd_number(g, kv->type);
        return;
    }
    kv->type = kv->elem = below(g, 13);
    if (kv->type == T_ARRAY)
        kv->elem = below(g, 13);
    kv->n = kv->type == T_ARRAY ? below(g, 6) : 1;
    kv->value.n = 0;
    for (uint64_t i = 0; i < kv->n; i++)
        bytes_int(&kv->value, kv->elem == T_STRING ? 0 : value,
                  kv->elem == T_STRING ? 8 : (int)scalar_bytes(kv->elem));
}

static void change_kv(struct gguf *g)
{
    struct kv *kv = &g->kv[below(g, (size_t)g->kvs)];
    const char *name;

    if (g->kvs == 0)
        return;
    switch (below(g, 8)) {
    case 0:
        change_type(g, kv);
        break;
    case 1:
        name = odd_name(g);
        set_bytes(&kv->key, name, strlen(name));
        kv->key_len = kv->key.n;
        break;
    case 2:
        kv->key_len = odd_number(g, kv->key_len);
        break;
    default:
        if (kv->type == T_ARRAY && below(g, 3) == 0)
            change_array(g, kv);
        else if (kv->elem == T_STRING)
            change_string(g, kv);
        else
            change_scalar(g, kv);
    }
}

static void drop_kv(struct gguf *g)
{
    const uint32_t i = below(g, (size_t)g->kvs);

    if (g->kvs == 0)
        return;
    free(g->kv[i].key.p);
    free(g->kv[i].value.p);
    memmove(&g->kv[i], &g->kv[i + 1],
            (size_t)(g->kvs - (int)i - 1) * sizeof *g->kv);
    g->kvs--;
    g->n_kvs--;
}

/* Once more, most often by another name. */
static void copy_kv(struct gguf *g)
{
    const struct kv from = g->kv[below(g, (size_t)g->kvs)];
    const char *name = odd_name(g);
    struct kv *to;

    if (g->kvs == 0 || g->kvs == MAX_PARTS)
        return;
    to = &g->kv[g->kvs++];
    *to = from;
    to->key = to->value = (struct bytes){ 0 };
    bytes_put(&to->value, from.value.p, from.value.n);
    if (below(g, 8) == 0)
        bytes_put(&to->key, from.key.p, from.key.n);
    else
        bytes_put(&to->key, name, strlen(name));
    to->key_len = to->key.n;
    g->n_kvs++;
}

static void swap_kvs(struct gguf *g)
{
    struct kv *a = &g->kv[below(g, (size_t)g->kvs)];
    struct kv *b = &g->kv[below(g, (size_t)g->kvs)], old = *a;

    *a = *b;
    *b = old;
    if (below(g, 2)) {                    /* only the keys stay              */
        const struct bytes key = a->key;
        const uint64_t len = a->key_len;
        a->key = b->key, a->key_len = b->key_len;
        b->key = key, b->key_len = len;
    }
}

static void change_info(struct gguf *g)
{
    struct info *t = &g->info[below(g, (size_t)g->infos)];
    const struct info *other = &g->info[below(g, (size_t)g->infos)];
    const uint32_t d = below(g, t->n_dims < 4 ? t->n_dims : 4);
    const char *name;

    if (g->infos == 0)
        return;
    switch (below(g, 9)) {
    case 0:
        name = odd_name(g);
        set_bytes(&t->name, name, strlen(name));
        t->name_len = t->name.n;
        break;
    case 1: t->name_len = odd_number(g, t->name_len); break;
    case 2: t->n_dims = (uint32_t)odd_number(g, t->n_dims); break;
    case 3: t->type = below(g, 42); break;
    case 4: t->type = (uint32_t)odd_number(g, t->type); break;
    case 5: t->offset = odd_number(g, t->offset); break;
    case 6:
        t->offset = other->offset;
        break;
    case 7:
        memcpy(t->dims, other->dims, sizeof t->dims);
        t->n_dims = other->n_dims;
        break;
    default: t->dims[d] = odd_number(g, t->dims[d]);
    }
}

static void drop_info(struct gguf *g)
{
    const uint32_t i = below(g, (size_t)g->infos);

    if (g->infos == 0)
        return;
    free(g->info[i].name.p);
    memmove(&g->info[i], &g->info[i + 1],
            (size_t)(g->infos - (int)i - 1) * sizeof *g->info);
    g->infos--;
    g->n_infos--;
}

static void copy_info(struct gguf *g)
{
    const struct info from = g->info[below(g, (size_t)g->infos)];
    const char *name = odd_name(g);
    struct info *to;

    if (g->infos == 0 || g->infos == MAX_PARTS)
        return;
    to = &g->info[g->infos++];
    *to = from;
    to->name = (struct bytes){ 0 };
    bytes_put(&to->name, name, strlen(name));
    to->name_len = to->name.n;
    g->n_infos++;
    if (below(g, 2)) {                    /* a place of its own              */
        to->offset = (g->data.n + g->alignment - 1) / g->alignment *
                     g->alignment;
        while (g->data.n < to->offset + 256 && g->data.n < 1 << 16)
            bytes_int(&g->data, random_u32(&g->rng), 4);
    }
}

static void swap_infos(struct gguf *g)
{
    struct info *a = &g->info[below(g, (size_t)g->infos)];
    struct info *b = &g->info[below(g, (size_t)g->infos)], old = *a;

    *a = *b;
    *b = old;
    if (below(g, 2)) {                    /* only the names stay             */
        const struct bytes name = a->name;
        const uint64_t len = a->name_len;
        a->name = b->name, a->name_len = b->name_len;
        b->name = name, b->name_len = len;
    }
}

/* Weights: bytes, or numbers that are none. */
static void change_data(struct gguf *g)
{
    static const uint32_t f32[] = {
        0x7fc00000, 0x7f800000, 0xff800000, 0x7f7fffff, 0xff7fffff, 1, 0,
        0x7c007c00, 0xfbfffbff, 0xfc00fe00
    };

    for (uint32_t k = 1 + below(g, 4); k > 0 && g->data.n >= 4; k--)
        fuzz_put(g->data.p + below(g, g->data.n / 2 - 1) * 2,
                 below(g, 2) ? f32[below(g, COUNT(f32))]
                             : random_u32(&g->rng), 4);
}

/* -------------------------------------------------------------- the mutator */

size_t fuzz_mutate_gguf(uint8_t *data, size_t n, size_t max, unsigned seed)
{
    static void (*const change[])(struct gguf *) = {
        change_header, change_kv, change_kv, change_kv, change_kv, drop_kv,
        copy_kv, swap_kvs, change_info, change_info, change_info, change_info,
        drop_info, copy_info, swap_infos, change_data
    };
    struct gguf *g = seed % 16 ? take_apart(data, n, seed) : NULL;
    struct bytes b;

    if (!g)
        return LLVMFuzzerMutate(data, n, max);
    for (uint32_t k = 1 + below(g, 4); k > 0; k--)
        change[below(g, COUNT(change))](g);
    b = put_together(g);
    free_gguf(g);
    n = b.n < max ? b.n : max;
    memcpy(data, b.p, n);
    free(b.p);
    return n;
}
