/* The arithmetic below the model: exact where it must be, and close to the
 * truth where it cannot. */
#include "../lfm2.c"

#include "util.h"

#include <check.h>

enum { MILLION = 1000000 };

static int same_bits(float a, float b)
{
    return bits_of(a) == bits_of(b) || (a != a && b != b);
}

START_TEST(fma_is_the_exact_one_on_random_bits)
{
    uint64_t rng = 1;

    for (int i = 0; i < 3 * MILLION; i++) {
        float a = float_of(random_u32(&rng)), b = float_of(random_u32(&rng));
        float c = float_of(random_u32(&rng));
        EXPECT_MSG(same_bits(fma_f32(a, b, c), fmaf(a, b, c)),
                      "fma(%a, %a, %a)", (double)a, (double)b, (double)c);
    }
}
END_TEST

/* Products near the addend, so that they cancel or end in a tie. */
START_TEST(fma_is_the_exact_one_near_ties)
{
    uint64_t rng = 2;

    for (int i = 0; i < 3 * MILLION; i++) {
        float a = (float)((int)(random_u32(&rng) >> 8));
        float b = (float)((int)(random_u32(&rng) >> 20) * 2 + 1);
        float c = ldexpf(random_float(&rng), (int)(random_u32(&rng) % 70) - 10);
        a = ldexpf(a, (int)(random_u32(&rng) % 40) - 20);
        EXPECT_MSG(same_bits(fma_f32(a, b, c), fmaf(a, b, c)),
                      "fma(%a, %a, %a)", (double)a, (double)b, (double)c);
        EXPECT(same_bits(fma_f32(a, b, -a * b), fmaf(a, b, -a * b)));
    }
}
END_TEST

START_TEST(fma_is_the_exact_one_on_special_values)
{
    const float v[] = { 0, -0.0f, 1, -1, INFINITY, -INFINITY, NAN, FLT_MAX,
                        -FLT_MAX, FLT_MIN, 0x1p-149f, -0x1p-149f, 0x1p-75f,
                        0x1.fffffep-126f, 0x1.000002p0f, 3, 0x1p127f };
    const int n = COUNT(v);

    for (int i = 0; i < n * n * n; i++) {
        float a = v[i % n], b = v[i / n % n], c = v[i / n / n];
        EXPECT_MSG(same_bits(fma_f32(a, b, c), fmaf(a, b, c)),
                      "fma(%a, %a, %a)", (double)a, (double)b, (double)c);
    }
}
END_TEST

START_TEST(exp_is_within_one_and_a_half_ulp)
{
    double worst = 0;

    for (int i = -87 * 8192; i <= 88 * 8192; i++) {
        float x = (float)i / 8192, y = exp_f32(x);
        double exact = exp((double)x);
        double ulp = (double)(float_of(bits_of(y) + 1) - y);
        double error = fabs((double)y - exact) / ulp;
        worst = error > worst ? error : worst;
    }
    EXPECT_MSG(worst < 1.5, "%g ulp", worst);
}
END_TEST

START_TEST(exp_at_its_edges)
{
    EXPECT(same_bits(exp_f32(0), 1));
    EXPECT(same_bits(exp_f32(-0.0f), 1));
    EXPECT(same_bits(exp_f32(-87.1f), 0));
    EXPECT(same_bits(exp_f32(-INFINITY), 0));
    EXPECT(same_bits(exp_f32(INFINITY), exp_f32(88)));
    EXPECT(exp_f32(88) < INFINITY);
    EXPECT(exp_f32(NAN) != exp_f32(NAN));
    EXPECT(exp_f32(float_of(0x7fffffff)) != 0);    /* a NaN with a payload */
    EXPECT(sigmoid(-100) >= 0 && sigmoid(-100) < 1e-37f);
    EXPECT(same_bits(sigmoid(100), 1));
}
END_TEST

START_TEST(sine_and_cosine_are_right_for_every_position)
{
    const double freq[] = { 1, 0.6493816315762113, 0.1, 1.3e-3, 1e-6 };

    for (size_t f = 0; f < COUNT(freq); f++)
        for (int pos = 0; pos < 131072; pos += pos < 2048 ? 1 : 97) {
            float s, c;
            sin_cos(pos * freq[f], &s, &c);
            EXPECT(fabs((double)s - sin(pos * freq[f])) < 4e-8);
            EXPECT(fabs((double)c - cos(pos * freq[f])) < 4e-8);
        }
}
END_TEST

/* A float is as near as it can be, but for the error of the angle that is left
 * when whole turns are taken away. */
