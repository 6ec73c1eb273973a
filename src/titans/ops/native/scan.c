/* The closed form of titans.ops.chunked, one head of one sequence at a time.
 *
 * All that a head needs stays in the cache of one core: its weights and momentum, and the
 * intermediate results of a group of chunks. Equations and names: titans/ops/README.md and
 * titans/ops/fused.py, which computes the same with torch operations.
 */

#include <pthread.h>

#include "matrix.h"

enum { MAX_DEPTH = 8 };

/* Mirrored by `Call` in scan.py. Strides (batch, head, time) are in numbers; results without
 * strides are contiguous: (B, T, H, D), (B, T, H) or (N, in, out) with N = B x H. */
typedef struct {
    int64_t batch, heads, length, chunk, group, segment, depth;
    int64_t dims[MAX_DEPTH + 1];
    int64_t same[MAX_DEPTH]; /* the first layer with the same gates */
    int64_t residual, norm, gelu, l2, momentum, decay, anchored, bf16;
    int64_t q_stride[3], k_stride[3], v_stride[3], slope_stride[3];
    int64_t gate_stride[3][MAX_DEPTH][3];
    const REAL *q, *k, *v;
    const REAL *gate[3][MAX_DEPTH]; /* learning rate, momentum, decay of every layer */
    const REAL *weights[MAX_DEPTH], *past[MAX_DEPTH], *anchor[MAX_DEPTH];
    REAL *weights_after[MAX_DEPTH], *past_after[MAX_DEPTH];
    REAL *output, *surprise;
    REAL *boundary; /* (N, segments, state): before every segment, or NULL */
    const REAL *d_output, *d_weights_after[MAX_DEPTH], *d_past_after[MAX_DEPTH];
    REAL *d_q, *d_k, *d_v;
    REAL *d_gate[3][MAX_DEPTH];
    REAL *d_weights[MAX_DEPTH], *d_past[MAX_DEPTH], *d_anchor[MAX_DEPTH]; /* d_anchor (N, in, out) */
    double max_surprise; /* 0: none */
} Call;

/* Of `size` tokens: products of gates. G and spread are size x size, lower triangular. */
typedef struct {
    int size;
    REAL *beta, *H, *m;
    REAL *plain;  /* A B: G before the learning rate */
    REAL *spread; /* B */
    REAL *G;
    REAL *last; /* theta_i B[size - 1, i] */
} Mix;

/* Gradients of a Mix; `dG` may be known in its last row alone. */
typedef struct {
    REAL *beta, *m, *G, *last;
    REAL carry;
} MixSlope;

/* Weights and momentum of all layers, one block of numbers. */
typedef struct {
    REAL *weights[MAX_DEPTH], *past[MAX_DEPTH];
} Rule;

/* The way to the error signals of a group, P rows each; chunk c has rows c C ... */
typedef struct {
    REAL *inputs[MAX_DEPTH]; /* a_l; inputs[0] are the keys */
    REAL *outputs[MAX_DEPTH];
    REAL *back[MAX_DEPTH]; /* delta_l M_l^T, l >= 1 */
    REAL *deltas[MAX_DEPTH];
    REAL *shrunk[MAX_DEPTH]; /* how much of delta_l was left by max_surprise, row by row */
    REAL *normed, *inverse;
    REAL *rules; /* the state before every chunk, when it is kept */
} Way;

typedef struct {
    const Call *c;
    int batch, head, n;
    int key, value, widest, state; /* state: numbers in a Rule */
    int exact;                     /* a linear memory with the gradient of every token */
    int span;                      /* tokens between two states: the chunk, or a group if exact */
    Mix mix[MAX_DEPTH], part[MAX_DEPTH];
    MixSlope mix_slope[MAX_DEPTH], part_slope[MAX_DEPTH];
    const int64_t *same;
    Way *ways;
    REAL *state_now, *state_start, *state_slope;
    REAL *whole[MAX_DEPTH]; /* anchor + weights */
    REAL *queries, *values, *x[MAX_DEPTH], *z[MAX_DEPTH], *normed, *inverse;
    REAL *scores[MAX_DEPTH], *masked, *scratch, *scratch2, *row;
    REAL *dx, *d_inputs[MAX_DEPTH], *d_deltas[MAX_DEPTH], *dz[MAX_DEPTH], *slopes[MAX_DEPTH];
    REAL *d_keys, *d_values;
    REAL *d_anchor[MAX_DEPTH];
} Work;

/* ---- memory ------------------------------------------------------------------------------- */

typedef struct {
    char *base;
    size_t used;
} Arena;

static REAL *take(Arena *arena, size_t count) {
    const size_t at = arena->used;
    arena->used += (count * sizeof(REAL) + 127) / 64 * 64;
    return arena->base ? (REAL *)(arena->base + at) : NULL;
}

static void take_mix(Arena *arena, Mix *mix, MixSlope *slope, int size) {
    mix->size = size;
    mix->beta = take(arena, size);
    mix->H = take(arena, size);
    mix->m = take(arena, size);
    mix->plain = take(arena, (size_t)size * size);
    mix->spread = take(arena, (size_t)size * size);
    mix->G = take(arena, (size_t)size * size);
    mix->last = take(arena, size);
    slope->beta = take(arena, size);
    slope->m = take(arena, size);
    slope->G = take(arena, (size_t)size * size);
    slope->last = take(arena, size);
}

