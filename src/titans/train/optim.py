"""Optimizers and their schedule."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from titans.layers.memory import MemoryGates
from titans.models.lm import TitansLM
from titans.train.config import OptimizerConfig
from titans.train.parts import held_part, whole_tensor


def build_optimizers(model: TitansLM, config: OptimizerConfig) -> dict[str, Optimizer]:
    """AdamW, and Muon for the matrices of the blocks if the config says so; by name.

    Every group has a `peak`, the learning rate that `set_learning_rate` scales.
    """
    matrices, others = split_parameters(model)
    rate, decay = config.learning_rate, config.weight_decay
    groups = [{"params": others, "lr": rate, "peak": rate, "weight_decay": 0.0}]
    optimizers: dict[str, Optimizer] = {}
    if config.name == "muon":
        peak = config.muon_rate
        muon_groups = [{"params": matrices, "lr": peak, "peak": peak}]
        settings: dict[str, Any] = {"weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers["muon"] = (
            MuonOfParts(model, muon_groups, **settings)
            if model.cuts or any(hasattr(p, "full_tensor") for p in matrices)
            else torch.optim.Muon(muon_groups, **settings)
        )
    else:
        groups.append({"params": matrices, "lr": rate, "peak": rate, "weight_decay": decay})
    fused = all(p.device.type in ("cpu", "cuda") for p in others)
    beta1, beta2 = config.betas
    optimizers["adamw"] = torch.optim.AdamW(groups, betas=(beta1, beta2), fused=fused)
    return optimizers


class MuonOfParts(torch.optim.Muon):
    """Muon where a process holds a part of each matrix: a part of the momentum too, but it is the
    whole of it that is to be made orthogonal. Every process does so, one matrix at a time."""

    def __init__(self, model: TitansLM, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.model = model
        self.names = {id(p): name for name, p in model.named_parameters()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group)

    def move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(mean, group["momentum"])
        name = self.names[id(parameter)]
        whole = whole_tensor(self.model, name, ahead)
        # Muon's step from zero, without momentum, is what the matrix is to move by.
        step = torch.zeros_like(whole, requires_grad=True)
        step.grad = whole
        torch.optim.Muon(
            [step],
            lr=group["lr"],
            weight_decay=0.0,
            momentum=0.0,
            nesterov=False,
            adjust_lr_fn=group["adjust_lr_fn"],
        ).step()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(held_part(self.model, name, step.detach()))


def split_parameters(model: TitansLM) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the blocks' linear maps, and all other parameters.

    The others are embeddings, the head, norms, biases, convolutions, persistent tokens, M_0 and
    the gates, whose maps start at zero and stay small: neither decay nor Muon suits them.
    """
    gates = {
        id(module)
        for gates in model.modules()
        if isinstance(gates, MemoryGates)
        for module in gates.modules()
    }
    chosen = {
        id(module.weight)
        for module in model.blocks.modules()
        if isinstance(module, nn.Linear) and id(module) not in gates
    }
    matrices = [p for p in model.parameters() if id(p) in chosen]
    others = [p for p in model.parameters() if id(p) not in chosen]
    return matrices, others


def schedule(step: int, steps: int, config: OptimizerConfig) -> float:
    """The factor on the learning rate of step 0 ... steps - 1: linear warm-up, then a cosine."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return config.min_ratio + (1.0 - config.min_ratio) * cosine


def set_learning_rate(optimizers: dict[str, Optimizer], factor: float) -> None:
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
