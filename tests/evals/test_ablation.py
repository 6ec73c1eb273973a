"""The ablation: every part changes one thing, and what is trained is what is tested."""

import dataclasses

import pytest
import torch

from titans.config import to_dict
from titans.evals.ablation import (
    BASE,
    PARTS,
    AblationConfig,
    ChunkScore,
    PartScore,
    ablation,
    at_chunk,
    train_part,
)
from titans.evals.perplexity import PerplexityConfig, perplexity
from titans.models.lm import TitansLM
from titans.state import NonFiniteError

DELTA = ("gated-deltanet", "gated-deltanet-closing")
LINEAR = {"memory.depth", "memory.residual", "memory.norm"}
SIGMOID = {"memory.gates", "memory.tie_forgetting"}
BY_ATTENTION = {"gate_branch", "gate_activation"}
CHANGES = {
    "lmm": set(),
    "linear": LINEAR,
    "linear-exact": LINEAR | {"memory.chunk_size"},
    "no-convolution": {"memory.conv_width"},
    "no-momentum": {"memory.momentum"},
    "no-decay": {"memory.decay"},
    "no-persistent": {"persistent"},
    **{f"depth-{n}": {"memory.depth"} for n in (1, 3, 4)},
    **{f"chunk-{n}": {"memory.chunk_size"} for n in (1, 4, 64)},
    "unbounded": {"memory.max_surprise"},
    "key-init": {"memory.key_init"},
    "gates-per-layer": {"memory.per_layer_gates"},
    "to-zero": {"memory.decay_target"},
    "sigmoid": SIGMOID,
    **{variant: {"variant"} for variant in ("mac", "mag", "mal")},
    **{f"{variant}-sigmoid": {"variant"} | SIGMOID for variant in ("mac", "mag", "mal")},
    **{f"{variant}-by-attention": {"variant"} | BY_ATTENTION for variant in ("mac", "mag")},
    **{f"{variant}-unmapped": {"variant", "combine_output"} for variant in ("mac", "mag")},
    **{
        f"{variant}-by-attention-unmapped": {"variant", "combine_output"} | BY_ATTENTION
        for variant in ("mac", "mag")
    },
}


@pytest.fixture
def config(tmp_path):
    text = "".join(f"In {n} the {n % 7}th ship came. " for n in range(400))
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(text)
    return AblationConfig(
        paths=(str(tmp_path / "train.txt"),),
        test_paths=(str(tmp_path / "test.txt"),),
        parts=("lmm", "linear"),
        steps=3,
        tokens_per_batch=1024,
        test_tokens=500,
        chunks=(4,),
    )


def changed(config):
    def flat(values, path=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{path}{key}.")
            else:
                yield path + key, value

    base = dict(flat(to_dict(BASE)))
    return {key for key, value in flat(to_dict(config)) if value != base.get(key)}


def test_a_part_changes_what_it_says_and_nothing_else():
    assert {name: changed(PARTS[name].config) for name in PARTS if name not in DELTA} == CHANGES
    for name, part in PARTS.items():
        named = name.split("-")[0]
        wanted = named if named in ("mac", "mag", "mal") else part.config.variant
        assert part.config.variant == wanted


def test_gated_deltanet_beside_its_rule_with_gates_that_close_differs_in_them_alone():
    own, closing = (TitansLM(PARTS[n].config) for n in DELTA)
    assert own.config.memory != closing.config.memory
    assert dataclasses.replace(own.config.memory, gates="closing") == closing.config.memory
    first, second = (
        {name for name, p in model.named_parameters() if p.numel() and ".gates." not in name}
        for model in (own, closing)
    )
    assert first == second  # neither has persistent tokens


def test_every_part_can_be_built():
    for part in PARTS.values():
        TitansLM(part.config)


def test_scores_are_perplexities_of_the_trained_models(config, tmp_path):
    seen = []
    result = ablation(config, seen.append)
    assert [score for score in seen if isinstance(score, PartScore)] == list(result.parts)
    assert [score for score in seen if isinstance(score, ChunkScore)] == list(result.chunks)
    assert [(p.part, p.seed) for p in result.parts] == [("lmm", 0), ("linear", 0)]
    model, score = train_part(config, "lmm", 0, tmp_path / "again")
    assert dataclasses.replace(score, train_seconds=0.0) == dataclasses.replace(
        result.parts[0], train_seconds=0.0
    )
    reading = PerplexityConfig(paths=config.test_paths, max_tokens=500)
    assert score.bits_per_byte == perplexity(model, reading).bits_per_byte
    # The chunk is part of the function: the same weights give another number.
    other = at_chunk(model, 4)
    assert other.config.memory.chunk_size == 4
    assert result.chunks[0].bits_per_byte == perplexity(other, reading).bits_per_byte
    assert result.chunks[0].bits_per_byte != score.bits_per_byte
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor)


