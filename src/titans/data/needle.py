"""RULER's needles and variables, in RULER's words, at any length.

Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?"
(arXiv:2404.06654). What differs: a prompt has exactly the length asked for (RULER's has at most
that, 128 tokens for the answer included), so its haystack begins inside a sentence; prose is the
user's instead of Graham's essays, read again from its beginning where it ends, and tokenised
sentence by sentence (the space between two belongs to the first); depths are uniform, not one of
40; and no worked example stands before the variables, since our models are trained on the format.

Nouns and adjectives of a test's keys, its values and its variables are never those of a training
row's (`is_held_out`), and neither is its prose (`prose_files`).
"""

import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from titans.data.carrier import is_held_out
from titans.data.documents import read_documents
from titans.data.facts import ANSWER, STATED, TEXT, Batch, batch_of
from titans.data.haystack import (
    AFTER,
    Piece,
    Placed,
    Ring,
    Sample,
    Unit,
    noise,
    row_of,
    scatter,
    size,
    spread,
    weave,
)
from titans.data.tokenizers import Tokenizer, encode

HOPS = 4  # of a chain of variables
LETTERS = 5  # of a variable's name
ATTEMPTS = 100  # at a row whose words fit
STRAY_FORMS = (
    *("{number}", "{number}", "{number}{letter}", "{number:,}", "({number})", "[{number}]"),
    *("No. {number}", "p. {number}", "${number:,}", "{number}.{small}", "{small}:{small:02d}"),
    *("{number}-{small}", "{number}, {small}.", "_{number}_", "{letter}{number}"),
)

Words = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A task: what surrounds the needles, what keys and values are, and how many of each."""

    haystack: Literal["noise", "prose", "needles"]
    key: Words = "words"
    value: Words = "numbers"
    keys: int = 1
    """Keys with needles in the text."""
    values: int = 1
    """Needles of each key."""
    queries: int = 1
    """Keys that are asked for, all in one question."""
    chains: bool = False
    """Variables instead of needles."""

    @property
    def needles(self) -> int:
        """Needles that the answer is made of."""
        return HOPS + 1 if self.chains else self.queries * self.values


KINDS = {
    "single-1": Kind(haystack="noise"),
    "single-2": Kind(haystack="prose"),
    "single-3": Kind(haystack="prose", value="uuids"),
    "multikey-1": Kind(haystack="prose", keys=4),
    "multikey-2": Kind(haystack="needles"),
    "multikey-3": Kind(haystack="needles", key="uuids", value="uuids"),
    "multivalue": Kind(haystack="prose", values=4),
    "multiquery": Kind(haystack="prose", keys=4, queries=4),
    "variables": Kind(haystack="noise", chains=True),
}
"""RULER's niah_single_1 ... niah_multiquery and vt, with its numbers."""


class Quest(NamedTuple):
    """A question. hidden: the sentences its answer is made of, in their order. others: needles of
    keys that are not asked for. head: how RULER's prompt begins. prefix: how it ends, with the
    beginning of the answer."""

    hidden: list[Unit]
    others: list[Unit]
    head: str
    question: str
    prefix: str
    answer: str
    expected: tuple[str, ...]


def word_list(path: Path, held_out: bool) -> list[str]:
    """The words of one side of the split; ValueError where there are none."""
    lines = [line for document in read_documents([path]) for line in document.text.splitlines()]
    words = sorted({line.strip() for line in lines if line.strip()})
    words = [word for word in words if is_held_out(word) == held_out]
    if not words:
        side = "tests" if held_out else "training"
        raise ValueError(f"{path}: none of its words is for {side}")
    return words


def check_kind(name: str) -> Kind:
    if name not in KINDS:
        raise ValueError(f"unknown needle kind {name!r}; known: {', '.join(KINDS)}")
    return KINDS[name]


