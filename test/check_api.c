/* The interface: what lfm2.h promises of its functions, one by one; the
 * reference against the golden logits it is trusted for. */
#include "../lfm2.c"

#include "reference.h"
#include "util.h"

#include <check.h>

static struct bytes file;                 /* a MoE model with words          */
static lfm2_model *model;

static void setup(void)
{
    const struct tiny t = { .moe = 1, .words = 1 };

    file = tiny_model(&t);
    ck_assert(lfm2_model_open_memory(&model, file.p, file.n, NULL) == LFM2_OK);
}

static void teardown(void)
{
    lfm2_model_close(model);
    free(file.p);
}

static lfm2_params small_params(void)
{
    return (lfm2_params){ .n_ctx = 100, .n_seq = 2, .n_batch = 8,
                          .n_logits = 40, .n_threads = 1 };
}

static lfm2_context *open_context(const lfm2_model *m, lfm2_params p)
{
    lfm2_context *ctx;
    lfm2_error err;

    EXPECT_MSG(lfm2_context_open(&ctx, m, &p, &err) == LFM2_OK, "%s", err.msg);
    return ctx;
}

/* -------------------------------------------------------------- open, close */

START_TEST(closing_nothing_is_allowed)
{
    lfm2_model_close(NULL);
    lfm2_context_close(NULL);
    lfm2_tokenizer_close(NULL);
}
END_TEST

START_TEST(errors_are_optional)
{
    const lfm2_params bad = { 0 };
    lfm2_model *m = model;
    lfm2_context *ctx = (lfm2_context *)&file;
    lfm2_tokenizer *t = (lfm2_tokenizer *)&file;

    ck_assert_int_eq(lfm2_model_open(&m, "no/such/file", 0, NULL), LFM2_EIO);
    ck_assert_int_eq(lfm2_model_open_memory(&m, "GGUF", 4, NULL), LFM2_EFORMAT);
    ck_assert_int_eq(lfm2_context_open(&ctx, model, &bad, NULL), LFM2_EARG);
    ck_assert_int_eq(lfm2_tokenizer_open(&t, "no/such/file", NULL), LFM2_EIO);
    ck_assert_int_eq(lfm2_tokenizer_open_memory(&t, "", 0, NULL),
                     LFM2_EFORMAT);
    ck_assert(m == NULL && ctx == NULL && t == NULL);
}
END_TEST

START_TEST(a_long_name_is_cut_and_ended_in_the_sentence)
{
    char path[1000];
    lfm2_error err;
    lfm2_model *m;

    memset(path, 'x', sizeof path - 1);
    path[sizeof path - 1] = '\0';
    ck_assert_int_eq(lfm2_model_open(&m, path, LFM2_LOAD_READ, &err), LFM2_EIO);
    ck_assert_int_eq(err.code, LFM2_EIO);
    ck_assert_int_eq((int)strlen(err.msg), (int)sizeof err.msg - 1);
}
END_TEST

START_TEST(the_version_is_that_of_the_header)
{
    ck_assert_str_eq(lfm2_version(), LFM2_VERSION);
}
END_TEST

/* --------------------------------------------------------------- parameters */

/* What is said to be there is what contexts and files accept. */
START_TEST(kernels_and_weight_types_are_listed)
{
    int n = 0;

    ck_assert(lfm2_isa_available(LFM2_ISA_AUTO));
    ck_assert(lfm2_isa_available(LFM2_ISA_SCALAR));
    ck_assert(!lfm2_isa_available(-1) && !lfm2_isa_available(99));
    while (lfm2_weight_type(n)) {
        int known = 0;
        for (int i = 0; i < N_WEIGHT_TYPES; i++)
            known += strcmp(lfm2_weight_type(n),
                            weight_type_name(weight_types[i])) == 0;
        ck_assert_int_eq(known, 1);
        n++;
    }
    ck_assert_int_eq(n, N_WEIGHT_TYPES);
    ck_assert(!lfm2_weight_type(-1));
}
END_TEST

