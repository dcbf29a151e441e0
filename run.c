/* run.c - the command line of lfm2.c.
 *
 * Standard output carries the model's words, or the data that was asked for,
 * and nothing else; everything meant for a human being goes to standard error.
 *
 *   1  messages and exit codes        5  --inspect
 *   2  options                        6  the prompt and its answer
 *   3  reading what is given          7  --bench
 *   4  tokens in and out              8  main */

#define _POSIX_C_SOURCE 200809L
#define _DARWIN_C_SOURCE                  /* macOS: ru_maxrss                */

#include "lfm2.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

/* ------------------------------------------------ 1. Messages and exit codes
 *
 * Other programs act on these numbers, so they never change their meaning. */

enum {
    DONE = 0, FAILED = 1, USAGE = 2, BAD_FILE = 3, BAD_MODEL = 4,
    NO_MEMORY = 5, TOO_LONG = 6, INTERRUPTED = 130
};

static const char *program = "run";       /* the name it was called by       */

/* One line on standard error; returns `code` for the caller to pass on. */
static int say(int code, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    fprintf(stderr, "%s: ", program);
    vfprintf(stderr, fmt, args);
    fputc('\n', stderr);
    va_end(args);
    return code;
}

/* Why something cannot be done, for those who say it elsewhere than on standard
 * error. */
struct why { char s[240]; };

static int because(struct why *why, int code, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    vsnprintf(why->s, sizeof why->s, fmt, args);
    va_end(args);
    return code;
}

static int short_usage(void)
{
    fprintf(stderr, "usage: %s [options] MODEL.gguf [PROMPT]\n"
            "       %s -h lists the options\n", program, program);
    return USAGE;
}

#define usage(...) (say(USAGE, __VA_ARGS__), short_usage())

/* The library's errors in the terms of the shell.  Its sentence about a file it
 * could not open already begins with the path. */
static int report(const char *path, const lfm2_error *err)
{
    static const int code[] = {
        [-LFM2_EARG] = USAGE, [-LFM2_EIO] = BAD_FILE,
        [-LFM2_EFORMAT] = BAD_MODEL, [-LFM2_EUNSUPPORTED] = BAD_MODEL,
        [-LFM2_ENOMEM] = NO_MEMORY, [-LFM2_EFULL] = TOO_LONG,
        [-LFM2_ECANCELLED] = INTERRUPTED, [-LFM2_ENAN] = FAILED
    };

    if (strncmp(err->msg, path, strlen(path)) == 0)
        return say(code[-err->code], "%s", err->msg);
    return say(code[-err->code], "%s: %s", path, err->msg);
}

/* Everything written must have arrived: disks fill up, readers leave. */
static int flush_output(int code)
{
    if ((fflush(stdout) == 0 && !ferror(stdout)) ||
        (code != DONE && code != INTERRUPTED))
        return code;
    return say(BAD_FILE, "standard output: %s", strerror(errno));
}

/* --------------------------------------------------------------- 2. Options
 *
 * The table alone decides what is parsed, which values are good, and what
 * --help says. */

enum { RAW_LEN = 256, UNSET = -2, MAX_CTX = 1 << 24, MAX_LIST = 16 };

struct list { int n, v[MAX_LIST]; };      /* numbers, by commas              */

struct settings {
    const char *model, *prompt, *file, *system, *ids;
    const char *logits, *export_to, *tokenizer, *ignored;
    int raw, tokenize, detokenize, inspect, null, bos, special;
    int no_mmap, quiet, verbose, help, version, bench;
    int predict, ctx, threads, batch, isa, kv, top_k, repeat_last_n;
    double temp, top_p, min_p, repeat;
    long long seed;
    struct list bench_prompt, bench_gen, bench_both, bench_depth;
    struct list bench_threads, bench_seqs;
    int reps, output;
};

/* In the order of the words of -o. */
enum { MD, JSON, JSONL, CSV };

/* The sampling settings published for LFM2.  Their repetition penalty, 1.05, is
 * not for greedy choice: see choose_sampler(). */
static const struct settings preset = {
    .predict = UNSET, .ctx = UNSET, .batch = UNSET, .temp = 0.3, .top_p = 1,
    .min_p = 0.15, .repeat = UNSET, .repeat_last_n = 64, .seed = -1,
    .bench_prompt = { 1, { 512 } }, .bench_gen = { 1, { 128 } },
    .bench_depth = { 1, { 0 } }, .bench_threads = { 1, { 0 } },
    .bench_seqs = { 1, { 1 } }, .reps = 5
};

/* Options after BENCH are for --bench alone, and go before others of the same
 * name. */
enum kind { HEADING, BENCH, FLAG, WHOLE, SEED, REAL, CHOICE, TEXT, LIST, PAIR };

struct option {
    enum kind kind;
    const char *names;            /* by spaces; those after | are not listed */
    const char *arg;              /* its name; of a CHOICE, the words by |   */
    size_t at;                    /* where in struct settings it goes        */
    double min, max;
    const char *help;             /* NULL: not listed at all                 */
};

#define AT(field)                   offsetof(struct settings, field)
#define GROUP(title)                { HEADING, "", 0, 0, 0, 0, title }
#define SWITCH(names, field, help)  { FLAG, names, 0, AT(field), 0, 0, help }
#define WORDS(names, arg, field, help) \
    { TEXT, names, arg, AT(field), 0, 0, help }
#define NUMBER(kind, names, arg, field, min, max, help) \
    { kind, names, arg, AT(field), min, max, help }

static const struct option table[] = {
    GROUP("What to do"),
    WORDS("-m --model", "FILE", model, "the model, if not the first argument"),
    WORDS("-p --prompt", "TEXT", prompt, "the prompt, if not the second one"),
    WORDS("-f --file | --prompt-file", "FILE", file,
          "the prompt from FILE (- is standard input)"),
    WORDS("-sys --system-prompt | -y", "TEXT", system, "what the model is to "
          "be"),
    SWITCH("--raw | -no-cnv", raw, "no chat template: continue plain text"),
    WORDS("--ids", "FILE", ids, "the prompt as int32 little-endian token ids"),
    WORDS("--logits", "OUT", logits, "write the logits of all prompt tokens, "
          "float32"),
    SWITCH("--tokenize", tokenize, "print the token ids of the prompt"),
    SWITCH("--detokenize", detokenize, "print the text of lines of token ids"),
    SWITCH("--null", null, "for these two: texts end with a NUL byte"),
    SWITCH("--bos", bos, "begin plain text with the BOS token"),
    SWITCH("--special", special, "markers in plain text are control tokens"),
    SWITCH("--inspect", inspect, "describe the file and the memory it needs"),
    SWITCH("--bench", bench, "measure the speed; its options are below"),
    WORDS("--export-tokenizer", "FILE", export_to, "write the vocabulary as a "
          "tokenizer.bin"),
    WORDS("--tokenizer", "FILE", tokenizer, "a vocabulary to use instead of "
          "the model's"),

    GROUP("How to choose words"),
    NUMBER(WHOLE, "-n --predict | --n-predict --tokens", "N", predict, -1,
           1 << 30, "at most N tokens (-1: to the end; --raw: 256)"),
    NUMBER(REAL, "--temp --temperature", "F", temp, 0, 100,
           "0 always takes the likeliest (0.3)"),
    NUMBER(WHOLE, "--top-k", "N", top_k, 0, 1 << 30,
           "only the N likeliest (0: off)"),
    NUMBER(REAL, "--top-p", "F", top_p, 0, 1,
           "only the likeliest that make up F (1: off)"),
    NUMBER(REAL, "--min-p", "F", min_p, 0, 1,
           "only those at least F times the likeliest (0.15)"),
    NUMBER(REAL, "--repeat-penalty | --repetition-penalty", "F", repeat, 0.01,
           100, "repeat less (1.05, or with --temp 0: 1, off)"),
    NUMBER(WHOLE, "--repeat-last-n", "N", repeat_last_n, -1, 1 << 30,
           "of the last N tokens (64; -1: all)"),
    NUMBER(SEED, "-s --seed", "N", seed, -1, 9e18,
           "the same seed, the same text (-1: random)"),

    GROUP("How to run"),
    NUMBER(WHOLE, "-c --ctx-size | --ctx", "N", ctx, 0, MAX_CTX,
           "longest text in tokens (4096; 0: the model's)"),
    NUMBER(WHOLE, "-t --threads", "N", threads, 0, 1024, "0: one per CPU"),
    NUMBER(WHOLE, "-b --batch-size", "N", batch, 1, 1 << 16,
           "tokens worked on at once (512; with experts 2048)"),
    NUMBER(CHOICE, "--isa", "auto|scalar|avx2|avxvnni|avx512|avx512vnni", isa,
           0, 0,
           "instruction set"),
    NUMBER(CHOICE, "--kv", "f16|f32", kv, 0, 0, "precision of the KV cache"),
    SWITCH("--no-mmap", no_mmap, "read the file instead of mapping it"),
    WORDS("-ngl --gpu-layers | --n-gpu-layers", "N", ignored, NULL),
    SWITCH("-q --quiet", quiet, "say nothing but errors"),
    SWITCH("-v --verbose", verbose, "settings, seed and speed; more --inspect"),
    SWITCH("-h --help", help, "this text"),
    SWITCH("--version", version, "version, compiler, weight types"),

    { BENCH, "", 0, 0, 0, 0, "With --bench, where these are lists by commas" },
    NUMBER(LIST, "-p --n-prompt | --prompt", "N,..", bench_prompt, 0, MAX_CTX,
           "read prompts of N tokens (512; 0: none)"),
    NUMBER(LIST, "-n --n-gen | --predict --n-predict --tokens", "N,..",
           bench_gen, 0, MAX_CTX, "generate N tokens (128; 0: none)"),
    NUMBER(PAIR, "-pg", "P,G", bench_both, 1, MAX_CTX,
           "read P and generate G; may be repeated"),
    NUMBER(LIST, "-npl", "N,..", bench_seqs, 1, 4096,
           "generate for N sequences at once (1)"),
    NUMBER(LIST, "-d --n-depth", "N,..", bench_depth, 0, MAX_CTX,
           "after a text of N tokens (0)"),
    NUMBER(LIST, "-t --threads", "N,..", bench_threads, 1, 1024,
           "with N threads (one per CPU)"),
    NUMBER(WHOLE, "-r --repetitions", "N", reps, 1, 100000,
           "how often, after one to warm up (5)"),
    NUMBER(CHOICE, "-o --output", "md|json|jsonl|csv", output, 0, 0,
           "as a table or as records"),
};

