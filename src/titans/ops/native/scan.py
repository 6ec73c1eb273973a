"""The closed form on a CPU, compiled: one head of one sequence at a time (see scan.c).

Same function as `titans.ops.chunked`, and with chunk_size 1 and a linear memory the same as
`titans.ops.exact`, for decay per token. A head's memory and all its
intermediate results stay in one core's cache, and nothing is dispatched operation by operation.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans.ops.fused import group_size
from titans.ops.native.build import library
from titans.ops.native.threads import share
from titans.ops.networks import MemoryNetwork, Objective
from titans.ops.rule import Gates, GateSet

MAX_DEPTH = 8
SHARED_WORK = 2**20  # multiply-adds below which one thread is enough
SEGMENT_BYTES = 6 * 2**20  # what a segment's error signals and states may take in the backward pass

Triples = (ctypes.c_int64 * 3) * MAX_DEPTH
Pointers = ctypes.c_void_p * MAX_DEPTH


class Call(ctypes.Structure):
    """`Call` of scan.c, field by field."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ["batch", "heads", "length", "chunk", "group", "segment", "depth"]
        ),
        ("dims", ctypes.c_int64 * (MAX_DEPTH + 1)),
        ("same", ctypes.c_int64 * MAX_DEPTH),
        *(
            (name, ctypes.c_int64)
            for name in ["residual", "norm", "gelu", "l2", "momentum", "decay", "anchored", "bf16"]
        ),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ["q", "k", "v", "slope"]),
        ("gate_stride", Triples * 3),
        *((name, ctypes.c_void_p) for name in ["q", "k", "v"]),
        ("gate", Pointers * 3),
        *(
            (name, Pointers)
            for name in ["weights", "past", "anchor", "weights_after", "past_after"]
        ),
        *((name, ctypes.c_void_p) for name in ["output", "surprise", "boundary", "d_output"]),
        *((name, Pointers) for name in ["d_weights_after", "d_past_after"]),
        *((name, ctypes.c_void_p) for name in ["d_q", "d_k", "d_v"]),
        ("d_gate", Pointers * 3),
        *((name, Pointers) for name in ["d_weights", "d_past", "d_anchor"]),
        ("max_surprise", ctypes.c_double),
    ]


@dataclass(frozen=True)
class Plan:
    """What a call computes. gates: of every layer. chunk, group: in tokens."""

    network: MemoryNetwork
    objective: Objective
    max_surprise: float | None
    gates: tuple[GateSet, ...]
    anchored: bool
    chunk: int
    group: int
    bf16: bool = False

    @property
    def momentum(self) -> bool:
        return self.gates[0][1] is not None

    @property
    def exact(self) -> bool:
        """Does the scan solve for the gradients of all tokens of a group at once?"""
        return self.network.linear and self.chunk == 1 and self.max_surprise is None

    @property
    def gate_count(self) -> int:
        return 1 + max(i for layer in self.gates for i in layer if i is not None)


def unsupported(network: MemoryNetwork, per_channel: bool, device: str) -> str | None:
    """What these settings lack to be run here, or None."""
    if device != "cpu":
        return f"tensors on the CPU, got {device}"
    if network.depth > MAX_DEPTH:
        return f"a depth of at most {MAX_DEPTH}, got {network.depth}"
    return "decay per token, got decay per channel" if per_channel else None


