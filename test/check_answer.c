/* An answer as run.c takes it apart, and the settings that a model brings. */
#define _POSIX_C_SOURCE 200809L          /* as run.c does */
#define _GNU_SOURCE

#define main run_main
#include "../run.c"
#undef main
#undef COUNT

#include "util.h"

#include <check.h>

/* ------------------------------------------------ thought, answer and calls */

#define THEN "<think>"
#define OVER "</think>"
#define CALL_ "<|tool_call_start|>"
#define _CALL "<|tool_call_end|>"

static const struct row {
    const char *raw;
    const char *text, *thought, *calls;   /* NULL: none                      */
    const char *stop[3];
    int in_thought, plain;
    const char *kept;                     /* of raw; NULL: all, or to a stop */
} rows[] = {
    { "", NULL, NULL, NULL, { 0 }, 0, 0, NULL },
    { "Hello.", "Hello.", NULL, NULL, { 0 }, 0, 0, NULL },
    { THEN "hm" OVER "Hi", "Hi", "hm", NULL, { 0 }, 0, 0, NULL },
    /* blanks around a thought belong to none, those inside of it stay */
    { "\n " THEN "\nhm\n" OVER "\r\n\tHi \n", "Hi \n", "\nhm\n", NULL, { 0 },
      0, 0, NULL },
    { "\n Hi", "\n Hi", NULL, NULL, { 0 }, 0, 0, NULL },
    { " \n", " \n", NULL, NULL, { 0 }, 0, 0, NULL },
    { THEN "hm" OVER " \n", NULL, "hm", NULL, { 0 }, 0, 0, NULL },
    { THEN OVER "Hi", "Hi", NULL, NULL, { 0 }, 0, 0, NULL },
    { THEN "hm", NULL, "hm", NULL, { 0 }, 0, 0, NULL },
    { THEN, NULL, NULL, NULL, { 0 }, 0, 0, NULL },
    /* what ends while it is held back */
    { "<thin", "<thin", NULL, NULL, { 0 }, 0, 0, NULL },
    { " <", " <", NULL, NULL, { 0 }, 0, 0, NULL },
    { THEN "hm</thin", NULL, "hm</thin", NULL, { 0 }, 0, 0, NULL },
    { "a<|tool_call_s", "a<|tool_call_s", NULL, NULL, { 0 }, 0, 0, NULL },
    { "aST", "aST", NULL, NULL, { "STOP" }, 0, 0, NULL },
    { CALL_ "[f()]<|tool", NULL, NULL, CALL_ "[f()]<|tool", { 0 }, 0, 0, NULL },
    /* words in other places are text */
    { "Hi" THEN "hm" OVER, "Hi" THEN "hm" OVER, NULL, NULL, { 0 }, 0, 0, NULL },
    { "hm" OVER "Hi", "hm" OVER "Hi", NULL, NULL, { 0 }, 0, 0, NULL },
    { OVER "Hi", OVER "Hi", NULL, NULL, { 0 }, 0, 0, NULL },
    { THEN "a" THEN "b" OVER "c" OVER "d", "c" OVER "d", "a" THEN "b", NULL,
      { 0 }, 0, 0, NULL },
    { THEN "a" OVER THEN "b", THEN "b", "a", NULL, { 0 }, 0, 0, NULL },
    { "<<think>x", "<<think>x", NULL, NULL, { 0 }, 0, 0, NULL },
    { THEN "<</think>x", "x", "<", NULL, { 0 }, 0, 0, NULL },
    /* the prompt has opened the thought */
    { "hm" OVER "Hi", "Hi", "hm", NULL, { 0 }, 1, 0, NULL },
    { THEN "hm" OVER "Hi", "Hi", THEN "hm", NULL, { 0 }, 1, 0, NULL },
    { OVER "\n\nHi", "Hi", NULL, NULL, { 0 }, 1, 0, NULL },
    { "hm", NULL, "hm", NULL, { 0 }, 1, 0, NULL },
    /* calls */
    { "a" CALL_ "[f()]" _CALL "b", "ab", NULL, CALL_ "[f()]" _CALL, { 0 }, 0, 0,
      NULL },
    { THEN "x" CALL_ "y" OVER CALL_ "[f()]" _CALL, NULL, "x" CALL_ "y",
      CALL_ "[f()]" _CALL, { 0 }, 0, 0, NULL },
    { CALL_ "[f()]" _CALL CALL_ "[g()]", NULL, NULL,
      CALL_ "[f()]" _CALL CALL_ "[g()]", { 0 }, 0, 0, NULL },
    { CALL_ "[f('" THEN OVER "')]" _CALL, NULL, NULL,
      CALL_ "[f('" THEN OVER "')]" _CALL, { 0 }, 0, 0, NULL },
    { "a" _CALL "b", "a" _CALL "b", NULL, NULL, { 0 }, 0, 0, NULL },
    { CALL_ "[f()]" _CALL "[f()]" _CALL "b", "[f()]b", NULL,
      CALL_ "[f()]" _CALL _CALL, { 0 }, 0, 0, NULL },
    /* stop strings */
    { "one STOP two", "one ", NULL, NULL, { "STOP" }, 0, 0, "one " },
    { "STOP", NULL, NULL, NULL, { "STOP" }, 0, 0, "" },
    { "one STOP", "one ", NULL, NULL, { "STOP" }, 0, 0, "one " },
    { "one SSTOP", "one S", NULL, NULL, { "STOP" }, 0, 0, "one S" },
    { "one STSTOP", "one ST", NULL, NULL, { "STOP" }, 0, 0, "one ST" },
    { "a\n\nb", "a", NULL, NULL, { "\n\n" }, 0, 0, "a" },
    { "\n\nb", NULL, NULL, NULL, { "\n\n" }, 0, 0, "" },
    { "abcde", "ab", NULL, NULL, { "abcdef", "cd" }, 0, 0, "ab" },
    { "abcde", "ab", NULL, NULL, { "cd", "abcde" }, 0, 0, "ab" },
    { "abcd", NULL, NULL, NULL, { "cd", "abcd" }, 0, 0, "" },
    { "abcd", NULL, NULL, NULL, { "abcd", "cd" }, 0, 0, "" },
    { "aab", NULL, NULL, NULL, { "aa", "b" }, 0, 0, "" },
    { "<thin", NULL, NULL, NULL, { "<th" }, 0, 0, "" },
    { "\xe2\x82\xac!", NULL, NULL, NULL, { "\xe2\x82\xac" }, 0, 0, "" },
    { "a\xe2\x82\xac", "a\xe2", NULL, NULL, { "\x82" }, 0, 0, "a\xe2" },
    { "\xe2\x82", "\xe2\x82", NULL, NULL, { "\xe2\x82\xac" }, 0, 0, NULL },
    /* not in thoughts or calls, but right behind them */
    { THEN "STOP" OVER "a", "a", "STOP", NULL, { "STOP" }, 0, 0, NULL },
    { THEN "ST" OVER "OP", "OP", "ST", NULL, { "STOP" }, 0, 0, NULL },
    { THEN "a" OVER "\n\nSTOP", NULL, "a", NULL, { "STOP" }, 0, 0,
      THEN "a" OVER "\n\n" },
    { CALL_ "STOP" _CALL "STOP", NULL, NULL, CALL_ "STOP" _CALL, { "STOP" }, 0,
      0, CALL_ "STOP" _CALL },
    { "ST" CALL_ "x" _CALL "OP", "STOP", NULL, CALL_ "x" _CALL, { "STOP" }, 0,
      0, NULL },
    { "a" CALL_ "x", "a", NULL, NULL, { "<|tool_call_start|>" }, 0, 0, "a" },
    { "a" CALL_ "x", "a", NULL, NULL, { "<|tool" }, 0, 0, "a" },
    { "a" CALL_ "x", "a", NULL, CALL_ "x", { "|>x" }, 0, 0, NULL },
    /* plain text has no parts, but stops */
    { THEN "a" OVER CALL_, THEN "a" OVER CALL_, NULL, NULL, { 0 }, 0, 1, NULL },
    { THEN "aSTOP", THEN "a", NULL, NULL, { "STOP" }, 0, 1, THEN "a" },
};

