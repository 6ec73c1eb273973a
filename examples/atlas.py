"""ATLAS (*Learning to Optimally Memorize the Context at Test Time*, arXiv 2505.23735).

Three parts, each of use alone:

- the Omega rule: a step follows the gradient of the last c tokens instead of one,
  S_t = eta S_{t-1} - theta_t sum_i gamma_i grad l(M; k_i, v_i) over i = t-c+1 ... t: `window=c`.
  Here gamma depends on t - i alone; in the paper the input decides it;
- Muon inside the memory: M_t = (1 - alpha) M_{t-1} + theta NewtonSchulz(S_t);
- polynomial features: M reads phi(k), all products of two entries of k, so that a matrix holds
  more pairs than keys have dimensions.

Run it to see the last: what linear memories answer to keys of 16 numbers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import titans
from titans.ops import MemoryNetwork, Network, Optimizer, RuleState, neural_memory


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """Near the closest orthogonal matrix: singular values go to about 1 (Muon's polynomial)."""
    X = matrix * (matrix.square().sum((-2, -1), keepdim=True) + 1e-12).rsqrt()
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    for _ in range(steps):
        gram = X @ X.mT
        X = 3.4445 * X + (2.0315 * gram @ gram - 4.775 * gram) @ X
    return X.mT if tall else X


def muon(
    gradient: Tensor, theta: Tensor, eta: Tensor | None, past: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    momentum = gradient if eta is None else eta * past[0] + gradient
    return -theta * newton_schulz(momentum), (momentum,)


class Polynomial(Network):
    """A matrix on phi(x), the products x_i x_j and x itself; phi of a unit vector is one, too."""

    depth = 1

    def shapes(self, key_dim: int, value_dim: int) -> list[tuple[int, int]]:
        return [(key_dim + key_dim * (key_dim + 1) // 2, value_dim)]

    def forward(self, apply_layer: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
        i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        twice = x.new_tensor([1.0, 2.0**0.5])[(i < j).long()]  # x_i x_j is x_j x_i
        products = x[..., i] * x[..., j] * twice
        return apply_layer(0, torch.cat([x, products], -1) * 0.5**0.5)


titans.register("optimizer", "muon", Optimizer(muon, slots=1))
titans.register("network", "polynomial", lambda config: Polynomial())

# As a layer of a model. Muon's steps have one size: theta alone says how far they go.
MEMORY = titans.MemoryConfig(
    network="polynomial",
    optimizer="muon",
    momentum=True,
    dampen_momentum=False,
    learning_rate_max=0.1,
    window=4,
    chunk_size=8,
)


def recall(network: Network, pairs: int, window: int = 1) -> float:
    """Mean cosine between the values that were written and those read at the end."""
    torch.manual_seed(0)
    keys = F.normalize(torch.randn(1, pairs, 1, 16), dim=-1)
    values = torch.randn(1, pairs, 1, 16)
    empty = [torch.zeros(1, *shape) for shape in network.shapes(16, 16)]
    recent = (window - 1, 16, 16) if window > 1 else None
    state = RuleState.init(empty, batch_size=1, momentum=False, recent=recent)
    weights, ones = [1.0 / window] * window, torch.ones(1, pairs, 1)
    _, state, _ = neural_memory(
        keys, keys, values, ones, state=state, network=network, window=weights
    )
    answers, _, _ = neural_memory(
        keys, keys, values, 0 * ones, state=state, network=network, window=weights
    )
    return F.cosine_similarity(answers, values, dim=-1).mean().item()


if __name__ == "__main__":
    linear = MemoryNetwork(depth=1, residual=False, norm=False)
    print("pairs  linear  polynomial  polynomial, window of 4")
    for pairs in (8, 16, 32, 64):
        row = recall(linear, pairs), recall(Polynomial(), pairs), recall(Polynomial(), pairs, 4)
        print(f"{pairs:5d} {row[0]:7.3f} {row[1]:11.3f} {row[2]:24.3f}")
    model = titans.TitansLM(titans.TitansConfig(variant="lmm", dim=32, layers=1, memory=MEMORY))
    logits, state = model(torch.tensor([list(b"a memory that optimises its context")]))
    print(f"one layer of it read {state.position} tokens, its memory is {state.nbytes:,} bytes")
