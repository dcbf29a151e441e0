/* What can still be done inside of the sandbox, and what cannot.  The tests run
 * in processes of their own, as there is no way out of it. */
#define _POSIX_C_SOURCE 200809L          /* as run.c does */

#define main run_main
#include "../run.c"
#undef main
#undef COUNT

#include "util.h"

#include <check.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define MODEL "test/tiny.gguf"

/* Where this fails, nothing can be tested. */
static int have_sandbox;

#ifdef HAVE_SANDBOX

/* ----------------------------------------------------- what is to be denied */

/* A call is denied if it fails, and for no other reason than that. */
static int denied(long result)
{
    return result < 0 && (errno == EPERM || errno == EACCES || errno == ENOSYS);
}

static int opens(const char *path, int flags)
{
    const int fd = open(path, flags, 0600);

    if (fd >= 0)
        close(fd);
    return fd >= 0 ? 0 : denied(fd) ? -1 : -2;
}

/* Each is -1 if it was denied. */
static int try_read(void) { return opens("/etc/passwd", O_RDONLY); }
static int try_model(void) { return opens(MODEL, O_RDONLY); }
static int try_dir(void) { return opens("/", O_RDONLY); }
static int try_memory(void) { return opens("/proc/self/mem", O_RDWR); }
static int try_null(void) { return opens("/dev/null", O_WRONLY); }

static int try_create(void)
{
    return opens("build/test/escaped", O_WRONLY | O_CREAT);
}

static int try_socket(void)
{
    return denied(socket(AF_INET, SOCK_STREAM, 0)) ? -1 : 0;
}

static int try_local(void)
{
    int pair[2];

    return denied(socket(AF_UNIX, SOCK_STREAM, 0)) &&
           denied(socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) ? -1 : 0;
}

static int try_execute(void)
{
    return denied(execl("/bin/true", "true", (char *)NULL)) ? -1 : 0;
}

static int try_fork(void)
{
    const pid_t pid = fork();

    if (pid == 0)
        _exit(0);
    if (pid > 0)
        waitpid(pid, NULL, 0);
    return denied(pid) ? -1 : 0;
}

static int try_kill(void) { return denied(kill(getppid(), 0)) ? -1 : 0; }

static int try_trace(void)
{
    return denied(syscall(SYS_ptrace, 16L, (long)getppid(), 0L, 0L)) ? -1 : 0;
}

static int try_peek(void)
{
    return denied(syscall(SYS_process_vm_readv, (long)getppid(), NULL, 0L, NULL,
                          0L, 0L)) ? -1 : 0;
}

static int try_code(void)
{
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | 0x20 /* MAP_ANONYMOUS */, -1, 0);
    int failed;

    if (page == MAP_FAILED)
        return -2;
    failed = denied(mprotect(page, 4096, PROT_READ | PROT_EXEC));
    munmap(page, 4096);
    return failed && mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | 0x20,
                          -1, 0) == MAP_FAILED ? -1 : 0;
}

/* A file that find_out() made. */
static int try_remove(void)
{
    return denied(unlink("build/test/there")) ? -1 : 0;
}

static int try_move(void)
{
    return denied(rename("Makefile", "build/test/no")) ? -1 : 0;
}

static int try_mode(void) { return denied(chmod("Makefile", 0644)) ? -1 : 0; }

static int try_dump(void)
{
    return denied(syscall(SYS_prctl, PR_DUMPABLE, 1L, 0L, 0L, 0L)) ? -1 : 0;
}

/* io_uring_setup() and openat2() are newer than the list. */
static int try_newer(void)
{
    return syscall(425L, 1L, NULL) < 0 && errno == ENOSYS &&
           syscall(437L, -100L, "/etc/passwd", NULL, 24L) < 0 &&
           errno == ENOSYS ? -1 : 0;
}

/* The other way in for the same call. */
static int try_x32(void)
{
#ifdef __x86_64__
    return denied(syscall(0x40000000L + SYS_openat, -100L, "/etc/passwd", 0L));
#else
    return 1;
#endif
}

static const struct { const char *name; int (*is)(void); } tries[] = {
    { "read a file", try_read }, { "open the model", try_model },
    { "open a directory", try_dir }, { "write memory", try_memory },
    { "open a device", try_null }, { "create a file", try_create },
    { "a socket", try_socket }, { "a local socket", try_local },
    { "execute", try_execute }, { "fork", try_fork },
    { "send a signal", try_kill }, { "trace", try_trace },
    { "read another's memory", try_peek }, { "make code", try_code },
    { "remove", try_remove }, { "rename", try_move },
    { "change a mode", try_mode }, { "be dumped", try_dump },
    { "newer calls", try_newer }
};

