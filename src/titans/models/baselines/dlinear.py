"""DLinear: trend and remainder, one linear map each (Zeng et al., 2205.13504)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class DLinear(nn.Module):
    """(N, lookback) -> (N, horizon), the same weights for every channel.

    trend: mean over `kernel` steps around each step, both ends repeated; remainder: the rest.
    """

    def __init__(self, lookback: int, horizon: int, kernel: int = 25) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.kernel = kernel
        self.trend = nn.Linear(lookback, horizon)
        self.remainder = nn.Linear(lookback, horizon)

    def forward(self, x: Float[Tensor, "n lookback"]) -> Float[Tensor, "n horizon"]:
        side = self.kernel // 2
        trend = F.avg_pool1d(F.pad(x[:, None], (side, side), "replicate"), self.kernel, 1)[:, 0]
        return self.trend(trend) + self.remainder(x - trend)
