/* lfm2.h - inference for Liquid AI's LFM2 and LFM2.5 language models.
 *
 * Three objects and one operation:
 *
 *   lfm2_model      the weights: a GGUF file, mapped read-only
 *   lfm2_context    all that changes: the sequences (KV cache and conv state)
 *                   and the scratch memory
 *   lfm2_tokenizer  text to token ids and back
 *
 *   lfm2_forward()  appends tokens to sequences.  Reading a prompt, generating
 *                   one token, and serving many users are the same call: with
 *                   one long span, one span of one token, or many spans.
 *
 * Errors     A function that can fail returns LFM2_OK (0) or a negative LFM2_E
 *            code.  If its `err` is not NULL, it also stores a sentence there
 *            that says what is wrong, what was found and what was expected.
 *            The library never prints or exits, and has no global state.  A
 *            failed call changes nothing except buffers it was given to fill.
 * Memory     What an _open function returns is released by the matching _close,
 *            which accepts NULL.  Other pointers that are returned are
 *            borrowed, as long as each description says.  lfm2_forward() and
 *            lfm2_sample() do not allocate memory.
 * Threads    One thread at a time may use a context.  Models and tokenizers do
 *            not change once they are open, and may be shared.  The logits of a
 *            token are the same bits for every thread count, batch size, set of
 *            other sequences in the call, division of the prompt into calls,
 *            compiler and CPU.
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

/* The name of the i-th weight type that can be read, such as "Q4_K"; i counts
 * from 0, NULL past the last. */
const char *lfm2_weight_type(int i);

/* ------------------------------------------------------------------ errors */

enum {
    LFM2_OK           =  0,
    LFM2_EARG         = -1,   /* an argument is wrong                        */
    LFM2_EIO          = -2,   /* open, read, stat or mmap failed             */
    LFM2_EFORMAT      = -3,   /* truncated or contradictory file             */
    LFM2_EUNSUPPORTED = -4,   /* a valid file, but for another engine        */
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
    int   n_head, n_head_kv, head_dim;    /* query heads, kv heads, width    */
    int   n_ff;                           /* hidden width of a dense FFN     */
    int   n_vocab, n_ctx_train;
    int   l_cache;                        /* taps of a short conv, 3 in LFM2 */
    int   n_expert, n_expert_used;        /* 0 if the model has no experts   */
    int   n_ff_expert, n_layer_dense;     /* layers before the first MoE one */
    float rope_freq_base, norm_rms_eps;
    float expert_weights_scale;           /* 1 by default                    */
    uint8_t is_attn[LFM2_MAX_LAYER];      /* 1: attention, 0: short conv     */
} lfm2_config;

typedef struct lfm2_model lfm2_model;

/* How to load a file.  MAP: map it read-only, so that the page cache holds the
 * only copy.  READ: read it into allocated memory.  A build without mmap always
 * reads.
 *
 * MAP or READ may be combined with ANY (by |) to inspect a file that is not a
 * usable model.  Then an error is returned as usual, but if *out is not NULL,
 * it holds what could be read, for lfm2_model_warning(), _file(), _tensor()
 * (without data), _string(), _key() and _close() only.
 *
 * If a mapped file is truncated or its disk fails, a thread that reads it gets
 * SIGBUS, the caller's or a worker of the library.  The library handles no
 * signals: where this can happen, handle it, or use READ. */
enum { LFM2_LOAD_MAP = 0, LFM2_LOAD_READ = 1, LFM2_LOAD_ANY = 2 };

/* Open a GGUF file.  Errors: LFM2_EARG, LFM2_EIO, LFM2_EFORMAT, LFM2_ENOMEM,
 * LFM2_EUNSUPPORTED; *out is NULL then, unless ANY is set. */
int  lfm2_model_open(lfm2_model **out, const char *path, int load,
                     lfm2_error *err);

/* The same for a file that is already in memory, such as flash.  `data` must
 * stay valid until lfm2_model_close(); it needs no alignment. */
int  lfm2_model_open_memory(lfm2_model **out, const void *data, size_t size,
                            lfm2_error *err);
void lfm2_model_close(lfm2_model *m);

