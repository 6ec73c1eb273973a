"""A run's folder, and checkpoints in it that a killed run goes on from exactly.

    config.toml            the RunConfig
    metrics.jsonl          one JSON object a step
    checkpoints/step-000123/
        model.safetensors      for `titans.load`
        optimizer.safetensors  moments, as `optimizer/parameter/name`
        memory-0.safetensors   what part 0 of the batch remembers, in the middle of a document
        training.json          step, number of memories, identity of the last batch; the last file
                               to be written

Where several processes train together, `titans.train.sharded` writes other files beside
`model.safetensors` and `training.json`.

No state of a random generator is in it: after the initial weights nothing draws from one, and
the data of a step is a function of the seed and the step.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from titans.config import compared, differences, load_toml, to_toml
from titans.data.facts import Batch
from titans.models.lm import TitansLM
from titans.models.lm import load as load_model
from titans.state import (
    ModelState,
    check_header,
    digest,
    read_safetensors,
    write_safetensors,
)
from titans.train.config import RunConfig, first_difference
from titans.train.optim import build_optimizers

FORMAT = "titans-checkpoint"
FORMAT_VERSION = 1
SHARDED_VERSION = 2
CONFIG, MODEL, OPTIMIZER, INDEX = (
    "config.toml",
    "model.safetensors",
    "optimizer.safetensors",
    "training.json",
)
SHARDS = "shards"
METRICS = "metrics.jsonl"


@dataclass
class Training:
    """All that a run carries from one step to the next.

    step: optimizer steps taken. memories: in the middle of a document, what each part of the
    batch remembers of it; empty where the next step begins a new one. reader: what reads a
    segment in the model's stead where gradients are shared with other processes. batch: identity
    of the last one, by which a resumed run knows its data.
    """

    model: TitansLM
    optimizers: dict[str, Optimizer]
    step: int = 0
    memories: list[ModelState] = field(default_factory=list)
    reader: Any = None
    batch: str = ""


def open_run(folder: Path, config: RunConfig, resume: bool) -> Path | None:
    """Make the folder of a new run, or find the checkpoint to go on from; None to begin.

    Raises ValueError: the folder holds something else, or a run although `resume` is False, or
    one with another config (named is the first key that differs) that has come beyond its first
    step. What may differ is noted.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.glob("[!.]*"))):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, to_toml(config))
        return None
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: is not empty and not the folder of a run (no {CONFIG})")
    if not resume:
        raise ValueError(f"{folder}: there is a run in it already; resume it or name another")
    before = load_toml(folder / CONFIG, RunConfig)
    difference = first_difference(before, config)
    metrics = folder / METRICS
    begun = bool(checkpoints(folder)) or (metrics.is_file() and metrics.stat().st_size > 0)
    if difference is not None and begun:
        raise ValueError(
            f"{folder}: this run has another config: {difference}; go on with its own, or give "
            "the new run another folder"
        )
    found = latest(folder)
    if before != config:
        write_text(folder / CONFIG, to_toml(config))
    return found


def finished(folder: Path, config: RunConfig) -> Path | None:
    """The last checkpoint of a run of this config that has come to its end, None for any other."""
    if not (folder / CONFIG).is_file():
        return None
    if first_difference(load_toml(folder / CONFIG, RunConfig), config) is not None:
        return None
    found = latest(folder)
    return found if found is not None and step_of(found) == config.train.steps else None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within it no other process of this machine has the run's folder; ValueError if one has it.

    Two runs in one folder would delete each other's checkpoints. The lock goes with the process;
    on systems and file systems that have none there is none.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"{folder}: another process trains in it") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


