"""Causal depthwise convolution with an explicit tail, so that a stream may be cut anywhere."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class CausalConv(nn.Module):
    """y_t = bias + sum_j w_j x_{t-width+1+j}, per channel."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.width**-0.5), self.width**-0.5)
        with torch.no_grad():  # start near the identity: the current token dominates
            self.weight[-1] += 1.0
        nn.init.zeros_(self.bias)

    def init_tail(self, batch_size: int, channels: int | None = None) -> Float[Tensor, "b w c"]:
        """Zeros: nothing was read yet."""
        count = self.weight.shape[1] if channels is None else channels
        return self.weight.new_zeros(batch_size, self.width - 1, count)

    def forward(
        self, x: Float[Tensor, "b t c"], tail: Float[Tensor, "b w c"]
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b w c"]]:
        """tail: the width - 1 inputs before x. Returns outputs and the next tail.

        An x with fewer channels than the module meets the first of them.
        """
        length, channels = x.shape[1], x.shape[2]
        padded = torch.cat([tail.to(x.dtype), x], 1)
        kernel = self.weight[:, :channels].to(x.dtype)
        bias = self.bias[:channels].to(x.dtype)
        if length == 1:  # decoding: one sum instead of setting up a convolution
            y = (padded * kernel).sum(1, keepdim=True) + bias
        else:
            y = F.conv1d(padded.transpose(1, 2), kernel.T[:, None], bias, groups=channels)
            y = y.transpose(1, 2)
        # Cloned: a view would keep the whole piece of text alive.
        return y, padded[:, length:].to(tail.dtype).clone()
