/* What the system may refuse: every allocation failing in turn, mmap, fread
 * and threads that fail.  Always a documented code, no leak, no crash; and what
 * the header says of memory, measured. */
#define _GNU_SOURCE                      /* as lfm2.c does */

#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

/* The stand-ins that lfm2.c is compiled with here.  `left` allocations succeed;
 * then one fails, and with `all` every later one. */
static struct {
    long left, live, bytes;
    int all, failed;
    int no_mmap, no_thread, short_reads, bad_disk;
    const char *shrinks;                  /* this file, to 100 bytes         */
} sys = { .left = -1 };

static int refuses(void)
{
    if (sys.left < 0 || sys.left-- > 0)
        return 0;
    sys.left = sys.all ? 0 : -1;
    sys.failed++;
    return 1;
}

static void *counted(void *p, size_t size)
{
    sys.live += p != NULL;
    sys.bytes += (long)size;
    return p;
}

static void *test_malloc(size_t n)
{
    return refuses() ? NULL : counted(malloc(n), n);
}

static void *test_calloc(size_t n, size_t size)
{
    return refuses() ? NULL : counted(calloc(n, size), n * size);
}

static inline void *test_realloc(void *p, size_t n)
{
    return refuses() ? NULL : realloc(p, n);
}

static void test_free(void *p)
{
    sys.live -= p != NULL;
    free(p);
}

static void *test_mmap(void *p, size_t n, int prot, int flags, int fd, off_t at)
{
    if (!sys.no_mmap)
        return mmap(p, n, prot, flags, fd, at);
    errno = ENODEV;
    return MAP_FAILED;
}

static int error_of_stream;

/* Interrupted every other time, and never more than 1000 bytes at once; or it
 * cannot read at all, or finds only 100 bytes of the file left. */
static size_t test_fread(void *p, size_t size, size_t n, FILE *f)
{
    if (sys.shrinks && truncate(sys.shrinks, 100) != 0)
        return 0;
    error_of_stream = sys.bad_disk ||
                      (sys.short_reads && sys.short_reads++ % 2);
    if (!error_of_stream)
        return fread(p, size, sys.short_reads && n > 1000 ? 1000 : n, f);
    errno = sys.bad_disk ? EIO : EINTR;
    return 0;
}

static int test_ferror(FILE *f)
{
    return error_of_stream || ferror(f);
}

static int test_pthread_create(pthread_t *t, const pthread_attr_t *attr,
                               void *(*fn)(void *), void *arg)
{
    if (sys.no_thread && --sys.no_thread == 0) {
        sys.no_thread = 1;
        return EAGAIN;
    }
    return pthread_create(t, attr, fn, arg);
}

#define malloc test_malloc
#define calloc test_calloc
#define realloc test_realloc
#define free test_free
#define mmap test_mmap
#define fread test_fread
#undef ferror
#define ferror test_ferror
#define pthread_create test_pthread_create
#include "../lfm2.c"
#undef malloc
#undef calloc
#undef realloc
#undef free
#undef mmap
#undef fread
#undef ferror
#undef pthread_create

#include "util.h"

#include <check.h>

static struct bytes file;                 /* a model with words              */
static lfm2_model *model;
static lfm2_tokenizer *words;
static char path[] = "build/test/alloc-XXXXXX";

static void setup(void)
{
    const struct tiny t = { .type = 2, .moe = 1, .words = 1 };
    int fd;

    file = tiny_model(&t);
    ck_assert(lfm2_model_open_memory(&model, file.p, file.n, NULL) == LFM2_OK);
    ck_assert(lfm2_tokenizer_open_memory(&words, file.p, file.n, NULL) ==
              LFM2_OK);
    fd = mkstemp(path);
    ck_assert(fd >= 0 && write(fd, file.p, file.n) == (ssize_t)file.n);
    close(fd);
}

static void teardown(void)
{
    lfm2_tokenizer_close(words);
    lfm2_model_close(model);
    free(file.p);
    unlink(path);
    ck_assert_msg(sys.live == 0, "%ld blocks never freed", sys.live);
}

/* ---------------------------------------------- every allocation, in turn
 *
 * Each operation does its work, undoes it, and returns a code. */

static int open_memory(lfm2_error *err)
{
    lfm2_model *m = (lfm2_model *)&file;
    int code = lfm2_model_open_memory(&m, file.p, file.n, err);

    ck_assert((m != NULL) == (code == LFM2_OK));
    lfm2_model_close(m);
    return code;
}