/* Lay out everything; with arena->base NULL it only counts. */
static void lay_out(Work *w, Arena *arena, int ways, int keep, int backward) {
    const Call *c = w->c;
    const int P = c->group, L = c->depth;
    w->key = c->dims[0];
    w->value = c->dims[L];
    w->widest = P;
    w->state = 0;
    w->exact = L == 1 && !c->norm && c->chunk == 1 && !c->max_surprise;
    w->span = w->exact ? P : c->chunk;
    for (int l = 0; l <= L; l++)
        if (c->dims[l] > w->widest) w->widest = c->dims[l];
    for (int l = 0; l < L; l++) w->state += c->dims[l] * c->dims[l + 1] * (c->momentum ? 2 : 1);
    for (int l = 0; l < L; l++) {
        const size_t in = c->dims[l], out = c->dims[l + 1];
        if (w->same[l] == l) {
            take_mix(arena, &w->mix[l], &w->mix_slope[l], P);
            if (w->span < P) take_mix(arena, &w->part[l], &w->part_slope[l], w->span);
        }
        w->whole[l] = take(arena, c->anchored ? in * out : 0);
        w->x[l] = take(arena, P * in);
        w->z[l] = take(arena, P * out);
        w->scores[l] = take(arena, (size_t)P * P);
        if (backward) {
            w->d_inputs[l] = take(arena, P * in);
            w->d_deltas[l] = take(arena, P * out);
            w->dz[l] = take(arena, P * out);
            w->slopes[l] = take(arena, P * out);
            w->d_anchor[l] = take(arena, c->anchored ? in * out : 0);
        }
    }
    w->queries = w->x[0];
    w->values = take(arena, (size_t)P * w->value);
    w->normed = take(arena, (size_t)P * w->value);
    w->inverse = take(arena, P);
    w->masked = take(arena, (size_t)P * P);
    w->scratch = take(arena, (size_t)P * w->widest);
    w->scratch2 = take(arena, (size_t)P * w->widest);
    w->row = take(arena, P);
    w->state_now = take(arena, w->state);
    w->state_start = take(arena, w->state);
    if (backward) {
        w->state_slope = take(arena, w->state);
        w->dx = take(arena, (size_t)P * w->widest);
        w->d_keys = w->d_inputs[0];
        w->d_values = take(arena, (size_t)P * w->value);
    }
    for (int i = 0; i < ways; i++) {
        Way count, *way = arena->base ? &w->ways[i] : &count;
        for (int l = 0; l < L; l++) {
            way->inputs[l] = take(arena, (size_t)P * c->dims[l]);
            way->outputs[l] = take(arena, (size_t)P * c->dims[l + 1]);
            way->back[l] = take(arena, l ? (size_t)P * c->dims[l] : 0);
            way->deltas[l] = take(arena, (size_t)P * c->dims[l + 1]);
            way->shrunk[l] = take(arena, c->max_surprise ? P : 0);
        }
        way->normed = take(arena, (size_t)P * w->value);
        way->inverse = take(arena, P);
        way->rules = keep ? take(arena, (size_t)(P / w->span) * w->state) : NULL;
    }
}

/* Memory of a thread, kept between calls, since fresh pages cost more than the arithmetic;
 * freed when the thread ends, and after a call that needed very much. */
enum { LARGE_BLOCK = 64 << 20 };
static pthread_key_t block_key;
static pthread_once_t block_once = PTHREAD_ONCE_INIT;
static _Thread_local size_t block_size;

static void make_block_key(void) { pthread_key_create(&block_key, free); }

static char *get_block(size_t size) {
    pthread_once(&block_once, make_block_key);
    char *block = pthread_getspecific(block_key);
    if (block && size <= block_size) return block;
    free(block);
    block_size = (size + 4095) / 4096 * 4096;
    block = aligned_alloc(4096, block_size);
    pthread_setspecific(block_key, block);
    return block;
}

static void close_work(void) {
    if (block_size <= LARGE_BLOCK) return;
    free(pthread_getspecific(block_key));
    pthread_setspecific(block_key, NULL);
    block_size = 0;
}

static int open_work(Work *w, const Call *c, int n, int ways, int keep, int backward) {
    memset(w, 0, sizeof *w);
    use_bf16 = c->bf16;
    w->c = c;
    w->same = c->same;
    w->n = n;
    w->batch = n / c->heads;
    w->head = n % c->heads;
    Arena arena = {NULL, 0};
    const size_t table = (ways * sizeof(Way) + 127) / 64 * 64;
    arena.used = table;
    lay_out(w, &arena, ways, keep, backward);
    char *block = get_block(arena.used);
    if (!block) return 1;
    w->ways = (Way *)block;
    arena.base = block;
    arena.used = table;
    lay_out(w, &arena, ways, keep, backward);
    return 0;
}

static Rule view(const Work *w, REAL *state) {
    Rule rule = {{0}, {0}};
    for (int l = 0; l < w->c->depth; l++) {
        const size_t size = w->c->dims[l] * w->c->dims[l + 1];
        rule.weights[l] = state;
        state += size;
        if (w->c->momentum) {
            rule.past[l] = state;
            state += size;
        }
    }
    return rule;
}

/* Rows begin ... of this head's tensor into contiguous rows. */
static void gather(const Work *w, const REAL *from, const int64_t *stride, int begin, int rows,
                   int width, REAL *to) {
    from += w->batch * stride[0] + w->head * stride[1] + begin * stride[2];
    for (int t = 0; t < rows; t++) memcpy(to + (int64_t)t * width, from + t * stride[2], width * sizeof(REAL));
}

/* Where row `begin` of this head lies in a contiguous (B, T, H, width). */
static int64_t place(const Work *w, int begin, int width) {
    return (((int64_t)w->batch * w->c->length + begin) * w->c->heads + w->head) * width;
}

static void scatter(const Work *w, const REAL *from, int begin, int rows, int width, REAL *to) {
    to += place(w, begin, width);
    for (int t = 0; t < rows; t++)
        memcpy(to + (int64_t)t * w->c->heads * width, from + (int64_t)t * width, width * sizeof(REAL));
}

/* ---- coefficients ------------------------------------------------------------------------- */

static REAL gate(const Work *w, int kind, int l, int t) {
    const Call *c = w->c;
    const int64_t *s = c->gate_stride[kind][l];
    return c->gate[kind][l][w->batch * s[0] + w->head * s[1] + t * s[2]];
}

static double kept(const Work *w, int l, int t) {
    return w->c->decay ? 1 - (double)gate(w, 2, l, t) : 1;
}

static REAL pushed(const Work *w, int l, int t) { return w->c->momentum ? gate(w, 1, l, t) : 0; }

/* Running products, row after row: rows[t] = keep_t rows[t - 1] + spread[t]. */
static void mix_gates(const Work *w, int l, int begin, Mix *mix) {
    const int size = mix->size, momentum = w->c->momentum;
    double beta = 1, H = 1, m = 0; /* 1 - alpha for an alpha far below a float's resolution */
    for (int t = 0; t < size; t++) {
        const double keep = kept(w, l, begin + t);
        const REAL eta = pushed(w, l, begin + t), step = keep;
        beta *= keep;
        H *= eta;
        m = keep * m + H;
        mix->beta[t] = beta;
        mix->H[t] = H;
        mix->m[t] = m;
        REAL *plain = mix->plain + (int64_t)t * size, *spread = mix->spread + (int64_t)t * size;
        const REAL *above = plain - size, *over = spread - size;
        if (momentum) {
            for (int i = 0; i < t; i++) spread[i] = eta * over[i];
            for (int i = 0; i < t; i++) plain[i] = step * above[i] + spread[i];
        } else {
            for (int i = 0; i < t; i++) plain[i] = step * above[i];
            memset(spread, 0, t * sizeof(REAL));
        }
        plain[t] = spread[t] = 1;
        for (int i = t + 1; i < size; i++) plain[i] = spread[i] = 0;
    }
    const REAL *end = mix->spread + (int64_t)(size - 1) * size;
    for (int i = 0; i < size; i++) w->row[i] = gate(w, 0, l, begin + i);
    for (int i = 0; i < size; i++) mix->last[i] = w->row[i] * end[i];
    for (int t = 0; t < size; t++)
        for (int i = 0; i < size; i++)
            mix->G[(int64_t)t * size + i] = mix->plain[(int64_t)t * size + i] * w->row[i];
}

