"""Which parameter goes where, and how fast."""

from itertools import pairwise

import pytest
import torch

from titans.config import MemoryConfig, TitansConfig
from titans.models.lm import TitansLM
from titans.train.config import OptimizerConfig
from titans.train.optim import build_optimizers, schedule, set_learning_rate, split_parameters

MEMORY = MemoryConfig(heads=2, conv_width=2, decay="channel", decay_rank=3, depth=2, expansion=2)


def model_of(variant="mac", tied=True):
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant, dim=32, layers=1, ffn_hidden=32, memory=MEMORY, tie_embeddings=tied
    )
    return TitansLM(config)


def names_of(model, parameters):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal", "sliding"])
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_are_the_linear_maps_of_the_blocks(variant, tied):
    model = model_of(variant, tied)
    matrices, others = split_parameters(model)
    chosen, left = names_of(model, matrices), names_of(model, others)
    assert sorted(chosen + left) == sorted(name for name, _ in model.named_parameters())
    assert all(p.ndim == 2 for p in matrices)
    ends = ("qkv.weight", "output.weight", "output_gate.weight")
    assert all(name.endswith(ends) for name in chosen if "mixer" in name)
    projections = [name for name in chosen if "qkv" in name]
    assert len(projections) == (1 if variant in ("lmm", "sliding") else 2)
    assert {name for name in chosen if "ffn" in name} == {
        name for name, _ in model.named_parameters() if ".ffn." in name
    }
    exempt = (".gates.", "initial", "persistent", "norm", "conv", "embedding", "head", "bias")
    assert all(any(word in name for word in exempt) for name in left)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_moves_once(name):
    model = model_of()
    optimizers = build_optimizers(model, OptimizerConfig(name=name))
    assert set(optimizers) == ({"adamw", "muon"} if name == "muon" else {"adamw"})
    moved = [
        p for optimizer in optimizers.values() for g in optimizer.param_groups for p in g["params"]
    ]
    assert sorted(map(id, moved)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name):
    model = model_of()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizers = build_optimizers(model, OptimizerConfig(name=name, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers.values():
        optimizer.step()
    matrices = names_of(model, split_parameters(model)[0])
    factor = 1 - 3e-3 * 0.5
    for key, p in model.named_parameters():
        expected = before[key] * factor if key in matrices else before[key]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


def test_muon_has_its_own_rate_and_both_follow_the_schedule():
    config = OptimizerConfig(name="muon", learning_rate=1e-3, muon_learning_rate=2e-2)
    optimizers = build_optimizers(model_of(), config)
    set_learning_rate(optimizers, 0.5)
    set_learning_rate(optimizers, 0.25)
    assert [g["lr"] for g in optimizers["adamw"].param_groups] == [0.25e-3]
    assert [g["lr"] for g in optimizers["muon"].param_groups] == [0.5e-2]


def test_muon_moves_every_direction_alike():
    """A gradient with one strong direction: AdamW's update is led by it, Muon's is not."""
    model = model_of()
    optimizers = build_optimizers(model, OptimizerConfig(name="muon", weight_decay=0.0))
    weight = model.blocks[0].ffn.down.weight
    left, _, right = torch.linalg.svd(torch.randn(weight.shape))
    weight.grad = left @ torch.diag(torch.logspace(0, -1, len(left))) @ right
    before = weight.detach().clone()
    optimizers["muon"].step()
    values = torch.linalg.svdvals(weight.detach() - before)
    assert values.max() / values.min() < 3  # Newton-Schulz leaves them in about [0.7, 1.2]


def test_schedule_warms_up_and_falls_to_its_floor():
    config = OptimizerConfig(warmup=4, min_ratio=0.1)
    factors = [schedule(step, 20, config) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert all(a > b for a, b in pairwise(factors[4:]))
    assert factors[-1] == pytest.approx(0.1)
    halfway = schedule(4 + 8, 4 + 17, config)
    assert halfway == pytest.approx(0.55)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (3, 3), (2, 1)])
def test_schedule_of_a_short_run_stays_in_range(steps, warmup):
    config = OptimizerConfig(warmup=warmup)
    assert all(0 < schedule(step, steps, config) <= 1 for step in range(steps))
