/* run.c - the command line of lfm2.c.
 *
 * Standard output carries the model's words, or the data that was asked for,
 * and nothing else; everything meant for a human being goes to standard error.
 *
 *   1  messages and exit codes       11  traces
 *   2  options                       12  an answer
 *   3  reading what is given         13  a conversation
 *   4  the sandbox                   14  sessions
 *   5  JSON                          15  chat
 *   6  chat templates                16  --batch
 *   7  tool calls                    17  --ppl
 *   8  tokens in and out             18  --bench
 *   9  --inspect                     19  --selftest
 *  10  the model in use              20  main */

#define _POSIX_C_SOURCE 200809L
#define _GNU_SOURCE                       /* sched_getaffinity(), mincore()  */
#define _DARWIN_C_SOURCE                  /* macOS: ru_maxrss                */
#define _FILE_OFFSET_BITS 64              /* on 32-bit machines, too         */

#include "lfm2.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <fnmatch.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#ifndef LFM2_NO_THREADS
#include <pthread.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
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
#ifdef __wasi__

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
    int n = vsnprintf(s, sizeof s, fmt, args);

    n = n < (int)sizeof s ? n : (int)sizeof s - 1;
    n = (int)drop_controls(s, n > 0 ? (size_t)n : 0);
    fprintf(stderr, "%s: %.*s\n", program, n, s);
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

/* Its sentence about a file it could not open already begins with the path. */
static int report(const char *path, const lfm2_error *err)
{
    if (strncmp(err->msg, path, strlen(path)) == 0)
        return say(status_of(err->code), "%s", err->msg);
    return say(status_of(err->code), "%s: %s", path, err->msg);
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

/* --------------------------------------------------------------- 2. Options
 *
 * The table alone decides what is parsed, which values are good, and what
 * --help says. */

enum { RAW_LEN = 256, UNSET = -2, MAX_CTX = 1 << 24, MAX_LIST = 16 };
enum { LOOKUP = 7, MAX_LOOKUP = 15 };     /* tokens guessed at once          */

struct list { int n, v[MAX_LIST]; };      /* numbers, by commas              */

struct texts { int n; const char *v[MAX_LIST]; };     /* of repeated options */

struct settings {
    const char *model, *prompt, *file, *system, *ids;
    const char *logits, *export_to, *tokenizer, *ignored;
    const char *system_file, *messages, *tools, *session, *date;
    int raw, tokenize, detokenize, inspect, null, bos, special;
    const char *shard, *resume;
    int dump_prompt, dump_tokens, interactive, escape, json;
    int selftest, batch_mode, batch_raw, parallel, heartbeat, hadoop;
    int template, think, think_budget, ignore_eos, logprobs, color;
    int no_mmap, sandbox, quiet, verbose, help, version, bench;
    int predict, ctx, threads, batch, isa, kv, top_k, repeat_last_n, lookup;
    double temp, top_p, min_p, repeat;
    long long seed;
    struct texts stop;
    struct list bench_prompt, bench_gen, bench_both, bench_depth;
    struct list bench_threads, bench_seqs;
    int reps, output;
    const char *ppl, *ppl_save, *ppl_compare;
    const char *trace, *trace_tokens, *trace_npy, *experts;
    struct texts trace_filter;
    int sha256;
    const char *tensor, *rows;
    double bandwidth;
};

/* In the order of the words of -o, --template, --think, --color and
 * --sandbox. */
enum { MD, JSON, JSONL, CSV };
enum {
    TEMPLATE_AUTO, TEMPLATE_LFM2, TEMPLATE_INSTRUCT, TEMPLATE_NEW, TEMPLATE_VL,
    TEMPLATE_8B, TEMPLATE_NONE
};
enum { THINK_AUTO, THINK_SHOW, THINK_HIDE, THINK_RAW };
enum { COLOR_AUTO, COLOR_ON, COLOR_OFF };
enum { SANDBOX_AUTO, SANDBOX_REQUIRE, SANDBOX_OFF };

/* What is UNSET depends on the model. */
static const struct settings defaults = {
    .predict = UNSET, .ctx = UNSET, .batch = UNSET, .temp = UNSET,
    .top_k = UNSET, .top_p = UNSET, .min_p = UNSET, .repeat = UNSET,
    .repeat_last_n = UNSET, .seed = -1, .think_budget = -1, .logprobs = -1,
    .lookup = UNSET,
    .parallel = 32, .heartbeat = 10, .threads = UNSET,
    .bench_prompt = { 1, { 512 } }, .bench_gen = { 1, { 128 } },
    .bench_depth = { 1, { 0 } }, .bench_threads = { 1, { 0 } },
    .bench_seqs = { 1, { 1 } }, .reps = 5
};

/* Options after BENCH are for --bench alone, and go before others of the same
 * name. */
enum kind {
    HEADING, BENCH, FLAG, WHOLE, SEED, REAL, CHOICE, TEXT, TEXTS, LIST, PAIR
};

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
    WORDS("-sysf --system-prompt-file", "FILE", system_file, "the same from "
          "FILE (- is standard input)"),
    WORDS("--messages", "FILE", messages, "a conversation in JSON instead of a "
          "prompt"),
    WORDS("--tools", "FILE", tools, "tools the model may call, in JSON"),
    WORDS("--session", "FILE", session, "go on with the conversation kept in "
          "FILE"),
    SWITCH("-cnv --interactive", interactive, "chat, even if not at a terminal "
           "or after a prompt"),
    SWITCH("--raw | -no-cnv", raw, "no chat template: continue plain text"),
    SWITCH("-e --escape", escape, "\\n, \\t and \\\\ in PROMPT are what they "
           "are in C"),
    SWITCH("--dump-prompt", dump_prompt, "print the prompt as the template "
           "makes it"),
    SWITCH("--dump-tokens", dump_tokens, "print its token ids"),
    WORDS("--ids", "FILE", ids, "the prompt as int32 little-endian token ids"),
    WORDS("--logits", "OUT", logits, "write the logits of all prompt tokens, "
          "float32"),
    SWITCH("--tokenize", tokenize, "print the token ids of the prompt"),
    SWITCH("--detokenize", detokenize, "print the text of lines of token ids"),
    SWITCH("--null", null, "for these two: texts end with a NUL byte"),
    SWITCH("--bos", bos, "begin plain text with the BOS token"),
    SWITCH("--special", special, "markers in what is given are control "
           "tokens"),
    SWITCH("--batch", batch_mode, "answer JSON lines; its options are below"),
    SWITCH("--inspect", inspect, "explain the file; its options are below"),
    SWITCH("--selftest", selftest, "try this build on this machine; needs no "
           "model"),
    SWITCH("--bench", bench, "measure the speed; its options are below"),
    WORDS("--export-tokenizer", "FILE", export_to, "write the vocabulary as a "
          "tokenizer.bin"),
    WORDS("--tokenizer", "FILE", tokenizer, "a vocabulary to use instead of "
          "the model's"),
    WORDS("--ppl", "FILE", ppl, "the perplexity of a text, as of "
          "llama-perplexity"),
    WORDS("--ppl-save", "OUT", ppl_save, "and its logits to OUT, 4 bytes each"),
    WORDS("--ppl-compare", "IN", ppl_compare, "and the KL divergence from "
          "saved logits"),

    GROUP("How to answer"),
    NUMBER(WHOLE, "-n --predict | --n-predict --tokens --max-tokens", "N",
           predict, -1, 1 << 30,
           "at most N tokens (-1: to the end; plain text: 256)"),
    NUMBER(CHOICE, "--template | --chat-template",
           "auto|lfm2|lfm2.5-instruct|lfm2.5-new|lfm2.5-vl|lfm2.5-8b-a1b|none",
           template, 0, 0, "format of the conversation: auto, none, lfm2,\n"
           "                            lfm2.5-instruct, -new, -vl or "
           "-8b-a1b"),
    WORDS("--date", "YYYY-MM-DD", date, "today, for templates that tell it"),
    NUMBER(CHOICE, "--think | --reasoning", "auto|show|hide|raw", think, 0, 0,
           "what <think> holds (auto: shown at a terminal)"),
    NUMBER(WHOLE, "--think-budget | --reasoning-budget", "N", think_budget, -1,
           1 << 30, "close a thought after N tokens (-1: never)"),
    NUMBER(TEXTS, "--stop | -r --reverse-prompt", "TEXT", stop, 0, 0,
           "end before TEXT; may be repeated"),
    SWITCH("--ignore-eos", ignore_eos, "go on when the model would end"),
    SWITCH("--json", json, "the answer and all about it, as JSON"),
    NUMBER(WHOLE, "--logprobs", "K", logprobs, 0, 20, "with --json: log "
           "probabilities, and the K likeliest"),

    GROUP("How to choose words (unless given, as is best for the model)"),
    NUMBER(REAL, "--temp --temperature", "F", temp, 0, 100,
           "0 always takes the likeliest"),
    NUMBER(WHOLE, "--top-k", "N", top_k, 0, 1 << 30,
           "only the N likeliest (0: off)"),
    NUMBER(REAL, "--top-p", "F", top_p, 0, 1,
           "only the likeliest that make up F (1: off)"),
    NUMBER(REAL, "--min-p", "F", min_p, 0, 1,
           "only those at least F times the likeliest (0: off)"),
    NUMBER(REAL, "--repeat-penalty | --repetition-penalty", "F", repeat, 0.01,
           100, "repeat less (1: off, as with --temp 0)"),
    NUMBER(WHOLE, "--repeat-last-n", "N", repeat_last_n, -1, 1 << 30,
           "of the last N tokens (64; -1: all)"),
    NUMBER(SEED, "-s --seed", "N", seed, -1, 9e18,
           "the same seed, the same text (-1: random)"),

    GROUP("To look inside"),
    WORDS("--trace", "FILE", trace, "what every module puts out, as JSON "
          "lines"),
    NUMBER(TEXTS, "--trace-filter", "GLOB", trace_filter, 0, 0,
           "only modules of such names; may be repeated"),
    WORDS("--trace-tokens", "A-B", trace_tokens, "only at positions A to B, "
          "from 0; or A, or A-"),
    WORDS("--trace-npy", "DIR", trace_npy, "and all the numbers, in "
          "DIR/NAME.npy"),
    WORDS("--experts", "FILE", experts, "which experts tokens chose, as CSV "
          "(-: a summary)"),

    GROUP("With --inspect"),
    SWITCH("--sha256", sha256, "digests of the file and of every tensor"),
    WORDS("--tensor", "NAME", tensor, "one tensor: what is in it"),
    WORDS("--rows", "A-B", rows, "of its values, these rows (0-7)"),
    NUMBER(REAL, "--bandwidth", "GB/s", bandwidth, 0.001, 1e6,
           "of the memory, to say how fast it can be"),

    GROUP("With --batch"),
    NUMBER(WHOLE, "--parallel", "N", parallel, 1, 1024,
           "lines answered at once (32)"),
    SWITCH("--batch-raw", batch_raw, "every line is a prompt, not JSON"),
    WORDS("--shard", "I/N", shard, "only part I of N, from 0; auto: as Slurm "
          "says"),
    WORDS("--resume", "OUT", resume, "write to OUT, leaving out what it "
          "answers"),
    NUMBER(WHOLE, "--heartbeat", "N", heartbeat, 0, 1 << 30,
           "a line on progress every N seconds (10; 0: none)"),
    SWITCH("--hadoop", hadoop, "written so that Hadoop counts it"),

    GROUP("How to run"),
    NUMBER(WHOLE, "-c --ctx-size | --ctx", "N", ctx, 0, MAX_CTX,
           "longest text in tokens (4096; 0: the model's)"),
    NUMBER(WHOLE, "-t --threads", "N", threads, 0, 1024, "0: one per CPU"),
    NUMBER(WHOLE, "-b --batch-size", "N", batch, 1, 1 << 16,
           "tokens worked on at once (512; with experts 2048)"),
    NUMBER(WHOLE, "--lookup", "N", lookup, 0, MAX_LOOKUP,
           "guess N tokens from the text so far; the answer\n"
           "                            stays the same (7; with experts 0)"),
    NUMBER(CHOICE, "--isa",
           "auto|scalar|avx2|avxvnni|avx512|avx512vnni|neon|dotprod", isa, 0, 0,
           "instruction set"),
    NUMBER(CHOICE, "--kv", "f16|f32", kv, 0, 0, "precision of the KV cache"),
    SWITCH("--no-mmap", no_mmap, "read the file instead of mapping it"),
    NUMBER(CHOICE, "--sandbox", "auto|require|off", sandbox, 0, 0,
           "give up what is not needed; require: or fail"),
    WORDS("-ngl --gpu-layers | --n-gpu-layers", "N", ignored, NULL),
    NUMBER(CHOICE, "--color | -co", "auto|on|off", color, 0, 0, "of thoughts"),
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
           "exits.  Without one, what is piped in is the prompt;\nat a "
           "terminal, a chat begins.\n", program);
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &table[i];
        int n = (int)strcspn(o->names, "|"), gap = 28;

        if (o->kind == HEADING || o->kind == BENCH)
            printf("\n%s\n", o->help);
        if (o->kind == HEADING || o->kind == BENCH || !o->help)
            continue;
        n -= o->names[n] == '|';
        gap -= printf("  %.*s %s", n, o->names, !o->arg ? "" :
                      strlen(o->arg) > 60 ? "NAME" : o->arg);
        printf(gap > 0 ? "%*s%s\n" : "\n%*s%s\n", gap > 0 ? gap : 28, "",
               o->help);
    }
    printf("\nWrite --flag VALUE or --flag=VALUE; -- ends the options.  Exit "
           "status: 0 done,\n1 failed, 2 usage, 3 file, 4 model, 5 memory, 6 "
           "prompt longer than the context,\n7 some lines of a batch failed, 8 "
           "the self-test failed, 130 interrupted,\n143 terminated.\n"
           "LFM2_MODEL and LFM2_THREADS in the environment stand in for -m and "
           "-t,\nand NO_COLOR is --color off.\n");
    return DONE;
}

/* In the order of LFM2_ISA_... */
static const char *const isa_name[] = {
    "auto", "scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "neon",
    "dotprod"
};

static const char *kv_name(int kv_type)
{
    return kv_type == LFM2_KV_F16 ? "f16" : "f32";
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
            printf(" %s", isa_name[i]);
    printf("\nbyte order  %s-endian, %d bits\nweights    ",
           is_little_endian() ? "little" : "big",
           (int)sizeof(void *) * 8);
    for (int i = 0; (type = lfm2_weight_type(i)); i++)
        printf(" %s", type);
    putchar('\n');
    return DONE;
}

/* How many letters must be changed, added or dropped to make `a` into the n
 * letters at b, fewer than 64. */
