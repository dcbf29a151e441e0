/* Threads: the workers of a context, callers that share a model and a
 * tokenizer, and cancelling from outside.  The bits are compared as well, but
 * the point of this suite is to be run under ThreadSanitizer: make check-tsan. */
#define _POSIX_C_SOURCE 200809L

#include "../lfm2.h"

#include "util.h"

#include <check.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { N = 40, N_CALLERS = 3 };

static const struct tiny kinds[] = {
    { .type = 2, .n_embd = 32, .words = 1 },
    { .type = 8, .n_embd = 32, .moe = 1, .words = 1 }
};

static struct bytes file;
static lfm2_model *model;
static lfm2_tokenizer *words;

static void open_model(int kind)
{
    file = tiny_model(&kinds[kind]);
    ck_assert(lfm2_model_open_memory(&model, file.p, file.n, NULL) == LFM2_OK);
    ck_assert(lfm2_tokenizer_open_memory(&words, file.p, file.n, NULL) ==
              LFM2_OK);
}

static void close_model(void)
{
    lfm2_tokenizer_close(words);
    lfm2_model_close(model);
    free(file.p);
}

static lfm2_context *open_context(int n_threads)
{
    const lfm2_params p = { .n_ctx = 2 * N, .n_seq = 2, .n_batch = 16,
                            .n_logits = 2, .n_threads = n_threads };
    lfm2_context *ctx;

    ck_assert(lfm2_context_open(&ctx, model, &p, NULL) == LFM2_OK);
    return ctx;
}

/* A prompt, two sequences at once, a copy, a state saved and loaded, a token
 * chosen: what of a context is used by threads.  The logits go to out. */
static int use_context(lfm2_context *ctx, float *out)
{
    static const char text[] = "hello hello <|im_end|>";
    const int n_vocab = lfm2_model_config(model)->n_vocab;
    int32_t id[N] = { 1, 2, 3 };
    const lfm2_span prompt = { 0, id, N, 1 };
    const lfm2_span both[2] = { { 0, id, 3, 1 }, { 1, id + 1, 1, 1 } };
    lfm2_sampler s = { .temperature = 1, .top_k = 9, .top_p = 1, .rng = 1 };
    const int n = lfm2_encode(words, text, sizeof text - 1, 0, id, N);
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
    code = lfm2_sample(ctx, &s, lfm2_logits(ctx, 0, 0), id, N);
    return code >= 0 ? LFM2_OK : code;
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

    open_model(_i);
    const size_t size = (size_t)lfm2_model_config(model)->n_vocab *
                        sizeof(float);
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
    close_model();
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

    open_model(_i);
    c.ctx = open_context(3);
    out = malloc((size_t)lfm2_model_config(model)->n_vocab * sizeof *out);
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
    close_model();
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
    suite_add_tcase(s, c);
    return s;
}
