"""The application: everything that serves, put together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from titans.data.tokenizers import (
    AT_LINES,
    AT_SPACES,
    ByteTokenizer,
    Tokenizer,
    check_cuts,
    check_tokenizer,
    load_tokenizer,
)
from titans.demo import asset
from titans.models.lm import TitansLM, load
from titans.serve import completions, sessions
from titans.serve.engine import Engine
from titans.serve.errors import HANDLERS, JSON
from titans.serve.folder import Folder
from titans.serve.guard import Guard, allowed_hosts
from titans.serve.metrics import Metrics
from titans.serve.openapi import description
from titans.serve.settings import ServeSettings
from titans.serve.store import Store

SWEEP_S = 10.0


def create_app(settings: ServeSettings, extra_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """An ASGI application; models are loaded and the folder is taken here, not at its start.

    Handlers find in `request.app.state`: store, settings, metrics, attention (a model or None).
    Raises ValueError for a model, tokenizer or folder that cannot be used.
    """
    tokenizer = load_tokenizer(settings.tokenizer)
    check_cuts(tokenizer, (AT_LINES, AT_SPACES))
    paths = settings.models or {"demo": asset("demo.safetensors")}
    models = {name: load(path) for name, path in paths.items()}
    attention_path = settings.attention
    if attention_path is None and extra_routes and not settings.models:  # a page compares with it
        attention_path = asset("demo-attention.safetensors")
    attention = None if attention_path is None else load(attention_path)
    for name, model in [*models.items(), *([("attention", attention)] if attention else [])]:
        check_vocabulary(name, model, tokenizer)
    metrics = Metrics()
    engine = Engine(metrics, settings.batch)
    hosts = allowed_hosts(settings)
    guard = Middleware(Guard, settings=settings, hosts=hosts, metrics=metrics)
    folder = Folder(settings.folder, settings.disk_bytes)
    store = Store(settings, folder, models, tokenizer, engine)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        sweeper = asyncio.create_task(sweep(store))
        yield
        for task in [sweeper, *app.state.tasks]:
            task.cancel()
        await asyncio.gather(sweeper, *app.state.tasks, return_exceptions=True)
        engine.stop()
        folder.close()

    app = Starlette(
        routes=[*COMMON, *sessions.ROUTES, *completions.ROUTES, *extra_routes],
        middleware=[guard],
        exception_handlers=HANDLERS,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.store, app.state.settings, app.state.metrics = store, settings, metrics
    app.state.attention = attention
    app.state.tasks = set()
    return app


def check_vocabulary(name: str, model: TitansLM, tokenizer: Tokenizer) -> None:
    """ValueError for a tokenizer that is not the model's. Text alone makes no end of document,
    which a model of bytes may therefore lack."""
    check_tokenizer(f"model {name!r}", model.tokenizer, tokenizer)
    needed = 256 if isinstance(tokenizer, ByteTokenizer) else tokenizer.vocab_size
    if model.config.vocab_size < needed:
        raise ValueError(
            f"model {name!r} has {model.config.vocab_size} tokens, "
            f"the tokenizer {tokenizer.name!r} needs {needed}"
        )


async def sweep(store: Store) -> None:
    while True:
        await asyncio.sleep(min(SWEEP_S, store.settings.idle_s))
        store.drop_unused()


async def health(request: Request) -> Response:
    alive = request.app.state.store.engine.thread.is_alive()
    return JSON({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)


async def metrics(request: Request) -> Response:
    store: Store = request.app.state.store
    loaded = [s for s in store.sessions.values() if s.state is not None]
    held = float(sum(s.record.state_bytes for s in loaded))
    gauges = [
        ("sessions", "Sessions there are.", float(len(store.sessions))),
        ("sessions_loaded", "Sessions whose state is in memory.", float(len(loaded))),
        ("state_bytes", "Bytes of these states.", held),
        ("disk_bytes", "Bytes of the folder of sessions.", float(store.folder.used)),
        ("queue_length", "Pieces waiting for the engine.", float(len(store.engine.queue))),
    ]
    text = request.app.state.metrics.text(gauges)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def openapi(request: Request) -> Response:
    return JSON(description(request.app.state.settings))


COMMON = [
    Route("/health", health, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/openapi.json", openapi, methods=["GET"]),
]
