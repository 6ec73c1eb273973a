"""What clients send: JSON objects, and bodies that are read while they arrive."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from titans.serve.errors import ApiError

JSON_BYTES = 2**23
BIGGEST = 1e12  # number that means anything here
LONGEST = 1000  # of several short texts


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body as it comes. 413 beyond `limit` bytes, 408 when nothing comes any more, 415 when
    it is compressed."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "a body must not be compressed")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > limit:
        raise too_long(limit)
    seen = 0
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(request.app.state.settings.stall_s):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise ApiError(408, "the rest of the body did not come") from None
        if chunk is None:
            return
        seen += len(chunk)
        if seen > limit:
            raise too_long(limit)
        yield chunk


def too_long(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than {limit:,} bytes", "body_too_long")


class Fields:
    """The members of a JSON object, each checked when taken; what is left over is an error."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = dict(content)

    def take(self, name: str, default: Any = None) -> Any:
        value = self.content.pop(name, None)
        return default if value is None else value

    def text(self, name: str, default: str | None = None) -> Any:
        value = self.take(name, default)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be a string, got {type(value).__name__}")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {type(value).__name__}")
        return value

    def integer(self, name: str, default: int | None, least: int, most: int) -> Any:
        value = self.take(name, default)
        if value is None:
            return None
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} must be an integer in {least}..{most}, got {value!r:.50}")
        return value

    def number(self, name: str, default: float | None) -> Any:
        value = self.take(name, default)
        if value is None:
            return None
        if type(value) not in (int, float) or not -BIGGEST < value < BIGGEST:
            raise ValueError(f"{name} must be a number, got {value!r:.50}")
        return float(value)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A short string or a list of up to `most`, none of them empty."""
        value = self.take(name, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise ValueError(f"{name} must be a string or a list of strings, none of them empty")
        if len(value) > most or any(len(v) > LONGEST for v in value):
            raise ValueError(f"{name}: at most {most} strings of at most {LONGEST} characters")
        return tuple(value)

    def finish(self) -> None:
        if self.content:
            raise ValueError(f"unknown field {next(iter(self.content))!r:.50}")


async def json_object(request: Request) -> Fields:
    """The body as one JSON object; an empty body as an empty one."""
    limit = min(JSON_BYTES, request.app.state.settings.body_bytes)
    content = b"".join([chunk async for chunk in chunks(request, limit)])
    if not content:
        return Fields({})
    if media_type(request) != "application/json":
        raise ApiError(415, "expected Content-Type: application/json")
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {str(error).splitlines()[0]:.200}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return Fields(value)


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
