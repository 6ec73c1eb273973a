"""Sessions on disk: a folder each, whole after every commit, whatever ends the process.

    FOLDER/.lock                one server at a time
    FOLDER/ID/session.json      a Record; names the files that belong to it
    FOLDER/ID/3.memory          the state
    FOLDER/ID/2.tokens          ids of the tokens that were read, appended to
    FOLDER/ID/origin.memory     the state before the first of them, where that is not M_0

A commit writes the new files, then renames the new session.json over the old one: that is the
moment it happens. What no session.json names is a leftover, and is removed at the start.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np

from titans.serve.errors import ApiError
from titans.state import ModelState

ID = re.compile(r"[0-9a-f]{32}")
FILE = re.compile(r"[0-9]+\.(memory|tokens)")
ORIGIN = "origin.memory"
VERSION = 1
BLOCK = 2**16

log = logging.getLogger("titans.serve")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What session.json holds. Times are seconds since 1970."""

    id: str
    name: str
    model: str
    parent: str | None
    created: float
    used: float
    tokens_read: int
    state_bytes: int
    state: str
    log: str
    logged: int
    """Tokens of the log that count; a longer file was being written when the process ended."""
    token_bytes: int
    """Of one token in the log."""
    origin: bool
    """Did the log begin at a memory that came as a file?"""
    tokenizer: str | None = None
    """Identity of what made its tokens; of sessions without it nobody knows."""
    nll_sum: float = 0.0
    nll_count: int = 0
    last_nll: float | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not fits(value, get_args(one.type) or (one.type,)):
                raise ValueError(f"{one.name} of a session.json cannot be {value!r:.50}")
        if not (ID.fullmatch(self.id) and FILE.fullmatch(self.state) and FILE.fullmatch(self.log)):
            raise ValueError("a session.json names files that are not a session's")
        if self.token_bytes not in (2, 4):
            raise ValueError(f"a session.json has tokens of {self.token_bytes} bytes")


def fits(value: Any, kinds: tuple[Any, ...]) -> bool:
    """Is it of one of these types, and where it is a number, one that can be reckoned with?"""
    if type(value) is int and int in kinds:
        return 0 <= value < 2**63
    if type(value) in (int, float) and float in kinds:
        return abs(value) < 1e300  # and no NaN
    return type(value) in kinds


def new_id() -> str:
    return secrets.token_hex(16)


