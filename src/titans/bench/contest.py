"""Run contestants against each other: one process, in turn, with the matrix peak among them."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from titans.bench.contestants import DTYPES, Contestant, Steps, make_steps
from titans.bench.measure import (
    MatrixPeak,
    Timing,
    available_memory_mb,
    interleave,
    one_line,
    peak_memory_mb,
    release_free_memory,
)
from titans.fresh import FreshProcessError, in_fresh_process

Row = dict[str, Any]
PROBE_TOKENS = 256
MEMORY_MARGIN = 0.8  # of what is available; the estimate may be off


def row(impl: str, **fields: Any) -> Row:
    """A line of a table; the first five fields are in every one, None where they do not apply."""
    return {
        "impl": impl,
        "tokens_per_s_forward": None,
        "tokens_per_s_train": None,
        "peak_mb": None,
        "fraction_of_peak": None,
        **fields,
    }


def contest(
    contestants: Sequence[Contestant],
    *,
    repeats: int,
    limit_s: float = 300.0,
    memory: bool = True,
) -> tuple[float, list[Row]]:
    """(measured matrix peak in GFLOP/s, a row per contestant).

    tokens_per_s_*: from medians over `repeats` interleaved rounds. peak_mb: of one training
    step, above weights and inputs; on a CPU each in a fresh process. fraction_of_peak: useful
    operations of forward + backward per second over the peak; `..._forward` likewise.
    """
    device, dtype = contestants[0].device, contestants[0].dtype
    peak = MatrixPeak(device, DTYPES[dtype])
    built: dict[str, Steps] = {}
    failures: dict[str, str] = {}
    for contestant in contestants:
        try:
            built[contestant.impl] = make_steps(contestant)
        except (ImportError, RuntimeError, ValueError, TypeError) as error:
            failures[contestant.impl] = one_line(error)
    steps: dict[str, Callable[[], object]] = dict(peak.steps)
    for name, made in built.items():
        steps[f"{name}|forward"] = made.forward
        steps[f"{name}|train"] = made.train
    timings = interleave(steps, repeats, limit_s=limit_s, device=device)
    gflops = peak.gflops(timings)
    rows = []
    for c in contestants:
        if c.impl in failures:
            told = {"length": c.length, "batch": c.batch, "settings": c.settings}
            rows.append(row(c.impl, **told, note=failures[c.impl]))
            continue
        pair = (timings[f"{c.impl}|forward"], timings[f"{c.impl}|train"])
        rows.append(result_row(c, built[c.impl], *pair, gflops))
    if memory:
        if not device.startswith("cuda"):  # there the allocator itself counts
            built.clear()
            steps.clear()
            release_free_memory()
        for c, line in zip(contestants, rows, strict=True):
            if line["tokens_per_s_train"] is not None:
                here = built.get(c.impl)
                try:
                    line["peak_mb"] = peak_memory_mb(here.train, device) if here else peak_mb(c)
                except FreshProcessError as error:
                    add_note(line, f"its memory could not be measured: {error}")
    return gflops, rows


def result_row(
    contestant: Contestant, made: Steps, forward: Timing, train: Timing, gflops: float
) -> Row:
    """Medians and their spread as speeds, and how much of the matrix peak is useful work; not of
    products in bf16 where the peak is another precision's."""
    line = row(
        contestant.impl,
        length=contestant.length,
        batch=contestant.batch,
        parameters=made.parameters,
        repeats=train.repeats,
        settings=contestant.settings,
    )
    if forward.failure is None:
        line["tokens_per_s_forward"] = contestant.tokens / forward.median_s
    if train.failure is None:
        line["tokens_per_s_train"] = contestant.tokens / train.median_s
        line["seconds_train"] = [train.low_s, train.median_s, train.high_s]
    narrower = contestant.settings.get("precision") == "bf16" and contestant.dtype != "bfloat16"
    if made.flops is not None and not narrower:
        if forward.failure is None:
            line["fraction_of_peak_forward"] = made.flops / forward.median_s / gflops / 1e9
        if train.failure is None:
            line["fraction_of_peak"] = 3 * made.flops / train.median_s / gflops / 1e9
    note = train.failure or forward.failure
    if note is not None:
        line["note"] = note
    return line


def add_note(line: Row, text: str) -> None:
    """Beside what the line says already."""
    line["note"] = "; ".join(filter(None, (line.get("note"), text)))


def peak_mb(contestant: Contestant) -> float:
    """Peak memory of one training step above weights and inputs, in a fresh process.

    FreshProcessError where that fails, or is ended for taking too much.
    """
    request = json.dumps(dataclasses.asdict(contestant))
    return float(in_fresh_process("titans.bench.peak", input=request))


def shortened(contestant: Contestant) -> tuple[Contestant, str | None]:
    """The contestant at a length whose training step fits in memory, and why it is shorter.

    Judged by the peak at a short length, since memory grows with the length; the length is
    halved as often as needed. On a GPU too large a step fails by itself, without harm. What cannot
    be measured stays as it is: its contest says why.
    """
    probe = min(contestant.length, PROBE_TOKENS)
    if contestant.device.startswith("cuda") or probe == contestant.length:
        return contestant, None
    try:
        per_token = peak_mb(replace(contestant, length=probe)) / probe
    except FreshProcessError:
        return contestant, None
    length, room = contestant.length, MEMORY_MARGIN * available_memory_mb()
    while length > probe and per_token * length > room:
        length //= 2
    if length == contestant.length:
        return contestant, None
    needed = per_token * contestant.length / 1024
    reason = f"{contestant.length:,} tokens would need about {needed:.0f} GB"
    return replace(contestant, length=length), reason


def outlook(
    before: Row | None, length: int, *, quadratic: bool, repeats: int, limit_s: float
) -> str | None:
    """Why a contestant should not be run at `length`, judged by its row at a shorter one.

    None if it may. Time grows with the length, or with its square; memory with the length.
    """
    if before is None:
        return None
    if before["tokens_per_s_train"] is None:
        return before["note"]
    ratio = length / before["length"]
    needed = (before["peak_mb"] or 0.0) * ratio
    if needed > MEMORY_MARGIN * available_memory_mb():
        return f"skipped: would need about {needed / 1024:.0f} GB"
    call = before["length"] * before["batch"] / before["tokens_per_s_train"]
    call *= ratio**2 if quadratic else ratio
    if repeats * call > limit_s:
        return f"skipped: one step would take about {call:.0f} s"
    return None


def series(
    lengths: Sequence[int],
    field: Callable[[int], Sequence[Contestant]],
    *,
    repeats: int,
    limit_s: float,
    quadratic: Sequence[str] = (),
    memory: bool = True,
) -> tuple[float, list[Row]]:
    """A contest at every length, shortest first; who would outgrow the machine sits out.

    quadratic: the impl whose time grows with the square of the length.
    """
    peaks: list[float] = []
    rows: list[Row] = []
    last: dict[str, Row] = {}
    for length in sorted(lengths):
        able = []
        for c in field(length):
            reason = outlook(
                last.get(c.impl),
                length,
                quadratic=c.impl in quadratic,
                repeats=repeats,
                limit_s=limit_s,
            )
            if reason is None:
                able.append(c)
            else:
                skipped = row(c.impl, length=length, settings=c.settings, note=reason)
                rows.append(skipped)
                last[c.impl] = skipped
        if able:
            gflops, measured = contest(able, repeats=repeats, limit_s=limit_s, memory=memory)
            peaks.append(gflops)
            rows += measured
            last |= {line["impl"]: line for line in measured}
    return max(peaks), rows
