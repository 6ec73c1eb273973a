"""Documents from files, folders and the Hugging Face hub, one after the other."""

import bz2
import codecs
import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".text", ".jsonl"})

STDIN = Path("standard input")  # stands for it, itself and no equal one
AUTO = "auto"  # an encoding: see `read_documents`
_COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open}
_HUB_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# The title between the stars may run over a line end, but not on for ever.
_GUTENBERG_START = re.compile(
    r"^\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG[^*]{0,400}\*\*\*",
    re.MULTILINE | re.IGNORECASE,
)
# Many books have a plain line "End of the Project Gutenberg EBook of ..." before the starred one.
_GUTENBERG_END = re.compile(
    r"^(\*\*\* ?END OF (THE|THIS) PROJECT|End of (the )?Project) Gutenberg",
    re.MULTILINE | re.IGNORECASE,
)


class Document(NamedTuple):
    """One text that stands for itself: nothing before or after it belongs to it."""

    name: str
    """Where it came from: a path, with a line number for JSONL."""
    text: str


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """Of a setting, `$NAME` and `~` replaced; ValueError naming a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            raise ValueError(f"{match.string}: the environment variable {name} is not set")
        return os.environ[name]

    pattern = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
    return [Path(pattern.sub(value, os.fspath(path))).expanduser() for path in paths]


def read_documents(
    paths: str | Path | Iterable[str | Path],
    text_key: str = "text",
    strip_gutenberg: bool = False,
    encoding: str = "utf-8-sig",
) -> Iterator[Document]:
    """The documents in `paths`: files in the order given, the files of a folder sorted by path.

    A JSONL file (`.jsonl`) holds one document a line, under `text_key`, and so does a `.json` file
    that is one object with it; any other file is one document, as it stands, line ends included.
    Both may be compressed (`.gz`, `.bz2`). A folder is read recursively, and only its files with
    one of `TEXT_SUFFIXES` count; of those, files that hold no text at all are passed over.
    `strip_gutenberg` removes the header and footer of Project Gutenberg. The default encoding is
    UTF-8, with or without a byte-order mark; "auto" is that too, and Latin-1 for a file that is not
    UTF-8.

    One document is in memory at a time. All paths are looked up before the first one is read, so
    that a misspelt one is found at once.

    Raises ValueError, in one line that names the file: missing, unreadable, binary, not in
    `encoding`, no text in it, a line that is not a JSON object with a string under `text_key`.
    Also for an encoding that Python does not know.
    """
    check_encoding(encoding)
    if isinstance(paths, (str, Path)):
        paths = [paths]
    for path, files in [(path, text_files(Path(path))) for path in paths]:
        empty = True
        for file in files:
            for document in _read_file(file, text_key, encoding):
                if strip_gutenberg:
                    document = document._replace(text=without_gutenberg(document.text))
                empty = False
                yield document
        if empty:
            raise ValueError(f"{path}: no text in it")


def check_encoding(encoding: str) -> None:
    """ValueError for the name of none."""
    try:
        "".encode("utf-8" if encoding == AUTO else encoding)  # some codecs are of no text
    except LookupError as error:
        raise ValueError(f"expected the name of a text encoding, got {encoding!r}") from error


class Block(NamedTuple):
    """A part of a document. last: does the document end with it?"""

    text: str
    last: bool


def read_blocks(
    paths: Iterable[str | Path], encoding: str = "utf-8-sig", size: int = 2**20
) -> Iterator[Block]:
    """The documents of `read_documents`, of any size: as blocks of at most `size` characters.

    The path "-" is standard input, as plain text. One block is in memory at a time, a line of a
    JSONL file, or all of a `.json` file. Raises ValueError as `read_documents` does.
    """
    check_encoding(encoding)
    found = [(path, [STDIN] if str(path) == "-" else text_files(Path(path))) for path in paths]
    for path, files in found:
        empty = True
        for file in files:
            for block in _file_blocks(file, encoding, size):
                empty = False
                yield block
        if empty:
            raise ValueError(f"{path}: no text in it")


def check_readable(paths: Iterable[str | Path], encoding: str = "utf-8-sig") -> None:
    """ValueError where `read_blocks` would come to one, told before a model has read for hours.
    Standard input and pipes are read once, and not here."""
    paths = list(paths)
    if sum(str(path) == "-" for path in paths) > 1:
        raise ValueError("-: standard input can be read once, not twice")
    again = [path for path in paths if str(path) != "-" and not is_stream(Path(path))]
    for _ in read_blocks(again, encoding):
        pass


def is_stream(path: Path) -> bool:
    """A pipe, a terminal: it is there, and neither a file nor a folder."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _file_blocks(path: Path, encoding: str, size: int) -> Iterator[Block]:
    if _kind(path) in (".jsonl", ".json"):
        for document in _read_file(path, "text", encoding):
            yield Block(document.text, True)
        return
    with open_text(path, encoding_of(path, encoding)) as stream:
        text = stream.read(size)
        while text:
            if "\0" in text:
                raise ValueError(f"{path}: expected text, got binary data (it has zero bytes)")
            following = stream.read(size)
            yield Block(text, not following)
            text = following


