"""The two-layer memory on a GPU: one autograd function over whole chunks of one length.

Like `linear.LinearMemory`: a sequential kernel for the states, a parallel one for the reads; the
backward goes segment by segment from the end and computes boundary states again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans.ops.networks import Activation, activate
from titans.ops.triton import mlp_backward_kernels as backward_kernels
from titans.ops.triton import mlp_kernels as kernels
from titans.ops.triton.launch import block_of, segments


class Settings(NamedTuple):
    """Activation; l2 or dot, with or without LayerNorm; number of heads; precision."""

    activation: Activation
    l2: bool
    norm: bool
    heads: int
    precision: str


class Chunks(NamedTuple):
    """Tokens and coefficients of N chunks of L tokens, (BH, N, ...), and constant weights.

    queries, keys (L, D); target (L, V), see `error_signal`. beta, m, last (L), G (L, L) and
    carry () of either layer: see `Coefficients`. anchors (H, in, out) or None. bases (BH, in,
    out), or None where errors are taken at the weights.
    """

    queries: Tensor
    keys: Tensor
    target: Tensor
    beta1: Tensor
    m1: Tensor | None
    G1: Tensor
    carry1: Tensor | None
    last1: Tensor | None
    beta2: Tensor
    m2: Tensor | None
    G2: Tensor
    carry2: Tensor | None
    last2: Tensor | None
    anchor1: Tensor | None
    anchor2: Tensor | None
    base1: Tensor | None
    base2: Tensor | None


Layers = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""W1, W2, S1, S2, or their gradients, (BH, in, out)."""


class MLPMemory(torch.autograd.Function):
    """(chunks, W, S) -> reads (BH, N, L, V) before any norm, W', S', |delta2| (BH, N, L)."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Any) -> Any:
        chunks, state = Chunks(*tensors[:-4]), tensors[-4:]
        reads = torch.empty_like(chunks.target)
        surprise = chunks.target.new_empty(chunks.target.shape[:3])
        borders: list[Tensor | None] = []
        plan = list(segments(chunks.keys.shape[1], chunk_bytes(chunks, state)))
        for first, count in plan:
            borders += state
            held = run_states(chunks, state, settings, first, count)
            run_reads(chunks, held, settings, first, count, reads)
            delta2 = held["DELTA2"]
            assert delta2 is not None
            surprise[:, first : first + count] = torch.linalg.vector_norm(delta2, dim=-1)
            state = boundary(held, -1)
        ctx.settings, ctx.plan = settings, plan
        ctx.save_for_backward(*chunks, *borders)
        ctx.mark_non_differentiable(surprise)
        return reads, *state, surprise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_reads: Tensor, *slopes: Any) -> Any:
        size = len(Chunks._fields)
        chunks, borders = Chunks(*ctx.saved_tensors[:size]), ctx.saved_tensors[size:]
        momentum = borders[2] is not None
        dstate = (*slopes[:2], *(slopes[2:4] if momentum else (None, None)))
        gradients = empty_gradients(chunks)
        slope_reads = slope_reads.contiguous()
        for index, (first, count) in reversed(list(enumerate(ctx.plan))):
            state = borders[4 * index : 4 * index + 4]
            held = run_states(chunks, state, ctx.settings, first, count)
            common = arguments(chunks, ctx.settings, first, count)
            asked = run_read_backward(chunks, held, common, slope_reads, gradients)
            dstate = run_state_backward(
                chunks, ctx.settings, held, common, asked, dstate, gradients
            )
        return None, *collect(chunks, gradients), *dstate


Held = dict[str, Tensor | None]
"""Of one segment, by the kernels' names: boundary states, Z1, Z2, DELTA1 and DELTA2."""


def chunk_bytes(chunks: Chunks, state: Any) -> int:
    """Scratch of one chunk: its states, and in the backward what reads ask and the gradients."""
    W1 = state[0]
    hidden = chunks.keys.shape[2] * W1.shape[2] * 6
    weights = (W1[0].numel() + state[1][0].numel()) * 3 * (1 if state[2] is None else 2)
    return W1.shape[0] * (hidden + weights) * W1.element_size()


