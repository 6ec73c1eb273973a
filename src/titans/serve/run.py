"""The server process: a socket, a token where one is needed, and uvicorn."""

import contextlib
import ipaddress
import logging
import secrets
import socket
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.routing import BaseRoute

from titans.serve.app import create_app
from titans.serve.guard import bracketed
from titans.serve.settings import ServeSettings

SHUTDOWN_S = 5


def run(
    settings: ServeSettings,
    routes: Sequence[BaseRoute] = (),
    *,
    page: bool = False,
    browser: bool = False,
) -> None:
    """Serve until interrupted. page: the address to print is that of a page; browser: open it.

    Raises ValueError for settings that cannot be served, OSError for an address in use.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("serving needs `pip install -e '.[studio]'`") from error

    if settings.token is None and not is_local(settings.host):
        settings = replace(settings, token=secrets.token_urlsafe(24))
    with listen(settings.host, settings.port) as listener:
        settings = replace(settings, port=listener.getsockname()[1])
        app = create_app(settings, routes)
        logging.basicConfig(stream=sys.stderr, format="titans: %(message)s")
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        announce(app, settings, page, browser)
        # Ctrl-C: uvicorn shuts down in order, then passes it on.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Bound here and not by uvicorn, so that the port is known and an error is one line."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError, UnicodeError) as error:
        raise OSError(f"cannot listen on {host}:{port} ({error})") from None


def announce(app: Starlette, settings: ServeSettings, page: bool, browser: bool) -> None:
    address = f"http://{bracketed(settings.host)}:{settings.port}"
    if page:
        token = settings.token
        address += "/" if token is None else f"/?token={quote(token, safe='')}"
    store = app.state.store
    print(f"{', '.join(store.models)}; {len(store.sessions)} sessions in {settings.folder}")
    print(f"Serving at {address}", flush=True)
    if settings.token is not None and not page:
        print(f"Requests need the header Authorization: Bearer {settings.token}", flush=True)
    if browser:
        webbrowser.open(address)