enum { N_OPTIONS = sizeof table / sizeof *table };

static int print_help(void)
{
    printf("usage: %s [options] MODEL.gguf [PROMPT]\n\nAnswers PROMPT and "
           "exits.  Without one, what is piped in is the prompt.\n", program);
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &table[i];
        int n = (int)strcspn(o->names, "|"), gap = 28;

        if (o->kind == HEADING || o->kind == BENCH)
            printf("\n%s\n", o->help);
        if (o->kind == HEADING || o->kind == BENCH || !o->help)
            continue;
        n -= o->names[n] == '|';
        gap -= printf("  %.*s %s", n, o->names, o->arg ? o->arg : "");
        printf(gap > 0 ? "%*s%s\n" : "\n%*s%s\n", gap > 0 ? gap : 28, "",
               o->help);
    }
    printf("\nWrite --flag VALUE or --flag=VALUE; -- ends the options.  Exit "
           "status: 0 done,\n1 failed, 2 usage, 3 file, 4 model, 5 memory, 6 "
           "prompt longer than the context,\n130 interrupted.\n");
    return DONE;
}

/* In the order of LFM2_ISA_... */
static const char *const isa_name[] = {
    "auto", "scalar", "avx2", "avxvnni", "avx512", "avx512vnni"
};

static const char *kv_name(int kv_type)
{
    return kv_type == LFM2_KV_F16 ? "f16" : "f32";
}

static int print_version(void)
{
    const uint16_t one = 1;
    const char *type;

    printf("lfm2.c      %s\n", lfm2_version());
#if defined __clang__
    printf("compiler    clang %s\n", __clang_version__);
#elif defined __GNUC__
    printf("compiler    gcc %s\n", __VERSION__);
#endif
    printf("isa        ");
    for (int i = LFM2_ISA_SCALAR; i <= LFM2_ISA_AVX512VNNI; i++)
        if (lfm2_isa_available(i))
            printf(" %s", isa_name[i]);
    printf("\nbyte order  %s-endian, %d bits\nweights    ",
           *(const unsigned char *)&one ? "little" : "big",
           (int)sizeof(void *) * 8);
    for (int i = 0; (type = lfm2_weight_type(i)); i++)
        printf(" %s", type);
    putchar('\n');
    return DONE;
}

/* How many letters must be changed, added or dropped to make `a` into the n
 * letters at b, fewer than 32. */
static int distance(const char *a, const char *b, int n)
{
    int row[32];

    for (int j = 0; j <= n; j++)
        row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            best = row[j - 1] + 1 < best ? row[j - 1] + 1 : best;
            row[j] = row[j] + 1 < best ? row[j] + 1 : best;
        }
    }
    return row[n];
}

/* The option of this name; or NULL, and the nearest name there is. */
static const struct option *find_option(const char *name, int with_bench,
                                        const char **nearest, int *n_nearest)
{
    const struct option *found = NULL;
    int least = 1 << 29;

    *nearest = "";
    *n_nearest = 0;
    for (int i = 0; i < N_OPTIONS; i++) {
        if (table[i].kind == BENCH && !with_bench)
            break;
        for (const char *s = table[i].names; *s;) {
            int n = (int)strcspn(s, " ");
            int d = *s == '-' ? distance(name, s, n) : least + 1;
            if (d == 0)
                found = &table[i];
            if (d < least)
                least = d, *nearest = s, *n_nearest = n;
            s += n + (s[n] == ' ');
        }
    }
    return found;
}

static int bad_value(const struct option *o, const char *name,
                     const char *value)
{
    if (o->at == AT(threads) && strchr(value, '.'))
        return say(USAGE, "%s %s: this is how many threads; did you mean "
                   "--temp %s?", name, value, value);
    if (o->kind == CHOICE)
        return say(USAGE, "%s %s: expected %s", name, value, o->arg);
    if (o->kind == LIST)
        return say(USAGE, "%s %s: expected at most %d whole numbers from %.0f "
                   "to %.0f, by commas", name, value, MAX_LIST, o->min, o->max);
    if (o->kind == PAIR)
        return say(USAGE, "%s %s: expected two whole numbers from %.0f to %.0f "
                   "by a comma, and at most %d such pairs", name, value, o->min,
                   o->max, MAX_LIST / 2);
    return say(USAGE, "%s %s: expected a %snumber from %.10g to %.19g", name,
               value, o->kind == REAL ? "" : "whole ", o->min, o->max);
}

/* Which of the words `value` is, or -1; they are in the order of lfm2.h. */
static int find_word(const char *words, const char *value)
{
    const size_t n = strlen(value);

    for (int i = 0; *words; i++) {
        size_t len = strcspn(words, "|");
        if (len == n && memcmp(words, value, n) == 0)
            return i;
        words += len + (words[len] == '|');
    }
    return -1;
}

/* Append whole numbers to a list; -1 if they are no such list. */
static int parse_list(struct list *to, const struct option *o,
                      const char *value)
{
    char *end;

    for (;; value = end + 1) {
        errno = 0;
        const long x = strtol(value, &end, 10);
        if (end == value || (*end && *end != ',') || errno || x < o->min ||
            x > o->max || to->n == MAX_LIST)
            return -1;
        to->v[to->n++] = (int)x;
        if (!*end)
            return 0;
    }
}

/* A list replaces the one before; a pair goes behind those before. */
static int set_list(struct list *to, const struct option *o, const char *name,
                    const char *value)
{
    const int had = o->kind == PAIR ? to->n : 0;

    to->n = had;
    if (parse_list(to, o, value) == 0 &&
        (o->kind == LIST || to->n == had + 2))
        return DONE;
    return bad_value(o, name, value);
}

static int set_option(struct settings *to, const struct option *o,
                      const char *name, const char *value)
{
    void *slot = (char *)to + o->at;
    long long whole = 0;
    double real;
    char *end;

    if (o->kind == TEXT) {
        *(const char **)slot = value;
        return DONE;
    }
    if (o->kind == CHOICE) {
        *(int *)slot = find_word(o->arg, value);
        return *(int *)slot < 0 ? bad_value(o, name, value) : DONE;
    }
    if (o->kind == LIST || o->kind == PAIR)
        return set_list(slot, o, name, value);
    errno = 0;
    if (o->kind == REAL)
        real = strtod(value, &end);
    else
        real = (double)(whole = strtoll(value, &end, 10));
    if (end == value || *end || errno || !(real >= o->min && real <= o->max))
        return bad_value(o, name, value);
    if (o->kind == REAL)
        *(double *)slot = real;
    else if (o->kind == SEED)
        *(long long *)slot = whole;
    else
        *(int *)slot = (int)whole;
    return DONE;
}

/* Take the option at argv[*i], and its value, which may be the next word. */
static int take_option(struct settings *to, char **argv, int *i)
{
    const char *arg = argv[*i], *equals = strchr(arg, '='), *value, *nearest;
    const struct option *o;
    int n_nearest;
    char name[40];

    snprintf(name, sizeof name, "%.*s", (int)strcspn(arg, "="), arg);
    o = find_option(name, to->bench, &nearest, &n_nearest);
    if (!o && strcmp(name, "-i") == 0)
        return usage("unknown option -i: -p gives a prompt, and an interactive "
                     "mode there is not");
    if (!o && find_option(name, 1, &nearest, &n_nearest))
        return usage("%s is for --bench", name);
    if (!o)
        return usage("unknown option %s; the nearest is %.*s", name, n_nearest,
                     nearest);
    if (o->kind == FLAG && equals)
        return usage("%s takes no value, but is given %s", name, equals + 1);
    if (o->kind == FLAG) {
        *(int *)((char *)to + o->at) = 1;
        return DONE;
    }
    value = equals ? equals + 1 : argv[++*i];
    if (!value)
        return usage("%s needs a value, %s", name, o->arg);
    return set_option(to, o, name, value);
}

/* --bench makes up its text, and a context that its tests just fit in. */
static int check_bench(const struct settings *s)
{
    if (s->prompt || s->file || s->ids || s->system || s->raw)
        return usage("--bench measures with tokens of its own and takes no "
                     "prompt");
    if (s->ctx != UNSET)
        return usage("-c: --bench makes the context as long as the tests "
                     "need");
    return DONE;
}

static int check_settings(const struct settings *s)
{
    if (!s->model && !(s->tokenizer && (s->tokenize || s->detokenize ||
                                        s->export_to)))
        return usage("no model given");
    if (s->tokenize + s->detokenize + s->inspect + s->bench + !!s->logits +
        !!s->export_to > 1)
        return usage("more than one of --tokenize, --detokenize, --inspect, "
                     "--bench, --logits and --export-tokenizer");
    if (!!s->prompt + !!s->file + !!s->ids > 1)
        return usage("more than one prompt: PROMPT or -p, -f, --ids");
    if (s->system && (s->raw || s->ids || s->tokenize))
        return usage("-sys is for the chat template, which --raw, --ids and "
                     "--tokenize do without");
    if (s->ids && (s->tokenize || s->detokenize))
        return usage("--ids is for generating text and for --logits");
    if (s->ignored && !s->quiet)
        say(DONE, "-ngl is ignored: everything runs on the CPU");
    return s->bench ? check_bench(s) : DONE;
}

