/* Small dense products and the elementwise functions of a memory network, on one thread.
 *
 * REAL is float or double. Vectors are as wide as the processor's; every matrix is row-major.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define BYTES 64
enum { ROWS = 8 };
#elif defined(__AVX__)
#define BYTES 32
enum { ROWS = 6 };
#else
#define BYTES 16
enum { ROWS = 6 };
#endif

typedef REAL V __attribute__((vector_size(BYTES)));
typedef REAL Unaligned
    __attribute__((vector_size(BYTES), aligned(__alignof__(REAL)), may_alias));
#if REAL_IS_DOUBLE
typedef int64_t I __attribute__((vector_size(BYTES)));
#else
typedef int32_t I __attribute__((vector_size(BYTES)));
#endif
#define INLINE static inline __attribute__((always_inline))

enum {
    LANES = BYTES / sizeof(REAL),
    WIDTH = 2 * LANES, /* columns of a register tile */
    DEPTH = 256        /* rows of a packed panel */
};

INLINE V load(const REAL *p) { return *(const Unaligned *)p; }
INLINE void store(REAL *p, V x) { *(Unaligned *)p = x; }
INLINE V fill(REAL x) { return (V){0} + x; }

/* `count` <= LANES numbers, the rest zero. */
INLINE V load_some(const REAL *p, int count) {
    if (count == LANES) return load(p);
    V x = {0};
    memcpy(&x, p, count * sizeof(REAL));
    return x;
}

INLINE void store_some(REAL *p, V x, int count) {
    if (count == LANES)
        store(p, x);
    else
        memcpy(p, &x, count * sizeof(REAL));
}

INLINE int least(int a, int b) { return a < b ? a : b; }

/* One register tile: rows x WIDTH of C = [C +] alpha A B, with B in a packed panel. */
INLINE void tile(int rows, int depth, REAL alpha, const REAL *a, int64_t row, int64_t column,
                 const REAL *panel, int add, REAL *c, int64_t ldc, int width) {
    V sum[ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = fill(0);
    for (int p = 0; p < depth; p++) {
        const V left = *(const V *)(panel + p * WIDTH);
        const V right = *(const V *)(panel + p * WIDTH + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const REAL x = a[i * row + p * column];
            sum[i][0] += left * x;
            sum[i][1] += right * x;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int count = least(LANES, width - half * LANES);
            if (count > 0) {
                REAL *at = c + i * ldc + half * LANES;
                V value = sum[i][half] * alpha;
                if (add) value += load_some(at, count);
                store_some(at, value, count);
            }
        }
    }
}

#define TILE(n) \
    case n: tile(n, depth, alpha, a, row, column, panel, add, c, ldc, width); break;

static void tiles(int rows, int depth, REAL alpha, const REAL *a, int64_t row, int64_t column,
                  const REAL *panel, int add, REAL *c, int64_t ldc, int width) {
    switch (rows) {
        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if BYTES == 64
        TILE(7) TILE(8)
#endif
    }
}

/* LANES x LANES numbers of b (leading size ldb), transposed into the panel. */
static void pack_block(const REAL *b, int64_t ldb, REAL *panel) {
#ifdef __clang__
    for (int j = 0; j < LANES; j++)
        for (int p = 0; p < LANES; p++) panel[p * WIDTH + j] = b[j * ldb + p];
#else
    V x[LANES];
    I lane;
    for (int j = 0; j < LANES; j++) {
        x[j] = load(b + j * ldb);
        lane[j] = j;
    }
    /* Blocks of 1, 2, 4, ... lanes change places across the diagonal. */
#pragma GCC unroll 4
    for (int span = 1; span < LANES; span *= 2) {
        const I odd = ((lane & span) != 0) & (LANES - span), low = lane + odd, high = low + span;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & span)) {
                const V first = x[i], second = x[i + span];
                x[i] = __builtin_shuffle(first, second, low);
                x[i + span] = __builtin_shuffle(first, second, high);
            }
    }
#pragma GCC unroll 16
    for (int p = 0; p < LANES; p++) *(V *)(panel + p * WIDTH) = x[p];
#endif
}

