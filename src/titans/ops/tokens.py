"""What a memory layer does to each token around the rule: convolve, normalise, gate.

With torch operations, and on a CPU as one compiled pass (`ops/native/tokens.c`): these steps
compute little and move much, each a pass over all queries, keys and values.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.ops.native import BuildError, compiled, emit_native, mix_native
from titans.ops.native.tokens import MAX_PARTS, MAX_WIDTH
from titans.ops.tracing import is_traced

UNIT_EPS = 1e-6


def mix_tokens(
    projected: Tensor,
    tail: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    parts: int,
    heads: int,
    silu: bool,
    unit: int,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Causal depthwise convolution, SiLU, and unit norm per head.

    projected: (B, T, C), the channels of `parts` tensors of `heads` heads side by side, for
    instance queries, keys and values. tail: (B, width - 1, C), what came before. weight:
    (width, C), the last row for the current token; bias: (C); all three None for no convolution.
    silu: activate. unit: how many of the first parts get unit norm; a zero vector stays zero.

    Returns one (B, T, H, D) a part.
    """
    given = [t for t in (projected, tail, weight, bias) if t is not None]
    width = 1 if weight is None else weight.shape[0]
    if width <= MAX_WIDTH and parts <= MAX_PARTS and runs_native(impl, given):
        return mix_native(
            projected,
            tail,
            weight,
            bias,
            parts=parts,
            heads=heads,
            silu=silu,
            unit=unit,
            eps=UNIT_EPS,
        )
    mixed = convolve(projected, tail, weight, bias)
    if silu:
        mixed = F.silu(mixed)
    split = mixed.unflatten(-1, (parts, heads, -1)).unbind(2)
    return tuple(unit_norm(x) if part < unit else x for part, x in enumerate(split))


def convolve(x: Tensor, tail: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y_t = bias + sum_j weight_j x_{t-width+1+j}, per channel; x itself without a weight."""
    if weight is None:
        return x
    assert tail is not None
    assert bias is not None
    padded = torch.cat([tail.to(x.dtype), x], 1)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if x.shape[1] == 1:  # decoding: one sum instead of setting up a convolution, as wide as there
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (padded.to(wide) * weight.to(wide)).sum(1, keepdim=True) + bias
        return y.to(x.dtype)
    y = F.conv1d(padded.transpose(1, 2), weight.T[:, None], bias, groups=x.shape[2])
    return y.transpose(1, 2)


def emit_tokens(
    read: Tensor, gain: Tensor, gate: Tensor | None, *, eps: float, impl: str = "auto"
) -> Tensor:
    """RMSNorm per head, then times silu(gate): read (B, T, H, D), gain (D), gate (B, T, H D).

    Returns (B, T, H D) in the gate's dtype, or the gain's without a gate.
    """
    given = [t for t in (read, gain, gate) if t is not None]
    if runs_native(impl, given):
        return emit_native(read, gain, gate, eps)
    y = F.rms_norm(read.to(gain.dtype), gain.shape, gain, eps).flatten(2)
    return y if gate is None else y.to(gate.dtype) * F.silu(gate)


def unit_norm(x: Tensor) -> Tensor:
    """l2 norm over the last axis, in at least float32; a zero vector stays zero."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.normalize(wide, dim=-1, eps=UNIT_EPS).to(x.dtype)


def runs_native(impl: str, tensors: list[Tensor]) -> bool:
    """Is the compiled pass for these? Like the rule's "auto", it wants the CPU, one dtype and a
    compiler; it differentiates once."""
    if impl not in ("auto", "native") or is_traced(tensors):
        return False
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.float64) or not all(
        t.dtype == dtype and t.device.type == "cpu" for t in tensors
    ):
        return False
    return is_built(dtype)


@functools.cache
def is_built(dtype: torch.dtype) -> bool:
    try:
        compiled(dtype)
    except BuildError as error:
        said = "convolution and norms are not compiled, slower ones run: %s"
        logging.getLogger("titans").log(error.level, said, error)
        return False
    return True
