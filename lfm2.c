/* lfm2.c - Liquid AI's LFM2 language models in one C file.
 *
 * Opens a GGUF file of architecture `lfm2` (dense) or `lfm2moe` (mixture of
 * experts), maps it read-only, and offers one operation: append tokens to
 * sequences and compute the logits of the next token.  The interface is in
 * lfm2.h.  It needs only C11, libc and, unless compiled out, POSIX threads.
 *
 * All layers have this shape; they differ in the operator (short_conv or
 * attention) and in the feed-forward part (ffn or moe):
 *
 *      x ──┬── rms_norm(attn_norm) ── short_conv or attention ──(+)──┐
 *          └─────────────────────────────────────────────────────┘   │
 *      ┌─────────────────────────────────────────────────────────────┘
 *      └─┬── rms_norm(ffn_norm) ── ffn or moe ──(+)── x of the next layer
 *        └───────────────────────────────────────┘
 *
 * Before the first layer, x is a row of token_embd.  After the last one it is
 * normed once more and multiplied by the output matrix, usually token_embd
 * again; the result is the logits.
 *
 * The file, in the order it is meant to be read:
 *
 *   I    The model       1 data   2 what the machine provides   3 small blocks
 *                        4 the operators that mix time   5 feed-forward
 *                        6 forward
 *   II   The machine     7 exact arithmetic   8 threads, KV cache, lists of
 *                        experts   9 weight formats   10 matrix products, in
 *                        plain C   11, 12 the same with vectors   13 choosing
 *                        the kernels
 *   III  The file        14 reading bytes   15 GGUF   16 configuration
 *                        17 binding tensors   18 open and close
 *   IV   The state       19 memory of a context   20 lfm2_forward();
 *                        sequences: trim, copy, save, load   21 traces
 *   V    Words           22, 23 vocabulary   24 text to tokens   25 chat
 *                        26 sampling   27 Unicode classes
 *
 * Conventions.  Matrices are row-major; [rows][cols] beside a pointer is its
 * shape.  x is the residual stream, il a layer, n_* a count, me the running
 * thread; t is a row: of the batch, or of the piece or input named beside it.
 * Weights carry their GGUF names.
 *
 * The arithmetic contract.  The logits are the same bits on every CPU, with
 * every compiler, thread count, batch size, neighbour and cut of the prompt:
 *
 *   - IEEE binary32, round to nearest even, nothing flushed to zero.  Nothing
 *     is fused except calls of fma_f32().  exp, sin and cos are our own.
 *   - A matrix product rounds its input once per 32 columns to int8 with one
 *     float scale; integer dots are exact; their scaled values are added in
 *     ascending order of the columns by one chain of fma_f32().  Weights in
 *     F32, F16, BF16 and every norm use 16 chains (column mod 16) and one fixed
 *     tree instead.
 *   - Attention works in chunks of 256 absolute positions, merged in ascending
 *     order.  Masked positions are skipped, never added as zero.
 *   - Experts are chosen with ties to the lower index, weighted in the order of
 *     choice, and accumulated in ascending index.
 *
 * Every output element is computed by one thread in one order, so the result
 * does not depend on how the work is divided.
 *
 * To port: a C11 compiler with IEEE floats evaluated in their own precision is
 * enough, in any byte order and word size.  LFM2_NO_SIMD leaves out the vector
 * kernels (LFM2_AVX2_ONLY, those of newer CPUs), LFM2_NO_THREADS pthreads,
 * LFM2_NO_MMAP mmap and all of POSIX except threads. */

#ifndef KERNELS                           /* see section 11                  */

#ifdef __cplusplus
#error "this is C: compile it with a C compiler; C++ includes lfm2.h"
#include "a C compiler"                   /* stops the compiler here         */
#endif

/* The contract, whatever the compiler is told: no a*b+c is fused by itself, and
 * nothing is compiled that may reorder sums. */
#ifdef __clang__
#ifndef __wasm__                          /* not known there                 */
#pragma float_control(precise, on)
#endif
#pragma STDC FP_CONTRACT OFF
#elif defined __GNUC__
#pragma GCC optimize "fp-contract=off"
#endif
#if defined __FAST_MATH__ || defined __ASSOCIATIVE_MATH__ || \
    defined __RECIPROCAL_MATH__ || \
    (defined __FINITE_MATH_ONLY__ && __FINITE_MATH_ONLY__)
#error "-ffast-math, -Ofast and their parts change results: use -O3"
#endif

#define _POSIX_C_SOURCE 200809L
#define _GNU_SOURCE                       /* sched_getaffinity()             */
#define _DARWIN_C_SOURCE                  /* macOS: _SC_NPROCESSORS_ONLN     */
#define _FILE_OFFSET_BITS 64              /* on 32-bit machines, too         */

#include "lfm2.h"

#include <errno.h>
#include <fenv.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef LFM2_NO_MMAP
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
#ifdef LFM2_NO_THREADS                    /* one thread: nothing interferes  */
typedef volatile int atomic_int;
typedef volatile unsigned atomic_uint;
#define atomic_load(p)         (*(p))
#define atomic_store(p, x)     (*(p) = (x))
#define atomic_fetch_add(p, x) ((*(p) += (x)) - (x))
#define atomic_compare_exchange_weak(p, old, x) ((void)(old), *(p) = (x), 1)
#else
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>
#endif

#if defined __x86_64__ && defined __GNUC__ && !defined LFM2_NO_SIMD
#define LFM2_X86
#include <cpuid.h>
#include <immintrin.h>
#elif defined __aarch64__ && defined __ARM_NEON && defined __GNUC__ && \
    !defined __AARCH64EB__ && !defined LFM2_NO_SIMD
#define LFM2_ARM
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#elif defined __wasm_simd128__ && !defined LFM2_NO_SIMD
#define LFM2_WASM
#include <wasm_simd128.h>
#if defined __wasm_relaxed_simd__ && __clang_major__ >= 16
#define LFM2_RELAXED
#endif
#endif

#if FLT_EVAL_METHOD != 0
#error "floats must keep their own precision (i386: -msse2 -mfpmath=sse)"
#endif

/* =========================================================================
 * Part I.  The model
 * =========================================================================
 *
 * ------------------------------------------------------------------ 1. Data
 *
 * What the file holds (model, layers, tensors; all read-only), what a text
 * needs (sequences), and what one forward pass works with (context). */

/* A weight matrix as it lies in the file: [rows][cols], each row a whole number
 * of blocks of its format.  Expert tensors hold n_expert of these matrices, one
 * after the other. */
struct tensor {
    const struct format *fmt;
    int rows, cols;
    const uint8_t *data;
    const struct tensor *next;            /* read after this one, or NULL    */
    int module;                           /* traces: what it computes, and   */
    int first;                            /* where in it its rows begin      */
};

struct layer {
    const float *attn_norm;               /* [n_embd], before the operator   */
    const float *ffn_norm;                /* [n_embd], before the FFN        */

    /* a short convolution ... */
    struct tensor shortconv_in_proj;      /* [3 n_embd][n_embd]: rows b,c,x  */
    const float *shortconv_conv;          /* [l_cache][n_embd], newest last  */
    struct tensor shortconv_out_proj;     /* [n_embd][n_embd]                */

    /* ... or attention */
    struct tensor attn_q;                 /* [n_head    head_dim][n_embd]    */
    struct tensor attn_k, attn_v;         /* [n_head_kv head_dim][n_embd]    */
    struct tensor attn_output;            /* [n_embd][n_head head_dim]       */
    const float *attn_q_norm;             /* [head_dim], shared by all heads */
    const float *attn_k_norm;             /* [head_dim]                      */

    /* a dense feed-forward network ... */
    struct tensor ffn_gate, ffn_up;       /* [n_ff][n_embd]                  */
    struct tensor ffn_down;               /* [n_embd][n_ff]                  */

    /* ... or a mixture of experts */
    struct tensor ffn_gate_inp;           /* [n_expert][n_embd], the router  */
    const float *exp_probs_b;             /* [n_expert], only for choosing   */
    struct tensor ffn_gate_exps;          /* n_expert x [n_ff_expert][n_embd]*/
    struct tensor ffn_up_exps;            /* the same                        */
    struct tensor ffn_down_exps;          /* n_expert x [n_embd][n_ff_expert]*/

    int i_kind;                           /* earlier layers of the same kind */
};

#define MAX_WARNING 16

struct lfm2_model {
    lfm2_config cfg;
    const char *arch;                     /* "lfm2" or "lfm2moe"             */
    struct file *file;
    struct gguf *gguf;
    struct layer *layer;                  /* [n_layer]                       */
    struct tensor token_embd;             /* [n_vocab][n_embd]               */
    struct tensor output;                 /* the same, if it is tied         */
    const float *output_norm;             /* [n_embd]; see bind_tensors()    */
    float *floats;                        /* norms, taps, biases, converted  */
    double rope_root;                     /* rope_freq_base^(2/head_dim)     */
    int n_attn, n_conv;                   /* layers of either kind           */
    int n_warning;
    lfm2_error warning[MAX_WARNING];
};

/* A sequence: everything the model remembers of a text.
 *
 * The KV cache holds, for each attention layer and each kv head, K in tiles of
 * 64 positions, [tile][head_dim][64], so that the scores of a tile are sums of
 * contiguous rows, then V as [n_ctx][head_dim].
 *
 * A short convolution looks at the last l_cache columns of its gated input u.
 * The ring `u` keeps UNDO more, so that the last UNDO tokens can be taken back:
 * column p of the text is at p mod (UNDO + l_cache-1); columns before the text
 * are 0.  To go further back, the l_cache-1 columns before every multiple of
 * seq_step tokens are saved, too, as marks. */
enum { UNDO = 16, MAX_TAPS = 8 };

struct seq {
    int len;                              /* tokens                          */
    int start;                            /* length before a running forward */
    int oldest;                           /* first position still in u       */
    int span;                             /* number of its span, or -1       */
    uint8_t *kv;
    float *u;                             /* [n_conv][UNDO+l_cache-1][n_embd]*/
    float *marks;                         /* [1 + n_ctx/seq_step][n_conv]
                                             [l_cache-1][n_embd]; the first
                                             has the columns before `start`  */
};

/* 32 columns of a row, rounded: x ~ d q.  For weights with a minimum or an
 * offset, sum has the sums of q over 16 columns each, and s = d (sum of q). */
struct q8_group {
    int8_t q[32];
    float d, s;
    int16_t sum[2];
};

/* The input of a matrix product: n rows, in f as floats (for weights in floats)
 * and in q rounded (for all others).  Row i is element row[i] of these arrays,
 * or first + i if row is NULL; its output is row first + i. */
struct input {
    int n, cols;
    const int *row;                       /* [n], or NULL                    */
    float *f;                             /* [rows][cols]                    */
    struct q8_group *q;                   /* [rows][cols/32]                 */
    int first;
};

/* A piece of a span: n rows of the batch, which continue one sequence. */
struct piece { int seq, pos, row, n; };

/* A row of the batch: one token of one sequence, or an embedding in its place,
 * and what the caller wants of it. */
enum { NOTHING, STATE, LOGITS };          /* state: the last normed x        */

struct row {
    int seq, pos;
    int32_t token;                        /* -1 where there is embd          */
    const float *embd;                    /* [n_embd], or NULL               */
    int wanted;
};

/* One pass: at most n_batch rows, cut from the spans in order. */
struct batch {
    int n_rows, n_pieces;
    struct row *row;                      /* [n_rows]                        */
    struct piece *piece;                  /* [n_seq]                         */
    float *rope;                          /* [n_rows][2][head_dim/2] cos, sin*/
};

/* Which experts work for which rows.  A slot is one row and one expert that it
 * chose; slots are sorted by expert. */
struct routing {
    float *score;                         /* [n_rows][n_expert]              */
    int *chosen;                          /* [n_rows][n_expert_used]         */
    float *weight;                        /* [n_rows][n_expert_used]         */
    int *slot_row;                        /* [slots]                         */
    float *slot_weight;                   /* [slots]                         */
    int *slot_begin;                      /* [n_expert+1] bounds of groups   */
    int *active, n_active;                /* experts that any row chose      */
    struct tensor *gate, *up, *down;      /* [n_active] their matrices       */
};

struct lfm2_context {
    const lfm2_model *model;
    lfm2_params par;
    const struct isa *isa;                /* the kernels for this CPU        */
    struct pool *pool;
    struct thread *thread;                /* [n_threads]; 0 is the caller    */
    atomic_uint taken;                    /* dynamic units, by next_piece()  */
    atomic_int cancel;
    int stop;                             /* cancelled, as all threads see it*/
    void *memory;                         /* most of what follows lies there */
    uint64_t row_work;                    /* multiply-adds for one row       */
    int seq_step;
    struct seq *seq;                      /* [n_seq]                         */
    struct batch batch;
    struct routing routing;

    float *x;                             /* [n_rows][n_embd] residual       */
    float *q;                             /* [n_rows][n_head][head_dim], the
                                             memory of heads.f               */
    float *k, *v;                         /* [n_rows][n_head_kv][head_dim]   */
    float *y;                             /* [n_rows][n_embd] sum of experts */

    /* what is multiplied by a matrix; some share their memory */
    struct input in;                      /* [n_rows][n_embd], x normed      */
    struct input mixed;                   /* [n_rows][n_embd], convolved     */
    struct input heads;                   /* [n_rows][n_head head_dim]       */
    struct input hidden;                  /* [n_rows][n_ff]                  */
    struct input hidden_exps;             /* [slots][n_ff_expert]            */

    float *logits;                        /* [n_logits][n_vocab]             */
    float *states;                        /* [n_seq][n_embd], normed         */
    int n_logits;                         /* rows of them computed so far    */
    struct result *results;               /* [n_spans] where their parts are */
    int n_spans;
    struct candidate *candidates;         /* [n_vocab], see section 26       */

    lfm2_trace_fn *hook;                  /* NULL: no tracing                */
    void *hook_user;
    float *traced;                        /* see section 21                  */
    struct exercise *exercise;            /* see lfm2_exercise()             */
};

/* ------------------------------------------ 2. What the machine provides
 *
 * Enough to read Part I.  The definitions are in Part II, those of u_column()
 * and conv_mark() in section 20, those for traces in section 21. */

static float fma_f32(float a, float b, float c);    /* a*b+c, rounded once   */
static float exp_f32(float x);
static void  sin_cos(double a, float *s, float *c);

enum { UNIT = 32 };                       /* columns rounded together; n_embd
                                             and n_ff are multiples of it    */

/* Column `pos` of u in the i_conv-th convolution, [n_embd]; and the mark after
 * `pos` tokens, [n_conv][l_cache-1][n_embd], or NULL if there is none. */
static float *u_column(const lfm2_context *ctx, const struct seq *s,
                       int i_conv, int pos);
static float *conv_mark(const lfm2_context *ctx, const struct seq *s, int pos);

/* The cache of one kv head in one layer, and element d of a K or V in it. */
struct kv_head {
    uint8_t *k;                           /* [n_ctx/TILE][head_dim][TILE]    */
    uint8_t *v;                           /* [n_ctx][head_dim]               */
    int f16, head_dim;
};
enum { KEY, VALUE };
static struct kv_head kv_head_at(const lfm2_context *ctx,
                                 const struct seq *s, int i_attn, int head);
static void kv_store(const struct kv_head *kv, int pos, const float *k,
                     const float *v);
static float kv_get(const struct kv_head *kv, int what, int pos, int d);

struct attn_partial;
struct attn_rows;

/* Working memory of one thread. */
struct scratch {
    float *out[3];                        /* [n_batch][UNIT], for product()  */
    struct attn_partial *partial;         /* see attend_rows()               */

    /* rows of weights, unpacked: one row, or in section 12 a panel */
    uint8_t *q;                           /* cols x panel rows               */
    float *d, *m;                         /* groups x 2 x panel rows         */
    float *f;                             /* cols x UNIT, for floats         */
    float *chain;                         /* [MOST_X_ROWS][UNIT][16] sums    */

    /* an input of few rows as section 12 reads it, until the next barrier */
    struct input *arranged;
    uint8_t *x;                           /* [rows][cols/32] x GROUP_BYTES   */

    float *tile;                          /* [TILE][head_dim] of K or V, and
                                             TILE more floats of room        */
    float *score;                         /* [queries][CHUNK]                */
};

/* The kernels of one instruction set; all sets give the same bits.  Those in
 * plain C are in the table `scalar`, at the end of section 10. */
struct isa {
    int panel_rows;                       /* see section 12                  */
    float (*dot)(const float *a, const float *b, int n);
    void (*quantize)(struct q8_group *to, const float *x);
    void (*swiglu)(float *gate, const float *up, int n);
    void (*add_scaled)(float *y, float a, const float *x, int n);
    void (*rope)(float *head, const float *turn, int head_dim);
    void (*conv_step)(float *y, float *const *u, const float *w, const float *b,
                      const float *c, float *x, int l_cache, size_t n);
    void (*attend_chunk)(struct attn_partial *part, const struct attn_rows *a,
                         const struct kv_head *kv, int pos,
                         const struct scratch *s);
    void (*product)(float *out, const struct tensor *w, int first, int n_rows,
                    const struct input *in, const struct scratch *s,
                    const uint8_t *end, const uint8_t *next);
};

struct range { int first, last; };        /* first .. last-1                 */

/* Every thread of a context runs the model.  Each does its share, and waits at
 * a barrier where it needs results of the others. */
struct thread {
    lfm2_context *ctx;
    int id, of;                           /* this one, of how many           */
    struct scratch s;
    struct input arranged;                /* see struct scratch              */

    struct range now, then;               /* units it took, see take_units() */
    int is_taking;
    unsigned taken_before;                /* ctx->taken when this loop began */
};

/* share() is this thread's fixed share of n things.  take_units() takes a few
 * of n units until none are left, so that a slow thread gets fewer. */
static struct range share(struct thread *me, int n);
static int take_units(struct thread *me, int n, struct range *some);
static void barrier(struct thread *me);

/* Row r of w as floats: out[w->cols]. */
static void get_row(float *out, const struct tensor *w, int r);

/* Matrix products are computed in units: 32 rows of w, whose outputs are one
 * group of the next input.  product() computes unit u for all rows of the input
 * into the thread's buffer out[to], [in->n][UNIT], and returns it. */
static int n_units(const struct tensor *w);
static float *product(struct thread *me, int to, const struct tensor *w,
                      int u, const struct input *in);

/* This thread's share of y = in w^T, [in->n][w->rows], or of y += in w^T. */
enum { ASSIGN, INCREASE };
static void matmul(struct thread *me, int how, float *y,
                   const struct tensor *w, const struct input *in);

/* `rows` rows of w from `first` on, and the e-th matrix of an expert tensor. */
static struct tensor rows_of(const struct tensor *w, int first, int rows);
static struct tensor expert(const struct tensor *w, int e);

/* set_unit() stores unit u of n rows, [n][UNIT], the first of which is `row`,
 * and rounds it.  round_rows() rounds this thread's share of in->f. */
static void set_unit(struct thread *me, struct input *in, int row, int n,
                     int u, const float *unit);
static void round_rows(struct thread *me, struct input *in);

/* ctx->q = softmax(q k^T) v, made of attend_query() and merge_chunk(). */
static void attend(struct thread *me, const struct layer *l);

/* Sort the slots by expert, and bind the matrices of those in use. */
static void group_by_expert(lfm2_context *ctx, const struct layer *l);

/* For lfm2_trace(); without it these do nothing.  product() and keep() store
 * numbers of a row; trace() reports the modules first .. last of a layer, and
 * trace_rows() the rows of y, [n_rows][n].  w1 is gate, w3 up, w2 down.  Names
 * of modules in a layer begin with LAYER; elsewhere il is -1. */
#define LAYER "model.layers.%d"

enum module {
    NOT_TRACED, CONV_IN_PROJ, CONV_CONV, CONV_OUT_PROJ, ATTN_Q, ATTN_K, ATTN_V,
    ATTN_Q_NORM, ATTN_K_NORM, ATTN_OUT, FFN_W1, FFN_W3, FFN_W2, MOE_GATE,
    MOE_CHOSEN, EXPERT_W1, EXPERT_W3, EXPERT_W2, N_MODULES
};
static void keep(const lfm2_context *ctx, int module, int row, int col,
                 const float *x, int n);
static void trace(struct thread *me, const struct layer *l, int first,
                  int last);
static void trace_rows(struct thread *me, int il, const char *module,
                       const float *y, int n);
static void trace_moe(struct thread *me, const struct layer *l);

/* --------------------------------------------------------- 3. Small blocks
 *
 * Plain C defines them.  Where speed matters, the model calls ctx->isa instead,
 * the kernels for this CPU, which give the same bits. */

/* y = x / sqrt(mean(x^2) + eps) * w.  y may be x. */
static void rms_norm(const struct isa *isa, float *y, const float *x,
                     const float *w, int n, float eps)
{
    float scale = 1.0f / sqrtf(isa->dot(x, x, n) / (float)n + eps);

    for (int i = 0; i < n; i++)
        y[i] = x[i] * scale * w[i];
}

static float sigmoid(float x)
{
    return 1.0f / (1.0f + exp_f32(-x));
}

/* SwiGLU: gate = silu(gate) * up, where silu(x) = x sigmoid(x). */
static void swiglu(float *gate, const float *up, int n)
{
    for (int i = 0; i < n; i++)
        gate[i] = gate[i] / (1.0f + exp_f32(-gate[i])) * up[i];
}

/* y += a x */
static void add_scaled(float *y, float a, const float *x, int n)
{
    for (int i = 0; i < n; i++)
        y[i] = fma_f32(a, x[i], y[i]);
}

/* Rotary position embedding.  Dimensions i and i + head_dim/2 of a head (the
 * "NEOX" pairing) are a point in the plane, rotated by pos base^(-2i/head_dim).
 * turn has the cosines for this position, [head_dim/2], then the sines. */
static void rope(float *head, const float *turn, int head_dim)
{
    const int half = head_dim / 2;
    const float *c = turn, *s = turn + half;

    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i]        = fma_f32(a, c[i], -(b * s[i]));
        head[i + half] = fma_f32(b, c[i], a * s[i]);
    }
}

/* ------------------------------------------ 4. The operators that mix time
 *
 * Everything else in the model looks at one token at a time.  These two carry
 * information from token to token, so they work sequence by sequence.
 *
 * When an operator begins, all threads can read its input.  It ends with a
 * barrier, after which all can read its output. */

/* One step of a short convolution, for one unit of channels; with three taps:
 *
 *     u[2] = b * x                               gate on the way in
 *     v    = w[0] u[0] + w[1] u[1] + w[2] u[2]   per channel, causal
 *     y    = c * v                               gate on the way out
 *
 * u[0] is the oldest column, u[l_cache-1] the new one.  y may be c, and x
 * becomes v.  The taps, rows of w, are n apart. */
static void conv_step(float *y, float *const *u, const float *w, const float *b,
                      const float *c, float *x, int l_cache, size_t n)
{
    const size_t last = (size_t)l_cache - 1;

    for (size_t i = 0; i < UNIT; i++) {
        u[last][i] = b[i] * x[i];
        float v = w[i] * u[0][i];
        for (size_t k = 1; k <= last; k++)
            v = fma_f32(w[k * n + i], u[k][i], v);
        x[i] = v;
        y[i] = c[i] * v;
    }
}

/* Convolve the channels of unit u in row t of a piece.  b, c and x, [UNIT], are
 * those of the row; x becomes v, and c the result. */
static void convolve(struct thread *me, const struct layer *l, int u,
                     const struct piece *p, int t, const float *b, float *c,
                     float *x)
{
    const lfm2_context *ctx = me->ctx;
    const struct seq *s = &ctx->seq[p->seq];
    const int l_cache = ctx->model->cfg.l_cache, last = l_cache - 1;
    const size_t n = (size_t)ctx->model->cfg.n_embd, first = (size_t)u * UNIT;
    float *mark = conv_mark(ctx, s, p->pos + t + 1), *column[MAX_TAPS];

    for (int k = 0; k <= last; k++)
        column[k] = u_column(ctx, s, l->i_kind, p->pos + t - last + k) + first;
    ctx->isa->conv_step(c, column, l->shortconv_conv + first, b, c, x, l_cache,
                        n);
    for (int k = 0; mark && k < last; k++)
        memcpy(mark + ((size_t)l->i_kind * last + k) * n + first,
               column[k + 1], UNIT * sizeof *mark);
    keep(ctx, CONV_CONV, p->row + t, u * UNIT, x, UNIT);
}

/* The short convolution, LFM2's own way to mix time.  For each token
 *
 *     b, c, x = in_proj h                          three vectors of n_embd
 *     y       = out_proj (c * conv(b * x))
 *
 * with a convolution of l_cache = 3 taps per channel: the whole memory of the
 * layer is the last two columns of b * x, however long the text.  A thread
 * computes the same channels of b, c and x, and so needs no barrier between. */
static void short_conv(struct thread *me, const struct layer *l)
{
    lfm2_context *ctx = me->ctx;
    const int n = ctx->model->cfg.n_embd;
    const struct tensor in_b = rows_of(&l->shortconv_in_proj, 0, n);
    const struct tensor in_c = rows_of(&l->shortconv_in_proj, n, n);
    const struct tensor in_x = rows_of(&l->shortconv_in_proj, 2 * n, n);
    struct range some;

    while (take_units(me, n_units(&in_b), &some))
        for (int u = some.first; u < some.last; u++) {
            float *b = product(me, 0, &in_b, u, &ctx->in);
            float *c = product(me, 1, &in_c, u, &ctx->in);
            float *x = product(me, 2, &in_x, u, &ctx->in);
            for (int i = 0; i < ctx->batch.n_pieces; i++) {
                const struct piece *p = &ctx->batch.piece[i];
                for (int t = 0; t < p->n; t++) {
                    const size_t at = (size_t)(p->row + t) * UNIT;
                    convolve(me, l, u, p, t, b + at, c + at, x + at);
                }
            }
            set_unit(me, &ctx->mixed, 0, ctx->mixed.n, u, c);
        }
    barrier(me);
    matmul(me, INCREASE, ctx->x, &l->shortconv_out_proj, &ctx->mixed);
    barrier(me);
    trace(me, l, CONV_IN_PROJ, CONV_OUT_PROJ);
}

/* Attention looks at positions in chunks of CHUNK, which decide how sums are
 * associated. */
enum { CHUNK = 256, MAX_HEAD_DIM = 256 };

/* The attention of one query to some positions: their values weighted by
 * e^score, relative to the largest score. */
struct attn_partial {
    float max, sum;
    float o[MAX_HEAD_DIM];                /* [head_dim]                      */
};

/* The sum of 16 chains, always in this order. */
static float sum_16(float a[16])
{
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            a[i] += a[i + half];
    return a[0];
}

/* One query and the n positions, from `pos` on, that it sees of a chunk:
 *
 *     s = q . k,   p = e^(s - max s),   sum = sum of p,   o = sum of p v    */
static void attend_query(struct attn_partial *part, const float *q,
                         const struct kv_head *kv, int pos, int n)
{
    const int hd = kv->head_dim;
    float s[CHUNK] = { 0 }, lane[16] = { 0 };

    part->max = -INFINITY;
    for (int i = 0; i < n; i++) {
        for (int d = 0; d < hd; d++)
            s[i] = fma_f32(q[d], kv_get(kv, KEY, pos + i, d), s[i]);
        part->max = s[i] > part->max ? s[i] : part->max;
    }
    memset(part->o, 0, (size_t)hd * sizeof *part->o);
    for (int i = 0; i < n; i++) {
        const float p = exp_f32(s[i] - part->max);
        lane[i % 16] += p;
        for (int d = 0; d < hd; d++)
            part->o[d] = fma_f32(p, kv_get(kv, VALUE, pos + i, d), part->o[d]);
    }
    part->sum = sum_16(lane);
}

/* Add a later chunk b to a, both relative to the larger maximum:
 *
 *     w   = e^(max - larger max)                 for each of the two
 *     sum = a.sum wa + b.sum wb,  o = a.o wa + b.o wb                       */
static void merge_chunk(const struct isa *isa, struct attn_partial *a,
                        const struct attn_partial *b, int hd)
{
    float max = b->max > a->max ? b->max : a->max;
    float wa = a->max < max ? exp_f32(a->max - max) : 1;
    float wb = b->max < max ? exp_f32(b->max - max) : 1;

    a->max = max;
    a->sum = fma_f32(b->sum, wb, a->sum * wa);
    for (int d = 0; d < hd; d++)
        a->o[d] = a->o[d] * wa;
    isa->add_scaled(a->o, wb, b->o, hd);
}

/* Norm and rotate one k head of row t of a piece and the q heads that share it;
 * store k and v in the cache.  q is divided by sqrt(head_dim) here, so that a
 * score is just q . k. */
static void prepare_heads(struct thread *me, const struct layer *l,
                          const struct piece *p, int t, int head)
{
    lfm2_context *ctx = me->ctx;
    const lfm2_config *c = &ctx->model->cfg;
    const int hd = c->head_dim, group = c->n_head / c->n_head_kv;
    const int row = p->row + t;
    const float *turn = ctx->batch.rope + (size_t)row * hd;
    const float scale = 1.0f / sqrtf((float)hd);
    const struct kv_head kv = kv_head_at(ctx, &ctx->seq[p->seq], l->i_kind,
                                         head);
    float *k = ctx->k + ((size_t)row * c->n_head_kv + head) * hd;
    float *v = ctx->v + ((size_t)row * c->n_head_kv + head) * hd;

    rms_norm(ctx->isa, k, k, l->attn_k_norm, hd, c->norm_rms_eps);
    keep(ctx, ATTN_K_NORM, row, head * hd, k, hd);
    ctx->isa->rope(k, turn, hd);
    kv_store(&kv, p->pos + t, k, v);
    for (int h = head * group; h < (head + 1) * group; h++) {
        float *q = ctx->q + ((size_t)row * c->n_head + h) * hd;
        rms_norm(ctx->isa, q, q, l->attn_q_norm, hd, c->norm_rms_eps);
        keep(ctx, ATTN_Q_NORM, row, h * hd, q, hd);
        ctx->isa->rope(q, turn, hd);
        for (int d = 0; d < hd; d++)
            q[d] *= scale;
    }
}

/* Grouped-query attention.  For each token
 *
 *     q, k, v = attn_q h, attn_k h, attn_v h
 *     q, k    = rope(rms_norm(q)), rope(rms_norm(k))          head by head
 *     y       = attn_output (softmax(q k^T / sqrt(head_dim)) v)
 *
 * over all tokens up to this one; a kv head serves a group of query heads. */
static void attention(struct thread *me, const struct layer *l)
{
    lfm2_context *ctx = me->ctx;
    const struct batch *b = &ctx->batch;
    int turn = 0;

    matmul(me, ASSIGN, ctx->q, &l->attn_q, &ctx->in);
    matmul(me, ASSIGN, ctx->k, &l->attn_k, &ctx->in);
    matmul(me, ASSIGN, ctx->v, &l->attn_v, &ctx->in);
    barrier(me);
    for (int i = 0; i < b->n_pieces; i++)
        for (int t = 0; t < b->piece[i].n; t++)
            for (int head = 0; head < ctx->model->cfg.n_head_kv; head++)
                if (turn++ % me->of == me->id)
                    prepare_heads(me, l, &b->piece[i], t, head);
    barrier(me);
    attend(me, l);
    barrier(me);
    round_rows(me, &ctx->heads);          /* heads.f is q                    */
    barrier(me);
    matmul(me, INCREASE, ctx->x, &l->attn_output, &ctx->heads);
    barrier(me);
    trace(me, l, ATTN_Q, ATTN_OUT);
}

/* --------------------------------------------------------- 5. Feed-forward */

/* This thread's units of hidden = silu(gate x) * (up x). */
static void gated(struct thread *me, struct input *hidden,
                  const struct tensor *gate, const struct tensor *up,
                  const struct input *x)
{
    struct range some;

    while (take_units(me, n_units(gate), &some))
        for (int u = some.first; u < some.last; u++) {
            float *g = product(me, 0, gate, u, x);
            float *h = product(me, 1, up, u, x);
            me->ctx->isa->swiglu(g, h, x->n * UNIT);
            set_unit(me, hidden, x->first, x->n, u, g);
        }
}

/* The dense network: x += down (silu(gate h) * (up h)). */
static void ffn(struct thread *me, const struct layer *l)
{
    lfm2_context *ctx = me->ctx;

    gated(me, &ctx->hidden, &l->ffn_gate, &l->ffn_up, &ctx->in);
    barrier(me);
    matmul(me, INCREASE, ctx->x, &l->ffn_down, &ctx->hidden);
    barrier(me);
    trace(me, l, FFN_W1, FFN_W2);
}

/* Choose the experts of one row:
 *
 *     s      = sigmoid(router x)
 *     chosen = the n_expert_used largest of s + exp_probs_b, lower index first
 *     weight = s[chosen] / (sum of s[chosen] + 1e-6)
 *
 * The bias, learnt to balance the load, affects the choice, not the weights. */
static void route(const lfm2_config *c, const float *bias, float *score,
                  int *chosen, float *weight)
{
    float sum = 0;

    for (int e = 0; e < c->n_expert; e++)
        score[e] = sigmoid(score[e]);
    for (int i = 0; i < c->n_expert_used; i++) {
        int best = -1;
        for (int e = 0; e < c->n_expert; e++) {
            int taken = 0;
            for (int j = 0; j < i; j++)
                taken |= chosen[j] == e;
            if (!taken &&
                (best < 0 || score[e] + bias[e] > score[best] + bias[best]))
                best = e;
        }
        chosen[i] = best;
        weight[i] = score[best];
        sum += score[best];
    }
    for (int i = 0; i < c->n_expert_used; i++)
        weight[i] = weight[i] / (sum + 1e-6f) * c->expert_weights_scale;
}

/* The rows of x that chose the i-th expert in use. */
static struct input choosers(const struct routing *r, const struct input *x,
                             int i)
{
    const int *begin = &r->slot_begin[r->active[i]];
    struct input some = *x;

    some.first = begin[0];
    some.n = begin[1] - begin[0];
    some.row = r->slot_row + begin[0];
    return some;
}

/* The last step of moe() for some units of x: add up what the experts in use
 * give, in ascending order. */
static void add_experts(struct thread *me, const struct layer *l,
                        struct range some)
{
    lfm2_context *ctx = me->ctx;
    const struct routing *r = &ctx->routing;
    const size_t n = (size_t)l->ffn_down_exps.rows;
    const size_t first = (size_t)some.first * UNIT;
    const size_t width = (size_t)some.last * UNIT - first;

    for (size_t t = 0; t < (size_t)ctx->batch.n_rows; t++)
        memset(ctx->y + t * n + first, 0, width * sizeof *ctx->y);
    for (int i = 0; i < r->n_active; i++) {
        struct input h = choosers(r, &ctx->hidden_exps, i);
        h.row = NULL;                     /* its rows are slots              */
        for (int u = some.first; u < some.last; u++) {
            const float *out = product(me, 0, &r->down[i], u, &h);
            for (int s = h.first; s < h.first + h.n; s++, out += UNIT)
                ctx->isa->add_scaled(ctx->y + (size_t)r->slot_row[s] * n +
                                     (size_t)u * UNIT, r->slot_weight[s], out,
                                     UNIT);
        }
    }
    for (size_t t = 0; t < (size_t)ctx->batch.n_rows; t++)
        for (size_t j = t * n + first; j < t * n + first + width; j++)
            ctx->x[j] += ctx->y[j];
}

/* Mixture of experts: each row goes to the few networks e that the router
 * chooses for it,
 *
 *     x += sum over e of weight[e] * down_e (silu(gate_e h) * (up_e h))
 *
 * expert by expert, so that the weights of one are read once for all the rows
 * that chose it. */
static void moe(struct thread *me, const struct layer *l)
{
    lfm2_context *ctx = me->ctx;
    struct routing *r = &ctx->routing;
    const lfm2_config *c = &ctx->model->cfg;
    const struct range rows = share(me, ctx->batch.n_rows);
    struct range units;

    matmul(me, ASSIGN, r->score, &l->ffn_gate_inp, &ctx->in);
    barrier(me);
    for (size_t t = (size_t)rows.first; t < (size_t)rows.last; t++)
        route(c, l->exp_probs_b, r->score + t * (size_t)c->n_expert,
              r->chosen + t * (size_t)c->n_expert_used,
              r->weight + t * (size_t)c->n_expert_used);
    barrier(me);
    if (me->id == 0)
        group_by_expert(ctx, l);
    barrier(me);
    for (int i = 0; i < r->n_active; i++) {
        const struct input some = choosers(r, &ctx->in, i);
        gated(me, &ctx->hidden_exps, &r->gate[i], &r->up[i], &some);
    }
    barrier(me);
    while (take_units(me, n_units(&l->ffn_down_exps), &units))
        add_experts(me, l, units);
    barrier(me);
    trace_moe(me, l);
}

/* -------------------------------------------------------------- 6. Forward */

/* x = embeddings of the tokens; rope = the rotations for their positions. */
static void embed(struct thread *me)
{
    lfm2_context *ctx = me->ctx;
    const struct batch *b = &ctx->batch;
    const lfm2_config *c = &ctx->model->cfg;
    const int half = c->head_dim / 2;
    const struct range mine = share(me, b->n_rows);

    for (int t = mine.first; t < mine.last; t++) {
        const struct row *row = &b->row[t];
        float *x = ctx->x + (size_t)t * c->n_embd;
        float *turn = b->rope + (size_t)t * c->head_dim;
        double freq = 1;

        if (row->embd)
            memcpy(x, row->embd, (size_t)c->n_embd * sizeof *x);
        else
            get_row(x, &ctx->model->token_embd, row->token);
        for (int i = 0; i < half; i++, freq /= ctx->model->rope_root)
            sin_cos(row->pos * freq, &turn[half + i], &turn[i]);
    }
    barrier(me);
    trace_rows(me, -1, "model.embed_tokens", ctx->x, c->n_embd);
}