/* How run.c begins a reply. */
static void begin(struct reply *r, struct request *q, const struct row *row)
{
    *q = (struct request){ .split = !row->plain, .think_budget = -1 };
    for (int i = 0; i < 3 && row->stop[i]; i++)
        ck_assert(add_stop(q, row->stop[i], strlen(row->stop[i])) == 0);
    *r = (struct reply){ .q = q };
    r->part = row->plain ? PLAIN : row->in_thought ? THOUGHT : START;
}

/* What was let go of is never taken back: it begins what comes out. */
static void check_prefix(const struct text *t, const char *whole,
                         const char *raw)
{
    const size_t n = whole ? strlen(whole) : 0;

    EXPECT_MSG(t->n <= n && memcmp(t->n ? t->s : "", whole ? whole : "", t->n)
               == 0, "\"%s\": too early: \"%.*s\"", raw, (int)t->n, t->s);
}

static void push(struct reply *r, const struct row *row, const char *s,
                 size_t n)
{
    if (r->finish != UNFINISHED)
        return;
    add(&r->raw, s, n);
    split(r, 0);
    check_prefix(&r->text, row->text, row->raw);
    check_prefix(&r->thought, row->thought, row->raw);
    check_prefix(&r->calls, row->calls, row->raw);
}

static void check_part(const struct text *t, const char *want, const char *raw)
{
    const size_t n = want ? strlen(want) : 0;

    EXPECT_MSG(t->n == n && memcmp(n ? t->s : "", n ? want : "", n) == 0,
               "\"%s\": \"%.*s\", expected \"%s\"", raw, (int)t->n,
               t->n ? t->s : "", want ? want : "");
}

static void check_end(struct reply *r, struct request *q, const struct row *row)
{
    const char *kept = row->kept ? row->kept : row->raw;

    if (r->finish == UNFINISHED)
        r->finish = STOPPED;              /* as when the model ends it       */
    split(r, 1);
    check_part(&r->text, row->text, row->raw);
    check_part(&r->thought, row->thought, row->raw);
    check_part(&r->calls, row->calls, row->raw);
    check_part(&r->raw, kept, row->raw);
    free_reply(r);
    free_request(q);
}

START_TEST(parts_are_told_apart_in_any_pieces)
{
    const struct row *row = &rows[_i];
    const size_t n = strlen(row->raw);
    struct request q;
    struct reply r;

    for (size_t i = 0; i <= n; i++)
        for (size_t j = i; j <= n; j++) {
            begin(&r, &q, row);
            push(&r, row, row->raw, i);
            push(&r, row, row->raw + i, j - i);
            push(&r, row, row->raw + j, n - j);
            check_end(&r, &q, row);
        }
    begin(&r, &q, row);
    for (size_t i = 0; i < n; i++)
        push(&r, row, row->raw + i, 1);
    check_end(&r, &q, row);
}
END_TEST

/* With --think raw all is text, but stop strings work as ever. */
START_TEST(parts_may_stay_where_they_are)
{
    const struct row *row = &rows[_i];
    const size_t n = strlen(row->raw);
    struct request q;
    struct reply r;

    for (size_t each = 1; each <= n + 1; each++) {
        begin(&r, &q, row);
        q.raw = 1;
        for (size_t i = 0; i < n && r.finish == UNFINISHED; i += each) {
            add(&r.raw, row->raw + i, i + each < n ? each : n - i);
            split(&r, 0);
        }
        split(&r, 1);
        check_part(&r.text, row->kept ? row->kept : row->raw, row->raw);
        ck_assert_uint_eq(r.thought.n + r.calls.n, 0);
        free_reply(&r);
        free_request(&q);
    }
}
END_TEST

/* Any text out of the words that matter, with any stop strings out of them: the
 * parts do not depend on the pieces, and a stop string is never in the text. */
START_TEST(random_texts_in_random_pieces)
{
    static const char *const word[] = {
        THEN, OVER, CALL_, _CALL, "a", "b", "ab", "<", "</", "th", "think>",
        " ", "\n", "<|", "tool", "|>", "STOP", "ST", "\xc3\xa9", "\xc3"
    };
    uint64_t rng = (uint64_t)_i;

    for (int k = 0; k < 2000; k++) {
        char raw[256] = "", stop[2][64] = { "", "" };
        struct row row = { .raw = raw };
        struct reply r[2];
        struct request q[2];

        for (uint32_t i = random_u32(&rng) % 12; i > 0; i--)
            strcat(raw, word[random_u32(&rng) % COUNT(word)]);
        for (int s = 0; s < 2; s++)
            for (uint32_t i = random_u32(&rng) % 3; i > 0; i--)
                strcat(stop[s], word[4 + random_u32(&rng) % (COUNT(word) - 4)]);
        row.stop[0] = stop[0][0] ? stop[0] : NULL;
        row.stop[1] = stop[0][0] && stop[1][0] ? stop[1] : NULL;
        row.in_thought = random_u32(&rng) % 4 == 0;
        for (int way = 0; way < 2; way++) {
            const size_t n = strlen(raw);
            begin(&r[way], &q[way], &row);
            for (size_t at = 0, len; at < n && r[way].finish == UNFINISHED;
                 at += len) {
                len = way == 0 ? n : 1 + random_u32(&rng) % 8;
                len = len < n - at ? len : n - at;
                add(&r[way].raw, raw + at, len);
                split(&r[way], 0);
            }
            split(&r[way], 1);
        }
        EXPECT_MSG(r[0].finish == r[1].finish, "%s", raw);
        EXPECT(r[0].text.n == r[1].text.n && r[0].thought.n == r[1].thought.n);
        EXPECT(r[0].calls.n == r[1].calls.n && r[0].raw.n == r[1].raw.n);
        EXPECT(!r[0].text.n || !memcmp(r[0].text.s, r[1].text.s, r[0].text.n));
        for (int s = 0; s < q[0].n_stops && r[0].text.n; s++)
            EXPECT_MSG(r[0].calls.n || r[0].thought.n ||
                       !strstr(r[0].text.s, q[0].stop[s].s), "%s: %s", raw,
                       q[0].stop[s].s);
        for (int way = 0; way < 2; way++) {
            free_reply(&r[way]);
            free_request(&q[way]);
        }
    }
}
END_TEST

