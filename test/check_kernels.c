/* The kernels of every instruction set this CPU has give the bits of the scalar
 * code: compared with memcmp, never with a tolerance. */
#include "../lfm2.c"

#include "util.h"

#include <check.h>

/* Under sanitizers, which are ten times slower, every way through the code is
 * gone, but not with every number of tokens. */
#ifdef SANITIZED
enum { STEP = 6, BATCHES = 3, LENGTH = 24 };
#else
enum { STEP = 1, BATCHES = 8, LENGTH = 90 };
#endif

static const char *const isa_names[] = {
    "auto", "scalar", "AVX2", "AVX-VNNI", "AVX-512", "AVX-512-VNNI", "NEON",
    "dotprod", "SIMD128", "relaxed"
};

/* The table of an instruction set, or NULL. */
static const struct isa *isa_or_none(int isa)
{
    if (lfm2_isa_available(isa))
        return isa_table(isa);
    return NULL;
}

static void fill(float *x, size_t n, uint64_t *rng)
{
    for (size_t i = 0; i < n; i++)
        x[i] = random_float(rng) * 4;
}

static void *room(size_t n)
{
    void *p = NULL;

    ck_assert(posix_memalign(&p, 64, n + 64) == 0);
    memset(p, 0x55, n + 64);
    return p;
}

/* ------------------------------------------------------------ small blocks */

/* Numbers a careless vector function gets wrong. */
static const float odd_numbers[] = {
    0, -0.0f, 1, -1, 87, -87, -87.5f, 88, 88.5f, 89, -89, 1000, -1000, INFINITY,
    -INFINITY, FLT_MAX, -FLT_MAX, FLT_MIN, 0x1p-149f, 0x1p-101f, 0x1p-99f
};

START_TEST(blocks_of_floats)
{
    const struct isa *isa = isa_or_none(_i);
    uint64_t rng = 1;
    float a[512], b[512], x[512];

    for (int round = 0; isa && round < 2000; round++) {
        const int n = round % 512;
        fill(a, 512, &rng);
        fill(x, 512, &rng);
        a[round % 32] = odd_numbers[(size_t)round % COUNT(odd_numbers)];
        memcpy(b, a, sizeof a);
        ck_assert(bits_of(isa->dot(a + 32, x, n % 480)) ==
                  bits_of(dot_f32(a + 32, x, n % 480)));
        isa->add_scaled(a + 32, x[0], x, n % 480);
        add_scaled(b + 32, x[0], x, n % 480);
        EXPECT_MSG(memcmp(a, b, sizeof a) == 0, "add_scaled, n %d", n);
        isa->swiglu(a, x, 512);
        swiglu(b, x, 512);
        for (int i = 0; i < 512; i++)
            EXPECT_MSG(bits_of(a[i]) == bits_of(b[i]) ||
                       (a[i] != a[i] && b[i] != b[i]), "swiglu: %a, expected "
                       "%a", (double)a[i], (double)b[i]);
    }
}
END_TEST

START_TEST(rounding_of_groups)
{
    const struct isa *isa = isa_or_none(_i);
    struct q8_group a, b;
    uint64_t rng = 2;
    float x[32];

    for (int round = 0; isa && round < 50000 / STEP; round++) {
        fill(x, 32, &rng);
        for (int i = 0; i < 32; i++)
            x[i] = ldexpf(x[i], round % 300 - 150);
        if (round % 7 == 0)
            x[round % 32] = odd_numbers[(size_t)round % COUNT(odd_numbers)];
        if (round % 1000 == 999)
            x[5] = NAN;
        isa->quantize(&a, x);
        quantize(&b, x);
        EXPECT(memcmp(&a, &b, sizeof a) == 0);
    }
}
END_TEST

START_TEST(turned_heads)
{
    const struct isa *isa = isa_or_none(_i);
    uint64_t rng = 3;
    float a[256], b[256], turn[256];

    for (int hd = 2; isa && hd <= 256; hd += 2) {
        fill(a, 256, &rng);
        fill(turn, 256, &rng);
        memcpy(b, a, sizeof a);
        isa->rope(a, turn, hd);
        rope(b, turn, hd);
        EXPECT_MSG(memcmp(a, b, sizeof a) == 0, "head_dim %d", hd);
    }
}
END_TEST

