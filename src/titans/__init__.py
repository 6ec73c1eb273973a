"""Titans: neural memory that learns at test time.

`titans.adapt` and `titans.load_adapter` need the extra `hf`, and are imported when first used.
"""

from typing import TYPE_CHECKING, Any

from titans import ops
from titans.config import MemoryConfig, TitansConfig
from titans.generate import Sampling, decode_one, generate, prefill, stream
from titans.layers.memory import MemoryState, NeuralMemory
from titans.models.lm import TitansLM, load
from titans.presets import preset, preset_names
from titans.registry import register
from titans.state import ModelState

if TYPE_CHECKING:
    from titans.hf.adapter import adapt as adapt
    from titans.hf.adapter import load_adapter as load_adapter

__all__ = [
    "MemoryConfig",
    "MemoryState",
    "ModelState",
    "NeuralMemory",
    "Sampling",
    "TitansConfig",
    "TitansLM",
    "decode_one",
    "generate",
    "load",
    "ops",
    "prefill",
    "preset",
    "preset_names",
    "register",
    "stream",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("adapt", "load_adapter"):
        from titans.hf import adapter

        return getattr(adapter, name)
    raise AttributeError(f"module 'titans' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "adapt", "load_adapter"]
