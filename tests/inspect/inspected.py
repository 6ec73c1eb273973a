"""Small models of every kind, with memories that do something on random tokens."""

import torch
from torch import Tensor

from titans import MemoryConfig, TitansConfig, TitansLM

VOCABULARY = 40
MEMORIES: dict[str, MemoryConfig] = {
    "linear": MemoryConfig(heads=2),
    "linear, momentum": MemoryConfig(heads=2, momentum=True),
    "linear, paper": MemoryConfig(
        heads=2, momentum=True, gates="sigmoid", decay_target="zero", half_life_min=4.0
    ),
    "deep": MemoryConfig(
        heads=2, depth=2, expansion=2, chunk_size=4, residual=True, norm=True, decay="channel"
    ),
    "deep, momentum": MemoryConfig(
        heads=2,
        depth=2,
        expansion=2,
        chunk_size=4,
        momentum=True,
        per_layer_gates=True,
        half_life_min=4.0,
    ),
    "no decay": MemoryConfig(heads=2, decay="none", gate_input="window"),
}
VARIANTS = ("lmm", "mac", "mag", "mal")
# Every variant with two memories, every memory with two variants.
MODELS = [
    ("lmm", "linear"),
    ("mac", "linear"),
    ("mag", "linear, momentum"),
    ("mal", "linear, momentum"),
    ("lmm", "linear, paper"),
    ("mag", "linear, paper"),
    ("mac", "deep"),
    ("mal", "deep"),
    ("mac", "deep, momentum"),
    ("mag", "deep, momentum"),
    ("lmm", "no decay"),
    ("mal", "no decay"),
]


def build(variant: str, memory: str = "linear") -> TitansLM:
    """A float64 model whose gates, M_0 and persistent tokens are not at their initial values."""
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant,
        vocab_size=VOCABULARY,
        dim=16,
        layers=2,
        heads=2,
        ffn_hidden=24,
        window=5,
        segment=6,
        persistent=2,
        memory=MEMORIES[memory],
    )
    model = TitansLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gates.map.weight" in name or ".memory.initial." in name:
                parameter += 0.3 * torch.randn_like(parameter)
            if name == "embedding.weight":
                parameter.mul_(10.0)
    return model


def text(length: int, batch: int = 1, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)