START_TEST(steps_of_a_convolution)
{
    enum { N = 96, TAPS = 6 };
    const struct isa *isa = isa_or_none(_i);
    uint64_t rng = 4;
    float w[TAPS * N], in[3 * N], win[2][TAPS * N], x[2][UNIT], y[2][UNIT];
    float *u[2][TAPS];

    for (int l_cache = 2; isa && l_cache <= TAPS; l_cache++) {
        fill(w, COUNT(w), &rng);
        fill(win[0], TAPS * N, &rng);
        memcpy(win[1], win[0], sizeof win[0]);
        for (int t = 0; t < 20; t++) {
            fill(in, COUNT(in), &rng);
            for (int k = 0; k < 2 * l_cache; k++)
                u[k % 2][k / 2] = win[k % 2] + (t + k / 2) % TAPS * N + 32;
            memcpy(x[0], in + 2 * N, sizeof x[0]);
            memcpy(x[1], in + 2 * N, sizeof x[1]);
            isa->conv_step(y[0], u[0], w + 32, in, in + N, x[0], l_cache, N);
            conv_step(y[1], u[1], w + 32, in, in + N, x[1], l_cache, N);
            EXPECT(memcmp(x[0], x[1], sizeof x[0]) == 0);
            EXPECT(memcmp(y[0], y[1], sizeof y[0]) == 0);
            EXPECT(memcmp(win[0], win[1], sizeof win[0]) == 0);
        }
    }
}
END_TEST

/* ---------------------------------------------------------------- attention */

static const int head_dims[] = { 2, 16, 32, 48, 64, 80, 96, 128, 256 };

/* What a chunk gives to rows of which the last sees `n` positions, the others
 * fewer. */
static struct attn_partial *chunk_of(const struct isa *isa,
                                     const struct attn_rows *rows,
                                     const struct kv_head *kv, int pos)
{
    const size_t n = (size_t)(rows->n * rows->group);
    struct attn_partial *out = room(n * sizeof *out);
    struct scratch s = {
        .tile = room(((size_t)kv->head_dim + 1) * TILE * 4),
        .score = room(n * CHUNK * 4)
    };

    isa->attend_chunk(out, rows, kv, pos, &s);
    free(s.tile);
    free(s.score);
    return out;
}

static void expect_chunk(const struct kv_head *kv, float *q, int n_rows, int n_q,
                         int pos, int n)
{
    const struct attn_rows rows = { q, (size_t)n_q * (size_t)kv->head_dim,
                                    n_rows, n_q, pos + n - n_rows };
    const size_t size = (size_t)kv->head_dim * 4;
    struct attn_partial *b = chunk_of(&scalar, &rows, kv, pos);

    for (int i = LFM2_ISA_AVX2; i < LFM2_N_ISA; i++) {
        const struct isa *isa = isa_or_none(i);
        struct attn_partial *a = isa ? chunk_of(isa, &rows, kv, pos) : NULL;
        for (int r = 0; a && r < n_rows * n_q; r++)
            if (chunk_seen(&rows, r / n_q, pos) > 0)
                EXPECT_MSG(bits_of(a[r].max) == bits_of(b[r].max) &&
                           bits_of(a[r].sum) == bits_of(b[r].sum) &&
                           memcmp(a[r].o, b[r].o, size) == 0,
                           "%s: head_dim %d, %d rows of %d queries, %d "
                           "positions from %d, f16 %d", isa_names[i],
                           kv->head_dim, n_rows, n_q, n, pos, kv->f16);
        free(a);
    }
    free(b);
}

/* One case for each dimension of heads. */
START_TEST(chunks_of_attention)
{
    const int hd = head_dims[_i];
    const size_t size = (size_t)2 * CHUNK * (size_t)hd * 4;
    uint64_t rng = 5;
    float q[27 * 256], k[256], v[256];

    for (int f16 = 0; f16 < 2; f16++) {
        struct kv_head kv = { room(size), room(size), f16, hd };
        for (int pos = 0; pos < 2 * CHUNK; pos++) {
            fill(k, 256, &rng);
            fill(v, 256, &rng);
            kv_store(&kv, pos, k, v);
        }
        fill(q, COUNT(q), &rng);
        for (int n = 1; n <= CHUNK; n += STEP + n / 20) {
            expect_chunk(&kv, q, 1, 1 + n % 9, n % 2 * CHUNK, n);
            for (int rows = 2; rows <= 9 && rows <= n; rows += 1 + n % 3)
                expect_chunk(&kv, q, rows, 1 + n % 5 % 3, n % 2 * CHUNK, n);
        }
        /* rows of the chunk before, which see nothing, and of the one after,
         * which see all */
        expect_chunk(&kv, q, 9, 3, CHUNK, 2);
        expect_chunk(&kv, q, 6, 4, 0, CHUNK + 3);
        expect_chunk(&kv, q, 9, 3, 0, 2 * CHUNK);
        free(kv.k);
        free(kv.v);
    }
}
END_TEST

