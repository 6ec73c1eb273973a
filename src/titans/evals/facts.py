"""Does a fact survive the text read after it? Recall against distance, in one stream.

Each stream is real text in which one fact per distance is stated, so that its statement ends
`distance` tokens before the stream does. Then every fact is asked for, each question on its
own fork of the memory. An answer counts when all its digits are right; chance is 1e-4, and a
model that remembers which codes occurred, but not whose they are, gets 1 / distances.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from titans.data.carrier import endless
from titans.data.facts import DIGITS, STATEMENT_SIZE, Fact, draw_facts
from titans.generate import Reading, stream
from titans.models.lm import TitansLM
from titans.state import ModelState

MARGIN = 64  # tokens of a stream before its first fact


class HiddenFacts(NamedTuple):
    """tokens: (streams, length) uint8. facts[i][d]: the fact of stream i at distances[d]."""

    tokens: np.ndarray
    facts: list[list[Fact]]
    distances: tuple[int, ...]


def hide_facts(
    texts: Sequence[np.ndarray], distances: Sequence[int], *, streams: int, seed: int
) -> HiddenFacts:
    """Streams of text with one held-out fact per distance; the same for the same seed."""
    ordered = tuple(sorted(set(distances)))
    if ordered[0] < 0 or any(b - a < STATEMENT_SIZE for a, b in pairwise(ordered)):
        raise ValueError(
            f"distances must be 0 or more and at least {STATEMENT_SIZE} tokens apart, "
            f"got {list(ordered)}"
        )
    length = ordered[-1] + STATEMENT_SIZE + MARGIN
    rows, facts = [], []
    for index in range(streams):
        generator = np.random.default_rng((seed, index))
        row = endless(texts, length, generator).copy()
        hidden = draw_facts(len(ordered), generator, held_out=True)
        for distance, fact in zip(ordered, hidden, strict=True):
            end = length - distance
            row[end - STATEMENT_SIZE : end] = np.frombuffer(fact.statement, dtype=np.uint8)
        rows.append(row)
        facts.append(hidden)
    return HiddenFacts(np.stack(rows), facts, ordered)


def read(
    model: TitansLM,
    haystack: HiddenFacts,
    *,
    write: bool = True,
    watch: Callable[[Reading], None] | None = None,
) -> ModelState:
    """Read all streams to their end, in constant memory; `watch` sees every piece."""
    state: ModelState | None = None
    for reading in stream(model, haystack.tokens, piece=1024, write=write):
        state = reading.state
        if watch is not None:
            watch(reading)
    assert state is not None
    return state


@torch.inference_mode()
def ask(
    model: TitansLM, state: ModelState, facts: Sequence[Sequence[Fact]], *, write: bool = True
) -> np.ndarray:
    """Ask stream i for every one of facts[i]: (streams, facts) bool, was every digit right?

    Digits are compared with the most likely ones given the true digits before them; all being
    right is the same as greedy decoding being right. The state is not changed.
    """
    right = []
    for asked in zip(*facts, strict=True):
        texts = [list(fact.question + fact.value.encode()) for fact in asked]
        tokens = torch.tensor(texts, device=next(model.parameters()).device)
        logits, _ = model(tokens[:, :-1], state, write)
        guess = logits[:, -DIGITS:].argmax(-1)
        right.append((guess == tokens[:, -DIGITS:]).all(-1).cpu().numpy())
    return np.stack(right, 1)
