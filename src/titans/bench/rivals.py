"""What ours is compared with, as modules: titans-pytorch, attention, Mamba2, Qwen3-Next.

Packages of others are imported where they are used; a contestant whose package is missing is
reported as such and the rest goes on.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from titans.config import TitansConfig
from titans.models.lm import TitansLM

C = TypeVar("C")


def transformer(config: TitansConfig) -> TitansLM:
    """Transformer++: RMSNorm, rotary positions, full causal attention, SwiGLU.

    Our own macro-architecture with another mixer, so that only the mixer differs.
    """
    return TitansLM(replace(config, variant="transformer"))


def match_size(
    config: TitansConfig, target: int, make: Callable[[TitansConfig], nn.Module] = TitansLM
) -> TitansConfig:
    """The config whose feed-forward brings the model nearest to `target` parameters."""
    least, more = (count(make, replace(config, ffn_hidden=hidden)) for hidden in (1, 2))
    if target < least:
        raise ValueError(
            f"{config.variant} has {least:,} parameters with the smallest feed-forward, "
            f"expected at most {target:,}; choose a larger dim"
        )
    return replace(config, ffn_hidden=1 + round((target - least) / (more - least)))


def titans_pytorch_memory(settings: dict[str, Any]) -> nn.Module:
    """titans-pytorch's NeuralMemory with exactly these arguments."""
    from titans_pytorch import NeuralMemory

    return NeuralMemory(**settings)


def mamba2(settings: dict[str, Any]) -> nn.Module:
    """transformers' Mamba2 language model, random weights."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(Mamba2Config(**settings))


def qwen3_next(settings: dict[str, Any]) -> nn.Module:
    """transformers' Qwen3-Next language model (gated delta rule), random weights."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(Qwen3NextConfig(**settings))


def mamba2_settings(config: TitansConfig, target: int) -> dict[str, Any]:
    """A Mamba2 of the same width with as many parameters as whole layers allow."""
    heads = 2 * config.dim // 64 if config.dim % 32 == 0 and config.dim >= 64 else 2
    settings = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_heads": heads,
        "head_dim": 2 * config.dim // heads,
        "n_groups": 1,
        "state_size": 64,
        "expand": 2,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    return with_layers(settings, target, mamba2)


def qwen3_next_settings(config: TitansConfig, target: int) -> dict[str, Any]:
    """Gated DeltaNet layers of the same number, width and heads; the SwiGLU takes the rest."""
    head = config.dim // config.heads
    settings = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": 8,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": head,
        "linear_num_key_heads": config.heads,
        "linear_num_value_heads": config.heads,
        "linear_key_head_dim": head,
        "linear_value_head_dim": head,
        "layer_types": ["linear_attention"] * config.layers,
        "mlp_only_layers": list(range(config.layers)),
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    left = target - count(qwen3_next, settings)
    settings["intermediate_size"] = max(8, 8 + round(left / (config.layers * 3 * config.dim)))
    return settings


def with_layers(
    settings: dict[str, Any], target: int, make: Callable[[dict[str, Any]], nn.Module]
) -> dict[str, Any]:
    """The settings with the number of layers that comes nearest to `target` parameters."""
    one, two = (count(make, {**settings, "num_hidden_layers": n}) for n in (1, 2))
    layers = max(1, 1 + round((target - one) / (two - one)))
    return {**settings, "num_hidden_layers": layers}


def count(make: Callable[[C], nn.Module], settings: C) -> int:
    """Distinct parameters of a model, built without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(settings).parameters())