static void pack(int transposed, const REAL *b, int64_t ldb, int depth, int width, REAL *panel) {
    if (width < WIDTH) memset(panel, 0, sizeof(REAL) * depth * WIDTH);
    if (!transposed) {
        for (int p = 0; p < depth; p++)
            for (int j = 0; j < width; j += LANES)
                store_some(panel + p * WIDTH + j, load_some(b + p * ldb + j, least(LANES, width - j)),
                           least(LANES, width - j));
        return;
    }
    for (int j = 0; j < width; j += LANES) {
        int p = 0;
        if (width - j >= LANES)
            for (; p + LANES <= depth; p += LANES)
                pack_block(b + j * ldb + p, ldb, panel + p * WIDTH + j);
        for (; p < depth; p++)
            for (int i = j; i < least(j + LANES, width); i++)
                panel[p * WIDTH + i] = b[i * ldb + p];
    }
}

/* Products of numbers rounded to bf16, summed in float: twice as many a cycle where the processor
 * has them. A thread switches them on for the call it works on. */
#if defined(__AVX512BF16__) && !REAL_IS_DOUBLE
#include <immintrin.h>
enum { HAS_BF16 = 1, MOST_ROWS = 64 };
#else
enum { HAS_BF16 = 0 };
#endif
static _Thread_local int use_bf16;

#if defined(__AVX512BF16__) && !REAL_IS_DOUBLE
/* Two numbers in one word, the first in the lower half, rounded to the nearest even. */
INLINE I pair(V first, V second) {
    const I low = (I)first, high = (I)second;
    const I rounded_low = low + 0x7fff + ((low >> 16) & 1), rounded_high = high + 0x7fff + ((high >> 16) & 1);
    return (I)((__v16su)rounded_low >> 16) | (rounded_high & (int32_t)0xffff0000);
}

/* The panel of `pack` with rows 2 p and 2 p + 1 in one. */
static void pair_panel(const REAL *panel, int depth, I *pairs) {
    for (int p = 0; p < depth; p += 2)
        for (int half = 0; half < 2; half++) {
            const REAL *at = panel + p * WIDTH + half * LANES;
            pairs[p + half] = pair(load(at), p + 1 < depth ? load(at + WIDTH) : fill(0));
        }
}

/* Rows of op(A) (m x depth) as pairs: that of row i and numbers 2 p, 2 p + 1 is
 * pairs[i DEPTH / 2 + p], or pairs[p MOST_ROWS + i] if transposed, as both lie in memory. */
static void pair_rows(int transposed, const REAL *a, int64_t lda, int m, int depth, int32_t *pairs) {
    if (!transposed) {
        for (int i = 0; i < m; i++, a += lda)
            for (int p = 0; p < depth; p += 2 * LANES) {
                const V first = load_some(a + p, least(LANES, depth - p)), none = {0};
                const int more = least(LANES, depth - p - LANES);
                const V second = more > 0 ? load_some(a + p + LANES, more) : none;
                *(__m512bh *)(pairs + i * (DEPTH / 2) + p / 2) =
                    _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
            }
        return;
    }
    for (int p = 0; p < depth; p += 2, a += 2 * lda)
        for (int i = 0; i < m; i += LANES) {
            const int count = least(LANES, m - i);
            const V none = {0}, first = load_some(a + i, count);
            const V second = p + 1 < depth ? load_some(a + lda + i, count) : none;
            *(I *)(pairs + p / 2 * MOST_ROWS + i) = pair(first, second);
        }
}

INLINE void tile_bf16(int rows, int pairs, REAL alpha, const int32_t *a, int row, int column, const I *panel,
                      int add, REAL *c, int64_t ldc, int width) {
    __m512 sum[ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int p = 0; p < pairs; p++) {
        const __m512bh left = (__m512bh)panel[2 * p], right = (__m512bh)panel[2 * p + 1];
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(a[i * row + p * column]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, left);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, right);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int count = least(LANES, width - half * LANES);
            if (count > 0) {
                REAL *at = c + i * ldc + half * LANES;
                V value = (V)sum[i][half] * alpha;
                if (add) value += load_some(at, count);
                store_some(at, value, count);
            }
        }
    }
}

#define TILE_BF16(n) \
    case n: tile_bf16(n, pairs, alpha, a, row, column, panel, add, c, ldc, width); break;

static void tiles_bf16(int rows, int pairs, REAL alpha, const int32_t *a, int row, int column,
                       const I *panel, int add, REAL *c, int64_t ldc, int width) {
    switch (rows) {
        TILE_BF16(1) TILE_BF16(2) TILE_BF16(3) TILE_BF16(4)
        TILE_BF16(5) TILE_BF16(6) TILE_BF16(7) TILE_BF16(8)
    }
}

