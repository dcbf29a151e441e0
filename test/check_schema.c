/* Answers in a schema: which schemas are refused and why, which texts are good,
 * and which tokens may come next. */
#define _POSIX_C_SOURCE 200809L          /* as run.c does */

#define main run_main
#include "../run.c"
#undef main
#undef COUNT

#include "util.h"

#include <check.h>

static struct pool pool;
static struct schema *schema;
static struct why why;

static struct json *parse_json(const char *s)
{
    struct json *v = NULL;

    ck_assert_msg(json_parse(&pool, s, strlen(s), &v, &why) == DONE, "%s: %s",
                  s, why.s);
    return v;
}

static int make(const char *s)
{
    why.s[0] = '\0';
    return make_schema(parse_json(s), NULL, &schema, &why);
}

static void forget_schema(void)
{
    free_schema(schema);
    schema = NULL;
    pool_free(&pool);
}

/* ----------------------------------------------------------------- refusals */

START_TEST(what_is_not_known_is_refused_by_its_name)
{
    static const struct { const char *schema, *why; } wrong[] = {
        { "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\","
          "\"pattern\":\"a\"}}}",
          "\"pattern\" at properties.name is not known here" },
        { "{\"type\":\"string\",\"format\":\"date\"}",
          "\"format\" is not known here" },
        { "{\"type\":\"array\",\"items\":{\"oneOf\":[]}}",
          "\"oneOf\" at items is not known here" },
        { "{\"anyOf\":[{\"type\":\"null\"},{\"not\":{}}]}",
          "\"not\" at anyOf is not known here" },
        { "{\"$defs\":{\"a\":{\"type\":\"integer\",\"minimum\":1}},"
          "\"type\":\"array\",\"items\":{\"$ref\":\"#/$defs/a\"}}",
          "\"minimum\" at items is not known here" },
        { "{\"type\":\"number\",\"minimum\":-9007199254740991}",
          "\"minimum\" is not known here" },
        { "{\"type\":\"integer\",\"maximum\":-9007199254740991}",
          "\"maximum\" is not known here" },
        { "{\"type\":\"object\",\"patternProperties\":{}}",
          "\"patternProperties\" is not known here" },
        { "{\"type\":\"array\",\"uniqueItems\":true}",
          "\"uniqueItems\" is not known here" },
        { "{\"type\":\"string\",\"items\":{}}",
          "\"items\" does not go with the other keywords" },
        { "{\"anyOf\":[{}],\"type\":\"string\"}",
          "\"type\" does not go with the other keywords" },
        { "{\"$ref\":\"#/$defs/a\",\"minLength\":1,\"$defs\":{\"a\":{}}}",
          "\"minLength\" does not go with the other keywords" },
        { "{\"enum\":[1],\"minLength\":1}",
          "\"minLength\" does not go with the other keywords" },
        { "{\"$ref\":\"#/$defs/b\",\"$defs\":{\"a\":{}}}",
          "\"$ref\" leads nowhere: #/$defs/b" },
        { "{\"$ref\":\"other.json\"}", "\"$ref\" leads nowhere: other.json" },
        { "{\"$ref\":\"#\"}", "\"$ref\" leads nowhere: #" },
        { "{\"$ref\":\"#/a~\",\"$defs\":{}}", "\"$ref\" leads nowhere: #/a~" },
        { "{\"$ref\":5}", "\"$ref\" leads nowhere: not a string" },
        { "{\"type\":\"text\"}", "\"type\": expected null boolean integer "
          "number string array object" },
        { "{\"type\":[]}", "\"type\": expected null boolean integer number "
          "string array object" },
        { "{\"enum\":[]}", "\"enum\" or \"const\": no value is of the type" },
        { "{\"type\":\"integer\",\"enum\":[1.5,\"1\"]}",
          "\"enum\" or \"const\": no value is of the type" },
        { "{\"type\":\"string\",\"const\":1}",
          "\"enum\" or \"const\": no value is of the type" },
        { "{\"type\":\"object\",\"required\":[\"a\"]}",
          "\"required\" names a, which is not a property" },
        { "{\"type\":\"object\",\"required\":\"a\"}",
          "\"required\": expected an array" },
        { "{\"type\":\"object\",\"properties\":[]}",
          "\"properties\": expected an object" },
        { "{\"type\":\"object\",\"properties\":{},\"additionalProperties\":"
          "{\"type\":\"string\"}}",
          "\"additionalProperties\": expected false" },
        { "{\"type\":\"array\",\"minItems\":3,\"maxItems\":2}",
          "\"minItems\" is more than \"maxItems\"" },
        { "{\"type\":\"array\",\"minItems\":-1}",
          "\"minItems\": expected a whole number" },
        { "{\"type\":\"string\",\"maxLength\":1.5}",
          "\"maxLength\": expected a whole number" },
        { "{\"anyOf\":[]}", "\"anyOf\": expected an array of schemas" },
        { "{\"anyOf\":[{\"$ref\":\"#\"}]}",
          "no value of this schema ends within 64 levels" },
        { "{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#\"}},"
          "\"required\":[\"a\"]}",
          "no value of this schema ends within 64 levels" },
        { "{\"type\":\"array\",\"items\":false}",
          "expected a schema at items" },
        { "[]", "expected a schema" }, { "false", "expected a schema" },
    };

    for (size_t i = 0; i < COUNT(wrong); i++) {
        EXPECT_MSG(make(wrong[i].schema) == USAGE, "%s", wrong[i].schema);
        EXPECT_MSG(strcmp(why.s, wrong[i].why) == 0, "%s: %s",
                   wrong[i].schema, why.s);
    }
    forget_schema();
}
END_TEST

