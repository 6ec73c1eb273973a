"""Errors as answers: OpenAI's shape, one line each."""

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    507: "storage_error",
}


class ApiError(Exception):
    """An answer that is not the one asked for."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class JSON(Response):
    """ASCII only, so that no text that a client sent can break it; a NaN is a mistake of ours."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


def encode(content: Any) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def body_of(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    kind = KINDS.get(status, "invalid_request_error")
    return {"error": {"message": " ".join(message.split()), "type": kind, "code": code}}


def to_response(error: Exception) -> JSON:
    status, message, code = describe(error)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status)
    if isinstance(error, HTTPException) and error.headers:  # 405 says what is allowed
        headers = dict(error.headers)
    return JSON(body_of(status, message, code), status, headers)


def describe(error: Exception) -> tuple[int, str, str | None]:
    """Status, message and code of an answer to a request that ended in `error`."""
    if isinstance(error, ApiError):
        return error.status, error.message, error.code
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None
    if isinstance(error, ClientDisconnect):
        return 400, "the body ended too early", None
    if isinstance(error, UnicodeEncodeError):  # "\\ud800" in JSON
        return 400, "expected Unicode text, got half of a surrogate pair", None
    if isinstance(error, ValueError):  # what the library raises for bad input
        return 400, str(error), None
    return 500, "internal error; the server's log has the details", None


async def answer_error(request: Request, error: Exception) -> Response:
    return to_response(error)


# What else is raised is a mistake of ours, which the guard answers and logs.
ANSWERED = (ApiError, HTTPException, ClientDisconnect, ValueError)
HANDLERS: Any = dict.fromkeys(ANSWERED, answer_error)
