"""Where in a tensor its heads are, and how the parts of several processes make the whole."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.distributed.peers import Peers


@dataclass(frozen=True)
class Cut:
    """Where the heads of a tensor are: along `dim`, in blocks of these relative sizes, each with
    all heads in order. Queries, keys and values side by side are three blocks."""

    dim: int
    blocks: tuple[int, ...] = (1,)

    def own(self, whole: Tensor, team: Peers) -> Tensor:
        """This process's part of each block, side by side, as a tensor of its own."""
        parts = [team.own(block, self.dim) for block in self.split(whole)]
        return torch.cat(parts, self.dim)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole from the parts of all processes."""
        blocks = zip(*(self.split(part) for part in parts), strict=True)
        return torch.cat([torch.cat(block, self.dim) for block in blocks], self.dim)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        return x.split(self.sizes(x.shape), self.dim)

    def sizes(self, shape: Sequence[int]) -> list[int]:
        """Of the blocks, in a whole tensor or in a part of that shape."""
        unit = shape[self.dim] // sum(self.blocks)
        return [unit * block for block in self.blocks]

    def whole_shape(self, shape: Sequence[int], team: Peers) -> torch.Size:
        """Of the tensor whose parts have that shape."""
        return torch.Size(n * team.count if d == self.dim else n for d, n in enumerate(shape))