def hub_documents(
    name: str,
    split: str = "train",
    text_key: str = "text",
    config: str | None = None,
    streaming: bool = True,
) -> Iterator[Document]:
    """The documents of a dataset on the Hugging Face hub, e.g. "HuggingFaceFW/fineweb-edu".

    `name` may also be a local folder laid out as a dataset, or one local file (.jsonl, .json, .csv,
    .parquet). `config` is the dataset's configuration, e.g. "sample-10BT". With `streaming`
    nothing is stored; without it the whole split is downloaded into the cache of `datasets` first.

    Raises ImportError without the extra `text`, and ValueError, in one line, for a dataset, split
    or column that cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("hub_documents needs `pip install -e '.[text]'`") from error
    where = f"{name} [{split}]"
    source: dict[str, Any] = {"path": name}
    if Path(name).is_file():
        # Also for a compressed file the kind is told by the inner suffix.
        kind = _kind(Path(name))
        if kind not in _HUB_BUILDERS:
            raise ValueError(f"{name}: expected one of {sorted(_HUB_BUILDERS)}, got {kind!r}")
        source = {"path": _HUB_BUILDERS[kind], "data_files": {split: name}}
    try:
        rows = datasets.load_dataset(name=config, split=split, streaming=streaming, **source)
        for number, row in enumerate(rows):
            yield Document(
                f"{where} row {number}", _text_of(row, text_key, f"{where} row {number}")
            )
    # The library's own errors, those of the network and of Arrow share no base class but Exception.
    except Exception as error:
        message = " ".join(str(error).split())
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from error


def without_gutenberg(text: str) -> str:
    """`text` without what Project Gutenberg put before and after the book.

    Either marker may be missing; with neither, the text comes back as it was.
    """
    start = _GUTENBERG_START.search(text)
    end = _GUTENBERG_END.search(text, start.end() if start else 0)
    if start is None and end is None:
        return text
    return text[start.end() if start else 0 : end.start() if end else None].strip("\r\n")


def text_files(path: Path) -> list[Path]:
    """The file itself, or the text files below a folder."""
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if _kind(f) in TEXT_SUFFIXES and f.is_file())
        if not files:
            raise ValueError(f"{path}: no text files in it ({', '.join(sorted(TEXT_SUFFIXES))})")
        return files
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    return [path]


def plain_name(path: Path) -> str:
    """Without the suffix of its compression: `a.txt` for `a.txt.gz`."""
    return path.stem if path.suffix.lower() in _COMPRESSED else path.name


def _kind(path: Path) -> str:
    """The suffix that tells what is inside: `.txt` for `a.txt.gz`."""
    return Path(plain_name(path)).suffix.lower()


def _read_file(path: Path, text_key: str, encoding: str) -> Iterator[Document]:
    """The documents of one file; none where a plain file holds no characters."""
    with open_text(path, encoding_of(path, encoding)) as stream:
        if _kind(path) == ".jsonl":
            yield from _read_lines(stream, path, text_key)
        elif text := stream.read():
            if "\0" in text:
                raise ValueError(f"{path}: expected text, got binary data (it has zero bytes)")
            yield Document(str(path), of_json(text, text_key) if _kind(path) == ".json" else text)


def of_json(content: str, text_key: str) -> str:
    """The text that a JSON object holds, as RULER's essays do; anything else as it stands."""
    try:
        held = json.loads(content)
    except (ValueError, RecursionError):
        return content
    text = held.get(text_key) if isinstance(held, dict) else None
    return text if isinstance(text, str) else content


