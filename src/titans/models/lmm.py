"""LMM: the neural memory alone as the sequence mixer."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.distributed import Peers
from titans.layers.memory import MemoryRecord, MemoryState, NeuralMemory
from titans.models.parts import PersistentTokens
from titans.state import State


@dataclass(frozen=True, kw_only=True)
class LMMState(State):
    memory: MemoryState


class LMMMixer(nn.Module):
    """y = M([persistent || x]); the persistent tokens are read once, before the first token."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.persistent = PersistentTokens(config)
        self.memory = NeuralMemory(config.memory)

    def init_state(self, batch_size: int) -> LMMState:
        memory = self.memory.init_state(batch_size)
        prefix = self.persistent(batch_size)
        if prefix.shape[1]:
            _, memory, _ = self.memory.run(prefix, memory)
        return LMMState(memory=memory)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: LMMState,
        write: bool = True,
        peers: Peers | None = None,
    ) -> tuple[Float[Tensor, "b t d"], LMMState, MemoryRecord]:
        y, memory, record = self.memory.run(x, state.memory, write, peers)
        return y, LMMState(memory=memory), record
