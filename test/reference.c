/* reference.c - see reference.h. */
#include "reference.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------ little-endian */

static uint64_t le(const uint8_t *p, int bytes)
{
    uint64_t v = 0;

    while (bytes-- > 0)
        v = v << 8 | p[bytes];
    return v;
}

static double single(const uint8_t *p)
{
    uint32_t u = (uint32_t)le(p, 4);
    float f;

    memcpy(&f, &u, sizeof f);
    return f;
}

static double brain(const uint8_t *p)
{
    const uint8_t wide[4] = { 0, 0, p[0], p[1] };
    return single(wide);
}

static double half(const uint8_t *p)
{
    int u = (int)le(p, 2), e = u >> 10 & 31, m = u & 1023;
    double v = e == 0 ? ldexp(m, -24) : e < 31 ? ldexp(m + 1024, e - 25)
             : m ? NAN : INFINITY;

    return u & 0x8000 ? -v : v;
}

static int s8(uint8_t b)
{
    return b < 128 ? b : b - 256;
}

/* ------------------------------------------------------------ weight types
 *
 * Each function gives weight i of the block at b. */

static double f32_at(const uint8_t *b, int i)  { return single(b + 4 * i); }
static double f16_at(const uint8_t *b, int i)  { return half(b + 2 * i); }
static double bf16_at(const uint8_t *b, int i) { return brain(b + 2 * i); }

/* Half a byte out of 16: the low halves come first. */
static int nibble(const uint8_t *b, int i)
{
    return b[i % 16] >> i / 16 * 4 & 15;
}

static int fifth_bit(const uint8_t *b, int i)
{
    return (b[i / 8] >> i % 8 & 1) << 4;
}

static double q4_0_at(const uint8_t *b, int i)
{
    return half(b) * (nibble(b + 2, i) - 8);
}

static double q4_1_at(const uint8_t *b, int i)
{
    return half(b) * nibble(b + 4, i) + half(b + 2);
}

static double q5_0_at(const uint8_t *b, int i)
{
    return half(b) * ((nibble(b + 6, i) | fifth_bit(b + 2, i)) - 16);
}

static double q5_1_at(const uint8_t *b, int i)
{
    return half(b) * (nibble(b + 8, i) | fifth_bit(b + 4, i)) + half(b + 2);
}

static double q8_0_at(const uint8_t *b, int i)
{
    return half(b) * s8(b[2 + i]);
}

/* Two bits out of 64 bytes: 32 bytes hold 128 weights in four layers. */
static int crumb(const uint8_t *b, int i)
{
    return b[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
}

/* Four bits out of 128 bytes: 32 bytes hold 64 weights in two layers. */
static int layered_nibble(const uint8_t *b, int i)
{
    return b[i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15;
}

static double q2_k_at(const uint8_t *b, int i)
{
    int s = b[i / 16];

    return half(b + 80) * (s & 15) * crumb(b + 16, i) - half(b + 82) * (s >> 4);
}

static double q3_k_at(const uint8_t *b, int i)
{
    const uint8_t *s = b + 96;
    int j = i / 16;
    int low = (j < 8 ? s[j] : s[j - 8] >> 4) & 15;
    int high = s[8 + j % 4] >> j / 4 * 2 & 3;
    int q = crumb(b + 32, i) + (b[i % 32] >> i / 32 & 1) * 4 - 4;

    return half(b + 108) * (low + 16 * high - 32) * q;
}

/* d * scale * q - dmin * min, with scale and min of 6 bits packed in 12 bytes
 * behind d and dmin. */
static double scaled(const uint8_t *b, int j, int q)
{
    const uint8_t *s = b + 4;
    int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) + (s[j - 4] >> 6) * 16;
    int min = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) + (s[j] >> 6) * 16;

    return half(b) * scale * q - half(b + 2) * min;
}

static double q4_k_at(const uint8_t *b, int i)
{
    return scaled(b, i / 32, layered_nibble(b + 16, i));
}

