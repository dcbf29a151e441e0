/* Threads: the workers of a context, callers that share a model and a
 * tokenizer, cancelling from outside, and fork().  The bits are compared as
 * well; what they do not show ThreadSanitizer does: make check-tsan. */
#include "../lfm2.c"

#include "util.h"

#include <check.h>
#include <signal.h>
#include <sys/wait.h>

enum { N = 40, N_CALLERS = 3, N_LONG = 300, N_VOCAB_ALL = 264 };

static const struct tiny kinds[] = {
    { .type = 2, .n_embd = 96, .words = 1 },
    { .type = 8, .n_embd = 64, .moe = 1, .words = 1 }
};

static struct bytes file;
static lfm2_model *model;
static lfm2_tokenizer *words;

static void open_tiny(int kind)
{
    file = tiny_model(&kinds[kind]);
    ck_assert(lfm2_model_open_memory(&model, file.p, file.n, NULL) == LFM2_OK);
    ck_assert(lfm2_tokenizer_open_memory(&words, file.p, file.n, NULL) ==
              LFM2_OK);
}

static void close_tiny(void)
{
    lfm2_tokenizer_close(words);
    lfm2_model_close(model);
    free(file.p);
}

/* Tiny as the model is, its work is shared: one row counts as enough. */
static lfm2_context *open_context(int n_threads)
{
    const lfm2_params p = { .n_ctx = N_LONG, .n_seq = 2, .n_batch = 16,
                            .n_logits = 2, .n_threads = n_threads };
    lfm2_context *ctx;

    ck_assert(lfm2_context_open(&ctx, model, &p, NULL) == LFM2_OK);
    ck_assert_int_eq(lfm2_context_params(ctx).n_threads, n_threads);
    ctx->row_work = TOO_SMALL;
    return ctx;
}

/* A prompt, two sequences at once, a copy, a state saved and loaded, a token
 * chosen: what of a context is used by threads.  Logits and a state go to out,
 * [n_vocab + n_embd]. */
static int use_context(lfm2_context *ctx, float *out)
{
    static const char said[] = "hello hello <|im_end|>";
    const int n_vocab = lfm2_model_config(model)->n_vocab;
    int32_t id[N] = { 1, 2, 3 };
    const lfm2_span prompt = { 0, id, N, 1 };
    const lfm2_span both[2] = {
        { .seq = 0, .tokens = id, .n_tokens = 3, .state = 1 },
        { 1, id + 1, 1, 1 }
    };
    lfm2_sampler s = { .temperature = 1, .top_k = 9, .top_p = 1, .rng = 1 };
    const int n = lfm2_encode(words, said, sizeof said - 1, 0, id, N);
    int code = lfm2_forward(ctx, &prompt, 1, NULL);
    uint8_t *state;
    uint64_t size;

    if (n < 1 || code != LFM2_OK)
        return code;
    code = lfm2_seq_copy(ctx, 1, 0, NULL);
    size = lfm2_seq_state_size(ctx, 0);
    state = malloc((size_t)size);
    if (!state || lfm2_seq_save(ctx, 0, state, size, NULL) != LFM2_OK ||
        lfm2_seq_load(ctx, 0, state, size, NULL) != LFM2_OK)
        code = LFM2_ENOMEM;
    free(state);
    if (code == LFM2_OK)
        code = lfm2_forward(ctx, both, 2, NULL);
    if (code != LFM2_OK)
        return code;
    memcpy(out, lfm2_logits(ctx, 1, 0), (size_t)n_vocab * sizeof *out);
    memcpy(out + n_vocab, lfm2_state(ctx, 0), (size_t)model->cfg.n_embd *
           sizeof *out);
    code = lfm2_sample(ctx, &s, lfm2_logits(ctx, 1, 0), id, N);
    return code >= 0 ? LFM2_OK : code;
}

static size_t out_size(void)
{
    const lfm2_config *c = lfm2_model_config(model);
    return (size_t)(c->n_vocab + c->n_embd) * sizeof(float);
}

/* One caller with a context of his own; contexts come and go. */
struct caller { int n_threads, code; float *logits; };

static void *call(void *arg)
{
    struct caller *c = arg;

    for (int round = 0; round < 3 && c->code == LFM2_OK; round++) {
        lfm2_context *ctx = open_context(c->n_threads);
        c->code = use_context(ctx, c->logits);
        lfm2_context_close(ctx);
    }
    return NULL;
}

START_TEST(callers_share_a_model)
{
    struct caller caller[N_CALLERS];
    pthread_t thread[N_CALLERS];

    open_tiny(_i);
    const size_t size = out_size();
    for (int i = 0; i < N_CALLERS; i++) {
        caller[i] = (struct caller){ 1 + i, LFM2_OK, malloc(size) };
        ck_assert(caller[i].logits != NULL);
        ck_assert(pthread_create(&thread[i], NULL, call, &caller[i]) == 0);
    }
    for (int i = 0; i < N_CALLERS; i++) {
        pthread_join(thread[i], NULL);
        ck_assert_int_eq(caller[i].code, LFM2_OK);
        ck_assert(memcmp(caller[i].logits, caller[0].logits, size) == 0);
    }
    for (int i = 0; i < N_CALLERS; i++)
        free(caller[i].logits);
    close_tiny();
}
END_TEST

