/* What the suites share: random numbers, a GGUF writer, and whole small models
 * written in memory. */
#ifndef UTIL_H
#define UTIL_H

#include <stddef.h>
#include <stdint.h>

#ifndef COUNT                             /* lfm2.c has the same             */
#define COUNT(array) (sizeof (array) / sizeof *(array))
#endif

/* Under sanitizers, which are ten times slower, a test of n combinations tries
 * the first half: they find what is wrong with any of them. */
#ifdef SANITIZED
#define SOME_OF(n) (((n) + 1) / 2)
#else
#define SOME_OF(n) (n)
#endif

/* Assertions for loops: Check's own write to a pipe even when they hold. */
#define EXPECT(condition) EXPECT_MSG(condition, "%s", #condition)
#define EXPECT_MSG(condition, ...)      \
    do {                                \
        if (!(condition))               \
            ck_abort_msg(__VA_ARGS__);  \
    } while (0)

/* ----------------------------------------------------------- random numbers */

uint32_t random_u32(uint64_t *state);
float    random_float(uint64_t *state);            /* -1 .. 1                */

/* ------------------------------------------------------------- GGUF writing
 *
 * Metadata and tensors are appended to a writer; writer_finish() puts the file
 * together.  Edits make a good file wrong, or unusual, in one place: they are
 * applied to the entries of that name as they are written. */

enum { T_U8, T_I8, T_U16, T_I16, T_U32, T_I32, T_F32, T_BOOL, T_STRING,
       T_ARRAY, T_U64, T_I64, T_F64 };

enum edit_kind {
    NO_EDIT,
    DROP,             /* leave out the key or tensor `name`                  */
    TWICE,            /* write it twice                                      */
    SET,              /* the key is a scalar of type `a`, with bits `b`      */
    SET_STRING,       /* the key is the string `text`                        */
    SET_ARRAY,        /* the key is an array of `a` of `b` zero elements     */
    CLAIM,            /* the key says it is such an array; nothing follows   */
    ADD,              /* a new key of type `a`, with bits `b`                */
    ADD_TENSOR,       /* a new F32 tensor of 32 zeros                        */
    RENAME,           /* call the key or tensor `text`                       */
    DIM,              /* dimension `a` of the tensor is `b`                  */
    N_DIMS,           /* it has `b` dimensions                               */
    TYPE,             /* it has type `b`                                     */
    OFFSET,           /* its offset is `b`                                   */
    FILL,             /* its data are the f32 with bits `b`                  */
    PATCH             /* `a` bytes at `at` of the file become `b`            */
};

struct edit {
    enum edit_kind kind;
    const char *name;
    uint64_t a, b;
    const char *text;
    size_t at;
};

struct bytes { uint8_t *p; size_t n, cap; };

struct gguf_writer {
    struct bytes kv, info, data;
    int version;
    uint64_t n_kv, n_tensors;
    const struct edit *edits;             /* ends with NO_EDIT; or NULL      */
};

void bytes_put(struct bytes *b, const void *p, size_t n);
void bytes_int(struct bytes *b, uint64_t value, int bytes);   /* little-endian */
void bytes_string(struct bytes *b, const char *s);

void write_scalar(struct gguf_writer *w, const char *key, int type, uint64_t bits);
void write_f32(struct gguf_writer *w, const char *key, float value);
void write_string(struct gguf_writer *w, const char *key, const char *value);
void write_ints(struct gguf_writer *w, const char *key, int type, const int *v,
                int n);
void write_strings(struct gguf_writer *w, const char *key, const char *const *v,
                   int n);
void gguf_write_tensor(struct gguf_writer *w, const char *name, int type, int n_dims,
                  const uint64_t *dims, const struct bytes *data);

/* The file; to be released with free(). */
struct bytes writer_finish(struct gguf_writer *w);

/* -------------------------------------------------------------- tiny models */

/* GGUF's numbers of all weight types, and their names. */
enum { N_WEIGHT_TYPES = 15 };
extern const int weight_types[N_WEIGHT_TYPES];
const char *weight_type_name(int type);
int weight_type_block(int type);          /* columns                         */

/* A random row-major matrix of that type, its weights near 1/sqrt(cols). */
struct bytes random_weights(int type, int cols, uint64_t rows, uint64_t *rng);

/* How head_count_kv is; NONE: an array of zeros, no layer attends. */
enum { KV_I32_ARRAY, KV_U32_ARRAY, KV_SCALAR, KV_NONE };

/* Zero means the usual.  Layers: conv, attention, conv, attention; in a MoE the
 * first is dense and the others have experts. */
struct tiny {
    int moe;                              /* lfm2moe, else lfm2              */
    int type;                             /* of all matrices; 0 is F32       */
    int n_embd;                           /* 64, or 256 for wide types       */
    int version;                          /* of GGUF: 3                      */
    int kv_form;
    int output_norm;                      /* call the last norm so           */
    int untied;                           /* with an output.weight           */
    int fused_qkv;
    int words;                            /* with a byte-level vocabulary    */
    int l_cache;                          /* taps: 3                         */
    uint64_t seed;
    const struct edit *edits;
};

struct bytes tiny_model(const struct tiny *t);

/* --------------------------------------------------------------- other files */

/* All of a file, or p == NULL.  Released with free(). */
struct bytes load_file(const char *path);

/* "<LFM2_SHARED or ../shared>/<name>", or NULL after saying that a test is
 * skipped for want of it.  Valid until the next call. */
const char *shared_file(const char *name);

#endif
