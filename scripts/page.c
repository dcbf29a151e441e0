/* page.c - the program behind the page, for WebAssembly.
 *
 * A server without sockets: scripts/page_worker.mjs puts the file into memory,
 * then hands over the bodies of requests as a browser would send them, and gets
 * the responses in the same bytes.  See make page. */
#include "../lfm2.h"

/* What run.c opens is in memory already. */
static const void *page_file;
static size_t page_size;

#define LFM2_PAGE
#define lfm2_model_open(out, path, load, err) \
    ((void)(load), lfm2_model_open_memory(out, page_file, page_size, err))
#define main run_main
#include "../run.c"

#define EXPORT(name) __attribute__((export_name(#name))) name
#define IMPORT(name) __attribute__((import_module("page"), import_name(#name)))

IMPORT(send) void page_send(const char *s, size_t n);

#ifdef __wasm_atomics__

#include <pthread.h>

struct page_worker page_worker[MAX_WORKERS];
int page_cpus = 1;

/* There will be n workers besides this one. */
void EXPORT(page_workers)(int n)
{
    page_cpus = n + 1;
    for (int i = 0; i < n; i++)
        atomic_store(&page_worker[i].state, WORKER_READY);
}

/* What the i-th of them does, for good. */
void EXPORT(page_thread)(int i)
{
    struct page_worker *w = &page_worker[i];

    for (;;) {
        while (atomic_load(&w->state) == WORKER_READY)
            PAGE_WAIT(&w->state, WORKER_READY);
        w->run(w->arg);
        atomic_store(&w->state, WORKER_READY);
        PAGE_WAKE(&w->state);
    }
}

#endif

static struct settings settings;
static struct server server;
static struct client client;
static struct text facts;
static unsigned *chosen;                  /* [n_layer][n_expert], how often  */

/* Which experts worked for the answer. */
static void count_experts(void *user, const lfm2_activation *a)
{
    const int n_expert = lfm2_model_config(server.e.model)->n_expert;

    (void)user;
    if (a->pos < client.choice->q.prompt.n ||
        !strstr(a->name, "selected_experts"))
        return;
    for (int i = 0; i < a->n; i++)
        chosen[a->layer * n_expert + (int)a->x[i]]++;
}

/* What the page shows of the model. */
static void tell_facts(const struct engine *e)
{
    const lfm2_config *c = lfm2_model_config(e->model);
    const lfm2_params p = lfm2_context_params(e->ctx);
    const struct sampling *is = &e->preset;
    const struct piece name = model_name(e);

    add_members(&facts, "{name: %.*s, template: %s, preset: %s, isa: %s, "
                "threads: %d, n_ctx: %d, n_layer: %d, n_expert: %d, "
                "n_layer_dense: %d, sampling: {temperature: %g, top_k: %d, "
                "top_p: %g, min_p: %g, repetition_penalty: %g}}",
                (int)name.n, name.s, template_name(e->template),
                find_preset(e->model)->name, isa_name(p.isa), p.n_threads,
                p.n_ctx, c->n_layer, c->n_expert, c->n_layer_dense, is->temp,
                is->top_k, is->top_p, is->min_p, is->repeat);
}

/* Room for a body. */
char *EXPORT(page_room)(size_t n)
{
    return zeroed(n + 1, 1);
}

/* Open the n bytes of a GGUF at `data`, which stay there.  The facts about it
 * as JSON, or NULL after a sentence on standard error. */
const char *EXPORT(page_open)(const void *data, size_t n, int n_threads,
                              int n_ctx)
{
    struct engine *e = &server.e;
    const lfm2_config *c;

    page_file = data;
    page_size = n;
    settings = defaults;
    settings.model = "the file";
    settings.mode = SERVE;
    settings.json = 1;                    /* so that answers have a hash     */
    settings.threads = n_threads;
    settings.batch = 128;                 /* and can be stopped soon         */
    settings.parallel = 1;                /* a page has one reader           */
    settings.ctx = n_ctx;
    e->s = &settings;
    if (open_engine(e) != DONE)
        return NULL;
    if (e->template == TEMPLATE_NONE) {
        say(USAGE, "the file: no chat template, so it is no model for a chat");
        return NULL;
    }
    e->par.n_ctx = smaller(n_ctx, lfm2_model_config(e->model)->n_ctx_train);
    if (open_context(e) != DONE)
        return NULL;
    c = lfm2_model_config(e->model);
    if (c->n_expert > 0) {
        chosen = zeroed((size_t)(c->n_layer * c->n_expert), sizeof *chosen);
        lfm2_trace(e->ctx, count_experts, NULL, NULL);
    }
    tell_facts(e);
    return facts.s;
}

/* What the command line tells with --json, and the choice of experts. */
static void send_origin(void)
{
    const lfm2_config *c = lfm2_model_config(server.e.model);
    struct text event = { 0 };

    add_string(&event, "{");
    add_origin(&server.e, &event, client.choice, 0);
    add_string(&event, ", \"experts\": [");
    for (int i = 0; chosen && i < c->n_layer * c->n_expert; i++)
        add_format(&event, "%s%u", i ? "," : "", chosen[i]);
    add_string(&event, "]}");
    send_event(&client, "data: ", event.s, event.n);
    free(event.s);
}

static int send_out(void)
{
    page_send(client.out.s, client.out.n);
    client.out.n = 0;
    return client.state == ANSWERING;
}

/* Begin to answer a body, which lies in room of its own. */
int EXPORT(page_ask)(char *body, size_t n)
{
    const lfm2_config *c = lfm2_model_config(server.e.model);

    if (chosen)
        memset(chosen, 0, (size_t)(c->n_layer * c->n_expert) * sizeof *chosen);
    server.now = seconds();
    client.server = &server;
    client.method = POST;
    client.route = routes;
    client.body = (struct text){ body, n, n + 1 };
    client.id = hash_number(random_seed(), ++server.n_requests);
    answer_request(&client);
    return send_out();
}

/* A forward; sends what has come of it.  1 while there is more to do. */
int EXPORT(page_step)(void)
{
    if (engine_step(&server.e) != DONE)
        finish_answer(&client, 500);
    server.now = seconds();
    if (client.state == ANSWERING && client.n_done == client.n_choices) {
        if (client.stream)
            send_origin();
        finish_answer(&client, DONE);
    }
    return send_out();
}

/* Enough of it.  What was said so far stays in the cache. */
void EXPORT(page_stop)(void)
{
    if (client.state != ANSWERING)
        return;
    engine_drop(&server.e, client.choice);
    send_origin();
    finish_request(&client);
    send_out();
}
