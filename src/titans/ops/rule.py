"""The values that every form of the rule takes and gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from titans.state import State


@dataclass(frozen=True, kw_only=True)
class RuleState(State):
    """The memory between two tokens.

    weights: one (B, H, in, out) per layer; the part that decays and is written.
    momentum: likewise, or None when the rule has none.
    base: the weights at the last chunk boundary, where the open chunk's gradients are taken;
        None with chunk_size 1, where they are always the weights.
    offset: tokens of the open chunk already read; 0 at a boundary, where base = weights.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...] | None
    base: tuple[Tensor, ...] | None
    offset: int

    @classmethod
    def init(
        cls,
        weights: Sequence[Float[Tensor, "h _ _"]],
        batch_size: int,
        *,
        momentum: bool,
        chunk_size: int = 1,
        zero: bool = False,
    ) -> "RuleState":
        """Before the first token. `zero` keeps only the weights' shapes (see `anchor`)."""
        expanded = tuple(
            (torch.zeros_like(w) if zero else w).expand(batch_size, *w.shape) for w in weights
        )
        past = tuple(w.new_zeros(batch_size, *w.shape) for w in weights) if momentum else None
        base = expanded if chunk_size > 1 else None
        return cls(weights=expanded, momentum=past, base=base, offset=0)

    @classmethod
    def after(
        cls,
        weights: Sequence[Tensor],
        momentum: Sequence[Tensor] | None,
        base: Sequence[Tensor],
        offset: int,
        chunk_size: int,
    ) -> "RuleState":
        """After some tokens: at a boundary the base moves on, with chunk_size 1 there is none."""
        at = None if chunk_size == 1 else tuple(weights if offset == 0 else base)
        past = None if momentum is None else tuple(momentum)
        return cls(weights=tuple(weights), momentum=past, base=at, offset=offset)


# Positions of a layer's (learning rate, momentum, decay) among the distinct gate tensors.
GateSet = tuple[int, int | None, int | None]


class MemoryOutput(NamedTuple):
    """output: (B, T, H, V) reads. state: after the last token.
    surprise: (B, T, H), norm of the momentary surprise: the error signal at the last layer."""

    output: Tensor
    state: RuleState
    surprise: Tensor


class Gates(NamedTuple):
    """Per layer, tensors (B, H, T), decay also (B, H, T, in). None switches a mechanism off."""

    learning_rate: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...] | None
    decay: tuple[Tensor, ...] | None

    def at(self, layer: int, t: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """theta, eta, alpha of one token, shaped to scale a (B, H, in, out) weight matrix."""
        theta = self.learning_rate[layer][:, :, t, None, None]
        eta = None if self.momentum is None else self.momentum[layer][:, :, t, None, None]
        if self.decay is None:
            return theta, eta, None
        alpha = self.decay[layer][:, :, t, ..., None]  # (B, H, 1) or (B, H, in, 1)
        return theta, eta, alpha if alpha.ndim == 4 else alpha[..., None]

    def distinct(self) -> tuple[list[Tensor], tuple[GateSet, ...]]:
        """The gate tensors without repetition, and where each layer's are among them."""
        found: dict[int, tuple[int, Tensor]] = {}

        def place(gate: Tensor) -> int:
            return found.setdefault(id(gate), (len(found), gate))[0]

        positions = tuple(
            (
                place(rate),
                None if self.momentum is None else place(self.momentum[layer]),
                None if self.decay is None else place(self.decay[layer]),
            )
            for layer, rate in enumerate(self.learning_rate)
        )
        return [gate for _, gate in found.values()], positions

    def slice(self, start: int, stop: int) -> "Gates":
        """Gates of the tokens start..stop."""

        def cut(gate: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            # One object per distinct gate, so that layers sharing a gate share coefficients.
            if gate is None:
                return None
            pieces = {id(g): g[:, :, start:stop] for g in gate}
            return tuple(pieces[id(g)] for g in gate)

        rate = cut(self.learning_rate)
        assert rate is not None
        return Gates(rate, cut(self.momentum), cut(self.decay))

    def in_chunks(self, size: int) -> "Gates":
        """Time split into chunks: (B, H, T, ...) -> (B, H, T / size, size, ...)."""

        def split(gate: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            if gate is None:
                return None
            pieces = {id(g): g.unflatten(2, (-1, size)) for g in gate}
            return tuple(pieces[id(g)] for g in gate)

        rate = split(self.learning_rate)
        assert rate is not None
        return Gates(rate, split(self.momentum), split(self.decay))
