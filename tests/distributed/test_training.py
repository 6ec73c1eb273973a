"""Training on 2 and 4 processes: losses and weights of one process; checkpoints for any number."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from launch import launch

from titans.config import MemoryConfig, TitansConfig
from titans.models import lm
from titans.train.batches import open_data
from titans.train.checkpoint import (
    Training,
    last_batch,
    latest,
    missing_file,
    optimizer_tensors,
)
from titans.train.config import (
    DataConfig,
    DistributedConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from titans.train.loop import new_training, resume_training, take_step, train
from titans.train.parts import whole_tensor
from titans.train.processes import processes, spread
from titans.train.sharded import save_sharded

CPU = torch.device("cpu")


def rounding(name: str) -> float:
    """Of float32 losses over a run: sums over a team round in another order at every layer."""
    return 1e-4 if "tensor" in name else 2e-5


# By name: settings of [distributed]; those with 4 in front are for four processes alone, those
# with muon are trained by it.
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"strategy": "fsdp"},
    "sequence": {"sequence": 2},
    "fsdp-sequence": {"strategy": "fsdp", "sequence": 2},
    "tensor": {"tensor": 2},
    "fsdp-tensor": {"strategy": "fsdp", "tensor": 2},
    "muon-fsdp": {"strategy": "fsdp"},
    "4-machines": {"strategy": "fsdp", "shard": 2},
    "4-tensor-sequence": {"tensor": 2, "sequence": 2},
    "muon-machines-tensor": {"strategy": "fsdp", "shard": 1, "tensor": 2},
}


def make(
    folder: Path,
    distributed: dict[str, Any],
    optimizer: Literal["adamw", "muon"] = "adamw",
    **fields: Any,
) -> RunConfig:
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
        optimizer=OptimizerConfig(name=optimizer, warmup=2),
        distributed=DistributedConfig(**distributed),
    )


def steps(config: RunConfig, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Four steps: losses, norms, and the gradients and weights after the last."""
    with processes(config, CPU) as here:
        training = new_training(config, CPU)
        training.model.to(dtype)
        training = spread(training, config, here)
        data = open_data(config)
        rows = []
        for step in range(4):
            batch = data.at(step).train.batch(step)
            batch = batch._replace(weights=batch.weights.to(dtype))
            rows.append(take_step(training, batch, config, here))
        keys = ("loss", "open", "grad_norm")
        result = {
            key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in keys
        }
        for name, parameter in training.model.named_parameters():
            for kind, value in (("weight", parameter.detach()), ("gradient", parameter.grad)):
                if value is not None:
                    result[f"{kind} {name}"] = whole_tensor(training.model, name, value).clone()
        return result


