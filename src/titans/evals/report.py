"""What every results page needs: the machine, a table, a file that is written whole."""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from titans.state import NonFiniteError

T = TypeVar("T")


def machine() -> str:
    """Processor (and GPU, where there is one), cores and torch version, in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


@dataclass(frozen=True, kw_only=True)
class Diverged:
    """A training, or a reading, of a suite that came to no numbers; the others go on without it."""

    model: str
    seed: int
    reason: str


def or_diverged(run: Callable[[], T], model: str, seed: int) -> T | Diverged:
    """What `run` returns, or that it diverged."""
    try:
        return run()
    except NonFiniteError as error:
        return Diverged(model=model, seed=seed, reason=str(error))


def write_json(path: Path, content: Any) -> None:
    """Beside the target, then renamed: a reader finds the old file or the new one. A list of
    rows has one row a line."""
    if isinstance(content, list):
        text = "[\n" + ",\n".join(json.dumps(row) for row in content) + "\n]"
    else:
        text = json.dumps(content, indent=1)
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Beside the target, then renamed."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")  # two runners may write one page
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(path)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def mean_and_range(values: Sequence[float], digits: int = 3) -> str:
    """`0.664 (0.650 to 0.678)`; of one value itself."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def origin(rows: Iterable[Mapping[str, Any]], *notes: str) -> str:
    """Where and when rows came about: `machine; machine; note; date, date`."""
    rows = list(rows)
    # A training may move from one to another, which its row says.
    machines = sorted({one for row in rows for one in row["machine"].split("; ")})
    return "; ".join([*machines, *notes, ", ".join(sorted({row["date"] for row in rows}))])


def percent(row: Mapping[str, Any]) -> str:
    """A score in percent; with its 95 % interval, `low` to `high`, where under 100 were asked."""
    few = f" ({100 * row['low']:.0f}-{100 * row['high']:.0f})" if row["asked"] < 100 else ""
    return f"{100 * row['score']:.0f}{few}"


def wilson(right: float, asked: int) -> tuple[float, float]:
    """95 % confidence interval of a probability of which `right` of `asked` trials came out
    (Wilson, 1927). With partial scores `right` is their sum; the interval then is too wide."""
    z = 1.959964
    share = right / asked
    centre = share + z**2 / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z**2 / (4 * asked**2))
    scale = 1 + z**2 / asked
    # All or none: the bound is exact, and rounding would leave it beside the share itself.
    low = (centre - spread) / scale if right > 0 else 0.0
    high = (centre + spread) / scale if right < asked else 1.0
    return max(low, 0.0), min(high, 1.0)


def recalled(rows: Sequence[Mapping[str, Any]]) -> str:
    """`percent` of rows that have `recall` of `asked` questions, all of them together."""
    asked = sum(row["asked"] for row in rows)
    right = sum(row["recall"] * row["asked"] for row in rows)
    low, high = wilson(right, asked)
    return percent({"score": right / asked, "low": low, "high": high, "asked": asked})


def readable(count: int) -> str:
    """1024 -> 1K, 1048576 -> 1M."""
    for unit, scale in (("M", 2**20), ("K", 2**10)):
        if count >= scale and count % (scale // 4) == 0:
            return f"{count / scale:g}{unit}"
    return f"{count:,}"