START_TEST(default_parameters_open)
{
    lfm2_params p = lfm2_default_params(model), q;
    lfm2_context *ctx;

    ck_assert_int_eq(p.n_ctx, 4096);
    ck_assert(p.n_seq == 1 && p.n_logits == 1);
    ck_assert_int_eq(p.n_batch, model->cfg.n_expert ? 2048 : 512);
    ck_assert(p.n_threads == 0 && p.kv_type == LFM2_KV_F16);
    ck_assert(p.isa == LFM2_ISA_AUTO);
    ctx = open_context(model, p);
    q = lfm2_context_params(ctx);
    ck_assert(q.n_ctx == 4096 && q.n_seq == 1 && q.n_threads >= 1);
    ck_assert(q.isa != LFM2_ISA_AUTO);
    lfm2_context_close(ctx);
}
END_TEST

START_TEST(without_a_length_it_is_that_of_the_training)
{
    static const struct { uint64_t train; int n_ctx; } known[] = {
        { 1, 1 }, { 4096, 4096 }, { 1 << 20, 1 << 20 }, { 1 << 24, 1 << 24 },
        { 0x7fffffff, 1 << 24 }
    };
    lfm2_params p = { .n_seq = 1, .n_batch = 1, .n_logits = 1, .n_threads = 1 };

    for (size_t i = 0; i < COUNT(known); i++) {
        const struct edit edits[] = {
            { .kind = SET, .name = "lfm2.context_length", .a = T_U32,
              .b = known[i].train }, { .kind = NO_EDIT }
        };
        struct bytes other = tiny_model(&(struct tiny){ .edits = edits });
        lfm2_model *m;
        ck_assert(lfm2_model_open_memory(&m, other.p, other.n, NULL) == 0);
        p.n_ctx = known[i].n_ctx;
        const uint64_t size = lfm2_context_size(m, &p);
        p.n_ctx = 0;
        ck_assert(size > 0 && lfm2_context_size(m, &p) == size);
        if (known[i].n_ctx <= 4096) {
            lfm2_context *ctx = open_context(m, p);
            ck_assert_int_eq(lfm2_context_params(ctx).n_ctx, known[i].n_ctx);
            lfm2_context_close(ctx);
        }
        lfm2_model_close(m);
        free(other.p);
    }
}
END_TEST

static const struct { const char *name; size_t field; int value; } bad_param[]
= {
    { "n_ctx", offsetof(lfm2_params, n_ctx), -1 },
    { "n_ctx", offsetof(lfm2_params, n_ctx), INT_MAX },
    { "n_seq", offsetof(lfm2_params, n_seq), 0 },
    { "n_seq", offsetof(lfm2_params, n_seq), INT_MIN },
    { "n_seq", offsetof(lfm2_params, n_seq), INT_MAX },
    { "n_batch", offsetof(lfm2_params, n_batch), 0 },
    { "n_batch", offsetof(lfm2_params, n_batch), INT_MAX },
    { "n_logits", offsetof(lfm2_params, n_logits), -1 },
    { "n_logits", offsetof(lfm2_params, n_logits), INT_MAX },
    { "n_threads", offsetof(lfm2_params, n_threads), -1 },
    { "n_threads", offsetof(lfm2_params, n_threads), 1 << 20 },
    { "kv_type", offsetof(lfm2_params, kv_type), 2 },
    { "kv_type", offsetof(lfm2_params, kv_type), -1 },
    { "isa", offsetof(lfm2_params, isa), -1 },
    { "isa", offsetof(lfm2_params, isa), 99 }
};

START_TEST(parameters_out_of_range_are_named)
{
    lfm2_params p = small_params();
    lfm2_context *ctx;
    lfm2_error err;
    char value[24];

    memcpy((char *)&p + bad_param[_i].field, &bad_param[_i].value, sizeof(int));
    ck_assert_int_eq(lfm2_context_open(&ctx, model, &p, &err), LFM2_EARG);
    snprintf(value, sizeof value, ": %d, expected", bad_param[_i].value);
    EXPECT_MSG(strncmp(err.msg, bad_param[_i].name,
                       strlen(bad_param[_i].name)) == 0 &&
               strstr(err.msg, value), "%s %d: \"%s\"", bad_param[_i].name,
               bad_param[_i].value, err.msg);
    ck_assert(ctx == NULL && lfm2_context_size(model, &p) == 0);
}
END_TEST

