"""Tiny bases of every family that can be adapted, and adapters with something to lose."""

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from titans import MemoryConfig
from titans.hf import AdaptedForCausalLM
from titans.hf.adapter import adapt

VOCABULARY = 40
POSITIONS = 64
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
STYLES = ("mag", "mal")
LINEAR = MemoryConfig(heads=2)
DEEP = MemoryConfig(
    heads=2, depth=2, expansion=2, norm=True, residual=True, chunk_size=4, momentum=True
)


def base(family: str = "llama", dtype: torch.dtype = torch.float64, attention: str = "sdpa"):
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "attn_implementation": attention, "dtype": dtype}
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
    }
    if family == "llama":
        config = LlamaConfig(**sizes, **common)
    elif family == "mistral":
        config = MistralConfig(**sizes, sliding_window=8, **common)
    elif family == "qwen2":  # one layer of full attention, then two that slide
        sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
        config = Qwen2Config(**sizes, **sliding, **common)
    elif family == "qwen3":
        config = Qwen3Config(**sizes, head_dim=8, **common)
    else:
        config = GPT2Config(
            n_embd=16,
            n_layer=3,
            n_head=4,
            n_positions=POSITIONS,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
            **common,
        )
    return AutoModelForCausalLM.from_config(config).eval()


def trained(
    family: str = "llama",
    style: str = "mag",
    window: int | None = None,
    memory: MemoryConfig = LINEAR,
    dtype: torch.dtype = torch.float64,
) -> AdaptedForCausalLM:
    """Memories in layers 0 and 2 that are not at their start, as if they had been trained."""
    model = adapt(base(family, dtype), [0, 2], style, memory, window)
    with torch.no_grad():
        for parameter in model.memory_parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def some_tokens(rows: int = 2, length: int = 20, seed: int = 1) -> torch.Tensor:
    """None of them 0, which `generate` is given as padding, and masks wherever it stands."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator)
