/* Reading vocabularies: good, unusual, bad and damaged ones, from models and
 * from a tokenizer.bin, and without memory. */
#define _GNU_SOURCE
#include <stdlib.h>

/* All memory the library asks for comes from here, so that it can be refused:
 * the allocation number fail_at from now fails, counted from 1. */
static int fail_at;

static int refuse(void)
{
    return fail_at > 0 && --fail_at == 0;
}

static void *test_malloc(size_t n)
{
    return refuse() ? NULL : malloc(n);
}

static void *test_calloc(size_t n, size_t size)
{
    return refuse() ? NULL : calloc(n, size);
}

#define malloc test_malloc
#define calloc test_calloc
#include "../lfm2.c"
#undef malloc
#undef calloc

#include <check.h>

#include "util.h"
#include "vocab.h"

/* --------------------------------------------------------- bad vocabularies */

static char too_long[MAX_TOKEN + 3], long_marker[MAX_MARKER + 2];

#define KEY(name) "tokenizer.ggml." name

static const struct { struct change x; int code; const char *says; } bad[] = {
    { { .drop = KEY("model") }, LFM2_EFORMAT, "model: no such key, expected "
      "one string" },
    { { .scalar = KEY("model") }, LFM2_EFORMAT, "model: one u32, expected one "
      "string" },
    { { .model = "llama" }, LFM2_EUNSUPPORTED, "model: \"llama\", expected "
      "\"gpt2\"" },
    { { .pre = "qwen2", .arch = "llama" }, LFM2_EUNSUPPORTED,
      "pre: \"qwen2\", expected \"lfm2\" or \"llama-bpe\"" },
    { { .drop = KEY("pre"), .arch = "llama" }, LFM2_EUNSUPPORTED,
      "pre: \"\", expected" },
    { { .drop = KEY("tokens") }, LFM2_EFORMAT, "tokens: no such key, expected an "
      "array of strings" },
    { { .scalar = KEY("tokens") }, LFM2_EFORMAT, "tokens: one u32, expected an "
      "array of strings" },
    { { .floats = KEY("tokens") }, LFM2_EFORMAT, "tokens: an array of f32, "
      "expected an array of strings" },
    { { .n_tokens = -1 }, LFM2_EFORMAT, "tokens: 0 elements, "
      "expected 1 to 1000000" },
    { { .n_tokens = MAX_VOCAB + 1 }, LFM2_EFORMAT, "tokens: 1000001 elements, "
      "expected 1 to 1000000" },
    { { .scalar = KEY("token_type") }, LFM2_EFORMAT, "token_type: one u32, "
      "expected an array of integers" },
    { { .floats = KEY("token_type") }, LFM2_EFORMAT, "token_type: an array of "
      "f32, expected an array of integers" },
    { { .n_types = 1, .type = 1 }, LFM2_EFORMAT, "token_type: 275 elements, "
      "expected 274 to 274" },
    { { .token = "t", .type = 0 }, LFM2_EFORMAT, "token 274: of type 0, "
      "expected 1 to 6" },
    { { .token = "t", .type = 7 }, LFM2_EFORMAT, "of type 7, expected 1 to 6" },
    { { .token = "t", .type = -1 }, LFM2_EFORMAT, "of type -1" },
    { { .token = too_long, .type = 1 }, LFM2_EFORMAT, "token 274: 1048578 "
      "bytes, expected at most 1048576" },
    { { .token = long_marker, .type = TOKEN_CONTROL }, LFM2_EFORMAT,
      "token 274: a marker of 257 bytes, expected at most 256" },
    { { .token = long_marker, .type = TOKEN_USER_DEFINED }, LFM2_EFORMAT,
      "a marker of 257 bytes" },
    { { .n_crowd = 300, .drop = KEY("token_type") }, LFM2_EFORMAT,
      ": its hash and those of 64 others collide" },
    { { .n_pairs = 65, .drop = KEY("token_type") }, LFM2_EFORMAT, "merge 72: "
      "its hash and those of 64 others collide" },
    { { .drop = KEY("merges") }, LFM2_EFORMAT, "merges: no such key, expected an "
      "array of strings" },
    { { .scalar = KEY("merges") }, LFM2_EFORMAT, "merges: one u32" },
    { { .floats = KEY("merges") }, LFM2_EFORMAT, "merges: an array of f32" },
    { { .merge = "" }, LFM2_EFORMAT, "merge 9: \"\", expected two tokens "
      "that make a third, with a space between them" },
    { { .merge = "ab" }, LFM2_EFORMAT, "merge 9: \"ab\"" },
    { { .merge = " b" }, LFM2_EFORMAT, "merge 9: \" b\"" },
    { { .merge = "a " }, LFM2_EFORMAT, "merge 9: \"a \"" },
    { { .merge = "a  b" }, LFM2_EFORMAT, "merge 9: \"a  b\"" },
    { { .merge = "a b c" }, LFM2_EFORMAT, "merge 9: \"a b c\"" },
    { { .merge = "q r" }, LFM2_EFORMAT, "merge 9: \"q r\", expected two "
      "tokens that make a third" },
    { { .merge = "yz a" }, LFM2_EFORMAT, "merge 9: \"yz a\", expected two" },
    { { .merge = "a bb" }, LFM2_EFORMAT, "merge 9: \"a bb\", expected two" },
    { { .merge = too_long }, LFM2_EFORMAT, "merge 9: \"xxxxxxxxxx" },
    { { .bos = N_BASE }, LFM2_EFORMAT, "bos_token_id: 274, expected 0 "
      "to 273" },
    { { .eos = 0xfffffffe }, LFM2_EFORMAT, "eos_token_id: 4294967294, "
      "expected 0 to 273" },
    { { .floats = KEY("bos_token_id") }, LFM2_EFORMAT, "expected one integer" },
    { { .scalar = KEY("add_bos_token") }, LFM2_EFORMAT, "expected one bool" },
    { { .no_byte = 1 }, LFM2_EFORMAT, "no token for the single byte 0x00, "
      "expected all 256" },
    { { .no_byte = 1 + 'A' }, LFM2_EFORMAT, "single byte 0x41" },
    { { .no_byte = 256 }, LFM2_EFORMAT, "single byte 0xff" },
};

