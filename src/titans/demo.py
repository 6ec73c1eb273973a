"""The main job: read a long text in one stream, then ask for facts hidden in it.

Three readers answer: a model with its memory, the same weights with writing switched off, and
an attention-only model of the same size trained on the same batches. Both checkpoints ship in
`assets/`; configs/demo.toml and configs/demo-attention.toml train them.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from titans.data.carrier import files_text, python_text
from titans.data.facts import STATEMENT_SIZE, Fact
from titans.data.tokenizers import ByteTokenizer, tokenizer_identity, tokenizer_of
from titans.evals.facts import HiddenFacts, ask, hide_facts, read
from titans.evals.report import readable
from titans.fresh import in_fresh_process
from titans.generate import Reading
from titans.inspect.weights import memory_layers
from titans.models.lm import load
from titans.state import ModelState

MEMORY_ON, MEMORY_OFF, ATTENTION = "memory on", "writing switched off", "attention only"
SHORTEST = 1024
STREAMED_TOKENS = 2**19  # by default a reader streams about this many tokens in all


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Recall per reader and distance (fraction of facts), and what reading cost."""

    distances: tuple[int, ...]
    streams: int
    recall: dict[str, list[float]]
    recall_fresh_process: list[float]
    tokens_per_s: dict[str, float]
    state_bytes_first: int
    state_bytes_last: int
    parameters: dict[str, int]
    out: str


