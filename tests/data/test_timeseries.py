"""Series: the field's borders and windows, statistics of the training part, gaps, bad files."""

import bz2
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from titans.data.timeseries import load_forecast_data, read_series, split_rows


def write(path: Path, values: np.ndarray, names: str = "a,b") -> Path:
    lines = [f"date,{names}"]
    lines += [f"day {i}," + ",".join(str(x) for x in row) for i, row in enumerate(values)]
    path.write_text("\n".join(lines) + "\n")
    return path


def ramp(rows: int) -> np.ndarray:
    """Value = row number in the first channel, its square in the second."""
    return np.stack([np.arange(rows), np.arange(rows) ** 2], 1).astype(float)


def real(name: str) -> Path:
    root = Path(os.environ.get("TITANS_DATA_DIR", Path(__file__).parents[2] / "../shared/data"))
    path = root / "timeseries" / name
    if not path.exists():
        pytest.skip(f"needs timeseries/{name} of TITANS_DATA_DIR")
    return path


def test_borders_are_the_fields() -> None:
    hours = split_rows("ETTh2", 17420)
    assert hours == {"train": (0, 8640), "valid": (8640, 11520), "test": (11520, 14400)}
    quarters = split_rows("ETTm1", 69680)
    assert quarters == {"train": (0, 34560), "valid": (34560, 46080), "test": (46080, 57600)}
    # 0.7, 0.1, 0.2: the two ends are rounded down, the middle takes the rest.
    weather = split_rows("weather", 52696)
    assert weather == {"train": (0, 36887), "valid": (36887, 42157), "test": (42157, 52696)}
    assert split_rows("ETTh1", 1000, "ratio")["test"] == (800, 1000)
    assert split_rows("mine", 17420, "ett-hour") == hours


def test_windows_of_a_ramp(tmp_path: Path) -> None:
    data = load_forecast_data(write(tmp_path / "x.csv", ramp(100)), lookback=5, horizon=3)
    mean, std = np.arange(70).mean(), np.arange(70).std()
    for part, begin, end in [("train", 5, 70), ("valid", 70, 80), ("test", 80, 100)]:
        windows = data.windows(part)
        assert windows.count == end - begin - 3 + 1
        last = windows.count - 1
        past, future = windows.pairs(torch.tensor([0, last]), torch.tensor([0, 0]))
        rows = past.double().numpy() * std + mean
        # The first window forecasts from the part's first row; its look-back lies before.
        assert rows == pytest.approx(
            np.stack([np.arange(begin - 5, begin), np.arange(end - 8, end - 3)]), abs=1e-4
        )
        rows = future.double().numpy() * std + mean
        assert rows == pytest.approx(
            np.stack([np.arange(begin, begin + 3), np.arange(end - 3, end)]), abs=1e-4
        )
    squares = np.arange(70) ** 2
    past, _ = data.windows("test").pairs(torch.tensor([2]), torch.tensor([1]))
    wanted = (np.arange(77, 82) ** 2 - squares.mean()) / squares.std()
    assert past[0].numpy() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_batches_hold_every_pair_once(tmp_path: Path, size: int) -> None:
    data = load_forecast_data(write(tmp_path / "x.csv", ramp(100)), lookback=5, horizon=3)
    windows = data.windows("test")
    seen = torch.cat([future[:, 0] for _, future, _ in windows.batches(size)])
    assert torch.equal(seen.sort().values, data.values[:, 80:98].flatten().sort().values)
    some = torch.cat([future[:, 0] for _, future, _ in windows.batches(size, every=4)])
    assert torch.equal(some.sort().values, data.values[:, 80:98:4].flatten().sort().values)


def test_the_future_changes_nothing_before_it(tmp_path: Path) -> None:
    values = ramp(100)
    plain = load_forecast_data(write(tmp_path / "x.csv", values), lookback=5, horizon=3)
    values[80:] = 1e6
    other = load_forecast_data(write(tmp_path / "y.csv", values), lookback=5, horizon=3)
    assert np.array_equal(plain.mean, other.mean)
    assert np.array_equal(plain.std, other.std)
    for part in ("train", "valid"):
        for a, b in zip(
            plain.windows(part).batches(50), other.windows(part).batches(50), strict=True
        ):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


def test_gaps(tmp_path: Path) -> None:
    values = ramp(100)
    values[[10, 11, 90], 0] = -9999.0
    text = write(tmp_path / "x.csv", values).read_text()
    path = tmp_path / "gaps.csv"
    path.write_text(text.replace("day 0,0.0", "day 0,").replace("day 1,1.0", "day 1,NaN"))
    series = read_series(path)
    assert np.flatnonzero(series.missing[:, 0]).tolist() == [0, 1, 10, 11, 90]
    filled = series.filled()[:, 0]
    assert filled[[0, 1, 2]].tolist() == [2.0, 2.0, 2.0]
    assert filled[[9, 10, 11, 12, 90]].tolist() == [9.0, 9.0, 9.0, 12.0, 89.0]
    train = values[2:70, 0]  # rows 0 and 1 are empty cells: no number for either rule
    field = load_forecast_data(path, lookback=5, horizon=3, missing="field")
    assert field.mean[0] == pytest.approx(train.mean())
    assert field.std[0] == pytest.approx(train.std())
    assert field.values[0, 11] == pytest.approx((9 - train.mean()) / train.std(), rel=1e-5)
    clean = load_forecast_data(path, lookback=5, horizon=3)  # "auto", for all but the weather
    kept = np.delete(train, [8, 9])
    assert clean.mean[0] == pytest.approx(kept.mean())
    assert clean.std[0] == pytest.approx(kept.std())
    weather = load_forecast_data(path.rename(tmp_path / "weather.csv"), lookback=5, horizon=3)
    assert (weather.mean == field.mean).all()
    scored = torch.cat([known for *_, known in clean.windows("test").batches(7)])
    assert (~scored).sum() == 3  # row 90 of one channel, in each window that forecasts it


