"""The linear memory on a GPU: one autograd function over whole chunks of one length.

Forward: one sequential kernel over the chunk boundaries, then all reads at once. Backward,
segment by segment from the end: the boundary states are computed again (only those at segment
borders are kept), then reads, boundaries and tokens each have one kernel.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans.ops.triton import linear_kernels as kernels
from titans.ops.triton.launch import block_of, segments


class Settings(NamedTuple):
    """How e follows from z = p W + r S: l2 or dot, with or without LayerNorm; precision."""

    l2: bool
    norm: bool
    precision: str


class Chunks(NamedTuple):
    """Tokens and coefficients of N chunks of L tokens, all (BH, N, ...).

    queries, keys (L, D). probe, past_probe (L, D): what multiplies W and S in the errors; None
    for the keys and for nothing. target, bias (L, V): see `error_signal`. beta, m, last (L);
    G (L, L); carry (): see `Coefficients`.
    """

    queries: Tensor
    keys: Tensor
    probe: Tensor | None
    past_probe: Tensor | None
    target: Tensor
    bias: Tensor | None
    beta: Tensor
    m: Tensor | None
    G: Tensor
    carry: Tensor | None
    last: Tensor | None


class States(NamedTuple):
    """Of one segment: boundary states (BH, COUNT + 1, D, V) and errors (BH, COUNT, L, V)."""

    weights: Tensor
    momentum: Tensor | None
    errors: Tensor


class LinearMemory(torch.autograd.Function):
    """(chunks, W, S) -> reads (BH, N, L, V) before any norm, W', S', |e| (BH, N, L)."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> Any:
        *tokens, weights, momentum = tensors
        chunks = Chunks(*tokens)  # type: ignore[arg-type]
        assert weights is not None
        reads = torch.empty_like(chunks.target)
        surprise = chunks.target.new_empty(chunks.target.shape[:3])
        borders: list[Tensor | None] = []
        W, S = weights, momentum
        plan = list(segments(chunks.keys.shape[1], boundary_bytes(weights, momentum)))
        for first, count in plan:
            borders += [W, S]
            states = run_states(chunks, W, S, settings, first, count)
            run_reads(chunks, states, settings, first, count, reads)
            surprise[:, first : first + count] = torch.linalg.vector_norm(states.errors, dim=-1)
            W = states.weights[:, -1].clone()
            S = None if states.momentum is None else states.momentum[:, -1].clone()
        ctx.settings, ctx.plan = settings, plan
        ctx.save_for_backward(*tokens, *borders)
        ctx.mark_non_differentiable(surprise)
        return reads, W, S, surprise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Any) -> Any:
        slope_reads, dW, dS, _ = slopes
        size = len(Chunks._fields)
        chunks, borders = Chunks(*ctx.saved_tensors[:size]), ctx.saved_tensors[size:]
        W, S = borders[:2]
        slope_reads, dW = slope_reads.contiguous(), dW.contiguous()
        dS = None if S is None else dS.contiguous()
        gradients = empty_gradients(chunks, ctx.settings)
        for index, (first, count) in reversed(list(enumerate(ctx.plan))):
            W, S = borders[2 * index : 2 * index + 2]
            states = run_states(chunks, W, S, ctx.settings, first, count)
            dW, dS = run_backward(
                chunks, states, ctx.settings, (first, count), (slope_reads, dW, dS), gradients
            )
        return None, *collect(chunks, gradients), dW, dS


def boundary_bytes(weights: Tensor, momentum: Tensor | None) -> int:
    """Scratch that one chunk needs: its states, and in the backward their two gradients."""
    each = weights.shape[0] * weights.shape[1] * weights.shape[2] * weights.element_size()
    return each * 3 * (1 if momentum is None else 2)


def value_block(width: int, norm: bool = False) -> int:
    """Value columns per program: few, for more programs; a LayerNorm needs all of them."""
    return width if norm else min(width, 32)


