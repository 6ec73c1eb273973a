"""What is each part of the memory worth? The paper's ablation, and some of our own choices.

A small byte-level LMM (the paper's: two-layer memory, momentum, forgetting, convolution, persistent
tokens; our gates), and the same with one thing changed, are trained on the same text alike and
tested on held-out text, read in one stream. A trained memory can also be read at other chunk sizes.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from titans.baselines import BASELINES
from titans.config import MemoryConfig, TitansConfig, unknown
from titans.data.tokenizers import ByteTokenizer
from titans.evals.perplexity import PerplexityConfig, perplexity, tokenized
from titans.evals.report import Diverged, or_diverged
from titans.models.lm import TitansLM, load
from titans.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from titans.train.loop import train
from titans.train.metrics import read_metrics, training_seconds

BASE = TitansConfig(
    variant="lmm",
    dim=64,
    layers=2,
    heads=2,
    ffn_hidden=160,
    window=64,
    segment=64,
    persistent=4,
    memory=MemoryConfig(heads=2, depth=2, residual=True, norm=True, momentum=True, chunk_size=16),
)


class Part(NamedTuple):
    """A model with one thing changed; paper: its perplexity in the paper, where it has one."""

    text: str
    config: TitansConfig
    paper: float | None = None


def memory(**changes: Any) -> TitansConfig:
    return dataclasses.replace(BASE, memory=dataclasses.replace(BASE.memory, **changes))


def model(**changes: Any) -> TitansConfig:
    return dataclasses.replace(BASE, **changes)


DELTA = BASELINES["gated-deltanet"]
LINEAR = {"depth": 1, "residual": False, "norm": False}
BY_ATTENTION: dict[str, Any] = {"gate_branch": "attention", "gate_activation": "sigmoid"}
PARTS = {
    "lmm": Part("LMM", BASE, 27.01),
    "linear": Part("linear memory", memory(**LINEAR), 28.49),
    "no-convolution": Part("no convolution", memory(conv_width=0), 28.73),
    "no-momentum": Part("no momentum", memory(momentum=False), 28.98),
    "no-decay": Part("no weight decay", memory(decay="none"), 29.04),
    "no-persistent": Part("no persistent memory", model(persistent=0), 27.63),
    "mac": Part("plus attention: MAC", model(variant="mac"), 26.67),
    "mag": Part("plus attention: MAG", model(variant="mag"), 25.70),
    "mal": Part("plus attention: MAL", model(variant="mal"), 25.91),
    "depth-1": Part("depth 1 (residual, norm)", memory(depth=1)),
    "depth-3": Part("depth 3", memory(depth=3)),
    "depth-4": Part("depth 4", memory(depth=4)),
    "unbounded": Part("no bound on a gradient, learning rate up to 0.1", memory(max_surprise=0.0)),
    "linear-exact": Part("linear memory, gradient of every token", memory(**LINEAR, chunk_size=1)),
    "sigmoid": Part("sigmoid gates", memory(gates="sigmoid", tie_forgetting=False)),
    "mac-sigmoid": Part(
        "MAC, sigmoid gates",
        dataclasses.replace(memory(gates="sigmoid", tie_forgetting=False), variant="mac"),
    ),
    "mag-sigmoid": Part(
        "MAG, sigmoid gates",
        dataclasses.replace(memory(gates="sigmoid", tie_forgetting=False), variant="mag"),
    ),
    "mal-sigmoid": Part(
        "MAL, sigmoid gates",
        dataclasses.replace(memory(gates="sigmoid", tie_forgetting=False), variant="mal"),
    ),
    "mac-by-attention": Part(
        "MAC, sigmoid(attention) times memory", model(variant="mac", **BY_ATTENTION)
    ),
    "mag-by-attention": Part(
        "MAG, sigmoid(attention) times memory", model(variant="mag", **BY_ATTENTION)
    ),
    "mac-unmapped": Part(
        "MAC, no map after the product", model(variant="mac", combine_output=False)
    ),
    "mag-unmapped": Part(
        "MAG, no map after the product", model(variant="mag", combine_output=False)
    ),
    "mac-by-attention-unmapped": Part(
        "MAC, sigmoid(attention) times memory, no map after it",
        model(variant="mac", combine_output=False, **BY_ATTENTION),
    ),
    "mag-by-attention-unmapped": Part(
        "MAG, sigmoid(attention) times memory, no map after it",
        model(variant="mag", combine_output=False, **BY_ATTENTION),
    ),
    "gated-deltanet": Part(
        "Gated DeltaNet (its gates: sigmoid, exponential)",
        model(variant="gated-deltanet", memory=MemoryConfig(heads=2)),
    ),
    "gated-deltanet-closing": Part(
        "Gated DeltaNet's rule, gates that close",
        model(
            persistent=0,
            memory=MemoryConfig(heads=2, **{**DELTA.starts, **DELTA.memory, "gates": "closing"}),
        ),
    ),
    "key-init": Part("keys start as the queries of the token before", memory(key_init="previous")),
    "gates-per-layer": Part("gates per layer", memory(per_layer_gates=True)),
    "to-zero": Part("forgetting towards zero", memory(decay_target="zero")),
    "chunk-1": Part("chunk 1", memory(chunk_size=1)),
    "chunk-4": Part("chunk 4", memory(chunk_size=4)),
    "chunk-64": Part("chunk 64", memory(chunk_size=64)),
}


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What is trained and on what. Paths are text files or folders, also compressed."""

    paths: tuple[str, ...]
    """Training text."""
    test_paths: tuple[str, ...]
    """Held-out text that the models are tested on."""
    parts: tuple[str, ...] = tuple(PARTS)
    """What to change, see `titans.evals.ablation.PARTS`; `lmm` changes nothing."""
    seeds: tuple[int, ...] = (0,)
    chunks: tuple[int, ...] = ()
    """Read the trained models at these chunk sizes too, but for Gated DeltaNet's rule, which has
    none."""
    steps: int = 250
    """Of training, of `tokens_per_batch` bytes."""
    tokens_per_batch: int = 4096
    learning_rate: float = 4e-3
    precision: Literal["float32", "bf16", "auto"] = "float32"
    """Of training, see `titans.train.config.TrainConfig`."""
    threads: int = 1
    """Of training."""
    test_tokens: int = 2**18
    """Bytes of each test file that are read; 0 reads all."""

    def __post_init__(self) -> None:
        if not self.parts or not self.seeds:
            raise ValueError("parts or seeds is empty: expected at least one of each")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must not be negative, got {list(self.seeds)}")
        for name in self.parts:
            if name not in PARTS:
                raise ValueError(unknown("part", name, tuple(PARTS)))
        if self.chunks and min(self.chunks) < 1:
            raise ValueError(f"chunks must be at least 1, got {list(self.chunks)}")
        reading(self)  # raises for settings that it refuses