def latest(run_folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none yet.

    What a killed process left half-written has a hidden name and does not count. A folder that
    lost a file is passed over for an older whole one; without one it is a ValueError.
    """
    found = checkpoints(Path(run_folder))
    for folder in reversed(found):
        if missing_file(folder) is None:
            return folder
    if found:
        raise ValueError(f"{missing_file(found[-1])}: missing, and no older checkpoint is whole")
    return None


def save_checkpoint(run_folder: Path, training: Training, keep: int) -> Path:
    """Write a checkpoint beside the others, whole or not at all; the `keep` newest stay."""
    scratch = open_scratch(run_folder, training.step)
    training.model.save(scratch / MODEL)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in optimizer_tensors(training).items()
    }
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "sha256": digest(tensors, "")}
    write_safetensors(scratch / OPTIMIZER, tensors, metadata)
    for number, memory in enumerate(training.memories):
        memory.save(scratch / f"memory-{number}.safetensors")
    index = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "step": training.step,
        "memories": len(training.memories),
        "batch": training.batch,
    }
    return publish(scratch, index, keep)


def scratch_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it has its name."""
    return run_folder / "checkpoints" / f".step-{step:06d}"


def open_scratch(run_folder: Path, step: int) -> Path:
    """That folder, empty; what killed processes left is removed."""
    scratch = scratch_folder(run_folder, step)
    scratch.parent.mkdir(exist_ok=True)
    for leftover in scratch.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    scratch.mkdir()
    return scratch


def publish(scratch: Path, index: dict[str, Any], keep: int) -> Path:
    """Complete a checkpoint with its index, give it its name, and drop older ones."""
    folder = scratch.with_name(scratch.name[1:])
    run_folder = folder.parent.parent
    write_text(scratch / INDEX, json.dumps(index) + "\n")
    if folder.exists():  # damaged, or `latest` had found it
        shutil.rmtree(folder)
    scratch.rename(folder)
    sync(folder.parent)
    found = checkpoints(run_folder)
    # A later step is what a run left that was resumed from before it.
    staying = [f for f in found if step_of(f) <= index["step"]][-keep:]
    for old in found:
        if old not in staying:
            # Under a hidden name first: a deletion cut short must not look like a checkpoint.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")))
    return folder


def load_checkpoint(folder: Path, config: RunConfig, device: torch.device) -> Training:
    """The training as it was; ValueError of one line naming a file that is damaged."""
    index = read_index(folder / INDEX)
    model = load_model(folder / MODEL, device)
    if model.config != config.model:
        difference = compared(*next(differences(model.config, config.model)))
        raise ValueError(f"{folder / MODEL}: holds a model of another config: {difference}")
    training = Training(
        model=model.train(),
        optimizers=build_optimizers(model, config.optimizer),
        step=index["step"],
        memories=[
            ModelState.load(folder / f"memory-{number}.safetensors", device)
            for number in range(index["memories"])
        ],
    )
    tensors, metadata = read_safetensors(folder / OPTIMIZER)
    check_header(folder / OPTIMIZER, tensors, metadata, "checkpoint", FORMAT_VERSION, "structure")
    restore_optimizers(training, tensors, folder / OPTIMIZER)
    return training


def optimizer_tensors(training: Training) -> dict[str, Tensor]:
    """Every tensor the optimizers keep, as `optimizer/parameter/name`.

    Their settings are not among them: the config and the step determine those.
    """
    names = {id(p): name for name, p in training.model.named_parameters()}
    tensors = {}
    for kind, optimizer in training.optimizers.items():
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                assert isinstance(value, Tensor), f"{kind} keeps {key}, which is no tensor"
                tensors[f"{kind}/{names[id(parameter)]}/{key}"] = value
    return tensors


def restore_optimizers(training: Training, tensors: dict[str, Tensor], path: Path | str) -> None:
    """The other way; `tensors` is emptied. ValueError naming `path` for one that has no place."""
    names = {id(p): name for name, p in training.model.named_parameters()}
    for kind, optimizer in training.optimizers.items():
        content = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            prefix = f"{kind}/{names[id(parameter)]}/"
            found = {k.removeprefix(prefix): k for k in tensors if k.startswith(prefix)}
            if found:
                content["state"][number] = {key: tensors.pop(k) for key, k in found.items()}
        optimizer.load_state_dict(content)
    if tensors:
        raise ValueError(f"{path}: does not fit the model ({min(tensors)})")


def read_index(path: Path) -> dict[str, int]:
    """step and memories; of a sharded checkpoint the rows that memories are of. version."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        versions = (FORMAT_VERSION, SHARDED_VERSION)
        known = index["format"] == FORMAT and index["version"] in versions
        numbers = {key: int(index[key]) for key in ("version", "step", "memories")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if not known:
        raise ValueError(
            f"{path}: expected {FORMAT} version {FORMAT_VERSION}, "
            f"got {index['format']} version {index['version']}"
        )
    return numbers


def batch_identity(batch: Batch) -> str:
    found = hashlib.sha256(repr(tuple(batch.tokens.shape)).encode())
    for column in (batch.tokens, batch.labels):
        found.update(column.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def last_batch(folder: Path) -> str:
    """Identity of the last batch that a checkpoint was trained on; empty in an older one."""
    return str(json.loads((folder / INDEX).read_text(encoding="utf-8")).get("batch", ""))


def is_sharded(folder: Path) -> bool:
    """Did several processes write this checkpoint?"""
    return read_index(folder / INDEX)["version"] == SHARDED_VERSION


def missing_file(folder: Path) -> Path | None:
    """The first file that a checkpoint lacks."""
    names = [INDEX, MODEL]
    if (folder / INDEX).is_file() and is_sharded(folder):
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names += [f"{SHARDS}/.metadata", *index.get("files", ())]
    elif (folder / INDEX).is_file():
        count = read_index(folder / INDEX)["memories"]
        names += [OPTIMIZER, *(f"memory-{number}.safetensors" for number in range(count))]
    return next((folder / name for name in names if not (folder / name).is_file()), None)


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints' folders by step, whole or not."""
    folders = [f for f in (run_folder / "checkpoints").glob("step-*") if f.is_dir()]
    return sorted((f for f in folders if re.fullmatch(r"step-\d{6,}", f.name)), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}")
    with scratch.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(path)


def sync(folder: Path) -> None:
    """Put a rename on disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
