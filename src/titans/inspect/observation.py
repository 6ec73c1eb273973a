"""Reading a text while looking at what every head of every memory does with each token."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from titans.generate import read_through, token_nll
from titans.inspect.weights import momentum_norm, moved
from titans.layers.memory import MemoryRecord
from titans.models.lm import TitansLM
from titans.state import ModelState


class Observation(NamedTuple):
    """One piece of a text as the memories saw it.

    tokens: (B, T). nll: (B, T) nats, -log p(token | all before it); NaN where no logits were
    given for the first token. logits: (B, V) after the piece. state: likewise.

    Per token, memory and head, (B, T, memories, heads), as `MemoryRecord` has them:
    surprise: norm of the momentary surprise, the error signal at the memory's last layer, as
        `max_surprise` has left it;
    learning_rate: theta; momentum: eta, and decay: alpha, None where the model has none or
    nothing was written.

    After the piece, (B, memories, heads): past_surprise: |S|, None for a model without
    momentum; moved: |M - M_0|, see `moved`.
    """

    tokens: Tensor
    nll: Tensor
    surprise: Tensor
    learning_rate: Tensor
    momentum: Tensor | None
    decay: Tensor | None
    past_surprise: Tensor | None
    moved: Tensor
    logits: Tensor
    state: ModelState


@torch.no_grad()
def observe(
    model: TitansLM,
    tokens: Int[Tensor, "b t"],
    state: ModelState | None = None,
    logits: Float[Tensor, "b v"] | None = None,
    write: bool = True,
) -> Observation:
    """Read some tokens after `state`; `logits` are what was predicted for the first of them.

    write=False only reads the memories: surprise and learning rate are then zero.
    """
    output = model.run(tokens, state, write)
    records = [record for record in output.records if record is not None]
    none = output.logits.new_zeros(*tokens.shape, 0, 0)
    surprise, learning_rate = column(records, "surprise"), column(records, "learning_rate")
    return Observation(
        tokens=tokens,
        nll=token_nll(tokens, output.logits, logits),
        surprise=none if surprise is None else surprise,
        learning_rate=none if learning_rate is None else learning_rate,
        momentum=column(records, "momentum"),
        decay=column(records, "decay"),
        past_surprise=momentum_norm(model, output.state),
        moved=moved(model, output.state),
        logits=output.logits[:, -1],
        state=output.state,
    )


def watch(
    model: TitansLM,
    source: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
    state: ModelState | None = None,
    *,
    piece: int = 64,
    write: bool = True,
) -> Iterator[Observation]:
    """`titans.stream`, seen closely: an `Observation` every `piece` tokens, in constant memory.

    How the text is cut into pieces does not change what is computed.
    """
    return read_through(observe, model, source, state, piece, write)


def column(records: list[MemoryRecord], name: str) -> Float[Tensor, "b t memories heads"] | None:
    """One field of all records, or None where they do not have it."""
    found = [getattr(record, name) for record in records]
    if not found or any(values is None for values in found):
        return None
    return torch.stack(found, 2)
