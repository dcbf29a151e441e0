/* Weight formats: every bit of every block means what the reference says it
 * means, and a matrix product is the sum it claims to be. */
#include "../lfm2.c"

#include "reference.h"
#include "util.h"

#include <check.h>

/* The same number, or neither is finite. */
static int same_value(float a, double b)
{
    float f = (float)b;
    return a == f || (!(fabsf(a) <= FLT_MAX) && !(fabsf(f) <= FLT_MAX));
}

/* Row 0 of a tensor at p, as the engine reads it and as the reference does. */
static void expect_row(int type, const uint8_t *p, int cols, const char *what)
{
    const struct tensor w = { format_find((uint32_t)type), 1, cols, p, NULL };
    float *row = malloc((size_t)cols * sizeof *row);
    double *exact = malloc((size_t)cols * sizeof *exact);

    ck_assert(row && exact);
    get_row(row, &w, 0);
    ref_weights((uint32_t)type, p, (size_t)cols, exact);
    for (int i = 0; i < cols; i++)
        EXPECT_MSG(same_value(row[i], exact[i]), "%s, %s: weight %d is %a, "
                   "expected %a", weight_type_name(type), what, i,
                   (double)row[i], exact[i]);
    free(row);
    free(exact);
}

START_TEST(the_table_agrees_with_the_reference)
{
    ck_assert_int_eq((int)COUNT(formats), N_WEIGHT_TYPES);
    for (int i = 0; i < N_WEIGHT_TYPES; i++) {
        const uint32_t id = (uint32_t)weight_types[i];
        const struct format *f = format_find(id);
        ck_assert(f != NULL);
        ck_assert_str_eq(f->name, weight_type_name(weight_types[i]));
        ck_assert_int_eq(f->block, ref_block_columns(id));
        ck_assert_int_eq(f->bytes, ref_block_bytes(id));
        ck_assert((f->floats != NULL) != (f->halves > 0));
    }
}
END_TEST

START_TEST(other_types_have_no_reader)
{
    for (uint32_t id = 0; id < 64; id++) {
        int known = 0;
        for (int i = 0; i < N_WEIGHT_TYPES; i++)
            known |= (uint32_t)weight_types[i] == id;
        ck_assert((format_find(id) != NULL) == known);
    }
    ck_assert(format_find(UINT32_MAX) == NULL);
}
END_TEST

START_TEST(random_blocks_mean_what_the_reference_says)
{
    const int type = weight_types[_i], block = weight_type_block(type);
    uint64_t rng = 1;

    for (int n = 1; n <= 40; n++) {
        const int cols = n * (block < 32 ? 32 : block);
        struct bytes b = random_weights(type, cols, 1, &rng);
        expect_row(type, b.p, cols, "a random row");
        free(b.p);
    }
}
END_TEST

/* Blocks of random bytes: any scale, infinities and NaN among them.  A weight
 * that the engine rounds once and the reference twice may differ in the last
 * place, so only its size is compared. */
START_TEST(blocks_of_noise_are_read_alike)
{
    const int type = weight_types[_i];
    const int cols = weight_type_block(type) < 32 ? 32
                                                  : weight_type_block(type);
    const struct format *f = format_find((uint32_t)type);
    const size_t size = (size_t)(cols / f->block * f->bytes);
    uint8_t *b = malloc(size);
    float row[256];
    double exact[256];
    uint64_t rng = 2;

    ck_assert(b != NULL);
    for (int round = 0; round < 3000; round++) {
        const struct tensor w = { f, 1, cols, b, NULL };
        for (size_t i = 0; i < size; i++)
            b[i] = (uint8_t)random_u32(&rng);
        get_row(row, &w, 0);
        ref_weights((uint32_t)type, b, (size_t)cols, exact);
        for (int i = 0; i < cols; i++) {
            if (!(fabs(exact[i]) <= FLT_MAX))
                EXPECT(!(fabsf(row[i]) <= FLT_MAX));
            else
                EXPECT(fabs((double)row[i] - exact[i]) <=
                       fabs(exact[i]) * 0x1p-23);
        }
    }
    free(b);
}
END_TEST

/* A block with scale and minimum 1 and all else 0; then with each of its bits
 * turned over.  Two formats that differ in one shift differ here. */