/* Before all other options, as it changes what they mean. */
static int asks_for_bench(char **argv)
{
    for (int i = 1; argv[i] && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--bench") == 0)
            return 1;
    return 0;
}

static int parse(struct settings *to, char **argv)
{
    const char *word[2] = { NULL, NULL };
    int n_words = 0, options = 1, code = DONE;

    to->bench = asks_for_bench(argv);
    for (int i = 1; code == DONE && argv[i]; i++)
        if (options && strcmp(argv[i], "--") == 0)
            options = 0;
        else if (options && argv[i][0] == '-' && argv[i][1])
            code = take_option(to, argv, &i);
        else if (n_words < 2)
            word[n_words++] = argv[i];
        else
            code = usage("unexpected argument %s; a prompt of several words "
                         "needs quotes", argv[i]);
    if (code != DONE || to->help || to->version)
        return code;
    if (!to->model && n_words > 0) {
        to->model = word[0];
        word[0] = word[1];
        n_words--;
    }
    if (n_words > 1 || (n_words > 0 && to->prompt))
        return usage("unexpected argument %s: there is a prompt already",
                     word[n_words - 1]);
    if (n_words > 0)
        to->prompt = word[0];
    return check_settings(to);
}

/* ------------------------------------------------- 3. Reading what is given */

/* Text that grows.  s[n] is NUL, or s is NULL; once there is no memory for it,
 * `failed` stays and nothing more is added. */
struct text { char *s; size_t n, cap; int failed; };

struct ids { int32_t *id; int n; };

enum { MAX_TEXT = 1 << 30 };

/* Make room for `more` bytes and the NUL. */
static int reserve(struct text *t, size_t more)
{
    size_t cap = t->cap ? t->cap : 64;
    char *s;

    if (t->failed || more >= MAX_TEXT - t->n) {
        t->failed = 1;
        return -1;
    }
    while (cap <= t->n + more)
        cap *= 2;
    s = cap > t->cap ? realloc(t->s, cap) : t->s;
    if (!s) {
        t->failed = 1;
        return -1;
    }
    t->s = s;
    t->cap = cap;
    t->s[t->n] = '\0';
    return 0;
}

static void add(struct text *t, const char *s, size_t n)
{
    if (reserve(t, n) != 0)
        return;
    if (n > 0)
        memcpy(t->s + t->n, s, n);
    t->n += n;
    t->s[t->n] = '\0';
}

static void add_string(struct text *t, const char *s)
{
    add(t, s, strlen(s));
}

/* Short things only: up to 255 bytes. */
static void add_format(struct text *t, const char *fmt, ...)
{
    char s[256];
    va_list args;
    int n;

    va_start(args, fmt);
    n = vsnprintf(s, sizeof s, fmt, args);
    va_end(args);
    if (n > 0)
        add(t, s, n < (int)sizeof s ? (size_t)n : sizeof s - 1);
}

static int read_stream(FILE *f, const char *name, struct text *out)
{
    for (size_t got = 1; got > 0; out->n += got) {
        if (reserve(out, 1 << 14) != 0)
            return say(NO_MEMORY, "%s: too long to be read", name);
        got = fread(out->s + out->n, 1, out->cap - out->n - 1, f);
        if (ferror(f))
            return say(BAD_FILE, "%s: %s", name, strerror(errno));
    }
    out->s[out->n] = '\0';
    return DONE;
}

/* The bytes of a file, or of standard input for "-".  The caller frees out->s,
 * after a failure too. */
static int read_file(const char *path, struct text *out)
{
    const int piped = strcmp(path, "-") == 0;
    FILE *f = piped ? stdin : fopen(path, "rb");
    int code;

    if (!f)
        return say(BAD_FILE, "%s: %s", path, strerror(errno));
    code = read_stream(f, piped ? "standard input" : path, out);
    if (!piped)
        fclose(f);
    return code;
}

/* The text to work on: given as an argument, in a file, or piped in. */
static int read_text(const struct settings *s, struct text *out)
{
    if (!s->prompt && !s->file && isatty(STDIN_FILENO))
        return usage("no prompt given, and there is no interactive chat; try "
                     "%s MODEL.gguf \"a question\"", program);
    if (!s->prompt)
        return read_file(s->file ? s->file : "-", out);
    add_string(out, s->prompt);
    return out->failed ? say(NO_MEMORY, "no memory for the prompt") : DONE;
}

static int alloc_ids(struct ids *out, size_t n)
{
    out->id = n < SIZE_MAX / 4 ? malloc(n * sizeof *out->id) : NULL;
    return out->id ? DONE : say(NO_MEMORY, "no memory for %zu tokens", n);
}

static int read_ids(const char *path, struct ids *out)
{
    struct text t = { 0 };
    int code = read_file(path, &t);

    if (code == DONE && t.n % 4 != 0)
        code = say(BAD_FILE, "%s: %zu bytes, expected a multiple of 4", path,
                   t.n);
    if (code == DONE)
        code = alloc_ids(out, t.n / 4 + 1);
    for (size_t i = 0; code == DONE && i < t.n; i += 4) {
        const unsigned char *p = (const unsigned char *)t.s + i;
        uint32_t id = p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 |
                      (uint32_t)p[3] << 24;
        out->id[out->n++] = id > INT32_MAX ? -1 : (int32_t)id;
    }
    free(t.s);
    return code;
}

/* ------------------------------------------------------ 4. Tokens in and out
 *
 * --tokenize, --detokenize and --export-tokenizer need a vocabulary only. */

static int open_words(const struct settings *s, lfm2_tokenizer **out)
{
    const char *path = s->tokenizer ? s->tokenizer : s->model;
    lfm2_error err;

    return lfm2_tokenizer_open(out, path, &err) ? report(path, &err) : DONE;
}

static int encode(const struct settings *s, const lfm2_tokenizer *words,
                  const char *text, size_t n, int bos, struct ids *out)
{
    const int flags = (bos ? LFM2_ENCODE_BOS : 0) |
                      (s->special ? LFM2_ENCODE_SPECIAL : 0);
    int code = alloc_ids(out, n + 1);

    if (code != DONE)
        return code;
    out->n = lfm2_encode(words, text, n, flags, out->id, (int)n + 1);
    return out->n >= 0 ? DONE :
           say(NO_MEMORY, "no memory for %zu bytes of text", n);
}

/* A line of ids for the whole text, or for each of its NUL-ended records. */
static int tokenize(const struct settings *s, const lfm2_tokenizer *words,
                    const struct text *t)
{
    for (size_t at = 0, n; at < t->n || (at == 0 && !s->null); at += n + 1) {
        struct ids ids = { NULL, 0 };
        int code;

        n = s->null ? strlen(t->s + at) : t->n;
        code = encode(s, words, t->s + at, n, s->bos, &ids);
        for (int i = 0; code == DONE && i < ids.n; i++)
            printf("%s%ld", i ? " " : "", (long)ids.id[i]);
        free(ids.id);
        if (code != DONE)
            return code;
        putchar('\n');
    }
    return DONE;
}

/* The text of every line of ids; the last may lack its newline. */
static int detokenize(const struct settings *s, const lfm2_tokenizer *words,
                      const struct text *t)
{
    const char *p = t->s, *const stop = t->s + t->n;
    int line = 1, len;
    char *end;

    while (p < stop) {
        p += strspn(p, " \t\r");
        if (p == stop || *p == '\n') {
            putchar(s->null ? '\0' : '\n');
            p++;
            line++;
            continue;
        }
        errno = 0;
        const long id = strtol(p, &end, 10);
        if (end == p || !strchr(" \t\r\n", *end) || errno || id < 0 ||
            id >= lfm2_n_vocab(words))
            return say(FAILED, "line %d: \"%.*s\", expected a token id from 0 "
                       "to %d", line, (int)strcspn(p, " \t\r\n"), p,
                       lfm2_n_vocab(words) - 1);
        const char *bytes = lfm2_token_bytes(words, (int32_t)id, s->special,
                                             &len);
        fwrite(bytes, 1, (size_t)len, stdout);
        p = end;
        if (p == stop)
            putchar(s->null ? '\0' : '\n');
    }
    return DONE;
}

/* A new file, or standard output for "-"; NULL after saying why not. */
static FILE *create_file(const char *path)
{
    FILE *f = strcmp(path, "-") == 0 ? stdout : fopen(path, "wb");

    if (!f)
        say(BAD_FILE, "%s: %s", path, strerror(errno));
    return f;
}

static int finish_file(FILE *f, const char *path, int code)
{
    int failed;

    if (f == stdout)
        return code;
    failed = ferror(f);
    failed |= fclose(f) != 0;
    return !failed || code != DONE ? code :
           say(BAD_FILE, "%s: %s", path, strerror(errno));
}

static int export_words(const struct settings *s, const lfm2_tokenizer *words)
{
    const size_t n = lfm2_tokenizer_export(words, NULL, 0);
    void *buf = malloc(n);
    FILE *f;

    if (!buf)
        return say(NO_MEMORY, "no memory for %zu bytes", n);
    f = create_file(s->export_to);
    if (f)
        fwrite(buf, 1, lfm2_tokenizer_export(words, buf, n), f);
    free(buf);
    return f ? finish_file(f, s->export_to, DONE) : BAD_FILE;
}

static int work_on_words(const struct settings *s)
{
    struct text t = { 0 };
    lfm2_tokenizer *words;
    int code = open_words(s, &words);

    if (code != DONE)
        return code;
    if (s->export_to)
        code = export_words(s, words);
    else
        code = read_text(s, &t);
    if (code == DONE && s->tokenize)
        code = tokenize(s, words, &t);
    if (code == DONE && s->detokenize)
        code = detokenize(s, words, &t);
    free(t.s);
    lfm2_tokenizer_close(words);
    return code;
}

/* -------------------------------------------------------------- 5. --inspect
 *
 * What is in the file, in the terms its makers use, and what it will take to
 * run it. */

struct amount { char s[32]; };

/* "23.84 B" parameters or, with unit "B", "13.51 GB". */
static struct amount amount(double n, const char *unit)
{
    const char *letter = n >= 1e9 ? *unit ? "G" : "B" :
                         n >= 1e6 ? "M" : n >= 1e3 ? "K" : "";
    const double scale = n >= 1e9 ? 1e9 : n >= 1e6 ? 1e6 : n >= 1e3 ? 1e3 : 1;
    struct amount out;

    snprintf(out.s, sizeof out.s, "%.*f %s%s", scale > 1 ? 2 : 0, n / scale,
             letter, unit);
    return out;
}

static void print_clean(const char *s, size_t n)
{
    for (size_t i = 0; i < n && i < 200; i++)
        putchar(s[i] >= ' ' && s[i] <= '~' ? s[i] : '?');
}

static void print_string(const lfm2_model *m, const char *label,
                         const char *key)
{
    size_t n = 0;
    const char *s = lfm2_model_string(m, key, &n);

    printf("%s", label);
    print_clean(s ? s : "(none)", s ? n : 6);
    putchar('\n');
}

static void inspect_config(const lfm2_model *m)
{
    const lfm2_config *c = lfm2_model_config(m);
    int n_attn = 0;

    for (int il = 0; il < c->n_layer; il++)
        n_attn += c->is_attn[il];
    print_string(m, "architecture  ", "general.architecture");
    print_string(m, "name          ", "general.name");
    printf("layers        %d: %d short convolutions (c), %d attention (A)",
           c->n_layer, c->n_layer - n_attn, n_attn);
    printf("%s\nlayer map     ", c->n_expert ? "; * with experts" : "");
    for (int il = 0; il < c->n_layer; il++)
        printf("%c%s", c->is_attn[il] ? 'A' : 'c',
               c->n_expert && il >= c->n_layer_dense ? "*" : "");
    printf("\nsizes         n_embd %d, n_ff %d, n_vocab %d, l_cache %d\n"
           "attention     n_head %d, n_head_kv %d, head_dim %d, "
           "rope_freq_base %g\n", c->n_embd, c->n_ff, c->n_vocab, c->l_cache,
           c->n_head, c->n_head_kv, c->head_dim, (double)c->rope_freq_base);
    if (c->n_expert)
        printf("experts       %d, %d used per token, n_ff %d, after %d dense "
               "layers\n", c->n_expert, c->n_expert_used, c->n_ff_expert,
               c->n_layer_dense);
    printf("trained for   %d tokens\nnorm eps      %g\n", c->n_ctx_train,
           (double)c->norm_rms_eps);
}

static double count_elements(const lfm2_tensor_info *t)
{
    double n = 1;

    for (int d = 0; d < t->n_dims; d++)
        n *= (double)t->dims[d];
    return n;
}

static void inspect_weights(const lfm2_model *m)
{
    struct { const char *type; int n; double bytes; } sum[32] = { { 0, 0, 0 } };
    double bytes = 0, elements = 0;
    uint64_t total, active;
    lfm2_tensor_info t;

    for (int i = 0; lfm2_model_tensor(m, i, &t) == LFM2_OK; i++) {
        int k = 0;
        while (k < 31 && sum[k].type && strcmp(sum[k].type, t.type) != 0)
            k++;
        sum[k].type = t.type;
        sum[k].n++;
        sum[k].bytes += (double)t.n_bytes;
        bytes += (double)t.n_bytes;
        elements += count_elements(&t);
    }
    lfm2_model_params(m, &total, &active);
    printf("size          %s parameters, %s active\n",
           amount((double)total, "").s, amount((double)active, "").s);
    printf("weights       %s, %.2f bits per weight\n", amount(bytes, "B").s,
           elements > 0 ? bytes * 8 / elements : 0);
    for (int k = 0; k < 32 && sum[k].type; k++)
        printf("  %-11s %s in %d tensors\n", sum[k].type,
               amount(sum[k].bytes, "B").s, sum[k].n);
}

/* What the command line asks of a context. */
static lfm2_params choose_params(const struct settings *s, const lfm2_model *m)
{
    lfm2_params p = lfm2_default_params(m);

    if (s->ctx != UNSET)
        p.n_ctx = s->ctx ? s->ctx : lfm2_model_config(m)->n_ctx_train;
    if (s->batch != UNSET)
        p.n_batch = s->batch;
    p.n_threads = s->threads;
    p.isa = s->isa;
    p.kv_type = s->kv;
    return p;
}

/* Of the KV cache, for one token. */
static double kv_bytes(const lfm2_config *c, int kv_type)
{
    double sum = 0;

    for (int il = 0; il < c->n_layer; il++)
        if (c->is_attn[il])
            sum += 2.0 * c->n_head_kv * c->head_dim *
                   (kv_type == LFM2_KV_F16 ? 2 : 4);
    return sum;
}

static void inspect_memory(const struct settings *s, const lfm2_model *m)
{
    const lfm2_config *c = lfm2_model_config(m);
    lfm2_params p = choose_params(s, m);
    const double kv = kv_bytes(c, p.kv_type);
    double conv = 0;

    p.isa = LFM2_ISA_AUTO;                /* it takes no more or less memory */
    for (int il = 0; il < c->n_layer; il++)
        if (!c->is_attn[il])
            conv += 4.0 * (c->l_cache - 1) * c->n_embd;
    printf("memory        for a context of %d tokens, KV in %s\n"
           "  KV cache    %s, %s a token\n  conv state  %s\n"
           "  in all      %s beside the file\n", p.n_ctx,
           kv_name(p.kv_type), amount(kv * p.n_ctx, "B").s,
           amount(kv, "B").s, amount(conv, "B").s,
           amount((double)lfm2_context_size(m, &p), "B").s);
}

static void print_token(const lfm2_tokenizer *words, int32_t id)
{
    int len;
    const char *s = lfm2_token_bytes(words, id, 1, &len);

    printf(" %ld ", (long)id);
    print_clean(s, (size_t)len);
}

static void inspect_words(const struct settings *s, const lfm2_model *m)
{
    const char *path = s->tokenizer ? s->tokenizer : s->model;
    lfm2_tokenizer *words;
    lfm2_error err;
    size_t n;

    if (lfm2_tokenizer_open(&words, path, &err) != LFM2_OK) {
        printf("vocabulary    none: %s\n", err.msg);
        return;
    }
    printf("vocabulary    %d tokens, chat template: %s\n", lfm2_n_vocab(words),
           lfm2_model_string(m, "tokenizer.chat_template", &n) ? "yes" : "no");
    printf("begins with  ");
    if (lfm2_bos(words) >= 0 && lfm2_add_bos(words))
        print_token(words, lfm2_bos(words));
    printf("\nends with    ");
    for (int32_t id = 0; id < lfm2_n_vocab(words); id++)
        if (lfm2_is_eog(words, id))
            print_token(words, id);
    putchar('\n');
    lfm2_tokenizer_close(words);
}

/* With -v, every key and every tensor of the file. */
static void inspect_all(const lfm2_model *m)
{
    lfm2_tensor_info t;
    const char *key;
    char value[128];

    printf("\nmetadata\n");
    for (int i = 0; (key = lfm2_model_key(m, i, value, sizeof value)); i++)
        printf("  %s = %s\n", key, value);
    printf("\ntensors\n");
    for (int i = 0; lfm2_model_tensor(m, i, &t) == LFM2_OK; i++) {
        printf("  %-34s %-7s", t.name, t.type);
        for (int d = 0; d < t.n_dims; d++)
            printf("%s%llu", d ? " x " : " ", (unsigned long long)t.dims[d]);
        putchar('\n');
    }
}

static void inspect(const struct settings *s, const lfm2_model *m)
{
    struct stat st;

    printf("file          %s, %s\n", s->model, stat(s->model, &st) == 0 ?
           amount((double)st.st_size, "B").s : "?");
    inspect_config(m);
    inspect_weights(m);
    inspect_memory(s, m);
    inspect_words(s, m);
    for (int i = 0; lfm2_model_warning(m, i); i++)
        printf("warning       %s\n", lfm2_model_warning(m, i));
    if (s->verbose)
        inspect_all(m);
}

/* ------------------------------------------- 6. The prompt and its answer */

struct session {
    const struct settings *s;
    lfm2_model *model;
    lfm2_tokenizer *words;                /* NULL: ids in, logits out        */
    lfm2_context *ctx;
    lfm2_params par;
    int raw;                              /* no chat template                */
    struct ids ids;                       /* the prompt, then the answer     */
};

static int open_model(struct session *e)
{
    const struct settings *s = e->s;
    lfm2_error err;
    size_t n;

    if (lfm2_model_open(&e->model, s->model, s->no_mmap ? LFM2_LOAD_READ :
                        LFM2_LOAD_MAP, &err) != LFM2_OK)
        return report(s->model, &err);
    e->par = choose_params(s, e->model);
    e->raw = s->raw || s->ids;
    if (s->inspect || e->raw ||
        lfm2_model_string(e->model, "tokenizer.chat_template", &n))
        return DONE;
    if (s->system)
        return say(USAGE, "%s: no chat template, so -sys cannot be used",
                   s->model);
    if (!s->quiet && !s->logits)
        say(DONE, "%s: no chat template, the prompt is continued as plain "
            "text", s->model);
    e->raw = 1;
    return DONE;
}

/* A model may have spare rows behind its own vocabulary; a vocabulary from
 * elsewhere that is shorter is another model's. */
static int open_model_words(struct session *e)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;
    int code, n;

    if (e->s->ids && e->s->logits)
        return DONE;
    code = open_words(e->s, &e->words);
    if (code != DONE)
        return code;
    n = lfm2_n_vocab(e->words);
    if (n > n_vocab || (n < n_vocab && e->s->tokenizer))
        return say(BAD_MODEL, "%s: a vocabulary of %d tokens, expected the %d "
                   "of the model", e->s->tokenizer ? e->s->tokenizer :
                   e->s->model, n, n_vocab);
    return DONE;
}

