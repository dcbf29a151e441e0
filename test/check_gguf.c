/* Files: good ones of every form, and a table of broken ones.  A row breaks one
 * thing and names the sentence it must lead to.  Every file lies in memory of
 * exactly its size, so that reading past its end is found out. */
#define _POSIX_C_SOURCE 200809L

#include "../lfm2.h"

#include "util.h"

#include <check.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int open_bytes(struct bytes file, lfm2_model **m, lfm2_error *err)
{
    return lfm2_model_open_memory(m, file.p, file.n, err);
}

/* A copy of exactly n bytes. */
static struct bytes exactly(struct bytes b, size_t n)
{
    struct bytes c = { malloc(n ? n : 1), n, n };

    memcpy(c.p, b.p, n);
    return c;
}

/* One forward of two tokens, if it does not take too much memory. */
static void take_step(const lfm2_model *m, lfm2_error *err)
{
    lfm2_params p = { .n_ctx = 8, .n_seq = 1, .n_batch = 8, .n_logits = 1,
                      .n_threads = 1 };
    lfm2_context *ctx;
    int32_t token[2] = { 0, 0 };
    lfm2_span span = { 0, token, 2, 1 };

    if (lfm2_context_size(m, &p) < 100000000 &&
        lfm2_context_open(&ctx, m, &p, err) == LFM2_OK) {
        ck_assert_int_eq(lfm2_forward(ctx, &span, 1, err), LFM2_OK);
        lfm2_context_close(ctx);
    }
}

/* Open, take one step, close; the code of opening. */
static int try_file(struct bytes file, lfm2_error *err)
{
    lfm2_model *m;
    int code = open_bytes(file, &m, err);

    if (code != LFM2_OK)
        return code;
    take_step(m, err);
    lfm2_model_close(m);
    return LFM2_OK;
}

/* ---------------------------------------------------------------- good files */

static const struct tiny good[] = {
    { 0 }, { .moe = 1 }, { .version = 2 }, { .kv_form = KV_U32_ARRAY },
    { .output_norm = 1 }, { .untied = 1, .moe = 1 }, { .fused_qkv = 1 },
    { .words = 1 }, { .type = 14, .moe = 1 }, { .kv_form = KV_NONE }
};

START_TEST(good_files_open_without_a_word)
{
    struct bytes file = tiny_model(&good[_i]);
    lfm2_error err = { 0 };
    lfm2_model *m;

    EXPECT_MSG(open_bytes(file, &m, &err) == LFM2_OK, "%s", err.msg);
    EXPECT_MSG(!lfm2_model_warning(m, 0), "%s", lfm2_model_warning(m, 0));
    ck_assert_int_eq(lfm2_model_config(m)->n_layer, 4);
    ck_assert_int_eq(lfm2_model_config(m)->is_attn[2], 0);
    ck_assert_int_eq(lfm2_model_config(m)->is_attn[3],
                     good[_i].kv_form != KV_NONE);
    lfm2_model_close(m);
    ck_assert_int_eq(try_file(file, &err), LFM2_OK);
    free(file.p);
}
END_TEST

START_TEST(a_scalar_head_count_means_attention_everywhere)
{
    struct bytes file = tiny_model(&(struct tiny){ .kv_form = KV_SCALAR });
    lfm2_error err;

    ck_assert_int_eq(try_file(file, &err), LFM2_EFORMAT);
    ck_assert_str_eq(err.msg, "blk.0.attn_q.weight: no such tensor in the "
                     "file, expected in this model");
    free(file.p);
}
END_TEST

/* What is odd but harmless: it opens, and a warning says so (or nothing). */
static const struct { struct edit edit; const char *warning; int moe; }
tolerated[] = {
    { { SET, "lfm2.feed_forward_length", T_U32, 12288, 0, 0 },
      "lfm2.feed_forward_length: u32 12288, but blk.0.ffn_gate.weight has 128 "
      "rows; the tensor is right", 0 },
    { { SET, "lfm2moe.expert_feed_forward_length", T_U32, 99, 0, 0 },
      "lfm2moe.expert_feed_forward_length: u32 99, but", 1 },
    { { SET, "lfm2.vocab_size", T_U32, 65536, 0, 0 },
      "lfm2.vocab_size: u32 65536, but token_embd.weight has 264 rows", 0 },
    { { SET_STRING, "lfm2.feed_forward_length", 0, 0, "128", 0 },
      "lfm2.feed_forward_length: string 128, but blk.0.ffn_gate.weight has 128 "
      "rows; the tensor is right", 0 },
    { { SET_ARRAY, "lfm2.feed_forward_length", T_U32, 3, 0, 0 },
      "lfm2.feed_forward_length: array [3 x u32], but blk.0.ffn_gate.weight "
      "has 128 rows", 0 },
    { { ADD, "lfm2.expert_gating_func", T_U32, 0, 0, 0 }, NULL, 0 },
    { { ADD, "lfm2.rope.scaling.factor", T_F32, 0x3f800000, 0, 0 }, NULL, 0 },
    { { ADD, "lfm2.rope.scaling.attn_factor", T_F32, 0x3f800000, 0, 0 }, NULL,
      0 },
    { { ADD, "lfm2.attention.scale", T_F32, 0x3e800000, 0, 0 }, NULL, 0 },
    { { ADD, "lfm2.attention.sliding_window_pattern", T_BOOL, 0, 0, 0 }, NULL,
      0 },
    { { ADD, "lfm2.final_logit_softcapping", T_F32, 0, 0, 0 }, NULL, 0 },
    { { SET, "lfm2.rope.freq_base", T_F64, 0x40c3880000000000u, 0, 0 }, NULL,
      0 },
    { { SET, "lfm2.attention.layer_norm_rms_epsilon", T_F64,
        0x3ee4f8b588e368f1u, 0, 0 }, NULL, 0 },
    { { DROP, "lfm2.vocab_size", 0, 0, 0, 0 }, NULL, 0 },
    { { DROP, "lfm2.feed_forward_length", 0, 0, 0, 0 }, NULL, 0 },
    { { DROP, "general.name", 0, 0, 0, 0 }, NULL, 0 },
    { { DROP, "general.alignment", 0, 0, 0, 0 }, NULL, 0 },
    { { DROP, "lfm2.rope.freq_base", 0, 0, 0, 0 },
      "lfm2.rope.freq_base: missing, 10000 assumed", 0 },
    { { ADD, "lfm2.rope.dimension_count", T_U32, 16, 0, 0 }, NULL, 0 },
    { { ADD, "lfm2.attention.key_length", T_U32, 16, 0, 0 }, NULL, 0 },
    { { ADD, "lfm2.attention.sliding_window", T_U32, 0, 0, 0 }, NULL, 0 },
    { { ADD, "lfm2.attention.causal", T_BOOL, 1, 0, 0 }, NULL, 0 },
    { { ADD, "lfm2moe.expert_weights_scale", T_F32, 0x3f800000, 0, 0 }, NULL,
      1 },
    { { ADD, "lfm2.colour", T_U32, 7, 0, 0 },
      "lfm2.colour: an unknown key, ignored", 0 },
    { { ADD, "general.colour", T_U32, 7, 0, 0 }, NULL, 0 },
    { { ADD, "tokenizer.ggml.scores", T_U32, 7, 0, 0 }, NULL, 2 },
    { { ADD_TENSOR, "v.patch.weight", 0, 0, 0, 0 },
      "v.patch.weight: an unknown tensor, ignored", 0 },
    { { SET, "lfm2.block_count", T_U64, 4, 0, 0 }, NULL, 0 },
    { { SET, "lfm2.block_count", T_I8, 4, 0, 0 }, NULL, 0 },
    { { SET, "lfm2moe.leading_dense_block_count", T_U16, 1, 0, 0 }, NULL, 1 },
    { { SET_ARRAY, "tokenizer.ggml.tokens", T_STRING, 260, 0, 0 },
      "tokenizer.ggml.tokens: 260 tokens for 264 rows", 2 },
};

