"""Run a function of a test file in several gloo processes.

`launch(function, count, folder)` gives what function(rank, count) returned, by rank. Importing
takes longer than most tests: processes stay for the next call, for which they meet anew, at a
file, so that tests need no free port.
"""

import atexit
import faulthandler
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 500  # seconds until a process that waits for another says where, and ends
WORKERS: list[subprocess.Popen[str]] = []


def launch(function: Callable[..., Any], count: int, folder: Path, *arguments: str) -> list[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    results = [folder / f"result-{rank}.pt" for rank in range(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while len(WORKERS) < count:
        command = [sys.executable, __file__]
        WORKERS.append(subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment))
    for rank, worker in enumerate(WORKERS[:count]):
        job = (function.__globals__["__file__"], function.__name__, str(folder), count, rank)
        assert worker.stdin is not None
        worker.stdin.write(json.dumps([*job, *arguments]) + "\n")
        worker.stdin.flush()
    end = time.monotonic() + LIMIT + 20
    while not all(path.exists() for path in results):
        if time.monotonic() > end or any(worker.poll() is not None for worker in WORKERS):
            end_workers()
            logs = sorted(folder.glob("log-*.txt"))
            raise AssertionError("\n".join(log.read_text()[-4000:] for log in logs))
        time.sleep(0.02)
    return [torch.load(path, weights_only=False) for path in results]


@atexit.register
def end_workers() -> None:
    for worker in WORKERS:
        worker.kill()
        worker.communicate()
    WORKERS.clear()


def work(source: str, name: str, folder: str, count: int, rank: int, *arguments: str) -> None:
    with open(f"{folder}/log-{rank}.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count
    )
    module = importlib.import_module(Path(source).stem)
    result = getattr(module, name)(rank, count, *arguments)
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
    target = Path(folder) / f"result-{rank}.pt"
    torch.save(result, target.with_suffix(".part"))
    target.with_suffix(".part").rename(target)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        work(*json.loads(line))
