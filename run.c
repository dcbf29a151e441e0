/* run.c - the command line of lfm2.c.
 *
 *     run [options] MODEL.gguf [PROMPT]
 *
 * Standard output carries the model's words, or the data that was asked for,
 * and nothing else; everything said about it goes to standard error.
 *
 * In order: options, errors, reading and writing, then a function for each
 * thing the program can be asked to do, then main(). */

#define _POSIX_C_SOURCE 200809L

#include "lfm2.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Exit codes.  2, 4 and 5 are permanent: trying again will not help. */
enum {
    EXIT_DONE, EXIT_RUNTIME, EXIT_USAGE, EXIT_FILE, EXIT_MODEL, EXIT_MEMORY,
    EXIT_CONTEXT, EXIT_INTERRUPTED = 130
};

/* ----------------------------------------------------------------- options */

struct options {
    const char *model, *prompt, *file, *system;
    const char *ids, *logits, *tokenizer, *export;
    int raw, tokenize, detokenize, inspect;
    int null, bos, special, no_mmap, quiet, verbose, help, version;
    int n_predict, n_ctx, n_threads, n_batch, isa, kv, ignored;
    int top_k, repeat_last_n;
    float temperature, top_p, min_p, repeat_penalty;
    uint64_t seed;
    int has_seed, has_predict, has_penalty;   /* given, not left to choose */
};

enum kind { HEADING, FLAG, TEXT, INT, FLOAT, SEED, ISA, KV };

/* One line of this table is one option: how it is called, what it takes, where
 * it goes, and what --help says. */
static const struct option {
    const char *names;                    /* parted by spaces; --help shows  */
    enum kind kind;                       /* a short one with its long one   */
    double min, max;
    size_t field;
    const char *arg, *help;
} options[] = {
#define TO(field) offsetof(struct options, field)
    { "What to do", HEADING, 0, 0, 0, NULL, NULL },
    { "-p --prompt", TEXT, 0, 0, TO(prompt), "TEXT",
      "the prompt (the word after MODEL, or piped input)" },
    { "-f --file --prompt-file", TEXT, 0, 0, TO(file), "FILE",
      "read the prompt from FILE, - for standard input" },
    { "-sys --system-prompt -y", TEXT, 0, 0, TO(system), "TEXT",
      "system prompt" },
    { "--raw -no-cnv", FLAG, 0, 0, TO(raw), NULL,
      "no chat format: continue the prompt as plain text" },
    { "--ids", TEXT, 0, 0, TO(ids), "FILE",
      "the prompt as int32 little-endian token ids" },
    { "--logits", TEXT, 0, 0, TO(logits), "FILE",
      "write the float32 logits of the whole prompt and exit" },
    { "--tokenize", FLAG, 0, 0, TO(tokenize), NULL,
      "print the token ids of the text and exit" },
    { "--detokenize", FLAG, 0, 0, TO(detokenize), NULL,
      "the inverse: lines of ids on standard input to text" },
    { "--null", FLAG, 0, 0, TO(null), NULL,
      "texts to tokenize end with NUL; a line of ids each" },
    { "--bos", FLAG, 0, 0, TO(bos), NULL,
      "with --tokenize, put the BOS token first" },
    { "--special", FLAG, 0, 0, TO(special), NULL,
      "<|im_end|> and the like in texts are control tokens" },
    { "--inspect", FLAG, 0, 0, TO(inspect), NULL,
      "print what is in the model file and exit" },
    { "--export-tokenizer", TEXT, 0, 0, TO(export), "FILE",
      "write the vocabulary as a tokenizer.bin and exit" },
    { "How to choose words", HEADING, 0, 0, 0, NULL, NULL },
    { "-n --predict --n-predict --tokens", INT, -1, INT_MAX, TO(n_predict), "N",
      "at most N tokens (-1: until the end; --raw: 256)" },
    { "-s --seed", SEED, 0, 0, TO(seed), "N",
      "a seed means the same text everywhere (random)" },
    { "--temp --temperature", FLOAT, 0, 100, TO(temperature), "X",
      "temperature, 0 = always the likeliest token (0.3)" },
    { "--top-k", INT, 0, INT_MAX, TO(top_k), "N",
      "only the N likeliest tokens, 0 = off (0)" },
    { "--top-p", FLOAT, 0, 1, TO(top_p), "X",
      "only the likeliest that make up X, 1 = off (1)" },
    { "--min-p", FLOAT, 0, 1, TO(min_p), "X",
      "only those X times as likely as the first (0.15)" },
    { "--repeat-penalty --repetition-penalty", FLOAT, 0.01, 100,
      TO(repeat_penalty), "X", "push recent tokens down, 1 = off (1.05)" },
    { "--repeat-last-n", INT, 0, INT_MAX, TO(repeat_last_n), "N",
      "how many tokens are recent (64)" },
    { "How to run", HEADING, 0, 0, 0, NULL, NULL },
    { "-m --model", TEXT, 0, 0, TO(model), "FILE",
      "the model (the first word)" },
    { "-c --ctx-size --ctx", INT, 0, 1 << 24, TO(n_ctx), "N",
      "context length (the model's, at most 4096)" },
    { "-t --threads", INT, 0, 1024, TO(n_threads), "N",
      "threads (one for each CPU)" },
    { "-b --batch-size --batch", INT, 1, 65536, TO(n_batch), "N",
      "tokens worked on at once (512); changes no bit" },
    { "--isa", ISA, 0, 0, TO(isa), "NAME",
      "kernels: scalar or auto" },
    { "--kv", KV, 0, 0, TO(kv), "TYPE",
      "precision of the KV cache: f16 or f32 (f16)" },
    { "--no-mmap", FLAG, 0, 0, TO(no_mmap), NULL,
      "read the model into memory instead of mapping it" },
    { "--tokenizer", TEXT, 0, 0, TO(tokenizer), "FILE",
      "take the vocabulary from a tokenizer.bin" },
    { "-q --quiet", FLAG, 0, 0, TO(quiet), NULL,
      "no statistics, no warnings" },
    { "-v --verbose", FLAG, 0, 0, TO(verbose), NULL,
      "say what is being done" },
    { "-h --help", FLAG, 0, 0, TO(help), NULL, "this text" },
    { "--version", FLAG, 0, 0, TO(version), NULL,
      "version, compiler, kernels, weight types" },
    { "-ngl --n-gpu-layers --gpu-layers", INT, INT_MIN, INT_MAX, TO(ignored),
      "N", NULL },
#undef TO
};

