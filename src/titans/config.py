"""Configuration: frozen dataclasses, strict TOML loading, overrides by dotted key.

A field's docstring says what it does; where the paper leaves a choice open it says so.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from titans.baselines import BASELINES
from titans.registry import KINDS, find, registered

Variant = Literal[
    "lmm",
    "mac",
    "mag",
    "mal",
    "transformer",
    "sliding",
    "linear-attention",
    "lightning",
    "mamba2",
    "deltanet",
    "gated-deltanet",
    "gated-deltanet-h2",
    "ttt-linear",
    "ttt-mlp",
    "rwkv7",
]
VARIANTS = typing.get_args(Variant)
HALF_LIFE_MOST = 1e30  # tokens; no single precision has much longer ones


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """One neural memory layer. Defaults are ours; `titans.preset` has the paper's."""

    dim: int = 128
    """Width of the model around the memory."""
    heads: int = 2
    """Independent memories. The paper's parameter counts imply several; it states no number."""
    head_dim: int | None = None
    """Key and value size of a head; None is dim / heads."""
    depth: int = 1
    """Weight matrices of the memory network (L_M)."""
    expansion: int = 4
    """Hidden size over key size for depth >= 2."""
    activation: Literal["gelu", "silu"] = "gelu"
    """Between the layers of the memory network; not given in v1."""
    residual: bool = False
    """M(x) = x + ..., NeurIPS text."""
    norm: bool = False
    """LayerNorm without gain on the network's output, NeurIPS text (affine or not: open)."""
    objective: str = "l2"
    """Inner loss: `l2` 0.5 |M(k) - v|^2, `dot` -<M(k), v>, or one that was registered. This and
    the next three name inner workings of one's own, see `titans.register`."""
    network: str = "mlp"
    """Memory network: `mlp`, of the fields above, or one that was registered."""
    retention: str = "decay"
    """What forgetting is: `decay` (1 - alpha) M, or one that was registered."""
    optimizer: str = "momentum"
    """The inner optimiser: `momentum` S = eta S - theta gradient, without `momentum` its second
    term alone, or one that was registered."""
    window: int = 1
    """Tokens whose gradients a step adds up, itself and those before it, all at the same weights:
    ATLAS' Omega rule."""
    window_decay: float = 1.0
    """What a token of that window weighs beside the next one. The weights add up to 1: what their
    sum would be belongs to theta. ATLAS lets the input decide them; these are constant."""
    chunk_size: int = 1
    """Tokens whose gradients share their weights; 1 is the exact per-token gradient."""
    gates: Literal["closing", "sigmoid", "exponential", "step", "constant"] = "closing"
    """`closing`: learning rate max * clamp(1.3 sigmoid - 0.15, 0, 1), forgetting in log space;
    both reach exactly zero. `sigmoid`: the paper's. The others are the baselines': `exponential`
    max * sigmoid and log(1 - alpha) = -A softplus(.), A learned per head; `step` one learned step
    dt = softplus(.) for both, theta = dt and log(1 - alpha) = -A dt; `constant` theta = max and a
    fixed alpha per head."""
    gate_input: Literal["token", "window"] = "token"
    """What the gates are linear maps of. `token`: the layer's input, as gated linear attention
    has it (the paper only says input-dependent). `window`: also q, k and v after their
    convolution, so that a token's worth is judged by the same context as its key."""
    tie_forgetting: bool = True
    """With closing gates: log(1 - alpha) = -theta softplus(.), so that a token which writes
    nothing forgets nothing."""
    momentum: bool = False
    """Past surprise (eta)."""
    dampen_momentum: bool = True
    """Scale theta by (1 - eta)^2: with unit keys the exact linear memory is then stable for
    any constant eta (see docs/stability.md). False is the paper's letter."""
    decay: Literal["none", "scalar", "channel"] = "scalar"
    """Forgetting (alpha) per head, or per input channel of each layer (NeurIPS text)."""
    decay_rank: int | None = None
    """Rank of the map from the input to channel-wise forgetting; None is a full map. The paper
    gives neither; full maps would cost depth * dim^2 parameters a layer."""
    decay_target: Literal["initial", "zero"] = "initial"
    """Forget towards the learned M_0, or towards zero (the paper's letter)."""
    decay_first: bool = False
    """Take the gradient at the memory that has already forgotten, (1 - alpha) M_{t-1}, as Gated
    DeltaNet does. For a linear memory with chunk_size 1 and scalar decay towards zero."""
    learn_initial: bool = True
    """Learn M_0; False keeps it zero, which only a linear memory can start from."""
    per_layer_gates: bool = False
    """Every layer of the memory network has its own gates (NeurIPS text)."""
    learning_rate_max: float | None = None
    """Upper end of theta; the paper gives no range. None is 1, and 0.1 for a memory that is not
    linear and has no bound on its surprise (docs/stability.md)."""
    learning_rate_init: float = 0.2
    """Initial theta as a fraction of its maximum; with gates `step` the initial dt."""
    momentum_init: float = 0.5
    """Initial eta."""
    half_life_min: float = 16.0
    """Shortest initial half-life of the memory in tokens; heads are spread up to the longest.
    With tied forgetting it counts full writes instead of tokens."""
    half_life_max: float = 65536.0
    """Longest initial half-life."""
    max_surprise: float | None = None
    """Bound on the norm of each token's gradient, in each layer of the memory; 0 is no bound.
    None is none for a linear memory, and 1 for any other: without it the gradient of the outer
    training explodes (docs/stability.md)."""
    conv_width: int = 4
    """Causal depthwise convolution after the q, k, v projections; 0 for none."""
    qkv_activation: Literal["silu", "none"] = "silu"
    """After that convolution."""
    key_init: Literal["independent", "previous"] = "independent"
    """How the key map and its convolution start. `previous`: as those of the queries, one token
    behind, so that a fresh memory binds what comes next to what stood before it; models then
    begin to recall many times sooner (docs/results.md). Open in the paper."""
    unit_norm: bool = True
    """Queries and keys have unit norm; without it only memories without feedback are stable."""
    skip: bool = False
    """Add the token's value, times a learned factor per head, to its read (Mamba2's D)."""
    output_gate: bool = True
    """Gate the normalised read by silu of a linear map of the input."""
    gate_before_norm: bool = False
    """Gate first, then normalise (Mamba2)."""
    impl: Literal["auto", "reference", "chunked", "exact", "compile", "native", "triton"] = "auto"
    """Which form of the rule runs; see `titans.ops.neural_memory`."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the factors of its matrix products; states and sums are float32 with either. (On a GPU
    the kernels take tf32 for `float32` where the tokens are shorter than that.)"""
    block_size: int = 64
    """Tokens the exact form solves at once; speed only."""

    def __post_init__(self) -> None:
        check_fields(self)
        for kind in KINDS:
            if getattr(self, kind) not in registered(kind):
                given = unknown(f"memory.{kind}", getattr(self, kind), registered(kind))
                raise ValueError(f"{given}; titans.register adds others")
        require_positive(
            self, "dim", "heads", "depth", "expansion", "window", "chunk_size", "block_size"
        )
        if not 0 < self.window_decay <= 1:
            raise ValueError(f"memory.window_decay must lie in (0, 1], got {self.window_decay}")
        if self.network != "mlp" and self.decay == "channel":
            raise ValueError(
                "memory.decay = 'channel' needs the channels of network = 'mlp', "
                f"got {self.network!r}"
            )
        if self.head_dim is not None:
            require_positive(self, "head_dim")
        if self.decay_rank is not None and (self.decay_rank < 1 or self.decay != "channel"):
            raise ValueError("memory.decay_rank must be at least 1 and needs decay = 'channel'")
        if self.decay_rank is not None and self.gates in ("step", "constant"):
            raise ValueError(
                f"memory.decay_rank needs a map to alpha, gates = {self.gates!r}: none"
            )
        if not self.learn_initial and not self.starts_empty:
            raise ValueError(
                "memory.learn_initial = false needs a linear memory (depth 1, no norm), "
                f"got depth {self.depth}, norm {self.norm}, network {self.network!r}, "
                f"retention {self.retention!r}"
            )
        if self.decay_first and not (
            self.linear
            and not self.own
            and not self.per_layer_gates
            and (self.chunk_size, self.residual, self.objective) == (1, False, "l2")
            and (self.decay, self.decay_target, self.surprise_limit) == ("scalar", "zero", None)
        ):
            raise ValueError(
                "memory.decay_first needs a linear memory (depth 1, no norm, no residual), "
                "chunk_size 1, objective 'l2', decay 'scalar' towards 'zero', no max_surprise and "
                "no per_layer_gates"
            )
        if self.gate_before_norm and not self.output_gate:
            raise ValueError("memory.gate_before_norm needs output_gate = true")
        if self.conv_width < 0:
            raise ValueError(f"memory.conv_width must not be negative, got {self.conv_width}")
        if self.key_init == "previous" and self.conv_width < 2:
            raise ValueError(
                "memory.key_init = 'previous' needs a convolution of at least 2 tokens, "
                f"got conv_width {self.conv_width}"
            )
        if not 0 < self.learning_rate_init < 1 or not 0 < self.momentum_init < 1:
            raise ValueError("memory.learning_rate_init and momentum_init must lie in (0, 1)")
        if not 0 < self.half_life_min <= self.half_life_max:
            raise ValueError("memory half-lives must satisfy 0 < half_life_min <= half_life_max")
        if self.half_life_max > HALF_LIFE_MOST:
            raise ValueError(
                f"memory.half_life_max must be at most {HALF_LIFE_MOST:g}, got {self.half_life_max}"
            )
        if self.learning_rate_limit <= 0:
            raise ValueError("memory.learning_rate_max must be positive")
        if self.max_surprise is not None and self.max_surprise < 0:
            raise ValueError(f"memory.max_surprise must not be negative, got {self.max_surprise}")

    @property
    def linear(self) -> bool:
        """Is the memory one matrix, its output linear in what was written?"""
        return self.depth == 1 and not self.norm and self.network == "mlp"

    @property
    def starts_empty(self) -> bool:
        """Can the memory start from zero? A deep one has no gradient there."""
        return self.linear and self.retention == "decay"

    @property
    def own(self) -> list[str]:
        """What is not the rule's own, e.g. "objective 'huber'"."""
        names = {kind: getattr(self, kind) for kind in KINDS}
        own = [f"{kind} {name!r}" for kind, name in names.items() if find(kind, name) is not None]
        return [*own, f"window {self.window}"] if self.window > 1 else own

    @property
    def learning_rate_limit(self) -> float:
        if self.learning_rate_max is not None:
            return self.learning_rate_max
        return 1.0 if self.linear or self.surprise_limit is not None else 0.1

    @property
    def surprise_limit(self) -> float | None:
        if self.max_surprise is not None:
            return self.max_surprise or None
        return None if self.linear else 1.0

    @property
    def key_dim(self) -> int:
        """Key and value size of a head. ValueError if the heads do not divide the width, which
        is known only when a model has set it."""
        if self.head_dim is not None:
            return self.head_dim
        if self.dim % self.heads:
            raise ValueError(f"memory.dim ({self.dim}) must be a multiple of heads ({self.heads})")
        return self.dim // self.heads


