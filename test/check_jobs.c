/* Which sequence a job gets and what it need not read again, who waits for
 * whom, how prompts share a forward, and how much of a machine a control group
 * leaves: what no answer shows. */
#define _POSIX_C_SOURCE 200809L          /* as run.c does */

#define main run_main
#include "../run.c"
#undef main
#undef COUNT

#include "util.h"

#include <check.h>
#include <sys/stat.h>

enum { N_BATCH = 64, PIECE = 8, MAX_JOBS = 6, COMMON = 200 };

static struct settings settings;
static struct engine engine, *const e = &engine;
static struct job job[MAX_JOBS];

static void ignore(struct job *j)
{
    (void)j;
}

static const struct sink nobody = { ignore, ignore };

static void open_small(int n_seq)
{
    const struct tiny tiny = { .n_embd = 32, .words = 1 };
    struct bytes file = tiny_model(&tiny);
    char path[] = "/tmp/lfm2-jobs-XXXXXX";
    const int fd = mkstemp(path);

    settings = defaults;
    settings.mode = BATCH;
    settings.model = path;
    settings.template = TEMPLATE_NONE;
    settings.sandbox = SANDBOX_OFF;
    settings.threads = settings.no_mmap = settings.quiet = 1;
    settings.ctx = 400;
    settings.batch = N_BATCH;
    settings.piece = PIECE;
    settings.lookup = 0;
    ck_assert(fd >= 0 && write(fd, file.p, file.n) == (ssize_t)file.n);
    close(fd);
    *e = (struct engine){ .s = &settings };
    ck_assert_int_eq(open_engine(e), DONE);
    unlink(path);
    free(file.p);
    e->par.n_seq = n_seq;
    e->par.n_logits = n_seq + LOGITS_CHUNK;
    ck_assert_int_eq(open_context(e), DONE);
    /* so that COMMON tokens are more than a step, and no multiple of it */
    ck_assert_int_lt(lfm2_seq_step(e->ctx), COMMON);
    ck_assert_int_ne(COMMON % lfm2_seq_step(e->ctx), 0);
}

static void close_small(void)
{
    for (int i = 0; i < MAX_JOBS; i++) {
        free_reply(&job[i].r);
        free_request(&job[i].q);
        job[i] = (struct job){ .to = NULL };
    }
    close_engine(e);
}

/* Queue a prompt of n tokens: `same` of one text, the rest of another.  Texts
 * differ from their first token on. */
static void queue(struct job *j, int text, int same, int other, int n,
                  int limit)
{
    struct why why;

    free_reply(&j->r);
    free_request(&j->q);
    *j = (struct job){ .to = &nobody, .q = settings.ask };
    complete_request(e, &j->q);
    j->q.is_completion = j->q.ignore_eos = 1;
    j->q.sampling.temp = 0;
    j->q.limit = limit;
    j->q.prompt.id = zeroed((size_t)n, sizeof *j->q.prompt.id);
    for (int i = 0; i < n; i++)
        j->q.prompt.id[i] = ((i < same ? text : other) * 31 + i * i) % 250;
    j->q.prompt.n = n;
    ck_assert_int_eq(engine_add(e, j, &why), DONE);
}

static void move(void)
{
    ck_assert_int_eq(engine_step(e), DONE);
}

static void finish_all(void)
{
    for (int i = 0; e->jobs; i++) {
        ck_assert_int_lt(i, 1000);
        move();
    }
}

/* A prompt of one text, answered before anything else is asked. */
static struct reply *answer_text(struct job *j, int text, int n)
{
    queue(j, text, n, 0, n, 3);
    finish_all();
    ck_assert_int_eq(j->r.n_made, 3);
    return &j->r;
}

/* Is the answer that of a prompt which is read from its beginning?  Prompts
 * whose log probabilities are wanted are. */
static void expect_as_alone(const struct job *j)
{
    struct job *alone = &job[MAX_JOBS - 1];
    const struct ids *prompt = &j->q.prompt;

    queue(alone, 0, 1, 0, prompt->n, j->q.limit);
    memcpy(alone->q.prompt.id, prompt->id, (size_t)prompt->n * 4);
    alone->q.prompt_logprobs = 0;
    finish_all();
    ck_assert_int_eq(alone->r.n_reused, 0);
    ck_assert_uint_eq(alone->r.hash, j->r.hash);
    ck_assert_int_eq(shared_prefix(&alone->r.ids, &j->r.ids), j->r.ids.n);
}

/* ---------------------------------------------------------------- sequences */

