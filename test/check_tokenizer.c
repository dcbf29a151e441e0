/* Text to tokens and back. */
#include "../lfm2.c"
#include "util.h"

#include <check.h>

#include "vocab.h"

/* --------------------------------------------------------------- characters */

START_TEST(characters_have_their_classes)
{
    static const struct { const char *text; int class; } row[] = {
        { "a", CLASS_LETTER }, { "Z", CLASS_LETTER }, { "0", CLASS_NUMBER },
        { "_", CLASS_OTHER }, { " ", CLASS_SPACE }, { "\t", CLASS_SPACE },
        { "\v", CLASS_SPACE }, { "\x1c", CLASS_OTHER }, { "\x7f", CLASS_OTHER },
        { "\u00aa", CLASS_LETTER }, { "\u00b2", CLASS_NUMBER },
        { "\u00d7", CLASS_OTHER }, { "\u00e9", CLASS_LETTER },
        { "\u00a0", CLASS_SPACE }, { "\xc2\x85", CLASS_SPACE },
        { "\u0301", CLASS_OTHER }, { "\u0660", CLASS_NUMBER },
        { "\u1680", CLASS_SPACE }, { "\u180e", CLASS_OTHER },
        { "\u200a", CLASS_SPACE }, { "\u200b", CLASS_OTHER },
        { "\u2028", CLASS_SPACE }, { "\u2160", CLASS_NUMBER },
        { "\u2fff", CLASS_OTHER }, { "\u3000", CLASS_SPACE },
        { "\u3041", CLASS_LETTER }, { "\u4dbf", CLASS_LETTER },
        { "\u4dc0", CLASS_OTHER }, { "\uac00", CLASS_LETTER },
        { "\ud7a3", CLASS_LETTER }, { "\ufeff", CLASS_OTHER },
        { "\uffdc", CLASS_LETTER }, { "\U0001d7ff", CLASS_NUMBER },
        { "\U0001f600", CLASS_OTHER }, { "\U0001fbf9", CLASS_NUMBER },
        { "\U00020000", CLASS_LETTER }, { "\U000323af", CLASS_LETTER },
        { "\U000323b0", CLASS_OTHER }, { "\U0010ffff", CLASS_OTHER },
        { "", CLASS_END },
    };
    lfm2_tokenizer *t = open_words(&good);

    for (size_t i = 0; i < COUNT(row); i++) {
        const uint8_t *s = (const uint8_t *)row[i].text;
        const size_t n = strlen(row[i].text);
        int len;
        ck_assert_int_eq(class_at(t, s, s + n, &len), row[i].class);
        ck_assert_uint_eq((size_t)len, n);
    }
    lfm2_tokenizer_close(t);
}
END_TEST

/* Every sequence of up to four bytes that can matter, against the definition:
 * valid is what encoding a code point gives. */
START_TEST(only_utf8_is_a_character)
{
    uint32_t n_valid = 0;

    for (uint32_t c = 0; c < 0x200000; c++) {
        const int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
        uint8_t s[4] = { (uint8_t)c };
        for (int i = 0; i < n && n > 1; i++)
            s[i] = (uint8_t)((i ? 0x80 : 0xf00 >> n) |
                             (c >> 6 * (n - 1 - i) & (i ? 0x3f : 0x7f >> n)));
        const int valid = c < 0x110000 && (c < 0xd800 || c > 0xdfff);
        if (utf8_length(s, 4) != (valid ? n : -1))
            ck_abort_msg("U+%lX: %d", (unsigned long)c, utf8_length(s, 4));
        for (int k = 1; k < n && valid; k++)
            if (utf8_length(s, (size_t)k) != 0)
                ck_abort_msg("U+%lX: cut after %d", (unsigned long)c, k);
        n_valid += (uint32_t)valid;
    }
    ck_assert_uint_eq(n_valid, 0x110000 - 0x800);
    ck_assert_int_eq(utf8_length((const uint8_t *)"\x80", 1), -1);
    ck_assert_int_eq(utf8_length((const uint8_t *)"\xc1\x81", 2), -1);
    ck_assert_int_eq(utf8_length((const uint8_t *)"\xe0\x9f\xbf", 3), -1);
    ck_assert_int_eq(utf8_length((const uint8_t *)"\xf0\x8f\xbf\xbf", 4), -1);
    ck_assert_int_eq(utf8_length((const uint8_t *)"\xff", 1), -1);
}
END_TEST

