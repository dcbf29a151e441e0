/* Spans of rows instead of tokens, and states instead of logits. */
#include "../lfm2.c"

#include "util.h"

#include <check.h>

enum { N = 60, N_VOCAB_ALL = 264, WIDTH = 64, N_SEQ = 4 };

static const struct tiny kinds[] = {
    { .type = 2, .seed = 5 }, { .type = 12, .n_embd = 256, .seed = 6 },
    { .seed = 5, .moe = 1 }, { .type = 8, .moe = 1, .seed = 5, .untied = 1 }
};
enum { N_KINDS = COUNT(kinds) };

static struct bytes file;
static lfm2_model *model;
static int width;                         /* n_embd                          */
static int32_t tokens[N];
static float *rows;                       /* [N][width] their embeddings     */

static void open_tiny(int kind)
{
    uint64_t rng = 8;

    file = tiny_model(&kinds[kind]);
    ck_assert(lfm2_model_open_memory(&model, file.p, file.n, NULL) == LFM2_OK);
    width = model->cfg.n_embd;
    rows = malloc(N * (size_t)width * sizeof *rows);
    ck_assert(rows != NULL);
    for (int i = 0; i < N; i++) {
        tokens[i] = (int32_t)(random_u32(&rng) % N_VOCAB_ALL);
        ck_assert(lfm2_model_row(model, 0, (uint64_t)tokens[i],
                                 rows + (size_t)i * (size_t)width) == LFM2_OK);
    }
}

static void close_tiny(void)
{
    lfm2_model_close(model);
    free(file.p);
    free(rows);
}

static lfm2_context *open_context(int n_batch, int n_threads)
{
    const lfm2_params p = { .n_ctx = 2 * N, .n_seq = N_SEQ, .n_batch = n_batch,
                            .n_logits = N, .n_threads = n_threads };
    lfm2_context *ctx;

    ck_assert(lfm2_context_open(&ctx, model, &p, NULL) == LFM2_OK);
    ctx->row_work = TOO_SMALL;            /* enough to share                 */
    return ctx;
}

/* Tokens first .. first+n-1 for a sequence, as ids or as rows. */
static lfm2_span ids(int seq, int first, int n, int n_logits)
{
    return (lfm2_span){ seq, tokens + first, n, n_logits };
}

static lfm2_span embd(int seq, int first, int n, int n_logits)
{
    return (lfm2_span){ .seq = seq, .n_tokens = n, .n_logits = n_logits,
                        .embd = rows + (size_t)first * (size_t)width };
}

static lfm2_span with_state(lfm2_span span)
{
    span.state = 1;
    return span;
}

static void forward_all(lfm2_context *ctx, const lfm2_span *spans, int n)
{
    lfm2_error err;

    EXPECT_MSG(lfm2_forward(ctx, spans, n, &err) == LFM2_OK, "%s", err.msg);
}

/* Logits after all tokens, read at once as ids: [N][N_VOCAB_ALL]. */
static float *logits_of_ids(void)
{
    lfm2_context *ctx = open_context(N, 1);
    const lfm2_span all = ids(0, 0, N, N);
    const size_t size = N * N_VOCAB_ALL * sizeof(float);
    float *out = malloc(size);

    ck_assert(out != NULL);
    forward_all(ctx, &all, 1);
    memcpy(out, lfm2_logits(ctx, 0, 0), size);
    lfm2_context_close(ctx);
    return out;
}

/* Those of the last n tokens before `end`. */
static void expect_logits(lfm2_context *ctx, int span, const float *expected,
                          int end, int n)
{
    for (int row = 0; row < n; row++)
        EXPECT_MSG(memcmp(lfm2_logits(ctx, span, row),
                          expected + (size_t)(end - n + row) * N_VOCAB_ALL,
                          N_VOCAB_ALL * sizeof(float)) == 0,
                   "other bits after %d tokens", end - n + row + 1);
}

/* -------------------------------------------------- rows instead of tokens */

