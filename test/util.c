#include "util.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

uint32_t random_u32(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}

float random_float(uint64_t *state)
{
    return (float)((double)random_u32(state) / 2147483648.0 - 1.0);
}

/* ------------------------------------------------------------- GGUF writing */

void bytes_put(struct bytes *b, const void *p, size_t n)
{
    if (b->n + n > b->cap) {
        b->cap = 2 * (b->n + n) + 256;
        b->p = realloc(b->p, b->cap);
        if (!b->p)
            abort();
    }
    if (n > 0)
        memcpy(b->p + b->n, p, n);
    b->n += n;
}

void bytes_int(struct bytes *b, uint64_t value, int bytes)
{
    for (; bytes > 0; bytes--, value >>= 8)
        bytes_put(b, &(uint8_t){ (uint8_t)value }, 1);
}

void bytes_string(struct bytes *b, const char *s)
{
    bytes_int(b, strlen(s), 8);
    bytes_put(b, s, strlen(s));
}

static int scalar_size(int type)
{
    static const int size[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    return type < 13 ? size[type] : 4;
}

static const struct edit *find_edit(const struct gguf_writer *w, const char *name,
                                    enum edit_kind kind)
{
    for (const struct edit *e = w->edits; e && e->kind != NO_EDIT; e++)
        if (e->kind == kind && e->name && strcmp(e->name, name) == 0)
            return e;
    return NULL;
}

/* Write the key of a pair; the value as edited, or return 1 if it is to be
 * written as usual. */
static int begin_kv(struct gguf_writer *w, const char *key, int type)
{
    const struct edit *e;

    if (find_edit(w, key, DROP))
        return 0;
    w->n_kv++;
    e = find_edit(w, key, RENAME);
    bytes_string(&w->kv, e ? e->text : key);
    if ((e = find_edit(w, key, SET))) {
        bytes_int(&w->kv, e->a, 4);
        bytes_int(&w->kv, e->b, scalar_size((int)e->a));
    } else if ((e = find_edit(w, key, SET_STRING))) {
        bytes_int(&w->kv, T_STRING, 4);
        bytes_string(&w->kv, e->text);
    } else if ((e = find_edit(w, key, SET_ARRAY)) ||
               (e = find_edit(w, key, CLAIM))) {
        bytes_int(&w->kv, T_ARRAY, 4);
        bytes_int(&w->kv, e->a, 4);
        bytes_int(&w->kv, e->b, 8);
        for (uint64_t i = 0; e->kind == SET_ARRAY && i < e->b; i++)
            bytes_int(&w->kv, 0, e->a == T_STRING ? 8 : scalar_size((int)e->a));
    } else {
        bytes_int(&w->kv, (uint64_t)type, 4);
        return 1;
    }
    return 0;
}

void write_scalar(struct gguf_writer *w, const char *key, int type, uint64_t bits)
{
    for (int i = 0; i < (find_edit(w, key, TWICE) ? 2 : 1); i++)
        if (begin_kv(w, key, type))
            bytes_int(&w->kv, bits, scalar_size(type));
}

void write_f32(struct gguf_writer *w, const char *key, float value)
{
    uint32_t bits;

    memcpy(&bits, &value, 4);
    write_scalar(w, key, T_F32, bits);
}

void write_string(struct gguf_writer *w, const char *key, const char *value)
{
    if (begin_kv(w, key, T_STRING))
        bytes_string(&w->kv, value);
}

void write_ints(struct gguf_writer *w, const char *key, int type, const int *v,
                int n)
{
    if (!begin_kv(w, key, T_ARRAY))
        return;
    bytes_int(&w->kv, (uint64_t)type, 4);
    bytes_int(&w->kv, (uint64_t)n, 8);
    for (int i = 0; i < n; i++)
        bytes_int(&w->kv, (uint64_t)v[i], scalar_size(type));
}

void write_strings(struct gguf_writer *w, const char *key, const char *const *v,
                   int n)
{
    if (!begin_kv(w, key, T_ARRAY))
        return;
    bytes_int(&w->kv, T_STRING, 4);
    bytes_int(&w->kv, (uint64_t)n, 8);
    for (int i = 0; i < n; i++)
        bytes_string(&w->kv, v[i]);
}

static uint64_t edited_dim(const struct gguf_writer *w, const char *name,
                           int d, uint64_t otherwise)
{
    for (const struct edit *e = w->edits; e && e->kind != NO_EDIT; e++)
        if (e->kind == DIM && strcmp(e->name, name) == 0 &&
            e->a == (uint64_t)d)
            return e->b;
    return otherwise;
}

void gguf_write_tensor(struct gguf_writer *w, const char *name, int type, int n_dims,
                  const uint64_t *dims, const struct bytes *data)
{
    const struct edit *e;
    const size_t at = w->data.n;

    if (find_edit(w, name, DROP))
        return;
    for (int i = 0; i < (find_edit(w, name, TWICE) ? 2 : 1); i++) {
        w->n_tensors++;
        e = find_edit(w, name, RENAME);
        bytes_string(&w->info, e ? e->text : name);
        e = find_edit(w, name, N_DIMS);
        bytes_int(&w->info, e ? e->b : (uint64_t)n_dims, 4);
        for (int d = 0; d < n_dims; d++)
            bytes_int(&w->info, edited_dim(w, name, d, dims[d]), 8);
        e = find_edit(w, name, TYPE);
        bytes_int(&w->info, e ? e->b : (uint64_t)type, 4);
        e = find_edit(w, name, OFFSET);
        bytes_int(&w->info, e ? e->b : at, 8);
    }
    bytes_put(&w->data, data->p, data->n);
    if ((e = find_edit(w, name, FILL)))
        for (size_t i = at; i < w->data.n; i++)
            w->data.p[i] = (uint8_t)(e->b >> 8 * ((i - at) % 4));
    while (w->data.n % 32 != 0)
        bytes_int(&w->data, 0, 1);
}

struct bytes writer_finish(struct gguf_writer *w)
{
    struct bytes file = { 0 };
    const uint64_t dims[1] = { 32 };
    struct bytes zeros = { (uint8_t[128]){ 0 }, 128, 128 };

    for (const struct edit *e = w->edits; e && e->kind != NO_EDIT; e++) {
        if (e->kind == ADD)
            write_scalar(w, e->name, (int)e->a, e->b);
        if (e->kind == ADD_TENSOR)
            gguf_write_tensor(w, e->name, 0, 1, dims, &zeros);
    }
    bytes_put(&file, "GGUF", 4);
    bytes_int(&file, (uint64_t)(w->version ? w->version : 3), 4);
    bytes_int(&file, w->n_tensors, 8);
    bytes_int(&file, w->n_kv, 8);
    bytes_put(&file, w->kv.p, w->kv.n);
    bytes_put(&file, w->info.p, w->info.n);
    while (file.n % 32 != 0)
        bytes_int(&file, 0, 1);
    bytes_put(&file, w->data.p, w->data.n);
    for (const struct edit *e = w->edits; e && e->kind != NO_EDIT; e++)
        for (size_t i = 0; e->kind == PATCH && i < e->a; i++)
            file.p[e->at + i] = (uint8_t)(e->b >> 8 * i);
    free(w->kv.p);
    free(w->info.p);
    free(w->data.p);
    return file;
}

/* -------------------------------------------------------------- tiny models */

/* How large q times its inner scales is in a random block, and where the block
 * has its f16 scales: d, and what subtracts (a minimum of `min` times d). */
static const struct weight_type {
    int id;
    const char *name;
    int block, bytes;
    double unit;
    int d_at, min_at;
    double min;
} types[N_WEIGHT_TYPES] = {
    {  0, "F32",      1,   4,    1,   0, -1, 0 },
    {  1, "F16",      1,   2,    1,   0, -1, 0 },
    { 30, "BF16",     1,   2,    1,   0, -1, 0 },
    {  2, "Q4_0",    32,  18,  4.6,   0, -1, 0 },
    {  3, "Q4_1",    32,  20,  4.6,   0,  2, -7.5 },
    {  6, "Q5_0",    32,  22,  9.2,   0, -1, 0 },
    {  7, "Q5_1",    32,  24,  9.2,   0,  2, -15.5 },
    {  8, "Q8_0",    32,  34,   74,   0, -1, 0 },
    { 10, "Q2_K",   256,  84,   13,  80, 82, 1.5 },
    { 11, "Q3_K",   256, 110,   42, 108, -1, 0 },
    { 12, "Q4_K",   256, 144,  180,   0,  2, 7.5 },
    { 13, "Q5_K",   256, 176,  370,   0,  2, 15.5 },
    { 14, "Q6_K",   256, 210, 1360, 208, -1, 0 },
    { 20, "IQ4_NL",  32,  18,   70,   0, -1, 0 },
    { 23, "IQ4_XS", 256, 136, 1290,   0, -1, 0 },
};

const int weight_types[N_WEIGHT_TYPES] = {
    0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23
};

static const struct weight_type *find_type(int id)
{
    for (int i = 0; i < N_WEIGHT_TYPES; i++)
        if (types[i].id == id)
            return &types[i];
    abort();
}

const char *weight_type_name(int type)
{
    return find_type(type)->name;
}

int weight_type_block(int type)
{
    return find_type(type)->block;
}

/* binary16, cut off; good enough to make a scale with. */
static uint16_t to_f16(double x)
{
    int e;
    double m = frexp(fabs(x), &e);        /* x = m 2^e, m in 0.5 .. 1        */
    unsigned bits = e > -14 ? (unsigned)(e + 14) << 10 |
                                  ((unsigned)(m * 2048) & 1023)
                            : (unsigned)ldexp(m, e + 24);
    return (uint16_t)(x == 0 ? 0 : bits | (x < 0 ? 0x8000 : 0));
}

static void store16(uint8_t *p, unsigned v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

static void random_block(uint8_t *p, const struct weight_type *t, int cols,
                         uint64_t *rng)
{
    const float x = random_float(rng);
    const double d = (x < 0 ? -0.5 + x / 2 : 0.5 + x / 2) /
                     (sqrt(cols) * t->unit);
    uint32_t bits;
    float f = (float)(1.7 * x / sqrt(cols));

    memcpy(&bits, &f, 4);
    if (t->id == 0) {
        store16(p, bits & 0xffff);
        store16(p + 2, bits >> 16);
    } else if (t->id == 1) {
        store16(p, to_f16(f));
    } else if (t->id == 30) {
        store16(p, bits >> 16);
    } else {
        for (int i = 0; i < t->bytes; i++)
            p[i] = (uint8_t)random_u32(rng);
        store16(p + t->d_at, to_f16(d));
        if (t->min_at >= 0)
            store16(p + t->min_at, to_f16(d * t->min));
    }
}

struct bytes random_weights(int type, int cols, uint64_t rows, uint64_t *rng)
{
    const struct weight_type *t = find_type(type);
    const size_t n = (size_t)cols / (size_t)t->block * rows;
    struct bytes b = { 0 };

    b.n = b.cap = n * (size_t)t->bytes;
    b.p = malloc(b.n);
    if (!b.p)
        abort();
    for (size_t i = 0; i < n; i++)
        random_block(b.p + i * (size_t)t->bytes, t, cols, rng);
    return b;
}

enum { N_LAYER = 4, N_VOCAB = 264, N_EXPERT = 6, N_USED = 2, N_KV = 2 };

static void matrix(struct gguf_writer *w, const char *name, int type, int cols,
                   int rows, int depth, uint64_t *rng)
{
    uint64_t dims[3] = { (uint64_t)cols, (uint64_t)rows, (uint64_t)depth };
    struct bytes b = random_weights(type, cols, dims[1] * dims[2], rng);

    gguf_write_tensor(w, name, type, depth > 1 ? 3 : 2, dims, &b);
    free(b.p);
}

/* F32, values around `middle`. */
static void vector(struct gguf_writer *w, const char *name, int n, float middle,
                   float spread, uint64_t *rng)
{
    uint64_t dims[1] = { (uint64_t)n };
    struct bytes b = { 0 };

    for (int i = 0; i < n; i++) {
        float f = middle + spread * random_float(rng);
        uint32_t bits;
        memcpy(&bits, &f, 4);
        bytes_int(&b, bits, 4);
    }
    gguf_write_tensor(w, name, 0, 1, dims, &b);
    free(b.p);
}

static const char *layer_name(int il, const char *what)
{
    static char name[64];
    snprintf(name, sizeof name, "blk.%d.%s", il, what);
    return name;
}

static void write_operator(struct gguf_writer *w, const struct tiny *t, int il,
                           int n, uint64_t *rng)
{
    const int hd = n / 4, q = n, kv = N_KV * hd;
    uint64_t taps[2] = { t->l_cache ? (uint64_t)t->l_cache : 3, (uint64_t)n };
    struct bytes b;

    if (il % 2 == 0 || t->kv_form == KV_NONE) {
        matrix(w, layer_name(il, "shortconv.in_proj.weight"), t->type, n,
               3 * n, 1, rng);
        b = random_weights(0, (int)taps[0], (uint64_t)n, rng);
        gguf_write_tensor(w, layer_name(il, "shortconv.conv.weight"), 0, 2, taps,
                     &b);
        free(b.p);
        matrix(w, layer_name(il, "shortconv.out_proj.weight"), t->type, n, n,
               1, rng);
        return;
    }
    if (t->fused_qkv)
        matrix(w, layer_name(il, "attn_qkv.weight"), t->type, n, q + 2 * kv, 1,
               rng);
    else {
        matrix(w, layer_name(il, "attn_q.weight"), t->type, n, q, 1, rng);
        matrix(w, layer_name(il, "attn_k.weight"), t->type, n, kv, 1, rng);
        matrix(w, layer_name(il, "attn_v.weight"), t->type, n, kv, 1, rng);
    }
    matrix(w, layer_name(il, "attn_output.weight"), t->type, q, n, 1, rng);
    vector(w, layer_name(il, "attn_q_norm.weight"), hd, 2.0f, 0.5f, rng);
    vector(w, layer_name(il, "attn_k_norm.weight"), hd, 2.0f, 0.5f, rng);
}

static void write_ffn(struct gguf_writer *w, const struct tiny *t, int il, int n,
                      uint64_t *rng)
{
    const int ff = 2 * n, ff_exp = n;

    if (!t->moe || il == 0) {
        matrix(w, layer_name(il, "ffn_gate.weight"), t->type, n, ff, 1, rng);
        matrix(w, layer_name(il, "ffn_up.weight"), t->type, n, ff, 1, rng);
        matrix(w, layer_name(il, "ffn_down.weight"), t->type, ff, n, 1, rng);
        return;
    }
    matrix(w, layer_name(il, "ffn_gate_inp.weight"), 0, n, N_EXPERT, 1, rng);
    vector(w, layer_name(il, "exp_probs_b.bias"), N_EXPERT, 0, 0.2f, rng);
    matrix(w, layer_name(il, "ffn_gate_exps.weight"), t->type, n, ff_exp,
           N_EXPERT, rng);
    matrix(w, layer_name(il, "ffn_up_exps.weight"), t->type, n, ff_exp,
           N_EXPERT, rng);
    matrix(w, layer_name(il, "ffn_down_exps.weight"), t->type, ff_exp, n,
           N_EXPERT, rng);
}

/* The 256 bytes in GGUF's alphabet, then eight tokens with markers among them;
 * two merges lead to "he" and "hel". */
static void write_words(struct gguf_writer *w)
{
    static char byte[256][4];
    const char *token[N_VOCAB];
    int type[N_VOCAB], other = 256;
    static const char *const last[8] = {
        "<|startoftext|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
        "he", "hel", "python", "[PAD0]"
    };
    static const int last_type[8] = { 3, 3, 3, 3, 1, 1, 4, 5 };
    static const char *const merge[2] = { "h e", "he l" };

    for (int b = 0; b < 256; b++) {
        int c = (b > 32 && b < 127) || (b > 160 && b != 173) ? b : other++;
        if (c < 128)
            snprintf(byte[b], 4, "%c", c);
        else
            snprintf(byte[b], 4, "%c%c", 0xc0 | c >> 6, 0x80 | (c & 63));
        token[b] = byte[b];
        type[b] = 1;
    }
    for (int i = 0; i < 8; i++) {
        token[256 + i] = last[i];
        type[256 + i] = last_type[i];
    }
    write_string(w, "tokenizer.ggml.model", "gpt2");
    write_string(w, "tokenizer.ggml.pre", "lfm2");
    write_strings(w, "tokenizer.ggml.tokens", token, N_VOCAB);
    write_ints(w, "tokenizer.ggml.token_type", T_I32, type, N_VOCAB);
    write_strings(w, "tokenizer.ggml.merges", merge, 2);
    write_scalar(w, "tokenizer.ggml.bos_token_id", T_U32, 256);
    write_scalar(w, "tokenizer.ggml.eos_token_id", T_U32, 258);
}

static const char *arch_key(const struct tiny *t, const char *name)
{
    static char key[80];
    snprintf(key, sizeof key, "%s.%s", t->moe ? "lfm2moe" : "lfm2", name);
    return key;
}

static void write_metadata(struct gguf_writer *w, const struct tiny *t, int n)
{
    const int heads = t->kv_form == KV_NONE ? 0 : N_KV;
    const int kv[N_LAYER] = { 0, heads, 0, heads };
    const int l_cache = t->l_cache ? t->l_cache : 3;
    const struct { const char *name; int dense, moe; } count[] = {
        { "block_count", N_LAYER, N_LAYER }, { "context_length", 4096, 4096 },
        { "attention.head_count", 4, 4 }, { "shortconv.l_cache", l_cache, l_cache },
        { "vocab_size", N_VOCAB, N_VOCAB }, { "expert_count", 0, N_EXPERT },
        { "expert_used_count", 0, N_USED }, { "expert_gating_func", 0, 2 },
        { "leading_dense_block_count", 0, 1 }
    };

    write_string(w, "general.architecture", t->moe ? "lfm2moe" : "lfm2");
    write_string(w, "general.name", "tiny");
    write_scalar(w, "general.alignment", T_U32, 32);
    for (size_t i = 0; i < sizeof count / sizeof *count; i++)
        if (t->moe || count[i].dense)
            write_scalar(w, arch_key(t, count[i].name), T_U32,
                         (uint64_t)(t->moe ? count[i].moe : count[i].dense));
    write_scalar(w, arch_key(t, "embedding_length"), T_U32, (uint64_t)n);
    write_scalar(w, arch_key(t, "feed_forward_length"), T_U32,
                 (uint64_t)(2 * n));
    if (t->moe)
        write_scalar(w, arch_key(t, "expert_feed_forward_length"), T_U32,
                     (uint64_t)n);
    if (t->kv_form == KV_SCALAR)
        write_scalar(w, arch_key(t, "attention.head_count_kv"), T_U32, N_KV);
    else
        write_ints(w, arch_key(t, "attention.head_count_kv"),
                   t->kv_form == KV_U32_ARRAY ? T_U32 : T_I32, kv, N_LAYER);
    write_f32(w, arch_key(t, "attention.layer_norm_rms_epsilon"), 1e-5f);
    write_f32(w, arch_key(t, "rope.freq_base"), 1e6f);
}

struct bytes tiny_model(const struct tiny *t)
{
    const int n = t->n_embd ? t->n_embd
                            : weight_type_block(t->type) == 256 ? 256 : 64;
    struct gguf_writer w = { .version = t->version, .edits = t->edits };
    uint64_t rng = t->seed + 1;

    write_metadata(&w, t, n);
    if (t->words)
        write_words(&w);
    matrix(&w, "token_embd.weight", t->type, n, N_VOCAB, 1, &rng);
    for (int il = 0; il < N_LAYER; il++) {
        vector(&w, layer_name(il, "attn_norm.weight"), n, 1.0f, 0.3f, &rng);
        vector(&w, layer_name(il, "ffn_norm.weight"), n, 1.0f, 0.3f, &rng);
        write_operator(&w, t, il, n, &rng);
        write_ffn(&w, t, il, n, &rng);
    }
    vector(&w, t->output_norm ? "output_norm.weight" : "token_embd_norm.weight",
           n, 4.0f, 1.0f, &rng);
    if (t->untied)
        matrix(&w, "output.weight", t->type, n, N_VOCAB, 1, &rng);
    return writer_finish(&w);
}

/* -------------------------------------------------------------- other files */

struct bytes load_file(const char *path)
{
    struct bytes b = { 0 };
    uint8_t block[65536];
    size_t n;
    FILE *f = fopen(path, "rb");

    if (!f)
        return b;
    while ((n = fread(block, 1, sizeof block, f)) > 0)
        bytes_put(&b, block, n);
    fclose(f);
    return b;
}

const char *shared_file(const char *name)
{
    static char path[512];
    const char *dir = getenv("LFM2_SHARED");
    FILE *f;

    snprintf(path, sizeof path, "%s/%s", dir ? dir : "../shared", name);
    f = fopen(path, "rb");
    if (!f) {
        printf("skipped: %s, which does not come with the source\n", name);
        return NULL;
    }
    fclose(f);
    return path;
}
