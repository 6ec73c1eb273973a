"""Transformer++: causal attention over everything read so far."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.distributed import Peers, check_heads
from titans.layers.attention import rotate
from titans.state import State


@dataclass(frozen=True, kw_only=True)
class CacheState(State):
    """Keys (rotated) and values of all tokens read, (B, H, T, D). The one state that grows."""

    keys: Tensor
    values: Tensor


class TransformerMixer(nn.Module):
    """softmax(q k / sqrt(D)) v with rotary positions, as in Llama; no persistent tokens."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.heads, self.rope_base = config.heads, config.rope_base
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim, bias=False)

    def init_state(self, batch_size: int) -> CacheState:
        weight = self.qkv.weight
        empty = weight.new_zeros(batch_size, self.heads, 0, weight.shape[0] // (3 * self.heads))
        return CacheState(keys=empty, values=empty.clone())

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: CacheState,
        write: bool = True,
        peers: Peers | None = None,
    ) -> tuple[Float[Tensor, "b t d"], CacheState, None]:
        """write is for memories: what was read is in the cache with either."""
        q, k, v = rearrange(self.qkv(x), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        if peers is not None:  # all tokens of some of the heads
            check_heads(self.heads, peers)
            q, k, v = (peers.to_heads(part.transpose(1, 2)).transpose(1, 2) for part in (q, k, v))
            state = state.map(lambda part: peers.own(part, 1))
        past, length = state.keys.shape[2], q.shape[2]
        positions = torch.arange(past, past + length, device=x.device)
        q, k = (rotate(part, positions, self.rope_base) for part in (q, k))
        k = torch.cat([state.keys.to(k.dtype), k], 2)
        v = torch.cat([state.values.to(v.dtype), v], 2)
        mask = None
        if past and length > 1:
            mask = torch.ones(length, past + length, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not past)
        after = CacheState(keys=k.to(state.keys.dtype), values=v.to(state.values.dtype))
        if peers is not None:
            y = peers.to_tokens(y.transpose(1, 2)).transpose(1, 2)
            after = after.map(lambda part: peers.gather(part, 1))
        return self.output(rearrange(y, "b h t d -> b t (h d)")), after, None
