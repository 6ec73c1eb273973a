"""MAL, memory as layer: the memory first, attention on what it returns (v1 eq. 29-31)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.distributed import Peers
from titans.layers.attention import SlidingWindowAttention, WindowState
from titans.layers.memory import MemoryRecord, MemoryState, NeuralMemory
from titans.models.parts import PersistentTokens
from titans.state import State


@dataclass(frozen=True, kw_only=True)
class MALState(State):
    memory: MemoryState
    attention: WindowState


class MALMixer(nn.Module):
    """x~ = [persistent || x]; y = M(x~); o = SlidingWindow(y).

    With a residual connection around the memory ("in all blocks we use residual connections"),
    so that attention sees the tokens as well as what the memory says of them.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.persistent = PersistentTokens(config)
        self.memory = NeuralMemory(config.memory)
        self.norm = nn.RMSNorm(config.dim)
        self.attention = SlidingWindowAttention(
            config.dim, config.heads, config.window, config.rope_base
        )

    def init_state(self, batch_size: int) -> MALState:
        prefix = self.persistent(batch_size)
        memory = self.memory.init_state(batch_size)
        y = prefix
        if prefix.shape[1]:
            read, memory, _ = self.memory.run(prefix, memory)
            y = prefix + read
        return MALState(memory=memory, attention=self.attention.init_state(self.norm(y)))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: MALState,
        write: bool = True,
        peers: Peers | None = None,
    ) -> tuple[Float[Tensor, "b t d"], MALState, MemoryRecord]:
        read, memory, record = self.memory.run(x, state.memory, write, peers)
        y = x + read
        o, attention = self.attention(self.norm(y), state.attention, peers)
        return read + o, MALState(memory=memory, attention=attention), record