enum { N_OPTIONS = sizeof options / sizeof options[0] };

static void complain(const char *fmt, ...)
{
    va_list args;

    fputs("run: ", stderr);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fputc('\n', stderr);
}

/* Is `name`, n bytes of it, one of the names of an option? */
static int is_named(const struct option *o, const char *name, size_t n)
{
    for (const char *s = o->names; o->kind != HEADING && *s;) {
        size_t len = strcspn(s, " ");
        if (len == n && memcmp(s, name, n) == 0)
            return 1;
        s += len + (s[len] == ' ');
    }
    return 0;
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* How many letters must be changed, added or left out to get from a to b. */
static size_t edit_distance(const char *a, size_t n, const char *b, size_t m)
{
    size_t row[64];

    if (n > 63 || m > 63)
        return 64;
    for (size_t j = 0; j <= m; j++)
        row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = smaller(change, smaller(row[j], row[j - 1]) + 1);
        }
    }
    return row[m];
}

static int unknown_option(const char *name, size_t n)
{
    const char *best = NULL;
    size_t best_len = 0, best_distance = 64;

    if (n == 2 && name[1] == 'i') {
        complain("unknown option -i: a prompt is given with -p");
        return EXIT_USAGE;
    }
    for (int i = 0; i < N_OPTIONS; i++) {
        for (const char *s = options[i].names;
             options[i].kind != HEADING && *s;) {
            size_t len = strcspn(s, " ");
            size_t distance = edit_distance(name, n, s, len);
            if (distance < best_distance) {
                best_distance = distance;
                best = s;
                best_len = len;
            }
            s += len + (s[len] == ' ');
        }
    }
    complain("unknown option %.*s; the nearest is %.*s (see --help)", (int)n,
             name, (int)best_len, best);
    return EXIT_USAGE;
}

static int bad_value(const struct option *o, const char *value,
                     const char *expected)
{
    complain("%.*s: \"%s\", expected %s", (int)strcspn(o->names, " "),
             o->names, value, expected);
    return EXIT_USAGE;
}

static int set_number(const struct option *o, void *to, const char *value)
{
    char *end, expected[64];
    double x;

    errno = 0;
    x = strtod(value, &end);
    if (is_named(o, "-t", 2) && *end == '\0' && x != (double)(long)x) {
        complain("-t is threads: \"%s\", expected a whole number; did you "
                 "mean --temp %s?", value, value);
        return EXIT_USAGE;
    }
    snprintf(expected, sizeof expected, "a%s number from %.10g to %.10g",
             o->kind == INT ? " whole" : "", o->min, o->max);
    if (end == value || *end != '\0' || !(x >= o->min && x <= o->max) ||
        (o->kind == INT && x != (double)(int)x))
        return bad_value(o, value, expected);
    if (o->kind == INT)
        *(int *)to = (int)x;
    else
        *(float *)to = (float)x;
    return EXIT_DONE;
}

static int set_seed(const struct option *o, uint64_t *to, const char *value)
{
    char *end;

    errno = 0;
    *to = strtoull(value, &end, 10);
    if (end == value || *end != '\0' || errno != 0 || strchr(value, '-'))
        return bad_value(o, value, "a whole number from 0 to 2^64-1");
    return EXIT_DONE;
}

static int set_choice(const struct option *o, int *to, const char *value,
                      const char *const *names, const char *expected)
{
    for (int i = 0; names[i]; i++)
        if (strcmp(value, names[i]) == 0) {
            *to = i;
            return EXIT_DONE;
        }
    return bad_value(o, value, expected);
}

static int set_option(struct options *opt, const struct option *o,
                      const char *value)
{
    static const char *const isa[] = { "auto", "scalar", "avx2", "avx512",
                                       NULL };
    static const char *const kv[] = { "f16", "f32", NULL };
    void *to = (char *)opt + o->field;

    opt->has_seed |= o->kind == SEED;
    opt->has_predict |= to == &opt->n_predict;
    opt->has_penalty |= to == &opt->repeat_penalty;
    if (to == &opt->ignored && !opt->quiet)
        complain("%s: ignored, this program runs on the CPU",
                 "--n-gpu-layers");
    switch (o->kind) {
    case FLAG: *(int *)to = 1; return EXIT_DONE;
    case TEXT: *(const char **)to = value; return EXIT_DONE;
    case SEED: return set_seed(o, to, value);
    case ISA:  return set_choice(o, to, value, isa,
                                 "auto, scalar, avx2 or avx512");
    case KV:   return set_choice(o, to, value, kv, "f16 or f32");
    default:   return set_number(o, to, value);
    }
}

