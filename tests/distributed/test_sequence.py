"""A text spread over 2 and 4 processes: losses, states and all gradients of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import launch

from titans.config import MemoryConfig, TitansConfig
from titans.distributed import Peers
from titans.models.lm import TitansLM

BATCH, LENGTH, SEGMENTS = 2, 32, 2
SMALL: dict[str, Any] = {
    "vocab_size": 17,
    "dim": 16,
    "layers": 2,
    "heads": 4,
    "ffn_hidden": 24,
    "window": 8,
    "segment": 6,
    "persistent": 3,
}
MEMORY: dict[str, Any] = {"heads": 4, "depth": 1, "norm": False, "residual": False, "chunk_size": 1}
DEEP: dict[str, Any] = {"heads": 4, "depth": 2, "chunk_size": 4, "learning_rate_max": 0.2}


def config(variant: str, memory: dict[str, Any] | None = None, **fields: Any) -> TitansConfig:
    return TitansConfig(
        variant=variant,
        memory=MemoryConfig(**({} if memory is None else memory)),
        **{**SMALL, **fields},
    )


# The linear memory's scan, with each of its settings; then the other ways to share a text.
CASES = {
    "momentum": config("lmm", {**MEMORY, "momentum": True}),
    "no-momentum": config("lmm", {**MEMORY, "momentum": False}),
    "channels": config("lmm", {**MEMORY, "decay": "channel", "momentum": True}),
    "residual": config("lmm", {**MEMORY, "residual": True, "decay_target": "initial"}),
    "dot": config("lmm", {**MEMORY, "objective": "dot", "momentum": True}),
    "gated-deltanet": config("gated-deltanet", {"heads": 4}),
    "mamba2": config("mamba2", {"heads": 4}),
    "mag": config("mag", MEMORY),
    "mal": config("mal", MEMORY),
    "deep-heads": config("mal", DEEP),
    "deep-channels": config("lmm", {**DEEP, "decay": "channel", "per_layer_gates": True}),
    "deep-in-turn": config("mag", {**DEEP, "heads": 1}),
    "mac": config("mac", MEMORY),
    "mac-no-ffn": config("mac", MEMORY, ffn_hidden=0),
    "rwkv7": config("rwkv7"),
    "transformer": config("transformer"),
    "sliding": config("sliding"),
    "checkpointed": config("mag", MEMORY),
    "mac-checkpointed": config("mac", MEMORY, ffn_hidden=0),
}


def build(name: str) -> TitansLM:
    torch.manual_seed(1)
    model = TitansLM(CASES[name]).double()
    with torch.no_grad():  # gates that start as constants would hide their inputs
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.gradient_checkpointing = name.endswith("checkpointed")
    return model


def read(name: str, peers: Peers | None) -> dict[str, torch.Tensor]:
    """The loss, the state after two segments, and the gradients of this process's slices."""
    model = build(name)
    model.peers = peers
    rank, count = (0, 1) if peers is None else (peers.rank, peers.count)
    torch.manual_seed(2)
    text = torch.randint(0, SMALL["vocab_size"], (BATCH, SEGMENTS * LENGTH + 1))
    state, loss = None, torch.zeros((), dtype=torch.float64)
    slice_ = LENGTH // count
    for segment in range(SEGMENTS):  # not detached: gradients run back through the state
        begin = segment * LENGTH + rank * slice_
        tokens, labels = (text[:, begin + i : begin + i + slice_] for i in (0, 1))
        logits, state, records = model.run(tokens, state)
        loss = loss + F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        rates = [r.learning_rate.sum() for r in records if r is not None]
        loss = loss + 0.02 * sum(rates)
    assert state is not None
    held = {f"state {k}": v.detach() for k, v in state.tensors().items()}
    held["position"] = torch.tensor(state.position)
    floating = [t for t in state.tensors().values() if t.is_floating_point()]
    torch.manual_seed(3)
    (
        loss + sum((t * torch.randn(t.shape, dtype=t.dtype)).sum() for t in floating) / count
    ).backward()
    shares = {"loss": loss.detach()}
    for key, parameter in model.named_parameters():
        shares[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if peers is not None:
        for share in shares.values():
            dist.all_reduce(share)
    return shares | held


def sliced(rank: int, count: int) -> dict[str, dict[str, torch.Tensor]]:
    """All cases on all processes; as "alone ...", a share of them on this one."""
    assert dist.group.WORLD is not None
    together = {name: read(name, Peers.of(dist.group.WORLD)) for name in CASES}
    return together | {f"alone {name}": read(name, None) for name in list(CASES)[rank::count]}


@pytest.mark.parametrize("count", [2, 4])
def test_a_text_in_slices_is_the_text(count: int, tmp_path: Path) -> None:
    results = launch(sliced, count, tmp_path)
    for index, name in enumerate(CASES):
        want = results[index % count][f"alone {name}"]
        assert max(float(t.abs().max()) for k, t in want.items() if k.endswith("weight")) > 0
        for rank, result in enumerate(results):
            got = result[name]
            assert got.keys() == want.keys()
            for key, value in want.items():
                where = f"{name}, process {rank}, {key}"
                torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-10, msg=where)
