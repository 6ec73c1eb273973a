"""A memory learns at test time: no training, only reading.

Random key-value pairs are written one after the other; then every key is asked for. A linear
memory with the true per-token gradient (the delta rule) holds about as many pairs as its keys
have dimensions, momentum and forgetting trade old pairs for new ones.
"""

import torch
import torch.nn.functional as F

from titans.ops import MemoryNetwork, RuleState, neural_memory

torch.manual_seed(0)
DIM, SIZES = 64, (8, 16, 32, 64)
network = MemoryNetwork(depth=1, residual=False, norm=False)


def recall(pairs: int, decay: float) -> float:
    """Mean cosine between what was written under a key and what is read for it at the end."""
    keys = F.normalize(torch.randn(1, pairs, 1, DIM), dim=-1)
    values = torch.randn(1, pairs, 1, DIM)
    empty = RuleState.init([torch.zeros(1, DIM, DIM)], batch_size=1, momentum=False)
    ones = torch.ones(1, pairs, 1)
    _, full, _ = neural_memory(
        keys, keys, values, ones, decay=decay * ones, state=empty, network=network
    )
    # Reading alone: a learning rate of zero writes nothing.
    answers, after, _ = neural_memory(
        keys, keys, values, 0 * ones, decay=0 * ones, state=full, network=network
    )
    assert torch.equal(after.weights[0], full.weights[0])
    return F.cosine_similarity(answers, values, dim=-1).mean().item()


if __name__ == "__main__":
    print("pairs   no forgetting   decay 0.05")
    for pairs in SIZES:
        print(f"{pairs:5d} {recall(pairs, 0.0):15.3f} {recall(pairs, 0.05):12.3f}")