START_TEST(rows_of_token_embd_are_their_tokens)
{
    static const int batch[] = { N, 1, 7 };
    float *expected;

    open_tiny(_i);
    expected = logits_of_ids();
    for (size_t i = 0; i < COUNT(batch); i++) {
        lfm2_context *ctx = open_context(batch[i], 1 + (int)i);
        const lfm2_span all = embd(1, 0, N, N);
        forward_all(ctx, &all, 1);
        expect_logits(ctx, 0, expected, N, N);
        lfm2_context_close(ctx);
    }
    free(expected);
    close_tiny();
}
END_TEST

/* In one call, and in turn in one sequence. */
START_TEST(rows_and_tokens_mix)
{
    float *expected;

    open_tiny(_i);
    expected = logits_of_ids();
    for (int n_batch = 5; n_batch <= 64; n_batch += 59) {
        lfm2_context *ctx = open_context(n_batch, 2);
        const lfm2_span first[3] = {
            ids(2, 0, 20, 20), embd(0, 0, 9, 3), embd(1, 0, 17, 0)
        };
        const lfm2_span second[3] = {
            embd(2, 20, 11, 1), ids(0, 9, 1, 1), ids(1, 17, 13, 13)
        };
        forward_all(ctx, first, 3);
        expect_logits(ctx, 0, expected, 20, 20);
        expect_logits(ctx, 1, expected, 9, 3);
        forward_all(ctx, second, 3);
        expect_logits(ctx, 0, expected, 31, 1);
        expect_logits(ctx, 1, expected, 10, 1);
        expect_logits(ctx, 2, expected, 30, 13);
        ck_assert_int_eq(lfm2_seq_trim(ctx, 2, 25), 25);
        const lfm2_span third = embd(2, 25, 4, 2);
        forward_all(ctx, &third, 1);
        expect_logits(ctx, 0, expected, 29, 2);
        lfm2_context_close(ctx);
    }
    free(expected);
    close_tiny();
}
END_TEST

static void look(void *user, const lfm2_activation *a)
{
    if (strcmp(a->name, "model.embed_tokens") != 0)
        return;
    EXPECT(a->token == -1 && a->n == width);
    EXPECT(memcmp(a->x, rows + (size_t)a->pos * (size_t)width,
                  (size_t)width * sizeof *rows) == 0);
    ++*(int *)user;
}

START_TEST(a_trace_shows_the_rows_and_no_token)
{
    int seen = 0;

    open_tiny(0);
    lfm2_context *ctx = open_context(4, 2);
    const lfm2_span span = embd(0, 0, 10, 1);
    ck_assert(lfm2_trace(ctx, look, &seen, NULL) == LFM2_OK);
    forward_all(ctx, &span, 1);
    ck_assert_int_eq(seen, 10);
    lfm2_context_close(ctx);
    close_tiny();
}
END_TEST

START_TEST(a_span_has_tokens_or_rows)
{
    lfm2_error err;

    open_tiny(0);
    lfm2_context *ctx = open_context(N, 1);
    lfm2_span spans[2] = { ids(0, 0, 3, 1), embd(1, 0, 3, 1) };
    spans[1].tokens = tokens;
    ck_assert_int_eq(lfm2_forward(ctx, spans, 2, &err), LFM2_EARG);
    ck_assert(strstr(err.msg, "span 1"));
    spans[1].tokens = NULL;
    spans[1].embd = NULL;
    ck_assert_int_eq(lfm2_forward(ctx, spans, 2, &err), LFM2_EARG);
    ck_assert(strstr(err.msg, "span 1"));
    spans[1] = embd(1, 0, 0, 0);
    ck_assert_int_eq(lfm2_forward(ctx, spans, 2, &err), LFM2_EARG);
    spans[1] = embd(1, 0, 3, 4);
    ck_assert_int_eq(lfm2_forward(ctx, spans, 2, &err), LFM2_EARG);
    spans[1] = embd(1, 0, 2 * N + 1, 0);
    ck_assert_int_eq(lfm2_forward(ctx, spans, 2, &err), LFM2_EFULL);
    ck_assert(lfm2_seq_len(ctx, 0) == 0 && lfm2_seq_len(ctx, 1) == 0);
    lfm2_context_close(ctx);
    close_tiny();
}
END_TEST

