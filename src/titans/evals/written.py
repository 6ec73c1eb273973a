"""How much do a model's memories write of books that hold nothing to remember?

What a memory keeps over a million tokens of prose is lost to what the prose makes it write: this
number says how much that is, before a question is asked.
"""

from collections.abc import Sequence
from pathlib import Path

from titans.data.haystack import prose
from titans.data.tokenizers import Tokenizer
from titans.inspect.writes import Written, writes
from titans.models.lm import TitansLM


def written(
    model: TitansLM,
    tokenizer: Tokenizer,
    paths: Sequence[str | Path],
    *,
    tokens: int = 2**20,
) -> tuple[Written, ...]:
    """What each memory wrote of the held-out books in `paths` (`prose_files`), at most so many
    tokens of them. ValueError for what cannot be read."""
    ring = prose(paths, tokenizer, held_out=True)
    return writes(model, ring.tokens[None, :tokens])


def sums(
    model: TitansLM, tokenizer: Tokenizer, paths: Sequence[str | Path]
) -> dict[str, int | list[float]]:
    """Of `written`, what a table of results keeps: the tokens, and each memory's total."""
    found = written(model, tokenizer, paths)
    return {"tokens": found[0].tokens, "written": [memory.total for memory in found]}
