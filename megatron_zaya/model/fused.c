/* What stands between the matrix products of a ZAYA layer, in one pass over memory each: fp32, on a CPU.

   torch runs such an operation as several kernels, and each reads and writes the whole tensor. Here a row stays in the
   processor's cache until all is done with it. The formulas are those of derivatives.py and attention_derivatives.py,
   which hold the plain torch versions; T rows (tokens), H or F or D columns, everything contiguous unless a stride is
   given.

   Rows are handled in blocks of 128. A sum over all rows comes back as one part per block, which the caller adds up:
   the result does not depend on the number of threads. The threads are those of torch: this file is compiled with
   OpenMP, but not linked against a library of it, so that it finds the one that torch has loaded (fused.py).

   Plain C without Python's headers; called through ctypes, which releases Python's lock. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t count;

enum { BLOCK = 128, WORTH_A_THREAD = 1 << 15 }; /* rows; elements */

#if defined(__x86_64__) && defined(__gnu_linux__)
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))
#define VECTORISED _Pragma("omp simd")

/* Runs `call` for every block of `n` rows that starts at row `at`, of `rows` rows of `width` elements in scope. */
#define FOR_BLOCKS(call)                                                                                               \
    _Pragma("omp parallel for schedule(static) if (rows * width > WORTH_A_THREAD)")                                    \
    for (count block = 0; block < (rows + BLOCK - 1) / BLOCK; block++) {                                               \
        count at = block * BLOCK, n = rows - at < BLOCK ? rows - at : BLOCK;                                           \
        call;                                                                                                          \
    }

/* ---- root-mean-square norm: out = x * inverse * weight, inverse = 1 / sqrt(mean(x^2) + eps) ---- */

EACH_PROCESSOR
static void norm_forward(const float *restrict x, const float *restrict weight, float eps, float *restrict out,
                         float *restrict inverse, count rows, count width) {
    for (count row = 0; row < rows; row++, x += width, out += width) {
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (count i = 0; i < width; i++)
            square += x[i] * x[i];
        float scale = inverse[row] = 1 / sqrtf(square / (float)width + eps);
        VECTORISED
        for (count i = 0; i < width; i++)
            out[i] = x[i] * scale * weight[i];
    }
}

EACH_PROCESSOR
static void norm_backward(const float *restrict grad, const float *restrict x, const float *restrict weight,
                          const float *restrict inverse, float *restrict grad_x, float *restrict grad_weight,
                          count rows, count width) {
    memset(grad_weight, 0, (size_t)width * sizeof(float));
    for (count row = 0; row < rows; row++, grad += width, x += width, grad_x += width) {
        float along = 0, scale = inverse[row];
#pragma omp simd reduction(+ : along)
        for (count i = 0; i < width; i++)
            along += grad[i] * weight[i] * x[i];
        along *= scale * scale / (float)width;
        VECTORISED
        for (count i = 0; i < width; i++) {
            grad_weight[i] += grad[i] * x[i] * scale;
            grad_x[i] = (grad[i] * weight[i] - x[i] * along) * scale;
        }
    }
}

/* `inverse` [T]. */
void zaya_norm(const float *x, const float *weight, float eps, float *out, float *inverse, count rows, count width) {
    FOR_BLOCKS(norm_forward(x + at * width, weight, eps, out + at * width, inverse + at, n, width))
}

/* `grad_weight` [blocks, H]. */
void zaya_norm_backward(const float *grad, const float *x, const float *weight, const float *inverse, float *grad_x,
                        float *grad_weight, count rows, count width){
    FOR_BLOCKS(norm_backward(grad + at * width, x + at * width, weight, inverse + at, grad_x + at * width,
                             grad_weight + block * width, n, width))
}

/* ---- scaled sum: out = constant + a * a_scale + b * b_scale ---- */

EACH_PROCESSOR static void sum_forward(const float *restrict a, const float *restrict a_scale, const float *restrict b,
                                       const float *restrict b_scale, const float *restrict constant,
                                       float *restrict out, count rows, count width) {
    for (count row = 0; row < rows; row++, a += width, b += width, out += width)
        VECTORISED
    for (count i = 0; i < width; i++)
        out[i] = constant[i] + a[i] * a_scale[i] + b[i] * b_scale[i];
}

EACH_PROCESSOR
static void sum_backward(const float *restrict grad, const float *restrict a, const float *restrict a_scale,
                         const float *restrict b, const float *restrict b_scale, float *restrict grad_a,
                         float *restrict grad_b, float *restrict sums, count rows, count width) {
    float *restrict plain = sums, *restrict with_a = sums + width, *restrict with_b = sums + 2 * width;
    memset(sums, 0, 3 * (size_t)width * sizeof(float));
    for (count row = 0; row < rows; row++, grad += width, a += width, b += width, grad_a += width, grad_b += width)
        VECTORISED
    for (count i = 0; i < width; i++) {
        plain[i] += grad[i];
        with_a[i] += grad[i] * a[i];
        with_b[i] += grad[i] * b[i];
        grad_a[i] = grad[i] * a_scale[i];
        grad_b[i] = grad[i] * b_scale[i];
    }
}

