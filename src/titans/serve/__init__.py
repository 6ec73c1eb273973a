"""Memories behind HTTP: `create_app(ServeSettings(...))` is the ASGI application."""

try:
    import starlette  # noqa: F401
except ImportError as error:
    raise ImportError("serving needs `pip install -e '.[studio]'`") from error

from titans.serve.app import create_app
from titans.serve.settings import ServeSettings

__all__ = ["ServeSettings", "create_app"]
