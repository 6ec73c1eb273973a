/* What a memory layer does to each token around the rule, one pass over memory instead of one
 * for each operation (titans/ops/tokens.py says the same with torch operations):
 *
 *   mix:  z_t = bias + sum_j weight_j x_{t-width+1+j},  h = silu(z),  unit norm per head;
 *   emit: y_t = gain * r_t / rms(r_t) * silu(g_t), per head.
 *
 * The backward passes compute all of it again from the inputs. Work is cut into blocks of tokens
 * of one sequence; gradients of parameters are one partial sum a block, so that they do not
 * depend on the number of threads.
 */

#include "matrix.h"

enum { BLOCK = 128, MAX_WIDTH = 16 };

/* Mirrored by `Mixing` in tokens.py. Strides (batch, time) are in numbers; the rest is contiguous:
 * results (B, T, channels / parts) for every part, partial sums (blocks, width + 1, channels). */
typedef struct {
    int64_t batch, length, parts, heads, size, width, silu, unit; /* unit: parts of unit norm */
    int64_t x_stride[2];
    int64_t slope_stride[3][3]; /* (batch, time, head) of d_out */
    const REAL *x, *tail, *weight, *bias; /* tail (B, width - 1, channels) */
    REAL *out[3];
    const REAL *d_out[3];
    REAL *d_x, *d_tail, *d_parameters;
    double eps;
} Mixing;

/* Mirrored by `Emission` in tokens.py. */
typedef struct {
    int64_t batch, length, heads, size;
    int64_t read_stride[3], gate_stride[2], slope_stride[2];
    const REAL *read, *gain, *gate; /* gate may be NULL */
    REAL *out;
    const REAL *d_out;
    REAL *d_read, *d_gate, *d_gain;
    double eps;
} Emission;

int64_t tokens_block(void) { return BLOCK; }
int64_t tokens_width(void) { return MAX_WIDTH; }
int64_t mixing_size(void) { return sizeof(Mixing); }
int64_t emission_size(void) { return sizeof(Emission); }

static int64_t blocks(int64_t length) { return (length + BLOCK - 1) / BLOCK; }

INLINE V sigmoid(V z) { return 1 / (1 + exponential(-z)); }

/* x_t of one sequence, also before its first token. */
INLINE const REAL *input(const Mixing *c, int64_t b, int64_t t) {
    const int64_t channels = c->parts * c->heads * c->size;
    if (t >= 0) return c->x + b * c->x_stride[0] + t * c->x_stride[1];
    return c->tail + (b * (c->width - 1) + c->width - 1 + t) * channels;
}

/* LANES channels of z_t, from `at` on. */
INLINE V convolve(const Mixing *c, const REAL *const *rows, int64_t at, int count) {
    const int64_t channels = c->parts * c->heads * c->size;
    if (!c->weight) return load_some(rows[0] + at, count);
    V z = load_some(c->bias + at, count);
    for (int j = 0; j < c->width; j++)
        z += load_some(c->weight + j * channels + at, count) * load_some(rows[j] + at, count);
    return z;
}

/* Blocks first ... last - 1. */
int mix(const Mixing *c, int64_t first, int64_t last) {
    const int64_t inner = c->heads * c->size;
    for (int64_t block = first; block < last; block++) {
        const int64_t b = block / blocks(c->length), begin = block % blocks(c->length) * BLOCK;
        const int64_t end = begin + BLOCK < c->length ? begin + BLOCK : c->length;
        for (int64_t t = begin; t < end; t++) {
            const REAL *rows[MAX_WIDTH];
            for (int j = 0; j < c->width; j++) rows[j] = input(c, b, t - c->width + 1 + j);
            for (int part = 0; part < c->parts; part++)
                for (int64_t head = 0; head < c->heads; head++) {
                    const int64_t at = part * inner + head * c->size;
                    REAL *out = c->out[part] + ((b * c->length + t) * c->heads + head) * c->size;
                    V square = fill(0);
                    for (int i = 0; i < c->size; i += LANES) {
                        const int count = least(LANES, c->size - i);
                        V h = convolve(c, rows, at + i, count);
                        if (c->silu) h *= sigmoid(h);
                        square += h * h;
                        store_some(out + i, h, count);
                    }
                    if (part >= c->unit) continue;
                    const REAL norm = sqrt(total(square)), inverse = 1 / (norm > c->eps ? norm : (REAL)c->eps);
                    for (int i = 0; i < c->size; i += LANES) {
                        const int count = least(LANES, c->size - i);
                        store_some(out + i, load_some(out + i, count) * inverse, count);
                    }
                }
        }
    }
    return 0;
}