def all_steps(rank: int, count: int, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """`steps` with every strategy, their losses in pieces of 7 tokens."""
    whole, lm.LOGITS = lm.LOGITS, 7 * 257
    result = {
        name: steps(make(Path(folder), settings, optimizer(name), accumulate=1 + (name == "ddp")))
        for name, settings in STRATEGIES.items()
        if count == 4 or not name.startswith("4")
    }
    lm.LOGITS = whole
    return result


def optimizer(name: str) -> Literal["adamw", "muon"]:
    return "muon" if name.startswith("muon") else "adamw"


def rounded_steps(rank: int, count: int, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """`steps` in bf16."""
    config = {name: make(Path(folder), STRATEGIES[name], **BF16) for name in ROUNDED}
    return {name: steps(config[name], torch.float32) for name in ROUNDED}


def go_on(rank: int, count: int, folder: str, *names: str) -> None:
    """The runs folder/name, each from its newest checkpoint."""
    for name in names:
        config = make(Path(folder), STRATEGIES[name.split("_")[0]])
        done = train(config, Path(folder) / name, progress=False)
        assert done.finished
        assert done.first == (rank == 0)


def losses(folder: Path) -> list[float]:
    """Of all steps, and that of the evaluation at the end."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows] + [rows[-1]["valid_loss"]]


def back_to_step_4(run: Path, copy: Path) -> None:
    """A copy of a run as it was in the middle of its second document."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000008")


ROUNDED = ("ddp", "fsdp", "tensor")
BF16: dict[str, Any] = {"precision": "bf16", "clip": 0.0}
ON_TWO = ("ddp", "fsdp-sequence", "tensor")
ON_FOUR = (
    "ddp_from-fsdp-sequence",
    "fsdp-tensor_from-ddp",
    "fsdp_from-one",
    "sequence_from-tensor",
)


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("alone")
    return {"adamw": steps(make(folder, {})), "muon": steps(make(folder, {}, "muon"))}


@pytest.mark.parametrize("count", [2, 4])
def test_steps_are_those_of_one_process(count: int, want: Any, tmp_path: Path) -> None:
    make(tmp_path, {})
    results = launch(all_steps, count, tmp_path / "processes", str(tmp_path))
    for result in results:
        assert len(result) == sum(count == 4 or name[0] != "4" for name in STRATEGIES)
        for name, got in result.items():
            expected = want[optimizer(name)]
            assert expected["grad_norm"].min() > 0
            assert got.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(
                    got[key], value, rtol=1e-10, atol=1e-10, msg=f"{name} {key}"
                )


def test_bf16_rounds_no_more_on_two_processes_than_on_one(tmp_path: Path) -> None:
    """The rows of two processes are those of two parts in one process: the same numbers are
    rounded, all else is float32. Against one part other sums are rounded; what that may come to
    is measured as the error of bf16 itself."""
    one, parts = (
        steps(make(tmp_path, {}, accumulate=parts, **BF16), torch.float32)["loss"]
        for parts in (1, 2)
    )
    error = (one - steps(make(tmp_path, {}, clip=0.0))["loss"]).abs().max()
    assert 1e-5 < error < 0.1
    result, _ = launch(rounded_steps, 2, tmp_path / "processes", str(tmp_path))
    for name in ROUNDED:
        losses = result[name]["loss"]
        if name != "tensor":
            torch.testing.assert_close(losses, parts, rtol=1e-6, atol=0.0, msg=name)
        assert (losses - one).abs().max() < error, name


def test_runs_go_on_with_another_number_of_processes(tmp_path: Path) -> None:
    train(make(tmp_path, {}), tmp_path / "one", progress=False)
    one = losses(tmp_path / "one")
    launch(go_on, 2, tmp_path / "two", str(tmp_path), *ON_TWO)
    for name in ON_TWO:
        assert losses(tmp_path / name) == pytest.approx(one, rel=rounding(name)), name
        batches = {last_batch(latest(tmp_path / run)) for run in (name, "one")}
        assert len(batches) == 1
        assert "" not in batches
        copy = tmp_path / f"one_from-{name}"
        back_to_step_4(tmp_path / name, copy)
        result = train(make(tmp_path, {}), copy, progress=False)
        assert losses(copy) == pytest.approx(one, rel=rounding(name)), name
        alone, shared = (
            lm.load(f / "model.safetensors").state_dict()
            for f in (result.checkpoint, tmp_path / name / "checkpoints" / "step-000008")
        )
        for key, value in alone.items():
            where = f"{name} {key}"
            torch.testing.assert_close(shared[key], value, rtol=1e-3, atol=1e-4, msg=where)
    for name in ON_FOUR:
        back_to_step_4(tmp_path / name.split("from-")[1], tmp_path / name)
    launch(go_on, 4, tmp_path / "four", str(tmp_path), *ON_FOUR)
    for name in ON_FOUR:
        assert losses(tmp_path / name) == pytest.approx(one, rel=rounding(name)), name


PARTS: dict[str, Any] = {"heads": 2, "depth": 2, "decay": "channel", "chunk_size": 4}


def make_parts(folder: Path, distributed: dict[str, Any]) -> RunConfig:
    """A run whose heads are in blocks of different sizes, and shards across their bounds."""
    config = make(folder, distributed)
    model = dataclasses.replace(config.model, memory=MemoryConfig(**PARTS), tie_embeddings=False)
    return dataclasses.replace(config, model=model)


def whole_tensors(training: Training) -> dict[str, torch.Tensor]:
    """Weights and moments."""
    model = training.model
    found = {name: whole_tensor(model, name, p.detach()) for name, p in model.named_parameters()}
    for key, value in optimizer_tensors(training).items():
        found[key] = whole_tensor(model, key.split("/")[1], value) if value.ndim else value
    return found


def write_parts(rank: int, count: int, folder: str) -> dict[str, torch.Tensor]:
    config = make_parts(Path(folder), {"strategy": "fsdp", "tensor": 2})
    with processes(config, CPU) as here:
        training = spread(new_training(config, CPU), config, here)
        data = open_data(config)
        for step in range(2):
            take_step(training, data.at(step).train.batch(step), config, here)
        save_sharded(Path(folder), training, 1, here, 5)
        return whole_tensors(training)


def read_parts(rank: int, count: int, folder: str) -> dict[str, torch.Tensor]:
    config = make_parts(Path(folder), {"tensor": count})
    with processes(config, CPU) as here:
        start = latest(folder)
        training = resume_training(new_training(config, CPU), start, config, CPU, here)
        return whole_tensors(training)


def test_what_processes_held_parts_of_is_read_whole(tmp_path: Path) -> None:
    want = launch(write_parts, 4, tmp_path / "four", str(tmp_path))[0]
    parts = launch(read_parts, 2, tmp_path / "two", str(tmp_path))
    for got in (*parts, read_parts(0, 1, str(tmp_path))):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], value) for key, value in want.items())
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    model = lm.load(checkpoint / "model.safetensors")
    assert all(torch.equal(p, want[name]) for name, p in model.named_parameters())
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert len(files) == 9  # four shards and what is in them, the memories of two replicas
    for path in files:
        away = path.rename(tmp_path / "away")
        assert missing_file(checkpoint) == path
        away.rename(path)
    assert missing_file(checkpoint) is None


def test_config_says_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"distributed.sequence \(3\) must divide the tokens"):
        make(tmp_path, {"sequence": 3})
    with pytest.raises(ValueError, match=r"distributed.tensor \(4\) must divide model.heads"):
        make(tmp_path, {"tensor": 4})
    with pytest.raises(ValueError, match=r"distributed.shard must be 0"):
        make(tmp_path, {"shard": 2})
    monkeypatch.setenv("WORLD_SIZE", "6")
    for settings, message in (
        ({}, "6 processes need a batch of 6 rows or more, got 5"),
        ({"sequence": 4}, r"distributed.sequence \(4\) must divide the number of processes, got 6"),
        (
            {"sequence": 2, "tensor": 2},
            r"distributed.sequence \(2\) times distributed.tensor \(2\)",
        ),
        (
            {"strategy": "fsdp", "shard": 2, "tensor": 2},
            r"distributed.shard \(2\) times distributed.tensor \(2\) must divide .* got 6",
        ),
    ):
        with pytest.raises(ValueError, match=message), processes(make(tmp_path, settings), CPU):
            pass


def test_another_distribution_is_no_other_run(tmp_path: Path) -> None:
    from titans.train.config import first_difference

    one = make(tmp_path, {})
    assert first_difference(one, make(tmp_path, {"strategy": "fsdp", "sequence": 2})) is None
    other = dataclasses.replace(one, train=dataclasses.replace(one.train, steps=9))
    assert first_difference(one, other) == "train.steps is 8 there and 9 here"
