"""Checkpoints: whole or not there, exact, and clear about what is wrong with them."""

import json

import pytest
import torch

import titans
from titans.train import checkpoint
from titans.train.batches import open_data
from titans.train.checkpoint import latest, load_checkpoint, open_run, save_checkpoint
from titans.train.loop import new_training, take_step
from titans.train.processes import ALONE
from titans.train.sharded import load_sharded

CPU = torch.device("cpu")


@pytest.fixture
def run(tiny, tmp_path):
    """(config, folder, training) after two steps of Muon, in the middle of a document."""
    config = tiny(variant="mag", accumulate=2, optimizer={"name": "muon"})
    data = open_data(config)
    training = new_training(config, CPU)
    for step in range(2):
        take_step(training, data.at(step).train.batch(step), config)
    return config, tmp_path, training


def equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(one[name].dtype == other[name].dtype for name in one)


def test_what_is_loaded_is_what_was_saved(run):
    config, folder, training = run
    path = save_checkpoint(folder, training, keep=1)
    loaded = load_checkpoint(path, config, CPU)
    assert path.name == "step-000002"
    assert loaded.step == 2
    assert len(loaded.memories) == 2
    equal(dict(loaded.model.named_parameters()), dict(training.model.named_parameters()))
    equal(checkpoint.optimizer_tensors(loaded), checkpoint.optimizer_tensors(training))
    for one, other in zip(loaded.memories, training.memories, strict=True):
        equal(one.tensors(), other.tensors())
    assert titans.load(path / "model.safetensors").config == config.model


def test_optimizer_state_names_parameters(run):
    _, _, training = run
    tensors = checkpoint.optimizer_tensors(training)
    assert "adamw/embedding.weight/exp_avg" in tensors
    assert "muon/blocks.0.ffn.down.weight/momentum_buffer" in tensors


def test_the_newest_stay(run):
    _, folder, training = run
    for step in (2, 3, 5, 1_000_000):
        training.step = step
        path = save_checkpoint(folder, training, keep=2)
        assert latest(folder) == path
    names = sorted(f.name for f in (folder / "checkpoints").iterdir())
    assert names == ["step-000005", "step-1000000"]


def test_later_steps_of_an_abandoned_run_go_and_what_is_written_stays(run):
    _, folder, training = run
    training.step = 7
    save_checkpoint(folder, training, keep=1)
    training.step = 4
    assert latest(folder).name == "step-000007"
    assert save_checkpoint(folder, training, keep=1) == latest(folder)
    assert latest(folder).name == "step-000004"


def test_a_half_written_checkpoint_does_not_count(run, monkeypatch):
    _, folder, training = run
    assert latest(folder) is None
    whole = save_checkpoint(folder, training, keep=1)

    def full(*arguments):
        raise OSError("no space left on device")

    training.step = 3
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_text", full)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(folder, training, keep=1)
    assert latest(folder) == whole
    assert len(list((folder / "checkpoints").iterdir())) == 2
    training.step = 4
    whole = save_checkpoint(folder, training, keep=1)
    assert list((folder / "checkpoints").iterdir()) == [whole]


def test_a_folder_that_lost_a_file_is_passed_over_for_an_older_one(run):
    _, folder, training = run
    old = save_checkpoint(folder, training, keep=2)
    training.step = 3
    new = save_checkpoint(folder, training, keep=2)
    (new / "memory-1.safetensors").unlink()
    assert latest(folder) == old
    (old / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"step-000003/memory-1.safetensors: missing, and no"):
        latest(folder)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.safetensors", "memory-0.safetensors", "training.json"],
)
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_is_refused_by_name(run, name, damage):
    config, folder, training = run
    path = save_checkpoint(folder, training, keep=1)
    content = bytearray((path / name).read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[-20] ^= 0x55
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        load_checkpoint(path, config, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"cnowhere\nnothing\n.", b"garbage"])
def test_a_damaged_index_of_shards_is_one_line(run, content):
    _, folder, training = run
    path = folder / "checkpoints" / "step-000001"
    (path / "shards").mkdir(parents=True)
    index = {"format": "titans-checkpoint", "version": 1, "step": 1, "memories": 0}
    (path / "training.json").write_text(json.dumps(index))
    (path / "shards" / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"shards: cannot be read \(") as error:
        load_sharded(path, training, 1, ALONE)
    assert "\n" not in str(error.value)


def test_an_index_nested_too_deep_is_damaged(run):
    config, folder, training = run
    path = save_checkpoint(folder, training, keep=1)
    (path / "training.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"training.json: damaged \(RecursionError"):
        load_checkpoint(path, config, CPU)


def test_another_version_and_another_model_are_refused(run, tiny):
    config, folder, training = run
    path = save_checkpoint(folder, training, keep=1)
    other = tiny(variant="mag", model={"persistent": 3})
    with pytest.raises(ValueError, match=r"another config: \w+.* there and .* here"):
        load_checkpoint(path, other, CPU)
    plain = tiny(variant="mag")
    with pytest.raises(ValueError, match=r"optimizer.safetensors: does not fit the model \(muon"):
        load_checkpoint(path, plain, CPU)
    index = json.loads((path / "training.json").read_text())
    (path / "training.json").write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(ValueError, match=r"expected titans-checkpoint version 1, got .* 99"):
        load_checkpoint(path, config, CPU)


def test_a_folder_belongs_to_one_config(tiny, tmp_path):
    config = tiny()
    folder = tmp_path / "runs" / "one"
    assert open_run(folder, config, resume=False) is None
    assert open_run(folder, tiny(steps=9), resume=True) is None  # nothing to go on from as yet
    assert open_run(folder, config, resume=True) is None
    saved = save_checkpoint(folder, new_training(config, CPU), keep=1)
    assert open_run(folder, config, resume=True) == saved
    with pytest.raises(ValueError, match="there is a run in it already; resume it or name another"):
        open_run(folder, config, resume=False)
    with pytest.raises(ValueError, match=r"another config: train\.steps is 8 there and 9 here"):
        open_run(folder, tiny(steps=9), resume=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "draft.txt").write_text("Dear")
    with pytest.raises(ValueError, match=r"is not empty and not the folder of a run"):
        open_run(tmp_path / "letters", config, resume=True)
    with pytest.raises(ValueError, match=r"not the folder of a run"):
        open_run(tmp_path / "letters" / "draft.txt", config, resume=True)