START_TEST(streams_break_between_characters)
{
    static const char text[] = "a\u00e9\u20ac\U0001f600z\u3042\u3044";
    const size_t n = sizeof text - 1;

    for (size_t cut = 0; cut <= n; cut++)
        for (size_t step = 1; step <= n; step++) {
            lfm2_utf8 u = { 0 };
            char out[64];
            size_t at = 0;
            for (size_t i = 0; i < n;) {
                size_t k = i < cut ? cut - i : step < n - i ? step : n - i;
                at += lfm2_utf8_push(&u, text + i, k, out + at);
                i += k;
                for (size_t p = 0; p < at;) {      /* only whole characters  */
                    const int len = utf8_length((uint8_t *)out + p, at - p);
                    ck_assert_int_gt(len, 0);
                    p += (size_t)len;
                }
                ck_assert(at <= i && i - at <= 3 && u.n_held == (int)(i - at));
            }
            ck_assert(at == n && memcmp(out, text, n) == 0);
            ck_assert_uint_eq(lfm2_utf8_push(&u, NULL, 0, out), 0);
        }
}
END_TEST

START_TEST(streams_pass_what_is_no_character)
{
    static const struct { const char *in; int held; } row[] = {
        { "\xff", 0 }, { "\x80", 0 }, { "\xc0\xaf", 0 }, { "\xe2\x82", 2 },
        { "\xe2\x82" "A", 0 }, { "\xe2\xe2\x82\xac", 0 }, { "\xed\xa0\x80", 0 },
        { "\xed", 1 }, { "\xf0\x9f\x98", 3 }, { "\xf0\x9f\x98\xf0", 1 },
        { "\xf4\x90\x80\x80", 0 }, { "\xf5\x80", 0 }, { "\xe0\x80", 0 },
    };

    for (size_t i = 0; i < COUNT(row); i++) {
        const size_t n = strlen(row[i].in);
        lfm2_utf8 u = { 0 };
        char out[16];
        size_t at = lfm2_utf8_push(&u, row[i].in, n, out);
        ck_assert_uint_eq(at, n - (size_t)row[i].held);
        at += lfm2_utf8_push(&u, NULL, 0, out + at);
        ck_assert(at == n && memcmp(out, row[i].in, n) == 0 && !u.n_held);
    }
}
END_TEST

/* ------------------------------------------------------------------- pieces */

/* Text is cut where the bars are. */
static const char *const pieces[] = {
    "Hello| world", "a|  | b| \n|c", "I|'m| you|'re| HE|'LL|'s", "'s|S|'",
    "don|'t| x|'D|'ve|'xs| '|q", "1| |123|456|7| |8|a", "12\u00b2|\u00bd|a",
    "_foo|_bar|(baz|)[|1|]{|2|};", "a| \n\n| | b", "a| \n \r\n| | |1",
    " |\tx", "\tx| ///\n\n| |\t|/\n", "x| \u3000|\u00a0y",
    "x|\u00a0| |9", "\u00a0y|\u3000", "a|\u0301\u0301|b", "\u0301b",
    "\u65e5\u672c|\u3002\u8a9e", "\xff\xfe|a| \xff\n|b", "\xffz",
    "caf\u00e9| \U0001f600\U0001f603\n\n|\tx", "!?\n| \n", "\n|a", "b|   ",
};

START_TEST(text_is_cut_into_pieces)
{
    lfm2_tokenizer *t = open_words(&good);

    for (size_t i = 0; i < COUNT(pieces); i++) {
        uint8_t text[128], cut[128];
        size_t n = 0, at = 0;
        for (const char *s = pieces[i]; *s; s++)
            if (*s != '|')
                text[n++] = (uint8_t)*s;
        for (const uint8_t *p = text, *end = text + n, *q; p < end; p = q) {
            q = piece_end(t, p, end);
            ck_assert(q > p && q <= end);
            if (p > text)
                cut[at++] = '|';
            memcpy(cut + at, p, (size_t)(q - p));
            at += (size_t)(q - p);
        }
        cut[at] = 0;
        ck_assert_str_eq((char *)cut, pieces[i]);
    }
    lfm2_tokenizer_close(t);
}
END_TEST

