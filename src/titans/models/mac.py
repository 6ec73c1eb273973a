"""MAC, memory as context: attention over what the memory recalls and the segment (v1 eq. 21-25)."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.layers.attention import SegmentAttention, SegmentState
from titans.layers.memory import MemoryRecord, MemoryState, NeuralMemory
from titans.models.parts import Combine, PersistentTokens, combine_output
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
    y = S + Attn([persistent || h || S]); M_t = M_{t-1}(y), the attention's output is what is
    written; o = y (x) M*(y).

    With a residual connection around the attention ("in all blocks we use residual connections"):
    else the memory's input is an average of many tokens, and it learns to read much later.

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
        self.output = combine_output(config)

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
        # All that needs no memory is computed for the whole text, not segment by segment.
        queries, tail = self.memory.recall_queries(x, state.tail)
        gate = self.memory.opening(x)
        qkv = self.attention.project(x)
        prefix = self.attention.project(self.persistent(1))[1:]  # of every row
        # Split once: each slice's gradient would be a whole text of zeros.
        sizes = self.pieces(state.attention.offset, x.shape[1])
        gates = [None] * len(sizes) if gate is None else gate.split(sizes, 1)
        tokens = zip(*(p.split(sizes, 2) for p in qkv), strict=True)
        parts = zip(x.split(sizes, 1), queries.split(sizes, 1), gates, tokens, strict=True)
        attended, read, records = [], [], []
        for part, query, opening, own in parts:
            if state.attention.offset == 0:
                state = replace(state, recalled=state.memory.rule.weights)
            owners = slice((-state.attention.offset) % self.stride, None, self.stride)
            opening = None if opening is None else opening[:, owners]
            h = self.memory.recall(query[:, owners], opening, state.recalled)  # eq. 21
            y, attention = self.attention(own, h, prefix, state.attention)
            y = part + y
            m, memory, record = self.memory.run(y, state.memory, write)  # eq. 24
            state = replace(state, memory=memory, attention=attention)
            attended.append(y)
            read.append(m)
            records.append(record)
        o = self.output(self.combine(torch.cat(attended, 1), torch.cat(read, 1)))  # eq. 25
        return o, replace(state, tail=tail), join_records(records)

    def pieces(self, offset: int, length: int) -> list[int]:
        """Sizes that cut a text at the segments' ends, the first `offset` tokens into one."""
        ends = [*range(self.segment - offset, length, self.segment), length]
        return [end - begin for begin, end in pairwise([0, *ends])]


def join_records(records: list[MemoryRecord]) -> MemoryRecord:
    """Records of consecutive tokens as one."""

    def join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
        present = [p for p in parts if p is not None]
        return torch.cat(present, 1) if present else None

    columns = [join(parts) for parts in zip(*records, strict=True)]
    return MemoryRecord(*columns)  # type: ignore[arg-type]
