"""A table of results that is filled job by job, over several sessions if need be."""

import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import date
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from titans.data.documents import open_bytes, plain_name
from titans.evals.report import machine, write_json
from titans.heap import keep_freed
from titans.state import NonFiniteError
from titans.train.checkpoint import MODEL, finished
from titans.train.config import RunConfig
from titans.train.loop import train
from titans.train.metrics import read_metrics

Job = dict[str, Any]
Row = dict[str, Any]
POLL_S = 1.0  # how often to look whether another process has finished its job


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; none if there is no file. ValueError if it is not one."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("not a list of rows")
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ValueError(f"{path}: not a results file ({error})") from None
    return rows


def digest(paths: Iterable[Path], *settings: object) -> str:
    """Eight letters that are others where a file has another content, or a setting changes."""
    found = hashlib.sha256(repr(settings).encode())
    for path in paths:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:8]


def content_digest(path: Path) -> str:
    """16 letters of the SHA-256 of what is in a file once it is decompressed."""
    found = hashlib.sha256()
    with open_bytes(path) as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()[:16]


def data_folder() -> Path:
    """The folder that TITANS_DATA_DIR points to; ValueError without it."""
    try:
        return Path(os.environ["TITANS_DATA_DIR"]).resolve()
    except KeyError:
        raise ValueError("TITANS_DATA_DIR is not set: expected the folder of the data") from None


def command(main: Callable[[], None]) -> None:
    """Run a runner's `main`: bad input is one line on stderr and exit code 2."""
    keep_freed()
    try:
        main()
    except (ValueError, ImportError, OSError) as error:
        print(f"{sys.argv[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenProcessPool:
        print(
            f"{sys.argv[0]}: a worker was killed (out of memory?); the same command goes on",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


def runner_parser(text: str, runs: Path | None = None) -> ArgumentParser:
    """The options that all runners have: --workers, --table-only and, where it keeps trainings in
    a folder, --runs. text: the runner's docstring."""
    parser = ArgumentParser(description=text, formatter_class=RawDescriptionHelpFormatter)
    if runs is not None:
        parser.add_argument(
            "--runs",
            type=Path,
            default=runs,
            help="folder of trainings [runs/ in the project's folder]",
        )
    parser.add_argument("--workers", type=at_least_one, default=1, help="processes side by side")
    parser.add_argument("--table-only", action="store_true", help="from the finished rows")
    return parser


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """Every path under its name, a file's without its suffixes (`ETTh1` for `ETTh1.csv.gz`);
    ValueError where two share one, as GUE's mouse/0 and tf/0 do."""
    named: dict[str, Path] = {}
    for path in paths:
        path = path.absolute()  # a link keeps its own name
        name = path.name if path.is_dir() else Path(plain_name(path)).stem
        if name in named:
            raise ValueError(
                f"{path} and {named[name]} have one name, {name!r}: link or rename one"
            )
        named[name] = path
    return named


def find(rows: Sequence[Row], job: Job) -> Row | None:
    """The row of a job: the one that has all its values."""
    return next((row for row in rows if all(row.get(k) == v for k, v in job.items())), None)


def kept(weights: Path, model: str) -> Path:
    """The weights behind the rows of a model. ValueError where they are gone: those of another
    training, on another machine, would make one row of two models."""
    if not weights.exists():
        raise ValueError(
            f"{weights}: the weights behind the rows of {model} are not here; bring them, or "
            "delete its rows from results.json to train it again"
        )
    return weights


def train_in_turn(configs: Mapping[str, RunConfig], folder: Path) -> tuple[Path, list[list[Row]]]:
    """Runs of one model, each from the weights of the one before, by the name of its folder; or
    what is left of them. The last weights, and the metrics of each run.

    KeyboardInterrupt where a signal stopped one: the same call goes on.
    """
    start: Path | None = None
    logged = []
    for name, config in configs.items():
        options = replace(config.train, initial_model=None if start is None else str(start))
        config = replace(config, train=options)
        # Without opening its data, which takes minutes where there is much.
        checkpoint = finished(folder / name, config)
        if checkpoint is None:
            done = train(config, folder / name, progress=False)
            if not done.finished:
                raise KeyboardInterrupt
            checkpoint = done.checkpoint
        start = checkpoint / MODEL
        logged.append(read_metrics(folder / name / "metrics.jsonl"))
    if start is None:
        raise ValueError("expected at least one run")
    return start, logged


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # and with it the lock


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within it SIGTERM is a KeyboardInterrupt: neither workers nor unsaved states are left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Claims:
    """Which jobs of a table are being run, by any process of this machine.

    A job is a byte of a file, locked while it runs: a process that is killed lets go of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.file = os.open(folder / ".running", os.O_RDWR | os.O_CREAT)

    def close(self) -> None:
        os.close(self.file)

    def take(self, job: Job) -> bool:
        """Is it ours now? Not while another process has it."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._position(job))
        except BlockingIOError:
            return False
        return True

    def drop(self, job: Job) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, self._position(job))

    @staticmethod
    def _position(job: Job) -> int:
        return int(hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:12], 16)