static int open_mapped(lfm2_error *err)
{
    lfm2_model *m;
    int code = lfm2_model_open(&m, path, LFM2_LOAD_MAP, err);

    lfm2_model_close(m);
    return code;
}

static int open_read(lfm2_error *err)
{
    lfm2_model *m;
    int code = lfm2_model_open(&m, path, LFM2_LOAD_READ, err);

    lfm2_model_close(m);
    return code;
}

static int open_words(lfm2_error *err)
{
    lfm2_tokenizer *t = (lfm2_tokenizer *)&file;
    int code = lfm2_tokenizer_open_memory(&t, file.p, file.n, err);

    ck_assert((t != NULL) == (code == LFM2_OK));
    lfm2_tokenizer_close(t);
    return code;
}

static int open_words_file(lfm2_error *err)
{
    lfm2_tokenizer *t;
    int code = lfm2_tokenizer_open(&t, path, err);

    lfm2_tokenizer_close(t);
    return code;
}

static int open_exported_words(lfm2_error *err)
{
    const size_t n = lfm2_tokenizer_export(file.p, file.n, NULL, 0, err);
    uint8_t *bin;
    lfm2_tokenizer *t;
    int code;

    if (n == 0)
        return err->code;
    bin = malloc(n);
    code = lfm2_tokenizer_export(file.p, file.n, bin, n, err) == n
           ? lfm2_tokenizer_open_memory(&t, bin, n, err) : err->code;
    if (code != LFM2_OK) {
        free(bin);
        return code;
    }
    lfm2_tokenizer_close(t);
    free(bin);
    return code;
}

static int open_context(lfm2_error *err)
{
    const lfm2_params p = { .n_ctx = 100, .n_seq = 2, .n_batch = 8,
                            .n_logits = 1, .n_threads = 3 };
    lfm2_context *ctx = (lfm2_context *)&file;
    int code = lfm2_context_open(&ctx, model, &p, err);

    ck_assert((ctx != NULL) == (code == LFM2_OK));
    lfm2_context_close(ctx);
    return code;
}

static void look(void *user, const lfm2_activation *a)
{
    *(int *)user += a->n;
}

/* The second time, there is memory already. */
static int trace_pass(lfm2_error *err)
{
    static const int32_t token = 1;
    const lfm2_params p = { .n_ctx = 8, .n_seq = 1, .n_batch = 8,
                            .n_logits = 1, .n_threads = 1 };
    const lfm2_span span = { 0, &token, 1, 1 };
    lfm2_context *ctx;
    int code = lfm2_context_open(&ctx, model, &p, err), seen = 0;

    if (code != LFM2_OK)
        return code;
    code = lfm2_trace(ctx, look, &seen, err);
    ck_assert(lfm2_forward(ctx, &span, 1, NULL) == LFM2_OK);
    ck_assert((seen > 0) == (code == LFM2_OK));
    if (code == LFM2_OK)
        ck_assert(lfm2_trace(ctx, look, NULL, err) == LFM2_OK);
    lfm2_context_close(ctx);
    return code;
}

/* These two have a code but no sentence. */
static int encode(lfm2_error *err)
{
    static const char text[] = "hello hello, python; \xff\xfe and more of it";
    int n = lfm2_encode(words, text, sizeof text - 1, LFM2_ENCODE_SPECIAL,
                        NULL, 0);

    ck_assert(n > 0 || n == LFM2_ENOMEM);
    *err = (lfm2_error){ n, "no memory" };
    return n < 0 ? n : LFM2_OK;
}

static int chat(lfm2_error *err)
{
    const lfm2_message msgs[] = { { "system", "Be brief." },
                                  { "user", "hello there" } };
    int n = lfm2_chat(words, msgs, 2, 1, NULL, 0);

    ck_assert(n > 0 || n == LFM2_ENOMEM);
    *err = (lfm2_error){ n, "no memory" };
    return n < 0 ? n : LFM2_OK;
}

static const struct {
    const char *name;
    int (*run)(lfm2_error *err);
    int least;                            /* allocations there must be       */
} operation[] = {
    { "a model in memory", open_memory, 5 },
    { "a mapped model", open_mapped, 5 },
    { "a model read from a file", open_read, 6 },
    { "a tokenizer from a GGUF", open_words, 9 },
    { "a tokenizer from a file", open_words_file, 9 },
    { "a tokenizer from a tokenizer.bin", open_exported_words, 8 },
    { "a context", open_context, 1 },
    { "a trace", trace_pass, 2 },
    { "a text", encode, 1 },
    { "a conversation", chat, 2 }
};

