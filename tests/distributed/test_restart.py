"""A process killed in the middle of a run: torchrun starts all again, nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_training import losses, make

from titans.config import to_toml
from titans.train.loop import train


def test_a_killed_process_changes_no_loss(tmp_path: Path) -> None:
    config = make(tmp_path, {"strategy": "fsdp"})
    (tmp_path / "config.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1"]
    command += [str(Path(__file__).with_name("dying.py")), "train", str(tmp_path / "config.toml")]
    command += ["--out", str(tmp_path / "two"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "exitcode: -9" in done.stderr
    # One process speaks for both.
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 8
    assert len(done.stdout.splitlines()) == 2
    train(config, tmp_path / "one", progress=False)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