/* in = rms_norm(x), the input of every operator. */
static void norm_rows(struct thread *me, const float *norm)
{
    lfm2_context *ctx = me->ctx;
    const lfm2_config *c = &ctx->model->cfg;
    const size_t n = (size_t)c->n_embd;
    const struct range mine = share(me, ctx->batch.n_rows);

    for (size_t t = (size_t)mine.first; t < (size_t)mine.last; t++)
        rms_norm(ctx->isa, ctx->in.f + t * n, ctx->x + t * n, norm, c->n_embd,
                 c->norm_rms_eps);
    round_rows(me, &ctx->in);
    barrier(me);
}

static void set_rows(lfm2_context *ctx, int n)
{
    ctx->batch.n_rows = n;
    ctx->in.n = ctx->mixed.n = ctx->heads.n = ctx->hidden.n = n;
}

/* Keep only the rows of which at least `least` is wanted. */
static void drop_rows(struct thread *me, int least)
{
    lfm2_context *ctx = me->ctx;
    struct batch *b = &ctx->batch;
    const size_t n = (size_t)ctx->model->cfg.n_embd;
    int kept = 0;

    for (int t = 0; me->id == 0 && t < b->n_rows; t++) {
        if (b->row[t].wanted < least)
            continue;
        memmove(ctx->x + n * (size_t)kept, ctx->x + n * (size_t)t,
                n * sizeof *ctx->x);
        b->row[kept++] = b->row[t];
    }
    if (me->id == 0)
        set_rows(ctx, kept);
    barrier(me);
}

/* The states and logits that are wanted; logits go behind those of earlier
 * passes. */
static void output(struct thread *me)
{
    lfm2_context *ctx = me->ctx;
    const lfm2_model *m = ctx->model;
    const struct batch *b = &ctx->batch;
    const size_t n = (size_t)m->cfg.n_embd;
    float *logits = ctx->logits + (size_t)ctx->n_logits * m->cfg.n_vocab;

    for (int t = me->id; t < b->n_rows; t += me->of)
        if (b->row[t].wanted == STATE)
            rms_norm(ctx->isa, ctx->states + n * (size_t)b->row[t].seq, ctx->x +
                     n * (size_t)t, m->output_norm, m->cfg.n_embd,
                     m->cfg.norm_rms_eps);
    barrier(me);
    drop_rows(me, LOGITS);
    norm_rows(me, m->output_norm);
    trace_rows(me, -1, "model.embedding_norm", ctx->in.f, m->cfg.n_embd);
    if (b->n_rows > 0)
        matmul(me, ASSIGN, logits, &m->output, &ctx->in);
    barrier(me);
    trace_rows(me, -1, "lm_head", logits, m->cfg.n_vocab);
}

static int is_cancelled(struct thread *me)
{
    if (me->id == 0)
        me->ctx->stop = atomic_load(&me->ctx->cancel);
    barrier(me);
    return me->ctx->stop;
}

/* The model: x = embedding, then in each layer
 *
 *     x += operator(rms_norm(x)),   x += feed_forward(rms_norm(x))
 *
 * and logits = output rms_norm(x).  Row t of x is one token of one sequence.
 * Only short_conv() and attention() look outside a row, and they do it piece by
 * piece; to all else rows are independent vectors.  Every thread runs this. */
static void forward(struct thread *me)
{
    lfm2_context *ctx = me->ctx;
    const lfm2_config *c = &ctx->model->cfg;

    embed(me);
    for (int il = 0; il < c->n_layer; il++) {
        const struct layer *l = &ctx->model->layer[il];

        if (is_cancelled(me))
            return;
        norm_rows(me, l->attn_norm);
        trace_rows(me, il, LAYER ".operator_norm", ctx->in.f, c->n_embd);
        if (c->is_attn[il])
            attention(me, l);
        else
            short_conv(me, l);

        if (il + 1 == c->n_layer && !ctx->hook)
            drop_rows(me, STATE);         /* the others are not needed       */
        if (ctx->batch.n_rows == 0)
            return;
        norm_rows(me, l->ffn_norm);
        trace_rows(me, il, LAYER ".ffn_norm", ctx->in.f, c->n_embd);
        if (il < c->n_layer_dense)
            ffn(me, l);
        else
            moe(me, l);
        trace_rows(me, il, LAYER, ctx->x, c->n_embd);
    }
    output(me);
}

/* =========================================================================
 * Part II.  The machine
 * =========================================================================
 *
 * ------------------------------------------------------ 7. Exact arithmetic
 *
 * Every function of this section gives the same bits everywhere: it uses only
 * integer operations and IEEE addition, multiplication, division and
 * conversion. */

/* Round to nearest and flush nothing to zero, whatever the caller has set.
 * fesetenv(callers) restores that. */
static void enter_arithmetic(fenv_t *callers)
{
    fegetenv(callers);
    fesetenv(FE_DFL_ENV);
}

static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float float_of(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* a*b+c rounded once.  The product p of two floats is exact in double, but the
 * sum s is rounded, and rounding it again, to float, could go the wrong way if
 * s is halfway between two floats.  So s is rounded to odd instead: if it is
 * inexact (err is not 0) and even, it moves one step towards the exact sum.  An
 * odd s is never halfway. */
static inline float fma_f32(float a, float b, float c)
{
#if defined FP_FAST_FMAF || defined __aarch64__  /* clang lacks the macro    */
    return fmaf(a, b, c);
#else
    double p = (double)a * b, s = p + c;
    double t = s - p, err = (p - (s - t)) + (c - t);   /* p + c = s + err */
    uint64_t u;

    memcpy(&u, &s, sizeof u);
    if ((err < 0 || err > 0) && (u & 1) == 0)
        u += (err > 0) == (s > 0) ? 1 : (uint64_t)-1;
    memcpy(&s, &u, sizeof s);
    return (float)s;
#endif
}

/* 1.5 * 2^23: floats near it are integers, so adding it rounds to one. */
#define ROUND_MAGIC 12582912.0f

/* e^x = 2^n e^r with n = rint(x / ln 2), |r| <= ln(2)/2, and a polynomial for
 * e^r; ln 2 is split so that n times its upper part is exact.  Below -87 the
 * result is 0, above 88 it is e^88. */
static const float exp_taylor[8] = {
    1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1
};

static float exp_f32(float x)
{
    if (x != x)
        return x;
    if (x < -87.0f)
        return 0;
    if (x > 88.0f)
        x = 88.0f;
    float t = fma_f32(x, 1.44269504f, ROUND_MAGIC), n = t - ROUND_MAGIC;
    float r = fma_f32(n, -0.693145752f, x);
    r = fma_f32(n, -1.42860677e-6f, r);
    float p = exp_taylor[0];
    for (int i = 1; i < 8; i++)
        p = fma_f32(p, r, exp_taylor[i]);
    return float_of(bits_of(p) + (bits_of(t) << 23));
}

/* pi/2 is the sum of these.  The first two have 33 bits, so their products with
 * an integer below 2^20 are exact. */
static const double half_pi[3] = {
    1.57079632673412561417, 6.07710050630396597660e-11,
    2.02226624879595063154e-21
};

/* The longest context; an angle is at most a position. */
enum { MAX_CTX = 1 << 24 };

/* Sine and cosine of an angle up to MAX_CTX, in double.  A large angle is first
 * reduced by multiples of 2^20 pi/2, then every angle by multiples of pi/2.
 * The Taylor series follows, nested: 1 - z/(2*3) (1 - z/(4*5) (1 - ...)). */
static void sin_cos(double a, float *s, float *c)
{
    const double magic = 6755399441055744.0;           /* 1.5 * 2^52 */
    const double turns = a < 1048576 ? 0 :
                         a * (0.63661977236758134308 / 1048576) + magic - magic;
    uint64_t quadrant;

    for (int i = 0; i < 3; i++)
        a -= turns * (half_pi[i] * 1048576);
    double n = a * 0.63661977236758134308 + magic, r = a;
    memcpy(&quadrant, &n, sizeof quadrant);
    n -= magic;
    for (int i = 0; i < 3; i++)
        r -= n * half_pi[i];
    double z = r * r, sine = 1, cosine = 1;
    for (int k = 18; k >= 2; k -= 2) {
        sine = 1 - sine * z / (k * (k + 1));
        cosine = 1 - cosine * z / (k * (k - 1));
    }
    sine *= r;
    double turned[4] = { sine, cosine, -sine, -cosine };
    *s = (float)turned[quadrant & 3];
    *c = (float)turned[(quadrant + 1) & 3];
}

float lfm2_math(int function, float a, float b, float c)
{
    float sine, cosine;
    fenv_t callers;

    enter_arithmetic(&callers);
    sin_cos(a, &sine, &cosine);
    const float y[] = {
        [LFM2_EXP] = exp_f32(a), [LFM2_SIN] = sine, [LFM2_COS] = cosine,
        [LFM2_FMA] = fma_f32(a, b, c)
    };
    fesetenv(&callers);
    return function < 0 || function > LFM2_FMA ? float_of(0x7fc00000)
                                               : y[function];
}

/* base^(1/n) by Newton's method.  It starts above the root and goes down at
 * every step, until rounding stops it. */
static double nth_root(double base, int n)
{
    double r = 1 + (base - 1) / n;

    for (;;) {
        double power = 1;
        for (int i = 1; i < n; i++)
            power *= r;
        double next = r - (r - base / power) / n;
        if (!(next < r))
            return r;
        r = next;
    }
}

/* A dot product in 16 chains and one tree. */
static float dot_f32(const float *a, const float *b, int n)
{
    float chain[16] = { 0 };

    for (int i = 0; i < n; i++)
        chain[i % 16] = fma_f32(a[i], b[i], chain[i % 16]);
    return sum_16(chain);
}

/* binary16: 1 sign, 5 exponent, 10 mantissa bits.  Moved to where a float has
 * them, the exponent is 112 too small, even for subnormals; the product mends
 * that.  Infinity and NaN get the largest exponent. */
static float f16_to_f32(uint16_t h)
{
    uint32_t a = (uint32_t)(h & 0x7fff) << 13;
    uint32_t u = bits_of(float_of(a) * 0x1p112f);

    if (a >= 0x0f800000)
        u |= 0x7f800000;
    return float_of(u | (uint32_t)(h & 0x8000) << 16);
}

/* Rounded to nearest even.  Floats from 0.5 to 1 are 2^-24 apart, and so are
 * subnormal binary16 numbers: adding 0.5 rounds to one. */
static uint16_t f32_to_f16(float f)
{
    uint32_t u = bits_of(f), a = u & 0x7fffffff;
    uint16_t sign = (uint16_t)(u >> 16 & 0x8000);

    if (a > 0x7f800000)                   /* NaN                             */
        return sign | 0x7e00;
    if (a >= 0x477ff000)                  /* too large: infinity             */
        return sign | 0x7c00;
    if (a < 0x38800000)                   /* below 2^-14: subnormal          */
        a = bits_of(float_of(a) + 0.5f) - bits_of(0.5f);
    else
        a = (a - (112u << 23) + 0xfff + (a >> 13 & 1)) >> 13;
    return sign | (uint16_t)a;
}

/* --------------------- 8. Threads, and how attention and experts share them
 *
 * A context owns n_threads - 1 workers; the caller is thread 0.  They are woken
 * once for a pass, run the same function, share its work, and meet at its
 * barriers.  Barriers are about 50 microseconds apart, so a waiting thread
 * spins for a while before it sleeps. */

static struct range share(struct thread *me, int n)
{
    const int64_t t = me->id, of = me->of;
    return (struct range){ (int)(n * t / of), (int)(n * (t + 1) / of) };
}

/* Half of the n units of a loop are in fixed shares, one for each thread, so
 * that most weights are read in order.  The other half is dynamic: a thread
 * that is free takes a piece of it, and the pieces become smaller, because a
 * CPU may be slower than others or be taken away for a while.  A single thread
 * has no dynamic units, since the others would not count them. */
static int fixed_share(struct thread *me, int n)
{
    return me->of == 1 ? n : n / (2 * me->of);
}

/* The next piece of the dynamic units, n - dynamic .. n-1.  ctx->taken counts
 * those taken in all loops, me->taken_before those of the loops before this
 * one, which were the same for all threads; so nothing has to be reset. */
static struct range next_piece(struct thread *me, int n, int dynamic)
{
    atomic_uint *taken = &me->ctx->taken;
    unsigned so_far = atomic_load(taken);
    int left, some;

    do {
        left = dynamic - (int)(so_far - me->taken_before);
        some = left / (2 * me->of) + 1;
        if (left <= 0)
            return (struct range){ n, n };
    } while (!atomic_compare_exchange_weak(taken, &so_far,
                                           so_far + (unsigned)some));
    return (struct range){ n - left, n - left + some };
}

/* A piece is taken one call ahead, so that product() knows what to prefetch. */
static int take_units(struct thread *me, int n, struct range *some)
{
    const int fixed = fixed_share(me, n), dynamic = n - me->of * fixed;
    const struct range mine = { me->id * fixed, (me->id + 1) * fixed };

    me->now = me->is_taking ? me->then : mine;
    if (me->now.first == me->now.last)    /* the fixed share is empty        */
        me->now = next_piece(me, n, dynamic);
    me->then = next_piece(me, n, dynamic);
    *some = me->now;
    me->is_taking = some->first < some->last;
    if (!me->is_taking)
        me->taken_before += (unsigned)dynamic;
    return me->is_taking;
}

/* Checks before a waiting thread sleeps: 0.2 to 0.5 milliseconds.  With 0.1 ms
 * threads slept so often that the system packed them onto one CPU: beside a
 * busy process that left 18 % of the speed, this leaves 48 %. */
enum { SPINS = 10000 };

/* A pass of fewer multiply-adds takes less time than waking a thread. */
static const uint64_t TOO_SMALL = 16 << 20;

int lfm2_n_cpus(void)
{
#ifndef LFM2_NO_THREADS
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
#endif
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    if (n > 0)
        return (int)n;
#endif
    return 1;
}

#ifdef LFM2_NO_THREADS

struct pool { int unused; };

#define pool_size(n)        sizeof(struct pool)
#define pool_open(ctx)      ((ctx)->par.n_threads = 1)
#define pool_close(ctx)     ((void)(ctx))
#define pool_is_here(ctx)   1
#define start(pool, run)    ((void)(pool))
#define meet(pool, n)       ((void)(pool))

#else

struct pool {
    int spins;                            /* before going to sleep           */
    pid_t owner;                          /* process with the workers        */
    void (*run)(struct thread *me);       /* NULL: the workers end           */
    atomic_uint passes;                   /* started so far                  */
    atomic_uint barriers;                 /* reached by all threads so far   */
    atomic_uint arrived;                  /* threads at the next barrier     */
    atomic_uint asleep;                   /* threads that wait for `changed` */
    pthread_mutex_t lock;
    pthread_cond_t changed;               /* passes or barriers              */
    pthread_t worker[];                   /* [n_threads]; [0] is not used    */
};

static size_t pool_size(int n_threads)
{
    return sizeof(struct pool) + (size_t)n_threads * sizeof(pthread_t);
}

/* Wait until *counter is no longer `value`. */
static void wait_for_change(struct pool *p, atomic_uint *counter,
                            unsigned value)
{
    for (int i = 0; i < p->spins; i++) {
        if (atomic_load(counter) != value)
            return;
#if defined __x86_64__ || defined __i386__
        __builtin_ia32_pause();           /* tells the CPU that this waits   */
#elif defined __aarch64__
        __asm__ volatile("yield");
#endif
    }
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->asleep, 1);
    while (atomic_load(counter) == value)
        pthread_cond_wait(&p->changed, &p->lock);
    atomic_fetch_sub(&p->asleep, 1);
    pthread_mutex_unlock(&p->lock);
}

/* Add 1 to *counter and wake the threads that sleep.  A thread counts itself in
 * `asleep` before its last check of *counter, so no wake-up is lost. */
static void advance(struct pool *p, atomic_uint *counter)
{
    atomic_fetch_add(counter, 1);
    if (atomic_load(&p->asleep) == 0)
        return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

/* Wait until n threads have called this. */
static void meet(struct pool *p, unsigned n)
{
    const unsigned before = atomic_load(&p->barriers);

    if (atomic_fetch_add(&p->arrived, 1) + 1 < n) {
        wait_for_change(p, &p->barriers, before);
        return;
    }
    atomic_store(&p->arrived, 0);
    advance(p, &p->barriers);
}

static void start(struct pool *p, void (*run)(struct thread *me))
{
    p->run = run;
    advance(p, &p->passes);
}

static void *worker_main(void *arg)
{
    struct thread *me = arg;
    struct pool *p = me->ctx->pool;
    fenv_t created_with;

    enter_arithmetic(&created_with);
    for (unsigned passes = 0;; passes++) {
        wait_for_change(p, &p->passes, passes);
        if (!p->run)
            return NULL;
        p->run(me);
        barrier(me);
    }
}

/* A child made by fork() has a copy of the pool, but not its threads. */
static int pool_is_here(const lfm2_context *ctx)
{
    return ctx->par.n_threads == 1 || ctx->pool->owner == getpid();
}

static void pool_close(lfm2_context *ctx)
{
    struct pool *p = ctx->pool;

    if (!pool_is_here(ctx))
        return;
    start(p, NULL);
    for (int i = 1; i < ctx->par.n_threads; i++)
        pthread_join(p->worker[i], NULL);
    pthread_cond_destroy(&p->changed);
    pthread_mutex_destroy(&p->lock);
}

/* If the system refuses a thread, there are fewer than asked for.  With more
 * threads than CPUs none spins: the one it waits for may need this CPU. */
static void pool_open(lfm2_context *ctx)
{
    struct pool *p = ctx->pool;
    const int most = ctx->par.n_threads;
    int n = 1;

    p->spins = most <= lfm2_n_cpus() ? SPINS : 0;
    p->owner = getpid();
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->changed, NULL);
    while (n < most && pthread_create(&p->worker[n], NULL, worker_main,
                                      &ctx->thread[n]) == 0)
        n++;
    ctx->par.n_threads = n;
    for (int i = 0; i < n; i++)
        ctx->thread[i].of = n;
}

#endif

static void barrier(struct thread *me)
{
    me->s.arranged->n = 0;                /* an input may change now         */
    if (me->of > 1)
        meet(me->ctx->pool, (unsigned)me->of);
}

/* Run a function on all threads, or on the caller alone. */
static void parallel(lfm2_context *ctx, int n_threads,
                     void (*run)(struct thread *me))
{
    struct thread *me = &ctx->thread[0];

    me->of = n_threads;
    if (n_threads > 1)
        start(ctx->pool, run);
    run(me);
    barrier(me);
}

/* ---- attention: the KV cache, and how the work is divided */

enum { TILE = 64 };

/* Bytes of a number in the cache; and of all keys, or values, of a head, in
 * whole tiles. */
static int kv_size(const lfm2_context *ctx)
{
    return ctx->par.kv_type == LFM2_KV_F16 ? 2 : 4;
}

static int64_t kv_head_bytes(const lfm2_context *ctx)
{
    return ((int64_t)ctx->par.n_ctx + TILE - 1) / TILE * TILE *
           ctx->model->cfg.head_dim * kv_size(ctx);
}

static struct kv_head kv_head_at(const lfm2_context *ctx,
                                 const struct seq *s, int i_attn, int head)
{
    const lfm2_config *c = &ctx->model->cfg;
    const int64_t bytes = kv_head_bytes(ctx);
    uint8_t *k = s->kv + 2 * bytes * (i_attn * c->n_head_kv + head);

    return (struct kv_head){ k, k + bytes, kv_size(ctx) == 2, c->head_dim };
}

/* The address of element d of the key or value at `pos`. */
static void *kv_at(const struct kv_head *kv, int what, int pos, int d)
{
    const size_t hd = (size_t)kv->head_dim, size = kv->f16 ? 2 : 4;

    if (what == VALUE)
        return kv->v + ((size_t)pos * hd + d) * size;
    return kv->k + (((size_t)(pos / TILE) * hd + d) * TILE + pos % TILE) * size;
}

static float kv_get(const struct kv_head *kv, int what, int pos, int d)
{
    const void *at = kv_at(kv, what, pos, d);
    return kv->f16 ? f16_to_f32(*(const uint16_t *)at) : *(const float *)at;
}

static void kv_store(const struct kv_head *kv, int pos, const float *k,
                     const float *v)
{
    for (int i = 0; i < 2 * kv->head_dim; i++) {
        const int what = i % 2 ? VALUE : KEY, d = i / 2;
        const float x = what == VALUE ? v[d] : k[d];
        void *at = kv_at(kv, what, pos, d);
        if (kv->f16)
            *(uint16_t *)at = f32_to_f16(x);
        else
            *(float *)at = x;
    }
}

/* The queries of one kv head in n rows of a sequence, computed together.  Row t
 * is at position pos + t and sees all positions up to its own. */
struct attn_rows {
    float *q;                             /* [n][group][head_dim]            */
    size_t stride;                        /* floats from one row to the next */
    int n, group, pos;
};

/* Query i of all n * group. */
static float *query_at(const struct attn_rows *a, int i, int head_dim)
{
    return a->q + (size_t)(i / a->group) * a->stride +
           (size_t)(i % a->group * head_dim);
}

/* How many positions of the chunk at `pos` row t sees. */
static int chunk_seen(const struct attn_rows *a, int t, int pos)
{
    const int seen = a->pos + t + 1 - pos;
    return seen < 0 ? 0 : seen < CHUNK ? seen : CHUNK;
}

/* part[n][group] = the chunk at `pos`, for all rows that see some of it. */
static void attend_chunk(struct attn_partial *part, const struct attn_rows *a,
                         const struct kv_head *kv, int pos,
                         const struct scratch *s)
{
    (void)s;
    for (int i = 0; i < a->n * a->group; i++)
        if (chunk_seen(a, i / a->group, pos) > 0)
            attend_query(&part[i], query_at(a, i, kv->head_dim), kv, pos,
                         chunk_seen(a, i / a->group, pos));
}

/* Rows in an attn_rows: about 32 queries share each load of the cache. */
static int rows_together(const lfm2_config *c)
{
    const int group = c->n_head / c->n_head_kv;
    return group < 32 ? 32 / group : 1;
}

/* q = softmax(q k^T) v.  All queries finish a chunk before the next one, so
 * that each chunk is read from memory once. */
static void attend_rows(struct thread *me, const struct attn_rows *a,
                        const struct kv_head *kv)
{
    const struct isa *isa = me->ctx->isa;
    const int hd = kv->head_dim, n = a->n * a->group;
    struct attn_partial *all = me->s.partial, *part = all + n;

    isa->attend_chunk(all, a, kv, 0, &me->s);
    for (int pos = CHUNK; pos < a->pos + a->n; pos += CHUNK) {
        isa->attend_chunk(part, a, kv, pos, &me->s);
        for (int i = 0; i < n; i++)
            if (chunk_seen(a, i / a->group, pos) > 0)
                merge_chunk(isa, &all[i], &part[i], hd);
    }
    for (int i = 0; i < n; i++)
        for (int d = 0; d < hd; d++)
            query_at(a, i, hd)[d] = all[i].o[d] / all[i].sum;
}

/* Later rows see more positions, so jobs go to the threads in turn: contiguous
 * shares would be unequal. */
static void attend(struct thread *me, const struct layer *l)
{
    lfm2_context *ctx = me->ctx;
    const lfm2_config *c = &ctx->model->cfg;
    const int most = rows_together(c), group = c->n_head / c->n_head_kv;
    const size_t stride = (size_t)c->n_head * c->head_dim;
    int turn = 0;

    for (int i = 0; i < ctx->batch.n_pieces; i++) {
        const struct piece *p = &ctx->batch.piece[i];
        for (int t = 0; t < p->n; t += most)
            for (int head = 0; head < c->n_head_kv; head++) {
                const struct kv_head kv = kv_head_at(ctx, &ctx->seq[p->seq],
                                                     l->i_kind, head);
                const struct attn_rows a = {
                    ctx->q + (size_t)(p->row + t) * stride +
                    (size_t)(head * group * c->head_dim), stride,
                    p->n - t < most ? p->n - t : most, group, p->pos + t
                };
                if (turn++ % me->of == me->id)
                    attend_rows(me, &a, &kv);
            }
    }
}

/* ---- experts: which rows each of them gets */

/* Sort the slots by expert, rows ascending: a counting sort.  begin[e] is first
 * the number of slots of expert e, then their end, and goes down to their
 * beginning as they are filled, the last row first.  After a matrix the threads
 * read that of the next expert; gate and up are read together, so only one of
 * them leads to down. */
static void group_by_expert(lfm2_context *ctx, const struct layer *l)
{
    struct routing *r = &ctx->routing;
    const lfm2_config *c = &ctx->model->cfg;
    const struct tensor *all[] = { &l->ffn_gate_exps, &l->ffn_up_exps,
                                   &l->ffn_down_exps };
    struct tensor *active[] = { r->gate, r->up, r->down };
    const int n = ctx->batch.n_rows * c->n_expert_used;
    int *begin = r->slot_begin;

    memset(begin, 0, ((size_t)c->n_expert + 1) * sizeof *begin);
    for (int i = 0; i < n; i++)
        begin[r->chosen[i]]++;
    for (int e = 1; e <= c->n_expert; e++)
        begin[e] += begin[e - 1];
    for (int i = n - 1; i >= 0; i--) {
        int s = --begin[r->chosen[i]];
        r->slot_row[s] = i / c->n_expert_used;
        r->slot_weight[s] = r->weight[i];
    }
    r->n_active = 0;
    for (int e = 0; e < c->n_expert; e++)
        if (begin[e] < begin[e + 1])
            r->active[r->n_active++] = e;
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < r->n_active; i++) {
            active[k][i] = expert(all[k], r->active[i]);
            active[k][i].next = i + 1 < r->n_active ? &active[k][i + 1]
                              : k == 0 ? r->down : k == 1 ? NULL : all[k]->next;
        }
}

/* --------------------------------------------------------- 9. Weight formats
 *
 * A row of weights is a sequence of blocks of 32 columns or of 256, a K block.
 * All formats are unpacked to one form, a group of 32 columns at a time:
 *
 *     weight = d q - m        q: an 8-bit integer for each column,
 *                             d, m: for all 32, or for each half of 16
 *
 * d and m are exact in float.  In the drawings f16 is a binary16 number, uN or
 * iN an integer of N bits, everything is little-endian, and lo and hi are the
 * nibbles of a byte. */

static uint16_t load_le16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static uint32_t load_le32(const uint8_t *p)
{
    return load_le16(p) | (uint32_t)load_le16(p + 2) << 16;
}

static float load_f16(const uint8_t *p)
{
    return f16_to_f32(load_le16(p));
}

static float load_f32(const uint8_t *p)
{
    return float_of(load_le32(p));
}

static void floats_f32(float *out, const uint8_t *b, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = load_f32(b + 4 * (size_t)i);
}

static void floats_f16(float *out, const uint8_t *b, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = load_f16(b + 2 * (size_t)i);
}

static void floats_bf16(float *out, const uint8_t *b, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = float_of((uint32_t)load_le16(b + 2 * (size_t)i) << 16);
}

enum {
    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K,
    IQ4_NL, IQ4_XS, N_FORMAT
};

/* The factors of d and dmin in a K block, for group j, or half j if halves have
 * their own.  They are among the 16 bytes at s, packed as drawn below. */
struct scale { int d, m; };

static struct scale scale_at(int format, const uint8_t *s, int j)
{
    int low, high;

    switch (format) {
    case Q2_K:
        return (struct scale){ s[j] & 15, s[j] >> 4 };
    case Q3_K:
        low = s[4 + j % 8] >> j / 8 * 4 & 15;
        high = s[12 + j % 4] >> j / 4 * 2 & 3;
        return (struct scale){ low | high << 4, 0 };
    case Q4_K:
        if (j < 4)
            return (struct scale){ s[j + 4] & 63, s[j + 8] & 63 };
        return (struct scale){ (s[j + 8] & 15) | s[j] >> 6 << 4,
                               s[j + 8] >> 4 | s[j + 4] >> 6 << 4 };
    case Q6_K:
        return (struct scale){ s[j] ^ 128, 0 };
    default:                              /* IQ4_XS                          */
        low = s[4 + j / 2] >> j % 2 * 4 & 15;
        high = load_le16(s + 2) >> 2 * j & 3;
        return (struct scale){ low | high << 4, 0 };
    }
}

/* Some bits of each weight of a block.  For column i of group g they are in
 * byte at + of[g] + i: shift it right by shift[g], then apply the mask. */
struct bit_field {
    uint8_t at, mask, of[8], shift[8];
};

/* A format either has a function that reads floats, or is unpacked as all the
 * other fields say; those not set are 0. */
struct format {
    const char *name;
    int id;                               /* GGUF's number                   */
    int block, bytes;                     /* columns and bytes of a block    */
    void (*floats)(float *out, const uint8_t *row, int n);
    int halves;                           /* numbers d of a group: 1, or 2
                                             for 16 columns each             */
    int d_at;                             /* byte of d; m or dmin follows    */
    int has_min;
    int scales_at, scales;                /* 16 bytes with the scales, packed
                                             as in this format; or 0         */
    int scale_offset;                     /* subtracted from the scales      */
    int split;                            /* the low nibbles of 16 bytes are
                                             columns 0..15, the high 16..31;
                                             else 32 bytes are 32 columns    */
    struct bit_field low, high;           /* high: if its mask is not 0      */
    int high_to;                          /* bit of q where `high` begins    */
    int fifth;                            /* 32 bits before the nibbles: bit i
                                             is bit 4 of q[i]                */
    int iq4;                              /* q is an index of iq4_value[]    */
    int offset;                           /* subtracted from q               */
    int is_signed;                        /* q is a signed byte              */
};

/* Blocks of one group, with nibbles at `at`.  A vector takes up to four blocks
 * at once, so of[1..3] point into the next ones. */
#define EACH(n) { 0, n, 2 * n, 3 * n }
#define NIBBLES(size, at) \
    .block = 32, .bytes = size, .halves = 1, \
    .split = 1, .low = { at, 15, EACH(size), { 0 } }

/* The 8 groups of a K block share bytes: two groups the nibbles of 32 bytes,
 * four their pairs of bits, all eight their single bits. */
#define LOW_4 { 0, 0, 32, 32, 64, 64, 96, 96 }, { 0, 4, 0, 4, 0, 4, 0, 4 }
#define LOW_2 { 0, 0, 0, 0, 32, 32, 32, 32 }, { 0, 2, 4, 6, 0, 2, 4, 6 }
#define ONE_BIT { 0 }, { 0, 1, 2, 3, 4, 5, 6, 7 }

static const struct format formats[N_FORMAT] = {
    [F32]  = { "F32", 0, 1, 4, .floats = floats_f32 },
    [F16]  = { "F16", 1, 1, 2, .floats = floats_f16 },
    [BF16] = { "BF16", 30, 1, 2, .floats = floats_bf16 },

    /* 32 columns in 18 bytes           weight = d (q - 8)
     *
     *     | f16 d | 16 x u8: lo = q[i], hi = q[i+16] |                      */
    [Q4_0] = { "Q4_0", 2, NIBBLES(18, 2), .offset = 8 },

    /* 20 bytes                         weight = d q + m
     *
     *     | f16 d | f16 m | 16 x u8: lo = q[i], hi = q[i+16] |              */
    [Q4_1] = { "Q4_1", 3, NIBBLES(20, 4), .has_min = 1 },

    /* 22 bytes                         weight = d (q - 16)
     *
     *     | f16 d | u32: bit i = bit 4 of q[i] | 16 x u8: as in Q4_0 |      */
    [Q5_0] = { "Q5_0", 6, NIBBLES(22, 6), .fifth = 1, .offset = 16 },

    /* 24 bytes                         weight = d q + m
     *
     *     | f16 d | f16 m | u32 and 16 x u8 as in Q5_0 |                    */
    [Q5_1] = { "Q5_1", 7, NIBBLES(24, 8), .fifth = 1, .has_min = 1 },

    /* 34 bytes                         weight = d q
     *
     *     | f16 d | 32 x i8: q[i] |                                         */
    [Q8_0] = { "Q8_0", 8, 32, 34, .halves = 1,
               .low = { 2, 255, EACH(34), { 0 } }, .is_signed = 1 },

    /* 256 columns in 84 bytes          weight = d s q - dmin m, s, m per 16
     *
     *     | 16 x u8: lo = s[j], hi = m[j] | 64 x u8: 2-bit q |
     *     | f16 d | f16 dmin |                                              */
    [Q2_K] = { "Q2_K", 10, 256, 84, .scales = Q2_K, .halves = 2,
               .d_at = 80, .has_min = 1, .low = { 16, 3, LOW_2 } },

    /* 110 bytes                        weight = d (s - 32) (q - 4), s per 16
     *
     *     | 32 x u8: bit i = bit 2 of q in group i | 64 x u8: bits 0, 1 |
     *     | 12 x u8: s of 6 bits | f16 d |
     *
     * s[j]: the low 4 bits are in byte j % 8 of the 12, in the low nibble if
     * j < 8; the high 2 bits are in byte 8 + j % 4, from bit j / 4 * 2 on. */
    [Q3_K] = { "Q3_K", 11, 256, 110, .scales = Q3_K, .halves = 2,
               .d_at = 108, .scales_at = 92,
               .low = { 32, 3, LOW_2 }, .high = { 0, 1, ONE_BIT },
               .high_to = 2, .offset = 4, .scale_offset = 32 },

    /* 144 bytes                        weight = d s q - dmin m, s, m per 32
     *
     *     | f16 d | f16 dmin | 12 x u8: s, m of 6 bits | 128 x u8: 4-bit q |
     *
     *     byte 0..3    bits 0-5: s[0..3]   bits 6, 7: bits 4, 5 of s[4..7]
     *     byte 4..7    bits 0-5: m[0..3]   bits 6, 7: bits 4, 5 of m[4..7]
     *     byte 8..11   lo = bits 0-3 of s[4..7], hi = bits 0-3 of m[4..7]   */
    [Q4_K] = { "Q4_K", 12, 256, 144, .scales = Q4_K, .halves = 1,
               .has_min = 1,
               .low = { 16, 15, LOW_4 } },

    /* 176 bytes                        weight = d s q - dmin m, s, m per 32
     *
     *     | f16 d | f16 dmin | 12 x u8: s, m as in Q4_K |
     *     | 32 x u8: bit i = bit 4 of q in group i | 128 x u8: bits 0-3 |   */
    [Q5_K] = { "Q5_K", 13, 256, 176, .scales = Q4_K, .halves = 1,
               .has_min = 1,
               .low = { 48, 15, LOW_4 }, .high = { 16, 1, ONE_BIT },
               .high_to = 4 },

    /* 210 bytes                        weight = d s (q - 32), s per 16
     *
     *     | 128 x u8: bits 0-3 | 64 x u8: bits 4, 5 | 16 x i8: s | f16 d |
     *
     * 64 bytes of nibbles are half a block: groups 0, 1 low and 2, 3 high. */
    [Q6_K] = { "Q6_K", 14, 256, 210, .scales = Q6_K, .halves = 2,
               .d_at = 208, .scales_at = 192,
               .low = { 0, 15, { 0, 32, 0, 32, 64, 96, 64, 96 },
                        { 0, 0, 4, 4, 0, 0, 4, 4 } },
               .high = { 128, 3, LOW_2 }, .high_to = 4, .offset = 32,
               .scale_offset = 128 },

    /* 32 columns in 18 bytes           weight = d value[q]
     *
     *     | f16 d | 16 x u8: lo = q[i], hi = q[i+16] |                      */
    [IQ4_NL] = { "IQ4_NL", 20, NIBBLES(18, 2), .iq4 = 1, .is_signed = 1 },

    /* 256 columns in 136 bytes         weight = d (s - 32) value[q], s per 32
     *
     *     | f16 d | 8 x 2 bits: upper s | 8 x 4 bits: lower s |
     *     | 8 groups of 16 x u8: lo = q[i], hi = q[i+16] |                  */
    [IQ4_XS] = { "IQ4_XS", 23, 256, 136, .scales = IQ4_XS, .halves = 1,
                 .low = { 8, 15, { 0, 16, 32, 48, 64, 80, 96, 112 }, { 0 } },
                 .split = 1, .iq4 = 1, .is_signed = 1, .scale_offset = 32 },
};

/* value[] of the non-linear 4-bit formats. */
static const int8_t iq4_value[16] = {
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113
};

/* The group of a row that begins with column c: q[32], d[2] and m[2]. */
static void unpack(const struct format *f, const uint8_t *row, int c, int8_t *q,
                   float *d, float *m)
{
    const uint8_t *b = row + (size_t)(c / f->block) * (size_t)f->bytes;
    const int g = c % f->block / 32;
    const uint8_t *low = b + f->low.at + f->low.of[g];
    const uint8_t *high = b + f->high.at + f->high.of[g];

    for (int i = 0; i < 32; i++) {
        int v = f->split ? low[i % 16] >> i / 16 * 4 & 15
                         : low[i] >> f->low.shift[g] & f->low.mask;
        if (f->high.mask)
            v |= (high[i] >> f->high.shift[g] & f->high.mask) << f->high_to;
        if (f->fifth)
            v |= (low[i / 8 - 4] >> i % 8 & 1) << 4;
        v -= f->is_signed && v > 127 ? 256 : f->offset;
        q[i] = f->iq4 ? iq4_value[v] : (int8_t)v;
    }
    for (int h = 0; h < f->halves; h++) {
        struct scale s = { 1, -1 };       /* 32 columns: weight = d q + m    */
        if (f->scales)
            s = scale_at(f->scales, b + f->scales_at, f->halves * g + h);
        d[h] = load_f16(b + f->d_at) * (float)(s.d - f->scale_offset);
        m[h] = f->has_min ? load_f16(b + f->d_at + 2) * (float)s.m : 0;
    }
}

