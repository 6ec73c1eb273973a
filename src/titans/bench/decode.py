"""`titans bench decode`: does a token cost more after a million others?

The states have truly read that many tokens: the model streams them before the clock starts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans.bench import rivals
from titans.bench.contest import Row, row
from titans.bench.layer import describe
from titans.bench.measure import MatrixPeak, check_device, interleave
from titans.demo import asset
from titans.generate import decode_one, stream
from titans.models.lm import TitansLM, load
from titans.state import ModelState


@dataclass(frozen=True, kw_only=True)
class DecodeBench:
    """What is decoded, and where."""

    model: Path | None = None
    """A model file; None is the packaged demo model."""
    positions: tuple[int, ...] = (1024, 1048576)
    """Tokens read before, batch 1."""
    batch: int = 8
    """Independent states decoded at once, at the first position; 1 leaves that out."""
    tokens: int = 64
    """Decoded in one timed call."""
    repeats: int = 9
    rivals: bool = True
    rival_limit: int = 16384
    """Tokens that full attention is made to read; its time grows with their square."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_device(self.device)


def bench_decode(
    bench: DecodeBench, watch: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Seconds a token and bytes of state, per position and batch; `watch` hears of progress."""
    model = load(bench.model or asset("demo.safetensors"), bench.device)
    cases: dict[str, tuple[str, TitansLM, ModelState]] = {}
    for position in sorted(bench.positions):
        watch(f"reading {position:,} tokens")
        state = read_tokens(model, position, 1)
        cases[f"titans {position}"] = ("titans", model, state)
    if bench.batch > 1:
        state = read_tokens(model, min(bench.positions), bench.batch)
        cases["titans, batch"] = ("titans", model, state)
    if bench.rivals:
        rival = transformer_like(model).to(bench.device).eval()
        for position in sorted({min(p, bench.rival_limit) for p in bench.positions}):
            watch(f"attention reading {position:,} tokens")
            state = read_tokens(rival, position, 1)
            cases[f"attention {position}"] = ("Transformer++ with cache", rival, state)

    peak = MatrixPeak(bench.device)
    steps: dict[str, Callable[[], object]] = dict(peak.steps)
    for name, (_, reader, state) in cases.items():
        steps[name] = decoder(reader, state, bench.tokens)
    watch("decoding")
    timings = interleave(steps, bench.repeats, device=bench.device)
    rows = []
    for name, (impl, _, state) in cases.items():
        rows.append(decode_row(impl, state, timings[name].median_s / bench.tokens))
        rows[-1]["repeats"] = timings[name].repeats
    result = describe("decode", bench, peak.gflops(timings), rows)
    result["settings"]["model"] = "packaged demo model" if bench.model is None else bench.model.name
    return result


def decode_row(impl: str, state: ModelState, seconds: float) -> Row:
    batch = state.batch_size
    return row(
        impl,
        tokens_per_s_forward=batch / seconds,
        position=state.position,
        batch=batch,
        ms_per_token=1000 * seconds,
        state_bytes=state.nbytes,
    )


def read_tokens(model: TitansLM, length: int, batch: int) -> ModelState:
    """The state after `length` random tokens a row, each of them read."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, 256, (batch, length), generator=generator)
    state: ModelState | None = None
    for reading in stream(model, tokens):
        state = reading.state
    assert state is not None
    assert state.position == length
    return state


def decoder(model: TitansLM, state: ModelState, tokens: int) -> Callable[[], Tensor]:
    """Decode some tokens one at a time, always from the same state."""
    batch = state.batch_size
    device = next(model.parameters()).device
    drawn = torch.randint(0, 256, (tokens, batch), generator=torch.Generator().manual_seed(1)).to(
        device
    )

    def step() -> Tensor:
        at = state
        logits = torch.empty(0)
        for token in drawn:
            logits, at = decode_one(model, token, at)
        return logits

    return step


def transformer_like(model: TitansLM) -> TitansLM:
    """A Transformer++ as large as the model, with random weights: they do not change its speed."""
    config = replace(model.config, variant="transformer")
    size = model.parameter_count
    return rivals.transformer(rivals.match_size(config, size, rivals.transformer))
