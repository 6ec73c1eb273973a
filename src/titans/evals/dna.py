"""Can the model tell what a piece of DNA is? Classification, beside a small CNN.

Every model is trained on the task's training sequences, stopped early by its Matthews
correlation on dev, and tested once on test with the weights that were best on dev.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.config import MemoryConfig, TitansConfig, check_fields, require_positive
from titans.data.dna import BASES, DNATask, Labelled, read_task, reverse_complement, select
from titans.data.documents import expand_paths
from titans.evals.report import Diverged, or_diverged
from titans.models.classifier import ConvolutionalClassifier, Pooling, SequenceClassifier
from titans.train.config import OptimizerConfig
from titans.train.loop import choose_device
from titans.train.objective import descend
from titans.train.optim import schedule, split_parameters

CNN = "cnn"


@dataclass(frozen=True, kw_only=True)
class DNAConfig:
    """A task, the models that are compared on it, and how all of them are trained."""

    folder: str
    """A task of GUE or of GenomicBenchmarks; `titans.data.dna` says how they are laid out."""
    models: tuple[str, ...] = ("lmm", "mac", "mag", "mal", CNN)
    """Variants of `TitansConfig`, and `cnn`."""
    seeds: tuple[int, ...] = (0,)
    """Of the initial weights, the order of the data and dropout; one training each."""
    dim: int = 64
    layers: int = 2
    heads: int = 2
    window: int = 64
    """Of attention, where a variant has one; the segment of MAC."""
    conv_width: int = 8
    """In front of the memory's keys, values and queries."""
    gate_activation: Literal["silu", "sigmoid"] = "silu"
    """Non-linearity in the product of MAC's and MAG's branches, see `TitansConfig`."""
    gate_branch: Literal["memory", "attention"] = "memory"
    """The branch that passes it."""
    combine_output: bool = True
    """A map after the product."""
    pooling: Pooling = "mean"
    """Of hidden states over the sequence, or the last one."""
    channels: int = 96
    """Filters of each of the CNN's two layers."""
    reverse_complement: bool = True
    """Train on either strand at random, and judge by the mean over both."""
    epochs: int = 12
    """At most."""
    patience: int = 4
    """Stop after so many epochs without a better dev; not before dev is better than a guess, since
    some models begin late."""
    batch_size: int = 64
    learning_rate: float = 4e-3
    """Its highest; a linear warm-up over a tenth of the steps, then a cosine over all epochs."""
    weight_decay: float = 0.1
    dropout: float = 0.1
    """Before the last linear map."""
    limit: int = 0
    """Only so many sequences of each part, drawn at random; 0 takes all."""
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "epochs", "patience", "batch_size", "channels")
        if not self.models or not self.seeds:
            raise ValueError("models and seeds must name at least one each")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must not be negative, got {list(self.seeds)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.learning_rate <= 0 or self.limit < 0:
            raise ValueError("learning_rate must be above 0 and limit not negative")
        for name in self.models:
            if name != CNN:
                self.backbone(name)  # raises for an unknown variant

    def backbone(self, variant: str) -> TitansConfig:
        return TitansConfig(
            variant=variant,  # type: ignore[arg-type]
            vocab_size=len(BASES),
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            ffn_hidden=2 * self.dim,
            window=self.window,
            segment=self.window,
            gate_activation=self.gate_activation,
            gate_branch=self.gate_branch,
            combine_output=self.combine_output,
            memory=MemoryConfig(heads=self.heads, conv_width=self.conv_width),
        )


@dataclass(frozen=True, kw_only=True)
class ClassifierScore:
    """One training. mcc: Matthews correlation; accuracy: share of the sequences; dev_curve: MCC
    on dev after every epoch; seconds: of training and testing."""

    task: str
    model: str
    seed: int
    parameters: int
    test_mcc: float
    test_accuracy: float
    dev_mcc: float
    dev_accuracy: float
    best_epoch: int
    dev_curve: tuple[float, ...]
    train_sequences: int
    test_sequences: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class DNAResult:
    """scores: of every model and seed. split: which sequences dev was. majority: accuracy on
    test of always saying its commonest class."""

    task: str
    split: str
    majority: float
    scores: tuple[ClassifierScore, ...]
    diverged: tuple[Diverged, ...]


def dna(
    config: DNAConfig, watch: Callable[[ClassifierScore | Diverged], None] | None = None
) -> DNAResult:
    """Train and test every model of `config.models` with every seed; `watch` sees every score as it
    is there.

    Raises ValueError, in one line, for a folder or a sequence that cannot be read.
    """
    task = load_task(config)
    scores, failed = [], []
    for seed in config.seeds:
        for model in config.models:
            run = partial(train_and_test, config, task, model, seed)
            one = or_diverged(run, model, seed)
            if isinstance(one, Diverged):
                failed.append(one)
            else:
                scores.append(one)
            if watch is not None:
                watch(one)
    return DNAResult(
        task=task.name,
        split=task.split,
        majority=np.bincount(task.test.labels).max().item() / len(task.test.labels),
        scores=tuple(scores),
        diverged=tuple(failed),
    )


def load_task(config: DNAConfig) -> DNATask:
    (folder,) = expand_paths((config.folder,))
    task = read_task(folder)
    if config.limit:
        task = limited(task, config.limit)
    if len(np.unique(task.dev.labels)) < 2:
        raise ValueError(
            f"{folder}: the {len(task.dev.labels)} dev sequences are of one class, which tells no "
            "epoch from another"
        )
    return task


def limited(task: DNATask, limit: int) -> DNATask:
    """With so many sequences of each part, drawn at random."""

    def some(part: Labelled) -> Labelled:
        order = np.random.default_rng(0).permutation(len(part.labels))
        return select(part, order[:limit])

    return dataclasses.replace(
        task,
        train=some(task.train),
        dev=some(task.dev),
        test=some(task.test),
        split=f"{task.split}; {limit} of each",
    )


def train_and_test(config: DNAConfig, task: DNATask, name: str, seed: int) -> ClassifierScore:
    """One model with one seed; the random state of PyTorch is as before afterwards."""
    began = time.perf_counter()
    device = choose_device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = build_classifier(config, name, len(task.classes)).to(device)
        curve = train_classifier(model, task, config, seed)
    dev, test = (judge(model, part, config) for part in (task.dev, task.test))
    return ClassifierScore(
        task=task.name,
        model=name,
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        test_mcc=test.mcc,
        test_accuracy=test.accuracy,
        dev_mcc=dev.mcc,
        dev_accuracy=dev.accuracy,
        best_epoch=1 + int(np.argmax(curve)),
        dev_curve=tuple(curve),
        train_sequences=len(task.train.labels),
        test_sequences=len(task.test.labels),
        seconds=time.perf_counter() - began,
    )


def build_classifier(config: DNAConfig, name: str, classes: int) -> nn.Module:
    if name == CNN:
        return ConvolutionalClassifier(len(BASES), classes, config.channels, dropout=config.dropout)
    return SequenceClassifier(config.backbone(name), classes, config.pooling, config.dropout)


def train_classifier(model: nn.Module, task: DNATask, config: DNAConfig, seed: int) -> list[float]:
    """Train until dev has not improved for `patience` epochs, and leave the weights of the best
    one in the model; MCC on dev after every epoch. NonFiniteError where it diverges."""
    optimizer = build_optimizer(model, config)
    steps = config.epochs * math.ceil(len(task.train.labels) / config.batch_size)
    rates = OptimizerConfig(warmup=max(steps // 10, 1), min_ratio=0.05)
    curve: list[float] = []
    best: dict[str, Tensor] = {}
    step = 0
    for epoch in range(config.epochs):
        model.train()
        for batch in batches(task.train, config, np.random.default_rng((seed, epoch)), model):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * schedule(step, steps, rates)
            loss = F.cross_entropy(model(batch.tokens, batch.lengths), batch.labels)
            step += 1
            descend(model, optimizer, loss, step)
        curve.append(judge(model, task.dev, config).mcc)
        if curve[-1] == max(curve) and curve.count(curve[-1]) == 1:
            best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        since_best = len(curve) - 1 - int(np.argmax(curve))
        begun = max(curve) > 2 * len(task.dev.labels) ** -0.5  # two standard deviations of a guess
        if begun and since_best >= config.patience:
            break
    model.load_state_dict(best)
    return curve


def build_optimizer(model: nn.Module, config: DNAConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on the matrices of the blocks, and on the CNN's filters."""
    if isinstance(model, SequenceClassifier):
        matrices, _ = split_parameters(model.backbone)
    else:
        matrices = [p for p in model.parameters() if p.ndim == 3]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen and p.requires_grad]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.95))


class SequenceBatch(NamedTuple):
    """tokens (B, T), padded after `lengths`; labels (B,)."""

    tokens: Tensor
    lengths: Tensor
    labels: Tensor


def batches(
    data: Labelled, config: DNAConfig, random: np.random.Generator, model: nn.Module
) -> Iterator[SequenceBatch]:
    """All sequences once in random order, each on a random strand if both are wanted."""
    device = next(model.parameters()).device
    order = random.permutation(len(data.labels))
    turned = random.random(len(order)) < (0.5 if config.reverse_complement else 0.0)
    for start in range(0, len(order), config.batch_size):
        rows = order[start : start + config.batch_size]
        sequences = [
            reverse_complement(data.sequences[i]) if turned[i] else data.sequences[i] for i in rows
        ]
        tokens, lengths = pad(sequences, device)
        yield SequenceBatch(tokens, lengths, torch.from_numpy(data.labels[rows]).to(device))


def pad(sequences: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    rows = [torch.from_numpy(s.astype(np.int64)) for s in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths


class Judgement(NamedTuple):
    mcc: float
    accuracy: float


def judge(model: nn.Module, data: Labelled, config: DNAConfig) -> Judgement:
    guesses = predict(model, data.sequences, config)
    return Judgement(matthews(data.labels, guesses), float((guesses == data.labels).mean()))


@torch.inference_mode()
def predict(model: nn.Module, sequences: list[np.ndarray], config: DNAConfig) -> np.ndarray:
    """The likeliest class of every sequence; of the mean log probability over both strands if
    the model was trained on both."""
    model.eval()
    device = next(model.parameters()).device
    guesses = []
    for start in range(0, len(sequences), 4 * config.batch_size):
        rows = sequences[start : start + 4 * config.batch_size]
        scores = model(*pad(rows, device)).log_softmax(-1)
        if config.reverse_complement:
            turned = [reverse_complement(row) for row in rows]
            scores = scores + model(*pad(turned, device)).log_softmax(-1)
        guesses.append(scores.argmax(-1).cpu().numpy())
    return np.concatenate(guesses)


def matthews(labels: np.ndarray, guesses: np.ndarray) -> float:
    """Matthews' correlation coefficient, for any number of classes (Gorodkin 2004); 0 where all
    labels or all guesses are one class."""
    classes = 1 + int(max(labels.max(), guesses.max()))
    true = np.bincount(labels, minlength=classes).astype(float)
    guessed = np.bincount(guesses, minlength=classes).astype(float)
    count, right = float(len(labels)), float((labels == guesses).sum())
    spread = (count**2 - (guessed**2).sum()) * (count**2 - (true**2).sum())
    return 0.0 if spread == 0 else float((right * count - true @ guessed) / math.sqrt(spread))