def boundary(held: Held, index: int) -> Layers:
    """The state at one boundary of a segment, apart from its buffers."""
    parts = (held[name] for name in ("W1", "W2", "S1", "S2"))
    W1, W2, S1, S2 = (None if x is None else x[:, index].clone() for x in parts)
    assert W1 is not None
    assert W2 is not None
    return W1, W2, S1, S2


def arguments(chunks: Chunks, settings: Settings, first: int, count: int) -> dict[str, Any]:
    """What every kernel takes, by name."""
    _, total, length, key_dim = chunks.keys.shape
    named = {
        f"{name.upper()}{layer}": getattr(chunks, f"{name}{layer}")
        for name in ("beta", "m", "G")
        for layer in (1, 2)
    }
    return {
        **named,
        "K": chunks.keys,
        "A1": chunks.anchor1,
        "A2": chunks.anchor2,
        "N": total,
        "FIRST": first,
        "COUNT": count,
        "L": length,
        "HEADS": settings.heads,
        "D": key_dim,
        "V": chunks.target.shape[3],
        "BLOCK_C": block_of(length),
        "GELU": settings.activation == "gelu",
        "PRECISION": settings.precision,
    }


def error_arguments(chunks: Chunks, settings: Settings) -> dict[str, Any]:
    """What the kernels that walk over the boundaries take as well."""
    return {
        "U": chunks.target,
        "CARRY1": chunks.carry1,
        "LAST1": chunks.last1,
        "CARRY2": chunks.carry2,
        "LAST2": chunks.last2,
        "BASE1": chunks.base1,
        "BASE2": chunks.base2,
        "L2": settings.l2,
        "NORM": settings.norm,
    }


def run_states(chunks: Chunks, state: Any, settings: Settings, first: int, count: int) -> Held:
    heads, _, length, _ = chunks.keys.shape
    hidden, width = state[1].shape[1:]

    def boundaries(start: Tensor | None) -> Tensor | None:
        if start is None:
            return None
        every = start.new_empty(heads, count + 1, *start.shape[1:])
        every[:, 0] = start
        return every

    held: Held = dict(zip(("W1", "W2", "S1", "S2"), map(boundaries, state), strict=True))
    for name, columns in (("Z1", hidden), ("Z2", width), ("DELTA1", hidden), ("DELTA2", width)):
        held[name] = state[0].new_empty(heads, count, length, columns)
    kernels.state_forward[(heads,)](
        **held,
        **arguments(chunks, settings, first, count),
        **error_arguments(chunks, settings),
        F=hidden,
    )
    return held


def run_reads(
    chunks: Chunks, held: Held, settings: Settings, first: int, count: int, reads: Tensor
) -> None:
    used = {name: x for name, x in held.items() if name != "Z2"}
    W2 = held["W2"]
    assert W2 is not None
    kernels.read_forward[(reads.shape[0] * count,)](
        Q=chunks.queries,
        Y=reads,
        **used,
        **arguments(chunks, settings, first, count),
        F=W2.shape[2],
    )


def empty_gradients(chunks: Chunks) -> Held:
    """By the kernels' names; of the keys in two parts, from reads and from errors.

    DWRITE (BH, N, L) and DEND (BH, N, 6): see `state_backward`. Of anchors a sum that grows
    segment by segment; of bases set by the one segment there is.
    """

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty_like(x)

    result = {
        "DQ": like(chunks.queries),
        "DK_READ": like(chunks.keys),
        "DK": like(chunks.keys),
        "DU": like(chunks.target),
        "DEND": chunks.beta1.new_empty(*chunks.beta1.shape[:2], 6),
    }
    for layer, anchor in ((1, chunks.anchor1), (2, chunks.anchor2)):
        for name in ("beta", "m", "G", "last"):
            result[f"D{name.upper()}{layer}"] = like(getattr(chunks, f"{name}{layer}"))
        result[f"DWRITE{layer}"] = torch.empty_like(chunks.beta1)
        result[f"DA{layer}"] = None if anchor is None else torch.zeros_like(anchor)
        result[f"DBASE{layer}"] = None
    return result