/* `product` in bf16; triangles are not made use of. */
static void product_bf16(int ta, int tb, int m, int n, int k, REAL alpha, const REAL *a, int64_t lda,
                         const REAL *b, int64_t ldb, int add, REAL *c, int64_t ldc) {
    _Alignas(BYTES) REAL panel[DEPTH * WIDTH];
    I pairs[DEPTH * WIDTH / LANES / 2];
    _Alignas(BYTES) int32_t left[MOST_ROWS * (DEPTH / 2)];
    const int row = ta ? 1 : DEPTH / 2, column = ta ? MOST_ROWS : 1;
    for (int top = 0; top < m; top += MOST_ROWS)
        for (int p = 0; p < k; p += DEPTH) {
            const int depth = least(DEPTH, k - p), keep = add || p > 0, rows = least(MOST_ROWS, m - top);
            pair_rows(ta, ta ? a + p * lda + top : a + top * lda + p, lda, rows, depth, left);
            for (int j = 0; j < n; j += WIDTH) {
                const int width = least(WIDTH, n - j);
                pack(tb, tb ? b + j * ldb + p : b + p * ldb + j, ldb, depth, width, panel);
                pair_panel(panel, depth, pairs);
                for (int i = 0; i < rows; i += ROWS)
                    tiles_bf16(least(ROWS, rows - i), (depth + 1) / 2, alpha, left + i * row, row, column, pairs,
                               keep, c + (top + i) * ldc + j, ldc, width);
            }
        }
}
#endif

/* What is known of a product: only the lower triangle of C is wanted (the rest is left as it is),
 * or op(A) is lower or upper triangular. */
typedef enum { FULL, LOWER_RESULT, LOWER_LEFT, UPPER_LEFT } Shape;

/* C (m x n) = [C +] alpha op(A) op(B); op transposes where `ta`, `tb` say so. */
static void product(Shape shape, int ta, int tb, int m, int n, int k, REAL alpha, const REAL *a,
                    int64_t lda, const REAL *b, int64_t ldb, int add, REAL *c, int64_t ldc) {
#if defined(__AVX512BF16__) && !REAL_IS_DOUBLE
    if (use_bf16) {
        product_bf16(ta, tb, m, n, k, alpha, a, lda, b, ldb, add, c, ldc);
        return;
    }
#endif
    _Alignas(BYTES) REAL panel[DEPTH * WIDTH];
    const int64_t row = ta ? 1 : lda, column = ta ? lda : 1;
    for (int p = 0; p < k; p += DEPTH) {
        const int depth = least(DEPTH, k - p), keep = add || p > 0;
        for (int j = 0; j < n; j += WIDTH) {
            const int width = least(WIDTH, n - j);
            pack(tb, tb ? b + j * ldb + p : b + p * ldb + j, ldb, depth, width, panel);
            for (int i = shape == LOWER_RESULT ? j / ROWS * ROWS : 0; i < m; i += ROWS) {
                const int rows = least(ROWS, m - i);
                int from = 0, to = depth;
                if (shape == LOWER_LEFT) to = least(depth, i + rows - p);
                if (shape == UPPER_LEFT && i > p) from = i - p;
                if (from >= to && keep) continue;
                tiles(rows, from < to ? to - from : 0, alpha, a + i * row + (p + from) * column, row,
                      column, panel + from * WIDTH, keep, c + i * ldc + j, ldc, width);
            }
        }
    }
}

/* y (1 x n) = [y +] alpha x W, W (k x n): every row of W is read once. */
static void row_product(int n, int k, REAL alpha, const REAL *x, const REAL *w, int add, REAL *y) {
    enum { SPAN = 8 };
    for (int j = 0; j < n; j += SPAN * LANES) {
        const int parts = least(SPAN, (n - j + LANES - 1) / LANES);
        V sum[SPAN];
        for (int i = 0; i < SPAN; i++) sum[i] = fill(0);
        if (n - j >= SPAN * LANES) {
            for (int p = 0; p < k; p++)
                for (int i = 0; i < SPAN; i++) sum[i] += load(w + (int64_t)p * n + j + i * LANES) * x[p];
        } else {
            for (int p = 0; p < k; p++)
                for (int i = 0; i < parts; i++)
                    sum[i] += load_some(w + (int64_t)p * n + j + i * LANES,
                                        least(LANES, n - j - i * LANES)) * x[p];
        }
        for (int i = 0; i < parts; i++) {
            const int count = least(LANES, n - j - i * LANES);
            REAL *at = y + j + i * LANES;
            V value = sum[i] * alpha;
            if (add) value += load_some(at, count);
            store_some(at, value, count);
        }
    }
}

