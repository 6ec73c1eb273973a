"""BABILong: the facts of a bAbI story scattered in order over the sentences of books.

Kuratov et al., "BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack"
(arXiv:2406.10149), on the tasks of Weston et al. (arXiv:1502.05698). As there, every question is
a sample of its own, whose facts are all statements of the story before it, each put into a gap
between sentences drawn at random; context and question stand in its template. What differs: the
length counts the whole prompt, question included, and there are no worked examples in front.

Tests ask bAbI's test questions in held-out prose (`prose_files`). bAbI's training files of 10,000
repeat some of them, in task 4 two thirds of the file, in other words or another order:
`training_questions` leaves those out.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titans.data.documents import read_documents
from titans.data.facts import ANSWER, STATED, TEXT, Batch, batch_of
from titans.data.haystack import (
    AFTER,
    Piece,
    Placed,
    Ring,
    Sample,
    Unit,
    row_of,
    scatter,
    size,
    spread,
    weave,
)
from titans.data.tokenizers import Tokenizer, encode

OPEN, CLOSE = "<context>\n", "\n</context>\n\n"
AGAIN = f"\n\n{OPEN}"  # after an answer
ATTEMPTS = 1000  # at a question that fits a row
# Of so many drawn so many have to fit: that none of ATTEMPTS does, in the midst of a training, is
# then not to be expected.
TRIED, FITTING = 300, 10
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
RELATIONS = (
    r"The (?P<one>\w+) is (?P<way>\w+) of the (?P<other>\w+)\.",
    r"What is (?P<way>\w+) of the (?P<other>\w+)\?",
    r"What is the (?P<one>\w+) (?P<way>\w+) of\?",
)
STRAY_SUBJECTS = (
    *("", "", "", "He", "She", "They", "I", "We", "You", "It", "Nobody", "Everyone", "Then"),
    *("Her father", "My friend", "His wife", "The doctor", "The old man", "A servant"),
    *("the children", "and so", "Mr. Brown", "Miss Gray", "Tom", "Alice", "Henry", "Ellen"),
)
STRAY_ARTICLES = (*("the",) * 8, *("a", "his", "her", "my", "your", "their", "that", "an old"))
STRAY_PLACES = (
    *("house", "room", "hall", "street", "church", "town", "door", "river", "window", "field"),
    *("shop", "palace", "village", "city", "carriage", "forest", "library", "stable", "station"),
)
STRAY_ENDS = (".", ".", ".", ",", ";", "!", "?", " again.", " and")


class Line(NamedTuple):
    """A statement of a story or, with an answer, a question about what was said so far."""

    text: str
    answer: str | None = None


Identity = tuple[tuple[str, ...], str]


def identity(facts: Sequence[str], question: str) -> Identity:
    """What makes a question the same: its facts, in whatever order and said either way round, and
    what is asked. Order means something outside task 4; there a question too many is left out of
    the training."""
    return tuple(sorted(relation(fact) for fact in facts)), relation(question)


@cache  # bAbI has few different sentences, and says each of them thousands of times
def relation(text: str) -> str:
    """Task 4's `The bed is west of the bath.` and `What is the bath west of?`, said to the north or
    to the east; any other sentence as it is."""
    for form in RELATIONS:
        match = re.fullmatch(form, text)
        if match and match["way"] in OPPOSITE:
            named = {"one": "?", "other": "?"} | match.groupdict()
            one, way, other = named["one"], named["way"], named["other"]
            turned = way in ("south", "west")
            return f"{other} {OPPOSITE[way]} {one}" if turned else f"{one} {way} {other}"
    return text


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


def held_back(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """To train on, and to watch the training by: the last twentieth of the different questions.

    ValueError where there are not two of them."""
    different = list(dict.fromkeys(question.identity for question in questions))
    if len(different) < 2:
        raise ValueError("bAbI: fewer than two different training questions that no test asks")
    asked = set(different[-max(len(different) // 20, 1) :])
    known = [without(q, asked) for q in questions if q.identity not in asked]
    return known, [q for q in questions if q.identity in asked]


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
        if not raw.strip():
            continue
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

    def __init__(
        self,
        questions: Sequence[Question],
        text: Ring,
        tokenizer: Tokenizer,
        stray: float = 0.0,
        echo: float = 0.0,
    ) -> None:
        """stray: in training rows, `stray_fact` so many times in 1,000 tokens of the row, of the
        statements that are about someone. echo: likewise, sentences of the text that say a word
        of the statements."""
        self.questions, self.ring, self.tokenizer = questions, text, tokenizer
        self.stray, self.echo = stray, echo
        self.labels = sorted({part for q in questions for part in q.answer.split(",")})

    def sample(
        self,
        question: Question,
        length: int,
        generator: np.random.Generator,
        strays: Sequence[Placed] = (),
    ) -> Sample:
        """A prompt of exactly `length` tokens, or as long as its facts and question are.

        A length of 0 gives facts alone. strays: what else is hidden, at depths from 0 to 1.
        """
        answer = self.answer(question).tokens
        head, tail = self.text(OPEN), self.text(CLOSE + asked(question.text))
        facts: list[Unit] = [(self.text(fact + " "),) for fact in question.facts]
        placed = [*zip(np.sort(generator.random(len(facts))), facts, strict=True), *strays]
        needed = size([head, tail]) + sum(size(unit) for _, unit in placed)
        room = max(length - needed, 0)
        hidden = spread(placed, room)
        end = self.ring.random_end(generator)

        def pieces() -> Iterator[Piece]:
            yield head
            yield from weave(self.ring.sentences(room, end), hidden)
            yield tail

        return Sample(room + needed, pieces, answer, (question.answer,), question.text)

    def row(self, question: Question, length: int, generator: np.random.Generator) -> list[Piece]:
        """A sample and its answer, what a test has, for training, and a little more haystack.
        `length` tokens or more.

        Without what follows every answer would end where a segment of MAC does (`NeedleTask.row`).
        """
        after = int(generator.integers(min(AFTER, 1 + length // 4)))
        answer = self.answer(question)
        prompt = length - after - size([answer])
        sample = self.sample(question, prompt, generator, self.strays(length, generator))
        again = self.text(AGAIN)
        more = self.ring.sentences(max(after - size([again]), 0), self.ring.random_end(generator))
        begun = Piece(again.tokens[:after])
        return [*sample.pieces(), answer, begun, *(piece for unit in more for piece in unit)]

    def dense_row(
        self, question: Question, length: int, generator: np.random.Generator
    ) -> list[Piece]:
        """A row in which the story's earlier questions stand, with answers, at their places.

        `length` tokens or more. Each closes the context as at the end of a test, and opens it.
        """
        lines = (*question.before, Line(question.text, question.answer))
        units = [self.unit(line) for line in lines]
        head = self.text(OPEN)
        depths = np.sort(generator.random(len(units)))
        depths[-1] = 1.0  # the last one is asked at the end
        placed = [*zip(depths, units, strict=True), *self.strays(length, generator)]
        room = max(length - size([head]) - sum(size(unit) for _, unit in placed), 0)
        sentences = self.ring.sentences(room, self.ring.random_end(generator))
        return [head, *weave(sentences, spread(placed, room))]

    def strays(self, length: int, generator: np.random.Generator) -> list[Placed]:
        def unit() -> Unit:
            question = self.questions[int(generator.integers(len(self.questions)))]
            facts = [fact for fact in question.facts if not fact.startswith("The ")] or [""]
            fact = facts[int(generator.integers(len(facts)))]
            return (self.text(f"{stray_fact(fact, generator)} ", STATED),)

        strays = scatter(self.stray, length, unit, generator)
        return strays + scatter(self.echo, length, partial(self.said, generator), generator)

    def said(self, generator: np.random.Generator) -> Unit:
        """A short sentence of the text with a word of the statements, every word as often."""
        if not self.spoken:
            return ()
        spoken = self.spoken[int(generator.integers(len(self.spoken)))]
        return self.ring.sentence(int(spoken[generator.integers(len(spoken))]))

    @cached_property
    def spoken(self) -> list[np.ndarray]:
        """For every word of the statements that the text says, the short sentences that do."""
        facts = {fact for question in self.questions for fact in question.facts}
        words = sorted({word for fact in facts for word in re.findall(r"\w+", fact)})
        found = [self.ring.saying(self.text(f" {word}").tokens) for word in words]
        return [sentences for sentences in found if len(sentences)]

    def unit(self, line: Line) -> Unit:
        if line.answer is None:
            return (self.text(line.text + " "),)
        question, again = self.text(CLOSE + asked(line.text)), self.text(AGAIN)
        return question, self.answer(line), again

    def answer(self, asked: Line | Question) -> Piece:
        return self.text(f" {asked.answer}.", ANSWER)

    def text(self, text: str, kind: int = TEXT) -> Piece:
        return Piece(encode(self.tokenizer, text), kind)


def stray_fact(fact: str, generator: np.random.Generator) -> str:
    """The end of a statement, said of someone else: books have rooms and places too.

    Gates that learned on other prose write them as if they were facts, and over a long text they
    are enough to write over one.
    """
    words = fact.rstrip(".").split()
    to_someone = words[-1:] and words[-1][0].isupper()  # who was given what stays untold
    most = 2 if to_someone else 5
    words = words[max(len(words) - int(generator.integers(1, most + 1)), 1) :]

    def draw(choices: Sequence[str]) -> str:
        return choices[int(generator.integers(len(choices)))]

    words = [draw(STRAY_ARTICLES) if word == "the" else word for word in words]
    if words and generator.random() < 0.3:
        words[-1] = draw(STRAY_PLACES)
    return " ".join([draw(STRAY_SUBJECTS), *words]).strip() + draw(STRAY_ENDS)


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
            self.check_room(task, min(lengths))

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
        raise ValueError(f"a row of {length - 1} tokens is too short for a story and a question")

    def check_room(self, task: BabiTask, length: int) -> None:
        generator, fitting = np.random.default_rng(0), 0
        for _ in range(TRIED):
            question = task.questions[int(generator.integers(len(task.questions)))]
            tokens, _ = row_of(task.row(question, length + 1, generator))
            fitting += len(tokens) == length + 1
            if fitting == FITTING:
                return
        raise ValueError(
            f"a row of {length} tokens is too short for a story and a question: {fitting} of "
            f"{TRIED} fit, expected {FITTING} or more"
        )
