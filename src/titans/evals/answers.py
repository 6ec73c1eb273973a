"""Questions at the end of long texts: read in constant memory, answered greedily, counted."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from titans.data.documents import expand_paths
from titans.data.haystack import Sample, blocks
from titans.evals.report import write_json
from titans.generate import PIECE, Sampling, continue_rows, prefill
from titans.models.lm import TitansLM
from titans.state import ModelState, NonFiniteError, digest

SAVE_S = 300.0  # seconds of reading that a stopped command may lose


@torch.no_grad()
def answer(
    model: TitansLM,
    samples: Sequence[Sample],
    count: int,
    vocabulary: int,
    write: bool = True,
    keep: Path | None = None,
) -> np.ndarray:
    """The `count` most likely tokens after each prompt, one after the other: (samples, count).

    Prompts of one length are read side by side, so that their number bounds the memory, and not
    their length. vocabulary: of the tokenizer; a model's may be padded, and the rest cannot be
    said. write=False: memories are only read. keep: a folder for answers and unfinished readings,
    from which the same weights asked the same go on.
    """
    given: list[list[int]] = [[] for _ in samples]
    for length in sorted({sample.length for sample in samples}):
        rows = [i for i, sample in enumerate(samples) if sample.length == length]
        together = [samples[i] for i in rows]
        kept = None
        if keep is not None:
            kept = Kept(keep, model, together, count, f"{vocabulary} {write}")
        said = None if kept is None else kept.answers()
        if said is None:
            said = read_and_say(model, together, count, vocabulary, write, kept)
            if kept is not None:
                kept.finish(said)
        for row, tokens in zip(rows, said, strict=True):
            given[row] = tokens
    return np.array(given, dtype=np.int64)


class Kept:
    """What a folder keeps of one reading: its state on the way, and at last what was said.

    Both have names of the weights and of every token of the prompts, so that nothing is taken
    for another.
    """

    def __init__(
        self, folder: Path, model: TitansLM, samples: Sequence[Sample], count: int, settings: str
    ) -> None:
        self.shape = (len(samples), count)
        weights = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        found = hashlib.sha256(
            f"{digest(weights, model.config_hash)} {count} {PIECE} {settings}".encode()
        )
        for piece in side_by_side(samples):
            found.update(piece.numpy().tobytes())
        folder.mkdir(parents=True, exist_ok=True)
        name = found.hexdigest()[:16]
        self.said, self.half = folder / f"{name}.json", folder / f"{name}.safetensors"
        self.saved = time.monotonic()

    def answers(self) -> list[list[int]] | None:
        try:
            said = np.array(json.loads(self.said.read_text(encoding="utf-8")), dtype=np.int64)
        except FileNotFoundError:
            return None
        except (TypeError, ValueError):
            said = None
        if said is None or said.shape != self.shape:
            raise ValueError(f"{self.said}: damaged, expected {self.shape} tokens; delete it")
        return said.tolist()

    def state(self, device: torch.device) -> ModelState | None:
        return ModelState.load(self.half, device) if self.half.exists() else None

    def due(self) -> bool:
        return time.monotonic() - self.saved >= SAVE_S

    def save(self, state: ModelState) -> None:
        state.save(self.half)
        self.saved = time.monotonic()

    def finish(self, said: list[list[int]]) -> None:
        write_json(self.said, said)
        self.half.unlink(missing_ok=True)


def read_and_say(
    model: TitansLM,
    samples: Sequence[Sample],
    count: int,
    vocabulary: int,
    write: bool,
    kept: Kept | None,
) -> list[list[int]]:
    """`answer`, of prompts of one length."""
    device = next(model.parameters()).device
    state = None if kept is None else kept.state(device)
    read, logits = 0 if state is None else state.position, None
    try:
        for start, piece in enumerate(side_by_side(samples)):
            if start * PIECE < read:
                continue
            if kept is not None and state is not None and kept.due():
                kept.save(state)
            logits, state = prefill(model, piece.to(device), state, write)
    except KeyboardInterrupt:
        if kept is not None and state is not None and state.position < samples[0].length:
            kept.save(state)
        raise
    if logits is None or state is None:
        raise ValueError("a prompt is empty: expected at least one token")
    if not logits.isfinite().all():
        raise NonFiniteError(f"the logits after {samples[0].length:,} tokens are not finite")
    said: list[list[int]] = [[] for _ in samples]

    def take(row: int, token: int) -> bool:
        said[row].append(token)
        return True

    greedy, seeds = Sampling(temperature=0.0), range(len(samples))
    continue_rows(
        model, logits, state, count, greedy, seeds, take, vocabulary=vocabulary, write=write
    )
    return said


def keep_folder(path: str) -> Path | None:
    """Of a suite's setting `keep`."""
    return expand_paths((path,))[0] if path else None


def side_by_side(samples: Sequence[Sample]) -> Iterator[Int[Tensor, "samples piece"]]:
    """Prompts of one length, so many tokens of each at a time."""
    for rows in zip(*(blocks(sample.pieces(), PIECE) for sample in samples), strict=True):
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def exact(given: np.ndarray, sample: Sample) -> bool:
    """Does what was answered begin with the right answer, token by token?"""
    wanted = sample.answer
    return len(given) >= len(wanted) and bool((given[: len(wanted)] == wanted).all())
