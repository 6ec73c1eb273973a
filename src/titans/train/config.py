"""What a training run is: its model, its data, its schedule. One TOML file, one `RunConfig`."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from titans.config import TitansConfig, check_fields, compared, differences, require_positive
from titans.data.haystack import STRAY_MOST
from titans.data.needle import check_kind
from titans.models.heads import check_parts

THREADS_MOST = 1024


class Stage(NamedTuple):
    """A part of a curriculum: what is trained on from step `begin` on."""

    begin: int
    lengths: tuple[int, ...]
    facts: tuple[int, int]
    write_cost: float | None = None  # None: that of the whole run


@dataclass(frozen=True, kw_only=True)
class NeedleRows:
    """Task needle: RULER's needles, see `data.needle`. `facts_min` and `facts_max` are the
    questions of a dense row."""

    kinds: tuple[str, ...] = ("single-1",)
    """Names in `data.needle.KINDS`; every row is of one of them."""
    words: str = "$TITANS_DATA_DIR/needle"
    """Folder with nounlist.txt and adjectivelist.txt."""
    dense: float = 0.5
    """Share of rows with several questions in the text. The others are just like the tests'."""
    stray: float = 0.0
    """In prose, numbers of no needle per 1,000 tokens (pages, years, sums), for gates to leave
    alone."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.kinds:
            raise ValueError("data.needle.kinds is empty: expected at least one kind")
        for kind in self.kinds:
            check_kind(kind)
        require_share("data.needle.dense", self.dense)
        require_stray("data.needle.stray", self.stray)


@dataclass(frozen=True, kw_only=True)
class BabiRows:
    """Task babi: bAbI's facts in prose, see `data.babilong`."""

    tasks: tuple[int, ...] = (1,)
    """Numbers of bAbI tasks; every row is of one of them."""
    folder: str = "$TITANS_DATA_DIR/babi"
    """Folder of bAbI's files, qa1_..._train.txt and so on."""
    dense: float = 0.5
    """Share of rows with all questions of a story. The others are just like the tests'."""
    stray: float = 0.0
    """Pieces of facts about others (`She moved to the kitchen`) per 1,000 tokens of a row, for
    gates to leave alone. Not with tasks 11 and 13, in which `she` is someone of the story."""
    echo: float = 0.0
    """Sentences of the prose that say a word of the facts (`She looked into the garden`), likewise
    per 1,000 tokens of a row."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.tasks or min(self.tasks) < 1:
            raise ValueError(f"data.babi.tasks must be numbers from 1 on, got {list(self.tasks)}")
        require_share("data.babi.dense", self.dense)
        require_stray("data.babi.stray", self.stray)
        require_stray("data.babi.echo", self.echo)
        if self.stray and {11, 13} & set(self.tasks):
            raise ValueError("data.babi.stray: tasks 11 and 13 are about he, she and they")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read. A path may begin with an environment variable: `$TITANS_DATA_DIR/books`."""

    task: Literal["text", "facts", "needle", "babi"] = "text"
    """text: predict the next token. facts: recall facts hidden in text, see `data.facts`. needle,
    babi: RULER's and BABILong's questions, see the sections of that name."""
    paths: tuple[str, ...] = ()
    """Files, folders, or the one folder `titans data prepare` made (its `train` and `valid` are
    found). Empty: the Python standard library's sources, four modules in five. Tasks needle and
    babi: prose, from which the books held out for tests are left out; needle has noise alone where
    it is empty."""
    valid_paths: tuple[str, ...] = ()
    """Held-out text, likewise. Empty: the prepared folder's `valid`, or the fifth module; task
    facts with `paths` of its own then hides new facts in the training text; tasks needle and babi
    read the held-out books of `paths`, or all of it where there are none."""
    tokenizer: str | None = None
    """`bytes`, or the path of a tokenizer.json. None: that of the prepared folder, else bytes."""
    length: int = 512
    """Task text: tokens of one segment, which is what the graph of one step spans."""
    segments: int = 1
    """Task text: consecutive segments of a document, one a step. The memory is carried from one
    to the next, the gradient is not (truncated backpropagation through time)."""
    lengths: tuple[int, ...] = (64,)
    """All tasks but text: tokens per row; every step draws one of them."""
    facts_min: int = 1
    """Task facts: fewest facts in a row."""
    facts_max: int = 8
    """Task facts: most facts in a row; a short row holds what fits."""
    text_weight: float = 0.1
    """All tasks but text: weight of the surrounding text's mean loss; that of the answers is 1."""
    garble: float = 0.0
    """Tasks needle and babi: share of the training prose's tokens that others are put in place of,
    each that occurs in it as often as any: gates learn to leave words alone that it hardly has."""
    needle: NeedleRows = field(default_factory=NeedleRows)
    babi: BabiRows = field(default_factory=BabiRows)
    stages: tuple[int, ...] = ()
    """A curriculum, for all tasks but text: the steps before which the second, third ... stage
    begins. The first stage is `lengths`, `facts_min` and `facts_max`."""
    stage_lengths: tuple[tuple[int, ...], ...] = ()
    """`lengths` of each of those later stages."""
    stage_facts: tuple[tuple[int, ...], ...] = ()
    """[facts_min, facts_max] of each of those later stages; empty keeps the first's."""
    stage_write_costs: tuple[float, ...] = ()
    """`train.write_cost` of each of those later stages; empty keeps the first's. Gates that are
    made to close before anything was learned to be worth writing stay closed."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "length", "segments")
        if self.text_weight < 0:
            raise ValueError(f"data.text_weight must not be negative, got {self.text_weight}")
        require_share("data.garble", self.garble)
        if len(self.stage_lengths) != len(self.stages):
            raise ValueError(
                f"data.stage_lengths must have one list for each of the {len(self.stages)} stages, "
                f"got {len(self.stage_lengths)}"
            )
        if self.stage_facts and len(self.stage_facts) != len(self.stages):
            raise ValueError(
                f"data.stage_facts must be empty or have one pair for each of the "
                f"{len(self.stages)} stages, got {len(self.stage_facts)}"
            )
        if self.stage_write_costs and len(self.stage_write_costs) != len(self.stages):
            raise ValueError(
                f"data.stage_write_costs must be empty or have one number for each of the "
                f"{len(self.stages)} stages, got {len(self.stage_write_costs)}"
            )
        if any(cost < 0 for cost in self.stage_write_costs):
            raise ValueError("data.stage_write_costs must not be negative")
        if list(self.stages) != sorted({step for step in self.stages if step > 0}):
            raise ValueError(f"data.stages must be rising steps above 0, got {list(self.stages)}")
        if any(len(pair) != 2 for pair in self.stage_facts):
            raise ValueError("data.stage_facts must be pairs of [facts_min, facts_max]")
        for stage in self.curriculum():
            if not stage.lengths or min(stage.lengths) < 1:
                raise ValueError(f"data.lengths must be positive, got {list(stage.lengths)}")
            if not 0 < stage.facts[0] <= stage.facts[1]:
                raise ValueError(
                    f"data: expected 0 < facts_min <= facts_max, got {list(stage.facts)}"
                )
        if self.task == "text" and self.stages:
            raise ValueError("data.stages is for the tasks with answers; text has one length")
        if self.task != "text" and self.segments != 1:
            raise ValueError("data.segments is for the task text; other rows are read at once")
        if self.task == "facts" and self.tokenizer not in (None, "bytes"):
            raise ValueError(f"the task facts reads bytes, got data.tokenizer {self.tokenizer!r}")

    def curriculum(self) -> tuple[Stage, ...]:
        """The stages in order; one, beginning at step 0, where there is no curriculum."""
        first = (self.facts_min, self.facts_max)
        facts = [(pair[0], pair[1]) for pair in self.stage_facts] or [first] * len(self.stages)
        costs = self.stage_write_costs or (None,) * len(self.stages)
        later = zip(self.stages, self.stage_lengths, facts, costs, strict=True)
        return (Stage(0, self.lengths, first), *(Stage(*stage) for stage in later))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the weights move. The rate rises linearly, then falls along a cosine."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the blocks by Muon, all else (embeddings, norms, gates, vectors,
    M_0) by AdamW."""
    learning_rate: float = 3e-3
    """AdamW's highest."""
    muon_learning_rate: float | None = None
    """Muon's highest. Its updates are scaled to AdamW's size, so None takes `learning_rate`."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """AdamW's decay of the gradient's mean and mean square."""
    weight_decay: float = 0.1
    """Decoupled; on the matrices of the blocks alone, gates excepted."""
    warmup: int = 100
    """Steps until the rate is at its highest, where a run has more."""
    min_ratio: float = 0.1
    """Rate at the last step over the highest, of runs that are longer than the warmup."""

    def __post_init__(self) -> None:
        check_fields(self)
        rates = [self.learning_rate, self.muon_rate]
        if min(rates) <= 0:
            raise ValueError(f"optimizer: expected learning rates above 0, got {min(rates)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two of [0, 1), got {list(self.betas)}")
        if self.muon_learning_rate is not None and self.name != "muon":
            raise ValueError("optimizer.muon_learning_rate is for optimizer.name = 'muon'")
        if self.weight_decay < 0 or self.warmup < 0:
            raise ValueError("optimizer.weight_decay and warmup must not be negative")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"optimizer.min_ratio must lie in [0, 1], got {self.min_ratio}")

    @property
    def muon_rate(self) -> float:
        rate = self.muon_learning_rate
        return self.learning_rate if rate is None else rate


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at once, in which precision, and what is kept."""

    steps: int = 1000
    """Optimizer steps."""
    tokens_per_batch: int = 8192
    """Tokens of one step: as many rows as fit, at the step's length."""
    accumulate: int = 1
    """Parts that a batch's rows are computed in, one after the other. It saves memory; the
    gradient is that of the whole batch."""
    initial_model: str | None = None
    """A model file whose weights to begin with, for training on; its config must be `model`."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    precision: Literal["float32", "bf16", "auto"] = "float32"
    """bf16: autocast. Weights, optimizer and what the memories hold stay float32. auto: bf16 where
    the processor multiplies it as fast as it can, else float32 (elsewhere bf16 is emulated, at a
    third of the speed)."""
    gradient_checkpointing: bool = False
    """Compute each block twice instead of keeping its activations."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 leaves it as it is."""
    write_cost: float = 0.02
    """Weight in the loss of the memories' mean learning rate and mean decay: gates learn to close
    on noise, and not to forget for nothing."""
    write_half: float = 0.0
    """0: a gate g is charged g. Else g / (g + write_half), half of the price where it is as far
    open as that: few strong writes then cost less than many weak ones."""
    eval_every: int = 100
    """Steps between evaluations on held-out data; 0 for none."""
    eval_batches: int = 8
    """Batches of an evaluation (task text: windows of all their segments)."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 for the last step alone."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Besides `metrics.jsonl`."""
    device: str = "auto"
    """`cpu`, `cuda`, ...; auto is the first GPU, where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves it to PyTorch. Another number rounds sums differently."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(
            self, "steps", "tokens_per_batch", "accumulate", "eval_batches", "keep_checkpoints"
        )
        for name in (
            *("seed", "clip", "write_cost", "write_half"),
            *("eval_every", "checkpoint_every", "threads"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must not be negative, got {getattr(self, name)}")
        if self.threads > THREADS_MOST:
            raise ValueError(f"train.threads must be at most {THREADS_MOST}, got {self.threads}")


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """What the processes that torchrun starts do for each other. It changes no loss but by
    rounding: a run may be resumed with other settings here and with another number of them."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process holds all weights. fsdp: each holds its share of the weights, gradients
    and moments, and has the others' while it computes a block (FSDP2)."""
    shard: int = 0
    """fsdp: processes that hold one copy of the weights together, for instance those of one
    machine; 0 for all. With `tensor`, so many for each part of the heads."""
    sequence: int = 1
    """Processes that share the tokens of a text (docs/distributed.md). The others split the
    rows of a batch."""
    tensor: int = 1
    """Processes that share the heads of every layer, and its hidden channels, while each reads
    all tokens (tensor parallelism)."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "sequence", "tensor")
        if self.shard < 0 or (self.shard and self.strategy != "fsdp"):
            raise ValueError(
                f"distributed.shard must be 0, or a number of processes with strategy 'fsdp', "
                f"got {self.shard} with {self.strategy!r}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run; `load_toml(path, RunConfig)` reads one."""

    model: TitansConfig = field(default_factory=TitansConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        longest = self.longest
        if self.train.tokens_per_batch < longest:
            raise ValueError(
                f"train.tokens_per_batch ({self.train.tokens_per_batch}) must hold a row of "
                f"{longest} tokens"
            )
        rows = self.train.tokens_per_batch // longest
        if self.data.task == "text" and self.train.accumulate > rows:
            raise ValueError(
                f"train.accumulate ({self.train.accumulate}) must not exceed the {rows} rows of "
                "a batch"
            )
        uneven = [n for n in self.lengths if n % self.distributed.sequence]
        if uneven:
            raise ValueError(
                f"distributed.sequence ({self.distributed.sequence}) must divide the tokens of "
                f"every row, got rows of {uneven[0]}"
            )
        check_parts(self.model, self.distributed.tensor)

    @property
    def lengths(self) -> list[int]:
        """Tokens that a row may have, over all stages."""
        if self.data.task == "text":
            return [self.data.length]
        return [length for stage in self.data.curriculum() for length in stage.lengths]

    @property
    def longest(self) -> int:
        return max(self.lengths)


def require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def require_stray(name: str, value: float) -> None:
    if not 0 <= value <= STRAY_MOST:
        raise ValueError(f"{name} must lie in [0, {STRAY_MOST}], got {value}")


def write_cost_at(config: RunConfig, step: int) -> float:
    """`train.write_cost`, or that of the stage the step belongs to."""
    stage = [stage for stage in config.data.curriculum() if stage.begin <= step][-1]
    return config.train.write_cost if stage.write_cost is None else stage.write_cost


# How a run is computed and what is kept of it, not what it computes (but for rounding).
MANNERS = (
    "gradient_checkpointing",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep_checkpoints",
    "log",
    "device",
    "threads",
)


def first_difference(one: RunConfig, other: RunConfig) -> str | None:
    """The first field that differs and how, in words; None if there is none.

    `distributed` and `MANNERS` of [train] do not count.
    """
    free = {f"train.{name}" for name in MANNERS}
    for key, there, here in differences(one, other):
        if key not in free and not key.startswith("distributed."):
            return compared(key, there, here)
    return None
