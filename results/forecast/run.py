"""Long-term forecasting: LMM, the same with attention, and DLinear, beside the paper's rows.

    TITANS_DATA_DIR=... python results/forecast/run.py [--workers 2] [--only ETTh1] [--data FILE]

TITANS_DATA_DIR holds `timeseries/{ETTh1,ETTm1,weather,exchange_rate}.csv[.gz]`; --data adds files
of your own, with the settings of the series they are most like (`settings_of`). A finished
(data, horizon, model, seed) is a row of results.json and is not repeated; delete the row to run
it again. A file of another content than that of the rows of its name is refused.
"""

import dataclasses
import itertools
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from titans.evals.forecast import Example, ForecastSettings, example, fit, plot_examples
from titans.evals.jobs import (
    at_least_one,
    by_name,
    command,
    content_digest,
    data_folder,
    read_rows,
    run_jobs,
    runner_parser,
    split_diverged,
)
from titans.evals.report import markdown_table, origin, write_lines

HERE = Path(__file__).parent
HORIZONS = (96, 192, 336, 720)
MODELS = ("lmm", "attention", "dlinear")
# By validation error of short runs at horizons 96, 336 or 720 (look-backs: of the linear part
# alone); all else is ForecastSettings' default. Series of few windows need a small model and
# frequent looks at the validation part.
SMALL = {"dim": 16, "ffn_hidden": 32, "dropout": 0.5, "steps": 100}
LARGE = {"lookback": 720, "patch": 48, "dim": 32, "ffn_hidden": 64, "dropout": 0.2, "steps": 200}
SERIES: dict[str, dict[str, Any]] = {
    "ETTh1": {"lookback": 336, "patch": 24, **SMALL},
    "ETTm1": LARGE,
    "weather": {**LARGE, "head": "all"},
    "exchange_rate": {"lookback": 96, "patch": 8, **SMALL},
}
OWN = "weather"  # whose settings a file of another name gets
SHARED: dict[str, Any] = {"loss": "mae", "learning_rate": 1e-3, "epochs": 12, "patience": 3}
SHOWN = {"ETTh1": ["HUFL", "OT"], "ETTm1": ["HUFL", "OT"], "weather": ["T (degC)", "rh (%)"]}
SHOWN_DEFAULT, SHOWN_HORIZON, SHOWN_WINDOW = ["OT", "0"], 192, 1000
# Of the paper (table of long-term forecasting): means over the four horizons, MSE and MAE.
PAPER = {
    "LMM": {"ETTh1": (0.420, 0.421), "ETTm1": (0.358, 0.387), "weather": (0.231, 0.265)},
    "iTransformer": {"ETTh1": (0.454, 0.447), "ETTm1": (0.407, 0.410), "weather": (0.258, 0.278)},
    "PatchTST": {"ETTh1": (0.469, 0.454), "ETTm1": (0.387, 0.400), "weather": (0.259, 0.281)},
    "DLinear": {"ETTh1": (0.456, 0.452), "ETTm1": (0.403, 0.407), "weather": (0.265, 0.317)},
}
NAMES = {"lmm": "LMM", "attention": "attention, same backbone", "dlinear": "DLinear"}


def settings_of(name: str) -> dict[str, Any]:
    """ETTh2 has those of ETTh1, ETTm2 those of ETTm1, and what is not known those of `OWN`."""
    return SERIES.get(name) or SERIES.get(name[:4] + "1") or SERIES[OWN]


def run(job: dict[str, Any], paths: dict[str, Path], threads: int) -> dict[str, Any]:
    """Fit and test one forecaster; with some forecasts for the plot."""
    torch.set_num_threads(threads)
    name = job["data"]
    own = job | {"data": str(paths[name])}
    settings = ForecastSettings(**SHARED, **settings_of(name), **own)
    fitted = fit(settings)
    row = dataclasses.asdict(fitted.result) | {
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "data"},
        "threads": threads,
        "sha256": content_digest(paths[name]),
    }
    if job["seed"] == 0 and job["horizon"] == SHOWN_HORIZON:
        known = fitted.data.channels
        channels = [c for c in SHOWN.get(name, SHOWN_DEFAULT) if c in known] or known[:2]
        shown = min(SHOWN_WINDOW, fitted.data.windows("test").count - 1)
        row["example"] = dataclasses.asdict(example(fitted, shown, channels))
    return row | job