START_TEST(an_empty_stop_string_stops_nothing)
{
    const struct row row = { "abc", "abc", NULL, NULL, { "" }, 0, 0, NULL };
    struct request q;
    struct reply r;

    begin(&r, &q, &row);
    push(&r, &row, row.raw, 3);
    check_end(&r, &q, &row);
}
END_TEST

START_TEST(there_is_room_for_so_many_stop_strings)
{
    struct request q = { .n_stops = 0 };

    for (int i = 0; i < MAX_STOPS; i++)
        ck_assert_int_eq(add_stop(&q, "x", 1), 0);
    ck_assert_int_eq(add_stop(&q, "x", 1), -1);
    free_request(&q);
}
END_TEST

/* ------------------------------------------------------------- the settings */

/* A model with these edits; released with lfm2_model_close() and free(). */
static lfm2_model *open_tiny(const struct edit *edits, struct bytes *file)
{
    const struct tiny t = { .words = 1, .edits = edits };
    lfm2_model *model;
    lfm2_error err = { 0 };

    *file = tiny_model(&t);
    ck_assert_msg(lfm2_model_open_memory(&model, file->p, file->n, &err)
                  == LFM2_OK, "%s", err.msg);
    return model;
}

/* As in the tables of the makers. */
static const struct {
    const char *name;
    double temp;
    int top_k;
    double min_p, repeat;
} preset_row[] = {
    { "LFM2 350M", 0.3, 0, 0.15, 1.05 }, { "LFM2-700M", 0.3, 0, 0.15, 1.05 },
    { "LFM2_1.2B", 0.3, 0, 0.15, 1.05 }, { "LFM2 2.6B", 0.3, 0, 0.15, 1.05 },
    { "LFM2-8B-A1B", 0.3, 0, 0.15, 1.05 },
    { "LFM2-24B-A2B", 0.1, 50, 0, 1.05 }, { "lfm2 24b a2b", 0.1, 50, 0, 1.05 },
    { "LFM2.5-230M", 0.1, 50, 0, 1.05 }, { "LFM2.5 350M", 0.1, 50, 0, 1.05 },
    { "LFM2.5-1.2B-Instruct", 0.1, 50, 0, 1.05 },
    { "LFM2.5 1.2B JP 202606", 0.1, 50, 0, 1.05 },
    { "LFM2.5_1.2B_JP_202606", 0.1, 50, 0, 1.05 },
    { "LFM2.5-1.2B-JP-202606", 0.1, 50, 0, 1.05 },
    { "LFM2.5 1.2B Thinking", 0.05, 50, 0, 1.05 },
    { "LFM2.5-1.2B-Thinking", 0.05, 50, 0, 1.05 },
    { "LFM2.5_1.2B_JP", 0.3, 0, 0.15, 1.05 },
    { "LFM2.5 1.2B Base", 0.3, 0, 0.15, 1.05 },
    { "LFM2.5-8B-A1B", 0.2, 80, 0, 1.05 },
    { "lfm2.5 8b a1b", 0.2, 80, 0, 1.05 },
    { "LFM2.5_2.6B", 0.1, 50, 0, 1.1 },
    { "LFM2-VL-450M", 0.1, 0, 0.15, 1.05 },
    { "LFM2.5 VL 1.6B", 0.1, 0, 0.15, 1.05 },
    { "LFM2-1.2B-Extract", 0, 0, 0, 1 }, { "LFM2 350M Extract", 0, 0, 0, 1 },
    { "LFM2_1.2B_RAG", 0, 0, 0, 1 }, { "LFM2-1.2B-Tool", 0, 0, 0, 1 },
    { "LFM2 350M PII Extract JP", 0, 0, 0, 1 },
    { "LFM2-350M-ENJP-MT", 0, 0, 0, 1 },
    { "something else", 0.3, 0, 0.15, 1.05 }, { "", 0.3, 0, 0.15, 1.05 },
};

static struct sampling sampling_of(const struct settings *s,
                                   const struct edit *edits)
{
    struct bytes file;
    lfm2_model *model = open_tiny(edits, &file);
    const struct sampling is = choose_sampling(s, model);

    lfm2_model_close(model);
    free(file.p);
    return is;
}

START_TEST(a_model_brings_its_preset)
{
    const struct edit edits[] = {
        { SET_STRING, "general.name", 0, 0, preset_row[_i].name, 0 },
        { NO_EDIT, NULL, 0, 0, NULL, 0 }
    };
    const struct sampling is = sampling_of(&defaults, edits);

    ck_assert_double_eq(is.temp, preset_row[_i].temp);
    ck_assert_int_eq(is.top_k, preset_row[_i].top_k);
    ck_assert_double_eq(is.min_p, preset_row[_i].min_p);
    ck_assert_double_eq(is.repeat, preset_row[_i].repeat);
    ck_assert_double_eq(is.top_p, 1);
    ck_assert_int_eq(is.last_n, 64);
}
END_TEST

/* The rest of the name may be under other keys. */
START_TEST(a_preset_is_found_by_other_keys)
{
    static const struct { const char *key, *value; double temp; } row[] = {
        { "general.basename", "LFM2.5-8B-A1B", 0.2 },
        { "general.finetune", "Extract", 0 },
        { "general.size_label", "24B-A2B", 0.1 },
    };

    for (size_t i = 0; i < COUNT(row); i++) {
        const struct edit edits[] = {
            { RENAME, "lfm2.vocab_size", 0, 0, row[i].key, 0 },
            { SET_STRING, "lfm2.vocab_size", 0, 0, row[i].value, 0 },
            { SET_STRING, "general.name", 0, 0, "LFM2", 0 },
            { NO_EDIT, NULL, 0, 0, NULL, 0 }
        };
        ck_assert_double_eq(sampling_of(&defaults, edits).temp, row[i].temp);
    }
}
END_TEST