static void clear_slope(MixSlope *slope, int size) {
    memset(slope->beta, 0, size * sizeof(REAL));
    memset(slope->m, 0, size * sizeof(REAL));
    memset(slope->last, 0, size * sizeof(REAL));
    memset(slope->G, 0, (size_t)size * size * sizeof(REAL));
    slope->carry = 0;
}

/* Gradients of the gates, added to d_gate; uses up the slope of G and last. */
static void mix_gates_backward(const Work *w, int l, int begin, const Mix *mix, MixSlope *slope) {
    const Call *c = w->c;
    const int size = mix->size;
    REAL beta = 0, m = 0, H = slope->carry;
    REAL *of_plain = w->scratch, *of_spread = w->scratch2, *theta = w->row;
    REAL *rate = w->normed; /* free at this point */
    for (int i = 0; i < size; i++) {
        theta[i] = gate(w, 0, l, begin + i);
        of_plain[i] = 0;
        of_spread[i] = slope->last[i] * theta[i];
        rate[i] = slope->last[i] * mix->spread[(int64_t)(size - 1) * size + i];
    }
    for (int t = size - 1; t >= 0; t--) {
        const REAL keep = kept(w, l, begin + t), eta = pushed(w, l, begin + t);
        const REAL *dG = slope->G + (int64_t)t * size, *plain = mix->plain + (int64_t)t * size;
        const REAL *above = plain - size, *over = mix->spread + (int64_t)(t - 1) * size;
        for (int i = 0; i <= t; i++) {
            rate[i] += dG[i] * plain[i];
            of_plain[i] += dG[i] * theta[i];
        }
        beta += slope->beta[t];
        m += slope->m[t];
        H += m;
        const int64_t at = place(w, begin + t, 1);
        if (c->decay) {
            REAL d_keep = beta * (t ? mix->beta[t - 1] : 1) + m * (t ? mix->m[t - 1] : 0);
            if (t) d_keep += dot(t, of_plain, above);
            c->d_gate[2][l][at] -= d_keep;
        }
        if (c->momentum) {
            for (int i = 0; i < t; i++) of_spread[i] += of_plain[i];
            REAL d_eta = H * (t ? mix->H[t - 1] : 1);
            if (t) d_eta += dot(t, of_spread, over);
            c->d_gate[1][l][at] += d_eta;
            for (int i = 0; i < t; i++) of_spread[i] *= eta;
        }
        for (int i = 0; i < t; i++) of_plain[i] *= keep;
        beta *= keep;
        m *= keep;
        H *= eta;
    }
    for (int i = 0; i < size; i++) c->d_gate[0][l][place(w, begin + i, 1)] += rate[i];
}

/* ---- one chunk: error signals and the state after it -------------------------------------- */

static const REAL *whole_weights(const Work *w, const Rule *rule, int l) {
    if (!w->c->anchored) return rule->weights[l];
    const int64_t size = w->c->dims[l] * w->c->dims[l + 1];
    const REAL *anchor = w->c->anchor[l] + w->head * size;
    for (int64_t i = 0; i < size; i++) w->whole[l][i] = anchor[i] + rule->weights[l][i];
    return w->whole[l];
}

/* The error at the output, before the LayerNorm's backward pass. */
static void output_error(const Work *w, const Way *way, int first, int rows, REAL *error) {
    const Call *c = w->c;
    const int64_t n = (int64_t)rows * w->value, at = (int64_t)first * w->value;
    const REAL *normed = way->normed + at, *v = w->values + at, *k = way->inputs[0] + at;
    if (!c->l2)
        for (int64_t i = 0; i < n; i++) error[i] = -v[i];
    else if (c->residual)
        for (int64_t i = 0; i < n; i++) error[i] = normed[i] + k[i] - v[i];
    else
        for (int64_t i = 0; i < n; i++) error[i] = normed[i] - v[i];
}

/* Rows first ... first + C of `way` up to the last error signal, at the weights of `rule`. */
static void last_error(const Work *w, const Rule *rule, const Way *way, int first, int C,
                       const REAL **at) {
    const Call *c = w->c;
    const int L = c->depth;
    for (int l = 0; l < L; l++) {
        const int in = c->dims[l], out = c->dims[l + 1];
        REAL *z = way->outputs[l] + (int64_t)first * out;
        at[l] = whole_weights(w, rule, l);
        times(C, out, in, 1, way->inputs[l] + (int64_t)first * in, at[l], 0, z);
        if (l < L - 1) activate(c->gelu, (int64_t)C * out, z, way->inputs[l + 1] + (int64_t)first * out);
    }
    const int64_t row = (int64_t)first * w->value;
    REAL *delta = way->deltas[L - 1] + row;
    if (c->norm)
        layer_norm(C, w->value, way->outputs[L - 1] + row, way->normed + row, way->inverse + first);
    else
        memcpy(way->normed + row, way->outputs[L - 1] + row, (size_t)C * w->value * sizeof(REAL));
    output_error(w, way, first, C, delta);
    if (c->norm)
        layer_norm_backward(C, w->value, way->normed + row, way->inverse + first, delta, delta);
}

/* Scale rows of delta_l so that |a_l| |delta_l| <= max_surprise, the norm of a token's gradient. */
static void bound_errors(const Work *w, const Way *way, int l, int first, int rows) {
    const double limit = w->c->max_surprise;
    const int in = w->c->dims[l], out = w->c->dims[l + 1];
    for (int t = first; t < first + rows; t++) {
        const REAL *a = way->inputs[l] + (int64_t)t * in;
        REAL *delta = way->deltas[l] + (int64_t)t * out;
        const double norm = sqrt((double)dot(in, a, a) * dot(out, delta, delta));
        const REAL left = norm > limit ? limit / norm : 1;
        way->shrunk[l][t] = left;
        if (left != 1)
            for (int j = 0; j < out; j++) delta[j] *= left;
    }
}

/* Gradients of delta_l and a_l (added) from that of the bounded delta_l, whose place the unbounded
 * one takes again. With n its direction, delta = n max_surprise / |a|. */