/* Valid until lfm2_model_close(). */
const lfm2_config *lfm2_model_config(const lfm2_model *m);

/* The i-th warning, from 0: a sentence on something in the file that is wrong
 * but harmless, valid until lfm2_model_close().  NULL past the last. */
const char *lfm2_model_warning(const lfm2_model *m, int i);

/* The whole file in memory, *size bytes, valid until lfm2_model_close(): for
 * lfm2_tokenizer_open_memory(), for example. */
const void *lfm2_model_file(const lfm2_model *m, size_t *size);

/* Read ahead in a mapped file, whose pages are otherwise read when they are
 * first touched, in an order that is slow on disks.  Waits until the n bytes at
 * offset `from` are in memory, and asks the system to start reading the next n.
 * Called in a thread of its own, for a few MiB at a time, it loads the whole
 * file while the first tokens are computed.  Returns how many bytes were read:
 * n, or fewer at the end of the file; 0 past the end, if the file is not
 * mapped, or if it cannot be read. */
uint64_t lfm2_model_read_ahead(const lfm2_model *m, uint64_t from, uint64_t n);

typedef struct {
    const char    *name;                  /* as data: until the model closes */
    const char    *type;                  /* "Q4_K", "F32", ...              */
    int            n_dims;
    uint64_t       dims[4];               /* GGUF order, fastest first       */
    uint64_t       n_bytes, offset;       /* its size; its place in the file */
    const uint8_t *data;                  /* as stored in the file           */
} lfm2_tensor_info;

/* Describe the i-th tensor of the file, from 0.  LFM2_EARG past the last. */
int  lfm2_model_tensor(const lfm2_model *m, int i, lfm2_tensor_info *out);

/* Convert a row of the i-th tensor to floats, out[dims[0]].  All its other
 * dimensions count as rows, from 0.  LFM2_EARG if there is no such row. */
int  lfm2_model_row(const lfm2_model *m, int i, uint64_t row, float *out);

/* The value of a metadata key that is a string: *len bytes, not NUL-terminated,
 * valid until lfm2_model_close().  NULL if it is missing or not a string. */
const char *lfm2_model_string(const lfm2_model *m, const char *key,
                              size_t *len);

/* The i-th metadata key, from 0; its value is written to buf[cap] as text (of
 * an array, type and length; of a long string, the beginning).  NULL past the
 * last; valid until lfm2_model_close(). */
const char *lfm2_model_key(const lfm2_model *m, int i, char *buf, size_t cap);

/* Count the parameters of the model, and those active for one token: all except
 * the experts that are not chosen.  A tied embedding counts once. */
void lfm2_model_params(const lfm2_model *m, uint64_t *total, uint64_t *active);

/* A hash to tell models apart: FNV-1a of all metadata and shapes, and of the
 * first 64 bytes of every tensor. */
uint64_t lfm2_model_hash(const lfm2_model *m);

/* ----------------------------------------------------------------- context */

/* Instruction sets; all give the same bits.  AVX2 includes FMA and F16C; AVX512
 * is F, BW, VL and DQ; those with VNNI also have vpdpbusd.  Every 64-bit ARM
 * has NEON; DOTPROD adds sdot.  SIMD128 and RELAXED are WebAssembly's. */
enum { LFM2_ISA_AUTO, LFM2_ISA_SCALAR, LFM2_ISA_AVX2, LFM2_ISA_AVXVNNI,
       LFM2_ISA_AVX512, LFM2_ISA_AVX512VNNI, LFM2_ISA_NEON, LFM2_ISA_DOTPROD,
       LFM2_ISA_SIMD128, LFM2_ISA_RELAXED, LFM2_N_ISA };
enum { LFM2_KV_F16, LFM2_KV_F32 };

/* 1 if LFM2_ISA_x is available in this build and on this CPU, else 0. */
int lfm2_isa_available(int isa);

/* The CPUs that this process may use; 1 in a build without threads. */
int lfm2_n_cpus(void);

