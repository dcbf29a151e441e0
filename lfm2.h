/* lfm2.h - inference for Liquid AI's LFM2 and LFM2.5 language models.
 *
 * Three objects and one operation:
 *
 *   lfm2_model      the weights: a GGUF file, mapped read-only.  Never changes
 *                   after it is opened, so contexts and threads may share it.
 *   lfm2_context    everything that changes: the sequences (KV cache and conv
 *                   state) and the scratch memory.
 *   lfm2_tokenizer  text to token ids and back.  Never changes either.
 *
 *   lfm2_forward()  appends tokens to sequences.  Reading a prompt, generating
 *                   one token, and serving many users are this same call with
 *                   one long span, one span of one token, or many spans.
 *
 * Errors     A function that can fail returns LFM2_OK (0), or a negative LFM2_E
 *            code and, if `err` is not NULL, a sentence in it that names the
 *            thing, what was found and what was expected.  Nothing here prints,
 *            exits, or touches a global.  A failed call changes nothing but
 *            buffers it was given to fill.
 * Memory     What an _open function returns is released by the matching _close,
 *            which accepts NULL.  Pointers handed out are borrowed: each says
 *            until when.  lfm2_forward() and lfm2_sample() never allocate.
 * Threads    One context, one caller at a time; models and tokenizers may be
 *            shared.  The logits of a token are the same bits whatever the
 *            thread count, the batch size, the neighbours in the batch, the way
 *            its prompt was cut, the compiler and the CPU.
 */
#ifndef LFM2_H
#define LFM2_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LFM2_VERSION "0.1.0"

const char *lfm2_version(void);

/* The i-th weight type that can be read, "Q4_K" and so on, from 0; NULL past
 * the last. */
const char *lfm2_weight_type(int i);

/* ------------------------------------------------------------------ errors */

enum {
    LFM2_OK           =  0,
    LFM2_EARG         = -1,   /* the caller's mistake                        */
    LFM2_EIO          = -2,   /* open, read, stat or mmap failed             */
    LFM2_EFORMAT      = -3,   /* truncated or contradictory file             */
    LFM2_EUNSUPPORTED = -4,   /* a good file, for another engine             */
    LFM2_ENOMEM       = -5,
    LFM2_EFULL        = -6,   /* the sequence would exceed n_ctx             */
    LFM2_ECANCELLED   = -7,   /* lfm2_cancel() was called                    */
    LFM2_ENAN         = -8    /* logits that are not finite                  */
};

typedef struct {
    int  code;                /* LFM2_OK or LFM2_E...                        */
    char msg[252];            /* one sentence, NUL-terminated                */
} lfm2_error;

/* ------------------------------------------------------------------- model */

#define LFM2_MAX_LAYER 128

typedef struct {
    int   n_layer;                        /* blocks                          */
    int   n_embd;                         /* width of the residual stream    */
    int   n_head, n_head_kv, head_dim;    /* GQA: n_head / n_head_kv share   */
    int   n_ff;                           /* hidden width of a dense FFN     */
    int   n_vocab, n_ctx_train;
    int   l_cache;                        /* taps of a short conv, 3 in LFM2 */
    int   n_expert, n_expert_used;        /* 0 when the model has no MoE     */
    int   n_ff_expert, n_layer_dense;     /* first n_layer_dense are not MoE */
    float rope_freq_base, norm_rms_eps;
    float expert_weights_scale;           /* 1 unless the file says other    */
    uint8_t is_attn[LFM2_MAX_LAYER];      /* 1: attention, 0: short conv     */
} lfm2_config;

typedef struct lfm2_model lfm2_model;

/* How the file reaches memory.  MAP: shared read-only mapping, the page cache
 * is the only copy.  READ: read into memory of its own (no mmap needed).
 *
 * Or one of them | ANY, for those who explain files: what is no usable model is
 * opened, too, as far as it can be read.  The error is returned even so; what
 * *out is then, if not NULL, is good for lfm2_model_warning(), _file(),
 * _tensor() (without data), _string(), _key() and _close() only.
 *
 * If a mapped file becomes shorter, or its disk fails, the thread that reads
 * there gets SIGBUS, in a call of this library or in a worker thread.  Nothing
 * here handles signals: where that can happen, the program does, or it takes
 * READ. */