@dataclass(frozen=True, kw_only=True)
class TitansConfig:
    """One language model. `memory.dim` always follows `dim`."""

    variant: Variant = "mac"
    """lmm: memory alone; mac: as context; mag: as gate; mal: as layer. The others are baselines,
    described in `titans.baselines`; the fields of `memory` that define one follow the variant, and
    so do those it starts with (its convolution, its first half-lives), where they are at
    `MemoryConfig`'s default: linear-attention with a convolution of 4 is not to be had."""
    vocab_size: int = 257
    """257 is the byte tokenizer."""
    dim: int = 128
    layers: int = 2
    heads: int = 2
    """Attention heads."""
    ffn_hidden: int = 352
    """Hidden size of the SwiGLU feed-forward; 0 leaves the feed-forward out."""
    window: int = 64
    """Sliding attention window in tokens (MAG, MAL, sliding, gated-deltanet-h2); a token sees
    itself and the window - 1 before it. NeurIPS: 2048."""
    segment: int = 64
    """Segment length of MAC (NeurIPS: 512)."""
    memory_token_stride: int = 1
    """MAC: one memory token h_j for every so many tokens. NeurIPS has 256 for 512 tokens but
    not how; 2 takes every second query."""
    persistent: int = 4
    """Learned tokens in front of the sequence, per block (NeurIPS: 128). Titans and sliding."""
    gate_activation: Literal["silu", "sigmoid"] = "silu"
    """Non-linearity of MAG's and MAC's combination of the two normalised branches, attention's y
    and the memory's m; the paper does not name it."""
    gate_branch: Literal["memory", "attention"] = "memory"
    """Which of them passes it: `memory` is y * act(m), `attention` m * act(y). The paper leaves
    it open. With `attention` and sigmoid a MAC with a deep memory learned to recall, and, without
    `combine_output`, one with a linear memory to classify 6,478 sequences of DNA, where the
    defaults did not. On text MAC is 0.04 bits a byte worse with all three, MAG 0.03 better
    (docs/results.md)."""
    combine_output: bool = True
    """A map after that product, which the paper's equations do not have. What it is worth on text
    depends on `gate_branch` (docs/results.md)."""
    rope_base: float = 10_000.0
    tie_embeddings: bool = True
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(
            self,
            "vocab_size",
            "dim",
            "layers",
            "heads",
            "window",
            "segment",
            "memory_token_stride",
        )
        if self.persistent < 0 or self.ffn_hidden < 0:
            raise ValueError("persistent and ffn_hidden must not be negative")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base must be positive, got {self.rope_base}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"dim ({self.dim}) must be an even multiple of heads ({self.heads}): "
                "rotary positions need an even head size"
            )
        if self.segment % self.memory_token_stride:
            raise ValueError(
                f"segment ({self.segment}) must be a multiple of "
                f"memory_token_stride ({self.memory_token_stride})"
            )
        follows = {"dim": self.dim} | baseline_fields(self.variant, self.memory)
        if any(getattr(self.memory, name) != value for name, value in follows.items()):
            object.__setattr__(self, "memory", dataclasses.replace(self.memory, **follows))
        if has_memory(self.variant):
            _ = self.memory.key_dim  # raises if the heads do not divide the width

    def hash(self) -> str:
        """Names the model's config; a memory file carries it.

        `impl`, `block_size` and `precision` are left out: they change speed and rounding only; and
        so is `key_init`, which a trained model has behind it. (The initial gates, which it has
        behind it as well, count: files of memories hold the hash with them.) What was registered
        counts by its name. Fields younger than the first memory files count where they are not at
        their default.
        """
        content = dataclasses.asdict(self) | {"memory": hashed_fields(self.memory)}
        for name in ("combine_output", "gate_branch"):
            if content[name] == getattr(TitansConfig, name):
                del content[name]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def hashed_fields(memory: MemoryConfig) -> dict[str, Any]:
    """The fields that `TitansConfig.hash` counts."""
    content = dataclasses.asdict(memory)
    for name in ("impl", "block_size", "precision", "key_init"):
        del content[name]
    for name in ("network", "retention", "optimizer", "window", "window_decay"):
        if content[name] == getattr(MemoryConfig, name):
            del content[name]
    return content


