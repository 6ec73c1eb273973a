"""The bytes that docs/scaling.md computes are those that processes exchange."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch
from test_sequence import CASES, LENGTH

from titans.bench.scaling import Spread, count_weights, received_bytes, text_numbers
from titans.distributed import Peers
from titans.models.lm import TitansLM

NAMES = ("momentum", "no-momentum", "mag", "deep-heads", "deep-channels")


class Counted:
    """torch.distributed, with a count of the numbers that arrive in tensors."""

    def __init__(self) -> None:
        self.numbers = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_gather(self, parts: list[torch.Tensor], x: torch.Tensor, group: Any) -> None:
        self.numbers += (len(parts) - 1) * x.numel()
        dist.all_gather(parts, x, group=group)

    def all_to_all_single(self, into: torch.Tensor, x: torch.Tensor, group: Any) -> None:
        self.numbers += x.numel() * (len(x) - 1) // len(x)  # one part a process
        dist.all_to_all_single(into, x, group=group)

    def P2POp(self, operation: Any, x: torch.Tensor, **settings: Any) -> Any:
        self.numbers += x.numel() if operation is dist.irecv else 0
        return dist.P2POp(operation, x, **settings)

    def broadcast(self, x: torch.Tensor, **settings: Any) -> None:
        self.numbers += x.numel()
        dist.broadcast(x, **settings)


def counting(rank: int, count: int) -> list[int]:
    from titans.distributed import peers

    counts = []
    for name in NAMES:
        model = TitansLM(CASES[name])
        assert dist.group.WORLD is not None
        model.peers = Peers.of(dist.group.WORLD)
        counted = Counted()
        peers.dist = counted
        logits, _ = model(torch.zeros(1, LENGTH // count, dtype=torch.long))
        logits.sum().backward()
        counts.append(counted.numbers)
    peers.dist = dist
    return counts


def test_what_travels_is_what_the_formula_says(tmp_path: Path) -> None:
    results = launch(counting, 4, tmp_path)
    spread = Spread(tokens=LENGTH, rows=1, processes=4, sequence=4, checkpointing=False)
    for index, name in enumerate(NAMES):
        config = CASES[name]
        want = config.layers * text_numbers(config, spread, passes=1)
        # One in the middle: the first receives nothing forward, the last nothing backward.
        assert results[1][index] == pytest.approx(want, rel=1e-12), name


def test_weights_travel_as_fsdp_moves_them() -> None:
    config = CASES["momentum"]
    weights = count_weights(config)
    one = Spread(tokens=32, rows=4, processes=4, shard=4)
    blocks = config.layers * weights.block
    assert weights.block == sum(p.numel() for p in TitansLM(config).blocks[0].parameters())
    # Every block's three quarters twice, the embedding's once, and as much of each gradient.
    want = 4 * 0.75 * (2 * blocks + (weights.all - blocks) + weights.all)
    assert received_bytes(config, one, weights) == {"text": 0.0, "weights": want}
