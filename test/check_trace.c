/* Traces: names, order, tokens, and values against the independent reference;
 * and that nobody who looks changes anything. */
#include "../lfm2.c"

#include "reference.h"
#include "util.h"

#include <check.h>

/* ---------------------------------------------------------------- recording */

struct record {
    char name[80];
    int layer, expert, seq, pos, token, n;
    float *x;
};

struct recording {
    struct record *r;
    int n, cap;
    pthread_t caller;
    lfm2_context *cancel;                 /* once there are some records     */
};

static void record(void *user, const lfm2_activation *a)
{
    struct recording *to = user;

    ck_assert(pthread_equal(to->caller, pthread_self()));
    if (to->n == to->cap) {
        to->cap = to->cap ? 2 * to->cap : 256;
        to->r = realloc(to->r, (size_t)to->cap * sizeof *to->r);
    }
    struct record *r = &to->r[to->n++];
    *r = (struct record){ "", a->layer, a->expert, a->seq, a->pos, a->token,
                          a->n, malloc((size_t)a->n * sizeof *a->x) };
    EXPECT(strlen(a->name) < sizeof r->name);
    strcpy(r->name, a->name);
    memcpy(r->x, a->x, (size_t)a->n * sizeof *a->x);
    if (to->cancel && to->n == 100)
        lfm2_cancel(to->cancel);
}

static void forget(struct recording *r)
{
    for (int i = 0; i < r->n; i++)
        free(r->r[i].x);
    free(r->r);
    *r = (struct recording){ 0 };
}

/* ------------------------------------------------------------------- models */

struct rig {
    struct bytes file;
    lfm2_model *model;
    lfm2_context *ctx;
    int n_vocab;
};

enum { N = 70 };                          /* tokens: some batches            */

static struct rig rig_open(struct tiny t)
{
    struct rig r = { .file = tiny_model(&t) };
    lfm2_error err = { 0 };

    EXPECT_MSG(lfm2_model_open_memory(&r.model, r.file.p, r.file.n, &err) == 0,
               "%s", err.msg);
    r.n_vocab = lfm2_model_config(r.model)->n_vocab;
    return r;
}

static void rig_close(struct rig *r)
{
    lfm2_context_close(r->ctx);
    lfm2_model_close(r->model);
    free(r->file.p);
}

/* Tiny as the models are, their work is shared by the threads. */
static void open_context(struct rig *r, int n_batch, int n_threads)
{
    const lfm2_params p = { .n_ctx = 320, .n_seq = 3, .n_batch = n_batch,
                            .n_logits = N, .n_threads = n_threads,
                            .kv_type = LFM2_KV_F32 };

    lfm2_context_close(r->ctx);
    ck_assert(lfm2_context_open(&r->ctx, r->model, &p, NULL) == 0);
    r->ctx->row_work = TOO_SMALL;
}

static void random_tokens(int32_t *tokens, int n, int n_vocab)
{
    uint64_t seed = 11;

    for (int i = 0; i < n; i++)
        tokens[i] = (int32_t)(random_u32(&seed) % (uint32_t)n_vocab);
}

static void feed(struct rig *r, const int32_t *tokens, int n, int n_logits)
{
    const lfm2_span span = { 0, tokens, n, n_logits };

    ck_assert(lfm2_forward(r->ctx, &span, 1, NULL) == LFM2_OK);
}

static void start_recording(struct rig *r, struct recording *to)
{
    lfm2_error err;

    *to = (struct recording){ .caller = pthread_self() };
    EXPECT_MSG(lfm2_trace(r->ctx, record, to, &err) == LFM2_OK, "%s", err.msg);
}

static const struct tiny kinds[] = {
    { .seed = 5 }, { .seed = 5, .moe = 1 }, { .type = 2, .moe = 1 },
    { .type = 12 }
};

/* -------------------------------------------------------------------- order */

/* The next records are of this module, one for each of the tokens from `first`
 * on. */
static int expect_module(const struct recording *r, int at, const char *name,
                         int first, int n_tokens, int n, int layer)
{
    for (int t = first; t < first + n_tokens; t++, at++) {
        EXPECT_MSG(at < r->n, "nothing after %d records, expected %s", at,
                   name);
        const struct record *a = &r->r[at];
        EXPECT_MSG(strcmp(a->name, name) == 0, "%s, expected %s", a->name,
                   name);
        EXPECT_MSG(a->pos == t && a->n == n && a->layer == layer &&
                   a->expert == -1, "%s: position %d, %d numbers, layer %d, "
                   "expert %d, expected %d, %d, %d and -1", name, a->pos, a->n,
                   a->layer, a->expert, t, n, layer);
    }
    return at;
}

