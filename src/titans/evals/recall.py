"""How many pairs can a state hold? Multi-query associative recall against pairs and state size.

A model reads pairs (key, value) among some noise and is then asked for the value of every key.
It is trained and tested on this alone, from scratch, at several sizes of its state: what it
cannot recall it had no room for (or did not learn to bind). Arora et al., Zoology.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from titans.baselines import BASELINES, has_convolution
from titans.config import MemoryConfig, TitansConfig, Variant, check_fields
from titans.data.pairs import IGNORED, PairBatch, PairTask, guess
from titans.models.lm import TitansLM
from titans.train.batches import EVALUATION_SEED
from titans.train.objective import descend

BEGIN_PAIRS = 4


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """One model and one state size, asked for several numbers of pairs."""

    model: Variant = "lmm"
    """Titans or baseline; two layers without a feed-forward, as in Zoology one with little else."""
    head_dim: int = 32
    """Key and value size of its memory's one head (attention has two heads of half the width)."""
    depth: int = 1
    """Of the memory network of the four Titans; 2 has a residual and a norm, and chunks of 16."""
    momentum: bool = False
    """Of the four Titans."""
    key_init: Literal["independent", "previous"] = "previous"
    """How keys start, in all models with a convolution; see `MemoryConfig`. With independent ones
    most of a training goes by before anything is bound."""
    shared: float = 0.0
    """Length of a random vector that all embeddings share at the start, in lengths of an embedding.
    Rotary attention without biases can find the token before by position alone where queries and
    keys of all tokens have a part in common."""
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """Asked for after training."""
    most_trained: int = 64
    """Training draws powers of two of pairs up to so many."""
    keys: int = 256
    """Different keys, and as many values."""
    dim: int = 64
    layers: int = 2
    steps: int = 300
    """Of training."""
    begin: int = 0
    """So many more before them, on rows of `BEGIN_PAIRS` pairs alone."""
    tokens: int = 4096
    """Of a training step."""
    learning_rate: float = 3e-3
    write_cost: float = 0.0
    """Weight of the memories' mean learning rate in the loss."""
    rows: int = 64
    """Rows of a test; each asks for all its pairs."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.shared < 0 or self.begin < 0:
            raise ValueError(
                f"shared and begin must not be negative, got {self.shared} and {self.begin}"
            )
        if not self.pairs or min(self.pairs) < 1 or max(self.pairs) > self.keys:
            raise ValueError(f"pairs must lie in 1..{self.keys}, got {list(self.pairs)}")
        if not 1 <= self.most_trained <= self.keys:
            raise ValueError(f"most_trained must lie in 1..{self.keys}, got {self.most_trained}")
        if self.most_trained.bit_count() != 1:
            raise ValueError(f"most_trained must be a power of two, got {self.most_trained}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if min(self.rows, self.head_dim, self.layers) < 1 or self.learning_rate <= 0:
            raise ValueError(
                "expected rows, head_dim and layers of at least 1, and learning_rate > 0"
            )
        if self.steps < 1 or self.tokens < row_length(self.most_trained):
            raise ValueError(
                f"expected steps >= 1 and tokens >= {row_length(self.most_trained)}, "
                f"got {self.steps} and {self.tokens}"
            )


@dataclass(frozen=True, kw_only=True)
class PairsCell:
    """accuracy: of the answers; guess: of who says any of a row's values (`data.pairs.guess`)."""

    pairs: int
    asked: int
    accuracy: float
    guess: float


@dataclass(frozen=True, kw_only=True)
class RecallResult:
    """state: numbers (not bytes) that the model carries after a row of the most pairs."""

    model: Variant
    head_dim: int
    state: int
    parameters: int
    seconds: float
    cells: tuple[PairsCell, ...]


def recall(config: RecallConfig) -> RecallResult:
    """Train a model on the task, then ask it."""
    begin = time.perf_counter()
    model = train(config)
    cells = tuple(ask(model, config, pairs) for pairs in config.pairs)
    longest = PairTask(
        rows=1,
        length=row_length(max(config.pairs)),
        pairs=max(config.pairs),
        seed=0,
        keys=config.keys,
    )
    with torch.no_grad():
        _, state = model(longest.batch(0).tokens)
    return RecallResult(
        model=config.model,
        head_dim=config.head_dim,
        state=sum(t.numel() for t in state.tensors().values()),
        parameters=model.parameter_count,
        seconds=time.perf_counter() - begin,
        cells=cells,
    )


