"""The rule token by token, as the paper writes it: the oracle of every other form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from titans.ops.networks import Network, Objective
from titans.ops.own import DECAY, DESCENT, Optimizer, Retention, weights_of
from titans.ops.rule import Gates, MemoryOutput, RuleState


def neural_memory_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    state: RuleState,
    *,
    network: Network,
    objective: Objective,
    chunk_size: int,
    anchor: Sequence[Tensor] | None,
    max_surprise: float | None,
    window: Sequence[float] = (1.0,),
    retention: Retention = DECAY,
    optimizer: Optimizer = DESCENT,
) -> MemoryOutput:
    """Loop over tokens; tensors are (B, H, T, D), see `titans.ops.neural_memory`."""
    M, base = list(state.weights), list(state.base or state.weights)
    S = list(state.momentum or ())
    offset = state.offset
    recent = None if state.recent is None else state.recent.followed_by(keys, values)
    reads, surprises = [], []
    for t in range(keys.shape[2]):
        if offset == 0:  # a chunk begins: gradients are taken here until it ends (v1 eq. 16)
            base = list(M)
        k, v, q = (x[:, :, t : t + 1] for x in (keys, values, queries))
        seen = None if recent is None else recent.piece(t, t + len(window))
        if seen is not None:
            k, v = seen.keys, seen.values
        at = weights_of(base, anchor, retention)
        inputs, deltas = network.error_signals(at, k, v, objective, max_surprise)
        surprises.append(torch.linalg.vector_norm(deltas[-1].detach()[:, :, -1:], dim=-1))
        if seen is not None:
            counts = keys.new_tensor(window).flip(0) * seen.present  # the oldest token first
            deltas = [delta * counts[..., None] for delta in deltas]
        for layer in range(network.depth):
            theta, eta, alpha = gates.at(layer, t)
            gradient = inputs[layer].transpose(-1, -2) @ deltas[layer]
            past = tuple(S[layer :: network.depth])
            step, past = optimizer.step(gradient, theta, eta, past)  # v1 eq. 14
            S[layer :: network.depth] = past
            M[layer] = retention.update(M[layer], alpha, step)  # v1 eq. 13
        reads.append(network.apply(weights_of(M, anchor, retention), q))  # v1 eq. 15
        offset = (offset + 1) % chunk_size
    if recent is not None:
        recent = recent.last(len(window) - 1)
    final = RuleState.after(M, S or None, base, offset, chunk_size, recent)
    return MemoryOutput(torch.cat(reads, 2), final, torch.cat(surprises, 2))