def test_encodings_line_ends_and_compression(tmp_path: Path) -> None:
    text = "T (°C),date,OT\r\n" + "".join(f"{i}.5,day,{-i}\r\n" for i in range(60))
    for encoding in ("latin-1", "utf-8", "utf-8-sig"):
        content = text.encode(encoding)
        for name, packed in [
            ("a.csv", content),
            ("a.csv.gz", gzip.compress(content)),
            ("a.csv.bz2", bz2.compress(content)),
        ]:
            (tmp_path / name).write_bytes(packed)
            series = read_series(tmp_path / name)
            assert (series.name, series.channels) == ("a", ("T (°C)", "OT"))
            assert series.recorded[3].tolist() == [3.5, -3.0]


def test_a_constant_channel_stays_finite(tmp_path: Path) -> None:
    values = ramp(100)
    values[:, 1] = 4.0
    data = load_forecast_data(write(tmp_path / "x.csv", values), lookback=5, horizon=3)
    assert (data.values[1] == 0).all()
    values[:, 1] = np.where(np.arange(100) < 90, 0.1, 0.2)  # its deviation is rounding, not 0
    data = load_forecast_data(write(tmp_path / "y.csv", values), lookback=5, horizon=3)
    assert data.values[1].abs().max() < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "expected a header with 'date' and channels, got"),
        ("", "expected a header with 'date'"),
        ("date,a\n", "no rows under the header"),
        (",date,a\n0,x,1\n", "a name of its own for every column"),
        ("date,a,a\nx,1,1\n", "a name of its own for every column"),
        ('date,a\nx,1\nx,"1\n', "x.csv:3: not a line of CSV"),
        ("date,a\nx,1\nx,1,2\n", "x.csv:3: expected 2 cells, got 3"),
        ("date,a\nx,1\nx,one\n", "x.csv:3: could not convert string to float: 'one'"),
        ("date,a\n2020-01-03,1\n2020-01-01,1\n", "x.csv:3: 2020-01-01 00:00:00 stands after 2020"),
        ("date,a\n" + "x,1\n" * 48 + "x,\n" * 12, "there is no value in the test part"),
        ("date,a\nx,inf\n", "x.csv:2: expected finite numbers"),
        ("date,a\n" + "x,-9999\n" * 60, "channel 'a' has no value at all"),
        ("date,a\n" + "x,1\n" * 60, "valid part .6 rows. is too short for look-back 5"),
        ("date,a\n" + "x,\n" * 42 + "x,1\n" * 18, "'a' has no value in the training part"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_forecast_data(path, lookback=5, horizon=7)
    assert "\n" not in str(caught.value)


def test_bad_requests(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ramp(100))
    with pytest.raises(ValueError, match="cannot be read"):
        read_series(tmp_path / "absent.csv")
    (tmp_path / "x.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        read_series(tmp_path / "x.csv.gz")
    with pytest.raises(ValueError, match="needs 14400 rows, got 100"):
        load_forecast_data(path, lookback=5, horizon=3, split="ett-hour")
    with pytest.raises(ValueError, match="lookback and horizon must be at least 1"):
        load_forecast_data(path, lookback=0, horizon=3)


def test_etth1() -> None:
    data = load_forecast_data(real("ETTh1.csv.gz"), lookback=336, horizon=96)
    assert data.channels == ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    counts = [data.windows(part).count for part in ("train", "valid", "test")]
    assert counts == [12 * 30 * 24 - 336 - 95, 4 * 30 * 24 - 95, 4 * 30 * 24 - 95]
    assert data.values[:, : 12 * 30 * 24].mean(1).abs().max() < 1e-5
    assert data.values[:, : 12 * 30 * 24].std(1, correction=0) == pytest.approx(1, abs=1e-4)


def test_weather_has_its_gaps_in_the_training_part() -> None:
    path = real("weather.csv.gz")
    series = read_series(path)
    rows, columns = series.missing.nonzero()
    assert len(rows) == 81
    assert rows.max() < split_rows("weather", 52696)["train"][1]
    names = {series.channels[c].split(" (")[0] for c in columns}
    assert names == {"wv", "max. PAR", "OT"}
    field = load_forecast_data(path, lookback=336, horizon=96)
    clean = load_forecast_data(path, lookback=336, horizon=96, missing="clean")
    ratio = dict(zip(series.channels, field.std / clean.std, strict=True))
    assert ratio["wv (m/s)"] == pytest.approx(31, abs=1)
    assert ratio["OT"] == pytest.approx(21, abs=1)


def test_lines_without_content_and_hours_that_repeat_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("date,a\n2020-10-25 02:30,1\n2020-10-25 02:00,2\n,\n\n2020-10-25 03:00,3\n,\n")
    assert read_series(path).recorded[:, 0].tolist() == [1.0, 2.0, 3.0]
