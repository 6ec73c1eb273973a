"""The session API: what `POST /v1/sessions/...` and its kin do."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from titans.data.told import Decoder
from titans.generate import Sampling
from titans.serve.answering import Ask, answer, prompted
from titans.serve.body import Fields, chunks, json_object, media_type
from titans.serve.errors import JSON, ApiError
from titans.serve.events import Emit, event, respond, while_wanted
from titans.serve.reading import (
    OBSERVED_PIECE,
    PIECE,
    Reader,
    in_pieces,
    piece_size,
    reading,
    to_json,
)
from titans.serve.store import Session, Store
from titans.serve.text import Encoder

MEMORY_TYPE = "application/octet-stream"
HEADER_BYTES = 2**20  # of a memory file, beside its tensors
MOST_STOPS = 16


def store_of(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def describe_session(session: Session) -> dict[str, Any]:
    record = session.record
    mean = record.nll_sum / record.nll_count if record.nll_count else None
    return {
        "id": record.id,
        "name": record.name,
        "model": record.model,
        "parent": record.parent,
        "created": record.created,
        "used": record.used,
        "tokens_read": record.tokens_read,
        "state_bytes": record.state_bytes,
        "surprise": {
            "mean_nll": mean,
            "bits_per_token": None if mean is None else mean / math.log(2),
            "last_nll": record.last_nll,
        },
    }


async def create(request: Request) -> Response:
    store = store_of(request)
    if media_type(request) == MEMORY_TYPE:
        session = await create_from_file(request, store)
    else:
        fields = await json_object(request)
        model, name, fork = fields.text("model"), fields.take("name"), fields.text("fork")
        fields.finish()
        if fork is None:
            session = await store.create(model, name)
        elif model is not None:
            raise ValueError("expected one of model and fork, got both")
        else:
            session = await store.fork(fork, name)
    return JSON(describe_session(session), 201, headers={"Location": f"/v1/sessions/{session.id}"})


async def create_from_file(request: Request, store: Store) -> Session:
    largest = max(state.nbytes for state in store.initial.values())
    limit = min(store.settings.body_bytes, largest + HEADER_BYTES)
    query = request.query_params
    with store.folder.upload() as upload:
        async for chunk in chunks(request, limit):
            upload.write(chunk)
        return await store.load(upload.path, query.get("model"), query.get("name"))


async def list_all(request: Request) -> Response:
    sessions = store_of(request).sessions.values()
    return JSON({"sessions": [describe_session(session) for session in sessions]})


async def show(request: Request) -> Response:
    return JSON(describe_session(store_of(request).find(request.path_params["id"])))


async def rename(request: Request) -> Response:
    fields = await json_object(request)
    name = fields.text("name")
    fields.finish()
    if name is None:
        raise ValueError("name is missing")
    return JSON(describe_session(await store_of(request).rename(request.path_params["id"], name)))


async def delete(request: Request) -> Response:
    await store_of(request).delete(request.path_params["id"])
    return Response(status_code=204)


async def reset(request: Request) -> Response:
    (await json_object(request)).finish()
    return JSON(describe_session(await store_of(request).reset(request.path_params["id"])))


async def download(request: Request) -> Response:
    """The state file of the last commit, as it lies on the disk."""
    store = store_of(request)
    session = store.find(request.path_params["id"])
    content = await store.stored(session, Path.read_bytes)
    name = f"{session.record.name}.memory"
    plain = "".join(c if c.isascii() and (c.isalnum() or c in " ._-") else "_" for c in name)
    disposition = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
    return Response(content, media_type=MEMORY_TYPE, headers={"Content-Disposition": disposition})


async def read(request: Request) -> Response:
    """Answered at the end, with all of the text read or none; or, as events, piece by piece."""
    if media_type(request) != "text/plain":
        raise ApiError(415, "expected Content-Type: text/plain; charset=utf-8")
    charset = request.headers["content-type"].lower().partition("charset=")[2].partition(";")[0]
    if charset.strip(' "') not in ("", "utf-8", "utf8"):
        raise ApiError(415, "expected a text in UTF-8")
    size = piece_query(request)
    store_of(request).find(request.path_params["id"])
    if "text/event-stream" in request.headers.get("accept", ""):
        return await read_as_events(request, size or OBSERVED_PIECE)
    return await read_at_once(request, size or PIECE)


def piece_query(request: Request) -> int | None:
    given = request.query_params.get("piece")
    if given is None:
        return None
    short = given.isascii() and given.isdigit() and len(given) <= len(str(PIECE))
    if not short or not 1 <= int(given) <= PIECE:
        raise ValueError(f"piece must be an integer in 1..{PIECE}, got {given!r:.50}")
    return int(given)


async def read_at_once(request: Request, size: int) -> Response:
    """While it arrives, in constant memory."""
    store = store_of(request)
    async with reading(store, request.path_params["id"]) as reader:
        source = chunks(request, store.settings.body_bytes)
        async for tokens in pieces_of(store, reader, source, size):
            await reader.read(tokens)
        check_not_empty(reader)
        if await request.is_disconnected():  # nobody will hear that it was read
            raise ClientDisconnect
        count = reader.log.count
        await reader.commit()
        return JSON({**describe_session(reader.session), "read": count})


async def read_as_events(request: Request, size: int) -> Response:
    """The body is taken in whole (to the disk) before the first event: a client that sends all
    before it listens would wait for us, and we for it.

    What was read counts when the client goes, when a later part turns out not to be text, and
    when somebody calls the session's `stop`: then `done` follows at once.
    """
    store, stopped = store_of(request), asyncio.Event()

    def stop() -> bool:
        stopped.set()
        return True

    async def produce(emit: Emit) -> None:
        with store.folder.upload() as upload:
            async for chunk in chunks(request, store.settings.body_bytes):
                upload.write(chunk)
            async with reading(store, request.path_params["id"]) as reader:
                decoder = Decoder(store.tokenizer)
                reader.session.stop = stop
                try:
                    async for tokens in pieces_of(store, reader, upload.blocks(), size):
                        start = reader.state.position
                        step = await reader.read(tokens, observed=True)
                        assert step.observation is not None
                        texts = [decoder.feed(token) for token in tokens.tolist()]
                        await emit(event(to_json(step.observation, texts, start), "piece"))
                        if stopped.is_set():
                            break
                    check_not_empty(reader)
                finally:
                    if count := reader.log.count:
                        await reader.commit()
                done = {**describe_session(reader.session), "read": count}
                await emit(event(done, "done"))

    return await respond(request, produce, named=True, takes_body=True)


async def pieces_of(
    store: Store, reader: Reader, source: AsyncIterator[bytes], size: int
) -> AsyncIterator[np.ndarray]:
    """The tokens of a text that comes as bytes, in pieces to compute."""
    encoder = Encoder(store.tokenizer)

    async def tokens() -> AsyncIterator[np.ndarray]:
        async for chunk in source:
            yield encoder.feed(chunk)
        yield encoder.feed(b"", last=True)

    async for piece in in_pieces(tokens(), reader.state.position, piece_size(reader.model, size)):
        yield piece


def check_not_empty(reader: Reader) -> None:
    if not reader.log.count:
        raise ValueError("the text is empty: expected at least one token")


async def ask(request: Request) -> Response:
    """The session stays as it is."""
    store = store_of(request)
    session = store.find(request.path_params["id"])
    fields = await json_object(request)
    prompt = fields.text("prompt")
    if prompt is None:
        raise ValueError("prompt is missing")
    how, streamed = take_ask(fields, store, 256), fields.flag("stream")
    fields.finish()
    tokens = check_prompt(store, await store.encode(prompt))
    model, state = store.model_of(session), await store.state(session)

    async def produce(emit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        start = await prompted(store.engine, model, state, tokens)
        text, ids, finish = "", [], None
        async for delta in answer(store.engine, model, store.tokenizer, start, how):
            text, finish = text + delta.text, delta.finish
            ids += [] if delta.token is None else [delta.token]
            if delta.text:
                await emit({"text": delta.text})
        return {
            "text": text,
            "ids": ids,
            "tokens": len(ids),
            "finish_reason": finish,
            "nll_prompt": start.nll,
        }

    if not streamed:
        return JSON(await while_wanted(request, produce(ignore)))

    async def as_events(emit: Emit) -> None:
        done = await produce(lambda content: emit(event(content, "delta")))
        await emit(event(done, "done"))

    return await respond(request, as_events, named=True)


async def ignore(content: dict[str, Any]) -> None:
    pass


def take_ask(fields: Fields, store: Store, max_tokens: int) -> Ask:
    """What ask and completions have in common."""
    return Ask(
        sampling=Sampling(
            temperature=fields.number("temperature", 1.0),
            top_p=fields.number("top_p", None),
            seed=fields.integer("seed", None, -(2**63), 2**63 - 1),
        ),
        max_tokens=fields.integer(
            "max_tokens", min(max_tokens, store.settings.max_tokens), 1, store.settings.max_tokens
        ),
        stop=fields.texts("stop", MOST_STOPS),
    )


def check_prompt(store: Store, tokens: list[int]) -> list[int]:
    if not 0 < len(tokens) <= store.settings.prompt_tokens:
        raise ValueError(
            f"the prompt must have 1 to {store.settings.prompt_tokens:,} tokens, "
            f"got {len(tokens):,}"
        )
    return tokens


ROUTES = [
    Route("/v1/sessions", create, methods=["POST"]),
    Route("/v1/sessions", list_all, methods=["GET"]),
    Route("/v1/sessions/{id}", show, methods=["GET"]),
    Route("/v1/sessions/{id}", rename, methods=["PATCH"]),
    Route("/v1/sessions/{id}", delete, methods=["DELETE"]),
    Route("/v1/sessions/{id}/read", read, methods=["POST"]),
    Route("/v1/sessions/{id}/ask", ask, methods=["POST"]),
    Route("/v1/sessions/{id}/reset", reset, methods=["POST"]),
    Route("/v1/sessions/{id}/memory", download, methods=["GET"]),
]
