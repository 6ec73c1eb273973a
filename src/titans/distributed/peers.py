"""Processes that share a text, or the heads of a model, and what passes between them.

Every exchange is differentiable: its backward pass is the opposite exchange. Autograd runs the
steps of a backward pass in the reverse order of their creation, which is the same on all
processes, so that they meet there as they did in the forward pass. All of them have to take part
in both. Gradients are shares: the whole one is the sum over the processes, also for what every
process holds alike, such as weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans.state import State

S = TypeVar("S", bound=State)
R = TypeVar("R")


@dataclass(frozen=True)
class Peers:
    """Process `rank` of `count` holds slice `rank` of a text; all slices have one length. Or it
    holds all of the text and part `rank` of the heads."""

    group: "dist.ProcessGroup"
    rank: int
    count: int

    @classmethod
    def of(cls, group: "dist.ProcessGroup") -> "Peers":
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def before(self, x: Tensor, start: Tensor, dim: int) -> Tensor:
        """What stands before this slice: the last entries of the slice before along `dim`, as
        many as `start` has. Before the first slice stands `start`.

        Raises ValueError where a slice is shorter than that.
        """
        size = start.shape[dim]
        if size == 0:
            return start
        if x.shape[dim] < size:
            raise ValueError(
                f"a slice of {x.shape[dim]} tokens is too short: the next one reads the {size} "
                "tokens before it (window, convolution); share a text among fewer processes"
            )
        ends = x.narrow(dim, x.shape[dim] - size, size).to(start.dtype)
        return Shift.apply(self, ends, start)

    def compose(self, start: Tensor, transition: Tensor, added: Tensor) -> Tensor:
        """X before this slice, where a slice makes `transition @ X + added` of the X before it.

        start: X before the first slice, (..., n, v), held by every process. transition:
        (..., n, n) and added: (..., n, v) of this slice.
        """
        with torch.autocast(start.device.type, enabled=False):  # states keep their precision
            return Compose.apply(self, start, transition, added)

    def to_heads(self, x: Tensor) -> Tensor:
        """(B, slice, H, ...) -> (B, T, H / count, ...): all tokens of some of the heads."""
        return Exchange.apply(self, x, 2, 1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """(B, T, H / count, ...) -> (B, slice, H, ...): the way back."""
        return Exchange.apply(self, x, 1, 2)

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This process's part along `dim` (heads) of what every process holds."""
        return x.chunk(self.count, dim)[self.rank]

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The parts of all processes along `dim`."""
        return torch.cat(Gather.apply(self, x), dim)

    def parts(self, x: Tensor) -> list[Tensor]:
        """`gather` without gradients, and without joining."""
        return all_parts(self, x.detach())

    def total(self, x: Tensor) -> Tensor:
        """The sum of what the processes have."""
        return Total.apply(self, x)

    def relay(
        self, step: Callable[[Tensor, S], tuple[Tensor, S, R]], x: Tensor, state: S
    ) -> tuple[Tensor, S, R]:
        """`step(x, state)`, each process going on from the state of the one before it.

        For what cannot be computed side by side. Processes wait only for those before them,
        which meanwhile compute later layers.
        """
        if self.rank > 0:
            layout = Layout.received(self, self.rank - 1)
            into = layout.empty(x.device)
            unused = state.tensors().values()
            x, *tensors = Receive.apply(self, len(into), x, *into, *unused)
            state = layout.state(type(state), tensors)
        y, after, rest = step(x, state)
        if self.rank < self.count - 1:
            Layout.of(after).send(self, self.rank + 1)
            y = Send.apply(self, y, *after.tensors().values())
        return y, after, rest

    def last(self, state: S) -> S:
        """The state of the process that holds the end of the text, for all of them.

        A loss on it counts once for every process.
        """
        tensors = state.tensors()
        layout = Layout.of(state).broadcast(self, self.count - 1)
        device = next(iter(tensors.values())).device
        held = layout.empty(device)
        if self.rank == self.count - 1:
            held = list(tensors.values())
        joined = Last.apply(self, len(held), *held, *tensors.values())
        return layout.state(type(state), list(joined))


class Layout(NamedTuple):
    """A state without its numbers: what another process needs to take it in.

    tensors: name -> shape and dtype.
    """

    structure: Any
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @classmethod
    def of(cls, state: State) -> "Layout":
        tensors = {name: (tuple(t.shape), t.dtype) for name, t in state.tensors().items()}
        return cls(state.structure(), tensors)

    @classmethod
    def received(cls, peers: Peers, source: int) -> "Layout":
        content: list[Any] = [None]
        dist.recv_object_list(content, group=peers.group, group_src=source)
        return cls(*content[0])

    def send(self, peers: Peers, target: int) -> None:
        dist.send_object_list([tuple(self)], group=peers.group, group_dst=target)

    def broadcast(self, peers: Peers, source: int) -> "Layout":
        content = [tuple(self)]
        dist.broadcast_object_list(content, group=peers.group, group_src=source)
        return Layout(*content[0])

    def empty(self, device: torch.device) -> list[Tensor]:
        return [
            torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.tensors.values()
        ]

    def state(self, kind: type[S], tensors: list[Tensor]) -> S:
        return kind.rebuild(self.structure, dict(zip(self.tensors, tensors, strict=True)))


def pass_on(peers: Peers, tensors: list[Tensor], into: list[Tensor], step: int) -> None:
    """Send to process rank + step and receive from rank - step, where there are such."""
    exchanges = []
    target, source = peers.rank + step, peers.rank - step
    if 0 <= target < peers.count:
        exchanges += [
            dist.P2POp(dist.isend, t.contiguous(), group=peers.group, group_peer=target)
            for t in tensors
        ]
    if 0 <= source < peers.count:
        exchanges += [dist.P2POp(dist.irecv, t, group=peers.group, group_peer=source) for t in into]
    for work in dist.batch_isend_irecv(exchanges) if exchanges else []:
        work.wait()


def all_parts(peers: Peers, x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(peers.count)]
    dist.all_gather(parts, x.contiguous(), group=peers.group)
    return parts


class Shift(torch.autograd.Function):
    """Each process gives `ends` to the next; the first one has `start`."""

    @staticmethod
    def forward(ctx: Any, peers: Peers, ends: Tensor, start: Tensor) -> Tensor:
        ctx.peers = peers
        received = torch.empty_like(start, memory_format=torch.contiguous_format)
        if peers.rank == 0:
            received.copy_(start)
        pass_on(peers, [ends], [received], 1)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        peers = ctx.peers
        d_ends = torch.zeros_like(slope, memory_format=torch.contiguous_format)
        pass_on(peers, [slope], [d_ends], -1)
        return None, d_ends, slope if peers.rank == 0 else torch.zeros_like(slope)


class Compose(torch.autograd.Function):
    """X_{r+1} = T_r X_r + U_r over the processes r; gives X_rank.

    Backward, with L_r the gradient of X_r through all that follows: L_r = dX_r + T_r^T L_{r+1},
    dU_r = L_{r+1}, dT_r = L_{r+1} X_r^T. Of X_0, which all hold, the first has all of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, peers: Peers, start: Tensor, transition: Tensor, added: Tensor) -> Tensor:
        size = transition.shape[-1]
        parts = all_parts(peers, torch.cat([transition, added], -1))
        state = start.contiguous()
        for part in parts[: peers.rank]:
            state = part[..., :size] @ state + part[..., size:]
        ctx.peers = peers
        # Of the transitions, those that a gradient comes back through.
        later = [part[..., :size] for part in parts[peers.rank + (peers.rank > 0) :]]
        ctx.save_for_backward(state, *(t.contiguous() for t in later))
        return state.clone() if peers.rank == 0 else state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        peers = ctx.peers
        state, *transitions = ctx.saved_tensors
        slopes = all_parts(peers, slope)
        after = torch.zeros_like(slope)  # L of the text's end
        for r in range(peers.count - 1, peers.rank, -1):
            after = slopes[r] + transitions[r - peers.count].mT @ after
        d_start = torch.zeros_like(slope)
        if peers.rank == 0:
            d_start = slope + transitions[0].mT @ after
        return None, d_start, after @ state.mT, after


