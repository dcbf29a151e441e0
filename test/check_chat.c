/* What run.c makes of words: JSON, chat templates and tool calls. */
#define _POSIX_C_SOURCE 200809L          /* as run.c does */
#define _GNU_SOURCE

#include <limits.h>

#define main run_main
#include "../run.c"
#undef main

#include "util.h"

#include <check.h>

#undef COUNT                              /* run.c has others                */
#undef CALL
#define COUNT(array) ((int)(sizeof (array) / sizeof *(array)))

/* --------------------------------------------------------------------- JSON
 *
 * A text that is read and written again, or a part of the sentence that says
 * why it cannot be read. */

struct json_row { const char *text, *result; };

static const struct json_row good_json[] = {
    { "null", "null" }, { " true\n", "true" }, { "\t\rfalse ", "false" },
    { "\"\"", "\"\"" }, { "[]", "[]" }, { "{}", "{}" }, { "[ ]", "[]" },
    { "[[],{},[{}]]", "[[], {}, [{}]]" },
    { "{\"a\":1,\"b\":[2,{\"c\":null}]}",
      "{\"a\": 1, \"b\": [2, {\"c\": null}]}" },
    /* the last of equal keys, in the place of the first */
    { "{\"a\":1,\"b\":2,\"a\":[3]}", "{\"a\": [3], \"b\": 2}" },
    { "{\"a\":{\"x\":1},\"a\":{}}", "{\"a\": {}}" },
    { "{\"\":1,\"\\u0000\":2}", "{\"\": 1, \"\\u0000\": 2}" },
    /* strings */
    { "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\\"\\\\/\\b\\f\\n\\r\\t\"" },
    { "\"\\u0041\\u00e9\\u20AC\\ud83d\\ude00\"",
      "\"A\u00e9\u20ac\U0001f600\"" },
    { "\"\\udbff\\udfff \\u007f \\u001f\"",
      "\"\U0010ffff \x7f \\u001f\"" },
    { "\"\xc3\xa9\xe2\x80\xa8\xf0\x9f\x98\x80\"",
      "\"\xc3\xa9\xe2\x80\xa8\xf0\x9f\x98\x80\"" },
    { "\"a\\u0000b\"", "\"a\\u0000b\"" },
    /* numbers, as Python prints them */
    { "0", "0" }, { "-0", "0" }, { "-0.0", "-0.0" }, { "-1", "-1" },
    { "12345678901234567890123456789", "12345678901234567890123456789" },
    { "1.0", "1.0" }, { "1e5", "100000.0" }, { "1E+2", "100.0" },
    { "0.1", "0.1" }, { "1.50", "1.5" }, { "1e15", "1000000000000000.0" },
    { "1e16", "1e+16" }, { "123456789012345678.0", "1.2345678901234568e+17" },
    { "0.0001", "0.0001" }, { "0.00001", "1e-05" }, { "-2.5e-10", "-2.5e-10" },
    { "5e-324", "5e-324" }, { "1e-999", "0.0" },
    { "1.7976931348623157e308", "1.7976931348623157e+308" }
};

static const struct json_row bad_json[] = {
    { "", "line 1, column 1: found the end, expected a value" },
    { " \n ", "line 2, column 2: found the end, expected a value" },
    { "nul", "expected a value" }, { "True", "expected a value" },
    { "NaN", "expected a value" }, { "-Infinity", "expected a number" },
    { "'a'", "found ''', expected a value" }, { "truefalse", "a value" },
    { "1 2", "line 1, column 3: found '2', expected the end" },
    { "1,", "expected the end" }, { "[] []", "expected the end" },
    { "}", "expected a value" }, { "// x\n1", "expected a value" },
    { "[1,]", "found ']', expected a value" }, { "[,1]", "a value" },
    { "[1 2]", "expected ',' or ']'" }, { "[1", "expected ',' or ']'" },
    { "[1}", "found '}', expected ',' or ']'" }, { "[", "a value" },
    { "{\"a\":1,}", "found '}', expected a key in double quotes" },
    { "{\"a\" 1}", "expected ':'" }, { "{\"a\":}", "expected a value" },
    { "{a:1}", "a key in double quotes" },
    { "{1:1}", "a key in double quotes" },
    { "{\"a\":1 \"b\":2}", "expected ',' or '}'" },
    { "{\"a\":1]", "expected ',' or '}'" }, { "{\"a\"", "expected ':'" },
    { "01", "without leading zeros" }, { "-", "a number" },
    { "1.", "a number" }, { ".5", "a value" }, { "1.e5", "a number" },
    { "1e", "the end" }, { "1e+", "the end" }, { "+1", "a value" },
    { "0x10", "a number" }, { "1_0", "a number" },
    { "\"a", "expected a quote" }, { "\"a\\", "after a backslash" },
    { "\"a\\\"", "expected a quote" }, { "\"\\x41\"", "after a backslash" },
    { "\"\\'\"", "after a backslash" }, { "\"\\u12\"", "hexadecimal" },
    { "\"\\u12g4\"", "hexadecimal" }, { "\"\\ud83d\"", "surrogate" },
    { "\"\\ude00\"", "surrogate" }, { "\"\\ud83dx\"", "surrogate" },
    { "\"\\ud83d\\u0041\"", "surrogate" }, { "\"\\ud83d\\u00\"", "surrogate" },
    { "\"a\nb\"", "found byte 0x0a, expected no control character" },
    { "\"\x1f\"", "control character" }, { "\"\xff\"", "expected UTF-8" },
    { "\"\xc0\x80\"", "UTF-8" }, { "\"\xe0\x80\x80\"", "UTF-8" },
    { "\"\xed\xa0\x80\"", "UTF-8" }, { "\"\xf4\x90\x80\x80\"", "UTF-8" },
    { "\"\xc3\"", "UTF-8" }, { "\xc3\xa9", "byte 0xc3, expected a value" },
    { "\xef\xbb\xbf{}", "byte order mark" },
    { "1E400", "a number below 1.8e308" }, { "[-1e400]", "below 1.8e308" }
};

static struct pool pool_of_text;

/* Read from memory that ends where the text ends, so that a step too far is
 * seen; the result lives until the next call. */
static struct json *parse_text(const char *text, size_t n, struct why *why)
{
    struct json *v;
    char *copy = malloc(n + !n);
    int code;

    if (n > 0)
        memcpy(copy, text, n);
    pool_free(&pool_of_text);
    code = json_parse(&pool_of_text, copy, n, &v, why);
    free(copy);
    EXPECT((code == DONE) == (v != NULL));
    return v;
}

static void forget_text(void)
{
    pool_free(&pool_of_text);
}

START_TEST(good_json_comes_back)
{
    const struct json_row *row = &good_json[_i];
    struct text t = { 0 }, again = { 0 };
    struct why why = { "" };
    struct json *v = parse_text(row->text, strlen(row->text), &why);

    ck_assert_msg(v != NULL, "%s: %s", row->text, why.s);
    add_json(&t, v);
    ck_assert_str_eq(t.s, row->result);
    v = parse_text(t.s, t.n, &why);
    add_json(&again, v);
    ck_assert_str_eq(again.s, row->result);
    free(t.s);
    free(again.s);
    forget_text();
}
END_TEST

START_TEST(bad_json_is_refused)
{
    const struct json_row *row = &bad_json[_i];
    struct why why = { "" };

    ck_assert(!parse_text(row->text, strlen(row->text), &why));
    ck_assert_msg(strstr(why.s, row->result) != NULL, "%s: %s", row->text,
                  why.s);
    forget_text();
}
END_TEST