START_TEST(an_empty_sequence_comes_first)
{
    const struct reply *a, *b, *c;

    open_small(3);
    a = answer_text(&job[0], 1, 40);
    b = answer_text(&job[1], 2, 40);
    c = answer_text(&job[2], 3, 40);
    ck_assert_int_ne(a->seq, b->seq);
    ck_assert_int_ne(a->seq, c->seq);
    ck_assert_int_ne(b->seq, c->seq);
    ck_assert_int_eq(e->slot[a->seq].cached.n, 42);   /* the last is not fed */
    ck_assert_int_eq(shared_prefix(&e->slot[a->seq].cached, &a->ids), 42);
}
END_TEST

START_TEST(a_text_goes_on_where_it_was)
{
    const struct reply *a, *again;

    open_small(3);
    a = answer_text(&job[0], 1, 40);
    answer_text(&job[1], 2, 40);
    again = answer_text(&job[2], 1, 40);
    ck_assert_int_eq(again->seq, a->seq);
    ck_assert_int_eq(again->n_reused, 39);            /* one gives logits    */
    ck_assert_uint_eq(again->hash, a->hash);
}
END_TEST

START_TEST(the_least_recently_used_makes_room)
{
    int a, b;

    open_small(2);
    a = answer_text(&job[0], 1, 40)->seq;
    b = answer_text(&job[1], 2, 40)->seq;
    ck_assert_int_eq(answer_text(&job[0], 1, 40)->seq, a);
    ck_assert_int_eq(answer_text(&job[2], 3, 40)->seq, b);
    ck_assert_int_eq(job[2].r.n_reused, 0);
    ck_assert_int_eq(answer_text(&job[1], 2, 40)->seq, a);
    ck_assert_int_eq(job[1].r.n_reused, 0);
}
END_TEST

/* What two texts share is copied, as far as the step of the conv state goes,
 * and the one that was there stays. */
START_TEST(the_longest_beginning_is_copied)
{
    struct reply *first = &job[0].r, *last = &job[2].r;

    open_small(4);
    queue(&job[0], 1, COMMON, 2, 300, 3);
    finish_all();
    queue(&job[1], 1, COMMON / 2, 3, 300, 3);
    finish_all();
    queue(&job[2], 1, COMMON, 4, 300, 3);
    finish_all();
    ck_assert_int_ne(last->seq, first->seq);
    ck_assert_int_ne(last->seq, job[1].r.seq);
    ck_assert_int_eq(last->n_reused,
                     COMMON - COMMON % lfm2_seq_step(e->ctx));
    ck_assert_int_eq(e->slot[first->seq].cached.n, 302);
    ck_assert_int_eq(shared_prefix(&e->slot[first->seq].cached, &first->ids),
                     302);
    expect_as_alone(&job[2]);
}
END_TEST

/* -------------------------------------------------------------------- turns */

/* The second job shares much with what the first is reading, and waits until
 * less than a step of that is left.  The third does not wait for the second. */
START_TEST(who_waits_keeps_back_nobody)
{
    open_small(3);
    queue(&job[0], 1, COMMON, 2, 300, 3);
    queue(&job[1], 1, COMMON, 3, 300, 3);
    queue(&job[2], 4, 40, 0, 40, 20);
    move();
    ck_assert_int_eq(job[0].state, ACTIVE);
    ck_assert_int_eq(job[1].state, WAITING);
    ck_assert_int_eq(job[2].state, ACTIVE);
    while (job[1].state == WAITING)
        move();
    ck_assert_int_lt(job[0].r.n_fed, 300);            /* no longer than that */
    ck_assert_int_gt(job[1].r.n_reused, COMMON - lfm2_seq_step(e->ctx));
    ck_assert_int_le(job[1].r.n_reused, COMMON);
    finish_all();
    for (int i = 0; i < 3; i++)
        expect_as_alone(&job[i]);
}
END_TEST

START_TEST(with_no_sequence_left_all_wait)
{
    open_small(1);
    queue(&job[0], 1, 40, 0, 40, 5);
    queue(&job[1], 2, 40, 0, 40, 5);
    queue(&job[2], 3, 40, 0, 40, 5);
    engine_drop(e, &job[1]);
    for (int i = 0; i < 5; i++) {
        ck_assert_int_eq(job[0].r.n_made, i);
        move();
        ck_assert_int_eq(job[2].state, WAITING);
    }
    ck_assert_int_eq(job[0].state, FINISHED);
    finish_all();
    ck_assert_int_eq(job[2].r.n_made, 5);
    ck_assert_int_eq(job[1].r.n_made, 0);             /* dropped unread      */
}
END_TEST

/* Whoever is dropped leaves the sequence, and what was read, to the next. */
START_TEST(what_was_read_outlives_its_job)
{
    open_small(1);
    queue(&job[0], 1, 300, 0, 300, 5);
    move();
    move();
    engine_drop(e, &job[0]);
    ck_assert_ptr_null(e->jobs);
    answer_text(&job[1], 1, 300);
    ck_assert_int_eq(job[1].r.n_reused, 2 * N_BATCH);
    expect_as_alone(&job[1]);
}
END_TEST

