"""One token, written and read in one kernel: a program per head, no gradients.

delta = error at the base;  S' = eta S - theta a^T delta;  W' = (1 - alpha) W + S'
y = M'(q), with M' = anchor + W'
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.ops.networks import MemoryNetwork, Objective
from titans.ops.rule import Gates, MemoryOutput, RuleState
from titans.ops.triton.launch import tuned
from titans.ops.triton.mlp_kernels import load_base
from titans.ops.triton.pointwise import (
    activate,
    activation_slope,
    error_signal,
    layer_norm,
    load_tile,
    store_tile,
)


@triton.jit
@no_type_check
def write(
    W, S, W_NEW, S_NEW, a, delta, theta, ETA, ALPHA, head,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, rows, columns,
):  # fmt: skip
    """W' of one tile, after W' and S' were stored."""
    step = -theta * a[:, None] * delta[None, :]
    if S is not None:
        step += tl.load(ETA + head) * load_tile(S, head, ROWS, COLUMNS, rows, columns)
        store_tile(S_NEW, step, head, ROWS, COLUMNS, rows, columns)
    w = load_tile(W, head, ROWS, COLUMNS, rows, columns)
    if ALPHA is not None:
        w *= 1.0 - tl.load(ALPHA + head)
    w += step
    store_tile(W_NEW, w, head, ROWS, COLUMNS, rows, columns)
    return w


@triton.jit
@no_type_check
def anchored(w, ANCHOR, head, HEADS, ROWS: tl.constexpr, COLUMNS: tl.constexpr, rows, columns):
    if ANCHOR is not None:
        w += load_tile(ANCHOR, head % HEADS, ROWS, COLUMNS, rows, columns)
    return w


