"""The body of a chunk through torch.compile: the closed form, chunk by chunk, operations fused.

Same function as `titans.ops.chunked`; it differentiates once. Each setting and shape is compiled
at its first call, which takes seconds; where that cannot be done the plain body runs, with a
warning (logger `titans`). On a CPU `native` is faster, and compiles in less time.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from titans.ops.chunked import closed_form
from titans.ops.networks import MemoryNetwork, Objective
from titans.ops.rule import Gates, RuleState

BACKEND = "inductor"

Body = Callable[..., tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]]


def neural_memory_compiled(
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
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Whole chunks from a chunk boundary on; tensors (B, H, T, D), weights (B, H, in, out).

    Returns outputs, surprise (B, H, T), and the weights and momentum after the last token.
    """
    body = compiled_body(network, objective, chunk_size, max_surprise, BACKEND)
    W, S = tuple(weights), None if momentum is None else tuple(momentum)
    outputs, surprises = [], []
    for start in range(0, keys.shape[2], chunk_size):
        stop = start + chunk_size
        q, k, v = (x[:, :, start:stop] for x in (queries, keys, values))
        y, surprise, W, S = body(q, k, v, gates.slice(start, stop), W, S, anchor)
        outputs.append(y)
        surprises.append(surprise)
    return torch.cat(outputs, 2), torch.cat(surprises, 2), W, S


@functools.cache
def compiled_body(
    network: MemoryNetwork,
    objective: Objective,
    chunk_size: int,
    max_surprise: float | None,
    backend: str,
) -> Body:
    """One chunk; compiled, unless its first call finds that this cannot be done."""

    def plain(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        W: tuple[Tensor, ...],
        S: tuple[Tensor, ...] | None,
        anchor: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        y, surprise, after = closed_form(
            q,
            k,
            v,
            gates,
            RuleState.after(W, S, W, 0, chunk_size),
            network=network,
            objective=objective,
            chunk_size=chunk_size,
            anchor=anchor,
            max_surprise=max_surprise,
        )
        return y, surprise, after.weights, after.momentum

    fused = torch.compile(plain, backend=backend, dynamic=False)
    broken: list[str] = []

    def body(*arguments: Any) -> Any:
        if not broken:
            try:
                return fused(*arguments)
            except Exception as error:  # the compiler's own, of many kinds
                if isinstance(error, torch.OutOfMemoryError | ValueError):
                    raise
                broken.append(next(iter(str(error).splitlines()), type(error).__name__))
                logging.getLogger("titans").warning(
                    "torch.compile cannot be had, the plain form runs: %s", broken[0]
                )
        return plain(*arguments)

    return body