def encoding_of(path: Path, encoding: str) -> str:
    """The encoding of a file, where "auto" leaves it open. What can be read only once, standard
    input and pipes, is UTF-8."""
    if encoding != AUTO:
        return encoding
    return "utf-8-sig" if path is STDIN or is_stream(path) or _is_utf8(path) else "latin-1"


def open_bytes(path: Path) -> BinaryIO:
    """What is in a plain or compressed file."""
    opener: Any = _COMPRESSED.get(path.suffix.lower(), open)
    stream: BinaryIO = opener(path, "rb")
    return stream


def _is_utf8(path: Path) -> bool:
    """Reads the whole file for it; one that cannot be read is told of when it is."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    try:
        with open_bytes(path) as stream:
            while block := stream.read(2**20):
                decode(block)
        decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    except (OSError, EOFError, zlib.error):
        pass
    return True


@contextmanager
def open_text(path: Path, encoding: str) -> Iterator[TextIOWrapper]:
    """Opens a plain or compressed file; whatever goes wrong in reading it names the file."""
    opener: Any = _COMPRESSED.get(path.suffix.lower(), open)
    source: Path | int = path
    if path is STDIN:
        opener, source = partial(open, closefd=False), 0
    try:
        # newline="\n" leaves "\r\n" as it is, and keeps a stray "\r" from splitting a JSON line.
        with opener(source, "rt", encoding=encoding, newline="\n") as stream:
            yield stream
    except UnicodeDecodeError as error:
        codec = "UTF-8" if encoding == "utf-8-sig" else encoding
        byte = error.object[error.start]
        raise ValueError(f"{path}: expected {codec} text, got byte 0x{byte:02x}") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read ({reason})") from error


def csv_rows(stream: Iterable[str], path: Path) -> Iterator[tuple[str, list[str]]]:
    """(where, cells) of every line that is not empty; where: "path:line", for errors.

    ValueError, in one line that names it, for what is no CSV. A cell may be as long as a genome.
    """
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(stream, strict=True)
    try:
        for row in rows:
            if row:
                yield f"{path}:{rows.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: not a line of CSV ({error})") from None


def json_line(line: str, where: str) -> Any:
    """ValueError, which says where, for what is no JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a line of JSON ({error.msg})") from error
    except RecursionError:
        raise ValueError(f"{where}: not a line of JSON (nested too deep)") from None


def _read_lines(stream: TextIOWrapper, path: Path, text_key: str) -> Iterator[Document]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        yield Document(where, _text_of(json_line(line, where), text_key, where))


def _text_of(row: Any, text_key: str, where: str) -> str:
    """The string under `text_key`, or a ValueError that starts with `where`."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if text_key not in row:
        raise ValueError(f"{where}: expected the key {text_key!r}, got {sorted(row)}")
    text = row[text_key]
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: expected a string under {text_key!r}, got {type(text).__name__}"
        )
    check_unicode(text, text_key, where)
    return text


def check_unicode(text: str, name: str, where: str) -> None:
    """ValueError, which says where, for half a surrogate pair, which JSON can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {name!r} is not valid Unicode ({error.reason})") from error