static int is_near(float y, double exact)
{
    int e;

    frexp(exact, &e);
    return fabs((double)y - exact) < ldexp(1, e - 25) + 1.2e-10;
}

/* The longest context there is has 2^24 positions. */
START_TEST(sine_and_cosine_hold_for_the_longest_context)
{
    uint64_t rng = 6;

    for (int i = 0; i <= 2 * MILLION; i++) {
        float a = i % 2 ? (float)(random_u32(&rng) >> 8)
                        : (random_float(&rng) + 1) * 0x1p23f, s, c;
        if (i == 0)
            a = MAX_CTX;
        sin_cos((double)a, &s, &c);
        EXPECT_MSG(is_near(s, sin((double)a)) && is_near(c, cos((double)a)),
                   "%a: %a and %a", (double)a, (double)s, (double)c);
    }
    ck_assert(same_bits(lfm2_math(LFM2_SIN, 0x1p24f, 0, 0),
                        (float)sin(0x1p24)));
}
END_TEST

/* What was computed before angles above 800,000 were reduced twice. */
START_TEST(sine_and_cosine_are_what_they_were)
{
    uint64_t h = HASH_START;

    for (int i = 0; i < 2 * MILLION; i++) {
        float s, c;
        sin_cos(i * 0.4, &s, &c);
        h = (h ^ bits_of(s)) * 0x100000001b3u;
        h = (h ^ bits_of(c)) * 0x100000001b3u;
    }
    EXPECT_MSG(h == 0x53ed995e49dcb38bu, "hash %016llx", ull(h));
}
END_TEST

START_TEST(roots_are_right)
{
    const double base[] = { 1, 10000, 1e6, 5e6, 1e7, 1e12 };

    for (size_t b = 0; b < COUNT(base); b++)
        for (int n = 1; n <= 128; n = n < 8 ? n + 1 : 2 * n) {
            double r = nth_root(base[b], n);
            EXPECT(fabs(r / pow(base[b], 1.0 / n) - 1) < 1e-14);
        }
}
END_TEST

/* What is computed of a file when it is opened. */
START_TEST(a_model_is_opened_alike_whatever_the_rounding)
{
    static const int modes[] = {
        FE_TONEAREST,
#ifdef FE_UPWARD
        FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO
#endif
    };
    const struct tiny t = { 0 };
    struct bytes file = tiny_model(&t);
    double root = 0;

    for (size_t i = 0; i < COUNT(modes); i++) {
        lfm2_model *m;
        ck_assert(fesetround(modes[i]) == 0);
        ck_assert(lfm2_model_open_memory(&m, file.p, file.n, NULL) == LFM2_OK);
        fesetround(FE_TONEAREST);
        root = i == 0 ? m->rope_root : root;
        ck_assert(memcmp(&root, &m->rope_root, sizeof root) == 0);
        lfm2_model_close(m);
    }
    free(file.p);
}
END_TEST

START_TEST(the_functions_can_be_called_from_outside)
{
    float s, c;

    sin_cos(12.5f, &s, &c);
    ck_assert(same_bits(lfm2_math(LFM2_SIN, 12.5f, 0, 0), s));
    ck_assert(same_bits(lfm2_math(LFM2_COS, 12.5f, 0, 0), c));
    ck_assert(same_bits(lfm2_math(LFM2_EXP, 12.5f, 0, 0), exp_f32(12.5f)));
    ck_assert(same_bits(lfm2_math(LFM2_FMA, 3, 0x1p-30f, 1), 1));
    ck_assert(lfm2_math(4, 1, 1, 1) != lfm2_math(4, 1, 1, 1));
}
END_TEST

START_TEST(every_half_becomes_a_float_and_back)
{
    for (uint32_t h = 0; h < 65536; h++) {
        float f = f16_to_f32((uint16_t)h);
        int e = h >> 10 & 31, m = h & 1023;
        double v = e == 0 ? ldexp(m, -24) : ldexp(m + 1024, e - 25);
        if (e < 31)
            EXPECT(same_bits(f, (float)(h & 0x8000 ? -v : v)));
        else
            EXPECT(m ? f != f : f == (h & 0x8000 ? -INFINITY : INFINITY));
        if (f == f)
            EXPECT(f32_to_f16(f) == h);
        else
            EXPECT((f32_to_f16(f) & 0x7e00) == 0x7e00);
    }
}
END_TEST