static uint64_t bits(float x)
{
    uint32_t u;

    memcpy(&u, &x, sizeof u);
    return u;
}

START_TEST(options_win_over_the_file_and_it_over_the_table)
{
    const struct edit edits[] = {
        { SET_STRING, "general.name", 0, 0, "LFM2.5-8B-A1B", 0 },
        { ADD, "general.sampling.temp", T_F32, bits(0.7f), NULL, 0 },
        { ADD, "general.sampling.top_k", T_I32, 33, NULL, 0 },
        { ADD, "general.sampling.top_p", T_F32, bits(0.5f), NULL, 0 },
        { ADD, "general.sampling.min_p", T_F32, bits(0.25f), NULL, 0 },
        { ADD, "general.sampling.penalty_repeat", T_F32, bits(1.5f), NULL, 0 },
        { ADD, "general.sampling.penalty_last_n", T_I32, 0xffffffff, NULL, 0 },
        { NO_EDIT, NULL, 0, 0, NULL, 0 }
    };
    struct settings s = defaults;
    struct sampling is = sampling_of(&s, edits);
    lfm2_sampler sampler;

    ck_assert_float_eq((float)is.temp, 0.7f);
    ck_assert_int_eq(is.top_k, 33);
    ck_assert_double_eq(is.top_p, 0.5);
    ck_assert_double_eq(is.min_p, 0.25);
    ck_assert_double_eq(is.repeat, 1.5);
    ck_assert_int_eq(is.last_n, -1);
    sampler = make_sampler(&is, 5);
    ck_assert_int_eq(sampler.repeat_last_n, 1 << 30);
    ck_assert_uint_eq(sampler.rng, 5);
    s.temp = 0;
    s.top_k = 0;
    s.top_p = 1;
    s.min_p = 0;
    s.repeat_last_n = 7;
    is = sampling_of(&s, edits);
    ck_assert(is.temp == 0 && is.top_k == 0 && is.top_p == 1 && is.min_p == 0);
    ck_assert_double_eq(is.repeat, 1);
    ck_assert_int_eq(is.last_n, 7);
    s.repeat = 1.2;
    ck_assert_double_eq(sampling_of(&s, edits).repeat, 1.2);
}
END_TEST

START_TEST(wishes_out_of_bounds_are_none)
{
    static const struct { const char *key; int type; uint64_t value; } row[] = {
        { "general.sampling.temp", T_F32, 0xbf800000 },           /* -1      */
        { "general.sampling.temp", T_F32, 0x7fc00000 },           /* NaN     */
        { "general.sampling.temp", T_F32, 0x7f800000 },
        { "general.sampling.temp", T_BOOL, 1 },
        { "general.sampling.top_k", T_I32, 0xfffffffb },
        { "general.sampling.top_k", T_U64, 1ull << 40 },
        { "general.sampling.top_p", T_F32, 0x40000000 },
        { "general.sampling.min_p", T_F32, 0x40000000 },
        { "general.sampling.penalty_repeat", T_F32, 0 },
        { "general.sampling.penalty_last_n", T_I32, 0xfffffffe },
    };
    const struct sampling want = presets[COUNT(presets) - 1].is;

    for (size_t i = 0; i < COUNT(row); i++) {
        const struct edit edits[] = {
            { ADD, row[i].key, row[i].type, row[i].value, NULL, 0 },
            { NO_EDIT, NULL, 0, 0, NULL, 0 }
        };
        const struct sampling is = sampling_of(&defaults, edits);
        EXPECT_MSG(is.temp == want.temp && is.top_k == want.top_k &&
                   is.top_p == want.top_p && is.min_p == want.min_p &&
                   is.repeat == want.repeat && is.last_n == want.last_n,
                   "%s", row[i].key);
    }
}
END_TEST

/* Greedy needs no penalty, unless someone asks for it. */
START_TEST(a_greedy_choice_is_not_penalised)
{
    const struct edit edits[] = {
        { ADD, "general.sampling.temp", T_F32, 0, NULL, 0 },
        { NO_EDIT, NULL, 0, 0, NULL, 0 }
    };
    const struct edit none[] = { { NO_EDIT, NULL, 0, 0, NULL, 0 } };
    struct settings s = defaults;

    ck_assert_double_eq(sampling_of(&s, edits).repeat, 1);
    s.temp = 0.5;
    ck_assert_double_eq(sampling_of(&s, edits).repeat, 1.05);
    s.temp = 0;
    ck_assert_double_eq(sampling_of(&s, none).repeat, 1);
    s.repeat = 1.3;
    ck_assert_double_eq(sampling_of(&s, none).repeat, 1.3);
}
END_TEST

START_TEST(a_template_may_open_the_thought)
{
    static const struct { const char *template; int opens; } row[] = {
        { "{{- '<|im_start|>assistant\\n<think>' -}}", 1 },
        { "<|im_start|>assistant\\n<think>", 1 },
        { "<|im_start|>assistant\\n", 0 }, { "<|im_start|>assistant\\n<thin",
        0 }, { "", 0 }, { NULL, 0 }
    };

    for (size_t i = 0; i < COUNT(row); i++) {
        const struct edit edits[] = {
            { RENAME, "lfm2.vocab_size", 0, 0, "tokenizer.chat_template", 0 },
            { SET_STRING, "lfm2.vocab_size", 0, 0, row[i].template, 0 },
            { NO_EDIT, NULL, 0, 0, NULL, 0 }
        };
        struct bytes file;
        lfm2_model *m = open_tiny(row[i].template ? edits : edits + 2, &file);
        ck_assert_int_eq(opens_thought(m), row[i].opens);
        lfm2_model_close(m);
        free(file.p);
    }
}
END_TEST

