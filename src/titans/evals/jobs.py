"""A table of results that is filled job by job, over several sessions if need be."""

import fcntl
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from datetime import date
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from titans.evals.report import machine, write_json

Job = dict[str, Any]
Row = dict[str, Any]


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


def find(rows: Sequence[Row], job: Job) -> Row | None:
    """The row of a job: the one that has all its values."""
    return next((row for row in rows if all(row.get(k) == v for k, v in job.items())), None)


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
    """Within it SIGTERM is a KeyboardInterrupt: workers are not left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_jobs(
    path: Path, jobs: Sequence[Job], function: Callable[[Job], Row], *, workers: int = 1
) -> list[Row]:
    """All rows of `path` after every job that has none there was run.

    A job is a dict of plain values. Its row is the job, what `function` returns, and date and
    machine; it is written as soon as it is there, so that whatever stops this loses only what
    runs. workers: jobs side by side, each in a process of its own, `function` then being
    importable; the threads of each are its own matter. The first job that fails ends it, after
    those that run.
    """
    rows = read_rows(path)
    waiting = [job for job in jobs if find(rows, job) is None]

    def keep(job: Job, result: Row) -> None:
        made = {"date": date.today().isoformat(), "machine": machine()}
        with alone(path.parent):  # another process may have added rows of its own
            rows[:] = [*read_rows(path), result | job | made]
            write_json(path, rows)
        print(f"{len(rows)} rows:", *job.values(), flush=True)

    if workers == 1:
        for job in waiting:
            keep(job, function(job))
        return rows
    # PyTorch's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    with terminated_as_interrupted(), pool:
        running: dict[Future[Row], Job] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    running[pool.submit(function, job)] = job
                done, _ = wait(running, return_when=FIRST_COMPLETED)
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