/* Modules of layer il, "name name name" with their sizes. */
static int expect_modules(const struct recording *r, int at, int il,
                          const char *names, const int *n)
{
    char list[200], full[80], *s;

    strcpy(list, names);
    for (s = strtok(list, " "); s; s = strtok(NULL, " "), n++) {
        snprintf(full, sizeof full, "model.layers.%d%s%s", il,
                 strcmp(s, "-") ? "." : "", strcmp(s, "-") ? s : "");
        at = expect_module(r, at, full, 0, 3, *n, il);
    }
    return at;
}

/* Every expert that one of the three tokens has chosen, ascending, and in w1,
 * w3 and w2 the tokens that have chosen it, ascending. */
static int expect_experts(const struct recording *r, int at, int il,
                          const lfm2_config *c)
{
    static const char *const matrix[] = { "w1", "w3", "w2" };
    const struct record *chosen = &r->r[at - 6];
    char name[80];

    for (int e = 0; e < c->n_expert; e++)
        for (int k = 0; k < 3; k++)
            for (int t = 0; t < 3; t++) {
                const struct record *a = &r->r[at];
                int has = 0;
                for (int i = 0; i < c->n_expert_used; i++)
                    has |= chosen[t].x[i] == (float)e;
                if (!has)
                    continue;
                snprintf(name, sizeof name, "model.layers.%d.feed_forward."
                         "experts.%d.%s", il, e, matrix[k]);
                EXPECT_MSG(at++ < r->n && strcmp(a->name, name) == 0 &&
                           a->pos == t && a->expert == e && a->layer == il &&
                           a->n == (k < 2 ? c->n_ff_expert : c->n_embd),
                           "%s of token %d, expected %s of %d", a->name, a->pos,
                           name, t);
            }
    return at;
}

START_TEST(modules_have_the_official_names_in_order)
{
    struct rig r = rig_open(kinds[_i]);
    const lfm2_config c = *lfm2_model_config(r.model);
    const int n = c.n_embd, q = c.n_head * c.head_dim;
    const int kv = c.n_head_kv * c.head_dim, used = c.n_expert_used;
    const int32_t tokens[3] = { 9, 8, 7 };
    struct recording all;
    int at;

    open_context(&r, 64, 2);
    start_recording(&r, &all);
    feed(&r, tokens, 3, 2);
    at = expect_module(&all, 0, "model.embed_tokens", 0, 3, n, -1);
    for (int il = 0; il < c.n_layer; il++) {
        at = expect_modules(&all, at, il, "operator_norm", &n);
        at = c.is_attn[il]
            ? expect_modules(&all, at, il, "self_attn.q_proj self_attn.k_proj "
                             "self_attn.v_proj self_attn.q_layernorm "
                             "self_attn.k_layernorm self_attn.out_proj",
                             (int []){ q, kv, kv, q, kv, n })
            : expect_modules(&all, at, il, "conv.in_proj conv.conv "
                             "conv.out_proj", (int []){ 3 * n, n, n });
        at = expect_modules(&all, at, il, "ffn_norm", &n);
        if (il < c.n_layer_dense) {
            at = expect_modules(&all, at, il, "feed_forward.w1 feed_forward.w3 "
                                "feed_forward.w2",
                                (int []){ c.n_ff, c.n_ff, n });
        } else {
            at = expect_modules(&all, at, il, "feed_forward.gate "
                                "feed_forward.selected_experts "
                                "feed_forward.routing_weights",
                                (int []){ c.n_expert, used, used });
            at = expect_experts(&all, at, il, &c);
            at = expect_modules(&all, at, il, "feed_forward", &n);
        }
        at = expect_modules(&all, at, il, "-", &n);
    }
    at = expect_module(&all, at, "model.embedding_norm", 1, 2, n, -1);
    at = expect_module(&all, at, "lm_head", 1, 2, r.n_vocab, -1);
    ck_assert_int_eq(at, all.n);
    for (int row = 0; row < 2; row++)
        EXPECT(memcmp(all.r[at - 2 + row].x, lfm2_logits(r.ctx, 0, row),
                      (size_t)r.n_vocab * sizeof(float)) == 0);
    forget(&all);
    rig_close(&r);
}
END_TEST

