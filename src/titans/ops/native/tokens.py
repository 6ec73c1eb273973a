"""Convolution, activation and norms around the rule, compiled (tokens.c): one pass each way."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans.ops.native.build import library
from titans.ops.native.threads import share

BLOCK = 128  # tokens, as in tokens.c
MAX_PARTS, MAX_WIDTH = 3, 16
SHARED_NUMBERS = 2**16  # below so many, one thread is enough


class Mixing(ctypes.Structure):
    """`Mixing` of tokens.c, field by field."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ["batch", "length", "parts", "heads", "size", "width", "silu", "unit"]
        ),
        ("x_stride", ctypes.c_int64 * 2),
        ("slope_stride", (ctypes.c_int64 * 3) * MAX_PARTS),
        *((name, ctypes.c_void_p) for name in ["x", "tail", "weight", "bias"]),
        ("out", ctypes.c_void_p * MAX_PARTS),
        ("d_out", ctypes.c_void_p * MAX_PARTS),
        *((name, ctypes.c_void_p) for name in ["d_x", "d_tail", "d_parameters"]),
        ("eps", ctypes.c_double),
    ]


class Emission(ctypes.Structure):
    """`Emission` of tokens.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ["batch", "length", "heads", "size"]),
        ("read_stride", ctypes.c_int64 * 3),
        ("gate_stride", ctypes.c_int64 * 2),
        ("slope_stride", ctypes.c_int64 * 2),
        *(
            (name, ctypes.c_void_p)
            for name in ["read", "gain", "gate", "out", "d_out", "d_read", "d_gate", "d_gain"]
        ),
        ("eps", ctypes.c_double),
    ]


def mix_native(
    projected: Tensor,
    tail: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    parts: int,
    heads: int,
    silu: bool,
    unit: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """As `titans.ops.tokens.mix_tokens`; all tensors of one dtype."""
    batch, length, channels = projected.shape
    if length == 0 or channels % (parts * heads):
        raise ValueError(
            f"expected (B, T, C) with T >= 1 and C a multiple of {parts} parts of {heads} heads, "
            f"got {tuple(projected.shape)}"
        )
    if weight is not None and tail is not None and bias is not None:
        width = weight.shape[0]
        check_shape("tail", tail, (batch, width - 1, channels))
        check_shape("weight", weight, (width, channels))
        check_shape("bias", bias, (channels,))
    x = projected if projected.stride(-1) == 1 else projected.contiguous()
    fixed = (
        [] if weight is None else [t.contiguous() for t in (tail, weight, bias) if t is not None]
    )
    return Mix.apply((parts, heads, silu, unit, eps), x, *fixed)


def emit_native(read: Tensor, gain: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    """As `titans.ops.tokens.emit_tokens`; all tensors of one dtype."""
    batch, length, heads, size = read.shape
    check_shape("gain", gain, (size,))
    if gate is not None:
        check_shape("gate", gate, (batch, length, heads * size))
    read = read if read.stride(-1) == 1 else read.contiguous()
    if gate is not None and gate.stride(-1) != 1:
        gate = gate.contiguous()
    return Emit.apply(read, gain.contiguous(), gate, eps)


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """What C is told must be so."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")


class Mix(torch.autograd.Function):
    """settings, x (B, T, C), and with a convolution tail, weight, bias -> one tensor a part."""

    @staticmethod
    def forward(
        ctx: Any, settings: tuple[int, int, bool, int, float], x: Tensor, *fixed: Tensor
    ) -> tuple[Tensor, ...]:
        call = describe(settings, x, fixed)
        shape = (call.batch, call.length, call.heads, call.size)
        out = tuple(x.new_empty(shape) for _ in range(call.parts))
        call.out[: call.parts] = [o.data_ptr() for o in out]
        run(library(x.dtype).mix, call)
        ctx.settings = settings
        ctx.save_for_backward(x, *fixed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Any, ...]:
        x, *fixed = ctx.saved_tensors
        call = describe(ctx.settings, x, fixed)
        d_out = tuple(d if d.stride(-1) == 1 else d.contiguous() for d in d_out)
        for part, d in enumerate(d_out):
            call.d_out[part] = d.data_ptr()
            call.slope_stride[part][:] = d.stride()[:3]
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_tail, d_parameters = None, None
        call.d_x = d_x.data_ptr()
        if fixed:
            d_tail = torch.empty_like(fixed[0])
            d_parameters = x.new_empty(blocks(call), call.width + 1, x.shape[-1])
            call.d_tail, call.d_parameters = d_tail.data_ptr(), d_parameters.data_ptr()
        run(library(x.dtype).mix_backward, call)
        if d_parameters is None:
            return None, d_x
        d_parameters = d_parameters.sum(0)
        return None, d_x, d_tail, d_parameters[:-1], d_parameters[-1]


class Emit(torch.autograd.Function):
    """read (B, T, H, D), gain (D), gate (B, T, H D) or None, eps -> (B, T, H D)."""

    @staticmethod
    def forward(ctx: Any, read: Tensor, gain: Tensor, gate: Tensor | None, eps: float) -> Tensor:
        call = describe_emission(read, gain, gate, eps)
        out = read.new_empty(call.batch, call.length, call.heads * call.size)
        call.out = out.data_ptr()
        run(library(read.dtype).emit, call)
        ctx.eps = eps
        ctx.save_for_backward(read, gain, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        read, gain, gate = ctx.saved_tensors
        call = describe_emission(read, gain, gate, ctx.eps)
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        call.d_out, call.slope_stride[:] = d_out.data_ptr(), d_out.stride()[:2]
        d_read = torch.empty_like(read, memory_format=torch.contiguous_format)
        d_gain = gain.new_empty(blocks(call), call.size)
        call.d_read, call.d_gain = d_read.data_ptr(), d_gain.data_ptr()
        d_gate = None
        if gate is not None:
            d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
            call.d_gate = d_gate.data_ptr()
        run(library(read.dtype).emit_backward, call)
        return d_read, d_gain.sum(0), d_gate, None


def describe(
    settings: tuple[int, int, bool, int, float], x: Tensor, fixed: Sequence[Tensor]
) -> Mixing:
    parts, heads, silu, unit, eps = settings
    call = Mixing(
        batch=x.shape[0],
        length=x.shape[1],
        parts=parts,
        heads=heads,
        size=x.shape[2] // (parts * heads),
        width=fixed[1].shape[0] if fixed else 1,
        silu=silu,
        unit=unit,
        x=x.data_ptr(),
        eps=eps,
    )
    call.x_stride[:] = x.stride()[:2]
    if fixed:
        call.tail, call.weight, call.bias = (t.data_ptr() for t in fixed)
    return call


def describe_emission(read: Tensor, gain: Tensor, gate: Tensor | None, eps: float) -> Emission:
    batch, length, heads, size = read.shape
    call = Emission(
        batch=batch,
        length=length,
        heads=heads,
        size=size,
        read=read.data_ptr(),
        gain=gain.data_ptr(),
        eps=eps,
    )
    call.read_stride[:] = read.stride()[:3]
    if gate is not None:
        call.gate, call.gate_stride[:] = gate.data_ptr(), gate.stride()[:2]
    return call


def blocks(call: Mixing | Emission) -> int:
    return call.batch * -(-call.length // BLOCK)


def run(function: Any, call: Mixing | Emission) -> None:
    numbers = call.batch * call.length * call.heads * call.size
    share(function, call, blocks(call), numbers >= SHARED_NUMBERS)