/* Descriptors are given out lowest first, so a leaked one shows. */
static int next_descriptor(void)
{
    int fd = dup(0);

    close(fd);
    return fd;
}

/* Refuse the k-th allocation, for k = 0, 1, ... until none is refused.  Only
 * shrinking a block may fail without harm. */
static void refuse_each(int op, int all)
{
    const long live = sys.live;
    const int descriptor = next_descriptor();
    int k = 0, errors = 0;

    for (;; k++) {
        lfm2_error err = { 0 };
        sys.left = k;
        sys.all = all;
        sys.failed = 0;
        int code = operation[op].run(&err);
        sys.left = -1;
        EXPECT_MSG(sys.live == live, "%s, allocation %d refused: %ld blocks "
                   "never freed", operation[op].name, k, sys.live - live);
        EXPECT(next_descriptor() == descriptor);
        if (sys.failed == 0) {
            EXPECT(code == LFM2_OK);
            break;
        }
        EXPECT_MSG(code == LFM2_OK || (code == LFM2_ENOMEM &&
                   err.code == code && strstr(err.msg, "no memory")),
                   "%s, allocation %d refused: code %d, \"%s\"",
                   operation[op].name, k, code, err.msg);
        errors += code != LFM2_OK;
    }
    EXPECT_MSG(errors >= operation[op].least, "%s: only %d of %d refusals were "
               "errors", operation[op].name, errors, k);
}

START_TEST(each_allocation_may_fail)
{
    refuse_each(_i, 0);
}
END_TEST

START_TEST(all_allocations_from_one_on_may_fail)
{
    refuse_each(_i, 1);
}
END_TEST

/* ----------------------------------------------------------- other refusals */

START_TEST(a_file_that_cannot_be_mapped_is_an_error)
{
    const int descriptor = next_descriptor();
    lfm2_error err;

    sys.no_mmap = 1;
    ck_assert_int_eq(open_mapped(&err), LFM2_EIO);
    ck_assert(strstr(err.msg, path) && strstr(err.msg, "cannot map"));
    ck_assert_int_eq(open_read(&err), LFM2_OK);
    ck_assert_int_eq(next_descriptor(), descriptor);
}
END_TEST

START_TEST(a_file_that_comes_in_pieces_is_read_whole)
{
    const int32_t tokens[3] = { 1, 2, 3 };
    const lfm2_span span = { 0, tokens, 3, 1 };
    const lfm2_params p = { .n_ctx = 8, .n_seq = 1, .n_batch = 8,
                            .n_logits = 1, .n_threads = 1 };
    const lfm2_model *models[2] = { model, NULL };
    lfm2_context *ctx[2];
    lfm2_model *m;
    lfm2_error err;

    sys.short_reads = 1;
    EXPECT_MSG(lfm2_model_open(&m, path, LFM2_LOAD_READ, &err) == LFM2_OK, "%s",
               err.msg);
    ck_assert(sys.short_reads > 100);
    models[1] = m;
    for (int i = 0; i < 2; i++) {
        ck_assert(lfm2_context_open(&ctx[i], models[i], &p, NULL) == LFM2_OK);
        ck_assert(lfm2_forward(ctx[i], &span, 1, NULL) == LFM2_OK);
    }
    ck_assert(memcmp(lfm2_logits(ctx[0], 0, 0), lfm2_logits(ctx[1], 0, 0),
                     (size_t)m->cfg.n_vocab * sizeof(float)) == 0);
    lfm2_context_close(ctx[0]);
    lfm2_context_close(ctx[1]);
    lfm2_model_close(m);
}
END_TEST

START_TEST(a_file_that_cannot_be_read_is_an_error)
{
    const int descriptor = next_descriptor();
    const long live = sys.live;
    lfm2_error err;

    sys.bad_disk = 1;
    ck_assert_int_eq(open_read(&err), LFM2_EIO);
    ck_assert(strstr(err.msg, path) && strstr(err.msg, strerror(EIO)));
    ck_assert(strstr(err.msg, "after 0 of"));
    ck_assert_int_eq(open_mapped(&err), LFM2_OK);
    ck_assert_int_eq(next_descriptor(), descriptor);
    ck_assert(sys.live == live);
}
END_TEST

/* Its end is gone between the look at its size and the reading. */
START_TEST(a_file_that_becomes_shorter_is_an_error)
{
    lfm2_error err;

    sys.shrinks = path;
    ck_assert_int_eq(open_read(&err), LFM2_EIO);
    ck_assert(strstr(err.msg, "the file ends after 100 of"));
}
END_TEST