static void bound_errors_backward(const Work *w, const Way *way, int l, int first) {
    const int in = w->c->dims[l], out = w->c->dims[l + 1];
    for (int t = first; t < first + w->c->chunk; t++) {
        const REAL left = way->shrunk[l][t];
        if (left == 1) continue;
        const REAL *a = way->inputs[l] + (int64_t)t * in;
        REAL *delta = way->deltas[l] + (int64_t)t * out;
        REAL *slope = w->d_deltas[l] + (int64_t)t * out, *da = w->d_inputs[l] + (int64_t)t * in;
        const REAL along = dot(out, slope, delta);
        const REAL turned = along / dot(out, delta, delta), pulled = along / dot(in, a, a);
        for (int j = 0; j < out; j++) slope[j] = left * (slope[j] - turned * delta[j]);
        for (int i = 0; i < in; i++) da[i] -= pulled * a[i];
        for (int j = 0; j < out; j++) delta[j] /= left;
    }
}

static void closed_errors(const Work *w, const Rule *rule, const Way *way) {
    const REAL *at[MAX_DEPTH];
    last_error(w, rule, way, 0, w->c->group, at);
    if (w->c->max_surprise) bound_errors(w, way, w->c->depth - 1, 0, w->c->group);
}

/* All error signals of a chunk. */
static void chunk_errors(const Work *w, const Rule *rule, const Way *way, int first) {
    const Call *c = w->c;
    const int C = c->chunk, L = c->depth;
    const REAL *at[MAX_DEPTH];
    last_error(w, rule, way, first, C, at);
    for (int l = L - 1; l > 0; l--) {
        const int in = c->dims[l], out = c->dims[l + 1];
        REAL *back = way->back[l] + (int64_t)first * in;
        times_transposed(C, in, out, 1, way->deltas[l] + (int64_t)first * out, at[l], 0, back);
        times_slope(c->gelu, (int64_t)C * in, back, way->outputs[l - 1] + (int64_t)first * in,
                    way->deltas[l - 1] + (int64_t)first * in);
    }
    for (int l = 0; l < L && c->max_surprise; l++) bound_errors(w, way, l, first, C);
}

/* The coefficients of the state after a chunk are the last row of its Mix. */
static Mix *mix_of_chunk(Work *w, int l, int begin) {
    if (w->span == w->c->group) return &w->mix[w->same[l]];
    Mix *mix = &w->part[w->same[l]];
    if (w->same[l] == l) mix_gates(w, l, begin, mix);
    return mix;
}

static void add_written(const Work *w, int in, int out, const REAL *scale, const REAL *a,
                        const REAL *delta, REAL *target) {
    const int C = w->span;
    if (in <= out) {
        scale_rows(C, in, scale, a, 0, w->scratch);
        add_outer(in, out, C, -1, w->scratch, delta, target);
    } else {
        scale_rows(C, out, scale, delta, 0, w->scratch);
        add_outer(in, out, C, -1, a, w->scratch, target);
    }
}

/* `from` and `to` may be one state. */
static void next_rule(Work *w, const Rule *from, const Rule *to, const Way *way, int first, int begin) {
    const Call *c = w->c;
    const int C = w->span;
    for (int l = 0; l < c->depth; l++) {
        const int in = c->dims[l], out = c->dims[l + 1];
        const int64_t size = (int64_t)in * out;
        const Mix *mix = mix_of_chunk(w, l, begin);
        const REAL keep = mix->beta[C - 1], push = mix->m[C - 1], carry = mix->H[C - 1];
        const REAL *a = way->inputs[l] + (int64_t)first * in;
        const REAL *delta = way->deltas[l] + (int64_t)first * out;
        const REAL *W = from->weights[l], *S = from->past[l];
        REAL *next = to->weights[l], *past = to->past[l];
        if (c->momentum)
            for (int64_t i = 0; i < size; i++) {
                const REAL s = S[i];
                next[i] = keep * W[i] + push * s;
                past[i] = carry * s;
            }
        else if (keep != 1 || next != W)
            for (int64_t i = 0; i < size; i++) next[i] = keep * W[i];
        add_written(w, in, out, mix->G + (int64_t)(C - 1) * C, a, delta, next);
        if (c->momentum) add_written(w, in, out, mix->last, a, delta, past);
    }
}

/* ---- the exact form: a linear memory, every token's own gradient --------------------------- */

/* Row t of `shifted`: what M before token t has of the group's start, times k_t (all parts). */
static void earlier_reads(const Work *w, const Rule *start, const Way *way, REAL *to) {
    const Call *c = w->c;
    const int P = c->group;
    const Mix *mix = &w->mix[0];
    for (int part = 0; part < (c->momentum ? 2 : 1); part++) {
        const REAL *factor = part ? mix->m : mix->beta;
        times(P, w->value, w->key, 1, way->inputs[0], part ? start->past[0] : start->weights[0], 0,
              w->scratch);
        w->row[0] = part ? 0 : 1;
        for (int t = 1; t < P; t++) w->row[t] = factor[t - 1];
        scale_rows(P, w->value, w->row, w->scratch, part, to);
    }
}

/* (I + tril(G' * K K^T, -1)) E = beta' (K W_0) + m' (K S_0) - V, primes: one token earlier.
 * The matrix is left in scores[0], products <k_t, k_i> without G in masked. */
static void exact_errors(const Work *w, const Rule *start, const Way *way) {
    const Call *c = w->c;
    const int P = c->group, D = w->value;
    REAL *E = way->deltas[0], *products = w->masked, *matrix = w->scores[0];
    for (int64_t i = 0; i < (int64_t)P * D; i++) E[i] = -w->values[i];
    if (!c->l2) return;
    earlier_reads(w, start, way, w->z[0]);
    for (int64_t i = 0; i < (int64_t)P * D; i++) E[i] += w->z[0][i];
    if (c->residual)
        for (int64_t i = 0; i < (int64_t)P * D; i++) E[i] += way->inputs[0][i];
    if (c->anchored) times(P, D, w->key, 1, way->inputs[0], c->anchor[0] + w->head * (int64_t)w->key * D, 1, E);
    causal_scores(P, w->key, way->inputs[0], way->inputs[0], products);
    for (int t = 1; t < P; t++) {
        const REAL *G = w->mix[0].G + (int64_t)(t - 1) * P;
        for (int i = 0; i < t; i++) matrix[(int64_t)t * P + i] = G[i] * products[(int64_t)t * P + i];
        row_product(D, t, -1, matrix + (int64_t)t * P, E, 1, E + (int64_t)t * D);
    }
}

