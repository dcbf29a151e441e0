/* Sequences: trimmed, copied, saved and loaded, they go on as if nothing had
 * happened; and no damaged state is ever loaded. */
#include "../lfm2.c"

#include "util.h"

#include <check.h>

enum { N = 300, N_VOCAB_ALL = 264 };

/* A model, a context of three sequences, and N tokens with their logits, read
 * straight through in sequence 0. */
struct rig {
    struct bytes file;
    lfm2_model *model;
    lfm2_context *ctx;
    int32_t tokens[N];
    float *logits;                        /* [N][N_VOCAB_ALL]                */
};

static void feed(lfm2_context *ctx, int seq, const int32_t *tokens, int n)
{
    const lfm2_span span = { seq, tokens, n, n };
    lfm2_error err;

    EXPECT_MSG(lfm2_forward(ctx, &span, 1, &err) == LFM2_OK, "%s", err.msg);
}

static lfm2_context *open_batch(const lfm2_model *m, int n_ctx, int kv_type,
                                int n_batch)
{
    const lfm2_params p = { .n_ctx = n_ctx, .n_seq = 3, .n_batch = n_batch,
                            .n_logits = n_ctx < 600 ? n_ctx : 600,
                            .n_threads = 1, .kv_type = kv_type };
    lfm2_context *ctx;
    lfm2_error err;

    EXPECT_MSG(lfm2_context_open(&ctx, m, &p, &err) == LFM2_OK, "%s", err.msg);
    return ctx;
}

static lfm2_context *open_context(const lfm2_model *m, int n_ctx, int kv_type)
{
    return open_batch(m, n_ctx, kv_type, 100);
}

/* With the step at which the conv state is kept.  What decides it is how much
 * state there is; so the model gets layers of conv state that no layer uses. */
static struct rig *open_rig_of(struct tiny t, int kv_type, int step)
{
    struct rig *r = calloc(1, sizeof *r);
    uint64_t rng = 5;

    r->file = tiny_model(&t);
    ck_assert(lfm2_model_open_memory(&r->model, r->file.p, r->file.n, NULL) ==
              LFM2_OK);
    r->model->n_conv = step == 64 ? 2 : step == 128 ? 5 : 12;
    r->ctx = open_context(r->model, 600, kv_type);
    ck_assert_int_eq(lfm2_seq_step(r->ctx), step);
    for (int i = 0; i < N; i++)
        r->tokens[i] = (int32_t)(random_u32(&rng) % N_VOCAB_ALL);
    feed(r->ctx, 0, r->tokens, N);
    r->logits = malloc(N * N_VOCAB_ALL * sizeof *r->logits);
    ck_assert(r->logits != NULL);
    memcpy(r->logits, lfm2_logits(r->ctx, 0, 0),
           N * N_VOCAB_ALL * sizeof *r->logits);
    return r;
}

static struct rig *open_rig(int step)
{
    return open_rig_of((struct tiny){ .type = 2, .moe = 1, .n_embd = 32 },
                       LFM2_KV_F16, step);
}

/* With so many taps. */
static struct rig *open_taps(int l_cache)
{
    return open_rig_of((struct tiny){ .l_cache = l_cache, .n_embd = 32 },
                       LFM2_KV_F32, 64);
}

static void close_rig(struct rig *r)
{
    lfm2_context_close(r->ctx);
    lfm2_model_close(r->model);
    free(r->file.p);
    free(r->logits);
    free(r);
}

/* Feed the tokens from `from` to `to` again: the logits are the old ones. */
static void expect_continues(const struct rig *r, lfm2_context *ctx, int seq,
                             int from, int to)
{
    const size_t row = N_VOCAB_ALL * sizeof(float);

    ck_assert_int_eq(lfm2_seq_len(ctx, seq), from);
    if (to > from) {
        feed(ctx, seq, r->tokens + from, to - from);
        EXPECT_MSG(memcmp(lfm2_logits(ctx, 0, 0),
                          r->logits + (size_t)from * N_VOCAB_ALL,
                          (size_t)(to - from) * row) == 0,
                   "other bits after position %d", from);
    }
}

struct state { uint8_t *p; uint64_t n; };

static struct state save(const lfm2_context *ctx, int seq)
{
    struct state s = { NULL, lfm2_seq_state_size(ctx, seq) };
    lfm2_error err;

