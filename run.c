/* run.c - the command line of lfm2.c.
 *
 * Standard output carries the model's words, or the data that was asked for,
 * and nothing else; everything meant for a human being goes to standard error.
 *
 *   1  messages and exit codes        4  tokens in and out, --inspect
 *   2  the table of options           5  the prompt and its answer
 *   3  reading what is given          6  main */

#define _POSIX_C_SOURCE 200809L

#include "lfm2.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ------------------------------------------------ 1. Messages and exit codes
 *
 * Other programs act on these numbers, so they never change their meaning. */

enum {
    DONE = 0, FAILED = 1, USAGE = 2, BAD_FILE = 3, BAD_MODEL = 4,
    NO_MEMORY = 5, TOO_LONG = 6, INTERRUPTED = 130
};

static const char *program = "run";       /* what we were called as          */
static int quiet;

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
    if (fflush(stdout) == 0 && !ferror(stdout))
        return code;
    return code != DONE && code != INTERRUPTED ? code :
           say(BAD_FILE, "standard output: %s", strerror(errno));
}

/* -------------------------------------------------- 2. The table of options
 *
 * It alone decides what is parsed, what is a valid value, and what --help
 * says. */

struct settings {
    const char *model, *prompt, *file, *system, *ids;
    const char *logits, *export_to, *tokenizer, *ignored;
    int raw, tokenize, detokenize, inspect, null, bos, special;
    int no_mmap, quiet, verbose, help, version;
    int predict, ctx, threads, batch, isa, kv, top_k, repeat_last_n;
    double temp, top_p, min_p, repeat;
    long long seed;
};

enum { ANSWER_LEN = -1, RAW_LEN = 256, UNSET = -2, DEFAULT_BATCH = 512 };

static const struct settings preset = {
    .predict = UNSET, .ctx = UNSET, .batch = DEFAULT_BATCH,
    .temp = 0.3, .top_p = 1, .min_p = 0.15, .repeat = 1.05,
    .repeat_last_n = 64, .seed = -1
};

enum kind { HEADING, FLAG, WHOLE, SEED, REAL, CHOICE, TEXT };

struct option {
    enum kind kind;
    const char *names;           /* by spaces; those after | are not listed */
    const char *arg;             /* its name; for a CHOICE, the words by |  */
    const char *help;            /* NULL: not listed at all                 */
    size_t at;                   /* where in struct settings it goes        */
    double min, max;
};

#define AT(field) offsetof(struct settings, field)

