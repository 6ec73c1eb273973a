"""Named model configs: `preset("mac-tiny")`, `preset("mac-340m-paper_neurips")`.

Names are `VARIANT-SIZE` for our own models (small enough for one CPU) and
`VARIANT-SIZE-TEXT` for the paper's, where TEXT is one of its two texts: `paper_v1` (arXiv
2501.00663v1) or `paper_neurips` (camera-ready). A number that a text does not give is marked
"ours" below. Baselines (`titans.baselines`) have every size and no TEXT.

The bound on a token's gradient (`max_surprise`) is ours in all of them: docs/stability.md.

`matched` gives any config as another variant of the same number of parameters.
"""

import dataclasses
from typing import Any

from titans.baselines import BASELINES, has_convolution
from titans.config import (
    VARIANTS,
    MemoryConfig,
    TitansConfig,
    Variant,
    has_memory,
    unknown,
)

# layers, dim, heads. tiny and small are ours.
OWN_SIZES = {"tiny": (2, 64, 2), "small": (4, 128, 2), "base": (8, 256, 4)}

# layers, dim, heads, parameters. NeurIPS table of the appendix; its 400M has no row (dim: ours).
PAPER_SIZES = {
    "170m": (12, 768, 16, 170_000_000),
    "340m": (24, 1024, 16, 340_000_000),
    "400m": (24, 1088, 17, 400_000_000),
    "760m": (24, 1536, 16, 760_000_000),
    "1.3b": (18, 2048, 8, 1_300_000_000),
}
TEXTS = ("paper_v1", "paper_neurips")
LLAMA_VOCABULARY = 32_000
# How far `matched` may be from the number of parameters it is asked for.
MATCH_TOLERANCE = 0.02


def presets() -> dict[str, tuple[Variant, str, str | None]]:
    """Name -> variant, size, and the paper's text where there is one."""
    named: dict[str, tuple[Variant, str, str | None]] = {}
    for variant in VARIANTS:
        for size in (*OWN_SIZES, *PAPER_SIZES):
            if variant in BASELINES or size in OWN_SIZES:
                named[f"{variant}-{size}"] = variant, size, None
            else:
                named |= {f"{variant}-{size}-{text}": (variant, size, text) for text in TEXTS}
    return named


def preset_names() -> list[str]:
    """Every name that `preset` knows."""
    return list(presets())


def preset(name: str) -> TitansConfig:
    """The config of that name; an unknown one is a ValueError with a suggestion."""
    if name not in presets():
        raise ValueError(unknown("preset", name, preset_names()))
    variant, size, text = presets()[name]
    if size in PAPER_SIZES:
        return paper_config(variant, size, text)
    layers, dim, heads = OWN_SIZES[size]
    return TitansConfig(
        variant=variant,
        dim=dim,
        layers=layers,
        heads=heads,
        ffn_hidden=round_to(8 * dim / 3, 32),
        window=64,
        segment=64,
        persistent=4,
        memory=MemoryConfig(dim=dim, heads=heads),
    )