static double q5_k_at(const uint8_t *b, int i)
{
    return scaled(b, i / 32, layered_nibble(b + 48, i) +
                             (b[16 + i % 32] >> i / 32 & 1) * 16);
}

static double q6_k_at(const uint8_t *b, int i)
{
    int low = b[i / 128 * 64 + i % 64] >> i % 128 / 64 * 4 & 15;

    return half(b + 208) * s8(b[192 + i / 16]) *
           (low + 16 * crumb(b + 128, i) - 32);
}

static const int iq4[16] = {
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113
};

static double iq4_nl_at(const uint8_t *b, int i)
{
    return half(b) * iq4[nibble(b + 2, i)];
}

static double iq4_xs_at(const uint8_t *b, int i)
{
    int j = i / 32;
    int low = b[4 + j / 2] >> j % 2 * 4 & 15;
    int high = (int)le(b + 2, 2) >> 2 * j & 3;

    return half(b) * (low + 16 * high - 32) *
           iq4[nibble(b + 8 + 16 * j, i % 32)];
}

static const struct {
    uint32_t type;
    int columns, bytes;
    double (*at)(const uint8_t *b, int i);
} types[] = {
    {  0,   1,   4, f32_at },    {  1,   1,   2, f16_at },
    { 30,   1,   2, bf16_at },   {  2,  32,  18, q4_0_at },
    {  3,  32,  20, q4_1_at },   {  6,  32,  22, q5_0_at },
    {  7,  32,  24, q5_1_at },   {  8,  32,  34, q8_0_at },
    { 10, 256,  84, q2_k_at },   { 11, 256, 110, q3_k_at },
    { 12, 256, 144, q4_k_at },   { 13, 256, 176, q5_k_at },
    { 14, 256, 210, q6_k_at },   { 20,  32,  18, iq4_nl_at },
    { 23, 256, 136, iq4_xs_at },
};

static size_t type_index(uint32_t type)
{
    size_t i = 0;

    while (types[i].type != type)
        i++;
    return i;
}

int ref_block_columns(uint32_t type) { return types[type_index(type)].columns; }
int ref_block_bytes(uint32_t type)   { return types[type_index(type)].bytes; }

void ref_weights(uint32_t type, const uint8_t *p, size_t n, double *out)
{
    size_t k = type_index(type), columns = (size_t)types[k].columns;

    for (size_t i = 0; i < n; i++)
        out[i] = types[k].at(p + i / columns * (size_t)types[k].bytes,
                             (int)(i % columns));
}

/* ----------------------------------------------------------------- the file */

struct model {
    const uint8_t *kv, *tensors, *data;
    uint64_t n_kv, n_tensors;
    int n_layer, n_embd, n_head, head_dim, l_cache;
    int n_expert, n_used, n_dense;
    double eps, theta, scale;
    ref_show_fn *show;                    /* or NULL                         */
    void *user;
};

struct matrix { uint32_t type; int cols, rows; const uint8_t *data; };

/* The bytes of a value of a type, scalar or array element. */
static size_t value_size(uint32_t type, const uint8_t *p)
{
    static const uint8_t size[13] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    size_t n = 12;

    if (type == 8)
        return 8 + (size_t)le(p, 8);
    if (type != 9)
        return size[type];
    for (uint64_t i = 0; i < le(p + 4, 8); i++)
        n += value_size((uint32_t)le(p, 4), p + n);
    return n;
}

static int text_ends(const uint8_t *p, const char *end)
{
    size_t n = (size_t)le(p, 8), k = strlen(end);
    return n >= k && memcmp(p + 8 + n - k, end, k) == 0;
}

/* The type and value of the key "<architecture>.<name>", or NULL. */
static const uint8_t *find_key(const struct model *m, const char *name)
{
    const uint8_t *p = m->kv;

    for (uint64_t i = 0; i < m->n_kv; i++) {
        const uint8_t *value = p + 8 + le(p, 8);
        if (memcmp(p + 8, "lfm2", 4) == 0 && text_ends(p, name))
            return value;
        p = value + 4 + value_size((uint32_t)le(value, 4), value + 4);
    }
    return NULL;
}

