/* The model: against an independent reference, against golden logits, and
 * against itself, bit for bit, however the work is cut up. */
#define _POSIX_C_SOURCE 200809L

#include "../lfm2.h"

#include "reference.h"
#include "util.h"

#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* A model with everything opened. */
struct rig {
    struct bytes file;
    lfm2_model *model;
    lfm2_context *ctx;
    int n_vocab;
};

static lfm2_params small_params(void)
{
    return (lfm2_params){ .n_ctx = 320, .n_seq = 4, .n_batch = 64,
                          .n_logits = 320, .n_threads = 1 };
}

static void rig_open_file(struct rig *r, struct bytes file, lfm2_params p)
{
    lfm2_error err = { 0 };

    r->file = file;
    EXPECT_MSG(lfm2_model_open_memory(&r->model, file.p, file.n, &err) == 0,
               "%s", err.msg);
    EXPECT_MSG(lfm2_context_open(&r->ctx, r->model, &p, &err) == 0, "%s",
               err.msg);
    r->n_vocab = lfm2_model_config(r->model)->n_vocab;
}

static struct rig rig_open(struct tiny t, lfm2_params p)
{
    struct rig r;

    rig_open_file(&r, tiny_model(&t), p);
    return r;
}

static void rig_close(struct rig *r)
{
    lfm2_context_close(r->ctx);
    lfm2_model_close(r->model);
    free(r->file.p);
}

static void feed(struct rig *r, int seq, const int32_t *tokens, int n,
                 int n_logits)
{
    lfm2_error err = { 0 };
    lfm2_span span = { seq, tokens, n, n_logits };

    EXPECT_MSG(lfm2_forward(r->ctx, &span, 1, &err) == 0, "%s", err.msg);
}

static void random_tokens(int32_t *tokens, int n, int n_vocab, uint64_t seed)
{
    for (int i = 0; i < n; i++)
        tokens[i] = (int32_t)(random_u32(&seed) % (uint32_t)n_vocab);
}

/* All logits of the tokens, fed at once to sequence 0: [n][n_vocab]. */
static float *all_logits(struct rig *r, const int32_t *tokens, int n)
{
    size_t size = (size_t)n * (size_t)r->n_vocab * sizeof(float);
    float *out = malloc(size);

    lfm2_seq_trim(r->ctx, 0, 0);
    feed(r, 0, tokens, n, n);
    memcpy(out, lfm2_logits(r->ctx, 0, 0), size);
    return out;
}

/* How far logits are from exact ones. */
struct distance { double nmse, kl; };

static double log_sum_exp(const float *l, const double *exact, int n)
{
    double max = -INFINITY, sum = 0;

    for (int i = 0; i < n; i++)
        max = fmax(max, l ? (double)l[i] : exact[i]);
    for (int i = 0; i < n; i++)
        sum += exp((l ? (double)l[i] : exact[i]) - max);
    return max + log(sum);
}

static struct distance compare(const float *l, const double *exact, int rows,
                               int n)
{
    double error = 0, power = 0, kl = 0;

    for (int r = 0; r < rows; r++, l += n, exact += n) {
        double zl = log_sum_exp(l, NULL, n);
        double ze = log_sum_exp(NULL, exact, n);
        for (int i = 0; i < n; i++) {
            error += ((double)l[i] - exact[i]) * ((double)l[i] - exact[i]);
            power += exact[i] * exact[i];
            kl += exp(exact[i] - ze) * (exact[i] - ze - ((double)l[i] - zl));
        }
    }
    return (struct distance){ error / power, kl / rows };
}

/* ---------------------------------------------------- against the reference */

static struct distance from_reference(struct tiny t, int kv_type)
{
    enum { N = 24 };
    lfm2_params p = small_params();
    int32_t tokens[N];

    p.kv_type = kv_type;
    struct rig r = rig_open(t, p);
    double *exact = malloc(N * (size_t)r.n_vocab * sizeof *exact);
    random_tokens(tokens, N, r.n_vocab, t.seed);
    ref_logits(r.file.p, tokens, N, exact);
    float *l = all_logits(&r, tokens, N);
    struct distance d = compare(l, exact, N, r.n_vocab);
    free(l);
    free(exact);
    rig_close(&r);
    return d;
}