#define COUNT(array) (sizeof (array) / sizeof *(array))

static const struct format *format_find(uint32_t id)
{
    for (size_t i = 0; i < COUNT(formats); i++)
        if ((uint32_t)formats[i].id == id)
            return &formats[i];
    return NULL;
}

static size_t row_bytes(const struct tensor *w)
{
    return (size_t)(w->cols / w->fmt->block) * (size_t)w->fmt->bytes;
}

static void get_row(float *out, const struct tensor *w, int r)
{
    const struct format *f = w->fmt;
    const uint8_t *row = w->data + (size_t)r * row_bytes(w);
    float d[2], m[2];
    int8_t q[32];

    if (f->floats)
        f->floats(out, row, w->cols);
    for (int c = 0; c < w->cols && !f->floats; c += 32, out += 32) {
        unpack(f, row, c, q, d, m);
        for (int i = 0; i < 32; i++) {
            const int h = i / 16 * (f->halves - 1);
            out[i] = fma_f32(d[h], (float)q[i], -m[h]);
        }
    }
}

/* ------------------------------------------------------- 10. Matrix products
 *
 * y = x w^T, computed in units of 32 rows of w, that is, 32 columns of y.  This
 * section defines the result; sections 11 and 12 compute the same bits with
 * vectors. */

/* Round 32 columns to d q, with q in -127 .. 127.  d is NaN if one of them is
 * not finite; q is 0 if all are below 2^-100, too small to divide by. */
static void quantize(struct q8_group *to, const float *x)
{
    uint32_t top = 0;

    for (int i = 0; i < 32; i++) {
        uint32_t a = bits_of(x[i]) & 0x7fffffff;
        top = a > top ? a : top;
    }
    const float amax = float_of(top);
    const float inverse = amax >= 0x1p-100f && amax <= FLT_MAX ? 127 / amax : 0;
    to->sum[0] = to->sum[1] = 0;
    to->d = amax <= FLT_MAX ? amax / 127 : NAN;
    for (int i = 0; i < 32; i++) {
        float r = inverse > 0 ? x[i] * inverse + ROUND_MAGIC : ROUND_MAGIC;
        to->q[i] = (int8_t)(r - ROUND_MAGIC);
        to->sum[i / 16] = (int16_t)(to->sum[i / 16] + to->q[i]);
    }
    to->s = to->d * (float)(to->sum[0] + to->sum[1]);
}

static void set_unit(struct thread *me, struct input *in, int row, int n,
                     int u, const float *unit)
{
    const size_t groups = (size_t)in->cols / UNIT;
    size_t at = (size_t)row * groups + (size_t)u;

    for (int t = 0; t < n; t++, at += groups, unit += UNIT) {
        me->ctx->isa->quantize(&in->q[at], unit);
        if (in->f)
            memcpy(in->f + at * UNIT, unit, UNIT * sizeof *unit);
    }
}

static void round_rows(struct thread *me, struct input *in)
{
    const size_t groups = (size_t)in->cols / UNIT;
    const struct range rows = share(me, in->n);

    for (size_t i = (size_t)rows.first * groups;
         i < (size_t)rows.last * groups; i++)
        me->ctx->isa->quantize(&in->q[i], in->f + i * UNIT);
}

static int dot_16(const int8_t *a, const int8_t *b)
{
    int sum = 0;

    for (int i = 0; i < 16; i++)
        sum += a[i] * b[i];
    return sum;
}

/* One output: the groups in ascending order, one accumulator.
 *
 *     d for 32:   acc += (d dx) dot             - m (dx sum)
 *     d for 16:   acc += dx (d0 dot0 + d1 dot1) - dx (m0 sum0 + m1 sum1)    */
static float dot_row(const struct scratch *w, const struct format *f,
                     const struct q8_group *x, int groups)
{
    const int8_t *q = (const int8_t *)w->q;
    const float *d = w->d, *m = w->m;
    float acc = 0;

    for (; groups > 0; groups--, x++, q += 32, d += 2, m += 2) {
        int dot0 = dot_16(q, x->q), dot1 = dot_16(q + 16, x->q + 16);

        if (f->halves == 1) {
            acc = fma_f32(d[0] * x->d, (float)(dot0 + dot1), acc);
            if (f->has_min)
                acc = fma_f32(-m[0], x->s, acc);
        } else {
            float u = fma_f32(d[1], (float)dot1, d[0] * (float)dot0);
            acc = fma_f32(x->d, u, acc);
            if (f->has_min) {
                float v = fma_f32(m[1], (float)x->sum[1],
                                  m[0] * (float)x->sum[0]);
                acc = fma_f32(-x->d, v, acc);
            }
        }
    }
    return acc;
}

/* The number of the t-th row of an input in its arrays. */
static size_t row_at(const struct input *in, int t)
{
    return (size_t)(in->row ? in->row[t] : in->first + t);
}

/* out[t][r] = row t of the input times row first + r of w.  `end` and `next`
 * are for kernels that prefetch. */
static void product_rows(float *out, const struct tensor *w, int first,
                         int n_rows, const struct input *in,
                         const struct scratch *s, const uint8_t *end,
                         const uint8_t *next)
{
    const size_t cols = (size_t)w->cols;

    (void)end;
    (void)next;
    for (int r = 0; r < n_rows; r++, out++) {
        const struct format *f = w->fmt;
        const uint8_t *row = w->data + (size_t)(first + r) * row_bytes(w);

        if (f->floats)
            f->floats(s->f, row, w->cols);
        for (int c = 0; c < w->cols && !f->floats; c += 32)
            unpack(f, row, c, (int8_t *)s->q + c, s->d + c / 16, s->m + c / 16);
        for (int t = 0; t < in->n; t++) {
            const size_t at = row_at(in, t) * cols;
            out[t * UNIT] = f->floats ? dot_f32(s->f, in->f + at, w->cols)
                          : dot_row(s, f, in->q + at / 32, w->cols / 32);
        }
    }
}

static const struct isa scalar = {
    .panel_rows = 1, .dot = dot_f32, .quantize = quantize, .swiglu = swiglu,
    .add_scaled = add_scaled, .rope = rope, .conv_step = conv_step,
    .attend_chunk = attend_chunk, .product = product_rows
};

static int n_units(const struct tensor *w)
{
    return (w->rows + UNIT - 1) / UNIT;
}

static int unit_rows(const struct tensor *w, int u)
{
    const int rest = w->rows - u * UNIT;
    return rest < UNIT ? rest : UNIT;
}

/* Where unit u begins, or w ends if there are fewer units. */
static const uint8_t *unit_data(const struct tensor *w, int u)
{
    const int row = u * UNIT < w->rows ? u * UNIT : w->rows;
    return w->data + (size_t)row * row_bytes(w);
}

static struct tensor rows_of(const struct tensor *w, int first, int rows)
{
    struct tensor some = *w;

    some.rows = rows;
    some.data += (size_t)first * row_bytes(w);
    some.next = first == 0 ? w->next : NULL;  /* parts are read together     */
    some.first = first;
    return some;
}

static struct tensor expert(const struct tensor *w, int e)
{
    struct tensor one = *w;

    one.data += (size_t)e * w->rows * row_bytes(w);
    return one;
}

/* The kernel may prefetch what this thread reads after unit u: up to the end of
 * its units at hand, then at `next`, its next units of w or of the next
 * matrix. */
static float *product(struct thread *me, int to, const struct tensor *w,
                      int u, const struct input *in)
{
    const lfm2_context *ctx = me->ctx;
    const struct tensor *w2 = w->next;
    const uint8_t *next = NULL;
    float *out = me->s.out[to];

    if (me->then.first < me->then.last)
        next = unit_data(w, me->then.first);
    else if (w2)
        next = unit_data(w2, me->id * fixed_share(me, n_units(w2)));
    ctx->isa->product(out, w, u * UNIT, unit_rows(w, u), in, &me->s,
                      unit_data(w, me->now.last), next);
    for (int t = 0; ctx->hook && t < in->n; t++)
        keep(ctx, w->module, in->first + t, w->first + u * UNIT,
             out + (size_t)t * UNIT, unit_rows(w, u));
    return out;
}

static void matmul(struct thread *me, int how, float *y,
                   const struct tensor *w, const struct input *in)
{
    struct range some;

    while (take_units(me, n_units(w), &some))
        for (int u = some.first; u < some.last; u++) {
            const float *unit = product(me, 0, w, u, in);
            const int rows = unit_rows(w, u);
            for (int t = 0; t < in->n; t++, unit += UNIT) {
                float *to = y + (size_t)t * w->rows + u * UNIT;
                for (int r = 0; r < rows; r++)
                    to[r] = how == INCREASE ? to[r] + unit[r] : unit[r];
            }
        }
}

/* ------------------------------------------------- 11. Vectors: small blocks
 *
 * Sections 11 and 12 are compiled once for every instruction set: section 13
 * includes this file into itself with these macros.
 *
 *     SET       the name: FN(exp) is exp_avx2() in the set avx2
 *     BITS      of a register: 128 on ARM and WebAssembly; 256 or 512 (F, BW,
 *               VL, DQ) on x86
 *     DOT       1 if an instruction multiplies four bytes by four bytes and
 *               adds all products to a 32-bit number: sdot on ARM, vpdpbusd on
 *               x86, where weights are unsigned, a relaxed one on WebAssembly
 *     TARGET    the attributes of functions that use the set
 *
 * A register has LANES numbers of 32 bits.  Four of them, 16 bytes, are a quad:
 *
 *     BITS 128     | quad 0 |                                LANES  4, QUADS 1
 *     BITS 256     | quad 0 | quad 1 |                       LANES  8, QUADS 2
 *     BITS 512     | quad 0 | quad 1 | quad 2 | quad 3 |     LANES 16, QUADS 4
 *
 * The types are FLOATS, INTS and UINTS; HALF, LANES 16-bit numbers; and FOUR,
 * four floats.  They are GNU vectors, so most arithmetic on them is written
 * with operators.  The rest has a name, which each kind of machine defines:
 *
 *     FMA(a, b, c)             a * b + c, rounded once; FMA_4 for FOURs
 *     FROM_F16(h)              binary16 numbers as floats
 *     WIDEN(h)                 16-bit numbers as UINTS
 *     quads(p, at)             quad i is the 16 bytes at p + at[i]
 *     row_quads(p, stride)     quad i is the 16 bytes at p + 4 i stride
 *     LOOK_UP(table, i)        table[i] for every byte i, quad by quad
 *     ZIP_LOW(a, b), ..        in every quad: a0 b0 a1 b1, and a2 b2 a3 b3
 *     PAIR_LOW(a, b), ..       in every quad: a0 a1 b0 b1, and a2 a3 b2 b3
 *     SUM_4(a, b, c, d)        quad i: the sums of quad i of a, b, c and d
 *     DOT_PAIRS(a, b)          a0 b0 + a1 b1 of the two 16-bit halves of each
 *     store_bytes(to, q)       32 small integers to the bytes of a group */

#define JOIN_(a, b, c) a##b##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define FN(name) JOIN(name, _, SET)
#define KERNEL static TARGET
#define KERNEL_INLINE KERNEL inline __attribute__((always_inline))

#define LANES (BITS / 32)
#define QUADS (LANES / 4)
#define CHAINS (16 / LANES)               /* registers for 16 chains         */
#define FLOATS FN(floats)
#define INTS FN(ints)
#define UINTS FN(uints)
#define HALF FN(half)
#define FOUR FN(four)

/* Unaligned load and store. */
#define LOAD(p) ((FLOATS)*(const FN(loose) *)(const void *)(p))
#define STORE(p, v) (*(FN(loose) *)(void *)(p) = (v))

#ifdef LFM2_ARM

#define BLOCK(name) name##_neon
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#define FMA_4 FMA
#define FROM_F16(h) ((FLOATS)vcvt_f32_f16((float16x4_t)(h)))
#define WIDEN(h) ((UINTS)vmovl_u16((uint16x4_t)(h)))
#define LOOK_UP(table, i) \
    ((INTS)vqtbl1q_u8((uint8x16_t)(table), (uint8x16_t)(i)))
#define ZIP_LOW(a, b) vzip1q_s32(a, b)
#define ZIP_HIGH(a, b) vzip2q_s32(a, b)
#define PAIR_LOW(a, b) ((INTS)vzip1q_s64((int64x2_t)(a), (int64x2_t)(b)))
#define PAIR_HIGH(a, b) ((INTS)vzip2q_s64((int64x2_t)(a), (int64x2_t)(b)))
#define SUM_4(a, b, c, d) vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d))
#define PACK_16(a, b) ((INTS)vuzp1q_s16((int16x8_t)(a), (int16x8_t)(b)))
#define PACK_8(a, b) ((INTS)vuzp1q_s8((int8x16_t)(a), (int8x16_t)(b)))
#define DOT_PAIRS(a, b) \
    vpaddq_s32(vmull_s16(vget_low_s16((int16x8_t)(a)), \
                         vget_low_s16((int16x8_t)(b))), \
               vmull_high_s16((int16x8_t)(a), (int16x8_t)(b)))

#elif defined LFM2_WASM

#define BLOCK(name) FN(name)
#define FMA(a, b, c) FN(fma)(a, b, c)
#define FMA_4 FMA
#define FROM_F16(h) FN(from_f16)(WIDEN(h))
#define WIDEN(h) __builtin_convertvector(h, UINTS)
#define LOOK_UP(table, i) \
    ((INTS)wasm_i8x16_swizzle((v128_t)(table), (v128_t)(i)))
#define WASM_PICK(type, ...) ((INTS)wasm_##type##_shuffle(__VA_ARGS__))
#define ZIP_LOW(a, b) WASM_PICK(i32x4, (v128_t)(a), (v128_t)(b), 0, 4, 1, 5)
#define ZIP_HIGH(a, b) WASM_PICK(i32x4, (v128_t)(a), (v128_t)(b), 2, 6, 3, 7)
#define PAIR_LOW(a, b) WASM_PICK(i64x2, (v128_t)(a), (v128_t)(b), 0, 2)
#define PAIR_HIGH(a, b) WASM_PICK(i64x2, (v128_t)(a), (v128_t)(b), 1, 3)
#define SUM_4(a, b, c, d) FN(sum_4)(a, b, c, d)
#define PACK_16(a, b) \
    ((INTS)wasm_i16x8_narrow_i32x4((v128_t)(a), (v128_t)(b)))
#define PACK_8(a, b) wasm_i8x16_narrow_i16x8((v128_t)(a), (v128_t)(b))
#define DOT_PAIRS(a, b) ((INTS)wasm_i32x4_dot_i16x8((v128_t)(a), (v128_t)(b)))

#else

#define MM(op) JOIN(_mm, BITS, _##op)
#define MM_INTS JOIN(__m, BITS, i)
#define BLOCK(name) name##_avx2           /* small blocks of all x86 sets    */
#define FMA(a, b, c) MM(fmadd_ps)(a, b, c)
#define FMA_4 _mm_fmadd_ps
#define FROM_F16(h) ((FLOATS)MM(cvtph_ps)((FN(half_ints))(h)))
#define WIDEN(h) ((UINTS)MM(cvtepu16_epi32)((FN(half_ints))(h)))
#define LOOK_UP(table, i) \
    ((INTS)MM(shuffle_epi8)((MM_INTS)(table), (MM_INTS)(i)))
#define ZIP_LOW(a, b) ((INTS)MM(unpacklo_epi32)((MM_INTS)(a), (MM_INTS)(b)))
#define ZIP_HIGH(a, b) ((INTS)MM(unpackhi_epi32)((MM_INTS)(a), (MM_INTS)(b)))
#define PAIR_LOW(a, b) ((INTS)MM(unpacklo_epi64)((MM_INTS)(a), (MM_INTS)(b)))
#define PAIR_HIGH(a, b) ((INTS)MM(unpackhi_epi64)((MM_INTS)(a), (MM_INTS)(b)))
#define SUM_4(a, b, c, d) FN(sum_4)(a, b, c, d)
#define DOT_PAIRS(a, b) ((INTS)MM(madd_epi16)((MM_INTS)(a), (MM_INTS)(b)))

#endif

/* For a loop whose arrays must become registers: without it clang keeps them in
 * memory, and products take twice as long. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* The compilers of browsers move all loads to the beginning of a basic block.
 * If it is long, they run out of registers. */
#ifdef LFM2_WASM
#define UNROLL_4 _Pragma("clang loop unroll_count(4)")
#define SHORT_BLOCKS 1
#else
#define UNROLL_4 UNROLL
#define SHORT_BLOCKS 0
#endif

/* Prefetch what is at p: for repeated use; for a single use, which evicts less
 * from the caches; and weights of a kernel.  With 256 bits, more of them are on
 * their way at a time if they go to the second-level cache: on Zen 4 a token
 * takes 0.6 to 0.9 of the time.  p may be any address. */
#if defined __GNUC__ && !defined LFM2_WASM
#define FETCH(p) __builtin_prefetch(p, 0, 3)
#define FETCH_ONCE(p) __builtin_prefetch(p, 0, 0)
#define FETCH_WEIGHTS(p) __builtin_prefetch(p, 0, LANES == 8 ? 2 : 0)
#else
#define FETCH(p) (void)(p)
#define FETCH_ONCE FETCH
#define FETCH_WEIGHTS FETCH
#endif

/* WebAssembly has no prefetch.  Loads whose results are not used serve instead:
 * nothing waits for them, so many are in flight at once. */
#ifdef LFM2_WASM
static void touch(const uint8_t *p, size_t n)
{
    if (((uintptr_t)p + n) >> 16 < __builtin_wasm_memory_size(0))
        for (size_t i = 0; i < n; i += 64)
            (void)*(const volatile uint8_t *)(p + i);
}
#endif

/* For sdot on ARM.  If gcc may reorder it, registers run out; clang does not
 * reorder it, but reloads operands around it if it is volatile. */
#ifdef __clang__
#define ASM __asm__
#else
#define ASM __asm__ volatile
#endif

enum {
    GROUP_BYTES = 80,                     /* of a group in struct x_quads    */
    PART_ROWS = 64,                       /* most rows of x for which panels
                                             do not have all columns ...     */
    PART_GROUPS = 16,                     /* ... but this many groups        */
    COPY_ROWS = 16,                       /* fewest rows of x for which
                                             weights in floats are copied    */
    AHEAD = 3072,                         /* bytes to prefetch beyond the next
                                             tile; found by measuring        */
    MOST_X_ROWS = 6                       /* the largest of the next three   */
};

/* Rows of x: the most that count as few, and how many at a time are multiplied
 * by a panel and by weights in floats.  TILE_REGS is the number of registers
 * for a row of a tile in attention.  AVX2 has 16 registers, the others have 32,
 * and WebAssembly those of the machine it runs on. */
#define FEW (LANES == 16 ? 6 : 3)
#ifdef LFM2_WASM
#define PANEL_X_ROWS 4
#define FLOAT_X_ROWS 3
#define TILE_REGS 2
#else
#define PANEL_X_ROWS (LANES == 16 ? 4 + 2 * DOT : LANES == 4 ? 3 + DOT : 3)
#define FLOAT_X_ROWS (LANES == 8 ? 3 : 6)
#define TILE_REGS (LANES == 8 ? 2 : 4)
#endif

/* Bytes of a row of weights in floats to multiply at a time: the first-level
 * cache holds the same columns of FLOAT_X_ROWS rows of x, and the next ones. */
#define BLOCK_BYTES (6144 / FLOAT_X_ROWS)

/* Rows of weights, for few rows of x or for more; and what to prefetch. */
struct weight_rows {
    const uint8_t *at;
    size_t stride;
    int type, rows, groups, few;
    const uint8_t *next;
};

/* out[t] = `groups` groups of the panel in s times those at x[t]; or += if they
 * are not the first. */
struct panel_job {
    const struct scratch *s;
    const struct q8_group *x[MOST_X_ROWS];
    float *out;
    int groups, is_first;
    int offset;                           /* of the bytes of the panel       */
};

/* A block of `cols` columns: rows of weights in floats at w times n rows of x.
 * In w the next row is `stride` bytes on, the next 16 columns w_step.
 * Meanwhile weights from `next` to `end` are prefetched, `step` bytes for every
 * 16 columns, and at last the next columns of n_next rows of x. */
struct float_job {
    const uint8_t *w;
    size_t stride, w_step;
    const float *x[MOST_X_ROWS], *next_x[MOST_X_ROWS];
    int n, cols, type, is_first, is_packed, n_next, step;
    const uint8_t *next, *end;
    float *chain;                         /* [n][UNIT][16]                   */
};

#else /* KERNELS */

typedef float FN(floats) __attribute__((vector_size(BITS / 8)));
typedef float FN(four) __attribute__((vector_size(16)));
typedef float FN(loose) __attribute__((vector_size(BITS / 8), aligned(1),
                                       may_alias));
typedef int32_t FN(loose_int) __attribute__((aligned(1), may_alias));
typedef int32_t FN(ints) __attribute__((vector_size(BITS / 8)));
typedef uint32_t FN(uints) __attribute__((vector_size(BITS / 8)));
typedef int8_t FN(bytes) __attribute__((vector_size(BITS / 8)));
typedef int16_t FN(words) __attribute__((vector_size(BITS / 8)));
typedef uint16_t FN(half) __attribute__((vector_size(BITS / 16)));

#ifndef LFM2_ARM

KERNEL_INLINE INTS FN(sum_4)(INTS a, INTS b, INTS c, INTS d)
{
    INTS ab = ZIP_LOW(a, b) + ZIP_HIGH(a, b);
    INTS cd = ZIP_LOW(c, d) + ZIP_HIGH(c, d);

    return PAIR_LOW(ab, cd) + PAIR_HIGH(ab, cd);
}

#endif
#if LANES == 4

KERNEL_INLINE INTS FN(quads)(const uint8_t *p, const uint8_t *at)
{
    return (INTS)LOAD(p + at[0]);
}

KERNEL_INLINE INTS FN(row_quads)(const uint8_t *p, size_t stride)
{
    (void)stride;
    return (INTS)LOAD(p);
}

KERNEL_INLINE void FN(store_bytes)(struct q8_group *to, const INTS q[8])
{
    UNROLL
    for (int h = 0; h < 2; h++, q += 4) {
        const INTS sum = q[0] + q[1] + q[2] + q[3];
        const INTS low = PACK_16(q[0], q[1]), high = PACK_16(q[2], q[3]);
        STORE(to->q + 16 * h, (FLOATS)PACK_8(low, high));
        to->sum[h] = (int16_t)SUM_4(sum, sum, sum, sum)[0];
    }
}

#endif
#ifdef LFM2_WASM

/* fma_f32(), where there is no relaxed multiply-add.  Rounding s again can go
 * wrong only if it is halfway between two floats.  Then its last 28 bits are 0,
 * and only such numbers are made odd. */
typedef double FN(doubles) __attribute__((vector_size(32)));
typedef int64_t FN(longs) __attribute__((vector_size(32)));

KERNEL_INLINE FN(doubles) FN(to_odd)(FN(doubles) s, FN(doubles) p,
                                     FN(doubles) c)
{
    const FN(doubles) t = s - p, err = (p - (s - t)) + (c - t);
    const FN(longs) step = ((FN(longs))err ^ (FN(longs))s) >> 63 | 1;
    const FN(longs) is_even = ((FN(longs))s & 1) - 1;
    const FN(longs) is_inexact = (FN(longs))(err < 0) | (FN(longs))(err > 0);

    return (FN(doubles))((FN(longs))s + (step & is_even & is_inexact));
}

KERNEL_INLINE FLOATS FN(fma)(FLOATS a, FLOATS b, FLOATS c)
{
#if DOT
    return (FLOATS)wasm_f32x4_relaxed_madd((v128_t)a, (v128_t)b, (v128_t)c);
#else
#define TO_DOUBLES(v) __builtin_convertvector(v, FN(doubles))
#define DEMOTE(v) wasm_f32x4_demote_f64x2_zero((v128_t)(v))
    const FN(doubles) p = TO_DOUBLES(a) * TO_DOUBLES(b), d = TO_DOUBLES(c);
    FN(doubles) s = p + d;

    const INTS last = __builtin_convertvector((FN(longs))s, INTS);
    if (!wasm_i32x4_all_true((v128_t)(last << 4)))
        s = FN(to_odd)(s, p, d);
    return (FLOATS)PAIR_LOW(DEMOTE(__builtin_shufflevector(s, s, 0, 1)),
                            DEMOTE(__builtin_shufflevector(s, s, 2, 3)));
#endif
}

/* f16_to_f32(), with sign and number moved at once. */
KERNEL_INLINE FLOATS FN(from_f16)(UINTS h)
{
    const INTS a = (INTS)(h << 16) >> 3 & ~0x70000000;
    const INTS special = (INTS)((a & 0x7fffffff) >= 0x0f800000);

    return (FLOATS)((INTS)((FLOATS)a * 0x1p112f) | (special & 0x7f800000));
}

#elif LANES == 8

typedef __m128i FN(half_ints);

KERNEL_INLINE INTS FN(quads)(const uint8_t *p, const uint8_t *at)
{
    const __m128i low = _mm_loadu_si128((const void *)(p + at[0]));
    const __m128i high = _mm_loadu_si128((const void *)(p + at[1]));

    return at[1] == at[0] ? (INTS)_mm256_broadcastsi128_si256(low)
                          : (INTS)_mm256_set_m128i(high, low);
}

KERNEL_INLINE INTS FN(row_quads)(const uint8_t *p, size_t stride)
{
    const __m128i low = _mm_loadu_si128((const void *)p);
    const __m128i high = _mm_loadu_si128((const void *)(p + 4 * stride));

    return (INTS)_mm256_set_m128i(high, low);
}

/* AVX2 packs quad by quad, so afterwards fours of bytes are put in order. */
KERNEL_INLINE void FN(store_bytes)(struct q8_group *to, const INTS q[4])
{
    __m256i v = _mm256_packs_epi16(
        _mm256_packs_epi32((__m256i)q[0], (__m256i)q[1]),
        _mm256_packs_epi32((__m256i)q[2], (__m256i)q[3]));

    v = _mm256_permutevar8x32_epi32(
        v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    memcpy(to->q, &v, sizeof v);
    v = _mm256_maddubs_epi16(_mm256_set1_epi8(1), v);
    INTS sum = DOT_PAIRS((INTS)v, (INTS){ 0 } + 0x00010001);
    to->sum[0] = (int16_t)(sum[0] + sum[1] + sum[2] + sum[3]);
    to->sum[1] = (int16_t)(sum[4] + sum[5] + sum[6] + sum[7]);
}

#elif LANES == 16

typedef __m256i FN(half_ints);

KERNEL_INLINE INTS FN(join)(__m256i low, __m256i high)
{
    return (INTS)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

KERNEL_INLINE INTS FN(quads)(const uint8_t *p, const uint8_t *at)
{
    const __m256i low = (__m256i)quads_avx2(p, at);

    return at[1] == at[0] && at[2] == at[0] && at[3] == at[0]
        ? (INTS)_mm512_broadcast_i32x4(_mm256_castsi256_si128(low))
        : FN(join)(low, (__m256i)quads_avx2(p, at + 2));
}

KERNEL_INLINE INTS FN(row_quads)(const uint8_t *p, size_t stride)
{
    return FN(join)((__m256i)row_quads_avx2(p, stride),
                    (__m256i)row_quads_avx2(p + 8 * stride, stride));
}

#endif

/* The same number in all lanes, or the same byte.  (-0 + 0 would be 0.) */
#define SPLAT(f) ((f) - (FLOATS){ 0 })
#define SPLAT_INT(n) ((INTS){ 0 } + (n))
#define SPLAT_BYTE(n) SPLAT_INT((int32_t)((uint32_t)(n) * 0x01010101u))

/* A logical shift to the right: by one number, or each lane by its own. */
#define SHIFT(v, n) ((INTS)((UINTS)(v) >> (UINTS)((INTS){ 0 } + (n))))

#define TO_FLOATS(v) __builtin_convertvector(v, FLOATS)

KERNEL_INLINE FOUR FN(quad)(FLOATS v, const int i)
{
    FOUR four;
    memcpy(&four, (const char *)&v + 16 * i, sizeof four);
    return four;
}

/* sum_16(), four additions at a time. */
KERNEL_INLINE float FN(tree)(const void *chains)
{
    FOUR v[4];

    memcpy(v, chains, sizeof v);
    v[0] = (v[0] + v[2]) + (v[1] + v[3]);
    return (v[0][0] + v[0][2]) + (v[0][1] + v[0][3]);
}

/* a where m is true, b elsewhere. */
KERNEL_INLINE FLOATS FN(choose)(INTS m, FLOATS a, FLOATS b)
{
    return (FLOATS)(((INTS)a & m) | ((INTS)b & ~m));
}

/* n[i] in all lanes of quad i. */
KERNEL_INLINE INTS FN(quad_ints)(const uint8_t *n)
{
    INTS v = { 0 };

    UNROLL
    for (int i = 0; i < LANES; i++)
        v[i] = n[i / 4];
    return v;
}

/* The 16 bytes at p in all quads. */
#define REPEAT_16(p) FN(quads)(p, (const uint8_t[4]){ 0 })

/* Transpose 4 x 4 numbers in every quad. */
KERNEL_INLINE void FN(transpose_4)(INTS v[4])
{
    const INTS ab[2] = { ZIP_LOW(v[0], v[1]), ZIP_HIGH(v[0], v[1]) };
    const INTS cd[2] = { ZIP_LOW(v[2], v[3]), ZIP_HIGH(v[2], v[3]) };

    UNROLL
    for (int i = 0; i < 2; i++) {
        v[2 * i] = PAIR_LOW(ab[i], cd[i]);
        v[2 * i + 1] = PAIR_HIGH(ab[i], cd[i]);
    }
}

/* The lower 16 bits of every number are a binary16 number. */
#ifdef LFM2_WASM
#define LOW_F16(v) FN(from_f16)((UINTS)(v))
#else
#define LOW_F16(v) FROM_F16(__builtin_convertvector((UINTS)(v), HALF))
#endif

/* The small blocks.  Each does to every element what its namesake of Part I,
 * section 7 or 10 does, in the same order. */
KERNEL_INLINE FLOATS FN(exp)(FLOATS x)
{
    FLOATS y = FN(choose)(x > 88.0f, SPLAT(88.0f), x);
    FLOATS t = FMA(y, SPLAT(1.44269504f), SPLAT(ROUND_MAGIC));
    FLOATS n = t - ROUND_MAGIC;
    FLOATS r = FMA(n, SPLAT(-0.693145752f), y), p = SPLAT(exp_taylor[0]);

    r = FMA(n, SPLAT(-1.42860677e-6f), r);
    UNROLL
    for (int i = 1; i < 8; i++)
        p = FMA(p, r, SPLAT(exp_taylor[i]));
    p = (FLOATS)((UINTS)p + ((UINTS)t << 23));
    p = (FLOATS)((INTS)p & ~(INTS)(x < -87.0f));
    return FN(choose)(x == x, p, x);
}

#if LANES < 16 && (!DOT || defined LFM2_WASM)

KERNEL float FN(dot_f32)(const float *a, const float *b, int n)
{
    FLOATS chain[CHAINS] = { { 0 } };

    if (n % 16 != 0)
        return dot_f32(a, b, n);
    for (int i = 0; i < n; i += 16)
        UNROLL
        for (int h = 0; h < CHAINS; h++)
            chain[h] = FMA(LOAD(a + i + h * LANES), LOAD(b + i + h * LANES),
                           chain[h]);
    return FN(tree)(chain);
}

KERNEL void FN(swiglu)(float *gate, const float *up, int n)
{
    for (int i = 0; i < n; i += LANES) {
        FLOATS g = LOAD(gate + i), u = LOAD(up + i);
        STORE(gate + i, g / (1.0f + FN(exp)(-g)) * u);
    }
}

KERNEL void FN(add_scaled)(float *y, float a, const float *x, int n)
{
    int i = 0;

    for (; i + LANES <= n; i += LANES)
        STORE(y + i, FMA(SPLAT(a), LOAD(x + i), LOAD(y + i)));
    add_scaled(y + i, a, x + i, n - i);
}

KERNEL void FN(rope)(float *head, const float *turn, int head_dim)
{
    const int half = head_dim / 2;

    if (half % LANES != 0) {
        rope(head, turn, head_dim);
        return;
    }
    for (int i = 0; i < half; i += LANES) {
        FLOATS c = LOAD(turn + i), s = LOAD(turn + half + i);
        FLOATS a = LOAD(head + i), b = LOAD(head + half + i);
        STORE(head + i, FMA(a, c, -(b * s)));
        STORE(head + half + i, FMA(b, c, a * s));
    }
}

KERNEL void FN(conv_step)(float *y, float *const *u, const float *w,
                          const float *b, const float *c, float *x, int l_cache,
                          size_t n)
{
    const size_t last = (size_t)l_cache - 1;

    for (size_t i = 0; i < UNIT; i += LANES) {
        FLOATS v = LOAD(w + i) * LOAD(u[0] + i);
        STORE(u[last] + i, LOAD(b + i) * LOAD(x + i));
        for (size_t k = 1; k <= last; k++)
            v = FMA(LOAD(w + k * n + i), LOAD(u[k] + i), v);
        STORE(x + i, v);
        STORE(y + i, LOAD(c + i) * v);
    }
}

KERNEL void FN(quantize)(struct q8_group *to, const float *x)
{
    FLOATS v[CHAINS * 2];
    INTS q[CHAINS * 2], top = { 0 };
    int32_t largest = 0;

    UNROLL
    for (int i = 0; i < 2 * CHAINS; i++) {
        v[i] = LOAD(x + LANES * i);
        INTS size = (INTS)v[i] & 0x7fffffff;
        top ^= (top ^ size) & (size > top);
    }
    UNROLL
    for (int i = 0; i < LANES; i++)
        largest = top[i] > largest ? top[i] : largest;
    const float amax = float_of((uint32_t)largest);
    if (!(amax >= 0x1p-100f && amax <= FLT_MAX)) {
        quantize(to, x);
        return;
    }
    UNROLL
    for (int i = 0; i < 2 * CHAINS; i++) {
        FLOATS r = v[i] * (127 / amax) + ROUND_MAGIC;
        q[i] = __builtin_convertvector(r - ROUND_MAGIC, INTS);
    }
    FN(store_bytes)(to, q);
    to->d = amax / 127;
    to->s = to->d * (float)(to->sum[0] + to->sum[1]);
}

#endif

/* ------------------------------------------------ 12. Kernels: products
 *
 * Few rows of x (FEW at most): the memory is the limit.  Weights go from the
 * file to registers and are never stored, four rows at a time, because CPUs
 * prefetch from a few places only.  A step takes QUADS groups of each row,
 * group g + i in quad i:
 *
 *     w[r]      | row r: 16 columns of g | row r: 16 columns of g+1 | ..
 *     x         |     x: 16 columns of g |     x: 16 columns of g+1 | ..
 *     dot[r]    | 4 sums of 4 products   | 4 sums of 4 products     | ..
 *
 * SUM_4() adds up these quads, dot[0] .. dot[3] at once.  The scales are laid
 * out like the result; so one quad after the other is scaled and added:
 *
 *     sum       | g: rows 0, 1, 2, 3     | g+1: rows 0, 1, 2, 3     | ..
 *
 * Many rows of x: the arithmetic is the limit.  LANES rows of weights are
 * unpacked to a tile, by transposing 4 x 4 numbers in each quad (r, i: 0 .. 3):
 *
 *     v[r]      | row r: columns 0 .. 15            | row 4 + r           | ..
 *     v[i]      | columns 4i .. 4i+3 of rows 0 .. 3 | of rows 4 .. 7      | ..
 *
 * Then lane r has row r.  Multiplied by four columns of x, the same in every
 * lane, it has the sum for that row, and nothing is added up across lanes.  Two
 * tiles are a panel:
 *
 *     q    [groups][8][2 tiles][LANES rows][4 columns]   u8: weight + offset,
 *                                                        on ARM s8: weight
 *     d, m [groups][2 tiles][2 halves][LANES rows]       float
 *
 * For more than PART_ROWS rows of x a panel has all columns and stays in the
 * second-level cache; for fewer it has PART_GROUPS groups at a time and stays
 * in the first.
 *
 * A function that takes a format k is inlined where k is a constant, so tests
 * of its fields cost nothing.  What a profile calls product_Q4_0_avx2() is
 * FN(product_##type) here. */

#define PANEL_ROWS (2 * LANES)            /* of weights                      */

/* UNSIGNED: weights are multiplied as unsigned bytes, with their offset.
 * PAIRS: by an instruction that adds two products, not four.  (WebAssembly's is
 * relaxed, but exact everywhere if weights have seven bits.) */
#ifdef LFM2_WASM
#define UNSIGNED DOT
#define PAIRS DOT
#else
#define UNSIGNED (LANES > 4)
#define PAIRS (LANES > 4 && !DOT)
#endif

/* What makes signed bytes unsigned, for vpdpbusd. */
#define SIGN_OFFSET (DOT && LANES > 4 ? 128 : 0)

/* The four bytes at p, in all lanes. */
#define REPEAT_4(p) SPLAT_INT(*(const FN(loose_int) *)(const void *)(p))

/* With few rows of x, weights of these formats are masked but not shifted: the
 * sum is.  vpdpbusd can do it, which uses all eight bits of a byte. */
#define IN_PLACE(k) (DOT && LANES > 4 && !(k)->split && !(k)->high.mask && \
                     !(k)->is_signed)

/* Where weights are read.  For few rows of x: one row, whose group g + i, at
 * of[i], goes to quad i.  For a tile: every fourth of its rows, `stride` bytes
 * apart, whose group g, at of[0], goes to one quad each. */
struct FN(source) { const uint8_t *at; size_t stride; int is_tile; };

KERNEL_INLINE INTS FN(read)(struct FN(source) b, size_t at, const uint8_t *of)
{
    return b.is_tile ? FN(row_quads)(b.at + at + of[0], b.stride)
                     : FN(quads)(b.at + at, of);
}

/* One field of columns 16h .. 16h+15. */
KERNEL_INLINE INTS FN(field)(const struct bit_field *f, struct FN(source) b,
                             const int g, const int h, const int in_place)
{
    const INTS v = FN(read)(b, (size_t)f->at + 16 * (size_t)h, f->of + g);
    const INTS shift = b.is_tile ? SPLAT_INT(f->shift[g])
                                 : FN(quad_ints)(f->shift + g);
    const INTS mask = SPLAT_BYTE(f->mask);

    return in_place ? v & mask << shift : SHIFT(v, shift) & mask;
}

/* Bit 16h + i of the 32-bit number at `at` becomes bit 4 of byte i. */
KERNEL_INLINE INTS FN(fifth_bits)(struct FN(source) b, size_t at,
                                  const uint8_t *of, const int h)
{
    static const uint8_t which[16] = {
        1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128
    };
    static const uint8_t byte[16] = { 0, 0, 0, 0, 0, 0, 0, 0,
                                      1, 1, 1, 1, 1, 1, 1, 1 };
    const INTS bit = REPEAT_16(which);
    const INTS from = REPEAT_16(byte) + SPLAT_BYTE(2 * h);
    const INTS v = LOOK_UP(FN(read)(b, at, of), from) & bit;

    return (INTS)((FN(bytes))v == (FN(bytes))bit) & SPLAT_BYTE(16);
}

/* Columns 0..15 to w[0], 16..31 to w[1]: unsigned bytes from which the offset
 * is not subtracted yet, or signed bytes plus SIGN_OFFSET. */
KERNEL_INLINE void FN(unpack)(INTS w[2], struct FN(source) b, const int g,
                              const int in_place, const struct format *k)
{
    if (k->split) {
        INTS v = FN(read)(b, k->low.at, k->low.of + g);
        w[0] = v & SPLAT_BYTE(15);
        w[1] = SHIFT(v, 4) & SPLAT_BYTE(15);
    }
    UNROLL
    for (int h = 0; h < 2; h++) {
        if (!k->split)
            w[h] = FN(field)(&k->low, b, g, h, in_place);
        if (k->high.mask)
            w[h] |= FN(field)(&k->high, b, g, h, 0) << k->high_to;
        if (k->fifth)
            w[h] |= FN(fifth_bits)(b, (size_t)k->low.at - 4, k->low.of + g, h);
        if (k->iq4)
            w[h] = LOOK_UP(REPEAT_16((const void *)iq4_value), w[h]);
        if (k->is_signed)
            w[h] ^= SPLAT_BYTE(SIGN_OFFSET);
    }
}

/* The scales and minima of four rows, in each quad, or of the rows of a tile.
 * Blocks of 32: d and m of one block, of block i in quad i for four rows.
 * K blocks: d and dmin, the same in all quads; and the factors of group or half
 * j, byte j % 4 of the numbers of s[j / 4] and min[j / 4]. */
struct FN(w_scales) {
    FLOATS d, m;
    INTS s[4], min[4];
};

/* Bytes at + 4j .. at + 4j+3 of each row become its number in v[j]: of four
 * rows, the same in all quads, or of the rows of a tile. */
KERNEL_INLINE void FN(load_16)(INTS v[4], struct FN(source) b, int at,
                               size_t stride)
{
    UNROLL
    for (int i = 0; i < 4; i++, b.at += stride)
        v[i] = FN(read)(b, (size_t)at, (const uint8_t[4]){ 0 });
    FN(transpose_4)(v);
}

/* The first four bytes of QUADS blocks of four rows, block i in quad i; or of
 * one block of each row of a tile.  If blocks have 16 to 20 bytes, one load has
 * all these beginnings, that of block i in quad i. */
KERNEL_INLINE INTS FN(block_heads)(struct FN(source) b, size_t stride,
                                   const struct format *k)
{
    const int in_one = LANES > 4 && k->bytes <= 20 && !b.is_tile;
    const uint8_t from[4] = EACH((uint8_t)(k->bytes - 16));
    const INTS pick = FN(quad_ints)(from) * 0x01010101 + 0x03020100;
    INTS v[4];

    UNROLL
    for (int r = 0; r < 4; r++, b.at += stride)
        v[r] = in_one ? LOOK_UP(LOAD(b.at), pick) : FN(read)(b, 0, k->low.of);
    FN(transpose_4)(v);
    return v[0];
}

/* scale_at() for a whole K block, from the 16 bytes with the scales. */
KERNEL_INLINE void FN(unpack_scales)(struct FN(w_scales) *to, const INTS h[4],
                                     const struct format *k)
{
#define BYTE_BITS(v, n, mask) (SHIFT(v, n) & SPLAT_BYTE(mask))
    if (k->scales == Q4_K) {
        to->s[0] = BYTE_BITS(h[1], 0, 63);
        to->min[0] = BYTE_BITS(h[2], 0, 63);
        to->s[1] = BYTE_BITS(h[3], 0, 15) | BYTE_BITS(h[1], 2, 48);
        to->min[1] = BYTE_BITS(h[3], 4, 15) | BYTE_BITS(h[2], 2, 48);
    }
    UNROLL
    for (int j = 0; j < 4; j++)
        if (k->scales == Q2_K) {
            to->s[j] = BYTE_BITS(h[j], 0, 15);
            to->min[j] = BYTE_BITS(h[j], 4, 15);
        } else if (k->scales == Q3_K) {
            to->s[j] = BYTE_BITS(h[1 + j % 2], j / 2 * 4, 15) |
                       BYTE_BITS(h[3], j * 2, 3) << 4;
        } else if (k->scales == Q6_K) {
            to->s[j] = h[j] ^ SPLAT_BYTE(128);
        } else if (k->scales == IQ4_XS && j < 2) {
            INTS low = SHIFT(h[1], 16 * j) & 0xffff;       /* 4 x 4 bits     */
            INTS high = SHIFT(h[0], 16 + 8 * j) & 0xff;    /* 4 x 2 bits     */
            low = (low | low << 8) & 0x00ff00ff;
            low = (low | low << 4) & 0x0f0f0f0f;
            high = (high | high << 12) & 0x000f000f;
            high = (high | high << 6) & 0x03030303;
            to->s[j] = low | high << 4;
        }
}

/* The scales at b.  If a K block begins with d and dmin, they are among the 16
 * bytes. */
KERNEL_INLINE void FN(read_scales)(struct FN(w_scales) *to, struct FN(source) b,
                                   size_t stride, const struct format *k)
{
    INTS h[4], head;

    if (k->block == 32) {
        head = FN(block_heads)(b, stride, k);
    } else {
        FN(load_16)(h, b, k->scales_at, stride);
        FN(unpack_scales)(to, h, k);
        if (k->d_at > 0)                  /* the block ends with d, or dmin  */
            FN(load_16)(h, b, k->bytes - 16, stride);
        head = k->d_at == 0 ? h[0] : k->has_min ? h[3] : SHIFT(h[3], 16);
    }
    to->d = LOW_F16(head);
    to->m = LOW_F16(SHIFT(head, 16));
    if (k->block == 32)
        to->m = -to->m;                   /* weight = d q + m                */
}

/* Factor i + j * step of each row, in quad j. */
KERNEL_INLINE FLOATS FN(factor)(const INTS s[4], const int i, const int step)
{
    static const uint8_t upper[4] = { 0, 0, 255, 255 };
    uint8_t down[4];
    INTS v = s[i / 4];

    UNROLL
    for (int j = 0; j < 4; j++)
        down[j] = (uint8_t)((i + j * step) % 4 * 8);
    if (LANES == 16 && step == 2)         /* quads 2 and 3: in the next s    */
        v ^= (v ^ s[i / 4 + 1]) & FN(quad_ints)(upper) * 0x01010101;
    return TO_FLOATS(SHIFT(v, FN(quad_ints)(down)) & 255);
}

/* d and m of the halves of group g; for four rows, of group g + i in quad i. */
KERNEL_INLINE void FN(group_scales)(FLOATS d[2], FLOATS m[2],
                                    const struct FN(w_scales) *s, const int g,
                                    const int is_tile, const struct format *k)
{
    const int step = is_tile ? 0 : k->halves;

    m[0] = m[1] = SPLAT(0);
    UNROLL
    for (int h = 0; h < k->halves; h++) {
        const int i = k->halves * g + h;
        d[h] = s->d;
        m[h] = s->m;
        if (k->scales)
            d[h] *= FN(factor)(s->s, i, step) - (float)k->scale_offset;
        if (k->scales && k->has_min)
            m[h] *= FN(factor)(s->min, i, step);
    }
}

/* What struct q8_group has besides q, with both sums in one number. */
struct FN(x_scales) { FLOATS d, s; INTS sum; };

/* A group adds a[0] b[0] to a result and, if there is a minimum, a[1] b[1]. */
struct FN(addends) { FLOATS a[2], b[2]; };

/* One step of dot_row().  s has the integer dot products of the halves, or s[0]
 * that of the whole group. */
KERNEL_INLINE struct FN(addends) FN(scale_sums)(const INTS s[2],
                                                const FLOATS d[2],
                                                const FLOATS m[2],
                                                const struct FN(x_scales) *x,
                                                const struct format *k)
{
    if (k->halves == 1)
        return (struct FN(addends)){ { d[0] * x->d, -m[0] },
                                     { TO_FLOATS(s[0]), x->s } };
    const FLOATS sum0 = TO_FLOATS(DOT_PAIRS(x->sum, SPLAT_INT(1)));
    const FLOATS sum1 = TO_FLOATS(DOT_PAIRS(x->sum, SPLAT_INT(1 << 16)));
    return (struct FN(addends)){
        { x->d, -x->d },
        { FMA(d[1], TO_FLOATS(s[1]), d[0] * TO_FLOATS(s[0])),
          FMA(m[1], sum1, m[0] * sum0) }
    };
}

/* The bytes that are multiplied are weights plus this.  minus_offset() corrects
 * the dot product of half h of a group, or of all of it: -offset times the sum
 * of that x. */
#define OFFSET(k) ((k)->is_signed ? SIGN_OFFSET : (k)->offset)

KERNEL_INLINE INTS FN(minus_offset)(INTS sum, const int h, int offset,
                                    const struct format *k)
{
    const uint32_t n = (uint32_t)-offset & 0xffff;
    const uint32_t both = k->halves == 1 ? n | n << 16 : n << 16 * h;
    return DOT_PAIRS(sum, SPLAT_INT((int32_t)both));
}

#if PAIRS

/* How many results of byte_pairs() can be added without overflow: for signed
 * bytes, and weights of six bits, and of up to five. */
#define TERMS(k) ((k)->is_signed ? 1 : (k)->offset == 32 ? 2 : 4)

/* Sums of two products of bytes, in 16 bits.  The instruction wants w without
 * sign.  So where w has one, x86 gets |w| and x or -x; for WebAssembly the sign
 * bits are multiplied apart. */
KERNEL_INLINE FN(words) FN(byte_pairs)(INTS w, INTS x, int is_signed)
{
#ifdef LFM2_WASM
#define DOT_7(w) \
    ((FN(words))wasm_i16x8_relaxed_dot_i8x16_i7x16((v128_t)x, (v128_t)(w)))
    return is_signed ? DOT_7(w & SPLAT_BYTE(127)) -
                       (DOT_7(SHIFT(w, 7) & SPLAT_BYTE(1)) << 7) : DOT_7(w);
#else
    MM_INTS a = (MM_INTS)w, b = (MM_INTS)x;

    if (is_signed) {
#if LANES == 8
        b = _mm256_sign_epi8(b, a);
#else
        b = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a),
                                 _mm512_setzero_si512(), b);
#endif
        a = MM(abs_epi8)(a);
    }
    return (FN(words))MM(maddubs_epi16)(a, b);
