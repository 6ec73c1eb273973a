"""Tensor parallelism: each process of a team computes all tokens with a part of the heads.

A layer with a part of the heads is a smaller layer of the same kind: maps to heads keep rows, maps
from heads keep columns, and what those add to the residual stream is summed over the team. The
feed-forward is cut alike, along its hidden channels. All else every process holds whole:
embeddings, norms, persistent tokens, the maps from memory and attention to a block's output.

Gradients are shares, as in `titans.distributed.peers`: a process whose loss is the team's over
`team.count` ends with the whole gradient of its own heads, and of what all hold with a share, to
be summed over the team.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from titans.config import TitansConfig
from titans.distributed import Cut, Peers
from titans.layers.attention import SegmentAttention, SlidingWindowAttention
from titans.layers.feedforward import SwiGLU
from titans.layers.memory import MemoryGates, NeuralMemory
from titans.models.baselines.rwkv7 import RWKV7Mixer
from titans.models.baselines.transformer import TransformerMixer
from titans.models.lm import TitansLM
from titans.state import ModelState

ATTENTION = (SlidingWindowAttention, SegmentAttention, TransformerMixer)


def check_parts(config: TitansConfig, count: int) -> None:
    """ValueError for a model whose heads, or hidden channels, `count` processes cannot share."""
    if count == 1:
        return
    with torch.device("meta"):
        model = TitansLM(config)
    for layer in model.modules():
        name, size = "", 0
        if isinstance(layer, NeuralMemory):
            name, size = "model.memory.heads", layer.config.heads
        elif isinstance(layer, (*ATTENTION, RWKV7Mixer)):
            name, size = "model.heads", layer.heads
        elif isinstance(layer, SwiGLU):
            name, size = "model.ffn_hidden", layer.up.out_features
        if size % count:
            raise ValueError(f"distributed.tensor ({count}) must divide {name}, got {size}")


def share_heads(model: TitansLM, team: Peers) -> None:
    """Leave a whole model this process's heads.

    Optimizers must be made anew: the parameters are others. Raises ValueError as `check_parts`.
    """
    check_parts(model.config, team.count)
    for path, layer in list(model.named_modules()):
        for name, cut in cuts(layer).items():
            parent, _, last = name.rpartition(".")
            owner = layer.get_submodule(parent)
            part = nn.Parameter(cut.own(getattr(owner, last).detach(), team))
            setattr(owner, last, part)
            model.cuts[f"{path}.{name}"] = cut
        narrow(layer, team)
    model.team = team


def cuts(layer: nn.Module) -> dict[str, Cut]:
    """The parameters of a layer that belong to heads."""
    rows, columns, three = Cut(0), Cut(1), (1, 1, 1)
    found: dict[str, Cut] = {}
    if isinstance(layer, NeuralMemory):
        found = {"qkv.weight": Cut(0, three), "output.weight": columns}
        found |= {"conv.weight": Cut(1, three), "conv.bias": Cut(0, three)}
        found |= {"output_gate.weight": rows, "skip": rows}
        found |= {f"initial.{i}": rows for i in range(len(layer.initial))}
        found |= {f"gates.{name}": cut for name, cut in gate_cuts(layer.gates).items()}
    elif isinstance(layer, ATTENTION):
        found = {"qkv.weight": Cut(0, three), "output.weight": columns}
    elif isinstance(layer, SwiGLU):
        found = {"gate.weight": rows, "up.weight": rows, "down.weight": columns}
    elif isinstance(layer, RWKV7Mixer):
        mapped = ("receptance", "key", "value", "decay.expand", "rate.expand", "gate.expand")
        found = {f"{name}.weight": rows for name in mapped} | {"output.weight": columns}
        alone = ("removal_scale", "replacement", "bonus", "norm_gain", "norm_bias")
        found |= dict.fromkeys((*alone, "decay.expand.bias", "rate.expand.bias"), rows)
    present = dict(layer.named_parameters())
    return {name: cut for name, cut in found.items() if name in present}


def gate_cuts(gates: MemoryGates) -> dict[str, Cut]:
    rates, momenta, decays = (size // gates.config.heads for size in gates.sizes)
    decays_of_sets = (gates.channels,) * (decays // gates.channels)
    of_map = (1,) * (rates + momenta) + (() if gates.low_rank else decays_of_sets)
    of_decay = Cut(0, (gates.channels,) * gates.sets)
    found = {"log_scale": of_decay, "expand.weight": of_decay, "expand.bias": of_decay}
    return found | {"map.weight": Cut(0, of_map), "map.bias": Cut(0, of_map)}


def narrow(layer: nn.Module, team: Peers) -> None:
    """Tell a layer that its parameters are those of a part of the heads."""
    if isinstance(layer, NeuralMemory):
        config = layer.config
        heads, size = config.heads // team.count, config.key_dim
        layer.config = layer.gates.config = replace(config, heads=heads, head_dim=size)
        layer.gates.part = (team.rank, team.count)
        layer.team = team
        add_up(layer.output, team)
    elif isinstance(layer, (*ATTENTION, RWKV7Mixer)):
        layer.heads //= team.count
        add_up(layer.output, team)
    elif isinstance(layer, SwiGLU):
        add_up(layer.down, team)


def add_up(sink: nn.Linear, team: Peers) -> None:
    """The map's output is to be the sum of what all processes' heads give."""
    sink.register_forward_hook(lambda module, inputs, output: team.total(output))


def own_state(state: ModelState, team: Peers) -> ModelState:
    """Of what the whole model remembers, that of this process's heads."""
    names = {id(tensor): name for name, tensor in state.tensors().items()}

    def own(tensor: Tensor) -> Tensor:
        cut = state_cut(names[id(tensor)])
        return tensor if cut is None else cut.own(tensor, team)

    return state.map(own)


def whole_state(state: ModelState, team: Peers) -> ModelState:
    """What the whole model remembers; all processes of the team take part."""
    names = {id(tensor): name for name, tensor in state.tensors().items()}

    def whole(tensor: Tensor) -> Tensor:
        cut = state_cut(names[id(tensor)])
        return tensor if cut is None else cut.join(team.parts(tensor))

    return state.map(whole)


def state_cut(name: str) -> Cut | None:
    """Heads follow the rows, (B, H, ...), in all but what precedes a convolution or a shift."""
    *_, owner, last = name.split(".")
    if last == "shift":
        return None
    if last == "tail":  # of queries, keys and values; MAC's own is of queries alone
        return Cut(2, (1, 1, 1) if owner == "memory" else (1,))
    return Cut(1)