/* Every weight type, in a dense and in a MoE model.  What is left is the
 * rounding of activations to 8 bits; where weights are floats, almost nothing.
 * An expert chosen otherwise for it shows in the MoE models. */
START_TEST(every_weight_type_is_near_the_exact_result)
{
    const int type = weight_types[_i / 2], moe = _i % 2;
    const int is_float = type == 0 || type == 1 || type == 30;
    struct distance d = from_reference(
        (struct tiny){ .type = type, .moe = moe, .seed = 7 }, LFM2_KV_F32);

    EXPECT_MSG(d.nmse < (is_float ? 1e-11 : moe ? 0.1 : 0.01),
               "%s: NMSE %g", weight_type_name(type), d.nmse);
}
END_TEST

START_TEST(a_half_precision_cache_is_nearly_as_good)
{
    struct distance d = from_reference((struct tiny){ .moe = _i }, LFM2_KV_F16);

    EXPECT_MSG(d.nmse < 1e-6, "NMSE %g", d.nmse);
}
END_TEST

START_TEST(every_form_of_file_computes_the_same)
{
    const struct tiny forms[] = {
        { .output_norm = 1 }, { .untied = 1 }, { .fused_qkv = 1 },
        { .version = 2 }, { .kv_form = KV_U32_ARRAY }, { .n_embd = 256 },
        { .type = 2, .fused_qkv = 1, .moe = 1 }, { .words = 1 }
    };
    struct distance d = from_reference(forms[_i], LFM2_KV_F32);

    EXPECT_MSG(d.nmse < (forms[_i].type ? 0.1 : 1e-11), "NMSE %g", d.nmse);
}
END_TEST

/* ----------------------------------------------------- against golden logits */

/* The mean KL divergence of llama.cpp 0.5.0 from the same logits, and how much
 * of it we may reach. */
static const struct { const char *name; double peer, share; } golden[] = {
    { "dense-F16", 9.77e-07, 1.1 },    { "dense-BF16", 5.77e-05, 1.1 },
    { "dense-Q8_0", 8.50e-04, 1.1 },   { "dense-Q4_0", 7.79e-04, 1.1 },
    { "dense-Q4_1", 8.62e-04, 1.1 },   { "dense-Q5_0", 8.42e-04, 1.1 },
    { "dense-Q5_1", 9.25e-04, 1.1 },   { "dense-IQ4_NL", 8.55e-04, 1.1 },
    { "dense-Q2_K", 1.90e-03, 0.55 },  { "dense-Q3_K_M", 2.07e-03, 0.55 },
    { "dense-Q4_K_S", 2.20e-03, 0.55 }, { "dense-Q4_K_M", 2.16e-03, 0.55 },
    { "dense-Q5_K_M", 2.09e-03, 0.55 }, { "dense-Q6_K", 2.14e-03, 0.55 },
    { "dense-IQ4_XS", 2.09e-03, 0.55 }, { "moe-Q8_0", 9.88e-03, 1.35 },
    { "moe-Q4_0", 8.05e-03, 1.35 },    { "moe-Q4_K_M", 1.84e-02, 0.7 },
    { "small_dense-F32", 1.75e-08, 1.1 }, { "small_moe-F32", 5.43e-09, 1.1 }
};

/* Number i of 32-bit ones, little-endian. */
static uint32_t number_at(struct bytes b, size_t i)
{
    const uint8_t *p = b.p + 4 * i;

    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 |
           (uint32_t)p[3] << 24;
}

/* How far a model is from logits that were computed elsewhere.  Releases its
 * arguments. */
static struct distance from_logits(struct bytes file, struct bytes ids,
                                   struct bytes logits, int kv_type)
{
    const int n = (int)(ids.n / 4);
    int32_t tokens[100];
    struct rig r;
    lfm2_params p = small_params();

