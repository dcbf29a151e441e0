/* What --inspect finds out about models of every shape: from a file to the
 * text that is printed. */
#define _POSIX_C_SOURCE 200809L          /* as run.c does */

#define main run_main
#include "../run.c"
#undef main
#undef COUNT

#include "util.h"

#include <check.h>

static char path[] = "/tmp/check_inspect_XXXXXX";
static struct settings set;
static struct text out;

static void setup(void)
{
    memset(path + sizeof path - 7, 'X', 6);
    ck_assert_int_ge(close(mkstemp(path)), 0);
    set = defaults;
    set.model = path;
    set.threads = set.json = 1;
    set.sandbox = SANDBOX_OFF;
}

static void teardown(void)
{
    free(out.s);
    out = (struct text){ 0 };
    remove(path);
}

/* The model goes through a file, and what is printed through another. */
static const char *explain(const struct tiny *t, int status)
{
    struct bytes file = tiny_model(t);
    FILE *f = fopen(path, "wb"), *printed = tmpfile();
    const int kept = dup(STDOUT_FILENO);

    ck_assert(f && fwrite(file.p, 1, file.n, f) == file.n && !fclose(f));
    free(file.p);
    fflush(stdout);
    dup2(fileno(printed), STDOUT_FILENO);
    const int is = inspect_file(&set);
    fflush(stdout);
    dup2(kept, STDOUT_FILENO);
    close(kept);
    ck_assert_int_eq(is, status);
    rewind(printed);
    out.n = 0;
    for (int c; (c = getc(printed)) != EOF;)
        add(&out, &(char){ (char)c }, 1);
    fclose(printed);
    return out.s;
}

static void has(const char *fmt, ...)
{
    char want[200];
    va_list args;

    va_start(args, fmt);
    vsnprintf(want, sizeof want, fmt, args);
    va_end(args);
    ck_assert_msg(strstr(out.s, want), "%s\nhas no %s", out.s, want);
}

/* The number behind a key, from a place in the text on. */
static double number_at(const char *from, const char *key)
{
    const char *s = strstr(from, key);

    ck_assert_msg(s, "no %s", key);
    return strtod(s + strlen(key), NULL);
}

START_TEST(members_are_written_by_a_format)
{
    add_members(&out, "{a: %d, b_2: [%g, %g, {}], c: {", -7, 0.5, NAN);
    add_members(&out, "%s: %i", "a \"key\"", 1);
    add_members(&out, "%s: %i}, d: %.*s", "", 0, 2, "\n\x1b!");
    add_members(&out, "e: %s, f: %llu, g: [], h: %016llx, i: ",
                lfm2_weight_type(99), 18446744073709551615ull, 10ull);
    add_members(&out, "[{k: %zu}, {k: %g}]}", (size_t)3, 1e6);
    ck_assert_str_eq(out.s, "{\"a\": -7, \"b_2\": [0.5, null, {}], \"c\": {"
                     "\"a \\\"key\\\"\": true, \"\": false}, \"d\": "
                     "\"\\n\\u001b\", \"e\": null, \"f\": "
                     "18446744073709551615, \"g\": [], \"h\": "
                     "\"000000000000000a\", \"i\": [{\"k\": 3}, "
                     "{\"k\": 1000000}]}");
}
END_TEST

static const struct tiny shapes[] = {
    { .words = 1 }, { .words = 1, .moe = 1 }, { .words = 1, .untied = 1 },
    { .words = 1, .moe = 1, .untied = 1, .output_norm = 1 },
    { .words = 1, .fused_qkv = 1 }, { .words = 1, .kv_form = KV_NONE },
    { .words = 1, .type = 8 },
    { .words = 1, .moe = 1, .type = 12, .n_embd = 256 },
};