START_TEST(the_size_grows_with_what_is_asked_for)
{
    const size_t field[] = {
        offsetof(lfm2_params, n_ctx), offsetof(lfm2_params, n_seq),
        offsetof(lfm2_params, n_batch), offsetof(lfm2_params, n_logits),
        offsetof(lfm2_params, n_threads)
    };
    const uint64_t size = lfm2_context_size(model, &(lfm2_params){
        .n_ctx = 100, .n_seq = 2, .n_batch = 8, .n_logits = 40,
        .n_threads = 1 });

    ck_assert(size > 0);
    for (size_t i = 0; i < COUNT(field); i++) {
        lfm2_params p = small_params();
        int value;
        memcpy(&value, (char *)&p + field[i], sizeof value);
        value *= 2;
        memcpy((char *)&p + field[i], &value, sizeof value);
        EXPECT(lfm2_context_size(model, &p) > size);
    }
}
END_TEST

/* AddressSanitizer ends a program that asks for too much, if it is not told. */
const char *__asan_default_options(void);

const char *__asan_default_options(void)
{
    return "allocator_may_return_null=1";
}

/* A size that no machine has is refused, whatever it takes to compute it. */
START_TEST(more_memory_than_there_is_is_an_error)
{
    const lfm2_params p = { .n_ctx = 1 << 24, .n_seq = 4096, .n_batch = 1,
                            .n_threads = 1, .kv_type = LFM2_KV_F32 };
    lfm2_context *ctx;
    lfm2_error err;

    model->n_attn = LFM2_MAX_LAYER;
    ck_assert(lfm2_context_size(model, &p) > (uint64_t)1 << 48);
    ck_assert_int_eq(lfm2_context_open(&ctx, model, &p, &err), LFM2_ENOMEM);
    ck_assert(strstr(err.msg, "no memory for a context of") != NULL);
}
END_TEST

/* ------------------------------------------------------- what a model tells */

START_TEST(the_configuration_is_that_of_the_file)
{
    const lfm2_config *c = lfm2_model_config(model);

    ck_assert(c->n_layer == 4 && c->n_embd == 64 && c->n_vocab == 264);
    ck_assert(c->n_head == 4 && c->n_head_kv == 2 && c->head_dim == 16);
    ck_assert(c->n_ff == 128 && c->n_ff_expert == 64 && c->l_cache == 3);
    ck_assert(c->n_expert == 6 && c->n_expert_used == 2);
    ck_assert(c->n_layer_dense == 1 && c->n_ctx_train == 4096);
    ck_assert(c->rope_freq_base == 1e6f && c->norm_rms_eps == 1e-5f);
    ck_assert(c->expert_weights_scale == 1);
    for (int il = 0; il < 4; il++)
        ck_assert_int_eq(c->is_attn[il], il % 2);
}
END_TEST

START_TEST(tensors_are_listed_as_they_lie_in_the_file)
{
    uint64_t all = 0, unused = 0, total, active;
    lfm2_tensor_info t;
    int n = 0;

    for (; lfm2_model_tensor(model, n, &t) == LFM2_OK; n++) {
        uint64_t elements = t.dims[0] * t.dims[1] * t.dims[2] * t.dims[3];
        ck_assert_str_eq(t.type, "F32");
        ck_assert(t.n_bytes == 4 * elements && t.n_dims >= 1 && t.n_dims <= 4);
        ck_assert(t.data > file.p && t.data + t.n_bytes <= file.p + file.n);
        all += elements;
        if (strstr(t.name, "_exps"))
            unused += elements / 6 * 4;
        if (n == 0)
            ck_assert_str_eq(t.name, "token_embd.weight");
    }
    ck_assert_int_eq(n, 2 + 4 * 2 + 2 * 3 + 2 * 6 + 3 + 3 * 5);
    ck_assert_int_eq(lfm2_model_tensor(model, n, &t), LFM2_EARG);
    ck_assert_int_eq(lfm2_model_tensor(model, -1, &t), LFM2_EARG);
    lfm2_model_params(model, &total, &active);
    ck_assert(total == all && active == all - unused);
}
END_TEST

