/* The sampler, against a plain one: everything sorted, everything in double. */
#include "../lfm2.c"

#include <check.h>

enum { N = 1000 };

/* A context that can do nothing but sample from n tokens. */
struct stand_in {
    lfm2_context ctx;
    struct lfm2_model model;
    struct candidate candidates[N];
};

static lfm2_context *stand_in(struct stand_in *s, int n)
{
    memset(s, 0x77, sizeof *s);           /* it must not need to be clean    */
    s->model.cfg.n_vocab = n;
    s->ctx.model = &s->model;
    s->ctx.candidates = s->candidates;
    return &s->ctx;
}

static const lfm2_sampler plain = {
    .temperature = 1, .top_p = 1, .repeat_penalty = 1
};

/* Sample once, without a history. */
static int32_t sample(const float *logits, int n, const lfm2_sampler *s,
                      uint64_t seed)
{
    struct stand_in stand;
    lfm2_sampler with_seed = *s;
    float copy[N];

    memcpy(copy, logits, (size_t)n * sizeof *copy);
    with_seed.rng = seed;
    return lfm2_sample(stand_in(&stand, n), &with_seed, copy, NULL, 0);
}

static double uniform(uint64_t *rng)
{
    *rng = *rng * 6364136223846793005u + 1442695040888963407u;
    return (double)(*rng >> 11) * 0x1p-53;
}

/* ---------------------------------------------------------- the plain one */

struct sorted { double p; int32_t id; };

static int compare(const void *a, const void *b)
{
    const struct sorted *x = a, *y = b;

    return x->p != y->p ? (x->p < y->p ? 1 : -1) : x->id < y->id ? -1 : 1;
}

/* The probability of every token. */
static void probabilities(double *out, const float *logits, int n,
                          const lfm2_sampler *s)
{
    struct sorted list[N];
    double sum = 0, mass = 0;
    int kept = n;

    for (int i = 0; i < n; i++) {
        list[i] = (struct sorted){ (double)logits[i], i };
        out[i] = 0;
    }
    qsort(list, (size_t)n, sizeof *list, compare);
    if (s->top_k > 0 && s->top_k < n)
        kept = s->top_k;
    for (int i = 0; i < kept; i++)
        sum += exp(list[i].p - list[0].p);
    for (int i = 0; s->top_p < 1 && i < kept; i++) {
        mass += exp(list[i].p - list[0].p) / sum;
        if (mass >= s->top_p)
            kept = i + 1;
    }
    while (kept > 1 && exp(list[kept - 1].p - list[0].p) < s->min_p)
        kept--;
    sum = 0;
    for (int i = 0; i < kept; i++)
        sum += exp((list[i].p - list[0].p) / s->temperature);
    for (int i = 0; i < kept; i++)
        out[list[i].id] = exp((list[i].p - list[0].p) / s->temperature) / sum;
}

/* ------------------------------------------------------------------- tests */

static const lfm2_sampler settings[] = {
    { 1, 0, 1, 0, 1, 0, 0 },          { 0.3f, 0, 1, 0.15f, 1.05f, 64, 0 },
    { 0.1f, 50, 0.1f, 0, 1, 0, 0 },   { 1, 50, 1, 0, 1, 0, 0 },
    { 1, 1, 1, 0, 1, 0, 0 },          { 1, 0, 0.9f, 0, 1, 0, 0 },
    { 2, 0, 0.999f, 0, 1, 0, 0 },     { 1.5f, 0, 0.9f, 0.05f, 1, 0, 0 },
    { 2, 20, 0.95f, 0, 1, 0, 0 },     { 2, 20, 0.95f, 0.3f, 1, 0, 0 },
    { 1, 5000, 1, 0.01f, 1, 0, 0 },   { 1, 999, 0.5f, 0.001f, 1, 0, 0 },
};

/* Draw often; chi squared must not be absurd, and nothing may come that has no
 * probability.  Near a limit rounding may decide, so few tokens are used and
 * the limits lie between them. */
START_TEST(frequencies_are_the_probabilities)
{
    enum { N_TOKENS = 12, DRAWS = 20000 };
    const float logits[N_TOKENS] = { -3, 1.5f, 0.5f, 4, -8, 3.25f, 2, 0.5f, 3,
                                   -INFINITY, -1, 2.75f };
    double p[N_TOKENS], chi = 0;
    int count[N_TOKENS] = { 0 }, n = 0;

    probabilities(p, logits, N_TOKENS, &settings[_i]);
    for (uint64_t seed = 0; seed < DRAWS; seed++) {
        const int32_t id = sample(logits, N_TOKENS, &settings[_i], seed);
        ck_assert(id >= 0 && id < N_TOKENS);
        count[id]++;
    }
    for (int i = 0; i < N_TOKENS; i++) {
        const double expected = p[i] * DRAWS;
        ck_assert(count[i] == 0 || p[i] > 0);
        if (expected >= 5) {
            chi += (count[i] - expected) * (count[i] - expected) / expected;
            n++;
        }
    }
    ck_assert_msg(chi < 3 * n + 20, "chi squared %g over %d", chi, n);
}
END_TEST