/* A word that is no option: the model, then the prompt. */
static int set_word(struct options *opt, const char *word)
{
    if (!opt->model)
        opt->model = word;
    else if (!opt->prompt)
        opt->prompt = word;
    else {
        complain("\"%s\": a third word, expected MODEL and PROMPT; quote a "
                 "prompt that has spaces", word);
        return EXIT_USAGE;
    }
    return EXIT_DONE;
}

static int parse_options(struct options *opt, int argc, char **argv)
{
    int only_words = 0, code = EXIT_DONE;

    for (int i = 1; i < argc && code == EXIT_DONE; i++) {
        const char *word = argv[i], *value = strchr(word, '=');
        const size_t n = value && word[1] == '-' ? (size_t)(value++ - word)
                                                 : strlen(word);
        const struct option *o = options;

        if (only_words || word[0] != '-' || n == 1) {
            code = set_word(opt, word);
            continue;
        }
        if (strcmp(word, "--") == 0) {
            only_words = 1;
            continue;
        }
        while (o < options + N_OPTIONS && !is_named(o, word, n))
            o++;
        if (o == options + N_OPTIONS)
            return unknown_option(word, n);
        if (word[n] != '=')
            value = o->kind == FLAG ? NULL : argv[++i];
        if (!value != (o->kind == FLAG)) {
            complain("%.*s %s", (int)n, word, value ? "takes no value"
                                                    : "needs a value");
            return EXIT_USAGE;
        }
        code = set_option(opt, o, value);
    }
    return code;
}

static void print_help(FILE *out)
{
    fputs("usage: run [options] MODEL.gguf [PROMPT]\n"
          "Answers PROMPT with an LFM2 model, on standard output.\n", out);
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &options[i];
        char left[64];
        size_t first = strcspn(o->names, " ");
        size_t both = first;

        if (o->kind == HEADING)
            fprintf(out, "\n%s\n", o->names);
        if (!o->help)
            continue;
        if (o->names[1] != '-' && o->names[first] == ' ')
            both += 1 + strcspn(o->names + first + 1, " ");
        snprintf(left, sizeof left, "%.*s%s%s", (int)both, o->names,
                 o->arg ? " " : "", o->arg ? o->arg : "");
        fprintf(out, "  %-26s %s\n", left, o->help);
    }
    fputs("\nIn (): what is done without the option.  Exit status: 0 done, "
          "1 error while\nrunning, 2 wrong usage, 3 cannot read or write a "
          "file, 4 bad or unsupported\nmodel, 5 out of memory, 6 prompt "
          "longer than the context, 130 interrupted.\n", out);
}

static void print_version(void)
{
    const uint16_t one = 1;
    uint8_t low;

    memcpy(&low, &one, 1);
    printf("lfm2.c %s\n", lfm2_version());
#if defined __clang__
    printf("compiler: clang %s\n", __clang_version__);
#elif defined __GNUC__
    printf("compiler: gcc %s\n", __VERSION__);
#endif
    printf("kernels: scalar\nbyte order: %s-endian, %zu-bit\n"
           "weight types: F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K "
           "Q4_K Q5_K Q6_K IQ4_NL IQ4_XS\n", low ? "little" : "big",
           sizeof(void *) * 8);
}

/* ------------------------------------------------------------------ errors */

/* Say what the library said of `what`; the exit code for it. */
static int library_error(const char *what, const lfm2_error *err)
{
    /* Sentences about files begin with the path already. */
    if (strncmp(err->msg, what, strlen(what)) == 0)
        complain("%s", err->msg);
    else
        complain("%s: %s", what, err->msg);
    switch (err->code) {
    case LFM2_EARG:         return EXIT_USAGE;
    case LFM2_EIO:          return EXIT_FILE;
    case LFM2_EFORMAT:
    case LFM2_EUNSUPPORTED: return EXIT_MODEL;
    case LFM2_ENOMEM:       return EXIT_MEMORY;
    case LFM2_EFULL:        return EXIT_CONTEXT;
    case LFM2_ECANCELLED:   return EXIT_INTERRUPTED;
    default:                return EXIT_RUNTIME;
    }
}

static int file_error(const char *path)
{
    complain("%s: %s", path, strerror(errno));
    return EXIT_FILE;
}

static int no_memory(void)
{
    complain("out of memory");
    return EXIT_MEMORY;
}

/* --------------------------------------------------- reading and writing */

/* Bytes with a NUL behind them. */
struct text { char *s; size_t n; };

static int read_stream(struct text *t, FILE *f, const char *path)
{
    size_t cap = 65536, got;

    t->n = 0;
    t->s = malloc(cap + 1);
    while (t->s && (got = fread(t->s + t->n, 1, cap - t->n, f)) > 0) {
        t->n += got;
        if (t->n == cap) {
            char *more = realloc(t->s, 2 * cap + 1);
            if (!more)
                free(t->s);
            t->s = more;
            cap *= 2;
        }
    }
    if (!t->s)
        return no_memory();
    t->s[t->n] = '\0';
    return ferror(f) ? file_error(path) : EXIT_DONE;
}

