"""Checkpoints that several processes write together, and any number of them goes on from.

shards/                        weights and moments, by torch.distributed.checkpoint: every
                               process writes what it holds, as `model/name` and
                               `optimizer/name/key`; PyTorch reads their index by unpickling it, so
                               go on from shards of your own alone
memory-000000-000004.safetensors   what these rows of the batch remember
model.safetensors              the whole model once more, for `titans.load`
training.json                  step, rows, the other files; the last to be written
"""

import re
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from titans.models.heads import own_state, whole_state
from titans.models.lm import TitansLM, write_model
from titans.state import ModelState
from titans.train.checkpoint import (
    FORMAT,
    INDEX,
    MODEL,
    SHARDED_VERSION,
    SHARDS,
    Training,
    open_scratch,
    optimizer_tensors,
    publish,
    read_index,
    restore_optimizers,
    scratch_folder,
)
from titans.train.parts import LoadPlanner, SavePlanner, find_parts, whole_tensor
from titans.train.processes import Processes


def save_sharded(
    run_folder: Path, training: Training, keep: int, here: Processes, rows: int
) -> Path:
    """As `save_checkpoint`, by all processes at once. rows: of the batch."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import FSDPModule

    if isinstance(training.model, FSDPModule):  # after an evaluation it holds gathered weights
        training.model.reshard()
    scratch = scratch_folder(run_folder, training.step)
    here.on_first(lambda: str(open_scratch(run_folder, training.step)))
    parameters = {f"model/{name}": p.detach() for name, p in training.model.named_parameters()}
    whole, parts = find_parts(parameters | optimizer_tensors(training), training.model)
    dcp.save(whole, checkpoint_id=scratch / SHARDS, planner=SavePlanner(parts))
    if training.memories and (here.peers is None or here.peers.rank == 0):
        memory = join_rows(training.memories)
        if here.team is not None:
            memory = whole_state(memory, here.team)
        begin, end = here.rows(rows)
        if here.leads:
            memory.save(scratch / f"memory-{begin:06d}-{end:06d}.safetensors")
    export(training.model, scratch / MODEL, here)
    here.barrier()

    def complete() -> str:
        files = [str(f.relative_to(scratch)) for f in scratch.rglob("*") if f.is_file()]
        index = {
            "format": FORMAT,
            "version": SHARDED_VERSION,
            "step": training.step,
            "memories": rows if training.memories else 0,
            "batch": training.batch,
            "files": sorted(files),
        }
        return str(publish(scratch, index, keep))

    return Path(here.on_first(complete))


def export(model: TitansLM, path: Path, here: Processes) -> None:
    """The whole model as one file; every process gives its shards and heads, the first writes."""
    whole: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = whole_tensor(model, name, parameter.detach())
        if here.first:
            whole[name] = tensor.cpu().contiguous()
    if here.first:
        write_model(path, model.config, whole, model.tokenizer)


def load_sharded(folder: Path, training: Training, accumulate: int, here: Processes) -> None:
    """Fill a fresh training with a checkpoint, whoever wrote it.

    Raises ValueError of one line for one that is damaged or another model's.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    damage = (
        *(CheckpointException, OSError, EOFError, LookupError, RuntimeError, ValueError),
        *(UnpicklingError, AttributeError, ImportError, TypeError),  # of its index
    )

    index = read_index(folder / INDEX)
    reader = dcp.FileSystemReader(folder / SHARDS)
    model = training.model
    named = dict(model.named_parameters())
    tensors = {f"model/{name}": p.detach() for name, p in named.items()}
    try:
        stored = reader.read_metadata().state_dict_metadata
        for key, held in stored.items():
            if not key.startswith("model/"):
                name = key.split("/")[1]
                parameter, shape = named[name], getattr(held, "size", None)
                whole_shape = parameter.shape
                if name in model.cuts:
                    assert model.team is not None
                    whole_shape = model.cuts[name].whole_shape(whole_shape, model.team)
                tensors[key] = (
                    torch.zeros_like(parameter, requires_grad=False)
                    if shape == whole_shape
                    else torch.zeros(shape or ())
                )
        whole, parts = find_parts(tensors, model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant
            dcp.load(whole, storage_reader=reader, planner=LoadPlanner(parts), no_dist=here.alone)
    except damage as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ValueError(f"{folder / SHARDS}: cannot be read ({reason[0]})") from None
    moments = {key: value for key, value in tensors.items() if not key.startswith("model/")}
    restore_optimizers(training, moments, folder / SHARDS)
    training.step = index["step"]
    if index["memories"]:
        begin, end = here.rows(index["memories"])
        device = next(training.model.parameters()).device
        own = load_rows(folder, begin, end, device)
        own = own if here.team is None else own_state(own, here.team)
        training.memories = split_memory(own, here.parts(index["memories"], accumulate))


def load_rows(folder: Path, begin: int, end: int, device: torch.device) -> ModelState:
    """What rows begin ... end remember, from the files that have some of them."""
    found, row = [], begin
    for path in sorted(folder.glob("memory-*.safetensors")):
        match = re.fullmatch(r"memory-(\d+)-(\d+)\.safetensors", path.name)
        if match is None:
            continue
        first, last = (int(number) for number in match.groups())
        if first <= row < last and row < end:
            stop = min(last, end)
            found.append(cut_rows(ModelState.load(path, device), row - first, stop - first))
            row = stop
    if row < end:
        raise ValueError(f"{folder}: has no memory of row {row}")
    return join_rows(found)


def own_memory(whole: ModelState, accumulate: int, here: Processes) -> list[ModelState]:
    """This process's part of what all rows remember."""
    rows = whole.batch_size
    own = cut_rows(whole, *here.rows(rows))
    own = own if here.team is None else own_state(own, here.team)
    return split_memory(own, here.parts(rows, accumulate))


def split_memory(memory: ModelState, parts: int) -> list[ModelState]:
    """As `split_rows` splits the batch."""
    rows = memory.batch_size
    bounds = [part.tolist() for part in torch.arange(rows).tensor_split(min(parts, rows))]
    return [cut_rows(memory, part[0], part[-1] + 1) for part in bounds]


def join_rows(states: list[ModelState]) -> ModelState:
    """States of consecutive rows as one."""
    columns = [state.tensors() for state in states]
    names = {id(tensor): name for name, tensor in columns[0].items()}
    return states[0].map(lambda t: torch.cat([column[names[id(t)]] for column in columns]))


def cut_rows(state: ModelState, begin: int, end: int) -> ModelState:
    return state.map(lambda t: t[begin:end].clone())