enum { LFM2_LOAD_MAP = 0, LFM2_LOAD_READ = 1, LFM2_LOAD_ANY = 2 };

int  lfm2_model_open(lfm2_model **out, const char *path, int load,
                     lfm2_error *err);

/* The same, for a file already in memory: flash, an initrd, a unikernel.
 * `data` is borrowed until lfm2_model_close(); it needs no alignment. */
int  lfm2_model_open_memory(lfm2_model **out, const void *data, size_t size,
                            lfm2_error *err);
void lfm2_model_close(lfm2_model *m);

/* Borrowed until lfm2_model_close(). */
const lfm2_config *lfm2_model_config(const lfm2_model *m);

/* What the file said that was not quite right but could be tolerated, one
 * sentence each, numbered from 0; NULL past the last. */
const char *lfm2_model_warning(const lfm2_model *m, int i);

/* The whole file as it lies in memory: size bytes, borrowed until
 * lfm2_model_close().  A vocabulary can be opened from them. */
const void *lfm2_model_file(const lfm2_model *m, size_t *size);

/* A mapped file reaches memory page by page, as they are touched; a mixture of
 * experts touches them in an order that disks are slow at.  This reads the n
 * bytes from `from` on, and asks the system to begin with the n after those: in
 * a thread of its own, piece after piece of some MiB, it brings the whole file
 * while the first tokens are computed.  Returns how many bytes there were to
 * read; 0 at the end of the file, if it is not mapped or cannot be read. */
uint64_t lfm2_model_read_ahead(const lfm2_model *m, uint64_t from, uint64_t n);

typedef struct {
    const char    *name;                  /* borrowed until model close      */
    const char    *type;                  /* "Q4_K", "F32", ...              */
    int            n_dims;
    uint64_t       dims[4];               /* GGUF order, fastest first       */
    uint64_t       n_bytes, offset;       /* where it begins in the file     */
    const uint8_t *data;                  /* as it lies there                */
} lfm2_tensor_info;

/* The i-th tensor of the file, from 0.  LFM2_EARG past the last. */
int  lfm2_model_tensor(const lfm2_model *m, int i, lfm2_tensor_info *out);

/* One row of it as floats: out[dims[0]].  Rows are counted through all other
 * dimensions.  LFM2_EARG if there is no such tensor or row. */
int  lfm2_model_row(const lfm2_model *m, int i, uint64_t row, float *out);

/* Metadata.  A string value: its bytes (not NUL-terminated) and length; NULL
 * if the key is absent or no string.  Borrowed until lfm2_model_close(). */
const char *lfm2_model_string(const lfm2_model *m, const char *key,
                              size_t *len);

/* The i-th key, from 0, NUL-terminated, and its value written as text (arrays
 * by type and length, long strings cut) into buf[cap].  NULL past the last. */
const char *lfm2_model_key(const lfm2_model *m, int i, char *buf, size_t cap);

/* Parameters in the whole file, and those that take part in one token: all but
 * the experts that were not chosen.  A tied embedding counts once. */
void lfm2_model_params(const lfm2_model *m, uint64_t *total, uint64_t *active);

/* Tells one model from another: a hash (FNV-1a) of all metadata and shapes, and
 * of the first 64 bytes of every tensor. */
uint64_t lfm2_model_hash(const lfm2_model *m);

/* ----------------------------------------------------------------- context */

/* Instruction sets.  AVX2 includes FMA and F16C; AVX512 is F, BW, VL and DQ;
 * the VNNI ones have vpdpbusd besides.  NEON is what every 64-bit ARM has,
 * DOTPROD has sdot besides; SIMD128 is WebAssembly's, and RELAXED what some of
 * its machines add.  None of them changes a bit of a result. */
enum { LFM2_ISA_AUTO, LFM2_ISA_SCALAR, LFM2_ISA_AVX2, LFM2_ISA_AVXVNNI,
       LFM2_ISA_AVX512, LFM2_ISA_AVX512VNNI, LFM2_ISA_NEON, LFM2_ISA_DOTPROD,
       LFM2_ISA_SIMD128, LFM2_ISA_RELAXED, LFM2_N_ISA };