START_TEST(each_part_of_a_json_text_is_no_json)
{
    static const char text[] =
        "{\"a\": [1.5e-3, true, \"\\ud83d\\ude00 \xc3\xa9\\n\"], "
        "\"b\": {\"c\": null, \"d\": {}}}";
    struct why why;

    for (size_t n = 0; n < sizeof text - 1; n++)
        EXPECT_MSG(!parse_text(text, n, &why), "%.*s", (int)n, text);
    ck_assert(parse_text(text, sizeof text - 1, &why) != NULL);
    forget_text();
}
END_TEST

/* Whatever is changed: no crash, and what is accepted comes back. */
START_TEST(damaged_json_does_no_harm)
{
    static const char text[] = "[{\"a\":[1.5e3,-0,\"\\u00e9\\\"x\"]},true,{}]";
    static const char new[] = "[]{},:\"\\0.-eEtu\xc3\xa9 \n\x01";
    uint64_t rng = 1;
    int n_good = 0;

    for (int i = 0; i < 20000; i++) {
        char s[sizeof text];
        struct text one = { 0 }, two = { 0 };
        struct why why;
        memcpy(s, text, sizeof s);
        for (int k = 0; k < 1 + i % 3; k++)
            s[random_u32(&rng) % (sizeof s - 1)] =
                new[random_u32(&rng) % (sizeof new - 1)];
        struct json *v = parse_text(s, sizeof s - 1, &why);
        if (!v)
            continue;
        n_good++;
        add_json(&one, v);
        v = parse_text(one.s, one.n, &why);
        EXPECT_MSG(v != NULL, "%s became %s: %s", s, one.s, why.s);
        add_json(&two, v);
        EXPECT(strcmp(one.s, two.s) == 0);
        free(one.s);
        free(two.s);
    }
    ck_assert_int_gt(n_good, 100);
    forget_text();
}
END_TEST

/* n times `open`, then as often `close`. */
static char *nest(int n, char open, char close)
{
    char *s = malloc((size_t)n * 2 + 1);

    memset(s, open, (size_t)n);
    memset(s + n, close, (size_t)n);
    s[2 * n] = '\0';
    return s;
}

START_TEST(json_nests_only_so_deep)
{
    static const int depth[] = { 1, 64, 65, 500000 };
    struct why why;

    for (int i = 0; i < COUNT(depth); i++) {
        char *s = nest(depth[i], '[', ']');
        struct json *v = parse_text(s, strlen(s), &why);
        struct text t = { 0 };
        ck_assert_int_eq(v != NULL, depth[i] <= MAX_DEPTH);
        if (v) {
            add_json(&t, v);
            ck_assert_str_eq(t.s, s);
        } else
            ck_assert(strstr(why.s, "column 65: found '[', expected no more "
                             "than 64 levels"));
        free(t.s);
        free(s);
    }
    forget_text();
}
END_TEST

/* As many as stay fast: a megabyte of such objects is read in no time. */
START_TEST(objects_have_only_so_many_members)
{
    struct why why;

    for (int more = 0; more <= 1; more++) {
        struct text t = { 0 };
        struct json *v;
        long long x;
        add_string(&t, "[{}");
        while (t.n < 1 << 20) {
            add_string(&t, ",{\"last\":-1");
            for (int i = 1; i < MAX_MEMBERS + more; i++)
                add_format(&t, ",\"%d\":%d", i, i);
            add_string(&t, "}");
        }
        add_string(&t, "]");
        v = parse_text(t.s, t.n, &why);
        ck_assert_int_eq(v != NULL, !more);
        ck_assert(!more || strstr(why.s, "no more than 1024 members"));
        ck_assert(more || json_int(json_get(v->first->next, "1023"), 0, 1023,
                                   &x) == 0);
        free(t.s);
    }
    forget_text();
}
END_TEST

START_TEST(there_is_an_end_to_memory)
{
    char *text = malloc(MAX_JSON + 2);
    struct why why;

    memset(text, ' ', MAX_JSON + 1);
    ck_assert(!parse_text(text, MAX_JSON + 1, &why));
    ck_assert(strstr(why.s, "expected at most 67108864"));
    for (int i = 0; i < MAX_JSON; i += 2)
        memcpy(text + i, i ? ",1" : "[1", 2);
    ck_assert(!parse_text(text, MAX_JSON, &why));
    ck_assert(strstr(why.s, "expected no more values"));
    free(text);
    forget_text();
}
END_TEST

START_TEST(values_are_what_they_are)
{
    static const char text[] = "{\"i\":-7,\"f\":1.0,\"big\":"
                               "99999999999999999999,\"t\":true,\"n\":false,"
                               "\"s\":\"x\",\"e\":1e3}";
    struct why why;
    struct json *v = parse_text(text, sizeof text - 1, &why);
    long long i = 5;
    double x = 5;
    int b = 5;

    ck_assert(json_int(json_get(v, "i"), -7, 7, &i) == 0 && i == -7);
    ck_assert(json_int(json_get(v, "i"), -6, 7, &i) < 0 && i == -7);
    ck_assert(json_int(json_get(v, "f"), -9, 9, &i) < 0);
    ck_assert(json_int(json_get(v, "e"), -9, 9999, &i) < 0);
    ck_assert(json_int(json_get(v, "big"), LLONG_MIN, LLONG_MAX, &i) < 0);
    ck_assert(json_int(json_get(v, "s"), -9, 9, &i) < 0);
    ck_assert(json_int(json_get(v, "none"), -9, 9, &i) < 0 && i == -7);
    ck_assert(json_double(json_get(v, "i"), &x) == 0 && x == -7);
    ck_assert(json_double(json_get(v, "e"), &x) == 0 && x == 1000);
    ck_assert(json_double(json_get(v, "t"), &x) < 0 && x == 1000);
    ck_assert(json_bool(json_get(v, "t"), &b) == 0 && b == 1);
    ck_assert(json_bool(json_get(v, "n"), &b) == 0 && b == 0);
    ck_assert(json_bool(json_get(v, "i"), &b) < 0 && b == 0);
    ck_assert_str_eq(json_text(json_get(v, "s")), "x");
    ck_assert(!json_text(json_get(v, "i")) && !json_text(NULL));
    ck_assert(!json_get(json_get(v, "i"), "x") && !json_get(NULL, "x"));
    forget_text();
}
END_TEST

START_TEST(strings_are_written_as_utf8_whatever_they_are)
{
    static const struct { const char *bytes; size_t n; const char *json; }
    row[] = {
        { "", 0, "\"\"" }, { "a\"\\/", 4, "\"a\\\"\\\\/\"" },
        { "\xff", 1, "\"\ufffd\"" }, { "a\xc3", 2, "\"a\ufffd\"" },
        { "\xc3\xa9\xa9", 3, "\"\u00e9\ufffd\"" },
        { "\xed\xa0\x80", 3, "\"\ufffd\ufffd\ufffd\"" },
        { "\xf0\x9f\x98z", 4, "\"\ufffd\ufffd\ufffdz\"" },
        { "\0\x01\n", 3, "\"\\u0000\\u0001\\n\"" }
    };
    uint64_t rng = 1;
    struct why why;

    for (int i = 0; i < COUNT(row); i++) {
        struct text t = { 0 };
        add_in_quotes(&t, row[i].bytes, row[i].n, '"');
        ck_assert_str_eq(t.s, row[i].json);
        free(t.s);
    }
    for (int i = 0; i < 3000; i++) {
        struct text t = { 0 };
        char s[12];
        for (int k = 0; k < 12; k++)
            s[k] = (char)(random_u32(&rng) % 3 ? 0x80 | random_u32(&rng)
                                               : random_u32(&rng));
        add_in_quotes(&t, s, sizeof s, '"');
        EXPECT_MSG(parse_text(t.s, t.n, &why), "%s: %s", t.s, why.s);
        free(t.s);
    }
    forget_text();
}
END_TEST

