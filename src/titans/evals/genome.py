"""How well is the next base of a genome predicted, and does more context help?

The last bases of a record are held out. They are cut into windows of N bases, each read from a
fresh memory, for every N asked for: the same bases are scored at every N (but for the first of
each window, which nothing precedes). Beside the model stand Markov chains, fitted on the bases
that it was trained on: they say what a number of bits means.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from titans.data.dna import BASES, UNKNOWN, Codes, read_fasta, reverse_complement
from titans.data.documents import expand_paths
from titans.data.tokenizers import tokenizer_of
from titans.evals.perplexity import PositionLoss, Positions, read_together
from titans.models.lm import TitansLM

CONTEXTS = (2**10, 2**12, 2**14, 2**16, 2**18, 2**20)
AT_ONCE = 65536
"""Tokens read in one forward pass, at most, where windows lie side by side."""


@dataclass(frozen=True, kw_only=True)
class GenomeConfig:
    """Which genome, what of it is held out, and at what contexts it is read."""

    path: str
    """A FASTA file, maybe compressed; its first record is the genome."""
    test: int = 2**20
    """Bases held out at the record's end."""
    valid: int = 2**17
    """Bases before those, which neither training nor this evaluation reads."""
    contexts: tuple[int, ...] = CONTEXTS
    """N, the bases read between two resets of the memory; those of the default that are longer
    than `test` are left out."""
    orders: tuple[int, ...] = tuple(range(13))
    """Of the Markov chains."""
    smoothing: float = 1.0
    """Added to every count of a Markov chain."""
    write: bool = True
    """False: memories are read and never written."""
    piece: int = 2048
    """Bases of a window read in one forward pass: speed only."""

    def __post_init__(self) -> None:
        if min(self.test, self.valid + 1, self.piece) < 1:
            raise ValueError("test and piece must be at least 1, valid not negative")
        if self.contexts == CONTEXTS:
            fitting = tuple(n for n in CONTEXTS if n <= self.test)
            object.__setattr__(self, "contexts", fitting or (self.test,))
        if not self.contexts or min(self.contexts) < 2 or max(self.contexts) > self.test:
            raise ValueError(
                f"contexts must lie in 2..{self.test} (test), got {list(self.contexts)}"
            )
        if any(not 0 <= order <= 24 for order in self.orders):
            raise ValueError(f"orders must lie in 0..24, got {list(self.orders)}")
        if not 0 < self.smoothing <= 1e9:
            raise ValueError(f"smoothing must lie above 0, up to 1e9, got {self.smoothing}")


@dataclass(frozen=True, kw_only=True)
class ContextBits:
    """Bits per base in windows of `context` bases, over `bases` scored ones."""

    context: int
    bases: int
    bits_per_base: float


@dataclass(frozen=True, kw_only=True)
class MarkovBits:
    """Bits per base of the chain that looks at `order` bases, fitted on both strands."""

    order: int
    bases: int
    bits_per_base: float


@dataclass(frozen=True, kw_only=True)
class GenomeResult:
    """contexts: bits at every context. positions: losses in nats by position, at the longest.
    split: which bases are which."""

    record: str
    split: str
    contexts: tuple[ContextBits, ...]
    positions: tuple[PositionLoss, ...]
    markov: tuple[MarkovBits, ...]
    write: bool


class GenomeSplit(NamedTuple):
    name: str
    train: Codes
    valid: Codes
    test: Codes

    @property
    def rule(self) -> str:
        a, b, c = (len(part) for part in self[1:])
        return (
            f"bases 0 to {a:,} train, the next {b:,} validate, the last {c:,} test "
            f"(of {a + b + c:,})"
        )


def split_genome(config: GenomeConfig) -> GenomeSplit:
    """The first record of the file, cut in three; ValueError if it is too short for that."""
    (path,) = expand_paths((config.path,))
    name, codes = next(read_fasta(path))
    stop = len(codes) - config.test - config.valid
    if stop < 1:
        raise ValueError(
            f"{config.path}: {len(codes)} bases are too few to hold out "
            f"{config.test} and {config.valid}"
        )
    return GenomeSplit(
        name, codes[:stop], codes[stop : stop + config.valid], codes[stop + config.valid :]
    )


