"""Forecasting end to end: it learns a season, scores every window, and stops by validation."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import titans.evals.forecast as module
from titans.cli.eval import nothing_but_diverged
from titans.evals.forecast import (
    Errors,
    ForecastConfig,
    ForecastSettings,
    build,
    evaluate,
    example,
    fit,
    forecast,
    loss_of,
    plot,
    plot_examples,
)
from titans.evals.report import markdown_table, write_json
from titans.state import NonFiniteError

SMALL = {
    "lookback": 48,
    "horizon": 12,
    "patch": 12,
    "dim": 16,
    "dropout": 0.1,
    "learning_rate": 3e-3,
    "batch_size": 32,
    "steps": 40,
    "epochs": 3,
    "validation_windows": 50,
}


@pytest.fixture(scope="module")
def seasonal(tmp_path_factory) -> str:
    """Two channels of period 24 in noise, whose level jumps and whose amplitude drifts."""
    generator = np.random.default_rng(0)
    hours = np.arange(1500)
    level = np.cumsum(generator.normal(0, 0.05, (1500, 2)), 0)
    wave = np.stack([np.sin(2 * np.pi * hours / 24), (hours % 24 < 8) * 2.0], 1)
    values = 5 + level + wave + generator.normal(0, 0.1, (1500, 2))
    path = tmp_path_factory.mktemp("series") / "seasonal.csv"
    lines = ["date,a,b", *(f"{h},{x:.5f},{y:.5f}" for h, (x, y) in enumerate(values))]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


class Last(nn.Module):
    """The last value, for all steps."""

    def forward(self, x):
        return x[:, -1:].expand(len(x), 12)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1, keepdim=True).expand(len(x), 12)


@pytest.mark.parametrize("model", ["lmm", "attention", "dlinear"])
def test_it_learns_a_season(seasonal: str, model) -> None:
    fitted = fit(ForecastSettings(data=seasonal, model=model, **SMALL))
    test = fitted.data.windows("test")
    naive = min(evaluate(Last(), test).mse, evaluate(Mean(), test).mse)
    assert fitted.result.mse < 0.4 * naive
    assert fitted.result.windows == 300 - 12 + 1
    assert evaluate(fitted.model, test).mse == pytest.approx(fitted.result.mse, rel=1e-6)


def test_the_memory_itself_learns_it(seasonal: str, monkeypatch) -> None:
    """With the linear path taken away, what is left is the memory and its head."""

    def without_linear(settings):
        model = build(settings)
        model.linear.weight.requires_grad_(False)
        return model

    monkeypatch.setattr(module, "build", without_linear)
    fitted = fit(ForecastSettings(data=seasonal, **SMALL))
    assert (fitted.model.linear.weight == 0).all()
    test = fitted.data.windows("test")
    naive = min(evaluate(Last(), test).mse, evaluate(Mean(), test).mse)
    assert fitted.result.mse < 0.5 * naive


def test_errors_are_over_every_window_whatever_the_batch(seasonal: str) -> None:
    settings = ForecastSettings(
        data=seasonal, model="dlinear", **{**SMALL, "epochs": 1, "steps": 2}
    )
    fitted = fit(settings)
    test = fitted.data.windows("test")
    values = fitted.data.values
    square = absolute = 0.0
    fitted.model.eval()
    with torch.no_grad():
        for begin in range(1200, 1500 - 12 + 1):
            guess = fitted.model(values[:, begin - 48 : begin])
            error = (guess - values[:, begin : begin + 12]).double()
            square += error.square().mean().item()
            absolute += error.abs().mean().item()
    wanted = (square / 289, absolute / 289)
    for size in (1024, 37):
        assert evaluate(fitted.model, test, batch_size=size) == pytest.approx(wanted, rel=1e-5)


def test_what_was_not_recorded_is_not_scored(seasonal: str, tmp_path: Path) -> None:
    """A gap in the test part holds the value before it, which is no truth."""
    lines = Path(seasonal).read_text().splitlines()
    path = tmp_path / "gaps.csv"
    for gap in ("", "-9999"):
        cut = [*lines[:1300], *(f"{line.split(',')[0]},{gap},{gap}" for line in lines[1300:1340])]
        path.write_text("\n".join([*cut, *lines[1340:]]) + "\n")
        settings = ForecastSettings(
            data=str(path), model="dlinear", **{**SMALL, "epochs": 1, "steps": 2}
        )
        fitted = fit(settings)
        total = 0.0
        count = 0
        fitted.model.eval()
        with torch.no_grad():
            for begin in range(1200, 1500 - 12 + 1):
                guess = fitted.model(fitted.data.values[:, begin - 48 : begin])
                for step in range(12):
                    if not 1299 <= begin + step < 1339:  # a header stands before the rows
                        truth = fitted.data.values[:, begin + step]
                        total += (guess[:, step] - truth).double().square().sum().item()
                        count += len(truth)
        wanted = pytest.approx(total / count, rel=1e-5)
        assert evaluate(fitted.model, fitted.data.windows("test")).mse == wanted


def test_a_seed_fixes_a_run(seasonal: str) -> None:
    settings = ForecastSettings(data=seasonal, **{**SMALL, "epochs": 1, "steps": 3})
    first, again = fit(settings).result, fit(settings).result
    assert (first.mse, first.mae) == (again.mse, again.mae)
    assert fit(dataclasses.replace(settings, seed=1)).result.mse != first.mse


def test_the_best_epoch_is_kept_and_patience_ends_training(seasonal: str, monkeypatch) -> None:
    seen, weights = iter([5.0, 3.0, 4.0, 3.5, 1.0]), []

    def scripted(model, windows, every=1, batch_size=1024):
        weights.append(model.trend.weight.clone())
        return Errors(next(seen), 9.0)

    monkeypatch.setattr(module, "evaluate", scripted)
    settings = ForecastSettings(
        data=seasonal, model="dlinear", **{**SMALL, "steps": 2, "epochs": 9, "patience": 2}
    )
    data = module.load_forecast_data(seasonal, lookback=48, horizon=12)
    model = build(settings)
    history, best = module.train(model, data, settings)
    assert ([e.mse for e in history], best) == ([5.0, 3.0, 4.0, 3.5], 1)
    assert torch.equal(model.trend.weight, weights[1])
    assert not torch.equal(model.trend.weight, weights[3])


def test_training_never_sees_the_test_part(seasonal: str, tmp_path: Path) -> None:
    rows = Path(seasonal).read_text().splitlines()
    changed = rows[:1201] + [f"{i},0,0" for i in range(300)]
    other = tmp_path / "seasonal.csv"
    other.write_text("\n".join(changed) + "\n")
    short = {**SMALL, "epochs": 2, "steps": 3}
    first = fit(ForecastSettings(data=seasonal, model="dlinear", **short))
    second = fit(ForecastSettings(data=str(other), model="dlinear", **short))
    assert torch.equal(first.model.trend.weight, second.model.trend.weight)
    assert first.result.valid_mse == second.result.valid_mse
    assert first.result.mse != second.result.mse


def test_losses() -> None:
    guess, truth = torch.tensor([0.0, 0.5, 3.0]), torch.zeros(3)
    assert loss_of("mse", guess, truth).item() == pytest.approx((0.25 + 9) / 3)
    assert loss_of("mae", guess, truth).item() == pytest.approx(3.5 / 3)
    assert loss_of("huber", guess, truth).item() == pytest.approx((0.125 + 2.5) / 3)


def test_an_example_is_the_window_it_names(seasonal: str, tmp_path: Path) -> None:
    fitted = fit(ForecastSettings(data=seasonal, **{**SMALL, "epochs": 1, "steps": 2}))
    shown = example(fitted, window=7, channels=["b"])
    recorded = np.loadtxt(seasonal, delimiter=",", skiprows=1)[:, 2]
    assert shown.past["b"] == pytest.approx(recorded[1159:1207], abs=1e-4)
    assert shown.truth["b"] == pytest.approx(recorded[1207:1219], abs=1e-4)
    with torch.no_grad():
        guess = fitted.model(fitted.data.values[1:2, 1159:1207])[0].numpy()
    wanted = guess * fitted.data.std[1] + fitted.data.mean[1]
    assert shown.forecasts["lmm"]["b"] == pytest.approx(wanted, abs=1e-5)
    plot_examples([shown], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no channel 'c'; known: a, b"):
        example(fitted, window=0, channels=["c"])
    with pytest.raises(ValueError, match=r"window must lie in 0\.\.288, got 289"):
        example(fitted, window=289, channels=["a"])


def test_models_side_by_side(seasonal: str, tmp_path: Path) -> None:
    short = {k: v for k, v in SMALL.items() if k != "horizon"} | {"epochs": 1, "steps": 2}
    config = ForecastConfig(data=seasonal, horizons=(6, 12), window=3, **short)
    told = []
    result = forecast(config, watch=told.append)
    assert [(r.horizon, r.model) for r in result.runs] == [
        (horizon, model) for horizon in (6, 12) for model in ("lmm", "attention", "dlinear")
    ]
    assert tuple(told) == result.runs
    alone = fit(ForecastSettings(data=seasonal, horizon=12, model="dlinear", **short))
    assert (result.runs[-1].mse, result.runs[-1].mae) == (alone.result.mse, alone.result.mae)
    first, second = result.examples
    assert (first.horizon, second.horizon, second.window) == (6, 12, 3)
    assert set(second.forecasts) == {"lmm", "attention", "dlinear"}
    shown = example(alone, window=3, channels=["a", "b"])
    assert second.forecasts["dlinear"] == shown.forecasts["dlinear"]
    module.plot(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_what_there_is_not_is_refused_before_training(
    seasonal: str, monkeypatch, without_shape_checks
) -> None:
    monkeypatch.setattr(module, "fit", lambda *_: pytest.fail("trained"))
    short = {k: v for k, v in SMALL.items() if k != "horizon"}
    for changes, message in [
        ({"channels": ("a", "c")}, "no channel 'c'; known: a, b"),
        ({"horizons": (12, 48), "window": 280}, r"window must lie in 0\.\.252, got 280"),
        ({"horizons": (12, 720)}, "too short for look-back 48 and horizon 720"),
        ({"models": ("dlinear", "lmm"), "heads": 3}, r"dim \(16\) must be a multiple of heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            forecast(ForecastConfig(data=seasonal, **short, **changes))
    for changes, message in [
        ({"models": ("lmm", "lstm")}, r"unknown models\[1\] 'lstm'; known: lmm, attention"),
        ({"horizons": ()}, "models and horizons must not be empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            ForecastConfig(data=seasonal, **changes)


def test_bad_settings(without_shape_checks) -> None:
    for changes, message in [
        ({"model": "lstm"}, "unknown model 'lstm'; known: lmm, attention"),
        ({"loss": "l3"}, "unknown loss 'l3'; known: mse, mae, huber"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            ForecastSettings(data="x.csv", **changes)


def test_diverging_training_is_named(seasonal: str) -> None:
    settings = ForecastSettings(
        data=seasonal, model="dlinear", **{**SMALL, "learning_rate": 1e30, "loss": "mse"}
    )
    with pytest.raises(NonFiniteError, match="step 2: the loss is not finite"):
        fit(settings)


def test_the_others_go_on_where_one_diverges(seasonal: str, monkeypatch, tmp_path) -> None:
    def fails(settings, data=None):
        if settings.model == "dlinear":
            raise NonFiniteError("step 2: the loss is not finite")
        return fit(settings, data)

    monkeypatch.setattr("titans.evals.forecast.fit", fails)
    before = torch.random.get_rng_state()
    small = {name: value for name, value in SMALL.items() if name != "horizon"}
    config = ForecastConfig(data=seasonal, horizons=(12,), models=("dlinear", "lmm"), **small)
    result = forecast(config)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's draws are its own
    assert [run.model for run in result.runs] == ["lmm"]
    assert [(one.model, one.seed) for one in result.diverged] == [("dlinear", config.seed)]
    plot(result, tmp_path / "f.png")
    alone = forecast(dataclasses.replace(config, models=("dlinear",)))
    assert (alone.runs, alone.examples) == ((), ())
    assert nothing_but_diverged(alone)
    assert not nothing_but_diverged(result)


def test_report_files(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, [1, 2])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    assert json.loads(path.read_text()) == [1, 2]  # the old file is whole
    assert markdown_table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_the_suite_resumes_and_writes_its_page(seasonal: str, tmp_path: Path, monkeypatch) -> None:
    path = Path(__file__).parents[2] / "results" / "forecast" / "run.py"
    spec = importlib.util.spec_from_file_location("forecast_suite", path)
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    small = {k: v for k, v in SMALL.items() if k not in ("horizon", "lookback")}
    small |= {"epochs": 1, "steps": 1}
    for name, value in {
        "HERE": tmp_path,
        "HORIZONS": (6, 12),
        "SHOWN_HORIZON": 12,
        "SHOWN_WINDOW": 3,
        "SHOWN": {"seasonal": ["a", "b"]},
        "SERIES": {"seasonal": {"lookback": 48}},
        "SHARED": small,
        "PAPER": {"LMM": {"seasonal": (0.4, 0.5)}},
    }.items():
        monkeypatch.setattr(suite, name, value)
    (tmp_path / "timeseries").mkdir()
    (tmp_path / "timeseries" / "seasonal.csv").write_text(Path(seasonal).read_text())
    monkeypatch.setenv("TITANS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["run.py", "--seeds", "0", "--horizon", "12"])
    suite.main()
    first = json.loads((tmp_path / "results.json").read_text())
    assert {(r["horizon"], r["model"]) for r in first} == {
        (12, "lmm"),
        (12, "attention"),
        (12, "dlinear"),
    }
    assert "incomplete" in (tmp_path / "README.md").read_text()
    monkeypatch.setattr("sys.argv", ["run.py"])
    calls = []
    monkeypatch.setattr(suite, "fit", lambda settings: calls.append(settings) or fit(settings))
    suite.main()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(calls) == 9  # three of twelve were there
    own = tmp_path / "mine.csv"
    own.write_text(Path(seasonal).read_text())
    monkeypatch.setattr(suite, "OWN", "seasonal")
    monkeypatch.setattr("sys.argv", ["run.py", "--only", "--data", str(own), "--seeds", "0"])
    suite.main()
    assert len(calls) == 15
    page = (tmp_path / "README.md").read_text()
    assert "| mine | 12 |" in page
    assert page.index("| seasonal | 12 |") < page.index("| mine | 12 |")
    assert all(row in rows for row in first)
    page = (tmp_path / "README.md").read_text()
    lmm = [r for r in rows if r["model"] == "lmm"]
    mean = sum(r["mse"] for r in lmm) / 4
    assert f"| **LMM** (this run) | {mean:.3f} / " in page
    assert "| LMM (the paper's row) | 0.400 / 0.500 |" in page
    (shown,) = suite.examples_of(rows)
    assert set(shown.forecasts) == {"lmm", "attention", "dlinear"}
    assert (tmp_path / "forecasts.png").exists()
    own.write_text(Path(seasonal).read_text() + own.read_text().splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match=r"rows of mine in results\.json are of another content"):
        suite.main()
    assert len(calls) == 15
