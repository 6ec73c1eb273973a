"""Which continuation does the model find likely? Multiple-choice questions without training.

An option is scored by log p(continuation | context), summed over its tokens. `accuracy` counts
the questions whose right option has the highest score, `accuracy_norm` those where it has the
highest score per byte (of UTF-8, without the space in front): lm-evaluation-harness's acc and
acc_bytes (its acc_norm is per character).
WinoGrande's options differ in the context, so its two accuracies are the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from titans.data.choices import Item, choice_files, read_choices, task_name
from titans.data.documents import expand_paths
from titans.data.tokenizers import Tokenizer, tokenizer_of
from titans.generate import select_rows, stream
from titans.models.lm import TitansLM
from titans.state import NonFiniteError


@dataclass(frozen=True, kw_only=True)
class CommonsenseConfig:
    """Which questions, and how they are put."""

    paths: tuple[str, ...]
    """Files, or folders of them, in the layouts of `titans.data.choices`: PIQA, HellaSwag,
    WinoGrande, ARC, SIQA, BoolQ or any other."""
    limit: int = 0
    """Only the first so many questions of each file; 0 takes all."""
    answer: str = "\nAnswer:"
    """Between a query and its answer, for files with `query` and `choices`."""
    write: bool = True
    """False: memories are read and never written."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty: expected at least one file of questions")
        if self.limit < 0:
            raise ValueError(f"limit must not be negative, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One file. chance: expected accuracy of a guess. The errors are standard errors of the
    mean over questions."""

    task: str
    items: int
    accuracy: float
    accuracy_error: float
    accuracy_norm: float
    accuracy_norm_error: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class CommonsenseResult:
    """tasks: one a file. accuracy, accuracy_norm: means over tasks."""

    tasks: tuple[TaskScore, ...]
    accuracy: float
    accuracy_norm: float
    write: bool


class EncodedOption(NamedTuple):
    """Token ids of the two parts, and the bytes of the answer's text."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    size: int


def commonsense(
    model: TitansLM,
    config: CommonsenseConfig,
    tokenizer: Tokenizer | None = None,
    watch: Callable[[TaskScore], None] | None = None,
) -> CommonsenseResult:
    """Score every file of `config.paths`; the tokenizer defaults to bytes. `watch` sees every
    score as it is there.

    Raises ValueError, in one line and before any question is asked, for a file that is none of
    the layouts and for a tokenizer that is not the model's.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    tasks = []
    files = [
        (path, list(islice(read_choices(path, config.answer), config.limit or None)))
        for path in choice_files(expand_paths(config.paths))
    ]
    for path, items in files:
        right = [judge(model, tokenizer, item, config.write) for item in items]
        tasks.append(task_score(task_name(path), right))
        if watch is not None:
            watch(tasks[-1])
    return CommonsenseResult(
        tasks=tuple(tasks),
        accuracy=sum(t.accuracy for t in tasks) / len(tasks),
        accuracy_norm=sum(t.accuracy_norm for t in tasks) / len(tasks),
        write=config.write,
    )


class Judged(NamedTuple):
    """Was the likeliest option the right one, and the likeliest per byte? Among how many?"""

    right: bool
    right_norm: bool
    options: int


def judge(model: TitansLM, tokenizer: Tokenizer, item: Item, write: bool = True) -> Judged:
    options = encode_item(tokenizer, item)
    scores = score(model, options, write)
    sizes = torch.tensor([option.size for option in options], dtype=scores.dtype)
    return Judged(
        int(scores.argmax()) == item.gold,
        int((scores / sizes).argmax()) == item.gold,
        len(options),
    )


def encode_item(tokenizer: Tokenizer, item: Item) -> list[EncodedOption]:
    """The continuation is what the whole text has after the context's tokens; where the whole
    is split otherwise, both parts are encoded alone."""
    encoded = []
    for context, continuation in item.options:
        before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
        fits = whole[: len(before)] == before and len(whole) > len(before)
        after = whole[len(before) :] if fits else tokenizer.encode(continuation)
        size = len(continuation.strip().encode())
        encoded.append(EncodedOption(tuple(before), tuple(after), size))
    return encoded


def score(
    model: TitansLM, options: Sequence[EncodedOption], write: bool = True
) -> Float[Tensor, " options"]:
    """log p(continuation | context) of every option, in float64 nats."""
    found = [one.log for one in likelihoods(model, options, write)]
    return torch.tensor(found, dtype=torch.float64)


class Likelihood(NamedTuple):
    """log: log p(continuation | context) in nats. greedy: is the continuation the likeliest one,
    token by token?"""

    log: float
    greedy: bool


@torch.inference_mode()
def likelihoods(
    model: TitansLM, options: Sequence[EncodedOption], write: bool = True, rows: int = 32
) -> list[Likelihood]:
    """How likely every option's continuation is; at most `rows` are read side by side.

    A context that options share is read once; each reads its continuation from a copy of what
    is remembered then. Rows of one batch are padded after their end, which changes nothing
    before it.
    """
    device = next(model.parameters()).device
    found: dict[int, Likelihood] = {}
    for context in dict.fromkeys(option.context for option in options):
        for reading in stream(model, torch.tensor(context), write=write):  # noqa: B007
            pass
        asked = [i for i, option in enumerate(options) if option.context == context]
        for begin in range(0, len(asked), rows):
            members = asked[begin : begin + rows]
            answers = [torch.tensor(options[i].continuation) for i in members]
            logits = reading.logits.expand(len(members), -1)[:, None]
            padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True).to(device)
            if padded.shape[1] > 1:
                start = select_rows(reading.state, members, 1)
                logits = torch.cat([logits, model(padded[:, :-1], start, write)[0]], 1)
            nll = F.cross_entropy(logits.double().transpose(1, 2), padded, reduction="none").cpu()
            if not nll.isfinite().all():
                raise NonFiniteError("the log-probability of a continuation is not finite")
            likeliest = (logits.argmax(-1) == padded).cpu()
            for i, answer, row, hits in zip(members, answers, nll, likeliest, strict=True):
                end = len(answer)
                found[i] = Likelihood(-row[:end].sum().item(), bool(hits[:end].all()))
    return [found[i] for i in range(len(options))]


def task_score(task: str, judged: Sequence[Judged]) -> TaskScore:
    count = len(judged)
    plain = sum(j.right for j in judged) / count
    norm = sum(j.right_norm for j in judged) / count

    def error(share: float) -> float:
        return math.sqrt(share * (1 - share) / max(count - 1, 1))

    return TaskScore(
        task=task,
        items=count,
        accuracy=plain,
        accuracy_error=error(plain),
        accuracy_norm=norm,
        accuracy_norm_error=error(norm),
        chance=sum(1 / j.options for j in judged) / count,
    )
