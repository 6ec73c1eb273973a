"""Moneta, Yaad and Memora: the three models of MIRAS (*It's All Connected*, arXiv 2504.13173).

| model  | objective           | retention                                             |
|--------|---------------------|-------------------------------------------------------|
| Moneta | |M(k) - v|_p^p      | l_q: A = (1 - alpha) A - theta g, W = A / |A|_q^(q-2) |
| Yaad   | Huber of |M(k) - v| | decay: W = (1 - alpha) W - theta g                    |
| Memora | |M(k) - v|^2        | KL: W = softmax((1 - alpha) log W - theta g)          |

g is the slope of the objective by the weights, taken at the weights of the chunk's beginning.

`python miras.py FILE...` trains a small model of each on text; without a file, on this one.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import titans
from titans.data.text import TextWindows, from_files
from titans.data.tokenizers import ByteTokenizer
from titans.ops import Retention


def power(p: float, smooth: float = 1e-6) -> Callable[[Tensor, Tensor], Tensor]:
    """Slope of |M(k) - v|_p^p, with |e| = sqrt(e^2 + smooth), which is smooth at 0."""

    def slope(read: Tensor, value: Tensor) -> Tensor:
        error = read - value
        return p * error * (error.square() + smooth) ** (p / 2 - 1)

    return slope


def huber(delta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Slope of 0.5 |e|^2 up to |e| = delta, of delta (|e| - delta / 2) beyond it."""

    def slope(read: Tensor, value: Tensor) -> Tensor:
        error = read - value
        size = torch.linalg.vector_norm(error, dim=-1, keepdim=True)
        return error * (delta / size.clamp(min=delta))

    return slope


def q_norm(q: float) -> Retention:
    """What is held is A; the network computes with A / |A|_q^(q-2)."""
    return Retention(weights=lambda A: A / A.abs().pow(q).sum((-2, -1), True) ** (1 - 2 / q))


# What is held is log W, but for a constant that the softmax does not see: then the KL row of the
# table is a plain sum. Every column of W, the weights of one output, is a distribution.
kl_divergence = Retention(weights=lambda A: A.softmax(-2))

titans.register("objective", "l3", power(3))
titans.register("objective", "huber", huber(1.0))  # the paper's delta depends on the input
titans.register("retention", "l4", q_norm(4))
titans.register("retention", "kl", kl_divergence)

MODELS = {
    "Moneta": {"objective": "l3", "retention": "l4"},
    "Yaad": {"objective": "huber"},
    "Memora": {"retention": "kl"},
}


def train(parts: dict[str, str], paths: list[str], steps: int = 10) -> list[float]:
    """Losses of a small model whose memory is the paper's network with these parts."""
    torch.manual_seed(0)
    memory = titans.MemoryConfig(depth=2, residual=True, norm=True, chunk_size=16, **parts)
    model = titans.TitansLM(titans.TitansConfig(variant="lmm", dim=32, layers=1, memory=memory))
    batches = TextWindows(from_files(paths, ByteTokenizer()), length=48, batch_size=2, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(steps):
        tokens, labels = batches.batch(step)
        logits, _ = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for name, parts in MODELS.items():
        losses = train(parts, sys.argv[1:] or [__file__])
        print(f"{name:6} {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte")
