"""What a model remembers, as explicit values: state in, state out, no hidden buffers.

Every state is a frozen dataclass whose fields are tensors, integers, None, tuples, or other
states. `State` gives all of them the same verbs (detach, fork, to, save, load); the concrete
states live beside the code that reads and writes them.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

FORMAT = "titans-memory"
FORMAT_VERSION = 1

S = TypeVar("S", bound="State")

_STATE_TYPES: dict[str, type["State"]] = {}


class NonFiniteError(ValueError):
    """A NaN or an infinity turned up; the message says where."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Base of all states. Tensors are never written in place; every verb returns a new state."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _STATE_TYPES[cls.__name__] = cls

    def map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        """Apply `function` to every tensor. Tensors shared between fields stay shared."""
        seen: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in seen:
                seen[id(tensor)] = function(tensor)
            return seen[id(tensor)]

        return _map(self, once)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its dotted path, e.g. `blocks.0.memory.weights.1`."""
        found: dict[str, Tensor] = {}
        _collect(self, "", found)
        return found

    def detach(self: S) -> S:
        """The same values, cut off from the graph that computed them."""
        return self.map(Tensor.detach)

    def fork(self: S) -> S:
        """An independent copy: what one copy reads never shows in the other."""
        return self.map(lambda tensor: tensor.detach().clone())

    def to(self: S, device: torch.device | str) -> S:
        return self.map(lambda tensor: tensor.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors. A memory's do not depend on how much was read, a cache's do."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def structure(self) -> Any:
        """All but the numbers in the tensors, as JSON; `rebuild` puts tensors into it."""
        return _describe(self)

    @classmethod
    def rebuild(cls: type[S], structure: Any, tensors: dict[str, Tensor]) -> S:
        """The state of that `structure` holding those `tensors`, by dotted path."""
        state = _rebuild(structure, "", tensors)
        assert isinstance(state, cls)
        return state

    def check_finite(self) -> None:
        """Raise ValueError naming the first tensor that holds a NaN or an infinity, or numbers of
        so few bits that they cannot be computed with."""
        for name, tensor in self.tensors().items():
            try:
                finite = bool(torch.isfinite(tensor).all())
            except NotImplementedError:
                raise ValueError(f"the memory holds {tensor.dtype} in {name}") from None
            if not finite:
                raise NonFiniteError(f"the memory holds a non-finite number in {name}")

    def save(self, path: str | Path, notes: dict[str, str] | None = None) -> None:
        """Write one safetensors file; the old file stays until the new one is whole.

        notes: what else to keep in the file, for `read_notes`.
        Raises ValueError for a state with a non-finite number: it would be of no use.
        """
        path = Path(path)
        self.check_finite()
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors().items()}
        structure = json.dumps(_describe(self))
        metadata = {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "structure": structure,
        }
        if notes:
            metadata["notes"] = json.dumps(notes)
        metadata["sha256"] = digest(tensors, structure + metadata.get("notes", ""))
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls: type[S], path: str | Path, device: torch.device | str = "cpu") -> S:
        """Read a state back. A wrong, damaged or foreign file is a ValueError of one line."""
        tensors, metadata = read_safetensors(path)
        check_header(path, tensors, metadata, "memory", FORMAT_VERSION, "structure")
        try:
            state = _rebuild(json.loads(metadata["structure"]), "", tensors)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: damaged memory file ({error})") from None
        if not isinstance(state, cls):
            raise ValueError(f"{path}: holds a {type(state).__name__}, expected {cls.__name__}")
        if not state.tensors():
            raise ValueError(f"{path}: holds no tensor")
        try:
            state.check_finite()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return state.to(device)


@dataclass(frozen=True, kw_only=True)
class ModelState(State):
    """All that a language model remembers.

    blocks: one state per block, in order. position: tokens read so far.
    config_hash: of the model that wrote it; another model refuses it.
    """

    blocks: tuple[State, ...]
    position: int
    config_hash: str

    @property
    def batch_size(self) -> int:
        """Texts that were read side by side."""
        return next(iter(self.tensors().values())).shape[0]

    @classmethod
    def init(cls, model: Any, batch_size: int = 1) -> "ModelState":
        """The state before the first token; see `TitansLM.init_state`."""
        return model.init_state(batch_size)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Atomic: written beside the target, flushed to disk, then renamed over it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory; a copy is what the reader gets anyway.
    owned = {name: tensor.clone() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.touch(exist_ok=False)  # with the permissions of any new file, which it will keep
        mode = temporary.stat().st_mode
        save_file(owned, temporary, metadata=metadata)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; never pickles. ValueError of one line when it cannot."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        # clone: a tensor must not keep pointing into a file that may be replaced.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return tensors, metadata


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """The file, as `safetensors.safe_open` has it; ValueError of one line when it cannot."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable safetensors file ({reason})") from None