/* From d_deltas to d_inputs, d_values, the slopes of the coefficients and of the state. */
static void exact_errors_backward(Work *w, const Rule *start, Rule *slope, const Way *way) {
    const Call *c = w->c;
    const int P = c->group, D = w->value, K = w->key;
    const int64_t n = (int64_t)P * D;
    REAL *X = w->d_deltas[0], *dk = w->d_inputs[0];
    const REAL *k = way->inputs[0], *E = way->deltas[0];
    const Mix *mix = &w->mix[0];
    MixSlope *d_mix = &w->mix_slope[0];
    if (c->l2) {
        REAL *products = w->masked, *matrix = w->scores[0];
        causal_scores(P, K, k, k, products);
        memset(matrix, 0, (size_t)P * P * sizeof(REAL));
        for (int t = 1; t < P; t++) /* column i of the matrix as row i: X solves the transpose */
            for (int i = 0; i < t; i++)
                matrix[(int64_t)i * P + t] = mix->G[(int64_t)(t - 1) * P + i] * products[(int64_t)t * P + i];
        for (int t = P - 2; t >= 0; t--)
            row_product(D, P - 1 - t, -1, matrix + (int64_t)t * P + t + 1, X + (int64_t)(t + 1) * D, 1,
                        X + (int64_t)t * D);
        REAL *between = w->scratch; /* <X_t, E_i> = - d(matrix) */
        causal_scores(P, D, X, E, between);
        for (int t = 1; t < P; t++) {
            const int64_t row = (int64_t)t * P, above = row - P;
            for (int i = 0; i < t; i++) {
                d_mix->G[above + i] -= between[row + i] * products[row + i];
                between[row + i] *= -mix->G[above + i];
            }
        }
        for (int t = 0; t < P; t++)
            memset(between + (int64_t)t * P + t, 0, (P - t) * sizeof(REAL));
        causal_sum(P, K, 1, between, k, 1, dk);
        causal_sum_transposed(P, K, 1, between, k, 1, dk);
        for (int part = 0; part < (c->momentum ? 2 : 1); part++) {
            const REAL *factor = part ? mix->m : mix->beta;
            const REAL *matrix = part ? start->past[0] : start->weights[0];
            REAL *d_factor = part ? d_mix->m : d_mix->beta;
            times_transposed(P, K, D, 1, X, matrix, 0, w->scratch);
            for (int t = 1; t < P; t++)
                d_factor[t - 1] += dot(K, w->scratch + (int64_t)t * K, k + (int64_t)t * K);
            w->row[0] = part ? 0 : 1;
            for (int t = 1; t < P; t++) w->row[t] = factor[t - 1];
            scale_rows(P, K, w->row, w->scratch, 1, dk);
            scale_rows(P, K, w->row, k, 0, w->scratch);
            add_outer(K, D, P, 1, w->scratch, X, part ? slope->past[0] : slope->weights[0]);
        }
        if (c->residual)
            for (int64_t i = 0; i < n; i++) dk[i] += X[i];
        if (c->anchored) {
            times_transposed(P, K, D, 1, X, c->anchor[0] + w->head * (int64_t)K * D, 1, dk);
            add_outer(K, D, P, 1, k, X, w->d_anchor[0]);
        }
    }
    for (int64_t i = 0; i < n; i++) w->d_values[i] = -X[i];
}

/* ---- reads -------------------------------------------------------------------------------- */

/* scores * G below and on the diagonal, zero above it. */
static void mask_scores(int n, const REAL *scores, const REAL *G, REAL *masked) {
    for (int t = 0; t < n; t++, scores += n, G += n, masked += n) {
        for (int i = 0; i <= t; i++) masked[i] = scores[i] * G[i];
        memset(masked + t + 1, 0, (n - t - 1) * sizeof(REAL));
    }
}

/* x_t M_t of every layer for a group; leaves x, z and scores in `w`. */
static void read_group(Work *w, const Rule *start, const Way *way) {
    const Call *c = w->c;
    const int P = c->group, L = c->depth;
    for (int l = 0; l < L; l++) {
        const int in = c->dims[l], out = c->dims[l + 1];
        const Mix *mix = &w->mix[w->same[l]];
        const REAL *x = w->x[l];
        REAL *z = w->z[l];
        for (int part = 0; part < (c->momentum ? 2 : 1); part++) {
            const REAL *matrix = part ? start->past[l] : start->weights[l];
            const REAL *scale = part ? mix->m : mix->beta;
            if (in <= out) {
                scale_rows(P, in, scale, x, 0, w->scratch);
                times(P, out, in, 1, w->scratch, matrix, part, z);
            } else {
                times(P, out, in, 1, x, matrix, 0, w->scratch);
                scale_rows(P, out, scale, w->scratch, part, z);
            }
        }
        if (c->anchored) times(P, out, in, 1, x, c->anchor[l] + w->head * (int64_t)in * out, 1, z);
        causal_scores(P, in, x, way->inputs[l], w->scores[l]);
        mask_scores(P, w->scores[l], mix->G, w->masked);
        causal_sum(P, out, -1, w->masked, way->deltas[l], 1, z);
        if (l < L - 1) activate(c->gelu, (int64_t)P * out, z, w->x[l + 1]);
    }
}

/* Only reading, and the errors for the surprise: of a group that writes and forgets nothing. */
static void read_closed(Work *w, const Rule *rule, const Way *way) {
    const Call *c = w->c;
    closed_errors(w, rule, way);
    for (int l = 0; l < c->depth; l++) {
        const int in = c->dims[l], out = c->dims[l + 1];
        times(c->group, out, in, 1, w->x[l], rule->weights[l], 0, w->z[l]);
        if (c->anchored)
            times(c->group, out, in, 1, w->x[l], c->anchor[l] + w->head * (int64_t)in * out, 1, w->z[l]);
        if (l < c->depth - 1) activate(c->gelu, c->group * out, w->z[l], w->x[l + 1]);
    }
}

static void write_output(Work *w, int begin) {
    const Call *c = w->c;
    const int P = c->group;
    const int64_t n = (int64_t)P * w->value;
    const REAL *z = w->z[c->depth - 1];
    if (c->norm) {
        layer_norm(P, w->value, z, w->normed, w->inverse);
        z = w->normed;
    }
    if (c->residual) {
        for (int64_t i = 0; i < n; i++) w->scratch[i] = w->queries[i] + z[i];
        z = w->scratch;
    }
    scatter(w, z, begin, P, w->value, c->output);
}

static void write_surprise(Work *w, const Way *way, int begin) {
    const REAL *delta = way->deltas[w->c->depth - 1];
    for (int t = 0; t < w->c->group; t++, delta += w->value)
        w->c->surprise[place(w, begin + t, 1)] = (REAL)sqrt(dot(w->value, delta, delta));
}

