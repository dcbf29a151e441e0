/* Targets in lfm2.c: files, vocabularies, text and saved sequences. */
#include "../lfm2.h"

#include "fuzz.h"
#include "util.h"

#include <stdlib.h>
#include <string.h>

/* An error has a code and a sentence; a success leaves something behind. */
static int is_open(int code, const void *p, const lfm2_error *err)
{
    REQUIRE((p != NULL) == (code == LFM2_OK));
    REQUIRE(code == LFM2_OK || (code < 0 && err->code == code && err->msg[0]));
    return code == LFM2_OK;
}

/* --------------------------------------------------------------- vocabularies
 *
 * What any tokenizer owes: no more tokens than bytes, the same with less room,
 * and its tokens are the text again. */

enum { MAX_IDS = 4096 };

static void check_text(const lfm2_tokenizer *t, const char *text, size_t len,
                       int flags)
{
    static int32_t id[MAX_IDS + 1], some[8];
    const int n = lfm2_encode(t, text, len, flags, id, MAX_IDS + 1);
    size_t at = 0;

    REQUIRE(len <= MAX_IDS && n >= 0 && (size_t)n <= len);
    REQUIRE(lfm2_encode(t, text, len, flags, some, 8) == n);
    REQUIRE(memcmp(id, some, sizeof *id * (size_t)(n < 8 ? n : 8)) == 0);
    for (int i = 0; i < n; i++) {
        int size;
        const char *s = lfm2_token_bytes(t, id[i], flags != 0, &size);
        REQUIRE(id[i] >= 0 && id[i] < lfm2_n_vocab(t));
        REQUIRE(size > 0 && (size_t)size <= len - at);
        REQUIRE(memcmp(text + at, s, (size_t)size) == 0);
        at += (size_t)size;
    }
    REQUIRE(at == len);
}

/* Written out and read again it is the same tokenizer. */
static void check_export(const lfm2_tokenizer *t, const uint8_t *data,
                         size_t size)
{
    const size_t n = lfm2_tokenizer_export(data, size, NULL, 0, NULL);
    uint8_t *bin = malloc(n), *again = malloc(n);
    lfm2_tokenizer *u;

    REQUIRE(n > 0 && bin && again);
    REQUIRE(lfm2_tokenizer_export(data, size, bin, n, NULL) == n);
    REQUIRE(lfm2_tokenizer_open_memory(&u, bin, n, NULL) == LFM2_OK);
    REQUIRE(lfm2_tokenizer_export(bin, n, again, n, NULL) == n);
    REQUIRE(memcmp(bin, again, n) == 0);
    REQUIRE(lfm2_n_vocab(t) == lfm2_n_vocab(u) && lfm2_bos(t) == lfm2_bos(u));
    for (int32_t id = 0; id < lfm2_n_vocab(t); id++) {
        int len, len_u;
        const char *s = lfm2_token_bytes(t, id, 0, &len);
        const char *s_u = lfm2_token_bytes(u, id, 0, &len_u);
        REQUIRE(len == len_u && memcmp(s, s_u, (size_t)len) == 0);
    }
    lfm2_tokenizer_close(u);
    free(bin);
    free(again);
}

static void check_words(const uint8_t *data, size_t n)
{
    static const char text[] = "hello hello, <|im_start|>python's 1234\n\n  "
                               "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xff\xfe";
    const size_t tail = n < 300 ? n : 300;
    lfm2_tokenizer *t;
    lfm2_error err = { 0 };
    const int code = lfm2_tokenizer_open_memory(&t, data, n, &err);

    if (!is_open(code, t, &err))
        return;
    for (int flags = 0; flags <= LFM2_ENCODE_SPECIAL;
         flags += LFM2_ENCODE_SPECIAL) {
        check_text(t, text, sizeof text - 1, flags);
        check_text(t, (const char *)data + n - tail, tail, flags);
    }
    for (int32_t id = -1; id <= lfm2_n_vocab(t); id++) {
        int size;
        const char *s = lfm2_token_bytes(t, id, 1, &size);
        REQUIRE(s && size >= 0 && (size == 0 || (size_t)size <= n));
        lfm2_is_eog(t, id);
    }
    REQUIRE(lfm2_bos(t) >= -1 && lfm2_bos(t) < lfm2_n_vocab(t));
    check_export(t, data, n);
    lfm2_tokenizer_close(t);
}

