"""One text spread over several processes, each with a slice of it: exact, gradients included."""

from titans.distributed.peers import Peers
from titans.distributed.rule import check_heads, composes, neural_memory_sliced

__all__ = ["Peers", "check_heads", "composes", "neural_memory_sliced"]
