"""Linear memory with the true gradient of every token, in parallel.

With M linear, the error e_i = M_{i-1}(k_i) - v_i is linear in the errors before it:

    (I + tril(G' * K K^T, -1)) E = beta' (K M_0) + m' (K S_0) - V     (primes: one token earlier)

One unit-triangular solve a block, all blocks at once; what remains sequential is a short
product per block. The block size is a matter of speed: any gives the token-by-token result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from titans.ops.coefficients import Coefficients, coefficients
from titans.ops.networks import MemoryNetwork, Objective
from titans.ops.rule import Gates, MemoryOutput, RuleState


def neural_memory_exact(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    state: RuleState,
    *,
    network: MemoryNetwork,
    objective: Objective,
    block_size: int,
    anchor: Sequence[Tensor] | None,
) -> MemoryOutput:
    """Blocks of `block_size`, then the rest; tensors are (B, H, T, D)."""
    # M(k) - v = k W - (v - k A - [k]), with A the anchor and [k] the residual: fold into v.
    target = values
    if objective == "l2":
        if network.residual:
            target = target - keys
        if anchor is not None:
            target = target - keys @ anchor[0]

    length = keys.shape[2]
    whole = length - length % block_size
    W, S = state.weights[0], None if state.momentum is None else state.momentum[0]
    outputs, surprises = [], []
    for start, stop, size in ((0, whole, block_size), (whole, length, length - whole)):
        if start == stop:
            continue
        q, k, v = (x[:, :, start:stop].unflatten(2, (-1, size)) for x in (queries, keys, target))
        cut = gates.slice(start, stop).in_chunks(size)
        coefficient = coefficients(
            cut.learning_rate[0],
            None if cut.momentum is None else cut.momentum[0],
            None if cut.decay is None else cut.decay[0],
        )
        y, e, W, S = blocks(q, k, v, coefficient, W, S, objective)
        outputs.append(y.flatten(2, 3))
        surprises.append(torch.linalg.vector_norm(e.detach(), dim=-1).flatten(2, 3))

    output = torch.cat(outputs, 2)
    if anchor is not None:
        output = output + queries @ anchor[0]
    if network.residual:
        output = output + queries
    final = RuleState.after((W,), None if S is None else (S,), (W,), 0, chunk_size=1)
    return MemoryOutput(output, final, torch.cat(surprises, 2))


def blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficient: Coefficients,
    W: Tensor,
    S: Tensor | None,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Blocks (B, H, N, C, D) -> reads, errors, and the weights and momentum after them."""
    if objective == "l2":
        earlier = coefficient.before()
        # scores(k, k)[t, i] with the rows of token t - 1 is already strictly lower triangular.
        system = earlier.scores(k, k).tril(-1)
        right = [earlier.scale(earlier.beta, k), v]
        if earlier.m is not None:
            right.append(earlier.scale(earlier.m, k))
        solved = torch.linalg.solve_triangular(
            system, torch.cat(right, -1), upper=False, unitriangular=True
        ).split([x.shape[-1] for x in right], -1)
    errors, weights, momenta = [], [], []
    for index in range(k.shape[2]):
        weights.append(W)
        if S is not None:
            momenta.append(S)
        if objective == "l2":
            e = solved[0][:, :, index] @ W - solved[1][:, :, index]
            if S is not None:
                e = e + solved[2][:, :, index] @ S
        else:
            e = -v[:, :, index]
        errors.append(e)
        at = coefficient.chunk(index)
        W, S = (
            at.final_weights(W, S, k[:, :, index], e),
            at.final_momentum(S, k[:, :, index], e),
        )
    E = torch.stack(errors, 2)
    y = coefficient.scale(coefficient.beta, q) @ torch.stack(weights, 2)
    y = y - coefficient.scores(q, k) @ E
    if momenta and coefficient.m is not None:
        y = y + coefficient.scale(coefficient.m, q) @ torch.stack(momenta, 2)
    return y, E, W, S
