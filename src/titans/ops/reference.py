"""The rule token by token, as the paper writes it: the oracle of every other form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from titans.ops.networks import MemoryNetwork, Objective
from titans.ops.rule import Gates, MemoryOutput, RuleState


def neural_memory_reference(
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
) -> MemoryOutput:
    """Loop over tokens; tensors are (B, H, T, D), see `titans.ops.neural_memory`."""
    M, base = list(state.weights), list(state.base or state.weights)
    S = None if state.momentum is None else list(state.momentum)
    offset = state.offset
    reads, surprises = [], []
    for t in range(keys.shape[2]):
        if offset == 0:  # a chunk begins: gradients are taken here until it ends (v1 eq. 16)
            base = list(M)
        k, v, q = (x[:, :, t : t + 1] for x in (keys, values, queries))
        at = base if anchor is None else [a + b for a, b in zip(anchor, base, strict=True)]
        inputs, deltas = network.error_signals(at, k, v, objective, max_surprise)
        for layer in range(network.depth):
            theta, eta, alpha = gates.at(layer, t)
            step = -theta * (inputs[layer].transpose(-1, -2) @ deltas[layer])
            if S is not None and eta is not None:  # S_t = eta S_{t-1} - theta grad (v1 eq. 14)
                S[layer] = step = eta * S[layer] + step
            # M_t = (1 - alpha) M_{t-1} + S_t (v1 eq. 13)
            M[layer] = (M[layer] if alpha is None else (1.0 - alpha) * M[layer]) + step
        now = M if anchor is None else [a + m for a, m in zip(anchor, M, strict=True)]
        reads.append(network.apply(now, q))  # v1 eq. 15
        surprises.append(torch.linalg.vector_norm(deltas[-1].detach(), dim=-1))
        offset = (offset + 1) % chunk_size
    final = RuleState.after(M, S, base, offset, chunk_size)
    return MemoryOutput(torch.cat(reads, 2), final, torch.cat(surprises, 2))
