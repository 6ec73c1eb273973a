"""Every example runs as a user would run it, and shows what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run(path: Path) -> str:
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path: Path) -> None:
    output = run(path)
    check = CHECKS.get(path.stem)
    assert check is not None, f"say in CHECKS what {path.name} shows"
    assert check(output)


def recalls_what_fits(output: str) -> bool:
    """Few pairs are recalled well, more of them worse; forgetting loses some."""
    rows = [[float(x) for x in line.split()] for line in output.splitlines()[1:]]
    kept = [row[1] for row in rows]
    return kept[0] > 0.95 and kept == sorted(kept, reverse=True) and rows[1][2] < kept[1]


def loss_falls(output: str) -> bool:
    values = [float(line.split()[2]) for line in output.splitlines()]
    return values[-1] < 0.75 * values[0]


def holds_more_than_keys_have_dimensions(output: str) -> bool:
    """At 32 pairs for keys of 16: polynomial features hold what a matrix loses; windows help."""
    row = next(line.split() for line in output.splitlines() if line.startswith("   32"))
    linear, polynomial, windowed = map(float, row[1:])
    return linear < 0.6 and 0.8 < polynomial < windowed


def every_loss_falls(output: str) -> bool:
    rows = [line.split() for line in output.splitlines()]
    names = [row[0] for row in rows]
    fell = [float(row[3]) < 0.85 * float(row[1]) for row in rows]
    return names == ["Moneta", "Yaad", "Memora"] and all(fell)


CHECKS = {
    "atlas": holds_more_than_keys_have_dimensions,
    "miras": every_loss_falls,
    "recall_without_training": recalls_what_fits,
    "stream_fork_save": lambda output: "one fork has read 44 tokens, the other 45" in output,
    "train_on_your_text": loss_falls,
}