typedef struct {
    int n_ctx;        /* longest sequence, in tokens; 0: what the model was
                         trained for, at most 2^24                           */
    int n_seq;        /* number of sequences                                 */
    int n_batch;      /* tokens computed at once: costs memory, gains speed  */
    int n_logits;     /* most rows of logits per lfm2_forward()              */
    int n_threads;    /* 0: one per usable CPU, 64 at most; 1: the caller's  */
    int kv_type;      /* LFM2_KV_*                                           */
    int isa;          /* LFM2_ISA_*; LFM2_EARG if it is not available        */
} lfm2_params;

typedef struct lfm2_context lfm2_context;

/* n_ctx 4096, or less if the model was trained for less; one sequence; n_batch
 * 512, or 2048 with experts, so that each has enough rows; one row of logits;
 * one thread per CPU; KV in f16; the best ISA. */
lfm2_params lfm2_default_params(const lfm2_model *m);

/* The bytes that lfm2_context_open() will allocate, not counting the stacks of
 * threads; 0 if the parameters are invalid.  The KV cache uses physical memory
 * only as a sequence grows; on Linux it is released when it is emptied. */
uint64_t lfm2_context_size(const lfm2_model *m, const lfm2_params *p);

/* `m` must stay open until the context is closed.  Errors: LFM2_EARG if a
 * parameter is invalid, LFM2_ENOMEM. */
int  lfm2_context_open(lfm2_context **out, const lfm2_model *m,
                       const lfm2_params *p, lfm2_error *err);
void lfm2_context_close(lfm2_context *ctx);

/* The parameters in use, with AUTO and 0 replaced. */
lfm2_params lfm2_context_params(const lfm2_context *ctx);

/* ----------------------------------------------------------------- forward */

typedef struct {
    int            seq;        /* append to this sequence, 0 .. n_seq-1      */
    const int32_t *tokens;     /* [n_tokens], each 0 .. n_vocab-1            */
    int            n_tokens;   /* 1 or more; may exceed n_batch              */
    int            n_logits;   /* logits wanted: of the last n_logits tokens */
    const float   *embd;       /* [n_tokens][n_embd] in place of the tokens'
                                  embeddings; then tokens is NULL            */
    int            state;      /* 1: lfm2_state() is wanted; no logits then  */
} lfm2_span;

/* Append each span to its sequence; no two spans may have the same sequence.
 * Fails with LFM2_EARG (an id, a count or a sequence is wrong, or this is the
 * child of a fork() and the context has threads), LFM2_EFULL or
 * LFM2_ECANCELLED.  All sequences are then as before.  (But after
 * LFM2_ECANCELLED the last logits are gone, and lfm2_seq_trim() may keep fewer
 * tokens.) */
int lfm2_forward(lfm2_context *ctx, const lfm2_span *spans, int n_spans,
                 lfm2_error *err);

/* Logits [n_vocab] of the last successful lfm2_forward().  Row 0 belongs to the
 * first token of the span whose logits were wanted, and so on; NULL if there is
 * no such row.  Valid until the next lfm2_forward(); the caller may change them
 * before sampling. */
float *lfm2_logits(lfm2_context *ctx, int span, int row);

/* The state after the last token of a span that asked for it, [n_embd]: what
 * the output matrix would turn into logits.  It can serve to compare texts.
 * Valid until the next lfm2_forward(); NULL for other spans. */
const float *lfm2_state(const lfm2_context *ctx, int span);

/* Make the running lfm2_forward() return LFM2_ECANCELLED, or the next one if
 * none is running.  May be called from any thread and from a signal handler. */
void lfm2_cancel(lfm2_context *ctx);

/* While a trace hook is set, lfm2_forward() calls it in the caller's thread
 * with every activation: module by module in the order of computation, and
 * token by token within a module.  Modules have the names of the official
 * implementation (transformers): "model.layers.3.conv.in_proj", "lm_head".  No
 * result changes.  (Of a row whose state is wanted, the last norm is not shown:
 * that is lfm2_state().)  The hook must not use the context, except that it may
 * call lfm2_cancel(). */
typedef struct {
    const char  *name;         /* valid until the hook returns, as x is      */
    int          layer;        /* -1 outside of layers                       */
    int          expert;       /* of "model.layers.L.feed_forward.experts.E.*";
                                  -1 for all others                          */
    int          seq, pos;     /* sequence of the token, and place in it     */
    int32_t      token;        /* -1 if it is a row of embd                  */
    int          n;
    const float *x;            /* [n]                                        */
} lfm2_activation;

