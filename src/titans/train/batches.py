"""What each step trains on, and what evaluations run on: the data of a `RunConfig`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from titans.data.babilong import BabiBatches, BabiTask, held_back, training_questions
from titans.data.carrier import files_text, python_text
from titans.data.documents import expand_paths
from titans.data.facts import STATEMENT_SIZE, Batch, FactBatches
from titans.data.haystack import Ring, prose
from titans.data.needle import KINDS, NeedleBatches, NeedleTask
from titans.data.shards import Shards
from titans.data.text import IGNORED, TextWindows, from_files
from titans.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    token_dtype,
    tokenizer_identity,
)
from titans.train.config import DataConfig, RunConfig, Stage

# Of every run, whatever its own seed, so that runs are compared on the same data. NumPy takes
# (seed, step) apart into words of 32 bits, so that (2**40, 0) and (0, 256) are one stream; no
# training has as many steps as this has in its upper word.
EVALUATION_SEED = 2**63

Documents = Shards | Sequence[np.ndarray]
S = TypeVar("S")


@runtime_checkable
class Batches(Protocol):
    """Batches by number. Their order is a pure function of a seed: nothing of it is saved.

    `weights` say how much each label counts: the loss of a batch, or of any of its rows, is the
    sum of weights * -log p(label).
    """

    def batch(self, step: int) -> Batch: ...


class Split(NamedTuple):
    """What is trained and evaluated on from step `begin` on; `valid` may be None."""

    begin: int
    train: Batches
    valid: Batches | None


class Data(NamedTuple):
    """splits: one for each stage of the curriculum. tokenizer: what made the tokens."""

    splits: list[Split]
    tokenizer: Tokenizer

    @property
    def in_bytes(self) -> bool:
        """Is a token a byte?"""
        return isinstance(self.tokenizer, ByteTokenizer)

    def at(self, step: int) -> Split:
        return [split for split in self.splits if split.begin <= step][-1]


class TextBatches:
    """Segments of text windows: batch `segments * w + s` is segment s of window w."""

    def __init__(
        self, documents: Documents, data: DataConfig, tokens_per_batch: int, seed: int
    ) -> None:
        rows = tokens_per_batch // data.length
        self.windows = TextWindows(documents, data.length, rows, seed, data.segments)
        self._number = -1
        self._window: tuple[Tensor, Tensor] | None = None

    def batch(self, step: int) -> Batch:
        number, segment = divmod(step, self.windows.segments)
        if self._window is None or self._number != number:
            self._number, self._window = number, self.windows.batch(number)
        length = self.windows.length
        tokens, labels = (t[:, segment * length : (segment + 1) * length] for t in self._window)
        counted = labels != IGNORED
        weights = counted.float() / counted.sum().clamp(min=1)
        return Batch(tokens, labels, weights, torch.zeros_like(counted))


def open_data(config: RunConfig) -> Data:
    """The data of a run; ValueError of one line for what is missing or does not fit."""
    if config.train.seed >= EVALUATION_SEED:
        raise ValueError(f"train.seed must be below {EVALUATION_SEED}, got {config.train.seed}")
    opened = {"text": open_text, "facts": open_facts, "needle": open_needle, "babi": open_babi}
    data = opened[config.data.task](config)
    if config.train.eval_every and data.splits[0].valid is None:
        raise ValueError(
            "data.valid_paths is empty: name held-out text, or set train.eval_every to 0"
        )
    return data


def by_stage(
    config: RunConfig, make: Callable[[Stage, S, int], Batches], train: S, valid: S
) -> list[Split]:
    """One split for each stage; make(stage, source, seed) gives the batches of a source."""
    return [
        Split(
            stage.begin,
            make(stage, train, config.train.seed),
            make(stage, valid, EVALUATION_SEED),
        )
        for stage in config.data.curriculum()
    ]


def open_facts(config: RunConfig) -> Data:
    """Facts in the bytes of `paths`. Evaluations hide others, in held-out text if there is any."""
    check_vocabulary(config, 256)
    paths, held_out = config.data.paths, config.data.valid_paths
    texts = files_text(expand_paths(paths)) if paths else python_text(held_out=False)
    if held_out:
        valid = files_text(expand_paths(held_out))
    else:
        valid = texts if paths else python_text(held_out=True)

    def batches(stage: Stage, texts: Sequence[np.ndarray], seed: int) -> FactBatches:
        check_room(stage)
        return FactBatches(
            texts,
            lengths=stage.lengths,
            tokens_per_batch=config.train.tokens_per_batch,
            facts=stage.facts,
            text_weight=config.data.text_weight,
            seed=seed,
        )

    return Data(by_stage(config, batches, texts, valid), ByteTokenizer())


def check_room(stage: Stage) -> None:
    """A fact is stated and asked for: its statement must fit twice."""
    shortest, fewest = min(stage.lengths), stage.facts[0]
    needed = 2 * fewest * STATEMENT_SIZE - 1  # a row has one byte more than tokens
    if shortest < needed:
        raise ValueError(
            f"a row of {shortest} tokens is too short for data.facts_min = {fewest}: need {needed}"
        )


def open_needle(config: RunConfig) -> Data:
    """Needles in noise or prose; evaluations draw other words and values, in held-out prose."""
    data, tokenizer = config.data, load_tokenizer(config.data.tokenizer or "bytes")
    check_vocabulary(config, tokenizer.vocab_size)
    (words,) = expand_paths((data.needle.words,))

    def tasks(held_out: bool) -> list[NeedleTask]:
        in_prose = any(KINDS[kind].haystack == "prose" for kind in data.needle.kinds)
        text = open_prose(config, tokenizer, held_out) if in_prose else None
        stray = data.needle.stray
        return [
            NeedleTask(kind, words, text, tokenizer, held_out, stray) for kind in data.needle.kinds
        ]

    def batches(stage: Stage, tasks: list[NeedleTask], seed: int) -> NeedleBatches:
        return NeedleBatches(
            tasks,
            lengths=stage.lengths,
            tokens_per_batch=config.train.tokens_per_batch,
            questions=stage.facts,
            dense=data.needle.dense,
            text_weight=data.text_weight,
            seed=seed,
        )

    splits = by_stage(config, batches, tasks(held_out=False), tasks(held_out=True))
    return Data(splits, tokenizer)


def open_babi(config: RunConfig) -> Data:
    """bAbI's facts in prose; evaluations ask training questions that are held back, in held-out
    prose, and leave the test files to `titans.evals.babilong`."""
    data, tokenizer = config.data, load_tokenizer(config.data.tokenizer or "bytes")
    check_vocabulary(config, tokenizer.vocab_size)
    (folder,) = expand_paths((data.babi.folder,))
    texts = {held_out: open_prose(config, tokenizer, held_out) for held_out in (False, True)}
    train, valid = [], []
    for number in data.babi.tasks:
        questions = training_questions(folder, number)
        known, asked = held_back(questions)
        hidden = (data.babi.stray, data.babi.echo)
        train.append(BabiTask(known, texts[False], tokenizer, *hidden))
        valid.append(BabiTask(asked, texts[True], tokenizer, *hidden))

    def batches(stage: Stage, tasks: list[BabiTask], seed: int) -> BabiBatches:
        return BabiBatches(
            tasks,
            lengths=stage.lengths,
            tokens_per_batch=config.train.tokens_per_batch,
            dense=data.babi.dense,
            text_weight=data.text_weight,
            seed=seed,
        )

    splits = by_stage(config, batches, train, valid)
    return Data(splits, tokenizer)


def open_prose(config: RunConfig, tokenizer: Tokenizer, held_out: bool) -> Ring:
    data = config.data
    paths = data.valid_paths if held_out and data.valid_paths else data.paths
    if not paths:
        raise ValueError(f"data.paths is empty: the task {data.task} hides sentences in prose")
    ring = prose(expand_paths(paths), tokenizer, held_out)
    return ring if held_out or not data.garble else ring.garbled(data.garble, config.train.seed)


def open_text(config: RunConfig) -> Data:
    data, train = config.data, config.train
    paths, valid_paths = expand_paths(data.paths), expand_paths(data.valid_paths)
    if len(paths) == 1 and (paths[0] / "train" / "index.json").is_file():
        valid_paths = valid_paths or [paths[0] / "valid"]
        paths = [paths[0] / "train"]
    documents, tokenizer = open_documents(paths, data.tokenizer)
    check_vocabulary(config, tokenizer.vocab_size)
    valid: Documents | None = None
    if valid_paths:
        valid = open_held_out(valid_paths, tokenizer)
    elif not paths:
        valid = with_ends(python_text(held_out=True))
    batches = TextBatches(documents, data, train.tokens_per_batch, train.seed)
    longest = batches.windows.longest
    if data.segments > 1 and longest <= data.length + 1:  # the others were steps on padding alone
        raise ValueError(
            f"data.segments is {data.segments}, and no document reaches the second: the longest "
            f"has {longest} tokens, data.length is {data.length}"
        )
    split = Split(
        0,
        batches,
        None
        if valid is None
        else TextBatches(valid, data, train.tokens_per_batch, EVALUATION_SEED),
    )
    return Data([split], tokenizer)


def open_documents(paths: list[Path], name: str | None) -> tuple[Documents, Tokenizer]:
    """The documents, and the tokenizer that made or makes their tokens."""
    check_alone(paths)
    if len(paths) == 1 and (paths[0] / "index.json").is_file():
        shards = Shards.open(paths[0])
        tokenizer = shards.tokenizer()
        if name is not None and not one_tokenizer(load_tokenizer(name), tokenizer):
            raise ValueError(
                f"{paths[0]}: was not prepared with data.tokenizer {name!r}; leave that key out"
            )
        return shards, tokenizer
    tokenizer = load_tokenizer(name or "bytes")
    if paths:
        return from_files(paths, tokenizer), tokenizer
    if not isinstance(tokenizer, ByteTokenizer):
        raise ValueError("data.paths is empty: the Python sources are read as bytes alone")
    return with_ends(python_text(held_out=False)), tokenizer


def check_alone(paths: list[Path]) -> None:
    """ValueError for a prepared folder among other paths."""
    for path in paths if len(paths) > 1 else ():
        if (path / "index.json").is_file() or (path / "train" / "index.json").is_file():
            raise ValueError(f"{path}: is a prepared folder, which is taken alone")


def open_held_out(paths: list[Path], tokenizer: Tokenizer) -> Documents:
    check_alone(paths)
    if len(paths) == 1 and (paths[0] / "valid" / "index.json").is_file():
        paths = [paths[0] / "valid"]
    if len(paths) != 1 or not (paths[0] / "index.json").is_file():
        return from_files(paths, tokenizer)
    shards = Shards.open(paths[0])
    theirs = shards.tokenizer()
    if not one_tokenizer(theirs, tokenizer):
        raise ValueError(
            f"{paths[0]}: was prepared with the tokenizer {tokenizer_identity(theirs)}, the "
            f"training text with {tokenizer_identity(tokenizer)}"
        )
    return shards


def one_tokenizer(first: Tokenizer, second: Tokenizer) -> bool:
    return tokenizer_identity(first) == tokenizer_identity(second)


def with_ends(texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Bytes -> documents of the byte tokenizer."""
    tokenizer = ByteTokenizer()
    dtype = token_dtype(tokenizer.vocab_size)
    return [np.append(text.astype(dtype), dtype.type(tokenizer.end_of_document)) for text in texts]


def check_vocabulary(config: RunConfig, tokens: int) -> None:
    if config.model.vocab_size < tokens:
        raise ValueError(
            f"model.vocab_size ({config.model.vocab_size}) is too small for the data's {tokens} "
            "tokens"
        )
