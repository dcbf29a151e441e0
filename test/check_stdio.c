/* What is left without SIMD, threads and mmap: C11 and its library.  Files come
 * through stdio alone, and the same model gives the same logits. */
#define LFM2_NO_THREADS
#define LFM2_NO_MMAP
#include "../lfm2.c"

#include "util.h"

#include <check.h>

static char path[] = "build/test/stdio.gguf";

static void write_file(const void *p, size_t n)
{
    FILE *f = fopen(path, "wb");

    ck_assert(f && fwrite(p, 1, n, f) == n && fclose(f) == 0);
}

static void teardown(void)
{
    remove(path);
}

/* The logits of three tokens, written to out. */
static void run(const lfm2_model *m, float *out)
{
    static const int32_t tokens[3] = { 1, 2, 3 };
    const lfm2_span span = { .tokens = tokens, .n_tokens = 3, .n_logits = 3 };
    const lfm2_params p = { .n_ctx = 8, .n_seq = 1, .n_batch = 8,
                            .n_logits = 3, .n_threads = 4 };
    lfm2_context *ctx;

    ck_assert(lfm2_context_open(&ctx, m, &p, NULL) == LFM2_OK);
    ck_assert_int_eq(lfm2_context_params(ctx).n_threads, 1);
    ck_assert(lfm2_forward(ctx, &span, 1, NULL) == LFM2_OK);
    memcpy(out, lfm2_logits(ctx, 0, 0),
           3 * (size_t)m->cfg.n_vocab * sizeof *out);
    lfm2_context_close(ctx);
}

/* Both ways to load a file read it. */
START_TEST(a_file_is_read_and_run)
{
    struct bytes file = tiny_model(&(struct tiny){ .moe = 1, .words = 1 });
    static float expected[3 * 264], found[3 * 264];
    lfm2_tokenizer *words;
    lfm2_model *m;
    lfm2_error err;
    size_t n;

    write_file(file.p, file.n);
    ck_assert(lfm2_model_open_memory(&m, file.p, file.n, &err) == LFM2_OK);
    ck_assert_int_eq(m->cfg.n_vocab, 264);
    run(m, expected);
    lfm2_model_close(m);
    for (int load = LFM2_LOAD_MAP; load <= LFM2_LOAD_READ; load++) {
        EXPECT_MSG(lfm2_model_open(&m, path, load, &err) == LFM2_OK, "%s",
                   err.msg);
        const void *bytes = lfm2_model_file(m, &n);
        ck_assert(n == file.n && memcmp(bytes, file.p, n) == 0);
        run(m, found);
        ck_assert(memcmp(found, expected, sizeof found) == 0);
        lfm2_model_close(m);
    }
    ck_assert(lfm2_tokenizer_open(&words, path, &err) == LFM2_OK);
    lfm2_tokenizer_close(words);
    free(file.p);
}
END_TEST

START_TEST(what_is_no_file_is_an_error)
{
    static const struct { const char *path, *sentence; int code; } row[] = {
        { "build/no/such/file", "build/no/such/file: ", LFM2_EIO },
        { "test", "test: ", LFM2_EIO },
        { "build/test/stdio.gguf", "0 bytes, expected a GGUF", LFM2_EFORMAT },
        { "/dev/zero", "0 bytes, expected a GGUF file", LFM2_EFORMAT },
        { "Makefile", "not a GGUF file: it begins with", LFM2_EFORMAT },
    };
    lfm2_error err = { 0 };
    lfm2_model *m;

    write_file("", 0);
    for (size_t i = 0; i < COUNT(row); i++)
        for (int load = LFM2_LOAD_MAP; load <= LFM2_LOAD_READ; load++) {
            int code = lfm2_model_open(&m, row[i].path, load, &err);
            EXPECT_MSG(code == row[i].code && strstr(err.msg, row[i].sentence),
                       "%s: code %d, \"%s\"", row[i].path, code, err.msg);
            EXPECT(m == NULL);
        }
}
END_TEST

Suite *stdio_suite(void)
{
    Suite *s = suite_create("stdio");
    TCase *c = tcase_create("stdio");

    tcase_set_timeout(c, 60);
    tcase_add_checked_fixture(c, NULL, teardown);
    tcase_add_test(c, a_file_is_read_and_run);
    tcase_add_test(c, what_is_no_file_is_an_error);
    suite_add_tcase(s, c);
    return s;
}
