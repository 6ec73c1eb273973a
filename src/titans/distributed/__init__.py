"""One text, or one model's heads, spread over several processes: exact, gradients included."""

from titans.distributed.cut import Cut
from titans.distributed.peers import Peers
from titans.distributed.rule import check_heads, composes, neural_memory_sliced

__all__ = ["Cut", "Peers", "check_heads", "composes", "neural_memory_sliced"]
