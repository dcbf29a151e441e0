/* reference.h - LFM2 a second time, in double precision.
 *
 * Written from the equations and the block layouts alone, sharing nothing with
 * lfm2.c: no cache, no batch, no threads, no rounding of activations, and no
 * doubt about the file.  What it computes is what the weights mean; how far
 * lfm2.c may be from that is for the tests to say. */
#ifndef REFERENCE_H
#define REFERENCE_H

#include <stddef.h>
#include <stdint.h>

/* Rows of the vocabulary of a GGUF file in memory. */
int ref_n_vocab(const uint8_t *file);

/* The logits after each of the n tokens: out[n][n_vocab]. */
void ref_logits(const uint8_t *file, const int32_t *tokens, int n,
                double *out);

/* The same, telling of every activation on the way, [n] of token t, under the
 * name that lfm2_trace() has for it; of experts, whether chosen or not; and of
 * "feed_forward.all_weights", [n_expert], 0 for those that are not chosen. */
typedef void ref_show_fn(void *user, const char *name, int t, const double *x,
                         int n);
void ref_trace(const uint8_t *file, const int32_t *tokens, int n, double *out,
               ref_show_fn *fn, void *user);

/* The n weights in the blocks at p, of a GGUF weight type: out[n]. */
void ref_weights(uint32_t type, const uint8_t *p, size_t n, double *out);

/* The shape of a weight type: columns and bytes of one block. */
int ref_block_columns(uint32_t type);
int ref_block_bytes(uint32_t type);

#endif
