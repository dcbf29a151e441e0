/* What --inspect finds out about models of every shape, and about memory. */
#define _POSIX_C_SOURCE 200809L          /* as run.c does */

#define main run_main
#include "../run.c"
#undef main
#undef COUNT

#include "util.h"

#include <check.h>

static char path[] = "/tmp/check_inspect_XXXXXX";
static struct settings set;
static struct facts facts;

static void setup(void)
{
    memset(path + sizeof path - 7, 'X', 6);
    ck_assert_int_ge(close(mkstemp(path)), 0);
    set = defaults;
    set.model = path;
    set.threads = 1;
}

static void teardown(void)
{
    lfm2_tokenizer_close(facts.words);
    lfm2_model_close(facts.model);
    facts = (struct facts){ 0 };
    remove(path);
}

/* The facts of a model, which goes through a file. */
static const struct facts *look_at(const struct tiny *t)
{
    struct bytes file = tiny_model(t);
    FILE *f = fopen(path, "wb");

    ck_assert(f && fwrite(file.p, 1, file.n, f) == file.n && !fclose(f));
    free(file.p);
    facts.s = &set;
    facts.code = lfm2_model_open(&facts.model, path, LFM2_LOAD_ANY, &facts.err);
    facts.is_model = facts.code == LFM2_OK;
    ck_assert_ptr_nonnull(facts.model);
    find_facts(&facts);
    return &facts;
}

static const char *oddity(const struct facts *f, int i)
{
    int fatal;

    return find_oddity(f, i, &fatal);
}

/* ------------------------------------------------------------------- shapes */

static const struct tiny shapes[] = {
    { .words = 1 }, { .words = 1, .moe = 1 }, { .words = 1, .untied = 1 },
    { .words = 1, .moe = 1, .untied = 1, .output_norm = 1 },
    { .words = 1, .fused_qkv = 1 }, { .words = 1, .kv_form = KV_NONE },
    { .words = 1, .type = 8 },
    { .words = 1, .moe = 1, .type = 12, .n_embd = 256 },
};

START_TEST(roles_add_up_to_the_model)
{
    const struct facts *f = look_at(&shapes[_i]);
    const lfm2_config *c = lfm2_model_config(f->model);
    const int n_attn = count_attention(c);
    const uint64_t embd = (uint64_t)c->n_embd;
    uint64_t total, active, params = 0, bytes = 0;
    int n = 0;

    ck_assert_int_eq(f->code, LFM2_OK);
    lfm2_model_params(f->model, &total, &active);
    ck_assert(f->all.params == total && f->all.active == active);
    for (int i = 0; i < UNUSED; i++) {
        n += f->part[i].n;
        params += f->part[i].params;
        bytes += f->part[i].bytes;
    }
    ck_assert(n == f->tensors_read && n == f->all.n && params == total);
    ck_assert(bytes == f->all.bytes && f->all.read <= bytes);
    ck_assert_int_eq(f->part[UNUSED].n, 0);
    ck_assert_int_eq(f->part[NORMS].n, 2 * c->n_layer + 2 * n_attn + 1);
    ck_assert(f->part[EMBEDDING].params == embd * (uint64_t)c->n_vocab);
    ck_assert(f->part[CONV_MIXERS].params == (uint64_t)(c->n_layer - n_attn) *
              (4 * embd * embd + (uint64_t)c->l_cache * embd));
    ck_assert(f->part[DENSE_FFN].params == 3 * embd * (uint64_t)c->n_ff *
              (uint64_t)c->n_layer_dense);
    ck_assert_int_eq(f->part[EXPERTS].n, 3 * (c->n_layer - c->n_layer_dense));
    ck_assert_ptr_null(oddity(f, 0));
}
END_TEST

START_TEST(an_output_of_its_own_spares_reading_the_embedding)
{
    const struct facts *f = look_at(&shapes[3]);
    const lfm2_config *c = lfm2_model_config(f->model);

    ck_assert(!f->tied && f->part[OUTPUT].n == 1);
    ck_assert(f->part[EMBEDDING].read == 4 * (uint64_t)c->n_embd);
    ck_assert(f->part[OUTPUT].read == f->part[OUTPUT].bytes);
    ck_assert(f->part[EXPERTS].read * (uint64_t)c->n_expert ==
              f->part[EXPERTS].bytes * (uint64_t)c->n_expert_used);
    ck_assert_str_eq(f->norm, "output_norm.weight");
}
END_TEST

START_TEST(what_nobody_asked_for_is_unused)
{
    static const struct edit edits[] = {
        { ADD_TENSOR, "mtp.attn_q.weight", 0, 0, NULL, 0 },
        { NO_EDIT, NULL, 0, 0, NULL, 0 }
    };
    const struct facts *f = look_at(&(struct tiny){ .words = 1,
                                                    .edits = edits });

    ck_assert(f->part[UNUSED].n == 1 && f->part[UNUSED].read == 0);
    ck_assert_int_eq(f->all.n, f->tensors_read - 1);
    ck_assert(strstr(oddity(f, 0), "mtp.attn_q.weight: an unknown tensor"));
    ck_assert_ptr_null(oddity(f, 1));
}
END_TEST

