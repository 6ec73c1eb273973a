"""Questions at the end of long texts: read in constant memory, answered greedily, counted."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from titans.data.haystack import Sample, blocks
from titans.generate import PIECE, Sampling, continue_rows, prefill
from titans.models.lm import TitansLM
from titans.train.objective import NonFiniteError


@torch.no_grad()
def answer(
    model: TitansLM, samples: Sequence[Sample], count: int, vocabulary: int, write: bool = True
) -> np.ndarray:
    """The `count` most likely tokens after each prompt, one after the other: (samples, count).

    Prompts of one length are read side by side, so that their number bounds the memory, and not
    their length. vocabulary: of the tokenizer; a model's may be padded, and the rest cannot be
    said. write=False: memories are only read.
    """
    device = next(model.parameters()).device
    given: list[list[int]] = [[] for _ in samples]
    for length in sorted({sample.length for sample in samples}):
        rows = [i for i, sample in enumerate(samples) if sample.length == length]
        text = side_by_side([samples[i] for i in rows])
        logits, state = None, None
        for piece in text:
            logits, state = prefill(model, piece.to(device), state, write)
        if logits is None or state is None:
            raise ValueError("a prompt is empty: expected at least one token")
        if not logits.isfinite().all():
            raise NonFiniteError(f"the logits after {length:,} tokens are not finite")

        def take(row: int, token: int, rows: list[int] = rows) -> bool:
            given[rows[row]].append(token)
            return True

        greedy, seeds = Sampling(temperature=0.0), range(len(rows))
        continue_rows(
            model, logits, state, count, greedy, seeds, take, vocabulary=vocabulary, write=write
        )
    return np.array(given, dtype=np.int64)


def side_by_side(samples: Sequence[Sample]) -> Iterator[Int[Tensor, "samples piece"]]:
    """Prompts of one length, so many tokens of each at a time."""
    for rows in zip(*(blocks(sample.pieces(), PIECE) for sample in samples), strict=True):
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def exact(given: np.ndarray, sample: Sample) -> bool:
    """Does what was answered begin with the right answer, token by token?"""
    wanted = sample.answer
    return len(given) >= len(wanted) and bool((given[: len(wanted)] == wanted).all())