START_TEST(notes_are_not_refused)
{
    ck_assert_int_eq(make("{\"title\":\"A\",\"description\":\"b\",\"$schema\":"
                          "\"c\",\"$id\":\"d\",\"default\":1,\"examples\":[],"
                          "\"$comment\":\"e\",\"deprecated\":true,\"$defs\":"
                          "{\"unused\":{\"pattern\":\"\"}},\"type\":"
                          "\"integer\"}"), DONE);
    forget_schema();
}
END_TEST

/* -------------------------------------------------------------------- texts */

/* How much of a text fits, and whether it may end there, and has to. */
struct seen { size_t n; int may_end, is_done; };

static struct seen follow(const struct schema *s, const char *text, size_t n)
{
    struct guide g[2] = { { .s = s }, { .s = s } };
    size_t i = 0;

    while (i < n && guide_byte(&g[i % 2], &g[(i + 1) % 2],
                               (unsigned char)text[i]))
        i++;
    return (struct seen){ i, guide_may_end(&g[i % 2]),
                          guide_is_done(&g[i % 2]) };
}

/* Texts are good and complete; or with ! before them wrong at the last
 * character; or with ~ good and not complete. */
static void expect_texts(const struct schema *s, const char *const *text)
{
    for (; *text; text++) {
        const int wrong = **text == '!', open = **text == '~';
        const char *t = *text + (wrong || open);
        const size_t n = strlen(t);
        const struct seen seen = follow(s, t, n);
        EXPECT_MSG(seen.n == n - (size_t)wrong, "%s: taken up to %zu", *text,
                   seen.n);
        EXPECT_MSG(wrong || seen.may_end == !open, "%s: end %d", *text,
                   seen.may_end);
    }
}

#define TEXTS_OF(json, ...) do {                                          \
    ck_assert_msg(make(json) == DONE, "%s: %s", json, why.s);             \
    expect_texts(schema, (const char *const[]){ __VA_ARGS__, NULL });     \
    forget_schema();                                                      \
} while (0)

START_TEST(strings)
{
    TEXTS_OF("{\"type\":\"string\"}", "\"\"", "\"a b\"",
             "\"\\\"\\\\\\/\\b\\n\"", "\"\\u00e4\\uD83d\\uDE00\"",
             "\"\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80\"", "~\"", "~\"\\",
             "!\"\n", "!\"\\x", "!\"\xc0", "!\"\x80",
             "!\"\xe0\x80", "!\"\xed\xa0", "!\"\xf4\x90", "!\"\xf5",
             "!\"\\uDC", "!\"\\ud800a", "!\"\\ud800\\n", "!\"\\ud800\\ud8",
             "!\"\\u00g", "! ", "!a", "!\"\"\"", "!\"\" ", "!'");
    TEXTS_OF("{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}",
             "!\"\"", "!\"a\"", "\"ab\"", "\"a\xc3\xa4\\n\"", "!\"abcd",
             "\"\\uD83d\\uDE00\\uD83d\\uDE00\"", "!\"abc\\", "!\"abc\xc3");
    TEXTS_OF("{\"minLength\":1}", "\"a\"", "!1");
}
END_TEST