def run_states(
    chunks: Chunks, W: Tensor, S: Tensor | None, settings: Settings, first: int, count: int
) -> States:
    heads, total, length, key_dim = chunks.keys.shape
    width = chunks.target.shape[3]
    states = States(
        W.new_empty(heads, count + 1, key_dim, width),
        None if S is None else W.new_empty(heads, count + 1, key_dim, width),
        W.new_empty(heads, count, length, width),
    )
    block = value_block(width, settings.norm)
    kernels.state_forward[(heads, width // block)](
        chunks.keys,
        chunks.probe,
        chunks.past_probe,
        chunks.target,
        chunks.bias,
        chunks.beta,
        chunks.m,
        chunks.G,
        chunks.carry,
        chunks.last,
        W,
        S,
        states.weights,
        states.momentum,
        states.errors,
        total,
        first,
        count,
        length,
        D=key_dim,
        V=width,
        BLOCK_C=block_of(length),
        BLOCK_V=block,
        L2=settings.l2,
        NORM=settings.norm,
        PRECISION=settings.precision,
    )
    return states


def run_reads(
    chunks: Chunks, states: States, settings: Settings, first: int, count: int, reads: Tensor
) -> None:
    heads, total, length, key_dim = chunks.keys.shape
    width = chunks.target.shape[3]
    block = value_block(width)
    kernels.read_forward[(heads * count, width // block)](
        chunks.queries,
        chunks.keys,
        states.errors,
        chunks.beta,
        chunks.m,
        chunks.G,
        states.weights,
        states.momentum,
        reads,
        total,
        first,
        count,
        length,
        D=key_dim,
        V=width,
        BLOCK_C=block_of(length),
        BLOCK_V=block,
        PRECISION=settings.precision,
    )


class Gradients(NamedTuple):
    """Of `Chunks`, filled segment by segment. z (BH, N, L, V) is that of the bias as well.

    write (BH, N, L) and end (BH, N, 3): see `token_backward`."""

    queries: Tensor
    keys: Tensor
    probe: Tensor | None
    past_probe: Tensor | None
    target: Tensor
    z: Tensor | None
    beta: Tensor
    m: Tensor | None
    G: Tensor
    last: Tensor | None
    write: Tensor
    end: Tensor


def empty_gradients(chunks: Chunks, settings: Settings) -> Gradients:
    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty_like(x)

    return Gradients(
        queries=torch.empty_like(chunks.queries),
        keys=torch.empty_like(chunks.keys),
        probe=like(chunks.probe),
        past_probe=like(chunks.past_probe),
        target=torch.empty_like(chunks.target),
        z=torch.empty_like(chunks.target) if settings.l2 or settings.norm else None,
        beta=torch.empty_like(chunks.beta),
        m=like(chunks.m),
        G=torch.empty_like(chunks.G),
        last=like(chunks.last),
        write=torch.empty_like(chunks.beta),
        end=chunks.beta.new_empty(*chunks.beta.shape[:2], 3),
    )


def collect(chunks: Chunks, of: Gradients) -> list[Tensor | None]:
    """One gradient per field of `Chunks`; the last row of beta, m and G also wrote the state."""
    of.beta[:, :, -1] += of.end[..., 0]
    of.G[:, :, -1] += of.write
    if of.m is not None:
        of.m[:, :, -1] += of.end[..., 1]
    return [
        of.queries,
        of.keys,
        of.probe,
        of.past_probe,
        of.target,
        None if chunks.bias is None else of.z,
        of.beta,
        of.m,
        of.G,
        None if chunks.carry is None else of.end[..., 2],
        of.last,
    ]


def run_backward(
    chunks: Chunks,
    states: States,
    settings: Settings,
    segment: tuple[int, int],
    slopes: tuple[Tensor, Tensor, Tensor | None],
    gradients: Gradients,
) -> tuple[Tensor, Tensor | None]:
    """One segment: fills its part of `gradients`, returns those of the state before it."""
    (first, count), (slope_reads, dW_end, dS_end) = segment, slopes
    heads, total, length, key_dim = chunks.keys.shape
    width = chunks.target.shape[3]
    sizes = {"D": key_dim, "V": width, "BLOCK_C": block_of(length)}
    block, precision = value_block(width), settings.precision
    dW_read = dW_end.new_empty(heads, count, key_dim, width)
    dS_read = None if dS_end is None else torch.empty_like(dW_read)
    de_read = torch.empty_like(states.errors)
    kernels.read_backward[(heads * count, width // block)](
        slope_reads,
        chunks.queries,
        chunks.keys,
        chunks.beta,
        chunks.m,
        chunks.G,
        dW_read,
        dS_read,
        de_read,
        total,
        first,
        count,
        length,
        **sizes,
        BLOCK_V=block,
        PRECISION=precision,
    )
    dW, dS = torch.empty_like(states.weights), None
    if dS_end is not None:
        dS = torch.empty_like(dW)
    state_block = value_block(width, settings.norm)
    kernels.state_backward[(heads, width // state_block)](
        chunks.keys,
        chunks.probe,
        chunks.past_probe,
        chunks.target,
        chunks.bias,
        chunks.beta,
        chunks.m,
        chunks.G,
        chunks.carry,
        chunks.last,
        states.weights,
        dW_read,
        dS_read,
        de_read,
        dW_end,
        dS_end,
        dW,
        dS,
        gradients.z,
        gradients.target,
        total,
        first,
        count,
        length,
        **sizes,
        BLOCK_V=state_block,
        L2=settings.l2,
        NORM=settings.norm,
        PRECISION=precision,
    )
    kernels.token_backward[(heads * count,)](
        slope_reads,
        gradients.z,
        chunks.queries,
        chunks.keys,
        states.errors,
        chunks.beta,
        chunks.m,
        chunks.G,
        chunks.last,
        states.weights,
        states.momentum,
        dW,
        dS,
        gradients.queries,
        gradients.keys,
        gradients.probe,
        gradients.past_probe,
        gradients.beta,
        gradients.m,
        gradients.G,
        gradients.last,
        gradients.write,
        gradients.end,
        total,
        first,
        count,
        length,
        **sizes,
        BLOCK_V=block,
        PRECISION=precision,
    )
    return dW[:, 0].contiguous(), None if dS is None else dS[:, 0].contiguous()