/* ---- the scan ----------------------------------------------------------------------------- */

/* Is every gate of these tokens closed, and no momentum on its way? `moving` is -1 until the
 * initial momentum was looked at, then whether there may be any. */
static int is_closed(const Work *w, const Rule *rule, int begin, int *moving) {
    const Call *c = w->c;
    for (int l = 0; l < c->depth; l++)
        for (int t = begin; t < begin + c->group; t++)
            if (gate(w, 0, l, t) != 0 || (c->decay && gate(w, 2, l, t) != 0)) {
                *moving = c->momentum ? 1 : 0;
                return 0;
            }
    if (c->momentum && *moving < 0) {
        *moving = 0;
        for (int l = 0; l < c->depth; l++)
            for (int64_t i = 0; i < c->dims[l] * c->dims[l + 1]; i++)
                if (rule->past[l][i] != 0) *moving = 1;
    }
    return *moving <= 0;
}

static void load_group(Work *w, Way *way, int begin) {
    const Call *c = w->c;
    gather(w, c->k, c->k_stride, begin, c->group, w->key, way->inputs[0]);
    gather(w, c->v, c->v_stride, begin, c->group, w->value, w->values);
    for (int l = 0; l < c->depth; l++)
        if (w->same[l] == l) mix_gates(w, l, begin, &w->mix[l]);
}

/* Error signals and states of a group; `rule` moves to its end. */
static void advance(Work *w, Rule *rule, Way *way, int begin) {
    for (int first = 0; first < w->c->group; first += w->span) {
        if (way->rules) {
            REAL *at = way->rules + (int64_t)(first / w->span) * w->state;
            memcpy(at, rule->weights[0], w->state * sizeof(REAL));
        }
        if (w->exact)
            exact_errors(w, rule, way);
        else
            chunk_errors(w, rule, way, first);
        next_rule(w, rule, rule, way, first, begin + first);
    }
}

static void load_state(const Work *w, REAL *state, REAL *const *weights, REAL *const *past) {
    const Rule rule = view(w, state);
    for (int l = 0; l < w->c->depth; l++) {
        const int64_t size = w->c->dims[l] * w->c->dims[l + 1];
        memcpy(rule.weights[l], weights[l] + w->n * size, size * sizeof(REAL));
        if (w->c->momentum) memcpy(rule.past[l], past[l] + w->n * size, size * sizeof(REAL));
    }
}

static void save_state(const Work *w, REAL *state, REAL *const *weights, REAL *const *past) {
    const Rule rule = view(w, state);
    for (int l = 0; l < w->c->depth; l++) {
        const int64_t size = w->c->dims[l] * w->c->dims[l + 1];
        memcpy(weights[l] + w->n * size, rule.weights[l], size * sizeof(REAL));
        if (w->c->momentum) memcpy(past[l] + w->n * size, rule.past[l], size * sizeof(REAL));
    }
}

/* Does this processor multiply in bf16? */
int has_bf16(void) { return HAS_BF16; }

/* For the check that scan.py describes a Call as it is here. */
int64_t call_size(void) { return sizeof(Call); }

static int64_t segments(const Call *c) { return (c->length + c->segment - 1) / c->segment; }

/* Head n of B x H, from its first token to its last. Returns 1 when there is no memory. */
static int scan_head(const Call *c, int64_t n) {
    Work w;
    if (open_work(&w, c, n, 1, 0, 0)) return 1;
    load_state(&w, w.state_now, (REAL *const *)c->weights, (REAL *const *)c->past);
    Rule rule = view(&w, w.state_now), start = view(&w, w.state_start);
    int moving = -1;
    Way *way = &w.ways[0];
    for (int64_t begin = 0; begin < c->length; begin += c->group) {
        if (c->boundary && begin % c->segment == 0)
            memcpy(c->boundary + (n * segments(c) + begin / c->segment) * w.state, w.state_now,
                   w.state * sizeof(REAL));
        gather(&w, c->q, c->q_stride, begin, c->group, w.key, w.queries);
        if (is_closed(&w, &rule, begin, &moving)) {
            gather(&w, c->k, c->k_stride, begin, c->group, w.key, way->inputs[0]);
            gather(&w, c->v, c->v_stride, begin, c->group, w.value, w.values);
            read_closed(&w, &rule, way);
        } else {
            memcpy(w.state_start, w.state_now, w.state * sizeof(REAL));
            load_group(&w, way, begin);
            advance(&w, &rule, way, begin);
            read_group(&w, &start, way);
        }
        write_output(&w, begin);
        write_surprise(&w, way, begin);
    }
    save_state(&w, w.state_now, c->weights_after, c->past_after);
    return 0;
}

/* ---- backward ----------------------------------------------------------------------------- */

/* Row sums of x * y, subtracted from or added to `sums`. */
static void add_row_dots(int m, int n, REAL sign, const REAL *x, const REAL *y, REAL *sums) {
    for (int t = 0; t < m; t++) sums[t] += sign * dot(n, x + (int64_t)t * n, y + (int64_t)t * n);
}