/* A number, or element i of an array of numbers of 32 bits. */
static double number(const struct model *m, const char *name, uint64_t i,
                     double otherwise)
{
    const uint8_t *p = find_key(m, name);
    uint32_t type = p ? (uint32_t)le(p, 4) : 0;

    if (!p)
        return otherwise;
    p += 4;
    if (type == 9)
        p += 12 + 4 * (i < le(p + 4, 8) ? i : 0);
    return type == 6 ? single(p) : (double)le(p, type == 10 ? 8 : 4);
}

/* A tensor by name; cols 0 if there is none. */
static struct matrix find(const struct model *m, const char *name)
{
    const uint8_t *p = m->tensors;

    for (uint64_t i = 0; i < m->n_tensors; i++) {
        size_t n = (size_t)le(p, 8);
        const uint8_t *dims = p + 12 + n;
        int n_dims = (int)le(dims - 4, 4), rows = 1;
        const uint8_t *end = dims + 8 * n_dims;

        if (n == strlen(name) && memcmp(p + 8, name, n) == 0) {
            for (int d = 1; d < n_dims; d++)
                rows *= (int)le(dims + 8 * d, 8);
            return (struct matrix){ (uint32_t)le(end, 4), (int)le(dims, 8),
                                    rows, m->data + le(end + 4, 8) };
        }
        p = end + 12;
    }
    return (struct matrix){ 0, 0, 0, NULL };
}

static struct matrix find_in(const struct model *m, int il, const char *name)
{
    char full[80] = "blk.", digits[4] = { 0 };

    digits[il < 10 ? 0 : 1] = (char)('0' + il % 10);
    if (il >= 10)
        digits[0] = (char)('0' + il / 10);
    strcat(strcat(strcat(full, digits), "."), name);
    return find(m, full);
}

static struct model read_model(const uint8_t *file)
{
    struct model m = { .kv = file + 24, .n_tensors = le(file + 8, 8),
                       .n_kv = le(file + 16, 8) };
    const uint8_t *p = m.kv;
    size_t align = 32, at;

    for (uint64_t i = 0; i < m.n_kv; i++) {
        const uint8_t *value = p + 8 + le(p, 8);
        if (text_ends(p, "general.alignment"))
            align = (size_t)le(value + 4, 4);
        p = value + 4 + value_size((uint32_t)le(value, 4), value + 4);
    }
    m.tensors = p;
    for (uint64_t i = 0; i < m.n_tensors; i++) {
        p += 8 + le(p, 8);
        p += 16 + 8 * le(p, 4);
    }
    at = (size_t)(p - file);
    m.data = file + (at + align - 1) / align * align;
    m.n_layer = (int)number(&m, ".block_count", 0, 0);
    m.n_embd = (int)number(&m, ".embedding_length", 0, 0);
    m.n_head = (int)number(&m, ".head_count", 0, 0);
    m.head_dim = (int)number(&m, ".key_length", 0, m.n_embd / m.n_head);
    m.l_cache = (int)number(&m, ".l_cache", 0, 0);
    m.n_expert = (int)number(&m, ".expert_count", 0, 0);
    m.n_used = (int)number(&m, ".expert_used_count", 0, 0);
    m.n_dense = (int)number(&m, ".leading_dense_block_count", 0, 0);
    m.eps = number(&m, ".layer_norm_rms_epsilon", 0, 0);
    m.theta = number(&m, ".freq_base", 0, 10000);
    m.scale = number(&m, ".expert_weights_scale", 0, 1);
    return m;
}

int ref_n_vocab(const uint8_t *file)
{
    struct model m = read_model(file);
    return find(&m, "token_embd.weight").rows;
}

/* --------------------------------------------------------------- the blocks */

static double *new_doubles(size_t n)
{
    double *p = calloc(n ? n : 1, sizeof *p);

    if (!p)
        abort();
    return p;
}