START_TEST(rows_are_counted_through_all_dimensions)
{
    lfm2_tensor_info t;

    for (int i = 0; lfm2_model_tensor(model, i, &t) == LFM2_OK; i++) {
        const uint64_t n_rows = t.dims[1] * t.dims[2] * t.dims[3];
        float *row = malloc((size_t)t.dims[0] * sizeof *row);
        ck_assert(t.offset == (uint64_t)(t.data - file.p));
        for (uint64_t r = 0; r < n_rows; r++) {
            EXPECT(lfm2_model_row(model, i, r, row) == LFM2_OK);
            for (size_t c = 0; c < t.dims[0]; c++)
                EXPECT(row[c] == load_f32(t.data + 4 * (r * t.dims[0] + c)));
        }
        ck_assert_int_eq(lfm2_model_row(model, i, n_rows, row), LFM2_EARG);
        ck_assert_int_eq(lfm2_model_row(model, i, UINT64_MAX, row), LFM2_EARG);
        free(row);
    }
    ck_assert_int_eq(lfm2_model_row(model, -1, 0, NULL), LFM2_EARG);
}
END_TEST

/* All that may be asked of what is no model, and what may not. */
static void look_around(lfm2_model *m, int code)
{
    const lfm2_params p = small_params();
    lfm2_context *ctx;
    lfm2_tensor_info t;
    char text[80];
    size_t len;
    float x;

    for (int i = 0; lfm2_model_key(m, i, text, sizeof text); i++)
        lfm2_model_string(m, lfm2_model_key(m, i, text, sizeof text), &len);
    for (int i = 0; lfm2_model_warning(m, i); i++)
        EXPECT(lfm2_model_warning(m, i)[0]);
    for (int i = 0; lfm2_model_tensor(m, i, &t) == LFM2_OK; i++) {
        EXPECT((t.data == NULL) == (code != LFM2_OK));
        EXPECT(t.data || lfm2_model_row(m, i, 0, &x) == LFM2_EARG);
    }
    if (code != LFM2_OK) {
        EXPECT(lfm2_context_open(&ctx, m, &p, NULL) == LFM2_EARG && !ctx);
        EXPECT(lfm2_context_size(m, &p) == 0 && lfm2_model_hash(m) == 0);
    }
}

START_TEST(a_wreck_is_shown_but_not_run)
{
    const size_t head = file.n - (size_t)4 * 64 * 264;
    uint64_t rng = 7;
    lfm2_model *m;
    lfm2_error err;

    for (int i = 0; i < 3000; i++) {
        const size_t n = i % 3 ? file.n : random_u32(&rng) % file.n;
        uint8_t *copy = malloc(n ? n : 1);
        memcpy(copy, file.p, n);
        for (int k = 0; n && k < i % 3; k++)
            copy[random_u32(&rng) % (n < head ? n : head)] ^=
                (uint8_t)random_u32(&rng);
        const int code = open_model(
            &m, &(struct file){ copy, n, BORROWED }, 1, &err);
        EXPECT(m != NULL);
        look_around(m, code);
        lfm2_model_close(m);
        free(copy);
    }
}
END_TEST

START_TEST(the_whole_file_is_at_hand)
{
    struct bytes there = load_file("tokenizer.bin");
    lfm2_model *m;
    size_t n;

    ck_assert_ptr_eq(lfm2_model_file(model, &n), file.p);
    ck_assert_uint_eq(n, file.n);
    for (int load = LFM2_LOAD_MAP; load <= LFM2_LOAD_READ; load++) {
        lfm2_model_open(&m, "tokenizer.bin", load | LFM2_LOAD_ANY, NULL);
        ck_assert_ptr_nonnull(m);
        const void *bytes = lfm2_model_file(m, &n);
        ck_assert_uint_eq(n, there.n);
        ck_assert_mem_eq(bytes, there.p, n);
        lfm2_model_close(m);
    }
    free(there.p);
}
END_TEST

START_TEST(a_bad_file_is_examined)
{
    lfm2_model *m = model;
    lfm2_error err;
    size_t len;

    ck_assert_int_eq(lfm2_model_open(&m, "no/such/file", LFM2_LOAD_ANY, &err),
                     LFM2_EIO);
    ck_assert_ptr_null(m);
    ck_assert_int_eq(lfm2_model_open(&m, "tokenizer.bin", LFM2_LOAD_ANY,
                                     &err), LFM2_EFORMAT);
    ck_assert(strstr(err.msg, "general.architecture"));
    ck_assert(lfm2_model_string(m, "tokenizer.ggml.model", &len) && len == 4);
    lfm2_model_close(m);
    ck_assert_int_eq(lfm2_model_open(&m, "test/tiny.gguf", LFM2_LOAD_READ |
                                     LFM2_LOAD_ANY, &err), LFM2_OK);
    ck_assert(lfm2_model_hash(m) != 0);
    lfm2_model_close(m);
}
END_TEST