def has_memory(variant: str) -> bool:
    """Do the model's layers hold a `NeuralMemory`?"""
    return variant not in BASELINES or bool(BASELINES[variant].memory)


def baseline_fields(variant: str, memory: MemoryConfig) -> dict[str, Any]:
    """Fields of `memory` that follow the variant. A field at its default counts as not set;
    one that contradicts the variant is a ValueError."""
    if variant not in BASELINES:
        return {}
    if memory.own and has_memory(variant):
        raise ValueError(
            f"variant {variant!r} has its own memory, got {', '.join(memory.own)}; "
            "other rules are variant 'lmm' with their own [memory]"
        )
    baseline = BASELINES[variant]
    defaults = {f.name: f.default for f in dataclasses.fields(MemoryConfig)}
    for name, value in baseline.memory.items():
        given = getattr(memory, name)
        if given not in (value, defaults[name]):
            raise ValueError(
                f"memory.{name} is {value!r} in variant {variant!r}, got {given!r}; "
                "other rules are variant 'lmm' with their own [memory]"
            )
    starts = baseline.starts.items()
    unset = {name: value for name, value in starts if getattr(memory, name) == defaults[name]}
    return {**baseline.memory, **unset}


C = TypeVar("C")


def load_toml(path: str | Path, cls: type[C], overrides: dict[str, str] | None = None) -> C:
    """Read a config of type `cls`; unknown keys and wrong types are a ValueError.

    overrides: dotted key -> text, as from the command line, e.g. {"train.steps": "100"}.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable TOML file ({error})") from None
    try:
        for key, text in (overrides or {}).items():
            set_dotted(content, cls, key, text)
        return build(cls, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def build(cls: type[C], content: dict[str, Any], path: str = "") -> C:
    """A (nested) dict -> the frozen dataclass, strictly."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {}
    for key, value in content.items():
        where = f"{path}.{key}" if path else key
        if key not in names:
            raise ValueError(unknown("key", where, [f"{path}.{n}" if path else n for n in names]))
        kind = hints[key]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if not isinstance(value, dict):
                raise ValueError(f"{where} must be a table, got {value!r}")
            values[key] = build(kind, value, where)
        else:
            values[key] = check_type(where, value, kind)
    return cls(**values)


