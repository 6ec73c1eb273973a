"""Gates of a chunk -> the coefficients of the closed form.

Inside a chunk the recurrence is linear in the gradients g_i, so

    M_t = beta_t M_0 + m_t S_0 - sum_{i<=t} G[t,i] g_i
    S_C = H_C S_0 - sum_i last_i g_i

with A[t,j] = prod_{j<s<=t} (1 - alpha_s), B[j,i] = prod_{i<s<=j} eta_s, beta_t = A[t,0] (1 -
alpha_0), m = A H, G = (A B) diag(theta), last_i = theta_i B[C,i]. Products are exponentials of
segment sums of log-gates: sums are taken over the segment itself, never as a difference of two
long sums, so alpha = 1 and eta = 0 neither lose digits nor give NaN (what should be 0 is
1e-30), and nothing is divided.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

# Below every float32 gate that matters and far above its smallest number: log of it is finite,
# and d/dx log(x + TINY) times the product itself is still the product of the other gates.
TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """Of chunks of C tokens; `...` is batch, heads and chunks.

    With decay per channel, beta, m and G carry a last axis over the layer's inputs.
    Without momentum `m`, `carry` and `last` are None.
    """

    beta: Tensor  # (..., C) or (..., C, I)
    m: Tensor | None  # likewise
    G: Tensor  # (..., C, C) or (..., C, C, I)
    carry: Tensor | None  # (...)
    last: Tensor | None  # (..., C)
    per_channel: bool

    def map(self, function: Callable[[Tensor], Tensor]) -> "Coefficients":
        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else function(x)

        return Coefficients(
            beta=function(self.beta),
            m=of(self.m),
            G=function(self.G),
            carry=of(self.carry),
            last=of(self.last),
            per_channel=self.per_channel,
        )

    def chunk(self, index: int) -> "Coefficients":
        """Coefficients of one chunk, where the chunks are axis 2."""
        return self.map(lambda x: x[:, :, index])

    def windowed(self, window: Tensor) -> "Coefficients":
        """The same where token j's gradient is sum_i window[j, i] g_i, (..., C, E), over E tokens.

        Then G is (..., C, E), and last (..., E).
        """
        if self.per_channel:
            G = torch.einsum("...tjr,...ji->...tir", self.G, window)
        else:
            G = self.G @ window
        last = None if self.last is None else (self.last[..., None, :] @ window)[..., 0, :]
        return replace(self, G=G, last=last)

    def before(self) -> "Coefficients":
        """The same one token earlier: what M_{t-1} is made of (for the exact form)."""

        def shift(x: Tensor, axis: int, first: float) -> Tensor:
            head = torch.full_like(x.narrow(axis, 0, 1), first)
            return torch.cat([head, x.narrow(axis, 0, x.shape[axis] - 1)], axis)

        axis = -2 if self.per_channel else -1
        return Coefficients(
            beta=shift(self.beta, axis, 1.0),
            m=None if self.m is None else shift(self.m, axis, 0.0),
            G=shift(self.G, axis - 1, 0.0),
            carry=self.carry,
            last=self.last,
            per_channel=self.per_channel,
        )

    def scale(self, factor: Tensor, x: Tensor) -> Tensor:
        """Multiply token vectors x (..., C, I) by a factor per token, or per token and input."""
        return x * (factor if self.per_channel else factor[..., None])

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """sum_r q[t,r] G[t,i,r] k[i,r]: what token i's error weighs in the read of token t."""
        if self.per_channel:
            return torch.einsum("...tr,...tir,...ir->...ti", queries, self.G, keys)
        return (queries @ keys.transpose(-1, -2)) * self.G

    def final_weights(
        self, weights: Tensor, momentum: Tensor | None, keys: Tensor, errors: Tensor
    ) -> Tensor:
        """M after the chunk's last token, from M and S before its first."""
        row = slice(-1, None)
        if self.per_channel:
            beta, written = self.beta[..., -1, :, None], keys * self.G[..., -1, :, :]
        else:
            beta, written = self.beta[..., row, None], keys * self.G[..., -1, :, None]
        result = beta * weights - written.transpose(-1, -2) @ errors
        if self.m is not None and momentum is not None:
            m = self.m[..., -1, :, None] if self.per_channel else self.m[..., row, None]
            result = result + m * momentum
        return result

    def final_momentum(
        self, momentum: Tensor | None, keys: Tensor, errors: Tensor
    ) -> Tensor | None:
        """S after the chunk's last token."""
        if self.carry is None or self.last is None or momentum is None:
            return None
        written = keys * self.last[..., None]
        return self.carry[..., None, None] * momentum - written.transpose(-1, -2) @ errors


def coefficients(
    learning_rate: Float[Tensor, "*b c"],
    momentum: Float[Tensor, "*b c"] | None,
    decay: Float[Tensor, "*b c"] | Float[Tensor, "*b c i"] | None,
) -> Coefficients:
    """Gates theta, eta, alpha of chunks of C tokens -> coefficients of the closed form."""
    theta = learning_rate
    per_channel = decay is not None and decay.ndim > theta.ndim
    length = theta.shape[-1]
    if decay is None:
        beta = torch.ones_like(theta)
        A = theta.new_ones(length, length).tril().expand(*theta.shape, length)
    else:
        # Channels are moved in front of time while products over time are formed.
        log_keep = log_retention(decay.movedim(-1, -2) if per_channel else decay)
        beta = log_keep.cumsum(-1).exp()
        A = segment_products(log_keep)
    if momentum is None:
        G, m, carry, last = A, None, None, None
    else:
        log_eta = (momentum + TINY).log()
        H = log_eta.cumsum(-1).exp()
        B = segment_products(log_eta)
        spread = (lambda x: x.unsqueeze(-3)) if per_channel else (lambda x: x)
        G = A @ spread(B)
        m = (A @ (H.unsqueeze(-2) if per_channel else H)[..., None])[..., 0]
        carry, last = H[..., -1], B[..., -1, :] * theta
    G = G * (theta[..., None, None, :] if per_channel else theta[..., None, :])
    if per_channel:
        beta = beta.movedim(-2, -1)
        m = None if m is None else m.movedim(-2, -1)
        G = G.movedim(-3, -1)
    return Coefficients(beta=beta, m=m, G=G, carry=carry, last=last, per_channel=per_channel)


def segment_products(log_gate: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c c"]:
    """P[t, j] = prod_{j<s<=t} gate_s for j <= t, else 0."""
    length = log_gate.shape[-1]
    ones = log_gate.new_ones(length, length)
    # One product sums every segment: above the diagonal exp(-inf) is the zero that is wanted.
    above = torch.full_like(ones, -torch.inf).triu(1)
    steps = log_gate.reshape(-1, length, 1) * ones.tril(-1)
    sums = torch.baddbmm(above, ones.tril().expand(len(steps), -1, -1), steps)
    return sums.exp().view(*log_gate.shape, length)


def log_retention(decay: Tensor) -> Tensor:
    """log(1 - alpha): accurate for alpha far below 1e-7 and finite (with slope) at alpha = 1."""
    small = decay < 0.5
    near_zero = torch.log1p(-torch.where(small, decay, 0.0))
    near_one = (torch.where(small, 1.0, 1.0 - decay) + TINY).log()
    return torch.where(small, near_zero, near_one)