def genome(
    model: TitansLM | None,
    config: GenomeConfig,
    watch: Callable[[ContextBits], None] | None = None,
) -> GenomeResult:
    """Bits per base of the held-out bases, for a byte-level model that reads them as the letters
    A C G T N; without a model, for the Markov chains alone. N is read and not scored. `watch` sees
    every context as it is done.

    Raises ValueError, in one line, for a file that is not FASTA or too short, and for a model
    whose vocabulary is not that of bytes.
    """
    parts = split_genome(config)
    if model is not None:
        try:
            tokenizer_of(model, None)
        except ValueError as error:
            raise ValueError(f"expected a model that reads bytes: {error}") from None
    markov = tuple(  # before the model reads: what is too short for them is told now
        markov_bits(parts.train, parts.test, order, config.smoothing) for order in config.orders
    )
    read: list[ContextBits] = []
    positions: tuple[PositionLoss, ...] = ()
    if model is not None:
        for context in sorted(config.contexts):
            row, positions = bits_at(model, parts.test, context, config)
            read.append(row)
            if watch is not None:
                watch(row)
    return GenomeResult(
        record=parts.name,
        split=parts.rule,
        contexts=tuple(read),
        positions=positions,
        markov=markov,
        write=config.write,
    )


def bits_at(
    model: TitansLM, codes: Codes, context: int, config: GenomeConfig
) -> tuple[ContextBits, tuple[PositionLoss, ...]]:
    """Read all windows of `context` bases, each from a fresh memory."""
    letters = np.frombuffer(BASES.encode(), dtype=np.uint8).astype(np.int64)
    windows = [codes[i : i + context] for i in range(0, len(codes), context)]
    piece = min(config.piece, context)
    rows = max(1, AT_ONCE // piece)
    positions, total, count = Positions(), 0.0, 0
    for start in range(0, len(windows), rows):
        group = windows[start : start + rows]
        tokens = [letters[window] for window in group]
        for part in read_together(model, tokens, piece=piece, write=config.write):
            span = slice(part.begin, part.begin + part.nll.shape[1])
            unknown = np.stack([group[i][span] == UNKNOWN for i in part.rows])
            nll = part.nll.masked_fill(torch.from_numpy(unknown).to(part.nll.device), float("nan"))
            positions.add(part.begin, nll)
            total += nll.double().nansum().item()
            count += int((~nll.isnan()).sum())
    if not count:
        raise ValueError(f"no base to score in the {len(codes)} held out")
    bits = ContextBits(context=context, bases=count, bits_per_base=total / count / math.log(2))
    return bits, positions.buckets()


def markov_bits(train: Codes, test: Codes, order: int, smoothing: float = 1.0) -> MarkovBits:
    """-log2 of (n(context, base) + smoothing) / (n(context) + 4 smoothing), mean over the bases
    of `test` with `order` known bases before them; n counts `train` and its other strand."""
    both = [grams(train, order + 1), grams(reverse_complement(train), order + 1)]
    seen, counts = np.unique(np.concatenate(both), return_counts=True)
    # Grams are sorted, so those that share a context lie together.
    contexts, first = np.unique(seen // 4, return_index=True)
    totals = np.add.reduceat(counts, first) if len(first) else counts
    asked = grams(test, order + 1)
    if not len(asked):
        raise ValueError(f"no base of the {len(test)} held out has {order} known ones before it")
    joint = look_up(seen, counts, asked)
    margin = look_up(contexts, totals, asked // 4)
    bits = np.log2(margin + 4 * smoothing) - np.log2(joint + smoothing)
    return MarkovBits(order=order, bases=len(asked), bits_per_base=float(bits.mean()))


def grams(codes: Codes, size: int) -> Int64[np.ndarray, " grams"]:
    """Every run of `size` known bases, as a number in base 4, the last base its last digit."""
    count = len(codes) - size + 1
    if count < 1:
        return np.zeros(0, dtype=np.int64)
    number, known = np.zeros(count, dtype=np.int64), np.ones(count, dtype=bool)
    for shift in range(size):
        base = codes[shift : shift + count]
        number = 4 * number + base
        known &= base != UNKNOWN
    return number[known]


def look_up(
    keys: Int64[np.ndarray, " n"], values: Int64[np.ndarray, " n"], asked: Int64[np.ndarray, " m"]
) -> Int64[np.ndarray, " m"]:
    """The value of each key asked for, 0 for one that is not there; keys are sorted."""
    if not len(keys):
        return np.zeros(len(asked), dtype=np.int64)
    at = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)


def plot_contexts(
    results: dict[str, Sequence[ContextBits]], markov: Sequence[MarkovBits], path: str | Path
) -> None:
    """Bits per base against context, one line a model, the best Markov chain a dashed one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axis = figure.subplots()
    for name, rows in results.items():
        axis.plot(
            [r.context for r in rows], [r.bits_per_base for r in rows], marker="o", label=name
        )
    if markov:
        best = min(markov, key=lambda m: m.bits_per_base)
        axis.axhline(
            best.bits_per_base, color="#888", linestyle="--", label=f"Markov, order {best.order}"
        )
    axis.set_xscale("log", base=2)
    axis.set_xlabel("bases read between two resets of the memory")
    axis.set_ylabel("bits per base")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # lines are level
    figure.savefig(path, dpi=110)