def check_type(where: str, value: Any, kind: Any) -> Any:
    """Validate a TOML value against a field's type; ints are accepted for floats."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(unknown(where, value, [str(a) for a in arguments]))
        return value
    if origin in (typing.Union, types.UnionType):
        if (value is None or value == "none") and type(None) in arguments:
            return None
        rest = [a for a in arguments if a is not type(None)]
        return check_type(where, value, rest[0])
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, got {value!r}")
        return tuple(check_type(f"{where}[{i}]", v, arguments[0]) for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{where} must be a finite number, got one too large") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {kind.__name__}, got {value!r}")
    return value


def set_dotted(content: dict[str, Any], cls: type, key: str, text: str) -> None:
    """Put a command-line override into the nested dict, parsed by the field's type."""
    *parents, last = key.split(".")
    for index, name in enumerate(parents):
        hints = typing.get_type_hints(cls)
        if name not in hints or not dataclasses.is_dataclass(hints[name]):
            tables = [n for n, h in hints.items() if dataclasses.is_dataclass(h)]
            if not tables:
                above = ".".join(parents[:index]) or cls.__name__
                raise ValueError(f"unknown key {key!r}: {above} has no sections")
            raise ValueError(unknown("section", ".".join(parents[: index + 1]), tables))
        cls = typing.cast(type, hints[name])
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise ValueError(f"{'.'.join(parents[: index + 1])} must be a table, got {content!r}")
    hints = typing.get_type_hints(cls)
    if last not in hints:
        prefix = "".join(f"{p}." for p in parents)
        raise ValueError(unknown("key", key, [prefix + n for n in hints]))
    content[last] = parse_text(hints[last], text)


