"""Long-term forecasting: how far off are H steps, of every channel, from every test window?

The memory, the same backbone with attention in its place, and DLinear, in one run. Errors are over
all windows, channels and steps of the test part, on standardised values, as the field reports
them, and no window is dropped. The memory begins every window at M_0. Training, early stopping and
tuning see the training and validation parts alone.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.config import check_fields, require_positive
from titans.data.documents import expand_paths
from titans.data.timeseries import (
    ForecastData,
    MissingRule,
    Split,
    Windows,
    load_forecast_data,
)
from titans.evals.report import Diverged, or_diverged
from titans.models.baselines.dlinear import DLinear
from titans.models.forecaster import Forecaster, ForecasterConfig, Head
from titans.state import NonFiniteError
from titans.train.objective import descend

ForecastModel = Literal["lmm", "attention", "dlinear"]
Loss = Literal["mse", "mae", "huber"]


@dataclass(frozen=True, kw_only=True)
class ForecastTraining:
    """Data, sizes and training, whatever the model and the horizon."""

    data: str
    """A CSV file with a `date` column; plain, .gz or .bz2."""
    lookback: int = 336
    """Steps that a forecast sees."""
    split: Split = "auto"
    """Training, validation and test rows: 12, 4 and 4 months of 30 days (`ett-*`), or 0.7, 0.1 and
    0.2 of all; `auto` goes by the file's name."""
    missing: MissingRule = "auto"
    """Whether a gap marked -9999 counts in mean and deviation, as the field has it (`field`), or
    not (`clean`); `auto` is `field` for files named weather*."""
    seed: int = 0
    """Of the initial weights, the order of the windows and dropout."""
    patch: int = 24
    """Steps in a token (lmm, attention), and the sizes after it."""
    dim: int = 32
    layers: int = 1
    heads: int = 2
    ffn_hidden: int = 64
    dropout: float = 0.5
    head: Head = "last"
    """What the forecast reads: the last token or all; see `ForecasterConfig`."""
    loss: Loss = "mae"
    """What is minimised; `huber` is 0.5 e^2 below an error of 1, and |e| - 0.5 above."""
    learning_rate: float = 1e-3
    """Of the first epoch; falls as half a cosine over `epochs`."""
    weight_decay: float = 0.01
    batch_size: int = 256
    """Pairs (window, channel) in a step, drawn from all of the training part."""
    steps: int = 200
    """At most so many steps make an epoch, the time between two looks at the validation part;
    the next epoch goes on where this one stopped in the order of the pairs."""
    epochs: int = 12
    patience: int = 3
    """Epochs without a lower validation MSE before training ends; the best weights are kept."""
    validation_windows: int = 500
    """At most so many windows, evenly spaced, are looked at after an epoch. The test part is
    always read whole."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "batch_size", "steps", "epochs", "patience", "validation_windows")
        if not self.learning_rate > 0 or self.weight_decay < 0:
            raise ValueError("learning_rate must be positive and weight_decay not negative")


@dataclass(frozen=True, kw_only=True)
class ForecastSettings(ForecastTraining):
    """One model at one horizon."""

    model: ForecastModel = "lmm"
    """See `ForecastConfig.models`."""
    horizon: int = 96
    """Steps to forecast."""


@dataclass(frozen=True, kw_only=True)
class ForecastConfig(ForecastTraining):
    """Models side by side, each trained anew for every horizon."""

    models: tuple[ForecastModel, ...] = ("lmm", "attention", "dlinear")
    """lmm: the memory; attention: the same with attention in its place; dlinear."""
    horizons: tuple[int, ...] = (96,)
    """Steps to forecast; the field has 96, 192, 336 and 720."""
    channels: tuple[str, ...] = ()
    """Drawn in the plot; none named: the first and the last of the file."""
    window: int = 0
    """Which test window is drawn, 0 being the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models or not self.horizons:
            raise ValueError("models and horizons must not be empty")

    def settings(self, model: ForecastModel, horizon: int) -> ForecastSettings:
        """Of one of the runs."""
        shared = {f.name: getattr(self, f.name) for f in fields(ForecastTraining)}
        return ForecastSettings(model=model, horizon=horizon, **shared)


class Errors(NamedTuple):
    """Mean squared and mean absolute error over windows, channels and steps."""

    mse: float
    mae: float


@dataclass(frozen=True, kw_only=True)
class ForecastRun:
    """What a run gave; errors of the test part on standardised values."""

    data: str
    model: ForecastModel
    horizon: int
    lookback: int
    seed: int
    mse: float
    mae: float
    valid_mse: float
    """Of the kept weights, over the windows looked at after each epoch; so valid_mae."""
    valid_mae: float
    windows: int
    """Test windows, each of all channels."""
    parameters: int
    epochs: int
    """Epochs trained; best_epoch, from 1 on, is the one whose weights were kept."""
    best_epoch: int
    train_seconds: float
    test_seconds: float