def row_length(pairs: int) -> int:
    """Statements, questions, and half as many tokens of noise as of statements."""
    return 5 * pairs + 2


def build_model(config: RecallConfig) -> TitansLM:
    """Layers of the mixer alone."""
    memory = MemoryConfig(heads=1, head_dim=config.head_dim)
    if has_convolution(config.model):
        memory = replace(memory, key_init=config.key_init)
    if config.model not in BASELINES:
        deep = config.depth > 1
        memory = replace(
            memory,
            depth=config.depth,
            momentum=config.momentum,
            residual=deep,
            norm=deep,
            chunk_size=16 if deep else 1,
        )
    vocabulary = PairTask(rows=1, length=6, pairs=1, seed=0, keys=config.keys).vocabulary
    settings = TitansConfig(
        variant=config.model,
        vocab_size=vocabulary,
        dim=config.dim,
        layers=config.layers,
        heads=2,
        ffn_hidden=0,
        window=32,
        segment=32,
        persistent=0,
        memory=memory,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = TitansLM(settings)
        if config.shared:
            weight = model.embedding.weight.detach()
            weight += config.shared * weight.std() * torch.randn(config.dim)
        return model


def train(config: RecallConfig) -> TitansLM:
    """The model after its training: at each step rows of 1, 2, 4, ... or `most_trained` pairs, of
    `BEGIN_PAIRS` in the first ones."""
    model = build_model(config)

    def batch(step: int) -> PairBatch:
        most = int(math.log2(config.most_trained))
        pairs = 2 ** int(np.random.default_rng((config.seed, step)).integers(most + 1))
        if step < config.begin:
            pairs = BEGIN_PAIRS
        length = row_length(pairs)
        return PairTask(
            rows=config.tokens // length,
            length=length,
            pairs=pairs,
            seed=config.seed,
            keys=config.keys,
        ).batch(step)

    fit_pairs(model, batch, config.begin + config.steps, config.learning_rate, config.write_cost)
    return model


def fit_pairs(
    model: TitansLM,
    batch: Callable[[int], PairBatch],
    steps: int,
    learning_rate: float,
    write_cost: float,
    watch: Callable[[int, float, float], None] | None = None,
) -> None:
    """AdamW on the answers alone, the rate warmed up over 100 steps and then along a cosine.

    write_cost: weight in the loss of the memories' mean learning rate. watch: gets the step, the
    share of right answers and that mean, every 50 steps. NonFiniteError where training diverges.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    for step in range(steps):
        warm, cosine = min(1.0, step / 100), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * warm * cosine
        tokens, labels = batch(step)
        logits, _, records = model.run(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        rates = [r.learning_rate.mean() for r in records if r is not None]
        opened = torch.stack(rates).mean() if rates else loss.new_zeros(())
        descend(model, optimizer, loss + write_cost * opened, step + 1)
        if watch is not None and step % 50 == 49:
            right = (logits.argmax(-1) == labels)[labels != IGNORED].float().mean()
            watch(step + 1, right.item(), opened.item())


@torch.no_grad()
def ask(model: TitansLM, config: RecallConfig, pairs: int) -> PairsCell:
    """Rows of so many pairs, each asked for all of them."""
    task = PairTask(
        rows=config.rows,
        length=row_length(pairs),
        pairs=pairs,
        seed=EVALUATION_SEED,
        keys=config.keys,
    )
    tokens, labels = task.batch(0)
    right = (model(tokens)[0].argmax(-1) == labels)[labels != IGNORED]
    return PairsCell(
        pairs=pairs,
        asked=len(right),
        accuracy=right.float().mean().item(),
        guess=guess(pairs, config.keys),
    )


def plot(result: RecallResult, path: Path) -> None:
    """Accuracy against pairs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    pairs = [cell.pairs for cell in result.cells]
    name = f"{result.model}, {result.state:,} numbers"
    axis.plot(pairs, [cell.accuracy for cell in result.cells], marker="o", label=name)
    guesses = [cell.guess for cell in result.cells]
    axis.plot(pairs, guesses, ":", color="#888", label="any of the row's values")
    axis.set_xscale("log", base=2)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("pairs in the row")
    axis.set_ylabel("pairs recalled")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