/* Three strangers in one call: whose a record is, and what its token was. */
START_TEST(every_record_tells_whose_it_is)
{
    struct rig r = rig_open(kinds[1]);
    int32_t tokens[N];
    struct recording all;
    int seen[3] = { 0 }, logits = 0;

    random_tokens(tokens, N, r.n_vocab);
    open_context(&r, 8, 1);
    feed(&r, tokens, 10, 0);
    start_recording(&r, &all);
    const lfm2_span spans[3] = {
        { 2, tokens + 30, 13, 0 }, { 0, tokens + 10, 6, 3 },
        { 1, tokens + 50, 1, 1 }
    };
    ck_assert(lfm2_forward(r.ctx, spans, 3, NULL) == LFM2_OK);
    for (int i = 0; i < all.n; i++) {
        const struct record *a = &all.r[i];
        const int first = a->seq == 2 ? 30 : a->seq == 0 ? 0 : 50;
        EXPECT(a->seq >= 0 && a->seq < 3);
        EXPECT(a->token == tokens[first + a->pos]);
        seen[a->seq] += strcmp(a->name, "model.embed_tokens") == 0;
        if (strcmp(a->name, "lm_head") != 0)
            continue;
        EXPECT(a->seq != 2 && a->pos >= (a->seq == 0 ? 13 : 0));
        EXPECT(memcmp(a->x, lfm2_logits(r.ctx, a->seq == 0 ? 1 : 2,
                                        a->seq == 0 ? a->pos - 13 : 0),
                      (size_t)a->n * sizeof *a->x) == 0);
        logits++;
    }
    ck_assert(seen[0] == 6 && seen[1] == 1 && seen[2] == 13 && logits == 4);
    forget(&all);
    rig_close(&r);
}
END_TEST

/* ------------------------------------------------------------------- values */

static int by_name(const void *a, const void *b)
{
    const struct record *x = a, *y = b;
    const int order = strcmp(x->name, y->name);

    return order ? order : (x->pos > y->pos) - (x->pos < y->pos);
}

static const struct record *find_record(const struct recording *r,
                                        const char *name, int pos)
{
    struct record key = { .pos = pos };

    snprintf(key.name, sizeof key.name, "%s", name);
    return bsearch(&key, r->r, (size_t)r->n, sizeof key, by_name);
}

/* Which experts, in falling order of s + bias, and their weights, are those
 * that are not 0 in the reference. */
static int expect_choice(const struct recording *all, const char *name, int t,
                         const double *weight, int n)
{
    char of[80];
    int n_chosen = 0;

    snprintf(of, sizeof of, "%.*sselected_experts",
             (int)(strlen(name) - strlen("all_weights")), name);
    const struct record *chosen = find_record(all, of, t);
    snprintf(of, sizeof of, "%.*srouting_weights",
             (int)(strlen(name) - strlen("all_weights")), name);
    const struct record *got = find_record(all, of, t);
    EXPECT_MSG(chosen && got, "no %s", of);
    for (int i = 0; i < n; i++)
        n_chosen += weight[i] > 0;
    EXPECT(n_chosen == chosen->n && n_chosen == got->n);
    for (int i = 0; i < n_chosen; i++)
        EXPECT_MSG(fabs((double)got->x[i] - weight[(int)chosen->x[i]]) < 1e-5,
                   "%s of token %d: %g, expected %g", of, t,
                   (double)got->x[i], weight[(int)chosen->x[i]]);
    return 2;
}

struct comparison { const struct recording *all; int n; };

static void expect_near(void *user, const char *name, int t, const double *x,
                        int n)
{
    struct comparison *to = user;
    double error = 0, power = 1e-30;

    if (strstr(name, "all_weights")) {
        to->n += expect_choice(to->all, name, t, x, n);
        return;
    }
    const struct record *a = find_record(to->all, name, t);
    if (!a && strstr(name, ".experts."))
        return;                           /* not chosen                      */
    EXPECT_MSG(a, "no %s of token %d", name, t);
    EXPECT(a->n == n);
    for (int i = 0; i < n; i++) {
        const double d = (double)a->x[i] - x[i];
        error += d * d;
        power += x[i] * x[i];
    }
    EXPECT_MSG(error <= 1e-10 * power, "%s of token %d: NMSE %g", name, t,
               error / power);
    to->n++;
}

START_TEST(values_are_those_of_the_reference)
{
    struct rig r = rig_open(kinds[_i]);
    double *exact = malloc(N * (size_t)r.n_vocab * sizeof *exact);
    int32_t tokens[N];
    struct recording all;
    struct comparison c = { &all, 0 };

    random_tokens(tokens, N, r.n_vocab);
    open_context(&r, 32, 2);
    start_recording(&r, &all);
    feed(&r, tokens, N, N);
    qsort(all.r, (size_t)all.n, sizeof *all.r, by_name);
    ref_trace(r.file.p, tokens, N, exact, expect_near, &c);
    ck_assert_int_eq(c.n, all.n);
    free(exact);
    forget(&all);
    rig_close(&r);
}
END_TEST

/* -------------------------------------------------------- nothing changes */

