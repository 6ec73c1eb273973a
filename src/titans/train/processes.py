"""The processes of a run, as torchrun starts them, and the part that each has in a step.

A batch does not depend on their number. Its rows are split among `replicas`, the tokens of a row
among the `sequence` processes of each; gradients are summed over all of them. So a run may go on
with another number of processes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans.data.facts import Batch
from titans.distributed import Peers
from titans.models.lm import TitansLM
from titans.state import ModelState
from titans.train.checkpoint import Training, optimizer_tensors, restore_optimizers
from titans.train.config import DistributedConfig, RunConfig
from titans.train.objective import Segment, read_segment
from titans.train.optim import build_optimizers

R = TypeVar("R")


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `count`; it has the rows of `replica` of `replicas`, and of them the
    tokens that `peers` says (None: all)."""

    rank: int = 0
    count: int = 1
    replica: int = 0
    replicas: int = 1
    peers: Peers | None = None
    device: torch.device | None = None

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, total: int) -> tuple[int, int]:
        """First row and one past the last of this process's, of a batch of so many."""
        least, more = divmod(total, self.replicas)
        begin = self.replica * least + min(self.replica, more)
        return begin, begin + least + (self.replica < more)

    def share(self, batch: Batch) -> Batch:
        """This process's rows, and tokens of them."""
        if self.alone:
            return batch
        begin, end = self.rows(len(batch.tokens))
        parts = [column[begin:end] for column in batch]
        if self.peers is not None:
            parts = [self.peers.own(column, 1) for column in parts]
        return Batch(*parts)

    def parts(self, total: int, accumulate: int) -> int:
        """Parts that rows are computed in: the same number everywhere, since all processes meet
        in each."""
        return max(1, min(accumulate, total // self.replicas))

    def total(self, *numbers: float) -> list[float]:
        """Their sums over all processes."""
        if self.alone:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        return self.total(float(flag))[0] > 0

    def whole(self, own: Tensor) -> Tensor:
        """All rows and tokens of a batch, from every process's `share` of them; on the CPU."""
        own = own.cpu()
        if self.alone:
            return own
        shares: list[Any] = [None] * self.count
        dist.all_gather_object(shares, own)
        slices = 1 if self.peers is None else self.peers.count
        rows = [torch.cat(shares[i : i + slices], 1) for i in range(0, self.count, slices)]
        return torch.cat(rows)

    def on_first(self, function: Callable[[], R]) -> R:
        """What the first process computes, or the error it meets, for all."""
        if self.alone:
            return function()
        content: list[Any] = [None, None]
        if self.first:
            try:
                content[0] = function()
            except (ValueError, OSError) as error:
                content[1] = error
        dist.broadcast_object_list(content)
        if content[1] is not None:
            raise content[1]
        result: R = content[0]
        return result

    def barrier(self) -> None:
        if not self.alone:
            dist.barrier()


ALONE = Processes()


@contextmanager
def processes(config: RunConfig, device: torch.device) -> Iterator[Processes]:
    """Join the other processes, where torchrun has started any.

    Raises ValueError for a number of processes that does not fit the config.
    """
    settings = config.distributed
    joined = dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    check_count(config, count)
    if count == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not joined:
        meet("nccl" if device.type == "cuda" else "gloo")
    try:
        rank = dist.get_rank()
        replica, _ = divmod(rank, settings.sequence)
        peers = None
        if settings.sequence > 1:
            members = [
                list(range(begin, begin + settings.sequence))
                for begin in range(0, count, settings.sequence)
            ]
            group, _ = dist.new_subgroups_by_enumeration(members)
            peers = Peers.of(group)
        yield Processes(rank, count, replica, count // settings.sequence, peers, device)
    finally:
        if not joined:
            dist.destroy_process_group()


def meet(backend: str) -> None:
    """Join the process group that torchrun's environment names.

    On one machine torchrun keeps its store when it starts workers again, with the addresses of
    those that died: each attempt has names of its own. Between machines attempts are counted
    differently; docs/distributed.md says what to set there.
    """
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)


def check_count(config: RunConfig, count: int) -> None:
    settings = config.distributed
    for name in ("sequence", "shard"):
        size = getattr(settings, name)
        if size and count % size:
            raise ValueError(
                f"distributed.{name} ({size}) must divide the number of processes, got {count}"
            )
    rows = config.train.tokens_per_batch // config.longest
    if rows < count // settings.sequence:
        raise ValueError(
            f"{count} processes need a batch of {count // settings.sequence} rows or more, got "
            f"{rows} (train.tokens_per_batch, distributed.sequence)"
        )


class Reader(nn.Module):
    """What DDP wraps: a segment through the model. The memory goes on without its gradient."""

    def __init__(self, model: TitansLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, memory: ModelState | None, precision: str) -> Segment:
        segment = read_segment(self.model, batch, memory, precision)
        return segment._replace(state=segment.state.detach())


def spread(training: Training, config: RunConfig, here: Processes) -> Training:
    """The training as one process of several has it. Alone it stays as it is."""
    if here.alone:
        return training
    model = training.model
    model.peers = here.peers
    if config.distributed.strategy == "ddp":
        # M_0 and the persistent tokens have no part in the later segments of a text.
        training.reader = torch.nn.parallel.DistributedDataParallel(
            Reader(model), find_unused_parameters=True
        )
        return training
    moments = optimizer_tensors(training)
    shard(model, config.distributed, here)
    training.optimizers = build_optimizers(model, config.optimizer)
    if moments:
        named = dict(model.named_parameters())
        own = {key: like(named[key.split("/")[1]], value) for key, value in moments.items()}
        restore_optimizers(training, own, "the optimizer")
    return training


def shard(model: TitansLM, settings: DistributedConfig, here: Processes) -> None:
    """FSDP2: a group of weights for each block, and one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    assert here.device is not None
    size = settings.shard or here.count
    shape, names = [here.count // size, size], ["copy", "shard"]
    if size == here.count:
        shape, names = shape[1:], names[1:]
    mesh = init_device_mesh(here.device.type, tuple(shape), mesh_dim_names=tuple(names))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("run", "losses"):
        register_fsdp_forward_method(model, method)


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor as this process holds the parameter; one of another shape as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def summing(training: Training, last: bool) -> AbstractContextManager[Any]:
    """Within it a backward pass sums gradients over the processes if it is the step's last."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(training.model, FSDPModule):
        training.model.set_requires_gradient_sync(last)
    elif training.reader is not None and not last:
        return training.reader.no_sync()
    return nullcontext()
