"""Results as tables, plots and JSON files. Nothing here measures."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from titans.bench.contest import Row
from titans.evals.report import readable

# Header, field, and how a value is written. A column without a single value is left out.
COLUMNS = (
    ("implementation", "impl", "{}"),
    ("length", "length", "count"),
    ("position", "position", "count"),
    ("batch", "batch", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("forward tok/s", "tokens_per_s_forward", "{:,.0f}"),
    ("train tok/s", "tokens_per_s_train", "{:,.0f}"),
    ("train s", "seconds_train", "range"),
    ("seconds", "seconds", "{:.3g}"),
    ("runs", "repeats", "{}"),
    ("peak MB", "peak_mb", "{:,.0f}"),
    ("of peak, forward", "fraction_of_peak_forward", "percent"),
    ("of peak, train", "fraction_of_peak", "percent"),
    ("memory's share", "memory_share", "percent"),
    ("ms a token", "ms_per_token", "{:.3f}"),
    ("state bytes", "state_bytes", "{:,}"),
    ("growth MB", "growth_mb", "{:.1f}"),
    ("note", "note", "{}"),
)
COLOURS = ("#1f5fa8", "#b4441a", "#2a7d2e", "#7a3f98", "#555", "#c08a00")


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and written rows. Columns that no row fills are left out, and sizes all share."""
    kept = [c for c in COLUMNS if any(line.get(c[1]) not in (None, 0) for line in rows)]
    shared = sizes(rows)
    kept = [c for c in kept if c[1] not in shared]
    return [c[0] for c in kept], [[written(line.get(c[1]), c[2]) for c in kept] for line in rows]


def sizes(rows: Sequence[Row]) -> dict[str, int]:
    """The length, batch and position that all rows have in common."""
    found = {}
    for field in ("length", "batch", "position"):
        values = {line.get(field) for line in rows if line["tokens_per_s_forward"] is not None}
        if len(values) == 1 and None not in values:
            found[field] = int(values.pop() or 0)
    return found


def heading(result: dict[str, Any]) -> str:
    """`titans bench layer, length 4K, batch 1`."""
    shared = (f", {field} {readable(n)}" for field, n in sizes(result["rows"]).items())
    return f"titans bench {result['bench']}{''.join(shared)}"


def written(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if form == "percent":
        return f"{100 * value:.1f} %"
    if form == "count":
        return readable(value)
    if form == "range":
        return f"{value[0]:.3g}-{value[2]:.3g}"
    return form.format(value)


def table(result: dict[str, Any]) -> Table:
    """The result as a table for a terminal."""
    headers, rows = cells(result["rows"])
    view = Table(title=heading(result), caption=footnote(result))
    for index, header in enumerate(headers):
        view.add_column(header, justify="right" if index else "left", no_wrap=index == 0)
    for line in rows:
        view.add_row(*map(Text, line))
    return view


def markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    headers, rows = cells(result["rows"])
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    lines += ["| " + " | ".join(line) + " |" for line in rows]
    return "\n".join(lines)


def footnote(result: dict[str, Any]) -> str:
    """The machine, the matrix peak and the versions, in one line."""
    machine = result["hardware"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    others = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v is not None)
    return (
        f"{where}; matrix peak {result['matrix_peak_gflops']:,.0f} GFLOP/s; "
        f"torch {machine['torch']}{', ' + others if others else ''}; {machine['date']}"
    )


def settings_lines(rows: Sequence[Row]) -> list[str]:
    """`impl: settings`, exactly, once per implementation."""
    seen: dict[str, str] = {}
    for line in rows:
        if line.get("settings"):
            seen.setdefault(line["impl"], json.dumps(line["settings"]))
    return [f"{impl}: {settings}" for impl, settings in seen.items()]


def finite(value: Any) -> Any:
    """With None for every NaN, as a failed step has: JSON has none."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """NAME.json, and NAME.png where there is a curve to draw; the files written."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{result['bench']}.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)
    picture = path.with_suffix(".png")
    if result["bench"] == "stream":
        plot_stream(result, picture)
    elif "x" in result["rows"][0]:
        plot_sweep(result, picture)
    else:
        return [path]
    return [path, picture]


def plot_sweep(result: dict[str, Any], path: Path) -> None:
    """Seconds and megabytes of one training step along the swept axis."""
    from matplotlib.figure import Figure

    axis = result["bench"].partition("-")[2]
    curves: dict[str, list[Row]] = {}
    for line in result["rows"]:
        if line["tokens_per_s_train"] is not None:
            impl = line["impl"] if axis == "length" else "layer"
            curves.setdefault(impl, []).append(line)
    figure = Figure(figsize=(10, 4), layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    for index, (impl, lines) in enumerate(curves.items()):
        x = [line["x"] for line in lines]
        taken = [line["length"] * line["batch"] / line["tokens_per_s_train"] for line in lines]
        colour = COLOURS[index % len(COLOURS)]
        seconds.plot(x, taken, label=impl, color=colour, marker="o", markersize=4)
        if all(line["peak_mb"] is not None for line in lines):
            megabytes = [line["peak_mb"] for line in lines]
            memory.plot(x, megabytes, color=colour, marker="o", markersize=4)
    ticks = sorted({int(line["x"]) for lines in curves.values() for line in lines})
    for panel, label in ((seconds, "seconds"), (memory, "peak MB")):
        panel.set(xscale="log", yscale="log", ylabel=label, xlabel=axis)
        panel.set_xticks(ticks, [readable(v) for v in ticks])
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        panel.spines[["top", "right"]].set_visible(False)
    seconds.legend(frameon=False, fontsize=8)
    figure.suptitle(f"One training step (forward + backward) against {axis}")
    figure.savefig(path, dpi=120)


def plot_stream(result: dict[str, Any], path: Path) -> None:
    """Speed and resident memory along the stream."""
    from matplotlib.figure import Figure

    marks = result["series"]
    figure = Figure(figsize=(9, 5), layout="constrained")
    speed, memory = figure.subplots(2, 1, sharex=True)
    x = [m["tokens"] / 1e6 for m in marks]
    speed.plot(x, [m["tokens_per_s"] for m in marks], color=COLOURS[0])
    speed.set_ylabel("tokens/s")
    memory.plot(x, [m["rss_mb"] for m in marks], color=COLOURS[0], label="resident")
    memory.plot(x, [m["peak_rss_mb"] for m in marks], color=COLOURS[1], label="highest so far")
    memory.set_ylabel("process, MB")
    memory.set_xlabel("million tokens read")
    memory.legend(frameon=False)
    for panel in (speed, memory):
        panel.set_ylim(0, 1.15 * panel.get_ylim()[1])
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
