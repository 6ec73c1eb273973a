"""What a run reports."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from titans.train.loop import train
from titans.train.metrics import MetricsFile, WandbLogger, read_metrics, training_seconds


def test_rows_after_the_step_and_a_cut_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    file = MetricsFile(tmp_path, step=1)
    assert file.last == {"step": 1, "loss": 5.0}
    file.write({"step": 2, "loss": 4.5})
    file.close()
    assert read_metrics(path) == [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.5}]


def test_damage_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match=r"metrics\.jsonl: cannot be read"):
        read_metrics(path)
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: damaged"):
        read_metrics(path)


def test_a_missing_logger_names_the_extra(tiny, tmp_path, monkeypatch):
    """And leaves nothing behind that would stand in the way of the next try."""
    find = importlib.util.find_spec
    for name in ("wandb", "tensorboard"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, name=name: None if n == name else find(n)
        )
        with pytest.raises(ImportError, match=r"pip install -e '.\[log\]'"):
            train(tiny(log=(name,)), tmp_path / name, progress=False)
        assert not (tmp_path / name).exists()


def test_wandb_goes_on_in_the_run_of_the_folder(tiny, tmp_path, monkeypatch):
    """Whatever of the config has changed; and no other folder of that name has the same."""
    begun = []
    fake = SimpleNamespace(init=lambda **given: begun.append(given["id"]))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder, every in (("a/run", 4), ("a/run", 5), ("b/run", 4)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        WandbLogger(tmp_path / folder, tiny(checkpoint_every=every))
    assert begun[0] == begun[1] != begun[2]
    assert all(name.startswith("run-") for name in begun)


def test_tensorboard_gets_every_step(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(steps=3, log=("tensorboard",)), tmp_path, progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_a_pause_is_no_training_time() -> None:
    rows = [{"tokens_per_s": speed} for speed in (100.0, 50.0, 0.1, 100.0)]
    assert training_seconds(rows, 100) == pytest.approx(1 + 2 + 1.5 + 1)
    assert training_seconds([], 100) == 0.0
