"""Reading into a session: text arrives, pieces are computed, a commit makes them count."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titans.inspect import Observation
from titans.models.lm import TitansLM
from titans.serve.engine import Engine, Step
from titans.serve.store import Session, Store
from titans.state import ModelState

PIECE = 256
OBSERVED_PIECE = 64
REREAD_PIECE = 2048
SOME = 2**14


@dataclass(frozen=True, kw_only=True)
class Reread:
    """A memory of tokens that a session holds already, and what reading them was like."""

    state: ModelState
    logits: Tensor | None
    nll_sum: float
    nll_count: int
    last_nll: float | None


class Reader:
    """Reads into a session that is held. Until `commit`, and without one, nothing has changed."""

    def __init__(self, store: Store, session: Session, state: ModelState) -> None:
        self.store, self.session, self.state = store, session, state
        self.model = store.model_of(session)
        self.log = store.folder.append_to(session.record)
        self.logits: Tensor | None = None
        self.nll_sum, self.nll_count, self.last_nll = 0.0, 0, session.record.last_nll

    async def read(self, tokens: np.ndarray, observed: bool = False) -> Step:
        """One piece, (T,) token ids."""
        step = await self.store.engine.forward(
            self.model, tokens.tolist(), self.state, self.logits, observed
        )
        self.log.append(tokens)
        self.state, self.logits = step.state, step.logits
        if (known := known_nll(step)) is not None:
            self.nll_sum += float(known.sum())
            self.nll_count += len(known)
            self.last_nll = float(known[-1])
        return step

    async def commit(self) -> None:
        """All that was read until now, on disk. ValueError if it made the memory non-finite."""
        record, count = self.session.record, self.log.count
        await asyncio.to_thread(self.log.finish)
        await self.store.commit(
            self.session,
            replace(
                record,
                tokens_read=self.state.position,
                logged=record.logged + count,
                nll_sum=record.nll_sum + self.nll_sum,
                nll_count=record.nll_count + self.nll_count,
                last_nll=self.last_nll,
            ),
            self.state,
        )
        self.store.engine.metrics.tokens_read += count


@contextlib.asynccontextmanager
async def reading(store: Store, id: str) -> AsyncIterator[Reader]:
    """Hold the session and read into it."""
    async with store.hold(id) as session:
        reader = Reader(store, session, await store.state(session))
        try:
            yield reader
        finally:
            reader.log.close(session.record)


async def reread(
    engine: Engine, model: TitansLM, tokens: np.ndarray, state: ModelState | None
) -> Reread:
    """Read (n,) tokens after `state` (None: M_0) again, in no session: piece by piece, so that
    others are served in between."""
    if state is None:
        with torch.no_grad():
            state = model.init_state(1).fork()
    logits = None
    total, count, last = 0.0, 0, None
    size = piece_size(model, REREAD_PIECE)
    async for piece in in_pieces(once(tokens), state.position, size):
        step = await engine.forward(model, piece.tolist(), state, logits)
        state, logits = step.state, step.logits
        if (known := known_nll(step)) is not None:
            total, count, last = total + float(known.sum()), count + len(known), float(known[-1])
    return Reread(state=state, logits=logits, nll_sum=total, nll_count=count, last_nll=last)


async def rewrite(store: Store, session: Session, tokens: np.ndarray, new: Reread) -> None:
    """Another past, (n,) token ids, for a session that is held; on disk when it returns."""
    store.model_of(session).check_state(new.state, 1)
    record = replace(
        session.record,
        tokens_read=new.state.position,
        nll_sum=new.nll_sum,
        nll_count=new.nll_count,
        last_nll=new.last_nll,
    )
    await store.commit(session, record, new.state, tokens)


def known_nll(step: Step) -> Tensor | None:
    """Of the tokens that something predicted, in float64; None if there are none."""
    known = step.nll[~step.nll.isnan()].double()
    return known if len(known) else None


async def once(tokens: np.ndarray) -> AsyncIterator[np.ndarray]:
    """A text that is there, some of it at a time: what is cut from it is copied."""
    for start in range(0, len(tokens), SOME):
        yield tokens[start : start + SOME]


async def in_pieces(
    source: AsyncIterator[np.ndarray], position: int, size: int
) -> AsyncIterator[np.ndarray]:
    """Tokens cut where the position in the session is a multiple of `size`, however they come:
    then sessions stand at the same places of their chunks, and can be computed together."""
    held = np.zeros(0, np.int64)
    async for tokens in source:
        held = np.concatenate([held, tokens])
        while len(held) >= (room := size - position % size):
            yield held[:room]
            held, position = held[room:], position + room
    if len(held):
        yield held


def piece_size(model: TitansLM, wanted: int) -> int:
    """About `wanted`, and whole chunks and segments where these are shorter."""
    unit = math.lcm(model.config.memory.chunk_size, model.config.segment)
    return wanted if unit > wanted else wanted - wanted % unit


def to_json(seen: Observation, texts: list[str], start: int) -> dict[str, Any]:
    """An event `piece`: numbers as the library has them, [memories][heads][T] and
    [memories][heads]."""

    def per_token(values: Tensor | None) -> Any:
        return None if values is None else plain(values[0].permute(1, 2, 0))

    return {
        "start": start,
        "text": texts,
        "ids": seen.tokens[0].tolist(),
        "nll": plain(seen.nll[0]),
        "surprise": per_token(seen.surprise),
        "learning_rate": per_token(seen.learning_rate),
        "momentum": per_token(seen.momentum),
        "decay": per_token(seen.decay),
        "past_surprise": None if seen.past_surprise is None else plain(seen.past_surprise[0]),
        "moved": plain(seen.moved[0]),
    }


def plain(values: Tensor) -> Any:
    """Nested lists of numbers; None where there is no finite one."""

    def clean(node: Any) -> Any:
        if isinstance(node, list):
            return [clean(child) for child in node]
        return node if math.isfinite(node) else None

    return clean(values.tolist())