void fuzz_vocab(const uint8_t *data, size_t n)
{
    check_words(data, n);
}

/* ------------------------------------------------------------------- models */

static void check_state(lfm2_context *ctx)
{
    const uint64_t n = lfm2_seq_state_size(ctx, 0);
    const int len = lfm2_seq_len(ctx, 0);
    uint8_t *state = malloc(n);

    REQUIRE(state && lfm2_seq_save(ctx, 0, state, n, NULL) == LFM2_OK);
    REQUIRE(lfm2_seq_trim(ctx, 0, 0) == 0);
    REQUIRE(lfm2_seq_load(ctx, 0, state, n, NULL) == LFM2_OK);
    REQUIRE(lfm2_seq_len(ctx, 0) == len);
    free(state);
}

/* The logits after a few tokens, from the first row to the last, with the
 * kernels of one instruction set; NULL if there is no memory or no such set. */
static float *run_model(const lfm2_model *m, int isa)
{
    const lfm2_params p = { .n_ctx = 6, .n_seq = 1, .n_batch = 3,
                            .n_logits = 1, .n_threads = 1, .isa = isa };
    const int n_vocab = lfm2_model_config(m)->n_vocab;
    const size_t size = (size_t)n_vocab * sizeof(float);
    const int32_t tokens[4] = { 0, n_vocab - 1, n_vocab / 2, 0 };
    const lfm2_span span = { 0, tokens, 4, 1 };
    lfm2_sampler s = { .temperature = 1, .top_k = 5, .top_p = 0.9f,
                       .repeat_penalty = 1.1f, .repeat_last_n = 4 };
    lfm2_context *ctx;
    lfm2_error err = { 0 };
    float *logits;
    int code = LFM2_ENOMEM;

    if (lfm2_isa_available(isa) && lfm2_context_size(m, &p) <= 1 << 26)
        code = lfm2_context_open(&ctx, m, &p, &err);
    if (code == LFM2_ENOMEM || !is_open(code, ctx, &err))
        return NULL;
    REQUIRE(lfm2_forward(ctx, &span, 1, &err) == LFM2_OK);
    logits = (float *)(void *)fuzz_copy((void *)lfm2_logits(ctx, 0, 0), size);
    const int32_t id = lfm2_sample(ctx, &s, lfm2_logits(ctx, 0, 0), tokens, 4);
    REQUIRE((id >= 0 && id < n_vocab) || id == LFM2_ENAN);
    check_state(ctx);
    lfm2_context_close(ctx);
    return logits;
}

/* All of them have the same bits, be it of nonsense; but one NaN is as good as
 * another. */
static void compare_kernels(const lfm2_model *m)
{
    const size_t n = (size_t)lfm2_model_config(m)->n_vocab;
    float *want = run_model(m, LFM2_ISA_SCALAR);

    for (int isa = LFM2_ISA_AVX2; want && isa <= LFM2_ISA_AVX512VNNI; isa++) {
        float *got = run_model(m, isa);
        for (size_t i = 0; got && i < n; i++)
            REQUIRE(memcmp(&got[i], &want[i], sizeof *got) == 0 ||
                    (got[i] != got[i] && want[i] != want[i]));
        free(got);
    }
    free(want);
}

