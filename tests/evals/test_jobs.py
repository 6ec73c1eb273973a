"""A results file is filled job by job, and nothing that is finished is lost or repeated."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest

from titans.config import TitansConfig, load_toml
from titans.evals import jobs
from titans.evals.jobs import (
    by_name,
    command,
    content_digest,
    data_folder,
    digest,
    diverged,
    find,
    kept,
    read_rows,
    run_jobs,
    runner_parser,
    split_diverged,
    train_in_turn,
)
from titans.state import NonFiniteError
from titans.train.config import DataConfig, RunConfig, TrainConfig

JOBS = [{"task": task, "seed": seed} for task in ("a", "b") for seed in (0, 1)]


def twice(job):
    """Importable, so that another process can run it."""
    if job["seed"] == 7:
        raise ValueError("no seven")
    if job["seed"] == 8:
        raise NonFiniteError("step 3: the loss is not finite")
    return {"value": 2 * job["seed"]}


def test_jobs_run_once_and_their_rows_say_when_and_where(tmp_path):
    path, ran = tmp_path / "results.json", []

    def run(job):
        ran.append(job)
        return twice(job)

    run_jobs(path, JOBS[:3], run)
    rows = run_jobs(path, JOBS, run)
    assert ran == JOBS
    assert rows == read_rows(path)
    assert [row["value"] for row in rows] == [0, 2, 0, 2]
    assert all(row["date"] and row["machine"] for row in rows)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_keeps_what_was_finished(tmp_path, workers):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match="no seven"):
        run_jobs(path, [JOBS[0], {"task": "a", "seed": 7}, *JOBS[1:]], twice, workers=workers)
    assert find(read_rows(path), JOBS[0]) is not None
    assert len(run_jobs(path, JOBS, twice, workers=workers)) == len(JOBS)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_training_that_diverged_is_a_row_and_not_the_end(tmp_path, workers):
    jobs = [{"task": "a", "seed": 8}, JOBS[1]]
    rows = run_jobs(tmp_path / "results.json", jobs, twice, workers=workers)
    assert len(rows) == 2
    assert run_jobs(tmp_path / "results.json", jobs, ran_again) == rows
    good, lines = split_diverged(rows)
    assert [row["value"] for row in good] == [2]
    assert lines == ["", "- a, 8: diverged (step 3: the loss is not finite)"]
    assert split_diverged(good) == (good, [])
    assert [diverged(rows, job) for job in (*jobs, JOBS[2])] == [True, False, False]


def ran_again(job):
    raise AssertionError(f"{job} ran again")


def once(job):
    """Importable; notes that it ran, and takes a while."""
    with open(job["note"], "a") as file:
        file.write("x")
    time.sleep(0.3)
    return {"value": 1}


def test_two_processes_share_a_table_and_run_each_job_once(tmp_path):
    code = (
        "import test_jobs, sys; from pathlib import Path; from titans.evals.jobs import run_jobs; "
        f"folder = Path({str(tmp_path)!r}); jobs = [dict(note=str(folder / n)) for n in 'abcdef']; "
        "rows = run_jobs(folder / 'r.json', jobs, test_jobs.once); print(len(rows))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    ran = [run.communicate(timeout=60)[0].decode().splitlines() for run in runs]
    assert [lines[-1] for lines in ran] == ["6", "6"]  # each has waited for the other's rows
    assert [(tmp_path / n).read_text() for n in "abcdef"] == ["x"] * 6
    assert len(read_rows(tmp_path / "r.json")) == 6


def test_two_files_of_one_name_are_refused(tmp_path):
    paths = [tmp_path / "mouse" / "0.csv", tmp_path / "tf" / "1"]
    assert by_name(paths) == {"0": paths[0].absolute(), "1": paths[1].absolute()}
    with pytest.raises(ValueError, match="have one name, '0': link or rename one"):
        by_name([*paths, tmp_path / "tf" / "0"])


def test_a_name_is_without_suffixes_and_a_links_own(tmp_path):
    stored = tmp_path / "9f3ab2"
    stored.write_text("")
    link = tmp_path / "ETTh2.csv.gz"
    link.symlink_to(stored)
    assert by_name([link, tmp_path / "ETTh1.v2.csv"]) == {
        "ETTh2": link,
        "ETTh1.v2": tmp_path / "ETTh1.v2.csv",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_is_named_twice_runs_once(tmp_path, workers):
    job = {"note": str(tmp_path / "note")}
    assert len(run_jobs(tmp_path / "r.json", [job, dict(job)], once, workers=workers)) == 1
    assert (tmp_path / "note").read_text() == "x"


def test_what_a_file_holds_has_one_digest_however_it_is_packed(tmp_path):
    for name, packed in [("a.csv", b"1,2"), ("b.csv.gz", gzip.compress(b"1,2"))]:
        (tmp_path / name).write_bytes(packed)
    (tmp_path / "c.csv").write_bytes(b"1,3")
    a, b, c = (content_digest(tmp_path / name) for name in ("a.csv", "b.csv.gz", "c.csv"))
    assert a == b != c


def test_a_digest_is_another_where_a_file_or_a_setting_is(tmp_path):
    """What is made of them is made again then: another genome under a name that was there."""
    path = tmp_path / "a"
    path.write_bytes(b"ACGT")
    first = digest([path], 4)
    assert first == digest([path], 4)
    assert first != digest([path], 5)
    path.write_bytes(b"ACGA")
    assert first != digest([path], 4)


def test_what_a_runner_needs_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.delenv("TITANS_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="TITANS_DATA_DIR is not set"):
        data_folder()
    monkeypatch.setenv("TITANS_DATA_DIR", str(tmp_path))
    assert data_folder() == tmp_path.resolve()
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run_jobs(tmp_path / "results.json", JOBS, twice, workers=0)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("one\n  line"), 2, "run.py: one line\n"),
        (
            FileNotFoundError(2, "No such file", "x.gz"),
            2,
            "run.py: [Errno 2] No such file: 'x.gz'\n",
        ),
        (
            BrokenProcessPool("gone"),
            2,
            "run.py: a worker was killed (out of memory?); the same command goes on\n",
        ),
        (KeyboardInterrupt(), 130, "run.py: interrupted; the same command goes on\n"),
    ],
)
def test_a_runner_ends_in_a_line(error, code, said, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit) as stop:
        command(main)
    assert (stop.value.code, capsys.readouterr().err) == (code, said)


def test_the_options_of_every_runner(capsys):
    parser = runner_parser("What it measures.\n\n    How it is run", Path("runs/here"))
    options = parser.parse_args(["--workers", "2"])
    assert (options.runs, options.workers, options.table_only) == (Path("runs/here"), 2, False)
    for wrong in ("0", "-1", "two"):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(["--workers", wrong])
        assert f"expected a number of at least 1, got '{wrong}'" in capsys.readouterr().err
    assert "measures.\n\n    How" in parser.format_help()
    assert "--runs" not in runner_parser("It trains nothing.").format_help()


def test_a_row_belongs_to_the_job_with_all_its_values():
    rows = [{"task": "a", "seed": 0, "value": 1}]
    assert find(rows, {"task": "a"}) is rows[0]
    assert find(rows, {"task": "a", "seed": 1}) is None


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "results.json"
    for content in ("{}", "[1]", "[{"):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a results file"):
            run_jobs(path, JOBS, twice)
        assert path.read_text() == content
    path.write_text(json.dumps([JOBS[0] | {"value": 0}]))
    assert run_jobs(path, JOBS[:1], twice)[0]["value"] == 0


def sleep(job):
    """Importable, and longer than the test."""
    Path(job["note"]).write_text(str(os.getpid()))
    time.sleep(300)


def test_a_terminated_run_of_one_worker_is_interrupted(tmp_path):
    """So that what it runs can save its state."""

    def stopped(job):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(tmp_path / "r.json", [{"n": 1}], stopped)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_terminated_run_leaves_no_worker_behind(tmp_path):
    code = (
        "import test_jobs, sys; from pathlib import Path; from titans.evals.jobs import run_jobs; "
        f"run_jobs(Path({str(tmp_path)!r}) / 'r.json', [dict(note={str(tmp_path / 'a')!r}), "
        f"dict(note={str(tmp_path / 'b')!r})], test_jobs.sleep, workers=2)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    notes = [tmp_path / "a", tmp_path / "b"]
    while not all(note.exists() and note.read_text() for note in notes):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    for note in notes:
        with pytest.raises(ProcessLookupError):
            os.kill(int(note.read_text()), 0)


def test_rows_are_not_continued_with_the_weights_of_another_training(tmp_path):
    path = tmp_path / "lmm.safetensors"
    with pytest.raises(ValueError, match="behind the rows of LMM are not here"):
        kept(path, "LMM")
    path.touch()
    assert kept(path, "LMM") == path


def test_runs_in_turn_go_on_from_the_weights_of_the_one_before(tmp_path, monkeypatch):
    text, runs = tmp_path / "text.txt", tmp_path / "runs"
    text.write_text("it was the best of times, it was the worst of times. " * 10)
    configs = {
        name: RunConfig(
            model=TitansConfig(variant="lmm", dim=16, layers=1, heads=1, ffn_hidden=16),
            data=DataConfig(paths=(str(text),), length=16),
            train=TrainConfig(steps=2, tokens_per_batch=32, eval_every=0, seed=seed, threads=1),
        )
        for seed, name in enumerate(("one", "two"))
    }
    weights, logged = train_in_turn(configs, runs)
    saved = "checkpoints/step-000002/model.safetensors"
    assert weights == runs / "two" / saved
    assert [len(run) for run in logged] == [2, 2]
    second = load_toml(runs / "two/config.toml", RunConfig).train
    assert (second.initial_model, second.seed) == (str(runs / "one" / saved), 1)
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    text.unlink()  # what has been trained needs no data
    assert train_in_turn(configs, runs) == (weights, logged)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    monkeypatch.setattr(jobs, "train", lambda *_, **__: SimpleNamespace(finished=False))
    with pytest.raises(KeyboardInterrupt):
        train_in_turn(configs, tmp_path / "others")