/* ------------------------------------------------------------------- tokens */

static const struct { const char *text, *plain, *special; } splits[] = {
    /* merges: the first in the list first, then the leftmost */
    { "abc", "ab/c", NULL }, { "xabcx", "x/ab/c/x", NULL },
    { "aaax", "aa/a/x", NULL }, { "aaaaaaax", "aaaa/aa/a/x", NULL },
    { "aabx", "a/ab/x", NULL }, { " w", " w", NULL }, { "a w", "a/ w", NULL },
    /* a whole piece that is a token, though no merge leads to it */
    { "qrs", "qrs", NULL }, { "qrsx", "q/r/s/x", NULL }, { "aab", "aab", NULL },
    /* what was merged is merged again */
    { "xyz", "xyz", NULL }, { "xyzx", "xyz/x", NULL }, { "xyq", "xy/q", NULL },
    { "xxyz", "x/xyz", NULL },
    /* markers are text, unless they are asked for */
    { "a<|im_end|>", "a/</|/i/m/_/e/n/d/|/>", "a/<|im_end|>" },
    { "<|im_end", "</|/i/m/_/e/n/d", "</|/i/m/_/e/n/d" },
    { "<|im_<|im_start|>|>", "</|/i/m/_/</|/i/m/_/s/t/a/r/t/|/>/|/>",
      "</|/i/m/_/<|im_start|>/|/>" },
    /* user-defined tokens always are cut out, unused ones never */
    { "a pythonic", "a/ /python/i/c", "a/ /python/i/c" },
    { "<a><b><a><c>", "<a><b>/<a>/</c/>", "<a><b>/<a>/</c/>" },
    { "<a<a>", "</a/<a>", "</a/<a>" },
    { "[PAD1]", "[/P/A/D/1/]", "[/P/A/D/1/]" },
    { "<unk>", "</u/n/k/>", "</u/n/k/>" },
    { "", "", "" },
};

START_TEST(text_becomes_tokens)
{
    lfm2_tokenizer *t = open_words(&good);

    for (size_t i = 0; i < COUNT(splits); i++) {
        const char *special = splits[i].special ? splits[i].special
                                                : splits[i].plain;
        ck_assert_str_eq(split(t, splits[i].text, 0), splits[i].plain);
        ck_assert_str_eq(split(t, splits[i].text, LFM2_ENCODE_SPECIAL),
                         special);
    }
    ck_assert_str_eq(split(t, "ab", LFM2_ENCODE_BOS), "<|startoftext|>/ab");
    ck_assert_str_eq(split(t, "", LFM2_ENCODE_BOS), "<|startoftext|>");
    lfm2_tokenizer_close(t);
}
END_TEST

START_TEST(encoding_counts_like_snprintf)
{
    static const char text[] = "abc python xyzx";
    lfm2_tokenizer *t = open_words(&good);
    int32_t all[32], some[32];
    const int n = lfm2_encode(t, text, strlen(text), LFM2_ENCODE_BOS, all, 32);

    ck_assert_int_eq(n, 8);
    ck_assert_int_eq(lfm2_encode(t, text, strlen(text), LFM2_ENCODE_BOS, NULL,
                                 0), n);
    for (int cap = 0; cap <= n; cap++) {
        memset(some, 0x55, sizeof some);
        ck_assert_int_eq(lfm2_encode(t, text, strlen(text), LFM2_ENCODE_BOS,
                                     some, cap), n);
        ck_assert(memcmp(some, all, (size_t)cap * sizeof *all) == 0);
        ck_assert_int_eq(some[cap], 0x55555555);
    }
    ck_assert_int_eq(lfm2_encode(t, NULL, 0, 0, all, 32), 0);
    ck_assert_int_eq(lfm2_encode(t, NULL, 1, 0, all, 32), LFM2_EARG);
    ck_assert_int_eq(lfm2_encode(t, text, ((size_t)1 << 30) + 1, 0, all, 32),
                     LFM2_EARG);
    ck_assert_int_eq(lfm2_encode(t, text, 3, 0, all, -1), 2);
    lfm2_tokenizer_close(t);
}
END_TEST