enum { N_TRIES = sizeof tries / sizeof *tries };

static int oops(const char *what)
{
    fprintf(stderr, "inside: %s\n", what);
    return 1;
}

/* Everything that can be tried fails, but that the model can be read. */
static int all_denied(void)
{
    int bad = 0;

    for (int i = 0; i < N_TRIES; i++)
        if (tries[i].is() != (tries[i].is == try_model ? 0 : -1))
            bad = oops(tries[i].name);
    return bad || !try_x32() ? oops("not all is denied") : 0;
}

/* ----------------------------------------------------- what goes on to work */

static uint64_t answer_hash(struct engine *e)
{
    int32_t ids[40];
    float *logits;

    for (int i = 0; i < 40; i++)
        ids[i] = 5 + i;
    if (forward(e, &(lfm2_span){ 0, ids, 40, 1 }, 1) != DONE)
        return 0;
    logits = lfm2_logits(e->ctx, 0, 0);
    return hash_floats(HASH_START, logits,
                       lfm2_model_config(e->model)->n_vocab);
}

static int memory_works(void)
{
    static const size_t n = (size_t)1 << 26;
    char *p = malloc(n), *more;

    if (!p)
        return 0;
    memset(p, 1, n);
    more = realloc(p, 2 * n);
    if (!more || more[n - 1] != 1)
        return 0;
    free(more);
    for (int i = 0; i < 1000; i++)
        free(malloc((size_t)i * 100));
    return printf("%s %.3f\n", "words", 1.5) == 12 && fflush(stdout) == 0;
}

/* A thread is under it as well. */
static void *thread(void *result)
{
    *(int *)result = try_read() == -1 && try_socket() == -1 &&
                     try_execute() == -1 && try_fork() == -1;
    return NULL;
}

/* Open, look around, answer: 0 if all is as it should be. */
static int inside(int sandbox, uint64_t expected)
{
    struct settings s = defaults;
    struct engine e = { .s = &s };
    pthread_t other;
    int held = 0, bad;

    s.model = MODEL;
    s.sandbox = sandbox;
    s.threads = 4;
    s.raw = s.quiet = 1;
    if (open_engine(&e) != DONE)
        return oops("the model does not open");
    bad = all_denied();
    if (open_context(&e) != DONE)
        return oops("the context does not open");
    if (lfm2_context_params(e.ctx).n_threads != 4)
        bad = oops("there are not four threads");
    if (pthread_create(&other, NULL, thread, &held) != 0)
        return oops("no thread");
    pthread_join(other, NULL);
    if (!held)
        bad = oops("a thread is not under it");
    if (answer_hash(&e) != expected)
        bad = oops("another answer");
    if (!memory_works())
        bad = oops("memory and output");
    close_engine(&e);
    return bad;
}

static uint64_t outside(void)
{
    struct settings s = defaults;
    struct engine e = { .s = &s };
    uint64_t hash = 0;

    s.model = MODEL;
    s.sandbox = SANDBOX_OFF;
    s.threads = 1;
    s.raw = s.quiet = 1;
    if (open_engine(&e) == DONE && open_context(&e) == DONE)
        hash = answer_hash(&e);
    close_engine(&e);
    return hash;
}

/* The status of a process that does it. */
static int in_child(int (*fn)(int, uint64_t), int a, uint64_t b)
{
    const pid_t pid = fork();
    int status = -1;

    if (pid == 0)
        exit(fn(a, b));
    EXPECT(pid > 0 && waitpid(pid, &status, 0) == pid);
    return status;
}

/* -------------------------------------------------------------------- tests */

START_TEST(test_inside)
{
    const int how = _i ? SANDBOX_REQUIRE : SANDBOX_AUTO;
    const uint64_t expected = outside();

    if (!have_sandbox)
        return;
    ck_assert_uint_ne(expected, 0);
    ck_assert_int_eq(in_child(inside, how, expected), 0);
}
END_TEST