def listed(items: Sequence[str]) -> str:
    """`a`, or `a, b, and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


class NeedleTask:
    """Samples of one kind, from one side of the split."""

    def __init__(
        self,
        kind: str,
        words: Path,
        text: Ring | None,
        tokenizer: Tokenizer,
        held_out: bool,
        stray: float = 0.0,
    ) -> None:
        """words: a folder with `nounlist.txt` and `adjectivelist.txt` (wonderwords' lists, or
        the user's own). text: the prose, where the kind is hidden in prose. stray: in prose,
        numbers of no needle per 1,000 tokens, see `stray_number`; 0 for a test."""
        self.kind = check_kind(kind)
        self.tokenizer, self.held_out = tokenizer, held_out
        self.stray = stray if self.kind.haystack == "prose" else 0.0
        self.nouns = word_list(words / "nounlist.txt", held_out)
        self.adjectives = word_list(words / "adjectivelist.txt", held_out)
        in_prose = self.kind.haystack == "prose"
        if in_prose and text is None:
            raise ValueError(f"the needle kind {kind!r} is hidden in prose: name text files")
        self.gap, self.line_end = (" ", "\n") if in_prose else ("\n", "")
        rings = {"noise": noise(tokenizer), "prose": text, "needles": None}
        self.ring = rings[self.kind.haystack]

    def sample(
        self,
        length: int,
        generator: np.random.Generator,
        depth: float | None = None,
        with_answer: bool = False,
    ) -> Sample:
        """A prompt of exactly `length` tokens, in RULER's words.

        depth: where in the haystack the needle is, from 0 to 1; None draws it (and that of every
        other one). with_answer: `length` counts the answer too. ValueError where the length does
        not hold needle and question, and for a depth where an answer is made of several needles.
        """
        if depth is not None and (self.kind.needles > 1 or not 0 <= depth <= 1):
            raise ValueError(f"depth {depth}: expected a number in [0, 1] and one needle to find")
        taken: set[str] = set()
        quest = self.quest(generator, taken)
        answer = encode(self.tokenizer, quest.answer)
        length -= len(answer) if with_answer else 0
        head, tail = self.text(quest.head), self.text(self.line_end + quest.question + quest.prefix)
        depths = np.sort(generator.random(len(quest.hidden)))
        if depth is not None:
            depths[0] = depth
        placed = [*zip(depths, quest.hidden, strict=True)]
        placed += [(generator.random(), unit) for unit in quest.others]
        placed += self.strays(length, generator)
        room = length - size([head, tail]) - sum(size(unit) for _, unit in placed)
        if room < 0:
            raise ValueError(
                f"a prompt of {length} tokens is too short for what it must hold, {length - room}"
            )
        text = self.woven(room, placed, taken, generator)

        def pieces() -> Iterator[Piece]:
            yield head
            yield from text()
            yield tail

        return Sample(length, pieces, answer, quest.expected, quest.question)

    def row(self, length: int, generator: np.random.Generator) -> list[Piece]:
        """A sample and its answer, what a test has, for training, and a little more haystack;
        `length` tokens in all.

        Without what follows every answer would end where a segment of MAC does, and those of the
        tests, which begin with one, were not learned.
        """
        after = int(generator.integers(AFTER))
        sample = self.sample(length - after, generator, with_answer=True)
        more = self.woven(after, [], set(), generator)
        return [*sample.pieces(), Piece(sample.answer, ANSWER), *more()]

    def dense_row(self, length: int, count: int, generator: np.random.Generator) -> list[Piece]:
        """Up to `count` questions, each anywhere after its needles, in `length` tokens.

        Words and answers are those of the tests, but of the prompt around them only the beginning
        of the answer is left, which names what is asked. ValueError where not even one fits.
        """
        taken: set[str] = set()
        placed: list[Placed] = []
        strays = self.strays(length, generator)
        room = length - sum(size(unit) for _, unit in strays)
        for _ in range(count):
            quest = self.quest(generator, taken)
            asked = (
                self.text(self.line_end + quest.prefix.lstrip()),
                self.text(quest.answer, ANSWER),
                self.text("\n"),
            )
            needed = sum(size(unit) for unit in (*quest.hidden, asked))
            if needed > room:
                break
            room -= needed
            depths = np.sort(generator.random(len(quest.hidden)))
            placed += [*zip(depths, quest.hidden, strict=True)]
            placed.append((depths[-1] + (1.0 - depths[-1]) * generator.random(), asked))
        if not placed:
            raise ValueError(
                f"a row of {length - 1} tokens is too short for a needle and a question"
            )
        return list(self.woven(room, [*strays, *placed], taken, generator)())

    def woven(
        self,
        room: int,
        placed: list[Placed],
        taken: set[str],
        generator: np.random.Generator,
    ) -> Callable[[], Iterator[Piece]]:
        """`room` tokens of haystack and what is hidden in it at (depth, unit), to be read at
        will."""
        hidden = spread(placed, room)
        if self.ring is not None:
            sentences = partial(self.ring.sentences, room, self.ring.random_end(generator))
        else:
            seed = int(generator.integers(2**63))
            sentences = partial(self.distractors, room, seed, frozenset(taken))
        return lambda: weave(sentences(), hidden)

    def strays(self, length: int, generator: np.random.Generator) -> list[Placed]:
        """Numbers of no needle for `length` tokens, at their depths; no one can know them."""

        def unit() -> Unit:
            return (self.text(f"{stray_number(generator)} ", STATED),)

        return scatter(self.stray, length, unit, generator)

    def distractors(self, room: int, seed: int, taken: frozenset[str]) -> Iterator[Unit]:
        """Needles that no one asks for, of other keys than those taken; the first are cut."""

        def lines() -> Iterator[Unit]:
            generator = np.random.default_rng(seed)
            while True:
                key = self.draw(self.kind.key, generator)
                value = self.draw(self.kind.value, generator)
                if key not in taken:
                    yield self.needle(key, value)

        total = count = 0
        for unit in lines():  # how many it takes, and by how much that is too long
            if total >= room:
                break
            total += size(unit)
            count += 1
        excess = total - room
        for unit in islice(lines(), count):
            yield cut(unit, excess)
            excess = max(excess - size(unit), 0)

    def quest(self, generator: np.random.Generator, taken: set[str]) -> Quest:
        """A question about keys (or variables) and values that are not `taken`; now they are."""
        if self.kind.chains:
            return self.chain(generator, taken)
        kind, count = self.kind, self.kind.needles
        asked = [self.fresh(kind.key, generator, taken) for _ in range(kind.queries)]
        owners = [key for key in asked for _ in range(kind.values)]
        owners += [self.fresh(kind.key, generator, taken) for _ in range(kind.keys - kind.queries)]
        values = [self.fresh(kind.value, generator, taken) for _ in owners]
        needles = [self.needle(*pair) for pair in zip(owners, values, strict=True)]
        # An answer lists keys as they are asked for, and values of one key as the text has them.
        order = generator.permutation(count) if kind.values == 1 else np.arange(count)
        plural = count > 1
        what = kind.value if plural else kind.value[:-1]
        some, be, all_the = ("Some", "are", "all the") if plural else ("A", "is", "the")
        head = (
            f"{some} special magic {what} {be} hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {what} afterwards.\n"
        )
        magic = f"special magic {what} for {listed(asked)} mentioned in the provided text"
        return Quest(
            hidden=[needles[i] for i in order],
            others=needles[count:],
            head=head,
            question=f"What {be} {all_the} {magic}?",
            prefix=f" The {magic} {be}",
            answer=f" {listed(values[:count])}.",
            expected=tuple(values[:count]),
        )

    def chain(self, generator: np.random.Generator, taken: set[str]) -> Quest:
        names = [self.fresh("variables", generator, taken) for _ in range(HOPS + 1)]
        value = self.fresh("five digits", generator, taken)
        first = (self.text(f"VAR {names[0]} ="), self.text(f" {value}", STATED), self.text("\n"))
        hops = [(self.text(f"VAR {new} = VAR {old} \n"),) for old, new in pairwise(names)]
        return Quest(
            hidden=[first, *hops],
            others=[],
            head="Memorize and track the chain(s) of variable assignment hidden in the following "
            "text.\n\n",
            question="Question: Find all variables that are assigned the value "
            f"{value} in the text above.",
            prefix=" Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are:",
            answer=f" {' '.join(names)}.",
            expected=tuple(names),
        )

    def needle(self, key: str, value: str) -> Unit:
        before = f"One of the special magic {self.kind.value} for {key} is:"
        return (self.text(before), self.text(f" {value}", STATED), self.text("." + self.gap))

    def fresh(self, what: str, generator: np.random.Generator, taken: set[str]) -> str:
        for _ in range(ATTEMPTS):
            text = self.draw(what, generator)
            if text not in taken:
                taken.add(text)
                return text
        raise ValueError(f"the word lists are too short: no {what} is left to draw")

    def draw(self, what: str, generator: np.random.Generator) -> str:
        """A key, a value or a name from this side of the split."""
        if what == "words":
            adjective = self.adjectives[generator.integers(len(self.adjectives))]
            return f"{adjective}-{self.nouns[generator.integers(len(self.nouns))]}"
        while True:
            if what == "numbers":
                text = str(generator.integers(10**6, 10**7))
            elif what == "five digits":
                text = str(generator.integers(10**4, 10**5))
            elif what == "uuids":
                text = str(uuid.UUID(bytes=generator.bytes(16), version=4))
            else:
                letters = generator.integers(26, size=LETTERS)
                text = "".join(string.ascii_uppercase[i] for i in letters)
            if is_held_out(text) == self.held_out:
                return text

    def text(self, text: str, kind: int = TEXT) -> Piece:
        return Piece(encode(self.tokenizer, text), kind)


def stray_number(generator: np.random.Generator) -> str:
    """A number as books and essays have them: of a page, a year, a sum, an hour, a verse.

    Gates that learned on prose with few numbers write those of other prose as if they were
    needles, and over a long text they are enough to write over one.
    """
    number = int(10 ** generator.uniform(0, 6))  # shorter than a needle's: no test's among them
    form = STRAY_FORMS[generator.integers(len(STRAY_FORMS))]
    small, letter = generator.integers(100), string.ascii_lowercase[generator.integers(26)]
    return form.format(number=number, small=small, letter=letter)


def cut(unit: Unit, tokens: int) -> Unit:
    """A unit without its first tokens."""
    rest = []
    for piece in unit:
        rest.append(Piece(piece.tokens[tokens:], piece.kind))
        tokens = max(tokens - len(piece.tokens), 0)
    return tuple(rest)


class NeedleBatches:
    """Training batches as a pure function of (seed, step), see `Batches`.

    A row is of one of the tasks, drawn evenly: with probability `dense` one with several
    questions (`NeedleTask.dense_row`), else one just as the tests have them. A length too short
    for the latter is always filled with the former. Weights: as `batch_of` has them.
    """

    def __init__(
        self,
        tasks: Sequence[NeedleTask],
        *,
        lengths: Sequence[int],
        tokens_per_batch: int,
        questions: tuple[int, int],
        dense: float,
        text_weight: float,
        seed: int,
    ) -> None:
        """questions: fewest and most in a dense row; fewer where no more fit.

        ValueError for a length that does not hold one needle of every task and its question.
        """
        self.tasks, self.lengths, self.tokens_per_batch = tasks, tuple(lengths), tokens_per_batch
        self.questions, self.dense, self.text_weight = questions, dense, text_weight
        self.seed = seed
        for task in tasks:
            task.dense_row(min(lengths) + 1, 1, np.random.default_rng(0))

    def batch(self, step: int) -> Batch:
        generator = np.random.default_rng((self.seed, step))
        length = int(generator.choice(self.lengths))
        count = self.tokens_per_batch // length
        return batch_of([self.row(length + 1, generator) for _ in range(count)], self.text_weight)

    def row(self, length: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        task = self.tasks[int(generator.integers(len(self.tasks)))]
        count = int(generator.integers(self.questions[0], self.questions[1] + 1))
        dense = generator.random() < self.dense
        for _ in range(ATTEMPTS):
            try:
                return row_of(
                    task.dense_row(length, count, generator)
                    if dense
                    else task.row(length, generator)
                )
            except ValueError as error:  # too short for these words, or for the form of the tests
                dense, last = True, error
        raise last