def read_notes(path: str | Path) -> dict[str, str]:
    """What a memory's or a model's file keeps besides its tensors; these are not read."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
    try:
        return dict(json.loads(metadata.get("notes", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged file ({error})") from None


def check_header(
    path: str | Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    kind: str,
    version: int,
    header: str,
) -> None:
    """ValueError unless the file is a whole `titans-KIND` of that version.

    header: the metadata key whose text the checksum covers besides the tensors.
    """
    if metadata.get("format") != f"titans-{kind}":
        raise ValueError(f"{path}: not a {kind} file (format {metadata.get('format')!r})")
    if metadata.get("version") != str(version):
        raise ValueError(
            f"{path}: {kind} file version {metadata.get('version')!r}, "
            f"this release reads version {version}"
        )
    if metadata.get("sha256") != digest(
        tensors, metadata.get(header, "") + metadata.get("notes", "")
    ):
        raise ValueError(f"{path}: damaged {kind} file (its checksum does not match)")


def _map(node: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(node, Tensor):
        return function(node)
    if isinstance(node, State):
        return replace(
            node, **{f.name: _map(getattr(node, f.name), function) for f in fields(node)}
        )
    if isinstance(node, tuple):
        return tuple(_map(child, function) for child in node)
    return node


def _collect(node: Any, path: str, found: dict[str, Tensor]) -> None:
    if isinstance(node, Tensor):
        found[path] = node
    elif isinstance(node, State):
        for f in fields(node):
            _collect(getattr(node, f.name), f"{path}.{f.name}" if path else f.name, found)
    elif isinstance(node, tuple):
        for index, child in enumerate(node):
            _collect(child, f"{path}.{index}" if path else str(index), found)


def _describe(node: Any) -> Any:
    """The tree without its tensors, as JSON: enough to rebuild it, and to show its shapes."""
    if isinstance(node, Tensor):
        return {"tensor": list(node.shape), "dtype": str(node.dtype).removeprefix("torch.")}
    if isinstance(node, State):
        content = {f.name: _describe(getattr(node, f.name)) for f in fields(node)}
        return {"state": type(node).__name__, "fields": content}
    if isinstance(node, tuple):
        return {"tuple": [_describe(child) for child in node]}
    return {"value": node}


def _rebuild(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    def below(name: str) -> str:
        return f"{path}.{name}" if path else name

    if "tensor" in node:
        tensor = tensors[path]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if list(tensor.shape) != node["tensor"] or dtype != node["dtype"]:
            raise TypeError(f"{path} is {dtype}{list(tensor.shape)}, its header says otherwise")
        return tensor
    if "state" in node:
        cls = _STATE_TYPES.get(node["state"])
        if cls is None:
            raise TypeError(f"unknown state {node['state']!r}")
        return cls(**{k: _rebuild(v, below(k), tensors) for k, v in node["fields"].items()})
    if "tuple" in node:
        return tuple(_rebuild(v, below(str(i)), tensors) for i, v in enumerate(node["tuple"]))
    return node["value"]


def digest(tensors: dict[str, Tensor], header: str) -> str:
    """sha256 over header, names and contents: safetensors would not notice a flipped bit."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
