"""Strict configs: TOML round trip, overrides, suggestions, and every preset."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
import torch

from titans import MemoryConfig, TitansConfig, TitansLM, preset, preset_names
from titans.config import build, load_toml, to_toml
from titans.presets import PAPER_SIZES, count_parameters

ROOT = Path(__file__).parent.parent


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_toml_and_have_their_nominal_size(name: str) -> None:
    config = preset(name)
    assert build(TitansConfig, tomllib.loads(to_toml(config))) == config
    for size in set(name.split("-")) & set(PAPER_SIZES):
        nominal = PAPER_SIZES[size][3]
        assert abs(count_parameters(config) / nominal - 1) < 0.01


def test_paper_presets_are_what_the_texts_say() -> None:
    neurips = preset("mac-340m-paper_neurips")
    assert (neurips.layers, neurips.dim, neurips.heads) == (24, 1024, 16)
    assert (neurips.persistent, neurips.segment, neurips.memory_token_stride) == (128, 512, 2)
    memory = neurips.memory
    assert (memory.depth, memory.expansion, memory.activation) == (2, 4, "gelu")
    assert memory.residual
    assert memory.norm
    assert (memory.chunk_size, memory.decay, memory.per_layer_gates) == (16, "channel", True)
    for text in ("paper_v1", "paper_neurips"):
        memory = preset(f"lmm-170m-{text}").memory
        assert memory.gates == "sigmoid"
        assert memory.momentum
        assert memory.decay_target == "zero"
        assert not memory.dampen_momentum


@pytest.mark.parametrize("name", [n for n in preset_names() if n.endswith("-tiny")])
def test_tiny_presets_run(name: str) -> None:
    logits, _ = TitansLM(preset(name))(torch.arange(100)[None])
    assert torch.isfinite(logits).all()


def test_unknown_preset_suggests_a_near_one() -> None:
    with pytest.raises(ValueError, match="unknown preset 'mac-tny'; did you mean 'mac-tiny'"):
        preset("mac-tny")


def test_memory_follows_the_models_width() -> None:
    assert TitansConfig(dim=256, memory=MemoryConfig(heads=4)).memory.dim == 256


def test_hash_names_the_function_not_its_speed() -> None:
    base = TitansConfig()
    faster = dataclasses.replace(
        base, memory=dataclasses.replace(base.memory, impl="reference", block_size=16)
    )
    assert faster.hash() == base.hash()
    assert dataclasses.replace(base, window=65).hash() != base.hash()
    slower = dataclasses.replace(base, memory=dataclasses.replace(base.memory, chunk_size=2))
    assert slower.hash() != base.hash()


def test_overrides_go_through_the_fields_types(tmp_path) -> None:
    path = write(tmp_path, 'variant = "mag"\n[memory]\nmax_surprise = 2.0\n')
    overrides = {
        "dim": "64",
        "memory.momentum": "true",
        "memory.max_surprise": "none",
        "memory.gates": "sigmoid",
        "rope_base": "500",
    }
    config = load_toml(path, TitansConfig, overrides)
    assert (config.variant, config.dim, config.rope_base) == ("mag", 64, 500.0)
    assert config.memory.momentum
    assert config.memory.max_surprise is None
    assert config.memory.gates == "sigmoid"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("dmi = 3", {}, "unknown key 'dmi'; did you mean 'dim'"),
        ("[memory]\nheds = 2", {}, "unknown key 'memory.heds'; did you mean 'memory.heads'"),
        ("memory = 3", {}, "memory must be a table, got 3"),
        ('dim = "wide"', {}, "dim must be int, got 'wide'"),
        ("dim = true", {}, "dim must be int, got True"),
        ('variant = "mak"', {}, "unknown variant 'mak'; did you mean 'ma[cgl]'"),
        ("heads = 3", {}, r"dim \(128\) must be an even multiple of heads \(3\)"),
        ("layers = 0", {}, "TitansConfig.layers must be at least 1, got 0"),
        ("memory_token_stride = 3", {}, r"segment \(64\) must be a multiple"),
        ("[memory]\ndepth = 0", {}, "MemoryConfig.depth must be at least 1"),
        ("[memory]\nmax_surprise = -1", {}, "max_surprise must not be negative"),
        ("[memory]\nhalf_life_min = 0", {}, "half-lives must satisfy"),
        ("[memory]\ndecay_rank = 4", {}, "decay_rank must be at least 1 and needs decay"),
        ("= 3", {}, "not a readable TOML file"),
        ("", {"memry.depth": "2"}, "unknown section 'memry'; did you mean 'memory'"),
        ("memory = 3", {"memory.depth": "2"}, "memory must be a table, got 3"),
        ("", {"memory.detph": "2"}, "unknown key 'memory.detph'; did you mean 'memory.depth'"),
        ("", {"dim": "big"}, "dim must be int, got 'big'"),
        ("", {"memory.x.y": "5"}, "unknown key 'memory.x.y': memory has no sections"),
        ("x = " + "[" * 100_000, {}, "not a readable TOML file"),
        ("", {"dim": "[" * 100_000}, "dim must be int, got"),
        ("rope_base = 1" + "0" * 400, {}, "rope_base must be a finite number, got one too large"),
    ],
)
def test_bad_configs_are_one_clear_line(tmp_path, text, overrides, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_toml(write(tmp_path, text), TitansConfig, overrides)
    assert "\n" not in str(caught.value)
    assert "c.toml" in str(caught.value)


def test_a_mark_of_the_byte_order_is_no_key(tmp_path) -> None:
    (tmp_path / "c.toml").write_text("dim = 64", encoding="utf-8-sig")
    assert load_toml(tmp_path / "c.toml", TitansConfig).dim == 64


def test_a_missing_config_is_one_clear_line(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_toml(tmp_path / "absent.toml", TitansConfig)


@pytest.mark.parametrize(
    "changes", [{"gates": "Closing"}, {"decay": "chanel"}, {"activation": "relu"}, {"depth": 2.0}]
)
def test_configs_made_in_python_are_held_to_their_types(changes, without_shape_checks) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        MemoryConfig(**changes)


def test_a_table_is_no_config(without_shape_checks) -> None:
    with pytest.raises(ValueError, match=r"memory must be a MemoryConfig, got \{'depth': 2\}"):
        TitansConfig(memory={"depth": 2})


def test_heads_need_divide_only_the_width_of_the_model() -> None:
    assert TitansConfig(dim=96, heads=3, memory=MemoryConfig(heads=3)).memory.key_dim == 32
    with pytest.raises(ValueError, match="must be a multiple of heads"):
        TitansConfig(dim=64, memory=MemoryConfig(heads=3))
    with pytest.raises(ValueError, match="head_dim must be at least 1"):
        MemoryConfig(head_dim=0)


def test_numbers_must_be_finite(tmp_path) -> None:
    with pytest.raises(ValueError, match="rope_base must be a finite number, got nan"):
        load_toml(write(tmp_path, "rope_base = nan"), TitansConfig)
    with pytest.raises(ValueError, match="half_life_max must be a finite number, got inf"):
        MemoryConfig(half_life_max=float("inf"))


def test_any_text_survives_toml() -> None:
    from titans.train.config import DataConfig, RunConfig

    config = RunConfig(data=DataConfig(paths=("a b.txt", 'q"\\.txt', "ümlaut/😀.txt")))
    assert build(RunConfig, tomllib.loads(to_toml(config))) == config