/* ----------------------------------------------------------------- products */

enum { MOST_TOKENS = PART_ROWS + 2 };

/* Products of a matrix of ROWS rows, which no number of rows divides, with 1 to
 * 40 rows in any order, and with so many that panels are whole. */
static void expect_products(int type, int cols, int rows, uint64_t *rng)
{
    struct bytes b = random_weights(type, cols, (uint64_t)rows, rng);
    const struct tensor w = { format_find((uint32_t)type), rows, cols, b.p };
    const size_t n = (size_t)MOST_TOKENS * (size_t)cols, c = (size_t)cols;
    float *out[2] = { room(MOST_TOKENS * UNIT * 4), room(MOST_TOKENS * UNIT * 4) };
    struct input none = { 0 };
    struct scratch s = { .q = room(c * 32), .d = room(c * 8),
                         .m = room(c * 8), .f = room(c * UNIT * 4),
                         .chain = room(MOST_X_ROWS * UNIT * 16 * 4),
                         .x = room(MOST_X_ROWS * c / 32 * GROUP_BYTES),
                         .arranged = &none };
    struct input in = { 0, cols, NULL, room(n * 4),
                        room(n / 32 * sizeof *in.q) };
    int order[MOST_TOKENS];

    fill(in.f, n, rng);
    for (size_t i = 0; i < n / 32; i++)
        quantize(&in.q[i], in.f + 32 * i);
    for (int i = 0; i < MOST_TOKENS; i++)
        order[i] = (i * 7 + 3) % MOST_TOKENS;
    for (in.n = 1; in.n <= MOST_TOKENS;
         in.n += in.n < 9 ? 1 : in.n < 40 ? STEP : PART_ROWS - 38)
        for (int first = 0; first < rows; first += UNIT) {
            const int here = rows - first < UNIT ? rows - first : UNIT;
            in.row = in.n % 3 == 0 ? order : NULL;
            product_rows(out[1], &w, first, here, &in, &s, NULL, NULL);
            for (int i = LFM2_ISA_AVX2; i < LFM2_N_ISA; i++) {
                const struct isa *isa = isa_or_none(i);
                if (!isa)
                    continue;
                none.n = 0;
                isa->product(out[0], &w, first, here, &in, &s, b.p + b.n,
                             in.n % 2 ? b.p : NULL);
                for (int t = 0; t < in.n; t++)
                    EXPECT_MSG(memcmp(out[0] + t * UNIT, out[1] + t * UNIT,
                                      (size_t)here * sizeof *out[0]) == 0,
                               "%s, %s: %d x %d, row %d of %d", isa_names[i],
                               w.fmt->name, rows, cols, t, in.n);
            }
        }
    for (int i = 0; i < 2; i++)
        free(out[i]);
    free(s.q);
    free(s.d);
    free(s.m);
    free(s.f);
    free(s.chain);
    free(s.x);
    free(in.f);
    free(in.q);
    free(b.p);
}

/* One case for each weight type. */
START_TEST(products)
{
    const int type = weight_types[_i];
    const int block = weight_type_block(type) < 32 ? 32
                                                   : weight_type_block(type);
    uint64_t rng = 6;

    for (int rows = 1; rows <= 75; rows += 37)
        for (int n = 1; n <= (block == 32 ? 9 : 2);   /* 4, 8: whole steps   */
             n += block > 32 || n % 4 == 0 ? 1 : 3)
            expect_products(type, n * block, rows, &rng);
    for (int cols = 8; weight_type_block(type) == 1 && cols < 64; cols += 16)
        expect_products(type, cols, 40, &rng);
    expect_products(type, weight_type_block(type) == 1 ? 2 * 1024 + 48
                          : 2 * PART_GROUPS * 32 + 256, 43, &rng);
}
END_TEST

/* ------------------------------------------------------------- whole models */

static uint64_t hash_model(const lfm2_model *m, int isa, int threads, int batch)
{
    enum { N = LENGTH };
    const lfm2_params p = { .n_ctx = 128, .n_seq = 1, .n_batch = batch,
                            .n_logits = N, .n_threads = threads, .isa = isa };
    const size_t n_vocab = (size_t)m->cfg.n_vocab;
    int32_t tokens[N];
    lfm2_context *ctx;
    uint64_t h;

    for (int i = 0; i < N; i++)
        tokens[i] = (i * 31 + 5) % m->cfg.n_vocab;
    ck_assert(lfm2_context_open(&ctx, m, &p, NULL) == 0);
    ck_assert_int_eq(lfm2_context_params(ctx).isa, isa);
    ck_assert(lfm2_forward(ctx, &(lfm2_span){ 0, tokens, N, N }, 1, NULL) == 0);
    h = hash_bytes(HASH_START, (const uint8_t *)lfm2_logits(ctx, 0, 0),
                   N * n_vocab * sizeof(float));
    lfm2_context_close(ctx);
    return h;
}

