"""Key-value pairs in random noise: the smallest task that only a bound memory solves.

A row holds `pairs` pairs (key, value) at random places among noise tokens; at its end every key
is asked for, in random order, as (QUERY, key). Answers are never revealed, so striking out what
was used does not help; values may occur twice. What knowing them but not whose they are gives is
`guess`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

KEYS = VALUES = 32
NOISE = 31
VOCABULARY = KEYS + VALUES + NOISE + 1
IGNORED = -100


def guess(pairs: int, keys: int = KEYS) -> float:
    """Right answers of who says one of a row's values, as often as it occurs: the right pair's, or
    that of another with the same value."""
    return 1 / pairs + (1 - 1 / pairs) / keys


class PairBatch(NamedTuple):
    """tokens, labels (B, T) int64; labels are IGNORED but where an answer is due."""

    tokens: Tensor
    labels: Tensor


class PairTask:
    """Rows of `length` tokens, a pure function of (seed, step); any length, piece by piece.

    keys: how many keys there are, and as many values: ids 0 ... keys - 1 and keys ... 2 keys - 1,
    then NOISE tokens of noise, then `query`. `vocabulary` counts them all.
    """

    def __init__(self, *, rows: int, length: int, pairs: int, seed: int, keys: int = KEYS) -> None:
        if length < 4 * pairs + 2:
            raise ValueError(f"length must be at least {4 * pairs + 2} for {pairs} pairs")
        if not 0 < pairs <= keys:
            raise ValueError(f"pairs must lie in 1..{keys}, got {pairs}")
        self.rows, self.length, self.pairs, self.seed = rows, length, pairs, seed
        self.keys = keys

    @property
    def query(self) -> int:
        return 2 * self.keys + NOISE

    @property
    def vocabulary(self) -> int:
        return self.query + 1

    def batch(self, step: int) -> PairBatch:
        """All tokens at once."""
        (piece,) = self.stream(step, self.length)
        return piece

    def stream(self, step: int, piece: int) -> Iterator[PairBatch]:
        """The same pairs and questions, `piece` tokens at a time, in constant memory; the noise
        between them depends on `piece`."""
        generator = np.random.default_rng((self.seed, step))
        rows, pairs = self.rows, self.pairs
        keys = np.argsort(generator.random((rows, self.keys)), 1)[:, :pairs]
        values = self.keys + generator.integers(0, self.keys, (rows, pairs))
        order = np.argsort(generator.random((rows, pairs)), 1)
        body = self.length - 2 * pairs  # queries follow
        slots = np.stack([self.places(body // 2, generator) for _ in range(rows)]) * 2
        row = np.arange(rows)[:, None]
        asked, answers = keys[row, order], values[row, order]
        for start in range(0, self.length, piece):
            stop = min(start + piece, self.length)
            tokens = 2 * self.keys + generator.integers(0, NOISE, (rows, stop - start))
            labels = np.full((rows, stop - start), IGNORED)
            put(tokens, slots - start, keys)
            put(tokens, slots + 1 - start, values)
            at = body + 2 * np.arange(pairs)[None].repeat(rows, 0)
            put(tokens, at - start, np.full_like(asked, self.query))
            put(tokens, at + 1 - start, asked)
            put(labels, at + 1 - start, answers)
            yield PairBatch(torch.from_numpy(tokens), torch.from_numpy(labels))

    def places(self, slots: int, generator: np.random.Generator) -> np.ndarray:
        """Distinct slots of two tokens, without a list of all of them."""
        chosen: set[int] = set()
        while len(chosen) < self.pairs:
            chosen.add(int(generator.integers(slots)))
        return np.array(sorted(chosen))


def put(target: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
    """target[row, columns[row]] = values[row], for the columns inside the target."""
    inside = (columns >= 0) & (columns < target.shape[1])
    rows = np.broadcast_to(np.arange(len(target))[:, None], columns.shape)
    target[rows[inside], columns[inside]] = values[inside]