@triton.jit
@no_type_check
def error_of(
    z, k, VALUES, head, RESIDUAL: tl.constexpr, L2: tl.constexpr, NORM: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """The last layer's error signal (V) and its norm."""
    target = tl.load(VALUES + head * V + tl.arange(0, V))
    if RESIDUAL and L2:
        target -= k
    delta = tl.sum(error_signal(z[None, :], target[None, :], L2, NORM, V), 0)
    return delta, tl.sqrt(tl.sum(delta * delta))


@triton.jit
@no_type_check
def emit(Y, u, q, head, RESIDUAL: tl.constexpr, NORM: tl.constexpr, V: tl.constexpr):
    """Norm and residual of the read."""
    if NORM:
        normed, _ = layer_norm(u[None, :], V)
        u = tl.sum(normed, 0)
    if RESIDUAL:
        u += q
    tl.store(Y + head * V + tl.arange(0, V), u)


@tuned((4, 1), (2, 1), (8, 1))
@triton.jit
@no_type_check
def decode_linear(
    Q,
    K,
    VALUES,
    THETA1,
    ETA1,
    ALPHA1,
    A1,
    BASE1,
    W1,
    S1,
    W1_NEW,
    S1_NEW,
    Y,
    SURPRISE,
    HEADS,
    D: tl.constexpr,
    V: tl.constexpr,
    L2: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    v = tl.arange(0, V)
    q = tl.load(Q + head * D + d)
    k = tl.load(K + head * D + d)
    at = load_base(W1, head, BASE1, A1, head, HEADS, D, V, d, v)
    z = tl.sum(k[:, None] * at, 0)
    delta, surprise = error_of(z, k, VALUES, head, RESIDUAL, L2, NORM, V)
    tl.store(SURPRISE + head, surprise)
    theta = tl.load(THETA1 + head)
    w = write(W1, S1, W1_NEW, S1_NEW, k, delta, theta, ETA1, ALPHA1, head, D, V, d, v)
    w = anchored(w, A1, head, HEADS, D, V, d, v)
    emit(Y, tl.sum(q[:, None] * w, 0), q, head, RESIDUAL, NORM, V)


@tuned((4, 1), (4, 2), (8, 1), (8, 2), blocks=(32, 64))
@triton.jit
@no_type_check
def decode_mlp(
    Q,
    K,
    VALUES,
    THETA1,
    THETA2,
    ETA1,
    ETA2,
    ALPHA1,
    ALPHA2,
    A1,
    A2,
    BASE1,
    BASE2,
    W1,
    W2,
    S1,
    S2,
    W1_NEW,
    W2_NEW,
    S1_NEW,
    S2_NEW,
    Y,
    SURPRISE,
    HEADS,
    D: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GELU: tl.constexpr,
    L2: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    v = tl.arange(0, V)
    q = tl.load(Q + head * D + d)
    k = tl.load(K + head * D + d)
    z2 = tl.zeros([V], q.dtype)
    for column in range(0, F, BLOCK_F):
        f = column + tl.arange(0, BLOCK_F)
        at1 = load_base(W1, head, BASE1, A1, head, HEADS, D, F, d, f)
        at2 = load_base(W2, head, BASE2, A2, head, HEADS, F, V, f, v)
        h = activate(tl.sum(k[:, None] * at1, 0), GELU)
        z2 += tl.sum(h[:, None] * at2, 0)
    delta2, surprise = error_of(z2, k, VALUES, head, RESIDUAL, L2, NORM, V)
    tl.store(SURPRISE + head, surprise)
    theta1 = tl.load(THETA1 + head)
    theta2 = tl.load(THETA2 + head)
    u2 = tl.zeros([V], q.dtype)
    for column in range(0, F, BLOCK_F):
        f = column + tl.arange(0, BLOCK_F)
        at1 = load_base(W1, head, BASE1, A1, head, HEADS, D, F, d, f)
        at2 = load_base(W2, head, BASE2, A2, head, HEADS, F, V, f, v)
        z1 = tl.sum(k[:, None] * at1, 0)
        h = activate(z1, GELU)
        delta1 = tl.sum(at2 * delta2[None, :], 1) * activation_slope(z1, GELU)
        w1 = write(W1, S1, W1_NEW, S1_NEW, k, delta1, theta1, ETA1, ALPHA1, head, D, F, d, f)
        w2 = write(W2, S2, W2_NEW, S2_NEW, h, delta2, theta2, ETA2, ALPHA2, head, F, V, f, v)
        w1 = anchored(w1, A1, head, HEADS, D, F, d, f)
        w2 = anchored(w2, A2, head, HEADS, F, V, f, v)
        g = activate(tl.sum(q[:, None] * w1, 0), GELU)
        u2 += tl.sum(g[:, None] * w2, 0)
    emit(Y, u2, q, head, RESIDUAL, NORM, V)


def decode(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    state: RuleState,
    *,
    network: MemoryNetwork,
    objective: Objective,
    chunk_size: int,
    anchor: Sequence[Tensor] | None,
) -> MemoryOutput:
    """`neural_memory_triton` for one token (B, H, 1, D), without gradients."""
    batch, heads, _, key_dim = keys.shape
    width = values.shape[3]
    base = state.weights if state.offset == 0 else state.base
    weights = [fold(w) for w in state.weights]
    momentum = None if state.momentum is None else [fold(s) for s in state.momentum]
    new_weights = [torch.empty_like(w) for w in weights]
    new_momentum = None if momentum is None else [torch.empty_like(s) for s in momentum]
    output = values.new_empty(batch * heads, width)
    surprise = values.new_empty(batch * heads)
    layered = {
        "THETA": [fold(x) for x in gates.learning_rate],
        "ETA": None if gates.momentum is None else [fold(x) for x in gates.momentum],
        "ALPHA": None if gates.decay is None else [fold(x) for x in gates.decay],
        "A": None if anchor is None else [a.contiguous() for a in anchor],
        "BASE": None if base is None or state.offset == 0 else [fold(b) for b in base],
        "W": weights,
        "S": momentum,
    }
    named: dict[str, Any] = {
        f"{name}{layer + 1}": None if given is None else given[layer]
        for name, given in layered.items()
        for layer in range(network.depth)
    }
    for name, made in (("W", new_weights), ("S", new_momentum)):
        for layer in range(network.depth):
            named[f"{name}{layer + 1}_NEW"] = None if made is None else made[layer]
    if network.depth == 2:
        named |= {"F": weights[0].shape[2], "GELU": network.activation == "gelu"}
    kernel = decode_linear if network.depth == 1 else decode_mlp
    kernel[(batch * heads,)](
        Q=fold(queries),
        K=fold(keys),
        VALUES=fold(values),
        Y=output,
        SURPRISE=surprise,
        HEADS=heads,
        D=key_dim,
        V=width,
        L2=objective == "l2",
        NORM=network.norm,
        RESIDUAL=network.residual,
        **named,
    )
    W, S = (
        None if made is None else tuple(x.unflatten(0, (batch, heads)) for x in made)
        for made in (new_weights, new_momentum)
    )
    assert W is not None
    offset = (state.offset + 1) % chunk_size
    final = RuleState.after(W, S, base or state.weights, offset, chunk_size)
    return MemoryOutput(output.view(batch, heads, 1, width), final, surprise.view(batch, heads, 1))


def fold(x: Tensor) -> Tensor:
    return x.flatten(0, 1).contiguous()
