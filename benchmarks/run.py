"""Every benchmark on this machine, and RESULTS.md from what they wrote: some 25 minutes.

    python benchmarks/run.py [--only NAME ...] [--fresh] [--report-only]

A section is one `titans bench` command; its result goes to results/NAME.json, with the command.
A section whose file is there, from the same command, is not run again unless --fresh is given.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from titans.bench.report import footnote, markdown, settings_lines
from titans.bench.serve import section

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LENGTHS = "1K 2K 4K 8K 16K 32K 64K 128K"

# The result's name, its command after `titans bench`, and what it asks.
SECTIONS = {
    "layer": (
        "layer",
        "The rule alone, the memory layer, and its rivals: 6 heads of 64, expansion 4, momentum.",
    ),
    "layer-length": (
        f"layer --sweep length --lengths {LENGTHS} --heads 2 --chunk-size 64 --limit 30",
        "Time and memory of a training step against the length: 2 heads of 64.",
    ),
    "layer-chunk": ("layer --sweep chunk --limit 60", "Against the chunk size, 4,096 tokens."),
    "layer-depth": ("layer --sweep depth --limit 60", "Against the depth of the memory network."),
    "layer-heads": ("layer --sweep heads --limit 60", "Against the heads, at a width of 384."),
    "model": (
        "model --lengths 4K 32K --dim 192 --heads 3 --limit 60",
        "Whole models with the parameters of the Transformer++; a training step is forward and "
        "backward of the loss. A memory's share is that of its layers in the step.",
    ),
    "decode": (
        "decode --position 1K 1M",
        "One token after many others, truly read; the states of ours do not grow.",
    ),
    "stream": ("stream --length 2M", "Two million tokens of Python source, constant memory."),
    "memory": (
        "memory",
        "A text with facts in it, read once and asked many times, against reading it again for "
        "every question. It is a novel where `TITANS_DATA_DIR` has books, else Python source.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--fresh", action="store_true", help="run sections again")
    parser.add_argument("--report-only", action="store_true", help="only write RESULTS.md")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if not options.report_only:
        for name in options.only:
            run(name, options.out, options.fresh)
    results = {n: r for n in SECTIONS if (r := read(options.out / f"{n}.json")) is not None}
    report = (
        options.out.parent / "RESULTS.md" if options.out == RESULTS else options.out / "RESULTS.md"
    )
    report.write_text(write_report(results, options.out, report.parent))
    print(report)


def run(name: str, out: Path, fresh: bool) -> None:
    """One section, unless its result is there."""
    command = shlex.split(f"titans bench {SECTIONS[name][0]}")
    target = out / f"{name}.json"
    done = read(target)
    if done is not None and done["command"] == shlex.join(command) and not fresh:
        print(f"{name}: kept")
        return
    print(f"{name}: {shlex.join(command)}", flush=True)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, "-m", "titans.cli", *command[1:], "--out", folder]
        subprocess.run(arguments, check=True)
        result = json.loads((Path(folder) / f"{name}.json").read_text())
        result["command"] = shlex.join(command)
        result["seconds"] = round(time.perf_counter() - begin)
        out.mkdir(parents=True, exist_ok=True)
        picture = Path(folder) / f"{name}.png"
        if picture.exists():
            replace(out / picture.name, picture.read_bytes())
        replace(target, (json.dumps(result, indent=1) + "\n").encode())


def replace(target: Path, content: bytes) -> None:
    """Atomically, so that a result is whole or absent."""
    partial = target.with_name(target.name + ".part")
    partial.write_bytes(content)
    os.replace(partial, target)


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def write_report(results: dict[str, dict[str, Any]], out: Path, base: Path) -> str:
    """RESULTS.md: the figures asked for, then a table, a plot and the settings per section."""
    parts = [
        "# Benchmarks\n",
        "Written by `python benchmarks/run.py` from the files in `results/`; not edited by hand. "
        "In a section all implementations ran in one process, interleaved; numbers are medians. "
        "`of peak` is useful matrix work (`titans.bench.flops`) over the matrix product speed "
        "measured in the same rounds. Memory is that of one training step beyond weights and "
        "inputs, each in a fresh process.\n",
        headline(results),
    ]
    missing = [command for name, (command, _) in SECTIONS.items() if name not in results]
    if missing:
        commands = ", ".join(f"`titans bench {command}`" for command in missing)
        parts.append(f"Not measured yet: {commands}.\n")
    for name, result in results.items():
        parts.append(f"\n## {name}\n\n{SECTIONS[name][1]}\n")
        parts.append(f"    {result['command']}\n")
        parts.append(markdown(result) + "\n")
        parts.append(f"{footnote(result)}; {result['seconds']} s.\n")
        picture = out / f"{name}.png"
        if picture.exists():
            parts.append(f"![{name}]({picture.relative_to(base)})\n")
        settings = settings_lines(result["rows"])
        if settings:
            lines = "\n".join(f"    {line}" for line in settings)
            parts.append(f"<details><summary>Exact settings</summary>\n\n{lines}\n\n</details>\n")
    served = read(out / "serve.json")  # of benchmarks/serve.py
    if served is not None:
        parts.append(section(served))
    return "\n".join(parts)


def headline(results: dict[str, dict[str, Any]]) -> str:
    """The figures that the project set out to reach, each from a section below."""
    rows = []
    if "layer" in results:
        rows += layer_figures(results["layer"])
    if "model" in results:
        rows += model_figures(results["model"])
    if "decode" in results:
        rows += decode_figures(results["decode"])
    if "stream" in results:
        line = results["stream"]["rows"][0]
        read_at = f"{line['tokens_per_s_forward']:,.0f} tokens/s, {line['growth_mb']:.1f} MB grown"
        rows.append((f"stream of {line['length']:,} tokens, constant memory", read_at, "constant"))
    if "memory" in results:
        rows += memory_figures(results["memory"])
    lines = ["| figure | measured | target |", "|---|---|---|"]
    lines += [f"| {name} | {value} | {target} |" for name, value, target in rows]
    return "\n".join(lines) + "\n"


def layer_figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    lines = {line["impl"]: line for line in result["rows"]}
    figures = []
    for chunk in (64, 16):
        line = lines[f"rule, depth 2, chunk {chunk}"]
        shares = (
            f"{percent(line.get('fraction_of_peak_forward'))} / {percent(line['fraction_of_peak'])}"
        )
        figures.append(
            (
                f"MLP memory, C = {chunk}: of matrix peak, forward / + backward",
                shares,
                {64: "60 % / 45 %", 16: "45 % / 35 %"}[chunk],
            )
        )
    ours = lines["layer, depth 2, chunk 64"]
    chunked = lines["titans-pytorch, one gate per 64, batch 64"]
    exact_gates = lines["titans-pytorch, per-token gates, batch 64"]
    speed, memory = "tokens_per_s_train", "peak_mb"
    figures += [
        ("training speed over titans-pytorch, chunk 64", times(ours, chunked, speed), "8x"),
        ("the same, its gates per token", times(ours, exact_gates, speed), "100x"),
        ("peak memory over titans-pytorch's, chunk 64", times(ours, chunked, memory), "0.2x"),
        ("the same, its gates per token", per_token_memory(ours, exact_gates), "0.2x"),
    ]
    linear = lines["rule, exact linear"][speed] * 165 / result["matrix_peak_gflops"]
    name = "exact linear memory, training tokens/s per 165 GFLOP/s of peak"
    return [*figures, (name, f"{linear:,.0f}", "20,000")]


def per_token_memory(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Memory a token over theirs, who may have run at a shorter length: both grow with it."""
    if ours["peak_mb"] is None or theirs["peak_mb"] is None:
        return "-"
    ratio = ours["peak_mb"] / ours["length"] / (theirs["peak_mb"] / theirs["length"])
    lengths = f"per token, at {ours['length']:,} and {theirs['length']:,} tokens"
    return f"{ratio:.3g}x ({lengths})"