def write_page(rows: list[dict[str, Any]]) -> None:
    rows, failed = split_diverged(rows)
    if not rows:
        return
    names = sorted({r["data"] for r in rows}, key=lambda n: ([*SERIES, n].index(n), n))
    minutes = sum(r["train_seconds"] + r["test_seconds"] for r in rows) / 60
    threads = "/".join(str(n) for n in sorted({r["threads"] for r in rows}))
    lookbacks = ", ".join(f"{name} {settings_of(name)['lookback']}" for name in names)
    lines = [
        "# Long-term forecasting",
        "",
        "By `TITANS_DATA_DIR=... python results/forecast/run.py`; "
        f"{origin(rows, f'{threads} thread(s) a run')}; "
        f"{minutes:.0f} minutes of runs in all. Rows: [results.json](results.json).",
        "",
        "MSE and MAE of the test part, over every window, channel and step (no last batch is",
        "dropped), on values standardised by the training part. Splits are the field's: ETT 12,",
        "4 and 4 months of 30 days; the others 0.7, 0.1 and 0.2 of the rows. Validation and test",
        f"windows borrow their look-back from the part before. Look-back: {lookbacks} steps, for",
        "all models. Gaps in weather (-9999, all in the training part) count in the statistics",
        "as the field's loaders have it, so that errors are on its scale, but no model sees them.",
        "",
        "LMM: patches of one channel are the tokens of a neural memory, which begins each window",
        "at its learned M_0; beside it a linear map; instance normalisation around both. The",
        "same backbone with full attention in the memory's place, and DLinear, have the same",
        "batches, loss (MAE), schedule and early stopping by validation MSE. Sizes and look-backs",
        "were chosen by validation error of short runs. Mean over seeds, ± half their range.",
    ]
    lines += ["", "## Means over the four horizons", ""]
    header = ["MSE / MAE", *names]
    table = []
    for model in MODELS:
        cells = [average(rows, name, model) for name in names]
        table.append([f"**{NAMES[model]}** (this run)", *cells])
    for model, values in PAPER.items():
        cells = [" / ".join(f"{x:.3f}" for x in values[n]) if n in values else "" for n in names]
        table.append([f"{model} (the paper's row)", *cells])
    lines += markdown_table(header, table)
    lines += [
        "",
        "The paper's rows are its own numbers, look-back as in its sources (not stated there);",
        "a longer look-back than theirs explains a part of any difference.",
        "",
        "## By horizon",
        "",
    ]
    table = []
    for name in names:
        for horizon in HORIZONS:
            found = [[r for r in rows if matches(r, name, horizon, m)] for m in MODELS]
            if any(found):
                table.append([name, str(horizon), *(cell(group) for group in found)])
    lines += markdown_table(["data", "horizon", *(NAMES[m] for m in MODELS)], table)
    lines += ["", "## Size and time", ""]
    table = []
    for name in names:
        for model in MODELS:
            group = [r for r in rows if r["data"] == name and r["model"] == model]
            if group:
                sizes = [r["parameters"] for r in group]
                seeds = len({r["seed"] for r in group})
                spent = statistics.mean(r["train_seconds"] for r in group)
                test = statistics.mean(r["test_seconds"] for r in group)
                epochs = statistics.mean(r["epochs"] for r in group)
                size = f"{min(sizes):,} to {max(sizes):,}"
                times = [f"{epochs:.1f}", f"{spent:.0f} s", f"{test:.0f} s"]
                table.append([name, NAMES[model], size, str(seeds), *times])
    header = ["data", "model", "parameters", "seeds", "epochs", "training", "test"]
    lines += markdown_table(header, table)
    examples = examples_of(rows)
    if examples:
        plot_examples(examples, HERE / "forecasts.png")
        lines += ["", "![forecasts against the truth](forecasts.png)"]
        lines += [
            "",
            f"Test window {SHOWN_WINDOW} of each file (the last of a shorter one), seed 0: chosen "
            "before any run.",
        ]
    write_lines(HERE / "README.md", [*lines, *failed])


def examples_of(rows: list[dict[str, Any]]) -> list[Example]:
    """One a series, with the forecasts of every model."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "example" in row:
            known = found.setdefault(row["data"], dict(row["example"]))
            known["forecasts"] = known["forecasts"] | row["example"]["forecasts"]
    return [Example(**found[name]) for name in sorted(found)]


def matches(row: dict[str, Any], name: str, horizon: int, model: str) -> bool:
    return (row["data"], row["horizon"], row["model"]) == (name, horizon, model)


def cell(group: list[dict[str, Any]]) -> str:
    """`MSE ± / MAE ±` over seeds."""
    if not group:
        return ""
    return " / ".join(spread([r[error] for r in group]) for error in ("mse", "mae"))


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"


def average(rows: list[dict[str, Any]], name: str, model: str) -> str:
    """Over horizons, of the mean over seeds; only where all four are there."""
    groups = [[r for r in rows if matches(r, name, h, model)] for h in HORIZONS]
    if not all(groups):
        return "" if not any(groups) else "incomplete"
    means = [
        statistics.mean(statistics.mean(r[error] for r in group) for group in groups)
        for error in ("mse", "mae")
    ]
    return " / ".join(f"{x:.3f}" for x in means)


def find(root: Path, name: str) -> Path:
    for suffix in (".csv.gz", ".csv"):
        if (path := root / "timeseries" / (name + suffix)).exists():
            return path
    raise ValueError(f"expected {name}.csv.gz or {name}.csv in {root / 'timeseries'}")


def refuse_others(rows: list[dict[str, Any]], name: str, file: Path) -> None:
    """ValueError for a file whose name has rows of another content."""
    ours = content_digest(file)
    if any(row["data"] == name and row.get("sha256", ours) != ours for row in rows):
        raise ValueError(
            f"{file}: the rows of {name} in results.json are of another content; rename the file"
        )


def main() -> None:
    parser = runner_parser(__doc__)
    parser.add_argument("--only", choices=SERIES, nargs="*", default=list(SERIES))
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="CSV files of your own")
    parser.add_argument("--horizon", type=int, choices=HORIZONS, nargs="+", default=HORIZONS)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--threads", type=at_least_one, default=1, help="of each run")
    options = parser.parse_args()
    path = HERE / "results.json"
    rows = read_rows(path)
    if not options.table_only:
        root = data_folder() if options.only else Path()
        paths = by_name([*options.data, *(find(root, name) for name in options.only)])
        for name, file in paths.items():
            refuse_others(rows, name, file)
        one = partial(run, paths=paths, threads=options.threads)
        for seed, name in itertools.product(options.seeds, paths):
            jobs = [
                {"data": name, "horizon": horizon, "model": model, "seed": seed}
                for horizon in options.horizon
                for model in options.model
            ]
            rows = run_jobs(path, jobs, one, workers=options.workers)
            write_page(rows)
    write_page(rows)


if __name__ == "__main__":
    command(main)