static int read_file(struct text *t, const char *path)
{
    const int is_stdin = strcmp(path, "-") == 0;
    FILE *f = is_stdin ? stdin : fopen(path, "rb");
    int code;

    if (!f)
        return file_error(path);
    code = read_stream(t, f, is_stdin ? "standard input" : path);
    if (!is_stdin)
        fclose(f);
    return code;
}

/* The prompt: -p or the second word, -f, or standard input if it is piped. */
static int read_prompt(const struct options *opt, struct text *t)
{
    if (opt->prompt) {
        t->n = strlen(opt->prompt);
        t->s = malloc(t->n + 1);
        if (!t->s)
            return no_memory();
        memcpy(t->s, opt->prompt, t->n + 1);
        return EXIT_DONE;
    }
    if (!opt->file && isatty(STDIN_FILENO)) {
        complain("no prompt: give one after the model, with -p or -f, or pipe "
                 "it in (there is no interactive chat yet)");
        return EXIT_USAGE;
    }
    return read_file(t, opt->file ? opt->file : "-");
}

/* After the last write: was all of it taken? */
static int close_output(FILE *f, const char *path)
{
    int failed = fflush(f) != 0 || ferror(f);

    if (f != stdout)
        failed |= fclose(f) != 0;
    return failed ? file_error(path) : EXIT_DONE;
}

static FILE *open_output(const char *path)
{
    FILE *f = strcmp(path, "-") == 0 ? stdout : fopen(path, "wb");

    if (!f)
        file_error(path);
    return f;
}

/* ------------------------------------------------------------------ models */

/* What a job needs; what was opened is closed by close_session(). */
struct session {
    struct options opt;
    lfm2_model *model;
    lfm2_tokenizer *words;                /* NULL: the file has none         */
    lfm2_context *ctx;
    int32_t *token;                       /* prompt and answer, n_ctx + 1    */
    int n_prompt;
    double load_seconds;
};

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void close_session(struct session *s)
{
    lfm2_context_close(s->ctx);
    lfm2_tokenizer_close(s->words);
    lfm2_model_close(s->model);
    free(s->token);
}

/* The vocabulary; required is 0 if the job can do without one. */
static int open_words(struct session *s, int required)
{
    const char *path = s->opt.tokenizer ? s->opt.tokenizer : s->opt.model;
    lfm2_error err = { 0 };
    int code = lfm2_tokenizer_open(&s->words, path, &err);

    if (code != LFM2_OK)
        return required || s->opt.tokenizer ? library_error(path, &err)
                                            : EXIT_DONE;
    if (s->model && lfm2_n_vocab(s->words) >
                        lfm2_model_config(s->model)->n_vocab) {
        complain("%s: %d tokens, expected at most the %d of the model", path,
                 lfm2_n_vocab(s->words), lfm2_model_config(s->model)->n_vocab);
        return EXIT_MODEL;
    }
    return EXIT_DONE;
}

static int open_model(struct session *s)
{
    lfm2_error err = { 0 };
    double start = now();
    int code = lfm2_model_open(&s->model, s->opt.model, s->opt.no_mmap
                               ? LFM2_LOAD_READ : LFM2_LOAD_MAP, &err);

    if (code != LFM2_OK)
        return library_error(s->opt.model, &err);
    s->load_seconds = now() - start;
    for (int i = 0; !s->opt.quiet && lfm2_model_warning(s->model, i); i++)
        complain("%s: warning: %s", s->opt.model,
                 lfm2_model_warning(s->model, i));
    return EXIT_DONE;
}

static lfm2_params params_of(const struct session *s)
{
    lfm2_params p = lfm2_default_params(s->model);

    p.n_ctx = s->opt.n_ctx > 0 ? s->opt.n_ctx : p.n_ctx;
    p.n_batch = s->opt.n_batch > 0 ? s->opt.n_batch : p.n_batch;
    p.n_threads = s->opt.n_threads;
    p.isa = s->opt.isa;
    p.kv_type = s->opt.kv;
    return p;
}

static int open_context(struct session *s, int n_logits)
{
    lfm2_params p = params_of(s);
    lfm2_error err = { 0 };

    p.n_logits = n_logits;
    if (lfm2_context_open(&s->ctx, s->model, &p, &err) != LFM2_OK)
        return library_error(s->opt.model, &err);
    p = lfm2_context_params(s->ctx);
    if (s->opt.verbose)
        complain("loaded in %.3f s; context %d, batch %d, threads %d, kernels "
                 "scalar, KV %s, %.1f MB beside the model", s->load_seconds,
                 p.n_ctx, p.n_batch, p.n_threads,
                 p.kv_type == LFM2_KV_F16 ? "f16" : "f32",
                 (double)lfm2_context_size(s->model, &p) / 1e6);
    return EXIT_DONE;
}

/* ------------------------------------------------------------- the prompt */

