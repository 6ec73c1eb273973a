"""titans serve, titans studio: memories behind HTTP, and the page to see them at work."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from titans.cli.fields import whole
from titans.cli.parser import Parser, verb


def add_serve(verbs: Any) -> None:
    parser = verb(verbs, "serve", run_serve, "serve memories over HTTP, OpenAI-compatible")
    add_settings(parser)


def add_studio(verbs: Any) -> None:
    parser = verb(verbs, "studio", run_studio, "see the memory at work: a page in your browser")
    parser.add_argument(
        "--open", action=argparse.BooleanOptionalAction, default=True, help="open a browser on it"
    )
    parser.add_argument("--attention", type=Path, help="an attention-only model to compare with")
    add_settings(parser)


def add_settings(parser: Parser) -> None:
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=PATH", help="default: the demo's"
    )
    parser.add_argument("--tokenizer", help="'bytes' (default) or a tokenizer.json")
    parser.add_argument("--folder", type=Path, help="where sessions are kept; titans-sessions")
    parser.add_argument("--host", help="address to listen on; 127.0.0.1")
    parser.add_argument("--port", type=int, help="8321; 0 takes a free one")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="HOST", help="a further Host header"
    )
    parser.add_argument("--token", help="what requests must carry; made if not on this machine")
    for name, about in LIMITS.items():
        kind = float if name.endswith("_s") else whole
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=about)


LIMITS = {
    "body_bytes": "of one request, e.g. 64M",
    "sessions": "at most so many",
    "disk_bytes": "of all sessions on disk, e.g. 10G",
    "memory_bytes": "of states kept in memory",
    "idle_s": "seconds until an unused state is only on disk",
    "requests": "handled at once",
    "prompt_tokens": "of one prompt",
    "max_tokens": "of one answer",
    "choices": "answers of one completion request",
    "busy_s": "seconds to wait for a session that is being changed",
    "stall_s": "seconds without a byte of a body, or one taken of an answer, until a client is "
    "given up",
    "batch": "sessions computed together",
}


def settings_of(options: argparse.Namespace) -> Any:
    from titans.serve import ServeSettings

    given = vars(options)
    chosen = {f.name: given[f.name] for f in fields(ServeSettings) if given.get(f.name) is not None}
    return ServeSettings(
        models=named_models(options.model), allow_hosts=tuple(options.allow_host), **chosen
    )


def named_models(given: list[str]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"expected --model NAME=PATH, got {text!r}")
        if name in models:
            raise ValueError(f"--model names {name!r} twice")
        models[name] = Path(path)
    return models


def run_serve(options: argparse.Namespace) -> None:
    from titans.serve.run import run

    run(settings_of(options))


def run_studio(options: argparse.Namespace) -> None:
    from titans.serve.run import run
    from titans.studio.routes import ROUTES

    run(settings_of(options), ROUTES, page=True, browser=options.open)
