"""Causal depthwise convolution with an explicit tail, so that a stream may be cut anywhere."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class CausalConv(nn.Module):
    """Weights of y_t = bias + sum_j w_j x_{t-width+1+j}, per channel; `titans.ops.tokens`
    computes it.

    behind: how many channels, after the first as many, start as those first ones one token later.
    """

    def __init__(self, channels: int, width: int, behind: int = 0) -> None:
        super().__init__()
        self.width, self.behind = width, behind
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.width**-0.5), self.width**-0.5)
        with torch.no_grad():  # start near the identity: the current token dominates
            self.weight[-1] += 1.0
            if self.behind:
                first, second = self.weight[:, : 2 * self.behind].chunk(2, 1)
                first[0] = 0.0  # the second ones have no tap for it
                second[:-1] = first[1:]
                second[-1] = 0.0
        nn.init.zeros_(self.bias)

    def init_tail(self, batch_size: int, channels: int | None = None) -> Float[Tensor, "b w c"]:
        """Zeros: nothing was read yet."""
        count = self.weight.shape[1] if channels is None else channels
        return self.weight.new_zeros(batch_size, self.width - 1, count)

    def next_tail(
        self, x: Float[Tensor, "b t c"], tail: Float[Tensor, "b w c"]
    ) -> Float[Tensor, "b w c"]:
        """The last width - 1 inputs of [tail, x]."""
        if x.shape[1] < self.width - 1:
            return torch.cat([tail, x.to(tail.dtype)], 1)[:, x.shape[1] :]
        # Cloned: a view would keep the whole piece of text alive.
        return x[:, x.shape[1] - self.width + 1 :].to(tail.dtype).clone()