/* Tell of x, [n_tokens][n]. */
static void show(const struct model *m, int il, const char *module,
                 const double *x, int n_tokens, int n)
{
    char name[80];

    snprintf(name, sizeof name, "model.layers.%d%s%s", il, *module ? "." : "",
             module);
    for (int t = 0; m->show && t < n_tokens; t++)
        m->show(m->user, il < 0 ? module : name, t, x + (size_t)t * n, n);
}

/* The weights of rows first .. first+n-1, [n][cols]. */
static double *weights(struct matrix w, int first, int n)
{
    double *out = new_doubles((size_t)n * w.cols);
    size_t row = (size_t)(w.cols / ref_block_columns(w.type)) *
                 (size_t)ref_block_bytes(w.type);

    ref_weights(w.type, w.data + (size_t)first * row, (size_t)n * w.cols, out);
    return out;
}

/* y[t] = W x[t], for the n rows of W from `first` on. */
static double *project(struct matrix w, int first, int n, const double *x,
                       int n_tokens)
{
    double *v = weights(w, first, n), *y = new_doubles((size_t)n_tokens * n);

    for (int t = 0; t < n_tokens; t++)
        for (int r = 0; r < n; r++)
            for (int c = 0; c < w.cols; c++)
                y[t * n + r] += v[r * w.cols + c] * x[t * w.cols + c];
    free(v);
    return y;
}

static void norm(double *y, const double *x, struct matrix w, int rows,
                 double eps)
{
    double *weight = weights(w, 0, 1);

    for (int r = 0; r < rows; r++, x += w.cols, y += w.cols) {
        double sum = 0;
        for (int i = 0; i < w.cols; i++)
            sum += x[i] * x[i];
        for (int i = 0; i < w.cols; i++)
            y[i] = x[i] / sqrt(sum / w.cols + eps) * weight[i];
    }
    free(weight);
}

static double *short_conv(const struct model *m, int il, const double *x, int n)
{
    const int d = m->n_embd, taps = m->l_cache;
    double *bcx = project(find_in(m, il, "shortconv.in_proj.weight"), 0, 3 * d,
                          x, n);
    double *w = weights(find_in(m, il, "shortconv.conv.weight"), 0, d);
    double *mixed = new_doubles((size_t)n * d), *y;

    show(m, il, "conv.in_proj", bcx, n, 3 * d);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < d; i++)
            for (int k = 0; k < taps; k++) {
                int from = t - (taps - 1) + k;
                if (from < 0)
                    continue;
                const double *u = bcx + (size_t)from * 3 * d;
                mixed[t * d + i] += w[i * taps + k] * u[i] * u[2 * d + i];
            }
    show(m, il, "conv.conv", mixed, n, d);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < d; i++)
            mixed[t * d + i] *= bcx[(size_t)t * 3 * d + d + i];
    y = project(find_in(m, il, "shortconv.out_proj.weight"), 0, d, mixed, n);
    show(m, il, "conv.out_proj", y, n, d);
    free(bcx);
    free(w);
    free(mixed);
    return y;
}

/* Dimensions i and i + half of every head turn by pos * theta^(-2i/dim). */
static void rotate(const struct model *m, double *x, int n_head, int n)
{
    const int h = m->head_dim / 2;

    for (int t = 0; t < n; t++)
        for (int j = 0; j < n_head; j++, x += 2 * h)
            for (int i = 0; i < h; i++) {
                double a = t * pow(m->theta, -2.0 * i / (2 * h));
                double p = x[i], q = x[i + h];
                x[i] = p * cos(a) - q * sin(a);
                x[i + h] = q * cos(a) + p * sin(a);
            }
}

/* What query q sees at keys and values 0 .. n-1, which are `stride` apart. */
static void look_back(double *out, const double *q, const double *k,
                      const double *v, int n, int stride, int dim)
{
    double *p = new_doubles((size_t)n), max = -INFINITY, sum = 0;

    for (int t = 0; t < n; t++) {
        for (int i = 0; i < dim; i++)
            p[t] += q[i] * k[t * stride + i];
        p[t] /= sqrt(dim);
        max = fmax(max, p[t]);
    }
    for (int t = 0; t < n; t++)
        sum += p[t] = exp(p[t] - max);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < dim; i++)
            out[i] += p[t] / sum * v[t * stride + i];
    free(p);
}