START_TEST(rows_that_are_no_numbers_show_at_sampling)
{
    static const float bad[] = { NAN, INFINITY, -INFINITY };
    lfm2_sampler greedy = { .temperature = 0 };

    open_tiny(_i);
    for (size_t i = 0; i < COUNT(bad); i++) {
        lfm2_context *ctx = open_context(N, 1);
        const lfm2_span spans[2] = { embd(0, 0, 5, 1), embd(1, 5, 5, 1) };
        const float was = rows[width + 3];
        rows[width + 3] = bad[i];         /* of the first, seen by its last  */
        forward_all(ctx, spans, 2);
        rows[width + 3] = was;
        ck_assert_int_eq(lfm2_sample(ctx, &greedy, lfm2_logits(ctx, 0, 0), NULL,
                                     0), LFM2_ENAN);
        ck_assert_int_ge(lfm2_sample(ctx, &greedy, lfm2_logits(ctx, 1, 0), NULL,
                                     0), 0);
        lfm2_context_close(ctx);
    }
    close_tiny();
}
END_TEST

/* ------------------------------------------------ states instead of logits */

/* The last norm of every token of sequence 0, as a trace shows it. */
static void keep_norm(void *user, const lfm2_activation *a)
{
    float *norms = user;

    if (a->seq == 0 && strcmp(a->name, "model.embedding_norm") == 0)
        memcpy(norms + (size_t)a->pos * (size_t)width, a->x,
               (size_t)width * sizeof *norms);
}

static float *norms_of_ids(void)
{
    lfm2_context *ctx = open_context(N, 1);
    const lfm2_span all = ids(0, 0, N, N);
    float *norms = calloc(N * (size_t)width, sizeof *norms);

    ck_assert(norms != NULL);
    ck_assert(lfm2_trace(ctx, keep_norm, norms, NULL) == LFM2_OK);
    forward_all(ctx, &all, 1);
    lfm2_context_close(ctx);
    return norms;
}

static void expect_norm(const lfm2_context *ctx, int span, const float *norms,
                        int end)
{
    const float *state = lfm2_state(ctx, span);

    EXPECT_MSG(state, "no state of span %d", span);
    EXPECT_MSG(memcmp(state, norms + (size_t)(end - 1) * (size_t)width,
                      (size_t)width * sizeof *norms) == 0,
               "another state after %d tokens", end);
}

START_TEST(a_state_is_the_last_norm_of_the_last_token)
{
    static const int lengths[] = { 1, 2, 8, 31, N };
    float *norms;

    open_tiny(_i);
    norms = norms_of_ids();
    for (int n_batch = 1; n_batch <= N; n_batch = n_batch * 7 + 1)
        for (size_t i = 0; i < COUNT(lengths); i++) {
            lfm2_context *ctx = open_context(n_batch, 1 + (int)i);
            const lfm2_span span = with_state(ids(3, 0, lengths[i], 0));
            forward_all(ctx, &span, 1);
            expect_norm(ctx, 0, norms, lengths[i]);
            ck_assert(lfm2_logits(ctx, 0, 0) == NULL);
            ck_assert(lfm2_state(ctx, -1) == NULL && !lfm2_state(ctx, 1));
            lfm2_context_close(ctx);
        }
    free(norms);
    close_tiny();
}
END_TEST

/* The logits are what the output matrix makes of it. */
START_TEST(logits_are_the_product_of_a_state)
{
    static struct q8_group q[256 / UNIT];
    float state[256], logits[N_VOCAB_ALL], *expected;

    open_tiny(_i);
    expected = logits_of_ids();
    lfm2_context *ctx = open_context(N, 1);
    const lfm2_span span = with_state(embd(0, 0, N, 0));
    struct input in = { .n = 1, .cols = width, .f = state, .q = q };
    forward_all(ctx, &span, 1);
    memcpy(state, lfm2_state(ctx, 0), (size_t)width * sizeof *state);
    round_rows(&ctx->thread[0], &in);
    matmul(&ctx->thread[0], ASSIGN, logits, &model->output, &in);
    ck_assert(memcmp(logits, expected + (size_t)(N - 1) * N_VOCAB_ALL,
                     sizeof logits) == 0);
    lfm2_context_close(ctx);
    free(expected);
    close_tiny();
}
END_TEST

static void count(void *user, const lfm2_activation *a)
{
    *(int *)user += strcmp(a->name, "lm_head") == 0;
}

