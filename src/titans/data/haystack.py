"""Sentences hidden in text of any length, piece by piece: what needles and bAbI facts share.

A sample is never held as a whole. Its text is a ring of sentences that is read from some place
on, with other sentences put into its gaps; ten million tokens take no more room than a thousand.
What is read of the books is split by `prose_files`, what is hidden in them by
`data.carrier.is_held_out` (or by bAbI's own files).
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titans.data.documents import read_documents, text_files
from titans.data.facts import TEXT
from titans.data.tokenizers import Tokenizer, encode

HELD_OUT_BOOKS = ("austen-persuasion", "chesterton-thursday", "1184-0")
"""Beginnings of the file names of the books that tests read and training does not."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

AFTER = 64  # tokens of haystack that may follow an answer in training
STRAY_MOST = 50  # units of `scatter` per 1,000 tokens
SHORT = 48  # tokens of a sentence of `Ring.saying`, at most
LONGEST = 2000  # characters of a sentence; one that is longer is cut, so that gaps stay frequent
CUT = 400  # characters of what it is cut into, where nothing in it looks like an end

_CLOSE, _OPEN = "\"'\u201d\u2019)_", "\"'\u201c\u2018(_"  # quotes and their like
_WIDE_END = r"[\u3002\uff01\uff1f][\u300d\u300f\u201d\u2019\uff09]* ?"  # without a space: CJK
# A full stop, if what follows looks like a beginning.
_SENTENCE_END = re.compile(
    rf"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?][{_CLOSE}]* (?=[{_OPEN}]*[A-Z])|{_WIDE_END}"
)
_ANY_END = re.compile(rf"[.!?;][{_CLOSE}]* ")


class Piece(NamedTuple):
    """Some tokens, and what they are: TEXT, STATED (no one can know them) or ANSWER."""

    tokens: np.ndarray
    kind: int = TEXT


Unit = tuple[Piece, ...]
"""A sentence: it is never torn apart, but for the first of a haystack."""
Placed = tuple[float, Unit]
"""What is hidden, and at which depth or offset."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer.

    length: tokens of the prompt. pieces: the prompt from its beginning, as often as it is called.
    answer: the tokens that should follow. expected: the strings that a right answer contains.
    question: the words of the question.
    """

    length: int
    pieces: Callable[[], Iterator[Piece]]
    answer: np.ndarray
    expected: tuple[str, ...]
    question: str


def size(unit: Iterable[Piece]) -> int:
    return sum(len(piece.tokens) for piece in unit)


class Ring:
    """Sentences around and around.

    tokens: all sentences, each with the space or line end after it. starts: where each begins.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        self.tokens, self.starts = tokens, starts

    @classmethod
    def of(cls, sentences: Iterable[str], tokenizer: Tokenizer) -> "Ring":
        """ValueError where there is no text."""
        parts = [encode(tokenizer, sentence) for sentence in sentences]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        if not lengths.sum():
            raise ValueError("the haystack is empty: expected some text")
        kept = lengths > 0
        starts = (np.cumsum(lengths) - lengths)[kept]
        return cls(np.concatenate(parts), starts)

    def random_end(self, generator: np.random.Generator) -> int:
        """Where a haystack may end: at the end of some sentence."""
        return int(self.starts[generator.integers(len(self.starts))])

    def sentences(self, length: int, end: int) -> Iterator[Unit]:
        """The `length` tokens before `end`; the first sentence begins where the count says."""
        place = (end - length) % len(self.tokens)
        index = int(np.searchsorted(self.starts, place, side="right"))
        while length > 0:
            stop = len(self.tokens) if index == len(self.starts) else int(self.starts[index])
            yield (Piece(self.tokens[place:stop]),)
            length -= stop - place
            place, index = (0, 1) if stop == len(self.tokens) else (stop, index + 1)

    def garbled(self, share: float, seed: int = 0) -> "Ring":
        """With so many of the tokens exchanged for others, each that occurs as often as any."""
        generator = np.random.default_rng(seed)
        struck = generator.random(len(self.tokens)) < share
        tokens = self.tokens.copy()
        tokens[struck] = generator.choice(np.unique(tokens), int(struck.sum()))
        return Ring(tokens, self.starts)

    def sentence(self, index: int) -> Unit:
        stop = self.starts[index + 1] if index + 1 < len(self.starts) else len(self.tokens)
        return (Piece(self.tokens[self.starts[index] : stop]),)

    def saying(self, wanted: np.ndarray) -> np.ndarray:
        """Which sentences, of `SHORT` tokens at most, hold these tokens one after another."""
        places = np.flatnonzero(self.tokens[: len(self.tokens) - len(wanted) + 1] == wanted[0])
        for n, token in enumerate(wanted[1:], start=1):
            places = places[self.tokens[places + n] == token]
        index = np.unique(np.searchsorted(self.starts, places, side="right") - 1)
        lengths = np.diff(self.starts, append=len(self.tokens))
        return index[lengths[index] <= SHORT]


def noise(tokenizer: Tokenizer) -> Ring:
    return Ring.of([NOISE + "\n"], tokenizer)


def prose(paths: Sequence[str | Path], tokenizer: Tokenizer, held_out: bool) -> Ring:
    """Books and other texts, one after another, white space made single spaces.

    paths: files, or folders of them, see `prose_files`. ValueError for what cannot be read.
    """
    sentences: list[str] = []
    files = prose_files(paths, held_out)
    for document in read_documents(files, strip_gutenberg=True, encoding="auto"):
        sentences += split_sentences(document.text)
    return Ring.of(sentences, tokenizer)


def prose_files(paths: Sequence[str | Path], held_out: bool) -> list[Path]:
    """The split rule of books: `HELD_OUT_BOOKS` are for tests, all others for training.

    A folder without any of those books is taken whole, and so is a file that is named itself:
    who brings texts of his own also says which are for what.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = [p for p in text_files(path) if p.stat().st_size]
        tests = [p for p in inside if p.name.startswith(HELD_OUT_BOOKS)]
        if tests:
            inside = tests if held_out else [p for p in inside if p not in tests]
        if not inside:
            raise ValueError(
                f"{path}: no text files in it to read for {'tests' if held_out else 'training'}"
            )
        files += inside
    return files


