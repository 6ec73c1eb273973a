"""The text of every committed page is what its program makes of the committed measurements."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNNERS = sorted((ROOT / "results").glob("*/run.py"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch):
    """Run a copied program in a folder where nothing else lies."""
    monkeypatch.chdir(tmp_path)

    def start(program: Path, option: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(program), option])
        runpy.run_path(str(program), run_name="__main__")

    return start


@pytest.mark.parametrize("runner", RUNNERS, ids=lambda p: p.parent.name)
def test_a_page_is_made_of_its_rows(runner: Path, tmp_path: Path, run) -> None:
    shutil.copy(runner.with_name("results.json"), tmp_path)
    run(Path(shutil.copy(runner, tmp_path)), "--table-only")
    assert (tmp_path / "README.md").read_text() == runner.with_name("README.md").read_text()


def test_the_benchmarks_page_is_made_of_its_results(tmp_path: Path, run) -> None:
    copied = shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    (copied / "RESULTS.md").unlink()
    run(copied / "run.py", "--report-only")
    assert (copied / "RESULTS.md").read_text() == (ROOT / "benchmarks/RESULTS.md").read_text()


@pytest.mark.parametrize("suite", ["needle", "recall"])
def test_what_diverged_is_not_asked_further(suite: str) -> None:
    """And is no reason for the table to end."""
    runner = runpy.run_path(str(ROOT / "results" / suite / "run.py"))
    shorter, longer = min(runner["LENGTHS"]), max(runner["LENGTHS"])
    job = {"stage": "test", "model": "a", "name": "a", "kind": "b", "gates": "c", "seed": 0}
    gone = {**job, "length": shorter, "diverged": "the logits are not finite"}
    assert runner["lost"]([gone], {**job, "length": longer})