static int read_ids(struct session *s)
{
    struct text t = { 0 };
    int code = read_file(&t, s->opt.ids);

    if (code == EXIT_DONE && (t.n == 0 || t.n % 4 != 0)) {
        complain("%s: %zu bytes, expected int32 ids, 4 bytes each",
                 s->opt.ids, t.n);
        code = EXIT_FILE;
    }
    if (code == EXIT_DONE && t.n / 4 > INT_MAX)
        code = no_memory();
    if (code == EXIT_DONE && !(s->token = malloc(t.n)))
        code = no_memory();
    for (size_t i = 0; code == EXIT_DONE && i < t.n / 4; i++) {
        const unsigned char *p = (unsigned char *)t.s + 4 * i;
        s->token[i] = (int32_t)(p[0] | (uint32_t)p[1] << 8 |
                                (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
    }
    s->n_prompt = (int)(t.n / 4);
    free(t.s);
    return code;
}

/* Plain text is continued as it is; else it is a question in a chat. */
static int is_chat(const struct session *s)
{
    size_t n;

    return !s->opt.raw &&
           lfm2_model_string(s->model, "tokenizer.chat_template", &n);
}

static int encode_prompt(struct session *s, const struct text *t)
{
    const lfm2_message msgs[] = {
        { "system", s->opt.system }, { "user", t->s }
    };
    const int first = !s->opt.system || !*s->opt.system;
    const int flags = (lfm2_add_bos(s->words) ? LFM2_ENCODE_BOS : 0) |
                      (s->opt.special ? LFM2_ENCODE_SPECIAL : 0);
    const size_t cap = t->n + (first ? 0 : strlen(s->opt.system)) + 64;
    int n;

    if (cap > INT_MAX || !(s->token = malloc(cap * sizeof *s->token)))
        return no_memory();
    if (is_chat(s))
        n = lfm2_chat(s->words, msgs + first, 2 - first, 1, s->token, (int)cap);
    else
        n = lfm2_encode(s->words, t->s, t->n, flags, s->token, (int)cap);
    if (n == LFM2_ENOMEM)
        return no_memory();
    if (n < 0 || (size_t)n > cap) {
        complain("the prompt cannot be encoded: longer than 1 GiB, or the "
                 "vocabulary has no <|im_start|> (see --raw)");
        return EXIT_MODEL;
    }
    s->n_prompt = n;
    return EXIT_DONE;
}

/* The tokens of the prompt, from --ids or from text. */
static int load_prompt(struct session *s)
{
    struct text t = { 0 };
    int code;

    if (s->opt.ids)
        return read_ids(s);
    if (!s->words) {
        complain("%s: no vocabulary in it; give one with --tokenizer, or the "
                 "prompt with --ids", s->opt.model);
        return EXIT_MODEL;
    }
    code = read_prompt(&s->opt, &t);
    if (code == EXIT_DONE && memchr(t.s, '\0', t.n) && is_chat(s)) {
        complain("the prompt has a NUL byte, expected text");
        code = EXIT_USAGE;
    }
    if (code == EXIT_DONE)
        code = encode_prompt(s, &t);
    free(t.s);
    if (code == EXIT_DONE && s->n_prompt == 0) {
        complain("the prompt is empty, expected at least one token");
        code = EXIT_USAGE;
    }
    return code;
}

/* -------------------------------------------------------------- tokenizing */

/* One text, one line of ids. */
static int tokenize_one(const struct session *s, const char *text, size_t n)
{
    const int flags = (s->opt.bos ? LFM2_ENCODE_BOS : 0) |
                      (s->opt.special ? LFM2_ENCODE_SPECIAL : 0);
    int32_t *ids = malloc((n + 1) * sizeof *ids);
    int count = ids ? lfm2_encode(s->words, text, n, flags, ids,
                                  n < INT_MAX ? (int)n + 1 : 0) : LFM2_ENOMEM;

    if (count == LFM2_EARG) {
        complain("a text of %zu bytes, expected at most 1 GiB", n);
        free(ids);
        return EXIT_USAGE;
    }
    for (int i = 0; i < count; i++)
        printf("%s%ld", i ? " " : "", (long)ids[i]);
    if (count >= 0)
        putchar('\n');
    free(ids);
    return count < 0 ? no_memory() : EXIT_DONE;
}

static int tokenize(struct session *s)
{
    struct text t = { 0 };
    int code = open_words(s, 1);

    if (code == EXIT_DONE)
        code = read_prompt(&s->opt, &t);
    if (code == EXIT_DONE && !s->opt.null)
        code = tokenize_one(s, t.s, t.n);
    for (size_t at = 0, n; s->opt.null && code == EXIT_DONE && at < t.n;
         at += n + 1) {
        n = strlen(t.s + at);
        code = tokenize_one(s, t.s + at, n);
    }
    free(t.s);
    return code == EXIT_DONE ? close_output(stdout, "standard output") : code;
}

/* The text of one line of ids, which ends at `end`. */
static int detokenize_line(const struct session *s, char *line, char *end)
{
    while (line < end) {
        char *after;
        long id = strtol(line, &after, 10);
        int len;

        if (after == line && line + strspn(line, " \t\r") == end)
            break;
        if (after == line || id < 0 || id >= lfm2_n_vocab(s->words)) {
            complain("standard input: \"%.20s\", expected ids from 0 to %d",
                     line, lfm2_n_vocab(s->words) - 1);
            return EXIT_USAGE;
        }
        const char *bytes = lfm2_token_bytes(s->words, (int32_t)id,
                                             s->opt.special, &len);
        fwrite(bytes, 1, (size_t)len, stdout);
        line = after;
    }
    putchar(s->opt.null ? '\0' : '\n');
    return EXIT_DONE;
}

static int detokenize(struct session *s)
{
    struct text t = { 0 };
    int code = open_words(s, 1);

    if (code == EXIT_DONE)
        code = read_file(&t, "-");
    for (char *line = t.s; code == EXIT_DONE && line < t.s + t.n;) {
        char *end = line + strcspn(line, "\n");
        *end = '\0';
        code = detokenize_line(s, line, end);
        line = end + 1;
    }
    free(t.s);
    return code == EXIT_DONE ? close_output(stdout, "standard output") : code;
}

static int export_tokenizer(struct session *s)
{
    int code = open_words(s, 1);
    size_t n = code == EXIT_DONE ? lfm2_tokenizer_export(s->words, NULL, 0) : 0;
    char *buf = malloc(n + 1);
    FILE *f;

    if (code == EXIT_DONE && !buf)
        code = no_memory();
    if (code == EXIT_DONE && !(f = open_output(s->opt.export)))
        code = EXIT_FILE;
    if (code == EXIT_DONE) {
        lfm2_tokenizer_export(s->words, buf, n);
        fwrite(buf, 1, n, f);
        code = close_output(f, s->opt.export);
    }
    free(buf);
    return code;
}

/* -------------------------------------------------------------- inspecting */

static void print_layers(const lfm2_config *c)
{
    printf("layers          ");
    for (int il = 0; il < c->n_layer; il++)
        putchar(c->is_attn[il] ? 'A' : 'c');
    printf("  (c short convolution, A attention)\n");
    if (c->n_expert > 0)
        printf("experts         layers %d to %d, %d of %d for each token, %d "
               "wide\n", c->n_layer_dense, c->n_layer - 1, c->n_expert_used,
               c->n_expert, c->n_ff_expert);
}

/* Bytes and parameters by weight type, in the order they first appear. */
static void print_types(const lfm2_model *m)
{
    struct { const char *name; int n; double bytes, params; } type[32];
    int n_types = 0, k;
    lfm2_tensor_info t;

    for (int i = 0; lfm2_model_tensor(m, i, &t) == LFM2_OK; i++) {
        for (k = 0; k < n_types && strcmp(type[k].name, t.type) != 0; k++)
            ;
        if (k == n_types) {
            type[n_types].name = t.type;
            type[n_types].n = 0;
            type[n_types].bytes = type[n_types].params = 0;
            n_types++;
        }
        type[k].n++;
        type[k].bytes += (double)t.n_bytes;
        type[k].params += (double)t.dims[0] * (double)t.dims[1] *
                          (double)t.dims[2] * (double)t.dims[3];
    }
    for (k = 0; k < n_types; k++)
        printf("%-16s%4d tensors %12.2f MB %7.2f bits per weight\n",
               type[k].name, type[k].n, type[k].bytes / 1e6,
               type[k].bytes * 8 / type[k].params);
}

static void print_memory(const struct session *s)
{
    const lfm2_config *c = lfm2_model_config(s->model);
    lfm2_params p = params_of(s);
    int n_attn = 0;

    for (int il = 0; il < c->n_layer; il++)
        n_attn += c->is_attn[il];
    printf("KV cache        %.1f KiB per token; conv state %.1f KiB\n",
           2.0 * n_attn * c->n_head_kv * c->head_dim *
           (p.kv_type == LFM2_KV_F16 ? 2 : 4) / 1024,
           4.0 * (c->n_layer - n_attn) * (c->l_cache - 1) * c->n_embd / 1024);
    printf("memory          %.1f MB beside the model at context %d, batch "
           "%d\n", (double)lfm2_context_size(s->model, &p) / 1e6, p.n_ctx,
           p.n_batch);
}

static void print_model(const struct session *s)
{
    const lfm2_config *c = lfm2_model_config(s->model);
    uint64_t total, active;
    char value[96];
    const char *key;

    for (int i = 0; (key = lfm2_model_key(s->model, i, value, sizeof value));
         i++)
        if (strcmp(key, "general.architecture") == 0 ||
            strcmp(key, "general.name") == 0)
            printf("%-16s%s\n", key + 8, value);
    lfm2_model_params(s->model, &total, &active);
    if (total >= 100000000)
        printf("size            %.2f B parameters, %.2f B active\n",
               (double)total / 1e9, (double)active / 1e9);
    else
        printf("size            %.2f M parameters, %.2f M active\n",
               (double)total / 1e6, (double)active / 1e6);
    printf("width           %d, %d layers, %d heads of %d (%d for keys and "
           "values)\n", c->n_embd, c->n_layer, c->n_head, c->head_dim,
           c->n_head_kv);
    printf("feed-forward    %d wide, convolutions of %d taps\n", c->n_ff,
           c->l_cache);
    printf("positions       trained for %d, rotation base %g, norm epsilon "
           "%g\n", c->n_ctx_train, (double)c->rope_freq_base,
           (double)c->norm_rms_eps);
    print_layers(c);
    if (s->words)
        printf("vocabulary      %d tokens, BOS %ld%s, end of turn %ld\n",
               c->n_vocab, (long)lfm2_bos(s->words),
               lfm2_add_bos(s->words) ? "" : " (not added)",
               (long)lfm2_token_id(s->words, "<|im_end|>"));
    else
        printf("vocabulary      %d rows, no tokenizer in the file\n",
               c->n_vocab);
    printf("chat format     %s\n", is_chat(s) ? "yes" : "none (plain text)");
}

static int inspect(struct session *s)
{
    int code = open_model(s);

    if (code == EXIT_DONE)
        code = open_words(s, 0);
    if (code != EXIT_DONE)
        return code;
    printf("file            %s\n", s->opt.model);
    print_model(s);
    print_types(s->model);
    print_memory(s);
    for (int i = 0; lfm2_model_warning(s->model, i); i++)
        printf("tolerated       %s\n", lfm2_model_warning(s->model, i));
    return close_output(stdout, "standard output");
}

/* ------------------------------------------------------------------ logits */

static volatile sig_atomic_t interrupted;
static lfm2_context *volatile running;    /* what Ctrl-C has to stop         */

/* The first Ctrl-C ends the answer, a second one the program. */
static void on_interrupt(int signal_number)
{
    (void)signal_number;
    interrupted = 1;
    if (running)
        lfm2_cancel(running);
    signal(SIGINT, SIG_DFL);
}

static int prompt_too_long(const struct session *s)
{
    const int n_ctx = lfm2_context_params(s->ctx).n_ctx;

    if (s->n_prompt <= n_ctx)
        return EXIT_DONE;
    complain("the prompt has %d tokens, expected at most %d (the context, -c)",
             s->n_prompt, n_ctx);
    return EXIT_CONTEXT;
}

static int write_logits(const float *logits, size_t n, FILE *f)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        unsigned char b[4];

        memcpy(&u, &logits[i], 4);
        for (int k = 0; k < 4; k++)
            b[k] = (unsigned char)(u >> 8 * k);
        if (fwrite(b, 1, 4, f) != 4)
            return -1;
    }
    return 0;
}

