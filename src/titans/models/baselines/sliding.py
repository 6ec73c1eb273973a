"""Sliding attention only: the same block without a long-term memory."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.distributed import Peers
from titans.layers.attention import SlidingWindowAttention, WindowState
from titans.models.parts import PersistentTokens
from titans.state import State


@dataclass(frozen=True, kw_only=True)
class SlidingState(State):
    attention: WindowState


class SlidingMixer(nn.Module):
    """o = SlidingWindow([persistent || x])."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.persistent = PersistentTokens(config)
        self.attention = SlidingWindowAttention(
            config.dim, config.heads, config.window, config.rope_base
        )

    def init_state(self, batch_size: int) -> SlidingState:
        return SlidingState(attention=self.attention.init_state(self.persistent(batch_size)))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: SlidingState,
        write: bool = True,
        peers: Peers | None = None,
    ) -> tuple[Float[Tensor, "b t d"], SlidingState, None]:
        y, attention = self.attention(x, state.attention, peers)
        return y, SlidingState(attention=attention), None
