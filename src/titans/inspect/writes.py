"""What in a text a memory wrote: how much in all, and which tokens most.

A gate that opens at tokens that matter to no one writes over what was kept. Over a long text a few
of them are enough, and no average over tokens shows them.
"""

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from titans.inspect.observation import watch
from titans.inspect.weights import memory_layers
from titans.models.lm import TitansLM
from titans.state import ModelState, NonFiniteError


@dataclass(frozen=True)
class Write:
    """rate: theta of the token, mean over heads. position: tokens of the text before it. before:
    the last of them. token: itself."""

    rate: float
    position: int
    before: tuple[int, ...]
    token: int


@dataclass(frozen=True)
class Written:
    """What one memory did with a text, means over its heads.

    tokens: of the text. total: the sum of its rates, theta. forgetting: the sum of
    -log(1 - alpha), in nats: of what had been there, e to the minus that is left. strongest: the
    tokens with the highest rates, falling.
    """

    tokens: int
    total: float
    forgetting: float
    strongest: tuple[Write, ...]

    @property
    def kept(self) -> float:
        """What forgetting leaves of what had been there, from 1 to 0."""
        return math.exp(-self.forgetting)


def writes(
    model: TitansLM,
    source: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
    state: ModelState | None = None,
    *,
    top: int = 20,
    before: int = 8,
    piece: int = 512,
) -> tuple[Written, ...]:
    """Read one text, (1, T) or its pieces, in constant memory; a `Written` for every memory.

    ValueError for several texts side by side, and for an empty one; NonFiniteError where a rate is
    no number.
    """
    tokens, last = 0, np.zeros(0, dtype=np.int64)
    strongest: list[list[Write]] = [[] for _ in memory_layers(model)]
    totals = forgotten = torch.zeros(len(strongest), dtype=torch.float64)
    for seen in watch(model, source, state, piece=piece):
        if len(seen.tokens) != 1:
            raise ValueError(f"expected one text, got {len(seen.tokens)} side by side")
        rates = seen.learning_rate[0].double().mean(-1).cpu()
        alpha = torch.zeros_like(rates)[..., None] if seen.decay is None else seen.decay[0].cpu()
        lost = -torch.log1p(-alpha.double()).mean(-1)
        totals, forgotten = totals + rates.sum(0), forgotten + lost.sum(0)
        if not totals.isfinite().all():
            raise NonFiniteError(f"no finite rate in the first {tokens + len(rates):,} tokens")
        ids = np.concatenate([last, seen.tokens[0].cpu().numpy()])
        for memory, kept in enumerate(strongest):
            here = rates[:, memory]
            for place in here.topk(min(top, len(here))).indices.tolist():
                at = len(last) + place
                context = tuple(ids[max(at - before, 0) : at].tolist())
                kept.append(Write(float(here[place]), tokens + place, context, int(ids[at])))
            kept[:] = heapq.nlargest(top, kept, key=attrgetter("rate"))
        tokens += seen.tokens.shape[1]
        last = ids[max(len(ids) - before, 0) :]
    return tuple(
        Written(tokens, float(total), float(lost), tuple(w for w in kept if w.rate > 0))
        for total, lost, kept in zip(totals, forgotten, strongest, strict=True)
    )
