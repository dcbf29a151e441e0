/* Around the targets.
 *
 * With libFuzzer, FUZZ_TARGET in the environment names the target:
 *
 *     FUZZ_TARGET=gguf build/fuzz/fuzz -max_total_time=60 DIR...
 *
 * Without it, files are run once each, under test/corpus or those that are
 * named; their target is the name of the folder they are in.  -m N follows each
 * GGUF with N mutated ones, always the same:
 *
 *     build/test/replay [-m N] [FILE...]
 */
#include "fuzz.h"
#include "util.h"

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct target {
    const char *name;
    fuzz_target *run;
    int is_gguf;
} targets[] = {
    { "gguf", fuzz_gguf, 1 }, { "vocab", fuzz_vocab, 1 },
    { "text", fuzz_text, 0 }, { "state", fuzz_state, 0 },
    { "json", fuzz_json, 0 }, { "calls", fuzz_calls, 0 },
    { "chat", fuzz_chat, 0 }, { "session", fuzz_session, 0 },
    { "batch", fuzz_batch, 0 }, { "serve", fuzz_serve, 0 },
    { "schema", fuzz_schema, 0 },
    { "inspect", fuzz_inspect, 1 }
};

static const struct target *find_target(const char *name, size_t n)
{
    for (size_t i = 0; i < COUNT(targets); i++)
        if (strlen(targets[i].name) == n &&
            memcmp(targets[i].name, name, n) == 0)
            return &targets[i];
    return NULL;
}

/* ----------------------------------------------------- what the targets use */

_Noreturn void fuzz_failed(const char *file, int line, const char *condition)
{
    fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, condition);
    abort();
}

uint8_t *fuzz_copy(const uint8_t *data, size_t n)
{
    uint8_t *copy = malloc(n ? n : 1);

    REQUIRE(copy);
    if (n > 0)
        memcpy(copy, data, n);
    return copy;
}

uint64_t fuzz_hash(const uint8_t *p, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u;

    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

/* As lfm2.c hashes states. */
uint64_t fuzz_hash_words(const uint8_t *p, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u;
    size_t i = 0;

    for (; i + 8 <= n; i += 8) {
        h = (h ^ fuzz_get(p + i, 8)) * 0x100000001b3u;
        h ^= h >> 32;
    }
    for (; i < n; i++)
        h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

void fuzz_put(uint8_t *p, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        p[i] = value >> 8 * i & 255;
}

uint64_t fuzz_get(const uint8_t *p, int bytes)
{
    uint64_t value = 0;

    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)p[i] << 8 * i;
    return value;
}

#ifdef LIBFUZZER

/* ------------------------------------------------------------ for libFuzzer */

static const struct target *target;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t max,
                               unsigned seed);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    const char *name = getenv("FUZZ_TARGET");

    (void)argc;
    (void)argv;
    target = find_target(name ? name : "", name ? strlen(name) : 0);
    if (target)
        return 0;
    fprintf(stderr, "FUZZ_TARGET: expected one of");
    for (size_t i = 0; i < COUNT(targets); i++)
        fprintf(stderr, " %s", targets[i].name);
    fprintf(stderr, "\n");
    exit(2);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    target->run(data, n);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t max,
                               unsigned seed)
{
    return target->is_gguf ? fuzz_mutate_gguf(data, n, max, seed)
                           : LLVMFuzzerMutate(data, n, max);
}

#else

/* --------------------------------------------------------------- for replay */

static char current[1024];                /* the input at work               */
static int n_inputs, n_mutated;

static void on_death(int signal_number)
{
    static const char text[] = "the input was ";

    if (write(STDERR_FILENO, text, sizeof text - 1) < 0 ||
        write(STDERR_FILENO, current, strlen(current)) < 0 ||
        write(STDERR_FILENO, "\n", 1) < 0)
        _exit(1);
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

/* The sanitizers end the program by a signal, too. */
const char *__asan_default_options(void);
const char *__ubsan_default_options(void);

const char *__asan_default_options(void)
{
    return "abort_on_error=1:handle_abort=0:handle_segv=0";
}

const char *__ubsan_default_options(void)
{
    return "abort_on_error=1:print_stacktrace=1";
}

size_t LLVMFuzzerMutate(uint8_t *data, size_t n, size_t max)
{
    static uint64_t rng = 1;

    (void)max;
    for (uint32_t k = 1 + random_u32(&rng) % 4; k > 0 && n > 0; k--)
        data[random_u32(&rng) % n] = (uint8_t)random_u32(&rng);
    return n;
}

static void run_copy(const struct target *t, const uint8_t *data, size_t n)
{
    uint8_t *copy = fuzz_copy(data, n);

    alarm(60);
    t->run(copy, n);
    alarm(0);
    free(copy);
}

/* Mutations build on each other, but not for long. */
static void run_mutated(const struct target *t, struct bytes file, int rounds)
{
    enum { MAX = 1 << 17 };
    uint8_t *data = malloc(MAX);
    size_t n = 0, len = strlen(current);

    REQUIRE(data && file.n <= MAX);
    for (int i = 0; i < rounds; i++, n_mutated++) {
        if (i % 8 == 0)
            memcpy(data, file.p, n = file.n);
        snprintf(current + len, sizeof current - len, ", mutation %d", i);
        n = fuzz_mutate_gguf(data, n, MAX, (unsigned)i);
        run_copy(t, data, n);
    }
    free(data);
}

/* The target of "test/corpus/json/a" is json. */
static int replay(const char *path, int rounds)
{
    const char *name = strrchr(path, '/'), *folder = name;
    const struct target *t;
    struct bytes file = load_file(path);

    while (folder && folder > path && folder[-1] != '/')
        folder--;
    t = folder ? find_target(folder, (size_t)(name - folder)) : NULL;
    if (!t || !file.p) {
        fprintf(stderr, "%s: %s\n", path, t ? "cannot be read, or is empty"
                : "not in a folder with the name of a target");
        free(file.p);
        return -1;
    }
    snprintf(current, sizeof current, "%s", path);
    run_copy(t, file.p, file.n);
    n_inputs++;
    if (t->is_gguf)
        run_mutated(t, file, rounds);
    free(file.p);
    return 0;
}

static int replay_corpus(int rounds)
{
    int failed = 0;

    for (size_t i = 0; i < COUNT(targets); i++) {
        char folder[64], path[512];
        const struct dirent *e;
        DIR *d;

        snprintf(folder, sizeof folder, "test/corpus/%s", targets[i].name);
        d = opendir(folder);
        failed += !d;
        while (d && (e = readdir(d))) {
            snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
            if (e->d_name[0] != '.')
                failed += replay(path, rounds) != 0;
        }
        if (d)
            closedir(d);
        targets[i].run((const uint8_t *)"", 0);
    }
    return failed;
}

int main(int argc, char **argv)
{
    int rounds = 250, failed = 0, i = 1;

    for (int s = 0; s < 5; s++)
        signal((int[]){ SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGALRM }[s],
               on_death);
    if (argc > 2 && strcmp(argv[1], "-m") == 0) {
        rounds = atoi(argv[2]);
        i = 3;
    }
    if (i == argc)
        failed = replay_corpus(rounds);
    for (; i < argc; i++)
        failed += replay(argv[i], rounds) != 0;
    printf("%d inputs and %d mutated ones\n", n_inputs, n_mutated);
    printf("%d passed, %d failed\n", n_inputs, failed);
    return failed != 0;
}

#endif
