"""Tiny models of every variant, in float64, as `TitansLM` and wrapped for transformers."""

import torch

from titans import MemoryConfig, TitansConfig, TitansLM
from titans.baselines import BASELINES
from titans.config import VARIANTS
from titans.hf import TitansForCausalLM

VOCABULARY = 40
LINEAR = MemoryConfig(heads=2)
DEEP = MemoryConfig(
    heads=2,
    depth=2,
    expansion=2,
    norm=True,
    residual=True,
    chunk_size=4,
    momentum=True,
    gates="sigmoid",
    decay_target="zero",
)
TITANS = tuple(v for v in VARIANTS if v not in BASELINES)
# Different kinds of states: each Titans block, one with open chunks, growing keys, a shifted token.
KINDS = ("lmm", "mac", "mag", "mal", "mac-deep", "transformer", "rwkv7", "gated-deltanet-h2")


def small_config(kind: str, **changes: object) -> TitansConfig:
    variant = kind.removesuffix("-deep")
    fields = {
        "variant": variant,
        "vocab_size": VOCABULARY,
        "dim": 16,
        "layers": 2,
        "heads": 2,
        "ffn_hidden": 24,
        "window": 5,
        "segment": 6,
        "memory_token_stride": 2,
        "persistent": 2,
        "memory": DEEP if kind.endswith("-deep") else LINEAR,
    }
    return TitansConfig(**{**fields, **changes})


def small(kind: str = "mac", **changes: object) -> TitansLM:
    """A model whose memories have something to lose: M_0 and gates are not at their start."""
    torch.manual_seed(0)
    model = TitansLM(small_config(kind, **changes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "initial" in name or "gates" in name:
                parameter += 0.3 * torch.randn_like(parameter)
            elif "embedding" in name or "head" in name:
                parameter *= 20.0  # so that the likeliest token is not decided by rounding
    return model


def wrapped(kind: str = "mac", **changes: object) -> TitansForCausalLM:
    return TitansForCausalLM.from_titans(small(kind, **changes))


def some_tokens(rows: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)
