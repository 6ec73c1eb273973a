"""The values that every form of the rule takes and gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from titans.state import State


@dataclass(frozen=True, kw_only=True)
class RecentTokens(State):
    """Tokens that count again in the window of those that follow; the newest is the last.

    keys: (B, H, N, K). values: (B, H, N, V). present: (B, H, N), 1 for a token that was read and
    0 for one before the first.
    """

    keys: Tensor
    values: Tensor
    present: Tensor

    def followed_by(self, keys: Tensor, values: Tensor) -> "RecentTokens":
        """Together with tokens (B, H, T, D) that were read after them."""
        read = keys.new_ones(keys.shape[:3])
        return RecentTokens(
            keys=torch.cat([self.keys, keys], 2),
            values=torch.cat([self.values, values], 2),
            present=torch.cat([self.present, read], 2),
        )

    def piece(self, start: int, stop: int) -> "RecentTokens":
        return self.map(lambda x: x[:, :, start:stop])

    def last(self, count: int) -> "RecentTokens":
        """A copy, so that a state does not hold on to all that was read."""
        return self.map(lambda x: x[:, :, -count:].clone())


@dataclass(frozen=True, kw_only=True)
class RuleState(State):
    """The memory between two tokens.

    weights: one (B, H, in, out) per layer; the part that decays and is written.
    momentum: likewise, or None when the rule has none. An `Optimizer` with more slots has them
        one after the other, each with its layers.
    base: the weights at the last chunk boundary, where the open chunk's gradients are taken;
        None with chunk_size 1, where they are always the weights.
    offset: tokens of the open chunk already read; 0 at a boundary, where base = weights.
    recent: with a window of N tokens the last N - 1, else None.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...] | None
    base: tuple[Tensor, ...] | None
    offset: int
    recent: RecentTokens | None = None

    @classmethod
    def init(
        cls,
        weights: Sequence[Float[Tensor, "h _ _"]],
        batch_size: int,
        *,
        momentum: int,
        chunk_size: int = 1,
        zero: bool = False,
        recent: tuple[int, int, int] | None = None,
    ) -> "RuleState":
        """Before the first token.

        momentum: tensors kept per weight matrix; one (True) for the rule's own, the slots of an
        `Optimizer`. zero: keep only the weights' shapes (see `anchor`). recent: for a window,
        its tokens before the newest, the size of a key, and of a value.
        """
        expanded = tuple(
            (torch.zeros_like(w) if zero else w).expand(batch_size, *w.shape) for w in weights
        )
        past = tuple(w.new_zeros(batch_size, *w.shape) for _ in range(momentum) for w in weights)
        base = expanded if chunk_size > 1 else None
        before = None
        if recent is not None:
            tokens, key_dim, value_dim = recent
            none = weights[0].new_zeros(batch_size, weights[0].shape[0], tokens)
            before = RecentTokens(
                keys=none[..., None].expand(-1, -1, -1, key_dim),
                values=none[..., None].expand(-1, -1, -1, value_dim),
                present=none,
            )
        return cls(weights=expanded, momentum=past or None, base=base, offset=0, recent=before)

    @classmethod
    def after(
        cls,
        weights: Sequence[Tensor],
        momentum: Sequence[Tensor] | None,
        base: Sequence[Tensor],
        offset: int,
        chunk_size: int,
        recent: RecentTokens | None = None,
    ) -> "RuleState":
        """After some tokens: at a boundary the base moves on, with chunk_size 1 there is none."""
        at = None if chunk_size == 1 else tuple(weights if offset == 0 else base)
        past = None if momentum is None else tuple(momentum)
        return cls(weights=tuple(weights), momentum=past, base=at, offset=offset, recent=recent)


# Positions of a layer's (learning rate, momentum, decay) among the distinct gate tensors.
GateSet = tuple[int, int | None, int | None]


class MemoryOutput(NamedTuple):
    """output: (B, T, H, V) reads. state: after the last token.
    surprise: (B, T, H), norm of the momentary surprise: the error signal at the last layer, as
    `max_surprise` has left it."""

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