struct canceller { lfm2_context *ctx; atomic_int ended; };

static void *cancel(void *arg)
{
    struct canceller *c = arg;

    while (!atomic_load(&c->ended))
        lfm2_cancel(c->ctx);
    return NULL;
}

/* Cancelled all the time, a call does nothing; left alone, it does it all. */
START_TEST(a_call_is_cancelled_from_outside)
{
    struct canceller c = { .ended = 0 };
    pthread_t thread;
    float *out;

    open_tiny(_i);
    c.ctx = open_context(3);
    out = malloc(out_size());
    ck_assert(out && pthread_create(&thread, NULL, cancel, &c) == 0);
    for (int round = 0; round < 5; round++) {
        const int code = use_context(c.ctx, out);
        ck_assert(code == LFM2_OK || code == LFM2_ECANCELLED);
        lfm2_seq_trim(c.ctx, 0, 0);
        lfm2_seq_trim(c.ctx, 1, 0);
    }
    atomic_store(&c.ended, 1);
    pthread_join(thread, NULL);
    if (use_context(c.ctx, out) == LFM2_ECANCELLED)       /* the last of them */
        ck_assert_int_eq(use_context(c.ctx, out), LFM2_OK);
    lfm2_context_close(c.ctx);
    free(out);
    close_tiny();
}
END_TEST

/* -------------------------------------------------------- how many threads */

static int32_t text[N_LONG];

static void write_text(void)
{
    uint64_t rng = 3;

    for (int i = 0; i < N_LONG; i++)
        text[i] = (int32_t)(random_u32(&rng) % N_VOCAB_ALL);
}

/* Calls of the first n tokens, of several lengths; the logits after each of
 * them go to out. */
static void read_text(lfm2_context *ctx, int n, float *out)
{
    static const int calls[] = { 1, 250, 1, 16, 1, 3 };

    for (int t = 0, i = 0; t < n; i++, out += N_VOCAB_ALL) {
        const int room = n - t, len = calls[i % 6] < room ? calls[i % 6] : room;
        const lfm2_span span = { 0, text + t, len, 1 };
        ck_assert(lfm2_forward(ctx, &span, 1, NULL) == LFM2_OK);
        memcpy(out, lfm2_logits(ctx, 0, 0), N_VOCAB_ALL * sizeof *out);
        t += len;
    }
}

/* More threads than CPUs, than heads, than units of a matrix, than rows; over
 * the border of a chunk of attention. */
START_TEST(any_number_of_threads_gives_the_same_bits)
{
    static const int threads[] = { 2, 3, 5, 8 };
    static float expected[12][N_VOCAB_ALL], logits[12][N_VOCAB_ALL];
    lfm2_context *ctx;

    open_tiny(_i);
    write_text();
    ctx = open_context(1);
    read_text(ctx, N_LONG, expected[0]);
    lfm2_context_close(ctx);
    for (size_t i = 0; i < COUNT(threads); i++) {
        ctx = open_context(threads[i]);
        read_text(ctx, N_LONG, logits[0]);
        EXPECT_MSG(memcmp(logits, expected, sizeof logits) == 0,
                   "%d threads: other bits", threads[i]);
        lfm2_context_close(ctx);
    }
    close_tiny();
}
END_TEST

/* They do not spin where others need the CPU, so they come to an end. */
START_TEST(far_more_threads_than_cpus_come_to_an_end)
{
    float expected[N_VOCAB_ALL], logits[N_VOCAB_ALL];
    lfm2_context *one, *many;

    open_tiny(0);
    write_text();
    one = open_context(1);
    many = open_context(64);
    ck_assert_int_eq(many->pool->spins, lfm2_n_cpus() < 64 ? 0 : SPINS);
    read_text(one, 1, expected);
    read_text(many, 1, logits);
    ck_assert(memcmp(logits, expected, sizeof logits) == 0);
    ck_assert(lfm2_exercise(many, LFM2_READ) > 0);
    lfm2_context_close(one);
    lfm2_context_close(many);
    close_tiny();
}
END_TEST

static unsigned wake_ups(const lfm2_context *ctx)
{
    return atomic_load(&ctx->pool->passes);
}