START_TEST(a_prompt_that_does_not_fit_is_refused)
{
    struct why why;

    open_small(1);
    answer_text(&job[0], 1, 40);
    job[0].q.prompt.n = 0;
    ck_assert_int_eq(engine_add(e, &job[0], &why), USAGE);
    job[0].q.prompt.n = settings.ctx + 1;
    ck_assert_int_eq(engine_add(e, &job[0], &why), TOO_LONG);
    job[0].q.prompt.n = 40;
    job[0].q.prompt.id[39] = -1;
    ck_assert_int_eq(engine_add(e, &job[0], &why), USAGE);
    ck_assert_ptr_null(e->jobs);
}
END_TEST

/* ------------------------------------------------------------------- pieces */

START_TEST(prompts_share_a_forward)
{
    open_small(2);
    queue(&job[0], 1, 40, 0, 40, 3);
    queue(&job[1], 2, 100, 0, 100, 3);
    move();
    ck_assert_int_eq(job[0].r.n_made, 1);
    ck_assert_int_eq(job[1].r.n_fed, N_BATCH - 40);
}
END_TEST

/* While anybody writes, a prompt is read in pieces: a token for its turn in the
 * forward, and PIECE more. */
START_TEST(prompts_are_read_in_pieces)
{
    int before = 0;

    open_small(2);
    queue(&job[0], 1, 10, 0, 10, 60);
    move();
    queue(&job[1], 2, 100, 0, 100, 3);
    for (int i = 2; before + PIECE + 1 < 100; i++) {
        move();
        ck_assert_int_eq(job[0].r.n_made, i);
        ck_assert_int_eq(job[1].r.n_fed, before + PIECE + 1);
        before = job[1].r.n_fed;
    }
    finish_all();
    expect_as_alone(&job[0]);
    expect_as_alone(&job[1]);
}
END_TEST

/* A token from every step, and the end while most of the prompt is still to be
 * read. */
START_TEST(an_answer_does_not_wait_for_a_long_prompt)
{
    int steps = 0;

    open_small(2);
    queue(&job[0], 1, 10, 0, 10, 12);
    queue(&job[1], 2, 300, 0, 300, 3);
    for (; job[0].state != FINISHED; steps++)
        move();
    ck_assert_int_eq(steps, 12);
    ck_assert_int_eq(job[1].r.n_fed, N_BATCH - 10 + 11 * (PIECE + 1));
    finish_all();
    expect_as_alone(&job[0]);
    expect_as_alone(&job[1]);
}
END_TEST

/* ----------------------------------------------------------- control groups */

static char tree[40], list[60];