static const struct option table[] = {
    { HEADING, "What to do", 0, 0, 0, 0, 0 },
    { TEXT, "-m --model", "FILE", "the model, if not the first argument",
      AT(model), 0, 0 },
    { TEXT, "-p --prompt", "TEXT", "the prompt, if not the second argument",
      AT(prompt), 0, 0 },
    { TEXT, "-f --file | --prompt-file", "FILE",
      "read the prompt from FILE (- is standard input)", AT(file), 0, 0 },
    { TEXT, "-sys --system-prompt | -y", "TEXT", "what the model should be",
      AT(system), 0, 0 },
    { FLAG, "--raw | -no-cnv", 0, "no chat template: continue the prompt as "
      "it is", AT(raw), 0, 0 },
    { TEXT, "--ids", "FILE", "the prompt as int32 little-endian token ids",
      AT(ids), 0, 0 },
    { TEXT, "--logits", "OUT", "write the logits of every prompt token as "
      "float32", AT(logits), 0, 0 },
    { FLAG, "--tokenize", 0, "print the token ids of the prompt",
      AT(tokenize), 0, 0 },
    { FLAG, "--detokenize", 0, "print the text of lines of token ids",
      AT(detokenize), 0, 0 },
    { FLAG, "--null", 0, "texts end with a NUL byte, for both of these",
      AT(null), 0, 0 },
    { FLAG, "--bos", 0, "begin with the BOS token", AT(bos), 0, 0 },
    { FLAG, "--special", 0, "markers such as <|im_end|> are control tokens",
      AT(special), 0, 0 },
    { FLAG, "--inspect", 0, "describe the model and the memory it needs",
      AT(inspect), 0, 0 },
    { TEXT, "--export-tokenizer", "FILE", "write the vocabulary as a "
      "tokenizer.bin", AT(export_to), 0, 0 },
    { TEXT, "--tokenizer", "FILE", "use this vocabulary, not the model's own",
      AT(tokenizer), 0, 0 },

    { HEADING, "How to choose words", 0, 0, 0, 0, 0 },
    { WHOLE, "-n --predict | --n-predict --tokens", "N", "at most N tokens "
      "(-1: to the end, --raw: 256)", AT(predict), -1, 1 << 30 },
    { REAL, "--temp --temperature", "F", "0 always takes the likeliest (0.3)",
      AT(temp), 0, 100 },
    { WHOLE, "--top-k", "N", "choose among the N likeliest (0: off)",
      AT(top_k), 0, 1 << 30 },
    { REAL, "--top-p", "F", "among those that sum to F (1: off)", AT(top_p),
      0, 1 },
    { REAL, "--min-p", "F", "drop what is less likely than F times the best "
      "(0.15)", AT(min_p), 0, 1 },
    { REAL, "--repeat-penalty | --repetition-penalty", "F", "make recent "
      "tokens less likely (1.05)", AT(repeat), 0.01, 100 },
    { WHOLE, "--repeat-last-n", "N", "how many tokens are recent (64; -1: all)",
      AT(repeat_last_n), -1, 1 << 30 },
    { SEED, "-s --seed", "N", "the same seed, the same text (-1: random)",
      AT(seed), -1, 9e18 },

    { HEADING, "How to run", 0, 0, 0, 0, 0 },
    { WHOLE, "-c --ctx-size | --ctx", "N", "longest text in tokens (4096; 0: "
      "the model's)", AT(ctx), 0, 1 << 24 },
    { WHOLE, "-t --threads", "N", "threads (0: one per CPU)", AT(threads), 0,
      1024 },
    { WHOLE, "-b --batch --batch-size", "N", "prompt tokens worked on at once "
      "(512)", AT(batch), 1, 1 << 16 },
    { CHOICE, "--isa", "auto|scalar|avx2|avx512", "instructions to use",
      AT(isa), 0, 0 },
    { CHOICE, "--kv", "f16|f32", "precision of the KV cache", AT(kv), 0, 0 },
    { FLAG, "--no-mmap", 0, "read the file instead of mapping it",
      AT(no_mmap), 0, 0 },
    { TEXT, "-ngl --gpu-layers | --n-gpu-layers", "N", 0, AT(ignored), 0, 0 },
    { FLAG, "-q --quiet", 0, "errors only", AT(quiet), 0, 0 },
    { FLAG, "-v --verbose", 0, "what is used, the seed, the speed",
      AT(verbose), 0, 0 },
    { FLAG, "-h --help", 0, "this text", AT(help), 0, 0 },
    { FLAG, "--version", 0, "version, compiler, weight types", AT(version), 0,
      0 },
};

enum { N_OPTIONS = sizeof table / sizeof *table };

static int print_help(void)
{
    printf("usage: %s [options] MODEL.gguf [PROMPT]\n\n"
           "Answers PROMPT and exits.  Without one, what is piped in is the "
           "prompt.\n", program);
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &table[i];
        char left[80];
        size_t n = 0;

        if (o->kind == HEADING)
            printf("\n%s\n", o->names);
        if (!o->help)
            continue;
        for (const char *s = o->names; *s && *s != '|' && n < 70; s++)
            if (*s != ' ')
                left[n++] = *s;
            else if (s[1] != '|')
                left[n++] = ',', left[n++] = ' ';
        snprintf(left + n, sizeof left - n, " %s", o->arg ? o->arg : "");
        printf("  %-27s %s\n", left, o->help);
    }
    printf("\nA value may follow as --flag VALUE or --flag=VALUE; -- ends the "
           "options.\nExit status: 0 done, 1 failed, 2 usage, 3 file, 4 "
           "model, 5 memory,\n6 prompt longer than the context, 130 "
           "interrupted.\n");
    return DONE;
}