START_TEST(bad_vocabularies_are_refused)
{
    lfm2_tokenizer *t = NULL;
    lfm2_error err = { 0 };
    size_t n;
    uint8_t *data;

    memset(too_long, 'x', sizeof too_long - 1);
    memset(long_marker, 'x', sizeof long_marker - 1);
    data = make_gguf(&bad[_i].x, &n);
    ck_assert_int_eq(lfm2_tokenizer_open_memory(&t, data, n, &err),
                     bad[_i].code);
    ck_assert_int_eq(err.code, bad[_i].code);
    ck_assert_msg(strstr(err.msg, bad[_i].says), "%s", err.msg);
    ck_assert_ptr_null(t);
    free(data);
}
END_TEST

START_TEST(other_files_are_refused)
{
    lfm2_tokenizer *t;
    lfm2_error err;

    ck_assert_int_eq(lfm2_tokenizer_open_memory(&t, NULL, 9, &err), LFM2_EARG);
    ck_assert_int_eq(lfm2_tokenizer_open_memory(&t, "", 0, &err), LFM2_EFORMAT);
    ck_assert_int_eq(lfm2_tokenizer_open_memory(&t, "text, text", 10, NULL),
                     LFM2_EFORMAT);
    ck_assert_int_eq(lfm2_tokenizer_open(&t, "test/none", &err), LFM2_EIO);
    ck_assert_ptr_null(t);
    lfm2_tokenizer_close(NULL);
}
END_TEST

static char megabyte[MAX_TOKEN + 1];

