"""Who may ask: another site that is open in the browser may not, nor a stranger on the network.

A page of another site can send requests here (and reach us under a name of its own, by DNS
rebinding). It cannot set `Host`, `Origin` or `Sec-Fetch-Site`; so these decide.
"""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from titans.serve.errors import ApiError, to_response
from titans.serve.metrics import Metrics
from titans.serve.settings import LOCAL_HOSTS, ServeSettings

# What anybody may GET: a page is linked to, and its files hold no secrets.
OPEN = ("/", "/health", "/favicon.ico")
OPEN_UNDER = "/page/"
HOST = re.compile(r"(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
DRAIN_S = 5.0
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


log = logging.getLogger("titans.serve")


class ClientStalled(Exception):
    """A client takes no more bytes."""


class Guard:
    """Around the whole application: checks, counts and times requests, and adds headers."""

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, hosts: set[str] | None, metrics: Metrics
    ) -> None:
        """hosts: of `allowed_hosts`."""
        self.app, self.settings, self.hosts, self.metrics = app, settings, hosts, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        status, begin, received, started = 500, time.perf_counter(), False, False

        async def watched_receive() -> Message:
            nonlocal received
            message = await receive()
            received = received or not message.get("more_body", False)
            return message

        async def guarded_send(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                started = True
                status = message["status"]
                if status >= 400 and b"expect" not in dict(scope["headers"]):
                    await drain()
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if not is_open(scope):
                    headers["Cache-Control"] = "no-store"
            try:
                async with asyncio.timeout(self.settings.stall_s):
                    await send(message)
            except TimeoutError:
                raise ClientStalled from None

        async def drain() -> None:
            """Take what a client still sends, for a while: a connection that is closed on it
            would lose the answer as well."""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    while not received:
                        await watched_receive()

        self.metrics.running += 1
        try:
            self.check(scope)
            await self.app(scope, watched_receive, guarded_send)
        except ApiError as error:  # of `check`: those of the application are answered inside
            await to_response(error)(scope, watched_receive, guarded_send)
        except ClientStalled:
            pass  # its connection ends here
        except Exception as error:  # a mistake of ours
            log.exception("%s %s", scope["method"], scope["path"])
            if started:
                raise  # the connection ends: half an answer is none
            await to_response(error)(scope, watched_receive, guarded_send)
        finally:
            self.metrics.running -= 1
            self.metrics.answered(scope["method"], status, time.perf_counter() - begin)

    def check(self, scope: Scope) -> None:
        """ApiError 421, 403, 401 or 429 for a request that must not be handled."""
        headers = Headers(scope=scope)
        host = self.check_host(headers)
        if is_open(scope):
            return
        check_origin(headers, host)
        self.check_token(headers)
        if self.metrics.running > self.settings.requests:
            most = self.settings.requests
            raise ApiError(429, f"{most} requests are being handled already", "too_many_requests")

    def check_host(self, headers: Headers) -> str:
        given = headers.getlist("host")
        host = given[0].lower() if len(given) == 1 else ""
        if not HOST.fullmatch(host) or (self.hosts is not None and host not in self.hosts):
            raise ApiError(421, "not a host of this server; name further ones with --allow-host")
        return host

    def check_token(self, headers: Headers) -> None:
        if self.settings.token is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        right = secrets.compare_digest(given.strip().encode(), self.settings.token.encode())
        if kind.lower() != "bearer" or not right:
            raise ApiError(401, "expected the server's token as Authorization: Bearer TOKEN")


def check_origin(headers: Headers, host: str) -> None:
    """A browser says where a request comes from; other clients say nothing, which is fine."""
    for origin in headers.getlist("origin"):
        if origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, "requests from pages of other sites are refused")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise ApiError(403, "requests from pages of other sites are refused")


def is_open(scope: Scope) -> bool:
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in OPEN or path.startswith(OPEN_UNDER))


def allowed_hosts(settings: ServeSettings) -> set[str] | None:
    """Values of the Host header, in lower case, each with the port and (for --allow-host without
    one, as behind a proxy) as given. None, any, for a server on all addresses: it has more names
    than it knows, and a token, which a page of another site does not have."""
    if settings.host in ("0.0.0.0", "::") and settings.token and not settings.allow_hosts:
        return None
    names = [*LOCAL_HOSTS, settings.host]
    with_port = {f"{bracketed(name)}:{settings.port}" for name in names}
    if settings.port == 80:
        with_port |= {bracketed(name) for name in names}
    for given in settings.allow_hosts:
        host = given.lower()
        if not HOST.fullmatch(host):
            raise ValueError(f"expected a host such as box.local or box.local:80, got {given!r}")
        with_port |= {host} if urlsplit(f"//{host}").port else {host, f"{host}:{settings.port}"}
    return with_port


def bracketed(name: str) -> str:
    return f"[{name.lower()}]" if ":" in name else name.lower()
