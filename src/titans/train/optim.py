"""Optimizers and their schedule."""

import math

import torch
from torch import nn
from torch.optim import Optimizer

from titans.layers.memory import MemoryGates
from titans.models.lm import TitansLM
from titans.train.config import OptimizerConfig


def build_optimizers(model: TitansLM, config: OptimizerConfig) -> dict[str, Optimizer]:
    """AdamW, and Muon for the matrices of the blocks if the config says so; by name.

    Every group has a `peak`, the learning rate that `set_learning_rate` scales.
    """
    matrices, others = split_parameters(model)
    rate, decay = config.learning_rate, config.weight_decay
    groups = [{"params": others, "lr": rate, "peak": rate, "weight_decay": 0.0}]
    optimizers: dict[str, Optimizer] = {}
    if config.name == "muon":
        peak = config.muon_learning_rate or rate
        optimizers["muon"] = torch.optim.Muon(
            [{"params": matrices, "lr": peak, "peak": peak}],
            weight_decay=decay,
            adjust_lr_fn="match_rms_adamw",
        )
    else:
        groups.append({"params": matrices, "lr": rate, "peak": rate, "weight_decay": decay})
    fused = all(p.device.type in ("cpu", "cuda") for p in others)
    beta1, beta2 = config.betas
    optimizers["adamw"] = torch.optim.AdamW(groups, betas=(beta1, beta2), fused=fused)
    return optimizers


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
