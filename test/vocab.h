/* A small vocabulary, written in memory, with one thing or another unusual
 * about it.  For suites that include lfm2.c and check.h before. */
#ifndef VOCAB_H
#define VOCAB_H

enum { IM_START = 256, IM_END, END_OF_TEXT, START_OF_TEXT, N_BASE = 274 };

/* After the 256 single bytes. */
static const struct { const char *text; int type; } more_tokens[] = {
    { "<|im_start|>", TOKEN_CONTROL }, { "<|im_end|>", TOKEN_CONTROL },
    { "<|endoftext|>", TOKEN_CONTROL }, { "<|startoftext|>", TOKEN_CONTROL },
    { "[PAD1]", TOKEN_UNUSED }, { "<unk>", TOKEN_UNKNOWN },
    { "python", TOKEN_USER_DEFINED }, { "<a>", TOKEN_USER_DEFINED },
    { "<a><b>", TOKEN_USER_DEFINED },
    { "ab", 1 }, { "bc", 1 }, { "aa", 1 }, { "aaaa", 1 }, { "xy", 1 },
    { "xyz", 1 }, { "aab", 1 }, { "qrs", 1 },
    { "\xc4\xa0w", 1 },                                     /* that is " w" */
};

static const char *const base_merges[] = {
    "a b", "b c", "a a", "aa aa", "x y", "xy z", "b c", "a b", "\xc4\xa0 w"
};

/* What is unusual about a vocabulary; all zero is a good one. */
struct change {
    const char *model, *pre, *arch;       /* other strings                   */
    const char *drop;                     /* leave out this key              */
    const char *scalar, *floats;          /* make this key a u32, f32 array  */
    const char *token;                    /* one more token ...              */
    int type;                             /* ... and its type                */
    const char *merge;                    /* one more merge                  */
    int no_byte;                          /* no token for this byte - 1      */
    int no_markers;                       /* the control tokens are not      */
    int user_markers;                     /* they are user-defined           */
    int n_types;                          /* so many more types              */
    int n_tokens;                         /* so many empty tokens instead;   */
                                          /* -1: none at all                 */
    int n_crowd;                          /* and so many whose hashes        */
                                          /* collide                         */
    int n_pairs;                          /* and so many whose merges do     */
    int n_deep;                           /* and runs of a, each made of two */
                                          /* of half its length              */
    int u32_types, no_add_bos;
    uint32_t bos, eos;                    /* not 259 and 257                 */
};

static void put_int(struct writer *w, uint64_t v, int bytes)
{
    for (; bytes > 0; bytes--, v >>= 8)
        put(w, &(uint8_t){ (uint8_t)v }, 1);
}

/* Bytes as text in the byte alphabet: how long it is, or with w the text. */
static uint64_t put_mapped(struct writer *w, const uint8_t *s, int n)
{
    struct writer none = { NULL, 0, 0 };
    const size_t before = (w = w ? w : &none)->n;

    for (int i = 0; i < n; i++) {
        const uint8_t b = s[i];
        const uint32_t c = b <= 32 ? 256u + b :
                           b >= 127 && b <= 160 ? 256u + 33 + b - 127 :
                           b == 173 ? 256u + 67 : b;
        if (c >= 0x80)
            put_int(w, 0xc0 | c >> 6, 1);
        put_int(w, c >= 0x80 ? 0x80 | (c & 0x3f) : c, 1);
    }
    return w->n - before;
}

static void put_str(struct writer *w, const char *s)
{
    put_int(w, strlen(s), 8);
    put(w, s, strlen(s));
}

/* Begins a key; 0 if its value is not wanted any more. */
static int put_key(struct writer *w, const struct change *x, const char *key)
{
    if (x->drop && strcmp(x->drop, key) == 0)
        return 0;
    put_str(w, key);
    if (x->scalar && strcmp(x->scalar, key) == 0) {
        put_int(w, GGUF_U32, 4);
        put_int(w, 7, 4);
        return 0;
    }
    if (x->floats && strcmp(x->floats, key) == 0) {
        put_int(w, GGUF_ARRAY, 4);
        put_int(w, GGUF_F32, 4);
        put_int(w, 1, 8);
        put_int(w, 0, 4);
        return 0;
    }
    return 1;
}