def attempt(function: Callable[[Job], Row], job: Job) -> Row:
    """The row of a job. A training that diverged is a finding, not the end of the table."""
    try:
        return function(job)
    except NonFiniteError as error:
        return {"diverged": str(error)}


def diverged(rows: Sequence[Row], job: Job) -> bool:
    """Did it diverge? Of such a training there is nothing to ask."""
    row = find(rows, job)
    return row is not None and "diverged" in row


def split_diverged(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows that have results, and a Markdown list of the others (nothing if there are none)."""
    lines = []
    for row in rows:
        if "diverged" in row:
            named = (v for k, v in row.items() if k not in ("diverged", "date", "machine"))
            lines.append(f"- {', '.join(map(str, named))}: diverged ({row['diverged']})")
    return [row for row in rows if "diverged" not in row], ["", *lines] if lines else []


def run_jobs(
    path: Path, jobs: Sequence[Job], function: Callable[[Job], Row], *, workers: int = 1
) -> list[Row]:
    """All rows of `path` after every job that has none there was run.

    A job is a dict of plain values. Its row is the job, what `function` returns, and date and
    machine; it is written as soon as it is there, so that whatever stops this loses only what
    runs. A job that raises NonFiniteError has a row that says so under `diverged`; the first
    that fails in another way ends it, after those that run. workers: jobs side by side, each in a
    process of its own, `function` then being importable; the threads of each are its own matter.
    Two processes at one table share its jobs: each waits for those that the other has begun.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    with closing(Claims(path.parent)) as claims:
        return fill(path, jobs, function, workers, claims)


def fill(
    path: Path,
    jobs: Sequence[Job],
    function: Callable[[Job], Row],
    workers: int,
    claims: Claims,
) -> list[Row]:
    """`run_jobs`, with the claims it makes."""
    rows = read_rows(path)
    waiting: list[Job] = []
    for wanted in jobs:
        if wanted not in waiting and find(rows, wanted) is None:
            waiting.append(wanted)

    def keep(job: Job, result: Row) -> None:
        made = {"date": date.today().isoformat(), "machine": machine()}
        with alone(path.parent):  # another process may have added rows of its own
            rows[:] = [*read_rows(path), result | job | made]
            write_json(path, rows)
        claims.drop(job)
        print(f"{len(rows)} rows:", *job.values(), flush=True)

    def next_job() -> Job | None:
        """One that is missing and that nobody runs, taken off the list."""
        rows[:] = read_rows(path)
        waiting[:] = [job for job in waiting if find(rows, job) is None]
        for job in waiting:
            if claims.take(job):
                if find(read_rows(path), job) is None:  # it was not finished just now
                    waiting.remove(job)
                    return job
                claims.drop(job)
        return None

    if workers == 1:
        with terminated_as_interrupted():  # what reads or trains saves its state first
            while waiting:
                if job := next_job():
                    keep(job, attempt(function, job))
                elif waiting:
                    time.sleep(POLL_S)
        return rows
    # PyTorch's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=keep_freed)
    with terminated_as_interrupted(), pool:
        running: dict[Future[Row], Job] = {}
        try:
            while waiting or running:
                while len(running) < workers and (job := next_job()):
                    running[pool.submit(attempt, function, job)] = job
                if not running:
                    time.sleep(POLL_S)
                    continue
                others = POLL_S if waiting and len(running) < workers else None
                done, _ = wait(running, timeout=others, return_when=FIRST_COMPLETED)
                for future in done:
                    keep(running.pop(future), future.result())
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                for process in active_children():  # a training saves its state first
                    process.terminate()
            for future, job in list(running.items()):
                if future.exception() is None:
                    keep(job, future.result())
            raise
    return rows
