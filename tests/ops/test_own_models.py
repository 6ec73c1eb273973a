"""Layers and models with a rule of one's own: names, laws, files."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_rules import GATED, MUON, atlas, miras

import titans
from titans import MemoryConfig, ModelState, NeuralMemory, TitansConfig, TitansLM
from titans.config import build, load_toml, to_dict, to_toml
from titans.inspect import explain, probe, recall, watch
from titans.ops import RuleState

DEEP = {"depth": 2, "expansion": 2, "residual": True, "norm": True, "chunk_size": 4}
MEMORIES = {
    **{name: {**DEEP, **parts} for name, parts in miras.MODELS.items()},
    "ATLAS": {
        **{f.name: getattr(atlas.MEMORY, f.name) for f in dataclasses.fields(MemoryConfig)},
        "dim": 16,
        "window_decay": 0.5,
    },
    "gated": {"network": "gated", "depth": 3, "window": 3, "objective": "huber", "chunk_size": 4},
    "elastic": {**DEEP, "retention": "elastic", "decay_target": "zero", "momentum": True},
}


def lm(name: str, variant: str = "lmm") -> TitansLM:
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant,
        vocab_size=50,
        dim=16,
        layers=1,
        heads=2,
        ffn_hidden=24,
        window=7,
        segment=6,
        persistent=2,
        memory=MemoryConfig(**{**MEMORIES[name], "heads": 2}),
    )
    return TitansLM(config).double()


def some_tokens(length: int = 19) -> torch.Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))


def in_pieces(model: TitansLM, tokens: torch.Tensor, sizes: list[int]) -> tuple:
    state, logits = None, []
    for piece in tokens.split(sizes, 1):
        out, state = model(piece, state)
        logits.append(out)
    return torch.cat(logits, 1), state


def assert_close(a: ModelState, b: ModelState) -> None:
    mine, theirs = a.tensors(), b.tensors()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("name", "variant"),
    [*((name, "lmm") for name in MEMORIES), ("Moneta", "mac"), ("ATLAS", "mac")],
)
def test_any_split_and_decoding_are_one_pass(name: str, variant: str) -> None:
    """The window is shorter than a piece and longer; MAC also recalls without writing."""
    model, tokens = lm(name, variant), some_tokens()
    with torch.no_grad():
        whole, state = model(tokens)
        for sizes in ([1] * 19, [2, 9, 1, 7], [6, 13]):
            logits, after = in_pieces(model, tokens, sizes)
            torch.testing.assert_close(logits, whole, rtol=1e-9, atol=1e-10)
            assert_close(after, state)
        alone, _ = model(tokens[1:])
        torch.testing.assert_close(alone, whole[1:], rtol=1e-10, atol=1e-11)
        changed = tokens.clone()
        changed[:, 11:] = (changed[:, 11:] + 7) % 50
        other, _ = model(changed)
        torch.testing.assert_close(other[:, :11], whole[:, :11], rtol=0, atol=1e-12)
        assert (other[:, 11:] - whole[:, 11:]).abs().amax() > 1e-4


@pytest.mark.parametrize("name", MEMORIES)
def test_memories_and_models_survive_their_files(name: str, tmp_path) -> None:
    model, tokens = lm(name).float(), some_tokens()
    with torch.inference_mode():
        _, state = model(tokens[:, :10])
        state.save(tmp_path / "a.memory")
        expected, _ = model(tokens[:, 10:], state)
        model.save(tmp_path / "model.safetensors")
        again = titans.load(tmp_path / "model.safetensors")
        got, _ = again(tokens[:, 10:], ModelState.load(tmp_path / "a.memory"))
    assert again.config == model.config
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", MEMORIES)
def test_every_parameter_learns_with_and_without_checkpointing(name: str) -> None:
    model, tokens = lm(name), some_tokens(9)
    slopes = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(tokens)[0].square().mean().backward()
        slopes.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for parameter, slope in slopes[0].items():
        assert slope.abs().max() > 0, parameter
        torch.testing.assert_close(slope, slopes[1][parameter], rtol=1e-10, atol=1e-14)


def test_a_layer_means_what_was_registered() -> None:
    layer = NeuralMemory(MemoryConfig(**MEMORIES["gated"], heads=2))
    assert layer.network is GATED
    assert layer.window == pytest.approx((1 / 3,) * 3)
    atlas_layer = NeuralMemory(MemoryConfig(**MEMORIES["ATLAS"]))
    assert atlas_layer.optimizer == MUON
    assert atlas_layer.window == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15))
    assert len(atlas_layer.init_state(3).rule.momentum) == 1
    assert NeuralMemory(MemoryConfig(objective="l3")).objective(
        torch.tensor(3.0), torch.tensor(1.0)
    ).item() == pytest.approx(12.0)  # p |e|^(p - 1)


def test_names_stand_for_one_thing(without_shape_checks) -> None:
    titans.register("objective", "huber", miras_huber := titans.registry.find("objective", "huber"))
    with pytest.raises(ValueError, match="objective 'huber' is registered already"):
        titans.register("objective", "huber", lambda read, value: miras_huber(read, value))
    with pytest.raises(ValueError, match="objective 'l2' is registered already"):
        titans.register("objective", "l2", lambda read, value: read - value)
    with pytest.raises(
        ValueError, match="network 'mine' must be a function of the config, got Gated"
    ):
        titans.register("network", "mine", GATED)
    with pytest.raises(ValueError, match=r"'mine' must be a titans\.ops\.Optimizer, got function"):
        titans.register("optimizer", "mine", lambda *given: given)
    with pytest.raises(ValueError, match=r"kind must be one of network, objective, .* got 'gate'"):
        titans.register("gate", "mine", MUON)
    with pytest.raises(ValueError, match="name of a retention must be a text, got ''"):
        titans.register("retention", "", MUON)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"objective": "hubr"}, "unknown memory.objective 'hubr'; did you mean 'huber'"),
        ({"optimizer": "sgd"}, "unknown memory.optimizer 'sgd'; known: momentum, .*muon.*register"),
        ({"window": 0}, "MemoryConfig.window must be at least 1, got 0"),
        ({"window_decay": 0.0}, r"window_decay must lie in \(0, 1\], got 0.0"),
        ({"network": "gated", "decay": "channel"}, "'channel' needs the channels of network"),
        ({"retention": "kl", "learn_initial": False}, "retention 'kl'"),
        ({"window": 2, "decay_first": True, "decay_target": "zero"}, "decay_first needs"),
    ],
)
def test_configs_that_cannot_be_are_one_clear_line(memory, message, without_shape_checks) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MemoryConfig(**memory)
    assert "\n" not in str(caught.value)


def test_a_network_of_another_depth_is_refused(without_shape_checks) -> None:
    with pytest.raises(ValueError, match=r"'gated' has 3 weight matrices, .* got 1"):
        NeuralMemory(MemoryConfig(network="gated"))


def test_baselines_keep_their_own_rule(without_shape_checks) -> None:
    with pytest.raises(ValueError, match="'deltanet' has its own memory, got optimizer 'muon'"):
        TitansConfig(variant="deltanet", memory=MemoryConfig(optimizer="muon"))
    TitansConfig(variant="transformer", memory=MemoryConfig(optimizer="muon"))  # it has none


def test_toml_has_the_names(tmp_path) -> None:
    config = lm("gated").config
    path = tmp_path / "c.toml"
    path.write_text(to_toml(config))
    assert load_toml(path, TitansConfig) == config
    assert config.memory.own == ["network 'gated'", "objective 'huber'", "window 3"]
    assert load_toml(path, TitansConfig, {"memory.window": "1"}).memory.window == 1


def test_the_hash_of_models_without_them_has_not_changed() -> None:
    """Memory files carry it: this is what release 0.1 wrote for the default config."""
    assert TitansConfig().hash() == HASH
    given = MemoryConfig(network="mlp", retention="decay", optimizer="momentum", window=1)
    assert TitansConfig(memory=given).hash() == HASH
    assert TitansConfig(combine_output=False).hash() != HASH
    assert TitansConfig(gate_branch="attention").hash() != HASH
    own = [
        {"objective": "huber"},
        {"retention": "kl"},
        {"optimizer": "muon"},
        {"network": "polynomial"},
        {"window": 2},
        {"window": 2, "window_decay": 0.5},
    ]
    hashes = {TitansConfig(memory=MemoryConfig(**memory)).hash() for memory in own}
    assert len(hashes | {HASH}) == len(own) + 1


HASH = "3aad1c7ebf7cfdbb"


def test_memory_files_without_a_window_still_load(tmp_path) -> None:
    """A file of before there were windows: its structure has no `recent`."""
    state = RuleState.init([torch.randn(2, 4, 4)], 1, momentum=True)
    structure = state.structure()
    assert structure["fields"].pop("recent") == {"value": None}
    back = RuleState.rebuild(json.loads(json.dumps(structure)), state.tensors())
    assert back.recent is None
    assert torch.equal(back.weights[0], state.weights[0])


def test_a_model_of_an_unregistered_name_is_one_clear_line(tmp_path) -> None:
    """In a process where nothing was registered."""
    path = tmp_path / "model.safetensors"
    lm("Yaad").save(path)
    code = f"import titans; titans.load({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError")
    assert "unknown memory.objective 'huber'; known: l2, dot; titans.register adds others" in last


def test_configs_are_plain_data() -> None:
    config = lm("ATLAS").config
    assert build(TitansConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_looking_inside(without_shape_checks) -> None:
    """What a memory does is watched with any rule; explained where the equations are the rule's."""
    seen = list(watch(lm("ATLAS").float(), some_tokens()[:1], piece=8))
    assert torch.isfinite(seen[-1].moved).all()
    model, tokens = lm("gated").float(), some_tokens(5)[:1]
    with pytest.raises(
        ValueError, match="own retention, optimizer and window, got network 'gated'"
    ):
        explain(model, None, tokens, 0, 0)
    step = explain(lm("Yaad"), None, tokens, 0, 0)
    for layer, gradient in enumerate(step.gradient):
        written = -step.learning_rate[layer][:, None, None] * gradient
        kept = step.weights[layer][:-1] - step.decay[layer][:, None, None] * (
            step.weights[layer][:-1] - step.resting[layer]
        )
        torch.testing.assert_close(step.weights[layer][1:], kept + written)


def test_a_recall_is_of_the_weights_that_the_retention_gives() -> None:
    """Memora's are a softmax over each column of what it keeps (MIRAS)."""
    model, tokens = lm("Memora"), some_tokens()
    seen = probe(model, None, tokens, 3)
    state = model(tokens)[1]
    layer, held = model.blocks[0].mixer.memory, state.blocks[0].memory.rule.weights
    keys = seen.keys[:, 0, :, None]
    whole = [w + initial for w, initial in zip(held, layer.initial, strict=True)]
    expected = layer.network.apply([w.softmax(-2) for w in whole], keys)[:, :, 0]
    torch.testing.assert_close(recall(model, state, seen).returned[:, 0], expected)


def test_the_documents_code_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "own_rules.md").read_text()
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, scope)
    assert scope["model"].config.memory.optimizer == "my-normalised"
