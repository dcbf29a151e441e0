/* Targets in run.c: JSON, tool calls, conversations, sessions, batches, what
 * clients send to a server, schemas, and the explanation of a file. */
#define _GNU_SOURCE                      /* memfd_create()                   */

#include <stdio.h>
#include <sys/mman.h>

/* What it would tell the user goes nowhere. */
static FILE *nowhere;
#undef stdout
#undef stderr
#define stdout nowhere
#define stderr nowhere
#define printf(...) fprintf(nowhere, __VA_ARGS__)
#define puts(s) fputs(s, nowhere)
#define putchar(c) putc(c, nowhere)
#define main run_main
#undef _POSIX_C_SOURCE
#include "../run.c"
#undef main
#undef COUNT

#include "fuzz.h"
#include "util.h"

static void open_nowhere(void)
{
    if (!nowhere)
        nowhere = fopen("/dev/null", "w");
    REQUIRE(nowhere);
}

/* A refusal has a sentence. */
static int is_good(int code, const struct why *why)
{
    REQUIRE(code == DONE || (code > 0 && why->s[0]));
    return code == DONE;
}

static int are_same(const struct text *a, const struct text *b)
{
    return a->n == b->n && (a->n == 0 || memcmp(a->s, b->s, a->n) == 0);
}

/* --------------------------------------------------------------------- JSON */

/* What was written is read again as the same. */
static void check_again(const struct json *v)
{
    struct pool pool = { 0 };
    struct text once = { 0 }, twice = { 0 };
    struct json *again;
    struct why why = { "" };

    add_json(&once, v);
    REQUIRE(json_parse(&pool, once.s, once.n, &again, &why) == DONE);
    add_json(&twice, again);
    REQUIRE(are_same(&once, &twice));
    free(once.s);
    free(twice.s);
    pool_free(&pool);
}

void fuzz_json(const uint8_t *data, size_t n)
{
    struct pool pool = { 0 };
    struct text python = { 0 };
    struct json *v;
    struct why why = { "" };
    long long whole;

    if (is_good(json_parse(&pool, (const char *)data, n, &v, &why), &why)) {
        add_tree(&python, v, 1);
        json_int(v, -100, 100, &whole);
        json_text(json_get(v, "a"));
        check_again(v);
    }
    free(python.s);
    pool_free(&pool);
}

/* ---------------------------------------------------------------- tool calls
 *
 * And the parts of an answer: they do not depend on the pieces it comes in. */

static void take_apart(struct reply *r, struct request *q, const char *s,
                       size_t n, size_t each)
{
    *q = (struct request){ .think_budget = -1,
                           .stop = { 2, { "STOP", "\n\n\n" } } };
    *r = (struct reply){ .q = q, .part = AT_START };
    for (size_t at = 0, len; at < n && r->finish == UNFINISHED; at += len) {
        len = each < n - at ? each : n - at;
        add(&r->raw, s + at, len);
        split(r, 0);
    }
    if (r->finish == UNFINISHED)
        r->finish = STOPPED;
    split(r, 1);
}

static void check_parts(const char *s, size_t n)
{
    struct request q[2];
    struct reply r[2];

    take_apart(&r[0], &q[0], s, n, n ? n : 1);
    take_apart(&r[1], &q[1], s, n, 1 + n % 7);
    REQUIRE(r[0].finish == r[1].finish && are_same(&r[0].raw, &r[1].raw));
    REQUIRE(are_same(&r[0].text, &r[1].text) && are_same(&r[0].calls, &r[1].calls));
    REQUIRE(are_same(&r[0].thought, &r[1].thought));
    for (int i = 0; i < 2; i++) {
        free_reply(&r[i]);
        free_request(&q[i]);
    }
}

void fuzz_calls(const uint8_t *data, size_t n)
{
    struct pool pool = { 0 };
    struct text rest = { 0 };
    struct calls calls;
    struct json *v;
    struct why why = { "" };
    const char *s = (const char *)data;

    if (n == 0)
        return;
    REQUIRE(parse_calls(s + 1, n - 1, s[0] & 1, &calls, &rest) >= 0);
    REQUIRE(rest.n <= n - 1);
    for (int i = 0; i < calls.n; i++) {
        const struct piece *t = &calls.call[i].arguments;
        REQUIRE(calls.call[i].name.n > 0);
        REQUIRE(json_parse(&pool, t->s, t->n, &v, &why) == DONE);
        REQUIRE(json_is(v, JSON_OBJECT));
        check_again(v);
    }
    free_calls(&calls);
    free(rest.s);
    pool_free(&pool);
    check_parts(s + 1, n - 1);
}

