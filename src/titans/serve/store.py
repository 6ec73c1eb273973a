"""The sessions of a server: in memory while they are used, on disk always.

A state never changes in place, so asking takes the one of the last commit and needs no lock;
what changes a session holds it. A commit is on the disk before anyone can see it.
"""

import asyncio
import contextlib
import logging
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from titans.data.tokenizers import Tokenizer, token_dtype, tokenizer_identity
from titans.models.lm import TitansLM
from titans.serve.engine import Engine
from titans.serve.errors import ApiError
from titans.serve.folder import ID, ORIGIN, Folder, Record, new_id
from titans.serve.settings import ServeSettings
from titans.serve.validate import check_memory, load_memory
from titans.state import ModelState

log = logging.getLogger("titans.serve")
T = TypeVar("T")
NAME_LENGTH = 200


@dataclass(kw_only=True)
class Session:
    """A memory that the server holds. `state` is that of `record`, or None while on disk only."""

    record: Record
    folder: Folder
    state: ModelState | None = None
    touched: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    holder: "asyncio.Task[Any] | None" = None
    stop: Callable[[], bool] | None = None
    """Ends early what the holder does; None where it cannot be ended, or not any more."""

    @property
    def id(self) -> str:
        return self.record.id

    def tokens(self) -> np.ndarray:
        """Ids of the tokens it has read, (n,), read only: since `origin`, that is."""
        return self.folder.tokens(self.record)

    def origin(self) -> ModelState | None:
        """The state before the first of `tokens`; None is the model's M_0."""
        if not self.record.origin:
            return None
        return ModelState.load(self.folder.file(self.record, ORIGIN))