typedef void lfm2_trace_fn(void *user, const lfm2_activation *a);

/* Set the hook, or remove it if fn is NULL.  A trace takes more memory, in
 * proportion to n_batch; if there is none, LFM2_ENOMEM, and no hook is set. */
int lfm2_trace(lfm2_context *ctx, lfm2_trace_fn *fn, void *user,
               lfm2_error *err);

/* Do one kind of work on all threads of the context, for the caller to time: a
 * measure of how fast this machine could be.  READ reads the weights in memory,
 * at most 2 GiB, and returns the number of bytes.  DECODE multiplies one row by
 * weights that stay in the second-level cache, half a MiB per thread, and
 * returns the bytes of weights.  DOT multiplies up to 48 rows, and returns the
 * number of multiply-adds.  LFM2_EARG for other work, or after fork() as in
 * lfm2_forward(). */
enum { LFM2_READ, LFM2_DOT, LFM2_DECODE };
int64_t lfm2_exercise(lfm2_context *ctx, int what);

/* The functions that the engine computes with, to test a port: e^a, the sine
 * and cosine of a (0 to 2^24), and a*b+c rounded once.  They give the same bits
 * on every machine; NaN for any other function. */
enum { LFM2_EXP, LFM2_SIN, LFM2_COS, LFM2_FMA };
float lfm2_math(int function, float a, float b, float c);

/* --------------------------------------------------------------- sequences */

/* The length in tokens; LFM2_EARG if there is no such sequence. */
int  lfm2_seq_len(const lfm2_context *ctx, int seq);

/* lfm2_seq_trim() can go back to any multiple of this many tokens: 64, 128 or
 * 256, depending on the model. */
int  lfm2_seq_step(const lfm2_context *ctx);

/* Keep at most the first `len` tokens; returns how many are kept.  Up to 16
 * tokens can be removed exactly; for more, `len` is rounded down to a multiple
 * of lfm2_seq_step(), and the caller feeds the tokens up to `len` again.
 * (After that, and after lfm2_seq_load(), only tokens read since can be removed
 * exactly.)  LFM2_EARG if seq or len is out of range. */
int  lfm2_seq_trim(lfm2_context *ctx, int seq, int len);

/* Make `dst` a copy of `src`, to fork a conversation or share a prompt.
 * LFM2_EARG if there is no such sequence. */
int  lfm2_seq_copy(lfm2_context *ctx, int dst, int src, lfm2_error *err);

/* Save a sequence to buf, which needs lfm2_seq_state_size() bytes, and load it.
 * The bytes are the same on every machine.  To load them takes the same model
 * and kv_type, and an n_ctx that is large enough; that and a checksum are
 * checked before anything changes.  Errors: LFM2_EARG, LFM2_EFORMAT,
 * LFM2_EFULL; lfm2_seq_state_size() is 0 if there is no such sequence. */
uint64_t lfm2_seq_state_size(const lfm2_context *ctx, int seq);
int      lfm2_seq_save(const lfm2_context *ctx, int seq, void *buf,
                       uint64_t size, lfm2_error *err);
int      lfm2_seq_load(lfm2_context *ctx, int seq, const void *buf,
                       uint64_t size, lfm2_error *err);

/* --------------------------------------------------------------- tokenizer */

typedef struct lfm2_tokenizer lfm2_tokenizer;

/* Open the vocabulary of a GGUF file, which may have no tensors, as a
 * tokenizer.bin has none.  The file is not needed afterwards. */
int  lfm2_tokenizer_open(lfm2_tokenizer **out, const char *path,
                         lfm2_error *err);
int  lfm2_tokenizer_open_memory(lfm2_tokenizer **out, const void *data,
                                size_t size, lfm2_error *err);
void lfm2_tokenizer_close(lfm2_tokenizer *t);

/* Write a tokenizer.bin, the vocabulary of the GGUF file in data[size], to
 * buf[cap].  Like snprintf(), it writes at most cap bytes and returns the size
 * needed; 0 and an error if the file has no usable vocabulary. */