void zaya_scaled_sum(const float *a, const float *a_scale, const float *b, const float *b_scale, const float *constant,
                     float *out, count rows, count width) {
    FOR_BLOCKS(sum_forward(a + at * width, a_scale, b + at * width, b_scale, constant, out + at * width, n, width))
}

/* `sums` [blocks, 3, H]: of grad, grad * a and grad * b over the rows. */
void zaya_scaled_sum_backward(const float *grad, const float *a, const float *a_scale, const float *b,
                              const float *b_scale, float *grad_a, float *grad_b, float *sums, count rows, count width){
    FOR_BLOCKS(sum_backward(grad + at * width, a + at * width, a_scale, b + at * width, b_scale, grad_a + at * width,
                            grad_b + at * width, sums + block * 3 * width, n, width))
}

/* ---- weighted SwiGLU: out = weight * silu(gate) * up, of rows [gate | up] ---- */

/* exp(x) for x <= 0, relative error below 2e-7 down to -87, where it stays: 2^n * 2^f, f in [-1/2, 1/2], the second
   factor as the Taylor series of e^(f ln 2). Adding 1.5 * 2^23 rounds to an integer. */
INLINE float exp_of_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float whole = (x * 1.44269504089f + 12582912.0f) - 12582912.0f;
    float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f; /* ln 2 in two parts: the first is exact */
    float series = 1.0f / 5040;
    series = series * rest + 1.0f / 720;
    series = series * rest + 1.0f / 120;
    series = series * rest + 1.0f / 24;
    series = series * rest + 1.0f / 6;
    series = series * rest + 0.5f;
    series = series * rest + 1.0f;
    series = series * rest + 1.0f;
    int32_t exponent = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &exponent, sizeof power);
    return series * power;
}

INLINE float sigmoid(float x) {
    float small = exp_of_negative(-fabsf(x));
    return (x < 0 ? small : 1.0f) / (1.0f + small);
}

EACH_PROCESSOR
static void swiglu_forward(const float *restrict gate_up, const float *restrict weight, float *restrict out, count rows,
                           count width) {
    for (count row = 0; row < rows; row++, gate_up += 2 * width, out += width) {
        const float *restrict up = gate_up + width;
        float factor = weight[row];
        VECTORISED
        for (count i = 0; i < width; i++)
            out[i] = gate_up[i] * sigmoid(gate_up[i]) * up[i] * factor;
    }
}

EACH_PROCESSOR
static void swiglu_backward(const float *restrict grad, const float *restrict gate_up, const float *restrict weight,
                            float *restrict grad_gate_up, float *restrict grad_weight, count rows, count width) {
    for (count row = 0; row < rows; row++, grad += width, gate_up += 2 * width, grad_gate_up += 2 * width) {
        const float *restrict up = gate_up + width;
        float *restrict grad_up = grad_gate_up + width;
        float factor = weight[row], sum = 0;
#pragma omp simd reduction(+ : sum)
        for (count i = 0; i < width; i++) {
            float gated = sigmoid(gate_up[i]), silu = gate_up[i] * gated;
            sum += grad[i] * silu * up[i];
            grad_up[i] = grad[i] * factor * silu;
            grad_gate_up[i] = grad[i] * factor * up[i] * (gated + silu * (1 - gated));
        }
        grad_weight[row] = sum;
    }
}

/* `gate_up` [T, 2F], `weight` [T], `out` [T, F]. */
void zaya_swiglu(const float *gate_up, const float *weight, float *out, count rows, count width) {
    FOR_BLOCKS(swiglu_forward(gate_up + 2 * at * width, weight + at, out + at * width, n, width))
}

void zaya_swiglu_backward(const float *grad, const float *gate_up, const float *weight, float *grad_gate_up,
                          float *grad_weight, count rows, count width) {
    FOR_BLOCKS(swiglu_backward(grad + at * width, gate_up + 2 * at * width, weight + at, grad_gate_up + 2 * at * width,
                               grad_weight + at, n, width))
}

/* ---- rows by index: out[t] = x[index[t]], zero where the index is not below `limit` ---- */

void zaya_gather_rows(const float *x, const count *index, count limit, float *out, count rows, count width) {
    size_t bytes = (size_t)width * sizeof(float);
    FOR_BLOCKS(for (count row = at; row < at + n; row++) {
        if (index[row] < limit)
            memcpy(out + row * width, x + index[row] * width, bytes);
        else
            memset(out + row * width, 0, bytes);
    })
}