    ck_assert(n > 0 && n <= 100);
    for (int i = 0; i < n; i++)
        tokens[i] = (int32_t)number_at(ids, (size_t)i);
    p.kv_type = kv_type;
    rig_open_file(&r, file, p);
    ck_assert(logits.n == 4 * (size_t)n * (size_t)r.n_vocab);
    double *exact = malloc(2 * logits.n);
    for (size_t i = 0; i < logits.n / 4; i++) {
        const uint32_t bits = number_at(logits, i);
        float f;
        memcpy(&f, &bits, sizeof f);
        exact[i] = (double)f;
    }
    float *l = all_logits(&r, tokens, n);
    struct distance d = compare(l, exact, n, r.n_vocab);
    free(l);
    free(exact);
    free(ids.p);
    free(logits.p);
    rig_close(&r);
    return d;
}

static struct distance from_golden(const char *name, int kv_type)
{
    char path[128];
    struct bytes file, ids, logits;

    snprintf(path, sizeof path, "golden/%s.gguf", name);
    file = load_file(shared_file(path));
    snprintf(path, sizeof path, "golden/%s.logits.f32", name);
    logits = load_file(shared_file(path));
    ids = load_file(shared_file("golden/tokens.i32"));
    return from_logits(file, ids, logits, kv_type);
}

START_TEST(golden_models_are_as_near_as_the_peer_or_nearer)
{
    struct distance d = from_golden(golden[_i].name, LFM2_KV_F16);

    EXPECT_MSG(d.kl <= golden[_i].share * golden[_i].peer,
               "%s: KL %.3g is %.2f of %.3g", golden[_i].name, d.kl,
               d.kl / golden[_i].peer, golden[_i].peer);
}
END_TEST

START_TEST(golden_floats_are_exact_but_for_rounding)
{
    struct distance d = from_golden(_i ? "small_moe-F32" : "small_dense-F32",
                                    LFM2_KV_F32);

    EXPECT_MSG(d.nmse < 1e-11, "NMSE %g", d.nmse);
}
END_TEST

/* The forward pass of scripts/train_tiny.py is the second implementation; it
 * wrote these logits from the dequantised weights. */
START_TEST(the_shipped_model_computes_what_its_training_script_does)
{
    struct distance d = from_logits(load_file("test/tiny.gguf"),
                                    load_file("test/tiny.ids"),
                                    load_file("test/tiny.logits"),
                                    LFM2_KV_F16);

    EXPECT_MSG(d.kl < 2e-3, "KL %g", d.kl);
}
END_TEST

/* ------------------------------------------------- against itself, bit for bit
 *
 * 280 tokens: over a border of attention chunks, many of tiles and batches. */

enum { LONG = 280 };

static const struct tiny kinds[] = {
    { .type = 2, .moe = 1 }, { .type = 12 }, { .type = 0, .moe = 1 }
};
enum { N_KINDS = COUNT(kinds) };

static struct rig long_rig(int kind, int32_t *tokens, float **logits)
{
    struct rig r = rig_open(kinds[kind], small_params());

    random_tokens(tokens, LONG, r.n_vocab, 11);
    *logits = all_logits(&r, tokens, LONG);
    return r;
}

static const float *row(const struct rig *r, const float *logits, int t)
{
    return logits + (size_t)t * (size_t)r->n_vocab;
}

static void expect_same(const struct rig *r, const float *a, const float *b,
                        int rows, const char *what)
{
    EXPECT_MSG(memcmp(a, b, (size_t)rows * (size_t)r->n_vocab * sizeof *a) == 0,
               "%s: other bits", what);
}

START_TEST(token_by_token_is_the_same_as_all_at_once)
{
    int32_t tokens[LONG];
    float *all;
    struct rig r = long_rig(_i, tokens, &all);

    lfm2_seq_trim(r.ctx, 0, 0);
    for (int t = 0; t < LONG; t++) {
        feed(&r, 0, tokens + t, 1, 1);
        expect_same(&r, lfm2_logits(r.ctx, 0, 0), row(&r, all, t), 1, "token");
    }
    free(all);
    rig_close(&r);
}
END_TEST