START_TEST(metadata_is_listed_as_text)
{
    static const struct { const char *key, *text; } expected[] = {
        { "general.architecture", "lfm2moe" }, { "general.alignment", "32" },
        { "lfm2moe.attention.head_count_kv", "[4 x i32]" },
        { "lfm2moe.rope.freq_base", "1e+06" },
        { "tokenizer.ggml.tokens", "[264 x string]" }
    };
    char text[80], little[4];
    const char *key;
    size_t found = 0, len = 0;

    for (int i = 0; (key = lfm2_model_key(model, i, text, sizeof text)); i++) {
        for (size_t k = 0; k < COUNT(expected); k++)
            if (strcmp(key, expected[k].key) == 0) {
                ck_assert_str_eq(text, expected[k].text);
                found++;
            }
        memset(little, 'x', sizeof little);
        ck_assert(lfm2_model_key(model, i, little, 3) == key);
        ck_assert(memchr(little, 0, 3) && little[3] == 'x');
    }
    ck_assert(found == COUNT(expected));
    ck_assert(lfm2_model_key(model, -1, text, sizeof text) == NULL);
    ck_assert(memcmp(lfm2_model_string(model, "general.name", &len), "tiny",
                     4) == 0 && len == 4);
    ck_assert(lfm2_model_string(model, "general.alignment", &len) == NULL);
    ck_assert(lfm2_model_string(model, "no.such.key", &len) == NULL);
    ck_assert(lfm2_model_string(model, "tokenizer.ggml.tokens", &len) == NULL);
}
END_TEST

START_TEST(warnings_end_with_null)
{
    ck_assert(lfm2_model_warning(model, 0) == NULL);
    ck_assert(lfm2_model_warning(model, -1) == NULL);
    ck_assert(lfm2_model_warning(model, INT_MAX) == NULL);
}
END_TEST

/* ------------------------------------------------------------------ forward */

/* Logits of all the tokens, in a context of its own. */
static float *run(const lfm2_model *m, const int32_t *tokens, int n)
{
    const lfm2_span span = { 0, tokens, n, n };
    const size_t size = (size_t)n * (size_t)m->cfg.n_vocab * sizeof(float);
    lfm2_context *ctx = open_context(m, small_params());
    float *out = malloc(size);

    ck_assert(out && lfm2_forward(ctx, &span, 1, NULL) == LFM2_OK);
    memcpy(out, lfm2_logits(ctx, 0, 0), size);
    lfm2_context_close(ctx);
    return out;
}

START_TEST(a_file_in_memory_needs_no_alignment)
{
    const int32_t tokens[5] = { 1, 2, 3, 4, 5 };
    float *expected = run(model, tokens, 5);
    uint8_t *shifted = malloc(file.n + 8);

    ck_assert(shifted != NULL);
    for (size_t at = 1; at < 8; at++) {
        lfm2_model *m;
        memcpy(shifted + at, file.p, file.n);
        ck_assert(lfm2_model_open_memory(&m, shifted + at, file.n, NULL) == 0);
        float *logits = run(m, tokens, 5);
        ck_assert(memcmp(logits, expected, 5 * 264 * sizeof *logits) == 0);
        free(logits);
        lfm2_model_close(m);
    }
    free(shifted);
    free(expected);
}
END_TEST

START_TEST(logits_stay_until_the_next_good_forward)
{
    const int32_t tokens[3] = { 1, 2, 3 }, bad[1] = { 264 };
    const lfm2_span good = { 1, tokens, 3, 2 }, wrong = { 0, bad, 1, 1 };
    lfm2_context *ctx = open_context(model, small_params());
    float *logits, kept[2 * 264];

    ck_assert(lfm2_logits(ctx, 0, 0) == NULL);
    ck_assert(lfm2_forward(ctx, &good, 1, NULL) == LFM2_OK);
    logits = lfm2_logits(ctx, 0, 0);
    ck_assert(logits && lfm2_logits(ctx, 0, 1) == logits + 264);
    memcpy(kept, logits, sizeof kept);
    ck_assert_int_eq(lfm2_forward(ctx, &wrong, 1, NULL), LFM2_EARG);
    ck_assert_int_eq(lfm2_seq_trim(ctx, 1, 0), 0);
    ck_assert(lfm2_logits(ctx, 0, 0) == logits);
    ck_assert(memcmp(kept, logits, sizeof kept) == 0);
    lfm2_context_close(ctx);
}
END_TEST