/* Settings and what becomes of the template; `expected` may be an exit code. */
START_TEST(a_template_is_settled)
{
    static const struct row_of_template {
        const char *template;             /* in the file                     */
        struct settings s;
        int code, expected, opens;
    } row[] = {
        { NULL, { .quiet = 1 }, DONE, TEMPLATE_NONE, 0 },
        { NULL, { .quiet = 1, .system = "x" }, USAGE, TEMPLATE_NONE, 0 },
        { NULL, { .quiet = 1, .tools = "x" }, USAGE, TEMPLATE_NONE, 0 },
        { NULL, { .quiet = 1, .messages = "x" }, USAGE, TEMPLATE_NONE, 0 },
        { NULL, { .quiet = 1, .interactive = 1 }, USAGE, TEMPLATE_NONE, 0 },
        { NULL, { .quiet = 1, .template = TEMPLATE_8B, .system = "x" }, DONE,
          TEMPLATE_8B, 0 },
        { "<|tool_list_start|>", { .quiet = 1 }, DONE, TEMPLATE_LFM2, 0 },
        { "<|tool_list_start|>", { .quiet = 1, .raw = 1 }, DONE, TEMPLATE_NONE,
          0 },
        { "<|tool_list_start|>", { .quiet = 1, .ids = "x" }, DONE,
          TEMPLATE_NONE, 0 },
        { "<|tool_list_start|>", { .quiet = 1, .template = TEMPLATE_NONE },
          DONE, TEMPLATE_NONE, 0 },
        { "<|tool_list_start|>", { .quiet = 1, .template = TEMPLATE_VL },
          DONE, TEMPLATE_VL, 0 },
        { "preserve_thinking <|im_start|>assistant\\n<think>", { .quiet = 1 },
          DONE, TEMPLATE_8B, 1 },
        { "preserve_thinking <|im_start|>assistant\\n<think>", { .quiet = 1,
          .raw = 1 }, DONE, TEMPLATE_NONE, 0 },
    };
    const struct row_of_template *is = &row[_i];
    const struct edit edits[] = {
        { RENAME, "lfm2.vocab_size", 0, 0, "tokenizer.chat_template", 0 },
        { SET_STRING, "lfm2.vocab_size", 0, 0, is->template, 0 },
        { NO_EDIT, NULL, 0, 0, NULL, 0 }
    };
    struct settings s = is->s;
    struct engine e = { .s = &s };
    struct bytes file;

    s.model = "a model";
    e.model = open_tiny(is->template ? edits : edits + 2, &file);
    ck_assert(lfm2_tokenizer_open_memory(&e.words, file.p, file.n, NULL)
              == LFM2_OK);
    ck_assert_int_eq(settle_template(&e), is->code);
    ck_assert_int_eq(e.template, is->expected);
    ck_assert_int_eq(e.opens_thought, is->opens);
    close_engine(&e);
    free(file.p);
}
END_TEST

enum { N_SETTLED = 13 };

/* ------------------------------------------------------------------- logits */

START_TEST(the_likeliest_come_first)
{
    uint64_t rng = 3;
    float logits[200];
    struct bias best[20];

    for (int k = 0; k <= 20; k++) {
        for (int i = 0; i < 200; i++)     /* with ties                       */
            logits[i] = (float)(int)(random_u32(&rng) % 40);
        find_best(logits, 200, best, k);
        for (int i = 0; i < k; i++) {
            int before = 0;
            for (int id = 0; id < 200; id++)
                before += logits[id] > best[i].by ||
                          (logits[id] == best[i].by && id < best[i].id);
            ck_assert_int_eq(before, i);
            ck_assert_float_eq(logits[best[i].id], best[i].by);
        }
    }
    find_best(logits, 3, best, 3);
    ck_assert_int_eq(best[0].id + best[1].id + best[2].id, 3);
}
END_TEST

START_TEST(probabilities_sum_to_one)
{
    static const float even[4] = { 2, 2, 2, 2 };
    static const float large[3] = { 1e30f, 1e30f, -1e30f };
    static const float bent[3] = { 0, -INFINITY, 0 };
    float one = -5;

    ck_assert_double_eq_tol(log_sum(even, 4), 2 + log(4), 1e-12);
    ck_assert_double_eq(log_sum(large, 3), (double)1e30f + log(2));
    ck_assert_double_eq_tol(log_sum(bent, 3), log(2), 1e-12);
    ck_assert_double_eq(log_sum(&one, 1), -5);
}
END_TEST

START_TEST(logits_are_bent_as_wished)
{
    struct bias bias[2] = { { 3, -2.5f }, { 0, 100 } };
    struct settings s = defaults;
    struct engine e = { .s = &s };
    struct request q = { .presence = 0.5, .frequency = 0.25, .bias = bias,
                         .n_bias = 2, .ignore_eos = 1 };
    struct reply r = { .q = &q };
    float logits[4096] = { 0 };
    int n_ends = 0;

    ck_assert(lfm2_model_open(&e.model, "test/tiny.gguf", LFM2_LOAD_MAP, NULL)
              == LFM2_OK);
    s.model = "test/tiny.gguf";
    ck_assert_int_eq(open_model_words(&e), DONE);
    r.said = malloc(10 * sizeof *r.said);
    count_token(&r, 20);
    count_token(&r, 21);
    count_token(&r, 20);
    ck_assert_int_eq(r.n_said, 2);
    bend_logits(&e, &r, logits);
    ck_assert_float_eq(logits[3], -2.5f);
    ck_assert_float_eq(logits[20], -1);
    ck_assert_float_eq(logits[21], -0.75f);
    ck_assert_float_eq(logits[22], 0);
    for (int id = 0; id < lfm2_n_vocab(e.words); id++) {
        n_ends += lfm2_is_eog(e.words, id);
        ck_assert((logits[id] == -INFINITY) == lfm2_is_eog(e.words, id));
    }
    ck_assert_int_gt(n_ends, 0);
    free(r.said);
    close_engine(&e);
}
END_TEST

/* ------------------------------------------------------------ on the screen */

START_TEST(nothing_steers_a_terminal)
{
    static const struct { const char *from, *to; } row[] = {
        { "plain", "plain" }, { "a\nb\tc", "a\nb\tc" }, { "", "" },
        { "\x1b[31mred\x1b[0m", "[31mred[0m" }, { "a\r\b\x7f\a\vb", "ab" },
        { "\xc2\x9b" "31m", "31m" }, { "\xc2\x80\xc2\x9f\xc2\xa0", "\xc2\xa0" },
        { "\xc3\x9b\xe2\x82\xac", "\xc3\x9b\xe2\x82\xac" },
        /* what is left must not be one either */
        { "\xc2\xc2\x9b\x9b" "31m", "\xc2" "31m" },
        { "\x9b" "31m\xff", "31m\xff" },
        { "\xc2\x1b\x9b" "31m", "\xc2" "31m" }, { "\xc2" "A", "\xc2" "A" },
        { "\xc2\xc2\a\x9b" "31m", "\xc2\xc2" "31m" },
    };

    for (size_t i = 0; i < COUNT(row); i++) {
        char s[64];
        size_t n = strlen(row[i].from);
        memcpy(s, row[i].from, n);
        n = drop_controls(s, n);
        ck_assert_uint_eq(n, strlen(row[i].to));
        ck_assert_mem_eq(s, row[i].to, n);
    }
}
END_TEST

