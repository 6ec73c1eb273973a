"""What a process holds of a weight or a moment: all of it, its heads', or a shard of either.

Also as `torch.distributed.checkpoint` is to know it. A process's heads of queries, keys and values
are three pieces of the whole tensor; with FSDP on top it has some rows of these. Told so, the
checkpoint holds whole tensors whatever processes wrote it, and whoever reads it takes the pieces
it needs.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from titans.distributed import Cut, Peers
from titans.models.lm import TitansLM


def whole_tensor(model: TitansLM, name: str, held: Tensor) -> Tensor:
    """The tensor of which processes hold what they hold of the parameter `name`. All of them take
    part."""
    from torch.distributed.tensor import DTensor

    if isinstance(held, DTensor):
        held = held.full_tensor()
    if name in model.cuts:
        assert model.team is not None
        held = model.cuts[name].join(model.team.parts(held))
    return held


def held_part(model: TitansLM, name: str, whole: Tensor) -> Tensor:
    """The other way: what this process holds of a tensor that all of them have."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameter = model.get_parameter(name)
    if name in model.cuts:
        assert model.team is not None
        whole = model.cuts[name].own(whole, model.team)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    return whole


class Parts(NamedTuple):
    """What a process holds of a tensor of shape `whole`: views, by their first index there."""

    whole: torch.Size
    views: dict[torch.Size, Tensor]

    @classmethod
    def of(cls, tensor: Tensor, cut: Cut, team: Peers) -> "Parts":
        """tensor: the team's part of this process, or a shard of it."""
        from torch.distributed.tensor import DTensor

        local, row = tensor, 0
        if isinstance(tensor, DTensor):
            (shard,) = tensor.__create_chunk_list__()
            local, row = tensor.to_local(), shard.offsets[0]
        views, at, start = {}, 0, 0
        for size in cut.sizes(tensor.shape):
            # This block is at `at` of the part, in the whole it begins at `start`.
            first, last = (at, at + size)
            offsets = [row] + [0] * (tensor.ndim - 1)
            offsets[cut.dim] = start + team.rank * size
            if cut.dim == 0:
                first, last = max(at - row, 0), min(at + size - row, len(local))
                offsets[0] += first + row - at
            if first < last:
                views[torch.Size(offsets)] = local.narrow(cut.dim, first, last - first)
            at, start = at + size, start + team.count * size
        return cls(cut.whole_shape(tensor.shape, team), views)

    def chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, view.shape) for offset, view in self.views.items()]


def find_parts(
    tensors: dict[str, Tensor], model: TitansLM
) -> tuple[dict[str, Tensor], dict[str, Parts]]:
    """Of tensors named kind/parameter/..., those that are whole or shards, and those of heads."""
    parts = {}
    for key, tensor in tensors.items():
        cut = model.cuts.get(key.split("/")[1])
        if cut is not None and tensor.ndim:
            assert model.team is not None
            parts[key] = Parts.of(tensor, cut, model.team)
    return {key: tensor for key, tensor in tensors.items() if key not in parts}, parts


class SavePlanner(dcp.DefaultSavePlanner):
    """Writes `parts` besides the tensors that `save` is given."""

    def __init__(self, parts: dict[str, Parts]) -> None:
        super().__init__()
        self.parts = parts

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [
            WriteItem(
                index=MetadataIndex(key, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(part.views[chunk.offsets]),
                    size=part.whole,
                ),
            )
            for key, part in self.parts.items()
            for chunk in part.chunks()
        ]
        self.plan = dataclasses.replace(plan, items=[*plan.items, *items])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return find(self.parts, index) if index.fqn in self.parts else super().lookup_object(index)


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Fills `parts` besides the tensors that `load` is given."""

    def __init__(self, parts: dict[str, Parts]) -> None:
        super().__init__()
        self.parts = parts

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        assert self.metadata is not None
        items = list(plan.items)
        for key, part in self.parts.items():
            stored = self.metadata.state_dict_metadata[key]
            if not isinstance(stored, TensorStorageMetadata) or stored.size != part.whole:
                raise ValueError(f"{key} does not fit")
            items += create_read_items_for_chunk_list(key, stored, part.chunks())
        return dataclasses.replace(plan, items=items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return find(self.parts, index) if index.fqn in self.parts else super().lookup_tensor(index)


def find(parts: dict[str, Parts], index: MetadataIndex) -> Tensor:
    assert index.offset is not None
    return parts[index.fqn].views[index.offset]