/* The tokens that are left over are those the plain one leaves over, whatever
 * the numbers, with many ties. */
START_TEST(the_right_candidates_are_left)
{
    static struct stand_in stand;
    uint64_t rng = (uint64_t)_i + 1;
    float logits[N];
    double p[N];

    for (int round = 0; round < 200; round++) {
        const int n = 1 + (int)(uniform(&rng) * N);
        const double spread = 10 * uniform(&rng);
        lfm2_context *ctx = stand_in(&stand, n);
        int32_t best;
        int kept, expected = 0, wrong = 0;
        for (int i = 0; i < n; i++)
            logits[i] = (float)floor(64 * spread * uniform(&rng)) / 64;
        best = highest(logits, n);
        probabilities(p, logits, n, &settings[_i]);
        kept = choose_candidates(&settings[_i], ctx->candidates, logits, n,
                                 logits[best]);
        for (int i = 0; i < n; i++)
            expected += p[i] > 0;
        for (int i = 0; i < kept; i++)
            wrong += !(p[ctx->candidates[i].id] > 0);
        if (kept != expected || wrong > 0)
            ck_abort_msg("%d of %d left, expected %d; %d are wrong", kept, n,
                         expected, wrong);
    }
}
END_TEST

START_TEST(greedy_takes_the_first_of_the_best)
{
    const float logits[] = { 1, 5, -2, 5, 4.99f };
    const float temperature[] = { 0, -1, -0.0f, NAN, -INFINITY };
    lfm2_sampler s = plain;

    for (size_t i = 0; i < COUNT(temperature); i++) {
        s.temperature = temperature[i];
        for (uint64_t seed = 0; seed < 50; seed++)
            ck_assert_int_eq(sample(logits, 5, &s, seed), 1);
    }
    s = plain;
    s.top_k = 1;                          /* ties go to the lower id here too */
    for (uint64_t seed = 0; seed < 50; seed++)
        ck_assert_int_eq(sample(logits, 5, &s, seed), 1);
}
END_TEST

START_TEST(a_seed_means_the_same_everywhere)
{
    struct stand_in stand;
    lfm2_context *ctx = stand_in(&stand, 8);
    lfm2_sampler s = plain;
    float logits[8] = { 0, 0.5f, 1, 1.5f, 2, 1, 0.25f, -1 };
    static const int32_t expected[] = {
        4, 2, 3, 3, 0, 5, 2, 5, 3, 4, 2, 4, 4, 4, 4, 2
    };
    uint64_t state = 1234567;

    /* the first two numbers of the generator, as published */
    random_next(&state);
    ck_assert(state == 1234567 + 0x9e3779b97f4a7c15u);
    state = 1234567;
    ck_assert(random_next(&state) == (6457827717110365317u >> 11) * 0x1p-53);
    ck_assert(random_next(&state) == (3203168211198807973u >> 11) * 0x1p-53);
    s.rng = 42;
    for (size_t i = 0; i < COUNT(expected); i++)
        ck_assert_int_eq(lfm2_sample(ctx, &s, logits, NULL, 0), expected[i]);
    ck_assert(s.rng == 42 + COUNT(expected) * 0x9e3779b97f4a7c15u);
}
END_TEST

START_TEST(bad_logits_are_an_error)
{
    static const float row[][3] = {
        { NAN, 1, 2 }, { 1, NAN, 2 }, { 1, 2, NAN }, { 0, INFINITY, 1 },
        { -INFINITY, -INFINITY, -INFINITY }, { NAN, NAN, NAN },
    };

    for (size_t i = 0; i < COUNT(row); i++)
        for (size_t k = 0; k < COUNT(settings); k++) {
            struct stand_in stand;
            lfm2_sampler s = settings[k];
            const int32_t history[] = { 0, 1, 2 };
            float copy[3];
            memcpy(copy, row[i], sizeof copy);
            s.rng = 99;
            ck_assert_int_eq(lfm2_sample(stand_in(&stand, 3), &s, copy, history,
                                         3), LFM2_ENAN);
            ck_assert(s.rng == 99 && memcmp(copy, row[i], sizeof copy) == 0);
        }
}
END_TEST

START_TEST(ruled_out_tokens_never_come)
{
    float logits[100];

    for (int i = 0; i < 100; i++)
        logits[i] = i % 9 == 4 ? (float)i / 50 : -INFINITY;
    for (size_t k = 0; k < COUNT(settings); k++)
        for (uint64_t seed = 0; seed < 200; seed++)
            ck_assert_int_eq(sample(logits, 100, &settings[k], seed) % 9, 4);
}
END_TEST