/* Gradient of z_t for all channels of one head, from that of its result. */
static void mix_slope(const Mixing *c, int64_t b, int64_t t, int part, int64_t head,
                      const REAL *const *rows, REAL *dz, REAL *h) {
    const int64_t at = (part * c->heads + head) * c->size, *stride = c->slope_stride[part];
    const REAL *slope = c->d_out[part] + b * stride[0] + t * stride[1] + head * stride[2];
    V square = fill(0), along = fill(0);
    for (int i = 0; i < c->size; i += LANES) {
        const int count = least(LANES, c->size - i);
        const V z = convolve(c, rows, at + i, count), s = c->silu ? sigmoid(z) : fill(1);
        const V value = z * s, d = load_some(slope + i, count);
        /* For the moment the slope of the activation; an idle lane holds zero either way. */
        store_some(dz + i, c->silu ? s * (1 + z * (1 - s)) : fill(1), count);
        store_some(h + i, value, count);
        square += value * value;
        along += value * d;
    }
    REAL inverse = 1, pull = 0;
    if (part < c->unit) {
        const REAL norm = sqrt(total(square));
        inverse = 1 / (norm > c->eps ? norm : (REAL)c->eps);
        pull = norm > c->eps ? total(along) * inverse * inverse : 0;
    }
    for (int i = 0; i < c->size; i += LANES) {
        const int count = least(LANES, c->size - i);
        const V d = (load_some(slope + i, count) - load_some(h + i, count) * pull) * inverse;
        store_some(dz + i, d * load_some(dz + i, count), count);
    }
}

/* Everything that token t of [tail, x] went into is of tokens t ... t + width - 1. */
int mix_backward(const Mixing *c, int64_t first, int64_t last) {
    const int64_t channels = c->parts * c->heads * c->size;
    const int64_t size = (c->size + LANES - 1) / LANES * LANES;
    /* Of one head: dz of the last `width` tokens, h of one, sums of the block's gradients. */
    REAL *room = aligned_alloc(BYTES, (c->width + 1 + c->width + 1) * size * sizeof(REAL));
    if (!room) return 1;
    REAL *h = room + c->width * size, *sums = h + size;
    for (int64_t block = first; block < last; block++) {
        const int64_t b = block / blocks(c->length), begin = block % blocks(c->length) * BLOCK;
        const int64_t end = begin + BLOCK < c->length ? begin + BLOCK : c->length;
        const int64_t reach = end + c->width - 1 < c->length ? end + c->width - 1 : c->length;
        const int64_t start = begin == 0 ? 1 - c->width : begin; /* the tail is the first block's */
        for (int part = 0; part < c->parts; part++)
            for (int64_t head = 0; head < c->heads; head++) {
                const int64_t at = (part * c->heads + head) * c->size;
                memset(room, 0, (2 * c->width + 2) * size * sizeof(REAL));
                for (int64_t t = reach - 1; t >= start; t--) {
                    REAL *dz = room + (t + c->width) % c->width * size;
                    const REAL *rows[MAX_WIDTH];
                    if (t >= 0) {
                        for (int j = 0; j < c->width; j++) rows[j] = input(c, b, t - c->width + 1 + j);
                        mix_slope(c, b, t, part, head, rows, dz, h);
                    } else
                        memset(dz, 0, size * sizeof(REAL));
                    if (t >= end) continue;
                    REAL *to = t >= 0 ? c->d_x + (b * c->length + t) * channels
                                      : c->d_tail + (b * (c->width - 1) + c->width - 1 + t) * channels;
                    for (int i = 0; i < c->size; i += LANES) {
                        const int count = least(LANES, c->size - i);
                        const V own = load(dz + i);
                        if (!c->weight) {
                            store_some(to + at + i, own, count);
                            continue;
                        }
                        V sum = fill(0);
                        for (int j = 0; j < c->width; j++) { /* z_{t + width - 1 - j} read x_t by weight_j */
                            const int64_t after = t + c->width - 1 - j;
                            if (after < reach)
                                sum += load_some(c->weight + j * channels + at + i, count) *
                                       load(room + (after + c->width) % c->width * size + i);
                            if (t >= 0)
                                store(sums + j * size + i, load(sums + j * size + i) +
                                                               own * load_some(rows[j] + at + i, count));
                        }
                        store_some(to + at + i, sum, count);
                        if (t >= 0)
                            store(sums + c->width * size + i, load(sums + c->width * size + i) + own);
                    }
                }
                for (int j = 0; j <= c->width && c->weight; j++)
                    memcpy(c->d_parameters + (block * (c->width + 1) + j) * channels + at,
                           sums + j * size, c->size * sizeof(REAL));
            }
    }
    free(room);
    return 0;
}

