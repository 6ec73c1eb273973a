"""Any memory network, gradients at the chunk boundary: the closed form, chunk by chunk.

Whole chunks go to `titans.ops.fused` where it applies; here is the form that autograd can
differentiate by itself, for the partial chunks at both ends and for every setting.

Within a chunk every gradient is taken at the same base weights, so all error signals are one
batched pass. A layer is then applied to queries without ever building its weights at token t:

    a_t W_t = beta_t (a_t W_0) + m_t (a_t S_0) - sum_{i<=t} G[t,i] <a_t, a_i> delta_i
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from titans.ops.coefficients import Coefficients, coefficients
from titans.ops.fused import group_size, neural_memory_fused
from titans.ops.networks import MemoryNetwork, Network, Objective
from titans.ops.own import weights_of
from titans.ops.rule import Gates, MemoryOutput, RuleState
from titans.ops.tracing import is_transformed

# (queries, keys, values, gates, weights, momentum, **settings) -> output, surprise, and both after.
Scan = Callable[..., tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]]


def neural_memory_chunked(
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
    scan: Scan = neural_memory_fused,
) -> MemoryOutput:
    """Tensors are (B, H, T, D), see `titans.ops.neural_memory`. `scan` runs the whole chunks."""
    length = keys.shape[2]
    first = min(-state.offset % chunk_size, length)
    whole = (length - first) // chunk_size * chunk_size
    own = callable(objective) or len(window) > 1 or not isinstance(network, MemoryNetwork)
    if own or not fusable(gates) or not whole:
        first, whole = length, 0
    # Reads of small chunks are grouped: an incomplete group of whole chunks stands alone.
    grouped = first + whole - whole % group_size(chunk_size)
    cuts = [0, first, grouped, first + whole, length]
    parts = []
    for start, stop in pairwise(cuts):
        if start == stop:
            continue
        q, k, v = (x[:, :, start:stop] for x in (queries, keys, values))
        piece = gates.slice(start, stop)
        if first <= start < first + whole:
            y, surprise, W, S = scan(
                q,
                k,
                v,
                piece,
                state.weights,
                state.momentum,
                network=network,
                objective=objective,
                chunk_size=chunk_size,
                anchor=anchor,
                max_surprise=max_surprise,
            )
            state = RuleState.after(W, S, W, 0, chunk_size)
        else:
            y, surprise, state = closed_form(
                q,
                k,
                v,
                piece,
                state,
                network=network,
                objective=objective,
                chunk_size=chunk_size,
                anchor=anchor,
                max_surprise=max_surprise,
                window=window,
            )
        parts.append((y, surprise))
    if len(parts) == 1:
        return MemoryOutput(y, state, surprise)
    outputs, surprises = zip(*parts, strict=True)
    return MemoryOutput(torch.cat(outputs, 2), state, torch.cat(surprises, 2))


def fusable(gates: Gates) -> bool:
    """Does `titans.ops.fused` compute this? A compiler fuses the plain form by itself, and a
    transform differentiates it."""
    scalar = gates.decay is None or all(alpha.ndim == 3 for alpha in gates.decay)
    return scalar and not torch.compiler.is_compiling() and not is_transformed()


def closed_form(
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
) -> tuple[Tensor, Tensor, RuleState]:
    """Loop over chunks, the first and the last maybe partial."""
    W, S, offset = state.weights, state.momentum, state.offset
    base = state.base or W
    recent = None if state.recent is None else state.recent.followed_by(keys, values)
    outputs, surprises = [], []
    pieces = chunk_coefficients(gates, keys.shape[2], offset, chunk_size, network.depth)
    for start, stop, coefficient in pieces:
        if offset == 0:
            base = W
        at = weights_of(base, anchor)
        k, v, q = (x[:, :, start:stop] for x in (keys, values, queries))
        if recent is not None:  # those before the chunk that its windows reach back to
            seen = recent.piece(start, stop + len(window) - 1)
            k, v, spread = seen.keys, seen.values, spread_window(window, seen.present)
            made = {id(c): c.windowed(spread) for c in coefficient}
            coefficient = [made[id(c)] for c in coefficient]
        inputs, deltas = network.error_signals(at, k, v, objective, max_surprise)
        read = partial(read_layer, coefficient, W, S, inputs, deltas, anchor)
        outputs.append(network.forward(read, q))
        last = deltas[-1].detach()
        own = last if recent is None else last[:, :, start - stop :]
        surprises.append(torch.linalg.vector_norm(own, dim=-1))
        layers = range(network.depth)
        past: Sequence[Tensor | None] = S if S is not None else [None] * network.depth
        W = tuple(coefficient[i].final_weights(W[i], past[i], inputs[i], deltas[i]) for i in layers)
        if S is not None:
            S = tuple(
                s
                for i in layers
                if (s := coefficient[i].final_momentum(S[i], inputs[i], deltas[i])) is not None
            )
        offset = (offset + stop - start) % chunk_size
    if recent is not None:
        recent = recent.last(len(window) - 1)
    final = RuleState.after(W, S, base, offset, chunk_size, recent)
    return torch.cat(outputs, 2), torch.cat(surprises, 2), final


def spread_window(window: Sequence[float], present: Tensor) -> Tensor:
    """What token i counts in the gradient of token j, (..., C, E): a band of the window's weights.

    present: (..., E), of the tokens of a chunk and the len(window) - 1 before it.
    """
    reach = len(window) - 1
    weights = present.new_tensor(window)
    newest = torch.arange(reach, present.shape[-1], device=present.device)[:, None]
    age = newest - torch.arange(present.shape[-1], device=present.device)
    band = torch.where((age >= 0) & (age <= reach), weights[age.clamp(0, reach)], 0.0)
    return band * present[..., None, :]


def read_layer(
    coefficient: list[Coefficients],
    W: tuple[Tensor, ...],
    S: tuple[Tensor, ...] | None,
    inputs: list[Tensor],
    deltas: list[Tensor],
    anchor: Sequence[Tensor] | None,
    layer: int,
    a: Tensor,
) -> Tensor:
    """a_t W_t of one layer, for every token of the chunk, from W and S before the chunk."""
    of = coefficient[layer]
    z = of.scale(of.beta, a) @ W[layer] - of.scores(a, inputs[layer]) @ deltas[layer]
    if S is not None and of.m is not None:
        z = z + of.scale(of.m, a) @ S[layer]
    return z if anchor is None else z + a @ anchor[layer]


def chunk_coefficients(
    gates: Gates, length: int, offset: int, chunk_size: int, depth: int
) -> Iterator[tuple[int, int, list[Coefficients]]]:
    """(start, stop, coefficients per layer) of every chunk, the first and last maybe partial.

    Whole chunks are prepared in one batch; layers that share their gates share the result.
    """
    start = min((-offset) % chunk_size, length)
    whole = (length - start) // chunk_size
    if start:
        yield 0, start, layer_coefficients(gates.slice(0, start), depth)
    if whole:
        middle = gates.slice(start, start + whole * chunk_size).in_chunks(chunk_size)
        batched = layer_coefficients(middle, depth)
        for index in range(whole):
            begin = start + index * chunk_size
            picked = {id(c): c.chunk(index) for c in batched}
            yield begin, begin + chunk_size, [picked[id(c)] for c in batched]
    rest = start + whole * chunk_size
    if rest < length:
        yield rest, length, layer_coefficients(gates.slice(rest, length), depth)


def layer_coefficients(gates: Gates, depth: int) -> list[Coefficients]:
    """One `Coefficients` per layer, computed once for layers with the same gates."""
    made: dict[tuple[int, int, int], Coefficients] = {}
    result = []
    for layer in range(depth):
        theta = gates.learning_rate[layer]
        eta = None if gates.momentum is None else gates.momentum[layer]
        alpha = None if gates.decay is None else gates.decay[layer]
        identity = (id(theta), id(eta), id(alpha))
        if identity not in made:
            made[identity] = coefficients(theta, eta, alpha)
        result.append(made[identity])
    return result
