"""States of several sessions as one batch, and apart again.

What rows of a batch may differ in is how many tokens they have read: every field called
`position`. All other integers (offsets in a chunk or a segment) say where a computation stands
and must be equal, as must shapes and dtypes.
"""

from collections.abc import Hashable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from titans.state import ModelState, State


def phase(state: ModelState) -> Hashable:
    """States with equal phases can be one batch."""
    return _phase(state)


def stack(states: Sequence[ModelState]) -> ModelState:
    """One state with a row for each of `states`, which are of equal phase and of batch 1."""
    return replace(states[0], blocks=_stack([state.blocks for state in states]))


def row(state: ModelState, index: int, position: int) -> ModelState:
    """Row `index` as a state of its own that has read `position` tokens."""
    return _row(state, index, position)


def _phase(node: Any) -> Hashable:
    if isinstance(node, Tensor):
        return tuple(node.shape), node.dtype
    if isinstance(node, State):
        held = (_phase(getattr(node, f.name)) for f in fields(node) if f.name != "position")
        return type(node).__name__, *held
    if isinstance(node, tuple):
        return tuple(_phase(child) for child in node)
    return node


def _stack(nodes: Sequence[Any]) -> Any:
    first = nodes[0]
    if isinstance(first, Tensor):
        return torch.cat(list(nodes))
    if isinstance(first, State):
        columns = {f.name: [getattr(node, f.name) for node in nodes] for f in fields(first)}
        return replace(first, **{name: _field(name, column) for name, column in columns.items()})
    if isinstance(first, tuple):
        return tuple(_stack(children) for children in zip(*nodes, strict=True))
    return first


def _field(name: str, column: list[Any]) -> Any:
    return torch.tensor(column) if name == "position" else _stack(column)


def _row(node: Any, index: int, position: int) -> Any:
    if isinstance(node, Tensor):
        return node[index : index + 1].clone()  # a view would keep the whole batch alive
    if isinstance(node, State):
        parts = {f.name: _row(getattr(node, f.name), index, position) for f in fields(node)}
        return replace(node, **parts | ({"position": position} if "position" in parts else {}))
    if isinstance(node, tuple):
        return tuple(_row(child, index, position) for child in node)
    return node
