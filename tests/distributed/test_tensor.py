"""The heads of every layer shared by two processes: losses, states and all gradients of one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import launch
from test_sequence import CASES as SEQUENCE_CASES
from test_sequence import DEEP, MEMORY, SMALL, config

from titans.config import TitansConfig
from titans.distributed import Peers
from titans.models.heads import check_parts, own_state, share_heads, whole_state
from titans.models.lm import TitansLM

BATCH, LENGTH = 3, 7  # 21 losses, which two processes cannot share evenly
WINDOW = {**MEMORY, "gate_input": "window"}
CHANNELS = {**DEEP, "decay": "channel", "momentum": True}

# Each names what of a layer is cut in a way of its own.
CASES = {
    name: SEQUENCE_CASES[name]
    for name in ("momentum", "residual", "mag", "mal", "mac", "rwkv7", "transformer", "sliding")
} | {
    "window-gates": config("lmm", {**WINDOW, "momentum": True}),
    "channels": config("lmm", {**CHANNELS, "per_layer_gates": True, "max_surprise": 0.5}),
    "low-rank": config("lmm", {**CHANNELS, "decay_rank": 3, "output_gate": False}),
    "no-convolution": config("lmm", {**MEMORY, "conv_width": 0, "head_dim": 6}),
    "mac-stride": config("mac", DEEP, memory_token_stride=2, ffn_hidden=0),
    "checkpointed": config("mag", MEMORY, tie_embeddings=False),
    "exponential": config("gated-deltanet-h2", {"heads": 4}),
    "step": config("mamba2", {"heads": 4}),
    "constant": config("lightning", {"heads": 4}),
    "ttt": config("ttt-mlp", {"heads": 4}),
    "step-channels": config("lmm", {**MEMORY, "gates": "step", "decay": "channel"}),
}


def read(name: str, team: Peers | None) -> dict[str, torch.Tensor]:
    """The losses, the state after two segments, and all gradients, each whole."""
    torch.manual_seed(1)
    model = TitansLM(CASES[name]).double()
    with torch.no_grad():  # gates that start as constants would hide their inputs
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.gradient_checkpointing = name == "checkpointed"
    if team is not None:
        share_heads(model, team)
    torch.manual_seed(2)
    text = torch.randint(0, SMALL["vocab_size"], (BATCH, 2 * LENGTH + 1))
    weights = torch.rand(BATCH, LENGTH, dtype=torch.float64)
    state, loss, result = None, torch.zeros((), dtype=torch.float64), {}
    for segment in range(2):  # not detached: gradients run back through the state
        begin = segment * LENGTH
        tokens, labels = (text[:, begin + i : begin + i + LENGTH] for i in (0, 1))
        read = model.losses(tokens, labels, state)
        state = read.state
        rates = [r.learning_rate.mean() for r in read.records if r is not None]
        loss = loss + (read.nll * weights).sum() + 0.5 * sum(rates)
        result |= {f"nll {segment}": read.nll.detach(), f"likeliest {segment}": read.likeliest}
    (loss if team is None else loss / team.count).backward()
    assert state is not None
    whole = state if team is None else whole_state(state, team)
    if team is not None:
        again = own_state(whole, team).tensors()
        assert all(torch.equal(again[key], t) for key, t in state.tensors().items())
    result |= {f"state {key}": tensor.detach() for key, tensor in whole.tensors().items()}
    for key, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if team is not None:
            cut = model.cuts.get(key)
            gradient = team.total(gradient) if cut is None else cut.join(team.parts(gradient))
        result[f"gradient {key}"] = gradient
    return result


def shared(rank: int, count: int) -> dict[str, dict[str, torch.Tensor]]:
    """All cases on all processes; as "alone ...", a share of them on this one."""
    assert dist.group.WORLD is not None
    together = {name: read(name, Peers.of(dist.group.WORLD)) for name in CASES}
    return together | {f"alone {name}": read(name, None) for name in list(CASES)[rank::count]}


def test_heads_on_two_processes_are_those_of_one(tmp_path: Path) -> None:
    results = launch(shared, 2, tmp_path)
    for index, name in enumerate(CASES):
        want = results[index % 2][f"alone {name}"]
        assert max(float(t.abs().max()) for k, t in want.items() if k.startswith("gradient")) > 0
        for rank, result in enumerate(results):
            got = result[name]
            assert got.keys() == want.keys()
            for key, value in want.items():
                where = f"{name}, process {rank}, {key}"
                torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-10, msg=where)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 2}, r"distributed.tensor \(4\) must divide model.heads, got 2"),
        ({"ffn_hidden": 18}, r"distributed.tensor \(4\) must divide model.ffn_hidden, got 18"),
    ],
)
def test_what_cannot_be_shared_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parts(replace(SEQUENCE_CASES["mag"], **changes), 4)


def test_heads_that_do_not_count_are_not_asked_for() -> None:
    one = replace(SEQUENCE_CASES["momentum"], heads=1)
    check_parts(one, 4)
    memory = replace(one.memory, heads=2)
    with pytest.raises(ValueError, match=r"model.memory.heads, got 2"):
        check_parts(replace(one, memory=memory), 4)
    assert isinstance(one, TitansConfig)