static double *attention(const struct model *m, int il, int n_kv,
                         const double *x, int n)
{
    const int dim = m->head_dim, nq = m->n_head * dim, nk = n_kv * dim;
    struct matrix fused = find_in(m, il, "attn_qkv.weight");
    struct matrix wq = fused.cols ? fused : find_in(m, il, "attn_q.weight");
    struct matrix wk = fused.cols ? fused : find_in(m, il, "attn_k.weight");
    struct matrix wv = fused.cols ? fused : find_in(m, il, "attn_v.weight");
    double *q = project(wq, 0, nq, x, n);
    double *k = project(wk, fused.cols ? nq : 0, nk, x, n);
    double *v = project(wv, fused.cols ? nq + nk : 0, nk, x, n);
    double *o = new_doubles((size_t)n * nq), *y;

    show(m, il, "self_attn.q_proj", q, n, nq);
    show(m, il, "self_attn.k_proj", k, n, nk);
    show(m, il, "self_attn.v_proj", v, n, nk);
    norm(q, q, find_in(m, il, "attn_q_norm.weight"), n * m->n_head, m->eps);
    norm(k, k, find_in(m, il, "attn_k_norm.weight"), n * n_kv, m->eps);
    show(m, il, "self_attn.q_layernorm", q, n, nq);
    show(m, il, "self_attn.k_layernorm", k, n, nk);
    rotate(m, q, m->n_head, n);
    rotate(m, k, n_kv, n);
    for (int t = 0; t < n; t++)
        for (int j = 0; j < m->n_head; j++) {
            int shared = j / (m->n_head / n_kv) * dim;
            look_back(o + t * nq + j * dim, q + t * nq + j * dim, k + shared,
                      v + shared, t + 1, nk, dim);
        }
    y = project(find_in(m, il, "attn_output.weight"), 0, m->n_embd, o, n);
    show(m, il, "self_attn.out_proj", y, n, m->n_embd);
    free(q);
    free(k);
    free(v);
    free(o);
    return y;
}

/* The three matrices of a network, or of all experts. */
struct three { struct matrix gate, up, down; };

static void show_matrix(const struct model *m, int il, int e, const char *w,
                        const double *x, int n_tokens, int n)
{
    char module[48];

    if (e < 0)
        snprintf(module, sizeof module, "feed_forward.%s", w);
    else
        snprintf(module, sizeof module, "feed_forward.experts.%d.%s", e, w);
    show(m, il, module, x, n_tokens, n);
}

/* down (silu(gate x) * up x), expert e if there are several; -1: the only. */
static double *network(const struct model *m, int il, const struct three *w,
                       int e, int ff, const double *x, int n)
{
    const int d = m->n_embd, at = e < 0 ? 0 : e;
    double *g = project(w->gate, at * ff, ff, x, n);
    double *u = project(w->up, at * ff, ff, x, n), *y;

    show_matrix(m, il, e, "w1", g, n, ff);
    show_matrix(m, il, e, "w3", u, n, ff);
    for (int i = 0; i < n * ff; i++)
        g[i] = g[i] / (1 + exp(-g[i])) * u[i];
    y = project(w->down, at * d, d, g, n);
    show_matrix(m, il, e, "w2", y, n, d);
    free(g);
    free(u);
    return y;
}

/* The weights of the experts for one token; 0 for those not chosen. */
static void choose(const struct model *m, const double *s, const double *bias,
                   double *weight)
{
    double sum = 1e-6;

    for (int i = 0; i < m->n_used; i++) {
        int best = -1;
        for (int e = 0; e < m->n_expert; e++)
            if (weight[e] == 0 &&
                (best < 0 || s[e] + bias[e] > s[best] + bias[best]))
                best = e;
        weight[best] = s[best];
        sum += s[best];
    }
    for (int e = 0; e < m->n_expert; e++)
        weight[e] *= m->scale / sum;
}