static void expect_equal(const struct recording *a, const struct recording *b)
{
    EXPECT_MSG(a->n == b->n, "%d records, expected %d", a->n, b->n);
    for (int i = 0; i < a->n; i++) {
        const struct record *x = &a->r[i], *y = &b->r[i];
        EXPECT_MSG(strcmp(x->name, y->name) == 0 && x->pos == y->pos &&
                   x->n == y->n &&
                   memcmp(x->x, y->x, (size_t)x->n * sizeof *x->x) == 0,
                   "%s of token %d: not what it was", x->name, x->pos);
    }
}

START_TEST(looking_changes_no_bit_and_every_cut_shows_the_same)
{
    static const int batch[] = { 64, 1, 7, 33 };
    struct rig r = rig_open(kinds[_i]);
    const size_t size = N * (size_t)r.n_vocab * sizeof(float);
    float *logits = malloc(size);
    int32_t tokens[N];
    struct recording first = { 0 }, other;

    random_tokens(tokens, N, r.n_vocab);
    open_context(&r, 64, 1);
    feed(&r, tokens, N, N);
    memcpy(logits, lfm2_logits(r.ctx, 0, 0), size);
    for (int i = 0; i < 4; i++) {
        open_context(&r, batch[i], i);
        start_recording(&r, i == 0 ? &first : &other);
        feed(&r, tokens, N, N);
        EXPECT(memcmp(logits, lfm2_logits(r.ctx, 0, 0), size) == 0);
        struct recording *now = i == 0 ? &first : &other;
        qsort(now->r, (size_t)now->n, sizeof *now->r, by_name);
        expect_equal(now, &first);
        if (i > 0)
            forget(&other);
    }
    free(logits);
    forget(&first);
    rig_close(&r);
}
END_TEST

/* One row of a long text, by more threads than there are kv heads. */
START_TEST(a_row_that_looks_far_back_shows_the_same)
{
    enum { LONG = 300 };
    struct rig r = rig_open(kinds[0]);
    int32_t tokens[LONG];
    struct recording one, many;

    random_tokens(tokens, LONG, r.n_vocab);
    for (int i = 0; i < 2; i++) {
        open_context(&r, 64, i ? 4 : 1);
        feed(&r, tokens, LONG - 1, 0);
        start_recording(&r, i ? &many : &one);
        feed(&r, tokens + LONG - 1, 1, 1);
    }
    expect_equal(&many, &one);
    forget(&one);
    forget(&many);
    rig_close(&r);
}
END_TEST

START_TEST(a_hook_can_be_changed_and_taken_away)
{
    const int32_t tokens[3] = { 1, 2, 3 };
    struct rig r = rig_open(kinds[1]);
    struct recording a, b;
    int n;

    open_context(&r, 64, 2);
    ck_assert_int_eq(lfm2_trace(r.ctx, NULL, NULL, NULL), LFM2_OK);
    start_recording(&r, &a);
    feed(&r, tokens, 3, 1);
    n = a.n;
    start_recording(&r, &b);
    feed(&r, tokens, 3, 0);
    ck_assert(a.n == n && b.n > 0 && b.n < n + 6);
    ck_assert_int_eq(lfm2_trace(r.ctx, NULL, NULL, NULL), LFM2_OK);
    n = b.n;
    feed(&r, tokens, 3, 1);
    ck_assert_int_eq(b.n, n);
    forget(&a);
    forget(&b);
    rig_close(&r);
}
END_TEST

START_TEST(a_hook_can_cancel)
{
    struct rig r = rig_open(kinds[0]);
    int32_t tokens[N];
    struct recording all;
    const lfm2_span span = { 0, tokens, N, 1 };

    random_tokens(tokens, N, r.n_vocab);
    open_context(&r, 8, 2);
    start_recording(&r, &all);
    all.cancel = r.ctx;
    ck_assert_int_eq(lfm2_forward(r.ctx, &span, 1, NULL), LFM2_ECANCELLED);
    ck_assert(all.n >= 100);
    ck_assert_int_eq(lfm2_seq_len(r.ctx, 0), 0);
    ck_assert_int_eq(lfm2_forward(r.ctx, &span, 1, NULL), LFM2_OK);
    forget(&all);
    rig_close(&r);
}
END_TEST

Suite *trace_suite(void)
{
    Suite *s = suite_create("trace");
    TCase *c = tcase_create("trace");

    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, modules_have_the_official_names_in_order, 0,
                        (int)COUNT(kinds));
    tcase_add_test(c, every_record_tells_whose_it_is);
    tcase_add_loop_test(c, values_are_those_of_the_reference, 0, 2);
    tcase_add_loop_test(c, looking_changes_no_bit_and_every_cut_shows_the_same,
                        0, (int)COUNT(kinds));
    tcase_add_test(c, a_row_that_looks_far_back_shows_the_same);
    tcase_add_test(c, a_hook_can_be_changed_and_taken_away);
    tcase_add_test(c, a_hook_can_cancel);
    suite_add_tcase(s, c);
    return s;
}
