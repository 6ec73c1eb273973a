"""Retention and optimizer: how a gradient becomes a step, and a step becomes the memory.

The built-in pair is the rule's own, and linear: closed forms have it. Others run token by token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Past = tuple[Tensor, ...]


def descend(gradient: Tensor, theta: Tensor, eta: Tensor | None, past: Past) -> tuple[Tensor, Past]:
    """S_t = eta_t S_{t-1} - theta_t grad (v1 eq. 14), or without momentum its second term."""
    step = -theta * gradient
    if eta is None:
        return step, past
    step = eta * past[0] + step
    return step, (step,)


def decay(held: Tensor, alpha: Tensor | None, step: Tensor) -> Tensor:
    """M_t = (1 - alpha_t) M_{t-1} + S_t (v1 eq. 13)."""
    return (held if alpha is None else (1.0 - alpha) * held) + step


@dataclass(frozen=True)
class Optimizer:
    """What is added to a weight matrix for one token.

    step: (gradient, theta, eta, past) -> (what is added, past). gradient is (B, H, in, out);
        theta, and eta where the rule has momentum (else None), are (B, H, 1, 1).
    slots: tensors of the gradient's shape in `past`; zero before the first token.
    """

    step: Callable[[Tensor, Tensor, Tensor | None, Past], tuple[Tensor, Past]]
    slots: int = 1


@dataclass(frozen=True)
class Retention:
    """How a weight matrix is kept while it is written.

    update: (held, alpha, step) -> held. held and step are (B, H, in, out); alpha is (B, H, 1, 1),
        with decay per channel (B, H, in, 1), or None. With an anchor, held is the deviation.
    weights: held (with an anchor: anchor + held) -> the weights that the network computes with,
        of the same shape; None: the same. It makes mirror descent of a plain `update`.
    """

    update: Callable[[Tensor, Tensor | None, Tensor], Tensor] = decay
    weights: Callable[[Tensor], Tensor] | None = None


DESCENT = Optimizer(descend)
DECAY = Retention()


def weights_of(
    held: Sequence[Tensor], anchor: Sequence[Tensor] | None, retention: Retention | None = None
) -> Sequence[Tensor]:
    """The weights that the network computes with, from those in the state."""
    at = held if anchor is None else [a + w for a, w in zip(anchor, held, strict=True)]
    if retention is None or retention.weights is None:
        return at
    return [retention.weights(w) for w in at]