def run_demo(
    *,
    length: int,
    out: Path,
    texts: Sequence[str] = (),
    streams: int | None = None,
    seed: int = 0,
    model_path: Path | None = None,
    attention_path: Path | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Read, ask, print, plot, save the memory, and ask again in a fresh process.

    length: the largest distance in tokens (bytes). texts: files to read instead of the
    standard library's sources. Raises ValueError for files that cannot be read.
    """
    import matplotlib  # noqa: F401  (missing? say so before the work, not after it)

    console = console or Console(stderr=True)
    distances = distances_up_to(length)
    if streams is not None and streams < 1:
        raise ValueError(f"streams must be at least 1, got {streams}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    streams = streams or max(1, min(8, STREAMED_TOKENS // distances[-1]))
    carrier = files_text(texts) if texts else python_text(held_out=True)
    haystack = hide_facts(carrier, distances, streams=streams, seed=seed)
    model = load(model_path or asset("demo.safetensors"))
    attention = load(attention_path or asset("demo-attention.safetensors"))
    for reader in (model, attention):
        tokenizer_of(reader, None)  # bytes; ValueError for a model of other tokens
    if not memory_layers(model):
        raise ValueError(f"{model_path}: the model has no memory to look at")

    out.mkdir(parents=True, exist_ok=True)
    curve = Curve()
    recall: dict[str, list[float]] = {}
    speed: dict[str, float] = {}
    readers = ((MEMORY_ON, model, True), (MEMORY_OFF, model, False), (ATTENTION, attention, True))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, reader, write in readers:
            task = progress.add_task(f"reading, {name}", total=haystack.tokens.shape[1])

            def watch(reading: Reading, task: Any = task, name: str = name) -> None:
                progress.advance(task, reading.tokens.shape[1])
                if name == MEMORY_ON:
                    curve.add(reading)

            begin = time.perf_counter()
            state = read(reader, haystack, write=write, watch=watch)
            speed[name] = haystack.tokens.size / (time.perf_counter() - begin)
            recall[name] = ask(reader, state, haystack.facts, write=write).mean(0).tolist()
            if name == MEMORY_ON:
                last = state
                save_memory(out, state, haystack, model_path)
    plot_recall(distances, recall, out / "recall.png")
    curve.plot(haystack, out / "surprise.png")
    return DemoResult(
        distances=distances,
        streams=streams,
        recall=recall,
        recall_fresh_process=ask_in_fresh_process(out),
        tokens_per_s=speed,
        state_bytes_first=model.init_state(streams).nbytes,
        state_bytes_last=last.nbytes,
        parameters={"memory": model.parameter_count, "attention": attention.parameter_count},
        out=str(out),
    )


def distances_up_to(length: int) -> tuple[int, ...]:
    """1K, 4K, 16K, ... and `length` itself."""
    if length < SHORTEST:
        raise ValueError(f"length must be at least {SHORTEST}, got {length}")
    steps = [SHORTEST]
    while steps[-1] * 4 <= length:
        steps.append(steps[-1] * 4)
    if length - steps[-1] > STATEMENT_SIZE:
        steps.append(length)
    return tuple(steps)


def asset(name: str) -> Path:
    """A checkpoint that ships with the package."""
    path = Path(str(files("titans") / "assets" / name))
    if not path.exists():
        raise ValueError(f"{path}: the packaged checkpoint is missing; train it, see configs/")
    return path


def save_memory(out: Path, state: ModelState, haystack: HiddenFacts, model: Path | None) -> None:
    """The memory as a file, and beside it the questions that a fresh process will ask."""
    state.save(out / "demo.memory", {"tokenizer": tokenizer_identity(ByteTokenizer())})
    questions = {
        "model": None if model is None else str(model.resolve()),
        "facts": [[list(fact) for fact in row] for row in haystack.facts],
    }
    (out / "questions.json").write_text(json.dumps(questions))


def ask_saved(out: Path) -> list[float]:
    """Load the memory saved in `out` and ask again: recall per distance."""
    try:
        questions = json.loads((out / "questions.json").read_text())
        facts = [[Fact(*fact) for fact in row] for row in questions["facts"]]
        path = questions["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out}: not a folder written by titans demo ({error})") from None
    model = load(asset("demo.safetensors") if path is None else path)
    return ask(model, ModelState.load(out / "demo.memory"), facts).mean(0).tolist()


def ask_in_fresh_process(out: Path) -> list[float]:
    return json.loads(in_fresh_process("titans.cli", "demo", f"--ask={out}", "--json"))["recall"]


class Curve:
    """What the memory did with the first stream, token by token."""

    def __init__(self) -> None:
        self.surprise: list[np.ndarray] = []
        self.learning_rate: list[np.ndarray] = []

    def add(self, reading: Reading) -> None:
        self.surprise.append(reading.surprise[0].amax(-1).numpy().copy())
        self.learning_rate.append(reading.learning_rate[0].amax(-1).numpy().copy())

    def plot(self, haystack: HiddenFacts, path: Path) -> None:
        """Largest surprise and learning rate over the memories, as maxima of 1,000 bins."""
        from matplotlib.figure import Figure

        surprise, rate = np.concatenate(self.surprise), np.concatenate(self.learning_rate)
        length = len(surprise)
        bins = min(1000, length)
        edges = np.linspace(0, length, bins, endpoint=False).astype(int)
        x = edges / 1000
        figure = Figure(figsize=(9, 5), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        top.plot(x, np.maximum.reduceat(surprise, edges), linewidth=0.8, color="#1f5fa8")
        top.set_ylabel("surprise |error|")
        bottom.plot(x, np.maximum.reduceat(rate, edges), linewidth=0.8, color="#b4441a")
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("thousand tokens read")
        for axis in (top, bottom):
            for index, distance in enumerate(haystack.distances):
                label = "a fact was stated" if index == 0 else None
                at = (length - distance) / 1000
                axis.axvline(at, color="#2a7d2e", alpha=0.5, linestyle="--", label=label)
            axis.spines[["top", "right"]].set_visible(False)
        top.legend(loc="upper left", frameon=False)
        top.set_title("What the memory noticed while reading (first stream, maxima)")
        figure.savefig(path, dpi=120)


def plot_recall(distances: tuple[int, ...], recall: dict[str, list[float]], path: Path) -> None:
    """Recall against distance, one line a reader."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    styles = {MEMORY_ON: ("#1f5fa8", "o"), MEMORY_OFF: ("#b4441a", "s"), ATTENTION: ("#555", "^")}
    for name, values in recall.items():
        colour, marker = styles[name]
        axis.plot(distances, values, color=colour, marker=marker, label=name)
    axis.set_xscale("log", base=4)
    axis.set_xticks(distances, [readable(d) for d in distances])
    axis.set_ylim(-0.04, 1.04)
    axis.set_xlabel("tokens read since the fact was stated")
    axis.set_ylabel("facts recalled")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center left")
    figure.savefig(path, dpi=120)


def table(result: DemoResult) -> Table:
    """Recall against distance."""
    view = Table(title=f"Facts recalled, {result.streams} per distance (chance 0.01 %)")
    view.add_column("reader")
    for distance in result.distances:
        view.add_column(readable(distance), justify="right")
    view.add_column("tokens/s", justify="right")
    for name, values in result.recall.items():
        cells = [f"{100 * value:.0f} %" for value in values]
        view.add_row(name, *cells, f"{result.tokens_per_s[name]:,.0f}")
    cells = [f"{100 * value:.0f} %" for value in result.recall_fresh_process]
    view.add_row("memory from its file", *cells, "")
    return view
