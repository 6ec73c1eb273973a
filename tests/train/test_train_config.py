"""The TOML of a run: read back as written, and every mistake in it named."""

from dataclasses import replace

import pytest

from titans.config import MemoryConfig, TitansConfig, load_toml, to_toml
from titans.data.documents import expand_paths
from titans.train.config import (
    BabiRows,
    DataConfig,
    DistributedConfig,
    NeedleRows,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    first_difference,
    write_cost_at,
)

CURRICULUM = """
[model]
dim = 64
[model.memory]
heads = 2
[data]
task = "facts"
lengths = [64]
stages = [1200, 1800]
stage_lengths = [[64, 256], [64, 1024]]
stage_facts = [[1, 8], [2, 16]]
[train]
steps = 2000
log = ["tensorboard"]
"""


def test_toml_reads_back_as_the_same_config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(CURRICULUM)
    config = load_toml(path, RunConfig, {"train.steps": "2400", "data.stages": "[1000, 2000]"})
    assert config.model.memory.dim == 64
    assert config.train.steps == 2400
    assert tuple(stage[:3] for stage in config.data.curriculum()) == (
        (0, (64,), (1, 8)),
        (1000, (64, 256), (1, 8)),
        (2000, (64, 1024), (2, 16)),
    )
    path.write_text(to_toml(config))
    assert load_toml(path, RunConfig) == config


def test_stages_keep_the_number_of_facts():
    data = DataConfig(task="facts", facts_max=3, stages=(5,), stage_lengths=((128,),))
    assert tuple(stage[:3] for stage in data.curriculum()) == (
        (0, (64,), (1, 3)),
        (5, (128,), (1, 3)),
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 0}, "DataConfig.length must be at least 1, got 0"),
        ({"segments": 0}, "DataConfig.segments must be at least 1"),
        ({"garble": 1.5}, r"data.garble must lie in \[0, 1\], got 1.5"),
        ({"text_weight": -1.0}, "text_weight must not be negative, got -1.0"),
        ({"stages": (5,)}, "stage_lengths must have one list for each of the 1 stages, got 0"),
        (
            {"stages": (5,), "stage_lengths": ((64,),), "stage_facts": ((1, 2), (1, 2))},
            "stage_facts must be empty or have one pair for each of the 1 stages, got 2",
        ),
        (
            {"stages": (5, 5), "stage_lengths": ((64,), (64,))},
            r"stages must be rising steps above 0, got \[5, 5\]",
        ),
        (
            {"stages": (5,), "stage_lengths": ((64,),), "stage_facts": ((1,),)},
            "stage_facts must be pairs",
        ),
        ({"stages": (5,), "stage_lengths": ((),)}, "lengths must be positive"),
        ({"lengths": (0,)}, r"lengths must be positive, got \[0\]"),
        ({"facts_min": 9}, r"expected 0 < facts_min <= facts_max, got \[9, 8\]"),
        ({"segments": 2}, "segments is for the task text"),
        ({"tokenizer": "bpe.json"}, "the task facts reads bytes, got data.tokenizer 'bpe.json'"),
        ({"task": "text", "stages": (5,), "stage_lengths": ((64,),)}, "stages is for the task"),
    ],
)
def test_data_mistakes_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"task": "facts", **values})


