"""Real text that every machine with Python has: the sources of its standard library."""

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from titans.data.documents import read_documents

HELD_OUT_EVERY = 5


def python_text(held_out: bool) -> list[np.ndarray]:
    """Bytes of the standard library's modules, one array each (uint8).

    One module in five, chosen by a hash of its name, is held out: training reads the others,
    the demo and the tests read these.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "test/", "dist-packages/")) or "/tests/" in name:
            continue
        if is_held_out(name) == held_out and path.stat().st_size > 2000:
            texts.append(np.fromfile(path, dtype=np.uint8))
    if not texts:
        raise ValueError(f"{root}: found no standard library sources to read; give a text file")
    return texts


def files_text(paths: Sequence[str | Path]) -> list[np.ndarray]:
    """Bytes of the user's own documents, one array each."""
    return [
        np.frombuffer(document.text.encode(), dtype=np.uint8) for document in read_documents(paths)
    ]


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_EVERY == 0


def endless(texts: Sequence[np.ndarray], length: int, generator: np.random.Generator) -> np.ndarray:
    """`length` bytes of text: whole documents in random order, around again if need be.

    ValueError where no document has a byte.
    """
    if not any(len(text) for text in texts):
        raise ValueError("the texts are empty: expected at least one character")
    pieces: list[np.ndarray] = []
    have = 0
    while have < length:
        for index in generator.permutation(len(texts)):
            pieces.append(texts[index])
            have += len(texts[index])
            if have >= length:
                break
    whole = np.concatenate(pieces)
    start = int(generator.integers(len(whole) - length + 1))
    return whole[start : start + length]


def window(texts: Sequence[np.ndarray], length: int, generator: np.random.Generator) -> np.ndarray:
    """`length` consecutive bytes; a document is chosen in proportion to its size."""
    sizes = np.array([len(text) for text in texts], dtype=np.float64)
    text = texts[generator.choice(len(texts), p=sizes / sizes.sum())]
    if len(text) < length:
        return endless(texts, length, generator)
    start = int(generator.integers(len(text) - length + 1))
    return text[start : start + length]
