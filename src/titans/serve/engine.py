"""The one thread that computes: takes what waits, runs what fits together as one batch."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans.generate import read_piece
from titans.inspect import Observation, observe
from titans.models.lm import TitansLM
from titans.serve import batch
from titans.serve.metrics import Metrics
from titans.state import ModelState

BATCH_TOKENS = 4096
SETTLE_S = 0.05
STOP_S = 5.0


class Step(NamedTuple):
    """What reading a piece gave. nll: (T,) nats, NaN where nothing was predicted. logits: (V,)
    after the piece. observation: of this session alone, batch 1, when asked for."""

    nll: Tensor
    logits: Tensor
    state: ModelState
    observation: Observation | None


@dataclass(frozen=True, kw_only=True)
class Work:
    """One piece for one session. kind: works of equal kind may share a batch."""

    model: TitansLM
    tokens: Tensor
    state: ModelState
    logits: Tensor | None
    observed: bool
    write: bool
    kind: Hashable
    future: asyncio.Future[Step]


@dataclass(frozen=True, kw_only=True)
class Call:
    """Any other computation; alone on the thread."""

    function: Callable[[], Any]
    future: asyncio.Future[Any]


class Engine:
    """`await engine.forward(...)` from any number of tasks of one event loop."""

    def __init__(self, metrics: Metrics, rows: int = 32) -> None:
        self.metrics, self.rows = metrics, rows
        self.queue: deque[Work | Call] = deque()
        self.changed = threading.Condition()
        self.stopping = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, name="titans-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve the running event loop."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """Finish what is being computed, unless that takes long, and end."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join(STOP_S)  # a daemon: the process does not wait for it

    async def forward(
        self,
        model: TitansLM,
        tokens: Sequence[int] | Tensor,
        state: ModelState,
        logits: Tensor | None = None,
        observed: bool = False,
        write: bool = True,
    ) -> Step:
        """Read tokens (T,). logits (V,): what was predicted for the first of them. write=False
        only reads the memories.

        Raises ValueError for tokens or a state that are not the model's.
        """
        rows = torch.as_tensor(tokens, dtype=torch.int64)[None]
        model.check_tokens(rows)
        model.check_state(state, 1)
        kind = (id(model), rows.shape[1], observed, write, batch.phase(state))
        future: asyncio.Future[Step] = asyncio.get_running_loop().create_future()
        return await self._submit(
            Work(
                model=model,
                tokens=rows,
                state=state,
                logits=logits,
                observed=observed,
                write=write,
                kind=kind,
                future=future,
            )
        )

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run any function on the thread; nothing else is computed meanwhile."""
        return await self._submit(
            Call(function=function, future=asyncio.get_running_loop().create_future())
        )

    async def _submit(self, item: Work | Call) -> Any:
        with self.changed:
            if self.stopping:
                raise RuntimeError("the server is stopping")
            self.queue.append(item)
            self.changed.notify()
        return await item.future

    def _run(self) -> None:
        while (items := self._take()) is not None:
            if not items:  # all were cancelled while they were looked at
                continue
            begin = time.perf_counter()
            outcomes = self._compute(items)
            self.metrics.computed(items, time.perf_counter() - begin)
            self._deliver(items, outcomes)

    def _take(self) -> list[Any] | None:
        """The item that has waited longest, and all that can be computed with it; None to stop."""
        with self.changed:
            while True:
                while self.queue and self.queue[0].future.cancelled():
                    self.queue.popleft()
                if self.stopping:
                    for item in self.queue:
                        self._settle(item, RuntimeError("the server is stopping"))
                    return None
                if self.queue:
                    break
                self.changed.wait()
            first = self.queue[0]
            if isinstance(first, Call):
                return [self.queue.popleft()]
            most = min(self.rows, max(1, BATCH_TOKENS // first.tokens.shape[1]))
            taken: list[Work] = []
            left: list[Work | Call] = []
            for item in self.queue:
                if item.future.cancelled():
                    continue
                fits = isinstance(item, Work) and item.kind == first.kind and len(taken) < most
                (taken if fits else left).append(item)  # type: ignore[arg-type]
            self.queue = deque(left)
            return taken

    def _compute(self, items: list[Any]) -> list[Any]:
        """A result or an exception for each."""
        if isinstance(items[0], Call):
            try:
                return [items[0].function()]
            except Exception as error:
                return [error]
        try:
            with torch.no_grad():
                return compute(items)
        except Exception as error:
            # A row that cannot be computed must not take the others with it.
            return [error] if len(items) == 1 else [self._compute([item])[0] for item in items]

    def _deliver(self, items: list[Any], outcomes: list[Any]) -> None:
        """Hand the results out, then give their takers a moment to come back with more: what
        walks in step stays one batch."""
        assert self.loop is not None
        settled = threading.Event()

        def settle() -> None:
            for item, outcome in zip(items, outcomes, strict=True):
                set_outcome(item.future, outcome)
            asyncio.get_running_loop().call_soon(settled.set)

        try:
            self.loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the loop has closed
            return
        settled.wait(SETTLE_S)

    def _settle(self, item: Any, outcome: Any) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(set_outcome, item.future, outcome)


def set_outcome(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():  # whoever asked has gone
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def compute(works: Sequence[Work]) -> list[Step]:
    """One forward pass for all; each gets what it would have got alone."""
    model, first = works[0].model, works[0]
    state = first.state if len(works) == 1 else batch.stack([work.state for work in works])
    tokens = torch.cat([work.tokens for work in works])
    unknown = torch.full((model.config.vocab_size,), float("nan"))
    before = torch.stack([unknown if w.logits is None else w.logits for w in works])
    run = observe if first.observed else read_piece
    seen = run(model, tokens, state, before, first.write)
    steps = []
    for index, work in enumerate(works):
        after = seen.state
        if len(works) > 1:
            after = batch.row(after, index, work.state.position + tokens.shape[1])
        observation = row_of(seen, index, after) if isinstance(seen, Observation) else None
        steps.append(Step(seen.nll[index], seen.logits[index].clone(), after, observation))
    return steps


def row_of(seen: Observation, index: int, state: ModelState) -> Observation:
    parts: dict[str, Any] = {
        name: value[index : index + 1].clone() if isinstance(value, Tensor) else value
        for name, value in seen._asdict().items()
    }
    return Observation(**parts | {"state": state})