/* Through the reads: fills d_inputs, d_deltas, dz, adds to the slopes of the coefficients. */
static void read_group_backward(Work *w, const Rule *start, const Way *way, int begin) {
    const Call *c = w->c;
    const int P = c->group, L = c->depth;
    REAL *slope = w->dz[L - 1];
    gather(w, c->d_output, c->slope_stride, begin, P, w->value, slope);
    REAL *d_queries = w->d_values; /* the residual's share, until the chunks need the place */
    if (c->residual) memcpy(d_queries, slope, (size_t)P * w->value * sizeof(REAL));
    if (c->norm) {
        layer_norm(P, w->value, w->z[L - 1], w->normed, w->inverse);
        layer_norm_backward(P, w->value, w->normed, w->inverse, slope, slope);
    }
    for (int l = L - 1; l >= 0; l--) {
        const int in = c->dims[l], out = c->dims[l + 1];
        const Mix *mix = &w->mix[w->same[l]];
        MixSlope *d_mix = &w->mix_slope[w->same[l]];
        const REAL *x = w->x[l], *dz = w->dz[l];
        REAL *dx = w->dx, *scored = w->scratch;
        mask_scores(P, w->scores[l], mix->G, w->masked);
        causal_sum_transposed(P, out, -1, w->masked, dz, 0, w->d_deltas[l]);
        causal_scores(P, out, dz, way->deltas[l], scored);
        for (int t = 0; t < P; t++)
            for (int64_t i = (int64_t)t * P; i <= (int64_t)t * P + t; i++)
                d_mix->G[i] -= w->scores[l][i] * scored[i];
        mask_scores(P, scored, mix->G, w->masked);
        causal_sum_transposed(P, in, -1, w->masked, x, 0, w->d_inputs[l]);
        causal_sum(P, in, -1, w->masked, way->inputs[l], 0, dx);
        for (int part = 0; part < (c->momentum ? 2 : 1); part++) {
            const REAL *matrix = part ? start->past[l] : start->weights[l];
            const REAL *scale = part ? mix->m : mix->beta;
            REAL *d_scale = part ? d_mix->m : d_mix->beta;
            if (in <= out) {
                times_transposed(P, in, out, 1, dz, matrix, 0, w->scratch);
                add_row_dots(P, in, 1, w->scratch, x, d_scale);
                scale_rows(P, in, scale, w->scratch, 1, dx);
            } else {
                times(P, out, in, 1, x, matrix, 0, w->scratch);
                add_row_dots(P, out, 1, w->scratch, dz, d_scale);
                scale_rows(P, out, scale, dz, 0, w->scratch);
                times_transposed(P, in, out, 1, w->scratch, matrix, 1, dx);
            }
        }
        if (c->anchored) {
            const int64_t size = (int64_t)in * out;
            times_transposed(P, in, out, 1, dz, c->anchor[l] + w->head * size, 1, dx);
            add_outer(in, out, P, 1, x, dz, w->d_anchor[l]);
        }
        if (l > 0) times_slope(c->gelu, (int64_t)P * in, dx, w->z[l - 1], w->dz[l - 1]);
    }
    if (c->residual)
        for (int64_t i = 0; i < (int64_t)P * w->key; i++) w->dx[i] += d_queries[i];
    scatter(w, w->dx, begin, P, w->key, c->d_q);
}

/* The share of the reads in the gradient of the state at the group's start. */
static void read_group_state_slope(Work *w, Rule *slope) {
    const Call *c = w->c;
    const int P = c->group;
    for (int l = 0; l < c->depth; l++) {
        const int in = c->dims[l], out = c->dims[l + 1];
        const Mix *mix = &w->mix[w->same[l]];
        for (int part = 0; part < (c->momentum ? 2 : 1); part++) {
            const REAL *scale = part ? mix->m : mix->beta;
            REAL *target = part ? slope->past[l] : slope->weights[l];
            if (in <= out) {
                scale_rows(P, in, scale, w->x[l], 0, w->scratch);
                add_outer(in, out, P, 1, w->scratch, w->dz[l], target);
            } else {
                scale_rows(P, out, scale, w->dz[l], 0, w->scratch);
                add_outer(in, out, P, 1, w->x[l], w->scratch, target);
            }
        }
    }
}

/* Through the state after a chunk: `slope` moves to before it; adds to d_inputs, d_deltas. */
static void next_rule_backward(Work *w, Rule *slope, const Rule *rule, const Way *way, int first,
                               int begin) {
    const Call *c = w->c;
    const int C = w->span, whole = w->span == c->group;
    for (int l = 0; l < c->depth; l++) {
        const int in = c->dims[l], out = c->dims[l + 1], own = w->same[l];
        const int64_t size = (int64_t)in * out;
        const Mix *mix = mix_of_chunk(w, l, begin);
        MixSlope *d_mix = whole ? &w->mix_slope[own] : &w->part_slope[own];
        if (!whole && own == l) clear_slope(d_mix, C);
        const REAL *a = way->inputs[l] + (int64_t)first * in;
        const REAL *delta = way->deltas[l] + (int64_t)first * out;
        REAL *da = w->d_inputs[l] + (int64_t)first * in, *dd = w->d_deltas[l] + (int64_t)first * out;
        for (int part = 0; part < (c->momentum ? 2 : 1); part++) {
            const REAL *after = part ? slope->past[l] : slope->weights[l];
            const REAL *scale = part ? mix->last : mix->G + (int64_t)(C - 1) * C;
            REAL *d_scale = part ? d_mix->last : d_mix->G + (int64_t)(C - 1) * C;
            for (int t = 0; t < C; t++) w->row[t] = -scale[t];
            if (in <= out) {
                times_transposed(C, in, out, 1, delta, after, 0, w->scratch);
                add_row_dots(C, in, -1, w->scratch, a, d_scale);
                scale_rows(C, in, w->row, w->scratch, 1, da);
                scale_rows(C, in, w->row, a, 0, w->scratch);
                times(C, out, in, 1, w->scratch, after, 1, dd);
            } else {
                times(C, out, in, 1, a, after, 0, w->scratch);
                add_row_dots(C, out, -1, w->scratch, delta, d_scale);
                scale_rows(C, out, w->row, w->scratch, 1, dd);
                scale_rows(C, out, w->row, delta, 0, w->scratch);
                times_transposed(C, in, out, 1, w->scratch, after, 1, da);
            }
        }
        const REAL keep = mix->beta[C - 1], push = mix->m[C - 1], carry = mix->H[C - 1];
        REAL *dW = slope->weights[l], *dS = slope->past[l];
        d_mix->beta[C - 1] += dot(size, dW, rule->weights[l]);
        if (c->momentum) {
            d_mix->m[C - 1] += dot(size, dW, rule->past[l]);
            d_mix->carry += dot(size, dS, rule->past[l]);
            for (int64_t i = 0; i < size; i++) {
                dS[i] = carry * dS[i] + push * dW[i];
                dW[i] *= keep;
            }
        } else {
            for (int64_t i = 0; i < size; i++) dW[i] *= keep;
        }
    }
    if (!whole)
        for (int l = 0; l < c->depth; l++)
            if (w->same[l] == l) mix_gates_backward(w, l, begin, &w->part[l], &w->part_slope[l]);
}

/* Through the error at the output: d(delta) in `slope` -> d(z) in place, d_keys, d_values. */
static void output_error_backward(Work *w, const Way *way, int first, REAL *slope) {
    const Call *c = w->c;
    const int C = c->chunk, D = w->value;
    const int64_t row = (int64_t)first * D, n = (int64_t)C * D;
    const REAL *normed = way->normed + row, *inverse = way->inverse + first;
    REAL *error = w->scratch, *d_error = w->scratch2, *dv = w->d_values + row;
    output_error(w, way, first, C, error);
    if (c->norm)
        layer_norm_backward(C, D, normed, inverse, slope, d_error);
    else
        memcpy(d_error, slope, n * sizeof(REAL));
    for (int64_t i = 0; i < n; i++) dv[i] = -d_error[i];
    if (c->l2 && c->residual)
        for (int64_t i = 0; i < n; i++) w->d_keys[row + i] += d_error[i];
    if (!c->norm) {
        if (!c->l2) memset(slope, 0, n * sizeof(REAL));
        return;
    }
    for (int t = 0; t < C; t++) {
        const REAL *e = error + (int64_t)t * D, *de = d_error + (int64_t)t * D;
        const REAL *y = normed + (int64_t)t * D;
        REAL *g = slope + (int64_t)t * D, *dn = w->normed + (int64_t)t * D;
        const REAL along = dot(D, e, y) / D, across = dot(D, g, y) / D, spread = dot(D, e, de);
        for (int j = 0; j < D; j++) dn[j] = -inverse[t] * (g[j] * along + e[j] * across);
        if (c->l2)
            for (int j = 0; j < D; j++) dn[j] += de[j];
        layer_norm_backward(1, D, y, inverse + t, dn, g);
        for (int j = 0; j < D; j++) g[j] -= y[j] * (spread * inverse[t] / D);
    }
}

