"""Memories of texts that were never read as such: without some passages, or without writing."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titans.config import TitansConfig
from titans.generate import PIECE, stream
from titans.inspect.weights import mixers
from titans.layers.attention import SegmentState, WindowState
from titans.models.lm import TitansLM
from titans.state import ModelState, State


def replay(
    model: TitansLM,
    tokens: Tensor | np.ndarray,
    drop: Sequence[tuple[int, int]] = (),
    state: ModelState | None = None,
) -> ModelState:
    """Read `tokens` again after `state`, without the passages in `drop`: erasing.

    The memory is the one of a text in which the passages never stood; later tokens move up.

    tokens: (T,) or (B, T), as of `titans.stream`. drop: (start, stop) in tokens, half open, in
    any order; they may overlap. Raises ValueError for a passage that is not inside the text.
    """
    length = tokens.shape[-1]
    left = list(kept(drop, length))
    if not left:
        return first_state(model, tokens) if state is None else state
    for reading in stream(model, (tokens[..., a:b] for a, b in left), state):
        state = reading.state
    assert state is not None
    return state


def first_state(model: TitansLM, tokens: Tensor | np.ndarray) -> ModelState:
    """Before the first of `tokens`, (T,) or (B, T)."""
    return model.init_state(1 if tokens.ndim == 1 else len(tokens))


def kept(drop: Sequence[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """What is left of 0..length without the passages, as (start, stop) in order."""
    for start, stop in drop:
        if not 0 <= start <= stop <= length:
            raise ValueError(
                f"a passage must lie in 0..{length} with start <= stop, got {start}..{stop}"
            )
    at = 0
    for start, stop in [*sorted(drop), (length, length)]:
        if start > at:
            yield at, start
        at = max(at, stop)


def reach(model: TitansLM) -> int | None:
    """Tokens that can matter to a reader which does not write: with writing off, the state and
    the next token's logits depend on this many last tokens. None where all do (full attention).

    In a block a token sees as far back as the convolutions and the attention window do; in MAC,
    to the beginning of the segment that its memory's convolution reaches.
    """
    config, found = model.config, mixers(model)
    if config.variant == "transformer":
        return None
    return 1 + sum(look_back(config, mixer) for mixer in found)


def look_back(config: TitansConfig, mixer: Any) -> int:
    """How many tokens before its own can change a token's output of this mixer, without writing."""
    convolution = max(config.memory.conv_width - 1, 0) if hasattr(mixer, "memory") else 0
    window = config.window - 1 if hasattr(mixer, "attention") else 0
    if config.variant == "mac":  # of the queries, then the segment, then of what is read
        return convolution + (config.segment - 1) + convolution
    if config.variant == "mal":  # attention on what the memory returned
        return convolution + window
    if config.variant == "rwkv7":  # it blends a token with the one before
        return 1
    return max(convolution, window)


@torch.no_grad()
def without_writing(
    model: TitansLM, tokens: Tensor | np.ndarray, position: int | None = None
) -> ModelState:
    """The state of a reader that never wrote, after a text of which `tokens` are the last.

    Equal to reading the whole text with write=False, at a cost that does not depend on its
    length: only the last `reach` tokens can matter, and only they are read.

    tokens: (T,) or (B, T), T >= 1. position: length of the whole text; None where `tokens` is
    the whole. Raises ValueError for fewer tokens than can matter.
    """
    length = tokens.shape[-1]
    position = length if position is None else position
    far = reach(model)
    needed = position if far is None else min(far, position)
    if not needed <= length <= position:
        raise ValueError(
            f"the last {needed} of {position} tokens can matter to this model, got {length}"
        )
    start = position - needed
    fresh = first_state(model, tokens)
    state = replace(
        fresh,
        position=start,
        blocks=tuple(placed_at(start, block, model.config) for block in fresh.blocks),
    )
    for reading in stream(model, tokens[..., length - needed :], state, piece=PIECE, write=False):
        state = reading.state
    return state


def placed_at(position: int, state: State, config: TitansConfig) -> State:
    """A block's fresh state as one that stands `position` tokens on, its attention still empty.

    What the first tokens make of that is wrong, and `reach` is so far that it does not matter.
    """
    attention = getattr(state, "attention", None)
    if isinstance(attention, WindowState):
        return replace(state, attention=replace(attention, position=position))  # type: ignore[call-arg]
    if isinstance(attention, SegmentState):
        offset = position % config.segment
        return replace(state, attention=replace(attention, offset=offset))  # type: ignore[call-arg]
    return state
