"""Prepared text: documents as tokens in memory-mapped files, in one self-contained folder.

    tokens-00000.bin ...   the documents' tokens, end to end; little-endian uint16 or uint32
    documents.bin          int64, one row (shard, start, end) a document; positions in its shard
    tokenizer.json         a copy of the tokenizer, where it came from a file
    index.json             version, tokenizer, sizes and checksums

A document lies in one shard and ends with the tokenizer's `end_of_document`.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from titans.data.documents import Document
from titans.data.tokenizers import Tokenizer, encode_document, load_tokenizer, token_dtype

VERSION = 1

_OFFSETS = np.dtype("<i8")
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class PreparedInfo:
    """What `prepare` wrote; the counts take training and validation together."""

    folder: Path
    documents: int
    tokens: int
    """Ends of documents included."""
    shards: int
    valid_documents: int
    """Of `documents`, those set aside for validation."""
    valid_tokens: int
    vocab_size: int
    dtype: str


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: str | Path,
    shard_tokens: int = 2**26,
    valid_fraction: float = 0.0,
) -> PreparedInfo:
    """Writes `documents` as a folder that `Shards.open` reads.

    With a `valid_fraction` between 0 and 1 there are two such folders, `out/train` and `out/valid`.
    Each document falls to one of them by a hash of its tokens, so that a copy of a training text is
    never validated on, and adding documents moves none.

    `shard_tokens` is where a shard is full; a longer document gets a longer shard of its own. One
    shard is held in memory. All is written beside `out` and renamed at the end: on an error nothing
    is left behind.

    Raises ValueError: `out` is not empty, no documents, an empty side of the split, numbers out of
    range, a tokenizer that is neither "bytes" nor a file, and whatever `documents` raises.
    """
    out = Path(out).absolute()
    _check_request(out, tokenizer, shard_tokens, valid_fraction)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        # An inner folder, for the outer one is private (mode 0700) and goes away.
        folder = Path(scratch) / out.name
        split = valid_fraction > 0
        train = _Writer(folder / "train" if split else folder, tokenizer, shard_tokens)
        valid = _Writer(folder / "valid", tokenizer, shard_tokens) if split else None
        for document in documents:
            tokens = encode_document(tokenizer, document.text)
            if valid is not None and _position(tokens) < valid_fraction:
                valid.add(tokens)
            else:
                train.add(tokens)
        writers = [train] if valid is None else [train, valid]
        _check_documents(writers, valid_fraction)
        for writer in writers:
            writer.finish()
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return PreparedInfo(
        folder=out,
        documents=sum(writer.documents for writer in writers),
        tokens=sum(writer.tokens for writer in writers),
        shards=sum(len(writer.shards) for writer in writers),
        valid_documents=valid.documents if valid else 0,
        valid_tokens=valid.tokens if valid else 0,
        vocab_size=tokenizer.vocab_size,
        dtype=train.dtype.name,
    )


class Shards:
    """A prepared folder, open for reading; its tokens stay on disk until they are looked at."""

    def __init__(
        self, folder: Path, index: "_Index", rows: Int64[np.ndarray, "documents 3"]
    ) -> None:
        """For `Shards.open`, which checks what it passes."""
        self.folder = folder
        self.vocab_size = index.vocab_size
        self.end_of_document = index.end_of_document
        self.tokens = index.tokens
        self._index = index
        self._rows = rows
        dtype = np.dtype(index.dtype).newbyteorder("<")
        self._shards = [
            np.asarray(np.memmap(folder / _shard_name(number), dtype=dtype, mode="r"))
            for number in range(len(index.shards))
        ]

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> "Shards":
        """Opens a folder that `prepare` wrote; `verify` also reads all of it for its checksums.

        Raises ValueError, in one line, for a folder that is not one, is of another version, or is
        damaged.
        """
        folder = Path(folder)
        index = _read_index(folder)
        itemsize = np.dtype(index.dtype).itemsize
        for number, shard in enumerate(index.shards):
            _check_size(folder / _shard_name(number), shard.tokens * itemsize)
            if verify and _checksum(folder / _shard_name(number)) != shard.sha256:
                raise ValueError(f"{folder / _shard_name(number)}: damaged (wrong checksum)")
        if index.tokenizer != "bytes" and not (folder / index.tokenizer).is_file():
            raise ValueError(f"{folder / index.tokenizer}: missing from the prepared folder")
        path = folder / "documents.bin"
        _check_size(path, index.documents * 3 * _OFFSETS.itemsize)
        rows = np.fromfile(path, dtype=_OFFSETS).reshape(index.documents, 3)
        _check_rows(path, rows, np.array([shard.tokens for shard in index.shards]))
        return cls(folder, index, rows)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self._rows)

    @property
    def lengths(self) -> Int64[np.ndarray, "documents"]:
        """Tokens in each document, its end included."""
        return self._rows[:, 2] - self._rows[:, 1]

    def document(self, number: int) -> Integer[np.ndarray, "tokens"]:
        """A read-only view of one document's tokens, the last of which is `end_of_document`."""
        if not 0 <= number < self.documents:
            raise ValueError(f"expected a document in 0..{self.documents - 1}, got {number}")
        shard, start, end = self._rows[number]
        return self._shards[shard][start:end]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the folder was prepared with."""
        name = self._index.tokenizer
        tokenizer = load_tokenizer(name if name == "bytes" else self.folder / name)
        if tokenizer.vocab_size != self.vocab_size:
            raise ValueError(
                f"{self.folder / name}: expected {self.vocab_size} tokens, "
                f"got {tokenizer.vocab_size}"
            )
        return tokenizer


@dataclass(frozen=True, kw_only=True)
class _Shard:
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Index:
    """`index.json`, field by field."""

    version: int
    tokenizer: str
    """ "bytes", or the name of the copy in the folder."""
    vocab_size: int
    end_of_document: int
    dtype: str
    documents: int
    tokens: int
    shards: list[_Shard]


class _Writer:
    """Fills one folder, shard by shard; `finish` writes what makes it readable."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        folder.mkdir(parents=True)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.documents = 0
        self.tokens = 0
        self.shards: list[_Shard] = []
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0

    def add(self, tokens: Integer[np.ndarray, "tokens"]) -> None:
        if self._pending and self._pending_tokens + len(tokens) > self._shard_tokens:
            self._flush()
        self._pending.append(tokens)
        self._pending_tokens += len(tokens)
        self.documents += 1
        self.tokens += len(tokens)

    def finish(self) -> None:
        self._flush()
        name = self._tokenizer.name
        if name != "bytes":
            shutil.copyfile(name, self._folder / _TOKENIZER)
        index = _Index(
            version=VERSION,
            tokenizer="bytes" if name == "bytes" else _TOKENIZER,
            vocab_size=self._tokenizer.vocab_size,
            end_of_document=self._tokenizer.end_of_document,
            dtype=self.dtype.name,
            documents=self.documents,
            tokens=self.tokens,
            shards=self.shards,
        )
        (self._folder / "index.json").write_text(json.dumps(asdict(index), indent=1) + "\n")

    def _flush(self) -> None:
        """Writes the pending documents as one shard."""
        path = self._folder / _shard_name(len(self.shards))
        with path.open("wb") as stream:
            for tokens in self._pending:
                stream.write(tokens.tobytes())
        ends = np.cumsum([len(tokens) for tokens in self._pending])
        starts = np.concatenate([[0], ends[:-1]])
        rows = np.stack([np.full_like(ends, len(self.shards)), starts, ends], axis=1)
        with (self._folder / "documents.bin").open("ab") as stream:
            stream.write(rows.astype(_OFFSETS).tobytes())
        self.shards.append(_Shard(tokens=self._pending_tokens, sha256=_checksum(path)))
        self._pending, self._pending_tokens = [], 0