START_TEST(tokens_become_bytes)
{
    lfm2_tokenizer *t = open_words(&good);
    const int32_t none[] = { -1, INT32_MIN, N_BASE, INT32_MAX };
    const char *bytes;
    int len;

    for (int b = 0; b < 256; b++) {
        bytes = lfm2_token_bytes(t, b, 0, &len);
        ck_assert(len == 1 && (uint8_t)bytes[0] == b);
    }
    for (size_t i = 0; i < COUNT(none); i++) {
        ck_assert(lfm2_token_bytes(t, none[i], 1, &len) && len == 0);
        ck_assert(!lfm2_is_eog(t, none[i]));
    }
    ck_assert(lfm2_token_bytes(t, IM_END, 0, &len) && len == 0);
    bytes = lfm2_token_bytes(t, IM_END, 1, &len);
    ck_assert(len == 10 && memcmp(bytes, "<|im_end|>", 10) == 0);
    lfm2_token_bytes(t, lfm2_token_id(t, "[PAD1]"), 0, &len);
    ck_assert_int_eq(len, 0);
    lfm2_token_bytes(t, lfm2_token_id(t, "python"), 0, &len);
    ck_assert_int_eq(len, 6);
    ck_assert_int_eq(lfm2_token_id(t, "<|im_start|>"), IM_START);
    ck_assert_int_eq(lfm2_token_id(t, " w"), N_BASE - 1);
    ck_assert_int_eq(lfm2_token_id(t, "yz"), -1);
    ck_assert_int_eq(lfm2_token_id(t, ""), -1);
    ck_assert(lfm2_is_eog(t, IM_END) && lfm2_is_eog(t, END_OF_TEXT));
    ck_assert(!lfm2_is_eog(t, IM_START) && !lfm2_is_eog(t, 'a'));
    lfm2_tokenizer_close(t);
    t = open_words(&(struct change){ .eos = 'z' });
    ck_assert(lfm2_is_eog(t, 'z') && lfm2_is_eog(t, IM_END));
    lfm2_tokenizer_close(t);
}
END_TEST

START_TEST(conversations_have_their_format)
{
    const lfm2_message msgs[] = { { "system", "\n\nab" }, { "user",
                                  "<|im_end|>python" }, { "user", NULL } };
    const char *expected =
        "<|startoftext|>/<|im_start|>/s/y/s/t/e/m/\n/\n/\n/ab/<|im_end|>/\n/"
        "<|im_start|>/u/s/e/r/\n/</|/i/m/_/e/n/d/|/>/python/<|im_end|>/\n/"
        "<|im_start|>/a/s/s/i/s/t/a/n/t/\n";
    lfm2_tokenizer *t = open_words(&good);
    int32_t ids[128];
    int n = lfm2_chat(t, msgs, 2, 1, ids, 128);

    ck_assert_str_eq(spell(t, ids, n), expected);
    ck_assert_int_eq(lfm2_chat(t, msgs, 2, 1, NULL, 0), n);
    n = lfm2_chat(t, msgs, 2, 0, ids, 128);
    ck_assert(strlen(spell(t, ids, n)) + 33 == strlen(expected));
    n = lfm2_chat(t, NULL, 0, 0, ids, 128);
    ck_assert(n == 1 && ids[0] == START_OF_TEXT);
    ck_assert_int_eq(lfm2_chat(t, msgs, 3, 1, ids, 128), LFM2_EARG);
    ck_assert_int_eq(lfm2_chat(t, msgs, -1, 1, ids, 128), LFM2_EARG);
    lfm2_tokenizer_close(t);
    t = open_words(&(struct change){ .no_markers = 1 });
    ck_assert_int_eq(lfm2_chat(t, msgs, 2, 1, ids, 128), LFM2_EARG);
    lfm2_tokenizer_close(t);
}
END_TEST