size_t lfm2_tokenizer_export(const void *data, size_t size, void *buf,
                             size_t cap, lfm2_error *err);

int     lfm2_n_vocab(const lfm2_tokenizer *t);
int32_t lfm2_bos(const lfm2_tokenizer *t);        /* -1 if there is none     */
int     lfm2_add_bos(const lfm2_tokenizer *t);    /* 1: texts begin with BOS */
int     lfm2_is_eog(const lfm2_tokenizer *t, int32_t token);  /* ends a turn */

/* Convert text[len] to token ids.  Like snprintf(), it writes at most cap ids
 * and returns the number needed, at most len + 1; or LFM2_ENOMEM, or LFM2_EARG
 * if the text is longer than 1 GiB.  With BOS, the BOS token comes first.
 *
 * Control tokens are recognised only with SPECIAL: without it, "<|im_end|>"
 * typed by a user becomes ordinary tokens.  User-defined tokens (such as
 * "python" in the files of LFM2) are recognised in any text.  BOS, EOS and the
 * markers of a turn are control tokens even if the file calls them
 * user-defined. */
enum { LFM2_ENCODE_BOS = 1, LFM2_ENCODE_SPECIAL = 2 };

int lfm2_encode(const lfm2_tokenizer *t, const char *text, size_t len,
                int flags, int32_t *out, int cap);

/* Convert a conversation in the LFM2 chat format to token ids: BOS if there is
 * one, then each message between its markers; control tokens are not recognised
 * in role and content.  With `generate`, the opening of the assistant's turn
 * follows.  Returns what lfm2_encode() does; LFM2_EARG also if the vocabulary
 * has no <|im_start|> or <|im_end|>. */
typedef struct { const char *role, *content; } lfm2_message;

int lfm2_chat(const lfm2_tokenizer *t, const lfm2_message *msgs, int n_msgs,
              int generate, int32_t *out, int cap);

/* The bytes of a token, *len of them, which may be part of a character; valid
 * until lfm2_tokenizer_close().  Without `special`, control, unused and unknown
 * tokens have none; an id out of range never has any. */
const char *lfm2_token_bytes(const lfm2_tokenizer *t, int32_t token,
                             int special, int *len);

/* The id of the token with exactly this text, such as "<|im_end|>"; or -1. */
int32_t     lfm2_token_id(const lfm2_tokenizer *t, const char *text);

/* Turn the bytes of tokens into whole UTF-8 characters: bytes that do not yet
 * complete a character, at most 3, are held until the next call.  Begin with
 * lfm2_utf8 all zero.  Returns how many bytes are written to out, which must
 * have room for len + 3.  Bytes that are not valid UTF-8 pass unchanged.  With
 * len 0, what is held is written, complete or not. */
typedef struct { unsigned char held[4]; int n_held; } lfm2_utf8;

size_t lfm2_utf8_push(lfm2_utf8 *u, const char *bytes, size_t len, char *out);

/* ----------------------------------------------------------------- sampler */

/* Set every field: a top_p of 0, for one, leaves only the likeliest token. */
typedef struct {
    float    temperature;      /* 0: greedy, ties to the lowest id           */
    int      top_k;            /* 0: off                                     */
    float    top_p, min_p;     /* 1 and 0: off                               */
    float    repeat_penalty;   /* 1: off                                     */
    int      repeat_last_n;    /* tokens of the history it applies to        */
    uint64_t rng;              /* the seed; every call advances it           */
} lfm2_sampler;

/* Choose a token by logits[n_vocab], in this order: repeat penalty, top-k,
 * top-p, min-p, temperature, draw.  history[n_history] holds the tokens so far,
 * newest last; it may be NULL.  The penalty changes logits in place.  The same
 * seed gives the same text on every machine.  Returns the token, or LFM2_ENAN
 * if a logit is NaN or +inf, or none is finite. */
int32_t lfm2_sample(lfm2_context *ctx, lfm2_sampler *s, float *logits,
                    const int32_t *history, int n_history);

#ifdef __cplusplus
}
#endif
#endif