START_TEST(every_cut_is_the_same)
{
    static const int cuts[] = { 65, 257, 1, 279, 2, 3, 63, 255 };
    int32_t tokens[LONG];
    float *all;
    struct rig r = long_rig(_i, tokens, &all);

    for (size_t i = 0; i < SOME_OF(COUNT(cuts)); i++) {
        const int cut = cuts[i];
        lfm2_seq_trim(r.ctx, 0, 0);
        feed(&r, 0, tokens, cut, 0);
        feed(&r, 0, tokens + cut, LONG - cut, LONG - cut);
        expect_same(&r, lfm2_logits(r.ctx, 0, 0), row(&r, all, cut),
                    LONG - cut, "cut");
    }
    free(all);
    rig_close(&r);
}
END_TEST

START_TEST(batch_and_threads_change_nothing)
{
    static const struct { int batch, threads; } way[] = {
        { 33, 1 }, { 3, 1 }, { LONG, 2 },     /* enough to share             */
        { 1, 1 }, { 1024, 1 }, { LONG, 3 }
    };
    int32_t tokens[LONG];
    float *all;
    struct rig r = long_rig(_i, tokens, &all);

    for (size_t i = 0; i < SOME_OF(COUNT(way)); i++) {
        lfm2_params p = small_params();
        struct rig other = { .model = r.model, .n_vocab = r.n_vocab };
        p.n_batch = way[i].batch;
        p.n_threads = way[i].threads;
        ck_assert(lfm2_context_open(&other.ctx, r.model, &p, NULL) == 0);
        float *l = all_logits(&other, tokens, LONG);
        expect_same(&r, l, all, LONG,
                    p.n_threads == 1 ? "batch" : "threads");
        free(l);
        lfm2_context_close(other.ctx);
    }
    free(all);
    rig_close(&r);
}
END_TEST

/* Four strangers, of other lengths and at other positions, share each call. */
START_TEST(neighbours_in_the_batch_change_nothing)
{
    int32_t tokens[LONG], noise[LONG];
    float *all;
    struct rig r = long_rig(_i, tokens, &all);

    random_tokens(noise, LONG, r.n_vocab, 12);
    lfm2_seq_trim(r.ctx, 0, 0);
    for (int t = 0, n; t < LONG; t += n) {
        n = LONG - t < 1 + t / 5 ? LONG - t : 1 + t / 5;
        lfm2_span spans[4] = {
            { 2, noise + t / 2, 1 + t % 3, 1 }, { 0, tokens + t, n, n },
            { 3, noise + t / 3, 2, 0 }, { 1, noise, 1, 1 }
        };
        ck_assert(lfm2_forward(r.ctx, spans, 4, NULL) == 0);
        expect_same(&r, lfm2_logits(r.ctx, 1, 0), row(&r, all, t), n,
                    "neighbours");
    }
    free(all);
    rig_close(&r);
}
END_TEST

START_TEST(logits_that_nobody_asked_for_change_nothing)
{
    int32_t tokens[LONG];
    float *all;
    struct rig r = long_rig(_i, tokens, &all);

    lfm2_seq_trim(r.ctx, 0, 0);
    feed(&r, 0, tokens, LONG, 3);
    expect_same(&r, lfm2_logits(r.ctx, 0, 0), row(&r, all, LONG - 3), 3,
                "last three");
    ck_assert(lfm2_logits(r.ctx, 0, 3) == NULL);
    ck_assert(lfm2_logits(r.ctx, 1, 0) == NULL);
    ck_assert(lfm2_logits(r.ctx, -1, 0) == NULL);
    ck_assert(lfm2_logits(r.ctx, 0, -1) == NULL);
    free(all);
    rig_close(&r);
}
END_TEST

