"""How well does a model predict a text, and does it predict it better the more it has read?

Every document is read in one stream, in constant memory, and its memory is never reset inside
it. Scored is every token that has something before it: a document's first token only where the
memory is carried over from the document before. Bytes are those of the scored tokens.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from titans.config import require_positive
from titans.data.documents import expand_paths, read_documents
from titans.data.tokenizers import ByteTokenizer, Tokenizer, encode, tokenizer_of
from titans.generate import read_piece, select_rows
from titans.models.lm import TitansLM
from titans.state import ModelState, NonFiniteError

FIRST_BUCKET = 256


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """What is read, and how."""

    paths: tuple[str, ...]
    """Text files, JSONL files and folders of them, also compressed; see `read_documents`."""
    text_key: str = "text"
    """Where a JSONL line holds its document."""
    strip_gutenberg: bool = False
    """Leave out the notices of Project Gutenberg."""
    encoding: str = "utf-8-sig"
    """Of the files; see `read_documents`."""
    max_tokens: int = 0
    """Read only so many tokens of each document; 0 reads all."""
    write: bool = True
    """False: memories are read and never written. What the two differ by is what was learned
    while reading (attention and convolutions see their windows with either)."""
    carry: bool = False
    """Read all documents as one stream, an end of document between them."""
    rows: int = 1
    """Documents read side by side: speed only. With `carry` it must be 1."""
    piece: int = 2048
    """Tokens a forward pass reads: speed only."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty: expected at least one text file or folder")
        require_positive(self, "rows", "piece")
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, got {self.max_tokens}")
        if self.carry and self.rows != 1:
            raise ValueError(f"carry reads one document after the other: rows is {self.rows}")


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """The tokens that had `begin` to `end` - 1 tokens before them in their stream; `loss` is
    their mean in nats. Later positions come from the longer documents alone."""

    begin: int
    end: int
    tokens: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class DocumentLoss:
    """tokens, bytes: those scored. words: of the whole document. loss: nats, summed."""

    name: str
    tokens: int
    bytes: int
    words: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Over all documents. loss: mean nats per token; perplexity: its exponential, and the same
    with the whole loss shared out among the words (runs of characters other than white space);
    None where that is beyond a float."""

    tokens: int
    bytes: int
    words: int
    loss: float
    bits_per_byte: float
    perplexity: float | None
    word_perplexity: float | None
    positions: tuple[PositionLoss, ...]
    documents: tuple[DocumentLoss, ...]
    write: bool
    carry: bool


class Tokens(NamedTuple):
    """A document ready to be read; its first token is not scored."""

    name: str
    tokens: Int64[np.ndarray, " time"]
    words: int


class Positions:
    """Sums of losses by position, in the buckets 0-255, 256-511, 512-1023, 1024-2047, ..."""

    def __init__(self) -> None:
        self.loss = torch.zeros(64, dtype=torch.float64)
        self.count = torch.zeros(64, dtype=torch.int64)

    def add(self, begin: int, nll: Float[Tensor, "b t"]) -> None:
        """nll: of tokens begin, begin + 1, ... of every row; NaN where a token is not scored."""
        at = torch.arange(begin, begin + nll.shape[1])
        bucket = torch.where(
            at < FIRST_BUCKET, 0, (at.double() / FIRST_BUCKET).clamp(min=1).log2().floor() + 1
        ).long()
        scored = ~nll.isnan()
        self.loss.index_add_(0, bucket, torch.where(scored, nll, 0).double().sum(0))
        self.count.index_add_(0, bucket, scored.sum(0))

    def buckets(self) -> tuple[PositionLoss, ...]:
        edges = [0, *(FIRST_BUCKET << i for i in range(len(self.count)))]
        return tuple(
            PositionLoss(begin=begin, end=end, tokens=tokens, loss=loss / tokens)
            for (begin, end), tokens, loss in zip(
                itertools.pairwise(edges), self.count.tolist(), self.loss.tolist(), strict=True
            )
            if tokens
        )


def perplexity(
    model: TitansLM,
    config: PerplexityConfig,
    tokenizer: Tokenizer | None = None,
    watch: Callable[[DocumentLoss], None] | None = None,
) -> PerplexityResult:
    """Read the documents of `config.paths` with the model; the tokenizer defaults to bytes.
    `watch` sees every document as it is done.

    Raises ValueError, in one line, for files that cannot be read, a tokenizer that is not
    the model's, and where no document has two tokens.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    positions, scored = Positions(), []
    begin, before = 0, None
    documents = tokenized(config, tokenizer)
    while group := list(itertools.islice(documents, config.rows)):
        if before is not None:  # carried over: the end of the document before comes first
            end = np.array([tokenizer.end_of_document])
            group = [d._replace(tokens=np.append(end, d.tokens)) for d in group]
        counts, losses, last = read_group(model, group, config, positions, begin, before)
        for document, tokens, loss in zip(group, counts, losses, strict=True):
            if tokens:
                size = byte_count(tokenizer, document.tokens[-tokens:])
                scored.append(
                    DocumentLoss(
                        name=document.name,
                        tokens=tokens,
                        bytes=size,
                        words=document.words,
                        loss=loss,
                    )
                )
                if watch is not None:
                    watch(scored[-1])
        if config.carry:
            begin, before = begin + len(group[0].tokens), last
    if not scored:
        raise ValueError("expected a document of two tokens or more, got none")
    return summary(scored, positions, config)