def neural_memory_native(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    *,
    network: MemoryNetwork,
    objective: Objective,
    chunk_size: int,
    max_surprise: float | None,
    anchor: Sequence[Tensor] | None,
    bf16: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Whole chunks from a chunk boundary on; tensors (B, H, T, D), weights (B, H, in, out).

    bf16: round the factors of matrix products to bf16 where the processor is faster with them;
    sums, states and everything else stay float32.

    Returns outputs, surprise (B, H, T), and the weights and momentum after the last token.
    """
    group = min(group_size(chunk_size), keys.shape[2])
    distinct, positions = gates.distinct()
    plan = Plan(network, objective, max_surprise, positions, anchor is not None, chunk_size, group)
    if bf16 and not plan.exact and keys.dtype == torch.float32:  # exact: its products gain nothing
        plan = replace(plan, bf16=bool(library(keys.dtype).has_bf16()))
    # A learned start is expanded over the batch; the scan wants each head's own rows.
    states = [s.contiguous() for s in (*weights, *(momentum or []))]
    fixed = [a.contiguous() for a in anchor or []]
    tensors = [last_contiguous(x) for x in (queries, keys, values)]
    output, surprise, *after = NativeScan.apply(plan, *tensors, *distinct, *states, *fixed)
    past = None if momentum is None else tuple(after[network.depth :])
    return output, surprise, tuple(after[: network.depth]), past


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class NativeScan(torch.autograd.Function):
    """Inputs: q, k, v, the distinct gates, then weights, momenta and anchors of all layers."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        _, k, v = tensors[:3]
        batch, heads, length, _ = k.shape
        call, states, _ = describe(plan, tensors)
        segment = segment_size(plan, call, length)
        call.segment = segment
        # Results lie in memory as (B, T, H, D), as the caller wants them in the end.
        output = v.new_empty(batch, length, heads, v.shape[-1])
        surprise = v.new_empty(batch, length, heads)
        after = [torch.empty_like(s) for s in states]
        call.output, call.surprise = output.data_ptr(), surprise.data_ptr()
        set_states(plan, call, "weights_after", "past_after", after)
        boundary = None
        if any(ctx.needs_input_grad):
            count = sum(math.prod(s.shape[2:]) for s in states)
            boundary = v.new_empty(batch * heads, -(-length // segment), count)
            call.boundary = boundary.data_ptr()
            ctx.plan, ctx.segment = plan, segment
            ctx.save_for_backward(boundary, *tensors)
        run(library(v.dtype).scan, call)
        seen = surprise.transpose(1, 2)
        ctx.mark_non_differentiable(seen)
        return output.transpose(1, 2), seen, *after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, _: Tensor, *d_after: Tensor) -> tuple[Any, ...]:
        plan = ctx.plan
        boundary, *tensors = ctx.saved_tensors
        q, k, v = tensors[:3]
        batch, heads, length, _ = k.shape
        call, states, anchors = describe(plan, tensors)
        call.segment, call.boundary = ctx.segment, boundary.data_ptr()
        d_output = last_contiguous(d_output)
        call.d_output = d_output.data_ptr()
        call.slope_stride[:] = d_output.stride()[:3]
        d_after = tuple(d.contiguous() for d in d_after)
        set_states(plan, call, "d_weights_after", "d_past_after", d_after)

        def like(x: Tensor) -> Tensor:
            return x.new_empty(batch, length, heads, x.shape[-1])

        d_inputs = [like(q), like(k), like(v)]
        call.d_q, call.d_k, call.d_v = (d.data_ptr() for d in d_inputs)
        d_gates = [v.new_zeros(batch, length, heads) for _ in range(plan.gate_count)]
        for layer, positions in enumerate(plan.gates):
            for kind, position in enumerate(positions):
                if position is not None:
                    call.d_gate[kind][layer] = d_gates[position].data_ptr()
        d_states = [torch.empty_like(s) for s in states]
        set_states(plan, call, "d_weights", "d_past", d_states)
        d_anchors = [a.new_empty(batch, *a.shape) for a in anchors]
        for layer, d in enumerate(d_anchors):
            call.d_anchor[layer] = d.data_ptr()
        run(library(v.dtype).scan_backward, call)
        timed = (d.transpose(1, 2) for d in (*d_inputs, *d_gates))
        return None, *timed, *d_states, *(d.sum(0) for d in d_anchors)


def describe(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Call, list[Tensor], list[Tensor]]:
    """The inputs of `NativeScan` as a Call, and the states and anchors among them."""
    network = plan.network
    q, k, v, *rest = tensors
    gates, rest = rest[: plan.gate_count], rest[plan.gate_count :]
    width = network.depth * (2 if plan.momentum else 1)
    states, anchors = rest[:width], rest[width:]
    call = Call(
        batch=k.shape[0],
        heads=k.shape[1],
        length=k.shape[2],
        chunk=plan.chunk,
        group=plan.group,
        depth=network.depth,
        residual=network.residual,
        norm=network.norm,
        gelu=network.activation == "gelu",
        l2=plan.objective == "l2",
        momentum=plan.momentum,
        decay=plan.gates[0][2] is not None,
        anchored=plan.anchored,
        bf16=plan.bf16,
        max_surprise=plan.max_surprise or 0.0,
    )
    shapes = network.shapes(k.shape[-1], v.shape[-1])
    call.dims[: network.depth + 1] = [shapes[0][0], *(out for _, out in shapes)]
    call.same[: network.depth] = [plan.gates.index(layer) for layer in plan.gates]
    for name, x in (("q", q), ("k", k), ("v", v)):
        setattr(call, name, x.data_ptr())
        getattr(call, f"{name}_stride")[:] = x.stride()[:3]
    for layer, positions in enumerate(plan.gates):
        for kind, position in enumerate(positions):
            if position is not None:
                call.gate[kind][layer] = gates[position].data_ptr()
                call.gate_stride[kind][layer][:] = gates[position].stride()
    set_states(plan, call, "weights", "past", states)
    for layer, anchor in enumerate(anchors):
        call.anchor[layer] = anchor.data_ptr()
    return call, states, anchors


def set_states(plan: Plan, call: Call, weights: str, past: str, tensors: Sequence[Tensor]) -> None:
    depth = plan.network.depth
    for layer in range(depth):
        getattr(call, weights)[layer] = tensors[layer].data_ptr()
        if plan.momentum:
            getattr(call, past)[layer] = tensors[depth + layer].data_ptr()


def segment_size(plan: Plan, call: Call, length: int) -> int:
    """Tokens between two states that are kept: about the square root of the groups there are,
    and no more than what is recomputed between them takes of a core's cache."""
    depth, size = plan.network.depth, 4
    dims = list(call.dims[: depth + 1])
    state = sum(i * o for i, o in pairwise(dims)) * (2 if plan.momentum else 1)
    rows = plan.group * (2 * sum(dims) + sum(dims[1:]) + dims[-1])
    spans = 1 if plan.exact else plan.group // plan.chunk
    group = (spans * state + rows) * size
    groups = min(math.isqrt(length // plan.group), SEGMENT_BYTES // group)
    return plan.group * max(1, groups)


def run(function: Any, call: Call) -> None:
    """All heads; one thread is enough for little work."""
    count = call.batch * call.heads
    matrices = sum(i * o for i, o in pairwise(call.dims[: call.depth + 1]))
    share(function, call, count, count * call.length * matrices >= SHARED_WORK)
