"""The page's own routes, beside those of `titans.serve`: what it shows of a memory, and how."""

import asyncio
from dataclasses import asdict
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from titans.data.told import Decoder
from titans.generate import Sampling
from titans.inspect import distance
from titans.models.lm import TitansLM
from titans.serve.answering import Ask, whole_answer
from titans.serve.body import Fields, json_object
from titans.serve.completions import gather
from titans.serve.errors import JSON, ApiError
from titans.serve.events import Emit, event, respond, while_wanted
from titans.serve.reading import (
    OBSERVED_PIECE,
    Reread,
    in_pieces,
    once,
    piece_size,
    plain,
    reread,
    rewrite,
    to_json,
)
from titans.serve.sessions import check_prompt, describe_session, store_of, take_ask
from titans.serve.store import Session
from titans.studio import views
from titans.studio.texts import built_in_texts

PAGE = Path(str(files("titans") / "studio" / "page"))
SHOWN = 2**17  # tokens of a memory's past that the page shows again
EXPLAINED_BEFORE, EXPLAINED_AFTER = 12, 4  # tokens around the one that is explained
MOST_QUESTIONS = 32


async def page(request: Request) -> Response:
    return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})


async def info(request: Request) -> Response:
    store = store_of(request)
    return JSON(
        {
            "models": [views.describe_model(name, model) for name, model in store.models.items()],
            "attention": request.app.state.attention is not None,
        }
    )


@cache
def texts() -> list[dict[str, object]]:
    return [text.as_json() for text in built_in_texts()]


async def list_texts(request: Request) -> Response:
    return JSON({"texts": texts()})


async def history(request: Request) -> Response:
    """What a memory has read, as events like those of reading it; long pasts from their end.

    `done` also has `skipped`: the tokens of its log before the first that was shown.
    """
    store = store_of(request)
    async with store.hold(request.path_params["id"]) as session:  # what is being read counts
        model, (tokens, origin) = store.model_of(session), await store.past(session)
        described = describe_session(session)

    async def produce(emit: Emit) -> None:
        skipped = max(0, len(tokens) - SHOWN)
        unseen = await reread(store.engine, model, tokens[:skipped], origin)
        state, logits, decoder = unseen.state, unseen.logits, Decoder(store.tokenizer)
        size = piece_size(model, OBSERVED_PIECE)
        async for piece in in_pieces(once(tokens[skipped:]), state.position, size):
            step = await store.engine.forward(model, piece.tolist(), state, logits, observed=True)
            assert step.observation is not None
            words = [decoder.feed(token) for token in piece.tolist()]
            await emit(event(to_json(step.observation, words, state.position), "piece"))
            state, logits = step.state, step.logits
        await emit(event({**described, "skipped": skipped}, "done"))

    return await respond(request, produce, named=True)


async def compare_ask(request: Request) -> Response:
    """The same question to the memory, with writing off, and to attention alone."""
    store = store_of(request)
    session = store.find(request.path_params["id"])
    fields = await json_object(request)
    prompt = fields.text("prompt", "")
    ask = take_ask(fields, store, 64)
    fields.finish()
    ids = check_prompt(store, await store.encode(prompt))
    model, state = store.model_of(session), await store.state(session)
    tokens, _ = await store.past(session)

    async def without_memory(reader: TitansLM | None) -> views.Answer:
        """Of a reader that never wrote: only the last tokens that can matter are read."""
        if reason := await store.engine.call(lambda: views.unavailable(reader, tokens)):
            return views.Answer(unavailable=reason)
        assert reader is not None
        start = await store.engine.call(lambda: views.never_written(reader, tokens))
        said = await whole_answer(store.engine, reader, store.tokenizer, start, ids, ask, False)
        return views.Answer(text=said, tokens_read=len(tokens))

    async def with_memory() -> views.Answer:
        said = await whole_answer(store.engine, model, store.tokenizer, state, ids, ask)
        return views.Answer(text=said, tokens_read=state.position)

    readers = {
        "memory": with_memory(),
        "off": without_memory(model),
        "attention": without_memory(request.app.state.attention),
    }
    answers = await while_wanted(request, gather(list(readers.values())))
    told = {name: asdict(one) for name, one in zip(readers, answers, strict=True)}
    return JSON({"readers": told})


async def probe(request: Request) -> Response:
    """What the memory returns for one token's key, from then to now."""
    store = store_of(request)
    fields = await json_object(request)
    index = required(fields, "index")
    fields.finish()
    session = store.find(request.path_params["id"])
    model, (tokens, origin) = store.model_of(session), await store.past(session)
    check_index(index, tokens)

    async def look() -> views.Probed:
        before = (await reread(store.engine, model, tokens[:index], origin)).state
        token = int(tokens[index])
        seen: views.Probed = await store.engine.call(
            lambda: views.Probed(model, before, token, index)
        )
        rest = tokens[index + 1 :]
        size = views.curve_piece(len(rest))
        for start in range(0, len(rest), size):
            await store.engine.call(partial(seen.read, rest[start : start + size]))
        return seen

    return JSON((await while_wanted(request, look())).as_json())