/* ---------------------------------------------------------------- templates */

/* A conversation in JSON, as the requests have it, with the settings that are
 * not in it. */
static int render_json(const char *text, int template, struct conversation c,
                       struct rendered *out, struct why *why)
{
    struct pool pool = { 0 };
    struct json *v;
    int code = json_parse(&pool, text, strlen(text), &v, why);

    ck_assert_msg(code == DONE, "%s: %s", text, why->s);
    c.messages = json_get(v, "messages");
    c.tools = json_get(v, "tools");
    c.date = "2026-11-20";
    code = render(&c, template, out, why);
    pool_free(&pool);
    return code;
}

#define USER(text) "{\"role\":\"user\",\"content\":" text "}"
#define SYSTEM(text) "{\"role\":\"system\",\"content\":" text "}"
#define CHAT(messages) "{\"messages\":[" messages "]}"

enum { LFM2 = TEMPLATE_LFM2, INSTRUCT, NEW, VL, A1B, B26 };
enum { GENERATES = 1, KEEP = 2, CONTINUE = 4, OPEN = 8 };

#define B "<|startoftext|>"
#define U(text) "<|im_start|>user\n" text "<|im_end|>\n"
#define S(text) "<|im_start|>system\n" text "<|im_end|>\n"
#define A(text) "<|im_start|>assistant\n" text "<|im_end|>\n"
#define M(role, fields) "{\"role\":\"" role "\"," fields "}"
#define TOOL "{\"name\":\"f\"}"
#undef CALL                               /* run.c has another             */
#define CALL(arguments) "\"tool_calls\":[{\"function\":{\"name\":\"f\"," \
                        "\"arguments\":" arguments "}}]"

static const struct {
    int template, flags;
    const char *json, *text;
} rendering[] = {
    { LFM2, GENERATES, CHAT(USER("\"Hi\"")),
      B U("Hi") "<|im_start|>assistant\n" },
    { A1B, GENERATES | OPEN, CHAT(USER("\"Hi\"")),
      B U("Hi") "<|im_start|>assistant\n<think>" },
    /* parts are joined, null is nothing */
    { LFM2, 0, CHAT(USER("[{\"type\":\"text\",\"text\":\"a\"},"
                         "{\"type\":\"text\",\"text\":\"b\"}]")), B U("ab") },
    { INSTRUCT, 0, CHAT(USER("[]") "," USER("\"\"")), B U("") U("") },
    /* the system */
    { A1B, 0, CHAT(M("developer", "\"content\":\"x\"") "," USER("\"a\"")),
      B S("x") U("a") },
    { LFM2, 0, CHAT(USER("\"a\"") "," SYSTEM("\"x\"")), B U("a") S("x") },
    { LFM2, 0, CHAT(SYSTEM("\"\"") "," SYSTEM("\"\"")), B S("") },
    { INSTRUCT, 0, "{\"messages\":[" SYSTEM("\"x\"") "],\"tools\":[]}",
      B S("x") },
    { INSTRUCT, 0, "{\"messages\":[" USER("\"a\"") "],\"tools\":[\"t\","
      TOOL "]}", B S("List of tools: [t, {\"name\": \"f\"}]") U("a") },
    { VL, 0, "{\"messages\":[" SYSTEM("\"x\"") "],\"tools\":[\"t\"," TOOL "]}",
      B S("x\n\nToday's date: 2026-11-20\n\nList of tools: [\"t\", "
          "{\"name\": \"f\"}]") },
    /* calls: strings in the manner of the template, the rest in Python's */
    { NEW, 0, CHAT(USER("\"a\"") ","
                   M("assistant", CALL("\"{\\\"x\\\": [\\\"it's\\\", 1e5, true,"
                                       " {\\\"y\\\": null}],"
                                       " \\\"z\\\": true}\""))),
      B U("a") A(CALL_START "[f(x=[\"it's\", 100000.0, True, {'y': None}], "
                 "z=True)]" CALL_END) },
    { NEW, 0, CHAT(M("assistant", CALL("{\"x\":[\"'\\\"\\\\\\n\\u0007\\u00ad"
                                       "\"]}"))),
      B A(CALL_START "[f(x=['\\'\"\\\\\\n\\x07\\xad'])]" CALL_END) },
    { VL, 0, CHAT(M("assistant", CALL("{\"x\":\"a\\\"b\",\"y\":{\"z\":[]}}")
                    ",\"content\":\"c\"")),
      B A(CALL_START "[f(x=\"a\"b\", y={\"z\": []})]" CALL_END "c") },
    { A1B, 0, CHAT(M("assistant", CALL("{\"x\":\"it's\"}")
                     ",\"content\":\"c\"")),
      B A("c" CALL_START "[f(x='it's')]" CALL_END) },
    { A1B, 0, CHAT(M("assistant", CALL("\"\""))),
      B A(CALL_START "[f()]" CALL_END) },
    { A1B, 0, CHAT(M("assistant", "\"tool_calls\":[]")),
      B A(CALL_START "[]" CALL_END) },
    { NEW, 0, CHAT(M("assistant", "\"tool_calls\":[]")), B A("") },
    { A1B, 0, CHAT(M("assistant", "\"content\":\"\",\"tool_calls\":null")),
      B A("") },
    { B26, 0, CHAT(M("assistant", CALL("{\"x\":\"it's\\\\\\n\\r\",\"y\":"
                                       "[null,\"'\"],\"z\":null}"))),
      B A(CALL_START "[f(x='it\\'s\\\\\\n\\r', y=[null, \"'\"], z=None)]"
          CALL_END) },
    { B26, 0, CHAT(M("assistant", "\"tool_calls\":[],\"reasoning\":\"t\"")),
      B A("<think>t</think>") },
    { B26, GENERATES, CHAT(M("assistant", "\"reasoning\":\"t\",\"content\":"
                            "\"</think> c\"") "," USER("\"a\"")),
      B A("c") U("a") "<|im_start|>assistant\n<think>" },
    { LFM2, 0, CHAT(M("assistant", CALL("{}") ",\"content\":\"c\"")),
      B A("c") },
    /* thoughts of the past */
    { A1B, 0, CHAT(USER("\"a\"") "," M("assistant", "\"thinking\":\"t\"")),
      B U("a") A("<think>t</think>") },
    { A1B, 0, CHAT(M("assistant", "\"reasoning_content\":\"t\"") ","
                   USER("\"a\"")), B A("") U("a") },
    { A1B, KEEP, CHAT(M("assistant", "\"reasoning_content\":\"t\"") ","
                      USER("\"a\"")), B A("<think>t</think>") U("a") },
    { NEW, 0, CHAT(M("assistant", "\"content\":\"<think>x</think>y</think>\\n"
                     "\\u3000z \\u0085\"") ","
                   M("assistant", "\"content\":\"\"")),
      B A("z") A("") },
    { INSTRUCT, KEEP, CHAT(M("assistant", "\"content\":\"x</think> y\"") ","
                           M("assistant", "\"content\":\"\"")),
      B A("x</think> y") A("") },
    { LFM2, 0, CHAT(M("assistant", "\"content\":\"x</think> y\"") ","
                    M("assistant", "\"thinking\":\"t\"")),
      B A("x</think> y") A("") },
    /* an answer that goes on */
    { LFM2, GENERATES | CONTINUE, CHAT(USER("\"a\"") ","
                                      M("assistant", "\"content\":\"So\"")),
      B U("a") "<|im_start|>assistant\nSo" },
    { VL, CONTINUE, CHAT(M("assistant", CALL("{}"))),
      B "<|im_start|>assistant\n" CALL_START "[f()]" CALL_END },
};

