"""Answers as server-sent events, made by a task that ends when the client goes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from titans.serve.errors import body_of, describe, encode

AHEAD = 4  # events made before the client has taken them
T = TypeVar("T")
Emit = Callable[[bytes], Awaitable[None]]


def event(content: Any, name: str | None = None) -> bytes:
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + encode(content) + b"\n\n"


class Events(StreamingResponse):
    """Whatever way the response ends, its task is told."""

    def __init__(self, content: AsyncIterator[bytes], task: "asyncio.Task[None]") -> None:
        super().__init__(content, media_type="text/event-stream")
        self.task = task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.task.cancel()


async def while_wanted(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`work`, cancelled when the client goes. The request's body must have been taken."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def respond(
    request: Request,
    produce: Callable[[Emit], Coroutine[Any, Any, None]],
    *,
    named: bool = False,
    takes_body: bool = False,
) -> Response:
    """`produce(emit)` as a response. What it raises before its first event is raised here, and
    becomes an ordinary answer; later it is an event (`error`, where events are named).

    The task is cancelled when the client is gone: what must be finished, it does then. takes_body:
    `produce` reads the request's body, and so notices itself if the client goes until then.
    """
    queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(AHEAD)

    async def work() -> None:
        try:
            await produce(queue.put)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    task = asyncio.create_task(work())
    tasks: set[asyncio.Task[None]] = request.app.state.tasks
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    try:
        first = await (queue.get() if takes_body else while_wanted(request, queue.get()))
    except (asyncio.CancelledError, ClientDisconnect):
        task.cancel()
        raise
    if isinstance(first, Exception):
        raise first

    async def content() -> AsyncIterator[bytes]:
        item: bytes | Exception | None = first
        while isinstance(item, bytes):
            yield item
            item = await queue.get()
        if isinstance(item, Exception):
            yield event(body_of(*describe(item)), "error" if named else None)

    return Events(content(), task)