static void put_array(struct writer *w, uint32_t elem, uint64_t n)
{
    put_int(w, GGUF_ARRAY, 4);
    put_int(w, elem, 4);
    put_int(w, n, 8);
}

static void put_string_key(struct writer *w, const struct change *x,
                           const char *key, const char *value)
{
    if (put_key(w, x, key)) {
        put_int(w, GGUF_STRING, 4);
        put_str(w, value);
    }
}

static void put_u32_key(struct writer *w, const struct change *x,
                        const char *key, uint32_t value)
{
    if (put_key(w, x, key)) {
        put_int(w, GGUF_U32, 4);
        put_int(w, value, 4);
    }
}

/* Tokens that belong at the first of 8192 slots. */
static void put_crowd(struct writer *w, int n)
{
    char name[9];

    for (unsigned k = 0; n > 0; k++) {
        snprintf(name, sizeof name, "%x", k);
        const uint64_t hash = hash_bytes(HASH_START, (uint8_t *)name,
                                         strlen(name));
        if (((hash ^ hash >> 32) & 8191) == 0) {
            put_str(w, name);
            n--;
        }
    }
}

/* Pairs of bytes that belong at the first of 512 slots, as tokens or as
 * merges. */
static void put_pairs(struct writer *w, int n, int merges)
{
    for (uint64_t k = 0; n > 0; k++) {
        const uint64_t hash = (k >> 8 << 32 | (k & 255)) * 0x9e3779b97f4a7c15u;
        const uint8_t pair[2] = { (uint8_t)(k >> 8), (uint8_t)k };
        ck_assert(k < 65536);
        if (((hash ^ hash >> 32) & 511) != 0)
            continue;
        put_int(w, put_mapped(NULL, pair, 2) + (uint64_t)merges, 8);
        put_mapped(w, pair, 1);
        put(w, " ", (size_t)merges);
        put_mapped(w, pair + 1, 1);
        n--;
    }
}

/* From 8 letters on; base_merges lead to 4. */
static void put_run(struct writer *w, int n)
{
    for (int i = 0; i < n; i++)
        put(w, "a", 1);
}

static void put_tokens(struct writer *w, const struct change *x)
{
    put_array(w, GGUF_STRING, x->n_tokens < 0 ? 0 : x->n_tokens > 0
                              ? (uint64_t)x->n_tokens
                              : N_BASE + (uint64_t)!!x->token +
                                (uint64_t)(x->n_crowd + x->n_pairs +
                                           x->n_deep));
    for (int i = 0; i < x->n_tokens; i++)
        put_str(w, "");
    for (int b = 0; b < 256 && !x->n_tokens; b++) {
        const uint8_t byte = (uint8_t)b;
        if (b == x->no_byte - 1) {
            put_str(w, "nothing");
            continue;
        }
        put_int(w, put_mapped(NULL, &byte, 1), 8);
        put_mapped(w, &byte, 1);
    }
    for (size_t i = 0; i < COUNT(more_tokens) && !x->n_tokens; i++)
        put_str(w, i < 4 && x->no_markers ? "marker" : more_tokens[i].text);
    if (x->token)
        put_str(w, x->token);
    put_crowd(w, x->n_crowd);
    put_pairs(w, x->n_pairs, 0);
    for (int i = 0; i < x->n_deep; i++) {
        put_int(w, (uint64_t)8 << i, 8);
        put_run(w, 8 << i);
    }
}

static void put_merges(struct writer *w, const struct change *x)
{
    put_array(w, GGUF_STRING, COUNT(base_merges) + !!x->merge +
                              (uint64_t)(x->n_pairs + x->n_deep));
    for (size_t i = 0; i < COUNT(base_merges); i++)
        put_str(w, base_merges[i]);
    if (x->merge)
        put_str(w, x->merge);
    put_pairs(w, x->n_pairs, 1);
    for (int i = 0; i < x->n_deep; i++) {
        put_int(w, ((uint64_t)8 << i) + 1, 8);
        put_run(w, 4 << i);
        put(w, " ", 1);
        put_run(w, 4 << i);
    }
}