def model_figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    figures = []
    targets = {4096: "0.8x", 32768: "4x"}
    for length in result["settings"]["lengths"]:
        at = {line["impl"]: line for line in result["rows"] if line["length"] == length}
        for name in ("lmm", "mac", "mag", "mal", "mag, deep memory"):
            ratio = times(at[name], at["Transformer++"], "tokens_per_s_train")
            title = f"{name}: training speed over Transformer++, {length:,}"
            figures.append((title, ratio, targets.get(length, "-")))
            if at[name].get("memory_share") is not None:
                share = percent(at[name]["memory_share"])
                figures.append((f"{name}: share of its memory layers, {length:,}", share, "-"))
    return figures


def decode_figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    alone = [r for r in result["rows"] if r["impl"] == "titans" and r["batch"] == 1]
    first, last = alone[0], alone[-1]
    latency = last["ms_per_token"] / first["ms_per_token"]
    where = f"position {last['position']:,} over {first['position']:,}"
    sizes = f"{last['state_bytes']:,} / {first['state_bytes']:,}"
    return [
        (f"decode latency at {where}", f"{latency:.3f}x", "1.05x"),
        ("state bytes there", sizes, "equal"),
    ]


def memory_figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    reading, _, from_file, _, again = result["rows"]
    title = f"a question to a memory file instead of to {reading['length']:,} bytes read again"
    return [(title, f"{again['seconds'] / from_file['seconds']:,.0f}x faster", "-")]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def times(ours: dict[str, Any], theirs: dict[str, Any], field: str) -> str:
    if ours[field] is None or theirs[field] is None:
        return ours.get("note") or theirs.get("note") or "-"
    return f"{ours[field] / theirs[field]:.3g}x"


if __name__ == "__main__":
    main()
