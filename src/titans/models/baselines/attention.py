"""Attention only: the same block without a long-term memory."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.layers.attention import SlidingWindowAttention, WindowState
from titans.models.parts import PersistentTokens
from titans.state import State


@dataclass(frozen=True, kw_only=True)
class AttentionState(State):
    attention: WindowState


class AttentionMixer(nn.Module):
    """o = SlidingWindow([persistent || x])."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.persistent = PersistentTokens(config)
        self.attention = SlidingWindowAttention(
            config.dim, config.heads, config.window, config.rope_base
        )

    def init_state(self, batch_size: int) -> AttentionState:
        return AttentionState(attention=self.attention.init_state(self.persistent(batch_size)))

    def forward(
        self, x: Float[Tensor, "b t d"], state: AttentionState, write: bool = True
    ) -> tuple[Float[Tensor, "b t d"], AttentionState, None]:
        y, attention = self.attention(x, state.attention)
        return y, AttentionState(attention=attention), None
