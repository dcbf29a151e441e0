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

/* The n weights in the blocks at p, of a GGUF weight type: out[n]. */
void ref_weights(uint32_t type, const uint8_t *p, size_t n, double *out);

/* The shape of a weight type: columns and bytes of one block. */
int ref_block_columns(uint32_t type);
int ref_block_bytes(uint32_t type);

#endif
