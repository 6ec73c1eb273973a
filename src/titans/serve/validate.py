"""A memory file from outside: refused unless it is built as the model's own memories are."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from titans.config import TitansConfig
from titans.layers.attention import SegmentState
from titans.models.lm import TitansLM
from titans.ops import RuleState
from titans.state import ModelState, State, read_notes

POSITION_LIMIT = 2**53  # where float64, and so a rotary angle, stops telling neighbours apart


def load_memory(path: Path) -> tuple[ModelState, dict[str, str]]:
    """The state, and what else its file notes. ValueError of one line, without the path, which
    is only ours."""
    try:
        return ModelState.load(path), read_notes(path)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{path}: ")) from None


def check_memory(state: ModelState, model: TitansLM) -> None:
    """ValueError unless every field is of the kind, shape and range that `model` makes."""
    position = state.position
    if type(position) is not int or not 0 <= position < POSITION_LIMIT:
        raise ValueError(f"the memory's position must be a count of tokens, got {position!r:.50}")
    check_node(state, model.init_state(1), "memory", position, model.config)


def check_node(got: Any, own: Any, place: str, position: int, config: TitansConfig) -> None:
    """got: a part of the file's state; own: the same part of a fresh one."""
    if type(got) is not type(own):
        raise ValueError(f"{place} must be {type(own).__name__}, got {type(got).__name__}")
    if isinstance(own, State):
        for name in (f.name for f in fields(own)):
            inner = f"{place}.{name}"
            if isinstance(getattr(own, name), int):
                check_count(getattr(got, name), own, name, inner, position, config)
            else:
                check_node(getattr(got, name), getattr(own, name), inner, position, config)
    elif isinstance(own, tuple):
        if len(got) != len(own):
            raise ValueError(f"{place} must have {len(own)} parts, got {len(got)}")
        for index, (part, fresh) in enumerate(zip(got, own, strict=True)):
            check_node(part, fresh, f"{place}.{index}", position, config)
    elif isinstance(own, Tensor):
        if got.shape != own.shape or got.dtype != own.dtype:
            raise ValueError(
                f"{place} must be {own.dtype}{list(own.shape)}, got {got.dtype}{list(got.shape)}"
            )
    elif got != own:
        raise ValueError(f"{place} must be {own!r}, got {got!r:.50}")


def check_count(
    got: Any, holder: State, name: str, place: str, position: int, config: TitansConfig
) -> None:
    """An integer of a state: the position, or an offset in a chunk or a segment."""
    if name == "position":
        allowed = range(position, position + 1)
    elif isinstance(holder, RuleState):
        allowed = range(config.memory.chunk_size)
    elif isinstance(holder, SegmentState):
        allowed = range(config.segment)
    else:
        raise AssertionError(f"{type(holder).__name__}.{name} has no known range")
    if type(got) is not int or got not in allowed:
        raise ValueError(f"{place} must lie in {allowed.start}..{allowed[-1]}, got {got!r:.50}")