/* The prompt as one turn of a conversation. */
static int encode_chat(struct session *e, const struct text *t)
{
    const lfm2_message turn[2] = {
        { "system", e->s->system ? e->s->system : "" }, { "user", t->s }
    };
    const lfm2_message *first = e->s->system ? turn : turn + 1;
    const int n_turns = e->s->system ? 2 : 1;
    int n;

    if (strlen(t->s) != t->n)
        return say(USAGE, "the prompt has a NUL byte after %zu bytes, expected "
                   "text", strlen(t->s));
    n = lfm2_chat(e->words, first, n_turns, 1, NULL, 0);
    if (n < 0)
        return say(n == LFM2_ENOMEM ? NO_MEMORY : BAD_MODEL, "%s: the chat "
                   "format needs <|im_start|> and <|im_end|>; try --raw",
                   e->s->model);
    if (alloc_ids(&e->ids, (size_t)n) != DONE)
        return NO_MEMORY;
    e->ids.n = lfm2_chat(e->words, first, n_turns, 1, e->ids.id, n);
    return DONE;
}

/* One newline at the end of a file or pipe is not part of the prompt. */
static int read_prompt(struct session *e)
{
    struct text t = { 0 };
    int code;

    if (e->s->ids)
        return read_ids(e->s->ids, &e->ids);
    code = read_text(e->s, &t);
    if (code == DONE && !e->s->prompt && t.n > 0 && t.s[t.n - 1] == '\n')
        t.s[--t.n] = '\0';
    if (code == DONE && !e->s->prompt && !e->s->file && t.n == 0)
        code = usage("no prompt: standard input is empty");
    if (code == DONE && !e->raw)
        code = encode_chat(e, &t);
    else if (code == DONE)
        code = encode(e->s, e->words, t.s, t.n, e->s->bos ||
                      lfm2_add_bos(e->words), &e->ids);
    free(t.s);
    return code;
}

