"""What a run reports: `metrics.jsonl`, the loggers asked for besides, and a progress bar."""

import importlib.util
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from titans.config import to_dict
from titans.train.checkpoint import METRICS, write_text
from titans.train.config import RunConfig

Row = Mapping[str, int | float]


@runtime_checkable
class Logger(Protocol):
    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """`metrics.jsonl`: one row a step, each step once, also in a run that was killed."""

    def __init__(self, folder: Path, step: int) -> None:
        """Rows after `step`, where the run goes on, are dropped: they will come again."""
        path = folder / METRICS
        rows = [row for row in read_metrics(path) if row["step"] <= step] if path.exists() else []
        self.last: dict[str, int | float] = rows[-1] if rows else {}
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        self.last = dict(row)
        self._stream.write(json.dumps(self.last, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: str | Path) -> list[dict[str, int | float]]:
    """The rows of a `metrics.jsonl`; a last line that a kill cut short is passed over.

    Raises ValueError of one line for a file that is missing or damaged.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: damaged (not a row of metrics)") from None
        rows.append(row)
    return rows


def training_seconds(rows: Sequence[Row], tokens: int) -> float:
    """Time in the steps of a log, each of `tokens` tokens. A step of more than ten times their
    median was held up (a paused process, a sleeping machine), and counts as the median."""
    if not rows:
        return 0.0
    seconds = [tokens / row["tokens_per_s"] for row in rows]
    usual = median(seconds)
    return sum(usual if s > 10 * usual else s for s in seconds)


def require_loggers(names: Sequence[str]) -> None:
    """ImportError naming the extra, before anything is written, where one is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"train.log = {name} needs `pip install -e '.[log]'`")


class TensorBoardLogger:
    """Scalars in the run's folder `tensorboard`."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: Row) -> None:
        for key, value in row.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A run of the project `titans`; a resumed run goes on in the same one."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        import wandb

        name, kept = folder.resolve().name, folder / "wandb-id"
        if not kept.exists():
            write_text(kept, f"{name}-{secrets.token_hex(4)}\n")
        self._run: Any = wandb.init(
            project="titans",
            name=name,
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=to_dict(config),
        )

    def write(self, row: Row) -> None:
        self._run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


class ProgressBar:
    """Steps, loss, tokens per second and time left, on stderr."""

    def __init__(self, steps: int, step: int, enabled: bool) -> None:
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._bar.add_task("", total=steps, completed=step)
        self._bar.start()

    def write(self, row: Row) -> None:
        text = f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s"
        self._bar.update(self._task, completed=int(row["step"]), description=text)

    def close(self) -> None:
        self._bar.stop()


def open_loggers(config: RunConfig, folder: Path, step: int, progress: bool) -> Iterator[Logger]:
    """What a run writes to besides `metrics.jsonl`; close each."""
    for name in config.train.log:
        if name == "tensorboard":
            yield TensorBoardLogger(folder, step)
        else:
            yield WandbLogger(folder, config)
    yield ProgressBar(config.train.steps, step, progress)