#endif
}

#endif

/* To each number of s add the products of its four bytes.  sdot is assembly, as
 * not all compilers have a function for it if the default CPU lacks it. */
KERNEL_INLINE INTS FN(dot_4)(INTS s, INTS w, INTS x, int is_signed)
{
    (void)is_signed;
#if PAIRS
    return s + DOT_PAIRS((INTS)FN(byte_pairs)(w, x, is_signed),
                         SPLAT_INT(0x00010001));
#elif LANES == 16
    return (INTS)_mm512_dpbusd_epi32((__m512i)s, (__m512i)w, (__m512i)x);
#elif LANES == 8
    return (INTS)_mm256_dpbusd_avx_epi32((__m256i)s, (__m256i)w, (__m256i)x);
#elif defined LFM2_WASM
    s += DOT_PAIRS(wasm_i16x8_extend_low_i8x16((v128_t)w),
                   wasm_i16x8_extend_low_i8x16((v128_t)x));
    return s + DOT_PAIRS(wasm_i16x8_extend_high_i8x16((v128_t)w),
                         wasm_i16x8_extend_high_i8x16((v128_t)x));
#elif DOT
    ASM("sdot %0.4s, %1.16b, %2.16b" : "+w"(s) : "w"(w), "w"(x));
    return s;
#else
    int8x16_t a = (int8x16_t)w, b = (int8x16_t)x;
    int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    return vpadalq_s16(s, vpaddq_s16(low, vmull_high_s8(a, b)));
#endif
}

/* ---- few rows of x */

/* The dot product of half h of a group, or of all of it, as four sums in each
 * quad. */
KERNEL_INLINE INTS FN(dot_group)(const INTS w[2], const INTS x[2], const int h,
                                 const struct format *k)
{
#if PAIRS
    if (k->halves == 1 && TERMS(k) > 1)
        return DOT_PAIRS((INTS)(FN(byte_pairs)(w[0], x[0], 0) +
                                FN(byte_pairs)(w[1], x[1], 0)),
                         SPLAT_INT(0x00010001));
#endif
    const INTS s = FN(dot_4)(SPLAT_INT(0), w[h], x[h], k->is_signed);
    return k->halves == 1 ? FN(dot_4)(s, w[1], x[1], k->is_signed) : s;
}

/* QUADS groups of x, one in each quad: columns 0..15, 16..31, and scales. */
struct FN(x_quads) { INTS q[2]; struct FN(x_scales) scales; };
_Static_assert(sizeof(struct FN(x_quads)) == GROUP_BYTES * QUADS, "room for x");

/* A row of x, from its next groups on, and its results for four rows of w. */
struct FN(x_row) {
    const struct FN(x_quads) *x;
    FOUR acc;
};

/* Arrange x as [rows][groups / QUADS], once for all units of weights. */
KERNEL void FN(arrange)(const struct scratch *s, const struct input *in)
{
    static const uint8_t each[4] = EACH(sizeof(struct q8_group));
    struct FN(x_quads) *to = (void *)s->x;
    const struct input *done = s->arranged;

    if (in->n == done->n && in->q == done->q && in->row == done->row &&
        in->first == done->first)
        return;
    *s->arranged = *in;
    for (int t = 0; t < in->n; t++) {
        const struct q8_group *x =
            in->q + row_at(in, t) * (size_t)(in->cols / 32);
        for (int g = 0; g < in->cols / 32; g += QUADS, to++) {
            const uint8_t *p = (const uint8_t *)(x + g);
            const INTS last = FN(quads)(p + 28, each);   /* q[28], d, s, sum */
            to->q[0] = FN(quads)(p, each);
            to->q[1] = FN(quads)(p + 16, each);
            to->scales.d = (FLOATS)LOOK_UP(last, SPLAT_INT(0x07060504));
            to->scales.s = (FLOATS)LOOK_UP(last, SPLAT_INT(0x0b0a0908));
            to->scales.sum = LOOK_UP(last, SPLAT_INT(0x0f0e0d0c));
        }
    }
}

/* Groups g .. g+QUADS-1 of the blocks of four rows at b times those of x. */
KERNEL_INLINE void FN(few_step)(struct FN(x_row) *to, const int n,
                                const uint8_t *b, size_t stride, const int g,
                                const struct FN(w_scales) *s,
                                const struct format *k)
{
    const int offset = OFFSET(k);
    FLOATS d[2], m[2];
    INTS w[4][2];

    FN(group_scales)(d, m, s, g, 0, k);
    UNROLL
    for (int i = 0; i < 4; i++)
        FN(unpack)(w[i], (struct FN(source)){ b + (size_t)i * stride, 0, 0 }, g,
                   IN_PLACE(k), k);
    int t = 0;
    do {                                  /* of `for` clang makes two loops  */
        const struct FN(x_quads) *x = to[t].x + g / QUADS;
        INTS sum[2];

        UNROLL
        for (int h = 0; h < k->halves; h++) {
            INTS dot[4];
            UNROLL
            for (int i = 0; i < 4; i++)
                dot[i] = FN(dot_group)(w[i], x->q, h, k);
            sum[h] = SUM_4(dot[0], dot[1], dot[2], dot[3]);
            if (IN_PLACE(k))
                sum[h] >>= FN(quad_ints)(k->low.shift + g);
            if (offset)
                sum[h] += FN(minus_offset)(x->scales.sum, h, offset, k);
        }
        const struct FN(addends) add = FN(scale_sums)(sum, d, m, &x->scales, k);
        UNROLL
        for (int i = 0; i < QUADS; i++)
            UNROLL
            for (int j = 0; j <= k->has_min; j++)
                to[t].acc = FMA_4(FN(quad)(add.a[j], i), FN(quad)(add.b[j], i),
                                  to[t].acc);
    } while (++t < n);
}

/* Four rows of weights times n rows of x, QUADS blocks or a K block a step. */
KERNEL_INLINE void FN(few_rows)(struct FN(x_row) *to, const int n,
                                const struct weight_rows *w,
                                const struct format *k)
{
    const int per_step = k->block == 32 ? QUADS : 8;
    const size_t bytes = (size_t)(per_step * 32 / k->block * k->bytes);
    const uint8_t *b = w->at, *next = w->next;
    struct FN(w_scales) s;

    for (int left = w->groups; left > 0; left -= per_step, b += bytes) {
        FN(read_scales)(&s, (struct FN(source)){ b, 0, 0 }, w->stride, k);
        UNROLL
        for (size_t i = 0; i < 4 * bytes; i += 64)
            FETCH_WEIGHTS(next + i);
        next += 4 * bytes;
        UNROLL
        for (int g = 0; g < per_step; g += QUADS)
            FN(few_step)(to, n, b, w->stride, g, &s, k);
        for (int t = 0; t < n; t++)
            to[t].x += per_step / QUADS;
    }
}

/* out[t][r] = four rows of weights times the rows of x.  A single row of x has
 * its own code, without branches and with everything in registers; `several` is
 * the code for more. */
KERNEL_INLINE void FN(product_few)(float *out, const struct weight_rows *w,
                                   const struct input *in,
                                   const struct scratch *s,
                                   const struct format *k,
                                   void (*several)(struct FN(x_row) *to, int n,
                                                   const struct weight_rows *w))
{
    const struct FN(x_quads) *x = (const void *)s->x;
    struct FN(x_row) one = { .x = x }, *to = (void *)s->chain;

    if (in->n == 1 && !SHORT_BLOCKS) {
        FN(few_rows)(&one, 1, w, k);
        memcpy(out, &one.acc, sizeof one.acc);
        return;
    }
    for (int t = 0; t < in->n; t++, x += w->groups / QUADS)
        to[t] = (struct FN(x_row)){ .x = x };
    several(to, in->n, w);
    for (int t = 0; t < in->n; t++)
        memcpy(out + t * UNIT, &to[t].acc, sizeof to[t].acc);
}

/* ---- many rows of x */

/* Without DOT, WebAssembly multiplies pairs of 16-bit numbers.  So a register
 * has columns 0 and 1 of all rows, then columns 2 and 3. */
#ifdef LFM2_WASM
#define TILE_ORDER(v) \
    (DOT ? (INTS)(v) : \
     WASM_PICK(i16x8, (v128_t)(v), (v128_t)(v), 0, 2, 4, 6, 1, 3, 5, 7))
#else
#define TILE_ORDER(v) ((INTS)(v))
#endif

/* Group g of the blocks of a tile at b: to q[8][2 tiles], d and m [halves]. */
KERNEL_INLINE void FN(group_to_tile)(INTS *q, FLOATS *d, FLOATS *m,
                                     struct FN(source) b, const int g,
                                     const struct FN(w_scales) *s,
                                     const struct format *k)
{
    const INTS offset = SPLAT_BYTE(UNSIGNED ? 0 : k->offset);
    FLOATS both[2][2];
    INTS w[4][2];

    UNROLL
    for (int i = 0; i < 4; i++, b.at += b.stride)
        FN(unpack)(w[i], b, g, 0, k);
    UNROLL
    for (int h = 0; h < 2; h++) {
        INTS v[4] = { w[0][h], w[1][h], w[2][h], w[3][h] };
        FN(transpose_4)(v);
        UNROLL
        for (int i = 0; i < 4; i++, q += 2)
            *q = TILE_ORDER((FN(bytes))v[i] - (FN(bytes))offset);
    }
    FN(group_scales)(both[0], both[1], s, g, 1, k);
    UNROLL
    for (int h = 0; h < k->halves; h++) {
        d[h] = both[0][h];
        if (k->has_min)
            m[h] = both[1][h];
    }
}

/* Tile number `tile` of the panel in p. */
KERNEL_INLINE void FN(unpack_tile)(const struct scratch *p, int tile,
                                   const struct weight_rows *w,
                                   const struct format *k)
{
    const int per_step = k->block == 32 ? QUADS : 8;
    const size_t bytes = (size_t)(per_step * 32 / k->block * k->bytes);
    struct FN(source) b = { w->at, w->stride, 1 };
    INTS *q = (INTS *)(void *)p->q + tile;
    FLOATS *d = (FLOATS *)(void *)p->d + 2 * tile;
    FLOATS *m = (FLOATS *)(void *)p->m + 2 * tile;
    const uint8_t *next = w->next;
    struct FN(w_scales) s;

    for (int left = w->groups; left > 0; left -= per_step, b.at += bytes) {
        for (size_t i = 0; i < bytes * LANES; i += 64)
            FETCH_WEIGHTS(next + i);
        next += bytes * LANES;
        for (int g = 0; g < per_step; g++, q += 16, d += 4, m += 4) {
            struct FN(source) first = b;
            first.at += k->block == 32 ? g * k->bytes : 0;
            if (k->block == 32 || g == 0)
                FN(read_scales)(&s, first, w->stride, k);
            FN(group_to_tile)(q, d, m, b, g, &s, k);
        }
    }
}

/* s[t][j] += half h, or all, of group w[8][2 tiles] of tile j times x[t][g]. */
KERNEL_INLINE void FN(panel_dots)(INTS s[][2], const INTS *w,
                                  const struct panel_job *p, int g, const int h,
                                  const int n_x, const struct format *k)
{
    const int first = 4 * h, n = 8 / k->halves;
#if PAIRS
    FN(words) part[PANEL_X_ROWS][2];
#endif

    UNROLL_4
    for (int i = first; i < first + n; i++)
        UNROLL
        for (int t = 0; t < n_x; t++) {
            const INTS v = TILE_ORDER(REPEAT_4(p->x[t][g].q + 4 * i));
            UNROLL
            for (int j = 0; j < 2; j++) {
#if PAIRS
                const int term = i % TERMS(k);
                FN(words) q = FN(byte_pairs)(w[2 * i + j], v, k->is_signed);
                part[t][j] = term ? part[t][j] + q : q;
                if (term == TERMS(k) - 1)
                    s[t][j] += DOT_PAIRS(part[t][j], SPLAT_INT(0x00010001));
#else
                s[t][j] = FN(dot_4)(s[t][j], w[2 * i + j], v, k->is_signed);
#endif
            }
        }
}

/* Group g of a panel, w[8][2 tiles], d, m [2 tiles][2 halves], times each x. */
KERNEL_INLINE void FN(panel_group)(FLOATS acc[][2], const INTS *w,
                                   const FLOATS *d, const FLOATS *m,
                                   const struct panel_job *p, int g,
                                   const int n_x, const struct format *k)
{
    INTS s[2][PANEL_X_ROWS][2];

    UNROLL
    for (int h = 0; h < k->halves; h++) {
        UNROLL
        for (int t = 0; t < n_x; t++)
            s[h][t][0] = s[h][t][1] = UNSIGNED && !k->has_min
                ? FN(minus_offset)(REPEAT_4(p->x[t][g].sum), h, p->offset, k)
                : SPLAT_INT(0);
        FN(panel_dots)(s[h], w, p, g, h, n_x, k);
    }
    UNROLL
    for (int t = 0; t < n_x; t++) {
        const struct q8_group *x = &p->x[t][g];
        const struct FN(x_scales) scales = { SPLAT(x->d), SPLAT(x->s),
                                             REPEAT_4(x->sum) };
        UNROLL
        for (int j = 0; j < 2; j++) {
            const INTS sum[2] = { s[0][t][j], s[k->halves - 1][t][j] };
            const struct FN(addends) add =
                FN(scale_sums)(sum, d + 2 * j, m + 2 * j, &scales, k);
            for (int i = 0; i <= k->has_min; i++)
                acc[t][j] = FMA(add.a[i], add.b[i], acc[t][j]);
        }
    }
}

/* A panel times n_x rows of x. */
KERNEL_INLINE void FN(multiply)(const int n_x, const struct panel_job *p,
                                const struct format *k)
{
    const INTS *w = (const void *)p->s->q;
    const FLOATS *d = (const void *)p->s->d, *m = (const void *)p->s->m;
    FLOATS acc[PANEL_X_ROWS][2];

    UNROLL
    for (int i = 0; i < 2 * n_x; i++)
        acc[i / 2][i % 2] = p->is_first ? SPLAT(0)
            : LOAD(p->out + i / 2 * UNIT + i % 2 * LANES);
    for (int g = 0; g < p->groups; g++, w += 16, d += 4, m += 4)
        FN(panel_group)(acc, w, d, m, p, g, n_x, k);
    UNROLL
    for (int i = 0; i < 2 * n_x; i++)
        STORE(p->out + i / 2 * UNIT + i % 2 * LANES, acc[i / 2][i % 2]);
}

/* n is a constant in each call, and so each n up to `most` has its own code. */
#define BY_ROWS(n, most, function, ...) \
    switch (n) { \
    case 1: function(1, __VA_ARGS__); break; \
    case 2: function(2, __VA_ARGS__); break; \
    case 3: function(3, __VA_ARGS__); break; \
    case 4: if ((most) >= 4) function(4, __VA_ARGS__); break; \
    case 5: if ((most) >= 5) function(5, __VA_ARGS__); break; \
    case 6: if ((most) >= 6) function(6, __VA_ARGS__); break; \
    }