/* Without it the same things can be done, so their failure means something. */
START_TEST(test_outside)
{
    ck_assert_int_eq(try_read(), 0);
    ck_assert_int_eq(try_model(), 0);
    ck_assert_int_eq(try_create(), 0);
    ck_assert_int_eq(unlink("build/test/escaped"), 0);
    ck_assert_int_eq(try_socket(), 0);
    ck_assert_int_eq(try_fork(), 0);
    ck_assert_int_eq(try_kill(), 0);
    ck_assert_int_eq(try_code(), 0);
    ck_assert_int_eq(try_mode(), 0);
    ck_assert_int_ne(outside(), 0);
    ck_assert_int_eq(try_read(), 0);
}
END_TEST

/* A session may be replaced, by another process, and nothing beside it. */
static int with_session(int sandbox, uint64_t unused)
{
    static char path[] = "build/test/sandboxed/session";
    struct settings s = defaults;
    struct text words = { 0 };

    (void)unused;
    s.model = MODEL;
    s.session = path;
    s.sandbox = sandbox;
    if (enter_sandbox(&s) != DONE)
        return oops("it does not begin");
    add_string(&words, "new words");
    if (write_session(path, &words) != DONE)
        return oops("the session is not replaced");
    if (opens(path, O_RDONLY) != -1)
        return oops("more can be read than was there");
    if (opens("build/test/sandboxed/beside", O_WRONLY | O_CREAT) != -1 ||
        opens("build/test/kept", O_RDONLY) != -1 || opens(path, O_WRONLY) != -1)
        return oops("its directory is open");
    if (try_create() != -1 || try_read() != -1 || try_move() != -1 ||
        !denied(unlink("build/test/kept")) || !denied(unlink(path)) ||
        !denied(rename(path, "build/test/moved")))
        return oops("what is not named can be opened");
    if (try_socket() != -1 || try_fork() != -1 || try_execute() != -1)
        return oops("more than files");
    free(words.s);
    return 0;
}

START_TEST(test_session)
{
    int fd;

    if (!have_sandbox)
        return;
    mkdir("build/test/sandboxed", 0700);
    fd = open("build/test/kept", O_WRONLY | O_CREAT, 0600);
    ck_assert_int_ge(fd, 0);
    close(fd);
    ck_assert_int_eq(in_child(with_session, _i ? SANDBOX_REQUIRE : SANDBOX_AUTO,
                              0), 0);
    ck_assert_int_eq(unlink("build/test/kept"), 0);
    ck_assert_int_eq(unlink("build/test/sandboxed/session"), 0);
    ck_assert_int_eq(rmdir("build/test/sandboxed"), 0);
}
END_TEST

/* An attacker may add filters, but not take one away. */
static int again(int sandbox, uint64_t unused)
{
    struct settings s = defaults;

    (void)unused;
    s.model = MODEL;
    s.sandbox = sandbox;
    s.quiet = 1;
    if (enter_sandbox(&s) != DONE)
        return oops("it does not begin");
    s.sandbox = SANDBOX_REQUIRE;
    if (confine_calls(&s) == DONE)
        return oops("another filter after the last");
    return all_denied();
}

START_TEST(test_again)
{
    if (have_sandbox)
        ck_assert_int_eq(in_child(again, SANDBOX_REQUIRE, 0), 0);
}
END_TEST

static int begins_at_all(int sandbox, uint64_t unused)
{
    struct settings s = defaults;

    (void)unused;
    s.model = MODEL;
    s.sandbox = sandbox;
    return enter_sandbox(&s) == DONE ? 0 : 1;
}

static void find_out(void)
{
    close(open("build/test/there", O_WRONLY | O_CREAT, 0600));
    have_sandbox = in_child(begins_at_all, SANDBOX_REQUIRE, 0) == 0;
    if (!have_sandbox)
        printf("skipped: the sandbox, which this system does not have\n");
}

#endif

Suite *sandbox_suite(void)
{
    Suite *suite = suite_create("sandbox");
    TCase *t = tcase_create("inside and outside");

    tcase_set_timeout(t, 120);
#ifdef HAVE_SANDBOX
    find_out();
    tcase_add_loop_test(t, test_inside, 0, 2);
    tcase_add_test(t, test_outside);
    tcase_add_loop_test(t, test_session, 0, 2);
    tcase_add_test(t, test_again);
#else
    (void)have_sandbox;
    printf("skipped: the sandbox, which is not in this build\n");
#endif
    suite_add_tcase(suite, t);
    return suite;
}