static int usage(const char *fmt, const char *what)
{
    if (fmt)
        say(USAGE, fmt, what);
    fprintf(stderr, "usage: %s [options] MODEL.gguf [PROMPT]\n"
            "       %s --help lists the options\n", program, program);
    return USAGE;
}

/* How many letters must be changed, added or dropped to make a into b, which is
 * one of our names and has n < 32 letters. */
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

static int unknown_option(const char *arg)
{
    const char *nearest = "";
    int best = 1 << 30, n_nearest = 0;
    char name[40];

    if (strcmp(arg, "-i") == 0)
        return usage("-i is not an option: use -p for a prompt; there is no "
                     "interactive mode%s", "");
    snprintf(name, sizeof name, "%.*s", (int)strcspn(arg, "="), arg);
    for (int i = 0; i < N_OPTIONS; i++)
        for (const char *s = table[i].names; table[i].kind != HEADING && *s;) {
            int n = (int)strcspn(s, " "), d = distance(name, s, n);
            if (s[0] == '-' && d < best)
                best = d, nearest = s, n_nearest = n;
            s += n + (s[n] == ' ');
        }
    say(USAGE, "unknown option %s; the nearest is %.*s", arg, n_nearest,
        nearest);
    return usage(NULL, "");
}

/* The option called by the n bytes at `name`. */
static const struct option *find_option(const char *name, size_t n)
{
    for (int i = 0; i < N_OPTIONS; i++)
        for (const char *s = table[i].names; table[i].kind != HEADING && *s;) {
            size_t len = strcspn(s, " ");
            if (len == n && memcmp(s, name, n) == 0)
                return &table[i];
            s += len + (s[len] == ' ');
        }
    return NULL;
}

static int bad_value(const struct option *o, const char *name,
                     const char *value)
{
    if (o->at == AT(threads) && strtod(value, NULL) > 0)
        return say(USAGE, "%s %s: this is the number of threads; did you mean "
                   "--temp %s?", name, value, value);
    if (o->kind == CHOICE)
        return say(USAGE, "%s %s: expected %s", name, value, o->arg);
    return say(USAGE, "%s %s: expected a %snumber from %.10g to %.19g", name,
               value, o->kind == REAL ? "" : "whole ", o->min, o->max);
}

static int set_choice(const struct option *o, const char *value, int *slot)
{
    const size_t n = strlen(value);
    const char *s = o->arg;

    for (int i = 0; *s; i++) {
        size_t len = strcspn(s, "|");
        if (len == n && memcmp(s, value, n) == 0) {
            *slot = i;                    /* the words are in order of LFM2_ */
            return DONE;
        }
        s += len + (s[len] == '|');
    }
    return USAGE;
}

static int set_option(struct settings *to, const struct option *o,
                      const char *name, const char *value)
{
    void *slot = (char *)to + o->at;
    char *end = (char *)value;
    long long whole;
    double real;

    if (o->kind == TEXT) {
        *(const char **)slot = value;
        return DONE;
    }
    if (o->kind == CHOICE)
        return set_choice(o, value, slot) ? bad_value(o, name, value) : DONE;
    errno = 0;
    whole = o->kind == REAL ? 0 : strtoll(value, &end, 10);
    real = o->kind == REAL ? strtod(value, &end) : (double)whole;
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
    const char *arg = argv[*i], *equals = strchr(arg, '='), *value;
    const size_t n = equals ? (size_t)(equals - arg) : strlen(arg);
    const struct option *o = find_option(arg, n);
    char name[40];

    if (!o)
        return unknown_option(arg);
    if (o->kind == FLAG && equals)
        return usage("%s: this option takes no value", arg);
    if (o->kind == FLAG) {
        *(int *)((char *)to + o->at) = 1;
        return DONE;
    }
    value = equals ? equals + 1 : argv[++*i];
    if (!value)
        return usage("%s: a value is missing", arg);
    snprintf(name, sizeof name, "%.*s", (int)n, arg);
    return set_option(to, o, name, value);
}

