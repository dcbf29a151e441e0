/* A caller may have set another rounding mode, or that small numbers are taken
 * for 0: every call gives the same bits all the same, from all threads, and
 * the caller finds what was set. */
#include "../lfm2.h"

#include "util.h"

#include <check.h>
#include <fenv.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- settings */

/* FLUSH: results that would be subnormal are 0.  IS_ZERO: so are operands. */
#if defined __SSE__
#include <xmmintrin.h>
enum { FLUSH = 0x8000, IS_ZERO = 0x0040 };

static unsigned control(void)
{
    return _mm_getcsr();
}

static void set_control(unsigned c)
{
    _mm_setcsr(c);
}
#elif defined __aarch64__
enum { FLUSH = 1 << 24, IS_ZERO = 1 << 24 };       /* one bit for both       */

static unsigned control(void)
{
    unsigned long c;

    __asm__ volatile("mrs %0, fpcr" : "=r"(c));
    return (unsigned)c;
}

static void set_control(unsigned c)
{
    __asm__ volatile("msr fpcr, %0" : : "r"((unsigned long)c));
}
#else
enum { FLUSH = 0, IS_ZERO = 0 };

static unsigned control(void)
{
    return 0;
}

static void set_control(unsigned c)
{
    (void)c;
}
#endif

static unsigned get_flush(void)
{
    return control() & (FLUSH | IS_ZERO);
}

static void set_flush(unsigned flush)
{
    set_control((control() & ~(unsigned)(FLUSH | IS_ZERO)) | flush);
}

struct setting { int rounding; unsigned flush; };

static const struct setting settings[] = {
    { FE_TONEAREST, 0 },
    { FE_TONEAREST, FLUSH | IS_ZERO },
    { FE_TONEAREST, FLUSH },
    { FE_TONEAREST, IS_ZERO },
#ifdef FE_UPWARD
    { FE_UPWARD, 0 },
#endif
#ifdef FE_DOWNWARD
    { FE_DOWNWARD, 0 },
#endif
#ifdef FE_TOWARDZERO
    { FE_TOWARDZERO, FLUSH | IS_ZERO },
#endif
};
enum { N_SETTINGS = COUNT(settings) };

static void set(struct setting s)
{
    set_flush(s.flush);
    ck_assert(fesetround(s.rounding) == 0);
    feclearexcept(FE_ALL_EXCEPT);
}

/* They are in force, and no flag has been raised since. */
static void expect_set(struct setting s, const char *after)
{
    EXPECT_MSG(fegetround() == s.rounding && get_flush() == s.flush &&
               fetestexcept(FE_ALL_EXCEPT) == 0,
               "%s changed the caller's settings", after);
}

/* Otherwise this suite would show nothing. */
START_TEST(the_settings_are_in_force)
{
    const volatile float tiny = 0x1p-130f, three = 3;
    volatile float up, half, two;

    for (int i = 0; i < N_SETTINGS; i++) {
        set(settings[i]);
        up = 1 / three;
        half = 0x1p-126f * (three / 4);
        two = tiny * 0x1p10f;
        set(settings[0]);
        EXPECT((up > 0x1.555554p-2f) == (settings[i].rounding == FE_TONEAREST ||
                                         settings[i].rounding == FE_UPWARD));
        EXPECT((half > 0) == !(settings[i].flush & FLUSH));
        EXPECT((two > 0) == !(settings[i].flush & IS_ZERO));
    }
}
END_TEST

/* ----------------------------------------------------------------- results */

/* Wide enough that a pass is shared by the threads, and with scales that are
 * subnormal as halves. */
static const struct tiny kinds[] = {
    { .type = 14, .seed = 3 }, { .type = 14, .moe = 1, .seed = 3 }
};
enum { N = 24, N_VOCAB = 264, WIDTH = 256, N_DRAWS = 100 };

/* Everything that floats come into, for one setting. */
struct results {
    float logits[N + 1][N_VOCAB], state[WIDTH], row[8][WIDTH];
    float penalised[N_VOCAB], math[5][200];
    int32_t drawn[2][N_DRAWS];
    char values[40][64];
};

static int32_t tokens[N];
static float angle[200], almost_equal[N_VOCAB];

static void setup(void)
{
    uint64_t rng = 5;

    for (int i = 0; i < N; i++)
        tokens[i] = (int32_t)(random_u32(&rng) % N_VOCAB);
    for (int i = 0; i < 200; i++)
        angle[i] = (float)i * 0.7f;
    for (int i = 0; i < N_VOCAB; i++)
        almost_equal[i] = i < 20 ? (float)-i * 0x1p-132f : -INFINITY;
}

static void run_model(struct results *r, lfm2_context *ctx, struct setting s)
{
    const lfm2_span prompt[2] = { { 0, tokens, N, N },
                                  { .seq = 1, .tokens = tokens, .n_tokens = N,
                                    .state = 1 } };
    const lfm2_span one = { 0, tokens, 1, 1 };
    lfm2_error err;

    EXPECT_MSG(lfm2_forward(ctx, prompt, 2, &err) == LFM2_OK, "%s", err.msg);
    expect_set(s, "lfm2_forward()");
    memcpy(r->logits, lfm2_logits(ctx, 0, 0), N * sizeof *r->logits);
    memcpy(r->state, lfm2_state(ctx, 1), sizeof r->state);
    EXPECT(lfm2_forward(ctx, &one, 1, NULL) == LFM2_OK);
    memcpy(r->logits[N], lfm2_logits(ctx, 0, 0), sizeof *r->logits);
}

