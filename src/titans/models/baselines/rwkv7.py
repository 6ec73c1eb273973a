"""RWKV-7's time mixing, with the memory of `titans.ops.rwkv7`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.layers.memory import linear
from titans.ops.rwkv7 import rwkv7
from titans.ops.tokens import unit_norm
from titans.state import State

DECAY_SPEED = math.exp(-0.5)  # the fastest decay a channel may have: exp(-0.61) = 0.55 a token
NORM_EPS = 64e-5


@dataclass(frozen=True, kw_only=True)
class RWKV7State(State):
    """shift: the last token (B, 1, dim). memory: (B, H, D, D), at least float32."""

    shift: Tensor
    memory: Tensor


class RWKV7Mixer(nn.Module):
    """Peng et al., RWKV-7 "Goose", section 4.1, without its residual of the first layer's values.

    Every projection reads its own blend of a token and the one before. `heads` heads.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.heads, dim = config.heads, config.dim
        rank = 8 * max(1, round(1.8 * dim**0.5 / 8))  # the size the authors recommend
        self.blend = nn.Parameter(torch.empty(6, dim))
        self.receptance, self.key, self.value, self.output = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.decay, self.rate = (LowRank(dim, rank, bias=True) for _ in range(2))
        self.gate = LowRank(dim, rank, bias=False)
        self.removal_scale = nn.Parameter(torch.empty(dim))
        self.replacement = nn.Parameter(torch.empty(dim))
        self.bonus = nn.Parameter(torch.empty(dim))
        self.norm_gain = nn.Parameter(torch.empty(dim))
        self.norm_bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Within each head the channels' decays are spread from half-lives of 6 to 760 tokens."""
        dim = self.blend.shape[1]
        with torch.no_grad():
            self.blend.copy_(torch.linspace(1.0, 0.0, dim).expand(6, dim))
            spread = torch.linspace(-6.5, -1.5, dim // self.heads)
            self.decay.expand.bias.copy_(spread.repeat(self.heads))
            self.rate.expand.bias.zero_()
        for parameter in (self.removal_scale, self.replacement, self.norm_gain):
            nn.init.ones_(parameter)
        for parameter in (self.bonus, self.norm_bias):
            nn.init.zeros_(parameter)

    def init_state(self, batch_size: int) -> RWKV7State:
        like = self.blend
        dim = like.shape[1]
        size = len(self.bonus) // self.heads
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return RWKV7State(
            shift=like.new_zeros(batch_size, 1, dim),
            memory=like.new_zeros(batch_size, self.heads, size, size, dtype=wide),
        )

    def forward(
        self, x: Float[Tensor, "b t d"], state: RWKV7State, write: bool = True
    ) -> tuple[Float[Tensor, "b t d"], RWKV7State, None]:
        before = torch.cat([state.shift.to(x.dtype), x[:, :-1]], 1)
        for_r, for_w, for_k, for_v, for_a, for_g = (
            x + (before - x) * blend.to(x.dtype) for blend in self.blend
        )
        r, k, v = self.receptance(for_r), self.key(for_k), self.value(for_v)
        decay = torch.exp(-DECAY_SPEED * torch.sigmoid(self.decay(for_w, torch.tanh)))
        rate = torch.sigmoid(self.rate(for_a))
        removal = unit_norm(self.split(k * self.removal_scale.to(k.dtype)))
        k = k * torch.lerp(torch.ones_like(rate), rate, self.replacement.to(rate.dtype)).to(k.dtype)
        r, k, v = self.split(r), self.split(k), self.split(v)
        if write:
            read, memory = rwkv7(
                r, self.split(decay), k, v, removal, self.split(rate), state.memory
            )
        else:
            memory = state.memory
            read = einsum(r.to(memory.dtype), memory, "b t h k, b h k v -> b t h v").to(r.dtype)
        y = self.emit(read, r, k, v) * self.gate(for_g, torch.sigmoid).to(x.dtype)
        # Cloned: a view would keep the whole piece of text alive.
        shift = x[:, -1:].to(state.shift.dtype).clone()
        return self.output(y), RWKV7State(shift=shift, memory=memory), None

    def split(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h c"]:
        return rearrange(x, "b t (h c) -> b t h c", h=self.heads)

    def emit(self, read: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """LayerNorm per head, plus the token's own value as far as its r and k agree."""
        y = F.layer_norm(read, read.shape[-1:], eps=NORM_EPS)
        y = rearrange(y, "b t h c -> b t (h c)")
        y = y * self.norm_gain.to(y.dtype) + self.norm_bias.to(y.dtype)
        bonus = self.bonus.unflatten(0, (self.heads, -1)).to(r.dtype)
        own = (r * k * bonus).sum(-1, keepdim=True) * v
        return y + rearrange(own, "b t h c -> b t (h c)")


class LowRank(nn.Module):
    """act(x A) B + bias, in at least float32."""

    def __init__(self, dim: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.squeeze = nn.Linear(dim, rank, bias=False)
        self.expand = nn.Linear(rank, dim, bias=bias)

    def forward(
        self, x: Float[Tensor, "b t d"], activation: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "b t d"]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            hidden = linear(self.squeeze, x.to(wide))
            return linear(self.expand, hidden if activation is None else activation(hidden))
