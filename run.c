/* run.c - the command line of lfm2.c.
 *
 * Standard output carries the model's words, or the data that was asked for,
 * and nothing else; everything meant for a human being goes to standard error.
 *
 *   1  messages and exit codes        4  tokens in and out
 *   2  options                        5  --inspect
 *   3  reading what is given          6  the prompt and its answer; main */

#define _POSIX_C_SOURCE 200809L

#include "lfm2.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
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

enum { RAW_LEN = 256, UNSET = -2 };

struct settings {
    const char *model, *prompt, *file, *system, *ids;
    const char *logits, *export_to, *tokenizer, *ignored;
    int raw, tokenize, detokenize, inspect, null, bos, special;
    int no_mmap, quiet, verbose, help, version;
    int predict, ctx, threads, batch, isa, kv, top_k, repeat_last_n;
    double temp, top_p, min_p, repeat;
    long long seed;
};

/* The sampling settings published for LFM2.  Their repetition penalty, 1.05, is
 * not for greedy choice: see choose_sampler(). */
static const struct settings preset = {
    .predict = UNSET, .ctx = UNSET, .batch = 512, .temp = 0.3, .top_p = 1,
    .min_p = 0.15, .repeat = UNSET, .repeat_last_n = 64, .seed = -1
};

enum kind { HEADING, FLAG, WHOLE, SEED, REAL, CHOICE, TEXT };

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
    NUMBER(WHOLE, "-c --ctx-size | --ctx", "N", ctx, 0, 1 << 24,
           "longest text in tokens (4096; 0: the model's)"),
    NUMBER(WHOLE, "-t --threads", "N", threads, 0, 1024, "0: one per CPU"),
    NUMBER(WHOLE, "-b --batch-size", "N", batch, 1, 1 << 16,
           "prompt tokens worked on at once (512)"),
    NUMBER(CHOICE, "--isa", "auto|scalar|avx2|avx512", isa, 0, 0,
           "instruction set"),
    NUMBER(CHOICE, "--kv", "f16|f32", kv, 0, 0, "precision of the KV cache"),
    SWITCH("--no-mmap", no_mmap, "read the file instead of mapping it"),
    WORDS("-ngl --gpu-layers | --n-gpu-layers", "N", ignored, NULL),
    SWITCH("-q --quiet", quiet, "say nothing but errors"),
    SWITCH("-v --verbose", verbose, "settings, seed and speed; more --inspect"),
    SWITCH("-h --help", help, "this text"),
    SWITCH("--version", version, "version, compiler, weight types"),
};

enum { N_OPTIONS = sizeof table / sizeof *table };