class Store:
    """Every method belongs to the event loop; what computes or blocks is handed on."""

    def __init__(
        self,
        settings: ServeSettings,
        folder: Folder,
        models: dict[str, TitansLM],
        tokenizer: Tokenizer,
        engine: Engine,
    ) -> None:
        self.settings, self.folder, self.models = settings, folder, models
        self.tokenizer, self.engine = tokenizer, engine
        self.identity = tokenizer_identity(tokenizer)
        with torch.no_grad():
            self.initial = {name: model.init_state(1).fork() for name, model in models.items()}
        self.sessions = {r.id: Session(record=r, folder=folder) for r in folder.recover()}
        self.coming = 0  # sessions that are being written for the first time

    def find(self, id: str) -> Session:
        session = self.sessions.get(id) if ID.fullmatch(id) else None
        if session is None:
            raise ApiError(404, "no such session")
        return session

    def model(self, name: str | None) -> tuple[str, TitansLM]:
        """By name; None is the first."""
        if name is None:
            name = next(iter(self.models))
        if name not in self.models:
            raise ApiError(404, f"no model {name!r:.50}; there is {', '.join(self.models)}")
        return name, self.models[name]

    def model_of(self, session: Session) -> TitansLM:
        name = session.record.model
        if name not in self.models:
            raise ApiError(409, f"this server does not have the session's model {name!r}")
        self.check_tokenizer("session", session.record.tokenizer)
        return self.models[name]

    def check_tokenizer(self, what: str, noted: Any) -> None:
        """409 where the tokens that were read would mean something else here."""
        if noted not in (None, self.identity):
            raise ApiError(
                409,
                f"the {what} was read with the tokenizer {noted!s:.50}, "
                f"this server's is {self.identity}",
            )

    async def state(self, session: Session) -> ModelState:
        """Its state as of the last commit, from the disk if need be."""
        session.touched = time.monotonic()
        model = self.model_of(session)
        state = session.state
        if state is None:
            state = await self.stored(session, ModelState.load)
            try:
                model.check_state(state, 1)
            except ValueError as error:
                raise ApiError(409, str(error)) from None
            session.state = state
        self.drop_unused()
        return state

    async def stored(self, session: Session, read: Callable[[Path], T]) -> T:
        """`read` of the state's file of the last commit, in a thread."""
        while True:
            record = session.record
            try:
                content = await asyncio.to_thread(read, self.folder.file(record, record.state))
            except (OSError, ValueError) as error:
                self.find(session.id)  # deleted meanwhile: 404
                if session.record is record:
                    log.error("session %s: %s", session.id, error)
                    raise ApiError(500, "the session's file cannot be read") from None
            else:
                if session.record is record:
                    return content

    async def encode(self, text: str) -> list[int]:
        """Its tokens, in a thread: those of a long text take seconds."""
        return await asyncio.to_thread(self.tokenizer.encode, text)

    async def past(self, session: Session) -> tuple[np.ndarray, ModelState | None]:
        """The tokens it has read as of its last commit, as `Session.tokens` has them, and the state
        before them."""
        await self.state(session)  # 409 where another model has its model's name by now
        try:
            return session.tokens(), session.origin()
        except (OSError, ValueError) as error:
            self.find(session.id)  # deleted meanwhile: 404
            log.error("session %s: %s", session.id, error)
            raise ApiError(500, "the session's file cannot be read") from None

    def drop_unused(self) -> None:
        """Forget the states, least used first, that are idle or more than memory may hold."""
        loaded = [s for s in self.sessions.values() if s.state is not None]
        held = sum(s.record.state_bytes for s in loaded)
        now = time.monotonic()
        for session in sorted((s for s in loaded if not s.holder), key=lambda s: s.touched):
            idle = now - session.touched > self.settings.idle_s
            if idle or held > self.settings.memory_bytes:
                session.state = None
                held -= session.record.state_bytes

    @contextlib.asynccontextmanager
    async def hold(self, id: str) -> AsyncIterator[Session]:
        """The session, changed by nobody else meanwhile. Within one task holds nest.

        409 when another one has it for longer than `busy_s`; 404 when it is gone by then.
        """
        session, task = self.find(id), asyncio.current_task()
        if session.holder is task:
            yield session
            return
        try:
            async with asyncio.timeout(self.settings.busy_s):
                await session.lock.acquire()
        except TimeoutError:
            raise ApiError(409, "the session is busy with another request", "busy") from None
        session.holder = task
        try:
            self.find(id)
            yield session
        finally:
            session.holder = session.stop = None
            session.lock.release()

    async def commit(
        self,
        session: Session,
        record: Record,
        state: ModelState | None = None,
        tokens: np.ndarray | None = None,
    ) -> None:
        """Make it so, on disk first. It happens or it does not, also when the task is cancelled.

        Raises ApiError 507 when the disk refuses, with the session as it was.
        """

        async def both() -> None:
            used = replace(record, used=now())
            if state is not None:
                used = replace(used, state_bytes=state.nbytes, tokenizer=self.identity)
            session.record = await asyncio.to_thread(self.folder.commit, used, state, tokens)
            if state is not None:
                session.state = state
            with contextlib.suppress(OSError):  # leftovers go at the next commit
                await asyncio.to_thread(self.folder.sweep, session.record)

        await unbroken(both())

    async def rename(self, id: str, name: Any) -> Session:
        name = valid_name(name)
        async with self.hold(id) as session:
            await self.commit(session, replace(session.record, name=name))
            return session

    async def reset(self, id: str) -> Session:
        """Back to the learned M_0, with nothing read."""
        async with self.hold(id) as session:
            self.model_of(session)
            state = self.initial[session.record.model]
            record = replace(
                session.record, tokens_read=0, nll_sum=0.0, nll_count=0, last_nll=None, origin=False
            )
            await self.commit(session, record, state, np.zeros(0, np.int64))
            return session

    async def delete(self, id: str) -> None:
        async with self.hold(id) as session:

            async def both() -> None:
                del self.sessions[id]  # from here on nobody looks for its files
                try:
                    await asyncio.to_thread(self.folder.delete, session.record)
                except BaseException:
                    self.sessions[id] = session
                    raise

            await unbroken(both())

    async def create(self, model: str | None, name: Any) -> Session:
        chosen, _ = self.model(model)
        return await self._add(self._new_record(chosen, valid_name(name)), self.initial[chosen])

    async def fork(self, id: str, name: Any) -> Session:
        """A copy of the last commit that goes its own way; it waits for no read that runs."""
        while True:
            source = self.find(id)
            old = source.record
            self.model_of(source)
            called = f"{old.name[: NAME_LENGTH - 7]} (fork)" if name is None else valid_name(name)
            record = replace(
                old, id=new_id(), name=called, parent=old.id, created=now(), used=now()
            )
            file = self.folder.file
            origin = file(old, ORIGIN) if old.origin else None
            try:
                return await self._add(record, file(old, old.state), origin, file(old, old.log))
            except FileNotFoundError as error:
                if source.record is old and self.sessions.get(id) is source:
                    log.error("session %s: %s", id, error)
                    raise ApiError(500, "the session's file cannot be read") from None
                # Its files went with another commit before they were copied: now that one.

    async def load(self, path: Path, model: str | None, name: Any) -> Session:
        """A session that goes on from a memory file. ValueError where it is not one."""
        state, notes = await asyncio.to_thread(load_memory, path)
        fitting = [n for n, m in self.models.items() if m.config_hash == state.config_hash]
        if model is not None and self.model(model)[0] not in fitting:
            raise ApiError(409, f"the memory belongs to another model than {model!r:.50}")
        if not fitting:
            raise ApiError(409, "the memory belongs to none of this server's models")
        chosen = fitting[0] if model is None else model
        self.check_tokenizer("memory", notes.get("tokenizer"))
        check_memory(state, self.models[chosen])
        record = self._new_record(chosen, valid_name(name))
        record = replace(record, tokens_read=state.position, origin=True)
        return await self._add(record, state, path)

    def _new_record(self, model: str, name: str) -> Record:
        return Record(
            id=new_id(),
            name=name,
            model=model,
            parent=None,
            created=now(),
            used=now(),
            tokens_read=0,
            state_bytes=self.initial[model].nbytes,
            state="0.memory",
            log="0.tokens",
            logged=0,
            token_bytes=token_dtype(self.models[model].config.vocab_size).itemsize,
            origin=False,
            tokenizer=self.identity,
        )

    async def _add(
        self,
        record: Record,
        state: ModelState | Path,
        origin: Path | None = None,
        tokens: Path | None = None,
    ) -> Session:
        most = self.settings.sessions
        if len(self.sessions) + self.coming >= most:
            raise ApiError(
                429, f"there are as many sessions as may be, {most}", "too_many_sessions"
            )
        held = state if isinstance(state, ModelState) else None
        session = Session(record=record, folder=self.folder, state=held)
        self.coming += 1  # it counts at once, and can be found when it is on the disk

        async def add() -> None:
            try:
                await asyncio.to_thread(self.folder.create, record, state, origin, tokens)
                self.sessions[record.id] = session
            finally:
                self.coming -= 1

        await unbroken(add())
        return session


async def unbroken(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end even when the caller is cancelled, who is then told afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # seen; the one who would want to know is gone
        raise cancelled
    return task.result()


def now() -> float:
    return round(time.time(), 3)


def valid_name(name: Any) -> str:
    """A session's name; ValueError for what no person should be shown."""
    if name is None:
        return "untitled"
    if not isinstance(name, str):
        raise ValueError(f"name must be a string, got {type(name).__name__}")
    name = name.strip()
    if not 0 < len(name) <= NAME_LENGTH:
        raise ValueError(f"name must have 1 to {NAME_LENGTH} characters, got {len(name)}")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        raise ValueError("name must not hold control characters")
    return name
