"""OpenAI's text completions, with one extension: `session`, whose memory is asked."""

import asyncio
import secrets
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from titans.models.lm import TitansLM
from titans.serve.answering import Prompted, answer, prompted, seeded
from titans.serve.body import Fields, json_object
from titans.serve.errors import JSON
from titans.serve.events import Emit, event, respond, while_wanted
from titans.serve.sessions import check_prompt, store_of, take_ask
from titans.serve.store import Store

# What a client may send although it is not offered: only the value that asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "presence_penalty": (0,),
    "suffix": ("",),
}
DONE = b"data: [DONE]\n\n"


async def models(request: Request) -> Response:
    listed = [describe_model(name, model) for name, model in store_of(request).models.items()]
    return JSON({"object": "list", "data": listed})


async def show_model(request: Request) -> Response:
    return JSON(describe_model(*store_of(request).model(request.path_params["id"])))


def describe_model(name: str, model: TitansLM) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "titans",
        "parameters": model.parameter_count,
        "config_hash": model.config_hash,
    }


async def complete(request: Request) -> Response:
    store = store_of(request)
    fields = await json_object(request)
    name, session_id = fields.text("model"), fields.text("session")
    prompts = await take_prompts(fields, store)
    count = fields.integer("n", 1, 1, store.settings.choices)
    if count * len(prompts) > store.settings.choices:
        raise ValueError(
            f"at most {store.settings.choices} answers a request, "
            f"got {len(prompts)} prompts with n = {count}"
        )
    how, streamed = take_ask(fields, store, 16), fields.flag("stream")
    told_usage = take_stream_options(fields)
    refuse_unknown(fields)
    if session_id is None:
        name, model = store.model(name)
        state = store.initial[name]
    else:
        session = store.find(session_id)
        model, state = store.model_of(session), await store.state(session)
        if name not in (None, session.record.model):
            raise ValueError(f"the session is of model {session.record.model!r}, not {name!r:.50}")
        name = session.record.model
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": name,
    }

    async def start(prompt: list[int]) -> Prompted:
        return await prompted(store.engine, model, state, prompt)

    async def choice(index: int, begin: Prompted, emit: Emit | None) -> tuple[dict[str, Any], int]:
        """Answer `index`, its deltas emitted as chunks; and how many tokens it took."""
        text, tokens, finish, ask = "", 0, None, seeded(how, index)
        async for delta in answer(store.engine, model, store.tokenizer, begin, ask):
            text, finish = text + delta.text, delta.finish
            tokens += delta.token is not None
            if emit is not None and (delta.text or finish):
                part = described(index, delta.text, finish)
                await emit(event({**head, "choices": [part]}))
        return described(index, text, finish), tokens

    async def all_choices(emit: Emit | None) -> dict[str, Any]:
        begins = await gather([start(prompt) for prompt in prompts])
        made = await gather(
            [choice(i, begins[i // count], emit) for i in range(len(prompts) * count)]
        )
        read, drawn = sum(map(len, prompts)), sum(tokens for _, tokens in made)
        usage = {
            "prompt_tokens": read,
            "completion_tokens": drawn,
            "total_tokens": read + drawn,
        }
        return {**head, "choices": [part for part, _ in made], "usage": usage}

    if not streamed:
        return JSON(await while_wanted(request, all_choices(None)))

    async def produce(emit: Emit) -> None:
        whole = await all_choices(emit)
        if told_usage:
            await emit(event({**whole, "choices": []}))
        await emit(DONE)

    return await respond(request, produce)


async def gather(coroutines: list[Any]) -> list[Any]:
    """Side by side, so that they are computed as one batch; when one fails, all end."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


def described(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


async def take_prompts(fields: Fields, store: Store) -> list[list[int]]:
    """OpenAI's four forms: a text, texts, token ids, lists of token ids."""
    prompt = fields.take("prompt")
    if prompt is None:
        raise ValueError("prompt is missing")
    several = prompt if isinstance(prompt, list) and not is_ids(prompt) else [prompt]
    if not 0 < len(several) <= store.settings.choices:
        raise ValueError(f"expected 1 to {store.settings.choices} prompts, got {len(several)}")
    rows = []
    for one in several:
        if not (isinstance(one, str) or (isinstance(one, list) and is_ids(one))):
            raise ValueError("prompt must be a text, a list of texts, or token ids")
        row = await store.encode(one) if isinstance(one, str) else one
        rows.append(check_prompt(store, row))
    return rows


def is_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(item) is int and 0 <= item < 2**31 for item in value)


def take_stream_options(fields: Fields) -> bool:
    """Is the usage to be told at the end? What else OpenAI has there concerns its network."""
    options = fields.take("stream_options", {})
    if not isinstance(options, dict):
        raise ValueError(f"stream_options must be an object, got {type(options).__name__}")
    return Fields(options).flag("include_usage")


def refuse_unknown(fields: Fields) -> None:
    fields.take("user")
    for name, neutral in NEUTRAL.items():
        value = fields.take(name)
        if value is not None and value not in neutral:
            raise ValueError(f"{name} is not supported")
    fields.finish()


ROUTES = [
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{id:path}", show_model, methods=["GET"]),
    Route("/v1/completions", complete, methods=["POST"]),
]
