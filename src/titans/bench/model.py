"""`titans bench model`: a training step of whole models of one size, at several lengths.

All have the width and (nearly) the number of parameters of the Transformer++, whose feed-forward
is 4 dim wide. In ours it takes what the mixer leaves, as in `titans.presets`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from titans.bench import rivals
from titans.bench.contest import Row, series
from titans.bench.contestants import Contestant, parameter_count
from titans.bench.layer import describe
from titans.bench.measure import check_device
from titans.config import MemoryConfig, TitansConfig, Variant, to_dict

TRANSFORMER = "Transformer++"
OURS: tuple[Variant, ...] = ("lmm", "mac", "mag", "mal")


@dataclass(frozen=True, kw_only=True)
class ModelBench:
    """Sizes of a comparison of models."""

    lengths: tuple[int, ...] = (4096, 32768)
    batch: int = 1
    dim: int = 256
    heads: int = 4
    layers: int = 2
    window: int = 256
    """Attention window of MAG, MAL and the sliding-window baseline, and segment of MAC."""
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

    def base(self) -> TitansConfig:
        """The Transformer++, which sets the size of all."""
        return TitansConfig(
            variant="transformer",
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            ffn_hidden=4 * self.dim,
            window=self.window,
            segment=self.window,
            persistent=4,
            memory=MemoryConfig(dim=self.dim, heads=self.heads),
        )

    def deep(self) -> MemoryConfig:
        """An MLP memory with momentum, gradients per chunk of 64."""
        return MemoryConfig(
            dim=self.dim,
            heads=self.heads,
            depth=2,
            residual=True,
            norm=True,
            chunk_size=64,
            momentum=True,
        )


def bench_model(bench: ModelBench) -> dict[str, Any]:
    """Training and forward speed and memory of all models at every length."""
    base = bench.base()
    size = parameter_count(rivals.transformer(base))
    configs: dict[str, TitansConfig] = {
        name: rivals.match_size(replace(base, variant=name), size) for name in OURS
    }
    configs["mag, deep memory"] = rivals.match_size(
        replace(base, variant="mag", memory=bench.deep()), size
    )
    table: list[tuple[str, str, dict[str, Any]]] = [
        (name, "titans", to_dict(config)) for name, config in configs.items()
    ]
    for name in ("mag", "mag, deep memory"):
        table.append((f"{name}: one memory layer", "layer", to_dict(configs[name].memory)))
    table.append((TRANSFORMER, "transformer", to_dict(base)))
    if bench.rivals:
        table += rival_models(bench, base, size)

    def field(length: int) -> Sequence[Contestant]:
        return [
            Contestant(
                impl=impl,
                kind=kind,
                settings=settings,
                length=length,
                batch=bench.batch,
                device=bench.device,
                dtype=bench.dtype,
            )
            for impl, kind, settings in table
        ]

    peak, rows = series(
        bench.lengths,
        field,
        repeats=bench.repeats,
        limit_s=bench.limit_s,
        memory=bench.memory,
    )
    add_memory_share(rows, bench.layers)
    return describe("model", bench, peak, rows)


def rival_models(
    bench: ModelBench, base: TitansConfig, size: int
) -> list[tuple[str, str, dict[str, Any]]]:
    """Attention with a window, and transformers' Mamba2 and Qwen3-Next where it is installed."""
    window = rivals.match_size(replace(base, variant="sliding", persistent=0), size)
    table: list[tuple[str, str, dict[str, Any]]] = [
        (f"attention, window {bench.window}", "titans", to_dict(window))
    ]
    for impl, kind, settings in (
        ("Mamba2 (transformers)", "mamba2", rivals.mamba2_settings),
        ("Qwen3-Next, gated delta (transformers)", "qwen3-next", rivals.qwen3_next_settings),
    ):
        try:
            table.append((impl, kind, settings(base, size)))
        except ImportError:
            table.append((impl, kind, {}))  # building it again will say what is missing
    return table


def add_memory_share(rows: list[Row], layers: int) -> None:
    """memory_share: part of a training step that the memory layers alone would take."""
    speeds = {(line["impl"], line["length"]): line["tokens_per_s_train"] for line in rows}
    for line in rows:
        alone = speeds.get((f"{line['impl']}: one memory layer", line["length"]))
        if alone is not None and line["tokens_per_s_train"] is not None:
            line["memory_share"] = layers * line["tokens_per_s_train"] / alone
