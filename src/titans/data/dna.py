"""DNA: genomes from FASTA, labelled sequences, bases as tokens.

    A C G T N = 0 1 2 3 4. Lower case reads as upper case, U as T, and the letters that stand for
    several bases (R, Y, ...) as N.

Tasks come as folders in one of two layouts, compressed or not:

    train.csv dev.csv test.csv          `sequence,label`, label 0, 1, ...     (GUE)
    train/CLASS/*.txt test/CLASS/*.txt  one sequence a file                   (GenomicBenchmarks)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from titans.data.documents import csv_rows, open_text

BASES = "ACGTN"
UNKNOWN = BASES.index("N")
DEV_FRACTION = 0.1
LABEL_DIGITS = 4  # there are as many classes as the largest label says

_NONE = 255
_CODES = np.full(256, _NONE, dtype=np.uint8)
for _letters, _code in [("A", 0), ("C", 1), ("G", 2), ("TU", 3), ("NRYSWKMBDHV", UNKNOWN)]:
    for _letter in _letters + _letters.lower():
        _CODES[ord(_letter)] = _code
_COMPLEMENT = np.array([3, 2, 1, 0, UNKNOWN], dtype=np.uint8)

Codes = UInt8[np.ndarray, "_"]


class Labelled(NamedTuple):
    """sequences: base codes, of any lengths. labels: class of each."""

    sequences: list[np.ndarray]
    labels: Int64[np.ndarray, " sequences"]


@dataclass(frozen=True, kw_only=True)
class DNATask:
    """A classification task. split: how dev was come by, in words."""

    name: str
    classes: tuple[str, ...]
    train: Labelled
    dev: Labelled
    test: Labelled
    split: str


def encode_bases(text: str, where: str = "sequence") -> Codes:
    """Letters -> codes. ValueError, naming `where` and the letter, for what is no base."""
    raw = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    codes = _CODES[raw]
    if (codes == _NONE).any():
        at = int((codes == _NONE).argmax())
        raise ValueError(f"{where}: expected bases (A, C, G, T, N), got {chr(raw[at])!r}")
    return codes


def decode_bases(codes: Codes) -> str:
    return np.frombuffer(BASES.encode(), dtype=np.uint8)[codes].tobytes().decode()


def reverse_complement(codes: Codes) -> Codes:
    """The other strand, in its own reading direction."""
    return _COMPLEMENT[codes[::-1]]


def read_fasta(path: str | Path) -> Iterator[tuple[str, Codes]]:
    """(name, codes) of every record of a FASTA file, which may be compressed (.gz, .bz2).

    Raises ValueError, in one line that names the file: missing, unreadable, no header before
    the first bases, a record without bases, a letter that is no base.
    """
    path = Path(path)
    name: str | None = None
    lines: list[str] = []
    with open_text(path, "utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            line = line.strip()
            if line.startswith(">"):
                if name is not None:
                    yield name, record(lines, path, name)
                name, lines = line[1:].strip(), []
            elif line:
                if name is None:
                    raise ValueError(f"{path}:{number}: expected a FASTA header ('>...') first")
                lines.append(line)
    if name is None:
        raise ValueError(f"{path}: no FASTA record in it")
    yield name, record(lines, path, name)


def record(lines: list[str], path: Path, name: str) -> Codes:
    if not lines:
        raise ValueError(f"{path}: record {name!r} has no bases")
    return encode_bases("".join(lines), f"{path}: record {name!r}")


def read_task(folder: str | Path, seed: int = 0) -> DNATask:
    """The task in a folder of either layout.

    Without sequences of its own to validate on (GenomicBenchmarks), dev is a tenth of train,
    drawn with `seed`. Raises ValueError, in one line, for a folder of neither layout, and for
    a sequence or label that cannot be read, naming file and line.
    """
    folder = Path(folder)
    if (table := find_table(folder, "train")) is not None:
        return read_gue(folder, table)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return read_genomic_benchmark(folder, seed)
    raise ValueError(
        f"{folder}: expected train, dev and test.csv[.gz], or the folders train/CLASS and "
        "test/CLASS"
    )


def read_gue(folder: Path, train: Path) -> DNATask:
    tables = {"train": train}
    for part in ("dev", "test"):
        table = find_table(folder, part)
        if table is None:
            raise ValueError(f"{folder}: expected {part}.csv or {part}.csv.gz beside {train.name}")
        tables[part] = table
    parts = {part: read_table(table) for part, table in tables.items()}
    count = 1 + max(int(p.labels.max()) for p in parts.values())
    known = {sequence.tobytes() for sequence in parts["train"].sequences}
    again = sum(sequence.tobytes() in known for sequence in parts["test"].sequences)
    return DNATask(
        name=folder.resolve().name,
        classes=tuple(map(str, range(max(count, 2)))),
        **parts,
        split="train, dev and test as published; "
        f"{again} of {len(parts['test'].sequences):,} test sequences stand in train as well",
    )


def find_table(folder: Path, part: str) -> Path | None:
    paths = (folder / f"{part}.csv{suffix}" for suffix in ("", ".gz", ".bz2"))
    return next((path for path in paths if path.is_file()), None)


def read_table(path: Path) -> Labelled:
    """`sequence,label` with that header."""
    sequences, labels = [], []
    with open_text(path, "utf-8-sig") as stream:
        rows = csv_rows(stream, path)
        _, header = next(rows, ("", []))
        if header != ["sequence", "label"]:
            raise ValueError(f"{path}:1: expected the header sequence,label, got {header}")
        for where, row in rows:
            if len(row) != 2 or not row[0] or not row[1].isdecimal() or len(row[1]) > LABEL_DIGITS:
                got = [text if len(text) < 40 else f"{text[:40]}..." for text in row]
                raise ValueError(
                    f"{where}: expected a sequence and a label 0, 1, ... of at most "
                    f"{LABEL_DIGITS} digits, got {got}"
                )
            sequences.append(encode_bases(row[0], where))
            labels.append(int(row[1]))
    if not sequences:
        raise ValueError(f"{path}: no sequences in it")
    return Labelled(sequences, np.array(labels, dtype=np.int64))


def read_genomic_benchmark(folder: Path, seed: int) -> DNATask:
    classes = tuple(sorted(p.name for p in (folder / "train").iterdir() if p.is_dir()))
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'}: expected a folder for each of two classes or more")
    tested = tuple(sorted(p.name for p in (folder / "test").glob("*") if p.is_dir()))
    if not set(tested) <= set(classes):
        raise ValueError(
            f"{folder}: expected the classes of train, {classes}, in test, got {tested}"
        )
    parts = {part: read_class_folders(folder / part, classes) for part in ("train", "test")}
    whole = parts["train"]
    order = np.random.default_rng(seed).permutation(len(whole.labels))
    held_out = max(1, round(DEV_FRACTION * len(order)))
    return DNATask(
        name=folder.resolve().name,
        classes=classes,
        train=select(whole, order[held_out:]),
        dev=select(whole, order[:held_out]),
        test=parts["test"],
        split=f"train and test as published; dev is {held_out} of train, drawn with seed {seed}",
    )


def read_class_folders(folder: Path, classes: tuple[str, ...]) -> Labelled:
    sequences, labels = [], []
    for label, name in enumerate(classes):
        files = sorted((folder / name).glob("*.txt*"))
        if not files:
            raise ValueError(f"{folder / name}: expected sequences in .txt files")
        for path in files:
            with open_text(path, "utf-8-sig") as stream:
                text = "".join(stream.read().split())
            if not text:
                raise ValueError(f"{path}: no sequence in it")
            sequences.append(encode_bases(text, str(path)))
            labels.append(label)
    return Labelled(sequences, np.array(labels, dtype=np.int64))


def select(data: Labelled, at: Int64[np.ndarray, " n"]) -> Labelled:
    return Labelled([data.sequences[i] for i in at], data.labels[at])
