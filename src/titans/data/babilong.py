"""BABILong: the facts of a bAbI story scattered in order over the sentences of books.

Kuratov et al., "BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack"
(arXiv:2406.10149), on the tasks of Weston et al. (arXiv:1502.05698). As there, every question is
a sample of its own, whose facts are all statements of the story before it, each put into a gap
between sentences drawn at random; context and question stand in its template. What differs: the
length counts the whole prompt, question included, and there are no worked examples in front.

Tests ask bAbI's test questions in held-out prose (`prose_files`). bAbI's training files of 10,000
repeat some of them, in task 4 more than a quarter of the file (half of these with their two facts
in the other order): `training_questions` leaves those out.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titans.data.documents import read_documents
from titans.data.facts import ANSWER, TEXT, Batch
from titans.data.haystack import Piece, Ring, Sample, Unit, batch_of, encode, row_of, size, weave
from titans.data.tokenizers import Tokenizer

BEFORE, AFTER = "<context>\n", "\n</context>\n\n"
ATTEMPTS = 100  # at a question that fits a row


class Line(NamedTuple):
    """A statement of a story or, with an answer, a question about what was said so far."""

    text: str
    answer: str | None = None


Identity = tuple[tuple[str, ...], str]


def identity(facts: Sequence[str], question: str) -> Identity:
    """What makes a question the same. Facts in another order do: in task 4 it means nothing, and
    elsewhere a question too many is left out of the training."""
    return tuple(sorted(facts)), question


class Question(NamedTuple):
    """before: the story so far, earlier questions included."""

    before: tuple[Line, ...]
    text: str
    answer: str

    @property
    def facts(self) -> tuple[str, ...]:
        return tuple(line.text for line in self.before if line.answer is None)

    @property
    def identity(self) -> "Identity":
        return identity(self.facts, self.text)


def training_questions(folder: Path, task: int) -> list[Question]:
    """Those of the training file, the one of 10,000 where there is one, that no test asks; nor
    does a test ask an earlier question of their stories."""
    asked = {question.identity for question in test_questions(folder, task)}
    questions = read_questions(babi_file(folder, task, "train"))
    return [without(question, asked) for question in questions if question.identity not in asked]


def without(question: Question, asked: set[Identity]) -> Question:
    """The question, its story without the questions (and answers) that are `asked`."""
    kept: list[Line] = []
    facts: list[str] = []
    for line in question.before:
        if line.answer is None:
            facts.append(line.text)
        if line.answer is None or identity(facts, line.text) not in asked:
            kept.append(line)
    return question._replace(before=tuple(kept))


def test_questions(folder: Path, task: int) -> list[Question]:
    return read_questions(babi_file(folder, task, "test"))


def babi_file(folder: Path, task: int, split: str) -> Path:
    """`qa1_..._test.txt` or the like, also compressed; ValueError where there is none."""
    files = [p for p in sorted(folder.glob(f"*qa{task}_*_{split}.*")) if set(p.suffixes) & {".txt"}]
    # "10k_qa1..." sorts before "qa1...".
    if not files:
        raise ValueError(f"{folder}: no file qa{task}_*_{split}.txt of bAbI in it")
    return files[0]


def read_questions(path: Path) -> list[Question]:
    """The questions of a bAbI file; ValueError naming the line that is not bAbI's."""
    questions: list[Question] = []
    story: list[Line] = []
    (document,) = read_documents([path])
    for number, raw in enumerate(document.text.splitlines(), start=1):
        match = re.fullmatch(r"(\d+) ([^\t]+)(?:\t([^\t]+)(?:\t.*)?)?", raw.rstrip())
        if match is None:
            raise ValueError(f"{path}:{number}: expected `id text` or `id question TAB answer ...`")
        if match[1] == "1":
            story = []
        text, answer = match[2].strip(), match[3]
        if answer is not None:
            answer = answer.strip()
            questions.append(Question(tuple(story), text, answer))
        story.append(Line(text, answer))
    if not questions:
        raise ValueError(f"{path}: no question in it")
    return questions