START_TEST(unusual_vocabularies_are_read)
{
    static const struct { struct change x; int32_t bos; int add_bos; } row[] = {
        { { .drop = KEY("pre") }, 259, 1 },
        { { .pre = "default", .arch = "lfm2moe" }, 259, 1 },
        { { .pre = "llama-bpe", .arch = "llama" }, 259, 1 },
        { { .drop = "general.architecture" }, 259, 1 },
        { { .drop = KEY("bos_token_id") }, -1, 0 },
        { { .drop = KEY("eos_token_id") }, 259, 1 },
        { { .drop = KEY("add_bos_token") }, 259, 1 },
        { { .no_add_bos = 1 }, 259, 0 },
        { { .u32_types = 1 }, 259, 1 },
        { { .drop = KEY("token_type") }, 259, 1 },
        { { .token = "ab", .type = 1 }, 259, 1 },             /* a second ab */
        { { .token = "<a>", .type = TOKEN_USER_DEFINED }, 259, 1 },
        { { .token = "", .type = 1 }, 259, 1 },
        { { .token = "", .type = TOKEN_USER_DEFINED }, 259, 1 },
        { { .token = "\xe4\xb8\xad", .type = 1 }, 259, 1 },   /* not mapped  */
        { { .token = "\xff\xc0", .type = 1 }, 259, 1 },       /* nor UTF-8   */
        { { .token = "<0x-1>", .type = TOKEN_BYTE }, 259, 1 },
        { { .token = "<0xZZ>", .type = TOKEN_BYTE }, 259, 1 },
        { { .token = "<0x00>", .type = TOKEN_BYTE }, 259, 1 },
        { { .token = megabyte, .type = 1 }, 259, 1 },
        { { .merge = "x y" }, 259, 1 },               /* once more           */
        { { .token = "xx", .type = TOKEN_CONTROL, .merge = "x x" }, 259, 1 },
        { { .n_crowd = 50, .drop = KEY("token_type") }, 259, 1 },
        { { .n_pairs = 50, .drop = KEY("token_type") }, 259, 1 },
    };

    memset(megabyte, 'y', sizeof megabyte - 1);
    for (size_t i = 0; i < COUNT(row); i++) {
        lfm2_tokenizer *t = open_words(&row[i].x);
        ck_assert_int_eq(lfm2_n_vocab(t), N_BASE + !!row[i].x.token +
                         row[i].x.n_crowd + row[i].x.n_pairs);
        ck_assert_int_eq(lfm2_bos(t), row[i].bos);
        ck_assert_int_eq(lfm2_add_bos(t), row[i].add_bos);
        int32_t id[2];                    /* of two tokens, the first counts */
        ck_assert(lfm2_encode(t, "ab", 2, 0, id, 2) == 1 && id[0] == 265);
        ck_assert_int_eq(lfm2_token_id(t, "ab"), 265);
        if (t->token[263].type == TOKEN_USER_DEFINED)
            ck_assert(lfm2_encode(t, "<a>", 3, 0, id, 2) == 1 && id[0] == 263);
        ck_assert_str_eq(split(t, "abxx1\xe4\xb8\xad", 0),
                         row[i].x.token && row[i].x.token[0] == '\xe4'
                         ? "ab/x/x/1/\xe4\xb8\xad" : "ab/x/x/1/\xe4/\xb8/\xad");
        lfm2_tokenizer_close(t);
    }
}
END_TEST

/* ------------------------------------------------------------ tokenizer.bin */

static uint8_t *export(const uint8_t *data, size_t size, size_t *n)
{
    uint8_t *bin;

    *n = lfm2_tokenizer_export(data, size, NULL, 0, NULL);
    bin = malloc(*n + 1);
    ck_assert_ptr_nonnull(bin);
    bin[*n] = 0xee;
    ck_assert_uint_eq(lfm2_tokenizer_export(data, size, bin, *n, NULL), *n);
    ck_assert_uint_eq(bin[*n], 0xee);
    return bin;
}

static uint8_t *export_change(const struct change *x, size_t *n)
{
    size_t size;
    uint8_t *gguf = make_gguf(x, &size), *bin = export(gguf, size, n);

    free(gguf);
    return bin;
}