def split_sentences(text: str) -> list[str]:
    """Sentences, each with the space after it; joined they are the text in single spaces.

    What has more than `LONGEST` characters (text in lower case, a list, code) is cut at any full
    stop or semicolon, and after `CUT` of them where there is none: what is hidden goes into gaps.
    """
    text = " ".join(text.split())
    if not text:
        return []
    sentences = []
    for sentence in cut(text + " ", _SENTENCE_END):
        short = len(sentence) <= LONGEST
        sentences += [sentence] if short else cut(sentence, _ANY_END)
    return [part for sentence in sentences for part in pieces_of(sentence)]


def cut(text: str, end: re.Pattern[str]) -> list[str]:
    """The text in parts, each up to and with a match of `end`."""
    cuts = sorted({0, *(match.end() for match in end.finditer(text)), len(text)})
    return [text[a:b] for a, b in pairwise(cuts)]


def pieces_of(sentence: str) -> Iterator[str]:
    """The sentence; one of more than `LONGEST` characters in pieces of `CUT`, cut at spaces."""
    while len(sentence) > LONGEST:
        place = sentence.rfind(" ", 0, CUT) + 1 or CUT
        yield sentence[:place]
        sentence = sentence[place:]
    yield sentence


def scatter(
    per_thousand: float, length: int, unit: Callable[[], Unit], generator: np.random.Generator
) -> list[Placed]:
    """Units for `length` tokens of training text, so many per 1,000 on the mean, at depths from
    0 to 1: what looks like something to remember and is not, for gates to leave alone."""
    if not per_thousand:
        return []
    count = generator.poisson(per_thousand * length / 1000)
    return [(generator.random(), unit()) for _ in range(count)]


def spread(placed: Iterable[Placed], room: int) -> list[Placed]:
    """Depths from 0 to 1 made offsets in `room` tokens, rising."""
    return [(depth * room, unit) for depth, unit in sorted(placed, key=itemgetter(0))]


def weave(sentences: Iterable[Unit], hidden: Sequence[Placed]) -> Iterator[Piece]:
    """Sentences, and in their gaps what is hidden: (offset, unit), rising.

    A unit goes before the first sentence that begins at its offset or later (in tokens of the
    sentences alone), else to the end.
    """
    waiting = deque(hidden)
    offset = 0
    for sentence in sentences:
        while waiting and waiting[0][0] <= offset:
            yield from waiting.popleft()[1]
        yield from sentence
        offset += size(sentence)
    for _, unit in waiting:
        yield from unit


def blocks(pieces: Iterable[Piece], length: int) -> Iterator[np.ndarray]:
    """The tokens of the pieces, cut anew into arrays of `length`; the last may be shorter."""
    held: list[np.ndarray] = []
    have = 0
    for piece in pieces:
        held.append(piece.tokens)
        have += len(piece.tokens)
        if have < length:
            continue
        whole = np.concatenate(held)
        full = have // length * length
        yield from (whole[i : i + length] for i in range(0, full, length))
        held, have = [whole[full:]], have - full
    if have:
        yield np.concatenate(held)


def row_of(pieces: Iterable[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and what each of them is: a training row."""
    whole = list(pieces)
    tokens = np.concatenate([piece.tokens.astype(np.int64) for piece in whole])
    kinds = np.concatenate([np.full(len(piece.tokens), piece.kind) for piece in whole])
    return tokens, kinds