class Exchange(torch.autograd.Function):
    """Dimension `split` is dealt out to the processes, dimension `join` collected from them."""

    @staticmethod
    def forward(ctx: Any, peers: Peers, x: Tensor, split: int, join: int) -> Tensor:
        ctx.exchange = peers, split, join
        return exchange(peers, x, split, join)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        peers, split, join = ctx.exchange
        return None, exchange(peers, slope, join, split), None, None


def exchange(peers: Peers, x: Tensor, split: int, join: int) -> Tensor:
    sent = torch.stack(x.chunk(peers.count, split))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=peers.group)
    return torch.cat(received.unbind(), join)


class Gather(torch.autograd.Function):
    """What every process holds, for all of them."""

    @staticmethod
    def forward(ctx: Any, peers: Peers, x: Tensor) -> tuple[Tensor, ...]:
        ctx.peers = peers
        return tuple(all_parts(peers, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        total = torch.stack(slopes)
        dist.all_reduce(total, group=ctx.peers.group)
        return None, total[ctx.peers.rank]


class Total(torch.autograd.Function):
    """The sum of what every process holds. It reaches all of them, and so do their gradients."""

    @staticmethod
    def forward(ctx: Any, peers: Peers, x: Tensor) -> Tensor:
        ctx.peers = peers
        return summed(peers, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        return None, summed(ctx.peers, slope)


def summed(peers: Peers, x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=peers.group)
    return total


class Receive(torch.autograd.Function):
    """(count, x, empty tensors, others) -> x as it is, and `count` tensors of the process before.

    The others are what is not used in their place. They get gradients of zero, so that what they
    came from has its backward pass on this process too. `Last` does the same.
    """

    @staticmethod
    def forward(
        ctx: Any, peers: Peers, count: int, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.peers, ctx.count = peers, count
        ctx.like = [(t.shape, t.dtype) for t in tensors[count:]]
        into = tensors[:count]
        for tensor in into:
            dist.recv(tensor, group=peers.group, group_src=peers.rank - 1)
        ctx.mark_non_differentiable(*(t for t in into if not t.is_floating_point()))
        return x.view_as(x), *into

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, *slopes: Tensor) -> tuple[Any, ...]:
        peers = ctx.peers
        for d in slopes:
            if d.is_floating_point():
                dist.send(d.contiguous(), group=peers.group, group_dst=peers.rank - 1)
        return None, None, slope, *(None for _ in slopes), *zeros(ctx.like, slope.device)


class Send(torch.autograd.Function):
    """(y, tensors) -> y as it is; the tensors go to the process after."""

    @staticmethod
    def forward(ctx: Any, peers: Peers, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.peers = peers
        ctx.like = [(t.shape, t.dtype) for t in tensors]
        for tensor in tensors:
            dist.send(tensor.contiguous(), group=peers.group, group_dst=peers.rank + 1)
        ctx.save_for_backward(y.new_empty(0))
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        # With gradient checkpointing this computes the block again: the next process, whose
        # gradients are awaited below, needs it too.
        _ = ctx.saved_tensors
        peers, slopes = ctx.peers, []
        for shape, dtype in ctx.like:
            d = torch.empty(shape, dtype=dtype, device=slope.device)
            if dtype.is_floating_point:
                dist.recv(d, group=peers.group, group_src=peers.rank + 1)
            slopes.append(d if dtype.is_floating_point else None)
        return None, slope, *slopes


class Last(torch.autograd.Function):
    """(count, tensors, others) -> `count` tensors as the last process holds them."""

    @staticmethod
    def forward(ctx: Any, peers: Peers, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.peers, ctx.count = peers, count
        ctx.like = [(t.shape, t.dtype) for t in tensors[count:]]
        shared = [t.clone(memory_format=torch.contiguous_format) for t in tensors[:count]]
        for tensor in shared:
            dist.broadcast(tensor, group=peers.group, group_src=peers.count - 1)
        ctx.mark_non_differentiable(*(t for t in shared if not t.is_floating_point()))
        return tuple(shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        peers = ctx.peers
        totals: list[Tensor | None] = []
        for slope in slopes:
            total = slope.clone(memory_format=torch.contiguous_format)
            if slope.is_floating_point():
                dist.all_reduce(total, group=peers.group)
            totals.append(total if slope.is_floating_point() else None)
        if peers.rank < peers.count - 1:
            totals = [None] * len(totals)
        return None, None, *totals, *zeros(ctx.like, slopes[0].device)


def zeros(
    like: list[tuple[torch.Size, torch.dtype]], device: torch.device
) -> Iterator[Tensor | None]:
    """Gradients of tensors that were not used; integers have none."""
    for shape, dtype in like:
        floating = dtype.is_floating_point
        yield torch.zeros(shape, dtype=dtype, device=device) if floating else None