/* In whatever pieces a text comes, C1 controls are seen whole. */
START_TEST(text_for_a_terminal_comes_in_pieces)
{
    static const char text[] = "a\xc2\x9b" "b\xf0\x9f\x98\x80\x1b" "c\xc3";
    const size_t n = sizeof text - 1;

    for (size_t i = 0; i <= n; i++) {
        char got[64] = "";
        struct output o = { .f = tmpfile(), .terminal = 1 };
        ck_assert(o.f != NULL);
        if (i > 0)
            put_text(&o, text, i);
        if (i < n)
            put_text(&o, text + i, n - i);
        put_text(&o, "", 0);
        rewind(o.f);
        ck_assert_uint_gt(fread(got, 1, sizeof got - 1, o.f), 0);
        fclose(o.f);
        ck_assert_str_eq(got, "ab\xf0\x9f\x98\x80" "c\xc3");
    }
}
END_TEST

/* Nor does a call, whose arguments are JSON within the answer. */
START_TEST(calls_do_not_steer_a_terminal)
{
    static const char call[] = CALL_ "[f(a=\"\xc2\x9b" "31m\")]" _CALL;
    const struct request q = { .split = 1 };
    struct talk t = { .r = { .q = &q, .finish = STOPPED } };

    for (int terminal = 0; terminal < 2; terminal++) {
        char got[64] = "";
        struct printer p = { .out = { .f = tmpfile(), .terminal = terminal } };
        ck_assert(p.out.f != NULL);
        t.r.calls.n = 0;
        add_string(&t.r.calls, call);
        print_calls(&p, &t);
        rewind(p.out.f);
        ck_assert_uint_gt(fread(got, 1, sizeof got - 1, p.out.f), 0);
        fclose(p.out.f);
        ck_assert_str_eq(strstr(got, "{\"a\""), terminal ?
                         "{\"a\": \"31m\"}}]" :
                         "{\"a\": \"\xc2\x9b" "31m\"}}]");
    }
    free_talk(&t);
}
END_TEST

START_TEST(escapes_are_those_of_c)
{
    static const struct { const char *from, *to; } row[] = {
        { "a\\nb", "a\nb" }, { "\\t\\r", "\t\r" }, { "\\\\n", "\\n" },
        { "\\\"\\'", "\"'" }, { "\\x \\", "\\x \\" }, { "", "" },
        { "C:\\dir", "C:\\dir" }, { "\\\\", "\\" }
    };

    for (size_t i = 0; i < COUNT(row); i++) {
        struct text t = { 0 };
        add_string(&t, row[i].from);
        unescape(&t);
        ck_assert_str_eq(t.s, row[i].to);
        ck_assert_uint_eq(t.n, strlen(row[i].to));
        free(t.s);
    }
}
END_TEST

/* ------------------------------------------------------------------ sessions */

static void open_talk(struct talk *t, struct engine *e,
                      const struct settings *s)
{
    *e = (struct engine){ .s = s };
    *t = (struct talk){ .e = e };
    ck_assert_int_eq(open_engine(e), DONE);
    ck_assert_int_eq(open_context(e), DONE);
    ck_assert_int_eq(make_request(e, &t->q), DONE);
    t->messages = json_array(&t->pool);
}

/* A file is taken whole, or nothing of it, or all that was said and no state;
 * returns which: 2, 0, 1. */
static int take(struct talk *t, const char *s, size_t n)
{
    const struct text file = { (char *)(uintptr_t)s, n, 0, 0 };
    struct text said = { 0 };
    const int had = t->e->cached[0].n;
    int all;

    lfm2_seq_trim(t->e->ctx, 0, 0);
    t->e->cached[0].n = 0;
    t->messages = json_array(&t->pool);
    restore(t, &file);
    EXPECT(t->e->cached[0].n == lfm2_seq_len(t->e->ctx, 0));
    EXPECT(t->e->cached[0].n == 0 || had == 0 || t->e->cached[0].n == had);
    add_json(&said, t->messages);
    all = strcmp(said.s, "[{\"role\": \"user\", \"content\": \"hello\"}]");
    EXPECT_MSG(all == 0 || strcmp(said.s, "[]") == 0, "%s", said.s);
    free(said.s);
    pool_free(&t->pool);
    return all != 0 ? 0 : t->e->cached[0].n > 0 ? 2 : 1;
}

START_TEST(damaged_sessions_are_whole_or_nothing)
{
    struct settings s = defaults;
    struct text file = { 0 };
    struct engine e;
    struct talk t;
    struct why why;
    struct reply *const all[] = { &t.r };
    char path[] = "/tmp/lfm2_session_XXXXXX";
    size_t head;

    s.model = "test/tiny.gguf";
    s.session = path;
    s.predict = s.threads = s.quiet = 1;
    s.sandbox = SANDBOX_OFF;              /* /dev/null is opened below       */
    open_talk(&t, &e, &s);
    ck_assert_int_ge(close(mkstemp(path)), 0);
    ck_assert_int_eq(load_session(&t), DONE);
    ck_assert_int_eq(add_message(&t, "user", "hello", 5), DONE);
    ck_assert_int_eq(render_talk(&t, &why), DONE);
    ck_assert_int_eq(start_reply(&e, &t.r, &t.q, 0, &why), DONE);
    ck_assert_int_eq(step(&e, all, 1), DONE);
    ck_assert_int_eq(save_session(&t), DONE);
    ck_assert_int_eq(read_file(path, &file), DONE);
    remove(path);
    head = file.n - (size_t)lfm2_seq_state_size(e.ctx, 0);
    ck_assert_ptr_nonnull(freopen("/dev/null", "w", stderr));
    ck_assert_int_eq(take(&t, file.s, file.n), 2);
    for (size_t n = 0; n < file.n; n += n < head + 9 ? 1 : 97)
        EXPECT(take(&t, file.s, n) == 0);
    for (size_t i = 0; i < file.n; i += i < head ? 1 : 61)
        for (int bit = 0; bit < 8; bit += i < head ? 1 : 3) {
            file.s[i] = (char)(file.s[i] ^ 1 << bit);
            EXPECT(take(&t, file.s, file.n) == (i < head ? 0 : 1));
            file.s[i] = (char)(file.s[i] ^ 1 << bit);
        }
    ck_assert_int_eq(take(&t, file.s, file.n), 2);
    free(file.s);
    free_talk(&t);
    close_engine(&e);
}
END_TEST

/* ------------------------------------------------------------------- lookup */

static const struct { int n, id[16], from; } earlier[] = {
    { 0, { 0 }, 0 },
    { 1, { 1 }, 0 },
    { 3, { 1, 1, 1 }, 0 },
    { 4, { 1, 1, 1, 1 }, 3 },                         /* it may overlap      */
    { 6, { 2, 3, 4, 1, 2, 3 }, 0 },                   /* two are too few     */
    { 7, { 1, 2, 3, 4, 1, 2, 3 }, 3 },
    { 6, { 1, 2, 3, 1, 2, 3 }, 3 },
    { 11, { 1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3 }, 7 },   /* the latest of equals */
    { 13, { 9, 1, 2, 3, 4, 1, 2, 3, 5, 9, 1, 2, 3 }, 4 },      /* the longest */
};