START_TEST(conversations_are_written_down)
{
    const int flags = rendering[_i].flags;
    const struct conversation c = {
        .generate = !!(flags & GENERATES), .keep_thinking = !!(flags & KEEP),
        .continue_last = !!(flags & CONTINUE),
        .open_thought = !!(flags & OPEN)
    };
    struct rendered r;
    struct why why = { "" };

    ck_assert_msg(render_json(rendering[_i].json, rendering[_i].template, c, &r,
                              &why) == DONE, "%s", why.s);
    ck_assert_str_eq(r.text.s, rendering[_i].text);
    rendered_free(&r);
}
END_TEST

/* What is wrong, and a part of the sentence about it. */
static const struct { const char *json, *why; } refused[] = {
    { "{}", "messages is missing, expected an array of messages" },
    { CHAT(""), "messages is empty, expected an array" },
    { "{\"messages\":\"Hi\"}", "messages is a string, expected an array" },
    { CHAT("1"), "messages[0] is a number, expected an object" },
    { CHAT("{}"), "messages[0].role is missing, expected \"system\"" },
    { CHAT(USER("\"a\"") "," M("bot", "\"content\":\"a\"")),
      "messages[1].role is another string, expected" },
    { CHAT("{\"role\":7}"), "messages[0].role is a number" },
    { CHAT("{\"role\":\"user\\u0000\"}"), "messages[0].role is another" },
    { CHAT(M("user", "\"x\":1")), "messages[0].content is missing, expected" },
    { CHAT(USER("null")), "messages[0].content is null, expected a string" },
    { CHAT(M("assistant", "\"content\":null,\"tool_calls\":null")),
      "messages[0] has no content, expected a string or tool_calls" },
    { CHAT(USER("7")), "messages[0].content is a number, expected a string" },
    { CHAT(USER("{}")), "messages[0].content is an object" },
    { CHAT(USER("\"a\\u0000b\"")), "messages[0].content has a NUL character "
      "after 1 bytes" },
    { CHAT(USER("[\"a\"]")), "messages[0].content[0] is not of type" },
    { CHAT(USER("[{\"type\":\"text\",\"text\":\"a\"},"
                "{\"type\":\"image_url\"}]")),
      "messages[0].content[1] is not of type \"text\"" },
    { CHAT(USER("[{\"type\":\"text\"}]")),
      "messages[0].content[0].text is missing, expected a string" },
    { CHAT(USER("[{\"type\":\"text\",\"text\":\"\\u0000\"}]")),
      "content[0].text has a NUL" },
    { CHAT(M("assistant", "\"thinking\":[]")),
      "messages[0].thinking is an array, expected a string" },
    { CHAT(M("assistant", "\"tool_calls\":{}")),
      "messages[0].tool_calls is an object, expected an array" },
    { CHAT(M("assistant", "\"tool_calls\":[1]")),
      "messages[0].tool_calls[0] has no function with a name" },
    { CHAT(M("assistant", "\"tool_calls\":[{\"name\":\"a\\u0000\"}]")),
      "messages[0].tool_calls[0] has no function with a name" },
    { CHAT(M("assistant", CALL("[]"))),
      "messages[0].tool_calls[0].function.arguments is an array" },
    { CHAT(M("assistant", CALL("\"{\""))), "arguments is a string" },
    { CHAT(M("assistant", CALL("\"[]\""))), "arguments is a string" },
    { "{\"messages\":[" USER("\"a\"") "],\"tools\":{}}",
      "tools is an object, expected an array" },
    { "{\"messages\":[" USER("\"a\"") "],\"tools\":[" TOOL ",7]}",
      "tools[1] is a number, expected an object" },
    { "{\"messages\":[" USER("\"a\"") "],\"tools\":[{\"type\":\"function\","
      "\"function\":{\"name\":\"\"}}]}", "tools[0] has no name, expected a" },
};

START_TEST(bad_conversations_are_refused)
{
    const struct conversation c = { .generate = 1 };
    struct rendered r;
    struct why why = { "" };

    for (int t = LFM2; t <= B26; t++) {
        ck_assert_int_eq(render_json(refused[_i].json, t, c, &r, &why), USAGE);
        ck_assert_msg(strstr(why.s, refused[_i].why) != NULL, "%s", why.s);
        rendered_free(&r);
    }
}
END_TEST

START_TEST(only_an_answer_can_go_on)
{
    const struct conversation c = { .continue_last = 1 };
    struct rendered r;
    struct why why = { "" };

    ck_assert_int_eq(render_json(CHAT(USER("\"a\"")), LFM2, c, &r, &why),
                     USAGE);
    ck_assert(strstr(why.s, "messages[0] is of role user, expected"));
    rendered_free(&r);
    ck_assert_int_eq(render_json(CHAT(USER("\"a\"")), TEMPLATE_NONE, c, &r,
                                 &why), USAGE);
    ck_assert(strstr(why.s, "no chat template"));
    rendered_free(&r);
}
END_TEST

/* All conversations of test/chat.json by all templates in it. */
START_TEST(renderings_are_those_of_the_templates)
{
    struct bytes file = load_file("test/chat.json");
    struct pool pool = { 0 };
    struct why why = { "" };
    struct json *all, *t, *one;
    int n = 0;

    ck_assert_ptr_nonnull(file.p);
    ck_assert_msg(json_parse(&pool, (char *)file.p, file.n, &all, &why) == DONE,
                  "%s", why.s);
    for (t = json_get(all, "rendered")->first; t; t = t->next)
        for (one = t->first; one; one = one->next, n++) {
            struct json *v = json_get(json_get(all, "conversations"), one->key);
            struct conversation c = { .generate = 1, .date = "2026-11-20" };
            struct rendered r;
            int template = LFM2;
            while (strcmp(template_name(template), t->key) != 0)
                ck_assert_int_lt(template++, B26);
            c.messages = json_get(v, "messages");
            c.tools = json_get(v, "tools");
            json_bool(json_get(v, "add_generation_prompt"), &c.generate);
            ck_assert_msg(render(&c, template, &r, &why) == DONE, "%s", why.s);
            ck_assert_str_eq(r.text.s, one->s);
            rendered_free(&r);
        }
    ck_assert_int_eq(n, 65);
    pool_free(&pool);
    free(file.p);
}
END_TEST

/* --------------------------------------------------------------- its tokens */

static lfm2_tokenizer *open_tokenizer(void)
{
    lfm2_tokenizer *words;
    lfm2_error err = { 0 };

    ck_assert_msg(lfm2_tokenizer_open(&words, "tokenizer.bin", &err) == LFM2_OK,
                  "%s", err.msg);
    return words;
}

/* The ids written out, control tokens in braces. */
static const char *spell(const lfm2_tokenizer *words, const struct ids *ids)
{
    static char out[4096];
    size_t n = 0;

    for (int i = 0; i < ids->n; i++) {
        int len, plain;
        const char *s = lfm2_token_bytes(words, ids->id[i], 1, &len);
        lfm2_token_bytes(words, ids->id[i], 0, &plain);
        n += (size_t)snprintf(out + n, sizeof out - n,
                              plain ? "%.*s" : "{%.*s}", len, s);
        ck_assert(n < sizeof out);
    }
    return out;
}