@dataclass(frozen=True, kw_only=True)
class PartScore:
    """One trained model. bits_per_byte: of the test text, in one stream a file."""

    part: str
    seed: int
    parameters: int
    bits_per_byte: float
    train_seconds: float


@dataclass(frozen=True, kw_only=True)
class ChunkScore:
    """A trained model read at another chunk size: the chunk is part of the function."""

    part: str
    seed: int
    chunk_size: int
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class AblationResult:
    config: AblationConfig
    parts: tuple[PartScore, ...]
    chunks: tuple[ChunkScore, ...]
    diverged: tuple[Diverged, ...]


def ablation(
    config: AblationConfig,
    watch: Callable[[PartScore | ChunkScore | Diverged], None] | None = None,
) -> AblationResult:
    """Train every part with every seed, and test it; `watch` sees every score as it is there."""
    # Before any training: is there something to test on?
    sizes = [len(document.tokens) for document in tokenized(reading(config), ByteTokenizer())]
    if max(sizes, default=0) < 2:
        raise ValueError("test_paths: expected a text of two bytes or more, got none")
    parts, chunks, failed = [], [], []
    for seed in config.seeds:
        for part in config.parts:
            with tempfile.TemporaryDirectory() as folder:
                run = partial(train_part, config, part, seed, Path(folder) / "run")
                one = or_diverged(run, part, seed)
            if isinstance(one, Diverged):
                failed.append(one)
                if watch is not None:
                    watch(one)
                continue
            trained, score = one
            parts.append(score)
            if watch is not None:
                watch(score)
            for size in () if trained.config.memory.decay_first else config.chunks:
                at_size = partial(bits_per_byte, config, at_chunk(trained, size))
                bits = or_diverged(at_size, f"{part}, chunks of {size}", seed)
                if isinstance(bits, Diverged):
                    failed.append(bits)
                else:
                    chunks.append(
                        ChunkScore(part=part, seed=seed, chunk_size=size, bits_per_byte=bits)
                    )
                if watch is not None:
                    watch(bits if isinstance(bits, Diverged) else chunks[-1])
    return AblationResult(
        config=config, parts=tuple(parts), chunks=tuple(chunks), diverged=tuple(failed)
    )


def train_part(
    config: AblationConfig, part: str, seed: int, folder: Path
) -> tuple[TitansLM, PartScore]:
    """Train one model in `folder`, or go on where it stopped, and test it."""
    run = RunConfig(
        model=PARTS[part].config,
        data=DataConfig(paths=config.paths, length=512, segments=2),
        train=TrainConfig(
            steps=config.steps,
            tokens_per_batch=config.tokens_per_batch,
            seed=seed,
            write_cost=0.0,
            eval_every=0,
            checkpoint_every=50,
            keep_checkpoints=1,
            precision=config.precision,
            threads=config.threads,
        ),
        optimizer=OptimizerConfig(
            learning_rate=config.learning_rate, warmup=max(1, config.steps // 10)
        ),
    )
    result = train(run, folder, progress=False)
    if not result.finished:
        raise KeyboardInterrupt
    trained = load(result.checkpoint / "model.safetensors")
    rows = read_metrics(folder / "metrics.jsonl")
    score = PartScore(
        part=part,
        seed=seed,
        parameters=trained.parameter_count,
        bits_per_byte=bits_per_byte(config, trained),
        train_seconds=training_seconds(rows, config.tokens_per_batch),
    )
    return trained, score


def bits_per_byte(config: AblationConfig, trained: TitansLM) -> float:
    """Of the test text."""
    return perplexity(trained, reading(config)).bits_per_byte


def reading(config: AblationConfig) -> PerplexityConfig:
    """How the test text is read."""
    return PerplexityConfig(paths=config.test_paths, max_tokens=config.test_tokens)


def at_chunk(trained: TitansLM, size: int) -> TitansLM:
    """The same weights, writing in chunks of so many tokens."""
    changed = dataclasses.replace(trained.config.memory, chunk_size=size)
    other = TitansLM(dataclasses.replace(trained.config, memory=changed))
    other.load_state_dict(trained.state_dict())
    return other.eval()