START_TEST(odd_settings_leave_a_token)
{
    static const float odd[] = { NAN, -INFINITY, -1, 0, 1e-45f, 1e-38f, 1, 2,
                                 1e30f, FLT_MAX, INFINITY };
    const float logits[][3] = { { -FLT_MAX, FLT_MAX, 0 }, { 0, 0, 0 },
                                { -1e30f, -1e30f, -INFINITY }, { 3, 1, 2 } };
    const int32_t history[] = { 1, -5, 3, INT32_MAX, 1, 0 };
    const int n = COUNT(odd);

    for (size_t l = 0; l < COUNT(logits); l++)
        for (int i = 0; i < n * n * n * n; i++) {
            struct stand_in stand;
            lfm2_sampler s = { odd[i % n], i % 5 - 1, odd[i / n % n],
                               odd[i / n / n % n], odd[i / n / n / n],
                               i % 9 - 1, (uint64_t)i };
            float copy[3];
            int32_t id;
            memcpy(copy, logits[l], sizeof copy);
            id = lfm2_sample(stand_in(&stand, 3), &s, copy, history, 6);
            if (id < 0 || id > 2 || !(logits[l][id] >= -FLT_MAX))
                ck_abort_msg("token %d with settings %d", id, i);
        }
    for (size_t i = 0; i < COUNT(settings); i++)
        ck_assert_int_eq(sample(logits[0], 1, &settings[i], i), 0);
}
END_TEST

START_TEST(repetition_is_penalised_once)
{
    static const struct { int last_n, n; float penalty, expected[3]; } row[] = {
        { 64, 7, 2, { 1, -8, 3 } },       /* all; token 0 only once          */
        { 3, 7, 2, { 1, -8, 6 } },        /* only { -1, 1, 0 }               */
        { 1, 7, 2, { 1, -4, 6 } },        { 64, 7, 0.5f, { 4, -2, 12 } },
        { 64, 7, 1, { 2, -4, 6 } },       { 64, 7, 0, { 2, -4, 6 } },
        { 64, 7, -2, { 2, -4, 6 } },      { 64, 7, NAN, { 2, -4, 6 } },
        { 64, 7, INFINITY, { 2, -4, 6 } },
        { 0, 7, 2, { 2, -4, 6 } },        { -1, 7, 2, { 2, -4, 6 } },
        { 64, 0, 2, { 2, -4, 6 } },       { 64, -1, 2, { 2, -4, 6 } },
        { INT_MAX, 7, 2, { 1, -8, 3 } },
    };
    const int32_t history[] = { 2, 3, 0, 4, -1, 1, 0 };     /* 4, -1: no ids */

    for (size_t i = 0; i < COUNT(row); i++) {
        struct stand_in stand;
        lfm2_sampler s = plain;
        float logits[] = { 2, -4, 6, -INFINITY };
        s.repeat_last_n = row[i].last_n;
        s.repeat_penalty = row[i].penalty;
        lfm2_sample(stand_in(&stand, 4), &s, logits, history, row[i].n);
        ck_assert(memcmp(logits, row[i].expected, sizeof row[i].expected) == 0);
        ck_assert(logits[3] < -FLT_MAX);
    }
}
END_TEST

static int all_that_come(const float *logits, int n, const lfm2_sampler *s)
{
    int seen = 0;

    for (uint64_t seed = 0; seed < 300; seed++)
        seen |= 1 << sample(logits, n, s, seed);
    return seen;
}

/* Were the temperature to come first, all four would stay; and top-p sees what
 * top-k leaves. */
START_TEST(each_step_has_its_place)
{
    const float logits[] = { 4, 2, 1, 0 };
    lfm2_sampler s = plain;

    s.temperature = 1000;
    s.top_p = 0.9f;                       /* 0.83, 0.94: two are enough      */
    ck_assert_int_eq(all_that_come(logits, 4, &s), 1 << 0 | 1 << 1);
    s.top_p = 1;
    s.min_p = 0.1f;                       /* 1, 0.135, 0.05, 0.02: two again */
    ck_assert_int_eq(all_that_come(logits, 4, &s), 1 << 0 | 1 << 1);
    s.min_p = 0;
    s.top_p = 0.95f;                      /* of four: 0.83, 0.94, 0.98, 1    */
    ck_assert_int_eq(all_that_come(logits, 4, &s), 1 << 0 | 1 << 1 | 1 << 2);
    s.top_k = 3;                          /* of three: 0.84, 0.96, 1         */
    ck_assert_int_eq(all_that_come(logits, 4, &s), 1 << 0 | 1 << 1);
}
END_TEST

Suite *sampler_suite(void)
{
    Suite *s = suite_create("sampler");
    TCase *c = tcase_create("sampler");

    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, frequencies_are_the_probabilities, 0,
                        COUNT(settings));
    tcase_add_loop_test(c, the_right_candidates_are_left, 0, COUNT(settings));
    tcase_add_test(c, greedy_takes_the_first_of_the_best);
    tcase_add_test(c, a_seed_means_the_same_everywhere);
    tcase_add_test(c, bad_logits_are_an_error);
    tcase_add_test(c, ruled_out_tokens_never_come);
    tcase_add_test(c, odd_settings_leave_a_token);
    tcase_add_test(c, repetition_is_penalised_once);
    tcase_add_test(c, each_step_has_its_place);
    suite_add_tcase(s, c);
    return s;
}