class Folder:
    """All methods block and are safe to call from several threads for different sessions."""

    def __init__(self, path: Path, limit: int) -> None:
        """Take the folder, or raise ValueError where another server has it. limit: in bytes."""
        self.path, self.limit = path, limit
        self.sizes: dict[str, int] = {}
        self.promised = 0  # bytes of writes that have begun
        self.counting = threading.Lock()
        path.mkdir(parents=True, exist_ok=True)
        self.lock = (path / ".lock").open("wb")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise ValueError(f"{path}: another server keeps its sessions there") from None

    def close(self) -> None:
        self.lock.close()

    @property
    def used(self) -> int:
        return sum(list(self.sizes.values())) + self.promised

    def check_room(self, size: int) -> None:
        if self.used + size > self.limit:
            raise full(f"{self.used:,} of {self.limit:,} bytes are used, {size:,} more were needed")

    def take_room(self, name: str, size: int) -> None:
        """Count `size` bytes more for a session or an upload, if there is room."""
        with self.counting:
            self.check_room(size)
            self.sizes[name] = self.sizes.get(name, 0) + size

    def recover(self) -> list[Record]:
        """Every session, as of its last commit; what an ended process left half done is removed.

        A folder that cannot be understood is left as it is, with a warning.
        """
        records = []
        for path in sorted(self.path.iterdir()):
            if path.name.startswith((".new-", ".gone-", ".upload-")):
                remove(path)
            elif ID.fullmatch(path.name) and path.is_dir():
                try:
                    records.append(self._recover(path))
                except (OSError, ValueError, TypeError, RecursionError) as error:
                    log.warning("%s: left out, not a whole session (%s)", path, error)
        return sorted(records, key=lambda record: record.created)

    def _recover(self, path: Path) -> Record:
        content = json.loads((path / "session.json").read_text())
        if not isinstance(content, dict) or content.pop("version", None) != VERSION:
            raise ValueError(f"session.json is not of version {VERSION}")
        record = Record(**content)
        if record.id != path.name:
            raise ValueError(f"session.json is of {record.id}")
        length = record.logged * record.token_bytes
        if (path / record.log).stat().st_size < length or not (path / record.state).exists():
            raise ValueError("its log or its state is not there")
        os.truncate(path / record.log, length)
        self.sweep(record)
        return record

    def create(
        self,
        record: Record,
        state: ModelState | Path,
        origin: Path | None = None,
        tokens: Path | None = None,
    ) -> Record:
        """A new session. state, origin and tokens may be files to copy; of tokens, as many
        as the record says."""
        size = record.state_bytes + record.logged * record.token_bytes
        if origin is not None:
            size += origin.stat().st_size
        with self._safely(record.id, size):
            partial = self.path / f".new-{record.id}"
            try:
                partial.mkdir()
                put_state(partial / record.state, state, record)
                if origin is not None:
                    put_state(partial / ORIGIN, origin, record)
                copy(tokens, partial / record.log, record.logged * record.token_bytes)
                put_record(partial, record)
                partial.rename(self.path / record.id)
                sync_folder(self.path)
            finally:
                remove(partial)
        return record

    def commit(
        self, record: Record, state: ModelState | None, tokens: np.ndarray | None = None
    ) -> Record:
        """Make `record` what the session is. state: a new one, or None to keep the old.
        tokens: a whole new log, or None to keep it (then what is appended to it counts).

        Returns the record with the names of its files. Those of the last commit are still there,
        for whoever reads them: `sweep` when nobody is told of them any more.
        """
        path = self.path / record.id
        if state is not None:
            record = replace(record, state=f"{next_number(record.state)}.memory")
        if tokens is not None:
            record = replace(record, log=f"{next_number(record.log)}.tokens", logged=len(tokens))
        size = 0 if state is None else state.nbytes
        size += 0 if tokens is None else len(tokens) * record.token_bytes
        with self._safely(record.id, size):
            try:
                if state is not None:
                    put_state(path / record.state, state, record)
                if tokens is not None:
                    with (path / record.log).open("wb") as file:
                        tokens.astype(f"<u{record.token_bytes}").tofile(file)
                        sync(file)
                put_record(path, record)
            except BaseException:
                self._discard_new(path, record)
                raise
        return record

    def _discard_new(self, path: Path, record: Record) -> None:
        """After a commit that failed: the files of the session.json that stands stay."""
        with contextlib.suppress(OSError, ValueError):
            content = json.loads((path / "session.json").read_text())
            for name in {record.state, record.log} - {content["state"], content["log"]}:
                (path / name).unlink(missing_ok=True)

    def append_to(self, record: Record) -> "Log":
        return Log(self, record)

    def delete(self, record: Record) -> None:
        """Gone at once; the files follow."""
        gone = self.path / f".gone-{record.id}"
        with self._safely(record.id, 0):
            (self.path / record.id).rename(gone)
            sync_folder(self.path)
        self.sizes.pop(record.id, None)
        remove(gone)

    def file(self, record: Record, name: str) -> Path:
        return self.path / record.id / name

    def tokens(self, record: Record) -> np.ndarray:
        """The log, (logged,) unsigned integers; read only, mapped from the file."""
        kind = np.dtype(f"<u{record.token_bytes}")
        if not record.logged:
            return np.zeros(0, kind)
        path = self.file(record, record.log)
        return np.memmap(path, kind, "r", shape=(record.logged,))

    @contextlib.contextmanager
    def upload(self) -> Iterator["Upload"]:
        """A file for a request's body; gone when the request is."""
        handle, name = tempfile.mkstemp(prefix=".upload-", dir=self.path)
        try:
            with os.fdopen(handle, "w+b") as file:
                yield Upload(self, Path(name), file)
        finally:
            self.sizes.pop(Path(name).name, None)
            Path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _safely(self, id: str, size: int) -> Iterator[None]:
        """A write of about `size` bytes: what the disk refuses is an answer, sizes stay true.

        The bytes are promised before the first is written, so that several writes at once stay
        below the limit together. A file that is gone (`FileNotFoundError`) is the caller's matter.
        """
        with self.counting:
            if size:
                self.check_room(size)
            self.promised += size
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            log.warning("session %s: %s", id, error)
            raise full(error.strerror or str(error)) from error
        finally:
            with self.counting:
                self.promised -= size
                self.measure(id)

    def measure(self, id: str) -> None:
        try:
            self.sizes[id] = sum(f.stat().st_size for f in (self.path / id).iterdir())
        except FileNotFoundError:
            self.sizes.pop(id, None)

    def sweep(self, record: Record) -> None:
        """Remove what the record does not name."""
        path = self.path / record.id
        kept = {"session.json", record.state, record.log, *([ORIGIN] if record.origin else [])}
        for file in path.iterdir():
            if file.name not in kept:
                file.unlink()
        self.measure(record.id)