enum { LFM2_KV_F16, LFM2_KV_F32 };

/* 1 if this build on this CPU has the kernels of LFM2_ISA_x, else 0. */
int lfm2_isa_available(int isa);

/* CPUs that this process may run on, at least 1; without threads always 1. */
int lfm2_n_cpus(void);

typedef struct {
    int n_ctx;        /* longest sequence, in tokens; 0: as long as the model
                         was trained for, 2^24 at most                       */
    int n_seq;        /* how many sequences                                  */
    int n_batch;      /* tokens worked on at once; changes memory, no bit    */
    int n_logits;     /* most rows of logits one lfm2_forward() may ask for  */
    int n_threads;    /* 0: one per usable CPU, 64 at most; 1: none created  */
    int kv_type;      /* LFM2_KV_*                                           */
    int isa;          /* LFM2_ISA_*; one that is not to be had is LFM2_EARG  */
} lfm2_params;

typedef struct lfm2_context lfm2_context;

/* n_ctx 4096, or less if the model was trained for less, one sequence, batch
 * 512 (2048 with experts, so that each has some rows to work on), one row of
 * logits, all usable CPUs, KV in f16, the best ISA. */
lfm2_params lfm2_default_params(const lfm2_model *m);

/* The bytes lfm2_context_open() will reserve, stacks of threads apart; 0 for
 * unusable parameters.  Pages of a KV cache are not touched before the sequence
 * grows into them, and go back to the system when it is emptied. */
uint64_t lfm2_context_size(const lfm2_model *m, const lfm2_params *p);

/* `m` must outlive the context. */
int  lfm2_context_open(lfm2_context **out, const lfm2_model *m,
                       const lfm2_params *p, lfm2_error *err);
void lfm2_context_close(lfm2_context *ctx);

/* The parameters in force: AUTO and 0 replaced by what was chosen. */
lfm2_params lfm2_context_params(const lfm2_context *ctx);

/* ----------------------------------------------------------------- forward */

typedef struct {
    int            seq;        /* append to this sequence, 0 .. n_seq-1      */
    const int32_t *tokens;     /* [n_tokens], each 0 .. n_vocab-1            */
    int            n_tokens;   /* 1 or more; may exceed n_batch              */
    int            n_logits;   /* wanted for the last n_logits of them       */
    const float   *embd;       /* [n_tokens][n_embd]: rows that stand in for
                                  embeddings; then tokens is NULL            */
    int            state;      /* 1: lfm2_state() is wanted, and no logits   */
} lfm2_span;

/* Append every span to its sequence.  A sequence appears at most once.  Errors:
 * LFM2_EARG (an id, a count, a sequence, a context with threads in the child of
 * a fork()), LFM2_EFULL, LFM2_ECANCELLED; after any of them all sequences hold
 * what they held.  (After a cancelled call fewer of the last tokens can go back
 * exactly, and the logits of the call before are gone.) */
int lfm2_forward(lfm2_context *ctx, const lfm2_span *spans, int n_spans,
                 lfm2_error *err);

/* Logits of the last successful forward: span `span`, its `row`-th wanted token
 * (0 is the earliest).  [n_vocab] floats, valid until the next lfm2_forward();
 * the caller may edit them before sampling (masks, biases, grammars).  NULL if
 * there is no such row. */
float *lfm2_logits(lfm2_context *ctx, int span, int row);

/* The last row of such a span after the last norm: what would be multiplied
 * with the output matrix, and what sentences are compared by.  [n_embd] floats,
 * valid until the next lfm2_forward(); NULL for other spans. */
const float *lfm2_state(const lfm2_context *ctx, int span);

/* Make a running lfm2_forward(), or else the next one, return LFM2_ECANCELLED.
 * Safe from any thread and from a signal handler. */
void lfm2_cancel(lfm2_context *ctx);

/* Looking inside.  While a hook is set, lfm2_forward() calls it with every
 * activation, from the thread of its caller, module by module in the order of
 * computation and within one in the order of the tokens.  A name is that of the
 * module in the official implementation (transformers): "model.embed_tokens",
 * "model.layers.3.conv.in_proj", "model.layers.5.feed_forward.gate", "lm_head";
 * lfm2.c has the same names where it computes them.  No bit of a result
 * changes.  (Of a row whose state is wanted the last norm is not shown: it is
 * lfm2_state().)  The hook must not use the context but for lfm2_cancel(). */
