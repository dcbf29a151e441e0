/* run.c - the command line of lfm2.c.
 *
 * Standard output carries the model's words, or the data that was asked for,
 * and nothing else; everything meant for a human being goes to standard error.
 *
 * Sections 2 to 9 are the program, in the order it is meant to be read; the
 * others are what it is made with.
 *
 *   1  messages, memory, text          12  signals and the terminal
 *   2  settings and main               13  JSON
 *   3  the model in use                14  chat templates
 *   4  request, reply, step            15  tool calls
 *   5  sinks                           16  tokens in and out
 *   6  what a body asks for            17  --inspect
 *   7  answers, conversations          18  traces
 *   8  chat                            19  --ppl
 *   9  --batch                         20  --bench
 *  10  the command line                21  --selftest
 *  11  files and text                  22  the sandbox
 *                                      23  answers in a schema */

#ifdef __cplusplus
#error "this is C: compile it with a C compiler; C++ includes lfm2.h"
#include "a C compiler"                   /* which ends it here              */
#endif

#define _POSIX_C_SOURCE 200809L
#define _GNU_SOURCE                       /* mincore(), memmem()             */
#define _DARWIN_C_SOURCE                  /* macOS: ru_maxrss                */
#define _FILE_OFFSET_BITS 64              /* on 32-bit machines, too         */

#include "lfm2.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <fnmatch.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#ifndef LFM2_NO_THREADS
#include <pthread.h>
#include <stdatomic.h>
#endif
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifndef LFM2_NO_MMAP
#include <sys/mman.h>
#endif
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#ifdef __GLIBC__
#include <gnu/libc-version.h>
#endif
#ifndef __wasi__
#include <sys/ioctl.h>
#include <termios.h>
#else

/* WebAssembly has one process, no signals, files without owners, and no way to
 * know whether a read would wait. */
#define poll(fds, n, timeout) ((void)(fds), (void)(timeout), 1)

struct sigaction { void (*sa_handler)(int); };

static void sigaction(int number, const struct sigaction *now, void *before)
{
    (void)before;
    signal(number, now->sa_handler);
}

static int mkstemp(char *name)
{
    memset(name + strlen(name) - 6, '_', 6);
    return open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
}

static int fchmod(int fd, mode_t mode)
{
    (void)fd;
    (void)mode;
    return 0;
}

#endif

/* ------------------------------------------------ 1. Messages and exit codes
 *
 * Other programs act on these numbers, so they never change their meaning. */

enum {
    DONE = 0, FAILED = 1, USAGE = 2, BAD_FILE = 3, BAD_MODEL = 4,
    NO_MEMORY = 5, TOO_LONG = 6, PARTLY = 7, SELFTEST_FAILED = 8,
    INTERRUPTED = 130, TERMINATED = 143
};

static const char *program = "run";       /* the name it was called by       */

/* The length of the well-formed UTF-8 character at s < end, and what it is; or
 * 0 and the replacement character. */
static int utf8_get(const char *s, const char *end, uint32_t *out)
{
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    const unsigned char c = (unsigned char)*s;
    const int n = c < 0x80 ? 1 : c < 0xc2 || c > 0xf4 ? 0 : c < 0xe0 ? 2 :
                  c < 0xf0 ? 3 : 4;
    uint32_t u = n == 1 ? c : c & (0x7f >> n);

    *out = 0xfffd;
    if (n > end - s)
        return 0;
    for (int i = 1; i < n; i++) {
        if ((s[i] & 0xc0) != 0x80)
            return 0;
        u = u << 6 | (s[i] & 0x3f);
    }
    if (n == 0 || u < least[n] || u > 0x10ffff || u >> 11 == 0xd800 >> 11)
        return 0;
    *out = u;
    return n;
}

/* Those of C1, too: U+009B begins what ESC [ does. */
static int is_control(uint32_t c)
{
    return c < ' ' || (c >= 0x7f && c < 0xa0);
}

/* Drop what could steer a terminal: control characters, and bytes of no
 * character that would end one together with what comes before them. */
static size_t drop_controls(char *s, size_t n)
{
    const char *const end = s + n, *from = s;
    size_t kept = 0;
    uint32_t c;

    for (int size; from < end; from += size) {
        size = utf8_get(from, end, &c);
        if (size == 0) {
            c = (unsigned char)*from;
            size = 1;
        }
        if (is_control(c) && c != '\n' && c != '\t')
            continue;
        memmove(s + kept, from, (size_t)size);
        kept += (size_t)size;
    }
    return kept;
}

/* It may quote what is hostile. */
static void print_line(const char *fmt, va_list args)
{
    char s[4096];
    const int error = errno;
    int n = vsnprintf(s, sizeof s, fmt, args);

    n = n < (int)sizeof s ? n : (int)sizeof s - 1;
    n = (int)drop_controls(s, n > 0 ? (size_t)n : 0);
    fprintf(stderr, "%s: %.*s\n", program, n, s);
    errno = error;
}

/* One line on standard error; returns `code` for the caller to pass on. */
static int say(int code, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    print_line(fmt, args);
    va_end(args);
    return code;
}

static int quiet;                         /* -q: errors only                 */

/* Worth knowing, but no error. */
static void note(const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    if (!quiet)
        print_line(fmt, args);
    va_end(args);
}

/* ---- memory
 *
 * Where there is none, the program ends with one sentence: what it has written
 * so far is whole, and a batch can be resumed. */

/* realloc() that succeeds. */
static void *resize(void *p, size_t n)
{
    p = realloc(p, n > 0 ? n : 1);
    if (!p)
        exit(say(NO_MEMORY, "no memory for %zu bytes", n));
    return p;
}

/* n zeroed elements; freed by the caller. */
static void *zeroed(size_t n, size_t size)
{
    void *p = n < SIZE_MAX / 2 / (size ? size : 1) ? calloc(n ? n : 1, size) :
              NULL;

    if (!p)
        exit(say(NO_MEMORY, "no memory for %zu times %zu bytes", n, size));
    return p;
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

/* The library's errors in the terms of the shell. */
static int status_of(int code)
{
    static const int status[] = {
        [-LFM2_OK] = DONE, [-LFM2_EARG] = USAGE, [-LFM2_EIO] = BAD_FILE,
        [-LFM2_EFORMAT] = BAD_MODEL, [-LFM2_EUNSUPPORTED] = BAD_MODEL,
        [-LFM2_ENOMEM] = NO_MEMORY, [-LFM2_EFULL] = TOO_LONG,
        [-LFM2_ECANCELLED] = INTERRUPTED, [-LFM2_ENAN] = FAILED
    };

    return status[-code];
}

/* Everything written must have arrived: disks fill up, readers leave, who need
 * not be told. */
static int flush_output(int code)
{
    if ((fflush(stdout) == 0 && !ferror(stdout)) ||
        (code != DONE && code != INTERRUPTED))
        return code;
    return errno == EPIPE ? BAD_FILE :
           say(BAD_FILE, "standard output: %s", strerror(errno));
}

/* ---- text and numbers */

/* Text that grows.  s[n] is NUL, or s is NULL. */
struct text { char *s; size_t n, cap; };

struct ids { int32_t *id; int n; };

/* Make room for `more` bytes and the NUL. */
static void reserve(struct text *t, size_t more)
{
    size_t cap = t->cap ? t->cap : 64;

    while (cap <= t->n + more && cap <= SIZE_MAX / 2)
        cap *= 2;
    if (cap > t->cap)
        t->s = resize(t->s, cap > t->n + more ? cap : SIZE_MAX);
    t->cap = cap > t->cap ? cap : t->cap;
    t->s[t->n] = '\0';
}

static void add(struct text *t, const char *s, size_t n)
{
    reserve(t, n);
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

/* Some bytes within a text. */
struct piece { const char *s; size_t n; };

/* A few words, made on the spot. */
struct phrase { char s[128]; };

static struct phrase *write_phrase(struct phrase *out, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    vsnprintf(out->s, sizeof out->s, fmt, args);
    va_end(args);
    return out;
}

/* A macro: tcc 0.9.27 mistakes the arguments of a variadic function that
 * returns a struct. */
#define phrase(...) (*write_phrase(&(struct phrase) { "" }, __VA_ARGS__))

/* "23.84 B" parameters or, with unit "B", "13.51 GB". */
static struct phrase amount(double n, const char *unit)
{
    const char *letter = n >= 1e9 ? *unit ? "G" : "B" :
                         n >= 1e6 ? "M" : n >= 1e3 ? "K" : "";
    const double scale = n >= 1e9 ? 1e9 : n >= 1e6 ? 1e6 : n >= 1e3 ? 1e3 : 1;

    return phrase("%.*f %s%s", scale > 1 ? 2 : 0, n / scale, letter, unit);
}

/* Numbers in files are little-endian. */
static void put_le(unsigned char *p, uint64_t x, int n_bytes)
{
    for (int i = 0; i < n_bytes; i++)
        p[i] = x >> 8 * i & 255;
}

static uint64_t get_le(const unsigned char *p, int n_bytes)
{
    uint64_t x = 0;

    for (int i = 0; i < n_bytes; i++)
        x |= (uint64_t)p[i] << 8 * i;
    return x;
}

static void add_le(struct text *to, uint64_t x, int n_bytes)
{
    unsigned char b[8];

    put_le(b, x, n_bytes);
    add(to, (char *)b, (size_t)n_bytes);
}

static uint32_t float_bits(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* FNV-1a, to be begun with HASH_START. */
#define HASH_START 0xcbf29ce484222325u

static uint64_t hash_number(uint64_t h, uint64_t x)
{
    return (h ^ x) * 0x100000001b3u;
}

static uint64_t hash_bytes(uint64_t h, const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        h = hash_number(h, (unsigned char)s[i]);
    return h;
}

static double seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

/* ---- what is defined further down
 *
 * Sections 2 to 9 are the program; the rest is what it is made with. */

/* Section 13: memory that is released at once, and JSON that is only read.  All
 * before `key` is the value, from there on its place in another. */
struct chunk { struct chunk *next; size_t used, size; };

struct pool { struct chunk *chunks; size_t total; };

enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY,
       JSON_OBJECT };

struct json {
    int type;
    int n_members;
    const char *s;                        /* of a string or number           */
    size_t n;
    struct json *first;                   /* its members                     */
    const char *key;                      /* in an object                    */
    size_t n_key;
    struct json *next;
};

/* Section 14: the templates, in the order of --template, and marks in what they
 * write. */
enum {
    TEMPLATE_AUTO, TEMPLATE_LFM2, TEMPLATE_INSTRUCT, TEMPLATE_NEW, TEMPLATE_VL,
    TEMPLATE_8B, TEMPLATE_26B, TEMPLATE_NONE
};

#define TEMPLATES \
    "auto|lfm2|lfm2.5-instruct|lfm2.5-new|lfm2.5-vl|lfm2.5-8b-a1b|" \
    "lfm2.5-2.6b|none"

#define BOS        "<|startoftext|>"
#define TURN_START "<|im_start|>"
#define TURN_END   "<|im_end|>"
#define CALL_START "<|tool_call_start|>"
#define CALL_END   "<|tool_call_end|>"
#define THINK      "<think>"
#define THINK_END  "</think>"

struct conversation {
    const struct json *messages, *tools;  /* arrays; tools may be NULL       */
    const char *date;                     /* YYYY-MM-DD                      */
    int generate;                         /* an answer is to follow          */
    int keep_thinking;                    /* of past answers                 */
    int continue_last;                    /* the last message goes on        */
    int open_thought;                     /* the answer begins with <think>  */
};

struct mark { size_t from, n; };

struct rendered {
    struct text text;
    struct mark *mark;                    /* control tokens, in order        */
    int n_marks;
    int lost_calls;                       /* that the template passed over   */
};

/* Section 15: what the model wants to be called, its arguments as a JSON
 * object. */
struct call { struct text name, arguments; };

struct calls { struct call *call; int n; };

/* Section 12. */
static volatile sig_atomic_t is_dim;      /* the text at the terminal        */
static volatile sig_atomic_t interrupted, last_signal;
static lfm2_context *volatile running;    /* what a signal is to stop        */

/* ------------------------------------------------------ 2. Settings and main
 *
 * What the command line asks for; section 10 reads it. */

enum {
    UNSET = INT_MIN,                      /* then it depends on the model    */
    MAX_CTX = 1 << 24, MAX_LIST = 16, MAX_LOOKUP = 15, MAX_LOGPROBS = 20,
    PLAIN_LENGTH = 256                    /* tokens of plain text, unless -n */
};

/* What the program is to do. */
enum mode {
    ANSWER = 1, CHAT = 2, BATCH = 4, LOGITS = 8, DUMP = 16, TOKENIZE = 32,
    DETOKENIZE = 64, EXPORT = 128, INSPECT = 256, PPL = 512, BENCH = 1024,
    SELFTEST = 2048,
    TALK = ANSWER | CHAT, PROMPT = TALK | LOGITS | DUMP,
    GENERATE = TALK | BATCH, RUN = GENERATE | LOGITS | DUMP | PPL,
    WORDS = TOKENIZE | DETOKENIZE | EXPORT, ANY = 4095
};

struct list { int n, v[MAX_LIST]; };      /* numbers, by commas              */

struct texts { int n; const char *v[MAX_LIST]; };     /* of repeated options */

struct bias { int32_t id; float by; };

struct sampling {
    double temp;
    int top_k;
    double top_p, min_p, repeat;
    int last_n;                           /* -1: all                         */
};

/* How an answer is made.  Options fill the first half, and so does the body of
 * a request; the rest follows from the prompt. */
struct request {
    struct sampling sampling;
    double presence, frequency;           /* taken off what was said before  */
    int limit;                            /* most tokens; < 0: to the end    */
    int think_budget;                     /* most tokens of thought; -1: any */
    int ignore_eos, echo;                 /* echo: the prompt is told, too   */
    int logprobs, prompt_logprobs;        /* how many alternatives; -1: off  */
    long long seed;                       /* -1: random                      */
    struct texts stop;
    struct bias *bias;                    /* [n_bias]                        */
    int n_bias;
    struct ids prompt;
    struct schema *schema;                /* NULL: any text                  */
    int is_completion;                    /* of plain text, not of messages  */
    int in_thought;                       /* the prompt has opened one       */
};

enum { MAX_OPTIONS = 96 };

struct settings {
    int mode;                             /* 0: none named                   */
    const char *given[MAX_OPTIONS];       /* by which name, in table order   */
    const char *model, *prompt, *file, *system, *system_file, *messages;
    const char *tools, *session, *save_dir, *ids, *logits, *export_to;
    const char *tokenizer, *ppl, *date, *trace, *trace_tokens, *trace_raw;
    const char *shard, *resume, *json_schema;
    struct texts trace_filter;
    struct request ask;
    int raw, dump_prompt, dump_tokens, null, bos, special, json;
    int template, think, color, sandbox, quiet, verbose, help, version;
    int ctx, threads, batch, isa, kv, lookup, no_mmap, parallel, piece;
    struct list bench_prompt, bench_gen, bench_depth, bench_threads;
    struct list bench_seqs;
    int reps, output;
};

/* In the order of the words of --think, --color, --sandbox and -o. */
enum { THINK_AUTO, THINK_SHOW, THINK_HIDE, THINK_RAW };
enum { COLOR_AUTO, COLOR_ON, COLOR_OFF };
enum { SANDBOX_AUTO, SANDBOX_REQUIRE, SANDBOX_OFF };
enum { MD, JSON };

static const struct settings defaults = {
    .ask = {
        .sampling = { UNSET, UNSET, UNSET, UNSET, UNSET, UNSET },
        .limit = UNSET, .think_budget = -1, .logprobs = -1,
        .prompt_logprobs = -1, .seed = -1
    },
    .ctx = UNSET, .batch = UNSET, .lookup = UNSET, .parallel = 32,
    .piece = UNSET,
    .bench_prompt = { 1, { 512 } }, .bench_gen = { 1, { 128 } },
    .bench_depth = { 1, { 0 } }, .bench_threads = { 1, { 0 } },
    .bench_seqs = { 1, { 1 } }, .reps = 5
};

enum kind { HEADING, FLAG, WHOLE, SEED, REAL, CHOICE, TEXT, TEXTS, LIST };

/* A row without names is for bodies of requests only; one without help is not
 * listed.  An option that names a mode has it as `mode`. */
struct option {
    enum kind kind;
    const char *names;                    /* by spaces                       */
    const char *arg;                      /* of a CHOICE, the words by |     */
    size_t at;                            /* in struct settings              */
    double min, max;
    const char *json;                     /* names in a body, by spaces      */
    int modes, mode;
    const char *help;
};

#define AT(field) offsetof(struct settings, field)

/* ---- what is defined further down
 *
 * Sections 2 to 9 are the program, the others what it is made with. */

struct engine;
struct talk;
struct reply;
struct guide;

/* 7. Answers, conversations, sessions */
static int work_on_model(const struct settings *s);

/* 8. Chat */
static int chat(struct talk *t);

/* 9. --batch */
static int batch(const struct settings *s);

/* 10. The command line */
static int find_word(const char *words, int separator, const char *word);
static const struct option *option_of_member(const char *key);
static const char *isa_name(int isa);
static const char *kv_name(int kv_type);
static int print_help(void);
static int print_version(void);
static struct phrase values_of(const struct option *o);
static int add_text(struct texts *to, const char *s);
static int set_number(void *slot, const struct option *o, double x,
                      long long whole);
static int is_dash(const char *path);
static const char *chat_option(const struct settings *s);
static int parse(struct settings *to, char **argv);

/* 11. Files and text */
static void show_text(struct text *t);
static int read_file(const char *path, struct text *out);
static size_t read_head(const char *path, char *to, size_t n);
static FILE *create_file(const char *path);
static int finish_file(FILE *f, const char *path, int code);
static int can_replace(const char *path);
static int replace_file(const char *path, const struct text *part, int n_parts);
static int open_file(lfm2_model **out, const char *path, int no_mmap, int any,
                     lfm2_error *err);
static int report(const char *path, const lfm2_error *err);
static void clean_text(struct text *t);
static int check_text(const struct text *t, const char *name);
static int read_text_file(const char *path, struct text *out);
static int read_prompt(const struct settings *s, struct text *out);
static int read_ids(const char *path, struct ids *out);

/* 12. Signals and the terminal */
static void block_signals(int are_blocked);
static void catch_interrupt(void);
static void watch_file(const char *path);
static int read_message(struct text *out, int shows);
static void prepare_process(char **argv);

/* 13. JSON */
static void pool_free(struct pool *p);
static size_t utf8_put(char *out, uint32_t c);
static int json_is(const struct json *v, int type);
static struct json *json_get(const struct json *object, const char *key);
static const struct json *given(const struct json *object, const char *key);
static const char *json_text(const struct json *v);
static int json_bool(const struct json *v, int *out);
static int json_double(const struct json *v, double *out);
static int json_int(const struct json *v, long long least, long long most,
                    long long *out);
static int json_parse(struct pool *pool, const char *text, size_t n,
                      struct json **out, struct why *why);
static int json_parse_list(struct pool *pool, const struct text *t,
                           struct json **out, struct why *why);
static void add_json_string(struct text *t, const char *s, size_t n);
static void add_json(struct text *t, const struct json *v);
static void member(struct text *to, const char *key);
static void member_bytes(struct text *to, const char *key, const char *s,
                         size_t n);
static void member_text(struct text *to, const char *key, const char *s);
static void member_count(struct text *to, const char *key, uint64_t n);
static void member_real(struct text *to, const char *key, double x);
static void member_open(struct text *to, const char *key, const char *bracket);

/* 14. Chat templates */
static const char *template_name(int template);
static int template_is_dated(int template);
static void rendered_free(struct rendered *r);
static int begins(const char *s, const char *end, const char *word);
static const char *find(const char *s, const char *end, const char *word);
static int has_role(const struct json *message, const char *role);
static int render(const struct conversation *conv, int template,
                  struct rendered *out, struct why *why);
static int encode_rendered(const lfm2_tokenizer *words,
                           const struct rendered *r, int special,
                           struct ids *out, struct why *why);
static void today(char date[11]);
static int choose_template(const lfm2_model *model, const lfm2_tokenizer *words,
                           int *known, struct why *evidence);

/* 15. Tool calls */
static void free_calls(struct calls *calls);
static int parse_calls(const char *s, size_t n, int cut, struct calls *out,
                       struct text *rest);

/* 16. Tokens in and out */
static int open_words(const struct settings *s, const lfm2_model *model,
                      lfm2_tokenizer **out);
static int encode_plain(const struct settings *s, const lfm2_tokenizer *words,
                        const char *text, size_t n, struct ids *out);
static int work_on_words(const struct settings *s);

/* 17. --inspect */
static int inspect_file(const struct settings *s);

/* 18. Traces */
static int open_trace(struct engine *e);
static int close_trace(struct engine *e, int code);

/* 19. --ppl */
static int perplexity(const struct settings *s);

/* 20. --bench */
static int bench(const struct settings *s);

/* 21. --selftest */
static int selftest(void);

/* 22. The sandbox */
static const char *save_dir(const struct settings *s);
static int enter_sandbox(const struct settings *s);
static int keep_file(const char *path, const struct text *part, int n_parts);

/* 23. Answers in a schema */
static int open_schema(struct engine *e);
static void close_schema(struct engine *e);
static void free_schema(struct schema *s);
static int read_form(const struct engine *e, struct request *q,
                     const struct json *body, const struct json *tools,
                     struct why *why);
static void start_guide(struct engine *e, struct reply *r);
static int is_guided_text(const struct reply *r);
static int guide_token(const struct reply *r, struct guide *g, const char *s,
                       size_t n);
static void end_guided(struct reply *r);
static int may_say(const struct engine *e, const struct reply *r, int32_t id);
static int32_t ask_again(struct engine *e, struct reply *r, float *logits);

static int work(const struct settings *s)
{
    switch (s->help ? 0 : s->version ? -1 : s->mode) {
    case 0: return print_help();
    case -1: return print_version();
    case SELFTEST: return selftest();
    case TOKENIZE: case DETOKENIZE: case EXPORT: return work_on_words(s);
    case PPL: return perplexity(s);
    case BENCH: return bench(s);
    case INSPECT: return inspect_file(s);
    case BATCH: return batch(s);
    default: return work_on_model(s);
    }
}

int main(int argc, char **argv)
{
    struct settings s = defaults;
    int code;

    prepare_process(argv);
    if (argc > 0 && argv[0][0])
        program = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    code = parse(&s, argc > 0 ? argv : (char *[]){ "run", NULL });
    code = flush_output(code == DONE ? work(&s) : code);
    return code == INTERRUPTED ? 128 + (int)last_signal : code;
}

/* ------------------------------------------------------ 3. The model in use
 *
 * What the machine gives, what a token costs, how a model wants its words
 * chosen; and then the model, its vocabulary and a context, opened together. */

enum {
    LOGITS_CHUNK = 64,                    /* rows of logits, of any prompt   */
    TRACE_BATCH = 64,                     /* tokens, as each takes much      */
    LOOKUP = 7,                           /* tokens guessed at once          */
    PROMPT_PIECE = 128,                   /* tokens read while others write  */
    EXACT_TRIM = 16                       /* tokens that can be taken back   */
};

/* A sequence of the context: what its cache holds, and for whom. */
struct slot { struct ids cached; struct job *job; double used; };

/* What is written of a pass, see section 18. */
struct trace {
    const struct settings *s;
    int code;                             /* DONE until something fails      */
    int first, last;                      /* positions to be shown           */
    int records, raw;                     /* descriptors; raw: -1 for none   */
    uint64_t offset;                      /* of what comes next in raw       */
    int has_some;                         /* behind the line about the model */
    struct text line, bytes;              /* a record, and its numbers       */
};

struct engine {
    const struct settings *s;
    lfm2_model *model;
    lfm2_tokenizer *words;                /* NULL: ids in, logits out        */
    lfm2_context *ctx;
    lfm2_params par;
    int template;                         /* TEMPLATE_NONE: plain text       */
    int opens_thought;                    /* the prompt ends with <think>    */
    int lookup;                           /* most tokens guessed at once     */
    int piece;                            /* of a prompt, while others write */
    struct sampling preset;
    char date[12];
    struct ids ends;                      /* tokens that end a turn          */
    struct trace *trace;                  /* NULL: nobody looks              */
    struct fetch *fetch;                  /* NULL: the file is in memory     */
    struct slot *slot;                    /* [n_seq]                         */
    struct job *jobs;                     /* waiting or active, oldest first */
    lfm2_span *span;                      /* [n_seq]                         */
    float *raw_logits;                    /* [n_vocab], before penalties     */
    int lost_calls;                       /* told already                    */
    struct pool pool;                     /* of this schema:                 */
    struct json *schema;                  /* --json-schema; NULL: none       */
    struct spelling *spelling;            /* NULL: not needed yet            */
};

/* ---- what the system gives
 *
 * On Linux a control group, as that of a container, may have less than the
 * machine: by its files in version 2, or in a tree of each controller's own in
 * version 1.  What limits a group limits the groups within it. */

static const char *groups = "/proc/self/cgroup", *group_root = "/sys/fs/cgroup";

/* The number in a file of a group's directory, the first or the second; 0 if it
 * has none, as where it says "max". */
static double number_in(const char *dir, const char *name, int second)
{
    char path[640];
    double x[2] = { 0, 0 };
    FILE *f;

    snprintf(path, sizeof path, "%s/%s", dir, name);
    f = fopen(path, "r");
    if (f) {
        (void)!fscanf(f, "%lf %lf", &x[0], &x[1]);
        fclose(f);
    }
    return x[second];
}

/* In whole CPUs.  Threads beyond the quota are stopped in the middle of their
 * work, and all others wait for them: two threads were faster than one with 1.5
 * CPUs, and slower with 1.2. */
static double cpu_limit(const char *dir)
{
    double quota = number_in(dir, "cpu.max", 0);
    double period = number_in(dir, "cpu.max", 1);

    if (quota <= 0) {
        quota = number_in(dir, "cpu.cfs_quota_us", 0);
        period = number_in(dir, "cpu.cfs_period_us", 0);
    }
    return quota > 0 && period > 0 ? fmax(1, floor(quota / period + 0.5)) : 0;
}

/* What a file of Linux says of `key`, behind a colon or a blank; or something
 * else. */
static struct phrase look_up(const char *path, const char *key,
                             const char *otherwise)
{
    FILE *f = fopen(path, "r");
    struct phrase out = phrase("%s", otherwise);
    const size_t n = strlen(key);
    char line[256];

    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, key, n) == 0 && strchr(": \t", line[n])) {
            const char *s = line + n + strspn(line + n, ": \t");
            out = phrase("%.*s", (int)strcspn(s, "\n"), s);
            break;
        }
    if (f)
        fclose(f);
    return out;
}

/* Memory that a group may take beside what its processes have; the pages of
 * files give way. */
static double memory_left(const char *dir)
{
    const double most = fmax(number_in(dir, "memory.max", 0),
                             number_in(dir, "memory.limit_in_bytes", 0));
    char path[640];

    snprintf(path, sizeof path, "%s/memory.stat", dir);
    return most <= 0 ? 0 :
           fmax(1, most - strtod(look_up(path, "anon", "0").s, NULL) -
                   strtod(look_up(path, "total_rss", "0").s, NULL));
}

/* The least limit, 0 for none, of the groups of this process and those they are
 * in.  A line is "0::/path", or "4:memory:/path" in version 1. */
static double least_limit(double (*limit)(const char *dir))
{
    FILE *f = fopen(groups, "r");
    char line[512], dir[600], *end;
    double least = 0;

    while (f && fgets(line, sizeof line, f)) {
        char *tree = strchr(line, ':');
        char *path = tree ? strchr(tree + 1, ':') : NULL;
        if (!path)
            continue;
        *tree = *path++ = '\0';
        tree++;
        path[strcspn(path, "\n")] = '\0';
        do {
            snprintf(dir, sizeof dir, "%s/%s%s", group_root, tree, path);
            const double x = limit(dir);
            least = x > 0 && (least <= 0 || x < least) ? x : least;
            end = strrchr(path, '/');
            if (end)
                *end = '\0';
        } while (end);
    }
    if (f)
        fclose(f);
    return least;
}

/* CPUs that this process may use, 64 at most. */
static int usable_cpus(void)
{
    const double most = least_limit(cpu_limit);
    const int n = smaller(lfm2_n_cpus(), 64);

    return most > 0 ? smaller(n, (int)fmin(most, 64)) : n;
}

/* Memory that can be had without taking it from another program; 0 if the
 * system does not tell. */
static double free_memory(void)
{
    const double have = strtod(look_up("/proc/meminfo", "MemAvailable", "0").s,
                               NULL) * 1024;
    const double most = least_limit(memory_left);

    return most > 0 ? fmin(have, most) : have;
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

/* ---- what a token costs, and the process */

static double count_elements(const lfm2_tensor_info *t)
{
    double n = 1;

    for (int d = 0; d < t->n_dims; d++)
        n *= (double)t->dims[d];
    return n;
}

/* What a token costs, by the tensors of the file. */
struct cost {
    double bytes, params;                 /* of the whole file               */
    double shared, experts;               /* bytes: read for every token, and
                                             of all experts together         */
    double macs, head;                    /* multiply-adds; for logits       */
    double kv;                            /* bytes of cache a token of text  */
};

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

/* Bytes that one step reads for a token of each sequence: weights once, of the
 * experts those that are expected to be chosen, if all are as likely; and the
 * cache, `depth` tokens of it. */
static double step_bytes(const lfm2_model *m, const struct cost *cost,
                         int n_seq, double depth)
{
    const lfm2_config *c = lfm2_model_config(m);
    double idle = 1;

    for (int i = 0; c->n_expert > 0 && i < n_seq; i++)
        idle *= 1 - (double)c->n_expert_used / c->n_expert;
    return cost->shared + cost->experts * (1 - idle) +
           cost->kv * n_seq * depth;
}

/* Memory of the process's own, which the mapped file is not; 0 if the system
 * does not tell. */
static double anonymous_memory(void)
{
    return strtod(look_up("/proc/self/status", "RssAnon", "0").s, NULL) * 1024;
}

static double peak_memory(void)
{
    struct rusage use;

    if (getrusage(RUSAGE_SELF, &use) != 0)
        return 0;
#if defined __APPLE__
    return (double)use.ru_maxrss;
#elif defined __wasi__
    return (double)__builtin_wasm_memory_size(0) * 65536;
#else
    return (double)use.ru_maxrss * 1024;
#endif
}

/* ---- presets
 *
 * What the makers publish for each model, found by its name: the first row all
 * of whose words are in it.  The small models for one task are greedy. */

static const struct preset {
    const char *name, *words[2];
    struct sampling is;
} presets[] = {
    { "LFM2 Extract", { "-extract-", "" }, { 0, 0, 1, 0, 1, 64 } },
    { "LFM2 RAG", { "-rag-", "" }, { 0, 0, 1, 0, 1, 64 } },
    { "LFM2 Tool", { "-tool-", "" }, { 0, 0, 1, 0, 1, 64 } },
    { "LFM2 PII", { "-pii-", "" }, { 0, 0, 1, 0, 1, 64 } },
    { "LFM2 MT", { "-mt-", "" }, { 0, 0, 1, 0, 1, 64 } },
    { "LFM2-VL", { "-vl-", "" }, { 0.1, 0, 1, 0.15, 1.05, 64 } },
    { "LFM2.5-8B-A1B", { "-lfm2.5-", "-8b-" }, { 0.2, 80, 1, 0, 1.05, 64 } },
    { "LFM2.5-2.6B", { "-lfm2.5-", "-2.6b-" }, { 0.1, 50, 1, 0, 1.1, 64 } },
    { "LFM2.5-Thinking", { "-lfm2.5-", "-thinking-" },
      { 0.05, 50, 1, 0, 1.05, 64 } },
    { "LFM2.5-JP-202606", { "-lfm2.5-", "-jp-202606-" },
      { 0.1, 50, 1, 0, 1.05, 64 } },
    { "LFM2.5-JP", { "-lfm2.5-", "-jp-" }, { 0.3, 0, 1, 0.15, 1.05, 64 } },
    { "LFM2.5-Base", { "-lfm2.5-", "-base-" }, { 0.3, 0, 1, 0.15, 1.05, 64 } },
    { "LFM2.5", { "-lfm2.5-", "" }, { 0.1, 50, 1, 0, 1.05, 64 } },
    { "LFM2-24B-A2B", { "-24b-", "" }, { 0.1, 50, 1, 0, 1.05, 64 } },
    { "LFM2", { "", "" }, { 0.3, 0, 1, 0.15, 1.05, 64 } },
};

/* All the file says of its name, like "-lfm2-1.2b-extract-", and what its sizes
 * say of it. */
static void describe(const lfm2_model *m, struct text *out)
{
    static const char *const key[] = {
        "general.name", "general.basename", "general.finetune",
        "general.size_label"
    };
    const lfm2_config *c = lfm2_model_config(m);
    size_t n;

    for (int i = 0; i < 4; i++) {
        const char *s = lfm2_model_string(m, key[i], &n);
        add_string(out, "-");
        add(out, s ? s : "", s ? n : 0);
    }
    if (c->n_expert == 64)
        add_string(out, c->n_vocab >= 128000 ? "-lfm2.5-24b" : "-lfm2-24b");
    else if (c->n_vocab >= 128000)
        add_string(out, c->n_expert ? "-lfm2.5-8b" : "-lfm2.5-2.6b");
    add_string(out, "-");
    for (size_t i = 0; i < out->n; i++)
        if (out->s[i] == '_' || out->s[i] == ' ' || out->s[i] == '/')
            out->s[i] = '-';
        else if (out->s[i] >= 'A' && out->s[i] <= 'Z')
            out->s[i] = (char)(out->s[i] - 'A' + 'a');
}

static const struct preset *find_preset(const lfm2_model *m)
{
    const struct preset *p = presets;
    struct text name = { 0 };

    describe(m, &name);
    while (!strstr(name.s, p->words[0]) || !strstr(name.s, p->words[1]))
        p++;
    free(name.s);
    return p;
}

/* A value of the metadata as text; empty if there is none. */
static struct phrase value_of(const lfm2_model *m, const char *key)
{
    struct phrase out;
    const char *found;

    for (int i = 0; (found = lfm2_model_key(m, i, out.s, sizeof out.s)); i++)
        if (strcmp(found, key) == 0)
            return out;
    return phrase("%s", "");
}

/* A number in the metadata, within the bounds of its option; 0 if there is
 * none. */
static int file_number(const lfm2_model *m, const char *key, double least,
                       double most, double *out)
{
    const struct phrase value = value_of(m, key);
    char *end;
    const double x = strtod(value.s, &end);

    if (end == value.s || *end || !(x >= least && x <= most))
        return 0;
    *out = x;
    return 1;
}

/* The preset, and before it what the file itself wishes.  A penalty would only
 * spoil a greedy choice, so then it must be asked for.  *named: how many of the
 * wishes there are. */
static struct sampling preset_of(const lfm2_model *m, int *named)
{
    struct sampling to = find_preset(m)->is;
    double top_k = to.top_k, last_n = to.last_n;
    int penalty;

    *named = file_number(m, "general.sampling.temp", 0, 100, &to.temp);
    *named += file_number(m, "general.sampling.top_k", 0, 1 << 30, &top_k);
    *named += file_number(m, "general.sampling.top_p", 0, 1, &to.top_p);
    *named += file_number(m, "general.sampling.min_p", 0, 1, &to.min_p);
    *named += file_number(m, "general.sampling.penalty_last_n", -1, 1 << 30,
                          &last_n);
    *named += penalty = file_number(m, "general.sampling.penalty_repeat", 0.01,
                                    100, &to.repeat);
    to.top_k = (int)top_k;
    to.last_n = (int)last_n;
    if (to.temp == 0 && !penalty)
        to.repeat = 1;
    return to;
}

/* What was not asked for is as the preset has it. */
static void complete(struct sampling *is, const struct sampling *preset)
{
    if (is->repeat == UNSET)
        is->repeat = is->temp == 0 ? 1 : preset->repeat;
    if (is->temp == UNSET)
        is->temp = preset->temp;
    if (is->top_k == UNSET)
        is->top_k = preset->top_k;
    if (is->top_p == UNSET)
        is->top_p = preset->top_p;
    if (is->min_p == UNSET)
        is->min_p = preset->min_p;
    if (is->last_n == UNSET)
        is->last_n = preset->last_n;
}

static struct phrase describe_sampling(const struct sampling *is)
{
    return phrase("temperature %g, top-k %d, top-p %g, min-p %g, repeat "
                  "penalty %g over %d", is->temp, is->top_k, is->top_p,
                  is->min_p, is->repeat, is->last_n);
}

/* ---- opening */

/* What the command line asks of a context. */
static lfm2_params choose_params(const struct settings *s, const lfm2_model *m)
{
    lfm2_params p = lfm2_default_params(m);
    const int n_cpus = usable_cpus();

    if (s->ctx != UNSET)
        p.n_ctx = s->ctx ? s->ctx : lfm2_model_config(m)->n_ctx_train;
    if (s->batch != UNSET)
        p.n_batch = s->batch;
    p.n_threads = s->threads ? s->threads : n_cpus;
    if (p.n_threads > 2 * n_cpus)
        note("-t %d: more threads than the %d CPUs here make it slower",
             p.n_threads, n_cpus);
    p.isa = s->isa;
    p.kv_type = s->kv;
    return p;
}

/* Does the file's template end the prompt inside a thought? */
static int opens_thought(const lfm2_model *m)
{
    size_t n = 0;
    const char *s = lfm2_model_string(m, "tokenizer.chat_template", &n);

    return s && find(s, s + n, TURN_START "assistant\\n" THINK);
}

/* Which format the conversation has, or that there is none. */
static int settle_template(struct engine *e)
{
    const struct settings *s = e->s;
    struct why why = { "" };
    int known = 1;

    e->template = s->raw || s->ids ? TEMPLATE_NONE : s->template;
    if (e->template == TEMPLATE_AUTO)
        e->template = choose_template(e->model, e->words, &known, &why);
    if (s->verbose && !why.s[0])
        note("template %s", template_name(e->template));
    else if (s->verbose || !known)
        note("%s: %s", s->model, why.s);
    e->opens_thought = e->template != TEMPLATE_NONE && e->words &&
                       opens_thought(e->model);
    if (e->template != TEMPLATE_NONE || s->raw || s->ids)
        return DONE;
    if (chat_option(s))
        return say(USAGE, "%s: no chat template, so %s cannot be used; "
                   "--template names one", s->model, chat_option(s));
    if (s->mode == ANSWER)
        note("%s: no chat template, the prompt is continued as plain text",
             s->model);
    return DONE;
}

/* A model may have spare rows behind its own vocabulary; a vocabulary from
 * elsewhere that is shorter is another model's. */
static int open_model_words(struct engine *e)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;
    int code, n;

    if (e->s->ids && e->s->mode == LOGITS)
        return DONE;
    code = open_words(e->s, e->model, &e->words);
    if (code != DONE)
        return code;
    n = lfm2_n_vocab(e->words);
    e->ends.id = zeroed((size_t)n, sizeof *e->ends.id);
    for (int32_t id = 0; id < n; id++)
        if (lfm2_is_eog(e->words, id))
            e->ends.id[e->ends.n++] = id;
    if (n > n_vocab || (n < n_vocab && e->s->tokenizer))
        return say(BAD_MODEL, "%s: a vocabulary of %d tokens, expected the %d "
                   "of the model", e->s->tokenizer ? e->s->tokenizer :
                   e->s->model, n, n_vocab);
    return DONE;
}

static int open_model(struct engine *e)
{
    const struct settings *s = e->s;
    lfm2_error err;
    int code;

    code = enter_sandbox(s);
    if (code != DONE)
        return code;
    if (!s->no_mmap)
        watch_file(s->model);
    if (open_file(&e->model, s->model, s->no_mmap, 0, &err) != LFM2_OK)
        return report(s->model, &err);
    e->par = choose_params(s, e->model);
    for (int i = 0; lfm2_model_warning(e->model, i); i++)
        note("%s: %s", s->model, lfm2_model_warning(e->model, i));
    return DONE;
}

/* ---- a file that is not in memory
 *
 * Its pages would come as they are touched, which in a mixture of experts is
 * here and there.  A thread reads it from the front to the end meanwhile. */

#if defined __linux__ && !defined LFM2_NO_MMAP && !defined LFM2_NO_THREADS

struct fetch {
    const lfm2_model *model;
    pthread_t thread;
    atomic_int stop;
};

static void *fetch_file(void *fetch)
{
    struct fetch *f = fetch;
    const uint64_t piece = 8 << 20;

    for (uint64_t at = 0, n = 1; n > 0 && !f->stop; at += n)
        n = lfm2_model_read_ahead(f->model, at, piece);
    return NULL;
}

/* Is much of the file not in memory?  Some pages, spread over it, are asked
 * for.  Of a file that is not ours to write Linux does not tell: then it is
 * read, which does no harm. */
static int is_cold(const struct engine *e)
{
    enum { PROBES = 256, ABSENT = 8 };
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t size;
    const unsigned char *file = lfm2_model_file(e->model, &size);
    int absent = 0;

    for (int i = 0; i < PROBES; i++) {
        const size_t at = size / PROBES * (size_t)i;
        unsigned char there = 1;
        if (mincore((void *)(uintptr_t)(file + at - at % page), 1, &there) == 0)
            absent += !(there & 1);
    }
    return absent > ABSENT || access(e->s->model, W_OK) != 0;
}

/* If there is memory for all of it.  Signals are for the main thread. */
static void start_fetch(struct engine *e)
{
    const struct settings *s = e->s;
    size_t size;

    lfm2_model_file(e->model, &size);
    if (s->no_mmap || !is_cold(e) || free_memory() < (double)size +
        (double)lfm2_context_size(e->model, &e->par))
        return;
    e->fetch = zeroed(1, sizeof *e->fetch);
    e->fetch->model = e->model;
    block_signals(1);
    if (pthread_create(&e->fetch->thread, NULL, fetch_file, e->fetch) != 0) {
        free(e->fetch);
        e->fetch = NULL;
    }
    block_signals(0);
    if (e->fetch && s->verbose)
        note("%s: not all in memory, read ahead", s->model);
}

static void stop_fetch(struct engine *e)
{
    if (!e->fetch)
        return;
    e->fetch->stop = 1;
    pthread_join(e->fetch->thread, NULL);
    free(e->fetch);
}

#else

static void start_fetch(struct engine *e)
{
    (void)e;
}

static void stop_fetch(struct engine *e)
{
    (void)e;
}

#endif

static void print_settings(const struct engine *e)
{
    const lfm2_params p = lfm2_context_params(e->ctx);

    note("context %d, batch %d, threads %d, isa %s, kv %s; %s beside the file",
         p.n_ctx, p.n_batch, p.n_threads, isa_name(p.isa), kv_name(p.kv_type),
         amount((double)lfm2_context_size(e->model, &p), "B").s);
}

static int open_context(struct engine *e)
{
    const int n_train = lfm2_model_config(e->model)->n_ctx_train;
    const size_t n_seq = (size_t)e->par.n_seq;
    lfm2_error err;
    int code;

    start_fetch(e);
    block_signals(1);
    code = lfm2_context_open(&e->ctx, e->model, &e->par, &err);
    block_signals(0);
    if (code != LFM2_OK)
        return report(e->s->model, &err);
    catch_interrupt();
    e->slot = zeroed(n_seq, sizeof *e->slot);
    e->span = zeroed(n_seq, sizeof *e->span);
    e->raw_logits = zeroed((size_t)lfm2_model_config(e->model)->n_vocab,
                           sizeof *e->raw_logits);
    for (size_t i = 0; i < n_seq; i++)
        e->slot[i].cached.id = zeroed((size_t)e->par.n_ctx + 1,
                                      sizeof *e->slot[i].cached.id);
    if (e->s->verbose)
        print_settings(e);
    if (e->par.n_ctx > n_train)
        note("%s: a context of %d tokens, but the model was trained for %d",
             e->s->model, e->par.n_ctx, n_train);
    return DONE;
}

/* How many tokens to guess, and the rows of logits that takes.  Unless it is
 * asked for, none where a guess costs too much: with experts, as it chooses its
 * own, and in plain C, where arithmetic takes longer than reading.  A trace
 * would show tokens that nobody said. */
static void settle_lookup(struct engine *e)
{
    const struct settings *s = e->s;
    int isa = LFM2_ISA_SCALAR + 1, pays;

    while (isa < LFM2_N_ISA && !lfm2_isa_available(isa))
        isa++;
    pays = lfm2_model_config(e->model)->n_expert == 0 && isa < LFM2_N_ISA &&
           s->isa != LFM2_ISA_SCALAR;
    e->lookup = s->trace ? 0 : s->lookup != UNSET ? s->lookup :
                pays ? LOOKUP : 0;
    if (e->par.n_logits < 1 + e->lookup)
        e->par.n_logits = 1 + e->lookup;
}

/* Everything but the context, which takes the most memory. */
static int open_engine(struct engine *e)
{
    const struct settings *s = e->s;
    int named, code = open_model(e);

    if (code == DONE)
        code = open_model_words(e);
    if (code == DONE)
        code = settle_template(e);
    if (code == DONE && s->json_schema)
        code = open_schema(e);
    if (code != DONE)
        return code;
    e->preset = preset_of(e->model, &named);
    if (s->verbose)
        note("preset %s%s: %s", find_preset(e->model)->name, named ? " and the "
             "file's own general.sampling" : "",
             describe_sampling(&e->preset).s);
    if (s->date)
        snprintf(e->date, sizeof e->date, "%s", s->date);
    else
        today(e->date);
    if (s->mode == LOGITS || s->ask.logprobs >= 0)
        e->par.n_logits = LOGITS_CHUNK;
    if (s->trace && s->batch == UNSET)
        e->par.n_batch = TRACE_BATCH;
    settle_lookup(e);
    e->piece = s->piece != UNSET ? s->piece :
               s->mode == BATCH ? e->par.n_batch : PROMPT_PIECE;
    return DONE;
}

static void close_engine(struct engine *e)
{
    stop_fetch(e);
    for (int i = 0; e->slot && i < e->par.n_seq; i++)
        free(e->slot[i].cached.id);
    free(e->slot);
    free(e->span);
    free(e->raw_logits);
    free(e->ends.id);
    close_schema(e);
    lfm2_context_close(e->ctx);
    lfm2_tokenizer_close(e->words);
    lfm2_model_close(e->model);
}

/* --------------------------------------------------- 4. Request, reply, step
 *
 * Everything that answers is a job: a request, and the reply that grows token
 * by token.  engine_step() moves all jobs on by one forward, so a question on
 * the command line, a chat and a batch are the same loop.  A job's sink does
 * something with the words. */

enum finish { UNFINISHED, STOPPED, BY_LENGTH, BY_CONTEXT, BROKEN };

/* Where in an answer the next byte belongs. */
enum part {
    AT_START, IN_THOUGHT, AFTER_THOUGHT, IN_TEXT, IN_CALL, IN_PLAIN_TEXT
};

/* A token, its log probability, and the likeliest ones in its place. */
struct scored { int32_t id; double logprob; };

struct score { struct scored is, top[MAX_LOGPROBS + 1]; int n_top; };

struct scores { struct score *v; int n; };

struct reply {
    const struct request *q;
    int seq;
    int keeps_marks;                      /* --think raw: nothing is parted  */
    struct ids ids;                       /* prompt, then answer: [n_ctx]    */
    int n_fed, n_reused;                  /* of ids: in the cache; from it   */
    int n_made, n_thought;                /* tokens made, of them in thought */
    int n_sampled, n_steps;               /* chosen; forwards for all but
                                             the first                       */
    int n_guessed, n_right;               /* tokens by lookup, right ones    */
    int bold, credit;                     /* how many it may guess           */
    lfm2_sampler sampler;
    struct guide *guide;                  /* NULL: any text is good          */
    int n_again;                          /* chosen a second time            */
    double again;                         /* seconds it took to find what
                                             could be                        */
    enum finish finish;
    enum part part;
    struct text raw;                      /* all that was said               */
    size_t seen;                          /* of raw: parted                  */
    struct text text, thought, calls;     /* the parts of it                 */
    struct scores prompt_scores, scores;
    struct bias *said;                    /* tokens made, and how often      */
    int n_said;
    int32_t stop_id[MAX_LIST];            /* control tokens among the stops  */
    int n_stop_ids;
    uint64_t hash;                        /* of all logits sampled from      */
    double started, read, ended;          /* seconds()                       */
};

struct job {
    struct request q;
    struct reply r;
    const struct sink *to;
    void *owner;
    enum { WAITING, ACTIVE, FINISHED } state;
    uint64_t id;
    struct job *next;
};

struct sink {
    void (*more)(struct job *j);          /* after each of its tokens        */
    void (*end)(struct job *j);           /* r.finish says how               */
};

static void free_reply(struct reply *r)
{
    free(r->ids.id);
    free(r->raw.s);
    free(r->text.s);
    free(r->thought.s);
    free(r->calls.s);
    free(r->prompt_scores.v);
    free(r->scores.v);
    free(r->said);
    free(r->guide);
    *r = (struct reply){ .q = NULL };
}

static void free_request(struct request *q)
{
    free(q->prompt.id);
    free(q->bias);
    free_schema(q->schema);
}

/* ---- thought, text, calls and stop strings
 *
 * Words that change what follows may arrive in pieces, so the end of the text
 * is held back while it could be the beginning of one. */

/* How much of the end of s[n] could be the beginning of the word. */
static size_t overlap(const char *s, size_t n, const char *word, size_t len)
{
    size_t k = n < len ? n : len - 1;

    while (k > 0 && memcmp(s + n - k, word, k) != 0)
        k--;
    return k;
}

struct cut { size_t at, len, held; int is_stop; };

/* Is the word in s[n], and complete before what was found so far?  Of two that
 * end together the longer counts, or the later one: so it does not matter in
 * which pieces the text arrives. */
static void look_for(struct cut *c, const char *s, size_t n, const char *word,
                     int is_stop)
{
    const size_t len = strlen(word), held = overlap(s, n, word, len);
    const size_t before = c->len > 0 ? c->at + c->len : n;

    for (size_t at = 0; at + len <= before; at++)
        if (s[at] == word[0] && memcmp(s + at, word, len) == 0) {
            if (c->len == 0 || at + len < before || len >= c->len)
                *c = (struct cut){ at, len, 0, is_stop };
            return;
        }
    if (held > c->held && c->len == 0)
        c->held = held;
}

/* Stop strings are those of the text, not of thoughts and calls. */
static struct cut find_cut(const struct reply *r, const char *s, size_t n)
{
    const char *const ends[] = {
        [IN_THOUGHT] = THINK_END, [IN_TEXT] = CALL_START, [IN_CALL] = CALL_END,
        [IN_PLAIN_TEXT] = NULL
    };
    struct cut c = { n, 0, 0, 0 };

    if (ends[r->part] && !is_guided_text(r))
        look_for(&c, s, n, ends[r->part], 0);
    if (r->part == IN_TEXT && r->calls.n > 0)         /* said once more      */
        look_for(&c, s, n, CALL_END, 0);
    if (r->part == IN_TEXT || r->part == IN_PLAIN_TEXT)
        for (int i = 0; i < r->q->stop.n; i++)
            look_for(&c, s, n, r->q->stop.v[i], 1);
    return c;
}

/* A thought is one only if nothing else comes before it.  Returns 1 once that
 * is known. */
static int begin_part(struct reply *r, int last)
{
    const char *s = r->raw.s + r->seen;
    const size_t n = r->raw.n - r->seen, len = strlen(THINK);
    size_t blank = 0;

    while (blank < n && strchr(" \n\r\t", s[blank]) && s[blank])
        blank++;
    if (!last && (blank == n ||
                  overlap(s + blank, n - blank, THINK, len) == n - blank))
        return 0;
    if (r->part == AT_START && n - blank >= len &&
        memcmp(s + blank, THINK, len) == 0) {
        r->part = IN_THOUGHT;
        r->seen += blank + len;
        return 1;
    }
    if (r->part == AFTER_THOUGHT)
        r->seen += blank;
    r->part = IN_TEXT;
    return 1;
}

/* The marks between parts belong to none, those around a call to the call. */
static void end_part(struct reply *r, const char *word, struct cut c)
{
    if (c.is_stop) {
        r->finish = STOPPED;
        r->raw.n = r->seen -= c.len;
        r->raw.s[r->raw.n] = '\0';
    } else if (r->part == IN_THOUGHT)
        r->part = AFTER_THOUGHT;
    else {
        r->part = c.len == strlen(CALL_END) ? IN_TEXT : IN_CALL;
        if (!r->keeps_marks)
            add(&r->calls, word, c.len);
    }
}

static void split_parts(struct reply *r, int last)
{
    while (r->seen < r->raw.n) {
        if (r->part == AT_START || r->part == AFTER_THOUGHT) {
            if (!begin_part(r, last))
                return;
            continue;
        }
        const char *s = r->raw.s + r->seen;
        const struct cut c = find_cut(r, s, r->raw.n - r->seen);
        const size_t n = c.at - (last ? 0 : c.held);
        if (!r->keeps_marks)
            add(r->part == IN_THOUGHT ? &r->thought : r->part == IN_CALL ?
                &r->calls : &r->text, s, n);
        r->seen += n + c.len;
        if (c.len == 0)
            return;
        end_part(r, s + c.at, c);
    }
}

/* Part what is new in r->raw; `last` lets go of what is held back. */
static void split(struct reply *r, int last)
{
    const size_t from = r->seen;

    split_parts(r, last);
    if (r->keeps_marks && r->seen > from)
        add(&r->text, r->raw.s + from, r->seen - from);
}

/* The text of a token; of the control tokens only those that set parts of an
 * answer apart. */
static const char *visible(const struct engine *e, int32_t id, int *len)
{
    static const char *const marks[] = { THINK, THINK_END, CALL_START,
                                         CALL_END };
    const char *s = lfm2_token_bytes(e->words, id, 0, len);

    if (*len > 0)
        return s;
    s = lfm2_token_bytes(e->words, id, 1, len);
    for (int i = 0; i < 4; i++)
        if ((size_t)*len == strlen(marks[i]) &&
            memcmp(s, marks[i], (size_t)*len) == 0)
            return s;
    *len = 0;
    return s;
}

/* ---- log probabilities */

static double log_sum(const float *logits, int n_vocab)
{
    float most = logits[0];
    double sum = 0;

    for (int i = 1; i < n_vocab; i++)
        most = logits[i] > most ? logits[i] : most;
    for (int i = 0; i < n_vocab; i++)
        sum += exp((double)logits[i] - (double)most);
    return (double)most + log(sum);
}

/* Note a token and the k likeliest, best first, of equals the lower id first.
 * Without logits, as for the first token of a text, it has no probability. */
static void note_score(const struct engine *e, struct scores *to,
                       const float *logits, int32_t id, int k)
{
    const int n_vocab = lfm2_n_vocab(e->words);       /* those with names    */
    const size_t n = (size_t)to->n;
    struct score *s;
    double all;

    if ((n & (n - 1)) == 0)
        to->v = resize(to->v, (n ? 2 * n : 1) * sizeof *to->v);
    s = &to->v[to->n++];
    *s = (struct score){ .is = { id, NAN } };
    if (!logits)
        return;
    for (int i = 0; k > 0 && i < n_vocab; i++) {
        const struct scored x = { i, (double)logits[i] };
        if (s->n_top == k && !(x.logprob > s->top[k - 1].logprob))
            continue;
        int at = s->n_top < k ? s->n_top++ : k - 1;
        for (; at > 0 && x.logprob > s->top[at - 1].logprob; at--)
            s->top[at] = s->top[at - 1];
        s->top[at] = x;
    }
    all = log_sum(logits, lfm2_model_config(e->model)->n_vocab);
    s->is.logprob = (double)logits[id] - all;
    for (int i = 0; i < s->n_top; i++)
        s->top[i].logprob -= all;
}

/* ---- token by token */

/* FNV-1a over whole numbers: the same on every machine, as the logits are. */
static uint64_t hash_floats(uint64_t h, const float *x, int n)
{
    for (int i = 0; i < n; i++)
        h = hash_number(h, float_bits(x[i]));
    return h;
}

/* Change logits as the request asks, before its sampler sees them. */
static void adjust_logits(const struct engine *e, const struct reply *r,
                          float *logits)
{
    const struct request *q = r->q;

    for (int i = 0; i < q->n_bias; i++)
        logits[q->bias[i].id] += q->bias[i].by;
    for (int i = 0; i < r->n_said; i++)
        logits[r->said[i].id] -= (float)(q->presence + q->frequency *
                                         (double)r->said[i].by);
    for (int i = 0; q->ignore_eos && i < e->ends.n; i++)
        logits[e->ends.id[i]] = -INFINITY;
}

/* For the presence and frequency penalties. */
static void count_token(struct reply *r, int32_t id)
{
    int i = 0;

    while (i < r->n_said && r->said[i].id != id)
        i++;
    if (i == r->n_said)
        r->said[r->n_said++] = (struct bias){ id, 0 };
    r->said[i].by++;
}

/* Append a token to the answer, or end it. */
static void take_token(const struct engine *e, struct reply *r, int32_t id)
{
    const enum part before = r->part;
    int len;
    const char *s = visible(e, id, &len);

    if (r->guide)
        guide_token(r, r->guide, s, (size_t)len);
    add(&r->raw, s, (size_t)len);
    split(r, 0);
    r->n_made++;
    if (r->said)
        count_token(r, id);
    r->n_thought += before == IN_THOUGHT;
    if (r->guide && r->finish == UNFINISHED)
        end_guided(r);
    if (r->finish != UNFINISHED)
        return;
    if (r->n_made == r->q->limit)
        r->finish = BY_LENGTH;
    else if (r->ids.n == e->par.n_ctx)
        r->finish = BY_CONTEXT;
    else
        r->ids.id[r->ids.n++] = id;
}

/* A thought that takes too long is closed for the model.  Returns whether it
 * was. */
static int close_thought(const struct engine *e, struct reply *r)
{
    static const char closing[] = "\n</think>\n\n";
    int32_t id[16];
    int n;

    if (r->part != IN_THOUGHT || r->q->think_budget < 0 ||
        r->n_thought < r->q->think_budget)
        return 0;
    n = lfm2_encode(e->words, closing, strlen(closing), LFM2_ENCODE_SPECIAL,
                    id, 16);
    for (int i = 0; i < n && i < 16 && r->finish == UNFINISHED; i++)
        take_token(e, r, id[i]);
    return n > 0;
}

static int is_end(const struct engine *e, const struct reply *r, int32_t id)
{
    for (int i = 0; i < r->n_stop_ids; i++)
        if (r->stop_id[i] == id)
            return 1;
    return lfm2_is_eog(e->words, id);
}

/* The next token, from the logits of the last.  Scores are what the model said,
 * before anything changes it. */
static void sample_token(struct engine *e, struct reply *r, float *logits)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;
    const struct request *q = r->q;
    int32_t id;
    int ends;

    if (close_thought(e, r))
        return;
    if (e->s->json)
        r->hash = hash_floats(r->hash, logits, n_vocab);
    if (q->logprobs >= 0)
        memcpy(e->raw_logits, logits, (size_t)n_vocab * sizeof *logits);
    adjust_logits(e, r, logits);
    id = lfm2_sample(e->ctx, &r->sampler, logits, r->ids.id, r->ids.n);
    if (id >= 0 && r->guide && !may_say(e, r, id))
        id = ask_again(e, r, logits);
    if (id < 0) {
        r->finish = r->finish == UNFINISHED ? BROKEN : r->finish;
        return;
    }
    r->n_sampled++;
    ends = is_end(e, r, id);
    if (q->logprobs >= 0 && (!ends || q->is_completion))
        note_score(e, &r->scores, e->raw_logits, id, q->logprobs);
    if (ends)
        r->finish = STOPPED;
    else
        take_token(e, r, id);
}

/* ---- prompt lookup
 *
 * Text repeats itself: an edit repeats a page, an answer its question, JSON its
 * keys.  What followed the last few tokens earlier is a guess at what follows
 * them now, and one forward reads several guesses for little more than the
 * price of a token.  From each of them the next token is chosen as ever; a
 * guess only decides whether the logits for it are there already.  So the
 * answer is the same, to the byte.
 *
 * A guess costs about a tenth of a forward, and saves one if it is right.  A
 * reply begins with half a forward to its credit and earns two hundredths with
 * each, so that guesses that are always wrong cost it little more than that. */

enum {
    MIN_MATCH = 3, MAX_MATCH = 16,        /* tokens that must be alike       */
    A_FORWARD = 100, A_GUESS = 10, EARNED = 2, CREDIT = 50, MAX_CREDIT = 400
};

/* Where the text went on when it was last like its end now: the longer this
 * goes back, the better.  0 if it never was.  The search is short beside what
 * attention reads of the same tokens. */
static int find_earlier(const struct ids *text)
{
    const int32_t *end = text->id + text->n;
    int best = 0, longest = MIN_MATCH - 1;

    for (int at = text->n - 1; at > longest && longest < MAX_MATCH; at--) {
        int n = 0;
        while (n < at && n < MAX_MATCH && text->id[at - 1 - n] == end[-1 - n])
            n++;
        if (n > longest)
            longest = n, best = at;
    }
    return best;
}

/* Put at most n guesses behind the text, and say how many. */
static int guess(const struct engine *e, struct reply *r, int n)
{
    struct ids *text = &r->ids;
    int from;

    n = smaller(smaller(n, r->bold), r->credit / A_GUESS);
    n = smaller(n, e->par.n_ctx - text->n);
    if (r->q->limit >= 0)
        n = smaller(n, r->q->limit - r->n_made - 1);
    from = n > 0 ? find_earlier(text) : 0;
    for (int i = 0; from > 0 && i < n; i++)
        text->id[text->n + i] = text->id[from + i];
    return from > 0 ? n : 0;
}

/* Of n guesses so many were right: guess more, or less. */
static void note_guesses(struct reply *r, int n, int n_right)
{
    r->n_guessed += n;
    r->n_right += n_right;
    r->credit += EARNED + n_right * A_FORWARD - n * A_GUESS;
    r->credit = smaller(r->credit, MAX_CREDIT);
    if (n > 0)
        r->bold = smaller(n_right < n ? n_right + 1 : 2 * n + 1, MAX_LOOKUP);
}

/* ---- many at once */

/* A request shares this much with the text in a sequence. */
static int shared_prefix(const struct ids *a, const struct ids *b)
{
    int n = 0;

    while (n < a->n && n < b->n && a->id[n] == b->id[n])
        n++;
    return n;
}

static int check_prompt(const struct engine *e, const struct request *q,
                        struct why *why)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;

    if (q->prompt.n == 0)
        return because(why, USAGE, "the prompt has no tokens");
    if (q->prompt.n > e->par.n_ctx)
        return because(why, TOO_LONG, "the prompt has %d tokens, the context "
                       "%d; -c N makes it longer", q->prompt.n, e->par.n_ctx);
    for (int i = 0; i < q->prompt.n; i++)
        if (q->prompt.id[i] < 0 || q->prompt.id[i] >= n_vocab)
            return because(why, USAGE, "token %d is %ld, expected 0 to %d", i,
                           (long)q->prompt.id[i], n_vocab - 1);
    return DONE;
}

/* Queue a job, whose request and sink are filled in. */
static int engine_add(struct engine *e, struct job *j, struct why *why)
{
    struct job **end = &e->jobs;
    const int code = check_prompt(e, &j->q, why);

    if (code != DONE)
        return code;
    while (*end)
        end = &(*end)->next;
    *end = j;
    j->next = NULL;
    j->state = WAITING;
    return DONE;
}

/* Forget a job, done or not.  What it has read stays in the cache. */
static void engine_drop(struct engine *e, struct job *j)
{
    struct job **at = &e->jobs;

    while (*at && *at != j)
        at = &(*at)->next;
    if (*at)
        *at = j->next;
    if (j->state == ACTIVE) {
        e->slot[j->r.seq].job = NULL;
        e->slot[j->r.seq].used = seconds();
    }
    j->state = FINISHED;
    split(&j->r, 1);
    j->r.ended = seconds();
}

static lfm2_sampler make_sampler(const struct sampling *is, uint64_t seed)
{
    return (lfm2_sampler){
        (float)is->temp, is->top_k < 0 ? 0 : is->top_k, (float)is->top_p,
        (float)is->min_p, (float)is->repeat,
        is->last_n < 0 ? 1 << 30 : is->last_n, seed
    };
}

/* Begin to answer in a sequence.  One token at least is always read, for its
 * logits; all are, if the prompt's own are wanted. */
static void start_reply(struct engine *e, struct job *j, struct slot *slot)
{
    const size_t n_ctx = (size_t)e->par.n_ctx;
    const struct request *q = &j->q;
    struct reply *r = &j->r;
    int same = q->prompt_logprobs < 0 ? shared_prefix(&slot->cached, &q->prompt)
                                      : 0;

    *r = (struct reply){
        .q = q, .seq = (int)(slot - e->slot), .hash = HASH_START,
        .keeps_marks = e->s->think == THINK_RAW, .bold = MIN_MATCH,
        .credit = CREDIT, .sampler = make_sampler(&q->sampling,
                                                  (uint64_t)q->seed),
        .part = q->is_completion ? IN_PLAIN_TEXT : q->in_thought ? IN_THOUGHT :
                AT_START
    };
    r->ids.id = zeroed(n_ctx + 1, sizeof *r->ids.id);
    if (q->presence != 0 || q->frequency != 0)
        r->said = zeroed(n_ctx + 1, sizeof *r->said);
    memcpy(r->ids.id, q->prompt.id, (size_t)q->prompt.n * sizeof *r->ids.id);
    r->ids.n = q->prompt.n;
    for (int i = 0; e->words && i < q->stop.n; i++) {
        const int32_t id = lfm2_token_id(e->words, q->stop.v[i]);
        int len = 1;
        if (id >= 0)
            lfm2_token_bytes(e->words, id, 0, &len);
        if (len == 0)                     /* a control token, by its name    */
            r->stop_id[r->n_stop_ids++] = id;
    }
    start_guide(e, r);
    same = smaller(same, q->prompt.n - 1);
    slot->cached.n = lfm2_seq_trim(e->ctx, r->seq, same);
    r->n_fed = r->n_reused = slot->cached.n;
    r->started = r->read = r->ended = seconds();
    slot->job = j;
    j->state = ACTIVE;
}

/* The sequence to answer a prompt in.  A conversation goes on where it was;
 * another one takes an empty sequence or the one that has waited longest, and
 * copies there what it shares with any.  NULL if all are busy. */
static struct slot *choose_slot(const struct engine *e,
                                const struct ids *prompt,
                                const struct slot **from, int *same)
{
    struct slot *best = NULL;

    *from = NULL;
    *same = 0;
    for (int i = 0; i < e->par.n_seq; i++) {
        struct slot *s = &e->slot[i];
        const int n = shared_prefix(&s->cached, prompt);
        if (n > *same) {
            *same = n;
            *from = s;
            best = NULL;
        }
        if (n == *same && n > 0 && !s->job && s->cached.n - n <= EXACT_TRIM)
            best = s;
    }
    if (best)
        return best;
    for (int i = 0; i < e->par.n_seq; i++) {
        struct slot *s = &e->slot[i];
        if (s->job)
            continue;
        if (!best || (s->cached.n == 0) > (best->cached.n == 0) ||
            ((s->cached.n == 0) == (best->cached.n == 0) &&
             s->used < best->used))
            best = s;
    }
    return best;
}

/* Will a prompt that is being read right now be worth waiting for? */
static int worth_waiting(const struct engine *e, const struct ids *prompt,
                         int have)
{
    for (const struct job *j = e->jobs; j; j = j->next)
        if (j->state == ACTIVE && j->r.n_fed < j->q.prompt.n) {
            const int n = shared_prefix(&j->q.prompt, prompt);
            if (n > j->r.n_fed && n >= have + lfm2_seq_step(e->ctx))
                return 1;
        }
    return 0;
}

/* Start what waits, oldest first.  One that had better wait does not keep back
 * those behind it.  A prompt whose own log probabilities are wanted is read
 * from its beginning. */
static void start_jobs(struct engine *e)
{
    static const struct ids none = { NULL, 0 };

    for (struct job *j = e->jobs; j; j = j->next) {
        const struct ids *prompt = j->q.prompt_logprobs < 0 ? &j->q.prompt :
                                   &none;
        const struct slot *from;
        struct slot *to;
        int same;
        if (j->state != WAITING)
            continue;
        to = choose_slot(e, prompt, &from, &same);
        if (!to)
            return;
        if (worth_waiting(e, prompt, same))
            continue;
        if (from && from != to && same >= shared_prefix(&to->cached, prompt) +
            lfm2_seq_step(e->ctx) &&
            lfm2_seq_copy(e->ctx, (int)(to - e->slot), (int)(from - e->slot),
                          NULL) == LFM2_OK) {
            to->cached.n = from->cached.n;
            memcpy(to->cached.id, from->cached.id,
                   (size_t)from->cached.n * sizeof *from->cached.id);
        }
        start_reply(e, j, to);
    }
}

/* The tokens of a reply that go into the next forward: all that are not in the
 * cache, as far as there is room, and then guesses.  *room and *rows shrink. */
static lfm2_span next_span(const struct engine *e, struct reply *r,
                           int n_guesses, int *room, int *rows)
{
    const int rest = r->ids.n - r->n_fed;
    const int all_rows = r->q->prompt_logprobs >= 0 && r->n_made == 0;
    const int most = all_rows && *rows < *room ? *rows : *room;
    const int n = rest - 1 < most ? rest : most + 1;
    int guesses = 0;

    *room -= n - 1;
    *rows -= all_rows ? n - 1 : 0;
    if (n == rest)
        guesses = guess(e, r, smaller(n_guesses, smaller(*room, *rows)));
    *room -= guesses;
    *rows -= guesses;
    return (lfm2_span){ .seq = r->seq, .tokens = r->ids.id + r->n_fed,
                        .n_tokens = n + guesses,
                        .n_logits = (all_rows ? n : n == rest) + guesses };
}

/* What the model thought of the prompt: of each token but the first. */
static void note_prompt(const struct engine *e, struct reply *r, int span,
                        int n)
{
    const struct request *q = r->q;

    if (r->n_fed == 0)
        note_score(e, &r->prompt_scores, NULL, r->ids.id[0], 0);
    for (int i = 0; i < n && r->n_fed + i + 1 < q->prompt.n; i++)
        note_score(e, &r->prompt_scores, lfm2_logits(e->ctx, span, i),
                   r->ids.id[r->n_fed + i + 1], q->prompt_logprobs);
}

/* Say the next token, and as many more as were guessed.  What was guessed wrong
 * leaves the cache, and maybe some of what is before it, to be read again. */
static void say_tokens(struct engine *e, struct reply *r, int span)
{
    struct ids *cached = &e->slot[r->seq].cached;
    const int from = r->n_fed, n = cached->n - from;
    const int row = e->span[span].n_logits - 1 - n;

    while (r->finish == UNFINISHED && r->n_fed == r->ids.n) {
        sample_token(e, r, lfm2_logits(e->ctx, span, row + r->n_fed - from));
        while (r->n_fed < r->ids.n && r->n_fed < cached->n &&
               r->ids.id[r->n_fed] == cached->id[r->n_fed])
            r->n_fed++;
    }
    note_guesses(r, n, r->n_fed - from);
    if (r->n_fed < cached->n)
        r->n_fed = cached->n = lfm2_seq_trim(e->ctx, r->seq, r->n_fed);
}

/* What was fed is in the cache; who has all of it there says its next token. */
static void move_on(struct engine *e, struct reply *r, int span)
{
    const lfm2_span *fed = &e->span[span];
    struct ids *cached = &e->slot[r->seq].cached;

    memcpy(cached->id + cached->n, fed->tokens,
           (size_t)fed->n_tokens * sizeof *cached->id);
    cached->n += fed->n_tokens;
    if (r->q->prompt_logprobs >= 0 && r->n_made == 0)
        note_prompt(e, r, span, fed->n_logits);
    r->n_fed = smaller(cached->n, r->ids.n);
    if (r->n_sampled == 0)
        r->read = seconds();
    else
        r->n_steps++;
    if (r->n_fed == r->ids.n && r->q->limit == 0)
        r->finish = BY_LENGTH;
    else if (r->n_fed == r->ids.n)
        say_tokens(e, r, span);
}

static int forward(const struct engine *e, const lfm2_span *spans, int n)
{
    lfm2_error err;

    if (lfm2_forward(e->ctx, spans, n, &err) == LFM2_OK)
        return e->trace ? e->trace->code : DONE;
    if (err.code == LFM2_ECANCELLED)
        return INTERRUPTED;
    return report(e->s->ids ? e->s->ids : e->s->model, &err);
}

/* Move all jobs on by one forward.  Prompts share the room that those who write
 * leave, and are read in pieces while anybody writes, so that nobody waits long
 * for the next token. */
static int engine_step(struct engine *e)
{
    int n = 0, writing = 0, room, rows, code, span = 0;
    struct job *j, *next;

    start_jobs(e);
    for (j = e->jobs; j; j = j->next)
        if (j->state == ACTIVE) {
            writing |= j->r.n_sampled > 0;
            n++;
        }
    if (n == 0)
        return DONE;
    room = e->par.n_batch > n ? e->par.n_batch - n : 0;
    room = writing ? smaller(room, e->piece) : room;
    rows = e->par.n_logits - n;
    for (j = e->jobs; j; j = j->next)
        if (j->state == ACTIVE)
            e->span[span++] = next_span(e, &j->r, e->lookup / n, &room, &rows);
    code = forward(e, e->span, n);
    span = 0;
    for (j = e->jobs; code == DONE && j; j = next) {
        next = j->next;
        if (j->state != ACTIVE)
            continue;
        move_on(e, &j->r, span++);
        if (j->r.finish == UNFINISHED)
            j->to->more(j);
        else {
            engine_drop(e, j);
            j->to->end(j);
        }
    }
    return code;
}

/* ---- what is asked for */

static uint64_t random_seed(void)
{
    struct timespec t;

    clock_gettime(CLOCK_REALTIME, &t);
    return ((uint64_t)t.tv_sec * 1000000007u ^ (uint64_t)t.tv_nsec ^
            (uint64_t)getpid() << 20) & UINT32_MAX;
}

/* A request by the options, or by them and a body, is completed by what the
 * model's makers advise. */
static void complete_request(const struct engine *e, struct request *q)
{
    complete(&q->sampling, &e->preset);
    if (q->limit == UNSET)
        q->limit = q->is_completion ? PLAIN_LENGTH : -1;
    if (q->seed == -1)
        q->seed = (long long)random_seed();
}

/* ------------------------------------------------------------------ 5. Sinks
 *
 * What becomes of a reply: words on a screen as they come, or one JSON object,
 * as OpenAI's API writes it, once all is there. */

/* ---- on the screen */

struct output { FILE *f; lfm2_utf8 utf8; int terminal; };

/* Only whole characters come out; len 0 lets go of an unfinished one. */
static void put_text(struct output *o, const char *bytes, size_t len)
{
    char out[256 + 3];
    size_t n;

    do {
        const size_t part = len < 256 ? len : 256;
        n = lfm2_utf8_push(&o->utf8, bytes, part, out);
        if (o->terminal)
            n = drop_controls(out, n);
        fwrite(out, 1, n, o->f);
        bytes += part;
        len -= part;
    } while (len > 0);
}

/* How much of a reply is on the screen already. */
struct printer {
    struct output out, thoughts;          /* f NULL: not shown               */
    int colour;                           /* thoughts are dim                */
    int in_thought, code;
    size_t text, thought;
};

static int wants_colour(const struct settings *s)
{
    const char *no = getenv("NO_COLOR"), *term = getenv("TERM");

    if (s->color != COLOR_AUTO)
        return s->color == COLOR_ON;
    return isatty(STDOUT_FILENO) && !(no && no[0]) && term &&
           strcmp(term, "dumb") != 0;
}

/* Thoughts go where a person looks, or where they were sent. */
static struct printer start_printer(const struct settings *s)
{
    const int terminal = isatty(STDOUT_FILENO);
    struct printer p = { .colour = wants_colour(s) };

    p.out = (struct output){ .f = stdout, .terminal = terminal };
    if (s->think == THINK_SHOW || (s->think == THINK_AUTO && terminal))
        p.thoughts = (struct output){
            .f = terminal ? stdout : stderr,
            .terminal = isatty(terminal ? STDOUT_FILENO : STDERR_FILENO)
        };
    return p;
}

static void enter_thought(struct printer *p, int inside)
{
    if (p->in_thought == inside)
        return;
    put_text(inside ? &p->out : &p->thoughts, "", 0);
    p->in_thought = inside;
    is_dim = p->colour && inside;
    if (p->colour)
        fputs(inside ? "\033[2m" : "\033[0m\n\n", p->thoughts.f);
    else
        fputs(inside ? THINK : THINK_END "\n\n", p->thoughts.f);
}

/* Print what is new. */
static void print_reply(struct printer *p, const struct reply *r)
{
    if (p->thoughts.f && r->thought.n > p->thought) {
        enter_thought(p, 1);
        put_text(&p->thoughts, r->thought.s + p->thought,
                 r->thought.n - p->thought);
        fflush(p->thoughts.f);
        p->thought = r->thought.n;
    }
    if (r->text.n == p->text)
        return;
    enter_thought(p, 0);
    put_text(&p->out, r->text.s + p->text, r->text.n - p->text);
    p->text = r->text.n;
    p->code = flush_output(p->code);
}

/* The calls in a reply that has ended; what is none becomes text. */
static struct calls take_calls(struct reply *r)
{
    struct calls calls = { NULL, 0 };

    if (r->calls.n > 0)
        parse_calls(r->calls.s, r->calls.n, r->finish != STOPPED, &calls,
                    &r->text);
    r->calls.n = 0;
    return calls;
}

/* What is left at the end; calls are one line of JSON. */
static void print_end(struct printer *p, struct reply *r)
{
    struct calls calls = take_calls(r);
    struct text line = { 0 };

    print_reply(p, r);
    enter_thought(p, 0);
    for (int i = 0; i < calls.n; i++) {
        add_string(&line, i ? ", " : r->text.n ? "\n[" : "[");
        add_string(&line, "{");
        member_bytes(&line, "name", calls.call[i].name.s,
                     calls.call[i].name.n);
        member(&line, "arguments");
        add(&line, calls.call[i].arguments.s, calls.call[i].arguments.n);
        add_string(&line, i + 1 < calls.n ? "}" : "}]");
    }
    put_text(&p->out, line.s ? line.s : "", line.n);
    put_text(&p->out, "", 0);
    if (r->text.n > 0 || line.n > 0 || r->thought.n > 0)
        putchar('\n');
    free(line.s);
    free_calls(&calls);
    p->code = flush_output(p->code);
}

/* ---- as JSON */

static void add_log(struct text *to, double logprob)
{
    if (isnan(logprob))
        add_string(to, "null");
    else
        add_format(to, "%.6f", logprob > -9999 ? logprob : -9999.0);
}

/* {"token": ..., "id": ..., "logprob": ..., "bytes": [...] */
static void add_scored(const struct engine *e, struct text *to,
                       const struct scored *x)
{
    int len;
    const char *s = lfm2_token_bytes(e->words, x->id, 1, &len);

    add_string(to, "{\"token\": ");
    add_json_string(to, s, (size_t)len);
    add_format(to, ", \"id\": %ld, \"logprob\": ", (long)x->id);
    add_log(to, x->logprob);
    add_string(to, ", \"bytes\": [");
    for (int i = 0; i < len; i++)
        add_format(to, "%s%d", i ? ", " : "", (unsigned char)s[i]);
    add_string(to, "]");
}

/* An array of tokens with the likeliest in their places. */
static void add_scores(const struct engine *e, struct text *to,
                       const struct scores *scores)
{
    add_string(to, "[");
    for (int i = 0; i < scores->n; i++) {
        const struct score *s = &scores->v[i];
        add_string(to, i ? ", " : "");
        if (isnan(s->is.logprob)) {
            add_string(to, "null");
            continue;
        }
        add_scored(e, to, &s->is);
        add_string(to, ", \"top_logprobs\": [");
        for (int k = 0; k < s->n_top; k++) {
            add_string(to, k ? ", " : "");
            add_scored(e, to, &s->top[k]);
            add_string(to, "}");
        }
        add_string(to, "]}");
    }
    add_string(to, "]");
}

/* Names of tokens are keys of an object and must differ, so parts of characters
 * are written as bytes. */
static void add_token_name(const struct engine *e, struct text *to, int32_t id)
{
    uint32_t c;
    int len, at = 0, n = 1;
    const char *s = lfm2_token_bytes(e->words, id, 1, &len);

    for (; at < len && n > 0; at += n)
        n = utf8_get(s + at, s + len, &c);
    if (n > 0) {
        add_json_string(to, s, (size_t)len);
        return;
    }
    add_string(to, "\"bytes:");
    for (int i = 0; i < len; i++)
        add_format(to, "\\\\x%02x", (unsigned char)s[i]);
    add_string(to, "\"");
}

/* "name": log probability, of the likeliest and of the token itself. */
static void add_best(const struct engine *e, struct text *to,
                     const struct score *s)
{
    int has = 0;

    if (isnan(s->is.logprob)) {
        add_string(to, "null");
        return;
    }
    for (int i = 0; i <= s->n_top; i++) {
        const struct scored *x = i < s->n_top ? &s->top[i] : &s->is;
        has |= i < s->n_top && x->id == s->is.id;
        if (i == s->n_top && has)
            break;
        add_string(to, i ? ", " : "{");
        add_token_name(e, to, x->id);
        add_string(to, ": ");
        add_log(to, x->logprob);
    }
    add_string(to, "}");
}

/* As /v1/completions writes them: an array for each of four columns, of the
 * prompt's tokens first if it is told, too. */
static void add_columns(const struct engine *e, struct text *to,
                        const struct reply *r)
{
    static const char *const column[] = {
        "{\"tokens\": [", "], \"token_logprobs\": [", "], \"top_logprobs\": [",
        "], \"text_offset\": ["
    };
    const int n_prompt = r->q->echo ? r->prompt_scores.n : 0;

    for (int c = 0; c < 4; c++) {
        int offset = 0, len;
        add_string(to, column[c]);
        for (int i = 0; i < n_prompt + r->scores.n; i++) {
            const struct score *s = i < n_prompt ? &r->prompt_scores.v[i] :
                                    &r->scores.v[i - n_prompt];
            const char *bytes = visible(e, s->is.id, &len);
            add_string(to, i ? ", " : "");
            if (c == 0)
                add_token_name(e, to, s->is.id);
            else if (c == 1)
                add_log(to, s->is.logprob);
            else if (c == 2)
                add_best(e, to, s);
            else
                add_format(to, "%d", offset);
            for (int k = 0; k < len; k++)
                offset += (bytes[k] & 0xc0) != 0x80;
        }
    }
    add_string(to, "]}");
}

static void add_logprobs(const struct engine *e, struct text *to,
                         const struct reply *r)
{
    if (r->q->logprobs >= 0) {
        member(to, "logprobs");
        if (r->q->is_completion)
            add_columns(e, to, r);
        else {
            add_string(to, "{\"content\": ");
            add_scores(e, to, &r->scores);
            add_string(to, "}");
        }
    }
    if (r->q->prompt_logprobs >= 0 &&
        !(r->q->is_completion && r->q->logprobs >= 0 && r->q->echo)) {
        member(to, "prompt_logprobs");
        add_scores(e, to, &r->prompt_scores);
    }
}

/* The arguments of a call are JSON within a string. */
static void add_calls(struct text *to, const struct calls *calls, uint64_t id)
{
    member_open(to, "tool_calls", "[");
    for (int i = 0; i < calls->n; i++) {
        const struct call *c = &calls->call[i];
        member_open(to, NULL, "{");
        member_text(to, "id", phrase("call_%016llx", (unsigned long long)
                                     hash_number(id, (uint64_t)i)).s);
        member_text(to, "type", "function");
        member_open(to, "function", "{");
        member_bytes(to, "name", c->name.s, c->name.n);
        member_bytes(to, "arguments", c->arguments.s, c->arguments.n);
        add_string(to, "}}");
    }
    add_string(to, "]");
}

/* What was said: a text, of the prompt too if it is wanted; or a message. */
static void add_said(const struct engine *e, struct text *to,
                     const struct job *j, const struct calls *calls)
{
    const struct reply *r = &j->r;
    struct text whole = { 0 };
    int len;

    if (!j->q.is_completion) {
        member_open(to, "message", "{");
        member_text(to, "role", "assistant");
        member_bytes(to, "content", r->text.s ? r->text.s : "", r->text.n);
        if (r->thought.n > 0)
            member_bytes(to, "reasoning_content", r->thought.s, r->thought.n);
        if (calls->n > 0)
            add_calls(to, calls, j->id);
        add_string(to, "}");
        return;
    }
    for (int i = 0; j->q.echo && i < j->q.prompt.n; i++) {
        const char *s = visible(e, j->q.prompt.id[i], &len);
        add(&whole, s, (size_t)len);
    }
    add(&whole, r->text.s, r->text.n);
    member_bytes(to, "text", whole.s ? whole.s : "", whole.n);
    free(whole.s);
}

/* The object of /v1/chat/completions or /v1/completions, but for its last
 * bracket. */
static void add_completion(const struct engine *e, struct text *to,
                           struct job *j, long long created)
{
    struct reply *r = &j->r;
    struct calls calls = take_calls(r);
    size_t n = 0;
    const char *model = lfm2_model_string(e->model, "general.name", &n);

    add_string(to, "{");
    member_text(to, "id", phrase("%s-%016llx", j->q.is_completion ? "cmpl" :
                                 "chatcmpl", (unsigned long long)j->id).s);
    member_text(to, "object", j->q.is_completion ? "text_completion" :
                "chat.completion");
    member_count(to, "created", (uint64_t)created);
    member_bytes(to, "model", model ? model : "", n);
    member_open(to, "choices", "[{\"index\": 0");
    add_said(e, to, j, &calls);
    add_logprobs(e, to, r);
    member_text(to, "finish_reason", calls.n > 0 ? "tool_calls" :
                r->finish == STOPPED ? "stop" :
                r->finish == BY_LENGTH || r->finish == BY_CONTEXT ? "length" :
                NULL);
    add_string(to, "}]");
    member_open(to, "usage", "{");
    member_count(to, "prompt_tokens", (uint64_t)j->q.prompt.n);
    member_count(to, "completion_tokens", (uint64_t)r->n_made);
    member_count(to, "total_tokens", (uint64_t)(j->q.prompt.n + r->n_made));
    member_open(to, "completion_tokens_details", "{");
    member_count(to, "reasoning_tokens", (uint64_t)r->n_thought);
    add_string(to, "}}");
    free_calls(&calls);
}

/* Tokens a second of the prompt, and of the answer without its first token,
 * which the prompt's forward gives; NAN where there are none. */
static double prompt_speed(const struct reply *r)
{
    return r->read > r->started ?
           (r->q->prompt.n - r->n_reused) / (r->read - r->started) : NAN;
}

static double answer_speed(const struct reply *r)
{
    return r->n_steps > 0 && r->ended > r->read ?
           (r->n_sampled - 1) / (r->ended - r->read) : NAN;
}

/* Which model said it, how it can be said again, and how long it took. */
static void add_origin(const struct engine *e, struct text *to,
                       const struct job *j, int uses_date)
{
    static const char *const finish[] = { "interrupted", "stop", "length",
                                          "context", "error" };
    const struct reply *r = &j->r;
    const struct sampling *is = &j->q.sampling;

    member_open(to, "lfm2", "{");
    member_text(to, "finish", finish[r->finish]);
    member_text(to, "model_hash", phrase("%016llx", (unsigned long long)
                                         lfm2_model_hash(e->model)).s);
    member_text(to, "logits_hash", phrase("%016llx",
                                          (unsigned long long)r->hash).s);
    member_text(to, "template", template_name(e->template));
    member_text(to, "date", uses_date ? e->date : NULL);
    member(to, "seed");
    add_format(to, "%lld", j->q.seed);
    member_real(to, "temperature", is->temp);
    member_real(to, "top_k", is->top_k);
    member_real(to, "top_p", is->top_p);
    member_real(to, "min_p", is->min_p);
    member_real(to, "repeat_penalty", is->repeat);
    member_real(to, "repeat_last_n", is->last_n);
    member_open(to, "timings", "{");
    member_count(to, "cache_n", (uint64_t)r->n_reused);
    member_count(to, "prompt_n", (uint64_t)(r->q->prompt.n - r->n_reused));
    member_real(to, "prompt_ms", (r->read - r->started) * 1e3);
    member_real(to, "prompt_per_second", prompt_speed(r));
    member_count(to, "predicted_n", (uint64_t)r->n_made);
    member_real(to, "predicted_ms", (r->ended - r->read) * 1e3);
    member_real(to, "predicted_per_second", answer_speed(r));
    member_count(to, "draft_n", (uint64_t)r->n_guessed);
    member_count(to, "draft_n_accepted", (uint64_t)r->n_right);
    add_string(to, "}}");
}

/* ----------------------------------------------------- 6. What a body asks for
 *
 * The body of a request as OpenAI's clients send it: a line of --batch, or the
 * file of --messages. */

/* Members that are read by name below. */
static const char read_elsewhere[] =
    "custom_id messages prompt tools model logprobs logit_bias "
    "add_generation_prompt continue_final_message chat_template_kwargs "
    "keep_past_thinking preserve_thinking response_format tool_choice "
    "parallel_tool_calls";

/* Members that mean nothing here and change no answer. */
static const char harmless[] =
    "user metadata store service_tier stream_options safety_identifier "
    "prompt_cache_key prompt_cache_retention cache_prompt";

/* Members that are known with these values only, as JSON. */
static const struct { const char *key, *values; } neutral[] = {
    { "n", "1" }, { "best_of", "1" }, { "stream", "false" },
    { "suffix", "\"\"" }, { "modalities", "[\"text\"]" }
};

/* Put the value of a member where the option of that name puts its own. */
static int set_member(struct request *q, const struct option *o,
                      const char *key, const struct json *x, struct why *why)
{
    void *slot = (char *)q + (o->at - AT(ask));
    double value = NAN;
    long long whole = 0;

    if (o->kind == FLAG)
        return json_bool(x, slot) == 0 ? DONE :
               because(why, USAGE, "\"%s\": expected true or false", key);
    if (o->kind == TEXTS) {
        const struct json *list = x->type == JSON_ARRAY ? x->first : x;
        for (; list; list = list->next) {
            const char *s = json_text(list);
            if (!s || add_text(slot, s) != 0)
                return because(why, USAGE, "\"%s\": expected %s", key,
                               values_of(o).s);
            if (x->type != JSON_ARRAY)
                break;
        }
        return DONE;
    }
    json_double(x, &value);
    if (o->kind != REAL && value >= o->min && value <= o->max &&
        value == floor(value) && json_int(x, (long long)o->min,
                                          (long long)o->max, &whole) != 0)
        whole = (long long)value;         /* written as 1e3, or 5.0          */
    if ((o->kind != REAL && value != floor(value)) ||
        set_number(slot, o, value, whole) != 0)
        return because(why, USAGE, "\"%s\": expected %s", key, values_of(o).s);
    return DONE;
}

/* A member without an option of its own. */
static int check_member(const char *key, const struct json *x, struct why *why)
{
    static unsigned told;
    struct text value = { 0 };
    int good = 0;
    const int i = find_word(harmless, ' ', key);

    if (find_word(read_elsewhere, ' ', key) >= 0)
        return DONE;
    if (i >= 0) {
        if (!(told & 1u << i))
            note("\"%s\" changes nothing here", key);
        told |= 1u << i;
        return DONE;
    }
    for (size_t k = 0; k < sizeof neutral / sizeof *neutral; k++)
        if (strcmp(neutral[k].key, key) == 0) {
            add_json(&value, x);
            good = find_word(neutral[k].values, '|', value.s) >= 0;
            free(value.s);
            return good ? DONE : because(why, USAGE, "\"%s\": expected %s", key,
                                         neutral[k].values);
        }
    return because(why, USAGE, "\"%.60s\" is not known here, and might change "
                   "the answer", key);
}

/* {"id": how much its logit is raised, ...} */
static int read_bias(const struct engine *e, struct request *q,
                     const struct json *x, struct why *why)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;

    if (!x)
        return DONE;
    if (x->type != JSON_OBJECT)
        return because(why, USAGE, "\"logit_bias\": expected an object");
    q->bias = zeroed((size_t)x->n_members, sizeof *q->bias);
    for (x = x->first; x; x = x->next) {
        char *end;
        const long id = strtol(x->key, &end, 10);
        double by;
        if (end == x->key || *end || id < 0 || id >= n_vocab ||
            json_double(x, &by) != 0 || !(by >= -1000 && by <= 1000))
            return because(why, USAGE, "\"logit_bias\": \"%.40s\", expected "
                           "token ids from 0 to %d, and numbers from -1000 to "
                           "1000", x->key, n_vocab - 1);
        q->bias[q->n_bias++] = (struct bias){ (int32_t)id, (float)by };
    }
    return DONE;
}

/* "logprobs" is true or false beside messages, a number beside a prompt; with
 * "echo" those of the prompt are wanted, too. */
static int read_logprobs(struct request *q, const struct json *x,
                         struct why *why)
{
    long long k;
    int wanted;

    if (x && json_bool(x, &wanted) == 0)
        q->logprobs = !wanted ? -1 : q->logprobs < 0 ? 0 : q->logprobs;
    else if (x && json_int(x, 0, MAX_LOGPROBS, &k) != 0)
        return because(why, USAGE, "\"logprobs\": expected true, false or a "
                       "whole number from 0 to %d", MAX_LOGPROBS);
    else if (x)
        q->logprobs = (int)k;
    if (q->echo && q->logprobs >= 0 && q->prompt_logprobs < 0)
        q->prompt_logprobs = q->logprobs;
    return DONE;
}

/* All of a body but its prompt; *q holds what the options ask for.  The texts
 * stay in the body. */
static int read_body(const struct engine *e, struct request *q,
                     const struct json *body, struct why *why)
{
    int code = DONE;

    for (const struct json *x = body->first; x && code == DONE; x = x->next) {
        const struct option *o = option_of_member(x->key);
        if (x->type != JSON_NULL)
            code = o ? set_member(q, o, x->key, x, why) :
                   check_member(x->key, x, why);
    }
    if (code == DONE)
        code = read_bias(e, q, given(body, "logit_bias"), why);
    return code == DONE ? read_logprobs(q, given(body, "logprobs"), why) : code;
}

/* ---- from messages to a prompt */

/* Set *out if the object has this flag; one of another type is an error. */
static int read_flag(const struct json *object, const char *key, int *out,
                     struct why *why)
{
    const struct json *x = given(object, key);

    return !x || json_bool(x, out) == 0 ? DONE :
           because(why, USAGE, "\"%s\": expected true or false", key);
}

/* What the prompt has of the answer already: nothing, "<think>", or the message
 * to go on with. */
static const char *answer_of(const struct rendered *r)
{
    const char *const end = r->text.s + r->text.n, *from = end;

    for (int i = 0; i < r->n_marks; i++) {
        const char *mark = r->text.s + r->mark[i].from;
        if (begins(mark, end, TURN_START "assistant\n"))
            from = mark + strlen(TURN_START "assistant\n");
        else if (begins(mark, end, TURN_START) || begins(mark, end, TURN_END))
            from = end;
    }
    return from;
}

/* Does the answer begin inside a thought? */
static int ends_in_thought(const struct rendered *r)
{
    const char *const end = r->text.s + r->text.n, *from = answer_of(r), *p;
    int inside = 0;

    while ((p = find(from, end, inside ? THINK_END : THINK))) {
        inside = !inside;
        from = p + 1;
    }
    return inside;
}

/* The prompt of these messages, as text in *out and tokens in q->prompt.
 * `body` may be NULL, and its members about the last message no longer count
 * once the conversation has `grown`. */
static int make_prompt(struct engine *e, struct request *q,
                       const struct json *messages, const struct json *tools,
                       const struct json *body, int grown,
                       struct rendered *out, struct why *why)
{
    static const char *const keep[] = { "keep_past_thinking",
                                        "preserve_thinking" };
    const struct json *kwargs = given(body, "chat_template_kwargs");
    struct conversation c = {
        .messages = messages, .tools = tools, .date = e->date,
        .open_thought = e->opens_thought
    };
    int code = DONE;

    for (int i = 0; i < 4 && code == DONE; i++)
        if (!c.keep_thinking)
            code = read_flag(i < 2 ? body : kwargs, keep[i % 2],
                             &c.keep_thinking, why);
    if (code == DONE && !grown)
        code = read_flag(body, "continue_final_message", &c.continue_last, why);
    c.generate = !c.continue_last;
    if (code == DONE && !grown)
        code = read_flag(body, "add_generation_prompt", &c.generate, why);
    rendered_free(out);
    free(q->prompt.id);
    q->prompt = (struct ids){ NULL, 0 };
    if (code == DONE)
        code = render(&c, e->template, out, why);
    if (code == DONE)
        code = encode_rendered(e->words, out, e->s->special, &q->prompt, why);
    if (out->lost_calls && !e->lost_calls++)
        note("template %s has no place for the tool_calls of messages, here "
             "and below; what their content says of them stays",
             template_name(e->template));
    q->in_thought = code == DONE && ends_in_thought(out);
    return code;
}

/* "prompt": a text, or the ids of its tokens. */
static int read_plain_prompt(const struct engine *e, struct request *q,
                             const struct json *prompt, struct why *why)
{
    long long id;

    if (prompt->type == JSON_STRING)
        return encode_plain(e->s, e->words, prompt->s, prompt->n, &q->prompt);
    if (prompt->type != JSON_ARRAY)
        return because(why, USAGE, "\"prompt\": expected a string, or an array "
                       "of token ids");
    q->prompt.id = zeroed((size_t)prompt->n_members, sizeof *q->prompt.id);
    for (const struct json *c = prompt->first; c; c = c->next) {
        if (json_int(c, 0, INT32_MAX, &id) != 0)
            return because(why, USAGE, "\"prompt\": expected a string, or an "
                           "array of token ids");
        q->prompt.id[q->prompt.n++] = (int32_t)id;
    }
    return DONE;
}

static int is_word(const struct json *x, const char *word)
{
    return x && x->type == JSON_STRING && strcmp(x->s, word) == 0;
}

/* A whole body: how to answer, and what. */
static int read_request(struct engine *e, struct request *q,
                        const struct json *body, struct why *why)
{
    const struct json *messages = given(body, "messages");
    const struct json *prompt = given(body, "prompt");
    const struct json *tools = is_word(given(body, "tool_choice"), "none") ?
                               NULL : given(body, "tools");
    struct rendered rendered = { .n_marks = 0 };
    int code;

    if (body->type != JSON_OBJECT)
        return because(why, USAGE, "expected a JSON object as the request");
    if (!messages == !prompt)
        return because(why, USAGE, "expected either \"messages\" or "
                       "\"prompt\"");
    q->is_completion = prompt != NULL;
    code = read_body(e, q, body, why);
    if (code == DONE)
        code = read_form(e, q, body, tools, why);
    if (code != DONE)
        return code;
    if (messages && e->template == TEMPLATE_NONE)
        return because(why, USAGE, "the model has no chat template: expected "
                       "\"prompt\", or --template");
    if (prompt)
        return read_plain_prompt(e, q, prompt, why);
    code = make_prompt(e, q, messages, tools, body, 0, &rendered, why);
    rendered_free(&rendered);
    return code;
}

/* ----------------------------------------- 7. Answers, conversations, sessions
 *
 * A conversation is kept as text, the members of a JSON array, and read again
 * for every turn.  What the cache has of it is not computed again. */

struct talk {
    struct engine *e;
    struct text messages;
    struct pool pool;                     /* of body and tools               */
    const struct json *body, *tools;      /* NULL: none                      */
    int grown;                            /* beyond what the body is about   */
    struct rendered prompt;
    struct job job;
    struct printer printer;
    int keeps_session;
};

static void add_message(struct talk *t, const char *role, const char *s,
                        size_t n)
{
    member_open(&t->messages, NULL, "{");
    member_text(&t->messages, "role", role);
    member_bytes(&t->messages, "content", s, n);
    add_string(&t->messages, "}");
    t->grown = 1;
}

/* The messages as a tree in a pool. */
static const struct json *parse_messages(const struct talk *t,
                                         struct pool *pool)
{
    struct text list = { 0 };
    struct json *out = NULL;
    struct why why;

    add_string(&list, "[");
    add(&list, t->messages.s, t->messages.n);
    add_string(&list, "]");
    if (json_parse(pool, list.s, list.n, &out, &why) != DONE)
        say(FAILED, "the conversation cannot be read again: %s", why.s);
    free(list.s);
    return out;
}

/* Put these messages in the place of those there were. */
static void keep_messages(struct talk *t, const struct json *m)
{
    struct text list = { 0 };

    for (; m; m = m->next) {
        add_json(&list, m);
        add_string(&list, m->next ? ", " : "");
    }
    free(t->messages.s);
    t->messages = list;
}

/* Is the last message of this role?  With `drop`, it is taken away. */
static int ends_with_role(struct talk *t, const char *role, int drop)
{
    struct pool pool = { 0 };
    const struct json *list = parse_messages(t, &pool), *last;
    struct json *before = NULL;
    int found = 0;

    last = list ? list->first : NULL;
    while (last && last->next) {
        before = (struct json *)(uintptr_t)last;
        last = last->next;
    }
    if (last)
        found = has_role(last, role);
    if (found && drop) {
        if (before)
            before->next = NULL;
        keep_messages(t, before ? list->first : NULL);
    }
    pool_free(&pool);
    return found;
}

/* The JSON of a file: an array, or an object with one under this key. */
static int read_list(struct talk *t, const char *path, const char *key,
                     const struct json **whole, const struct json **list)
{
    struct text text = { 0 };
    struct json *v;
    struct why why;
    int code = read_text_file(path, &text);

    if (code == DONE &&
        (code = json_parse_list(&t->pool, &text, &v, &why)) != DONE)
        say(code, "%s: %s", path, why.s);
    free(text.s);
    if (code != DONE)
        return code;
    *whole = v;
    *list = v->type == JSON_OBJECT ? json_get(v, key) : v;
    if (!json_is(*list, JSON_ARRAY))
        return say(USAGE, "%s: expected a JSON array, or an object with one as "
                   "\"%s\"", path, key);
    return DONE;
}

/* The messages and tools that options name, and what is asked besides. */
static int read_talk(struct talk *t)
{
    const struct settings *s = t->e->s;
    const struct json *whole, *list;
    struct request *q = &t->job.q;
    struct why why;
    int code = DONE;

    *q = s->ask;
    q->prompt_logprobs = q->logprobs;
    q->is_completion = t->e->template == TEMPLATE_NONE;
    if (s->messages) {
        code = read_list(t, s->messages, "messages", &whole, &list);
        if (code == DONE && whole->type == JSON_OBJECT) {
            t->body = whole;
            t->tools = is_word(given(whole, "tool_choice"), "none") ? NULL :
                       given(whole, "tools");
            code = read_body(t->e, q, whole, &why);
            if (code != DONE)
                say(code, "%s: %s", s->messages, why.s);
        }
        if (code == DONE)
            keep_messages(t, list->first);
    }
    if (code == DONE && s->tools) {
        code = read_list(t, s->tools, "tools", &whole, &list);
        t->tools = list;
    }
    if (code == DONE && (code = read_form(t->e, q, t->body, t->tools, &why)) !=
        DONE)
        say(code, "%s%s%s", s->messages ? s->messages : s->tools ? s->tools :
            "", s->messages || s->tools ? ": " : "", why.s);
    complete_request(t->e, q);
    return code;
}

/* The prompt of all messages so far; `path` is where they are from, or NULL. */
static int prompt_talk(struct talk *t, const char *path)
{
    struct pool pool = { 0 };
    const struct json *list = parse_messages(t, &pool);
    struct why why;
    int code = list ? make_prompt(t->e, &t->job.q, list, t->tools, t->body,
                                  t->grown, &t->prompt, &why) : FAILED;

    pool_free(&pool);
    if (code != DONE && list)
        say(code, "%s%s%s", path ? path : "", path ? ": " : "", why.s);
    return code;
}

/* What the user says next, behind the system prompt if it is the first. */
static int ask(struct talk *t, const struct text *question)
{
    const struct settings *s = t->e->s;
    struct text system = { 0 };
    int code = check_text(question, "the prompt");

    if (code == DONE && t->messages.n == 0 && s->system_file)
        code = read_text_file(s->system_file, &system);
    else if (t->messages.n == 0 && s->system)
        add_string(&system, s->system);
    if (code == DONE && system.n > 0 &&
        (code = check_text(&system, s->system_file ? s->system_file : "-sys"))
        == DONE)
        add_message(t, "system", system.s, system.n);
    if (code == DONE)
        add_message(t, "user", question->s, question->n);
    free(system.s);
    return code;
}

/* ---- one answer */

/* With -v, why it is not faster: what had to be read for every token. */
static void print_speed(const struct talk *t)
{
    const struct engine *e = t->e;
    const struct reply *r = &t->job.r;
    const struct cost cost = count_cost(e->model, e->par.kv_type);
    const double bytes = step_bytes(e->model, &cost, 1, r->ids.n);
    const double own = anonymous_memory();
    const int n_new = r->q->prompt.n - r->n_reused;

    note("prompt of %d tokens, %d of them new%s; answer of %d tokens%s",
         r->q->prompt.n, n_new, isfinite(prompt_speed(r)) ?
         phrase(", %.1f tok/s", prompt_speed(r)).s : "", r->n_made,
         isfinite(answer_speed(r)) ?
         phrase(", %.1f tok/s", answer_speed(r)).s : "");
    note("a token reads %s of weights and cache%s; memory %s%s",
         amount(bytes, "B").s, r->n_steps > 0 && r->ended > r->read ?
         phrase(", %s/s", amount(bytes * r->n_steps / (r->ended - r->read),
                                 "B").s).s : "", amount(peak_memory(), "B").s,
         own > 0 ? phrase(", of it %s not the file's", amount(own, "B").s).s :
         "");
    if (r->n_guessed > 0)
        note("guessed %d tokens, %d of them right", r->n_guessed, r->n_right);
    if (r->n_again > 0)
        note("%d tokens did not fit the schema; to find those that did took "
             "%.2f ms each", r->n_again, r->again * 1e3 / r->n_again);
}

static void print_more(struct job *j)
{
    struct talk *t = j->owner;

    if (!t->e->s->json)
        print_reply(&t->printer, &j->r);
}

static int uses_date(const struct talk *t)
{
    return t->tools && t->tools->first &&
           template_is_dated(t->e->template);
}

/* The whole answer; also one that was interrupted. */
static void print_answer(struct job *j)
{
    struct talk *t = j->owner;
    const struct engine *e = t->e;
    struct text out = { 0 };

    if (!e->s->json) {
        print_end(&t->printer, &j->r);
        return;
    }
    add_completion(e, &out, j, (long long)time(NULL));
    add_origin(e, &out, j, uses_date(t));
    add_string(&out, "}\n");
    show_text(&out);
    free(out.s);
    t->printer.code = flush_output(DONE);
}

static const struct sink to_user = { print_more, print_answer };

/* Answer t->job.q.prompt.  What was said before an interruption stays. */
static int run_reply(struct talk *t)
{
    struct engine *e = t->e;
    struct job *j = &t->job;
    struct why why;
    int code;

    free_reply(&j->r);
    t->printer = start_printer(e->s);
    j->to = &to_user;
    j->owner = t;
    j->id = hash_bytes(HASH_START, (const char *)&j->q.seed, 8) ^
            hash_bytes(HASH_START, (const char *)j->q.prompt.id,
                       (size_t)j->q.prompt.n * 4);
    code = engine_add(e, j, &why);
    if (code != DONE)
        return say(code, "%s", why.s);
    if (e->s->verbose)
        note("seed %lld; %s", j->q.seed, describe_sampling(&j->q.sampling).s);
    running = e->ctx;
    while (code == DONE && j->state != FINISHED) {
        code = engine_step(e);
        if (code == INTERRUPTED && !interrupted)
            code = DONE;                  /* meant for the answer before     */
        code = code == DONE ? t->printer.code : code;
    }
    running = NULL;
    if (j->state != FINISHED) {
        engine_drop(e, j);
        if (j->r.n_made > 0 && code != BAD_FILE)
            print_answer(j);
    }
    if (j->r.finish == BROKEN)
        code = say(FAILED, "%s: logits that are not finite", e->s->model);
    if (j->r.finish == BY_CONTEXT)
        note("stopped: the context of %d tokens is full", e->par.n_ctx);
    if (e->s->verbose && j->r.q)
        print_speed(t);
    return code == DONE ? t->printer.code : code;
}

/* Fill t->job.q.prompt from what the options name. */
static int prepare_prompt(struct talk *t)
{
    struct engine *e = t->e;
    const struct settings *s = e->s;
    struct text text = { 0 };
    int code = DONE;

    if (s->ids)
        return read_ids(s->ids, &t->job.q.prompt);
    if (!s->messages)
        code = read_prompt(s, &text);
    if (code == DONE && e->template == TEMPLATE_NONE)
        code = encode_plain(s, e->words, text.s, text.n, &t->job.q.prompt);
    else {
        if (code == DONE && !s->messages)
            code = ask(t, &text);
        if (code == DONE)
            code = prompt_talk(t, s->messages);
    }
    free(text.s);
    return code;
}

static int write_logits(struct talk *t)
{
    const struct engine *e = t->e;
    const struct ids *prompt = &t->job.q.prompt;
    const size_t n_vocab = (size_t)lfm2_model_config(e->model)->n_vocab;
    FILE *f = create_file(e->s->logits);
    struct why why;
    int code = check_prompt(e, &t->job.q, &why);

    if (code != DONE)
        say(code, "%s", why.s);
    running = e->ctx;
    for (int at = 0, n; f && code == DONE && at < prompt->n; at += n) {
        n = smaller(prompt->n - at, LOGITS_CHUNK);
        code = forward(e, &(lfm2_span){ .tokens = prompt->id + at,
                                        .n_tokens = n, .n_logits = n }, 1);
        const float *l = code == DONE ? lfm2_logits(e->ctx, 0, 0) : NULL;
        for (size_t i = 0; l && i < (size_t)n * n_vocab; i++) {
            unsigned char b[4];
            put_le(b, float_bits(l[i]), 4);
            fwrite(b, 1, 4, f);
        }
    }
    running = NULL;
    return f ? finish_file(f, e->s->logits, code) : BAD_FILE;
}

static int dump_prompt(struct talk *t)
{
    const struct ids *prompt = &t->job.q.prompt;

    if (t->e->s->dump_prompt)
        show_text(&t->prompt.text);
    for (int i = 0; t->e->s->dump_tokens && i < prompt->n; i++)
        printf("%ld%s", (long)prompt->id[i], i + 1 < prompt->n ? " " : "\n");
    return DONE;
}

/* After an answer, its text is a message of the conversation, together with
 * what the prompt had of it.  None is one only if the model wanted it so. */
static void keep_answer(struct talk *t)
{
    const struct rendered *p = &t->prompt;
    const struct reply *r = &t->job.r;
    const char *from = answer_of(p);
    struct text whole = { 0 };
    int go_on = 0;
    struct why why;

    if (r->n_made == 0 && r->finish != STOPPED)
        return;
    if (!t->grown)
        read_flag(t->body, "continue_final_message", &go_on, &why);
    if (go_on)
        ends_with_role(t, "assistant", 1);
    add(&whole, from, (size_t)(p->text.s + p->text.n - from));
    add(&whole, r->raw.s, r->raw.n);
    add_message(t, "assistant", whole.s ? whole.s : "", whole.n);
    free(whole.s);
}

/* ---- sessions
 *
 * What --session keeps between runs, all little-endian:
 *
 *     "LFM2SES1"
 *     u64 n | the conversation: n bytes of JSON, an array of messages
 *     u64 n | n token ids in the cache, u32
 *     u64 hash of all before (FNV-1a)
 *     u64 n | the sequence, as lfm2_seq_save() writes it, with its own check
 *
 * If only the sequence does not fit, as another model's, the conversation is
 * read again.  A file that is anything else is left alone. */

static const char session_magic[] = "LFM2SES1";

/* Take a number, or n of these many bytes each, from the front. */
static int take_le(struct piece *from, int bytes, uint64_t *out)
{
    if (from->n < (size_t)bytes)
        return -1;
    *out = get_le((const unsigned char *)from->s, bytes);
    from->s += bytes;
    from->n -= (size_t)bytes;
    return 0;
}

static int take_bytes(struct piece *from, uint64_t each, struct piece *out)
{
    uint64_t n;

    if (take_le(from, 8, &n) != 0 || n > from->n / each)
        return -1;
    *out = (struct piece){ from->s, (size_t)(n * each) };
    from->s += out->n;
    from->n -= out->n;
    return 0;
}

/* The token ids of a session, in place of what was cached.  Why there is
 * nothing in the cache, or NULL. */
static const char *take_state(struct engine *e, struct piece ids,
                              struct piece state, lfm2_error *err)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;
    struct ids *to = &e->slot[0].cached;
    uint64_t id;

    if (lfm2_seq_load(e->ctx, 0, state.s, state.n, err) != LFM2_OK)
        return err->msg;
    if (ids.n / 4 == (size_t)lfm2_seq_len(e->ctx, 0))
        while (take_le(&ids, 4, &id) == 0 && id < (uint64_t)n_vocab)
            to->id[to->n++] = (int32_t)id;
    if (ids.n == 0 && to->n == lfm2_seq_len(e->ctx, 0))
        return NULL;
    lfm2_seq_trim(e->ctx, 0, 0);
    to->n = 0;
    return "its tokens are not those of its state";
}

/* Go on where the bytes of a session left off. */
static int restore(struct talk *t, const struct text *file)
{
    const char *path = t->e->s->session, *why_not;
    struct piece from = { file->s + 8, file->n - 8 }, said, ids, state;
    struct json *whole = NULL;
    struct pool pool = { 0 };
    uint64_t hash;
    size_t n;
    struct why why;
    lfm2_error err;
    int good = take_bytes(&from, 1, &said) == 0 &&
               take_bytes(&from, 4, &ids) == 0;

    n = file->n - from.n;
    good = good && take_le(&from, 8, &hash) == 0 &&
           hash == hash_bytes(HASH_START, file->s, n) &&
           take_bytes(&from, 1, &state) == 0 && from.n == 0 &&
           json_parse(&pool, said.s, said.n, &whole, &why) == DONE &&
           json_is(whole, JSON_ARRAY);
    if (good && !t->e->s->messages)
        keep_messages(t, whole->first);
    pool_free(&pool);
    if (!good)
        return say(BAD_FILE, "%s: this session is cut or damaged; it is left "
                   "as it is", path);
    why_not = take_state(t->e, ids, state, &err);
    if (why_not)
        note("%s: the conversation is read again: %s", path, why_not);
    else if (t->e->s->verbose)
        note("%s: %d tokens", path, t->e->slot[0].cached.n);
    return DONE;
}

/* Do the lengths in a session make up the file?  It may be long, so this is
 * asked before all of it is read. */
static int is_whole(const char *path)
{
    static const uint64_t each[] = { 1, 4, 1 };
    FILE *f = fopen(path, "rb");
    struct stat st;
    unsigned char b[8];
    uint64_t at = 8, n;
    int good = f && fstat(fileno(f), &st) == 0;

    for (int i = 0; good && i < 3; i++) {
        at += i == 2 ? 8 : 0;             /* the hash                        */
        good = fseeko(f, (off_t)at, SEEK_SET) == 0 && fread(b, 1, 8, f) == 8;
        n = good ? get_le(b, 8) : 0;
        good = good && n <= ((uint64_t)st.st_size - at) / each[i];
        at += 8 + n * each[i];
    }
    good = good && at == (uint64_t)st.st_size;
    if (f)
        fclose(f);
    return good;
}

/* A file that is not there yet begins a session. */
static int load_session(struct talk *t)
{
    const char *path = t->e->s->session;
    struct text file = { 0 };
    char head[8];
    size_t n;

    if (can_replace(path) != DONE)
        return BAD_FILE;
    n = read_head(path, head, sizeof head);
    if (n > 0 && (n < 8 || memcmp(head, session_magic, 8) != 0))
        return say(BAD_FILE, "%s: %s; it is left as it is", path, n == 8 &&
                   memcmp(head, "LFM2", 4) == 0 ? "a session of another "
                   "version of this program" : "no session");
    t->keeps_session = 1;
    if (n == 0)
        return DONE;
    if (!is_whole(path))
        return say(BAD_FILE, "%s: this session is cut or damaged; it is left "
                   "as it is", path);
    if (read_file(path, &file) != DONE || restore(t, &file) != DONE) {
        free(file.s);
        return BAD_FILE;
    }
    if ((t->e->s->system || t->e->s->system_file) &&
        t->messages.n > 0)
        note("%s: goes on as it began, so -sys is not used", path);
    free(file.s);
    return DONE;
}

static void add_talk(struct text *to, const struct talk *t)
{
    add_string(to, "{\"messages\": [");
    add(to, t->messages.s, t->messages.n);
    add_string(to, "]}\n");
}

static int save_session(struct talk *t)
{
    struct engine *e = t->e;
    const struct ids *ids = &e->slot[0].cached;
    const uint64_t n = lfm2_seq_state_size(e->ctx, 0);
    struct text said = { 0 }, part[2] = { { 0 } };
    struct text *const head = &part[0], *const state = &part[1];
    lfm2_error err;
    int code = DONE;

    if (!t->keeps_session)
        return DONE;
    add_string(&said, "[");
    add(&said, t->messages.s, t->messages.n);
    add_string(&said, "]");
    add_string(head, session_magic);
    add_le(head, said.n, 8);
    add(head, said.s, said.n);
    add_le(head, (uint64_t)ids->n, 8);
    for (int i = 0; i < ids->n; i++)
        add_le(head, (uint32_t)ids->id[i], 4);
    add_le(head, hash_bytes(HASH_START, head->s, head->n), 8);
    add_le(head, n, 8);
    reserve(state, n < SIZE_MAX ? (size_t)n : SIZE_MAX);
    state->n = (size_t)n;
    if (lfm2_seq_save(e->ctx, 0, state->s, n, &err) != LFM2_OK)
        code = report(e->s->session, &err);
    else
        code = keep_file(e->s->session, part, 2);
    free(said.s);
    free(head->s);
    free(state->s);
    return code;
}

/* One question, one answer, and the session for the next. */
static int answer_once(struct talk *t)
{
    const int code = run_reply(t);
    int kept = DONE;

    if (t->keeps_session && (code == DONE || (code == INTERRUPTED &&
                                              t->job.r.n_made > 0))) {
        keep_answer(t);
        kept = save_session(t);
    }
    return kept == DONE ? code : kept;
}

/* The answer, the answers, or what else there is to see. */
static int answer(struct talk *t)
{
    const struct settings *s = t->e->s;
    int code = t->e->ctx ? DONE : open_context(t->e);

    if (code == DONE)
        code = open_trace(t->e);
    if (code == DONE)
        code = s->mode == LOGITS ? write_logits(t) : s->mode == CHAT ? chat(t) :
               answer_once(t);
    return close_trace(t->e, code);
}

/* Anything that answers with a model, but --batch. */
static int work_on_model(const struct settings *s)
{
    struct engine e = { .s = s };
    struct talk t = { .e = &e };
    int code = open_engine(&e);

    if (code == DONE && s->mode == CHAT && e.template == TEMPLATE_NONE)
        code = usage("no prompt given, and no chat without a template");
    if (code == DONE)
        code = read_talk(&t);
    if (code == DONE && s->session) {
        code = open_context(&e);
        if (code == DONE)
            code = load_session(&t);
    }
    if (code == DONE && s->mode != CHAT)
        code = prepare_prompt(&t);
    if (code == DONE)
        code = s->mode == DUMP ? dump_prompt(&t) : answer(&t);
    free_reply(&t.job.r);
    free_request(&t.job.q);
    rendered_free(&t.prompt);
    pool_free(&t.pool);
    free(t.messages.s);
    close_engine(&e);
    return code;
}

/* ------------------------------------------------------------------- 8. Chat
 *
 * At a terminal or, with -cnv, from a pipe, where no prompt is shown. */

/* Answer the messages so far.  A turn that cannot be answered is taken back.
 * Each has a seed of its own. */
static int answer_turn(struct talk *t)
{
    int code = prompt_talk(t, NULL);

    if (code == DONE) {
        interrupted = 0;
        code = run_reply(t);
    }
    if (code == TOO_LONG || code == USAGE) {
        ends_with_role(t, "user", 1);
        return DONE;
    }
    if (code != DONE && (code != INTERRUPTED || last_signal != SIGINT))
        return code;
    t->job.q.seed = (t->job.q.seed + 1) & INT64_MAX;
    keep_answer(t);
    return save_session(t);
}

static int forget(struct talk *t, const char *rest)
{
    (void)rest;
    t->messages.n = 0;
    t->body = NULL;
    t->grown = 1;
    return DONE;
}

static int regenerate(struct talk *t, const char *rest)
{
    (void)rest;
    ends_with_role(t, "assistant", 1);
    if (ends_with_role(t, "user", 0))
        return answer_turn(t);
    say(DONE, "there is no message to answer");
    return DONE;
}

/* The new first message is not there if it has no text. */
static int set_system(struct talk *t, const char *text)
{
    struct pool pool = { 0 };
    const struct json *list = parse_messages(t, &pool);
    const struct json *m = list ? list->first : NULL;

    if (m && has_role(m, "system"))
        m = m->next;
    t->messages.n = 0;
    if (text[0])
        add_message(t, "system", text, strlen(text));
    for (; m; m = m->next) {
        add_string(&t->messages, t->messages.n ? ", " : "");
        add_json(&t->messages, m);
    }
    pool_free(&pool);
    return DONE;
}

/* Who is told that a file cannot be opened should hear what may be why. */
static void blame_sandbox(const struct talk *t)
{
    const int error = errno;
    const char *dir = save_dir(t->e->s);

    if (t->e->s->sandbox != SANDBOX_OFF && (error == EACCES || error == EPERM))
        say(DONE, "in this sandbox a chat opens %s%s; --save-dir DIR names a "
            "directory", dir ? "files only in " : "no files", dir ? dir : "");
}

static int save_talk(struct talk *t, const char *path)
{
    struct text out = { 0 };

    if (!path[0] || t->messages.n == 0) {
        say(DONE, path[0] ? "there is nothing to save" : "/save needs a file");
        return DONE;
    }
    add_talk(&out, t);
    if (replace_file(path, &out, 1) == DONE)
        say(DONE, "%s: saved", path);
    else
        blame_sandbox(t);
    free(out.s);
    return DONE;
}

/* A file that is no conversation leaves the one there is. */
static int load_talk(struct talk *t, const char *path)
{
    struct talk had = *t;
    const struct json *whole, *list;

    if (!path[0] || read_list(t, path, "messages", &whole, &list) != DONE) {
        if (path[0])
            blame_sandbox(t);
        else
            say(DONE, "/load needs a file");
        return DONE;
    }
    t->messages = (struct text){ 0 };
    forget(t, "");
    keep_messages(t, list->first);
    if (list->first && prompt_talk(t, path) != DONE) {
        free(t->messages.s);
        t->messages = had.messages;
        t->body = had.body;
        t->grown = had.grown;
        return DONE;
    }
    free(had.messages.s);
    say(DONE, "%s: %d messages", path, list->n_members);
    return DONE;
}

static int print_stats(struct talk *t, const char *rest)
{
    (void)rest;
    say(DONE, "%d of %d tokens in the context", t->e->slot[0].cached.n,
         t->e->par.n_ctx);
    print_settings(t->e);
    if (t->job.r.q)
        print_speed(t);
    return DONE;
}

static int print_commands(struct talk *t, const char *rest);

static const struct command {
    const char *word;
    int (*obey)(struct talk *t, const char *rest);    /* NULL: leave         */
    const char *help;
} commands[] = {
    { "/help", print_commands, "/help         this text" },
    { "/clear", forget, "/clear        forget the conversation" },
    { "/regen", regenerate, "/regen        answer the last message once more" },
    { "/system", set_system, "/system TEXT  change the system prompt" },
    { "/save", save_talk, "/save FILE    write the conversation as JSON" },
    { "/load", load_talk, "/load FILE    go on with one" },
    { "/stats", print_stats, "/stats        tokens, speed and memory" },
    { "/quit", NULL, "/quit         leave; so does Ctrl-D" },
    { "/exit", NULL, NULL }, { "/bye", NULL, NULL },
};

enum { N_COMMANDS = sizeof commands / sizeof *commands };

static int print_commands(struct talk *t, const char *rest)
{
    (void)t, (void)rest;
    fputs("Type a message, and its answer follows.  \"\"\" begins and ends one "
          "of several\nlines, a \\ at the end of a line goes on with the next, "
          "and a message may begin\nwith a blank where it would be a command.  "
          "Ctrl-C stops an answer.\n", stderr);
    for (int i = 0; i < N_COMMANDS; i++)
        if (commands[i].help)
            fprintf(stderr, "  %s\n", commands[i].help);
    return DONE;
}

/* A line that begins with / .  Returns -1 to leave. */
static int obey(struct talk *t, const char *line)
{
    const size_t n = strcspn(line, " ");
    const char *rest = line + n + strspn(line + n, " ");

    for (int i = 0; i < N_COMMANDS; i++)
        if (strlen(commands[i].word) == n &&
            memcmp(line, commands[i].word, n) == 0)
            return commands[i].obey ? commands[i].obey(t, rest) : -1;
    say(DONE, "%.*s: no such command; /help lists them", (int)n, line);
    return DONE;
}

/* What there is to answer before anything is typed: the options' prompt, or
 * messages that do not end with an answer. */
static int answer_first(struct talk *t, struct text *line)
{
    const struct settings *s = t->e->s;
    struct why why;
    int code, go_on = 0;

    if (s->prompt || s->file) {
        code = read_prompt(s, line);
        if (code == DONE)
            code = ask(t, line);
        return code == DONE ? answer_turn(t) : code;
    }
    if (!s->messages)
        return DONE;
    read_flag(t->body, "continue_final_message", &go_on, &why);
    code = prompt_talk(t, s->messages);
    if (code != DONE || (ends_with_role(t, "assistant", 0) && !go_on))
        return code;
    return answer_turn(t);
}

static int chat(struct talk *t)
{
    const int shows = isatty(STDIN_FILENO);
    struct text line = { 0 };
    size_t n = 0;
    const char *name = lfm2_model_string(t->e->model, "general.name", &n);
    int code, got = 0;

    if (shows)
        note("%.*s; /help lists commands, Ctrl-D leaves", (int)n,
             name ? name : "");
    code = answer_first(t, &line);
    while (code == DONE && (got = read_message(&line, shows)) > 0) {
        if (line.n == 0)
            continue;
        if (line.s[0] == '/' && !strchr(line.s, '\n'))
            code = obey(t, line.s);
        else if ((code = ask(t, &line)) == DONE)
            code = answer_turn(t);
        else if (code == USAGE)
            code = DONE;                  /* only this message is wrong      */
    }
    free(line.s);
    if (code == DONE && got < 0)
        return INTERRUPTED;
    return code < 0 ? DONE : code;
}

/* ---------------------------------------------------------------- 9. --batch
 *
 * JSON lines in, JSON lines out, in the same order.  A line is an OpenAI batch
 * line {"custom_id", "method", "url", "body"} or a body alone.  Up to
 * --parallel of them are answered at once, so the weights are read once for
 * all.  What is answered depends on the line alone: bits do not depend on
 * neighbours, and the seed comes from the line unless it names one. */

enum { MAX_LINE = 1 << 26, AHEAD = 4 };   /* AHEAD: lines read per sequence  */

struct entry {                            /* a line, from reading to writing */
    struct job job;
    struct pool pool;                     /* of its JSON                     */
    struct batch *batch;
    int is_done, is_error;
    long long line;                       /* of the input, from 1            */
    size_t bytes;                         /* of it                           */
    struct text id, out;                  /* custom_id; the line of output   */
};

/* Lines that come in pieces. */
struct source {
    int fd;
    struct text buf;
    size_t at, seen;                      /* of buf: taken; without a newline
                                             behind at                       */
    int torn;                             /* the last line had no newline    */
    int ended, error;                     /* errno, or 0                     */
    long long line;
};

/* An id that a run before has answered, and how often. */
struct known { struct text id; int times; };

struct batch {
    struct engine e;
    struct source in;
    const char *in_name, *out_name;
    int out;
    struct entry *entry;                  /* ring of [n_ring]                */
    int n_ring, first, n_entries;
    struct known *known;                  /* [n_known], sorted               */
    int n_known, shard, n_shards;
    long long done, failed, skipped, failed_before;
    double tokens, reused, guessed, right, bytes, size, started, beat;
};

/* ---- a line of output */

static const char output_start[] = "{\"id\": \"batch_req_";

static void begin_output(struct entry *x)
{
    add_string(&x->out, output_start);
    add_format(&x->out, "%016llx\"", (unsigned long long)x->job.id);
    member_bytes(&x->out, "custom_id", x->id.s, x->id.n);
}

static void finish_error(struct entry *x, int code, const char *why)
{
    static const char *const name[] = {
        [FAILED] = "failed", [USAGE] = "invalid_request",
        [BAD_MODEL] = "bad_model", [TOO_LONG] = "context_length_exceeded"
    };

    begin_output(x);
    member(&x->out, "response");
    add_string(&x->out, "null");
    member_open(&x->out, "error", "{");
    member_text(&x->out, "code", name[code]);
    member_count(&x->out, "line", (uint64_t)x->line);
    member_text(&x->out, "message", why);
    add_string(&x->out, "}}\n");
    x->is_done = x->is_error = 1;
    x->batch->failed++;
}

/* No time is in it: the same line has the same answer, byte for byte. */
static void finish_entry(struct job *j)
{
    struct entry *x = j->owner;
    struct batch *b = x->batch;

    b->tokens += j->q.prompt.n + j->r.n_made;
    b->reused += j->r.n_reused;
    b->guessed += j->r.n_guessed;
    b->right += j->r.n_right;
    if (j->r.finish == BROKEN) {
        finish_error(x, FAILED, "logits that are not finite");
    } else {
        begin_output(x);
        add_format(&x->out, ", \"response\": {\"status_code\": 200, "
                   "\"request_id\": \"req_%016llx\", \"body\": ",
                   (unsigned long long)j->id);
        add_completion(&b->e, &x->out, j, 0);
        add_string(&x->out, "}}, \"error\": null}\n");
        x->is_done = 1;
        b->done++;
    }
    free_reply(&j->r);
}

static void wait_for_end(struct job *j)
{
    (void)j;
}

static const struct sink to_line = { wait_for_end, finish_entry };

static void free_entry(struct entry *x)
{
    free_reply(&x->job.r);
    free_request(&x->job.q);
    pool_free(&x->pool);
    free(x->id.s);
    free(x->out.s);
}

/* At once, if that is possible, so that a line is whole or not there. */
static int write_line(const struct batch *b, const struct text *line)
{
    for (size_t at = 0; at < line->n;) {
        const ssize_t n = write(b->out, line->s + at, line->n - at);
        if (n < 0 && errno != EINTR)
            return say(BAD_FILE, "%s: %s", b->out_name, strerror(errno));
        at += n > 0 ? (size_t)n : 0;
    }
    return DONE;
}

/* Write what is finished, in the order of the input. */
static int write_finished(struct batch *b)
{
    int code = DONE;

    while (code == DONE && b->n_entries > 0 && b->entry[b->first].is_done) {
        struct entry *x = &b->entry[b->first];
        if (isatty(b->out))
            x->out.n = drop_controls(x->out.s, x->out.n);
        code = write_line(b, &x->out);
        b->bytes += (double)x->bytes;
        free_entry(x);
        b->first = (b->first + 1) % b->n_ring;
        b->n_entries--;
    }
    return code;
}

/* ---- the input */

/* Is there something to read, or the end of it?  A signal ends the waiting; one
 * that comes just before it is heard a second later. */
static int is_ready(int fd, int wait)
{
    struct pollfd p = { fd, POLLIN, 0 };
    int n;

    do
        n = poll(&p, 1, wait ? 1000 : 0);
    while (n <= 0 && wait && !interrupted);
    return n > 0 && !interrupted;
}

/* The next line, with NUL for its end (\n, or \r\n): 1; 0 if it has not come
 * yet or will not.  Of one that is too long some of the end may be missing. */
static int next_line(struct source *in, int wait, struct piece *line)
{
    for (;;) {
        reserve(&in->buf, 1 << 16);
        char *from = in->buf.s + in->at;
        size_t n = in->buf.n - in->at;
        const char *end = memchr(from + in->seen, '\n', n - in->seen);
        if (end || (in->ended && n > 0)) {
            n = end ? (size_t)(end - from) : n;
            in->at += n + (end != NULL);
            in->seen = 0;
            in->torn = !end;
            in->line++;
            n -= n > 0 && from[n - 1] == '\r';
            from[n] = '\0';
            *line = (struct piece){ from, n };
            return 1;
        }
        in->seen = n = n <= MAX_LINE ? n : MAX_LINE + 1;
        if (in->at > 0)
            memmove(in->buf.s, from, n);
        in->buf.n = n;
        in->at = 0;
        if (in->ended || !is_ready(in->fd, wait))
            return 0;
        const ssize_t got = read(in->fd, in->buf.s + n, 1 << 16);
        in->ended = got == 0 || (got < 0 && errno != EINTR);
        in->error = got < 0 && in->ended ? errno : 0;
        in->buf.n += got > 0 ? (size_t)got : 0;
    }
}

/* The same line, the same seed; another with another -s. */
static int read_entry(struct batch *b, struct entry *x,
                      const struct json *line, struct why *why)
{
    const struct json *id = given(line, "custom_id");
    const struct json *body = given(line, "body");
    const struct json *method = given(line, "method");
    const struct json *url = given(line, "url");
    struct request *q = &x->job.q;
    struct text asked = { 0 };
    uint64_t hash;
    int code;

    if (id && id->type != JSON_STRING)
        return because(why, USAGE, "\"custom_id\": expected a string");
    if (id) {
        x->id.n = 0;
        add(&x->id, id->s, id->n);
        add_json(&asked, id);
    }
    add_json(&asked, body ? body : line);
    hash = hash_bytes(HASH_START, asked.s, asked.n);
    x->job.id = hash_number(hash, (uint64_t)x->line);
    free(asked.s);
    if (body && method && !is_word(method, "POST"))
        return because(why, USAGE, "\"method\": expected \"POST\"");
    if (body && url && !is_word(url, "/v1/chat/completions") &&
        !is_word(url, "/v1/completions"))
        return because(why, USAGE, "\"url\": expected \"/v1/chat/completions\" "
                       "or \"/v1/completions\"");
    hash ^= q->seed == -1 ? 0 : (uint64_t)q->seed;
    q->seed = (long long)hash;
    code = read_request(&b->e, q, body ? body : line, why);
    complete_request(&b->e, q);
    return code;
}

/* ---- a run that goes on */

static int by_id(const void *a, const void *b)
{
    const struct text *x = &((const struct known *)a)->id;
    const struct text *y = &((const struct known *)b)->id;
    const int order = memcmp(x->s, y->s, x->n < y->n ? x->n : y->n);

    return order ? order : (x->n > y->n) - (x->n < y->n);
}

/* What begins otherwise was not written here. */
static int is_ours(const struct piece *line)
{
    const size_t len = strlen(output_start);

    return memcmp(line->s, output_start, line->n < len ? line->n : len) == 0;
}

/* The custom_id of a line of output, as one that needs no answer any more. */
static int know_line(struct batch *b, const struct piece *line,
                     long long number)
{
    const size_t n = (size_t)b->n_known;
    struct pool pool = { 0 };
    struct json *whole = NULL;
    const struct json *id;
    struct why why;

    if ((n & (n - 1)) == 0)
        b->known = resize(b->known, (n ? 2 * n : 1) * sizeof *b->known);
    if (is_ours(line))
        json_parse(&pool, line->s, line->n, &whole, &why);
    id = given(whole, "custom_id");
    if (json_is(id, JSON_STRING)) {
        struct known *k = &b->known[b->n_known++];
        *k = (struct known){ .times = 1 };
        add(&k->id, id->s, id->n);
        b->failed_before += given(whole, "error") != NULL;
    }
    pool_free(&pool);
    return b->n_known > (int)n ? DONE :
           say(BAD_FILE, "%s: line %lld is none that --batch writes",
               b->out_name, number);
}

/* Sort what is known, and count what is there more than once. */
static void sort_known(struct batch *b)
{
    int n = 0;

    if (b->n_known > 0)
        qsort(b->known, (size_t)b->n_known, sizeof *b->known, by_id);
    for (int i = 0; i < b->n_known; i++)
        if (n > 0 && by_id(&b->known[n - 1], &b->known[i]) == 0) {
            b->known[n - 1].times++;
            free(b->known[i].id.s);
        } else
            b->known[n++] = b->known[i];
    b->n_known = n;
}

/* Does another process write to this file?  Both would answer the same lines.
 * Where there are no locks nobody knows. */
static int is_taken(int fd)
{
#ifdef F_SETLK
    struct flock all = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

    return fcntl(fd, F_SETLK, &all) != 0 && (errno == EAGAIN ||
                                             errno == EACCES);
#else
    return (void)fd, 0;
#endif
}

/* What a run before has written; a line that it was killed in is cut off. */
static int open_resumed(struct batch *b)
{
    const char *path = b->out_name = b->e.s->resume;
    const int fd = open(path, O_RDWR | O_CREAT | O_APPEND, 0666);
    struct source from = { .fd = fd };
    struct piece line;
    struct stat st;
    int code = DONE;

    b->out = fd;
    if (fd < 0 || fstat(fd, &st) != 0)
        return say(BAD_FILE, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return say(BAD_FILE, "%s: not a regular file", path);
    if (is_taken(fd))
        return say(BAD_FILE, "%s: another process is writing to it", path);
    while (code == DONE && next_line(&from, 1, &line))
        if (!from.torn || !is_ours(&line))
            code = know_line(b, &line, from.line);
        else if (ftruncate(fd, st.st_size - (off_t)line.n) != 0)
            from.error = errno;
    if (code == DONE && from.error)
        code = say(BAD_FILE, "%s: %s", path, strerror(from.error));
    free(from.buf.s);
    if (code == DONE)
        note("%s: %d lines are there already", path, b->n_known);
    sort_known(b);
    return code;
}

/* Is the answer with this id there already?  It counts once. */
static int take_known(struct batch *b, const struct text *id)
{
    const struct known asked = { .id = *id };
    struct known *k = b->n_known ? bsearch(&asked, b->known,
        (size_t)b->n_known, sizeof *b->known, by_id) : NULL;

    return k && k->times > 0 && k->times--;
}

/* I/N, counted from 0. */
static int choose_shard(struct batch *b)
{
    const char *s = b->e.s->shard ? b->e.s->shard : "0/1";
    int end = 0;

    if (sscanf(s, "%d/%d%n", &b->shard, &b->n_shards, &end) != 2 || s[end] ||
        b->shard < 0 || b->shard >= b->n_shards)
        return usage("--shard %s: expected I/N with I from 0 to N-1", s);
    return DONE;
}

/* ---- many requests */

/* A line becomes a job, or is left to an earlier run. */
static void add_entry(struct batch *b, const struct piece *line)
{
    struct entry *x = &b->entry[(b->first + b->n_entries) % b->n_ring];
    struct text text = { 0 };
    struct json *whole = NULL;
    struct why why;
    int code;

    *x = (struct entry){
        .batch = b, .line = b->in.line, .bytes = line->n + 1,
        .job = { .q = b->e.s->ask, .to = &to_line, .owner = x }
    };
    add_format(&x->id, "line-%lld", x->line);
    x->job.id = hash_number(hash_bytes(HASH_START, line->s, line->n),
                            (uint64_t)x->line);
    add(&text, line->s, line->n);
    clean_text(&text);
    if (line->n > MAX_LINE)
        code = because(&why, USAGE, "longer than %d bytes", MAX_LINE);
    else if (line->n > 1 && (memcmp(line->s, "\xff\xfe", 2) == 0 ||
                             memcmp(line->s, "\xfe\xff", 2) == 0))
        code = because(&why, USAGE, "UTF-16, expected UTF-8: iconv -f UTF-16 "
                       "-t UTF-8 makes it of this file");
    else
        code = json_parse(&x->pool, text.s, text.n, &whole, &why);
    free(text.s);
    if (code == DONE)
        code = read_entry(b, x, whole, &why);
    if (take_known(b, &x->id)) {
        b->skipped++;
        b->bytes += (double)x->bytes;
        free_entry(x);
        return;
    }
    if (x->job.q.stop.n == b->e.s->ask.stop.n)        /* no texts of it left */
        pool_free(&x->pool);
    if (code == DONE)
        code = engine_add(&b->e, &x->job, &why);
    if (code != DONE)                     /* columns, but no lines, in JSON  */
        finish_error(x, code, strncmp(why.s, "line 1, ", 8) ? why.s :
                     why.s + 8);
    b->n_entries++;
}

/* Read lines while there is room; wait for one only if there is nothing else to
 * do. */
static void read_lines(struct batch *b)
{
    struct piece line;

    while (b->n_entries < b->n_ring &&
           next_line(&b->in, b->n_entries == 0, &line)) {
        if (strspn(line.s, " \t\r") >= line.n ||
            (b->in.line - 1) % b->n_shards != b->shard)
            b->bytes += (double)line.n + 1;
        else
            add_entry(b, &line);
    }
}

/* A line on standard error every ten seconds, and at the end. */
static void report_progress(struct batch *b, int last)
{
    const double now = seconds(), took = now - b->started + 1e-9;
    const double part = b->size > 0 ? b->bytes / b->size : 0;

    if (!last && now - b->beat < 10)
        return;
    b->beat = now;
    note("%lld answered, %lld failed, %lld were there; %.1f tok/s, %.0f s%s",
         b->done, b->failed, b->skipped, b->tokens / took, took,
         !last && part > 0 && part < 1 ?
         phrase(", %.0f %%, %.0f s to go", part * 100,
                took / part * (1 - part)).s : "");
    if (last && b->e.s->verbose)
        note("%.0f tokens, %.0f of them reused%s", b->tokens, b->reused,
             b->guessed > 0 ? phrase("; guessed %.0f, %.0f of them right",
                                     b->guessed, b->right).s : "");
}

static int run_batch(struct batch *b)
{
    int code;

    for (;;) {
        read_lines(b);
        code = write_finished(b);
        if (code != DONE || interrupted || (b->n_entries == 0 && b->in.ended &&
                                            b->in.at == b->in.buf.n))
            break;
        code = engine_step(&b->e);
        if (code != DONE)
            break;
        report_progress(b, 0);
    }
    if (code == DONE && interrupted)
        code = INTERRUPTED;
    if (code == DONE && b->in.error)
        code = say(BAD_FILE, "%s: %s", b->in_name, strerror(b->in.error));
    for (; b->n_entries > 0; b->n_entries--) {
        free_entry(&b->entry[b->first]);
        b->first = (b->first + 1) % b->n_ring;
    }
    return code;
}

static int open_batch(struct batch *b)
{
    const struct settings *s = b->e.s;
    struct stat st;
    int code = choose_shard(b);

    if (code != DONE)
        return code;
    b->in.fd = !s->file || is_dash(s->file) ? STDIN_FILENO :
               open(s->file, O_RDONLY);
    b->in_name = s->file ? s->file : "standard input";
    if (b->in.fd < 0)
        return say(BAD_FILE, "%s: %s", s->file, strerror(errno));
    if (fstat(b->in.fd, &st) == 0 && S_ISREG(st.st_mode))
        b->size = (double)st.st_size;
    b->out_name = "standard output";
    code = open_engine(&b->e);
    if (code == DONE && s->resume)
        code = open_resumed(b);
    if (code != DONE)
        return code;
    b->e.par.n_seq = s->parallel;
    b->e.par.n_logits = s->parallel + LOGITS_CHUNK;
    b->n_ring = s->parallel * AHEAD;
    b->entry = zeroed((size_t)b->n_ring, sizeof *b->entry);
    return open_context(&b->e);
}

static int batch(const struct settings *s)
{
    struct batch b = { .e.s = s, .out = STDOUT_FILENO };
    int code = open_batch(&b);

    if (code == DONE) {
        b.started = b.beat = seconds();
        running = b.e.ctx;
        code = run_batch(&b);
        running = NULL;
        report_progress(&b, 1);
    }
    if (b.out > STDOUT_FILENO && close(b.out) != 0 && code == DONE)
        code = say(BAD_FILE, "%s: %s", b.out_name, strerror(errno));
    if (b.in.fd > STDIN_FILENO)
        close(b.in.fd);
    for (int i = 0; i < b.n_known; i++)
        free(b.known[i].id.s);
    free(b.known);
    free(b.in.buf.s);
    free(b.entry);
    close_engine(&b.e);
    return code == DONE && b.failed + b.failed_before > 0 ? PARTLY : code;
}

/* ------------------------------------------------------ 10. The command line
 *
 * One table says which options there are, which values are good, in which modes
 * they mean something, what the body of a request calls them, and what --help
 * says. */

#define GROUP(title)            { .help = title }
#define SWITCH(names, field, modes, help) \
    { FLAG, names, NULL, AT(field), 0, 0, NULL, modes, 0, help }
#define STRING(names, arg, field, modes, help) \
    { TEXT, names, arg, AT(field), 0, 0, NULL, modes, 0, help }
#define NUMBER(kind, names, arg, field, min, max, json, modes, help) \
    { kind, names, arg, AT(field), min, max, json, modes, 0, help }
#define MODE(kind, names, arg, field, mode, help) \
    { kind, names, arg, AT(field), 0, 0, NULL, mode, mode, help }

static const struct option table[] = {
    GROUP("What to do"),
    STRING("-m --model", "FILE", model, ANY - SELFTEST,
           "the model, if it is not the first argument"),
    STRING("-p --prompt", "TEXT", prompt, PROMPT | TOKENIZE | DETOKENIZE,
           "the prompt, if it is not the second argument; text that is piped "
           "in follows it"),
    STRING("-f --file", "FILE", file, PROMPT | BATCH | TOKENIZE | DETOKENIZE,
           "the prompt, or the lines of --batch, from FILE (-: standard "
           "input)"),
    STRING("-sys --system-prompt", "TEXT", system, PROMPT,
           "the system prompt"),
    STRING("-sysf --system-prompt-file", "FILE", system_file, PROMPT,
           "the system prompt from FILE"),
    STRING("--messages", "FILE", messages, PROMPT,
           "a conversation in JSON, or a whole request, instead of a prompt"),
    STRING("--tools", "FILE", tools, PROMPT,
           "tools that the model may call, in JSON"),
    STRING("--session", "FILE", session, TALK | DUMP,
           "keep the conversation in FILE, and go on with it"),
    MODE(FLAG, "-cnv --interactive", NULL, mode, CHAT,
         "chat, even after a prompt or without a terminal"),
    STRING("--save-dir", "DIR", save_dir, CHAT,
           "where a chat may save and load conversations"),
    SWITCH("--raw -no-cnv --no-conversation", raw,
           ANSWER | LOGITS | DUMP | BATCH,
           "no chat template: plain text is continued"),
    MODE(FLAG, "--dump-prompt", NULL, dump_prompt, DUMP,
         "print the prompt as the chat template writes it"),
    MODE(FLAG, "--dump-tokens", NULL, dump_tokens, DUMP,
         "print the token ids of the prompt"),
    STRING("--ids", "FILE", ids, ANSWER | LOGITS | DUMP,
           "the prompt as token ids, int32, little-endian"),
    MODE(TEXT, "--logits", "OUT", logits, LOGITS,
         "write the logits of all tokens of the prompt, float32"),
    MODE(FLAG, "--tokenize", NULL, mode, TOKENIZE,
         "print the token ids of a text"),
    MODE(FLAG, "--detokenize", NULL, mode, DETOKENIZE,
         "print the text of lines of token ids"),
    SWITCH("--null", null, TOKENIZE | DETOKENIZE,
           "texts of --tokenize and --detokenize end with a NUL byte"),
    SWITCH("--bos", bos, RUN | TOKENIZE,
           "begin plain text with the BOS token"),
    SWITCH("--special", special, RUN | TOKENIZE | DETOKENIZE,
           "control tokens written in the text count as such"),
    MODE(FLAG, "--batch", NULL, mode, BATCH,
         "answer JSON lines, in OpenAI's batch format"),
    MODE(FLAG, "--inspect", NULL, mode, INSPECT,
         "what is in a model file, and what it takes to run it"),
    MODE(FLAG, "--selftest", NULL, mode, SELFTEST,
         "try this build on this machine; needs no model"),
    MODE(FLAG, "--bench", NULL, mode, BENCH,
         "measure the speed; its options are listed last"),
    MODE(TEXT, "--export-tokenizer", "FILE", export_to, EXPORT,
         "write the vocabulary of a model as a tokenizer.bin"),
    STRING("--tokenizer", "FILE", tokenizer, ANY - SELFTEST - BENCH,
           "a vocabulary to use instead of the model's"),
    MODE(TEXT, "--ppl", "FILE", ppl, PPL,
         "perplexity of a text, measured like llama-perplexity"),

    GROUP("How to answer"),
    NUMBER(WHOLE, "-n --predict --n-predict --max-tokens", "N", ask.limit, -2,
           1 << 30, "max_tokens max_completion_tokens", GENERATE,
           "at most N tokens (-1: no limit; for plain text 256)"),
    NUMBER(CHOICE, "--template --chat-template", TEMPLATES, template, 0, 0,
           NULL, RUN,
           "chat template: lfm2, lfm2.5-instruct, -new, -vl, -8b-a1b or -2.6b, "
           "none (auto: by the file)"),
    STRING("--date", "YYYY-MM-DD", date, PROMPT | BATCH,
           "the date for templates that state it (today)"),
    NUMBER(CHOICE, "--think", "auto|show|hide|raw", think, 0, 0, NULL,
           GENERATE, "thoughts of the model (auto: shown at a terminal)"),
    NUMBER(WHOLE, "--think-budget", "N", ask.think_budget, -1, 1 << 30,
           "thinking_budget", GENERATE,
           "close a thought after N tokens (-1: never)"),
    NUMBER(TEXTS, "--stop -r --reverse-prompt", "TEXT", ask.stop, 0, 0, "stop",
           GENERATE, "end the answer before TEXT; may be repeated"),
    NUMBER(FLAG, "--ignore-eos", NULL, ask.ignore_eos, 0, 0, "ignore_eos",
           GENERATE, "go on when the model would end"),
    STRING("--json-schema -jf --json-schema-file", "FILE", json_schema,
           TALK | BATCH, "answer in JSON, as the JSON schema in FILE has it"),
    SWITCH("--json", json, ANSWER | INSPECT | PPL,
           "print one JSON object: the answer as OpenAI's API writes it, or "
           "the report"),
    NUMBER(WHOLE, "--logprobs", "K", ask.logprobs, 0, MAX_LOGPROBS,
           "top_logprobs", ANSWER,
           "log probabilities, and those of the K likeliest tokens, in --json"),
    NUMBER(WHOLE, "", "K", ask.prompt_logprobs, 0, MAX_LOGPROBS,
           "prompt_logprobs", BATCH, NULL),
    NUMBER(FLAG, "", NULL, ask.echo, 0, 0, "echo", BATCH, NULL),

    GROUP("How to choose words (by default as the model's makers advise)"),
    NUMBER(REAL, "--temp --temperature", "F", ask.sampling.temp, 0, 100,
           "temperature", GENERATE,
           "temperature (0: always the likeliest token)"),
    NUMBER(WHOLE, "--top-k", "N", ask.sampling.top_k, -1, 1 << 30, "top_k",
           GENERATE, "choose from the N likeliest tokens (0: off)"),
    NUMBER(REAL, "--top-p", "F", ask.sampling.top_p, 0, 1, "top_p", GENERATE,
           "choose from the likeliest tokens that together have probability F "
           "(1: off)"),
    NUMBER(REAL, "--min-p", "F", ask.sampling.min_p, 0, 1, "min_p", GENERATE,
           "drop tokens less than F times as likely as the likeliest (0: off)"),
    NUMBER(REAL, "--repeat-penalty --repetition-penalty", "F",
           ask.sampling.repeat, 0.01, 100, "repetition_penalty repeat_penalty",
           GENERATE, "make recent tokens less likely (1: off, as with --temp "
           "0)"),
    NUMBER(WHOLE, "--repeat-last-n", "N", ask.sampling.last_n, -1, 1 << 30,
           NULL, GENERATE, "how many tokens are recent (64; -1: all)"),
    NUMBER(REAL, "--presence-penalty", "F", ask.presence, -100, 100,
           "presence_penalty", GENERATE,
           "make tokens of the answer less likely to come again (0)"),
    NUMBER(REAL, "--frequency-penalty", "F", ask.frequency, -100, 100,
           "frequency_penalty", GENERATE,
           "the same for each time they came (0)"),
    NUMBER(SEED, "-s --seed", "N", ask.seed, -9e18, 9e18, "seed", GENERATE,
           "the same seed gives the same answer (-1: random)"),

    GROUP("To look inside"),
    STRING("--trace", "FILE", trace, TALK | LOGITS,
           "write what every module computes, as JSON lines"),
    NUMBER(TEXTS, "--trace-filter", "GLOB", trace_filter, 0, 0, NULL,
           TALK | LOGITS, "trace only modules of such names; may be repeated"),
    STRING("--trace-tokens", "A-B", trace_tokens, TALK | LOGITS,
           "trace only positions A to B, counted from 0"),
    STRING("--trace-raw", "FILE", trace_raw, TALK | LOGITS,
           "with --trace: all the numbers, float32"),

    GROUP("With --batch"),
    NUMBER(WHOLE, "--parallel", "N", parallel, 1, 1024, NULL, BATCH,
           "answer up to N lines at once (32)"),
    NUMBER(WHOLE, "--prompt-piece", "N", piece, 1, 1 << 16, NULL, BATCH,
           "while answers are written, read at most N tokens of new prompts "
           "between two of their tokens (all that fit)"),
    STRING("--shard", "I/N", shard, BATCH,
           "answer only part I of N, counted from 0"),
    STRING("--resume", "OUT", resume, BATCH,
           "append to OUT, and skip lines that are answered there"),

    GROUP("How to run"),
    NUMBER(WHOLE, "-c --ctx-size", "N", ctx, 0, MAX_CTX, NULL, RUN | INSPECT,
           "longest text, in tokens (4096; 0: all the model was trained for)"),
    NUMBER(WHOLE, "-t --threads", "N", threads, 0, 1024, NULL, RUN | INSPECT,
           "threads (0: one for each CPU)"),
    NUMBER(WHOLE, "-b --batch-size", "N", batch, 1, 1 << 16, NULL,
           RUN | INSPECT | BENCH,
           "tokens computed at once (512; with experts 2048)"),
    NUMBER(WHOLE, "--lookup", "N", lookup, 0, MAX_LOOKUP, NULL, GENERATE,
           "guess up to N tokens from the text so far; the answer stays the "
           "same (7; with experts 0)"),
    NUMBER(CHOICE, "--isa",
           "auto|scalar|avx2|avxvnni|avx512|avx512vnni|neon|dotprod", isa, 0, 0,
           NULL, RUN | INSPECT | BENCH, "instruction set: auto, scalar, avx2, "
           "avxvnni, avx512, avx512vnni, neon or dotprod"),
    NUMBER(CHOICE, "--kv", "f16|f32", kv, 0, 0, NULL, RUN | INSPECT | BENCH,
           "precision of the KV cache"),
    SWITCH("--no-mmap", no_mmap, RUN | INSPECT | BENCH | EXPORT,
           "read the model into memory instead of mapping the file"),
    NUMBER(CHOICE, "--sandbox", "auto|require|off", sandbox, 0, 0, NULL,
           ANY - BENCH - SELFTEST,
           "give up rights that are not needed (require: or fail)"),
    NUMBER(CHOICE, "--color", "auto|on|off", color, 0, 0, NULL, TALK,
           "dim the thoughts of the model"),
    SWITCH("-q --quiet", quiet, ANY, "print errors only"),
    SWITCH("-v --verbose", verbose, ANY, "print settings, seed and speed"),
    SWITCH("-h --help", help, ANY, "print this text"),
    SWITCH("--version", version, ANY,
           "print version, compiler and weight types"),

    GROUP("With --bench"),
    NUMBER(LIST, "-p --n-prompt --prompt", "N,..", bench_prompt, 0, MAX_CTX,
           NULL, BENCH, "read prompts of N tokens (512; 0: none)"),
    NUMBER(LIST, "-n --n-gen --predict --n-predict", "N,..", bench_gen, 0,
           MAX_CTX, NULL, BENCH, "generate N tokens (128; 0: none)"),
    NUMBER(LIST, "-npl", "N,..", bench_seqs, 1, 4096, NULL, BENCH,
           "generate for N sequences at once (1)"),
    NUMBER(LIST, "-d --n-depth", "N,..", bench_depth, 0, MAX_CTX, NULL, BENCH,
           "after a text of N tokens (0)"),
    NUMBER(LIST, "-t --threads", "N,..", bench_threads, 1, 1024, NULL, BENCH,
           "with N threads (one for each CPU)"),
    NUMBER(WHOLE, "-r --repetitions", "N", reps, 1, 100000, NULL, BENCH,
           "measure N times, after one to warm up (5)"),
    NUMBER(CHOICE, "-o --output", "md|json", output, 0, 0, NULL, BENCH,
           "print a table or records"),
};

enum { N_OPTIONS = sizeof table / sizeof *table };

_Static_assert(sizeof table / sizeof *table <= MAX_OPTIONS,
               "settings.given is too short");

/* What other programs of this kind know.  Most would change nothing here; what
 * would change the result is refused. */
static const struct foreign {
    const char *names;
    int takes_value, is_error;
    const char *why;
} foreign[] = {
    { "-ngl --gpu-layers --n-gpu-layers", 1, 0, "everything runs on the CPU" },
    { "-fa --flash-attn", 2, 0, "attention is always computed this way" },
    { "--jinja -st --single-turn --no-warmup --no-display-prompt --simple-io "
      "--log-disable --no-perf", 0, 0, "it is so already" },
    { "--mlock", 0, 0, "the file is mapped, and stays in memory while it is "
      "used" },
    { "-hf -hfr --hf-repo -mu --model-url", 1, 1, "nothing is downloaded here; "
      "scripts/download.sh fetches a model" },
    { "--prompt-cache", 1, 1, "--session FILE keeps a conversation" },
    { "-i", 0, 1, "-p gives a prompt, -cnv begins a chat" },
    { "--grammar --grammar-file -j", 1, 1, "--json-schema FILE gives answers "
      "in a schema" },
};

/* Is the word one of a list, whose words are separated by that character?
 * Returns its number, or -1. */
static int find_word(const char *words, int separator, const char *word)
{
    const size_t n = strlen(word);

    for (int i = 0; words && *words; i++) {
        const char *end = strchr(words, separator);
        const size_t len = end ? (size_t)(end - words) : strlen(words);
        if (len == n && memcmp(words, word, n) == 0)
            return i;
        words += len + (end != NULL);
    }
    return -1;
}

/* The i-th word of a list by |. */
static struct phrase word_of(const char *words, int i)
{
    for (; i > 0; i--)
        words = strchr(words, '|') + 1;
    return phrase("%.*s", (int)strcspn(words, "|"), words);
}

/* The option of this name, of two the one for this mode; or NULL. */
static const struct option *find_option(const char *name, int mode)
{
    const struct option *found = NULL;

    for (int i = 0; i < N_OPTIONS; i++)
        if (find_word(table[i].names, ' ', name) >= 0 &&
            (!found || (table[i].modes & mode)))
            found = &table[i];
    return found;
}

/* The option that a body calls so, or NULL. */
static const struct option *option_of_member(const char *key)
{
    for (int i = 0; i < N_OPTIONS; i++)
        if (find_word(table[i].json, ' ', key) >= 0)
            return &table[i];
    return NULL;
}

static const struct option *option_at(size_t at)
{
    const struct option *o = table;

    while (o->kind == HEADING || o->at != at)
        o++;
    return o;
}

static const char *isa_name(int isa)
{
    static struct phrase name;

    name = word_of(option_at(AT(isa))->arg, isa);
    return name.s;
}

static const char *kv_name(int kv_type)
{
    return kv_type == LFM2_KV_F16 ? "f16" : "f32";
}

/* Help starts in column 28 and is wrapped at column 79. */
static void print_entry(const char *head, const char *help)
{
    int column = printf("  %s", head);

    while (*help) {
        size_t n = strlen(help), most = 51;
        if (n > most) {
            for (n = most; n > 0 && help[n] != ' '; n--)
                continue;
        }
        if (column >= 28)
            column = printf("\n") - 1;
        printf("%*s%.*s\n", 28 - column, "", (int)n, help);
        help += n + (help[n] == ' ');
        column = 0;
    }
}

static int print_help(void)
{
    printf("usage: %s [options] MODEL.gguf [PROMPT]\n\n"
           "Answers PROMPT and exits.  Without one, piped text is the prompt; "
           "at a\nterminal, a chat begins.\n", program);
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &table[i];
        if (o->kind == HEADING)
            printf("\n%s\n", o->help);
        else if (o->help)
            print_entry(phrase("%s %s", o->names, !o->arg ? "" :
                               strlen(o->arg) > 48 ? "NAME" : o->arg).s,
                        o->help);
    }
    printf("\nWrite --flag VALUE or --flag=VALUE; -- ends the options.  Exit "
           "status: 0 done,\n1 failed, 2 usage, 3 file, 4 model, 5 memory, 6 "
           "prompt longer than the context,\n7 some lines of a batch failed, 8 "
           "the self-test failed, 130 interrupted,\n143 terminated.\n");
    return DONE;
}

static int is_little_endian(void)
{
    return *(const unsigned char *)&(const uint16_t){ 1 };
}

static int print_version(void)
{
    const char *type;

    printf("lfm2.c      %s\n", lfm2_version());
#if defined __clang__
    printf("compiler    clang %s\n", __clang_version__);
#elif defined __GNUC__
    printf("compiler    gcc %s\n", __VERSION__);
#endif
    printf("isa        ");
    for (int i = LFM2_ISA_SCALAR; i < LFM2_N_ISA; i++)
        if (lfm2_isa_available(i))
            printf(" %s", isa_name(i));
    printf("\nbyte order  %s-endian, %d bits\nweights    ",
           is_little_endian() ? "little" : "big",
           (int)sizeof(void *) * 8);
    for (int i = 0; (type = lfm2_weight_type(i)); i++)
        printf(" %s", type);
    putchar('\n');
    return DONE;
}

/* ---- one value */

/* What a good value of this option is. */
static struct phrase values_of(const struct option *o)
{
    const char *whole = o->kind == REAL ? "" : "whole ";

    return o->kind == CHOICE ? phrase("%s", o->arg) :
           o->kind == LIST ?
           phrase("at most %d whole numbers from %.0f to %.0f, by commas",
                  MAX_LIST, o->min, o->max) :
           o->kind == TEXTS ? phrase("at most %d texts that are not empty",
                                     MAX_LIST) :
           phrase("a %snumber from %.10g to %.19g", whole, o->min, o->max);
}

/* Whole numbers by commas; -1 if they are none. */
static int parse_list(struct list *to, const struct option *o, const char *s)
{
    char *end;

    for (to->n = 0;; s = end + 1) {
        errno = 0;
        const long x = strtol(s, &end, 10);
        if (end == s || (*end && *end != ',') || errno || x < o->min ||
            x > o->max || to->n == MAX_LIST)
            return -1;
        to->v[to->n++] = (int)x;
        if (!*end)
            return 0;
    }
}

static int add_text(struct texts *to, const char *s)
{
    if (!*s || to->n == MAX_LIST)
        return -1;
    to->v[to->n++] = s;
    return 0;
}

/* Put a number where it belongs; -1 if it is out of bounds. */
static int set_number(void *slot, const struct option *o, double x,
                      long long whole)
{
    if (!(x >= o->min && x <= o->max))
        return -1;
    if (o->kind == REAL)
        *(double *)slot = x;
    else if (o->kind == SEED)
        *(long long *)slot = whole;
    else
        *(int *)slot = (int)whole;
    return 0;
}

static int parse_value(struct settings *to, const struct option *o,
                       const char *value)
{
    void *slot = (char *)to + o->at;
    long long whole = 0;
    double x;
    char *end;

    switch (o->kind) {
    case TEXT: *(const char **)slot = value; return 0;
    case TEXTS: return add_text(slot, value);
    case LIST: return parse_list(slot, o, value);
    case CHOICE: *(int *)slot = find_word(o->arg, '|', value);
                 return *(int *)slot < 0 ? -1 : 0;
    default: break;
    }
    errno = 0;
    x = o->kind == REAL ? strtod(value, &end) :
        (double)(whole = strtoll(value, &end, 10));
    return end == value || *end || errno ? -1 : set_number(slot, o, x, whole);
}

/* ---- the command line */

static int take_foreign(const char *name, char **argv, int *i)
{
    for (size_t k = 0; k < sizeof foreign / sizeof *foreign; k++) {
        const struct foreign *f = &foreign[k];
        const char *next = argv[*i + 1];
        if (find_word(f->names, ' ', name) < 0)
            continue;
        if (f->is_error)
            return usage("%s: %s", name, f->why);
        if (!strchr(argv[*i], '=') && (f->takes_value == 1 ||
            (f->takes_value == 2 && next &&
             find_word("on off auto", ' ', next) >= 0)))
            *i += next != NULL;
        note("%s changes nothing: %s", name, f->why);
        return DONE;
    }
    return -1;
}

static int bad_value(const struct option *o, const char *name,
                     const char *value)
{
    if (o->at == AT(threads) && strchr(value, '.'))
        return say(USAGE, "%s %s: expected a number of threads; did you mean "
                   "--temp %s?", name, value, value);
    return say(USAGE, "%s %s: expected %s", name, value, values_of(o).s);
}

/* Take the option at argv[*i], and its value, which may be the next word. */
static int take_option(struct settings *to, int bench, char **argv, int *i)
{
    const char *arg = argv[*i], *equals = strchr(arg, '='), *value;
    const struct phrase name = phrase("%.*s", (int)strcspn(arg, "="), arg);
    const struct option *o = find_option(name.s, bench ? BENCH : ANY - BENCH);
    int code;

    if (!o && (code = take_foreign(name.s, argv, i)) >= 0)
        return code;
    if (!o)
        return usage("unknown option %s", name.s);
    if (o->kind == FLAG && equals)
        return usage("%s takes no value, but is given %s", name.s, equals + 1);
    if (o->kind == TEXT && to->given[o - table])
        return usage("%s is given twice", name.s);
    to->given[o - table] = arg;
    if (o->mode && to->mode && to->mode != o->mode)
        return usage("%s does something else than the options before it",
                     name.s);
    to->mode |= o->mode;
    if (o->kind == FLAG) {
        if (o->at != AT(mode))
            *(int *)((char *)to + o->at) = 1;
        return DONE;
    }
    value = equals ? equals + 1 : argv[*i + 1] ? argv[++*i] : NULL;
    if (!value)
        return usage("%s needs a value, %s", name.s, o->arg);
    return parse_value(to, o, value) == 0 ? DONE : bad_value(o, name.s, value);
}

static int is_dash(const char *path)
{
    return path && strcmp(path, "-") == 0;
}

/* "5", "5-" and "5-7". */
static int parse_range(const char *s, int *first, int *last)
{
    char *end;
    long a = -1, b;

    errno = 0;
    if (*s >= '0' && *s <= '9')
        a = b = strtol(s, &end, 10);
    if (a < 0)
        return -1;
    if (*end == '-' && !end[1])
        b = INT_MAX, end++;
    else if (*end == '-' && end[1] >= '0' && end[1] <= '9')
        b = strtol(end + 1, &end, 10);
    if (*end || errno || a > b || b > INT_MAX)
        return -1;
    *first = (int)a;
    *last = (int)b;
    return 0;
}

/* Is it a day as templates write it, 2026-11-20? */
static int is_date(const char *s)
{
    static const int days[] = { 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30,
                                31 };
    int y, m, d, n = 0;

    return strspn(s, "0123456789-") == 10 && !s[10] &&
           sscanf(s, "%4d-%2d-%2d%n", &y, &m, &d, &n) == 3 && n == 10 &&
           m >= 1 && m <= 12 && d >= 1 && d <= days[m - 1] &&
           (m != 2 || d < 29 || (y % 4 == 0 && (y % 100 || y % 400 == 0)));
}

/* The first option given that needs a chat template, or NULL. */
static const char *chat_option(const struct settings *s)
{
    return s->system || s->system_file ? "-sys" : s->messages ? "--messages" :
           s->tools ? "--tools" : s->session ? "--session" :
           s->mode == CHAT ? "-cnv" : NULL;
}

/* The name of a mode, for sentences. */
static const char *mode_name(const struct settings *s)
{
    for (int i = 0; i < N_OPTIONS; i++)
        if (s->given[i] && table[i].mode == s->mode)
            return s->given[i];
    return s->mode == CHAT ? "a chat" : "a single answer";
}

/* Options must mean something in this mode, and not exclude each other. */
static int check_settings(const struct settings *s)
{
    const int plain = s->raw || s->ids ||
                      strcmp(template_name(s->template), "none") == 0;
    int first, last;

    for (int i = 0; i < N_OPTIONS; i++)
        if (s->given[i] && !(table[i].modes & s->mode))
            return usage("%.*s means nothing with %s",
                         (int)strcspn(s->given[i], "="), s->given[i],
                         mode_name(s));
    if (!s->model && s->mode != SELFTEST &&
        !(s->tokenizer && (s->mode & WORDS)))
        return usage("no model given");
    if ((s->prompt || (s->file && s->mode != BATCH)) + !!s->ids +
        !!s->messages > 1)
        return usage("more than one prompt: PROMPT or -p and -f, --ids, "
                     "--messages");
    if (s->system && s->system_file)
        return usage("more than one system prompt: -sys, -sysf");
    if (plain && chat_option(s))
        return usage("%s needs a chat template, and --raw, --ids and "
                     "--template none go without", chat_option(s));
    if ((s->system || s->system_file) && s->messages)
        return usage("-sys: the conversation of --messages has its own system "
                     "message");
    if (is_dash(s->session) || is_dash(s->trace))
        return usage("%s -: expected a file", s->session ? "--session" :
                     "--trace");
    if (!s->trace && (s->trace_filter.n || s->trace_tokens || s->trace_raw))
        return usage("%s needs --trace FILE", s->trace_raw ? "--trace-raw" :
                     s->trace_tokens ? "--trace-tokens" : "--trace-filter");
    if (s->trace_tokens && parse_range(s->trace_tokens, &first, &last) != 0)
        return usage("--trace-tokens %s: expected positions like 5, 5- or "
                     "5-7", s->trace_tokens);
    if (s->ask.logprobs >= 0 && !s->json)
        return usage("--logprobs needs --json");
    if (s->date && !is_date(s->date))
        return usage("--date %s: expected a day like 2026-11-20", s->date);
    if (s->isa != LFM2_ISA_AUTO && !lfm2_isa_available(s->isa))
        return say(USAGE, "--isa %s: not on this CPU or not in this build; "
                   "--version lists the sets there are", isa_name(s->isa));
    return DONE;
}

/* A chat begins where nothing else is asked and a person sits there. */
static int default_mode(const struct settings *s)
{
    return s->prompt || s->file || s->ids || s->messages || s->json ||
           !isatty(STDIN_FILENO) ? ANSWER : CHAT;
}

static int parse(struct settings *to, char **argv)
{
    const char *words[2] = { NULL, NULL };
    int n_words = 0, options = 1, bench = 0, code = DONE;

    for (int i = 1; argv[i] && strcmp(argv[i], "--") != 0; i++) {
        bench |= strcmp(argv[i], "--bench") == 0;
        quiet |= find_word("-q --quiet", ' ', argv[i]) >= 0;
    }
    for (int i = 1; code == DONE && argv[i]; i++)
        if (options && strcmp(argv[i], "--") == 0)
            options = 0;
        else if (options && argv[i][0] == '-' && argv[i][1])
            code = take_option(to, bench, argv, &i);
        else if (n_words < 2)
            words[n_words++] = argv[i];
        else
            code = usage("unexpected argument %s; a prompt of several words "
                         "needs quotes", argv[i]);
    if (code != DONE || to->help || to->version)
        return code;
    if (!to->model && n_words > 0) {
        to->model = words[0];
        words[0] = words[1];
        n_words--;
        to->given[option_at(AT(model)) - table] = "MODEL.gguf";
    }
    if (n_words > 1 || (n_words > 0 && to->prompt))
        return usage("unexpected argument %s: there is a prompt already",
                     words[n_words - 1]);
    if (n_words > 0) {
        to->prompt = words[0];
        to->given[option_at(AT(prompt)) - table] = "PROMPT";
    }
    if (!to->mode)
        to->mode = default_mode(to);
    return check_settings(to);
}

/* ---------------------------------------------------- 11. Files and text */

/* The directory that a file is in, or will be. */
static void add_directory(struct text *t, const char *path)
{
    const char *slash = strrchr(path, '/');

    add(t, slash ? path : ".", slash ? (size_t)(slash - path) + 1 : 1);
}

/* To standard output, which may be a terminal. */
static void show_text(struct text *t)
{
    if (isatty(STDOUT_FILENO))
        t->n = drop_controls(t->s, t->n);
    fwrite(t->s ? t->s : "", 1, t->n, stdout);
}

/* ---- bytes in and out */

static int read_stream(FILE *f, const char *name, struct text *out)
{
    for (;;) {
        reserve(out, out->n < 1 << 14 ? 1 << 14 : out->n);
        out->n += fread(out->s + out->n, 1, out->cap - out->n - 1, f);
        out->s[out->n] = '\0';
        if (ferror(f) && errno == EINTR && interrupted)
            return INTERRUPTED;
        if (ferror(f) && errno != EINTR)
            return say(BAD_FILE, f == stdin && errno == EISDIR ? "%s is closed "
                       "or a directory, expected text" : "%s: %s", name,
                       strerror(errno));
        if (feof(f))
            return DONE;
        clearerr(f);
    }
}

/* The bytes of a file, or of standard input for "-", behind what `out` has.
 * The caller frees out->s, after a failure too. */
static int read_file(const char *path, struct text *out)
{
    const int piped = is_dash(path);
    FILE *f = piped ? stdin : fopen(path, "rb");
    int code;

    if (!f)
        return say(BAD_FILE, "%s: %s", path, strerror(errno));
    code = read_stream(f, piped ? "standard input" : path, out);
    if (!piped)
        fclose(f);
    return code;
}

/* Up to n bytes from the beginning of a file; 0 if it cannot be read. */
static size_t read_head(const char *path, char *to, size_t n)
{
    FILE *f = fopen(path, "rb");

    if (!f)
        return 0;
    n = fread(to, 1, n, f);
    fclose(f);
    return n;
}

/* A file for output that comes piece by piece, or standard output for "-"; NULL
 * after saying why not. */
static FILE *create_file(const char *path)
{
    FILE *f = is_dash(path) ? stdout : fopen(path, "wb");

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

/* All of it: 0, or -1 and errno. */
static int write_all(int fd, const char *s, size_t n)
{
    for (ssize_t done; n > 0; s += done, n -= (size_t)done) {
        done = write(fd, s, n < 1 << 30 ? n : 1 << 30);
        if (done < 0 && errno != EINTR)
            return -1;
        done = done < 0 ? 0 : done;
    }
    return 0;
}

/* Can a file be kept there, in place of one that there may be?  Better told
 * before the work than after it. */
static int can_replace(const char *path)
{
    char *real = realpath(path, NULL);
    struct text dir = { 0 };
    struct stat st;
    const int is = lstat(real ? real : path, &st) == 0;
    const char *odd = !is || S_ISREG(st.st_mode) ? NULL :
                      S_ISDIR(st.st_mode) ? "a directory" :
                      S_ISFIFO(st.st_mode) ? "a pipe" :
                      S_ISLNK(st.st_mode) ? "a link that leads nowhere" :
                      "a device or socket";
    int code = DONE;

    add_directory(&dir, real ? real : path);
    if (odd)
        code = say(BAD_FILE, "%s: %s, expected a file", path, odd);
    else if (access(dir.s, W_OK | X_OK) != 0)
        code = say(BAD_FILE, "%s: cannot be kept: %s", path, strerror(errno));
    free(dir.s);
    free(real);
    return code;
}

/* Write the parts one after the other, whole or not at all: to a new file
 * beside this one, which then takes its place.  It is for its owner alone, or
 * for those who could read the old one.  A link stays a link. */
static int replace_file(const char *path, const struct text *part, int n_parts)
{
    char *real;
    struct text name = { 0 };
    struct stat old;
    int fd, good, error, code = can_replace(path);

    if (code != DONE)
        return code;
    real = realpath(path, NULL);
    add_string(&name, real ? real : path);
    add_string(&name, ".XXXXXX");
    fd = mkstemp(name.s);
    good = fd >= 0;
    if (good && stat(path, &old) == 0)
        fchmod(fd, old.st_mode & 0777);   /* if not, it stays private        */
    for (int i = 0; good && i < n_parts; i++)
        good = write_all(fd, part[i].s, part[i].n) == 0;
    if (good && fsync(fd) != 0)           /* not every file system knows it  */
        good = errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP;
    error = errno;
    if (fd >= 0 && close(fd) != 0 && good)
        good = 0, error = errno;
    if (good && rename(name.s, real ? real : path) != 0)
        good = 0, error = errno;
    if (!good) {
        code = say(BAD_FILE, "%s: cannot be kept: %s", path, strerror(error));
        if (fd >= 0)
            remove(name.s);
        errno = error;                    /* for who explains it             */
    }
    free(name.s);
    free(real);
    return code;
}

/* ---- models */

/* Map it, or read it where that cannot be: some shared folders have no mmap().
 * `any`, LFM2_LOAD_ANY or 0, takes what is no model for us, too. */
static int open_file(lfm2_model **out, const char *path, int no_mmap, int any,
                     lfm2_error *err)
{
    int code = lfm2_model_open(out, path, (no_mmap ? LFM2_LOAD_READ :
                               LFM2_LOAD_MAP) | any, err);

    if (code != LFM2_EIO || no_mmap || !strstr(err->msg, "cannot map"))
        return code;
    note("%s: its file system cannot map files, so it is read", path);
    return lfm2_model_open(out, path, LFM2_LOAD_READ | any, err);
}

/* What is taken for a model now and then: where and how it begins, and what to
 * do with it. */
static const struct { int at; const char *begins, *what; } no_model[] = {
    { 0, "version https://git-lfs", "it is a git-lfs pointer; \"git lfs "
      "pull\" gets the file itself" },
    { 0, "<", "it is a web page; scripts/download.sh gets models" },
    { 0, "PK\3\4", "it is a zip archive or a PyTorch file, expected a GGUF; "
      "scripts/download.sh gets one" },
    { 8, "{\"", "it is a safetensors file, expected a GGUF; "
      "scripts/download.sh gets one" },
    { 0, "\x1f\x8b", "it is compressed; gunzip gets the file itself" },
    { 0, "LFM2SES", "it is a conversation; --session names it beside a model" },
    { 0, "{", "it is JSON; --messages or --tools name it beside a model" },
    { 0, "[", "it is JSON; --messages or --tools name it beside a model" },
    { 4, "\3\0\0\0\0\0\0\0\0\0\0\0", "it is a vocabulary without a "
      "model; --tokenizer names it" }
};

/* The sentence of the library about a file that it could not open begins with
 * the path already. */
static int report(const char *path, const lfm2_error *err)
{
    const int code = status_of(err->code);
    const size_t n = strlen(path);
    char head[24] = "";

    say(code, "%s%s%s", strncmp(err->msg, path, n) == 0 ? "" : path,
        strncmp(err->msg, path, n) == 0 ? "" : ": ", err->msg);
    if (code != BAD_MODEL || read_head(path, head, sizeof head) == 0)
        return code;
    for (size_t i = 0; i < sizeof no_model / sizeof *no_model; i++) {
        const char *begins = no_model[i].begins;
        const size_t len = *begins == '\3' ? 12 : strlen(begins);
        if (memcmp(head + no_model[i].at, begins, len) == 0)
            return say(code, "%s: %s", path, no_model[i].what);
    }
    return code;
}

/* ---- text for people
 *
 * Prompts, conversations and commands come from editors, shells and
 * spreadsheets of all systems: a byte order mark is dropped, UTF-16 becomes
 * UTF-8, and lines end with \n.  What is there for the sake of its bytes stays
 * as it is: --ids, --tokenize, --detokenize, --ppl. */

/* Where the high byte of each pair is, if this is UTF-16; else -1.  It says so
 * itself, or most of the high bytes are 0 and none of the others. */
static int utf16_high(const struct text *t)
{
    size_t zeros[2] = { 0, 0 };

    for (size_t i = 0; i < t->n; i++)
        zeros[i % 2] += !t->s[i];
    return t->n < 2 ? -1 : memcmp(t->s, "\xff\xfe", 2) == 0 ? 1 :
           memcmp(t->s, "\xfe\xff", 2) == 0 ? 0 : t->n < 4 ? -1 :
           !zeros[0] && zeros[1] * 8 >= t->n * 3 ? 1 :
           !zeros[1] && zeros[0] * 8 >= t->n * 3 ? 0 : -1;
}

static void utf16_to_utf8(struct text *t, int high)
{
    const unsigned char *s = (const unsigned char *)t->s;
    struct text out = { 0 };
    char to[4];

    for (size_t i = 0; i < t->n; i += 2) {
        uint32_t c = i + 1 == t->n ? 0xfffd : s[i + !high] | s[i + high] << 8,
                 low = i + 3 < t->n ? s[i + 2 + !high] | s[i + 2 + high] << 8 :
                       0;
        if (c >> 10 == 0xd800 >> 10 && low >> 10 == 0xdc00 >> 10) {
            c = 0x10000 + ((c & 0x3ff) << 10 | (low & 0x3ff));
            i += 2;
        }
        add(&out, to, utf8_put(to, c >> 11 == 0xd800 >> 11 ? 0xfffd : c));
    }
    free(t->s);
    *t = out;
}

static void clean_text(struct text *t)
{
    const int high = utf16_high(t);
    size_t n = 0, i;

    if (high >= 0)
        utf16_to_utf8(t, high);
    i = t->n >= 3 && memcmp(t->s, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
    for (; i < t->n; i++) {
        const int ends = t->s[i] == '\r';
        i += ends && i + 1 < t->n && t->s[i + 1] == '\n';
        t->s[n++] = ends ? '\n' : t->s[i];
    }
    t->n = n;
    add(t, "", 0);
}

/* A conversation is text, and kept as such.  In another encoding a model would
 * read letters that nobody wrote. */
static int check_text(const struct text *t, const char *name)
{
    uint32_t c;

    for (size_t i = 0, size; i < t->n; i += size) {
        size = (size_t)utf8_get(t->s + i, t->s + t->n, &c);
        if (size > 0 && c == 0)
            return say(USAGE, "%s has a NUL byte after %zu bytes, expected "
                       "text", name, i);
        if (size == 0)
            return say(USAGE, "%s is not UTF-8: byte %02x after %zu bytes; "
                       "iconv -f LATIN1 -t UTF-8 converts Latin-1", name,
                       (unsigned char)t->s[i], i);
    }
    return DONE;
}

/* Text from a file; one newline at its end is not part of it. */
static int read_text_file(const char *path, struct text *out)
{
    int code = read_file(path, out);

    if (code != DONE)
        return code;
    clean_text(out);
    if (out->n > 0 && out->s[out->n - 1] == '\n')
        out->s[--out->n] = '\0';
    return DONE;
}

/* Was text piped in beside a prompt?  A file that was read before belongs to a
 * loop in a shell; terminals, devices, and the sockets of ssh may never end. */
static int has_piped_text(const struct settings *s)
{
    struct stat st;

    return !is_dash(s->file) && !is_dash(s->tools) && !is_dash(s->prompt) &&
           !is_dash(s->json_schema) && fstat(STDIN_FILENO, &st) == 0 &&
           (S_ISFIFO(st.st_mode) ||
            (S_ISREG(st.st_mode) && lseek(STDIN_FILENO, 0, SEEK_CUR) == 0));
}

/* Text from a file, after a blank line if there is some already. */
static int add_text_file(const char *path, struct text *out)
{
    struct text more = { 0 };
    int code = read_text_file(path, &more);

    if (out->n > 0 && more.n > 0)
        add_string(out, "\n\n");
    add(out, more.s ? more.s : "", more.n);
    free(more.s);
    return code;
}

/* The prompt: what was given as an argument, then a file, then what was piped
 * in, which in a chat are messages. */
static int read_prompt(const struct settings *s, struct text *out)
{
    struct pollfd in = { STDIN_FILENO, POLLIN, 0 };
    const int given = s->prompt && !is_dash(s->prompt);
    int code = DONE;

    if (!s->prompt && !s->file && isatty(STDIN_FILENO))
        return usage("no prompt given; try %s MODEL.gguf \"a question\"",
                     program);
    if (given)
        add_string(out, s->prompt);
    if (given)
        clean_text(out);
    if (s->file)
        code = add_text_file(s->file, out);
    if (code != DONE || ((given || s->file) &&
                         (s->mode == CHAT || !has_piped_text(s))))
        return code;
    if (given && poll(&in, 1, 2000) == 0)
        note("standard input is read, too, and has not ended; </dev/null is "
             "without it");
    code = add_text_file("-", out);
    return code == DONE && out->n == 0 ? usage("no prompt: standard input is "
           "empty") : code;
}

static int read_ids(const char *path, struct ids *out)
{
    struct text t = { 0 };
    int code = read_file(path, &t);

    if (code == DONE && t.n % 4 != 0)
        code = say(BAD_FILE, "%s: %zu bytes, expected a multiple of 4", path,
                   t.n);
    out->id = zeroed(t.n / 4 + 1, sizeof *out->id);
    for (size_t i = 0; code == DONE && i < t.n; i += 4) {
        const uint64_t id = get_le((const unsigned char *)t.s + i, 4);
        out->id[out->n++] = id > INT32_MAX ? -1 : (int32_t)id;
    }
    free(t.s);
    return code;
}

/* --------------------------------------------- 12. Signals and the terminal */

#ifndef __wasi__
#include <sys/ioctl.h>
#include <termios.h>
static int set_terminal(int is_edited);
#else
#define set_terminal(is_edited) (-1)
#endif

/* The first SIGINT, SIGTERM, SIGHUP or SIGQUIT ends the program at once, unless
 * somebody looks at `interrupted` and stops the work in good order.  Then the
 * second does nothing more, and the third ends it whatever is lost: by then
 * something hangs.  They are handled from the beginning, as the first process
 * of a container gets no others; one that was ignored then, as by nohup, stays
 * ignored. */
static const char bright[] = "\033[0m\n";
static volatile sig_atomic_t is_heard;

static void on_interrupt(int number)
{
    if (last_signal == 0 || last_signal == SIGINT)
        last_signal = number;
    if (!is_heard || ++interrupted > 2) {
        set_terminal(0);
        (void)!write(STDERR_FILENO, bright, is_dim ? sizeof bright - 1 : 0);
        _exit(128 + number);
    }
    if (running)
        lfm2_cancel(running);
}

/* Without SA_RESTART, so that waiting for input ends, too. */
static void handle(int number, void (*handler)(int))
{
    struct sigaction action = { .sa_handler = handler }, had;

    sigaction(number, NULL, &had);
    if (had.sa_handler != SIG_IGN)
        sigaction(number, &action, NULL);
}

static void start_signals(void)
{
    handle(SIGINT, on_interrupt);
    handle(SIGTERM, on_interrupt);
#ifndef __wasi__
    handle(SIGHUP, on_interrupt);
    handle(SIGQUIT, on_interrupt);
#endif
    signal(SIGPIPE, SIG_IGN);             /* writing then fails, and we say  */
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN);
#endif
}

/* Threads that begin between two such calls leave signals to this one, which
 * may be waiting for input; but SIGBUS is for the one that reads. */
static void block_signals(int are_blocked)
{
#ifndef LFM2_NO_THREADS
    static sigset_t before;
    sigset_t all;

    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, are_blocked ? &all : &before,
                    are_blocked ? &before : NULL);
#else
    (void)are_blocked;
#endif
}

/* From here on somebody looks at `interrupted`. */
static void catch_interrupt(void)
{
    is_heard = 1;
}

/* ---- a model that becomes shorter
 *
 * Models are mapped, and nothing else is.  Who reads behind the end of a file
 * that was cut meanwhile gets SIGBUS, and that deserves a sentence.  It is made
 * beforehand: a signal handler may only write. */

#ifndef LFM2_NO_MMAP

static char lost[4500];

/* Several threads may come here at once; one tells. */
static void on_bus_error(int number, siginfo_t *info, void *context)
{
    const size_t from = is_dim ? 0 : sizeof bright - 1;
#ifndef LFM2_NO_THREADS
    static atomic_flag told = ATOMIC_FLAG_INIT;
#endif

    (void)context;
    if (info->si_code <= 0 || info->si_code == BUS_ADRALN) {
        signal(number, SIG_DFL);          /* and it comes again              */
        return;
    }
#ifndef LFM2_NO_THREADS
    while (atomic_flag_test_and_set(&told))
        continue;
#endif
    set_terminal(0);
    (void)!write(STDERR_FILENO, lost + from, strlen(lost + from));
    _exit(BAD_FILE);
}

/* The file is about to be mapped, or is the one that stays so. */
static void watch_file(const char *path)
{
    const struct sigaction action = {
        .sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO
    };

    snprintf(lost, sizeof lost, "%s%s: %s: it became shorter while it was "
             "used, or its disk failed; --no-mmap reads it first\n", bright,
             program, path);
    sigaction(SIGBUS, &action, NULL);
}

#else

static void watch_file(const char *path)
{
    (void)path;
}

#endif

/* ---- bytes that are typed or piped in */

enum { INPUT_ENDS = -1, STOPPED_BY_SIGNAL = -2, LOOKS_OLD = -3 };

static volatile sig_atomic_t looks_old;   /* the line, after a stop or in a
                                             window of another size          */

/* The next byte.  A signal between a look and the wait is heard a second
 * later. */
static int next_byte(int *is_last)
{
    static unsigned char s[4096];
    static ssize_t at, n;
    struct pollfd in = { STDIN_FILENO, POLLIN, 0 };

    while (at == n) {
        const int ready = poll(&in, 1, 1000);
        if (interrupted)
            return STOPPED_BY_SIGNAL;
        if (looks_old) {
            looks_old = 0;
            return LOOKS_OLD;
        }
        if (ready <= 0)
            continue;
        at = 0;
        n = read(STDIN_FILENO, s, sizeof s);
        if (n == 0 || (n < 0 && errno != EINTR)) {
            n = 0;
            return INPUT_ENDS;
        }
        n = n > 0 ? n : 0;
    }
    *is_last = at + 1 == n;
    return s[at++];
}

/* Does a signal end the chat?  Ctrl-C clears a line, and leaves only if it
 * comes twice to an empty one. */
static int leaves(size_t n_typed, int *is_warned)
{
    interrupted = 0;
    if (last_signal != SIGINT || (n_typed == 0 && *is_warned)) {
        interrupted = 1;
        return 1;
    }
    if (n_typed == 0)
        fprintf(stderr, "(Ctrl-C once more, or Ctrl-D, leaves)\n");
    *is_warned = n_typed == 0;
    return 0;
}

#ifndef __wasi__

/* ---- the terminal while a line is edited
 *
 * Whatever ends or stops the program meanwhile leaves it as it was. */

static struct termios plain_terminal;
static volatile sig_atomic_t is_changed, is_editing;

/* Returns 0, or -1 if it cannot be changed. */
static int set_terminal(int is_edited)
{
    static const char paste[2][9] = { "\033[?2004l", "\033[?2004h" };
    struct termios t;

    if (!is_changed && (!is_edited ||
                        tcgetattr(STDIN_FILENO, &plain_terminal) != 0))
        return -1;
    t = plain_terminal;
    if (is_edited) {
        t.c_lflag &= ~(tcflag_t)(ICANON | ECHO | IEXTEN);
        t.c_iflag &= ~(tcflag_t)(ICRNL | INLCR | IGNCR | ISTRIP);
        t.c_cc[VMIN] = 1;
        t.c_cc[VTIME] = 0;
    }
    if (tcsetattr(STDIN_FILENO, TCSANOW, &t) != 0)
        return -1;
    is_changed = is_edited;
    (void)!write(STDERR_FILENO, paste[is_edited], 8);
    return 0;
}

static void on_stop(int number)
{
    set_terminal(0);
    signal(number, SIG_DFL);
    raise(number);                        /* when this is done               */
}

/* After a stop, or with a window of another size. */
static void on_change(int number)
{
    (void)number;
    if (is_editing) {
        handle(SIGTSTP, on_stop);
        set_terminal(1);
        looks_old = 1;
    }
}

static void leave_terminal(void)
{
    set_terminal(0);
}

/* ---- a line that is edited
 *
 * It is shown in one row of the terminal, as much of it as there is room for
 * around the cursor, and whole when it is done. */

struct editor {
    struct text *line;
    size_t at;                            /* of the cursor                   */
    const char *prompt;
    int shown;                            /* of the history                  */
    int is_pasting, after_cr;
};

static struct text *history;              /* what was typed, the oldest first */
static int n_history;
static struct text draft;                 /* the line while older are shown  */

/* Marks that are drawn over the character before, and characters that take two
 * columns: by ranges, the first and the last. */
static const uint32_t no_columns[] = {
    0x300, 0x36f, 0x483, 0x489, 0x591, 0x5bd, 0x610, 0x61a, 0x64b, 0x65f,
    0x93c, 0x93c, 0x941, 0x948, 0x94d, 0x94d, 0xe31, 0xe31, 0xe34, 0xe3a,
    0xe47, 0xe4e, 0x1ab0, 0x1aff, 0x1dc0, 0x1dff, 0x200b, 0x200f, 0x20d0,
    0x20ff, 0x3099, 0x309a, 0xfe00, 0xfe0f, 0xfe20, 0xfe2f
}, two_columns[] = {
    0x1100, 0x115f, 0x231a, 0x231b, 0x26a1, 0x26a1, 0x2705, 0x2705, 0x2728,
    0x2728, 0x274c, 0x274c, 0x2753, 0x2757, 0x2b50, 0x2b50, 0x2e80, 0x303e,
    0x3041, 0xa4cf, 0xac00, 0xd7a3, 0xf900, 0xfaff, 0xfe30, 0xfe6f, 0xff00,
    0xff60, 0xffe0, 0xffe6, 0x1f300, 0x1f320, 0x1f32d, 0x1f64f, 0x1f680,
    0x1f6ff, 0x1f900, 0x1faff, 0x20000, 0x3fffd
};

static int is_among(uint32_t c, const uint32_t *range, size_t n)
{
    for (size_t i = 0; i < n && range[i] <= c; i += 2)
        if (c <= range[i + 1])
            return 1;
    return 0;
}

#define IS_AMONG(c, ranges) is_among(c, ranges, sizeof ranges / sizeof *ranges)

/* The character at byte i: its bytes, with the marks that follow, and columns.
 * What is no character is shown as a question mark, a newline as an arrow. */
static size_t character(const struct text *t, size_t i, int *columns)
{
    const char *const end = t->s + t->n, *s = t->s + i;
    uint32_t c;
    int n = utf8_get(s, end, &c);

    *columns = n > 0 && IS_AMONG(c, two_columns) ? 2 : 1;
    for (s += n > 0 ? n : 1; s < end; s += n) {
        n = utf8_get(s, end, &c);
        if (n == 0 || !IS_AMONG(c, no_columns))
            break;
    }
    return (size_t)(s - t->s) - i;
}

/* Where the character before the cursor begins. */
static size_t before(const struct editor *e)
{
    size_t from = 0, n;
    int columns;

    while (from < e->at && from + (n = character(e->line, from, &columns)) <
           e->at)
        from += n;
    return from;
}

/* As it is shown: whole, or in one row. */
static void add_shown(struct text *to, const char *s, size_t n, int whole)
{
    const char *const end = s + n;
    uint32_t c;

    for (int size; s < end; s += size) {
        size = utf8_get(s, end, &c);
        if (c == '\n' || c == '\t')
            add_string(to, whole ? (c == '\n' ? "\n" : "\t") :
                       c == '\n' ? "\xe2\x86\xb5" : " ");
        else if (size == 0 || is_control(c))
            add_string(to, "?");
        else
            add(to, s, (size_t)size);
        size = size > 0 ? size : 1;
    }
}

/* The window may have another size each time. */
static void show_line(const struct editor *e, int whole)
{
    const struct text *t = e->line;
    const int prompt = (int)strlen(e->prompt);
    struct winsize size = { 0 };
    struct text out = { 0 };
    size_t from = 0, n;
    int room, columns, cursor = 0, used = 0;

    ioctl(STDERR_FILENO, TIOCGWINSZ, &size);
    room = (size.ws_col > 8 ? size.ws_col : 80) - prompt - 1;
    for (size_t i = 0; i < e->at; i += n, cursor += columns)
        n = character(t, i, &columns);
    for (; !whole && cursor >= room; cursor -= columns)
        from += character(t, from, &columns);
    add_string(&out, "\r");
    add_string(&out, e->prompt);
    for (size_t i = from; i < t->n; i += n) {
        n = character(t, i, &columns);
        used += columns;
        if (!whole && used > room)
            break;
        add_shown(&out, t->s + i, n, whole);
    }
    add_string(&out, whole ? "\033[K\n" : "\033[K\r");
    if (!whole)
        add_format(&out, "\033[%dC", prompt + cursor);
    write_all(STDERR_FILENO, out.s, out.n);
    free(out.s);
}

/* Put n bytes in the place of some, and the cursor behind them. */
static void put(struct editor *e, size_t from, size_t to, const char *s,
                size_t n)
{
    struct text *t = e->line;

    reserve(t, n);
    memmove(t->s + from + n, t->s + to, t->n - to + 1);
    if (n > 0)
        memcpy(t->s + from, s, n);
    t->n = t->n + n - (to - from);
    e->at = from + n;
}

/* An older or newer line of the history, behind which the draft is. */
static void recall(struct editor *e, int step)
{
    const int next = e->shown + step;
    const struct text *t;

    if (next < 0 || next > n_history)
        return;
    if (e->shown == n_history) {
        draft.n = 0;
        add(&draft, e->line->s, e->line->n);
    }
    t = next == n_history ? &draft : &history[next];
    e->shown = next;
    put(e, 0, e->line->n, t->s, t->n);
}

static void remember(const struct text *t)
{
    const struct text *last = n_history ? &history[n_history - 1] : NULL;

    if (t->n == 0 || (last && last->n == t->n &&
                      memcmp(last->s, t->s, t->n) == 0))
        return;
    history = resize(history, ((size_t)n_history + 1) * sizeof *history);
    history[n_history] = (struct text){ 0 };
    add(&history[n_history++], t->s, t->n);
}

static void move_right(struct editor *e)
{
    int columns;

    if (e->at < e->line->n)
        e->at += character(e->line, e->at, &columns);
}

/* Delete the character at the cursor. */
static void delete(struct editor *e)
{
    const size_t from = e->at;

    move_right(e);
    put(e, from, e->at, "", 0);
}

/* What follows ESC: a key that has no character, or the ends of a paste. */
static void escape(struct editor *e)
{
    int number = 0, counts = 1, is_last, c = next_byte(&is_last);

    if (c == '\r' || c == '\n')
        put(e, e->at, e->at, "\n", 1);
    if (c != '[' && c != 'O')
        return;
    while ((c = next_byte(&is_last)) >= ' ' && c < '@') {
        counts &= c >= '0' && c <= '9';
        if (counts && number < 1000)
            number = 10 * number + c - '0';
    }
    if (c == '~')
        c = number == 1 || number == 7 ? 'H' : number == 4 || number == 8 ?
            'F' : number == 3 ? 'x' : number == 200 ? 'p' : number == 201 ?
            'q' : 0;
    switch (c) {
    case 'A': recall(e, -1); break;
    case 'B': recall(e, 1); break;
    case 'C': move_right(e); break;
    case 'D': e->at = before(e); break;
    case 'H': e->at = 0; break;
    case 'F': e->at = e->line->n; break;
    case 'x': delete(e); break;
    case 'p': e->is_pasting = 1; break;
    case 'q': e->is_pasting = 0; break;
    }
}

enum { CTRL = 0x40, ESC = 27, BACKSPACE = 127 };

static void press(struct editor *e, int c)
{
    const struct text *t = e->line;
    const int is_newline = c == '\n' || c == '\r';
    size_t from = e->at;

    if (c == ESC)
        escape(e);
    else if (c >= ' ' && c != BACKSPACE)
        put(e, e->at, e->at, &(char){ (char)c }, 1);
    else if (e->is_pasting && (is_newline || c == '\t') &&
             !(c == '\n' && e->after_cr))
        put(e, e->at, e->at, c == '\t' ? "\t" : "\n", 1);
    else if (!e->is_pasting)
        switch (c == BACKSPACE ? c : c + CTRL) {
        case 'A': e->at = 0; break;
        case 'B': e->at = before(e); break;
        case 'D': delete(e); break;
        case 'E': e->at = t->n; break;
        case 'F': move_right(e); break;
        case 'H': case BACKSPACE: put(e, before(e), e->at, "", 0); break;
        case 'I': put(e, e->at, e->at, "\t", 1); break;
        case 'K': put(e, e->at, t->n, "", 0); break;
        case 'L': write_all(STDERR_FILENO, "\033[H\033[2J", 7); break;
        case 'N': recall(e, 1); break;
        case 'P': recall(e, -1); break;
        case 'U': put(e, 0, e->at, "", 0); break;
        case 'W':
            while (from > 0 && t->s[from - 1] == ' ')
                from--;
            while (from > 0 && t->s[from - 1] != ' ')
                from--;
            put(e, from, e->at, "", 0);
        }
    e->after_cr = c == '\r';
}

/* The keys of a line, to its end: as read_line(). */
static int press_keys(struct editor *e)
{
    int is_last = 1, is_warned = 0;

    for (;;) {
        if (is_last)
            show_line(e, 0);
        const int c = next_byte(&is_last);
        const int ends = !e->is_pasting && (c == '\r' || c == '\n');
        is_last |= ends || c < 0;
        if (ends || c == INPUT_ENDS || (e->line->n == 0 &&
            (c + CTRL == 'D' || c == 0))) {   /* 0: before it was raw    */
            show_line(e, 1);
            return ends;
        }
        if (c == STOPPED_BY_SIGNAL) {
            show_line(e, 1);
            if (leaves(e->line->n, &is_warned))
                return -1;
            put(e, 0, e->line->n, "", 0);
            e->is_pasting = 0;
        } else if (c >= 0) {
            press(e, c);
            is_warned = 0;
        }
    }
}

/* As read_line(), or -2 where lines cannot be edited. */
static int edit_line(struct text *line, const char *prompt)
{
    struct editor e = { .line = line, .prompt = prompt, .shown = n_history };
    const char *term = getenv("TERM");
    int got;

    if (!isatty(STDERR_FILENO) || !term || !term[0] ||
        strcmp(term, "dumb") == 0 || set_terminal(1) != 0)
        return -2;
    is_editing = 1;
    handle(SIGTSTP, on_stop);
    handle(SIGCONT, on_change);
    handle(SIGWINCH, on_change);
    add(line, "", 0);
    got = press_keys(&e);
    is_editing = 0;
    set_terminal(0);
    remember(line);
    return got;
}

#else

#define edit_line(line, prompt)  (-2)

#endif

/* ---- lines and messages */

/* A line as it comes, from a pipe or a simple terminal.  Some of these cut what
 * is longer than 4095 bytes. */
static int read_plain_line(struct text *line, int shows, const char *prompt)
{
    int is_warned = !shows, is_last, c = STOPPED_BY_SIGNAL;

    for (;;) {
        if (shows && c == STOPPED_BY_SIGNAL)
            fputs(prompt, stderr);
        while ((c = next_byte(&is_last)) >= 0 && c != '\n')
            add(line, &(char){ (char)c }, 1);
        if (c == INPUT_ENDS && shows)
            fputc('\n', stderr);
        if (c == '\n' || c == INPUT_ENDS)
            break;
        if (c == STOPPED_BY_SIGNAL) {
            line->n = 0;
            if (shows)
                fputc('\n', stderr);
            if (leaves(0, &is_warned))
                return -1;
        }
    }
    if (shows && line->n == 4095)
        note("a line of 4095 bytes: the terminal may have cut it");
    if (line->n > 0 && line->s[line->n - 1] == '\r')
        line->n--;
    return c == '\n' || line->n > 0;
}

/* A line without its end, behind what is in `out`: 1; 0 at the end of the
 * input, -1 after a signal that ends the chat. */
static int read_line(struct text *out, int shows, const char *prompt)
{
    struct text line = { 0 };
    int got;

    fflush(stdout);
    got = shows ? edit_line(&line, prompt) : -2;
    if (got == -2)
        got = read_plain_line(&line, shows, prompt);
    add(out, line.s ? line.s : "", line.n);
    free(line.s);
    return got;
}

static int ends_with(const struct text *t, const char *word)
{
    const size_t n = strlen(word);

    return t->n >= n && memcmp(t->s + t->n - n, word, n) == 0;
}

/* A message, of one line or several: 1; 0 at the end of the input, -1 after a
 * signal that ends the chat.  Ctrl-C before it is forgotten: it stopped what
 * was done then. */
static int read_message(struct text *out, int shows)
{
    static const char quotes[] = "\"\"\"";
    const size_t len = strlen(quotes);
    int quoted, got;

    interrupted = 0;
    if (last_signal && last_signal != SIGINT)
        return -1;
    out->n = 0;
    got = read_line(out, shows, "> ");
    if (got <= 0)
        return got;
    quoted = out->n >= len && memcmp(out->s, quotes, len) == 0;
    if (quoted)
        memmove(out->s, out->s + len, (out->n -= len) + 1);
    while (quoted ? !ends_with(out, quotes) : ends_with(out, "\\")) {
        out->n -= !quoted;
        if (out->n > 0 || !quoted)        /* not after the quotes            */
            add(out, "\n", 1);
        got = read_line(out, shows, ". ");
        if (got < 0)
            return got;
        if (got == 0)
            break;
    }
    if (quoted && ends_with(out, quotes))
        out->n -= len;
    if (quoted && ends_with(out, "\n"))
        out->n--;
    clean_text(out);
    return 1;
}

/* ---- the process */

/* Where the shell closed one of the first three descriptors (">&-"), the next
 * file to be opened would get its number, and words or messages would go into
 * it.  A directory takes the place: it can be neither read nor written. */
static void hold_descriptors(void)
{
    int fd;

    do
        fd = open("/", O_RDONLY);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0)
        close(fd);
}

/* Other files that whoever started this left open would be open in the sandbox,
 * too.  A shell leaves some on purpose: <(command) is /dev/fd/63. */
static void close_inherited(char **argv)
{
#ifndef __wasi__
    DIR *dir = opendir("/dev/fd");
    struct dirent *entry;

    while (dir && (entry = readdir(dir))) {
        const int fd = atoi(entry->d_name);
        int is_named = fd <= STDERR_FILENO || fd == dirfd(dir);
        for (int i = 1; !is_named && argv[0] && argv[i]; i++) {
            const char *name = strstr(argv[i], "/fd/");
            is_named = name && strcmp(name + 4, entry->d_name) == 0;
        }
        if (!is_named)
            close(fd);
    }
    if (dir)
        closedir(dir);
#else
    (void)argv;
#endif
}

/* Before anything else. */
static void prepare_process(char **argv)
{
    hold_descriptors();
    close_inherited(argv);
    start_signals();
    atexit(leave_terminal);
}

/* ------------------------------------------------------------------ 13. JSON
 *
 * Requests arrive as JSON (RFC 8259), tools are described in it, and results
 * leave as it.  The reader is strict: what it takes, every other reader takes.
 * A text becomes a tree that is only read, out of a pool: one call releases a
 * whole request.  Who writes JSON adds it to a text.
 *
 * The same reader reads the Python literals in which models call tools, see
 * section 15. */

enum {
    MAX_JSON = 1 << 26,                   /* bytes of text                   */
    MAX_POOL = 1 << 28,                   /* bytes of nodes and strings      */
    MAX_DEPTH = 64,
    MAX_MEMBERS = 1024                    /* of an object                    */
};

static const char *const json_names[] = {
    "null", "false", "true", "a number", "a string", "an array", "an object"
};

/* n zeroed bytes, aligned for a node. */
static void *pool_get(struct pool *p, size_t n)
{
    const size_t aligned = (n + 15) / 16 * 16;
    const size_t size = aligned > 1 << 14 ? aligned : 1 << 14;
    struct chunk *c = p->chunks;

    if (!c || c->size - c->used < aligned) {
        c = resize(NULL, sizeof *c + size);
        *c = (struct chunk){ p->chunks, 0, size };
        p->chunks = c;
    }
    c->used += aligned;
    p->total += aligned;
    return memset((char *)(c + 1) + c->used - aligned, 0, aligned);
}

static void pool_free(struct pool *p)
{
    while (p->chunks) {
        struct chunk *next = p->chunks->next;
        free(p->chunks);
        p->chunks = next;
    }
    p->total = 0;
}

/* Write a character below 0x110000; returns its length, at most 4. */
static size_t utf8_put(char *out, uint32_t c)
{
    static const uint32_t lead[] = { 0, 0, 0xc0, 0xe0, 0xf0 };
    const int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;

    for (int i = n - 1; i > 0; i--, c >>= 6)
        out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)(lead[n] | c);
    return (size_t)n;
}

/* ---- values
 *
 * Any of these may be given NULL, for what is not there. */

static int json_is(const struct json *v, int type)
{
    return v && v->type == type;
}

/* Looks at all keys: MAX_MEMBERS keeps that fast. */
static struct json *find_key(const struct json *in, const char *key, size_t n)
{
    struct json *v = in->first;

    while (v && (v->n_key != n || memcmp(v->key, key, n) != 0))
        v = v->next;
    return v;
}

/* NULL if there is no such key, or no object. */
static struct json *json_get(const struct json *object, const char *key)
{
    return json_is(object, JSON_OBJECT) ? find_key(object, key, strlen(key)) :
           NULL;
}

/* The member of this key; null is the same as nothing, but for one template. */
static const struct json *given(const struct json *object, const char *key)
{
    const struct json *v = json_get(object, key);

    return json_is(v, JSON_NULL) ? NULL : v;
}

static const char *json_text(const struct json *v)
{
    return json_is(v, JSON_STRING) && strlen(v->s) == v->n ? v->s : NULL;
}

/* These return -1, and change nothing, for a value of another kind. */
static int json_bool(const struct json *v, int *out)
{
    if (!json_is(v, JSON_TRUE) && !json_is(v, JSON_FALSE))
        return -1;
    *out = v->type == JSON_TRUE;
    return 0;
}

static int json_double(const struct json *v, double *out)
{
    if (!json_is(v, JSON_NUMBER))
        return -1;
    *out = strtod(v->s, NULL);
    return 0;
}

/* Written as a whole number, from `least` to `most`. */
static int json_int(const struct json *v, long long least, long long most,
                    long long *out)
{
    long long x;
    char *end;

    if (!json_is(v, JSON_NUMBER))
        return -1;
    errno = 0;
    x = strtoll(v->s, &end, 10);
    if (*end || errno || x < least || x > most)
        return -1;
    *out = x;
    return 0;
}

/* ---- reading
 *
 * A reader works on a copy that ends with NUL, where strings are decoded in
 * place: no escape is shorter than what it stands for.  Python's literals get
 * the values of ast.literal_eval(), as far as JSON has them. */

struct reader {
    struct pool *pool;
    const char *text;                     /* n bytes, as they came           */
    size_t n;
    char *start, *at, *end;               /* of the copy                     */
    int depth;
    enum { AS_JSON, AS_PYTHON, AS_BAD_PYTHON } as;
    struct why *why;
};

static void start_reading(struct reader *r)
{
    r->start = r->at = memcpy(pool_get(r->pool, r->n + 1), r->text, r->n);
    r->end = r->at + r->n;
    r->depth = 0;
}

/* What was found, where, and what should have been there. */
static int expected(struct reader *r, const char *what)
{
    const char *line = r->text, *const at = line + (r->at - r->start);
    const struct phrase found = r->at == r->end ? phrase("the end") :
        phrase(*at > ' ' && *at < 127 ? "'%c'" : "byte 0x%02x",
               (unsigned char)*at);
    int n = 1;

    for (const char *p = line; p < at; p++)
        if (*p == '\n') {
            line = p + 1;
            n++;
        }
    return because(r->why, USAGE, "line %d, column %zu: found %s, expected %s",
                   n, (size_t)(at - line) + 1, found.s, what);
}

/* The next character that is not blank, or EOF.  Python has comments, too. */
static int peek(struct reader *r)
{
    for (;; r->at += strcspn(r->at, "\n")) {
        r->at += strspn(r->at, r->as == AS_JSON ? " \n\t\r" : " \n\t\f");
        if (r->as == AS_JSON ||
            (*r->at != '#' && (*r->at != '\\' || r->at[1] != '\n')))
            return r->at < r->end ? (unsigned char)*r->at : EOF;
    }
}

/* Step over the next character if it is this one. */
static int took(struct reader *r, int c)
{
    if (peek(r) != c)
        return 0;
    r->at += c != EOF;
    return 1;
}

/* Up to n digits, at most 8, of base 8 or 16; returns how many. */
static int read_code(const char *s, int n, int base, uint32_t *out)
{
    char digits[9] = "";

    for (int i = 0; i < n && isxdigit((unsigned char)s[i]) &&
         (base == 16 || s[i] < '8'); i++)
        digits[i] = s[i];
    *out = (uint32_t)strtoul(digits, NULL, base);
    return (int)strlen(digits);
}

/* What follows a backslash.  In Python one that begins no escape stays.  What
 * lies beyond 0xffff may be a pair; half of one is no character. */
static int read_escape(struct reader *r, char **out)
{
    static const char name[] = "/\"\\bfnrt'av";
    static const char value[] = "/\"\\\b\f\n\r\t'\a\v";
    const int json = r->as == AS_JSON, octal = !json && *r->at >= '0' &&
                                               *r->at <= '7';
    const char *p = memchr(name + !json, *r->at, json ? 8 : 10);
    const int n = *r->at == 'u' ? 4 : json ? 0 : *r->at == 'x' ? 2 :
                  *r->at == 'U' ? 8 : octal ? 3 : 0;
    uint32_t c, low;

    if ((json && !p && n == 0) || *r->at == 'N')
        return expected(r, "\" \\ / b f n r t or u after a backslash");
    if (n == 0) {
        if (p || *r->at != '\n')
            *(*out)++ = p ? value[p - name] : '\\';
        r->at += p || *r->at == '\n';
        return DONE;
    }
    const int n_read = read_code(r->at + !octal, n, octal ? 8 : 16, &c);
    if (!octal && n_read < n)
        return expected(r, "hexadecimal digits after a backslash");
    r->at += !octal + n_read;
    if (c >> 10 == 0xd800 >> 10 && r->at[0] == '\\' && r->at[1] == 'u' &&
        read_code(r->at + 2, 4, 16, &low) == 4 && low >> 10 == 0xdc00 >> 10) {
        c = 0x10000 + ((c & 0x3ff) << 10 | (low & 0x3ff));
        r->at += 6;
    }
    if (c > 0x10ffff || c >> 11 == 0xd800 >> 11)
        return expected(r, "surrogates in pairs after a backslash");
    *out += utf8_put(*out, c);
    return DONE;
}

/* A character that stands for itself. */
static int read_plain(struct reader *r, char **out)
{
    uint32_t c;
    const int n = utf8_get(r->at, r->end, &c);

    if (n == 0)
        return expected(r, "UTF-8");
    memmove(*out, r->at, (size_t)n);
    *out += n;
    r->at += n;
    return DONE;
}

/* How many letters are before the quote of a string, none, one or r and f; or
 * -1, and it is no string that has a value in JSON. */
static int prefix_length(const char *s)
{
    const int n = (int)strspn(s, "rRuUfF");

    return (s[n] != '"' && s[n] != '\'') || n > 2 ||
           (n == 2 && (s[0] | 32) + (s[1] | 32) != 'r' + 'f') ? -1 : n;
}

static int is_letter(char c)
{
    return isalnum((unsigned char)c) || c == '_' || (c & 0x80);
}

static int word_length(const char *s)
{
    int n = 0;

    while (is_letter(s[n]))
        n++;
    return n;
}

/* Models forget the backslash before a quote within a string.  Python reads no
 * word behind a string, but those that join values and those that are prefixes:
 * otherwise the quote at s is inside of one. */
static int is_inner(const char *s)
{
    const char *const word = s + 1 + strspn(s + 1, " \t\n\f");
    const int n = word_length(word);

    return n > 0 && !strstr(" if else and or in is not for async ",
                            phrase(" %.*s ", smaller(n, 9), word).s) &&
           !(n <= 2 && (int)strspn(word, "rRbBuUfFtT") == n &&
             strchr("\"'", word[n]) && word[n]);
}

/* Up to the quote that ends it, or the three.  Inner ones have to be in pairs,
 * but for apostrophes. */
static int read_quoted(struct reader *r, char **out)
{
    const int json = r->as == AS_JSON, bad = r->as == AS_BAD_PYTHON;
    const int n = json ? 0 : prefix_length(r->at);
    const int is_raw = (int)strcspn(r->at, "rR\"'") < n;
    const int is_format = (int)strcspn(r->at, "fF\"'") < n;
    const char quote = r->at[n], three[] = { quote, quote, quote, '\0' };
    const int is_long = !json && strncmp(r->at + n, three, 3) == 0;
    const size_t n_quotes = is_long ? 3 : 1;
    int inner = 0, code = DONE;

    r->at += (size_t)n + n_quotes;
    while (code == DONE && (strncmp(r->at, three, n_quotes) != 0 ||
                            (bad && !is_long && is_inner(r->at)))) {
        const char c = *r->at;
        if (r->at == r->end || (!json && (!c || (c == '\n' && !is_long &&
                                                 !bad))))
            return expected(r, "a quote after the string");
        if (json && (unsigned char)c < ' ')
            return expected(r, "no control character in a string, but an "
                            "escape");
        if (is_format && (c == '{' || c == '}') && *++r->at != c)
            return expected(r, "a string without placeholders");
        inner += c == quote && !is_long &&
                 !(c == '\'' && is_letter(r->at[-1]) && is_letter(r->at[1]));
        r->at += c == '\\' && !is_raw;
        code = c == '\\' && !is_raw ? read_escape(r, out) : read_plain(r, out);
        if (code == DONE && c == '\\' && is_raw && *r->at)
            code = read_plain(r, out);
    }
    r->at += n_quotes;
    return code == DONE && inner % 2 ? expected(r, "quotes in pairs") : code;
}

/* In Python, strings side by side are one; with forgotten backslashes that is
 * not clear. */
static int read_string(struct reader *r, struct json *v)
{
    char *out = r->at;

    v->type = JSON_STRING;
    v->s = out;
    do
        if (read_quoted(r, &out) != DONE)
            return USAGE;
    while (r->as == AS_PYTHON && peek(r) != EOF && prefix_length(r->at) >= 0);
    v->n = (size_t)(out - v->s);
    *out = '\0';
    return DONE;
}

/* Digits, in Python with single underscores between them: how many bytes. */
static size_t digits_length(const char *s, const char *digits)
{
    size_t n = strspn(s, digits);

    while (n > 0 && s[n] == '_' && strspn(s + n + 1, digits) > 0)
        n += 1 + strspn(s + n + 1, digits);
    return n;
}

/* A number with a fraction or an exponent; or 0, and it is a whole one. */
static size_t float_length(const char *s)
{
    static const char digits[] = "0123456789";
    const size_t whole = digits_length(s, digits);
    size_t n = whole, more;

    if (s[n] == '.')
        n += 1 + digits_length(s + n + 1, digits);
    if (n < 2 && whole == 0)
        return 0;
    if (s[n] == 'e' || s[n] == 'E') {
        const size_t sign = s[n + 1] == '+' || s[n + 1] == '-';
        more = digits_length(s + n + 1 + sign, digits);
        n += more ? 1 + sign + more : 0;
    }
    return n > whole ? n : 0;
}

/* The fewest digits that are this number, as Python prints floats. */
static void add_float(struct text *t, double x)
{
    char s[40];
    int n = 0, e;

    do
        snprintf(s, sizeof s, "%.*e", n, x);
    while (strtod(s, NULL) != x && ++n < 17);
    e = atoi(strchr(s, 'e') + 1);
    if (e < -4 || e >= 16)
        add_string(t, s);
    else
        add_format(t, "%.*f", n > e ? n - e : 1, x);
}

/* Digits as JSON has them: decimal, below all infinities, and as in Python no
 * more than 4300; of other bases, what fits into 64 bits. */
static int add_digits(struct reader *r, struct text *t)
{
    static const struct { int base; const char *digits; } all[] = {
        { 16, "0123456789abcdefABCDEF" }, { 8, "01234567" }, { 2, "01" },
        { 10, "0123456789" }
    };
    const size_t n_float = float_length(r->at);
    const char *s = r->at, *dot;
    size_t n = n_float;
    int i = 0;

    while (i < 3 && !(s[0] == '0' && (s[1] | 32) == "xob"[i]))
        i++;
    if (n_float == 0) {
        s += i == 3 ? 0 : s[2] == '_' ? 3 : 2;
        n = digits_length(s, all[i].digits);
    }
    for (size_t k = 0; k < n; k++)
        add(t, s + k, s[k] != '_');
    dot = memchr(s, '.', n);
    if (n == 0 || (r->as == AS_JSON && (i < 3 || memchr(s, '_', n) ||
        dot == s || (*s == '0' && isdigit((unsigned char)s[1])) ||
        (dot && !isdigit((unsigned char)dot[1])))))
        return expected(r, "a number: -, digits without leading zeros, .digits,"
                        " exponent");
    errno = 0;
    if (n_float > 0) {
        const double x = strtod(t->s, NULL);
        if (!isfinite(x))
            return expected(r, "a number below 1.8e308");
        t->n = 0;
        add_float(t, x);
    } else if (i < 3 || strspn(t->s, "0") == t->n) {
        const unsigned long long x = strtoull(t->s, NULL, all[i].base);
        t->n = 0;
        add_format(t, "%llu", x);
    } else if (t->n > 4300 || *s == '0')
        return expected(r, "at most 4300 digits without leading zeros");
    r->at += s + n - r->at;
    return n_float > 0 || errno == 0 ? DONE : expected(r, "at most 64 bits");
}

/* Behind its sign Python may have parentheses. */
static int read_number(struct reader *r, struct json *v)
{
    const int minus = *r->at == '-', is_signed = minus || *r->at == '+';
    struct text t = { 0 };
    int open = 0, code;

    r->at += is_signed;
    while (is_signed && r->as != AS_JSON && took(r, '('))
        open++;
    code = add_digits(r, &t);
    while (code == DONE && open-- > 0)
        code = took(r, ')') ? DONE : expected(r, "')'");
    if (code == DONE) {
        char *s = pool_get(r->pool, t.n + 2);
        v->type = JSON_NUMBER;
        v->n = (size_t)snprintf(s, t.n + 2, "%s%s", minus &&
                                strcmp(t.s, "0") != 0 ? "-" : "", t.s);
        v->s = s;
    }
    free(t.s);
    return code;
}

/* Python writes an empty set as a call. */
static int read_word(struct reader *r, struct json *v)
{
    static const char *const word[] = { "null", "false", "true",
                                        "None", "False", "True", "set" };
    const size_t n = (size_t)word_length(r->at);
    int i = 0;

    while (i < 7 && (strlen(word[i]) != n || memcmp(word[i], r->at, n) != 0))
        i++;
    if (i == 7 || (i > 2 && r->as == AS_JSON))
        return expected(r, "a value");
    r->at += n;
    v->type = i < 6 ? i % 3 : JSON_ARRAY; /* in the order of the types       */
    return i < 6 || (took(r, '(') && took(r, ')')) ? DONE :
           expected(r, "a value");
}

/* Step over a name, as tools and their arguments have: words with . or -
 * between them.  Returns its length, or 0. */
static size_t read_name(struct reader *r)
{
    const char *s = r->at;
    int n = isdigit((unsigned char)*s) ? 0 : word_length(s);

    for (s += n; n > 0 && (*s == '.' || *s == '-'); s += n)
        n = word_length(++s);
    if (n == 0)
        return 0;
    n = (int)(s - r->at);
    r->at += n;
    return (size_t)n;
}

static int read_value(struct reader *r, struct json *v);

/* "key": in an object, name= in a call.  In a dict of Python, keys are strings
 * or whole numbers: others may be equal and yet not the same in JSON.  Without
 * a value, the first one makes *in a set, whose elements have one type. */
static int read_key(struct reader *r, struct json *in, struct json *v,
                    int close)
{
    peek(r);
    if (close == ')') {
        v->key = r->at;
        v->n_key = read_name(r);
        return v->n_key > 0 && took(r, '=') ? DONE :
               expected(r, "a name, '=' and a value");
    }
    if (r->as == AS_JSON && *r->at != '"')
        return expected(r, "a key in double quotes");
    if (read_value(r, v) != DONE)
        return USAGE;
    if (v->type != JSON_STRING && (v->type != JSON_NUMBER ||
                                   strpbrk(v->s, ".e")))
        return expected(r, "a string or a whole number before it");
    v->key = v->s;
    v->n_key = v->n;
    if (r->as != AS_JSON && !in->first && peek(r) != ':')
        in->type = JSON_ARRAY;
    if (in->type == JSON_ARRAY)
        return !in->first || v->type == in->first->type ? DONE :
               expected(r, "elements of one type");
    return took(r, ':') ? DONE : expected(r, "':' and a value");
}

/* A member up to its end.  The last of equal keys wins, in the place of the
 * first, as in Python. */
static int read_member(struct reader *r, struct json *in, struct json **at,
                       int close)
{
    struct json *v = pool_get(r->pool, sizeof *v), *same = NULL;

    if (in->type == JSON_OBJECT || close == '}') {
        if (in->n_members == MAX_MEMBERS)
            return expected(r, "no more than 1024 members");
        if (read_key(r, in, v, close) != DONE)
            return USAGE;
        same = find_key(in, v->key, v->n_key);
    }
    if (same && close == ')')
        return expected(r, "each argument once");
    if (!same) {
        *at = v;
        in->n_members++;
    }
    if (close == '}' && in->type == JSON_ARRAY)
        return DONE;
    v = same ? same : v;
    memset(v, 0, offsetof(struct json, key));
    return read_value(r, v);
}

/* All up to the bracket that closes *in; Python may have a comma before it.
 * Counts commas in in->n. */
static int read_members(struct reader *r, struct json *in, int close)
{
    struct json **at = &in->first;
    char what[] = "',' or ' '";

    what[8] = (char)close;
    r->at++;
    if (++r->depth > MAX_DEPTH)
        return because(r->why, USAGE, "JSON nested deeper than %d levels",
                       MAX_DEPTH);
    while (!took(r, close)) {
        if (in->first && !took(r, ','))
            return expected(r, what);
        in->n += in->first != NULL;
        if (in->first && r->as != AS_JSON && took(r, close))
            break;
        if (r->pool->total > MAX_POOL)
            return because(r->why, USAGE, "JSON of too many values, expected "
                           "what fits into %d bytes", MAX_POOL);
        if (read_member(r, in, at, close) != DONE)
            return USAGE;
        at = *at ? &(*at)->next : at;
    }
    r->depth--;
    return DONE;
}

static int read_value(struct reader *r, struct json *v)
{
    const int c = peek(r), python = r->as != AS_JSON;

    if (c == '{' || c == '[' || (python && c == '(')) {
        v->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        if (read_members(r, v, c == '{' ? '}' : c == '[' ? ']' : ')') != DONE)
            return USAGE;
        if (c == '(' && v->n_members == 1 && v->n == 0)
            memcpy(v, v->first, offsetof(struct json, key));   /* no tuple   */
        return DONE;
    }
    if (c == '"' || (python && prefix_length(r->at) >= 0))
        return read_string(r, v);
    if (c == '-' || (c >= '0' && c <= '9') || (python && (c == '+' ||
                                                          c == '.')))
        return read_number(r, v);
    return read_word(r, v);
}

/* The tree of a whole text; DONE or USAGE. */
static int json_parse_to(struct pool *pool, const char *text, size_t n,
                         int depth, struct json **out, struct why *why)
{
    struct reader r = { .pool = pool, .text = text, .n = n, .why = why };
    struct json *v;
    int code;

    *out = NULL;
    if (n > MAX_JSON)
        return because(why, USAGE, "JSON of %zu bytes, expected at most %d", n,
                       MAX_JSON);
    if (n >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0)
        return because(why, USAGE, "the JSON begins with a byte order mark, "
                       "expected none");
    start_reading(&r);
    r.depth = MAX_DEPTH - depth;
    v = pool_get(pool, sizeof *v);
    code = read_value(&r, v);
    if (code == DONE && !took(&r, EOF))
        code = expected(&r, "the end");
    *out = code == DONE ? v : NULL;
    return code;
}

static int json_parse(struct pool *pool, const char *text, size_t n,
                      struct json **out, struct why *why)
{
    return json_parse_to(pool, text, n, MAX_DEPTH, out, why);
}

/* The same for an array, or an object with one in it: both are equally deep, so
 * that one may be written as the other. */
static int json_parse_list(struct pool *pool, const struct text *t,
                           struct json **out, struct why *why)
{
    const int is_object = t->s[strspn(t->s, " \t\r\n")] == '{';

    return json_parse_to(pool, t->s, t->n, MAX_DEPTH + is_object, out, why);
}

/* ---- writing, exactly as Python's json.dumps(x, ensure_ascii=False) */

/* What Python's str.strip() takes away. */
static int is_blank(uint32_t c)
{
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 ||
           c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
           c == 0x3000;
}

/* A string of JSON, or as Python's repr() has it but for some characters
 * without a picture.  Each byte that is no UTF-8 becomes a replacement
 * character. */
static void add_quoted(struct text *t, const char *s, size_t n, int python)
{
    const char *const end = s + n;
    const char quote = !python || (memchr(s, '\'', n) && !memchr(s, '"', n)) ?
                       '"' : '\'';
    const char value[] = { quote, '\\', '\n', '\r', '\t', '\b', '\f' };
    const char name[] = { quote, '\\', 'n', 'r', 't', 'b', 'f' };
    uint32_t c;

    add(t, &quote, 1);
    for (int size; s < end; s += size ? size : 1) {
        const char *p = memchr(value, *s, python ? 5 : 7);
        size = utf8_get(s, end, &c);
        if (p)
            add_format(t, "\\%c", name[p - value]);
        else if (c < ' ' || (python && c != ' ' && (is_control(c) ||
                 is_blank(c) || c == 0xad || (c >= 0x200b && c <= 0x200f))))
            add_format(t, python && c < 256 ? "\\x%02x" : "\\u%04x",
                       (unsigned)c);
        else
            add(t, size ? s : "\xef\xbf\xbd", size ? (size_t)size : 3);
    }
    add(t, &quote, 1);
}

static void add_json_string(struct text *t, const char *s, size_t n)
{
    add_quoted(t, s, n, 0);
}

static void add_tree(struct text *t, const struct json *v, int python)
{
    static const char *const word[][2] = {
        [JSON_NULL] = { "null", "None" }, [JSON_FALSE] = { "false", "False" },
        [JSON_TRUE] = { "true", "True" }, [JSON_ARRAY] = { "[", "[" },
        [JSON_OBJECT] = { "{", "{" }
    };

    if (v->type == JSON_STRING)
        add_quoted(t, v->s, v->n, python);
    else
        add_string(t, v->type == JSON_NUMBER ? v->s : word[v->type][python]);
    for (const struct json *m = v->first; m; m = m->next) {
        if (v->type == JSON_OBJECT) {
            add_quoted(t, m->key, m->n_key, python);
            add_string(t, ": ");
        }
        add_tree(t, m, python);
        add_string(t, m->next ? ", " : "");
    }
    if (v->type >= JSON_ARRAY)
        add_string(t, v->type == JSON_ARRAY ? "]" : "}");
}

static void add_json(struct text *t, const struct json *v)
{
    add_tree(t, v, 0);
}

/* ---- writing objects and arrays, member by member
 *
 * Those of arrays have no key. */

static void member(struct text *to, const char *key)
{
    if (to->n > 0 && !strchr("{[", to->s[to->n - 1]))
        add_string(to, ", ");
    if (key) {
        add_json_string(to, key, strlen(key));
        add_string(to, ": ");
    }
}

/* Text that is not there, and numbers that are none, are null. */
static void member_bytes(struct text *to, const char *key, const char *s,
                         size_t n)
{
    member(to, key);
    if (s)
        add_json_string(to, s, n);
    else
        add_string(to, "null");
}

static void member_text(struct text *to, const char *key, const char *s)
{
    member_bytes(to, key, s, s ? strlen(s) : 0);
}

static void member_count(struct text *to, const char *key, uint64_t n)
{
    member(to, key);
    add_format(to, "%llu", (unsigned long long)n);
}

static void member_real(struct text *to, const char *key, double x)
{
    member(to, key);
    add_format(to, !isfinite(x) ? "null" : x == floor(x) && fabs(x) < 1e15 ?
               "%.0f" : "%.9g", x);
}

static void member_bool(struct text *to, const char *key, int x)
{
    member(to, key);
    add_string(to, x ? "true" : "false");
}

static void member_open(struct text *to, const char *key, const char *bracket)
{
    member(to, key);
    add_string(to, bracket);
}

/* -------------------------------------------------------- 14. Chat templates
 *
 * The models of the family were trained on six ways to write down the same
 * conversation.  Their files carry them as Jinja programs; here they are one
 * function and a table of what tells them apart.  The result is text together
 * with the places in it that are control tokens because the template put them
 * there: what a user writes is never more than text. */

/* The word of --template. */
static const char *template_name(int template)
{
    static struct phrase name[TEMPLATE_NONE + 1];

    name[template] = word_of(TEMPLATES, template);
    return name[template].s;
}

static const struct dialect {
    int marked;                           /* tools and results in markers    */
    int dated;                            /* tools as one list, with a date  */
    enum { ALL, SINCE_ANSWER, SINCE_QUESTION } thoughts;  /* that are kept   */
    enum { NO_CALLS, CALLS_FIRST, CALLS_LAST } calls;     /* and the content */
    const char *quote;                    /* of an argument; NULL: as JSON   */
    int always_thinks;                    /* and escapes what it quotes      */
} dialects[] = {
    [TEMPLATE_LFM2]     = { 1, 0, ALL, NO_CALLS, NULL, 0 },
    [TEMPLATE_INSTRUCT] = { 0, 0, SINCE_ANSWER, NO_CALLS, NULL, 0 },
    [TEMPLATE_NEW]      = { 0, 1, SINCE_ANSWER, CALLS_LAST, NULL, 0 },
    [TEMPLATE_VL]       = { 0, 1, SINCE_ANSWER, CALLS_FIRST, "\"", 0 },
    [TEMPLATE_8B]       = { 0, 0, SINCE_QUESTION, CALLS_LAST, "'", 0 },
    [TEMPLATE_26B]      = { 0, 0, SINCE_QUESTION, CALLS_LAST, "'", 1 }
};

/* Does the prompt depend on the day? */
static int template_is_dated(int template)
{
    return template != TEMPLATE_NONE && dialects[template].dated;
}

/* A conversation is judged while it is written down.  The first fault counts,
 * and what is written after it does not. */
struct rendering {
    const struct conversation *conv;
    const struct dialect *as;
    struct rendered *out;
    struct why *why;
    int code;
    int i;                                /* the message it is at            */
    struct text parts;                    /* the content of one message      */
    struct pool pool;
};

static void rendered_free(struct rendered *r)
{
    free(r->text.s);
    free(r->mark);
    *r = (struct rendered){ .n_marks = 0 };
}

/* Room for marks doubles whenever their number is a power of two. */
static void add_mark(struct rendered *r, const char *token)
{
    const size_t n = (size_t)r->n_marks++;

    if ((n & (n - 1)) == 0)
        r->mark = resize(r->mark, (n ? 2 * n : 1) * sizeof *r->mark);
    r->mark[n] = (struct mark){ r->text.n, strlen(token) };
    add_string(&r->text, token);
}

static int begins(const char *s, const char *end, const char *word)
{
    const size_t n = strlen(word);

    return (size_t)(end - s) >= n && memcmp(s, word, n) == 0;
}

/* Where `word` first is from s to `end`, or NULL. */
static const char *find(const char *s, const char *end, const char *word)
{
    return memmem(s, (size_t)(end - s), word, strlen(word));
}

/* ---- what is good */

static const char *kind(const struct json *v)
{
    return v ? json_names[v->type] : "nothing";
}

static void fault(struct rendering *r, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    if (r->code == DONE)
        vsnprintf(r->why->s, sizeof r->why->s, fmt, args);
    va_end(args);
    r->code = USAGE;
}

/* Is it of this type?  A string has to be text without NUL characters, too. */
static int check(struct rendering *r, const struct json *v, int type,
                 const char *path, ...)
{
    char s[64];
    va_list args;

    if (json_is(v, type) && (type != JSON_STRING || json_text(v)))
        return 1;
    va_start(args, path);
    vsnprintf(s, sizeof s, path, args);
    va_end(args);
    if (!json_is(v, type))
        fault(r, "%s is %s, expected %s", s, kind(v), json_names[type]);
    else
        fault(r, "%s has a NUL character after %zu bytes, expected text", s,
              strlen(v->s));
    return 0;
}

/* The function of a tool or call, which may be wrapped or not. */
static const struct json *function_of(const struct json *call)
{
    const struct json *function = json_get(call, "function");

    return json_is(function, JSON_OBJECT) ? function : call;
}

/* Arguments as an object, though OpenAI's clients send them as a string with
 * JSON; NULL if they are neither. */
static const struct json *arguments_of(struct pool *pool, const struct json *v)
{
    static const struct json none = { .type = JSON_OBJECT };
    struct json *parsed;
    struct why why;

    if (!v || v->type == JSON_NULL || (v->type == JSON_STRING && v->n == 0))
        return &none;
    if (v->type == JSON_STRING && json_parse(pool, v->s, v->n, &parsed, &why)
        == DONE)
        v = parsed;
    return v->type == JSON_OBJECT ? v : NULL;
}

/* Messages of a "developer" are those of the system under a newer name. */
static const char *role_of(const struct json *message)
{
    static const char *const known[] = { "system", "user", "assistant", "tool",
                                         "developer" };
    const char *role = json_text(json_get(message, "role"));

    for (int i = 0; role && i < 5; i++)
        if (strcmp(role, known[i]) == 0)
            return known[i < 4 ? i : 0];
    return NULL;
}

static int has_role(const struct json *message, const char *role)
{
    const char *is = role_of(message);

    return is && strcmp(is, role) == 0;
}

/* Who says it, and is there anything? */
static void check_message(struct rendering *r, const struct json *m)
{
    const struct json *role = json_get(m, "role");

    if (!check(r, m, JSON_OBJECT, "messages[%d]", r->i))
        return;
    if (!role_of(m))
        fault(r, "messages[%d].role is %s, expected \"system\", \"user\", "
              "\"assistant\" or \"tool\"", r->i, json_is(role, JSON_STRING) ?
              "another string" : kind(role));
    else if (r->conv->continue_last && !m->next && !has_role(m, "assistant"))
        fault(r, "messages[%d] is of role %s, expected \"assistant\" to "
              "continue it", r->i, role_of(m));
    else if (!given(m, "content") && !has_role(m, "assistant"))
        fault(r, "messages[%d].content is %s, expected a string", r->i,
              kind(json_get(m, "content")));
}

/* ---- as Python has it */

/* As str.strip() does. */
static struct piece trim(const char *s, const char *end)
{
    const char *from = end, *to = end;
    uint32_t c;

    for (int n; s < end; s += n) {
        n = utf8_get(s, end, &c);
        n = n ? n : 1;
        if (is_blank(c))
            continue;
        from = from < end ? from : s;
        to = s + n;
    }
    return (struct piece){ from, (size_t)(to - from) };
}

/* The value of an argument in a call: Python's, but for strings, dicts and,
 * with one template, lists. */
static void add_argument(struct text *t, const struct json *v,
                         const struct dialect *as)
{
    static const char value[] = "\\'\n\r", name[] = "\\'nr";

    if (v->type != JSON_STRING || !as->quote) {
        add_tree(t, v, v->type != JSON_STRING && v->type != JSON_OBJECT &&
                 !(v->type == JSON_ARRAY && as->always_thinks));
        return;
    }
    add_string(t, as->quote);
    for (size_t i = 0; i < v->n; i++) {
        const char *p = as->always_thinks ? memchr(value, v->s[i], 4) : NULL;
        add(t, "\\", p != NULL);
        add(t, p ? name + (p - value) : v->s + i, 1);
    }
    add_string(t, as->quote);
}

/* ---- the parts of a conversation */

static void begin_turn(struct rendering *r, const char *role)
{
    add_mark(r->out, TURN_START);
    add_string(&r->out->text, role);
    add_string(&r->out->text, "\n");
}

static void end_turn(struct rendering *r)
{
    add_mark(r->out, TURN_END);
    add_string(&r->out->text, "\n");
}

static void put_tools(struct rendering *r)
{
    const struct json *tool = r->conv->tools->first;
    struct text *t = &r->out->text;

    if (r->as->dated)
        add_format(t, "Today's date: %s\n\n", r->conv->date);
    add_string(t, "List of tools: ");
    if (r->as->marked)
        add_mark(r->out, "<|tool_list_start|>");
    for (int i = 0; tool; tool = tool->next, i++) {
        const int is_text = tool->type == JSON_STRING;
        const char *name = json_text(json_get(function_of(tool), "name"));
        if (!is_text && check(r, tool, JSON_OBJECT, "tools[%d]", i) &&
            (!name || !name[0]))
            fault(r, "tools[%d] has no name, expected a function with one", i);
        add_string(t, i == 0 ? "[" : ", ");
        if (is_text && !r->as->dated)
            add(t, tool->s, tool->n);
        else
            add_json(t, tool);
    }
    add_string(t, "]");
    if (r->as->marked)
        add_mark(r->out, "<|tool_list_end|>");
}

static void put_call(struct rendering *r, const struct json *call, int k)
{
    const struct json *function = function_of(call);
    const struct json *given_args = json_get(function, "arguments");
    const struct json *args = arguments_of(&r->pool, given_args);
    const char *name = json_text(json_get(function, "name"));
    struct text *t = &r->out->text;

    if (!name)
        fault(r, "messages[%d].tool_calls[%d] has no function with a name",
              r->i, k);
    else if (!args)
        fault(r, "messages[%d].tool_calls[%d].function.arguments is %s, "
              "expected an object or a string with one", r->i, k,
              kind(given_args));
    else {
        add_string(t, k > 0 ? ", " : "");
        add_string(t, name);
        add_string(t, "(");
        for (const struct json *arg = args->first; arg; arg = arg->next) {
            add(t, arg->key, arg->n_key);
            add_string(t, "=");
            add_argument(t, arg, r->as);
            add_string(t, arg->next ? ", " : "");
        }
        add_string(t, ")");
    }
}

/* Those that the template has no place for are judged, but not kept. */
static void put_calls(struct rendering *r, const struct json *calls)
{
    const struct json *call = calls->first;
    const size_t n = r->out->text.n;
    const int n_marks = r->out->n_marks;

    if (!check(r, calls, JSON_ARRAY, "messages[%d].tool_calls", r->i))
        return;
    add_mark(r->out, CALL_START);
    add_string(&r->out->text, "[");
    for (int k = 0; call; call = call->next, k++)
        put_call(r, call, k);
    add_string(&r->out->text, "]");
    add_mark(r->out, CALL_END);
    if (r->as->calls == NO_CALLS) {
        r->out->text.n = n;
        r->out->n_marks = n_marks;
        r->out->lost_calls |= calls->first != NULL;
    }
}

/* Clients hand calls and thoughts back with their markers in the content. */
static void put_answer(struct rendering *r, struct piece text)
{
    static const char *const marker[] = {
        CALL_START, CALL_END, THINK, THINK_END
    };
    const char *const end = text.s + text.n;

    for (const char *p = text.s; p < end; p++) {
        int i = *p == '<' ? 0 : 4;
        while (i < 4 && !begins(p, end, marker[i]))
            i++;
        if (i < 4) {
            add_mark(r->out, marker[i]);
            p += strlen(marker[i]) - 1;
        } else
            add(&r->out->text, p, 1);
    }
}

/* The text of a message, its parts joined. */
static struct piece content_of(struct rendering *r, const struct json *message)
{
    const struct json *content = given(message, "content");
    const struct json *part = content ? content->first : NULL;

    r->parts.n = 0;
    add_string(&r->parts, "");
    if (content && content->type != JSON_ARRAY) {
        if (check(r, content, JSON_STRING, "messages[%d].content", r->i))
            return (struct piece){ content->s, content->n };
        part = NULL;
    }
    for (int k = 0; part; part = part->next, k++) {
        const struct json *text = json_get(part, "text");
        const char *type = json_text(json_get(part, "type"));
        if (!type || strcmp(type, "text") != 0)
            fault(r, "messages[%d].content[%d] is no part of type \"text\", "
                  "and this program reads text only", r->i, k);
        else if (check(r, text, JSON_STRING, "messages[%d].content[%d].text",
                       r->i, k))
            add(&r->parts, text->s, text->n);
    }
    return (struct piece){ r->parts.s, r->parts.n };
}

/* A `recent` answer keeps what was thought before it, others only what is
 * behind the last </think>.  Some templates write down an empty list of calls.
 */
static void put_assistant(struct rendering *r, const struct json *m, int recent)
{
    static const char *const keys[] = { "thinking", "reasoning",
                                        "reasoning_content" };
    const struct json *thinking = NULL, *calls = given(m, "tool_calls");
    const int writes_none = r->as->quote && !r->as->always_thinks;
    struct piece text = content_of(r, m);
    const char *const end = text.s + text.n, *p = text.s, *after = NULL;

    for (int i = 0; i < 3 && !thinking; i++) {
        const struct json *v = given(m, keys[i]);
        if (v && check(r, v, JSON_STRING, "messages[%d].%s", r->i, keys[i]) &&
            (v->n > 0 || !r->as->always_thinks))
            thinking = v;
    }
    while (!recent && (p = find(p, end, THINK_END)) != NULL)
        after = p += strlen(THINK_END);
    if (after)
        text = trim(after, end);
    if (!calls && !thinking && !given(m, "content"))
        fault(r, "messages[%d] has no content, expected a string or "
              "tool_calls", r->i);
    if (json_is(calls, JSON_ARRAY) && !calls->first && !writes_none)
        calls = NULL;
    if (thinking && r->as->calls != NO_CALLS && recent) {
        add_mark(r->out, THINK);
        add(&r->out->text, thinking->s, thinking->n);
        add_mark(r->out, THINK_END);
    }
    if (calls && r->as->calls != CALLS_LAST)
        put_calls(r, calls);
    put_answer(r, text);
    if (calls && r->as->calls == CALLS_LAST)
        put_calls(r, calls);
}

static void put_message(struct rendering *r, const struct json *m, int recent)
{
    const int marked = r->as->marked && has_role(m, "tool");

    begin_turn(r, role_of(m));
    if (has_role(m, "assistant"))
        put_assistant(r, m, recent);
    else {
        const struct piece text = content_of(r, m);
        if (marked)
            add_mark(r->out, "<|tool_response_start|>");
        add(&r->out->text, text.s, text.n);
        if (marked)
            add_mark(r->out, "<|tool_response_end|>");
    }
    /* The template of VL forgets the end of a message without content. */
    if ((m->next || !r->conv->continue_last) &&
        (r->as->calls != CALLS_FIRST || json_get(m, "content")))
        end_turn(r);
}

/* The last answer keeps its thoughts, or those after the last question do. */
static void put_conversation(struct rendering *r)
{
    const struct json *const first = r->conv->messages->first;
    const struct json *recent = NULL;
    struct piece text = { "", 0 };
    const int tools = r->conv->tools && r->conv->tools->first,
              system = has_role(first, "system"),
              question = r->as->thoughts == SINCE_QUESTION;
    int is_recent = r->as->thoughts == ALL || r->conv->keep_thinking;

    add_mark(r->out, BOS);
    if (system)
        text = content_of(r, first);
    if (text.n > 0 || tools) {
        begin_turn(r, "system");
        add(&r->out->text, text.s, text.n);
        if (text.n > 0 && tools)
            add_string(&r->out->text, r->as->dated ? "\n\n" : "\n");
        if (tools)
            put_tools(r);
        end_turn(r);
    }
    for (const struct json *m = first; m; m = m->next)
        if (has_role(m, question ? "user" : "assistant") ||
            (question && !recent))
            recent = m;
    for (const struct json *m = first; m; m = m->next, r->i++) {
        is_recent |= m == recent;
        check_message(r, m);
        if (r->code == DONE && !(system && m == first))
            put_message(r, m, is_recent);
    }
    if (!r->conv->generate || r->conv->continue_last)
        return;
    begin_turn(r, "assistant");
    if (r->conv->open_thought || r->as->always_thinks)
        add_mark(r->out, THINK);
}

/* A conversation as the template writes it; DONE or USAGE.  The caller releases
 * *out in any case. */
static int render(const struct conversation *conv, int template,
                  struct rendered *out, struct why *why)
{
    struct rendering r = { .conv = conv, .out = out, .why = why };
    const struct json *m = conv->messages, *tools = conv->tools;

    *out = (struct rendered){ .n_marks = 0 };
    if (template <= TEMPLATE_AUTO || template >= TEMPLATE_NONE)
        return because(why, USAGE, "the model has no chat template, expected a "
                       "prompt and no messages");
    r.as = &dialects[template];
    if (!json_is(m, JSON_ARRAY) || !m->first)
        return because(why, USAGE, "messages is %s, expected an array of "
                       "messages", json_is(m, JSON_ARRAY) ? "empty" : kind(m));
    if (tools && tools->type != JSON_NULL && tools->type != JSON_ARRAY)
        return because(why, USAGE, "tools is %s, expected an array",
                       kind(tools));
    put_conversation(&r);
    free(r.parts.s);
    pool_free(&r.pool);
    return r.code;
}

/* ---- its tokens */

/* What lies between two marks is one piece of text, and so is a mark without a
 * token.  With `special`, control tokens written in it count, too. */
static int encode_rendered(const lfm2_tokenizer *words,
                           const struct rendered *r, int special,
                           struct ids *out, struct why *why)
{
    const int flags = special ? LFM2_ENCODE_SPECIAL : 0;
    const int room = (int)r->text.n + 1;
    size_t at = 0;

    if (lfm2_token_id(words, TURN_START) < 0 ||
        lfm2_token_id(words, TURN_END) < 0)
        return because(why, BAD_MODEL, "the chat format needs the tokens "
                       TURN_START " and " TURN_END ", which the vocabulary "
                       "lacks");
    *out = (struct ids){ zeroed((size_t)room, sizeof *out->id), 0 };
    for (int i = 0; i <= r->n_marks; i++) {
        const struct mark end = { r->text.n, 0 };
        const struct mark *m = i < r->n_marks ? &r->mark[i] : &end;
        const struct phrase token = phrase("%.*s", (int)m->n,
                                           r->text.s + m->from);
        const int32_t id = m->n == 0 ? -1 : strcmp(token.s, BOS) == 0 ?
                           lfm2_bos(words) : lfm2_token_id(words, token.s);
        int n;
        if (m->n && id < 0 && i > 0)      /* the first is BOS, or nothing    */
            continue;
        n = lfm2_encode(words, r->text.s + at, m->from - at, flags,
                        out->id + out->n, room - out->n);
        if (n < 0)
            return because(why, NO_MEMORY, "no memory for %zu bytes of text",
                           r->text.n);
        out->n += n;
        if (id >= 0)
            out->id[out->n++] = id;
        at = m->from + m->n;
    }
    return DONE;
}

/* ---- which one a model wants */

/* The date as the templates that ask for it see it: of the local clock. */
static void today(char date[11])
{
    const time_t now = time(NULL);
    struct tm tm;

    if (!localtime_r(&now, &tm) || strftime(date, 11, "%Y-%m-%d", &tm) == 0)
        memcpy(date, "1970-01-01", 11);
}

/* Lines may end in CR LF, and what is blank at the end does not matter. */
static uint64_t template_hash(const char *s, size_t n)
{
    uint64_t h = HASH_START;

    while (n > 0 && strchr(" \t\r\n", s[n - 1]))
        n--;
    for (size_t i = 0; i < n; i++)
        if (s[i] != '\r' || i + 1 == n || s[i + 1] != '\n')
            h = hash_bytes(h, s + i, 1);
    return h;
}

static int template_by_model(const lfm2_model *model,
                             const lfm2_tokenizer *words)
{
    const int n_vocab = words ? lfm2_n_vocab(words) :
                        lfm2_model_config(model)->n_vocab;
    size_t n = 0;
    const char *s = lfm2_model_string(model, "general.name", &n);
    const char *const name = s ? s : "", *const end = name + n;

    return n_vocab > 100000 ?
           find(name, end, "2.6B") ? TEMPLATE_26B : TEMPLATE_8B :
           !find(name, end, "2.5") ? TEMPLATE_LFM2 :
           find(name, end, "VL") ? TEMPLATE_VL : TEMPLATE_INSTRUCT;
}

/* How it was found: the one in the file is one of those that this program was
 * tested with, or has a word that only one of them has, or neither. */
struct found_template {
    int template;
    enum { NO_TEMPLATE, BY_HASH, BY_WORDS, BY_MODEL } how;
    const char *word;                     /* NULL: not BY_WORDS              */
    uint64_t hash;
};

/* `words` may be NULL.  A template under a name is for another purpose than
 * conversation, and never taken for it. */
static struct found_template find_template(const lfm2_model *model,
                                           const lfm2_tokenizer *words)
{
    /* Of the published ones the hash, and a word that an edited one keeps. */
    static const struct { uint64_t hash; int template; const char *word; }
    known[] = {
        { 0x64c90fcede246b34u, TEMPLATE_LFM2, "<|tool_list_start|>" },
        { 0xe176bd72cee9ff33u, TEMPLATE_LFM2, "<|tool_list_end|>" },
        { 0xdf1dafa110337cb9u, TEMPLATE_26B, "message.reasoning" },
        { 0x9b5e9322adfff1aau, TEMPLATE_8B, "preserve_thinking" },
        { 0x6ebe17e9a93f4638u, TEMPLATE_VL, "continue_final_message" },
        { 0x7aeb1f9c89e15fb8u, TEMPLATE_NEW, "strftime_now" },
        { 0xd5a3bd005e5a88cau, TEMPLATE_INSTRUCT, "List of tools: [" }
    };
    struct found_template to = { TEMPLATE_NONE, NO_TEMPLATE, NULL, 0 };
    size_t n;
    const char *s = lfm2_model_string(model, "tokenizer.chat_template", &n);

    if (!s)
        return to;
    to.hash = template_hash(s, n);
    for (int i = 0; i < 7; i++)
        if (known[i].hash == to.hash)
            return (struct found_template){ known[i].template, BY_HASH, NULL,
                                            to.hash };
    for (int i = 0; i < 7; i++)
        if (find(s, s + n, known[i].word))
            return (struct found_template){ known[i].template, BY_WORDS,
                                            known[i].word, to.hash };
    to.template = template_by_model(model, words);
    to.how = BY_MODEL;
    return to;
}

/* The template of a model, and a sentence about how it was found.  *known is 0
 * if the one in the file is unknown. */
static int choose_template(const lfm2_model *model, const lfm2_tokenizer *words,
                           int *known, struct why *evidence)
{
    static const char *const how[] = {
        [BY_HASH] = "the one in the file",
        [BY_WORDS] = "the one in the file is unknown, but has words of this "
                     "one",
        [BY_MODEL] = "by name and vocabulary of the model, as the one in the "
                     "file is unknown"
    };
    const struct found_template f = find_template(model, words);
    struct phrase named = { "" };
    const char *key;
    char value[64];

    *known = f.how <= BY_HASH;
    for (int i = 0; f.how == NO_TEMPLATE && !named.s[0] &&
         (key = lfm2_model_key(model, i, value, sizeof value)); i++)
        if (begins(key, key + strlen(key), "tokenizer.chat_template."))
            named = phrase(" but %s, which is not for this", key);
    if (f.how == NO_TEMPLATE)
        return because(evidence, f.template, "the file has no chat template%s, "
                       "so text is continued as it is", named.s);
    return because(evidence, f.template, "chat template %s: %s (hash %016llx)",
                   template_name(f.template), how[f.how],
                   (unsigned long long)f.hash);
}

/* ------------------------------------------------------------ 15. Tool calls
 *
 * A model that wants a tool writes <|tool_call_start|>, Python, and
 * <|tool_call_end|>: [weather(city="Rome", days=2), time()].  Some write JSON
 * there: {"name": "time", "arguments": {}}.  An argument has the value that
 * Python's ast.literal_eval() gives it, or is one of JSON's words.  Text that
 * has no value in JSON (bytes, complex numbers) or has to be computed is not
 * understood, and stays text.
 *
 * Where Python would see an error of syntax, some things are clear all the
 * same: new lines and forgotten backslashes in strings, names like get-time,
 * calls on lines of their own, a bracket missing at the very end. */

/* Those from number n on. */
static void drop_calls(struct calls *calls, int n)
{
    while (calls->n > n) {
        free(calls->call[--calls->n].name.s);
        free(calls->call[calls->n].arguments.s);
    }
}

static void free_calls(struct calls *calls)
{
    drop_calls(calls, 0);
    free(calls->call);
    *calls = (struct calls){ NULL, 0 };
}

/* In either notation.  An argument without a name is good if it is the only
 * one, and a dict. */
static int read_call(struct reader *r, struct calls *to)
{
    struct json *v = pool_get(r->pool, sizeof *v);
    const struct json *args = v, *named;
    struct piece name;

    if (peek(r) == '{') {
        if (read_value(r, v) != DONE)
            return USAGE;
        args = function_of(v);
        named = json_get(args, "name");
        v = json_get(args, "arguments");
        args = arguments_of(r->pool, v ? v : json_get(args, "parameters"));
        if (!json_text(named) || named->n == 0 || !args)
            return expected(r, "a call before it");
        name = (struct piece){ named->s, named->n };
    } else {
        name.s = r->at;
        name.n = read_name(r);
        if (r->as == AS_JSON || name.n == 0 || peek(r) != '(')
            return expected(r, "a call");
        char *const open = r->at++;
        const int is_dict = peek(r) == '{';
        r->at = open;
        v->type = JSON_OBJECT;
        if ((is_dict ? read_value(r, v) : read_members(r, v, ')')) != DONE)
            return USAGE;
        if (v->type == JSON_ARRAY && v->n_members == 1)
            args = v->first;
        if (args->type != JSON_OBJECT)
            return expected(r, "a dict before it");
    }
    to->call = resize(to->call, (size_t)(to->n + 1) * sizeof *to->call);
    to->call[to->n] = (struct call){ { 0 }, { 0 } };
    add(&to->call[to->n].name, name.s, name.n);
    add_json(&to->call[to->n++].arguments, args);
    return DONE;
}

/* Calls, or one list of them, up to the end.  A comma or a new line is between
 * two. */
static int read_block(struct reader *r, int is_whole, struct calls *to)
{
    const int list = took(r, '[');
    const char *from = r->at;

    for (int n = 0; !list || !took(r, ']'); n++) {
        const int comma = n > 0 && took(r, ',');
        if (peek(r) == EOF && n > 0 && (!list || is_whole))
            return DONE;
        if (n > 0 && !comma && !memchr(from, '\n', (size_t)(r->at - from)))
            return expected(r, "',' or a new line");
        if (list && comma && took(r, ']'))
            break;
        if (read_call(r, to) != DONE)
            return USAGE;
        from = r->at;
    }
    return took(r, EOF) ? DONE : expected(r, "the end");
}

/* What stands between two markers, all or none: as JSON, as Python, or as
 * Python with quotes that lack a backslash.  Before, each byte that is no UTF-8
 * becomes a replacement character, and new lines are as Python sees them. */
static int read_calls(struct pool *pool, const char *s, const char *end,
                      int is_whole, struct calls *to)
{
    const int before = to->n;
    char *text = pool_get(pool, 3 * (size_t)(end - s) + 1);
    struct why why;
    struct reader r = { .pool = pool, .text = text, .why = &why };
    uint32_t c;

    for (int size; s < end; s += size ? size : 1) {
        size = utf8_get(s, end, &c);
        if (c != '\r' || s + 1 == end || s[1] != '\n')
            r.n += utf8_put(text + r.n, c == '\r' ? '\n' : c);
    }
    for (r.as = AS_JSON; r.as <= AS_BAD_PYTHON; r.as++) {
        start_reading(&r);
        if (read_block(&r, is_whole, to) == DONE)
            return 1;
        drop_calls(to, before);
    }
    return 0;
}

/* Add the text between two calls.  Models write the last marker of a call once
 * more after it, which nobody should see. */
static void add_around(struct text *rest, const char *s, const char *end,
                       const struct calls *before)
{
    const char *marker;

    for (; before->n > 0 && (marker = find(s, end, CALL_END)) != NULL;
         s = marker + strlen(CALL_END))
        add(rest, s, (size_t)(marker - s));
    add(rest, s, (size_t)(end - s));
}

/* The calls in an answer; the text around them, and calls that were not
 * understood, markers included, go to `rest`.  Returns how many were not
 * understood.  A call at the end may lack its last marker; one that is not
 * complete does not count if the answer was `cut` for its length. */
static int parse_calls(const char *s, size_t n, int cut, struct calls *out,
                       struct text *rest)
{
    const char *const end = s + n, *start, *stop;
    struct pool pool = { 0 };
    int bad = 0;

    *out = (struct calls){ NULL, 0 };
    for (; (start = find(s, end, CALL_START)) != NULL; s = stop) {
        const char *const body = start + strlen(CALL_START);
        add_around(rest, s, start, out);
        for (stop = body; (stop = find(stop, end, "<|tool_call_")); stop++)
            if (begins(stop, end, CALL_START) || begins(stop, end, CALL_END))
                break;
        stop = stop ? stop : end;
        const int ended = begins(stop, end, CALL_END);
        const int good = read_calls(&pool, body, stop, ended || !cut, out);
        stop += ended ? strlen(CALL_END) : 0;
        if (!good)
            add(rest, start, (size_t)(stop - start));
        bad += !good && !(cut && stop == end && !ended);
    }
    add_around(rest, s, end, out);
    pool_free(&pool);
    return bad;
}

/* ------------------------------------------------------ 16. Tokens in and out
 *
 * --tokenize, --detokenize and --export-tokenizer need a vocabulary only. */

/* model: the open one, whose file has the words if no other is named; or NULL.
 * Returns a code of the library. */
static int load_words(const struct settings *s, const lfm2_model *model,
                      lfm2_tokenizer **out, lfm2_error *err)
{
    const char *path = s->tokenizer ? s->tokenizer : s->model;
    const void *file;
    size_t n;
    int code;

    if (model && !s->tokenizer) {
        file = lfm2_model_file(model, &n);
        return lfm2_tokenizer_open_memory(out, file, n, err);
    }
    watch_file(path);
    code = lfm2_tokenizer_open(out, path, err);
    if (model && !s->no_mmap)
        watch_file(s->model);
    return code;
}

static int open_words(const struct settings *s, const lfm2_model *model,
                      lfm2_tokenizer **out)
{
    lfm2_error err;

    return load_words(s, model, out, &err) == LFM2_OK ? DONE :
           report(s->tokenizer ? s->tokenizer : s->model, &err);
}

/* Text as it is.  What is to be gone on with may have to begin with BOS. */
static int encode_plain(const struct settings *s, const lfm2_tokenizer *words,
                        const char *text, size_t n, struct ids *out)
{
    const int bos = s->bos || (s->mode != TOKENIZE && lfm2_add_bos(words));
    const int flags = (bos ? LFM2_ENCODE_BOS : 0) |
                      (s->special ? LFM2_ENCODE_SPECIAL : 0);

    out->id = zeroed(n + 1, sizeof *out->id);
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

        n = s->null ? strlen(t->s + at) : t->n;
        if (encode_plain(s, words, t->s + at, n, &ids) != DONE)
            return NO_MEMORY;
        for (int i = 0; i < ids.n; i++)
            printf("%s%ld", i ? " " : "", (long)ids.id[i]);
        free(ids.id);
        putchar('\n');
    }
    return DONE;
}

/* The text of every line of ids.  The inverse of tokenize(), which ends the
 * last line: a text of the last line alone is all there is, and between those
 * of several stands a newline.  With --null each ends with a NUL instead. */
static int detokenize(const struct settings *s, const lfm2_tokenizer *words,
                      const struct text *t)
{
    static const char blank[] = " \t\r";
    const char *p = t->s, *const stop = t->s + t->n;
    struct text out = { 0 };
    char *end;
    int len;

    for (int line = 1; p < stop; line++) {
        for (p += strspn(p, blank); p < stop && *p != '\n'; p = end) {
            errno = 0;
            const long id = strtol(p, &end, 10);
            if (end == p || !strchr(" \t\r\n", *end) || errno || id < 0 ||
                id >= lfm2_n_vocab(words)) {
                free(out.s);
                return say(FAILED, "line %d: \"%.*s\", expected a token id "
                           "from 0 to %d", line, (int)strcspn(p, " \t\r\n"), p,
                           lfm2_n_vocab(words) - 1);
            }
            const char *bytes = lfm2_token_bytes(words, (int32_t)id,
                                                 s->special, &len);
            add(&out, bytes, (size_t)len);
            end += strspn(end, blank);
        }
        p++;
        if (s->null || p < stop)
            add(&out, s->null ? "" : "\n", 1);
        show_text(&out);
        out.n = 0;
    }
    free(out.s);
    return DONE;
}

static int export_words(const struct settings *s)
{
    const char *path = s->tokenizer ? s->tokenizer : s->model;
    lfm2_model *model;
    lfm2_error err;
    const void *data;
    void *buf = NULL;
    size_t size, n = 0;
    FILE *f;

    watch_file(path);
    open_file(&model, path, s->no_mmap, LFM2_LOAD_ANY, &err);
    if (model) {
        data = lfm2_model_file(model, &size);
        n = lfm2_tokenizer_export(data, size, NULL, 0, &err);
        buf = resize(NULL, n);
        n = n > 0 ? lfm2_tokenizer_export(data, size, buf, n, &err) : 0;
    }
    lfm2_model_close(model);
    f = n > 0 ? create_file(s->export_to) : NULL;
    if (f)
        fwrite(buf, 1, n, f);
    free(buf);
    return n == 0 ? report(path, &err) : f ? finish_file(f, s->export_to, DONE)
                                           : BAD_FILE;
}

static int work_on_words(const struct settings *s)
{
    struct text t = { 0 };
    lfm2_tokenizer *words;
    int code = enter_sandbox(s);

    if (code == DONE)
        code = open_words(s, NULL, &words);
    if (code != DONE)
        return code;
    if (s->mode == EXPORT)
        code = export_words(s);
    else if (s->prompt && !is_dash(s->prompt))
        add_string(&t, s->prompt);
    else
        code = read_file(s->file ? s->file : "-", &t);
    if (code == DONE && s->mode == TOKENIZE)
        code = tokenize(s, words, &t);
    if (code == DONE && s->mode == DETOKENIZE)
        code = detokenize(s, words, &t);
    free(t.s);
    lfm2_tokenizer_close(words);
    return code;
}

/* -------------------------------------------------------------- 17. --inspect
 *
 * What is in a file, in the terms its makers use; what it will take to run it;
 * and what is wrong with it.  The facts are found once, then printed as text or
 * as JSON. */

/* ---- facts
 *
 * Each is written once, as JSON; the text is made of that.  Every tensor has a
 * role; embedding and output are one where they are tied. */

enum role {
    EMBEDDING, OUTPUT, CONV_MIXERS, ATTENTION, DENSE_FFN, ROUTER, EXPERTS,
    NORMS, UNUSED, N_ROLES
};

static const char *const role_name[N_ROLES] = {
    "embedding", "output", "conv", "attention", "dense_ffn", "router",
    "experts", "norms", "unused"
};

enum { MAX_TYPES = 32, MAX_COLUMNS = 12, ASSUMED_BANDWIDTH = 50 };

/* What the tensors of a role take. */
struct portion {
    int n;                                /* tensors                         */
    uint64_t params, active;              /* these for every token           */
    uint64_t bytes, read;
    int of_type[MAX_TYPES];               /* tensors, by lfm2_weight_type()  */
};

struct inspection {
    const struct settings *s;
    lfm2_model *model;
    lfm2_tokenizer *words;                /* NULL: no vocabulary             */
    int is_model;                         /* and not only the wreck of one   */
    int code;                             /* LFM2_OK, or what is fatal       */
    lfm2_error err;
    struct text json;
    struct portion all;                   /* without what is unused          */
    struct found_template template;
};

/* The first two are outside of layers, and known by their whole names. */
static enum role role_of_tensor(const char *name, const char *norm)
{
    static const struct { const char *part; enum role role; } known[] = {
        { "token_embd.weight", EMBEDDING }, { "output.weight", OUTPUT },
        { "_norm.", NORMS }, { "shortconv.", CONV_MIXERS },
        { "attn_", ATTENTION }, { "ffn_gate_inp.", ROUTER },
        { "exp_probs_b.", ROUTER }, { "_exps.", EXPERTS },
        { "ffn_", DENSE_FFN }
    };
    const int in_layer = strncmp(name, "blk.", 4) == 0;

    for (size_t i = in_layer ? 2 : 0; i < sizeof known / sizeof *known; i++)
        if (in_layer ? strstr(name, known[i].part) != NULL :
            strcmp(name, known[i].part) == 0)
            return known[i].role;
    return strcmp(name, norm) == 0 ? NORMS : UNUSED;
}

/* Of the experts a token reads those that are chosen; of an embedding that is
 * not the output, too, one row. */
static void add_tensor(struct portion *to, const lfm2_tensor_info *t,
                       enum role role, const lfm2_config *c, int tied)
{
    const int shared = role == EXPERTS && c->n_expert > 0;
    const uint64_t of = shared ? (uint64_t)c->n_expert : 1;
    const uint64_t used = shared ? (uint64_t)c->n_expert_used : role != UNUSED;
    uint64_t params = 1;
    const char *type;

    for (int d = 0; d < t->n_dims; d++)
        params *= t->dims[d];
    to->n++;
    to->params += params;
    to->active += params / of * used;
    to->bytes += t->n_bytes;
    to->read += role == EMBEDDING && !tied ? t->n_bytes / t->dims[1] :
                t->n_bytes / of * used;
    for (int i = 0; i < MAX_TYPES && (type = lfm2_weight_type(i)); i++)
        to->of_type[i] += strcmp(type, t->type) == 0;
}

static int has_tensor(const lfm2_model *m, const char *name)
{
    lfm2_tensor_info t;

    for (int i = 0; lfm2_model_tensor(m, i, &t) == LFM2_OK; i++)
        if (strcmp(t.name, name) == 0)
            return 1;
    return 0;
}

static void member_string(struct text *to, const char *key,
                          const lfm2_model *m, const char *in_file)
{
    size_t n = 0;
    const char *s = lfm2_model_string(m, in_file, &n);

    member_bytes(to, key, s, n);
}

/* The first bytes say as much as there is of a bad file. */
static void add_file_facts(struct inspection *f)
{
    struct text *to = &f->json;
    lfm2_tensor_info t;
    char value[8];
    size_t n;
    const unsigned char *head = lfm2_model_file(f->model, &n);
    int keys = 0, tensors = 0;

    while (lfm2_model_key(f->model, keys, value, sizeof value))
        keys++;
    while (lfm2_model_tensor(f->model, tensors, &t) == LFM2_OK)
        tensors++;
    member_open(to, "file", "{");
    member_text(to, "path", f->s->model);
    member_count(to, "bytes", n);
    if (n >= 24 && memcmp(head, "GGUF", 4) == 0) {
        member_count(to, "gguf_version", get_le(head + 4, 4));
        member_count(to, "n_keys", get_le(head + 16, 8));
        member_count(to, "n_tensors", get_le(head + 8, 8));
        member_count(to, "keys_read", (uint64_t)keys);
        member_count(to, "tensors_read", (uint64_t)tensors);
    }
    add_string(to, "}");
    member_bool(to, "opens", f->is_model);
    member_string(to, "name", f->model, "general.name");
    member_string(to, "architecture", f->model, "general.architecture");
}

/* In the maps c and A are short convolutions and attention, d and e dense
 * networks and experts. */
static void add_size_facts(struct text *to, const lfm2_config *c)
{
    const struct { const char *key; int n; } size[] = {
        { "n_layer", c->n_layer }, { "n_embd", c->n_embd },
        { "n_vocab", c->n_vocab }, { "n_ctx_train", c->n_ctx_train },
        { "l_cache", c->l_cache }, { "n_head", c->n_head },
        { "n_head_kv", c->n_head_kv }, { "head_dim", c->head_dim },
        { "n_ff", c->n_ff }, { "n_layer_dense", c->n_layer_dense },
        { "n_expert", c->n_expert }, { "n_expert_used", c->n_expert_used },
        { "n_ff_expert", c->n_ff_expert }
    };
    char mixers[LFM2_MAX_LAYER + 1] = "", ffns[LFM2_MAX_LAYER + 1] = "";

    for (int il = 0; il < c->n_layer; il++) {
        mixers[il] = c->is_attn[il] ? 'A' : 'c';
        ffns[il] = il < c->n_layer_dense ? 'd' : 'e';
    }
    member_open(to, "sizes", "{");
    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        member_count(to, size[i].key, (uint64_t)size[i].n);
    member_real(to, "rope_freq_base", (double)c->rope_freq_base);
    add_format(to, ", \"norm_rms_eps\": %g}", (double)c->norm_rms_eps);
    member_text(to, "layer_map", mixers);
    member_text(to, "ffn_map", ffns);
}

static void add_portion(struct text *to, const char *key,
                        const struct portion *p)
{
    const char *type;

    member_open(to, key, "{");
    member_count(to, "n_tensors", (uint64_t)p->n);
    member_count(to, "parameters", p->params);
    member_count(to, "active", p->active);
    member_count(to, "bytes", p->bytes);
    member_count(to, "bytes_per_token", p->read);
    member_real(to, "bits_per_weight", round(p->params ? (double)p->bytes *
                800 / (double)p->params : 0) / 100);
    member_open(to, "types", "{");
    for (int i = 0; i < MAX_TYPES && (type = lfm2_weight_type(i)); i++)
        if (p->of_type[i] > 0)
            member_count(to, type, (uint64_t)p->of_type[i]);
    add_string(to, "}}");
}

static void add_weight_facts(struct inspection *f)
{
    const char *norm = has_tensor(f->model, "output_norm.weight") ?
                       "output_norm.weight" : "token_embd_norm.weight";
    const int tied = !has_tensor(f->model, "output.weight");
    const lfm2_config *c = lfm2_model_config(f->model);
    struct portion part[N_ROLES] = { 0 };
    lfm2_tensor_info t;

    for (int i = 0; lfm2_model_tensor(f->model, i, &t) == LFM2_OK; i++) {
        const enum role role = role_of_tensor(t.name, norm);
        add_tensor(&part[role], &t, role, c, tied);
        if (role != UNUSED)
            add_tensor(&f->all, &t, role, c, tied);
    }
    member_text(&f->json, "last_norm", norm);
    member_bool(&f->json, "tied", tied);
    add_portion(&f->json, "weights", &f->all);
    member_open(&f->json, "roles", "{");
    for (int i = 0; i < N_ROLES; i++)
        if (part[i].n > 0)
            add_portion(&f->json, role_name[i], &part[i]);
    add_string(&f->json, "}");
}

/* The longest context that there is memory for besides the weights. */
static int largest_context(const struct inspection *f, lfm2_params p, int most,
                           double memory)
{
    int fits = 0, least_not = most + 1;

    while (least_not - fits > 1) {
        p.n_ctx = fits + (least_not - fits) / 2;
        const uint64_t beside = lfm2_context_size(f->model, &p);
        if (beside > 0 && (double)f->all.bytes + (double)beside <= memory)
            fits = p.n_ctx;
        else
            least_not = p.n_ctx;
    }
    return fits;
}

static int by_number(const void *a, const void *b)
{
    return *(const int *)a - *(const int *)b;
}

/* What contexts take that one may ask for; what fits is that of the machine
 * this runs on, now. */
static void add_memory_facts(struct inspection *f)
{
    const lfm2_config *c = lfm2_model_config(f->model);
    const int most = c->n_ctx_train < MAX_CTX ? c->n_ctx_train : MAX_CTX;
    const double memory = free_memory();
    lfm2_params p = choose_params(f->s, f->model);
    const double kv = kv_bytes(c, p.kv_type);
    int ctx[] = { 0, 4096, 32768, most,
                  f->s->ctx == UNSET ? 0 : p.n_ctx < MAX_CTX ? p.n_ctx :
                  MAX_CTX };
    struct text *to = &f->json;
    double conv = 0;

    p.isa = LFM2_ISA_AUTO;                /* it takes no more or less memory */
    for (int il = 0; il < c->n_layer; il++)
        conv += c->is_attn[il] ? 0 : 4.0 * (c->l_cache - 1) * c->n_embd;
    member_open(to, "memory", "{");
    member_text(to, "kv_type", kv_name(p.kv_type));
    member_real(to, "kv_bytes_per_token", kv);
    member_real(to, "conv_state_bytes", conv);
    member_real(to, "free_bytes", memory > 0 ? memory : NAN);
    member_real(to, "largest_context", memory > 0 ?
                largest_context(f, p, most, memory) : NAN);
    member_count(to, "assumed_gb_per_s", ASSUMED_BANDWIDTH);
    member_real(to, "tokens_per_s", f->all.read ? round(ASSUMED_BANDWIDTH *
                1e10 / (double)f->all.read) / 10 : NAN);
    qsort(ctx, 5, sizeof *ctx, by_number);
    member_open(to, "contexts", "[");
    for (int i = 0; i < 5; i++) {
        p.n_ctx = ctx[i];
        if ((i > 0 && ctx[i] == ctx[i - 1]) ||
            (ctx[i] > most && f->s->ctx == UNSET))
            continue;
        member_open(to, NULL, "{");
        member_count(to, "context", (uint64_t)ctx[i]);
        member_real(to, "kv_bytes", kv * ctx[i]);
        member_count(to, "bytes_beside_file", ctx[i] ?
                     lfm2_context_size(f->model, &p) : 0);
        member_real(to, "bytes_per_token", (double)f->all.read + kv * ctx[i]);
        add_string(to, "}");
    }
    add_string(to, "]}");
}

static void add_special(struct inspection *f, const char *role, int32_t id)
{
    struct text *to = &f->json;
    const char *s;
    int len;

    if (id < 0 || id >= lfm2_n_vocab(f->words))
        return;
    s = lfm2_token_bytes(f->words, id, 1, &len);
    member_open(to, NULL, "{");
    member_text(to, "role", role);
    member_count(to, "id", (uint64_t)id);
    member_bytes(to, "piece", s, (size_t)len);
    add_string(to, "}");
}

/* "[65536 x string]" has the length of an array. */
static void add_vocabulary(struct inspection *f)
{
    static const char *const marker[] = {
        TURN_START, "<|tool_list_start|>", CALL_START,
        "<|tool_response_start|>", THINK
    };
    const struct phrase merges = value_of(f->model, "tokenizer.ggml.merges");
    struct text *to = &f->json;
    double pad = -1;

    file_number(f->model, "tokenizer.ggml.padding_token_id", 0, 1 << 30, &pad);
    member_open(to, "vocabulary", "{");
    member_count(to, "n_tokens", (uint64_t)lfm2_n_vocab(f->words));
    member_count(to, "n_merges", merges.s[0] != '[' ? 0 :
                 strtoull(merges.s + 1, NULL, 10));
    member_string(to, "model", f->model, "tokenizer.ggml.model");
    member_string(to, "pre", f->model, "tokenizer.ggml.pre");
    member_open(to, "special", "[");
    if (lfm2_add_bos(f->words))
        add_special(f, "bos", lfm2_bos(f->words));
    for (int32_t id = 0; id < lfm2_n_vocab(f->words); id++)
        if (lfm2_is_eog(f->words, id))
            add_special(f, "end", id);
    for (size_t i = 0; i < sizeof marker / sizeof *marker; i++)
        add_special(f, "marker", lfm2_token_id(f->words, marker[i]));
    add_special(f, "pad", (int32_t)pad);
    add_string(to, "]}");
}

/* How words are written down, and how they are chosen. */
static void add_word_facts(struct inspection *f)
{
    static const char *const how[] = { "none", "hash", "words", "model" };
    const struct preset *p = find_preset(f->model);
    int from_file;
    const struct sampling is = preset_of(f->model, &from_file);
    struct text *to = &f->json;

    f->code = load_words(f->s, f->model, &f->words, &f->err);
    f->template = find_template(f->model, f->words);
    if (f->words)
        add_vocabulary(f);
    member_open(to, "template", "{");
    member_text(to, "name", template_name(f->template.template));
    member_text(to, "by", how[f->template.how]);
    member_text(to, "words", f->template.word);
    member_text(to, "hash", f->template.how == NO_TEMPLATE ? NULL :
                phrase("%016llx", (unsigned long long)f->template.hash).s);
    add_string(to, "}");
    member_open(to, "preset", "{");
    member_text(to, "name", p->name);
    member_bool(to, "from_file", from_file > 0);
    member_real(to, "temperature", is.temp);
    member_count(to, "top_k", (uint64_t)is.top_k);
    member_real(to, "top_p", is.top_p);
    member_real(to, "min_p", is.min_p);
    member_real(to, "repeat_penalty", is.repeat);
    member_real(to, "repeat_last_n", is.last_n);
    add_string(to, "}");
}

/* All that the file says: its keys and its tensors. */
static void add_contents(struct inspection *f)
{
    struct text *to = &f->json;
    lfm2_tensor_info t;
    const char *key;
    char value[128];

    member_open(to, "metadata", "{");
    for (int i = 0; (key = lfm2_model_key(f->model, i, value, sizeof value));
         i++)
        member_text(to, key, value);
    add_string(to, "}");
    member_open(to, "tensors", "[");
    for (int i = 0; lfm2_model_tensor(f->model, i, &t) == LFM2_OK; i++) {
        member_open(to, NULL, "{");
        member_text(to, "name", t.name);
        member_text(to, "type", t.type);
        member_open(to, "shape", "[");
        for (int d = 0; d < t.n_dims; d++)
            member_count(to, NULL, t.dims[d]);
        add_string(to, "]");
        member_count(to, "bytes", t.n_bytes);
        if (t.data)
            member_count(to, "offset", t.offset);
        add_string(to, "}");
    }
    add_string(to, "]");
}

static void add_problem(struct text *to, const char *level, const char *what,
                        const char *is)
{
    struct text message = { 0 };

    add_string(&message, what);
    add_string(&message, is);
    member_open(to, NULL, "{");
    member_text(to, "level", level);
    member_bytes(to, "message", message.s, message.n);
    add_string(to, "}");
    free(message.s);
}

/* The library knows the keys of the model's own architecture; those of its kin
 * are told here. */
static void add_problems(struct inspection *f)
{
    const struct phrase pre = value_of(f->model, "tokenizer.ggml.pre");
    const struct phrase arch = value_of(f->model, "general.architecture");
    const size_t n = strlen(arch.s);
    const char *s;
    struct text *to = &f->json;
    char value[8];

    member_open(to, "anomalies", "[");
    for (int i = 0; (s = lfm2_model_warning(f->model, i)); i++)
        add_problem(to, "tolerated", s, "");
    for (int i = 0; f->is_model &&
         (s = lfm2_model_key(f->model, i, value, sizeof value)); i++)
        if (strncmp(s, "lfm2", 4) == 0 &&
            (strncmp(s, arch.s, n) != 0 || s[n] != '.'))
            add_problem(to, "tolerated", s, ": the key is not used");
    if (f->is_model && pre.s[0] && strcmp(pre.s, "lfm2") != 0)
        add_problem(to, "tolerated", "tokenizer.ggml.pre: ",
                    phrase("\"%.60s\", expected \"lfm2\", as which it is "
                           "taken", pre.s).s);
    if (f->template.how > BY_HASH)
        add_problem(to, "tolerated", "tokenizer.chat_template: none that is "
                    "known, taken as ", template_name(f->template.template));
    if (f->code != LFM2_OK)
        add_problem(to, "fatal", f->err.msg, "");
    add_string(to, "]");
}

/* ---- in text
 *
 * A line for each member, objects of objects and arrays of them as tables. */

static int is_table(const struct json *v)
{
    return v->type >= JSON_ARRAY && v->first && v->first->type == JSON_OBJECT;
}

/* A value in a few words: amounts are rounded, members follow by commas. */
static void add_value_text(struct text *to, const struct json *v)
{
    const struct phrase key = phrase("%.*s", (int)v->n_key, v->key ? v->key :
                                     "");
    const int params = strcmp(key.s, "parameters") == 0 ||
                       strcmp(key.s, "active") == 0;

    if (v->type == JSON_NUMBER && (params || strstr(key.s, "bytes")))
        add_string(to, amount(strtod(v->s, NULL), params ? "" : "B").s);
    else if (v->type == JSON_NUMBER || v->type == JSON_STRING)
        add(to, v->s, v->n);
    else if (v->type < JSON_NUMBER)
        add_string(to, v->type == JSON_NULL ? "-" : json_names[v->type]);
    else
        for (const struct json *x = v->first; x; x = x->next) {
            add(to, x->key, x->n_key);
            add_string(to, x->n_key ? " " : "");
            add_value_text(to, x);
            add_string(to, x->next ? ", " : "");
        }
}

/* Nothing that a file says steers the terminal or begins a line. */
static void end_line(struct text *line)
{
    line->n = drop_controls(line->s, line->n);
    while (line->n > 0 && line->s[line->n - 1] == ' ')
        line->n--;
    for (size_t i = 0; i < line->n; i++)
        putchar(line->s[i] == '\n' || line->s[i] == '\t' ? ' ' : line->s[i]);
    putchar('\n');
    line->n = 0;
}

/* A cell, as wide as the widest of its column so far. */
static void add_cell(struct text *line, const char *s, size_t n, int right,
                     size_t *width)
{
    *width = n > *width ? n : *width;
    add_format(line, "%*s", right ? (int)(*width - n) : 0, "");
    add(line, s, n);
    add_format(line, "%*s  ", right ? 0 : (int)(*width - n), "");
}

static void add_row(struct text *line, const struct json *row, int is_head,
                    int indent, size_t *width)
{
    struct text cell = { 0 };

    line->n = 0;
    add_format(line, "%*s", indent, "");
    if (row->n_key)
        add_cell(line, row->key, is_head ? 0 : row->n_key, 0, width++);
    for (const struct json *x = row->first; x; x = x->next) {
        cell.n = 0;
        if (is_head)
            add(&cell, x->key, x->n_key);
        else
            add_value_text(&cell, x);
        add_cell(line, cell.s, cell.n, x->type == JSON_NUMBER, width++);
    }
    free(cell.s);
}

/* In the second pass the widths are known. */
static void print_rows(const struct json *rows, int indent)
{
    size_t width[MAX_COLUMNS] = { 0 };
    struct text line = { 0 };

    for (int printing = 0; printing < 2; printing++) {
        add_row(&line, rows->first, 1, indent, width);
        if (printing)
            end_line(&line);
        for (const struct json *row = rows->first; row; row = row->next) {
            add_row(&line, row, 0, indent, width);
            if (printing)
                end_line(&line);
        }
    }
    free(line.s);
}

static void print_object(const struct json *v, int indent)
{
    struct text line = { 0 };
    size_t longest = 0;

    for (const struct json *x = v->first; x; x = x->next)
        if (x->n_key > longest && !is_table(x))
            longest = x->n_key;
    for (const struct json *x = v->first; x; x = x->next) {
        const int nested = x->type == JSON_OBJECT && indent == 0;
        add_format(&line, "%*s", indent, "");
        add(&line, x->key, x->n_key);
        if (!nested && !is_table(x)) {
            add_format(&line, "%*s", (int)(longest + 2 - x->n_key), "");
            add_value_text(&line, x);
        }
        end_line(&line);
        if (is_table(x))
            print_rows(x, indent + 2);
        else if (nested)
            print_object(x, 2);
    }
    free(line.s);
}

/* Problems stand last, each in a line of its own.  What has too many members to
 * be read back is shown as it is. */
static void print_report(struct text *json, int as_text)
{
    struct pool pool = { 0 };
    struct json *v, *last, *problem;
    struct text line = { 0 };
    struct why why;

    if (!as_text || json_parse(&pool, json->s, json->n, &v, &why) != DONE) {
        show_text(json);
        return;
    }
    for (last = v->first; last->next->next; last = last->next)
        ;
    problem = last->next->first;
    last->next = NULL;
    print_object(v, 0);
    for (; problem; problem = problem->next) {
        add_value_text(&line, problem->first);
        add_string(&line, ": ");
        add_value_text(&line, problem->first->next);
        end_line(&line);
    }
    free(line.s);
    pool_free(&pool);
}

/* A file that is no model is explained, too, if it can be read at all. */
static int inspect_file(const struct settings *s)
{
    struct inspection f = { .s = s };
    int code = enter_sandbox(s);

    if (code != DONE)
        return code;
    if (!s->no_mmap)
        watch_file(s->model);
    f.code = open_file(&f.model, s->model, s->no_mmap, LFM2_LOAD_ANY,
                       &f.err);
    f.is_model = f.code == LFM2_OK;
    if (!f.model)
        return report(s->model, &f.err);
    add_string(&f.json, "{");
    add_file_facts(&f);
    if (f.is_model) {
        add_size_facts(&f.json, lfm2_model_config(f.model));
        add_weight_facts(&f);
        add_memory_facts(&f);
        add_word_facts(&f);
    }
    if (s->verbose)
        add_contents(&f);
    add_problems(&f);
    add_string(&f.json, "}\n");
    print_report(&f.json, !s->json);
    free(f.json.s);
    lfm2_tokenizer_close(f.words);
    lfm2_model_close(f.model);
    return status_of(f.code);
}

/* -------------------------------------------------------------- 18. Traces
 *
 * What happens between a token and its logits.  The library calls
 * note_activation() with every activation; --trace makes a record of each, and
 * --trace-raw keeps all its numbers.  Whatever ends the program, each record is
 * written at once and whole, and its numbers before it. */

static void add_number(struct text *to, const char *name, double x)
{
    add_string(to, name);
    if (isfinite(x))
        add_format(to, "%.9g", x);
    else
        add_string(to, x != x ? "\"nan\"" : x > 0 ? "\"inf\"" : "\"-inf\"");
}

/* The first and the last numbers, and what all of them come to.  One that is no
 * number is the smallest and the largest. */
static void add_statistics(struct text *to, const float *x, int n)
{
    const int few = n < 4 ? n : 4;
    float min = x[0], max = x[0];
    double sum = 0, squares = 0;

    for (int i = 0; i < few; i++)
        add_number(to, i ? "," : ",\"first\":[", (double)x[i]);
    for (int i = n - few; i < n; i++)
        add_number(to, i > n - few ? "," : "],\"last\":[", (double)x[i]);
    for (int i = 0; i < n; i++) {
        min = x[i] < min || x[i] != x[i] ? x[i] : min;
        max = x[i] > max || x[i] != x[i] ? x[i] : max;
        sum += (double)x[i];
        squares += (double)x[i] * (double)x[i];
    }
    add_number(to, "],\"min\":", (double)min);
    add_number(to, ",\"max\":", (double)max);
    add_number(to, ",\"mean\":", sum / n);
    add_number(to, ",\"l2\":", sqrt(squares));
    add_format(to, ",\"hash\":\"%016llx\"",
               (unsigned long long)hash_floats(HASH_START, x, n));
}

static void write_trace(struct trace *t, int fd, const char *path,
                        const struct text *what)
{
    if (t->code == DONE && write_all(fd, what->s, what->n) != 0)
        t->code = say(BAD_FILE, "%s: %s", path, strerror(errno));
}

static void note_activation(void *user, const lfm2_activation *a)
{
    struct trace *t = user;
    int wanted = t->s->trace_filter.n == 0;

    for (int i = 0; i < t->s->trace_filter.n; i++)
        wanted |= fnmatch(t->s->trace_filter.v[i], a->name, 0) == 0;
    if (!wanted || a->pos < t->first || a->pos > t->last || t->code != DONE)
        return;
    t->has_some = 1;
    t->line.n = t->bytes.n = 0;
    add_format(&t->line, "{\"name\":\"%s\",\"pos\":%d", a->name, a->pos);
    if (strcmp(a->name, "model.embed_tokens") == 0)
        add_format(&t->line, ",\"token\":%ld", (long)a->token);
    add_format(&t->line, ",\"shape\":[%d]", a->n);
    add_statistics(&t->line, a->x, a->n);
    if (t->raw >= 0) {
        for (int i = 0; i < a->n; i++)
            add_le(&t->bytes, float_bits(a->x[i]), 4);
        add_format(&t->line, ",\"offset\":%llu", (unsigned long long)t->offset);
        t->offset += t->bytes.n;
        write_trace(t, t->raw, t->s->trace_raw, &t->bytes);
    }
    add_string(&t->line, "}\n");
    write_trace(t, t->records, t->s->trace, &t->line);
}

/* A descriptor, or -1 after saying why there is none. */
static int create_trace(const char *path)
{
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);

    if (fd < 0)
        say(BAD_FILE, "%s: %s", path, strerror(errno));
    return fd;
}

static void write_head(struct trace *t, const struct engine *e)
{
    const lfm2_config *c = lfm2_model_config(e->model);
    size_t n = 0;
    const char *arch = lfm2_model_string(e->model, "general.architecture", &n);

    add_format(&t->line, "{\"trace\":1,\"program\":\"lfm2.c %s\",\"arch\":"
               "\"%.*s\",\"model_hash\":\"%016llx\",", lfm2_version(), (int)n,
               arch ? arch : "", (unsigned long long)lfm2_model_hash(e->model));
    add_format(&t->line, "\"n_layer\":%d,\"n_embd\":%d,\"n_vocab\":%d,\"kv\":"
               "\"%s\"}\n", c->n_layer, c->n_embd, c->n_vocab,
               kv_name(e->par.kv_type));
    write_trace(t, t->records, t->s->trace, &t->line);
}

static int open_trace(struct engine *e)
{
    const struct settings *s = e->s;
    struct trace *t;
    lfm2_error err;

    if (!s->trace)
        return DONE;
    t = e->trace = zeroed(1, sizeof *t);
    *t = (struct trace){ .s = s, .last = INT_MAX, .raw = -1 };
    if (s->trace_tokens)
        parse_range(s->trace_tokens, &t->first, &t->last);
    t->records = create_trace(s->trace);
    if (t->records >= 0 && s->trace_raw)
        t->raw = create_trace(s->trace_raw);
    if (t->records < 0 || (s->trace_raw && t->raw < 0))
        return t->code = BAD_FILE;
    write_head(t, e);
    if (t->code == DONE &&
        lfm2_trace(e->ctx, note_activation, t, &err) != LFM2_OK)
        t->code = report(s->model, &err);
    return t->code;
}

/* What was to be written is there, or `code` and a message say why not. */
static int close_trace(struct engine *e, int code)
{
    struct trace *t = e->trace;

    if (!t)
        return code;
    lfm2_trace(e->ctx, NULL, NULL, NULL);
    code = code == DONE ? t->code : code;
    if (code == DONE && !t->has_some)
        note("%s: no module of such a name at such a position", t->s->trace);
    if (t->raw >= 0 && close(t->raw) != 0 && code == DONE)
        code = say(BAD_FILE, "%s: %s", t->s->trace_raw, strerror(errno));
    if (t->records >= 0 && close(t->records) != 0 && code == DONE)
        code = say(BAD_FILE, "%s: %s", t->s->trace, strerror(errno));
    free(t->line.s);
    free(t->bytes.s);
    free(t);
    e->trace = NULL;
    return code;
}

/* ---------------------------------------------------------------- 19. --ppl
 *
 * How well a model foresees a text, measured as llama-perplexity does, so that
 * the figures can be compared.  The text is cut into windows of n_ctx tokens,
 * each read from nothing, with BOS in place of its first token if the model
 * begins with one.  Only the second half of a window is scored, where there is
 * something to go by: positions n_ctx / 2 to n_ctx - 2, each by the token after
 * it.  The perplexity is e to the power of the mean surprise.
 *
 * What other weights or another format change is found by
 * scripts/compare_logits.py, from two files of --logits. */

enum { PPL_CTX = 512, PPL_LOGITS = 1 << 27 };         /* bytes held at once  */

/* Sums over samples: of x, and of x * x. */
struct sums { double x, xx; };

struct estimate { double mean, error; };  /* with its standard error         */

struct ppl {
    struct engine e;
    struct ids ids;                       /* the windows, one by one         */
    int n_ctx, n_windows;
    int n_rows;                           /* scored in a window              */
    int n_piece, n_seq;                   /* rows asked for at once in each
                                             of so many windows              */
    struct sums nll;
    int n_scored;
    double start;                         /* when it began                   */
};

static void add_to(struct sums *s, double x)
{
    s->x += x;
    s->xx += x * x;
}

static struct estimate mean_and_error(struct sums s, int n)
{
    const double mean = s.x / n, variance = s.xx / n - mean * mean;

    return (struct estimate){
        mean, n > 1 && variance > 0 ? sqrt(variance / (n - 1)) : 0
    };
}

/* The tokens of the text, in windows; what is left over is not used. */
static int ppl_read(struct ppl *p)
{
    const int32_t bos = lfm2_add_bos(p->e.words) ? lfm2_bos(p->e.words) : -1;
    struct ids *ids = &p->ids;
    struct text t = { 0 };
    int code = read_file(p->e.s->ppl, &t);

    if (code == DONE && t.n > 0 && t.s[t.n - 1] == '\n')
        t.n--;
    if (code == DONE)
        code = encode_plain(p->e.s, p->e.words, t.s, t.n, ids);
    free(t.s);
    if (code != DONE)
        return code;
    if (p->n_ctx < 3)
        return say(USAGE, "-c %d: expected windows of at least 3 tokens",
                   p->n_ctx);
    if (ids->n / 2 < p->n_ctx)
        return say(USAGE, "%s: %d tokens, expected at least %d, two windows; "
                   "-c N makes them shorter", p->e.s->ppl, ids->n,
                   2 * p->n_ctx);
    p->n_windows = ids->n / p->n_ctx;
    p->n_rows = p->n_ctx - 1 - p->n_ctx / 2;
    for (int i = 0; bos >= 0 && i < p->n_windows; i++)
        ids->id[(size_t)i * (size_t)p->n_ctx] = bos;
    return DONE;
}

/* A window whose rows are too many is read in pieces; short windows are read
 * several at once, so that the weights are not read for a few tokens only. */
static int ppl_open(struct ppl *p)
{
    int code = open_model(&p->e), most;
    lfm2_params *par = &p->e.par;

    if (code == DONE)
        code = open_model_words(&p->e);
    if (code != DONE)
        return code;
    p->n_ctx = p->e.s->ctx == UNSET ? PPL_CTX : par->n_ctx;
    code = ppl_read(p);
    if (code != DONE)
        return code;
    most = PPL_LOGITS / 4 / lfm2_model_config(p->e.model)->n_vocab;
    p->n_piece = p->n_rows < most ? p->n_rows : most > 0 ? most : 1;
    p->n_seq = 1;
    while (p->n_seq < p->n_windows && p->n_seq < most / p->n_rows &&
           p->n_seq < par->n_batch / p->n_ctx)
        p->n_seq++;
    par->n_ctx = p->n_ctx;
    par->n_seq = p->n_seq;
    par->n_logits = p->n_seq * p->n_piece;
    return open_context(&p->e);
}

/* So far, and how long still. */
static void ppl_progress(const struct ppl *p, int n_done)
{
    const double perplexity = exp(p->nll.x / p->n_scored);
    const double took = seconds() - p->start;

    if (p->e.s->verbose)
        note("window %d of %d: perplexity %.4f, %.0f s", n_done, p->n_windows,
             perplexity, took);
    else if (isatty(STDERR_FILENO) && !p->e.s->quiet)
        fprintf(stderr, "\rwindow %d of %d, perplexity %.4f, %.0f s to go   %s",
                n_done, p->n_windows, perplexity, took / n_done *
                (p->n_windows - n_done), n_done < p->n_windows ? "" : "\n");
}

/* Positions `from` to `to` of n windows, from the first; the last n_rows of
 * them are scored, each by the token that came next. */
static int ppl_piece(struct ppl *p, int first, int n, int from, int to,
                     int n_rows)
{
    const int n_vocab = lfm2_model_config(p->e.model)->n_vocab;
    const int32_t *token = p->ids.id + (size_t)first * (size_t)p->n_ctx;
    int code;

    for (int i = 0; i < n; i++)
        p->e.span[i] = (lfm2_span){
            i, token + (size_t)i * (size_t)p->n_ctx + from, to - from, n_rows
        };
    code = interrupted ? INTERRUPTED : forward(&p->e, p->e.span, n);
    for (int i = 0; code == DONE && i < n; i++) {
        const int32_t *next = p->e.span[i].tokens + (to - from) - n_rows + 1;
        for (int k = 0; k < n_rows; k++) {
            const float *logits = lfm2_logits(p->e.ctx, i, k);
            const double nll = log_sum(logits, n_vocab) - logits[next[k]];
            if (!isfinite(nll))
                return say(FAILED, "%s: logits that are not finite",
                           p->e.s->model);
            add_to(&p->nll, nll);
            p->n_scored++;
        }
        if (to == p->n_ctx - 1)
            ppl_progress(p, first + i + 1);
    }
    return code;
}

/* The last token of a window foretells nothing that is scored, so it is not
 * read at all. */
static int ppl_run(struct ppl *p)
{
    const int end = p->n_ctx - 1;
    int code = DONE, n;

    p->start = seconds();
    for (int first = 0; code == DONE && first < p->n_windows; first += n) {
        n = p->n_windows - first < p->n_seq ? p->n_windows - first : p->n_seq;
        for (int from = 0, to; code == DONE && from < end; from = to) {
            const int scored = from ? from : p->n_ctx / 2;
            to = end - scored < p->n_piece ? end : scored + p->n_piece;
            code = ppl_piece(p, first, n, from, to, to - scored);
        }
        for (int i = 0; i < n; i++)
            lfm2_seq_trim(p->e.ctx, i, 0);
    }
    return code;
}

static void ppl_print(const struct ppl *p)
{
    const struct estimate e = mean_and_error(p->nll, p->n_scored);
    const double ppl = exp(e.mean);

    if (p->e.s->json)
        printf("{\"perplexity\": %.9g, \"error\": %.9g, \"scored\": %d, "
               "\"windows\": %d, \"n_ctx\": %d}\n", ppl, ppl * e.error,
               p->n_scored, p->n_windows, p->n_ctx);
    else
        printf("perplexity     %.4f +/- %.5f\nscored         %d tokens in %d "
               "windows of %d\n", ppl, ppl * e.error, p->n_scored,
               p->n_windows, p->n_ctx);
}

static int perplexity(const struct settings *s)
{
    struct settings plain = *s;
    struct ppl p = { .e.s = &plain };
    int code;

    if (s->prompt || s->file || s->ids || s->system)
        return usage("--ppl FILE takes no other text");
    plain.raw = 1;                        /* no chat template                */
    code = ppl_open(&p);
    if (code == DONE) {
        running = p.e.ctx;
        catch_interrupt();
        code = ppl_run(&p);
        running = NULL;
    }
    if (code == DONE)
        ppl_print(&p);
    free(p.ids.id);
    close_engine(&p.e);
    return code;
}

/* -------------------------------------------------------------- 20. --bench
 *
 * The tests, names and table of llama-bench, and beside every figure how much
 * of the machine it makes use of.  Generating reads all weights for each token,
 * so memory sets its limit; reading a prompt multiplies each weight with many
 * tokens, so arithmetic does.  Both limits are measured in the same run. */

enum { START_TOKENS = 8 };                /* of the prompt that starts it    */
enum { MAX_TESTS = MAX_LIST * (MAX_LIST + 1) };       /* at one depth        */

struct test { int n_prompt, n_gen, n_seq, depth; };

/* A second: bytes from memory, multiply-adds, and bytes that a kernel makes of
 * weights in the second-level cache, of each thread. */
struct limits { int n_threads; double read, dot, cached; };

struct bench {
    const struct settings *s;
    struct engine e;                      /* e.par: of its context, in force */
    FILE *status;                         /* of this process, where told     */
    struct cost cost;
    struct limits best[MAX_LIST], *limit; /* of each number of threads       */
    struct phrase type;                   /* "lfm2 1.2B Q4_0"                */
    double load_s, context_s, first_s;    /* first: all, from the start      */
    double rss_anon;                      /* the most there ever was         */
    double most_share;                    /* of a limit                      */
    struct test test[MAX_TESTS];          /* of each depth                   */
    int n_tests, n_done;
    int longest, n_seq;                   /* the most tokens, sequences      */
    int32_t *token;                       /* [n_tokens]: of all at any depth */
    int n_tokens;
    double *ns, *ts;                      /* [s->reps] of the last test      */
};

/* ---- the work */

/* Append the tokens from `from` to `to` to a sequence. */
static int feed(struct bench *b, int seq, int from, int to, int n_logits)
{
    const lfm2_span span = { seq, b->token + from, to - from, n_logits };

    if (interrupted)
        return INTERRUPTED;
    return from < to ? forward(&b->e, &span, 1) : DONE;
}

/* All sequences of the test have `depth` tokens.  Trimming leaves most of what
 * the test before had, so that only its end is computed again. */
static int prepare(struct bench *b, const struct test *t)
{
    lfm2_context *ctx = b->e.ctx;
    int code = feed(b, 0, lfm2_seq_trim(ctx, 0, t->depth), t->depth, 0);
    lfm2_error err;

    for (int i = 1; code == DONE && i < t->n_seq; i++)
        if (t->depth == 0)
            lfm2_seq_trim(ctx, i, 0);
        else if (lfm2_seq_copy(ctx, i, 0, &err) != LFM2_OK)
            code = report(b->s->model, &err);
    return code;
}

/* Which tokens are generated does not matter, so none is chosen. */
static int run_once(struct bench *b, const struct test *t, int n_gen,
                    double *took)
{
    const int32_t *token = b->token + t->depth + t->n_prompt;
    int code = prepare(b, t);
    const double start = seconds();

    if (code == DONE)
        code = feed(b, 0, t->depth, t->depth + t->n_prompt, t->n_prompt > 0);
    for (int i = 0; code == DONE && i < n_gen; i++) {
        for (int k = 0; k < t->n_seq; k++)
            b->e.span[k] = (lfm2_span){ k, token + i, 1, 1 };
        code = interrupted ? INTERRUPTED : forward(&b->e, b->e.span, t->n_seq);
    }
    *took = seconds() - start;
    return code;
}

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
            work += (double)lfm2_exercise(b->e.ctx, what);
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

/* ---- names */

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
    double number;

    if (file_number(m, "general.file_type", 0, 1000, &number))
        for (size_t i = 0; i < sizeof mix / sizeof *mix; i++)
            if (mix[i].number == (int)number)
                return mix[i].name;
    return "unknown mix";
}

/* "lfm2 1.2B Q4_0", "lfm2moe 24B.A2B Q4_0". */
static struct phrase name_type(const lfm2_model *m)
{
    uint64_t total, active;
    struct phrase size, used = phrase("%s", "");

    lfm2_model_params(m, &total, &active);
    const double n = (double)total;
    if (n < 995e6)
        size = phrase("%.0fM", n >= 1e8 ? 10 * round(n / 1e7) : n / 1e6);
    else
        size = phrase("%.*fB", active < total ? 0 : 1, n / 1e9);
    if (active < total && active >= 1000000000)
        used = phrase(".A%dB", (int)(active / 1000000000));
    return phrase("lfm2%s %s%s %s", active < total ? "moe" : "", size.s, used.s,
                  mix_name(m));
}

/* "tg128 x 8 @ d1024" */
static struct phrase name_test(const struct test *t)
{
    struct phrase out = phrase(t->n_prompt ? "pp%d" : "tg%d", t->n_prompt +
                               t->n_gen);

    if (t->n_seq > 1)
        out = phrase("%.30s x %d", out.s, t->n_seq);
    return t->depth ? phrase("%.60s @ d%d", out.s, t->depth) : out;
}

/* "694.76 MiB", as llama-bench has it. */
static struct phrase binary_amount(double bytes)
{
    const int giga = bytes >= 1 << 30;

    return phrase("%.2f %s", bytes / (giga ? 1 << 30 : 1 << 20), giga ? "GiB" :
                  "MiB");
}

/* ---- what is printed */

/* One thing that is told of a test: a word, a number or all samples; as a
 * member of a record, as a column of the table, or both. */
struct field {
    const char *name, *column;
    int width;                            /* of the column, - : to the left  */
    const char *text;
    double number;                        /* NAN: it could not be measured   */
    int digits;
    const double *samples;
    struct phrase cell;                   /* unless empty, in the table      */
};

static void print_record(const struct bench *b, const struct field *f, int n)
{
    struct text t = { 0 };

    add_string(&t, b->n_done > 0 ? ",\n  {\n" : "[\n  {\n");
    for (int i = 0, some = 0; i < n; i++) {
        if (!f[i].name)
            continue;
        add_format(&t, "%s    \"%s\": ", some++ ? ",\n" : "", f[i].name);
        if (f[i].text)
            add_json_string(&t, f[i].text, strlen(f[i].text));
        else if (!f[i].samples)
            add_format(&t, isnan(f[i].number) ? "null" : "%.*f", f[i].digits,
                       f[i].number);
        for (int k = 0; f[i].samples && k < b->s->reps; k++)
            add_format(&t, "%s%.*f", k ? ", " : "[ ", f[i].digits,
                       f[i].samples[k]);
        add_string(&t, f[i].samples ? " ]" : "");
    }
    add_string(&t, "\n  }");
    fwrite(t.s, 1, t.n, stdout);
    free(t.s);
}

static void print_row(const struct bench *b, const struct field *f, int n)
{
    static const char dashes[] = "--------------------------------";

    for (int line = b->n_done > 0 ? 2 : 0; line < 3; line++) {
        for (int i = 0; i < n; i++) {
            const int left = f[i].width < 0, w = abs(f[i].width);
            if (!f[i].column)
                continue;
            if (line == 0)
                printf("| %*s ", f[i].width, f[i].column);
            else if (line == 1)
                printf("| %.*s%s ", w - !left, dashes, left ? "" : ":");
            else
                printf("| %*s ", f[i].width, f[i].text ? f[i].text :
                       f[i].cell.s[0] ? f[i].cell.s : isnan(f[i].number) ? "-" :
                       phrase("%.*f", f[i].digits, f[i].number).s);
        }
        printf("|\n");
    }
}

/* What could not be measured is not 0. */
static double known(double x)
{
    return x > 0 && isfinite(x) ? x : NAN;
}

/* llama-bench's columns, then ours.  A prompt is held against arithmetic, an
 * answer against memory. */
static int print_test(struct bench *b, const struct test *t, struct estimate ns,
                      struct estimate ts, const char *when)
{
    const lfm2_params *p = &b->e.par;
    const struct limits *best = b->limit;
    const char *kv = kv_name(p->kv_type);
    const struct phrase name = name_test(t), cpu = look_up("/proc/cpuinfo",
                                                           "model name", "?");
    const double gen = t->n_gen, read = gen > 0 ? ts.mean / t->n_seq *
        step_bytes(b->e.model, &b->cost, t->n_seq, t->depth + gen / 2) : 0;
    const double macs = ts.mean * (b->cost.macs + (gen > 0 ? b->cost.head : 0));
    const double share = known(gen > 0 ? read / best->read : macs / best->dot);
    const double rss = anonymous_memory();
    const struct field f[] = {
        { "build_commit", .text = "" }, { "build_number" },
        { "cpu_info", .text = cpu.s },
        { "model_filename", .text = b->s->model },
        { "model_type", "model", -30, b->type.s },
        { "model_size", "size", 10, NULL, b->cost.bytes,
          .cell = binary_amount(b->cost.bytes) },
        { "model_n_params", "params", 10, NULL, b->cost.params,
          .cell = amount(b->cost.params, "") },
        { "backends", "backend", -7, "CPU" },
        { "n_batch", .number = p->n_batch },
        { "n_threads", "threads", 7, .number = p->n_threads },
        { "type_k", .text = kv }, { "type_v", .text = kv },
        { "n_prompt", .number = t->n_prompt }, { "n_gen", .number = gen },
        { "n_depth", .number = t->depth }, { "test_time", .text = when },
        { "avg_ns", .number = ns.mean }, { "stddev_ns", .number = ns.error },
        { "avg_ts", .number = ts.mean, .digits = 6 },
        { "stddev_ts", .number = ts.error, .digits = 6 },
        { "samples_ns", .samples = b->ns },
        { "samples_ts", .samples = b->ts, .digits = 6 },
        { NULL, "test", 15, name.s },
        { NULL, "t/s", 17, .cell = phrase("%.2f ± %.2f", ts.mean, ts.error) },
        { "n_sequences", .number = t->n_seq },
        { "isa", .text = isa_name(p->isa) },
        { "read_bandwidth", .number = known(best->read / 1e9), .digits = 3 },
        { "int8_rate", .number = known(best->dot / 1e9), .digits = 3 },
        { "l2_gbs_core", .number = known(best->cached / 1e9), .digits = 3 },
        { "gb_per_s", "GB/s", 6, NULL, known(read / 1e9), 1 },
        { "gmac_per_s", "GMAC/s", 7, NULL, known(macs / 1e9), 1 },
        { "share", "share", 6, NULL, share, 4, .cell = phrase(isnan(share) ?
          "-" : "%.0f %%", 100 * share) },
        { "rss_peak", .number = peak_memory() },
        { "rss_anon", .number = known(rss) },
        { "load_ms", .number = b->load_s * 1e3, .digits = 3 },
        { "context_ms", .number = b->context_s * 1e3, .digits = 3 },
        { "first_token_ms", .number = b->first_s * 1e3, .digits = 3 }
    };

    (b->s->output == MD ? print_row : print_record)(b, f, sizeof f / sizeof *f);
    b->most_share = fmax(b->most_share, share);
    b->rss_anon = fmax(b->rss_anon, rss);
    b->n_done++;
    return flush_output(DONE);
}

static void print_footer(const struct bench *b)
{
    const struct phrase cpu = look_up("/proc/cpuinfo", "model name", "unknown");
    const lfm2_params *p = &b->e.par;

    printf("\nmachine   %s, %d usable CPUs\nkernels   %s, KV in %s, batch %d\n",
           cpu.s, usable_cpus(), isa_name(p->isa), kv_name(p->kv_type),
           p->n_batch);
    for (const struct limits *l = b->best; l <= b->limit; l++)
        printf("limits    %d threads read %.1f GB/s; with cached weights %.0f "
               "GMAC/s, or %.1f GB/s a core\n", l->n_threads, l->read / 1e9,
               l->dot / 1e9, l->cached / 1e9);
    printf("share     of the bandwidth by answers, of the arithmetic by prompts"
           "%s\n", b->most_share > 1 ? "; above 100 %:\n          what stays "
           "in the caches of the CPU comes faster than from memory" : "");
    printf("start     model %.1f ms, context %.1f ms; first token of 8 after "
           "%.1f ms\n", b->load_s * 1e3, b->context_s * 1e3, b->first_s * 1e3);
    printf("memory    %s resident at most, %s of it anonymous\n",
           binary_amount(peak_memory()).s, b->rss_anon > 0 ?
           binary_amount(b->rss_anon).s : "n/a");
}

/* ---- the run */

static struct estimate mean_and_deviation(const double *x, int n)
{
    struct sums sum = { 0, 0 };
    struct estimate out;

    for (int i = 0; i < n; i++)
        add_to(&sum, x[i]);
    out = mean_and_error(sum, n);
    out.error *= sqrt(n);
    return out;
}

/* The warm-up generates but one token, as llama-bench's does. */
static int run_test(struct bench *b, const struct test *t)
{
    const double n = (double)t->n_prompt + (double)t->n_gen * t->n_seq;
    const int reps = b->s->reps;
    const time_t now = time(NULL);
    char when[24] = "";
    struct tm utc;
    double took;
    int code = run_once(b, t, t->n_gen > 0, &took);

    for (int i = 0; code == DONE && i < reps; i++) {
        code = run_once(b, t, t->n_gen, &took);
        b->ns[i] = took * 1e9;
        b->ts[i] = n / (took + 1e-9);
    }
    if (code != DONE)
        return code;
    if (gmtime_r(&now, &utc))
        strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &utc);
    return print_test(b, t, mean_and_deviation(b->ns, reps),
                      mean_and_deviation(b->ts, reps), when);
}

static int open_bench_context(struct bench *b, const lfm2_params *p)
{
    lfm2_error err;

    if (lfm2_context_open(&b->e.ctx, b->e.model, p, &err) != LFM2_OK)
        return report(b->s->model, &err);
    running = b->e.ctx;
    b->e.par = lfm2_context_params(b->e.ctx);
    return DONE;
}

static void close_bench_context(struct bench *b)
{
    running = NULL;
    lfm2_context_close(b->e.ctx);
    b->e.ctx = NULL;
}

/* From nothing to the first token, before anything else has warmed the way.
 * Any tokens will do, if they are not always the same few: those of a mixture
 * choose its experts. */
static int measure_start(struct bench *b)
{
    const double start = seconds();
    lfm2_params p;
    int code = open_model(&b->e);

    if (code != DONE)
        return code;
    b->load_s = seconds() - start;
    for (int i = 0; i < b->n_tokens; i++)
        b->token[i] = (int32_t)((uint32_t)i * 2654435761u % (uint32_t)
                                lfm2_model_config(b->e.model)->n_vocab);
    p = b->e.par;
    p.n_threads = b->s->bench_threads.v[0] ? b->s->bench_threads.v[0] :
                  usable_cpus();
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
static int run_tests(struct bench *b, int n_threads, int depth)
{
    lfm2_params p = choose_params(b->s, b->e.model);
    int code;

    p.n_threads = n_threads ? n_threads : usable_cpus();
    p.n_ctx = depth + b->longest;
    p.n_seq = p.n_logits = b->n_seq;
    code = open_bench_context(b, &p);
    if (code == DONE && b->limit->n_threads == 0)
        *b->limit = (struct limits){
            b->e.par.n_threads, measure_rate(b, LFM2_READ),
            measure_rate(b, LFM2_DOT),
            measure_rate(b, LFM2_DECODE) / b->e.par.n_threads
        };
    for (int i = 0; code == DONE && i < b->n_tests; i++) {
        b->test[i].depth = depth;
        code = interrupted ? INTERRUPTED : run_test(b, &b->test[i]);
    }
    close_bench_context(b);
    return code;
}

static void add_test(struct bench *b, int n_prompt, int n_gen, int n_seq)
{
    const int n = n_prompt + n_gen;

    if (n == 0)
        return;
    b->test[b->n_tests++] = (struct test){ n_prompt, n_gen, n_seq, 0 };
    b->longest = n > b->longest ? n : b->longest;
    b->n_seq = n_seq > b->n_seq ? n_seq : b->n_seq;
}

/* llama-bench's order.  All there will be to remember is there before any clock
 * runs. */
static int list_tests(struct bench *b)
{
    const struct settings *s = b->s;
    int deepest = 0;

    for (int i = 0; i < s->bench_prompt.n; i++)
        add_test(b, s->bench_prompt.v[i], 0, 1);
    for (int i = 0; i < s->bench_gen.n; i++)
        for (int k = 0; k < s->bench_seqs.n; k++)
            add_test(b, 0, s->bench_gen.v[i], s->bench_seqs.v[k]);
    for (int i = 0; i < s->bench_depth.n; i++)
        if (s->bench_depth.v[i] > deepest)
            deepest = s->bench_depth.v[i];
    if (b->n_tests == 0)
        return usage("nothing to measure: no -p or -n above 0");
    if (b->longest > MAX_CTX - deepest)
        return usage("a test of %d tokens at a depth of %d is longer than any "
                     "context, %d", b->longest, deepest, MAX_CTX);
    b->n_tokens = b->longest + deepest + START_TOKENS;
    b->token = zeroed((size_t)b->n_tokens, sizeof *b->token);
    b->ns = zeroed((size_t)s->reps, sizeof *b->ns);
    b->ts = zeroed((size_t)s->reps, sizeof *b->ts);
    b->e.span = zeroed((size_t)b->n_seq, sizeof *b->e.span);
    return DONE;
}

static int run_all(struct bench *b)
{
    const struct settings *s = b->s;
    int code = measure_start(b);

    if (code != DONE)
        return code;
    b->cost = count_cost(b->e.model, s->kv);
    b->type = name_type(b->e.model);
    for (int i = 0; code == DONE && i < s->bench_threads.n; i++) {
        b->limit = &b->best[i];
        for (int k = 0; code == DONE && k < s->bench_depth.n; k++)
            code = run_tests(b, s->bench_threads.v[i], s->bench_depth.v[k]);
    }
    return code;
}

/* What is printed so far is complete, even after Ctrl-C. */
static int bench(const struct settings *s)
{
    struct bench b = { .s = s, .e.s = s };
    int code = list_tests(&b);

    if (code == DONE) {
        b.status = fopen("/proc/self/status", "r");
        catch_interrupt();
        code = run_all(&b);
        if (s->output == MD && code == DONE)
            print_footer(&b);
        if (s->output == JSON && (b.n_done > 0 || code == INTERRUPTED))
            printf(b.n_done > 0 ? "\n]\n" : "[]\n");
    }
    close_engine(&b.e);
    if (b.status)
        fclose(b.status);
    free(b.token);
    free(b.ns);
    free(b.ts);
    return code;
}

/* ----------------------------------------------------------- 21. --selftest
 *
 * Is this build right on this machine?  No file is needed: a small model of
 * every weight type is made here, of random numbers that are the same
 * everywhere, and so are its logits: to the bit, or something is wrong.  What
 * differs only between kernels is found by running each of them. */

enum { SELF_TOKENS = 24, SELF_LONG = 260, SELF_EMBD = 256, SELF_HEAD = 64,
       SELF_EXPERTS = 4, SELF_VOCAB = 256 + 7 };

enum { G_U32 = 4, G_I32 = 5, G_F32 = 6, G_STRING = 8, G_ARRAY = 9 };

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* The weight types: GGUF's number, bytes and columns of a block, and where in
 * it half-precision scales lie, which must not be random bits. */
static const struct self_type {
    const char *name;
    int id, bytes, cols, scale[2];
    uint64_t hash;                        /* of the logits                   */
} self_types[] = {
    { "F32", 0, 4, 1, { -1, -1 }, 0xb5fe7d964c5d415eu },
    { "F16", 1, 2, 1, { -1, -1 }, 0x34e46c18595c0466u },
    { "BF16", 30, 2, 1, { -1, -1 }, 0xbedf6cbe5b5203abu },
    { "Q4_0", 2, 18, 32, { 0, -1 }, 0xf0d09a1d26c61f4eu },
    { "Q4_1", 3, 20, 32, { 0, 2 }, 0x105572393c1b123au },
    { "Q5_0", 6, 22, 32, { 0, -1 }, 0x971d8a43b2546d20u },
    { "Q5_1", 7, 24, 32, { 0, 2 }, 0x89f9e622abfc607fu },
    { "Q8_0", 8, 34, 32, { 0, -1 }, 0xd5ffa9616c6c2595u },
    { "Q2_K", 10, 84, 256, { 80, 82 }, 0xf4eecaa9a5646588u },
    { "Q3_K", 11, 110, 256, { 108, -1 }, 0x9fca609f82d4ec53u },
    { "Q4_K", 12, 144, 256, { 0, 2 }, 0xf91c7081c16f46d7u },
    { "Q5_K", 13, 176, 256, { 0, 2 }, 0x3fbcc6585a9da5c9u },
    { "Q6_K", 14, 210, 256, { 208, -1 }, 0x3fa4db53b371ee98u },
    { "IQ4_NL", 20, 18, 32, { 0, -1 }, 0x7ec769dfa99dcef8u },
    { "IQ4_XS", 23, 136, 256, { 0, -1 }, 0x83b254a4c39ab7deu },
};

enum { N_SELF_TYPES = sizeof self_types / sizeof *self_types };

/* The layers: conv and dense, attention and dense, and both with experts.  Of
 * each the bit, or ONCE before all layers; the tensors are [experts][rows]
 * [cols], a vector has no rows, a matrix no experts. */
enum { ONCE = 0, CONV = 5, ATTN = 10, DENSE = 3, MOE = 12, EVERY = 15 };

static const struct self_tensor {
    int layers;
    const char *name;
    int is_plain, experts, rows, cols;    /* plain: F32 in every model       */
} self_tensors[] = {
    { ONCE, "token_embd.weight", 0, 0, SELF_VOCAB, SELF_EMBD },
    { ONCE, "token_embd_norm.weight", 1, 0, 0, SELF_EMBD },
    { EVERY, "attn_norm.weight", 1, 0, 0, SELF_EMBD },
    { EVERY, "ffn_norm.weight", 1, 0, 0, SELF_EMBD },
    { CONV, "shortconv.in_proj.weight", 0, 0, 3 * SELF_EMBD, SELF_EMBD },
    { CONV, "shortconv.conv.weight", 1, 0, SELF_EMBD, 3 },
    { CONV, "shortconv.out_proj.weight", 0, 0, SELF_EMBD, SELF_EMBD },
    { ATTN, "attn_q.weight", 0, 0, SELF_EMBD, SELF_EMBD },
    { ATTN, "attn_k.weight", 0, 0, SELF_EMBD / 2, SELF_EMBD },
    { ATTN, "attn_v.weight", 0, 0, SELF_EMBD / 2, SELF_EMBD },
    { ATTN, "attn_output.weight", 0, 0, SELF_EMBD, SELF_EMBD },
    { ATTN, "attn_q_norm.weight", 1, 0, 0, SELF_HEAD },
    { ATTN, "attn_k_norm.weight", 1, 0, 0, SELF_HEAD },
    { MOE, "ffn_gate_inp.weight", 1, 0, SELF_EXPERTS, SELF_EMBD },
    { MOE, "exp_probs_b.bias", 1, 0, 0, SELF_EXPERTS },
    { DENSE, "ffn_gate.weight", 0, 0, SELF_EMBD, SELF_EMBD },
    { DENSE, "ffn_up.weight", 0, 0, SELF_EMBD, SELF_EMBD },
    { DENSE, "ffn_down.weight", 0, 0, SELF_EMBD, SELF_EMBD },
    { MOE, "ffn_gate_exps.weight", 0, SELF_EXPERTS, SELF_EMBD, SELF_EMBD },
    { MOE, "ffn_up_exps.weight", 0, SELF_EXPERTS, SELF_EMBD, SELF_EMBD },
    { MOE, "ffn_down_exps.weight", 0, SELF_EXPERTS, SELF_EMBD, SELF_EMBD },
};

static const struct { const char *key; int type; uint32_t bits; }
self_numbers[] = {
    { "lfm2moe.block_count", G_U32, 4 },
    { "lfm2moe.context_length", G_U32, 128 },
    { "lfm2moe.embedding_length", G_U32, SELF_EMBD },
    { "lfm2moe.feed_forward_length", G_U32, SELF_EMBD },
    { "lfm2moe.attention.head_count", G_U32, SELF_EMBD / SELF_HEAD },
    { "lfm2moe.vocab_size", G_U32, SELF_VOCAB },
    { "lfm2moe.shortconv.l_cache", G_U32, 3 },
    { "lfm2moe.leading_dense_block_count", G_U32, 2 },
    { "lfm2moe.expert_count", G_U32, SELF_EXPERTS },
    { "lfm2moe.expert_used_count", G_U32, 2 },
    { "lfm2moe.expert_feed_forward_length", G_U32, SELF_EMBD },
    { "lfm2moe.expert_gating_func", G_U32, 2 },
    { "lfm2moe.attention.layer_norm_rms_epsilon", G_F32, 0x3727c5ac },
    { "lfm2moe.rope.freq_base", G_F32, 0x49742400 },  /* 1e-5 and 1e6        */
    { "tokenizer.ggml.bos_token_id", G_U32, 256 + 4 },
    { "tokenizer.ggml.eos_token_id", G_U32, 256 + 6 },
};

static void add_counted(struct text *to, const char *s)
{
    add_le(to, strlen(s), 8);
    add_string(to, s);
}

/* type: G_ARRAY + that of its n elements for an array. */
static void add_key(struct text *to, const char *key, int type, int n)
{
    add_counted(to, key);
    add_le(to, type > G_ARRAY ? G_ARRAY : (uint64_t)type, 4);
    if (type > G_ARRAY) {
        add_le(to, (uint64_t)(type - G_ARRAY), 4);
        add_le(to, (uint64_t)n, 8);
    }
}

/* The 256 bytes as byte-level vocabularies write them, a few merges, and the
 * tokens of a conversation.  Returns how many keys. */
static int add_metadata_keys(struct text *to)
{
    static const char *const words[] = {
        "he", "ll", "hell", "hello", BOS, TURN_START, TURN_END
    };
    static const char *const merges[] = { "h e", "l l", "he ll", "hell o" };
    static const char *const names[3][2] = {
        { "general.architecture", "lfm2moe" },
        { "tokenizer.ggml.model", "gpt2" }, { "tokenizer.ggml.pre", "lfm2" }
    };
    const int n = sizeof self_numbers / sizeof *self_numbers;
    uint32_t unseen = 256;

    for (int i = 0; i < 3; i++) {
        add_key(to, names[i][0], G_STRING, 0);
        add_counted(to, names[i][1]);
    }
    for (int i = 0; i < n; i++) {
        add_key(to, self_numbers[i].key, self_numbers[i].type, 0);
        add_le(to, self_numbers[i].bits, 4);
    }
    add_key(to, "lfm2moe.attention.head_count_kv", G_ARRAY + G_I32, 4);
    for (int il = 0; il < 4; il++)
        add_le(to, il % 2 ? 2 : 0, 4);
    add_key(to, "tokenizer.ggml.tokens", G_ARRAY + G_STRING, SELF_VOCAB);
    for (uint32_t c = 0; c < 256; c++) {
        const int seen = (c > ' ' && c < 127) || (c > 160 && c != 173);
        char s[5] = "";
        utf8_put(s, seen ? c : unseen++);
        add_counted(to, s);
    }
    for (int i = 0; i < 7; i++)
        add_counted(to, words[i]);
    add_key(to, "tokenizer.ggml.token_type", G_ARRAY + G_I32, SELF_VOCAB);
    for (int i = 0; i < SELF_VOCAB; i++)
        add_le(to, i < 256 + 4 ? 1 : 3, 4);           /* normal, control     */
    add_key(to, "tokenizer.ggml.merges", G_ARRAY + G_STRING, 4);
    for (int i = 0; i < 4; i++)
        add_counted(to, merges[i]);
    return n + 7;
}

/* One block: bits at random, except where they would mean no number. */
static void add_block(struct text *to, const struct self_type *t, uint64_t *rng)
{
    unsigned char b[256];

    for (int i = 0; i < t->bytes; i += 8)
        put_le(b + i, next_random(rng), 8);
    for (int i = 0; i < 2 && t->scale[i] >= 0; i++)   /* about 2^-8          */
        put_le(b + t->scale[i], 0x1c00 | (next_random(rng) & 0x3ff), 2);
    if (t->id == 0)                                   /* +-2^-5 or so        */
        put_le(b, 0x3d000000 | (next_random(rng) & 0x807fffff), 4);
    if (t->id == 1)
        put_le(b, 0x2800 | (next_random(rng) & 0x83ff), 2);
    if (t->id == 30)
        put_le(b, 0x3d00 | (next_random(rng) & 0x807f), 2);
    add(to, (char *)b, (size_t)t->bytes);
}

/* A GGUF, all little-endian.  The caller frees out->s. */
static void make_file(int type, struct text *out)
{
    struct text keys = { 0 }, info = { 0 }, data = { 0 };
    const int n_keys = add_metadata_keys(&keys);
    const int n = sizeof self_tensors / sizeof *self_tensors;
    uint64_t rng = (uint64_t)type, n_tensors = 0;

    for (int il = -1; il < 4; il++)
        for (const struct self_tensor *t = self_tensors; t < self_tensors + n;
             t++) {
            const struct self_type *is = &self_types[t->is_plain ? 0 : type];
            const int dims[] = { t->cols, t->rows, t->experts };
            int size = 1, n_dims = 1 + !!t->rows + !!t->experts;
            if (il < 0 ? t->layers != ONCE : !(t->layers >> il & 1))
                continue;
            add_counted(&info, il < 0 ? t->name :
                        phrase("blk.%d.%s", il, t->name).s);
            add_le(&info, (uint64_t)n_dims, 4);
            for (int d = 0; d < n_dims; d++, size *= dims[d - 1])
                add_le(&info, (uint64_t)dims[d], 8);
            add_le(&info, (uint64_t)is->id, 4);
            add_le(&info, data.n, 8);
            for (int i = 0; i < size; i += is->cols)
                add_block(&data, is, &rng);
            while (data.n % 32)
                add(&data, "", 1);
            n_tensors++;
        }
    add_string(out, "GGUF");
    add_le(out, 3, 4);
    add_le(out, n_tensors, 8);
    add_le(out, (uint64_t)n_keys, 8);
    add(out, keys.s, keys.n);
    add(out, info.s, info.n);
    while (out->n % 32)
        add(out, "", 1);
    add(out, data.s, data.n);
    free(keys.s);
    free(info.s);
    free(data.s);
}

/* ---- what is tried */

struct self {
    lfm2_model *model;
    lfm2_context *ctx;
    int32_t token[SELF_LONG];
    int failed;
    uint64_t all;                         /* hash of all hashes              */
};

static void self_result(struct self *t, int good, const char *what,
                        const char *how, uint64_t hash)
{
    printf("%-4s  %s%s", good ? "ok" : "FAIL", what, how);
    if (hash)
        printf(": %016llx", (unsigned long long)hash);
    putchar('\n');
    t->failed |= !good;
}

/* Feed the first n_tokens, `step` at a time; the hash of the logits of all of
 * them, or 0 after an error. */
static uint64_t self_feed(struct self *t, int seq, int n_tokens, int step)
{
    const int n_vocab = lfm2_model_config(t->model)->n_vocab;
    uint64_t h = HASH_START;

    for (int i = 0, n; i < n_tokens; i += n) {
        n = n_tokens - i < step ? n_tokens - i : step;
        const lfm2_span span = { seq, t->token + i, n, n };
        if (lfm2_forward(t->ctx, &span, 1, NULL) != LFM2_OK)
            return 0;
        for (int row = 0; row < n; row++) {
            const float *logits = lfm2_logits(t->ctx, 0, row);
            if (!isfinite(logits[0]) || logits[0] == logits[1])
                return 0;
            h = hash_floats(h, logits, n_vocab);
        }
    }
    return h;
}

static int self_open(struct self *t, int isa, int n_threads, int kv_type)
{
    lfm2_params p = lfm2_default_params(t->model);

    p.isa = isa;
    p.n_threads = n_threads;
    p.kv_type = kv_type;
    p.n_ctx = SELF_LONG;
    p.n_seq = 2;
    p.n_logits = SELF_TOKENS;
    return lfm2_context_open(&t->ctx, t->model, &p, NULL);
}

/* The logits' hash under these circumstances, or 0. */
static uint64_t self_hash(struct self *t, int isa, int n_threads, int kv_type,
                          int n_tokens, int step)
{
    uint64_t h = 0;

    if (self_open(t, isa, n_threads, kv_type) == LFM2_OK) {
        h = self_feed(t, 0, n_tokens, step);
        lfm2_context_close(t->ctx);
    }
    return h;
}

/* A weight type: plain C against the number that is known, each kernel, at once
 * and token by token, against plain C.  And of the last type by each kernel: a
 * text longer than what attention works on at once, a cache of floats, and
 * threads. */
static void self_kernels(struct self *t, const struct self_type *type, int all)
{
    static const struct {
        const char *what;
        int n_threads, kv_type, n_tokens, step;
        uint64_t known;
    } run[] = {
        { "a long text, by ", 1, LFM2_KV_F16, SELF_LONG, SELF_TOKENS,
          0x75627de54a6b322fu },
        { "a KV cache of floats, by ", 1, LFM2_KV_F32, SELF_TOKENS, 7,
          0x18980a03e2fcd3dcu },
        { "two threads, pieces of five tokens, by ", 2, LFM2_KV_F16,
          SELF_TOKENS, 5, 0x83b254a4c39ab7deu }
    };
    const int kv = LFM2_KV_F16, n = SELF_TOKENS;
    const uint64_t h = self_hash(t, LFM2_ISA_SCALAR, 1, kv, n, n);

    t->all = hash_number(t->all, h);
    self_result(t, h == type->hash, type->name, " in plain C", h);
    for (int isa = LFM2_ISA_SCALAR; isa < LFM2_N_ISA; isa++) {
        if (!lfm2_isa_available(isa))
            continue;
        if (isa > LFM2_ISA_SCALAR)
            self_result(t, self_hash(t, isa, 1, kv, n, n) == h &&
                        self_hash(t, isa, 1, kv, n, 1) == h, type->name,
                        phrase(" with %s", isa_name(isa)).s, 0);
        for (int i = 0; all && i < 3; i++)
            self_result(t, self_hash(t, isa, run[i].n_threads, run[i].kv_type,
                                     run[i].n_tokens, run[i].step) ==
                        run[i].known, run[i].what, isa_name(isa), 0);
    }
}

/* Sequences that are saved, restored and shortened. */
static void self_sequences(struct self *t)
{
    const uint64_t known = 0x18980a03e2fcd3dcu, saved = 0x11417c4fd0aea9f3u;
    int good = self_open(t, LFM2_ISA_AUTO, 1, LFM2_KV_F32) == LFM2_OK &&
               self_feed(t, 0, SELF_TOKENS, 7) == known;
    const uint64_t size = good ? lfm2_seq_state_size(t->ctx, 0) : 0;
    char *state = zeroed((size_t)size, 1);

    good = good && lfm2_seq_save(t->ctx, 0, state, size, NULL) == LFM2_OK &&
           hash_bytes(HASH_START, state, (size_t)size) == saved &&
           lfm2_seq_load(t->ctx, 1, state, size, NULL) == LFM2_OK &&
           lfm2_seq_len(t->ctx, 1) == SELF_TOKENS;
    self_result(t, good, "a sequence saved and restored", "", 0);
    self_result(t, good && lfm2_seq_trim(t->ctx, 1, 3) == 0 &&
                self_feed(t, 1, SELF_TOKENS, 4) == known,
                "a sequence shortened and read again", "", 0);
    free(state);
    lfm2_context_close(t->ctx);
    t->ctx = NULL;
}

/* A generator that is the same everywhere chooses the same words. */
static void self_sampler(struct self *t)
{
    lfm2_sampler s = { .temperature = 0.8f, .top_k = 40, .top_p = 0.95f,
                       .min_p = 0.02f, .repeat_penalty = 1.1f,
                       .repeat_last_n = 16, .rng = 1 };
    const int opened = self_open(t, LFM2_ISA_AUTO, 1, LFM2_KV_F16) == LFM2_OK;
    float logits[SELF_VOCAB];
    uint64_t rng = 2, h = HASH_START;
    int32_t made[32];

    for (int i = 0; opened && i < 32; i++) {
        for (int id = 0; id < SELF_VOCAB; id++)
            logits[id] = (float)(int)(next_random(&rng) >> 49) * 0x1p-12f - 4;
        made[i] = lfm2_sample(t->ctx, &s, logits, made, i);
        h = hash_number(h, (uint32_t)made[i]);
    }
    self_result(t, h == 0x4cb658387d2a6170u, "the sampler's choices", "", 0);
    t->all = hash_number(t->all, h);
    lfm2_context_close(opened ? t->ctx : NULL);
}

/* Words, merges, bytes that are no character, control tokens; and back. */
static void self_tokenizer(struct self *t, const struct text *file)
{
    static const char text[] = "hello hell\n 12\xff \xc3\xa9" TURN_END;
    static const int32_t want[] = {
        260, 259, ' ', 258, '\n', ' ', '1', '2', 0xff, ' ', 0xc3, 0xa9, 262
    };
    lfm2_tokenizer *words;
    struct text back = { 0 };
    int32_t id[32];
    int n = 0, len;

    if (lfm2_tokenizer_open_memory(&words, file->s, file->n, NULL) == LFM2_OK) {
        n = lfm2_encode(words, text, strlen(text), LFM2_ENCODE_BOS |
                        LFM2_ENCODE_SPECIAL, id, 32);
        for (int i = 1; i < n; i++) {
            const char *s = lfm2_token_bytes(words, id[i], 1, &len);
            add(&back, s, (size_t)len);
        }
        lfm2_tokenizer_close(words);
    }
    self_result(t, (size_t)n == sizeof want / sizeof *want &&
                memcmp(id, want, sizeof want) == 0, "the tokenizer", "", 0);
    self_result(t, back.s && strcmp(back.s, text) == 0, "and back to text",
                "", 0);
    free(back.s);
}

static void self_arithmetic(struct self *t)
{
    volatile float one = 1, tiny = 0x1p-149f, third = 1.0f / 3, half = 0.5f;
    volatile int minus = -5;
    const double d = 1;
    uint64_t bits;

    self_result(t, CHAR_BIT == 8 && sizeof(int) >= 4 && sizeof(size_t) >= 4 &&
                minus >> 1 == -3 && (unsigned)minus == UINT_MAX - 4,
                "integers of two's complement, 8 bits a byte",
                "", 0);
    memcpy(&bits, &d, sizeof bits);
    self_result(t, float_bits(one) == 0x3f800000 &&
                bits == (uint64_t)0x3ff00000 << 32,
                "floats and integers in the same byte order",
                "", 0);
    self_result(t, FLT_RADIX == 2 && FLT_MANT_DIG == 24 && DBL_MANT_DIG == 53 &&
                one + 0x1p-24f == one && one + 0x3p-24f == one + 0x1p-22f &&
                third * 3 == one,
                "floats of 24 bits, doubles of 53, rounded to nearest even",
                "", 0);
    self_result(t, tiny * one > 0 && tiny * half == 0 &&
                (0x1p-126f * half) * 2 == 0x1p-126f,
                "denormal numbers are kept",
                "", 0);
}

/* What the functions give for some thousand numbers: the bits that are known,
 * and no farther than `bound` units of 2^-24 from what the C library computes
 * in double, if it has the function. */
static void self_functions(struct self *t)
{
    static const struct {
        int id;
        const char *name;
        double (*libc)(double), bound;
        uint64_t known;
    } all[] = {
        { LFM2_FMA, "a*b+c", NULL, 0, 0x70172052f8b00d38u },
        { LFM2_EXP, "exp", exp, 2, 0x7ebd348940bf194fu },
        { LFM2_SIN, "sin", sin, 1, 0x84f7d324c069e130u },
        { LFM2_COS, "cos", cos, 1, 0x2f6e6bf977c0a2e9u }
    };

    for (int k = 0; k < 4; k++) {
        uint64_t rng = 3, h = HASH_START;
        int good = 1;
        for (int i = 0; i < 4096; i++) {
            const float x = (float)(int)(next_random(&rng) >> 40);
            const float b = (float)(int)(next_random(&rng) >> 40) - 0x1p23f;
            const float a = all[k].id == LFM2_EXP ? (x - 0x1p23f) * 0x1p-17f :
                                                    x * 0x1p-4f;
            const float c = i % 2 ? -a * b : b * 0x1p-20f;
            const float y = lfm2_math(all[k].id, a, b, c);
            const double exact = all[k].libc ? all[k].libc(a) : y;
            h = hash_number(h, float_bits(y));
            good &= fabs(y - exact) <= all[k].bound * 0x1p-24 * fabs(exact);
        }
        self_result(t, good && h == all[k].known, all[k].name, "", h);
    }
}

/* The C library, as far as it tells its name. */
static void print_libc(void)
{
    printf("libc        ");
#if defined __UCLIBC__
    printf("uClibc %d.%d\n", __UCLIBC_MAJOR__, __UCLIBC_MINOR__);
#elif defined __GLIBC__
    printf("glibc %s\n", gnu_get_libc_version());
#elif defined __BIONIC__
    printf("Android's, API level %d\n", __ANDROID_API__);
#elif defined __wasi__
    printf("wasi-libc\n");
#elif defined __linux__
    printf("musl, or another that gives no name\n");
#else
    struct utsname host;
    if (uname(&host) == 0)
        printf("%s's, %s\n", host.sysname, host.release);
#endif
}

/* All of it, and what belongs into a report. */
static int selftest(void)
{
    const uint64_t known = 0xf7e0c42c140c71edu;
    struct self t = { .all = HASH_START };
    lfm2_error err;

    for (int i = 0; i < SELF_LONG; i++)
        t.token[i] = (i * 37 + 5) % SELF_VOCAB;
    self_arithmetic(&t);
    self_functions(&t);
    for (int i = 0; i < N_SELF_TYPES; i++) {
        struct text file = { 0 };
        make_file(i, &file);
        if (lfm2_model_open_memory(&t.model, file.s, file.n, &err) == LFM2_OK) {
            self_kernels(&t, &self_types[i], i == N_SELF_TYPES - 1);
            if (i == N_SELF_TYPES - 1) {
                self_sequences(&t);
                self_sampler(&t);
                self_tokenizer(&t, &file);
            }
            lfm2_model_close(t.model);
        } else
            self_result(&t, 0, self_types[i].name, err.msg, 0);
        free(file.s);
    }
    print_version();
    print_libc();
    printf("hash        %016llx, expected %016llx on every machine\n",
           (unsigned long long)t.all, (unsigned long long)known);
    return t.failed || t.all != known ? SELFTEST_FAILED : DONE;
}

/* ---------------------------------------------------------- 22. The sandbox
 *
 * A model, a prompt or a session may be made by someone who knows of a fault in
 * this program.  So before it looks at a byte of them it gives away what it
 * does not need, and whoever takes it over finds nothing to use: no privileges,
 * no core dump, by Landlock no files but those that options name, by seccomp no
 * system calls but those below.  --sandbox auto takes what the system has; with
 * --sandbox require all of it must be there.
 *
 * A denied call fails with EPERM; the program lives on, because a C library
 * that has learnt a new habit is likelier than an attack, and an attacker gains
 * nothing by the error.  Calls newer than the list fail with ENOSYS, as on an
 * older kernel: then C libraries use the old ones.
 *
 * This is Linux alone, by its own names and numbers: neither its headers nor a
 * library are needed. */

/* Sanitizers do things of their own that it forbids. */
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define LFM2_NO_SANDBOX
#elif defined __has_feature
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || \
    __has_feature(memory_sanitizer)
#define LFM2_NO_SANDBOX
#endif
#endif

/* What ELF and seccomp call this machine; 0 if it was never tried. */
#if !defined __linux__ || defined LFM2_NO_SANDBOX
#define ELF_MACHINE 0
#elif defined __x86_64__ && !defined __ILP32__
#define ELF_MACHINE 62
#elif defined __i386__
#define ELF_MACHINE 3
#elif defined __aarch64__ && defined __LP64__
#define ELF_MACHINE 183
#elif defined __arm__ && defined __ARM_EABI__
#define ELF_MACHINE 40
#elif defined __riscv && __riscv_xlen == 64
#define ELF_MACHINE 243
#elif defined __powerpc64__
#define ELF_MACHINE 21
#elif defined __s390x__
#define ELF_MACHINE 22
#else
#define ELF_MACHINE 0
#endif

#if ELF_MACHINE
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#ifdef SYS_seccomp
#define HAVE_SANDBOX
#endif
#endif

/* Where a chat may /save and /load: the directory that is named; else the one
 * it began in, unless that is the home directory, where programs keep what they
 * run, or has it inside.  NULL: nowhere. */
static const char *save_dir(const struct settings *s)
{
    const char *named = getenv("HOME");
    char *home = realpath(named && *named ? named : "/", NULL);
    char *here = realpath(".", NULL);
    const size_t n = here ? strlen(here) : 0;
    const int is_home = n <= 1 || (home && strncmp(home, here, n) == 0 &&
                                   (home[n] == '/' || !home[n]));

    free(home);
    free(here);
    return s->save_dir ? s->save_dir :
           is_home || s->sandbox == SANDBOX_REQUIRE ? NULL : ".";
}

/* Something is missing: a reason to stop if all is required. */
static int lacks(const struct settings *s, const char *what, const char *why)
{
    if (s->sandbox == SANDBOX_REQUIRE)
        return say(FAILED, "--sandbox require: no %s: %s", what, why);
    if (s->verbose)
        note("sandbox: no %s: %s", what, why);
    return DONE;
}

#ifndef HAVE_SANDBOX

static int enter_sandbox(const struct settings *s)
{
    return s->sandbox == SANDBOX_OFF ? DONE :
           lacks(s, "sandbox", "it is not in this build");
}

static int keep_file(const char *path, const struct text *part, int n_parts)
{
    return replace_file(path, part, n_parts);
}

#else

long syscall(long number, ...);           /* not in POSIX                    */

/* ---- the keeper
 *
 * A session is written beside the old one and then takes its place, and who may
 * do that in a directory may put anything there; in a home directory that would
 * be enough.  So another process does it, from outside: it gets a length and so
 * many bytes, looks at nothing, and replaces this one file. */

static int keeper = -1;                   /* a socket                        */

static int read_all(int fd, void *to, size_t n)
{
    for (size_t had = 0; had < n;) {
        const ssize_t got = read(fd, (char *)to + had, n - had);
        if (got == 0 || (got < 0 && errno != EINTR))
            return -1;
        had += got > 0 ? (size_t)got : 0;
    }
    return 0;
}

static void keep(const char *path, int fd)
{
    struct text t = { 0 };
    unsigned char size[8], code;

    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    signal(SIGQUIT, SIG_IGN);
    close(STDIN_FILENO);
    close(STDOUT_FILENO);
    while (read_all(fd, size, sizeof size) == 0) {
        const size_t n = (size_t)get_le(size, 8);
        t.n = 0;
        reserve(&t, n);
        if (read_all(fd, t.s, t.n = n) != 0)
            break;
        code = (unsigned char)replace_file(path, &t, 1);
        write_all(fd, (char *)&code, 1);
    }
    _exit(0);
}

/* Where there can be none, its directory is granted. */
static void start_keeper(const char *path)
{
    int fd[2];
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fd) != 0)
        return;
    fflush(stdout);
    pid = fork();
    if (pid == 0)
        keep(path, (close(fd[0]), fd[1]));
    close(fd[1]);
    if (pid > 0)
        keeper = fd[0];
    else
        close(fd[0]);
}

/* As replace_file(), for the session. */
static int keep_file(const char *path, const struct text *part, int n_parts)
{
    struct text size = { 0 };
    uint64_t n = 0;
    unsigned char code;
    int good;

    if (keeper < 0)
        return replace_file(path, part, n_parts);
    for (int i = 0; i < n_parts; i++)
        n += part[i].n;
    add_le(&size, n, 8);
    good = write_all(keeper, size.s, size.n) == 0;
    for (int i = 0; good && i < n_parts; i++)
        good = write_all(keeper, part[i].s, part[i].n) == 0;
    good = good && read_all(keeper, &code, 1) == 0;
    free(size.s);
    return good ? code : say(BAD_FILE, "%s: cannot be kept: the process that "
                             "writes it has ended", path);
}

/* ---- files: Landlock */

enum { PR_DUMPABLE = 4, PR_NO_NEW_PRIVS = 38, PATH_ONLY = 010000000 };
enum { CREATE_RULESET = 444, ADD_RULE, RESTRICT_SELF, PATH_BENEATH = 1 };

/* Rights to files, and those of them that only directories have. */
enum {
    WRITE_FILE = 1 << 1, READ_FILE = 1 << 2, READ_DIR = 1 << 3,
    REMOVE_FILE = 1 << 5, MAKE_REG = 1 << 8, TRUNCATE = 1 << 14,
    IN_DIRS = 0x3ff8, REPLACES = WRITE_FILE | MAKE_REG | REMOVE_FILE
};

/* What a rule set decides about: all that the kernel's version of Landlock
 * knows of, and nothing of it is allowed. */
struct ruleset { uint64_t files, net, scopes; };

struct path_rule { uint64_t rights; int32_t fd; };

/* Of the files that options name. */
enum {
    READS = READ_FILE | READ_DIR,
    WRITES = READ_FILE | WRITE_FILE | TRUNCATE
};

static const struct { size_t at; uint64_t rights; } file_options[] = {
    { AT(model), READS }, { AT(tokenizer), READS }, { AT(file), READS },
    { AT(ids), READS }, { AT(messages), READS }, { AT(tools), READS },
    { AT(ppl), READS }, { AT(session), READS }, { AT(resume), WRITES },
    { AT(logits), WRITES }, { AT(export_to), WRITES }, { AT(trace), WRITES },
    { AT(trace_raw), WRITES }, { AT(system_file), READS },
    { AT(json_schema), READS }
};

enum { N_FILE_OPTIONS = sizeof file_options / sizeof *file_options };

/* Allow to open what is at `path`, and in it.  What cannot be granted stays
 * forbidden. */
static void grant(int set, const char *path, uint64_t rights)
{
    struct path_rule rule = { rights, open(path, PATH_ONLY | O_CLOEXEC) };
    struct stat st;

    if (rule.fd < 0)
        return;
    if (fstat(rule.fd, &st) == 0 && !S_ISDIR(st.st_mode))
        rule.rights &= ~(uint64_t)IN_DIRS;
    syscall(ADD_RULE, set, PATH_BENEATH, &rule, 0);
    close(rule.fd);
}

/* What options name, where a chat keeps its files, and what tells how many CPUs
 * and how much memory there are to use.  A file to write must be there to be
 * granted; none is made if there will be nothing to write. */
static void grant_all(int set, const struct settings *s, uint64_t known)
{
    const int begins = !s->model || access(s->model, R_OK) == 0;

    for (size_t i = 0; i < N_FILE_OPTIONS; i++) {
        const char *path = *(const char *const *)((const char *)s +
                                                  file_options[i].at);
        const uint64_t rights = file_options[i].rights & known;
        if (!path || is_dash(path))
            continue;
        if (begins && (rights & WRITE_FILE)) {
            const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC,
                                0666);
            if (fd >= 0)
                close(fd);
        }
        grant(set, path, rights);
    }
    if (s->session && keeper < 0) {
        struct text dir = { 0 };
        add_directory(&dir, s->session);
        grant(set, dir.s, (READ_FILE | REPLACES) & known);
        free(dir.s);
    }
    if (s->mode == CHAT && save_dir(s))
        grant(set, save_dir(s), (READS | REPLACES | TRUNCATE) & known);
    grant(set, "/proc/self/status", READ_FILE);
    grant(set, "/proc/self/cgroup", READ_FILE);
    grant(set, "/sys/fs/cgroup", READ_FILE);
    grant(set, "/proc/meminfo", READ_FILE);
}

/* Bind and connect of TCP come with version 4; abstract sockets and signals to
 * others with 6. */
static int confine_files(const struct settings *s)
{
    static const uint64_t files[] = { 0x1fff, 0x3fff, 0x7fff, 0x7fff, 0xffff };
    const long version = syscall(CREATE_RULESET, NULL, (size_t)0, 1);
    struct ruleset is;
    int set, failed;

    if (version < 1)
        return lacks(s, "Landlock", strerror(errno));
    is = (struct ruleset){ files[version < 5 ? version - 1 : 4],
                           version >= 4 ? 3 : 0, version >= 6 ? 3 : 0 };
    set = (int)syscall(CREATE_RULESET, &is, sizeof is, 0);
    if (set < 0)
        return lacks(s, "Landlock", strerror(errno));
    grant_all(set, s, is.files);
    failed = syscall(RESTRICT_SELF, set, 0) != 0;
    close(set);
    if (failed)
        return lacks(s, "Landlock", strerror(errno));
    if (s->verbose)
        note("sandbox: Landlock %ld", version);
    return DONE;
}

/* ---- system calls: seccomp */

/* If arg >= 0, only with (argument & mask) == is. */
struct system_call { long number; int arg; uint32_t mask, is; };

enum { EXECUTABLE = 4, A_THREAD = 0x10100, CLONE_ARG = ELF_MACHINE == 22 };

/* What is asked of a terminal, or done to it, in older and newer libraries. */
#if ELF_MACHINE == 21
enum { GET_TERMINAL = 0x402c7413, GET_WINDOW = 0x40087468 };
#define SET_TERMINAL 0x802c7414u
#else
enum { GET_TERMINAL = 0x5401, SET_TERMINAL, GET_WINDOW = 0x5413 };
#endif
#define GET_TERMINAL_2 0x802c542au
#define SET_TERMINAL_2 0x402c542bu

#define CALL(name)        { SYS_##name, -1, 0, 0 }
#define IF(name, arg, is) { SYS_##name, arg, UINT32_MAX, is }
#define NOT(name, bits)   { SYS_##name, 2, bits, 0 }

/* Not every machine has all of them: newer ones lack what those with "at" in
 * their names can do, those of 32 bits have doubles for 64.  Which files can be
 * opened is for Landlock to say.  Memory is never executed that was not before,
 * and a clone is a thread. */
static const struct system_call system_calls[] = {
    CALL(futex), CALL(write), CALL(writev), CALL(read), CALL(readv),
    CALL(close), CALL(lseek), CALL(fstat), CALL(fsync), CALL(brk),
    CALL(munmap), CALL(mremap), CALL(madvise), NOT(mprotect, EXECUTABLE),
    CALL(mincore), { SYS_clone, CLONE_ARG, A_THREAD, A_THREAD },
    CALL(set_robust_list), CALL(sched_getaffinity), CALL(sched_yield),
    CALL(getpid), CALL(gettid), CALL(exit), CALL(exit_group),
    CALL(restart_syscall), CALL(rt_sigaction), CALL(rt_sigprocmask),
    CALL(rt_sigreturn), CALL(sigaltstack), CALL(getrandom), CALL(getrusage),
    CALL(sysinfo), CALL(ppoll), CALL(openat), CALL(faccessat), CALL(ftruncate),
    CALL(fchmod), CALL(unlinkat), CALL(readlinkat), CALL(getcwd),
    IF(ioctl, 1, GET_TERMINAL), IF(ioctl, 1, GET_TERMINAL_2),
    IF(ioctl, 1, SET_TERMINAL), IF(ioctl, 1, SET_TERMINAL_2),
    IF(ioctl, 1, GET_WINDOW), IF(fcntl, 1, F_GETFL), IF(fcntl, 1, F_SETFD),
    IF(fcntl, 1, F_SETLK),
#if ELF_MACHINE == 22                     /* there, it is given a pointer    */
    CALL(mmap),
#elif defined SYS_mmap2
    NOT(mmap2, EXECUTABLE), CALL(_llseek), CALL(fstat64), CALL(fstatat64),
    CALL(stat64), CALL(lstat64), CALL(ftruncate64), IF(fcntl64, 1, F_GETFL),
    IF(fcntl64, 1, F_SETFD), IF(fcntl64, 1, F_SETLK),
#else
    NOT(mmap, EXECUTABLE),
#endif
#ifdef SYS_newfstatat
    CALL(newfstatat),
#endif
#ifdef SYS_statx
    CALL(statx),
#endif
#ifdef SYS_sigreturn
    CALL(sigreturn),
#endif
#ifdef SYS_ppoll_time64
    CALL(ppoll_time64), CALL(futex_time64),
#endif
#ifdef SYS_clock_gettime
    CALL(clock_gettime),
#endif
#ifdef SYS_clock_gettime64
    CALL(clock_gettime64),
#endif
#ifdef SYS_rseq
    CALL(rseq),
#endif
#ifdef SYS_renameat
    CALL(renameat),
#endif
#ifdef SYS_renameat2
    CALL(renameat2),
#endif
#ifdef SYS_open
    CALL(poll), CALL(open), CALL(access), CALL(stat), CALL(lstat),
    CALL(readlink), CALL(unlink), CALL(rename),
#endif
};

/* Instructions of the kernel's little machine, and where it finds the number of
 * a call, the architecture, and the low halves of the arguments. */
enum {
    LOAD = 0x20, AND = 0x54, IF_EQUAL = 0x15, IF_AT_LEAST = 0x35, RETURN = 0x06,
    CALL_NUMBER = 0, MACHINE = 4, ARGUMENTS = 16
};

#define ALLOW      0x7fff0000u
#define FAIL(code) (0x00050000u | (unsigned)(code))

enum { N_CALLS = sizeof system_calls / sizeof *system_calls };
enum { MAX_CODE = 13 + 6 * N_CALLS };
enum { NEWER = 403 };      /* from here, numbers are the same on all machines */

struct code { uint16_t op; uint8_t then, otherwise; uint32_t k; };

struct filter { unsigned short n; struct code *code; };

static void emit(struct filter *f, int op, uint32_t k, int then, int otherwise)
{
    f->code[f->n++] = (struct code){
        (uint16_t)op, (uint8_t)then, (uint8_t)otherwise, k
    };
}

/* If it is this call, allow it.  Otherwise its number is loaded again. */
static void emit_call(struct filter *f, const struct system_call *c)
{
    const uint32_t low = is_little_endian() ? 0 : 4;

    if (c->arg < 0) {
        emit(f, IF_EQUAL, (uint32_t)c->number, 0, 1);
        emit(f, RETURN, ALLOW, 0, 0);
        return;
    }
    emit(f, IF_EQUAL, (uint32_t)c->number, 0, 5);
    emit(f, LOAD, ARGUMENTS + 8 * (uint32_t)c->arg + low, 0, 0);
    emit(f, AND, c->mask, 0, 0);
    emit(f, IF_EQUAL, c->is, 0, 1);
    emit(f, RETURN, ALLOW, 0, 0);
    emit(f, LOAD, CALL_NUMBER, 0, 0);
}

/* From now on only these calls, and signals to itself.  Calls of another
 * architecture are other calls by the same numbers. */
static int confine_calls(const struct settings *s)
{
    const uint32_t machine = ELF_MACHINE |
                             (sizeof(void *) == 8 ? 0x80000000u : 0) |
                             (is_little_endian() ? 0x40000000u : 0);
    struct code code[MAX_CODE];
    struct filter f = { 0, code };

    emit(&f, LOAD, MACHINE, 0, 0);
    emit(&f, IF_EQUAL, machine, 1, 0);
    emit(&f, RETURN, FAIL(EPERM), 0, 0);
    emit(&f, LOAD, CALL_NUMBER, 0, 0);
    for (int i = 0; i < N_CALLS; i++)
        emit_call(&f, &system_calls[i]);
    emit_call(&f, &(struct system_call){ SYS_tgkill, 0, UINT32_MAX,
                                         (uint32_t)getpid() });
    emit(&f, IF_AT_LEAST, NEWER, 0, 1);
    emit(&f, RETURN, FAIL(ENOSYS), 0, 0);
    emit(&f, RETURN, FAIL(EPERM), 0, 0);
    if (syscall(SYS_seccomp, 1, 0, &f) != 0)
        return lacks(s, "seccomp", strerror(errno));
    if (s->verbose)
        note("sandbox: seccomp");
    return DONE;
}

/* ---- all of it */

/* How many of seccomp and Landlock may be called at all: where a sandbox above
 * this one answers with a signal, as on Android, a child dies of it.  Where
 * there can be no child, none above is so strict. */
static int count_answered(void)
{
    int fd[2], n = 0;
    char c;
    pid_t pid;

    if (pipe(fd) != 0)
        return 2;
    pid = fork();
    if (pid == 0) {
        signal(SIGSYS, SIG_DFL);
        syscall(SYS_seccomp, 99, 0, NULL);
        write_all(fd[1], "", 1);
        syscall(CREATE_RULESET, NULL, (size_t)0, 1);
        syscall(ADD_RULE, -1, 0, NULL, 0);
        syscall(RESTRICT_SELF, -1, 0);
        write_all(fd[1], "", 1);
        _exit(0);
    }
    close(fd[1]);
    while (pid > 0 && read(fd[0], &c, 1) == 1)
        n++;
    close(fd[0]);
    if (pid > 0)
        waitpid(pid, NULL, 0);
    return pid > 0 ? n : 2;
}

/* Dates need to know the time zone, which is a file, before. */
static int enter_sandbox(const struct settings *s)
{
    static const char by_signal[] = "this system answers it with a signal";
    int n, code;

    if (s->sandbox == SANDBOX_OFF)
        return DONE;
    tzset();
    setrlimit(RLIMIT_CORE, &(struct rlimit){ 0, 0 });
    n = count_answered();
    if (s->session)
        start_keeper(s->session);
    if (syscall(SYS_prctl, PR_NO_NEW_PRIVS, 1L, 0L, 0L, 0L) != 0)
        return lacks(s, "sandbox", strerror(errno));
    syscall(SYS_prctl, PR_DUMPABLE, 0L, 0L, 0L, 0L);
    code = n < 2 ? lacks(s, "Landlock", by_signal) : confine_files(s);
    if (code != DONE)
        return code;
    return n < 1 ? lacks(s, "seccomp", by_signal) : confine_calls(s);
}

#endif

/* --------------------------------------------------- 23. Answers in a schema
 *
 * A JSON schema becomes rules, and a guide follows an answer byte by byte: it
 * knows which bytes may come next, and whether this may be the end.  It is a
 * stack of rules, each with its state; while alternatives look alike, there is
 * one for each.  What the model chooses is taken if it fits; otherwise it is
 * asked once more, of the tokens that do.  So every answer that ends is good,
 * and one that is cut is the beginning of a good one.
 *
 * Of all the ways to write a value, these are let through: members in the order
 * of the schema, no blanks but one behind a comma or a colon, no others than
 * those that the schema names, numbers of at most 18 digits.  A keyword that is
 * not known here is refused, not ignored.
 *
 * Calls are written in Python: [name(key="value", other=True)].  Their marks
 * are control tokens, which the rules know as the bytes 1 and 2. */

enum {
    MAX_RULES = 4096, MAX_LEVELS = 64, MAX_WAYS = 32, MAX_WORD = 4000,
    MAX_WORDS = 8192, MAX_DIGITS = 18, NEVER = 1 << 20,
    CALL_OPENS = 1, CALL_CLOSES = 2
};

/* A word of a rule: an alternative, a value, a key or a function, and the rule
 * for what follows it. */
struct choice {
    size_t from, n;                       /* of the schema's text            */
    int rule;                             /* -1: none                        */
    int is_required;                      /* no key behind it may come first */
};

struct rule {
    enum { CHOICE_OF, WORD, STRING_OF, NUMBER_OF, LIST_OF, MAP_OF, RECORD } is;
    int first, n;                         /* of the schema's choices         */
    int child;                            /* of a list or a map              */
    int min, max;                         /* characters or members; max 0 of
                                             a number: a whole one           */
    int levels;                           /* of the stack, that it takes     */
    int python;
    char open, close;
};

struct schema {
    struct rule *rule;
    int n_rules, root;
    struct choice *choice;
    int n_choices;
    struct text text;                     /* all words                       */
    int only_calls;                       /* anything else may be said       */
    int one_call;
};

struct level { uint16_t rule, state; int32_t at; };

/* One way to understand the text so far. */
struct way { int n; struct level level[MAX_LEVELS]; };

struct guide {
    const struct schema *s;
    int has_begun, in_call;
    int n;
    struct way way[MAX_WAYS];
};

/* ---- one byte
 *
 * A step says what a byte, or EOF, is to the rule on top: nothing that it can
 * take; a part of it, or the last; something behind its end; or something for
 * another rule, which goes on top. */

enum step { CANNOT, TAKEN, CLOSED, OVER, DEEPER };

struct move { uint8_t from, least, most, to; };

/* Where a byte leads from a state, or -1. */
static int find_move(const struct move *m, int from, int c)
{
    for (; m->most > 0; m++)
        if (m->from == from && c >= m->least && c <= m->most)
            return m->to;
    return -1;
}

/* Strings: UTF-8, and escapes, those of surrogates only in pairs. */
enum {
    QUOTE, BODY, ESCAPE, LOW_SLASH, LOW_U, MORE, MORE_2, MORE_3, E0, ED, F0, F4,
    HEX_1, HEX_2, HEX_2D, HEX_3, HEX_4, HIGH_3, HIGH_4, LOW_1, LOW_2,
    SINGLE = 32, LESS = 64                /* in '', or behind a <            */
};

static const struct move string_moves[] = {
    { BODY, ' ', '[', BODY }, { BODY, ']', 0x7f, BODY },
    { BODY, '\\', '\\', ESCAPE }, { BODY, 0xc2, 0xdf, MORE },
    { BODY, 0xe0, 0xe0, E0 }, { BODY, 0xe1, 0xec, MORE_2 },
    { BODY, 0xed, 0xed, ED }, { BODY, 0xee, 0xef, MORE_2 },
    { BODY, 0xf0, 0xf0, F0 }, { BODY, 0xf1, 0xf3, MORE_3 },
    { BODY, 0xf4, 0xf4, F4 }, { MORE, 0x80, 0xbf, BODY },
    { MORE_2, 0x80, 0xbf, MORE }, { MORE_3, 0x80, 0xbf, MORE_2 },
    { E0, 0xa0, 0xbf, MORE }, { ED, 0x80, 0x9f, MORE },
    { F0, 0x90, 0xbf, MORE_2 }, { F4, 0x80, 0x8f, MORE_2 },
    { ESCAPE, 'u', 'u', HEX_1 },
    { HEX_1, '0', '9', HEX_2 }, { HEX_1, 'a', 'c', HEX_2 },
    { HEX_1, 'd', 'd', HEX_2D }, { HEX_1, 'e', 'f', HEX_2 },
    { HEX_2, '0', '9', HEX_3 }, { HEX_2, 'a', 'f', HEX_3 },
    { HEX_2D, '0', '7', HEX_3 }, { HEX_2D, '8', '9', HIGH_3 },
    { HEX_2D, 'a', 'b', HIGH_3 },
    { HEX_3, '0', '9', HEX_4 }, { HEX_3, 'a', 'f', HEX_4 },
    { HEX_4, '0', '9', BODY }, { HEX_4, 'a', 'f', BODY },
    { HIGH_3, '0', '9', HIGH_4 }, { HIGH_3, 'a', 'f', HIGH_4 },
    { HIGH_4, '0', '9', LOW_SLASH }, { HIGH_4, 'a', 'f', LOW_SLASH },
    { LOW_SLASH, '\\', '\\', LOW_U }, { LOW_U, 'u', 'u', LOW_1 },
    { LOW_1, 'd', 'd', LOW_2 }, { LOW_2, 'c', 'f', HEX_3 }, { 0 }
};

/* In a call no string may look like the end of it. */
static enum step step_string(const struct rule *r, struct level *l, int c)
{
    const int single = l->state & SINGLE, state = l->state & (SINGLE - 1);
    int to;

    if (state == QUOTE) {
        l->state = (uint16_t)(c == '\'' ? BODY | SINGLE : BODY);
        return c == '"' || (c == '\'' && r->python) ? TAKEN : CANNOT;
    }
    if (state == BODY && c == (single ? '\'' : '"'))
        return l->at >= r->min ? CLOSED : CANNOT;
    if ((state == BODY && l->at >= r->max) || ((l->state & LESS) && c == '|'))
        return CANNOT;
    if (state == ESCAPE && c > 0 && strchr("\"\\bfnrt", c))
        to = BODY;
    else if (state == ESCAPE && c == (r->python ? '\'' : '/'))
        to = BODY;
    else
        to = find_move(string_moves, state,
                       state >= HEX_1 && c > 0 ? tolower(c) : c);
    if (to < 0)
        return CANNOT;
    l->at += state == BODY && (l->at < r->min || r->max < INT_MAX);
    l->state = (uint16_t)(to | single | (r->python && state == BODY &&
                                         c == '<' ? LESS : 0));
    return TAKEN;
}

enum { BEGIN, MINUS, ZERO, DIGITS, POINT, FRACTION, EXPONENT, SIGN, POWER,
       POWER_2 };

static const struct move number_moves[] = {
    { BEGIN, '-', '-', MINUS }, { BEGIN, '0', '0', ZERO },
    { BEGIN, '1', '9', DIGITS }, { MINUS, '0', '0', ZERO },
    { MINUS, '1', '9', DIGITS }, { DIGITS, '0', '9', DIGITS },
    { ZERO, '.', '.', POINT }, { DIGITS, '.', '.', POINT },
    { POINT, '0', '9', FRACTION }, { FRACTION, '0', '9', FRACTION },
    { ZERO, 'e', 'e', EXPONENT }, { DIGITS, 'e', 'e', EXPONENT },
    { FRACTION, 'e', 'e', EXPONENT }, { EXPONENT, '+', '+', SIGN },
    { EXPONENT, '-', '-', SIGN }, { EXPONENT, '0', '9', POWER },
    { SIGN, '0', '9', POWER }, { POWER, '0', '9', POWER_2 }, { 0 }
};

static enum step step_number(const struct rule *r, struct level *l, int c)
{
    static const int is_number = 1 << ZERO | 1 << DIGITS | 1 << FRACTION |
                                 1 << POWER | 1 << POWER_2;
    const int to = find_move(number_moves, l->state, c == 'E' ? 'e' : c);

    if (to < 0 || (to == l->state && l->at == MAX_DIGITS) ||
        (r->max == 0 && to >= POINT))
        return is_number >> l->state & 1 ? OVER : CANNOT;
    l->at = to == l->state ? l->at + 1 : 1;
    l->state = (uint16_t)to;
    return TAKEN;
}

/* Is there room on the stack for this rule, if it is one? */
static int has_room(const struct schema *s, const struct way *w, int rule)
{
    return rule < 0 || w->n + s->rule[rule].levels <= MAX_LEVELS;
}

/* Of the choices from `at` on, the first that begins with so many bytes of
 * number `at` and then has c; or -1.  EOF: the first that ends there. */
static int find_choice(const struct schema *s, const struct rule *r,
                       const struct way *w, int at, size_t n, int c)
{
    const struct choice *all = s->choice + r->first;

    for (int i = at; i < r->n; i++) {
        const char *word = s->text.s + all[i].from;
        if ((c == EOF ? all[i].n == n : all[i].n > n &&
             (unsigned char)word[n] == c) && has_room(s, w, all[i].rule) &&
            memcmp(word, s->text.s + all[at].from, n) == 0)
            return i;
        if (all[i].is_required)
            break;
    }
    return -1;
}

/* Values are in no order, so one may go on where another ends. */
static enum step step_word(const struct schema *s, const struct way *w,
                           struct level *l, int c, int *child)
{
    const struct rule *r = &s->rule[l->rule];
    int at;

    if (l->state == UINT16_MAX)
        return OVER;
    at = c == EOF ? -1 : find_choice(s, r, w, l->at, l->state, c);
    if (at >= 0) {
        l->at = at;
        l->state++;
        return TAKEN;
    }
    at = find_choice(s, r, w, l->at, l->state, EOF);
    if (at < 0)
        return CANNOT;
    *child = s->choice[r->first + at].rule;
    l->state = UINT16_MAX;
    return *child < 0 ? OVER : DEEPER;
}

/* What has brackets and commas: a list, a map whose keys are any strings, or a
 * record of known keys. */
enum { AT_OPEN, AT_FIRST, AT_NEXT, BEHIND_BLANK, AT_COLON, AT_VALUE,
       BEFORE_VALUE, AFTER_VALUE, IN_KEY };

/* May the bracket be closed, or another member follow? */
static int may_close(const struct schema *s, const struct rule *r, int at)
{
    for (; r->is == RECORD && at < r->n; at++)
        if (s->choice[r->first + at].is_required)
            return 0;
    return r->is == RECORD || at >= r->min;
}

static int may_go_on(const struct schema *s, const struct rule *r,
                     const struct way *w, int at)
{
    const struct choice *c = s->choice + r->first + at;

    if (r->is != RECORD)
        return at < r->max && has_room(s, w, r->child);
    for (; at < r->n; at++, c++)
        if (has_room(s, w, c->rule))
            return 1;
        else if (c->is_required)
            break;
    return 0;
}

/* A byte of a key, from n on.  That of the one argument without a name is
 * empty. */
static enum step step_key(const struct schema *s, const struct way *w,
                          struct level *l, size_t n, int c, int *child)
{
    const struct rule *r = &s->rule[l->rule];
    const struct choice *all = s->choice + r->first;
    int at;

    if (l->at < r->n && all[l->at].n == 0) {
        *child = all[l->at++].rule;
        l->state = AFTER_VALUE;
        return DEEPER;
    }
    at = find_choice(s, r, w, l->at, n, c);
    if (at < 0)
        return CANNOT;
    l->at = at;
    l->state = (uint16_t)(n + 1 == all[at].n ? AT_VALUE : IN_KEY + n + 1);
    return TAKEN;
}

static enum step begin_member(const struct schema *s, const struct way *w,
                              struct level *l, int c, int *child)
{
    const struct rule *r = &s->rule[l->rule];

    if (r->is == RECORD)
        return step_key(s, w, l, 0, c, child);
    if (l->at >= r->max || !has_room(s, w, r->child))
        return CANNOT;
    l->at += l->at < r->min || r->max < INT_MAX;
    l->state = r->is == LIST_OF ? AFTER_VALUE : AT_COLON;
    *child = r->is == LIST_OF ? r->child : r->first;
    return DEEPER;
}

/* Python's keys are there twice, in either quotes. */
static enum step begin_value(const struct schema *s, struct level *l,
                             int *child)
{
    const struct rule *r = &s->rule[l->rule];
    const int twice = r->python && r->open == '{';

    *child = r->is == RECORD ? s->choice[r->first + l->at].rule : r->child;
    if (r->is == RECORD)
        l->at = twice ? l->at / 2 * 2 + 2 : l->at + 1;
    l->state = AFTER_VALUE;
    return DEEPER;
}

static enum step step_members(const struct schema *s, const struct way *w,
                              struct level *l, int c, int *child)
{
    const struct rule *r = &s->rule[l->rule];
    const int state = l->state;

    if (state == AT_OPEN || state == AT_COLON) {
        l->state++;
        return c == (state == AT_OPEN ? r->open : ':') ? TAKEN : CANNOT;
    }
    if (c == ' ' && (state == AT_NEXT || state == AT_VALUE)) {
        l->state++;
        return TAKEN;
    }
    if (state == AT_VALUE || state == BEFORE_VALUE)
        return begin_value(s, l, child);
    if ((state == AT_FIRST || state == AFTER_VALUE) && c == r->close)
        return may_close(s, r, l->at) ? CLOSED : CANNOT;
    if (state == AFTER_VALUE) {
        l->state = AT_NEXT;
        return c == ',' && may_go_on(s, r, w, l->at) ? TAKEN : CANNOT;
    }
    return state < IN_KEY ? begin_member(s, w, l, c, child) :
           step_key(s, w, l, (size_t)state - IN_KEY, c, child);
}

static enum step step(const struct schema *s, const struct way *w,
                      struct level *l, int c, int *child)
{
    const struct rule *r = &s->rule[l->rule];

    return r->is == STRING_OF ? step_string(r, l, c) :
           r->is == NUMBER_OF ? step_number(r, l, c) :
           r->is == WORD ? step_word(s, w, l, c, child) :
           step_members(s, w, l, c, child);
}

/* ---- all ways */

static void copy_way(struct way *to, const struct way *from)
{
    to->n = from->n;
    memcpy(to->level, from->level, (size_t)from->n * sizeof *to->level);
}

/* Two that have come to the same are one.  Where there are more than can be
 * kept, the last are given up; the others still end well. */
static void keep_way(struct guide *to, const struct way *w)
{
    for (int i = 0; i < to->n; i++)
        if (to->way[i].n == w->n &&
            memcmp(to->way[i].level, w->level,
                   (size_t)w->n * sizeof *w->level) == 0)
            return;
    if (to->n < MAX_WAYS)
        copy_way(&to->way[to->n++], w);
}

static void enter(struct guide *to, const struct way *w, int rule, int c);

/* Take a byte; w changes.  What there is to say of it goes to `to`. */
static void try_byte(struct guide *to, struct way *w, int c)
{
    int child;

    while (w->n > 0)
        switch (step(to->s, w, &w->level[w->n - 1], c, &child)) {
        case CANNOT:
            return;
        case DEEPER:
            enter(to, w, child, c);
            return;
        case OVER:
            w->n--;
            break;
        case CLOSED:
            w->n--;
            keep_way(to, w);
            return;
        default:
            keep_way(to, w);
            return;
        }
}

/* Begin with this rule, or with each of its alternatives. */
static void enter(struct guide *to, const struct way *w, int rule, int c)
{
    const struct rule *r = &to->s->rule[rule];
    struct way more;

    for (int i = 0; i < (r->is == CHOICE_OF ? r->n : 1); i++) {
        const int one = r->is == CHOICE_OF ?
                        to->s->choice[r->first + i].rule : rule;
        if (!has_room(to->s, w, one))
            continue;
        copy_way(&more, w);
        more.level[more.n++] = (struct level){ (uint16_t)one, 0, 0 };
        try_byte(to, &more, c);
    }
}

/* What is left of the ways after one more byte.  Returns whether any is. */
static int guide_byte(const struct guide *from, struct guide *to, int c)
{
    struct way w = { 0 };

    to->s = from->s;
    to->has_begun = 1;
    to->in_call = from->has_begun ? from->in_call : c == CALL_OPENS;
    to->n = 0;
    if (!from->has_begun)
        enter(to, &w, from->s->root, c);
    for (int i = 0; from->has_begun && i < from->n; i++) {
        copy_way(&w, &from->way[i]);
        try_byte(to, &w, c);
    }
    return to->n > 0;
}

/* May the answer end here? */
static int guide_may_end(const struct guide *g)
{
    struct way w;
    int child, ends = 0;

    for (int i = 0; g->has_begun && i < g->n && !ends; i++) {
        copy_way(&w, &g->way[i]);
        while (w.n > 0 && step(g->s, &w, &w.level[w.n - 1], EOF, &child) ==
               OVER)
            w.n--;
        ends = w.n == 0;
    }
    return ends;
}

/* Does it have to? */
static int guide_is_done(const struct guide *g)
{
    struct guide next;
    int c = guide_may_end(g) ? 1 : 0;

    while (c > 0 && c < 256 && !guide_byte(g, &next, c))
        c++;
    return c == 256;
}

/* ---- from a schema to rules
 *
 * A rule is made empty, and filled when its turn comes; so those that a schema
 * names again and again, or within themselves, are made once. */

enum { IS_NULL = 1, IS_BOOLEAN = 2, IS_INTEGER = 4, IS_NUMBER = 8,
       IS_STRING = 16, IS_ARRAY = 32, IS_OBJECT = 64, IS_ALL = 127,
       VALUES = 128, ANY_OF = 256, REF = 512, ARGS = 1024, LOOSE = 2048,
       MADE = 4096, NOTE = -1 };

static const char type_list[] =
    ": expected null boolean integer number string array object";
static const char *const type_names = type_list + 11;

/* What keywords are about; a NOTE changes nothing. */
static const struct { const char *names; int of; } keywords[] = {
    { "title description default examples deprecated readOnly writeOnly "
      "$schema $id $comment $defs definitions", NOTE },
    { "type", IS_ALL | VALUES }, { "enum const", VALUES }, { "anyOf", ANY_OF },
    { "$ref", REF }, { "properties required additionalProperties", IS_OBJECT },
    { "items minItems maxItems", IS_ARRAY },
    { "minLength maxLength", IS_STRING },
};

static struct json object_type = { .type = JSON_STRING, .s = "object", .n = 6,
                                   .key = "type", .n_key = 4 };
static const struct json anything = { .type = JSON_OBJECT };
static const struct json any_object = { .type = JSON_OBJECT, .n_members = 1,
                                        .first = &object_type };

/* Where a rule is from: a schema, or one type of it, in a whole one. */
struct origin {
    const struct json *from, *whole;
    int types;                            /* 0: all that it says             */
    int parent;                           /* -1: none                        */
    const char *word, *key;               /* where in it; key may be NULL    */
};

struct maker {
    struct schema *s;
    struct origin *origin;                /* [n_rules]                       */
    struct why *why;
    int python;
};

/* " at properties.name" */
static struct phrase place(const struct maker *m, int rule)
{
    struct phrase path = phrase("%s", "");

    for (; rule >= 0; rule = m->origin[rule].parent) {
        const struct origin *o = &m->origin[rule];
        if (o->word)
            path = phrase("%.30s%s%.40s%s%.50s", o->word, o->key ? "." : "",
                          o->key ? o->key : "", path.s[0] ? "." : "", path.s);
    }
    return path.s[0] ? phrase(" at %.120s", path.s) : path;
}

/* Something about a keyword, or what it is the value of. */
static int wrong(const struct maker *m, int at, const char *key,
                 const char *what)
{
    return because(m->why, USAGE, "\"%.60s\"%s%s", key, place(m, at).s, what);
}

static int find_keyword(const char *key)
{
    for (size_t i = 0; i < sizeof keywords / sizeof *keywords; i++)
        if (find_word(keywords[i].names, ' ', key) >= 0)
            return keywords[i].of;
    return 0;
}

/* The types that "type" names, or 0. */
static int named_types(const struct json *type)
{
    const struct json *x = json_is(type, JSON_ARRAY) ? type->first : type;
    int types = 0;

    for (; x; x = type->type == JSON_ARRAY ? x->next : NULL) {
        const int i = find_word(type_names, ' ', json_text(x) ? x->s : "");
        if (i < 0)
            return 0;
        types |= 1 << i;
    }
    return types & IS_NUMBER ? types & ~IS_INTEGER : types;
}

/* What a schema says: types, or one of the others.  Where it does not name its
 * types, they are those that its keywords are about. */
static int kind_of(const struct json *v)
{
    int types = 0;

    if (json_get(v, "$ref") || json_get(v, "anyOf"))
        return json_get(v, "$ref") ? REF : ANY_OF;
    if (json_get(v, "enum") || json_get(v, "const"))
        return VALUES;
    if (json_get(v, "type"))
        return named_types(json_get(v, "type"));
    for (const struct json *x = v->first; x; x = x->next)
        if (find_keyword(x->key) != NOTE)
            types |= find_keyword(x->key) & IS_ALL;
    return types ? types : IS_ALL - IS_INTEGER;
}

/* No keyword but those that are known, and go together. */
static int check_keywords(struct maker *m, const struct json *v, int kind,
                          int at)
{
    for (const struct json *x = v->first; x; x = x->next)
        if (find_keyword(x->key) == 0)
            return wrong(m, at, x->key, " is not known here");
        else if (!(find_keyword(x->key) & kind))
            return wrong(m, at, x->key, " does not go with the rest there");
    return DONE;
}

/* Room for n, from s->rule[rule].first on. */
static int add_choices(struct maker *m, int rule, int n)
{
    struct schema *s = m->s;

    if (n > MAX_WORDS - s->n_choices)
        return because(m->why, USAGE, "a schema of more than %d words",
                       MAX_WORDS);
    s->choice = resize(s->choice, (size_t)(s->n_choices + n) *
                                  sizeof *s->choice);
    for (int i = 0; i < n; i++)
        s->choice[s->n_choices + i] = (struct choice){ .rule = -1 };
    s->rule[rule].first = s->n_choices;
    s->rule[rule].n = n;
    s->n_choices += n;
    return DONE;
}

static int add_rule(struct maker *m, const struct origin *from, int *out)
{
    struct schema *s = m->s;
    const size_t n = (size_t)s->n_rules;

    if (n == MAX_RULES)
        return because(m->why, USAGE, "a schema of more than %d parts",
                       MAX_RULES);
    if ((n & (n - 1)) == 0) {
        s->rule = resize(s->rule, (n ? 2 * n : 1) * sizeof *s->rule);
        m->origin = resize(m->origin, (n ? 2 * n : 1) * sizeof *m->origin);
    }
    s->rule[n] = (struct rule){ .max = INT_MAX, .child = -1, .levels = NEVER,
                                .python = m->python };
    m->origin[n] = *from;
    *out = s->n_rules++;
    return DONE;
}

/* What "#/$defs/name" means in a whole schema, or NULL. */
static const struct json *follow_ref(const struct json *whole, const char *ref)
{
    struct phrase name;

    if (*ref++ != '#')
        return NULL;
    while (whole && *ref == '/') {
        size_t n = 0;
        for (ref++; *ref && *ref != '/' && n < sizeof name.s - 1; ref++)
            name.s[n++] = *ref != '~' || !ref[1] ? *ref :
                          *++ref == '1' ? '/' : '~';
        name.s[n] = '\0';
        if (whole->type == JSON_ARRAY) {
            long i = strtol(name.s, NULL, 10);
            for (whole = whole->first; whole && i > 0; i--)
                whole = whole->next;
        } else
            whole = json_get(whole, name.s);
    }
    return *ref ? NULL : whole;
}

/* The rule for a schema within the one of rule `at`, or for what it refers
 * to. */
static int rule_of(struct maker *m, const struct json *v, int at,
                   const char *word, const char *key, int *out)
{
    const struct json *whole = m->origin[at].whole;
    struct origin o = { v, whole, 0, at, word, key };

    for (int hops = 0; json_get(o.from, "$ref"); hops++) {
        const struct json *ref = json_get(o.from, "$ref");
        if (check_keywords(m, o.from, REF, at) != DONE)
            return USAGE;
        o.from = json_text(ref) && hops < 64 ? follow_ref(whole, ref->s) : NULL;
        if (!o.from)
            return wrong(m, at, "$ref", phrase(" leads nowhere: %.60s",
                         json_text(ref) ? ref->s : "no text").s);
    }
    for (int i = 0; i < m->s->n_rules; i++)
        if (m->origin[i].from == o.from && m->origin[i].types == 0 &&
            m->s->rule[i].python == m->python) {
            *out = i;
            return DONE;
        }
    return add_rule(m, &o, out);
}

/* A number that is a bound, if it is there. */
static int read_bound(struct maker *m, const struct json *v, const char *key,
                      int at, int *out)
{
    const struct json *x = json_get(v, key);
    long long n = *out;

    if (x && json_int(x, 0, INT_MAX, &n) != 0)
        return wrong(m, at, key, ": expected a whole number");
    *out = (int)n;
    return DONE;
}

static int read_bounds(struct maker *m, const struct json *v, const char *least,
                       const char *most, int at)
{
    struct rule *r = &m->s->rule[at];

    if (read_bound(m, v, least, at, &r->min) != DONE ||
        read_bound(m, v, most, at, &r->max) != DONE)
        return USAGE;
    return r->min <= r->max ? DONE :
           wrong(m, at, least, phrase(" is more than \"%s\"", most).s);
}

/* ---- words */

/* Put text[from..] into a choice. */
static int end_word(struct maker *m, struct choice *c, size_t from, int at)
{
    c->from = from;
    c->n = m->s->text.n - from;
    return c->n <= MAX_WORD ? DONE :
           because(m->why, USAGE, "a word%s of %zu bytes, expected at most %d",
                   place(m, at).s, c->n, MAX_WORD);
}

/* A string of JSON, text[from..end), once more in single quotes. */
static void add_single(struct text *t, size_t from, size_t end)
{
    add_string(t, "'");
    for (size_t i = from + 1; i + 1 < end; i++) {
        const char two[2] = { t->s[i], t->s[i + 1] };
        if (two[0] == '\'')
            add_string(t, "\\'");
        else if (two[0] != '\\' || two[1] == '"')
            add(t, two + (two[0] == '\\'), 1);
        else
            add(t, two, 2);
        i += two[0] == '\\';
    }
    add_string(t, "'");
}

/* A value or a key; in Python strings go into two choices, one for each kind of
 * quotes, and anything else into two that are alike. */
static int add_value(struct maker *m, int choice, const struct json *v,
                     const char *behind, int at)
{
    struct text *t = &m->s->text;
    const size_t from = t->n;
    int code;

    if (v->type == JSON_STRING)
        add_json_string(t, v->s, v->n);
    else
        add_tree(t, v, m->python);
    const size_t end = t->n;
    add_string(t, behind);
    code = end_word(m, &m->s->choice[choice], from, at);
    if (code != DONE || !m->python)
        return code;
    m->s->choice[choice + 1] = m->s->choice[choice];
    if (v->type != JSON_STRING)
        return DONE;
    const size_t again = t->n;
    add_single(t, from, end);
    add_string(t, behind);
    return end_word(m, &m->s->choice[choice + 1], again, at);
}

static int type_of(const struct json *v)
{
    static const int type[] = { IS_NULL, IS_BOOLEAN, IS_BOOLEAN, IS_NUMBER,
                                IS_STRING, IS_ARRAY, IS_OBJECT };
    double x = 0.5;

    json_double(v, &x);
    return type[v->type] | (x == floor(x) ? IS_INTEGER : 0);
}

/* Of n values in a row those that are of a type. */
static int add_values(struct maker *m, const struct json *x, int n, int types,
                      int at)
{
    const int each = 1 + m->python;
    int n_good = 0;

    m->s->rule[at].is = WORD;
    if (add_choices(m, at, smaller(n, MAX_WORDS + 1) * each) != DONE)
        return USAGE;
    for (; n > 0; n--, x = x->next)
        if ((type_of(x) & types) && add_value(m, m->s->rule[at].first + each *
                                              n_good++, x, "", at) != DONE)
            return USAGE;
    m->s->rule[at].n = n_good * each;
    return n_good > 0 ? DONE :
           because(m->why, USAGE, "\"enum\" or \"const\"%s: no value is of the "
                   "type", place(m, at).s);
}

static int make_values(struct maker *m, const struct json *v, int at)
{
    const struct json *list = json_get(v, "enum"), *one = json_get(v, "const");
    const struct json *type = json_get(v, "type");
    const int types = type ? named_types(type) : IS_ALL;

    if (!types)
        return wrong(m, at, "type", type_list);
    if (list && (list->type != JSON_ARRAY || one))
        return wrong(m, at, "enum", ": expected an array, and no \"const\"");
    return list ? add_values(m, list->first, list->n_members, types, at) :
           add_values(m, one, 1, types, at);
}

/* ---- members */

/* "required" names properties; is this one of them? */
static int is_in(const struct json *list, const struct json *x)
{
    const struct json *v = list ? list->first : NULL;

    while (v && (v->type != JSON_STRING || v->n != x->n_key ||
                 memcmp(v->s, x->key, v->n) != 0))
        v = v->next;
    return v != NULL;
}

static int check_members(struct maker *m, const struct json *v, int at)
{
    const struct json *list = json_get(v, "required");
    const struct json *properties = json_get(v, "properties");
    const struct json *more = json_get(v, "additionalProperties");
    const struct json *x = json_is(list, JSON_ARRAY) ? list->first : NULL;

    if (list && list->type != JSON_ARRAY)
        return wrong(m, at, "required", ": expected an array");
    if (properties && properties->type != JSON_OBJECT)
        return wrong(m, at, "properties", ": expected an object");
    if (more && (properties || more->type != JSON_OBJECT) &&
        !json_is(more, JSON_FALSE) && !json_is(more, JSON_TRUE))
        return wrong(m, at, "additionalProperties", ": expected false");
    for (; x; x = x->next)
        if (x->type != JSON_STRING || !properties ||
            !find_key(properties, x->s, x->n))
            return wrong(m, at, "required", phrase(" names %.60s, which is no "
                         "property", x->type == JSON_STRING ? x->s :
                         "something").s);
    return DONE;
}

/* The members that a schema names, as a dict or as arguments: key= instead of
 * "key": there.  If they are `loose`, with any values. */
static int make_record(struct maker *m, const struct json *v, int at, int loose)
{
    const int arguments = m->s->rule[at].open == '(';
    const int each = m->python && !arguments ? 2 : 1;
    const struct json *properties = json_get(v, "properties");
    const struct json *required = json_get(v, "required");
    const struct json *x = properties ? properties->first : NULL;
    int i = 0, child;

    m->s->rule[at].is = RECORD;
    if (add_choices(m, at, properties ? properties->n_members * each : 0) !=
        DONE)
        return USAGE;
    for (; x; x = x->next, i += each) {
        const int first = m->s->rule[at].first + i;
        const size_t from = m->s->text.n;
        const struct json key = { .type = JSON_STRING, .s = x->key,
                                  .n = x->n_key };
        if (rule_of(m, loose ? &anything : x, at, "properties", x->key,
                    &child) != DONE)
            return USAGE;
        if (!arguments) {
            if (add_value(m, first, &key, ":", at) != DONE)
                return USAGE;
        } else {
            add(&m->s->text, x->key, x->n_key);
            add_string(&m->s->text, "=");
            if (end_word(m, &m->s->choice[first], from, at) != DONE)
                return USAGE;
        }
        for (int k = 0; k < each; k++)
            m->s->choice[first + k].rule = child;
        m->s->choice[first + each - 1].is_required = is_in(required, x);
    }
    return DONE;
}

static int make_map(struct maker *m, const struct json *values, int at)
{
    static const struct json a_key = { .type = JSON_TRUE };
    const struct origin key = { &a_key, &a_key, IS_STRING, at, NULL, NULL };
    int child, first = 0;

    if (rule_of(m, values, at, "additionalProperties", NULL, &child) != DONE ||
        add_rule(m, &key, &first) != DONE)
        return USAGE;
    m->s->rule[at].is = MAP_OF;
    m->s->rule[at].max = MAX_MEMBERS;
    m->s->rule[at].child = child;
    m->s->rule[at].first = first;
    return DONE;
}

/* An object has the members that its schema names; if it names none, any. */
static int make_object(struct maker *m, const struct json *v, int at)
{
    const struct json *more = json_get(v, "additionalProperties");
    const int no_more = json_is(more, JSON_FALSE);

    m->s->rule[at].open = '{';
    m->s->rule[at].close = '}';
    if (check_members(m, v, at) != DONE)
        return USAGE;
    if (!json_get(v, "properties") && !no_more)
        return make_map(m, json_is(more, JSON_OBJECT) ? more : &anything, at);
    return make_record(m, v, at, 0);
}

static int make_list(struct maker *m, const struct json *v, int at)
{
    const struct json *items = json_get(v, "items");
    int child;

    m->s->rule[at].is = LIST_OF;
    m->s->rule[at].open = '[';
    m->s->rule[at].close = ']';
    if (read_bounds(m, v, "minItems", "maxItems", at) != DONE ||
        rule_of(m, items ? items : &anything, at, "items", NULL, &child) !=
        DONE)
        return USAGE;
    m->s->rule[at].child = child;
    return DONE;
}

/* ---- rules */

/* A schema of several types is a choice of them. */
static int make_types(struct maker *m, int types, int at)
{
    const struct origin was = m->origin[at];
    int n = 0, i = 0, child;

    for (int bit = 1; bit < IS_ALL; bit <<= 1)
        n += (types & bit) != 0;
    m->s->rule[at].is = CHOICE_OF;
    if (add_choices(m, at, n) != DONE)
        return USAGE;
    for (int bit = 1; bit < IS_ALL; bit <<= 1)
        if (types & bit) {
            const struct origin one = { was.from, was.whole, bit, at, NULL,
                                        NULL };
            if (add_rule(m, &one, &child) != DONE)
                return USAGE;
            m->s->choice[m->s->rule[at].first + i++].rule = child;
        }
    return DONE;
}

static int make_any_of(struct maker *m, const struct json *v, int at)
{
    const struct json *list = json_get(v, "anyOf");
    int i = 0, child;

    if (!json_is(list, JSON_ARRAY) || list->n_members == 0 ||
        list->n_members > MAX_WORDS)
        return wrong(m, at, "anyOf", ": expected an array of schemas");
    m->s->rule[at].is = CHOICE_OF;
    if (add_choices(m, at, list->n_members) != DONE)
        return USAGE;
    for (const struct json *x = list->first; x; x = x->next) {
        if (rule_of(m, x, at, "anyOf", NULL, &child) != DONE)
            return USAGE;
        m->s->choice[m->s->rule[at].first + i++].rule = child;
    }
    return DONE;
}

static int make_arguments(struct maker *m, const struct json *v, int at,
                          int loose);

static int make_type(struct maker *m, const struct json *v, int type, int at)
{
    static struct json words[] = {
        { .type = JSON_NULL }, { .type = JSON_FALSE, .next = words + 2 },
        { .type = JSON_TRUE }
    };
    struct rule *r = &m->s->rule[at];

    switch (type) {
    case IS_NULL: return add_values(m, words, 1, IS_ALL, at);
    case IS_BOOLEAN: return add_values(m, words + 1, 2, IS_ALL, at);
    case IS_ARRAY: return make_list(m, v, at);
    case IS_OBJECT: return make_object(m, v, at);
    case IS_STRING: r->is = STRING_OF;
                   return read_bounds(m, v, "minLength", "maxLength", at);
    case IS_INTEGER: case IS_NUMBER: r->is = NUMBER_OF;
                                   r->max = type == IS_NUMBER;
                                   return DONE;
    case ARGS: case LOOSE: return make_arguments(m, v, at, type == LOOSE);
    default: return make_types(m, type, at);
    }
}

static int make_rule(struct maker *m, int at)
{
    const struct json *v = m->origin[at].from;
    int types = m->origin[at].types;

    m->python = m->s->rule[at].python;
    if (types == MADE)
        return DONE;
    if (types)
        return make_type(m, v, types, at);
    if (v->type == JSON_TRUE)
        v = &anything;
    if (v->type != JSON_OBJECT)
        return because(m->why, USAGE, "expected a schema%s", place(m, at).s);
    types = kind_of(v);
    if (!types)
        return wrong(m, at, "type", type_list);
    if (check_keywords(m, v, types, at) != DONE)
        return USAGE;
    return types == ANY_OF ? make_any_of(m, v, at) :
           types == VALUES ? make_values(m, v, at) :
           make_type(m, v, types, at);
}

/* Put what a choice comes to in the end, through choices within it, each once,
 * into to[MAX_WAYS].  How many there are, or more than MAX_WAYS. */
static int flatten(const struct schema *s, int rule, unsigned char *seen,
                   int *to, int n)
{
    const struct rule *r = &s->rule[rule];

    if (seen[rule] || n > MAX_WAYS)
        return n;
    seen[rule] = 1;
    if (r->is != CHOICE_OF) {
        if (n < MAX_WAYS)
            to[n] = rule;
        return n + 1;
    }
    for (int i = 0; i < r->n; i++)
        n = flatten(s, s->choice[r->first + i].rule, seen, to, n);
    return n;
}

static int flatten_all(struct maker *m)
{
    struct schema *s = m->s;
    const int n_rules = s->n_rules;
    unsigned char *seen = zeroed((size_t)n_rules, 1);
    int to[MAX_WAYS], code = DONE;

    for (int i = 0; code == DONE && i < n_rules; i++) {
        if (s->rule[i].is != CHOICE_OF)
            continue;
        memset(seen, 0, (size_t)n_rules);
        const int n = flatten(s, i, seen, to, 0);
        if (n > MAX_WAYS)
            code = wrong(m, i, "anyOf", phrase(": more than %d alternatives",
                                               MAX_WAYS).s);
        else if (n <= s->rule[i].n || (code = add_choices(m, i, n)) == DONE)
            for (int k = s->rule[i].n = n; k-- > 0;)
                s->choice[s->rule[i].first + k].rule = to[k];
    }
    free(seen);
    return code;
}

/* How much of the stack a rule takes at the least, by what is known of
 * others. */
static int least_levels(const struct schema *s, const struct rule *r)
{
    int least = r->is == WORD || r->is == CHOICE_OF ? NEVER : 0;

    for (int i = 0; i < r->n && r->is != MAP_OF; i++) {
        const struct choice *c = &s->choice[r->first + i];
        const int n = c->rule < 0 ? 0 : s->rule[c->rule].levels;
        if (r->is == RECORD && c->is_required)
            least = n > least ? n : least;
        else if (r->is != RECORD)
            least = smaller(n, least);
    }
    if (r->is == LIST_OF && r->min > 0)
        least = s->rule[r->child].levels;
    least += r->is != CHOICE_OF;
    return least <= MAX_LEVELS ? least : NEVER;
}

/* Until nothing changes: what is within itself without an end stays NEVER. */
static void count_levels(struct schema *s)
{
    for (int changed = 1; changed;) {
        changed = 0;
        for (int i = s->n_rules; i-- > 0;) {
            const int n = least_levels(s, &s->rule[i]);
            changed |= n != s->rule[i].levels;
            s->rule[i].levels = n;
        }
    }
}

static int make_all(struct maker *m)
{
    struct schema *s = m->s;
    int code = DONE;

    for (int i = 0; i < s->n_rules && code == DONE; i++)
        code = make_rule(m, i);
    if (code == DONE)
        code = flatten_all(m);
    if (code != DONE)
        return code;
    count_levels(s);
    return s->rule[s->root].levels <= MAX_LEVELS ? DONE :
           because(m->why, USAGE, "no value of this schema ends within %d "
                   "levels", MAX_LEVELS);
}

/* ---- calls */

static int is_name(const char *s, size_t n)
{
    struct reader r = { .at = (char *)(uintptr_t)s };

    return n > 0 && read_name(&r) == n;
}

/* Can all properties be written as key=value? */
static int are_names(const struct json *properties)
{
    const struct json *x = json_is(properties, JSON_OBJECT) ?
                           properties->first : NULL;

    while (x && is_name(x->key, x->n_key))
        x = x->next;
    return !x;
}

/* A rule that has one thing in its brackets. */
static int add_only(struct maker *m, int at, int rule)
{
    m->s->rule[at].is = RECORD;
    if (add_choices(m, at, 1) != DONE)
        return USAGE;
    m->s->choice[m->s->rule[at].first].rule = rule;
    m->s->choice[m->s->rule[at].first].is_required = 1;
    return DONE;
}

/* name(key=value); or name({"a key": value}) where the keys are no names.  If
 * nothing is said of the arguments, there are none. */
static int make_arguments(struct maker *m, const struct json *v, int at,
                          int loose)
{
    int child;

    m->s->rule[at].open = '(';
    m->s->rule[at].close = ')';
    m->s->rule[at].is = RECORD;
    if (v == &anything)
        return DONE;
    if (v->type == JSON_OBJECT && kind_of(v) == IS_OBJECT &&
        json_get(v, "properties") && are_names(json_get(v, "properties"))) {
        if (!loose && (check_keywords(m, v, IS_OBJECT, at) != DONE ||
                       check_members(m, v, at) != DONE))
            return USAGE;
        return make_record(m, v, at, loose);
    }
    if (rule_of(m, loose ? &any_object : v, at, NULL, NULL, &child) != DONE)
        return USAGE;
    v = m->origin[child].from;
    return v->type == JSON_OBJECT && kind_of(v) == IS_OBJECT ?
           add_only(m, at, child) :
           because(m->why, USAGE, "the parameters%s: expected those of an "
                   "object", place(m, at).s);
}

/* How calls are to be written. */
struct call_form {
    const struct json *tools;             /* NULL: none                      */
    const char *name;                     /* only this one; NULL: any        */
    int is_forced, is_single;
};

/* Arguments follow the parameters of a tool that is strict: by its own word, or
 * if it is to be called and does not say that it is not. */
static int is_strict(const struct json *tool, int otherwise)
{
    json_bool(given(function_of(tool), "strict"), &otherwise);
    return otherwise;
}

static int make_tool(struct maker *m, const struct json *tool, int list,
                     int choice, int forced)
{
    const struct json *f = function_of(tool), *name = json_get(f, "name");
    const struct json *v = given(f, "parameters");
    const size_t from = m->s->text.n;

    if (!json_is(name, JSON_STRING) || !is_name(name->s, name->n))
        return because(m->why, USAGE, "a tool is called %.60s, expected a name",
                       json_text(name) ? name->s : "nothing");
    v = v ? v : &anything;
    add(&m->s->text, name->s, name->n);
    const struct origin o = { v, v, is_strict(tool, forced) ? ARGS : LOOSE,
                              list, name->s, NULL };
    return add_rule(m, &o, &m->s->choice[choice].rule) == DONE ?
           end_word(m, &m->s->choice[choice], from, list) : USAGE;
}

/* <|tool_call_start|>[name(arguments), ...]<|tool_call_end|> */
static int make_calls(struct maker *m, const struct call_form *form, int *out)
{
    const struct origin o = { &anything, &anything, MADE, -1, NULL,
                              NULL };
    const struct json *x = form->tools->first;
    int list, name, n = 0;

    m->python = 1;
    if (add_rule(m, &o, out) != DONE || add_rule(m, &o, &list) != DONE ||
        add_rule(m, &o, &name) != DONE || add_only(m, *out, list) != DONE ||
        form->tools->n_members > MAX_WORDS ||
        add_choices(m, name, form->tools->n_members) != DONE)
        return because(m->why, USAGE, "too many tools");
    m->s->rule[*out].open = CALL_OPENS;
    m->s->rule[*out].close = CALL_CLOSES;
    m->s->rule[name].is = WORD;
    m->s->rule[list].is = LIST_OF;
    m->s->rule[list].open = '[';
    m->s->rule[list].close = ']';
    m->s->rule[list].child = name;
    m->s->rule[list].min = 1;
    m->s->rule[list].max = form->is_single ? 1 : INT_MAX;
    for (; x; x = x->next)
        if (!form->name || is_word(json_get(function_of(x), "name"),
                                   form->name)) {
            if (make_tool(m, x, name, m->s->rule[name].first + n++,
                          form->is_forced) != DONE)
                return USAGE;
        }
    m->s->rule[name].n = n;
    return n > 0 ? DONE : because(m->why, USAGE, "\"tool_choice\": no tool is "
                                  "called %.60s", form->name);
}

/* ---- what a request asks for */

static void free_schema(struct schema *s)
{
    if (!s)
        return;
    free(s->rule);
    free(s->choice);
    free(s->text.s);
    free(s);
}

/* The rules for an answer of this schema, or for calls, or for either. */
static int make_schema(const struct json *answer, const struct call_form *calls,
                       struct schema **out, struct why *why)
{
    struct schema *s = zeroed(1, sizeof *s);
    struct maker m = { .s = s, .why = why };
    const struct origin o = { answer, answer, MADE, -1, NULL, NULL };
    int code = add_rule(&m, &o, &s->root), rule[2], n = 0;

    if (answer && code == DONE)
        code = rule_of(&m, answer, s->root, NULL, NULL, &rule[n++]);
    if (calls && code == DONE)
        code = make_calls(&m, calls, &rule[n++]);
    if (code == DONE)
        code = add_choices(&m, s->root, n);
    if (code == DONE) {
        s->rule[s->root].is = CHOICE_OF;
        for (int i = 0; i < n; i++)
            s->choice[s->rule[s->root].first + i].rule = rule[i];
        code = make_all(&m);
    }
    free(m.origin);
    if (code != DONE)
        free_schema(s);
    else
        *out = s;
    return code;
}

/* Members of `x` that are not in the list of words. */
static int check_words(const struct json *x, const char *words, struct why *why)
{
    for (x = x ? x->first : NULL; x; x = x->next)
        if (find_word(words, ' ', x->key) < 0)
            return because(why, USAGE, "\"%.60s\" in \"response_format\" is "
                           "not known here", x->key);
    return DONE;
}

/* "response_format"; without one, --json-schema. */
static int read_format(const struct engine *e, const struct json *body,
                       const struct json **out, struct why *why)
{
    const struct json *x = given(body, "response_format");
    const struct json *named = given(x, "json_schema");
    const struct json *type = given(x, "type");

    *out = x ? NULL : e->schema;
    if (!x || is_word(type, "text"))
        return DONE;
    if (is_word(type, "json_schema"))
        *out = given(named, "schema");
    else if (is_word(type, "json_object") && !named)
        *out = &any_object;
    if (!*out)
        return because(why, USAGE, "\"response_format\": expected a \"type\" "
                       "of text, json_object, or json_schema with its "
                       "\"schema\" in \"json_schema\"");
    return check_words(x, "type json_schema", why) != DONE ? USAGE :
           check_words(named, "name description strict schema", why);
}

/* "tool_choice" and "parallel_tool_calls"; *form has no tools if none are to be
 * called, or if any text may be a call. */
static int read_call_form(const struct json *body, const struct json *tools,
                          int has_answer, struct call_form *form,
                          struct why *why)
{
    const struct json *choice = given(body, "tool_choice");
    const struct json *name = json_get(function_of(choice), "name");
    int parallel = 1, strict = has_answer;

    if (read_flag(body, "parallel_tool_calls", &parallel, why) != DONE)
        return USAGE;
    tools = json_is(tools, JSON_ARRAY) && tools->first ? tools : NULL;
    *form = (struct call_form){
        .tools = tools, .name = json_text(name),
        .is_forced = is_word(choice, "required") || json_text(name),
        .is_single = !parallel || json_text(name)
    };
    if (choice && !form->is_forced && !is_word(choice, "auto") &&
        !is_word(choice, "none"))
        return because(why, USAGE, "\"tool_choice\": expected none, auto, "
                       "required or a function");
    if (form->is_forced && !tools)
        return because(why, USAGE, "\"tool_choice\": there are no tools");
    for (const struct json *x = tools ? tools->first : NULL; x; x = x->next)
        strict |= is_strict(x, 0);
    if (is_word(choice, "none") || (!form->is_forced && parallel && !strict))
        form->tools = NULL;
    return DONE;
}

/* How the answer has to look. */
static int read_form(const struct engine *e, struct request *q,
                     const struct json *body, const struct json *tools,
                     struct why *why)
{
    const struct json *answer;
    struct call_form calls;
    int code = read_format(e, body, &answer, why);

    if (code == DONE)
        code = read_call_form(body, q->is_completion ? NULL : tools,
                              answer != NULL, &calls, why);
    if (code != DONE)
        return code;
    if (calls.tools && (lfm2_token_id(e->words, CALL_START) < 0 ||
                        lfm2_token_id(e->words, CALL_END) < 0)) {
        if (calls.is_forced)
            return because(why, USAGE, "\"tool_choice\": this model has no "
                           "tokens for calls");
        calls.tools = NULL;
    }
    if (calls.is_forced)
        answer = NULL;
    if (!answer && !calls.tools)
        return DONE;
    code = make_schema(answer, calls.tools ? &calls : NULL, &q->schema, why);
    if (code == DONE) {
        q->schema->only_calls = !answer && !calls.is_forced;
        q->schema->one_call = calls.is_single;
    }
    return code;
}

/* ---- choosing tokens
 *
 * The vocabulary is walked in the order of its bytes, so that what tokens begin
 * with is tried once for all of them. */

enum { MAX_BLANKS = 4, LONGEST = 64 };

/* A token, how many bytes it shares with the one before, and how many
 * characters of a string it is; 0 if it is anything else there. */
struct spelled { const char *s; int32_t id; uint8_t n, shared, length; };

struct spelling {
    struct spelled *token;                /* [n], in order                   */
    int n;
    uint8_t *fits;                        /* by id                           */
    struct guide guide[LONGEST + 1];      /* after so many bytes             */
};

static int by_bytes(const void *a, const void *b)
{
    const struct spelled *x = a, *y = b;
    const int order = memcmp(x->s, y->s, x->n < y->n ? x->n : y->n);

    return order ? order : (x->n > y->n) - (x->n < y->n);
}

/* Whole characters that are nothing but themselves in any string. */
static uint8_t string_length(const struct spelled *t)
{
    const char *s = t->s, *const end = s + t->n;
    uint8_t n = 0;
    uint32_t c;

    for (int size; s < end; s += size, n++) {
        size = utf8_get(s, end, &c);
        if (size == 0 || c < ' ' || strchr("\"'\\<|", *s))
            return 0;
    }
    return n;
}

/* Tokens that could be part of an answer; none has a new line. */
static void spell_tokens(struct engine *e)
{
    const int n_vocab = lfm2_n_vocab(e->words);
    const int32_t opens = lfm2_token_id(e->words, CALL_START);
    const int32_t closes = lfm2_token_id(e->words, CALL_END);
    struct spelling *to = e->spelling = zeroed(1, sizeof *to);

    to->token = zeroed((size_t)n_vocab, sizeof *to->token);
    to->fits = zeroed((size_t)lfm2_model_config(e->model)->n_vocab, 1);
    for (int32_t id = 0; id < n_vocab; id++) {
        int n, k = 0;
        const char *s = lfm2_token_bytes(e->words, id, 0, &n);
        while (k < n && k < LONGEST && (unsigned char)s[k] >= ' ')
            k++;
        if (id == opens || id == closes)
            to->token[to->n++] = (struct spelled){ id == opens ? "\1" : "\2",
                                                   id, 1, 0, 0 };
        else if (n > 0 && k == n)
            to->token[to->n++] = (struct spelled){ s, id, (uint8_t)n, 0, 0 };
    }
    if (to->n > 0)
        qsort(to->token, (size_t)to->n, sizeof *to->token, by_bytes);
    for (int i = 0; i < to->n; i++) {
        struct spelled *t = &to->token[i];
        while (i > 0 && t->shared < t->n && t->shared < t[-1].n &&
               t->s[t->shared] == t[-1].s[t->shared])
            t->shared++;
        t->length = string_length(t);
    }
}

static void free_spelling(struct spelling *s)
{
    if (s) {
        free(s->token);
        free(s->fits);
        free(s);
    }
}

static void copy_guide(struct guide *to, const struct guide *from)
{
    memcpy(to, from, offsetof(struct guide, way));
    for (int i = 0; i < from->n; i++)
        copy_way(&to->way[i], &from->way[i]);
}

/* How many characters of a string may follow here. */
static int string_room(const struct guide *g)
{
    int room = 0;

    for (int i = 0; i < g->n; i++) {
        const struct level *l = &g->way[i].level[g->way[i].n - 1];
        if (g->way[i].n > 0 && g->s->rule[l->rule].is == STRING_OF &&
            (l->state & ~SINGLE) == BODY) {
            const int max = g->s->rule[l->rule].max;
            const int more = max < INT_MAX ? max - l->at : max;
            room = more > room ? more : room;
        }
    }
    return room;
}

/* Find all tokens that fit. */
static void walk_tokens(struct spelling *all, const struct guide *g)
{
    const int room = string_room(g);
    int common = 0, deep = 0, is_dead = 0;

    copy_guide(&all->guide[0], g);
    for (int i = 0; i < all->n; i++) {
        const struct spelled *t = &all->token[i];
        common = smaller(common, t->shared);
        if (t->length > 0 && t->length <= room)
            all->fits[t->id] = 1;
        else if (!is_dead || common <= deep) {
            deep = smaller(common, deep);
            while (deep < t->n && guide_byte(&all->guide[deep],
                                             &all->guide[deep + 1],
                                             (unsigned char)t->s[deep]))
                deep++;
            is_dead = deep < t->n;
            all->fits[t->id] = !is_dead;
            common = INT_MAX;
        }
    }
}

/* Where in a token the answer begins: behind the end of a thought, and blanks.
 * Returns 0 if it must not look so. */
static int skip_to_answer(const struct reply *r, struct piece *token)
{
    const size_t held = r->raw.n - r->seen;
    size_t blank = r->part == AFTER_THOUGHT ? held : 0, n = token->n;
    struct text both = { 0 };
    const char *end = NULL;

    if (r->part == AT_START && held == 0 && n == strlen(THINK) &&
        memcmp(token->s, THINK, n) == 0)
        n = 0;
    if (r->part == IN_THOUGHT) {
        add(&both, r->raw.s + r->seen, held);
        add(&both, token->s, n);
        end = find(both.s, both.s + both.n, THINK_END);
        n = end ? (size_t)(both.s + both.n - end) - strlen(THINK_END) : 0;
        free(both.s);
    }
    token->s += token->n - n;
    token->n = n;
    while ((end || r->part == AFTER_THOUGHT) && token->n > 0 &&
           strchr(" \n\r\t", *token->s)) {
        token->s++;
        token->n--;
        blank++;
    }
    return blank <= MAX_BLANKS;
}

/* Take a token; 0 if it does not fit, and then the guide is lost. */
static int guide_token(const struct reply *r, struct guide *g, const char *s,
                       size_t n)
{
    const int is_start = n == strlen(CALL_START) &&
                         memcmp(s, CALL_START, n) == 0;
    const int is_end = n == strlen(CALL_END) && memcmp(s, CALL_END, n) == 0;
    const int is_free = !g->has_begun && (r->part == IN_THOUGHT ||
                                          (g->s->only_calls && !is_start));
    struct piece token = is_start ? (struct piece){ "\1", 1 } :
                         is_end ? (struct piece){ "\2", 1 } :
                         (struct piece){ s, n };
    struct guide next;

    if (is_free && (g->s->only_calls || n == 0))
        return 1;
    if (n == 0 || (!g->has_begun && !skip_to_answer(r, &token)))
        return 0;
    for (size_t i = 0; i < token.n; i++) {
        const int c = (unsigned char)token.s[i];
        if ((c < ' ' && !is_start && !is_end) || !guide_byte(g, &next, c))
            return 0;
        copy_guide(g, &next);
    }
    return 1;
}

/* May the model end its turn here? */
static int may_stop(const struct reply *r)
{
    const struct guide *g = r->guide;

    return g->s->only_calls && !g->has_begun ? 1 : guide_may_end(g);
}

static int may_say(const struct engine *e, const struct reply *r, int32_t id)
{
    struct guide copy;
    int n;
    const char *s = visible(e, id, &n);

    if (is_end(e, r, id))
        return may_stop(r);
    copy_guide(&copy, r->guide);
    return guide_token(r, &copy, s, (size_t)n);
}

/* The model's choice does not fit: it chooses once more, of what does. */
static int32_t ask_again(struct engine *e, struct reply *r, float *logits)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;
    const double began = seconds();
    uint8_t *fits = e->spelling->fits;
    int32_t id;

    memset(fits, 0, (size_t)n_vocab);
    if (!r->guide->has_begun && r->part == IN_THOUGHT)
        for (id = 0; id < lfm2_n_vocab(e->words); id++)
            fits[id] = (uint8_t)may_say(e, r, id);
    else
        walk_tokens(e->spelling, r->guide);
    for (int i = 0; i < e->ends.n; i++)
        fits[e->ends.id[i]] = (uint8_t)may_stop(r);
    for (int i = 0; i < r->n_stop_ids; i++)
        fits[r->stop_id[i]] = (uint8_t)may_stop(r);
    for (id = 0; id < n_vocab; id++)
        if (!fits[id])
            logits[id] = -INFINITY;
    r->n_again++;
    r->again += seconds() - began;
    id = lfm2_sample(e->ctx, &r->sampler, logits, NULL, 0);
    if (id < 0)
        r->finish = guide_may_end(r->guide) ? STOPPED : BY_LENGTH;
    return id;
}

/* Begin to guide an answer. */
static void start_guide(struct engine *e, struct reply *r)
{
    if (!r->q->schema)
        return;
    if (!e->spelling)
        spell_tokens(e);
    r->guide = zeroed(1, sizeof *r->guide);
    r->guide->s = r->q->schema;
}

/* After a token: an answer that is complete ends.  Where there may be text
 * around calls, another may follow. */
static void end_guided(struct reply *r)
{
    if (!guide_is_done(r->guide))
        return;
    if (r->guide->s->only_calls && !r->guide->s->one_call)
        r->guide->has_begun = 0;
    else
        r->finish = STOPPED;
}

/* Is this the text of an answer that must not look like a call? */
static int is_guided_text(const struct reply *r)
{
    return r->guide && r->guide->has_begun && !r->guide->in_call &&
           r->part == IN_TEXT;
}

/* ---- --json-schema */

static int open_schema(struct engine *e)
{
    const char *path = e->s->json_schema;
    struct schema *made;
    struct text text = { 0 };
    struct why why;
    int code = read_text_file(path, &text);

    if (code != DONE)
        return code;
    code = json_parse(&e->pool, text.s, text.n, &e->schema, &why);
    if (code == DONE)
        code = make_schema(e->schema, NULL, &made, &why);
    free(text.s);
    if (code != DONE)
        return say(code, "%s: %s", path, why.s);
    free_schema(made);
    return DONE;
}

static void close_schema(struct engine *e)
{
    pool_free(&e->pool);
    free_spelling(e->spelling);
}
