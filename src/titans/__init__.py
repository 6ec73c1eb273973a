"""Titans: neural memory that learns at test time."""

from titans import ops
from titans.config import MemoryConfig, TitansConfig
from titans.generate import Sampling, decode_one, generate, prefill, stream
from titans.layers.memory import MemoryState, NeuralMemory
from titans.models.lm import TitansLM, load
from titans.presets import preset, preset_names
from titans.state import ModelState

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
    "stream",
]
__version__ = "0.1.0"