INLINE REAL total(V x) {
    REAL sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

static REAL dot(int64_t n, const REAL *x, const REAL *y) {
    V sum[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) sum[j] += load(x + i + j * LANES) * load(y + i + j * LANES);
    REAL rest = 0;
    for (; i < n; i++) rest += x[i] * y[i];
    return total((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

/* y (1 x n) = [y +] alpha x W^T, W (n x k). */
static void row_product_transposed(int n, int k, REAL alpha, const REAL *x, const REAL *w, int add,
                                   REAL *y) {
    for (int j = 0; j < n; j++) {
        const REAL value = alpha * dot(k, x, w + (int64_t)j * k);
        y[j] = add ? y[j] + value : value;
    }
}

/* C (m x n) = [C +] alpha A B, contiguous. */
static void times(int m, int n, int k, REAL alpha, const REAL *a, const REAL *b, int add, REAL *c) {
    if (m == 1)
        row_product(n, k, alpha, a, b, add, c);
    else
        product(FULL, 0, 0, m, n, k, alpha, a, k, b, n, add, c, n);
}

/* C (m x n) = [C +] alpha A B^T, B (n x k). */
static void times_transposed(int m, int n, int k, REAL alpha, const REAL *a, const REAL *b, int add,
                             REAL *c) {
    if (m == 1)
        row_product_transposed(n, k, alpha, a, b, add, c);
    else
        product(FULL, 0, 1, m, n, k, alpha, a, k, b, k, add, c, n);
}

/* C (m x n) += alpha A^T B, A (k x m), B (k x n). */
static void add_outer(int m, int n, int k, REAL alpha, const REAL *a, const REAL *b, REAL *c) {
    if (k == 1)
        for (int i = 0; i < m; i++) {
            const REAL x = alpha * a[i];
            for (int j = 0; j < n; j++) c[(int64_t)i * n + j] += x * b[j];
        }
    else
        product(FULL, 1, 0, m, n, k, alpha, a, m, b, n, 1, c, n);
}

/* Between the tokens of a group, where only i <= t counts: C[t, i] = <a_t, b_i> ... */
static void causal_scores(int m, int k, const REAL *a, const REAL *b, REAL *c) {
    product(LOWER_RESULT, 0, 1, m, m, k, 1, a, k, b, k, 0, c, m);
}

/* ... C_t = [C_t +] alpha sum_i A[t, i] b_i, with zeros above A's diagonal ... */
static void causal_sum(int m, int n, REAL alpha, const REAL *a, const REAL *b, int add, REAL *c) {
    product(LOWER_LEFT, 0, 0, m, n, m, alpha, a, m, b, n, add, c, n);
}

/* ... and C_i = [C_i +] alpha sum_t A[t, i] b_t. */
static void causal_sum_transposed(int m, int n, REAL alpha, const REAL *a, const REAL *b, int add,
                                  REAL *c) {
    product(UPPER_LEFT, 1, 0, m, n, m, alpha, a, m, b, n, add, c, n);
}

/* Row t of y (m x n) = [y +] scale[t] * row t of x. */
static void scale_rows(int m, int n, const REAL *scale, const REAL *x, int add, REAL *y) {
    for (int t = 0; t < m; t++)
        for (int j = 0; j < n; j++) {
            const REAL value = scale[t] * x[(int64_t)t * n + j];
            y[(int64_t)t * n + j] = add ? y[(int64_t)t * n + j] + value : value;
        }
}

/* Activations: value, slope and curvature at z. */

#if REAL_IS_DOUBLE
INLINE V exponential(V x) {
    for (int i = 0; i < LANES; i++) x[i] = exp(x[i]);
    return x;
}

INLINE void normal(V z, V *density, V *cumulative) {
    *density = exponential(z * z * -0.5) * 0.3989422804014326779;
    for (int i = 0; i < LANES; i++) (*cumulative)[i] = 0.5 * erfc(z[i] * -0.7071067811865475244);
}
#else
INLINE V choose(I yes, V a, V b) { return (V)((yes & (I)a) | (~yes & (I)b)); }

/* 2^n e^r with |r| <= ln(2) / 2; Taylor's polynomial to r^7 is exact to half a unit there. */
INLINE V exponential(V x) {
    x = choose(x < -87.0f, fill(-87.0f), x);
    x = choose(x > 88.0f, fill(88.0f), x);
    const V shifted = x * 1.44269504f + 12582912.0f;
    const V n = shifted - 12582912.0f;
    const V r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    V p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (V)((__builtin_convertvector(n, I) + 127) << 23);
}

/* The upper tail is density * t * P(t), t = 1 / (1 + 0.26 |z|): P is the weighted least-squares
 * fit of degree 8 to Mills' ratio over t, relative error 2.5e-8 up to |z| = 14. */
INLINE void normal(V z, V *density, V *cumulative) {
    *density = exponential(z * z * -0.5f) * 0.398942280f;
    const I positive = z > 0.0f;
    const V t = 1.0f / (1.0f + 0.26f * choose(positive, z, -z));
    V p = t * 0.07646467f - 0.3830863f;
    p = p * t + 0.63039767f;
    p = p * t - 0.37837569f;
    p = p * t + 0.40343827f;
    p = p * t + 0.12790669f;
    p = p * t + 0.25825873f;
    p = p * t + 0.25822468f;
    p = p * t + 0.26008539f;
    const V tail = *density * t * p;
    *cumulative = choose(positive, 1.0f - tail, tail);
}
#endif

INLINE void activation(int gelu, V z, V *value, V *slope, V *curvature) {
    if (gelu) {
        V density, cumulative;
        normal(z, &density, &cumulative);
        *value = z * cumulative;
        *slope = cumulative + z * density;
        *curvature = density * (2 - z * z);
    } else {
        const V s = 1 / (1 + exponential(-z));
        *value = z * s;
        *slope = s * (1 + z * (1 - s));
        *curvature = s * (1 - s) * (2 + z * (1 - 2 * s));
    }
}

static void activate(int gelu, int64_t n, const REAL *z, REAL *h) {
    for (int64_t i = 0; i < n; i += LANES) {
        const int count = n - i < LANES ? n - i : LANES;
        V value, slope, curvature;
        activation(gelu, load_some(z + i, count), &value, &slope, &curvature);
        store_some(h + i, value, count);
    }
}

/* y = x * activate'(z) */
static void times_slope(int gelu, int64_t n, const REAL *x, const REAL *z, REAL *y) {
    for (int64_t i = 0; i < n; i += LANES) {
        const int count = n - i < LANES ? n - i : LANES;
        V value, slope, curvature;
        activation(gelu, load_some(z + i, count), &value, &slope, &curvature);
        store_some(y + i, load_some(x + i, count) * slope, count);
    }
}

/* Of delta = back * activate'(z): grown *= activate'(z) (gradient of back), and
 * bent = grown * back * activate''(z), slopes = activate'(z). */
static void slope_backward(int gelu, int64_t n, const REAL *z, const REAL *back, REAL *grown,
                           REAL *bent, REAL *slopes) {
    for (int64_t i = 0; i < n; i += LANES) {
        const int count = n - i < LANES ? n - i : LANES;
        V value, slope, curvature;
        activation(gelu, load_some(z + i, count), &value, &slope, &curvature);
        const V g = load_some(grown + i, count);
        store_some(bent + i, g * load_some(back + i, count) * curvature, count);
        store_some(grown + i, g * slope, count);
        store_some(slopes + i, slope, count);
    }
}

/* LayerNorm without gain, row by row; `inverse` holds one inverse standard deviation a row. */
static void layer_norm(int m, int n, const REAL *z, REAL *normed, REAL *inverse) {
    for (int t = 0; t < m; t++, z += n, normed += n) {
        REAL mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
        for (int j = 0; j < n; j++) mean += z[j];
        mean /= n;
#pragma omp simd reduction(+ : square)
        for (int j = 0; j < n; j++) square += (z[j] - mean) * (z[j] - mean);
        inverse[t] = 1 / (REAL)sqrt(square / n + (REAL)1e-5);
        for (int j = 0; j < n; j++) normed[j] = (z[j] - mean) * inverse[t];
    }
}

/* Gradient of z from that of LayerNorm(z); in place where dz = slope. */
static void layer_norm_backward(int m, int n, const REAL *normed, const REAL *inverse,
                                const REAL *slope, REAL *dz) {
    for (int t = 0; t < m; t++, normed += n, slope += n, dz += n) {
        REAL mean = 0, along = 0;
#pragma omp simd reduction(+ : mean, along)
        for (int j = 0; j < n; j++) {
            mean += slope[j];
            along += slope[j] * normed[j];
        }
        mean /= n;
        along /= n;
        for (int j = 0; j < n; j++) dz[j] = inverse[t] * (slope[j] - mean - normed[j] * along);
    }
}