START_TEST(mapped_read_and_borrowed_files_are_the_same)
{
    char path[] = "build/test/model-XXXXXX";
    int fd = mkstemp(path);
    int32_t tokens[50];
    struct rig r = rig_open(kinds[_i], small_params());
    float *all;

    ck_assert(fd >= 0);
    ck_assert(write(fd, r.file.p, r.file.n) == (ssize_t)r.file.n);
    close(fd);
    random_tokens(tokens, 50, r.n_vocab, 13);
    all = all_logits(&r, tokens, 50);
    for (int load = LFM2_LOAD_MAP; load <= LFM2_LOAD_READ; load++) {
        struct rig other = { .n_vocab = r.n_vocab };
        lfm2_params p = small_params();
        ck_assert(lfm2_model_open(&other.model, path, load, NULL) == 0);
        ck_assert(lfm2_context_open(&other.ctx, other.model, &p, NULL) == 0);
        float *l = all_logits(&other, tokens, 50);
        expect_same(&r, l, all, 50, load ? "read" : "mapped");
        free(l);
        rig_close(&other);
    }
    unlink(path);
    free(all);
    rig_close(&r);
}
END_TEST

/* ------------------------------------------------------------------- failures */

/* Feed, fail in every way there is, go on: as if nothing had been. */
START_TEST(a_failed_call_changes_nothing)
{
    int32_t tokens[LONG], bad[3] = { 1, 2, 264 }, low[1] = { -1 };
    float *all;
    struct rig r = long_rig(_i, tokens, &all);
    const lfm2_span wrong[] = {
        { 0, bad, 3, 1 }, { 0, low, 1, 1 }, { 4, tokens, 1, 1 },
        { -1, tokens, 1, 1 }, { 0, tokens, 0, 0 }, { 0, tokens, 2, 3 },
        { 0, tokens, 1, -1 }, { 0, NULL, 1, 1 }, { 0, tokens, -5, 0 }
    };
    const lfm2_span twice[2] = { { 0, tokens, 1, 1 }, { 0, tokens, 1, 1 } };
    const lfm2_span full = { 0, tokens, 200, 0 };
    const lfm2_span good = { 0, tokens + 250, 30, 30 };
    lfm2_error err;

    lfm2_seq_trim(r.ctx, 0, 0);
    feed(&r, 0, tokens, 250, 0);
    for (size_t i = 0; i < COUNT(wrong); i++)
        ck_assert_int_eq(lfm2_forward(r.ctx, &wrong[i], 1, &err), LFM2_EARG);
    ck_assert_int_eq(lfm2_forward(r.ctx, twice, 2, &err), LFM2_EARG);
    ck_assert_int_eq(lfm2_forward(r.ctx, NULL, 1, &err), LFM2_EARG);
    ck_assert_int_eq(lfm2_forward(r.ctx, twice, 0, &err), LFM2_EARG);
    ck_assert_int_eq(lfm2_forward(r.ctx, &full, 1, &err), LFM2_EFULL);
    ck_assert_str_eq(err.msg, "sequence 0: 250 tokens and 200 more, expected "
                     "at most 320 (n_ctx)");
    lfm2_cancel(r.ctx);
    ck_assert_int_eq(lfm2_forward(r.ctx, &good, 1, &err), LFM2_ECANCELLED);
    ck_assert_int_eq(lfm2_seq_len(r.ctx, 0), 250);
    ck_assert(lfm2_logits(r.ctx, 0, 0) == NULL);
    ck_assert_int_eq(lfm2_forward(r.ctx, &good, 1, &err), LFM2_OK);
    expect_same(&r, lfm2_logits(r.ctx, 0, 0), row(&r, all, 250), 30, "after");
    free(all);
    rig_close(&r);
}
END_TEST

/* Cancel in the middle of a call of many passes, from another thread. */
static void *cancel_soon(void *ctx)
{
    struct timespec t = { 0, 2000000 };

    nanosleep(&t, NULL);
    lfm2_cancel(ctx);
    return NULL;
}

START_TEST(cancelled_in_the_middle_nothing_is_left_of_it)
{
    int32_t tokens[LONG];
    float *all;
    pthread_t thread;
    struct rig r = long_rig(_i, tokens, &all);
    lfm2_span rest = { 0, tokens + 100, 180, 180 };

    lfm2_seq_trim(r.ctx, 0, 0);
    feed(&r, 0, tokens, 100, 0);
    pthread_create(&thread, NULL, cancel_soon, r.ctx);
    int code = lfm2_forward(r.ctx, &rest, 1, NULL);
    pthread_join(thread, NULL);
    if (code == LFM2_ECANCELLED) {
        ck_assert_int_eq(lfm2_seq_len(r.ctx, 0), 100);
        ck_assert(lfm2_forward(r.ctx, &rest, 1, NULL) == LFM2_OK);
    }
    expect_same(&r, lfm2_logits(r.ctx, 0, 0), row(&r, all, 100), 180, "after");
    free(all);
    rig_close(&r);
}
END_TEST

