"""TitansCache: what a model remembers, in the form that transformers hands from step to step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from titans.state import ModelState


@dataclass(frozen=True)
class Part:
    """Rows of a batch that have read equally many tokens, and their state, in the same order."""

    rows: tuple[int, ...]
    state: ModelState

    def pick(self, places: Sequence[int], rows: Sequence[int]) -> "Part":
        """The rows at `places` of this part, as rows `rows` of a batch."""
        if list(places) == list(range(len(self.rows))):
            return Part(tuple(rows), self.state)
        index = torch.tensor(places)
        return Part(tuple(rows), self.state.map(lambda t: t.index_select(0, index.to(t.device))))


class MemoryLayer(CacheLayerMixin):
    """The `ModelState` of a batch, all blocks in one layer.

    With padding the rows of a batch read differently many tokens: each length is a `Part`, which
    the model runs by itself. `seen` counts columns of the batch, padding included, as transformers
    does. States are never changed in place, so a copy of the layer costs nothing.
    """

    is_sliding = False

    def __init__(self, state: ModelState | None = None) -> None:
        super().__init__()
        self.parts: tuple[Part, ...] = ()
        self.seen = 0
        if state is not None:
            self.parts = (Part(tuple(range(state.batch_size)), state),)

    def __deepcopy__(self, copied: dict[int, Any]) -> "MemoryLayer":
        """Another layer with the same states: `copy.deepcopy(cache)` keeps a prompt for later."""
        layer = MemoryLayer()
        layer.parts, layer.seen = self.parts, self.seen
        return layer

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first token."""
        return sum(len(part.rows) for part in self.parts) or -1

    max_batch_size = batch_size

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was; a row may be taken several times, or never."""
        self.parts = self.selected(rows)

    def selected(self, rows: Sequence[int]) -> tuple[Part, ...]:
        """The parts after `select`."""
        parts = []
        for part in self.parts:
            taken = [
                (new, part.rows.index(old)) for new, old in enumerate(rows) if old in part.rows
            ]
            if taken:
                parts.append(part.pick([place for _, place in taken], [new for new, _ in taken]))
        return tuple(parts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.parts:
            self.select(torch.arange(self.batch_size)[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.parts:
            self.select([row for row in range(self.batch_size) for _ in range(repeats)])

    def reset(self) -> None:
        """Nothing is read: the next token meets the learned M_0, which is not zero."""
        self.parts, self.seen = (), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError unless there is nothing to remove: what is written stays written."""
        if tokens_to_remove:
            raise ValueError(f"a memory cannot unread tokens, got crop({tokens_to_remove})")

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset of a mask; earlier versions give the positions of the queries."""
        return self.seen + (query if isinstance(query, int) else query.shape[0]), 0

    def lazy_initialization(self, *keys_and_values: Any) -> None:
        """Nothing: a state exists from the first token on."""

    def update(self, *keys_and_values: Any, **options: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("a Titans cache holds memories, not keys and values")


class TitansCache(Cache):
    """`model.generate(ids, past_key_values=TitansCache(state))` goes on after a memory.

    state: what was read before, e.g. of `ModelState.load`; None has read nothing. What it has read
    does not count in `get_seq_length`: `generate` is then given the new tokens alone. A state of
    one row serves any number of rows.
    """

    def __init__(self, state: ModelState | None = None) -> None:
        super().__init__(layers=[MemoryLayer(state)])

    @property
    def memory(self) -> MemoryLayer:
        layer = self.layers[0]
        assert isinstance(layer, MemoryLayer)
        return layer

    @property
    def state(self) -> ModelState | None:
        """The state of all rows, to save or to go on with outside of transformers; None if nothing
        was read. ValueError where rows have read differently many tokens: ask for `row`."""
        if not self.memory.parts:
            return None
        if len(self.memory.parts) > 1:
            raise ValueError("the rows have read differently many tokens: take them by row(index)")
        return self.memory.parts[0].state

    def row(self, index: int) -> ModelState:
        """What one row remembers, as a batch of one."""
        for part in self.memory.parts:
            if index in part.rows:
                return part.pick([part.rows.index(index)], [0]).state
        raise ValueError(f"expected a row below {max(self.memory.batch_size, 0)}, got {index}")

    def detach(self) -> None:
        """Cut the memories off from the graph that wrote them: truncated back-propagation."""
        self.memory.parts = tuple(Part(p.rows, p.state.detach()) for p in self.memory.parts)