static int check_settings(const struct settings *s)
{
    const int modes = s->tokenize + s->detokenize + s->inspect +
                      !!s->logits + !!s->export_to;
    const int prompts = !!s->prompt + !!s->file + !!s->ids;

    if (modes > 1)
        return usage("more than one of --tokenize --detokenize --inspect "
                     "--logits --export-tokenizer%s", "");
    if (prompts > 1)
        return usage("more than one prompt: PROMPT or -p, -f, --ids%s", "");
    if (s->system && (s->raw || s->ids || s->tokenize))
        return usage("-sys needs the chat template, which --raw, --ids and "
                     "--tokenize go without%s", "");
    if (s->ignored && !s->quiet)
        say(DONE, "-ngl is ignored: everything runs on the CPU");
    return DONE;
}

static int parse(struct settings *to, char **argv)
{
    const char *word[2] = { NULL, NULL };
    int n_words = 0, options = 1, code = DONE;

    for (int i = 1; argv[i] && code == DONE; i++)
        if (options && strcmp(argv[i], "--") == 0)
            options = 0;
        else if (options && argv[i][0] == '-' && argv[i][1])
            code = take_option(to, argv, &i);
        else if (n_words < 2)
            word[n_words++] = argv[i];
        else
            code = usage("unexpected argument %s (a prompt of several words "
                         "needs quotes)", argv[i]);
    if (code != DONE || to->help || to->version)
        return code;
    if (!to->model)
        to->model = word[0], word[0] = word[1], word[1] = NULL;
    if (word[1] || (word[0] && to->prompt))
        return usage("unexpected argument %s: there is a prompt already",
                     word[1] ? word[1] : word[0]);
    if (word[0])
        to->prompt = word[0];
    if (!to->model && !(to->tokenizer && (to->tokenize || to->detokenize)))
        return usage("no model given%s", "");
    return check_settings(to);
}

/* ------------------------------------------------- 3. Reading what is given */

struct text { char *s; size_t n; };       /* s[n] is NUL                     */

enum { MAX_TEXT = 1 << 30 };

static int read_stream(FILE *f, const char *name, struct text *out)
{
    size_t cap = 0;

    for (*out = (struct text){ NULL, 0 };;) {
        if (cap - out->n < 2) {
            cap = cap ? cap * 2 : 1 << 16;
            char *s = cap <= MAX_TEXT ? realloc(out->s, cap) : NULL;
            if (!s)
                return say(NO_MEMORY, "%s: too long to be read", name);
            out->s = s;
        }
        size_t got = fread(out->s + out->n, 1, cap - out->n - 1, f);
        out->n += got;
        out->s[out->n] = '\0';
        if (ferror(f))
            return say(BAD_FILE, "%s: %s", name, strerror(errno));
        if (got == 0)
            return DONE;
    }
}

/* The bytes of a file, or of standard input for "-".  The caller frees out->s,
 * after a failure too. */
static int read_file(const char *path, struct text *out)
{
    const int is_stdin = strcmp(path, "-") == 0;
    FILE *f = is_stdin ? stdin : fopen(path, "rb");
    int code;

    if (!f)
        return say(BAD_FILE, "%s: %s", path, strerror(errno));
    code = read_stream(f, is_stdin ? "standard input" : path, out);
    if (!is_stdin)
        fclose(f);
    return code;
}