    s.p = malloc((size_t)s.n);
    ck_assert(s.p != NULL);
    EXPECT_MSG(lfm2_seq_save(ctx, seq, s.p, s.n, &err) == LFM2_OK, "%s",
               err.msg);
    return s;
}

static void expect_state(const lfm2_context *ctx, int seq, struct state was)
{
    struct state is = save(ctx, seq);

    ck_assert(is.n == was.n);
    EXPECT_MSG(memcmp(is.p, was.p, (size_t)is.n) == 0, "the sequence changed");
    free(is.p);
}

static const int steps[] = { 64, 128, 256 };

/* ------------------------------------------------------------ trim and copy */

START_TEST(trimmed_at_any_length_it_goes_on_exactly)
{
    const int step = steps[_i];
    struct rig *r = open_rig(step);

    for (int len = 0; len <= N + 2; len++) {
        const int kept = len >= N ? N : len >= N - 16 ? len : len - len % step;
        ck_assert(lfm2_seq_copy(r->ctx, 1, 0, NULL) == LFM2_OK);
        ck_assert_int_eq(lfm2_seq_trim(r->ctx, 1, len), kept);
        expect_continues(r, r->ctx, 1, kept, kept + 2 < N ? kept + 2 : N);
    }
    close_rig(r);
}
END_TEST

START_TEST(trimmed_again_and_again_it_goes_on_exactly)
{
    struct rig *r = open_rig(steps[_i]);

    for (int len = N; len >= 0; len -= 37) {
        const int kept = lfm2_seq_trim(r->ctx, 0, len);
        const int to = kept + 75 < N ? kept + 75 : N;
        expect_continues(r, r->ctx, 0, kept, to);
    }
    ck_assert_int_eq(lfm2_seq_trim(r->ctx, 0, 0), 0);
    expect_continues(r, r->ctx, 0, 0, N);
    close_rig(r);
}
END_TEST

START_TEST(a_copy_is_equal_and_independent)
{
    struct rig *r = open_rig(steps[_i]);
    struct state whole = save(r->ctx, 0);

    /* Over a longer one, a shorter one, and itself. */
    feed(r->ctx, 1, r->tokens + 7, 290);
    ck_assert(lfm2_seq_copy(r->ctx, 1, 0, NULL) == LFM2_OK);
    expect_state(r->ctx, 1, whole);
    ck_assert_int_eq(lfm2_seq_trim(r->ctx, 1, 270), 270 - 270 % steps[_i]);
    ck_assert(lfm2_seq_copy(r->ctx, 2, 1, NULL) == LFM2_OK);
    feed(r->ctx, 1, r->tokens + 99, 40);
    expect_state(r->ctx, 0, whole);
    expect_continues(r, r->ctx, 2, 270 - 270 % steps[_i], N);
    expect_state(r->ctx, 2, whole);
    ck_assert(lfm2_seq_copy(r->ctx, 0, 0, NULL) == LFM2_OK);
    expect_state(r->ctx, 0, whole);
    free(whole.p);
    close_rig(r);
}
END_TEST

START_TEST(wrong_numbers_are_refused_and_change_nothing)
{
    struct rig *r = open_rig(64);
    struct state whole = save(r->ctx, 0);

    for (int bad = -1; bad <= 3; bad += 4) {
        ck_assert_int_eq(lfm2_seq_len(r->ctx, bad), LFM2_EARG);
        ck_assert_int_eq(lfm2_seq_trim(r->ctx, bad, 0), LFM2_EARG);
        ck_assert_int_eq(lfm2_seq_copy(r->ctx, bad, 0, NULL), LFM2_EARG);
        ck_assert_int_eq(lfm2_seq_copy(r->ctx, 0, bad, NULL), LFM2_EARG);
        ck_assert(lfm2_seq_state_size(r->ctx, bad) == 0);
        ck_assert_int_eq(lfm2_seq_save(r->ctx, bad, whole.p, whole.n, NULL),
                         LFM2_EARG);
        ck_assert_int_eq(lfm2_seq_load(r->ctx, bad, whole.p, whole.n, NULL),
                         LFM2_EARG);
    }
    ck_assert_int_eq(lfm2_seq_trim(r->ctx, 0, -1), LFM2_EARG);
    ck_assert_int_eq(lfm2_seq_save(r->ctx, 0, NULL, whole.n, NULL), LFM2_EARG);
    ck_assert_int_eq(lfm2_seq_load(r->ctx, 0, NULL, whole.n, NULL), LFM2_EARG);
    expect_state(r->ctx, 0, whole);
    free(whole.p);
    close_rig(r);
}
END_TEST