/* Feed the prompt in pieces, so that their logits fit in little memory. */
static int logits_of_prompt(struct session *s, FILE *f)
{
    enum { PIECE = 32 };
    const size_t n_vocab = (size_t)lfm2_model_config(s->model)->n_vocab;
    lfm2_error err = { 0 };

    for (int done = 0, n; done < s->n_prompt; done += n) {
        n = s->n_prompt - done < PIECE ? s->n_prompt - done : PIECE;
        lfm2_span span = { 0, s->token + done, n, n };
        if (lfm2_forward(s->ctx, &span, 1, &err) != LFM2_OK)
            return library_error(s->opt.ids ? s->opt.ids : "the prompt", &err);
        if (write_logits(lfm2_logits(s->ctx, 0, 0), (size_t)n * n_vocab, f))
            return file_error(s->opt.logits);
    }
    return EXIT_DONE;
}

static int save_logits(struct session *s)
{
    FILE *f;
    int code, closed;

    if (s->opt.n_ctx == 0)
        s->opt.n_ctx = s->n_prompt;       /* all of it, whatever the default */
    code = open_context(s, 32);
    if (code == EXIT_DONE)
        code = prompt_too_long(s);
    if (code != EXIT_DONE)
        return code;
    f = open_output(s->opt.logits);
    if (!f)
        return EXIT_FILE;
    running = s->ctx;
    code = logits_of_prompt(s, f);
    running = NULL;
    closed = close_output(f, s->opt.logits);
    return code == EXIT_DONE ? closed : code;
}