async def erase(request: Request) -> Response:
    """Read everything again without a passage, or with another instead; the session goes on
    from there. With `tokens_read`, only if it has read so many: places move when others write."""
    store, id = store_of(request), request.path_params["id"]
    fields = await json_object(request)
    passage = required(fields, "start"), required(fields, "stop")
    instead = np.array(await store.encode(fields.text("instead", "")), dtype=np.int64)
    questions = fields.texts("questions", MOST_QUESTIONS)
    expected = fields.integer("tokens_read", None, 0, 2**53)
    fields.finish()
    ask = Ask(sampling=Sampling(temperature=0.0), max_tokens=12, stop=("»",))
    prompts = [check_prompt(store, await store.encode(text)) for text in questions]

    async def read_again(session: Session) -> tuple[np.ndarray, Reread, dict[str, Any]]:
        """The edited text, the memory of it, and what changed."""
        tokens, origin = await store.past(session)
        if expected not in (None, session.record.tokens_read):
            raise ApiError(409, "the memory has read on since; nothing was erased", "stale")
        if not 0 <= passage[0] < passage[1] <= len(tokens):
            raise ValueError(
                f"expected start < stop within 0..{len(tokens)}, got {passage[0]} and {passage[1]}"
            )
        parts = [tokens[: passage[0]], instead.astype(tokens.dtype), tokens[passage[1] :]]
        edited = await asyncio.to_thread(np.concatenate, parts)
        model, old = store.model_of(session), await store.state(session)
        new = await reread(store.engine, model, edited, origin)
        apart = await store.engine.call(lambda: views.changed(model, old, new.state))
        said = await gather(
            [
                whole_answer(store.engine, model, store.tokenizer, state, prompt, ask)
                for prompt in prompts
                for state in (old, new.state)
            ]
        )
        pairs = zip(said[::2], said[1::2], strict=True)
        answers = [{"before": before, "after": after} for before, after in pairs]
        counts = {"erased": passage[1] - passage[0], "inserted": len(instead)}
        return edited, new, {**counts, **apart, "answers": answers}

    async def work() -> dict[str, Any]:
        async with store.hold(id) as session:
            task = asyncio.current_task()
            assert task is not None
            session.stop = task.cancel
            try:
                edited, new, change = await read_again(session)
            except asyncio.CancelledError:
                reason = "the erasing was stopped; nothing was changed"
                raise ApiError(409, reason, "stopped") from None
            session.stop = None  # from here on it happens
            await rewrite(store, session, edited, new)
            return {**change, "session": describe_session(session)}

    return JSON(await while_wanted(request, work()))


async def stop(request: Request) -> Response:
    """End what changes a session: a reading with what it has read; an erasure, answered 409, with
    nothing changed. `stopped` is false where there is neither, or its outcome is being written."""
    stop = store_of(request).find(request.path_params["id"]).stop
    return JSON({"stopped": stop is not None and stop()})


async def compare(request: Request) -> Response:
    """How far the weights of two memories are apart, per memory and head."""
    store = store_of(request)
    a = store.find(request.path_params["id"])
    b = store.find(request.query_params.get("with", ""))
    if a.record.model != b.record.model:
        raise ApiError(409, "the two memories belong to different models")
    model, first, second = store.model_of(a), await store.state(a), await store.state(b)
    apart = await store.engine.call(lambda: plain(distance(model, first, second)[0]))
    return JSON({"distance": apart})


async def explain(request: Request) -> Response:
    """One write in full: of a token that a session has read, or of a text in a fresh memory."""
    store = store_of(request)
    fields = await json_object(request)
    id, text = fields.text("session"), fields.text("text", "")
    index = fields.integer("index", 0, 0, 2**53)
    memory, head = fields.integer("memory", None, 0, 999), fields.integer("head", None, 0, 999)
    token = fields.integer("token", None, 0, 999)
    name = fields.text("model")
    fields.finish()
    if id is None:
        _, model = store.model(name)
        ids = np.array(check_prompt(store, await store.encode(text)))[:64]

        def work() -> dict[str, Any]:
            return views.explained(
                model, store.tokenizer, None, ids, memory=memory, head=head, token=token
            )

        return JSON(await store.engine.call(work))

    session = store.find(id)
    model, (tokens, origin) = store.model_of(session), await store.past(session)
    check_index(index, tokens)
    start = max(0, index - EXPLAINED_BEFORE)
    again = reread(store.engine, model, tokens[:start], origin)
    before = (await while_wanted(request, again)).state
    near = tokens[start : index + 1 + EXPLAINED_AFTER]
    chosen = index - start if token is None else token

    def look() -> dict[str, Any]:
        return views.explained(
            model, store.tokenizer, before, near, memory=memory, head=head, token=chosen
        )

    return JSON(await store.engine.call(look))


def check_index(index: int, tokens: np.ndarray) -> None:
    if not 0 <= index < len(tokens):
        raise ValueError(f"index must lie in 0..{len(tokens) - 1}, got {index}")


def required(fields: Fields, name: str) -> int:
    value = fields.integer(name, None, 0, 2**53)
    if value is None:
        raise ValueError(f"{name} is missing")
    return int(value)


class PageFiles(StaticFiles):
    """The browser asks each time whether a file has changed."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


ROUTES: list[BaseRoute] = [
    Route("/", page, methods=["GET"]),
    Mount("/page", PageFiles(directory=PAGE)),
    Route("/studio/info", info, methods=["GET"]),
    Route("/studio/texts", list_texts, methods=["GET"]),
    Route("/studio/explain", explain, methods=["POST"]),
    Route("/studio/sessions/{id}/history", history, methods=["GET"]),
    Route("/studio/sessions/{id}/compare-ask", compare_ask, methods=["POST"]),
    Route("/studio/sessions/{id}/probe", probe, methods=["POST"]),
    Route("/studio/sessions/{id}/erase", erase, methods=["POST"]),
    Route("/studio/sessions/{id}/stop", stop, methods=["POST"]),
    Route("/studio/sessions/{id}/compare", compare, methods=["GET"]),
]