@dataclass(frozen=True)
class Fitted:
    """A run with the model and the data it was made of."""

    settings: ForecastSettings
    model: nn.Module
    data: ForecastData
    result: ForecastRun


@dataclass(frozen=True, kw_only=True)
class Example:
    """One test window in the file's own units, per channel; forecasts also by model."""

    data: str
    horizon: int
    window: int
    past: dict[str, list[float]]
    truth: dict[str, list[float]]
    forecasts: dict[str, dict[str, list[float]]]


@dataclass(frozen=True, kw_only=True)
class ForecastResult:
    """examples: the window of the plot, one a horizon."""

    config: ForecastConfig
    runs: tuple[ForecastRun, ...]
    examples: tuple[Example, ...]
    diverged: tuple[Diverged, ...]


def forecast(
    config: ForecastConfig, watch: Callable[[ForecastRun | Diverged], object] | None = None
) -> ForecastResult:
    """Train every model on the training part, stop by the validation part, score the test part.

    watch: is told each run as soon as it is there. ValueError, before any training, for data that
    cannot be read or do not fit, for sizes that make no model, and for a window or channel that
    there is not.
    """
    series = [load(config.settings(config.models[0], horizon)) for horizon in config.horizons]
    known = series[0].channels
    channels = list(dict.fromkeys(config.channels or (known[0], known[-1])))
    for data in series:
        chosen_window(data, config.window, channels)
        with torch.device("meta"):
            for model in config.models:
                build(config.settings(model, data.horizon))
    runs, examples, failed = [], [], []
    for horizon, data in zip(config.horizons, series, strict=True):
        shown: list[Example] = []
        for model in config.models:
            settings = config.settings(model, horizon)
            fitted = or_diverged(partial(fit, settings, data), model, settings.seed)
            if isinstance(fitted, Diverged):
                failed.append(fitted)
            else:
                runs.append(fitted.result)
                shown.append(example(fitted, config.window, channels))
            if watch is not None:
                watch(fitted if isinstance(fitted, Diverged) else fitted.result)
        forecasts = {name: values for one in shown for name, values in one.forecasts.items()}
        examples += [replace(one, forecasts=forecasts) for one in shown[:1]]
    return ForecastResult(
        config=config, runs=tuple(runs), examples=tuple(examples), diverged=tuple(failed)
    )


def load(settings: ForecastSettings) -> ForecastData:
    (path,) = expand_paths((settings.data,))
    return load_forecast_data(
        path,
        lookback=settings.lookback,
        horizon=settings.horizon,
        split=settings.split,
        missing=settings.missing,
    )


def fit(settings: ForecastSettings, data: ForecastData | None = None) -> Fitted:
    """One of the runs of `forecast`, with the trained model. data: of `load`, where it is there."""
    data = load(settings) if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return fit_seeded(settings, data)


def fit_seeded(settings: ForecastSettings, data: ForecastData) -> Fitted:
    """`fit` with the random state as its seed says."""
    model = build(settings)
    begin = time.perf_counter()
    history, best = train(model, data, settings)
    trained = time.perf_counter()
    test = data.windows("test")
    errors = evaluate(model, test)
    result = ForecastRun(
        data=data.name,
        model=settings.model,
        horizon=settings.horizon,
        lookback=settings.lookback,
        seed=settings.seed,
        mse=errors.mse,
        mae=errors.mae,
        valid_mse=history[best].mse,
        valid_mae=history[best].mae,
        windows=test.count,
        parameters=sum(p.numel() for p in model.parameters()),
        epochs=len(history),
        best_epoch=best + 1,
        train_seconds=trained - begin,
        test_seconds=time.perf_counter() - trained,
    )
    return Fitted(settings, model, data, result)


@torch.inference_mode()
def example(fitted: Fitted, window: int, channels: Sequence[str]) -> Example:
    """What a trained model forecasts in test window `window`, 0 being the first."""
    data = fitted.data
    chosen, past, future = chosen_window(data, window, channels)
    guess = fitted.model.eval()(past)
    mean, std = (torch.from_numpy(x)[chosen, None] for x in (data.mean, data.std))

    def recorded(x: Tensor) -> dict[str, list[float]]:
        return dict(zip(channels, (x.double() * std + mean).tolist(), strict=True))

    return Example(
        data=data.name,
        horizon=data.horizon,
        window=window,
        past=recorded(past),
        truth=recorded(future),
        forecasts={fitted.settings.model: recorded(guess)},
    )