typedef struct {
    const REAL *read, *gate, *slope;
    int64_t at; /* in contiguous results */
    REAL inverse;
} Row;

/* One head of one token. */
INLINE Row row_of(const Emission *c, int64_t b, int64_t t, int64_t head) {
    Row row;
    row.read = c->read + b * c->read_stride[0] + t * c->read_stride[1] + head * c->read_stride[2];
    row.gate = c->gate ? c->gate + b * c->gate_stride[0] + t * c->gate_stride[1] + head * c->size : NULL;
    row.slope = c->d_out ? c->d_out + b * c->slope_stride[0] + t * c->slope_stride[1] + head * c->size : NULL;
    row.at = ((b * c->length + t) * c->heads + head) * c->size;
    V square = fill(0);
    for (int i = 0; i < c->size; i += LANES) {
        const V r = load_some(row.read + i, least(LANES, c->size - i));
        square += r * r;
    }
    row.inverse = 1 / (REAL)sqrt(total(square) / c->size + (REAL)c->eps);
    return row;
}

int emit(const Emission *c, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
        const int64_t b = block / blocks(c->length), begin = block % blocks(c->length) * BLOCK;
        const int64_t end = begin + BLOCK < c->length ? begin + BLOCK : c->length;
        for (int64_t t = begin; t < end; t++)
            for (int64_t head = 0; head < c->heads; head++) {
                const Row row = row_of(c, b, t, head);
                for (int i = 0; i < c->size; i += LANES) {
                    const int count = least(LANES, c->size - i);
                    V y = load_some(row.read + i, count) * row.inverse * load_some(c->gain + i, count);
                    if (c->gate) {
                        const V g = load_some(row.gate + i, count);
                        y *= g * sigmoid(g);
                    }
                    store_some(c->out + row.at + i, y, count);
                }
            }
    }
    return 0;
}

int emit_backward(const Emission *c, int64_t first, int64_t last) {
    const int64_t size = (c->size + LANES - 1) / LANES * LANES;
    REAL *sums = aligned_alloc(BYTES, size * sizeof(REAL));
    if (!sums) return 1;
    for (int64_t block = first; block < last; block++) {
        const int64_t b = block / blocks(c->length), begin = block % blocks(c->length) * BLOCK;
        const int64_t end = begin + BLOCK < c->length ? begin + BLOCK : c->length;
        memset(sums, 0, size * sizeof(REAL));
        for (int64_t t = begin; t < end; t++)
            for (int64_t head = 0; head < c->heads; head++) {
                const Row row = row_of(c, b, t, head);
                V along = fill(0);
                for (int i = 0; i < c->size; i += LANES) {
                    const int count = least(LANES, c->size - i);
                    const V normed = load_some(row.read + i, count) * row.inverse;
                    const V gain = load_some(c->gain + i, count), d = load_some(row.slope + i, count);
                    V opened = fill(1);
                    if (c->gate) {
                        const V g = load_some(row.gate + i, count), s = sigmoid(g);
                        opened = g * s;
                        store_some(c->d_gate + row.at + i, d * normed * gain * s * (1 + g * (1 - s)), count);
                    }
                    const V grown = d * opened * gain;
                    along += grown * normed;
                    store(sums + i, load(sums + i) + d * opened * normed);
                    store_some(c->d_read + row.at + i, grown, count);
                }
                const REAL pull = total(along) / c->size;
                for (int i = 0; i < c->size; i += LANES) {
                    const int count = least(LANES, c->size - i);
                    const V normed = load_some(row.read + i, count) * row.inverse;
                    const V grown = load_some(c->d_read + row.at + i, count);
                    store_some(c->d_read + row.at + i, (grown - normed * pull) * row.inverse, count);
                }
            }
        memcpy(c->d_gain + block * c->size, sums, c->size * sizeof(REAL));
    }
    free(sums);
    return 0;
}