static const char *spell_json(const lfm2_tokenizer *words, const char *json,
                              int template, int special, int open_thought)
{
    const struct conversation c = { .generate = open_thought,
                                    .open_thought = open_thought };
    struct ids ids = { NULL, 0 };
    struct rendered r;
    struct why why = { "" };
    const char *s;

    ck_assert_msg(render_json(json, template, c, &r, &why) == DONE, "%s",
                  why.s);
    ck_assert(encode_rendered(words, &r, special, &ids, &why) == DONE);
    s = spell(words, &ids);
    free(ids.id);
    rendered_free(&r);
    return s;
}

START_TEST(only_what_the_template_wrote_is_a_marker)
{
    static const char json[] =
        "{\"messages\":[" SYSTEM("\"<|im_end|>\"") ","
        USER("\"<|tool_call_start|>\"") "," M("assistant", "\"content\":"
        "\"x<|tool_call_start|>[]<|tool_call_end|><|tool_call_<|im_end|>\"") ","
        M("tool", "\"content\":\"<|tool_response_end|>\"") "],\"tools\":["
        "\"t\"]}";
    lfm2_tokenizer *words = open_tokenizer();

    ck_assert_str_eq(spell_json(words, json, LFM2, 0, 0),
        "{<|startoftext|>}{<|im_start|>}system\n<|im_end|>\nList of tools: "
        "{<|tool_list_start|>}[t]{<|tool_list_end|>}{<|im_end|>}\n"
        "{<|im_start|>}user\n<|tool_call_start|>{<|im_end|>}\n"
        "{<|im_start|>}assistant\nx{<|tool_call_start|>}[]{<|tool_call_end|>}"
        "<|tool_call_<|im_end|>{<|im_end|>}\n{<|im_start|>}tool\n"
        "{<|tool_response_start|>}<|tool_response_end|>{<|tool_response_end|>}"
        "{<|im_end|>}\n");
    ck_assert_str_eq(
        spell_json(words, CHAT(USER("\"<|im_end|>x\"")), A1B, 1, 0),
        "{<|startoftext|>}{<|im_start|>}user\n{<|im_end|>}x{<|im_end|>}\n");
    lfm2_tokenizer_close(words);
}
END_TEST

/* <think> is no token here: it is one piece with the text around it. */
START_TEST(marks_without_a_token_are_text)
{
    lfm2_tokenizer *words = open_tokenizer();
    const char json[] = CHAT(USER("\"a\"") "," M("assistant", "\"thinking\":"
                             "\"t\",\"content\":\"c\""));
    struct ids ids = { NULL, 0 };
    struct rendered r;
    struct why why;
    int32_t piece[64];
    const char text[] = "assistant\n<think>t</think>c";
    int n;

    ck_assert_str_eq(spell_json(words, json, NEW, 0, 1),
        "{<|startoftext|>}{<|im_start|>}user\na{<|im_end|>}\n{<|im_start|>}"
        "assistant\n<think>t</think>c{<|im_end|>}\n{<|im_start|>}assistant\n"
        "<think>");
    ck_assert(render_json(json, NEW, (struct conversation){ .generate = 0 }, &r,
                          &why) == DONE);
    ck_assert(encode_rendered(words, &r, 0, &ids, &why) == DONE);
    n = lfm2_encode(words, text, strlen(text), 0, piece, 64);
    ck_assert_int_gt(ids.n, n + 2);
    ck_assert_mem_eq(piece, ids.id + ids.n - n - 2, (size_t)n * sizeof *piece);
    free(ids.id);
    rendered_free(&r);
    lfm2_tokenizer_close(words);
}
END_TEST

/* Clients hand thoughts back in the content; here <think> is a token. */
START_TEST(thoughts_have_their_tokens)
{
    struct bytes file = load_file("tokenizer.bin");
    lfm2_tokenizer *words;
    uint8_t *p = file.p;

    while (memcmp(p, "<|pad|>", 7) != 0)
        p++;
    memcpy(p, "<think>", 7);
    ck_assert_int_eq(lfm2_tokenizer_open_memory(&words, file.p, file.n, NULL),
                     LFM2_OK);
    ck_assert_str_eq(spell_json(words, CHAT(USER("\"<think>\"") ","
        M("assistant", "\"content\":\"<think>t</think>c\"")), LFM2, 0, 0),
        "{<|startoftext|>}{<|im_start|>}user\n<think>{<|im_end|>}\n"
        "{<|im_start|>}assistant\n{<think>}t</think>c{<|im_end|>}\n");
    lfm2_tokenizer_close(words);
    free(file.p);
}
END_TEST

START_TEST(tokens_are_those_of_lfm2_chat)
{
    static const char *const text[] = {
        "Hi", "", " a\n\nb ", "<|im_end|>\n", "caf\u00e9 \U0001f600",
        "It's 12345 o'clock.", "\n\n\n", "<|startoftext|>", "x <think> y"
    };
    lfm2_tokenizer *words = open_tokenizer();

    for (int i = 0; i < COUNT(text) * COUNT(text) * 2; i++) {
        const char *role[] = { "system", "user", "assistant", "user" };
        lfm2_message msg[4];
        struct text t = { 0 };
        struct rendered r;
        struct ids ids = { NULL, 0 };
        struct why why;
        int32_t want[512];
        int first, n;
        add_string(&t, "{\"messages\": [");
        for (int k = 0; k < 4; k++) {
            msg[k].role = role[k];
            msg[k].content = text[(i / (k % 2 ? 1 : COUNT(text)) + k / 2) %
                                  COUNT(text)];
            add_members(&t, "{role: %s, content: %s}", role[k], msg[k].content);
        }
        add_string(&t, "]}");
        const struct conversation c = { .generate = i % 2 };
        ck_assert(render_json(t.s, LFM2, c, &r, &why) == DONE);
        ck_assert(encode_rendered(words, &r, 0, &ids, &why) == DONE);
        first = msg[0].content[0] == '\0';      /* the template drops it     */
        n = lfm2_chat(words, msg + first, 4 - first, i % 2, want, 512);
        ck_assert_int_eq(ids.n, n);
        ck_assert_mem_eq(ids.id, want, (size_t)n * sizeof *want);
        free(ids.id);
        rendered_free(&r);
        free(t.s);
    }
    lfm2_tokenizer_close(words);
}
END_TEST

START_TEST(a_vocabulary_without_markers_cannot_chat)
{
    static const char marker[] = "<|im_end|>";
    struct bytes file = tiny_model(&(struct tiny){ .words = 1 });
    struct ids ids = { NULL, 0 };
    lfm2_tokenizer *words;
    struct rendered r;
    struct why why;
    uint8_t *p = file.p;

    while (memcmp(p, marker, strlen(marker)) != 0)
        p++;
    *p = '[';
    ck_assert_int_eq(lfm2_tokenizer_open_memory(&words, file.p, file.n, NULL),
                     LFM2_OK);
    ck_assert(render_json(CHAT(USER("\"a\"")), LFM2,
                          (struct conversation){ .generate = 1 }, &r, &why)
              == DONE);
    ck_assert_int_eq(encode_rendered(words, &r, 0, &ids, &why), BAD_MODEL);
    ck_assert_str_eq(why.s, "the chat format needs the tokens <|im_start|> and "
                     "<|im_end|>, which the vocabulary lacks");
    rendered_free(&r);
    lfm2_tokenizer_close(words);
    free(file.p);
}
END_TEST