/* ------------------------------------------------------------------- memory */

START_TEST(contexts_are_in_order_and_not_too_long)
{
    const struct facts *f;

    set.ctx = 300;
    f = look_at(&shapes[0]);
    ck_assert(f->n_rooms == 2 && f->room[0].ctx == 300);
    ck_assert_int_eq(f->room[1].ctx, lfm2_model_config(f->model)->n_ctx_train);
    for (int i = 0; i < f->n_rooms; i++) {
        lfm2_params p = choose_params(&set, f->model);
        p.n_ctx = f->room[i].ctx;
        ck_assert(f->room[i].beside == lfm2_context_size(f->model, &p));
        ck_assert_double_eq(f->room[i].kv, f->kv * p.n_ctx);
        ck_assert_double_eq(f->room[i].read, f->room[i].kv +
                            (double)f->all.read);
    }
}
END_TEST

START_TEST(a_model_may_be_trained_for_more_than_any_context)
{
    static const struct edit edits[] = {
        { SET, "lfm2.context_length", T_U32, INT32_MAX, NULL, 0 },
        { NO_EDIT, NULL, 0, 0, NULL, 0 }
    };
    const struct facts *f = look_at(&(struct tiny){ .words = 1,
                                                    .edits = edits });

    ck_assert_int_eq(f->n_rooms, 3);
    ck_assert_int_eq(f->room[2].ctx, MAX_CTX);
    ck_assert_int_le(f->fits, MAX_CTX);
}
END_TEST

/* The longest context that fits, and one more token would not. */
START_TEST(the_largest_context_just_fits)
{
    struct facts *f = (struct facts *)look_at(&shapes[0]);
    lfm2_params p = choose_params(&set, f->model);

    for (int n = 1; n <= lfm2_model_config(f->model)->n_ctx_train; n += 37) {
        p.n_ctx = n;
        f->free = (double)f->all.bytes + (double)lfm2_context_size(f->model,
                                                                   &p);
        ck_assert_int_ge(largest_context(f, p), n);
        f->free -= 1;
        ck_assert_int_lt(largest_context(f, p), n);
    }
    f->free = 1;
    ck_assert_int_eq(largest_context(f, p), 0);
}
END_TEST

/* ------------------------------------------------------- words and oddities */

START_TEST(oddities_follow_one_another)
{
    static const struct edit edits[] = {
        { SET, "lfm2.feed_forward_length", T_U32, 12288, NULL, 0 },
        { SET_STRING, "tokenizer.ggml.pre", 0, 0, "qwen2\x1b", 0 },
        { ADD, "lfm2.colour", T_U32, 7, NULL, 0 },
        { NO_EDIT, NULL, 0, 0, NULL, 0 }
    };
    const struct facts *f = look_at(&(struct tiny){ .words = 1,
                                                    .edits = edits });

    ck_assert(strstr(oddity(f, 0), "lfm2.colour"));
    ck_assert(strstr(oddity(f, 1), "12288"));
    ck_assert(strstr(oddity(f, 2), "tokenizer.ggml.pre: \"qwen2?\""));
    ck_assert_ptr_null(oddity(f, 3));
}
END_TEST

START_TEST(a_model_without_words_is_described)
{
    const struct facts *f = look_at(&(struct tiny){ .moe = 1 });
    int fatal = 0;

    ck_assert(f->is_model && !f->words && f->code != LFM2_OK);
    ck_assert(f->part[EXPERTS].n > 0 && f->n_rooms > 0);
    ck_assert(strstr(find_oddity(f, 0, &fatal), "tokenizer.") && fatal);
}
END_TEST

START_TEST(the_file_may_have_settings_of_its_own)
{
    static const struct edit edits[] = {
        { ADD, "general.sampling.top_k", T_U32, 7, NULL, 0 },
        { NO_EDIT, NULL, 0, 0, NULL, 0 }
    };
    const struct facts *f = look_at(&(struct tiny){ .words = 1,
                                                    .edits = edits });

    ck_assert(f->has_wishes && f->sampling.top_k == 7);
}
END_TEST

Suite *inspect_suite(void)
{
    Suite *s = suite_create("inspect");
    TCase *c = tcase_create("inspect");

    tcase_set_timeout(c, 60);
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_add_loop_test(c, roles_add_up_to_the_model, 0, COUNT(shapes));
    tcase_add_test(c, an_output_of_its_own_spares_reading_the_embedding);
    tcase_add_test(c, what_nobody_asked_for_is_unused);
    tcase_add_test(c, contexts_are_in_order_and_not_too_long);
    tcase_add_test(c, a_model_may_be_trained_for_more_than_any_context);
    tcase_add_test(c, the_largest_context_just_fits);
    tcase_add_test(c, oddities_follow_one_another);
    tcase_add_test(c, a_model_without_words_is_described);
    tcase_add_test(c, the_file_may_have_settings_of_its_own);
    suite_add_tcase(s, c);
    return s;
}