/* Make room for the longest answer, too. */
static int check_prompt(struct session *e)
{
    const int n_ctx = e->par.n_ctx;
    int32_t *id;

    if (e->ids.n == 0)
        return say(USAGE, "the prompt has no tokens");
    if (e->ids.n > n_ctx)
        return say(TOO_LONG, "the prompt has %d tokens, the context %d; -c N "
                   "makes it longer", e->ids.n, n_ctx);
    id = realloc(e->ids.id, ((size_t)n_ctx + 1) * sizeof *id);
    if (!id)
        return say(NO_MEMORY, "no memory for %d tokens", n_ctx);
    e->ids.id = id;
    return DONE;
}

/* Append n tokens; the logits of the last n_logits will be there. */
static int forward(struct session *e, const int32_t *tokens, int n,
                   int n_logits)
{
    const lfm2_span span = { 0, tokens, n, n_logits };
    lfm2_error err;

    if (lfm2_forward(e->ctx, &span, 1, &err) == LFM2_OK)
        return DONE;
    if (err.code == LFM2_ECANCELLED)
        return INTERRUPTED;
    return report(e->s->ids ? e->s->ids : e->s->model, &err);
}

/* In chunks, so that the memory for logits does not grow with the prompt. */
enum { LOGITS_CHUNK = 64 };

static int write_logits(struct session *e)
{
    const size_t n_vocab = (size_t)lfm2_model_config(e->model)->n_vocab;
    FILE *f = create_file(e->s->logits);
    int code = DONE;

    for (int at = 0, n; f && code == DONE && at < e->ids.n; at += n) {
        n = e->ids.n - at < LOGITS_CHUNK ? e->ids.n - at : LOGITS_CHUNK;
        code = forward(e, e->ids.id + at, n, n);
        const float *l = code == DONE ? lfm2_logits(e->ctx, 0, 0) : NULL;
        for (size_t i = 0; l && i < (size_t)n * n_vocab; i++) {
            uint32_t u;
            memcpy(&u, l + i, sizeof u);
            const unsigned char b[4] = {
                u & 255, u >> 8 & 255, u >> 16 & 255, u >> 24
            };
            fwrite(b, 1, 4, f);
        }
    }
    return f ? finish_file(f, e->s->logits, code) : BAD_FILE;
}

struct output { lfm2_utf8 utf8; int terminal; };

/* Drop what could steer a terminal: control characters, those of C1 too. */
static size_t drop_controls(char *s, size_t n)
{
    size_t kept = 0;

    for (size_t i = 0; i < n; i++) {
        const unsigned char c = (unsigned char)s[i];
        if (c == 0xc2 && i + 1 < n && (unsigned char)s[i + 1] < 0xa0)
            i++;
        else if ((c >= ' ' && c != 127) || c == '\n' || c == '\t')
            s[kept++] = s[i];
    }
    return kept;
}

/* Only whole characters come out; len 0 lets go of an unfinished one. */
static int put_text(struct output *o, const char *bytes, size_t len)
{
    char out[256 + 3];
    size_t n;

    do {
        const size_t part = len < 256 ? len : 256;
        n = lfm2_utf8_push(&o->utf8, bytes, part, out);
        if (o->terminal)
            n = drop_controls(out, n);
        fwrite(out, 1, n, stdout);
        bytes += part;
        len -= part;
    } while (len > 0);
    return flush_output(DONE);
}

static double seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static lfm2_sampler choose_sampler(const struct settings *s)
{
    lfm2_sampler out = {
        .temperature = (float)s->temp, .top_k = s->top_k,
        .top_p = (float)s->top_p, .min_p = (float)s->min_p,
        .repeat_penalty = s->repeat != UNSET ? (float)s->repeat :
                          s->temp > 0 ? 1.05f : 1.0f, .rng = (uint64_t)s->seed,
        .repeat_last_n = s->repeat_last_n < 0 ? 1 << 30 : s->repeat_last_n
    };
    struct timespec t;

    if (s->seed < 0) {
        clock_gettime(CLOCK_REALTIME, &t);
        out.rng = ((uint64_t)t.tv_sec * 1000000007u ^ (uint64_t)t.tv_nsec ^
                   (uint64_t)getpid() << 20) & UINT32_MAX;
    }
    return out;
}

/* Ctrl-C stops the work; the next one has its usual effect. */
static lfm2_context *volatile running;
static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number)
{
    (void)signal_number;
    interrupted = 1;
    if (running)
        lfm2_cancel(running);
}

static void catch_interrupt(void)
{
    struct sigaction action = { .sa_handler = on_interrupt };

    action.sa_flags = (int)SA_RESETHAND | SA_RESTART;
    sigaction(SIGINT, &action, NULL);
}

/* Sample and append until the turn ends; *n counts the tokens. */
static int generate(struct session *e, lfm2_sampler *sampler,
                    struct output *out, int *n)
{
    struct ids *ids = &e->ids;
    int limit = e->s->predict, len, code = DONE;

    if (limit == UNSET)
        limit = e->raw ? RAW_LEN : -1;
    while (code == DONE && *n != limit) {
        int32_t id = lfm2_sample(e->ctx, sampler, lfm2_logits(e->ctx, 0, 0),
                                 ids->id, ids->n);
        if (id < 0)
            return say(FAILED, "%s: logits that are not finite", e->s->model);
        if (lfm2_is_eog(e->words, id))
            return DONE;
        const char *bytes = lfm2_token_bytes(e->words, id, 0, &len);
        if (len > 0)
            code = put_text(out, bytes, (size_t)len);
        if (++*n == limit || code != DONE)
            continue;
        if (ids->n == e->par.n_ctx)
            return say(DONE, "stopped: the context of %d tokens is full",
                       e->par.n_ctx);
        ids->id[ids->n++] = id;
        code = forward(e, &id, 1, 1);
    }
    return code;
}

static int answer(struct session *e)
{
    struct output out = { .terminal = isatty(STDOUT_FILENO) };
    lfm2_sampler sampler = choose_sampler(e->s);
    const int n_prompt = e->ids.n;
    double start, read, end;
    int n = 0, code;

    if (e->s->verbose)
        say(DONE, "seed %llu, temperature %g, top-k %d, top-p %g, min-p %g, "
            "repeat penalty %g over %d", (unsigned long long)sampler.rng,
            (double)sampler.temperature, sampler.top_k, (double)sampler.top_p,
            (double)sampler.min_p, (double)sampler.repeat_penalty,
            sampler.repeat_last_n);
    running = e->ctx;
    catch_interrupt();
    start = seconds();
    code = forward(e, e->ids.id, n_prompt, 1);
    read = seconds();
    if (code == DONE)
        code = generate(e, &sampler, &out, &n);
    end = seconds();
    signal(SIGINT, SIG_DFL);
    if (code == DONE || (n > 0 && code != BAD_FILE)) {
        put_text(&out, "", 0);
        putchar('\n');
        code = flush_output(code);
    }
    if (e->s->verbose || (isatty(STDERR_FILENO) && !e->s->quiet))
        say(DONE, "prompt %d tokens, %.1f tok/s; generated %d tokens, %.1f "
            "tok/s", n_prompt, n_prompt / (read - start + 1e-9), n,
            n / (end - read + 1e-9));
    return code;
}

static void print_settings(struct session *e)
{
    const lfm2_params p = lfm2_context_params(e->ctx);

    say(DONE, "context %d, batch %d, threads %d, isa %s, kv %s; %s beside the "
        "file", p.n_ctx, p.n_batch, p.n_threads, isa_name[p.isa],
        kv_name(p.kv_type),
        amount((double)lfm2_context_size(e->model, &p), "B").s);
}

static int open_context(struct session *e)
{
    const int n_train = lfm2_model_config(e->model)->n_ctx_train;
    lfm2_error err;

    if (e->s->logits)
        e->par.n_logits = LOGITS_CHUNK;
    if (lfm2_context_open(&e->ctx, e->model, &e->par, &err) != LFM2_OK)
        return report(e->s->model, &err);
    if (e->s->verbose)
        print_settings(e);
    if (e->par.n_ctx > n_train && !e->s->quiet)
        say(DONE, "%s: a context of %d tokens, but the model was trained for "
            "%d", e->s->model, e->par.n_ctx, n_train);
    return DONE;
}

static int work_on_model(const struct settings *s)
{
    struct session e = { .s = s };
    int code = open_model(&e);

    if (code == DONE && s->inspect)
        inspect(s, e.model);
    if (code == DONE && !s->inspect) {
        for (int i = 0; !s->quiet && lfm2_model_warning(e.model, i); i++)
            say(DONE, "%s: %s", s->model, lfm2_model_warning(e.model, i));
        code = open_model_words(&e);
        if (code == DONE)
            code = read_prompt(&e);
        if (code == DONE)
            code = check_prompt(&e);
        if (code == DONE)
            code = open_context(&e);
        if (code == DONE)
            code = s->logits ? write_logits(&e) : answer(&e);
    }
    free(e.ids.id);
    lfm2_context_close(e.ctx);
    lfm2_tokenizer_close(e.words);
    lfm2_model_close(e.model);
    return code;
}

/* --------------------------------------------------------------- 7. --bench
 *
 * The tests, names and table of llama-bench, and beside every figure how much
 * of the machine it makes use of.  Generating reads all weights for each token,
 * so memory sets its limit; reading a prompt multiplies each weight with many
 * tokens, so arithmetic does.  Both limits are measured in the same run. */

enum { START_TOKENS = 8 };                /* of the prompt that starts it    */

struct test { int n_prompt, n_gen, n_seq, depth; };

/* What a token costs, by the tensors of the file. */
struct cost {
    double bytes, params;                 /* of the whole file               */
    double shared, experts;               /* bytes: read for every token, and
                                             of all experts together         */
    double macs, head;                    /* multiply-adds; for logits       */
    double kv;                            /* bytes of cache a token of text  */
};

struct limits { double read, dot; };      /* bytes, multiply-adds a second   */

struct result {
    struct test test;
    struct limits best;
    int n_threads;
    double mean_ns, dev_ns, mean_ts, dev_ts;
    double read, macs;                    /* a second; 0: not to be said     */
    double rss_peak, rss_anon;
    char when[24];
};

