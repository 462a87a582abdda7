/* Attention and logits of a few query rows over many bfloat16 keys, in float32.
 *
 * Compiled by cpu_rows.py for fixed ROWS, KEY_DIM and VALUE_DIM (multiples of 16). Keys and values
 * are `[heads, tokens, dim]` with dense tokens; only the stride between heads is free. Every token
 * goes through the same instructions wherever it stands, so that equal keys give equal bits; and
 * the work is cut by its size alone, so that results do not depend on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define BLOCK 128 /* tokens whose logits stay in the first cache between keys and values */
#define PART (VALUE_DIM + 2) /* unnormalised output, peak, mass */
#define LOGIT_TOKENS 1024

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));

static inline vf widened(const uint16_t *from) {
    vh half;
    memcpy(&half, from, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

static inline float lane_sum(vf wide) {
    vf8 halves[2];
    memcpy(halves, &wide, sizeof halves);
    vf8 eight = halves[0] + halves[1];
    vf4 quarters[2];
    memcpy(quarters, &eight, sizeof quarters);
    vf4 four = quarters[0] + quarters[1];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* exp of what is not above 0, to float32 rounding (Cephes' polynomial); below -87 it is 2e-38. */
static inline vf exponential(vf x) {
    const vf lowest = (vf){0} - 87.0f;
    vi below = x < lowest;
    x = (vf)(((vi)x & ~below) | ((vi)lowest & below));
    vf n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}

/* softcap * tanh(logits / softcap), in place; 0 leaves them. */
static void cap_logits(float *logits, long tokens, float softcap) {
    if (softcap == 0.0f) return;
    const vi sign = (vi){0} + INT32_MIN;
    for (long token = 0; token < tokens; token += LANES) {
        vf x = {0};
        size_t bytes = (tokens - token < LANES ? tokens - token : LANES) * sizeof(float);
        memcpy(&x, logits + token, bytes);
        vf shrunk = exponential((vf)((vi)x | sign) * (2.0f / softcap));
        vf size = softcap * (1.0f - shrunk) / (1.0f + shrunk);
        x = (vf)((vi)size | ((vi)x & sign));
        memcpy(logits + token, &x, bytes);
    }
}

static void load_query(const uint16_t *query, vf wide[ROWS][KEY_DIM / LANES]) {
    for (int row = 0; row < ROWS; row++)
        for (int d = 0; d < KEY_DIM / LANES; d++)
            wide[row][d] = widened(query + row * KEY_DIM + d * LANES);
}

static inline void token_logits(
    vf query[ROWS][KEY_DIM / LANES], const uint16_t *key, float scale, float *out, long stride) {
    vf sum[ROWS];
    for (int row = 0; row < ROWS; row++) sum[row] = (vf){0};
#pragma GCC unroll 16
    for (int d = 0; d < KEY_DIM / LANES; d++) {
        vf wide = widened(key + d * LANES);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) sum[row] += query[row][d] * wide;
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) out[row * stride] = lane_sum(sum[row]) * scale;
}

/* out `[heads, ROWS, out_stride]` float32, of which the first `tokens` are written. */
void rows_logits(
    const uint16_t *query, const uint16_t *keys, long key_stride, long heads, long tokens,
    float scale, float softcap, float *out, long out_stride, int threads) {
    long parts = (tokens + LOGIT_TOKENS - 1) / LOGIT_TOKENS;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long item = 0; item < heads * parts; item++) {
        long head = item / parts, low = item % parts * LOGIT_TOKENS;
        long high = low + LOGIT_TOKENS < tokens ? low + LOGIT_TOKENS : tokens;
        vf wide[ROWS][KEY_DIM / LANES];
        load_query(query + head * ROWS * KEY_DIM, wide);
        const uint16_t *from = keys + head * key_stride;
        float *to = out + head * ROWS * out_stride;
        for (long token = low; token < high; token++)
            token_logits(wide, from + token * KEY_DIM, scale, to + token, out_stride);
        for (int row = 0; row < ROWS; row++)
            cap_logits(to + row * out_stride + low, high - low, softcap);
    }
}

static float softmax_block(float *logits, long tokens, float *peak, float *mass) {
    float top = *peak;
    for (long token = 0; token < tokens; token++) top = logits[token] > top ? logits[token] : top;
    for (long token = tokens; token % LANES; token++) logits[token] = -INFINITY;
    vf sum = {0};
    for (long token = 0; token < tokens; token += LANES) {
        vf weight;
        memcpy(&weight, logits + token, sizeof weight);
        weight = exponential(weight - top);
        memcpy(logits + token, &weight, sizeof weight);
        sum += weight;
    }
    float shrink = expf(*peak - top);
    *mass = *mass * shrink + lane_sum(sum);
    *peak = top;
    return shrink;
}

#define PAIR 2 /* rows whose sums fit into the registers */

static inline void add_values(
    const uint16_t *values, long tokens, const float *weights, int rows, vf *sums) {
    vf sum[PAIR][VALUE_DIM / LANES];
    for (int row = 0; row < rows; row++)
        for (int d = 0; d < VALUE_DIM / LANES; d++) sum[row][d] = sums[row * (VALUE_DIM / LANES) + d];
    for (long token = 0; token < tokens; token++) {
        const uint16_t *value = values + token * VALUE_DIM;
#pragma GCC unroll 16
        for (int d = 0; d < VALUE_DIM / LANES; d++) {
            vf wide = widened(value + d * LANES);
#pragma GCC unroll 2
            for (int row = 0; row < rows; row++) sum[row][d] += weights[row * BLOCK + token] * wide;
        }
    }
    for (int row = 0; row < rows; row++)
        for (int d = 0; d < VALUE_DIM / LANES; d++) sums[row * (VALUE_DIM / LANES) + d] = sum[row][d];
}

static void attend_part(
    const uint16_t *query, const uint16_t *keys, const uint16_t *values, long tokens, float scale,
    float softcap, float *part) {
    vf wide[ROWS][KEY_DIM / LANES], sums[ROWS][VALUE_DIM / LANES];
    float weights[ROWS][BLOCK], peak[ROWS], mass[ROWS];
    load_query(query, wide);
    memset(sums, 0, sizeof sums);
    for (int row = 0; row < ROWS; row++) peak[row] = -INFINITY, mass[row] = 0.0f;
    for (long low = 0; low < tokens; low += BLOCK) {
        long count = tokens - low < BLOCK ? tokens - low : BLOCK;
        for (long token = 0; token < count; token++)
            token_logits(wide, keys + (low + token) * KEY_DIM, scale, weights[0] + token, BLOCK);
        for (int row = 0; row < ROWS; row++) {
            cap_logits(weights[row], count, softcap);
            float shrink = softmax_block(weights[row], count, peak + row, mass + row);
            for (int d = 0; d < VALUE_DIM / LANES; d++) sums[row][d] *= shrink;
        }
        const uint16_t *from = values + low * VALUE_DIM;
        int row = 0;
        for (; row + PAIR <= ROWS; row += PAIR) add_values(from, count, weights[row], PAIR, sums[row]);
        if (row < ROWS) add_values(from, count, weights[row], 1, sums[row]);
    }
    for (int row = 0; row < ROWS; row++) {
        memcpy(part + row * PART, sums[row], sizeof sums[row]);
        part[row * PART + VALUE_DIM] = peak[row];
        part[row * PART + VALUE_DIM + 1] = mass[row];
    }
}

static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void merge_parts(const float *parts, long splits, uint16_t *out) {
    for (int row = 0; row < ROWS; row++) {
        float top = -INFINITY, mass = 0.0f, sum[VALUE_DIM] = {0};
        for (long split = 0; split < splits; split++) {
            float peak = parts[(split * ROWS + row) * PART + VALUE_DIM];
            top = peak > top ? peak : top;
        }
        for (long split = 0; split < splits; split++) {
            const float *part = parts + (split * ROWS + row) * PART;
            float weight = expf(part[VALUE_DIM] - top);
            mass += weight * part[VALUE_DIM + 1];
            for (int d = 0; d < VALUE_DIM; d++) sum[d] += weight * part[d];
        }
        for (int d = 0; d < VALUE_DIM; d++) out[row * VALUE_DIM + d] = rounded(sum[d] / mass);
    }
}

/* out `[heads, ROWS, VALUE_DIM]` bfloat16; parts has room for heads * splits * ROWS * PART. */
void rows_attend(
    const uint16_t *query, const uint16_t *keys, const uint16_t *values, long key_stride,
    long value_stride, long heads, long tokens, float scale, float softcap, float *parts,
    long splits, uint16_t *out, int threads) {
    long size = (tokens + splits - 1) / splits;
    splits = (tokens + size - 1) / size;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long item = 0; item < heads * splits; item++) {
        long head = item / splits, low = item % splits * size;
        long count = tokens - low < size ? tokens - low : size;
        attend_part(
            query + head * ROWS * KEY_DIM, keys + head * key_stride + low * KEY_DIM,
            values + head * value_stride + low * VALUE_DIM, count, scale, softcap,
            parts + item * ROWS * PART);
    }
    for (long head = 0; head < heads; head++)
        merge_parts(parts + head * splits * ROWS * PART, splits, out + head * ROWS * VALUE_DIM);
}