/* ------------------------------------------------------------- conversations
 *
 * The first byte chooses template and options, JSON follows.  Whatever was
 * said, the control tokens of the prompt are those the template put there, and
 * its tokens are its text. */

static void check_tokens(const lfm2_tokenizer *t, const struct rendered *r)
{
    struct ids ids = { NULL, 0 };
    struct why why;
    size_t at = 0;
    int marks = 0, markers = 0, n;

    REQUIRE(encode_rendered(t, r, 0, &ids, &why) == DONE);
    for (int i = 0; i < r->n_marks; i++)
        marks += lfm2_token_id(t, r->mark[i].token) >= 0;
    for (int i = 0; i < ids.n; i++) {
        const char *s = lfm2_token_bytes(t, ids.id[i], 0, &n);
        markers += n == 0;
        s = lfm2_token_bytes(t, ids.id[i], 1, &n);
        REQUIRE((size_t)n <= r->text.n - at);
        REQUIRE(memcmp(s, r->text.s + at, (size_t)n) == 0);
        at += (size_t)n;
    }
    REQUIRE(at == r->text.n && marks == markers);
    free(ids.id);
}

void fuzz_chat(const uint8_t *data, size_t n)
{
    static lfm2_tokenizer *t;
    struct pool pool = { 0 };
    struct rendered out;
    struct json *v;
    struct why why = { "" };
    const int flags = n ? data[0] / 8 : 0;

    open_nowhere();
    if (!t)
        REQUIRE(lfm2_tokenizer_open(&t, "tokenizer.bin", NULL) == LFM2_OK);
    if (n < 1 || json_parse(&pool, (const char *)data + 1, n - 1, &v, &why) !=
        DONE) {
        pool_free(&pool);
        return;
    }
    const struct conversation c = {
        .messages = json_is(v, JSON_ARRAY) ? v : json_get(v, "messages"),
        .tools = json_get(v, "tools"), .date = "2026-01-01",
        .generate = flags & 1, .keep_thinking = flags >> 1 & 1,
        .continue_last = flags >> 2 & 1, .open_thought = flags >> 3 & 1
    };
    if (is_good(render(&c, data[0] % 8, &out, &why), &why)) {
        check_tokens(t, &out);
        ends_in_thought(&out);
    }
    rendered_free(&out);
    pool_free(&pool);
}

/* ----------------------------------------------------------------- sessions */

static struct settings small_settings;
static struct engine *small[3];           /* of the three targets below      */

static void close_small(void)
{
    for (size_t i = 0; i < sizeof small / sizeof *small && small[i]; i++)
        close_engine(small[i]);
}

/* A small model with words, and all that run.c has around it, until the end of
 * the process. */
static void open_small(struct engine *e, int n_seq)
{
    const struct tiny tiny = { .n_embd = 32, .words = 1 };
    struct bytes file = tiny_model(&tiny);
    char path[] = "/tmp/lfm2-fuzz-XXXXXX";
    const int fd = mkstemp(path);
    size_t i;

    open_nowhere();
    small_settings = defaults;
    small_settings.model = path;
    small_settings.template = TEMPLATE_LFM2;
    small_settings.sandbox = SANDBOX_OFF;
    small_settings.threads = small_settings.no_mmap = 1;
    small_settings.ctx = 100;
    small_settings.batch = 16;
    small_settings.ask.limit = 3;
    small_settings.ask.seed = 1;
    small_settings.mode = ANSWER;
    REQUIRE(fd >= 0 && write(fd, file.p, file.n) == (ssize_t)file.n);
    close(fd);
    *e = (struct engine){ .s = &small_settings };
    REQUIRE(open_engine(e) == DONE);
    unlink(path);
    free(file.p);
    small_settings.model = "model";
    e->par.n_seq = n_seq;
    e->par.n_logits = n_seq + LOGITS_CHUNK;
    REQUIRE(open_context(e) == DONE);
    if (!small[0])
        atexit(close_small);
    for (i = 0; small[i]; i++)
        ;
    small[i] = e;
}