/* Also among logits that only differ by subnormal numbers. */
static void sample(struct results *r, lfm2_context *ctx, struct setting s)
{
    lfm2_sampler usual = { .temperature = 1, .top_k = 100, .top_p = 0.95f,
                           .min_p = 0.001f, .repeat_penalty = 1.3f,
                           .repeat_last_n = N, .rng = 1 };
    lfm2_sampler cold = { .temperature = 0x1p-130f, .top_p = 1, .rng = 1 };
    float logits[N_VOCAB];

    for (int i = 0; i < N_DRAWS; i++) {
        memcpy(logits, r->logits[i % N], sizeof logits);
        r->drawn[0][i] = lfm2_sample(ctx, &usual, logits, tokens, N);
        expect_set(s, "lfm2_sample()");
        memcpy(r->penalised, logits, sizeof logits);
        memcpy(logits, almost_equal, sizeof logits);
        r->drawn[1][i] = lfm2_sample(ctx, &cold, logits, NULL, 0);
    }
}

static void compute(struct results *r, struct setting s)
{
    for (int i = 0; i < 200; i++) {
        r->math[0][i] = lfm2_math(LFM2_EXP, angle[i], 0, 0);
        r->math[1][i] = lfm2_math(LFM2_SIN, angle[i], 0, 0);
        r->math[2][i] = lfm2_math(LFM2_COS, angle[i], 0, 0);
        r->math[3][i] = lfm2_math(LFM2_FMA, angle[i], 0.1f, 0.3f);
        r->math[4][i] = lfm2_math(LFM2_FMA, angle[i], 0x1p-140f, 0x1p-140f);
        expect_set(s, "lfm2_math()");
    }
}

static void read_file(struct results *r, const lfm2_model *m, struct setting s)
{
    for (int i = 0; i < 8; i++) {
        EXPECT(lfm2_model_row(m, 0, (uint64_t)i, r->row[i]) == LFM2_OK);
        expect_set(s, "lfm2_model_row()");
    }
    for (int i = 0; i < 40; i++)
        if (lfm2_model_key(m, i, r->values[i], sizeof r->values[i]))
            expect_set(s, "lfm2_model_key()");
}

/* Open all of it with the setting in force, so that workers inherit it. */
static struct results *all_results(struct bytes file, struct setting s,
                                   int n_threads)
{
    const lfm2_params p = { .n_ctx = 2 * N, .n_seq = 2, .n_batch = 64,
                            .n_logits = N, .n_threads = n_threads };
    struct results *r = calloc(1, sizeof *r);
    lfm2_context *ctx;
    lfm2_model *m;

    ck_assert(r != NULL);
    set(s);
    EXPECT(lfm2_model_open_memory(&m, file.p, file.n, NULL) == LFM2_OK);
    expect_set(s, "lfm2_model_open_memory()");
    EXPECT(lfm2_context_open(&ctx, m, &p, NULL) == LFM2_OK);
    expect_set(s, "lfm2_context_open()");
    run_model(r, ctx, s);
    sample(r, ctx, s);
    compute(r, s);
    read_file(r, m, s);
    set(settings[0]);
    lfm2_context_close(ctx);
    lfm2_model_close(m);
    return r;
}

#define EXPECT_SAME(field)                                              \
    EXPECT_MSG(memcmp(a->field, b->field, sizeof a->field) == 0,        \
               "setting %d, %d threads: other bits in %s", i, n_threads, #field)

static void expect_same(const struct results *a, const struct results *b, int i,
                        int n_threads)
{
    EXPECT_SAME(row);
    EXPECT_SAME(values);
    EXPECT_SAME(math);
    EXPECT_SAME(logits);
    EXPECT_SAME(state);
    EXPECT_SAME(penalised);
    EXPECT_SAME(drawn);
}

START_TEST(a_callers_settings_change_no_bit_and_are_given_back)
{
    struct bytes file = tiny_model(&kinds[_i]);
    struct results *expected = all_results(file, settings[0], 1);

    for (int i = 1; i < N_SETTINGS; i++)
        for (int n_threads = 1; n_threads <= 3; n_threads += 2) {
            struct results *r = all_results(file, settings[i], n_threads);
            expect_same(expected, r, i, n_threads);
            free(r);
        }
    free(expected);
    free(file.p);
}
END_TEST

/* The draws above are of more than one token, the rows have small numbers. */
START_TEST(there_is_something_to_change)
{
    struct bytes file = tiny_model(&kinds[0]);
    struct results *r = all_results(file, settings[0], 1);
    int other[2] = { 0 };

    for (int i = 1; i < N_DRAWS; i++)
        for (int k = 0; k < 2; k++)
            other[k] += r->drawn[k][i] != r->drawn[k][0];
    ck_assert(other[0] > 10 && other[1] > 10);
    ck_assert(r->math[4][1] > 0 && r->math[4][199] < 0x1p-126f);
    free(r);
    free(file.p);
}
END_TEST

Suite *arithmetic_suite(void)
{
    Suite *s = suite_create("the caller's arithmetic");
    TCase *c = tcase_create("the caller's arithmetic");

    tcase_set_timeout(c, 300);
    tcase_add_unchecked_fixture(c, setup, NULL);
    tcase_add_test(c, the_settings_are_in_force);
    tcase_add_test(c, there_is_something_to_change);
    tcase_add_loop_test(c, a_callers_settings_change_no_bit_and_are_given_back,
                        0, (int)COUNT(kinds));
    suite_add_tcase(s, c);
    return s;
}