typedef struct {
    const char  *name;         /* valid, as x, until the hook returns        */
    int          layer;        /* -1: of none                                */
    int          expert;       /* of "model.layers.L.feed_forward.experts.E.*";
                                  -1 for all others                          */
    int          seq, pos;     /* the token: where it stands, and what it is */
    int32_t      token;
    int          n;
    const float *x;            /* [n]                                        */
} lfm2_activation;

typedef void lfm2_trace_fn(void *user, const lfm2_activation *a);

/* Set the hook; NULL takes it away.  A trace needs some memory beside that of
 * the context, in proportion to n_batch; LFM2_ENOMEM if there is none, and then
 * there is no hook. */
int lfm2_trace(lfm2_context *ctx, lfm2_trace_fn *fn, void *user,
               lfm2_error *err);

/* What the machine can do at best, to hold a speed against: busy all threads of
 * the context with one thing.  READ reads weights of the model as they lie in
 * memory (all, or the first 2 GiB) and returns how many bytes.  DECODE has one
 * row, and weights that stay in the second-level cache, half a MiB for each
 * thread, and returns how many bytes of weights; DOT does so with 48 rows, and
 * returns how many multiply-adds.  The caller takes the time.  LFM2_EARG for
 * anything else, and in the child of a fork(), as of lfm2_forward(). */
enum { LFM2_READ, LFM2_DOT, LFM2_DECODE };
int64_t lfm2_exercise(lfm2_context *ctx, int what);

/* The functions everything is computed with, for those who bring the engine to
 * another machine: e^a, the sine and cosine of a (0 to 2^24), and a*b+c rounded
 * once.  The same bits everywhere; NaN for another function. */
enum { LFM2_EXP, LFM2_SIN, LFM2_COS, LFM2_FMA };
float lfm2_math(int function, float a, float b, float c);

/* --------------------------------------------------------------- sequences */

/* In tokens; LFM2_EARG if there is no such sequence. */
int  lfm2_seq_len(const lfm2_context *ctx, int seq);

/* The conv state is kept after each of the last 16 tokens, and before that at
 * every multiple of this many tokens (64, 128 or 256, by model). */
int  lfm2_seq_step(const lfm2_context *ctx);

/* Keep at most the first `len` tokens.  Returns how many were kept: all of them
 * if there were no more; `len` if it takes back no more than the last 16 that
 * were read; else `len` rounded down to a multiple of lfm2_seq_step(), and the
 * caller feeds the rest again.  (A sequence that was loaded or trimmed in that
 * way has to read on before tokens of it can be taken back.)  LFM2_EARG if seq
 * or len is out of range. */
int  lfm2_seq_trim(lfm2_context *ctx, int seq, int len);

/* Make `dst` equal to `src`: fork a conversation, share a system prompt. */
int  lfm2_seq_copy(lfm2_context *ctx, int dst, int src, lfm2_error *err);

/* Save and restore.  The bytes are the same on every machine, and good for the
 * same model and KV type only; loading checks that, a checksum, and every
 * length before it changes anything.  The sequence fits if n_ctx allows. */
uint64_t lfm2_seq_state_size(const lfm2_context *ctx, int seq);
int      lfm2_seq_save(const lfm2_context *ctx, int seq, void *buf,
                       uint64_t size, lfm2_error *err);
int      lfm2_seq_load(lfm2_context *ctx, int seq, const void *buf,
                       uint64_t size, lfm2_error *err);

/* --------------------------------------------------------------- tokenizer */

typedef struct lfm2_tokenizer lfm2_tokenizer;

/* From a GGUF with or without tensors; a tokenizer.bin is one without.  The
 * tokenizer keeps nothing of the file. */
int  lfm2_tokenizer_open(lfm2_tokenizer **out, const char *path,
                         lfm2_error *err);
int  lfm2_tokenizer_open_memory(lfm2_tokenizer **out, const void *data,
                                size_t size, lfm2_error *err);
