"""Parts that several of the four models share: persistent tokens, and the combination (x)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from titans.config import TitansConfig


class PersistentTokens(nn.Module):
    """[p_1 ... p_N] of one block, at the scale of the normalised tokens they precede."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(config.persistent, config.dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.tokens)

    def forward(self, batch_size: int) -> Float[Tensor, "b p d"]:
        return self.tokens.expand(batch_size, *self.tokens.shape)


class Combine(nn.Module):
    """y (x) m of v1 eq. 25 and 28: both branches normalised with learned vectors, then a
    non-linearity. Which one, and on which side, the paper leaves open: norm(y) act(norm(m)), or
    norm(m) act(norm(y)) (`TitansConfig.gate_branch`)."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.memory_norm = nn.RMSNorm(config.dim)
        self.activation, self.branch = config.gate_activation, config.gate_branch

    def forward(
        self, attention: Float[Tensor, "b t d"], memory: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        wide = self.memory_norm.weight.dtype  # under autocast the branches come in bfloat16
        value, gate = self.attention_norm(attention.to(wide)), self.memory_norm(memory.to(wide))
        if self.branch == "attention":
            value, gate = gate, value
        return value * (nn.functional.silu(gate) if self.activation == "silu" else gate.sigmoid())


def combine_output(config: TitansConfig) -> nn.Module:
    """What follows the combination on its way into the residual stream."""
    return nn.Linear(config.dim, config.dim, bias=False) if config.combine_output else nn.Identity()
