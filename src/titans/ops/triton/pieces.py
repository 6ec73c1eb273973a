"""Chunks of one length, from gates and tokens to what the kernels take, and back."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titans.ops.chunked import layer_coefficients
from titans.ops.coefficients import Coefficients
from titans.ops.networks import MemoryNetwork, Objective, layer_norm
from titans.ops.rule import Gates, MemoryOutput, RuleState
from titans.ops.triton import linear, mlp

Weights = tuple[Tensor, ...]
State = tuple[Weights, Weights | None, Weights | None]
"""Weights, momentum, and the base of the open chunk where it is not the weights."""


class Rule(NamedTuple):
    """What is computed. exact: a linear memory's true per-token gradients, by blocks."""

    network: MemoryNetwork
    objective: Objective
    anchor: Sequence[Tensor] | None
    exact: bool
    precision: str


class Piece(NamedTuple):
    """output (B, H, T, V), weights, momentum, surprise (B, H, T) of consecutive chunks."""

    output: Tensor
    weights: Weights
    momentum: Weights | None
    surprise: Tensor


def run_pieces(
    tokens: Sequence[Tensor],
    gates: Gates,
    state: RuleState,
    rule: Rule,
    chunk_size: int,
    block_size: int,
) -> MemoryOutput:
    """Piece by piece: the rest of an open chunk, whole chunks (exact: blocks), a new chunk."""
    W, S, base, offset = state.weights, state.momentum, state.base or state.weights, state.offset
    outputs, surprises = [], []
    step = block_size if rule.exact else chunk_size
    for start, stop, size in spans(tokens[0].shape[2], offset, step):
        if offset == 0:
            base = W
        output, W, S, surprise = run_piece(
            [x[:, :, start:stop].unflatten(2, (-1, size)) for x in tokens],
            gates.slice(start, stop).in_chunks(size),
            (W, S, None if offset == 0 else base),
            rule,
        )
        outputs.append(output)
        surprises.append(surprise)
        offset = (offset + stop - start) % chunk_size
    final = RuleState.after(W, S, base, offset, chunk_size)
    return MemoryOutput(torch.cat(outputs, 2), final, torch.cat(surprises, 2))