/* Through a chunk's error signals; adds to the gradients of the weights they were taken at. */
static void chunk_errors_backward(Work *w, const Rule *rule, Rule *slope, const Way *way, int first) {
    const Call *c = w->c;
    const int C = c->chunk, L = c->depth;
    const REAL *at[MAX_DEPTH];
    for (int l = 0; l < L; l++) at[l] = whole_weights(w, rule, l);
    for (int l = 0; l < L && c->max_surprise; l++) bound_errors_backward(w, way, l, first);
    for (int l = 1; l < L; l++) { /* delta_{l-1} = (delta_l M_l^T) * activate'(z_{l-1}) */
        const int in = c->dims[l], out = c->dims[l + 1];
        const int64_t row = (int64_t)first * in;
        REAL *grown = w->d_deltas[l - 1] + row;
        slope_backward(c->gelu, (int64_t)C * in, way->outputs[l - 1] + row, way->back[l] + row, grown,
                       w->dx, w->slopes[l - 1]);
        times(C, out, in, 1, grown, at[l], 1, w->d_deltas[l] + (int64_t)first * out);
        const REAL *delta = way->deltas[l] + (int64_t)first * out;
        add_outer(in, out, C, 1, grown, delta, slope->weights[l]);
        if (c->anchored) add_outer(in, out, C, 1, grown, delta, w->d_anchor[l]);
        memcpy(grown, w->dx, (size_t)C * in * sizeof(REAL)); /* now the gradient of z_{l-1} */
    }
    output_error_backward(w, way, first, w->d_deltas[L - 1] + (int64_t)first * w->value);
    for (int l = L - 1; l >= 0; l--) {
        const int in = c->dims[l], out = c->dims[l + 1];
        const REAL *dz = w->d_deltas[l] + (int64_t)first * out;
        const REAL *a = way->inputs[l] + (int64_t)first * in;
        REAL *da = w->d_inputs[l] + (int64_t)first * in;
        add_outer(in, out, C, 1, a, dz, slope->weights[l]);
        if (c->anchored) add_outer(in, out, C, 1, a, dz, w->d_anchor[l]);
        times_transposed(C, in, out, 1, dz, at[l], 1, da);
        if (l > 0) {
            REAL *below = w->d_deltas[l - 1] + (int64_t)first * in;
            for (int64_t i = 0; i < (int64_t)C * in; i++) below[i] += da[i] * w->slopes[l - 1][i];
        }
    }
}

/* Heads first ... last - 1, each on its own. */
int scan(const Call *c, int64_t first, int64_t last) {
    int failed = 0;
    for (int64_t n = first; n < last && !failed; n++) failed = scan_head(c, n);
    close_work();
    return failed;
}

/* Head n: gradients of everything `scan_head` read, from those of everything it gave. */
static int scan_head_backward(const Call *c, int64_t n) {
    Work w;
    const int per_segment = c->segment / c->group;
    if (open_work(&w, c, n, per_segment, 1, 1)) return 1;
    load_state(&w, w.state_slope, (REAL *const *)c->d_weights_after, (REAL *const *)c->d_past_after);
    Rule rule = view(&w, w.state_now), slope = view(&w, w.state_slope);
    for (int l = 0; l < c->depth && c->anchored; l++)
        memset(w.d_anchor[l], 0, c->dims[l] * c->dims[l + 1] * sizeof(REAL));
    for (int64_t index = segments(c) - 1; index >= 0; index--) {
        const int64_t from = index * c->segment;
        const int64_t to = from + c->segment < c->length ? from + c->segment : c->length;
        memcpy(w.state_now, c->boundary + (n * segments(c) + index) * w.state, w.state * sizeof(REAL));
        for (int64_t begin = from; begin < to; begin += c->group) {
            Way *way = &w.ways[(begin - from) / c->group];
            load_group(&w, way, begin);
            advance(&w, &rule, way, begin);
        }
        for (int64_t begin = to - c->group; begin >= from; begin -= c->group) {
            Way *way = &w.ways[(begin - from) / c->group];
            Rule start = view(&w, way->rules);
            load_group(&w, way, begin);
            gather(&w, c->q, c->q_stride, begin, c->group, w.key, w.queries);
            for (int l = 0; l < c->depth; l++)
                if (w.same[l] == l) clear_slope(&w.mix_slope[l], c->group);
            read_group(&w, &start, way);
            read_group_backward(&w, &start, way, begin);
            for (int first = c->group - w.span; first >= 0; first -= w.span) {
                Rule before = view(&w, way->rules + (int64_t)(first / w.span) * w.state);
                next_rule_backward(&w, &slope, &before, way, first, begin + first);
                if (w.exact)
                    exact_errors_backward(&w, &before, &slope, way);
                else
                    chunk_errors_backward(&w, &before, &slope, way, first);
            }
            read_group_state_slope(&w, &slope);
            for (int l = 0; l < c->depth; l++)
                if (w.same[l] == l) mix_gates_backward(&w, l, begin, &w.mix[l], &w.mix_slope[l]);
            scatter(&w, w.d_keys, begin, c->group, w.key, c->d_k);
            scatter(&w, w.d_values, begin, c->group, w.value, c->d_v);
        }
    }
    save_state(&w, w.state_slope, c->d_weights, c->d_past);
    for (int l = 0; l < c->depth && c->anchored; l++) {
        const int64_t size = c->dims[l] * c->dims[l + 1];
        memcpy(c->d_anchor[l] + n * size, w.d_anchor[l], size * sizeof(REAL));
    }
    return 0;
}

int scan_backward(const Call *c, int64_t first, int64_t last) {
    int failed = 0;
    for (int64_t n = first; n < last && !failed; n++) failed = scan_head_backward(c, n);
    close_work();
    return failed;
}