START_TEST(an_exported_vocabulary_is_the_same)
{
    static const struct change changes[] = {
        { 0 }, { .drop = KEY("bos_token_id") }, { .no_add_bos = 1 },
        { .token = "\xe4\xb8\xad", .type = 1 }, { .token = "", .type = 1 },
        { .merge = "a b" }, { .drop = KEY("token_type") }, { .u32_types = 1 },
        { .drop = KEY("pre") }, { .pre = "default", .arch = "lfm2moe" },
        { .pre = "llama-bpe", .arch = "llama" }, { .user_markers = 1 },
    };

    for (size_t i = 0; i < COUNT(changes); i++) {
        lfm2_tokenizer *t = open_words(&changes[i]), *u;
        lfm2_error err = { 0 };
        size_t n, k, n_gguf;
        uint8_t *gguf = make_gguf(&changes[i], &n_gguf), small[40];
        uint8_t *bin = export(gguf, n_gguf, &n), *again;
        ck_assert_msg(lfm2_tokenizer_open_memory(&u, bin, n, &err) == LFM2_OK,
                      "%s", err.msg);
        again = export(bin, n, &k);
        ck_assert(n == k && memcmp(bin, again, n) == 0);
        ck_assert(lfm2_n_vocab(t) == lfm2_n_vocab(u));
        ck_assert(t->bos == u->bos && t->eos == u->eos);
        ck_assert(t->im_start == u->im_start && t->add_bos == u->add_bos);
        ck_assert(memcmp(t->token, u->token, ((size_t)t->n_vocab + 1) *
                         sizeof *t->token) == 0);
        ck_assert(memcmp(t->text, u->text, t->token[t->n_vocab].start) == 0);
        ck_assert(t->n_merges == u->n_merges);
        ck_assert(memcmp(t->merge, u->merge, t->n_merges * sizeof *t->merge)
                  == 0);
        memset(small, 7, sizeof small);
        ck_assert_uint_eq(lfm2_tokenizer_export(gguf, n_gguf, small, 39, NULL),
                          n);
        ck_assert(memcmp(small, bin, 39) == 0 && small[39] == 7);
        free(gguf);
        free(bin);
        free(again);
        lfm2_tokenizer_close(t);
        lfm2_tokenizer_close(u);
    }
}
END_TEST

/* And from a whole model: nothing else is in it. */
START_TEST(the_exported_vocabulary_is_in_the_repository)
{
    struct bytes model = load_file("test/tiny.gguf");
    struct bytes there = load_file("tokenizer.bin");
    size_t n;
    uint8_t *bin = export(model.p, model.n, &n);

    ck_assert_uint_eq(n, there.n);
    ck_assert_mem_eq(bin, there.p, n);
    free(bin);
    free(model.p);
    free(there.p);
}
END_TEST

START_TEST(what_has_no_vocabulary_is_not_exported)
{
    static const struct { struct change x; int code; } row[] = {
        { { .drop = KEY("model") }, LFM2_EFORMAT },
        { { .model = "llama" }, LFM2_EUNSUPPORTED },
        { { .pre = "qwen2", .arch = "llama" }, LFM2_EUNSUPPORTED },
        { { .drop = KEY("tokens") }, LFM2_EFORMAT },
        { { .drop = KEY("merges") }, LFM2_EFORMAT },
        { { .scalar = KEY("token_type") }, LFM2_EFORMAT },
    };
    uint8_t buf[16] = { 7 };
    lfm2_error err;
    size_t n;

    for (size_t i = 0; i < COUNT(row); i++) {
        uint8_t *gguf = make_gguf(&row[i].x, &n);
        err.code = LFM2_OK;
        ck_assert_uint_eq(lfm2_tokenizer_export(gguf, n, buf, 16, &err), 0);
        ck_assert_int_eq(err.code, row[i].code);
        free(gguf);
    }
    ck_assert_uint_eq(lfm2_tokenizer_export("text, text", 10, buf, 16, &err),
                      0);
    ck_assert_int_eq(err.code, LFM2_EFORMAT);
    ck_assert_uint_eq(lfm2_tokenizer_export(NULL, 9, buf, 16, &err), 0);
    ck_assert_int_eq(err.code, LFM2_EARG);
    ck_assert_int_eq(buf[0], 7);
}
END_TEST

/* ------------------------------------------------------------------- damage */

