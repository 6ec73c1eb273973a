"""`titans bench layer`: the bare rule, and the memory layer beside titans-pytorch and attention."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from titans.bench.contest import Row, add_note, contest, series, shortened
from titans.bench.contestants import Contestant
from titans.bench.measure import check_device, hardware, versions
from titans.config import MemoryConfig, to_dict

Axis = Literal["length", "chunk", "depth", "heads"]
AXES = get_args(Axis)
CHUNKS = (1, 4, 16, 32, 64, 128, 256)
DEPTHS = (1, 2, 3, 4)
HEADS = (1, 2, 3, 6, 12)
WINDOW = 512
RIVAL_CHUNK = 64
FULL_ATTENTION = "attention, full causal"


@dataclass(frozen=True, kw_only=True)
class LayerBench:
    """Sizes of a comparison of layers; their width is heads * key_dim."""

    length: int = 4096
    batch: int = 1
    heads: int = 6
    key_dim: int = 64
    expansion: int = 4
    depth: int = 2
    chunk_sizes: tuple[int, ...] = (64, 16)
    repeats: int = 5
    limit_s: float = 300.0
    """Seconds one contestant may spend in one kind of step; beyond, fewer repeats."""
    rivals: bool = True
    memory: bool = True
    """Measure peak memory too, each contestant in a process of its own."""
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_device(self.device)

    @property
    def dim(self) -> int:
        return self.heads * self.key_dim

    def contestant(self, impl: str, kind: str, settings: dict[str, Any]) -> Contestant:
        return Contestant(
            impl=impl,
            kind=kind,
            settings=settings,
            length=self.length,
            batch=self.batch,
            device=self.device,
            dtype=self.dtype,
        )

    def op(
        self,
        chunk_size: int,
        depth: int | None = None,
        impl: str = "auto",
        precision: str = "float32",
    ) -> Contestant:
        """The bare rule with momentum and decay; depth 1 with chunk 1 is the exact form."""
        depth = self.depth if depth is None else depth
        exact = depth == 1 and chunk_size == 1
        settings = {
            "impl": impl,
            "precision": precision,
            "heads": self.heads,
            "key_dim": self.key_dim,
            "depth": depth,
            "expansion": self.expansion,
            "chunk_size": chunk_size,
            "momentum": True,
        }
        name = "rule, exact linear" if exact else f"rule, depth {depth}, chunk {chunk_size}"
        if impl != "auto":
            name += f", impl {impl!r}"
        if precision != "float32":
            name += f", {precision} products"
        return self.contestant(name, "op", settings)

    def layer(self, chunk_size: int, depth: int | None = None) -> Contestant:
        """Our layer as titans-pytorch's memory is: sigmoid gates, momentum, forgetting to zero,
        x + LN(MLP(x)); ours has its gates per token whatever the chunk."""
        depth = self.depth if depth is None else depth
        config = MemoryConfig(
            dim=self.dim,
            heads=self.heads,
            depth=depth,
            expansion=self.expansion,
            residual=depth > 1,
            norm=depth > 1,
            chunk_size=chunk_size,
            gates="sigmoid",
            tie_forgetting=False,
            momentum=True,
            decay_target="zero",
        )
        exact = depth == 1 and chunk_size == 1
        name = "layer, exact linear" if exact else f"layer, depth {depth}, chunk {chunk_size}"
        return self.contestant(name, "layer", to_dict(config))

    def titans_pytorch(self, chunk_size: int, batch_size: int) -> Contestant:
        """Its layer: chunk_size tokens share a gate, batch_size tokens their base weights.

        Momentum, decay, x + LN(MLP(x)) and an RMSNorm before it are its defaults. Its default
        largest step, 1, overflows within 4,096 random tokens; 0.01 is that of its own transform.
        """
        settings = {
            "dim": self.dim,
            "heads": self.heads,
            "dim_head": self.key_dim,
            "chunk_size": chunk_size,
            "batch_size": batch_size,
            "momentum": True,
            "default_step_transform_max_lr": 0.01,
            "default_model_kwargs": {
                "depth": self.depth,
                "expansion_factor": float(self.expansion),
            },
        }
        gates = "per-token gates" if chunk_size == 1 else f"one gate per {chunk_size}"
        name = f"titans-pytorch, {gates}, batch {batch_size}"
        return self.contestant(name, "titans-pytorch", settings)

    def attention(self, window: int | None) -> Contestant:
        settings: dict[str, Any] = {"dim": self.dim, "heads": self.heads}
        if window is None:
            return self.contestant(FULL_ATTENTION, "attention layer", settings)
        settings["window"] = window
        return self.contestant(f"attention, window {window}", "attention layer", settings)


def bench_layer(bench: LayerBench) -> dict[str, Any]:
    """Speed and memory of the rule, the layer and its rivals at one size, in one run."""
    contestants = [bench.op(c) for c in bench.chunk_sizes] + [bench.op(1, depth=1)]
    contestants += [bench.op(c, precision="bf16") for c in bench.chunk_sizes]
    # What runs where there is no C compiler, by torch operations alone.
    contestants += [bench.op(c, impl="chunked") for c in bench.chunk_sizes]
    contestants += [bench.op(1, depth=1, impl="exact")]
    contestants += [bench.layer(c) for c in bench.chunk_sizes] + [bench.layer(1, depth=1)]
    reason = None
    if bench.rivals:
        # Its weights of every token are held until the backward: far more than the rest.
        per_token, reason = shortened(bench.titans_pytorch(1, RIVAL_CHUNK))
        contestants += [
            bench.titans_pytorch(RIVAL_CHUNK, RIVAL_CHUNK),
            per_token,
            bench.attention(None),
            bench.attention(WINDOW),
        ]
    peak, rows = contest(
        contestants, repeats=bench.repeats, limit_s=bench.limit_s, memory=bench.memory
    )
    if reason is not None:
        add_note(next(line for line in rows if line["impl"] == per_token.impl), reason)
    return describe("layer", bench, peak, rows)


def sweep(bench: LayerBench, axis: Axis, lengths: Sequence[int]) -> dict[str, Any]:
    """Time and memory along one axis. The width stays heads * key_dim along the axis of heads."""
    chunk = bench.chunk_sizes[0]
    if axis == "length":

        def field(length: int) -> list[Contestant]:
            at = replace(bench, length=length)
            ours = [at.layer(chunk), at.layer(1, depth=1)]
            rivals = [at.titans_pytorch(RIVAL_CHUNK, RIVAL_CHUNK)]
            rivals += [at.attention(None), at.attention(WINDOW)]
            return ours + (rivals if bench.rivals else [])

        peak, rows = series(
            lengths,
            field,
            repeats=bench.repeats,
            limit_s=bench.limit_s,
            quadratic=(FULL_ATTENTION,),
            memory=bench.memory,
        )
        for line in rows:
            line["x"] = line["length"]
        return describe("layer-length", bench, peak, rows)

    contestants: dict[int, Contestant] = {}
    if axis == "chunk":
        contestants = {c: bench.layer(c) for c in CHUNKS if c <= bench.length}
    elif axis == "depth":
        contestants = {d: bench.layer(chunk, depth=d) for d in DEPTHS}
    else:
        fitting = [h for h in HEADS if bench.dim % h == 0]
        sizes = {h: replace(bench, heads=h, key_dim=bench.dim // h) for h in fitting}
        contestants = {
            h: replace(at.layer(chunk), impl=f"layer, {h} heads of {at.key_dim}, chunk {chunk}")
            for h, at in sizes.items()
        }
    peak, rows = contest(
        list(contestants.values()),
        repeats=bench.repeats,
        limit_s=bench.limit_s,
        memory=bench.memory,
    )
    for x, line in zip(contestants, rows, strict=True):
        line["x"] = x
    return describe(f"layer-{axis}", bench, peak, rows)


def describe(name: str, bench: Any, peak: float | None, rows: list[Row]) -> dict[str, Any]:
    """The JSON object of a run: what, on what, with which versions, and the rows."""
    return {
        "bench": name,
        "hardware": hardware(bench.device),
        "versions": versions("titans-pytorch", "transformers"),
        "settings": dataclasses.asdict(bench),
        "matrix_peak_gflops": peak,
        "rows": rows,
    }
