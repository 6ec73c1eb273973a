"""Finite differences against autograd, float64: gradients are those of the function computed.

Equality with the reference's gradients would not notice a value detached in both.
"""

import pytest
import torch
from cases import LINEAR, build, results

from titans.ops import MemoryNetwork

RESIDUAL = MemoryNetwork(depth=2, expansion=1, residual=True, norm=True)
THREE = MemoryNetwork(depth=3, expansion=1, activation="silu", residual=False, norm=False)

BOUNDED = {"network": THREE, "per_layer": True, "max_surprise": 0.2, "chunk_size": 2}
CASES = {
    "exact": ("exact", {"network": LINEAR, "decay": "scalar", "anchor": True}),
    "exact per channel": ("exact", {"network": LINEAR, "decay": "channel"}),
    "chunked linear": ("chunked", {"network": LINEAR, "decay": "channel", "chunk_size": 2}),
    "chunked residual": (
        "chunked",
        {"network": RESIDUAL, "decay": "scalar", "chunk_size": 2, "offset": 1, "anchor": True},
    ),
    "chunked bounded": ("chunked", BOUNDED),
    "native bounded": ("native", BOUNDED),
}


@pytest.mark.parametrize(("impl", "options"), CASES.values(), ids=CASES.keys())
def test_gradcheck(impl, options):
    case = build(length=3, batch=1, heads=1, key_dim=3, block_size=2, momentum=True, **options)
    case, leaves = case.with_gradients()

    def function(*inputs):
        moved = dict(zip(map(id, leaves.values()), inputs, strict=True))
        result = results(case.map(lambda leaf: moved[id(leaf)])(impl))
        return tuple(t for name, t in result.items() if name != "surprise")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=False)