/* The text to work on: given as an argument, in a file, or piped in. */
static int read_text(const struct settings *s, struct text *out)
{
    if (s->prompt) {
        out->n = strlen(s->prompt);
        out->s = malloc(out->n + 1);
        if (!out->s)
            return say(NO_MEMORY, "no memory for the prompt");
        memcpy(out->s, s->prompt, out->n + 1);
        return DONE;
    }
    if (!s->file && isatty(STDIN_FILENO))
        return usage("no prompt given, and there is no interactive chat; try "
                     "%s MODEL.gguf \"a question\"", program);
    return read_file(s->file ? s->file : "-", out);
}

static uint32_t load_le32(const char *p)
{
    const unsigned char *u = (const unsigned char *)p;
    return u[0] | (uint32_t)u[1] << 8 | (uint32_t)u[2] << 16 |
           (uint32_t)u[3] << 24;
}

struct ids { int32_t *id; int n; };

static int alloc_ids(struct ids *out, size_t n)
{
    out->id = n < SIZE_MAX / 8 ? malloc(n * sizeof *out->id) : NULL;
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
    if (code == DONE)
        for (out->n = 0; out->n < (int)(t.n / 4); out->n++) {
            uint32_t u = load_le32(t.s + 4 * (size_t)out->n);
            out->id[out->n] = u > INT32_MAX ? -1 : (int32_t)u;
        }
    free(t.s);
    return code;
}

/* --------------------------------------- 4. Tokens in and out, and --inspect */

static int open_words(const struct settings *s, lfm2_tokenizer **out)
{
    const char *path = s->tokenizer ? s->tokenizer : s->model;
    lfm2_error err;

    return lfm2_tokenizer_open(out, path, &err) ? report(path, &err) : DONE;
}

static int encode(const lfm2_tokenizer *words, const char *text, size_t n,
                  int flags, struct ids *out)
{
    int code = alloc_ids(out, n + 1);

    if (code != DONE)
        return code;
    out->n = lfm2_encode(words, text, n, flags, out->id, (int)n + 1);
    return out->n >= 0 ? DONE : say(NO_MEMORY, "no memory for %zu bytes of "
                                    "text", n);
}

static int encode_flags(const struct settings *s)
{
    return (s->bos ? LFM2_ENCODE_BOS : 0) |
           (s->special ? LFM2_ENCODE_SPECIAL : 0);
}

static int tokenize(const struct settings *s, const lfm2_tokenizer *words,
                    const struct text *t)
{
    size_t at = 0;

    do {
        size_t n = s->null ? strlen(t->s + at) : t->n - at;
        struct ids ids = { NULL, 0 };
        int code;

        if (s->null && at == t->n)
            break;
        code = encode(words, t->s + at, n, encode_flags(s), &ids);
        for (int i = 0; code == DONE && i < ids.n; i++)
            printf("%s%ld", i ? " " : "", (long)ids.id[i]);
        free(ids.id);
        if (code != DONE)
            return code;
        putchar('\n');
        at += n + 1;
    } while (at < t->n);
    return DONE;
}

/* Lines of ids to texts, each ended as --null says. */
static int detokenize(const struct settings *s, const lfm2_tokenizer *words,
                      const struct text *t)
{
    int line = 1, len;

    for (char *p = t->s; *p;) {
        char *end = p;
        long id;

        p += strspn(p, " \t\r");
        if (*p == '\n' || !*p) {
            putchar(s->null ? '\0' : '\n');
            line++;
            p += *p == '\n';
            continue;
        }
        errno = 0;
        id = strtol(p, &end, 10);
        if (end == p || !strchr(" \t\r\n", *end) || errno || id < 0 ||
            id >= lfm2_n_vocab(words))
            return say(FAILED, "line %d: \"%.*s\", expected a token id from 0 "
                       "to %d", line, (int)strcspn(p, " \t\r\n") % 40, p,
                       lfm2_n_vocab(words) - 1);
        const char *bytes = lfm2_token_bytes(words, (int32_t)id, s->special,
                                             &len);
        fwrite(bytes, 1, (size_t)len, stdout);
        p = end;
        if (!*p)
            putchar(s->null ? '\0' : '\n');
    }
    return DONE;
}
