"""One segment through the model, and whether all numbers that came out are finite."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans.data.facts import Batch
from titans.data.text import IGNORED
from titans.models.lm import TitansLM
from titans.state import ModelState, NonFiniteError


class Segment(NamedTuple):
    """What a model made of a batch.

    nll: (B, T) nats, 0 where the label is ignored. likeliest: (B, T), the tokens it would have
    said. open: mean learning rate of the memories, 0 for a model without one and at padding.
    charged: mean `charge` of learning rates and decays, likewise, what the cost of writing is for.
    state: what it remembers
    after the last token.
    """

    nll: Tensor
    likeliest: Tensor
    open: Tensor
    charged: Tensor
    state: ModelState


def read_segment(
    model: TitansLM,
    batch: Batch,
    memory: ModelState | None,
    precision: str,
    write_half: float = 0.0,
) -> Segment:
    """Read a batch, going on from `memory` or, without one, from the model's learned start."""
    device = batch.tokens.device.type
    with autocast(precision, device):
        read = model.losses(batch.tokens, batch.labels, memory)
    records = [record for record in read.records if record is not None]
    none = read.nll.new_zeros(())
    # What pads a document is read as well; what it opens is not charged for.
    counted = (batch.labels != IGNORED).to(read.nll.dtype)[..., None]
    rates = [counted * record.learning_rate for record in records]
    decays = [none if record.decay is None else counted * record.decay for record in records]

    def mean(gates: list[Tensor]) -> Tensor:
        return torch.stack([gate.mean() for gate in gates]).mean() if gates else none

    opened = mean(rates)
    charged = mean([charge(g, write_half) for g in rates])
    charged = charged + mean([charge(g, write_half) for g in decays])
    return Segment(read.nll, read.likeliest, opened, charged, read.state)


def charge(gate: Tensor, half: float) -> Tensor:
    """What an open gate costs: itself, or g / (g + half), which tends to 1 for all that are open.

    The first presses on needles and noise alike, so that what is worth remembering is written
    weakly; the second on weak writes most, and leaves the strong ones alone.
    """
    return gate / (gate + half) if half else gate


def autocast(precision: str, device: str) -> torch.autocast:
    """Within it a model computes as `train.precision` says."""
    return torch.autocast(device, torch.bfloat16, enabled=runs_bf16(precision, device))


def runs_bf16(precision: str, device: str) -> bool:
    """Is `train.precision` bf16 on a device of this type? `auto` is, where that is fast."""
    if precision != "auto":
        return precision == "bf16"
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def split_rows(batch: Batch, parts: int) -> list[Batch]:
    """A batch as `parts` smaller ones; fewer if it has not so many rows."""
    columns = [column.tensor_split(min(parts, len(column))) for column in batch]
    return [Batch(*part) for part in zip(*columns, strict=True)]


def check_segment(step: int, model: TitansLM, loss: Tensor, state: ModelState) -> None:
    """NonFiniteError naming the first parameter, else the first memory, else the loss."""
    memory = state.tensors()
    if all_finite([loss, *memory.values()]):
        return
    check_parameters(step, model)
    bad = next((name for name, t in memory.items() if not all_finite([t])), None)
    raise NonFiniteError(
        f"step {step}: the loss is not finite ({loss.item()})"
        if bad is None
        else f"step {step}: the memory {bad} is not finite"
    )


def check_parameters(step: int, model: TitansLM) -> None:
    """NonFiniteError naming the first parameter, in the order of the layers."""
    if all_finite(model.parameters()):
        return
    bad = next(name for name, p in model.named_parameters() if not all_finite([p]))
    raise NonFiniteError(f"step {step}: the parameter {bad} is not finite")


def descend(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, step: int, clip: float = 1.0
) -> None:
    """One optimizer step of a plain training (`titans.train.loop` is the one with all else): the
    gradient scaled to a norm of at most `clip`. NonFiniteError if loss or gradient is no number."""
    if not all_finite([loss]):
        raise NonFiniteError(f"step {step}: the loss is not finite ({loss.item()})")
    optimizer.zero_grad()
    loss.backward()
    check_gradient(step, model, torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    optimizer.step()


def check_gradient(step: int, model: nn.Module, norm: Tensor) -> None:
    """NonFiniteError naming the parameter where it began: a gradient spreads from the last
    layer to the first, so that is the last one."""
    if all_finite([norm]):
        return
    pairs = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    bad = [name for name, gradient in pairs if not all_finite([gradient])]
    where = f"of {bad[-1]}" if bad else "norm"
    raise NonFiniteError(f"step {step}: the gradient {where} is not finite")


def check_metrics(row: Mapping[str, int | float]) -> None:
    bad = next((key for key, value in row.items() if not math.isfinite(value)), None)
    if bad is not None:
        raise NonFiniteError(f"step {row['step']}: {bad} is not finite ({row[bad]})")


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """One answer, so that a GPU is waited for once; of this process's shards alone."""
    held = [getattr(t, "_local_tensor", t) for t in tensors]
    return bool(torch.stack([torch.isfinite(t).all() for t in held]).all())