START_TEST(numbers)
{
    TEXTS_OF("{\"type\":\"integer\"}", "0", "-0", "7", "-120",
             "123456789012345", "!1234567890123456", "!01", "~-", "!--",
             "!1.", "!1e", "!+");
    TEXTS_OF("{\"type\":\"integer\",\"minimum\":-9007199254740991,"
             "\"maximum\":9007199254740991}", "-999999999999999");
    TEXTS_OF("{\"type\":\"number\"}", "0", "-1.50", "1e5", "1E-05", "0.1e+1",
             "!1e100", "~1.", "~1e", "~1e-", "!.", "!1.e", "!1..",
             "123456789012345678.123456789012345678e99");
    TEXTS_OF("{\"type\":\"array\",\"items\":{\"type\":\"number\"}}",
             "[1, 2,3]", "!1", "[]", "![ ", "![1 ", "![1,  ", "![1,]");
}
END_TEST

START_TEST(values)
{
    TEXTS_OF("{\"type\":\"boolean\"}", "true", "false", "~tru", "!n");
    TEXTS_OF("{\"type\":\"null\"}", "null", "!x");
    TEXTS_OF("{\"enum\":[10,1,\"a\\\"b\",\"a\",null,[1,{\"x\":2}],1.5]}", "10",
             "1", "1.5", "~1.", "!100", "\"a\"", "\"a\\\"b\"", "null",
             "[1, {\"x\": 2}]", "!2", "!\"b");
    TEXTS_OF("{\"const\":\"\xc3\xa4\"}", "\"\xc3\xa4\"", "!\"a");
    TEXTS_OF("{\"type\":\"string\",\"enum\":[1,\"a\"]}", "\"a\"", "!1");
    TEXTS_OF("{\"type\":[\"integer\",\"null\"]}", "5", "null", "!\"");
    TEXTS_OF("{\"type\":[\"number\",\"integer\",\"string\"],\"minLength\":1}",
             "5.5", "\"a\"", "!\"\"");
}
END_TEST

START_TEST(lists)
{
    TEXTS_OF("{\"type\":\"array\",\"items\":{\"enum\":[1]},\"minItems\":1,"
             "\"maxItems\":2}", "[1]", "[1, 1]", "![]", "![1,1,", "~[1,",
             "!a");
    TEXTS_OF("{\"type\":\"array\",\"maxItems\":0}", "[]", "![1");
    TEXTS_OF("{\"type\":\"array\"}", "[]", "[1, \"a\", {\"b\": [null]}, [[]]]",
             "~[{}, ");
    TEXTS_OF("{\"items\":{\"$ref\":\"#\"}}", "[]", "[[], [[]]]", "![1");
}
END_TEST

START_TEST(objects)
{
    TEXTS_OF("{\"type\":\"object\",\"properties\":{\"a\":{\"const\":1},"
             "\"ab\":{\"const\":2},\"c\":{\"const\":3},\"d\":{\"const\":4}},"
             "\"required\":[\"c\"],\"additionalProperties\":false}",
             "{\"c\": 3}", "{\"a\":1,\"ab\":2,\"c\":3,\"d\":4}",
             "{\"ab\":2, \"c\":3}", "{\"c\":3, \"d\": 4}", "!{\"d",
             "!{}", "!{\"a\":1}", "!{\"ab\":2, \"a", "!{\"c\":3,\"c",
             "!{\"c\":3,\"d\":4,", "!{ ", "!{\"c\" ", "!{\"c\":  ",
             "~{\"c\":3, ", "!{\"c\":3 ", "!{\"c\":3}}", "!{\"e");
    TEXTS_OF("{\"type\":\"object\",\"properties\":{}}", "{}", "!{\"");
    TEXTS_OF("{\"type\":\"object\",\"additionalProperties\":false}", "{}",
             "!{\"");
    TEXTS_OF("{\"type\":\"object\"}", "{}", "{\"any\": [1], \"\": null}",
             "!{1", "!{\"a\",");
    TEXTS_OF("{\"type\":\"object\",\"additionalProperties\":"
             "{\"type\":\"integer\"}}", "{}", "{\"x\": 1, \"\\n\": 2}",
             "!{\"x\":\"");
    TEXTS_OF("{\"properties\":{\"\":{\"const\":1},\"q\\\"\":{\"const\":2}}}",
             "{}", "{\"\": 1}", "{\"q\\\"\": 2}");
}
END_TEST