START_TEST(roles_add_up_to_the_model)
{
    static const char *const key[] = {
        "\"n_tensors\": ", "\"parameters\": ", "\"active\": ", "\"bytes\": ",
        "\"bytes_per_token\": "
    };
    const char *s = explain(&shapes[_i], DONE);
    const char *all = strstr(s, "\"weights\""), *end = strstr(s, "\"memory\"");

    for (int i = 0; i < 5; i++) {
        const char *at = strstr(s, "\"roles\"");
        double sum = 0;
        for (; (at = strstr(at, key[i])) && at < end; at++)
            sum += number_at(at, key[i]);
        ck_assert_double_eq(sum, number_at(all, key[i]));
    }
    ck_assert_ptr_null(strstr(s, "\"unused\""));
    has("\"anomalies\": []");
}
END_TEST

START_TEST(an_output_of_its_own_spares_reading_the_embedding)
{
    const char *s = explain(&shapes[3], DONE);
    const double embd = number_at(s, "\"n_embd\": ");

    has("\"tied\": false");
    has("\"last_norm\": \"output_norm.weight\"");
    ck_assert_double_eq(4 * embd, number_at(strstr(s, "\"embedding\": {"),
                                            "\"bytes_per_token\": "));
}
END_TEST

START_TEST(what_is_not_used_is_told)
{
    static const struct edit edits[] = {
        { ADD_TENSOR, "mtp.attn_q.weight", 0, 0, NULL, 0 },
        { SET, "lfm2.feed_forward_length", T_U32, 12288, NULL, 0 },
        { SET_STRING, "tokenizer.ggml.pre", 0, 0, "qwen2\x1b", 0 },
        { ADD, "lfm2.colour", T_U32, 7, NULL, 0 },
        { ADD, "lfm2.decision.type", T_U32, 7, NULL, 0 },
        { ADD, "lfm2x.decision", T_U32, 7, NULL, 0 },
        { ADD, "general.sampling.top_k", T_U32, 7, NULL, 0 },
        { SET, "lfm2.context_length", T_U32, INT32_MAX, NULL, 0 },
        { NO_EDIT, NULL, 0, 0, NULL, 0 }
    };

    explain(&(struct tiny){ .words = 1, .edits = edits }, DONE);
    has("\"unused\": {\"n_tensors\": 1, ");
    has("mtp.attn_q.weight: an unknown tensor");
    has("\"message\": \"lfm2.colour");
    has("\"message\": \"lfm2.decision.type");
    has("\"message\": \"lfm2x.decision: the key is not used\"");
    has("12288");
    has("tokenizer.ggml.pre: \\\"qwen2?\\\"");
    has("\"from_file\": true, \"temperature\": 0.3, \"top_k\": 7");
    has("{\"context\": %d, ", MAX_CTX);
}
END_TEST

START_TEST(contexts_are_in_order_and_not_too_long)
{
    const struct tiny *t = &shapes[0];
    const char *s;

    set.ctx = 300;
    s = strstr(explain(t, DONE), "\"contexts\"");
    s = strstr(s, "{\"context\": 0, ") + 1;
    ck_assert_double_eq(number_at(s, "{\"context\": "), 300);
    s = strstr(s, "{\"context\": 300") + 1;
    ck_assert_double_eq(number_at(s, "{\"context\": "),
                        number_at(out.s, "\"n_ctx_train\": "));
}
END_TEST

START_TEST(a_model_without_words_is_described)
{
    explain(&(struct tiny){ .moe = 1 }, BAD_MODEL);
    has("\"opens\": true");
    has("\"experts\": {");
    has("\"level\": \"fatal\", \"message\": \"tokenizer.");
}
END_TEST

Suite *inspect_suite(void)
{
    Suite *s = suite_create("inspect");
    TCase *c = tcase_create("inspect");

    tcase_set_timeout(c, 60);
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_add_test(c, members_are_written_by_a_format);
    tcase_add_loop_test(c, roles_add_up_to_the_model, 0, COUNT(shapes));
    tcase_add_test(c, an_output_of_its_own_spares_reading_the_embedding);
    tcase_add_test(c, what_is_not_used_is_told);
    tcase_add_test(c, contexts_are_in_order_and_not_too_long);
    tcase_add_test(c, a_model_without_words_is_described);
    suite_add_tcase(s, c);
    return s;
}