def run_read_backward(
    chunks: Chunks, held: Held, common: dict[str, Any], slope_reads: Tensor, gradients: Any
) -> Held:
    """What the reads of a segment ask of its states, of h and of the error signals."""
    first, count = common["FIRST"], common["COUNT"]
    hidden = held["Z1"]
    assert hidden is not None
    asked: Held = {
        f"D{name}": None if (x := held[name]) is None else torch.empty_like(x[:, :count])
        for name in ("W1", "W2", "S1", "S2", "DELTA1", "DELTA2")
    }
    asked["DH"], u1 = torch.empty_like(hidden), torch.empty_like(hidden)
    du1 = None if chunks.anchor1 is None else torch.empty_like(hidden)
    names = ("DQ", "DBETA1", "DM1", "DG1", "DBETA2", "DM2", "DG2")
    backward_kernels.read_backward[(slope_reads.shape[0] * count,)](
        DY=slope_reads,
        Q=chunks.queries,
        U1=u1,
        DU1=du1,
        DK=gradients["DK_READ"],
        F=hidden.shape[-1],
        **{name: x for name, x in held.items() if name != "Z2"},
        **asked,
        **{name: gradients[name] for name in names},
        **common,
    )
    if du1 is not None:
        part = slice(first, first + count)
        g = activate("gelu" if common["GELU"] else "silu", u1)
        gradients["DA1"] += outer(chunks.queries[:, part], du1, common["HEADS"])
        gradients["DA2"] += outer(g, slope_reads[:, part], common["HEADS"])
    return asked


def outer(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """sum_t a_t^T b_t of every head: (BH, N, L, in), (BH, N, L, out) -> (H, in, out)."""
    a, b = (x.flatten(1, 2) for x in (a, b))
    return (a.mT @ b).unflatten(0, (-1, heads)).sum(0)


def run_state_backward(
    chunks: Chunks,
    settings: Settings,
    held: Held,
    common: dict[str, Any],
    asked: Held,
    after: Sequence[Tensor | None],
    gradients: Any,
) -> Layers:
    """Gradients of the state before a segment, from those of the state after it."""
    slopes: Held = {}
    for name, last in zip(("W1", "W2", "S1", "S2"), after, strict=True):
        every = held[name]
        slopes[f"D{name}"] = None if every is None else torch.empty_like(every)
        if every is not None and last is not None:
            slopes[f"D{name}"][:, -1] = last  # type: ignore[index]
    if chunks.anchor1 is not None or chunks.base1 is not None:
        for name in ("W1", "W2"):
            constant = torch.empty_like(asked[f"D{name}"][:, 0])  # type: ignore[index]
            gradients[f"DBASE{name[1]}"] = constant
    hidden = held["Z1"]
    assert hidden is not None
    names = ("DBASE1", "DBASE2", "DK", "DU", "DWRITE1", "DWRITE2", "DLAST1", "DLAST2", "DEND")
    backward_kernels.state_backward[(hidden.shape[0],)](
        DDELTA1=torch.empty_like(hidden),
        DH=asked["DH"],
        F=hidden.shape[-1],
        **{f"{n}_READ": x for n, x in asked.items() if n != "DH"},
        **held,
        **slopes,
        **{name: gradients[name] for name in names},
        **common,
        **error_arguments(chunks, settings),
    )
    if chunks.anchor1 is not None:
        for layer in (1, 2):
            constant = gradients[f"DBASE{layer}"].unflatten(0, (-1, settings.heads))
            gradients[f"DA{layer}"] += constant.sum(0)
    return boundary({name[1:]: x for name, x in slopes.items()}, 0)


def collect(chunks: Chunks, of: Any) -> list[Tensor | None]:
    """One gradient per field of `Chunks`; the last row of beta, m and G also wrote the state."""
    result: list[Tensor | None] = [of["DQ"], of["DK_READ"] + of["DK"], of["DU"]]
    for layer, end in ((1, of["DEND"][..., :3]), (2, of["DEND"][..., 3:])):
        dbeta, dm, dG = (of[f"D{name}{layer}"] for name in ("BETA", "M", "G"))
        dbeta[:, :, -1] += end[..., 0]
        dG[:, :, -1] += of[f"DWRITE{layer}"]
        if dm is not None:
            dm[:, :, -1] += end[..., 1]
        result += [dbeta, dm, dG, None if dm is None else end[..., 2], of[f"DLAST{layer}"]]
    bases = [None, None] if chunks.base1 is None else [of["DBASE1"], of["DBASE2"]]
    return [*result, of["DA1"], of["DA2"], *bases]