/* ---- heads of attention: out = rotated(length * s / |s|), s = convolved + mean coupling of the plain heads ----

   Query heads come first, then key heads, X in all. Each query is averaged with its key; each key becomes the mean of
   its group of those averages. */

typedef struct {
    count queries, keys, width; /* D */
    count half;                 /* pairs (i, i + half) that are rotated */
    count repeat;               /* tokens that share one row of angles */
    count plain_stride;         /* elements from one token of `plain` and its gradient to the next */
    count tokens;               /* T: convolved and its gradient are [X, T, D] */
} shape;

EACH_PROCESSOR
static void heads_forward(const shape *restrict s, count first, count end, const float *restrict convolved,
                          const float *restrict plain, const float *restrict length, const float *restrict cosine,
                          const float *restrict sine, float *restrict out, float *restrict sum,
                          float *restrict inverse) {
    count width = s->width, half = s->half, heads = s->queries + s->keys, group = s->queries / s->keys;
    float share = 0.5f / (float)group;
    for (count token = first; token < end; token++) {
        const float *restrict own = plain + token * s->plain_stride;
        float *restrict sums = sum + token * heads * width;
        for (count head = 0; head < heads; head++) {
            const float *restrict from = convolved + (head * s->tokens + token) * width;
            VECTORISED
            for (count i = 0; i < width; i++)
                sums[head * width + i] = from[i] + 0.5f * own[head * width + i];
        }
        for (count query = 0; query < s->queries; query++) {
            count key = s->queries + query / group;
            VECTORISED
            for (count i = 0; i < width; i++) {
                sums[query * width + i] += 0.5f * own[key * width + i];
                sums[key * width + i] += share * own[query * width + i];
            }
        }
        const float *restrict c = cosine + token / s->repeat * half, *restrict d = sine + token / s->repeat * half;
        for (count head = 0; head < heads; head++) {
            const float *restrict x = sums + head * width;
            float *restrict y = out + (token * heads + head) * width, square = 0;
#pragma omp simd reduction(+ : square)
            for (count i = 0; i < width; i++)
                square += x[i] * x[i];
            float norm = sqrtf(square), scale = 1 / (norm < 1.1920929e-7f ? 1.1920929e-7f : norm);
            inverse[token * heads + head] = scale;
            scale *= length[head];
            VECTORISED
            for (count i = 0; i < half; i++) {
                float a = x[i] * scale, b = x[i + half] * scale;
                y[i] = a * c[i] - b * d[i];
                y[i + half] = b * c[i] + a * d[i];
            }
            VECTORISED
            for (count i = 2 * half; i < width; i++)
                y[i] = x[i] * scale;
        }
    }
}

EACH_PROCESSOR
static void heads_backward(const shape *restrict s, count first, count end, const float *restrict grad,
                           const float *restrict sum, const float *restrict inverse, const float *restrict length,
                           const float *restrict cosine, const float *restrict sine, float *restrict grad_convolved,
                           float *restrict grad_plain, float *restrict grad_length) {
    count width = s->width, half = s->half, heads = s->queries + s->keys, group = s->queries / s->keys;
    float share = 0.5f / (float)group;
    memset(grad_length, 0, (size_t)heads * sizeof(float));
    for (count token = first; token < end; token++) {
        const float *restrict c = cosine + token / s->repeat * half, *restrict d = sine + token / s->repeat * half;
        float *restrict own = grad_plain + token * s->plain_stride;
        for (count head = 0; head < heads; head++) {
            const float *restrict g = grad + (token * heads + head) * width;
            const float *restrict x = sum + (token * heads + head) * width;
            float *restrict y = grad_convolved + (head * s->tokens + token) * width;
            float turn = inverse[token * heads + head], along = 0;
            VECTORISED
            for (count i = 0; i < half; i++) {
                y[i] = g[i] * c[i] + g[i + half] * d[i];
                y[i + half] = g[i + half] * c[i] - g[i] * d[i];
            }
            VECTORISED
            for (count i = 2 * half; i < width; i++)
                y[i] = g[i];
#pragma omp simd reduction(+ : along)
            for (count i = 0; i < width; i++)
                along += y[i] * x[i];
            along *= turn;
            grad_length[head] += along;
            float scale = turn * length[head];
            float back = turn < 8388608.0f ? along * scale * turn : 0; /* a clamped norm is a constant */
            VECTORISED
            for (count i = 0; i < width; i++) {
                y[i] = y[i] * scale - x[i] * back;
                own[head * width + i] = 0.5f * y[i];
            }
        }
        for (count query = 0; query < s->queries; query++) {
            count key = s->queries + query / group;
            const float *restrict of_query = grad_convolved + (query * s->tokens + token) * width;
            const float *restrict of_key = grad_convolved + (key * s->tokens + token) * width;
            VECTORISED
            for (count i = 0; i < width; i++) {
                own[query * width + i] += share * of_key[i];
                own[key * width + i] += 0.5f * of_query[i];
            }
        }
    }
}

