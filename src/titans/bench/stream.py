"""`titans bench stream`: a text of millions of tokens through a model, in constant memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titans.bench.contest import Row, row
from titans.bench.layer import describe
from titans.bench.measure import MatrixPeak, check_device, highest_memory, interleave, memory_status
from titans.data.carrier import endless, python_text
from titans.demo import asset
from titans.generate import stream
from titans.models.lm import load


@dataclass(frozen=True, kw_only=True)
class StreamBench:
    """What is read, and how often the clock and the memory are looked at."""

    model: Path | None = None
    """A model file; None is the packaged demo model."""
    length: int = 2097152
    marks: int = 64
    """Measurements on the way."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_device(self.device)


def bench_stream(
    bench: StreamBench, watch: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Speed and resident memory along one stream of Python source code.

    The first row is the whole stream; `series` holds, per mark, the tokens read, the speed
    since the mark before, and the resident set and its high-water mark in 2**20 bytes.
    """
    model = load(bench.model or asset("demo.safetensors"), bench.device)
    text = endless(python_text(held_out=True), bench.length, np.random.default_rng(0))
    every = max(1, bench.length // bench.marks)
    marks: list[dict[str, float]] = []
    begin = time.perf_counter()
    passed, counted, state_bytes = begin, 0, 0
    for reading in stream(model, text):
        tokens = reading.state.position
        state_bytes = reading.state.nbytes
        if tokens >= counted + every or tokens == bench.length:
            now = time.perf_counter()
            marks.append(mark(tokens, (tokens - counted) / (now - passed)))
            watch(f"{tokens:,} tokens read")
            passed, counted = now, tokens
    elapsed = time.perf_counter() - begin
    peak = MatrixPeak(bench.device)
    timings = interleave(peak.steps, 5, device=bench.device)
    line = stream_row(bench.length, elapsed, marks, state_bytes, model.parameter_count)
    result = describe("stream", bench, peak.gflops(timings), [line])
    result["settings"]["model"] = "packaged demo model" if bench.model is None else bench.model.name
    result["series"] = marks
    return result


def mark(tokens: int, speed: float) -> dict[str, float]:
    peak = highest_memory()
    try:
        resident = memory_status("VmRSS")
    except OSError:
        resident = peak
    return {
        "tokens": tokens,
        "tokens_per_s": speed,
        "rss_mb": resident / 2**20,
        "peak_rss_mb": peak / 2**20,
    }


def stream_row(
    length: int, elapsed: float, marks: list[dict[str, float]], state_bytes: int, parameters: int
) -> Row:
    """peak_mb is the whole process; growth_mb what it gained after the first mark."""
    return row(
        "titans",
        tokens_per_s_forward=length / elapsed,
        peak_mb=marks[-1]["peak_rss_mb"],
        length=length,
        parameters=parameters,
        state_bytes=state_bytes,
        growth_mb=marks[-1]["peak_rss_mb"] - marks[0]["peak_rss_mb"],
    )