static double *experts(const struct model *m, int il, const double *x, int n)
{
    const int d = m->n_embd, n_expert = m->n_expert;
    const struct three w = { find_in(m, il, "ffn_gate_exps.weight"),
                             find_in(m, il, "ffn_up_exps.weight"),
                             find_in(m, il, "ffn_down_exps.weight") };
    double *s = project(find_in(m, il, "ffn_gate_inp.weight"), 0, n_expert, x,
                        n);
    double *bias = weights(find_in(m, il, "exp_probs_b.bias"), 0, 1);
    double *weight = new_doubles((size_t)n * n_expert);
    double *y = new_doubles((size_t)n * d);

    show(m, il, "feed_forward.gate", s, n, n_expert);
    for (int i = 0; i < n * n_expert; i++)
        s[i] = 1 / (1 + exp(-s[i]));
    for (int t = 0; t < n; t++)
        choose(m, s + t * n_expert, bias, weight + t * n_expert);
    for (int e = 0; e < n_expert; e++) {
        double *out = network(m, il, &w, e, w.gate.rows / n_expert, x, n);
        for (int t = 0; t < n; t++)
            for (int i = 0; i < d; i++)
                y[t * d + i] += weight[t * n_expert + e] * out[t * d + i];
        free(out);
    }
    show(m, il, "feed_forward.all_weights", weight, n, n_expert);
    show(m, il, "feed_forward", y, n, d);
    free(s);
    free(bias);
    free(weight);
    return y;
}

static double *feed_forward(const struct model *m, int il, const double *x,
                            int n)
{
    const struct three w = { find_in(m, il, "ffn_gate.weight"),
                             find_in(m, il, "ffn_up.weight"),
                             find_in(m, il, "ffn_down.weight") };

    return w.gate.cols ? network(m, il, &w, -1, w.gate.rows, x, n)
                       : experts(m, il, x, n);
}

static void add_to(double *x, double *y, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] += y[i];
    free(y);
}

void ref_logits(const uint8_t *file, const int32_t *tokens, int n, double *out)
{
    ref_trace(file, tokens, n, out, NULL, NULL);
}

void ref_trace(const uint8_t *file, const int32_t *tokens, int n, double *out,
               ref_show_fn *fn, void *user)
{
    struct model m = read_model(file);
    const size_t size = (size_t)n * m.n_embd;
    struct matrix embd = find(&m, "token_embd.weight");
    struct matrix output = find(&m, "output.weight");
    struct matrix last = find(&m, "token_embd_norm.weight");
    double *x = new_doubles(size), *h = new_doubles(size), *logits;

    for (int t = 0; t < n; t++) {
        double *row = weights(embd, tokens[t], 1);
        memcpy(x + (size_t)t * m.n_embd, row, (size_t)m.n_embd * sizeof *x);
        free(row);
    }
    m.show = fn;
    m.user = user;
    show(&m, -1, "model.embed_tokens", x, n, m.n_embd);
    for (int il = 0; il < m.n_layer; il++) {
        int n_kv = (int)number(&m, ".head_count_kv", (uint64_t)il, m.n_head);

        norm(h, x, find_in(&m, il, "attn_norm.weight"), n, m.eps);
        show(&m, il, "operator_norm", h, n, m.n_embd);
        add_to(x, n_kv ? attention(&m, il, n_kv, h, n)
                       : short_conv(&m, il, h, n), size);
        norm(h, x, find_in(&m, il, "ffn_norm.weight"), n, m.eps);
        show(&m, il, "ffn_norm", h, n, m.n_embd);
        add_to(x, feed_forward(&m, il, h, n), size);
        show(&m, il, "", x, n, m.n_embd);
    }
    norm(h, x, last.cols ? last : find(&m, "output_norm.weight"), n, m.eps);
    show(&m, -1, "model.embedding_norm", h, n, m.n_embd);
    logits = project(output.cols ? output : embd, 0, embd.rows, h, n);
    show(&m, -1, "lm_head", logits, n, embd.rows);
    memcpy(out, logits, (size_t)n * embd.rows * sizeof *out);
    free(logits);
    free(x);
    free(h);
}