def test_questions_have_a_section_of_their_own(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[data]\ntask = "needle"\nstages = [5]\nstage_lengths = [[512]]\n'
        '[data.needle]\nkinds = ["single-1", "variables"]\n[data.babi]\ntasks = [1, 4]\n'
    )
    config = load_toml(path, RunConfig, {"data.needle.dense": "0.25", "data.babi.folder": "x"})
    assert config.data.needle.kinds == ("single-1", "variables")
    assert (config.data.needle.dense, config.data.babi.dense) == (0.25, 0.5)
    assert config.data.babi == BabiRows(tasks=(1, 4), folder="x")
    path.write_text(to_toml(config))
    assert load_toml(path, RunConfig) == config
    path.write_text("[data.needle]\nkind = 3")
    with pytest.raises(ValueError, match=r"unknown key 'data.needle.kind'; did you mean 'data"):
        load_toml(path, RunConfig)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (NeedleRows, {"kinds": ()}, "data.needle.kinds is empty"),
        (NeedleRows, {"kinds": ("single",)}, "unknown needle kind 'single'; known: single-1"),
        (NeedleRows, {"stray": -1.0}, r"data.needle.stray must lie in \[0, 50\], got -1.0"),
        (NeedleRows, {"dense": 1.5}, r"data.needle.dense must lie in \[0, 1\], got 1.5"),
        (BabiRows, {"tasks": (0,)}, r"data.babi.tasks must be numbers from 1 on, got \[0\]"),
        (BabiRows, {"tasks": ()}, "data.babi.tasks must be"),
        (BabiRows, {"dense": -0.5}, "data.babi.dense must lie"),
        (BabiRows, {"stray": 1.0, "tasks": (1, 13)}, "data.babi.stray: tasks 11 and 13 are about"),
        (BabiRows, {"stray": 51.0}, r"data.babi.stray must lie in \[0, 50\], got 51.0"),
        (BabiRows, {"echo": -1.0}, r"data.babi.echo must lie in \[0, 50\], got -1.0"),
        (OptimizerConfig, {"learning_rate": 0.0}, "expected learning rates above 0, got 0.0"),
        (OptimizerConfig, {"muon_learning_rate": -1.0}, "learning rates above 0, got -1.0"),
        (OptimizerConfig, {"muon_learning_rate": 0.0}, "learning rates above 0, got 0.0"),
        (OptimizerConfig, {"betas": (0.9,)}, r"betas must be two of \[0, 1\), got \[0.9\]"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, "betas must be two"),
        (OptimizerConfig, {"weight_decay": -0.1}, "must not be negative"),
        (OptimizerConfig, {"min_ratio": 2.0}, r"min_ratio must lie in \[0, 1\], got 2.0"),
        (TrainConfig, {"steps": 0}, "TrainConfig.steps must be at least 1"),
        (TrainConfig, {"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        (TrainConfig, {"seed": -1}, "train.seed must not be negative, got -1"),
        (TrainConfig, {"write_cost": -0.1}, "train.write_cost must not be negative"),
        (TrainConfig, {"write_half": -0.1}, "train.write_half must not be negative"),
        (TrainConfig, {"threads": 2000}, "train.threads must be at most 1024, got 2000"),
        (OptimizerConfig, {"muon_learning_rate": 0.1}, "muon_learning_rate is for optimizer.name"),
        (TitansConfig, {"rope_base": 0.0}, "rope_base must be positive, got 0.0"),
        (MemoryConfig, {"half_life_max": 1e300}, r"half_life_max must be at most 1e\+30, got 1e"),
    ],
)
def test_other_mistakes_are_named(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        (OptimizerConfig, "name", "sgd", "unknown name 'sgd'; known: adamw, muon"),
        (DataConfig, "task", "needles", "unknown task 'needles'; did you mean 'needle'"),
        (TrainConfig, "precision", "fp16", "unknown precision 'fp16'; did you mean 'bf16'"),
        (DistributedConfig, "strategy", "dp", "unknown strategy 'dp'; did you mean 'ddp'"),
        (NeedleRows, "words", 3, "words must be str, got 3"),
        (BabiRows, "tasks", (1.5,), r"tasks\[0\] must be int, got 1.5"),
    ],
)
def test_what_python_makes_is_held_to_what_toml_is(
    kind, name, value, message, without_shape_checks
):
    with pytest.raises(ValueError, match=message):
        kind(**{name: value})


