"""The rule as pure functions on tensors. Start with `api.py`; README.md has the mathematics."""

from titans.ops.api import neural_memory, read_memory
from titans.ops.networks import MemoryNetwork, Network
from titans.ops.own import Optimizer, Retention
from titans.ops.rule import MemoryOutput, RuleState

__all__ = [
    "MemoryNetwork",
    "MemoryOutput",
    "Network",
    "Optimizer",
    "Retention",
    "RuleState",
    "neural_memory",
    "read_memory",
]
