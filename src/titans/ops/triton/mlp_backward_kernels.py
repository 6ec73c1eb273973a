"""Backward kernels of the two-layer memory; the notation is that of `mlp_kernels`.

`d` before a name is its gradient. `read_backward` runs all chunks at once and gives what the
reads ask of the states, of h and of the error signals; `state_backward` walks back over the
boundaries and through the errors.
"""

from typing import no_type_check

import triton
import triton.language as tl

from titans.ops.triton.launch import COUNTS, tuned
from titans.ops.triton.mlp_kernels import load_base, read_hidden
from titans.ops.triton.pointwise import (
    activate,
    activation_curvature,
    activation_slope,
    dot,
    error_signal_backward,
    load_row,
    load_rows,
    load_square,
    load_tile,
    load_write,
    store_row,
    store_rows,
    store_square,
    store_tile,
)


@tuned((4, 1), (8, 1), blocks=(32, 16))
@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def read_backward(
    DY,
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
    U1,
    DU1,
    DW1,
    DW2,
    DS1,
    DS2,
    DH,
    DDELTA1,
    DDELTA2,
    DQ,
    DK,
    DBETA1,
    DM1,
    DG1,
    DBETA2,
    DM2,
    DG2,
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
    """One chunk. DW1 .. DS2 (BH, COUNT, in, out); U1, DU1, DH, DDELTA1 (BH, COUNT, L, F).

    U1 is written for the second walk over the hidden units, DU1 for the anchor's gradient.
    """
    head = (tl.program_id(0) // COUNT).to(tl.int64)
    i = tl.program_id(0) % COUNT
    chunk = head * N + FIRST + i
    here = head * COUNT + i
    slot = head * (COUNT + 1) + i
    d = tl.arange(0, D)
    v = tl.arange(0, V)
    q = load_rows(Q, chunk, L, D, d, BLOCK_C)
    k = load_rows(K, chunk, L, D, d, BLOCK_C)
    dy = load_rows(DY, chunk, L, V, v, BLOCK_C)
    beta1 = load_row(BETA1, chunk, L, BLOCK_C)[:, None]
    beta2 = load_row(BETA2, chunk, L, BLOCK_C)[:, None]
    m1 = beta1
    if S1 is not None:
        m1 = load_row(M1, chunk, L, BLOCK_C)[:, None]
        m2 = load_row(M2, chunk, L, BLOCK_C)[:, None]
    scores = dot(q, tl.trans(k), PRECISION) * load_square(G1, chunk, L, BLOCK_C)
    overlap = tl.zeros_like(scores)
    for column in range(0, F, BLOCK_F):
        f = column + tl.arange(0, BLOCK_F)
        h = activate(load_rows(Z1, here, L, F, f, BLOCK_C), GELU)
        delta1 = load_rows(DELTA1, here, L, F, f, BLOCK_C)
        u1 = read_hidden(
            q, beta1, m1, scores, delta1, W1, S1, A1, slot, head, HEADS, D, F, d, f, PRECISION
        )
        store_rows(U1, u1, here, L, F, f, BLOCK_C)
        overlap += dot(activate(u1, GELU), tl.trans(h), PRECISION)
    tl.debug_barrier()

    G = load_square(G2, chunk, L, BLOCK_C)
    ddelta2 = -dot(tl.trans(overlap * G), dy, PRECISION)
    store_rows(DDELTA2, ddelta2, here, L, V, v, BLOCK_C)
    doverlap = -dot(dy, tl.trans(load_rows(DELTA2, here, L, V, v, BLOCK_C)), PRECISION)
    store_square(DG2, doverlap * overlap, chunk, L, BLOCK_C)
    doverlap *= G
    dq = tl.zeros_like(q)
    dscores = tl.zeros_like(scores)
    dbeta1 = tl.sum(dq, 1)
    dbeta2 = tl.zeros_like(dbeta1)
    if S1 is not None:
        dm1 = tl.zeros_like(dbeta1)
        dm2 = tl.zeros_like(dbeta1)
    for column in range(0, F, BLOCK_F):
        f = column + tl.arange(0, BLOCK_F)
        u1 = load_rows(U1, here, L, F, f, BLOCK_C)
        g = activate(u1, GELU)
        h = activate(load_rows(Z1, here, L, F, f, BLOCK_C), GELU)
        back = dot(dy, tl.trans(load_tile(W2, slot, F, V, f, v)), PRECISION)
        dg = beta2 * back + dot(doverlap, h, PRECISION)
        dbeta2 += tl.sum(g * back, 1)
        store_tile(DW2, dot(tl.trans(beta2 * g), dy, PRECISION), here, F, V, f, v)
        if S1 is not None:
            back = dot(dy, tl.trans(load_tile(S2, slot, F, V, f, v)), PRECISION)
            dg += m2 * back
            dm2 += tl.sum(g * back, 1)
            store_tile(DS2, dot(tl.trans(m2 * g), dy, PRECISION), here, F, V, f, v)
        if A2 is not None:
            dg += dot(dy, tl.trans(load_tile(A2, head % HEADS, F, V, f, v)), PRECISION)
        store_rows(DH, dot(tl.trans(doverlap), g, PRECISION), here, L, F, f, BLOCK_C)

        du1 = dg * activation_slope(u1, GELU)
        delta1 = load_rows(DELTA1, here, L, F, f, BLOCK_C)
        dscores -= dot(du1, tl.trans(delta1), PRECISION)
        ddelta1 = -dot(tl.trans(scores), du1, PRECISION)
        store_rows(DDELTA1, ddelta1, here, L, F, f, BLOCK_C)
        back = dot(du1, tl.trans(load_tile(W1, slot, D, F, d, f)), PRECISION)
        dq += beta1 * back
        dbeta1 += tl.sum(q * back, 1)
        store_tile(DW1, dot(tl.trans(beta1 * q), du1, PRECISION), here, D, F, d, f)
        if S1 is not None:
            back = dot(du1, tl.trans(load_tile(S1, slot, D, F, d, f)), PRECISION)
            dq += m1 * back
            dm1 += tl.sum(q * back, 1)
            store_tile(DS1, dot(tl.trans(m1 * q), du1, PRECISION), here, D, F, d, f)
        if A1 is not None:
            dq += dot(du1, tl.trans(load_tile(A1, head % HEADS, D, F, d, f)), PRECISION)
            store_rows(DU1, du1, here, L, F, f, BLOCK_C)
    store_square(DG1, dscores * dot(q, tl.trans(k), PRECISION), chunk, L, BLOCK_C)
    dscores *= load_square(G1, chunk, L, BLOCK_C)
    store_rows(DQ, dq + dot(dscores, k, PRECISION), chunk, L, D, d, BLOCK_C)
    store_rows(DK, dot(tl.trans(dscores), q, PRECISION), chunk, L, D, d, BLOCK_C)
    store_row(DBETA1, dbeta1, chunk, L, BLOCK_C)
    store_row(DBETA2, dbeta2, chunk, L, BLOCK_C)
    if S1 is not None:
        store_row(DM1, dm1, chunk, L, BLOCK_C)
        store_row(DM2, dm2, chunk, L, BLOCK_C)


@triton.jit
@no_type_check
def error_slopes(
    slope, k, h, write1, write2, last1, last2, DW1, DW2, DS1, DS2, after,
    D: tl.constexpr, F: tl.constexpr, V: tl.constexpr, d, f, v, PRECISION: tl.constexpr,
):  # fmt: skip
    """What W' and S' ask of delta1, added to `slope`, and of delta2, from one hidden block."""
    first = slope - dot(k * write1, load_tile(DW1, after, D, F, d, f), PRECISION)
    second = -dot(h * write2, load_tile(DW2, after, F, V, f, v), PRECISION)
    if DS1 is not None:
        first -= dot(k * last1, load_tile(DS1, after, D, F, d, f), PRECISION)
        second -= dot(h * last2, load_tile(DS2, after, F, V, f, v), PRECISION)
    return first, second


@tuned((4, 1), (8, 1), blocks=(32, 16))
@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def state_backward(
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
    DW1_READ,
    DW2_READ,
    DS1_READ,
    DS2_READ,
    DH,
    DDELTA1_READ,
    DDELTA2_READ,
    DDELTA1,
    DW1,
    DW2,
    DS1,
    DS2,
    DBASE1,
    DBASE2,
    DK,
    DU,
    DWRITE1,
    DWRITE2,
    DLAST1,
    DLAST2,
    DEND,
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
    """`state_forward` backwards, from the gradients of the last boundary in DW1 .. DS2.

    DBASE1, DBASE2 (BH, in, out), where wanted: the gradient of base + anchor, summed over
    chunks. DDELTA1 is written for the second walk over the hidden units. DEND (BH, N, 6) holds
    the gradients of the last beta1, m1, carry1, beta2, m2, carry2 as they made W' and S'.
    """
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    v = tl.arange(0, V)
    for walked in range(COUNT):
        i = COUNT - 1 - walked
        chunk = head * N + FIRST + i
        here = head * COUNT + i
        slot = head * (COUNT + 1) + i
        end = chunk * L + L - 1
        k = load_rows(K, chunk, L, D, d, BLOCK_C)
        delta2 = load_rows(DELTA2, here, L, V, v, BLOCK_C)
        ddelta2 = load_rows(DDELTA2_READ, here, L, V, v, BLOCK_C)
        write1 = load_write(G1, chunk, L, BLOCK_C)[:, None]
        write2 = load_write(G2, chunk, L, BLOCK_C)[:, None]
        last1 = write1
        last2 = write2
        if S1 is not None:
            last1 = load_row(LAST1, chunk, L, BLOCK_C)[:, None]
            last2 = load_row(LAST2, chunk, L, BLOCK_C)[:, None]
        for column in range(0, F, BLOCK_F):
            f = column + tl.arange(0, BLOCK_F)
            z1 = load_rows(Z1, here, L, F, f, BLOCK_C)
            h = activate(z1, GELU)
            ddelta1, part = error_slopes(
                load_rows(DDELTA1_READ, here, L, F, f, BLOCK_C),
                k, h, write1, write2, last1, last2, DW1, DW2, DS1, DS2, slot + 1,
                D, F, V, d, f, v, PRECISION,
            )  # fmt: skip
            store_rows(DDELTA1, ddelta1, here, L, F, f, BLOCK_C)
            at2 = load_base(W2, slot, BASE2, A2, head, HEADS, F, V, f, v)
            ddelta2 += part + dot(ddelta1 * activation_slope(z1, GELU), at2, PRECISION)
        z2 = load_rows(Z2, here, L, V, v, BLOCK_C)
        u = load_rows(U, chunk, L, V, v, BLOCK_C)
        dz2, du = error_signal_backward(ddelta2, z2, u, L2, NORM, V)
        store_rows(DU, du, chunk, L, V, v, BLOCK_C)
        tl.debug_barrier()

        dk = tl.zeros_like(k)
        dwrite1 = tl.sum(dk, 1)
        dwrite2 = tl.zeros_like(dwrite1)
        dlast1 = tl.zeros_like(dwrite1)
        dlast2 = tl.zeros_like(dwrite1)
        db1 = tl.sum(dwrite1)
        db2 = tl.sum(dwrite1)
        dc1 = tl.sum(dwrite1)
        dc2 = tl.sum(dwrite1)
        dcarry1 = tl.sum(dwrite1)
        dcarry2 = tl.sum(dwrite1)
        for column in range(0, F, BLOCK_F):
            f = column + tl.arange(0, BLOCK_F)
            z1 = load_rows(Z1, here, L, F, f, BLOCK_C)
            h = activate(z1, GELU)
            slope = activation_slope(z1, GELU)
            delta1 = load_rows(DELTA1, here, L, F, f, BLOCK_C)
            ddelta1 = load_rows(DDELTA1, here, L, F, f, BLOCK_C)
            at1 = load_base(W1, slot, BASE1, A1, head, HEADS, D, F, d, f)
            at2 = load_base(W2, slot, BASE2, A2, head, HEADS, F, V, f, v)
            dw1 = load_tile(DW1, slot + 1, D, F, d, f)
            dw2 = load_tile(DW2, slot + 1, F, V, f, v)
            db1 += tl.sum(tl.sum(dw1 * load_tile(W1, slot, D, F, d, f), 1))
            db2 += tl.sum(tl.sum(dw2 * load_tile(W2, slot, F, V, f, v), 1))
            written1 = dot(delta1, tl.trans(dw1), PRECISION)
            written2 = dot(delta2, tl.trans(dw2), PRECISION)
            dwrite1 -= tl.sum(k * written1, 1)
            dwrite2 -= tl.sum(h * written2, 1)
            dk -= write1 * written1
            dh = load_rows(DH, here, L, F, f, BLOCK_C) - write2 * written2
            if S1 is not None:
                s1 = load_tile(S1, slot, D, F, d, f)
                s2 = load_tile(S2, slot, F, V, f, v)
                ds1 = load_tile(DS1, slot + 1, D, F, d, f)
                ds2 = load_tile(DS2, slot + 1, F, V, f, v)
                dc1 += tl.sum(tl.sum(dw1 * s1, 1))
                dc2 += tl.sum(tl.sum(dw2 * s2, 1))
                dcarry1 += tl.sum(tl.sum(ds1 * s1, 1))
                dcarry2 += tl.sum(tl.sum(ds2 * s2, 1))
                written1 = dot(delta1, tl.trans(ds1), PRECISION)
                written2 = dot(delta2, tl.trans(ds2), PRECISION)
                dlast1 -= tl.sum(k * written1, 1)
                dlast2 -= tl.sum(h * written2, 1)
                dk -= last1 * written1
                dh -= last2 * written2
                ds1 = tl.load(CARRY1 + chunk) * ds1 + tl.load(M1 + end) * dw1
                ds2 = tl.load(CARRY2 + chunk) * ds2 + tl.load(M2 + end) * dw2
                ds1 += load_tile(DS1_READ, here, D, F, d, f)
                ds2 += load_tile(DS2_READ, here, F, V, f, v)
                store_tile(DS1, ds1, slot, D, F, d, f)
                store_tile(DS2, ds2, slot, F, V, f, v)
            dh += dot(dz2, tl.trans(at2), PRECISION)
            bent = ddelta1 * activation_curvature(z1, GELU)
            dz1 = dh * slope + bent * dot(delta2, tl.trans(at2), PRECISION)
            dk += dot(dz1, tl.trans(at1), PRECISION)
            dat1 = dot(tl.trans(k), dz1, PRECISION)
            dat2 = dot(tl.trans(ddelta1 * slope), delta2, PRECISION)
            dat2 += dot(tl.trans(h), dz2, PRECISION)
            dw1 = tl.load(BETA1 + end) * dw1 + load_tile(DW1_READ, here, D, F, d, f)
            dw2 = tl.load(BETA2 + end) * dw2 + load_tile(DW2_READ, here, F, V, f, v)
            if BASE1 is None:
                dw1 += dat1
                dw2 += dat2
            store_tile(DW1, dw1, slot, D, F, d, f)
            store_tile(DW2, dw2, slot, F, V, f, v)
            if DBASE1 is not None:
                if walked > 0:
                    dat1 += load_tile(DBASE1, head, D, F, d, f)
                    dat2 += load_tile(DBASE2, head, F, V, f, v)
                store_tile(DBASE1, dat1, head, D, F, d, f)
                store_tile(DBASE2, dat2, head, F, V, f, v)
        store_rows(DK, dk, chunk, L, D, d, BLOCK_C)
        store_row(DWRITE1, dwrite1, chunk, L, BLOCK_C)
        store_row(DWRITE2, dwrite2, chunk, L, BLOCK_C)
        tl.store(DEND + chunk * 6, db1)
        tl.store(DEND + chunk * 6 + 3, db2)
        if S1 is not None:
            store_row(DLAST1, dlast1, chunk, L, BLOCK_C)
            store_row(DLAST2, dlast2, chunk, L, BLOCK_C)
            tl.store(DEND + chunk * 6 + 1, dc1)
            tl.store(DEND + chunk * 6 + 2, dcarry1)
            tl.store(DEND + chunk * 6 + 4, dc2)
            tl.store(DEND + chunk * 6 + 5, dcarry2)
        tl.debug_barrier()