def chosen_window(
    data: ForecastData, window: int, channels: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the channels, and past and future of theirs in a test window; ValueError for one
    that there is not."""
    test = data.windows("test")
    if not 0 <= window < test.count:
        raise ValueError(f"window must lie in 0..{test.count - 1}, got {window}")
    for name in channels:
        if name not in data.channels:
            raise ValueError(f"no channel {name!r}; known: {', '.join(data.channels)}")
    chosen = torch.tensor([data.channels.index(name) for name in channels])
    return chosen, *test.pairs(torch.full_like(chosen, window), chosen)


def plot(result: ForecastResult, path: str | Path) -> None:
    """What every model forecasts in the window of the settings, as a PNG."""
    plot_examples(result.examples, path)


def plot_examples(examples: Sequence[Example], path: str | Path) -> None:
    """Forecasts against the truth as a PNG: a row an example, a column a channel."""
    from matplotlib.figure import Figure

    columns = max(len(shown.truth) for shown in examples)
    figure = Figure(figsize=(5 * columns, 2.6 * len(examples)), layout="constrained")
    grid = figure.subplots(len(examples), columns, squeeze=False)
    for axes, shown in zip(grid, examples, strict=True):
        steps = range(1, shown.horizon + 1)
        for axis in axes[len(shown.truth) :]:
            axis.set_axis_off()
        for axis, channel in zip(axes, shown.truth, strict=False):
            past = shown.past[channel][-2 * shown.horizon :]
            axis.plot(range(1 - len(past), 1), past, color="#999", linewidth=0.8)
            axis.plot(steps, shown.truth[channel], color="#333", linewidth=0.8, label="truth")
            for name, forecasts in shown.forecasts.items():
                axis.plot(steps, forecasts[channel], linewidth=1.2, label=name)
            axis.axvline(0.5, color="#bbb", linestyle=":", linewidth=0.8)
            axis.set_title(f"{shown.data}, {channel}, {shown.horizon} steps", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def build(settings: ForecastSettings) -> nn.Module:
    if settings.model == "dlinear":
        return DLinear(settings.lookback, settings.horizon)
    shared = {f.name for f in fields(ForecasterConfig)} & {f.name for f in fields(settings)}
    sizes: dict[str, Any] = {name: getattr(settings, name) for name in shared}
    mixer: Literal["memory", "attention"] = "memory" if settings.model == "lmm" else "attention"
    return Forecaster(ForecasterConfig(mixer=mixer, **sizes))


def train(
    model: nn.Module, data: ForecastData, settings: ForecastSettings
) -> tuple[list[Errors], int]:
    """Errors of the validation part after every epoch, and the index of the best one, whose
    weights the model has afterwards."""
    windows, valid = data.windows("train"), data.windows("valid")
    every = -(-valid.count // settings.validation_windows)
    channels = len(data.channels)
    draws = torch.Generator().manual_seed(settings.seed)
    pairs = windows.count * channels
    steps = min(settings.steps, -(-pairs // settings.batch_size))
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    history: list[Errors] = []
    best, kept = 0, dict[str, Tensor]()
    order, used = torch.randperm(pairs, generator=draws), 0
    for epoch in range(settings.epochs):
        model.train()
        for step in range(steps):
            done = (epoch + step / steps) / settings.epochs
            warm = min(1.0, (epoch * steps + step + 1) / 50)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * done))
            if used >= pairs:  # every pair once before any again
                order, used = torch.randperm(pairs, generator=draws), 0
            chosen = order[used : used + settings.batch_size]
            used += settings.batch_size
            past, future = windows.pairs(chosen // channels, chosen % channels)
            loss = loss_of(settings.loss, model(past), future)
            descend(model, optimizer, loss, epoch * steps + step + 1)
        history.append(evaluate(model, valid, every))
        if not math.isfinite(history[-1].mse):
            raise NonFiniteError(f"the validation error is {history[-1].mse}: lower learning_rate")
        if not kept or history[-1].mse < history[best].mse:
            best = epoch
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        elif epoch - best >= settings.patience:
            break
    model.load_state_dict(kept)
    return history, best


def loss_of(name: Loss, guess: Tensor, truth: Tensor) -> Tensor:
    if name == "mse":
        return F.mse_loss(guess, truth)
    return F.l1_loss(guess, truth) if name == "mae" else F.huber_loss(guess, truth)


@torch.inference_mode()
def evaluate(model: nn.Module, windows: Windows, every: int = 1, batch_size: int = 1024) -> Errors:
    """Errors over every `every`-th window, each step that was recorded as heavy as any other."""
    model.eval()
    square = absolute = count = 0.0
    for past, future, known in windows.batches(batch_size, every):
        error = (model(past) - future).double()[known]
        square += error.square().sum().item()
        absolute += error.abs().sum().item()
        count += error.numel()
    if not count:
        raise ValueError("no step of the windows to score was recorded")
    return Errors(square / count, absolute / count)