/* ---------------------------------------------------- the choice of a model */

/* A model with this template under this key, and a name; its choice. */
static int choice_of(const char *key, const char *template, const char *name,
                     int *known, struct why *why)
{
    const struct edit edits[] = {
        { RENAME, "lfm2.vocab_size", 0, 0, key, 0 },
        { SET_STRING, "lfm2.vocab_size", 0, 0, template, 0 },
        { SET_STRING, "general.name", 0, 0, name, 0 },
        { NO_EDIT, NULL, 0, 0, NULL, 0 }
    };
    const struct tiny t = { .words = 1, .edits = template ? edits : edits + 2 };
    struct bytes file = tiny_model(&t);
    lfm2_model *model;
    lfm2_tokenizer *words;
    lfm2_error err = { 0 };
    int chosen;

    ck_assert_msg(lfm2_model_open_memory(&model, file.p, file.n, &err)
                  == LFM2_OK, "%s", err.msg);
    ck_assert(lfm2_tokenizer_open_memory(&words, file.p, file.n, &err)
              == LFM2_OK);
    chosen = choose_template(model, words, known, why);
    lfm2_tokenizer_close(words);
    lfm2_model_close(model);
    free(file.p);
    return chosen;
}

static int choice(const char *template, const char *name, int *known,
                  struct why *why)
{
    return choice_of("tokenizer.chat_template", template, name, known, why);
}

START_TEST(a_template_for_something_else_is_none)
{
    struct why why = { "" };
    int known = 0;

    ck_assert_int_eq(choice_of("tokenizer.chat_template.systemone",
                               "List of tools: [", "x", &known, &why),
                     TEMPLATE_NONE);
    ck_assert_int_eq(known, 1);
    ck_assert_str_eq(why.s, "the file has no chat template except "
                     "tokenizer.chat_template.systemone, which serves another "
                     "purpose, so the prompt is continued as plain text");
}
END_TEST

START_TEST(an_edited_template_is_recognised)
{
    static const struct { const char *template, *name; int chosen; } row[] = {
        { NULL, "LFM2.5", TEMPLATE_NONE },
        { "x <|tool_list_start|> List of tools: [", "LFM2.5", LFM2 },
        { "List of tools: [ preserve_thinking", "x", A1B },
        { "strftime_now List of tools: [", "x", NEW },
        { "strftime_now", "VL", NEW },
        { "strftime_now continue_final_message", "x", VL },
        { "preserve_thinking message.reasoning", "x", B26 },
        { "preserve_thinking <|im_start|>assistant\\n<think>",
          "LFM2.5-24B-A2B", A1B },
        { "List of tools: [", "x", INSTRUCT },
        { "", "LFM2-1.2B", LFM2 },
        { "{{ chatml }}", "LFM2.5-1.2B", INSTRUCT },
        { "{{ chatml }}", "LFM2.5-VL-450M", VL },
        { "{{ chatml }}", "LFM2-VL", LFM2 },
    };

    for (int i = 0; i < COUNT(row); i++) {
        struct why why = { "" };
        int known = -1;
        ck_assert_int_eq(choice(row[i].template, row[i].name, &known, &why),
                         row[i].chosen);
        ck_assert_int_eq(known, row[i].template == NULL);
        ck_assert(row[i].template ? strstr(why.s, "unknown") != NULL :
                  strstr(why.s, "no chat template") != NULL);
    }
}
END_TEST

START_TEST(the_model_that_ships_is_known)
{
    lfm2_tokenizer *words = open_tokenizer();
    lfm2_model *model;
    struct why why;
    int known = 0;

    ck_assert(lfm2_model_open(&model, "test/tiny.gguf", LFM2_LOAD_MAP, NULL)
              == LFM2_OK);
    ck_assert_int_eq(choose_template(model, words, &known, &why), LFM2);
    ck_assert_int_eq(known, 1);
    ck_assert(strstr(why.s, "chat template lfm2: "));
    lfm2_model_close(model);
    lfm2_tokenizer_close(words);
}
END_TEST

/* The published templates, as they are and with other ends of lines. */
START_TEST(published_templates_are_known)
{
    for (int t = LFM2; t <= B26; t++) {
        struct text crlf = { 0 };
        struct why why;
        struct bytes file;
        char name[64];
        const char *path;
        int known = 0;
        snprintf(name, sizeof name, "%s/%s.jinja", t == B26 ? "review/cases" :
                 "chat", template_name(t));
        path = shared_file(name);
        if (!path)
            return;
        file = load_file(path);
        bytes_put(&file, "", 1);
        ck_assert_int_eq(choice((char *)file.p, "x", &known, &why), t);
        ck_assert_int_eq(known, 1);
        for (size_t i = 0; i < file.n - 1; i++) {
            add_string(&crlf, file.p[i] == '\n' ? "\r" : "");
            add(&crlf, (char *)&file.p[i], 1);
        }
        add_string(&crlf, " \r\n\n");
        ck_assert_int_eq(choice(crlf.s, "x", &known, &why), t);
        ck_assert_int_eq(known, 1);
        crlf.s[100]++;
        ck_assert_int_eq(choice(crlf.s, "x", &known, &why), t);
        ck_assert_int_eq(known, 0);
        free(crlf.s);
        free(file.p);
    }
}
END_TEST

START_TEST(today_is_a_date)
{
    char date[11];
    int y, m, d, n = 0;

    today(date);
    ck_assert(sscanf(date, "%4d-%2d-%2d%n", &y, &m, &d, &n) == 3 && n == 10);
    ck_assert(y >= 2024 && m >= 1 && m <= 12 && d >= 1 && d <= 31);
}
END_TEST

/* --------------------------------------------------------------- tool calls */

#define C(body) CALL_START body CALL_END
#define G(name, args) "[\"" name "\", {" args "}]"
#define F(args) "[" G("f", args) "]"
#define X(value) F("\"x\": " value)
#define TEXT(body) "[]", C(body), 1, 0

/* What a model wrote, the calls in it, the text around them, and how many were
 * not understood. */