#define MULTIPLY(type) \
    KERNEL void FN(multiply_##type)(const struct panel_job *p, int n) \
    { \
        BY_ROWS(n, PANEL_X_ROWS, FN(multiply), p, &formats[type]) \
    }
MULTIPLY(Q4_0)                            /* up to five bits, with offset    */
MULTIPLY(Q8_0)                            /* signed bytes                    */
MULTIPLY(Q4_K)                            /* with a minimum                  */
MULTIPLY(Q2_K)                            /* d and m for 16 columns          */
MULTIPLY(Q3_K)                            /* d for 16 columns                */
MULTIPLY(Q6_K)                            /* d for 16 columns, six bits      */

/* How many of n rows of x to take next, so that all takes are nearly equal. */
KERNEL_INLINE int FN(take_rows)(int n, int most)
{
    const int takes = (n + most - 1) / most;
    return (n + takes - 1) / takes;
}

/* The rows of a panel times any number of rows of x. */
KERNEL_INLINE void FN(product_panel)(float *out, const struct weight_rows *all,
                                     const struct input *in,
                                     const struct scratch *s,
                                     const struct format *k,
                                     void (*multiply)(const struct panel_job *p,
                                                      int n))
{
    const int most = in->n <= PART_ROWS ? PART_GROUPS : all->groups;
    struct weight_rows part = *all;
    struct panel_job p = { .s = s, .offset = OFFSET(k) };

    for (int g = 0; g < all->groups; g += part.groups) {
        const int left = all->groups - g;
        part.groups = p.groups = left < most ? left : most;
        const size_t bytes = (size_t)(p.groups * 32 / k->block * k->bytes);
        p.is_first = g == 0;
        for (int i = 0; i < 2; i++, part.next += LANES * bytes) {
            part.at = all->at + (size_t)(i * LANES) * all->stride +
                      (size_t)(g * 32 / k->block * k->bytes);
            FN(unpack_tile)(s, i, &part, k);
        }
        for (int t = 0, n; t < in->n; t += n) {
            n = FN(take_rows)(in->n - t, PANEL_X_ROWS);
            p.out = out + t * UNIT;
            for (int i = 0; i < n; i++)
                p.x[i] = in->q + row_at(in, t + i) * (size_t)all->groups + g;
            multiply(&p, n);
        }
    }
}

/* A panel of this type is multiplied by the code for `like`. */
#define PRODUCT(type, like) \
    KERNEL __attribute__((noinline)) \
    void FN(few_##type)(struct FN(x_row) *to, int n, \
                        const struct weight_rows *w) \
    { \
        FN(few_rows)(to, n, w, &formats[type]); \
    } \
    KERNEL void FN(product_##type)(float *out, const struct weight_rows *w, \
                                   const struct input *in, \
                                   const struct scratch *s) \
    { \
        if (w->few) \
            FN(product_few)(out, w, in, s, &formats[type], FN(few_##type)); \
        else \
            FN(product_panel)(out, w, in, s, &formats[type], \
                              FN(multiply_##like)); \
    }
PRODUCT(Q4_0, Q4_0) PRODUCT(Q4_1, Q4_K) PRODUCT(Q5_0, Q4_0) PRODUCT(Q5_1, Q4_K)
PRODUCT(Q8_0, Q8_0) PRODUCT(Q2_K, Q2_K) PRODUCT(Q3_K, Q3_K) PRODUCT(Q4_K, Q4_K)
PRODUCT(Q5_K, Q4_K) PRODUCT(Q6_K, Q6_K)
PRODUCT(IQ4_NL, Q8_0) PRODUCT(IQ4_XS, Q8_0)

/* ---- weights in floats: a register holds LANES of the 16 chains of a sum */

/* Numbers i .. i+LANES-1 of those at p. */
KERNEL_INLINE FLOATS FN(load_floats)(const uint8_t *p, size_t i, const int type)
{
    HALF h;

    if (type == F32)
        return LOAD(p + 4 * i);
    memcpy(&h, p + 2 * i, sizeof h);
    return type == F16 ? FROM_F16(h) : (FLOATS)(WIDEN(h) << 16);
}

/* Rows `row` .. row+3, whose columns h .. are at w, times n_x rows of x: go on
 * with chains h .. h+LANES-1 of each product for the columns of the block. */
KERNEL_INLINE void FN(float_tile)(const int n_x, const struct float_job *b,
                                  int row, const uint8_t *w, int h,
                                  const uint8_t *next, const int type)
{
    float *chain = b->chain + row * 16;
    const size_t stride = b->stride, w_step = b->w_step;
    const int cols = b->cols, step = b->step;
    const float *x[FLOAT_X_ROWS];
    FLOATS acc[FLOAT_X_ROWS][4], v[FLOAT_X_ROWS];
    int c = h;

    UNROLL
    for (int t = 0; t < n_x; t++) {
        x[t] = b->x[t];
        UNROLL
        for (int r = 0; r < 4; r++)
            acc[t][r] = b->is_first ? SPLAT(0)
                      : LOAD(chain + (t * UNIT + r) * 16 + h);
    }
    do {                                  /* `for` would copy acc            */
        for (int i = 0; i < 8 * LANES; i += 64)
            if (b->n_next > 0)
                FETCH(next + i);
            else
                FETCH_WEIGHTS(next + i);
        UNROLL
        for (int t = 0; t < n_x; t++)
            v[t] = LOAD(x[t] + c);
        UNROLL
        for (int r = 0; r < 4; r++) {
            FLOATS wr = FN(load_floats)(w + (size_t)r * stride, 0, type);
            UNROLL
            for (int t = 0; t < n_x; t++)
                acc[t][r] = FMA(wr, v[t], acc[t][r]);
        }
        c += 16;
        w += w_step;
        next += step;
    } while (c < cols);
    UNROLL
    for (int t = 0; t < n_x; t++)
        UNROLL
        for (int r = 0; r < 4; r++)
            STORE(chain + (t * UNIT + r) * 16 + h, acc[t][r]);
}

/* All products of a block, with `rows` rows of weights. */
KERNEL void FN(float_block)(struct float_job *b, int rows)
{
    const int n = rows / 4 * CHAINS, steps = b->cols / 16;

    for (int i = 0; i < n; i++) {
        const int r = i / CHAINS * 4, h = i % CHAINS * LANES;
        const size_t at = b->is_packed ? (size_t)(i * steps) * b->w_step
            : (size_t)r * b->stride + (size_t)h * (b->w_step / 16);
        const uint8_t *w = b->w + at, *next = b->next;

        if (i >= n - b->n_next)
            next = (const void *)b->next_x[i - n + b->n_next];
        else if (next < b->end)
            b->next += steps * b->step;
        else
            next = (const void *)b->x[0]; /* is there already                */
        if (b->type == F32)
            BY_ROWS(b->n, FLOAT_X_ROWS, FN(float_tile), b, r, w, h, next, F32)
        else if (b->type == F16)
            BY_ROWS(b->n, FLOAT_X_ROWS, FN(float_tile), b, r, w, h, next, F16)
        else
            BY_ROWS(b->n, FLOAT_X_ROWS, FN(float_tile), b, r, w, h, next, BF16)
    }
}

/* Copy rows of `row` bytes to [blocks][rows/4][CHAINS][columns/16][4][LANES],
 * the order in which tiles read them: what is contiguous does not compete for
 * the same places of a cache. */
KERNEL_INLINE void FN(pack)(uint8_t *to, const struct weight_rows *w,
                            size_t row, const size_t size)
{
    for (size_t at = 0; at < row; at += BLOCK_BYTES)
        for (int i = 0; i < w->rows / 4 * CHAINS; i++) {
            const uint8_t *from = w->at + i / CHAINS * 4 * w->stride +
                                  i % CHAINS * LANES * size;
            for (size_t c = at; c < at + BLOCK_BYTES && c < row; c += 16 * size)
                UNROLL
                for (int r = 0; r < 4; r++, to += LANES * size)
                    memcpy(to, from + r * w->stride + c, LANES * size);
        }
}

/* out[t][r] = rows of floats times all rows of x.  If x has more than FEW rows,
 * columns are multiplied block by block: FLOAT_X_ROWS rows of x stay in the
 * first-level cache while the weights come from the second. */
KERNEL void FN(product_floats)(float *out, const struct weight_rows *all,
                               const struct input *in, const struct scratch *s)
{
    const int cols = in->cols, rows = all->rows, copy = in->n >= COPY_ROWS;
    const size_t size = all->type == F32 ? 4 : 2;
    const int most = all->few ? cols : BLOCK_BYTES / (int)size;
    struct float_job b = {
        .type = all->type, .step = all->few ? 4 * (int)size * LANES : 64,
        .next = all->next, .end = all->next + (size_t)rows * all->stride,
        .chain = s->chain, .is_packed = copy,
        .stride = copy ? LANES * size : all->stride,
        .w_step = copy ? 4 * LANES * size : 16 * size
    };

    if (copy && size == 2)
        FN(pack)((void *)s->f, all, (size_t)cols * 2, 2);
    else if (copy)
        FN(pack)((void *)s->f, all, (size_t)cols * 4, 4);
    for (int t = 0; t < in->n; t += b.n) {
        b.n = FN(take_rows)(in->n - t, FLOAT_X_ROWS);
        b.n_next = all->few ? 0 : b.n;
        for (int c = 0; c < cols; c += b.cols) {
            b.is_first = c == 0;
            b.cols = cols - c < most ? cols - c : most;
            b.w = copy ? (const uint8_t *)s->f + (size_t)(c * rows) * size
                       : all->at + (size_t)c * size;
            for (int i = 0; i < b.n; i++) {
                const int then = t + b.n + i < in->n ? t + b.n + i : t;
                b.x[i] = in->f + row_at(in, t + i) * (size_t)cols + c;
                b.next_x[i] = c + b.cols < cols ? b.x[i] + b.cols
                            : in->f + row_at(in, then) * (size_t)cols;
            }
            FN(float_block)(&b, rows);
        }
        for (int i = 0; i < b.n; i++)
            for (int r = 0; r < rows; r++)
                out[(t + i) * UNIT + r] =
                    FN(tree)(s->chain + (i * UNIT + r) * 16);
    }
}

static void (*const FN(products)[N_FORMAT])(float *out,
                                            const struct weight_rows *w,
                                            const struct input *in,
                                            const struct scratch *s) = {
#define USE(type) [type] = FN(product_##type)
    USE(Q4_0), USE(Q4_1), USE(Q5_0), USE(Q5_1), USE(Q8_0), USE(Q2_K), USE(Q3_K),
    USE(Q4_K), USE(Q5_K), USE(Q6_K), USE(IQ4_NL), USE(IQ4_XS),
    [F32] = FN(product_floats), [F16] = FN(product_floats),
    [BF16] = FN(product_floats)
};

/* Four rows of weights at a time, or a panel, or in floats all fours.  The rows
 * left, and all if a row is not whole steps, are multiplied by the scalar code.
 * Meanwhile the weights `ahead` bytes further on are prefetched; instead of any
 * beyond `end`, those as far beyond `next`. */
KERNEL void FN(product)(float *out, const struct tensor *w, int first,
                        int n_rows, const struct input *in,
                        const struct scratch *s, const uint8_t *end,
                        const uint8_t *next)
{
    const int floats = w->fmt->floats != NULL, few = in->n <= FEW;
    const int rows = few ? 4 : floats ? n_rows / 4 * 4 : PANEL_ROWS;
    const int whole = w->cols % (floats ? 16 : 32 * QUADS) == 0;
    const size_t stride = row_bytes(w), bytes = stride * (size_t)rows;
    const int type = (int)(w->fmt - formats);
    const uint8_t *row = w->data + (size_t)first * stride;
    int done = 0;

    if (whole && few && !floats)
        FN(arrange)(s, in);
    for (; whole && rows > 0 && done + rows <= n_rows;
         done += rows, row += bytes) {
        const size_t ahead = bytes + AHEAD, left = (size_t)(end - row);
        const struct weight_rows some = {
            row, stride, type, rows, w->cols / 32, few,
            ahead < left ? row + ahead : next ? next + (ahead - left) : row
        };
#ifdef LFM2_WASM
        touch(some.next, bytes);
#endif
        FN(products)[type](out + done, &some, in, s);
    }
    product_rows(out + done, w, first + done, n_rows - done, in, s, end, next);
}

/* ---- attention: a tile of K or V is converted to floats once for all queries,
 * and stays in the first-level cache; four queries share each load from it */

/* The middle of attend_query(): s[n] becomes exp(s - max).  s is padded to a
 * multiple of 16 with -inf, which adds 0 to the sums, and they are never -0. */
KERNEL void FN(softmax)(struct attn_partial *g, float *s, int n)
{
    const int end = (n + 15) / 16 * 16;
    FLOATS max = SPLAT(-INFINITY), sum[CHAINS] = { { 0 } };

    for (int p = n; p < end; p++)
        s[p] = -INFINITY;
    for (int p = 0; p < end; p += LANES)
        max = FN(choose)(LOAD(s + p) > max, LOAD(s + p), max);
    g->max = max[0];
    for (int i = 1; i < LANES; i++)
        g->max = max[i] > g->max ? max[i] : g->max;
    for (int p = 0; p < end; p += 16)
        UNROLL
        for (int h = 0; h < CHAINS; h++) {
            float *at = s + p + h * LANES;
            FLOATS e = FN(exp)(LOAD(at) - g->max);
            STORE(at, e);
            sum[h] += e;
        }
    g->sum = FN(tree)(sum);
}

/* For each of four queries, from n rows of a tile, [n][width]:
 *
 *     to = a[0] row 0 + a[1] row 1 + ...         or, if is_more, to += that
 *
 * Meanwhile prefetch from `next` on. */
KERNEL_INLINE void FN(add_rows)(float *const to[4], int is_more,
                                const float *const a[4], const float *tile,
                                int width, int n, const uint8_t *next)
{
    enum { W = TILE_REGS };
    FLOATS acc[4][W], row[W];

    for (int at = 0; at < width; at += W * LANES) {
        UNROLL
        for (int i = 0; i < 4 * W; i++)
            acc[i / W][i % W] = is_more
                ? LOAD(to[i / W] + at + i % W * LANES) : SPLAT(0);
        for (int k = 0; k < n; k++, next += 2 * W * LANES) {
            for (int i = 0; i < 2 * W * LANES; i += 64)
                FETCH(next + i);
            UNROLL
            for (int i = 0; i < W; i++)
                row[i] = LOAD(tile + k * width + at + i * LANES);
            UNROLL
            for (int i = 0; i < 4 * W; i++)
                acc[i / W][i % W] = FMA(SPLAT(a[i / W][k]), row[i % W],
                                        acc[i / W][i % W]);
        }
        UNROLL
        for (int i = 0; i < 4 * W; i++)
            STORE(to[i / W] + at + i % W * LANES, acc[i / W][i % W]);
    }
}

/* The scores of the chunk at pos, from K, [head_dim][TILE] in each tile; or the
 * weighted values, from V, [TILE][head_dim].  Queries are taken four at a time,
 * all of which see the same positions.  If fewer are left, the last one is
 * repeated, and its result computed again. */
KERNEL void FN(attend_tiles)(struct attn_partial *part,
                             const struct attn_rows *a,
                             const struct kv_head *kv, int pos, int first,
                             const struct scratch *s, int is_v)
{
    const int hd = kv->head_dim, whole = chunk_seen(a, 0, pos) == CHUNK;
    const size_t bytes = (size_t)hd * (kv->f16 ? 2 : 4);
    const uint8_t *from = (is_v ? kv->v : kv->k) + (size_t)pos * bytes;

    for (int p = 0; p < chunk_seen(a, a->n - 1, pos); p += TILE) {
        for (int i = 0; i < TILE * hd; i += LANES)
            STORE(s->tile + i,
                  FN(load_floats)(from, (size_t)i, kv->f16 ? F16 : F32));
        from += TILE * bytes;
        for (int i = first, n; i < a->n * a->group; i += n) {
            const int row = i / a->group;
            const int left = (whole ? a->n : row + 1) * a->group - i;
            const int seen = chunk_seen(a, row, pos) - p;
            const float *by[4];
            float *to[4];

            n = left < 4 ? left : 4;
            for (int k = 0; k < 4; k++) {
                const int j = i + (k < n ? k : n - 1);
                float *score = s->score + (size_t)j * CHUNK + p;
                to[k] = is_v ? part[j].o : score;
                by[k] = is_v ? score : query_at(a, j, hd);
            }
            FN(add_rows)(to, is_v && p > 0, by, s->tile, is_v ? hd : TILE,
                         !is_v ? hd : seen < TILE ? seen : TILE, from);
        }
    }
}

/* `first` is the first query that sees some of the chunk. */
KERNEL void FN(attend_chunk)(struct attn_partial *part,
                             const struct attn_rows *a,
                             const struct kv_head *kv, int pos,
                             const struct scratch *s)
{
    const int first = pos > a->pos ? (pos - a->pos) * a->group : 0;

    FN(attend_tiles)(part, a, kv, pos, first, s, 0);
    for (int i = first; i < a->n * a->group; i++)
        FN(softmax)(&part[i], s->score + (size_t)i * CHUNK,
                    chunk_seen(a, i / a->group, pos));
    FN(attend_tiles)(part, a, kv, pos, first, s, 1);
}

static const struct isa FN(isa) = {
    .panel_rows = PANEL_ROWS, .dot = BLOCK(dot_f32),
    .quantize = BLOCK(quantize), .swiglu = BLOCK(swiglu),
    .add_scaled = BLOCK(add_scaled), .rope = BLOCK(rope),
    .conv_step = BLOCK(conv_step), .attend_chunk = FN(attend_chunk),
    .product = FN(product)
};

#undef SET
#undef BITS
#undef DOT
#undef TARGET
#endif /* KERNELS */

#ifndef KERNELS

/* ------------------------------------------------- 13. Choosing the kernels */

#define KERNELS
#ifdef LFM2_X86

#define SET avx2
#define BITS 256
#define DOT 0
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "lfm2.c"

#ifndef LFM2_AVX2_ONLY
#if (defined __clang__ && __clang_major__ >= 12) || \
    (!defined __clang__ && __GNUC__ >= 11)
#define LFM2_AVXVNNI                      /* older compilers do not know it  */
#define SET avxvnni
#define BITS 256
#define DOT 1
#define TARGET __attribute__((target("avxvnni,avx2,fma,f16c")))
#include "lfm2.c"
#endif

#define AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#define SET avx512
#define BITS 512
#define DOT 0
#define TARGET __attribute__((target(AVX512)))
#include "lfm2.c"

#define SET avx512vnni
#define BITS 512
#define DOT 1
#define TARGET __attribute__((target("avx512vnni," AVX512)))
#include "lfm2.c"
#endif

#elif defined LFM2_ARM

#define SET neon
#define BITS 128
#define DOT 0
#define TARGET
#include "lfm2.c"

#define SET dotprod
#define BITS 128
#define DOT 1
#if defined __clang__
#define TARGET __attribute__((target("dotprod")))
#elif !defined __ARM_FEATURE_DOTPROD
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#else
#define TARGET
#endif
#include "lfm2.c"

#elif defined LFM2_WASM

#define SET simd128
#define BITS 128
#define DOT 0
#define TARGET
#include "lfm2.c"

#ifdef LFM2_RELAXED
#define SET relaxed
#define BITS 128
#define DOT 1
#define TARGET
#include "lfm2.c"
#endif

#endif
#undef KERNELS

/* The kernels of each LFM2_ISA_x that this build has. */
static const struct isa *const kernels[LFM2_N_ISA] = {
    [LFM2_ISA_SCALAR] = &scalar,
#ifdef LFM2_X86
    [LFM2_ISA_AVX2] = &isa_avx2,
#ifdef LFM2_AVXVNNI
    [LFM2_ISA_AVXVNNI] = &isa_avxvnni,
#endif
#ifndef LFM2_AVX2_ONLY
    [LFM2_ISA_AVX512] = &isa_avx512,
    [LFM2_ISA_AVX512VNNI] = &isa_avx512vnni,
#endif
#elif defined LFM2_ARM
    [LFM2_ISA_NEON] = &isa_neon, [LFM2_ISA_DOTPROD] = &isa_dotprod,
#elif defined LFM2_WASM
    [LFM2_ISA_SIMD128] = &isa_simd128,
#ifdef LFM2_RELAXED
    [LFM2_ISA_RELAXED] = &isa_relaxed,
#endif
#endif
};

static const struct isa *isa_table(int isa)
{
    return isa >= 0 && isa < LFM2_N_ISA ? kernels[isa] : NULL;
}

/* What the CPU has and the system supports: bit LFM2_ISA_x for each.  cpuid
 * tells of f16c and avxvnni, which not every compiler can check for. */
static int cpu_isas(void)
{
    int isas = 1 << LFM2_ISA_SCALAR | 1 << LFM2_ISA_NEON |
               1 << LFM2_ISA_SIMD128;
#ifdef LFM2_X86
#define HAS(feature) (__builtin_cpu_supports(feature) != 0)
    unsigned a, a71 = 0, b, c = 0, d;

    __get_cpuid(1, &a, &b, &c, &d);
    if (!HAS("avx2") || !HAS("fma") || !(c >> 29 & 1))
        return isas;
    __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    isas |= 1 << LFM2_ISA_AVX2 | (a71 >> 4 & 1) << LFM2_ISA_AVXVNNI;
    if (HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512dq"))
        isas |= 1 << LFM2_ISA_AVX512 | HAS("avx512vnni") << LFM2_ISA_AVX512VNNI;
#elif defined LFM2_RELAXED
    /* Relaxed instructions may differ between machines: the multiply-add may
     * round twice.  Then the last bit of this product is lost. */
    const volatile float a = 1 + 0x1p-12f, b = -(1 + 0x1p-11f);
    const floats_relaxed x = { a, a, a, a }, y = { b, b, b, b };
    isas |= (fma_relaxed(x, x, y)[0] > 0) << LFM2_ISA_RELAXED;
#elif defined __ARM_FEATURE_DOTPROD       /* compiled for such CPUs alone    */
    isas |= 1 << LFM2_ISA_DOTPROD;
#elif defined LFM2_ARM && defined __linux__
    isas |= (getauxval(AT_HWCAP) >> 20 & 1) << LFM2_ISA_DOTPROD;  /* asimddp */
#endif
    return isas;
}

int lfm2_isa_available(int isa)
{
    return isa == LFM2_ISA_AUTO || (isa_table(isa) && cpu_isas() >> isa & 1);
}

/* =========================================================================
 * Part III.  The file
 * =========================================================================
 *
 * --------------------------------------------------------- 14. Reading bytes
 *
 * A file is hostile until checked.  All of its bytes pass through one cursor,
 * which compares every length with what remains before it moves. */

/* Put code and one sentence in err, unless it is NULL; returns code.  A name in
 * a hostile file could send commands to the terminal: control characters, also
 * the two-byte ones of C1, become '?'. */
static int fail(lfm2_error *err, int code, const char *fmt, ...)
{
    va_list args;

    if (!err)
        return code;
    err->code = code;
    va_start(args, fmt);
    vsnprintf(err->msg, sizeof err->msg, fmt, args);
    va_end(args);
    for (unsigned char *c = (unsigned char *)err->msg; *c; c++)
        if (*c < ' ' || *c == 127)
            *c = '?';
        else if (*c == 0xc2 && c[1] >= 0x80 && c[1] < 0xa0)
            c[0] = c[1] = '?';
    return code;
}

/* If the call fails, return its error. */
#define TRY(call)               \
    do {                        \
        int code_ = (call);     \
        if (code_ < 0)          \
            return code_;       \
    } while (0)

/* n as "%llu" wants it. */
static unsigned long long ull(uint64_t n)
{
    return n;
}

struct cursor {
    const uint8_t *at, *end;
    int overrun;                          /* a read went past the end        */
};

struct str { const char *s; size_t n; };

/* The next n bytes.  If fewer remain, NULL, now and for every later read. */
static const uint8_t *take(struct cursor *c, uint64_t n)
{
    const uint8_t *p = c->at;

    c->overrun |= n > (uint64_t)(c->end - p);
    if (c->overrun)
        return NULL;
    c->at += n;
    return p;
}

static uint64_t load_int(const uint8_t *p, int n_bytes)
{
    uint64_t v = 0;

    while (n_bytes-- > 0)
        v = v << 8 | p[n_bytes];
    return v;
}

/* Read a number, or a string (a u64 length, then its bytes): 0 and "" after an
 * overrun. */
static uint64_t take_int(struct cursor *c, int n_bytes)
{
    const uint8_t *p = take(c, (uint64_t)n_bytes);
    return p ? load_int(p, n_bytes) : 0;
}

static struct str take_string(struct cursor *c)
{
    const uint64_t n = take_int(c, 8);
    const uint8_t *p = take(c, n);
    return p ? (struct str){ (const char *)p, (size_t)n }
             : (struct str){ "", 0 };
}

static int str_is(struct str s, const char *text)
{
    return s.n == strlen(text) && memcmp(s.s, text, s.n) == 0;
}

/* The start of a text, for a message: '?' for what is not printable ASCII. */
struct printable { char s[52]; };

static struct printable show(struct str text)
{
    struct printable out;
    size_t n = text.n < 48 ? text.n : 48;

    for (size_t i = 0; i < n; i++)
        out.s[i] = text.s[i] >= ' ' && text.s[i] <= '~' ? text.s[i] : '?';
    strcpy(out.s + n, text.n > n ? "..." : "");
    return out;
}

/* A file in memory: mapped, read into a buffer, or BORROWED from the caller. */
enum { BORROWED = -1 };

struct file {
    const uint8_t *data;
    size_t size;
    int load;                             /* LFM2_LOAD_MAP, _READ, BORROWED  */
};

static int file_load(struct file *f, FILE *s, const char *path, lfm2_error *err)
{
#ifndef LFM2_NO_MMAP
    struct stat st;

    if (fstat(fileno(s), &st) == 0 && !S_ISREG(st.st_mode))
        return fail(err, LFM2_EIO, "%s: %s, expected a regular file", path,
                    S_ISDIR(st.st_mode) ? "a directory" : "a device or pipe");
#endif
    const long size = fseek(s, 0, SEEK_END) == 0 ? ftell(s) : -1;
    if (size < 1 || size == LONG_MAX)     /* LONG_MAX: a directory           */
        return fail(err, size == 0 ? LFM2_EFORMAT : LFM2_EIO, "%s: %ld bytes, "
                    "expected a GGUF file of 1 to %ld", path, size,
                    LONG_MAX - 1);
    f->size = (size_t)size;
#ifndef LFM2_NO_MMAP
    if (f->load == LFM2_LOAD_MAP) {
        void *map = mmap(NULL, f->size, PROT_READ, MAP_SHARED, fileno(s), 0);
        f->data = map;
        return map != MAP_FAILED ? LFM2_OK :
               fail(err, LFM2_EIO, "%s: cannot map its %zu bytes: %s", path,
                    f->size, strerror(errno));
    }
#endif
    uint8_t *buf = malloc(f->size);
    size_t done = 0, left = f->size, n;
    if (!buf)
        return fail(err, LFM2_ENOMEM, "%s: no memory for its %zu bytes", path,
                    f->size);
    f->load = LFM2_LOAD_READ;
    f->data = buf;
    rewind(s);
    do {                                  /* macOS reads 2 GiB at most       */
        const size_t most = (size_t)1 << 30;
        clearerr(s);
        n = fread(buf + done, 1, left < most ? left : most, s);
        done += n;
        left -= n;
    } while (left > 0 && (n > 0 || (ferror(s) && errno == EINTR)));
    if (left == 0)
        return LFM2_OK;
    fail(err, LFM2_EIO, "%s: %s after %zu of %zu bytes", path,
         ferror(s) ? strerror(errno) : "the file ends", done, f->size);
    free(buf);
    return LFM2_EIO;
}

static int file_open(struct file *f, const char *path, int load,
                     lfm2_error *err)
{
    FILE *s;
    int code;

    *f = (struct file){ .load = load };
    if (!path || (load != LFM2_LOAD_MAP && load != LFM2_LOAD_READ))
        return fail(err, LFM2_EARG, "%s, load mode %d, expected a path and "
                    "LFM2_LOAD_MAP or _READ", path ? path : "no path", load);
#ifdef LFM2_NO_MMAP
    s = fopen(path, "rb");
#else                                     /* fopen() would block on a pipe   */
    const int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    s = fd < 0 ? NULL : fdopen(fd, "rb");
    if (fd >= 0 && !s)
        close(fd);
#endif
    if (!s)
        return fail(err, LFM2_EIO, "%s: %s", path, strerror(errno));
    code = file_load(f, s, path, err);
    fclose(s);
    return code;
}

static void file_close(const struct file *f)
{
#ifndef LFM2_NO_MMAP
    if (f->load == LFM2_LOAD_MAP)
        munmap((void *)f->data, f->size);
#endif
    if (f->load == LFM2_LOAD_READ)
        free((void *)f->data);
}

/* ------------------------------------------------------------------ 15. GGUF
 *
 *     "GGUF" | u32 version | u64 n_tensors | u64 n_kv
 *     n_kv x      | string key | u32 type | value |
 *     n_tensors x | string name | u32 n_dims | n_dims x u64 | u32 type
 *                 | u64 offset |
 *     padding to general.alignment, then the data; offsets count from here
 *
 *     string:  | u64 n | n bytes |
 *     array:   | u32 type of its elements | u64 n | n values |
 *
 * Numbers are little-endian.  The file is walked once, and every length, count
 * and offset in it is checked against its size. */

enum { GGUF_U32 = 4, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY,
       GGUF_F64 = 12, GGUF_N_TYPES };

static const struct { const char *name; uint8_t size; char kind; }
gguf_type[GGUF_N_TYPES] = {               /* size: at least, in bytes        */
    { "u8", 1, 'u' }, { "i8", 1, 'i' }, { "u16", 2, 'u' }, { "i16", 2, 'i' },
    { "u32", 4, 'u' }, { "i32", 4, 'i' }, { "f32", 4, 'f' }, { "bool", 1, 'b' },
    { "string", 8, 's' }, { "array", 12, 'a' }, { "u64", 8, 'u' },
    { "i64", 8, 'i' }, { "f64", 8, 'f' }
};

/* More than any LFM2 file has, yet few enough to compare all pairs. */
enum { MAX_KV = 4096, MAX_TENSOR = 8192, MAX_KEY = 256, MAX_NAME = 63 };

struct gguf_kv {
    char key[MAX_KEY + 1];
    uint32_t type;                        /* GGUF_...                        */
    uint32_t elem;                        /* of an array, else the type      */
    uint64_t n;                           /* elements of an array, else 1    */
    const uint8_t *value;                 /* the first element               */
    size_t size;                          /* bytes of all elements           */
};

struct gguf_tensor {
    char name[MAX_NAME + 1];
    const struct format *fmt;
    int n_dims;
    uint64_t dims[4];                     /* fastest first; 1 beyond n_dims  */
    uint64_t elements, offset, bytes;
    int bound;                            /* the model uses it               */
};

struct gguf {
    const uint8_t *bytes;
    size_t size;                          /* of the whole file               */
    const uint8_t *data;                  /* where tensor offsets count from */
    int n_kv, n_tensors;
    struct gguf_kv *kv;
    struct gguf_tensor *tensor;
    lfm2_error *err;                      /* of the call that reads it       */
};

/* Refuse a file.  BAD: it contradicts itself.  OTHER: for another engine. */
#define BAD(g, ...)   fail((g)->err, LFM2_EFORMAT, __VA_ARGS__)
#define OTHER(g, ...) fail((g)->err, LFM2_EUNSUPPORTED, __VA_ARGS__)

static int check_range(const struct gguf *g, const char *name, double value,
                       const char *unit, double min, double max)
{
    if (value >= min && value <= max)
        return LFM2_OK;
    return BAD(g, "%s: %.*g%s, expected %.10g to %.10g", name,
               value < 1e10 ? 10 : 20, value, unit, min, max);
}

static void gguf_free(struct gguf *g)
{
    free(g->kv);
    free(g->tensor);
}

static const struct gguf_kv *gguf_find(const struct gguf *g, const char *key)
{
    for (int i = 0; i < g->n_kv; i++)
        if (strcmp(g->kv[i].key, key) == 0)
            return &g->kv[i];
    return NULL;
}

static struct gguf_tensor *gguf_tensor_find(const struct gguf *g,
                                            const char *name)
{
    for (int i = 0; i < g->n_tensors; i++)
        if (strcmp(g->tensor[i].name, name) == 0)
            return &g->tensor[i];
    return NULL;
}

/* The name of a key or tensor as a C string: 1 to max printable ASCII bytes. */
static int take_name(struct gguf *g, struct cursor *c, char *out, int max,
                     const char *of, int number)
{
    const struct str name = take_string(c);
    char what[48];

    snprintf(what, sizeof what, "the name of %s %d", of, number);
    if (c->overrun)
        return BAD(g, "%s runs past the end of the file", what);
    TRY(check_range(g, what, (double)name.n, " bytes", 1, max));
    for (size_t i = 0; i < name.n; i++)
        if (name.s[i] < ' ' || name.s[i] > '~')
            return BAD(g, "%s, \"%s\": byte 0x%02x, expected printable ASCII",
                       what, show(name).s, (unsigned char)name.s[i]);
    memcpy(out, name.s, name.n);
    out[name.n] = '\0';
    return LFM2_OK;
}

static int parse_kv(struct gguf *g, struct cursor *c)
{
    struct gguf_kv *kv = &g->kv[g->n_kv];

    TRY(take_name(g, c, kv->key, MAX_KEY, "metadata key", g->n_kv));
    if (gguf_find(g, kv->key))
        return BAD(g, "metadata key %s: found twice, expected once", kv->key);
    kv->type = (uint32_t)take_int(c, 4);
    kv->elem = kv->type == GGUF_ARRAY ? (uint32_t)take_int(c, 4) : kv->type;
    kv->n = kv->type == GGUF_ARRAY ? take_int(c, 8) : 1;
    if (c->overrun)
        return BAD(g, "%s: the file ends before its value", kv->key);
    if (kv->elem >= GGUF_N_TYPES || kv->elem == GGUF_ARRAY)
        return BAD(g, "%s: value type %lu, expected 0 to 8 or 10 to 12",
                   kv->key, (unsigned long)kv->elem);
    const uint64_t size = gguf_type[kv->elem].size;
    kv->value = c->at;
    c->overrun = kv->n > (uint64_t)(c->end - c->at) / size;
    if (kv->elem != GGUF_STRING)
        take(c, kv->n * size);
    else
        for (uint64_t i = 0; i < kv->n && !c->overrun; i++)
            take_string(c);
    if (c->overrun)
        return BAD(g, "%s: %llu x %s runs past the end of the file", kv->key,
                   ull(kv->n), gguf_type[kv->elem].name);
    kv->size = (size_t)(c->at - kv->value);
    for (size_t i = 0; kv->elem == GGUF_BOOL && i < kv->size; i++)
        TRY(check_range(g, kv->key, kv->value[i], " as a bool", 0, 1));
    return LFM2_OK;
}

/* Element i as an integer, stored in any width; -1 if it is not below 2^63. */
static int kv_integer(const struct gguf_kv *kv, uint64_t i, int64_t *out)
{
    const int size = gguf_type[kv->elem].size, kind = gguf_type[kv->elem].kind;
    const uint64_t v = load_int(kv->value + i * (uint64_t)size, size);

    if ((kind != 'u' && kind != 'i') || v > INT64_MAX)
        return -1;
    *out = (int64_t)v;
    if (kind == 'i' && size < 8 && v >> (8 * size - 1))
        *out -= (int64_t)1 << 8 * size;
    return 0;
}

/* Element i, a number or a bool, as a double; -1 if it is neither. */
static int kv_number(const struct gguf_kv *kv, uint64_t i, double *out)
{
    const uint8_t *p = kv->value + i * gguf_type[kv->elem].size;
    int64_t n = *p;                       /* as a bool                       */

    if (kv->elem == GGUF_F64)
        memcpy(out, &(uint64_t){ load_int(p, 8) }, sizeof *out);
    else if (kv->elem == GGUF_F32)
        *out = load_f32(p);
    else if (kv->elem == GGUF_BOOL || kv_integer(kv, i, &n) == 0)
        *out = (double)n;
    else
        return -1;
    return 0;
}

/* The value of an integer key, from min to max.  An array has one element for
 * each layer, 0 where the key does not apply; all others must be the same. */
static int kv_count(const struct gguf *g, const struct gguf_kv *kv, double min,
                    double max, int64_t *out)
{
    *out = 0;
    for (uint64_t i = 0; i < kv->n; i++) {
        int64_t value;
        if (kv_integer(kv, i, &value) != 0)
            return BAD(g, "%s: of type %s, expected an integer below 2^63",
                       kv->key, gguf_type[kv->elem].name);
        if (*out != 0 && value != 0 && value != *out)
            return OTHER(g, "%s: both %lld and %lld, expected one value in all "
                         "layers", kv->key, (long long)*out, (long long)value);
        *out = value != 0 ? value : *out;
    }
    return check_range(g, kv->key, (double)*out, "", min, max);
}

/* Without the key *out does not change. */
static int gguf_u32(const struct gguf *g, const char *key, uint32_t *out)
{
    const struct gguf_kv *kv = gguf_find(g, key);
    int64_t value = *out;

    if (kv)
        TRY(kv_count(g, kv, 0, UINT32_MAX, &value));
    *out = (uint32_t)value;
    return LFM2_OK;
}

/* The bytes of a string; NULL if there is no key or it is of another type. */
static struct str kv_string(const struct gguf_kv *kv)
{
    if (!kv || kv->type != GGUF_STRING)
        return (struct str){ NULL, 0 };
    return (struct str){ (const char *)kv->value + 8, kv->size - 8 };
}

/* A value as text, an array as its type and length. */
static struct printable kv_text(const struct gguf_kv *kv)
{
    struct printable out;
    const size_t cap = sizeof out.s;
    double number;
    int64_t value;

    if (kv->type == GGUF_STRING)
        return show(kv_string(kv));
    if (kv->type == GGUF_ARRAY)
        snprintf(out.s, cap, "[%llu x %s]", ull(kv->n),
                 gguf_type[kv->elem].name);
    else if (kv->type == GGUF_BOOL)
        snprintf(out.s, cap, "%s", kv->value[0] ? "true" : "false");
    else if (kv_integer(kv, 0, &value) == 0)
        snprintf(out.s, cap, "%lld", (long long)value);
    else if (kv_number(kv, 0, &number) == 0)
        snprintf(out.s, cap, "%g", number);
    else
        snprintf(out.s, cap, "(%s)", gguf_type[kv->type].name);
    return out;
}

/* The shape is checked, so that its size in bytes cannot overflow. */
static int parse_tensor(struct gguf *g, struct cursor *c)
{
    static const char *const unit[4] = {
        " columns", " rows", " matrices", " groups of matrices"
    };
    struct gguf_tensor *t = &g->tensor[g->n_tensors];
    double elements = 1;
    uint32_t n_dims, type;

    TRY(take_name(g, c, t->name, MAX_NAME, "tensor", g->n_tensors));
    if (gguf_tensor_find(g, t->name))
        return BAD(g, "tensor %s: found twice, expected once", t->name);
    n_dims = (uint32_t)take_int(c, 4);
    for (uint32_t d = 0; d < 4; d++)
        t->dims[d] = d < n_dims ? take_int(c, 8) : 1;
    type = (uint32_t)take_int(c, 4);
    t->offset = take_int(c, 8);
    t->n_dims = (int)n_dims;
    t->fmt = format_find(type);
    if (c->overrun)
        return BAD(g, "%s: the file ends before its shape and offset", t->name);
    TRY(check_range(g, t->name, n_dims, " dimensions", 1, 4));
    if (!t->fmt)
        return OTHER(g, "%s: weight type %lu of GGUF, expected F32, F16, BF16, "
                     "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL or "
                     "IQ4_XS", t->name, (unsigned long)type);
    for (int d = 0; d < 4; d++) {
        TRY(check_range(g, t->name, (double)t->dims[d], unit[d], 1, INT32_MAX));
        elements *= (double)t->dims[d];
    }
    TRY(check_range(g, t->name, elements, " elements", 1, 1e15));
    if (t->dims[0] % (uint64_t)t->fmt->block != 0)
        return BAD(g, "%s: rows of %llu columns, expected a multiple of %d for "
                   "%s", t->name, ull(t->dims[0]), t->fmt->block, t->fmt->name);
    t->elements = (uint64_t)elements;
    t->bytes = t->elements / (uint64_t)t->fmt->block *
               (uint64_t)t->fmt->bytes;
    return LFM2_OK;
}

/* Tensors must be aligned, lie inside the data and not overlap. */
static int check_offsets(const struct gguf *g, uint32_t alignment)
{
    const uint64_t size = (uint64_t)(g->bytes + g->size - g->data);

    for (int i = 0; i < g->n_tensors; i++) {
        const struct gguf_tensor *t = &g->tensor[i];
        if (t->offset % alignment != 0)
            return BAD(g, "%s: offset %llu, expected a multiple of %lu",
                       t->name, ull(t->offset), (unsigned long)alignment);
        if (t->offset > size || t->bytes > size - t->offset)
            return BAD(g, "%s: %llu bytes at offset %llu, but the file has "
                       "%llu bytes of data", t->name, ull(t->bytes),
                       ull(t->offset), ull(size));
        for (const struct gguf_tensor *o = g->tensor; o < t; o++)
            if (t->offset < o->offset + o->bytes &&
                o->offset < t->offset + t->bytes)
                return BAD(g, "%s: overlaps %s", t->name, o->name);
    }
    return LFM2_OK;
}

/* An entry is counted once it has passed its checks.  The caller must call
 * gguf_free(), even after an error. */
static int gguf_parse(struct gguf *g, const uint8_t *data, size_t size,
                      lfm2_error *err)
{
    struct cursor c = { data, data + size, 0 };
    const uint8_t *magic = take(&c, 4);
    const uint32_t version = (uint32_t)take_int(&c, 4);
    const uint64_t n_tensors = take_int(&c, 8), n_kv = take_int(&c, 8);
    uint32_t alignment = 32;

    *g = (struct gguf){ .bytes = data, .size = size, .err = err };
    if (magic && memcmp(magic, "GGUF", 4) != 0)
        return BAD(g, "not a GGUF file: it begins with \"%s\", expected "
                   "\"GGUF\"", show((struct str){ (const char *)magic, 4 }).s);
    if (c.overrun)
        return BAD(g, "the file has %zu bytes, expected a GGUF header of 24",
                   size);
    if (version != 2 && version != 3)
        return OTHER(g, "GGUF version %lu%s, expected 2 or 3",
                     (unsigned long)version, version > 0 &&
                     (version & 0xffff) == 0 ? " (a big-endian file)" : "");
    TRY(check_range(g, "the header", (double)n_tensors, " tensors", 0,
                    MAX_TENSOR));
    TRY(check_range(g, "the header", (double)n_kv, " metadata keys", 0,
                    MAX_KV));
    g->kv = calloc((size_t)n_kv + 1, sizeof *g->kv);
    g->tensor = calloc((size_t)n_tensors + 1, sizeof *g->tensor);
    if (!g->kv || !g->tensor)
        return fail(err, LFM2_ENOMEM, "no memory for the index of the file");
    for (; g->n_kv < (int)n_kv; g->n_kv++)
        TRY(parse_kv(g, &c));
    TRY(gguf_u32(g, "general.alignment", &alignment));
    if (alignment < 8 || alignment > 65536 || (alignment & (alignment - 1)))
        return BAD(g, "general.alignment: %lu, expected a power of two from 8 "
                   "to 65536", (unsigned long)alignment);
    for (; g->n_tensors < (int)n_tensors; g->n_tensors++)
        TRY(parse_tensor(g, &c));
    const size_t past = (size_t)(c.at - data) % alignment;
    g->data = take(&c, past ? alignment - past : 0) ? c.at : c.end;
    return check_offsets(g, alignment);
}

/* --------------------------------------------------------- 16. Configuration
 *
 * The metadata of the model, each value checked against a range.  Where a key
 * repeats the shape of a tensor, the tensor counts.  A key that asks for other
 * arithmetic than this engine's is an error, never ignored. */

/* Warn of something that is not quite right, but can be tolerated. */
#define WARN(m, ...) \
    fail((m)->n_warning < MAX_WARNING ? &(m)->warning[(m)->n_warning++] \
                                      : NULL, LFM2_OK, __VA_ARGS__)

/* The key "<architecture>.<name>". */
static const struct gguf_kv *arch_find(const lfm2_model *m, const char *name)
{
    char key[MAX_KEY + 1];

    snprintf(key, sizeof key, "%s.%s", m->arch, name);
    return gguf_find(m->gguf, key);
}

/* The known keys, by what is done with them:
 *
 *     INTEGER, REAL    set a field of the configuration, from min to max
 *     UNUSED           is ignored: it changes nothing, or a tensor overrides it
 *     FIXED            must be min, as that is what the engine computes
 *     SAME             must be what the field is
 *     SCALE            must be 1/sqrt(head_dim)                             */
enum { INTEGER, REAL, UNUSED, FIXED, SAME, SCALE };
enum { MAY = 0, MUST = 1, MOE = 2 };      /* be there; MOE: only in lfm2moe  */

static const struct key {
    const char *name;                     /* after "<architecture>."         */
    int rule, need;
    size_t field;                         /* in lfm2_config                  */
    double min, max;
} keys[] = {
#define FIELD(f) offsetof(lfm2_config, f)
    { "block_count", INTEGER, MUST, FIELD(n_layer), 1, LFM2_MAX_LAYER },
    { "context_length", INTEGER, MUST, FIELD(n_ctx_train), 1, INT32_MAX },
    { "embedding_length", INTEGER, MUST, FIELD(n_embd), 1, 1 << 20 },
    { "shortconv.l_cache", INTEGER, MUST, FIELD(l_cache), 2, MAX_TAPS },
    { "attention.head_count", INTEGER, MUST, FIELD(n_head), 1, 1024 },
    { "attention.head_count_kv", INTEGER, MAY, FIELD(n_head_kv), 0, 1024 },
    { "attention.key_length", INTEGER, MAY, FIELD(head_dim), 2, MAX_HEAD_DIM },
    { "attention.value_length", .rule = SAME, .field = FIELD(head_dim) },
    { "attention.layer_norm_rms_epsilon", REAL, MUST, FIELD(norm_rms_eps),
      1e-12, 0.1 },
    { "attention.layer_norm_epsilon", .rule = UNUSED },
    { "attention.recurrent_layers", .rule = UNUSED },
    { "attention.causal", .rule = FIXED, .min = 1 },
    { "attention.scale", .rule = SCALE },
    { "attention.sliding_window", .rule = FIXED, .min = 0 },
    { "attention.sliding_window_pattern", .rule = FIXED, .min = 0 },
    { "rope.dimension_count", .rule = SAME, .field = FIELD(head_dim) },
    { "rope.freq_base", REAL, MAY, FIELD(rope_freq_base), 1, 1e12 },
    { "rope.scaling.type", .rule = FIXED, .min = 0 },
    { "rope.scaling.factor", .rule = FIXED, .min = 1 },
    { "rope.scaling.attn_factor", .rule = FIXED, .min = 1 },
    { "rope.scaling.finetuned", .rule = UNUSED },
    { "rope.scaling.original_context_length", .rule = UNUSED },
    { "leading_dense_block_count", INTEGER, MOE, FIELD(n_layer_dense), 0,
      LFM2_MAX_LAYER },
    { "expert_count", INTEGER, MUST | MOE, FIELD(n_expert), 1, 256 },
    { "expert_used_count", INTEGER, MUST | MOE, FIELD(n_expert_used), 1, 256 },
    { "expert_gating_func", FIXED, MUST | MOE, 0, 2, 2 },       /* sigmoid    */
    { "expert_weights_scale", REAL, MOE, FIELD(expert_weights_scale), 0, 1e4 },
    { "expert_weights_norm", .rule = FIXED, .min = 1 },
    { "expert_shared_count", .rule = FIXED, .min = 0 },
    { "expert_group_count", .rule = FIXED, .min = 0 },
    { "expert_group_used_count", .rule = FIXED, .min = 0 },
    { "expert_feed_forward_length", .rule = UNUSED },
    { "feed_forward_length", .rule = UNUSED },
    { "final_logit_softcapping", .rule = FIXED, .min = 0 },
    { "pooling_type", .rule = FIXED, .min = 0 },
    { "vocab_size", .rule = UNUSED },
#undef FIELD
};

/* Without the key the field does not change. */
static int read_key(lfm2_model *m, const struct key *key)
{
    const struct gguf_kv *kv = arch_find(m, key->name);
    void *field = (char *)&m->cfg + key->field;
    int64_t n;
    double value;

    if (!kv && key->need & MUST)
        return BAD(m->gguf, "%s.%s: missing, expected in every %s file",
                   m->arch, key->name, m->arch);
    if (!kv || key->rule > REAL)
        return LFM2_OK;
    if (key->rule == INTEGER) {
        TRY(kv_count(m->gguf, kv, key->min, key->max, &n));
        *(int *)field = (int)n;
        return LFM2_OK;
    }
    if (gguf_type[kv->type].kind != 'f' || kv_number(kv, 0, &value) != 0)
        return BAD(m->gguf, "%s: of type %s, expected f32 or f64", kv->key,
                   gguf_type[kv->type].name);
    TRY(check_range(m->gguf, kv->key, value, "", key->min, key->max));
    *(float *)field = (float)value;
    return LFM2_OK;
}

/* Is the value, or all of an array, `wanted`?  The string "none" means 0. */
static int has_value(const struct gguf_kv *kv, float wanted)
{
    double value;

    if (kv->type == GGUF_STRING)
        return wanted == 0 && str_is(kv_string(kv), "none");
    for (uint64_t i = 0; i < kv->n; i++)
        if (kv_number(kv, i, &value) != 0 ||
            !(fabs(value - wanted) <= 1e-6 * fabsf(wanted)))
            return 0;
    return kv->n > 0;
}

/* Refuse the key "<architecture>.<name>" if it asks for other arithmetic. */
static int check_key(lfm2_model *m, const struct gguf_kv *kv, const char *name)
{
    static const char *const arithmetic[] = {
        "attention.", "rope.", "shortconv.", "expert", "scale", "softcap"
    };

    for (size_t i = 0; i < COUNT(keys); i++) {
        const struct key *key = &keys[i];
        float value = (float)key->min;
        if (strcmp(key->name, name) != 0)
            continue;
        if (key->rule == SAME)
            value = (float)*(int *)((char *)&m->cfg + key->field);
        if (key->rule == SCALE)
            value = 1 / sqrtf((float)m->cfg.head_dim);
        if (key->rule < FIXED || has_value(kv, value) ||
            (key->need & MOE && m->cfg.n_expert == 0))
            return LFM2_OK;
        return OTHER(m->gguf, "%s: %s, expected %g", kv->key, kv_text(kv).s,
                     (double)value);
    }
    for (size_t i = 0; i < COUNT(arithmetic); i++)
        if (strstr(name, arithmetic[i]))
            return OTHER(m->gguf, "%s: an unknown key that may change the "
                         "arithmetic, expected none", kv->key);
    WARN(m, "%s: an unknown key, ignored", kv->key);
    return LFM2_OK;
}

static int read_architecture(lfm2_model *m)
{
    static const struct { const char *arch, *note; } others[] = {
        { "lfm3", " (the next generation, which computes differently)" },
        { "lfm2-bidir", " (a bidirectional encoder)" },
        { "clip", " (the image or audio part of a model; open its text part)" }
    };
    const struct str arch = kv_string(gguf_find(m->gguf,
                                                "general.architecture"));
    const char *note = "";
    uint32_t parts = 1;

    if (!arch.s)
        return BAD(m->gguf, "general.architecture: missing or not a "
                   "string, expected lfm2 or lfm2moe");
    m->arch = str_is(arch, "lfm2") ? "lfm2"
            : str_is(arch, "lfm2moe") ? "lfm2moe" : NULL;
    for (size_t i = 0; i < COUNT(others); i++)
        if (strncmp(show(arch).s, others[i].arch, strlen(others[i].arch)) == 0)
            note = others[i].note;
    if (!m->arch)
        return OTHER(m->gguf, "general.architecture: %s%s, expected lfm2 or "
                     "lfm2moe", show(arch).s, note);
    TRY(gguf_u32(m->gguf, "split.count", &parts));
    if (parts > 1)
        return OTHER(m->gguf, "split.count: one part of %lu, expected a whole "
                     "model", (unsigned long)parts);
    return LFM2_OK;
}

/* A layer has attention unless its element of head_count_kv is 0. */
static int read_heads(lfm2_model *m)
{
    lfm2_config *c = &m->cfg;
    const struct gguf_kv *kv = arch_find(m, "attention.head_count_kv");
    const int is_array = kv && kv->type == GGUF_ARRAY;

    if (is_array && kv->n != (uint64_t)c->n_layer)
        return BAD(m->gguf, "%s: %llu entries, expected one for each of %d "
                   "blocks", kv->key, ull(kv->n), c->n_layer);
    for (int il = 0; il < c->n_layer; il++) {
        int64_t heads = kv ? c->n_head_kv : c->n_head;
        if (is_array)
            kv_integer(kv, (uint64_t)il, &heads);
        c->is_attn[il] = heads != 0;
    }
    if (c->n_head_kv == 0)
        c->n_head_kv = c->n_head;         /* no such key, or no attention    */
    if (c->n_head % c->n_head_kv != 0)
        return BAD(m->gguf, "%s.attention.head_count: %d, expected a multiple "
                   "of the %d kv heads", m->arch, c->n_head, c->n_head_kv);
    if (c->head_dim == 0 && c->n_embd % c->n_head == 0)
        c->head_dim = c->n_embd / c->n_head;
    if (c->head_dim < 2 || c->head_dim > MAX_HEAD_DIM || c->head_dim % 2 != 0)
        return BAD(m->gguf, "%s.embedding_length: %d for %d heads of %d "
                   "dimensions, expected an even number from 2 to %d",
                   m->arch, c->n_embd, c->n_head, c->head_dim, MAX_HEAD_DIM);
    return LFM2_OK;
}

static int read_config(lfm2_model *m)
{
    lfm2_config *c = &m->cfg;

    TRY(read_architecture(m));
    const int is_moe = strcmp(m->arch, "lfm2moe") == 0;
    for (size_t i = 0; i < COUNT(keys); i++)
        if (is_moe || !(keys[i].need & MOE))
            TRY(read_key(m, &keys[i]));
    if (!is_moe)
        c->n_layer_dense = c->n_layer;
    TRY(check_range(m->gguf, "lfm2moe.leading_dense_block_count",
                    c->n_layer_dense, "", 0, c->n_layer));
    TRY(check_range(m->gguf, "lfm2moe.expert_used_count", c->n_expert_used, "",
                    is_moe, c->n_expert));
    if (c->expert_weights_scale == 0)
        c->expert_weights_scale = 1;      /* 0 is how some files say "none"  */
    if (c->rope_freq_base == 0) {
        c->rope_freq_base = 10000;
        WARN(m, "%s.rope.freq_base: missing, 10000 assumed", m->arch);
    }
    TRY(read_heads(m));
    for (int i = 0; i < m->gguf->n_kv; i++) {
        const struct gguf_kv *kv = &m->gguf->kv[i];
        const size_t n = strlen(m->arch);
        if (strncmp(kv->key, m->arch, n) == 0 && kv->key[n] == '.')
            TRY(check_key(m, kv, kv->key + n + 1));
    }
    return LFM2_OK;
}

/* ------------------------------------------------------- 17. Binding tensors
 *
 * One table lists the name of every tensor, its shape and the layers it is in.
 * After binding, the model has pointers to data of the right shape.
 *
 * An arena is one block of memory for many arrays.  The function that divides
 * it runs twice, first without memory, only to count: so it uses exactly what
 * is allocated. */

struct arena { uint8_t *base; int64_t used; };

/* More than any machine has: the count stays there, and cannot overflow. */
static const int64_t TOO_MUCH = (int64_t)1 << 62;

static void *carve(struct arena *a, int64_t n, size_t size)
{
    const int64_t at = (a->used + 63) / 64 * 64, each = (int64_t)size;

    a->used = n > (TOO_MUCH - at) / each ? TOO_MUCH : at + n * each;
    return a->base ? a->base + at : NULL;
}

/* Make p an array of n elements. */
#define CARVE(a, p, n) ((p) = carve(a, n, sizeof *(p)))

/* Memory of the counted size, all 0; or NULL. */
static void *allocate(int64_t size)
{
    return size < TOO_MUCH && (uint64_t)size < SIZE_MAX
        ? calloc(1, (size_t)size) : NULL;
}

/* The sizes in shapes, and the kinds of layer that a tensor can be in. */
enum { ONE, VOCAB, EMBD, EMBD_3, HEADS, HEADS_KV, QKV, HEAD, TAPS, FF, FF_EXP,
       EXPERTS, USED, N_SIZES };
enum { IN_CONV = 1, IN_ATTN = 2, IN_DENSE = 4, IN_MOE = 8, IN_ALL = 15 };

static int size_of(const lfm2_config *c, int which)
{
    const int heads = c->n_head * c->head_dim;
    const int heads_kv = c->n_head_kv * c->head_dim;
    const int size[N_SIZES] = {
        [ONE] = 1, [VOCAB] = c->n_vocab, [EMBD] = c->n_embd,
        [EMBD_3] = 3 * c->n_embd, [HEADS] = heads, [HEADS_KV] = heads_kv,
        [QKV] = heads + 2 * heads_kv, [HEAD] = c->head_dim,
        [TAPS] = c->l_cache, [FF] = c->n_ff, [FF_EXP] = c->n_ff_expert,
        [EXPERTS] = c->n_expert, [USED] = c->n_expert_used
    };
    return size[which];
}

/* The keys of some sizes.  in_units: must be a multiple of UNIT.  field: is set
 * to the rows of the first tensor of that size, whatever the key says. */
static const struct { const char *key; int in_units; size_t field; }
size_key[N_SIZES] = {
    [VOCAB] = { "vocab_size", 0, offsetof(lfm2_config, n_vocab) },
    [EMBD] = { "embedding_length", 1, 0 },
    [HEADS] = { "attention.head_count", 1, 0 },
    [FF] = { "feed_forward_length", 1, offsetof(lfm2_config, n_ff) },
    [FF_EXP] = { "expert_feed_forward_length", 1,
                 offsetof(lfm2_config, n_ff_expert) }
};

/* More rows than any model has, and twice as many still fit in an int. */
enum { MAX_WIDTH = 1 << 24 };

/* The shape is given by three sizes of the enum above.  A key that contradicts
 * it gets a warning.  With `floats`, quantized weights are refused, as a router
 * would choose other experts with them. */
static int bind_matrix(lfm2_model *m, const char *name, int cols, int rows,
                       int depth, int floats, struct tensor *out)
{
    struct gguf_tensor *t = gguf_tensor_find(m->gguf, name);
    const int which[3] = { cols, rows, depth };
    int size[3];

    if (!t)
        return BAD(m->gguf, "%s: no such tensor in the file, expected in this "
                   "model", name);
    t->bound = 1;
    if (size_key[rows].field && size_of(&m->cfg, rows) == 0) {
        const struct gguf_kv *kv = arch_find(m, size_key[rows].key);
        const double n = (double)t->dims[1];
        TRY(check_range(m->gguf, name, n, " rows", 1, MAX_WIDTH));
        *(int *)(void *)((char *)&m->cfg + size_key[rows].field) = (int)n;
        if (kv && kv_count(&(struct gguf){ 0 }, kv, n, n, &(int64_t){ 0 }) != 0)
            WARN(m, "%s: %s %s, but %s has %.0f rows; the tensor is right",
                 kv->key, gguf_type[kv->type].name, kv_text(kv).s, name, n);
    }
    for (int d = 0; d < 3; d++) {
        size[d] = size_of(&m->cfg, which[d]);
        if (size_key[which[d]].in_units && size[d] % UNIT != 0)
            return OTHER(m->gguf, "%s.%s: %d columns in all, expected a "
                         "multiple of %d", m->arch, size_key[which[d]].key,
                         size[d], UNIT);
    }
    if (t->dims[0] != (uint64_t)size[0] || t->dims[1] != (uint64_t)size[1] ||
        t->dims[2] != (uint64_t)size[2] || t->dims[3] != 1)
        return BAD(m->gguf, "%s: shape %llu x %llu x %llu, expected %d x %d x "
                   "%d", name, ull(t->dims[0]), ull(t->dims[1]),
                   ull(t->dims[2]), size[0], size[1], size[2]);
    if (floats && !t->fmt->floats)
        return OTHER(m->gguf, "%s: weight type %s, expected F32, F16 or BF16",
                     name, t->fmt->name);
    *out = (struct tensor){ .fmt = t->fmt, .rows = size[1], .cols = size[0],
                            .data = m->gguf->data + t->offset };
    return LFM2_OK;
}

/* Norms, taps and biases become floats, transposed to [cols][rows]. */
static int bind_floats(lfm2_model *m, const char *name, int cols, int rows,
                       struct arena *a, const float **out)
{
    struct tensor w;
    float *x;

    TRY(bind_matrix(m, name, cols, rows, ONE, 1, &w));
    *out = x = carve(a, (int64_t)w.rows * w.cols, sizeof *x);
    for (int c = 0; x && c < w.cols; c++)
        for (int r = 0; r < w.rows; r++, x++) {
            const size_t i = (size_t)r * w.cols + (size_t)c;
            w.fmt->floats(x, w.data + i * (size_t)w.fmt->bytes, 1);
            if (!(fabsf(*x) <= FLT_MAX))
                return BAD(m->gguf, "%s: element %d of row %d is %g, expected "
                           "a finite number", name, c, r, (double)*x);
        }
    return LFM2_OK;
}

/* Matrices have a module; vectors and taps have none, and become floats. */
static const struct binding {
    const char *name;                     /* after "blk.<layer>."            */
    size_t field;                         /* in struct layer                 */
    int where, cols, rows, module, depth;
} bindings[] = {
#define FIELD(f)  offsetof(struct layer, f)
#define WEIGHT(f) #f ".weight", FIELD(f)
    { WEIGHT(attn_norm), IN_ALL, EMBD, ONE },
    { WEIGHT(ffn_norm), IN_ALL, EMBD, ONE },
    { "shortconv.in_proj.weight", FIELD(shortconv_in_proj),
      IN_CONV, EMBD, EMBD_3, CONV_IN_PROJ },
    { "shortconv.conv.weight", FIELD(shortconv_conv), IN_CONV, TAPS, EMBD },
    { "shortconv.out_proj.weight", FIELD(shortconv_out_proj),
      IN_CONV, EMBD, EMBD, CONV_OUT_PROJ },
    { WEIGHT(attn_q), IN_ATTN, EMBD, HEADS, ATTN_Q },
    { WEIGHT(attn_k), IN_ATTN, EMBD, HEADS_KV, ATTN_K },
    { WEIGHT(attn_v), IN_ATTN, EMBD, HEADS_KV, ATTN_V },
    { WEIGHT(attn_output), IN_ATTN, HEADS, EMBD, ATTN_OUT },
    { WEIGHT(attn_q_norm), IN_ATTN, HEAD, ONE },
    { WEIGHT(attn_k_norm), IN_ATTN, HEAD, ONE },
    { WEIGHT(ffn_gate), IN_DENSE, EMBD, FF, FFN_W1 },
    { WEIGHT(ffn_up), IN_DENSE, EMBD, FF, FFN_W3 },
    { WEIGHT(ffn_down), IN_DENSE, FF, EMBD, FFN_W2 },
    { WEIGHT(ffn_gate_inp), IN_MOE, EMBD, EXPERTS, MOE_GATE },
    { "exp_probs_b.bias", FIELD(exp_probs_b), IN_MOE, EXPERTS, ONE },
    { WEIGHT(ffn_gate_exps), IN_MOE, EMBD, FF_EXP, EXPERT_W1, EXPERTS },
    { WEIGHT(ffn_up_exps), IN_MOE, EMBD, FF_EXP, EXPERT_W3, EXPERTS },
    { WEIGHT(ffn_down_exps), IN_MOE, FF_EXP, EMBD, EXPERT_W2, EXPERTS },
#undef WEIGHT
};

/* Each matrix points to the next one that a pass reads, for product() to fetch
 * ahead; *last is the last so far.  Left out are ffn_up, which is read along
 * with ffn_gate, and experts, as they are chosen by the router. */
static int bind_layer(lfm2_model *m, int il, struct arena *a,
                      struct tensor **last)
{
    struct layer *l = &m->layer[il];
    const lfm2_config *c = &m->cfg;
    const int kind = (c->is_attn[il] ? IN_ATTN : IN_CONV) |
                     (il < c->n_layer_dense ? IN_DENSE : IN_MOE);
    const int q = size_of(c, HEADS), kv = size_of(c, HEADS_KV);
    char name[MAX_NAME + 1];
    struct tensor all;

    /* Some files have the rows of q, k and v in one tensor. */
    snprintf(name, sizeof name, "blk.%d.attn_qkv.weight", il);
    if (c->is_attn[il] && gguf_tensor_find(m->gguf, name)) {
        TRY(bind_matrix(m, name, EMBD, QKV, ONE, 0, &all));
        l->attn_q = rows_of(&all, 0, q);
        l->attn_k = rows_of(&all, q, kv);
        l->attn_v = rows_of(&all, q + kv, kv);
        l->attn_k.first = l->attn_v.first = 0;
    }
    for (size_t i = 0; i < COUNT(bindings); i++) {
        const struct binding *b = &bindings[i];
        struct tensor *w = (void *)((char *)l + b->field);

        if (!(b->where & kind))
            continue;
        snprintf(name, sizeof name, "blk.%d.%s", il, b->name);
        if (b->module == NOT_TRACED) {
            TRY(bind_floats(m, name, b->cols, b->rows, a, (void *)w));
            continue;
        }
        if (!w->data)                     /* else it is part of attn_qkv     */
            TRY(bind_matrix(m, name, b->cols, b->rows, b->depth,
                            b->module == MOE_GATE, w));
        w->module = b->module;
        if (w == &l->ffn_up || w == &l->ffn_gate_exps || w == &l->ffn_up_exps)
            continue;
        if (w != &l->ffn_down_exps)
            (*last)->next = w;
        *last = w;
    }
    return LFM2_OK;
}

/* Bind all tensors; what becomes floats is carved from a. */
static int bind_tensors(lfm2_model *m, struct arena *a)
{
    const char *norm = "output_norm.weight";
    struct tensor *last = &m->output;

    m->n_attn = m->n_conv = 0;
    TRY(bind_matrix(m, "token_embd.weight", EMBD, VOCAB, ONE, 0,
                    &m->token_embd));
    m->output = m->token_embd;
    if (gguf_tensor_find(m->gguf, "output.weight"))
        TRY(bind_matrix(m, "output.weight", EMBD, VOCAB, ONE, 0,
                        &m->output));

    /* Most files name the last norm after the official "embedding_norm", but it
     * is not for the embeddings. */
    if (!gguf_tensor_find(m->gguf, norm))
        norm = "token_embd_norm.weight";
    TRY(bind_floats(m, norm, EMBD, ONE, a, &m->output_norm));
    for (int il = 0; il < m->cfg.n_layer; il++) {
        m->layer[il].i_kind = m->cfg.is_attn[il] ? m->n_attn++ : m->n_conv++;
        TRY(bind_layer(m, il, a, &last));
    }
    last->next = &m->output;
    return LFM2_OK;
}

/* Read everything but the vocabulary. */
static int read_model(lfm2_model *m, lfm2_error *err)
{
    static const char *const used[] = { "blk.", "rope_", "dense_", "output." };
    const lfm2_config *c = &m->cfg;
    struct arena a = { NULL, 0 };

    TRY(gguf_parse(m->gguf, m->file->data, m->file->size, err));
    TRY(read_config(m));
    m->layer = calloc((size_t)c->n_layer, sizeof *m->layer);
    if (m->layer)
        TRY(bind_tensors(m, &a));
    m->floats = m->layer ? allocate(a.used) : NULL;
    if (!m->floats)
        return fail(err, LFM2_ENOMEM, "no memory for %d layers", c->n_layer);
    a = (struct arena){ (void *)m->floats, 0 };
    TRY(bind_tensors(m, &a));
    m->rope_root = nth_root(c->rope_freq_base, c->head_dim / 2);

    const struct gguf_kv *tokens = gguf_find(m->gguf, "tokenizer.ggml.tokens");
    if (tokens)
        TRY(check_range(m->gguf, tokens->key, (double)tokens->n, " tokens", 0,
                        c->n_vocab));
    if (tokens && tokens->n < (uint64_t)c->n_vocab)
        WARN(m, "tokenizer.ggml.tokens: %llu tokens for %d rows of "
             "token_embd.weight", ull(tokens->n), c->n_vocab);

    /* An unused tensor with one of these names would change the results. */
    for (int i = 0; i < m->gguf->n_tensors; i++) {
        const struct gguf_tensor *t = &m->gguf->tensor[i];
        for (size_t k = 0; !t->bound && k < COUNT(used); k++)
            if (strncmp(t->name, used[k], strlen(used[k])) == 0)
                return OTHER(m->gguf, "%s: a tensor that %s does not have",
                             t->name, m->arch);
        if (!t->bound)
            WARN(m, "%s: an unknown tensor, ignored", t->name);
    }
    return LFM2_OK;
}

/* ------------------------------------------------------- 18. Open and close */

/* A model and what it points to, in one allocation. */
struct model_file {
    struct lfm2_model model;
    struct file file;
    struct gguf gguf;
};

const char *lfm2_version(void)
{
    return LFM2_VERSION;
}

const char *lfm2_weight_type(int i)
{
    return i >= 0 && i < (int)COUNT(formats) ? formats[i].name : NULL;
}

void lfm2_model_close(lfm2_model *m)
{
    if (!m)
        return;
    free(m->layer);
    free(m->floats);
    gguf_free(m->gguf);
    file_close(m->file);
    free(m);
}

/* Takes over the open file, and closes it after an error.  With `any`, a file
 * that is not a usable model is kept as one without layers. */
static int open_model(lfm2_model **out, const struct file *file, int any,
                      lfm2_error *err)
{
    struct model_file *o = calloc(1, sizeof *o);
    fenv_t callers;
    int code;

    if (!o) {
        file_close(file);
        return fail(err, LFM2_ENOMEM, "no memory to open a model");
    }
    o->file = *file;
    o->model.file = &o->file;
    o->model.gguf = &o->gguf;
    enter_arithmetic(&callers);
    code = read_model(&o->model, err);
    fesetenv(&callers);
    o->gguf.err = NULL;
    if (code != LFM2_OK) {
        free(o->model.layer);
        o->model.layer = NULL;
    }
    if (code == LFM2_OK || (any && code != LFM2_ENOMEM))
        *out = &o->model;
    else
        lfm2_model_close(&o->model);
    return code;
}

int lfm2_model_open(lfm2_model **out, const char *path, int load,
                    lfm2_error *err)
{
    struct file file;

    *out = NULL;
    TRY(file_open(&file, path, load & ~LFM2_LOAD_ANY, err));
    return open_model(out, &file, load & LFM2_LOAD_ANY, err);
}

int lfm2_model_open_memory(lfm2_model **out, const void *data, size_t size,
                           lfm2_error *err)
{
    *out = NULL;
    if (!data)
        return fail(err, LFM2_EARG, "no data to open");
    return open_model(out, &(struct file){ data, size, BORROWED }, 0, err);
}

const lfm2_config *lfm2_model_config(const lfm2_model *m)
{
    return &m->cfg;
}

const char *lfm2_model_warning(const lfm2_model *m, int i)
{
    return i >= 0 && i < m->n_warning ? m->warning[i].msg : NULL;
}

const void *lfm2_model_file(const lfm2_model *m, size_t *size)
{
    *size = m->gguf->size;
    return m->gguf->bytes;
}

int lfm2_model_tensor(const lfm2_model *m, int i, lfm2_tensor_info *out)
{
    const struct gguf_tensor *t;

    if (i < 0 || i >= m->gguf->n_tensors)
        return LFM2_EARG;
    t = &m->gguf->tensor[i];
    *out = (lfm2_tensor_info){
        .name = t->name, .type = t->fmt->name, .n_dims = t->n_dims,
        .n_bytes = t->bytes
    };
    memcpy(out->dims, t->dims, sizeof out->dims);
    if (!m->layer)                        /* t->offset may be unchecked      */
        return LFM2_OK;
    out->data = m->gguf->data + t->offset;
    out->offset = (uint64_t)(out->data - m->gguf->bytes);
    return LFM2_OK;
}

int lfm2_model_row(const lfm2_model *m, int i, uint64_t row, float *out)
{
    lfm2_tensor_info t;
    struct tensor w;
    fenv_t callers;

    if (lfm2_model_tensor(m, i, &t) != LFM2_OK || !t.data ||
        row >= m->gguf->tensor[i].elements / t.dims[0])
        return LFM2_EARG;
    w = (struct tensor){ .fmt = m->gguf->tensor[i].fmt, .rows = 1,
                         .cols = (int)t.dims[0], .data = t.data };
    w.data += (size_t)row * row_bytes(&w);
    enter_arithmetic(&callers);
    get_row(out, &w, 0);
    fesetenv(&callers);
    return LFM2_OK;
}

const char *lfm2_model_string(const lfm2_model *m, const char *key, size_t *len)
{
    const struct str s = kv_string(gguf_find(m->gguf, key));

    if (s.s)
        *len = s.n;
    return s.s;
}

const char *lfm2_model_key(const lfm2_model *m, int i, char *buf, size_t cap)
{
    fenv_t callers;

    if (i < 0 || i >= m->gguf->n_kv)
        return NULL;
    enter_arithmetic(&callers);           /* for how printf() rounds         */
    snprintf(buf, cap, "%s", kv_text(&m->gguf->kv[i]).s);
    fesetenv(&callers);
    return m->gguf->kv[i].key;
}

void lfm2_model_params(const lfm2_model *m, uint64_t *total, uint64_t *active)
{
    *total = *active = 0;
    for (int i = 0; i < m->gguf->n_tensors; i++) {
        const struct gguf_tensor *t = &m->gguf->tensor[i];
        const uint64_t n = t->bound ? t->elements : 0;

        *total += n;
        *active += strstr(t->name, "_exps.") && m->cfg.n_expert > 0
            ? n / (uint64_t)m->cfg.n_expert * (uint64_t)m->cfg.n_expert_used
            : n;
    }
}

/* Linux limits what one MADV_WILLNEED reads, so it is called for small ranges.
 * Before 5.14 there is no MADV_POPULATE_READ, and the pages are touched. */
uint64_t lfm2_model_read_ahead(const lfm2_model *m, uint64_t from, uint64_t n)
{
#if defined __linux__ && !defined LFM2_NO_MMAP
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
    const struct file *f = m->file;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), each = 512 << 10;

    if (f->load != LFM2_LOAD_MAP || from >= f->size)
        return 0;
    const uint64_t left = f->size - from;
    const size_t before = (size_t)(from % page);       /* in the first page  */
    uint8_t *data = (uint8_t *)(uintptr_t)f->data + (from - before);

    n = n < left ? n : left;
    for (uint64_t i = 0; i < 2 * n && i < left; i += each)
        madvise(data + i, each < left - i ? each : (size_t)(left - i),
                MADV_WILLNEED);
    if (madvise(data, (size_t)n + before, MADV_POPULATE_READ) == 0)
        return n;
    if (errno != EINVAL)
        return 0;
    for (size_t i = 0; i < n + before; i += page)
        (void)*(volatile uint8_t *)(data + i);
    return n;
#else
    (void)m;
    (void)from;
    (void)n;
    return 0;
#endif
}

/* =========================================================================
 * Part IV.  The state
 * =========================================================================
 *
 * ----------------------------------------------- 19. The memory of a context
 *
 * All of it is one block, which lay_out() divides. */

/* What a span asked for: n_logits rows, or the state of its sequence. */
struct result { float *logits, *state; int n_logits; };

/* A token the sampler may choose; value is its logit, later a probability. */
struct candidate { float value; int32_t id; };

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Floats in the l_cache-1 columns that each convolution looks back to, and in
 * `more` columns besides. */
static int64_t columns(const lfm2_model *m, int more)
{
    return (int64_t)m->n_conv * (m->cfg.l_cache - 1 + more) * m->cfg.n_embd;
}

/* Bytes of the KV cache of a sequence, if K or V of one head takes `each`. */
static int64_t kv_bytes(const lfm2_context *ctx, int64_t each)
{
    return 2 * each * ctx->model->n_attn * ctx->model->cfg.n_head_kv;
}

/* Floats in the first mark and in those of a text of `len` tokens. */
static int64_t mark_floats(const lfm2_context *ctx, int len)
{
    return (1 + len / ctx->seq_step) * columns(ctx->model, 0);
}

/* 64, or more if the marks would take over a tenth of the KV cache. */
static int seq_step(const lfm2_context *ctx)
{
    const int64_t marks = columns(ctx->model, 0) * (int64_t)sizeof(float) * 10;
    const int64_t kv = kv_bytes(ctx, ctx->model->cfg.head_dim * kv_size(ctx));

    return marks <= kv * 64 ? 64 : marks <= kv * 128 ? 128 : 256;
}

static void carve_input(struct arena *a, struct input *in, int cols,
                        int64_t elements, int floats)
{
    in->cols = cols;
    CARVE(a, in->q, elements / UNIT);
    in->f = floats ? carve(a, elements, sizeof *in->f) : NULL;
}

/* The hidden layer is kept as floats only if weights multiplied by it are
 * floats.  Inputs that are never in use at the same time share memory. */
static void carve_pass(struct arena *a, lfm2_context *ctx)
{
    const struct layer *l = ctx->model->layer;
    const lfm2_config *c = &ctx->model->cfg;
    const int64_t rows = ctx->par.n_batch, slots = rows * c->n_expert_used;
    const int64_t n = c->n_embd, kv = rows * c->n_head_kv * c->head_dim;
    const int heads = c->n_head * c->head_dim;
    struct routing *r = &ctx->routing;
    int floats = 0;

    CARVE(a, ctx->batch.piece, ctx->par.n_seq);
    CARVE(a, ctx->batch.row, rows);
    CARVE(a, ctx->batch.rope, rows * c->head_dim);
    CARVE(a, r->score, rows * c->n_expert);
    CARVE(a, r->chosen, slots);
    CARVE(a, r->weight, slots);
    CARVE(a, r->slot_row, slots);
    CARVE(a, r->slot_weight, slots);
    CARVE(a, r->slot_begin, c->n_expert + 1);
    CARVE(a, r->active, c->n_expert);
    CARVE(a, r->gate, c->n_expert);
    CARVE(a, r->up, c->n_expert);
    CARVE(a, r->down, c->n_expert);
    for (int il = 0; il < c->n_layer; il++)
        floats |= (l[il].ffn_down.data ? &l[il].ffn_down : &l[il].ffn_down_exps)
                  ->fmt->floats != NULL;
    CARVE(a, ctx->x, rows * n);
    CARVE(a, ctx->y, c->n_expert ? rows * n : 0);
    CARVE(a, ctx->k, kv);
    CARVE(a, ctx->v, kv);
    carve_input(a, &ctx->in, c->n_embd, rows * n, 1);
    carve_input(a, &ctx->mixed, c->n_embd, rows * larger(n, heads), 1);
    ctx->heads = ctx->mixed;
    ctx->heads.cols = heads;
    carve_input(a, &ctx->hidden, c->n_ff,
                larger(rows * c->n_ff, slots * c->n_ff_expert), floats);
    ctx->hidden_exps = ctx->hidden;
    ctx->hidden_exps.cols = c->n_ff_expert;
    ctx->q = ctx->heads.f;
}

/* Point every buffer of ctx into the memory at `base`, which begins with ctx
 * itself; without a base only count.  Returns the size in all.  Threads have
 * room to unpack rows of the widest matrix. */
static int64_t lay_out(lfm2_context *ctx, void *base)
{
    struct arena all = { base, sizeof *ctx }, *a = &all;
    const lfm2_config *c = &ctx->model->cfg;
    const int64_t cols = larger(larger(c->n_ff, c->n_ff_expert),
                                larger(c->n_embd, c->n_head * c->head_dim));
    const int rows = ctx->isa->panel_rows;
    const int queries = rows_together(c) * (c->n_head / c->n_head_kv);
    const int n_seq = ctx->par.n_seq;

    CARVE(a, ctx->seq, n_seq);
    for (int i = 0; i < n_seq; i++) {
        struct seq counted, *s = base ? &ctx->seq[i] : &counted;
        s->oldest = 1 - c->l_cache;
        s->kv = carve(a, kv_bytes(ctx, kv_head_bytes(ctx)), 1);
        CARVE(a, s->u, columns(ctx->model, UNDO));
        CARVE(a, s->marks, mark_floats(ctx, ctx->par.n_ctx));
    }
    CARVE(a, ctx->states, (int64_t)n_seq * c->n_embd);
    CARVE(a, ctx->results, n_seq);
    CARVE(a, ctx->logits, (int64_t)ctx->par.n_logits * c->n_vocab);
    CARVE(a, ctx->candidates, c->n_vocab);
    carve_pass(a, ctx);
    ctx->pool = carve(a, 1, pool_size(ctx->par.n_threads));
    CARVE(a, ctx->thread, ctx->par.n_threads);
    for (int i = 0; i < ctx->par.n_threads; i++) {
        struct scratch s = { 0 };
        for (int k = 0; k < 3; k++)
            CARVE(a, s.out[k], ctx->par.n_batch * UNIT);
        CARVE(a, s.partial, 2 * queries);
        CARVE(a, s.q, cols * rows);
        CARVE(a, s.d, cols / 16 * rows);
        CARVE(a, s.m, cols / 16 * rows);
        CARVE(a, s.f, cols * UNIT);
        CARVE(a, s.chain, MOST_X_ROWS * UNIT * 16);
        CARVE(a, s.x, MOST_X_ROWS * cols / 32 * GROUP_BYTES);
        CARVE(a, s.tile, TILE * (c->head_dim + 1));
        CARVE(a, s.score, queries * CHUNK);
        s.arranged = base ? &ctx->thread[i].arranged : NULL;
        if (base)
            ctx->thread[i] = (struct thread){ .ctx = ctx, .id = i, .of = 1,
                                              .s = s };
    }
    return a->used;
}

lfm2_params lfm2_default_params(const lfm2_model *m)
{
    return (lfm2_params){
        .n_ctx = m->cfg.n_ctx_train < 4096 ? m->cfg.n_ctx_train : 4096,
        .n_seq = 1, .n_batch = m->cfg.n_expert ? 2048 : 512, .n_logits = 1
    };
}

/* Make *ctx a context without buffers: check the parameters and replace 0 and
 * AUTO.  Returns how many bytes the buffers take, or an error. */
static int64_t plan(lfm2_context *ctx, const lfm2_model *m,
                    const lfm2_params *params, lfm2_error *err)
{
    lfm2_params *p = &ctx->par;
    uint64_t total;

    *ctx = (struct lfm2_context){ .model = m, .par = *params };
    const struct { const char *name; int value, min, max; } row[] = {
        { "n_ctx", p->n_ctx, 0, MAX_CTX },
        { "n_seq", p->n_seq, 1, 4096 },
        { "n_batch", p->n_batch, 1, 1 << 16 },
        { "n_logits", p->n_logits, 0, 1 << 20 },
        { "n_threads", p->n_threads, 0, 1024 },
        { "kv_type", p->kv_type, LFM2_KV_F16, LFM2_KV_F32 }
    };
    if (!m->layer)
        return fail(err, LFM2_EARG, "a context for a file that is not a model");
    for (size_t i = 0; i < COUNT(row); i++)
        if (row[i].value < row[i].min || row[i].value > row[i].max)
            return fail(err, LFM2_EARG, "%s: %d, expected %d to %d",
                        row[i].name, row[i].value, row[i].min, row[i].max);
    if (!lfm2_isa_available(p->isa))
        return fail(err, LFM2_EARG, "isa: %d, expected one that this CPU and "
                    "this build have", p->isa);
    if (p->n_ctx == 0)
        p->n_ctx = m->cfg.n_ctx_train < MAX_CTX ? m->cfg.n_ctx_train : MAX_CTX;
    if (p->isa == LFM2_ISA_AUTO)          /* the last one available          */
        for (p->isa = LFM2_N_ISA - 1; !lfm2_isa_available(p->isa);)
            p->isa--;
    if (p->n_threads == 0)
        p->n_threads = lfm2_n_cpus() < 64 ? lfm2_n_cpus() : 64;
    if (p->n_batch > (int64_t)p->n_ctx * p->n_seq)
        p->n_batch = p->n_ctx * p->n_seq;
    ctx->isa = isa_table(p->isa);
    ctx->seq_step = seq_step(ctx);
    lfm2_model_params(m, &total, &ctx->row_work);
    return lay_out(ctx, NULL) + 64;       /* + 64, to align it               */
}

uint64_t lfm2_context_size(const lfm2_model *m, const lfm2_params *p)
{
    struct lfm2_context ctx;
    const int64_t size = plan(&ctx, m, p, NULL);

    return size > 0 ? (uint64_t)size : 0;
}

void lfm2_context_close(lfm2_context *ctx)
{
    if (!ctx)
        return;
    pool_close(ctx);
    free(ctx->traced);
    free(ctx->memory);
}

int lfm2_context_open(lfm2_context **out, const lfm2_model *m,
                      const lfm2_params *p, lfm2_error *err)
{
    struct lfm2_context c, *ctx;
    const int64_t size = plan(&c, m, p, err);

    *out = NULL;
    if (size < 0)
        return (int)size;
    c.memory = allocate(size);
    if (!c.memory)
        return fail(err, LFM2_ENOMEM, "no memory for a context of %lld bytes "
                    "(n_ctx %d, n_seq %d, n_batch %d)", (long long)size,
                    c.par.n_ctx, c.par.n_seq, c.par.n_batch);
    ctx = (void *)((uint8_t *)c.memory + 64 - (uintptr_t)c.memory % 64);
    *ctx = c;
    lay_out(ctx, ctx);
    pool_open(ctx);
    *out = ctx;
    return LFM2_OK;
}

lfm2_params lfm2_context_params(const lfm2_context *ctx)
{
    return ctx->par;
}

/* ---- the speed that the machine allows: lfm2_exercise() */

struct exercise { int what; int64_t done; };

/* LFM2_READ reads this thread's share of the first `done` bytes of the weights.
 * The others multiply one row of x, or ROWS, many times by the same weights,
 * which fit into the second-level cache. */
static void exercise(struct thread *me)
{
    enum { TIMES = 64, CACHE = 512 << 10, ROWS = 48 };
    const lfm2_context *ctx = me->ctx;
    const struct layer *l = &ctx->model->layer[0];
    const struct tensor *w = l->ffn_gate.data ? &l->ffn_gate
                                              : &l->ffn_gate_exps;
    const size_t fit = CACHE / (UNIT * row_bytes(w)) + 1;
    const int n = fit < (size_t)(w->rows / UNIT) ? (int)fit : w->rows / UNIT;
    struct exercise *e = ctx->exercise;
    struct input in = ctx->in;

    if (e->what == LFM2_READ) {
        const uint8_t *p = ctx->model->gguf->data;
        const struct range r = share(me, (int)(e->done / 64));
        uint64_t sum = 0, word;
        p += (size_t)r.first * 64;
        for (int i = r.first; i < r.last; i++, p += 64) {
            FETCH_ONCE(p + 8192);
            for (int k = 0; k < 64; k += 8) {
                memcpy(&word, p + k, sizeof word);
                sum ^= word;
            }
        }
        memcpy(me->s.f, &sum, sizeof sum);   /* or the loop is optimized out */
        return;
    }
    in.n = e->what == LFM2_DECODE ? 1 :
           ctx->par.n_batch < ROWS ? ctx->par.n_batch : ROWS;
    for (int i = 0; i < TIMES * n; i++)
        ctx->isa->product(me->s.out[0], w, i % n * UNIT, UNIT, &in, &me->s,
                          unit_data(w, n), w->data);
    if (me->id == 0)
        e->done = (int64_t)TIMES * n * UNIT * me->of *
                  (e->what == LFM2_DOT ? (int64_t)in.n * w->cols
                                       : (int64_t)row_bytes(w));
}

int64_t lfm2_exercise(lfm2_context *ctx, int what)
{
    const struct gguf *g = ctx->model->gguf;
    const int64_t size = g->bytes + g->size - g->data;
    const int64_t most = (int64_t)1 << 31;
    struct exercise e = { what, size < most ? size : most };
    fenv_t callers;

    if (!pool_is_here(ctx) || what < LFM2_READ || what > LFM2_DECODE)
        return LFM2_EARG;
    enter_arithmetic(&callers);
    ctx->exercise = &e;
    parallel(ctx, ctx->par.n_threads, exercise);
    ctx->exercise = NULL;
    fesetenv(&callers);
    return e.done;
}

/* ------------------------------------------------------------ 20. Sequences
 *
 * First where the columns of a sequence are; see struct seq. */

static float *u_column(const lfm2_context *ctx, const struct seq *s,
                       int i_conv, int pos)
{
    const lfm2_config *c = &ctx->model->cfg;
    const int n = UNDO + c->l_cache - 1;

    return s->u + ((size_t)i_conv * n + (pos + n) % n) * c->n_embd;
}

static float *conv_mark(const lfm2_context *ctx, const struct seq *s, int pos)
{
    if (pos == 0 || pos % ctx->seq_step != 0)
        return NULL;
    return s->marks + pos / ctx->seq_step * columns(ctx->model, 0);
}

/* Save the columns that a text of `len` tokens looks back to, or load them. */
enum { SAVE, LOAD };

static void move_columns(const lfm2_context *ctx, struct seq *s, int len,
                         int how, float *saved)
{
    const size_t n = (size_t)ctx->model->cfg.n_embd;
    const int first = len - ctx->model->cfg.l_cache + 1;

    for (int i = 0; i < ctx->model->n_conv; i++)
        for (int pos = first; pos < len; pos++, saved += n) {
            float *u = u_column(ctx, s, i, pos);
            memcpy(how == LOAD ? u : saved, how == LOAD ? saved : u,
                   n * sizeof *u);
        }
    if (how == LOAD)
        s->oldest = first;
}

static struct seq *find_seq(const lfm2_context *ctx, int seq)
{
    return seq >= 0 && seq < ctx->par.n_seq ? &ctx->seq[seq] : NULL;
}

/* ---- lfm2_forward() */

static int check_spans(lfm2_context *ctx, const lfm2_span *spans,
                       int n_spans, lfm2_error *err)
{
    const int n_vocab = ctx->model->cfg.n_vocab, n_ctx = ctx->par.n_ctx;
    int64_t n_logits = 0;

    if (!pool_is_here(ctx))
        return fail(err, LFM2_EARG, "a context with %d threads after fork(), "
                    "expected one that this process has opened",
                    ctx->par.n_threads);
    if (!spans || n_spans < 1 || n_spans > ctx->par.n_seq)
        return fail(err, LFM2_EARG, "%d spans, expected 1 to %d (n_seq)",
                    spans ? n_spans : 0, ctx->par.n_seq);
    for (int i = 0; i < ctx->par.n_seq; i++)
        ctx->seq[i].span = -1;
    for (int i = 0; i < n_spans; i++) {
        const lfm2_span *s = &spans[i];
        const int most = s->state ? 0 : s->n_tokens;
        struct seq *seq = find_seq(ctx, s->seq);
        if (!seq || seq->span >= 0)
            return fail(err, LFM2_EARG, "span %d: sequence %d, expected one of "
                        "0 to %d that no other span has", i, s->seq,
                        ctx->par.n_seq - 1);
        seq->span = i;
        if (s->n_tokens < 1 || !s->tokens == !s->embd)
            return fail(err, LFM2_EARG, "span %d: %d tokens, expected 1 or "
                        "more, as ids or as rows of embd", i,
                        s->tokens || s->embd ? s->n_tokens : 0);
        if (s->n_logits < 0 || s->n_logits > most)
            return fail(err, LFM2_EARG, "span %d: logits of %d rows, expected "
                        "0 to %d", i, s->n_logits, most);
        for (int t = 0; s->tokens && t < s->n_tokens; t++)
            if (s->tokens[t] < 0 || s->tokens[t] >= n_vocab)
                return fail(err, LFM2_EARG, "span %d: token %d is %ld, "
                            "expected 0 to %d", i, t, (long)s->tokens[t],
                            n_vocab - 1);
        if (s->n_tokens > n_ctx - seq->len)
            return fail(err, LFM2_EFULL, "sequence %d: %d tokens and %d more, "
                        "expected at most %d (n_ctx)", s->seq, seq->len,
                        s->n_tokens, n_ctx);
        n_logits += s->n_logits;
    }
    if (n_logits > ctx->par.n_logits)
        return fail(err, LFM2_EARG, "logits of %lld rows, expected at most %d "
                    "(n_logits)", (long long)n_logits, ctx->par.n_logits);
    return LFM2_OK;
}

/* u has been written up to column `end`, over the oldest columns. */
static void forget_columns(const lfm2_context *ctx, struct seq *s, int end)
{
    const int oldest = end - UNDO - ctx->model->cfg.l_cache + 1;
    s->oldest = oldest > s->oldest ? oldest : s->oldest;
}

/* Cut the next pass, at most n_batch rows, from the rest of the spans; returns
 * how many rows. */
static int next_pass(lfm2_context *ctx, const lfm2_span *spans, int n_spans)
{
    struct batch *b = &ctx->batch;
    const size_t n_embd = (size_t)ctx->model->cfg.n_embd;
    int rows = 0;

    b->n_pieces = 0;
    for (int i = 0; i < n_spans && rows < ctx->par.n_batch; i++) {
        const lfm2_span *span = &spans[i];
        const struct seq *s = &ctx->seq[span->seq];
        const int done = s->len - s->start, last = span->n_tokens - 1;
        const int left = span->n_tokens - done, room = ctx->par.n_batch - rows;
        const int n = left < room ? left : room;

        if (n == 0)
            continue;
        b->piece[b->n_pieces++] = (struct piece){ span->seq, s->len, rows, n };
        for (int t = done; t < done + n; t++)
            b->row[rows++] = (struct row){
                span->seq, s->start + t, span->embd ? -1 : span->tokens[t],
                span->embd ? span->embd + (size_t)t * n_embd : NULL,
                last - t < span->n_logits ? LOGITS :
                span->state && t == last ? STATE : NOTHING
            };
    }
    set_rows(ctx, rows);
    return rows;
}

/* A cancelled call must restore the columns before its start.  They are saved
 * first, unless the span is too short to overwrite them. */
int lfm2_forward(lfm2_context *ctx, const lfm2_span *spans, int n_spans,
                 lfm2_error *err)
{
    const struct batch *b = &ctx->batch;
    float *logits = ctx->logits;
    fenv_t callers;

    TRY(check_spans(ctx, spans, n_spans, err));
    ctx->n_logits = ctx->stop = 0;
    for (int i = 0; i < n_spans; i++) {
        struct seq *s = &ctx->seq[spans[i].seq];
        s->start = s->len;
        if (spans[i].n_tokens > UNDO)
            move_columns(ctx, s, s->len, SAVE, s->marks);
        ctx->results[i] = (struct result){
            logits, !spans[i].state ? NULL : ctx->states +
            (size_t)spans[i].seq * ctx->model->cfg.n_embd, spans[i].n_logits
        };
        logits += (size_t)spans[i].n_logits * ctx->model->cfg.n_vocab;
    }
    enter_arithmetic(&callers);
    for (int n; !ctx->stop && (n = next_pass(ctx, spans, n_spans)) > 0;) {
        const uint64_t work = ctx->row_work * (uint64_t)n;
        parallel(ctx, work < TOO_SMALL ? 1 : ctx->par.n_threads, forward);
        ctx->n_logits += b->n_rows;       /* output() has dropped the others */
        for (int i = 0; i < b->n_pieces; i++) {
            struct seq *s = &ctx->seq[b->piece[i].seq];
            s->len += b->piece[i].n;
            forget_columns(ctx, s, s->len);
        }
    }
    fesetenv(&callers);
    ctx->n_spans = ctx->stop ? 0 : n_spans;
    if (!ctx->stop)
        return LFM2_OK;
    for (int i = 0; i < n_spans; i++) {
        struct seq *s = &ctx->seq[spans[i].seq];
        s->len = s->start;
        if (spans[i].n_tokens > UNDO)
            move_columns(ctx, s, s->len, LOAD, s->marks);
        else
            forget_columns(ctx, s, s->len + spans[i].n_tokens);
    }
    atomic_store(&ctx->cancel, 0);
    return fail(err, LFM2_ECANCELLED, "cancelled by the caller");
}

float *lfm2_logits(lfm2_context *ctx, int span, int row)
{
    if (span < 0 || span >= ctx->n_spans || row < 0 ||
        row >= ctx->results[span].n_logits)
        return NULL;
    return ctx->results[span].logits + (size_t)row * ctx->model->cfg.n_vocab;
}

const float *lfm2_state(const lfm2_context *ctx, int span)
{
    return span >= 0 && span < ctx->n_spans ? ctx->results[span].state : NULL;
}

void lfm2_cancel(lfm2_context *ctx)
{
    atomic_store(&ctx->cancel, 1);
}

/* ---- trim and copy */

int lfm2_seq_len(const lfm2_context *ctx, int seq)
{
    const struct seq *s = find_seq(ctx, seq);
    return s ? s->len : LFM2_EARG;
}

int lfm2_seq_step(const lfm2_context *ctx)
{
    return ctx->seq_step;
}

/* Return whole pages to the system; from then on they read as 0. */
static void give_back(void *memory, int64_t size)
{
#if defined __linux__ && !defined LFM2_NO_MMAP
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t before = (page - (uintptr_t)memory % page) % page;

    if ((size_t)size > before)
        madvise((uint8_t *)memory + before,
                ((size_t)size - before) / page * page, MADV_DONTNEED);
#else
    (void)memory;
    (void)size;
#endif
}

int lfm2_seq_trim(lfm2_context *ctx, int seq, int len)
{
    struct seq *s = find_seq(ctx, seq);

    if (!s || len < 0)
        return LFM2_EARG;
    if (len >= s->len)
        return s->len;
    s->len = len;
    if (len > 0 && len - ctx->model->cfg.l_cache + 1 >= s->oldest)
        return len;                       /* the columns before it are in u  */
    s->len -= len % ctx->seq_step;
    if (s->len > 0) {
        move_columns(ctx, s, s->len, LOAD, conv_mark(ctx, s, s->len));
        return s->len;
    }
    s->oldest = 1 - ctx->model->cfg.l_cache;
    give_back(s->kv, kv_bytes(ctx, kv_head_bytes(ctx)));
    give_back(s->marks, mark_floats(ctx, ctx->par.n_ctx) *
                        (int64_t)sizeof *s->marks);
    memset(s->u, 0, (size_t)columns(ctx->model, UNDO) * sizeof *s->u);
    return 0;
}

int lfm2_seq_copy(lfm2_context *ctx, int dst, int src, lfm2_error *err)
{
    struct seq *to = find_seq(ctx, dst);
    const struct seq *from = find_seq(ctx, src);
    const int64_t head = kv_head_bytes(ctx), all = kv_bytes(ctx, head);

    if (!to || !from)
        return fail(err, LFM2_EARG, "copy of sequence %d to %d, expected 0 to "
                    "%d", src, dst, ctx->par.n_seq - 1);
    if (to == from)
        return LFM2_OK;
    const int64_t tiles = (from->len + TILE - 1) / TILE;      /* in use      */
    for (int64_t at = 0; at < all; at += head)
        memcpy(to->kv + at, from->kv + at, (size_t)(tiles * TILE *
               ctx->model->cfg.head_dim * kv_size(ctx)));
    memcpy(to->u, from->u, (size_t)columns(ctx->model, UNDO) * sizeof *to->u);
    memcpy(to->marks, from->marks, (size_t)mark_floats(ctx, from->len) *
                                   sizeof *to->marks);
    to->len = from->len;
    to->oldest = from->oldest;
    return LFM2_OK;
}

/* ---- save and load
 *
 * A saved sequence, all little-endian:
 *
 *     "LFM2SEQ2" | u64 lfm2_model_hash() | u32 kv_type | u32 len
 *     u: f32 [n_conv][l_cache-1][n_embd], the last columns
 *     marks: f32 [len/seq_step] of the same
 *     for each attention layer and kv head: K [len][head_dim], then V, as
 *         f16 or f32
 *     u64 hash_words() of all before
 *
 * It depends neither on n_ctx nor on the layout of the cache or the machine. */

enum { SAVED_HEAD = 24 };

static uint64_t hash_bytes(uint64_t h, const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * 0x100000001b3u;              /* FNV-1a */
    return h;
}

static const uint64_t HASH_START = 0xcbf29ce484222325u;

uint64_t lfm2_model_hash(const lfm2_model *m)
{
    const struct gguf *g = m->gguf;
    uint64_t h;

    if (!m->layer)
        return 0;
    h = hash_bytes(HASH_START, g->bytes, (size_t)(g->data - g->bytes));
    for (int i = 0; i < g->n_tensors; i++) {
        const struct gguf_tensor *t = &g->tensor[i];
        h = hash_bytes(h, g->data + t->offset, t->bytes < 64 ? t->bytes : 64);
    }
    return h;
}

/* The same, eight bytes at a time. */
static uint64_t hash_words(uint64_t h, const uint8_t *p, size_t n)
{
    for (; n >= 8; n -= 8, p += 8) {
        h = (h ^ load_int(p, 8)) * 0x100000001b3u;
        h ^= h >> 32;
    }
    return hash_bytes(h, p, n);
}

/* One of the two is NULL: the same code saves and loads. */
struct stream { uint8_t *to; const uint8_t *from; };

/* n numbers of `size` bytes, little-endian in the stream. */
static void move(struct stream *s, void *p, size_t n, int size)
{
    const int is_little = *(const uint8_t *)&(const uint16_t){ 1 };

    for (uint8_t *at = p; n > 0; n--, at += size)
        for (int i = 0; i < size; i++) {
            uint8_t *byte = at + (is_little ? i : size - 1 - i);
            if (s->to)
                *s->to++ = *byte;
            else
                *byte = *s->from++;
        }
}

static void move_saved(const lfm2_context *ctx, struct seq *q, int len,
                       struct stream *s)
{
    const int n_head_kv = ctx->model->cfg.n_head_kv;
    const int hd = ctx->model->cfg.head_dim, size = kv_size(ctx);

    if (s->to)
        move_columns(ctx, q, len, SAVE, q->marks);
    move(s, q->marks, (size_t)mark_floats(ctx, len), 4);
    if (s->from)
        move_columns(ctx, q, len, LOAD, q->marks);
    for (int i = 0; i < ctx->model->n_attn * n_head_kv; i++) {
        struct kv_head kv = kv_head_at(ctx, q, i / n_head_kv, i % n_head_kv);
        for (int pos = 0; pos < len; pos++)
            for (int d = 0; d < hd; d++)
                move(s, kv_at(&kv, KEY, pos, d), 1, size);
        move(s, kv.v, (size_t)len * hd, size);
    }
}

static uint64_t saved_size(const lfm2_context *ctx, int len)
{
    return (uint64_t)(SAVED_HEAD + mark_floats(ctx, len) * 4 + 8 + len *
                      kv_bytes(ctx, ctx->model->cfg.head_dim * kv_size(ctx)));
}

uint64_t lfm2_seq_state_size(const lfm2_context *ctx, int seq)
{
    const struct seq *s = find_seq(ctx, seq);
    return s ? saved_size(ctx, s->len) : 0;
}

int lfm2_seq_save(const lfm2_context *ctx, int seq, void *buf, uint64_t size,
                  lfm2_error *err)
{
    struct seq *q = find_seq(ctx, seq);
    struct stream s = { buf, NULL };
    char magic[] = "LFM2SEQ2";
    uint64_t need, hash = lfm2_model_hash(ctx->model);
    uint32_t kv_type = (uint32_t)ctx->par.kv_type, len;

    if (!q || !buf)
        return fail(err, LFM2_EARG, "save of sequence %d, expected 0 to %d and "
                    "a buffer", seq, ctx->par.n_seq - 1);
    need = saved_size(ctx, q->len);
    if (size < need)
        return fail(err, LFM2_EARG, "a buffer of %llu bytes, expected %llu",
                    ull(size), ull(need));
    len = (uint32_t)q->len;
    move(&s, magic, 8, 1);
    move(&s, &hash, 1, 8);
    move(&s, &kv_type, 1, 4);
    move(&s, &len, 1, 4);
    move_saved(ctx, q, q->len, &s);
    hash = hash_words(HASH_START, buf, (size_t)need - 8);
    move(&s, &hash, 1, 8);
    return LFM2_OK;
}

int lfm2_seq_load(lfm2_context *ctx, int seq, const void *buf, uint64_t size,
                  lfm2_error *err)
{
    struct seq *q = find_seq(ctx, seq);
    struct stream s = { NULL, buf };
    uint64_t model, kv_type, len;

    if (!q || !buf)
        return fail(err, LFM2_EARG, "load of sequence %d, expected 0 to %d and "
                    "a buffer", seq, ctx->par.n_seq - 1);
    if (size < SAVED_HEAD + 8 || size > SIZE_MAX ||
        memcmp(buf, "LFM2SEQ2", 8) != 0 || load_int(s.from + size - 8, 8) !=
        hash_words(HASH_START, buf, (size_t)size - 8))
        return fail(err, LFM2_EFORMAT, "%llu bytes that are not a saved "
                    "sequence or are damaged, expected \"LFM2SEQ2\" first and "
                    "their checksum last", ull(size));
    model = load_int(s.from + 8, 8);
    kv_type = load_int(s.from + 16, 4);
    if (model != lfm2_model_hash(ctx->model) ||
        kv_type != (uint64_t)ctx->par.kv_type)
        return fail(err, LFM2_EFORMAT, "a sequence saved with model %llx and "
                    "kv_type %llu, expected %llx and %d", ull(model),
                    ull(kv_type), ull(lfm2_model_hash(ctx->model)),
                    ctx->par.kv_type);
    len = load_int(s.from + 20, 4);
    if (len > (uint64_t)ctx->par.n_ctx)
        return fail(err, LFM2_EFULL, "a saved sequence of %llu tokens, "
                    "expected at most %d (n_ctx)", ull(len), ctx->par.n_ctx);
    if (size != saved_size(ctx, (int)len))
        return fail(err, LFM2_EFORMAT, "a saved sequence of %llu tokens in "
                    "%llu bytes, expected %llu", ull(len), ull(size),
                    ull(saved_size(ctx, (int)len)));
    s.from += SAVED_HEAD;
    move_saved(ctx, q, (int)len, &s);
    q->len = (int)len;
    return LFM2_OK;
}

/* --------------------------------------------------------------- 21. Traces
 *
 * While there is a hook, the threads keep a copy of what each module computes;
 * at the end of an operator the caller's thread passes it to the hook. */

static const struct { const char *name; int width; } modules[N_MODULES] = {
    [CONV_IN_PROJ] = { LAYER ".conv.in_proj", EMBD_3 },
    [CONV_CONV] = { LAYER ".conv.conv", EMBD },
    [CONV_OUT_PROJ] = { LAYER ".conv.out_proj", EMBD },
    [ATTN_Q] = { LAYER ".self_attn.q_proj", HEADS },
    [ATTN_K] = { LAYER ".self_attn.k_proj", HEADS_KV },
    [ATTN_V] = { LAYER ".self_attn.v_proj", HEADS_KV },
    [ATTN_Q_NORM] = { LAYER ".self_attn.q_layernorm", HEADS },
    [ATTN_K_NORM] = { LAYER ".self_attn.k_layernorm", HEADS_KV },
    [ATTN_OUT] = { LAYER ".self_attn.out_proj", EMBD },
    [FFN_W1] = { LAYER ".feed_forward.w1", FF },
    [FFN_W3] = { LAYER ".feed_forward.w3", FF },
    [FFN_W2] = { LAYER ".feed_forward.w2", EMBD },
    [MOE_GATE] = { LAYER ".feed_forward.gate", EXPERTS },
    [MOE_CHOSEN] = { LAYER ".feed_forward.selected_experts", USED },
    [EXPERT_W1] = { LAYER ".feed_forward.experts.%d.w1", FF_EXP },
    [EXPERT_W3] = { LAYER ".feed_forward.experts.%d.w3", FF_EXP },
    [EXPERT_W2] = { LAYER ".feed_forward.experts.%d.w2", EMBD }
};

static int module_width(const lfm2_context *ctx, int module)
{
    return size_of(&ctx->model->cfg, modules[module].width);
}

/* Where the output of a module begins in ctx->traced: a vector for each row of
 * the pass or, if it is part of an expert, for each slot. */
static int64_t traced_at(const lfm2_context *ctx, int module)
{
    const int64_t rows = ctx->par.n_batch;
    const int64_t slots = rows * ctx->model->cfg.n_expert_used;
    int64_t at = 0;

    while (module-- > 0)
        at += (module < EXPERT_W1 ? rows : slots) * module_width(ctx, module);
    return at;
}

static void keep(const lfm2_context *ctx, int module, int row, int col,
                 const float *x, int n)
{
    if (ctx->hook && module != NOT_TRACED)
        memcpy(ctx->traced + traced_at(ctx, module) + col +
               (int64_t)row * module_width(ctx, module), x,
               (size_t)n * sizeof *x);
}

/* Show y[n_rows][n]: its row i is row[i] of the pass, or i if row is NULL. */
static void show_rows(const lfm2_context *ctx, const char *module, int il,
                      int e, const int *row, int n_rows, const float *y, int n)
{
    char name[128];

    snprintf(name, sizeof name, module, il, e);
    for (int i = 0; i < n_rows; i++, y += n) {
        const struct row *r = &ctx->batch.row[row ? row[i] : i];
        ctx->hook(ctx->hook_user, &(lfm2_activation){
            name, il, e, r->seq, r->pos, r->token, n, y });
    }
}

static void trace_rows(struct thread *me, int il, const char *module,
                       const float *y, int n)
{
    if (!me->ctx->hook)
        return;
    if (me->id == 0)
        show_rows(me->ctx, module, il, -1, NULL, me->ctx->batch.n_rows, y, n);
    barrier(me);
}

static void trace(struct thread *me, const struct layer *l, int first,
                  int last)
{
    const lfm2_context *ctx = me->ctx;

    for (int i = first; ctx->hook && i <= last; i++)
        trace_rows(me, (int)(l - ctx->model->layer), modules[i].name,
                   ctx->traced + traced_at(ctx, i), module_width(ctx, i));
}

static void trace_moe(struct thread *me, const struct layer *l)
{
    const lfm2_context *ctx = me->ctx;
    const struct routing *r = &ctx->routing;
    const int il = (int)(l - ctx->model->layer);
    const int used = ctx->model->cfg.n_expert_used;

    if (!ctx->hook)
        return;
    for (int i = 0; me->id == 0 && i < ctx->batch.n_rows * used; i++)
        keep(ctx, MOE_CHOSEN, i / used, i % used,
             &(float){ (float)r->chosen[i] }, 1);
    trace(me, l, MOE_GATE, MOE_CHOSEN);
    trace_rows(me, il, LAYER ".feed_forward.routing_weights", r->weight, used);
    for (int i = 0; me->id == 0 && i < r->n_active; i++)
        for (int k = EXPERT_W1; k <= EXPERT_W2; k++) {
            const int e = r->active[i], n = module_width(ctx, k);
            const int first = r->slot_begin[e];
            show_rows(ctx, modules[k].name, il, e, r->slot_row + first,
                      r->slot_begin[e + 1] - first,
                      ctx->traced + traced_at(ctx, k) + (int64_t)first * n, n);
        }
    trace_rows(me, il, LAYER ".feed_forward", ctx->y, ctx->model->cfg.n_embd);
}

int lfm2_trace(lfm2_context *ctx, lfm2_trace_fn *fn, void *user,
               lfm2_error *err)
{
    const int64_t size = traced_at(ctx, N_MODULES) *
                         (int64_t)sizeof *ctx->traced;

    if (!fn) {
        free(ctx->traced);
        ctx->traced = NULL;
    } else if (!ctx->traced && !(ctx->traced = allocate(size)))
        return fail(err, LFM2_ENOMEM, "no memory for a trace, %lld bytes "
                    "(n_batch %d)", (long long)size, ctx->par.n_batch);
    ctx->hook = fn;
    ctx->hook_user = user;
    return LFM2_OK;
}

/* =========================================================================
 * Part V.  Words
 * =========================================================================
 *
 * --------------------------------------------------------- 22. The vocabulary
 *
 * Byte-level byte pair encoding.  A token is a string of bytes.  Text is cut
 * into pieces, roughly words.  A piece begins as single bytes; then neighbours
 * are merged, always the pair that comes first in the list of merges.  Markers
 * such as <|im_end|> are cut out of the text first: user-defined ones always,
 * control tokens only if the caller asks for it. */

enum {                                    /* as in tokenizer.ggml.token_type */
    TOKEN_NORMAL = 1,                     /* text in the byte alphabet       */
    TOKEN_UNKNOWN = 2,
    TOKEN_CONTROL = 3,                    /* a marker, where it is asked for */
    TOKEN_USER_DEFINED = 4,               /* a marker in any text            */
    TOKEN_UNUSED = 5,
    TOKEN_BYTE = 6
};

enum {                                    /* sets of types                   */
    FROM_TEXT = 1 << TOKEN_NORMAL | 1 << TOKEN_USER_DEFINED | 1 << TOKEN_BYTE,
    USER_MARKERS = 1 << TOKEN_USER_DEFINED,
    ALL_MARKERS = USER_MARKERS | 1 << TOKEN_CONTROL,
    ANY_TYPE = ~0
};

enum { MAX_VOCAB = 1000000, MAX_MERGE = 1 << 24, MAX_TOKEN = 1 << 20,
       MAX_MARKER = 256 };                /* bytes; every length is tried    */

#define NO_RANK UINT32_MAX                /* of a pair that does not merge   */

struct token {
    uint32_t start;                       /* of its bytes in text; they end
                                             where the next token starts     */
    uint8_t type;                         /* TOKEN_...                       */
};

struct merge { int32_t left, right, result; };

/* A hash table: an entry takes the first free slot from that of its hash on, so
 * of equal entries the first to be added is found.  A file that needs more than
 * MAX_PROBES slots is refused: its hashes were made to collide. */
enum { MAX_PROBES = 64 };

struct table { int32_t *slot; uint32_t n; };    /* entry + 1, or 0; n = 2^k  */

struct lfm2_tokenizer {
    int n_vocab;
    uint8_t *text;                        /* the bytes of all tokens         */
    struct token *token;                  /* [n_vocab + 1]                   */
    struct table tokens;                  /* by their bytes                  */
    struct merge *merge;                  /* [n_merges]; the index is the    */
    uint32_t n_merges;                    /* rank, the lowest comes first    */
    struct table merges;                  /* by left and right               */

    uint16_t longest_marker[256];         /* by first byte; 0: there is none */
    int32_t byte[256];                    /* the token of a single byte      */
    int32_t bos, eos, eot, im_start, im_end;        /* -1: there is none     */
    int add_bos;
    uint8_t *classes;                     /* [MAX_CLASSED], see class_at()   */
};

static uint8_t *make_classes(void);       /* see section 27                  */

static const uint8_t *token_bytes(const lfm2_tokenizer *t, int32_t id)
{
    return t->text + t->token[id].start;
}

static uint32_t token_len(const lfm2_tokenizer *t, int32_t id)
{
    return t->token[id + 1].start - t->token[id].start;
}

static int has_type(const lfm2_tokenizer *t, int32_t id, int types)
{
    return types >> t->token[id].type & 1;
}

static int32_t *slot_of(struct table t, uint64_t hash, uint32_t probe)
{
    return &t.slot[((hash ^ hash >> 32) + probe) & (t.n - 1)];
}

/* -1 if all slots for this hash are taken. */
static int add_entry(struct table t, uint64_t hash, int32_t entry)
{
    for (uint32_t i = 0; i < MAX_PROBES; i++)
        if (*slot_of(t, hash, i) == 0) {
            *slot_of(t, hash, i) = entry + 1;
            return 0;
        }
    return -1;
}

/* The token of one of these types whose bytes are s[n], the lowest id if there
 * are several; -1 if there is none. */
static int32_t find_hashed(const lfm2_tokenizer *t, uint64_t hash,
                           const uint8_t *s, size_t n, int types)
{
    for (uint32_t i = 0; i < MAX_PROBES; i++) {
        const int32_t id = *slot_of(t->tokens, hash, i) - 1;
        if (id < 0 || (token_len(t, id) == n && has_type(t, id, types) &&
                       memcmp(token_bytes(t, id), s, n) == 0))
            return id;
    }
    return -1;
}

static int32_t find_token(const lfm2_tokenizer *t, const void *s, size_t n,
                          int types)
{
    return find_hashed(t, hash_bytes(HASH_START, s, n), s, n, types);
}

static uint64_t hash_pair(int32_t left, int32_t right)
{
    return ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) *
           0x9e3779b97f4a7c15u;
}

/* The rank of the merge of two tokens, or NO_RANK. */
static uint32_t find_merge(const lfm2_tokenizer *t, int32_t left, int32_t right)
{
    for (uint32_t i = 0; i < MAX_PROBES; i++) {
        const int32_t m = *slot_of(t->merges, hash_pair(left, right), i) - 1;
        if (m < 0 || (t->merge[m].left == left && t->merge[m].right == right))
            return m < 0 ? NO_RANK : (uint32_t)m;
    }
    return NO_RANK;
}

/* ------------------------------------------------- 23. Reading a vocabulary
 *
 * In a GGUF, tokens and merges are written in the byte alphabet, one printable
 * character for each byte: bytes that are printable in Latin-1 stand for
 * themselves, the 68 others are U+0100 and following, in order.  A space is
 * U+0120, so the one space in a merge separates its two sides.  Markers are not
 * encoded. */

/* The keys that are read, in the order in which they are exported. */
enum { KEY_MODEL, KEY_PRE, KEY_BOS, KEY_EOS, KEY_ADD_BOS, KEY_TYPES, KEY_TOKENS,
       KEY_MERGES, N_WORD_KEYS };

static const struct {
    const char *name, *what;
    const char *kinds;                    /* of elements, as in gguf_type[]  */
    int must, min, max;                   /* elements; max 0: not an array   */
} word_key[N_WORD_KEYS] = {
#define WORD(name) "tokenizer.ggml." name
    { WORD("model"), "one string", "s", 1 },
    { WORD("pre"), "one string", "s", 0 },
    { WORD("bos_token_id"), "one integer", "iu", 0 },
    { WORD("eos_token_id"), "one integer", "iu", 0 },
    { WORD("add_bos_token"), "one bool", "b", 0 },
    { WORD("token_type"), "an array of integers", "iu", 0, 1, MAX_VOCAB },
    { WORD("tokens"), "an array of strings", "s", 1, 1, MAX_VOCAB },
    { WORD("merges"), "an array of strings", "s", 1, 0, MAX_MERGE }
#undef WORD
};

static const struct gguf_kv *word_kv(const struct gguf *g, int key)
{
    return gguf_find(g, word_key[key].name);
}

/* The length of the UTF-8 character at the start of p[n], n >= 1; 0 if it is
 * incomplete, -1 if it is invalid (overlong, a surrogate, above U+10FFFF). */
static int utf8_length(const uint8_t *p, size_t n)
{
    const uint8_t c = p[0];
    const int len = c < 0x80 ? 1 : c < 0xc2 ? -1 : c < 0xe0 ? 2 :
                    c < 0xf0 ? 3 : c < 0xf5 ? 4 : -1;
    uint8_t min = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
    uint8_t max = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;

    for (int i = 1; i < len; i++, min = 0x80, max = 0xbf) {
        if ((size_t)i == n)
            return 0;
        if (p[i] < min || p[i] > max)
            return -1;
    }
    return len;
}

/* The code point of a valid character of len bytes. */
static uint32_t utf8_value(const uint8_t *p, int len)
{
    uint32_t c = len == 1 ? *p : *p & (0x7fu >> len);

    for (int i = 1; i < len; i++)
        c = c << 6 | (p[i] & 0x3fu);
    return c;
}

/* The byte that a character of the byte alphabet stands for; -1 for others. */
static int byte_of(uint32_t c)
{
    if (c < 256)
        return c < 33 || (c > 126 && c < 161) || c == 173 ? -1 : (int)c;
    c -= 256;
    return c < 33 ? (int)c : c < 67 ? (int)c - 33 + 127 : c == 67 ? 173 : -1;
}

/* Write the bytes of a token to out; returns how many.  Text that is not all in
 * the byte alphabet is copied, like that of markers. */
static size_t decode(uint8_t *out, int type, const char *text, const char *end)
{
    const int is_encoded = type == TOKEN_NORMAL || type == TOKEN_BYTE;
    const uint8_t *p = (const uint8_t *)text, *last = (const uint8_t *)end;
    size_t n = 0;

    while (is_encoded && p < last) {
        const int len = utf8_length(p, (size_t)(last - p));
        const int byte = len > 0 ? byte_of(utf8_value(p, len)) : -1;
        if (byte < 0)
            break;
        out[n++] = (uint8_t)byte;
        p += len;
    }
    if (p == last)
        return n;
    memcpy(out, text, (size_t)(end - text));
    return (size_t)(end - text);
}

static int add_tokens(lfm2_tokenizer *t, const struct gguf *g)
{
    const struct gguf_kv *types = word_kv(g, KEY_TYPES);
    const struct gguf_kv *tokens = word_kv(g, KEY_TOKENS);
    struct cursor c = { tokens->value, tokens->value + tokens->size, 0 };

    for (int32_t id = 0; id < t->n_vocab; id++) {
        const struct str s = take_string(&c);
        int64_t type = TOKEN_NORMAL;
        if (types)
            kv_integer(types, (uint64_t)id, &type);
        if (type < TOKEN_NORMAL || type > TOKEN_BYTE)
            return BAD(g, "token %d: of type %lld, expected %d to %d", id,
                       (long long)type, TOKEN_NORMAL, TOKEN_BYTE);
        struct token *token = &t->token[id];
        token->type = (uint8_t)type;
        const int is_marker = has_type(t, id, ALL_MARKERS);
        const size_t max = is_marker ? MAX_MARKER : MAX_TOKEN;
        if (s.n > max)
            return BAD(g, "token %d: %s%zu bytes, expected at most %zu", id,
                       is_marker ? "a marker of " : "", s.n, max);
        uint8_t *bytes = t->text + token->start;
        const size_t n = decode(bytes, (int)type, s.s, s.s + s.n);
        const uint64_t hash = hash_bytes(HASH_START, bytes, n);
        token[1].start = token->start + (uint32_t)n;
        if (is_marker && n > 0 && n > t->longest_marker[bytes[0]])
            t->longest_marker[bytes[0]] = (uint16_t)n;
        if (find_hashed(t, hash, bytes, n, 1 << type) < 0 &&
            add_entry(t->tokens, hash, id) != 0)
            return BAD(g, "token %d: its hash and those of %d others collide",
                       id, MAX_PROBES);
    }
    return LFM2_OK;
}

/* "left right" becomes the ids of left, right and both together. */
static int add_merges(lfm2_tokenizer *t, const struct gguf *g)
{
    uint8_t *bytes = t->text + t->token[t->n_vocab].start;
    const struct gguf_kv *merges = word_kv(g, KEY_MERGES);
    struct cursor c = { merges->value, merges->value + merges->size, 0 };

    for (uint64_t i = 0; i < merges->n; i++) {
        const struct str s = take_string(&c);
        const char *space = memchr(s.s, ' ', s.n), *end = s.s + s.n;
        const char *right = space ? space + 1 : end;
        const size_t n = decode(bytes, TOKEN_NORMAL, s.s, space ? space : end);
        const size_t k = decode(bytes + n, TOKEN_NORMAL, right, end);
        struct merge m = { find_token(t, bytes, n, ANY_TYPE),
                           find_token(t, bytes + n, k, ANY_TYPE),
                           find_token(t, bytes, n + k, ANY_TYPE) };
        if (n == 0 || k == 0 || m.left < 0 || m.right < 0 || m.result < 0)
            return BAD(g, "merge %llu: \"%s\", expected two tokens that "
                       "make a third, with a space between them", ull(i),
                       show(s).s);
        /* text never makes a control token; of equal merges the first counts */
        if (!has_type(t, m.result, FROM_TEXT) ||
            find_merge(t, m.left, m.right) != NO_RANK)
            continue;
        if (add_entry(t->merges, hash_pair(m.left, m.right),
                      (int32_t)t->n_merges) != 0)
            return BAD(g, "merge %llu: its hash and those of %d others collide",
                       ull(i), MAX_PROBES);
        t->merge[t->n_merges++] = m;
    }
    return LFM2_OK;
}

/* Check all keys.  The caller must call gguf_free(), even after an error. */
static int open_vocabulary(struct gguf *g, const void *data, size_t size,
                           lfm2_error *err)
{
    *g = (struct gguf){ 0 };
    if (!data)
        return fail(err, LFM2_EARG, "no data to read a vocabulary from");
    TRY(gguf_parse(g, data, size, err));
    for (int i = 0; i < N_WORD_KEYS; i++) {
        const struct gguf_kv *kv = word_kv(g, i);
        const int is_array = kv && kv->type == GGUF_ARRAY;
        if (kv ? is_array != (word_key[i].max > 0) ||
                 !strchr(word_key[i].kinds, gguf_type[kv->elem].kind)
               : word_key[i].must)
            return BAD(g, "%s: %s %s, expected %s", word_key[i].name,
                       is_array ? "an array of" : kv ? "one" : "no",
                       kv ? gguf_type[kv->elem].name : "such key",
                       word_key[i].what);
        if (is_array)
            TRY(check_range(g, kv->key, (double)kv->n, " elements",
                            word_key[i].min, word_key[i].max));
    }
    const struct gguf_kv *types = word_kv(g, KEY_TYPES);
    const double n_vocab = (double)word_kv(g, KEY_TOKENS)->n;
    if (types)
        TRY(check_range(g, types->key, (double)types->n, " elements", n_vocab,
                        n_vocab));
    const struct str model = kv_string(word_kv(g, KEY_MODEL));
    const struct str pre = kv_string(word_kv(g, KEY_PRE));
    const struct str arch = kv_string(gguf_find(g, "general.architecture"));
    if (!str_is(model, "gpt2"))
        return OTHER(g, "tokenizer.ggml.model: \"%s\", expected \"gpt2\", a "
                     "byte-level BPE", show(model).s);
    /* LFM2 models have only one pre-tokenizer, whatever `pre` says */
    if (str_is(arch, "lfm2") || str_is(arch, "lfm2moe") ||
        str_is(pre, "lfm2") || str_is(pre, "llama-bpe"))
        return LFM2_OK;
    return OTHER(g, "tokenizer.ggml.pre: \"%s\", expected \"lfm2\" or "
                 "\"llama-bpe\"", show(pre).s);
}

/* Room for n entries, at most a quarter full; -1 if there is no memory. */
static int open_table(struct table *t, uint64_t n)
{
    for (t->n = 1; t->n < 4 * n; t->n *= 2)
        ;
    t->slot = calloc(t->n, sizeof *t->slot);
    return t->slot ? 0 : -1;
}

static int read_vocabulary(lfm2_tokenizer *t, const struct gguf *g)
{
    const struct gguf_kv *tokens = word_kv(g, KEY_TOKENS);
    const struct gguf_kv *merges = word_kv(g, KEY_MERGES);
    const struct gguf_kv *add = word_kv(g, KEY_ADD_BOS);
    int32_t *const role[] = { &t->bos, &t->eos, &t->eot, &t->im_start,
                              &t->im_end };

    t->n_vocab = (int)tokens->n;
    t->add_bos = !add || add->value[0];
    if (tokens->size < INT32_MAX)         /* merges: room for add_merges()   */
        t->text = malloc(tokens->size + merges->size);
    t->token = calloc((size_t)t->n_vocab + 1, sizeof *t->token);
    t->merge = malloc(((size_t)merges->n + 1) * sizeof *t->merge);
    t->classes = make_classes();
    if (!t->text || !t->token || !t->merge || !t->classes ||
        open_table(&t->tokens, tokens->n) != 0 ||
        open_table(&t->merges, merges->n) != 0)
        return fail(g->err, LFM2_ENOMEM, "no memory for the vocabulary");
    TRY(add_tokens(t, g));

    /* What begins or ends a text or a turn is a control token, even if the file
     * calls it user-defined. */
    for (int k = KEY_BOS; k <= KEY_EOS; k++) {
        uint32_t id = UINT32_MAX;         /* none                            */
        TRY(gguf_u32(g, word_key[k].name, &id));
        if (id != UINT32_MAX)
            TRY(check_range(g, word_key[k].name, id, "", 0, t->n_vocab - 1));
        *role[k - KEY_BOS] = (int32_t)id;
    }
    t->eot = lfm2_token_id(t, "<|endoftext|>");
    t->im_start = lfm2_token_id(t, "<|im_start|>");
    t->im_end = lfm2_token_id(t, "<|im_end|>");
    for (size_t i = 0; i < COUNT(role); i++)
        if (*role[i] >= 0 && has_type(t, *role[i], USER_MARKERS))
            t->token[*role[i]].type = TOKEN_CONTROL;
    TRY(add_merges(t, g));
    for (int b = 0; b < 256; b++) {
        t->byte[b] = find_token(t, &(uint8_t){ (uint8_t)b }, 1, FROM_TEXT);
        if (t->byte[b] < 0)
            return BAD(g, "the vocabulary: no token for the single byte "
                       "0x%02x, expected all 256", (unsigned)b);
    }
    return LFM2_OK;
}

void lfm2_tokenizer_close(lfm2_tokenizer *t)
{
    if (!t)
        return;
    free(t->text);
    free(t->token);
    free(t->merge);
    free(t->tokens.slot);
    free(t->merges.slot);
    free(t->classes);
    free(t);
}

int lfm2_tokenizer_open_memory(lfm2_tokenizer **out, const void *data,
                               size_t size, lfm2_error *err)
{
    lfm2_tokenizer *t = calloc(1, sizeof *t);
    struct gguf g;
    int code = open_vocabulary(&g, data, size, err);

    *out = NULL;
    if (code == LFM2_OK)
        code = t ? read_vocabulary(t, &g)
                 : fail(err, LFM2_ENOMEM, "no memory for the vocabulary");
    gguf_free(&g);
    if (code == LFM2_OK)
        *out = t;
    else
        lfm2_tokenizer_close(t);
    return code;
}

int lfm2_tokenizer_open(lfm2_tokenizer **out, const char *path, lfm2_error *err)
{
    struct file file;
    int code;

    *out = NULL;
    TRY(file_open(&file, path, LFM2_LOAD_MAP, err));
    code = lfm2_tokenizer_open_memory(out, file.data, file.size, err);
    file_close(&file);
    return code;
}

/* Output of bytes, like snprintf: n counts all, cap limits what is written. */
struct writer { uint8_t *out; size_t cap, n; };

static void put(struct writer *w, const void *p, size_t n)
{
    if (w->n < w->cap)
        memcpy(w->out + w->n, p, n < w->cap - w->n ? n : w->cap - w->n);
    w->n += n;
}

/* A tokenizer.bin is a GGUF with these keys and no tensors.  As it has no
 * architecture, it needs `pre`; other keys are copied with their headers. */
size_t lfm2_tokenizer_export(const void *data, size_t size, void *buf,
                             size_t cap, lfm2_error *err)
{
    static const char pre[] = "\22\0\0\0\0\0\0\0tokenizer.ggml.pre"
                              "\10\0\0\0" "\4\0\0\0\0\0\0\0lfm2";
    uint8_t header[24] = "GGUF\3";
    struct writer out = { buf, buf ? cap : 0, 0 };
    struct gguf g;
    const int code = open_vocabulary(&g, data, size, err);

    for (int key = 0; key < N_WORD_KEYS; key++)
        header[16] += key == KEY_PRE || word_kv(&g, key);  /* how many keys  */
    if (code == LFM2_OK)
        put(&out, header, sizeof header);
    for (int key = 0; code == LFM2_OK && key < N_WORD_KEYS; key++) {
        const struct gguf_kv *kv = word_kv(&g, key);
        if (key == KEY_PRE)
            put(&out, pre, sizeof pre - 1);
        else if (kv) {
            const uint8_t *from = kv->value - strlen(kv->key) -
                                  (kv->type == GGUF_ARRAY ? 24 : 12);
            put(&out, from, (size_t)(kv->value - from) + kv->size);
        }
    }
    gguf_free(&g);
    return out.n;
}

/* ------------------------------------------------------ 24. Text to tokens
 *
 * First the markers are cut out, then the text between them is cut into pieces,
 * then each piece becomes tokens.  Each step takes linear time, the last one
 * n log n, for any text: a page of one letter is not a bad case. */

enum { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE, CLASS_END };
enum { MAX_CLASSED = 0x32400 };           /* code points from here are OTHER */

/* The class of the character at p, and its length; CLASS_END at the end.  A
 * byte that is not valid UTF-8 counts as a character of class OTHER. */
static int class_at(const lfm2_tokenizer *t, const uint8_t *p,
                    const uint8_t *end, int *len)
{
    const int n = p < end ? utf8_length(p, (size_t)(end - p)) : 0;
    const uint32_t c = n > 0 ? utf8_value(p, n) : MAX_CLASSED;

    *len = n > 0 ? n : p < end;
    return p == end ? CLASS_END :
           c < MAX_CLASSED ? t->classes[c] : CLASS_OTHER;
}

/* Skip at most max characters of this class. */
static const uint8_t *skip(const lfm2_tokenizer *t, const uint8_t *p,
                           const uint8_t *end, int class, size_t max)
{
    for (int len; max > 0 && class_at(t, p, end, &len) == class; max--)
        p += len;
    return p;
}

/* The length of 's 't 're 've 'm 'll 'd at p, in either case, or 0. */
static int contraction(const uint8_t *p, const uint8_t *end)
{
    const int a = end - p > 1 && *p == '\'' ? p[1] | 0x20 : 0;
    const int b = end - p > 2 ? p[2] | 0x20 : 0;

    if (a == 's' || a == 't' || a == 'm' || a == 'd')
        return 2;
    return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? 3
                                                                          : 0;
}

static int is_newline(const uint8_t *p, const uint8_t *end)
{
    return p < end && (*p == '\r' || *p == '\n');
}

/* The end of the piece that begins at p < end, which is the match of the first
 * of these regular expressions that matches:
 *
 *     (?i:'s|'t|'re|'ve|'m|'ll|'d)
 *     [^\r\n\p{L}\p{N}]?\p{L}+
 *     \p{N}{1,3}
 *      ?[^\s\p{L}\p{N}]+[\r\n]*
 *     \s*[\r\n]+|\s+(?!\S)|\s+                                              */
static const uint8_t *piece_end(const lfm2_tokenizer *t, const uint8_t *p,
                                const uint8_t *end)
{
    const uint8_t *space, *last;
    int len, next_len;
    const int class = class_at(t, p, end, &len);
    const int next = class_at(t, p + len, end, &next_len);

    if (contraction(p, end) > 0)
        return p + contraction(p, end);
    if (class == CLASS_LETTER ||
        (class != CLASS_NUMBER && next == CLASS_LETTER && !is_newline(p, end)))
        return skip(t, p + len, end, CLASS_LETTER, SIZE_MAX);
    if (class == CLASS_NUMBER)
        return skip(t, p, end, CLASS_NUMBER, 3);
    if (class == CLASS_OTHER || (*p == ' ' && next == CLASS_OTHER)) {
        p = skip(t, p + len, end, CLASS_OTHER, SIZE_MAX);
        while (is_newline(p, end))
            p++;
        return p;
    }
    last = space = skip(t, p, end, CLASS_SPACE, SIZE_MAX);
    while (last > p && !is_newline(last - 1, end))
        last--;
    if (last > p || space == end)         /* `\s*[\r\n]+`, up to the last    */
        return last > p ? last : end;
    for (last = space - 1; (*last & 0xc0) == 0x80;)
        last--;                           /* `\s+(?!\S)`: all but one, ...    */
    return last > p ? last : space;       /* ... `\s+` if there is but one    */
}

/* Output of tokens, like snprintf: n counts all, cap limits what is written. */
struct tokens { int32_t *out; int cap, n; };

static void emit(struct tokens *o, int32_t id)
{
    if (o->n < o->cap)
        o->out[o->n] = id;
    o->n++;
}

/* A piece that is being merged: a row of symbols, which are tokens.  Symbol i
 * begins at byte i.  Its token is in id[] there and at its last byte, so that
 * both neighbours can be found:
 *
 *     piece     h   e   l   l   o                symbols "hel", "l", "o"
 *     id       hel  .  hel  l   o
 *
 * best[] is a tournament tree.  Leaf best[n+i] has the rank of merging symbol i
 * with the next one in its upper 32 bits, and i in the lower.  best[v] is the
 * lower of best[2v] and best[2v+1]: so best[1] is the next merge, the leftmost
 * of equal ones. */
struct symbols {
    uint32_t n, room;                     /* bytes, and the most that fit    */
    int32_t *id;                          /* [room]                          */
    uint64_t *best;                       /* [2 room]                        */
};

static uint64_t rank_at(const lfm2_tokenizer *t, struct symbols p, uint32_t i)
{
    const uint32_t next = i + token_len(t, p.id[i]);
    const uint32_t rank = next < p.n ? find_merge(t, p.id[i], p.id[next])
                                     : NO_RANK;
    return (uint64_t)rank << 32 | i;
}

static void set_rank(struct symbols p, uint32_t i, uint64_t rank)
{
    p.best[p.n + i] = rank;
    for (uint32_t v = (p.n + i) / 2; v > 0; v /= 2) {
        const uint64_t left = p.best[2 * v], right = p.best[2 * v + 1];
        p.best[v] = left < right ? left : right;
    }
}

/* A piece that is a token as a whole becomes that token, even if no merges lead
 * to it, as in llama.cpp.  All other pieces have at least two bytes. */
static void encode_piece(const lfm2_tokenizer *t, struct tokens *o,
                         struct symbols p, const uint8_t *s)
{
    const int32_t whole = find_token(t, s, p.n, FROM_TEXT);

    if (whole >= 0) {
        emit(o, whole);
        return;
    }
    for (uint32_t i = 0; i < p.n; i++)
        p.id[i] = t->byte[s[i]];
    for (uint32_t i = 0; i < p.n; i++)
        set_rank(p, i, rank_at(t, p, i));
    while (p.best[1] >> 32 != NO_RANK) {
        const struct merge *m = &t->merge[p.best[1] >> 32];
        const uint32_t i = (uint32_t)p.best[1];
        set_rank(p, i + token_len(t, m->left), UINT64_MAX);
        p.id[i] = p.id[i + token_len(t, m->result) - 1] = m->result;
        set_rank(p, i, rank_at(t, p, i));
        if (i > 0) {
            const uint32_t left = i - token_len(t, p.id[i - 1]);
            set_rank(p, left, rank_at(t, p, left));
        }
    }
    for (uint32_t i = 0; i < p.n; i += token_len(t, p.id[i]))
        emit(o, p.id[i]);
}

/* The longest marker of these types at p < end; or -1. */
static int32_t marker_at(const lfm2_tokenizer *t, const uint8_t *p,
                         const uint8_t *end, int types)
{
    uint64_t hash = HASH_START;
    int32_t found = -1;

    for (int n = 1; n <= t->longest_marker[*p] && n <= end - p; n++) {
        hash = hash_bytes(hash, p + n - 1, 1);
        const int32_t id = find_hashed(t, hash, p, (size_t)n, types);
        found = id >= 0 ? id : found;
    }
    return found;
}

enum { MAX_ENCODE = 1 << 30 };            /* bytes of a text, tokens before  */

/* Make room for a piece of s->n bytes; -1 if there is no memory. */
static int make_room(struct symbols *s)
{
    if (s->n <= s->room)
        return 0;
    free(s->best);
    s->room = 2 * s->n;                   /* n is at most MAX_ENCODE         */
    s->best = calloc(s->room, 2 * sizeof *s->best + sizeof *s->id);
    if (!s->best)
        return -1;
    s->id = (int32_t *)(s->best + 2 * (size_t)s->room);
    return 0;
}

/* Cut out the markers from left to right, the longest one at each place, and
 * encode the text between them.  (llama.cpp cuts out the longest marker of all
 * first: the result is the same unless markers overlap.) */
static int encode_text(const lfm2_tokenizer *t, struct tokens *o,
                       const char *text, size_t len, int types)
{
    const uint8_t *p = (const uint8_t *)text, *from = p, *end = p + len;
    struct symbols s = { 0 };

    if (len > MAX_ENCODE || o->n > MAX_ENCODE - 8)
        return LFM2_EARG;
    for (;;) {
        int32_t id = -1;
        while (p < end && (id = marker_at(t, p, end, types)) < 0)
            p++;
        for (; from < p; from += s.n) {
            s.n = (uint32_t)(piece_end(t, from, p) - from);
            if (make_room(&s) != 0)
                return LFM2_ENOMEM;
            encode_piece(t, o, s, from);
        }
        if (id < 0)
            break;
        emit(o, id);
        from = p += token_len(t, id);
    }
    free(s.best);
    return LFM2_OK;
}

int lfm2_encode(const lfm2_tokenizer *t, const char *text, size_t len,
                int flags, int32_t *out, int cap)
{
    const int types = flags & LFM2_ENCODE_SPECIAL ? ALL_MARKERS : USER_MARKERS;
    struct tokens o = { out, out ? cap : 0, 0 };

    if (!text && len > 0)
        return LFM2_EARG;
    if ((flags & LFM2_ENCODE_BOS) && t->bos >= 0)
        emit(&o, t->bos);
    if (len > 0)
        TRY(encode_text(t, &o, text, len, types));
    return o.n;
}

/* --------------------------------------- 25. Conversations, and tokens to text
 *
 *     <|startoftext|>
 *     <|im_start|>role\ncontent<|im_end|>\n       for each message
 *     <|im_start|>assistant\n                     if an answer is to follow
 *
 * Role and content are encoded as one text: the line break between them can be
 * in one piece with what follows. */

/* A whole turn; or, if content is NULL, only its opening. */
static int encode_turn(const lfm2_tokenizer *t, struct tokens *o,
                       const char *role, const char *content)
{
    const size_t n_role = strlen(role), n = content ? strlen(content) : 0;
    char *text;
    int code;

    if (n_role > MAX_ENCODE || n > MAX_ENCODE - n_role)
        return LFM2_EARG;
    text = malloc(n_role + n + 2);
    if (!text)
        return LFM2_ENOMEM;
    snprintf(text, n_role + n + 2, "%s\n%s", role, content ? content : "");
    emit(o, t->im_start);
    code = encode_text(t, o, text, n_role + 1 + n, USER_MARKERS);
    free(text);
    if (code != LFM2_OK || !content)
        return code;
    emit(o, t->im_end);
    return encode_text(t, o, "\n", 1, USER_MARKERS);
}

int lfm2_chat(const lfm2_tokenizer *t, const lfm2_message *msgs, int n_msgs,
              int generate, int32_t *out, int cap)
{
    struct tokens o = { out, out ? cap : 0, 0 };

    if (t->im_start < 0 || t->im_end < 0 || n_msgs < 0)
        return LFM2_EARG;
    if (t->bos >= 0)
        emit(&o, t->bos);
    for (int i = 0; i < n_msgs; i++) {
        if (!msgs[i].role || !msgs[i].content)
            return LFM2_EARG;
        TRY(encode_turn(t, &o, msgs[i].role, msgs[i].content));
    }
    if (generate)
        TRY(encode_turn(t, &o, "assistant", NULL));
    return o.n;
}

/* ---- what tokens are, and their bytes as text */

int lfm2_n_vocab(const lfm2_tokenizer *t)
{
    return t->n_vocab;
}

int32_t lfm2_bos(const lfm2_tokenizer *t)
{
    return t->bos;
}

int lfm2_add_bos(const lfm2_tokenizer *t)
{
    return t->add_bos && t->bos >= 0;
}

int lfm2_is_eog(const lfm2_tokenizer *t, int32_t token)
{
    return token >= 0 &&
           (token == t->eos || token == t->im_end || token == t->eot);
}

const char *lfm2_token_bytes(const lfm2_tokenizer *t, int32_t token,
                             int special, int *len)
{
    *len = 0;
    if (token < 0 || token >= t->n_vocab ||
        (!special && !has_type(t, token, FROM_TEXT)))
        return "";
    *len = (int)token_len(t, token);
    return (const char *)token_bytes(t, token);
}

/* A marker is preferred to other tokens with the same bytes. */
int32_t lfm2_token_id(const lfm2_tokenizer *t, const char *text)
{
    const size_t n = strlen(text);
    const int32_t marker = find_token(t, text, n, ALL_MARKERS);

    return marker >= 0 ? marker : find_token(t, text, n, ANY_TYPE);
}

size_t lfm2_utf8_push(lfm2_utf8 *u, const char *bytes, size_t len, char *out)
{
    size_t n = 0, i = 0;

    for (;;) {
        int ready = len == 0 ? u->n_held : u->n_held == 0 ? 0 :
                    utf8_length(u->held, (size_t)u->n_held);
        if (ready == 0 && i == len)
            return n;
        if (ready == 0) {
            u->held[u->n_held++] = (unsigned char)bytes[i++];
            continue;
        }
        ready = ready < 0 ? 1 : ready;
        memcpy(out + n, u->held, (size_t)ready);
        memmove(u->held, u->held + ready, (size_t)(u->n_held - ready));
        u->n_held -= ready;
        n += (size_t)ready;
    }
}

/* --------------------------------------------------------------- 26. Sampling
 *
 * The candidates are a list of (logit, id), sorted only as far as top-k and
 * top-p need: likeliest first, ties by the lower id, so the order is unique.
 * Probabilities are e^(logit - highest), not divided by their sum.  Every sum
 * runs in the order of the list, that of the ids if nothing was sorted. */

static int comes_before(struct candidate a, struct candidate b)
{
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

/* c[n] is a heap with the last in order on top, except that c[i] may have to go
 * down. */
static void sift_down(struct candidate *c, int n, int i)
{
    const struct candidate moved = c[i];

    for (int child = 2 * i + 1; child < n; child = 2 * i + 1) {
        if (child + 1 < n && comes_before(c[child], c[child + 1]))
            child++;
        if (!comes_before(moved, c[child]))
            break;
        c[i] = c[child];
        i = child;
    }
    c[i] = moved;
}

/* Bring the first k of c[n], or all, to its front, sorted; returns how many.  A
 * heap holds the first k so far.  Few of the rest come before its top, and take
 * its place.  Then the top is moved behind the heap until the heap is empty. */
static int sort_first(struct candidate *c, int n, int k)
{
    k = k < n ? k : n;
    for (int i = k / 2; i-- > 0;)
        sift_down(c, k, i);
    for (int i = n; i-- > 1;) {
        const struct candidate top = c[0];
        if (i >= k && comes_before(top, c[i]))
            continue;
        c[0] = c[i];
        c[i] = top;
        sift_down(c, i < k ? i : k, 0);
    }
    return k;
}

/* The index of the highest logit, the first of several; -1 if there is none or
 * one is NaN or +inf. */
static int32_t highest(const float *logits, int n)
{
    float top = -INFINITY;
    int32_t best = -1;

    for (int32_t id = 0; id < n; id++)
        if (!(logits[id] <= top)) {       /* higher, or NaN                  */
            if (!(logits[id] <= FLT_MAX))
                return -1;
            top = logits[best = id];
        }
    return best;
}

/* Lower the logits of recent tokens.  was[t].value becomes the logit that token
 * t had before, so that a token that occurs twice is lowered once. */
static void penalise(const lfm2_sampler *s, struct candidate *was,
                     float *logits, int n_vocab, const int32_t *history, int n)
{
    const float penalty = s->repeat_penalty;

    if (!history || s->repeat_last_n <= 0 ||
        !(penalty > 0 && penalty <= FLT_MAX))
        return;
    const int first = n > s->repeat_last_n ? n - s->repeat_last_n : 0;
    for (int i = first; i < n; i++)
        if (history[i] >= 0 && history[i] < n_vocab)
            was[history[i]].value = logits[history[i]];
    for (int i = first; i < n; i++) {
        const int32_t id = history[i];
        if (id < 0 || id >= n_vocab || was[id].value < -FLT_MAX)
            continue;                     /* excluded by the caller          */
        float l = was[id].value;
        l = l > 0 ? l / penalty : l * penalty;
        logits[id] = l > FLT_MAX ? FLT_MAX : l < -FLT_MAX ? -FLT_MAX : l;
    }
}

/* Does min-p keep a logit that differs from the highest by x?  If x is below
 * `least`, e^x is certainly below min_p, and is not computed. */
static int is_likely(float x, float min_p, float least)
{
    return x == 0 || !(min_p > 0) || (x >= least && exp_f32(x) >= min_p);
}

/* Put in c the candidates that top-k, top-p and min-p leave; returns how many.
 * The one with the highest logit always stays. */
static int choose_candidates(const lfm2_sampler *s, struct candidate *c,
                             const float *logits, int n_vocab, float max)
{
    const int by_k = s->top_k > 0 && s->top_k < n_vocab, by_p = s->top_p < 1;
    double sum = 0, mass = 0;
    float least = 0;
    int n = 0, taken = 0, sorted = 0;

    while (least > -88 && exp_f32(least) >= s->min_p)
        least -= 1;
    for (int32_t id = 0; id < n_vocab; id++)
        if (logits[id] >= -FLT_MAX &&
            (by_k || by_p || is_likely(logits[id] - max, s->min_p, least)))
            c[n++] = (struct candidate){ logits[id], id };
    if (by_k)
        n = sorted = sort_first(c, n, s->top_k);
    for (int i = 0; by_p && i < n; i++)
        sum += exp_f32(c[i].value - max);
    for (; by_p && taken < n && !(taken && mass >= s->top_p * sum); taken++) {
        if (taken == sorted)              /* sort four times as many         */
            sorted += sort_first(c + sorted, n - sorted, 3 * sorted + 64);
        mass += exp_f32(c[taken].value - max);
    }
    n = by_p ? taken : n;
    while (n > 1 && !is_likely(c[n - 1].value - max, s->min_p, least))
        n--;
    return n;
}

/* A number in [0, 1) by SplitMix64 (Steele, Lea, Flood 2014). */
static double random_next(uint64_t *seed)
{
    uint64_t z = *seed += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) / 9007199254740992.0;      /* 2^53 */
}

/* One of c[n], weighted by e^((logit - max) / temperature); u is random. */
static int32_t draw(struct candidate *c, int n, float max, float temperature,
                    double u)
{
    double sum = 0, passed = 0;

    for (int i = 0; i < n; i++) {
        const float x = (c[i].value - max) / temperature;
        c[i].value = x <= 0 ? exp_f32(x) : 0;       /* 0 if NaN (inf / inf)  */
        sum += c[i].value;
    }
    for (int i = 0; i < n - 1; i++) {
        passed += c[i].value;
        if (passed > u * sum)
            return c[i].id;
    }
    return c[n - 1].id;
}

int32_t lfm2_sample(lfm2_context *ctx, lfm2_sampler *s, float *logits,
                    const int32_t *history, int n_history)
{
    const int n_vocab = ctx->model->cfg.n_vocab;
    struct candidate *c = ctx->candidates;
    int32_t token = LFM2_ENAN;
    fenv_t callers;

    enter_arithmetic(&callers);
    if (highest(logits, n_vocab) >= 0) {
        penalise(s, c, logits, n_vocab, history, n_history);
        token = highest(logits, n_vocab);
        const float max = logits[token];
        const double u = random_next(&s->rng);
        if (s->temperature > 0) {
            const int n = choose_candidates(s, c, logits, n_vocab, max);
            token = draw(c, n, max, s->temperature, u);
        }
    }
    fesetenv(&callers);
    return token;
}

/* --------------------------------------------------------- 27. Unicode classes
 *
 * Letters (categories L*), numbers (N*) and white space, as run lengths: code
 * points that are not of the class, then code points that are, and so on. */

/* Made by scripts/make_unicode.py from Unicode 15.0. */
static const uint16_t letter_runs[] = {
    65,26,6,26,47,1,10,1,4,1,5,23,1,31,1,458,4,12,14,5,7,1,1,1,129,5,1,2,2,4,1,
    1,6,1,1,3,1,1,1,20,1,83,1,139,8,166,1,38,2,1,6,41,71,27,4,4,45,43,35,2,1,99,
    1,1,15,2,7,2,10,3,2,1,16,1,1,30,29,89,11,1,24,33,9,2,4,1,5,22,4,1,9,1,3,1,
    23,25,7,11,5,24,1,6,17,42,58,54,3,1,18,1,7,10,15,16,4,8,2,2,2,22,1,7,1,1,3,
    4,3,1,16,1,13,2,1,3,14,2,10,1,8,6,4,2,2,22,1,7,1,2,1,2,1,2,31,4,1,1,19,3,16,
    9,1,3,1,22,1,7,1,2,1,5,3,1,18,1,15,2,23,1,11,8,2,2,2,22,1,7,1,2,1,5,3,1,30,
    2,1,3,15,1,17,1,1,6,3,3,1,4,3,2,1,1,1,2,3,2,3,3,3,12,22,1,52,8,1,3,1,23,1,
    16,3,1,26,3,2,1,2,2,30,1,4,8,1,3,1,23,1,10,1,5,3,1,31,2,1,2,15,2,17,9,1,3,1,
    41,2,1,16,1,5,3,8,3,24,6,5,18,3,24,1,9,1,1,2,7,58,48,1,2,12,7,58,2,1,1,1,5,
    1,24,1,1,1,10,1,2,9,1,2,5,1,1,21,4,32,1,63,8,1,36,27,5,115,43,20,1,16,6,4,4,
    3,1,3,2,7,3,4,13,12,1,17,38,1,1,5,1,2,43,1,333,1,4,2,7,1,1,1,4,2,41,1,4,2,
    33,1,4,2,7,1,1,1,4,2,15,1,57,1,4,2,67,37,16,16,86,2,6,3,620,2,17,1,26,5,75,
    6,8,7,18,13,19,14,18,14,13,1,3,15,52,35,1,4,1,67,89,7,5,2,34,1,1,5,70,10,31,
    49,30,2,5,11,44,4,26,54,23,9,53,82,1,93,47,17,8,54,30,13,2,10,44,26,36,41,3,
    10,36,2,9,7,43,2,3,41,4,1,6,1,2,3,1,5,192,64,278,2,6,2,38,2,6,2,8,1,1,1,1,1,
    1,1,31,2,53,1,7,1,1,3,3,1,7,3,4,2,6,4,13,5,3,1,7,116,1,13,1,16,13,101,1,4,1,
    2,10,1,1,3,5,6,1,1,1,1,1,1,4,1,11,2,4,5,5,4,1,52,2,2683,229,6,4,3,2,12,38,1,
    1,5,1,2,56,7,1,16,23,9,7,1,7,1,7,1,7,1,7,1,7,1,7,1,7,80,1,469,2,42,5,5,2,4,
    86,6,3,1,90,1,4,5,43,1,94,17,32,48,16,512,6592,64,22157,67,46,2,269,3,16,10,
    2,20,47,16,31,2,70,49,9,2,103,2,64,5,2,1,1,1,5,24,16,1,3,1,4,1,23,29,52,14,
    50,62,6,3,1,1,2,11,28,10,23,25,29,7,47,28,1,16,5,1,10,10,5,1,41,23,3,1,8,20,
    23,3,1,3,50,1,1,3,2,2,5,2,1,1,1,24,3,2,11,7,3,12,6,2,6,2,6,9,7,1,7,1,43,1,
    14,6,115,29,11172,12,23,4,49,8452,366,2,106,38,7,12,5,5,1,1,10,1,13,1,5,1,1,
    1,2,1,2,1,108,33,363,18,64,2,54,40,12,116,5,1,135,36,26,6,26,11,89,3,6,2,6,
    2,6,2,3,35,12,1,26,1,19,1,2,1,15,2,14,34,123,389,29,3,49,47,32,13,20,1,8,6,
    38,10,30,2,36,4,8,48,158,18,36,4,36,4,40,8,52,12,11,1,15,1,7,1,2,1,11,1,15,
    1,7,1,2,67,311,9,22,10,8,24,6,1,42,1,9,69,6,2,1,1,44,1,2,3,1,2,23,10,23,9,
    31,65,19,1,2,10,22,10,26,70,56,6,2,64,1,15,4,1,3,1,29,42,29,3,29,35,8,1,28,
    27,54,10,22,10,19,13,18,110,73,55,51,13,51,13,36,348,42,6,2,78,29,10,1,8,22,
    42,18,46,21,27,23,12,53,57,2,2,1,13,45,32,25,26,36,29,1,2,1,8,35,3,1,12,48,
    14,4,21,1,1,1,35,18,1,25,19,2,63,7,1,1,1,4,1,15,1,10,7,47,38,8,2,2,2,22,1,7,
    1,2,1,5,3,1,18,1,12,5,158,53,18,4,20,3,30,48,20,2,1,1,184,47,41,4,36,48,20,
    1,59,43,13,1,71,27,37,7,185,44,116,64,31,8,2,1,2,8,1,2,1,24,15,1,1,1,94,8,2,
    39,16,1,1,1,28,1,10,40,7,1,21,1,11,46,19,1,18,73,263,9,1,37,17,1,49,30,112,
    7,1,2,1,38,21,1,25,6,1,2,1,32,14,1,327,19,15,1,1,13,1,34,124,1,79,922,230,
    196,2636,97,15,1072,17,6,4025,583,8633,569,7,31,17,79,17,30,18,48,16,4,31,
    21,5,19,688,64,128,75,5,1,66,13,64,2,1,1,28,6136,8,1238,42,9,8935,4,1,7,1,2,
    1,291,15,1,29,3,2,1,14,4,8,396,2308,107,5,13,3,9,7,10,5990,85,1,71,1,2,2,1,
    2,2,2,4,1,12,1,1,1,7,1,65,1,4,2,8,1,7,1,28,1,4,1,5,1,1,3,7,1,340,2,25,1,25,
    1,31,1,25,1,31,1,25,1,31,1,25,1,31,1,25,1,8,1844,31,6,6,261,62,146,45,10,7,
    16,1,321,30,18,44,484,28,756,7,1,4,1,2,1,15,1,197,59,68,7,1,1204,4,1,27,1,2,
    1,1,2,1,1,10,1,4,1,1,1,1,6,1,4,1,1,1,1,1,1,3,1,2,1,1,2,1,1,1,1,1,1,1,1,1,1,
    2,1,1,2,4,1,7,1,4,1,4,1,1,1,10,1,17,5,3,1,5,1,17,4420,42720,32,4154,6,222,2,
    5762,14,7473,3103,542,1506,4939,5,4192,
};

static const uint16_t number_runs[] = {
    48,10,120,2,5,1,2,3,1441,10,134,10,198,10,412,10,118,10,4,6,108,10,118,10,
    118,10,2,6,110,13,115,10,8,7,103,10,104,7,7,19,109,10,96,10,118,10,70,20,
    268,10,70,10,719,20,881,3,239,10,6,10,22,10,300,10,128,11,165,10,6,10,182,
    10,86,10,134,10,6,10,1046,1,3,6,6,10,198,51,2,5,726,60,78,22,630,30,1385,1,
    777,1,25,9,14,3,343,4,138,10,30,8,1,15,32,10,39,15,29536,10,188,10,320,6,
    154,10,38,10,198,10,22,10,86,10,406,10,21270,10,493,45,12,57,17,2,341,27,36,
    4,29,1,8,1,134,5,202,10,942,8,25,7,39,9,75,5,22,6,160,2,2,16,2,46,64,9,52,2,
    30,3,75,5,104,8,24,8,41,7,330,6,48,10,294,31,158,10,42,4,112,7,134,30,128,
    10,60,10,144,10,7,20,251,10,342,10,118,10,374,10,102,10,102,12,420,19,93,10,
    758,29,227,10,70,10,422,10,102,21,1067,111,17905,10,86,10,134,10,1,7,798,23,
    25641,20,12,20,108,25,1109,50,2368,10,422,10,502,10,973,9,128,10,791,59,1,3,
    1,4,76,45,1,15,962,13,2787,10,
};

static const uint16_t space_runs[] = {
    9,5,18,1,100,1,26,1,5599,1,2431,11,29,2,5,1,47,1,4000,1,
};
/* End of what scripts/make_unicode.py made. */

static uint8_t *make_classes(void)
{
    static const struct { const uint16_t *run; size_t n; uint8_t class; } all[]
        = { { letter_runs, COUNT(letter_runs), CLASS_LETTER },
            { number_runs, COUNT(number_runs), CLASS_NUMBER },
            { space_runs, COUNT(space_runs), CLASS_SPACE } };
    uint8_t *classes = calloc(MAX_CLASSED, 1);

    for (size_t k = 0; classes && k < COUNT(all); k++)
        for (size_t i = 0, c = 0; i + 1 < all[k].n; i += 2) {
            c += all[k].run[i];
            memset(classes + c, all[k].class, all[k].run[i + 1]);
            c += all[k].run[i + 1];
        }
    return classes;
}

#endif /* not KERNELS */
