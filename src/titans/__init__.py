"""Titans: neural memory that learns at test time."""

from titans.config import MemoryConfig, TitansConfig
from titans.layers.memory import MemoryState, NeuralMemory
from titans.models.lm import TitansLM, load
from titans.state import ModelState

__all__ = [
    "MemoryConfig",
    "MemoryState",
    "ModelState",
    "NeuralMemory",
    "TitansConfig",
    "TitansLM",
    "load",
]
__version__ = "0.1.0"