static const struct calls_row {
    const char *text, *calls, *rest;
    int bad, cut;
} calls_row[] = {
    { "", "[]", "", 0, 0 },
    { "No call.", "[]", "No call.", 0, 0 },
    { C("[f()]"), F(""), "", 0, 0 },
    { "Let me see." C("[f()]") " Wait.", F(""), "Let me see. Wait.", 0, 0 },
    { C(" [ f ( x = 1 , ) , ] "), X("1"), "", 0, 0 },
    { C("f(x=1)"), X("1"), "", 0, 0 },
    { C("f(x=1), g()"), "[" G("f", "\"x\": 1") ", " G("g", "") "]", "", 0, 0 },
    { C("[a.b-c.d_e(from=1)]"), "[" G("a.b-c.d_e", "\"from\": 1") "]", "", 0,
      0 },
    { C("[f(x=1), g(y=2)]"), "[" G("f", "\"x\": 1") ", " G("g", "\"y\": 2") "]",
      "", 0, 0 },
    { C("[f()]") "and" C("[g()]"), "[" G("f", "") ", " G("g", "") "]", "and", 0,
      0 },
    { C("[]"), "[]", "", 0, 0 },
    { C("f()\ng()"), "[" G("f", "") ", " G("g", "") "]", "", 0, 0 },
    { C("f() g()"), TEXT("f() g()") },
    /* values, besides those of test/calls.py */
    { C("[f(x=[1, [2], {'a': {\"b\": (3, 4)}}, (), (5), (6,)])]"),
      X("[1, [2], {\"a\": {\"b\": [3, 4]}}, [], 5, [6]]"), "", 0, 0 },
    { C("[f(x=[True, False, None, true, false, null])]"),
      X("[true, false, null, true, false, null]"), "", 0, 0 },
    { C("[f(x=[-0, -1, +2, -(3), 0x1F, .5, 5., 1_000, -0.0])]"),
      X("[0, -1, 2, -3, 31, 0.5, 5.0, 1000, -0.0]"), "", 0, 0 },
    { C("[f(x={1: 'a', 'b': 2, 0x1: 'c',})]"),
      X("{\"1\": \"c\", \"b\": 2}"), "", 0, 0 },
    { C("[f(x={3, 1, 3}, y={'b', 'a',}, z=set())]"),
      F("\"x\": [3, 1], \"y\": [\"b\", \"a\"], \"z\": []"), "", 0, 0 },
    { C("[f({'x': 1},)]"), X("1"), "", 0, 0 },
    { C("[f(x='a' \"b\" r'\\n' f'c' '''d'e''')]"), X("\"ab\\\\ncd'e\""), "", 0,
      0 },
    { C("[f(x='\\ud83d\\ude00\\U0001F600\\101\\/\\\r\n')]"),
      X("\"\U0001f600\U0001f600A\\\\/\""), "", 0, 0 },
    { C("[f(x='a\\x00b')]"), X("\"a\\u0000b\""), "", 0, 0 },
    { C("[f(x\xff='\xff', x\x80\xfe=2)]"),
      F("\"x\ufffd\": \"\ufffd\", \"x\ufffd\ufffd\": 2"), "", 0, 0 },
    /* clear where Python sees an error */
    { C("[f(x='it's', y='o'clock')]"),
      F("\"x\": \"it's\", \"y\": \"o'clock\""), "", 0, 0 },
    { C("[f(x=\"a \"quoted\" word\")]"), X("\"a \\\"quoted\\\" word\""), "",
      0, 0 },
    { C("[f(x='a\nb\\\nc')]"), X("\"a\\nbc\""), "", 0, 0 },
    { C("[f(x=\"say \"a\", b=\"c\" now\")]"),
      TEXT("[f(x=\"say \"a\", b=\"c\" now\")]") },
    { C("[f(x='a'if 1 else'b')]"), TEXT("[f(x='a'if 1 else'b')]") },
    { C("[f(x='a' in 'b's')]"), TEXT("[f(x='a' in 'b's')]") },
    { C("[f(x='a' + 'b')]"), TEXT("[f(x='a' + 'b')]") },
    { C("[f(x='a' b'c')]"), TEXT("[f(x='a' b'c')]") },
    { C("[f(x='it's' 'a')]"), TEXT("[f(x='it's' 'a')]") },
    { C("[f(x='a' f'{b}')]"), TEXT("[f(x='a' f'{b}')]") },
    { C("[f(x='5\" tall', y=\"5\" tall\")]"),
      TEXT("[f(x='5\" tall', y=\"5\" tall\")]") },
    /* JSON */
    { C("{\"name\": \"f\", \"arguments\": {\"x\": \"\\/\"}}"), X("\"/\""), "",
      0, 0 },
    { C("[{\"name\": \"f\", \"parameters\": {\"x\": null}}]"), X("null"), "",
      0, 0 },
    { C("{\"name\": \"f\", \"arguments\": \"{\\\"x\\\": 1}\"}"), X("1"), "",
      0, 0 },
    { C("{\"type\": \"function\", \"function\": {\"name\": \"f\"}}"), F(""), "",
      0, 0 },
    { C("{\"name\": \"f\"}\n{\"name\": \"g\", \"arguments\": null}"),
      "[" G("f", "") ", " G("g", "") "]", "", 0, 0 },
    { C("{\"name\": \"f\", \"arguments\": {\"x\": 1e400}}"),
      TEXT("{\"name\": \"f\", \"arguments\": {\"x\": 1e400}}") },
    /* the end is missing, or written twice */
    { "a" CALL_START "[f(x=1)]", X("1"), "a", 0, 0 },
    { CALL_START "[f(x=1)]", X("1"), "", 0, 1 },
    { C("[f(x=1)"), X("1"), "", 0, 1 }, { CALL_START "[f()", F(""), "", 0, 0 },
    { CALL_START "[f()", "[]", CALL_START "[f()", 0, 1 },
    { "a" CALL_START "[f(x='b", "[]", "a" CALL_START "[f(x='b", 1, 0 },
    { "a" CALL_START "[f(x='b", "[]", "a" CALL_START "[f(x='b", 0, 1 },
    { CALL_START "[f(x=1), g(", "[]", CALL_START "[f(x=1), g(", 0, 1 },
    { CALL_START, "[]", CALL_START, 0, 1 },
    { CALL_START "[f()]" C("[g()]"), "[" G("f", "") ", " G("g", "") "]", "", 0,
      0 },
    { "x" CALL_END "y", "[]", "x" CALL_END "y", 0, 0 },
    { C("[f()]") CALL_END "[f()]" CALL_END "y", F(""), "[f()]y", 0, 0 },
    { "<|tool_call_" C("[f()]") "<|tool_call_st", F(""),
      "<|tool_call_<|tool_call_st", 0, 0 },
    /* not understood */
    { C(""), TEXT("") }, { C("hello"), TEXT("hello") },
    { C("[f(1)]"), TEXT("[f(1)]") }, { C("[f('a')]"), TEXT("[f('a')]") },
    { C("[f({'a': 1}, b=2)]"), TEXT("[f({'a': 1}, b=2)]") },
    { C("[f({1})]"), TEXT("[f({1})]") },
    { C("[f(x=g())]"), TEXT("[f(x=g())]") },
    { C("[f()], f()"), TEXT("[f()], f()") },
    { C("{\"name\": \"f\", \"arguments\": g()}"),
      TEXT("{\"name\": \"f\", \"arguments\": g()}") },
    { C("[[f()]]"), TEXT("[[f()]]") }, { C("[-f()]"), TEXT("[-f()]") },
    { C("[f(**{'a': 1})]"), TEXT("[f(**{'a': 1})]") },
    { C("[f(x=1, x=2)]"), TEXT("[f(x=1, x=2)]") },
    { C("[f(x={1, 'a'}, y={a: 1})]"), TEXT("[f(x={1, 'a'}, y={a: 1})]") },
    { C("[f(x=1 y=2)]"), TEXT("[f(x=1 y=2)]") },
    { C("[f(x=0x10000000000000000)]"), TEXT("[f(x=0x10000000000000000)]") },
    { C("[f(x=1-2)]"), TEXT("[f(x=1-2)]") }, { C("[f(x=]"), TEXT("[f(x=]") },
    { C("[f(x=1]"), TEXT("[f(x=1]") }, { C("[f(),,f()]"), TEXT("[f(),,f()]") },
    { C("[f(x='\\ud83d')]"), TEXT("[f(x='\\ud83d')]") },
    { C("[f(x='\\"), TEXT("[f(x='\\") }, { C("['f']"), TEXT("['f']") },
    { C("{\"name\": 1}"), TEXT("{\"name\": 1}") },
    { C("{\"name\": \"\"}"), TEXT("{\"name\": \"\"}") },
    { C("{\"name\": \"f\", \"arguments\": [1]}"),
      TEXT("{\"name\": \"f\", \"arguments\": [1]}") },
    { "a" C("[") "b" C("[f()]") "c" C("]") "d", F(""),
      "a" C("[") "bc" C("]") "d", 2, 0 },
};