def matched(config: TitansConfig, variant: Variant, parameters: int) -> TitansConfig:
    """`config` as that variant, with a feed-forward (a multiple of 8) that brings the model within
    2 % of so many parameters.

    The four Titans keep `config.memory`; a baseline of the rule takes its heads, its convolution,
    how its keys start and what its gates see from there, and all else of the memory from
    `titans.baselines`; linear-attention and lightning have no convolution unless `conv_width` of
    `config.memory` is other than the default.
    ValueError if the mixers alone have too many parameters, or none comes near, and for a Titans
    of a baseline's config, whose memory is the baseline's.
    """
    memory = config.memory
    if variant not in BASELINES and config.variant in BASELINES and has_memory(config.variant):
        raise ValueError(
            f"the memory of this config is {config.variant!r}'s: match from that of a Titans"
        )
    if variant in BASELINES:
        given = dataclasses.asdict(memory)
        sizes: tuple[str, ...] = ("dim", "heads", "head_dim", "conv_width", "gate_input")
        forms = ("impl", "precision", "block_size")
        if has_convolution(variant):
            sizes += ("key_init",)
        memory = MemoryConfig(**{name: given[name] for name in (*sizes, *forms)})
    config = dataclasses.replace(config, variant=variant, ffn_hidden=8, memory=memory)
    least = count_parameters(config)
    step = count_parameters(dataclasses.replace(config, ffn_hidden=16)) - least
    hidden = 8 * max(1, 1 + round((parameters - least) / step))
    got = least + (hidden // 8 - 1) * step
    if abs(got - parameters) > MATCH_TOLERANCE * parameters:
        raise ValueError(
            f"variant {variant!r} of this width has {got:,} parameters with ffn_hidden {hidden}, "
            f"expected {parameters:,} within {MATCH_TOLERANCE:.0%}"
        )
    return dataclasses.replace(config, ffn_hidden=hidden)


def paper_config(variant: Variant, size: str, text: str | None) -> TitansConfig:
    """The paper's model. The feed-forward takes what is left of the nominal parameter count:
    no text says how the hybrids, with both attention and memory, are kept at one size."""
    layers, dim, heads, target = PAPER_SIZES[size]
    config = TitansConfig(
        variant=variant,
        vocab_size=LLAMA_VOCABULARY,
        dim=dim,
        layers=layers,
        heads=heads,
        ffn_hidden=0,
        window=2048,  # NeurIPS; v1 gives none
        segment=512,  # NeurIPS; v1 gives none
        memory_token_stride=2 if text == "paper_neurips" else 1,
        persistent=128,  # NeurIPS; v1 gives none
        combine_output=True,  # ours: the equations end with the product
        memory=paper_memory(text, dim, heads),
    )
    left = target - count_parameters(config) - layers * dim  # the feed-forward's norm
    return dataclasses.replace(config, ffn_hidden=round_to(left / (layers * 3 * dim), 64))


def paper_memory(text: str | None, dim: int, heads: int) -> MemoryConfig:
    if text is None:
        return MemoryConfig(dim=dim, heads=heads)
    return paper_v1_memory(dim, heads) if text == "paper_v1" else neurips_memory(dim, heads)


def paper_v1_memory(dim: int, heads: int) -> MemoryConfig:
    """v1: an MLP, scalar sigmoid gates, momentum, decay towards zero."""
    return MemoryConfig(
        dim=dim,
        heads=heads,
        depth=2,  # v1 writes L_M >= 1 and finds that 2 and more help
        expansion=4,
        activation="silu",  # ours
        residual=False,
        norm=False,
        chunk_size=64,  # ours
        gates="sigmoid",
        tie_forgetting=False,
        momentum=True,
        dampen_momentum=False,
        decay="scalar",
        decay_target="zero",
        learning_rate_init=0.01,  # ours
    )


def neurips_memory(dim: int, heads: int) -> MemoryConfig:
    """NeurIPS: x + LN(W1 gelu(W2 x)), channel-wise forgetting, gates per layer, chunk 16."""
    return MemoryConfig(
        dim=dim,
        heads=heads,
        depth=2,
        expansion=4,
        activation="gelu",
        residual=True,
        norm=True,
        chunk_size=16,
        gates="sigmoid",
        tie_forgetting=False,
        momentum=True,
        dampen_momentum=False,
        decay="channel",
        decay_rank=64,  # ours
        decay_target="zero",
        per_layer_gates=True,
        learning_rate_init=0.01,  # ours
    )


FILLS = {"normal_", "uniform_", "kaiming_uniform_", "fill_", "zero_"}


def count_parameters(config: TitansConfig) -> int:
    """Parameters of the model, built without memory on the meta device."""
    import torch
    from torch.overrides import TorchFunctionMode

    from titans.models.lm import TitansLM

    class Uninitialised(TorchFunctionMode):
        """What would fill a tensor leaves it: on that device it is two thirds of the time."""

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(func, "__name__", "") in FILLS:
                return next(iter((*args, *(kwargs or {}).values())))
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), Uninitialised():
        return TitansLM(config).parameter_count


def round_to(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)