static int file_of(const uint8_t *data, size_t n)
{
    const int fd = memfd_create("file", 0);

    REQUIRE(fd >= 0 && write(fd, data, n) == (ssize_t)n);
    REQUIRE(lseek(fd, 0, SEEK_SET) == 0);
    return fd;
}

/* Make the checksums right where the file has room for them: that of the words,
 * and that of the state, for this model. */
static void repair_session(const struct engine *e, uint8_t *p, size_t n)
{
    size_t at = 8;

    for (int part = 0; part < 2 && n - at >= 8; part++) {
        const uint64_t size = fuzz_get(p + at, 8), each = part == 0 ? 1 : 4;
        at += 8;
        if (size > (n - at) / each)
            return;
        at += size * each;
    }
    if (n - at < 16)
        return;
    fuzz_put(p + at, fuzz_hash(p, at), 8);
    at += 16;
    fuzz_put(p + at - 8, n - at, 8);
    if (n - at < 32)
        return;
    memcpy(p + at, "LFM2SEQ2", 8);
    fuzz_put(p + at + 8, lfm2_model_hash(e->model), 8);
    fuzz_put(p + n - 8, fuzz_hash_words(p + at, n - at - 8), 8);
}

/* As a run with --session: what is in the cache is what its ids say, and the
 * conversation can be read, asked about (now and then: that takes long) and
 * written again. */
static void try_session(struct engine *e, const uint8_t *data, size_t n)
{
    FILE *const f = fdopen(file_of(data, n), "rb");
    struct talk t = { .e = e };
    struct text again = { 0 };
    int code;

    lfm2_seq_trim(e->ctx, 0, 0);
    e->slot[0].cached.n = 0;
    REQUIRE(f && read_talk(&t) == DONE);
    code = restore(&t, f);
    fclose(f);
    REQUIRE(code == DONE || code == BAD_FILE);
    REQUIRE(e->slot[0].cached.n == lfm2_seq_len(e->ctx, 0));
    if (fuzz_hash(data, n) % 8 == 0) {
        add_message(&t, "user", "hello", 5);
        if (prompt_talk(&t, NULL) == DONE)
            run_reply(&t);
    }
    add_json(&again, &t.messages);
    free(again.s);
    free_reply(&t.job.r);
    free_request(&t.job.q);
    rendered_free(&t.prompt);
    pool_free(&t.pool);
}

void fuzz_session(const uint8_t *data, size_t n)
{
    static struct engine e;
    uint8_t *copy;

    if (!e.ctx)
        open_small(&e, 1);
    small_settings.session = "session";
    if (n < 8)                            /* is no session, for its caller   */
        return;
    try_session(&e, data, n);
    copy = fuzz_copy(data, n);
    repair_session(&e, copy, n);
    try_session(&e, copy, n);
    free(copy);
}

/* ------------------------------------------------------------------- batches
 *
 * The first byte chooses how; then come lines.  They are answered as --batch
 * answers them, or read as what an earlier run has written. */

/* Every line that is no blank one has an answer of one line. */
static void check_answers(int fd, long long n_lines)
{
    struct source in = { .fd = fd };
    struct pool pool = { 0 };
    struct piece line;
    struct json *v;
    struct why why = { "" };
    long long n = 0;

    REQUIRE(lseek(fd, 0, SEEK_SET) == 0);
    for (; next_line(&in, 0, &line); n++) {
        REQUIRE(is_ours(&line));
        REQUIRE(json_parse(&pool, line.s, line.n, &v, &why) == DONE);
        REQUIRE(json_is(json_get(v, "custom_id"), JSON_STRING));
        pool_free(&pool);
    }
    REQUIRE(n == n_lines && !in.error);
    free(in.buf.s);
}

static void read_resumed(struct batch *b, const uint8_t *data, size_t n)
{
    char path[64];
    const int fd = file_of(data, n);

    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    small_settings.resume = path;
    open_resumed(b);
    small_settings.resume = NULL;
    if (b->out >= 0)
        close(b->out);
    close(fd);
    for (int i = 0; i < b->n_known; i++)
        free(b->known[i].id.s);
    free(b->known);
}

