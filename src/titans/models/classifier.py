"""A sequence as a whole -> one of several classes: a `TitansLM` without its head, or a CNN."""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.models.lm import TitansLM
from titans.ops.tracing import is_traced

Pooling = Literal["mean", "last"]


class SequenceClassifier(nn.Module):
    """Hidden states of a language model, their mean or the last one, then a linear map.

    The model is causal: a row may be padded after its end, which changes nothing.
    """

    def __init__(
        self, config: TitansConfig, classes: int, pooling: Pooling = "mean", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")
        if pooling not in get_args(Pooling):
            raise ValueError(
                f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}"
            )
        self.backbone = TitansLM(config)
        if not config.tie_embeddings:
            self.backbone.head.requires_grad_(False)  # nothing is predicted
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(config.dim, classes)
        nn.init.zeros_(self.output.bias)
        nn.init.normal_(self.output.weight, std=config.dim**-0.5)

    def forward(
        self, tokens: Int[Tensor, "b t"], lengths: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c"]:
        """Logits of the classes; `lengths` tokens of each row count, at least one."""
        if not is_traced([lengths]) and (
            lengths.shape != tokens.shape[:1]
            or not 1 <= lengths.min() <= lengths.max() <= tokens.shape[1]
        ):
            raise ValueError(
                f"lengths must be {len(tokens)} numbers from 1 to {tokens.shape[1]}, got "
                f"{lengths.tolist()}"
            )
        hidden = self.backbone.hidden(tokens).hidden
        if self.pooling == "last":
            at = (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
            pooled = hidden.gather(1, at)[:, 0]
        else:
            counted = torch.arange(tokens.shape[1], device=lengths.device) < lengths[:, None]
            pooled = (hidden * counted[..., None]).sum(1) / lengths[:, None]
        return self.output(self.dropout(pooled))


class ConvolutionalClassifier(nn.Module):
    """The small CNN beside it: two convolutions, of an odd width and of about half of it, and
    the largest response of each filter."""

    def __init__(
        self, tokens: int, classes: int, channels: int = 128, width: int = 11, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, channels)
        self.first = nn.Conv1d(channels, channels, width, padding="same")
        self.second = nn.Conv1d(channels, channels, width // 2 | 1, padding="same")
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(channels, classes)

    def forward(
        self, tokens: Int[Tensor, "b t"], lengths: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c"]:
        counted = torch.arange(tokens.shape[1], device=lengths.device) < lengths[:, None]
        counted = counted[:, None]
        x = self.embedding(tokens).transpose(1, 2) * counted
        x = nn.functional.gelu(self.first(x)) * counted
        x = nn.functional.gelu(self.second(x))
        pooled = x.masked_fill(~counted, float("-inf")).amax(-1)
        return self.output(self.dropout(pooled))
