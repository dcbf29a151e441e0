/* noise - answers that a model without any sense would give.
 *
 *     noise MODEL.gguf [SEED] <LINES
 *
 * Reads lines of --batch and answers them as --batch does, but each token is
 * one of the vocabulary by chance, if it fits the schema, and else one by chance
 * of those that do; the longer an answer is, the rather one that closes
 * something.  Of what is told to fit, some is tried. */
#define _POSIX_C_SOURCE 200809L          /* as run.c does */

#define main run_main
#include "../run.c"
#undef main
#undef COUNT

#include "util.h"

enum { LONG = 1500 };

static uint64_t rng;

static int32_t any(int n)
{
    return (int32_t)(random_u32(&rng) % (uint32_t)n);
}

/* By chance one that closes something, or the end; -1: none fits. */
static int32_t closing(const struct engine *e, const struct reply *r)
{
    static const char *const text[] = { "<|im_end|>", "}", "]", ")", "\"",
                                        CALL_END };

    for (int i = 0; i < 6; i++) {
        const int32_t id = lfm2_token_id(e->words, text[i]);
        if (id >= 0 && any(4) && may_say(e, r, id))
            return id;
    }
    return -1;
}

static int32_t fitting(struct engine *e, const struct reply *r)
{
    const int n_vocab = lfm2_n_vocab(e->words);
    uint8_t *fits = e->spelling->fits;
    int n = 0, nth;

    memset(fits, 0, (size_t)n_vocab);
    find_fitting(e->spelling, r->guide);
    for (int32_t id = 0; id < n_vocab; id++)
        n += fits[id];
    for (int i = 0; i < 20; i++) {
        const int32_t id = any(n_vocab);
        if (!is_end(e, r, id) && fits[id] != may_say(e, r, id)) {
            fprintf(stderr, "token %d: %d\n", (int)id, fits[id]);
            abort();
        }
    }
    nth = n ? any(n) : 0;
    for (int32_t id = 0; id < n_vocab; id++)
        if (fits[id] && nth-- == 0)
            return id;
    return -1;
}

static void answer_noise(struct engine *e, struct job *j)
{
    struct reply *r = &j->r;

    *r = (struct reply){ .q = &j->q, .part = AT_START };
    r->ids.id = zeroed((size_t)e->par.n_ctx + 1, sizeof *r->ids.id);
    start_guide(e, r);
    while (r->finish == UNFINISHED) {
        int32_t id = any(LONG) < 50 + r->n_made ? closing(e, r) : -1;
        if (id < 0) {
            id = any(lfm2_n_vocab(e->words));
            if (!may_say(e, r, id))
                id = fitting(e, r);
        }
        if (id < 0 && !guide_may_end(r->guide)) {
            fprintf(stderr, "nothing fits after %s\n", r->raw.s);
            abort();
        }
        if (id < 0 || is_end(e, r, id))
            r->finish = STOPPED;
        else
            take_token(e, r, id);
    }
    split(r, 1);
}

static void answer_line(struct engine *e, const char *line, size_t n)
{
    struct pool pool = { 0 };
    struct job j = { .q = { .limit = 2 * LONG, .n_choices = 1 } };
    struct text out = { 0 };
    struct json *v;
    struct why why;
    const struct json *body;
    int code = json_parse(&pool, line, n, &v, &why);

    body = member(code == DONE ? v : NULL, "body");
    if (code == DONE)
        code = read_form(e, &j.q, body, member(body, "tools"), &why);
    add_members(&out, "{custom_id: %s", json_text(member(v, "custom_id")));
    if (code == DONE) {
        answer_noise(e, &j);
        add_members(&out, "response: {body: ");
        add_completion(e, &out, &j, 1, j.id, 0);
        add_members(&out, "}}, error: %s}", NULL);
    } else
        add_members(&out, "error: {message: %s}, response: %s}", why.s, NULL);
    add_string(&out, "\n");
    fwrite(out.s, 1, out.n, stdout);
    free(out.s);
    free_reply(&j.r);
    free_request(&j.q);
    pool_free(&pool);
}

int main(int argc, char **argv)
{
    struct settings s = defaults;
    struct engine e = { .s = &s };
    struct source in = { .fd = STDIN_FILENO };
    struct piece line;

    rng = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    s.model = argc > 1 ? argv[1] : "";
    s.mode = BATCH;
    s.sandbox = SANDBOX_OFF;
    s.quiet = 1;
    if (open_engine(&e) != DONE)
        return 1;
    e.par.n_ctx = 4 * LONG;
    while (next_line(&in, 1, &line))
        answer_line(&e, line.s, line.n);
    free(in.buf.s);
    close_engine(&e);
    return 0;
}