struct bench {
    const struct settings *s;
    lfm2_model *model;
    lfm2_context *ctx;
    lfm2_params par;                      /* of ctx, in force                */
    struct cost cost;
    struct limits best;                   /* of its number of threads        */
    char type[96];                        /* "lfm2 1.2B Q4_0"                */
    double load_s, context_s, first_s;    /* first: all, from the start      */
    double rss_anon;                      /* the most there ever was         */
    double sample_s, token_s;             /* choosing a token; having one    */
    int n_cpus;
    int32_t *token;                       /* as many as the longest test     */
    lfm2_span *span;                      /* [sequences]                     */
    double *ns, *ts;                      /* [s->reps] of the last test      */
    struct test *test;                    /* [n_tests] at each depth         */
    struct result *result;                /* [n_results] so far              */
    int n_tests, n_results, n_tokens;
};

/* ---- the work */

static int bench_failed(const struct bench *b, const lfm2_error *err)
{
    return err->code == LFM2_ECANCELLED ? INTERRUPTED :
           report(b->s->model, err);
}

/* Append the tokens from `from` to `to` to a sequence. */
static int feed(struct bench *b, int seq, int from, int to, int n_logits)
{
    const lfm2_span span = { seq, b->token + from, to - from, n_logits };
    lfm2_error err;

    if (interrupted)
        return INTERRUPTED;
    if (from == to || lfm2_forward(b->ctx, &span, 1, &err) == LFM2_OK)
        return DONE;
    return bench_failed(b, &err);
}

/* All sequences of the test have `depth` tokens.  Trimming leaves most of what
 * the test before had, so that only its end is computed again. */
static int prepare(struct bench *b, const struct test *t)
{
    int code = feed(b, 0, lfm2_seq_trim(b->ctx, 0, t->depth), t->depth, 0);
    lfm2_error err;

    for (int i = 1; code == DONE && i < t->n_seq; i++)
        if (t->depth == 0)
            lfm2_seq_trim(b->ctx, i, 0);
        else if (lfm2_seq_copy(b->ctx, i, 0, &err) != LFM2_OK)
            code = bench_failed(b, &err);
    return code;
}

/* Which tokens are generated does not matter, so none is chosen. */
static int bench_generate(struct bench *b, const struct test *t, int n)
{
    const int start = t->depth + t->n_prompt;
    lfm2_error err;

    for (int i = 0; i < n; i++) {
        for (int k = 0; k < t->n_seq; k++)
            b->span[k] = (lfm2_span){ k, b->token + start + i, 1, 1 };
        if (interrupted)
            return INTERRUPTED;
        if (lfm2_forward(b->ctx, b->span, t->n_seq, &err) != LFM2_OK)
            return bench_failed(b, &err);
    }
    return DONE;
}

static int run_once(struct bench *b, const struct test *t, int n_gen,
                    double *took)
{
    int code = prepare(b, t);
    const double start = seconds();

    if (code == DONE)
        code = feed(b, 0, t->depth, t->depth + t->n_prompt, t->n_prompt > 0);
    if (code == DONE)
        code = bench_generate(b, t, n_gen);
    *took = seconds() - start;
    return code;
}

/* The warm-up generates but one token, as llama-bench's does. */
static int run_repeatedly(struct bench *b, const struct test *t)
{
    const double n = (double)t->n_prompt + (double)t->n_gen * t->n_seq;
    double took;
    int code = run_once(b, t, t->n_gen > 0, &took);

    for (int i = 0; code == DONE && i < b->s->reps; i++) {
        code = run_once(b, t, t->n_gen, &took);
        b->ns[i] = took * 1e9;
        b->ts[i] = n / (took + 1e-9);
    }
    return code;
}

static double mean_of(const double *x, int n, double *deviation)
{
    double sum = 0, squares = 0;

    for (int i = 0; i < n; i++)
        sum += x[i];
    for (int i = 0; i < n; i++)
        squares += (x[i] - sum / n) * (x[i] - sum / n);
    *deviation = n > 1 ? sqrt(squares / (n - 1)) : 0;
    return sum / n;
}

/* ---- the machine */

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* The median of several turns of at least 20 ms each, after one that does not
 * count. */
static double measure_rate(struct bench *b, int what)
{
    double rate[9], all = 0;
    int n = -1;

    while (n < 9 && (n < 3 || all < 2) && !interrupted) {
        const double start = seconds();
        double took, work = 0;
        do {
            work += (double)lfm2_exercise(b->ctx, what);
            took = seconds() - start;
        } while (took < 0.02);
        all += took;
        if (n >= 0)
            rate[n] = work / took;
        n++;
    }
    if (n < 1)
        return 0;
    qsort(rate, (size_t)n, sizeof *rate, ascending);
    return rate[n / 2];
}

/* Of the logits that are there, by the settings that would choose a word. */
static void measure_sampling(struct bench *b)
{
    const size_t n = (size_t)lfm2_model_config(b->model)->n_vocab;
    const float *logits = lfm2_logits(b->ctx, 0, 0);
    float *copy = logits ? malloc(n * sizeof *copy) : NULL;
    lfm2_sampler sampler = choose_sampler(b->s);
    double took[9];

    for (int i = 0; copy && i < 9; i++) {
        memcpy(copy, logits, n * sizeof *copy);
        const double start = seconds();
        lfm2_sample(b->ctx, &sampler, copy, b->token, START_TOKENS);
        took[i] = seconds() - start;
    }
    if (copy) {
        qsort(took, 9, sizeof *took, ascending);
        b->sample_s = took[4];
    }
    free(copy);
}

/* Memory of the process's own, which the mapped file is not; 0 if the system
 * does not tell. */
static double anonymous_memory(void)
{
    FILE *f = fopen("/proc/self/status", "r");
    char line[128];
    double kib = 0;

    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "RssAnon:", 8) == 0)
            kib = strtod(line + 8, NULL);
    if (f)
        fclose(f);
    return kib * 1024;
}

static double peak_memory(void)
{
    struct rusage use;

    if (getrusage(RUSAGE_SELF, &use) != 0)
        return 0;
#ifdef __APPLE__
    return (double)use.ru_maxrss;
#else
    return (double)use.ru_maxrss * 1024;
#endif
}

static void name_cpu(char *out, size_t cap)
{
    FILE *f = fopen("/proc/cpuinfo", "r");
    struct utsname host;
    char line[256];

    snprintf(out, cap, "%s", uname(&host) == 0 ? host.machine : "unknown");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':')) {
            const char *name = strchr(line, ':') + 1;
            name += strspn(name, " \t");
            snprintf(out, cap, "%.*s", (int)strcspn(name, "\n"), name);
            break;
        }
    if (f)
        fclose(f);
}

/* ---- the model */

static struct cost count_cost(const lfm2_model *m, int kv_type)
{
    const lfm2_config *c = lfm2_model_config(m);
    struct cost sum = { .kv = kv_bytes(c, kv_type) };
    double embedding = 0, output = 0;
    lfm2_tensor_info t;

    for (int i = 0; lfm2_model_tensor(m, i, &t) == LFM2_OK; i++) {
        const double bytes = (double)t.n_bytes, n = count_elements(&t);
        sum.bytes += bytes;
        sum.params += n;
        if (strcmp(t.name, "token_embd.weight") == 0)
            embedding = bytes, sum.head = n;
        else if (strcmp(t.name, "output.weight") == 0)
            output = bytes;
        else if (strstr(t.name, "_exps.") && c->n_expert > 0) {
            sum.experts += bytes;
            sum.macs += n * c->n_expert_used / c->n_expert;
        } else {
            sum.shared += bytes;
            sum.macs += t.n_dims > 1 ? n : 0;
        }
    }
    sum.shared += output > 0 ? output : embedding;
    return sum;
}

/* Bytes of one step that generates a token for each sequence: weights once, of
 * the experts those that are expected to be chosen, if all are as likely; and
 * the cache at its mean length. */
static double step_bytes(const struct bench *b, const struct test *t)
{
    const lfm2_config *c = lfm2_model_config(b->model);
    double idle = 1;

    for (int i = 0; c->n_expert > 0 && i < t->n_seq; i++)
        idle *= 1 - (double)c->n_expert_used / c->n_expert;
    return b->cost.shared + b->cost.experts * (1 - idle) +
           b->cost.kv * t->n_seq * (t->depth + t->n_gen / 2.0);
}

/* The mix of types as quantisers name it, by the number in the file. */
static const char *mix_name(const lfm2_model *m)
{
    static const struct { int number; const char *name; } mix[] = {
        { 0, "all F32" }, { 1, "F16" }, { 2, "Q4_0" }, { 3, "Q4_1" },
        { 7, "Q8_0" }, { 8, "Q5_0" }, { 9, "Q5_1" }, { 10, "Q2_K - Medium" },
        { 11, "Q3_K - Small" }, { 12, "Q3_K - Medium" },
        { 13, "Q3_K - Large" }, { 14, "Q4_K - Small" },
        { 15, "Q4_K - Medium" }, { 16, "Q5_K - Small" },
        { 17, "Q5_K - Medium" }, { 18, "Q6_K" }, { 21, "Q2_K - Small" },
        { 25, "IQ4_NL - 4.5 bpw" }, { 30, "IQ4_XS - 4.25 bpw" }, { 32, "BF16" }
    };
    const char *key;
    char value[128];

    for (int i = 0; (key = lfm2_model_key(m, i, value, sizeof value)); i++)
        for (size_t k = 0; k < sizeof mix / sizeof *mix; k++)
            if (strcmp(key, "general.file_type") == 0 &&
                strtol(value, NULL, 10) == mix[k].number)
                return mix[k].name;
    return "unknown mix";
}

/* "lfm2 1.2B Q4_0", "lfm2moe 24B.A2B Q4_0". */
static void name_type(struct bench *b)
{
    uint64_t total, active;
    char size[48];

    lfm2_model_params(b->model, &total, &active);
    const double n = (double)total;
    if (n < 995e6)
        snprintf(size, sizeof size, "%.0fM", n >= 1e8 ? 10 * round(n / 1e7) :
                 n / 1e6);
    else
        snprintf(size, sizeof size, "%.*fB", active < total ? 0 : 1, n / 1e9);
    if (active < total && active >= 1000000000)
        snprintf(size + strlen(size), sizeof size - strlen(size), ".A%dB",
                 (int)(active / 1000000000));
    snprintf(b->type, sizeof b->type, "lfm2%s %s %s", active < total ?
             "moe" : "", size, mix_name(b->model));
}

/* ---- what is printed */