def spans(length: int, offset: int, chunk_size: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, chunk length): the rest of the open chunk, whole chunks, and a new one."""
    start = min((-offset) % chunk_size, length)
    rest = start + (length - start) // chunk_size * chunk_size
    for first, last, size in (
        (0, start, start),
        (start, rest, chunk_size),
        (rest, length, length - rest),
    ):
        if first < last:
            yield first, last, size


def run_piece(tokens: Sequence[Tensor], gates: Gates, state: State, rule: Rule) -> Piece:
    """Queries, keys, values (B, H, N, L, D) of N chunks of L tokens.

    Norm and residual of the read act per token and are applied here, after the kernels.
    """
    of = layer_coefficients(gates, rule.network.depth)
    run = run_linear if rule.network.depth == 1 else run_mlp
    reads, W, S, surprise = run(tokens, of, state, rule)
    if rule.network.norm:
        reads = layer_norm(reads)[0]
    if rule.network.residual:
        reads = tokens[0] + reads
    return Piece(reads.flatten(2, 3), W, S, surprise.flatten(2, 3))


def run_linear(
    tokens: Sequence[Tensor], coefficients: list[Coefficients], state: State, rule: Rule
) -> tuple[Tensor, Weights, Weights | None, Tensor]:
    """Reads before norm and residual, weights, momentum and surprise."""
    weights, momentum, base = state
    constant = None if rule.anchor is None else rule.anchor[0][None, :, None]  # (1, H, 1, D, V)
    if rule.exact:
        chunks, l2, norm = exact_chunks(tokens, coefficients[0], constant, rule)
    else:
        chunks, l2, norm = linear_chunks(tokens, coefficients[0], constant, base, rule)
    past = None if momentum is None else momentum[0]
    reads, W, S, surprise = linear.LinearMemory.apply(
        linear.Settings(l2, norm, rule.precision), *map(fold_heads, (*chunks, weights[0], past))
    )
    q = tokens[0]
    batch = q.shape[:2]
    reads = reads.unflatten(0, batch)
    if constant is not None:
        reads = reads + q @ constant
    S = None if S is None else (S.unflatten(0, batch),)
    return reads, (W.unflatten(0, batch),), S, surprise.unflatten(0, batch)


def linear_chunks(
    tokens: Sequence[Tensor],
    of: Coefficients,
    constant: Tensor | None,
    base: Weights | None,
    rule: Rule,
) -> tuple[linear.Chunks, bool, bool]:
    """Gradients at the chunk's start: the errors are signal(k W - target), l2 or dot, normed?

    Residual and, without a norm, the anchor's share of k W are constants: part of the target.
    """
    q, k, v = tokens
    l2, norm, bias = rule.objective == "l2", rule.network.norm, None
    if base is not None:
        # The one open chunk: its errors, taken at weights known before it, are the target.
        at = base[0][:, :, None] if constant is None else base[0][:, :, None] + constant
        target = -rule.network.error_signals([at], k, v, rule.objective)[1][0]
        l2 = norm = False
    else:
        target = v - k if l2 and rule.network.residual else v
        if constant is not None and norm:
            bias = k @ constant
        elif constant is not None and l2:
            target = target - k @ constant
    chunks = linear.Chunks(q, k, None, None, target, bias, of.beta, of.m, of.G, of.carry, of.last)
    return chunks, l2, norm


def exact_chunks(
    tokens: Sequence[Tensor], of: Coefficients, constant: Tensor | None, rule: Rule
) -> tuple[linear.Chunks, bool, bool]:
    """True gradients: one triangular solve a block gives the errors as T1 W + T2 S - T3.

    See `titans.ops.exact`; with "dot" the errors are -v, whatever the weights are.
    """
    q, k, v = tokens
    l2, probe, past_probe, target = rule.objective == "l2", None, None, v
    if l2:
        if rule.network.residual:
            target = target - k
        if constant is not None:
            target = target - k @ constant
        earlier = of.before()
        right = [target, earlier.scale(earlier.beta, k)]
        if earlier.m is not None:
            right.append(earlier.scale(earlier.m, k))
        target, probe, *rest = torch.linalg.solve_triangular(
            earlier.scores(k, k).tril(-1), torch.cat(right, -1), upper=False, unitriangular=True
        ).split([x.shape[-1] for x in right], -1)
        past_probe = rest[0] if rest else None
    chunks = linear.Chunks(
        q, k, probe, past_probe, target, None, of.beta, of.m, of.G, of.carry, of.last
    )
    return chunks, l2, False


def run_mlp(
    tokens: Sequence[Tensor], coefficients: list[Coefficients], state: State, rule: Rule
) -> tuple[Tensor, Weights, Weights | None, Tensor]:
    """Reads before norm and residual; the residual of the errors goes into the target."""
    (q, k, v), (weights, momentum, base) = tokens, state
    network, l2 = rule.network, rule.objective == "l2"
    settings = mlp.Settings(network.activation, l2, network.norm, q.shape[1], rule.precision)
    target = v - k if l2 and network.residual else v
    of = [x for c in coefficients for x in (c.beta, c.m, c.G, c.carry, c.last)]
    anchors = [None, None] if rule.anchor is None else [a.contiguous() for a in rule.anchor]
    reads, W1, W2, S1, S2, surprise = mlp.MLPMemory.apply(
        settings,
        *map(fold_heads, (q, k, target, *of)),
        *anchors,
        *map(fold_heads, base or (None, None)),
        *map(fold_heads, weights),
        *map(fold_heads, momentum or (None, None)),
    )
    batch = q.shape[:2]
    W = (W1.unflatten(0, batch), W2.unflatten(0, batch))
    S = None if S1 is None else (S1.unflatten(0, batch), S2.unflatten(0, batch))
    return reads.unflatten(0, batch), W, S, surprise.unflatten(0, batch)


def fold_heads(x: Tensor | None) -> Tensor | None:
    """(B, H, ...) -> (BH, ...), as the kernels address it: contiguous."""
    return None if x is None else x.flatten(0, 1).contiguous()
