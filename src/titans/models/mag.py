"""MAG, memory as gate: attention and memory side by side (v1 eq. 26-28)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.distributed import Peers
from titans.layers.attention import SlidingWindowAttention, WindowState
from titans.layers.memory import MemoryRecord, MemoryState, NeuralMemory
from titans.models.parts import Combine, PersistentTokens, combine_output
from titans.state import State


@dataclass(frozen=True, kw_only=True)
class MAGState(State):
    memory: MemoryState
    attention: WindowState


class MAGMixer(nn.Module):
    """x~ = [persistent || x]; y = SlidingWindow(x~); o = y (x) M(x~).

    The attention sees the persistent tokens from everywhere; the memory reads them first.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.persistent = PersistentTokens(config)
        self.attention = SlidingWindowAttention(
            config.dim, config.heads, config.window, config.rope_base
        )
        self.memory = NeuralMemory(config.memory)
        self.combine = Combine(config)
        self.output = combine_output(config)

    def init_state(self, batch_size: int) -> MAGState:
        prefix = self.persistent(batch_size)
        memory = self.memory.init_state(batch_size)
        if prefix.shape[1]:
            _, memory, _ = self.memory.run(prefix, memory)
        return MAGState(memory=memory, attention=self.attention.init_state(prefix))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: MAGState,
        write: bool = True,
        peers: Peers | None = None,
    ) -> tuple[Float[Tensor, "b t d"], MAGState, MemoryRecord]:
        y, attention = self.attention(x, state.attention, peers)
        m, memory, record = self.memory.run(x, state.memory, write, peers)
        o = self.output(self.combine(y, m))
        return o, MAGState(memory=memory, attention=attention), record