START_TEST(a_guess_goes_on_as_the_text_did)
{
    struct ids text = { NULL, earlier[_i].n };

    ck_assert_int_eq(alloc_ids(&text, 16), DONE);
    for (int i = 0; i < text.n; i++)
        text.id[i] = earlier[_i].id[i];
    ck_assert_int_eq(find_earlier(&text), earlier[_i].from);
    free(text.id);
}
END_TEST

START_TEST(no_more_is_guessed_than_there_is_room_for)
{
    struct request q = { .limit = -1 };
    struct reply r = { .q = &q, .bold = MAX_LOOKUP, .credit = MAX_CREDIT };
    const struct engine e = { .par.n_ctx = 12 };

    ck_assert_int_eq(alloc_ids(&r.ids, 32), DONE);
    for (r.ids.n = 0; r.ids.n < 10; r.ids.n++)
        r.ids.id[r.ids.n] = r.ids.n % 4;
    ck_assert_int_eq(guess(&e, &r, MAX_LOOKUP), 2);   /* context             */
    ck_assert_int_eq(r.ids.id[10], 2);
    ck_assert_int_eq(r.ids.id[11], 3);
    ck_assert_int_eq(guess(&e, &r, 1), 1);
    ck_assert_int_eq(guess(&e, &r, 0), 0);
    ck_assert_int_eq(guess(&e, &r, -1), 0);
    q.limit = 2;                          /* the last token needs no guess   */
    ck_assert_int_eq(guess(&e, &r, MAX_LOOKUP), 1);
    r.n_made = 1;
    ck_assert_int_eq(guess(&e, &r, MAX_LOOKUP), 0);
    ck_assert_int_eq(r.ids.n, 10);
    free(r.ids.id);
}
END_TEST

/* Forwards beyond one a token, if each guess were to cost a tenth of one. */
START_TEST(wrong_guesses_cost_little)
{
    struct request q = { .limit = -1 };
    struct reply r = { .q = &q, .bold = MIN_MATCH, .credit = CREDIT };
    const struct engine e = { .par.n_ctx = 4000 };
    int lost = 0;

    ck_assert_int_eq(alloc_ids(&r.ids, 4000), DONE);
    for (r.ids.n = 0; r.ids.n < 2000; r.ids.n++) {
        const int n = guess(&e, &r, LOOKUP);
        note_guesses(&r, n, 0);
        lost += n * A_GUESS;
        r.ids.id[r.ids.n] = 7;
        ck_assert_int_le(lost, CREDIT + EARNED * (r.ids.n + 1));
    }
    ck_assert_int_gt(r.n_guessed, 0);
    free(r.ids.id);
}
END_TEST

/* ----------------------------------------------------------- control groups */

/* Files below the directory of a test, and what they limit. */
static const struct {
    const char *groups;                   /* as in /proc/self/cgroup         */
    const char *file[4], *holds[4];
    double cpus, memory;
} limits[] = {
    { "0::/\n", { 0 }, { 0 }, 0, 0 },
    { "0::/a/b\n", { "/a/b/cpu.max" }, { "max 100000\n" }, 0, 0 },
    { "0::/a/b\n", { "/a/b/cpu.max", "/a/cpu.max", "/a/b/memory.max" },
      { "400000 100000\n", "150000 100000\n", "max\n" }, 2, 0 },
    { "0::/a/b\n", { "/a/b/cpu.max", "/cpu.max", "/memory.max" },
      { "50000 100000\n", "150000 100000\n", "4096\n" }, 1, 4096 },
    { "4:memory:/a\n2:cpu,b:/a/b\n0::/\n",
      { "/cpu,b/a/b/cpu.cfs_quota_us", "/cpu,b/a/b/cpu.cfs_period_us",
        "/memory/memory.limit_in_bytes", "/memory/a/memory.limit_in_bytes" },
      { "300000\n", "100000\n", "9223372036854771712\n", "8192\n" },
      3, 8192 },
    { "2:cpu,b:/a/b\n", { "/cpu,b/a/b/cpu.cfs_quota_us",
        "/cpu,b/a/b/cpu.cfs_period_us" }, { "-1\n", "100000\n" }, 0, 0 },
    { "nothing\n2:\n\n:", { 0 }, { 0 }, 0, 0 },
};

static void put_file(const char *root, const char *path, const char *holds)
{
    char name[256];
    FILE *f;

    snprintf(name, sizeof name, "%s%s", root, path);
    for (char *s = name + strlen(root) + 1; (s = strchr(s, '/')); *s++ = '/') {
        *s = '\0';
        mkdir(name, 0777);
    }
    f = fopen(name, "w");
    ck_assert_ptr_nonnull(f);
    fputs(holds, f);
    ck_assert_int_eq(fclose(f), 0);
}

START_TEST(groups_limit_those_within)
{
    char root[] = "/tmp/lfm2_groups_XXXXXX", list[64], command[64];

    ck_assert_ptr_nonnull(mkdtemp(root));
    snprintf(list, sizeof list, "%s/list", root);
    put_file(root, "/list", limits[_i].groups);
    for (int i = 0; i < 4 && limits[_i].file[i]; i++)
        put_file(root, limits[_i].file[i], limits[_i].holds[i]);
    groups = list;
    group_root = root;
    ck_assert_double_eq(least_limit(cpu_limit), limits[_i].cpus);
    ck_assert_double_eq(least_limit(memory_limit), limits[_i].memory);
    if (limits[_i].cpus > 0)
        ck_assert_int_le(usable_cpus(), (int)limits[_i].cpus);
    ck_assert_int_ge(usable_cpus(), 1);
    snprintf(command, sizeof command, "rm -r %s", root);
    ck_assert_int_eq(system(command), 0);
}
END_TEST

START_TEST(no_groups_no_limit)
{
    groups = "/nowhere";
    ck_assert_double_eq(least_limit(cpu_limit), 0);
    ck_assert_int_ge(usable_cpus(), 1);
}
END_TEST

/* -------------------------------------------------- a file not in memory */

#ifdef __linux__

/* The shipped model, and behind it a hole that nobody has read. */
static uint64_t make_cold(char *path)
{
    struct text file = { 0 };
    const off_t size = 40 << 20;
    const int fd = mkstemp(path);

    ck_assert_int_eq(read_file("test/tiny.gguf", &file), DONE);
    ck_assert_int_eq(write(fd, file.s, file.n), (ssize_t)file.n);
    ck_assert_int_eq(ftruncate(fd, size), 0);
    ck_assert_int_eq(close(fd), 0);
    free(file.s);
    return (uint64_t)size;
}