static void make_tree(void)
{
    strcpy(tree, "/tmp/lfm2-groups-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(tree));
    snprintf(list, sizeof list, "%s/list", tree);
    group_root = tree;
    groups = list;
}

static void remove_tree(void)
{
    ck_assert_int_eq(system(phrase("rm -r '%s'", tree).s), 0);
}

/* A file of the tree, and the folders it is in. */
static void put_file(const char *name, const char *text)
{
    struct phrase path = phrase("%s/%s", tree, name);
    FILE *f;

    for (char *s = path.s + strlen(tree) + 1; (s = strchr(s, '/')); s++) {
        *s = '\0';
        mkdir(path.s, 0700);
        *s = '/';
    }
    f = fopen(path.s, "w");
    ck_assert(f && fputs(text, f) >= 0 && !fclose(f));
}

START_TEST(quotas_are_rounded_to_whole_cpus)
{
    static const struct { const char *text; double cpus; } cases[] = {
        { "100000 100000\n", 1 }, { "120000 100000\n", 1 },
        { "149999 100000\n", 1 }, { "150000 100000\n", 2 },
        { "250000 100000\n", 3 }, { "1000 100000\n", 1 },
        { "75000 50000\n", 2 }, { "max 100000\n", 0 }, { "0 100000\n", 0 },
        { "-1 100000\n", 0 }, { "200000\n", 0 }, { "200000 0\n", 0 },
        { "", 0 }, { "words\n", 0 }
    };

    ck_assert_double_eq(cpu_limit(tree), 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_file("cpu.max", cases[i].text);
        ck_assert_msg(cpu_limit(tree) == cases[i].cpus, "%s", cases[i].text);
    }
    put_file("cpu.cfs_period_us", "100000\n");       /* version 1           */
    put_file("cpu.cfs_quota_us", "-1\n");
    ck_assert_double_eq(cpu_limit(tree), 0);
    put_file("cpu.cfs_quota_us", "350000\n");
    ck_assert_double_eq(cpu_limit(tree), 4);
    put_file("cpu.cfs_period_us", "0\n");
    ck_assert_double_eq(cpu_limit(tree), 0);
}
END_TEST

START_TEST(the_least_limit_of_all_groups_counts)
{
    ck_assert_double_eq(least_limit(cpu_limit), 0);   /* not even a list     */
    put_file("list", "0::/a/b:c\n");
    ck_assert_double_eq(least_limit(cpu_limit), 0);
    put_file("a/b:c/cpu.max", "400000 100000\n");
    ck_assert_double_eq(least_limit(cpu_limit), 4);
    put_file("a/cpu.max", "max 100000\n");
    ck_assert_double_eq(least_limit(cpu_limit), 4);
    put_file("a/cpu.max", "300000 100000\n");
    ck_assert_double_eq(least_limit(cpu_limit), 3);
    put_file("a/other/cpu.max", "100000 100000\n");
    ck_assert_double_eq(least_limit(cpu_limit), 3);
    put_file("cpu.max", "200000 100000\n");
    ck_assert_double_eq(least_limit(cpu_limit), 2);
    put_file("cpu,cpuacct/x/cpu.cfs_quota_us", "100000\n");
    put_file("cpu,cpuacct/x/cpu.cfs_period_us", "100000\n");
    put_file("list", "nonsense\n12:memory:/\n4:cpu,cpuacct:/x/y\n0::/a/b:c\n");
    ck_assert_double_eq(least_limit(cpu_limit), 1);
    ck_assert_int_eq(usable_cpus(), 1);
    put_file("list", "0::/\n");
    put_file("cpu.max", "9000000 100000\n");
    ck_assert_int_eq(usable_cpus(), smaller(lfm2_n_cpus(), 64));
}
END_TEST

START_TEST(memory_is_what_the_group_has_left)
{
    put_file("memory.max", "max\n");
    put_file("memory.stat", "anon 300000\nfile 900000\n");
    ck_assert_double_eq(memory_left(tree), 0);
    put_file("memory.max", "1000000\n");
    ck_assert_double_eq(memory_left(tree), 700000);
    put_file("memory.max", "200000\n");
    ck_assert_double_eq(memory_left(tree), 1);        /* 0 is no limit       */
    put_file("memory.max", "max\n");
    put_file("memory.limit_in_bytes", "1000000\n");  /* version 1           */
    put_file("memory.stat", "rss 1\ntotal_rss 400000\n");
    ck_assert_double_eq(memory_left(tree), 600000);
}
END_TEST

/* ------------------------------------------------------------------- speeds */

/* By the tokens that were computed: neither those from the cache nor the first
 * of the answer, which comes with the prompt. */
START_TEST(speeds_are_of_what_was_computed)
{
    const struct request q = { .prompt = { NULL, 100 } };
    struct reply r = { .q = &q, .n_reused = 60, .n_made = 9, .n_sampled = 9,
                       .n_steps = 8, .started = 1, .read = 3, .ended = 7 };

    ck_assert_double_eq(prompt_speed(&r), 20);
    ck_assert_double_eq(answer_speed(&r), 2);
    r.n_steps = 3;                                    /* by guesses          */
    ck_assert_double_eq(answer_speed(&r), 2);
    r.n_sampled = 1;
    r.n_steps = 0;
    ck_assert(isnan(answer_speed(&r)));
    r.read = r.started;
    ck_assert(isnan(prompt_speed(&r)));
}
END_TEST

Suite *jobs_suite(void)
{
    Suite *suite = suite_create("jobs");
    TCase *t = tcase_create("jobs"), *speeds = tcase_create("speeds");
    TCase *limits = tcase_create("control groups");

    tcase_add_checked_fixture(t, NULL, close_small);
    tcase_add_test(t, an_empty_sequence_comes_first);
    tcase_add_test(t, a_text_goes_on_where_it_was);
    tcase_add_test(t, the_least_recently_used_makes_room);
    tcase_add_test(t, the_longest_beginning_is_copied);
    tcase_add_test(t, who_waits_keeps_back_nobody);
    tcase_add_test(t, with_no_sequence_left_all_wait);
    tcase_add_test(t, what_was_read_outlives_its_job);
    tcase_add_test(t, a_prompt_that_does_not_fit_is_refused);
    tcase_add_test(t, prompts_share_a_forward);
    tcase_add_test(t, prompts_are_read_in_pieces);
    tcase_add_test(t, an_answer_does_not_wait_for_a_long_prompt);
    suite_add_tcase(suite, t);
    tcase_add_checked_fixture(limits, make_tree, remove_tree);
    tcase_add_test(limits, quotas_are_rounded_to_whole_cpus);
    tcase_add_test(limits, the_least_limit_of_all_groups_counts);
    tcase_add_test(limits, memory_is_what_the_group_has_left);
    suite_add_tcase(suite, limits);
    tcase_add_test(speeds, speeds_are_of_what_was_computed);
    suite_add_tcase(suite, speeds);
    return suite;
}
