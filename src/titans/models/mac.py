"""MAC, memory as context: attention over what the memory recalls and the segment (v1 eq. 21-25)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.layers.attention import SegmentAttention, SegmentState
from titans.layers.memory import MemoryRecord, MemoryState, NeuralMemory
from titans.models.parts import Combine, PersistentTokens
from titans.state import State


@dataclass(frozen=True, kw_only=True)
class MACState(State):
    """memory: after the last token. recalled: its weights when the open segment began, which
    every h of the segment reads. tail: of the convolution of its queries."""

    memory: MemoryState
    recalled: tuple[Tensor, ...]
    attention: SegmentState
    tail: Tensor | None


class MACMixer(nn.Module):
    """For a segment S^(t): h = M*_{t-1}(S W_Q), with the memory's own projections;
    y = Attn([persistent || h || S]); M_t = M_{t-1}(y), the attention's output is what is
    written; o = y (x) M*(y).

    Causal: position i attends to h_j and s_j with j <= i, and reads the memory as it is after
    token i, never that of the whole segment.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.segment, self.stride = config.segment, config.memory_token_stride
        self.persistent = PersistentTokens(config)
        self.attention = SegmentAttention(
            config.dim, config.heads, config.segment, self.stride, config.rope_base
        )
        self.memory = NeuralMemory(config.memory)
        self.combine = Combine(config)
        self.output = nn.Linear(config.dim, config.dim, bias=False)

    def init_state(self, batch_size: int) -> MACState:
        memory = self.memory.init_state(batch_size)
        return MACState(
            memory=memory,
            recalled=memory.rule.weights,
            attention=self.attention.init_state(batch_size),
            tail=self.memory.init_recall_tail(batch_size),
        )

    def forward(
        self, x: Float[Tensor, "b t d"], state: MACState, write: bool = True
    ) -> tuple[Float[Tensor, "b t d"], MACState, MemoryRecord]:
        outputs, records = [], []
        start = 0
        while start < x.shape[1]:
            stop = min(start + self.segment - state.attention.offset, x.shape[1])
            o, state, record = self.read_segment(x[:, start:stop], state, write)
            outputs.append(o)
            records.append(record)
            start = stop
        return torch.cat(outputs, 1), state, join_records(records)

    def read_segment(
        self, x: Tensor, state: MACState, write: bool
    ) -> tuple[Tensor, MACState, MemoryRecord]:
        """Tokens of one segment (maybe only a part of it)."""
        if state.attention.offset == 0:
            state = replace(state, recalled=state.memory.rule.weights)
        h, tail = self.memory.recall(x, state.recalled, state.tail)  # eq. 21
        first = (-state.attention.offset) % self.stride
        prefix = self.persistent(x.shape[0])
        y, attention = self.attention(x, h[:, first :: self.stride], prefix, state.attention)
        m, memory, record = self.memory.run(y, state.memory, write)  # eq. 24
        o = self.output(self.combine(y, m))  # eq. 25
        return o, replace(state, memory=memory, attention=attention, tail=tail), record


def join_records(records: list[MemoryRecord]) -> MemoryRecord:
    """Records of consecutive tokens as one."""

    def join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
        present = [p for p in parts if p is not None]
        return torch.cat(present, 1) if present else None

    columns = [join(parts) for parts in zip(*records, strict=True)]
    return MemoryRecord(*columns)  # type: ignore[arg-type]
