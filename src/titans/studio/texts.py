"""The page's built-in texts: Python source with facts hidden in it, and what to ask afterwards.

Sources, names and codes are of the held-out splits: the packaged model was trained on none of
them. They come from the standard library that runs the server, so nothing is downloaded.
"""

from dataclasses import dataclass

import numpy as np

from titans.data.carrier import python_text
from titans.data.facts import Fact, draw_facts

SEED = 3
SHORT, LONG, BRANCH = 2400, 24000, 900  # bytes of source
PRINTABLE = set(range(32, 127)) | {10}


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """A text to read, and the facts in it, in order."""

    id: str
    title: str
    about: str
    text: str
    facts: tuple[Fact, ...]

    def as_json(self) -> dict[str, object]:
        facts = [
            {"name": fact.name, "value": fact.value, "question": fact.question.decode()}
            for fact in self.facts
        ]
        return {
            "id": self.id,
            "title": self.title,
            "about": self.about,
            "text": self.text,
            "facts": facts,
        }


def built_in_texts() -> list[BuiltIn]:
    """The texts that the page offers; the same on every call.

    Two of them give one name two codes: they are for two forks of a memory.
    """
    generator = np.random.default_rng(SEED)
    sources = plain_sources(LONG)
    short, long, left, right = (
        sources[i] for i in generator.choice(len(sources), size=4, replace=False)
    )
    *facts, left_fact, right_fact = draw_facts(9, generator, held_out=True)
    right_fact = Fact(left_fact.name, right_fact.value)
    return [
        BuiltIn(
            id="short",
            title="Three notes in code",
            about="A page of Python with three codes noted in it. Ask for any of them.",
            text=hide(first_lines(short, SHORT), facts[:3], spread=0.8),
            facts=tuple(facts[:3]),
        ),
        BuiltIn(
            id="long",
            title="A long way back",
            about="Four codes near the beginning, then 20,000 characters without a note.",
            text=hide(first_lines(long, LONG), facts[3:7], spread=0.12),
            facts=tuple(facts[3:7]),
        ),
        BuiltIn(
            id="left",
            title="Fork: one ending",
            about=f"Says one thing about {left_fact.name}. Let one fork read this.",
            text=hide(first_lines(left, BRANCH), [left_fact], spread=1.0),
            facts=(left_fact,),
        ),
        BuiltIn(
            id="right",
            title="Fork: another ending",
            about=f"Says another thing about {left_fact.name}. Let the other fork read this.",
            text=hide(first_lines(right, BRANCH), [right_fact], spread=1.0),
            facts=(right_fact,),
        ),
    ]


def plain_sources(size: int) -> list[str]:
    """Held-out modules of at least `size` bytes that are plain ASCII without tabs.

    ValueError where the standard library has too few of them.
    """
    texts = [text for text in python_text(held_out=True) if len(text) > size]
    plain = [t.tobytes().decode() for t in texts if set(np.unique(t).tolist()) <= PRINTABLE]
    if len(plain) < 4:
        raise ValueError(f"found {len(plain)} plain modules of {size} bytes, expected at least 4")
    return plain


def first_lines(text: str, size: int) -> str:
    """Whole lines from the beginning, about `size` characters."""
    return text[: text.index("\n", size) + 1]


def hide(text: str, facts: list[Fact], *, spread: float) -> str:
    """The text with one fact at the end of some line in each equal part of its first `spread`."""
    parts, last = [], 0
    for index, fact in enumerate(facts):
        at = text.index("\n", int(len(text) * spread * (index + 0.5) / len(facts)))
        parts += [text[last:at], fact.statement.decode()]
        last = at
    return "".join([*parts, text[last:]])