/* Reads a copy that ends where the text ends. */
static int calls_in(const char *s, size_t n, int cut, struct text *out,
                    struct text *rest)
{
    struct calls calls;
    char *copy = malloc(n + !n);
    int bad;

    memcpy(copy, s, n);
    out->n = rest->n = 0;
    bad = parse_calls(copy, n, cut, &calls, rest);
    add_string(out, "[");
    for (int i = 0; i < calls.n; i++) {
        const struct call *c = &calls.call[i];
        add_members(out, "[%.*s", (int)c->name.n, c->name.s);
        add_string(out, ", ");
        add(out, c->arguments.s, c->arguments.n);
        add_string(out, "]");
    }
    add_string(out, "]");
    free_calls(&calls);
    free(copy);
    return bad;
}

START_TEST(calls_are_understood)
{
    const struct calls_row *row = &calls_row[_i];
    struct text calls = { 0 }, rest = { 0 };

    ck_assert_int_eq(calls_in(row->text, strlen(row->text), row->cut, &calls,
                              &rest), row->bad);
    ck_assert_str_eq(calls.s, row->calls);
    ck_assert_str_eq(rest.s, row->rest);
    free(calls.s);
    free(rest.s);
}
END_TEST

/* Cut anywhere, and changed at random: what is no call stays as it was. */
START_TEST(damaged_calls_do_no_harm)
{
    static const char new[] = "[](){}'\"\\,=:. fxNu1<|";
    struct text calls = { 0 }, rest = { 0 };
    uint64_t rng = 1;

    for (int i = 0; i < COUNT(calls_row); i++) {
        const size_t n = strlen(calls_row[i].text);
        for (size_t k = 0; k < n; k++)
            calls_in(calls_row[i].text, k, 1, &calls, &rest);
        for (int k = 0; n > 0 && k < 300; k++) {
            char s[256];
            memcpy(s, calls_row[i].text, n);
            for (int j = 0; j < 1 + k % 3; j++)
                s[random_u32(&rng) % n] = new[random_u32(&rng) %
                                              (sizeof new - 1)];
            calls_in(s, n, 0, &calls, &rest);
            if (strcmp(calls.s, "[]") == 0 && !memchr(rest.s, '[', rest.n))
                EXPECT(rest.n <= n);
        }
    }
    free(calls.s);
    free(rest.s);
}
END_TEST

/* A megabyte of what could take a reader long. */
START_TEST(hostile_calls_take_no_time)
{
    static const char *const unit[] = {
        "'", "\"", "''' ", "' ", "\\", "[", "(", "{", "f(", "[f(x=",
        "f(x='", CALL_START, CALL_START "[f('", CALL_END, "<|tool_call_", "<",
        " ", "{'a':", ",", "1", "\\x", "'\n"
    };
    struct text calls = { 0 }, rest = { 0 }, t = { 0 };

    for (int i = 0; i < COUNT(unit) * 2; i++) {
        t.n = 0;
        add_string(&t, i % 2 ? CALL_START "[f(x='" : CALL_START);
        while (t.n < SOME_OF(1 << 20))
            add_string(&t, unit[i / 2]);
        calls_in(t.s, t.n, 0, &calls, &rest);
        ck_assert_uint_eq(rest.n, t.n);
        ck_assert_mem_eq(rest.s, t.s, t.n);
    }
    free(calls.s);
    free(rest.s);
    free(t.s);
}
END_TEST

/* Random calls, damaged ones among them, against Python's own reader.  More of
 * them: LFM2_CALLS=100000 build/test/check_chat */
START_TEST(values_are_those_of_python)
{
    const char *n = getenv("LFM2_CALLS");
    char command[128], *line = NULL;
    struct text calls = { 0 }, rest = { 0 }, t = { 0 };
    size_t cap = 0;
    long n_read = 0, known = 0;
    FILE *f;

    if (system("python3 -c 'import ast' 2>/dev/null") != 0) {
        puts("skipped: python3 is not there");
        return;
    }
    snprintf(command, sizeof command, "python3 test/calls.py -n %ld",
             n ? atol(n) : 4000);
    ck_assert((f = popen(command, "r")) != NULL);
    for (ssize_t len; (len = getline(&line, &cap, f)) > 0; n_read++) {
        struct why why;
        struct json *v = parse_text(line, (size_t)len, &why);
        const struct json *want = json_get(v, "calls");
        ck_assert_msg(v != NULL, "%s: %s", line, why.s);
        t.n = 0;
        add_string(&t, CALL_START);
        add(&t, json_get(v, "text")->s, json_get(v, "text")->n);
        add_string(&t, CALL_END);
        const int bad = calls_in(t.s, t.n, 0, &calls, &rest);
        EXPECT(bad ? rest.n == t.n : rest.n == 0);
        if (json_is(want, JSON_STRING))
            continue;
        known++;
        EXPECT_MSG(bad == json_is(want, JSON_NULL), "%s: %s", t.s, calls.s);
        t.n = 0;
        if (json_is(want, JSON_ARRAY)) {
            add_json(&t, want);
            EXPECT_MSG(strcmp(t.s, calls.s) == 0, "%s: %s", line, calls.s);
        }
    }
    ck_assert(pclose(f) == 0 && n_read > 0 && known > n_read / 4);
    free(line);
    free(calls.s);
    free(rest.s);
    free(t.s);
    forget_text();
}
END_TEST

Suite *chat_suite(void)
{
    Suite *s = suite_create("chat");
    TCase *c = tcase_create("chat");

    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, good_json_comes_back, 0, COUNT(good_json));
    tcase_add_loop_test(c, bad_json_is_refused, 0, COUNT(bad_json));
    tcase_add_test(c, each_part_of_a_json_text_is_no_json);
    tcase_add_test(c, damaged_json_does_no_harm);
    tcase_add_test(c, json_nests_only_so_deep);
    tcase_add_test(c, objects_have_only_so_many_members);
    tcase_add_test(c, there_is_an_end_to_memory);
    tcase_add_test(c, values_are_what_they_are);
    tcase_add_test(c, strings_are_written_as_utf8_whatever_they_are);
    tcase_add_loop_test(c, conversations_are_written_down, 0, COUNT(rendering));
    tcase_add_loop_test(c, bad_conversations_are_refused, 0, COUNT(refused));
    tcase_add_test(c, only_an_answer_can_go_on);
    tcase_add_test(c, renderings_are_those_of_the_templates);
    tcase_add_test(c, only_what_the_template_wrote_is_a_marker);
    tcase_add_test(c, marks_without_a_token_are_text);
    tcase_add_test(c, thoughts_have_their_tokens);
    tcase_add_test(c, tokens_are_those_of_lfm2_chat);
    tcase_add_test(c, a_vocabulary_without_markers_cannot_chat);
    tcase_add_test(c, a_template_for_something_else_is_none);
    tcase_add_test(c, an_edited_template_is_recognised);
    tcase_add_test(c, the_model_that_ships_is_known);
    tcase_add_test(c, published_templates_are_known);
    tcase_add_test(c, today_is_a_date);
    tcase_add_loop_test(c, calls_are_understood, 0, COUNT(calls_row));
    tcase_add_test(c, damaged_calls_do_no_harm);
    tcase_add_test(c, hostile_calls_take_no_time);
    tcase_add_test(c, values_are_those_of_python);
    suite_add_tcase(s, c);
    return s;
}
