"""Kernels of the linear memory, W (D x V) per head.

Notation of one chunk: queries q, keys k, probes p, targets u, errors e, and the coefficients
beta, m, G, carry, last of `titans.ops.coefficients`; b, c, g stand for the last row of beta, m
and G. W and S are the state before the chunk, W' and S' after it; `d` before a name is its
gradient.

    e  = signal(p W + r S, u)         (without norm: p W + r S - u, or -u)
    y  = beta (q W) + m (q S) - (G * q k^T) e
    W' = b W + c S - (g k)^T e        S' = carry S - (last k)^T e

`state_*` kernels walk over the chunks, one program per head and block of value columns;
`read_*` and `token_*` kernels run all chunks at once from the boundary states. Chunk layout:
tokens (BH, N, L, width); boundary states (BH, COUNT + 1, D, V) of the COUNT chunks from FIRST.
"""

from typing import no_type_check

import triton
import triton.language as tl

from titans.ops.triton.launch import COUNTS, tuned
from titans.ops.triton.pointwise import (
    dot,
    error_signal,
    error_signal_backward,
    load_row,
    load_rows,
    load_square,
    load_write,
    store_row,
    store_rows,
    store_square,
)


@tuned((4, 2), (2, 2), (2, 3), (4, 3), (8, 2))
@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def state_forward(
    K,
    P,
    R,
    U,
    BIAS,
    BETA,
    M,
    G,
    CARRY,
    LAST,
    W0,
    S0,
    W_ALL,
    S_ALL,
    E,
    N,
    FIRST,
    COUNT,
    L,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    L2: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Errors of every chunk, and the state at every boundary."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = d[:, None] * V + v[None, :]
    W = tl.load(W0 + head * D * V + tile)
    if S0 is not None:
        S = tl.load(S0 + head * D * V + tile)
    for i in range(COUNT):
        slot = (head * (COUNT + 1) + i) * D * V + tile
        tl.store(W_ALL + slot, W)
        chunk = head * N + FIRST + i
        k = load_rows(K, chunk, L, D, d, BLOCK_C)
        u = load_rows(U, chunk, L, V, v, BLOCK_C)
        z = tl.zeros_like(u)
        if L2 or NORM:
            p = k if P is None else load_rows(P, chunk, L, D, d, BLOCK_C)
            z = dot(p, W, PRECISION)
            if R is not None:
                z += dot(load_rows(R, chunk, L, D, d, BLOCK_C), S, PRECISION)
            if BIAS is not None:
                z += load_rows(BIAS, chunk, L, V, v, BLOCK_C)
        e = error_signal(z, u, L2, NORM, V)
        store_rows(E, e, head * COUNT + i, L, V, v, BLOCK_C)
        end = chunk * L + L - 1
        g = load_write(G, chunk, L, BLOCK_C)
        W = tl.load(BETA + end) * W - dot(tl.trans(k * g[:, None]), e, PRECISION)
        if S0 is not None:
            tl.store(S_ALL + slot, S)
            W += tl.load(M + end) * S
            last = load_row(LAST, chunk, L, BLOCK_C)
            S = tl.load(CARRY + chunk) * S - dot(tl.trans(k * last[:, None]), e, PRECISION)
    slot = (head * (COUNT + 1) + COUNT) * D * V + tile
    tl.store(W_ALL + slot, W)
    if S0 is not None:
        tl.store(S_ALL + slot, S)


@tuned((4, 2), (2, 2), (4, 3), (8, 2))
@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def read_forward(
    Q,
    K,
    E,
    BETA,
    M,
    G,
    W_ALL,
    S_ALL,
    Y,
    N,
    FIRST,
    COUNT,
    L,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y of one chunk and block of value columns."""
    head = (tl.program_id(0) // COUNT).to(tl.int64)
    i = tl.program_id(0) % COUNT
    chunk = head * N + FIRST + i
    d = tl.arange(0, D)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = (head * (COUNT + 1) + i) * D * V + d[:, None] * V + v[None, :]
    q = load_rows(Q, chunk, L, D, d, BLOCK_C)
    k = load_rows(K, chunk, L, D, d, BLOCK_C)
    e = load_rows(E, head * COUNT + i, L, V, v, BLOCK_C)
    scores = dot(q, tl.trans(k), PRECISION) * load_square(G, chunk, L, BLOCK_C)
    beta = load_row(BETA, chunk, L, BLOCK_C)
    y = beta[:, None] * dot(q, tl.load(W_ALL + slot), PRECISION) - dot(scores, e, PRECISION)
    if S_ALL is not None:
        m = load_row(M, chunk, L, BLOCK_C)
        y += m[:, None] * dot(q, tl.load(S_ALL + slot), PRECISION)
    store_rows(Y, y, chunk, L, V, v, BLOCK_C)


@tuned((4, 2), (2, 2), (4, 3), (8, 2))
@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def read_backward(
    DY,
    Q,
    K,
    BETA,
    M,
    G,
    DW_READ,
    DS_READ,
    DE_READ,
    N,
    FIRST,
    COUNT,
    L,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the reads of one chunk ask of its W, S and e; DW_READ, DS_READ (BH, COUNT, D, V)."""
    head = (tl.program_id(0) // COUNT).to(tl.int64)
    i = tl.program_id(0) % COUNT
    chunk = head * N + FIRST + i
    d = tl.arange(0, D)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = (head * COUNT + i) * D * V + d[:, None] * V + v[None, :]
    q = load_rows(Q, chunk, L, D, d, BLOCK_C)
    k = load_rows(K, chunk, L, D, d, BLOCK_C)
    dy = load_rows(DY, chunk, L, V, v, BLOCK_C)
    scores = dot(q, tl.trans(k), PRECISION) * load_square(G, chunk, L, BLOCK_C)
    de = -dot(tl.trans(scores), dy, PRECISION)
    store_rows(DE_READ, de, head * COUNT + i, L, V, v, BLOCK_C)
    beta = load_row(BETA, chunk, L, BLOCK_C)
    tl.store(DW_READ + slot, dot(tl.trans(q * beta[:, None]), dy, PRECISION))
    if DS_READ is not None:
        m = load_row(M, chunk, L, BLOCK_C)
        tl.store(DS_READ + slot, dot(tl.trans(q * m[:, None]), dy, PRECISION))


@tuned((4, 2), (2, 2), (2, 3), (4, 3), (8, 2))
@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def state_backward(
    K,
    P,
    R,
    U,
    BIAS,
    BETA,
    M,
    G,
    CARRY,
    LAST,
    W_ALL,
    DW_READ,
    DS_READ,
    DE_READ,
    DW_END,
    DS_END,
    DW_ALL,
    DS_ALL,
    DZ,
    DU,
    N,
    FIRST,
    COUNT,
    L,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    L2: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`state_forward` backwards: gradients of every boundary state, of z and of the targets.

    DW_ALL, DS_ALL (BH, COUNT + 1, D, V), DZ and DU (BH, N, L, V).
    """
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = d[:, None] * V + v[None, :]
    dW = tl.load(DW_END + head * D * V + tile)
    if DS_END is not None:
        dS = tl.load(DS_END + head * D * V + tile)
    for back in range(COUNT):
        i = COUNT - 1 - back
        chunk = head * N + FIRST + i
        here = head * COUNT + i
        slot = (head * (COUNT + 1) + i) * D * V + tile
        end = chunk * L + L - 1
        tl.store(DW_ALL + slot + D * V, dW)
        k = load_rows(K, chunk, L, D, d, BLOCK_C)
        g = load_write(G, chunk, L, BLOCK_C)
        de = load_rows(DE_READ, here, L, V, v, BLOCK_C) - dot(k * g[:, None], dW, PRECISION)
        if DS_END is not None:
            tl.store(DS_ALL + slot + D * V, dS)
            last = load_row(LAST, chunk, L, BLOCK_C)
            de -= dot(k * last[:, None], dS, PRECISION)
            dS = tl.load(CARRY + chunk) * dS + tl.load(M + end) * dW
            dS += tl.load(DS_READ + here * D * V + tile)
        dW = tl.load(BETA + end) * dW + tl.load(DW_READ + here * D * V + tile)
        p = k if P is None else load_rows(P, chunk, L, D, d, BLOCK_C)
        z = tl.zeros_like(de)
        u = tl.zeros_like(de)
        if NORM:
            u = load_rows(U, chunk, L, V, v, BLOCK_C)
            z = dot(p, tl.load(W_ALL + slot), PRECISION)
            if BIAS is not None:
                z += load_rows(BIAS, chunk, L, V, v, BLOCK_C)
        dz, du = error_signal_backward(de, z, u, L2, NORM, V)
        store_rows(DU, du, chunk, L, V, v, BLOCK_C)
        if L2 or NORM:
            store_rows(DZ, dz, chunk, L, V, v, BLOCK_C)
            dW += dot(tl.trans(p), dz, PRECISION)
            if R is not None:
                r = load_rows(R, chunk, L, D, d, BLOCK_C)
                dS += dot(tl.trans(r), dz, PRECISION)
    slot = head * (COUNT + 1) * D * V + tile
    tl.store(DW_ALL + slot, dW)
    if DS_END is not None:
        tl.store(DS_ALL + slot, dS)


@tuned((8, 1), (8, 2), (16, 1))
@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def token_backward(
    DY,
    DZ,
    Q,
    K,
    E,
    BETA,
    M,
    G,
    LAST,
    W_ALL,
    S_ALL,
    DW_ALL,
    DS_ALL,
    DQ,
    DK,
    DP,
    DR,
    DBETA,
    DM,
    DG,
    DLAST,
    DWRITE,
    DEND,
    N,
    FIRST,
    COUNT,
    L,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one chunk's tokens and coefficients, from those of the states around it.

    DWRITE (BH, N, L) is that of G's last row as it writes W', DEND (BH, N, 3) likewise of the
    last beta and m, and of carry. Without DP the probes are the keys.
    """
    head = (tl.program_id(0) // COUNT).to(tl.int64)
    i = tl.program_id(0) % COUNT
    chunk = head * N + FIRST + i
    d = tl.arange(0, D)
    q = load_rows(Q, chunk, L, D, d, BLOCK_C)
    k = load_rows(K, chunk, L, D, d, BLOCK_C)
    beta = load_row(BETA, chunk, L, BLOCK_C)
    g = load_write(G, chunk, L, BLOCK_C)
    dq = tl.zeros_like(q)
    dk = tl.zeros_like(q)
    dp = tl.zeros_like(q)
    dscores = tl.zeros([BLOCK_C, BLOCK_C], q.dtype)
    dbeta = tl.zeros_like(beta)
    dwrite = tl.zeros_like(beta)
    db = tl.sum(dbeta)
    if S_ALL is not None:
        m = load_row(M, chunk, L, BLOCK_C)
        last = load_row(LAST, chunk, L, BLOCK_C)
        dr = tl.zeros_like(q)
        dm = tl.zeros_like(beta)
        dlast = tl.zeros_like(beta)
        dc = tl.sum(dbeta)
        dcarry = tl.sum(dbeta)
    for column in range(0, V, BLOCK_V):
        v = column + tl.arange(0, BLOCK_V)
        slot = (head * (COUNT + 1) + i) * D * V + d[:, None] * V + v[None, :]
        W = tl.load(W_ALL + slot)
        dW = tl.load(DW_ALL + slot + D * V)
        dy = load_rows(DY, chunk, L, V, v, BLOCK_C)
        e = load_rows(E, head * COUNT + i, L, V, v, BLOCK_C)
        dscores -= dot(dy, tl.trans(e), PRECISION)
        read = dot(dy, tl.trans(W), PRECISION)
        dq += beta[:, None] * read
        dbeta += tl.sum(q * read, 1)
        written = dot(e, tl.trans(dW), PRECISION)
        dk -= g[:, None] * written
        dwrite -= tl.sum(k * written, 1)
        db += tl.sum(tl.sum(W * dW, 1))
        if DZ is not None:
            dz = load_rows(DZ, chunk, L, V, v, BLOCK_C)
            dp += dot(dz, tl.trans(W), PRECISION)
        if S_ALL is not None:
            S = tl.load(S_ALL + slot)
            dS = tl.load(DS_ALL + slot + D * V)
            read = dot(dy, tl.trans(S), PRECISION)
            dq += m[:, None] * read
            dm += tl.sum(q * read, 1)
            written = dot(e, tl.trans(dS), PRECISION)
            dk -= last[:, None] * written
            dlast -= tl.sum(k * written, 1)
            dc += tl.sum(tl.sum(S * dW, 1))
            dcarry += tl.sum(tl.sum(S * dS, 1))
            if DR is not None:
                dr += dot(dz, tl.trans(S), PRECISION)
    overlap = dot(q, tl.trans(k), PRECISION)
    store_square(DG, dscores * overlap, chunk, L, BLOCK_C)
    dscores *= load_square(G, chunk, L, BLOCK_C)
    dq += dot(dscores, k, PRECISION)
    dk += dot(tl.trans(dscores), q, PRECISION)
    if DP is None:
        dk += dp
    else:
        store_rows(DP, dp, chunk, L, D, d, BLOCK_C)
    store_rows(DQ, dq, chunk, L, D, d, BLOCK_C)
    store_rows(DK, dk, chunk, L, D, d, BLOCK_C)
    store_row(DBETA, dbeta, chunk, L, BLOCK_C)
    store_row(DWRITE, dwrite, chunk, L, BLOCK_C)
    tl.store(DEND + chunk * 3, db)
    if S_ALL is not None:
        store_row(DM, dm, chunk, L, BLOCK_C)
        store_row(DLAST, dlast, chunk, L, BLOCK_C)
        tl.store(DEND + chunk * 3 + 1, dc)
        tl.store(DEND + chunk * 3 + 2, dcarry)
        if DR is not None:
            store_rows(DR, dr, chunk, L, D, d, BLOCK_C)