static void put_types(struct writer *w, const struct change *x)
{
    put_array(w, x->u32_types ? GGUF_U32 : GGUF_I32,
              N_BASE + (uint64_t)!!x->token + (uint64_t)x->n_types);
    for (int i = 0; i < 256; i++)
        put_int(w, TOKEN_NORMAL, 4);
    for (size_t i = 0; i < COUNT(more_tokens); i++)
        put_int(w, x->user_markers && more_tokens[i].type == TOKEN_CONTROL
                   ? TOKEN_USER_DEFINED : (uint32_t)more_tokens[i].type, 4);
    for (int i = 0; i < !!x->token + x->n_types; i++)
        put_int(w, (uint32_t)x->type, 4);
}

/* A GGUF without tensors; returns its bytes, and their number in *n. */
static uint8_t *make_gguf(const struct change *x, size_t *n)
{
    struct writer w = { malloc(12 << 20), 12 << 20, 0 };

    ck_assert_ptr_nonnull(w.out);
    put(&w, "GGUF\3\0\0\0\0\0\0\0\0\0\0\0", 16);
    put_int(&w, 9 - !!x->drop, 8);
    put_string_key(&w, x, "general.architecture", x->arch ? x->arch : "lfm2");
    put_string_key(&w, x, "tokenizer.ggml.model", x->model ? x->model : "gpt2");
    put_string_key(&w, x, "tokenizer.ggml.pre", x->pre ? x->pre : "lfm2");
    if (put_key(&w, x, "tokenizer.ggml.tokens"))
        put_tokens(&w, x);
    if (put_key(&w, x, "tokenizer.ggml.token_type"))
        put_types(&w, x);
    if (put_key(&w, x, "tokenizer.ggml.merges"))
        put_merges(&w, x);
    put_u32_key(&w, x, "tokenizer.ggml.bos_token_id", x->bos ? x->bos : 259);
    put_u32_key(&w, x, "tokenizer.ggml.eos_token_id", x->eos ? x->eos : 257);
    if (put_key(&w, x, "tokenizer.ggml.add_bos_token")) {
        put_int(&w, GGUF_BOOL, 4);
        put_int(&w, !x->no_add_bos, 1);
    }
    *n = w.n;
    return w.out;
}

static inline lfm2_tokenizer *open_words(const struct change *x)
{
    lfm2_tokenizer *t;
    lfm2_error err = { 0 };
    size_t n;
    uint8_t *data = make_gguf(x, &n);

    ck_assert_msg(lfm2_tokenizer_open_memory(&t, data, n, &err) == LFM2_OK,
                  "%s", err.msg);
    free(data);
    return t;
}

static const struct change good;

/* The tokens of a text, written out with a slash between them. */
static inline const char *spell(const lfm2_tokenizer *t, const int32_t *ids,
                                int n)
{
    static char out[4096];
    size_t at = 0;

    for (int i = 0; i < n; i++) {
        int len;
        const char *bytes = lfm2_token_bytes(t, ids[i], 1, &len);
        ck_assert(at + (size_t)len + 2 < sizeof out);
        if (i > 0)
            out[at++] = '/';
        memcpy(out + at, bytes, (size_t)len);
        at += (size_t)len;
    }
    out[at] = 0;
    return out;
}

static inline const char *split(const lfm2_tokenizer *t, const char *text,
                                int flags)
{
    int32_t ids[1024];
    const int n = lfm2_encode(t, text, strlen(text), flags, ids, COUNT(ids));

    ck_assert(n >= 0 && n <= (int)COUNT(ids));
    return spell(t, ids, n);
}

/* Encode and decode; the bytes must come back. */
static inline void round_trip(const lfm2_tokenizer *t, const char *text,
                              size_t len)
{
    int32_t *ids = malloc((len + 1) * sizeof *ids);
    const int n = lfm2_encode(t, text, len, 0, ids, (int)len + 1);
    size_t at = 0;

    ck_assert(n >= 0 && (size_t)n <= len);
    for (int i = 0; i < n; i++) {
        int k;
        const char *bytes = lfm2_token_bytes(t, ids[i], 0, &k);
        if ((size_t)k > len - at || memcmp(text + at, bytes, (size_t)k) != 0)
            ck_abort_msg("other bytes at %zu of %zu", at, len);
        at += (size_t)k;
    }
    ck_assert_uint_eq(at, len);
    free(ids);
}

#endif