START_TEST(alternatives)
{
    TEXTS_OF("{\"anyOf\":[{\"type\":\"object\",\"properties\":{\"kind\":"
             "{\"const\":\"a\"},\"x\":{\"type\":\"integer\"}},\"required\":"
             "[\"kind\",\"x\"]},{\"type\":\"object\",\"properties\":{\"kind\":"
             "{\"const\":\"b\"},\"y\":{\"type\":\"string\"}},\"required\":"
             "[\"kind\",\"y\"]}]}", "{\"kind\": \"a\", \"x\": 1}",
             "{\"kind\": \"b\", \"y\": \"\"}", "!{\"kind\": \"a\", \"y",
             "!{\"x", "!{\"kind\": \"b\"}");
    TEXTS_OF("{\"anyOf\":[{\"type\":\"integer\"},{\"type\":\"number\"}]}", "1",
             "1.5", "!1.5.");
    TEXTS_OF("{\"anyOf\":[{\"$ref\":\"#\"},{\"type\":\"null\"},{\"anyOf\":["
             "{\"const\":1},{\"$ref\":\"#\"}]}]}", "null", "1", "!2");
    TEXTS_OF("{}", "1", "\"a\"", "null", "{}", "[true]", "-1.5", "!x");
    TEXTS_OF("true", "1", "[{}]");
}
END_TEST

START_TEST(references)
{
    TEXTS_OF("{\"$ref\":\"#/$defs/node\",\"$defs\":{\"node\":{\"type\":"
             "\"object\",\"properties\":{\"v\":{\"type\":\"integer\"},"
             "\"next\":{\"anyOf\":[{\"$ref\":\"#/$defs/node\"},{\"type\":"
             "\"null\"}]}},\"required\":[\"v\",\"next\"]}}}",
             "{\"v\":1,\"next\":{\"v\":2,\"next\":null}}",
             "!{\"v\":1,\"next\":[", "!{\"v\":1,\"next\":{}");
    TEXTS_OF("{\"properties\":{\"a/b~c\":{\"enum\":[5]},\"d\":{\"$ref\":"
             "\"#/properties/a~1b~0c\"},\"e\":{\"$ref\":\"#/properties/f/anyOf/"
             "1\"},\"f\":{\"anyOf\":[{\"const\":1},{\"const\":2}]}}}",
             "{\"d\": 5}", "{\"e\": 2}", "!{\"e\": 1");
}
END_TEST

/* However deep, it can be ended: at the last level only what ends there fits. */
START_TEST(depth_has_a_bound)
{
    static const struct { const char *last, *value; int levels; } deep[] = {
        { "{\"type\":\"null\"}", "null", 63 },
        { "{\"type\":\"string\",\"minLength\":1}", "\"a\"", 62 },
        { "{\"items\":{\"minLength\":1},\"minItems\":2}", "[\"a\",\"b\"]", 61 },
    };

    for (size_t k = 0; k < COUNT(deep); k++) {
        struct text t = { 0 };
        struct seen seen;
        add_string(&t, "{\"properties\":{\"n\":{\"anyOf\":[{\"$ref\":\"#\"},");
        add_string(&t, deep[k].last);
        add_string(&t, "]}},\"required\":[\"n\"]}");
        ck_assert_int_eq(make(t.s), DONE);
        t.n = 0;
        for (int i = 0; i < 80; i++)
            add_string(&t, "{\"n\":");
        seen = follow(schema, t.s, t.n);
        ck_assert_uint_eq(seen.n, (size_t)deep[k].levels * 5);
        t.n = seen.n;
        add_string(&t, deep[k].value);
        for (int i = 0; i < deep[k].levels; i++)
            add_string(&t, "}");
        seen = follow(schema, t.s, t.n);
        ck_assert_uint_eq(seen.n, t.n);
        ck_assert(seen.is_done);
        free(t.s);
        forget_schema();
    }
}
END_TEST

/* Alternatives that look alike and are many do not end it. */
START_TEST(stacks_have_a_bound)
{
    struct text t = { 0 };
    struct seen seen;

    add_string(&t, "{\"$ref\":\"#/$defs/a0\",\"$defs\":{");
    for (int i = 0; i < 10; i++)
        add_format(&t, "\"a%d\":{\"anyOf\":[{\"items\":{\"$ref\":\"#/$defs/a%d"
                   "\"},\"maxItems\":3},{\"items\":{\"$ref\":\"#/$defs/a%d\"},"
                   "\"maxItems\":4}]},", i, i + 1, i + 1);
    add_string(&t, "\"a10\":{\"type\":\"integer\"}}}");
    ck_assert_int_eq(make(t.s), DONE);
    seen = follow(schema, "[[[[[[[[[[1, 2, 3]]]]]]]]]]", 27);
    ck_assert_uint_eq(seen.n, 27);
    ck_assert(seen.is_done);
    free(t.s);
    forget_schema();
}
END_TEST