/* `convolved` [X, T, D]; `plain` and its gradient [T, X, D] with a stride; `length` [X]; `cosine`, `sine`
   [T / repeat, half]; `out`, `sum` [T, X, D]; `inverse` [T, X]. */
void zaya_heads(const shape *s, const float *convolved, const float *plain, const float *length, const float *cosine,
                const float *sine, float *out, float *sum, float *inverse) {
    count rows = s->tokens, heads = s->queries + s->keys, width = heads * s->width;
    FOR_BLOCKS(heads_forward(s, at, at + n, convolved, plain, length, cosine, sine, out, sum, inverse))
}

/* `grad` [T, X, D]; `grad_convolved` [X, T, D]; `grad_length` [blocks, X]. */
void zaya_heads_backward(const shape *s, const float *grad, const float *sum, const float *inverse, const float *length,
                         const float *cosine, const float *sine, float *grad_convolved, float *grad_plain,
                         float *grad_length) {
    count rows = s->tokens, heads = s->queries + s->keys, width = heads * s->width;
    FOR_BLOCKS(heads_backward(s, at, at + n, grad, sum, inverse, length, cosine, sine, grad_convolved, grad_plain,
                              grad_length + block * heads))
}

/* ---- two convolutions in a row as one: weight[a + b] += first[a] second[b], for one stream of heads ----

   `first` [C, taps0] and `second` [C, D, taps1] (out before in) as torch's Conv1d keeps them; the weight of the result
   is [taps, heads, in, out] with `stride` elements from one tap to the next, its bias [heads, D]. */

void zaya_merge(const float *first, const float *first_bias, const float *second, const float *second_bias,
                float *weight, float *bias, count heads, count width, count taps0, count taps1, count stride) {
#pragma omp parallel for schedule(static)
    for (count head = 0; head < heads; head++) {
        count at = head * width;
        memcpy(bias + at, second_bias + at, (size_t)width * sizeof(float));
        for (count tap = 0; tap < taps0 + taps1 - 1; tap++)
            memset(weight + tap * stride + at * width, 0, (size_t)(width * width) * sizeof(float));
        for (count in = 0; in < width; in++)
            for (count b = 0; b < taps1; b++) {
                const float *from = second + (at * width + in) * taps1 + b; /* of out = 0 */
                for (count a = 0; a < taps0; a++) {
                    float factor = first[(at + in) * taps0 + a];
                    float *to = weight + (a + b) * stride + (at + in) * width;
                    VECTORISED
                    for (count out = 0; out < width; out++)
                        to[out] += factor * from[out * width * taps1];
                }
                VECTORISED
                for (count out = 0; out < width; out++)
                    bias[at + out] += first_bias[at + in] * from[out * width * taps1];
            }
    }
}

/* The gradient of `second_bias` is that of the bias. */
void zaya_merge_backward(const float *grad, const float *grad_bias, const float *first, const float *first_bias,
                         const float *second, float *grad_first, float *grad_first_bias, float *grad_second,
                         count heads, count width, count taps0, count taps1, count stride) {
#pragma omp parallel for schedule(static)
    for (count head = 0; head < heads; head++) {
        count at = head * width;
        memset(grad_first + at * taps0, 0, (size_t)(width * taps0) * sizeof(float));
        memset(grad_first_bias + at, 0, (size_t)width * sizeof(float));
        for (count in = 0; in < width; in++)
            for (count b = 0; b < taps1; b++) {
                const float *other = second + (at * width + in) * taps1 + b;
                float *to = grad_second + (at * width + in) * taps1 + b, sum = 0;
#pragma omp simd reduction(+ : sum)
                for (count out = 0; out < width; out++) {
                    sum += grad_bias[at + out] * other[out * width * taps1];
                    to[out * width * taps1] = grad_bias[at + out] * first_bias[at + in];
                }
                grad_first_bias[at + in] += sum;
                for (count a = 0; a < taps0; a++) {
                    const float *from = grad + (a + b) * stride + (at + in) * width;
                    float factor = first[(at + in) * taps0 + a], product = 0;
#pragma omp simd reduction(+ : product)
                    for (count out = 0; out < width; out++) {
                        product += from[out] * other[out * width * taps1];
                        to[out * width * taps1] += factor * from[out];
                    }
                    grad_first[(at + in) * taps0 + a] += product;
                }
            }
    }
}
