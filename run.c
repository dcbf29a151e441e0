/* run.c - the command line and the server of lfm2.c.
 *
 * Standard output carries the model's words, or the data that was asked for,
 * and nothing else; messages to the user go to standard error.
 *
 * Sections 2 to 10 are the program, in reading order; the others are the parts
 * that it is made of.
 *
 *   1  messages, memory, text          13  signals and the terminal
 *   2  settings and main               14  JSON
 *   3  request, reply, step            15  chat templates
 *   4  opening a model                 16  tool calls
 *   5  writing replies                 17  tokens in and out
 *   6  reading requests                18  --inspect
 *   7  answers, conversations          19  traces
 *   8  chat                            20  --ppl
 *   9  --batch                         21  --bench
 *  10  --serve                         22  --selftest
 *  11  the command line                23  the sandbox
 *  12  files and text                  24  answers in a schema */

#ifdef __cplusplus
#error "this is C: compile it with a C compiler; C++ includes lfm2.h"
#include "a C compiler"                   /* fatal, unlike #error            */
#endif

#define _POSIX_C_SOURCE 200809L
#define _GNU_SOURCE                       /* mincore(), memmem()             */
#define _DARWIN_C_SOURCE                  /* macOS: ru_maxrss                */
#define _FILE_OFFSET_BITS 64              /* large files on 32-bit machines  */

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
 * tell whether a read would block. */
#define poll(fds, n, timeout) ((void)(fds), (void)(timeout), 1)

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

static char *realpath(const char *name, char *to)
{
    (void)to;
    return access(name, F_OK) == 0 ? strdup(name) : NULL;
}

#endif

/* ---------------------------------------------- 1. Messages, memory and text
 *
 * A function that can fail returns one of these exit codes; it has printed the
 * reason, or written it to a `struct why`.  Scripts rely on the numbers, so
 * their meaning never changes. */

enum {
    DONE = 0, FAILED = 1, USAGE = 2, BAD_FILE = 3, BAD_MODEL = 4,
    NO_MEMORY = 5, TOO_LONG = 6, PARTLY = 7, SELFTEST_FAILED = 8,
    INTERRUPTED = 130, TERMINATED = 143
};

static const char *program = "run";       /* from argv[0]                    */

static size_t drop_controls(char *s, size_t n);

/* Print one line on standard error; returns `code`, so that a caller can return
 * say(...).  As it may quote hostile text, control characters are dropped. */
static int say(int code, const char *fmt, ...)
{
    char s[4096] = "";
    const int error = errno;
    va_list args;

    va_start(args, fmt);
    vsnprintf(s, sizeof s, fmt, args);
    va_end(args);
    s[drop_controls(s, strlen(s))] = '\0';
    fprintf(stderr, "%s: %s\n", program, s);
    errno = error;
    return code;
}

static int quiet;                         /* -q: errors only                 */

/* A message that is not an error. */
#define note(...) ((void)(quiet || say(DONE, __VA_ARGS__)))

/* The reason for an error, where the caller decides how it is reported. */
struct why { char s[240]; };

static int because(struct why *why, int code, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    vsnprintf(why->s, sizeof why->s, fmt, args);
    va_end(args);
    return code;
}

/* Drop json_parse()'s "line 1, ", where the JSON is only one line anyway. */
static const char *without_line(const struct why *why)
{
    return strncmp(why->s, "line 1, ", 8) ? why->s : why->s + 8;
}

static int short_usage(void)
{
    fprintf(stderr, "usage: %s [options] MODEL.gguf [PROMPT]\n"
            "       %s -h lists the options\n", program, program);
    return USAGE;
}

#define usage(...) (say(USAGE, __VA_ARGS__), short_usage())

/* The exit status for an error of the library. */
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

/* Flush standard output.  Returns `code`, or BAD_FILE if the output could not
 * be written, which is reported unless the reader closed the pipe.  A signal
 * during a blocked write (after Ctrl-S, say) discards the pending output. */
static int flush_output(int code)
{
    const int failed = fflush(stdout) != 0 || ferror(stdout);

    if (failed && errno == EINTR)
        clearerr(stdout);
    else if (failed && (code == DONE || code == INTERRUPTED))
        return errno == EPIPE ? BAD_FILE :
               say(BAD_FILE, "standard output: %s", strerror(errno));
    return code;
}

/* ---- memory
 *
 * When memory runs out, the program says so and exits: what it has written so
 * far is intact, and a batch can be resumed. */

/* realloc() that never returns NULL. */
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
    void *p = calloc(n ? n : 1, size);

    if (!p)
        exit(say(NO_MEMORY, "no memory for %zu times %zu bytes", n, size));
    return p;
}

/* ---- text and numbers */

/* A string that can grow.  s[n] is NUL; s is NULL before the first byte. */
struct text { char *s; size_t n, cap; };

struct ids { int32_t *id; int n; };

/* Make room for `more` bytes and the NUL. */
static void reserve(struct text *t, size_t more)
{
    size_t cap = t->cap;

    while (cap <= t->n + more && cap <= SIZE_MAX / 2)
        cap = 2 * cap + 64;
    if (cap > t->cap)
        t->s = resize(t->s, cap);
    t->cap = cap;
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

/* As printf() would write it, but no more than 255 bytes. */
static void add_format(struct text *t, const char *fmt, ...)
{
    char s[256] = "";
    va_list args;

    va_start(args, fmt);
    vsnprintf(s, sizeof s, fmt, args);
    va_end(args);
    add_string(t, s);
}

/* Part of a text, without a NUL. */
struct piece { const char *s; size_t n; };

static int same(const char *s, size_t n, const char *word)
{
    return n == strlen(word) && memcmp(s, word, n) == 0;
}

/* A short string that is passed by value; a longer one is cut. */
struct phrase { char s[128]; };

static struct phrase *write_phrase(struct phrase *out, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    vsnprintf(out->s, sizeof out->s, fmt, args);
    va_end(args);
    return out;
}

/* phrase("%d", n).s is the string.  A macro, because tcc 0.9.27 miscompiles
 * variadic functions that return a struct. */
#define phrase(...) (*write_phrase(&(struct phrase) { "" }, __VA_ARGS__))

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

/* ---- types of later sections */

/* Section 14: memory that is freed all at once, and parsed JSON, which does not
 * change.  The fields from `key` on are the place of a value in its parent. */
struct chunk { struct chunk *next; size_t used, size; };

struct pool { struct chunk *chunks; size_t total; };

enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY,
       JSON_OBJECT };

struct json {
    int type;
    int n_members;
    const char *s;                        /* a string or number, as text     */
    size_t n;
    struct json *first;                   /* member                          */
    const char *key;                      /* NULL: in an array               */
    size_t n_key;
    struct json *next;
};

/* Section 15: chat templates, in the order of --template's words, and control
 * tokens that they write. */
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
    int generate;                         /* end by opening an answer        */
    int keep_thinking;                    /* even in past answers            */
    int continue_last;                    /* leave the last message open     */
    int open_thought;                     /* begin the answer with <think>   */
};

struct mark { size_t from; const char *token; };

struct rendered {
    struct text text;
    struct mark *mark;                    /* control tokens, in order        */
    int n_marks;
    int lost_calls;                       /* the template dropped tool calls */
};

/* Section 16: a tool call of the model; the arguments are a JSON object. */
struct call { struct piece name, arguments; };

struct calls { struct call *call; int n; struct pool pool; };

/* Section 13. */
static volatile sig_atomic_t is_dim;      /* the terminal shows dim text     */
static volatile sig_atomic_t interrupted, last_signal;
static volatile sig_atomic_t is_polled;    /* `interrupted` is being polled   */
static lfm2_context *volatile running;    /* a signal cancels this           */

/* Section 19. */
struct trace {
    const struct settings *s;
    int code;                             /* DONE, or the first error        */
    int first, last;                      /* positions to trace              */
    struct trace_file {
        const char *path;                 /* NULL: not wanted                */
        int fd;
        struct text text;                 /* to be written next              */
    } records, raw;
    uint64_t offset;                      /* in raw                          */
    int has_some;                         /* activations were recorded       */
};

/* ------------------------------------------------------ 2. Settings and main
 *
 * What the command line asks for; section 11 reads it. */

enum {
    UNSET = INT_MIN,                      /* depends on the model            */
    MAX_CTX = 1 << 24, MAX_LIST = 16, MAX_LOOKUP = 15, MAX_LOGPROBS = 20,
    MAX_OPTIONS = 112,
    PLAIN_LENGTH = 256                    /* tokens of plain text, unless -n */
};

/* What to do, as bits: an option lists the modes in which it is allowed. */
enum mode {
    ANSWER = 1, CHAT = 2, BATCH = 4, LOGITS = 8, DUMP = 16, TOKENIZE = 32,
    DETOKENIZE = 64, EXPORT = 128, INSPECT = 256, PPL = 512, BENCH = 1024,
    SELFTEST = 2048, SERVE = 4096,
    TALK = ANSWER | CHAT, PROMPT = TALK | LOGITS | DUMP,
    REQUESTS = BATCH | SERVE, GENERATE = TALK | REQUESTS,
    RUN = GENERATE | LOGITS | DUMP | PPL,
    WORDS = TOKENIZE | DETOKENIZE | EXPORT, ANY = 2 * SERVE - 1
};

struct list { int n, v[MAX_LIST]; };      /* numbers, separated by commas    */

struct texts { int n; const char *v[MAX_LIST]; };     /* a repeated option   */

struct sampling {
    double temp;
    int top_k;
    double top_p, min_p, repeat;
    int last_n;                           /* -1: all                         */
};

/* What to answer, and how.  The fields down to `stop` can be set by options and
 * by members of a JSON request. */
struct request {
    struct sampling sampling;
    double presence, frequency;           /* penalties                       */
    int limit;                            /* most tokens; < 0: no limit      */
    int think_budget;                     /* tokens of thought; -1: no limit */
    int ignore_eos, echo;                 /* echo: repeat the prompt         */
    int stream, n_choices;                /* with --serve only               */
    int logprobs, prompt_logprobs;        /* how many alternatives; -1: off  */
    long long seed;                       /* -1: random                      */
    struct texts stop;
    struct pool pool;                     /* for stop strings of a request   */
    struct bias { int32_t id; float by; } *bias;
    int n_bias;
    struct ids prompt;
    struct schema *schema;                /* NULL: any text                  */
    int is_completion;                    /* of plain text, not of messages  */
    int in_thought;                       /* the prompt ends inside one      */
};

struct settings {
    int mode;                             /* 0: none given                   */
    const char *given[MAX_OPTIONS];       /* the name used; in table order   */
    const char *model, *prompt, *file, *system, *system_file, *messages;
    const char *tools, *session, *save_dir, *ids, *logits, *export_to;
    const char *tokenizer, *ppl, *date, *trace, *trace_tokens, *trace_raw;
    const char *shard, *resume, *json_schema, *serve, *api_key_file, *cors;
    const char *page;
    struct texts trace_filter;
    struct request ask;
    int raw, dump_prompt, dump_tokens, null, bos, special, json;
    int template, think, color, sandbox, quiet, verbose, help, version;
    int ctx, threads, batch, isa, kv, lookup, no_mmap, parallel, piece;
    int queue, max_body;
    struct list bench_prompt, bench_gen, bench_depth, bench_threads;
    struct list bench_seqs;
    int reps, output;
};

/* In the order of the words that --think, --color, --sandbox and -o take. */
enum { THINK_AUTO, THINK_SHOW, THINK_HIDE, THINK_RAW };
enum { COLOR_AUTO, COLOR_ON, COLOR_OFF };
enum { SANDBOX_AUTO, SANDBOX_REQUIRE, SANDBOX_OFF };
enum { MD, JSON };

static const struct settings defaults = {
    .ask = {
        .sampling = { UNSET, UNSET, UNSET, UNSET, UNSET, UNSET },
        .limit = UNSET, .think_budget = -1, .logprobs = -1,
        .prompt_logprobs = -1, .seed = -1, .n_choices = 1
    },
    .ctx = UNSET, .batch = UNSET, .lookup = UNSET, .parallel = 32,
    .piece = UNSET, .queue = 1024, .max_body = 8,
    .bench_prompt = { 1, { 512 } }, .bench_gen = { 1, { 128 } },
    .bench_depth = { 1, { 0 } }, .bench_threads = { 1, { 0 } },
    .bench_seqs = { 1, { 1 } }, .reps = 5
};

enum kind {
    HEADING, FLAG, WHOLE, SEED, REAL, CHOICE,
    TEXT, DATE, RANGE, IN_FILE, OUT_FILE, /* not more than once              */
    TEXTS, LIST,
    IGNORED, IGNORED_FLAG, REFUSED        /* options of other programs       */
};

/* A row of the table in section 11.  One without names is only a member of JSON
 * requests; one without help is not listed. */
struct option {
    enum kind kind;
    const char *names;                    /* separated by spaces             */
    const char *arg;                      /* for a CHOICE: its words, with | */
    size_t at;                            /* offset in struct settings       */
    double min, max;
    const char *json;                     /* JSON member names, likewise     */
    int modes, mode;                      /* valid in; selected, or 0        */
    const char *help;
};

#define AT(field) offsetof(struct settings, field)

/* ---- functions of later sections */

struct engine;
struct talk;
struct reply;
struct guide;

/* 8. Chat */
static int chat(struct talk *t);

/* 11. The command line */
static int find_word(const char *words, int separator, const char *word);
static const struct option *option_of_member(const char *key);
static const char *isa_name(int isa);
static const char *kv_name(int kv_type);
static struct phrase values_of(const struct option *o);
static int add_text(struct texts *to, const char *s);
static int set_number(void *slot, const struct option *o, double x,
                      long long whole);
static int is_dash(const char *path);
static const char *chat_option(const struct settings *s);
static int parse(struct settings *to, char **argv);

/* 12. Characters, numbers and files; a hash starts as HASH_START */
#define HASH_START 0xcbf29ce484222325u
static void lower(char *s, size_t n);
static int compare(const char *a, size_t n_a, const char *b, size_t n_b);
static int utf8_get(const char *s, const char *end, uint32_t *out);
static int is_control(uint32_t c);
static struct phrase amount(double n, const char *unit);
static void put_le(unsigned char *p, uint64_t x, int n_bytes);
static uint64_t get_le(const unsigned char *p, int n_bytes);
static void add_le(struct text *to, uint64_t x, int n_bytes);
static uint32_t float_bits(float x);
static uint64_t hash_number(uint64_t h, uint64_t x);
static uint64_t hash_bytes(uint64_t h, const char *s, size_t n);
static uint64_t hash_floats(uint64_t h, const float *x, int n);
static void show_text(struct text *t);
static int read_file(const char *path, struct text *out);
static FILE *create_file(const char *path);
static int finish_file(FILE *f, const char *path, int code);
static int write_all(int fd, const char *s, size_t n);
static int replace_file(const char *path, const struct text *t);
static int open_file(lfm2_model **out, const char *path, int no_mmap, int any,
                     lfm2_error *err);
static int report(const char *path, const lfm2_error *err);
static void clean_text(struct text *t);
static int check_text(const struct text *t, const char *name);
static int read_text_file(const char *path, struct text *out);
static int read_prompt(const struct settings *s, struct text *out);
static int read_ids(const char *path, struct ids *out);

/* 13. Signals and the terminal */
static void block_signals(int are_blocked);
static void watch_file(const char *path);
static int read_message(struct text *out, int shows);
static void prepare_process(char **argv);

/* 14. JSON */
static void *pool_get(struct pool *p, size_t n);
static void pool_free(struct pool *p);
static size_t utf8_put(char *out, uint32_t c);
static int json_is(const struct json *v, int type);
static struct json *json_get(const struct json *object, const char *key);
static const struct json *member(const struct json *object, const char *key);
static const char *json_text(const struct json *v);
static int json_bool(const struct json *v, int *out);
static int json_double(const struct json *v, double *out);
static int json_int(const struct json *v, long long least, long long most,
                    long long *out);
static int json_parse(struct pool *pool, const char *text, size_t n,
                      struct json **out, struct why *why);
static void add_json(struct text *t, const struct json *v);
static void add_members(struct text *to, const char *format, ...);

/* 15. Chat templates */
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

/* 16. Tool calls */
static void free_calls(struct calls *calls);
static int parse_calls(const char *s, size_t n, int cut, struct calls *out,
                       struct text *rest);

/* 17. Tokens in and out */
static int open_words(const struct settings *s, const lfm2_model *model,
                      lfm2_tokenizer **out);
static void encode_plain(const struct settings *s, const lfm2_tokenizer *words,
                         const char *text, size_t n, struct ids *out);

/* 19. Traces */
static int open_trace(struct engine *e);
static int close_trace(struct engine *e, int code);

/* 23. The sandbox */
static const char *save_dir(const struct settings *s);
static int enter_sandbox(const struct settings *s);
static int write_session(const char *path, const struct text *t);

/* 24. Answers in a schema */
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
static int32_t resample(struct engine *e, struct reply *r, float *logits);

/* What the program can do: sections 7, 9 to 11, 17, 18, and 20 to 22. */
typedef int task(const struct settings *s);

static task work_on_model, batch, serve, work_on_words, inspect_file,
            perplexity, bench;
static int print_help(void), print_version(void), selftest(void);

static int work(const struct settings *s)
{
    if (s->help || s->version)
        return s->help ? print_help() : print_version();
    switch (s->mode) {
    case SELFTEST: return selftest();
    case TOKENIZE: case DETOKENIZE: case EXPORT: return work_on_words(s);
    case PPL: return perplexity(s);
    case BENCH: return bench(s);
    case INSPECT: return inspect_file(s);
    case BATCH: return batch(s);
    case SERVE: return serve(s);
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

/* --------------------------------------------------- 3. Request, reply, step
 *
 * Whatever is to be answered is a job: a request, and the reply to it, which
 * grows token by token.  The job's sink does something with the new text.
 *
 *     command line, chat --.             .-- the screen, or one JSON object
 *     a line of --batch  --+--> jobs --> +-- a line of JSON
 *     a body over HTTP   --'             '-- a response, or events
 *
 * engine_step() gives waiting jobs a slot, which is a sequence of the context;
 * feeds the next tokens of all active jobs to one lfm2_forward(); samples a
 * token for each of them; and calls their sinks. */

enum finish { UNFINISHED, STOPPED, BY_LENGTH, BY_CONTEXT, BROKEN };

/* The part of an answer that its next byte belongs to. */
enum part {
    AT_START, IN_THOUGHT, AFTER_THOUGHT, IN_TEXT, IN_CALL, IN_PLAIN_TEXT
};

/* A token and the likeliest tokens in its place, with log probabilities. */
struct scored { int32_t id; double logprob; };

struct score { struct scored token, top[MAX_LOGPROBS + 1]; int n_top; };

struct scores { struct score *v; int n; };

/* The first n_fed of its tokens are in the cache:
 *
 *     0              n_reused     prompt.n        n_fed     ids.n
 *     |           prompt          |       answer so far       |
 *     | from before  |     fed to a forward       |  to feed  | */
struct reply {
    const struct request *q;
    int seq;                              /* sequence, and number of a slot  */
    int keeps_marks;                      /* --think raw: all of it is text  */
    struct ids ids;                       /* [n_ctx]                         */
    int n_fed, n_reused;
    int n_made, n_thought;                /* tokens of answer, of thought    */
    int n_sampled, n_steps;               /* tokens; forwards after the 1st  */
    int n_guessed, n_right;               /* tokens, by prompt lookup        */
    int max_guess, credit;                /* limits of prompt lookup         */
    lfm2_sampler sampler;
    struct guide *guide;                  /* NULL: any text is allowed       */
    int n_resampled;                      /* tokens that did not fit it      */
    double resample_time;                 /* seconds                         */
    enum finish finish;
    enum part part;
    struct text raw;                      /* the whole answer, of which      */
    size_t seen;                          /* this many bytes are split into  */
    struct text text, thought, calls;     /* these parts                     */
    struct scores prompt_scores, scores;
    int *count;                           /* of each token; NULL: not needed */
    uint64_t hash;                        /* of all logits sampled from      */
    double started, read, ended;          /* seconds(); `read`: the prompt   */
};

struct job {
    struct request q;
    struct reply r;
    const struct sink *to;
    void *owner;
    enum { WAITING, ACTIVE, FINISHED } state;
    uint64_t id;
    struct job *next;
    struct {                              /* what a client has been sent     */
        int begun, scores;
        size_t text, thought;
        double last_token;                /* time                            */
    } sent;
};

struct sink {
    void (*more)(struct job *j);          /* after each step; may be NULL    */
    void (*end)(struct job *j);           /* r.finish is the reason          */
};

struct slot {
    struct ids cached;                    /* tokens in the cache             */
    struct job *job;                      /* NULL: free                      */
    double used;                          /* when the last job ended         */
    int same;                             /* for choose_slot()               */
};

struct engine {
    const struct settings *s;
    lfm2_model *model;
    lfm2_tokenizer *words;                /* NULL: ids in, logits out        */
    lfm2_context *ctx;
    lfm2_params par;
    int template;                         /* TEMPLATE_NONE: plain text       */
    int opens_thought;                    /* prompts end with <think>        */
    int lookup;                           /* most tokens guessed at once     */
    int piece;                            /* --prompt-piece                  */
    struct sampling preset;               /* recommended for the model       */
    char date[12];
    struct ids ends;                      /* tokens that end a turn          */
    struct trace *trace;                  /* NULL: none                      */
    struct slot *slot;                    /* [n_seq]                         */
    struct job *jobs;                     /* waiting or active, oldest first */
    lfm2_span *span;                      /* [n_seq]                         */
    float *raw_logits;                    /* [n_vocab], before penalties     */
    int is_warned;                        /* about lost tool calls           */
    struct pool pool;                     /* memory of schema                */
    struct json *schema;                  /* --json-schema; NULL: none       */
    struct spelling *spelling;            /* NULL: not needed yet            */
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
    free(r->count);
    free(r->guide);
    *r = (struct reply){ .q = NULL };
}

static void free_request(struct request *q)
{
    free(q->prompt.id);
    free(q->bias);
    pool_free(&q->pool);
    free_schema(q->schema);
}

/* Later in this section. */
static void start_jobs(struct engine *e);
static void engine_drop(struct engine *e, struct job *j);
static void sample_token(struct engine *e, struct reply *r, float *logits);
static int guess(const struct engine *e, const struct reply *r, int n);
static void count_guesses(struct reply *r, int n, int n_right);
static void split(struct reply *r, int last);
static void record_score(const struct engine *e, struct scores *to,
                         const float *logits, int32_t id, int k);

/* ---- one step */

/* The tokens of a reply that go into the next forward: those to feed, as far as
 * there is room, and then guesses.  Beyond one for each job there is room left
 * for *room tokens and *rows rows of logits; what this takes is subtracted. */
static lfm2_span next_span(const struct engine *e, struct reply *r,
                           int n_guesses, int *room, int *rows)
{
    const int rest = r->ids.n - r->n_fed;
    const int all_rows = r->q->prompt_logprobs >= 0 && r->n_made == 0;
    const int most = all_rows ? smaller(*rows, *room) : *room;
    const int n = smaller(rest, most + 1);
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

/* Sample the next token, and one more after each guess that was right: the n
 * guesses are in the cache, behind the tokens of the reply.  Wrong ones are
 * removed, with some tokens before them if it cannot be trimmed exactly. */
static void sample_tokens(struct engine *e, struct reply *r, int span)
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
    count_guesses(r, n, r->n_fed - from);
    if (r->n_fed < cached->n)
        r->n_fed = cached->n = lfm2_seq_trim(e->ctx, r->seq, r->n_fed);
}

/* After a forward: what was fed is in the cache; when all of the reply is, the
 * next token is sampled.  No logits predict the first token of a prompt. */
static void advance(struct engine *e, struct reply *r, int span)
{
    const lfm2_span *fed = &e->span[span];
    const struct request *q = r->q;
    struct ids *cached = &e->slot[r->seq].cached;

    memcpy(cached->id + cached->n, fed->tokens,
           (size_t)fed->n_tokens * sizeof *cached->id);
    cached->n += fed->n_tokens;
    if (q->prompt_logprobs >= 0 && r->n_made == 0) {
        if (r->n_fed == 0)
            record_score(e, &r->prompt_scores, NULL, r->ids.id[0], 0);
        for (int i = 0, at = r->n_fed + 1; i < fed->n_logits &&
             at + i < q->prompt.n; i++)
            record_score(e, &r->prompt_scores, lfm2_logits(e->ctx, span, i),
                         r->ids.id[at + i], q->prompt_logprobs);
    }
    r->n_fed = smaller(cached->n, r->ids.n);
    if (r->n_sampled == 0)
        r->read = seconds();
    else
        r->n_steps++;
    if (r->n_fed == r->ids.n && q->limit == 0)
        r->finish = BY_LENGTH;
    else if (r->n_fed == r->ids.n)
        sample_tokens(e, r, span);
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

/* Advance all jobs by one forward.  Each active job feeds at least one token;
 * prompts share what is left of the batch.  While any answer is being written
 * that is not more than a piece, so that its next token does not take long. */
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
        advance(e, &j->r, span++);
        if (j->r.finish != UNFINISHED) {
            engine_drop(e, j);
            j->to->end(j);
        } else if (j->to->more)
            j->to->more(j);
    }
    return code;
}

/* ---- jobs and slots */

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
    const lfm2_config *c = lfm2_model_config(e->model);

    if (q->prompt.n == 0)
        return because(why, USAGE, "the prompt has no tokens");
    if (q->prompt.n > e->par.n_ctx)
        return because(why, TOO_LONG, "the prompt has %d tokens, the context "
                       "%d%s", q->prompt.n, e->par.n_ctx,
                       e->par.n_ctx < c->n_ctx_train ? "; -c N makes it longer"
                       : ", all that the model was trained for");
    for (int i = 0; i < q->prompt.n; i++)
        if (q->prompt.id[i] < 0 || q->prompt.id[i] >= c->n_vocab)
            return because(why, USAGE, "token %d is %ld, expected 0 to %d", i,
                           (long)q->prompt.id[i], c->n_vocab - 1);
    return DONE;
}

/* Queue a job whose request and sink are set. */
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

/* Remove a job, finished or not.  What it has read stays in the cache. */
static void engine_drop(struct engine *e, struct job *j)
{
    struct job **at = &e->jobs;

    while (*at && *at != j)
        at = &(*at)->next;
    if (*at)
        *at = j->next;
    j->r.ended = seconds();
    if (j->state == ACTIVE) {
        e->slot[j->r.seq].job = NULL;
        e->slot[j->r.seq].used = j->r.ended;
    }
    j->state = FINISHED;
    split(&j->r, 1);
}

/* Start a job in a slot.  At least the last token of a prompt is read anew, for
 * its logits. */
static void start_reply(struct engine *e, struct job *j, struct slot *slot)
{
    const struct request *q = &j->q;
    const struct sampling *p = &q->sampling;
    struct reply *r = &j->r;

    *r = (struct reply){
        .q = q, .seq = (int)(slot - e->slot), .hash = HASH_START,
        .keeps_marks = e->s->think == THINK_RAW,
        .sampler = {
            (float)p->temp, p->top_k < 0 ? 0 : p->top_k, (float)p->top_p,
            (float)p->min_p, (float)p->repeat,
            p->last_n < 0 ? 1 << 30 : p->last_n, (uint64_t)q->seed
        },
        .part = q->is_completion ? IN_PLAIN_TEXT : q->in_thought ? IN_THOUGHT :
                AT_START
    };
    r->ids.id = zeroed((size_t)e->par.n_ctx + 1, sizeof *r->ids.id);
    if (q->presence != 0 || q->frequency != 0)
        r->count = zeroed((size_t)lfm2_model_config(e->model)->n_vocab,
                          sizeof *r->count);
    memcpy(r->ids.id, q->prompt.id, (size_t)q->prompt.n * sizeof *r->ids.id);
    r->ids.n = q->prompt.n;
    start_guide(e, r);
    slot->cached.n = lfm2_seq_trim(e->ctx, r->seq,
                                   smaller(slot->same, q->prompt.n - 1));
    r->n_fed = r->n_reused = slot->cached.n;
    r->started = r->read = r->ended = seconds();
    slot->job = j;
    j->state = ACTIVE;
}

/* The slot for a request; NULL if all are busy.  A conversation goes on in its
 * own slot; any other takes an empty one, or else the least recently used.
 * *from is the slot that shares the longest prefix with the prompt.  If its log
 * probabilities are wanted, a prompt is read from its beginning. */
static struct slot *choose_slot(const struct engine *e,
                                const struct request *q,
                                const struct slot **from)
{
    enum { EXACT_TRIM = 16 };             /* see lfm2_seq_trim()             */
    struct slot *const end = e->slot + e->par.n_seq, *best = NULL;
    double best_rank = INFINITY;

    *from = e->slot;
    for (struct slot *s = e->slot; s < end; s++) {
        s->same = q->prompt_logprobs < 0 ?
                  shared_prefix(&s->cached, &q->prompt) : 0;
        if (s->same > (*from)->same)
            *from = s;
    }
    for (struct slot *s = e->slot; s < end; s++) {
        const int goes_on = s->same > 0 && s->same == (*from)->same &&
                            s->cached.n - s->same <= EXACT_TRIM;
        const double rank = goes_on ? -2 : s->cached.n == 0 ? -1 : s->used;
        if (!s->job && rank < best_rank)
            best = s, best_rank = rank;
    }
    return best;
}

/* Is a job reading a prompt that begins like this one, so that it is worth
 * waiting to copy its cache?  `have` tokens could be copied now. */
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

/* Start waiting jobs, oldest first.  One that had better wait does not hold up
 * those behind it. */
static void start_jobs(struct engine *e)
{
    for (struct job *j = e->jobs; j; j = j->next) {
        const struct slot *from;
        struct slot *to;
        if (j->state != WAITING)
            continue;
        to = choose_slot(e, &j->q, &from);
        if (!to)
            return;
        if (j->q.prompt_logprobs < 0 &&
            worth_waiting(e, &j->q.prompt, from->same))
            continue;
        if (from->same >= to->same + lfm2_seq_step(e->ctx) &&
            lfm2_seq_copy(e->ctx, (int)(to - e->slot), (int)(from - e->slot),
                          NULL) == LFM2_OK) {
            to->same = from->same;
            to->cached.n = from->cached.n;
            memcpy(to->cached.id, from->cached.id,
                   (size_t)from->cached.n * sizeof *from->cached.id);
        }
        start_reply(e, j, to);
    }
}

/* ---- the next token */

/* The bytes of a token; of control tokens, only those of the marks below. */
static const char *token_text(const struct engine *e, int32_t id, int *len)
{
    static const char *const marks[] = { THINK, THINK_END, CALL_START,
                                         CALL_END };
    const char *s = lfm2_token_bytes(e->words, id, 0, len);

    if (*len > 0)
        return s;
    s = lfm2_token_bytes(e->words, id, 1, len);
    for (int i = 0; i < 4; i++)
        if (same(s, (size_t)*len, marks[i]))
            return s;
    *len = 0;
    return s;
}

/* Append a token to the answer, or end it. */
static void take_token(const struct engine *e, struct reply *r, int32_t id)
{
    int len;
    const char *s = token_text(e, id, &len);

    r->n_thought += r->part == IN_THOUGHT;
    r->n_made++;
    if (r->guide)
        guide_token(r, r->guide, s, (size_t)len);
    add(&r->raw, s, (size_t)len);
    split(r, 0);
    if (r->count)
        r->count[id]++;
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

/* End a thought that has used up its budget; returns whether it had. */
static int close_thought(const struct engine *e, struct reply *r)
{
    static const char closing[] = "\n</think>\n\n";
    int32_t id[sizeof closing];
    int n;

    if (r->part != IN_THOUGHT || r->q->think_budget < 0 ||
        r->n_thought < r->q->think_budget)
        return 0;
    n = lfm2_encode(e->words, closing, strlen(closing), LFM2_ENCODE_SPECIAL,
                    id, sizeof closing);
    for (int i = 0; i < n && r->finish == UNFINISHED; i++)
        take_token(e, r, id[i]);
    return n > 0;
}

/* Does this token end the answer?  A stop string may name a control token. */
static int is_end(const struct engine *e, const struct reply *r, int32_t id)
{
    int len;

    lfm2_token_bytes(e->words, id, 0, &len);
    for (int i = 0; len == 0 && i < r->q->stop.n; i++)
        if (lfm2_token_id(e->words, r->q->stop.v[i]) == id)
            return 1;
    return lfm2_is_eog(e->words, id);
}

/* Sample the next token from the logits of the last one, which are modified as
 * the request asks.  Log probabilities are of the logits before that. */
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
    for (int i = 0; i < q->n_bias; i++)
        logits[q->bias[i].id] += q->bias[i].by;
    for (int i = 0; r->count && i < n_vocab; i++)
        if (r->count[i] > 0)
            logits[i] -= (float)(q->presence + q->frequency * r->count[i]);
    for (int i = 0; q->ignore_eos && i < e->ends.n; i++)
        logits[e->ends.id[i]] = -INFINITY;
    id = lfm2_sample(e->ctx, &r->sampler, logits, r->ids.id, r->ids.n);
    if (id >= 0 && r->guide && !may_say(e, r, id))
        id = resample(e, r, logits);
    if (id < 0) {
        r->finish = r->finish == UNFINISHED ? BROKEN : r->finish;
        return;
    }
    r->n_sampled++;
    ends = is_end(e, r, id);
    if (q->logprobs >= 0 && (!ends || q->is_completion))
        record_score(e, &r->scores, e->raw_logits, id, q->logprobs);
    if (ends)
        r->finish = STOPPED;
    else
        take_token(e, r, id);
}

/* ---- prompt lookup
 *
 * Text repeats itself: an edit repeats a page, an answer its question, JSON its
 * keys.  If the last few tokens have occurred before, what followed them then
 * is a guess at what follows now; and a forward of several tokens takes little
 * longer than one of a single token.  Tokens are sampled as without guesses; a
 * right guess only means that the logits after it are there already.  So the
 * answer is the same, byte for byte.
 *
 * A guess costs about a fifth of a forward, and saves one if it is right.  Each
 * reply keeps an account of this, in hundredths of a forward: it may be half a
 * forward in debt, and every forward earns it one hundredth, so that guesses
 * which are always wrong cost little more than that. */

enum {
    MIN_MATCH = 3, MAX_MATCH = 16,        /* tokens that must be the same    */
    A_FORWARD = 100, A_GUESS = 20, EARNED = 1, MAX_DEBT = 50, MAX_CREDIT = 350
};

/* Put at most n guesses behind the text, and return how many: what followed the
 * longest earlier match of its last tokens, the latest one of several.  If the
 * second longest match is at least half as long, only as far as both texts go
 * on alike: in a list of objects, the keys are guessed and the values are not.
 * A single match must have MIN_MATCH tokens.  The search costs little:
 * attention reads far more for each of these tokens. */
static int guess(const struct engine *e, const struct reply *r, int n)
{
    int32_t *const id = r->ids.id, *const end = id + r->ids.n;
    int best = 0, longest = 0, other = 0, second = 0, made = 0;

    n = smaller(n, r->max_guess ? r->max_guess : MIN_MATCH);
    n = smaller(n, (MAX_DEBT + r->credit) / A_GUESS);
    n = smaller(n, e->par.n_ctx - r->ids.n);
    if (r->q->limit >= 0)
        n = smaller(n, r->q->limit - r->n_made - 1);
    for (int at = r->ids.n - 1; n > 0 && at > 0 && second < MAX_MATCH; at--) {
        int alike = 0;
        while (alike < at && alike < MAX_MATCH &&
               id[at - 1 - alike] == end[-1 - alike])
            alike++;
        if (alike > longest) {
            second = longest, other = best;
            longest = alike, best = at;
        } else if (alike > second)
            second = alike, other = at;
    }
    const int is_single = second == 0 || 2 * second < longest;
    while (made < n && (is_single ? longest >= MIN_MATCH
                                  : id[best + made] == id[other + made])) {
        end[made] = id[best + made];
        made++;
    }
    return made;
}

/* The more of n guesses were right, the more are made next. */
static void count_guesses(struct reply *r, int n, int n_right)
{
    r->n_guessed += n;
    r->n_right += n_right;
    r->credit = smaller(r->credit + EARNED + n_right * A_FORWARD - n * A_GUESS,
                        MAX_CREDIT);
    if (n > 0)
        r->max_guess = smaller(n_right < n ? n_right + 1 : 2 * n + 1,
                               MAX_LOOKUP);
}

/* ---- thought, text, calls and stop strings
 *
 * Marks such as </think> split an answer into parts, and a stop string ends it.
 * These may arrive in pieces: as long as the end of the answer could be the
 * beginning of one, it is held back. */

/* How many bytes at the end of s[n] are a proper prefix of the word. */
static size_t overlap(const char *s, size_t n, const char *word, size_t len)
{
    size_t k = n < len ? n : len - 1;

    while (k > 0 && memcmp(s + n - k, word, k) != 0)
        k--;
    return k;
}

/* Where a part ends: at a mark or stop string of len bytes.  If len is 0, none
 * was found, and the last `held` bytes could be the beginning of one. */
struct cut { size_t at, len, held; int is_stop; };

/* Look for a word in s[n].  The one that is complete first counts, then the
 * longest, then the last that was looked for: so it does not matter in which
 * pieces the text arrives. */
static void look_for(struct cut *c, const char *s, size_t n, const char *word,
                     int is_stop)
{
    const size_t len = strlen(word), held = overlap(s, n, word, len);
    const size_t before = c->at + c->len;
    const char *found = find(s, s + before, word);

    if (found && (found + len < s + before || len >= c->len))
        *c = (struct cut){ (size_t)(found - s), len, 0, is_stop };
    else if (held > c->held && c->len == 0)
        c->held = held;
}

/* Stop strings count in text only, not in thoughts and calls. */
static struct cut find_cut(const struct reply *r, const char *s, size_t n)
{
    const char *mark = r->part == IN_THOUGHT ? THINK_END :
                       r->part == IN_TEXT ? CALL_START :
                       r->part == IN_CALL ? CALL_END : NULL;
    struct cut c = { n, 0, 0, 0 };

    if (mark && !is_guided_text(r))
        look_for(&c, s, n, mark, 0);
    if (r->part == IN_TEXT && r->calls.n > 0)         /* one too many        */
        look_for(&c, s, n, CALL_END, 0);
    if (r->part == IN_TEXT || r->part == IN_PLAIN_TEXT)
        for (int i = 0; i < r->q->stop.n; i++)
            look_for(&c, s, n, r->q->stop.v[i], 1);
    return c;
}

/* Decide what comes at the start, where there may be a thought, or after it.
 * Returns 0 if that depends on bytes still to come. */
static int begin_part(struct reply *r, const char *s, size_t n, int last)
{
    const size_t blank = strspn(s, " \n\r\t"), len = strlen(THINK);

    if (!last && overlap(s + blank, n - blank, THINK, len) == n - blank)
        return 0;
    if (r->part == AT_START && begins(s + blank, s + n, THINK)) {
        r->part = IN_THOUGHT;
        r->seen += blank + len;
        return 1;
    }
    r->seen += r->part == AFTER_THOUGHT ? blank : 0;
    r->part = IN_TEXT;
    return 1;
}

/* Split what is new in r->raw into its parts; with `last` nothing is held back.
 * Marks are dropped, but those around a call are kept with it. */
static void split(struct reply *r, int last)
{
    const size_t from = r->seen;

    while (r->seen < r->raw.n) {
        const char *s = r->raw.s + r->seen;
        const size_t n = r->raw.n - r->seen;
        if (r->part == AT_START || r->part == AFTER_THOUGHT) {
            if (!begin_part(r, s, n, last))
                break;
            continue;
        }
        const struct cut c = find_cut(r, s, n);
        const size_t n_part = c.at - (last ? 0 : c.held);
        if (!r->keeps_marks)
            add(r->part == IN_THOUGHT ? &r->thought : r->part == IN_CALL ?
                &r->calls : &r->text, s, n_part);
        r->seen += n_part + c.len;
        if (c.len == 0)
            break;
        if (c.is_stop) {
            r->finish = STOPPED;
            r->raw.n = r->seen -= c.len;
            r->raw.s[r->raw.n] = '\0';
        } else if (r->part == IN_THOUGHT)
            r->part = AFTER_THOUGHT;
        else {
            r->part = c.len == strlen(CALL_END) ? IN_TEXT : IN_CALL;
            if (!r->keeps_marks)
                add(&r->calls, s + c.at, c.len);
        }
    }
    if (r->keeps_marks && r->seen > from)
        add(&r->text, r->raw.s + from, r->seen - from);
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

/* Add a token and the k likeliest, best first, the lower id first of equals.
 * Without logits, as for the first token of a text, its log probability is NAN.
 * None is below -9999, as JSON has no infinity. */
static void record_score(const struct engine *e, struct scores *to,
                         const float *logits, int32_t id, int k)
{
    const int n_vocab = lfm2_n_vocab(e->words);       /* without spare rows  */
    const size_t n = (size_t)to->n;
    struct score *s;
    double all;

    if ((n & (n - 1)) == 0)               /* a power of two: it is full      */
        to->v = resize(to->v, (n ? 2 * n : 1) * sizeof *to->v);
    s = &to->v[to->n++];
    *s = (struct score){ .token = { id, logits ? (double)logits[id] : NAN } };
    if (!logits)
        return;
    for (int i = 0; i < n_vocab; i++) {
        int at = s->n_top;
        for (; at > 0 && (double)logits[i] > s->top[at - 1].logprob; at--)
            s->top[at] = s->top[at - 1];
        s->top[at] = (struct scored){ i, (double)logits[i] };
        s->n_top = smaller(s->n_top + 1, k);
    }
    all = log_sum(logits, lfm2_model_config(e->model)->n_vocab);
    for (int i = 0; i <= s->n_top; i++) {
        struct scored *x = i < s->n_top ? &s->top[i] : &s->token;
        x->logprob = x->logprob - all < -9999 ? -9999 : x->logprob - all;
    }
}

/* ---- what a request leaves open */

static uint64_t random_seed(void)
{
    struct timespec t;

    clock_gettime(CLOCK_REALTIME, &t);
    return ((uint64_t)t.tv_sec * 1000000007u ^ (uint64_t)t.tv_nsec ^
            (uint64_t)getpid() << 20) & UINT32_MAX;
}

/* Fill in what was not set, as recommended; temperature 0 has no penalty. */
static void complete_request(const struct engine *e, struct request *q)
{
    const struct sampling *p = &e->preset, had = q->sampling;

    q->sampling = (struct sampling){
        .temp = had.temp == UNSET ? p->temp : had.temp,
        .top_k = had.top_k == UNSET ? p->top_k : had.top_k,
        .top_p = had.top_p == UNSET ? p->top_p : had.top_p,
        .min_p = had.min_p == UNSET ? p->min_p : had.min_p,
        .repeat = had.repeat != UNSET ? had.repeat :
                  had.temp == 0 ? 1 : p->repeat,
        .last_n = had.last_n == UNSET ? p->last_n : had.last_n
    };
    if (q->limit == UNSET)
        q->limit = q->is_completion ? PLAIN_LENGTH : -1;
    if (q->seed == -1)
        q->seed = (long long)random_seed();
}

/* ------------------------------------------------------- 4. Opening a model
 *
 * open_engine() opens a model and its vocabulary, and open_context() the
 * context.  Before them comes what they depend on: the recommended sampling,
 * and how many CPUs and how much memory may be used. */

/* ---- presets
 *
 * Sampling as the makers recommend it for each model: the first row whose words
 * are all in its name.  The small models for one task are greedy. */

static const struct preset {
    const char *name, *words[2];
    struct sampling sampling;
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

/* Search all names in the file, joined as in "-lfm2-1.2b-extract-", and the one
 * that its sizes imply. */
static const struct preset *find_preset(const lfm2_model *m)
{
    static const char *const key[] = {
        "general.name", "general.basename", "general.finetune",
        "general.size_label"
    };
    const lfm2_config *c = lfm2_model_config(m);
    const struct preset *p = presets;
    struct text name = { 0 };
    size_t n;

    for (int i = 0; i < 4; i++) {
        const char *s = lfm2_model_string(m, key[i], &n);
        add_string(&name, "-");
        add(&name, s ? s : "", s ? n : 0);
    }
    if (c->n_expert == 64)
        add_string(&name, c->n_vocab >= 128000 ? "-lfm2.5-24b" : "-lfm2-24b");
    else if (c->n_vocab >= 128000)
        add_string(&name, c->n_expert ? "-lfm2.5-8b" : "-lfm2.5-2.6b");
    add_string(&name, "-");
    for (size_t i = 0; i < name.n; i++)
        if (strchr("_ /", name.s[i]))
            name.s[i] = '-';
    lower(name.s, name.n);
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

/* Read a number from the metadata.  Returns 0 if there is none that is within
 * these bounds, and *out stays as it was. */
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

/* The preset, but with values that the file itself has; *n_own is how many.
 * Greedy sampling has a penalty only if the file asks for one. */
static struct sampling preset_of(const lfm2_model *m, int *n_own)
{
    struct sampling to = find_preset(m)->sampling;
    double top_k = to.top_k, last_n = to.last_n;
    const int penalty = file_number(m, "general.sampling.penalty_repeat", 0.01,
                                    100, &to.repeat);

    *n_own = penalty;
    *n_own += file_number(m, "general.sampling.temp", 0, 100, &to.temp);
    *n_own += file_number(m, "general.sampling.top_k", 0, 1 << 30, &top_k);
    *n_own += file_number(m, "general.sampling.top_p", 0, 1, &to.top_p);
    *n_own += file_number(m, "general.sampling.min_p", 0, 1, &to.min_p);
    *n_own += file_number(m, "general.sampling.penalty_last_n", -1, 1 << 30,
                          &last_n);
    to.top_k = (int)top_k;
    to.last_n = (int)last_n;
    if (to.temp == 0 && !penalty)
        to.repeat = 1;
    return to;
}

static struct phrase describe_sampling(const struct sampling *p)
{
    return phrase("temperature %g, top-k %d, top-p %g, min-p %g, repeat "
                  "penalty %g over %d", p->temp, p->top_k, p->top_p, p->min_p,
                  p->repeat, p->last_n);
}

/* ---- usable CPUs and memory
 *
 * On Linux a control group, such as that of a container, may be allowed less
 * than the machine has.  The limits of a group also apply to the groups within
 * it.  Version 2 has one tree of groups, version 1 one for each resource. */

static const char *groups = "/proc/self/cgroup", *group_root = "/sys/fs/cgroup";

/* In a file of /proc or /sys, what follows `key` and a colon or a blank, or the
 * first line if the key is ""; `otherwise` if it is not there. */
static struct phrase read_field(const char *dir, const char *name,
                                const char *key, const char *otherwise)
{
    struct phrase out = phrase("%s", otherwise);
    const size_t n = strlen(key);
    char line[640];
    FILE *f;

    snprintf(line, sizeof line, "%s/%s", dir, name);
    f = fopen(line, "r");
    while (f && fgets(line, sizeof line, f))
        if (n == 0 || (strncmp(line, key, n) == 0 && strchr(": \t", line[n]))) {
            const char *s = line + n + strspn(line + n, ": \t");
            out = phrase("%.*s", (int)strcspn(s, "\n"), s);
            break;
        }
    if (f)
        fclose(f);
    return out;
}

/* The same as a number; 0 if it is none, such as "max". */
static double number_in(const char *dir, const char *name, const char *key)
{
    return strtod(read_field(dir, name, key, "0").s, NULL);
}

/* The quota, rounded to whole CPUs; 0: none.  Threads beyond it are stopped in
 * the middle of their work, and all others wait for them: with a quota of 1.5
 * two threads were faster than one, with 1.2 they were slower. */
static double cpu_limit(const char *dir)
{
    double quota = 0, period = 0;

    sscanf(read_field(dir, "cpu.max", "", "").s, "%lf %lf", &quota, &period);
    if (quota <= 0) {
        quota = number_in(dir, "cpu.cfs_quota_us", "");
        period = number_in(dir, "cpu.cfs_period_us", "");
    }
    return quota > 0 && period > 0 ? fmax(1, floor(quota / period + 0.5)) : 0;
}

/* The memory that a group has left; 0: it has no limit.  Cached pages of files
 * do not count as used, since they are dropped when room is needed. */
static double memory_left(const char *dir)
{
    const double most = fmax(number_in(dir, "memory.max", ""),
                             number_in(dir, "memory.limit_in_bytes", ""));

    return most <= 0 ? 0 :
           fmax(1, most - number_in(dir, "memory.stat", "anon") -
                   number_in(dir, "memory.stat", "total_rss"));
}

/* The lowest limit of the groups of this process, and of those they are within;
 * 0: none.  A line is "0::/path", or "4:memory:/path" in version 1. */
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
        *path++ = '\0';
        path[strcspn(path, "\n")] = '\0';
        do {
            snprintf(dir, sizeof dir, "%s/%s%s", group_root, tree + 1, path);
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

static int usable_cpus(void)
{
    const double quota = least_limit(cpu_limit);

    return (int)fmin(fmin(lfm2_n_cpus(), 64), quota > 0 ? quota : 64);
}

/* The memory available without taking it from other programs; 0: unknown. */
static double free_memory(void)
{
    const double have = number_in("/proc", "meminfo", "MemAvailable") * 1024;
    const double most = least_limit(memory_left);

    return most > 0 ? fmin(have, most) : have;
}

/* ---- reading ahead
 *
 * Pages of a mapped file that are not in memory are read when they are touched,
 * which in a mixture of experts happens in no order.  A thread that reads the
 * file from front to end meanwhile is faster. */

#if defined __linux__ && !defined LFM2_NO_MMAP && !defined LFM2_NO_THREADS

static pthread_t prefetch_thread;
static atomic_int is_prefetching;

static void *prefetch_file(void *model)
{
    const uint64_t piece = 8 << 20;

    for (uint64_t at = 0, n = 1; n > 0 && is_prefetching; at += n)
        n = lfm2_model_read_ahead(model, at, piece);
    return NULL;
}

/* Read ahead if much of the file is not in memory, as a sample of its pages
 * shows, and all of it fits.  Linux does not say which pages are in memory for
 * a file that we may not write: that is always read, which does no harm. */
static void start_prefetch(struct engine *e)
{
    enum { PROBES = 256, ABSENT = 8 };
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t size;
    const unsigned char *file = lfm2_model_file(e->model, &size);
    int absent = access(e->s->model, W_OK) != 0 ? PROBES : 0;

    for (size_t i = 0; !e->s->no_mmap && i < PROBES; i++) {
        const size_t at = size / PROBES * i;
        unsigned char there = 1;
        if (mincore((void *)(uintptr_t)(file + at - at % page), 1, &there) == 0)
            absent += !(there & 1);
    }
    if (e->s->no_mmap || absent <= ABSENT || free_memory() < (double)size +
        (double)lfm2_context_size(e->model, &e->par))
        return;
    is_prefetching = 1;
    block_signals(1);                     /* in the new thread               */
    if (pthread_create(&prefetch_thread, NULL, prefetch_file, e->model) != 0)
        is_prefetching = 0;
    block_signals(0);
    if (is_prefetching && e->s->verbose)
        note("%s: not all in memory, read ahead", e->s->model);
}

static void stop_prefetch(void)
{
    if (is_prefetching) {
        is_prefetching = 0;
        pthread_join(prefetch_thread, NULL);
    }
}

#else

#define start_prefetch(e) ((void)(e))
#define stop_prefetch()   ((void)0)

#endif

/* ---- opening */

enum {
    LOGITS_CHUNK = 64,                    /* rows of prompt logits at once   */
    TRACE_BATCH = 64,                     /* -b, as traced tokens take more  */
    LOOKUP = 7,                           /* --lookup                        */
    PROMPT_PIECE = 128                    /* --prompt-piece of --serve       */
};

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
        note("-t %d: more threads than the %d CPUs make it slower",
             p.n_threads, n_cpus);
    p.isa = s->isa;
    p.kv_type = s->kv;
    return p;
}

/* Decide which chat template is used, if any, and whether prompts end with
 * <think>, as they do if the file's own template says so. */
static int resolve_template(struct engine *e)
{
    const struct settings *s = e->s;
    struct why why = { "" };
    int known = 1;
    size_t n = 0;
    const char *own = lfm2_model_string(e->model, "tokenizer.chat_template",
                                        &n);

    e->template = s->raw || s->ids ? TEMPLATE_NONE : s->template;
    if (e->template == TEMPLATE_AUTO)
        e->template = choose_template(e->model, e->words, &known, &why);
    if (s->verbose && !why.s[0])
        note("template %s", template_name(e->template));
    else if (s->verbose || !known)
        note("%s: %s", s->model, why.s);
    e->opens_thought = e->template != TEMPLATE_NONE && own &&
                       find(own, own + n, TURN_START "assistant\\n" THINK);
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

/* A model may have spare rows after its own vocabulary.  A vocabulary of
 * another file must have as many tokens as the model. */
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

/* The sandbox comes first, as the file may be hostile. */
static int open_model(struct engine *e)
{
    const struct settings *s = e->s;
    lfm2_error err;
    const int code = enter_sandbox(s);

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

static void print_settings(const struct engine *e)
{
    const lfm2_params p = lfm2_context_params(e->ctx);

    note("context %d, batch %d, threads %d, isa %s, kv %s; %s plus the file",
         p.n_ctx, p.n_batch, p.n_threads, isa_name(p.isa), kv_name(p.kv_type),
         amount((double)lfm2_context_size(e->model, &p), "B").s);
}

static int open_context(struct engine *e)
{
    const int n_train = lfm2_model_config(e->model)->n_ctx_train;
    const size_t n_seq = (size_t)e->par.n_seq;
    lfm2_error err;
    int code;

    start_prefetch(e);
    block_signals(1);                     /* in its threads                  */
    code = lfm2_context_open(&e->ctx, e->model, &e->par, &err);
    block_signals(0);
    if (code != LFM2_OK)
        return report(e->s->model, &err);
    is_polled = 1;
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

/* By default no tokens are guessed where that costs too much: with experts, as
 * each token chooses its own, and in plain C, where arithmetic is slower than
 * memory.  A trace would show wrong guesses, so with it none are made. */
static int choose_lookup(const struct engine *e)
{
    const struct settings *s = e->s;
    int isa = LFM2_ISA_SCALAR + 1;

    if (s->trace || s->lookup != UNSET)
        return s->trace ? 0 : s->lookup;
    while (isa < LFM2_N_ISA && !lfm2_isa_available(isa))
        isa++;
    return lfm2_model_config(e->model)->n_expert == 0 && isa < LFM2_N_ISA &&
           s->isa != LFM2_ISA_SCALAR ? LOOKUP : 0;
}

static int open_engine(struct engine *e)
{
    const struct settings *s = e->s;
    int n_own, code = open_model(e);

    if (code == DONE)
        code = open_model_words(e);
    if (code == DONE)
        code = resolve_template(e);
    if (code == DONE && s->json_schema)
        code = open_schema(e);
    if (code != DONE)
        return code;
    e->preset = preset_of(e->model, &n_own);
    if (s->verbose)
        note("preset %s%s: %s", find_preset(e->model)->name, n_own ? " and the "
             "file's own general.sampling" : "",
             describe_sampling(&e->preset).s);
    today(e->date);
    if (s->date)
        snprintf(e->date, sizeof e->date, "%s", s->date);
    if (s->mode == LOGITS || s->ask.logprobs >= 0 || s->messages)
        e->par.n_logits = LOGITS_CHUNK;
    if (s->mode & REQUESTS) {
        e->par.n_seq = s->parallel;
        e->par.n_logits = s->parallel + LOGITS_CHUNK;
    }
    if (s->trace && s->batch == UNSET)
        e->par.n_batch = TRACE_BATCH;
    e->lookup = choose_lookup(e);
    if (e->par.n_logits < 1 + e->lookup)
        e->par.n_logits = 1 + e->lookup;
    e->piece = s->piece != UNSET ? s->piece :
               s->mode == BATCH ? e->par.n_batch : PROMPT_PIECE;
    return DONE;
}

static void close_engine(struct engine *e)
{
    stop_prefetch();
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

/* ---- what a token costs, and memory in use */

/* Bytes of KV cache for one token. */
static double kv_bytes(const lfm2_config *c, int kv_type)
{
    double sum = 0;

    for (int il = 0; il < c->n_layer; il++)
        if (c->is_attn[il])
            sum += 2.0 * c->n_head_kv * c->head_dim *
                   (kv_type == LFM2_KV_F16 ? 2 : 4);
    return sum;
}

static double count_elements(const lfm2_tensor_info *t)
{
    double n = 1;

    for (int d = 0; d < t->n_dims; d++)
        n *= (double)t->dims[d];
    return n;
}

struct cost {
    double bytes, params;                 /* of the whole file               */
    double shared, experts;               /* bytes: for any token; of all    */
    double macs, head;                    /* multiply-adds; for the logits   */
    double kv;                            /* bytes of cache for a token      */
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

/* The bytes that are read to compute one token of each of n_seq sequences: the
 * weights once, with as many experts as would be chosen on average at random,
 * and `depth` tokens of the cache for each. */
static double step_bytes(const lfm2_model *m, const struct cost *cost,
                         int n_seq, double depth)
{
    const lfm2_config *c = lfm2_model_config(m);
    const double idle = c->n_expert == 0 ? 1 :
                        pow(1 - (double)c->n_expert_used / c->n_expert, n_seq);

    return cost->shared + cost->experts * (1 - idle) +
           cost->kv * n_seq * depth;
}

/* The memory of the process without mapped files; 0: unknown. */
static double anonymous_memory(void)
{
    return number_in("/proc", "self/status", "RssAnon") * 1024;
}

static double peak_memory(void)
{
    struct rusage use = { .ru_utime = { 0 } };

    getrusage(RUSAGE_SELF, &use);
#if defined __APPLE__
    return (double)use.ru_maxrss;
#elif defined __wasi__
    return (double)__builtin_wasm_memory_size(0) * 65536;
#else
    return (double)use.ru_maxrss * 1024;
#endif
}

/* -------------------------------------------------------- 5. Writing replies
 *
 * As text, while it is generated; or, once it is complete, as a JSON object of
 * OpenAI's API. */

/* ---- as text */

struct output {
    FILE *f;                              /* NULL: not shown                 */
    int terminal;
    size_t shown;                         /* bytes of it                     */
    lfm2_utf8 utf8;
};

struct printer {
    struct output to[2];                  /* text, thoughts                  */
    int colour;                           /* dim thoughts                    */
    int in_thought, code;
};

/* Thoughts go to a terminal or, with --think show, to standard error. */
static struct printer start_printer(const struct settings *s)
{
    const char *no = getenv("NO_COLOR"), *term = getenv("TERM");
    const int terminal = isatty(STDOUT_FILENO);
    struct printer p = { .to[0] = { .f = stdout, .terminal = terminal } };

    p.colour = s->color != COLOR_AUTO ? s->color == COLOR_ON :
               terminal && !(no && no[0]) && term && strcmp(term, "dumb") != 0;
    p.to[1].terminal = terminal || isatty(STDERR_FILENO);
    if (s->think == THINK_SHOW || (s->think == THINK_AUTO && terminal))
        p.to[1].f = terminal ? stdout : stderr;
    return p;
}

/* Print all whole characters; with len 0 also an incomplete one. */
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

static void enter_thought(struct printer *p, int inside)
{
    if (p->in_thought == inside)
        return;
    put_text(&p->to[!inside], "", 0);
    p->in_thought = inside;
    is_dim = p->colour && inside;
    if (inside)
        fputs(p->colour ? "\033[2m" : THINK, p->to[1].f);
    else
        fprintf(p->to[1].f, "%s\n\n", p->colour ? "\033[0m" : THINK_END);
}

static void print_reply(struct printer *p, const struct reply *r)
{
    for (int i = 1; i >= 0; i--) {
        const struct text *all = i ? &r->thought : &r->text;
        struct output *o = &p->to[i];
        if (!o->f || all->n == o->shown)
            continue;
        enter_thought(p, i);
        put_text(o, all->s + o->shown, all->n - o->shown);
        o->shown = all->n;
        p->code = flush_output(p->code);
    }
}

/* Parse the tool calls of a finished reply; what is not a call becomes text. */
static struct calls take_calls(struct reply *r)
{
    struct calls calls = { NULL, 0 };

    if (r->calls.n > 0)
        parse_calls(r->calls.s, r->calls.n, r->finish != STOPPED, &calls,
                    &r->text);
    r->calls.n = 0;
    return calls;
}

/* Print what is left at the end, and tool calls as a line of JSON. */
static void print_end(struct printer *p, struct reply *r)
{
    struct calls calls = take_calls(r);
    struct text line = { 0 };

    print_reply(p, r);
    enter_thought(p, 0);
    for (int i = 0; i < calls.n; i++) {
        add_string(&line, i ? ", " : r->text.n ? "\n[" : "[");
        add_members(&line, "{name: %.*s, arguments: ",
                    (int)calls.call[i].name.n, calls.call[i].name.s);
        add(&line, calls.call[i].arguments.s, calls.call[i].arguments.n);
        add_string(&line, i + 1 < calls.n ? "}" : "}]");
    }
    put_text(&p->to[0], line.s ? line.s : "", line.n);
    put_text(&p->to[0], "", 0);
    if (r->text.n > 0 || line.n > 0 || r->thought.n > 0)
        putchar('\n');
    free(line.s);
    free_calls(&calls);
    p->code = flush_output(p->code);
}

/* ---- as JSON, in the formats of add_members() (section 14) */

/* A token, as an object that is left open. */
static void add_scored(const struct engine *e, struct text *to,
                       const struct scored *x)
{
    int len;
    const char *s = lfm2_token_bytes(e->words, x->id, 1, &len);

    add_members(to, "{token: %.*s, id: %d, logprob: %f, bytes: [", len, s,
                (int)x->id, x->logprob);
    for (int i = 0; i < len; i++)
        add_members(to, "%d", (unsigned char)s[i]);
    add_string(to, "]");
}

/* An array of the tokens from number `from` on, with their alternatives. */
static void add_scores(const struct engine *e, struct text *to,
                       const struct scores *scores, int from)
{
    add_members(to, "[");
    for (int i = from; i < scores->n; i++) {
        const struct score *s = &scores->v[i];
        if (isnan(s->token.logprob)) {
            add_members(to, "%s", NULL);
            continue;
        }
        add_scored(e, to, &s->token);
        add_members(to, "top_logprobs: [");
        for (int k = 0; k < s->n_top; k++) {
            add_scored(e, to, &s->top[k]);
            add_string(to, "}");
        }
        add_string(to, "]}");
    }
    add_string(to, "]");
}

/* The text of a token, as a string.  As it may be a key of an object, and keys
 * must differ, a token that is not whole characters is written as bytes. */
static void add_token_name(const struct engine *e, struct text *to, int32_t id)
{
    struct text bytes = { 0 };
    uint32_t c;
    int len, at = 0, n = 1;
    const char *s = lfm2_token_bytes(e->words, id, 1, &len);

    for (; at < len && n > 0; at += n)
        n = utf8_get(s + at, s + len, &c);
    add_string(&bytes, "bytes:");
    for (int i = 0; i < len && n == 0; i++)
        add_format(&bytes, "\\x%02x", (unsigned char)s[i]);
    add_members(to, "%.*s", n ? len : (int)bytes.n, n ? s : bytes.s);
    free(bytes.s);
}

/* An object: log probabilities of the likeliest tokens and the token itself. */
static void add_best(const struct engine *e, struct text *to,
                     const struct score *s)
{
    int has = 0;

    if (isnan(s->token.logprob)) {
        add_members(to, "%s", NULL);
        return;
    }
    add_members(to, "{");
    for (int i = 0; i < s->n_top + !has; i++) {
        const struct scored *x = i < s->n_top ? &s->top[i] : &s->token;
        has |= x->id == s->token.id;
        add_token_name(e, to, x->id);
        add_members(to, ": %f", x->logprob);
    }
    add_string(to, "}");
}

/* Log probabilities as in /v1/completions: four parallel arrays, which begin
 * with the tokens of the prompt if it is echoed.  The first `from` tokens of
 * the answer have been written before. */
static void add_columns(const struct engine *e, struct text *to,
                        const struct reply *r, int from)
{
    static const char *const column[] = { "tokens", "token_logprobs",
                                          "top_logprobs", "text_offset" };
    const int n_prompt = r->q->echo ? r->prompt_scores.n : 0;
    const int first = from > 0 ? n_prompt + from : 0;

    for (int c = 0; c < 4; c++) {
        int offset = 0, len;
        add_members(to, c ? "%s: [" : "{%s: [", column[c]);
        for (int i = 0; i < n_prompt + r->scores.n; i++) {
            const struct score *s = i < n_prompt ? &r->prompt_scores.v[i] :
                                    &r->scores.v[i - n_prompt];
            const char *bytes = token_text(e, s->token.id, &len);
            if (i >= first && c == 0)
                add_token_name(e, to, s->token.id);
            else if (i >= first && c == 1)
                add_members(to, "%f", s->token.logprob);
            else if (i >= first && c == 2)
                add_best(e, to, s);
            else if (i >= first)
                add_members(to, "%d", offset);
            for (int k = 0; k < len; k++)
                offset += (bytes[k] & 0xc0) != 0x80;
        }
        add_string(to, "]");
    }
    add_string(to, "}");
}

static void add_logprobs(const struct engine *e, struct text *to,
                         const struct reply *r, int from)
{
    const struct request *q = r->q;
    const int in_columns = q->is_completion && q->logprobs >= 0;

    if (in_columns) {
        add_members(to, "logprobs: ");
        add_columns(e, to, r, from);
    } else if (q->logprobs >= 0) {
        add_members(to, "logprobs: {content: ");
        add_scores(e, to, &r->scores, from);
        add_string(to, "}");
    }
    if (q->prompt_logprobs >= 0 && from == 0 && !(in_columns && q->echo)) {
        add_members(to, "prompt_logprobs: ");
        add_scores(e, to, &r->prompt_scores, 0);
    }
}

/* The arguments of a call are JSON inside a string.  In a stream, calls have an
 * index. */
static void add_calls(struct text *to, const struct calls *calls, uint64_t id,
                      int is_stream)
{
    add_members(to, "tool_calls: [");
    for (int i = 0; i < calls->n; i++) {
        const struct call *c = &calls->call[i];
        add_members(to, "{");
        if (is_stream)
            add_members(to, "index: %d", i);
        add_members(to, "id: %s, type: %s, function: {name: %.*s, arguments: "
                    "%.*s}}", phrase("call_%016llx", (unsigned long long)
                                     hash_number(id, (uint64_t)i)).s,
                    "function", (int)c->name.n, c->name.s,
                    (int)c->arguments.n, c->arguments.s);
    }
    add_string(to, "]");
}

static void add_tokens(const struct engine *e, struct text *to,
                       const struct ids *ids)
{
    for (int i = 0, len; i < ids->n; i++) {
        const char *s = token_text(e, ids->id[i], &len);
        add(to, s, (size_t)len);
    }
}

/* The name that the file gives; it may be empty. */
static struct piece model_name(const struct engine *e)
{
    size_t n = 0;
    const char *s = lfm2_model_string(e->model, "general.name", &n);

    return (struct piece){ s ? s : "", s ? n : 0 };
}

/* The first members of a response, or of a chunk of one. */
static void add_head(const struct engine *e, struct text *to,
                     int is_completion, int is_chunk, uint64_t id,
                     long long created)
{
    const struct piece model = model_name(e);
    const char *object = is_completion ? "text_completion" : is_chunk ?
                         "chat.completion.chunk" : "chat.completion";

    add_members(to, "{id: %s, object: %s, created: %llu, model: %.*s",
                phrase("%s-%016llx", is_completion ? "cmpl" : "chatcmpl",
                       (unsigned long long)id).s,
                object, (unsigned long long)created, (int)model.n, model.s);
}

static const char *finish_reason(const struct reply *r, int n_calls)
{
    return n_calls > 0 ? "tool_calls" : r->finish == STOPPED ? "stop" :
           r->finish == BY_LENGTH || r->finish == BY_CONTEXT ? "length" : NULL;
}

/* A choice: a text, after the prompt if that is echoed; or a message. */
static void add_choice(const struct engine *e, struct text *to, struct job *j,
                       int index)
{
    struct calls calls = take_calls(&j->r);
    const struct reply *r = &j->r;
    struct text said = { 0 };

    if (j->q.is_completion && j->q.echo)
        add_tokens(e, &said, &j->q.prompt);
    add(&said, r->text.s, r->text.n);
    if (j->q.is_completion)
        add_members(to, "{index: %d, text: %.*s", index, (int)said.n, said.s);
    else {
        add_members(to, "{index: %d, message: {role: %s, content: %.*s", index,
                    "assistant", (int)said.n, said.s);
        if (r->thought.n > 0)
            add_members(to, "reasoning_content: %.*s", (int)r->thought.n,
                        r->thought.s);
        if (calls.n > 0)
            add_calls(to, &calls, j->id, 0);
        add_string(to, "}");
    }
    add_logprobs(e, to, r, 0);
    add_members(to, "finish_reason: %s}", finish_reason(r, calls.n));
    free(said.s);
    free_calls(&calls);
}

/* Token counts of n answers, each prompt once.  How much of it was cached also
 * depends on other requests, so a batch does not say it. */
static void add_usage(const struct engine *e, struct text *to,
                      const struct job *j, int n)
{
    int prompt = 0, cached = 0, made = 0, thought = 0;

    for (int i = 0; i < n; i++) {
        prompt += i % j->q.n_choices ? 0 : j[i].q.prompt.n;
        cached += i % j->q.n_choices ? 0 : j[i].r.n_reused;
        made += j[i].r.n_made;
        thought += j[i].r.n_thought;
    }
    add_members(to, "usage: {prompt_tokens: %d, completion_tokens: %d, "
                "total_tokens: %d", prompt, made, prompt + made);
    if (e->s->mode == SERVE)
        add_members(to, "prompt_tokens_details: {cached_tokens: %d}", cached);
    add_members(to, "completion_tokens_details: {reasoning_tokens: %d}}",
                thought);
}

/* The response for n answers, without its closing brace. */
static void add_completion(const struct engine *e, struct text *to,
                           struct job *j, int n, uint64_t id,
                           long long created)
{
    add_head(e, to, j->q.is_completion, 0, id, created);
    add_members(to, "choices: [");
    for (int i = 0; i < n; i++)
        add_choice(e, to, &j[i], i);
    add_string(to, "]");
    add_usage(e, to, j, n);
}

/* Tokens per second: of the prompt, without those from the cache; and of the
 * answer, without the first, which comes with the prompt.  NAN: none. */
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

/* Which model answered, how to reproduce the answer, and how long it took. */
static void add_origin(const struct engine *e, struct text *to,
                       const struct job *j, int uses_date)
{
    static const char *const finish[] = { "interrupted", "stop", "length",
                                          "context", "error" };
    const struct reply *r = &j->r;
    const struct sampling *p = &j->q.sampling;

    add_members(to, "lfm2: {finish: %s, model_hash: %016llx, "
                "logits_hash: %016llx, template: %s, date: %s, seed: ",
                finish[r->finish], (unsigned long long)
                lfm2_model_hash(e->model), (unsigned long long)r->hash,
                template_name(e->template), uses_date ? e->date : NULL);
    add_format(to, "%lld", j->q.seed);
    add_members(to, "temperature: %g, top_k: %d, top_p: %g, min_p: %g, "
                "repeat_penalty: %g, repeat_last_n: %d", p->temp, p->top_k,
                p->top_p, p->min_p, p->repeat, p->last_n);
    add_members(to, "timings: {cache_n: %d, prompt_n: %d, prompt_ms: %g, "
                "prompt_per_second: %g, predicted_n: %d, predicted_ms: %g, "
                "predicted_per_second: %g, draft_n: %d, draft_n_accepted: "
                "%d}}", r->n_reused, r->q->prompt.n - r->n_reused,
                (r->read - r->started) * 1e3, prompt_speed(r), r->n_made,
                (r->ended - r->read) * 1e3, answer_speed(r), r->n_guessed,
                r->n_right);
}

/* ------------------------------------------------------- 6. Reading requests
 *
 * A request is a JSON object, as OpenAI's clients send it: the body of an HTTP
 * request, a line of --batch, or the file of --messages.  Most of its members
 * are options (section 11) under another name. */

/* Members that are not options, but read by name where they are used. */
static const char read_elsewhere[] =
    "custom_id messages prompt tools model logprobs logit_bias stream_options "
    "add_generation_prompt continue_final_message chat_template_kwargs "
    "keep_past_thinking preserve_thinking response_format tool_choice "
    "parallel_tool_calls";

/* Members that are ignored, because they would not change the answer. */
static const char harmless[] =
    "user metadata store service_tier safety_identifier "
    "prompt_cache_key prompt_cache_retention cache_prompt";

/* Members that are accepted with this value only. */
static const char *const neutral[][2] = {
    { "best_of", "1" }, { "suffix", "\"\"" }, { "modalities", "[\"text\"]" }
};

static int is_word(const struct json *x, const char *word)
{
    return json_is(x, JSON_STRING) && strcmp(x->s, word) == 0;
}

/* Set the field of an option from a member.  Returns 0, or -1 if its value is
 * not valid.  Strings are copied, as a request may outlive its JSON. */
static int set_member(struct request *q, const struct option *o,
                      const struct json *x)
{
    void *slot = (char *)q + (o->at - AT(ask));
    const int is_list = x->type == JSON_ARRAY;
    double value;
    long long whole;

    if (o->kind == FLAG)
        return json_bool(x, slot);
    if (o->kind == TEXTS) {
        for (x = is_list ? x->first : x; x; x = is_list ? x->next : NULL) {
            char *copy = pool_get(&q->pool, x->n + 1);
            if (!json_text(x) ||
                add_text(slot, memcpy(copy, x->s, x->n + 1)) != 0)
                return -1;
        }
        return 0;
    }
    if (json_double(x, &value) != 0 || !(value >= o->min && value <= o->max) ||
        (o->kind != REAL && value != floor(value)))
        return -1;
    if (json_int(x, LLONG_MIN, LLONG_MAX, &whole) != 0)
        whole = (long long)value;         /* written as 1e3, or 5.0          */
    return set_number(slot, o, value, whole);
}

/* A member that is not an option. */
static int check_member(const struct json *x, struct why *why)
{
    static unsigned noted;
    const int i = find_word(harmless, ' ', x->key);
    struct text value = { 0 };
    int is_same;

    if (i >= 0 && !(noted & 1u << i))
        note("\"%s\" is ignored", x->key);
    noted |= i >= 0 ? 1u << i : 0;
    if (i >= 0 || find_word(read_elsewhere, ' ', x->key) >= 0)
        return DONE;
    for (size_t k = 0; k < sizeof neutral / sizeof *neutral; k++)
        if (strcmp(neutral[k][0], x->key) == 0) {
            add_json(&value, x);
            is_same = strcmp(neutral[k][1], value.s) == 0;
            free(value.s);
            return is_same ? DONE : because(why, USAGE, "\"%s\": expected %s",
                                            x->key, neutral[k][1]);
        }
    return because(why, USAGE, "\"%.60s\" is not known here, and might change "
                   "the answer", x->key);
}

/* An object of token ids, and what is added to their logits. */
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
        if (x->key[0] < '0' || x->key[0] > '9' || *end || id >= n_vocab ||
            json_double(x, &by) != 0 || !(by >= -1000 && by <= 1000))
            return because(why, USAGE, "\"logit_bias\": \"%.40s\", expected "
                           "token ids from 0 to %d, and numbers from -1000 to "
                           "1000", x->key, n_vocab - 1);
        q->bias[q->n_bias++] = (struct bias){ (int32_t)id, (float)by };
    }
    return DONE;
}

/* Read all of a body but its prompt into *q, which holds the options.
 * "logprobs" is true or false with messages, and a number with a prompt; "echo"
 * asks for log probabilities of the prompt, too. */
static int read_body(const struct engine *e, struct request *q,
                     const struct json *body, struct why *why)
{
    const struct json *scores = member(body, "logprobs");
    long long k;
    int code = DONE, wanted;

    for (const struct json *x = body->first; x && code == DONE; x = x->next) {
        const struct option *o = option_of_member(x->key);
        if (x->type == JSON_NULL)
            continue;
        if (!o)
            code = check_member(x, why);
        else if (set_member(q, o, x) != 0)
            code = because(why, USAGE, "\"%s\": expected %s", x->key,
                           values_of(o).s);
    }
    if (code == DONE && (q->stream || q->n_choices > 1) && e->s->mode != SERVE)
        code = because(why, USAGE, "\"%s\": expected %s", q->stream ? "stream" :
                       "n", q->stream ? "false" : "1");
    if (code == DONE)
        code = read_bias(e, q, member(body, "logit_bias"), why);
    if (code != DONE)
        return code;
    k = q->logprobs;
    if (scores && json_bool(scores, &wanted) == 0)
        k = !wanted ? -1 : k < 0 ? 0 : k;
    else if (scores && json_int(scores, 0, MAX_LOGPROBS, &k) != 0)
        return because(why, USAGE, "\"logprobs\": expected true, false or a "
                       "whole number from 0 to %d", MAX_LOGPROBS);
    q->logprobs = (int)k;
    if (q->echo && k >= 0 && q->prompt_logprobs < 0)
        q->prompt_logprobs = (int)k;
    return DONE;
}

/* ---- from messages to a prompt */

/* Set *out if the object has this flag; one of another type is an error. */
static int read_flag(const struct json *object, const char *key, int *out,
                     struct why *why)
{
    const struct json *x = member(object, key);

    return !x || json_bool(x, out) == 0 ? DONE :
           because(why, USAGE, "\"%s\": expected true or false", key);
}

/* What the prompt already has of the answer: nothing, "<think>", or the message
 * to continue. */
static const char *answer_of(const struct rendered *r)
{
    static const char start[] = TURN_START "assistant\n";
    const char *const end = r->text.s + r->text.n, *from = end;

    for (int i = 0; i < r->n_marks; i++) {
        const char *mark = r->text.s + r->mark[i].from;
        if (begins(mark, end, start))
            from = mark + strlen(start);
        else if (begins(mark, end, TURN_START) || begins(mark, end, TURN_END))
            from = end;
    }
    return from;
}

static int ends_in_thought(const struct rendered *r)
{
    const char *const end = r->text.s + r->text.n, *at = answer_of(r);
    int inside = 0;

    while ((at = find(at, end, inside ? THINK_END : THINK))) {
        inside = !inside;
        at++;
    }
    return inside;
}

/* Make the prompt from messages: as text in *out, as tokens in q->prompt.
 * `body` may be NULL; what it says about the last message no longer applies
 * once the conversation has `grown`. */
static int make_prompt(struct engine *e, struct request *q,
                       const struct json *messages, const struct json *tools,
                       const struct json *body, int grown,
                       struct rendered *out, struct why *why)
{
    static const char *const keep[] = { "keep_past_thinking",
                                        "preserve_thinking" };
    const struct json *kwargs = member(body, "chat_template_kwargs");
    struct conversation c = {
        .messages = messages, .tools = tools, .date = e->date,
        .open_thought = e->opens_thought
    };
    int code = DONE;

    for (int i = 0; i < 4 && code == DONE; i++)
        if (!c.keep_thinking)
            code = read_flag(i < 2 ? body : kwargs, keep[i % 2],
                             &c.keep_thinking, why);
    body = grown ? NULL : body;
    if (code == DONE)
        code = read_flag(body, "continue_final_message", &c.continue_last, why);
    c.generate = !c.continue_last;
    if (code == DONE)
        code = read_flag(body, "add_generation_prompt", &c.generate, why);
    rendered_free(out);
    free(q->prompt.id);
    q->prompt = (struct ids){ NULL, 0 };
    if (code == DONE)
        code = render(&c, e->template, out, why);
    if (code == DONE)
        code = encode_rendered(e->words, out, e->s->special, &q->prompt, why);
    if (out->lost_calls && !e->is_warned++)
        note("template %s ignores the tool_calls of messages; calls belong in "
             "the content, as --think raw prints them",
             template_name(e->template));
    q->in_thought = code == DONE && ends_in_thought(out);
    return code;
}

/* The first prompt of a body, and the number of prompts: "prompt" may be an
 * array of them. */
static const struct json *first_prompt(const struct json *body, int *n)
{
    const struct json *prompt = member(body, "prompt");
    const int is_list = json_is(prompt, JSON_ARRAY) && prompt->first &&
                        prompt->first->type != JSON_NUMBER;

    *n = is_list ? prompt->n_members : 1;
    return is_list ? prompt->first : prompt;
}

/* Read a body.  `prompt` is one of its prompts; NULL if it has messages. */
static int read_request(struct engine *e, struct request *q,
                        const struct json *body, const struct json *prompt,
                        struct why *why)
{
    const struct json *messages = member(body, "messages");
    const struct json *tools = is_word(member(body, "tool_choice"), "none") ?
                               NULL : member(body, "tools");
    struct rendered rendered = { .n_marks = 0 };
    long long id;
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
    if (messages) {
        code = make_prompt(e, q, messages, tools, body, 0, &rendered, why);
        rendered_free(&rendered);
    } else if (prompt->type == JSON_STRING)
        encode_plain(e->s, e->words, prompt->s, prompt->n, &q->prompt);
    else {
        const struct json *x = prompt->first;
        q->prompt.id = zeroed((size_t)prompt->n_members, sizeof *q->prompt.id);
        for (; x && json_int(x, 0, INT32_MAX, &id) == 0; x = x->next)
            q->prompt.id[q->prompt.n++] = (int32_t)id;
        if (prompt->type != JSON_ARRAY || x)
            code = because(why, USAGE, "\"prompt\": expected a string, or an "
                           "array of token ids");
    }
    complete_request(e, q);
    return code;
}

/* ----------------------------------------- 7. Answers, conversations, sessions
 *
 * Every turn renders the whole conversation into a new prompt.  Tokens that are
 * still in the cache are not computed again. */

/* A conversation with the user at the command line. */
struct talk {
    struct engine *e;
    struct pool pool;                     /* holds the JSON below            */
    struct json messages;                 /* an array                        */
    const struct json *body, *tools;      /* of --messages; NULL: none       */
    int grown;                            /* has messages not from the body  */
    struct rendered prompt;
    struct job job;
    struct printer printer;
};

/* Report what is wrong; `path` is the file at fault, or NULL. */
static int blame(int code, const char *path, const struct why *why)
{
    return say(code, "%s%s%s", path ? path : "", path ? ": " : "", why->s);
}

/* The link to the last message if it has this role; otherwise, or if the role
 * is NULL, the link where the next message goes. */
static struct json **last_of(struct talk *t, const char *role)
{
    struct json **at = &t->messages.first;

    while (*at && ((*at)->next || !role || !has_role(*at, role)))
        at = &(*at)->next;
    return at;
}

/* The message is written as JSON and parsed, which replaces invalid UTF-8. */
static int add_message(struct talk *t, const char *role, const char *s,
                       size_t n)
{
    struct text text = { 0 };
    struct json *m;
    struct why why;
    int code;

    add_members(&text, "{role: %s, content: %.*s}", role, (int)n, s);
    code = json_parse(&t->pool, text.s, text.n, &m, &why);
    free(text.s);
    if (code != DONE)
        return say(FAILED, "this message is too long: %s", why.s);
    *last_of(t, NULL) = m;
    t->grown = 1;
    return DONE;
}

/* Is the last message an answer that is not to be continued? */
static int ends_with_answer(struct talk *t)
{
    int continues = 0;

    if (!t->grown)
        json_bool(member(t->body, "continue_final_message"), &continues);
    return !continues && *last_of(t, "assistant");
}

static int read_json(struct pool *pool, const char *path, struct json **out)
{
    struct text text = { 0 };
    struct why why;
    int code = read_text_file(path, &text);

    if (code == DONE &&
        (code = json_parse(pool, text.s, text.n, out, &why)) != DONE)
        blame(code, path, &why);
    free(text.s);
    return code;
}

/* Read a JSON file that holds an array, or an object with one under `key`. */
static int read_list(struct talk *t, const char *path, const char *key,
                     const struct json **whole, const struct json **list)
{
    struct json *v = NULL;
    const int code = read_json(&t->pool, path, &v);

    if (code != DONE)
        return code;
    *whole = v;
    *list = v->type == JSON_OBJECT ? json_get(v, key) : v;
    return json_is(*list, JSON_ARRAY) ? DONE :
           say(USAGE, "%s: expected a JSON array, or an object with one "
               "under \"%s\"", path, key);
}

/* Read the files of --messages and --tools, and settle how to answer. */
static int read_talk(struct talk *t)
{
    const struct settings *s = t->e->s;
    const struct json *whole, *list;
    struct request *q = &t->job.q;
    struct why why;
    int code = DONE;

    t->messages.type = JSON_ARRAY;
    *q = s->ask;
    q->prompt_logprobs = q->logprobs;     /* --logprobs asks for both        */
    q->is_completion = t->e->template == TEMPLATE_NONE;
    if (s->messages)
        code = read_list(t, s->messages, "messages", &t->body, &list);
    if (code == DONE && s->messages) {
        t->messages = *list;
        t->tools = is_word(member(t->body, "tool_choice"), "none") ? NULL :
                   member(t->body, "tools");
    }
    if (code == DONE && s->tools)
        code = read_list(t, s->tools, "tools", &whole, &t->tools);
    if (code != DONE)
        return code;
    if (json_is(t->body, JSON_OBJECT))
        code = read_body(t->e, q, t->body, &why);
    if (code == DONE)
        code = read_form(t->e, q, t->body, t->tools, &why);
    complete_request(t->e, q);
    return code == DONE ? DONE :
           blame(code, s->messages ? s->messages : s->tools, &why);
}

/* Build t->job.q.prompt from all messages; `path` is their file, or NULL. */
static int prompt_talk(struct talk *t, const char *path)
{
    struct why why;
    int code;

    free_reply(&t->job.r);                /* it refers to the old prompt     */
    code = make_prompt(t->e, &t->job.q, &t->messages, t->tools, t->body,
                       t->grown, &t->prompt, &why);
    return code == DONE ? DONE : blame(code, path, &why);
}

/* Add the user's next message; the system prompt goes before the first. */
static int ask(struct talk *t, const struct text *question)
{
    const struct settings *s = t->e->s;
    struct text system = { 0 };
    int code = check_text(question, "the prompt");

    if (code == DONE && !t->messages.first && s->system_file)
        code = read_text_file(s->system_file, &system);
    else if (!t->messages.first && s->system)
        add_string(&system, s->system);
    if (code == DONE)
        code = check_text(&system, s->system_file ? s->system_file : "-sys");
    if (code == DONE && system.n > 0)
        code = add_message(t, "system", system.s, system.n);
    if (code == DONE)
        code = add_message(t, "user", question->s, question->n);
    free(system.s);
    return code;
}

/* ---- one answer */

/* Print the speed of an answer, and what limits it: bytes read per token. */
static void print_speed(const struct talk *t)
{
    const struct engine *e = t->e;
    const struct reply *r = &t->job.r;
    const struct cost cost = count_cost(e->model, e->par.kv_type);
    const double bytes = step_bytes(e->model, &cost, 1, r->ids.n);
    const double prompt = prompt_speed(r), answer = answer_speed(r);
    const double rate = bytes * r->n_steps / (r->ended - r->read);
    const double own = anonymous_memory();

    note("prompt of %d tokens, %d of them new%s; answer of %d tokens%s",
         r->q->prompt.n, r->q->prompt.n - r->n_reused,
         isfinite(prompt) ? phrase(", %.1f tok/s", prompt).s : "", r->n_made,
         isfinite(answer) ? phrase(", %.1f tok/s", answer).s : "");
    note("each token reads %s of weights and cache%s; memory %s%s",
         amount(bytes, "B").s, isfinite(answer) ?
         phrase(", %s/s", amount(rate, "B").s).s : "",
         amount(peak_memory(), "B").s, own > 0 ?
         phrase(", %s of it not from the file", amount(own, "B").s).s : "");
    if (r->n_guessed > 0)
        note("guessed %d tokens, %d of them right", r->n_guessed, r->n_right);
    if (r->n_resampled > 0)
        note("%d tokens did not fit the schema; finding others took %.2f ms "
             "each", r->n_resampled, r->resample_time * 1e3 / r->n_resampled);
}

/* Print what is new in an answer; with --json, nothing until it has ended. */
static void print_answer(struct job *j)
{
    struct talk *t = j->owner;
    const struct engine *e = t->e;
    struct text out = { 0 };

    if (!e->s->json && j->state == FINISHED)
        print_end(&t->printer, &j->r);
    else if (!e->s->json)
        print_reply(&t->printer, &j->r);
    else if (j->state == FINISHED) {
        add_completion(e, &out, j, 1, j->id, (long long)time(NULL));
        add_origin(e, &out, j, t->tools && t->tools->first &&
                   template_is_dated(e->template));
        add_string(&out, "}\n");
        show_text(&out);
        free(out.s);
        t->printer.code = flush_output(DONE);
    }
}

static const struct sink to_user = { print_answer, print_answer };

/* Answer t->job.q.prompt.  If interrupted, keep what was generated so far. */
static int run_reply(struct talk *t)
{
    struct engine *e = t->e;
    struct job *j = &t->job;
    struct why why;
    int code;

    t->printer = start_printer(e->s);
    j->to = &to_user;
    j->owner = t;
    j->id = hash_bytes(HASH_START, (const char *)&j->q.seed, 8) ^
            hash_bytes(HASH_START, (const char *)j->q.prompt.id,
                       (size_t)j->q.prompt.n * 4);
    code = engine_add(e, j, &why);
    if (code != DONE)
        return blame(code, NULL, &why);
    if (e->s->verbose)
        note("seed %lld; %s", j->q.seed, describe_sampling(&j->q.sampling).s);
    running = e->ctx;
    while (code == DONE && j->state != FINISHED) {
        code = engine_step(e);
        if (code == INTERRUPTED && !interrupted)
            code = DONE;                  /* a Ctrl-C for the last answer    */
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
    if (j->r.finish == BY_LENGTH && j->q.schema)
        note("stopped after %d tokens (-n): the JSON is not complete",
             j->r.n_made);
    if (e->s->verbose && j->r.q)
        print_speed(t);
    return code == DONE ? t->printer.code : code;
}

/* Build t->job.q.prompt from the options. */
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
        encode_plain(s, e->words, text.s, text.n, &t->job.q.prompt);
    else if (code == DONE && (s->messages || (code = ask(t, &text)) == DONE))
        code = prompt_talk(t, s->messages);
    free(text.s);
    if (code == DONE && s->messages && s->mode == ANSWER && ends_with_answer(t))
        note("%s: the last message is the assistant's, expected the user's",
             s->messages);
    return code;
}

/* --logits: a row of little-endian floats for every token of the prompt. */
static int write_logits(struct talk *t)
{
    const struct engine *e = t->e;
    const struct ids *prompt = &t->job.q.prompt;
    const size_t n_vocab = (size_t)lfm2_model_config(e->model)->n_vocab;
    FILE *f = create_file(e->s->logits);
    struct why why;
    int code = check_prompt(e, &t->job.q, &why);

    if (code != DONE)
        blame(code, NULL, &why);
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

/* ---- sessions
 *
 * What --session keeps between runs, all numbers little-endian:
 *
 *     "LFM2SES1"
 *     u64 n | the conversation: n bytes of JSON, an array of messages
 *     u64 n | the token ids in the cache: n times u32
 *     u64     FNV-1a hash of everything above
 *     u64 n | the sequence: n bytes from lfm2_seq_save(), with its own checksum
 *
 * A sequence that cannot be used, for example with another model, is computed
 * again.  A damaged session, or any other file, is never overwritten. */

static const char session_magic[] = "LFM2SES1";

/* Append n items of `each` bytes from a file to a text.  Counts in a file
 * cannot be trusted, so nothing is allocated unless the file is that long. */
static int take(FILE *f, uint64_t n, uint64_t each, struct text *to)
{
    const off_t at = ftello(f);
    struct stat st;
    size_t size;

    if (at < 0 || fstat(fileno(f), &st) != 0 || st.st_size < at ||
        n > (uint64_t)(st.st_size - at) / each || n > SIZE_MAX / 2 / each)
        return 0;
    size = (size_t)(n * each);
    reserve(to, size);
    to->n += size;
    return fread(to->s + to->n - size, 1, size, f) == size;
}

/* Append a count, and that many items. */
static int take_array(FILE *f, uint64_t each, struct text *to, uint64_t *n)
{
    if (!take(f, 8, 1, to))
        return 0;
    *n = get_le((unsigned char *)to->s + to->n - 8, 8);
    return take(f, *n, each, to);
}

/* Load a saved sequence of n tokens.  Returns NULL, or why it cannot be used;
 * then the cache is empty. */
static const char *load_sequence(struct engine *e, const char *ids, uint64_t n,
                                 const char *saved, uint64_t size,
                                 lfm2_error *err)
{
    const uint64_t n_vocab = (uint64_t)lfm2_model_config(e->model)->n_vocab;
    struct ids *to = &e->slot[0].cached;
    int good;

    if (lfm2_seq_load(e->ctx, 0, saved, size, err) != LFM2_OK)
        return err->msg;
    good = n == (uint64_t)lfm2_seq_len(e->ctx, 0);
    for (uint64_t i = 0; good && i < n; i++) {
        const uint64_t id = get_le((const unsigned char *)ids + 4 * i, 4);
        good = id < n_vocab;
        to->id[i] = (int32_t)id;
    }
    to->n = good ? (int)n : lfm2_seq_trim(e->ctx, 0, 0);
    return good ? NULL : "its tokens do not match its sequence";
}

/* Restore a session from a file that begins with the magic. */
static int restore(struct talk *t, FILE *f)
{
    const char *path = t->e->s->session, *why_not;
    struct text all = { 0 };
    struct json *messages = NULL;
    uint64_t n_json = 0, n_ids = 0, n_saved = 0;
    size_t n_hashed;
    struct why why;
    lfm2_error err;
    int good = take(f, 8, 1, &all) && take_array(f, 1, &all, &n_json) &&
               take_array(f, 4, &all, &n_ids);

    n_hashed = all.n;
    good = good && take(f, 8, 1, &all) &&
           get_le((unsigned char *)all.s + n_hashed, 8) ==
           hash_bytes(HASH_START, all.s, n_hashed) &&
           take_array(f, 1, &all, &n_saved) && getc(f) == EOF &&
           json_parse(&t->pool, all.s + 16, (size_t)n_json, &messages, &why) ==
           DONE && json_is(messages, JSON_ARRAY);
    if (!good)
        say(BAD_FILE, "%s: this session is truncated or damaged; it is left as "
            "it is", path);
    else {
        if (!t->e->s->messages)
            t->messages = *messages;
        why_not = load_sequence(t->e, all.s + 24 + n_json, n_ids,
                                all.s + n_hashed + 16, n_saved, &err);
        if (why_not)
            note("%s: the conversation is read again: %s", path, why_not);
        else if (t->e->s->verbose)
            note("%s: %d tokens", path, t->e->slot[0].cached.n);
    }
    free(all.s);
    return good ? DONE : BAD_FILE;
}

/* A file that does not exist yet, or is empty, starts a new session. */
static int load_session(struct talk *t)
{
    const struct settings *s = t->e->s;
    const char *path = s->session;
    char head[8];
    int code = replace_file(path, NULL);
    FILE *f = code == DONE ? fopen(path, "rb") : NULL;
    const size_t n = f ? fread(head, 1, sizeof head, f) : 0;

    if (n == 8 && memcmp(head, session_magic, 8) == 0) {
        rewind(f);
        code = restore(t, f);
        if (code == DONE && t->messages.first && (s->system || s->system_file))
            note("%s: goes on as it began, so -sys is not used", path);
    } else if (n > 0)
        code = say(BAD_FILE, "%s: %s; it is left as it is", path, n == 8 &&
                   memcmp(head, "LFM2", 4) == 0 ? "a session of another "
                   "version of this program" : "not a session");
    else if (code == DONE && (f ? ferror(f) : errno != ENOENT))
        code = say(BAD_FILE, "%s: %s", path, strerror(errno));
    if (f)
        fclose(f);
    return code;
}

static int save_session(struct talk *t)
{
    const struct engine *e = t->e;
    const struct ids *ids = &e->slot[0].cached;
    const uint64_t n = lfm2_seq_state_size(e->ctx, 0);
    struct text all = { 0 };
    lfm2_error err;
    int code;

    add_string(&all, session_magic);
    add_le(&all, 0, 8);                   /* the length of what follows      */
    add_json(&all, &t->messages);
    put_le((unsigned char *)all.s + 8, all.n - 16, 8);
    add_le(&all, (uint64_t)ids->n, 8);
    for (int i = 0; i < ids->n; i++)
        add_le(&all, (uint32_t)ids->id[i], 4);
    add_le(&all, hash_bytes(HASH_START, all.s, all.n), 8);
    add_le(&all, n, 8);
    reserve(&all, n < SIZE_MAX ? (size_t)n : SIZE_MAX);
    code = lfm2_seq_save(e->ctx, 0, all.s + all.n, n, &err);
    all.n += (size_t)n;
    code = code != LFM2_OK ? report(e->s->session, &err) :
           write_session(e->s->session, &all);
    free(all.s);
    return code;
}

/* Add the answer to the conversation, including the part already in the prompt,
 * and save the session.  An empty answer counts only if the model ended it. */
static int keep_answer(struct talk *t)
{
    const struct rendered *p = &t->prompt;
    const struct reply *r = &t->job.r;
    const char *from = answer_of(p);
    struct text whole = { 0 };
    int code = DONE;

    if (r->n_made > 0 || r->finish == STOPPED) {
        if (!ends_with_answer(t))
            *last_of(t, "assistant") = NULL;
        add(&whole, from, (size_t)(p->text.s + p->text.n - from));
        add(&whole, r->raw.s, r->raw.n);
        code = add_message(t, "assistant", whole.s, whole.n);
        free(whole.s);
    }
    return code == DONE && t->e->s->session ? save_session(t) : code;
}

/* The modes with one prompt: an answer, a chat, --logits and the dumps. */
static int work_on_model(const struct settings *s)
{
    struct engine e = { .s = s };
    struct talk t = { .e = &e };
    const struct ids *prompt = &t.job.q.prompt;
    int code = open_engine(&e), kept = DONE;

    if (code == DONE && s->mode == CHAT && e.template == TEMPLATE_NONE)
        code = usage("no prompt given, and a chat needs a chat template");
    if (code == DONE)
        code = read_talk(&t);
    if (code == DONE && s->session)
        code = open_context(&e);
    if (code == DONE && s->session)
        code = load_session(&t);
    if (code == DONE && s->mode != CHAT)
        code = prepare_prompt(&t);
    if (code == DONE && s->dump_prompt)
        show_text(&t.prompt.text);
    for (int i = 0; code == DONE && s->dump_tokens && i < prompt->n; i++)
        printf("%ld%s", (long)prompt->id[i], i + 1 < prompt->n ? " " : "\n");
    if (code == DONE && s->mode != DUMP && !e.ctx)
        code = open_context(&e);
    if (code == DONE)
        code = open_trace(&e);
    if (code == DONE && s->mode == ANSWER) {
        code = run_reply(&t);
        if (s->session && (code == DONE || (code == INTERRUPTED &&
                                            t.job.r.n_made > 0)))
            kept = keep_answer(&t);
    } else if (code == DONE && s->mode != DUMP)
        code = s->mode == CHAT ? chat(&t) : write_logits(&t);
    code = close_trace(&e, kept == DONE ? code : kept);
    free_reply(&t.job.r);
    free_request(&t.job.q);
    rendered_free(&t.prompt);
    pool_free(&t.pool);
    close_engine(&e);
    return code;
}

/* ------------------------------------------------------------------- 8. Chat
 *
 * At a terminal or, with -cnv, from a pipe; then no "> " is shown. */

/* Answer the messages so far.  A message that cannot be answered, such as one
 * that is too long, is removed.  Every turn has its own seed. */
static int answer_turn(struct talk *t)
{
    int code = prompt_talk(t, NULL);

    if (code == DONE) {
        interrupted = 0;
        code = run_reply(t);
    }
    if (code == TOO_LONG || code == USAGE) {
        *last_of(t, "user") = NULL;
        return DONE;
    }
    if (code != DONE && (code != INTERRUPTED || last_signal != SIGINT))
        return code;
    t->job.q.seed = (t->job.q.seed + 1) & INT64_MAX;
    return keep_answer(t);
}

/* Replace the system prompt; an empty text removes it. */
static int set_system(struct talk *t, const char *text)
{
    struct json *rest = t->messages.first;
    int code = DONE;

    if (rest && has_role(rest, "system"))
        rest = rest->next;
    t->messages.first = NULL;
    if (text[0])
        code = add_message(t, "system", text, strlen(text));
    *last_of(t, NULL) = rest;
    return code;
}

/* When a file could not be opened, say if the sandbox may be the reason. */
static void blame_sandbox(const struct settings *s)
{
    const int error = errno;
    const char *dir = save_dir(s);

    if (s->sandbox != SANDBOX_OFF && (error == EACCES || error == EPERM))
        say(DONE, "the sandbox lets a chat open %s%s; --save-dir DIR names a "
            "directory", dir ? "files only in " : "no files", dir ? dir : "");
}

static void save_talk(const struct talk *t, const char *path)
{
    struct text out = { 0 };

    add_string(&out, "{\"messages\": ");
    add_json(&out, &t->messages);
    add_string(&out, "}\n");
    if (!t->messages.first)
        say(DONE, "there is nothing to save");
    else if (replace_file(path, &out) == DONE)
        say(DONE, "%s: saved", path);
    else
        blame_sandbox(t->e->s);
    free(out.s);
}

/* If the file does not hold a conversation, keep the current one. */
static void load_talk(struct talk *t, const char *path)
{
    const struct json had = t->messages, *body = t->body, *whole, *list;

    if (read_list(t, path, "messages", &whole, &list) != DONE) {
        blame_sandbox(t->e->s);
        return;
    }
    t->messages = *list;
    t->body = NULL;
    if (!list->first || prompt_talk(t, path) == DONE)
        say(DONE, "%s: %d messages", path, list->n_members);
    else {
        t->messages = had;
        t->body = body;
    }
}

static const char chat_help[] =
    "Type a message and press Enter.  \"\"\" begins and ends a message of "
    "several lines;\na \\ at the end of a line continues it on the next; a "
    "space before a / makes the\nline a message, not a command.  Ctrl-C stops "
    "an answer.\n"
    "  /help         this text\n"
    "  /clear        forget the conversation\n"
    "  /regen        answer the last message again\n"
    "  /system TEXT  change the system prompt\n"
    "  /save FILE    write the conversation as JSON\n"
    "  /load FILE    continue a saved conversation\n"
    "  /stats        tokens, speed and memory\n"
    "  /quit         quit; so does Ctrl-D\n";

/* In the order of `commands`. */
enum { DO_HELP, DO_CLEAR, DO_REGEN, DO_SYSTEM, DO_SAVE, DO_LOAD, DO_STATS };

static const char commands[] =
    "/help /clear /regen /system /save /load /stats /quit /exit /bye";

/* Execute a line that begins with /.  Returns -1 to quit. */
static int do_command(struct talk *t, const char *line)
{
    const size_t n = strcspn(line, " ");
    const char *rest = line + n + strspn(line + n, " ");
    const int which = find_word(commands, ' ', phrase("%.*s", (int)n, line).s);

    if (which < 0)
        say(DONE, "%.*s: no such command; /help lists them", (int)n, line);
    else if (which == DO_HELP)
        fputs(chat_help, stderr);
    else if (which == DO_CLEAR) {
        t->messages.first = NULL;
        t->body = NULL;
    } else if (which == DO_REGEN) {
        *last_of(t, "assistant") = NULL;
        if (*last_of(t, "user"))
            return answer_turn(t);
        say(DONE, "there is no message to answer");
    } else if (which == DO_SYSTEM)
        return set_system(t, rest);
    else if (which < DO_STATS && !rest[0])
        say(DONE, "%.*s needs a file", (int)n, line);
    else if (which == DO_SAVE)
        save_talk(t, rest);
    else if (which == DO_LOAD)
        load_talk(t, rest);
    else if (which == DO_STATS) {
        say(DONE, "%d of %d tokens in the context", t->e->slot[0].cached.n,
            t->e->par.n_ctx);
        print_settings(t->e);
        if (t->job.r.q)
            print_speed(t);
    } else
        return -1;
    return DONE;
}

static int chat(struct talk *t)
{
    const struct settings *s = t->e->s;
    const struct piece name = model_name(t->e);
    const int is_terminal = isatty(STDIN_FILENO);
    struct text line = { 0 };
    int code = DONE, got = 0;

    if (is_terminal)
        note("%.*s; /help lists commands, Ctrl-D quits", (int)name.n, name.s);
    if (s->prompt || s->file || s->messages) {
        code = prepare_prompt(t);
        if (code == DONE && !ends_with_answer(t))
            code = answer_turn(t);
    }
    while (code == DONE && (got = read_message(&line, is_terminal)) > 0) {
        if (line.n == 0)
            continue;
        if (line.s[0] == '/' && !strchr(line.s, '\n'))
            code = do_command(t, line.s);
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
 * --parallel lines are answered at once, so that the weights are read once for
 * all of them.  An answer depends on its line alone: neighbours change no bit
 * of it, and its seed is a hash of the line unless the line names one. */

enum { MAX_LINE = 1 << 26, AHEAD = 4 };   /* AHEAD: lines kept per sequence  */

struct entry {                            /* a line, from reading to writing */
    struct job job;
    struct batch *batch;
    long long line, end;                  /* number; offset of its end       */
    struct text id, out;                  /* custom_id; the line of output,
                                             empty until it is complete      */
};

/* Input that is read line by line. */
struct source {
    int fd;
    struct text buf;
    size_t at;                            /* in buf: start of the next line  */
    size_t searched;                      /* bytes of it without a newline   */
    int torn;                             /* the last line had no newline    */
    int ended, error;                     /* error: errno, or 0              */
    long long line, end;                  /* number of the last; its end     */
    long long n_read;                     /* bytes                           */
};

/* An id for which earlier runs have written n answers. */
struct known { struct text id; int n; };

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
    double tokens, reused, guessed, right, started, reported;
    double size, written;                 /* bytes of input; of it, answered */
};

/* ---- a line of output */

static const char output_start[] = "{\"id\": \"batch_req_";

/* No time is in it, so that the same line always gives the same bytes. */
static void add_output(struct entry *x, int code, const char *why)
{
    static const char *const name[] = {
        [FAILED] = "failed", [USAGE] = "invalid_request",
        [BAD_MODEL] = "bad_model", [TOO_LONG] = "context_length_exceeded"
    };
    const unsigned long long id = x->job.id;
    struct text *out = &x->out;

    add_members(out, "{id: %s, custom_id: %.*s",
                phrase("batch_req_%016llx", id).s, (int)x->id.n, x->id.s);
    if (code != DONE) {
        add_members(out, "response: %s, error: {code: %s, line: %llu, message: "
                    "%s}}", NULL, name[code], (unsigned long long)x->line, why);
        x->batch->failed++;
    } else {
        add_members(out, "response: {status_code: %d, request_id: %s, body: ",
                    200, phrase("req_%016llx", id).s);
        add_completion(&x->batch->e, out, &x->job, 1, id, 0);
        add_string(out, "}}, \"error\": null}");
        x->batch->done++;
    }
    add_string(out, "\n");
}

static void finish_entry(struct job *j)
{
    struct entry *x = j->owner;
    struct batch *b = x->batch;

    b->tokens += j->q.prompt.n + j->r.n_made;
    b->reused += j->r.n_reused;
    b->guessed += j->r.n_guessed;
    b->right += j->r.n_right;
    add_output(x, j->r.finish == BROKEN ? FAILED : DONE,
               "logits that are not finite");
    free_reply(&j->r);
}

static const struct sink to_line = { NULL, finish_entry };

static void free_entry(struct entry *x)
{
    free_reply(&x->job.r);
    free_request(&x->job.q);
    free(x->id.s);
    free(x->out.s);
}

/* ---- the input */

/* Get the next line, with its \n or \r\n replaced by NUL.  Returns 0 if it has
 * not arrived yet, or at the end.  A line beyond MAX_LINE may lose its tail.  A
 * signal ends the wait within a second, as it may come just before poll(). */
static int next_line(struct source *in, int wait, struct piece *line)
{
    struct pollfd p = { in->fd, POLLIN, 0 };

    for (;;) {
        reserve(&in->buf, 1 << 16);
        char *from = in->buf.s + in->at;
        size_t n = in->buf.n - in->at;
        const char *end = memchr(from + in->searched, '\n', n - in->searched);
        if (end || (in->ended && n > 0)) {
            n = end ? (size_t)(end - from) : n;
            in->at += n + (end != NULL);
            in->end = in->n_read - (long long)(in->buf.n - in->at);
            in->searched = 0;
            in->torn = !end;
            in->line++;
            n -= n > 0 && from[n - 1] == '\r';
            from[n] = '\0';
            *line = (struct piece){ from, n };
            return 1;
        }
        in->searched = n = n <= MAX_LINE ? n : MAX_LINE + 1;
        if (in->at > 0)
            memmove(in->buf.s, from, n);
        in->buf.n = n;
        in->at = 0;
        while (!in->ended && poll(&p, 1, wait ? 1000 : 0) <= 0)
            if (!wait || interrupted)
                return 0;
        if (in->ended || interrupted)
            return 0;
        const ssize_t got = read(in->fd, in->buf.s + n, 1 << 16);
        in->ended = got == 0 || (got < 0 && errno != EINTR);
        in->error = got < 0 && in->ended ? errno : 0;
        in->buf.n += got > 0 ? (size_t)got : 0;
        in->n_read += got > 0 ? got : 0;
    }
}

/* Read the request of a line.  Its seed is a hash of the line, and of -s. */
static int read_entry(struct batch *b, struct entry *x,
                      const struct json *line, struct why *why)
{
    const struct json *id = member(line, "custom_id");
    const struct json *within = member(line, "body");
    const struct json *body = within ? within : line;
    const struct json *method = member(line, "method");
    const struct json *url = member(line, "url"), *prompt;
    struct request *q = &x->job.q;
    struct text asked = { 0 };
    uint64_t hash;
    int n_prompts;

    if (id && id->type != JSON_STRING)
        return because(why, USAGE, "\"custom_id\": expected a string");
    if (id) {
        x->id.n = 0;
        add(&x->id, id->s, id->n);
        add_json(&asked, id);
    }
    add_json(&asked, body);
    hash = hash_bytes(HASH_START, asked.s, asked.n);
    x->job.id = hash_number(hash, (uint64_t)x->line);
    free(asked.s);
    if (within && method && !is_word(method, "POST"))
        return because(why, USAGE, "\"method\": expected \"POST\"");
    if (within && url && !is_word(url, "/v1/chat/completions") &&
        !is_word(url, "/v1/completions"))
        return because(why, USAGE, "\"url\": expected \"/v1/chat/completions\" "
                       "or \"/v1/completions\"");
    q->seed = (long long)(hash ^ (q->seed == -1 ? 0 : (uint64_t)q->seed));
    prompt = first_prompt(body, &n_prompts);
    if (n_prompts > 1)
        return because(why, USAGE, "\"prompt\": expected one prompt on a line");
    return read_request(&b->e, q, body, prompt, why);
}

/* ---- resuming an earlier run */

static int by_id(const void *a, const void *b)
{
    const struct text *x = &((const struct known *)a)->id;
    const struct text *y = &((const struct known *)b)->id;

    return compare(x->s, x->n, y->s, y->n);
}

/* Does this line, which may be torn, begin like output of --batch? */
static int is_ours(const struct piece *line)
{
    const size_t len = strlen(output_start);

    return memcmp(line->s, output_start, line->n < len ? line->n : len) == 0;
}

/* Record the custom_id of a line of output, which needs no second answer. */
static int add_known(struct batch *b, const struct piece *line,
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
    id = member(whole, "custom_id");
    if (json_is(id, JSON_STRING)) {
        b->known[n] = (struct known){ .n = 1 };
        add(&b->known[b->n_known++].id, id->s, id->n);
        b->failed_before += member(whole, "error") != NULL;
    }
    pool_free(&pool);
    return b->n_known > (int)n ? DONE :
           say(BAD_FILE, "%s: line %lld was not written by --batch",
               b->out_name, number);
}

/* Lock a file until this process exits.  Returns 1 if another process has
 * locked it; always 0 on systems without locks. */
static int another_has_lock(int fd)
{
#ifdef F_SETLK
    struct flock all = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

    return fcntl(fd, F_SETLK, &all) != 0 && (errno == EAGAIN ||
                                             errno == EACCES);
#else
    return (void)fd, 0;
#endif
}

/* Open the output of an earlier run, and record what it answered.  A torn last
 * line is cut off.  Two processes with one file would answer lines twice. */
static int open_resumed(struct batch *b)
{
    const char *path = b->out_name = b->e.s->resume;
    const int fd = open(path, O_RDWR | O_CREAT | O_APPEND, 0666);
    struct source from = { .fd = fd };
    struct piece line;
    struct stat st;
    off_t end = 0;                        /* of the last whole line          */
    int code = DONE, n = 0;

    b->out = fd;
    if (fd < 0 || fstat(fd, &st) != 0)
        return say(BAD_FILE, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return say(BAD_FILE, "%s: not a regular file", path);
    if (another_has_lock(fd))
        return say(BAD_FILE, "%s: another process is writing to it", path);
    while (code == DONE && next_line(&from, 1, &line))
        if (!from.torn || !is_ours(&line)) {
            code = add_known(b, &line, from.line);
            end = from.end;
        } else if (ftruncate(fd, end) != 0)
            from.error = errno;
    if (code == DONE && from.error)
        code = say(BAD_FILE, "%s: %s", path, strerror(from.error));
    free(from.buf.s);
    if (code == DONE)
        note("%s: %d lines are there already%s", path, b->n_known,
             b->failed_before == 0 ? "" :
             phrase("; remove the %lld that failed to try them again",
                    b->failed_before).s);
    if (b->n_known > 0)
        qsort(b->known, (size_t)b->n_known, sizeof *b->known, by_id);
    for (int i = 0; i < b->n_known; i++)
        if (n > 0 && by_id(&b->known[n - 1], &b->known[i]) == 0) {
            b->known[n - 1].n++;
            free(b->known[i].id.s);
        } else
            b->known[n++] = b->known[i];
    b->n_known = n;
    return code;
}

/* ---- many requests */

/* Turn a line into a job, unless an earlier run has answered it.  Each earlier
 * answer accounts for one line with its id. */
static void add_entry(struct batch *b, const struct piece *line)
{
    const char *const end = line->s + line->n;
    struct entry *x = &b->entry[(b->first + b->n_entries) % b->n_ring];
    struct known *known = NULL;
    struct text text = { 0 };
    struct pool pool = { 0 };
    struct json *whole = NULL;
    struct why why;
    int code;

    *x = (struct entry){
        .batch = b, .line = b->in.line, .end = b->in.end,
        .job = { .q = b->e.s->ask, .to = &to_line, .owner = x }
    };
    add_format(&x->id, "line-%lld", x->line);
    x->job.id = hash_number(hash_bytes(HASH_START, line->s, line->n),
                            (uint64_t)x->line);
    add(&text, line->s, line->n);
    clean_text(&text);
    if (line->n > MAX_LINE)
        code = because(&why, USAGE, "longer than %d bytes", MAX_LINE);
    else if (begins(line->s, end, "\xff\xfe") ||
             begins(line->s, end, "\xfe\xff"))
        code = because(&why, USAGE, "UTF-16, expected UTF-8: iconv -f UTF-16 "
                       "-t UTF-8 converts the file");
    else
        code = json_parse(&pool, text.s, text.n, &whole, &why);
    free(text.s);
    if (code == DONE)
        code = read_entry(b, x, whole, &why);
    pool_free(&pool);
    if (b->n_known > 0)
        known = bsearch(&(struct known){ .id = x->id }, b->known,
                        (size_t)b->n_known, sizeof *known, by_id);
    if (known && known->n > 0) {
        known->n--;
        b->skipped++;
        free_entry(x);
        return;
    }
    if (code == DONE)
        code = engine_add(&b->e, &x->job, &why);
    if (code != DONE)
        add_output(x, code, without_line(&why));
    b->n_entries++;
}

/* A line on standard error every ten seconds, and at the end. */
static void report_progress(struct batch *b, int last)
{
    const double now = seconds(), took = now - b->started + 1e-9;
    const double part = b->size > 0 ? b->written / b->size : 0;

    if (!last && now - b->reported < 10)
        return;
    b->reported = now;
    note("%lld answered, %lld failed, %lld skipped; %.1f tok/s, %.0f s%s",
         b->done, b->failed, b->skipped, b->tokens / took, took,
         !last && part > 0 && part < 1 ?
         phrase(", %.0f %%, %.0f s to go", part * 100,
                took / part * (1 - part)).s : "");
    if (last && b->e.s->verbose)
        note("%.0f tokens, %.0f of them reused%s", b->tokens, b->reused,
             b->guessed > 0 ? phrase("; guessed %.0f, %.0f of them right",
                                     b->guessed, b->right).s : "");
}

/* Lines are read while the ring has room; the loop waits for them only if there
 * is nothing else to do.  Answers are written in the order of the input, each
 * with one write() if possible, so that no line of output is partial. */
static int run_batch(struct batch *b)
{
    struct piece line;
    int code = DONE;

    while (code == DONE) {
        while (b->n_entries < b->n_ring &&
               next_line(&b->in, b->n_entries == 0, &line))
            if (strspn(line.s, " \t\r") < line.n &&
                (b->in.line - 1) % b->n_shards == b->shard)
                add_entry(b, &line);
        while (code == DONE && b->n_entries > 0 &&
               b->entry[b->first].out.n > 0) {
            struct entry *x = &b->entry[b->first];
            if (isatty(b->out))
                x->out.n = drop_controls(x->out.s, x->out.n);
            if (write_all(b->out, x->out.s, x->out.n) != 0)
                code = say(BAD_FILE, "%s: %s", b->out_name, strerror(errno));
            b->written = (double)x->end;
            free_entry(x);
            b->first = (b->first + 1) % b->n_ring;
            b->n_entries--;
        }
        if (code != DONE || interrupted || (b->n_entries == 0 && b->in.ended &&
                                            b->in.at == b->in.buf.n))
            break;
        code = engine_step(&b->e);
        if (code == DONE)
            report_progress(b, 0);
    }
    if (code == DONE && interrupted)
        code = INTERRUPTED;
    if (code == DONE && b->in.error)
        code = say(BAD_FILE, "%s: %s", b->in_name, strerror(b->in.error));
    for (; b->n_entries > 0; b->n_entries--)
        free_entry(&b->entry[(b->first + b->n_entries - 1) % b->n_ring]);
    return code;
}

/* --shard I/N: every N-th line, starting at line I, counted from 0. */
static int open_batch(struct batch *b)
{
    const struct settings *s = b->e.s;
    const char *shard = s->shard ? s->shard : "0/1";
    struct stat st;
    int end = 0, code;

    if (sscanf(shard, "%d/%d%n", &b->shard, &b->n_shards, &end) != 2 ||
        shard[end] || b->shard < 0 || b->shard >= b->n_shards)
        return usage("--shard %s: expected I/N with I from 0 to N-1", shard);
    if (s->file && !is_dash(s->file))
        b->in.fd = open(s->file, O_RDONLY);
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
    b->n_ring = s->parallel * AHEAD;
    b->entry = zeroed((size_t)b->n_ring, sizeof *b->entry);
    return open_context(&b->e);
}

static int batch(const struct settings *s)
{
    struct batch b = { .e.s = s, .out = STDOUT_FILENO };
    int code = open_batch(&b);

    if (code == DONE) {
        b.started = b.reported = seconds();
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

/* -------------------------------------------------------------- 10. --serve
 *
 * OpenAI's API over HTTP/1.1, for many clients at once.  A single thread serves
 * the sockets and runs one forward for all answers, in turns.  A body is read
 * like a line of --batch, and gets the same answer to the byte.
 *
 * Clients are not trusted.  Their input is limited in size and time, and parsed
 * strictly: a request that could be parsed in two ways is refused, as a proxy
 * in front of this server might see another request in it.  The memory for each
 * client is bounded, and one that does not read its answer is disconnected. */

#if !defined __wasi__ || defined LFM2_PAGE

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>
#ifdef __linux__
#include <sys/syscall.h>
long syscall(long number, ...);           /* not in POSIX                    */
#endif

enum {
    MAX_CLIENTS = 1056, MAX_CHOICES = 128,
    MAX_HEAD = 1 << 14, MAX_FIELDS = 100, MAX_CHUNK_LINE = 256,
    MAX_TOKENIZED = 1 << 20,              /* bytes, as other clients wait    */
    MAX_UNSENT = 1 << 22,                 /* bytes of a stream               */
    MAX_AHEAD = 1 << 16,                  /* bytes not parsed yet            */
    MAX_HELD = 1 << 30,                   /* bytes in buffers of all clients */
    SERVE_BATCH = 512                     /* so that no step takes too long  */
};

/* In seconds.  IDLE_TIME_FULL is for when all places are taken. */
enum {
    HEAD_TIME = 10, BODY_TIME = 60, IDLE_TIME = 60, IDLE_TIME_FULL = 1,
    SEND_TIME = 30, LINGER_TIME = 3, PING_TIME = 10, DRAIN_TIME = 30
};

/* The upper bounds of a histogram's buckets, in seconds; the last has none. */
static const double buckets[] = { 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5,
                                  10, 30, 60 };

enum { N_BUCKETS = sizeof buckets / sizeof *buckets };

struct histogram { uint64_t n[N_BUCKETS + 1]; double sum; };

/* What goes with each status: the reason phrase, the message if c->why is
 * empty, the type of error (NULL: invalid_request_error), and extra header
 * fields.  %s stands for the allowed methods. */
static const struct status {
    int code;
    const char *reason, *message, *type, *fields;
} statuses[] = {
    { 200, "OK" },
    { 204, "No Content", NULL, NULL, "Allow: %s, OPTIONS\r\n"
      "Access-Control-Allow-Methods: GET, POST\r\n"
      "Access-Control-Allow-Headers: *, Authorization\r\n" },
    { 400, "Bad Request", "not a well-formed HTTP/1.1 request" },
    { 401, "Unauthorized",
      "expected a key from --api-key-file as \"Authorization: Bearer KEY\"",
      "authentication_error", "WWW-Authenticate: Bearer\r\n" },
    { 403, "Forbidden", "requests for other hosts, and from web pages of other "
      "origins, are refused; --cors allows an origin", "permission_error" },
    { 404, "Not Found", "no such path; the API is at /v1/chat/completions, "
      "/v1/completions and /v1/models", "not_found_error" },
    { 405, "Method Not Allowed", "expected %s here", NULL,
      "Allow: %s, OPTIONS\r\n" },
    { 408, "Request Timeout", "the request took too long to arrive" },
    { 411, "Length Required", "expected a Content-Length, or a chunked body" },
    { 413, "Content Too Large", "the body is longer than --max-body allows" },
    { 415, "Unsupported Media Type",
      "expected \"Content-Type: application/json\"" },
    { 417, "Expectation Failed",
      "expected nothing but \"Expect: 100-continue\"" },
    { 429, "Too Many Requests",
      "more requests are running or waiting than --parallel and --queue allow",
      "rate_limit_error", "Retry-After: 5\r\n" },
    { 431, "Request Header Fields Too Large",
      "expected a head of at most 16 KiB and 100 fields" },
    { 500, "Internal Server Error", "the model could not be run",
      "server_error" },
    { 501, "Not Implemented", "expected \"Transfer-Encoding: chunked\"" },
    { 503, "Service Unavailable", "the server is shutting down",
      "unavailable_error", "Retry-After: 5\r\n" },
    { 505, "HTTP Version Not Supported", "expected HTTP/1.0 or HTTP/1.1" },
};

enum { N_STATUSES = sizeof statuses / sizeof *statuses };

enum { GET, HEAD_ONLY, POST, OPTIONS };

static const char hex_digits[] = "0123456789abcdefABCDEF";

/* A connection, and its current request.  A body has a Content-Length, or comes
 * in chunks:
 *
 *     IN_HEAD ---> IN_BODY ------------------------> ANSWERING
 *         \                                         /
 *          +-----> IN_SIZE -------> IN_TRAILER ----+
 *                   |   ^
 *                   |   +--------- CHUNK_END
 *                   +---> IN_CHUNK ----^
 *
 * Then comes the next head, or CLOSING if the connection is to end.  An error
 * in any state leads to CLOSING: the client has time to read the response, and
 * what it still sends is dropped. */
struct client {
    struct server *server;
    int fd;
    enum {
        FREE, IN_HEAD, IN_BODY, IN_SIZE, IN_CHUNK, CHUNK_END, IN_TRAILER,
        ANSWERING, CLOSING
    } state;
    struct text in, out, body;
    size_t at, sent;                      /* in: parsed; out: sent           */
    size_t length;                        /* left of the body or the chunk   */
    double since;                         /* start of the current wait       */

    int method;
    const struct route *route;
    struct phrase model;                  /* of /v1/models/MODEL, or empty   */
    int is_http11, is_allowed_origin, keep_alive;
    uint64_t id;                          /* 0: the request has not begun    */
    double arrived;                       /* when all of it had              */
    long long created;
    const struct json *json;              /* the body, for route->answer()   */
    struct why why;                       /* of an error; empty: see status  */
    struct job *choice;                   /* [n_choices]                     */
    int n_choices, n_done, include_usage;
    enum { NO_STREAM, STREAM_WANTED, STREAM_BEGUN } stream;
};

struct server {
    struct engine e;
    int listener[2], n_listeners;
    struct phrase address;
    int is_local;                         /* only this machine can reach it  */
    struct text keys, page;               /* keys: one on each line          */
    struct client client[MAX_CLIENTS];
    int n_places, n_clients;              /* ever used; connected            */
    double now, stopping;                 /* stopping: since when, or 0      */
    double accept_after;                  /* no accept() until then          */
    uint64_t n_requests, answered[N_STATUSES];
    double read, reused, made;            /* tokens                          */
    struct histogram first, next;         /* to the first token; between two */
};

struct route {
    const char *path;
    int is_post, is_public;               /* public: needs no key            */
    int (*answer)(struct client *c, struct text *to);
    const char *type;                     /* of the answer; NULL: JSON       */
};

/* Remove n bytes from the front.  A large buffer is freed when it is empty. */
static void drop_bytes(struct text *t, size_t n)
{
    t->n -= n;
    if (t->n == 0 && t->cap > 4 * MAX_AHEAD) {
        free(t->s);
        *t = (struct text){ NULL, 0, 0 };
    } else if (n > 0) {
        memmove(t->s, t->s + n, t->n);
        t->s[t->n] = '\0';
    }
}

/* ---- responses */

/* The row for an HTTP status, or for an exit code. */
static const struct status *status_for(int code)
{
    const int wanted = code >= 200 ? code : code == DONE ? 200 :
                       code == USAGE || code == TOO_LONG ? 400 : 500;
    const struct status *status = statuses;

    while (status->code != wanted)
        status++;
    return status;
}

static const char *methods_of(const struct client *c)
{
    return c->route && c->route->is_post ? "POST" : "GET, HEAD";
}

/* Send the head of a response with n bytes; n < 0: of a stream. */
static void begin_response(struct client *c, int code, long long n)
{
    struct server *v = c->server;
    const struct status *status = status_for(code);
    const time_t now = time(NULL);
    struct tm tm;
    char date[40];

    v->answered[status - statuses]++;
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT",
             gmtime_r(&now, &tm));
    add_format(&c->out, "HTTP/1.1 %d %s\r\nDate: %s\r\nx-request-id: %016llx"
               "\r\nConnection: %s\r\n", status->code, status->reason, date,
               (unsigned long long)c->id,
               c->keep_alive ? "keep-alive" : "close");
    if (n < 0)
        add_format(&c->out, "Content-Type: text/event-stream\r\n"
                   "Cache-Control: no-cache\r\n%s", c->is_http11 ?
                   "Transfer-Encoding: chunked\r\n" : "");
    else if (status->code != 204)
        add_format(&c->out, "Content-Type: %s\r\nContent-Length: %lld\r\n",
                   status->code == 200 && c->route->type ? c->route->type :
                   "application/json", n);
    if (v->e.s->cors && c->is_allowed_origin) {
        add_string(&c->out, "Access-Control-Allow-Origin: ");
        add_string(&c->out, v->e.s->cors);
        add_string(&c->out, "\r\nVary: Origin\r\n");
    }
    add_format(&c->out, status->fields ? status->fields : "", methods_of(c));
    add_string(&c->out, "\r\n");
}

/* Forget the request, and get ready for the next.  The choices of a prompt
 * share the memory of its struct request, which the first one frees. */
static void finish_request(struct client *c)
{
    for (int i = c->n_choices - 1; i >= 0; i--) {
        struct job *j = &c->choice[i];
        if (j->state != FINISHED)
            engine_drop(&c->server->e, j);
        free_reply(&j->r);
        if (i % j->q.n_choices == 0)
            free_request(&j->q);
    }
    free(c->choice);
    free(c->body.s);
    *c = (struct client){
        .server = c->server, .fd = c->fd, .in = c->in, .out = c->out,
        .sent = c->sent, .since = c->server->now,
        .state = c->keep_alive ? IN_HEAD : CLOSING
    };
}

/* Add OpenAI's error object for a status or an exit code.  A message that
 * begins with a quoted name is about that member of the body. */
static void add_error(struct client *c, struct text *to, int code)
{
    const struct status *status = status_for(code);
    const char *why, *end;

    if (!c->why.s[0])
        because(&c->why, code, status->message, methods_of(c));
    why = without_line(&c->why);
    end = *why == '"' ? strchr(why + 1, '"') : NULL;
    if (c->server->e.s->verbose)
        note("%d: %s", status->code, why);
    add_members(to, "{error: {message: %s, type: %s, param: %.*s, code: %s}}",
                why, status->type ? status->type : "invalid_request_error",
                end ? (int)(end - why - 1) : 0, end ? why + 1 : NULL,
                code == TOO_LONG ? "context_length_exceeded" :
                code == 401 ? "invalid_api_key" : NULL);
}

/* Send a whole response: a text, which is freed, or an error.  After an error
 * the connection stays open only if all of the request had been read. */
static void respond(struct client *c, int code, struct text *body)
{
    if (status_for(code)->code >= 400) {
        c->keep_alive &= c->state == ANSWERING;
        body->n = 0;
        add_error(c, body, code);
    }
    c->keep_alive &= c->server->stopping == 0;
    begin_response(c, code, (long long)body->n);
    if (c->method != HEAD_ONLY)
        add(&c->out, body->s, body->n);
    free(body->s);
    finish_request(c);
}

/* Send a server-sent event, data or a comment.  The head goes with the first
 * one: until then a proxy can ask another server instead. */
static void send_event(struct client *c, const char *kind, const char *s,
                       size_t n)
{
    if (c->stream == STREAM_WANTED)
        begin_response(c, DONE, -1);
    c->stream = STREAM_BEGUN;
    if (c->is_http11)
        add_format(&c->out, "%zx\r\n", strlen(kind) + n + 2);
    add_string(&c->out, kind);
    add(&c->out, s, n);
    add_string(&c->out, c->is_http11 ? "\n\n\r\n" : "\n\n");
}

/* ---- answers */

/* Begin the JSON of an event, up to its choices.  With "include_usage" the last
 * event has the usage, and all others have null. */
static void begin_event(struct client *c, struct text *to, int null_usage)
{
    add_head(&c->server->e, to, c->choice[0].q.is_completion, 1, c->id,
             c->created);
    if (null_usage)
        add_members(to, "usage: %s", NULL);
    add_members(to, "choices: [");
}

/* Send an event with new members of a choice, if any, or its finish reason. */
static void send_delta(struct job *j, struct text *delta, const char *finish)
{
    struct client *c = j->owner;
    const int plain = j->q.is_completion, n_scores = j->r.scores.n;
    const int is_scored = j->q.logprobs >= 0 || j->q.prompt_logprobs >= 0;
    struct text event = { 0 };

    if (delta->n == 0 && !finish)
        return;
    begin_event(c, &event, c->include_usage);
    add_members(&event, "{index: %d", (int)(j - c->choice));
    add_string(&event, plain ? ", " : ", \"delta\": {");
    add(&event, delta->s, delta->n);
    add_string(&event, plain ? "" : "}");
    if (is_scored && (n_scores > j->sent.scores || !j->sent.begun))
        add_logprobs(&c->server->e, &event, &j->r, j->sent.scores);
    else
        add_members(&event, "logprobs: %s", NULL);
    add_members(&event, "finish_reason: %s}]}", finish);
    send_event(c, "data: ", event.s, event.n);
    j->sent.scores = n_scores;
    j->sent.begun = 1;
    delta->n = 0;
    free(event.s);
}

/* Add the new part of a text.  An incomplete character at its end is held back,
 * unless nothing follows. */
static void add_delta(struct text *to, const char *format,
                      const struct text *all, size_t *sent, int last)
{
    size_t n = all->n - *sent;
    const char *const end = n > 0 ? all->s + all->n : NULL, *s = end;
    uint32_t c;

    for (size_t k = 1; !last && k <= 3 && k <= n && *--s & 0x80; k++)
        if (*s & 0x40 && utf8_get(s, end, &c) == 0)
            n = (size_t)(s - all->s) - *sent;
    if (n > 0)
        add_members(to, format, (int)n, all->s + *sent);
    *sent += n;
}

/* Send what is new in a choice: first the role, or the prompt with "echo"; then
 * thought and text; at the end the calls and the finish reason. */
static void send_deltas(struct job *j)
{
    const struct client *c = j->owner;
    const int plain = j->q.is_completion, ended = j->state == FINISHED;
    struct text delta = { 0 }, prompt = { 0 };
    struct calls calls = { NULL, 0 };

    if (!plain && !j->sent.begun)
        add_members(&delta, "role: %s", "assistant");
    if (plain && !j->sent.begun && j->q.echo) {
        add_tokens(&c->server->e, &prompt, &j->q.prompt);
        add_members(&delta, "text: %.*s", (int)prompt.n, prompt.s);
        send_delta(j, &delta, NULL);
        free(prompt.s);
    }
    if (ended)
        calls = take_calls(&j->r);
    add_delta(&delta, "reasoning_content: %.*s", &j->r.thought,
              &j->sent.thought, ended);
    add_delta(&delta, plain ? "text: %.*s" : "content: %.*s", &j->r.text,
              &j->sent.text, ended);
    send_delta(j, &delta, NULL);
    if (calls.n > 0)
        add_calls(&delta, &calls, j->id, 1);
    send_delta(j, &delta, NULL);
    if (ended && plain)
        add_members(&delta, "text: %s", "");
    if (ended)
        send_delta(j, &delta, finish_reason(&j->r, calls.n));
    free_calls(&calls);
    free(delta.s);
}

/* A choice has another token, or has ended.  Once all choices have ended,
 * run_server() ends the request. */
static void update_client(struct job *j)
{
    struct client *c = j->owner;
    struct server *v = c->server;
    const double now = seconds(), since = j->sent.last_token;
    const double took = now - (since > 0 ? since : c->arrived);
    struct histogram *h = since > 0 ? &v->next : &v->first;
    int i = 0;

    if (j->state == ACTIVE && j->r.n_sampled == 0)
        return;
    while (i < N_BUCKETS && took > buckets[i])
        i++;
    h->n[i]++;
    h->sum += took;
    j->sent.last_token = now;
    if (j->state == FINISHED) {
        c->n_done++;
        v->read += j->q.prompt.n - j->r.n_reused;
        v->reused += j->r.n_reused;
        v->made += j->r.n_made;
    }
    if (j->r.finish == BROKEN)
        because(&c->why, FAILED, "logits that are not finite");
    else if (c->stream)
        send_deltas(j);
}

static const struct sink to_client = { update_client, update_client };

/* All choices of a request have ended, or it has failed; a stream that has
 * begun ends with the error. */
static void finish_answer(struct client *c, int code)
{
    const struct engine *e = &c->server->e;
    struct text last = { 0 };

    code = c->why.s[0] ? 500 : code;
    if (code == DONE && e->s->verbose)
        note("200: %d choices, prompt of %d tokens, %.2f s", c->n_choices,
             c->choice[0].q.prompt.n, c->server->now - c->arrived);
    if (c->stream != STREAM_BEGUN) {
        if (code == DONE) {
            add_completion(e, &last, c->choice, c->n_choices, c->id,
                           c->created);
            add_string(&last, "}");
        }
        respond(c, code, &last);
        return;
    }
    if (code != DONE)
        add_error(c, &last, code);
    else if (c->include_usage) {
        begin_event(c, &last, 0);
        add_string(&last, "]");
        add_usage(e, &last, c->choice, c->n_choices);
        add_string(&last, "}");
    }
    if (last.n > 0)
        send_event(c, "data: ", last.s, last.n);
    send_event(c, "data: ", "[DONE]", 6);
    add_string(&c->out, c->is_http11 ? "0\r\n\r\n" : "");
    free(last.s);
    finish_request(c);
}

/* ---- endpoints
 *
 * A handler adds its answer to a text and returns DONE, or it returns the
 * status or exit code of an error and may put a message into c->why. */

/* Queue a job for each choice of each prompt in the body.  Their sink and
 * finish_answer() send the answer. */
static int post_completion(struct client *c, struct text *to)
{
    struct engine *e = &c->server->e;
    const int is_chat = strstr(c->route->path, "chat") != NULL;
    int code = DONE, n_prompts, n_jobs = 0;
    const struct json *prompt = first_prompt(c->json, &n_prompts);

    (void)to;
    if (!member(c->json, is_chat ? "messages" : "prompt"))
        return because(&c->why, USAGE, is_chat ? "\"messages\": expected an "
                       "array" : "\"prompt\": expected a string");
    for (int i = 0; code == DONE && i < n_prompts; i++) {
        struct request q = e->s->ask;
        code = read_request(e, &q, c->json, prompt, &c->why);
        prompt = prompt ? prompt->next : NULL;
        if (code == DONE && n_prompts * q.n_choices > MAX_CHOICES)
            code = because(&c->why, USAGE, "%d prompts with \"n\": %d, "
                           "expected at most %d choices", n_prompts,
                           q.n_choices, MAX_CHOICES);
        if (i == 0)
            c->choice = zeroed(code == DONE ? (size_t)(n_prompts * q.n_choices)
                               : 1, sizeof *c->choice);
        do {
            const uint64_t id = hash_number(c->id, (uint64_t)c->n_choices);
            struct job *j = &c->choice[c->n_choices++];
            *j = (struct job){ .q = q, .to = &to_client, .owner = c, .id = id };
            if (code == DONE)
                code = engine_add(e, j, &c->why);
            q.seed++;
        } while (code == DONE && c->n_choices % q.n_choices != 0);
    }
    if (code != DONE)
        return code;
    c->why.s[0] = '\0';                   /* left by what was only tried     */
    for (const struct job *j = e->jobs; j; j = j->next)
        n_jobs++;
    if (n_jobs > e->par.n_seq + e->s->queue)
        return 429;
    c->created = (long long)time(NULL);
    c->stream = c->choice[0].q.stream ? STREAM_WANTED : NO_STREAM;
    return read_flag(member(c->json, "stream_options"), "include_usage",
                     &c->include_usage, &c->why);
}

/* The model that the path names, maybe percent-encoded, or the list of all. */
static int get_models(struct client *c, struct text *to)
{
    const struct engine *e = &c->server->e;
    const struct piece name = model_name(e);
    const char *s = c->model.s;
    size_t n = 0;

    for (; *s && n < name.n; n++) {
        const char hex[] = { s[1], s[1] ? s[2] : '\0', '\0' };
        const int is_hex = *s == '%' && strspn(hex, hex_digits) == 2;
        if (name.s[n] != (is_hex ? (char)strtol(hex, NULL, 16) : *s))
            break;
        s += is_hex ? 3 : 1;
    }
    if (c->model.s[0] && (*s || n < name.n))
        return because(&c->why, 404, "no such model; /v1/models names the one "
                       "that is here");
    add_members(to, c->model.s[0] ? "" : "{object: %s, data: [", "list");
    add_members(to, "{id: %.*s, object: %s, created: %d, owned_by: %s, "
                "max_model_len: %d}", (int)name.n, name.s, "model", 0,
                "lfm2.c", e->par.n_ctx);
    add_string(to, c->model.s[0] ? "" : "]}");
    return DONE;
}

static int get_health(struct client *c, struct text *to)
{
    (void)c;
    add_members(to, "{status: %s}", "ok");
    return DONE;
}

/* In the text format of Prometheus. */
static int get_metrics(struct client *c, struct text *to)
{
    const struct server *v = c->server;
    int n_jobs[2] = { 0, 0 };             /* waiting, active                 */

    for (const struct job *j = v->e.jobs; j; j = j->next)
        n_jobs[j->state == ACTIVE]++;
    const struct {
        const char *name, *help;
        double value;                     /* NAN: one of each status         */
        const struct histogram *h;
    } all[] = {
        { "prompt_tokens_total", "Prompt tokens read.", v->read },
        { "cached_tokens_total", "Prompt tokens found in a cache.", v->reused },
        { "generated_tokens_total", "Tokens generated.", v->made },
        { "connections", "Open connections.", v->n_clients },
        { "queue", "Answers waiting.", n_jobs[0] },
        { "slots", "Answers possible at once.", v->e.par.n_seq },
        { "slots_busy", "Answers in progress.", n_jobs[1] },
        { "requests_total", "Requests by status.", NAN },
        { "first_token_seconds", "From a request to its first token.", 0,
          &v->first },
        { "token_seconds", "From one token to the next.", 0, &v->next }
    };

    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const struct histogram *h = all[i].h;
        const char *name = all[i].name;
        unsigned long long sum = 0;
        add_format(to, "# HELP lfm2_%s %s\n# TYPE lfm2_%s %s\n", name,
                   all[i].help, name, h ? "histogram" :
                   strstr(name, "_total") ? "counter" : "gauge");
        for (int k = 0; h && k <= N_BUCKETS; k++)
            add_format(to, "lfm2_%s_bucket{le=\"%s\"} %llu\n", name,
                       k < N_BUCKETS ? phrase("%g", buckets[k]).s : "+Inf",
                       sum += h->n[k]);
        for (int k = 0; isnan(all[i].value) && k < N_STATUSES; k++)
            if (v->answered[k] > 0)
                add_format(to, "lfm2_%s{status=\"%d\"} %llu\n", name,
                           statuses[k].code,
                           (unsigned long long)v->answered[k]);
        if (h)
            add_format(to, "lfm2_%s_sum %.9g\nlfm2_%s_count %llu\n", name,
                       h->sum, name, sum);
        else if (!isnan(all[i].value))
            add_format(to, "lfm2_%s %.17g\n", name, all[i].value);
    }
    return DONE;
}

/* {"content": text, "add_special": with BOS, "parse_special": control tokens in
 * the text are recognised} */
static int post_tokenize(struct client *c, struct text *to)
{
    const struct json *content = member(c->json, "content");
    struct settings s = *c->server->e.s;
    struct ids ids;

    s.mode = TOKENIZE;                    /* no BOS unless it is asked for   */
    s.bos = s.special = 0;
    if (!json_text(content))
        return because(&c->why, USAGE, "\"content\": expected a string");
    if (content->n > MAX_TOKENIZED)
        return because(&c->why, 413, "\"content\": expected at most %d bytes",
                       MAX_TOKENIZED);
    if (read_flag(c->json, "add_special", &s.bos, &c->why) != DONE ||
        read_flag(c->json, "parse_special", &s.special, &c->why) != DONE)
        return USAGE;
    encode_plain(&s, c->server->e.words, content->s, content->n, &ids);
    add_string(to, "{\"tokens\": [");
    for (int i = 0; i < ids.n; i++)
        add_format(to, "%s%ld", i ? ", " : "", (long)ids.id[i]);
    add_format(to, "], \"count\": %d}", ids.n);
    free(ids.id);
    return DONE;
}

/* {"tokens": ids} */
static int post_detokenize(struct client *c, struct text *to)
{
    const lfm2_tokenizer *words = c->server->e.words;
    const int most = lfm2_n_vocab(words) - 1;
    const struct json *list = member(c->json, "tokens");
    struct text content = { 0 };
    int len, bad = !json_is(list, JSON_ARRAY);
    long long id = 0;

    for (const struct json *x = bad ? NULL : list->first; x; x = x->next) {
        bad |= json_int(x, 0, most, &id) != 0;
        const char *s = lfm2_token_bytes(words, (int32_t)id, 1, &len);
        add(&content, s, (size_t)len);
    }
    add_members(to, "{content: %.*s}", (int)content.n,
                content.s ? content.s : "");
    free(content.s);
    return !bad ? DONE :
           because(&c->why, USAGE, "\"tokens\": expected an array of token ids "
                   "from 0 to %d", most);
}

static int get_page(struct client *c, struct text *to)
{
    add(to, c->server->page.s, c->server->page.n);
    return to->n > 0 ? DONE : 404;
}

/* A path that ends in a slash, except "/", also matches all longer ones. */
static const struct route routes[] = {
    { "/v1/chat/completions", 1, 0, post_completion },
    { "/v1/completions", 1, 0, post_completion },
    { "/v1/models", 0, 0, get_models },
    { "/v1/models/", 0, 0, get_models },
    { "/tokenize", 1, 0, post_tokenize },
    { "/detokenize", 1, 0, post_detokenize },
    { "/metrics", 0, 0, get_metrics, "text/plain; version=0.0.4" },
    { "/health", 0, 1, get_health },
    { "/v1/health", 0, 1, get_health },
    { "/", 0, 1, get_page, "text/html; charset=utf-8" },
    { NULL, 0, 0, NULL }
};

/* Answer a request that is complete. */
static void answer_request(struct client *c)
{
    struct pool pool = { 0 };
    struct json *json = NULL;
    struct text to = { 0 };
    int code = c->method == OPTIONS ? 204 : c->server->stopping > 0 ? 503 :
               DONE;

    c->state = ANSWERING;
    c->arrived = c->since = c->server->now;
    if (code == DONE && c->route->is_post) {
        code = json_parse(&pool, c->body.s ? c->body.s : "", c->body.n, &json,
                          &c->why);
        if (code == DONE && json->type != JSON_OBJECT)
            code = because(&c->why, USAGE, "expected a JSON object as the "
                           "request");
        drop_bytes(&c->body, c->body.n);
    }
    c->json = json;
    if (code == DONE)
        code = c->route->answer(c, &to);
    pool_free(&pool);
    c->json = NULL;
    if (code != DONE || c->n_choices == 0)
        respond(c, code, &to);
}

/* ---- requests: the head
 *
 * Functions that parse a part of a request return 0, or an error's status. */

/* Take the next line, at most `most` bytes, with its CR LF replaced by NUL.
 * Returns NULL if it is incomplete or malformed; *status tells which. */
static char *take_line(struct client *c, size_t most, int *status)
{
    char *line = c->in.s + c->at;
    const size_t n = c->in.n - c->at;
    size_t len = 0;

    while (len < n && (line[len] == '\t' || !iscntrl((unsigned char)line[len])))
        len++;
    if (len > most || (len < n && line[len] != '\r') ||
        (len + 1 < n && line[len + 1] != '\n'))
        *status = 400;
    if (*status || len + 2 > n)
        return NULL;
    line[len] = '\0';
    c->at += len + 2;
    return line;
}

/* The header fields that are used, in the order of field_names. */
enum { HOST, ORIGIN, KEY, MEDIA, LENGTH, CODING, EXPECT, CONNECTION, N_FIELDS };

static const char field_names[] =
    "host origin authorization content-type content-length transfer-encoding "
    "expect connection";

/* Parse "Name: value".  No field above may be repeated, except Connection, and
 * that counts only if it says "close".  All but keys is made lower case. */
static int parse_field(char **field, char *line)
{
    static const char good[] = "!#$%&'*+-.^_`|~0123456789"
                               "abcdefghijklmnopqrstuvwxyz";
    char *value = strchr(line, ':'), *end = line + strlen(line);
    int i;

    if (!value || value == line)
        return 400;
    *value++ = '\0';
    lower(line, strlen(line));
    if (line[strspn(line, good)])
        return 400;
    i = find_word(field_names, ' ', line);
    value += strspn(value, " \t");
    while (end > value && strchr(" \t", end[-1]))
        *--end = '\0';
    if (i != KEY)
        lower(value, strlen(value));
    if (i < 0 || (i == CONNECTION && !strstr(value, "close")))
        return 0;
    if (field[i] && i != CONNECTION)
        return 400;
    field[i] = value;
    return 0;
}

/* Parse "POST /path HTTP/1.1", and find the route. */
static int parse_request_line(struct client *c, char *line)
{
    char *path = strchr(line, ' ');
    char *version = path ? strchr(path + 1, ' ') : NULL;

    if (!version || path - line > 20 || path[1] != '/' ||
        strlen(version) != 9 || strncmp(version, " HTTP/", 6) != 0)
        return 400;
    if (strcmp(version + 6, "1.0") != 0 && strcmp(version + 6, "1.1") != 0)
        return 505;
    c->is_http11 = version[8] == '1';
    *path++ = *version = '\0';
    c->method = find_word("GET HEAD POST OPTIONS", ' ', line);
    path[strcspn(path, "?")] = '\0';
    for (const struct route *r = routes; r->path && !c->route; r++) {
        const size_t k = strlen(r->path);
        if (strncmp(path, r->path, k) == 0 &&
            (!path[k] || (k > 1 && path[k - 1] == '/'))) {
            c->route = r;
            c->model = phrase("%s", path + k);
        }
    }
    if (!c->route)
        return 404;
    return c->method == OPTIONS || (c->method >= 0 &&
           (c->method == POST) == c->route->is_post) ? 0 : 405;
}

/* Does this Host name the local machine?  A hostile web page could get here by
 * a name of its own that resolves to this address (DNS rebinding). */
static int names_this_machine(const char *host)
{
    static const char digits[] = ".0123456789";
    const size_t n = strncmp(host, "localhost", 9) == 0 ? 9 :
                     strncmp(host, "[::1]", 5) == 0 ? 5 :
                     strncmp(host, "127.", 4) == 0 ? strspn(host, digits) : 0;

    host += n;
    return n > 0 && n < 16 && (!*host || (*host == ':' &&
                                !host[1 + strspn(host + 1, digits + 1)]));
}

/* Is this "Bearer KEY" in the file?  The time that takes depends on the lengths
 * of the keys, not on their bytes. */
static int is_known_key(const struct text *keys, const char *value)
{
    const char *word = value && strncasecmp(value, "bearer ", 7) == 0 ?
                       value + 7 : "";
    const size_t n = strlen(word);
    int found = keys->n == 0;

    for (const char *key = keys->s; n > 0 && key && *key;) {
        const size_t len = strcspn(key, "\n");
        unsigned differ = len != n;
        for (size_t i = 0; len > 0 && i < n; i++)
            differ |= (unsigned)(word[i] ^ key[i % len]);
        found |= !differ;
        key += len + (key[len] == '\n');
    }
    return found;
}

/* Parse the length of the body, or in base 16 that of the next chunk. */
static int parse_length(struct client *c, const char *s, int base)
{
    const size_t most = (size_t)c->server->e.s->max_body << 20;
    const size_t digits = strspn(s, base == 10 ? "0123456789" : hex_digits);
    const unsigned long long n = strtoull(s, NULL, base);   /* or ULLONG_MAX */

    if (digits == 0 || (base == 16 && digits > 16) ||
        (s[digits] && (base == 10 || s[digits] != ';')))
        return 400;
    c->length = (size_t)n;
    return n > most - c->body.n ? 413 : 0;
}

/* Is this request allowed, and what kind of body follows?  Web pages may send
 * requests if they come from this server or the origin of --cors. */
static int check_head(struct client *c, char *const *field)
{
    const struct server *v = c->server;
    const char *host = field[HOST], *origin = field[ORIGIN];
    const char *type = field[MEDIA], *length = field[LENGTH];
    const char *coding = field[CODING], *cors = v->e.s->cors;
    int status;

    if (coding && (length || !c->is_http11))
        return 400;
    if (coding && strcmp(coding, "chunked") != 0)
        return 501;
    c->state = coding ? IN_SIZE : IN_BODY;
    if (length && (status = parse_length(c, length, 10)) != 0)
        return status;
    if (c->is_http11 && !host)
        return 400;
    if (host && v->is_local && !names_this_machine(host))
        return 403;
    c->is_allowed_origin = origin && (
        (cors && (strcmp(cors, "*") == 0 || strcasecmp(origin, cors) == 0)) ||
        (host && strncmp(origin, "http://", 7) == 0 &&
         strcmp(origin + 7, host) == 0));
    if (origin && !c->is_allowed_origin)
        return 403;
    if (c->method == OPTIONS)
        return 0;
    if (!c->route->is_public && !is_known_key(&v->keys, field[KEY]))
        return 401;
    if (c->route->is_post &&
        (!type || strncmp(type, "application/json", 16) != 0 ||
         !strchr("; ", type[16])))
        return 415;
    if (c->route->is_post && !length && !coding)
        return 411;
    return field[EXPECT] && strcmp(field[EXPECT], "100-continue") ? 417 : 0;
}

/* Parse the head of a request once it is complete.  Syntax errors take
 * precedence over a wrong path or method. */
static int parse_head(struct client *c)
{
    char *field[N_FIELDS] = { NULL }, *line;
    int status = 0, bad = 0, n = 0;
    const char *end;

    while (c->at + 2 <= c->in.n && memcmp(c->in.s + c->at, "\r\n", 2) == 0)
        c->at += 2;
    end = memmem(c->in.s + c->at, c->in.n - c->at, "\r\n\r\n", 4);
    if ((end ? (size_t)(end - c->in.s) + 4 : c->in.n) - c->at > MAX_HEAD)
        return 431;
    if (!end)
        return 0;
    c->since = c->server->now;
    for (; (line = take_line(c, MAX_HEAD, &bad)) && *line && !bad; n++)
        if (n == 0)
            status = parse_request_line(c, line);
        else if (n <= MAX_FIELDS)
            bad = parse_field(field, line);
    status = bad ? bad : n > MAX_FIELDS + 1 ? 431 : status;
    c->keep_alive = c->is_http11 && !field[CONNECTION];
    if (!status)
        status = check_head(c, field);
    if (!status && field[EXPECT] && c->is_http11 && c->in.n == c->at)
        add_string(&c->out, "HTTP/1.1 100 Continue\r\n\r\n");
    return status;
}

/* ---- requests: the body */

/* Take as much of the body as has arrived; refuse it if the buffers of all
 * clients together are too large. */
static int parse_body(struct client *c)
{
    const struct server *v = c->server;
    size_t held = 0;
    int status = 0;
    const char *line;

    for (int i = 0; i < v->n_places; i++)
        held += v->client[i].in.cap + v->client[i].body.cap +
                v->client[i].out.cap;
    if (held > MAX_HELD && (c->length > 0 || c->state != IN_BODY))
        return because(&c->why, 503, "the server has no room for the body");
    while (c->state < ANSWERING && !status)
        if (c->state == IN_BODY || c->state == IN_CHUNK) {
            const size_t there = c->in.n - c->at;
            const size_t n = there < c->length ? there : c->length;
            add(&c->body, c->in.s + c->at, n);
            c->at += n;
            c->length -= n;
            if (c->length > 0)
                return 0;
            c->state = c->state == IN_CHUNK ? CHUNK_END : ANSWERING;
        } else if (!(line = take_line(c, c->state == CHUNK_END ? 0 :
                                      MAX_CHUNK_LINE, &status)))
            return status;
        else if (c->state == IN_SIZE) {
            status = parse_length(c, line, 16);
            c->state = c->length > 0 ? IN_CHUNK : IN_TRAILER;
        } else if (c->state == CHUNK_END)
            c->state = IN_SIZE;
        else if ((c->length += strlen(line) + 2) > MAX_HEAD)
            status = 400;                 /* too long a trailer              */
        else if (!*line)
            c->state = ANSWERING;
    return status;
}

/* Is there input to parse?  It waits until the last response is sent. */
static int has_input(const struct client *c)
{
    return c->state < ANSWERING && c->in.n > c->at && c->out.n == 0;
}

/* Parse what has arrived, however it was split. */
static void parse_input(struct client *c)
{
    int status = 0;

    if (!c->id)
        c->id = hash_number(hash_number(HASH_START, random_seed()),
                            ++c->server->n_requests);
    c->at = 0;
    if (c->state == IN_HEAD)
        status = parse_head(c);
    if (!status && c->state != IN_HEAD)
        status = parse_body(c);
    drop_bytes(&c->in, c->at);            /* not for every little chunk      */
    c->at = c->in.n;                      /* the rest has to wait for more   */
    if (status)
        respond(c, status, &(struct text){ 0 });
    else if (c->state == ANSWERING)
        answer_request(c);
}

/* ---- connections */

static void hang_up(struct client *c)
{
    struct server *v = c->server;

    finish_request(c);
    if (c->fd >= 0) {
        close(c->fd);
        v->n_clients--;
        v->accept_after = 0;
    }
    free(c->in.s);
    free(c->out.s);
    *c = (struct client){ .server = v, .fd = -1 };
}

/* Is there no request in progress, and nothing left to send? */
static int is_idle(const struct client *c)
{
    return c->state == IN_HEAD && c->in.n == 0 && c->out.n == 0;
}

static void receive(struct client *c)
{
    ssize_t n;

    if (is_idle(c))
        c->since = c->server->now;
    if (c->state == CLOSING)
        drop_bytes(&c->in, c->in.n);
    reserve(&c->in, 1 << 16);
    n = read(c->fd, c->in.s + c->in.n, 1 << 16);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
        hang_up(c);
        return;
    }
    c->in.n += n > 0 ? (size_t)n : 0;
    c->in.s[c->in.n] = '\0';
}

/* Send pending output.  Each byte extends the time limit by a millisecond, so
 * clients must read 1,000 a second.  A CLOSING connection is only shut down, as
 * close() with unread input would reset it and the response might be lost. */
static void transmit(struct client *c)
{
    const double now = c->server->now;
    const size_t unsent = c->out.n - c->sent;
    const ssize_t n = unsent == 0 ? 0 :
                      write(c->fd, c->out.s + c->sent, unsent);

    if (n < 0 && errno != EAGAIN && errno != EINTR)
        hang_up(c);
    if (n <= 0)
        return;
    c->sent += (size_t)n;
    c->since = fmin(now, c->since + (double)n * 1e-3);
    if (c->sent > c->out.n / 2) {
        drop_bytes(&c->out, c->sent);
        c->sent = 0;
    }
    if (c->out.n == 0)
        c->since = now;
    if (c->out.n == 0 && c->state == CLOSING)
        shutdown(c->fd, SHUT_WR);
}

/* Keep a quiet stream alive with a comment; end a wait that is too long. */
static void check_timeouts(struct client *c, int idle_time)
{
    const double waited = c->server->now - c->since;
    const size_t unsent = c->out.n - c->sent;
    const int is_stream = c->state == ANSWERING && c->stream;

    if (unsent > 0 && (waited > SEND_TIME ||
                       (is_stream && unsent > MAX_UNSENT)))
        hang_up(c);
    else if (unsent > 0 || c->state == FREE)
        return;
    else if (is_stream && waited > PING_TIME)
        send_event(c, ": ", "waiting", 7);
    else if (is_idle(c)) {
        if (waited > idle_time || c->server->stopping > 0)
            hang_up(c);
    } else if (c->state == CLOSING && waited > LINGER_TIME)
        hang_up(c);
    else if (c->state < ANSWERING &&
             waited > (c->state == IN_HEAD ? HEAD_TIME : BODY_TIME))
        respond(c, 408, &(struct text){ 0 });
}

/* Accept new connections.  After an error such as too many open files, pause
 * for a second, as poll() would report them again at once. */
static void accept_clients(struct server *v, int listener)
{
    for (struct client *c = v->client; v->n_clients < MAX_CLIENTS; c++) {
        if (c->state != FREE)
            continue;
#ifdef SYS_accept4                        /* libc may use socketcall()       */
        const int fd = (int)syscall(SYS_accept4, listener, NULL, NULL,
                                    SOCK_NONBLOCK | SOCK_CLOEXEC);
#else
        const int fd = accept(listener, NULL, NULL);
        if (fd >= 0)
            fcntl(fd, F_SETFL, O_NONBLOCK);
#endif
        if (fd < 0 && errno != EAGAIN && errno != EINTR &&
            errno != ECONNABORTED)
            v->accept_after = v->now + 1; /* or until one is closed          */
        if (fd < 0)
            return;
        *c = (struct client){ .server = v, .fd = fd, .state = IN_HEAD,
                              .since = v->now };
        v->n_clients++;
        if (v->n_places <= c - v->client)
            v->n_places = (int)(c - v->client) + 1;
    }
}

/* ---- the loop */

/* Serve the sockets that are ready; wait only when there is no other work. */
static void serve_sockets(struct server *v)
{
    struct pollfd p[MAX_CLIENTS + 2];
    const int n = v->n_places, is_full = v->n_clients == MAX_CLIENTS;
    const int n_listeners = is_full || v->now < v->accept_after ? 0 :
                            v->n_listeners;
    int waits = !v->e.jobs;

    for (int i = 0; i < n_listeners; i++)
        p[n + i] = (struct pollfd){ v->listener[i], POLLIN, 0 };
    for (int i = 0; i < n; i++) {
        const struct client *c = &v->client[i];
        const int unsent = c->sent < c->out.n;
        const int reads = c->in.n <= MAX_AHEAD || c->state == CLOSING;
        p[i] = (struct pollfd){ c->fd, (short)((reads ? POLLIN : 0) |
                                               (unsent ? POLLOUT : 0)), 0 };
        waits &= !has_input(c);
    }
    poll(p, (nfds_t)(n + n_listeners), waits ? 1000 : 0);
    v->now = seconds();
    for (int i = 0; i < n; i++) {
        struct client *c = &v->client[i];
        if (p[i].revents & (POLLIN | POLLHUP | POLLERR))
            receive(c);
        if (has_input(c))
            parse_input(c);
        transmit(c);
        check_timeouts(c, is_full ? IDLE_TIME_FULL : IDLE_TIME);
    }
    for (int i = 0; i < n_listeners; i++)
        if (p[n + i].revents)
            accept_clients(v, v->listener[i]);
}

/* After a signal, accept no new clients and let the answers finish, for at most
 * DRAIN_TIME or until a second signal. */
static void run_server(struct server *v)
{
    while (v->stopping == 0 ||
           (v->n_clients > 0 && interrupted < 2 &&
            v->now - v->stopping <= DRAIN_TIME)) {
        serve_sockets(v);
        if (engine_step(&v->e) != DONE)   /* it failed for all of them       */
            while (v->e.jobs)
                finish_answer(v->e.jobs->owner, 500);
        v->now = seconds();
        for (struct client *c = v->client; c < v->client + v->n_places; c++)
            if (c->state == ANSWERING && c->n_done == c->n_choices)
                finish_answer(c, DONE);
        if (interrupted && v->stopping == 0) {
            note("shutting down: %d connections are open", v->n_clients);
            v->stopping = v->now;
            while (v->n_listeners > 0)
                close(v->listener[--v->n_listeners]);
        }
    }
    for (struct client *c = v->client; c < v->client + v->n_places; c++) {
        if (c->state == ANSWERING)
            finish_answer(c, 503);
        transmit(c);
        hang_up(c);
    }
}

#endif

/* ---- opening */

#ifdef __wasi__

static int serve(const struct settings *s)
{
    return say(FAILED, "--serve %s: not in this build", s->serve);
}

#else

/* Listen at an address; port 0 is replaced by the actual one.  Accepted sockets
 * inherit the options; those that do not apply fail, which does no harm.  The
 * functions here return DONE, -1 with errno set, or USAGE after a message. */
static int listen_at(struct server *v, void *address, socklen_t n)
{
    struct sockaddr *a = address;
    const int fd = socket(a->sa_family, SOCK_STREAM, 0), yes = 1;

    if (fd < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &yes, sizeof yes);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    if (bind(fd, a, n) != 0 || listen(fd, 1024) != 0 ||
        getsockname(fd, a, &n) != 0) {
        close(fd);
        return -1;
    }
    v->listener[v->n_listeners++] = fd;
    return DONE;
}

/* Listen at a path.  An old socket there is removed unless its server still
 * runs: it holds a lock on a file beside the socket until it exits. */
static int listen_at_path(struct server *v, const char *path)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    struct stat st;
    int lock;

    if (strlen(path) >= sizeof a.sun_path)
        return usage("--serve %s: the path of a socket has at most %zu bytes",
                     path, sizeof a.sun_path - 1);
    strcpy(a.sun_path, path);
    lock = open(phrase("%s.lock", path).s, O_RDWR | O_CREAT | O_NOFOLLOW,
                0600);
    if (lock >= 0 && another_has_lock(lock))
        errno = EADDRINUSE, lock = -1;
    if (lock < 0)
        return -1;
    if (lstat(path, &st) == 0 && S_ISSOCK(st.st_mode))
        unlink(path);
    v->address = phrase("%s", path);
    return listen_at(v, &a, sizeof a);
}

/* Listen at [HOST:]PORT; without a host, at 127.0.0.1 and ::1. */
static int listen_at_port(struct server *v, const char *where)
{
    const char *colon = strrchr(where, ':');
    const char *digits = colon ? colon + 1 : where;
    struct phrase host = phrase("%.*s", colon ? (int)(colon - where) : 0,
                                where);
    char *end, *name = host.s;
    const long port = strtol(digits, &end, 10);
    struct sockaddr_in a4 = { .sin_family = AF_INET };
    struct sockaddr_in6 a6 = { .sin6_family = AF_INET6 };
    const int both = !*name || strcmp(name, "localhost") == 0;
    int is4, is6;

    if (*name == '[' && name[strlen(name) - 1] == ']')
        name[strlen(name) - 1] = '\0', name++;
    is4 = inet_pton(AF_INET, both ? "127.0.0.1" : name, &a4.sin_addr) == 1;
    is6 = inet_pton(AF_INET6, both ? "::1" : name, &a6.sin6_addr) == 1;
    if (!*digits || *end || port < 0 || port > 65535 || !(is4 || is6))
        return usage("--serve %s: expected a PORT, ADDRESS:PORT with an "
                     "address in numbers, or a path with a slash", where);
    v->is_local = is4 ? ntohl(a4.sin_addr.s_addr) >> 24 == 127 :
                  IN6_IS_ADDR_LOOPBACK(&a6.sin6_addr);
    if (!v->is_local && v->keys.n == 0)
        return usage("--serve %s: others can reach it, so --api-key-file is "
                     "needed", where);
    a4.sin_port = htons((uint16_t)port);
    if (is4 && listen_at(v, &a4, sizeof a4) != DONE)
        return -1;
    a6.sin6_port = a4.sin_port;
    if (is6 && listen_at(v, &a6, sizeof a6) != DONE && !is4)
        return -1;                        /* with IPv4 it may be missing     */
    v->address = phrase(is4 ? "http://%s:%d" : "http://[%s]:%d",
                        both ? "127.0.0.1" : name,
                        ntohs(is4 ? a4.sin_port : a6.sin6_port));
    return DONE;
}

/* open_engine() enters the sandbox, so files and sockets are opened first. */
static int serve(const struct settings *s)
{
    struct server *v = zeroed(1, sizeof *v);
    struct rlimit files;
    int code = DONE;

    v->e.s = s;
    if (s->api_key_file)
        code = read_text_file(s->api_key_file, &v->keys);
    if (code == DONE && s->api_key_file && strspn(v->keys.s, "\n") == v->keys.n)
        code = say(USAGE, "%s: no key in it, expected one on each line",
                   s->api_key_file);
    if (code == DONE && s->page)
        code = read_file(s->page, &v->page);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max < MAX_CLIENTS + 64 ? files.rlim_max :
                         MAX_CLIENTS + 64;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (code == DONE)
        code = strchr(s->serve, '/') ? listen_at_path(v, s->serve) :
               listen_at_port(v, s->serve);
    if (code < 0)
        code = say(BAD_FILE, "--serve %s: %s", s->serve, strerror(errno));
    if (code == DONE)
        code = open_engine(&v->e);
    if (code == DONE && s->batch == UNSET)
        v->e.par.n_batch = smaller(v->e.par.n_batch, SERVE_BATCH);
    if (code == DONE)
        code = open_context(&v->e);
    if (code == DONE) {
        note("listening on %s", v->address.s);
        run_server(v);
    }
    close_engine(&v->e);
    free(v->keys.s);
    free(v->page.s);
    free(v);
    return code;
}

#endif

/* ------------------------------------------------------ 11. The command line
 *
 * One table lists the options: their names, their values, the modes they apply
 * to, their names in the body of a request, and their text in --help. */

#define GROUP(title) { .help = title }
#define OPTION(kind, names, arg, field, min, max, json, modes, help) \
    { kind, names, arg, AT(field), min, max, json, modes, 0, help }
#define VALUE(kind, names, arg, field, modes, help) \
    OPTION(kind, names, arg, field, 0, 0, NULL, modes, help)
#define SWITCH(names, field, modes, help) \
    VALUE(FLAG, names, NULL, field, modes, help)
#define MODE(kind, names, arg, field, mode, help) \
    { kind, names, arg, AT(field), 0, 0, NULL, mode, mode, help }
#define ACTION(names, does, help) MODE(FLAG, names, NULL, mode, does, help)
/* Options of llama.cpp: refused if they would change the result. */
#define FOREIGN(kind, names, why) { kind, names, why, .modes = ANY }

#define SETS \
    "auto|scalar|avx2|avxvnni|avx512|avx512vnni|neon|dotprod|simd128|relaxed"

static const struct option table[] = {
    GROUP("What to do"),
    VALUE(IN_FILE, "-m --model", "FILE", model, ANY - SELFTEST,
          "model file (default: the first argument)"),
    VALUE(TEXT, "-p --prompt", "TEXT", prompt, PROMPT | TOKENIZE | DETOKENIZE,
          "prompt (default: the second argument); piped text is appended"),
    VALUE(IN_FILE, "-f --file", "FILE", file,
          PROMPT | BATCH | TOKENIZE | DETOKENIZE,
          "read the prompt, or --batch lines, from FILE (-: standard input)"),
    VALUE(TEXT, "-sys --system-prompt", "TEXT", system, PROMPT,
          "system prompt"),
    VALUE(IN_FILE, "-sysf --system-prompt-file", "FILE", system_file, PROMPT,
          "read the system prompt from FILE"),
    VALUE(IN_FILE, "--messages", "FILE", messages, PROMPT,
          "JSON file of a conversation, or of a whole request"),
    VALUE(IN_FILE, "--tools", "FILE", tools, PROMPT,
          "JSON file of the tools that the model may call"),
    VALUE(IN_FILE, "--session", "FILE", session, TALK | DUMP,
          "keep the conversation in FILE between runs"),
    ACTION("-cnv --interactive", CHAT,
           "chat, even after a prompt or without a terminal"),
    VALUE(TEXT, "--save-dir", "DIR", save_dir, CHAT,
          "directory in which a chat may save and load conversations"),
    SWITCH("--raw -no-cnv --no-conversation", raw,
           ANSWER | LOGITS | DUMP | REQUESTS,
           "use no chat template: continue the prompt as plain text"),
    MODE(FLAG, "--dump-prompt", NULL, dump_prompt, DUMP,
         "print the prompt as the chat template formats it"),
    MODE(FLAG, "--dump-tokens", NULL, dump_tokens, DUMP,
         "print the token ids of the prompt"),
    VALUE(IN_FILE, "--ids", "FILE", ids, ANSWER | LOGITS | DUMP,
          "read the prompt from FILE as token ids (int32, little-endian)"),
    MODE(OUT_FILE, "--logits", "OUT", logits, LOGITS,
         "write the logits of every prompt token to OUT (float32)"),
    ACTION("--tokenize", TOKENIZE, "print the token ids of a text"),
    ACTION("--detokenize", DETOKENIZE, "turn lines of token ids into text"),
    SWITCH("--null", null, TOKENIZE | DETOKENIZE,
           "end each text of --tokenize and --detokenize with a NUL byte"),
    SWITCH("--bos", bos, RUN | TOKENIZE, "put the BOS token before plain text"),
    SWITCH("--special", special, RUN | TOKENIZE | DETOKENIZE,
           "recognise control tokens written in the text"),
    ACTION("--batch", BATCH, "answer JSON lines in OpenAI's batch format"),
    MODE(TEXT, "--serve", "[HOST:]PORT|PATH", serve, SERVE,
         "serve OpenAI's API over HTTP on PORT, for this machine only unless "
         "HOST is given, or on the Unix socket PATH"),
    ACTION("--inspect", INSPECT,
           "print what a model file contains and what running it takes"),
    ACTION("--selftest", SELFTEST,
           "test this build on this machine; needs no model"),
    ACTION("--bench", BENCH, "measure speed; its options are listed last"),
    MODE(OUT_FILE, "--export-tokenizer", "FILE", export_to, EXPORT,
         "write the vocabulary of the model to FILE, as a tokenizer.bin"),
    VALUE(IN_FILE, "--tokenizer", "FILE", tokenizer, ANY - SELFTEST - BENCH,
          "use the vocabulary in FILE instead of the model's"),
    MODE(IN_FILE, "--ppl", "FILE", ppl, PPL,
         "measure the perplexity of a text, as llama-perplexity does"),

    GROUP("How to answer"),
    OPTION(WHOLE, "-n --predict --n-predict --max-tokens", "N", ask.limit, -2,
           1 << 30, "max_tokens max_completion_tokens", GENERATE,
           "generate at most N tokens (default -1: no limit; for plain text "
           "256)"),
    VALUE(CHOICE, "--template --chat-template", TEMPLATES, template, RUN,
          "chat template: auto (chosen by the file), lfm2, lfm2.5-instruct, "
          "lfm2.5-new, lfm2.5-vl, lfm2.5-8b-a1b, lfm2.5-2.6b or none"),
    VALUE(DATE, "--date", "YYYY-MM-DD", date, PROMPT | REQUESTS,
          "date for chat templates that state it (default: today)"),
    VALUE(CHOICE, "--think", "auto|show|hide|raw", think, GENERATE,
          "show or hide the model's thoughts (auto: show at a terminal; raw: "
          "print everything, markers included)"),
    OPTION(WHOLE, "--think-budget", "N", ask.think_budget, -1, 1 << 30,
           "thinking_budget", GENERATE,
           "end a thought after N tokens (default -1: no limit)"),
    OPTION(TEXTS, "--stop -r --reverse-prompt", "TEXT", ask.stop, 0, 0, "stop",
           GENERATE, "end the answer before TEXT; may be repeated"),
    OPTION(FLAG, "--ignore-eos", NULL, ask.ignore_eos, 0, 0, "ignore_eos",
           GENERATE, "keep generating when the model would stop"),
    VALUE(IN_FILE, "--json-schema -jf --json-schema-file", "FILE", json_schema,
          GENERATE, "answer in JSON that matches the JSON schema in FILE"),
    SWITCH("--json", json, ANSWER | INSPECT | PPL, "print JSON: the answer as "
           "OpenAI's API returns it, or the report of --inspect or --ppl"),
    OPTION(WHOLE, "--logprobs", "K", ask.logprobs, 0, MAX_LOGPROBS,
           "top_logprobs", ANSWER, "with --json, add the log probability of "
           "each token and of the K likeliest"),
    OPTION(WHOLE, "", "K", ask.prompt_logprobs, 0, MAX_LOGPROBS,
           "prompt_logprobs", REQUESTS, NULL),
    OPTION(FLAG, "", NULL, ask.echo, 0, 0, "echo", REQUESTS, NULL),
    OPTION(FLAG, "", NULL, ask.stream, 0, 0, "stream", SERVE, NULL),
    OPTION(WHOLE, "", "N", ask.n_choices, 1, 16, "n", SERVE, NULL),

    GROUP("How to sample (by default as the model's makers recommend)"),
    OPTION(REAL, "--temp --temperature", "F", ask.sampling.temp, 0, 100,
           "temperature", GENERATE,
           "temperature (0: always choose the likeliest token)"),
    OPTION(WHOLE, "--top-k", "N", ask.sampling.top_k, -1, 1 << 30, "top_k",
           GENERATE, "choose from the N likeliest tokens (0: off)"),
    OPTION(REAL, "--top-p", "F", ask.sampling.top_p, 0, 1, "top_p", GENERATE,
           "choose from the likeliest tokens whose probabilities add up to F "
           "(1: off)"),
    OPTION(REAL, "--min-p", "F", ask.sampling.min_p, 0, 1, "min_p", GENERATE,
           "drop tokens less than F times as likely as the likeliest (0: off)"),
    OPTION(REAL, "--repeat-penalty --repetition-penalty", "F",
           ask.sampling.repeat, 0.01, 100, "repetition_penalty repeat_penalty",
           GENERATE, "make recent tokens less likely, by the factor F (1: off; "
           "default 1 with --temp 0)"),
    OPTION(WHOLE, "--repeat-last-n", "N", ask.sampling.last_n, -1, 1 << 30,
           NULL, GENERATE, "apply --repeat-penalty to the last N tokens (-1: "
           "all)"),
    OPTION(REAL, "--presence-penalty", "F", ask.presence, -100, 100,
           "presence_penalty", GENERATE,
           "lower the logit of tokens already in the answer by F (default 0)"),
    OPTION(REAL, "--frequency-penalty", "F", ask.frequency, -100, 100,
           "frequency_penalty", GENERATE, "lower the logit of a token by F for "
           "each time it occurs in the answer (default 0)"),
    OPTION(SEED, "-s --seed", "N", ask.seed, -9e18, 9e18, "seed", GENERATE,
           "random seed (default -1: a new one each time)"),

    GROUP("How to look inside"),
    VALUE(OUT_FILE, "--trace", "FILE", trace, TALK | LOGITS,
          "write what every module computes to FILE, as JSON lines"),
    VALUE(TEXTS, "--trace-filter", "GLOB", trace_filter, TALK | LOGITS,
          "trace only modules whose name matches GLOB; may be repeated"),
    VALUE(RANGE, "--trace-tokens", "A-B", trace_tokens, TALK | LOGITS,
          "trace only positions A to B, counted from 0"),
    VALUE(OUT_FILE, "--trace-raw", "FILE", trace_raw, TALK | LOGITS,
          "with --trace, also write all the numbers to FILE (float32)"),

    GROUP("For --batch and --serve"),
    OPTION(WHOLE, "--parallel", "N", parallel, 1, 1024, NULL, REQUESTS,
           "answer up to N requests at once (default 32)"),
    OPTION(WHOLE, "--prompt-piece", "N", piece, 1, 1 << 16, NULL, REQUESTS,
           "while answers are generated, read new prompts in pieces of N "
           "tokens (default 128 with --serve; else as many as fit)"),
    OPTION(WHOLE, "--queue", "N", queue, 0, 1 << 16, NULL, SERVE,
           "let up to N requests wait, and refuse more (default 1024)"),
    OPTION(WHOLE, "--max-body", "MIB", max_body, 1, 1024, NULL, SERVE,
           "largest request body, in MiB (default 8)"),
    VALUE(TEXT, "--api-key-file", "FILE", api_key_file, SERVE,
          "require clients to send a key from FILE (one key per line)"),
    VALUE(TEXT, "--cors", "ORIGIN", cors, SERVE,
          "also accept requests from web pages at ORIGIN (*: any)"),
    VALUE(TEXT, "--page", "FILE", page, SERVE, "serve the web page FILE at /"),
    VALUE(TEXT, "--shard", "I/N", shard, BATCH,
          "answer only every N-th line, from line I on (counted from 0)"),
    VALUE(OUT_FILE, "--resume", "OUT", resume, BATCH,
          "append to OUT, and skip lines already answered there"),

    GROUP("How to run"),
    OPTION(WHOLE, "-c --ctx-size", "N", ctx, 0, MAX_CTX, NULL, RUN | INSPECT,
           "longest text, in tokens (default 4096; 0: as in training)"),
    OPTION(WHOLE, "-t --threads", "N", threads, 0, 1024, NULL, RUN | INSPECT,
           "number of threads (default 0: one per CPU)"),
    OPTION(WHOLE, "-b --batch-size", "N", batch, 1, 1 << 16, NULL,
           RUN | INSPECT | BENCH,
           "compute up to N tokens at once (default 512; with experts 2048)"),
    OPTION(WHOLE, "--lookup", "N", lookup, 0, MAX_LOOKUP, NULL, GENERATE,
           "guess up to N tokens from the text so far; does not change the "
           "answer (default 7; with experts 0)"),
    VALUE(CHOICE, "--isa", SETS, isa, RUN | INSPECT | BENCH, "instruction set: "
          "auto, scalar, avx2, avxvnni, avx512, avx512vnni, neon, dotprod, "
          "simd128 or relaxed"),
    VALUE(CHOICE, "--kv", "f16|f32", kv, RUN | INSPECT | BENCH,
          "precision of the KV cache (default f16)"),
    SWITCH("--no-mmap", no_mmap, RUN | INSPECT | BENCH | EXPORT,
           "read the model into memory instead of mapping the file"),
    VALUE(CHOICE, "--sandbox", "auto|require|off", sandbox,
          ANY - BENCH - SELFTEST,
          "drop unneeded privileges (auto: if possible; require: or fail)"),
    VALUE(CHOICE, "--color", "auto|on|off", color, TALK,
          "dim the model's thoughts (auto: at a terminal)"),
    SWITCH("-q --quiet", quiet, ANY, "print errors only"),
    SWITCH("-v --verbose", verbose, ANY, "also print settings, seed and speed"),
    SWITCH("-h --help", help, ANY, "print this text"),
    SWITCH("--version", version, ANY,
           "print the version, compiler and weight types"),

    GROUP("For --bench (lists are separated by commas)"),
    OPTION(LIST, "-p --n-prompt --prompt", "N,..", bench_prompt, 0, MAX_CTX,
           NULL, BENCH, "measure reading N tokens (default 512; 0: skip)"),
    OPTION(LIST, "-n --n-gen --predict --n-predict", "N,..", bench_gen, 0,
           MAX_CTX, NULL, BENCH,
           "measure generating N tokens (default 128; 0: skip)"),
    OPTION(LIST, "-npl", "N,..", bench_seqs, 1, 4096, NULL, BENCH,
           "measure generating for N sequences at once (default 1)"),
    OPTION(LIST, "-d --n-depth", "N,..", bench_depth, 0, MAX_CTX, NULL, BENCH,
           "measure after a text of N tokens (default 0)"),
    OPTION(LIST, "-t --threads", "N,..", bench_threads, 1, 1024, NULL, BENCH,
           "measure with N threads (default: one per CPU)"),
    OPTION(WHOLE, "-r --repetitions", "N", reps, 1, 100000, NULL, BENCH,
           "measure N times, after one warm-up (default 5)"),
    VALUE(CHOICE, "-o --output", "md|json", output, BENCH,
          "print the results as a table or as JSON (default md)"),

    FOREIGN(IGNORED, "-ngl --gpu-layers --n-gpu-layers",
            "everything runs on the CPU"),
    FOREIGN(IGNORED_FLAG, "-fa --flash-attn",
            "attention is always computed this way"),
    FOREIGN(IGNORED_FLAG, "--jinja -st --single-turn --no-warmup --simple-io "
            "--no-display-prompt --log-disable --no-perf",
            "this is the default"),
    FOREIGN(IGNORED_FLAG, "--mlock",
            "the file is mapped, and stays in memory while it is used"),
    FOREIGN(REFUSED, "-hf -hfr --hf-repo -mu --model-url",
            "nothing is downloaded; scripts/download.sh fetches a model"),
    FOREIGN(REFUSED, "--prompt-cache", "--session FILE keeps a conversation"),
    FOREIGN(REFUSED, "-i", "-p gives a prompt, -cnv starts a chat"),
    FOREIGN(REFUSED, "--grammar --grammar-file -j",
            "--json-schema FILE makes the answer match a JSON schema"),
};

enum { N_OPTIONS = sizeof table / sizeof *table };

_Static_assert(N_OPTIONS <= (int)MAX_OPTIONS, "settings.given is too short");

/* The index of a word in a list with this separator, or -1. */
static int find_word(const char *words, int separator, const char *word)
{
    const char ends[] = { (char)separator, '\0' };

    for (int i = 0; words && *words; i++) {
        const size_t n = strcspn(words, ends);
        if (same(words, n, word))
            return i;
        words += n + (words[n] != '\0');
    }
    return -1;
}

/* The i-th word of a list separated by |. */
static struct phrase word_of(const char *words, int i)
{
    for (; i > 0; i--)
        words = strchr(words, '|') + 1;
    return phrase("%.*s", (int)strcspn(words, "|"), words);
}

/* The option with this name, or NULL; of several, the one for this mode. */
static const struct option *find_option(const char *name, int mode)
{
    const struct option *found = NULL;

    for (int i = 0; i < N_OPTIONS; i++)
        if (find_word(table[i].names, ' ', name) >= 0 &&
            (!found || (table[i].modes & mode)))
            found = &table[i];
    return found;
}

/* The option that a member of a request body sets, or NULL. */
static const struct option *option_of_member(const char *key)
{
    for (int i = 0; i < N_OPTIONS; i++)
        if (find_word(table[i].json, ' ', key) >= 0)
            return &table[i];
    return NULL;
}

static const char *isa_name(int isa)
{
    static struct phrase name;

    name = word_of(SETS, isa);
    return name.s;
}

static const char *kv_name(int kv_type)
{
    return kv_type == LFM2_KV_F16 ? "f16" : "f32";
}

/* Descriptions start in column 28 and are wrapped at column 79. */
static int print_help(void)
{
    printf("usage: %s [options] MODEL.gguf [PROMPT]\n\n"
           "Answers PROMPT and exits.  Without PROMPT, piped text is the "
           "prompt; at a\nterminal, a chat begins.\n", program);
    for (const struct option *o = table; o < table + N_OPTIONS; o++) {
        const char *help = o->help;
        int column;
        if (o->kind == HEADING)
            printf("\n%s\n", help);
        if (o->kind == HEADING || !help)
            continue;
        column = printf("  %s %s", o->names, !o->arg ? "" :
                        strlen(o->arg) > 48 ? "NAME" : o->arg);
        for (size_t n; *help; help += n + (help[n] == ' '), column = 0) {
            n = strlen(help);
            while (n > 51 || (help[n] && help[n] != ' '))
                n--;
            printf("%s%*s%.*s\n", column < 28 ? "" : "\n",
                   column < 28 ? 28 - column : 28, "", (int)n, help);
        }
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
    printf("\nbyte order  %s-endian, %zu bits\nweights    ",
           is_little_endian() ? "little" : "big", sizeof(void *) * 8);
    for (int i = 0; (type = lfm2_weight_type(i)); i++)
        printf(" %s", type);
    putchar('\n');
    return DONE;
}

/* ---- one value */

/* The values an option accepts, as text for an error message. */
static struct phrase values_of(const struct option *o)
{
    switch (o->kind) {
    case FLAG: return phrase("true or false");
    case CHOICE: return phrase("%s", o->arg);
    case DATE: return phrase("a day like 2026-11-20");
    case RANGE: return phrase("positions like 5, 5- or 5-7");
    case TEXTS: return phrase("at most %d texts that are not empty", MAX_LIST);
    case LIST: return phrase("at most %d whole numbers from %.0f to %.0f, "
                             "separated by commas", MAX_LIST, o->min, o->max);
    case REAL: return phrase("a number from %.10g to %.10g", o->min, o->max);
    default: return phrase("a whole number from %.0f to %.0f", o->min, o->max);
    }
}

static int is_dash(const char *path)
{
    return path && strcmp(path, "-") == 0;
}

/* "5", "5-" or "5-7". */
static int parse_range(const char *s, int *first, int *last)
{
    static const char digits[] = "0123456789";
    const char *dash = s + strspn(s, digits), *end = dash + (*dash == '-');
    const size_t n = strspn(end, digits);
    const long long a = strtoll(s, NULL, 10);
    const long long b = n ? strtoll(end, NULL, 10) : *dash ? INT_MAX : a;

    if (dash == s || end[n] || b < a || b > INT_MAX)
        return -1;
    *first = (int)a;
    *last = (int)b;
    return 0;
}

/* Is it a date as the templates write it, such as 2026-11-20? */
static int is_date(const char *s)
{
    static const int days[] = { 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30,
                                31 };
    int y, m, d, n = 0;

    return *s != '-' && strspn(s, "0123456789-") == 10 && !s[10] &&
           sscanf(s, "%4d-%2d-%2d%n", &y, &m, &d, &n) == 3 && n == 10 &&
           m >= 1 && m <= 12 && d >= 1 && d <= days[m - 1] &&
           (m != 2 || d < 29 || (y % 4 == 0 && (y % 100 || y % 400 == 0)));
}

static int add_text(struct texts *to, const char *s)
{
    if (!*s || to->n == MAX_LIST)
        return -1;
    to->v[to->n++] = s;
    return 0;
}

/* Store a number in its field; -1 if it is out of bounds. */
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

/* Store the number at s.  Returns its end, or NULL if it is not acceptable. */
static const char *parse_number(void *slot, const struct option *o,
                                const char *s)
{
    const int is_real = o->kind == REAL;
    long long whole = 0;
    char *end;
    double x;

    errno = 0;
    x = is_real ? strtod(s, &end) : (double)(whole = strtoll(s, &end, 10));
    return end == s || errno || set_number(slot, o, x, whole) != 0 ? NULL : end;
}

/* Store a value in its field; -1 if it is not acceptable. */
static int parse_value(struct settings *to, const struct option *o,
                       const char *s)
{
    void *slot = (char *)to + o->at;
    struct list *list = slot;
    int i, k;

    switch (o->kind) {
    case TEXTS:
        return add_text(slot, s);
    case CHOICE:
        *(int *)slot = i = find_word(o->arg, '|', s);
        return i < 0 ? -1 : 0;
    case LIST:
        for (list->n = 0; list->n < MAX_LIST; s++) {
            s = parse_number(&list->v[list->n++], o, s);
            if (!s || *s != ',')
                return s && !*s ? 0 : -1;
        }
        return -1;
    case REAL: case WHOLE: case SEED:
        s = parse_number(slot, o, s);
        return s && !*s ? 0 : -1;
    default:
        *(const char **)slot = s;
        return (o->kind != DATE || is_date(s)) &&
               (o->kind != RANGE || parse_range(s, &i, &k) == 0) ? 0 : -1;
    }
}

/* ---- the command line */

/* Process the option at argv[*i], and its value, which may be the next word. */
static int take_option(struct settings *to, int bench, char **argv, int *i)
{
    const char *arg = argv[*i], *equals = strchr(arg, '=');
    const char *value = equals ? equals + 1 : argv[*i + 1];
    const struct phrase name = phrase("%.*s", (int)strcspn(arg, "="), arg);
    const struct option *o = find_option(name.s, bench ? BENCH : ANY - BENCH);

    if (!o)
        return usage("unknown option %s", name.s);
    if (o->kind == REFUSED)
        return usage("%s: %s", name.s, o->arg);
    if (o->kind == IGNORED || o->kind == IGNORED_FLAG) {
        note("%s changes nothing: %s", name.s, o->arg);
        *i += !equals && value && (o->kind == IGNORED ||
              find_word("on off auto", ' ', value) >= 0);
        return DONE;
    }
    if (o->kind == FLAG && equals)
        return usage("%s takes no value, found %s", name.s, equals + 1);
    if (o->kind >= TEXT && o->kind < TEXTS && to->given[o - table])
        return usage("%s is given twice", name.s);
    to->given[o - table] = arg;
    if (o->mode && to->mode && to->mode != o->mode)
        return usage("%s cannot be combined with the options before it",
                     name.s);
    to->mode |= o->mode;
    if (o->kind == FLAG) {
        if (o->at != AT(mode))
            *(int *)((char *)to + o->at) = 1;
        return DONE;
    }
    if (!value)
        return usage("%s needs a value: %s", name.s, o->arg);
    *i += !equals;
    if (parse_value(to, o, value) == 0)
        return DONE;
    if (o->at == AT(threads) && strchr(value, '.'))
        return say(USAGE, "%s %s: expected a number of threads; did you mean "
                   "--temp %s?", name.s, value, value);
    return say(USAGE, "%s %s: expected %s", name.s, value, values_of(o).s);
}

/* An option on the command line that needs a chat template, or NULL. */
static const char *chat_option(const struct settings *s)
{
    return s->system || s->system_file ? "-sys" : s->messages ? "--messages" :
           s->tools ? "--tools" : s->session ? "--session" :
           s->mode == CHAT ? "-cnv" : NULL;
}

/* Every option must apply to this mode, and none may exclude another. */
static int check_settings(const struct settings *s)
{
    const int plain = s->raw || s->ids || s->template == TEMPLATE_NONE;
    const char *mode = s->mode == CHAT ? "a chat" : "a single answer";

    for (int i = 0; i < N_OPTIONS; i++)
        if (s->given[i] && table[i].mode == s->mode)
            mode = s->given[i];
    for (int i = 0; i < N_OPTIONS; i++)
        if (s->given[i] && !(table[i].modes & s->mode))
            return usage("%.*s means nothing with %s",
                         (int)strcspn(s->given[i], "="), s->given[i], mode);
    if (!s->model && s->mode != SELFTEST &&
        !(s->tokenizer && (s->mode & WORDS)))
        return usage("no model given");
    if ((s->prompt || (s->file && s->mode != BATCH)) + !!s->ids +
        !!s->messages > 1)
        return usage("more than one prompt: expected one of PROMPT (or -p, "
                     "-f), --ids and --messages");
    if (s->system && s->system_file)
        return usage("more than one system prompt: expected -sys or -sysf");
    if (plain && chat_option(s))
        return usage("%s needs a chat template, but --raw, --ids and "
                     "--template none use none", chat_option(s));
    if ((s->system || s->system_file) && s->messages)
        return usage("-sys cannot be used with --messages, which has its own "
                     "system message");
    if (is_dash(s->session) || is_dash(s->trace))
        return usage("%s -: expected a file", s->session ? "--session" :
                     "--trace");
    if (!s->trace && (s->trace_filter.n || s->trace_tokens || s->trace_raw))
        return usage("%s needs --trace FILE", s->trace_raw ? "--trace-raw" :
                     s->trace_tokens ? "--trace-tokens" : "--trace-filter");
    if (s->ask.logprobs >= 0 && !s->json)
        return usage("--logprobs needs --json");
    if (s->isa != LFM2_ISA_AUTO && !lfm2_isa_available(s->isa))
        return say(USAGE, "--isa %s: not on this CPU or not in this build; "
                   "--version lists the available ones", isa_name(s->isa));
    return DONE;
}

static int parse(struct settings *to, char **argv)
{
    const char *words[2] = { NULL, NULL };
    int n_words = 0, n = 0, options = 1, bench = 0, code = DONE;

    /* These two affect the options before them, too. */
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
    if (!to->model && n < n_words) {
        to->model = words[n++];
        to->given[find_option("-m", ANY) - table] = "MODEL.gguf";
    }
    if (!to->prompt && n < n_words) {
        to->prompt = words[n++];
        to->given[find_option("-p", ANY - BENCH) - table] = "PROMPT";
    }
    if (n < n_words)
        return usage("unexpected argument %s: there is a prompt already",
                     words[n]);
    if (!to->mode)
        to->mode = to->prompt || to->file || to->ids || to->messages ||
                   to->json || !isatty(STDIN_FILENO) ? ANSWER : CHAT;
    return check_settings(to);
}

/* ------------------------------------------- 12. Characters, numbers, files */

/* ---- characters */

/* ASCII letters only, whatever the locale. */
static void lower(char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (s[i] >= 'A' && s[i] <= 'Z')
            s[i] = (char)(s[i] - 'A' + 'a');
}

/* Order by bytes, a prefix first. */
static int compare(const char *a, size_t n_a, const char *b, size_t n_b)
{
    const int order = memcmp(a, b, n_a < n_b ? n_a : n_b);

    return order ? order : (n_a > n_b) - (n_a < n_b);
}

/* Decode the UTF-8 character at s < end.  Returns its length, or 0 if it is
 * malformed; *out is then the replacement character. */
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

/* Including the C1 controls: U+009B means the same as ESC [. */
static int is_control(uint32_t c)
{
    return c < ' ' || (c >= 0x7f && c < 0xa0);
}

/* Remove control characters except newline and tab, and stray bytes 0x80 to
 * 0x9f, which could complete one.  Returns the new length. */
static size_t drop_controls(char *s, size_t n)
{
    const char *const end = s + n, *from = s;
    size_t kept = 0;
    uint32_t c;

    for (int size; from < end; from += size) {
        size = utf8_get(from, end, &c);
        c = size ? c : (unsigned char)*from;
        size += size == 0;
        if (is_control(c) && c != '\n' && c != '\t')
            continue;
        memmove(s + kept, from, (size_t)size);
        kept += (size_t)size;
    }
    return kept;
}

/* ---- numbers */

/* "23.84 B" (billions) or, if the unit is "B" for bytes, "13.51 GB". */
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

/* FNV-1a. */
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

/* Number by number, so that it does not depend on the byte order. */
static uint64_t hash_floats(uint64_t h, const float *x, int n)
{
    for (int i = 0; i < n; i++)
        h = hash_number(h, float_bits(x[i]));
    return h;
}

/* ---- files */

/* Append the directory part of a path. */
static void add_directory(struct text *t, const char *path)
{
    const char *slash = strrchr(path, '/');

    add(t, slash ? path : ".", slash ? (size_t)(slash - path) + 1 : 1);
}

/* Print to standard output, without control characters if it is a terminal. */
static void show_text(struct text *t)
{
    if (isatty(STDOUT_FILENO))
        t->n = drop_controls(t->s, t->n);
    fwrite(t->s ? t->s : "", 1, t->n, stdout);
}

/* ---- bytes in and out */

/* Append a file, or standard input for "-", to *out.  The caller frees out->s,
 * even after a failure. */
static int read_file(const char *path, struct text *out)
{
    const int piped = is_dash(path);
    const int fd = piped ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC);
    int code = DONE;
    ssize_t got;

    if (fd < 0)
        return say(BAD_FILE, "%s: %s", path, strerror(errno));
    do {
        reserve(out, out->n < 1 << 14 ? 1 << 14 : out->n);
        got = read(fd, out->s + out->n, out->cap - out->n - 1);
        out->n += got > 0 ? (size_t)got : 0;
        out->s[out->n] = '\0';
    } while (got > 0 || (got < 0 && errno == EINTR && !interrupted));
    if (got < 0)
        code = errno == EINTR ? INTERRUPTED :
               say(BAD_FILE, piped && errno == EISDIR ? "%s is closed or a "
                   "directory, expected text" : "%s: %s", piped ?
                   "standard input" : path, strerror(errno));
    if (!piped)
        close(fd);
    return code;
}

/* Open a file, or standard output for "-"; NULL after an error message. */
static FILE *create_file(const char *path)
{
    FILE *f = is_dash(path) ? stdout : fopen(path, "wb");

    if (!f)
        say(BAD_FILE, "%s: %s", path, strerror(errno));
    return f;
}

/* flush_output() checks standard output. */
static int finish_file(FILE *f, const char *path, int code)
{
    int failed = f != stdout && ferror(f);

    failed |= f != stdout && fclose(f) != 0;
    return !failed || code != DONE ? code :
           say(BAD_FILE, "%s: %s", path, strerror(errno));
}

/* Returns 0, or -1 and errno. */
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

/* Replace a file by this text, as a whole or not at all: a new file is written
 * beside it and renamed.  It has the permissions of the old one; if there was
 * none, only its owner may read it.  Symbolic links are followed.  Without t,
 * only check that it can be replaced, so that the user knows before the work is
 * done.  After a failure errno says why. */
static int replace_file(const char *path, const struct text *t)
{
    char *real = realpath(path, NULL);
    const char *to = real ? real : path;
    struct text name = { 0 };
    struct stat old;
    const int exists = lstat(to, &old) == 0;
    const char *wrong = !exists || S_ISREG(old.st_mode) ? NULL :
                        S_ISDIR(old.st_mode) ? "a directory" :
                        S_ISFIFO(old.st_mode) ? "a pipe" :
                        S_ISLNK(old.st_mode) ? "a link that leads nowhere" :
                        "a device or socket";
    int fd = -1, ok, error;

    add_directory(&name, to);
    ok = !wrong && access(name.s, W_OK | X_OK) == 0;
    if (ok && t) {
        name.n = 0;
        add_string(&name, to);
        add_string(&name, ".XXXXXX");
        fd = mkstemp(name.s);
        ok = fd >= 0;
        if (ok && exists)
            fchmod(fd, old.st_mode & 0777);   /* else it stays private       */
        ok = ok && write_all(fd, t->s, t->n) == 0;
        ok = ok && (fsync(fd) == 0 ||         /* not in every file system    */
             errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP);
        ok = (fd < 0 || close(fd) == 0) && ok && rename(name.s, to) == 0;
    }
    error = errno;
    if (!ok && fd >= 0)
        remove(name.s);
    if (wrong)
        say(BAD_FILE, "%s: %s, expected a file", path, wrong);
    else if (!ok)
        say(BAD_FILE, "%s: cannot be written: %s", path, strerror(error));
    free(name.s);
    free(real);
    errno = error;
    return ok ? DONE : BAD_FILE;
}

/* ---- models */

/* Map a model, or read it where mmap() does not work, as in some shared
 * folders.  `any` is LFM2_LOAD_ANY or 0. */
static int open_file(lfm2_model **out, const char *path, int no_mmap, int any,
                     lfm2_error *err)
{
    int code = lfm2_model_open(out, path, (no_mmap ? LFM2_LOAD_READ :
                               LFM2_LOAD_MAP) | any, err);

    if (code != LFM2_EIO || no_mmap || !strstr(err->msg, "cannot map"))
        return code;
    note("%s: the file system cannot map files, so it is read", path);
    return lfm2_model_open(out, path, LFM2_LOAD_READ | any, err);
}

/* Other files, mistaken for models: the bytes at an offset, and advice. */
#define BYTES(s) s, sizeof s - 1

static const struct { int at; const char *s; size_t n; const char *advice; }
mistaken[] = {
    { 0, BYTES("version https://git-lfs"), "it is a git-lfs pointer; \"git lfs "
      "pull\" fetches the file itself" },
    { 0, BYTES("<"), "it is a web page; scripts/download.sh fetches models" },
    { 0, BYTES("PK\3\4"), "it is a zip archive or a PyTorch file, expected a "
      "GGUF; scripts/download.sh fetches one" },
    { 8, BYTES("{\""), "it is a safetensors file, expected a GGUF; "
      "scripts/download.sh fetches one" },
    { 0, BYTES("\x1f\x8b"), "it is compressed; gunzip unpacks it" },
    { 0, BYTES("LFM2SES"), "it is a conversation; pass it with --session" },
    { 0, BYTES("{"), "it is JSON; pass it with --messages or --tools" },
    { 0, BYTES("["), "it is JSON; pass it with --messages or --tools" },
    { 4, BYTES("\3\0\0\0\0\0\0\0\0\0\0\0"), "it is a vocabulary without a "
      "model; pass it with --tokenizer" }
};

/* Print an error of the library and return the exit status for it.  If a file
 * could not be opened, the library's message begins with its path. */
static int report(const char *path, const lfm2_error *err)
{
    const int code = status_of(err->code);
    const int has_path = strncmp(err->msg, path, strlen(path)) == 0;
    FILE *f = code == BAD_MODEL ? fopen(path, "rb") : NULL;
    char head[24] = "";
    const size_t n = f ? fread(head, 1, sizeof head, f) : 0;

    say(code, "%s%s%s", has_path ? "" : path, has_path ? "" : ": ", err->msg);
    if (f)
        fclose(f);
    for (size_t i = 0; n > 0 && i < sizeof mistaken / sizeof *mistaken; i++)
        if (memcmp(head + mistaken[i].at, mistaken[i].s, mistaken[i].n) == 0)
            return say(code, "%s: %s", path, mistaken[i].advice);
    return code;
}

/* ---- text that people wrote
 *
 * Prompts, conversations and commands come from the editors, shells and
 * spreadsheets of all systems.  A byte order mark is dropped, UTF-16 becomes
 * UTF-8, and lines end with \n.  --ids, --tokenize, --detokenize and --ppl take
 * their input as it is. */

/* UTF-16 is recognised by its byte order mark or, without one, by its zeros:
 * most high bytes are 0, and no low byte is. */
static void utf16_to_utf8(struct text *t)
{
    const unsigned char *s = (const unsigned char *)t->s;
    size_t zeros[2] = { 0, 0 };
    struct text out = { 0 };
    char to[4];
    int high;                             /* its index in a pair; -1: UTF-8  */

    for (size_t i = 0; i < t->n; i++)
        zeros[i % 2] += !s[i];
    high = t->n < 2 ? -1 : memcmp(s, "\xff\xfe", 2) == 0 ? 1 :
           memcmp(s, "\xfe\xff", 2) == 0 ? 0 : t->n < 4 ? -1 :
           !zeros[0] && zeros[1] * 8 >= t->n * 3 ? 1 :
           !zeros[1] && zeros[0] * 8 >= t->n * 3 ? 0 : -1;
    if (high < 0)
        return;
    for (size_t i = 0; i < t->n; i += 2) {
        uint32_t c = 0xfffd, low = 0;
        if (i + 1 < t->n)
            c = s[i + !high] | s[i + high] << 8;
        if (i + 3 < t->n)
            low = s[i + 2 + !high] | s[i + 2 + high] << 8;
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
    size_t n = 0, i;

    utf16_to_utf8(t);
    i = t->n >= 3 && memcmp(t->s, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
    for (; i < t->n; i++) {
        const int ends = t->s[i] == '\r';
        i += ends && i + 1 < t->n && t->s[i + 1] == '\n';
        t->s[n++] = ends ? '\n' : t->s[i];
    }
    t->n = n;
    add(t, "", 0);
}

/* Refuse text that is not UTF-8: in another encoding the model would read
 * letters that nobody wrote. */
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

/* Append the text of a file, after a blank line if there is some text already,
 * and without a newline at its end. */
static int read_text_file(const char *path, struct text *out)
{
    struct text more = { 0 };
    int code = read_file(path, &more);

    clean_text(&more);
    if (more.n > 0 && more.s[more.n - 1] == '\n')
        more.n--;
    if (code == DONE) {
        add_string(out, out->n > 0 && more.n > 0 ? "\n\n" : "");
        add(out, more.s, more.n);
    }
    free(more.s);
    return code;
}

/* Is there piped text besides the prompt?  A file that was read from belongs to
 * a shell loop; terminals, devices, and sockets of ssh may never end. */
static int has_piped_text(const struct settings *s)
{
    struct stat st;

    return !is_dash(s->file) && !is_dash(s->tools) && !is_dash(s->prompt) &&
           !is_dash(s->json_schema) && fstat(STDIN_FILENO, &st) == 0 &&
           (S_ISFIFO(st.st_mode) ||
            (S_ISREG(st.st_mode) && lseek(STDIN_FILENO, 0, SEEK_CUR) == 0));
}

/* The prompt: the argument, then the file of -f, then piped text, except in a
 * chat, where piped lines are messages. */
static int read_prompt(const struct settings *s, struct text *out)
{
    struct pollfd in = { STDIN_FILENO, POLLIN, 0 };
    const int given = s->prompt && !is_dash(s->prompt);
    int code = DONE;

    if (!s->prompt && !s->file && isatty(STDIN_FILENO))
        return usage("no prompt given; try %s MODEL.gguf \"a question\"",
                     program);
    add_string(out, given ? s->prompt : "");
    clean_text(out);
    if (s->file)
        code = read_text_file(s->file, out);
    if (code != DONE || ((given || s->file) &&
                         (s->mode == CHAT || !has_piped_text(s))))
        return code;
    if (given && poll(&in, 1, 2000) == 0)
        note("standard input is read, too, and has not ended; </dev/null "
             "prevents that");
    code = read_text_file("-", out);
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
    out->n = t.n / 4 < INT_MAX ? (int)(t.n / 4) : INT_MAX;
    out->id = zeroed((size_t)out->n, sizeof *out->id);
    for (size_t i = 0; i < (size_t)out->n; i++)
        out->id[i] = (int32_t)get_le((unsigned char *)t.s + 4 * i, 4);
    free(t.s);
    return code;
}

/* --------------------------------------------- 13. Signals and the terminal
 *
 * A signal ends the program at once, unless is_polled is set: then the work in
 * progress checks `interrupted` and stops in good order.  If that hangs, the
 * third signal ends the program at once.  Handlers are installed at the start,
 * because the first process of a container gets only signals that it handles.
 * A signal that was ignored, as after nohup, stays ignored. */

static volatile sig_atomic_t is_editing;  /* a line, at the terminal         */
static volatile sig_atomic_t must_redraw; /* that line                       */

#ifdef __wasi__

#define handle_signal(number, handler) ((void)(handler))
#define set_terminal(is_edited) (-1)
#define count_columns()         80

#else

/* Without SA_RESTART, so that a signal interrupts waiting for input. */
static void handle_signal(int number, void (*handler)(int))
{
    struct sigaction action = { .sa_handler = handler }, had;

    sigaction(number, NULL, &had);
    if (had.sa_handler != SIG_IGN)
        sigaction(number, &action, NULL);
}

static int set_terminal(int is_edited);

/* SIGTSTP; or SIGCONT or SIGWINCH, after which the line is drawn again. */
static void on_change(int number)
{
    if (number == SIGTSTP) {
        set_terminal(0);
        signal(number, SIG_DFL);
        raise(number);                    /* takes effect on return          */
    } else if (is_editing)
        must_redraw = set_terminal(1) == 0;
}

/* Prepare the terminal for editing, or restore it; -1 if that is impossible. */
static int set_terminal(int is_edited)
{
    static const char paste[2][9] = { "\033[?2004l", "\033[?2004h" };
    static volatile sig_atomic_t is_changed;
    static struct termios plain;
    struct termios t;

    if (!is_changed && (!is_edited || tcgetattr(STDIN_FILENO, &plain) != 0))
        return -1;
    t = plain;
    if (is_edited) {
        t.c_lflag &= ~(tcflag_t)(ICANON | ECHO | IEXTEN);
        t.c_iflag &= ~(tcflag_t)(ICRNL | INLCR | IGNCR | ISTRIP);
        t.c_cc[VMIN] = 1;
        t.c_cc[VTIME] = 0;
        handle_signal(SIGTSTP, on_change);
        handle_signal(SIGCONT, on_change);
        handle_signal(SIGWINCH, on_change);
    }
    if (tcsetattr(STDIN_FILENO, TCSANOW, &t) != 0)
        return -1;
    is_changed = is_edited;
    (void)!write(STDERR_FILENO, paste[is_edited], 8);
    return 0;
}

static int count_columns(void)
{
    struct winsize size = { 0 };

    ioctl(STDERR_FILENO, TIOCGWINSZ, &size);
    return size.ws_col > 8 ? size.ws_col : 80;
}

#endif

static void leave_terminal(void)
{
    set_terminal(0);
}

/* Exit from a signal handler, with async-signal-safe functions only. */
static void die(int code, const char *message)
{
    set_terminal(0);
    (void)!write(STDERR_FILENO, "\033[0m\n", is_dim ? 5 : 0);
    (void)!write(STDERR_FILENO, message, strlen(message));
    _exit(code);
}

static void on_interrupt(int number)
{
    if (last_signal == 0 || last_signal == SIGINT)
        last_signal = number;
    if (!is_polled || ++interrupted > 2)
        die(128 + number, "");
    if (running)
        lfm2_cancel(running);
}

/* Threads that start between block_signals(1) and (0) leave signals to the main
 * thread, which may be waiting for input; but each gets its own SIGBUS. */
static void block_signals(int are_blocked)
{
#if !defined LFM2_NO_THREADS && !defined __wasi__
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

/* Called first.  If the shell closed one of the first three descriptors
 * (">&-"), output would go to the next file that is opened; so a directory,
 * which can be neither read nor written, takes its place.  Other descriptors
 * are closed, because the sandbox could not take them away, except those that
 * an argument names: <(command) is /dev/fd/63. */
static void prepare_process(char **argv)
{
    int fd;

    while ((fd = open("/", O_RDONLY)) >= 0 && fd <= STDERR_FILENO)
        continue;
    close(fd);
#ifndef __wasi__
    DIR *dir = opendir("/dev/fd");
    struct dirent *entry;
    while (dir && (entry = readdir(dir))) {
        fd = atoi(entry->d_name);
        int keep = fd <= STDERR_FILENO || fd == dirfd(dir);
        for (int i = 1; !keep && argv[0] && argv[i]; i++) {
            const char *name = strstr(argv[i], "/fd/");
            keep = name && strcmp(name + 4, entry->d_name) == 0;
        }
        if (!keep)
            close(fd);
    }
    if (dir)
        closedir(dir);
    handle_signal(SIGHUP, on_interrupt);
    handle_signal(SIGQUIT, on_interrupt);
    signal(SIGXFSZ, SIG_IGN);
#else
    (void)argv;
#endif
    handle_signal(SIGINT, on_interrupt);
    handle_signal(SIGTERM, on_interrupt);
    signal(SIGPIPE, SIG_IGN);             /* write() fails instead           */
    atexit(leave_terminal);
}

/* ---- a model file that becomes shorter
 *
 * If a mapped file is truncated, reading past its new end gives SIGBUS.  Only
 * models are mapped. */

#ifndef LFM2_NO_MMAP

static char bus_message[4500];            /* made before it is needed        */

/* Several threads may get here at once; one prints.  A signal that was sent, or
 * is due to alignment, is not about the file: the next one kills as usual. */
static void on_bus_error(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (info->si_code <= 0 || info->si_code == BUS_ADRALN) {
        signal(number, SIG_DFL);
        return;
    }
#ifndef LFM2_NO_THREADS
    static atomic_flag is_printing = ATOMIC_FLAG_INIT;
    while (atomic_flag_test_and_set(&is_printing))
        continue;
#endif
    die(BAD_FILE, bus_message);
}

#endif

/* Prepare the message: this file is about to be mapped, or stays mapped. */
static void watch_file(const char *path)
{
#ifndef LFM2_NO_MMAP
    snprintf(bus_message, sizeof bus_message, "%s: %s: it became shorter while "
             "it was used, or its disk failed; --no-mmap avoids this\n",
             program, path);
    sigaction(SIGBUS, &(struct sigaction){ .sa_sigaction = on_bus_error,
              .sa_flags = SA_SIGINFO }, NULL);
#else
    (void)path;
#endif
}

/* ---- the line editor */

struct editor {
    struct text line;
    size_t at;                            /* the cursor                      */
    const char *prompt;
    int shown;                            /* in history[]; n_history: new    */
    int is_pasting;
};

static struct text *history;              /* the lines before, oldest first  */
static int n_history;
static struct text draft;                 /* the new line, while not shown   */
static unsigned char input_bytes[4096];   /* read, but not used              */
static ssize_t input_at, n_input;

enum { INPUT_ENDS = -1, GOT_SIGNAL = -2, MUST_REDRAW = -3 };

/* The next byte of standard input, or one of the above.  A signal that comes
 * just before poll() does not interrupt it, so that waits a second at most. */
static int next_byte(void)
{
    struct pollfd in = { STDIN_FILENO, POLLIN, 0 };

    while (input_at == n_input) {
        const int ready = poll(&in, 1, 1000);
        if (interrupted || must_redraw) {
            must_redraw = 0;
            return interrupted ? GOT_SIGNAL : MUST_REDRAW;
        }
        if (ready <= 0)
            continue;
        const ssize_t got = read(STDIN_FILENO, input_bytes, sizeof input_bytes);
        if (got == 0 || (got < 0 && errno != EINTR))
            return INPUT_ENDS;
        input_at = 0;
        n_input = got > 0 ? got : 0;
    }
    return input_bytes[input_at++];
}

/* Ranges, each from its first character to its last: of marks, which are drawn
 * over the character before them, and of wide characters. */
static const uint32_t no_columns[] = {
    0x300, 0x36f, 0x483, 0x489, 0x591, 0x5bd, 0x610, 0x61a, 0x64b, 0x65f,
    0x93c, 0x93c, 0x941, 0x948, 0x94d, 0x94d, 0xe31, 0xe31, 0xe34, 0xe3a,
    0xe47, 0xe4e, 0x1ab0, 0x1aff, 0x1dc0, 0x1dff, 0x200b, 0x200f, 0x20d0,
    0x20ff, 0x3099, 0x309a, 0xfe00, 0xfe0f, 0xfe20, 0xfe2f, UINT32_MAX
}, two_columns[] = {
    0x1100, 0x115f, 0x231a, 0x231b, 0x26a1, 0x26a1, 0x2705, 0x2705, 0x2728,
    0x2728, 0x274c, 0x274c, 0x2753, 0x2757, 0x2b50, 0x2b50, 0x2e80, 0x303e,
    0x3041, 0xa4cf, 0xac00, 0xd7a3, 0xf900, 0xfaff, 0xfe30, 0xfe6f, 0xff00,
    0xff60, 0xffe0, 0xffe6, 0x1f300, 0x1f320, 0x1f32d, 0x1f64f, 0x1f680,
    0x1f6ff, 0x1f900, 0x1faff, 0x20000, 0x3fffd, UINT32_MAX
};

static int in_ranges(uint32_t c, const uint32_t *range)
{
    while (range[0] <= c && range[1] < c)
        range += 2;
    return range[0] <= c;
}

/* A character as it is shown: n bytes of the text, in some columns. */
struct glyph { uint32_t c; size_t n; int columns; };

static struct glyph glyph_at(const struct text *t, size_t i)
{
    struct glyph x;
    const int n = utf8_get(t->s + i, t->s + t->n, &x.c);

    x.n = n > 0 ? (size_t)n : 1;
    if (x.c == '\r')
        x.c = '\n';
    if (n == 0 || (is_control(x.c) && x.c != '\n' && x.c != '\t'))
        x.c = '?';
    x.columns = in_ranges(x.c, no_columns) ? 0 :
                in_ranges(x.c, two_columns) ? 2 : 1;
    return x;
}

/* The end of the character at byte i, with its marks. */
static size_t next_char(const struct text *t, size_t i)
{
    i += i < t->n ? glyph_at(t, i).n : 0;
    while (i < t->n && glyph_at(t, i).columns == 0)
        i += glyph_at(t, i).n;
    return i;
}

/* The start of the character before the cursor. */
static size_t previous_char(const struct editor *e)
{
    size_t from = 0, next;

    while ((next = next_char(&e->line, from)) < e->at)
        from = next;
    return from;
}

/* Draw the line in one row, scrolled to the cursor; or draw all of it. */
static void draw_line(const struct editor *e, int whole)
{
    const struct text *t = &e->line;
    const int prompt = (int)strlen(e->prompt);
    const int room = whole ? INT_MAX : count_columns() - prompt - 1;
    struct text out = { 0 };
    size_t from = 0;
    int cursor = 0, used = 0;
    struct glyph x;
    char s[4];

    for (size_t i = 0; i < e->at; i += glyph_at(t, i).n)
        cursor += glyph_at(t, i).columns;
    for (; cursor >= room; from = next_char(t, from))
        cursor -= glyph_at(t, from).columns;
    add_format(&out, "\r%s", e->prompt);
    for (; from < t->n; from += x.n) {
        x = glyph_at(t, from);
        used += x.columns;
        if (used > room)
            break;
        if (!whole && (x.c == '\n' || x.c == '\t'))
            x.c = x.c == '\n' ? 0x21b5 : ' ';    /* an arrow                 */
        add(&out, s, utf8_put(s, x.c));
    }
    add_string(&out, whole ? "\033[K\n" : "\033[K\r");
    if (!whole)
        add_format(&out, "\033[%dC", prompt + cursor);
    write_all(STDERR_FILENO, out.s, out.n);
    free(out.s);
}

/* Replace the bytes from `from` to `to` by s[n]; the cursor goes after it. */
static void edit_line(struct editor *e, size_t from, size_t to, const char *s,
                      size_t n)
{
    struct text *t = &e->line;

    reserve(t, n);
    memmove(t->s + from + n, t->s + to, t->n - to + 1);
    memcpy(t->s + from, s, n);
    t->n = t->n + n - (to - from);
    e->at = from + n;
}

/* Show an older (-1) or newer (1) line; the newest is the one being written. */
static void recall(struct editor *e, int step)
{
    const int next = e->shown + step;
    const struct text *t;

    if (next < 0 || next > n_history)
        return;
    if (e->shown == n_history) {
        draft.n = 0;
        add(&draft, e->line.s, e->line.n);
    }
    t = next == n_history ? &draft : &history[next];
    e->shown = next;
    edit_line(e, 0, e->line.n, t->s, t->n);
}

#define CONTROL(c) ((c) - '@')

enum { BACKSPACE = 127, PASTE = 256, PASTE_ENDS };

/* What follows ESC when a key is pressed, and the key that does the same. */
static const struct { const char *s; int key; } sequences[] = {
    { "[A", CONTROL('P') }, { "[B", CONTROL('N') }, { "[C", CONTROL('F') },
    { "[D", CONTROL('B') }, { "[H", CONTROL('A') }, { "[1~", CONTROL('A') },
    { "[7~", CONTROL('A') }, { "[F", CONTROL('E') }, { "[4~", CONTROL('E') },
    { "[8~", CONTROL('E') }, { "[3~", CONTROL('D') }, { "\r", '\n' },
    { "\n", '\n' }, { "[200~", PASTE }, { "[201~", PASTE_ENDS }
};

/* The key for what follows ESC, or 0.  Some terminals send O instead of [. */
static int read_sequence(void)
{
    char s[8] = "";
    size_t n = 0;
    int c;

    do {
        c = next_byte();
        if (n < sizeof s - 1)
            s[n] = (char)(n == 0 && c == 'O' ? '[' : c);
    } while (c >= ' ' && (n++ == 0 ? s[0] == '[' : c < '@'));
    for (size_t i = 0; i < sizeof sequences / sizeof *sequences; i++)
        if (strcmp(s, sequences[i].s) == 0)
            return sequences[i].key;
    return 0;
}

/* Obey a key as other line editors do.  Pasted text is no command. */
static void press(struct editor *e, int c)
{
    const struct text *t = &e->line;
    size_t from = e->at;

    if (c == CONTROL('['))
        c = read_sequence();
    switch (e->is_pasting && (c < ' ' || c == BACKSPACE) ? 0 : c) {
    case PASTE: case PASTE_ENDS: e->is_pasting = c == PASTE; break;
    case CONTROL('A'): e->at = 0; break;
    case CONTROL('B'): e->at = previous_char(e); break;
    case CONTROL('D'): edit_line(e, from, next_char(t, from), "", 0); break;
    case CONTROL('E'): e->at = t->n; break;
    case CONTROL('F'): e->at = next_char(t, from); break;
    case CONTROL('H'): case BACKSPACE:
        edit_line(e, previous_char(e), from, "", 0);
        break;
    case CONTROL('K'): edit_line(e, from, t->n, "", 0); break;
    case CONTROL('L'): write_all(STDERR_FILENO, "\033[H\033[2J", 7); break;
    case CONTROL('N'): recall(e, 1); break;
    case CONTROL('P'): recall(e, -1); break;
    case CONTROL('U'): edit_line(e, 0, from, "", 0); break;
    case CONTROL('W'):
        while (from > 0 && t->s[from - 1] == ' ')
            from--;
        while (from > 0 && t->s[from - 1] != ' ')
            from--;
        edit_line(e, from, e->at, "", 0);
        break;
    default:
        if ((c >= ' ' && c != BACKSPACE) || c == '\t' || c == '\n' || c == '\r')
            edit_line(e, from, from, &(char){ (char)c }, 1);
    }
}

/* ---- lines and messages */

/* Add a line to the history, unless it is empty or the same as the last. */
static void remember(const struct text *t)
{
    if (t->n == 0 || (n_history > 0 &&
                      same(t->s, t->n, history[n_history - 1].s)))
        return;
    history = resize(history, ((size_t)n_history + 1) * sizeof *history);
    history[n_history] = (struct text){ 0 };
    add(&history[n_history++], t->s, t->n);
}

/* Append a line, without its newline, to *out.  Returns 1; 0 at the end of the
 * input; -1 after a signal that ends the chat.  Ctrl-C clears a line, and ends
 * the chat only if it comes twice to an empty one.  At a terminal (`shows`) the
 * line is edited here; but a dumb one does that itself, and may cut the line
 * after 4095 bytes. */
static int read_line(struct text *out, int shows, const char *prompt)
{
    struct editor e = { .prompt = prompt, .shown = n_history };
    const char *term = getenv("TERM");
    int is_warned = !shows, ends = 0, c = GOT_SIGNAL;

    is_editing = shows && isatty(STDERR_FILENO) && term && term[0] &&
                 strcmp(term, "dumb") != 0;
    if (is_editing && set_terminal(1) != 0)
        is_editing = 0;
    fflush(stdout);
    add(&e.line, "", 0);
    while (!ends) {
        if (is_editing && input_at == n_input)
            draw_line(&e, 0);
        else if (shows && !is_editing && c == GOT_SIGNAL)
            fputs(prompt, stderr);
        c = next_byte();
        ends = c == INPUT_ENDS || (!e.is_pasting && c == '\n');
        if (is_editing)                   /* a Ctrl-D typed early is 0       */
            ends |= (!e.is_pasting && c == '\r') ||
                    (e.line.n == 0 && (c == CONTROL('D') || c == 0));
        if (is_editing && (ends || c == GOT_SIGNAL))
            draw_line(&e, 1);
        else if (shows && !is_editing && c < 0)
            fputc('\n', stderr);
        if (c == GOT_SIGNAL) {
            const int is_empty = !is_editing || e.line.n == 0;
            ends = last_signal != SIGINT || (is_empty && is_warned);
            interrupted = ends;
            if (is_empty && !ends)
                fprintf(stderr, "(Ctrl-C once more or Ctrl-D ends the chat)\n");
            is_warned = is_empty;
            edit_line(&e, 0, e.line.n, "", 0);
            e.is_pasting = 0;
        } else if (c >= 0 && !ends) {
            is_warned = !shows;
            if (is_editing)
                press(&e, c);
            else
                add(&e.line, &(char){ (char)c }, 1);
        }
    }
    if (is_editing)
        remember(&e.line);
    else if (shows && e.line.n == 4095)
        note("a line of 4095 bytes: the terminal may have cut it");
    is_editing = 0;
    set_terminal(0);
    if (e.line.n > 0 && e.line.s[e.line.n - 1] == '\r')
        e.line.n--;
    add(out, e.line.s, e.line.n);
    ends = e.line.n > 0;
    free(e.line.s);
    return c == GOT_SIGNAL ? -1 : ends || c == '\n' || c == '\r';
}

static int ends_with(const struct text *t, const char *word)
{
    const size_t n = strlen(word);

    return t->n >= n && memcmp(t->s + t->n - n, word, n) == 0;
}

/* Read a message of one or more lines.  Returns as read_line().  An earlier
 * Ctrl-C does not count: it stopped the work of that time. */
static int read_message(struct text *out, int shows)
{
    static const char quotes[] = "\"\"\"";
    int quoted, got;

    interrupted = 0;
    if (last_signal && last_signal != SIGINT)
        return -1;
    out->n = 0;
    got = read_line(out, shows, "> ");
    if (got <= 0)
        return got;
    quoted = begins(out->s, out->s + out->n, quotes);
    if (quoted)
        memmove(out->s, out->s + 3, (out->n -= 3) + 1);
    while (got > 0 && (quoted ? !ends_with(out, quotes) :
                       ends_with(out, "\\"))) {
        out->n -= !quoted;
        if (out->n > 0 || !quoted)        /* drop one after the quotes       */
            add(out, "\n", 1);
        got = read_line(out, shows, ". ");
    }
    if (got < 0)
        return got;
    out->n -= quoted && ends_with(out, quotes) ? 3 : 0;
    out->n -= quoted && ends_with(out, "\n");
    out->n -= quoted && ends_with(out, "\r");    /* from pasted text         */
    clean_text(out);
    return 1;
}

/* ------------------------------------------------------------------ 14. JSON
 *
 * Requests, tools, schemas and results are JSON (RFC 8259).  The reader is
 * strict: it accepts only what every JSON reader accepts.  It makes a read-only
 * tree in a pool, so that one call frees a whole request.  It also reads the
 * Python literals in which models call tools (section 16).  JSON is written
 * straight to a text, without a tree. */

enum {
    MAX_JSON = 1 << 26,                   /* bytes of text                   */
    MAX_POOL = 1 << 28,                   /* bytes of nodes and strings      */
    MAX_DEPTH = 64,
    MAX_MEMBERS = 1024                    /* of an object                    */
};

static const char *const json_names[] = {
    "null", "false", "true", "a number", "a string", "an array", "an object"
};

/* n zeroed bytes, aligned to 16. */
static void *pool_get(struct pool *p, size_t n)
{
    n = (n + 15) / 16 * 16;
    if (!p->chunks || p->chunks->size - p->chunks->used < n) {
        const size_t size = n > 1 << 14 ? n : 1 << 14;
        struct chunk *c = resize(NULL, sizeof *c + size);
        *c = (struct chunk){ p->chunks, 0, size };
        p->chunks = c;
    }
    p->chunks->used += n;
    p->total += n;
    return memset((char *)(p->chunks + 1) + p->chunks->used - n, 0, n);
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
    const int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;

    for (int i = n - 1; i > 0; i--, c >>= 6)
        out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)(n > 1 ? 0xf00u >> n | c : c);
    return (size_t)n;
}

/* ---- values
 *
 * All of these but find_key() accept NULL, for a value that is missing. */

static int json_is(const struct json *v, int type)
{
    return v && v->type == type;
}

/* A linear search: MAX_MEMBERS keeps it fast. */
static struct json *find_key(const struct json *in, const char *key, size_t n)
{
    struct json *v = in->first;

    while (v && (v->n_key != n || memcmp(v->key, key, n) != 0))
        v = v->next;
    return v;
}

/* NULL if there is no such key, or `object` is not an object. */
static struct json *json_get(const struct json *object, const char *key)
{
    return json_is(object, JSON_OBJECT) ? find_key(object, key, strlen(key)) :
           NULL;
}

/* The same, but NULL also for a member whose value is null. */
static const struct json *member(const struct json *object, const char *key)
{
    const struct json *v = json_get(object, key);

    return json_is(v, JSON_NULL) ? NULL : v;
}

/* The bytes of a string; NULL if it contains a NUL, or is not a string. */
static const char *json_text(const struct json *v)
{
    return json_is(v, JSON_STRING) && strlen(v->s) == v->n ? v->s : NULL;
}

/* These return -1, and leave *out alone, if the value has another type. */
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

/* A whole number without point or exponent, from `least` to `most`. */
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
 * The reader works on a copy of the text that ends with NUL, and decodes
 * strings in place: no escape is shorter than its character.  Python literals
 * get the values of ast.literal_eval(), if JSON has such values. */

struct reader {
    struct pool *pool;
    size_t had;                           /* pool->total at the start        */
    const char *text;                     /* the original: n bytes           */
    size_t n;
    char *start, *at, *end;               /* the copy; the next byte         */
    int depth, code;
    enum { AS_JSON, AS_PYTHON, AS_BAD_PYTHON } as;    /* BAD: see is_inner() */
    struct why *why;
};

static void start_reading(struct reader *r)
{
    r->start = r->at = memcpy(pool_get(r->pool, r->n + 1), r->text, r->n);
    r->end = r->at + r->n;
    r->code = DONE;
}

/* Record an error unless is_good: what was found, where, and what was expected.
 * Only the first counts; it ends the reading.  Returns 0 after one. */
static int expect(struct reader *r, int is_good, const char *what)
{
    const char *line = r->text, *const at = line + (r->at - r->start);
    struct phrase found = { "the end" };
    int n = 1;

    if (is_good || r->code != DONE)
        return r->code == DONE;
    if (r->at < r->end)
        found = phrase(*at > ' ' && *at < 127 ? "'%c'" : "byte 0x%02x",
                       (unsigned char)*at);
    for (const char *p = line; p < at; p++)
        if (*p == '\n') {
            line = p + 1;
            n++;
        }
    r->at = r->end;
    r->code = because(r->why, USAGE, "line %d, column %zu: found %s, expected "
                      "%s", n, (size_t)(at - line) + 1, found.s, what);
    return 0;
}

/* Skip blanks and, in Python, comments and escaped newlines.  Returns the
 * character after them, or EOF. */
static int peek(struct reader *r)
{
    for (;; r->at += strcspn(r->at, "\n")) {
        r->at += strspn(r->at, r->as == AS_JSON ? " \n\t\r" : " \n\t\f");
        if (r->as == AS_JSON ||
            (*r->at != '#' && (*r->at != '\\' || r->at[1] != '\n')))
            return r->at < r->end ? (unsigned char)*r->at : EOF;
    }
}

/* Skip the next character if it is this one. */
static int took(struct reader *r, int c)
{
    if (peek(r) != c)
        return 0;
    r->at += c != EOF;
    return 1;
}

/* The digits of base 2, 8, 10 or 16, as a set for strspn(). */
static const char *digits_of(int base)
{
    return base == 16 ? "0123456789abcdefABCDEF" : &"9876543210"[10 - base];
}

/* Read a character code of at most n digits; returns how many it has. */
static int read_code(const char *s, int n, int base, uint32_t *out)
{
    n = smaller(n, (int)strspn(s, digits_of(base)));
    *out = (uint32_t)strtoul(phrase("%.*s", n, s).s, NULL, base);
    return n;
}

/* Decode what follows a backslash.  In Python, one that starts no escape stays.
 * Half of a surrogate pair is an error, and so is \N{NAME}. */
static void read_escape(struct reader *r, char **out)
{
    static const char name[] = "/\"\\bfnrt'av";
    static const char value[] = "/\"\\\b\f\n\r\t'\a\v";
    const int json = r->as == AS_JSON, is_octal = !json && *r->at >= '0' &&
                                                  *r->at <= '7';
    const char *p = memchr(name + !json, *r->at, json ? 8 : 10);
    const int n = *r->at == 'u' ? 4 : json ? 0 : *r->at == 'x' ? 2 :
                  *r->at == 'U' ? 8 : is_octal ? 3 : 0;
    uint32_t c, low;

    expect(r, (p || n || !json) && *r->at != 'N',
           "\" \\ / b f n r t or u after a backslash");
    if (n == 0) {
        if (p || *r->at != '\n')
            *(*out)++ = p ? value[p - name] : '\\';
        r->at += p || *r->at == '\n';
        return;
    }
    const int n_read = read_code(r->at + !is_octal, n, is_octal ? 8 : 16, &c);
    if (!expect(r, is_octal || n_read == n, "hexadecimal digits after a "
                "backslash"))
        return;
    r->at += !is_octal + n_read;
    if (c >> 10 == 0xd800 >> 10 && r->at[0] == '\\' && r->at[1] == 'u' &&
        read_code(r->at + 2, 4, 16, &low) == 4 && low >> 10 == 0xdc00 >> 10) {
        c = 0x10000 + ((c & 0x3ff) << 10 | (low & 0x3ff));
        r->at += 6;
    }
    if (expect(r, c <= 0x10ffff && c >> 11 != 0xd800 >> 11,
               "surrogates in pairs after a backslash"))
        *out += utf8_put(*out, c);
}

/* The length of the prefix of a Python string, such as r, u or rf, before its
 * quote; -1 if no string starts here, or one of bytes, which JSON lacks. */
static int prefix_length(const char *s)
{
    const int n = (int)strspn(s, "rRuUfF");

    return (s[n] != '"' && s[n] != '\'') || n > 2 ||
           (n == 2 && (s[0] | 32) + (s[1] | 32) != 'r' + 'f') ? -1 : n;
}

static int in_word(char c)
{
    return isalnum((unsigned char)c) || c == '_' || (c & 0x80);
}

static int word_length(const char *s)
{
    int n = 0;

    while (in_word(s[n]))
        n++;
    return n;
}

/* Models forget the backslash before a quote within a string.  Is the quote at
 * s such a quote?  A string that has ended is followed by a word only if that
 * is an operator or the prefix of another string. */
static int is_inner(const char *s)
{
    const char *const word = s + 1 + strspn(s + 1, " \t\n\f");
    const int n = word_length(word);

    return n > 0 && find_word("if else and or in is not for async", ' ',
                              phrase("%.*s", n, word).s) < 0 &&
           !(n <= 2 && (int)strspn(word, "rRbBuUfFtT") == n &&
             (word[n] == '"' || word[n] == '\''));
}

/* Read a string in one or three quotes.  Inner quotes have to be in pairs,
 * except apostrophes.  A raw backslash protects the character after it. */
static void read_quoted(struct reader *r, char **out)
{
    const int json = r->as == AS_JSON, bad = r->as == AS_BAD_PYTHON;
    const int n = json ? 0 : prefix_length(r->at);
    const int is_raw = (int)strcspn(r->at, "rR\"'") < n;
    const int is_format = (int)strcspn(r->at, "fF\"'") < n;
    const char quote = r->at[n], three[] = { quote, quote, quote, '\0' };
    const int is_long = !json && strncmp(r->at + n, three, 3) == 0;
    const int n_quotes = is_long ? 3 : 1, takes_lines = is_long || bad;
    int inner = 0;
    uint32_t u;

    r->at += n + n_quotes;
    while (r->code == DONE && (strncmp(r->at, three, (size_t)n_quotes) != 0 ||
                               (bad && !is_long && is_inner(r->at)))) {
        const char c = *r->at;
        if (!expect(r, json ? r->at < r->end : c && (c != '\n' || takes_lines),
                    "a quote after the string") ||
            !expect(r, !json || (unsigned char)c >= ' ',
                    "no control character in a string, but an escape") ||
            !expect(r, !is_format || (c != '{' && c != '}') || *++r->at == c,
                    "a string without placeholders"))
            return;
        inner += c == quote && !is_long &&
                 !(c == '\'' && in_word(r->at[-1]) && in_word(r->at[1]));
        if (c == '\\' && !is_raw) {
            r->at++;
            read_escape(r, out);
            continue;
        }
        for (int k = c == '\\' && r->at[1] ? 2 : 1; k > 0; k--) {
            const int size = utf8_get(r->at, r->end, &u);
            expect(r, size > 0, "UTF-8");
            memmove(*out, r->at, (size_t)size);
            *out += size;
            r->at += size;
        }
    }
    if (expect(r, inner % 2 == 0, "quotes in pairs"))
        r->at += n_quotes;
}

/* Append the first n characters at s and the digits after them, without the
 * underscores that Python allows between digits.  Returns their end. */
static char *read_digits(struct text *t, char *s, int n, int base)
{
    add(t, s, (size_t)n);
    s += n;
    for (size_t k; (k = strspn(s, digits_of(base))) > 0; s++) {
        add(t, s, k);
        s += k;
        if (*s != '_' || strspn(s + 1, digits_of(base)) == 0)
            break;
    }
    return s;
}

/* As Python prints floats: the fewest digits that give the same number. */
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

/* Read a number, and store it as Python would print it.  Like Python's, floats
 * are finite and integers have at most 4300 digits; in bases other than 10 they
 * have 64 bits.  In Python, parentheses may follow the sign. */
static void read_number(struct reader *r, struct json *v)
{
    const int minus = *r->at == '-', is_signed = minus || *r->at == '+';
    const int json = r->as == AS_JSON;
    struct text t = { 0 };
    int open = 0;

    r->at += is_signed;
    while (is_signed && !json && took(r, '('))
        open++;
    const int kind = *r->at == '0' ? r->at[1] | 32 : 0;
    const int base = kind == 'x' ? 16 : kind == 'o' ? 8 : kind == 'b' ? 2 : 10;
    char *s = r->at + (base == 10 ? 0 : r->at[2] == '_' ? 3 : 2);
    s = read_digits(&t, s, 0, base);
    if (base == 10 && *s == '.')
        s = read_digits(&t, s, 1, base);
    const int has_digits = t.n > (*t.s == '.');
    if (base == 10 && (*s | 32) == 'e' && has_digits) {
        const int n = s[1] == '+' || s[1] == '-' ? 2 : 1;
        s = isdigit((unsigned char)s[n]) ? read_digits(&t, s, n, base) : s;
    }
    const char *const dot = strchr(t.s, '.');
    expect(r, has_digits && (!json ||
           (base == 10 && t.n == (size_t)(s - r->at) && dot != t.s &&
            (*t.s != '0' || !isdigit((unsigned char)t.s[1])) &&
            (!dot || isdigit((unsigned char)dot[1])))),
           "a number: -, digits without leading zeros, .digits, exponent");
    errno = 0;
    if (base == 10 && strpbrk(t.s, ".eE")) {
        const double x = strtod(t.s, NULL);
        t.n = 0;
        if (expect(r, isfinite(x), "a number below 1.8e308"))
            add_float(&t, x);
    } else if (base != 10 || strspn(t.s, "0") == t.n) {
        const unsigned long long x = strtoull(t.s, NULL, base);
        t.n = 0;
        add_format(&t, "%llu", x);
        expect(r, errno == 0, "at most 64 bits");
    } else
        expect(r, t.n <= 4300 && *t.s != '0', "at most 4300 digits without "
               "leading zeros");
    r->at = r->code == DONE ? s : r->end;
    while (open-- > 0)
        expect(r, took(r, ')'), "')'");
    char *const number = pool_get(r->pool, t.n + 2);
    v->type = JSON_NUMBER;
    v->n = (size_t)snprintf(number, t.n + 2, "%s%s", minus &&
                            strcmp(t.s, "0") != 0 ? "-" : "", t.s);
    v->s = number;
    free(t.s);
}

/* Read the name of a tool or an argument: words joined by . or -.  Empty if
 * there is none. */
static struct piece read_name(struct reader *r)
{
    struct piece name = { r->at, 0 };
    int n = isdigit((unsigned char)*r->at) ? 0 : word_length(r->at);

    for (r->at += n; n > 0 && (*r->at == '.' || *r->at == '-'); r->at += n)
        n = word_length(++r->at);
    name.n = n > 0 ? (size_t)(r->at - name.s) : 0;
    return name;
}

static void read_value(struct reader *r, struct json *v);

/* Read the members of *in, and the bracket that closes it:
 *
 *     close   in->type
 *       ]     JSON_ARRAY      value, ...
 *       )     JSON_ARRAY      value, ...         a tuple or parentheses
 *       }     JSON_OBJECT     "key": value, ...
 *                             value, ...         a set: becomes a JSON_ARRAY
 *       )     JSON_OBJECT     name=value, ...    the arguments of a call
 *
 * Python allows a comma before the bracket; in->n counts commas.  As in Python,
 * the last of several equal keys sets the value, and the first the place.  Keys
 * of a dict must be strings or whole numbers, and elements of a set have one
 * type: others may be equal in Python, but not in JSON. */
static void read_members(struct reader *r, struct json *in, int close)
{
    const int json = r->as == AS_JSON, has_keys = in->type == JSON_OBJECT;
    struct json **at = &in->first;
    char what[] = "',' or ' '";

    what[8] = (char)close;
    r->depth++;
    while (r->code == DONE && !took(r, close)) {
        struct json *v, *same = NULL;
        if (in->first) {
            expect(r, took(r, ','), what);
            in->n++;
            if (!json && took(r, close))
                break;
        }
        expect(r, r->pool->total - r->had <= MAX_POOL, "no more values: "
               "these take 268435456 bytes");
        expect(r, !has_keys || in->n_members < MAX_MEMBERS,
               "no more than 1024 members");
        v = pool_get(r->pool, sizeof *v);
        struct piece key = { NULL, 0 };
        if (has_keys && close == ')') {
            key = read_name(r);
            expect(r, key.n > 0 && took(r, '='), "a name, '=' and a value");
        } else if (has_keys) {
            expect(r, peek(r) == '"' || !json, "a key in double quotes");
            read_value(r, v);
            expect(r, v->type == JSON_STRING || (v->type == JSON_NUMBER &&
                   !strpbrk(v->s, ".e")), "a string or a whole number before "
                   "it");
            key = (struct piece){ v->s, v->n };
            if (!json && !in->first && peek(r) != ':')
                in->type = JSON_ARRAY;
            if (in->type == JSON_OBJECT)
                expect(r, took(r, ':'), "':' and a value");
            else
                expect(r, !in->first || v->type == in->first->type,
                       "elements of one type");
        }
        if (has_keys && r->code == DONE)
            same = find_key(in, key.s, key.n);
        expect(r, !same || close != ')', "each argument once");
        v->key = key.s;
        v->n_key = key.n;
        if (!same) {
            *at = v;
            at = &v->next;
            in->n_members++;
        }
        if (!has_keys || in->type == JSON_OBJECT) {
            v = same ? same : v;
            memset(v, 0, offsetof(struct json, key));
            read_value(r, v);
        }
    }
    r->depth--;
}

/* In Python, adjacent strings are joined, unless backslashes may be missing.
 * Words are in the order of the JSON types; set() is an empty set. */
static void read_value(struct reader *r, struct json *v)
{
    const int c = peek(r), python = r->as != AS_JSON;

    if (c == '{' || c == '[' || (python && c == '(')) {
        r->at += expect(r, r->depth < MAX_DEPTH, "no more than 64 levels");
        v->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        read_members(r, v, c == '{' ? '}' : c == '[' ? ']' : ')');
        if (c == '(' && v->n_members == 1 && v->n == 0)
            memcpy(v, v->first, offsetof(struct json, key));   /* (value)    */
    } else if (c == '"' || (python && prefix_length(r->at) >= 0)) {
        char *out = r->at;
        v->type = JSON_STRING;
        v->s = out;
        do
            read_quoted(r, &out);
        while (r->as == AS_PYTHON && peek(r) != EOF &&
               prefix_length(r->at) >= 0);
        v->n = (size_t)(out - v->s);
        *out = '\0';
    } else if (c == '-' || isdigit(c) || (python && (c == '+' || c == '.')))
        read_number(r, v);
    else {
        const int n = word_length(r->at);
        const int i = find_word("null|false|true|None|False|True|set", '|',
                                phrase("%.*s", n, r->at).s);
        if (!expect(r, i >= 0 && (i < 3 || python), "a value"))
            return;
        r->at += n;
        v->type = i < 6 ? i % 3 : JSON_ARRAY;
        expect(r, i < 6 || (took(r, '(') && took(r, ')')), "a value");
    }
}

/* Parse a whole text; DONE or USAGE.  An outermost object is no level of depth:
 * its members may be nested as deeply as texts of their own. */
static int json_parse(struct pool *pool, const char *text, size_t n,
                      struct json **out, struct why *why)
{
    struct reader r = { .pool = pool, .had = pool->total, .text = text, .n = n,
                        .why = why };
    struct json *v;

    *out = NULL;
    if (n > MAX_JSON)
        return because(why, USAGE, "JSON of %zu bytes, expected at most %d", n,
                       MAX_JSON);
    start_reading(&r);
    v = pool_get(pool, sizeof *v);
    expect(&r, !begins(r.at, r.end, "\xef\xbb\xbf"), "no byte order mark");
    r.depth = peek(&r) == '{' ? -1 : 0;
    read_value(&r, v);
    if (expect(&r, took(&r, EOF), "the end"))
        *out = v;
    return r.code;
}

/* ---- writing, exactly as Python's json.dumps(x, ensure_ascii=False) */

/* Is it whitespace for Python's str.strip()? */
static int is_blank(uint32_t c)
{
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 ||
           c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
           c == 0x3000;
}

/* A string as in JSON, or as Python's repr() writes it, except for some of its
 * non-printable characters.  Quote 0 is the one that repr() chooses.  A byte
 * that is not UTF-8 becomes a replacement character. */
static void add_in_quotes(struct text *t, const char *s, size_t n, char quote)
{
    const char *const end = s + n;
    const int python = !quote;
    uint32_t c;

    if (python)
        quote = memchr(s, '\'', n) && !memchr(s, '"', n) ? '"' : '\'';
    const char value[] = { quote, '\\', '\n', '\r', '\t', '\b', '\f' };
    const char name[] = { quote, '\\', 'n', 'r', 't', 'b', 'f' };
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

static void add_tree(struct text *t, const struct json *v, int python)
{
    static const char *const word[][2] = {
        [JSON_NULL] = { "null", "None" }, [JSON_FALSE] = { "false", "False" },
        [JSON_TRUE] = { "true", "True" }, [JSON_ARRAY] = { "[", "[" },
        [JSON_OBJECT] = { "{", "{" }
    };

    if (v->type == JSON_STRING)
        add_in_quotes(t, v->s, v->n, python ? 0 : '"');
    else
        add_string(t, v->type == JSON_NUMBER ? v->s : word[v->type][python]);
    for (const struct json *m = v->first; m; m = m->next) {
        if (v->type == JSON_OBJECT) {
            add_in_quotes(t, m->key, m->n_key, python ? 0 : '"');
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

/* ---- writing objects and arrays, member by member */

/* Append members by a format, in which keys are bare words:
 *
 *     add_members(to, "name: %s, sizes: {width: %d, bytes: %llu}", ...);
 *
 * A bracket may stay open for later calls, and missing commas are inserted.  %s
 * is a string and %.*s a number of bytes, or null for NULL; %d, %zu, %llu, %g
 * and %f are numbers (null if not finite), %016llx is a hash, and %i is true or
 * false. */
#ifdef __clang__                          /* gcc would warn of each NULL     */
__attribute__((format(printf, 2, 3)))
#endif
static void add_members(struct text *to, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    for (const char *s = format; *s; s++) {
        const size_t n = strspn(s, "abcdefghijklmnopqrstuvwxyz_0123456789");
        if ((strchr("{[%", *s) || n > 0) && to->n > 0 &&
            !strchr("{[ ", to->s[to->n - 1]))
            add_string(to, ", ");
        if (n > 0) {
            add_in_quotes(to, s, n, '"');
            s += n - 1;
        } else if (*s == ':')
            add_string(to, ": ");
        else if (*s != '%')
            add(to, s, !strchr(", ", *s));
        else {
            const char *how = s + 1;
            s = how + strcspn(how, "sdiugfx");
            if (*s == 's') {
                const int n_bytes = *how == '.' ? va_arg(args, int) : -1;
                const char *text = va_arg(args, const char *);
                if (text)
                    add_in_quotes(to, text, n_bytes < 0 ? strlen(text) :
                                  (size_t)n_bytes, '"');
                else
                    add_string(to, "null");
            } else if (*s == 'd')
                add_format(to, "%d", va_arg(args, int));
            else if (*s == 'i')
                add_string(to, va_arg(args, int) ? "true" : "false");
            else if (*s == 'g' || *s == 'f') {
                const double x = va_arg(args, double);
                add_format(to, !isfinite(x) ? "null" : *s == 'f' ? "%.6f" :
                           x == floor(x) && fabs(x) < 1e15 ? "%.0f" : "%.9g",
                           x);
            } else if (*how == 'z')
                add_format(to, "%zu", va_arg(args, size_t));
            else
                add_format(to, *s == 'x' ? "\"%016llx\"" : "%llu",
                           va_arg(args, unsigned long long));
        }
    }
    va_end(args);
}

/* -------------------------------------------------------- 15. Chat templates
 *
 * The models of the family were trained on six formats of conversations.  Their
 * files contain these as Jinja programs; here they are one function and a table
 * of the differences.  The result is text, and a list of the control tokens
 * that the template put into it: what a user writes is never more than text. */

/* The word for it in --template. */
static const char *template_name(int template)
{
    static struct phrase name[TEMPLATE_NONE + 1];

    name[template] = word_of(TEMPLATES, template);
    return name[template].s;
}

static const struct dialect {
    int marked;                           /* tokens around tools and results */
    int dated;                            /* the date before the tools       */
    enum { ALL, SINCE_ANSWER, SINCE_QUESTION } thoughts;  /* that are kept   */
    enum { NO_CALLS, CALLS_FIRST, CALLS_LAST } calls;     /* in a message    */
    const char *quote;                    /* of arguments; NULL: as in JSON  */
    int always_thinks;                    /* and escapes arguments           */
} dialects[] = {
    [TEMPLATE_LFM2]     = { 1, 0, ALL, NO_CALLS, NULL, 0 },
    [TEMPLATE_INSTRUCT] = { 0, 0, SINCE_ANSWER, NO_CALLS, NULL, 0 },
    [TEMPLATE_NEW]      = { 0, 1, SINCE_ANSWER, CALLS_LAST, NULL, 0 },
    [TEMPLATE_VL]       = { 0, 1, SINCE_ANSWER, CALLS_FIRST, "\"", 0 },
    [TEMPLATE_8B]       = { 0, 0, SINCE_QUESTION, CALLS_LAST, "'", 0 },
    [TEMPLATE_26B]      = { 0, 0, SINCE_QUESTION, CALLS_LAST, "'", 1 }
};

/* Does a prompt with tools contain the date? */
static int template_is_dated(int template)
{
    return template != TEMPLATE_NONE && dialects[template].dated;
}

/* The control tokens.  Those IN_ANSWERS also count in the content of answers,
 * because clients send back what the model wrote. */
static const char *const control[] = {
    CALL_START, CALL_END, THINK, THINK_END, BOS, TURN_START, TURN_END,
    "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_response_start|>",
    "<|tool_response_end|>"
};

enum { IN_ANSWERS = 4, N_CONTROL = sizeof control / sizeof *control };

/* A conversation is checked while it is written; after a fault the output is
 * useless. */
struct rendering {
    const struct conversation *conv;
    const struct dialect *as;
    struct rendered *out;
    struct why *why;
    int code;
    struct phrase where;                  /* the current message or tool     */
    struct text content;                  /* of the current message          */
    struct pool pool;
};

static void rendered_free(struct rendered *r)
{
    free(r->text.s);
    free(r->mark);
    *r = (struct rendered){ .n_marks = 0 };
}

static int begins(const char *s, const char *end, const char *word)
{
    const size_t n = strlen(word);

    return (size_t)(end - s) >= n && memcmp(s, word, n) == 0;
}

/* The first `word` between s and `end`, or NULL. */
static const char *find(const char *s, const char *end, const char *word)
{
    return memmem(s, (size_t)(end - s), word, strlen(word));
}

/* ---- checks */

static const char *type_name(const struct json *v)
{
    return v ? json_names[v->type] : "missing";
}

/* Report what is wrong at r->where; only the first fault counts. */
static void set_fault(struct rendering *r, const char *what)
{
    if (r->code == DONE)
        r->code = because(r->why, USAGE, "%s%s", r->where.s, what);
}

#define fault(r, ...) set_fault(r, phrase(__VA_ARGS__).s)

/* Does v, called `what`, have this type?  A string must not contain NUL. */
static int check(struct rendering *r, const struct json *v, int type,
                 const char *what)
{
    if (!json_is(v, type))
        fault(r, "%s is %s, expected %s", what, type_name(v), json_names[type]);
    else if (type == JSON_STRING && !json_text(v))
        fault(r, "%s has a NUL character after %zu bytes, expected text", what,
              strlen(v->s));
    return r->code == DONE;
}

/* The function in a tool or call: the member "function", or all of it. */
static const struct json *function_of(const struct json *call)
{
    const struct json *function = json_get(call, "function");

    return json_is(function, JSON_OBJECT) ? function : call;
}

/* Arguments as an object; OpenAI's clients send it as a string of JSON.  NULL
 * if v is neither. */
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

/* A known role, or NULL.  "developer" is a newer name of "system". */
static const char *role_of(const struct json *message)
{
    const char *role = json_text(json_get(message, "role"));

    if (role && strcmp(role, "developer") == 0)
        return "system";
    return role && find_word("system|user|assistant|tool", '|', role) >= 0 ?
           role : NULL;
}

static int has_role(const struct json *message, const char *role)
{
    const char *is = role_of(message);

    return is && strcmp(is, role) == 0;
}

/* ---- the parts of a conversation */

/* Append text in which the first n control tokens are recognised. */
static void put_marked(struct rendering *r, const char *s, const char *end,
                       int n)
{
    struct rendered *to = r->out;

    for (int size; s < end; s += size) {
        int i = *s == '<' ? 0 : n;
        while (i < n && !begins(s, end, control[i]))
            i++;
        size = i < n ? (int)strlen(control[i]) : 1;
        if (i < n) {
            to->mark = resize(to->mark, (size_t)(to->n_marks + 1) *
                                        sizeof *to->mark);
            to->mark[to->n_marks++] = (struct mark){ to->text.n, control[i] };
        }
        add(&to->text, s, (size_t)size);
    }
}

/* Append what the template itself writes.  The value of a %s is only text. */
static void put_down(struct rendering *r, const char *s, ...)
{
    const char *end;
    va_list args;

    va_start(args, s);
    for (; (end = strstr(s, "%s")); s = end + 2) {
        put_marked(r, s, end, N_CONTROL);
        add_string(&r->out->text, va_arg(args, const char *));
    }
    put_marked(r, s, s + strlen(s), N_CONTROL);
    va_end(args);
}

static void put_tools(struct rendering *r)
{
    const struct json *tool = r->conv->tools->first;

    if (r->as->dated)
        put_down(r, "Today's date: %s\n\n", r->conv->date);
    put_down(r, r->as->marked ? "List of tools: <|tool_list_start|>[" :
                "List of tools: [");
    for (int i = 0; tool; tool = tool->next, i++) {
        const int is_text = tool->type == JSON_STRING;
        const char *name = json_text(json_get(function_of(tool), "name"));
        r->where = phrase("tools[%d]", i);
        if (!is_text && check(r, tool, JSON_OBJECT, "") && (!name || !name[0]))
            fault(r, " has no name, expected a function with one");
        put_down(r, i > 0 ? ", " : "");
        if (is_text && !r->as->dated)
            add(&r->out->text, tool->s, tool->n);
        else
            add_json(&r->out->text, tool);
    }
    put_down(r, r->as->marked ? "]<|tool_list_end|>" : "]");
}

/* Arguments are written as in Python, except dicts, which are JSON; strings and
 * lists depend on the template. */
static void put_call(struct rendering *r, const struct json *call, int k)
{
    static const char value[] = "\\'\n\r", name_of[] = "\\'nr";
    const struct json *function = function_of(call);
    const struct json *given_args = json_get(function, "arguments");
    const struct json *args = arguments_of(&r->pool, given_args);
    const char *name = json_text(json_get(function, "name"));
    const char *const quote = r->as->quote;
    struct text *to = &r->out->text;

    if (!name)
        fault(r, ".tool_calls[%d] has no function with a name", k);
    if (!args)
        fault(r, ".tool_calls[%d].function.arguments is %s, expected an object "
              "or a string with one", k, type_name(given_args));
    if (r->code != DONE)
        return;
    put_down(r, k > 0 ? ", %s(" : "%s(", name);
    for (const struct json *v = args->first; v; v = v->next) {
        add(to, v->key, v->n_key);
        put_down(r, "=");
        if (v->type != JSON_STRING || !quote)
            add_tree(to, v, v->type != JSON_STRING && v->type != JSON_OBJECT &&
                     (v->type != JSON_ARRAY || !r->as->always_thinks));
        else {
            add_string(to, quote);
            for (size_t i = 0; i < v->n; i++) {
                const char *p = r->as->always_thinks ?
                                memchr(value, v->s[i], 4) : NULL;
                add(to, "\\", p != NULL);
                add(to, p ? name_of + (p - value) : v->s + i, 1);
            }
            add_string(to, quote);
        }
        put_down(r, v->next ? ", " : "");
    }
    put_down(r, ")");
}

/* Calls are checked even if the template does not write them. */
static void put_calls(struct rendering *r, const struct json *calls)
{
    const struct json *call = calls->first;
    const size_t n = r->out->text.n;
    const int n_marks = r->out->n_marks;

    put_down(r, CALL_START "[");
    for (int k = 0; call; call = call->next, k++)
        put_call(r, call, k);
    put_down(r, "]" CALL_END);
    if (r->as->calls == NO_CALLS) {
        r->out->text.n = n;
        r->out->n_marks = n_marks;
        r->out->lost_calls |= calls->first != NULL;
    }
}

/* The content of a message; several parts are joined. */
static const char *content_of(struct rendering *r, const struct json *message)
{
    const struct json *content = member(message, "content");
    const int is_list = json_is(content, JSON_ARRAY);
    const struct json *part = is_list ? content->first : NULL;

    r->content.n = 0;
    add_string(&r->content, "");
    if (content && !is_list && check(r, content, JSON_STRING, ".content"))
        add(&r->content, content->s, content->n);
    for (int k = 0; part; part = part->next, k++) {
        const struct json *text = json_get(part, "text");
        const char *type = json_text(json_get(part, "type"));
        if (!type || strcmp(type, "text") != 0)
            fault(r, ".content[%d] is not of type \"text\", the only one that "
                  "is supported", k);
        else if (check(r, text, JSON_STRING, phrase(".content[%d].text", k).s))
            add(&r->content, text->s, text->n);
    }
    return r->content.s;
}

/* As Python's str.strip(). */
static struct piece strip(const char *s, const char *end)
{
    struct piece out = { s, 0 };
    uint32_t c;

    for (int n; s < end; s += n) {
        n = utf8_get(s, end, &c);
        n += n == 0;
        if (is_blank(c))
            continue;
        out.s = out.n ? out.s : s;
        out.n = (size_t)(s + n - out.s);
    }
    return out;
}

/* A `recent` answer keeps its thoughts; others lose all up to the last
 * </think>.  Some templates write an empty list of calls, too. */
static void put_assistant(struct rendering *r, const struct json *m, int recent)
{
    static const char *const keys[] = { ".thinking", ".reasoning",
                                        ".reasoning_content" };
    const struct json *thinking = NULL, *calls = member(m, "tool_calls");
    const int writes_none = r->as->quote && !r->as->always_thinks;
    const char *s = content_of(r, m), *const end = s + r->content.n;
    struct piece text = { s, r->content.n };

    for (int i = 0; i < 3 && !thinking; i++) {
        const struct json *v = member(m, keys[i] + 1);
        if (v && check(r, v, JSON_STRING, keys[i]) &&
            (v->n > 0 || !r->as->always_thinks))
            thinking = v;
    }
    while (!recent && (s = find(s, end, THINK_END))) {
        s += strlen(THINK_END);
        text = strip(s, end);
    }
    if (!calls && !thinking && !member(m, "content"))
        fault(r, " has no content, expected a string or tool_calls");
    if (calls && (!check(r, calls, JSON_ARRAY, ".tool_calls") ||
                  (!calls->first && !writes_none)))
        calls = NULL;
    if (thinking && r->as->calls != NO_CALLS && recent)
        put_down(r, THINK "%s" THINK_END, thinking->s);
    if (calls && r->as->calls != CALLS_LAST)
        put_calls(r, calls);
    put_marked(r, text.s, text.s + text.n, IN_ANSWERS);
    if (calls && r->as->calls == CALLS_LAST)
        put_calls(r, calls);
}

/* A system message at the beginning was written before.  The VL template omits
 * the end of a message without content. */
static void put_message(struct rendering *r, const struct json *m, int recent)
{
    const char *const role = role_of(m);
    const int answers = has_role(m, "assistant");
    const struct json *is = json_get(m, "role");

    if (!check(r, m, JSON_OBJECT, ""))
        return;
    if (!role)
        fault(r, ".role is %s, expected \"system\", \"user\", \"assistant\" or "
              "\"tool\"", json_is(is, JSON_STRING) ? "another string" :
              type_name(is));
    else if (r->conv->continue_last && !m->next && !answers)
        fault(r, " is of role %s, expected \"assistant\" to continue it", role);
    else if (!member(m, "content") && !answers)
        check(r, json_get(m, "content"), JSON_STRING, ".content");
    if (r->code != DONE || (m == r->conv->messages->first &&
                            has_role(m, "system")))
        return;
    put_down(r, TURN_START "%s\n", role);
    if (answers)
        put_assistant(r, m, recent);
    else
        put_down(r, r->as->marked && has_role(m, "tool") ?
                    "<|tool_response_start|>%s<|tool_response_end|>" : "%s",
                 content_of(r, m));
    if ((m->next || !r->conv->continue_last) &&
        (r->as->calls != CALLS_FIRST || json_get(m, "content")))
        put_down(r, TURN_END "\n");
}

/* `recent` is the first message that keeps its thoughts: the last answer, or
 * the last question, depending on the template. */
static void put_conversation(struct rendering *r)
{
    const struct json *const first = r->conv->messages->first;
    const int tools = r->conv->tools && r->conv->tools->first,
              question = r->as->thoughts == SINCE_QUESTION;
    const struct json *recent = question ? first : NULL;
    const char *text = "";
    int is_recent = r->as->thoughts == ALL || r->conv->keep_thinking, i = 0;

    put_down(r, BOS);
    if (has_role(first, "system")) {
        r->where = phrase("messages[0]");
        text = content_of(r, first);
    }
    if (text[0] || tools) {
        put_down(r, TURN_START "system\n%s%s", text, !text[0] || !tools ? "" :
                 r->as->dated ? "\n\n" : "\n");
        if (tools)
            put_tools(r);
        put_down(r, TURN_END "\n");
    }
    for (const struct json *m = first; m; m = m->next)
        if (has_role(m, question ? "user" : "assistant"))
            recent = m;
    for (const struct json *m = first; m; m = m->next) {
        is_recent |= m == recent;
        r->where = phrase("messages[%d]", i++);
        put_message(r, m, is_recent);
    }
    if (!r->conv->generate || r->conv->continue_last)
        return;
    put_down(r, TURN_START "assistant\n");
    if (r->conv->open_thought || r->as->always_thinks)
        put_down(r, THINK);
}

/* Write a conversation as the template does; DONE or USAGE.  The caller frees
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
        fault(&r, "messages is %s, expected an array of messages",
              json_is(m, JSON_ARRAY) ? "empty" : type_name(m));
    else if (!tools || tools->type == JSON_NULL ||
             check(&r, tools, JSON_ARRAY, "tools"))
        put_conversation(&r);
    free(r.content.s);
    pool_free(&r.pool);
    return r.code;
}

/* ---- from text to tokens */

/* Append the tokens of a text; to->id[] has room for them. */
static void encode(const lfm2_tokenizer *words, const char *s, size_t n,
                   int flags, struct ids *to)
{
    const int more = lfm2_encode(words, s, n, flags, to->id + to->n,
                                 (int)n + 1);

    if (more < 0)
        exit(say(NO_MEMORY, "no memory for %zu bytes of text", n));
    to->n += more;
}

/* The text between two marks is encoded as one piece.  A mark that has no token
 * is part of the text, except BOS, which is dropped.  With `special`, control
 * tokens are recognised in the text, too. */
static int encode_rendered(const lfm2_tokenizer *words,
                           const struct rendered *r, int special,
                           struct ids *out, struct why *why)
{
    const int flags = special ? LFM2_ENCODE_SPECIAL : 0;
    size_t at = 0;

    if (lfm2_token_id(words, TURN_START) < 0 ||
        lfm2_token_id(words, TURN_END) < 0)
        return because(why, BAD_MODEL, "the chat format needs the tokens "
                       TURN_START " and " TURN_END ", which the vocabulary "
                       "lacks");
    *out = (struct ids){ zeroed(r->text.n + 1, sizeof *out->id), 0 };
    for (const struct mark *m = r->mark; m < r->mark + r->n_marks; m++) {
        const int is_bos = strcmp(m->token, BOS) == 0;
        const int32_t id = is_bos ? lfm2_bos(words) :
                           lfm2_token_id(words, m->token);
        if (id < 0 && !is_bos)
            continue;
        encode(words, r->text.s + at, m->from - at, flags, out);
        if (id >= 0)
            out->id[out->n++] = id;
        at = m->from + strlen(m->token);
    }
    encode(words, r->text.s + at, r->text.n - at, flags, out);
    return DONE;
}

/* ---- the template of a model */

/* The date in local time, for templates that state it. */
static void today(char date[11])
{
    const time_t now = time(NULL);
    struct tm tm;

    if (!localtime_r(&now, &tm) || strftime(date, 11, "%Y-%m-%d", &tm) == 0)
        memcpy(date, "1970-01-01", 11);
}

/* The same for LF and CR LF, and for any blanks at the end. */
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

/* BY_HASH: the template in the file is a published one.  BY_WORDS: it is not,
 * but has a word that only one of those has.  BY_MODEL: neither. */
struct found_template {
    int template;
    enum { NO_TEMPLATE, BY_HASH, BY_WORDS, BY_MODEL } how;
    const char *word;                     /* NULL: not BY_WORDS              */
    uint64_t hash;
};

/* `words` may be NULL.  Named templates are ignored: they are not for chats. */
static struct found_template find_template(const lfm2_model *model,
                                           const lfm2_tokenizer *words)
{
    /* Published templates; an edited one is known by the first word in it. */
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
    struct found_template f = { TEMPLATE_NONE, NO_TEMPLATE, NULL, 0 };
    const int n_vocab = words ? lfm2_n_vocab(words) :
                        lfm2_model_config(model)->n_vocab;
    size_t n = 0;
    const char *s = lfm2_model_string(model, "tokenizer.chat_template", &n);

    if (!s)
        return f;
    f.hash = template_hash(s, n);
    for (f.how = BY_HASH; f.how <= BY_WORDS; f.how++)
        for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
            f.template = known[i].template;
            f.word = f.how == BY_WORDS ? known[i].word : NULL;
            if (f.word ? find(s, s + n, f.word) != NULL :
                known[i].hash == f.hash)
                return f;
        }
    f.word = NULL;
    s = lfm2_model_string(model, "general.name", &n);
    n = s ? n : 0;
    s = s ? s : "";
    f.template = n_vocab > 100000 ?
                 find(s, s + n, "2.6B") ? TEMPLATE_26B : TEMPLATE_8B :
                 !find(s, s + n, "2.5") ? TEMPLATE_LFM2 :
                 find(s, s + n, "VL") ? TEMPLATE_VL : TEMPLATE_INSTRUCT;
    return f;
}

/* The template of a model, and a sentence about how it was chosen.  *known is 0
 * if the file has an unknown one. */
static int choose_template(const lfm2_model *model, const lfm2_tokenizer *words,
                           int *known, struct why *evidence)
{
    static const char *const how[] = {
        [BY_HASH] = "the one in the file",
        [BY_WORDS] = "the one in the file is unknown, but looks like this one",
        [BY_MODEL] = "chosen by the model's name and vocabulary, because the "
                     "one in the file is unknown"
    };
    const struct found_template f = find_template(model, words);
    struct phrase named = { "" };
    const char *key;
    char value[64];

    *known = f.how <= BY_HASH;
    if (f.how != NO_TEMPLATE)
        return because(evidence, f.template, "chat template %s: %s (hash "
                       "%016llx)", template_name(f.template), how[f.how],
                       (unsigned long long)f.hash);
    for (int i = 0; !named.s[0] && (key = lfm2_model_key(model, i, value,
                                                         sizeof value)); i++)
        if (begins(key, key + strlen(key), "tokenizer.chat_template."))
            named = phrase(" except %s, which serves another purpose", key);
    return because(evidence, f.template, "the file has no chat template%s, so "
                   "the prompt is continued as plain text", named.s);
}

/* ------------------------------------------------------------ 16. Tool calls
 *
 * To call tools, a model writes Python between <|tool_call_start|> and
 * <|tool_call_end|>: [weather(city="Rome", days=2), time()].  Some models write
 * JSON there: {"name": "time", "arguments": {}}.  Arguments are what Python's
 * ast.literal_eval() accepts, or null, true and false.  A call with a value
 * that JSON does not have (bytes, complex numbers) or that has to be computed
 * is left as text.
 *
 * Some syntax errors are accepted because their meaning is clear: newlines and
 * unescaped quotes in strings, names like get-time, a newline in place of a
 * comma between calls, a missing bracket at the very end. */

static void free_calls(struct calls *calls)
{
    free(calls->call);
    pool_free(&calls->pool);
    *calls = (struct calls){ NULL, 0 };
}

/* One call, in either notation.  A positional argument must be the only one,
 * and a dict: its items are the arguments. */
static void read_call(struct reader *r, struct calls *to)
{
    struct json *v = pool_get(r->pool, sizeof *v);
    const struct json *args = v, *named;
    struct text t = { 0 };
    struct piece name;

    if (peek(r) == '{') {
        read_value(r, v);
        args = function_of(v);
        named = json_get(args, "name");
        v = json_get(args, "arguments");
        args = arguments_of(r->pool, v ? v : json_get(args, "parameters"));
        if (!expect(r, json_text(named) && named->n > 0 && args, "a call "
                    "before it"))
            return;
        name = (struct piece){ named->s, named->n };
    } else {
        name = read_name(r);
        expect(r, r->as != AS_JSON && name.n > 0 && took(r, '('), "a call");
        const int is_dict = peek(r) == '{';
        v->type = is_dict ? JSON_ARRAY : JSON_OBJECT;
        read_members(r, v, ')');
        if (is_dict && v->n_members == 1)
            args = v->first;
        if (!expect(r, args->type == JSON_OBJECT, "a dict before it"))
            return;
    }
    to->call = resize(to->call, (size_t)(to->n + 1) * sizeof *to->call);
    add_json(&t, args);
    to->call[to->n++] = (struct call){
        name, { memcpy(pool_get(r->pool, t.n), t.s, t.n), t.n }
    };
    free(t.s);
}

/* Read all calls between two markers, or none if there is an error: as JSON,
 * else as Python, else as Python with unescaped quotes; in a list or not.  The
 * list may lack its last bracket, unless it was cut off.  Invalid UTF-8 becomes
 * replacement characters, and CR and CR LF become LF, as in Python. */
static int read_calls(const char *s, const char *end, int was_cut,
                      struct calls *to)
{
    const int before = to->n;
    char *text = pool_get(&to->pool, 3 * (size_t)(end - s) + 1);
    struct why why;
    struct reader r = { .pool = &to->pool, .text = text, .why = &why };
    uint32_t c;

    for (int size; s < end; s += size ? size : 1) {
        size = utf8_get(s, end, &c);
        if (c != '\r' || s + 1 == end || s[1] != '\n')
            r.n += utf8_put(text + r.n, c == '\r' ? '\n' : c);
    }
    for (r.as = AS_JSON; r.as <= AS_BAD_PYTHON; r.as++) {
        start_reading(&r);
        const int list = took(&r, '[');
        int more = 1;
        while (r.code == DONE && (!list || !took(&r, ']')) &&
               (peek(&r) != EOF || to->n == before || (list && was_cut))) {
            expect(&r, more, "',' or a newline");
            read_call(&r, to);
            const char *const from = r.at;
            more = took(&r, ',') || memchr(from, '\n', (size_t)(r.at - from));
        }
        if (expect(&r, took(&r, EOF), "the end"))
            return 1;
        to->n = before;
    }
    return 0;
}

/* Find the calls in an answer.  The text around them goes to `rest`, and so do
 * bad calls, with their markers.  Returns how many calls were bad; a call that
 * is incomplete because the answer was `cut` at its length does not count.  The
 * last call may lack its end marker.  Models sometimes write the end marker
 * twice: the second one is dropped. */
static int parse_calls(const char *s, size_t n, int cut, struct calls *out,
                       struct text *rest)
{
    const char *const end = s + n, *call = NULL;
    int bad = 0;

    *out = (struct calls){ NULL, 0 };
    add_string(rest, "");
    while (s < end || call) {
        const int starts = begins(s, end, CALL_START);
        const int ends = begins(s, end, CALL_END), was_cut = cut && !ends;
        const size_t size = starts ? strlen(CALL_START) :
                            ends ? strlen(CALL_END) : 1;
        if (call && (starts || ends || s == end)) {
            const int good = read_calls(call + strlen(CALL_START), s, was_cut,
                                        out);
            s += ends ? size : 0;
            if (!good)
                add(rest, call, (size_t)(s - call));
            bad += !good && !(was_cut && s == end);
            call = NULL;
            continue;
        }
        if (starts)
            call = s;
        else if (!call && (!ends || out->n == 0))
            add(rest, s, size);
        s += size;
    }
    return bad;
}

/* ------------------------------------------------------ 17. Tokens in and out
 *
 * --tokenize, --detokenize and --export-tokenizer need a vocabulary only. */

/* Open the vocabulary in the file of --tokenizer, or else in that of the model,
 * which is in memory already unless `model` is NULL.  Returns an LFM2_ code. */
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

/* Text without a template.  A prompt begins with BOS if the model wants one. */
static void encode_plain(const struct settings *s, const lfm2_tokenizer *words,
                         const char *text, size_t n, struct ids *out)
{
    const int bos = s->bos || (s->mode != TOKENIZE && lfm2_add_bos(words));

    *out = (struct ids){ zeroed(n + 1, sizeof *out->id), 0 };
    encode(words, text, n, (bos ? LFM2_ENCODE_BOS : 0) |
           (s->special ? LFM2_ENCODE_SPECIAL : 0), out);
}

/* A line of ids for the whole text, or for each NUL-terminated record. */
static void tokenize(const struct settings *s, const lfm2_tokenizer *words,
                     const struct text *t)
{
    for (size_t at = 0, n; at < t->n || (at == 0 && !s->null); at += n + 1) {
        struct ids ids;

        n = s->null ? strlen(t->s + at) : t->n;
        encode_plain(s, words, t->s + at, n, &ids);
        for (int i = 0; i < ids.n; i++)
            printf("%s%ld", i ? " " : "", (long)ids.id[i]);
        free(ids.id);
        putchar('\n');
    }
}

/* The text of each line of ids, with newlines only between them: the inverse of
 * tokenize().  With --null each text ends with NUL instead. */
static int detokenize(const struct settings *s, const lfm2_tokenizer *words,
                      const struct text *t)
{
    const char *p = t->s, *const stop = t->s + t->n;
    struct text out = { 0 };
    char *end;
    int len;

    for (int line = 1; p < stop; line++, p++) {
        for (; p += strspn(p, " \t\r"), p < stop && *p != '\n'; p = end) {
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
        }
        if (s->null || p + 1 < stop)
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
    struct text out = { 0 };
    lfm2_model *model;
    lfm2_error err;
    const void *data;
    size_t size;
    FILE *f;

    watch_file(path);
    open_file(&model, path, s->no_mmap, LFM2_LOAD_ANY, &err);
    if (model) {
        data = lfm2_model_file(model, &size);
        reserve(&out, lfm2_tokenizer_export(data, size, NULL, 0, &err));
        out.n = lfm2_tokenizer_export(data, size, out.s, out.cap, &err);
    }
    lfm2_model_close(model);
    f = out.n > 0 ? create_file(s->export_to) : NULL;
    if (f)
        fwrite(out.s, 1, out.n, f);
    free(out.s);
    return f ? finish_file(f, s->export_to, DONE) :
           out.n > 0 ? BAD_FILE : report(path, &err);
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
        tokenize(s, words, &t);
    if (code == DONE && s->mode == DETOKENIZE)
        code = detokenize(s, words, &t);
    free(t.s);
    lfm2_tokenizer_close(words);
    return code;
}

/* -------------------------------------------------------------- 18. --inspect
 *
 * What is in a file, in the terms of the model's makers; what it takes to run;
 * and what is wrong with it.  The text report is made from the JSON one. */

enum { MAX_TYPES = 32, MAX_COLUMNS = 12, ASSUMED_BANDWIDTH = 50 };

struct inspection {
    const struct settings *s;
    lfm2_model *model;
    lfm2_tokenizer *words;                /* NULL: no vocabulary             */
    int is_model;                         /* it opened without an error      */
    int code;                             /* LFM2_OK, or the fatal error     */
    lfm2_error err;
    struct text json;
    const char *last_norm;                /* its name                        */
    int tied;                             /* output matrix is the embedding  */
    double bytes, read;                   /* of weights: all; for a token    */
    struct found_template template;
};

/* ---- facts */

/* A string of the metadata, however long it is. */
static void add_file_string(struct inspection *f, const char *key,
                            const char *in_file)
{
    size_t n = 0;
    const char *s = lfm2_model_string(f->model, in_file, &n);

    add_members(&f->json, phrase("%s: %%.*s", key).s, (int)n, s);
}

/* Of a damaged file fewer keys and tensors can be read than its header says. */
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
    add_members(to, "file: {path: %s, bytes: %zu", f->s->model, n);
    if (n >= 24 && memcmp(head, "GGUF", 4) == 0)
        add_members(to, "gguf_version: %llu, n_keys: %llu, n_tensors: %llu, "
                    "keys_read: %d, tensors_read: %d",
                    (unsigned long long)get_le(head + 4, 4),
                    (unsigned long long)get_le(head + 16, 8),
                    (unsigned long long)get_le(head + 8, 8), keys, tensors);
    add_members(to, "} opens: %i", f->is_model);
    add_file_string(f, "name", "general.name");
    add_file_string(f, "architecture", "general.architecture");
}

/* In the maps: c short convolution, A attention, d dense network, e experts. */
static void add_shape(struct inspection *f)
{
    const lfm2_config *c = lfm2_model_config(f->model);
    char mixers[LFM2_MAX_LAYER + 1] = "", ffns[LFM2_MAX_LAYER + 1] = "";
    lfm2_tensor_info t;

    for (int il = 0; il < c->n_layer; il++) {
        mixers[il] = c->is_attn[il] ? 'A' : 'c';
        ffns[il] = il < c->n_layer_dense ? 'd' : 'e';
    }
    f->last_norm = "token_embd_norm.weight";
    f->tied = 1;
    for (int i = 0; lfm2_model_tensor(f->model, i, &t) == LFM2_OK; i++) {
        f->tied &= strcmp(t.name, "output.weight") != 0;
        if (strcmp(t.name, "output_norm.weight") == 0)
            f->last_norm = "output_norm.weight";
    }
    add_members(&f->json, "layer_map: %s, ffn_map: %s, last_norm: %s, tied: %i",
                mixers, ffns, f->last_norm, f->tied);
    add_members(&f->json, "sizes: {n_layer: %d, n_embd: %d, n_vocab: %d, "
                "n_ctx_train: %d, l_cache: %d, n_head: %d, n_head_kv: %d, "
                "head_dim: %d, n_ff: %d, n_layer_dense: %d, n_expert: %d, "
                "n_expert_used: %d, n_ff_expert: %d, rope_freq_base: %g, "
                "norm_rms_eps: ", c->n_layer, c->n_embd, c->n_vocab,
                c->n_ctx_train, c->l_cache, c->n_head, c->n_head_kv,
                c->head_dim, c->n_ff, c->n_layer_dense, c->n_expert,
                c->n_expert_used, c->n_ff_expert, (double)c->rope_freq_base);
    add_format(&f->json, "%g}", (double)c->norm_rms_eps);
}

/* What a tensor is for, by the first pattern that matches its name. */
static const char *purpose_of(const struct inspection *f, const char *name)
{
    const struct { const char *names, *role; } known[] = {
        { "token_embd.weight", "embedding" }, { "output.weight", "output" },
        { f->last_norm, "norms" }, { "blk.*_norm.*", "norms" },
        { "blk.*shortconv.*", "conv" }, { "blk.*attn_*", "attention" },
        { "blk.*ffn_gate_inp.*", "router" }, { "blk.*exp_probs_b.*", "router" },
        { "blk.*_exps.*", "experts" }, { "blk.*ffn_*", "dense_ffn" },
        { "", "unused" }
    };
    size_t i = 0;

    while (*known[i].names && fnmatch(known[i].names, name, 0) != 0)
        i++;
    return known[i].role;
}

/* The size of all tensors of a role, or of all that are used if it is NULL.  A
 * token reads only the experts chosen for it, and one row of the embedding if
 * that is not also the output. */
static void add_weights(struct inspection *f, const char *role)
{
    const lfm2_config *c = lfm2_model_config(f->model);
    unsigned long long params = 0, active = 0, bytes = 0, read = 0;
    int n = 0, of_type[MAX_TYPES] = { 0 };
    lfm2_tensor_info t;
    const char *type;

    for (int i = 0; lfm2_model_tensor(f->model, i, &t) == LFM2_OK; i++) {
        const char *is = purpose_of(f, t.name);
        const int shared = c->n_expert > 0 && strcmp(is, "experts") == 0;
        const uint64_t of = shared ? (uint64_t)c->n_expert : 1;
        const uint64_t used = shared ? (uint64_t)c->n_expert_used :
                              strcmp(is, "unused") != 0;
        const uint64_t size = (uint64_t)count_elements(&t);
        if (role ? strcmp(is, role) != 0 : used == 0)
            continue;
        n++;
        params += size;
        active += size / of * used;
        bytes += t.n_bytes;
        read += !f->tied && strcmp(is, "embedding") == 0 ?
                t.n_bytes / t.dims[1] : t.n_bytes / of * used;
        for (int k = 0; k < MAX_TYPES && (type = lfm2_weight_type(k)); k++)
            of_type[k] += strcmp(type, t.type) == 0;
    }
    if (n == 0)
        return;
    add_members(&f->json, "%s: {n_tensors: %d, parameters: %llu, active: %llu, "
                "bytes: %llu, bytes_per_token: %llu, bits_per_weight: %g, "
                "types: {", role ? role : "weights", n, params, active, bytes,
                read, round(800 * (double)bytes / (double)params) / 100);
    for (int k = 0; k < MAX_TYPES && (type = lfm2_weight_type(k)); k++)
        if (of_type[k] > 0)
            add_members(&f->json, "%s: %d", type, of_type[k]);
    add_string(&f->json, "}}");
    f->bytes = role ? f->bytes : (double)bytes;
    f->read = role ? f->read : (double)read;
}

/* The memory that contexts of several lengths take, and the longest one for
 * which there is memory now, beside the weights. */
static void add_memory(struct inspection *f)
{
    const lfm2_config *c = lfm2_model_config(f->model);
    const int most = smaller(c->n_ctx_train, MAX_CTX);
    const double memory = free_memory();
    lfm2_params p = choose_params(f->s, f->model);
    const int asked = f->s->ctx == UNSET ? 0 : smaller(p.n_ctx, MAX_CTX);
    int ctx[5] = { 0, smaller(4096, most), smaller(32768, most), most };
    int at = 4, fits = 0;
    const double kv = kv_bytes(c, p.kv_type);
    double conv = 0;

    p.isa = LFM2_ISA_AUTO;                /* does not change the memory      */
    for (int il = 0; il < c->n_layer; il++)
        conv += c->is_attn[il] ? 0 : 4.0 * (c->l_cache - 1) * c->n_embd;
    for (int step = MAX_CTX; step > 0; step /= 2) {
        p.n_ctx = fits + step;
        if (p.n_ctx <= most && (double)lfm2_context_size(f->model, &p) +
            f->bytes <= memory)
            fits = p.n_ctx;
    }
    add_members(&f->json, "memory: {kv_type: %s, kv_bytes_per_token: %g, "
                "conv_state_bytes: %g, free_bytes: %g, largest_context: %g, "
                "assumed_gb_per_s: %d, tokens_per_s: %g, contexts: [",
                kv_name(p.kv_type), kv, conv, memory > 0 ? memory : NAN,
                memory > 0 ? (double)fits : NAN, ASSUMED_BANDWIDTH,
                round(ASSUMED_BANDWIDTH * 1e10 / f->read) / 10);
    for (; ctx[at - 1] > asked; at--)
        ctx[at] = ctx[at - 1];
    ctx[at] = asked;
    for (int i = 0; i < 5; i++) {
        p.n_ctx = ctx[i];
        if (i == 0 || p.n_ctx > ctx[i - 1])
            add_members(&f->json, "{context: %d, kv_bytes: %g, "
                        "bytes_beside_file: %g, bytes_per_token: %g}", p.n_ctx,
                        kv * p.n_ctx, p.n_ctx ?
                        (double)lfm2_context_size(f->model, &p) : 0.0,
                        f->read + kv * p.n_ctx);
    }
    add_string(&f->json, "]}");
}

static void add_special(struct inspection *f, const char *role, int32_t id)
{
    const char *s;
    int len;

    if (id < 0 || id >= lfm2_n_vocab(f->words))
        return;
    s = lfm2_token_bytes(f->words, id, 1, &len);
    add_members(&f->json, "{role: %s, id: %d, piece: %.*s}", role, (int)id, len,
                s);
}

/* Vocabulary, chat template and sampling.  The value of an array is written as
 * "[65536 x string]", which tells its length. */
static void add_words(struct inspection *f)
{
    static const char *const how[] = { "none", "hash", "words", "model" };
    static const char *const marker[] = {
        TURN_START, "<|tool_list_start|>", CALL_START,
        "<|tool_response_start|>", THINK
    };
    const struct phrase merges = value_of(f->model, "tokenizer.ggml.merges");
    const struct found_template *t = &f->template;
    double pad = -1;
    int from_file;
    const struct sampling is = preset_of(f->model, &from_file);

    f->code = load_words(f->s, f->model, &f->words, &f->err);
    f->template = find_template(f->model, f->words);
    if (f->words) {
        file_number(f->model, "tokenizer.ggml.padding_token_id", 0, 1 << 30,
                    &pad);
        add_members(&f->json, "vocabulary: {n_tokens: %d, n_merges: %llu",
                    lfm2_n_vocab(f->words), merges.s[0] == '[' ?
                    strtoull(merges.s + 1, NULL, 10) : 0);
        add_file_string(f, "model", "tokenizer.ggml.model");
        add_file_string(f, "pre", "tokenizer.ggml.pre");
        add_members(&f->json, "special: [");
        if (lfm2_add_bos(f->words))
            add_special(f, "bos", lfm2_bos(f->words));
        for (int32_t id = 0; id < lfm2_n_vocab(f->words); id++)
            if (lfm2_is_eog(f->words, id))
                add_special(f, "end", id);
        for (size_t i = 0; i < sizeof marker / sizeof *marker; i++)
            add_special(f, "marker", lfm2_token_id(f->words, marker[i]));
        add_special(f, "pad", (int32_t)pad);
        add_string(&f->json, "]}");
    }
    add_members(&f->json, "template: {name: %s, by: %s, words: %s, hash: %s}",
                template_name(t->template), how[t->how], t->word,
                t->how == NO_TEMPLATE ? NULL :
                phrase("%016llx", (unsigned long long)t->hash).s);
    add_members(&f->json, "preset: {name: %s, from_file: %i, temperature: %g, "
                "top_k: %d, top_p: %g, min_p: %g, repeat_penalty: %g, "
                "repeat_last_n: %d}", find_preset(f->model)->name,
                from_file > 0, is.temp, is.top_k, is.top_p, is.min_p,
                is.repeat, is.last_n);
}

/* All that the file says: its keys and its tensors. */
static void add_contents(struct inspection *f)
{
    struct text *to = &f->json;
    lfm2_tensor_info t;
    const char *key;
    char value[128];

    add_members(to, "metadata: {");
    for (int i = 0; (key = lfm2_model_key(f->model, i, value, sizeof value));
         i++)
        add_members(to, "%s: %s", key, value);
    add_members(to, "} tensors: [");
    for (int i = 0; lfm2_model_tensor(f->model, i, &t) == LFM2_OK; i++) {
        add_members(to, "{name: %s, type: %s, shape: [", t.name, t.type);
        for (int d = 0; d < t.n_dims; d++)
            add_members(to, "%llu", (unsigned long long)t.dims[d]);
        add_members(to, "] bytes: %llu", (unsigned long long)t.n_bytes);
        if (t.data)
            add_members(to, "offset: %llu", (unsigned long long)t.offset);
        add_string(to, "}");
    }
    add_string(to, "]");
}

static void add_problem(struct inspection *f, const char *level, const char *s)
{
    add_members(&f->json, "{level: %s, message: %s}", level, s);
}

/* The library warns of unused keys of the model's own architecture; those of
 * the other one, lfm2 or lfm2moe, are found here. */
static void add_problems(struct inspection *f)
{
    const struct phrase pre = value_of(f->model, "tokenizer.ggml.pre");
    const struct phrase own = phrase("%s.", value_of(f->model,
                                     "general.architecture").s);
    const char *s;
    char value[8];

    add_members(&f->json, "anomalies: [");
    for (int i = 0; (s = lfm2_model_warning(f->model, i)); i++)
        add_problem(f, "tolerated", s);
    for (int i = 0; f->is_model &&
         (s = lfm2_model_key(f->model, i, value, sizeof value)); i++)
        if (strncmp(s, "lfm2", 4) == 0 &&
            strncmp(s, own.s, strlen(own.s)) != 0)
            add_problem(f, "tolerated",
                        phrase("%.90s: the key is not used", s).s);
    if (f->is_model && pre.s[0] && strcmp(pre.s, "lfm2") != 0)
        add_problem(f, "tolerated", phrase("tokenizer.ggml.pre: \"%.60s\", "
                    "expected \"lfm2\"; treated as that", pre.s).s);
    if (f->template.how > BY_HASH)
        add_problem(f, "tolerated", phrase("tokenizer.chat_template: not a "
                    "known one, treated as %s",
                    template_name(f->template.template)).s);
    if (f->code != LFM2_OK)
        add_problem(f, "fatal", f->err.msg);
    add_string(&f->json, "]");
}

/* ---- in text
 *
 * A line for each member; objects in an array or object are rows of a table. */

/* A value on one line: amounts are rounded, members separated by commas. */
static void add_value_text(struct text *to, const struct json *v)
{
    const char *key = v->key ? v->key : "";
    const int bytes = strstr(key, "bytes") != NULL;

    if (v->type == JSON_NUMBER && (bytes || strcmp(key, "active") == 0 ||
                                   strcmp(key, "parameters") == 0))
        add_string(to, amount(strtod(v->s, NULL), bytes ? "B" : "").s);
    else if (v->type == JSON_NUMBER || v->type == JSON_STRING)
        add(to, v->s, v->n);
    else if (v->type < JSON_NUMBER)
        add_string(to, v->type == JSON_NULL ? "-" : json_names[v->type]);
    for (const struct json *x = v->first; x; x = x->next) {
        add(to, x->key, x->n_key);
        add_string(to, x->n_key ? " " : "");
        add_value_text(to, x);
        add_string(to, x->next ? ", " : "");
    }
}

/* Rows of cells.  A first pass finds the width of columns, a second prints. */
struct grid {
    size_t width[MAX_COLUMNS];
    int column, gap, is_printing;         /* gap: blanks before the next     */
};

/* A key or a value, which may neither control the terminal nor start a line. */
static void put_cell(struct grid *g, const struct json *v, int is_key,
                     int right)
{
    struct text t = { 0 };
    size_t *width = &g->width[g->column++];

    if (is_key)
        add(&t, v->key, v->n_key);
    else
        add_value_text(&t, v);
    t.n = t.n ? drop_controls(t.s, t.n) : 0;
    for (size_t i = 0; i < t.n; i++)
        t.s[i] = strchr("\n\t", t.s[i]) ? ' ' : t.s[i];
    *width = t.n > *width ? t.n : *width;
    g->gap += right ? (int)(*width - t.n) : 0;
    if (g->is_printing && t.n > 0) {
        printf("%*s%.*s", g->gap, "", (int)t.n, t.s);
        g->gap = 0;
    }
    g->gap += 2 + (right ? 0 : (int)(*width - t.n));
    free(t.s);
}

/* The members from `first` up to `end`.  Objects are rows of a table, except at
 * the top; the keys of the first row are the head of the table. */
static void print_rows(const struct json *first, const struct json *end,
                       int indent)
{
    static const struct json blank = { .type = JSON_STRING, .s = "" };
    const int in_table = indent > 0 && first && first->type == JSON_OBJECT;
    struct grid g = { 0 };

    for (; g.is_printing < 2; g.is_printing++) {
        int is_head = in_table;
        for (const struct json *x = first; x != end;
             x = is_head ? x : x->next, is_head = 0) {
            const struct json *in = x->first;
            const int opens = !in_table && in && (in->type == JSON_OBJECT ||
                              (x->type == JSON_OBJECT && indent == 0));
            g.column = 0;
            g.gap = indent;
            if (x->n_key)
                put_cell(&g, is_head ? &blank : x, !is_head, 0);
            for (const struct json *y = in_table ? in : opens ? NULL : x; y;
                 y = in_table ? y->next : NULL)
                put_cell(&g, y, is_head, in_table && y->type == JSON_NUMBER);
            if (g.is_printing)
                putchar('\n');
            if (g.is_printing && opens)
                print_rows(in, NULL, indent + 2);
        }
    }
}

static void print_report(const struct json *v)
{
    const struct json *problems = json_get(v, "anomalies");

    print_rows(v->first, problems, 0);
    for (const struct json *x = problems->first; x; x = x->next) {
        struct grid g = { .gap = 1, .is_printing = 1 };
        printf("%s:", json_text(x->first));
        put_cell(&g, x->first->next, 0, 0);
        putchar('\n');
    }
}

/* A file that is not a model is explained too, if it can be read at all.  A
 * report with more members than json_parse() accepts is printed as JSON. */
static int inspect_file(const struct settings *s)
{
    static const char *const roles[] = {
        "embedding", "output", "conv", "attention", "dense_ffn", "router",
        "experts", "norms", "unused"
    };
    struct inspection f = { .s = s };
    struct pool pool = { 0 };
    struct json *v;
    struct why why;
    int code = enter_sandbox(s);

    if (code != DONE)
        return code;
    if (!s->no_mmap)
        watch_file(s->model);
    f.code = open_file(&f.model, s->model, s->no_mmap, LFM2_LOAD_ANY, &f.err);
    f.is_model = f.code == LFM2_OK;
    if (!f.model)
        return report(s->model, &f.err);
    add_string(&f.json, "{");
    add_file_facts(&f);
    if (f.is_model) {
        add_shape(&f);
        add_weights(&f, NULL);
        add_members(&f.json, "roles: {");
        for (size_t i = 0; i < sizeof roles / sizeof *roles; i++)
            add_weights(&f, roles[i]);
        add_string(&f.json, "}");
        add_memory(&f);
        add_words(&f);
    }
    if (s->verbose)
        add_contents(&f);
    add_problems(&f);
    add_string(&f.json, "}\n");
    if (s->json || json_parse(&pool, f.json.s, f.json.n, &v, &why) != DONE)
        show_text(&f.json);
    else
        print_report(v);
    pool_free(&pool);
    free(f.json.s);
    lfm2_tokenizer_close(f.words);
    lfm2_model_close(f.model);
    return status_of(f.code);
}

/* -------------------------------------------------------------- 19. Traces
 *
 * What happens between a token and its logits.  The library calls
 * note_activation() with every activation; --trace writes a record about it,
 * and --trace-raw all its numbers.  So that both files are good whatever ends
 * the program, a record is written at once, whole, and after its numbers. */

static void add_number(struct text *to, const char *name, double x)
{
    add_string(to, name);
    if (isfinite(x))
        add_format(to, "%.9g", x);
    else
        add_string(to, x != x ? "\"nan\"" : x > 0 ? "\"inf\"" : "\"-inf\"");
}

/* The first and last few numbers, and statistics; a NaN is both min and max. */
static void add_statistics(struct text *to, const float *x, int n)
{
    const int few = smaller(n, 4);
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

static void write_trace(struct trace *t, struct trace_file *to)
{
    if (t->code == DONE && write_all(to->fd, to->text.s, to->text.n) != 0)
        t->code = say(BAD_FILE, "%s: %s", to->path, strerror(errno));
    to->text.n = 0;
}

static void note_activation(void *user, const lfm2_activation *a)
{
    struct trace *t = user;
    struct text *line = &t->records.text;
    int wanted = t->s->trace_filter.n == 0;

    for (int i = 0; i < t->s->trace_filter.n; i++)
        wanted |= fnmatch(t->s->trace_filter.v[i], a->name, 0) == 0;
    if (!wanted || a->pos < t->first || a->pos > t->last || t->code != DONE)
        return;
    t->has_some = 1;
    add_format(line, "{\"name\":\"%s\",\"pos\":%d", a->name, a->pos);
    if (strcmp(a->name, "model.embed_tokens") == 0)
        add_format(line, ",\"token\":%ld", (long)a->token);
    add_format(line, ",\"shape\":[%d]", a->n);
    add_statistics(line, a->x, a->n);
    if (t->raw.path) {
        for (int i = 0; i < a->n; i++)
            add_le(&t->raw.text, float_bits(a->x[i]), 4);
        write_trace(t, &t->raw);
        add_format(line, ",\"offset\":%llu", (unsigned long long)t->offset);
        t->offset += 4 * (uint64_t)a->n;
    }
    add_string(line, "}\n");
    write_trace(t, &t->records);
}

static int open_trace(struct engine *e)
{
    const struct settings *s = e->s;
    const char *const path[] = { s->trace, s->trace_raw };
    const lfm2_config *c = lfm2_model_config(e->model);
    struct trace *t;
    lfm2_error err;
    size_t n = 0;
    const char *arch = lfm2_model_string(e->model, "general.architecture", &n);

    if (!s->trace)
        return DONE;
    t = e->trace = zeroed(1, sizeof *t);
    t->s = s;
    t->last = INT_MAX;
    if (s->trace_tokens)
        parse_range(s->trace_tokens, &t->first, &t->last);
    for (int i = 0; i < 2 && path[i] && t->code == DONE; i++) {
        struct trace_file *const f = i ? &t->raw : &t->records;
        f->path = path[i];
        f->fd = open(f->path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (f->fd < 0)
            t->code = say(BAD_FILE, "%s: %s", f->path, strerror(errno));
    }
    add_format(&t->records.text, "{\"trace\":1,\"program\":\"lfm2.c %s\","
               "\"arch\":\"%.*s\",\"model_hash\":\"%016llx\",\"n_layer\":%d,"
               "\"n_embd\":%d,\"n_vocab\":%d,\"kv\":\"%s\"}\n", lfm2_version(),
               (int)n, arch ? arch : "",
               (unsigned long long)lfm2_model_hash(e->model), c->n_layer,
               c->n_embd, c->n_vocab, kv_name(e->par.kv_type));
    write_trace(t, &t->records);
    if (t->code == DONE &&
        lfm2_trace(e->ctx, note_activation, t, &err) != LFM2_OK)
        t->code = report(s->model, &err);
    return t->code;
}

/* Returns `code`, or if that is DONE, the first error in writing the trace. */
static int close_trace(struct engine *e, int code)
{
    struct trace *t = e->trace;

    if (!t)
        return code;
    lfm2_trace(e->ctx, NULL, NULL, NULL);
    code = code == DONE ? t->code : code;
    if (code == DONE && !t->has_some)
        note("%s: no module has this name at these positions", t->s->trace);
    for (int i = 0; i < 2; i++) {
        struct trace_file *const f = i ? &t->raw : &t->records;
        if (f->path && f->fd >= 0 && close(f->fd) != 0 && code == DONE)
            code = say(BAD_FILE, "%s: %s", f->path, strerror(errno));
        free(f->text.s);
    }
    free(t);
    e->trace = NULL;
    return code;
}

/* ---------------------------------------------------------------- 20. --ppl
 *
 * How well a model predicts a text, measured as llama-perplexity does, so that
 * the figures can be compared.  The text is cut into windows of n_ctx tokens,
 * each fed to an empty sequence, with BOS in place of its first token if the
 * model wants one.  Only the second half of a window is scored, where there is
 * some context: positions n_ctx / 2 to n_ctx - 2, each by the probability p of
 * the token after it.  The perplexity is exp(mean of -log p).
 *
 * To see what quantization changes, compare two files of --logits with
 * scripts/compare_logits.py. */

enum { PPL_CTX = 512, PPL_LOGITS = 1 << 27 };         /* most bytes at once  */

/* Sums over n samples: of x, and of x * x. */
struct sums { double x, xx; int n; };

static void add_to(struct sums *s, double x)
{
    s->x += x;
    s->xx += x * x;
    s->n++;
}

static double mean_of(const struct sums *s)
{
    return s->x / s->n;
}

/* The standard error of the mean. */
static double error_of(const struct sums *s)
{
    const double variance = s->xx / s->n - mean_of(s) * mean_of(s);

    return s->n > 1 && variance > 0 ? sqrt(variance / (s->n - 1)) : 0;
}

/* Read the text, and size the windows; tokens after the last are not used. */
static int read_windows(struct engine *e, struct ids *ids)
{
    const struct settings *s = e->s;
    const int n_ctx = s->ctx == UNSET ? PPL_CTX : e->par.n_ctx;
    const int most = PPL_LOGITS / 4 / lfm2_model_config(e->model)->n_vocab;
    struct text t = { 0 };
    int code = read_file(s->ppl, &t);

    if (code == DONE)
        encode_plain(s, e->words, t.s, t.n - (t.n > 0 && t.s[t.n - 1] == '\n'),
                     ids);
    free(t.s);
    if (code != DONE)
        return code;
    if (n_ctx < 3)
        return say(USAGE, "-c %d: expected windows of at least 3 tokens",
                   n_ctx);
    if (ids->n / n_ctx < 2)
        return say(USAGE, "%s: %d tokens, expected at least %d, two windows; "
                   "-c N makes them shorter", s->ppl, ids->n, 2 * n_ctx);
    e->par.n_ctx = n_ctx;
    e->par.n_logits = smaller(n_ctx, most > 0 ? most : 1);
    return DONE;
}

/* Add -log p of each token that is scored.  A long window is fed in pieces, as
 * its logits are too many at once; its last token predicts nothing in it. */
static int score_window(struct engine *e, int32_t *token, struct sums *nll)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;
    const int end = e->par.n_ctx - 1;
    int code = DONE;

    if (lfm2_add_bos(e->words))
        token[0] = lfm2_bos(e->words);
    lfm2_seq_trim(e->ctx, 0, 0);
    for (int from = 0, at = e->par.n_ctx / 2, n; code == DONE && at < end;
         from = at) {
        n = smaller(end - at, e->par.n_logits);
        const lfm2_span span = { 0, token + from, at + n - from, n };
        code = interrupted ? INTERRUPTED : forward(e, &span, 1);
        for (int k = 0; code == DONE && k < n; k++) {
            const float *logits = lfm2_logits(e->ctx, 0, k);
            add_to(nll, log_sum(logits, n_vocab) - logits[token[++at]]);
            if (!isfinite(nll->x))
                code = say(FAILED, "%s: logits that are not finite",
                           e->s->model);
        }
    }
    return code;
}

/* A terminal shows the progress and the time left. */
static int perplexity(const struct settings *s)
{
    struct engine e = { .s = s };
    struct ids ids = { NULL, 0 };
    struct sums nll = { 0, 0, 0 };
    int code = open_model(&e), n_ctx, all;

    if (code == DONE)
        code = open_model_words(&e);
    if (code == DONE)
        code = read_windows(&e, &ids);
    if (code == DONE)
        code = open_context(&e);
    n_ctx = e.par.n_ctx;
    all = code == DONE ? ids.n / n_ctx : 0;
    running = e.ctx;
    const double start = seconds();
    for (int i = 0; i < all && code == DONE; i++) {
        code = score_window(&e, ids.id + (size_t)i * (size_t)n_ctx, &nll);
        const double took = seconds() - start;
        if (code == DONE && s->verbose)
            note("window %d of %d: perplexity %.4f, %.0f s", i + 1, all,
                 exp(mean_of(&nll)), took);
        else if (code == DONE && isatty(STDERR_FILENO) && !s->quiet)
            fprintf(stderr, "\rwindow %d of %d, perplexity %.4f, %.0f s to go"
                    "   %s", i + 1, all, exp(mean_of(&nll)),
                    took / (i + 1) * (all - i - 1), i + 1 < all ? "" : "\n");
    }
    running = NULL;
    const double ppl = exp(mean_of(&nll)), error = ppl * error_of(&nll);
    if (code == DONE && s->json)
        printf("{\"perplexity\": %.9g, \"error\": %.9g, \"scored\": %d, "
               "\"windows\": %d, \"n_ctx\": %d}\n", ppl, error, nll.n, all,
               n_ctx);
    else if (code == DONE)
        printf("perplexity     %.4f +/- %.5f\nscored         %d tokens in %d "
               "windows of %d\n", ppl, error, nll.n, all, n_ctx);
    free(ids.id);
    close_engine(&e);
    return code;
}

/* -------------------------------------------------------------- 21. --bench
 *
 * The tests, names and table of llama-bench, and beside every figure its share
 * of what the machine could do.  Generating reads all weights for each token,
 * so memory bandwidth limits it; reading a prompt multiplies each weight with
 * many tokens, so arithmetic does.  The same run measures both limits. */

enum { START_TOKENS = 8 };                /* of the first prompt             */

/* A test and its results; NAN means not measured. */
struct test {
    int n_prompt, n_gen, n_seq, depth;
    time_t when;
    struct sums ns, ts;                   /* of each run; ts: tokens/s       */
    double read, macs, share;             /* GB/s, GMAC/s; of the limit      */
};

/* In 1e9 per second: bytes read from memory, multiply-adds, and for each thread
 * bytes of weights when they are in its second-level cache. */
struct limits { int n_threads; double read, dot, cached; };

struct bench {
    struct engine e;                      /* e.par: the parameters in force  */
    struct cost cost;
    struct limits best[MAX_LIST], *limit; /* of each -t; of the current one  */
    struct phrase type;                   /* "lfm2 1.2B Q4_0"                */
    double load_s, context_s, first_s;    /* first: from the very start      */
    double rss_anon, most_share;          /* maxima                          */
    int n_done;                           /* tests                           */
    int longest, n_seq;                   /* most tokens, sequences          */
    int32_t *token;                       /* shared by all tests             */
    double *ns, *ts;                      /* [reps] of the last test         */
};

/* ---- the work */

/* Append tokens `from` to `to` - 1 to the first sequence. */
static int feed(struct bench *b, int from, int to, int n_logits)
{
    const lfm2_span span = { 0, b->token + from, to - from, n_logits };

    return interrupted ? INTERRUPTED :
           from < to ? forward(&b->e, &span, 1) : DONE;
}

/* One run of a test.  First, untimed, all sequences get `depth` tokens; most of
 * them are still there from the last run.  Which tokens are generated does not
 * change the time, so none are sampled. */
static int run_once(struct bench *b, const struct test *t, int n_gen,
                    double *took)
{
    const int end = t->depth + t->n_prompt;
    lfm2_context *ctx = b->e.ctx;
    lfm2_error err;
    int code = feed(b, lfm2_seq_trim(ctx, 0, t->depth), t->depth, 0);

    for (int i = 1; code == DONE && i < t->n_seq; i++)
        if (lfm2_seq_copy(ctx, i, 0, &err) != LFM2_OK)
            code = report(b->e.s->model, &err);
    const double start = seconds();
    if (code == DONE)
        code = feed(b, t->depth, end, t->n_prompt > 0);
    for (int i = 0; code == DONE && i < n_gen; i++) {
        for (int k = 0; k < t->n_seq; k++)
            b->e.span[k] = (lfm2_span){ k, b->token + end + i, 1, 1 };
        code = interrupted ? INTERRUPTED : forward(&b->e, b->e.span, t->n_seq);
    }
    *took = seconds() - start;
    return code;
}

/* The best of several runs of at least 20 ms: disturbances make them slower. */
static double measure_rate(struct bench *b, int what)
{
    double best = NAN, all = 0;

    for (int i = 0; i < 10 && (i < 4 || all < 2) && !interrupted; i++) {
        const double start = seconds();
        double took, work = 0;
        do {
            work += (double)lfm2_exercise(b->e.ctx, what);
            took = seconds() - start;
        } while (took < 0.02);
        all += took;
        best = fmax(best, work / took / 1e9);
    }
    return best;
}

/* ---- what is printed */

/* "lfm2 1.2B Q4_0", "lfm2moe 24B.A2B Q4_0": sizes, and llama-bench's name for
 * the file's number of its mix of weight types. */
static struct phrase name_type(const lfm2_model *m)
{
    static const char *const mix[33] = {
        [0] = "all F32", [1] = "F16", [2] = "Q4_0", [3] = "Q4_1", [7] = "Q8_0",
        [8] = "Q5_0", [9] = "Q5_1", [10] = "Q2_K - Medium",
        [11] = "Q3_K - Small", [12] = "Q3_K - Medium", [13] = "Q3_K - Large",
        [14] = "Q4_K - Small", [15] = "Q4_K - Medium", [16] = "Q5_K - Small",
        [17] = "Q5_K - Medium", [18] = "Q6_K", [21] = "Q2_K - Small",
        [25] = "IQ4_NL - 4.5 bpw", [30] = "IQ4_XS - 4.25 bpw", [32] = "BF16"
    };
    double number = 31;                   /* an unknown mix                  */
    uint64_t total, active;

    file_number(m, "general.file_type", 0, 32, &number);
    lfm2_model_params(m, &total, &active);
    const int moe = active < total;
    const double n = (double)total, used = (double)active;
    const struct phrase size = n < 995e6 ?
        phrase("%.0fM", n >= 1e8 ? 10 * round(n / 1e7) : n / 1e6) :
        phrase("%.*fB", moe ? 0 : 1, n / 1e9);
    return phrase("lfm2%s %s%s %s", moe ? "moe" : "", size.s, moe &&
                  used >= 1e9 ? phrase(".A%.0fB", floor(used / 1e9)).s : "",
                  mix[(int)number] ? mix[(int)number] : "unknown mix");
}

/* "694.76 MiB", as llama-bench writes it. */
static struct phrase binary_amount(double bytes)
{
    const int giga = bytes >= 1 << 30;

    return phrase("%.2f %s", bytes / (giga ? 1 << 30 : 1 << 20), giga ? "GiB" :
                  "MiB");
}

/* llama-bench's keys, then ours. */
static void print_record(const struct bench *b, const struct test *t)
{
    const lfm2_params *p = &b->e.par;
    const struct limits *best = b->limit;
    const char *kv = kv_name(p->kv_type);
    const double anon = anonymous_memory(), root = sqrt(t->ns.n);
    char when[24] = "";
    struct text out = { 0 };
    struct tm utc;

    if (gmtime_r(&t->when, &utc))
        strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &utc);
    add_members(&out, "{build_commit: %s, build_number: %d, cpu_info: %s, "
                "model_filename: %s, model_type: %s, model_size: %g, "
                "model_n_params: %g, backends: %s, n_batch: %d, n_threads: %d, "
                "type_k: %s, type_v: %s, n_prompt: %d, n_gen: %d, n_depth: %d, "
                "test_time: %s, avg_ns: %g, stddev_ns: %g, avg_ts: %g, "
                "stddev_ts: %g, samples_ns: [", "", 0,
                read_field("/proc", "cpuinfo", "model name", "?").s,
                b->e.s->model, b->type.s, b->cost.bytes, b->cost.params, "CPU",
                p->n_batch, p->n_threads, kv, kv, t->n_prompt, t->n_gen,
                t->depth, when,
                round(mean_of(&t->ns)), round(error_of(&t->ns) * root),
                mean_of(&t->ts), error_of(&t->ts) * root);
    for (int i = 0; i < b->e.s->reps; i++)
        add_members(&out, "%g", round(b->ns[i]));
    add_members(&out, "], samples_ts: [");
    for (int i = 0; i < b->e.s->reps; i++)
        add_members(&out, "%g", b->ts[i]);
    add_members(&out, "], n_sequences: %d, isa: %s, read_bandwidth: %g, "
                "int8_rate: %g, l2_gbs_core: %g, gb_per_s: %g, gmac_per_s: %g, "
                "share: %g, rss_peak: %g, rss_anon: %g, load_ms: %g, "
                "context_ms: %g, first_token_ms: %g}", t->n_seq,
                isa_name(p->isa), best->read, best->dot, best->cached, t->read,
                t->macs, t->share, peak_memory(), anon > 0 ? anon : NAN,
                b->load_s * 1e3, b->context_s * 1e3, b->first_s * 1e3);
    printf(b->n_done > 0 ? ",\n" : "[\n");
    fwrite(out.s, 1, out.n, stdout);
    free(out.s);
}

/* llama-bench's columns, then ours; a test is "tg128 x 8 @ d1024". */
static void print_row(const struct bench *b, const struct test *t)
{
    struct phrase name = phrase(t->n_prompt ? "pp%d" : "tg%d", t->n_prompt +
                                t->n_gen);

    if (t->n_seq > 1)
        name = phrase("%.30s x %d", name.s, t->n_seq);
    if (t->depth)
        name = phrase("%.60s @ d%d", name.s, t->depth);
    if (b->n_done == 0)
        printf("| model                          |       size |     params | "
               "backend | threads |            test |               t/s |   "
               "GB/s |  GMAC/s |  share |\n"
               "| ------------------------------ | ---------: | ---------: | "
               "------- | ------: | --------------: | ----------------: | "
               "-----: | ------: | -----: |\n");
    printf("| %-30s | %10s | %10s | CPU     | %7d | %15s | %17s | %6s | %7.1f |"
           " %6s |\n", b->type.s, binary_amount(b->cost.bytes).s,
           amount(b->cost.params, "").s, b->e.par.n_threads, name.s,
           phrase("%.2f ± %.2f", mean_of(&t->ts), error_of(&t->ts) *
                  sqrt(t->ts.n)).s,
           isnan(t->read) ? "-" : phrase("%.1f", t->read).s, t->macs,
           isnan(t->share) ? "-" : phrase("%.0f %%", 100 * t->share).s);
}

static void print_footer(const struct bench *b)
{
    const struct phrase cpu = read_field("/proc", "cpuinfo", "model name",
                                         "unknown");
    const lfm2_params *p = &b->e.par;

    printf("\nmachine   %s, %d usable CPUs\nkernels   %s, KV in %s, batch %d\n",
           cpu.s, usable_cpus(), isa_name(p->isa), kv_name(p->kv_type),
           p->n_batch);
    for (const struct limits *l = b->best; l <= b->limit; l++)
        printf("limits    %d threads read %.1f GB/s; with cached weights %.0f "
               "GMAC/s, or %.1f GB/s a core\n", l->n_threads, l->read, l->dot,
               l->cached);
    printf("share     of the read bandwidth for answers, of the arithmetic for "
           "prompts\n%s", b->most_share > 1 ? "          above 100 %: some "
           "weights stay in the caches of the CPU\n" : "");
    printf("start     model %.1f ms, context %.1f ms; first token after a "
           "prompt of 8: %.1f ms\n", b->load_s * 1e3, b->context_s * 1e3,
           b->first_s * 1e3);
    printf("memory    %s resident at most, %s of it anonymous\n",
           binary_amount(peak_memory()).s, b->rss_anon > 0 ?
           binary_amount(b->rss_anon).s : "n/a");
}

/* ---- the run */

/* The warm-up generates only one token, as llama-bench's does. */
static int run_test(struct bench *b, struct test t)
{
    const double n = (double)t.n_prompt + (double)t.n_gen * t.n_seq;
    const struct cost *cost = &b->cost;
    double took;
    int code = run_once(b, &t, t.n_gen > 0, &took);

    t.when = time(NULL);
    for (int i = 0; code == DONE && i < b->e.s->reps; i++) {
        code = run_once(b, &t, t.n_gen, &took);
        add_to(&t.ns, b->ns[i] = took * 1e9);
        add_to(&t.ts, b->ts[i] = n / (took + 1e-9));
    }
    if (code != DONE)
        return code;
    t.macs = mean_of(&t.ts) * (cost->macs + (t.n_gen ? cost->head : 0)) / 1e9;
    t.read = t.n_gen ? mean_of(&t.ts) / t.n_seq / 1e9 *
             step_bytes(b->e.model, cost, t.n_seq, t.depth + t.n_gen / 2.0) :
             NAN;
    t.share = t.n_gen ? t.read / b->limit->read : t.macs / b->limit->dot;
    (b->e.s->output == MD ? print_row : print_record)(b, &t);
    b->most_share = fmax(b->most_share, t.share);
    b->rss_anon = fmax(b->rss_anon, anonymous_memory());
    b->n_done++;
    return flush_output(DONE);
}

/* All tests with this many threads at one depth, in llama-bench's order, and in
 * a context no larger than they need.
 *
 * Before the first test, while nothing is warm, the first token is timed.  Then
 * the whole file is read, which maps its pages: left to the tests, that takes a
 * tenth of the time of a hundred tokens, if there are experts. */
static int run_tests(struct bench *b, int n_threads, int depth)
{
    const struct settings *s = b->e.s;
    const struct list *prompt = &s->bench_prompt, *gen = &s->bench_gen;
    const struct list *seqs = &s->bench_seqs;
    const double start = seconds();
    lfm2_params p = choose_params(s, b->e.model);
    uint64_t n_read;
    size_t size;
    lfm2_error err;
    int code = DONE;

    p.n_threads = n_threads ? n_threads : usable_cpus();
    p.n_ctx = depth + b->longest;
    p.n_seq = p.n_logits = b->n_seq;
    if (lfm2_context_open(&b->e.ctx, b->e.model, &p, &err) != LFM2_OK)
        return report(s->model, &err);
    running = b->e.ctx;
    b->e.par = p = lfm2_context_params(b->e.ctx);
    if (b->first_s == 0) {
        b->context_s = seconds() - start;
        code = feed(b, 0, START_TOKENS, 1);
        b->first_s = b->load_s + seconds() - start;
        lfm2_model_file(b->e.model, &size);
        n_read = (double)size <= free_memory();
        for (uint64_t at = 0; n_read > 0 && !interrupted; at += n_read)
            n_read = lfm2_model_read_ahead(b->e.model, at, 64 << 20);
    }
    if (b->limit->n_threads == 0)
        *b->limit = (struct limits){
            p.n_threads, measure_rate(b, LFM2_READ), measure_rate(b, LFM2_DOT),
            measure_rate(b, LFM2_DECODE) / p.n_threads
        };
    for (int i = 0; code == DONE && i < prompt->n; i++)
        if (prompt->v[i] > 0)
            code = run_test(b, (struct test){ prompt->v[i], 0, 1, depth });
    for (int i = 0; code == DONE && i < gen->n; i++)
        for (int k = 0; code == DONE && gen->v[i] && k < seqs->n; k++)
            code = run_test(b, (struct test){ 0, gen->v[i], seqs->v[k],
                                              depth });
    running = NULL;
    lfm2_context_close(b->e.ctx);
    b->e.ctx = NULL;
    return code;
}

static int largest(const struct list *l)
{
    int most = 0;

    for (int i = 0; i < l->n; i++)
        most = l->v[i] > most ? l->v[i] : most;
    return most;
}

/* Everything is allocated before anything is timed.  Any tokens will do as long
 * as they vary, because they choose the experts. */
static int open_bench(struct bench *b)
{
    const struct settings *s = b->e.s;
    const int prompt = largest(&s->bench_prompt), gen = largest(&s->bench_gen);
    const int deepest = largest(&s->bench_depth);
    int code, n_tokens;

    b->longest = prompt > gen ? prompt : gen;
    b->n_seq = gen ? largest(&s->bench_seqs) : 1;
    if (b->longest == 0)
        return usage("nothing to measure: no -p or -n above 0");
    if (b->longest > MAX_CTX - deepest)
        return usage("a test of %d tokens at a depth of %d is longer than any "
                     "context, %d", b->longest, deepest, MAX_CTX);
    if (b->longest < START_TOKENS)
        b->longest = START_TOKENS;
    n_tokens = b->longest + deepest;
    b->token = zeroed((size_t)n_tokens, sizeof *b->token);
    b->ns = zeroed((size_t)s->reps, sizeof *b->ns);
    b->ts = zeroed((size_t)s->reps, sizeof *b->ts);
    b->e.span = zeroed((size_t)b->n_seq, sizeof *b->e.span);
    is_polled = 1;
    const double start = seconds();
    code = open_model(&b->e);
    b->load_s = seconds() - start;
    if (code != DONE)
        return code;
    for (int i = 0; i < n_tokens; i++)
        b->token[i] = (int32_t)((uint32_t)i * 2654435761u % (uint32_t)
                                lfm2_model_config(b->e.model)->n_vocab);
    b->cost = count_cost(b->e.model, s->kv);
    b->type = name_type(b->e.model);
    return DONE;
}

/* The JSON is completed even after Ctrl-C. */
static int bench(const struct settings *s)
{
    struct bench b = { .e.s = s };
    int code = open_bench(&b);

    for (int i = 0; code == DONE && i < s->bench_threads.n; i++) {
        b.limit = &b.best[i];
        for (int k = 0; code == DONE && k < s->bench_depth.n; k++)
            code = run_tests(&b, s->bench_threads.v[i], s->bench_depth.v[k]);
    }
    if (s->output == MD && code == DONE)
        print_footer(&b);
    if (s->output == JSON && (b.n_done > 0 || code == INTERRUPTED))
        printf(b.n_done > 0 ? "\n]\n" : "[]\n");
    close_engine(&b.e);
    free(b.token);
    free(b.ns);
    free(b.ts);
    return code;
}

/* ----------------------------------------------------------- 22. --selftest
 *
 * Does this build compute correctly on this machine?  No file is needed: small
 * models of all weight types are made of random numbers that are the same
 * everywhere, so the bits of their logits are known, whatever the kernel. */

enum {
    WIDTH = 256, HALF = 128, HEAD = 64, N_EXPERT = 4, VOCAB = 256 + 7,
    FEW = 24, MANY = 260                  /* tokens of text                  */
};

/* ---- the model */

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* The weight types: GGUF's number, bytes and columns of a block, and the
 * offsets of floating-point numbers in it, which must not be random bits. */
static const struct self_type {
    const char *name;
    int id, bytes, cols, scale[2];        /* scale: -1 if there is none      */
    uint64_t hash;                        /* of the logits                   */
} self_types[] = {
    { "F32", 0, 4, 1, { 0, -1 }, 0xb5fe7d964c5d415eu },
    { "F16", 1, 2, 1, { 0, -1 }, 0x34e46c18595c0466u },
    { "BF16", 30, 2, 1, { 0, -1 }, 0xbedf6cbe5b5203abu },
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

/* A bit for each place of a tensor: ONCE, outside of the layers; layers 0 to 3,
 * which are conv and dense, attention and dense, and both with experts.  PLAIN
 * is F32 in every model; EACH has a matrix for each expert. */
enum { ONCE = 1, CONV = 2 + 8, ATTN = 4 + 16, DENSE = 2 + 4, MOE = 8 + 16,
       EVERY = 2 + 4 + 8 + 16, PLAIN = 32, EACH = 64 };

static const struct self_tensor {
    const char *name;
    int kind, rows, cols;                 /* rows: 0 of a vector             */
} self_tensors[] = {
    { "token_embd.weight", ONCE, VOCAB, WIDTH },
    { "token_embd_norm.weight", ONCE + PLAIN, 0, WIDTH },
    { "attn_norm.weight", EVERY + PLAIN, 0, WIDTH },
    { "ffn_norm.weight", EVERY + PLAIN, 0, WIDTH },
    { "shortconv.in_proj.weight", CONV, 3 * WIDTH, WIDTH },
    { "shortconv.conv.weight", CONV + PLAIN, WIDTH, 3 },
    { "shortconv.out_proj.weight", CONV, WIDTH, WIDTH },
    { "attn_q.weight", ATTN, WIDTH, WIDTH },
    { "attn_k.weight", ATTN, HALF, WIDTH },
    { "attn_v.weight", ATTN, HALF, WIDTH },
    { "attn_output.weight", ATTN, WIDTH, WIDTH },
    { "attn_q_norm.weight", ATTN + PLAIN, 0, HEAD },
    { "attn_k_norm.weight", ATTN + PLAIN, 0, HEAD },
    { "ffn_gate_inp.weight", MOE + PLAIN, N_EXPERT, WIDTH },
    { "exp_probs_b.bias", MOE + PLAIN, 0, N_EXPERT },
    { "ffn_gate.weight", DENSE, WIDTH, WIDTH },
    { "ffn_up.weight", DENSE, WIDTH, WIDTH },
    { "ffn_down.weight", DENSE, WIDTH, WIDTH },
    { "ffn_gate_exps.weight", MOE + EACH, WIDTH, WIDTH },
    { "ffn_up_exps.weight", MOE + EACH, WIDTH, WIDTH },
    { "ffn_down_exps.weight", MOE + EACH, WIDTH, WIDTH },
};

enum { U32 = 4, I32 = 5, F32 = 6, STRING = 8, ARRAY = 9 };

static void add_counted(struct text *to, const char *s)
{
    add_le(to, strlen(s), 8);
    add_string(to, s);
}

static void add_key(struct text *to, const char *key, int type)
{
    add_counted(to, key);
    add_le(to, (uint64_t)type, 4);
}

static void add_array(struct text *to, const char *key, int type, int n)
{
    add_key(to, key, ARRAY);
    add_le(to, (uint64_t)type, 4);
    add_le(to, (uint64_t)n, 8);
}

/* The vocabulary: the 256 bytes in the notation of byte-level BPE, the results
 * of a few merges, and control tokens. */
static void add_metadata(struct text *to)
{
    static const struct { const char *key; int is; } sizes[] = {
        { "block_count", 4 }, { "context_length", 128 },
        { "embedding_length", WIDTH }, { "feed_forward_length", WIDTH },
        { "attention.head_count", WIDTH / HEAD }, { "vocab_size", VOCAB },
        { "shortconv.l_cache", 3 }, { "leading_dense_block_count", 2 },
        { "expert_count", N_EXPERT }, { "expert_used_count", 2 },
        { "expert_feed_forward_length", WIDTH }, { "expert_gating_func", 2 }
    };
    static const char *const words[] = {
        "he", "ll", "hell", "hello", BOS, TURN_START, TURN_END
    };
    static const char *const merges[] = { "h e", "l l", "he ll", "hell o" };
    uint32_t unseen = 256;

    add_le(to, 12 + 11, 8);
    add_key(to, "general.architecture", STRING);
    add_counted(to, "lfm2moe");
    add_key(to, "tokenizer.ggml.model", STRING);
    add_counted(to, "gpt2");
    add_key(to, "tokenizer.ggml.pre", STRING);
    add_counted(to, "lfm2");
    for (int i = 0; i < 12; i++) {
        add_key(to, phrase("lfm2moe.%s", sizes[i].key).s, U32);
        add_le(to, (uint64_t)sizes[i].is, 4);
    }
    add_key(to, "lfm2moe.attention.layer_norm_rms_epsilon", F32);
    add_le(to, float_bits(1e-5f), 4);
    add_key(to, "lfm2moe.rope.freq_base", F32);
    add_le(to, float_bits(1e6f), 4);
    add_key(to, "tokenizer.ggml.bos_token_id", U32);
    add_le(to, 256 + 4, 4);
    add_key(to, "tokenizer.ggml.eos_token_id", U32);
    add_le(to, 256 + 6, 4);
    add_array(to, "lfm2moe.attention.head_count_kv", I32, 4);
    for (int il = 0; il < 4; il++)
        add_le(to, il % 2 ? 2 : 0, 4);
    add_array(to, "tokenizer.ggml.tokens", STRING, VOCAB);
    for (uint32_t c = 0; c < 256; c++) {
        const int seen = (c > ' ' && c < 127) || (c > 160 && c != 173);
        char s[5] = "";
        utf8_put(s, seen ? c : unseen++);
        add_counted(to, s);
    }
    for (int i = 0; i < 7; i++)
        add_counted(to, words[i]);
    add_array(to, "tokenizer.ggml.token_type", I32, VOCAB);
    for (int i = 0; i < VOCAB; i++)
        add_le(to, i < 256 + 4 ? 1 : 3, 4);           /* normal, control     */
    add_array(to, "tokenizer.ggml.merges", STRING, 4);
    for (int i = 0; i < 4; i++)
        add_counted(to, merges[i]);
}

/* One block: random bits, scales of about 2^-8, F32 to BF16 weights of 2^-5. */
static void add_block(struct text *to, const struct self_type *t, uint64_t *rng)
{
    unsigned char b[256];

    for (int i = 0; i < t->bytes; i += 8)
        put_le(b + i, next_random(rng), 8);
    for (int i = 0; i < 2 && t->scale[i] >= 0; i++) {
        const uint64_t r = next_random(rng);
        put_le(b + t->scale[i], t->id == 0 ? 0x3d000000 | (r & 0x807fffff) :
               t->id == 1 ? 0x2800 | (r & 0x83ff) :
               t->id == 30 ? 0x3d00 | (r & 0x807f) : 0x1c00 | (r & 0x3ff),
               t->id == 0 ? 4 : 2);
    }
    add(to, (char *)b, (size_t)t->bytes);
}

/* A GGUF file.  The caller frees out->s. */
static void make_file(int type, struct text *out)
{
    const struct self_tensor *const end = self_tensors +
        sizeof self_tensors / sizeof *self_tensors;
    struct text info = { 0 }, data = { 0 };
    uint64_t rng = (uint64_t)type, n_tensors = 0;

    for (int il = -1; il < 4; il++)
        for (const struct self_tensor *t = self_tensors; t < end; t++) {
            const struct self_type *is = &self_types[t->kind & PLAIN ? 0 :
                                                     type];
            const int dims[] = { t->cols, t->rows, N_EXPERT };
            int n_dims = t->kind & EACH ? 3 : t->rows ? 2 : 1, size = 1;
            if (!(t->kind >> (il + 1) & 1))
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
    add_metadata(out);
    add(out, info.s, info.n);
    while (out->n % 32)
        add(out, "", 1);
    add(out, data.s, data.n);
    free(info.s);
    free(data.s);
}

/* ---- what is tried */

#define HASH_F32 0x18980a03e2fcd3dcu      /* of logits, with an F32 cache    */

struct self {
    lfm2_model *model;
    lfm2_context *ctx;
    int32_t token[MANY];
    int failed;
    uint64_t all;                         /* hash of all hashes              */
};

static void self_check(struct self *t, int good, const char *what)
{
    printf("%-4s  %s\n", good ? "ok" : "FAIL", what);
    t->failed |= !good;
}

/* Feed the first n_tokens, `step` at a time.  Returns the hash of the logits of
 * all of them, or 0 after an error. */
static uint64_t self_feed(struct self *t, int seq, int n_tokens, int step)
{
    const int n_vocab = lfm2_model_config(t->model)->n_vocab;
    uint64_t h = HASH_START;

    for (int i = 0, n; i < n_tokens; i += n) {
        n = smaller(n_tokens - i, step);
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

/* The same in a new context, which stays open as t->ctx. */
static uint64_t self_hash(struct self *t, int isa, int n_threads, int kv_type,
                          int n_tokens, int step)
{
    lfm2_params p = lfm2_default_params(t->model);

    p.isa = isa;
    p.n_threads = n_threads;
    p.kv_type = kv_type;
    p.n_ctx = MANY;
    p.n_seq = 2;
    p.n_logits = FEW;
    lfm2_context_close(t->ctx);
    t->ctx = NULL;
    return lfm2_context_open(&t->ctx, t->model, &p, NULL) == LFM2_OK ?
           self_feed(t, 0, n_tokens, step) : 0;
}

/* A weight type: plain C must give the known hash, and every kernel the same,
 * with all tokens at once and one by one.  With the last type each kernel also
 * has a text longer than a chunk of attention, an F32 cache, and threads. */
static void self_kernels(struct self *t, const struct self_type *type, int last)
{
    const int f16 = LFM2_KV_F16, f32 = LFM2_KV_F32;
    const uint64_t h = self_hash(t, LFM2_ISA_SCALAR, 1, f16, FEW, FEW);

    t->all = hash_number(t->all, h);
    self_check(t, h == type->hash, phrase("%s in plain C: %016llx", type->name,
                                          (unsigned long long)h).s);
    for (int isa = LFM2_ISA_SCALAR; isa < LFM2_N_ISA; isa++) {
        const char *name = isa_name(isa);
        if (!lfm2_isa_available(isa))
            continue;
        if (isa > LFM2_ISA_SCALAR)
            self_check(t, self_hash(t, isa, 1, f16, FEW, FEW) == h &&
                       self_hash(t, isa, 1, f16, FEW, 1) == h,
                       phrase("%s with %s", type->name, name).s);
        if (!last)
            continue;
        self_check(t, self_hash(t, isa, 1, f16, MANY, FEW) ==
                   0x75627de54a6b322fu, phrase("a long text, by %s", name).s);
        self_check(t, self_hash(t, isa, 1, f32, FEW, 7) == HASH_F32,
                   phrase("a KV cache of floats, by %s", name).s);
        self_check(t, self_hash(t, isa, 2, f16, FEW, 5) == type->hash,
                   phrase("two threads, pieces of five tokens, by %s",
                          name).s);
    }
}

/* Sequences that are saved, restored and trimmed; and the sampler, whose
 * choices are the same everywhere. */
static void self_sequences(struct self *t)
{
    const uint64_t saved = 0x11417c4fd0aea9f3u;
    lfm2_sampler s = { .temperature = 0.8f, .top_k = 40, .top_p = 0.95f,
                       .min_p = 0.02f, .repeat_penalty = 1.1f,
                       .repeat_last_n = 16, .rng = 1 };
    int good = self_hash(t, LFM2_ISA_AUTO, 1, LFM2_KV_F32, FEW, 7) == HASH_F32;
    const uint64_t size = good ? lfm2_seq_state_size(t->ctx, 0) : 0;
    char *state = zeroed((size_t)size, 1);
    float logits[VOCAB];
    uint64_t rng = 2, h = HASH_START;
    int32_t made[32];

    good = good && lfm2_seq_save(t->ctx, 0, state, size, NULL) == LFM2_OK &&
           hash_bytes(HASH_START, state, (size_t)size) == saved &&
           lfm2_seq_load(t->ctx, 1, state, size, NULL) == LFM2_OK &&
           lfm2_seq_len(t->ctx, 1) == FEW;
    self_check(t, good, "a sequence saved and restored");
    good = good && lfm2_seq_trim(t->ctx, 1, 3) == 0 &&
           self_feed(t, 1, FEW, 4) == HASH_F32;
    self_check(t, good, "a sequence shortened and read again");
    for (int i = 0; t->ctx && i < 32; i++) {
        for (int id = 0; id < VOCAB; id++)
            logits[id] = (float)(int)(next_random(&rng) >> 49) * 0x1p-12f - 4;
        made[i] = lfm2_sample(t->ctx, &s, logits, made, i);
        h = hash_number(h, (uint32_t)made[i]);
    }
    self_check(t, h == 0x4cb658387d2a6170u, "the sampler's choices");
    t->all = hash_number(t->all, h);
    free(state);
}

/* Merges, invalid UTF-8 and control tokens become ids, and text again. */
static void self_tokenizer(struct self *t, const struct text *file)
{
    static const char text[] = "hello hell\n 12\xff \xc3\xa9" TURN_END;
    static const int32_t want[] = {
        260, 259, ' ', 258, '\n', ' ', '1', '2', 0xff, ' ', 0xc3, 0xa9, 262
    };
    lfm2_tokenizer *words = NULL;
    struct text back = { 0 };
    int32_t id[32];
    int n = 0, len;

    if (lfm2_tokenizer_open_memory(&words, file->s, file->n, NULL) == LFM2_OK)
        n = lfm2_encode(words, text, strlen(text), LFM2_ENCODE_BOS |
                        LFM2_ENCODE_SPECIAL, id, 32);
    for (int i = 1; i < n; i++) {
        const char *s = lfm2_token_bytes(words, id[i], 1, &len);
        add(&back, s, (size_t)len);
    }
    self_check(t, (size_t)n == sizeof want / sizeof *want &&
               memcmp(id, want, sizeof want) == 0, "the tokenizer");
    self_check(t, back.s && strcmp(back.s, text) == 0, "and back to text");
    lfm2_tokenizer_close(words);
    free(back.s);
}

/* What C leaves to the implementation; and a hash of the results of each math
 * function for some thousand numbers. */
static void self_arithmetic(struct self *t)
{
    static const struct { int id; const char *name; uint64_t known; } all[] = {
        { LFM2_FMA, "a*b+c", 0x70172052f8b00d38u },
        { LFM2_EXP, "exp", 0x7ebd348940bf194fu },
        { LFM2_SIN, "sin", 0x84f7d324c069e130u },
        { LFM2_COS, "cos", 0x2f6e6bf977c0a2e9u }
    };
    volatile float one = 1, tiny = 0x1p-149f, third = 1.0f / 3, half = 0.5f;
    volatile int minus = -5;
    const double last = 1 + 0x1p-52;
    uint64_t bits;

    memcpy(&bits, &last, sizeof bits);
    self_check(t, CHAR_BIT == 8 && sizeof(int) >= 4 && sizeof(size_t) >= 4 &&
               minus >> 1 == -3 && float_bits(one) == 0x3f800000 &&
               bits == ((uint64_t)0x3ff << 52 | 1),
               "two's complement integers, floats in the same byte order");
    self_check(t, FLT_RADIX == 2 && FLT_MANT_DIG == 24 && DBL_MANT_DIG == 53 &&
               one + 0x1p-24f == one && one + 0x3p-24f == one + 0x1p-22f &&
               third * 3 == one,
               "24-bit floats and 53-bit doubles, rounded to nearest even");
    self_check(t, tiny * one > 0 && tiny * half == 0 &&
               (0x1p-126f * half) * 2 == 0x1p-126f,
               "denormal numbers are kept");
    for (int k = 0; k < 4; k++) {
        uint64_t rng = 3, h = HASH_START;
        for (int i = 0; i < 4096; i++) {
            const float x = (float)(int)(next_random(&rng) >> 40);
            const float b = (float)(int)(next_random(&rng) >> 40) - 0x1p23f;
            const float a = all[k].id == LFM2_EXP ? (x - 0x1p23f) * 0x1p-17f :
                                                    x * 0x1p-4f;
            const float c = i % 2 ? -a * b : b * 0x1p-20f;
            h = hash_number(h, float_bits(lfm2_math(all[k].id, a, b, c)));
        }
        self_check(t, h == all[k].known, phrase("%s: %016llx", all[k].name,
                                                (unsigned long long)h).s);
    }
}

/* The C library, if it can be identified. */
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
    printf("musl, or another that does not name itself\n");
#else
    struct utsname host;
    if (uname(&host) == 0)
        printf("%s's, %s\n", host.sysname, host.release);
#endif
}

/* All tests, and then what belongs in a bug report. */
static int selftest(void)
{
    const uint64_t known = 0xf7e0c42c140c71edu;
    struct self t = { .all = HASH_START };
    lfm2_error err;

    for (int i = 0; i < MANY; i++)
        t.token[i] = (i * 37 + 5) % VOCAB;
    self_arithmetic(&t);
    for (int i = 0; i < N_SELF_TYPES; i++) {
        const int is_last = i == N_SELF_TYPES - 1;
        struct text file = { 0 };
        make_file(i, &file);
        if (lfm2_model_open_memory(&t.model, file.s, file.n, &err) == LFM2_OK) {
            self_kernels(&t, &self_types[i], is_last);
            if (is_last) {
                self_sequences(&t);
                self_tokenizer(&t, &file);
            }
            lfm2_context_close(t.ctx);
            t.ctx = NULL;
            lfm2_model_close(t.model);
        } else
            self_check(&t, 0, phrase("%s: %s", self_types[i].name, err.msg).s);
        free(file.s);
    }
    print_version();
    print_libc();
    printf("hash        %016llx, expected %016llx on every machine\n",
           (unsigned long long)t.all, (unsigned long long)known);
    return t.failed || t.all != known ? SELFTEST_FAILED : DONE;
}

/* ---------------------------------------------------------- 23. The sandbox
 *
 * A model, a prompt or a session may come from someone who knows of a bug in
 * this program.  So before it reads a byte of them it gives up what it does not
 * need: privileges, core dumps, with Landlock all files except those that
 * options name, with seccomp all system calls except those below.  --sandbox
 * auto uses what the system has; --sandbox require needs all of it.
 *
 * A denied call fails with EPERM and does not kill the program: a C library
 * that has changed is likelier than an attack.  Calls newer than the list fail
 * with ENOSYS, as on an older kernel: C libraries then use older ones.
 *
 * Linux only.  Its numbers are written out, so its headers are not needed. */

/* Sanitizers make system calls that it would deny. */
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define LFM2_NO_SANDBOX
#elif defined __has_feature
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || \
    __has_feature(memory_sanitizer)
#define LFM2_NO_SANDBOX
#endif
#endif

/* The number of this machine for ELF and seccomp; 0 if it is not supported. */
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

/* The directory where a chat may /save and /load: that of --save-dir, else the
 * current one unless that is or contains the home directory, where programs
 * keep what they run.  NULL: none. */
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

/* Something is missing, which is an error only with --sandbox require. */
static int lacks(const struct settings *s, const char *what, const char *why)
{
    if (s->sandbox == SANDBOX_REQUIRE)
        return say(FAILED, "--sandbox require: no %s: %s", what, why);
    if (s->verbose)
        note("sandbox: no %s: %s", what, why);
    return DONE;
}

/* ---- the session writer
 *
 * A new session is written to a file beside the old one, and then replaces it.
 * A process that may do that in a home directory can put anything there.  So a
 * child process outside of the sandbox does it, and only for this file: it is
 * sent a length and that many bytes, and answers with an exit code. */

static int writer = -1;                   /* its socket, or -1               */

/* Like replace_file(), for the session. */
static int write_session(const char *path, const struct text *t)
{
    unsigned char size[8], code;
    ssize_t got;
    int good;

    if (writer < 0)
        return replace_file(path, t);
    put_le(size, t->n, 8);
    good = write_all(writer, (char *)size, 8) == 0 &&
           write_all(writer, t->s, t->n) == 0;
    do
        got = good ? read(writer, &code, 1) : 0;
    while (got < 0 && errno == EINTR);
    return got > 0 ? code :
           say(BAD_FILE, "%s: cannot be saved: the process that writes it has "
               "ended", path);
}

#ifndef HAVE_SANDBOX

static int enter_sandbox(const struct settings *s)
{
    return s->sandbox == SANDBOX_OFF ? DONE :
           lacks(s, "sandbox", "it is not in this build");
}

#else

long syscall(long number, ...);           /* not in POSIX                    */

/* If this fails, confine_files() allows the session's directory instead. */
static void start_writer(const char *path)
{
    static const int ignored[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT };
    struct text t = { 0 };
    unsigned char size[8], code;
    int fd[2];
    pid_t pid;
    FILE *in;

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fd) != 0)
        return;
    fflush(stdout);
    pid = fork();
    if (pid > 0)
        writer = fd[0];
    else if (pid < 0)
        close(fd[0]);
    if (pid != 0) {
        close(fd[1]);
        return;
    }
    for (int i = 0; i < 4; i++)
        signal(ignored[i], SIG_IGN);
    close(STDIN_FILENO);
    close(STDOUT_FILENO);
    close(fd[0]);
    in = fdopen(fd[1], "r");
    while (in && fread(size, 1, 8, in) == 8) {
        const size_t n = (size_t)get_le(size, 8);
        t.n = 0;
        reserve(&t, n);
        t.n = fread(t.s, 1, n, in);
        if (t.n < n)
            break;
        code = (unsigned char)replace_file(path, &t);
        write_all(fd[1], (char *)&code, 1);
    }
    _exit(0);
}

/* ---- files: Landlock */

enum { PR_DUMPABLE = 4, PR_NO_NEW_PRIVS = 38, PATH_ONLY = 010000000 };
enum { CREATE_RULESET = 444, ADD_RULE, RESTRICT_SELF, PATH_BENEATH = 1 };

/* Access rights.  Those in IN_DIRS apply to directories only. */
enum {
    WRITE_FILE = 1 << 1, READ_FILE = 1 << 2, READ_DIR = 1 << 3,
    REMOVE_FILE = 1 << 5, MAKE_REG = 1 << 8, TRUNCATE = 1 << 14,
    IN_DIRS = 0x3ff8, READS = READ_FILE | READ_DIR,
    REPLACES = READ_FILE | WRITE_FILE | MAKE_REG | REMOVE_FILE
};

/* Allow access to a file, or to a directory and everything below it.  If that
 * fails, it stays forbidden. */
static void grant(int set, const char *path, uint64_t rights)
{
    struct { uint64_t rights; int32_t fd; } rule = {
        rights, open(path, PATH_ONLY | O_CLOEXEC)
    };
    struct stat st;

    if (fstat(rule.fd, &st) == 0 && !S_ISDIR(st.st_mode))
        rule.rights &= ~(uint64_t)IN_DIRS;
    syscall(ADD_RULE, set, PATH_BENEATH, &rule, 0);
    close(rule.fd);
}

/* Forbid all that the kernel's version of Landlock can forbid: files; TCP since
 * version 4; abstract sockets and signals to others since 6.  Then allow the
 * files that options name, the directory of a chat, and those that tell about
 * CPUs and memory.  Only files that exist can be allowed, so files to write are
 * created, unless the model cannot be read and nothing will be written. */
static int confine_files(const struct settings *s)
{
    static const uint64_t files[] = { 0, 0x1fff, 0x3fff, 0x7fff, 0x7fff,
                                      0xffff };
    static const char *const facts[] = {
        "/proc/self/status", "/proc/self/cgroup", "/sys/fs/cgroup",
        "/proc/meminfo"
    };
    const int creates = !s->model || access(s->model, R_OK) == 0;
    const long version = syscall(CREATE_RULESET, NULL, (size_t)0, 1);
    const uint64_t known = files[version < 1 ? 0 : version < 5 ? version : 5];
    const struct { uint64_t files, net, scopes; } is = {
        known, version >= 4 ? 3 : 0, version >= 6 ? 3 : 0
    };
    const int set = version < 1 ? -1 :
                    (int)syscall(CREATE_RULESET, &is, sizeof is, 0);
    struct text dir = { 0 };

    if (set < 0)
        return lacks(s, "Landlock", strerror(errno));
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &table[i];
        const int writes = o->kind == OUT_FILE;
        const char *path = o->kind != IN_FILE && !writes ? NULL :
                           *(const char *const *)((const char *)s + o->at);
        if (!path || is_dash(path))
            continue;
        if (creates && writes)
            close(open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
        grant(set, path, (writes ? READ_FILE | WRITE_FILE | TRUNCATE : READS) &
              known);
    }
    if (s->session && writer < 0) {
        add_directory(&dir, s->session);
        grant(set, dir.s, REPLACES & known);
        free(dir.s);
    }
    if (s->mode == CHAT && save_dir(s))
        grant(set, save_dir(s), (READS | REPLACES | TRUNCATE) & known);
    for (int i = 0; i < 4; i++)
        grant(set, facts[i], READ_FILE);
    if (syscall(RESTRICT_SELF, set, 0) != 0)
        return lacks(s, "Landlock", strerror(errno));
    close(set);
    if (s->verbose)
        note("sandbox: Landlock %ld", version);
    return DONE;
}

/* ---- system calls: seccomp */

/* A system call that is allowed if (argument number `arg` & mask) == is. */
struct system_call { long number; int arg; uint32_t mask, is; };

enum { EXECUTABLE = 4, A_THREAD = 0x10100, ITSELF = -1 };

#define CALL(name)        { SYS_##name, 0, 0, 0 }
#define IF(name, arg, is) { SYS_##name, arg, UINT32_MAX, is }
#define NOT(name, bits)   { SYS_##name, 2, bits, 0 }

/* Not every machine has all of them: newer ones have only the variants with
 * "at" in their names, 32-bit ones also variants with 64-bit arguments.  Which
 * files can be opened is up to Landlock.  No memory may become executable,
 * clone() may only make threads, and the process may only signal itself. */
static const struct system_call system_calls[] = {
    CALL(futex), CALL(write), CALL(writev), CALL(read), CALL(readv),
    CALL(close), CALL(lseek), CALL(fstat), CALL(fsync), CALL(brk),
    CALL(munmap), CALL(mremap), CALL(madvise), NOT(mprotect, EXECUTABLE),
    CALL(mincore), { SYS_clone, ELF_MACHINE == 22, A_THREAD, A_THREAD },
    CALL(set_robust_list), CALL(sched_getaffinity), CALL(sched_yield),
    CALL(getpid), CALL(gettid), CALL(exit), CALL(exit_group),
    CALL(restart_syscall), CALL(rt_sigaction), CALL(rt_sigprocmask),
    CALL(rt_sigreturn), CALL(sigaltstack), CALL(getrandom), CALL(getrusage),
    CALL(sysinfo), CALL(ppoll), CALL(openat), CALL(faccessat), CALL(ftruncate),
    CALL(fchmod), CALL(unlinkat), CALL(readlinkat), CALL(getcwd),
    CALL(renameat2), IF(tgkill, 0, (uint32_t)ITSELF),
    IF(fcntl, 1, F_GETFL), IF(fcntl, 1, F_SETFD), IF(fcntl, 1, F_SETLK),
    IF(ioctl, 1, TIOCGWINSZ), IF(ioctl, 1, 0x802c542a),
    IF(ioctl, 1, 0x402c542b),             /* TCGETS2 and TCSETS2             */
#if ELF_MACHINE == 21
    IF(ioctl, 1, 0x402c7413), IF(ioctl, 1, 0x802c7414),
#else
    IF(ioctl, 1, TCGETS), IF(ioctl, 1, TCSETS),
#endif
#ifdef SYS_mmap2
    NOT(mmap2, EXECUTABLE), CALL(_llseek), CALL(fstat64), CALL(fstatat64),
    CALL(stat64), CALL(lstat64), CALL(ftruncate64), IF(fcntl64, 1, F_GETFL),
    IF(fcntl64, 1, F_SETFD), IF(fcntl64, 1, F_SETLK),
#elif ELF_MACHINE == 22                   /* arguments are behind a pointer  */
    CALL(mmap), CALL(newfstatat),
#else
    NOT(mmap, EXECUTABLE), CALL(newfstatat),
#endif
#ifdef SYS_clock_gettime
    CALL(clock_gettime),
#endif
#ifdef SYS_clock_gettime64
    CALL(clock_gettime64), CALL(ppoll_time64), CALL(futex_time64),
#endif
#ifdef SYS_rseq
    CALL(rseq), CALL(statx),
#endif
#ifdef SYS_sigreturn
    CALL(sigreturn),
#endif
#ifdef SYS_renameat
    CALL(renameat),
#endif
#ifdef SYS_open
    CALL(poll), CALL(open), CALL(access), CALL(stat), CALL(lstat),
    CALL(readlink), CALL(unlink), CALL(rename),
#endif
    CALL(accept4), CALL(shutdown)         /* only for --serve                */
};

enum { N_CALLS = sizeof system_calls / sizeof *system_calls, N_SERVE = 2 };

/* BPF instructions, and the offsets of what they can load.  System calls have
 * the same numbers on all machines from NEWER on. */
enum {
    LOAD = 0x20, AND = 0x54, IF_EQUAL = 0x15, IF_AT_LEAST = 0x35, RETURN = 0x06,
    CALL_NUMBER = 0, MACHINE = 4, ARGUMENTS = 16, NEWER = 403
};

#define ALLOW      0x7fff0000u
#define FAIL(code) (0x00050000u | (unsigned)(code))

struct code { uint16_t op; uint8_t then, otherwise; uint32_t k; };

/* Allow the calls in the list; other architectures have other numbers. */
static int confine_calls(const struct settings *s)
{
    const uint32_t low = is_little_endian() ? 0 : 4, machine = ELF_MACHINE |
        (sizeof(void *) == 8 ? 0x80000000u : 0) | (low ? 0 : 0x40000000u);
    const int n_calls = N_CALLS - (s->mode == SERVE ? 0 : N_SERVE);
    struct code code[4 + 6 * N_CALLS + 3] = {
        { LOAD, 0, 0, MACHINE }, { IF_EQUAL, 1, 0, machine },
        { RETURN, 0, 0, FAIL(EPERM) }, { LOAD, 0, 0, CALL_NUMBER }
    }, *to = code + 4;
    struct { unsigned short n; struct code *code; } filter = { 0, code };

    for (int i = 0; i < n_calls; i++, to += 6) {
        const struct system_call *c = &system_calls[i];
        const struct code one[6] = {
            { IF_EQUAL, 0, 5, (uint32_t)c->number },
            { LOAD, 0, 0, ARGUMENTS + 8 * (uint32_t)c->arg + low },
            { AND, 0, 0, c->mask },
            { IF_EQUAL, 0, 1, c->is == (uint32_t)ITSELF ?
              (uint32_t)getpid() : c->is },
            { RETURN, 0, 0, ALLOW }, { LOAD, 0, 0, CALL_NUMBER }
        };
        memcpy(to, one, sizeof one);
    }
    *to++ = (struct code){ IF_AT_LEAST, 0, 1, NEWER };
    *to++ = (struct code){ RETURN, 0, 0, FAIL(ENOSYS) };
    *to++ = (struct code){ RETURN, 0, 0, FAIL(EPERM) };
    filter.n = (unsigned short)(to - code);
    if (syscall(SYS_seccomp, 1, 0, &filter) != 0)
        return lacks(s, "seccomp", strerror(errno));
    if (s->verbose)
        note("sandbox: seccomp");
    return DONE;
}

/* May these calls be made at all?  Under a sandbox that answers them with a
 * signal, as on Android, a child process that tries dies of it.  One that
 * allows no child processes is not expected to do that. */
static int is_answered(long number, int n_calls)
{
    const pid_t pid = fork();
    int status = 0;

    if (pid == 0) {
        signal(SIGSYS, SIG_DFL);
        for (int i = 0; i < n_calls; i++)
            syscall(number + i, -1L, 0L, 0L, 0L);
        _exit(0);
    }
    return pid < 0 || waitpid(pid, &status, 0) < 0 || !WIFSIGNALED(status);
}

/* The time zone is in a file, so it is read before. */
static int enter_sandbox(const struct settings *s)
{
    static const char by_signal[] = "this system answers it with a signal";
    int calls, files, code;

    if (s->sandbox == SANDBOX_OFF)
        return DONE;
    tzset();
    setrlimit(RLIMIT_CORE, &(struct rlimit){ 0, 0 });
    signal(SIGCHLD, SIG_DFL);             /* or waitpid() may not work       */
    calls = is_answered(SYS_seccomp, 1);
    files = is_answered(CREATE_RULESET, 3);
    if (s->session)
        start_writer(s->session);
    if (syscall(SYS_prctl, PR_NO_NEW_PRIVS, 1L, 0L, 0L, 0L) != 0)
        return lacks(s, "sandbox", strerror(errno));
    syscall(SYS_prctl, PR_DUMPABLE, 0L, 0L, 0L, 0L);
    code = files ? confine_files(s) : lacks(s, "Landlock", by_signal);
    if (code != DONE)
        return code;
    return calls ? confine_calls(s) : lacks(s, "seccomp", by_signal);
}

#endif

/* --------------------------------------------------- 24. Answers in a schema
 *
 * An answer can be forced to be JSON of a schema, or calls of tools.  The
 * schema is compiled into patterns, and a guide follows them byte by byte as
 * the answer comes: it knows which bytes may be next, and whether the answer
 * may end.  The token that the model chooses is taken if it fits; otherwise the
 * model chooses again, among the tokens that do.  So every answer that ends is
 * valid, and one that is cut off is the beginning of a valid one.
 *
 * Of all the ways to write a value, patterns allow these: only the members that
 * the schema names, in its order; at most one space after a comma or a colon;
 * numbers of at most 18 digits.  An unknown keyword is refused, not ignored.
 *
 * Calls are written in Python: [name(key="value", other=True)].  Their markers
 * are control tokens, which are the bytes 1 and 2 in patterns.
 *
 * A pattern is text that stands for itself, except
 *
 *     \x       the byte x             [azAZ]     a byte from a to z or A to Z
 *     (a|b|c)  a, b or c              {2,5:a}    a, two to five times
 *     !x       not before an x        .          the end of a rule
 *     @7;      rule 7                 >7;        rule 7 in place of the rest
 *     #a\n     the word a, or else the next word, without what is between them
 *     $b\n     the word b, which has no next.  Adjacent words, as those of an
 *              enum, all continue after the last of them.
 *
 * The schema {"properties": {"id": {"type": "integer"}, "tag": {"type":
 * "string"}}, "required": ["tag"]} becomes rule 7, its members 8 and 9:
 *
 *     7  (\{#"id":\n( |)@8;,( |)$"tag":\n( |)@9;\}).
 *     8  ((-|)(0|[19]{0,14:[09]})).
 *     9  ("{0,2147483647:@2;}").           rule 2 is a character of a string
 *
 * After {"tag": "ab the guide has a stack of two frames:
 *
 *     7  ...$"tag":\n( |)@9;\}).       9  ("{0,2147483647:@2;}").
 *                           ^               ^ the loop, once more
 *
 * So a character may be next; or a quote, and then a brace.  A text that can be
 * parsed in several ways has several stacks. */

enum {
    MAX_RULES = 4096, MAX_FRAMES = 64, MAX_STACKS = 32, MAX_WORD = 4000,
    MAX_WORDS = 8192, MAX_STEPS = 1 << 20, NEVER = 255,
    CALL_OPENS = 1, CALL_CLOSES = 2
};

/* An element of a pattern: a byte, one of the forms above, a bracket or bar. */
struct step {
    int before, next;                     /* the steps around it             */
    int to;                               /* from @ > to the rule, # to the
                                             next word, ( | to the next | or
                                             ), between { and }              */
    int least, most;                      /* times, or the length of a word  */
    int need;                             /* more frames, to end the rule    */
};

struct schema {
    struct text pattern;                  /* all rules                       */
    struct step *step;                    /* [pattern.n]: where each begins  */
    int root;                             /* where an answer begins          */
    int in_free_text;                     /* only calls are guided           */
    int one_call;
};

/* A step of a rule, and how often the rule has been through its loop, or how
 * many bytes of the word have come.  Inner loops are in rules of their own. */
struct frame { int32_t at, n; };

/* One way to parse the text so far: rules, each called by the one before. */
struct stack { int n; struct frame frame[MAX_FRAMES]; };

struct guide {
    const struct schema *s;
    int has_begun, in_call;
    int n;                                /* stacks                          */
    struct stack stack[MAX_STACKS];
    int c;                                /* the byte that is tried, or EOF  */
    struct frame below[MAX_FRAMES];       /* frames under the one followed   */
};

/* ---- one byte */

static void copy_guide(struct guide *to, const struct guide *from)
{
    memcpy(to, from, offsetof(struct guide, stack));
    for (int i = 0; i < from->n; i++)
        memcpy(&to->stack[i], &from->stack[i], offsetof(struct stack, frame) +
               (size_t)from->stack[i].n * sizeof *to->stack->frame);
}

/* Keep the stack of n frames below and `top`, without rules that have ended.  A
 * stack too many is dropped: the others still lead to valid answers. */
static void keep_stack(struct guide *g, int n, struct frame top)
{
    struct stack *s = &g->stack[g->n];

    if (g->n == MAX_STACKS)
        return;
    while (n > 0 && g->s->pattern.s[top.at] == '.')
        top = g->below[--n];
    if (g->s->pattern.s[top.at] == '}')
        top.at = g->s->step[top.at].to;
    s->n = n + 1;
    memcpy(s->frame, g->below, (size_t)n * sizeof top);
    s->frame[n] = top;
    for (int i = 0; i < g->n; i++)
        if (g->stack[i].n == s->n && memcmp(g->stack[i].frame, s->frame,
                                            (size_t)s->n * sizeof top) == 0)
            return;
    g->n++;
}

/* The first f.n bytes of the word at f.at have come.  Of this word and the next
 * ones, keep the first that goes on with g->c after these bytes.  Returns the
 * first that consists of these bytes, or -1. */
static int follow_word(struct guide *g, int n, struct frame f)
{
    const char *const pattern = g->s->pattern.s;
    int whole = -1, longer = -1;

    for (int at = f.at;; at = g->s->step[at].to) {
        const struct step *p = &g->s->step[at];
        const char *const word = pattern + at + 1;
        int *const found = p->least == f.n ? &whole : &longer;
        if (*found < 0 && (p->least == f.n ||
            (p->least > f.n && (unsigned char)word[f.n] == g->c)) &&
            n + g->s->step[p->next].need < MAX_FRAMES &&
            memcmp(word, pattern + f.at + 1, (size_t)f.n) == 0)
            *found = at;
        if (pattern[at] == '$')
            break;
    }
    if (longer >= 0)
        keep_stack(g, n, (struct frame){ longer, f.n + 1 });
    return whole;
}

/* Does the byte fit a step that takes one? */
static int takes(const struct schema *s, int at, int c)
{
    const unsigned char *p = (const unsigned char *)s->pattern.s + at;

    if (*p != '[')
        return c == p[*p == '\\'];
    for (p++; *p != ']'; p += 2)
        if (c >= p[0] && c <= p[1])
            return 1;
    return 0;
}

/* From frame f, with n frames below it, go through all steps that take no byte,
 * and keep a stack for each that takes g->c.  If that is EOF, g->n counts the
 * ends reached instead.  Nothing is begun that MAX_FRAMES would not let end.
 * Loops without a bound stop counting at their minimum: that saves stacks. */
static void advance_stack(struct guide *g, int n, struct frame f)
{
    const char *const pattern = g->s->pattern.s;
    const struct step *const step = g->s->step;

    for (;;) {
        const struct step *p = &step[f.at];
        if (n + p->need >= MAX_FRAMES)
            return;
        switch (pattern[f.at]) {
        case '(':
            for (int i = f.at; pattern[i] != ')'; i = step[i].to)
                advance_stack(g, n, (struct frame){ step[i].next, f.n });
            return;
        case '{':
            if (f.n >= p->least)
                advance_stack(g, n, (struct frame){ step[p->to].next, 0 });
            if (f.n >= p->most)
                return;
            f.n += f.n < p->least || p->most < INT_MAX;
            f.at = p->next;
            break;
        case '}': case '>':
            f.at = p->to;
            break;
        case '!':
            if (g->c == pattern[f.at + 1])
                return;
            f.at = p->next;
            break;
        case '@':
            g->below[n++] = (struct frame){ p->next, f.n };
            f = (struct frame){ p->to, 0 };
            break;
        case '#': case '$':
            f.at = follow_word(g, n, f);
            if (f.at < 0)
                return;
            f = (struct frame){ step[f.at].next, 0 };
            break;
        case '.':
            if (n == 0)
                g->n += g->c == EOF;
            else {
                f = g->below[n - 1];
                advance_stack(g, n - 1, f);
                g->below[n - 1] = f;
            }
            return;
        default:
            if (takes(g->s, f.at, g->c))
                keep_stack(g, n, (struct frame){ p->next, f.n });
            return;
        }
    }
}

/* The guide after one more byte, or at EOF.  Returns whether that fits. */
static int guide_byte(const struct guide *from, struct guide *to, int c)
{
    to->s = from->s;
    to->has_begun = 1;
    to->in_call = from->has_begun ? from->in_call : c == CALL_OPENS;
    to->n = 0;
    to->c = c;
    if (!from->has_begun)
        advance_stack(to, 0, (struct frame){ to->s->root, 0 });
    for (int i = 0; from->has_begun && i < from->n; i++) {
        const struct stack *s = &from->stack[i];
        memcpy(to->below, s->frame, (size_t)s->n * sizeof *s->frame);
        advance_stack(to, s->n - 1, s->frame[s->n - 1]);
    }
    return to->n > 0;
}

/* May the answer end here? */
static int guide_may_end(const struct guide *g)
{
    struct guide end;

    return guide_byte(g, &end, EOF);
}

/* Must the answer end here? */
static int guide_is_done(const struct guide *g)
{
    struct guide next;
    int c = guide_may_end(g) ? 1 : 0;

    while (c > 0 && c < 256 && !guide_byte(g, &next, c))
        c++;
    return c == 256;
}

/* ---- connecting the steps */

/* What a rule is made from: a schema within a whole one; as a value, or as the
 * arguments of a call, which may have any values if they are LOOSE. */
struct rule {
    const struct json *from, *whole;      /* from: NULL if there is none     */
    enum { VALUE, STRICT, LOOSE } as;
    int python, is_choice;
    int start;                            /* of its pattern                  */
    struct phrase place;                  /* " at properties.name"           */
};

struct maker {
    struct schema *s;
    struct text *out;                     /* the patterns                    */
    struct rule *rule;                    /* [MAX_RULES]                     */
    int n_rules, n_words;
    size_t word;                          /* where the latest one begins     */
    struct why *why;
    int code;                             /* DONE, until something is wrong  */
};

/* Find the steps in the patterns, and where each leads.  Until the | or bracket
 * that belongs to an open one is found, `to` of the open one is the one around
 * it.  At last `next` passes over other alternatives, and over other words. */
static void link_steps(const struct maker *m)
{
    struct schema *s = m->s;
    int open = -1, word = 0, before = 0;

    s->step = zeroed(s->pattern.n, sizeof *s->step);
    for (int i = 0; i < (int)s->pattern.n; i = s->step[i].next) {
        const char c = s->pattern.s[i];
        char *end = s->pattern.s + i + 1;
        struct step *p = &s->step[i];
        p->need = NEVER;
        p->before = before;
        before = i;
        if (strchr("@>{", c)) {
            p->to = p->least = (int)strtol(end, &end, 10);
            if (c == '{')
                p->most = (int)strtol(end + 1, &end, 10);
            else
                p->to = m->rule[p->to].start;
        } else if (strchr("#$", c)) {
            end += p->least = (int)strcspn(end, "\n");
            s->step[word].to = i;
            word = c == '#' ? i : 0;
        }
        while (c == '[' && *end != ']')
            end += 2;
        p->next = (int)(end - s->pattern.s) + !!strchr("@>{#$[\\!", c);
        if (c == '(' || c == '{') {
            p->to = open;
            open = i;
        } else if (c == '|' || c == ')' || c == '}') {
            const int around = s->step[open].to;
            s->step[open].to = i;
            p->to = c == '|' ? around : c == ')' ? p->next : open;
            open = c == '|' ? i : around;
        }
    }
    while ((before = s->step[before].before) > 0) {
        int *next = &s->step[before].next;
        while (strchr("|)", s->pattern.s[*next]))
            *next = s->step[*next].to;
        if (s->pattern.s[before] == '#' && strchr("#$", s->pattern.s[*next]))
            *next = s->step[*next].next;
    }
}

/* The fewest frames it takes from each step to the end of its rule, improved
 * until nothing changes.  A rule that always contains itself stays at NEVER. */
static void count_frames(struct schema *s)
{
    const char *const pattern = s->pattern.s;
    int changed = 1;

    while (changed) {
        changed = 0;
        for (int i = (int)s->pattern.n - 1; i > 0; i = s->step[i].before) {
            struct step *p = &s->step[i], *to = &s->step[p->to];
            int need = pattern[i] == '.' ? 0 : s->step[p->next].need;
            if (pattern[i] == '(') {
                need = NEVER;
                for (int k = i; pattern[k] != ')'; k = s->step[k].to)
                    need = smaller(need, s->step[s->step[k].next].need);
            } else if (pattern[i] == '{' && p->least == 0)
                need = smaller(need, s->step[to->next].need);
            else if (pattern[i] == '#')
                need = smaller(need, to->need);
            else if (pattern[i] == '>')
                need = to->need;
            else if (pattern[i] == '@')
                need = to->need >= MAX_FRAMES || need == NEVER ? NEVER :
                       to->need < need ? need : to->need + 1;
            changed |= need != p->need;
            p->need = need;
        }
    }
}

/* ---- from a schema to patterns
 *
 * A rule is numbered when it is first referred to, and its pattern is written
 * later, in the order of the numbers.  So a schema becomes one rule, even if it
 * is referred to many times, or contains itself. */

enum { IS_NULL = 1, IS_BOOLEAN = 2, IS_INTEGER = 4, IS_NUMBER = 8,
       IS_STRING = 16, IS_ARRAY = 32, IS_OBJECT = 64, IS_ALL = 127,
       VALUES = 128, ANY_OF = 256, REF = 512, NOTE = -1 };

static const char type_list[] =
    ": expected null boolean integer number string array object";

/* The keywords, the kinds of schemas that may have them, and the type of their
 * value; 0 if there are several.  A NOTE changes nothing. */
static const struct keyword { const char *names; int of, type; } keywords[] = {
    { "title description default examples deprecated readOnly writeOnly "
      "$schema $id $comment $defs definitions", NOTE, 0 },
    { "type", IS_ALL | VALUES, 0 }, { "const", VALUES, 0 }, { "$ref", REF, 0 },
    { "enum", VALUES, JSON_ARRAY }, { "anyOf", ANY_OF, 0 },
    { "properties", IS_OBJECT, JSON_OBJECT },
    { "required", IS_OBJECT, JSON_ARRAY },
    { "additionalProperties", IS_OBJECT, 0 }, { "items", IS_ARRAY, 0 },
    { "minItems maxItems", IS_ARRAY, 0 },
    { "minLength maxLength", IS_STRING, 0 }
};

static struct json object_type = { .type = JSON_STRING, .s = "object", .n = 6,
                                   .key = "type", .n_key = 4 };
static const struct json anything = { .type = JSON_OBJECT };
static const struct json any_object = { .type = JSON_OBJECT, .n_members = 1,
                                        .first = &object_type };

/* Rules that are always there.  A character of a string is UTF-8 or an escape,
 * surrogates only in pairs.  No string in a call may contain "<|", which begins
 * the end marker.  ROOT has no pattern, but the whole schema of an answer. */
enum { ROOT, COMMON_CHAR, JSON_CHAR, DOUBLE_CHAR, SINGLE_CHAR, JSON_KEY,
       PYTHON_KEY };

#define MORE  "[\x80\xbf]"
#define HEX_2 "[09afAF][09afAF]"

static const char *const fixed[] = {
    [ROOT] = "", [COMMON_CHAR] =
    "([\xc2\xdf]" MORE "|([\xe0\xe0][\xa0\xbf]|[\xe1\xec\xee\xef]" MORE
    "|[\xed\xed][\x80\x9f]|([\xf0\xf0][\x90\xbf]|[\xf1\xf3]" MORE
    "|[\xf4\xf4][\x80\x8f])" MORE ")" MORE "|\\\\([\"\"\\\\bbffnnrrtt]"
    "|u([09acefACEF][09afAF]" HEX_2 "|[ddDD]([07]" HEX_2
    "|[89abAB]" HEX_2 "\\\\u[ddDD][cfCF]" HEX_2 "))))",
    [JSON_CHAR] = "([ !#[^\x7f]|]|>1;|\\\\/)",
    [DOUBLE_CHAR] = "([ !#;=[^\x7f]|]|<!||>1;|\\\\')",
    [SINGLE_CHAR] = "([ &(;=[^\x7f]|]|<!||>1;|\\\\')",
    [JSON_KEY] = "\"{0,2147483647:@2;}\"",
    [PYTHON_KEY] = "(\"{0,2147483647:@3;}\"|'{0,2147483647:@4;}')"
};

/* Only the first reason is kept. */
#define refuse(m, ...) ((m)->code = (m)->code != DONE ? (m)->code : \
                        because((m)->why, USAGE, __VA_ARGS__))

/* Refuse a keyword or its value. */
static void wrong(struct maker *m, int at, const char *key, const char *what)
{
    refuse(m, "\"%.60s\"%s%s", key, m->rule[at].place.s, what);
}

static const struct keyword *find_keyword(const char *key)
{
    for (size_t i = 0; i < sizeof keywords / sizeof *keywords; i++)
        if (find_word(keywords[i].names, ' ', key) >= 0)
            return &keywords[i];
    return NULL;
}

/* The types that "type" names, or 0 if it is wrong. */
static int named_types(const struct json *type)
{
    const char *const names = strstr(type_list, "null");
    const struct json *x = json_is(type, JSON_ARRAY) ? type->first : type;
    int types = 0;

    for (; x; x = type->type == JSON_ARRAY ? x->next : NULL) {
        const int i = find_word(names, ' ', json_text(x) ? x->s : "");
        if (i < 0)
            return 0;
        types |= 1 << i;
    }
    return types & IS_NUMBER ? types & ~IS_INTEGER : types;
}

/* The kind of a schema: a set of types, or VALUES, ANY_OF or REF.  Without
 * "type", the types are those that have its keywords. */
static int kind_of(const struct json *v)
{
    int types = 0;

    if (json_get(v, "$ref") || json_get(v, "anyOf"))
        return json_get(v, "$ref") ? REF : ANY_OF;
    if (json_get(v, "enum") || json_get(v, "const"))
        return VALUES;
    if (json_get(v, "type"))
        return named_types(json_get(v, "type"));
    for (const struct json *x = v->first; x; x = x->next) {
        const struct keyword *k = find_keyword(x->key);
        types |= k && k->of != NOTE ? k->of & IS_ALL : 0;
    }
    return types ? types : IS_ALL - IS_INTEGER;
}

/* All keywords must be known and go together.  Clients send bounds of integers
 * that always hold, as the pattern of one has at most 15 digits. */
static void check_keywords(struct maker *m, const struct json *v, int kind,
                           int at)
{
    for (const struct json *x = v->first; x; x = x->next) {
        const struct keyword *k = find_keyword(x->key);
        double by = 0;
        json_double(x, &by);
        if (kind == IS_INTEGER &&
            ((strcmp(x->key, "minimum") == 0 && by <= -1e15) ||
             (strcmp(x->key, "maximum") == 0 && by >= 1e15)))
            continue;
        if (!k)
            wrong(m, at, x->key, " is not known here");
        else if (!(k->of & kind))
            wrong(m, at, x->key, " does not go with the other keywords");
        else if (k->type && x->type != k->type)
            wrong(m, at, x->key, phrase(": expected %s",
                                        json_names[k->type]).s);
    }
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

static int add_rule(struct maker *m, struct rule r)
{
    if (m->n_rules == MAX_RULES) {
        refuse(m, "a schema of more than %d parts", MAX_RULES);
        return ROOT;
    }
    m->rule[m->n_rules] = r;
    return m->n_rules++;
}

/* The number of the rule for v, or for the schema that its "$ref" leads to.  It
 * is `keyword`, or the member `key` of that, in the schema of rule `at`. */
static int rule_of(struct maker *m, const struct json *v, int at,
                   const char *keyword, const char *key)
{
    const struct rule *in = &m->rule[at];
    const char *const place = in->place.s;
    const struct json *ref;
    int i = 0;

    for (int hops = 0; v && (ref = json_get(v, "$ref")); hops++) {
        check_keywords(m, v, REF, at);
        v = json_text(ref) && hops < 64 ? follow_ref(in->whole, ref->s) : NULL;
        if (!v)
            wrong(m, at, "$ref", phrase(" leads nowhere: %.60s",
                  json_text(ref) ? ref->s : "not a string").s);
    }
    while (i < m->n_rules && (m->rule[i].from != v || m->rule[i].as != VALUE ||
                              m->rule[i].python != in->python))
        i++;
    if (i < m->n_rules)
        return i;
    return add_rule(m, (struct rule){
        .from = v, .whole = in->whole, .python = in->python,
        .place = phrase("%.70s%s%s%s%.40s", place, !*keyword ? "" : *place ?
                        "." : " at ", keyword, key ? "." : "", key ? key : "")
    });
}

/* ---- words */

static const char *const quotes[] = { "\"", "\"'" };    /* JSON, Python    */

/* A value, key or name, and `after`.  A string becomes a word in each of these
 * quotes, or one without quotes. */
static void add_word(struct maker *m, int at, const struct json *v,
                     const char *in, const char *after)
{
    struct text *to = m->out;
    size_t n;

    do {
        m->word = to->n;
        add_string(to, "#");
        if (v->type != JSON_STRING)
            add_tree(to, v, m->rule[at].python);
        else if (*in)
            add_in_quotes(to, v->s, v->n, *in++);
        else
            add(to, v->s, v->n);
        add_string(to, after);
        n = to->n - m->word - 1;
        if (n > MAX_WORD)
            refuse(m, "a word%s of %zu bytes, expected at most %d",
                   m->rule[at].place.s, n, MAX_WORD);
        if (m->n_words++ == MAX_WORDS)
            refuse(m, "a schema of more than %d words", MAX_WORDS);
        add_string(to, "\n");
    } while (v->type == JSON_STRING && *in);
}

/* "enum" or "const": those of the values that have the "type". */
static void add_values(struct maker *m, const struct json *v, int at)
{
    static const int type_of[] = { IS_NULL, IS_BOOLEAN, IS_BOOLEAN, IS_NUMBER,
                                   IS_STRING, IS_ARRAY, IS_OBJECT };
    const struct json *list = json_get(v, "enum"), *one = json_get(v, "const");
    const struct json *type = json_get(v, "type");
    const int types = type ? named_types(type) : IS_ALL, before = m->n_words;

    if (list && one)
        wrong(m, at, "enum", " does not go with \"const\"");
    for (const struct json *x = list ? list->first : one; x && m->code == DONE;
         x = list ? x->next : NULL) {
        double n = 0.5;
        json_double(x, &n);
        if (types & (type_of[x->type] | (n == floor(n) ? IS_INTEGER : 0)))
            add_word(m, at, x, quotes[m->rule[at].python], "");
    }
    if (m->n_words == before)
        refuse(m, "\"enum\" or \"const\"%s: no value is of the type",
               m->rule[at].place.s);
    else
        m->out->s[m->word] = '$';
}

/* ---- arrays, objects, arguments */

/* From `min` to `max` items in brackets. */
static void add_series(struct maker *m, const char *open, const char *item,
                       int min, int max, const char *close)
{
    add_string(m->out, open);
    if (max > 0)
        add_format(m->out, "(%s%s{%d,%d:,( |)%s})", min > 0 ? "" : "|", item,
                   min - (min > 0), max - (max < INT_MAX), item);
    add_string(m->out, close);
}

static int is_required(const struct json *list, const struct json *x)
{
    const struct json *v = list ? list->first : NULL;

    while (v && (v->type != JSON_STRING || v->n != x->n_key ||
                 memcmp(v->s, x->key, v->n) != 0))
        v = v->next;
    return v != NULL;
}

static void check_members(struct maker *m, const struct json *v, int at)
{
    const struct json *list = json_get(v, "required");
    const struct json *properties = json_get(v, "properties");
    const struct json *more = json_get(v, "additionalProperties");

    if (more && (properties || more->type != JSON_OBJECT) &&
        !json_is(more, JSON_FALSE) && !json_is(more, JSON_TRUE))
        wrong(m, at, "additionalProperties", ": expected false");
    for (const struct json *x = list ? list->first : NULL;
         x && m->code == DONE; x = x->next)
        if (x->type != JSON_STRING || !properties ||
            !find_key(properties, x->s, x->n))
            wrong(m, at, "required", phrase(" names %.60s, which is not a "
                  "property", x->type == JSON_STRING ? x->s :
                  "something").s);
}

/* The members that a schema names, after "key": in an object or a dict, and
 * after key= in arguments.  It may end where no more members are required.
 * Without "properties", there may be any members. */
static void add_object(struct maker *m, const struct json *v, int at)
{
    const struct rule *r = &m->rule[at];
    const int is_dict = r->as == VALUE;
    const char *const close = is_dict ? "\\}" : "\\)";
    const struct json *list = json_get(v, "required");
    const struct json *properties = json_get(v, "properties");
    const struct json *more = json_get(v, "additionalProperties");
    const struct json *const first = properties ? properties->first : NULL;
    int left = 0, n_open = 0;

    if (list && list->n_members > MAX_MEMBERS)
        wrong(m, at, "required", " names more than 1024 properties");
    if (r->as != LOOSE)
        check_members(m, v, at);
    if (!properties && !json_is(more, JSON_FALSE)) {
        const int rule = rule_of(m, json_is(more, JSON_OBJECT) ? more :
                                 &anything, at, "additionalProperties", NULL);
        add_series(m, "\\{", phrase("@%d;:( |)@%d;", r->python ? PYTHON_KEY :
                   JSON_KEY, rule).s, 0, MAX_MEMBERS, "\\}");
        return;
    }
    for (const struct json *x = first; x && m->code == DONE; x = x->next)
        left += is_required(list, x);
    add_string(m->out, is_dict ? "\\{" : "\\(");
    for (const struct json *x = first; x && m->code == DONE; x = x->next) {
        const struct json key = { .type = JSON_STRING, .s = x->key,
                                  .n = x->n_key };
        const int required = is_required(list, x);
        if (left == 0) {
            add_format(m->out, "(%s|", close);
            n_open++;
        }
        add_string(m->out, x == first ? "" : ",( |)");
        add_word(m, at, &key, is_dict ? quotes[r->python] : "",
                 is_dict ? ":" : "=");
        if (required || !x->next)
            m->out->s[m->word] = '$';
        left -= required;
        add_format(m->out, "( |)@%d;", rule_of(m, r->as == LOOSE ? &anything :
                                               x, at, "properties", x->key));
    }
    add_string(m->out, close);
    while (n_open-- > 0)
        add_string(m->out, ")");
}

static int is_object(const struct json *v)
{
    return json_is(v, JSON_OBJECT) && kind_of(v) == IS_OBJECT;
}

static int is_name(const char *s, size_t n)
{
    struct reader r = { .at = (char *)(uintptr_t)s };

    return n > 0 && read_name(&r).n == n;
}

/* What follows the name of a function: (key=value), or ({"a key": value}) if a
 * key is not a name.  Without "parameters" there are no arguments. */
static void add_arguments(struct maker *m, const struct json *v, int at)
{
    const struct json *properties = json_get(v, "properties");
    const struct json *x = properties ? properties->first : NULL;
    const int strict = m->rule[at].as == STRICT;

    while (x && is_name(x->key, x->n_key))
        x = x->next;
    if (v == &anything)
        add_string(m->out, "\\(\\)");
    else if (is_object(v) && json_is(properties, JSON_OBJECT) && !x) {
        if (strict)
            check_keywords(m, v, IS_OBJECT, at);
        add_object(m, v, at);
    } else {
        const int rule = rule_of(m, strict ? v : &any_object, at, "", NULL);
        if (!is_object(m->rule[rule].from))
            refuse(m, "the parameters%s: expected the schema of an object",
                   m->rule[at].place.s);
        add_format(m->out, "\\(@%d;\\)", rule);
    }
}

/* ---- schemas */

static void add_type(struct maker *m, const struct json *v, int type, int at)
{
    static const char *const plain[] = {
        "null", "true|false", "(-|)(0|[19]{0,14:[09]})",
        "(-|)(0|[19]{0,17:[09]})(\\.{1,18:[09]}|)([eeEE]([++--]|){1,2:[09]}|)",
        "None", "True|False"
    };
    static const char *const bounds[][2] = { { "minLength", "maxLength" },
                                             { "minItems", "maxItems" } };
    const char *const *const key = bounds[1 << type == IS_ARRAY];
    const struct json *items = json_get(v, "items");
    const int python = m->rule[at].python;
    long long n[2] = { 0, INT_MAX };

    for (int i = 0; i < 2 && (1 << type & (IS_STRING | IS_ARRAY)); i++)
        if (json_get(v, key[i]) &&
            json_int(json_get(v, key[i]), 0, INT_MAX, &n[i]) != 0)
            wrong(m, at, key[i], ": expected a whole number");
    if (n[0] > n[1])
        wrong(m, at, key[0], phrase(" is more than \"%s\"", key[1]).s);
    switch (1 << type) {
    case IS_ARRAY:
        add_series(m, "\\[", phrase("@%d;", rule_of(m, items ? items :
                   &anything, at, "items", NULL)).s, (int)n[0], (int)n[1], "]");
        break;
    case IS_OBJECT:
        add_object(m, v, at);
        break;
    case IS_STRING:
        add_format(m->out, "\"{%lld,%lld:@%d;}\"", n[0], n[1],
                   python ? DOUBLE_CHAR : JSON_CHAR);
        if (python)
            add_format(m->out, "|'{%lld,%lld:@%d;}'", n[0], n[1], SINGLE_CHAR);
        break;
    default:
        add_string(m->out, plain[type < 2 && python ? type + 4 : type]);
    }
}

static void add_schema(struct maker *m, const struct json *v, int at)
{
    const struct json *type = json_get(v, "type"), *list = json_get(v, "anyOf");
    const int kind = v->type == JSON_OBJECT ? kind_of(v) : 0;

    if (v->type != JSON_OBJECT)
        refuse(m, "expected a schema%s", m->rule[at].place.s);
    else if (type && !named_types(type))
        wrong(m, at, "type", type_list);
    else
        check_keywords(m, v, kind, at);
    if (kind == ANY_OF && (list->type != JSON_ARRAY || !list->first ||
                           list->n_members > MAX_WORDS))
        wrong(m, at, "anyOf", ": expected an array of schemas");
    m->rule[at].is_choice = kind == ANY_OF;
    if (m->code == DONE && kind == VALUES)
        add_values(m, v, at);
    else if (kind == ANY_OF)
        for (list = list->first; list && m->code == DONE; list = list->next)
            add_format(m->out, ">%d;", rule_of(m, list, at, "anyOf", NULL));
    else
        for (int i = 0, n = 0; 1 << i < IS_ALL && m->code == DONE; i++)
            if (kind >> i & 1) {
                add_string(m->out, n++ ? "|" : "");
                add_type(m, v, i, at);
            }
}

/* Replace all choices within a choice by what they are between, each once: with
 * choices that contain each other, advance_stack() would not end. */
static void flatten(struct maker *m, int at)
{
    int list[MAX_RULES] = { at }, n = 1, n_found = 0;
    char seen[MAX_RULES] = { 0 };
    const int start = (int)m->out->n;

    seen[at] = 1;
    for (int i = 0; i < n; i++) {
        const struct rule *r = &m->rule[list[i]];
        if (!r->is_choice)
            add_format(m->out, "%s>%d;", n_found++ ? "|" : "(", list[i]);
        for (int k = r->start; r->is_choice && m->out->s[k] != ')'; k++)
            if (m->out->s[k] == '>') {
                const int rule = (int)strtol(m->out->s + k + 1, NULL, 10);
                if (!seen[rule])
                    list[n++] = rule;
                seen[rule] = 1;
            }
    }
    if (n_found == 0)
        add_format(m->out, "(>%d;", at);
    if (n_found > MAX_STACKS)
        wrong(m, at, "anyOf", phrase(": more than %d alternatives",
                                     MAX_STACKS).s);
    add_string(m->out, ").");
    m->rule[at].start = start;
}

/* ---- calls */

struct call_form {
    const struct json *tools;             /* NULL: none                      */
    const char *name;                     /* only this one; NULL: any        */
    int is_forced, is_single;
};

/* Must arguments have the values that the parameters of a tool describe?  As it
 * says itself, or `otherwise`. */
static int is_strict(const struct json *tool, int otherwise)
{
    json_bool(member(function_of(tool), "strict"), &otherwise);
    return otherwise;
}

/* Add the rule for a call: the names of the tools, each with a rule for the
 * arguments after it.  Returns its number. */
static int add_call(struct maker *m, const struct call_form *form)
{
    const int rule = add_rule(m, (struct rule){ .start = (int)m->out->n });

    for (const struct json *x = form->tools->first; x && m->code == DONE;
         x = x->next) {
        const struct json *f = function_of(x), *name = json_get(f, "name");
        const struct json *v = member(f, "parameters");
        if (form->name && !is_word(name, form->name))
            continue;
        if (!json_is(name, JSON_STRING) || !is_name(name->s, name->n)) {
            refuse(m, "a tool is called %.60s, expected a name",
                   json_text(name) ? name->s : "nothing");
            break;
        }
        v = v ? v : &anything;
        const int arguments = add_rule(m, (struct rule){
            .from = v, .whole = v, .python = 1,
            .as = is_strict(x, form->is_forced) ? STRICT : LOOSE,
            .place = phrase(" at %.60s", name->s)
        });
        add_word(m, arguments, name, "", "");
        add_format(m->out, ">%d;", arguments);
    }
    if (m->n_words == 0)
        refuse(m, "\"tool_choice\": no tool is called %.60s", form->name);
    else
        m->out->s[m->word] = '$';
    add_string(m->out, ".");
    return rule;
}

/* ---- what a request asks for */

static void free_schema(struct schema *s)
{
    if (!s)
        return;
    free(s->pattern.s);
    free(s->step);
    free(s);
}

/* The patterns for an answer of this schema, for calls, or for either one.
 * Calls that are not forced may be left out. */
static void make_patterns(struct maker *m, const struct json *answer,
                          const struct call_form *calls)
{
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) {
        add_rule(m, (struct rule){ .whole = answer, .start = (int)m->out->n });
        add_string(m->out, fixed[i]);
        add_string(m->out, ".");
    }
    const int call = calls ? add_call(m, calls) : ROOT;
    m->s->root = (int)m->out->n;
    m->s->in_free_text = !answer && !calls->is_forced;
    m->s->one_call = calls && calls->is_single;
    add_string(m->out, m->s->in_free_text ? "(|" : "(");
    if (answer)
        add_format(m->out, ">%d;%s", rule_of(m, answer, ROOT, "", NULL),
                   calls ? "|" : "");
    if (calls)
        add_series(m, "\1\\[", phrase("@%d;", call).s, 1,
                   calls->is_single ? 1 : INT_MAX, "]\2");
    add_string(m->out, ").");
    for (int i = 0; i < m->n_rules && m->code == DONE; i++) {
        struct rule *r = &m->rule[i];
        if (!r->from)
            continue;
        r->start = (int)m->out->n;
        add_string(m->out, "(");
        if (r->as != VALUE)
            add_arguments(m, r->from, i);
        else
            add_schema(m, r->from->type == JSON_TRUE ? &anything : r->from, i);
        add_string(m->out, ").");
    }
    for (int i = 0; i < m->n_rules && m->code == DONE; i++)
        if (m->rule[i].is_choice)
            flatten(m, i);
}

static int make_schema(const struct json *answer, const struct call_form *calls,
                       struct schema **out, struct why *why)
{
    struct schema *s = zeroed(1, sizeof *s);
    struct maker m = { .s = s, .out = &s->pattern, .why = why,
                       .rule = resize(NULL, MAX_RULES * sizeof *m.rule) };

    make_patterns(&m, answer, calls);
    if (s->pattern.n > MAX_STEPS)
        refuse(&m, "a schema of more than %d steps", MAX_STEPS);
    if (m.code == DONE) {
        link_steps(&m);
        count_frames(s);
        if (s->step[s->root].need >= MAX_FRAMES)
            refuse(&m, "no value of this schema ends within %d levels",
                   MAX_FRAMES);
    }
    free(m.rule);
    if (m.code == DONE)
        *out = s;
    else
        free_schema(s);
    return m.code;
}

/* The schema of "response_format" or --json-schema; NULL for any text. */
static int read_format(const struct engine *e, const struct json *body,
                       const struct json **out, struct why *why)
{
    static const char *const known[] = { "type json_schema",
                                         "name description strict schema" };
    const struct json *format = member(body, "response_format");
    const struct json *named = member(format, "json_schema");
    const struct json *type = member(format, "type");

    *out = format ? NULL : e->schema;
    if (!format || is_word(type, "text"))
        return DONE;
    if (is_word(type, "json_schema"))
        *out = member(named, "schema");
    else if (is_word(type, "json_object") && !named)
        *out = &any_object;
    if (!*out)
        return because(why, USAGE, "\"response_format\": expected a \"type\" "
                       "of text, json_object, or json_schema with its "
                       "\"schema\" in \"json_schema\"");
    for (int i = 0; i < (named ? 2 : 1); i++)
        for (const struct json *x = (i ? named : format)->first; x; x = x->next)
            if (find_word(known[i], ' ', x->key) < 0)
                return because(why, USAGE, "\"%.60s\" in \"response_format\" "
                               "is not known here", x->key);
    return DONE;
}

/* The form that an answer must have.  Calls are guided if they are required, if
 * only one is allowed, if a tool is strict, or beside an answer in a schema. */
static int read_form(const struct engine *e, struct request *q,
                     const struct json *body, const struct json *tools,
                     struct why *why)
{
    const struct json *choice = member(body, "tool_choice"), *answer;
    const char *name = json_text(json_get(function_of(choice), "name"));
    const int is_forced = is_word(choice, "required") || name;
    const int has_marks = tools && lfm2_token_id(e->words, CALL_START) >= 0 &&
                          lfm2_token_id(e->words, CALL_END) >= 0;
    int parallel = 1, code = read_format(e, body, &answer, why);

    if (code == DONE)
        code = read_flag(body, "parallel_tool_calls", &parallel, why);
    if (code != DONE)
        return code;
    if (q->is_completion || !json_is(tools, JSON_ARRAY) || !tools->first)
        tools = NULL;
    if (choice && !is_forced && !is_word(choice, "auto") &&
        !is_word(choice, "none"))
        return because(why, USAGE, "\"tool_choice\": expected none, auto, "
                       "required or a function");
    if (is_forced && (!tools || !has_marks))
        return because(why, USAGE, "\"tool_choice\": %s", !tools ?
                       "there are no tools" :
                       "this model has no tokens for calls");
    const struct call_form calls = { tools, name, is_forced,
                                     !parallel || name };
    int is_guided = is_forced || !parallel || answer;
    for (const struct json *x = tools ? tools->first : NULL; x; x = x->next)
        is_guided |= is_strict(x, 0);
    is_guided &= tools && has_marks && !is_word(choice, "none");
    answer = is_forced ? NULL : answer;
    if (!answer && !is_guided)
        return DONE;
    return make_schema(answer, is_guided ? &calls : NULL, &q->schema, why);
}

/* ---- choosing tokens
 *
 * Tokens are tried in the order of their bytes, so that bytes with which many
 * of them begin are tried once. */

enum { MAX_BLANKS = 4, LONGEST = 64 };

/* A token; how many bytes at its beginning are those of the one before; and how
 * many characters it has, or 0 if some have to be escaped in some string. */
struct spelled { const char *s; int32_t id; uint8_t n, shared, length; };

struct spelling {
    struct spelled *token;                /* [n], in order                   */
    int n;
    uint8_t *fits;                        /* by id                           */
    struct guide guide[LONGEST + 1];      /* after so many bytes of a token  */
};

static int by_bytes(const void *a, const void *b)
{
    const struct spelled *x = a, *y = b;

    return compare(x->s, x->n, y->s, y->n);
}

/* Sort the tokens that have no control characters: others never fit. */
static void spell_tokens(struct engine *e)
{
    const int n_vocab = lfm2_n_vocab(e->words);
    const int32_t opens = lfm2_token_id(e->words, CALL_START);
    const int32_t closes = lfm2_token_id(e->words, CALL_END);
    struct spelling *to = e->spelling = zeroed(1, sizeof *to);
    uint32_t c;

    to->token = zeroed((size_t)n_vocab, sizeof *to->token);
    to->fits = zeroed((size_t)lfm2_model_config(e->model)->n_vocab, 1);
    for (int32_t id = 0; id < n_vocab; id++) {
        int n, k = 0;
        const char *s = lfm2_token_bytes(e->words, id, 0, &n);
        while (k < n && k < LONGEST && (unsigned char)s[k] >= ' ')
            k++;
        if (id == opens || id == closes) {
            s = id == opens ? "\1" : "\2";
            n = k = 1;
        }
        if (n > 0 && k == n)
            to->token[to->n++] = (struct spelled){ s, id, (uint8_t)n, 0, 0 };
    }
    if (to->n > 0)
        qsort(to->token, (size_t)to->n, sizeof *to->token, by_bytes);
    for (int i = 0; i < to->n; i++) {
        struct spelled *t = &to->token[i];
        while (i > 0 && t->shared < t->n && t->shared < t[-1].n &&
               t->s[t->shared] == t[-1].s[t->shared])
            t->shared++;
        int k = 0, size;
        for (; k < t->n && (size = utf8_get(t->s + k, t->s + t->n, &c)) > 0 &&
               c >= ' ' && !strchr("\"'\\<|", t->s[k]); k += size)
            t->length++;
        t->length = k < t->n ? 0 : t->length;
    }
}

/* Find all tokens that fit.  In a string with room for more characters, tokens
 * of plain ones need not be tried.  Of the others, each has `common` bytes in
 * common with the last one tried, of which `deep` bytes fit. */
static void find_fitting(struct spelling *all, const struct guide *g)
{
    int room = 0, common = 0, deep = 0, failed = 0;

    for (int i = 0; i < g->n; i++) {
        const struct frame *f = &g->stack[i].frame[g->stack[i].n - 1];
        const struct step *p = &g->s->step[f->at];
        const int more = p->most < INT_MAX ? p->most - f->n : p->most;
        if (g->s->pattern.s[f->at] == '{' && g->s->pattern.s[p->next] == '@' &&
            more > room)
            room = more;
    }
    copy_guide(&all->guide[0], g);
    for (int i = 0; i < all->n; i++) {
        const struct spelled *t = &all->token[i];
        common = smaller(common, t->shared);
        if (t->length > 0 && t->length <= room)
            all->fits[t->id] = 1;
        else if (!failed || common <= deep) {
            deep = smaller(common, deep);
            while (deep < t->n && guide_byte(&all->guide[deep],
                                             &all->guide[deep + 1],
                                             (unsigned char)t->s[deep]))
                deep++;
            failed = deep < t->n;
            all->fits[t->id] = !failed;
            common = INT_MAX;
        }
    }
}

/* Move the guide on by a token.  Returns 0 if it does not fit, which spoils the
 * guide.  A thought, a few blanks after it, and text around calls are free.
 * What split() holds back is part of the end of a thought, or blanks. */
static int guide_token(const struct reply *r, struct guide *g, const char *s,
                       size_t n)
{
    const char marker = same(s, n, CALL_START) ? CALL_OPENS :
                        same(s, n, CALL_END) ? CALL_CLOSES : '\0';
    const size_t held = r->raw.n - r->seen;
    const enum part part = g->has_begun ? IN_TEXT : r->part;
    const char *end = s + n;
    int is_after = part == AFTER_THOUGHT;
    size_t blank = is_after ? held : 0;
    struct guide next;

    if ((!g->has_begun && g->s->in_free_text &&
         (marker != CALL_OPENS || part == IN_THOUGHT)) ||
        (part == AT_START && held == 0 && same(s, n, THINK)))
        return 1;
    if (n == 0)
        return part == IN_THOUGHT;
    if (part == IN_THOUGHT) {
        struct text both = { 0 };
        add(&both, r->raw.s + r->seen, held);
        add(&both, s, n);
        const char *over = find(both.s, both.s + both.n, THINK_END);
        s = over ? end - (both.s + both.n - over) + strlen(THINK_END) : end;
        is_after = over != NULL;
        free(both.s);
    }
    for (; is_after && s < end && memchr(" \n\r\t", *s, 4); s++)
        blank++;
    if (s < end && marker) {
        s = &marker;
        end = s + 1;
    }
    for (; s < end && blank <= MAX_BLANKS; s++) {
        const int c = (unsigned char)*s;
        if ((c < ' ' && !marker) || !guide_byte(g, &next, c))
            return 0;
        copy_guide(g, &next);
    }
    return blank <= MAX_BLANKS;
}

static int may_say(const struct engine *e, const struct reply *r, int32_t id)
{
    struct guide copy;
    int n;
    const char *s = token_text(e, id, &n);

    if (is_end(e, r, id))
        return guide_may_end(r->guide);
    copy_guide(&copy, r->guide);
    return guide_token(r, &copy, s, (size_t)n);
}

/* The model's choice does not fit: it chooses again, among tokens that do. */
static int32_t resample(struct engine *e, struct reply *r, float *logits)
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
        find_fitting(e->spelling, r->guide);
    const uint8_t may_end = (uint8_t)guide_may_end(r->guide);
    for (int i = 0; i < e->ends.n; i++)
        fits[e->ends.id[i]] = may_end;
    for (int i = 0; i < r->q->stop.n; i++) {
        id = lfm2_token_id(e->words, r->q->stop.v[i]);
        if (id >= 0 && is_end(e, r, id))
            fits[id] = may_end;
    }
    for (id = 0; id < n_vocab; id++)
        if (!fits[id])
            logits[id] = -INFINITY;
    r->n_resampled++;
    r->resample_time += seconds() - began;
    id = lfm2_sample(e->ctx, &r->sampler, logits, NULL, 0);
    if (id < 0)
        r->finish = may_end ? STOPPED : BY_LENGTH;
    return id;
}

static void start_guide(struct engine *e, struct reply *r)
{
    if (!r->q->schema)
        return;
    if (!e->spelling)
        spell_tokens(e);
    r->guide = zeroed(1, sizeof *r->guide);
    r->guide->s = r->q->schema;
}

/* After a token: end a complete answer, unless other calls may follow. */
static void end_guided(struct reply *r)
{
    if (!guide_is_done(r->guide))
        return;
    if (r->guide->s->in_free_text && !r->guide->s->one_call)
        r->guide->has_begun = 0;
    else
        r->finish = STOPPED;
}

/* Is this the text of a guided answer, where nothing is a call? */
static int is_guided_text(const struct reply *r)
{
    return r->guide && r->guide->has_begun && !r->guide->in_call &&
           r->part == IN_TEXT;
}

/* The schema of --json-schema: an error in it ends the program at once. */
static int open_schema(struct engine *e)
{
    const char *path = e->s->json_schema;
    struct schema *made = NULL;
    struct why why;
    int code = read_json(&e->pool, path, &e->schema);

    if (code != DONE)
        return code;
    code = make_schema(e->schema, NULL, &made, &why);
    free_schema(made);
    return code == DONE ? DONE : blame(code, path, &why);
}

static void close_schema(struct engine *e)
{
    pool_free(&e->pool);
    if (e->spelling) {
        free(e->spelling->token);
        free(e->spelling->fits);
    }
    free(e->spelling);
}