START_TEST(more_rows_than_reserved_are_refused)
{
    int32_t tokens[50] = { 0 };
    const lfm2_span spans[2] = { { 0, tokens, 30, 20 }, { 1, tokens, 30, 21 } };
    lfm2_context *ctx = open_context(model, small_params());
    lfm2_error err;

    ck_assert_int_eq(lfm2_forward(ctx, spans, 2, &err), LFM2_EARG);
    ck_assert_str_eq(err.msg, "logits of 41 rows, expected at most 40 "
                     "(n_logits)");
    ck_assert(lfm2_seq_len(ctx, 0) == 0 && lfm2_seq_len(ctx, 1) == 0);
    lfm2_context_close(ctx);
}
END_TEST

/* --------------------------------------------------------------- cancelling */

/* A weight format that is F32 and counts its rows as they are read: one of
 * them is the moment at which somebody cancels. */
static struct { lfm2_context *ctx; int reads, cancel_at; } watch;

static void watched_floats(float *out, const uint8_t *row, int n)
{
    if (++watch.reads == watch.cancel_at)
        lfm2_cancel(watch.ctx);
    floats_f32(out, row, n);
}

static const struct format watched = {
    .name = "F32", .block = 1, .bytes = 4, .floats = watched_floats
};

START_TEST(cancelled_anywhere_all_sequences_are_as_they_were)
{
    const int32_t tokens[40] = { 7, 6, 5, 4, 3, 2, 1 };
    const lfm2_span begin[2] = { { 0, tokens, 5, 1 }, { 1, tokens, 1, 1 } };
    const lfm2_span more[2] = { { 0, tokens, 9, 1 }, { 1, tokens, 7, 1 } };
    lfm2_params par = small_params();
    uint8_t *state[2], *now;
    uint64_t size[2];
    int code, cancelled = 0;
    lfm2_context *ctx;

    par.isa = LFM2_ISA_SCALAR;            /* which reads row by row          */
    ctx = open_context(model, par);
    for (int il = 0; il < 4; il++)
        if (model->cfg.is_attn[il])
            model->layer[il].attn_output.fmt = &watched;
        else
            model->layer[il].shortconv_out_proj.fmt = &watched;
    model->output.fmt = model->token_embd.fmt = &watched;
    watch.ctx = ctx;
    ck_assert(lfm2_forward(ctx, begin, 2, NULL) == LFM2_OK);
    for (int i = 0; i < 2; i++) {
        size[i] = lfm2_seq_state_size(ctx, i);
        ck_assert((state[i] = malloc((size_t)size[i])) != NULL);
        ck_assert(lfm2_seq_save(ctx, i, state[i], size[i], NULL) == LFM2_OK);
    }
    ck_assert((now = malloc((size_t)size[0])) != NULL);
    for (watch.cancel_at = 1;; watch.cancel_at += 3) {
        watch.reads = 0;
        code = lfm2_forward(ctx, more, 2, NULL);
        if (watch.reads < watch.cancel_at)
            break;
        if (code == LFM2_OK)              /* too late: the next one is hit */
            code = lfm2_forward(ctx, begin, 1, NULL);
        else
            cancelled++;
        ck_assert_int_eq(code, LFM2_ECANCELLED);
        for (int i = 0; i < 2; i++) {
            ck_assert(lfm2_seq_state_size(ctx, i) == size[i] ||
                      lfm2_seq_len(ctx, i) == begin[i].n_tokens +
                                              more[i].n_tokens);
            if (lfm2_seq_len(ctx, i) != begin[i].n_tokens) {
                ck_assert(lfm2_seq_load(ctx, i, state[i], size[i], NULL) == 0);
                continue;
            }
            ck_assert(lfm2_seq_save(ctx, i, now, size[i], NULL) == LFM2_OK);
            ck_assert(memcmp(now, state[i], (size_t)size[i]) == 0);
        }
    }
    ck_assert_int_eq(code, LFM2_OK);
    ck_assert_int_ge(cancelled, 100);
    free(now);
    free(state[0]);
    free(state[1]);
    lfm2_context_close(ctx);
}
END_TEST

