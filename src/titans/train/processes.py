"""The processes of a run, as torchrun starts them, and the part that each has in a step.

A batch does not depend on their number. Its rows are split among `replicas`, the tokens of a row
among the `sequence` slices of each, the heads of a slice among the `tensor` processes of its team;
gradients are summed over all of them. So a run may go on with another number of processes.
"""

import math
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
from titans.models.heads import share_heads
from titans.models.lm import TitansLM
from titans.state import ModelState
from titans.train.checkpoint import Training, optimizer_tensors, restore_optimizers
from titans.train.config import DistributedConfig, RunConfig
from titans.train.objective import Segment, read_segment
from titans.train.optim import build_optimizers
from titans.train.parts import held_part

R = TypeVar("R")


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `count`; it has the rows of `replica` of `replicas`, of them the tokens
    that `peers` says (None: all), and of the model the heads that `team` says (None: all)."""

    rank: int = 0
    count: int = 1
    replica: int = 0
    replicas: int = 1
    peers: Peers | None = None
    team: Peers | None = None
    device: torch.device | None = None

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def team_size(self) -> int:
        return 1 if self.team is None else self.team.count

    @property
    def leads(self) -> bool:
        """Does it speak for its team?"""
        return self.team is None or self.team.rank == 0

    @property
    def loss_scale(self) -> float:
        """Of a loss before its backward pass: DDP and FSDP take the mean of the teams' gradients,
        which are to be added up, and in a team each process has an equal share of the loss."""
        return self.count / self.team_size**2

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
        """Their sums over all teams; the mean within a team."""
        if self.alone:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return (sums / self.team_size).tolist()

    def any(self, flag: bool) -> bool:
        return self.total(float(flag))[0] > 0

    def whole(self, own: Tensor) -> Tensor:
        """All rows and tokens of a batch, from every process's `share` of them; on the CPU."""
        own = own.cpu()
        if self.alone:
            return own
        shares: list[Any] = [None] * self.count
        dist.all_gather_object(shares, own)
        shares = shares[:: self.team_size]
        slices = 1 if self.peers is None else self.peers.count
        rows = [torch.cat(shares[i : i + slices], 1) for i in range(0, len(shares), slices)]
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
        rank, of_replica = dist.get_rank(), settings.sequence * settings.tensor
        # By replica, slice of a text, part of the heads: a team's ranks are consecutive.
        ranks = torch.arange(count).view(-1, settings.sequence, settings.tensor)
        yield Processes(
            rank=rank,
            count=count,
            replica=rank // of_replica,
            replicas=count // of_replica,
            peers=groups(ranks.mT),
            team=groups(ranks),
            device=device,
        )
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


def groups(ranks: Tensor) -> Peers | None:
    """This process's group, where the last dimension of `ranks` holds one each; None if it is
    alone there."""
    if ranks.shape[-1] == 1:
        return None
    group, _ = dist.new_subgroups_by_enumeration(ranks.flatten(0, -2).tolist())
    return Peers.of(group)


def check_count(config: RunConfig, count: int) -> None:
    settings = config.distributed
    for names in (("sequence", "tensor"), ("shard", "tensor")):
        sizes = {f"distributed.{name}": getattr(settings, name) or 1 for name in names}
        if count % math.prod(sizes.values()):
            named = [f"{name} ({size})" for name, size in sizes.items() if size > 1]
            raise ValueError(
                f"{' times '.join(named)} must divide the number of processes, got {count}"
            )
    rows = config.train.tokens_per_batch // config.longest
    replicas = count // (settings.sequence * settings.tensor)
    if rows < replicas:
        raise ValueError(
            f"{count} processes need a batch of {replicas} rows or more, got {rows} "
            "(train.tokens_per_batch, distributed.sequence, distributed.tensor)"
        )


class Reader(nn.Module):
    """What DDP wraps: a segment through the model. The memory goes on without its gradient."""

    def __init__(self, model: TitansLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: Batch, memory: ModelState | None, precision: str, write_half: float
    ) -> Segment:
        segment = read_segment(self.model, batch, memory, precision, write_half)
        return segment._replace(state=segment.state.detach())


def spread(training: Training, config: RunConfig, here: Processes) -> Training:
    """The training as one process of several has it. Alone it stays as it is."""
    if here.alone:
        return training
    model = training.model
    model.peers = here.peers
    moments = optimizer_tensors(training)
    if here.team is not None:
        share_heads(model, here.team)
    if config.distributed.strategy == "fsdp":
        shard(model, config.distributed, here)
    elif here.count > here.team_size:
        # M_0 and the persistent tokens have no part in the later segments of a text.
        training.reader = torch.nn.parallel.DistributedDataParallel(
            Reader(model), find_unused_parameters=True, process_group=same_heads(here)
        )
    training.optimizers = build_optimizers(model, config.optimizer)
    if moments:
        held = {
            key: held_part(model, key.split("/")[1], value) if value.ndim else value
            for key, value in moments.items()
        }
        restore_optimizers(training, held, "the optimizer")
    return training


def same_heads(here: Processes) -> "dist.ProcessGroup | None":
    """The processes that hold the same weights; None is all."""
    if here.team is None:
        return None
    ranks = torch.arange(here.count).view(-1, here.team_size)
    group, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist())
    return group


def shard(model: TitansLM, settings: DistributedConfig, here: Processes) -> None:
    """FSDP2: a group of weights for each block, and one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    assert here.device is not None
    holders = here.count // here.team_size
    size = settings.shard or holders
    shape, names = (holders // size, size, here.team_size), ("copy", "shard", "tensor")
    mesh = init_device_mesh(here.device.type, shape, mesh_dim_names=names)
    mesh = mesh["shard"] if size == holders else mesh["copy", "shard"]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("run", "losses"):
        register_fsdp_forward_method(model, method)


def sum_shares(model: TitansLM) -> None:
    """Add up over a team the gradients of what each of its processes holds. Those of its heads
    are whole."""
    if model.team is None:
        return
    named = model.named_parameters()
    held = [p.grad for name, p in named if p.grad is not None and name not in model.cuts]
    shares = [getattr(gradient, "_local_tensor", gradient) for gradient in held]
    whole = model.team.total(torch.cat([share.flatten() for share in shares]))
    for share, part in zip(shares, whole.split([s.numel() for s in shares]), strict=True):
        share.copy_(part.view_as(share))


def gradient_norm(model: TitansLM) -> Tensor:
    """Of the whole gradient, whoever holds it."""

    def norm(of_heads: bool) -> Tensor:
        named = model.named_parameters()
        found = [p.grad for n, p in named if p.grad is not None and (n in model.cuts) == of_heads]
        value = torch.nn.utils.get_total_norm(found)
        return value.full_tensor() if hasattr(value, "full_tensor") else value  # of shards

    if model.team is None:
        return norm(False)
    return (norm(False) ** 2 + model.team.total(norm(True) ** 2)).sqrt()


def summing(training: Training, last: bool) -> AbstractContextManager[Any]:
    """Within it a backward pass sums gradients over the processes if it is the step's last."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(training.model, FSDPModule):
        training.model.set_requires_gradient_sync(last)
    elif training.reader is not None and not last:
        return training.reader.no_sync()
    return nullcontext()
