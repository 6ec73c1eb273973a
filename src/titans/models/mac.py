"""MAC, memory as context: attention over what the memory recalls and the segment (v1 eq. 21-25)."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.layers.attention import SegmentAttention, SegmentState
from titans.layers.convolution import CausalConv
from titans.layers.memory import MemoryRecord, MemoryState, NeuralMemory, unit_norm
from titans.models.parts import Combine, PersistentTokens
from titans.state import State


@dataclass(frozen=True, kw_only=True)
class MACState(State):
    """memory: after the last token. recalled: its weights when the open segment began, which
    every h of the segment reads. tail: of the query projection's convolution."""

    memory: MemoryState
    recalled: tuple[Tensor, ...]
    attention: SegmentState
    tail: Tensor | None


class MACMixer(nn.Module):
    """For a segment S^(t): h = M*_{t-1}(S W_Q); y = Attn([persistent || h || S]);
    M_t = M_{t-1}(y), the attention's output is what is written; o = y (x) M*(y).

    Causal: position i attends to h_j and s_j with j <= i, and reads the memory as it is after
    token i, never that of the whole segment.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        memory = config.memory
        self.segment, self.stride = config.segment, config.memory_token_stride
        self.heads = memory.heads
        inner = memory.heads * memory.key_dim
        self.persistent = PersistentTokens(config)
        self.query = nn.Linear(config.dim, inner, bias=False)
        self.query_conv = CausalConv(inner, memory.conv_width) if memory.conv_width else None
        self.recall_norm = nn.RMSNorm(memory.key_dim, eps=1e-5)
        self.recall_output = nn.Linear(inner, config.dim, bias=False)
        self.attention = SegmentAttention(
            config.dim, config.heads, config.segment, self.stride, config.rope_base
        )
        self.memory = NeuralMemory(memory)
        self.combine = Combine(config)
        self.output = nn.Linear(config.dim, config.dim, bias=False)

    def init_state(self, batch_size: int) -> MACState:
        memory = self.memory.init_state(batch_size)
        return MACState(
            memory=memory,
            recalled=memory.rule.weights,
            attention=self.attention.init_state(batch_size),
            tail=None if self.query_conv is None else self.query_conv.init_tail(batch_size),
        )

    def forward(
        self, x: Float[Tensor, "b t d"], state: MACState, write: bool = True
    ) -> tuple[Float[Tensor, "b t d"], MACState, MemoryRecord]:
        queries, tail = self.recall_queries(x, state.tail)
        outputs, records = [], []
        start = 0
        while start < x.shape[1]:
            stop = min(start + self.segment - state.attention.offset, x.shape[1])
            o, state, record = self.read_segment(
                x[:, start:stop], queries[:, start:stop], state, write
            )
            outputs.append(o)
            records.append(record)
            start = stop
        return torch.cat(outputs, 1), replace(state, tail=tail), join_records(records)

    def read_segment(
        self, x: Tensor, queries: Tensor, state: MACState, write: bool
    ) -> tuple[Tensor, MACState, MemoryRecord]:
        """Tokens of one segment (maybe only a part of it)."""
        if state.attention.offset == 0:
            state = replace(state, recalled=state.memory.rule.weights)
        first = (-state.attention.offset) % self.stride
        h = self.memory.recall(queries[:, first :: self.stride], state.recalled)  # eq. 21
        h = rearrange(self.recall_norm(h), "b t h d -> b t (h d)").to(x.dtype)
        prefix = self.persistent(x.shape[0])
        y, attention = self.attention(x, self.recall_output(h), prefix, state.attention)
        m, memory, record = self.memory.run(y, state.memory, write)  # eq. 24
        o = self.output(self.combine(y, m))  # eq. 25
        return o, replace(state, memory=memory, attention=attention), record

    def recall_queries(
        self, x: Tensor, tail: Tensor | None
    ) -> tuple[Float[Tensor, "b t h k"], Tensor | None]:
        q = self.query(x)
        if self.query_conv is not None:
            assert tail is not None
            q, tail = self.query_conv(q, tail)
        if self.memory.config.qkv_activation == "silu":
            q = F.silu(q)
        return unit_norm(rearrange(q, "b t (h d) -> b t h d", h=self.heads)), tail


def join_records(records: list[MemoryRecord]) -> MemoryRecord:
    """Records of consecutive tokens as one."""

    def join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
        present = [p for p in parts if p is not None]
        return torch.cat(present, 1) if present else None

    columns = [join(parts) for parts in zip(*records, strict=True)]
    return MemoryRecord(*columns)  # type: ignore[arg-type]