/* What can be asked of a model. */
static void look_around(const lfm2_model *m)
{
    uint64_t total, active;
    lfm2_tensor_info t;
    char value[64];
    size_t n;

    for (size_t cap = 1; cap <= sizeof value; cap += 21)
        for (int i = 0; lfm2_model_key(m, i, value, cap); i++)
            REQUIRE(memchr(value, 0, cap));
    for (int i = 0; lfm2_model_tensor(m, i, &t) == LFM2_OK; i++) {
        volatile uint8_t ends = t.data[0];
        ends = t.data[t.n_bytes - 1];
        (void)ends;
    }
    for (int i = 0; lfm2_model_warning(m, i); i++)
        REQUIRE(lfm2_model_warning(m, i)[0]);
    if (lfm2_model_string(m, "general.name", &n))
        REQUIRE(n < SIZE_MAX / 2);
    lfm2_model_params(m, &total, &active);
    REQUIRE(active <= total);
    lfm2_model_hash(m);
}

void fuzz_gguf(const uint8_t *data, size_t n)
{
    lfm2_model *m;
    lfm2_error err = { 0 };
    const int code = lfm2_model_open_memory(&m, data, n, &err);

    if (is_open(code, m, &err)) {
        look_around(m);
        compare_kernels(m);
        lfm2_model_close(m);
    }
    check_words(data, n);
}

/* ---------------------------------------------------------------------- text
 *
 * Any text with the vocabulary that comes with the source. */

static void check_chat(const lfm2_tokenizer *t, const char *text, size_t len)
{
    static int32_t id[MAX_IDS + 64];
    char *role = malloc(len + 1), *content = malloc(len + 1);
    const size_t cut = len ? (unsigned char)text[0] % len : 0;
    const lfm2_message msgs[2] = { { role, content }, { content, role } };
    int n, marks = 0;

    REQUIRE(role && content);
    memcpy(role, text, cut);
    role[cut] = '\0';
    memcpy(content, text + cut, len - cut);
    content[len - cut] = '\0';
    n = lfm2_chat(t, msgs, 2, 1, id, MAX_IDS + 64);
    REQUIRE(n > 0 && (size_t)n <= 2 * len + 20);
    for (int i = 0; i < n && i < MAX_IDS + 64; i++) {
        int size;
        lfm2_token_bytes(t, id[i], 0, &size);
        marks += size == 0;
    }
    REQUIRE(n > MAX_IDS + 64 || marks == 6);
    free(role);
    free(content);
}

/* In whatever pieces text comes, the same comes out of it, and only what can
 * become no character is held back by nothing. */
static void check_stream(const char *text, size_t len)
{
    char *out = malloc(len + 8);
    lfm2_utf8 u = { { 0 }, 0 };
    size_t at = 0, n = 0;

    REQUIRE(out);
    for (size_t each; at < len; at += each) {
        each = 1 + (unsigned char)text[at] % 5;
        each = each < len - at ? each : len - at;
        n += lfm2_utf8_push(&u, text + at, each, out + n);
        REQUIRE(u.n_held >= 0 && u.n_held <= 3 &&
                n + (size_t)u.n_held == at + each);
    }
    n += lfm2_utf8_push(&u, "", 0, out + n);
    REQUIRE(n == len && memcmp(out, text, n) == 0);
    free(out);
}

void fuzz_text(const uint8_t *data, size_t n)
{
    static lfm2_tokenizer *t;
    const char *text = (const char *)data;

    if (!t)
        REQUIRE(lfm2_tokenizer_open(&t, "tokenizer.bin", NULL) == LFM2_OK);
    n = n < MAX_IDS ? n : MAX_IDS;
    check_text(t, text, n, 0);
    check_text(t, text, n, LFM2_ENCODE_SPECIAL);
    check_chat(t, text, n);
    check_stream(text, n);
}

/* ----------------------------------------------------------- saved sequences
 *
 * First as they are.  A checksum stops nearly all of them; so then with a right
 * one, as a hostile file would have, for the same model and of the length that
 * fits. */

static struct { lfm2_model *model; lfm2_context *ctx; uint8_t *file; } small;

static void close_small(void)
{
    lfm2_context_close(small.ctx);
    lfm2_model_close(small.model);
    free(small.file);
}