static int print_help(void)
{
    printf("usage: %s [options] MODEL.gguf [PROMPT]\n\nAnswers PROMPT and "
           "exits.  Without one, what is piped in is the prompt.\n", program);
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &table[i];
        int n = (int)strcspn(o->names, "|"), gap = 28;

        if (o->kind == HEADING)
            printf("\n%s\n", o->help);
        if (o->kind == HEADING || !o->help)
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
static const char *const isa_name[] = { "auto", "scalar", "avx2", "avx512" };

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
    for (int i = LFM2_ISA_SCALAR; i <= LFM2_ISA_AVX512; i++)
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
static const struct option *find_option(const char *name, const char **nearest,
                                        int *n_nearest)
{
    int least = 1 << 30;

    *nearest = "";
    *n_nearest = 0;
    for (int i = 0; i < N_OPTIONS; i++)
        for (const char *s = table[i].names; *s;) {
            int n = (int)strcspn(s, " ");
            int d = *s == '-' ? distance(name, s, n) : least;
            if (d == 0)
                return &table[i];
            if (d < least)
                least = d, *nearest = s, *n_nearest = n;
            s += n + (s[n] == ' ');
        }
    return NULL;
}

static int bad_value(const struct option *o, const char *name,
                     const char *value)
{
    if (o->at == AT(threads) && strchr(value, '.'))
        return say(USAGE, "%s %s: this is how many threads; did you mean "
                   "--temp %s?", name, value, value);
    if (o->kind == CHOICE)
        return say(USAGE, "%s %s: expected %s", name, value, o->arg);
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
    o = find_option(name, &nearest, &n_nearest);
    if (!o && strcmp(name, "-i") == 0)
        return usage("unknown option -i: -p gives a prompt, and an interactive "
                     "mode there is not");
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

static int check_settings(const struct settings *s)
{
    if (!s->model && !(s->tokenizer && (s->tokenize || s->detokenize ||
                                        s->export_to)))
        return usage("no model given");
    if (s->tokenize + s->detokenize + s->inspect + !!s->logits +
        !!s->export_to > 1)
        return usage("more than one of --tokenize, --detokenize, --inspect, "
                     "--logits and --export-tokenizer");
    if (!!s->prompt + !!s->file + !!s->ids > 1)
        return usage("more than one prompt: PROMPT or -p, -f, --ids");
    if (s->system && (s->raw || s->ids || s->tokenize))
        return usage("-sys is for the chat template, which --raw, --ids and "
                     "--tokenize do without");
    if (s->ids && (s->tokenize || s->detokenize))
        return usage("--ids is for generating text and for --logits");
    if (s->ignored && !s->quiet)
        say(DONE, "-ngl is ignored: everything runs on the CPU");
    return DONE;
}

static int parse(struct settings *to, char **argv)
{
    const char *word[2] = { NULL, NULL };
    int n_words = 0, options = 1, code = DONE;

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

struct text { char *s; size_t n; };       /* s[n] is NUL                     */

struct ids { int32_t *id; int n; };

enum { MAX_TEXT = 1 << 30 };

static int read_stream(FILE *f, const char *name, struct text *out)
{
    for (size_t cap = 0, got = 1; got > 0; out->n += got) {
        if (cap - out->n < 2) {
            cap = cap ? cap * 2 : 1 << 16;
            char *s = cap <= MAX_TEXT ? realloc(out->s, cap) : NULL;
            if (!s)
                return say(NO_MEMORY, "%s: too long to be read", name);
            out->s = s;
        }
        got = fread(out->s + out->n, 1, cap - out->n - 1, f);
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
    out->n = strlen(s->prompt);
    out->s = malloc(out->n + 1);
    if (!out->s)
        return say(NO_MEMORY, "no memory for the prompt");
    memcpy(out->s, s->prompt, out->n + 1);
    return DONE;
}

static int alloc_ids(struct ids *out, size_t n)
{
    out->id = n < SIZE_MAX / 4 ? malloc(n * sizeof *out->id) : NULL;
    return out->id ? DONE : say(NO_MEMORY, "no memory for %zu tokens", n);
}

static int read_ids(const char *path, struct ids *out)
{
    struct text t = { NULL, 0 };
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
    struct text t = { NULL, 0 };
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

static void inspect_weights(const lfm2_model *m)
{
    struct { const char *type; int n; double bytes; } sum[32] = { { 0, 0, 0 } };
    double bytes = 0, elements = 0;
    uint64_t total, active;
    lfm2_tensor_info t;

    for (int i = 0; lfm2_model_tensor(m, i, &t) == LFM2_OK; i++) {
        double n = 1;
        int k = 0;
        for (int d = 0; d < t.n_dims; d++)
            n *= (double)t.dims[d];
        while (k < 31 && sum[k].type && strcmp(sum[k].type, t.type) != 0)
            k++;
        sum[k].type = t.type;
        sum[k].n++;
        sum[k].bytes += (double)t.n_bytes;
        bytes += (double)t.n_bytes;
        elements += n;
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
    p.n_batch = s->batch;
    p.n_threads = s->threads;
    p.isa = s->isa;
    p.kv_type = s->kv;
    return p;
}

static void inspect_memory(const struct settings *s, const lfm2_model *m)
{
    const lfm2_config *c = lfm2_model_config(m);
    lfm2_params p = choose_params(s, m);
    const int bytes = p.kv_type == LFM2_KV_F16 ? 2 : 4;
    double kv = 0, conv = 0;

    p.isa = LFM2_ISA_AUTO;                /* it takes no more or less memory */
    for (int il = 0; il < c->n_layer; il++)
        if (c->is_attn[il])
            kv += 2.0 * c->n_head_kv * c->head_dim * bytes;
        else
            conv += 4.0 * (c->l_cache - 1) * c->n_embd;
    printf("memory        for a context of %d tokens, KV in %s\n"
           "  KV cache    %s, %s a token\n  conv state  %s\n"
           "  in all      %s beside the file\n", p.n_ctx,
           bytes == 2 ? "f16" : "f32", amount(kv * p.n_ctx, "B").s,
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
    struct text t = { NULL, 0 };
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

/* Ctrl-C stops the answer; the next one has its usual effect. */
static lfm2_context *running;

static void on_interrupt(int signal_number)
{
    (void)signal_number;
    lfm2_cancel(running);
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
    struct sigaction action = { .sa_handler = on_interrupt };
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
    action.sa_flags = (int)SA_RESETHAND | SA_RESTART;
    sigaction(SIGINT, &action, NULL);
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
        p.kv_type == LFM2_KV_F16 ? "f16" : "f32",
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
    else if (code == DONE)
        code = work_on_model(&s);
    return flush_output(code);
}