def _check_request(
    out: Path, tokenizer: Tokenizer, shard_tokens: int, valid_fraction: float
) -> None:
    if shard_tokens < 1:
        raise ValueError(f"expected shard_tokens >= 1, got {shard_tokens}")
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"expected valid_fraction in [0, 1), got {valid_fraction}")
    if tokenizer.name != "bytes" and not Path(tokenizer.name).is_file():
        raise ValueError(
            f"expected a tokenizer called 'bytes' or the path of its file, got {tokenizer.name!r}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a new or empty folder to write to")
    if out.exists() and out.samefile(Path.cwd()):
        raise ValueError(f"{out}: is the current folder, expected another to write to")


def _check_documents(writers: list[_Writer], valid_fraction: float) -> None:
    counts = [writer.documents for writer in writers]
    if not sum(counts):
        raise ValueError("expected at least one document, got none")
    if not all(counts):
        raise ValueError(
            f"valid_fraction={valid_fraction} of {sum(counts)} documents leaves "
            f"{counts[0]} to train and {counts[1]} to validate on"
        )


def _position(tokens: np.ndarray) -> float:
    """A number in [0, 1) that depends on the tokens alone."""
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_index(folder: Path) -> _Index:
    path = folder / "index.json"
    if not path.is_file():
        hint = "; open its 'train' or 'valid'" if (folder / "train" / "index.json").exists() else ""
        raise ValueError(f"{folder}: not a prepared folder (no index.json in it){hint}")
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        version = fields["version"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    if version != VERSION:
        raise ValueError(f"{path}: expected version {VERSION}, got {version!r}")
    try:
        shards = [_Shard(**shard) for shard in fields.pop("shards")]
        index = _Index(shards=shards, **fields)
        consistent = index.tokens == sum(shard.tokens for shard in shards)
        consistent &= index.dtype == token_dtype(index.vocab_size).name
        consistent &= index.documents >= 1
        consistent &= index.tokenizer in ("bytes", _TOKENIZER)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    if not consistent:
        raise ValueError(f"{path}: damaged (its counts contradict each other)")
    return index


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: missing from the prepared folder")
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: expected {expected} bytes, got {path.stat().st_size}")


def _check_rows(path: Path, rows: np.ndarray, shard_tokens: np.ndarray) -> None:
    """Every document inside its shard; a slice out of bounds would silently be cut short."""
    shard, start, end = rows.T
    known = (shard >= 0) & (shard < len(shard_tokens))
    limit = shard_tokens[np.where(known, shard, 0)]
    if not np.all(known & (start >= 0) & (start < end) & (end <= limit)):
        raise ValueError(f"{path}: damaged (a document lies outside its shard)")