/* Nobody is woken for less than he could do while he wakes up. */
START_TEST(little_work_is_done_by_the_caller_alone)
{
    const lfm2_params p = { .n_ctx = N, .n_seq = 1, .n_batch = 8,
                            .n_logits = 1, .n_threads = 2 };
    const lfm2_span three = { 0, text, 3, 1 }, four = { 0, text, 4, 1 };
    uint64_t total, active;
    lfm2_context *ctx;

    open_tiny(_i);
    ck_assert(lfm2_context_open(&ctx, model, &p, NULL) == LFM2_OK);
    lfm2_model_params(model, &total, &active);
    ck_assert(ctx->row_work == active && active < TOO_SMALL / 4);
    ck_assert(lfm2_forward(ctx, &four, 1, NULL) == LFM2_OK);
    ck_assert_uint_eq(wake_ups(ctx), 0);
    ctx->row_work = TOO_SMALL / 4;
    ck_assert(lfm2_forward(ctx, &three, 1, NULL) == LFM2_OK);
    ck_assert_uint_eq(wake_ups(ctx), 0);
    ck_assert(lfm2_forward(ctx, &four, 1, NULL) == LFM2_OK);
    ck_assert_uint_eq(wake_ups(ctx), 1);
    ck_assert(lfm2_forward(ctx, &three, 1, NULL) == LFM2_OK);
    ck_assert(lfm2_forward(ctx, &four, 1, NULL) == LFM2_OK);
    ck_assert_uint_eq(wake_ups(ctx), 2);
    lfm2_context_close(ctx);
    close_tiny();
}
END_TEST

/* -------------------------------------------------------------------- fork */

/* One more token; the code, or 1 if the logits are not those expected. */
static int read_one(lfm2_context *ctx, const float *expected)
{
    const lfm2_span span = { 0, text + N, 1, 1 };
    const int code = lfm2_forward(ctx, &span, 1, NULL);

    return code != LFM2_OK ? code
         : memcmp(lfm2_logits(ctx, 0, 0), expected,
                  N_VOCAB_ALL * sizeof *expected) != 0;
}

/* What fails in the child, as a number; 0 if nothing does. */
static int use_in_child(lfm2_context *one, lfm2_context *many,
                        const float *expected)
{
    const lfm2_span span = { 0, text + N, 1, 1 };
    lfm2_error err = { 0 };

    signal(SIGALRM, SIG_DFL);             /* if it waits for its workers     */
    alarm(60);
    if (lfm2_forward(many, &span, 1, &err) != LFM2_EARG ||
        err.code != LFM2_EARG || !strstr(err.msg, "3 threads after fork()") ||
        lfm2_exercise(many, LFM2_READ) != LFM2_EARG)
        return 1;
    if (lfm2_seq_len(many, 0) != N || lfm2_seq_trim(many, 0, N - 1) != N - 1 ||
        lfm2_seq_copy(many, 1, 0, NULL) != LFM2_OK)
        return 2;
    lfm2_context_close(many);
    if (read_one(one, expected) != LFM2_OK)
        return 3;
    lfm2_context_close(one);
#ifndef __SANITIZE_THREAD__               /* which allows no threads there   */
    static float logits[12][N_VOCAB_ALL];
    many = open_context(3);
    read_text(many, N, logits[0]);
    if (read_one(many, expected) != LFM2_OK)
        return 4;
    lfm2_context_close(many);
#endif
    return 0;
}

START_TEST(a_child_is_told_that_it_has_no_workers)
{
    static float logits[12][N_VOCAB_ALL];
    float expected[N_VOCAB_ALL];
    const lfm2_span next = { 0, text + N, 1, 1 };
    lfm2_context *one, *many, *other;
    int status;
    pid_t child;

    open_tiny(_i);
    write_text();
    one = open_context(1);
    many = open_context(3);
    other = open_context(1);
    read_text(one, N, logits[0]);
    read_text(many, N, logits[0]);
    read_text(other, N, logits[0]);
    ck_assert(lfm2_forward(other, &next, 1, NULL) == LFM2_OK);
    memcpy(expected, lfm2_logits(other, 0, 0), sizeof expected);
    child = fork();
    ck_assert(child >= 0);
    if (child == 0)
        _exit(use_in_child(one, many, expected));
    ck_assert(waitpid(child, &status, 0) == child);
    ck_assert_int_eq(status, 0);
    ck_assert_int_eq(read_one(many, expected), LFM2_OK);
    ck_assert_int_eq(read_one(one, expected), LFM2_OK);
    lfm2_context_close(one);
    lfm2_context_close(many);
    lfm2_context_close(other);
    close_tiny();
}
END_TEST

Suite *threads_suite(void)
{
    Suite *s = suite_create("threads");
    TCase *c = tcase_create("threads");

    tcase_set_timeout(c, 300);
    tcase_add_loop_test(c, callers_share_a_model, 0, (int)COUNT(kinds));
    tcase_add_loop_test(c, a_call_is_cancelled_from_outside, 0,
                        (int)COUNT(kinds));
    tcase_add_loop_test(c, any_number_of_threads_gives_the_same_bits, 0,
                        (int)COUNT(kinds));
    tcase_add_test(c, far_more_threads_than_cpus_come_to_an_end);
    tcase_add_loop_test(c, little_work_is_done_by_the_caller_alone, 0,
                        (int)COUNT(kinds));
    tcase_add_loop_test(c, a_child_is_told_that_it_has_no_workers, 0,
                        (int)COUNT(kinds));
    suite_add_tcase(s, c);
    return s;
}
