"""What a server is told when it starts."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

DEFAULT_PORT = 8321
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Models, where sessions live, who may ask, and how much."""

    models: dict[str, Path] = field(default_factory=dict)
    """Name to model file; empty serves the packaged demo as `demo`."""
    attention: Path | None = None
    """The attention-only model that the page's answers are compared with; beside the demo the
    packaged one."""
    tokenizer: str = "bytes"
    """'bytes' or the path of a tokenizer.json; of all models."""
    folder: Path = Path("titans-sessions")
    """Where sessions are kept; one server at a time."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    allow_hosts: tuple[str, ...] = ()
    """Further values of the Host header to answer, `name` or `name:port`."""
    token: str | None = None
    """What every request must carry as `Authorization: Bearer`; None asks for none."""

    body_bytes: int = 2**28
    """Of one request; more is answered 413."""
    sessions: int = 1000
    """More are answered 429."""
    disk_bytes: int = 2**34
    """Of all sessions on disk; more is answered 507."""
    memory_bytes: int = 2**30
    """Of states held in memory between requests; beyond it the least used are dropped."""
    idle_s: float = 300.0
    """Seconds after which a state that nobody used is dropped from memory."""
    requests: int = 128
    """Handled at once; more are answered 429."""
    prompt_tokens: int = 2**16
    max_tokens: int = 4096
    """Of one answer."""
    choices: int = 16
    """Answers of one completion request, over all its prompts."""
    busy_s: float = 5.0
    """Seconds a request waits for a session that another one is changing, before 409."""
    stall_s: float = 60.0
    """Seconds without a byte of a body, or one taken of an answer, until a client is given up."""
    batch: int = 32
    """Sessions that are computed together."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, least = getattr(self, setting.name), 0 if setting.name == "port" else 1
            if setting.type is int and value < least:
                raise ValueError(f"{setting.name} must be at least {least}, got {value}")
            if setting.type is float and not 0 < value < math.inf:
                raise ValueError(f"{setting.name} must be a positive number, got {value}")
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, got {self.port}")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ValueError("token must be printable ASCII")
        if self.token is not None and (not self.token or " " in self.token):
            raise ValueError("token must not be empty or hold a space")