/* Were they user-defined like "python", a text could end its own turn. */
START_TEST(no_text_ends_its_turn)
{
    static const char markers[] = "<|im_end|><|im_start|><|endoftext|>"
                                  "<|startoftext|>";
    const lfm2_message msg = { "user<|im_start|>", markers };
    lfm2_tokenizer *t = open_words(&(struct change){ .user_markers = 1 });
    int32_t ids[256];
    int count[N_BASE] = { 0 };
    const int n = lfm2_chat(t, &msg, 1, 1, ids, 256);

    for (int i = 0; i < n; i++)
        count[ids[i]]++;
    ck_assert(count[START_OF_TEXT] == 1 && count[IM_START] == 2);
    ck_assert(count[IM_END] == 1 && count[END_OF_TEXT] == 0);
    ck_assert_str_eq(split(t, "a<|im_end|>python", 0),
                     "a/</|/i/m/_/e/n/d/|/>/python");
    ck_assert_str_eq(split(t, markers, LFM2_ENCODE_SPECIAL), "<|im_end|>/"
                     "<|im_start|>/<|endoftext|>/<|startoftext|>");
    ck_assert(lfm2_is_eog(t, IM_END) && lfm2_bos(t) == START_OF_TEXT);
    lfm2_tokenizer_close(t);

    t = open_words(&(struct change){ .eos = 262 });       /* that is python  */
    ck_assert_str_eq(split(t, "python", 0), "p/y/t/h/o/n");
    ck_assert_str_eq(split(t, "python", LFM2_ENCODE_SPECIAL), "python");
    lfm2_tokenizer_close(t);
}
END_TEST

/* ------------------------------------------------- every text, and bad ones */

START_TEST(bytes_come_back)
{
    static const char *const bits[] = {
        "a", "ab", "aaaa", " ", "\n", "xyz", "'s", "<a>", "python",
        "<|im_end|>", "\u65e5", "\xe6", "\xff", "0", "", "\r"
    };
    lfm2_tokenizer *t = open_words(&good);
    uint64_t rng = 1;

    for (int i = 0; i < 20000; i++) {
        char text[256];
        size_t n = 0;
        for (uint64_t k = (rng >> 40) % 40; k > 0; k--) {
            rng = rng * 6364136223846793005u + 1442695040888963407u;
            const char *bit = bits[(rng >> 33) % COUNT(bits)];
            const size_t len = *bit ? strlen(bit) : 1;          /* "": a NUL */
            if (n + len > sizeof text)
                break;
            memcpy(text + n, bit, len);
            n += len;
        }
        rng = rng * 6364136223846793005u + 1442695040888963407u;
        round_trip(t, text, n);
    }
    lfm2_tokenizer_close(t);
}
END_TEST

/* Megabytes of these would take hours if anything were quadratic. */
static const char *const unit[] = {
    "a", " ", "\n", " \n", "1", "\u0301", "ab", "aab", "xy", "<", "<|im_", "'",
    "<a><a", "\xff", "\xf0\x9f", "\u3042 ", "xyz", "qrs"
};

START_TEST(no_text_is_a_trap)
{
    const size_t n = SOME_OF(2000000), len = strlen(unit[_i]);
    lfm2_tokenizer *t = open_words(&good);
    char *text = malloc(n);

    for (size_t i = 0; i < n; i++)
        text[i] = unit[_i][i % len];
    round_trip(t, text, n);
    free(text);
    lfm2_tokenizer_close(t);
}
END_TEST

/* The longest way there is: every letter is merged 17 times. */
START_TEST(no_vocabulary_is_a_trap)
{
    const size_t n = 2000000;
    lfm2_tokenizer *t = open_words(&(struct change){ .n_deep = 15, .type = 1,
                                                     .n_types = 15 });
    char *text = malloc(n);

    memset(text, 'a', n);
    round_trip(t, text, n);
    ck_assert_int_eq(lfm2_encode(t, text, n, 0, NULL, 0),
                     (int)(n >> 17) + __builtin_popcount(n & 0x1ffff));
    free(text);
    lfm2_tokenizer_close(t);
}
END_TEST