static void name_test(const struct test *t, char *out, size_t cap)
{
    char prompt[16] = "", gen[16] = "", times[16] = "", depth[16] = "";

    if (t->n_prompt > 0)
        snprintf(prompt, sizeof prompt, "pp%d", t->n_prompt);
    if (t->n_gen > 0)
        snprintf(gen, sizeof gen, "tg%d", t->n_gen);
    if (t->n_seq > 1)
        snprintf(times, sizeof times, " x %d", t->n_seq);
    if (t->depth > 0)
        snprintf(depth, sizeof depth, " @ d%d", t->depth);
    snprintf(out, cap, "%s%s%s%s%s", prompt, *prompt && *gen ? "+" : "", gen,
             times, depth);
}

/* "694.76 MiB", as llama-bench has it. */
static struct amount binary_amount(double bytes)
{
    const int giga = bytes >= 1 << 30;
    struct amount out;

    snprintf(out.s, sizeof out.s, "%.2f %s", bytes / (giga ? 1 << 30 : 1 << 20),
             giga ? "GiB" : "MiB");
    return out;
}

static void print_row(const struct bench *b, const struct result *r)
{
    static const char dashes[] = "------------------------------";
    char test[64];

    if (r == b->result)
        printf("| %-30s | %10s | %10s | %-10s | %7s | %15s | %20s |\n"
               "| %.30s | %.9s: | %.9s: | %.10s | %.6s: | %.14s: | %.19s: |\n",
               "model", "size", "params", "backend", "threads", "test", "t/s",
               dashes, dashes, dashes, dashes, dashes, dashes, dashes);
    name_test(&r->test, test, sizeof test);
    printf("| %-30s | %10s | %10s | %-10s | %7d | %15s | %11.2f ± %6.2f |\n",
           b->type, binary_amount(b->cost.bytes).s,
           amount(b->cost.params, "").s, "CPU", r->n_threads, test, r->mean_ts,
           r->dev_ts);
}

/* Which limit counts: a prompt is held against arithmetic, an answer against
 * memory.  0 where neither is known. */
static double share_of(const struct result *r)
{
    if (r->test.n_gen == 0)
        return r->best.dot > 0 ? r->macs / r->best.dot : 0;
    return r->best.read > 0 ? r->read / r->best.read : 0;
}

/* A table cell: the number, or a dash for one that is not known. */
static struct amount cell(double x, const char *format)
{
    struct amount out;

    snprintf(out.s, sizeof out.s, x > 0 ? format : "–", x);
    return out;
}

static void print_limits(const struct bench *b)
{
    const int n = b->n_results;

    printf("\n| threads | test | reads GB/s | of bandwidth | GMAC/s | of int8 "
           "peak |\n| ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for (const struct result *r = b->result; r < b->result + n; r++) {
        char test[64];
        name_test(&r->test, test, sizeof test);
        printf("| %d | %s | %s | %s | %s | %s |\n", r->n_threads, test,
               cell(r->read / 1e9, "%.1f").s,
               cell(r->best.read > 0 ? 100 * r->read / r->best.read : 0,
                    "%.0f %%").s,
               cell(r->macs / 1e9, "%.1f").s,
               cell(r->best.dot > 0 ? 100 * r->macs / r->best.dot : 0,
                    "%.1f %%").s);
    }
}

/* The limits are those of a number of threads: a line for each. */
static void print_machine(const struct bench *b)
{
    char cpu[128];

    name_cpu(cpu, sizeof cpu);
    printf("\nmachine   %s, %d usable CPU%s\nkernels   %s, KV in %s, batch "
           "%d\n", cpu, b->n_cpus, b->n_cpus == 1 ? "" : "s",
           isa_name[b->par.isa], kv_name(b->par.kv_type), b->par.n_batch);
    for (int i = 0; i < b->n_results; i++) {
        const struct result *r = &b->result[i];
        if (i == 0 || r->n_threads != r[-1].n_threads)
            printf("limits    %d thread%s read %.1f GB/s and multiply %.0f "
                   "G int8/s\n", r->n_threads, r->n_threads == 1 ? "" : "s",
                   r->best.read / 1e9, r->best.dot / 1e9);
    }
}

static void print_footer(const struct bench *b)
{
    const lfm2_sampler s = choose_sampler(b->s);

    print_limits(b);
    print_machine(b);
    printf("start     model %.1f ms, context %.1f ms; first token of 8 after "
           "%.1f ms\n", b->load_s * 1e3, b->context_s * 1e3, b->first_s * 1e3);
    printf("memory    %s resident at most, %s of it anonymous\n",
           binary_amount(peak_memory()).s, b->rss_anon > 0 ?
           binary_amount(b->rss_anon).s : "n/a");
    if (b->sample_s > 0)
        printf("sampling  temp %g, top-k %d, top-p %g, min-p %g: %.0f us",
               (double)s.temperature, s.top_k, (double)s.top_p,
               (double)s.min_p, b->sample_s * 1e6);
    if (b->sample_s > 0 && b->token_s > 0)
        printf(", %.2f %% of a token", 100 * b->sample_s / b->token_s);
    if (b->sample_s > 0)
        putchar('\n');
}

/* How long a well-formed UTF-8 character at s is, or 0. */
static int utf8_length(const unsigned char *s)
{
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    const int n = s[0] < 0xc2 || s[0] > 0xf4 ? 0 : s[0] < 0xe0 ? 2 :
                  s[0] < 0xf0 ? 3 : 4;
    uint32_t u = s[0] & (0x7f >> n);

    for (int i = 1; i < n; i++) {
        if ((s[i] & 0xc0) != 0x80)
            return 0;
        u = u << 6 | (s[i] & 0x3f);
    }
    return u < least[n] || u > 0x10ffff || (u >= 0xd800 && u < 0xe000) ? 0 : n;
}

/* A string of JSON; bytes that are no UTF-8, as file names may have, become
 * the replacement character. */
static void put_json(const char *text)
{
    const unsigned char *s = (const unsigned char *)text;

    putchar('"');
    while (*s) {
        const int n = *s < 0x80 ? 1 : utf8_length(s);
        if (*s < ' ' || *s == 127)
            printf("\\u%04x", *s);
        else if (n == 0)
            printf("\\ufffd");
        else
            printf("%s%.*s", *s == '"' || *s == '\\' ? "\\" : "", n,
                   (const char *)s);
        s += n ? n : 1;
    }
    putchar('"');
}

static void put_csv(const char *text)
{
    putchar('"');
    for (; *text; text++)
        printf(*text == '"' ? "\"\"" : "%c", *text);
    putchar('"');
}

/* One column of a record: text, a number, or all samples of a test. */
struct field {
    const char *name, *text;
    const double *samples;
    double number;
    int digits;
};

#define WORD(name, text)           { name, text, NULL, 0, 0 }
#define COUNT(name, number)        { name, NULL, NULL, number, 0 }
#define FIGURE(name, number, n)    { name, NULL, NULL, number, n }
#define SAMPLES(name, samples, n)  { name, NULL, samples, 0, n }
/* What could not be measured is null, not 0. */
#define KNOWN(name, number, n) \
    FIGURE(name, (number) > 0 ? (number) : NAN, n)

static void put_value(const struct bench *b, const struct field *f)
{
    const int csv = b->s->output == CSV;

    if (f->samples) {
        for (int i = 0; i < b->s->reps; i++)
            printf("%s%.*f", i ? ", " : "[ ", f->digits, f->samples[i]);
        printf(" ]");
    } else if (csv && f->text)
        put_csv(f->text);
    else if (f->text)
        put_json(f->text);
    else if (isfinite(f->number))
        printf(csv ? "\"%.*f\"" : "%.*f", f->digits, f->number);
    else
        printf(csv ? "\"\"" : "null");
}

static void print_csv(const struct bench *b, const struct field *f, int n)
{
    for (int i = 0; b->n_results == 1 && i < n; i++)
        if (!f[i].samples)
            printf("%s%s", i ? "," : "", f[i].name);
    if (b->n_results == 1)
        putchar('\n');
    for (int i = 0; i < n; i++)
        if (!f[i].samples) {
            printf("%s", i ? "," : "");
            put_value(b, &f[i]);
        }
    putchar('\n');
}

/* Pretty, or as one line. */
static void print_json(const struct bench *b, const struct field *f, int n)
{
    const int lines = b->s->output == JSONL;

    if (!lines)
        printf(b->n_results == 1 ? "[\n  {\n" : ",\n  {\n");
    for (int i = 0; i < n; i++) {
        printf(lines ? i ? ", \"%s\": " : "{\"%s\": " : "    \"%s\": ",
               f[i].name);
        put_value(b, &f[i]);
        if (!lines)
            printf(i + 1 < n ? ",\n" : "\n");
    }
    printf(lines ? "}\n" : "  }");
}

/* llama-bench's columns, then ours. */
static void print_record(const struct bench *b, const struct result *r)
{
    const char *kv = kv_name(b->par.kv_type);
    char cpu[128];
    const struct field f[] = {
        WORD("build_commit", ""), COUNT("build_number", 0),
        WORD("cpu_info", cpu), WORD("backends", "CPU"),
        WORD("model_filename", b->s->model), WORD("model_type", b->type),
        COUNT("model_size", b->cost.bytes),
        COUNT("model_n_params", b->cost.params),
        COUNT("n_batch", b->par.n_batch), COUNT("n_threads", r->n_threads),
        WORD("type_k", kv), WORD("type_v", kv),
        COUNT("n_prompt", r->test.n_prompt), COUNT("n_gen", r->test.n_gen),
        COUNT("n_depth", r->test.depth), WORD("test_time", r->when),
        COUNT("avg_ns", r->mean_ns), COUNT("stddev_ns", r->dev_ns),
        FIGURE("avg_ts", r->mean_ts, 6), FIGURE("stddev_ts", r->dev_ts, 6),
        SAMPLES("samples_ns", b->ns, 0), SAMPLES("samples_ts", b->ts, 6),

        COUNT("n_sequences", r->test.n_seq),
        WORD("isa", isa_name[b->par.isa]),
        KNOWN("read_bandwidth", r->best.read / 1e9, 3),
        KNOWN("int8_rate", r->best.dot / 1e9, 3),
        KNOWN("gb_per_s", r->read / 1e9, 3),
        KNOWN("gmac_per_s", r->macs / 1e9, 3), KNOWN("share", share_of(r), 4),
        COUNT("rss_peak", r->rss_peak), KNOWN("rss_anon", r->rss_anon, 0),
        FIGURE("load_ms", b->load_s * 1e3, 3),
        FIGURE("context_ms", b->context_s * 1e3, 3),
        FIGURE("first_token_ms", b->first_s * 1e3, 3)
    };
    const int n = sizeof f / sizeof *f;

    name_cpu(cpu, sizeof cpu);
    (b->s->output == CSV ? print_csv : print_json)(b, f, n);
}

