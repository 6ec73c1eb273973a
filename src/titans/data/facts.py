"""Facts hidden in real text, `«baku: 4821»`, asked for later.

Recall is scored by all digits of the answer, so knowing which values occurred is not enough:
each must be bound to its name. Names and values of the tests never occur in training.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from titans.data.carrier import is_held_out, window

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAME = 4  # letters of a name
DIGITS = 4

TEXT, STATED, ANSWER = 0, 1, 2  # what a byte of a training row is


class Fact(NamedTuple):
    """A name and its code of `DIGITS` digits."""

    name: str
    value: str

    @property
    def statement(self) -> bytes:
        return f" «{self.name}: {self.value}» ".encode()

    @property
    def question(self) -> bytes:
        """What the model reads before it answers with the digits."""
        return f" «{self.name}: ".encode()


STATEMENT_SIZE = len(Fact("x" * NAME, "0" * DIGITS).statement)


class Batch(NamedTuple):
    """tokens, labels (B, T) int64; weights (B, T) float32 of the loss per label;
    answers (B, T) bool, the labels that are digits of an answer."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    answers: Tensor


def draw_facts(count: int, generator: np.random.Generator, held_out: bool) -> list[Fact]:
    """Facts with distinct names and distinct values from the training or the test split.

    ValueError for more than the split has values.
    """
    if count > values_of(held_out):
        raise ValueError(f"expected at most {values_of(held_out):,} facts, got {count:,}")
    facts: dict[str, str] = {}
    used: set[str] = set()
    while len(facts) < count:
        name = "".join(LETTERS[i] for i in generator.integers(len(LETTERS), size=NAME))
        value = f"{generator.integers(10**DIGITS):0{DIGITS}d}"
        fresh = name not in facts and value not in used
        if fresh and is_held_out(name) == held_out and is_held_out(value) == held_out:
            facts[name] = value
            used.add(value)
    return [Fact(name, value) for name, value in facts.items()]


@cache
def values_of(held_out: bool) -> int:
    """How many different values the test split has, or the training one."""
    return sum(is_held_out(f"{value:0{DIGITS}d}") == held_out for value in range(10**DIGITS))


def batch_of(rows: Sequence[tuple[np.ndarray, np.ndarray]], text_weight: float) -> Batch:
    """Rows of T + 1 tokens and what each of them is -> T predictions a row.

    Weights: 1 / (answers' tokens in the batch) for those, `text_weight` / (tokens of text) for the
    text, 0 for what is stated (no one can know it).
    """
    tokens = torch.from_numpy(np.stack([row[0] for row in rows]).astype(np.int64))
    kinds = torch.from_numpy(np.stack([row[1] for row in rows]))[:, 1:]
    answers, text = kinds == ANSWER, kinds == TEXT
    weights = answers / answers.sum().clamp(min=1)
    weights = weights + text_weight * text / text.sum().clamp(min=1)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights.float(), answers)


class FactBatches:
    """Training batches as a pure function of (seed, step): a resumed run sees the same ones.

    Every row is a window of real text with some facts stated in it and asked for later, in
    random order. Weights: as `batch_of` has them.
    """

    def __init__(
        self,
        texts: Sequence[np.ndarray],
        *,
        lengths: Sequence[int],
        tokens_per_batch: int,
        facts: tuple[int, int],
        text_weight: float,
        seed: int,
    ) -> None:
        longest = max(lengths)
        if max(len(text) for text in texts) < longest:
            raise ValueError(f"the text is too short: need one of at least {longest} bytes")
        self.texts, self.lengths, self.tokens_per_batch = texts, tuple(lengths), tokens_per_batch
        self.facts, self.text_weight, self.seed = facts, text_weight, seed

    def batch(self, step: int) -> Batch:
        generator = np.random.default_rng((self.seed, step))
        length = int(generator.choice(self.lengths))
        count = self.tokens_per_batch // length
        return batch_of([self.row(length + 1, generator) for _ in range(count)], self.text_weight)

    def row(self, length: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Bytes, and what each of them is (TEXT, STATED, ANSWER)."""
        size = STATEMENT_SIZE
        low, high = self.facts
        count = int(generator.integers(low, min(high, length // (2 * size)) + 1))
        facts = draw_facts(count, generator, held_out=False)
        stated = generator.random(count)
        asked = stated + (1.0 - stated) * generator.random(count)
        events = sorted(
            [(t, fact, STATED) for t, fact in zip(stated, facts, strict=True)]
            + [(t, fact, ANSWER) for t, fact in zip(asked, facts, strict=True)],
            key=lambda event: event[0],
        )
        filler = window(self.texts, length - size * len(events), generator)
        cuts = np.sort(generator.integers(0, len(filler) + 1, len(events)))
        parts, kinds, last = [], [], 0
        for cut, (_, fact, what) in zip(cuts, events, strict=True):
            sentence = np.frombuffer(fact.statement, dtype=np.uint8)
            kind = np.full(len(sentence), TEXT)
            kind[len(fact.question) : len(fact.question) + DIGITS] = what
            parts += [filler[last:cut], sentence]
            kinds += [np.full(cut - last, TEXT), kind]
            last = cut
        parts.append(filler[last:])
        kinds.append(np.full(len(filler) - last, TEXT))
        return np.concatenate(parts), np.concatenate(kinds)
