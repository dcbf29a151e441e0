/* The model, module by module, against traces of the official implementation
 * (transformers), which scripts/make_golden.py recorded. */
#include "../lfm2.h"

#include "util.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Both compute in float32, but sum in another order: 1e-5 is the most. */
#define BOUND 3e-5

enum { MAX_RECORDS = 512, MAX_TOKENS = 64, MAX_SEEN = 12 };

/* What a record tells of a vector: its first and last elements, min, max, mean
 * and root mean square. */
struct summary {
    double v[MAX_SEEN], rms;
    int n_values;
};

struct record {
    char name[80];
    int pos, n;
    struct summary s;
    double far;                           /* from ours; < 0: not seen yet    */
};

struct golden {
    struct record record[MAX_RECORDS];    /* in the order of computation     */
    int n_records;
    int32_t token[MAX_TOKENS];
    int n_tokens;
};

/* -------------------------------------------------------------- reading them
 *
 * One JSON object a line, always with the same keys, so looking for these is
 * enough. */

static const char *find_key(const char *line, const char *key)
{
    const char *at = strstr(line, key);

    EXPECT_MSG(at, "no %s in %.60s", key, line);
    return at + strlen(key);
}

static void add(struct summary *s, double x)
{
    EXPECT(s->n_values < MAX_SEEN);
    s->v[s->n_values++] = x;
}

static void read_list(struct summary *s, const char *at)
{
    char *end;

    do {
        add(s, strtod(at + 1, &end));
        at = end;
    } while (*at == ',');
    EXPECT_MSG(*at == ']', "no list: %.40s", at);
}

static void read_record(struct record *r, const char *line)
{
    const char *name = find_key(line, "\"name\":\"");
    const size_t n = strcspn(name, "\"");

    *r = (struct record){ .far = -1 };
    EXPECT(n < sizeof r->name);
    memcpy(r->name, name, n);
    r->pos = atoi(find_key(line, "\"pos\":"));
    r->n = atoi(find_key(line, "\"shape\":["));
    EXPECT(r->n > 0);
    read_list(&r->s, find_key(line, "\"first\":"));
    read_list(&r->s, find_key(line, "\"last\":"));
    add(&r->s, strtod(find_key(line, "\"min\":"), NULL));
    add(&r->s, strtod(find_key(line, "\"max\":"), NULL));
    add(&r->s, strtod(find_key(line, "\"mean\":"), NULL));
    r->s.rms = strtod(find_key(line, "\"l2\":"), NULL) / sqrt(r->n);
    EXPECT(r->s.rms > 0);
}

/* The first line is the header. */
static struct golden *read_golden(const char *path)
{
    struct golden *g = calloc(1, sizeof *g);
    static char line[2048];
    FILE *f = fopen(path, "r");
    int n = 0;

    EXPECT_MSG(f && g, "%s cannot be read", path);
    while (fgets(line, sizeof line, f)) {
        if (n++ == 0)
            continue;
        EXPECT(g->n_records < MAX_RECORDS);
        read_record(&g->record[g->n_records], line);
        if (strstr(line, "\"token\":")) {
            EXPECT(g->n_tokens < MAX_TOKENS);
            EXPECT(g->record[g->n_records].pos == g->n_tokens);
            g->token[g->n_tokens++] = atoi(find_key(line, "\"token\":"));
        }
        g->n_records++;
    }
    fclose(f);
    EXPECT(n > 100 && g->n_tokens > 0);
    return g;
}

/* ---------------------------------------------------------- comparing ours */

static struct summary summarise(const float *x, int n)
{
    struct summary s = { .n_values = 0 };
    const int few = n < 4 ? n : 4;
    double min = INFINITY, max = -INFINITY, sum = 0, squares = 0;

    for (int i = 0; i < n; i++) {
        min = fmin(min, (double)x[i]);
        max = fmax(max, (double)x[i]);
        sum += (double)x[i];
        squares += (double)x[i] * (double)x[i];
    }
    for (int i = 0; i < few; i++)
        add(&s, (double)x[i]);
    for (int i = n - few; i < n; i++)
        add(&s, (double)x[i]);
    add(&s, min);
    add(&s, max);
    add(&s, sum / n);
    s.rms = sqrt(squares / n);
    return s;
}

/* As scripts/compare_trace.py has it: the largest difference, relative to the
 * root mean square. */
static double distance(const struct summary *a, const struct summary *b)
{
    const double rms = fmax(a->rms, b->rms);
    double far = fabs(a->rms - b->rms) / rms;

    if (a->n_values != b->n_values)
        return INFINITY;
    for (int i = 0; i < a->n_values; i++)
        far = fmax(far, fabs(a->v[i] - b->v[i]) / rms);
    return far;
}

static void look(void *user, const lfm2_activation *a)
{
    struct golden *g = user;
    struct summary s;

    for (int i = 0; i < g->n_records; i++) {
        struct record *r = &g->record[i];
        if (r->pos != a->pos || strcmp(r->name, a->name) != 0)
            continue;
        s = summarise(a->x, a->n);
        r->far = r->n == a->n ? distance(&s, &r->s) : INFINITY;
    }
}

/* The first record that is further off than the bound, or was never seen. */
static const struct record *first_difference(const struct golden *g)
{
    for (int i = 0; i < g->n_records; i++)
        if (!(g->record[i].far >= 0 && g->record[i].far <= BOUND))
            return &g->record[i];
    return NULL;
}

