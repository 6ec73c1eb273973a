"""The rule as Triton kernels, for GPUs: gradients at the chunk boundary, linear or two layers.

Importing this package does not import triton; calling it does. Nothing here falls back to
another implementation: what the kernels cannot do is refused with one line.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from titans.ops.networks import MemoryNetwork, Objective
from titans.ops.rule import Gates, MemoryOutput, RuleState

__all__ = ["check_available", "check_supported", "neural_memory_triton"]

Precision = Literal["ieee", "tf32", "tf32x3", "bf16"]
SIZES = (16, 32, 64, 128)
HIDDEN_SIZES = (32, 64, 128, 256, 512)
LARGEST_CHUNK = 64  # larger tiles do not fit into the shared memory of an H100


def neural_memory_triton(
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
    max_surprise: float | None,
    block_size: int = 64,
    precision: Precision | None = None,
) -> MemoryOutput:
    """`neural_memory_chunked` on a GPU; tensors are (B, H, T, D), see `titans.ops.neural_memory`.

    block_size: a linear memory with chunk_size 1 and no norm takes the exact form, in blocks.
    precision: of matrix products; sums are float32 always. None is "ieee" (true float32) for
        float32 tokens and "tf32" for shorter ones, which it holds without loss; what the memory
        holds itself is rounded to it in products.

    Raises ValueError for settings without a kernel or without a GPU, ImportError without triton.
    """
    exact = network.linear and chunk_size == 1
    check_supported(
        network,
        keys.shape[-1],
        values.shape[-1],
        chunk_size=block_size if exact else chunk_size,
        per_channel=gates.decay is not None and any(g.ndim > 3 for g in gates.decay),
        max_surprise=max_surprise,
        dtype=state.weights[0].dtype,
    )
    check_available(keys.device)
    if precision is None:
        precision = "tf32" if keys.dtype in (torch.bfloat16, torch.float16) else "ieee"
    q, k, v = (x.to(state.weights[0].dtype) for x in (queries, keys, values))
    grads = wants_gradients(gates, anchor, q, k, v, *state.tensors().values())
    with torch.cuda.device_of(k):  # kernels are launched on the current device
        if k.shape[2] == 1 and not grads:
            from titans.ops.triton.decode import decode

            return decode(
                q,
                k,
                v,
                gates,
                state,
                network=network,
                objective=objective,
                chunk_size=chunk_size,
                anchor=anchor,
            )
        from titans.ops.triton.pieces import Rule, run_pieces

        rule = Rule(network, objective, anchor, exact, precision)
        return run_pieces((q, k, v), gates, state, rule, chunk_size, block_size)


def wants_gradients(gates: Gates, anchor: Sequence[Tensor] | None, *tensors: Tensor) -> bool:
    """Does autograd record what happens to any input?"""
    given = [*tensors, *gates.learning_rate, *(anchor or ())]
    given += [*(gates.momentum or ()), *(gates.decay or ())]
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


def check_supported(
    network: MemoryNetwork,
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    per_channel: bool = False,
    max_surprise: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """ValueError, in one line, for the first setting that has no kernel."""
    sizes, hidden_sizes = (", ".join(map(str, x)) for x in (SIZES, HIDDEN_SIZES))
    hidden = network.expansion * key_dim
    double = dtype == torch.float64 and not interpreter_is_on()
    refusals = {
        f"a memory of depth 1 or 2, got depth {network.depth}": network.depth > 2,
        f"key_dim in {sizes}, got {key_dim}": key_dim not in SIZES,
        f"value_dim in {sizes}, got {value_dim}": value_dim not in SIZES,
        f"key_dim * expansion in {hidden_sizes}, got {hidden}": (
            network.depth == 2 and hidden not in HIDDEN_SIZES
        ),
        f"chunks and blocks of at most {LARGEST_CHUNK} tokens, got {chunk_size}": (
            chunk_size > LARGEST_CHUNK
        ),
        "one decay per token, got decay per channel": per_channel,
        f"no max_surprise, got {max_surprise}": max_surprise is not None,
        "a float32 state, got float64": double,
    }
    for wanted, refused in refusals.items():
        if refused:
            raise ValueError(f"impl='triton' needs {wanted}")


def check_available(device: torch.device | str) -> None:
    """ImportError without triton, ValueError without a GPU, in one line."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            "impl='triton' needs triton, which is not installed: pip install -e '.[triton]'"
        )
    kind = torch.device(device).type
    if kind != "cuda" and not interpreter_is_on():
        raise ValueError(
            f"impl='triton' needs tensors on a GPU, got {kind} "
            "(TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for tests)"
        )


def interpreter_is_on() -> bool:
    """Triton's own switch; it must be set before the kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