START_TEST(a_file_is_read_ahead)
{
    static const uint64_t piece[] = { 1, 4095, 4097, 3 << 20, 1 << 30 };
    char path[] = "/tmp/lfm2_cold_XXXXXX";
    const struct settings s = { .model = path };
    struct engine e = { .s = &s };
    const uint64_t size = make_cold(path);
    uint64_t at = size - 3 * piece[_i];
    size_t n;

    ck_assert_int_eq(lfm2_model_open(&e.model, path, LFM2_LOAD_MAP, NULL), 0);
    lfm2_model_file(e.model, &n);
    ck_assert_uint_eq(n, size);
    ck_assert_int_eq(is_cold(&e), 1);
    if (piece[_i] > 1 << 20)
        at = 0;
    for (uint64_t got; (got = lfm2_model_read_ahead(e.model, at, piece[_i]));
         at += got)
        ck_assert_uint_le(got, piece[_i]);
    ck_assert_uint_eq(at, size);
    ck_assert_int_eq(is_cold(&e), piece[_i] <= 1 << 20);
    ck_assert_uint_eq(lfm2_model_read_ahead(e.model, UINT64_MAX, 8), 0);
    lfm2_model_close(e.model);
    remove(path);
}
END_TEST

/* Before Linux 5.14, whoever reads beyond the end is sent a signal. */
START_TEST(a_file_that_is_cut_is_read_no_further)
{
    char path[] = "/tmp/lfm2_cold_XXXXXX";
    const uint64_t size = make_cold(path);
    lfm2_model *m;

    if (madvise(NULL, 0, 22) != 0)
        return;
    ck_assert_int_eq(lfm2_model_open(&m, path, LFM2_LOAD_MAP, NULL), 0);
    ck_assert_int_eq(truncate(path, (off_t)size / 2), 0);
    ck_assert_uint_eq(lfm2_model_read_ahead(m, size / 4, 4096), 4096);
    ck_assert_uint_eq(lfm2_model_read_ahead(m, size / 2, 4096), 0);
    lfm2_model_close(m);
    ck_assert_int_eq(lfm2_model_open(&m, path, LFM2_LOAD_READ, NULL), 0);
    ck_assert_uint_eq(lfm2_model_read_ahead(m, 0, 4096), 0);
    lfm2_model_close(m);
    remove(path);
}
END_TEST

#endif

/* ---------------------------------------------------------------- self-test */

START_TEST(another_hash_is_no_success)
{
    struct self t = { .all = 0xf7e0c42c140c71edu };

    ck_assert_int_eq(self_end(&t), DONE);
    t.failed = 1;
    ck_assert_int_eq(self_end(&t), SELFTEST_FAILED);
    t.failed = 0;
    t.all++;
    ck_assert_int_eq(self_end(&t), SELFTEST_FAILED);
}
END_TEST

/* ------------------------------------------------------------------- traces */

START_TEST(what_is_no_number_is_a_string)
{
    static const struct { float x[3]; const char *tells; } is[] = {
        { { 1, -2, 2 }, ",\"min\":-2,\"max\":2,\"mean\":0.333333333,\"l2\":3" },
        { { 1, INFINITY, 2 }, ",\"min\":1,\"max\":\"inf\",\"mean\":\"inf\","
          "\"l2\":\"inf\"" },
        { { 1, -INFINITY, 2 }, ",\"min\":\"-inf\",\"max\":2,\"mean\":"
          "\"-inf\",\"l2\":\"inf\"" },
        { { 1, NAN, 2 }, ",\"min\":\"nan\",\"max\":\"nan\",\"mean\":"
          "\"nan\",\"l2\":\"nan\"" },
        { { NAN, 3, 2 }, ",\"min\":\"nan\",\"max\":\"nan\",\"mean\":"
          "\"nan\",\"l2\":\"nan\"" }
    };
    struct text t = { 0 };

    for (size_t i = 0; i < sizeof is / sizeof *is; i++) {
        t.n = 0;
        add_statistics(&t, is[i].x, 3);
        ck_assert_str_eq(t.s, is[i].tells);
    }
    t.n = 0;
    add_numbers(&t, "x:", is[3].x, 3);
    ck_assert_str_eq(t.s, "x:[1,\"nan\",2]");
    free(t.s);
}
END_TEST

Suite *answer_suite(void)
{
    Suite *s = suite_create("answer");
    TCase *c = tcase_create("answer");

    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, parts_are_told_apart_in_any_pieces, 0, COUNT(rows));
    tcase_add_loop_test(c, parts_may_stay_where_they_are, 0, COUNT(rows));
    tcase_add_loop_test(c, random_texts_in_random_pieces, 0, 10);
    tcase_add_test(c, an_empty_stop_string_stops_nothing);
    tcase_add_test(c, there_is_room_for_so_many_stop_strings);
    tcase_add_loop_test(c, a_model_brings_its_preset, 0, COUNT(preset_row));
    tcase_add_test(c, a_preset_is_found_by_other_keys);
    tcase_add_test(c, options_win_over_the_file_and_it_over_the_table);
    tcase_add_test(c, wishes_out_of_bounds_are_none);
    tcase_add_test(c, a_greedy_choice_is_not_penalised);
    tcase_add_test(c, a_template_may_open_the_thought);
    tcase_add_loop_test(c, a_template_is_settled, 0, N_SETTLED);
    tcase_add_test(c, the_likeliest_come_first);
    tcase_add_test(c, probabilities_sum_to_one);
    tcase_add_test(c, logits_are_bent_as_wished);
    tcase_add_test(c, nothing_steers_a_terminal);
    tcase_add_test(c, text_for_a_terminal_comes_in_pieces);
    tcase_add_test(c, calls_do_not_steer_a_terminal);
    tcase_add_test(c, escapes_are_those_of_c);
    tcase_add_test(c, damaged_sessions_are_whole_or_nothing);
    tcase_add_loop_test(c, a_guess_goes_on_as_the_text_did, 0, COUNT(earlier));
    tcase_add_test(c, no_more_is_guessed_than_there_is_room_for);
    tcase_add_test(c, wrong_guesses_cost_little);
    tcase_add_loop_test(c, groups_limit_those_within, 0, COUNT(limits));
    tcase_add_test(c, no_groups_no_limit);
#ifdef __linux__
    tcase_add_loop_test(c, a_file_is_read_ahead, 0, 5);
    tcase_add_test(c, a_file_that_is_cut_is_read_no_further);
#endif
    tcase_add_test(c, another_hash_is_no_success);
    tcase_add_test(c, what_is_no_number_is_a_string);
    suite_add_tcase(s, c);
    return s;
}