/* The first, second, third worker cannot be had: it goes on with fewer. */
START_TEST(without_threads_it_goes_on_with_fewer)
{
    const int32_t tokens[3] = { 1, 2, 3 };
    const lfm2_span span = { 0, tokens, 3, 1 };
    const lfm2_params p = { .n_ctx = 8, .n_seq = 1, .n_batch = 8,
                            .n_logits = 1, .n_threads = 4 };
    lfm2_context *ctx;

    for (int k = 1; k <= 4; k++) {
        sys.no_thread = k;
        ck_assert(lfm2_context_open(&ctx, model, &p, NULL) == LFM2_OK);
        ck_assert_int_eq(lfm2_context_params(ctx).n_threads, k);
        ctx->row_work = TOO_SMALL;        /* enough to share                 */
        ck_assert(lfm2_forward(ctx, &span, 1, NULL) == LFM2_OK);
        lfm2_context_close(ctx);
    }
}
END_TEST

/* ----------------------------------------------------------------- promises */

START_TEST(forward_and_sample_never_allocate)
{
    int32_t tokens[40] = { 1, 2, 3 };
    const lfm2_span span = { 0, tokens, 40, 40 };
    const lfm2_params p = { .n_ctx = 100, .n_seq = 2, .n_batch = 7,
                            .n_logits = 40, .n_threads = 3 };
    lfm2_sampler s = { .temperature = 1, .top_k = 20, .top_p = 0.9f,
                       .min_p = 0.01f, .repeat_penalty = 1.1f,
                       .repeat_last_n = 64, .rng = 1 };
    lfm2_context *ctx;

    ck_assert(lfm2_context_open(&ctx, model, &p, NULL) == LFM2_OK);
    ctx->row_work = TOO_SMALL;            /* enough to share                 */
    sys.left = 0;
    sys.all = 1;
    ck_assert(lfm2_forward(ctx, &span, 1, NULL) == LFM2_OK);
    ck_assert(lfm2_sample(ctx, &s, lfm2_logits(ctx, 0, 39), tokens, 40) >= 0);
    ck_assert(lfm2_seq_copy(ctx, 1, 0, NULL) == LFM2_OK);
    ck_assert(lfm2_seq_trim(ctx, 1, 0) == 0);
    sys.left = -1;
    ck_assert_int_eq(sys.failed, 0);
    lfm2_context_close(ctx);
}
END_TEST

START_TEST(a_context_takes_what_was_foretold)
{
    static const lfm2_params p[] = {
        { .n_ctx = 1, .n_seq = 1, .n_batch = 1, .n_threads = 1 },
        { .n_ctx = 100, .n_seq = 3, .n_batch = 64, .n_logits = 9,
          .n_threads = 2, .kv_type = LFM2_KV_F32 },
        { .n_ctx = 4096, .n_seq = 8, .n_batch = 512, .n_logits = 1 },
        { .n_seq = 1, .n_batch = 7, .n_threads = 64 }
    };

    for (size_t i = 0; i < COUNT(p); i++) {
        const uint64_t size = lfm2_context_size(model, &p[i]);
        lfm2_context *ctx;
        sys.bytes = 0;
        ck_assert(lfm2_context_open(&ctx, model, &p[i], NULL) == LFM2_OK);
        EXPECT_MSG((uint64_t)sys.bytes == size,
                   "%ld bytes allocated, %llu foretold", sys.bytes,
                   (unsigned long long)size);
        lfm2_context_close(ctx);
    }
}
END_TEST

Suite *alloc_suite(void)
{
    Suite *s = suite_create("what the system refuses");
    TCase *c = tcase_create("what the system refuses");

    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_add_loop_test(c, each_allocation_may_fail, 0, (int)COUNT(operation));
    tcase_add_loop_test(c, all_allocations_from_one_on_may_fail, 0,
                        (int)COUNT(operation));
    tcase_add_test(c, a_file_that_cannot_be_mapped_is_an_error);
    tcase_add_test(c, a_file_that_comes_in_pieces_is_read_whole);
    tcase_add_test(c, a_file_that_cannot_be_read_is_an_error);
    tcase_add_test(c, a_file_that_becomes_shorter_is_an_error);
    tcase_add_test(c, without_threads_it_goes_on_with_fewer);
    tcase_add_test(c, forward_and_sample_never_allocate);
    tcase_add_test(c, a_context_takes_what_was_foretold);
    suite_add_tcase(s, c);
    return s;
}