/* A weight that is no finite number must reach the logits, not hide in a maximum:
 * NaN, infinity; NaN as the scale of every other block of Q4_0, or with infinity
 * in turn. */
static const struct { uint32_t bits; int type; } not_finite[] = {
    { 0x7fc00000, 0 }, { 0x7f800000, 0 }, { 0x7fc00000, 2 }, { 0x7f807c00, 2 }
};

START_TEST(numbers_that_are_not_finite_are_an_error_at_sampling)
{
    static const char *const name[] = {
        "blk.0.shortconv.in_proj.weight", "blk.1.attn_k.weight",
        "blk.1.attn_v.weight", "blk.0.ffn_up.weight",
        "blk.2.ffn_gate_inp.weight", "token_embd.weight"
    };
    const int type = not_finite[_i / 6].type;
    const struct edit edits[2] = {
        { FILL, name[_i % 6], 0, not_finite[_i / 6].bits, 0, 0 }
    };
    struct rig r = rig_open((struct tiny){ .moe = 1, .type = type,
                                           .edits = edits }, small_params());
    const int32_t tokens[4] = { 1, 2, 3, 4 };
    lfm2_sampler greedy = { 0 };

    feed(&r, 0, tokens, 4, 1);
    ck_assert_int_eq(lfm2_sample(r.ctx, &greedy, lfm2_logits(r.ctx, 0, 0),
                                 NULL, 0), LFM2_ENAN);
    rig_close(&r);
}
END_TEST

Suite *forward_suite(void)
{
    Suite *s = suite_create("forward");
    TCase *c = tcase_create("forward");
#ifdef __SANITIZE_ADDRESS__               /* others run the same code, sooner */
    const int is_sanitized = 1;
#else
    const int is_sanitized = 0;
#endif

    tcase_set_timeout(c, 300);
    tcase_add_loop_test(c, every_weight_type_is_near_the_exact_result, 0,
                        2 * N_WEIGHT_TYPES);
    tcase_add_loop_test(c, a_half_precision_cache_is_nearly_as_good, 0, 2);
    tcase_add_loop_test(c, every_form_of_file_computes_the_same, 0, 8);
    if (shared_file("golden/tokens.i32")) {
        tcase_add_loop_test(c, golden_models_are_as_near_as_the_peer_or_nearer,
                            0, is_sanitized ? 0 : (int)COUNT(golden));
        tcase_add_loop_test(c, golden_floats_are_exact_but_for_rounding, 0, 2);
    }
    tcase_add_test(c, the_shipped_model_computes_what_its_training_script_does);
    tcase_add_loop_test(c, token_by_token_is_the_same_as_all_at_once, 0,
                        N_KINDS);
    tcase_add_loop_test(c, every_cut_is_the_same, 0, N_KINDS);
    tcase_add_loop_test(c, batch_and_threads_change_nothing, 0, N_KINDS);
    tcase_add_loop_test(c, neighbours_in_the_batch_change_nothing, 0, N_KINDS);
    tcase_add_loop_test(c, logits_that_nobody_asked_for_change_nothing, 0,
                        N_KINDS);
    tcase_add_loop_test(c, mapped_read_and_borrowed_files_are_the_same, 0,
                        N_KINDS);
    tcase_add_loop_test(c, a_failed_call_changes_nothing, 0, N_KINDS);
    tcase_add_loop_test(c, cancelled_in_the_middle_nothing_is_left_of_it, 0,
                        N_KINDS);
    tcase_add_loop_test(c, numbers_that_are_not_finite_are_an_error_at_sampling,
                        0, 6 * (int)COUNT(not_finite));
    suite_add_tcase(s, c);
    return s;
}