static void open_small(void)
{
    const struct tiny t = { .n_embd = 32 };
    const lfm2_params p = { .n_ctx = 160, .n_seq = 2, .n_batch = 8,
                            .n_logits = 1, .n_threads = 1 };
    struct bytes file = tiny_model(&t);

    REQUIRE(lfm2_model_open_memory(&small.model, file.p, file.n, NULL) ==
            LFM2_OK);
    REQUIRE(lfm2_context_open(&small.ctx, small.model, &p, NULL) == LFM2_OK);
    small.file = file.p;
    atexit(close_small);
}

/* Take it or leave everything as it was. */
static int try_state(const uint8_t *state, size_t n)
{
    static const int32_t token = 1;
    const lfm2_span span = { 0, &token, 1, 1 };
    const int had = lfm2_seq_len(small.ctx, 0);
    lfm2_error err = { 0 };
    uint8_t *again;
    int code = lfm2_seq_load(small.ctx, 0, state, n, &err);

    if (code != LFM2_OK) {
        REQUIRE(code < 0 && err.code == code && err.msg[0]);
        REQUIRE(lfm2_seq_len(small.ctx, 0) == had);
        return 0;
    }
    again = malloc(n);
    REQUIRE(again && lfm2_seq_state_size(small.ctx, 0) == n);
    REQUIRE(lfm2_seq_save(small.ctx, 0, again, n, NULL) == LFM2_OK);
    REQUIRE(memcmp(state, again, n) == 0);
    free(again);
    REQUIRE(lfm2_seq_copy(small.ctx, 1, 0, NULL) == LFM2_OK);
    code = lfm2_forward(small.ctx, &span, 1, &err);
    REQUIRE(code == LFM2_OK || code == LFM2_EFULL);
    REQUIRE(lfm2_seq_trim(small.ctx, 0, lfm2_seq_len(small.ctx, 0) / 2) >= 0);
    return 1;
}

/* The bytes of a state for `len` tokens: those of one token more, as long as
 * the conv marks stay as many. */
static size_t state_size(int len)
{
    static size_t empty, step, token;
    const int32_t tokens[65] = { 0 };
    const lfm2_span one = { 1, tokens, 1, 0 }, many = { 1, tokens + 1, 64, 0 };
    lfm2_context *ctx = small.ctx;

    if (!empty) {
        REQUIRE(lfm2_seq_step(ctx) == 64 && lfm2_seq_trim(ctx, 1, 0) == 0);
        empty = lfm2_seq_state_size(ctx, 1);
        REQUIRE(lfm2_forward(ctx, &one, 1, NULL) == LFM2_OK);
        token = lfm2_seq_state_size(ctx, 1) - empty;
        REQUIRE(lfm2_forward(ctx, &many, 1, NULL) == LFM2_OK);
        step = lfm2_seq_state_size(ctx, 1) - empty - 65 * token;
        lfm2_seq_trim(ctx, 1, 0);
    }
    return empty + (size_t)len * token + (size_t)(len / 64) * step;
}

void fuzz_state(const uint8_t *data, size_t n)
{
    uint8_t *state;
    size_t size = n;

    if (!small.ctx)
        open_small();
    try_state(data, n);
    if (n < 32)
        return;
    if (data[21] == 0 && data[20] <= 160)
        size = state_size(data[20]);
    state = calloc(1, size);
    REQUIRE(state);
    memcpy(state, data, n < size ? n : size);
    memcpy(state, "LFM2SEQ2", 8);
    fuzz_put(state + 8, lfm2_model_hash(small.model), 8);
    if (data[16] < 200)
        fuzz_put(state + 16, LFM2_KV_F16, 4);
    if (size != n)
        fuzz_put(state + 20, data[20], 4);
    fuzz_put(state + size - 8, fuzz_hash_words(state, size - 8), 8);
    try_state(state, size);
    free(state);
}
