"""Baselines that are settings of the one rule: the memory layer alone, as in LMM."""

from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.distributed import Peers
from titans.layers.memory import MemoryRecord, NeuralMemory
from titans.models.lmm import LMMState


class RuleMixer(nn.Module):
    """y = M(x), with the settings of `titans.baselines`; no persistent tokens."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.memory = NeuralMemory(config.memory)

    def init_state(self, batch_size: int) -> LMMState:
        return LMMState(memory=self.memory.init_state(batch_size))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: LMMState,
        write: bool = True,
        peers: Peers | None = None,
    ) -> tuple[Float[Tensor, "b t d"], LMMState, MemoryRecord]:
        y, memory, record = self.memory.run(x, state.memory, write, peers)
        return y, LMMState(memory=memory), record