void lfm2_tokenizer_close(lfm2_tokenizer *t);

/* Write a tokenizer.bin into buf[cap]: the vocabulary of a GGUF, given by its
 * bytes, as it is there.  Returns how many bytes it takes, like snprintf; 0 and
 * an error if the file holds no vocabulary. */
size_t lfm2_tokenizer_export(const void *data, size_t size, void *buf,
                             size_t cap, lfm2_error *err);

int     lfm2_n_vocab(const lfm2_tokenizer *t);
int32_t lfm2_bos(const lfm2_tokenizer *t);        /* -1 if there is none     */
int     lfm2_add_bos(const lfm2_tokenizer *t);    /* the model wants a BOS   */
int     lfm2_is_eog(const lfm2_tokenizer *t, int32_t token);  /* ends a turn */

/* Text in, token ids out: returns how many there are and writes no more than
 * `cap`, like snprintf; len + 1 is always enough.  Text is only ever text:
 * "<|im_end|>" typed by a user becomes ordinary tokens, unless SPECIAL asks for
 * control tokens to be recognised.  Some files have user-defined tokens besides
 * ("python" in those of LFM2): these are recognised in any text.  BOS, EOS and
 * the markers of a turn count as control tokens even if the file calls them
 * user-defined.  Negative: LFM2_ENOMEM or LFM2_EARG (more than 1 GiB). */
enum { LFM2_ENCODE_BOS = 1, LFM2_ENCODE_SPECIAL = 2 };

int lfm2_encode(const lfm2_tokenizer *t, const char *text, size_t len,
                int flags, int32_t *out, int cap);

/* A conversation in the LFM2 chat format: BOS first if there is one, markers as
 * control tokens, role and content as plain text.  With `generate`, the opening
 * of the assistant's turn follows.  Returns as lfm2_encode(); LFM2_EARG also if
 * the vocabulary lacks <|im_start|> or <|im_end|>. */
typedef struct { const char *role, *content; } lfm2_message;

int lfm2_chat(const lfm2_tokenizer *t, const lfm2_message *msgs, int n_msgs,
              int generate, int32_t *out, int cap);

/* The bytes of a token, maybe part of a character; borrowed from `t`.  Control,
 * unused and unknown tokens have none unless `special`; an id out of range has
 * none. */
const char *lfm2_token_bytes(const lfm2_tokenizer *t, int32_t token,
                             int special, int *len);
/* The id of a token by its exact literal text, e.g. "<|im_end|>"; or -1. */
int32_t     lfm2_token_id(const lfm2_tokenizer *t, const char *text);

/* Streams of characters out of bytes that arrive token by token: what completes
 * a character comes out, an unfinished one is held back (at most 3 bytes).
 * Returns how many bytes are in out[], which must hold len + 3.  Bytes that can
 * never become a character pass as they are.  len 0 flushes what is held. */
typedef struct { unsigned char held[4]; int n_held; } lfm2_utf8;

size_t lfm2_utf8_push(lfm2_utf8 *u, const char *bytes, size_t len, char *out);

/* ----------------------------------------------------------------- sampler */

/* Set all of them: with a top_p left at 0 the likeliest token is all there is
 * to choose from. */
typedef struct {
    float    temperature;      /* 0: greedy, ties to the lowest id           */
    int      top_k;            /* 0: off                                     */
    float    top_p, min_p;     /* 1 and 0: off                               */
    float    repeat_penalty;   /* 1: off                                     */
    int      repeat_last_n;    /* how much of the history it looks at        */
    uint64_t rng;              /* the seed; advances with every call         */
} lfm2_sampler;

/* Sample from logits [n_vocab]; `history` (may be NULL) holds all tokens so
 * far, newest last.  Order: penalty, top-k, top-p, min-p, temperature, draw.
 * The random numbers are SplitMix64 and the arithmetic is the engine's own, so
 * a seed means the same text everywhere.  Penalised logits are changed in
 * place.  Returns a token, or LFM2_ENAN when a logit is NaN or +inf or none is
 * finite. */
int32_t lfm2_sample(lfm2_context *ctx, lfm2_sampler *s, float *logits,
                    const int32_t *history, int n_history);

#ifdef __cplusplus
}
#endif
#endif