/* Open it; if that works, nothing that it is used for may go wrong. */
static int use(const uint8_t *data, size_t n)
{
    static const char text[] = "aaab <|im_end|> xyz abcabc qrs \xe4\xb8\xad 12";
    uint8_t *exact = malloc(n ? n : 1);   /* so that a sanitizer sees its end */
    int32_t ids[256];
    lfm2_tokenizer *t;
    int len;

    memcpy(exact, data, n);
    if (lfm2_tokenizer_open_memory(&t, exact, n, NULL) != LFM2_OK) {
        free(exact);
        return 0;
    }
    free(exact);
    const int k = lfm2_encode(t, text, sizeof text - 1,
                              LFM2_ENCODE_BOS | LFM2_ENCODE_SPECIAL, ids, 256);
    ck_assert(k >= 0 && k <= 256);
    for (int i = 0; i < k; i++)
        lfm2_token_bytes(t, ids[i], 1, &len);
    ck_assert_uint_gt(lfm2_tokenizer_export(data, n, NULL, 0, NULL), 0);
    lfm2_tokenizer_close(t);
    return 1;
}

/* Cut anywhere it is refused.  One damaged byte may make another vocabulary, as
 * in any GGUF, but does no harm; in the header and the sizes it shows. */
START_TEST(a_damaged_export_is_refused)
{
    static const struct { size_t at; uint8_t value; const char *says; }
    row[] = {
        { 0, 'L', "begins with \"LGUF\", expected \"GGUF\"" },
        { 4, 9, "GGUF version 9, expected 2 or 3" },
        { 8, 1, "past the end" },         /* a tensor                        */
        { 15, 1, "72057594037927936 tensors" },
        { 16, 9, "metadata key 8 runs past the end" },
        { 16, 7, "merges: no such key" },
        { 23, 1, "72057594037927936 metadata keys" },
        { 24, 0, "0 bytes, expected 1 to 256" },
        { 31, 1, "metadata key 0 runs past the end" },
        { 32, 0, "byte 0x00, expected printable ASCII" },
        { 52, 99, "model: value type 99" },
        { 63, 1, "model: 1 x string runs past the end" },
        { 64, 'G', "model: \"Gpt2\", expected \"gpt2\"" },
    };
    lfm2_tokenizer *u;
    lfm2_error err = { 0 };
    size_t n;
    uint8_t *bin = export_change(&good, &n);

    for (size_t i = 0; i < n; i++) {
        ck_assert_int_eq(use(bin, i), 0);
        for (int bit = 0; bit < 8; bit++) {
            bin[i] ^= (uint8_t)(1 << bit);
            use(bin, n);
            bin[i] ^= (uint8_t)(1 << bit);
        }
    }
    for (size_t i = 0; i < COUNT(row); i++) {
        const uint8_t was = bin[row[i].at];
        bin[row[i].at] = row[i].value;
        ck_assert_int_lt(lfm2_tokenizer_open_memory(&u, bin, n, &err), 0);
        ck_assert_msg(strstr(err.msg, row[i].says), "%s", err.msg);
        bin[row[i].at] = was;
    }
    free(bin);
}
END_TEST

/* What a count in it says is held against what is there. */
START_TEST(hostile_counts_in_an_export_are_refused)
{
    static const char *const key[] = {
        "tokenizer.ggml.token_type", "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges"
    };
    static const uint64_t count[] = {
        0, 1, 255, 1000001, UINT32_MAX, (uint64_t)1 << 61, UINT64_MAX / 4 + 1,
        INT64_MAX, UINT64_MAX
    };
    size_t n;
    uint8_t *bin = export_change(&good, &n);

    for (size_t k = 0; k < COUNT(key); k++) {
        size_t at = 24;
        while (memcmp(bin + at, key[k], strlen(key[k])) != 0)
            at++;
        at += strlen(key[k]) + 8;         /* past both types, to the count   */
        for (size_t c = 0; c < COUNT(count); c++)
            for (int first = 0; first <= 8; first += 8) {
                uint8_t was[16];
                memcpy(was, bin + at, 16);
                for (int b = 0; b < 8; b++)        /* a string's length too  */
                    bin[at + (size_t)(first + b)] =
                        (uint8_t)(count[c] >> 8 * b);
                const int opened = use(bin, n);
                ck_assert_msg(!opened || (first && count[c] < 256) ||
                              (k == 2 && count[c] < 9),     /* the last key */
                              "%s: %llu opened", key[k], ull(count[c]));
                memcpy(bin + at, was, 16);
            }
    }
    free(bin);
}
END_TEST

