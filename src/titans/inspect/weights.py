"""The memories of a model's state, and how far their weights lie apart."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from titans.layers.memory import MemoryState, NeuralMemory
from titans.models.lm import TitansLM
from titans.state import ModelState


class Memory(NamedTuple):
    """One memory of a model. block: the index of its block; state: what the layer remembers."""

    block: int
    layer: NeuralMemory
    state: MemoryState


def memories(model: TitansLM, state: ModelState) -> list[Memory]:
    """The memories of a model in a state of it, in the order of the blocks; maybe none.

    Raises ValueError for a state of another model.
    """
    model.check_state(state, state.batch_size)
    pairs = zip(memory_layers(model), memory_states(state), strict=True)
    return [Memory(block, layer, held) for (block, layer), (_, held) in pairs]


def mixers(model: TitansLM) -> list[Any]:
    """What mixes the tokens in each block. ValueError for an adapted model, which has none."""
    found = [getattr(block, "mixer", None) for block in model.blocks]
    if None in found:
        raise ValueError("an adapted model cannot be looked into: its blocks are another library's")
    return found


def memory_layers(model: TitansLM) -> list[tuple[int, NeuralMemory]]:
    """Index of the block and layer of every memory."""
    layers = ((i, getattr(mixer, "memory", None)) for i, mixer in enumerate(mixers(model)))
    return [(index, layer) for index, layer in layers if isinstance(layer, NeuralMemory)]


def memory_states(state: ModelState) -> list[tuple[int, MemoryState]]:
    """Index of the block and state of every memory; this needs no model."""
    held = ((i, getattr(block, "memory", None)) for i, block in enumerate(state.blocks))
    return [(index, memory) for index, memory in held if isinstance(memory, MemoryState)]


@torch.no_grad()
def moved(model: TitansLM, state: ModelState) -> Float[Tensor, "b memories heads"]:
    """|M_t - M_0|, the Frobenius norm over all weights of a head's memory network.

    M_0 is what was learned in training. The persistent tokens of LMM, MAG and MAL are written
    before the first token of a text, so there a fresh state has moved already.
    """
    return norms([deviation(memory) for memory in memories(model, state)], state)


@torch.no_grad()
def distance(model: TitansLM, a: ModelState, b: ModelState) -> Float[Tensor, "b memories heads"]:
    """|M_a - M_b| per memory and head, likewise; of two states of one model and batch size."""
    for state in (a, b):
        model.check_state(state, state.batch_size)
    return weights_apart(a, b)


def weights_apart(a: ModelState, b: ModelState) -> Float[Tensor, "b memories heads"]:
    """`distance` without the model, which must be the one of both states.

    What they hold is M or M - M_0, but the same in both: M_0 cancels.
    """
    if a.config_hash != b.config_hash:
        raise ValueError(
            f"the memories belong to different models (configs {a.config_hash}, {b.config_hash})"
        )
    if a.batch_size != b.batch_size:
        raise ValueError(
            f"the states are for batches of {a.batch_size} and {b.batch_size}, expected one size"
        )
    pairs = zip(memory_states(a), memory_states(b), strict=True)
    apart = [
        [x - y for x, y in zip(first.rule.weights, second.rule.weights, strict=True)]
        for (_, first), (_, second) in pairs
    ]
    return norms(apart, a)


@torch.no_grad()
def momentum_norm(model: TitansLM, state: ModelState) -> Float[Tensor, "b memories heads"] | None:
    """|S_t|, the past surprise, per memory and head; None where the rule has no momentum."""
    found = [memory.state.rule.momentum for memory in memories(model, state)]
    if not found or any(past is None for past in found):
        return None
    return norms([past for past in found if past is not None], state)


def deviation(memory: Memory) -> list[Float[Tensor, "b h _ _"]]:
    """M_t - M_0 per weight matrix."""
    weights = memory.state.rule.weights
    if memory.layer.anchored:  # that is what the state holds
        return list(weights)
    return [w - first for w, first in zip(weights, memory.layer.first_weights(), strict=True)]


def norms(
    parts: Sequence[Sequence[Tensor]], state: ModelState
) -> Float[Tensor, "b memories heads"]:
    """Per memory and head, the Frobenius norm over the matrices (B, H, in, out) of each part."""
    found = [
        torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(x, dim=(-2, -1)) for x in matrices]), dim=0
        )
        for matrices in parts
    ]
    if not found:
        return next(iter(state.tensors().values())).new_zeros(state.batch_size, 0, 0)
    return torch.stack(found, 1)


@torch.no_grad()
def memory_inputs(
    model: TitansLM, state: ModelState, tokens: Int[Tensor, "b t"]
) -> list[Float[Tensor, "b t d"]]:
    """What every memory is given to read and write for these tokens, in the state before them."""
    with listening(model) as heard:
        model.run(tokens, state)
    return [torch.cat(pieces, 1) for pieces in heard]


@contextmanager
def listening(model: TitansLM) -> Iterator[list[list[Tensor]]]:
    """Collects the memories' inputs while the model writes: one list of pieces a memory.

    A memory asks its gates once for every token that it writes, and the first thing they are
    shown is the memory's own input.
    """
    heard: list[list[Tensor]] = []
    handles = []
    for _, layer in memory_layers(model):
        pieces: list[Tensor] = []

        def hear(
            gates: torch.nn.Module,
            shown: tuple[Tensor, ...],
            pieces: list[Tensor] = pieces,
            dim: int = layer.config.dim,
        ) -> None:
            pieces.append(shown[0][..., :dim])

        handles.append(layer.gates.register_forward_pre_hook(hear))
        heard.append(pieces)
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
