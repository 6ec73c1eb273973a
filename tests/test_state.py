"""States: verbs that never touch the original, files that come back bit for bit, and damaged
files that are refused with one line."""

import json
import os
import pickle
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

import titans.state
from titans import MemoryConfig, MemoryState, ModelState, NeuralMemory
from titans.state import FORMAT, State


@dataclass(frozen=True, kw_only=True)
class Leaf(State):
    value: Tensor
    shared: Tensor
    missing: Tensor | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Tree(State):
    leaves: tuple[Leaf, ...]
    numbers: tuple[Tensor, ...]
    name: str


def tree(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(3, 5, generator=generator)

    def leaf(count):
        value = torch.randn(2, 4, generator=generator, dtype=torch.float64)
        return Leaf(value=value, shared=shared, missing=None, count=count)

    numbers = (
        torch.randn(6, generator=generator).bfloat16(),
        torch.arange(4),
        torch.zeros(2, 0, 3),
        torch.tensor([-0.0, 3.0e38, -1e-38, 1e-40]),
    )
    return Tree(
        leaves=(leaf(1), leaf(2)), numbers=numbers, name='a name\n with "quotes" and ümlauts'
    )


def bits(state):
    """Every tensor as (dtype, shape, bytes): equality that tells -0 from 0 and NaN from NaN."""
    return {
        name: (
            t.dtype,
            tuple(t.shape),
            t.detach().contiguous().reshape(-1).view(torch.uint8).tolist(),
        )
        for name, t in state.tensors().items()
    }


@pytest.fixture
def memory():
    """A state as a model has it: with a graph, an open chunk, momentum and a tail."""
    torch.manual_seed(0)
    layer = NeuralMemory(MemoryConfig(dim=8, heads=2, depth=2, chunk_size=4, momentum=True))
    return layer(torch.randn(2, 6, 8))[1]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "memory.safetensors"
    tree().save(path)
    return path


def test_tensors_are_named_by_their_path():
    names = ["value", "shared"]
    expected = [f"leaves.{i}.{name}" for i in (0, 1) for name in names]
    assert list(tree().tensors()) == expected + [f"numbers.{i}" for i in range(4)]


def test_states_are_frozen():
    with pytest.raises(FrozenInstanceError):
        tree().name = "other"


def test_detach_cuts_the_graph_and_keeps_the_values(memory):
    assert any(t.requires_grad for t in memory.tensors().values())
    detached = memory.detach()
    assert not any(t.requires_grad for t in detached.tensors().values())
    assert bits(detached) == bits(memory)
    assert detached.rule.offset == memory.rule.offset == 2


def test_fork_is_independent_both_ways(memory):
    before = bits(memory)
    fork = memory.fork()
    for tensor in fork.tensors().values():
        tensor.add_(1.0)
    assert bits(memory) == before
    second = memory.fork()
    with torch.no_grad():
        for tensor in memory.detach().tensors().values():
            if tensor.is_contiguous():
                tensor.mul_(2.0)
    assert bits(second) == before


def test_what_was_shared_stays_shared_but_a_fork_shares_nothing_with_its_origin():
    state = tree()
    fork = state.fork()
    assert fork.leaves[0].shared is fork.leaves[1].shared
    assert fork.leaves[0].shared.data_ptr() != state.leaves[0].shared.data_ptr()


def test_to_moves_every_tensor_and_keeps_the_rest():
    moved = tree().to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    assert moved.name == tree().name
    assert moved.leaves[1].count == 2
    assert bits(tree().to("cpu")) == bits(tree())


def test_nbytes_counts_every_tensor():
    assert tree().nbytes == 2 * (8 * 8 + 15 * 4) + 6 * 2 + 4 * 8 + 0 + 4 * 4


def test_check_finite_names_the_tensor():
    good = replace(tree(), numbers=tree().numbers[:2])
    good.check_finite()
    for bad in (torch.nan, torch.inf):
        leaf = replace(good.leaves[1], value=torch.tensor([1.0, bad]))
        with pytest.raises(ValueError, match=r"non-finite number in leaves\.1\.value"):
            replace(good, leaves=(good.leaves[0], leaf)).check_finite()


def test_what_cannot_be_computed_with_is_refused(tmp_path, monkeypatch):
    """Numbers of 8 bits, whether they are to be saved or come from a file; and no tensor at all."""
    small = Leaf(
        value=torch.zeros(2).to(torch.float8_e4m3fn), shared=torch.zeros(1), missing=None, count=0
    )
    with pytest.raises(ValueError, match=r"holds torch\.float8_e4m3fn in value"):
        small.save(tmp_path / "small")
    empty = Tree(leaves=(), numbers=(), name="")
    empty.save(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty: holds no tensor"):
        Tree.load(tmp_path / "empty")
    with monkeypatch.context() as patch:
        patch.setattr(Leaf, "check_finite", lambda self: None)
        small.save(tmp_path / "small")
    with pytest.raises(ValueError, match=r"small: the memory holds torch\.float8_e4m3fn in value"):
        Leaf.load(tmp_path / "small")


def test_save_and_load_bit_for_bit(saved):
    loaded = Tree.load(saved)
    assert bits(loaded) == bits(tree())
    assert loaded.name == tree().name
    assert [leaf.count for leaf in loaded.leaves] == [1, 2]
    assert loaded.leaves[0].missing is None
    assert bits(State.load(saved)) == bits(tree())  # the base class takes any state


def test_save_and_load_a_memory_and_go_on(memory, tmp_path):
    torch.manual_seed(0)
    layer = NeuralMemory(MemoryConfig(dim=8, heads=2, depth=2, chunk_size=4, momentum=True))
    memory.save(tmp_path / "m.safetensors")
    loaded = MemoryState.load(str(tmp_path / "m.safetensors"))
    assert bits(loaded) == bits(memory)
    x = torch.randn(2, 5, 8)
    assert torch.equal(layer(x, loaded)[0], layer(x, memory)[0])


def test_notes_are_kept_beside_the_state_and_checked_with_it(tmp_path):
    path = tmp_path / "noted.safetensors"
    tree().save(path, {"tokenizer": "bytes"})
    assert titans.state.read_notes(path) == {"tokenizer": "bytes"}
    assert bits(Tree.load(path)) == bits(tree())
    rewrite(path, lambda metadata: metadata.update(notes='{"tokenizer": "other"}'))
    refuse(path, "damaged memory file")
    tree().save(path)
    assert titans.state.read_notes(path) == {}


def test_saved_tensors_do_not_point_into_the_file(saved):
    loaded = Tree.load(saved)
    before = bits(loaded)
    saved.write_bytes(bytes(saved.stat().st_size))
    assert bits(loaded) == before


def refuse(path, match, cls=Tree):
    """One line that names the file, and no other type of exception."""
    with pytest.raises(ValueError, match=match) as caught:
        cls.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_truncated_anywhere(saved):
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    offsets = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1}
    offsets |= set(range(16, len(content), len(content) // 40))
    for offset in sorted(offsets):
        saved.write_bytes(content[:offset])
        refuse(saved, "not a readable safetensors file|damaged memory file")
    saved.write_bytes(content + b"\0")
    refuse(saved, "not a readable safetensors file|damaged memory file")


def test_a_flipped_bit_in_the_data(saved):
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for position in range(header, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        saved.write_bytes(damaged)
        refuse(saved, "damaged memory file")


def test_a_flipped_bit_in_the_header(saved):
    """Refused: names, shapes and numbers such as a position count as much as the tensors."""
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    padding = len(content[:header]) - len(content[:header].rstrip(b" "))
    for position in range(header - padding):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 7)
        saved.write_bytes(damaged)
        refuse(saved, "memory file|not a readable safetensors file")


def rewrite(path, change_metadata=lambda m: None, change_tensors=lambda t: None):
    """Save again with changed content and the old checksum."""
    tensors, metadata = titans.state.read_safetensors(path)
    change_metadata(metadata)
    change_tensors(tensors)
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def forge(path, monkeypatch, structure=lambda text: text, tensors=lambda t: None):
    """A file with a right checksum whose structure and tensors do not fit each other."""
    content = tree().tensors()
    tensors(content)
    described = json.loads(structure(json.dumps(titans.state._describe(tree()))))
    with monkeypatch.context() as patch:
        patch.setattr(Tree, "tensors", lambda self: content)
        patch.setattr(titans.state, "_describe", lambda node: described)
        tree().save(path)


def test_foreign_files(saved, tmp_path):
    refuse(tmp_path / "absent", "no such file")
    refuse(tmp_path, "not a readable safetensors file")
    saved.write_text("Call me Ishmael. " * 100)
    refuse(saved, "not a readable safetensors file")
    saved.write_bytes(pickle.dumps({"weights": [1.0]}))
    refuse(saved, "not a readable safetensors file")
    torch.save({"weights": torch.ones(3)}, saved)
    refuse(saved, "not a readable safetensors file")
    safetensors.torch.save_file({"weights": torch.ones(3)}, saved)
    refuse(saved, r"not a memory file \(format None\)")
    safetensors.torch.save_file({"w": torch.ones(3)}, saved, metadata={"format": "pt"})
    refuse(saved, r"not a memory file \(format 'pt'\)")


def test_another_version(saved):
    rewrite(saved, lambda m: m.update(version="2"))
    refuse(saved, "memory file version '2', this release reads version 1")
    rewrite(saved, lambda m: m.pop("version"))
    refuse(saved, "memory file version None")


def test_another_state(saved):
    refuse(saved, "holds a Tree, expected ModelState", ModelState)
    refuse(saved, "holds a Tree, expected Leaf", Leaf)


DAMAGE = {
    "no checksum": {"change_metadata": lambda m: m.pop("sha256")},
    "no structure": {"change_metadata": lambda m: m.pop("structure")},
    "structure is not JSON": {"change_metadata": lambda m: m.update(structure="{")},
    "structure is a list": {"change_metadata": lambda m: m.update(structure="[1]")},
    "structure is a number": {"change_metadata": lambda m: m.update(structure="3")},
    "a missing tensor": {"change_tensors": lambda t: t.pop("leaves.0.value")},
    "a surplus tensor": {"change_tensors": lambda t: t.update(more=torch.ones(1))},
    "a renamed tensor": {"change_tensors": lambda t: t.update(x=t.pop("numbers.1"))},
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_content_that_was_changed(saved, change):
    rewrite(saved, **change)
    refuse(saved, "damaged memory file")


FORGERIES = {
    "a missing tensor": {"tensors": lambda t: t.pop("leaves.0.value")},
    "another shape": {
        "tensors": lambda t: t.update({"leaves.0.value": torch.ones(4, 2, dtype=torch.float64)})
    },
    "another precision": {"tensors": lambda t: t.update({"leaves.0.value": torch.ones(2, 4)})},
    "an unknown state": {"structure": lambda text: text.replace("Tree", "Forest")},
    "an unknown field": {"structure": lambda text: text.replace('"name"', '"title"')},
    "an unknown kind": {"structure": lambda text: text.replace('"tuple"', '"list"')},
    "a list": {"structure": lambda text: f"[{text}]"},
    "a number": {"structure": lambda text: "3"},
    "nothing": {"structure": lambda text: "null"},
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
def test_structure_that_does_not_fit(saved, monkeypatch, forgery):
    """As another release might write it; the checksum is right."""
    forge(saved, monkeypatch, **forgery)
    refuse(saved, "damaged memory file")


def test_a_forgery_without_a_change_is_accepted(saved, monkeypatch):
    forge(saved, monkeypatch)
    assert bits(Tree.load(saved)) == bits(tree())


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_failing_save_leaves_the_old_file_and_no_other(saved, monkeypatch, moment):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    if moment == "write":
        monkeypatch.setattr(safetensors.torch, "save_file", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        tree(1).save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_save_replaces_the_old_file_and_makes_folders(saved, tmp_path):
    tree(1).save(saved)
    assert bits(Tree.load(saved)) == bits(tree(1))
    deep = tmp_path / "a" / "b" / "memory"
    tree().save(deep)
    assert bits(Tree.load(deep)) == bits(tree())
    assert os.listdir(deep.parent) == ["memory"]


def test_a_file_is_as_readable_as_any_other(saved):
    plain = Path(saved.parent / "plain")
    plain.write_text("x")
    assert saved.stat().st_mode == plain.stat().st_mode


def test_the_header_can_be_read_by_any_safetensors_reader(saved):
    with safetensors.safe_open(str(saved), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT
    structure = json.loads(metadata["structure"])
    assert structure["state"] == "Tree"
    assert structure["fields"]["leaves"]["tuple"][0]["fields"]["value"] == {
        "tensor": [2, 4],
        "dtype": "float64",
    }