/* -------------------------------------------------------------- generating */

/* A terminal gets no control bytes but line breaks and tabs. */
static void put_text(const char *s, size_t n)
{
    const int is_terminal = isatty(STDOUT_FILENO);

    for (size_t i = 0; i < n; i++)
        if (!is_terminal || (unsigned char)s[i] >= ' ' || s[i] == '\n' ||
            s[i] == '\t')
            putchar(s[i]);
    if (is_terminal)
        fflush(stdout);
}

/* Write a token, as far as it completes characters; its id, if the model has no
 * words for it. */
static int say(const struct session *s, lfm2_utf8 *held, int32_t token)
{
    char out[259];
    int len = 0;

    if (s->words) {
        const char *bytes = lfm2_token_bytes(s->words, token, s->opt.special,
                                             &len);
        for (int at = 0, n; at < len; at += n) {
            n = len - at < 256 ? len - at : 256;
            put_text(out, lfm2_utf8_push(held, bytes + at, (size_t)n, out));
        }
    } else
        printf("%ld\n", (long)token);
    return ferror(stdout) ? file_error("standard output") : EXIT_DONE;
}

static int feed(struct session *s, const int32_t *tokens, int n)
{
    const lfm2_span span = { 0, tokens, n, 1 };
    lfm2_error err = { 0 };

    if (lfm2_forward(s->ctx, &span, 1, &err) == LFM2_OK)
        return EXIT_DONE;
    return interrupted ? EXIT_INTERRUPTED
                       : library_error(s->opt.ids ? s->opt.ids : "the prompt",
                                       &err);
}

struct timing { double prompt, answer; int n_answer; };

/* Token after token, until the model ends its turn, n_predict are reached or
 * the context is full. */
static int generate(struct session *s, lfm2_sampler *sampler,
                    lfm2_utf8 *held, struct timing *time)
{
    const int n_ctx = lfm2_context_params(s->ctx).n_ctx;
    int n = s->n_prompt, code = EXIT_DONE;

    while (code == EXIT_DONE && time->n_answer != s->opt.n_predict) {
        const int32_t token = lfm2_sample(s->ctx, sampler,
                                          lfm2_logits(s->ctx, 0, 0), s->token,
                                          n);
        if (token < 0) {
            complain("%s: the model computes numbers that are not finite",
                     s->opt.model);
            return EXIT_RUNTIME;
        }
        if (s->words && lfm2_is_eog(s->words, token))
            break;
        s->token[n++] = token;
        time->n_answer++;
        code = say(s, held, token);
        if (n > n_ctx) {
            if (!s->opt.quiet)
                complain("the context of %d tokens is full (see -c)", n_ctx);
            break;
        }
        if (code == EXIT_DONE && time->n_answer != s->opt.n_predict)
            code = feed(s, &token, 1);
    }
    return code;
}