void fuzz_batch(const uint8_t *data, size_t n)
{
    enum { N_SEQ = 2 };
    static struct engine e;
    struct batch b = { .in_name = "in", .out_name = "out", .n_shards = 1,
                       .n_ring = N_SEQ * AHEAD };
    struct entry entry[N_SEQ * AHEAD];

    if (!e.ctx)
        open_small(&e, N_SEQ);
    for (int seq = 0; seq < N_SEQ; seq++) {
        lfm2_seq_trim(e.ctx, seq, 0);
        e.slot[seq].cached.n = 0;
    }
    if (n < 1)
        return;
    b.e = e;
    b.entry = entry;
    b.e.template = data[0] & 2 ? TEMPLATE_NONE : TEMPLATE_LFM2;
    if (data[0] & 4) {
        read_resumed(&b, data + 1, n - 1);
        return;
    }
    b.in.fd = file_of(data + 1, n - 1);
    b.out = file_of(data, 0);
    REQUIRE(run_batch(&b) == DONE);
    e.spelling = b.e.spelling;
    check_answers(b.out, b.done + b.failed);
    close(b.in.fd);
    close(b.out);
    free(b.in.buf.s);
}

/* --------------------------------------------------------------- connections
 *
 * The first byte chooses a server; then comes what a client sends.  However it
 * is cut up, the same is answered, and the same is left to be read. */

/* Dots in the place of what is another thing every time. */
static void blank(struct text *t, const char *mark, const char *end)
{
    for (char *s = t->s; s && (s = strstr(s, mark));)
        for (s += strlen(mark); *s && !strchr(end, *s); s++)
            *s = '.';
}

/* What the server did with all it has: as if it had been sent; a request that
 * is for the model is noted and not answered. */
static void serve_pieces(struct client *c, struct text *said)
{
    static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
    const size_t n = strlen(go_on);

    while (has_input(c)) {
        parse_input(c);
        if (c->out.n >= n && memcmp(c->out.s, go_on, n) == 0)
            drop_bytes(&c->out, n);       /* depends on what has come        */
        add(said, c->out.s ? c->out.s : "", c->out.n);
        c->out.n = 0;
        if (c->state == ANSWERING) {
            const struct request *q = &c->choice[0].q;
            REQUIRE(c->n_choices > 0 && c->n_choices <= MAX_CHOICES);
            add_format(said, "[%d %d %d %d %d]", c->n_choices, q->n_choices,
                       c->stream, q->prompt.n, q->limit);
            finish_request(c);
        }
        if (c->state == CLOSING)
            c->in.n = 0;
    }
    REQUIRE(c->server->e.jobs == NULL && c->n_choices == 0);
}

static void converse(struct server *v, struct text *said, const uint8_t *data,
                     size_t n, size_t each)
{
    struct client *c = &v->client[0];

    *c = (struct client){ .server = v, .fd = -1, .state = IN_HEAD };
    v->n_places = 1;
    for (size_t at = 0; at < n && c->state != CLOSING; at += each) {
        const size_t len = each < n - at ? each : n - at;
        add(&c->in, (const char *)data + at, len);
        serve_pieces(c, said);
    }
    blank(said, "\nDate: ", "\r");
    blank(said, "\nx-request-id: ", "\r");
}

void fuzz_serve(const uint8_t *data, size_t n)
{
    static struct engine e;
    static struct server v[2];
    static char keys[] = "key\n";
    const struct client *c[2] = { v[0].client, v[1].client };
    struct text said[2] = { { NULL, 0, 0 } };
    struct settings s;

    if (!e.ctx)
        open_small(&e, 1);
    if (n < 1)
        return;
    s = small_settings;
    s.mode = SERVE;
    s.queue = 256;
    s.max_body = 1;
    s.cors = data[0] & 1 ? "http://example.org" : NULL;
    for (int i = 0; i < 2; i++) {
        v[i].e = e;
        v[i].e.s = &s;
        v[i].is_local = data[0] >> 1 & 1;
        v[i].keys = (struct text){ keys, data[0] & 4 ? 4 : 0, 0 };
        v[i].stopping = data[0] >> 3 & 1;
        converse(&v[i], &said[i], data + 1, n - 1, i == 0 ? n :
                 1 + fuzz_hash(data, n) % 16);
    }
    REQUIRE(are_same(&said[0], &said[1]) && c[0]->state == c[1]->state);
    REQUIRE(c[0]->state == CLOSING || (are_same(&c[0]->in, &c[1]->in) &&
                                       are_same(&c[0]->body, &c[1]->body)));
    for (int i = 0; i < 2; i++) {
        hang_up(&v[i].client[0]);
        free(said[i].s);
    }
}

