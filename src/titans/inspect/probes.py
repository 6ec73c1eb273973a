"""What a memory gives back for a key that it was once told, now and as it reads on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from titans.generate import stream
from titans.inspect.weights import Memory, memories, memory_inputs
from titans.layers.memory import mean_gate
from titans.models.lm import TitansLM
from titans.state import ModelState


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One token, and the pair that every head of every memory was told to bind for it.

    position: tokens read before it. token: (B,). keys, values: (B, memories, heads, D).
    learning_rate: (B, memories, heads), theta with which the pair was written.
    """

    position: int
    token: Tensor
    keys: Tensor
    values: Tensor
    learning_rate: Tensor


class Recall(NamedTuple):
    """What the memories return for a probe's keys: `returned` M(k), (B, memories, heads, D).

    (B, memories, heads): cosine between M(k) and v; norm_ratio |M(k)| / |v|; relative_error
    |M(k) - v| / |v|, 0 for perfect recall and 1 for a memory that returns nothing.
    """

    returned: Tensor
    cosine: Tensor
    norm_ratio: Tensor
    relative_error: Tensor


@torch.no_grad()
def probe(
    model: TitansLM, state: ModelState | None, tokens: Int[Tensor, "b t"], index: int
) -> Probe:
    """The keys and values for token `index` of `tokens`, which are read after `state`.

    state: None for a text's beginning. Raises ValueError for an index outside the tokens.
    """
    if not 0 <= index < tokens.shape[1]:
        raise ValueError(f"index must lie in 0..{tokens.shape[1] - 1}, got {index}")
    if state is None:
        state = model.init_state(tokens.shape[0])
    seen = memory_inputs(
        model, state, tokens[:, : index + 1]
    )  # causal: what follows changes nothing
    keys, values, rates = [], [], []
    for memory, x in zip(memories(model, state), seen, strict=True):
        (_, k, v), shown, _ = memory.layer.mix(x, memory.state.tail)
        keys.append(k[:, -1])
        values.append(v[:, -1])
        rates.append(mean_gate(memory.layer.gates(shown[:, -1:])[0])[:, 0])
    none = model.embedding.weight.new_zeros(tokens.shape[0], 0, 0)
    return Probe(
        position=state.position + index,
        token=tokens[:, index],
        keys=torch.stack(keys, 1) if keys else none[..., None],
        values=torch.stack(values, 1) if values else none[..., None],
        learning_rate=torch.stack(rates, 1) if rates else none,
    )


@torch.no_grad()
def recall(model: TitansLM, state: ModelState, probe: Probe) -> Recall:
    """What the memories return now for the keys of a probe."""
    found = memories(model, state)
    if len(found) != probe.keys.shape[1]:
        raise ValueError(
            f"the probe is of a model with {probe.keys.shape[1]} memories, this has {len(found)}"
        )
    answers = [answer(memory, probe.keys[:, i]) for i, memory in enumerate(found)]
    returned = torch.stack(answers, 1) if answers else probe.values
    values = probe.values.to(returned.dtype)
    tiny = torch.finfo(values.dtype).tiny  # a memory may return nothing, and a value be nothing
    size = torch.linalg.vector_norm(returned, dim=-1)
    wanted = torch.linalg.vector_norm(values, dim=-1).clamp_min(tiny)
    return Recall(
        returned,
        (returned * values).sum(-1) / size.clamp_min(tiny) / wanted,
        size / wanted,
        torch.linalg.vector_norm(returned - values, dim=-1) / wanted,
    )


def recall_curve(
    model: TitansLM,
    state: ModelState,
    probe: Probe,
    source: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
    *,
    piece: int = 64,
    write: bool = True,
) -> Iterator[tuple[int, Recall]]:
    """How a recall decays while the model reads on from `state`: (tokens read in all, `recall`),
    at the beginning and after every `piece` tokens of `source` (as of `titans.stream`)."""
    yield state.position, recall(model, state, probe)
    for reading in stream(model, source, state, piece=piece, write=write):
        yield reading.state.position, recall(model, reading.state, probe)


def answer(memory: Memory, keys: Float[Tensor, "b h d"]) -> Float[Tensor, "b h d"]:
    """M(k) for one key a head."""
    return memory.layer.read(keys[:, None], memory.state.rule.weights)[:, 0]