/* ------------------------------------------------------------ the reference */

static const char *const golden[] = {
    "small_dense-F32", "small_moe-F32", "dense-F16", "dense-BF16", "dense-Q8_0",
    "dense-Q4_0", "dense-Q4_1", "dense-Q5_0", "dense-Q5_1", "dense-Q2_K",
    "dense-Q3_K_M", "dense-Q4_K_S", "dense-Q4_K_M", "dense-Q5_K_M",
    "dense-Q6_K", "dense-IQ4_NL", "dense-IQ4_XS", "moe-Q8_0", "moe-Q4_0",
    "moe-Q4_K_M"
};

/* Everything else is measured by it, so it is measured itself: exact logits,
 * from another program, of the first tokens. */
START_TEST(the_reference_gives_the_golden_logits)
{
    enum { N = 12 };
    char name[64];
    int32_t tokens[N];
    double error = 0, power = 0;
    struct bytes ids, gguf, exact;

    snprintf(name, sizeof name, "golden/%s.gguf", golden[_i]);
    gguf = load_file(shared_file(name));
    snprintf(name, sizeof name, "golden/%s.logits.f32", golden[_i]);
    exact = load_file(shared_file(name));
    ids = load_file(shared_file("golden/tokens.i32"));
    const size_t n = N * (size_t)ref_n_vocab(gguf.p);
    double *logits = malloc(n * sizeof *logits);
    ck_assert(logits && exact.n >= 4 * n && ids.n >= 4 * N);
    for (int i = 0; i < N; i++)
        tokens[i] = (int32_t)load_le32(ids.p + 4 * i);
    ref_logits(gguf.p, tokens, N, logits);
    for (size_t i = 0; i < n; i++) {
        const double e = (double)load_f32(exact.p + 4 * i);
        error += (logits[i] - e) * (logits[i] - e);
        power += e * e;
    }
    EXPECT_MSG(error < 1e-13 * power, "%s: NMSE %g", golden[_i], error / power);
    free(logits);
    free(ids.p);
    free(exact.p);
    free(gguf.p);
}
END_TEST

Suite *api_suite(void)
{
    Suite *s = suite_create("interface");
    TCase *c = tcase_create("interface");

    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_add_test(c, closing_nothing_is_allowed);
    tcase_add_test(c, errors_are_optional);
    tcase_add_test(c, a_long_name_is_cut_and_ended_in_the_sentence);
    tcase_add_test(c, the_version_is_that_of_the_header);
    tcase_add_test(c, kernels_and_weight_types_are_listed);
    tcase_add_test(c, default_parameters_open);
    tcase_add_test(c, without_a_length_it_is_that_of_the_training);
    tcase_add_loop_test(c, parameters_out_of_range_are_named, 0,
                        (int)COUNT(bad_param));
    tcase_add_test(c, the_size_grows_with_what_is_asked_for);
    tcase_add_test(c, more_memory_than_there_is_is_an_error);
    tcase_add_test(c, the_configuration_is_that_of_the_file);
    tcase_add_test(c, tensors_are_listed_as_they_lie_in_the_file);
    tcase_add_test(c, rows_are_counted_through_all_dimensions);
    tcase_add_test(c, a_wreck_is_shown_but_not_run);
    tcase_add_test(c, the_whole_file_is_at_hand);
    tcase_add_test(c, a_bad_file_is_examined);
    tcase_add_test(c, metadata_is_listed_as_text);
    tcase_add_test(c, warnings_end_with_null);
    tcase_add_test(c, a_file_in_memory_needs_no_alignment);
    tcase_add_test(c, logits_stay_until_the_next_good_forward);
    tcase_add_test(c, more_rows_than_reserved_are_refused);
    tcase_add_test(c, cancelled_anywhere_all_sequences_are_as_they_were);
    if (shared_file("golden/tokens.i32"))
        tcase_add_loop_test(c, the_reference_gives_the_golden_logits, 0,
                            (int)COUNT(golden));
    suite_add_tcase(s, c);
    return s;
}
