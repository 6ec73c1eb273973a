"""A forecaster around the neural memory: patches of one channel are its tokens.

Every channel is forecast by itself with shared weights (channel-independent). A window is
normalised by its own mean and deviation (reversible instance normalisation), a linear map of it
is the first guess, and a linear map of what the blocks read from its patches is added. The
memory begins each window at its learned M_0: nothing is carried from window to window.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from titans.config import MemoryConfig, check_fields, require_positive
from titans.layers.feedforward import SwiGLU
from titans.layers.memory import NeuralMemory

Mixer = Literal["memory", "attention"]
Head = Literal["last", "all"]


@dataclass(frozen=True, kw_only=True)
class ForecasterConfig:
    """Sizes of a `Forecaster`. `memory.dim` and `memory.heads` follow `dim` and `heads`."""

    lookback: int = 720
    horizon: int = 96
    mixer: Mixer = "memory"
    """What reads the tokens; attention sees all of them in both directions."""
    patch: int = 24
    """Time steps in a token; a look-back that it does not divide loses its oldest steps there."""
    dim: int = 32
    layers: int = 1
    heads: int = 2
    ffn_hidden: int = 64
    dropout: float = 0.5
    head: Head = "last"
    """What the forecast is a linear map of: the read at the last patch, a summary of `dim`
    numbers, or the reads at all patches, as in PatchTST, with many times the weights. Of
    validation errors after 300 to 600 steps, `last` had the lower on ETTm1 and ETTh1, `all` on
    weather."""
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(conv_width=0))
    """Without a convolution: a patch is already local, and it costs half of a training step."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(
            self, "lookback", "horizon", "patch", "dim", "layers", "heads", "ffn_hidden"
        )
        if self.patch > self.lookback:
            raise ValueError(f"patch ({self.patch}) must fit the look-back ({self.lookback})")
        if self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        memory = replace(self.memory, dim=self.dim, heads=self.heads)
        object.__setattr__(self, "memory", memory)

    @property
    def tokens(self) -> int:
        return self.lookback // self.patch


class Forecaster(nn.Module):
    """(N, lookback) -> (N, horizon), each row one channel of one window."""

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.lookback, config.horizon)
        self.embed = nn.Linear(config.patch, config.dim)
        self.positions = nn.Parameter(torch.empty(config.tokens, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.read = config.tokens if config.head == "all" else 1
        self.head = nn.Linear(self.read * config.dim, config.horizon)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Training begins at the mean of the window."""
        nn.init.normal_(self.positions, std=0.02)
        for layer in (self.linear, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "n lookback"]) -> Float[Tensor, "n horizon"]:
        config = self.config
        if x.ndim != 2 or x.shape[1] != config.lookback:
            raise ValueError(f"expected x of shape (N, {config.lookback}), got {tuple(x.shape)}")
        x, mean, deviation = normalise(x)
        recent = x[:, config.lookback - config.tokens * config.patch :]
        tokens = self.embed(rearrange(recent, "n (t p) -> n t p", p=config.patch))
        tokens = self.dropout(tokens + self.positions)
        for block in self.blocks:
            tokens = block(tokens)
        read = self.norm(tokens[:, -self.read :]).flatten(1)
        return denormalise(self.linear(x) + self.head(self.dropout(read)), mean, deviation)


class Block(nn.Module):
    """Pre-norm residual block: the mixer, then a feed-forward."""

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.dim)
        self.mixer: nn.Module
        if config.mixer == "memory":
            self.mixer = NeuralMemory(config.memory)
        else:
            self.mixer = Attention(config.dim, config.heads)
        self.ffn_norm = nn.RMSNorm(config.dim)
        self.ffn = SwiGLU(config.dim, config.ffn_hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        mixed = self.mixer(self.mixer_norm(x))
        if isinstance(mixed, tuple):  # the memory's state after the window: forgotten
            mixed = mixed[0]
        x = x + self.dropout(mixed)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Attention(nn.Module):
    """Full softmax attention between the tokens of a window; their positions are in them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        q, k, v = rearrange(self.qkv(x), "n t (s h d) -> s n h t d", s=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.output(rearrange(y, "n h t d -> n t (h d)"))


def normalise(x: Float[Tensor, "n t"]) -> tuple[Tensor, Tensor, Tensor]:
    """A row minus its mean, over its deviation; and both, (N, 1). RevIN without its affine map."""
    mean = x.mean(1, keepdim=True)
    deviation = (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    return (x - mean) / deviation, mean, deviation


def denormalise(y: Float[Tensor, "n t"], mean: Tensor, deviation: Tensor) -> Float[Tensor, "n t"]:
    """The inverse of `normalise`, for any number of steps."""
    return y * deviation + mean