def test_a_batch_must_hold_a_row():
    with pytest.raises(ValueError, match=r"tokens_per_batch \(100\) must hold a row of 512"):
        RunConfig(train=TrainConfig(tokens_per_batch=100))
    facts = DataConfig(task="facts", stages=(5,), stage_lengths=((4096,),))
    with pytest.raises(ValueError, match="must hold a row of 4096 tokens"):
        RunConfig(data=facts, train=TrainConfig(tokens_per_batch=1024))
    with pytest.raises(ValueError, match=r"accumulate \(3\) must not exceed the 2 rows"):
        RunConfig(train=TrainConfig(tokens_per_batch=1024, accumulate=3))


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[train]\nstep = 3", "unknown key 'train.step'; did you mean 'train.steps'"),
        ("[train]\nsteps = 1.5", "train.steps must be int, got 1.5"),
        ('[train]\nprecision = "bf61"', "unknown train.precision 'bf61'; did you mean 'bf16'"),
        ('[train]\nlog = ["tensorbord"]', "did you mean 'tensorboard'"),
        ('[data]\npaths = "text"', "data.paths must be a list"),
        ('[optimizer]\nname = "sgd"', "unknown optimizer.name 'sgd'"),
    ],
)
def test_toml_mistakes_are_named(tmp_path, toml, message):
    path = tmp_path / "run.toml"
    path.write_text(toml)
    with pytest.raises(ValueError, match=message) as error:
        load_toml(path, RunConfig)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_paths_may_name_an_environment_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("TITANS_DATA_DIR", str(tmp_path))
    paths = ("$TITANS_DATA_DIR/a", "${TITANS_DATA_DIR}/b", "c")
    assert [str(p) for p in expand_paths(paths)] == [f"{tmp_path}/a", f"{tmp_path}/b", "c"]
    monkeypatch.delenv("TITANS_DATA_DIR")
    with pytest.raises(ValueError, match="the environment variable TITANS_DATA_DIR is not set"):
        expand_paths(paths)


def test_the_first_difference_is_named():
    one = RunConfig(model=TitansConfig(dim=32), optimizer=OptimizerConfig(name="muon"))
    other = RunConfig(
        model=TitansConfig(dim=32), optimizer=OptimizerConfig(name="muon", muon_learning_rate=0.1)
    )
    assert first_difference(one, one) is None
    difference = first_difference(one, other)
    assert difference == "optimizer.muon_learning_rate is None there and 0.1 here"


def test_what_may_change_is_no_difference() -> None:
    """And is not mixed with the rest: nobody asked for 2 processes and 3 heads."""
    one = RunConfig(
        model=TitansConfig(dim=12, heads=2), distributed=DistributedConfig(tensor=2, sequence=1)
    )
    other = RunConfig(model=TitansConfig(dim=12, heads=3), train=TrainConfig(threads=2))
    assert first_difference(one, other) == "model.heads is 2 there and 3 here"
    same = replace(one, distributed=DistributedConfig(), train=TrainConfig(checkpoint_every=7))
    assert first_difference(one, same) is None


def test_every_stage_may_have_its_own_write_cost() -> None:
    data = DataConfig(
        task="facts",
        lengths=(64,),
        facts_max=1,
        stages=(10, 20),
        stage_lengths=((64,), (128,)),
        stage_write_costs=(0.1, 0.3),
    )
    config = RunConfig(data=data, train=TrainConfig(write_cost=0.0))
    assert [write_cost_at(config, step) for step in (0, 9, 10, 19, 20, 99)] == [
        0.0,
        0.0,
        0.1,
        0.1,
        0.3,
        0.3,
    ]
    with pytest.raises(ValueError, match="stage_write_costs must be empty or have one number"):
        DataConfig(task="facts", stages=(10,), stage_lengths=((64,),), stage_write_costs=(1.0, 2.0))
    with pytest.raises(ValueError, match="stage_write_costs must not be negative"):
        DataConfig(task="facts", stages=(10,), stage_lengths=((64,),), stage_write_costs=(-1.0,))