def parse_text(kind: Any, text: str) -> Any:
    """Text of an override -> a value `check_type` can judge (TOML syntax, else a string)."""
    if kind is str:
        return text
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dicts without None, ready for TOML or JSON."""
    return {
        key: to_dict(value) if dataclasses.is_dataclass(value) else value
        for key, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
        if value is not None
    }


def differences(one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and both values of every field that differs."""
    left, right = flatten(to_dict(one)), flatten(to_dict(other))
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            yield key, left.get(key), right.get(key)


def compared(key: str, there: Any, here: Any) -> str:
    """One of `differences`, in words."""
    return f"{key} is {there!r} there and {here!r} here"


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def to_toml(config: Any) -> str:
    """The config as TOML that `load_toml` reads back to an equal one."""
    return table_to_toml(to_dict(config))


def table_to_toml(table: dict[str, Any]) -> str:
    """Nested dicts as TOML."""
    lines: list[str] = []
    write_table(table, "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def write_table(table: dict[str, Any], name: str, lines: list[str]) -> None:
    if name:
        lines.append(f"\n[{name}]")
    for key, value in table.items():
        if not isinstance(value, dict):
            # JSON's strings, numbers, booleans and lists are TOML's.
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    for key, value in table.items():
        if isinstance(value, dict):
            write_table(value, f"{name}.{key}" if name else key, lines)


def unknown(what: str, given: Any, known: Sequence[str]) -> str:
    """`unknown X 'y'; did you mean 'z'?`, or the list of what there is."""
    close = difflib.get_close_matches(str(given), list(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return f"unknown {what} {given!r}; {hint}"


def check_fields(config: Any) -> None:
    """Every field has its type; a config made in Python is held to what TOML is, and 1 is 1.0
    where a float belongs: equal configs have one hash."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not dataclasses.is_dataclass(kind):
            object.__setattr__(config, name, check_type(name, value, kind))
        elif isinstance(kind, type) and not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got {value!r}")


def require_positive(config: Any, *names: str) -> None:
    """Sizes and counts: at least 1, and none that a tensor could not have."""
    for name in names:
        value, kind = getattr(config, name), type(config).__name__
        if value < 1:
            raise ValueError(f"{kind}.{name} must be at least 1, got {value}")
        if value >= 2**40:
            raise ValueError(f"{kind}.{name} must be below 2^40, got {value}")