static uint64_t next(uint64_t *state)
{
    return *state = *state * 6364136223846793005u + 1442695040888963407u;
}

START_TEST(damaged_vocabularies_do_no_harm)
{
    size_t n_gguf, n_bin;
    uint8_t *gguf = make_gguf(&good, &n_gguf), damaged[8192];
    uint8_t *bin = export(gguf, n_gguf, &n_bin);
    uint64_t rng = 1;
    int opened = 0;

    ck_assert(n_gguf < sizeof damaged && n_bin < sizeof damaged);
    for (size_t n = 0; n < n_gguf; n++)
        ck_assert_int_eq(use(gguf, n), 0);
    for (int i = 0; i < 20000; i++) {
        const size_t n = i % 2 ? n_gguf : n_bin;
        memcpy(damaged, i % 2 ? gguf : bin, n);
        for (uint64_t k = next(&rng) >> 62; k < 4; k++)
            damaged[(next(&rng) >> 33) % n] = (uint8_t)(next(&rng) >> 56);
        opened += use(damaged, n);
    }
    ck_assert_int_gt(opened, 100);
    free(gguf);
    free(bin);
}
END_TEST

START_TEST(every_allocation_may_fail)
{
    static const char text[] = "aaaaaaaaab xyzxyz";
    const lfm2_message msg = { "user", text };
    lfm2_tokenizer *t = NULL;
    lfm2_error err;
    size_t n;
    uint8_t *data = make_gguf(&good, &n);
    int32_t ids[64];
    int i, code = LFM2_ENOMEM;

    for (i = 1; code != LFM2_OK; i++) {
        fail_at = i;
        code = lfm2_tokenizer_open_memory(&t, data, n, &err);
        ck_assert(code == LFM2_OK || (code == LFM2_ENOMEM && !t));
        ck_assert(code == LFM2_OK || err.code == code);
    }
    ck_assert_int_gt(i, 10);
    fail_at = 1;
    ck_assert_int_eq(lfm2_encode(t, text, strlen(text), 0, ids, 64),
                     LFM2_ENOMEM);
    for (i = 1, code = LFM2_ENOMEM; code == LFM2_ENOMEM; i++) {
        fail_at = i;
        code = lfm2_chat(t, &msg, 1, 1, ids, 64);
    }
    ck_assert(code > 0 && i == 8);        /* two turns, four times room      */
    for (i = 1; i < 3; i++) {             /* keys and tensors                */
        fail_at = i;
        err.code = LFM2_OK;
        ck_assert_uint_eq(lfm2_tokenizer_export(data, n, NULL, 0, &err), 0);
        ck_assert_int_eq(err.code, LFM2_ENOMEM);
    }
    fail_at = 0;
    free(data);
    lfm2_tokenizer_close(t);
}
END_TEST

Suite *vocab_suite(void)
{
    Suite *s = suite_create("vocabularies");
    TCase *c = tcase_create("vocabularies");

    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, bad_vocabularies_are_refused, 0, COUNT(bad));
    tcase_add_test(c, other_files_are_refused);
    tcase_add_test(c, unusual_vocabularies_are_read);
    tcase_add_test(c, an_exported_vocabulary_is_the_same);
    tcase_add_test(c, the_exported_vocabulary_is_in_the_repository);
    tcase_add_test(c, what_has_no_vocabulary_is_not_exported);
    tcase_add_test(c, a_damaged_export_is_refused);
    tcase_add_test(c, hostile_counts_in_an_export_are_refused);
    tcase_add_test(c, damaged_vocabularies_do_no_harm);
    tcase_add_test(c, every_allocation_may_fail);
    suite_add_tcase(s, c);
    return s;
}