/* ------------------------------------------------------------ save and load */

START_TEST(loaded_elsewhere_it_goes_on_exactly)
{
    static const int lengths[] = { 0, 1, 2, 63, 64, 65, 257, 280 };
    const int kv_type = _i % 2;
    struct rig *r = open_rig(steps[_i / 2]);
    lfm2_context *from = open_context(r->model, 300, kv_type);
    lfm2_context *to = open_context(r->model, 1000, kv_type);

    feed(to, 1, r->tokens + 9, 33);
    for (size_t i = 0; i < COUNT(lengths); i++) {
        lfm2_seq_trim(from, 2, 0);
        if (lengths[i] > 0)
            feed(from, 2, r->tokens, lengths[i]);
        struct state s = save(from, 2);
        ck_assert(lfm2_seq_load(to, 1, s.p, s.n, NULL) == LFM2_OK);
        expect_state(to, 1, s);
        if (kv_type == LFM2_KV_F16)
            expect_continues(r, to, 1, lengths[i], lengths[i] + 20);
        const int kept = lfm2_seq_trim(to, 1, lengths[i]);
        if (kv_type == LFM2_KV_F16)
            expect_continues(r, to, 1, kept, lengths[i] + 9);
        free(s.p);
    }
    lfm2_context_close(from);
    lfm2_context_close(to);
    close_rig(r);
}
END_TEST

START_TEST(a_buffer_too_small_is_not_written)
{
    struct rig *r = open_rig(64);
    const uint64_t n = lfm2_seq_state_size(r->ctx, 0);
    uint8_t *buf = malloc((size_t)n);
    lfm2_error err;

    memset(buf, 0x5a, (size_t)n);
    ck_assert_int_eq(lfm2_seq_save(r->ctx, 0, buf, n - 1, &err), LFM2_EARG);
    ck_assert(strstr(err.msg, "bytes, expected") != NULL);
    ck_assert_int_eq(lfm2_seq_save(r->ctx, 0, buf, 0, NULL), LFM2_EARG);
    for (uint64_t i = 0; i < n; i++)
        EXPECT(buf[i] == 0x5a);
    free(buf);
    close_rig(r);
}
END_TEST

/* Load a state of exactly n bytes and expect an error; nothing changes. */
static void expect_refused(struct rig *r, const uint8_t *p, uint64_t n,
                           int code, const char *says)
{
    const int len = lfm2_seq_len(r->ctx, 1);
    uint8_t *exact = malloc(n ? (size_t)n : 1);
    lfm2_error err = { 0 };

    ck_assert(exact != NULL);
    memcpy(exact, p, (size_t)n);
    const int got = lfm2_seq_load(r->ctx, 1, exact, n, &err);
    EXPECT_MSG(got == code, "code %d, expected %d: %s", got, code, err.msg);
    EXPECT_MSG(strstr(err.msg, says) != NULL, "\"%s\", expected \"%s\"",
               err.msg, says);
    EXPECT(err.code == code && lfm2_seq_len(r->ctx, 1) == len);
    free(exact);
}

START_TEST(no_part_of_a_state_is_loaded)
{
    struct rig *r = open_rig(64);

    lfm2_seq_trim(r->ctx, 0, 64);
    struct state s = save(r->ctx, 0);
    feed(r->ctx, 1, r->tokens, 11);
    struct state before = save(r->ctx, 1);
    for (uint64_t n = 0; n < s.n; n += n < 64 || n + 64 > s.n ? 1 : 5)
        expect_refused(r, s.p, n, LFM2_EFORMAT, "saved sequence");
    expect_state(r->ctx, 1, before);
    free(before.p);
    free(s.p);
    close_rig(r);
}
END_TEST