START_TEST(every_single_bit_has_its_meaning)
{
    const int type = weight_types[_i];
    const struct format *f = format_find((uint32_t)type);
    const int cols = f->block < 32 ? 32 : f->block;
    const int at = type == 10 ? 80 : type == 11 ? 108 : type == 14 ? 208 : 0;
    const size_t size = (size_t)(cols / f->block * f->bytes);
    uint8_t *b = calloc(size, 1);
    char what[32];

    ck_assert(b != NULL);
    for (int k = 0; f->block > 1 && k <= f->has_min; k++)
        b[at + 2 * k + 1] = 0x3c;                     /* 1.0 as binary16 */
    expect_row(type, b, cols, "an empty block");
    for (size_t bit = 0; bit < 8 * size; bit++) {
        snprintf(what, sizeof what, "bit %zu turned", bit);
        b[bit / 8] ^= (uint8_t)(1 << bit % 8);
        expect_row(type, b, cols, what);
        b[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    free(b);
}
END_TEST

START_TEST(rows_and_experts_are_found_where_they_lie)
{
    enum { COLS = 256, ROWS = 3, DEPTH = 4 };
    const int type = weight_types[_i];
    uint64_t rng = 3;
    struct bytes b = random_weights(type, COLS, ROWS * DEPTH, &rng);
    const struct tensor all = { format_find((uint32_t)type), ROWS, COLS, b.p,
                                NULL };
    const size_t row_size = b.n / (ROWS * DEPTH);
    float row[COLS];
    double exact[COLS];

    ck_assert(row_bytes(&all) == row_size);
    for (int e = 0; e < DEPTH; e++)
        for (int r = 0; r < ROWS; r++) {
            const struct tensor one = expert(&all, e);
            get_row(row, &one, r);
            ref_weights((uint32_t)type,
                        b.p + (size_t)(e * ROWS + r) * row_size, COLS, exact);
            for (int i = 0; i < COLS; i++)
                EXPECT(same_value(row[i], exact[i]));
        }
    free(b.p);
}
END_TEST

/* ---------------------------------------------------------- matrix products */

enum { PRODUCT_COLS = 512, PRODUCT_ROWS = 71, PRODUCT_TOKENS = 5 };

/* What the engine multiplies: for float weights the input itself, else the
 * input as it was rounded. */
static double input_at(const struct input *in, const struct format *f, int t,
                       int c)
{
    const size_t i = (size_t)t * PRODUCT_COLS + (size_t)c;
    const struct q8_group *x = &in->q[i / 32];
    return f->floats ? (double)in->f[i] : (double)x->d * x->q[i % 32];
}

static void expect_product(const struct tensor *w, const struct input *in,
                           const float *y)
{
    double *exact = malloc(PRODUCT_COLS * sizeof *exact);

    ck_assert(exact != NULL);
    for (int r = 0; r < PRODUCT_ROWS; r++) {
        ref_weights((uint32_t)w->fmt->id, w->data + (size_t)r * row_bytes(w),
                    PRODUCT_COLS, exact);
        for (int t = 0; t < PRODUCT_TOKENS; t++) {
            double sum = 0, size = 0;
            for (int c = 0; c < PRODUCT_COLS; c++) {
                double term = exact[c] * input_at(in, w->fmt, t, c);
                sum += term;
                size += fabs(term);
            }
            EXPECT_MSG(fabs(y[t * PRODUCT_ROWS + r] - sum) < 1e-5 * size,
                       "%s: %g, expected %g", w->fmt->name,
                       (double)y[t * PRODUCT_ROWS + r], sum);
        }
    }
    free(exact);
}

/* What all threads of a context compute. */
static struct {
    struct input *in;
    const struct tensor *w;
    float *y;
} multiplied;

static void multiply(struct thread *me)
{
    round_rows(me, multiplied.in);
    barrier(me);
    matmul(me, ASSIGN, multiplied.y, multiplied.w, multiplied.in);
}

START_TEST(a_product_is_the_sum_of_its_terms)
{
    const int type = weight_types[_i];
    const struct tiny t = { .type = 2, .n_embd = 256 };     /* n_ff 512 */
    struct bytes file = tiny_model(&t), b;
    const lfm2_params p = { .n_ctx = 8, .n_seq = 1, .n_batch = 8,
                            .n_threads = 2 };
    static float x[PRODUCT_TOKENS * PRODUCT_COLS];
    static float y[PRODUCT_TOKENS * PRODUCT_ROWS];
    static struct q8_group q[PRODUCT_TOKENS * PRODUCT_COLS / 32];
    lfm2_model *m;
    lfm2_context *ctx;
    uint64_t rng = 4;

    ck_assert(lfm2_model_open_memory(&m, file.p, file.n, NULL) == LFM2_OK);
    ck_assert(lfm2_context_open(&ctx, m, &p, NULL) == LFM2_OK);
    ck_assert_int_eq(m->cfg.n_ff, PRODUCT_COLS);
    for (int round = 0; round < 20; round++) {
        for (size_t i = 0; i < COUNT(x); i++)
            x[i] = random_float(&rng) + 0.5f;         /* sums that matter */
        b = random_weights(type, PRODUCT_COLS, PRODUCT_ROWS, &rng);
        const struct tensor w = { format_find((uint32_t)type), PRODUCT_ROWS,
                                  PRODUCT_COLS, b.p };
        struct input in = { .n = PRODUCT_TOKENS, .cols = PRODUCT_COLS, .f = x,
                            .q = q };
        multiplied.in = &in;
        multiplied.w = &w;
        multiplied.y = y;
        parallel(ctx, 2, multiply);
        expect_product(&w, &in, y);
        free(b.p);
    }
    lfm2_context_close(ctx);
    lfm2_model_close(m);
    free(file.p);
}
END_TEST

/* -------------------------------------------------------- what follows what */

/* "blk.<layer>.<name>" of a matrix, or what else it is. */
static const char *name_of(const lfm2_model *m, const struct tensor *w)
{
    static char name[80];

    for (int il = 0; il < m->cfg.n_layer; il++)
        for (size_t i = 0; i < COUNT(bindings); i++)
            if ((char *)w == (char *)&m->layer[il] + bindings[i].field) {
                snprintf(name, sizeof name, "blk.%d.%s", il, bindings[i].name);
                *strrchr(name, '.') = 0;
                return name;
            }
    return w == &m->output ? "output" : w ? "unknown" : "none";
}

/* From the first matrix on, each by the one before it; and back to it. */
static void expect_order(const struct tiny *t, const char *const *names)
{
    struct bytes file = tiny_model(t);
    lfm2_model *m;

    ck_assert(lfm2_model_open_memory(&m, file.p, file.n, NULL) == LFM2_OK);
    const struct tensor *w = &m->layer[0].shortconv_in_proj;
    for (int i = 0; names[i]; w = w->next, i++) {
        ck_assert_str_eq(name_of(m, w), names[i]);
        ck_assert(w->data && w->rows > 0);
        if (strcmp(names[i], "blk.1.ffn_gate_inp") == 0) {
            ck_assert(!w->next && !m->layer[1].ffn_gate_exps.next);
            ck_assert(!m->layer[1].ffn_up_exps.next);
            w = &m->layer[1].ffn_down_exps;
        }
    }
    for (int il = 0; il < m->cfg.n_layer_dense; il++)
        ck_assert(m->layer[il].ffn_up.next == NULL);
    for (int il = m->cfg.n_layer_dense; il < 4; il++)
        ck_assert_str_eq(name_of(m, m->layer[il].ffn_down_exps.next), il == 3 ?
                         "output" : il == 2 ? "blk.3.attn_q" :
                         "blk.2.shortconv.in_proj");
    ck_assert(m->output.next == &m->layer[0].shortconv_in_proj);
    ck_assert(m->token_embd.next == NULL);
    lfm2_model_close(m);
    free(file.p);
}

START_TEST(each_matrix_knows_which_is_read_next)
{
    static const char *const dense[] = {
        "blk.0.shortconv.in_proj", "blk.0.shortconv.out_proj", "blk.0.ffn_gate",
        "blk.0.ffn_down", "blk.1.attn_q", "blk.1.attn_k", "blk.1.attn_v",
        "blk.1.attn_output", "blk.1.ffn_gate", "blk.1.ffn_down",
        "blk.2.shortconv.in_proj", "blk.2.shortconv.out_proj", "blk.2.ffn_gate",
        "blk.2.ffn_down", "blk.3.attn_q", "blk.3.attn_k", "blk.3.attn_v",
        "blk.3.attn_output", "blk.3.ffn_gate", "blk.3.ffn_down", "output",
        "blk.0.shortconv.in_proj", NULL
    };
    static const char *const moe[] = {
        "blk.0.shortconv.in_proj", "blk.0.shortconv.out_proj", "blk.0.ffn_gate",
        "blk.0.ffn_down", "blk.1.attn_q", "blk.1.attn_k", "blk.1.attn_v",
        "blk.1.attn_output", "blk.1.ffn_gate_inp", "blk.2.shortconv.in_proj",
        "blk.2.shortconv.out_proj", "blk.2.ffn_gate_inp", NULL
    };

    expect_order(&(struct tiny){ .untied = _i }, dense);
    expect_order(&(struct tiny){ .fused_qkv = 1, .untied = _i }, dense);
    expect_order(&(struct tiny){ .moe = 1, .untied = _i }, moe);
}
END_TEST

Suite *formats_suite(void)
{
    Suite *s = suite_create("formats");
    TCase *c = tcase_create("formats");

    tcase_set_timeout(c, 120);
    tcase_add_test(c, the_table_agrees_with_the_reference);
    tcase_add_test(c, other_types_have_no_reader);
    tcase_add_loop_test(c, random_blocks_mean_what_the_reference_says, 0,
                        N_WEIGHT_TYPES);
    tcase_add_loop_test(c, blocks_of_noise_are_read_alike, 0, N_WEIGHT_TYPES);
    tcase_add_loop_test(c, every_single_bit_has_its_meaning, 0,
                        N_WEIGHT_TYPES);
    tcase_add_loop_test(c, rows_and_experts_are_found_where_they_lie, 0,
                        N_WEIGHT_TYPES);
    tcase_add_loop_test(c, a_product_is_the_sum_of_its_terms, 0,
                        N_WEIGHT_TYPES);
    tcase_add_loop_test(c, each_matrix_knows_which_is_read_next, 0, 2);
    suite_add_tcase(s, c);
    return s;
}
