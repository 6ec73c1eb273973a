"""Kernels of the two-layer memory, W1 (D x F) and W2 (F x V) per head.

One chunk, with the notation of `linear_kernels` and a number for the layer. B1 = base + anchor
are the weights that errors are taken at, and q is read through weights that change by token:

    z1 = k B1, h = act(z1), z2 = h B2             u1 = beta1 (q W1) + m1 (q S1) + q A1
    delta2 = signal(z2, u)                             - (G1 * q k^T) delta1,   g = act(u1)
    delta1 = (delta2 B2^T) * act'(z1)             y  = beta2 (g W2) + m2 (g S2) + g A2
    W1' = b1 W1 + c1 S1 - (w1 k)^T delta1              - (G2 * g h^T) delta2
    W2' = b2 W2 + c2 S2 - (w2 h)^T delta2

The weights do not fit on chip, so all kernels walk over blocks of hidden units and stream them;
a boundary state is written once, as the next chunk's input. A barrier stands where a program
reads again what it has written.
"""

from typing import no_type_check

import triton
import triton.language as tl

from titans.ops.triton.launch import COUNTS, tuned
from titans.ops.triton.pointwise import (
    activate,
    activation_slope,
    dot,
    error_signal,
    load_row,
    load_rows,
    load_square,
    load_tile,
    load_write,
    store_rows,
    store_tile,
)


@triton.jit
@no_type_check
def load_base(
    W, slot, BASE, ANCHOR, head, HEADS, ROWS: tl.constexpr, COLUMNS: tl.constexpr, rows, columns
):
    """The weights that errors are taken at: base (by default the weights) + anchor."""
    if BASE is None:
        tile = load_tile(W, slot, ROWS, COLUMNS, rows, columns)
    else:
        tile = load_tile(BASE, head, ROWS, COLUMNS, rows, columns)
    if ANCHOR is not None:
        tile += load_tile(ANCHOR, head % HEADS, ROWS, COLUMNS, rows, columns)
    return tile


