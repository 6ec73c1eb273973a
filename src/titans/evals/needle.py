"""RULER's needles and variables: what is found, by kind, length and depth.

Every sample is one prompt with one question at its end, read from an empty memory. `score` is
RULER's: the share of the expected strings that occur in what the model says, greedily decoded,
whatever the case. `exact` is strict: the answer, token by token, with its full stop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titans.config import require_positive
from titans.data.documents import expand_paths
from titans.data.haystack import Sample, prose
from titans.data.needle import KINDS, NeedleTask, check_kind
from titans.data.tokenizers import Tokenizer, tokenizer_of
from titans.evals.answers import answer, exact, keep_folder
from titans.evals.report import readable, wilson
from titans.models.lm import TitansLM


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """What is asked. Paths may begin with an environment variable: `$TITANS_DATA_DIR/books`."""

    kinds: tuple[str, ...] = ("single-1", "single-2", "single-3")
    """Names in `titans.data.needle.KINDS`."""
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Tokens of a prompt, question included, of the model's tokenizer."""
    depths: tuple[float, ...] = ()
    """Where the needle is, from 0 to 1: each is a cell of its own. Empty: anywhere, as RULER has
    it, and as kinds with several needles need it."""
    samples: int = 100
    """Questions of a cell."""
    rows: int = 8
    """Prompts read side by side: speed and memory only."""
    generated: int = 0
    """Tokens that the model may say; RULER grants 128. 0: as many as the right answer has, which
    leaves no room for a second guess."""
    words: str = "$TITANS_DATA_DIR/needle"
    """Folder with nounlist.txt and adjectivelist.txt, such as those of the package wonderwords."""
    paths: tuple[str, ...] = ("$TITANS_DATA_DIR/books",)
    """Prose to hide needles in: files or folders; of a folder with the project's books only those
    held out from training (`titans.data.haystack.prose_files`)."""
    write: bool = True
    """False: memories are read and never written."""
    keep: str = ""
    """A folder for answers and unfinished readings, from which the same command goes on where it
    was stopped. Empty: nothing is kept."""
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if check_kind(kind).needles > 1 and self.depths:
                raise ValueError(f"depths are for kinds with one needle to find, got {kind!r}")
        if not self.kinds or not self.lengths:
            raise ValueError("kinds or lengths is empty: expected at least one of each")
        if min(self.lengths) < 1:
            raise ValueError(f"lengths must be at least 1, got {list(self.lengths)}")
        if any(not 0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths must lie in [0, 1], got {list(self.depths)}")
        require_positive(self, "samples", "rows")
        if self.generated < 0 or self.seed < 0:
            raise ValueError("generated and seed must not be negative")


@dataclass(frozen=True, kw_only=True)
class NeedleCell:
    """One kind at one length and depth (None: anywhere).

    score, exact: means over the `asked` samples. low, high: 95 % interval of the score.
    """

    kind: str
    length: int
    depth: float | None
    asked: int
    score: float
    exact: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class NeedleResult:
    """cells: by kind, then length, then depth. prose_tokens: of the haystack; longer prompts read
    it again."""

    config: NeedleConfig
    cells: tuple[NeedleCell, ...]
    prose_tokens: int | None = None


def needle(
    model: TitansLM,
    config: NeedleConfig,
    tokenizer: Tokenizer | None = None,
    watch: Callable[[NeedleCell], None] | None = None,
) -> NeedleResult:
    """Ask; `watch` sees every cell as it is done. The tokenizer is the byte tokenizer by default.

    Sample i of a kind has the same words and values at every length and depth. ValueError for
    files that are missing, a tokenizer that is not the
    model's and lengths that do not hold a question.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    (words,) = expand_paths((config.words,))
    in_prose = any(KINDS[kind].haystack == "prose" for kind in config.kinds)
    text = prose(expand_paths(config.paths), tokenizer, held_out=True) if in_prose else None
    tasks = {kind: NeedleTask(kind, words, text, tokenizer, held_out=True) for kind in config.kinds}
    for task in tasks.values():  # a length that is too short is refused before any is asked
        for index in range(config.samples):
            task.sample(min(config.lengths), np.random.default_rng((config.seed, index)))
    cells = []
    for kind, task in tasks.items():
        for length in config.lengths:
            for depth in config.depths or (None,):
                cells.append(ask(model, config, tokenizer, task, kind, length, depth))
                if watch is not None:
                    watch(cells[-1])
    size = None if text is None else len(text.tokens)
    return NeedleResult(config=config, cells=tuple(cells), prose_tokens=size)


def ask(
    model: TitansLM,
    config: NeedleConfig,
    tokenizer: Tokenizer,
    task: NeedleTask,
    kind: str,
    length: int,
    depth: float | None,
) -> NeedleCell:
    keep = keep_folder(config.keep)
    scores, right = 0.0, 0
    for begin in range(0, config.samples, config.rows):
        samples = [
            task.sample(length, np.random.default_rng((config.seed, index)), depth)
            for index in range(begin, min(begin + config.rows, config.samples))
        ]
        count = config.generated or max(len(sample.answer) for sample in samples)
        rows = answer(model, samples, count, tokenizer.vocab_size, config.write, keep)
        for given, sample in zip(rows, samples, strict=True):
            said = tokenizer.decode(given[: config.generated or len(sample.answer)])
            scores += string_match(said, sample)
            right += exact(given, sample)
    low, high = wilson(scores, config.samples)
    return NeedleCell(
        kind=kind,
        length=length,
        depth=depth,
        asked=config.samples,
        score=scores / config.samples,
        exact=right / config.samples,
        low=low,
        high=high,
    )


def string_match(said: str, sample: Sample) -> float:
    """RULER's string_match_all of one sample."""
    found = [expected.lower() in said.lower() for expected in sample.expected]
    return sum(found) / len(found)


def plot(result: NeedleResult, path: Path) -> None:
    """Score by length: a heat map of lengths and depths for each kind, or lines without depths."""
    from matplotlib.figure import Figure

    kinds, lengths, depths = result.config.kinds, result.config.lengths, result.config.depths
    score = {(cell.kind, cell.length, cell.depth): cell for cell in result.cells}
    names = [readable(length) for length in lengths]
    if not depths:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        for kind in kinds:
            cells = [score[kind, length, None] for length in lengths]
            around = [[c.score - c.low for c in cells], [c.high - c.score for c in cells]]
            axis.errorbar(
                range(len(names)), [c.score for c in cells], around, marker="o", label=kind
            )
        axis.set_xticks(range(len(names)), names)
        axis.set_ylim(-0.04, 1.04)
        axis.set_ylabel("found (95 % interval)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        axis.set_xlabel("tokens")
    else:
        figure = Figure(figsize=(1.5 + 3.2 * len(kinds), 3.4), layout="constrained")
        panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
        for axis, kind in zip(panels, kinds, strict=True):
            grid = [[score[kind, length, depth].score for length in lengths] for depth in depths]
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for row, values in enumerate(grid):
                for column, value in enumerate(values):
                    axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center")
            axis.set_title(kind)
            axis.set_xticks(range(len(names)), names)
            axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
            axis.set_xlabel("tokens")
        panels[0].set_ylabel("depth of the needle")
        figure.colorbar(image, ax=list(panels), label="found")
    figure.savefig(path, dpi=120)