START_TEST(harmless_oddities_are_tolerated_and_reported)
{
    const struct edit edits[2] = { tolerated[_i].edit };
    struct bytes file = tiny_model(
        &(struct tiny){ .moe = tolerated[_i].moe == 1,
                        .words = tolerated[_i].moe == 2, .edits = edits });
    const char *expected = tolerated[_i].warning, *said;
    lfm2_error err = { 0 };
    lfm2_model *m;

    EXPECT_MSG(open_bytes(file, &m, &err) == LFM2_OK, "%s", err.msg);
    said = lfm2_model_warning(m, 0);
    EXPECT_MSG(expected ? said && strstr(said, expected) : !said,
               "said \"%s\", expected \"%s\"", said ? said : "",
               expected ? expected : "");
    ck_assert(!lfm2_model_warning(m, 1));
    lfm2_model_close(m);
    free(file.p);
}
END_TEST

/* -------------------------------------------------------------- broken files */

#define NAN_BITS 0x7fc00000u
#define INF_BITS 0x7f800000u

static const struct { struct edit edit; int moe, code; const char *sentence; }
broken[] = {
    /* header */
    { { PATCH, 0, 4, 0x46554740, 0, 0 }, 0, LFM2_EFORMAT,
      "not a GGUF file: it begins with \"@GUF\", expected \"GGUF\"" },
    { { PATCH, 0, 4, 0x47475546, 0, 0 }, 0, LFM2_EFORMAT, "begins with" },
    { { PATCH, 0, 4, 0x6c6d6767, 0, 0 }, 0, LFM2_EFORMAT, "begins with" },
    { { PATCH, 0, 4, 0x67676a74, 0, 0 }, 0, LFM2_EFORMAT, "begins with" },
    { { PATCH, 0, 4, 0, 0, 4 }, 0, LFM2_EUNSUPPORTED,
      "GGUF version 0, expected 2 or 3" },
    { { PATCH, 0, 4, 1, 0, 4 }, 0, LFM2_EUNSUPPORTED, "GGUF version 1" },
    { { PATCH, 0, 4, 4, 0, 4 }, 0, LFM2_EUNSUPPORTED, "GGUF version 4" },
    { { PATCH, 0, 4, 0x03000000, 0, 4 }, 0, LFM2_EUNSUPPORTED, "big-endian" },
    { { PATCH, 0, 8, 0, 0, 8 }, 0, LFM2_EFORMAT,
      "token_embd.weight: no such tensor" },
    { { PATCH, 0, 8, 1u << 31, 0, 8 }, 0, LFM2_EFORMAT,
      "the header: 2147483648 tensors, expected 0 to 8192" },
    { { PATCH, 0, 8, UINT64_MAX, 0, 8 }, 0, LFM2_EFORMAT, "tensors" },
    { { PATCH, 0, 8, UINT64_MAX / 2 + 1, 0, 8 }, 0, LFM2_EFORMAT, "tensors" },
    { { PATCH, 0, 8, 8192, 0, 8 }, 0, LFM2_EFORMAT, "tensor" },
    { { PATCH, 0, 8, 0, 0, 16 }, 0, LFM2_EFORMAT, "" },
    { { PATCH, 0, 8, UINT64_MAX, 0, 16 }, 0, LFM2_EFORMAT,
      "metadata keys, expected 0 to 4096" },
    { { PATCH, 0, 8, 4000, 0, 16 }, 0, LFM2_EFORMAT, "" },
    { { PATCH, 0, 8, 1u << 31, 0, 16 }, 0, LFM2_EFORMAT,
      "2147483648 metadata keys, expected 0 to 4096" },
    { { PATCH, 0, 8, 1ull << 63, 0, 16 }, 0, LFM2_EFORMAT, "metadata keys" },
    /* keys; the first one begins at byte 24 */
    { { PATCH, 0, 8, 0, 0, 24 }, 0, LFM2_EFORMAT,
      "the name of metadata key 0: 0 bytes, expected 1 to 256" },
    { { PATCH, 0, 8, UINT64_MAX, 0, 24 }, 0, LFM2_EFORMAT, "past the end" },
    { { PATCH, 0, 8, 1 << 20, 0, 24 }, 0, LFM2_EFORMAT, "metadata key 0" },
    { { PATCH, 0, 8, 300, 0, 24 }, 0, LFM2_EFORMAT, "300 bytes" },
    { { PATCH, 0, 8, 65537, 0, 24 }, 0, LFM2_EFORMAT, "65537 bytes" },
    { { PATCH, 0, 1, 0, 0, 35 }, 0, LFM2_EFORMAT, "byte 0x00" },
    { { PATCH, 0, 1, 0xff, 0, 35 }, 0, LFM2_EFORMAT, "byte 0xff" },
    { { TWICE, "lfm2.block_count", 0, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "metadata key lfm2.block_count: found twice" },
    { { RENAME, "general.name", 0, 0, "general.architecture", 0 }, 0,
      LFM2_EFORMAT, "found twice" },
    { { PATCH, 0, 4, 13, 0, 52 }, 0, LFM2_EFORMAT,
      "general.architecture: value type 13" },
    { { PATCH, 0, 4, UINT32_MAX, 0, 52 }, 0, LFM2_EFORMAT, "value type" },
    { { PATCH, 0, 8, UINT64_MAX, 0, 56 }, 0, LFM2_EFORMAT,
      "general.architecture: 1 x string runs past the end" },
    { { PATCH, 0, 8, 1 << 30, 0, 56 }, 0, LFM2_EFORMAT, "past the end" },
    { { ADD, "general.x", T_BOOL, 2, 0, 0 }, 0, LFM2_EFORMAT,
      "general.x: 2 as a bool, expected 0 to 1" },
    { { SET_ARRAY, "general.name", T_ARRAY, 1, 0, 0 }, 0, LFM2_EFORMAT,
      "general.name: value type 9, expected 0 to 8 or 10 to 12" },
    { { SET_ARRAY, "general.name", 77, 1, 0, 0 }, 0, LFM2_EFORMAT,
      "value type 77" },
    { { CLAIM, "general.name", T_U64, 1ull << 61, 0, 0 }, 0, LFM2_EFORMAT,
      "general.name: 2305843009213693952 x u64 runs past the end" },
    { { CLAIM, "general.name", T_I32, (1ull << 62) + 1, 0, 0 }, 0,
      LFM2_EFORMAT, "4611686018427387905 x i32 runs past the end" },
    { { CLAIM, "general.name", T_U8, UINT64_MAX, 0, 0 }, 0, LFM2_EFORMAT,
      "18446744073709551615 x u8" },
    { { CLAIM, "general.name", T_STRING, 1 << 30, 0, 0 }, 0, LFM2_EFORMAT,
      "1073741824 x string" },
    { { CLAIM, "general.name", T_STRING, 9000, 0, 0 }, 0, LFM2_EFORMAT,
      "general.name: 9000 x string runs past the end of the file" },
    /* right key, wrong type */
    { { SET, "general.alignment", T_F32, 0x42000000, 0, 0 }, 0, LFM2_EFORMAT,
      "general.alignment: of type f32, expected an integer" },
    { { SET, "general.alignment", T_U32, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "general.alignment: 0, expected a power of two" },
    { { SET, "general.alignment", T_U32, 1, 0, 0 }, 0, LFM2_EFORMAT,
      "general.alignment: 1" },
    { { SET, "general.alignment", T_U32, 3, 0, 0 }, 0, LFM2_EFORMAT,
      "general.alignment: 3" },
    { { SET, "general.alignment", T_U32, 48, 0, 0 }, 0, LFM2_EFORMAT,
      "general.alignment: 48" },
    { { SET, "general.alignment", T_U32, 1u << 31, 0, 0 }, 0, LFM2_EFORMAT,
      "general.alignment: 2147483648" },
    { { SET, "general.alignment", T_I32, UINT32_MAX, 0, 0 }, 0, LFM2_EFORMAT,
      "general.alignment: -1" },
    { { SET, "general.alignment", T_U64, UINT64_MAX, 0, 0 }, 0, LFM2_EFORMAT,
      "general.alignment: of type u64" },
    { { SET, "lfm2.block_count", T_F32, 0x40800000, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.block_count: of type f32" },
    { { SET_STRING, "lfm2.block_count", 0, 0, "4", 0 }, 0, LFM2_EFORMAT,
      "lfm2.block_count: of type string" },
    { { SET, "lfm2.rope.freq_base", T_U32, 10000, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.rope.freq_base: of type u32, expected f32" },
    /* what the file is */
    { { DROP, "general.architecture", 0, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "general.architecture: missing" },
    { { SET_STRING, "general.architecture", 0, 0, "llama", 0 }, 0,
      LFM2_EUNSUPPORTED, "general.architecture: llama, expected lfm2" },
    { { SET_STRING, "general.architecture", 0, 0, "lfm3-vl", 0 }, 0,
      LFM2_EUNSUPPORTED, "next generation" },
    { { SET_STRING, "general.architecture", 0, 0, "lfm2-bidir", 0 }, 0,
      LFM2_EUNSUPPORTED, "bidirectional" },
    { { SET_STRING, "general.architecture", 0, 0, "clip", 0 }, 0,
      LFM2_EUNSUPPORTED, "image or audio" },
    { { SET_STRING, "general.architecture", 0, 0, "lfm2\x1b[2J", 0 }, 0,
      LFM2_EUNSUPPORTED, "lfm2?[2J" },
    { { ADD, "split.count", T_U16, 3, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "split.count: one part of 3" },
    { { ADD, "lfm2.attention.sliding_window", T_U32, 256, 0, 0 }, 0,
      LFM2_EUNSUPPORTED, "lfm2.attention.sliding_window: 256, expected 0" },
    { { ADD, "lfm2.attention.causal", T_BOOL, 0, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "lfm2.attention.causal" },
    { { ADD, "lfm2.pooling_type", T_U32, 1, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "lfm2.pooling_type" },
    { { ADD, "lfm2.rope.scaling.factor", T_F32, 0x40000000, 0, 0 }, 0,
      LFM2_EUNSUPPORTED, "lfm2.rope.scaling.factor" },
    { { ADD, "lfm2.rope.scaling.type", T_U32, 1, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "lfm2.rope.scaling.type" },
    { { ADD, "lfm2.rope.dimension_sections", T_U32, 1, 0, 0 }, 0,
      LFM2_EUNSUPPORTED, "an unknown key that may change the arithmetic" },
    { { ADD, "lfm2.final_logit_softcapping", T_F32, 0x40000000, 0, 0 }, 0,
      LFM2_EUNSUPPORTED, "lfm2.final_logit_softcapping: 2, expected 0" },
    { { ADD, "lfm2.attention.scale", T_F32, 0x3f000000, 0, 0 }, 0,
      LFM2_EUNSUPPORTED, "lfm2.attention.scale: 0.5, expected 0.25" },
    { { ADD, "lfm2.attention.sliding_window_pattern", T_BOOL, 1, 0, 0 }, 0,
      LFM2_EUNSUPPORTED, "sliding_window_pattern: true, expected 0" },
    { { SET, "lfm2.rope.freq_base", T_F64, 0x7ff8000000000000u, 0, 0 }, 0,
      LFM2_EFORMAT, "lfm2.rope.freq_base: nan, expected" },
    { { ADD, "lfm2.expert_shared_count", T_U32, 1, 0, 0 }, 0,
      LFM2_EUNSUPPORTED, "lfm2.expert_shared_count" },
    /* configuration */
    { { DROP, "lfm2.block_count", 0, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.block_count: missing" },
    { { SET, "lfm2.block_count", T_U32, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.block_count: 0, expected 1 to 128" },
    { { SET, "lfm2.block_count", T_U32, 1000000, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.block_count: 1000000" },
    { { SET, "lfm2.block_count", T_U32, 5, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.attention.head_count_kv: 4 entries, expected one for each of 5" },
    { { SET, "lfm2.context_length", T_U32, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.context_length: 0" },
    { { SET, "lfm2.context_length", T_U64, 1ull << 63, 0, 0 }, 0,
      LFM2_EFORMAT, "lfm2.context_length: of type u64" },
    { { SET, "lfm2.embedding_length", T_U32, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.embedding_length: 0" },
    { { SET, "lfm2.embedding_length", T_U32, 66, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.embedding_length: 66 for 4 heads of 0 dimensions, expected an" },
    { { SET, "lfm2.embedding_length", T_U32, 128, 0, 0 }, 0, LFM2_EFORMAT,
      "token_embd.weight: shape 64 x 264 x 1, expected 128 x 264 x 1" },
    { { SET, "lfm2.attention.head_count", T_U32, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.attention.head_count: 0" },
    { { SET, "lfm2.attention.head_count", T_U32, 1, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.attention.head_count: 1, expected a multiple of the 2 kv heads" },
    { { SET_ARRAY, "lfm2.attention.head_count_kv", T_I32, 3, 0, 0 }, 0,
      LFM2_EFORMAT, "3 entries" },
    { { SET_ARRAY, "lfm2.attention.head_count_kv", T_I32, 5, 0, 0 }, 0,
      LFM2_EFORMAT, "5 entries, expected one for each of 4 blocks" },
    { { SET_STRING, "lfm2.attention.head_count_kv", 0, 0, "2", 0 }, 0,
      LFM2_EFORMAT, "of type string, expected an integer" },
    { { SET, "lfm2.attention.head_count_kv", T_U32, 5, 0, 0 }, 0,
      LFM2_EFORMAT, "lfm2.attention.head_count: 4, expected a multiple of" },
    { { SET, "lfm2.attention.head_count_kv", T_U32, 1025, 0, 0 }, 0,
      LFM2_EFORMAT, "lfm2.attention.head_count_kv: 1025, expected 0 to 1024" },
    { { SET_ARRAY, "lfm2.attention.head_count_kv", T_F32, 4, 0, 0 }, 0,
      LFM2_EFORMAT, "of type f32, expected an integer" },
    { { SET_ARRAY, "lfm2.attention.head_count_kv", T_I32, 4, 0, 0 }, 0,
      LFM2_EFORMAT, "blk.1.shortconv" },
    { { SET, "lfm2.attention.head_count_kv", T_U32, 3, 0, 0 }, 0,
      LFM2_EFORMAT, "lfm2.attention.head_count: 4, expected a multiple of" },
    { { SET, "lfm2.attention.head_count_kv", T_I32, UINT32_MAX, 0, 0 }, 0,
      LFM2_EFORMAT, "lfm2.attention.head_count_kv: -1" },
    { { ADD, "lfm2.attention.key_length", T_U32, 17, 0, 0 }, 0, LFM2_EFORMAT,
      "heads of 17 dimensions" },
    { { ADD, "lfm2.attention.value_length", T_U32, 32, 0, 0 }, 0,
      LFM2_EUNSUPPORTED, "lfm2.attention.value_length: 32, expected 16" },
    { { ADD, "lfm2.rope.dimension_count", T_U32, 8, 0, 0 }, 0,
      LFM2_EUNSUPPORTED, "lfm2.rope.dimension_count: 8, expected 16" },
    { { DROP, "lfm2.shortconv.l_cache", 0, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.shortconv.l_cache: missing" },
    { { SET, "lfm2.shortconv.l_cache", T_U32, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.shortconv.l_cache: 0" },
    { { SET, "lfm2.shortconv.l_cache", T_U32, 1, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.shortconv.l_cache: 1" },
    { { SET, "lfm2.shortconv.l_cache", T_U32, 1000000000, 0, 0 }, 0,
      LFM2_EFORMAT, "lfm2.shortconv.l_cache: 1000000000" },
    { { SET, "lfm2.shortconv.l_cache", T_U32, 4, 0, 0 }, 0, LFM2_EFORMAT,
      "blk.0.shortconv.conv.weight: shape 3 x 64 x 1, expected 4 x 64 x 1" },
    { { DROP, "lfm2.attention.layer_norm_rms_epsilon", 0, 0, 0, 0 }, 0,
      LFM2_EFORMAT, "lfm2.attention.layer_norm_rms_epsilon: missing" },
    { { SET, "lfm2.attention.layer_norm_rms_epsilon", T_F32, 0, 0, 0 }, 0,
      LFM2_EFORMAT, "lfm2.attention.layer_norm_rms_epsilon: 0" },
    { { SET, "lfm2.attention.layer_norm_rms_epsilon", T_F32, NAN_BITS, 0, 0 },
      0, LFM2_EFORMAT, "lfm2.attention.layer_norm_rms_epsilon: nan" },
    { { SET, "lfm2.rope.freq_base", T_F32, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.rope.freq_base: 0, expected" },
    { { SET, "lfm2.rope.freq_base", T_F32, 0xc61c4000, 0, 0 }, 0,
      LFM2_EFORMAT, "lfm2.rope.freq_base: -10000" },
    { { SET, "lfm2.rope.freq_base", T_F32, NAN_BITS, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.rope.freq_base: nan" },
    { { SET, "lfm2.rope.freq_base", T_F32, INF_BITS, 0, 0 }, 0, LFM2_EFORMAT,
      "lfm2.rope.freq_base: inf" },
    { { DROP, "lfm2moe.expert_count", 0, 0, 0, 0 }, 1, LFM2_EFORMAT,
      "lfm2moe.expert_count: missing" },
    { { SET, "lfm2moe.expert_count", T_U32, 0, 0, 0 }, 1, LFM2_EFORMAT,
      "lfm2moe.expert_count: 0, expected 1 to 256" },
    { { SET, "lfm2moe.expert_count", T_U32, 257, 0, 0 }, 1, LFM2_EFORMAT,
      "lfm2moe.expert_count: 257" },
    { { SET, "lfm2moe.expert_count", T_U32, 5, 0, 0 }, 1, LFM2_EFORMAT,
      "blk.1.ffn_gate_inp.weight: shape 64 x 6 x 1, expected 64 x 5 x 1" },
    { { SET, "lfm2moe.expert_used_count", T_U32, 0, 0, 0 }, 1, LFM2_EFORMAT,
      "lfm2moe.expert_used_count: 0" },
    { { SET, "lfm2moe.expert_used_count", T_U32, 7, 0, 0 }, 1, LFM2_EFORMAT,
      "lfm2moe.expert_used_count: 7, expected 1 to 6" },
    { { DROP, "lfm2moe.expert_gating_func", 0, 0, 0, 0 }, 1, LFM2_EFORMAT,
      "lfm2moe.expert_gating_func: missing" },
    { { SET, "lfm2moe.expert_gating_func", T_U32, 1, 0, 0 }, 1,
      LFM2_EUNSUPPORTED, "lfm2moe.expert_gating_func: 1, expected 2" },
    { { SET, "lfm2moe.leading_dense_block_count", T_U32, 5, 0, 0 }, 1,
      LFM2_EFORMAT, "lfm2moe.leading_dense_block_count: 5" },
    { { ADD, "lfm2moe.expert_weights_scale", T_F32, INF_BITS, 0, 0 }, 1,
      LFM2_EFORMAT, "lfm2moe.expert_weights_scale: inf" },
    /* what is cut into groups of 32 */
    { { SET, "lfm2.embedding_length", T_U32, 48, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "lfm2.embedding_length: 48 columns in all, expected a multiple of 32" },
    { { ADD, "lfm2.attention.key_length", T_U32, 10, 0, 0 }, 0,
      LFM2_EUNSUPPORTED, "lfm2.attention.head_count: 40 columns in all" },
    { { DIM, "blk.0.ffn_gate.weight", 1, 40, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "lfm2.feed_forward_length: 40 columns in all" },
    { { DIM, "blk.1.ffn_gate_exps.weight", 1, 33, 0, 0 }, 1, LFM2_EUNSUPPORTED,
      "lfm2moe.expert_feed_forward_length: 33 columns in all" },
    { { SET_ARRAY, "tokenizer.ggml.tokens", T_STRING, 265, 0, 0 }, 2,
      LFM2_EFORMAT, "tokenizer.ggml.tokens: 265 tokens, expected 0 to 264" },
    /* tensors */
    { { RENAME, "token_embd.weight", 0, 0, "", 0 }, 0, LFM2_EFORMAT,
      "the name of tensor 0: 0 bytes" },
    { { RENAME, "token_embd.weight", 0, 0,
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", 0 },
      0, LFM2_EFORMAT, "the name of tensor 0: 64 bytes, expected 1 to 63" },
    { { TWICE, "blk.0.ffn_up.weight", 0, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "tensor blk.0.ffn_up.weight: found twice" },
    { { N_DIMS, "token_embd.weight", 0, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "token_embd.weight: 0 dimensions, expected 1 to 4" },
    { { N_DIMS, "token_embd.weight", 0, 5, 0, 0 }, 0, LFM2_EFORMAT,
      "5 dimensions" },
    { { N_DIMS, "token_embd.weight", 0, UINT32_MAX, 0, 0 }, 0, LFM2_EFORMAT,
      "4294967295 dimensions" },
    { { DIM, "token_embd.weight", 1, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "token_embd.weight: 0 rows, expected 1 to 2147483647" },
    { { DIM, "token_embd.weight", 1, UINT64_MAX, 0, 0 }, 0, LFM2_EFORMAT,
      "token_embd.weight: 18446744073709551616 rows, expected 1 to" },
    { { DIM, "blk.1.ffn_up_exps.weight", 2, 1ull << 60, 0, 0 }, 1,
      LFM2_EFORMAT, "blk.1.ffn_up_exps.weight: 1152921504606846976 matrices" },
    { { DIM, "token_embd.weight", 1, INT32_MAX, 0, 0 }, 0, LFM2_EFORMAT,
      "token_embd.weight: 549755813632 bytes at offset 0, but the file has" },
    { { TYPE, "token_embd.weight", 0, 14, 0, 0 }, 0, LFM2_EFORMAT,
      "token_embd.weight: rows of 64 columns, expected a multiple of 256 for "
      "Q6_K" },
    { { TYPE, "blk.0.ffn_up.weight", 0, 21, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "blk.0.ffn_up.weight: weight type 21 of GGUF, expected F32" },
    { { TYPE, "blk.0.ffn_up.weight", 0, 4, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "weight type 4 of GGUF" },
    { { TYPE, "blk.0.ffn_up.weight", 0, 31, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "weight type 31 of GGUF" },
    { { TYPE, "blk.0.ffn_up.weight", 0, 39, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "weight type 39 of GGUF" },
    { { TYPE, "blk.0.ffn_up.weight", 0, 12345, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "weight type 12345 of GGUF" },
    { { OFFSET, "blk.0.ffn_up.weight", 0, 33, 0, 0 }, 0, LFM2_EFORMAT,
      "blk.0.ffn_up.weight: offset 33, expected a multiple of 32" },
    { { OFFSET, "blk.0.ffn_up.weight", 0, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "blk.0.ffn_up.weight: overlaps token_embd.weight" },
    { { OFFSET, "blk.0.ffn_up.weight", 0, 1 << 30, 0, 0 }, 0, LFM2_EFORMAT,
      "blk.0.ffn_up.weight: 32768 bytes at offset 1073741824" },
    { { OFFSET, "blk.0.ffn_up.weight", 0, UINT64_MAX - 31, 0, 0 }, 0,
      LFM2_EFORMAT, "blk.0.ffn_up.weight: 32768 bytes at offset 184467" },
    { { DROP, "token_embd.weight", 0, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "token_embd.weight: no such tensor" },
    { { DROP, "token_embd_norm.weight", 0, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "token_embd_norm.weight: no such tensor in the file, expected in this" },
    { { RENAME, "token_embd_norm.weight", 0, 0, "final_norm.weight", 0 }, 0,
      LFM2_EFORMAT, "token_embd_norm.weight: no such tensor" },
    { { DROP, "blk.3.attn_v.weight", 0, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "blk.3.attn_v.weight: no such tensor" },
    { { DROP, "blk.2.exp_probs_b.bias", 0, 0, 0, 0 }, 1, LFM2_EFORMAT,
      "blk.2.exp_probs_b.bias: no such tensor" },
    { { DIM, "blk.1.attn_q_norm.weight", 0, 8, 0, 0 }, 0, LFM2_EFORMAT,
      "blk.1.attn_q_norm.weight: shape 8 x 1 x 1, expected 16 x 1 x 1" },
    { { DIM, "blk.2.ffn_down.weight", 1, 32, 0, 0 }, 0, LFM2_EFORMAT,
      "blk.2.ffn_down.weight: shape 128 x 32 x 1, expected 128 x 64 x 1" },
    { { TYPE, "blk.0.attn_norm.weight", 0, 8, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "blk.0.attn_norm.weight: weight type Q8_0, expected F32" },
    { { TYPE, "blk.1.ffn_gate_inp.weight", 0, 8, 0, 0 }, 1, LFM2_EUNSUPPORTED,
      "blk.1.ffn_gate_inp.weight: weight type Q8_0, expected F32, F16 or "
      "BF16" },
    { { TYPE, "blk.0.shortconv.conv.weight", 0, 2, 0, 0 }, 0, LFM2_EFORMAT,
      "blk.0.shortconv.conv.weight: rows of 3 columns" },
    { { FILL, "blk.0.attn_norm.weight", 0, NAN_BITS, 0, 0 }, 0, LFM2_EFORMAT,
      "blk.0.attn_norm.weight: element 0 of row 0 is nan" },
    { { FILL, "blk.0.shortconv.conv.weight", 0, INF_BITS, 0, 0 }, 0,
      LFM2_EFORMAT, "blk.0.shortconv.conv.weight: element 0 of row 0 is inf" },
    { { FILL, "blk.1.exp_probs_b.bias", 0, NAN_BITS, 0, 0 }, 1, LFM2_EFORMAT,
      "blk.1.exp_probs_b.bias: element 0" },
    { { ADD_TENSOR, "blk.0.attn_sinks.weight", 0, 0, 0, 0 }, 0,
      LFM2_EUNSUPPORTED, "blk.0.attn_sinks.weight: a tensor that lfm2 does not"
    },
    { { ADD, "lfm2.\302\233m\33[2J", T_U32, 7, 0, 0 }, 0, LFM2_EFORMAT,
      "\"lfm2.??m?[2J\": byte 0xc2, expected printable ASCII" },
    { { ADD_TENSOR, "blk.0.\33]0;\7", 0, 0, 0, 0 }, 0, LFM2_EFORMAT,
      "\"blk.0.?]0;?\": byte 0x1b, expected printable ASCII" },
    { { ADD_TENSOR, "blk.0.ffn_up.bias", 0, 0, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "blk.0.ffn_up.bias" },
    { { ADD_TENSOR, "rope_freqs.weight", 0, 0, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "rope_freqs.weight" },
    { { ADD_TENSOR, "dense_2.weight", 0, 0, 0, 0 }, 0, LFM2_EUNSUPPORTED,
      "dense_2.weight" },
};

START_TEST(broken_files_are_refused_with_the_right_sentence)
{
    const struct edit edits[2] = { broken[_i].edit };
    struct bytes whole = tiny_model(&(struct tiny){
        .moe = broken[_i].moe == 1, .words = broken[_i].moe == 2,
        .edits = edits });
    struct bytes file = exactly(whole, whole.n);
    lfm2_error err = { 0 };
    int code = try_file(file, &err);

    EXPECT_MSG(code == broken[_i].code && err.code == code &&
               strstr(err.msg, broken[_i].sentence),
               "row %d: code %d, \"%s\"; expected %d, \"%s\"", _i, code,
               err.msg, broken[_i].code, broken[_i].sentence);
    EXPECT_MSG(try_file(file, NULL) == code, "without err: another code");
    free(file.p);
    free(whole.p);
}
END_TEST

/* What takes two edits to be wrong, or to be right again. */
static const struct { struct edit edits[3]; int moe, code; const char *says; }
pairs[] = {
    { { { ADD, "lfm2.attention.sliding_window_pattern", T_BOOL, 0, 0, 0 },
        { SET_ARRAY, "lfm2.attention.sliding_window_pattern", T_BOOL, 4, 0, 0 }
      }, 0, LFM2_OK, "" },
    { { { ADD, "lfm2.rope.scaling.factor", T_F32, 0, 0, 0 },
        { SET_ARRAY, "lfm2.rope.scaling.factor", T_F32, 4, 0, 0 } }, 0,
      LFM2_EUNSUPPORTED, "lfm2.rope.scaling.factor: [4 x f32], expected 1" },
    { { { DIM, "blk.1.ffn_up_exps.weight", 1, INT32_MAX, 0, 0 },
        { DIM, "blk.1.ffn_up_exps.weight", 2, INT32_MAX, 0, 0 }, { 0 } }, 1,
      LFM2_EFORMAT, "blk.1.ffn_up_exps.weight: 2.9514790490447491891e+20 elements, "
      "expected 1 to 1e+15" },
    { { { SET_ARRAY, "general.name", T_STRING, 3, 0, 0 },
        { PATCH, 0, 8, UINT64_MAX, 0, 112 }, { 0 } }, 0, LFM2_EFORMAT,
      "general.name: 3 x string runs past the end of the file" },
    { { { SET_STRING, "general.name", 0, 0, "none", 0 },
        { RENAME, "general.name", 0, 0, "lfm2.rope.scaling.type", 0 }, { 0 } },
      0, LFM2_OK, "" },
    { { { SET_STRING, "general.name", 0, 0, "yarn", 0 },
        { RENAME, "general.name", 0, 0, "lfm2.rope.scaling.type", 0 }, { 0 } },
      0, LFM2_EUNSUPPORTED, "lfm2.rope.scaling.type: yarn, expected 0" },
    { { { SET_STRING, "general.name", 0, 0, "none", 0 },
        { RENAME, "general.name", 0, 0, "lfm2.attention.causal", 0 }, { 0 } },
      0, LFM2_EUNSUPPORTED, "lfm2.attention.causal: none, expected 1" },
    { { { TYPE, "blk.0.attn_norm.weight", 0, 1, 0, 0 },       /* F16: good   */
        { FILL, "blk.0.attn_norm.weight", 0, 0x3c003c00, 0, 0 }, { 0 } }, 0,
      LFM2_OK, "" },
    { { { TYPE, "blk.0.attn_norm.weight", 0, 1, 0, 0 },
        { FILL, "blk.0.attn_norm.weight", 0, 0x7c007c00, 0, 0 }, { 0 } }, 0,
      LFM2_EFORMAT, "blk.0.attn_norm.weight: element 0 of row 0 is inf" },
    { { { SET, "lfm2.attention.head_count", T_U32, 1, 0, 0 },
        { SET, "lfm2.attention.head_count_kv", T_U32, 1, 0, 0 }, { 0 } }, 0,
      LFM2_EFORMAT, "blk.0.attn_q.weight: no such tensor" },
};

START_TEST(pairs_of_oddities_are_judged_together)
{
    struct bytes file = tiny_model(&(struct tiny){ .moe = pairs[_i].moe,
                                                   .edits = pairs[_i].edits });
    lfm2_error err = { 0 };
    int code = try_file(file, &err);

    EXPECT_MSG(code == pairs[_i].code && strstr(err.msg, pairs[_i].says),
               "row %d: code %d, \"%s\"", _i, code, err.msg);
    free(file.p);
}
END_TEST

/* The order of the data is nobody's business. */
START_TEST(offsets_may_decrease)
{
    struct edit edits[3] = { { OFFSET, "blk.0.ffn_gate.weight", 0, 0, 0, 0 },
                             { OFFSET, "blk.0.ffn_up.weight", 0, 0, 0, 0 } };
    struct bytes file = tiny_model(&(struct tiny){ 0 });
    lfm2_tensor_info info, first;
    lfm2_error err = { 0 };
    lfm2_model *m;

    ck_assert_int_eq(open_bytes(file, &m, &err), LFM2_OK);
    ck_assert_int_eq(lfm2_model_tensor(m, 0, &first), LFM2_OK);
    for (int i = 0; lfm2_model_tensor(m, i, &info) == LFM2_OK; i++)
        for (int k = 0; k < 2; k++)       /* each gets the other's           */
            if (strcmp(info.name, edits[k].name) == 0)
                edits[1 - k].b = (uint64_t)(info.data - first.data);
    ck_assert(edits[0].b > edits[1].b && edits[1].b > 0);
    lfm2_model_close(m);
    free(file.p);
    file = tiny_model(&(struct tiny){ .edits = edits });
    EXPECT_MSG(try_file(file, &err) == LFM2_OK, "%s", err.msg);
    free(file.p);
}
END_TEST

/* ------------------------------------------------- cut short, and at random */

START_TEST(every_cut_of_a_file_is_refused)
{
    struct bytes whole = tiny_model(&(struct tiny){ .moe = 1, .words = 1 });
    lfm2_error err;

    for (size_t n = 0; n < whole.n; n += n < 12000 ? 1 : 997) {
        struct bytes file = exactly(whole, n);
        int code = try_file(file, &err);
        EXPECT_MSG(code == LFM2_EFORMAT, "%zu bytes: code %d, %s", n, code,
                   err.msg);
        free(file.p);
    }
    struct bytes file = exactly(whole, whole.n - 1);
    EXPECT(try_file(file, &err) == LFM2_EFORMAT || whole.p[whole.n - 1] == 0);
    free(file.p);
    free(whole.p);
}
END_TEST

START_TEST(what_follows_the_data_does_no_harm)
{
    struct bytes file = tiny_model(&(struct tiny){ 0 });
    lfm2_error err = { 0 };

    bytes_int(&file, 0x123456789abcdef, 8);
    EXPECT_MSG(try_file(file, &err) == LFM2_OK, "%s", err.msg);
    free(file.p);
}
END_TEST

/* Wrong bytes anywhere: refused or run, never worse. */
START_TEST(random_damage_is_survived)
{
    struct bytes whole = tiny_model(&(struct tiny){ .moe = _i, .words = 1 });
    uint64_t rng = 5;

    for (int round = 0; round < 3000; round++) {
        struct bytes file = exactly(whole, whole.n);
        lfm2_error err;
        for (uint32_t k = 0; k < 1 + round % 3u; k++)
            file.p[random_u32(&rng) % (round % 2 ? 10000 : 600)] =
                (uint8_t)(random_u32(&rng) >> random_u32(&rng) % 8);
        lfm2_model *m;
        if (open_bytes(file, &m, &err) == LFM2_OK)
            lfm2_model_close(m);
        free(file.p);
    }
    free(whole.p);
}
END_TEST

/* ------------------------------------------------------------ files on disk */

START_TEST(what_is_no_readable_file_is_an_io_error)
{
    static const struct { const char *path, *sentence; int code; } row[] = {
        { "build/no/such/file", "No such file or directory", LFM2_EIO },
        { "test", "test: a directory, expected a regular file", LFM2_EIO },
        { "/dev/zero", "a device or pipe, expected a regular", LFM2_EIO },
        { "/dev/random", "a device or pipe", LFM2_EIO },
        { "build/test/fifo", "a device or pipe", LFM2_EIO },
        { "build/test/empty", "0 bytes, expected a GGUF file", LFM2_EFORMAT },
        { "Makefile", "not a GGUF file: it begins with", LFM2_EFORMAT },
    };
    lfm2_error err = { 0 };
    lfm2_model *m;
    FILE *f = fopen("build/test/empty", "w");

    fclose(f);
    unlink("build/test/fifo");
    ck_assert(mkfifo("build/test/fifo", 0600) == 0);
    for (size_t i = 0; i < COUNT(row); i++)
        for (int load = LFM2_LOAD_MAP; load <= LFM2_LOAD_READ; load++) {
            int code = lfm2_model_open(&m, row[i].path, load, &err);
            EXPECT_MSG(code == row[i].code && strstr(err.msg, row[i].sentence),
                       "%s: code %d, \"%s\"", row[i].path, code, err.msg);
            EXPECT(m == NULL);
        }
    ck_assert_int_eq(lfm2_model_open(&m, "Makefile", 7, &err), LFM2_EARG);
    ck_assert_int_eq(lfm2_model_open(&m, NULL, 0, &err), LFM2_EARG);
    ck_assert_int_eq(lfm2_model_open_memory(&m, NULL, 0, &err), LFM2_EARG);
    unlink("build/test/fifo");
    unlink("build/test/empty");
}
END_TEST

/* Another user's file; root, who may read all, becomes somebody else here. */
START_TEST(what_may_not_be_read_is_an_io_error)
{
    char path[] = "/tmp/lfm2-unreadable-XXXXXX";
    const int fd = mkstemp(path);
    lfm2_error err = { 0 };
    lfm2_model *m;
    int code;

    ck_assert(fd >= 0 && write(fd, "GGUF", 4) == 4 && fchmod(fd, 0) == 0);
    close(fd);
    if (geteuid() == 0)
        ck_assert_int_eq(seteuid(65534), 0);
    code = lfm2_model_open(&m, path, LFM2_LOAD_MAP, &err);
    if (getuid() == 0)
        ck_assert_int_eq(seteuid(0), 0);
    unlink(path);
    ck_assert_int_eq(code, LFM2_EIO);
    ck_assert_msg(strstr(err.msg, "Permission denied") != NULL, "%s", err.msg);
}
END_TEST

/* Its name is gone, its bytes are not. */
START_TEST(a_file_that_vanishes_while_mapped_is_still_there)
{
    struct bytes file = tiny_model(&(struct tiny){ 0 });
    char path[] = "/tmp/lfm2-vanishing-XXXXXX";
    const int fd = mkstemp(path);
    lfm2_error err = { 0 };
    lfm2_model *m;

    ck_assert(fd >= 0 && write(fd, file.p, file.n) == (ssize_t)file.n);
    close(fd);
    EXPECT_MSG(lfm2_model_open(&m, path, LFM2_LOAD_MAP, &err) == LFM2_OK, "%s",
               err.msg);
    ck_assert_int_eq(unlink(path), 0);
    take_step(m, &err);
    lfm2_model_close(m);
    free(file.p);
}
END_TEST

/* What a file can say that is larger than memory should be: its end is a hole.
 * The code of opening it. */
static int open_large(const struct tiny *t, off_t size, lfm2_error *err)
{
    struct bytes file = tiny_model(t);
    char path[] = "/tmp/lfm2-large-XXXXXX";
    const int fd = mkstemp(path);
    lfm2_model *m;
    int code;

    ck_assert(fd >= 0 && write(fd, file.p, file.n) == (ssize_t)file.n);
    ck_assert_int_eq(ftruncate(fd, size), 0);
    close(fd);
    code = lfm2_model_open(&m, path, LFM2_LOAD_MAP, err);
    unlink(path);
    lfm2_model_close(m);
    free(file.p);
    return code;
}

/* Where numbers have 32 bits, two of these are as many elements as there are
 * numbers, in less bytes; elsewhere, four are more than memory should hold. */
START_TEST(vectors_that_nobody_uses_take_no_memory)
{
    enum { N = sizeof(size_t) < 8 ? 2 : 4, COLS = INT32_MAX / 256 * 256 };
    static const char *const name[] = { "v.0", "v.1", "v.2", "v.3" };
    const uint64_t each = COLS / 256 * 84 / 32 * 32 + 32;
    struct edit edits[4 * N + 1] = { { 0 } };
    lfm2_error err = { 0 };

    for (int i = 0; i < N; i++) {
        struct edit *e = edits + 4 * i;
        e[0] = (struct edit){ ADD_TENSOR, name[i], 0, 0, 0, 0 };
        e[1] = (struct edit){ DIM, name[i], 0, COLS, 0, 0 };
        e[2] = (struct edit){ TYPE, name[i], 0, 10, 0, 0 };       /* Q2_K    */
        e[3] = (struct edit){ OFFSET, name[i], 0,
                              (1 << 24) + (uint64_t)i * each, 0, 0 };
    }
    EXPECT_MSG(open_large(&(struct tiny){ .edits = edits },
                          (off_t)((1 << 24) + (1 << 20) + N * each), &err)
               == LFM2_OK, "%s", err.msg);
}
END_TEST

START_TEST(a_width_fits_in_a_number_twice_over)
{
    const struct edit edits[3] = {
        { DIM, "token_embd.weight", 1, (1 << 24) + 1, 0, 0 },
        { OFFSET, "token_embd.weight", 0, 1 << 24, 0, 0 }
    };
    lfm2_error err = { 0 };

    ck_assert_int_eq(open_large(&(struct tiny){ .type = 2, .edits = edits },
                                640 << 20, &err), LFM2_EFORMAT);
    ck_assert_str_eq(err.msg, "token_embd.weight: 16777217 rows, expected 1 to "
                     "16777216");
}
END_TEST

struct changing { volatile uint8_t *byte; atomic_int stop; };

static void *change_it(void *arg)
{
    struct changing *c = arg;

    for (int i = 0; !atomic_load(&c->stop); i++)
        *c->byte = i / 3000 % 2 ? 2 : 0;
    return NULL;
}

/* A mapped file may be written to at any time.  Here the heads of the one layer
 * that attends come and go between one look at them and the next. */
START_TEST(a_file_may_change_while_it_is_opened)
{
    static const char key[] = "lfm2.attention.head_count_kv";
    struct edit edits[2] = {
        { SET_ARRAY, "lfm2.attention.head_count_kv", T_I32, 4, 0, 0 }
    };
    struct bytes file = tiny_model(&(struct tiny){ .edits = edits });
    struct changing c = { file.p, 0 };
    pthread_t thread;
    lfm2_error err;
    lfm2_model *m;

    while (memcmp((const uint8_t *)c.byte, key, strlen(key)) != 0)
        c.byte++;
    c.byte += strlen(key) + 4 + 4 + 8 + 4;
    ck_assert_int_eq(pthread_create(&thread, NULL, change_it, &c), 0);
    for (int i = 0; i < 10000; i++)
        if (open_bytes(file, &m, &err) == LFM2_OK)
            lfm2_model_close(m);
    atomic_store(&c.stop, 1);
    pthread_join(thread, NULL);
    free(file.p);
}
END_TEST

Suite *gguf_suite(void)
{
    Suite *s = suite_create("gguf");
    TCase *c = tcase_create("gguf");

    tcase_set_timeout(c, 300);
    tcase_add_loop_test(c, good_files_open_without_a_word, 0,
                        (int)COUNT(good));
    tcase_add_test(c, a_scalar_head_count_means_attention_everywhere);
    tcase_add_loop_test(c, harmless_oddities_are_tolerated_and_reported, 0,
                        (int)COUNT(tolerated));
    tcase_add_loop_test(c, broken_files_are_refused_with_the_right_sentence, 0,
                        (int)COUNT(broken));
    tcase_add_loop_test(c, pairs_of_oddities_are_judged_together, 0,
                        (int)COUNT(pairs));
    tcase_add_test(c, offsets_may_decrease);
    tcase_add_test(c, every_cut_of_a_file_is_refused);
    tcase_add_test(c, what_follows_the_data_does_no_harm);
    tcase_add_loop_test(c, random_damage_is_survived, 0, 2);
    tcase_add_test(c, what_is_no_readable_file_is_an_io_error);
    tcase_add_test(c, what_may_not_be_read_is_an_io_error);
    tcase_add_test(c, a_file_that_vanishes_while_mapped_is_still_there);
    tcase_add_test(c, vectors_that_nobody_uses_take_no_memory);
    tcase_add_test(c, a_width_fits_in_a_number_twice_over);
    tcase_add_test(c, a_file_may_change_while_it_is_opened);
    suite_add_tcase(s, c);
    return s;
}