/* In one call: spans that want a state, logits, and nothing, traced or not, in
 * one pass and in many. */
START_TEST(states_and_logits_mix)
{
    static const int batch[] = { 4 * N, 9, 33, 1 };
    const size_t ways = 2 * SOME_OF(COUNT(batch));
    float *norms, *expected;

    open_tiny(_i);
    norms = norms_of_ids();
    expected = logits_of_ids();
    for (size_t i = 0; i < ways; i++) {
        lfm2_context *ctx = open_context(batch[i / 2], 1 + (int)i % 3);
        int heads = 0;
        const lfm2_span spans[4] = {
            with_state(ids(2, 0, 21, 0)), ids(0, 0, 30, 14), ids(1, 0, 3, 0),
            with_state(embd(3, 0, 40, 0))
        };
        const lfm2_span more[3] = {
            ids(2, 21, 2, 2), with_state(ids(0, 30, 1, 0)),
            with_state(embd(1, 3, 11, 0))
        };
        if (i % 2)
            ck_assert(lfm2_trace(ctx, count, &heads, NULL) == LFM2_OK);
        forward_all(ctx, spans, 4);
        expect_norm(ctx, 0, norms, 21);
        expect_logits(ctx, 1, expected, 30, 14);
        expect_norm(ctx, 3, norms, 40);
        ck_assert(!lfm2_state(ctx, 1) && !lfm2_state(ctx, 2));
        ck_assert(!lfm2_logits(ctx, 0, 0) && !lfm2_logits(ctx, 2, 0));
        ck_assert(!lfm2_logits(ctx, 1, 14) && !lfm2_logits(ctx, 3, 0));
        forward_all(ctx, more, 3);
        expect_logits(ctx, 0, expected, 23, 2);
        expect_norm(ctx, 1, norms, 31);
        expect_norm(ctx, 2, norms, 14);
        ck_assert(!lfm2_state(ctx, 0) && !lfm2_state(ctx, 3));
        ck_assert_int_eq(heads, i % 2 ? 16 : 0);
        lfm2_context_close(ctx);
    }
    free(norms);
    free(expected);
    close_tiny();
}
END_TEST

START_TEST(a_state_has_no_logits)
{
    lfm2_error err;

    open_tiny(0);
    lfm2_context *ctx = open_context(N, 1);
    lfm2_span span = with_state(ids(0, 0, 5, 1));
    ck_assert(lfm2_state(ctx, 0) == NULL);
    ck_assert_int_eq(lfm2_forward(ctx, &span, 1, &err), LFM2_EARG);
    ck_assert(strstr(err.msg, "span 0: logits of 1 rows, expected 0"));
    ck_assert_int_eq(lfm2_seq_len(ctx, 0), 0);
    span.n_logits = 0;
    forward_all(ctx, &span, 1);
    ck_assert(lfm2_state(ctx, 0) != NULL);
    lfm2_cancel(ctx);                     /* nothing is left of such a call  */
    ck_assert_int_eq(lfm2_forward(ctx, &span, 1, NULL), LFM2_ECANCELLED);
    ck_assert(lfm2_state(ctx, 0) == NULL);
    lfm2_context_close(ctx);
    close_tiny();
}
END_TEST

Suite *spans_suite(void)
{
    Suite *s = suite_create("spans");
    TCase *c = tcase_create("spans");

    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, rows_of_token_embd_are_their_tokens, 0, N_KINDS);
    tcase_add_loop_test(c, rows_and_tokens_mix, 0, N_KINDS);
    tcase_add_test(c, a_trace_shows_the_rows_and_no_token);
    tcase_add_test(c, a_span_has_tokens_or_rows);
    tcase_add_loop_test(c, rows_that_are_no_numbers_show_at_sampling, 0,
                        N_KINDS);
    tcase_add_loop_test(c, a_state_is_the_last_norm_of_the_last_token, 0,
                        N_KINDS);
    tcase_add_loop_test(c, logits_are_the_product_of_a_state, 0, N_KINDS);
    tcase_add_loop_test(c, states_and_logits_mix, 0, N_KINDS);
    tcase_add_test(c, a_state_has_no_logits);
    suite_add_tcase(s, c);
    return s;
}