/* All tokens through the model, with the hook. */
static void run(struct golden *g, struct bytes file, int n_batch, int n_threads)
{
    const lfm2_params p = { .n_ctx = MAX_TOKENS, .n_seq = 1,
                            .n_batch = n_batch, .n_logits = MAX_TOKENS,
                            .n_threads = n_threads, .kv_type = LFM2_KV_F32 };
    const lfm2_span span = { 0, g->token, g->n_tokens, g->n_tokens };
    lfm2_model *m;
    lfm2_context *ctx;
    lfm2_error err = { 0 };

    EXPECT_MSG(lfm2_model_open_memory(&m, file.p, file.n, &err) == 0, "%s",
               err.msg);
    EXPECT_MSG(lfm2_context_open(&ctx, m, &p, &err) == 0, "%s", err.msg);
    EXPECT_MSG(lfm2_trace(ctx, look, g, &err) == 0, "%s", err.msg);
    EXPECT_MSG(lfm2_forward(ctx, &span, 1, &err) == 0, "%s", err.msg);
    lfm2_context_close(ctx);
    lfm2_model_close(m);
    free(file.p);
}

/* --------------------------------------------------------------- the models */

/* MODELS in scripts/make_golden.py.  1.5 is the factor of the experts. */
static const struct edit scale[] = {
    { ADD, "lfm2moe.expert_weights_scale", T_F32, 0x3fc00000, NULL, 0 },
    { .kind = NO_EDIT }
};
static const struct { const char *path; struct tiny tiny; } models[] = {
    { "test/golden/lfm2.jsonl", { .seed = 21 } },
    { "test/golden/lfm2moe.jsonl",
      { .moe = 1, .seed = 22, .untied = 1, .edits = scale } }
};
enum { N_MODELS = COUNT(models) };

START_TEST(modules_compute_what_the_official_ones_do)
{
    static const struct { int n_batch, n_threads; } way[] = {
        { 1, 1 }, { 7, 2 }, { MAX_TOKENS, 1 }
    };
    const struct record *r;
    struct golden *g = read_golden(models[_i].path);

    for (size_t i = 0; i < COUNT(way); i++) {
        for (int k = 0; k < g->n_records; k++)
            g->record[k].far = -1;
        run(g, tiny_model(&models[_i].tiny), way[i].n_batch, way[i].n_threads);
        r = first_difference(g);
        EXPECT_MSG(!r, "batch %d: %s at position %d differs by %g",
                   way[i].n_batch, r->name, r->pos, r->far);
    }
    free(g);
}
END_TEST

/* ----------------------------------------------------------- planted errors */

#define LAYER "model.layers."

/* What is wrong in the file, and the module that shows it first. */
static const struct {
    int model;
    struct edit edit;
    const char *where;
} row[] = {
    { 0, { FILL, "token_embd_norm.weight", 0, 0x40800000, NULL, 0 },
      "model.embedding_norm" },
    { 0, { SET, "lfm2.attention.layer_norm_rms_epsilon", T_F32, 0x3a83126f,
           NULL, 0 }, LAYER "0.operator_norm" },
    { 0, { SET, "lfm2.rope.freq_base", T_F32, 0x461c4000, NULL, 0 },
      LAYER "1.self_attn.out_proj" },
    { 0, { FILL, "blk.1.attn_q_norm.weight", 0, 0x40000000, NULL, 0 },
      LAYER "1.self_attn.q_layernorm" },
    { 0, { FILL, "blk.2.shortconv.conv.weight", 0, 0x3f000000, NULL, 0 },
      LAYER "2.conv.conv" },
    { 0, { FILL, "blk.3.ffn_up.weight", 0, 0x3d000000, NULL, 0 },
      LAYER "3.feed_forward.w3" },
    { 1, { FILL, "blk.1.exp_probs_b.bias", 0, 0, NULL, 0 },
      LAYER "1.feed_forward.selected_experts" },
    { 1, { SET, "lfm2moe.expert_weights_scale", T_F32, 0x3f800000, NULL, 0 },
      LAYER "1.feed_forward.routing_weights" },
    { 1, { FILL, "blk.2.ffn_down_exps.weight", 0, 0x3d000000, NULL, 0 },
      LAYER "2.feed_forward.experts.0.w2" },
    { 1, { FILL, "output.weight", 0, 0x3d000000, NULL, 0 }, "lm_head" }
};

START_TEST(an_error_shows_where_it_is)
{
    struct golden *g = read_golden(models[row[_i].model].path);
    const struct edit edits[] = { row[_i].edit, scale[0], { .kind = NO_EDIT } };
    struct tiny t = models[row[_i].model].tiny;
    const struct record *r;

    t.edits = edits;
    run(g, tiny_model(&t), MAX_TOKENS, 1);
    r = first_difference(g);
    EXPECT_MSG(r && strcmp(r->name, row[_i].where) == 0, "%s, expected %s",
               r ? r->name : "nothing", row[_i].where);
    free(g);
}
END_TEST

Suite *golden_suite(void)
{
    Suite *s = suite_create("golden");
    TCase *t = tcase_create("golden");

    tcase_set_timeout(t, 120);
    tcase_add_loop_test(t, modules_compute_what_the_official_ones_do, 0,
                        N_MODELS);
    tcase_add_loop_test(t, an_error_shows_where_it_is, 0, COUNT(row));
    suite_add_tcase(s, t);
    return s;
}