class BabiTask:
    """Samples of a list of questions in a text."""

    def __init__(self, questions: Sequence[Question], text: Ring, tokenizer: Tokenizer) -> None:
        self.questions, self.ring, self.tokenizer = questions, text, tokenizer
        self.labels = sorted({part for q in questions for part in q.answer.split(",")})

    def sample(
        self,
        question: Question,
        length: int,
        generator: np.random.Generator,
        with_answer: bool = False,
    ) -> Sample:
        """A prompt of exactly `length` tokens, or as long as its facts and question are.

        A length of 0 gives facts alone. with_answer: `length` counts the answer too.
        """
        answer = encode(self.tokenizer, f" {question.answer}.")
        head, tail = self.text(BEFORE), self.text(AFTER + asked(question.text))
        facts: list[Unit] = [(self.text(fact + " "),) for fact in question.facts]
        needed = size([head, tail]) + sum(size(fact) for fact in facts)
        room = max(length - needed - (len(answer) if with_answer else 0), 0)
        offsets = room * np.sort(generator.random(len(facts)))
        end = self.ring.random_end(generator)

        def pieces() -> Iterator[Piece]:
            yield head
            hidden = list(zip(offsets.tolist(), facts, strict=True))
            yield from weave(self.ring.sentences(room, end), hidden)
            yield tail

        return Sample(room + needed, pieces, answer, (question.answer,), question.text)

    def row(self, question: Question, length: int, generator: np.random.Generator) -> list[Piece]:
        """A sample and its answer: what a test has, for training. `length` tokens or more."""
        sample = self.sample(question, length, generator, with_answer=True)
        return [*sample.pieces(), Piece(sample.answer, ANSWER)]

    def dense_row(
        self, question: Question, length: int, generator: np.random.Generator
    ) -> list[Piece]:
        """A row in which the story's earlier questions stand, with answers, at their places.

        `length` tokens or more. Each closes the context as at the end of a test, and opens it.
        """
        lines = (*question.before, Line(question.text, question.answer))
        units = [self.unit(line) for line in lines]
        head = self.text(BEFORE)
        room = max(length - size([head]) - sum(size(unit) for unit in units), 0)
        offsets = room * np.sort(generator.random(len(units)))
        offsets[-1] = room  # the last one is asked at the end
        hidden = list(zip(offsets.tolist(), units, strict=True))
        return [head, *weave(self.ring.sentences(room, self.ring.random_end(generator)), hidden)]

    def unit(self, line: Line) -> Unit:
        if line.answer is None:
            return (self.text(line.text + " "),)
        question, again = self.text(AFTER + asked(line.text)), self.text(f"\n\n{BEFORE}")
        return question, self.text(f" {line.answer}.", ANSWER), again

    def text(self, text: str, kind: int = TEXT) -> Piece:
        return Piece(encode(self.tokenizer, text), kind)


def asked(question: str) -> str:
    """How a prompt ends."""
    return f"Question: {question}\nAnswer:"


class BabiBatches:
    """Training batches as a pure function of (seed, step), see `Batches`.

    A row is of one of the tasks, drawn evenly: with probability `dense` one with all questions of
    its story, else one just as the tests have them. Stories that are too long for a row are
    passed over. Weights: as `batch_of` has them.
    """

    def __init__(
        self,
        tasks: Sequence[BabiTask],
        *,
        lengths: Sequence[int],
        tokens_per_batch: int,
        dense: float,
        text_weight: float,
        seed: int,
    ) -> None:
        """ValueError for a length that hardly a question of one of the tasks fits in."""
        self.tasks, self.lengths, self.tokens_per_batch = tasks, tuple(lengths), tokens_per_batch
        self.dense, self.text_weight, self.seed = dense, text_weight, seed
        for task in tasks:
            self.row(task, min(lengths) + 1, np.random.default_rng(0))

    def batch(self, step: int) -> Batch:
        generator = np.random.default_rng((self.seed, step))
        length = int(generator.choice(self.lengths))
        count = self.tokens_per_batch // length
        drawn = [self.tasks[int(generator.integers(len(self.tasks)))] for _ in range(count)]
        rows = [self.row(task, length + 1, generator) for task in drawn]
        return batch_of(rows, self.text_weight)

    def row(
        self, task: BabiTask, length: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        forms = (task.dense_row, task.row) if generator.random() < self.dense else (task.row,)
        for _ in range(ATTEMPTS):
            question = task.questions[int(generator.integers(len(task.questions)))]
            for form in forms:
                tokens, kinds = row_of(form(question, length, generator))
                if len(tokens) == length:
                    return tokens, kinds
        raise ValueError(f"a row of {length} tokens is too short for a story and a question")