@tuned((4, 1), (8, 1), (8, 2), blocks=(32, 16, 64))
@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def state_forward(
    K,
    U,
    BETA1,
    M1,
    G1,
    CARRY1,
    LAST1,
    BETA2,
    M2,
    G2,
    CARRY2,
    LAST2,
    A1,
    A2,
    BASE1,
    BASE2,
    W1,
    W2,
    S1,
    S2,
    Z1,
    Z2,
    DELTA1,
    DELTA2,
    N,
    FIRST,
    COUNT,
    L,
    HEADS,
    D: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GELU: tl.constexpr,
    L2: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Error signals of every chunk, and the state at every boundary, from that at the first.

    W1, S1 (BH, COUNT + 1, D, F), W2, S2 (.., F, V); Z1, DELTA1 (BH, COUNT, L, F).
    """
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    v = tl.arange(0, V)
    for i in range(COUNT):
        chunk = head * N + FIRST + i
        here = head * COUNT + i
        slot = head * (COUNT + 1) + i
        end = chunk * L + L - 1
        k = load_rows(K, chunk, L, D, d, BLOCK_C)
        u = load_rows(U, chunk, L, V, v, BLOCK_C)
        z2 = tl.zeros_like(u)
        for column in range(0, F, BLOCK_F):
            f = column + tl.arange(0, BLOCK_F)
            at1 = load_base(W1, slot, BASE1, A1, head, HEADS, D, F, d, f)
            at2 = load_base(W2, slot, BASE2, A2, head, HEADS, F, V, f, v)
            z1 = dot(k, at1, PRECISION)
            store_rows(Z1, z1, here, L, F, f, BLOCK_C)
            z2 += dot(activate(z1, GELU), at2, PRECISION)
        delta2 = error_signal(z2, u, L2, NORM, V)
        store_rows(Z2, z2, here, L, V, v, BLOCK_C)
        store_rows(DELTA2, delta2, here, L, V, v, BLOCK_C)
        write1 = load_write(G1, chunk, L, BLOCK_C)[:, None]
        write2 = load_write(G2, chunk, L, BLOCK_C)[:, None]
        tl.debug_barrier()
        for column in range(0, F, BLOCK_F):
            f = column + tl.arange(0, BLOCK_F)
            z1 = load_rows(Z1, here, L, F, f, BLOCK_C)
            h = activate(z1, GELU)
            at2 = load_base(W2, slot, BASE2, A2, head, HEADS, F, V, f, v)
            delta1 = dot(delta2, tl.trans(at2), PRECISION) * activation_slope(z1, GELU)
            store_rows(DELTA1, delta1, here, L, F, f, BLOCK_C)
            w1 = tl.load(BETA1 + end) * load_tile(W1, slot, D, F, d, f)
            w2 = tl.load(BETA2 + end) * load_tile(W2, slot, F, V, f, v)
            w1 -= dot(tl.trans(k * write1), delta1, PRECISION)
            w2 -= dot(tl.trans(h * write2), delta2, PRECISION)
            if S1 is not None:
                s1 = load_tile(S1, slot, D, F, d, f)
                s2 = load_tile(S2, slot, F, V, f, v)
                w1 += tl.load(M1 + end) * s1
                w2 += tl.load(M2 + end) * s2
                last1 = load_row(LAST1, chunk, L, BLOCK_C)[:, None]
                last2 = load_row(LAST2, chunk, L, BLOCK_C)[:, None]
                s1 = tl.load(CARRY1 + chunk) * s1 - dot(tl.trans(k * last1), delta1, PRECISION)
                s2 = tl.load(CARRY2 + chunk) * s2 - dot(tl.trans(h * last2), delta2, PRECISION)
                store_tile(S1, s1, slot + 1, D, F, d, f)
                store_tile(S2, s2, slot + 1, F, V, f, v)
            store_tile(W1, w1, slot + 1, D, F, d, f)
            store_tile(W2, w2, slot + 1, F, V, f, v)
        tl.debug_barrier()


@triton.jit
@no_type_check
def read_hidden(
    q, beta, m, scores, delta1, W1, S1, A1, slot, head, HEADS,
    D: tl.constexpr, F: tl.constexpr, d, f, PRECISION: tl.constexpr,
):  # fmt: skip
    """u1 of a chunk's queries for one block of hidden units."""
    u1 = beta * dot(q, load_tile(W1, slot, D, F, d, f), PRECISION)
    u1 -= dot(scores, delta1, PRECISION)
    if S1 is not None:
        u1 += m * dot(q, load_tile(S1, slot, D, F, d, f), PRECISION)
    if A1 is not None:
        u1 += dot(q, load_tile(A1, head % HEADS, D, F, d, f), PRECISION)
    return u1


@tuned((4, 1), (8, 1), (8, 2), blocks=(32, 16, 64))
@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def read_forward(
    Q,
    K,
    BETA1,
    M1,
    G1,
    BETA2,
    M2,
    G2,
    A1,
    A2,
    W1,
    W2,
    S1,
    S2,
    Z1,
    DELTA1,
    DELTA2,
    Y,
    N,
    FIRST,
    COUNT,
    L,
    HEADS,
    D: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y of one chunk."""
    head = (tl.program_id(0) // COUNT).to(tl.int64)
    i = tl.program_id(0) % COUNT
    chunk = head * N + FIRST + i
    here = head * COUNT + i
    slot = head * (COUNT + 1) + i
    d = tl.arange(0, D)
    v = tl.arange(0, V)
    q = load_rows(Q, chunk, L, D, d, BLOCK_C)
    k = load_rows(K, chunk, L, D, d, BLOCK_C)
    beta1 = load_row(BETA1, chunk, L, BLOCK_C)[:, None]
    beta2 = load_row(BETA2, chunk, L, BLOCK_C)[:, None]
    m1 = beta1
    if S1 is not None:
        m1 = load_row(M1, chunk, L, BLOCK_C)[:, None]
        m2 = load_row(M2, chunk, L, BLOCK_C)[:, None]
    scores = dot(q, tl.trans(k), PRECISION) * load_square(G1, chunk, L, BLOCK_C)
    overlap = tl.zeros_like(scores)
    y = tl.zeros([BLOCK_C, V], q.dtype)
    for column in range(0, F, BLOCK_F):
        f = column + tl.arange(0, BLOCK_F)
        h = activate(load_rows(Z1, here, L, F, f, BLOCK_C), GELU)
        delta1 = load_rows(DELTA1, here, L, F, f, BLOCK_C)
        u1 = read_hidden(
            q, beta1, m1, scores, delta1, W1, S1, A1, slot, head, HEADS, D, F, d, f, PRECISION
        )
        g = activate(u1, GELU)
        overlap += dot(g, tl.trans(h), PRECISION)
        y += beta2 * dot(g, load_tile(W2, slot, F, V, f, v), PRECISION)
        if S1 is not None:
            y += m2 * dot(g, load_tile(S2, slot, F, V, f, v), PRECISION)
        if A2 is not None:
            y += dot(g, load_tile(A2, head % HEADS, F, V, f, v), PRECISION)
    delta2 = load_rows(DELTA2, here, L, V, v, BLOCK_C)
    y -= dot(overlap * load_square(G2, chunk, L, BLOCK_C), delta2, PRECISION)
    store_rows(Y, y, chunk, L, V, v, BLOCK_C)