def test_a_part_that_diverges_is_named_and_the_others_go_on(config, monkeypatch):
    def fails(config, part, seed, folder):
        if part == "lmm":
            raise NonFiniteError("step 2: the loss is not finite")
        return train_part(config, part, seed, folder)

    monkeypatch.setattr("titans.evals.ablation.train_part", fails)
    seen = []
    result = ablation(config, seen.append)
    assert [score.part for score in result.parts] == ["linear"]
    assert [(one.model, one.reason) for one in result.diverged] == [
        ("lmm", "step 2: the loss is not finite")
    ]
    assert seen == [*result.diverged, *result.parts, *result.chunks]


def test_a_rule_without_chunks_is_not_read_in_them(config):
    parts = ("gated-deltanet", "linear")
    result = ablation(dataclasses.replace(config, parts=parts, steps=1))
    assert [p.part for p in result.parts] == list(parts)
    assert [c.part for c in result.chunks] == ["linear"]


def test_what_it_is_tested_on_is_looked_at_before_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr("titans.evals.ablation.train", None)
    (tmp_path / "one.txt").write_text("1")
    for path, message in [("absent.txt", "absent.txt"), ("one.txt", "two bytes or more")]:
        with pytest.raises(ValueError, match=message):
            ablation(dataclasses.replace(config, test_paths=(str(tmp_path / path),)))
    with pytest.raises(ValueError, match="max_tokens must not be negative"):
        dataclasses.replace(config, test_tokens=-1)


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="unknown part 'no-momentun'; did you mean 'no-momentum'"):
        AblationConfig(paths=("a",), test_paths=("b",), parts=("no-momentun",))
    with pytest.raises(ValueError, match="parts or seeds is empty"):
        AblationConfig(paths=("a",), test_paths=("b",), seeds=())


def test_a_part_that_reads_no_numbers_is_named_and_the_others_go_on(config, monkeypatch):
    """Its training was finite; a stream far longer than the rows of training is another thing."""

    def damaged(model, reading):
        if model.config.memory.depth > 1:
            with torch.no_grad():
                model.embedding.weight.fill_(float("nan"))
        return perplexity(model, reading)

    monkeypatch.setattr("titans.evals.ablation.perplexity", damaged)
    result = ablation(config)
    assert [one.model for one in result.diverged] == ["lmm"]
    assert "is not finite" in result.diverged[0].reason
    assert [score.part for score in result.parts] == ["linear"]


def test_chunks_that_read_no_numbers_are_named(config, monkeypatch):
    def damaged(model, reading):
        if model.config.memory.chunk_size == max(config.chunks):
            raise NonFiniteError("the loss of tokens 0 to 511 is not finite")
        return perplexity(model, reading)

    monkeypatch.setattr("titans.evals.ablation.perplexity", damaged)
    seen = []
    result = ablation(config, seen.append)
    assert f"lmm, chunks of {max(config.chunks)}" in [one.model for one in result.diverged]
    assert [c for c in result.chunks if c.chunk_size == max(config.chunks)] == []
    assert all(one in seen for one in (*result.diverged, *result.parts, *result.chunks))