static void expect_one_hash(const lfm2_model *m, const char *what)
{
    static const int batch[] = { 512, 1, 7, 8, 2, 5, 9, 40 };
    const uint64_t h = hash_model(m, LFM2_ISA_SCALAR, 1, 512);

    /* One small batch of the scalar code: products() has all of them. */
    for (int isa = LFM2_ISA_SCALAR; isa < LFM2_N_ISA; isa++)
        for (int i = isa == LFM2_ISA_SCALAR ? BATCHES - 1 : 0;
             i < BATCHES && lfm2_isa_available(isa); i++)
            EXPECT_MSG(hash_model(m, isa, i + 1, batch[i]) == h,
                       "%s: other logits with %s, %d threads and batches of %d",
                       what, isa_names[isa], i + 1, batch[i]);
}

START_TEST(models)
{
    const int type = weight_types[_i];

    for (int moe = 0; moe <= 1; moe++) {
        struct bytes file = tiny_model(&(struct tiny){ .moe = moe,
                                                       .type = type });
        lfm2_model *m;
        ck_assert(lfm2_model_open_memory(&m, file.p, file.n, NULL) == 0);
        expect_one_hash(m, weight_type_name(type));
        lfm2_model_close(m);
        free(file.p);
    }
}
END_TEST

START_TEST(golden_models)
{
    static const char *const files[] = {
        "golden/dense-Q4_0.gguf", "golden/dense-Q4_K_M.gguf",
        "golden/moe-Q4_0.gguf", "golden/moe-Q8_0.gguf"
    };
    const char *path = shared_file(files[_i]);
    lfm2_model *m;

    if (!path)
        return;
    ck_assert(lfm2_model_open(&m, path, LFM2_LOAD_MAP, NULL) == 0);
    expect_one_hash(m, path);
    lfm2_model_close(m);
}
END_TEST

START_TEST(choice)
{
    for (int isa = LFM2_ISA_AVX2; isa < LFM2_N_ISA; isa++)
        if (!lfm2_isa_available(isa))
            printf("skipped: this CPU or build has no %s\n", isa_names[isa]);
    fflush(stdout);

    lfm2_params p = { .n_ctx = 8, .n_seq = 1, .n_batch = 8 };
    struct bytes file = tiny_model(&(struct tiny){ .type = 2 });
    lfm2_context *ctx;
    lfm2_model *m;
    lfm2_error err;

    ck_assert(lfm2_model_open_memory(&m, file.p, file.n, NULL) == 0);
    for (p.isa = -1; p.isa <= LFM2_N_ISA; p.isa++) {
        int code = lfm2_context_open(&ctx, m, &p, &err);
        ck_assert(code == (lfm2_isa_available(p.isa) ? LFM2_OK : LFM2_EARG));
        ck_assert(code == LFM2_OK || strstr(err.msg, "isa"));
        if (code == LFM2_OK)
            ck_assert(lfm2_isa_available(lfm2_context_params(ctx).isa));
        for (int what = LFM2_READ; code == LFM2_OK && what <= LFM2_DOT; what++)
            ck_assert(lfm2_exercise(ctx, what) > 0);
        lfm2_context_close(code == LFM2_OK ? ctx : NULL);
    }
    lfm2_model_close(m);
    free(file.p);
}
END_TEST

Suite *kernels_suite(void)
{
    Suite *s = suite_create("kernels");
    TCase *c = tcase_create("kernels");
    const int first = LFM2_ISA_AVX2, end = LFM2_N_ISA;

    tcase_set_timeout(c, 600);
    tcase_add_loop_test(c, blocks_of_floats, first, end);
    tcase_add_loop_test(c, rounding_of_groups, first, end);
    tcase_add_loop_test(c, turned_heads, first, end);
    tcase_add_loop_test(c, steps_of_a_convolution, first, end);
    tcase_add_loop_test(c, chunks_of_attention, 0, COUNT(head_dims));
    tcase_add_loop_test(c, products, 0, N_WEIGHT_TYPES);
    tcase_add_loop_test(c, models, 0, N_WEIGHT_TYPES);
    tcase_add_loop_test(c, golden_models, 0, 4);
    tcase_add_test(c, choice);
    suite_add_tcase(s, c);
    return s;
}
