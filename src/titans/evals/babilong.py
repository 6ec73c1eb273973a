"""BABILong: bAbI's questions about facts that are scattered in books, by task and length.

Every sample is one prompt with one question at its end, read from an empty memory. `score`
follows BABILong: of the task's possible answers, what the model says (up to the first full stop,
greedily decoded) names the right one, or ones, and no other, those in the question aside; words
are compared and not parts of words, since "none" contains "one". `exact` is strict: the answer,
token by token, with its full stop.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titans.config import require_positive
from titans.data.babilong import BabiTask, test_questions
from titans.data.documents import expand_paths
from titans.data.haystack import noise, prose
from titans.data.tokenizers import Tokenizer, tokenizer_of
from titans.evals.answers import answer, exact, keep_folder
from titans.evals.report import readable, wilson
from titans.models.lm import TitansLM


@dataclass(frozen=True, kw_only=True)
class BabilongConfig:
    """What is asked. Paths may begin with an environment variable: `$TITANS_DATA_DIR/babi`."""

    tasks: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Numbers of bAbI tasks."""
    lengths: tuple[int, ...] = (0, 1024, 4096, 16384)
    """Tokens of a prompt, question included, of the model's tokenizer. Where the facts alone are
    longer, and at 0, there are facts alone."""
    samples: int = 100
    """Questions of a cell, drawn from the test file; at most all of them."""
    rows: int = 8
    """Prompts read side by side: speed and memory only."""
    folder: str = "$TITANS_DATA_DIR/babi"
    """bAbI's files qaN_..._test.txt (facebook research, "bAbI tasks 1-20 v1.2", folder en)."""
    paths: tuple[str, ...] = ("$TITANS_DATA_DIR/books",)
    """Prose around the facts: files or folders; of a folder with the project's books only those
    held out from training (`titans.data.haystack.prose_files`)."""
    write: bool = True
    """False: memories are read and never written."""
    keep: str = ""
    """A folder for answers and unfinished readings, from which the same command goes on where it
    was stopped. Empty: nothing is kept."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks or not self.lengths:
            raise ValueError("tasks or lengths is empty: expected at least one of each")
        if min(self.lengths) < 0 or self.seed < 0:
            raise ValueError("lengths and seed must not be negative")
        require_positive(self, "samples", "rows")


@dataclass(frozen=True, kw_only=True)
class BabilongCell:
    """One task at one length.

    score, exact: means over the `asked` samples. low, high: 95 % interval of the score. guess:
    score of who always says what is asked for most often.
    """

    task: int
    length: int
    asked: int
    score: float
    exact: float
    low: float
    high: float
    guess: float


@dataclass(frozen=True, kw_only=True)
class BabilongResult:
    """cells: by task, then length. prose_tokens: of the haystack; longer prompts read it again."""

    config: BabilongConfig
    cells: tuple[BabilongCell, ...]
    prose_tokens: int | None = None


def babilong(
    model: TitansLM,
    config: BabilongConfig,
    tokenizer: Tokenizer | None = None,
    watch: Callable[[BabilongCell], None] | None = None,
) -> BabilongResult:
    """Ask; `watch` sees every cell as it is done. The tokenizer is the byte tokenizer by default.

    The same questions are asked at every length. ValueError for files that are missing
    and a tokenizer that is not the model's.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    (folder,) = expand_paths((config.folder,))
    text = noise(tokenizer)  # of which facts alone need none
    if any(config.lengths):
        text = prose(expand_paths(config.paths), tokenizer, held_out=True)
    tasks = [BabiTask(test_questions(folder, number), text, tokenizer) for number in config.tasks]
    cells = []
    for number, task in zip(config.tasks, tasks, strict=True):
        for length in config.lengths:
            cells.append(ask(model, config, tokenizer, task, number, length))
            if watch is not None:
                watch(cells[-1])
    size = len(text.tokens) if any(config.lengths) else None
    return BabilongResult(config=config, cells=tuple(cells), prose_tokens=size)


def ask(
    model: TitansLM,
    config: BabilongConfig,
    tokenizer: Tokenizer,
    task: BabiTask,
    number: int,
    length: int,
) -> BabilongCell:
    order = np.random.default_rng((config.seed, number)).permutation(len(task.questions))
    questions = [task.questions[i] for i in order[: config.samples]]
    answers = [question.answer for question in questions]
    # Twice the longest answer of the task: room to name another one, which would be wrong.
    count = 2 * max(len(tokenizer.encode(f" {q.answer}.")) for q in task.questions)
    keep = keep_folder(config.keep)
    scores, right = 0.0, 0
    for begin in range(0, len(questions), config.rows):
        samples = [
            task.sample(question, length, np.random.default_rng((config.seed, number, index)))
            for index, question in enumerate(questions[begin : begin + config.rows], start=begin)
        ]
        rows = answer(model, samples, count, tokenizer.vocab_size, config.write, keep)
        for given, sample in zip(rows, samples, strict=True):
            said = tokenizer.decode(given)
            scores += names_it(said, sample.expected[0], sample.question, task.labels)
            right += exact(given, sample)
    asked = len(questions)
    low, high = wilson(scores, asked)
    return BabilongCell(
        task=number,
        length=length,
        asked=asked,
        score=scores / asked,
        exact=right / asked,
        low=low,
        high=high,
        guess=max(answers.count(a) for a in set(answers)) / asked,
    )


def names_it(said: str, target: str, question: str, labels: Sequence[str]) -> bool:
    """Of `labels` not in the question, does the first sentence of `said` name just the target's?

    Where the answers are ways (task 19: `n,w`), steps count in their order.
    """

    def words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    wanted, named = words(target), words(" ".join(labels))
    possible = (set(named) - set(words(question))) | set(wanted)
    found = [word for word in words(said.split(".")[0]) if word in possible]
    if set(named) <= set("nesw"):
        return found == wanted
    return set(found) == set(wanted)


def plot(result: BabilongResult, path: Path) -> None:
    """Score by task and length, as a heat map with its numbers."""
    from matplotlib.figure import Figure

    tasks, lengths = result.config.tasks, result.config.lengths
    score = {(cell.task, cell.length): cell.score for cell in result.cells}
    grid = [[score[task, length] for length in lengths] for task in tasks]
    figure = Figure(
        figsize=(2.5 + 0.7 * len(lengths), 1.5 + 0.4 * len(tasks)), layout="constrained"
    )
    axis = figure.subplots()
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center")
    axis.set_xticks(range(len(lengths)), [readable(length) for length in lengths])
    axis.set_yticks(range(len(tasks)), [f"qa{task}" for task in tasks])
    axis.set_xlabel("tokens")
    figure.colorbar(image, ax=axis, label="right")
    figure.savefig(path, dpi=120)
