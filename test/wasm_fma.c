/* The multiply-add of the kernels for WebAssembly, which has none, against that
 * of the scalar code: numbers of all sizes, and those whose sum is halfway
 * between two floats, or almost.  (fmaf() of the C library there rounds some of
 * these wrongly.)  See test/bits.sh. */
#include "../lfm2.c"

static uint64_t state = 1;

static uint32_t next(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

/* Random bits, few of them set in the fraction, near 1, or strange. */
static float any(int how)
{
    static const uint32_t odd[] = {
        0, 0x80000000, 1, 0x007fffff, 0x00800000, 0x7f7fffff, 0x7f800000,
        0xff800000, 0x7fc00000, 0x3f800000, 0x33800000, 0x4b800000
    };
    const uint32_t u = next();

    switch (how & 3) {
    case 0: return float_of(u);
    case 1: return float_of((u & 0x87ffffff) | 0x38000000);
    case 2: return float_of((u & 0xff800000) | 1u << next() % 23);
    default: return float_of(odd[u % COUNT(odd)]);
    }
}

/* c so that a * b + c is halfway between two floats: the product less one of
 * its nearest floats, moved by half a unit of something larger. */
static float halfway(float a, float b)
{
    const double p = (double)a * b;
    const float near = (float)p;
    return next() & 1 ? (float)(near - p) : near * (float)(1 << next() % 26);
}

int main(void)
{
    int failed = 0;

    for (int round = 0; round < 4000000; round++) {
        float in[3][4], out[4];
        floats_simd128 v[3];
        for (int i = 0; i < 4; i++) {
            in[0][i] = any((int)next());
            in[1][i] = any((int)next());
            in[2][i] = next() & 1 ? any((int)next())
                                  : halfway(in[0][i], in[1][i]);
        }
        memcpy(v, in, sizeof v);
        v[0] = fma_simd128(v[0], v[1], v[2]);
        memcpy(out, v, sizeof out);
        for (int i = 0; i < 4; i++) {
            const float a = in[0][i], b = in[1][i], c = in[2][i];
            const float is = fma_f32(a, b, c);
            if (bits_of(is) != bits_of(out[i]) && (is == is || out[i] == out[i])
                && failed++ < 9)
                printf("%a * %a + %a: %a, expected %a\n", (double)a, (double)b,
                       (double)c, (double)out[i], (double)is);
        }
    }
    return failed > 0;
}