START_TEST(no_single_flipped_bit_goes_unnoticed)
{
    struct rig *r = open_rig(64);

    lfm2_seq_trim(r->ctx, 0, 0);
    feed(r->ctx, 0, r->tokens, 2);
    feed(r->ctx, 1, r->tokens, 11);
    struct state s = save(r->ctx, 0), before = save(r->ctx, 1);
    for (uint64_t bit = 0; bit < 8 * s.n; bit++) {
        s.p[bit / 8] ^= (uint8_t)(1 << bit % 8);
        expect_refused(r, s.p, s.n, LFM2_EFORMAT, "saved sequence");
        s.p[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    expect_state(r->ctx, 1, before);
    free(before.p);
    free(s.p);
    close_rig(r);
}
END_TEST

static void store_le(uint8_t *p, uint64_t v, int bytes)
{
    for (int i = 0; i < bytes; i++)
        p[i] = (uint8_t)(v >> 8 * i);
}

/* The checksum of a state is no secret. */
static void seal(struct state s)
{
    const uint64_t h = hash_words(HASH_START, s.p, (size_t)s.n - 8);
    store_le(s.p + s.n - 8, h, 8);
}

/* Forged, with a checksum that fits. */
START_TEST(a_state_of_something_else_is_refused)
{
    static const struct {
        int at, bytes;
        uint64_t value;
        int code;
        const char *says;
    } forged[] = {
        { 7, 1, '1', LFM2_EFORMAT, "not a saved sequence" },
        { 8, 8, 12345, LFM2_EFORMAT, "with model 3039 and" },
        { 16, 4, LFM2_KV_F32, LFM2_EFORMAT, "kv_type 1, expected" },
        { 16, 4, 77, LFM2_EFORMAT, "kv_type 77, expected" },
        { 20, 4, 3, LFM2_EFORMAT, "3 tokens in" },
        { 20, 4, 63, LFM2_EFORMAT, "63 tokens in" },
        { 20, 4, 600, LFM2_EFORMAT, "600 tokens in" },
        { 20, 4, 601, LFM2_EFULL, "601 tokens, expected at most 600" },
        { 20, 4, 0x80000000u, LFM2_EFULL, "2147483648 tokens" },
        { 20, 4, 0xffffffffu, LFM2_EFULL, "4294967295 tokens" }
    };
    struct rig *r = open_rig(64);

    lfm2_seq_trim(r->ctx, 0, 64);
    feed(r->ctx, 1, r->tokens, 11);
    struct state before = save(r->ctx, 1);
    for (size_t i = 0; i < COUNT(forged); i++) {
        struct state s = save(r->ctx, 0);
        store_le(s.p + forged[i].at, forged[i].value, forged[i].bytes);
        seal(s);
        expect_refused(r, s.p, s.n, forged[i].code, forged[i].says);
        free(s.p);
    }
    expect_state(r->ctx, 1, before);
    free(before.p);
    close_rig(r);
}
END_TEST

START_TEST(a_state_of_another_model_is_refused)
{
    struct rig *r = open_rig(64);
    const struct tiny t = { .type = 2, .moe = 1, .n_embd = 32, .seed = 1 };
    struct bytes file = tiny_model(&t);
    lfm2_model *m;

    ck_assert(lfm2_model_open_memory(&m, file.p, file.n, NULL) == LFM2_OK);
    lfm2_context *other = open_context(m, 600, LFM2_KV_F16);
    feed(other, 0, r->tokens, 20);
    struct state s = save(other, 0);
    expect_refused(r, s.p, s.n, LFM2_EFORMAT, "with model ");
    free(s.p);
    lfm2_context_close(other);
    lfm2_model_close(m);
    free(file.p);
    close_rig(r);
}
END_TEST

START_TEST(a_context_too_short_is_full)
{
    struct rig *r = open_rig(64);
    lfm2_context *small = open_context(r->model, 100, LFM2_KV_F16);
    lfm2_error err;

    struct state s = save(r->ctx, 0);
    ck_assert_int_eq(lfm2_seq_load(small, 0, s.p, s.n, &err), LFM2_EFULL);
    ck_assert_int_eq(lfm2_seq_len(small, 0), 0);
    free(s.p);
    lfm2_seq_trim(r->ctx, 0, 64);
    feed(r->ctx, 0, r->tokens + 64, 36);
    s = save(r->ctx, 0);
    ck_assert_int_eq(lfm2_seq_load(small, 0, s.p, s.n, &err), LFM2_OK);
    const lfm2_span one = { 0, r->tokens, 1, 1 };
    ck_assert_int_eq(lfm2_forward(small, &one, 1, &err), LFM2_EFULL);
    free(s.p);
    lfm2_context_close(small);
    close_rig(r);
}
END_TEST

/* ---------------------------------------------- the last tokens taken back */

enum { BACK = 16 };

/* Trim a copy of sequence 0 to `len`: `kept` are left, and it goes on. */
static void expect_trim(const struct rig *r, lfm2_context *ctx, int len,
                        int kept)
{
    ck_assert(lfm2_seq_copy(ctx, 1, 0, NULL) == LFM2_OK);
    ck_assert_int_eq(lfm2_seq_trim(ctx, 1, len), kept);
    expect_continues(r, ctx, 1, kept, len + 3);
}

/* At the start of a text and later, with every number of taps. */
START_TEST(up_to_sixteen_tokens_are_taken_back_exactly)
{
    static const int calls[] = { 1, 5, 16, 17, 40 };
    struct rig *r = open_taps(_i);

    for (int before = 0; before <= 70; before += 70)
        for (size_t i = 0; i < COUNT(calls); i++) {
            const int len = before + calls[i];
            lfm2_seq_trim(r->ctx, 0, 0);
            if (before > 0)
                feed(r->ctx, 0, r->tokens, before);
            feed(r->ctx, 0, r->tokens + before, calls[i]);
            for (int back = 1; back <= BACK && back <= len; back++)
                expect_trim(r, r->ctx, len - back, len - back);
            if (len > BACK)
                expect_trim(r, r->ctx, len - BACK - 1,
                            (len - BACK - 1) / 64 * 64);
        }
    close_rig(r);
}
END_TEST

START_TEST(what_was_taken_back_counts)
{
    struct rig *r = open_taps(_i);

    lfm2_seq_trim(r->ctx, 0, 100);
    ck_assert_int_eq(lfm2_seq_trim(r->ctx, 0, 0), 0);
    feed(r->ctx, 0, r->tokens, 100);
    ck_assert_int_eq(lfm2_seq_trim(r->ctx, 0, 90), 90);
    expect_trim(r, r->ctx, 84, 84);
    expect_trim(r, r->ctx, 83, 64);
    feed(r->ctx, 0, r->tokens + 200, 5);              /* other ones, in vain */
    ck_assert_int_eq(lfm2_seq_trim(r->ctx, 0, 90), 90);
    ck_assert_int_eq(lfm2_seq_trim(r->ctx, 0, 84), 84);
    expect_continues(r, r->ctx, 0, 84, 87);
    expect_trim(r, r->ctx, 84, 84);
    expect_trim(r, r->ctx, 83, 64);

    /* From a mark on, only what is read again. */
    ck_assert_int_eq(lfm2_seq_trim(r->ctx, 0, 80), 64);
    expect_trim(r, r->ctx, 63, 0);
    feed(r->ctx, 0, r->tokens + 64, 6);
    for (int len = 64; len < 70; len++)
        expect_trim(r, r->ctx, len, len);
    expect_trim(r, r->ctx, 63, 0);
    close_rig(r);
}
END_TEST

/* As those do who guess what comes next: read some right tokens and some wrong
 * ones, and take back the wrong ones. */
START_TEST(wrong_guesses_leave_nothing)
{
    struct rig *r = open_taps(_i);
    uint64_t rng = 9;

    for (int round = 0; round < 40; round++) {
        int len = lfm2_seq_len(r->ctx, 0), kept;
        int32_t guess[20];
        if (len > N - 30)
            len = lfm2_seq_trim(r->ctx, 0, len % 64);
        const int n = 1 + (int)(random_u32(&rng) % COUNT(guess));
        const int right = (int)(random_u32(&rng) % (uint32_t)(n + 1));
        for (int i = 0; i < n; i++)
            guess[i] = i < right ? r->tokens[len + i]
                                 : (r->tokens[len + i] + 1) % N_VOCAB_ALL;
        feed(r->ctx, 0, guess, n);
        EXPECT(memcmp(lfm2_logits(r->ctx, 0, 0),
                      r->logits + (size_t)len * N_VOCAB_ALL,
                      (size_t)right * N_VOCAB_ALL * sizeof(float)) == 0);
        kept = lfm2_seq_trim(r->ctx, 0, len + right);
        ck_assert(kept == len + right || n - right > BACK);
        expect_continues(r, r->ctx, 0, kept, len + right + 1);
    }
    close_rig(r);
}
END_TEST

/* Loaded, it can be taken back no further than it is read from then on. */
START_TEST(a_loaded_sequence_has_to_read_on_first)
{
    struct rig *r = open_taps(_i);

    for (int len = 40; len <= 70; len += 30) {
        lfm2_seq_trim(r->ctx, 0, 0);
        feed(r->ctx, 0, r->tokens, len);
        struct state s = save(r->ctx, 0);
        feed(r->ctx, 0, r->tokens + 100, 30);
        ck_assert(lfm2_seq_load(r->ctx, 0, s.p, s.n, NULL) == LFM2_OK);
        expect_trim(r, r->ctx, len, len);
        expect_trim(r, r->ctx, len - 1, (len - 1) / 64 * 64);
        feed(r->ctx, 0, r->tokens + len, 5);
        expect_trim(r, r->ctx, len, len);
        expect_trim(r, r->ctx, len + 4, len + 4);
        expect_trim(r, r->ctx, len - 1, (len - 1) / 64 * 64);
        feed(r->ctx, 0, r->tokens + len + 5, 20);
        expect_trim(r, r->ctx, len + 9, len + 9);
        free(s.p);
    }
    close_rig(r);
}
END_TEST

/* Cancels once it has been called so many times. */
struct canceller { lfm2_context *ctx; int calls; };

static void count_down(void *user, const lfm2_activation *a)
{
    struct canceller *c = user;

    (void)a;
    if (--c->calls == 0)
        lfm2_cancel(c->ctx);
}

/* A call of n tokens ended after `calls` records; 0 if it was not. */
static int cancel_after(struct rig *r, lfm2_context *ctx, int n, int calls)
{
    struct canceller c = { ctx, calls };
    const lfm2_span span = { 0, r->tokens + 200, n, 0 };
    int code;

    ck_assert(lfm2_trace(ctx, count_down, &c, NULL) == LFM2_OK);
    code = lfm2_forward(ctx, &span, 1, NULL);
    lfm2_trace(ctx, NULL, NULL, NULL);
    if (code == LFM2_OK && c.calls <= 0)  /* too late: the next one is hit   */
        ck_assert(lfm2_forward(ctx, &span, 1, NULL) == LFM2_ECANCELLED);
    return code == LFM2_ECANCELLED;
}

/* A short call has written over the columns that are furthest back; a long one
 * over all, and the last ones are put back. */
START_TEST(after_a_cancelled_call_it_goes_on_and_back)
{
    static const int calls[] = { 1, 5, 16, 17, 40 };
    enum { LEN = 90 };
    struct rig *r = open_taps(_i);
    lfm2_context *ctx = open_batch(r->model, 300, LFM2_KV_F32, 7);

    feed(ctx, 2, r->tokens, LEN);
    struct state was = save(ctx, 2);
    for (size_t i = 0; i < COUNT(calls); i++)
        for (int at = 1;; at += 10 * calls[i] + 7) {
            const int left = calls[i] > BACK ? 0 : BACK - calls[i];
            lfm2_seq_trim(ctx, 0, 0);                 /* it had another past */
            feed(ctx, 0, r->tokens + 100, 20);
            ck_assert(lfm2_seq_copy(ctx, 0, 2, NULL) == LFM2_OK);
            const int cancelled = cancel_after(r, ctx, calls[i], at);
            if (cancelled) {
                expect_state(ctx, 0, was);
                expect_trim(r, ctx, LEN, LEN);
                expect_trim(r, ctx, LEN - left, LEN - left);
                expect_trim(r, ctx, LEN - left - 1, 64);
            }
            if (!cancelled)
                break;
        }
    free(was.p);
    lfm2_context_close(ctx);
    close_rig(r);
}
END_TEST

/* --------------------------------------------------- memory that goes back */

/* Bytes of this process that are in memory; 0 if the system does not say. */
static uint64_t resident(void)
{
    FILE *f = fopen("/proc/self/statm", "r");
    unsigned long long pages = 0;

    if (f && fscanf(f, "%*s %llu", &pages) != 1)
        pages = 0;
    if (f)
        fclose(f);
    return pages * 4096;
}

/* A text of `len` tokens, all of whose state is 0, without reading it. */
static void load_zeros(lfm2_context *ctx, int seq, int len)
{
    struct state s = save(ctx, seq);
    const uint64_t n = saved_size(ctx, len);
    uint8_t *p = calloc(1, (size_t)n);

    ck_assert(p != NULL);
    memcpy(p, s.p, SAVED_HEAD);
    store_le(p + 20, (uint64_t)len, 4);
    seal((struct state){ p, n });
    ck_assert(lfm2_seq_load(ctx, seq, p, n, NULL) == LFM2_OK);
    free(s.p);
    free(p);
}

START_TEST(an_emptied_sequence_gives_its_memory_back)
{
    enum { LONG = 60000 };
    struct rig *r = open_rig(64);
    lfm2_context *ctx = open_context(r->model, LONG + 100, _i);
    const uint64_t kv = (uint64_t)kv_bytes(ctx, kv_head_bytes(ctx));
    uint64_t before, full;

    feed(ctx, 0, r->tokens, 70);
    feed(ctx, 2, r->tokens, 90);
    struct state first = save(ctx, 0), last = save(ctx, 2);
    before = resident();
    load_zeros(ctx, 1, LONG);
    full = resident();
    ck_assert_int_eq(lfm2_seq_trim(ctx, 1, 0), 0);
    if (before > 0) {
        EXPECT(full > before + kv / 10 * 9);
        EXPECT_MSG(resident() < full - kv / 10 * 9, "%llu bytes, then %llu",
                   ull(full), ull(resident()));
    }
    expect_state(ctx, 0, first);
    expect_state(ctx, 2, last);
    feed(ctx, 1, r->tokens, 90);
    expect_state(ctx, 1, last);
    free(first.p);
    free(last.p);
    lfm2_context_close(ctx);
    close_rig(r);
}
END_TEST

/* The state of a real model is kept at the step the header promises. */
START_TEST(the_step_follows_from_the_shape)
{
    static const struct { int n_conv, n_embd, n_attn, step; } shape[] = {
        { 10, 1024, 6, 128 },             /* 350M                            */
        { 10, 2048, 6, 256 },             /* 1.2B                            */
        { 30, 2048, 10, 256 },            /* 24B-A2B                         */
        { 4, 2048, 6, 64 }, { 4, 64, 0, 256 }, { 0, 64, 4, 64 }
    };

    for (size_t i = 0; i < COUNT(shape); i++) {
        const struct lfm2_model m = {
            .cfg = { .n_embd = shape[i].n_embd, .l_cache = 3, .n_head_kv = 8,
                     .head_dim = 64 },
            .n_conv = shape[i].n_conv, .n_attn = shape[i].n_attn
        };
        const struct lfm2_context ctx = { .model = &m };
        ck_assert_int_eq(seq_step(&ctx), shape[i].step);
    }
}
END_TEST

Suite *sequences_suite(void)
{
    Suite *s = suite_create("sequences");
    TCase *c = tcase_create("sequences");

    tcase_set_timeout(c, 300);
    tcase_add_loop_test(c, trimmed_at_any_length_it_goes_on_exactly, 0, 3);
    tcase_add_loop_test(c, trimmed_again_and_again_it_goes_on_exactly, 0, 3);
    tcase_add_loop_test(c, a_copy_is_equal_and_independent, 0, 3);
    tcase_add_test(c, wrong_numbers_are_refused_and_change_nothing);
    tcase_add_loop_test(c, loaded_elsewhere_it_goes_on_exactly, 0, 6);
    tcase_add_test(c, a_buffer_too_small_is_not_written);
    tcase_add_test(c, no_part_of_a_state_is_loaded);
    tcase_add_test(c, no_single_flipped_bit_goes_unnoticed);
    tcase_add_test(c, a_state_of_something_else_is_refused);
    tcase_add_test(c, a_state_of_another_model_is_refused);
    tcase_add_test(c, a_context_too_short_is_full);
    tcase_add_test(c, the_step_follows_from_the_shape);
    tcase_add_loop_test(c, up_to_sixteen_tokens_are_taken_back_exactly, 2, 7);
    tcase_add_loop_test(c, what_was_taken_back_counts, 2, 7);
    tcase_add_loop_test(c, wrong_guesses_leave_nothing, 2, 7);
    tcase_add_loop_test(c, a_loaded_sequence_has_to_read_on_first, 2, 7);
    tcase_add_loop_test(c, after_a_cancelled_call_it_goes_on_and_back, 2, 7);
    tcase_add_loop_test(c, an_emptied_sequence_gives_its_memory_back, 0, 2);
    suite_add_tcase(s, c);
    return s;
}