/* ---- the run */

static int run_test(struct bench *b, const struct test *t)
{
    struct result *r = &b->result[b->n_results];
    const time_t now = time(NULL);
    struct tm utc;
    int code = run_repeatedly(b, t);

    if (code != DONE)
        return code;
    *r = (struct result){ .test = *t, .best = b->best,
                          .n_threads = b->par.n_threads };
    if (gmtime_r(&now, &utc))
        strftime(r->when, sizeof r->when, "%Y-%m-%dT%H:%M:%SZ", &utc);
    r->mean_ns = mean_of(b->ns, b->s->reps, &r->dev_ns);
    r->mean_ts = mean_of(b->ts, b->s->reps, &r->dev_ts);
    if (t->n_prompt == 0)
        r->read = step_bytes(b, t) * r->mean_ts / t->n_seq;
    if (t->n_prompt == 0 || t->n_gen == 0)
        r->macs = (b->cost.macs + (t->n_gen ? b->cost.head : 0)) * r->mean_ts;
    r->rss_peak = peak_memory();
    r->rss_anon = anonymous_memory();
    b->rss_anon = fmax(b->rss_anon, r->rss_anon);
    if (t->n_prompt == 0 && b->token_s <= 0)
        b->token_s = t->n_seq / r->mean_ts;
    b->n_results++;
    if (b->s->output == MD)
        print_row(b, r);
    else
        print_record(b, r);
    return flush_output(DONE);
}

static int open_bench_context(struct bench *b, const lfm2_params *p)
{
    lfm2_error err;

    if (lfm2_context_open(&b->ctx, b->model, p, &err) != LFM2_OK)
        return report(b->s->model, &err);
    running = b->ctx;
    b->par = lfm2_context_params(b->ctx);
    return DONE;
}

static void close_bench_context(struct bench *b)
{
    running = NULL;
    lfm2_context_close(b->ctx);
    b->ctx = NULL;
}

/* Any will do, if they are not always the same few: those of a mixture's tokens
 * choose its experts. */
static void spread_tokens(struct bench *b, int n)
{
    const int n_vocab = lfm2_model_config(b->model)->n_vocab;

    for (int i = 0; i < n; i++)
        b->token[i] = (int32_t)((uint32_t)i * 2654435761u % (uint32_t)n_vocab);
}

/* How many threads a context has that is not told. */
static int count_cpus(struct bench *b)
{
    lfm2_params p = choose_params(b->s, b->model);
    int code;

    p.n_threads = 0;
    p.n_ctx = p.n_batch = 1;
    code = open_bench_context(b, &p);
    b->n_cpus = b->par.n_threads;
    close_bench_context(b);
    return code;
}

/* From nothing to the first token, before anything else has warmed the way. */
static int measure_start(struct bench *b)
{
    const double start = seconds();
    const int load = b->s->no_mmap ? LFM2_LOAD_READ : LFM2_LOAD_MAP;
    lfm2_params p;
    lfm2_error err;
    int code;

    if (lfm2_model_open(&b->model, b->s->model, load, &err) != LFM2_OK)
        return report(b->s->model, &err);
    b->load_s = seconds() - start;
    spread_tokens(b, START_TOKENS);
    p = choose_params(b->s, b->model);
    p.n_threads = b->s->bench_threads.v[0];
    code = open_bench_context(b, &p);
    b->context_s = seconds() - start - b->load_s;
    if (code == DONE)
        code = feed(b, 0, 0, START_TOKENS, 1);
    b->first_s = seconds() - start;
    close_bench_context(b);
    return code;
}

/* All tests with so many threads at one depth, in a context no larger than they
 * need. */
static int run_tests(struct bench *b, int n_threads, int depth, int first)
{
    lfm2_params p = choose_params(b->s, b->model);
    int code;

    p.n_threads = n_threads;
    p.n_ctx = p.n_seq = 1;
    for (struct test *t = b->test; t < b->test + b->n_tests; t++) {
        t->depth = depth;
        if (depth + t->n_prompt + t->n_gen > p.n_ctx)
            p.n_ctx = depth + t->n_prompt + t->n_gen;
        if (t->n_seq > p.n_seq)
            p.n_seq = t->n_seq;
    }
    p.n_logits = p.n_seq;
    code = open_bench_context(b, &p);
    if (code == DONE && first)
        b->best = (struct limits){
            measure_rate(b, LFM2_READ), measure_rate(b, LFM2_DOT)
        };
    for (int i = 0; code == DONE && i < b->n_tests; i++)
        code = interrupted ? INTERRUPTED : run_test(b, &b->test[i]);
    if (code == DONE && b->sample_s <= 0)
        measure_sampling(b);
    close_bench_context(b);
    return code;
}

/* llama-bench's order.  Returns how many tests there are at each depth. */
static int list_tests(const struct settings *s, struct test *out)
{
    int n = 0;

    for (int i = 0; i < s->bench_prompt.n; i++)
        if (s->bench_prompt.v[i] > 0)
            out[n++] = (struct test){ s->bench_prompt.v[i], 0, 1, 0 };
    for (int i = 0; i < s->bench_gen.n; i++)
        for (int k = 0; s->bench_gen.v[i] > 0 && k < s->bench_seqs.n; k++)
            out[n++] = (struct test){ 0, s->bench_gen.v[i], s->bench_seqs.v[k],
                                      0 };
    for (int i = 0; i < s->bench_both.n; i += 2)
        out[n++] = (struct test){ s->bench_both.v[i], s->bench_both.v[i + 1],
                                  1, 0 };
    return n;
}

static int largest(const struct list *l)
{
    int most = 0;

    for (int i = 0; i < l->n; i++)
        most = l->v[i] > most ? l->v[i] : most;
    return most;
}

static int longest_test(const struct bench *b)
{
    int most = 0;

    for (int i = 0; i < b->n_tests; i++)
        if (b->test[i].n_prompt + b->test[i].n_gen > most)
            most = b->test[i].n_prompt + b->test[i].n_gen;
    return most;
}

/* All there will be to remember, before any clock runs. */
static int alloc_bench(struct bench *b)
{
    const struct settings *s = b->s;
    const size_t at_each = (size_t)s->bench_prompt.n + (size_t)s->bench_both.n +
                           (size_t)s->bench_gen.n * (size_t)s->bench_seqs.n;
    const size_t rounds = (size_t)s->bench_depth.n * (size_t)s->bench_threads.n;
    const size_t reps = (size_t)s->reps;

    b->test = calloc(at_each + 1, sizeof *b->test);
    b->result = calloc(at_each * rounds + 1, sizeof *b->result);
    b->ns = calloc(reps, sizeof *b->ns);
    b->ts = calloc(reps, sizeof *b->ts);
    b->span = calloc((size_t)largest(&s->bench_seqs), sizeof *b->span);
    if (!b->test || !b->result || !b->ns || !b->ts || !b->span)
        return say(NO_MEMORY, "no memory for the results");
    b->n_tests = list_tests(s, b->test);
    b->n_tokens = longest_test(b);
    if (b->n_tests == 0)
        return usage("nothing to measure: no -p, -n or -pg above 0");
    if (b->n_tokens > MAX_CTX - largest(&s->bench_depth))
        return usage("a test of %d tokens at a depth of %d is longer than any "
                     "context, %d", b->n_tokens, largest(&s->bench_depth),
                     MAX_CTX);
    b->n_tokens += largest(&s->bench_depth) + START_TOKENS;
    b->token = calloc((size_t)b->n_tokens, sizeof *b->token);
    return b->token ? DONE :
           say(NO_MEMORY, "no memory for %d tokens", b->n_tokens);
}

static int run_all(struct bench *b)
{
    const struct settings *s = b->s;
    int code = measure_start(b);

    if (code == DONE)
        code = count_cpus(b);
    if (code != DONE)
        return code;
    for (int i = 0; !s->quiet && lfm2_model_warning(b->model, i); i++)
        say(DONE, "%s: %s", s->model, lfm2_model_warning(b->model, i));
    spread_tokens(b, b->n_tokens);
    b->cost = count_cost(b->model, s->kv);
    name_type(b);
    for (int i = 0; code == DONE && i < s->bench_threads.n; i++)
        for (int k = 0; code == DONE && k < s->bench_depth.n; k++)
            code = run_tests(b, s->bench_threads.v[i], s->bench_depth.v[k],
                             k == 0);
    return code;
}

/* What is printed so far is complete, even after Ctrl-C. */
static void end_output(struct bench *b, int code)
{
    if (b->s->output == MD && code == DONE)
        print_footer(b);
    if (b->s->output == JSON && (b->n_results > 0 || code == INTERRUPTED))
        printf(b->n_results > 0 ? "\n]\n" : "[]\n");
}

static int bench(const struct settings *s)
{
    struct bench b = { .s = s };
    int code = alloc_bench(&b);

    if (code == DONE) {
        catch_interrupt();
        code = run_all(&b);
        end_output(&b, code);
        signal(SIGINT, SIG_DFL);
    }
    lfm2_model_close(b.model);
    free(b.test);
    free(b.result);
    free(b.ns);
    free(b.ts);
    free(b.span);
    free(b.token);
    return code;
}

/* ---------------------------------------------------------------- 8. main */

int main(int argc, char **argv)
{
    struct settings s = preset;
    int code;

    if (argc > 0 && argv[0][0])
        program = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    signal(SIGPIPE, SIG_IGN);             /* writing then fails, and we say  */
    code = parse(&s, argc > 0 ? argv : (char *[]){ "run", NULL });
    if (code == DONE && s.help)
        code = print_help();
    else if (code == DONE && s.version)
        code = print_version();
    else if (code == DONE && (s.tokenize || s.detokenize || s.export_to))
        code = work_on_words(&s);
    else if (code == DONE && s.bench)
        code = bench(&s);
    else if (code == DONE)
        code = work_on_model(&s);
    return flush_output(code);
}
