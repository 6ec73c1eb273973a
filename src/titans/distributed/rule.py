"""`neural_memory` for a slice of a text whose other slices are on other processes.

A linear memory's state after a slice is linear in the state before it: X -> T X + U, with X the
weights and, below them, the momentum. Every process finds T and U of its slice, the processes
exchange these, and each then reads its slice from the state that the whole text before it left.
A deep memory has no such T: there the processes exchange tokens for heads, and each computes
all tokens of some of the heads. Both give what one process would, gradients included.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from titans.distributed.peers import Peers
from titans.ops import MemoryNetwork, Network, Optimizer, Retention, RuleState, neural_memory
from titans.ops.api import Gate, Implementation, Precision, each_gate, own_parts
from titans.ops.networks import Objective
from titans.ops.rule import MemoryOutput


def neural_memory_sliced(
    peers: Peers,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    learning_rate: Gate,
    *,
    state: RuleState,
    network: Network,
    momentum: Gate | None = None,
    decay: Gate | None = None,
    objective: Objective = "l2",
    window: Sequence[float] = (1.0,),
    retention: Retention | None = None,
    optimizer: Optimizer | None = None,
    chunk_size: int = 1,
    block_size: int = 64,
    anchor: Sequence[Tensor] | None = None,
    max_surprise: float | None = None,
    impl: Implementation = "auto",
    precision: Precision = "float32",
) -> MemoryOutput:
    """`titans.ops.neural_memory` of this process's slice, (B, slice, H, D).

    state: before the first token of the text, the same on every process. The state returned is
    that after this slice for a linear memory, for a deep one that after the whole text; the last
    process has the text's in either case.

    Raises ValueError besides those of `neural_memory`: the heads cannot be shared out; inner
    workings of one's own.
    """
    own = own_parts(network, objective, window, retention, optimizer)
    if own:
        raise ValueError(
            f"several processes cannot share a text with {' and '.join(own)} of one's own"
        )
    assert isinstance(network, MemoryNetwork)
    rule = partial(
        neural_memory,
        network=network,
        objective=objective,
        chunk_size=chunk_size,
        block_size=block_size,
        max_surprise=max_surprise,
        impl=impl,
        precision=precision,
    )
    if composes(network, chunk_size, max_surprise):
        transition, added = summary(
            keys,
            values,
            learning_rate,
            state=state,
            network=network,
            momentum=momentum,
            decay=decay,
            objective=objective,
            block_size=block_size,
            anchor=anchor,
            impl=impl,
        )
        start = torch.cat([state.weights[0], *(state.momentum or ())], 2)
        start = peers.compose(start, transition, added)
        size = keys.shape[3]
        before = RuleState(
            weights=(start[:, :, :size],),
            momentum=None if state.momentum is None else (start[:, :, size:],),
            base=None,
            offset=0,
        )
        return rule(
            queries,
            keys,
            values,
            learning_rate,
            state=before,
            momentum=momentum,
            decay=decay,
            anchor=anchor,
        )
    check_heads(keys.shape[2], peers)
    q, k, v = (peers.to_heads(x) for x in (queries, keys, values))
    gates = exchange_gates(peers, [learning_rate, momentum, decay])
    result = rule(
        q,
        k,
        v,
        gates[0],
        state=state.map(lambda x: peers.own(x, 1)),
        momentum=gates[1],
        decay=gates[2],
        anchor=None if anchor is None else [peers.own(a, 0) for a in anchor],
    )
    return MemoryOutput(
        peers.to_tokens(result.output),
        result.state.map(lambda x: peers.gather(x, 1)),
        peers.to_tokens(result.surprise),
    )


def composes(network: Network, chunk_size: int, max_surprise: float | None) -> bool:
    """Is the state after a slice linear in the state before it? With larger chunks too, but
    there it also depends on where in a chunk the slice begins."""
    return network.linear and chunk_size == 1 and max_surprise is None


def check_heads(heads: int, peers: Peers) -> None:
    if heads % peers.count:
        raise ValueError(
            f"{heads} heads cannot be shared out to the {peers.count} processes of a text"
        )


def summary(
    keys: Tensor,
    values: Tensor,
    learning_rate: Gate,
    *,
    state: RuleState,
    network: MemoryNetwork,
    momentum: Gate | None,
    decay: Gate | None,
    objective: Objective,
    block_size: int,
    anchor: Sequence[Tensor] | None,
    impl: Implementation,
) -> tuple[Tensor, Tensor]:
    """T and U of a slice, (B, H, n, n) and (B, H, n, v): n rows of weights, and of momentum.

    The columns of a linear memory do not see each other. So T is what the rule makes of the
    identity where nothing is to be learned, U what it makes of an empty memory.
    """
    weights = state.weights[0]
    # M(k) - v = k W - (v - k A - [k]), as in `titans.ops.exact`.
    target, wide = values.to(weights.dtype), keys.to(weights.dtype)
    if objective == "l2" and network.residual:
        target = target - wide
    if objective == "l2" and anchor is not None:
        with torch.autocast(keys.device.type, enabled=False):
            target = target - torch.einsum("bthk,hkv->bthv", wide, anchor[0])
    size, width = weights.shape[2:]
    rows = size if momentum is None else 2 * size
    identity = torch.eye(rows, dtype=weights.dtype, device=weights.device)
    start = torch.cat([identity.new_zeros(rows, width), identity], 1)
    start = start.expand(*weights.shape[:2], -1, -1)
    goal = torch.cat([target, target.new_zeros(*target.shape[:3], rows)], 3)
    # The kernels of triton know few widths.
    step = width if impl == "triton" else rows + width
    parts = []
    for columns, wanted in zip(start.split(step, 3), goal.split(step, 3), strict=True):
        after = neural_memory(
            keys,
            keys,
            wanted,
            learning_rate,
            state=RuleState(
                weights=(columns[:, :, :size],),
                momentum=None if momentum is None else (columns[:, :, size:],),
                base=None,
                offset=0,
            ),
            network=replace(network, residual=False),
            momentum=momentum,
            decay=decay,
            objective=objective,
            block_size=block_size,
            impl=impl,
        ).state
        parts.append(torch.cat([after.weights[0], *(after.momentum or ())], 2))
    added, transition = torch.cat(parts, 3).split([width, rows], 3)
    return transition, added


def exchange_gates(peers: Peers, gates: Sequence[Gate | None]) -> list[Any]:
    """Each gate for all tokens of this process's heads; one that layers share stays one."""
    given = {id(x): x for gate in gates for x in each_gate(gate)}
    columns = [x if x.ndim == 4 else x[..., None] for x in given.values()]
    widths = [x.shape[3] for x in columns]
    moved = peers.to_heads(torch.cat(columns, 3)).split(widths, 3)
    found = {
        name: y if x.ndim == 4 else y[..., 0]
        for (name, x), y in zip(given.items(), moved, strict=True)
    }
    return [
        None
        if gate is None
        else found[id(gate)]
        if isinstance(gate, Tensor)
        else [found[id(x)] for x in gate]
        for gate in gates
    ]