START_TEST(size_has_a_bound)
{
    struct text t = { 0 };

    add_string(&t, "{\"enum\":[0");
    for (int i = 1; i <= MAX_WORDS; i++)
        add_format(&t, ",%d", i);
    add_string(&t, "]}");
    ck_assert_int_eq(make(t.s), USAGE);
    ck_assert_str_eq(why.s, "a schema of more than 8192 words");
    t.n = 0;
    add_string(&t, "{\"enum\":[0");
    for (int i = 1; i <= 7000; i++)
        add_format(&t, ",\"%099d\"", i);
    add_string(&t, "]}");
    ck_assert_int_eq(make(t.s), DONE);
    forget_schema();
    t.n = 0;
    add_string(&t, "{\"anyOf\":[{\"const\":0}");
    for (int i = 1; i <= MAX_STACKS; i++)
        add_format(&t, ",{\"const\":%d}", i);
    add_string(&t, "]}");
    ck_assert_int_eq(make(t.s), USAGE);
    ck_assert_str_eq(why.s, "\"anyOf\": more than 32 alternatives");
    t.n = 0;
    add_string(&t, "{\"anyOf\":[{\"type\":\"null\"}");
    for (int i = 0; i <= MAX_RULES; i++)
        add_string(&t, ",{}");
    add_string(&t, "]}");
    ck_assert_int_eq(make(t.s), USAGE);
    ck_assert_str_eq(why.s, "a schema of more than 4096 parts");
    t.n = 0;
    add_string(&t, "{\"const\":\"");
    for (int i = 0; i < MAX_WORD; i++)
        add_string(&t, "a");
    add_string(&t, "\"}");
    ck_assert_int_eq(make(t.s), USAGE);
    ck_assert_str_eq(why.s, "a word of 4002 bytes, expected at most 4000");
    t.n = 0;
    add_string(&t, "{\"properties\":{\"a\":{}},\"required\":[\"a\"");
    for (int i = 0; i < MAX_MEMBERS; i++)
        add_string(&t, ",\"a\"");
    add_string(&t, "]}");
    ck_assert_int_eq(make(t.s), USAGE);
    ck_assert_str_eq(why.s, "\"required\" names more than 1024 properties");
    free(t.s);
    forget_schema();
}
END_TEST

/* Behind a thought: up to four blanks, and NUL is not one. */
START_TEST(blanks_may_follow_a_thought)
{
    static const struct { const char *s; size_t n; int fits; } text[] = {
        { "null", 4, 1 }, { " \n\r\tnull", 8, 1 }, { "    ", 4, 1 },
        { "     ", 5, 0 }, { "\0", 1, 0 }, { "\0null", 5, 0 }
    };
    const struct reply r = { .part = AFTER_THOUGHT };

    ck_assert_int_eq(make("{\"type\":\"null\"}"), DONE);
    for (size_t i = 0; i < COUNT(text); i++) {
        struct guide g = { .s = schema };
        EXPECT_MSG(guide_token(&r, &g, text[i].s, text[i].n) == text[i].fits,
                   "text %zu", i);
    }
    forget_schema();
}
END_TEST

Suite *SUITE(void);

Suite *SUITE(void)
{
    Suite *s = suite_create("schema");
    TCase *t = tcase_create("schema");

    tcase_set_timeout(t, 60);
    tcase_add_test(t, what_is_not_known_is_refused_by_its_name);
    tcase_add_test(t, notes_are_not_refused);
    tcase_add_test(t, strings);
    tcase_add_test(t, numbers);
    tcase_add_test(t, values);
    tcase_add_test(t, lists);
    tcase_add_test(t, objects);
    tcase_add_test(t, alternatives);
    tcase_add_test(t, references);
    tcase_add_test(t, depth_has_a_bound);
    tcase_add_test(t, stacks_have_a_bound);
    tcase_add_test(t, size_has_a_bound);
    tcase_add_test(t, blanks_may_follow_a_thought);
    suite_add_tcase(s, t);
    return s;
}