static int distance(const char *a, const char *b, int n)
{
    int row[64];

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

/* Values of an option that may be repeated. */
static int add_value(struct texts *to, const struct option *o,
                     const char *name, const char *value)
{
    if (!*value)
        return say(USAGE, "%s: expected a %s that is not empty", name, o->arg);
    if (to->n == MAX_LIST)
        return say(USAGE, "%s %s: expected at most %d of them", name, value,
                   MAX_LIST);
    to->v[to->n++] = value;
    return DONE;
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
    if (o->kind == TEXTS)
        return add_value(slot, o, name, value);
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
        return usage("unknown option -i: -p gives a prompt, -cnv begins a "
                     "chat");
    if (!o && find_option(name, 1, &nearest, &n_nearest))
        return usage("%s is for --bench", name);
    if (!o && distance(name, nearest, n_nearest) > (int)strlen(name) / 3)
        return usage("unknown option %s", name);
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

/* Whether it is a day as templates write it, 2026-11-20. */
static int is_date(const char *s)
{
    static const char form[] = "0000-00-00";

    for (int i = 0; i < 10; i++)
        if (form[i] == '-' ? s[i] != '-' : s[i] < '0' || s[i] > '9')
            return 0;
    return !s[10] && strncmp(s + 5, "01", 2) >= 0 &&
           strncmp(s + 5, "12", 2) <= 0 && strncmp(s + 8, "01", 2) >= 0 &&
           strncmp(s + 8, "31", 2) <= 0;
}

/* The first option given that needs a chat template, or NULL. */
static const char *chat_option(const struct settings *s)
{
    return s->system ? "-sys" : s->messages ? "--messages" :
           s->tools ? "--tools" : s->interactive ? "-cnv" : NULL;
}

static int is_dash(const char *path)
{
    return path && strcmp(path, "-") == 0;
}

static int check_prompts(const struct settings *s)
{
    const int plain = s->raw || s->ids || s->tokenize ||
                      s->template == TEMPLATE_NONE;

    if (!!s->prompt + !!s->file + !!s->ids + !!s->messages > 1)
        return usage("more than one prompt: PROMPT or -p, -f, --ids, "
                     "--messages");
    if (plain && chat_option(s))
        return usage("%s is for the chat template, which --raw, --ids and "
                     "--tokenize do without", chat_option(s));
    if (s->ids && (s->tokenize || s->detokenize))
        return usage("--ids is for generating text and for --logits");
    if (s->session && (s->ids || s->logits))
        return usage("--session keeps text, and %s gives none", s->ids ?
                     "--ids" : "--logits");
    if (is_dash(s->session))
        return usage("--session -: expected a file");
    if (s->system && s->messages)
        return usage("-sys: the conversation of --messages has its own system "
                     "message");
    return DONE;
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

static int wants_ppl(const struct settings *s)
{
    return s->ppl || s->ppl_save || s->ppl_compare;
}

static int check_trace(const struct settings *s)
{
    int first, last;

    if (!s->trace && (s->trace_filter.n || s->trace_tokens || s->trace_npy))
        return usage("%s needs --trace FILE", s->trace_npy ? "--trace-npy" :
                     s->trace_tokens ? "--trace-tokens" : "--trace-filter");
    if (s->trace_tokens && parse_range(s->trace_tokens, &first, &last) != 0)
        return usage("--trace-tokens %s: expected positions like 5, 5- or "
                     "5-7", s->trace_tokens);
    if ((s->trace || s->experts) &&
        (s->tokenize || s->detokenize || s->inspect || s->bench ||
         s->export_to || s->dump_prompt || s->dump_tokens || s->batch_mode ||
         wants_ppl(s)))
        return usage("%s looks into a single answer, a chat or --logits",
                     s->trace ? "--trace" : "--experts");
    if (is_dash(s->trace))
        return usage("--trace -: expected a file, standard output is for the "
                     "answer");
    if (s->json && is_dash(s->experts))
        return usage("--experts -: expected a file, standard output is for "
                     "the JSON");
    return DONE;
}

static int check_settings(const struct settings *s)
{
    int code = check_prompts(s);

    if (code == DONE)
        code = check_trace(s);
    if (code != DONE)
        return code;
    if (!s->model && !(s->tokenizer && (s->tokenize || s->detokenize ||
                                        s->export_to)))
        return usage("no model given");
    if (s->tokenize + s->detokenize + s->inspect + s->bench + !!s->logits +
        !!s->export_to + (s->dump_prompt || s->dump_tokens) + s->interactive +
        s->batch_mode + wants_ppl(s) > 1)
        return usage("more than one of --tokenize, --detokenize, --inspect, "
                     "--bench, --logits, --export-tokenizer, --dump-prompt, "
                     "--dump-tokens, -cnv, --batch and --ppl");
    if (s->logprobs >= 0 && !s->json)
        return usage("--logprobs needs --json");
    if (s->json && s->interactive)
        return usage("--json is for a single answer, not for a chat");
    if ((s->sha256 || s->tensor || s->rows || s->bandwidth > 0) && !s->inspect)
        return usage("%s is for --inspect", s->sha256 ? "--sha256" : s->tensor ?
                     "--tensor" : s->rows ? "--rows" : "--bandwidth");
    if (s->rows && !s->tensor)
        return usage("--rows are those of --tensor");
    if ((s->shard || s->resume || s->batch_raw || s->hadoop) && !s->batch_mode)
        return usage("%s is for --batch", s->shard ? "--shard" : s->resume ?
                     "--resume" : s->batch_raw ? "--batch-raw" : "--hadoop");
    if (s->batch_mode && (s->prompt || s->ids || s->messages || s->session))
        return usage("%s: --batch reads its prompts from -f FILE or standard "
                     "input", s->prompt ? "-p" : s->ids ? "--ids" :
                     s->messages ? "--messages" : "--session");
    if (s->batch_mode && (s->tools || (s->system && !s->batch_raw)))
        return usage("%s: every request of --batch has its own", s->tools ?
                     "--tools" : "-sys");
    if (s->date && !is_date(s->date))
        return usage("--date %s: expected a day like 2026-11-20", s->date);
    if (s->isa != LFM2_ISA_AUTO && !lfm2_isa_available(s->isa))
        return say(USAGE, "--isa %s: not on this CPU or not in this build; "
                   "--version lists what is", isa_name[s->isa]);
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

static int name_ends(const char *s, const char *end)
{
    const size_t n = strlen(s), k = strlen(end);

    return n >= k && strcmp(s + n - k, end) == 0;
}

/* A word alone is the prompt if the environment names a model, unless it looks
 * like the name of one.  Words that were used are taken away. */
static void take_model(struct settings *to, const char **word, int *n_words)
{
    const char *named = getenv("LFM2_MODEL");
    const int is_file = *n_words && (name_ends(word[0], ".gguf") ||
                                     name_ends(word[0], ".bin"));

    if (named && !named[0])
        named = NULL;
    if (*n_words > (named && !is_file)) {
        to->model = word[0];
        word[0] = word[1];
        --*n_words;
    } else if (named) {
        to->model = named;
        if (to->verbose)
            say(DONE, "LFM2_MODEL: %s", named);
    }
}

/* The environment has a say where no option has. */
static int take_threads(struct settings *to)
{
    const char *n = getenv("LFM2_THREADS"), *nearest;
    const int given = to->bench ? to->bench_threads.v[0] != 0 :
                      to->threads != UNSET;
    int n_nearest;

    if (to->threads == UNSET)
        to->threads = 0;
    if (given || !n || !n[0] || strcmp(n, "0") == 0)
        return DONE;
    if (to->verbose)
        say(DONE, "LFM2_THREADS: %s", n);
    return set_option(to, find_option("-t", to->bench, &nearest, &n_nearest),
                      "LFM2_THREADS", n);
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
    if (code == DONE && to->sandbox == SANDBOX_REQUIRE &&
        (to->bench || to->selftest))
        return usage("--sandbox require: %s runs without one", to->bench ?
                     "--bench" : "--selftest");
    if (code != DONE || to->help || to->version || to->selftest)
        return code;
    if (!to->model)
        take_model(to, word, &n_words);
    if (n_words > 1 || (n_words > 0 && to->prompt))
        return usage("unexpected argument %s: there is a prompt already",
                     word[n_words - 1]);
    if (n_words > 0)
        to->prompt = word[0];
    if (to->system && to->system_file)
        return usage("more than one system prompt: -sys, -sysf");
    if (to->system_file)
        to->system = "";                  /* until read_system()             */
    code = take_threads(to);
    return code == DONE ? check_settings(to) : code;
}

/* ------------------------------------------------- 3. Reading what is given */

/* Text that grows.  s[n] is NUL, or s is NULL. */
struct text { char *s; size_t n, cap; int failed; };

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

static int read_stream(FILE *f, const char *name, struct text *out)
{
    for (size_t got = 1; got > 0; out->n += got) {
        reserve(out, 1 << 14);
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

/* One newline at the end of a file or pipe is not part of the text. */
static void drop_newline(struct text *t)
{
    if (t->n > 0 && t->s[t->n - 1] == '\n')
        t->s[--t->n] = '\0';
}

/* -sysf.  It lies in *out, which the caller frees. */
static int read_system(struct settings *s, struct text *out)
{
    int code = read_file(s->system_file, out);

    if (code != DONE)
        return code;
    drop_newline(out);
    s->system = out->s;
    return strlen(out->s) == out->n ? DONE :
           say(USAGE, "%s: a NUL byte after %zu bytes, expected text",
               s->system_file, strlen(out->s));
}

/* The text to work on: given as an argument, in a file, or piped in. */
static int read_text(const struct settings *s, struct text *out)
{
    if (!s->prompt && !s->file && isatty(STDIN_FILENO))
        return usage("no prompt given; try %s MODEL.gguf \"a question\"",
                     program);
    if (!s->prompt)
        return read_file(s->file ? s->file : "-", out);
    add_string(out, s->prompt);
    return out->failed ? say(NO_MEMORY, "no memory for the prompt") : DONE;
}

static int alloc_ids(struct ids *out, size_t n)
{
    out->id = zeroed(n, sizeof *out->id);
    return DONE;
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
        const uint64_t id = get_le((const unsigned char *)t.s + i, 4);
        out->id[out->n++] = id > INT32_MAX ? -1 : (int32_t)id;
    }
    free(t.s);
    return code;
}

/* ---- SHA-256 (FIPS 180-4) of bytes that come in any pieces */

struct sha256 { uint32_t h[8]; uint64_t n; unsigned char block[64]; };

static const struct sha256 sha256_start = {
    { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c,
      0x1f83d9ab, 0x5be0cd19 }, 0, { 0 }
};

static uint32_t rotated(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

/* The constants of the rounds are the fractions of the cube roots of the first
 * 64 primes. */
static const uint32_t sha256_round[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
    0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
    0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2
};

/* w: the 16 words of the block, and 48 made of them. */
static void sha256_words(uint32_t w[64], const unsigned char block[64])
{
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16
             | (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        const uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + w[i - 7]
             + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3)
             + (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
    }
}

/* Instead of moving on, a .. h change their places, and are back after eight
 * rounds. */
static void sha256_block(uint32_t state[8], const unsigned char block[64])
{
    uint32_t w[64], s[8];

    sha256_words(w, block);
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; i += 8)
        for (int j = 0; j < 8; j++) {
            uint32_t *a = s + (8 - j) % 8, *d = s + (11 - j) % 8;
            uint32_t *h = s + (15 - j) % 8;
            const uint32_t b = s[(9 - j) % 8], c = s[(10 - j) % 8];
            const uint32_t e = s[(12 - j) % 8], f = s[(13 - j) % 8];
            const uint32_t g = s[(14 - j) % 8];
            const uint32_t t = *h + sha256_round[i + j] + w[i + j]
                + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25))
                + ((e & f) ^ (~e & g));

            *d += t;
            *h = t + (rotated(*a, 2) ^ rotated(*a, 13) ^ rotated(*a, 22))
                + ((*a & b) ^ (*a & c) ^ (b & c));
        }
    for (int i = 0; i < 8; i++)
        state[i] += s[i];
}

static void sha256_add(struct sha256 *d, const void *bytes, size_t n)
{
    const unsigned char *p = bytes;

    while (n > 0) {
        const size_t at = d->n % 64;
        const size_t part = n < 64 - at ? n : 64 - at;
        memcpy(d->block + at, p, part);
        d->n += part;
        p += part;
        n -= part;
        if (at + part == 64)
            sha256_block(d->h, d->block);
    }
}

/* out: 64 hexadecimal digits and a NUL.  A copy of d is finished, so more may
 * be added to d itself. */
static void sha256_hex(struct sha256 d, char out[65])
{
    const uint64_t bits = d.n * 8;
    unsigned char end[8];

    for (int i = 0; i < 8; i++)
        end[i] = bits >> (56 - 8 * i) & 255;
    sha256_add(&d, "\x80", 1);
    while (d.n % 64 != 56)
        sha256_add(&d, "", 1);
    sha256_add(&d, end, 8);
    for (int i = 0; i < 8; i++)
        snprintf(out + 8 * i, 9, "%08x", (unsigned)d.h[i]);
}

/* ---- what becomes of a file
 *
 * Models and vocabularies are mapped, and nothing else is.  A file that becomes
 * shorter meanwhile sends SIGBUS to who reads behind its end, and that deserves
 * a sentence.  It is made beforehand: a signal handler may only write. */

static volatile sig_atomic_t is_dim;      /* the text at the terminal        */
static const char bright[] = "\033[0m\n";

#ifndef LFM2_NO_MMAP

static struct text lost;

/* Several threads may come here at once; one tells. */
static void on_bus_error(int number, siginfo_t *info, void *context)
{
    static atomic_flag told = ATOMIC_FLAG_INIT;
    const size_t from = is_dim ? 0 : sizeof bright - 1;

    (void)context;
    if (info->si_code <= 0 || info->si_code == BUS_ADRALN) {
        signal(number, SIG_DFL);          /* and it comes again              */
        return;
    }
    while (atomic_flag_test_and_set(&told))
        continue;
    (void)!write(STDERR_FILENO, lost.s + from, lost.n - from);
    _exit(BAD_FILE);
}

/* The file is about to be mapped, or is the one that stays so. */
static void watch_file(const char *path)
{
    const struct sigaction action = {
        .sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO
    };

    lost.n = 0;
    add_string(&lost, bright);
    add_string(&lost, program);
    add_string(&lost, ": ");
    add_string(&lost, path);
    add_string(&lost, ": it became shorter while it was used, or its disk "
               "failed; --no-mmap reads it first\n");
    if (!lost.failed)
        sigaction(SIGBUS, &action, NULL);
}

static void unwatch_file(void)
{
    signal(SIGBUS, SIG_DFL);
    free(lost.s);
    lost = (struct text){ 0 };
}

#else

static void watch_file(const char *path)
{
    (void)path;
}

static void unwatch_file(void)
{
}

#endif

/* ----------------------------------------------------------- 4. The sandbox
 *
 * A model, a prompt or a session may be made by someone who knows of a fault in
 * this program.  So it gives away what it does not need, and whoever takes it
 * over finds nothing to use: --sandbox auto once the model is open, because
 * nothing may go wrong that went well without; --sandbox require before a byte
 * of it is looked at, or not at all.  In this order:
 *
 *   begin_sandbox()  no new privileges and no core dump; Landlock leaves only
 *                    the files that options name; with `require`, a first
 *                    filter allows what starting threads takes, too.
 *   open the context, whose threads inherit all of this
 *   lock_sandbox()   the filter that stays, in all threads: it opens no file,
 *                    unless a session or the commands of a chat need it.
 *
 * Filters add up: what one has denied no later one allows.  A denied call fails
 * with EPERM; the program lives on, because a C library that has learnt a new
 * habit is likelier than an attack, and an attacker gains nothing by the error.
 * Calls newer than this list fail with ENOSYS, as on an older kernel: then C
 * libraries use the old ones.
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
#include <sys/syscall.h>
#ifdef SYS_seccomp
#define HAVE_SANDBOX
#endif
#endif

/* Something is missing: a reason to stop if all is required. */
static int lacks(const struct settings *s, const char *what, const char *why)
{
    if (s->sandbox == SANDBOX_REQUIRE)
        return say(FAILED, "--sandbox require: no %s: %s", what, why);
    if (s->verbose)
        say(DONE, "sandbox: no %s: %s", what, why);
    return DONE;
}

#ifndef HAVE_SANDBOX

static int begin_sandbox(const struct settings *s, int chats)
{
    (void)chats;
    return s->sandbox == SANDBOX_OFF ? DONE :
           lacks(s, "sandbox", "it is not in this build");
}

static int lock_sandbox(const struct settings *s, int chats)
{
    (void)s;
    (void)chats;
    return DONE;
}

#else

long syscall(long number, ...);           /* not in POSIX                    */

/* ---- files: Landlock */

enum { PR_DUMPABLE = 4, PR_NO_NEW_PRIVS = 38, PATH_ONLY = 010000000 };
enum { CREATE_RULESET = 444, ADD_RULE, RESTRICT_SELF, PATH_BENEATH = 1 };

/* Rights to files, and those of them that only directories have. */
enum {
    WRITE_FILE = 1 << 1, READ_FILE = 1 << 2, READ_DIR = 1 << 3,
    REMOVE_FILE = 1 << 5, MAKE_REG = 1 << 8, TRUNCATE = 1 << 14,
    IN_DIRS = 0x3ff8
};

/* What a rule set decides about: all that the kernel's version of Landlock
 * knows of, and nothing of it is allowed. */
struct ruleset { uint64_t files, net, scopes; };

struct rule { uint64_t rights; int32_t fd; };

static struct ruleset all_rights(long version)
{
    static const uint64_t files[] = { 0x1fff, 0x3fff, 0x7fff, 0x7fff, 0xffff };

    return (struct ruleset){
        files[version < 5 ? version - 1 : 4],
        version >= 4 ? 3 : 0,             /* TCP: bind and connect           */
        version >= 6 ? 3 : 0              /* abstract sockets, signals       */
    };
}

/* How options use the files they name. */
enum { READS, WRITES, BESIDE, INSIDE };

static const struct { size_t at; int how; } file_options[] = {
    { AT(model), READS }, { AT(tokenizer), READS }, { AT(file), READS },
    { AT(ids), READS }, { AT(messages), READS }, { AT(tools), READS },
    { AT(ppl), READS }, { AT(ppl_compare), READS }, { AT(session), READS },
    { AT(session), BESIDE }, { AT(resume), WRITES }, { AT(logits), WRITES },
    { AT(ppl_save), WRITES }, { AT(export_to), WRITES },
    { AT(trace), WRITES }, { AT(experts), WRITES }, { AT(trace_npy), INSIDE }
};

enum { N_FILE_OPTIONS = sizeof file_options / sizeof *file_options };

/* Allow to open what is at `path`, and in it.  What cannot be granted stays
 * forbidden. */
static void grant(int set, const char *path, uint64_t rights)
{
    struct rule rule = { rights, open(path, PATH_ONLY | O_CLOEXEC) };
    struct stat st;

    if (rule.fd < 0)
        return;
    if (fstat(rule.fd, &st) == 0 && !S_ISDIR(st.st_mode))
        rule.rights &= ~(uint64_t)IN_DIRS;
    syscall(ADD_RULE, set, PATH_BENEATH, &rule, 0);
    close(rule.fd);
}

/* A file to write must be there to be granted, and so must a directory.  A file
 * to replace is written anew beside it, which takes its directory. */
static void grant_option(int set, const char *path, int how, uint64_t known)
{
    const uint64_t writes = known & (READ_FILE | WRITE_FILE | TRUNCATE);
    struct text dir = { 0 };
    int fd;

    if (how == WRITES) {
        fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd >= 0)
            close(fd);
        grant(set, path, writes);
    } else if (how == INSIDE) {
        mkdir(path, 0777);
        grant(set, path, writes | MAKE_REG);
    } else if (how == BESIDE) {
        add_directory(&dir, path);
        if (!dir.failed)
            grant(set, dir.s, READ_FILE | WRITE_FILE | MAKE_REG | REMOVE_FILE);
        free(dir.s);
    } else
        grant(set, path, READ_FILE | READ_DIR);
}

/* What options name; how many CPUs and how much memory there are to use; and in
 * a chat /save and /load, which may name anything, have the working directory
 * and that for temporary files. */
static void grant_all(int set, const struct settings *s, int chats,
                      uint64_t known)
{
    const uint64_t words = known & (READ_FILE | WRITE_FILE | MAKE_REG |
                                    TRUNCATE);
    const char *tmp = getenv("TMPDIR");

    for (size_t i = 0; i < N_FILE_OPTIONS; i++) {
        const char *path = *(const char *const *)((const char *)s +
                                                  file_options[i].at);
        if (path && !is_dash(path))
            grant_option(set, path, file_options[i].how, known);
    }
    grant(set, "/proc/self/cgroup", READ_FILE);
    grant(set, "/sys/fs/cgroup", READ_FILE);
    grant(set, "/proc/meminfo", READ_FILE);
    if (chats && s->sandbox == SANDBOX_AUTO) {
        grant(set, ".", words);
        grant(set, tmp && *tmp ? tmp : "/tmp", words);
    }
}

static int confine_files(const struct settings *s, int chats)
{
    const long version = syscall(CREATE_RULESET, NULL, (size_t)0, 1);
    struct ruleset is;
    int set, failed;

    if (version < 1)
        return lacks(s, "Landlock", strerror(errno));
    is = all_rights(version);
    set = (int)syscall(CREATE_RULESET, &is, sizeof is, 0);
    if (set < 0)
        return lacks(s, "Landlock", strerror(errno));
    grant_all(set, s, chats, is.files);
    failed = syscall(RESTRICT_SELF, set, 0) != 0;
    close(set);
    if (failed)
        return lacks(s, "Landlock", strerror(errno));
    if (s->verbose)
        say(DONE, "sandbox: Landlock %ld", version);
    return DONE;
}

/* ---- system calls: seccomp */

/* When a call is allowed: while threads start, if files are opened later, and
 * at all times. */
enum { STARTING = 1, OPENING = 2, ANY_TIME = 4 };

/* If arg >= 0, only with (argument & mask) == is. */
struct system_call { long number; int when, arg; uint32_t mask, is; };

enum { EXECUTABLE = 4, A_THREAD = 0x10100, CLONE_ARG = ELF_MACHINE == 22 };

/* What isatty() asks, in older and newer libraries, and what musl does. */
#if ELF_MACHINE == 21
enum { GET_TERMINAL = 0x402c7413, GET_WINDOW = 0x40087468 };
#else
enum { GET_TERMINAL = 0x5401, GET_WINDOW = 0x5413 };
#endif
#define GET_TERMINAL_2 0x802c542au

#define CALL(name, when)        { SYS_##name, when, -1, 0, 0 }
#define IF(name, when, arg, is) { SYS_##name, when, arg, UINT32_MAX, is }
#define NOT(name, arg, bits)    { SYS_##name, ANY_TIME, arg, bits, 0 }

/* Not every machine has all of them: newer ones lack what those with "at" in
 * their names can do, those of 32 bits have doubles for 64.  Files that were
 * not opened here cannot be written, so that it does no harm to look at their
 * size.  Memory is never executed that was not before; a clone is a thread, and
 * threads may still be on their way when the last filter comes. */
static const struct system_call system_calls[] = {
    CALL(futex, ANY_TIME), CALL(write, ANY_TIME), CALL(writev, ANY_TIME),
    CALL(read, ANY_TIME), CALL(readv, ANY_TIME), CALL(close, ANY_TIME),
    CALL(lseek, ANY_TIME), CALL(fstat, ANY_TIME), CALL(fsync, ANY_TIME),
    CALL(brk, ANY_TIME), CALL(munmap, ANY_TIME), CALL(mremap, ANY_TIME),
    CALL(madvise, ANY_TIME), NOT(mprotect, 2, EXECUTABLE),
#if ELF_MACHINE == 22                     /* there, it is given a pointer    */
    CALL(mmap, ANY_TIME),
#else
#ifdef SYS_mmap2
    NOT(mmap2, 2, EXECUTABLE), CALL(_llseek, ANY_TIME),
    CALL(fstat64, ANY_TIME), CALL(fstatat64, ANY_TIME),
    CALL(stat64, ANY_TIME), IF(fcntl64, ANY_TIME, 1, F_GETFL),
    IF(fcntl64, ANY_TIME, 1, F_SETFD), IF(fcntl64, STARTING, 1, F_SETLK),
    CALL(ftruncate64, STARTING | OPENING),
#else
    NOT(mmap, 2, EXECUTABLE),
#endif
#endif
#ifdef SYS_newfstatat
    CALL(newfstatat, ANY_TIME),
#endif
#ifdef SYS_statx
    CALL(statx, ANY_TIME),
#endif
    CALL(getpid, ANY_TIME), CALL(gettid, ANY_TIME), CALL(exit, ANY_TIME),
    CALL(exit_group, ANY_TIME), CALL(restart_syscall, ANY_TIME),
    CALL(rt_sigaction, ANY_TIME), CALL(rt_sigprocmask, ANY_TIME),
    CALL(rt_sigreturn, ANY_TIME), CALL(sigaltstack, ANY_TIME),
#ifdef SYS_sigreturn
    CALL(sigreturn, ANY_TIME),
#endif
    CALL(sched_yield, ANY_TIME), CALL(getrandom, ANY_TIME),
    CALL(getrusage, ANY_TIME), CALL(sysinfo, ANY_TIME), CALL(ppoll, ANY_TIME),
#ifdef SYS_ppoll_time64
    CALL(ppoll_time64, ANY_TIME), CALL(futex_time64, ANY_TIME),
#endif
#ifdef SYS_clock_gettime
    CALL(clock_gettime, ANY_TIME),
#endif
#ifdef SYS_clock_gettime64
    CALL(clock_gettime64, ANY_TIME),
#endif
    IF(ioctl, ANY_TIME, 1, GET_TERMINAL),
    IF(ioctl, ANY_TIME, 1, GET_TERMINAL_2), IF(ioctl, ANY_TIME, 1, GET_WINDOW),
    IF(fcntl, ANY_TIME, 1, F_GETFL), IF(fcntl, ANY_TIME, 1, F_SETFD),
    IF(fcntl, STARTING, 1, F_SETLK),
    { SYS_clone, STARTING, CLONE_ARG, A_THREAD, A_THREAD },
    CALL(set_robust_list, ANY_TIME), CALL(sched_getaffinity, STARTING),
    CALL(seccomp, STARTING), CALL(mincore, STARTING),
#ifdef SYS_rseq
    CALL(rseq, ANY_TIME),
#endif
    CALL(openat, STARTING | OPENING), CALL(ftruncate, STARTING | OPENING),
    CALL(faccessat, STARTING | OPENING), CALL(mkdirat, STARTING),
    CALL(fchmod, OPENING), CALL(unlinkat, OPENING),
#ifdef SYS_renameat
    CALL(renameat, OPENING),
#endif
#ifdef SYS_renameat2
    CALL(renameat2, OPENING),
#endif
#ifdef SYS_open
    CALL(poll, ANY_TIME), CALL(open, STARTING | OPENING),
    CALL(access, STARTING | OPENING), CALL(mkdir, STARTING),
    CALL(stat, ANY_TIME),
    CALL(unlink, OPENING), CALL(rename, OPENING),
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

/* From now on only the calls of these times, in all threads.  Calls of another
 * architecture are other calls by the same numbers. */
static int confine_calls(int when)
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
        if (system_calls[i].when & when)
            emit_call(&f, &system_calls[i]);
    emit_call(&f, &(struct system_call){ SYS_tgkill, 0, 0, UINT32_MAX,
                                  (uint32_t)getpid() });
    emit(&f, IF_AT_LEAST, NEWER, 0, 1);
    emit(&f, RETURN, FAIL(ENOSYS), 0, 0);
    emit(&f, RETURN, FAIL(EPERM), 0, 0);
    return syscall(SYS_seccomp, 1, 1, &f) == 0 ? 0 : -1;
}

/* ---- both */

static int opens_late(const struct settings *s, int chats)
{
    return s->session || s->trace_npy ||
           (chats && (s->file || s->sandbox == SANDBOX_AUTO)) ? OPENING : 0;
}

/* Dates need to know the time zone, which is a file, before. */
static int begin_sandbox(const struct settings *s, int chats)
{
    int code;

    if (s->sandbox == SANDBOX_OFF)
        return DONE;
    tzset();
    setrlimit(RLIMIT_CORE, &(struct rlimit){ 0, 0 });
    if (syscall(SYS_prctl, PR_NO_NEW_PRIVS, 1L, 0L, 0L, 0L) != 0)
        return lacks(s, "sandbox", strerror(errno));
    syscall(SYS_prctl, PR_DUMPABLE, 0L, 0L, 0L, 0L);
    code = confine_files(s, chats);
    if (code == DONE && s->sandbox == SANDBOX_REQUIRE &&
        confine_calls(STARTING | ANY_TIME | opens_late(s, chats)) != 0)
        code = lacks(s, "seccomp", strerror(errno));
    return code;
}

static int lock_sandbox(const struct settings *s, int chats)
{
    const int late = opens_late(s, chats);

    if (s->sandbox == SANDBOX_OFF)
        return DONE;
    if (confine_calls(ANY_TIME | late) != 0)
        return lacks(s, "seccomp", strerror(errno));
    if (s->verbose)
        say(DONE, "sandbox: seccomp; files can%s be opened", late ? "" :
            "not");
    return DONE;
}

#endif

/* ------------------------------------------------------------------ 5. JSON
 *
 * Requests arrive as JSON (RFC 8259), tools are described in it, and results
 * leave as it.  The reader is strict: what it takes, every other reader takes.
 * A text becomes a tree of nodes out of a pool, and one call releases a whole
 * request.  Nothing calls itself, so how deep a text may nest is decided by a
 * limit and not by the stack.
 *
 * The same loop reads the Python literals in which models call tools, see
 * section 7. */

enum {
    MAX_JSON = 1 << 26,                   /* bytes of text                   */
    MAX_POOL = 1 << 28,                   /* bytes of nodes and strings      */
    MAX_DEPTH = 64,
    MAX_MEMBERS = 4096                    /* of an object                    */
};

/* Some bytes within a text. */
struct piece { const char *s; size_t n; };

/* Memory that is released at once.  A zeroed one is empty and good; once there
 * is no more memory `failed` stays, and what asks for some gets NULL. */
struct block { struct block *next; };

struct pool { struct block *blocks; size_t total; int failed; };

enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY,
       JSON_OBJECT };

static const char *const json_names[] = {
    "null", "false", "true", "a number", "a string", "an array", "an object"
};

/* A string's bytes are well-formed UTF-8 if they were read from JSON, and s[n]
 * is NUL; \u0000 makes another NUL before it, so json_text() gives out a string
 * only if it is whole as a C string.  Numbers are kept as they were written.
 * All before `key` is the value, from there on its place in another. */
struct json {
    int type;
    int close;                            /* the bracket that will end it    */
    const char *s;
    size_t n;
    struct json *first, *last;            /* its members                     */
    int n_members;
    const char *key;                      /* in an object; not always UTF-8  */
    size_t n_key;
    struct json *next;
};

/* n zeroed bytes, aligned for a node; or NULL. */
static void *pool_get(struct pool *p, size_t n)
{
    struct block *b = NULL;

    if (!p->failed && n < MAX_POOL - p->total)
        b = calloc(1, sizeof *b + n);
    p->failed |= !b;
    if (!b)
        return NULL;
    b->next = p->blocks;
    p->blocks = b;
    p->total += n;
    return b + 1;
}

static void pool_free(struct pool *p)
{
    while (p->blocks) {
        struct block *next = p->blocks->next;
        free(p->blocks);
        p->blocks = next;
    }
    *p = (struct pool){ NULL, 0, 0 };
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

/* ---- trees
 *
 * Any of these may be given NULL, for what is not there or had no memory. */

static struct json *json_new(struct pool *p, int type)
{
    struct json *v = pool_get(p, sizeof *v);

    if (v)
        v->type = type;
    return v;
}

static struct json *json_array(struct pool *p)
{
    return json_new(p, JSON_ARRAY);
}

static struct json *json_object(struct pool *p)
{
    return json_new(p, JSON_OBJECT);
}

static char *copy_bytes(struct pool *p, const char *s, size_t n)
{
    char *out = pool_get(p, n + 1);

    return out && n > 0 ? memcpy(out, s, n) : out;
}

static struct json *json_string(struct pool *p, const char *s, size_t n)
{
    const char *copy = copy_bytes(p, s, n);
    struct json *v = copy ? json_new(p, JSON_STRING) : NULL;

    if (v) {
        v->s = copy;
        v->n = n;
    }
    return v;
}

/* Looks at all keys: MAX_MEMBERS keeps that fast. */
static struct json *find_key(const struct json *object, const char *key,
                             size_t n)
{
    struct json *v = object->first;

    while (v && (v->n_key != n || memcmp(v->key, key, n) != 0))
        v = v->next;
    return v;
}

/* A new node at the end, for now null. */
static struct json *new_member(struct pool *p, struct json *parent)
{
    struct json *v = parent ? json_new(p, JSON_NULL) : NULL;

    if (!v)
        return NULL;
    if (parent->last)
        parent->last->next = v;
    else
        parent->first = v;
    parent->last = v;
    parent->n_members++;
    return v;
}

/* Give a node another value; it stays where it is. */
static void json_fill(struct json *v, const struct json *value)
{
    memcpy(v, value, offsetof(struct json, key));
}

/* The member of this key, new or emptied: the last of equal keys wins, in the
 * place of the first, as in Python.  The key is borrowed. */
static struct json *key_member(struct pool *p, struct json *object,
                               const char *key, size_t n)
{
    static const struct json null;
    struct json *v = find_key(object, key, n);

    if (v)
        json_fill(v, &null);
    else if ((v = new_member(p, object)) != NULL) {
        v->key = key;
        v->n_key = n;
    }
    return v;
}

/* Both share what is inside of the value, but not its node. */
static void json_append(struct pool *p, struct json *array,
                        const struct json *value)
{
    struct json *v = value ? new_member(p, array) : NULL;

    if (v)
        json_fill(v, value);
}

static void json_set(struct pool *p, struct json *object, const char *key,
                     const struct json *value)
{
    const size_t n = strlen(key);
    const char *copy = object && value ? copy_bytes(p, key, n) : NULL;
    struct json *v = copy ? key_member(p, object, copy, n) : NULL;

    if (v)
        json_fill(v, value);
}

/* NULL if there is no such key, or no object. */
static struct json *json_get(const struct json *object, const char *key)
{
    if (!object || object->type != JSON_OBJECT)
        return NULL;
    return find_key(object, key, strlen(key));
}

static int json_is(const struct json *v, int type)
{
    return v && v->type == type;
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
    const double x = json_is(v, JSON_NUMBER) ? strtod(v->s, NULL) : NAN;

    if (!isfinite(x))
        return -1;
    *out = x;
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
 * place: no escape is shorter than what it stands for. */

struct reader {
    struct pool *pool;
    const char *text;                     /* n bytes, as they came           */
    size_t n;
    char *start, *at, *end;               /* of the copy                     */
    int python;                           /* literals and calls, not JSON    */
    struct json *open[MAX_DEPTH + 2];     /* brackets, the root being one    */
    int depth;
    struct why *why;
};

/* What was found, where, and what should have been there. */
static int expected(struct reader *r, const char *what)
{
    const char *line = r->text, *const at = line + (r->at - r->start);
    char found[16] = "the end";
    int n = 1;

    if (r->pool->failed)
        return because(r->why, NO_MEMORY, "no memory for what %zu bytes of "
                       "JSON hold", r->n);
    for (const char *p = line; p < at; p++)
        if (*p == '\n') {
            line = p + 1;
            n++;
        }
    if (r->at < r->end)
        snprintf(found, sizeof found, *at > ' ' && *at < 127 ? "'%c'" :
                 "byte 0x%02x", (unsigned char)*at);
    return because(r->why, USAGE, "line %d, column %zu: found %s, expected %s",
                   n, (size_t)(at - line) + 1, found, what);
}

/* The next character that is not blank, or EOF. */
static int peek(struct reader *r)
{
    r->at += strspn(r->at, " \n\t\r");
    return r->at < r->end ? (unsigned char)*r->at : EOF;
}

/* Step over the next character if it is this one. */
static int took(struct reader *r, int c)
{
    if (peek(r) != c)
        return 0;
    r->at += c != EOF;
    return 1;
}

/* n hexadecimal digits, up to 8. */
static int read_hex(const char *s, size_t n, uint32_t *out)
{
    char digits[9] = "";

    if (strspn(s, "0123456789abcdefABCDEF") < n)
        return 0;
    memcpy(digits, s, n);
    *out = (uint32_t)strtoul(digits, NULL, 16);
    return 1;
}

/* What lies beyond 0xffff is written as a pair; half of one is no character. */
static int join_pair(struct reader *r, uint32_t *c)
{
    uint32_t low;

    if (*c >> 10 == 0xd800 >> 10 && r->at[0] == '\\' && r->at[1] == 'u' &&
        read_hex(r->at + 2, 4, &low) && low >> 10 == 0xdc00 >> 10) {
        *c = 0x10000 + ((*c & 0x3ff) << 10 | (low & 0x3ff));
        r->at += 6;
    }
    if (*c <= 0x10ffff && *c >> 11 != 0xd800 >> 11)
        return 1;
    *c = 0xfffd;
    return r->python;
}

/* What follows a backslash.  Python has more escapes than JSON, and what is
 * none of them keeps its backslash. */
static int read_escape(struct reader *r, char **out)
{
    static const char name[] = "\"\\/bfnrt'av";
    static const char value[] = "\"\\/\b\f\n\r\t'\a\v";
    const char *p = memchr(name, *r->at, r->python ? 11 : 8);
    const size_t n_hex = *r->at == 'u' ? 4 : !r->python ? 0 :
                         *r->at == 'x' ? 2 : *r->at == 'U' ? 8 : 0;
    uint32_t c = '\\';
    int good = r->python;

    if (r->python && *r->at == '\n') {
        r->at++;
        return DONE;
    }
    if (p) {
        c = (unsigned char)value[p - name];
        r->at++;
        good = 1;
    } else if (n_hex > 0 && read_hex(r->at + 1, n_hex, &c)) {
        r->at += 1 + n_hex;
        good = join_pair(r, &c);
    }
    *out += utf8_put(*out, c);
    return good ? DONE : expected(r, "\" \\ / b f n r t or u and hexadecimal "
                                  "digits, surrogates in pairs, after a "
                                  "backslash");
}

/* Does the quote at s end a string?  Models forget the backslash before a quote
 * within one: it ends where its container could go on. */
static int ends_string(const char *s)
{
    s += 1 + strspn(s + 1, " \t\r\n");
    return *s && strchr(",)]}:", *s);
}

/* One character, an escape or not. */
static int read_character(struct reader *r, char **out)
{
    uint32_t c;
    int n;

    if (*r->at == '\\') {
        r->at++;
        return read_escape(r, out);
    }
    n = utf8_get(r->at, r->end, &c);
    if (n == 0)
        return expected(r, "UTF-8");
    if (!r->python && c < ' ')
        return expected(r, "no control character in a string, but an escape");
    memmove(*out, r->at, (size_t)n);
    *out += n;
    r->at += n;
    return DONE;
}

static int read_string(struct reader *r, const char **s, size_t *n)
{
    const char quote = *r->at++;
    char *out = r->at;

    *s = out;
    while (*r->at != quote || (r->python && !ends_string(r->at))) {
        if (r->at == r->end)
            return expected(r, "a quote after the string");
        if (read_character(r, &out) != DONE)
            return USAGE;
    }
    r->at++;
    *n = (size_t)(out - *s);
    *out = '\0';
    return DONE;
}

/* How long the number at s is; 0 if there is none. */
static size_t number_length(const char *s)
{
    static const char digits[] = "0123456789";
    const char *p = s + (*s == '-');
    size_t n = strspn(p, digits);

    if (n == 0 || (*p == '0' && n > 1))
        return 0;
    p += n;
    if (*p == '.') {
        n = strspn(++p, digits);
        p += n;
    }
    if (n > 0 && (*p == 'e' || *p == 'E')) {
        p += p[1] == '+' || p[1] == '-' ? 2 : 1;
        n = strspn(p, digits);
        p += n;
    }
    return n > 0 ? (size_t)(p - s) : 0;
}

/* Python may have a plus in front.  A call has no number beyond all others, for
 * it leaves as JSON. */
static int read_number(struct reader *r, struct json *v)
{
    r->at += *r->at == '+';
    v->n = number_length(r->at);
    if (v->n == 0)
        return expected(r, "a number: -, digits without leading zeros, .digits,"
                        " exponent");
    v->type = JSON_NUMBER;
    v->s = copy_bytes(r->pool, r->at, v->n);
    if (!v->s || (r->python && !isfinite(strtod(v->s, NULL))))
        return expected(r, "a finite number");
    r->at += v->n;
    return DONE;
}

/* Step over the letters of a name, as tools and their arguments have; may be
 * none. */
static size_t read_name(struct reader *r)
{
    const char *const from = r->at;

    while (isalnum((unsigned char)*r->at) || (*r->at & 0x80) ||
           (*r->at && strchr("_.-", *r->at)))
        r->at++;
    return (size_t)(r->at - from);
}

/* Calls stand alone or in one list. */
static int may_call(const struct reader *r)
{
    return r->python && (r->depth == 1 ||
                         (r->depth == 2 && r->open[1]->close == ']'));
}

/* A call is an object with the arguments as members and the name in s[n], which
 * no NUL ends. */
static int read_word(struct reader *r, struct json *v)
{
    static const struct { const char *word; int type; } known[] = {
        { "null", JSON_NULL }, { "false", JSON_FALSE }, { "true", JSON_TRUE },
        { "None", JSON_NULL }, { "False", JSON_FALSE }, { "True", JSON_TRUE }
    };
    char *const name = r->at;
    const size_t n = read_name(r);

    if (n > 0 && may_call(r) && took(r, '(')) {
        v->type = JSON_OBJECT;
        v->close = ')';
        v->s = name;
        v->n = n;
        return DONE;
    }
    for (int i = 0; i < (r->python ? 6 : 3); i++)
        if (strlen(known[i].word) == n && memcmp(name, known[i].word, n) == 0) {
            v->type = known[i].type;
            return DONE;
        }
    r->at = name;
    return expected(r, "a value");
}

/* A value, or the beginning of one that has members. */
static int read_value(struct reader *r, struct json *v)
{
    const int c = peek(r);

    if (c == '{' || c == '[' || (r->python && c == '(')) {
        r->at++;
        v->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        v->close = c == '{' ? '}' : c == '[' ? ']' : ')';
        return DONE;
    }
    if (c == '"' || (r->python && c == '\'')) {
        v->type = JSON_STRING;
        return read_string(r, &v->s, &v->n);
    }
    if (c == '-' || (c >= '0' && c <= '9') || (r->python && c == '+'))
        return read_number(r, v);
    return read_word(r, v);
}

/* "key": in an object and name= in a call, whose only argument may have none if
 * it is a dict. */
static int read_key(struct reader *r, const struct json *in, const char **key,
                    size_t *n)
{
    const int c = peek(r), call = in->close == ')';

    *key = r->at;
    *n = 0;
    if (call && c == '{' && !in->first)
        return DONE;
    if (!call && (c == '"' || (r->python && c == '\''))) {
        if (read_string(r, key, n) != DONE)
            return USAGE;
    } else if (!r->python || (*n = read_name(r)) == 0)
        return expected(r, "a key in double quotes");
    return took(r, call ? '=' : ':') ? DONE : expected(r, "':' and a value");
}

static int read_member(struct reader *r, struct json *in, struct json **out)
{
    const char *key;
    size_t n;

    if (in->type == JSON_ARRAY)
        *out = new_member(r->pool, in);
    else if (in->n_members == MAX_MEMBERS)
        return expected(r, "no more than 4096 members");
    else if (read_key(r, in, &key, &n) != DONE)
        return USAGE;
    else
        *out = key_member(r->pool, in, key, n);
    return *out ? read_value(r, *out) : expected(r, "memory");
}

/* A comma after a member that does not end its container. */
static int read_comma(struct reader *r, const struct json *in)
{
    char what[] = "',' or ' '";

    if ((r->python || in->close != EOF) && took(r, ','))
        return DONE;
    what[8] = (char)in->close;
    return expected(r, in->close == EOF ? "the end" : what);
}

/* All values up to the end, as members of a root that closes there. */
static int read_tree(struct reader *r, struct json *root)
{
    enum { VALUE, VALUE_OR_END, COMMA_OR_END } next = VALUE;
    int code = DONE;

    *root = (struct json){ .type = JSON_ARRAY, .close = EOF };
    r->start = r->at = copy_bytes(r->pool, r->text, r->n);
    if (!r->at)
        return expected(r, "memory");
    r->end = r->at + r->n;
    r->open[0] = root;
    r->depth = 1;
    while (code == DONE && r->depth > 0) {
        struct json *in = r->open[r->depth - 1], *v = NULL;
        if (next != VALUE && took(r, in->close)) {
            r->depth--;
            next = COMMA_OR_END;
        } else if (next == COMMA_OR_END) {
            code = read_comma(r, in);
            next = r->python ? VALUE_OR_END : VALUE;
        } else {
            code = read_member(r, in, &v);
            next = v && v->close ? VALUE_OR_END : COMMA_OR_END;
        }
        if (code != DONE || !v || !v->close)
            continue;
        if (r->depth > MAX_DEPTH)
            return because(r->why, USAGE, "JSON nested deeper than %d levels",
                           MAX_DEPTH);
        r->open[r->depth++] = v;
    }
    return code;
}

/* The tree of a whole text; DONE, USAGE or NO_MEMORY. */
static int json_parse(struct pool *pool, const char *text, size_t n,
                      struct json **out, struct why *why)
{
    struct reader r = { .pool = pool, .text = text, .n = n, .why = why };
    struct json root;
    int code;

    *out = NULL;
    if (n > MAX_JSON)
        return because(why, USAGE, "JSON of %zu bytes, expected at most %d", n,
                       MAX_JSON);
    if (n >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0)
        return because(why, USAGE, "the JSON begins with a byte order mark, "
                       "expected none");
    code = read_tree(&r, &root);
    if (code == DONE)
        *out = root.first;
    return code;
}

/* ---- writing, exactly as Python's json.dumps(x, ensure_ascii=False) */

/* Each byte that is no UTF-8 becomes a replacement character. */
static void add_json_string(struct text *t, const char *s, size_t n)
{
    static const char value[] = "\"\\\b\f\n\r\t", name[] = "\"\\bfnrt";
    const char *const end = s + n, *plain = s;

    add_string(t, "\"");
    while (s < end) {
        const char *p = *s ? strchr(value, *s) : NULL;
        uint32_t c;
        const int size = utf8_get(s, end, &c);
        if (size > 0 && c >= ' ' && !p) {
            s += size;
            continue;
        }
        add(t, plain, (size_t)(s - plain));
        if (p)
            add_format(t, "\\%c", name[p - value]);
        else
            add_format(t, size ? "\\u%04x" : "\xef\xbf\xbd", (unsigned)c);
        plain = ++s;
    }
    add(t, plain, (size_t)(end - plain));
    add_string(t, "\"");
}

/* The fewest digits that are this number, as Python prints floats. */
static void add_float(struct text *t, double x, int python)
{
    char s[40];
    int n = 0, e;

    if (isinf(x)) {
        add_string(t, x < 0 ? "-" : "");
        add_string(t, python ? "inf" : "Infinity");
        return;
    }
    do
        snprintf(s, sizeof s, "%.*e", n, x);
    while (strtod(s, NULL) != x && ++n < 17);
    e = atoi(strchr(s, 'e') + 1);
    if (e < -4 || e >= 16)
        add_string(t, s);
    else
        add_format(t, "%.*f", n > e ? n - e : 1, x);
}

/* A string as Python's repr() writes it, but for rare characters without a
 * picture of their own. */
static void add_python_string(struct text *t, const char *s, size_t n)
{
    const char *const end = s + n;
    const int quote = memchr(s, '\'', n) && !memchr(s, '"', n) ? '"' : '\'';
    uint32_t c;

    add_format(t, "%c", quote);
    for (int size; s < end; s += size) {
        size = utf8_get(s, end, &c);
        size = size ? size : 1;
        if (c == '\\' || c == (uint32_t)quote)
            add_format(t, "\\%c", (int)c);
        else if (c == '\n' || c == '\r' || c == '\t')
            add_string(t, c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t");
        else if (is_control(c) || c == 0xa0 || c == 0xad)
            add_format(t, "\\x%02x", (unsigned)c);
        else
            add(t, s, (size_t)size);
    }
    add_format(t, "%c", quote);
}

/* A value, or how one that has members begins. */
static void add_scalar(struct text *t, const struct json *v, int python)
{
    static const char *const word[][JSON_OBJECT + 1] = {
        { [JSON_NULL] = "null", [JSON_FALSE] = "false", [JSON_TRUE] = "true",
          [JSON_ARRAY] = "[", [JSON_OBJECT] = "{" },
        { [JSON_NULL] = "None", [JSON_FALSE] = "False", [JSON_TRUE] = "True",
          [JSON_ARRAY] = "[", [JSON_OBJECT] = "{" }
    };

    if (v->type == JSON_STRING)
        (python ? add_python_string : add_json_string)(t, v->s, v->n);
    else if (v->type != JSON_NUMBER)
        add_string(t, word[python][v->type]);
    else if (strpbrk(v->s, ".eE"))
        add_float(t, strtod(v->s, NULL), python);
    else
        add_string(t, strcmp(v->s, "-0") == 0 ? "0" : v->s);
}

/* What is deeper than anything that is ever read is left out. */
static void add_tree(struct text *t, const struct json *v, int python)
{
    const struct json *open[2 * MAX_DEPTH];
    int depth = 0;

    while (v) {
        if (depth > 0 && v->key) {
            (python ? add_python_string : add_json_string)(t, v->key, v->n_key);
            add_string(t, ": ");
        }
        add_scalar(t, v, python);
        if (v->first && depth < 2 * MAX_DEPTH) {
            open[depth++] = v;
            v = v->first;
            continue;
        }
        for (;; v = open[--depth]) {
            if (v->type >= JSON_ARRAY)
                add_string(t, v->type == JSON_ARRAY ? "]" : "}");
            if (depth == 0)
                return;
            if (v->next)
                break;
        }
        add_string(t, ", ");
        v = v->next;
    }
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

/* Print a whole text and let go of it. */
static int print_text(struct text *t, const char *what)
{
    const int failed = t->failed;

    if (!failed)
        show_text(t);
    free(t->s);
    return failed ? say(NO_MEMORY, "no memory for %s", what) : DONE;
}

/* -------------------------------------------------------- 6. Chat templates
 *
 * The models of the family were trained on five ways to write down the same
 * conversation.  Their files carry them as Jinja programs; here they are one
 * function and a table of what tells them apart.  The result is text together
 * with the places in it that are control tokens because the template put them
 * there: what a user writes is never more than text. */

#define BOS        "<|startoftext|>"
#define TURN_START "<|im_start|>"
#define TURN_END   "<|im_end|>"
#define CALL_START "<|tool_call_start|>"
#define CALL_END   "<|tool_call_end|>"
#define THINK      "<think>"
#define THINK_END  "</think>"

/* The words of --template, in the order of TEMPLATE_... */
static const char *const template_names[] = {
    "auto", "lfm2", "lfm2.5-instruct", "lfm2.5-new", "lfm2.5-vl",
    "lfm2.5-8b-a1b", "none"
};

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

static const struct dialect {
    int marked;                           /* tools and results in markers    */
    int dated;                            /* tools as one list, with a date  */
    enum { ALL, SINCE_ANSWER, SINCE_QUESTION } thoughts;  /* that are kept   */
    enum { NO_CALLS, CALLS_FIRST, CALLS_LAST } calls;     /* and the content */
    const char *quote;                    /* of an argument; NULL: as JSON   */
} dialects[] = {
    [TEMPLATE_LFM2]     = { 1, 0, ALL, NO_CALLS, NULL },
    [TEMPLATE_INSTRUCT] = { 0, 0, SINCE_ANSWER, NO_CALLS, NULL },
    [TEMPLATE_NEW]      = { 0, 1, SINCE_ANSWER, CALLS_LAST, NULL },
    [TEMPLATE_VL]       = { 0, 1, SINCE_ANSWER, CALLS_FIRST, "\"" },
    [TEMPLATE_8B]       = { 0, 0, SINCE_QUESTION, CALLS_LAST, "'" },
};

struct rendering {
    const struct conversation *conv;
    const struct dialect *as;
    struct rendered *out;
    struct text parts;                    /* the content of one message      */
    struct pool pool;
};

static void rendered_free(struct rendered *r)
{
    free(r->text.s);
    free(r->mark);
    *r = (struct rendered){ .n_marks = 0 };
}

/* Room for marks doubles whenever their number is a power of two.  There are
 * not too many for that, as the text has bytes of each. */
static void add_mark(struct rendered *r, const char *token)
{
    const size_t n = (size_t)r->n_marks;
    struct mark *mark = r->mark;

    if (!r->text.failed && (n & (n - 1)) == 0)
        mark = realloc(mark, (n ? 2 * n : 1) * sizeof *mark);
    r->text.failed |= !mark;
    if (r->text.failed)
        return;
    r->mark = mark;
    r->mark[r->n_marks++] = (struct mark){ r->text.n, strlen(token) };
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
    while (s < end && (s = memchr(s, *word, (size_t)(end - s))) != NULL) {
        if (begins(s, end, word))
            return s;
        s++;
    }
    return NULL;
}

/* ---- what is good */

static const char *kind(const struct json *v)
{
    return v ? json_names[v->type] : "nothing";
}

/* The member of this key; null is the same as nothing, but for one template. */
static const struct json *given(const struct json *object, const char *key)
{
    const struct json *v = json_get(object, key);

    return json_is(v, JSON_NULL) ? NULL : v;
}

/* Is it of this type?  A string has to be text without NUL characters, too. */
static int check(const struct json *v, int type, struct why *why,
                 const char *name, ...)
{
    char s[64];
    va_list args;

    va_start(args, name);
    vsnprintf(s, sizeof s, name, args);
    va_end(args);
    if (!json_is(v, type))
        return because(why, USAGE, "%s is %s, expected %s", s, kind(v),
                       json_names[type]);
    if (type == JSON_STRING && !json_text(v))
        return because(why, USAGE, "%s has a NUL character after %zu bytes, "
                       "expected text", s, strlen(v->s));
    return DONE;
}

/* Text, or parts that are all text. */
static int check_content(const struct json *content, int i, struct why *why)
{
    const struct json *part = content->first;
    int code = DONE;

    if (content->type != JSON_ARRAY)
        return check(content, JSON_STRING, why, "messages[%d].content", i);
    for (int k = 0; part && code == DONE; part = part->next, k++) {
        const char *type = json_text(json_get(part, "type"));
        if (!type || strcmp(type, "text") != 0)
            return because(why, USAGE, "messages[%d].content[%d] is no part of "
                           "type \"text\", and this program reads text only", i,
                           k);
        code = check(json_get(part, "text"), JSON_STRING, why,
                     "messages[%d].content[%d].text", i, k);
    }
    return code;
}

/* The function of a tool call, which may be wrapped or not. */
static const struct json *function_of(const struct json *call)
{
    const struct json *function = json_get(call, "function");

    return json_is(function, JSON_OBJECT) ? function : call;
}

/* Arguments as an object, though OpenAI's clients send them as a string with
 * JSON; NULL if they are neither. */
static const struct json *arguments_of(struct pool *pool, const struct json *v)
{
    struct json *parsed;
    struct why why;

    if (!v || v->type == JSON_NULL || (v->type == JSON_STRING && v->n == 0))
        return json_object(pool);
    if (v->type == JSON_STRING && json_parse(pool, v->s, v->n, &parsed, &why)
        == DONE)
        v = parsed;
    return v->type == JSON_OBJECT ? v : NULL;
}

static int check_calls(struct pool *pool, const struct json *calls, int i,
                       struct why *why)
{
    const struct json *call = calls->first;
    int code = check(calls, JSON_ARRAY, why, "messages[%d].tool_calls", i);

    for (int k = 0; code == DONE && call; call = call->next, k++) {
        const struct json *function = function_of(call);
        const struct json *args = json_get(function, "arguments");
        if (!json_text(json_get(function, "name")))
            return because(why, USAGE, "messages[%d].tool_calls[%d] has no "
                           "function with a name", i, k);
        if (!arguments_of(pool, args))
            return because(why, USAGE, "messages[%d].tool_calls[%d].function."
                           "arguments is %s, expected an object or a string "
                           "with one", i, k, kind(args));
    }
    return code;
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

/* What the model thought before this answer, by either name. */
static const struct json *thinking_of(const struct json *message)
{
    const struct json *v = given(message, "thinking");

    return v ? v : given(message, "reasoning_content");
}

static int check_message(struct pool *pool, const struct json *m, int i,
                         struct why *why)
{
    const struct json *role = json_get(m, "role"), *thinking = thinking_of(m);
    const struct json *content = given(m, "content");
    const struct json *calls = given(m, "tool_calls");
    int code = check(m, JSON_OBJECT, why, "messages[%d]", i);

    if (code == DONE && !role_of(m))
        return because(why, USAGE, "messages[%d].role is %s, expected "
                       "\"system\", \"user\", \"assistant\" or \"tool\"", i,
                       json_is(role, JSON_STRING) ? "another string" :
                       kind(role));
    if (code == DONE && content)
        code = check_content(content, i, why);
    if (code == DONE && thinking)
        code = check(thinking, JSON_STRING, why, "messages[%d].thinking", i);
    if (code == DONE && calls)
        code = check_calls(pool, calls, i, why);
    return code;
}

static int has_tools(const struct conversation *c)
{
    return c->tools && c->tools->first;
}

static int check_conversation(struct pool *pool, const struct conversation *c,
                              struct why *why)
{
    const struct json *m = c->messages, *tool;
    int code = DONE, i = 0;

    if (!json_is(m, JSON_ARRAY) || !m->first)
        return because(why, USAGE, "messages is %s, expected an array of "
                       "messages", json_is(m, JSON_ARRAY) ? "empty" : kind(m));
    for (m = m->first; m && code == DONE; m = m->next)
        code = check_message(pool, m, i++, why);
    m = c->messages->last;
    if (code == DONE && c->continue_last &&
        strcmp(role_of(m), "assistant") != 0)
        return because(why, USAGE, "messages[%d] is of role %s, expected "
                       "\"assistant\" to continue it", i - 1, role_of(m));
    if (code == DONE && c->tools && c->tools->type != JSON_NULL)
        code = check(c->tools, JSON_ARRAY, why, "tools");
    tool = has_tools(c) ? c->tools->first : NULL;
    for (i = 0; tool && code == DONE; tool = tool->next, i++)
        if (tool->type != JSON_STRING)
            code = check(tool, JSON_OBJECT, why, "tools[%d]", i);
    return code;
}

/* ---- as Python has it */

/* What Python's str.strip() takes away. */
static int is_blank(uint32_t c)
{
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 ||
           c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
           c == 0x3000;
}

static struct piece trim(const char *s, const char *end)
{
    uint32_t c;
    int n = 0;

    while (s < end && (n = utf8_get(s, end, &c)) > 0 && is_blank(c))
        s += n;
    while (s < end) {
        const char *p = end - 1;
        while (p > s && (*p & 0xc0) == 0x80)
            p--;
        if (utf8_get(p, end, &c) == 0 || !is_blank(c))
            break;
        end = p;
    }
    return (struct piece){ s, (size_t)(end - s) };
}

/* The value of an argument in a call: Python's, but for strings and dicts. */
static void add_argument(struct text *t, const struct json *v,
                         const char *quote)
{
    if (v->type == JSON_STRING && quote) {
        add_string(t, quote);
        add(t, v->s, v->n);
        add_string(t, quote);
    } else
        add_tree(t, v, v->type != JSON_STRING && v->type != JSON_OBJECT);
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

/* Add a marker, if the template marks tools and what they return. */
static void put_marker(struct rendering *r, const char *token)
{
    if (r->as->marked)
        add_mark(r->out, token);
}

static void put_tools(struct rendering *r)
{
    const struct json *tools = r->conv->tools;
    struct text *t = &r->out->text;

    if (r->as->dated)
        add_format(t, "Today's date: %s\n\n", r->conv->date);
    add_string(t, "List of tools: ");
    if (r->as->dated) {
        add_json(t, tools);
        return;
    }
    put_marker(r, "<|tool_list_start|>");
    for (const struct json *tool = tools->first; tool; tool = tool->next) {
        add_string(t, tool == tools->first ? "[" : ", ");
        if (tool->type == JSON_STRING)
            add(t, tool->s, tool->n);
        else
            add_json(t, tool);
    }
    add_string(t, "]");
    put_marker(r, "<|tool_list_end|>");
}

static void put_system(struct rendering *r, struct piece text)
{
    if (text.n == 0 && !has_tools(r->conv))
        return;
    begin_turn(r, "system");
    add(&r->out->text, text.s, text.n);
    if (has_tools(r->conv) && text.n > 0)
        add_string(&r->out->text, r->as->dated ? "\n\n" : "\n");
    if (has_tools(r->conv))
        put_tools(r);
    end_turn(r);
}

static void put_calls(struct rendering *r, const struct json *calls)
{
    const struct json *call = calls->first, *arg;
    struct text *t = &r->out->text;

    add_mark(r->out, CALL_START);
    add_string(t, "[");
    for (; call; call = call->next) {
        const struct json *function = function_of(call);
        const struct json *name = json_get(function, "name");
        const struct json *args =
            arguments_of(&r->pool, json_get(function, "arguments"));
        add(t, name->s, name->n);
        add_string(t, "(");
        for (arg = args ? args->first : NULL; arg; arg = arg->next) {
            add(t, arg->key, arg->n_key);
            add_string(t, "=");
            add_argument(t, arg, r->as->quote);
            add_string(t, arg->next ? ", " : "");
        }
        add_string(t, call->next ? "), " : ")");
    }
    add_string(t, "]");
    add_mark(r->out, CALL_END);
}

/* Clients hand calls back with their markers in the content. */
static void put_answer(struct rendering *r, struct piece text)
{
    const char *const end = text.s + text.n, *from = text.s;

    for (const char *p = from; p < end; p++) {
        const char *token = begins(p, end, CALL_START) ? CALL_START :
                            begins(p, end, CALL_END) ? CALL_END : NULL;
        if (!token)
            continue;
        add(&r->out->text, from, (size_t)(p - from));
        add_mark(r->out, token);
        from = p + strlen(token);
    }
    add(&r->out->text, from, (size_t)(end - from));
}

/* The text of a message, its parts joined. */
static struct piece content_of(struct rendering *r, const struct json *message)
{
    const struct json *content = json_get(message, "content"), *part;

    if (json_is(content, JSON_STRING))
        return (struct piece){ content->s, content->n };
    r->parts.n = 0;
    part = json_is(content, JSON_ARRAY) ? content->first : NULL;
    for (; part; part = part->next) {
        const struct json *text = json_get(part, "text");
        add(&r->parts, text->s, text->n);
    }
    r->out->text.failed |= r->parts.failed;
    return (struct piece){ r->parts.n ? r->parts.s : "", r->parts.n };
}

/* The text behind the last </think>, trimmed; all of it if there is none. */
static struct piece without_thought(struct piece text)
{
    const char *const end = text.s + text.n, *p = text.s, *last = NULL;

    while ((p = find(p, end, THINK_END)) != NULL)
        last = p += strlen(THINK_END);
    return last ? trim(last, end) : text;
}

/* A `recent` answer keeps what was thought before it.  Of the templates that
 * write down calls, only the newest leaves out an empty list of them. */
static void put_assistant(struct rendering *r, const struct json *m, int recent)
{
    const struct json *thinking = thinking_of(m);
    const struct json *calls = given(m, "tool_calls");
    const int order = !calls || (!r->as->quote && !calls->first) ? NO_CALLS :
                      r->as->calls;
    struct piece text = content_of(r, m);

    r->out->lost_calls |= calls && calls->first && order == NO_CALLS;
    if (thinking && r->as->calls != NO_CALLS && recent) {
        add_mark(r->out, THINK);
        add(&r->out->text, thinking->s, thinking->n);
        add_mark(r->out, THINK_END);
    }
    if (order == CALLS_FIRST)
        put_calls(r, calls);
    put_answer(r, recent ? text : without_thought(text));
    if (order == CALLS_LAST)
        put_calls(r, calls);
}

static void put_message(struct rendering *r, const struct json *m, int recent)
{
    const char *role = role_of(m);
    const int is_tool = strcmp(role, "tool") == 0;

    begin_turn(r, role);
    if (strcmp(role, "assistant") == 0)
        put_assistant(r, m, recent);
    else {
        const struct piece text = content_of(r, m);
        if (is_tool)
            put_marker(r, "<|tool_response_start|>");
        add(&r->out->text, text.s, text.n);
        if (is_tool)
            put_marker(r, "<|tool_response_end|>");
    }
    /* The template of VL forgets the end of a message without content. */
    if ((m->next || !r->conv->continue_last) &&
        (r->as->calls != CALLS_FIRST || json_get(m, "content")))
        end_turn(r);
}

/* The answers from here on keep their thoughts: the last one, or those after
 * the last question. */
static const struct json *recent_from(const struct rendering *r,
                                      const struct json *m)
{
    const int question = r->as->thoughts == SINCE_QUESTION;
    const struct json *from = question ? m : NULL;

    if (r->as->thoughts == ALL || r->conv->keep_thinking)
        return m;
    for (; m; m = m->next)
        if (strcmp(role_of(m), question ? "user" : "assistant") == 0)
            from = m;
    return from;
}

static void put_conversation(struct rendering *r)
{
    const struct json *m = r->conv->messages->first, *recent;
    const int system = strcmp(role_of(m), "system") == 0;
    int is_recent = 0;

    add_mark(r->out, BOS);
    put_system(r, system ? content_of(r, m) : (struct piece){ "", 0 });
    m = system ? m->next : m;
    recent = recent_from(r, m);
    for (; m; m = m->next) {
        is_recent |= m == recent;
        put_message(r, m, is_recent);
    }
    if (!r->conv->generate || r->conv->continue_last)
        return;
    begin_turn(r, "assistant");
    if (r->conv->open_thought)
        add_mark(r->out, THINK);
}

/* A conversation as the template writes it; DONE, USAGE or NO_MEMORY.  The
 * caller releases *out in any case. */
static int render(const struct conversation *conv, int template,
                  struct rendered *out, struct why *why)
{
    struct rendering r = { .conv = conv, .out = out };
    int code;

    *out = (struct rendered){ .n_marks = 0 };
    if (template <= TEMPLATE_AUTO || template >= TEMPLATE_NONE)
        return because(why, USAGE, "the model has no chat template, expected a "
                       "prompt and no messages");
    r.as = &dialects[template];
    code = check_conversation(&r.pool, conv, why);
    if (code == DONE)
        put_conversation(&r);
    if (out->text.failed || r.pool.failed)
        code = because(why, NO_MEMORY, "no memory for the conversation");
    free(r.parts.s);
    pool_free(&r.pool);
    return code;
}

/* ---- its tokens */

/* The id of a mark; or -1, and then it is no mark but text. */
static int32_t mark_id(const lfm2_tokenizer *words, const struct rendered *r,
                       const struct mark *m)
{
    char token[32];

    snprintf(token, sizeof token, "%.*s", (int)m->n, r->text.s + m->from);
    return strcmp(token, BOS) == 0 ? lfm2_bos(words) :
           lfm2_token_id(words, token);
}

/* What lies between two marks is one piece of text.  With `special`, control
 * tokens written in it count, too. */
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
    *out = (struct ids){ calloc((size_t)room, sizeof *out->id), 0 };
    if (!out->id)
        return because(why, NO_MEMORY, "no memory for %d tokens", room);
    for (int i = 0; i <= r->n_marks; i++) {
        const struct mark end = { r->text.n, 0 };
        const struct mark *m = i < r->n_marks ? &r->mark[i] : &end;
        const int32_t id = m->n ? mark_id(words, r, m) : -1;
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

/* An edited template is still like one of ours in what matters; *word is
 * that. */
static int template_by_text(const char *s, const char *end, const char **word)
{
    static const struct { const char *word; int template; } telling[] = {
        { "<|tool_list_start|>", TEMPLATE_LFM2 },
        { "preserve_thinking", TEMPLATE_8B },
        { "Today's date", TEMPLATE_NEW }, { "strftime_now", TEMPLATE_NEW },
        { "List of tools: [", TEMPLATE_INSTRUCT }
    };
    const char *calls = find(s, end, "render_tool_calls(message");
    const char *content = find(s, end, "parse_content(message.content)");

    for (size_t i = 0; i < sizeof telling / sizeof *telling; i++) {
        if (!find(s, end, telling[i].word))
            continue;
        *word = telling[i].word;
        return telling[i].template == TEMPLATE_NEW && calls && content &&
               calls < content ? TEMPLATE_VL : telling[i].template;
    }
    return TEMPLATE_AUTO;
}

static int name_has(const lfm2_model *model, const char *word)
{
    static const char *const key[] = { "general.name", "general.basename" };
    size_t n;

    for (int i = 0; i < 2; i++) {
        const char *s = lfm2_model_string(model, key[i], &n);
        if (s && find(s, s + n, word))
            return 1;
    }
    return 0;
}

static int template_by_model(const lfm2_model *model,
                             const lfm2_tokenizer *words)
{
    if ((words ? lfm2_n_vocab(words) : lfm2_model_config(model)->n_vocab) >
        100000)
        return TEMPLATE_8B;
    if (!name_has(model, "2.5"))
        return TEMPLATE_LFM2;
    return name_has(model, "VL") ? TEMPLATE_VL : TEMPLATE_INSTRUCT;
}

/* How it was found: the one in the file is one of those that this program was
 * tested with, or has a word that only one of them has, or neither. */
struct found_template {
    int template;
    enum { NO_TEMPLATE, BY_HASH, BY_WORDS, BY_MODEL } how;
    const char *word;                     /* NULL: not BY_WORDS              */
    uint64_t hash;
};

/* `words` may be NULL. */
static struct found_template find_template(const lfm2_model *model,
                                           const lfm2_tokenizer *words)
{
    static const struct { uint64_t hash; int template; } published[] = {
        { 0x64c90fcede246b34u, TEMPLATE_LFM2 },
        { 0xe176bd72cee9ff33u, TEMPLATE_LFM2 },     /* of test/tiny.gguf     */
        { 0xd5a3bd005e5a88cau, TEMPLATE_INSTRUCT },
        { 0x7aeb1f9c89e15fb8u, TEMPLATE_NEW },
        { 0x6ebe17e9a93f4638u, TEMPLATE_VL },
        { 0x9b5e9322adfff1aau, TEMPLATE_8B }
    };
    size_t n;
    const char *s = lfm2_model_string(model, "tokenizer.chat_template", &n);
    struct found_template to = { TEMPLATE_NONE, NO_TEMPLATE, NULL, 0 };

    if (!s)
        return to;
    to.hash = template_hash(s, n);
    to.how = BY_HASH;
    for (size_t i = 0; i < sizeof published / sizeof *published; i++)
        if (published[i].hash == to.hash)
            to.template = published[i].template;
    if (to.template != TEMPLATE_NONE)
        return to;
    to.template = template_by_text(s, s + n, &to.word);
    to.how = to.word ? BY_WORDS : BY_MODEL;
    if (!to.word)
        to.template = template_by_model(model, words);
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

    *known = f.how <= BY_HASH;
    if (f.how == NO_TEMPLATE)
        return because(evidence, f.template, "the file has no chat template, "
                       "so text is continued as it is");
    return because(evidence, f.template, "chat template %s: %s (hash %016llx)",
                   template_names[f.template], how[f.how],
                   (unsigned long long)f.hash);
}

/* ------------------------------------------------------------ 7. Tool calls
 *
 * A model that wants a tool writes <|tool_call_start|>, Python, and
 * <|tool_call_end|>: [weather(city="Rome", days=2), time()].  Some write JSON
 * there: {"name": "time", "arguments": {}}.  Literals of both kinds are read
 * alike, and strings with quotes inside that lack a backslash, too.  What is
 * still not understood is left in the text. */

/* {"name": ..., "arguments": {...}} out of a call in either notation, or NULL.
 * An argument without a name is good if it is the only one, and a dict. */
static struct json *call_of(struct pool *pool, const struct json *v)
{
    const struct json *args = v, *function = function_of(v);
    struct json *name = json_get(function, "name");
    struct json *out = json_object(pool);

    if (v->type == JSON_OBJECT && v->close == ')') {
        name = json_string(pool, v->s, v->n);
        if (args->first && args->first->n_key == 0)
            args = args->first->next ? NULL : args->first;
    } else {
        args = json_get(function, "arguments");
        if (!args)
            args = json_get(function, "parameters");
        args = arguments_of(pool, args);
    }
    if (!json_text(name) || !json_is(args, JSON_OBJECT))
        return NULL;
    json_set(pool, out, "name", name);
    json_set(pool, out, "arguments", args);
    return out;
}

/* out[3 * n]: a replacement character for each byte that is no UTF-8.  Returns
 * how many bytes it has become. */
static size_t replace_broken(char *out, const char *s, size_t n)
{
    const char *const end = s + n;
    char *to = out;
    uint32_t c;

    for (int size; s < end; s += size ? size : 1) {
        size = utf8_get(s, end, &c);
        to += utf8_put(to, size ? c : 0xfffd);
    }
    return (size_t)(to - out);
}

/* What stands between two markers: calls, or one list of them; all or none. */
static int read_calls(struct pool *pool, const char *s, const char *end,
                      struct json *calls)
{
    struct json root, *found = json_array(pool), *v;
    char *text = pool_get(pool, 3 * (size_t)(end - s) + 1);
    struct why why;
    struct reader r = { .pool = pool, .text = text, .python = 1, .why = &why };

    if (!found || !text)
        return USAGE;
    r.n = replace_broken(text, s, (size_t)(end - s));
    if (read_tree(&r, &root) != DONE)
        return USAGE;
    v = root.first->type == JSON_ARRAY && !root.first->next ? root.first->first
                                                            : root.first;
    for (; v; v = v->next) {
        struct json *call = call_of(pool, v);
        if (!call)
            return USAGE;
        json_append(pool, found, call);
    }
    for (v = found->first; v; v = v->next)
        json_append(pool, calls, v);
    return DONE;
}

/* The calls in an answer as an array; the text around them, and calls that were
 * not understood, markers included, go to `rest`.  Returns how many were not
 * understood.  A call at the end may lack its last marker; one that is not
 * complete does not count if the answer was `cut` for its length.  No memory
 * shows in pool->failed and rest->failed. */
static int parse_calls(struct pool *pool, const char *s, size_t n, int cut,
                       struct json **calls, struct text *rest)
{
    const char *const end = s + n, *start, *stop;
    int bad = 0;

    *calls = json_array(pool);
    while ((start = find(s, end, CALL_START)) != NULL) {
        add(rest, s, (size_t)(start - s));
        s = start + strlen(CALL_START);
        for (stop = s; (stop = find(stop, end, "<|tool_call_")); stop++)
            if (begins(stop, end, CALL_START) || begins(stop, end, CALL_END))
                break;
        stop = stop ? stop : end;
        const int good = read_calls(pool, s, stop, *calls) == DONE;
        s = stop + (begins(stop, end, CALL_END) ? strlen(CALL_END) : 0);
        if (!good)
            add(rest, start, (size_t)(s - start));
        bad += !good && !(cut && stop == end);
    }
    add(rest, s, (size_t)(end - s));
    return bad;
}

/* ------------------------------------------------------ 8. Tokens in and out
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
    unwatch_file();
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

/* Text that is to be gone on with, as it is. */
static int encode_plain(const struct settings *s, const lfm2_tokenizer *words,
                        const char *text, size_t n, struct ids *out)
{
    return encode(s, words, text, n, s->bos || lfm2_add_bos(words), out);
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
    static const char blank[] = " \t\r";
    const char *p = t->s, *const stop = t->s + t->n;
    char *end;
    int len;

    for (int line = 1; p < stop; line++) {
        for (p += strspn(p, blank); p < stop && *p != '\n'; p = end) {
            errno = 0;
            const long id = strtol(p, &end, 10);
            if (end == p || !strchr(" \t\r\n", *end) || errno || id < 0 ||
                id >= lfm2_n_vocab(words))
                return say(FAILED, "line %d: \"%.*s\", expected a token id "
                           "from 0 to %d", line, (int)strcspn(p, " \t\r\n"), p,
                           lfm2_n_vocab(words) - 1);
            const char *bytes = lfm2_token_bytes(words, (int32_t)id,
                                                 s->special, &len);
            fwrite(bytes, 1, (size_t)len, stdout);
            end += strspn(end, blank);
        }
        putchar(s->null ? '\0' : '\n');
        p++;
    }
    return DONE;
}

/* A new file, or standard output for "-"; NULL after saying why not. */
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
    lfm2_model_open(&model, path, LFM2_LOAD_MAP | LFM2_LOAD_ANY, &err);
    if (model) {
        data = lfm2_model_file(model, &size);
        n = lfm2_tokenizer_export(data, size, NULL, 0, &err);
        buf = n > 0 ? malloc(n) : NULL;
        if (buf)
            n = lfm2_tokenizer_export(data, size, buf, n, &err);
    }
    lfm2_model_close(model);
    unwatch_file();
    if (n == 0)
        return report(path, &err);
    if (!buf)
        return say(NO_MEMORY, "no memory for %zu bytes", n);
    f = create_file(s->export_to);
    if (f)
        fwrite(buf, 1, n, f);
    free(buf);
    return f ? finish_file(f, s->export_to, DONE) : BAD_FILE;
}

static int work_on_words(const struct settings *s)
{
    struct text t = { 0 };
    lfm2_tokenizer *words;
    int code = s->sandbox == SANDBOX_REQUIRE ? begin_sandbox(s, 0) : DONE;

    if (code == DONE)
        code = open_words(s, NULL, &words);
    if (code != DONE)
        return code;
    if (s->export_to)
        code = export_words(s);
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

/* -------------------------------------------------------------- 9. --inspect
 *
 * What is in a file, in the terms its makers use; what it will take to run it;
 * and what is wrong with it.  The facts are found once, then printed as text or
 * as JSON. */

/* A few words, made on the spot. */
struct phrase { char s[128]; };

static struct phrase phrase(const char *fmt, ...)
{
    struct phrase out;
    va_list args;

    va_start(args, fmt);
    vsnprintf(out.s, sizeof out.s, fmt, args);
    va_end(args);
    return out;
}

/* "23.84 B" parameters or, with unit "B", "13.51 GB". */
static struct phrase amount(double n, const char *unit)
{
    const char *letter = n >= 1e9 ? *unit ? "G" : "B" :
                         n >= 1e6 ? "M" : n >= 1e3 ? "K" : "";
    const double scale = n >= 1e9 ? 1e9 : n >= 1e6 ? 1e6 : n >= 1e3 ? 1e3 : 1;

    return phrase("%.*f %s%s", scale > 1 ? 2 : 0, n / scale, letter, unit);
}

/* What a file says, for a terminal: a question mark for each byte that is no
 * character, and for characters that could steer it. */
static void print_clean(const char *s, size_t n)
{
    const char *const end = s + (n < 200 ? n : 200);
    uint32_t c;

    for (int size; s < end; s += size) {
        size = utf8_get(s, end, &c);
        if (size == 0 || is_control(c)) {
            putchar('?');
            size = size ? size : 1;
        } else
            fwrite(s, 1, (size_t)size, stdout);
    }
}

static double count_elements(const lfm2_tensor_info *t)
{
    double n = 1;

    for (int d = 0; d < t->n_dims; d++)
        n *= (double)t->dims[d];
    return n;
}

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

static double cpu_limit(const char *dir)
{
    double quota = number_in(dir, "cpu.max", 0);
    double period = number_in(dir, "cpu.max", 1);

    if (quota <= 0) {
        quota = number_in(dir, "cpu.cfs_quota_us", 0);
        period = number_in(dir, "cpu.cfs_period_us", 0);
    }
    return quota > 0 && period > 0 ? ceil(quota / period) : 0;
}

static double memory_limit(const char *dir)
{
    return fmax(number_in(dir, "memory.max", 0),
                number_in(dir, "memory.limit_in_bytes", 0));
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

/* What a file of Linux says of `key`, behind a colon; or something else. */
static struct phrase look_up_in(FILE *f, const char *key,
                                const char *otherwise)
{
    struct phrase out = phrase("%s", otherwise);
    char line[256];

    if (f) {
        fflush(f);                        /* or an earlier state is told     */
        rewind(f);
    }
    while (f && fgets(line, sizeof line, f)) {
        const char *s = strchr(line, ':');
        if (!s || strncmp(line, key, strlen(key)) != 0)
            continue;
        s += 1 + strspn(s + 1, " \t");
        out = phrase("%.*s", (int)strcspn(s, "\n"), s);
        break;
    }
    return out;
}

static struct phrase look_up(const char *path, const char *key,
                             const char *otherwise)
{
    FILE *f = fopen(path, "r");
    const struct phrase out = look_up_in(f, key, otherwise);

    if (f)
        fclose(f);
    return out;
}

/* CPUs that this process may use. */
static int usable_cpus(void)
{
    double n = 0, most;

#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        n = CPU_COUNT(&set);
#endif
    if (n < 1)
        n = (double)sysconf(_SC_NPROCESSORS_ONLN);
    most = least_limit(cpu_limit);
    if (most > 0)
        n = fmin(n, most);
    return (int)fmax(1, fmin(n, 64));
}

/* Memory that can be had without taking it from another program; 0 if the
 * system does not tell. */
static double free_memory(void)
{
    const double have = strtod(look_up("/proc/meminfo", "MemAvailable", "0").s,
                               NULL) * 1024;
    const double most = least_limit(memory_limit);

    return most > 0 ? fmin(have, most) : have;
}

/* What the command line asks of a context. */
static lfm2_params choose_params(const struct settings *s, const lfm2_model *m)
{
    lfm2_params p = lfm2_default_params(m);

    if (s->ctx != UNSET)
        p.n_ctx = s->ctx ? s->ctx : lfm2_model_config(m)->n_ctx_train;
    if (s->batch != UNSET)
        p.n_batch = s->batch;
    p.n_threads = s->threads ? s->threads : usable_cpus();
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

/* ---- what a token costs, and the process */

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

/* Memory of the process's own, which the mapped file is not, from
 * /proc/self/status; 0 if the system does not tell. */
static double anonymous_memory(FILE *status)
{
    return strtod(look_up_in(status, "RssAnon", "0").s, NULL) * 1024;
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

/* How words are chosen, before a seed. */
struct sampling {
    double temp;
    int top_k;
    double top_p, min_p, repeat;
    int last_n;
};

static const struct preset_row {
    const char *name, *words[2];
    struct sampling is;
} presets[] = {
    { "LFM2 Extract", { "-extract", "" }, { 0, 0, 1, 0, 1, 64 } },
    { "LFM2 RAG", { "-rag", "" }, { 0, 0, 1, 0, 1, 64 } },
    { "LFM2 Tool", { "-tool", "" }, { 0, 0, 1, 0, 1, 64 } },
    { "LFM2 PII", { "-pii", "" }, { 0, 0, 1, 0, 1, 64 } },
    { "LFM2 MT", { "-mt", "" }, { 0, 0, 1, 0, 1, 64 } },
    { "LFM2-VL", { "-vl", "" }, { 0.1, 0, 1, 0.15, 1.05, 64 } },
    { "LFM2.5-8B-A1B", { "lfm2.5", "-8b" }, { 0.2, 80, 1, 0, 1.05, 64 } },
    { "LFM2.5-2.6B", { "lfm2.5", "-2.6b" }, { 0.1, 50, 1, 0, 1.1, 64 } },
    { "LFM2.5-Thinking", { "lfm2.5", "-thinking" },
      { 0.05, 50, 1, 0, 1.05, 64 } },
    { "LFM2.5-JP-202606", { "lfm2.5", "-jp-202606" },
      { 0.1, 50, 1, 0, 1.05, 64 } },
    { "LFM2.5-JP", { "lfm2.5", "-jp" }, { 0.3, 0, 1, 0.15, 1.05, 64 } },
    { "LFM2.5-Base", { "lfm2.5", "-base" }, { 0.3, 0, 1, 0.15, 1.05, 64 } },
    { "LFM2.5", { "lfm2.5", "" }, { 0.1, 50, 1, 0, 1.05, 64 } },
    { "LFM2-24B-A2B", { "-24b", "" }, { 0.1, 50, 1, 0, 1.05, 64 } },
    { "LFM2", { "", "" }, { 0.3, 0, 1, 0.15, 1.05, 64 } },
};

/* All the file says of its name, like "lfm2-1.2b-extract", and what its sizes
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
        add_string(out, " -");
        add(out, s ? s : "", s ? n : 0);
    }
    if (c->n_vocab >= 128000)
        add_string(out, c->n_expert ? " lfm2.5-8b" : " lfm2.5-2.6b");
    if (c->n_expert == 64)
        add_string(out, " lfm2-24b");
    for (size_t i = 0; i < out->n; i++)
        if (out->s[i] == '_' || out->s[i] == ' ')
            out->s[i] = '-';
        else if (out->s[i] >= 'A' && out->s[i] <= 'Z')
            out->s[i] = (char)(out->s[i] - 'A' + 'a');
}

static const struct preset_row *find_preset(const lfm2_model *m)
{
    const struct preset_row *p = presets;
    struct text name = { 0 };

    describe(m, &name);
    while (p->words[0][0] && (name.failed || !strstr(name.s, p->words[0]) ||
                              !strstr(name.s, p->words[1])))
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

static int has_wishes(const lfm2_model *m)
{
    char value[8];
    const char *key;

    for (int i = 0; (key = lfm2_model_key(m, i, value, sizeof value)); i++)
        if (strncmp(key, "general.sampling.", 17) == 0)
            return 1;
    return 0;
}

static double given_or(double given, double otherwise)
{
    return given != UNSET ? given : otherwise;
}

/* The file's own wishes come before the table, and options before both.  A
 * penalty would only spoil a greedy choice, so then it must be asked for. */
static struct sampling choose_sampling(const struct settings *s,
                                       const lfm2_model *m)
{
    const struct preset_row *p = find_preset(m);
    struct sampling to = p->is;
    double top_k = p->is.top_k, last_n = p->is.last_n;
    int named = 0, penalty;

    named += file_number(m, "general.sampling.temp", 0, 100, &to.temp);
    named += file_number(m, "general.sampling.top_k", 0, 1 << 30, &top_k);
    named += file_number(m, "general.sampling.top_p", 0, 1, &to.top_p);
    named += file_number(m, "general.sampling.min_p", 0, 1, &to.min_p);
    named += file_number(m, "general.sampling.penalty_last_n", -1, 1 << 30,
                         &last_n);
    penalty = file_number(m, "general.sampling.penalty_repeat", 0.01, 100,
                          &to.repeat);
    if (s->temp == 0 || (to.temp == 0 && s->temp == UNSET && !penalty))
        to.repeat = 1;
    to.temp = given_or(s->temp, to.temp);
    to.top_k = (int)given_or(s->top_k, top_k);
    to.top_p = given_or(s->top_p, to.top_p);
    to.min_p = given_or(s->min_p, to.min_p);
    to.repeat = given_or(s->repeat, to.repeat);
    to.last_n = (int)given_or(s->repeat_last_n, last_n);
    if (s->verbose)
        say(DONE, "preset %s%s: temperature %g, top-k %d, top-p %g, min-p %g, "
            "repeat penalty %g over %d", p->name, named + penalty ? " and the "
            "file's own general.sampling" : "", to.temp, to.top_k, to.top_p,
            to.min_p, to.repeat, to.last_n);
    return to;
}

/* ---- facts
 *
 * Every tensor has a role; embedding and output are one where they are tied. */

enum role {
    EMBEDDING, OUTPUT, CONV_MIXERS, ATTENTION, DENSE_FFN, ROUTER, EXPERTS,
    NORMS, UNUSED, N_ROLES
};

static const struct { const char *name, *key; } roles[N_ROLES] = {
    { "embedding", "embedding" }, { "output", "output" },
    { "conv mixers", "conv" }, { "attention", "attention" },
    { "dense FFN", "dense_ffn" }, { "router", "router" },
    { "experts", "experts" }, { "norms", "norms" }, { "unused", "unused" }
};

enum { MAX_TYPES = 32, MAX_ROOMS = 5, MAX_SPEEDS = 3, MAX_SPECIAL = 16 };

/* What the tensors of a role take. */
struct portion {
    int n;                                /* tensors                         */
    uint64_t params, active;              /* these for every token           */
    uint64_t bytes, read;
    int of_type[MAX_TYPES];               /* tensors, by lfm2_weight_type()  */
};

/* What a context of some length takes. */
struct room {
    int ctx;
    double kv, read;                      /* bytes, and what a token reads   */
    uint64_t beside;                      /* all memory but for the file     */
};

struct special { const char *label, *key; int32_t id; };

struct facts {
    const struct settings *s;
    lfm2_model *model;
    int is_model;                         /* and not only the wreck of one   */
    lfm2_tokenizer *words;                /* NULL: no vocabulary             */
    int code;                             /* LFM2_OK, or what is fatal       */
    lfm2_error err;
    struct why odd[2];                    /* what else could be tolerated    */
    int n_odd;
    double size;                          /* of the file                     */
    int version;                          /* of GGUF; 0: it is none          */
    uint64_t n_tensors, n_keys;           /* that it announces,              */
    int tensors_read, keys_read;          /* and that could be read          */
    char file_hash[65], template_hash[65];        /* "": not known           */
    struct portion part[N_ROLES], all;    /* all: without what is unused     */
    const char *norm;
    int tied;
    struct room room[MAX_ROOMS];
    int n_rooms;
    double bandwidth[MAX_SPEEDS];         /* GB/s                            */
    int n_bandwidths;
    double kv, conv;                      /* bytes of a token, of all states */
    double free;                          /* bytes of memory; 0: not known   */
    int fits;                             /* a context in it; 0: none        */
    struct special special[MAX_SPECIAL];
    int n_special;
    struct found_template template;
    struct sampling sampling;
    int has_wishes;                       /* the file, general.sampling.*    */
};

static enum role role_of_tensor(const char *name, const char *norm)
{
    static const struct { const char *part; enum role role; } known[] = {
        { "_norm.", NORMS }, { "shortconv.", CONV_MIXERS },
        { "attn_", ATTENTION }, { "ffn_gate_inp.", ROUTER },
        { "exp_probs_b.", ROUTER }, { "_exps.", EXPERTS },
        { "ffn_", DENSE_FFN }
    };

    if (strcmp(name, "token_embd.weight") == 0)
        return EMBEDDING;
    if (strcmp(name, "output.weight") == 0)
        return OUTPUT;
    if (strcmp(name, norm) == 0)
        return NORMS;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strncmp(name, "blk.", 4) == 0 && strstr(name, known[i].part))
            return known[i].role;
    return UNUSED;
}

static int type_number(const char *type)
{
    const char *name;
    int i = 0;

    while (i < MAX_TYPES - 1 && (name = lfm2_weight_type(i)) != NULL &&
           strcmp(name, type) != 0)
        i++;
    return i;
}

static void add_part(struct portion *to, const struct portion *p)
{
    to->n += p->n;
    to->params += p->params;
    to->active += p->active;
    to->bytes += p->bytes;
    to->read += p->read;
    for (int i = 0; i < MAX_TYPES; i++)
        to->of_type[i] += p->of_type[i];
}

/* Of the experts a token reads those that are chosen; of an embedding that is
 * not the output, too, one row. */
static struct portion measure(const struct facts *f, const lfm2_tensor_info *t,
                              enum role role)
{
    const lfm2_config *c = lfm2_model_config(f->model);
    struct portion p = { .n = 1, .params = 1, .bytes = t->n_bytes };

    for (int d = 0; d < t->n_dims; d++)
        p.params *= t->dims[d];
    p.active = p.params;
    p.read = p.bytes;
    if (role == EXPERTS && c->n_expert > 0) {
        const uint64_t n = (uint64_t)c->n_expert;
        p.active = p.params / n * (uint64_t)c->n_expert_used;
        p.read = p.bytes / n * (uint64_t)c->n_expert_used;
    }
    if (role == EMBEDDING && !f->tied)
        p.read /= t->dims[1];
    if (role == UNUSED)
        p.active = p.read = 0;
    p.of_type[type_number(t->type)] = 1;
    return p;
}

/* The number of a tensor, or -1. */
static int find_tensor(const lfm2_model *m, const char *name)
{
    lfm2_tensor_info t;

    for (int i = 0; lfm2_model_tensor(m, i, &t) == LFM2_OK; i++)
        if (strcmp(t.name, name) == 0)
            return i;
    return -1;
}

static void find_parts(struct facts *f)
{
    lfm2_tensor_info t;

    f->norm = find_tensor(f->model, "output_norm.weight") >= 0 ?
              "output_norm.weight" : "token_embd_norm.weight";
    f->tied = find_tensor(f->model, "output.weight") < 0;
    for (int i = 0; lfm2_model_tensor(f->model, i, &t) == LFM2_OK; i++) {
        const enum role role = role_of_tensor(t.name, f->norm);
        const struct portion p = measure(f, &t, role);
        add_part(&f->part[role], &p);
        if (role != UNUSED)
            add_part(&f->all, &p);
    }
}

/* The longest context that there is memory for besides the weights. */
static int largest_context(const struct facts *f, lfm2_params p)
{
    const int n_train = lfm2_model_config(f->model)->n_ctx_train;
    int fits = 0, least_not = (n_train < MAX_CTX ? n_train : MAX_CTX) + 1;

    while (least_not - fits > 1) {
        uint64_t beside;
        p.n_ctx = fits + (least_not - fits) / 2;
        beside = lfm2_context_size(f->model, &p);
        if (beside > 0 && (double)f->all.bytes + (double)beside <= f->free)
            fits = p.n_ctx;
        else
            least_not = p.n_ctx;
    }
    return fits;
}

static void add_room(struct facts *f, lfm2_params p, int ctx)
{
    struct room *r = &f->room[f->n_rooms];

    for (int i = 0; i < f->n_rooms; i++)
        if (f->room[i].ctx == ctx)
            return;
    p.n_ctx = ctx;
    *r = (struct room){ .ctx = ctx, .kv = f->kv * ctx };
    r->read = (double)f->all.read + r->kv;
    r->beside = lfm2_context_size(f->model, &p);
    for (; r > f->room && r[-1].ctx > ctx; r--) {
        const struct room longer = r[-1];
        r[-1] = r[0];
        r[0] = longer;
    }
    f->n_rooms++;
}

/* Contexts that one may ask for, and how fast the memory lets them be. */
static void find_rooms(struct facts *f)
{
    const lfm2_config *c = lfm2_model_config(f->model);
    const int most = c->n_ctx_train < MAX_CTX ? c->n_ctx_train : MAX_CTX;
    const int wanted[] = { 4096, 32768, most };
    lfm2_params p = choose_params(f->s, f->model);

    p.isa = LFM2_ISA_AUTO;                /* it takes no more or less memory */
    f->kv = kv_bytes(c, p.kv_type);
    for (int il = 0; il < c->n_layer; il++)
        if (!c->is_attn[il])
            f->conv += 4.0 * (c->l_cache - 1) * c->n_embd;
    for (int i = 0; i < 3; i++)
        if (wanted[i] <= most)
            add_room(f, p, wanted[i]);
    if (f->s->ctx != UNSET)
        add_room(f, p, p.n_ctx < MAX_CTX ? p.n_ctx : MAX_CTX);
    f->free = free_memory();
    f->fits = f->free > 0 ? largest_context(f, p) : 0;
    f->n_bandwidths = f->s->bandwidth > 0 ? 1 : MAX_SPEEDS;
    for (int i = 0; i < f->n_bandwidths; i++)
        f->bandwidth[i] = f->s->bandwidth > 0 ? f->s->bandwidth :
                          (double[]){ 20, 50, 100 }[i];
}

static void add_special(struct facts *f, const char *label, const char *key,
                        int32_t id)
{
    if (id >= 0 && id < lfm2_n_vocab(f->words) && f->n_special < MAX_SPECIAL)
        f->special[f->n_special++] = (struct special){ label, key, id };
}

/* Tokens with a meaning of their own, in the order of the lines that show
 * them. */
static void find_special(struct facts *f)
{
    static const char *const marker[] = {
        TURN_START, "<|tool_list_start|>", CALL_START,
        "<|tool_response_start|>", THINK
    };
    double pad = -1;

    if (lfm2_add_bos(f->words))
        add_special(f, "begins with", "bos", lfm2_bos(f->words));
    for (int32_t id = 0; id < lfm2_n_vocab(f->words); id++)
        if (lfm2_is_eog(f->words, id))
            add_special(f, "ends with", "end", id);
    for (size_t i = 0; i < sizeof marker / sizeof *marker; i++)
        add_special(f, "markers", "marker", lfm2_token_id(f->words, marker[i]));
    file_number(f->model, "tokenizer.ggml.padding_token_id", 0, 1 << 30, &pad);
    add_special(f, "padding", "pad", (int32_t)pad);
}

/* By "[65536 x string]"; 0 if it is no array. */
static uint64_t array_length(const lfm2_model *m, const char *key)
{
    const struct phrase value = value_of(m, key);

    return value.s[0] == '[' ? strtoull(value.s + 1, NULL, 10) : 0;
}

static void digest(const void *bytes, size_t n, char out[65])
{
    struct sha256 d = sha256_start;

    sha256_add(&d, bytes, n);
    sha256_hex(d, out);
}

/* What the model's words are, how they are written down and chosen. */
static void find_words(struct facts *f)
{
    const struct phrase pre = value_of(f->model, "tokenizer.ggml.pre");
    size_t n;
    const char *s = lfm2_model_string(f->model, "tokenizer.chat_template", &n);

    f->code = load_words(f->s, f->model, &f->words, &f->err);
    if (f->words)
        find_special(f);
    if (s)
        digest(s, n, f->template_hash);
    f->template = find_template(f->model, f->words);
    f->sampling = choose_sampling(&defaults, f->model);
    f->has_wishes = has_wishes(f->model);
    if (pre.s[0] && strcmp(pre.s, "lfm2") != 0)
        because(&f->odd[f->n_odd++], 0, "tokenizer.ggml.pre: \"%s\", expected "
                "\"lfm2\", as which it is taken", pre.s);
    if (f->template.how > BY_HASH)
        because(&f->odd[f->n_odd++], 0, "tokenizer.chat_template: none that is "
                "known, taken as %s", template_names[f->template.template]);
}

/* The i-th thing that is not as it should be; NULL past the last. */
static const char *find_oddity(const struct facts *f, int i, int *fatal)
{
    int n = 0;

    while (lfm2_model_warning(f->model, n))
        n++;
    *fatal = i == n + f->n_odd;
    if (i < n)
        return lfm2_model_warning(f->model, i);
    return i < n + f->n_odd ? f->odd[i - n].s :
           *fatal && f->code != LFM2_OK ? f->err.msg : NULL;
}

/* The first bytes, which say as much as there is of a bad file. */
static void find_header(struct facts *f)
{
    size_t n;
    const unsigned char *head = lfm2_model_file(f->model, &n);

    f->size = (double)n;
    if (n >= 24 && memcmp(head, "GGUF", 4) == 0) {
        f->version = (int)(get_le(head + 4, 4) & INT_MAX);
        f->n_tensors = get_le(head + 8, 8);
        f->n_keys = get_le(head + 16, 8);
    }
    if (f->s->sha256)
        digest(head, n, f->file_hash);
}

static void find_facts(struct facts *f)
{
    lfm2_tensor_info t;
    char value[8];

    find_header(f);
    while (lfm2_model_key(f->model, f->keys_read, value, sizeof value))
        f->keys_read++;
    while (lfm2_model_tensor(f->model, f->tensors_read, &t) == LFM2_OK)
        f->tensors_read++;
    if (!f->is_model)
        return;
    find_parts(f);
    find_rooms(f);
    find_words(f);
}

/* c and A for short convolutions and attention, d and e for dense networks and
 * experts. */
struct map { char mixers[LFM2_MAX_LAYER + 1], ffns[LFM2_MAX_LAYER + 1]; };

static struct map layer_map(const lfm2_config *c)
{
    struct map out = { "", "" };

    for (int il = 0; il < c->n_layer; il++) {
        out.mixers[il] = c->is_attn[il] ? 'A' : 'c';
        out.ffns[il] = il < c->n_layer_dense ? 'd' : 'e';
    }
    return out;
}

static int count_attention(const lfm2_config *c)
{
    int n = 0;

    for (int il = 0; il < c->n_layer; il++)
        n += c->is_attn[il];
    return n;
}

static double bits_per_weight(const struct portion *p)
{
    return p->params > 0 ? (double)p->bytes * 8 / (double)p->params : 0;
}

/* Of a token, with so much in the cache. */
static double speed_limit(const struct facts *f, double read, int i)
{
    return read > 0 ? f->bandwidth[i] * 1e9 / read : 0;
}

/* ---- in text */

static void print_string(const lfm2_model *m, const char *label,
                         const char *key)
{
    size_t n = 0;
    const char *s = lfm2_model_string(m, key, &n);

    printf("%s", label);
    print_clean(s ? s : "(none)", s ? n : 6);
}

static void print_head(const struct facts *f)
{
    printf("file          ");
    print_clean(f->s->model, strlen(f->s->model));
    printf(", %s", amount(f->size, "B").s);
    if (f->version)
        printf(", GGUF version %d", f->version);
    if (f->file_hash[0])
        printf("\nsha256        %s", f->file_hash);
    print_string(f->model, "\nname          ", "general.name");
    print_string(f->model, "\narchitecture  ", "general.architecture");
    printf("\n");
}

static void print_layers(const struct facts *f)
{
    const lfm2_config *c = lfm2_model_config(f->model);
    const struct map map = layer_map(c);
    const int n_attn = count_attention(c);

    printf("size          %s parameters, %s active per token\n",
           amount((double)f->all.params, "").s,
           amount((double)f->all.active, "").s);
    printf("sizes         n_embd %d, n_vocab %d, trained for %d tokens\n\n",
           c->n_embd, c->n_vocab, c->n_ctx_train);
    printf("layers        %d: %d with a short convolution (c), %d with "
           "attention (A)\nlayer map     %s\n", c->n_layer, c->n_layer - n_attn,
           n_attn, map.mixers);
    if (c->n_expert > 0)
        printf("  and FFN     %s\n", map.ffns);
    printf("convolution   l_cache %d\nattention     %d heads, %d of keys and "
           "values, head_dim %d, rope_freq_base %g\n", c->l_cache, c->n_head,
           c->n_head_kv, c->head_dim, (double)c->rope_freq_base);
    if (c->n_layer_dense > 0)
        printf("dense FFN     n_ff %d, in %s%s\n", c->n_ff, c->n_expert == 0 ?
               "all layers" : c->n_layer_dense == 1 ? "the first layer" :
               phrase("the first %d layers", c->n_layer_dense).s,
               c->n_expert ? " (d)" : "");
    if (c->n_expert > 0)
        printf("experts       %d of n_ff %d, %d used per token, in %s (e)\n",
               c->n_expert, c->n_ff_expert, c->n_expert_used,
               c->n_layer_dense ? "the others" : "all layers");
    printf("last norm     %s, eps %g\noutput        %s\n\n", f->norm,
           (double)c->norm_rms_eps, f->tied ? "token_embd.weight, tied" :
           "output.weight");
}

static void print_part(const char *name, const struct portion *p)
{
    const char *type, *comma = "";

    printf("  %-11s %10s %10s  %10s %6.2f  %10s  ", name,
           amount((double)p->params, "").s, amount((double)p->active, "").s,
           amount((double)p->bytes, "B").s, bits_per_weight(p),
           amount((double)p->read, "B").s);
    for (int i = 0; i < MAX_TYPES && (type = lfm2_weight_type(i)); i++)
        if (p->of_type[i] > 0) {
            printf("%s%s", comma, type);
            comma = ", ";
        }
    printf("\n");
}

static void print_parts(const struct facts *f)
{
    printf("weights       %s, %.2f bits per weight; a token reads %s\n"
           "              parameters     active       bytes   bits   per token"
           "  types\n", amount((double)f->all.bytes, "B").s,
           bits_per_weight(&f->all), amount((double)f->all.read, "B").s);
    for (int i = 0; i < N_ROLES; i++)
        if (f->part[i].n > 0)
            print_part(roles[i].name, &f->part[i]);
    printf("\n");
}

static void print_speeds(const struct facts *f, double read)
{
    for (int i = 0; i < f->n_bandwidths; i++)
        printf(" %9.*f", speed_limit(f, read, i) < 100,
               speed_limit(f, read, i));
    printf("\n");
}

/* What fits is that of the machine this runs on, now. */
static void print_fit(const struct facts *f)
{
    const int n_train = lfm2_model_config(f->model)->n_ctx_train;

    printf("fits now      ");
    if (f->free <= 0)
        printf("not known, as the system does not tell how much memory is "
               "free\n");
    else if (f->fits > 0)
        printf("%d tokens%s, with %s of memory free\n", f->fits,
               f->fits == n_train ? ", all it was trained for" : "",
               amount(f->free, "B").s);
    else
        printf("no: %s of memory are free, and what is missing is read from "
               "the file\n              again for every token\n",
               amount(f->free, "B").s);
}

static void print_rooms(const struct facts *f)
{
    printf("memory        KV cache in %s, %s a token; conv state %s\n",
           kv_name(f->s->kv), amount(f->kv, "B").s, amount(f->conv, "B").s);
    printf("speed         in tokens/s, at most, by bandwidth of the memory\n"
           "  context       KV cache  in all, beside the file");
    for (int i = 0; i < f->n_bandwidths; i++)
        printf(" %9s", phrase("%g GB/s", f->bandwidth[i]).s);
    printf("\n  %-10s %13s  %24s", "empty", "", "");
    print_speeds(f, (double)f->all.read);
    for (int i = 0; i < f->n_rooms; i++) {
        const struct room *r = &f->room[i];
        printf("  %-10d %13s  %24s", r->ctx, amount(r->kv, "B").s,
               r->beside ? amount((double)r->beside, "B").s : "too much");
        print_speeds(f, r->read);
    }
    print_fit(f);
    printf("\n");
}

/* One line for each label, or more where it gets too long. */
static void print_special(const struct facts *f)
{
    const char *label = "";
    int at = 0, len;

    for (int i = 0; i < f->n_special; i++) {
        const struct special *sp = &f->special[i];
        const char *s = lfm2_token_bytes(f->words, sp->id, 1, &len);
        const int same = strcmp(sp->label, label) == 0;
        at += len + 8;
        if (same && at <= 80)
            printf(", ");
        else {
            printf("%s%s%-14s", same ? "," : "", i ? "\n" : "",
                   same ? "" : sp->label);
            at = 14 + len + 8;
        }
        printf("%ld ", (long)sp->id);
        print_clean(s, (size_t)len);
        label = sp->label;
    }
    printf("%s", f->n_special ? "\n" : "");
}

static void print_preset(const struct facts *f)
{
    const struct preset_row *p = find_preset(f->model);
    const struct sampling *is = &f->sampling;

    printf("preset        %s, as its name ", p->name);
    if (p->words[0][0])
        printf("or sizes say \"%s%s%s\"", p->words[0], p->words[1][0] ?
               "\" and \"" : "", p->words[1]);
    else
        printf("says no other");
    printf("%s\n", f->has_wishes ? "; the file has settings of its own" : "");
    printf("  sampling    temperature %g%s%s%s%s\n", is->temp,
           is->top_k ? phrase(", top-k %d", is->top_k).s : "",
           is->top_p < 1 ? phrase(", top-p %g", is->top_p).s : "",
           is->min_p > 0 ? phrase(", min-p %g", is->min_p).s : "",
           is->repeat != 1 ? phrase(", repeat penalty %g over %d", is->repeat,
                                    is->last_n).s : "");
}

static void print_words(const struct facts *f)
{
    static const char *const how[] = {
        [NO_TEMPLATE] = "the file has none",
        [BY_HASH] = "a known one, by its hash",
        [BY_WORDS] = "unknown, but it has the words",
        [BY_MODEL] = "unknown; chosen by name and vocabulary"
    };
    const struct found_template *t = &f->template;

    if (f->words) {
        printf("vocabulary    %d tokens, %llu merges", lfm2_n_vocab(f->words),
               (unsigned long long)
               array_length(f->model, "tokenizer.ggml.merges"));
        print_string(f->model, ", type ", "tokenizer.ggml.model");
        print_string(f->model, ", pre ", "tokenizer.ggml.pre");
        printf("\n");
        print_special(f);
    } else
        printf("vocabulary    none\n");
    printf("template      %s: %s", template_names[t->template], how[t->how]);
    printf(t->word ? " \"%s\"\n" : "\n", t->word);
    if (f->template_hash[0])
        printf("  sha256      %s\n", f->template_hash);
    print_preset(f);
}

static struct phrase shape_of(const lfm2_tensor_info *t)
{
    struct phrase out = { "" };

    for (int d = 0; d < t->n_dims; d++)
        out = phrase("%.90s%s%llu", out.s, d ? " x " : "",
                     (unsigned long long)t->dims[d]);
    return out;
}

/* The digest goes first, as it is always of the same length. */
static void print_tensors(const struct facts *f)
{
    lfm2_tensor_info t;
    char hash[65];

    printf("\ntensors\n");
    for (int i = 0; lfm2_model_tensor(f->model, i, &t) == LFM2_OK; i++)
        if (f->s->sha256 && t.data) {
            digest(t.data, (size_t)t.n_bytes, hash);
            printf("  %s  %-7s %-17s  %s\n", hash, t.type, shape_of(&t).s,
                   t.name);
        } else
            printf("  %-34s %-7s %s\n", t.name, t.type, shape_of(&t).s);
}

static void print_metadata(const struct facts *f)
{
    const char *key;
    char value[128];

    printf("\nmetadata\n");
    for (int i = 0; (key = lfm2_model_key(f->model, i, value, sizeof value));
         i++)
        printf("  %s = %s\n", key, value);
}

static void print_facts(const struct facts *f)
{
    const char *odd;
    int fatal;

    print_head(f);
    if (f->is_model) {
        print_layers(f);
        print_parts(f);
        print_rooms(f);
        print_words(f);
    } else if (f->version)
        printf("readable      %d of %llu keys, %d of %llu tensors\n",
               f->keys_read, (unsigned long long)f->n_keys, f->tensors_read,
               (unsigned long long)f->n_tensors);
    for (int i = 0; (odd = find_oddity(f, i, &fatal)); i++)
        printf("%s%s: %s\n", i ? "" : "\n", fatal ? "fatal" : "tolerated", odd);
    if (f->s->verbose)
        print_metadata(f);
    if (f->s->verbose || (f->s->sha256 && f->is_model))
        print_tensors(f);
}

/* ---- in JSON */

static void member_string(struct text *to, const char *key,
                          const lfm2_model *m, const char *in_file)
{
    size_t n = 0;
    const char *s = lfm2_model_string(m, in_file, &n);

    member_bytes(to, key, s, n);
}

static void add_head(struct text *to, const struct facts *f)
{
    member_open(to, "file", "{");
    member_text(to, "path", f->s->model);
    member_count(to, "bytes", (uint64_t)f->size);
    if (f->version) {
        member_count(to, "gguf_version", (uint64_t)f->version);
        member_count(to, "n_keys", f->n_keys);
        member_count(to, "n_tensors", f->n_tensors);
        member_count(to, "keys_read", (uint64_t)f->keys_read);
        member_count(to, "tensors_read", (uint64_t)f->tensors_read);
    }
    if (f->file_hash[0])
        member_text(to, "sha256", f->file_hash);
    add_string(to, "}");
    member_bool(to, "opens", f->is_model);
    member_string(to, "name", f->model, "general.name");
    member_string(to, "architecture", f->model, "general.architecture");
}

static void add_layers(struct text *to, const struct facts *f)
{
    const lfm2_config *c = lfm2_model_config(f->model);
    const struct { const char *key; int n; } size[] = {
        { "n_layer", c->n_layer }, { "n_embd", c->n_embd },
        { "n_vocab", c->n_vocab }, { "n_ctx_train", c->n_ctx_train },
        { "l_cache", c->l_cache }, { "n_head", c->n_head },
        { "n_head_kv", c->n_head_kv }, { "head_dim", c->head_dim },
        { "n_ff", c->n_ff }, { "n_layer_dense", c->n_layer_dense },
        { "n_expert", c->n_expert }, { "n_expert_used", c->n_expert_used },
        { "n_ff_expert", c->n_ff_expert }
    };
    const struct map map = layer_map(c);

    member_open(to, "sizes", "{");
    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        member_count(to, size[i].key, (uint64_t)size[i].n);
    add_format(to, ", \"rope_freq_base\": %g, \"norm_rms_eps\": %g}",
               (double)c->rope_freq_base, (double)c->norm_rms_eps);
    member_text(to, "layer_map", map.mixers);
    member_text(to, "ffn_map", map.ffns);
    member_text(to, "last_norm", f->norm);
    member_bool(to, "tied", f->tied);
}

static void add_weights(struct text *to, const char *key,
                        const struct portion *p)
{
    const char *type;

    member_open(to, key, "{");
    member_count(to, "n_tensors", (uint64_t)p->n);
    member_count(to, "parameters", p->params);
    member_count(to, "active", p->active);
    member_count(to, "bytes", p->bytes);
    member_count(to, "bytes_per_token", p->read);
    member_real(to, "bits_per_weight", bits_per_weight(p));
    member_open(to, "types", "{");
    for (int i = 0; i < MAX_TYPES && (type = lfm2_weight_type(i)); i++)
        if (p->of_type[i] > 0)
            member_count(to, type, (uint64_t)p->of_type[i]);
    add_string(to, "}}");
}

static void add_room_json(struct text *to, const struct facts *f,
                          const struct room *r)
{
    member_open(to, NULL, "{");
    member_count(to, "context", (uint64_t)r->ctx);
    member_real(to, "kv_bytes", r->kv);
    member_count(to, "bytes_beside_file", r->beside);
    member_real(to, "bytes_per_token", r->read);
    member_open(to, "tokens_per_s", "[");
    for (int i = 0; i < f->n_bandwidths; i++)
        member_real(to, NULL, speed_limit(f, r->read, i));
    add_string(to, "]}");
}

static void add_memory(struct text *to, const struct facts *f)
{
    const struct room empty = { .read = (double)f->all.read };

    member_open(to, "memory", "{");
    member_text(to, "kv_type", kv_name(f->s->kv));
    member_real(to, "kv_bytes_per_token", f->kv);
    member_real(to, "conv_state_bytes", f->conv);
    member_real(to, "free_bytes", f->free > 0 ? f->free : NAN);
    member_real(to, "largest_context", f->free > 0 ? f->fits : NAN);
    member_open(to, "gb_per_s", "[");
    for (int i = 0; i < f->n_bandwidths; i++)
        member_real(to, NULL, f->bandwidth[i]);
    add_string(to, "]");
    member_open(to, "contexts", "[");
    add_room_json(to, f, &empty);
    for (int i = 0; i < f->n_rooms; i++)
        add_room_json(to, f, &f->room[i]);
    add_string(to, "]}");
}

static void add_vocabulary(struct text *to, const struct facts *f)
{
    int len;

    member_open(to, "vocabulary", "{");
    member_count(to, "n_tokens", (uint64_t)lfm2_n_vocab(f->words));
    member_count(to, "n_merges",
                 array_length(f->model, "tokenizer.ggml.merges"));
    member_string(to, "model", f->model, "tokenizer.ggml.model");
    member_string(to, "pre", f->model, "tokenizer.ggml.pre");
    member_open(to, "special", "[");
    for (int i = 0; i < f->n_special; i++) {
        const int32_t id = f->special[i].id;
        const char *s = lfm2_token_bytes(f->words, id, 1, &len);
        member_open(to, NULL, "{");
        member_text(to, "role", f->special[i].key);
        member_count(to, "id", (uint64_t)id);
        member_bytes(to, "piece", s, (size_t)len);
        add_string(to, "}");
    }
    add_string(to, "]}");
}

static void add_settings(struct text *to, const struct facts *f)
{
    static const char *const how[] = { "none", "hash", "words", "model" };
    const struct found_template *t = &f->template;
    const struct preset_row *p = find_preset(f->model);
    const struct sampling *is = &f->sampling;

    member_open(to, "template", "{");
    member_text(to, "name", template_names[t->template]);
    member_text(to, "by", how[t->how]);
    member_text(to, "words", t->word);
    member_text(to, "sha256", f->template_hash[0] ? f->template_hash : NULL);
    add_string(to, "}");
    member_open(to, "preset", "{");
    member_text(to, "name", p->name);
    member_open(to, "words", "[");
    for (int i = 0; i < 2 && p->words[i][0]; i++)
        member_text(to, NULL, p->words[i]);
    add_string(to, "]");
    member_bool(to, "from_file", f->has_wishes);
    member_real(to, "temperature", is->temp);
    member_count(to, "top_k", (uint64_t)is->top_k);
    member_real(to, "top_p", is->top_p);
    member_real(to, "min_p", is->min_p);
    member_real(to, "repeat_penalty", is->repeat);
    member_real(to, "repeat_last_n", is->last_n);
    add_string(to, "}");
}

static void add_shape(struct text *to, const lfm2_tensor_info *t)
{
    member_text(to, "name", t->name);
    member_text(to, "type", t->type);
    member_open(to, "shape", "[");
    for (int d = 0; d < t->n_dims; d++)
        member_count(to, NULL, t->dims[d]);
    add_string(to, "]");
    member_count(to, "bytes", t->n_bytes);
    if (t->data)
        member_count(to, "offset", t->offset);
}

static void add_tensors(struct text *to, const struct facts *f)
{
    lfm2_tensor_info t;
    char hash[65];

    member_open(to, "tensors", "[");
    for (int i = 0; lfm2_model_tensor(f->model, i, &t) == LFM2_OK; i++) {
        member_open(to, NULL, "{");
        add_shape(to, &t);
        if (f->s->sha256 && t.data) {
            digest(t.data, (size_t)t.n_bytes, hash);
            member_text(to, "sha256", hash);
        }
        add_string(to, "}");
    }
    add_string(to, "]");
}

static void add_metadata(struct text *to, const struct facts *f)
{
    const char *key;
    char value[128];

    member_open(to, "metadata", "{");
    for (int i = 0; (key = lfm2_model_key(f->model, i, value, sizeof value));
         i++)
        member_text(to, key, value);
    add_string(to, "}");
}

static void add_oddities(struct text *to, const struct facts *f)
{
    const char *odd;
    int fatal;

    member_open(to, "anomalies", "[");
    for (int i = 0; (odd = find_oddity(f, i, &fatal)); i++) {
        member_open(to, NULL, "{");
        member_text(to, "level", fatal ? "fatal" : "tolerated");
        member_text(to, "message", odd);
        add_string(to, "}");
    }
    add_string(to, "]");
}

static void add_facts(struct text *to, const struct facts *f)
{
    add_head(to, f);
    if (f->is_model) {
        add_layers(to, f);
        add_weights(to, "weights", &f->all);
        member_open(to, "roles", "{");
        for (int i = 0; i < N_ROLES; i++)
            if (f->part[i].n > 0)
                add_weights(to, roles[i].key, &f->part[i]);
        add_string(to, "}");
        add_memory(to, f);
        if (f->words)
            add_vocabulary(to, f);
        add_settings(to, f);
    }
    add_oddities(to, f);
    if (f->s->verbose)
        add_metadata(to, f);
    if (f->s->verbose || (f->s->sha256 && f->is_model))
        add_tensors(to, f);
}

/* ---- one tensor */

enum { SHOWN = 8 };                       /* columns, and rows unless asked  */

struct values {
    const struct facts *f;
    int number;                           /* of the tensor                   */
    lfm2_tensor_info is;
    float *row;                           /* [dims[0]]                       */
    uint64_t n_rows, first, last;         /* of all; those to be shown       */
    double least, most, sum, squares;     /* of what is finite               */
    uint64_t n_finite, n_odd;
    char hash[65];
};

/* The names most like one that is not there. */
static int say_nearest(const lfm2_model *m, const char *name)
{
    enum { N = 3 };
    const char *best[N] = { "", "", "" };
    int least[N] = { INT_MAX, INT_MAX, INT_MAX };
    lfm2_tensor_info t;

    for (int i = 0; lfm2_model_tensor(m, i, &t) == LFM2_OK; i++) {
        const char *s = t.name;
        int d = distance(name, s, (int)strlen(s));
        for (int k = 0; k < N; k++)
            if (d < least[k]) {
                const char *worse = best[k];
                const int much = least[k];
                best[k] = s, least[k] = d;
                s = worse, d = much;
            }
    }
    return say(USAGE, "--tensor %s: no such tensor; the nearest are %s, %s and "
               "%s", name, best[0], best[1], best[2]);
}

static int read_rows(struct values *v)
{
    const char *s = v->f->s->rows;
    const uint64_t n = v->n_rows;
    int first = 0, last = n < SHOWN ? (int)n - 1 : SHOWN - 1;

    if (s && (parse_range(s, &first, &last) != 0 || (uint64_t)first >= n ||
              (last < INT_MAX && (uint64_t)last >= n)))
        return say(USAGE, "--rows %s: expected A-B, of the rows from 0 to %llu",
                   s, (unsigned long long)n - 1);
    v->first = (uint64_t)first;
    v->last = last < INT_MAX ? (uint64_t)last : n - 1;
    return DONE;
}

static void measure_row(struct values *v)
{
    for (uint64_t c = 0; c < v->is.dims[0]; c++) {
        const double x = (double)v->row[c];
        if (!isfinite(x)) {
            v->n_odd++;
            continue;
        }
        v->least = v->n_finite && v->least < x ? v->least : x;
        v->most = v->n_finite && v->most > x ? v->most : x;
        v->sum += x;
        v->squares += x * x;
        v->n_finite++;
    }
}

static double mean_of(const struct values *v, double sum)
{
    return v->n_finite ? sum / (double)v->n_finite : NAN;
}

static int shown_columns(const struct values *v)
{
    return v->is.dims[0] < SHOWN ? (int)v->is.dims[0] : SHOWN;
}

/* As many digits as fit in a line, for numbers of the size that weights have
 * and for others. */
static void print_rows(struct values *v)
{
    const double big = fmax(fabs(v->least), fabs(v->most));
    const int usual = big >= 0.01 && big < 100;

    printf("\n%8s", "row");
    for (int c = 0; c < shown_columns(v); c++)
        printf("%*d", usual ? 9 : 10, c);
    printf("\n");
    for (uint64_t r = v->first; r <= v->last; r++) {
        lfm2_model_row(v->f->model, v->number, r, v->row);
        printf("%8llu", (unsigned long long)r);
        for (int c = 0; c < shown_columns(v); c++)
            printf(usual ? "%9.4f" : "%10.2e", (double)v->row[c]);
        printf("\n");
    }
}

static void print_values(struct values *v)
{
    const lfm2_tensor_info *t = &v->is;
    const double weights = (double)t->dims[0] * (double)v->n_rows;

    printf("tensor        %s\ntype          %s, %.2f bits per weight\n"
           "shape         %s", t->name, t->type,
           (double)t->n_bytes * 8 / weights, shape_of(t).s);
    if (v->n_rows > 1)
        printf(": %llu rows of %llu columns", (unsigned long long)v->n_rows,
               (unsigned long long)t->dims[0]);
    printf("\nplace         %llu bytes at offset %llu\nsha256        %s\n",
           (unsigned long long)t->n_bytes, (unsigned long long)t->offset,
           v->hash);
    if (v->n_finite)
        printf("values        from %g to %g, mean %g, rms %g\n", v->least,
               v->most, mean_of(v, v->sum), sqrt(mean_of(v, v->squares)));
    if (v->n_odd)
        printf("not finite    %llu of them\n", (unsigned long long)v->n_odd);
    print_rows(v);
}

static void add_values(struct text *to, struct values *v)
{
    add_shape(to, &v->is);
    member_text(to, "sha256", v->hash);
    member_real(to, "min", v->n_finite ? v->least : NAN);
    member_real(to, "max", v->n_finite ? v->most : NAN);
    member_real(to, "mean", mean_of(v, v->sum));
    member_real(to, "rms", sqrt(mean_of(v, v->squares)));
    member_count(to, "not_finite", v->n_odd);
    member_count(to, "first_row", v->first);
    member_open(to, "values", "[");
    for (uint64_t r = v->first; r <= v->last && !to->failed; r++) {
        lfm2_model_row(v->f->model, v->number, r, v->row);
        member_open(to, NULL, "[");
        for (int c = 0; c < shown_columns(v); c++)
            member_real(to, NULL, (double)v->row[c]);
        add_string(to, "]");
    }
    add_string(to, "]");
}

static int read_values(struct values *v)
{
    const lfm2_model *m = v->f->model;
    const uint64_t *dims = v->is.dims;
    int code;

    v->number = find_tensor(m, v->f->s->tensor);
    if (lfm2_model_tensor(m, v->number, &v->is) != LFM2_OK)
        return say_nearest(m, v->f->s->tensor);
    v->n_rows = dims[1] * dims[2] * dims[3];
    code = read_rows(v);
    if (code != DONE)
        return code;
    v->row = dims[0] < SIZE_MAX / 4 ? malloc((size_t)dims[0] * 4) : NULL;
    if (!v->row)
        return say(NO_MEMORY, "no memory for a row of %s", v->is.name);
    for (uint64_t r = 0; r < v->n_rows; r++) {
        lfm2_model_row(m, v->number, r, v->row);
        measure_row(v);
    }
    digest(v->is.data, (size_t)v->is.n_bytes, v->hash);
    return DONE;
}

/* ---- the report */

static int inspect_tensor(const struct facts *f)
{
    struct values v = { .f = f };
    struct text out = { 0 };
    int code = f->is_model ? read_values(&v) : report(f->s->model, &f->err);

    if (code == DONE && f->s->json) {
        add_string(&out, "{");
        add_values(&out, &v);
        add_string(&out, "}\n");
        code = print_text(&out, "the report");
    } else if (code == DONE)
        print_values(&v);
    free(v.row);
    return code;
}

static int inspect_all(struct facts *f)
{
    struct text out = { 0 };
    int code = DONE;

    find_facts(f);
    if (f->s->json) {
        add_string(&out, "{");
        add_facts(&out, f);
        add_string(&out, "}\n");
        code = print_text(&out, "the report");
    } else
        print_facts(f);
    return code != DONE ? code : status_of(f->code);
}

/* A file that is no model is explained, too, if it can be read at all. */
static int inspect_file(const struct settings *s)
{
    struct facts f = { .s = s };
    int code = s->sandbox == SANDBOX_REQUIRE ? begin_sandbox(s, 0) : DONE;

    if (code != DONE)
        return code;
    if (!s->no_mmap)
        watch_file(s->model);
    f.code = lfm2_model_open(&f.model, s->model, LFM2_LOAD_ANY | (s->no_mmap ?
                             LFM2_LOAD_READ : LFM2_LOAD_MAP), &f.err);
    f.is_model = f.code == LFM2_OK;
    if (!f.model)
        code = report(s->model, &f.err);
    else
        code = s->tensor ? inspect_tensor(&f) : inspect_all(&f);
    lfm2_tokenizer_close(f.words);
    lfm2_model_close(f.model);
    unwatch_file();
    return code;
}

/* ---------------------------------------------------- 10. The model in use */

/* Logits of a whole prompt come in chunks of this many tokens, so that the
 * memory for them does not grow with it. */
enum { LOGITS_CHUNK = 64 };

/* A trace takes much memory for every token of a batch. */
enum { TRACE_BATCH = 64 };

struct engine {
    const struct settings *s;
    int chats;                            /* line by line                    */
    FILE *status;                         /* /proc/self/status, if wanted    */
    lfm2_model *model;
    lfm2_tokenizer *words;                /* NULL: ids in, logits out        */
    lfm2_context *ctx;
    lfm2_params par;
    int template;                         /* TEMPLATE_NONE: plain text       */
    int opens_thought;                    /* the prompt ends with <think>    */
    int lookup;                           /* most tokens guessed at once     */
    struct sampling sampling;
    char date[12];
    struct ids *cached;                   /* [n_seq]: tokens in the cache    */
    lfm2_span *span;                      /* [n_seq]                         */
    float *unbent;                        /* [n_vocab]: logits as they came  */
    struct ids ends;                      /* tokens that end a turn          */
    struct trace *trace;                  /* NULL: nobody looks              */
    int told;                             /* of calls without a place        */
    struct fetch *fetch;                  /* NULL: the file is in memory     */
};

static lfm2_sampler make_sampler(const struct sampling *is, uint64_t seed)
{
    return (lfm2_sampler){
        (float)is->temp, is->top_k, (float)is->top_p, (float)is->min_p,
        (float)is->repeat, is->last_n < 0 ? 1 << 30 : is->last_n, seed
    };
}

/* ---- opening */

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

    e->template = s->template;
    if (s->raw || s->ids)
        e->template = TEMPLATE_NONE;
    else if (s->template == TEMPLATE_AUTO)
        e->template = choose_template(e->model, e->words, &known, &why);
    if (s->verbose)
        say(DONE, "template %s%s%s", template_names[e->template],
            why.s[0] ? ": " : "", why.s);
    else if (!known && !s->quiet)
        say(DONE, "%s: %s", s->model, why.s);
    e->opens_thought = e->template != TEMPLATE_NONE && e->words &&
                       opens_thought(e->model);
    if (e->template != TEMPLATE_NONE || s->raw || s->ids)
        return DONE;
    if (chat_option(s))
        return say(USAGE, "%s: no chat template, so %s cannot be used; "
                   "--template names one", s->model, chat_option(s));
    if (!s->quiet && !s->logits)
        say(DONE, "%s: no chat template, the prompt is continued as plain "
            "text", s->model);
    return DONE;
}

/* A model may have spare rows behind its own vocabulary; a vocabulary from
 * elsewhere that is shorter is another model's. */
static int open_model_words(struct engine *e)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;
    int code, n;

    if (e->s->ids && e->s->logits)
        return DONE;
    code = open_words(e->s, e->model, &e->words);
    if (code == DONE)
        code = alloc_ids(&e->ends, (size_t)lfm2_n_vocab(e->words));
    if (code != DONE)
        return code;
    n = lfm2_n_vocab(e->words);
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
    int code = DONE;

    if (!s->no_mmap)
        watch_file(s->model);
    if (s->verbose || s->bench)
        e->status = fopen("/proc/self/status", "r");
    if (s->sandbox == SANDBOX_REQUIRE)
        code = begin_sandbox(s, e->chats);
    if (code != DONE)
        return code;
    if (lfm2_model_open(&e->model, s->model, s->no_mmap ? LFM2_LOAD_READ :
                        LFM2_LOAD_MAP, &err) != LFM2_OK)
        return report(s->model, &err);
    e->par = choose_params(s, e->model);
    for (int i = 0; !s->quiet && lfm2_model_warning(e->model, i); i++)
        say(DONE, "%s: %s", s->model, lfm2_model_warning(e->model, i));
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
    sigset_t all, before;
    size_t size;

    lfm2_model_file(e->model, &size);
    if (s->no_mmap || !is_cold(e) || free_memory() < (double)size +
        (double)lfm2_context_size(e->model, &e->par))
        return;
    e->fetch = calloc(1, sizeof *e->fetch);
    if (!e->fetch)
        return;
    e->fetch->model = e->model;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&e->fetch->thread, NULL, fetch_file, e->fetch) != 0) {
        free(e->fetch);
        e->fetch = NULL;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (e->fetch && s->verbose)
        say(DONE, "%s: not all in memory, read ahead", s->model);
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

static void print_settings(struct engine *e)
{
    const lfm2_params p = lfm2_context_params(e->ctx);

    say(DONE, "context %d, batch %d, threads %d, isa %s, kv %s; %s beside the "
        "file", p.n_ctx, p.n_batch, p.n_threads, isa_name[p.isa],
        kv_name(p.kv_type),
        amount((double)lfm2_context_size(e->model, &p), "B").s);
}

static int open_context(struct engine *e)
{
    const int n_train = lfm2_model_config(e->model)->n_ctx_train;
    lfm2_error err;

    if (e->s->sandbox == SANDBOX_AUTO)
        begin_sandbox(e->s, e->chats);
    start_fetch(e);
    if (lfm2_context_open(&e->ctx, e->model, &e->par, &err) != LFM2_OK)
        return report(e->s->model, &err);
    e->cached = calloc((size_t)e->par.n_seq, sizeof *e->cached);
    e->span = calloc((size_t)e->par.n_seq, sizeof *e->span);
    e->unbent = calloc((size_t)lfm2_model_config(e->model)->n_vocab,
                       sizeof *e->unbent);
    if (!e->cached || !e->span || !e->unbent)
        return say(NO_MEMORY, "no memory for %d sequences", e->par.n_seq);
    for (int i = 0; i < e->par.n_seq; i++)
        if (alloc_ids(&e->cached[i], (size_t)e->par.n_ctx + 1) != DONE)
            return NO_MEMORY;
    if (e->s->verbose)
        print_settings(e);
    if (e->par.n_ctx > n_train && !e->s->quiet)
        say(DONE, "%s: a context of %d tokens, but the model was trained for "
            "%d", e->s->model, e->par.n_ctx, n_train);
    return DONE;
}

static int has_vectors(const struct settings *s)
{
    int isa = LFM2_ISA_SCALAR + 1;

    while (isa < LFM2_N_ISA && !lfm2_isa_available(isa))
        isa++;
    return isa < LFM2_N_ISA && s->isa != LFM2_ISA_SCALAR;
}

/* How many tokens to guess, and the rows of logits that takes.  Unless it is
 * asked for, none where a guess costs too much: with experts, as it chooses its
 * own, and in plain C, where arithmetic takes longer than reading.  A trace
 * would show tokens that nobody said. */
static void settle_lookup(struct engine *e)
{
    const struct settings *s = e->s;
    const int pays = lfm2_model_config(e->model)->n_expert == 0 &&
                     has_vectors(s);

    e->lookup = s->trace || s->experts ? 0 : s->lookup != UNSET ? s->lookup :
                pays ? LOOKUP : 0;
    if (e->par.n_logits < 1 + e->lookup)
        e->par.n_logits = 1 + e->lookup;
}

/* Everything but the context, which takes the most memory. */
static int open_engine(struct engine *e)
{
    const struct settings *s = e->s;
    int code = open_model(e);

    if (code == DONE)
        code = open_model_words(e);
    if (code == DONE)
        code = settle_template(e);
    if (code != DONE)
        return code;
    e->sampling = choose_sampling(s, e->model);
    if (s->date)
        snprintf(e->date, sizeof e->date, "%s", s->date);
    else
        today(e->date);
    if (s->logits || s->logprobs >= 0)
        e->par.n_logits = LOGITS_CHUNK;
    if ((s->trace || s->experts) && s->batch == UNSET)
        e->par.n_batch = TRACE_BATCH;
    settle_lookup(e);
    return DONE;
}

static void close_engine(struct engine *e)
{
    stop_fetch(e);
    for (int i = 0; e->cached && i < e->par.n_seq; i++)
        free(e->cached[i].id);
    free(e->cached);
    free(e->span);
    free(e->unbent);
    free(e->ends.id);
    lfm2_context_close(e->ctx);
    lfm2_tokenizer_close(e->words);
    lfm2_model_close(e->model);
    unwatch_file();
    if (e->status)
        fclose(e->status);
}

/* A signal stops the work; a second one before the first was heard ends the
 * program at once. */
static lfm2_context *volatile running;
static volatile sig_atomic_t interrupted, last_signal;

static void on_interrupt(int signal_number)
{
    if (interrupted++) {
        (void)!write(STDERR_FILENO, bright, is_dim ? sizeof bright - 1 : 0);
        _exit(128 + signal_number);
    }
    last_signal = signal_number;
    if (running)
        lfm2_cancel(running);
}

/* Without SA_RESTART, so that waiting for a line ends, too. */
static void catch_interrupt(void)
{
    struct sigaction action = { .sa_handler = on_interrupt };

    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

static double seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* -------------------------------------------------------------- 11. Traces
 *
 * What happens between a token and its logits.  The library calls
 * note_activation() with every activation; --trace makes a record of each, and
 * --experts notes which experts the tokens chose. */

/* One array of --trace-npy, [rows][n]. */
struct npy { char *name; int n, rows; };

/* Which experts were chosen.  A pass is at most n_batch positions in a row, so
 * their remainders tell them apart. */
struct routing {
    FILE *csv;                            /* NULL: a summary instead         */
    int n_batch, n_tokens;
    float *bias;                          /* [n_layer][n_expert]             */
    float *logits;                        /* [n_batch][n_expert], one layer  */
    float *chosen;                        /* [n_batch][n_expert_used]        */
    struct text *lines;                   /* [n_batch], until the last layer */
    int *count;                           /* [n_layer][n_expert] choices     */
    int *latest;                          /* the same: who was the last      */
    int *again;                           /* [n_layer] by two in a row       */
};

struct trace {
    const struct settings *s;
    const lfm2_config *c;
    int code;                             /* DONE until something fails      */
    int first, last;                      /* positions to be shown           */
    FILE *records;
    int has_some;                         /* behind the line about the model */
    struct text line, bytes;              /* a record, and its numbers       */
    FILE *array;                          /* of npy[at], the one that is open*/
    struct npy *npy;
    int n_npy, at;
    struct text path;
    struct routing r;
};

/* ---- records */

static void add_number(struct text *to, const char *name, double x)
{
    add_string(to, name);
    if (x != x)
        add_string(to, "\"nan\"");
    else if (x - x != 0)
        add_string(to, x > 0 ? "\"inf\"" : "\"-inf\"");
    else
        add_format(to, "%.9g", x);
}

static void add_numbers(struct text *to, const char *name, const float *x,
                        int n)
{
    add_string(to, name);
    for (int i = 0; i < n; i++)
        add_number(to, i ? "," : "[", (double)x[i]);
    add_string(to, "]");
}

/* One that is no number is the smallest and the largest. */
static void add_statistics(struct text *to, const float *x, int n)
{
    float min = x[0], max = x[0];
    double sum = 0, squares = 0;

    for (int i = 0; i < n; i++) {
        min = x[i] < min || x[i] != x[i] ? x[i] : min;
        max = x[i] > max || x[i] != x[i] ? x[i] : max;
        sum += (double)x[i];
        squares += (double)x[i] * (double)x[i];
    }
    add_number(to, ",\"min\":", (double)min);
    add_number(to, ",\"max\":", (double)max);
    add_number(to, ",\"mean\":", sum / n);
    add_number(to, ",\"l2\":", sqrt(squares));
}

static void write_to(struct trace *t, FILE *f, const char *path,
                     const struct text *what)
{
    if (what->failed)
        t->code = say(NO_MEMORY, "%s: no memory for a record", path);
    else if (fwrite(what->s, 1, what->n, f) != what->n)
        t->code = say(BAD_FILE, "%s: %s", path, strerror(errno));
}

static void write_record(struct trace *t, const lfm2_activation *a)
{
    const int few = a->n < 4 ? a->n : 4;
    struct sha256 sum = sha256_start;
    char hex[65];

    sha256_add(&sum, t->bytes.s, t->bytes.n);
    sha256_hex(sum, hex);
    t->line.n = 0;
    add_format(&t->line, "{\"name\":\"%s\",\"pos\":%d", a->name, a->pos);
    if (strcmp(a->name, "model.embed_tokens") == 0)
        add_format(&t->line, ",\"token\":%ld", (long)a->token);
    add_format(&t->line, ",\"shape\":[%d]", a->n);
    add_numbers(&t->line, ",\"first\":", a->x, few);
    add_numbers(&t->line, ",\"last\":", a->x + a->n - few, few);
    add_statistics(&t->line, a->x, a->n);
    add_format(&t->line, ",\"sha256\":\"%s\"}\n", hex);
    write_to(t, t->records, t->s->trace, &t->line);
}

static void write_head(struct trace *t, const struct engine *e)
{
    size_t n = 0;
    const char *arch = lfm2_model_string(e->model, "general.architecture", &n);

    add_format(&t->line, "{\"trace\":1,\"program\":\"lfm2.c %s\",\"arch\":"
               "\"%.*s\",\"model_hash\":\"%016llx\",", lfm2_version(), (int)n,
               arch ? arch : "", (unsigned long long)lfm2_model_hash(e->model));
    add_format(&t->line, "\"n_layer\":%d,\"n_embd\":%d,\"n_vocab\":%d,\"kv\":"
               "\"%s\"}\n", t->c->n_layer, t->c->n_embd, t->c->n_vocab,
               kv_name(e->par.kv_type));
    write_to(t, t->records, t->s->trace, &t->line);
}

/* ---- arrays, in NumPy's format 1.0
 *
 * A head of 128 bytes says how many rows follow, so it is written when they are
 * there.  One file is open at a time: the tokens of a module come one after the
 * other. */

static void close_array(struct trace *t)
{
    const struct npy *a = &t->npy[t->at];
    char head[129] = "\x93NUMPY\1\0v", about[100];  /* v: 118 bytes follow */
    FILE *f = t->array;

    if (!f)
        return;
    t->array = NULL;
    snprintf(about, sizeof about, "{'descr': '<f4', 'fortran_order': False, "
             "'shape': (%d, %d), }", a->rows, a->n);
    snprintf(head + 10, sizeof head - 10, "%-117s\n", about);
    if (fseek(f, 0, SEEK_SET) != 0 || fwrite(head, 1, 128, f) != 128 ||
        ferror(f))
        t->code = say(BAD_FILE, "%s: %s", t->path.s, strerror(errno));
    t->code = finish_file(f, t->path.s, t->code);
}

/* The number of the array of that name, which may be a new one; or -1. */
static int find_array(struct trace *t, const lfm2_activation *a)
{
    struct npy *more;
    int i = 0;

    while (i < t->n_npy && strcmp(t->npy[i].name, a->name) != 0)
        i++;
    if (i < t->n_npy)
        return i;
    more = realloc(t->npy, ((size_t)i + 1) * sizeof *more);
    if (!more)
        return -1;
    t->npy = more;
    more[i] = (struct npy){ malloc(strlen(a->name) + 1), a->n, 0 };
    if (!more[i].name)
        return -1;
    strcpy(more[i].name, a->name);
    return t->n_npy++;
}

static void open_array(struct trace *t, const lfm2_activation *a)
{
    const int i = find_array(t, a);

    t->path.n = 0;
    add_string(&t->path, t->s->trace_npy);
    add_format(&t->path, "/%s.npy", a->name);
    if (i < 0 || t->path.failed) {
        t->code = say(NO_MEMORY, "%s: no memory", t->s->trace_npy);
        return;
    }
    t->at = i;
    t->array = fopen(t->path.s, t->npy[i].rows ? "r+b" : "wb");
    if (!t->array || fseek(t->array, t->npy[i].rows ? 0 : 128,
                           t->npy[i].rows ? SEEK_END : SEEK_SET) != 0)
        t->code = say(BAD_FILE, "%s: %s", t->path.s, strerror(errno));
}

static void write_array(struct trace *t, const lfm2_activation *a)
{
    if (t->array && strcmp(t->npy[t->at].name, a->name) != 0)
        close_array(t);
    if (!t->array && t->code == DONE)
        open_array(t, a);
    if (t->code != DONE)
        return;
    write_to(t, t->array, t->path.s, &t->bytes);
    t->npy[t->at].rows++;
}

static void note_values(struct trace *t, const lfm2_activation *a)
{
    int wanted = t->s->trace_filter.n == 0;

    for (int i = 0; i < t->s->trace_filter.n; i++)
        wanted |= fnmatch(t->s->trace_filter.v[i], a->name, 0) == 0;
    if (!wanted || a->pos < t->first || a->pos > t->last)
        return;
    t->has_some = 1;
    t->bytes.n = 0;
    for (int i = 0; i < a->n; i++)
        add_le(&t->bytes, float_bits(a->x[i]), 4);
    if (t->bytes.failed)
        t->code = say(NO_MEMORY, "%s: no memory", t->s->trace);
    if (t->code == DONE)
        write_record(t, a);
    if (t->code == DONE && t->s->trace_npy)
        write_array(t, a);
}

/* ---- experts */

/* A line for each choice of a token in a layer; those of a pass are held back
 * until its last layer, so that they come out by position. */
static void note_choices(struct trace *t, const lfm2_activation *a, int row)
{
    const struct routing *r = &t->r;
    const float *logits = r->logits + (size_t)row * t->c->n_expert;
    const float *bias = r->bias + (size_t)a->layer * t->c->n_expert;
    struct text *to = &r->lines[row];

    if (a->layer == t->c->n_layer_dense)  /* those of a pass that was        */
        to->n = 0;                        /* written, or cancelled           */
    for (int i = 0; i < a->n; i++) {
        const int e = (int)r->chosen[row * t->c->n_expert_used + i];
        add_format(to, "%d,%ld,%d,%d,%d,", a->pos, (long)a->token, a->layer, i,
                   e);
        add_format(to, "%.9g,%.9g,%.9g\n",
                   (double)(float)(1 / (1 + exp(-(double)logits[e]))),
                   (double)bias[e], (double)a->x[i]);
    }
    if (a->layer == t->c->n_layer - 1)
        write_to(t, r->csv, t->s->experts, to);
}

static void count_choices(struct trace *t, const lfm2_activation *a)
{
    struct routing *r = &t->r;

    for (int i = 0; i < a->n; i++) {
        const size_t e = (size_t)a->layer * t->c->n_expert + (size_t)a->x[i];
        r->count[e]++;
        r->again[a->layer] += r->latest[e] == a->pos + 1;
        r->latest[e] = a->pos + 2;
    }
    r->n_tokens += a->layer == t->c->n_layer - 1;
}

static void note_routing(struct trace *t, const lfm2_activation *a)
{
    const int row = a->pos % t->r.n_batch;
    float *logits = t->r.logits + (size_t)row * t->c->n_expert;
    float *chosen = t->r.chosen + (size_t)row * t->c->n_expert_used;

    if (name_ends(a->name, ".feed_forward.gate")) {
        memcpy(logits, a->x, (size_t)a->n * sizeof *logits);
    } else if (name_ends(a->name, ".feed_forward.selected_experts")) {
        memcpy(chosen, a->x, (size_t)a->n * sizeof *chosen);
        count_choices(t, a);
    } else if (name_ends(a->name, ".feed_forward.routing_weights") &&
               t->r.csv) {
        note_choices(t, a, row);
    }
}

/* The load of an expert, 1 for an even share. */
static char heat(double load)
{
    return load <= 0 ? ' ' : load < 0.25 ? '.' : load < 0.5 ? ':' :
           load < 1 ? '-' : load < 2 ? '+' : load < 4 ? '*' : '#';
}

static void print_layer(const struct trace *t, int il)
{
    const int n = t->c->n_expert, used = t->c->n_expert_used;
    const int *count = t->r.count + (size_t)il * n;
    const double all = (double)t->r.n_tokens * used;
    double entropy = 0;
    int unused = 0;

    printf("%5d  |", il);
    for (int e = 0; e < n; e++) {
        const double p = count[e] / all;
        putchar(heat(p * n));
        entropy -= p > 0 ? p * log2(p) : 0;
        unused += count[e] == 0;
    }
    printf("|  %7.2f  %6d", entropy, unused);
    if (t->r.n_tokens > 1)
        printf("  %4.0f%%", 100.0 * t->r.again[il] / (all - used));
    putchar('\n');
}

/* How the load is shared, and how often the expert of a token is that of the
 * one before, whose weights are still near. */
static void print_routing(const struct trace *t)
{
    const int n = t->c->n_expert;

    printf("%d tokens, each with %d of %d experts in every layer\n\n"
           "layer  |%-*s|  entropy  unused  again\n", t->r.n_tokens,
           t->c->n_expert_used, n, n, n < 7 ? "" : "experts");
    for (int il = t->c->n_layer_dense; t->r.n_tokens > 0 && il < t->c->n_layer;
         il++)
        print_layer(t, il);
    printf("\nexperts: of an even share, . below 1/4, : 1/2, - 1, + 2, * 4, # "
           "more\nentropy: in bits, %.2f if all are used alike\n"
           "again:   of the experts of a token, those that the one before it "
           "chose, too\n", log2(n));
}

/* ---- from the first token to the last */

static void note_activation(void *user, const lfm2_activation *a)
{
    struct trace *t = user;

    if (t->code == DONE && t->records)
        note_values(t, a);
    if (t->code == DONE && t->s->experts)
        note_routing(t, a);
}

/* Where the file has none, they are 0. */
static void read_biases(struct trace *t, const lfm2_model *m)
{
    const size_t n = (size_t)t->c->n_expert;
    lfm2_tensor_info info;

    for (int il = 0; il < t->c->n_layer; il++) {
        const int i = find_tensor(m, phrase("blk.%d.exp_probs_b.bias", il).s);
        if (lfm2_model_tensor(m, i, &info) == LFM2_OK && info.dims[0] == n)
            lfm2_model_row(m, i, 0, t->r.bias + n * (size_t)il);
    }
}

static int open_routing(struct trace *t, const struct engine *e)
{
    const size_t n_layer = (size_t)t->c->n_layer;
    const size_t n = (size_t)t->c->n_expert;
    const size_t n_batch = (size_t)lfm2_context_params(e->ctx).n_batch;
    struct routing *r = &t->r;

    if (n == 0)
        return say(USAGE, "--experts: %s has none", t->s->model);
    r->n_batch = (int)n_batch;
    r->bias = calloc(n_layer * n, sizeof *r->bias);
    r->logits = calloc(n_batch * n, sizeof *r->logits);
    r->chosen = calloc(n_batch * n, sizeof *r->chosen);
    r->lines = calloc(n_batch, sizeof *r->lines);
    r->count = calloc(n_layer * n, sizeof *r->count);
    r->latest = calloc(n_layer * n, sizeof *r->latest);
    r->again = calloc(n_layer, sizeof *r->again);
    if (!r->bias || !r->logits || !r->chosen || !r->lines || !r->count ||
        !r->latest || !r->again)
        return say(NO_MEMORY, "--experts: no memory");
    read_biases(t, e->model);
    if (is_dash(t->s->experts))
        return DONE;
    r->csv = create_file(t->s->experts);
    if (!r->csv)
        return BAD_FILE;
    fputs("position,token,layer,rank,expert,score,bias,weight\n", r->csv);
    return DONE;
}

static int open_records(struct trace *t, const struct engine *e)
{
    const struct settings *s = t->s;

    if (s->trace_tokens)
        parse_range(s->trace_tokens, &t->first, &t->last);
    if (s->trace_npy && mkdir(s->trace_npy, 0777) != 0 && errno != EEXIST)
        return say(BAD_FILE, "%s: %s", s->trace_npy, strerror(errno));
    t->records = create_file(s->trace);
    if (!t->records)
        return BAD_FILE;
    write_head(t, e);
    return t->code;
}

static int open_trace(struct engine *e)
{
    const struct settings *s = e->s;
    lfm2_error err;
    int code = DONE;

    if (!s->trace && !s->experts)
        return DONE;
    e->trace = calloc(1, sizeof *e->trace);
    if (!e->trace)
        return say(NO_MEMORY, "no memory for a trace");
    *e->trace = (struct trace){ .s = s, .c = lfm2_model_config(e->model),
                                .last = INT_MAX };
    if (s->experts)
        code = open_routing(e->trace, e);
    if (code == DONE && s->trace)
        code = open_records(e->trace, e);
    if (code == DONE && lfm2_trace(e->ctx, note_activation, e->trace, &err) !=
        LFM2_OK)
        code = report(s->model, &err);
    return code;
}

static void free_trace(struct trace *t)
{
    for (int i = 0; i < t->n_npy; i++)
        free(t->npy[i].name);
    for (int i = 0; t->r.lines && i < t->r.n_batch; i++)
        free(t->r.lines[i].s);
    free(t->npy);
    free(t->line.s);
    free(t->bytes.s);
    free(t->path.s);
    free(t->r.bias);
    free(t->r.logits);
    free(t->r.chosen);
    free(t->r.lines);
    free(t->r.count);
    free(t->r.latest);
    free(t->r.again);
    free(t);
}

/* What was to be written is there, or `code` and a message say why not. */
static int close_trace(struct engine *e, int code)
{
    struct trace *t = e->trace;

    if (!t)
        return code;
    lfm2_trace(e->ctx, NULL, NULL, NULL);
    close_array(t);
    code = code == DONE ? t->code : code;
    if (t->records && code == DONE && !t->has_some)
        say(DONE, "%s: no module of such a name at such a position",
            t->s->trace);
    if (t->records)
        code = finish_file(t->records, t->s->trace, code);
    if (t->r.csv)
        code = finish_file(t->r.csv, t->s->experts, code);
    else if (t->s->experts && (code == DONE || code == INTERRUPTED))
        print_routing(t);
    free_trace(t);
    e->trace = NULL;
    return code;
}

/* ------------------------------------------------------------ 12. An answer
 *
 * A request is tokens to read and how to go on; a reply is what comes of it,
 * and grows token by token.  step() moves any number of replies on by one
 * forward, so a question on the command line, a chat and a batch are the same
 * loop. */

enum { MAX_STOPS = 16 };

struct bias { int32_t id; float by; };

struct request {
    struct ids prompt;
    struct sampling sampling;
    uint64_t seed;
    int limit;                            /* most tokens; -1: to the end     */
    int ignore_eos;
    int split;                            /* thoughts and calls are known    */
    int raw;                              /* but left in the text            */
    int in_thought;                       /* the prompt has opened one       */
    int think_budget;                     /* most tokens of one; -1: any     */
    int logprobs, prompt_logprobs;        /* how many alternatives; -1: off  */
    int echo;                             /* the prompt is told, too         */
    int columns;                          /* as /v1/completions writes them  */
    double presence, frequency;           /* taken off what was said before  */
    struct bias *bias;
    int n_bias;
    struct text stop[MAX_STOPS];
    int n_stops;
};

/* Log probabilities of /v1/completions: an array for each of these. */
enum { TOKENS, LOGPROBS, BEST, OFFSETS, N_COLUMNS };

enum finish { UNFINISHED, STOPPED, BY_LENGTH, BY_CONTEXT, BROKEN };

/* Where in an answer the next byte belongs. */
enum part { START, THOUGHT, AFTER_THOUGHT, ANSWER, CALL, PLAIN };

struct reply {
    const struct request *q;
    int seq;
    struct ids ids;                       /* prompt, then answer: [n_ctx]    */
    int n_fed, n_reused;                  /* of ids: in the cache; from it   */
    int n_made, n_thought;                /* tokens made, of them in thought */
    int n_guessed, n_right;               /* tokens by lookup, right ones    */
    int bold, credit;                     /* how many it may guess           */
    lfm2_sampler sampler;
    enum finish finish;
    enum part part;
    struct text raw;                      /* all that was said               */
    size_t seen;                          /* of raw: told apart              */
    struct text text, thought, calls;     /* the parts of it                 */
    struct text logprobs, prompt_logprobs;   /* JSON values, by commas       */
    struct text column[N_COLUMNS];        /* the same                        */
    int offset;                           /* characters before the next one  */
    struct bias *said;                    /* tokens made, and how often      */
    int n_said;
    uint64_t hash;                        /* of all logits sampled from      */
    double started, read, ended;          /* seconds()                       */
};

static void free_request(struct request *q)
{
    for (int i = 0; i < q->n_stops; i++)
        free(q->stop[i].s);
    free(q->prompt.id);
    free(q->bias);
}

static void free_reply(struct reply *r)
{
    free(r->ids.id);
    free(r->raw.s);
    free(r->text.s);
    free(r->thought.s);
    free(r->calls.s);
    free(r->logprobs.s);
    free(r->prompt_logprobs.s);
    for (int i = 0; i < N_COLUMNS; i++)
        free(r->column[i].s);
    free(r->said);
}

/* ---- thought, answer, calls and stop strings
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
                     size_t len, int is_stop)
{
    const size_t held = len > 0 ? overlap(s, n, word, len) : 0;
    const size_t before = c->len > 0 ? c->at + c->len : n;

    for (size_t at = 0; len > 0 && at + len <= before; at++)
        if (s[at] == word[0] && memcmp(s + at, word, len) == 0) {
            if (c->len == 0 || at + len < before || len >= c->len)
                *c = (struct cut){ at, len, 0, is_stop };
            return;
        }
    if (held > c->held && c->len == 0)
        c->held = held;
}

static struct cut find_cut(const struct reply *r, const char *s, size_t n)
{
    struct cut c = { n, 0, 0, 0 };

    if (r->part == THOUGHT)
        look_for(&c, s, n, THINK_END, strlen(THINK_END), 0);
    if (r->part == ANSWER)
        look_for(&c, s, n, CALL_START, strlen(CALL_START), 0);
    if (r->part == CALL)
        look_for(&c, s, n, CALL_END, strlen(CALL_END), 0);
    for (int i = 0; r->part >= ANSWER && r->part != CALL && i < r->q->n_stops;
         i++)
        look_for(&c, s, n, r->q->stop[i].s, r->q->stop[i].n, 1);
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
    if (r->part == START && n - blank >= len &&
        memcmp(s + blank, THINK, len) == 0) {
        r->part = THOUGHT;
        r->seen += blank + len;
        return 1;
    }
    if (r->part == AFTER_THOUGHT)
        r->seen += blank;
    r->part = ANSWER;
    return 1;
}

/* The words between parts belong to none, those around a call to the call. */
static void end_part(struct reply *r, const char *word, struct cut c)
{
    if (c.is_stop) {
        r->finish = STOPPED;
        r->raw.n = r->seen -= c.len;
        r->raw.s[r->raw.n] = '\0';
    } else if (r->part == THOUGHT)
        r->part = AFTER_THOUGHT;
    else {
        r->part = r->part == CALL ? ANSWER : CALL;
        if (!r->q->raw)
            add(&r->calls, word, c.len);
    }
}

static void tell_apart(struct reply *r, int last)
{
    while (r->seen < r->raw.n) {
        if (r->part == START || r->part == AFTER_THOUGHT) {
            if (!begin_part(r, last))
                return;
            continue;
        }
        const char *s = r->raw.s + r->seen;
        const struct cut c = find_cut(r, s, r->raw.n - r->seen);
        const size_t n = c.at - (last ? 0 : c.held);
        if (!r->q->raw)
            add(r->part == THOUGHT ? &r->thought : r->part == CALL ? &r->calls :
                &r->text, s, n);
        r->seen += n + c.len;
        if (c.len == 0)
            return;
        end_part(r, s + c.at, c);
    }
}

/* Tell apart what is new in r->raw; `last` lets go of what is held back. */
static void split(struct reply *r, int last)
{
    const size_t from = r->seen;

    tell_apart(r, last);
    if (r->q->raw && r->seen > from)
        add(&r->text, r->raw.s + from, r->seen - from);
}

static int is_marker(const char *s, int len)
{
    static const char *const marker[] = {
        THINK, THINK_END, CALL_START, CALL_END
    };

    for (int i = 0; i < 4; i++)
        if ((size_t)len == strlen(marker[i]) &&
            memcmp(s, marker[i], (size_t)len) == 0)
            return 1;
    return 0;
}

/* The text of a token; of the control tokens only those that set parts of an
 * answer apart. */
static const char *spoken(const struct engine *e, int32_t id, int *len)
{
    const char *s = lfm2_token_bytes(e->words, id, 0, len);

    if (*len > 0)
        return s;
    s = lfm2_token_bytes(e->words, id, 1, len);
    if (!is_marker(s, *len))
        *len = 0;
    return s;
}

/* ---- log probabilities, as OpenAI writes them */

static int by_value(const void *a, const void *b)
{
    const struct bias *x = a, *y = b;     /* an id and its logit             */

    return x->by != y->by ? (x->by < y->by) - (x->by > y->by) :
           (x->id > y->id) - (x->id < y->id);
}

/* The k likeliest of the logits, best first. */
static void find_best(const float *logits, int n_vocab, struct bias *best,
                      int k)
{
    int n = 0;

    for (int id = 0; id < n_vocab; id++) {
        const struct bias x = { id, logits[id] };
        if (n == k && (k == 0 || by_value(&x, &best[n - 1]) > 0))
            continue;
        int at = n < k ? n++ : n - 1;
        for (; at > 0 && by_value(&x, &best[at - 1]) < 0; at--)
            best[at] = best[at - 1];
        best[at] = x;
    }
}

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

static void add_log(struct text *to, double logprob)
{
    add_format(to, "%.6f", logprob > -9999 ? logprob : -9999.0);
}

/* {"token": ..., "id": ..., "logprob": ..., "bytes": [...] */
static void add_logprob(const struct engine *e, struct text *to, int32_t id,
                        double logprob)
{
    int len;
    const char *s = lfm2_token_bytes(e->words, id, 1, &len);

    add_string(to, "{\"token\": ");
    add_json_string(to, s, (size_t)len);
    add_format(to, ", \"id\": %ld, \"logprob\": ", (long)id);
    add_log(to, logprob);
    add_string(to, ", \"bytes\": [");
    for (int i = 0; i < len; i++)
        add_format(to, "%s%d", i ? ", " : "", (unsigned char)s[i]);
    add_string(to, "]");
}

enum { MAX_LOGPROBS = 20 };

static void note_logprob(const struct engine *e, struct text *to,
                         const float *logits, int32_t id, int k)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;
    const double all = log_sum(logits, n_vocab);
    struct bias best[MAX_LOGPROBS];

    k = k < n_vocab ? k : n_vocab;
    find_best(logits, n_vocab, best, k);
    if (to->n > 0)
        add_string(to, ", ");
    add_logprob(e, to, id, (double)logits[id] - all);
    add_string(to, ", \"top_logprobs\": [");
    for (int i = 0; i < k; i++) {
        add_string(to, i ? ", " : "");
        add_logprob(e, to, best[i].id, (double)best[i].by - all);
        add_string(to, "}");
    }
    add_string(to, "]}");
}

/* ---- the same for /v1/completions
 *
 * Its names of tokens are keys of an object and must differ, so parts of
 * characters are written as bytes. */

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

/* "name": log probability, of the k likeliest and of the token itself. */
static void add_best(const struct engine *e, struct text *to,
                     const float *logits, int32_t id, int k, double all)
{
    const int n_vocab = lfm2_n_vocab(e->words);       /* all that have names */
    struct bias best[MAX_LOGPROBS + 1];
    int has = 0;

    k = k < n_vocab ? k : n_vocab;
    find_best(logits, n_vocab, best, k);
    for (int i = 0; i < k; i++)
        has |= best[i].id == id;
    if (!has)
        best[k++] = (struct bias){ id, logits[id] };
    for (int i = 0; i < k; i++) {
        add_string(to, i ? ", " : "{");
        add_token_name(e, to, best[i].id);
        add_string(to, ": ");
        add_log(to, (double)best[i].by - all);
    }
    add_string(to, "}");
}

/* A row of the columns; without logits for the first token of a text. */
static void note_columns(const struct engine *e, struct reply *r,
                         const float *logits, int32_t id)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;
    const double all = logits ? log_sum(logits, n_vocab) : 0;
    int len;
    const char *s = spoken(e, id, &len);

    for (int i = 0; i < N_COLUMNS && r->column[TOKENS].n > 0; i++)
        add_string(&r->column[i], ", ");
    add_token_name(e, &r->column[TOKENS], id);
    add_format(&r->column[OFFSETS], "%d", r->offset);
    for (int i = 0; i < len; i++)
        r->offset += (s[i] & 0xc0) != 0x80;
    if (!logits) {
        add_string(&r->column[LOGPROBS], "null");
        add_string(&r->column[BEST], "null");
        return;
    }
    add_log(&r->column[LOGPROBS], (double)logits[id] - all);
    add_best(e, &r->column[BEST], logits, id, r->q->logprobs, all);
}

/* ---- token by token */

/* FNV-1a over whole numbers: the same on every machine, as the logits are. */
static uint64_t hash_floats(uint64_t h, const float *x, int n)
{
    for (int i = 0; i < n; i++)
        h = hash_number(h, float_bits(x[i]));
    return h;
}

/* Change logits as the request wishes, before its sampler sees them. */
static void bend_logits(const struct engine *e, const struct reply *r,
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
    const char *s = spoken(e, id, &len);

    add(&r->raw, s, (size_t)len);
    split(r, 0);
    r->n_made++;
    if (r->said)
        count_token(r, id);
    r->n_thought += before == THOUGHT;
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

    if (r->part != THOUGHT || r->q->think_budget < 0 ||
        r->n_thought < r->q->think_budget)
        return 0;
    n = lfm2_encode(e->words, closing, strlen(closing), LFM2_ENCODE_SPECIAL,
                    id, 16);
    for (int i = 0; i < n && i < 16 && r->finish == UNFINISHED; i++)
        take_token(e, r, id[i]);
    return n > 0;
}

/* The next token, from the logits of the last.  What is noted of them is what
 * the model said, before anything bends it. */
static void sample_token(struct engine *e, struct reply *r, float *logits)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;
    int32_t id;

    if (close_thought(e, r))
        return;
    if (e->s->json)
        r->hash = hash_floats(r->hash, logits, n_vocab);
    if (r->q->logprobs >= 0)
        memcpy(e->unbent, logits, (size_t)n_vocab * sizeof *logits);
    bend_logits(e, r, logits);
    id = lfm2_sample(e->ctx, &r->sampler, logits, r->ids.id, r->ids.n);
    if (id < 0) {
        r->finish = BROKEN;
        return;
    }
    if (r->q->columns)
        note_columns(e, r, e->unbent, id);
    if (lfm2_is_eog(e->words, id)) {
        r->finish = STOPPED;
        return;
    }
    if (r->q->logprobs >= 0 && !r->q->columns)
        note_logprob(e, &r->logprobs, e->unbent, id, r->q->logprobs);
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

static int smaller(int a, int b)
{
    return a < b ? a : b;
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

/* What a reply shares with the text in a sequence need not be read again. */
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

/* Begin to answer in a sequence.  One token at least is always read, for its
 * logits; all are, if the prompt's own are wanted. */
static int start_reply(struct engine *e, struct reply *r,
                       const struct request *q, int seq, struct why *why)
{
    const size_t n_ctx = (size_t)e->par.n_ctx;
    struct ids *cached = &e->cached[seq];
    int code = check_prompt(e, q, why), same;

    *r = (struct reply){ .q = q, .seq = seq, .hash = HASH_START };
    if (code != DONE)
        return code;
    r->ids.id = malloc((n_ctx + 1) * sizeof *r->ids.id);
    if (q->presence != 0 || q->frequency != 0)
        r->said = malloc((n_ctx + 1) * sizeof *r->said);
    if (!r->ids.id || (!r->said && (q->presence != 0 || q->frequency != 0)))
        return because(why, NO_MEMORY, "no memory for %zu tokens", n_ctx);
    memcpy(r->ids.id, q->prompt.id, (size_t)q->prompt.n * sizeof *r->ids.id);
    r->ids.n = q->prompt.n;
    same = q->prompt_logprobs < 0 ? shared_prefix(cached, &q->prompt) : 0;
    same = same < q->prompt.n ? same : q->prompt.n - 1;
    cached->n = lfm2_seq_trim(e->ctx, seq, same);
    r->n_fed = r->n_reused = cached->n;
    r->part = !q->split ? PLAIN : q->in_thought ? THOUGHT : START;
    r->sampler = make_sampler(&q->sampling, q->seed);
    r->bold = MIN_MATCH;
    r->credit = CREDIT;
    r->started = r->read = r->ended = seconds();
    return DONE;
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
    return (lfm2_span){ r->seq, r->ids.id + r->n_fed, n + guesses,
                        (all_rows ? n : n == rest) + guesses };
}

/* What the model thought of the prompt: of each token but the first. */
static void note_prompt(const struct engine *e, struct reply *r, int span,
                        int n)
{
    const struct request *q = r->q;
    const int columns = q->columns && q->echo;

    if (r->n_fed == 0 && columns)
        note_columns(e, r, NULL, r->ids.id[0]);
    else if (r->n_fed == 0)
        add_string(&r->prompt_logprobs, "null");
    for (int i = 0; i < n && r->n_fed + i + 1 < q->prompt.n; i++) {
        const float *logits = lfm2_logits(e->ctx, span, i);
        const int32_t id = r->ids.id[r->n_fed + i + 1];
        if (columns)
            note_columns(e, r, logits, id);
        else
            note_logprob(e, &r->prompt_logprobs, logits, id,
                         q->prompt_logprobs);
    }
}

/* Say the next token, and as many more as were guessed.  What was guessed wrong
 * leaves the cache, and maybe some of what is before it, to be read again. */
static void say_tokens(struct engine *e, struct reply *r, int span)
{
    struct ids *cached = &e->cached[r->seq];
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
    struct ids *cached = &e->cached[r->seq];

    memcpy(cached->id + cached->n, fed->tokens,
           (size_t)fed->n_tokens * sizeof *cached->id);
    cached->n += fed->n_tokens;
    if (r->q->prompt_logprobs >= 0 && r->n_made == 0)
        note_prompt(e, r, span, fed->n_logits);
    r->n_fed = smaller(cached->n, r->ids.n);
    if (r->n_made == 0)
        r->read = seconds();
    if (r->n_fed == r->ids.n && r->q->limit == 0)
        r->finish = BY_LENGTH;
    else if (r->n_fed == r->ids.n)
        say_tokens(e, r, span);
    if (r->finish != UNFINISHED) {
        split(r, 1);
        r->ended = seconds();
    }
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

/* Move n unfinished replies on by one forward.  Those that read their prompts
 * share the room that those who write leave, and all of them the guesses. */
static int step(struct engine *e, struct reply *const *r, int n)
{
    int room = e->par.n_batch - n, rows = e->par.n_logits - n, code;

    room = room > 0 ? room : 0;
    for (int i = 0; i < n; i++)
        e->span[i] = next_span(e, r[i], e->lookup / n, &room, &rows);
    code = forward(e, e->span, n);
    for (int i = 0; code == DONE && i < n; i++)
        move_on(e, r[i], i);
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

static int add_stop(struct request *q, const char *s, size_t n)
{
    if (q->n_stops == MAX_STOPS)
        return -1;
    add(&q->stop[q->n_stops], s, n);
    return q->stop[q->n_stops++].failed ? -1 : 0;
}

/* What the options ask for, without a prompt. */
static int make_request(const struct engine *e, struct request *q)
{
    const struct settings *s = e->s;
    const int plain = e->template == TEMPLATE_NONE;

    *q = (struct request){
        .sampling = e->sampling, .limit = s->predict,
        .seed = s->seed < 0 ? random_seed() : (uint64_t)s->seed,
        .ignore_eos = s->ignore_eos, .think_budget = s->think_budget,
        .logprobs = s->logprobs, .prompt_logprobs = s->logprobs,
        .split = !plain, .raw = s->think == THINK_RAW,
        .in_thought = e->opens_thought
    };
    if (q->limit == UNSET)
        q->limit = plain ? RAW_LEN : -1;
    for (int i = 0; i < s->stop.n; i++)
        if (add_stop(q, s->stop.v[i], strlen(s->stop.v[i])) != 0)
            return say(NO_MEMORY, "no memory for the stop strings");
    return DONE;
}

/* ------------------------------------------------------ 13. A conversation
 *
 * Its messages are JSON as OpenAI's clients send it, wherever they come from:
 * -p and -sys are two of them, --messages brings all. */

struct talk {
    struct engine *e;
    struct pool pool;
    struct json *messages;                /* array                           */
    const struct json *tools;             /* array, or NULL                  */
    const struct json *form;              /* what --messages says besides    */
    struct rendered prompt;
    struct request q;
    struct reply r;
    struct text said;                     /* plain text of the session       */
    int grown;                            /* beyond what the form is about   */
    int is_chat;                          /* and not a single answer         */
    int keeps_session;
};

static int add_message(struct talk *t, const char *role, const char *s,
                       size_t n)
{
    struct json *m = json_object(&t->pool);

    json_set(&t->pool, m, "role", json_string(&t->pool, role, strlen(role)));
    json_set(&t->pool, m, "content", json_string(&t->pool, s, n));
    json_append(&t->pool, t->messages, m);
    t->grown = 1;
    return t->pool.failed ? say(NO_MEMORY, "no memory for a message") : DONE;
}

static int read_json(struct talk *t, const char *path, struct json **out)
{
    struct text text = { 0 };
    struct why why;
    int code = read_file(path, &text);

    if (code == DONE && (code = json_parse(&t->pool, text.s, text.n, out,
                                           &why)) != DONE)
        say(code, "%s: %s", path, why.s);
    free(text.s);
    return code;
}

/* An array, or an object with one under this key. */
static int read_list(struct talk *t, const char *path, const char *key,
                     struct json **whole, struct json **list)
{
    int code = read_json(t, path, whole);

    if (code != DONE)
        return code;
    *list = (*whole)->type == JSON_OBJECT ? json_get(*whole, key) : *whole;
    if (!*list || (*list)->type != JSON_ARRAY)
        return say(USAGE, "%s: expected a JSON array, or an object with one as "
                   "\"%s\"", path, key);
    return DONE;
}

/* The messages and tools that the options name. */
static int read_talk(struct talk *t)
{
    const struct settings *s = t->e->s;
    struct json *whole = NULL, *tools = NULL;
    int code = DONE;

    if (s->messages) {
        code = read_list(t, s->messages, "messages", &whole, &t->messages);
        if (code == DONE && whole->type == JSON_OBJECT) {
            t->form = whole;
            t->tools = json_get(whole, "tools");
        }
    } else if (!t->messages)
        t->messages = json_array(&t->pool);
    if (code == DONE && s->tools) {
        code = read_list(t, s->tools, "tools", &whole, &tools);
        t->tools = tools;
    }
    return code;
}

static int flag_of(const struct json *form, const char *key, int otherwise)
{
    json_bool(json_get(form, key), &otherwise);
    return otherwise;
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

static int uses_date(const struct talk *t)
{
    return t->e->template != TEMPLATE_NONE && t->tools && t->tools->first &&
           dialects[t->e->template].dated;
}

/* The older templates have no place for calls, which a program may count on. */
static void tell_lost_calls(struct engine *e, const struct rendered *prompt)
{
    if (!prompt->lost_calls || e->told || e->s->quiet)
        return;
    say(DONE, "template %s passes over the tool_calls of messages, here and "
        "below; in their content it writes them down",
        template_names[e->template]);
    e->told = 1;
}

/* The prompt of all messages so far. */
static int render_talk(struct talk *t, struct why *why)
{
    struct engine *e = t->e;
    const struct json *kwargs = json_get(t->form, "chat_template_kwargs");
    const int keep = flag_of(t->form, "keep_past_thinking", 0) ||
                     flag_of(t->form, "preserve_thinking", 0) ||
                     flag_of(kwargs, "keep_past_thinking", 0) ||
                     flag_of(kwargs, "preserve_thinking", 0);
    const struct json *end = t->grown ? NULL : t->form;
    const int go_on = flag_of(end, "continue_final_message", 0);
    const struct conversation c = {
        .messages = t->messages, .tools = t->tools, .keep_thinking = keep,
        .generate = flag_of(end, "add_generation_prompt", !go_on),
        .continue_last = go_on, .date = e->date,
        .open_thought = e->opens_thought
    };
    int code;

    rendered_free(&t->prompt);
    free(t->q.prompt.id);
    t->q.prompt = (struct ids){ NULL, 0 };
    code = render(&c, e->template, &t->prompt, why);
    if (code == DONE)
        code = encode_rendered(e->words, &t->prompt, e->s->special,
                               &t->q.prompt, why);
    tell_lost_calls(e, &t->prompt);
    t->q.in_thought = code == DONE && ends_in_thought(&t->prompt);
    return code;
}

/* The same, saying why not; `path` is where the messages are from, or NULL. */
static int make_prompt(struct talk *t, const char *path)
{
    struct why why;
    const int code = render_talk(t, &why);

    if (code != DONE)
        say(code, "%s%s%s", path ? path : "", path ? ": " : "", why.s);
    return code;
}

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
    int in_thought;
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
static int print_reply(struct printer *p, const struct reply *r)
{
    if (p->thoughts.f && r->thought.n > p->thought) {
        enter_thought(p, 1);
        put_text(&p->thoughts, r->thought.s + p->thought,
                 r->thought.n - p->thought);
        fflush(p->thoughts.f);
        p->thought = r->thought.n;
    }
    if (r->text.n == p->text)
        return DONE;
    enter_thought(p, 0);
    put_text(&p->out, r->text.s + p->text, r->text.n - p->text);
    p->text = r->text.n;
    return flush_output(DONE);
}

/* The calls in a reply, or NULL; what cannot be understood becomes text. */
static struct json *take_calls(struct talk *t)
{
    struct reply *r = &t->r;
    struct json *calls = NULL;

    if (r->calls.n > 0)
        parse_calls(&t->pool, r->calls.s, r->calls.n, r->finish != STOPPED,
                    &calls, &r->text);
    return calls;
}

/* Is some of the answer lost for want of memory? */
static int is_cut(const struct talk *t)
{
    const struct reply *r = &t->r;

    return t->pool.failed || r->raw.failed || r->text.failed ||
           r->thought.failed || r->calls.failed;
}

/* The calls, one line of JSON. */
static void print_calls(struct printer *p, struct talk *t)
{
    const struct json *calls = take_calls(t);
    struct text line = { 0 };

    print_reply(p, &t->r);
    if (calls && calls->first) {
        add_string(&line, t->r.text.n ? "\n" : "");
        add_json(&line, calls);
        put_text(&p->out, line.s, line.failed ? 0 : line.n);
        t->r.calls.failed |= line.failed;
    }
    free(line.s);
}

/* ---- as JSON */

static const char *finish_name(const struct reply *r, const struct json *calls)
{
    return calls && calls->first ? "tool_calls" :
           r->finish == STOPPED ? "stop" :
           r->finish == BROKEN ? "error" :
           r->finish == UNFINISHED ? "interrupted" : "length";
}

/* The calls as OpenAI writes them: the arguments are JSON within a string. */
static void add_calls(struct text *to, const struct json *calls)
{
    const struct json *call = calls ? calls->first : NULL;
    int n = 0;

    member_open(to, "tool_calls", "[");
    for (; call; call = call->next, n++) {
        const struct json *name = json_get(call, "name");
        struct text args = { 0 };
        add_format(to, "%s{\"id\": \"call_%d\", \"type\": \"function\", "
                   "\"function\": {\"name\": ", n ? ", " : "", n);
        add_json_string(to, name->s, name->n);
        add_json(&args, json_get(call, "arguments"));
        member_bytes(to, "arguments", args.s, args.n);
        add_string(to, "}}");
        to->failed |= args.failed;
        free(args.s);
    }
    add_string(to, "]");
}

static void add_usage(struct text *to, const struct reply *r)
{
    add_format(to, ", \"usage\": {\"prompt_tokens\": %d, "
               "\"completion_tokens\": %d, \"total_tokens\": %d, "
               "\"completion_tokens_details\": {\"reasoning_tokens\": %d}}",
               r->q->prompt.n, r->n_made, r->q->prompt.n + r->n_made,
               r->n_thought);
}

static void add_columns(struct text *to, const struct reply *r)
{
    static const char *const name[] = {
        "{\"tokens\": [", ", \"token_logprobs\": [", ", \"top_logprobs\": [",
        ", \"text_offset\": ["
    };

    add_string(to, ", \"logprobs\": ");
    for (int i = 0; i < N_COLUMNS; i++) {
        add_string(to, name[i]);
        add(to, r->column[i].s, r->column[i].n);
        add_string(to, "]");
        to->failed |= r->column[i].failed;
    }
    add_string(to, "}");
}

static void add_logprobs(struct text *to, const struct reply *r)
{
    if (r->q->columns)
        add_columns(to, r);
    else if (r->q->logprobs >= 0) {
        add_string(to, ", \"logprobs\": {\"content\": [");
        add(to, r->logprobs.s, r->logprobs.n);
        add_string(to, "]}");
    }
    if (r->q->prompt_logprobs >= 0 && !(r->q->columns && r->q->echo)) {
        add_string(to, ", \"prompt_logprobs\": [");
        add(to, r->prompt_logprobs.s, r->prompt_logprobs.n);
        add_string(to, "]");
    }
    to->failed |= r->logprobs.failed | r->prompt_logprobs.failed;
}

static void add_timings(struct text *to, const struct reply *r)
{
    const double read = r->read - r->started, wrote = r->ended - r->read;
    const int n = r->q->prompt.n - r->n_reused;

    add_format(to, ", \"timings\": {\"cache_n\": %d, \"prompt_n\": %d, "
               "\"prompt_ms\": %.3f, \"prompt_per_second\": %.3f, ",
               r->n_reused, n, read * 1e3, n / (read + 1e-9));
    add_format(to, "\"predicted_n\": %d, \"predicted_ms\": %.3f, "
               "\"predicted_per_second\": %.3f, ", r->n_made, wrote * 1e3,
               r->n_made / (wrote + 1e-9));
    add_format(to, "\"draft_n\": %d, \"draft_n_accepted\": %d}",
               r->n_guessed, r->n_right);
}

/* Which model said it, and how it can be said again. */
static void add_origin(struct text *to, const struct talk *t)
{
    const struct engine *e = t->e;
    const struct sampling *is = &t->q.sampling;
    size_t n = 0;
    const char *name = lfm2_model_string(e->model, "general.name", &n);

    member_bytes(to, "model", name ? name : "", n);
    add_format(to, ", \"model_hash\": \"%016llx\", \"logits_hash\": "
               "\"%016llx\"", (unsigned long long)lfm2_model_hash(e->model),
               (unsigned long long)t->r.hash);
    add_format(to, ", \"template\": \"%s\", \"date\": ",
               template_names[e->template]);
    add_format(to, uses_date(t) ? "\"%s\"" : "null", e->date);
    add_format(to, ", \"seed\": %llu, \"temperature\": %g, \"top_k\": %d, "
               "\"top_p\": %g, \"min_p\": %g, \"repeat_penalty\": %g",
               (unsigned long long)t->q.seed, is->temp, is->top_k, is->top_p,
               is->min_p, is->repeat);
}

static int print_answer_json(struct talk *t)
{
    struct reply *r = &t->r;
    const struct json *calls = take_calls(t);
    struct text out = { 0 };

    add_string(&out, "{");
    member_bytes(&out, "text", r->text.s ? r->text.s : "", r->text.n);
    member_bytes(&out, "reasoning", r->thought.n ? r->thought.s : NULL,
                 r->thought.n);
    add_calls(&out, calls);
    member_text(&out, "finish_reason", finish_name(r, calls));
    add_usage(&out, r);
    add_logprobs(&out, r);
    add_timings(&out, r);
    add_origin(&out, t);
    add_string(&out, "}\n");
    out.failed |= is_cut(t);
    return flush_output(print_text(&out, "the answer"));
}

/* ---- one answer */

/* With -v, why it is not faster: what had to be read for every token. */
static void print_speed(const struct talk *t)
{
    const struct engine *e = t->e;
    const struct reply *r = &t->r;
    const int n_new = r->q->prompt.n - r->n_reused;
    const double speed = r->n_made / (r->ended - r->read + 1e-9);

    say(DONE, "prompt %d tokens, %d of them new, %.1f tok/s; generated %d "
        "tokens, %.1f tok/s", r->q->prompt.n, n_new,
        n_new / (r->read - r->started + 1e-9), r->n_made, speed);
    if (e->s->verbose) {
        const struct cost cost = count_cost(e->model, e->par.kv_type);
        const double bytes = step_bytes(e->model, &cost, 1, r->ids.n);
        const double steps = speed * (r->n_made - r->n_right) /
                             (r->n_made + 1e-9);
        const double own = anonymous_memory(e->status);
        struct phrase of_it = { "" };
        if (own > 0)
            of_it = phrase(", of it %s not the file's", amount(own, "B").s);
        say(DONE, "a token reads %s of weights and cache, %s/s; memory %s%s",
            amount(bytes, "B").s, amount(bytes * steps, "B").s,
            amount(peak_memory(), "B").s, of_it.s);
        if (r->n_guessed > 0)
            say(DONE, "guessed %d tokens, %d of them right", r->n_guessed,
                r->n_right);
    }
}

/* Answer t->q.prompt.  What was said before an interruption stays. */
static int run_reply(struct talk *t)
{
    struct engine *e = t->e;
    struct reply *const all[] = { &t->r };
    struct printer p = start_printer(e->s);
    struct why why;
    int code = start_reply(e, &t->r, &t->q, 0, &why);

    if (code != DONE)
        return say(code, "%s", why.s);
    if (e->s->verbose)
        say(DONE, "seed %llu", (unsigned long long)t->q.seed);
    running = e->ctx;
    while (code == DONE && t->r.finish == UNFINISHED) {
        code = step(e, all, 1);
        if (code == INTERRUPTED && !interrupted)
            code = DONE;                  /* meant for the answer before     */
        if (code == DONE && !e->s->json)
            code = print_reply(&p, &t->r);
    }
    running = NULL;
    split(&t->r, 1);
    t->r.ended = seconds();
    if (t->r.finish == BROKEN)
        code = say(FAILED, "%s: logits that are not finite", e->s->model);
    if (code != DONE && (t->r.n_made == 0 || code == BAD_FILE))
        return code;
    if (e->s->json) {
        const int printed = print_answer_json(t);
        return printed == DONE ? code : printed;
    }
    print_calls(&p, t);
    enter_thought(&p, 0);
    put_text(&p.out, "", 0);
    putchar('\n');
    if (t->r.finish == BY_CONTEXT)
        say(DONE, "stopped: the context of %d tokens is full", e->par.n_ctx);
    if (e->s->verbose ||
        (isatty(STDERR_FILENO) && !e->s->quiet && !t->is_chat))
        print_speed(t);
    if (is_cut(t))
        code = say(NO_MEMORY, "no memory for the whole answer");
    return flush_output(code);
}

/* \n, \t, \r, \", \' and \\; another \ stays. */
static void unescape(struct text *t)
{
    static const char from[] = "ntr\"'\\", to[] = "\n\t\r\"'\\";
    size_t n = 0;

    for (size_t i = 0; i < t->n; i++, n++) {
        const char *known = t->s[i] == '\\' && t->s[i + 1] ?
                            strchr(from, t->s[i + 1]) : NULL;
        t->s[n] = known ? to[known - from] : t->s[i];
        i += known != NULL;
    }
    t->s[t->n = n] = '\0';
}

static int read_prompt(const struct settings *s, struct text *out)
{
    int code = read_text(s, out);

    if (code == DONE && !s->prompt)
        drop_newline(out);
    if (code == DONE && !s->prompt && !s->file && out->n == 0)
        code = usage("no prompt: standard input is empty");
    if (code == DONE && s->prompt && s->escape)
        unescape(out);
    return code;
}

/* The next thing the user says, put behind what was said before. */
static int ask(struct talk *t, const struct text *question)
{
    const struct settings *s = t->e->s;
    int code = DONE;

    if (s->system && !t->messages->first)
        code = add_message(t, "system", s->system, strlen(s->system));
    if (code == DONE && strlen(question->s) != question->n)
        return say(USAGE, "the prompt has a NUL byte after %zu bytes, expected "
                   "text", strlen(question->s));
    return code != DONE ? code :
           add_message(t, "user", question->s, question->n);
}

/* Fill t->q.prompt from what the options name. */
static int prepare_prompt(struct talk *t)
{
    struct engine *e = t->e;
    const struct settings *s = e->s;
    struct text text = { 0 };
    int code;

    if (s->ids)
        return read_ids(s->ids, &t->q.prompt);
    code = s->messages ? DONE : read_prompt(s, &text);
    if (code == DONE && e->template == TEMPLATE_NONE) {
        add(&t->prompt.text, t->said.s ? t->said.s : "", t->said.n);
        add(&t->prompt.text, text.s, text.n);
        code = t->prompt.text.failed ?
               say(NO_MEMORY, "no memory for the prompt") :
               encode_plain(s, e->words, t->prompt.text.s, t->prompt.text.n,
                            &t->q.prompt);
        free(text.s);
        return code;
    }
    if (code == DONE && !s->messages)
        code = ask(t, &text);
    if (code == DONE)
        code = make_prompt(t, s->messages);
    free(text.s);
    return code;
}

static int write_logits(struct talk *t)
{
    const struct engine *e = t->e;
    const size_t n_vocab = (size_t)lfm2_model_config(e->model)->n_vocab;
    FILE *f = create_file(e->s->logits);
    int code = lock_sandbox(e->s, 0);

    running = e->ctx;
    for (int at = 0, n; f && code == DONE && at < t->q.prompt.n; at += n) {
        n = t->q.prompt.n - at < LOGITS_CHUNK ? t->q.prompt.n - at :
            LOGITS_CHUNK;
        code = forward(e, &(lfm2_span){ 0, t->q.prompt.id + at, n, n }, 1);
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
    if (t->e->s->dump_prompt)
        show_text(&t->prompt.text);
    for (int i = 0; t->e->s->dump_tokens && i < t->q.prompt.n; i++)
        printf("%ld%s", (long)t->q.prompt.id[i],
               i + 1 < t->q.prompt.n ? " " : "\n");
    return DONE;
}

static void free_talk(struct talk *t)
{
    free_reply(&t->r);
    free_request(&t->q);
    rendered_free(&t->prompt);
    pool_free(&t->pool);
    free(t->said.s);
}

static void drop_last(struct talk *t)
{
    struct json **m = &t->messages->first, *before = NULL;

    for (; *m && (*m)->next; m = &(*m)->next)
        before = *m;
    *m = NULL;
    t->messages->last = before;
}

/* After an answer, its text is a message of the conversation, together with
 * what the prompt had of it.  None is one only if the model wanted it so. */
static int keep_answer(struct talk *t)
{
    const struct rendered *p = &t->prompt;
    const char *from = answer_of(p);
    struct text whole = { 0 };
    int code;

    if (t->r.n_made == 0 && t->r.finish != STOPPED)
        return DONE;
    if (!t->grown && flag_of(t->form, "continue_final_message", 0))
        drop_last(t);
    add(&whole, from, (size_t)(p->text.s + p->text.n - from));
    add(&whole, t->r.raw.s ? t->r.raw.s : "", t->r.raw.n);
    code = whole.failed ? say(NO_MEMORY, "no memory for the answer") :
           add_message(t, "assistant", whole.s, whole.n);
    free(whole.s);
    return code;
}

/* ------------------------------------------------------------ 14. Sessions
 *
 * What --session keeps between runs, all little-endian:
 *
 *     "LFM2CHT", or "LFM2TXT" for plain text | u8 version, '1'
 *     u64 n | what was said: n bytes of JSON, {"messages": [...]}, or of text
 *     u64 n | n token ids in the cache, u32
 *     u64 hash of all before (FNV-1a)
 *     u64 n | the sequence, as lfm2_seq_save() writes it, with its own check
 *
 * If only the sequence does not fit, as another model's, what was said is read
 * again.  With any other fault the conversation begins anew.  Either way the
 * file is replaced at the end, unless it is no session of this kind: it could
 * be anything. */

static const char session_magic[2][9] = { "LFM2CHT1", "LFM2TXT1" };

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

/* The parts of a session. */
struct session { struct piece said, ids, state; };

/* Why they cannot be told apart, or NULL. */
static const char *open_session(const struct text *file, int plain,
                                struct session *out)
{
    struct piece from = { file->s, file->n };
    uint64_t hash;
    size_t n;

    if (file->n < 8 || memcmp(file->s, session_magic[plain], 7) != 0)
        return plain ? "it is no session of plain text, and will not be "
               "replaced" : "it is no session of a conversation, and will not "
               "be replaced";
    if (file->s[7] != session_magic[plain][7])
        return "it is a session of another version of this program";
    from.s += 8, from.n -= 8;
    if (take_bytes(&from, 1, &out->said) != 0 ||
        take_bytes(&from, 4, &out->ids) != 0)
        return "it is cut or damaged";
    n = file->n - from.n;
    if (take_le(&from, 8, &hash) != 0 ||
        hash != hash_bytes(HASH_START, file->s, n) ||
        take_bytes(&from, 1, &out->state) != 0 || from.n != 0)
        return "it is cut or damaged";
    return NULL;
}

/* What was said: messages, or a text to go on with.  The messages of --messages
 * are all there are. */
static int take_talk(struct talk *t, const struct piece *said)
{
    struct json *whole, *messages;
    struct why why;

    if (t->e->template == TEMPLATE_NONE) {
        add(&t->said, said->s, said->n);
        return t->said.failed ? -1 : 0;
    }
    if (json_parse(&t->pool, said->s, said->n, &whole, &why) != DONE)
        return -1;
    messages = json_get(whole, "messages");
    if (!json_is(messages, JSON_ARRAY))
        return -1;
    if (!t->e->s->messages)
        t->messages = messages;
    return 0;
}

/* The ids of a session, in place of what was cached. */
static int take_ids(struct engine *e, struct piece *from)
{
    const int n_vocab = lfm2_model_config(e->model)->n_vocab;
    struct ids *to = &e->cached[0];
    uint64_t id;

    to->n = 0;
    if (from->n / 4 != (size_t)lfm2_seq_len(e->ctx, 0))
        return -1;
    while (take_le(from, 4, &id) == 0) {
        if (id >= (uint64_t)n_vocab)
            return -1;
        to->id[to->n++] = (int32_t)id;
    }
    return 0;
}

/* Why there is nothing in the cache, or NULL. */
static const char *take_state(struct engine *e, struct session *from,
                              lfm2_error *err)
{
    if (lfm2_seq_load(e->ctx, 0, from->state.s, from->state.n, err) != LFM2_OK)
        return err->msg;
    if (take_ids(e, &from->ids) == 0)
        return NULL;
    lfm2_seq_trim(e->ctx, 0, 0);
    e->cached[0].n = 0;
    return "its tokens are not those of its state";
}

static void restore(struct talk *t, const struct text *file)
{
    const char *path = t->e->s->session;
    const int plain = t->e->template == TEMPLATE_NONE;
    struct session parts;
    const char *why_not = open_session(file, plain, &parts);
    lfm2_error err;

    t->keeps_session = file->n >= 7 &&
                       memcmp(file->s, session_magic[plain], 7) == 0;
    if (!why_not && take_talk(t, &parts.said) != 0)
        why_not = "it holds no conversation";
    if (why_not) {
        say(DONE, "%s: not used, the conversation begins anew: %s", path,
            why_not);
        return;
    }
    why_not = take_state(t->e, &parts, &err);
    if (why_not)
        say(DONE, "%s: what was said is read again: %s", path, why_not);
    else if (t->e->s->verbose)
        say(DONE, "%s: %d tokens", path, t->e->cached[0].n);
}

/* A file that is not there yet is the beginning of a session, if it can be kept
 * in its directory: better told now than when all has been said. */
static int begin_session(const char *path)
{
    struct text dir = { 0 };
    int code = DONE;

    add_directory(&dir, path);
    if (!dir.failed && access(dir.s, W_OK | X_OK) != 0)
        code = say(BAD_FILE, "%s: cannot be kept: %s", path, strerror(errno));
    free(dir.s);
    return code;
}

/* Go on where the file left off.  Only a file that cannot be read at all is an
 * error. */
static int load_session(struct talk *t)
{
    const char *path = t->e->s->session;
    struct text file = { 0 };
    int code;

    t->keeps_session = 1;
    if (access(path, F_OK) != 0 && errno == ENOENT)
        return begin_session(path);
    code = read_file(path, &file);
    if (code == DONE && file.n > 0)
        restore(t, &file);
    if (t->pool.failed || t->said.failed)             /* keep what it holds  */
        code = say(NO_MEMORY, "%s: no memory for its %zu bytes", path, file.n);
    if (t->e->s->system && t->messages && t->messages->first)
        say(DONE, "%s: goes on as it began, so -sys is not used", path);
    free(file.s);
    return code;
}

static void add_talk(struct text *to, const struct json *messages)
{
    add_string(to, "{\"messages\": ");
    add_json(to, messages);
    add_string(to, "}\n");
}

/* All of a session but the state. */
static void write_talk(struct talk *t, struct text *out)
{
    const struct ids *ids = &t->e->cached[0];
    const int plain = t->e->template == TEMPLATE_NONE;
    struct text json = { 0 };
    const struct text *said = plain ? &t->said : &json;

    if (!plain)
        add_talk(&json, t->messages);
    add_string(out, session_magic[plain]);
    add_le(out, said->n, 8);
    add(out, said->s, said->n);
    add_le(out, (uint64_t)ids->n, 8);
    for (int i = 0; i < ids->n; i++)
        add_le(out, (uint32_t)ids->id[i], 4);
    add_le(out, hash_bytes(HASH_START, out->s, out->n), 8);
    out->failed |= said->failed;
    free(json.s);
}

static int write_session(struct talk *t, FILE *f)
{
    const uint64_t n = lfm2_seq_state_size(t->e->ctx, 0);
    struct text head = { 0 };
    void *state = n <= SIZE_MAX ? malloc((size_t)n) : NULL;
    lfm2_error err;
    int good;

    write_talk(t, &head);
    add_le(&head, n, 8);
    good = state && !head.failed &&
           lfm2_seq_save(t->e->ctx, 0, state, n, &err) == LFM2_OK;
    if (good) {
        fwrite(head.s, 1, head.n, f);
        fwrite(state, 1, (size_t)n, f);
    }
    free(head.s);
    free(state);
    return good ? DONE : say(NO_MEMORY, "no memory to keep the session");
}

/* A new file beside this one, for the owner alone if there is none yet. */
static FILE *create_beside(const char *path, struct text *name)
{
    struct stat old;
    FILE *f;
    int fd;

    add_string(name, path);
    add_string(name, ".XXXXXX");
    if (name->failed)
        return NULL;
    fd = mkstemp(name->s);
    if (fd >= 0 && stat(path, &old) == 0)
        fchmod(fd, old.st_mode & 0777);   /* if not, it stays private        */
    f = fd >= 0 ? fdopen(fd, "wb") : NULL;
    if (fd >= 0 && !f) {
        remove(name->s);
        close(fd);
    }
    return f;
}

/* Whole or not at all: written beside the file, then put in its place. */
static int save_session(struct talk *t)
{
    const char *path = t->e->s->session;
    struct text temporary = { 0 };
    FILE *f = NULL;
    int code;

    if (!path || !t->keeps_session)
        return DONE;
    f = create_beside(path, &temporary);
    if (temporary.failed)
        code = say(NO_MEMORY, "%s: cannot be kept: no memory", path);
    else if (!f)
        code = say(BAD_FILE, "%s: cannot be kept: %s", path, strerror(errno));
    else {
        code = write_session(t, f);
        if (code == DONE && (fflush(f) != 0 || fsync(fileno(f)) != 0))
            code = say(BAD_FILE, "%s: %s", path, strerror(errno));
        code = finish_file(f, path, code);
        if (code == DONE && rename(temporary.s, path) != 0)
            code = say(BAD_FILE, "%s: %s", path, strerror(errno));
        if (code != DONE)
            remove(temporary.s);
    }
    free(temporary.s);
    return code;
}

/* One question, one answer, and the session for the next. */
static int answer_once(struct talk *t)
{
    int code = run_reply(t), kept;

    if (!t->e->s->session || (code != DONE && code != INTERRUPTED) ||
        (code == INTERRUPTED && t->r.n_made == 0))
        return code;
    if (t->e->template == TEMPLATE_NONE) {
        t->said.n = 0;
        add(&t->said, t->prompt.text.s, t->prompt.text.n);
        add(&t->said, t->r.raw.s, t->r.raw.n);
    } else if (keep_answer(t) != DONE)
        return NO_MEMORY;
    kept = save_session(t);
    return kept == DONE ? code : kept;
}

/* ----------------------------------------------------------------- 15. Chat
 *
 * Line by line, at a terminal or, with -cnv, from a pipe, where no prompt is
 * shown.  Each turn renders the whole conversation; what the cache has of it is
 * not read again. */

static const char chat_help[] =
    "Type a message, and its answer follows.  \"\"\" begins and ends one of\n"
    "several lines, a \\ at its end goes on with the next.  Ctrl-C stops an\n"
    "answer, a second one leaves; so does Ctrl-D.\n"
    "  /help         this text\n"
    "  /clear        forget the conversation\n"
    "  /regen        answer the last message once more\n"
    "  /system TEXT  what the model is to be\n"
    "  /save FILE    write the conversation as JSON\n"
    "  /load FILE    go on with one\n"
    "  /stats        tokens, speed and memory\n"
    "  /quit         leave\n";

/* A line without its end, behind what is in `out`.  Returns 0 at the end of the
 * input, and -1 after a signal that ends the chat. */
static int read_line(struct text *out, int shows, const char *prompt)
{
    const size_t had = out->n;
    int c;

    for (;;) {
        if (shows)
            fprintf(stderr, "%s", prompt);
        errno = 0;
        while ((c = getchar()) != EOF && c != '\n')
            add(out, &(char){ (char)c }, 1);
        add(out, "", 0);
        if (c != EOF || errno != EINTR)
            break;
        if (!shows || last_signal != SIGINT)
            return -1;
        clearerr(stdin);
        out->n = had;
        fprintf(stderr, "\n(Ctrl-C once more, or Ctrl-D, leaves)\n");
    }
    if (c == EOF && shows)
        fputc('\n', stderr);
    return c != EOF || out->n > had;
}

static int ends_with(const struct text *t, const char *word)
{
    const size_t n = strlen(word);

    return t->n >= n && memcmp(t->s + t->n - n, word, n) == 0;
}

/* A message, of one line or several.  Returns 0 at the end of the input. */
static int read_message(struct text *out, int shows)
{
    static const char quotes[] = "\"\"\"";
    const size_t len = strlen(quotes);
    int quoted, got;

    out->n = 0;
    if (read_line(out, shows, "> ") <= 0)
        return 0;
    quoted = out->n >= len && memcmp(out->s, quotes, len) == 0;
    if (quoted)
        memmove(out->s, out->s + len, (out->n -= len) + 1);
    while (quoted ? !ends_with(out, quotes) : ends_with(out, "\\")) {
        out->n -= !quoted;
        if (out->n > 0 || !quoted)        /* not after the quotes            */
            add(out, "\n", 1);
        if ((got = read_line(out, shows, ". ")) <= 0)
            return got == 0;
    }
    if (quoted)
        out->n -= len;
    if (quoted && ends_with(out, "\n"))
        out->n--;
    add(out, "", 0);                      /* the NUL                         */
    return 1;
}

/* The last message, if it is of this role. */
static const struct json *last_message(const struct talk *t, const char *role)
{
    const struct json *m = t->messages->last;
    const char *is = m ? role_of(m) : NULL;

    return is && strcmp(is, role) == 0 ? m : NULL;
}

/* A conversation of its own, so that what --messages said of it is gone. */
static void forget(struct talk *t)
{
    t->messages = json_array(&t->pool);
    t->form = NULL;
    t->grown = 1;
}

/* Answer the messages so far.  A turn that cannot be answered is taken back.
 * Each has a seed of its own. */
static int answer_turn(struct talk *t)
{
    int code = make_prompt(t, NULL);

    if (code == DONE) {
        free_reply(&t->r);
        interrupted = 0;
        code = run_reply(t);
    }
    if (code == TOO_LONG || code == USAGE) {
        drop_last(t);
        return DONE;
    }
    if (code != DONE && (code != INTERRUPTED || last_signal != SIGINT))
        return code;
    t->q.seed = (t->q.seed + 1) & INT64_MAX;
    code = keep_answer(t);
    return code == DONE ? save_session(t) : code;
}

/* The new first message is not there if it has no text. */
static int set_system(struct talk *t, const char *text)
{
    const struct json *m = t->messages->first;
    const char *role = m ? role_of(m) : NULL;

    if (role && strcmp(role, "system") == 0)
        m = m->next;
    t->messages = json_array(&t->pool);
    if (t->pool.failed || (text[0] &&
        add_message(t, "system", text, strlen(text)) != DONE))
        return NO_MEMORY;
    for (; m; m = m->next)
        json_append(&t->pool, t->messages, m);
    return t->pool.failed ? NO_MEMORY : DONE;
}

static int regenerate(struct talk *t)
{
    if (last_message(t, "assistant"))
        drop_last(t);
    if (!last_message(t, "user")) {
        say(DONE, "there is no message to answer");
        return DONE;
    }
    return answer_turn(t);
}

/* Who is told that a file cannot be opened should hear what may be why. */
static int blame_sandbox(const struct talk *t)
{
    const int sandbox = t->e->s->sandbox;

    if (sandbox == SANDBOX_OFF || (errno != EACCES && errno != EPERM))
        return DONE;
    return say(DONE, "in this sandbox a chat opens %s; --sandbox off is "
               "without one", sandbox == SANDBOX_REQUIRE ? "no files" :
               "files in the directory it began in and temporary ones");
}

static int save_talk(struct talk *t, const char *path)
{
    struct text out = { 0 };
    FILE *f = path[0] ? create_file(path) : NULL;

    if (!f)
        return path[0] ? blame_sandbox(t) : say(DONE, "/save needs a file");
    add_talk(&out, t->messages);
    if (!out.failed)
        fwrite(out.s, 1, out.n, f);
    if (finish_file(f, path, out.failed ? NO_MEMORY : DONE) == DONE)
        say(DONE, "%s: saved", path);
    free(out.s);
    return out.failed ? NO_MEMORY : DONE;
}

/* A file that is no conversation leaves the one there is. */
static int load_talk(struct talk *t, const char *path)
{
    const struct talk had = *t;
    struct json *whole, *list;

    if (!path[0])
        return say(DONE, "/load needs a file");
    if (read_list(t, path, "messages", &whole, &list) != DONE)
        return blame_sandbox(t);
    forget(t);
    t->messages = list;
    if (list->first && make_prompt(t, path) != DONE) {
        t->messages = had.messages;
        t->form = had.form;
        t->grown = had.grown;
        return DONE;
    }
    return say(DONE, "%s: %d messages", path, list->n_members);
}

static void print_stats(struct talk *t)
{
    const struct engine *e = t->e;

    say(DONE, "%d of %d tokens in the context", e->cached[0].n, e->par.n_ctx);
    print_settings(t->e);
    if (t->r.q)
        print_speed(t);
}

/* A line that begins with / .  Returns -1 to leave. */
static int obey(struct talk *t, const char *line)
{
    const size_t n = strcspn(line, " ");
    const char *rest = line + n + strspn(line + n, " ");
    const char *const word[] = {
        "/help", "/clear", "/regen", "/system", "/save", "/load", "/stats",
        "/quit", "/exit", "/bye"
    };
    int i = 0;

    while (i < 10 && (strlen(word[i]) != n || memcmp(line, word[i], n) != 0))
        i++;
    errno = 0;
    switch (i) {
    case 0: fputs(chat_help, stderr); return DONE;
    case 1: forget(t); return t->pool.failed ? NO_MEMORY : DONE;
    case 2: return regenerate(t);
    case 3: return set_system(t, rest);
    case 4: return save_talk(t, rest);
    case 5: return load_talk(t, rest);
    case 6: print_stats(t); return DONE;
    case 10: say(DONE, "%.*s: no such command; /help lists them", (int)n,
                 line); return DONE;
    default: return -1;
    }
}

/* What there is to answer before anything is typed: the options' prompt, or
 * messages that do not end with an answer. */
static int answer_first(struct talk *t, struct text *line)
{
    const struct settings *s = t->e->s;
    int code;

    if (s->prompt || s->file) {
        code = read_prompt(s, line);
        if (code == DONE)
            code = ask(t, line);
        return code == DONE ? answer_turn(t) : code;
    }
    if (!s->messages)
        return DONE;
    code = make_prompt(t, s->messages);
    if (code != DONE || (last_message(t, "assistant") &&
                         !flag_of(t->form, "continue_final_message", 0)))
        return code;
    return answer_turn(t);
}

static int chat(struct talk *t)
{
    const int shows = isatty(STDIN_FILENO) && !t->e->s->quiet;
    struct text line = { 0 };
    int code;

    if (shows)
        fprintf(stderr, "/help tells what there is beside talking; Ctrl-D "
                "leaves.\n");
    t->is_chat = 1;
    code = answer_first(t, &line);
    while (code == DONE && read_message(&line, shows)) {
        if (line.failed)
            code = say(NO_MEMORY, "no memory for the message");
        else if (line.n == 0)
            continue;
        else if (line.s[0] == '/')
            code = obey(t, line.s);
        else if ((code = ask(t, &line)) == DONE)
            code = answer_turn(t);
        else if (code == USAGE)
            code = DONE;                  /* only this message is wrong      */
    }
    free(line.s);
    if (code == DONE && interrupted && (!shows || last_signal != SIGINT))
        return INTERRUPTED;
    return code < 0 ? DONE : code;
}

/* The answer, the answers, or what else there is to see. */
static int answer(struct talk *t)
{
    const struct settings *s = t->e->s;
    int code = t->e->ctx ? DONE : open_context(t->e);

    catch_interrupt();
    if (code == DONE)
        code = open_trace(t->e);
    if (code == DONE && !s->logits)
        code = lock_sandbox(s, t->e->chats);
    if (code == DONE)
        code = s->logits ? write_logits(t) : t->e->chats ? chat(t) :
               answer_once(t);
    code = close_trace(t->e, code);
    signal(SIGINT, SIG_DFL);
    return code;
}

/* Anything that answers with a model, but --batch. */
static int work_on_model(const struct settings *s)
{
    struct engine e = { .s = s };
    struct talk t = { .e = &e };
    const int dumps = s->dump_prompt || s->dump_tokens;
    const int chats = s->interactive || (!s->prompt && !s->file && !s->ids &&
                      !s->messages && isatty(STDIN_FILENO) && !s->logits &&
                      !dumps);
    int code;

    e.chats = chats;
    code = open_engine(&e);
    if (code == DONE && chats && (e.template == TEMPLATE_NONE || s->json))
        code = usage("no prompt given, and no chat %s", s->json ? "in JSON" :
                     "without a template");
    if (code == DONE)
        code = make_request(&e, &t.q);
    if (code == DONE)
        code = read_talk(&t);
    if (code == DONE && s->session)
        code = open_context(&e);
    if (code == DONE && s->session)
        code = load_session(&t);
    if (code == DONE && !chats)
        code = prepare_prompt(&t);
    if (code == DONE)
        code = dumps ? dump_prompt(&t) : answer(&t);
    free_talk(&t);
    close_engine(&e);
    return code;
}

/* -------------------------------------------------------------- 16. --batch
 *
 * JSON lines in, JSON lines out, in the same order.  A line is an OpenAI batch
 * line {"custom_id", "method", "url", "body"} or a body alone.  Up to
 * --parallel of them are answered at once: one forward moves all of them on, so
 * the weights are read once for all.  A finished one makes room at once; a
 * prompt that begins like a text in some cache is read from there on.  What is
 * answered depends on the line alone: bits do not depend on neighbours, and the
 * seed comes from the line unless it names one. */

enum { MAX_LINE = 1 << 26, AHEAD = 4 };   /* AHEAD: lines read per sequence  */

enum state { WAITING, ACTIVE, FINISHED };

struct job {
    struct talk t;
    enum state state;
    long long line;                       /* of the input, from 1            */
    size_t bytes;                         /* of it                           */
    int completion;                       /* "prompt", not "messages"        */
    uint64_t hash;                        /* of what was asked               */
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
    struct job *job;                      /* ring of [n_ring]                */
    int n_ring, first, n_jobs, n_active;
    struct reply **active;                /* [n_seq]                         */
    char *busy;                           /* [n_seq]: who answers            */
    struct known *known;                  /* [n_known], sorted               */
    int n_known;
    int shard, n_shards;
    int told;                             /* of a member that is not known   */
    long long done, failed, skipped, failed_before;
    double tokens, reused, guessed, right, bytes, size, started, beat;
};

/* ---- what a line asks for */

#define OF(field) offsetof(struct request, field)

static const struct body_number {
    const char *key;
    int whole;
    size_t at;
    double min, max;
} body_numbers[] = {
    { "temperature", 0, OF(sampling.temp), 0, 100 },
    { "top_p", 0, OF(sampling.top_p), 0, 1 },
    { "min_p", 0, OF(sampling.min_p), 0, 1 },
    { "top_k", 1, OF(sampling.top_k), -1, 1 << 30 },
    { "repeat_penalty", 0, OF(sampling.repeat), 0.01, 100 },
    { "repetition_penalty", 0, OF(sampling.repeat), 0.01, 100 },
    { "presence_penalty", 0, OF(presence), -100, 100 },
    { "frequency_penalty", 0, OF(frequency), -100, 100 },
    { "max_tokens", 1, OF(limit), 0, 1 << 30 },
    { "max_completion_tokens", 1, OF(limit), 0, 1 << 30 },
    { "thinking_budget", 1, OF(think_budget), -1, 1 << 30 },
    { "top_logprobs", 1, OF(logprobs), 0, MAX_LOGPROBS },
    { "prompt_logprobs", 1, OF(prompt_logprobs), 0, MAX_LOGPROBS },
};

/* What is read elsewhere, or means nothing to us. */
static const char *const body_others[] = {
    "custom_id", "messages", "prompt", "tools", "model", "seed", "stop",
    "logprobs", "echo", "ignore_eos", "logit_bias", "n", "stream",
    "stream_options", "user", "metadata", "store", "response_format",
    "tool_choice", "parallel_tool_calls", "add_generation_prompt",
    "continue_final_message", "chat_template_kwargs", "keep_past_thinking",
    "preserve_thinking", "service_tier"
};

static int read_numbers(struct job *j, const struct json *body,
                        struct why *why)
{
    for (size_t i = 0; i < sizeof body_numbers / sizeof *body_numbers; i++) {
        const struct body_number *n = &body_numbers[i];
        const struct json *x = given(body, n->key);
        void *slot = (char *)&j->t.q + n->at;
        double value;
        if (!x)
            continue;
        if (json_double(x, &value) != 0 || !(value >= n->min) ||
            !(value <= n->max) || (n->whole && value != floor(value)))
            return because(why, USAGE, "\"%s\": expected a %snumber from %g to "
                           "%g", n->key, n->whole ? "whole " : "", n->min,
                           n->max);
        if (n->whole)
            *(int *)slot = (int)value;
        else
            *(double *)slot = value;
    }
    if (j->t.q.sampling.top_k < 0)
        j->t.q.sampling.top_k = 0;
    return DONE;
}

static int add_stop_json(struct request *q, const struct json *x,
                         struct why *why)
{
    if (x->type != JSON_STRING || x->n == 0)
        return because(why, USAGE, "\"stop\": expected strings that are not "
                       "empty");
    return add_stop(q, x->s, x->n) == 0 ? DONE :
           because(why, USAGE, "\"stop\": expected at most %d", MAX_STOPS);
}

static int read_stops(struct job *j, const struct json *body, struct why *why)
{
    const struct json *x = given(body, "stop");
    int code = DONE;

    if (x && x->type == JSON_STRING)
        return add_stop_json(&j->t.q, x, why);
    if (x && x->type != JSON_ARRAY)
        return because(why, USAGE, "\"stop\": expected a string or an array");
    for (x = x ? x->first : NULL; x && code == DONE; x = x->next)
        code = add_stop_json(&j->t.q, x, why);
    return code;
}

/* {"id": how much its logit is raised, ...} */
static int read_bias(struct job *j, const struct json *body, struct why *why)
{
    const struct json *x = given(body, "logit_bias");
    const int n_vocab = lfm2_model_config(j->t.e->model)->n_vocab;
    const int n = x ? x->n_members : 0;
    struct request *q = &j->t.q;

    if (x && x->type != JSON_OBJECT)
        return because(why, USAGE, "\"logit_bias\": expected an object");
    q->bias = n ? calloc((size_t)n, sizeof *q->bias) : NULL;
    if (n && !q->bias)
        return because(why, NO_MEMORY, "no memory for \"logit_bias\"");
    for (const struct json *c = x ? x->first : NULL; c; c = c->next) {
        char *end;
        const long id = strtol(c->key, &end, 10);
        double by;
        if (end == c->key || *end || id < 0 || id >= n_vocab ||
            json_double(c, &by) != 0 || !(by >= -1000 && by <= 1000))
            return because(why, USAGE, "\"logit_bias\": \"%.40s\", expected "
                           "token ids from 0 to %d, and numbers from -1000 to "
                           "1000", c->key, n_vocab - 1);
        q->bias[q->n_bias++] = (struct bias){ (int32_t)id, (float)by };
    }
    return DONE;
}

static int is_word(const struct json *x, const char *word)
{
    return x && x->type == JSON_STRING && strcmp(x->s, word) == 0;
}

/* Refuse what would be answered wrongly. */
static int refuse_others(const struct json *body, struct why *why)
{
    const struct json *n = given(body, "n"),
                      *stream = given(body, "stream"),
                      *format = given(body, "response_format"),
                      *choice = given(body, "tool_choice");
    double x = 1;

    if (n && (json_double(n, &x) != 0 || x != 1))
        return because(why, USAGE, "\"n\": expected 1");
    if (stream && stream->type == JSON_TRUE)
        return because(why, USAGE, "\"stream\": expected false");
    if (format && !is_word(json_get(format, "type"), "text"))
        return because(why, USAGE, "\"response_format\": expected the type "
                       "\"text\"");
    if (choice && !is_word(choice, "auto") && !is_word(choice, "none"))
        return because(why, USAGE, "\"tool_choice\": expected \"auto\" or "
                       "\"none\"");
    return DONE;
}

/* A member that has no meaning here is told of once. */
static void tell_unknown(struct batch *b, const struct job *j,
                         const struct json *body)
{
    const size_t n_others = sizeof body_others / sizeof *body_others;
    const size_t n_numbers = sizeof body_numbers / sizeof *body_numbers;

    for (const struct json *c = body->first; c && !b->told; c = c->next) {
        int known = 0;
        for (size_t i = 0; i < n_others; i++)
            known |= strcmp(c->key, body_others[i]) == 0;
        for (size_t i = 0; i < n_numbers; i++)
            known |= strcmp(c->key, body_numbers[i].key) == 0;
        b->told = !known;
        if (!known && !b->e.s->quiet)
            say(DONE, "line %lld: \"%.60s\" is ignored, here and below",
                j->line, c->key);
    }
}

/* The same line, the same seed; another with another -s. */
static uint64_t line_seed(const struct job *j)
{
    const long long given = j->t.e->s->seed;

    return j->hash ^ (given < 0 ? 0 : (uint64_t)given);
}

/* How a line wants to be answered: by the options, then by its own members. */
static int read_wishes(struct job *j, const struct json *body, struct why *why)
{
    struct request *q = &j->t.q;
    const struct json *x;
    long long seed;
    int code = make_request(j->t.e, q);

    q->seed = line_seed(j);
    if (code == DONE)
        code = read_numbers(j, body, why);
    if (code == DONE)
        code = read_stops(j, body, why);
    if (code == DONE)
        code = read_bias(j, body, why);
    if (code == DONE)
        code = refuse_others(body, why);
    if (code != DONE)
        return code;
    if (q->sampling.temp == 0 && !given(body, "repetition_penalty") &&
        !given(body, "repeat_penalty") && j->t.e->s->repeat == UNSET)
        q->sampling.repeat = 1;
    if ((x = given(body, "seed"))) {
        if (json_int(x, INT64_MIN, INT64_MAX, &seed) != 0)
            return because(why, USAGE, "\"seed\": expected a whole number");
        q->seed = (uint64_t)seed;
    }
    q->ignore_eos |= flag_of(body, "ignore_eos", 0);
    q->echo = flag_of(body, "echo", 0);
    return DONE;
}

/* "logprobs" is true or false beside messages, a number beside a prompt; with
 * "echo" those of the prompt are wanted, too. */
static int read_logprobs(struct job *j, const struct json *body,
                         struct why *why)
{
    const struct json *x = given(body, "logprobs");
    struct request *q = &j->t.q;
    double k;

    if (x && x->type == JSON_TRUE)
        q->logprobs = q->logprobs < 0 ? 0 : q->logprobs;
    else if (x && x->type == JSON_FALSE)
        q->logprobs = -1;
    else if (x && (json_double(x, &k) != 0 || k != floor(k) || k < 0 ||
                   k > MAX_LOGPROBS))
        return because(why, USAGE, "\"logprobs\": expected true, false or a "
                       "whole number from 0 to %d", MAX_LOGPROBS);
    else if (x)
        q->logprobs = (int)k;
    q->columns = j->completion && q->logprobs >= 0;
    if (q->echo && q->logprobs >= 0 && q->prompt_logprobs < 0)
        q->prompt_logprobs = q->logprobs;
    return DONE;
}

/* ---- from a line to a prompt */

/* "prompt": a text, or the ids of its tokens. */
static int read_body_prompt(struct job *j, const struct json *prompt,
                            struct why *why)
{
    const struct engine *e = j->t.e;
    struct ids *ids = &j->t.q.prompt;
    long long id;

    j->t.q.split = 0;
    if (j->t.q.limit < 0 && e->s->predict == UNSET)
        j->t.q.limit = RAW_LEN;
    if (prompt->type == JSON_STRING)
        return encode_plain(e->s, e->words, prompt->s, prompt->n, ids);
    if (prompt->type != JSON_ARRAY)
        return because(why, USAGE, "\"prompt\": expected a string, or an array "
                       "of token ids");
    if (alloc_ids(ids, (size_t)prompt->n_members + 1) != DONE)
        return because(why, NO_MEMORY, "no memory for the prompt");
    for (const struct json *c = prompt->first; c; c = c->next) {
        if (json_int(c, 0, INT32_MAX, &id) != 0)
            return because(why, USAGE, "\"prompt\": expected token ids");
        ids->id[ids->n++] = (int32_t)id;
    }
    return DONE;
}

static int read_body(struct batch *b, struct job *j, const struct json *body,
                     struct why *why)
{
    const struct json *messages = given(body, "messages");
    const struct json *prompt = given(body, "prompt");
    int code;

    if (body->type != JSON_OBJECT)
        return because(why, USAGE, "expected a JSON object as the request");
    if (!messages == !prompt)
        return because(why, USAGE, "expected either \"messages\" or "
                       "\"prompt\"");
    j->completion = prompt != NULL;
    code = read_wishes(j, body, why);
    if (code == DONE)
        code = read_logprobs(j, body, why);
    tell_unknown(b, j, body);
    if (code == DONE && prompt)
        return read_body_prompt(j, prompt, why);
    if (code != DONE)
        return code;
    if (j->t.e->template == TEMPLATE_NONE)
        return because(why, USAGE, "the model has no chat template: expected "
                       "\"prompt\", or --template");
    j->t.form = body;
    j->t.messages = (struct json *)(uintptr_t)messages;
    if (!is_word(given(body, "tool_choice"), "none"))
        j->t.tools = given(body, "tools");
    return render_talk(&j->t, why);
}

/* OpenAI's envelope around a body, or a body alone. */
static int read_envelope(struct batch *b, struct job *j,
                         const struct json *line, struct why *why)
{
    const struct json *id = given(line, "custom_id");
    const struct json *body = given(line, "body");
    const struct json *method = given(line, "method");
    const struct json *url = given(line, "url");
    struct text asked = { 0 };

    if (id && id->type != JSON_STRING)
        return because(why, USAGE, "\"custom_id\": expected a string");
    if (id) {
        j->id.n = 0;
        add(&j->id, id->s, id->n);
        add_json(&asked, id);
    }
    add_json(&asked, body ? body : line);
    j->hash = hash_bytes(HASH_START, asked.s ? asked.s : "", asked.n);
    free(asked.s);
    if (body && method && !is_word(method, "POST"))
        return because(why, USAGE, "\"method\": expected \"POST\"");
    if (body && url && !is_word(url, "/v1/chat/completions") &&
        !is_word(url, "/v1/completions"))
        return because(why, USAGE, "\"url\": expected \"/v1/chat/completions\" "
                       "or \"/v1/completions\"");
    return read_body(b, j, body ? body : line, why);
}

/* With --batch-raw a line is a question. */
static int read_raw(struct job *j, const char *s, size_t n, struct why *why)
{
    struct talk *t = &j->t;
    const struct text text = { (char *)(uintptr_t)s, n, 0, 0 };
    int code = make_request(t->e, &t->q);

    t->q.seed = line_seed(j);
    j->completion = t->e->template == TEMPLATE_NONE;
    if (code == DONE && j->completion)
        return encode_plain(t->e->s, t->e->words, s, n, &t->q.prompt);
    t->messages = json_array(&t->pool);
    if (memchr(s, '\0', n))
        return because(why, USAGE, "a NUL byte, expected text");
    if (code == DONE)
        code = ask(t, &text);
    return code == DONE ? render_talk(t, why) : code;
}

/* How every line of output begins. */
static const char output_start[] = "{\"id\": \"batch_req_";

static void begin_output(struct job *j)
{
    add_string(&j->out, output_start);
    add_format(&j->out, "%016llx\", \"custom_id\": ",
               (unsigned long long)j->hash);
    add_json_string(&j->out, j->id.s ? j->id.s : "", j->id.n);
}

static void finish_error(struct batch *b, struct job *j, int code,
                         const char *why)
{
    static const char *const name[] = {
        [FAILED] = "failed", [USAGE] = "invalid_request",
        [BAD_MODEL] = "bad_model", [NO_MEMORY] = "out_of_memory",
        [TOO_LONG] = "context_length_exceeded"
    };

    begin_output(j);
    add_format(&j->out, ", \"response\": null, \"error\": {\"code\": \"%s\", "
               "\"line\": %lld, \"message\": ", name[code], j->line);
    add_json_string(&j->out, why, strlen(why));
    add_string(&j->out, "}}\n");
    free_talk(&j->t);
    j->t = (struct talk){ .e = &b->e };
    j->state = FINISHED;
    b->failed++;
}

/* ---- from a reply to a line */

static void add_message_json(struct job *j, struct text *to,
                             const struct json *calls)
{
    const struct reply *r = &j->t.r;
    const struct request *q = r->q;
    struct text text = { 0 };
    int len;

    if (j->completion) {
        for (int i = 0; q->echo && i < q->prompt.n; i++) {
            const char *s = spoken(j->t.e, q->prompt.id[i], &len);
            add(&text, s, (size_t)len);
        }
        add(&text, r->text.s, r->text.n);
        member_bytes(to, "text", text.s ? text.s : "", text.n);
        to->failed |= text.failed;
        free(text.s);
        return;
    }
    add_string(to, ", \"message\": {\"role\": \"assistant\"");
    member_bytes(to, "content", r->text.s ? r->text.s : "", r->text.n);
    if (r->thought.n > 0)
        member_bytes(to, "reasoning_content", r->thought.s, r->thought.n);
    if (calls && calls->first)
        add_calls(to, calls);
    add_string(to, "}");
}

/* No time is in it: the same line has the same answer, byte for byte. */
static void finish_reply(struct batch *b, struct job *j)
{
    struct reply *r = &j->t.r;
    struct text *to = &j->out;
    const struct json *calls;
    size_t n = 0;
    const char *model = lfm2_model_string(b->e.model, "general.name", &n);
    const unsigned long long id = (unsigned long long)j->hash;

    if (r->finish == BROKEN) {
        finish_error(b, j, FAILED, "logits that are not finite");
        return;
    }
    calls = take_calls(&j->t);
    if (is_cut(&j->t)) {
        finish_error(b, j, NO_MEMORY, "no memory for the whole answer");
        return;
    }
    begin_output(j);
    add_format(to, ", \"response\": {\"status_code\": 200, \"request_id\": "
               "\"req_%016llx\", \"body\": {\"id\": \"%s-%016llx\"", id,
               j->completion ? "cmpl" : "chatcmpl", id);
    add_format(to, ", \"object\": \"%s\", \"created\": 0", j->completion ?
               "text_completion" : "chat.completion");
    member_bytes(to, "model", model ? model : "", n);
    add_string(to, ", \"choices\": [{\"index\": 0");
    add_message_json(j, to, calls);
    add_logprobs(to, r);
    add_format(to, ", \"finish_reason\": \"%s\"}]", finish_name(r, calls));
    add_usage(to, r);
    add_string(to, "}}, \"error\": null}\n");
    j->state = FINISHED;
    b->done++;
}

static void free_job(struct job *j)
{
    free_talk(&j->t);
    free(j->id.s);
    free(j->out.s);
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

/* Write what is finished, in the order of the input; at the end, `all`. */
static int write_finished(struct batch *b, int all)
{
    while (b->n_jobs > 0) {
        struct job *j = &b->job[b->first];
        if (j->state != FINISHED && !all)
            break;
        if (j->out.failed)
            return say(NO_MEMORY, "no memory for the answer to line %lld",
                       j->line);
        if (j->state == FINISHED && isatty(b->out))
            j->out.n = drop_controls(j->out.s, j->out.n);
        if (j->state == FINISHED && write_line(b, &j->out) != DONE)
            return BAD_FILE;
        b->bytes += (double)j->bytes;
        free_job(j);
        b->first = (b->first + 1) % b->n_ring;
        b->n_jobs--;
    }
    return DONE;
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
    const int n = b->n_known;
    struct known *more = b->known;
    struct pool pool = { 0 };
    struct json *whole = NULL;
    const struct json *id;
    struct why why;

    if ((n & (n - 1)) == 0)
        more = realloc(more, (n ? 2 * (size_t)n : 1) * sizeof *more);
    if (!more)
        return say(NO_MEMORY, "no memory for the lines of %s", b->out_name);
    b->known = more;
    if (is_ours(line))
        json_parse(&pool, line->s, line->n, &whole, &why);
    id = given(whole, "custom_id");
    if (id && id->type == JSON_STRING) {
        more[n] = (struct known){ .times = 1 };
        add(&more[n].id, id->s, id->n);
        b->n_known += !more[n].id.failed;
        b->failed_before += given(whole, "error") != NULL;
    }
    pool_free(&pool);
    return b->n_known > n ? DONE :
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
    if (code == DONE && !b->e.s->quiet)
        say(DONE, "%s: %d lines are there already", path, b->n_known);
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

static int number_of(const char *variable, long *out)
{
    const char *s = getenv(variable);
    char *end;

    if (!s || !*s)
        return -1;
    *out = strtol(s, &end, 10);
    return *end || *out < 0 || *out > 1 << 30 ? -1 : 0;
}

/* Of a job array: its tasks are counted from the first, so all of them must be
 * there; part of an array says how many it was cut from, auto/N. */
static int array_shard(const char *s, long *i, long *n)
{
    long first = 0, last = 0, step = 1;
    char *end;

    if (number_of("SLURM_ARRAY_TASK_ID", i) != 0 &&
        number_of("JOB_COMPLETION_INDEX", i) != 0)
        return usage("--shard %s: expected SLURM_ARRAY_TASK_ID or "
                     "JOB_COMPLETION_INDEX in the environment", s);
    if (s[4] == '/') {
        *n = strtol(s + 5, &end, 10);
        return *end || end == s + 5 ? usage("--shard %s: expected auto/N", s) :
               DONE;
    }
    number_of("SLURM_ARRAY_TASK_STEP", &step);
    if (s[4] || number_of("SLURM_ARRAY_TASK_COUNT", n) != 0 ||
        number_of("SLURM_ARRAY_TASK_MIN", &first) != 0 ||
        number_of("SLURM_ARRAY_TASK_MAX", &last) != 0 || step < 1 ||
        (last - first) / step + 1 != *n)
        return usage("--shard %s: expected a whole Slurm array in the "
                     "environment, or --shard auto/N", s);
    *i = (*i - first) / step;
    return DONE;
}

/* "I/N", or "auto" and "auto/N" by what Slurm or Kubernetes say. */
static int choose_shard(struct batch *b)
{
    const char *s = b->e.s->shard;
    long i = 0, n = 1;
    char *end = NULL;

    if (s && strncmp(s, "auto", 4) == 0) {
        if (array_shard(s, &i, &n) != DONE)
            return USAGE;
    } else if (s) {
        i = strtol(s, &end, 10);
        n = end > s && *end == '/' ? strtol(end + 1, &end, 10) : 0;
    }
    if ((end && *end) || n < 1 || n > 1 << 24 || i < 0 || i >= n)
        return usage("--shard %s: part %ld of %ld, expected I/N with I from 0 "
                     "to N-1", s, i, n);
    b->shard = (int)i;
    b->n_shards = (int)n;
    return DONE;
}

/* ---- many requests */

static struct job *job_at(const struct batch *b, int i)
{
    return &b->job[(b->first + i) % b->n_ring];
}

/* A line becomes a job, or is left to an earlier run.  Its JSON is not kept. */
static void add_job(struct batch *b, const struct piece *line)
{
    struct job *j = job_at(b, b->n_jobs);
    struct json *whole = NULL;
    struct why why = { "no memory for the request" };
    int code;

    *j = (struct job){ .t.e = &b->e, .line = b->in.line, .bytes = line->n + 1 };
    j->hash = hash_bytes(HASH_START, line->s, line->n);
    add_format(&j->id, "line-%lld", j->line);
    if (line->n > MAX_LINE)
        code = because(&why, USAGE, "longer than %d bytes", MAX_LINE);
    else if (b->e.s->batch_raw)
        code = read_raw(j, line->s, line->n, &why);
    else if ((code = json_parse(&j->t.pool, line->s, line->n, &whole, &why)) ==
             DONE)
        code = read_envelope(b, j, whole, &why);
    if (code == DONE)
        code = check_prompt(&b->e, &j->t.q, &why);
    if (take_known(b, &j->id)) {
        b->skipped++;
        b->bytes += (double)j->bytes;
        free_job(j);
        return;
    }
    if (code == DONE)
        pool_free(&j->t.pool);
    else                                  /* columns, but no lines, in JSON  */
        finish_error(b, j, code, strncmp(why.s, "line 1, ", 8) ? why.s :
                     why.s + 8);
    b->n_jobs++;
}

/* Read lines while there is room; wait for one only if there is nothing else to
 * do. */
static void read_lines(struct batch *b)
{
    struct piece line;

    while (b->n_jobs < b->n_ring &&
           next_line(&b->in, b->n_jobs == 0, &line)) {
        if (strspn(line.s, " \t\r") >= line.n ||
            (b->in.line - 1) % b->n_shards != b->shard)
            b->bytes += (double)line.n + 1;
        else
            add_job(b, &line);
    }
}

/* The sequence whose cache has most of a prompt, of all or the idle ones. */
static int best_sequence(const struct batch *b, const struct ids *prompt,
                         int idle, int *same)
{
    int best = -1;

    *same = 0;
    for (int seq = 0; seq < b->e.par.n_seq; seq++) {
        const int n = shared_prefix(&b->e.cached[seq], prompt);
        if ((idle && b->busy[seq]) || (best >= 0 && n <= *same))
            continue;
        best = seq;
        *same = n;
    }
    return best;
}

/* Will a prompt that is being read right now be worth waiting for? */
static int worth_waiting(const struct batch *b, const struct ids *prompt,
                         int have)
{
    for (int i = 0; i < b->n_active; i++) {
        const struct reply *r = b->active[i];
        if (r->n_fed < r->q->prompt.n) {
            const int n = shared_prefix(&r->q->prompt, prompt);
            if (n > r->n_fed && n >= have + lfm2_seq_step(b->e.ctx))
                return 1;
        }
    }
    return 0;
}

/* Begin to answer a line in an idle sequence, from the longest beginning of its
 * prompt that any sequence has.  One whose own log probabilities are wanted has
 * no use for that.  Returns 0 if it should wait. */
static int begin_job(struct batch *b, struct job *j)
{
    static const struct ids none = { NULL, 0 };
    struct engine *e = &b->e;
    const struct ids *prompt = j->t.q.prompt_logprobs < 0 ? &j->t.q.prompt :
                               &none;
    int have, same, code;
    const int seq = best_sequence(b, prompt, 1, &have);
    const int from = best_sequence(b, prompt, 0, &same);
    struct why why;

    if (worth_waiting(b, prompt, same))
        return 0;
    if (same >= have + lfm2_seq_step(e->ctx) &&
        lfm2_seq_copy(e->ctx, seq, from, NULL) == LFM2_OK) {
        memcpy(e->cached[seq].id, e->cached[from].id,
               (size_t)e->cached[from].n * sizeof *e->cached[from].id);
        e->cached[seq].n = e->cached[from].n;
    }
    code = start_reply(e, &j->t.r, &j->t.q, seq, &why);
    if (code != DONE) {
        finish_error(b, j, code, why.s);
        return 1;
    }
    j->state = ACTIVE;
    b->busy[seq] = 1;
    b->active[b->n_active++] = &j->t.r;
    return 1;
}

static void begin_jobs(struct batch *b)
{
    int n_free = b->e.par.n_seq;

    memset(b->busy, 0, (size_t)n_free);
    b->n_active = 0;
    for (int i = 0; i < b->n_jobs; i++) {
        struct job *j = job_at(b, i);
        if (j->state == ACTIVE) {
            b->busy[j->t.r.seq] = 1;
            b->active[b->n_active++] = &j->t.r;
        }
    }
    for (int i = 0; i < b->n_jobs && b->n_active < n_free; i++) {
        struct job *j = job_at(b, i);
        if (j->state == WAITING && !begin_job(b, j))
            break;
    }
}

static void end_jobs(struct batch *b)
{
    for (int i = 0; i < b->n_jobs; i++) {
        struct job *j = job_at(b, i);
        if (j->state != ACTIVE || j->t.r.finish == UNFINISHED)
            continue;
        b->tokens += j->t.q.prompt.n + j->t.r.n_made;
        b->reused += j->t.r.n_reused;
        b->guessed += j->t.r.n_guessed;
        b->right += j->t.r.n_right;
        finish_reply(b, j);
        free_reply(&j->t.r);
        j->t.r = (struct reply){ 0 };
    }
}

/* One line on standard error now and then; at the end, always. */
static void report_progress(struct batch *b, int last)
{
    const struct settings *s = b->e.s;
    const double now = seconds(), took = now - b->started + 1e-9;
    const double part = b->size > 0 ? b->bytes / b->size : 0;
    char left[48] = "";

    if (s->quiet || (!last && (s->heartbeat == 0 ||
                               now - b->beat < s->heartbeat)))
        return;
    b->beat = now;
    if (!last && part > 0 && part < 1)
        snprintf(left, sizeof left, ", %.0f %%, %.0f s to go", part * 100,
                 took / part * (1 - part));
    if (s->hadoop)
        fprintf(stderr, "reporter:status:");
    say(DONE, "%lld answered, %lld failed, %lld were there; %.1f tok/s, "
        "%.0f s%s", b->done, b->failed, b->skipped, b->tokens / took, took,
        left);
    if (last && s->verbose)
        say(DONE, "%.0f tokens, %.0f of them reused", b->tokens, b->reused);
    if (last && s->verbose && b->guessed > 0)
        say(DONE, "guessed %.0f tokens, %.0f of them right", b->guessed,
            b->right);
}

static int run_batch(struct batch *b)
{
    int code = DONE;

    for (;;) {
        read_lines(b);
        begin_jobs(b);
        code = write_finished(b, 0);
        if (code != DONE || interrupted || (b->n_jobs == 0 && b->in.ended &&
                                            b->in.at == b->in.buf.n))
            break;
        if (b->n_active > 0)
            code = step(&b->e, b->active, b->n_active);
        if (code != DONE)
            break;
        end_jobs(b);
        report_progress(b, 0);
    }
    if (code == DONE && interrupted)
        code = INTERRUPTED;
    if (code == INTERRUPTED && write_finished(b, 1) != DONE)
        code = BAD_FILE;
    if (code == DONE && b->in.error)
        code = say(b->in.error == ENOMEM ? NO_MEMORY : BAD_FILE, "%s: %s",
                   b->in_name, strerror(b->in.error));
    for (int i = 0; i < b->n_jobs; i++)
        free_job(job_at(b, i));
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
    b->job = calloc((size_t)b->n_ring, sizeof *b->job);
    b->active = calloc((size_t)s->parallel, sizeof *b->active);
    b->busy = malloc((size_t)s->parallel);
    if (!b->job || !b->active || !b->busy)
        return say(NO_MEMORY, "no memory for %d requests", b->n_ring);
    return open_context(&b->e);
}

static int batch(const struct settings *s)
{
    struct batch b = { .e.s = s, .out = STDOUT_FILENO };
    int code = open_batch(&b);

    if (code == DONE)
        code = lock_sandbox(s, 0);
    if (code == DONE) {
        catch_interrupt();
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
    free(b.job);
    free(b.active);
    free(b.busy);
    close_engine(&b.e);
    return code == DONE && b.failed + b.failed_before > 0 ? PARTLY : code;
}

/* ---------------------------------------------------------------- 17. --ppl
 *
 * How well a model foresees a text, measured as llama-perplexity does, so that
 * the figures can be compared.  The text is cut into windows of n_ctx tokens,
 * each read from nothing, with BOS in place of its first token if the model
 * begins with one.  Only the second half of a window is scored, where there is
 * something to go by: positions n_ctx / 2 to n_ctx - 2, each by the token after
 * it.  The perplexity is e to the power of the mean surprise.
 *
 * To see what other weights or another format change, the logits of one run can
 * be saved and those of a second compared with them:
 *
 *     "lfm2ppl\n"; u32 version, n_vocab, n_ctx, windows
 *     i32 token[windows][n_ctx], as they were read; u64 checksum of all this
 *     for every scored position: f32 logit[n_vocab], u64 checksum of these
 *
 * all little-endian.  Whole floats make it large, 67 MB a window of 512 tokens
 * with a vocabulary of 65536, but exact: the divergence of a run from itself is
 * 0, and differences of 1e-9 can be seen. */

enum { PPL_CTX = 512, PPL_VERSION = 1, PPL_FIELDS = 24, PPL_SUM = 8 };
enum { PPL_LOGITS = 1 << 27 };            /* bytes of logits held at once    */

/* Sums over the scored positions: of x, and of x * x. */
struct sums { double x, xx; };

struct estimate { double mean, error; };  /* with its standard error         */

struct ppl {
    struct engine e;
    struct ids ids;                       /* the windows, one by one         */
    int n_ctx, n_vocab, n_windows;
    int n_rows;                           /* scored in a window              */
    int n_piece, n_seq;                   /* rows asked for at once in each
                                             of so many windows              */
    FILE *save, *base;
    struct text header, row;              /* of their files                  */
    float *base_row;                      /* [n_vocab]                       */
    struct sums nll, base_nll, kl, same_top;
    double nll_base_nll;                  /* sum of the products             */
    double *every_kl;                     /* [n_windows * n_rows]            */
    int n_scored;
    double start;                         /* when it began                   */
};

/* ---- files */

static size_t ppl_row_size(const struct ppl *p)
{
    return (size_t)p->n_vocab * 4 + PPL_SUM;
}

static void add_checksum(struct text *t)
{
    add_le(t, hash_bytes(HASH_START, t->s, t->n), PPL_SUM);
}

/* What a file of this very run begins with. */
static int ppl_make_header(struct ppl *p)
{
    struct text *h = &p->header;

    add_string(h, "lfm2ppl\n");
    add_le(h, PPL_VERSION, 4);
    add_le(h, (uint64_t)p->n_vocab, 4);
    add_le(h, (uint64_t)p->n_ctx, 4);
    add_le(h, (uint64_t)p->n_windows, 4);
    for (int i = 0; i < p->n_windows * p->n_ctx; i++)
        add_le(h, (uint32_t)p->ids.id[i], 4);
    add_checksum(h);
    return h->failed ? say(NO_MEMORY, "no memory for %d tokens", p->ids.n) :
           DONE;
}

/* Is a file that begins so one of this very run?  Those who made it with
 * something else will want to know with what. */
static int ppl_check_header(const struct ppl *p, const struct text *file)
{
    static const char *const field[] = {
        "version", "a vocabulary of", "windows of (-c)", "windows:"
    };
    const size_t n = p->header.n - PPL_SUM;
    const unsigned char *want = (unsigned char *)p->header.s;
    const unsigned char *has = (unsigned char *)file->s;
    const char *path = p->e.s->ppl_compare;

    if (file->n < PPL_FIELDS || memcmp(has, want, 8) != 0)
        return say(BAD_FILE, "%s: not a file of --ppl-save", path);
    for (int i = 0; i < 4; i++)
        if (get_le(has + 8 + 4 * i, 4) != get_le(want + 8 + 4 * i, 4))
            return say(BAD_FILE, "%s: %s %lu, expected %lu", path, field[i],
                       (unsigned long)get_le(has + 8 + 4 * i, 4),
                       (unsigned long)get_le(want + 8 + 4 * i, 4));
    if (file->n < n + PPL_SUM)
        return say(BAD_FILE, "%s: cut short after %zu bytes", path, file->n);
    if (get_le(has + n, PPL_SUM) != hash_bytes(HASH_START, file->s, n))
        return say(BAD_FILE, "%s: damaged, its checksum is wrong", path);
    return memcmp(has, want, n) == 0 ? DONE :
           say(BAD_FILE, "%s: of another text, or tokens", path);
}

/* A file that is too short is better refused now than after hours. */
static int ppl_check_size(const struct ppl *p)
{
    const uint64_t n_rows = (uint64_t)p->n_windows * (uint64_t)p->n_rows;
    const uint64_t size = p->header.n + n_rows * ppl_row_size(p);
    struct stat st;

    if (fstat(fileno(p->base), &st) == 0 && S_ISREG(st.st_mode) &&
        (uint64_t)st.st_size != size)
        return say(BAD_FILE, "%s: %lld bytes, expected %llu",
                   p->e.s->ppl_compare, (long long)st.st_size,
                   (unsigned long long)size);
    return DONE;
}

static int ppl_open_base(struct ppl *p)
{
    const char *path = p->e.s->ppl_compare;
    struct text has = { 0 };
    int code;

    p->base = fopen(path, "rb");
    if (!p->base)
        return say(BAD_FILE, "%s: %s", path, strerror(errno));
    reserve(&has, p->header.n);
    has.n = fread(has.s, 1, p->header.n, p->base);
    code = ferror(p->base) ? say(BAD_FILE, "%s: %s", path, strerror(errno)) :
           ppl_check_header(p, &has);
    free(has.s);
    return code == DONE ? ppl_check_size(p) : code;
}

/* The file to compare with first: if it is refused, nothing is overwritten. */
static int ppl_open_files(struct ppl *p)
{
    const struct settings *s = p->e.s;
    int code = ppl_make_header(p);

    if (code == DONE && s->ppl_compare)
        code = ppl_open_base(p);
    if (code != DONE || !s->ppl_save)
        return code;
    p->save = create_file(s->ppl_save);
    if (!p->save)
        return BAD_FILE;
    fwrite(p->header.s, 1, p->header.n, p->save);
    return DONE;
}

static int ppl_save_row(struct ppl *p, const float *logits)
{
    struct text *row = &p->row;

    row->n = 0;
    for (int i = 0; i < p->n_vocab; i++)
        add_le(row, float_bits(logits[i]), 4);
    add_checksum(row);
    return fwrite(row->s, 1, row->n, p->save) == row->n ? DONE :
           say(BAD_FILE, "%s: %s", p->e.s->ppl_save, strerror(errno));
}

static int ppl_load_row(struct ppl *p)
{
    const size_t n = (size_t)p->n_vocab * 4;
    const unsigned char *row = (unsigned char *)p->row.s;
    const char *path = p->e.s->ppl_compare;

    if (fread(p->row.s, 1, n + PPL_SUM, p->base) != n + PPL_SUM)
        return say(BAD_FILE, "%s: %s", path, ferror(p->base) ?
                   strerror(errno) : "cut short");
    if (get_le(row + n, PPL_SUM) != hash_bytes(HASH_START, p->row.s, n))
        return say(BAD_FILE, "%s: damaged, the checksum of row %d is wrong",
                   path, p->n_scored);
    for (int i = 0; i < p->n_vocab; i++) {
        const uint32_t u = (uint32_t)get_le(row + 4 * i, 4);
        memcpy(p->base_row + i, &u, sizeof u);
    }
    return DONE;
}

/* ---- scores */

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

/* The likeliest; of equals, the first. */
static int top_of(const float *logits, int n)
{
    int top = 0;

    for (int i = 1; i < n; i++)
        if (logits[i] > logits[top])
            top = i;
    return top;
}

/* The sum of p (log p - log q), for p of the saved run and q of this one, is
 * the mean under p of the difference of logits, less that of log_sum().
 * Where the logits are equal, each of these is exactly 0. */
static int ppl_compare(struct ppl *p, const float *logits, double all, int top,
                       int32_t target)
{
    const float *base = p->base_row;
    double sum = 0, difference = 0, base_all, kl;
    int base_top, code = ppl_load_row(p);

    if (code != DONE)
        return code;
    base_top = top_of(base, p->n_vocab);
    for (int i = 0; i < p->n_vocab; i++) {
        const double e = exp((double)base[i] - base[base_top]);
        sum += e;
        difference += e * ((double)base[i] - logits[i]);
    }
    base_all = base[base_top] + log(sum);
    kl = difference / sum - (base_all - all);
    p->every_kl[p->n_scored] = kl;
    add_to(&p->kl, kl);
    add_to(&p->base_nll, base_all - base[target]);
    add_to(&p->same_top, top == base_top);
    p->nll_base_nll += (all - logits[target]) * (base_all - base[target]);
    return DONE;
}

/* One position, of which the token `target` came next. */
static int ppl_score(struct ppl *p, const float *logits, int32_t target)
{
    const int top = top_of(logits, p->n_vocab);
    const double all = log_sum(logits, p->n_vocab);
    int code = DONE;

    if (!isfinite(all) || !isfinite(logits[target]))
        return say(FAILED, "%s: logits that are not finite", p->e.s->model);
    if (p->save)
        code = ppl_save_row(p, logits);
    if (code == DONE && p->base)
        code = ppl_compare(p, logits, all, top, target);
    add_to(&p->nll, all - logits[target]);
    p->n_scored++;
    return code;
}

static struct estimate exp_of(struct estimate e)
{
    return (struct estimate){ exp(e.mean), exp(e.mean) * e.error };
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* The text is the same, so the two perplexities vary together; what they have
 * in common is no error of their difference. */
static double error_of_difference(const struct ppl *p, struct estimate ppl,
                                  struct estimate base)
{
    const double n = p->n_scored;
    const double common = (p->nll_base_nll / n - p->nll.x / n *
                           p->base_nll.x / n) / (n - 1);
    const double variance = ppl.error * ppl.error + base.error * base.error -
                            2 * common * ppl.mean * base.mean;

    return variance > 0 ? sqrt(variance) : 0;
}

/* There are two windows at least, so n > 1. */
static void ppl_print_comparison(const struct ppl *p, struct estimate ppl)
{
    const int n = p->n_scored;
    const double at = 0.99 * (n - 1), *kls = p->every_kl + (int)at;
    const struct estimate base = exp_of(mean_and_error(p->base_nll, n));
    const struct estimate kl = mean_and_error(p->kl, n);
    const struct estimate same = mean_and_error(p->same_top, n);

    qsort(p->every_kl, (size_t)n, sizeof *p->every_kl, ascending);
    printf("saved run      %.4f +/- %.5f\n", base.mean, base.error);
    printf("difference     %.6f +/- %.6f\n", ppl.mean - base.mean,
           error_of_difference(p, ppl, base));
    printf("KL divergence  %.6g +/- %.2g\n", kl.mean, kl.error);
    printf("  99 %%         %.6g\n", kls[0] + (at - (int)at) *
           (kls[1] - kls[0]));
    printf("  maximum      %.6g\n", p->every_kl[n - 1]);
    printf("same top token %.3f +/- %.3f %%\n", 100 * same.mean,
           100 * same.error);
}

static void ppl_print(const struct ppl *p)
{
    const struct estimate ppl = exp_of(mean_and_error(p->nll, p->n_scored));

    printf("perplexity     %.4f +/- %.5f\n", ppl.mean, ppl.error);
    printf("scored         %d tokens in %d windows of %d\n", p->n_scored,
           p->n_windows, p->n_ctx);
    if (p->base)
        ppl_print_comparison(p, ppl);
}

/* ---- the run */

static int ppl_check(const struct settings *s)
{
    if (!s->ppl)
        return usage("--ppl-save and --ppl-compare are for --ppl");
    if (s->prompt || s->file || s->ids || s->system)
        return usage("--ppl FILE takes no other text");
    if (is_dash(s->ppl_save) || is_dash(s->ppl_compare))
        return usage("--ppl-save and --ppl-compare need a file, not -");
    if (s->ppl_save && s->ppl_compare &&
        strcmp(s->ppl_save, s->ppl_compare) == 0)
        return usage("--ppl-save would overwrite %s before it is compared",
                     s->ppl_save);
    return DONE;
}

/* Cut the tokens of the text into windows; what is left over is not used. */
static int ppl_cut(struct ppl *p)
{
    struct ids *ids = &p->ids;

    if (p->n_ctx < 3)
        return say(USAGE, "-c %d: expected windows of at least 3 tokens",
                   p->n_ctx);
    if (ids->n / 2 < p->n_ctx)
        return say(USAGE, "%s: %d tokens, expected at least %d, two windows; "
                   "-c N makes them shorter", p->e.s->ppl, ids->n,
                   2 * p->n_ctx);
    p->n_windows = ids->n / p->n_ctx;
    p->n_rows = p->n_ctx - 1 - p->n_ctx / 2;
    for (int i = 0; lfm2_add_bos(p->e.words) && lfm2_bos(p->e.words) >= 0 &&
         i < p->n_windows; i++)
        ids->id[(size_t)i * (size_t)p->n_ctx] = lfm2_bos(p->e.words);
    return DONE;
}

static int ppl_read(struct ppl *p)
{
    struct text t = { 0 };
    int code = read_file(p->e.s->ppl, &t);

    if (code == DONE && t.n > 0 && t.s[t.n - 1] == '\n')
        t.n--;
    if (code == DONE)
        code = encode_plain(p->e.s, p->e.words, t.s, t.n, &p->ids);
    free(t.s);
    return code == DONE ? ppl_cut(p) : code;
}

/* A window whose rows are too many is read in pieces; short windows are read
 * several at once, so that the weights are not read for a few tokens only. */
static int ppl_open_context(struct ppl *p)
{
    const int most = PPL_LOGITS / 4 / p->n_vocab;
    lfm2_params *par = &p->e.par;

    p->n_piece = p->n_rows < most ? p->n_rows : most > 0 ? most : 1;
    p->n_seq = 1;
    while (p->n_seq < p->n_windows && p->n_seq < most / p->n_rows &&
           p->n_seq < par->n_batch / p->n_ctx)
        p->n_seq++;
    par->n_ctx = p->n_ctx;
    par->n_seq = p->n_seq;
    par->n_logits = p->n_seq * p->n_piece;
    p->base_row = calloc((size_t)p->n_vocab, sizeof *p->base_row);
    p->every_kl = calloc((size_t)p->n_windows * (size_t)p->n_rows,
                         sizeof *p->every_kl);
    reserve(&p->row, ppl_row_size(p));
    if (!p->base_row || !p->every_kl)
        return say(NO_MEMORY, "no memory for the scores of %d windows",
                   p->n_windows);
    return open_context(&p->e);
}

/* So far, and how long still. */
static void ppl_progress(const struct ppl *p, int n_done)
{
    const double perplexity = exp(p->nll.x / p->n_scored);
    const double took = seconds() - p->start;

    if (p->e.s->verbose)
        say(DONE, "window %d of %d: perplexity %.4f, %.0f s", n_done,
            p->n_windows, perplexity, took);
    else if (isatty(STDERR_FILENO) && !p->e.s->quiet)
        fprintf(stderr, "\rwindow %d of %d, perplexity %.4f, %.0f s to go   ",
                n_done, p->n_windows, perplexity,
                took / n_done * (p->n_windows - n_done));
}

/* Positions `from` to `to` of n windows, from the first; the last n_rows of
 * them are scored. */
static int ppl_piece(struct ppl *p, int first, int n, int from, int to,
                     int n_rows)
{
    const int32_t *token = p->ids.id + (size_t)first * (size_t)p->n_ctx;
    int code = DONE;

    for (int i = 0; i < n; i++)
        p->e.span[i] = (lfm2_span){
            i, token + (size_t)i * (size_t)p->n_ctx + from, to - from, n_rows
        };
    if (interrupted)
        return INTERRUPTED;
    code = forward(&p->e, p->e.span, n);
    for (int i = 0; code == DONE && i < n; i++) {
        const int32_t *next = p->e.span[i].tokens + (to - from) - n_rows + 1;
        for (int k = 0; code == DONE && k < n_rows; k++)
            code = ppl_score(p, lfm2_logits(p->e.ctx, i, k), next[k]);
        if (code == DONE && to == p->n_ctx - 1)
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
    if (p->n_scored > 0 && isatty(STDERR_FILENO) && !p->e.s->quiet)
        fputc('\n', stderr);
    return code;
}

static int ppl_open(struct ppl *p)
{
    const struct settings *s = p->e.s;
    int code = open_model(&p->e);

    if (code != DONE)
        return code;
    p->n_vocab = lfm2_model_config(p->e.model)->n_vocab;
    p->n_ctx = s->ctx == UNSET ? PPL_CTX : p->e.par.n_ctx;
    code = open_model_words(&p->e);
    if (code == DONE)
        code = ppl_read(p);
    if (code == DONE)
        code = ppl_open_context(p);
    return code == DONE ? ppl_open_files(p) : code;
}

static int perplexity(const struct settings *s)
{
    struct settings plain = *s;
    struct ppl p = { .e.s = &plain };
    int code = ppl_check(s);

    plain.raw = 1;                        /* no chat template                */
    if (code == DONE)
        code = ppl_open(&p);
    if (code == DONE)
        code = lock_sandbox(s, 0);
    if (code == DONE) {
        running = p.e.ctx;
        catch_interrupt();
        code = ppl_run(&p);
        signal(SIGINT, SIG_DFL);
        running = NULL;
    }
    if (p.save)
        code = finish_file(p.save, s->ppl_save, code);
    if (code == DONE)
        ppl_print(&p);
    if (p.base)
        fclose(p.base);
    free(p.header.s);
    free(p.row.s);
    free(p.base_row);
    free(p.every_kl);
    free(p.ids.id);
    close_engine(&p.e);
    return code;
}

/* -------------------------------------------------------------- 18. --bench
 *
 * The tests, names and table of llama-bench, and beside every figure how much
 * of the machine it makes use of.  Generating reads all weights for each token,
 * so memory sets its limit; reading a prompt multiplies each weight with many
 * tokens, so arithmetic does.  Both limits are measured in the same run. */

enum { START_TOKENS = 8 };                /* of the prompt that starts it    */

struct test { int n_prompt, n_gen, n_seq, depth; };

/* A second: bytes from memory, multiply-adds, and bytes that a kernel makes of
 * weights in the second-level cache, of each thread. */
struct limits { double read, dot, cached; };

struct result {
    struct test test;
    struct limits best;
    int n_threads;
    struct estimate ns, ts;               /* with the standard deviation     */
    double read, macs;                    /* a second; 0: not to be said     */
    double rss_peak, rss_anon;
    char when[24];
};

enum { MAX_TESTS = MAX_LIST * (MAX_LIST + 2) };       /* at one depth        */

struct bench {
    const struct settings *s;
    struct engine e;                      /* e.par: of its context, in force */
    struct cost cost;
    struct limits best;                   /* of its number of threads        */
    struct phrase type;                   /* "lfm2 1.2B Q4_0"                */
    double load_s, context_s, first_s;    /* first: all, from the start      */
    double rss_anon;                      /* the most there ever was         */
    double sample_s, token_s;             /* choosing a token; having one    */
    int n_cpus;
    struct test test[MAX_TESTS];          /* of each depth                   */
    int n_tests;
    int longest, deepest, n_seq;          /* the most tokens, sequences      */
    int32_t *token;                       /* [n_tokens]: of all at any depth */
    int n_tokens;
    double *ns, *ts;                      /* [s->reps] of the last test      */
    struct result *result;                /* [n_results] so far              */
    int n_results;
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
static int bench_generate(struct bench *b, const struct test *t, int n)
{
    int32_t *token = b->token + t->depth + t->n_prompt;
    int code = DONE;

    for (int i = 0; code == DONE && i < n; i++) {
        for (int k = 0; k < t->n_seq; k++)
            b->e.span[k] = (lfm2_span){ k, token + i, 1, 1 };
        code = interrupted ? INTERRUPTED : forward(&b->e, b->e.span, t->n_seq);
    }
    return code;
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

/* ---- the machine */

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

/* Of the logits that are there, by the settings that would choose a word. */
static void measure_sampling(struct bench *b)
{
    const size_t n = (size_t)lfm2_model_config(b->e.model)->n_vocab;
    const float *logits = lfm2_logits(b->e.ctx, 0, 0);
    float *copy = logits ? malloc(n * sizeof *copy) : NULL;
    lfm2_sampler sampler = make_sampler(&b->e.sampling, 0);
    double took[9];

    for (int i = 0; copy && i < 9; i++) {
        memcpy(copy, logits, n * sizeof *copy);
        const double start = seconds();
        lfm2_sample(b->e.ctx, &sampler, copy, b->token, START_TOKENS);
        took[i] = seconds() - start;
    }
    if (copy) {
        qsort(took, 9, sizeof *took, ascending);
        b->sample_s = took[4];
    }
    free(copy);
}

static struct phrase name_cpu(void)
{
    struct utsname host;

    return look_up("/proc/cpuinfo", "model name", uname(&host) == 0 ?
                   host.machine : "unknown");
}

/* ---- the model */

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
    struct phrase size, used = phrase("");

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

/* ---- what is printed */

static struct phrase name_test(const struct test *t)
{
    const struct phrase prompt = phrase(t->n_prompt ? "pp%d" : "", t->n_prompt),
                        gen = phrase(t->n_gen ? "tg%d" : "", t->n_gen),
                        times = phrase(t->n_seq > 1 ? " x %d" : "", t->n_seq),
                        depth = phrase(t->depth ? " @ d%d" : "", t->depth);

    return phrase("%s%s%s%s%s", prompt.s, t->n_prompt && t->n_gen ? "+" : "",
                  gen.s, times.s, depth.s);
}

/* "694.76 MiB", as llama-bench has it. */
static struct phrase binary_amount(double bytes)
{
    const int giga = bytes >= 1 << 30;

    return phrase("%.2f %s", bytes / (giga ? 1 << 30 : 1 << 20), giga ? "GiB" :
                  "MiB");
}

static int print_row(const struct bench *b, const struct result *r)
{
    static const char dashes[] = "------------------------------";

    if (r == b->result)
        printf("| %-30s | %10s | %10s | %-10s | %7s | %15s | %20s |\n"
               "| %.30s | %.9s: | %.9s: | %.10s | %.6s: | %.14s: | %.19s: |\n",
               "model", "size", "params", "backend", "threads", "test", "t/s",
               dashes, dashes, dashes, dashes, dashes, dashes, dashes);
    printf("| %-30s | %10s | %10s | %-10s | %7d | %15s | %11.2f ± %6.2f |\n",
           b->type.s, binary_amount(b->cost.bytes).s,
           amount(b->cost.params, "").s, "CPU", r->n_threads,
           name_test(&r->test).s, r->ts.mean, r->ts.error);
    return DONE;
}

/* 0 where one of them is not known. */
static double share(double rate, double limit)
{
    return limit > 0 ? rate / limit : 0;
}

/* A table cell: the number, or a dash for one that is not known. */
static struct phrase cell(double x, const char *format)
{
    return phrase(x > 0 ? format : "–", x);
}

static void print_limits(const struct bench *b)
{
    const int n = b->n_results;

    printf("\n| threads | test | reads GB/s | of bandwidth | GMAC/s | of "
           "cached |\n| ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for (const struct result *r = b->result; r < b->result + n; r++)
        printf("| %d | %s | %s | %s | %s | %s |\n", r->n_threads,
               name_test(&r->test).s, cell(r->read / 1e9, "%.1f").s,
               cell(100 * share(r->read, r->best.read), "%.0f %%").s,
               cell(r->macs / 1e9, "%.1f").s,
               cell(100 * share(r->macs, r->best.dot), "%.1f %%").s);
}

/* The limits are those of a number of threads: a line for each. */
static void print_machine(const struct bench *b)
{
    const lfm2_params *p = &b->e.par;

    printf("\nmachine   %s, %d usable CPU%s\nkernels   %s, KV in %s, batch "
           "%d\n", name_cpu().s, b->n_cpus, b->n_cpus == 1 ? "" : "s",
           isa_name[p->isa], kv_name(p->kv_type), p->n_batch);
    for (int i = 0; i < b->n_results; i++) {
        const struct result *r = &b->result[i];
        if (i == 0 || r->n_threads != r[-1].n_threads)
            printf("limits    %d thread%s read %.1f GB/s; with cached weights "
                   "%.0f GMAC/s, or %s GB/s a core\n", r->n_threads,
                   r->n_threads == 1 ? "" : "s",
                   r->best.read / 1e9, r->best.dot / 1e9,
                   cell(r->best.cached / 1e9, "%.1f").s);
    }
}

static void print_footer(const struct bench *b)
{
    const struct sampling s = b->e.sampling;

    print_limits(b);
    print_machine(b);
    printf("start     model %.1f ms, context %.1f ms; first token of 8 after "
           "%.1f ms\n", b->load_s * 1e3, b->context_s * 1e3, b->first_s * 1e3);
    printf("memory    %s resident at most, %s of it anonymous\n",
           binary_amount(peak_memory()).s, b->rss_anon > 0 ?
           binary_amount(b->rss_anon).s : "n/a");
    if (b->sample_s > 0)
        printf("sampling  temp %g, top-k %d, top-p %g, min-p %g: %.0f us",
               s.temp, s.top_k, s.top_p, s.min_p, b->sample_s * 1e6);
    if (b->sample_s > 0 && b->token_s > 0)
        printf(", %.2f %% of a token", 100 * b->sample_s / b->token_s);
    if (b->sample_s > 0)
        putchar('\n');
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

/* What is around the fields of a record, in the order of the words of -o. */
static const struct layout { const char *begin, *name, *between, *end; }
layouts[] = {
    [JSON] = { "  {\n", "    \"%s\": ", ",\n", "\n  }" },
    [JSONL] = { "{", "\"%s\": ", ", ", "}\n" },
    [CSV] = { "", "", ",", "\n" }
};

static void add_csv(struct text *t, const char *s)
{
    add_string(t, "\"");
    for (; *s; s++)
        add_string(t, *s == '"' ? "\"\"" : (char[]){ *s, '\0' });
    add_string(t, "\"");
}

static void add_field(struct text *t, const struct field *f, int reps, int csv)
{
    if (f->samples) {
        for (int i = 0; i < reps; i++)
            add_format(t, "%s%.*f", i ? ", " : "[ ", f->digits, f->samples[i]);
        add_string(t, " ]");
    } else if (csv)
        add_csv(t, f->text ? f->text : isnan(f->number) ? "" :
                phrase("%.*f", f->digits, f->number).s);
    else if (f->text)
        add_json_string(t, f->text, strlen(f->text));
    else
        add_format(t, isnan(f->number) ? "null" : "%.*f", f->digits, f->number);
}

/* A line of CSV has no room for samples; the first is one of names. */
static int print_fields(const struct bench *b, const struct field *f, int n)
{
    const struct layout *as = &layouts[b->s->output];
    const int csv = b->s->output == CSV, first = b->n_results == 1;
    struct text t = { 0 };

    for (int i = 0; csv && first && i < n; i++)
        if (!f[i].samples)
            add_format(&t, i + 1 < n ? "%s," : "%s\n", f[i].name);
    if (b->s->output == JSON)
        add_string(&t, first ? "[\n" : ",\n");
    for (int i = 0; i < n; i++) {
        if (csv && f[i].samples)
            continue;
        add_string(&t, i ? as->between : as->begin);
        add_format(&t, as->name, f[i].name);
        add_field(&t, &f[i], b->s->reps, csv);
    }
    add_string(&t, as->end);
    return print_text(&t, "a record");
}

/* llama-bench's columns, then ours.  A prompt is held against arithmetic, an
 * answer against memory. */
static int print_record(const struct bench *b, const struct result *r)
{
    const lfm2_params *p = &b->e.par;
    const char *kv = kv_name(p->kv_type);
    const struct phrase cpu = name_cpu();
    const struct field f[] = {
        WORD("build_commit", ""), COUNT("build_number", 0),
        WORD("cpu_info", cpu.s), WORD("backends", "CPU"),
        WORD("model_filename", b->s->model), WORD("model_type", b->type.s),
        COUNT("model_size", b->cost.bytes),
        COUNT("model_n_params", b->cost.params),
        COUNT("n_batch", p->n_batch), COUNT("n_threads", r->n_threads),
        WORD("type_k", kv), WORD("type_v", kv),
        COUNT("n_prompt", r->test.n_prompt), COUNT("n_gen", r->test.n_gen),
        COUNT("n_depth", r->test.depth), WORD("test_time", r->when),
        COUNT("avg_ns", r->ns.mean), COUNT("stddev_ns", r->ns.error),
        FIGURE("avg_ts", r->ts.mean, 6), FIGURE("stddev_ts", r->ts.error, 6),
        SAMPLES("samples_ns", b->ns, 0), SAMPLES("samples_ts", b->ts, 6),

        COUNT("n_sequences", r->test.n_seq), WORD("isa", isa_name[p->isa]),
        KNOWN("read_bandwidth", r->best.read / 1e9, 3),
        KNOWN("int8_rate", r->best.dot / 1e9, 3),
        KNOWN("l2_gbs_core", r->best.cached / 1e9, 3),
        KNOWN("gb_per_s", r->read / 1e9, 3),
        KNOWN("gmac_per_s", r->macs / 1e9, 3),
        KNOWN("share", r->test.n_gen > 0 ? share(r->read, r->best.read) :
              share(r->macs, r->best.dot), 4),
        COUNT("rss_peak", r->rss_peak), KNOWN("rss_anon", r->rss_anon, 0),
        FIGURE("load_ms", b->load_s * 1e3, 3),
        FIGURE("context_ms", b->context_s * 1e3, 3),
        FIGURE("first_token_ms", b->first_s * 1e3, 3)
    };

    return print_fields(b, f, sizeof f / sizeof *f);
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
    *r = (struct result){
        .test = *t, .best = b->best, .n_threads = b->e.par.n_threads,
        .ns = mean_and_deviation(b->ns, b->s->reps),
        .ts = mean_and_deviation(b->ts, b->s->reps),
        .rss_peak = peak_memory(), .rss_anon = anonymous_memory(b->e.status)
    };
    if (gmtime_r(&now, &utc))
        strftime(r->when, sizeof r->when, "%Y-%m-%dT%H:%M:%SZ", &utc);
    if (t->n_prompt == 0)
        r->read = step_bytes(b->e.model, &b->cost, t->n_seq,
                             t->depth + t->n_gen / 2.0) *
                  r->ts.mean / t->n_seq;
    if (t->n_prompt == 0 || t->n_gen == 0)
        r->macs = (b->cost.macs + (t->n_gen ? b->cost.head : 0)) * r->ts.mean;
    b->rss_anon = fmax(b->rss_anon, r->rss_anon);
    if (t->n_prompt == 0 && b->token_s <= 0)
        b->token_s = t->n_seq / r->ts.mean;
    b->n_results++;
    return flush_output((b->s->output == MD ? print_row : print_record)(b, r));
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

/* Any will do, if they are not always the same few: those of a mixture's tokens
 * choose its experts. */
static void spread_tokens(struct bench *b)
{
    const int n_vocab = lfm2_model_config(b->e.model)->n_vocab;

    for (int i = 0; i < b->n_tokens; i++)
        b->token[i] = (int32_t)((uint32_t)i * 2654435761u % (uint32_t)n_vocab);
}

/* From nothing to the first token, before anything else has warmed the way. */
static int measure_start(struct bench *b)
{
    const double start = seconds();
    lfm2_params p;
    int code = open_model(&b->e);

    if (code != DONE)
        return code;
    b->load_s = seconds() - start;
    spread_tokens(b);
    p = b->e.par;
    p.n_threads = b->s->bench_threads.v[0] ? b->s->bench_threads.v[0] :
                  b->n_cpus;
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
    lfm2_params p = choose_params(b->s, b->e.model);
    int code;

    p.n_threads = n_threads ? n_threads : b->n_cpus;
    p.n_ctx = depth + b->longest;
    p.n_seq = p.n_logits = b->n_seq;
    code = open_bench_context(b, &p);
    if (code == DONE && first)
        b->best = (struct limits){
            measure_rate(b, LFM2_READ), measure_rate(b, LFM2_DOT),
            measure_rate(b, LFM2_DECODE) / b->e.par.n_threads
        };
    for (int i = 0; code == DONE && i < b->n_tests; i++) {
        b->test[i].depth = depth;
        code = interrupted ? INTERRUPTED : run_test(b, &b->test[i]);
    }
    if (code == DONE && b->sample_s <= 0)
        measure_sampling(b);
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

/* llama-bench's order. */
static void list_tests(struct bench *b)
{
    const struct list *prompt = &b->s->bench_prompt, *gen = &b->s->bench_gen;
    const struct list *seqs = &b->s->bench_seqs, *both = &b->s->bench_both;

    for (int i = 0; i < prompt->n; i++)
        add_test(b, prompt->v[i], 0, 1);
    for (int i = 0; i < gen->n; i++)
        for (int k = 0; k < seqs->n; k++)
            add_test(b, 0, gen->v[i], seqs->v[k]);
    for (int i = 0; i < both->n; i += 2)
        add_test(b, both->v[i], both->v[i + 1], 1);
    for (int i = 0; i < b->s->bench_depth.n; i++)
        if (b->s->bench_depth.v[i] > b->deepest)
            b->deepest = b->s->bench_depth.v[i];
}

/* All there will be to remember, before any clock runs. */
static int alloc_bench(struct bench *b)
{
    const struct settings *s = b->s;
    const size_t rounds = (size_t)s->bench_depth.n * (size_t)s->bench_threads.n;
    const size_t n_results = (size_t)b->n_tests * rounds;

    if (b->n_tests == 0)
        return usage("nothing to measure: no -p, -n or -pg above 0");
    if (b->longest > MAX_CTX - b->deepest)
        return usage("a test of %d tokens at a depth of %d is longer than any "
                     "context, %d", b->longest, b->deepest, MAX_CTX);
    b->n_tokens = b->longest + b->deepest + START_TOKENS;
    b->token = calloc((size_t)b->n_tokens, sizeof *b->token);
    b->result = calloc(n_results, sizeof *b->result);
    b->ns = calloc((size_t)s->reps, sizeof *b->ns);
    b->ts = calloc((size_t)s->reps, sizeof *b->ts);
    b->e.span = calloc((size_t)b->n_seq, sizeof *b->e.span);
    if (!b->token || !b->result || !b->ns || !b->ts || !b->e.span)
        return say(NO_MEMORY, "no memory for %d tokens and %zu results",
                   b->n_tokens, n_results);
    return DONE;
}

static int run_all(struct bench *b)
{
    const struct settings *s = b->s;
    int code;

    b->n_cpus = usable_cpus();
    code = measure_start(b);
    if (code != DONE)
        return code;
    b->cost = count_cost(b->e.model, s->kv);
    b->e.sampling = choose_sampling(s, b->e.model);
    b->type = name_type(b->e.model);
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
    struct bench b = { .s = s, .e.s = s };
    int code;

    list_tests(&b);
    code = alloc_bench(&b);
    if (code == DONE) {
        catch_interrupt();
        code = run_all(&b);
        end_output(&b, code);
        signal(SIGINT, SIG_DFL);
    }
    close_engine(&b.e);
    free(b.token);
    free(b.result);
    free(b.ns);
    free(b.ts);
    return code;
}

/* ----------------------------------------------------------- 19. --selftest
 *
 * Is this build right on this machine?  No file is needed: a small model of
 * every weight type is made here, of random numbers that are the same
 * everywhere, and so are its logits: to the bit, or something is wrong.  What
 * differs only between kernels is found by running each of them. */

enum { SELF_TOKENS = 24, SELF_LONG = 260, SELF_EMBD = 256, SELF_HEAD = 64,
       SELF_EXPERTS = 4 };

/* A GGUF that grows.  Every number in it is little-endian. */
struct maker {
    struct text kv, info, data;
    uint64_t n_kv, n_tensors, rng;
    int type;                             /* of the matrices                 */
};

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static void add_counted(struct text *to, const char *s)
{
    add_le(to, strlen(s), 8);
    add_string(to, s);
}

enum { G_U32 = 4, G_I32 = 5, G_F32 = 6, G_STRING = 8, G_ARRAY = 9 };

static void make_key(struct maker *m, const char *key, int type)
{
    add_counted(&m->kv, key);
    add_le(&m->kv, (uint64_t)type, 4);
    m->n_kv++;
}

static void make_number(struct maker *m, const char *key, int type,
                        uint64_t bits)
{
    make_key(m, key, type);
    add_le(&m->kv, bits, 4);
}

static void make_string(struct maker *m, const char *key, const char *s)
{
    make_key(m, key, G_STRING);
    add_counted(&m->kv, s);
}

static void make_array(struct maker *m, const char *key, int type, int n)
{
    make_key(m, key, G_ARRAY);
    add_le(&m->kv, (uint64_t)type, 4);
    add_le(&m->kv, (uint64_t)n, 8);
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

/* One block: bits at random, except where they would mean no number. */
static void make_block(struct maker *m, const struct self_type *t)
{
    unsigned char b[256];

    for (int i = 0; i < t->bytes; i += 8)
        put_le(b + i, next_random(&m->rng), 8);
    for (int i = 0; i < 2 && t->scale[i] >= 0; i++)    /* about 2^-8        */
        put_le(b + t->scale[i], 0x1c00 | (next_random(&m->rng) & 0x3ff), 2);
    if (t->id == 0)                                    /* +-2^-5 or so       */
        put_le(b, 0x3d000000 | (next_random(&m->rng) & 0x807fffff), 4);
    if (t->id == 1)
        put_le(b, 0x2800 | (next_random(&m->rng) & 0x83ff), 2);
    if (t->id == 30)
        put_le(b, 0x3d00 | (next_random(&m->rng) & 0x807f), 2);
    add(&m->data, (char *)b, (size_t)t->bytes);
}

/* A tensor [experts][rows][cols]; a vector has no rows, a matrix no experts. */
static void make_tensor(struct maker *m, const char *name, int type,
                        int experts, int rows, int cols)
{
    const struct self_type *t = &self_types[type];
    const int n = (experts ? experts : 1) * (rows ? rows : 1) * cols;

    add_counted(&m->info, name);
    add_le(&m->info, experts ? 3 : rows ? 2 : 1, 4);
    add_le(&m->info, (uint64_t)cols, 8);
    if (rows)
        add_le(&m->info, (uint64_t)rows, 8);
    if (experts)
        add_le(&m->info, (uint64_t)experts, 8);
    add_le(&m->info, (uint64_t)t->id, 4);
    add_le(&m->info, m->data.n, 8);
    for (int i = 0; i < n; i += t->cols)
        make_block(m, t);
    while (m->data.n % 32)
        add(&m->data, "", 1);
    m->n_tensors++;
}

static void make_layer_tensor(struct maker *m, int il, const char *what,
                              int type, int experts, int rows, int cols)
{
    char name[64];

    snprintf(name, sizeof name, "blk.%d.%s", il, what);
    make_tensor(m, name, type, experts, rows, cols);
}

/* Layers: conv and dense, attention and dense, and both with experts. */
static void make_layer(struct maker *m, int il)
{
    const int n = SELF_EMBD, kv = n / 2, x = il < 2 ? 0 : SELF_EXPERTS;
    const char *const ffn[2][3] = {
        { "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight" },
        { "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight" }
    };

    make_layer_tensor(m, il, "attn_norm.weight", 0, 0, 0, n);
    make_layer_tensor(m, il, "ffn_norm.weight", 0, 0, 0, n);
    if (il % 2 == 0) {
        make_layer_tensor(m, il, "shortconv.in_proj.weight", m->type, 0, 3 * n,
                          n);
        make_layer_tensor(m, il, "shortconv.conv.weight", 0, 0, n, 3);
        make_layer_tensor(m, il, "shortconv.out_proj.weight", m->type, 0, n, n);
    } else {
        make_layer_tensor(m, il, "attn_q.weight", m->type, 0, n, n);
        make_layer_tensor(m, il, "attn_k.weight", m->type, 0, kv, n);
        make_layer_tensor(m, il, "attn_v.weight", m->type, 0, kv, n);
        make_layer_tensor(m, il, "attn_output.weight", m->type, 0, n, n);
        make_layer_tensor(m, il, "attn_q_norm.weight", 0, 0, 0, SELF_HEAD);
        make_layer_tensor(m, il, "attn_k_norm.weight", 0, 0, 0, SELF_HEAD);
    }
    if (x) {
        make_layer_tensor(m, il, "ffn_gate_inp.weight", 0, 0, x, n);
        make_layer_tensor(m, il, "exp_probs_b.bias", 0, 0, 0, x);
    }
    for (int i = 0; i < 3; i++)
        make_layer_tensor(m, il, ffn[x > 0][i], m->type, x, n, n);
}

/* The 256 bytes as byte-level vocabularies write them, a few merges, and the
 * tokens of a conversation. */
static const char *const self_words[] = {
    "he", "ll", "hell", "hello", BOS, TURN_START, TURN_END
};

enum { SELF_VOCAB = 256 + 7 };

static void make_words(struct maker *m)
{
    static const char *const merges[] = { "h e", "l l", "he ll", "hell o" };
    uint32_t unseen = 256;

    make_string(m, "tokenizer.ggml.model", "gpt2");
    make_string(m, "tokenizer.ggml.pre", "lfm2");
    make_number(m, "tokenizer.ggml.bos_token_id", G_U32, 256 + 4);
    make_number(m, "tokenizer.ggml.eos_token_id", G_U32, 256 + 6);
    make_array(m, "tokenizer.ggml.tokens", G_STRING, SELF_VOCAB);
    for (uint32_t c = 0; c < 256; c++) {
        const int seen = (c > ' ' && c < 127) || (c > 160 && c != 173);
        char s[4];
        const size_t n = utf8_put(s, seen ? c : unseen++);
        add_le(&m->kv, n, 8);
        add(&m->kv, s, n);
    }
    for (int i = 0; i < 7; i++)
        add_counted(&m->kv, self_words[i]);
    make_array(m, "tokenizer.ggml.token_type", G_I32, SELF_VOCAB);
    for (int i = 0; i < SELF_VOCAB; i++)
        add_le(&m->kv, i < 256 + 4 ? 1 : 3, 4);       /* normal, control    */
    make_array(m, "tokenizer.ggml.merges", G_STRING, 4);
    for (int i = 0; i < 4; i++)
        add_counted(&m->kv, merges[i]);
}

static void make_metadata(struct maker *m)
{
    static const struct { const char *key; uint64_t value; } number[] = {
        { "block_count", 4 }, { "context_length", 128 },
        { "embedding_length", SELF_EMBD }, { "feed_forward_length", SELF_EMBD },
        { "attention.head_count", SELF_EMBD / SELF_HEAD },
        { "vocab_size", SELF_VOCAB }, { "shortconv.l_cache", 3 },
        { "leading_dense_block_count", 2 }, { "expert_count", SELF_EXPERTS },
        { "expert_used_count", 2 },
        { "expert_feed_forward_length", SELF_EMBD },
        { "expert_gating_func", 2 }
    };
    char key[64];

    make_string(m, "general.architecture", "lfm2moe");
    for (size_t i = 0; i < sizeof number / sizeof *number; i++) {
        snprintf(key, sizeof key, "lfm2moe.%s", number[i].key);
        make_number(m, key, G_U32, number[i].value);
    }
    make_number(m, "lfm2moe.attention.layer_norm_rms_epsilon", G_F32,
                0x3727c5ac);                           /* 1e-5               */
    make_number(m, "lfm2moe.rope.freq_base", G_F32, 0x49742400);       /* 1e6 */
    make_array(m, "lfm2moe.attention.head_count_kv", G_I32, 4);
    for (int il = 0; il < 4; il++)
        add_le(&m->kv, il % 2 ? 2 : 0, 4);
    make_words(m);
}

/* The whole file.  The caller frees out->s. */
static void make_file(int type, struct text *out)
{
    struct maker m = { .rng = (uint64_t)type, .type = type };

    make_metadata(&m);
    make_tensor(&m, "token_embd.weight", type, 0, SELF_VOCAB, SELF_EMBD);
    make_tensor(&m, "token_embd_norm.weight", 0, 0, 0, SELF_EMBD);
    for (int il = 0; il < 4; il++)
        make_layer(&m, il);
    add_string(out, "GGUF");
    add_le(out, 3, 4);
    add_le(out, m.n_tensors, 8);
    add_le(out, m.n_kv, 8);
    add(out, m.kv.s, m.kv.n);
    add(out, m.info.s, m.info.n);
    while (out->n % 32)
        add(out, "", 1);
    add(out, m.data.s, m.data.n);
    out->failed |= m.kv.failed | m.info.failed | m.data.failed;
    free(m.kv.s);
    free(m.info.s);
    free(m.data.s);
}

/* ---- what is tried */

struct self {
    lfm2_model *model;
    lfm2_context *ctx;
    int32_t token[SELF_LONG];
    int failed;
    uint64_t all;                         /* hash of all hashes              */
};

static void self_result(struct self *t, int good, const char *fmt, ...)
{
    va_list args;

    printf("%-4s  ", good ? "ok" : "FAIL");
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
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

/* One weight type: plain C against the number that is known, each kernel and
 * token by token against plain C. */
static void self_weights(struct self *t, const struct self_type *type)
{
    const int kv = LFM2_KV_F16, n = SELF_TOKENS;
    const uint64_t h = self_hash(t, LFM2_ISA_SCALAR, 1, kv, n, n);

    t->all = hash_number(t->all, h);
    self_result(t, h == type->hash, "%s in plain C: %016llx", type->name,
                (unsigned long long)h);
    for (int isa = LFM2_ISA_SCALAR + 1; isa < LFM2_N_ISA; isa++)
        if (lfm2_isa_available(isa))
            self_result(t, self_hash(t, isa, 1, kv, n, n) == h &&
                        self_hash(t, isa, 1, kv, n, 1) == h, "%s with %s",
                        type->name, isa_name[isa]);
}

/* A text longer than what attention works on at once, and a cache of floats. */
static void self_attention(struct self *t)
{
    static const uint64_t known[2] = {
        0x75627de54a6b322fu, 0x18980a03e2fcd3dcu
    };

    for (int isa = LFM2_ISA_SCALAR; isa < LFM2_N_ISA; isa++) {
        if (!lfm2_isa_available(isa))
            continue;
        self_result(t, self_hash(t, isa, 1, LFM2_KV_F16, SELF_LONG,
                                 SELF_TOKENS) == known[0],
                    "a long text, by %s", isa_name[isa]);
        self_result(t, self_hash(t, isa, 1, LFM2_KV_F32, SELF_TOKENS, 7) ==
                    known[1], "a KV cache of floats, by %s", isa_name[isa]);
    }
}

/* Threads and pieces; sequences that are saved, restored and shortened. */
static void self_sequences(struct self *t)
{
    const int isa = LFM2_ISA_AUTO, n = SELF_TOKENS;
    const uint64_t h = self_hash(t, isa, 1, LFM2_KV_F16, n, n);
    uint64_t size, again;
    char *state;

    self_result(t, self_hash(t, isa, 1, LFM2_KV_F16, n, 1) == h,
                "token by token");
    self_result(t, self_hash(t, isa, 2, LFM2_KV_F16, n, 5) == h,
                "two threads, pieces of five tokens");
    if (self_open(t, isa, 1, LFM2_KV_F32) != LFM2_OK) {
        self_result(t, 0, "a KV cache of floats");
        return;
    }
    again = self_feed(t, 0, n, 7);
    size = lfm2_seq_state_size(t->ctx, 0);
    state = malloc((size_t)size);
    self_result(t, state &&
                lfm2_seq_save(t->ctx, 0, state, size, NULL) == LFM2_OK &&
                hash_bytes(HASH_START, state, (size_t)size) ==
                0x9ee20d817a3a6aa1u &&
                lfm2_seq_load(t->ctx, 1, state, size, NULL) == LFM2_OK &&
                lfm2_seq_len(t->ctx, 1) == n, "a sequence saved and restored");
    free(state);
    self_result(t, lfm2_seq_trim(t->ctx, 1, 3) == 0 &&
                self_feed(t, 1, n, 4) == again,
                "a sequence shortened and read again");
    lfm2_context_close(t->ctx);
}

/* A generator that is the same everywhere chooses the same words. */
static void self_sampler(struct self *t)
{
    lfm2_sampler s = { .temperature = 0.8f, .top_k = 40, .top_p = 0.95f,
                       .min_p = 0.02f, .repeat_penalty = 1.1f,
                       .repeat_last_n = 16, .rng = 1 };
    const int n_vocab = lfm2_model_config(t->model)->n_vocab;
    float *logits = malloc((size_t)n_vocab * sizeof *logits);
    uint64_t rng = 2, h = HASH_START;
    int32_t made[32];

    if (!logits || self_open(t, LFM2_ISA_AUTO, 1, LFM2_KV_F16) != LFM2_OK) {
        free(logits);
        self_result(t, 0, "the sampler");
        return;
    }
    for (int i = 0; i < 32; i++) {
        for (int id = 0; id < n_vocab; id++)
            logits[id] = (float)(int)(next_random(&rng) >> 49) * 0x1p-12f - 4;
        made[i] = lfm2_sample(t->ctx, &s, logits, made, i);
        h = hash_number(h, (uint32_t)made[i]);
    }
    self_result(t, h == 0x4cb658387d2a6170u, "the sampler's choices");
    t->all = hash_number(t->all, h);
    lfm2_context_close(t->ctx);
    free(logits);
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
                memcmp(id, want, sizeof want) == 0, "the tokenizer");
    self_result(t, back.s && strcmp(back.s, text) == 0, "and back to text");
    free(back.s);
}

static void self_numbers(struct self *t)
{
    volatile float one = 1, tiny = 0x1p-149f, third = 1.0f / 3, half = 0.5f;
    volatile int minus = -5;
    const double d = 1;
    uint64_t bits;

    self_result(t, CHAR_BIT == 8 && sizeof(int) >= 4 && sizeof(size_t) >= 4 &&
                minus >> 1 == -3 && (unsigned)minus == UINT_MAX - 4,
                "integers of two's complement, 8 bits a byte");
    memcpy(&bits, &d, sizeof bits);
    self_result(t, float_bits(one) == 0x3f800000 &&
                bits == (uint64_t)0x3ff00000 << 32,
                "floats and integers in the same byte order");
    self_result(t, FLT_RADIX == 2 && FLT_MANT_DIG == 24 && DBL_MANT_DIG == 53 &&
                one + 0x1p-24f == one && one + 0x3p-24f == one + 0x1p-22f &&
                third * 3 == one,
                "floats of 24 bits, doubles of 53, rounded to nearest even");
    self_result(t, tiny * one > 0 && tiny * half == 0 &&
                (0x1p-126f * half) * 2 == 0x1p-126f,
                "denormal numbers are kept");
}

/* What a function gives for some thousand numbers: the bits that are known, and
 * no farther than `bound` units of 2^-24 from what the C library computes in
 * double, if it has the function. */
static void self_function(struct self *t, int function, const char *name,
                          double (*libc)(double), double bound, uint64_t known)
{
    uint64_t rng = 3, h = HASH_START;
    int good = 1;

    for (int i = 0; i < 4096; i++) {
        const float x = (float)(int)(next_random(&rng) >> 40);
        const float b = (float)(int)(next_random(&rng) >> 40) - 0x1p23f;
        const float a = function == LFM2_EXP ? (x - 0x1p23f) * 0x1p-17f :
                                               x * 0x1p-4f;
        const float c = i % 2 ? -a * b : b * 0x1p-20f;
        const float y = lfm2_math(function, a, b, c);
        const double exact = libc ? libc(a) : y;
        h = hash_number(h, float_bits(y));
        good &= fabs(y - exact) <= bound * 0x1p-24 * fabs(exact);
    }
    self_result(t, good && h == known, "%s: %016llx", name,
                (unsigned long long)h);
}

static void self_functions(struct self *t)
{
    self_function(t, LFM2_FMA, "a*b+c", NULL, 0, 0x70172052f8b00d38u);
    self_function(t, LFM2_EXP, "exp", exp, 2, 0x7ebd348940bf194fu);
    self_function(t, LFM2_SIN, "sin", sin, 1, 0x84f7d324c069e130u);
    self_function(t, LFM2_COS, "cos", cos, 1, 0x2f6e6bf977c0a2e9u);
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

/* What belongs into a report, and whether all is well. */
static int self_end(const struct self *t)
{
    const uint64_t known = 0xf7e0c42c140c71edu;

    print_version();
    print_libc();
    printf("hash        %016llx, expected %016llx on every machine\n",
           (unsigned long long)t->all, (unsigned long long)known);
    return t->failed || t->all != known ? SELFTEST_FAILED : DONE;
}

static int selftest(void)
{
    struct self t = { .all = HASH_START };
    lfm2_error err;

    for (int i = 0; i < SELF_LONG; i++)
        t.token[i] = (i * 37 + 5) % SELF_VOCAB;
    self_numbers(&t);
    self_functions(&t);
    for (int i = 0; i < N_SELF_TYPES; i++) {
        struct text file = { 0 };
        make_file(i, &file);
        if (file.failed || lfm2_model_open_memory(&t.model, file.s, file.n,
                                                  &err) != LFM2_OK) {
            self_result(&t, 0, "a model of %s", self_types[i].name);
            say(FAILED, "%s", file.failed ? "no memory" : err.msg);
        } else {
            self_weights(&t, &self_types[i]);
            if (i == N_SELF_TYPES - 1) {
                self_attention(&t);
                self_sequences(&t);
                self_sampler(&t);
                self_tokenizer(&t, &file);
            }
            lfm2_model_close(t.model);
        }
        free(file.s);
    }
    return self_end(&t);
}

/* --------------------------------------------------------------- 20. main */

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

static int work(const struct settings *s)
{
    return s->help ? print_help() : s->version ? print_version() :
           s->selftest ? selftest() :
           s->tokenize || s->detokenize || s->export_to ? work_on_words(s) :
           wants_ppl(s) ? perplexity(s) : s->bench ? bench(s) :
           s->inspect ? inspect_file(s) : s->batch_mode ? batch(s) :
           work_on_model(s);
}

int main(int argc, char **argv)
{
    struct settings s = defaults;
    struct text system = { 0 };
    int code;

    hold_descriptors();
    if (argc > 0 && argv[0][0])
        program = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    signal(SIGPIPE, SIG_IGN);             /* writing then fails, and we say  */
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN);
#endif
    code = parse(&s, argc > 0 ? argv : (char *[]){ "run", NULL });
    quiet = s.quiet;
    if (code == DONE && s.system_file)
        code = read_system(&s, &system);
    code = flush_output(code == DONE ? work(&s) : code);
    free(system.s);
    return code == INTERRUPTED ? 128 + (int)last_signal : code;
}
