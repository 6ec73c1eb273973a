"""Training on 2 and 4 processes: losses and weights of one process; checkpoints for any number."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch

from titans.config import MemoryConfig, TitansConfig
from titans.models import lm
from titans.train.batches import open_data
from titans.train.config import (
    DataConfig,
    DistributedConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from titans.train.loop import new_training, take_step, train
from titans.train.processes import processes, spread

CPU = torch.device("cpu")
# By name: settings of [distributed]; those with 4 in front are for four processes alone.
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"strategy": "fsdp"},
    "sequence": {"sequence": 2},
    "fsdp-sequence": {"strategy": "fsdp", "sequence": 2},
    "4-machines": {"strategy": "fsdp", "shard": 2},
}


def make(folder: Path, distributed: dict[str, Any], **fields: Any) -> RunConfig:
    """A run of a second on the words in `folder`, three segments a document."""
    text = folder / "words.txt"
    if not text.exists():
        draw = random.Random(0)
        words = ["memory", "surprise", "decay", "gate", "token", "chunk", "key", "value"]
        text.write_text(" ".join(draw.choices(words, k=900)))
    memory = MemoryConfig(heads=2, depth=1, norm=False, residual=False, chunk_size=1, momentum=True)
    model = TitansConfig(
        variant="mag",
        memory=memory,
        dim=16,
        heads=2,
        ffn_hidden=24,
        window=8,
        persistent=2,
    )
    return RunConfig(
        model=model,
        data=DataConfig(paths=(str(text),), valid_paths=(str(text),), length=16, segments=3),
        train=TrainConfig(
            **{
                "steps": 8,
                "tokens_per_batch": 5 * 16,
                "eval_every": 8,
                "eval_batches": 2,
                "checkpoint_every": 4,
                "keep_checkpoints": 9,
                "device": "cpu",
                "threads": 1,
                **fields,
            }
        ),
        optimizer=OptimizerConfig(warmup=2),
        distributed=DistributedConfig(**distributed),
    )


def steps(config: RunConfig) -> dict[str, torch.Tensor]:
    """Four steps in float64: losses, norms, and the gradients and weights after the last."""
    with processes(config, CPU) as here:
        training = new_training(config, CPU)
        training.model.double()
        training = spread(training, config, here)
        data = open_data(config)
        rows = []
        for step in range(4):
            batch = data.at(step).train.batch(step)
            batch = batch._replace(weights=batch.weights.double())
            rows.append(take_step(training, batch, config, here))
        keys = ("loss", "open", "grad_norm")
        result = {
            key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in keys
        }
        for name, parameter in training.model.named_parameters():
            for kind, value in (("weight", parameter.detach()), ("gradient", parameter.grad)):
                if value is not None:
                    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                    result[f"{kind} {name}"] = whole.clone()
        return result


def work(rank: int, count: int, folder: str, *names: str) -> dict[str, Any]:
    """`steps` with every strategy, their losses in pieces of 7 tokens; then the runs folder/name,
    each from its newest checkpoint."""
    whole, lm.LOGITS = lm.LOGITS, 7 * 257
    result = {
        name: steps(make(Path(folder), settings, accumulate=1 + (name == "ddp")))
        for name, settings in STRATEGIES.items()
        if count == 4 or not name.startswith("4")
    }
    lm.LOGITS = whole
    for name in names:
        config = make(Path(folder), STRATEGIES[name.split("_")[0]])
        done = train(config, Path(folder) / name, progress=False)
        assert done.finished
        assert done.first == (rank == 0)
    return result


def losses(folder: Path) -> list[float]:
    """Of all steps, and that of the evaluation at the end."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows] + [rows[-1]["valid_loss"]]


def back_to_step_4(run: Path, copy: Path) -> None:
    """A copy of a run as it was in the middle of its second document."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000008")


ON_TWO = ("ddp", "fsdp-sequence")
ON_FOUR = ("ddp_from-fsdp-sequence", "fsdp_from-ddp", "fsdp_from-one", "sequence_from-one")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make(folder, {})
    return folder


@pytest.fixture(scope="module")
def one(corpus: Path) -> list[float]:
    """The losses of a run of one process."""
    train(make(corpus, {}), corpus / "one", progress=False)
    return losses(corpus / "one")


@pytest.fixture(scope="module")
def two(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return launch(work, 2, tmp_path_factory.mktemp("two"), str(corpus), *ON_TWO)


@pytest.fixture(scope="module")
def four(one: Any, two: Any, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    for name in ON_FOUR:
        back_to_step_4(corpus / name.split("from-")[1], corpus / name)
    return launch(work, 4, tmp_path_factory.mktemp("four"), str(corpus), *ON_FOUR)


@pytest.mark.parametrize("count", ["two", "four"])
def test_steps_are_those_of_one_process(
    count: str, corpus: Path, request: pytest.FixtureRequest
) -> None:
    want = steps(make(corpus, {}))
    assert want["grad_norm"].min() > 0
    for result in request.getfixturevalue(count):
        assert len(result) == len(STRATEGIES) - (count == "two")
        for name, got in result.items():
            assert got.keys() == want.keys()
            for key, value in want.items():
                torch.testing.assert_close(
                    got[key], value, rtol=1e-10, atol=1e-10, msg=f"{name} {key}"
                )


@pytest.mark.parametrize("name", ON_TWO)
def test_one_process_goes_on_with_the_run_of_two(
    name: str, corpus: Path, one: list[float], two: Any
) -> None:
    assert losses(corpus / name) == pytest.approx(one, rel=2e-5)
    copy = corpus / f"one_from-{name}"
    back_to_step_4(corpus / name, copy)
    result = train(make(corpus, {}), copy, progress=False)
    assert losses(copy) == pytest.approx(one, rel=2e-5)
    alone, shared = (
        lm.load(f / "model.safetensors")
        for f in (result.checkpoint, corpus / name / "checkpoints" / "step-000008")
    )
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_processes_go_on_with_the_run_of_others(
    name: str, corpus: Path, one: list[float], four: Any
) -> None:
    assert losses(corpus / name) == pytest.approx(one, rel=2e-5)


def test_config_says_what_does_not_fit(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"distributed.sequence \(3\) must divide the tokens"):
        make(corpus, {"sequence": 3})
    with pytest.raises(ValueError, match=r"distributed.shard must be 0"):
        make(corpus, {"shard": 2})
    monkeypatch.setenv("WORLD_SIZE", "6")
    for settings, message in (
        ({}, "6 processes need a batch of 6 rows or more, got 5"),
        ({"sequence": 4}, r"distributed.sequence \(4\) must divide the number of processes, got 6"),
    ):
        with pytest.raises(ValueError, match=message), processes(make(corpus, settings), CPU):
            pass


def test_another_distribution_is_no_other_run(corpus: Path) -> None:
    from titans.train.config import first_difference

    one = make(corpus, {})
    assert first_difference(one, make(corpus, {"strategy": "fsdp", "sequence": 2})) is None
    other = dataclasses.replace(one, train=dataclasses.replace(one.train, steps=9))
    assert first_difference(one, other) == "train.steps is 8 there and 9 here"
