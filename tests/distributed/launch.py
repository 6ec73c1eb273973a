"""Run a function of a test file in several gloo processes.

`launch(function, count, folder)` gives what function(rank, count) returned, by rank. Processes
meet at a file, so that tests need no free port.
"""

import faulthandler
import importlib.util
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


def launch(function: Callable[..., Any], count: int, folder: Path, *arguments: str) -> list[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    source = function.__globals__["__file__"]
    command = [sys.executable, __file__, source, function.__name__, str(folder), str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [folder / f"log-{rank}.txt" for rank in range(count)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*command, str(rank), *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        processes.append(process)
    end = time.monotonic() + LIMIT + 20
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        if any(p.poll() for p in processes):
            break
        time.sleep(0.05)
    for process in processes:
        process.kill()
    codes = [process.wait() for process in processes]
    text = "\n".join(log.read_text()[-4000:] for log in logs)
    assert not any(codes), text
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(count)]


def main() -> None:
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    source, name, folder, count, rank = sys.argv[1:6]
    sys.path.insert(0, str(Path(source).parent))
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=int(count)
    )
    result = getattr(module, name)(int(rank), int(count), *sys.argv[6:])
    torch.save(result, Path(folder) / f"result-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