/* ----------------------------------------------------- a genuine vocabulary */

static char *shared(const char *name, size_t *n)
{
    const char *dir = getenv("LFM2_SHARED");
    char path[1024], *text;
    FILE *f;

    snprintf(path, sizeof path, "%s/tokenizer/%s", dir ? dir : "../shared",
             name);
    if (!(f = fopen(path, "rb"))) {
        puts("skipped: the cases of a large vocabulary, which do not come with "
             "the source");
        return NULL;
    }
    text = calloc(1, (size_t)16 << 20);
    ck_assert_ptr_nonnull(text);
    *n = fread(text, 1, ((size_t)16 << 20) - 1, f);
    fclose(f);
    return text;
}

/* All texts must become the ids in the lines, and come back. */
static int count_right(const lfm2_tokenizer *t, const char *texts, size_t n,
                       const char *lines)
{
    int right = 0, total = 0;

    for (const char *s = texts; s < texts + n; s += strlen(s) + 1, total++) {
        int32_t ids[4096];
        const int k = lfm2_encode(t, s, strlen(s), 0, ids, 4096);
        const char *line = lines;
        int i = 0;
        ck_assert(k >= 0 && k <= 4096);
        for (char *end; i < k; i++, line = end)
            if (strtol(line, &end, 10) != ids[i] || end == line)
                break;
        right += i == k && *line == '\n';
        lines = strchr(lines, '\n') + 1;
        round_trip(t, s, strlen(s));
    }
    printf("golden tokenizer cases: %d of %d\n", right, total);
    return right == total;
}

START_TEST(golden_cases_are_met)
{
    size_t n_gguf = 0, n_texts = 0, n_lines = 0, n_bin;
    char *gguf = shared("vocab128k.gguf", &n_gguf), *bin;
    char *texts = gguf ? shared("cases.txt0", &n_texts) : NULL;
    char *lines = texts ? shared("cases.ids", &n_lines) : NULL;
    lfm2_tokenizer *t, *u;

    if (!lines)
        return;
    ck_assert_int_eq(lfm2_tokenizer_open_memory(&t, gguf, n_gguf, NULL), 0);
    ck_assert(count_right(t, texts, n_texts, lines));
    n_bin = lfm2_tokenizer_export(gguf, n_gguf, NULL, 0, NULL);
    bin = malloc(n_bin);
    lfm2_tokenizer_export(gguf, n_gguf, bin, n_bin, NULL);
    ck_assert_int_eq(lfm2_tokenizer_open_memory(&u, bin, n_bin, NULL), 0);
    ck_assert(count_right(u, texts, n_texts, lines));
    lfm2_tokenizer_close(t);
    lfm2_tokenizer_close(u);
    free(gguf);
    free(texts);
    free(lines);
    free(bin);
}
END_TEST

Suite *tokenizer_suite(void)
{
    Suite *s = suite_create("tokenizer");
    TCase *c = tcase_create("tokenizer");

    tcase_set_timeout(c, 120);
    tcase_add_test(c, characters_have_their_classes);
    tcase_add_test(c, only_utf8_is_a_character);
    tcase_add_test(c, streams_break_between_characters);
    tcase_add_test(c, streams_pass_what_is_no_character);
    tcase_add_test(c, text_is_cut_into_pieces);
    tcase_add_test(c, text_becomes_tokens);
    tcase_add_test(c, encoding_counts_like_snprintf);
    tcase_add_test(c, tokens_become_bytes);
    tcase_add_test(c, conversations_have_their_format);
    tcase_add_test(c, no_text_ends_its_turn);
    tcase_add_test(c, bytes_come_back);
    tcase_add_loop_test(c, no_text_is_a_trap, 0, COUNT(unit));
    tcase_add_test(c, no_vocabulary_is_a_trap);
    tcase_add_test(c, golden_cases_are_met);
    suite_add_tcase(s, c);
    return s;
}