def tokenized(config: PerplexityConfig, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """The documents of `config.paths`, cut to `max_tokens`; those without a token are left out."""
    for document in read_documents(
        expand_paths(config.paths), config.text_key, config.strip_gutenberg, config.encoding
    ):
        text, ids = document.text, encode(tokenizer, document.text).astype(np.int64)
        if config.max_tokens and len(ids) > config.max_tokens:
            ids = ids[: config.max_tokens]
            text = tokenizer.decode(ids)
        if len(ids):
            yield Tokens(document.name, ids, len(text.split()))


def byte_count(tokenizer: Tokenizer, ids: Int64[np.ndarray, " time"]) -> int:
    """Bytes of the text that the tokens spell (a character cut off at an end counts as three)."""
    if isinstance(tokenizer, ByteTokenizer):
        return len(ids)
    return len(tokenizer.decode(ids).encode())


class Part(NamedTuple):
    """Consecutive tokens of some documents: nll (rows, time) in nats, of tokens begin, begin + 1,
    ... of the documents numbered `rows`; NaN for a stream's first."""

    begin: int
    rows: list[int]
    nll: Tensor
    logits: Tensor
    state: ModelState


def read_group(
    model: TitansLM,
    group: Sequence[Tokens],
    config: PerplexityConfig,
    positions: Positions,
    begin: int,
    before: Part | None,
) -> tuple[list[int], list[float], Part]:
    """Read documents side by side, after `begin` tokens that ended in `before`: how many tokens
    of each are scored, their losses in nats, and the last part. `positions` gets them all."""
    losses = torch.zeros(len(group), dtype=torch.float64)
    counts = torch.zeros(len(group), dtype=torch.int64)
    for part in read_together(
        model,
        [document.tokens for document in group],
        piece=config.piece,
        write=config.write,
        state=None if before is None else before.state,
        logits=None if before is None else before.logits,
    ):
        nll = part.nll
        if part.begin == 0:
            nll[:, 0] = float("nan")
        positions.add(begin + part.begin, nll)
        losses[part.rows] += nll.double().nansum(1)
        counts[part.rows] += (~nll.isnan()).sum(1)
    return counts.tolist(), losses.tolist(), part


def read_together(
    model: TitansLM,
    documents: Sequence[np.ndarray],
    *,
    piece: int,
    write: bool = True,
    state: ModelState | None = None,
    logits: Float[Tensor, "b v"] | None = None,
) -> Iterator[Part]:
    """Read documents (arrays of int64) side by side; one that has ended leaves the batch, and
    what the others' memories hold does not depend on it. state, logits: of what was read before.

    Raises NonFiniteError for a loss that is not finite.
    """
    device = next(model.parameters()).device
    active = list(range(len(documents)))
    begin = 0
    while active:
        end = min(begin + piece, min(len(documents[i]) for i in active))
        tokens = torch.from_numpy(np.stack([documents[i][begin:end] for i in active]))
        reading = read_piece(model, tokens.to(device), state, logits, write)
        if not torch.isfinite(reading.nll[:, int(logits is None) :]).all():
            raise NonFiniteError(f"the loss of tokens {begin} to {end - 1} is not finite")
        state, logits = reading.state, reading.logits
        yield Part(begin, active, reading.nll.cpu(), logits, state)
        begin = end
        kept = [n for n, i in enumerate(active) if len(documents[i]) > begin]
        if kept and len(kept) < len(active):
            state, logits = select_rows(state, kept, len(logits)), logits[kept]
        active = [active[n] for n in kept]


def summary(
    documents: Iterable[DocumentLoss], positions: Positions, config: PerplexityConfig
) -> PerplexityResult:
    documents = tuple(documents)
    loss = math.fsum(d.loss for d in documents)
    tokens, size = sum(d.tokens for d in documents), sum(d.bytes for d in documents)
    words = sum(d.words for d in documents)
    return PerplexityResult(
        tokens=tokens,
        bytes=size,
        words=words,
        loss=loss / tokens,
        bits_per_byte=loss / math.log(2) / size,
        perplexity=exponential(loss / tokens),
        word_perplexity=exponential(loss / words) if words else None,
        positions=positions.buckets(),
        documents=documents,
        write=config.write,
        carry=config.carry,
    )


def exponential(value: float) -> float | None:
    try:
        return math.exp(value)
    except OverflowError:
        return None


def plot(result: PerplexityResult, path: str | Path) -> None:
    """Bits per token by position."""
    plot_positions({"written" if result.write else "only read": result.positions}, path)


def plot_positions(results: Mapping[str, Sequence[PositionLoss]], path: str | Path) -> None:
    """Bits per token by position, one line a name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, positions in results.items():
        middle = [math.sqrt(max(p.begin, 64) * p.end) for p in positions]
        axis.plot(middle, [p.loss / math.log(2) for p in positions], marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens read before")
    axis.set_ylabel("bits per token")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
