"""Times, memory and the machine: what every number of a benchmark is made of."""

import contextlib
import ctypes
import gc
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

# (batch, size) of the products whose best speed is the machine's: square, and batched.
CPU_PRODUCTS = ((1, 1024), (1, 2048), (64, 256))
CUDA_PRODUCTS = ((1, 4096), (1, 8192), (64, 1024))
LONG_CALL_S = 10.0  # a first call this long has warmed nothing that matters


class Timing(NamedTuple):
    """Seconds of one call: median, fastest and slowest of `repeats`; or why there is none."""

    median_s: float
    low_s: float
    high_s: float
    repeats: int
    failure: str | None = None


def interleave(
    steps: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    limit_s: float = 300.0,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time all steps in turn, round after round, so that noise and warmth are shared.

    Every step is called once before, to warm up (on a GPU twice: the first call may compile);
    if that took over LONG_CALL_S it counts as a measurement. A step that would spend more than
    limit_s takes part in fewer rounds, at least one. A step that raises gets a Timing that says
    so, and the others go on.
    """
    with garbage_frozen():
        times, failures = take_turns(steps, repeats, limit_s, device)
    nan = float("nan")
    return {
        name: Timing(nan, nan, nan, 0, failures[name])
        if name in failures
        else Timing(
            statistics.median(times[name]), min(times[name]), max(times[name]), len(times[name])
        )
        for name in steps
    }


def take_turns(
    steps: Mapping[str, Callable[[], object]], repeats: int, limit_s: float, device: str
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call of `interleave`, and why some steps have none."""
    times: dict[str, list[float]] = {}
    rounds: dict[str, int] = {}
    failures: dict[str, str] = {}
    for name, step in steps.items():
        first = attempt(name, step, device, failures)
        if first is not None and device.startswith("cuda"):
            first = attempt(name, step, device, failures)
        if first is not None:
            times[name] = [first] if first > LONG_CALL_S else []
            rounds[name] = max(1, min(repeats, int(limit_s / max(first, 1e-9))))
    for _ in range(repeats):
        for name, taken in times.items():
            if name not in failures and len(taken) < rounds[name]:
                spent = attempt(name, steps[name], device, failures)
                taken += [] if spent is None else [spent]
    return times, failures


def attempt(
    name: str, step: Callable[[], object], device: str, failures: dict[str, str]
) -> float | None:
    """Seconds of one call; None where it failed, which is then noted under its name."""
    try:
        return seconds(step, device)
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        failures[name] = one_line(error)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return None


@contextlib.contextmanager
def garbage_frozen() -> Iterator[None]:
    """What exists by now is never garbage: collecting between calls looks at new objects only."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def seconds(step: Callable[[], object], device: str) -> float:
    """One call, with nothing left over from the one before."""
    gc.collect()
    synchronise(device)
    begin = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - begin


def check_device(device: str) -> None:
    """ValueError for a device that this machine, or this torch, does not have."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device} is not available: torch sees no CUDA device")


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def one_line(error: BaseException, limit: int = 160) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:limit]


class MatrixPeak:
    """Matrix products, to be timed among the contestants; the best speed is the peak."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        sizes = CUDA_PRODUCTS if device.startswith("cuda") else CPU_PRODUCTS
        self.flops: dict[str, float] = {}
        self.steps: dict[str, Callable[[], object]] = {}
        for batch, size in sizes:
            name = f"matrix {batch}x{size}" if batch > 1 else f"matrix {size}"
            a = torch.randn(batch, size, size, device=device).to(dtype)
            a = a if batch > 1 else a[0]
            self.flops[name] = 2.0 * batch * size**3
            self.steps[name] = lambda a=a: a @ a  # type: ignore[misc]

    def gflops(self, timings: Mapping[str, Timing]) -> float:
        """Largest median speed over the sizes, in 1e9 floating point operations a second."""
        return max(self.flops[name] / timings[name].median_s for name in self.flops) / 1e9


def peak_memory_mb(step: Callable[[], object], device: str) -> float:
    """Most memory that one call holds beyond what was held before it, in 2**20 bytes.

    On a CPU the resident set of this process, so call it in a fresh one: what an allocator has
    kept from earlier work would be reused unseen.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    release_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
        before = memory_status("VmRSS")
        step()
        return max(0, memory_status("VmHWM") - before) / 2**20
    except OSError:  # no such file: compare the process's mark, which only ever grows
        before = highest_memory()
        step()
        return (highest_memory() - before) / 2**20


def release_free_memory() -> None:
    """Give what the allocator keeps for later back to the system, where it knows how."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_status(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its high-water mark) of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def highest_memory() -> int:
    """High-water mark of the resident set, bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory_mb() -> float:
    """Memory that new work may take without swapping, 2**20 bytes; infinite where unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return float("inf")


def hardware(device: str = "cpu") -> dict[str, Any]:
    """What a number was measured on, and with which versions."""
    described: dict[str, Any] = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name()
        described["cuda"] = torch.version.cuda
    return described


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str | None]:
    """Installed versions; None for a package that is not there."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
