"""`titans bench memory`: a text read once and asked many times, against reading it every time."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from titans.bench.contest import Row, row
from titans.bench.layer import describe
from titans.bench.measure import MatrixPeak, Timing, check_device, interleave
from titans.data.carrier import endless, files_text, python_text
from titans.data.facts import DIGITS, STATEMENT_SIZE, Fact
from titans.data.tokenizers import ByteTokenizer, tokenizer_of
from titans.demo import asset
from titans.evals.facts import MARGIN, HiddenFacts, hide_facts
from titans.fresh import in_fresh_process
from titans.generate import Sampling, generate
from titans.inspect import replay
from titans.models.lm import TitansLM, load
from titans.state import ModelState

BOOK = "$TITANS_DATA_DIR/books/austen-emma.txt.gz"
SHORTEST = 1024  # tokens between the last fact and the end
AT_HAND, FROM_FILE = "ask the memory at hand", "load the memory's file, then ask"
COMMAND, AGAIN = "titans memory ask, a process each", "read the text again, then ask"


@dataclass(frozen=True, kw_only=True)
class MemoryBench:
    """What is read and how often it is asked."""

    model: Path | None = None
    """A model file that has learned to keep facts; None is the packaged demo model."""
    text: tuple[str, ...] = ()
    """Files to read. None given: a novel of $TITANS_DATA_DIR where that is set, else sources of
    Python's standard library."""
    length: int = 1048576
    """Bytes to read at most; of Python's sources exactly."""
    facts: int = 8
    """Hidden in the text at even distances, and asked for in turn."""
    repeats: int = 9
    limit_s: float = 120.0
    """Seconds that each way of asking may take in all; beyond, fewer repeats, at least one."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.facts < 1 or self.repeats < 1:
            raise ValueError(
                f"facts and repeats must be at least 1, got {self.facts} and {self.repeats}"
            )


def bench_memory(
    bench: MemoryBench, watch: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Seconds per question of every way to ask, the reading itself, and how many were right.

    ValueError for a model that does not read bytes, and a text too short for the facts.
    """
    model = load(bench.model or asset("demo.safetensors"), bench.device)
    tokenizer_of(model, None)  # the text is read as bytes
    name, haystack = hidden_facts(bench)
    size = haystack.tokens.shape[1]
    watch(f"reading {size:,} bytes of {name}")
    begin = perf_counter()
    state = replay(model, haystack.tokens)
    reading = perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "book.memory"
        state.save(path)
        asked = ways(bench, model, haystack, state, path)
        peak = MatrixPeak(bench.device)
        answers: dict[str, list[bool]] = {way: [] for way in asked}
        steps: dict[str, Callable[[], object]] = dict(peak.steps)
        for way, ask in asked.items():
            steps[way] = asker(ask, haystack.facts[0], answers[way])
        watch("asking")
        timings = interleave(steps, bench.repeats, limit_s=bench.limit_s, device=bench.device)
        rows = [
            row(
                "read the text once",
                length=size,
                seconds=reading,
                repeats=1,
                tokens_per_s_forward=size / reading,
                state_bytes=state.nbytes,
                note=f"a memory file of {path.stat().st_size:,} bytes",
            )
        ]
        rows += [asking_row(way, timings[way], answers[way]) for way in asked]
    result = describe("memory", bench, peak.gflops(timings), rows)
    result["settings"]["text"] = name
    result["settings"]["model"] = "packaged demo model" if bench.model is None else bench.model.name
    return result


def hidden_facts(bench: MemoryBench) -> tuple[str, HiddenFacts]:
    """What is read, in words, and the text with the facts in it."""
    book = Path(os.path.expandvars(BOOK))
    if bench.text:
        name = ", ".join(Path(path).name for path in bench.text)
        text = np.concatenate(files_text(bench.text))[: bench.length]
    elif book.exists():
        name, text = BOOK, np.concatenate(files_text([book]))[: bench.length]
    else:
        name = "Python's standard library"
        text = endless(python_text(held_out=True), bench.length, np.random.default_rng(0))
    # `hide_facts` reads this much more than the largest distance: the whole text.
    longest = len(text) - STATEMENT_SIZE - MARGIN
    if longest < SHORTEST + (bench.facts - 1) * STATEMENT_SIZE:
        raise ValueError(f"{name}: {len(text)} bytes are too few to hide {bench.facts} facts in")
    distances = np.linspace(SHORTEST, longest, bench.facts).astype(int).tolist()
    return name, hide_facts([text], distances, streams=1, seed=0)


Ask = Callable[[Fact], str]


def ways(
    bench: MemoryBench, model: TitansLM, haystack: HiddenFacts, state: ModelState, path: Path
) -> dict[str, Ask]:
    """How to get an answer, cheapest first."""

    def answer(fact: Fact, memory: ModelState) -> str:
        greedy = Sampling(temperature=0.0)
        new = generate(model, [list(fact.question)], DIGITS, sampling=greedy, state=memory)
        return ByteTokenizer().decode(new.tokens[0])

    def command(fact: Fact) -> str:
        name = "demo" if bench.model is None else str(bench.model)
        ask = ["memory", "ask", name, str(path), fact.question.decode(), "--json"]
        how = [f"--max-tokens={DIGITS}", "--temperature=0"]
        return json.loads(in_fresh_process("titans.cli", *ask, *how))["answers"][0]["text"]

    return {
        AT_HAND: lambda fact: answer(fact, state),
        FROM_FILE: lambda fact: answer(fact, ModelState.load(path, bench.device)),
        COMMAND: command,
        AGAIN: lambda fact: answer(fact, replay(model, haystack.tokens)),
    }


def asker(ask: Ask, facts: list[Fact], right: list[bool]) -> Callable[[], None]:
    """One question a call, the facts in turn; `right` grows by how each was answered."""
    turn: Iterator[Fact] = cycle(facts)

    def step() -> None:
        fact = next(turn)
        right.append(ask(fact) == fact.value)

    return step


def asking_row(way: str, timing: Timing, right: list[bool]) -> Row:
    return row(
        way,
        seconds=timing.median_s,
        repeats=timing.repeats,
        note=timing.failure or f"{sum(right)} of {len(right)} answers right",
    )
