"""Language modelling batches: windows of single documents, and whole documents to evaluate on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from titans.data.documents import read_documents
from titans.data.shards import Shards
from titans.data.tokenizers import Tokenizer, encode_document

IGNORED = -100
"""The label of a position that has nothing to predict; what `cross_entropy` ignores by default."""


class TextWindows:
    """Random windows of documents as training batches.

    A batch is a function of the seed and the step alone, so that a resumed run sees the very same
    batches and there is no sampler to save. Each row is a window inside one document: documents
    are drawn in proportion to their tokens, the window's place in one is uniform, and a document
    shorter than the window is padded on the right. Documents of one token, which have nothing to
    predict, are never drawn.
    """

    def __init__(
        self,
        documents: Shards | Sequence[np.ndarray],
        length: int,
        batch_size: int,
        seed: int,
        segments: int = 1,
    ) -> None:
        """`documents` are prepared shards, or token arrays that end with `end_of_document`.

        A row has `segments * length` tokens: `length` is what one training step's graph spans,
        `segments` how many such pieces follow each other.

        Raises ValueError for a number below 1 (a seed below 0), and where no document has two
        tokens.
        """
        for name, value in [("length", length), ("batch_size", batch_size), ("segments", segments)]:
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        if seed < 0:
            raise ValueError(f"expected seed >= 0, got {seed}")
        self.length = length
        self.batch_size = batch_size
        self.segments = segments
        self.seed = seed
        self._documents = documents
        self._lengths = _lengths(documents)
        self._ends = np.cumsum(np.where(self._lengths > 1, self._lengths, 0))
        if not len(self._ends) or not self._ends[-1]:
            raise ValueError("expected a document of two tokens or more, got none")

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self._lengths.max())

    def batch(self, step: int) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, "batch time"]]:
        """The tokens and labels of one step, each `(batch_size, segments * length)`.

        `labels[t]` is the token after `tokens[t]`, for the last position too. Only a document that
        does not reach beyond its window has labels of -100: on its last token and on the padding,
        which repeats that token, `end_of_document`.
        """
        if step < 0:
            raise ValueError(f"expected step >= 0, got {step}")
        sequence = np.random.SeedSequence(self.seed, spawn_key=(step,))
        random = np.random.Generator(np.random.Philox(sequence))
        # The document that a uniformly drawn token belongs to.
        drawn = random.integers(self._ends[-1], size=self.batch_size)
        numbers = np.searchsorted(self._ends, drawn, side="right")
        time = self.segments * self.length
        # The latest start still has a next token for the window's last one.
        latest = np.maximum(self._lengths[numbers] - 1 - time, 0)
        starts = random.integers(latest, endpoint=True)
        tokens = np.empty((self.batch_size, time), dtype=np.int64)
        labels = np.full((self.batch_size, time), IGNORED, dtype=np.int64)
        for row, (number, start) in enumerate(zip(numbers, starts, strict=True)):
            document = _document(self._documents, int(number))
            window = document[start : start + time + 1]
            tokens[row] = document[-1]
            tokens[row, : len(window)] = window[:time]
            labels[row, : len(window) - 1] = window[1:]
        return torch.from_numpy(tokens), torch.from_numpy(labels)


def from_files(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    text_key: str = "text",
    strip_gutenberg: bool = False,
) -> list[np.ndarray]:
    """The documents of `paths` as token arrays in memory, without preparing them first.

    `read_documents` says what the arguments mean and which ValueErrors there are.
    """
    documents = read_documents(paths, text_key=text_key, strip_gutenberg=strip_gutenberg)
    return [encode_document(tokenizer, document.text) for document in documents]


def _lengths(documents: Shards | Sequence[np.ndarray]) -> Int64[np.ndarray, "documents"]:
    if isinstance(documents, Shards):
        return documents.lengths
    return np.array([len(document) for document in documents], dtype=np.int64)


def _document(documents: Shards | Sequence[np.ndarray], number: int) -> np.ndarray:
    return documents.document(number) if isinstance(documents, Shards) else documents[number]