/* Between two neighbouring halves the middle goes to the even one. */
START_TEST(floats_round_to_the_nearest_half)
{
    for (uint16_t h = 0; h < 0x7bff; h++) {
        float low = f16_to_f32(h), high = f16_to_f32(h + 1);
        float mid = (low + high) / 2;
        EXPECT(f32_to_f16(mid) == (h + (h & 1)));
        EXPECT(f32_to_f16(float_of(bits_of(mid) - 1)) == h);
        EXPECT(f32_to_f16(float_of(bits_of(mid) + 1)) == (h + 1));
        EXPECT(f32_to_f16(-mid) == (0x8000 | (h + (h & 1))));
    }
    EXPECT(f32_to_f16(65519.996f) == (0x7bff));
    EXPECT(f32_to_f16(65520) == (0x7c00));
    EXPECT(f32_to_f16(-1e30f) == (0xfc00));
    EXPECT(f32_to_f16(1e-10f) == (0));
}
END_TEST

START_TEST(dot_takes_sixteen_chains_and_one_tree)
{
    uint64_t rng = 3;
    float a[100], b[100];

    for (int i = 0; i < 100; i++) {
        a[i] = random_float(&rng);
        b[i] = random_float(&rng);
    }
    for (int n = 0; n <= 100; n++) {
        float chain[16] = { 0 };
        for (int i = 0; i < n; i++)
            chain[i % 16] = fmaf(a[i], b[i], chain[i % 16]);
        for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; i++)
                chain[i] = chain[i] + chain[i + half];
        EXPECT(same_bits(dot_f32(a, b, n), chain[0]));
    }
}
END_TEST

START_TEST(groups_are_rounded_to_the_nearest_of_127_steps)
{
    uint64_t rng = 4;

    for (int round = 0; round < 20000; round++) {
        float x[32], amax = 0;
        struct q8_group r;
        int total[2] = { 0 };
        for (int i = 0; i < 32; i++) {
            x[i] = ldexpf(random_float(&rng), round % 60 - 30);
            amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
        }
        quantize(&r, x);
        EXPECT(same_bits(r.d, amax / 127));
        for (int i = 0; i < 32; i++) {
            EXPECT(r.q[i] == (int)rintf(x[i] * (127 / amax)));
            total[i / 16] += r.q[i];
        }
        EXPECT(r.sum[0] == total[0] && r.sum[1] == total[1]);
        EXPECT(same_bits(r.s, r.d * (float)(total[0] + total[1])));
    }
}
END_TEST

START_TEST(groups_at_the_edges)
{
    const float odd[] = { NAN, INFINITY, -INFINITY };
    float x[32] = { 0 };
    struct q8_group r;

    quantize(&r, x);
    EXPECT(same_bits(r.d, 0) && r.q[0] == 0 && r.sum[0] == 0);
    x[3] = 0x1p-149f;
    quantize(&r, x);
    EXPECT(r.q[3] == 0 && r.d >= 0);
    x[3] = FLT_MAX;
    quantize(&r, x);
    EXPECT(r.q[3] == 127 && r.d < INFINITY);
    for (size_t i = 0; i < COUNT(odd); i++) {
        x[17] = odd[i];
        quantize(&r, x);
        EXPECT(r.d != r.d && r.q[17] == 0 && r.sum[1] == 0);
    }
}
END_TEST

Suite *math_suite(void)
{
    Suite *s = suite_create("arithmetic");
    TCase *c = tcase_create("arithmetic");

    tcase_set_timeout(c, 120);
    tcase_add_test(c, fma_is_the_exact_one_on_random_bits);
    tcase_add_test(c, fma_is_the_exact_one_near_ties);
    tcase_add_test(c, fma_is_the_exact_one_on_special_values);
    tcase_add_test(c, exp_is_within_one_and_a_half_ulp);
    tcase_add_test(c, exp_at_its_edges);
    tcase_add_test(c, sine_and_cosine_are_right_for_every_position);
    tcase_add_test(c, sine_and_cosine_hold_for_the_longest_context);
    tcase_add_test(c, sine_and_cosine_are_what_they_were);
    tcase_add_test(c, roots_are_right);
    tcase_add_test(c, a_model_is_opened_alike_whatever_the_rounding);
    tcase_add_test(c, the_functions_can_be_called_from_outside);
    tcase_add_test(c, every_half_becomes_a_float_and_back);
    tcase_add_test(c, floats_round_to_the_nearest_half);
    tcase_add_test(c, dot_takes_sixteen_chains_and_one_tree);
    tcase_add_test(c, groups_are_rounded_to_the_nearest_of_127_steps);
    tcase_add_test(c, groups_at_the_edges);
    suite_add_tcase(s, c);
    return s;
}