static void print_timing(const struct session *s, const struct timing *t)
{
    if (s->opt.quiet || !(s->opt.verbose || isatty(STDERR_FILENO)))
        return;
    complain("prompt %d tokens, %.1f tok/s; answer %d tokens, %.1f tok/s",
             s->n_prompt, s->n_prompt / t->prompt, t->n_answer,
             t->answer > 0 ? t->n_answer / t->answer : 0.0);
}

/* Make room for the answer behind the prompt. */
static int grow_tokens(struct session *s)
{
    const size_t n = (size_t)lfm2_context_params(s->ctx).n_ctx + 1;
    int32_t *token = realloc(s->token, n * sizeof *token);

    if (!token)
        return no_memory();
    s->token = token;
    return EXIT_DONE;
}

static int answer(struct session *s)
{
    const struct options *o = &s->opt;
    lfm2_sampler sampler = {
        .temperature = o->temperature, .top_k = o->top_k, .top_p = o->top_p,
        .min_p = o->min_p, .repeat_penalty = o->repeat_penalty,
        .repeat_last_n = o->repeat_last_n, .rng = o->seed
    };
    struct timing time = { 0 };
    lfm2_utf8 held = { 0 };
    char rest[3];
    double start = now();
    int code, closed;

    running = s->ctx;
    code = feed(s, s->token, s->n_prompt);
    time.prompt = now() - start;
    start = now();
    if (code == EXIT_DONE)
        code = generate(s, &sampler, &held, &time);
    time.answer = now() - start;
    running = NULL;
    put_text(rest, lfm2_utf8_push(&held, NULL, 0, rest));
    if (s->words && (code == EXIT_DONE || code == EXIT_INTERRUPTED))
        putchar('\n');
    closed = close_output(stdout, "standard output");
    print_timing(s, &time);
    return code == EXIT_DONE ? closed : code;
}

/* -------------------------------------------------------------------- main */

static uint64_t random_seed(void)
{
    struct timespec t;

    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000007u + (uint64_t)t.tv_nsec * 7919u +
           (uint64_t)getpid();
}

/* What depends on other options or on the model.  The repetition penalty goes
 * with the published temperature; greedy means the likeliest token. */
static void choose_defaults(struct session *s)
{
    if (!s->opt.has_seed)
        s->opt.seed = random_seed();
    if (s->opt.temperature == 0 && !s->opt.has_penalty)
        s->opt.repeat_penalty = 1;
    if (!s->opt.has_predict)
        s->opt.n_predict = is_chat(s) ? -1 : 256;
    if (s->opt.verbose)
        complain("%s, seed %llu, temperature %g, top-k %d, top-p %g, min-p "
                 "%g, repeat penalty %g over %d",
                 is_chat(s) ? "chat" : "plain text",
                 (unsigned long long)s->opt.seed, (double)s->opt.temperature,
                 s->opt.top_k, (double)s->opt.top_p, (double)s->opt.min_p,
                 (double)s->opt.repeat_penalty, s->opt.repeat_last_n);
}

static int run_model(struct session *s)
{
    int code = open_model(s);

    if (code == EXIT_DONE)
        code = open_words(s, 0);
    if (code == EXIT_DONE)
        code = load_prompt(s);
    if (code != EXIT_DONE)
        return code;
    if (s->opt.logits)
        return save_logits(s);
    choose_defaults(s);
    code = open_context(s, 1);
    if (code == EXIT_DONE)
        code = prompt_too_long(s);
    if (code == EXIT_DONE)
        code = grow_tokens(s);
    return code == EXIT_DONE ? answer(s) : code;
}

static int dispatch(struct session *s)
{
    const struct options *o = &s->opt;

    if (o->help) {
        print_help(stdout);
        return close_output(stdout, "standard output");
    }
    if (o->version) {
        print_version();
        return close_output(stdout, "standard output");
    }
    if (!o->model) {
        complain("no model: usage: run [options] MODEL.gguf [PROMPT], or run "
                 "--help");
        return EXIT_USAGE;
    }
    if (o->tokenize + o->detokenize + o->inspect + !!o->export +
        !!o->logits > 1) {
        complain("more than one of --tokenize, --detokenize, --inspect, "
                 "--export-tokenizer and --logits");
        return EXIT_USAGE;
    }
    return o->tokenize ? tokenize(s) : o->detokenize ? detokenize(s)
         : o->inspect ? inspect(s) : o->export ? export_tokenizer(s)
         : run_model(s);
}

int main(int argc, char **argv)
{
    struct session s = { .opt = {
        .n_predict = -1, .temperature = 0.3f, .top_p = 1, .min_p = 0.15f,
        .repeat_penalty = 1.05f, .repeat_last_n = 64
    } };
    int code = parse_options(&s.opt, argc, argv);

    signal(SIGINT, on_interrupt);
    signal(SIGPIPE, SIG_IGN);
    if (code == EXIT_DONE)
        code = dispatch(&s);
    close_session(&s);
    return code;
}
