"""Multivariate time series from CSV files, and the windows that long-term forecasting cuts.

A file has a header with a column `date` and one number per channel and row; plain, `.gz` or
`.bz2`. Splits, scaling and windows are those of the field's loaders (Informer, Autoformer and
all after them), so that errors can be set beside published ones.

Missing values: an empty cell, NaN, or -9999, with which the Jena weather station marks a gap
(81 cells of its file, all in the training part). What a model sees in a gap, in input and target,
is the last value before it; in validation and test parts no error is counted there. The field's
loaders do not know of gaps: in their statistics -9999 is a number like any other, which makes the
standardised `wv` of that file 31 and `OT` 21 times smaller than they should be. The rule "field"
counts it so, to score on the field's scale; "clean" leaves gaps out of the statistics; the
default, "auto", is "field" for files named `weather*` and "clean" for all others.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from titans.data.documents import AUTO, csv_rows, encoding_of, open_text, plain_name

MISSING_VALUE = -9999.0
Split = Literal["auto", "ett-hour", "ett-minute", "ratio"]
MissingRule = Literal["auto", "field", "clean"]
PartName = Literal["train", "valid", "test"]

_MONTH = 30 * 24  # hours: a month of the ETT split


@dataclass(frozen=True)
class Series:
    """A file as it was recorded: (rows, channels) float64, NaN where a cell was empty."""

    name: str
    channels: tuple[str, ...]
    recorded: np.ndarray

    @property
    def missing(self) -> np.ndarray:
        """(rows, channels) bool: empty, NaN or -9999."""
        return np.isnan(self.recorded) | (self.recorded == MISSING_VALUE)

    def filled(self) -> np.ndarray:
        """Each gap holds the last value before it, or the first one after it at the beginning.

        ValueError for a channel without a single value.
        """
        missing = self.missing
        if missing.all(0).any():
            empty = self.channels[int(missing.all(0).argmax())]
            raise ValueError(f"{self.name}: the channel {empty!r} has no value at all")
        rows = np.arange(len(missing))[:, None]
        last = np.maximum.accumulate(np.where(missing, -1, rows), 0)
        source = np.where(last < 0, (~missing).argmax(0), last)
        return np.take_along_axis(self.recorded, source, 0)


@dataclass(frozen=True)
class Windows:
    """All windows of one part: `count` of them, the first forecasting from row `first`.

    values: (channels, rows) float32, standardised, of the whole series. known: likewise, bool,
    False where a gap was filled.
    """

    values: Tensor
    known: Tensor
    first: int
    count: int
    lookback: int
    horizon: int

    def pairs(
        self, windows: Int[Tensor, " n"], channels: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n lookback"], Float[Tensor, "n horizon"]]:
        """Past and future of window windows[i] in channel channels[i]."""
        size = self.lookback + self.horizon
        cut = self.values.unfold(1, size, 1)  # a view
        both = cut[channels, windows + (self.first - self.lookback)]
        return both[:, : self.lookback], both[:, self.lookback :]

    def batches(self, size: int, every: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Past, future, and which of the future was recorded, of every channel of every
        `every`-th window, `size` pairs at a time; none is dropped."""
        channels = self.values.shape[0]
        windows = torch.arange(0, self.count, every)
        recorded = self.known.unfold(1, self.horizon, 1)
        for chosen in torch.arange(len(windows) * channels).split(size):
            window, channel = windows[chosen // channels], chosen % channels
            yield *self.pairs(window, channel), recorded[channel, window + self.first]


@dataclass(frozen=True)
class ForecastData:
    """A standardised series with its three parts.

    values, known: see `Windows`. mean, std: (channels,), of the training part. parts: first and
    last row (exclusive) that each part forecasts; look-backs of the later two reach into the part
    before.
    """

    name: str
    channels: tuple[str, ...]
    values: Tensor
    known: Tensor
    mean: np.ndarray
    std: np.ndarray
    parts: dict[PartName, tuple[int, int]]
    lookback: int
    horizon: int

    def windows(self, part: PartName) -> Windows:
        """The training part has no look-back before it; the other two borrow theirs."""
        begin, end = self.parts[part]
        first = begin + (self.lookback if part == "train" else 0)
        count = end - first - self.horizon + 1
        if count < 1 or first < self.lookback:
            raise ValueError(
                f"{self.name}: the {part} part ({end - begin} rows) is too short for "
                f"look-back {self.lookback} and horizon {self.horizon}"
            )
        return Windows(self.values, self.known, first, count, self.lookback, self.horizon)


def load_forecast_data(
    path: str | Path,
    *,
    lookback: int,
    horizon: int,
    split: Split = "auto",
    missing: MissingRule = "auto",
) -> ForecastData:
    """Read, split and standardise a file; ValueError, in one line, for what does not fit.

    split: "ett-hour" and "ett-minute" are 12, 4 and 4 months of 30 days, rows beyond are left;
    "ratio" is 0.7, 0.1 and 0.2 of the rows; "auto" goes by the file's name (ETTh*, ETTm*, else).
    missing: which statistics gaps have a part in, see the module.
    """
    if lookback < 1 or horizon < 1:
        raise ValueError(f"lookback and horizon must be at least 1, got {lookback} and {horizon}")
    if missing not in get_args(MissingRule):
        raise ValueError(f"missing must be 'auto', 'field' or 'clean', got {missing!r}")
    series = read_series(path)
    if missing == "auto":
        missing = "field" if series.name.lower().startswith("weather") else "clean"
    parts = split_rows(series.name, len(series.recorded), split)
    filled = series.filled()
    train = slice(*parts["train"])
    counted = np.where(series.missing, np.nan, series.recorded)
    if missing == "field":
        counted = series.recorded
    empty = np.isnan(counted[train]).all(0)
    if empty.any():
        name = series.channels[int(empty.argmax())]
        raise ValueError(f"{series.name}: the channel {name!r} has no value in the training part")
    for part in ("valid", "test"):
        if series.missing[slice(*parts[part])].all():
            raise ValueError(f"{series.name}: there is no value in the {part} part")
    mean, std = np.nanmean(counted[train], 0), np.nanstd(counted[train], 0)
    # A constant channel stays as it is; its deviation is not always zero, but rounding.
    std = np.where(std <= 1e-12 * np.abs(mean), 1.0, std)
    values = torch.from_numpy(((filled - mean) / std).T.astype(np.float32))
    known = torch.from_numpy(~series.missing.T).contiguous()
    data = ForecastData(
        series.name,
        series.channels,
        values.contiguous(),
        known,
        mean,
        std,
        parts,
        lookback,
        horizon,
    )
    for part in get_args(PartName):
        data.windows(part)  # raises if a part is too short
    return data


def split_rows(name: str, rows: int, split: Split = "auto") -> dict[PartName, tuple[int, int]]:
    """First and last row (exclusive) of the training, validation and test part."""
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    if split == "auto":
        kinds: dict[str, Split] = {"etth": "ett-hour", "ettm": "ett-minute"}
        split = kinds.get(name[:4].lower(), "ratio")
    if split == "ratio":
        train, test = int(rows * 0.7), int(rows * 0.2)
        borders = (train, rows - test, rows)
    else:
        month = _MONTH * (4 if split == "ett-minute" else 1)
        borders = (12 * month, 16 * month, 20 * month)
        if rows < borders[2]:
            raise ValueError(f"{name}: the split {split!r} needs {borders[2]} rows, got {rows}")
    return {
        "train": (0, borders[0]),
        "valid": (borders[0], borders[1]),
        "test": (borders[1], borders[2]),
    }


def later(latest: datetime | None, written: str, where: str) -> datetime | None:
    """The date of a row, after the `latest` before it; ValueError where it is long before that.

    An hour is written twice when clocks are set back, and some files repeat a few rows.
    """
    try:
        date = datetime.fromisoformat(written.strip()).replace(tzinfo=None)
    except ValueError:
        return latest
    if latest is not None and latest - date > timedelta(days=1):
        raise ValueError(f"{where}: {date} stands after {latest}; expected rows in order of time")
    return date if latest is None else max(latest, date)


def read_series(path: str | Path) -> Series:
    """A CSV file with a `date` column, UTF-8 or else Latin-1, any line ends.

    Raises ValueError in one line that names the file, and the line where there is one; also for
    dates (of ISO 8601; others are not looked at) that go back by more than a day. Lines without
    any content are left out.
    """
    path = Path(path)
    with open_text(path, encoding_of(path, AUTO)) as stream:
        lines = csv_rows(StringIO(stream.read(), newline=""), path)
    _, names = next(lines, ("", []))
    header = [name.strip() for name in names]
    if "date" not in header or len(header) < 2:
        raise ValueError(f"{path}: expected a header with 'date' and channels, got {header[:4]}")
    if len(set(header)) < len(header) or "" in header:
        raise ValueError(f"{path}: expected a name of its own for every column, got {header[:8]}")
    date = header.index("date")
    rows = []
    latest: datetime | None = None
    for where, cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise ValueError(f"{where}: expected {len(header)} cells, got {len(cells)}")
        latest = later(latest, cells.pop(date), where)
        try:
            rows.append([float(cell) if cell.strip() else math.nan for cell in cells])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if any(map(math.isinf, rows[-1])):
            raise ValueError(f"{where}: expected finite numbers, got infinity")
    if not rows:
        raise ValueError(f"{path}: no rows under the header")
    del header[date]
    return Series(plain_name(path).removesuffix(".csv"), tuple(header), np.array(rows))