/* ------------------------------------------------------------------- schemas
 *
 * The first byte chooses how, a schema follows, and behind a NUL an answer: its
 * bytes where they fit, and others where they do not. */

/* A byte that fits: this one, or the next that does; -1: there is none. */
static int fitting_byte(const struct guide *from, struct guide *to, int c)
{
    for (int i = 0; i < 256; i++)
        if (guide_byte(from, to, (c + i) % 256))
            return (c + i) % 256;
    return -1;
}

/* There is always a way on, or it may end. */
static int follow_bytes(const struct schema *s, const uint8_t *data, size_t n,
                        struct text *out)
{
    static struct guide g[2];
    size_t i = 0;

    g[0] = (struct guide){ .s = s };
    for (; i < n && i < 300; i++) {
        const int c = fitting_byte(&g[i % 2], &g[(i + 1) % 2], data[i]);
        if (c < 0) {
            REQUIRE(guide_may_end(&g[i % 2]) && guide_is_done(&g[i % 2]));
            return 1;
        }
        add(out, c == CALL_OPENS ? CALL_START : c == CALL_CLOSES ? CALL_END :
            (const char[]){ (char)c, '\0' }, c == CALL_OPENS ?
            strlen(CALL_START) : c == CALL_CLOSES ? strlen(CALL_END) : 1);
    }
    return guide_may_end(&g[i % 2]);
}

/* What has ended is JSON, or calls that are understood. */
static void check_ended(const struct text *said, int is_call)
{
    struct pool pool = { 0 };
    struct text rest = { 0 };
    struct calls calls;
    struct json *v;
    struct why why = { "" };

    if (is_call) {
        REQUIRE(parse_calls(said->s, said->n, 0, &calls, &rest) == 0);
        REQUIRE((calls.n > 0 || said->n == 0) && rest.n == 0);
        free_calls(&calls);
    } else
        REQUIRE(json_parse(&pool, said->s, said->n, &v, &why) == DONE);
    free(rest.s);
    pool_free(&pool);
}

void fuzz_schema(const uint8_t *data, size_t n)
{
    const uint8_t *end = n > 1 ? memchr(data + 1, 0, n - 1) : NULL;
    struct pool pool = { 0 };
    struct json *v;
    struct schema *s = NULL;
    struct why why = { "" };
    struct text said = { 0 };
    const int is_call = n > 0 && data[0] & 1;

    if (end && json_parse(&pool, (const char *)data + 1, (size_t)(end - data) -
                          1, &v, &why) == DONE) {
        const struct call_form form = { v, NULL, data[0] >> 1 & 1,
                                        data[0] >> 2 & 1 };
        if (is_good(is_call && v->type != JSON_ARRAY ?
                    because(&why, USAGE, "no tools") :
                    make_schema(is_call ? NULL : v, is_call ? &form : NULL, &s,
                                &why), &why) &&
            follow_bytes(s, end + 1, n - (size_t)(end - data) - 1, &said))
            check_ended(&said, is_call);
    }
    free_schema(s);
    free(said.s);
    pool_free(&pool);
}

/* ----------------------------------------------------- explanations of files
 *
 * What cannot be run is explained all the same, as a report and as JSON. */

static void explain(const char *path, int json)
{
    struct settings s = defaults;
    FILE *const before = nowhere;
    struct pool pool = { 0 };
    struct json *v;
    struct why why = { "" };
    char *out = NULL;
    size_t n = 0;

    s.model = path;
    s.json = json;
    s.sandbox = SANDBOX_OFF;
    s.mode = INSPECT;
    s.no_mmap = 1;
    nowhere = open_memstream(&out, &n);
    REQUIRE(nowhere);
    const int code = inspect_file(&s);
    fclose(nowhere);
    nowhere = before;
    REQUIRE(code == DONE || code == USAGE || code == BAD_MODEL);
    if (json && n > 0 && out[0] == '{') {
        REQUIRE(json_parse(&pool, out, n, &v, &why) == DONE);
        REQUIRE(json_is(v, JSON_OBJECT));
    }
    pool_free(&pool);
    free(out);
}

void fuzz_inspect(const uint8_t *data, size_t n)
{
    const int fd = file_of(data, n);
    char path[64];

    open_nowhere();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (n > 0) {
        explain(path, 0);
        explain(path, 1);
    }
    close(fd);
}
