"""Short-term memory: causal softmax attention through `scaled_dot_product_attention`.

Both forms keep a cache of fixed size and see a learned prefix (persistent tokens) from every
position. The prefix has no position: token queries meet it unrotated, so its weight does not
drift as a stream grows. Since one softmax covers both, rotated and plain halves are
concatenated along the head size: q' = [rot(q), q], k'_token = [rot(k), 0], k'_prefix = [0, k].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from titans.distributed import Peers
from titans.ops.tracing import is_transformed
from titans.state import State

FUSED_FROM = 256  # queries of a block; shorter ones take as long


@dataclass(frozen=True, kw_only=True)
class WindowState(State):
    """The last window - 1 keys and values (zeros before the text began) and the prefix's.

    keys, values, prefix_keys, prefix_values: (B, H, tokens, D). position: tokens read; integers
    (B,) where the rows of a batch have read differently many.
    """

    keys: Tensor
    values: Tensor
    prefix_keys: Tensor
    prefix_values: Tensor
    position: int | Tensor


class SlidingWindowAttention(nn.Module):
    """Token t attends to the tokens t - window + 1 ... t and to the prefix.

    Blocked: a block of `window` queries sees its own and the previous block's keys, so the
    cost is linear in the length and no T x T mask exists.
    """

    def __init__(self, dim: int, heads: int, window: int, rope_base: float) -> None:
        super().__init__()
        self.heads, self.window, self.rope_base = heads, window, rope_base
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def init_state(self, prefix: Float[Tensor, "b p d"]) -> WindowState:
        """State before the first token; the prefix is what every token sees."""
        # In the weights' dtype, also under autocast; cloned, so that no view keeps q alive.
        _, k, v = (x.to(self.qkv.weight.dtype).clone() for x in self.project(prefix))
        tail = self.window - 1
        empty = k.new_zeros(k.shape[0], self.heads, tail, k.shape[3])
        return WindowState(
            keys=empty, values=empty.clone(), prefix_keys=k, prefix_values=v, position=0
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        return q, k, v

    def forward(
        self, x: Float[Tensor, "b t d"], state: WindowState, peers: Peers | None = None
    ) -> tuple[Float[Tensor, "b t d"], WindowState]:
        """peers: x is a slice of a text of which they hold the others."""
        q, k, v = self.project(x)
        length, tail = x.shape[1], self.window - 1
        if peers is not None:
            state = replace(state, position=state.position + peers.rank * length)
        begin = state.position
        begin = begin[:, None, None] if isinstance(begin, Tensor) else begin
        positions = begin + torch.arange(length, device=x.device)
        rotated, k = rotate(q, positions, self.rope_base), rotate(k, positions, self.rope_base)
        if peers is not None:
            state = replace(
                state,
                keys=peers.before(k, state.keys, 2),
                values=peers.before(v, state.values, 2),
            )
        k, v = (
            torch.cat([state.keys.to(k.dtype), k], 2),
            torch.cat([state.values.to(v.dtype), v], 2),
        )
        y = self.attend(q, rotated, k, v, state)
        after = WindowState(
            # Cloned: a view would keep the whole piece of text alive.
            keys=k[:, :, k.shape[2] - tail :].to(state.keys.dtype).clone(),
            values=v[:, :, v.shape[2] - tail :].to(state.values.dtype).clone(),
            prefix_keys=state.prefix_keys,
            prefix_values=state.prefix_values,
            position=state.position + length,
        )
        return self.output(rearrange(y, "b h t d -> b t (h d)")), after

    def attend(
        self, q: Tensor, rotated: Tensor, k: Tensor, v: Tensor, state: WindowState
    ) -> Tensor:
        """Blocked attention; k and v begin window - 1 tokens before the queries."""
        length, tail = q.shape[2], self.window - 1
        block = min(length, self.window)
        blocks = -(-length // block)
        missing = blocks * block - length  # zero rows at the end: seen by no real query
        q, rotated, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, rotated, k, v))
        split = "b h (n t) d -> b n h t d"
        q, rotated = (rearrange(x, split, t=block) for x in (q, rotated))
        k, v = (
            rearrange(x.unfold(2, tail + block, block), "b h n d t -> b n h t d") for x in (k, v)
        )
        begin = state.position
        begin = begin[:, None] if isinstance(begin, Tensor) else begin
        mask = window_mask(blocks, block, self.window, begin, q.device)
        y = attend_with_prefix(q, rotated, k, v, state.prefix_keys, state.prefix_values, mask)
        return rearrange(y, "b n h t d -> b h (n t) d")[:, :, :length]


@dataclass(frozen=True, kw_only=True)
class SegmentState(State):
    """The open segment of MAC: rotated keys and values (B, H, segment, D) of its tokens and
    of its memory tokens, zeros where nothing was read yet. offset: tokens of it read."""

    keys: Tensor
    values: Tensor
    memory_keys: Tensor
    memory_values: Tensor
    offset: int


class SegmentAttention(nn.Module):
    """MAC's attention over [prefix || h || segment], causal inside the segment (v1 eq. 22-23).

    Token i sees the prefix, the memory tokens h_j and the tokens s_j with j <= i. h_j has the
    rotary position of s_j; the order in which the paper writes them matters in no other way.
    """

    def __init__(self, dim: int, heads: int, segment: int, stride: int, rope_base: float) -> None:
        super().__init__()
        self.heads, self.segment, self.stride = heads, segment, stride
        self.rope_base = rope_base
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def init_state(self, batch_size: int) -> SegmentState:
        weight = self.qkv.weight
        size = weight.shape[0] // (3 * self.heads)

        def empty(length: int) -> Tensor:
            return weight.new_zeros(batch_size, self.heads, length, size)

        notes = self.segment // self.stride
        return SegmentState(
            keys=empty(self.segment),
            values=empty(self.segment),
            memory_keys=empty(notes),
            memory_values=empty(notes),
            offset=0,
        )

    def project(self, x: Float[Tensor, "b t d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, D) before their rotation."""
        q, k, v = rearrange(self.qkv(x), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        return q, k, v

    def forward(
        self,
        qkv: Sequence[Float[Tensor, "b h t k"]],
        memory: Float[Tensor, "b n d"],
        prefix: Sequence[Float[Tensor, "_ h p k"]],
        state: SegmentState,
    ) -> tuple[Float[Tensor, "b t d"], SegmentState]:
        """qkv: of `project`, for tokens of one segment from state.offset on; memory: the h_j
        among them; prefix: keys and values of the persistent tokens.

        h_j belongs to token j = 0, stride, 2 stride, ... of the segment.
        """
        (q, k, v), (pk, pv) = qkv, prefix
        begin, end = state.offset, state.offset + q.shape[2]
        weight = self.qkv.weight[self.qkv.weight.shape[0] // 3 :]  # no queries of memory tokens
        hk, hv = rearrange(F.linear(memory, weight), "b t (n h d) -> n b h t d", n=2, h=self.heads)
        positions = torch.arange(begin, end, device=q.device)
        first, last = -(-begin // self.stride), -(-end // self.stride)
        owners = torch.arange(first, last, device=q.device) * self.stride
        rotated, k = rotate(q, positions, self.rope_base), rotate(k, positions, self.rope_base)
        hk = rotate(hk, owners, self.rope_base)

        keys, values = fill(state.keys, k, begin), fill(state.values, v, begin)
        notes_k, notes_v = (
            fill(state.memory_keys, hk, first),
            fill(state.memory_values, hv, first),
        )
        all_positions = torch.arange(end, device=q.device)
        sources = torch.cat([torch.arange(last, device=q.device) * self.stride, all_positions])
        mask = sources[None, :] <= positions[:, None]
        y = attend_with_prefix(
            q,
            rotated,
            torch.cat([notes_k[:, :, :last], keys[:, :, :end]], 2),
            torch.cat([notes_v[:, :, :last], values[:, :, :end]], 2),
            pk,
            pv,
            mask,
        )
        after = SegmentState(
            keys=keys.to(state.keys.dtype),
            values=values.to(state.values.dtype),
            memory_keys=notes_k.to(state.memory_keys.dtype),
            memory_values=notes_v.to(state.memory_values.dtype),
            offset=end % self.segment,
        )
        return self.output(rearrange(y, "b h t d -> b t (h d)")), after


def attend_with_prefix(
    q: Float[Tensor, "*b h t d"],
    rotated: Float[Tensor, "*b h t d"],
    k: Float[Tensor, "*b h s d"],
    v: Float[Tensor, "*b h s d"],
    prefix_k: Float[Tensor, "c h p d"],
    prefix_v: Float[Tensor, "c h p d"],
    mask: Bool[Tensor, "*m t s"],
) -> Float[Tensor, "*b h t d"]:
    """One softmax over the prefix (position-free) and the tokens (rotary, masked)."""
    size = q.shape[-1]
    if prefix_k.shape[2] == 0:
        return fused_attention(rotated, k, v, mask, size)
    if q.ndim == 5:  # blocked: the prefix is the same in every block
        prefix_k, prefix_v = prefix_k[:, None], prefix_v[:, None]
    prefix_k, prefix_v = (
        p.to(q.dtype).expand(*q.shape[:-2], *p.shape[-2:]) for p in (prefix_k, prefix_v)
    )
    zero_k, zero_p = torch.zeros_like(k), torch.zeros_like(prefix_k)
    queries = torch.cat([rotated, q], -1)
    keys = torch.cat([torch.cat([zero_p, prefix_k], -1), torch.cat([k, zero_k], -1)], -2)
    values = torch.cat([prefix_v, v], -2)
    mask = F.pad(mask, (prefix_k.shape[-2], 0), value=True)
    return fused_attention(queries, keys, values, mask, size)


def fused_attention(
    q: Float[Tensor, "*b h t k"],
    k: Float[Tensor, "*b h s k"],
    v: Float[Tensor, "*b h s d"],
    mask: Bool[Tensor, "*m t s"],
    size: int,
) -> Float[Tensor, "*b h t d"]:
    """softmax(q k^T / sqrt(size)) v, in the form that PyTorch has fused kernels for (one batch
    dimension, values as wide as keys). On a CPU that is for long blocks that nothing
    differentiates: training gains little, and those kernels have no second derivative."""
    batch, width = q.shape[:-3], v.shape[-1]
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    plain = q.shape[-2] < FUSED_FROM or differentiated or is_transformed()
    if q.device.type == "cpu" and plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=size**-0.5)
    if len(batch) > 1:
        mask = mask.expand(*batch, *mask.shape[-3:])
        q, k, v, mask = (x.flatten(0, len(batch) - 1) for x in (q, k, v, mask))
    v = F.pad(v, (0, q.shape[-1] - width))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=size**-0.5)
    return y[..., :width].unflatten(0, batch) if len(batch) > 1 else y[..., :width]


def window_mask(
    blocks: int,
    block: int,
    window: int,
    position: int | Int[Tensor, "b 1"],
    device: torch.device,
) -> Bool[Tensor, "*b n 1 t s"]:
    """mask[..., n, 0, t, s]: may query t of block n see key s of its slice?

    The slice of block n begins window - 1 tokens before the block; keys before the text
    began (absolute position below 0) are never seen.
    """
    t = torch.arange(block, device=device)
    s = torch.arange(window - 1 + block, device=device)
    distance = t[:, None] + window - 1 - s[None, :]
    seen = (distance >= 0) & (distance < window)
    begins = position - (window - 1) + block * torch.arange(blocks, device=device)
    exists = begins[..., None] + s >= 0
    return (seen & exists[..., None, :]).unsqueeze(-3)


def rotate(x: Float[Tensor, "*b t d"], positions: Tensor, base: float) -> Float[Tensor, "*b t d"]:
    """Rotary position embedding. Angles in float64: position 10 million still has all digits."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions.double()[..., None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def fill(buffer: Tensor, rows: Tensor, start: int) -> Tensor:
    """The (B, H, length, D) buffer with `rows` written from `start` on, as a new tensor."""
    stop = start + rows.shape[2]
    return torch.cat(
        [buffer[:, :, :start].to(rows.dtype), rows, buffer[:, :, stop:].to(rows.dtype)], 2
    )
