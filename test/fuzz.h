/* Hostile input, target by target: what libFuzzer calls, and what replays files
 * without it. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

/* What must hold whatever the input is. */
#define REQUIRE(condition) \
    ((condition) ? (void)0 : fuzz_failed(__FILE__, __LINE__, #condition))

_Noreturn void fuzz_failed(const char *file, int line, const char *condition);

/* A copy of exactly n bytes, so that reading past them is found out; to be
 * released with free(). */
uint8_t *fuzz_copy(const uint8_t *data, size_t n);

/* FNV-1a, as states and sessions end with. */
uint64_t fuzz_hash(const uint8_t *p, size_t n);
uint64_t fuzz_hash_words(const uint8_t *p, size_t n);
/* Numbers are little-endian. */
void     fuzz_put(uint8_t *p, uint64_t value, int bytes);
uint64_t fuzz_get(const uint8_t *p, int bytes);

typedef void fuzz_target(const uint8_t *data, size_t n);

fuzz_target fuzz_gguf, fuzz_vocab, fuzz_text, fuzz_state;       /* lfm2.c    */
fuzz_target fuzz_json, fuzz_calls, fuzz_chat, fuzz_session, fuzz_batch,
            fuzz_serve, fuzz_schema, fuzz_inspect;              /* run.c     */

/* Change a GGUF in some places and leave it whole in all others; returns the
 * new size, at most max.  libFuzzer calls it by LLVMFuzzerCustomMutator(). */
size_t fuzz_mutate_gguf(uint8_t *data, size_t n, size_t max, unsigned seed);

/* Change some bytes: libFuzzer's, or one that knows less. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t n, size_t max);

#endif