class Log:
    """The open log of a session that is being read into. Only a commit makes it count."""

    def __init__(self, folder: Folder, record: Record) -> None:
        self.folder, self.record = folder, record
        self.count = 0
        self.file = folder.file(record, record.log).open("r+b")
        self.file.truncate(record.logged * record.token_bytes)
        self.file.seek(0, os.SEEK_END)

    def append(self, tokens: np.ndarray) -> None:
        content = tokens.astype(f"<u{self.record.token_bytes}").tobytes()
        self.folder.take_room(self.record.id, len(content))
        try:
            self.file.write(content)
        except OSError as error:
            raise full(error.strerror or str(error)) from error
        self.count += len(tokens)

    def finish(self) -> None:
        """All of it is on the disk."""
        try:
            sync(self.file)
        except OSError as error:
            raise full(error.strerror or str(error)) from error

    def close(self, record: Record) -> None:
        """Cut back to what counts by now, as `record` says."""
        with contextlib.suppress(OSError):  # of a full disk, for the second time
            self.file.close()
        with contextlib.suppress(OSError):
            os.truncate(self.folder.file(record, record.log), record.logged * record.token_bytes)
        self.folder.measure(record.id)


class Upload:
    """A request's body on disk."""

    def __init__(self, folder: Folder, path: Path, file: IO[bytes]) -> None:
        self.folder, self.path, self.file = folder, path, file

    async def blocks(self) -> AsyncIterator[bytes]:
        """What was written, from its beginning."""
        self.file.seek(0)
        while block := await asyncio.to_thread(self.file.read, BLOCK):
            yield block

    def write(self, chunk: bytes) -> None:
        self.folder.take_room(self.path.name, len(chunk))
        try:
            self.file.write(chunk)
            self.file.flush()
        except OSError as error:
            raise full(error.strerror or str(error)) from error


def full(reason: str) -> ApiError:
    message = f"there is no room on the disk ({reason}); nothing was changed"
    return ApiError(507, message, "storage_full")


def next_number(name: str) -> int:
    return int(name.partition(".")[0]) + 1


def put_state(path: Path, state: ModelState | Path, record: Record) -> None:
    """A file that notes its tokenizer, as `titans memory` wants it; or a copy of one."""
    if isinstance(state, ModelState):
        state.save(path, None if record.tokenizer is None else {"tokenizer": record.tokenizer})
    else:
        copy(state, path, state.stat().st_size)


def copy(source: Path | None, target: Path, size: int) -> None:
    """The first `size` bytes, on the disk when this returns; without a source, an empty file."""
    with target.open("w+b") as file:
        if source is not None:
            with source.open("rb") as original:
                shutil.copyfileobj(original, file)
            file.truncate(size)
        sync(file)


def put_record(path: Path, record: Record) -> None:
    partial = path / "session.json.part"
    with partial.open("w") as file:
        json.dump({"version": VERSION, **asdict(record)}, file)
        sync(file)
    sync_folder(path)  # the files it names must not be younger than it
    partial.rename(path / "session.json")
    sync_folder(path)


def sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
