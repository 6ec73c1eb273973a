"""Small models, and clients of an application in this process."""

import json
from pathlib import Path

import torch
from starlette.testclient import TestClient

from titans import MemoryConfig, TitansConfig, TitansLM
from titans.serve import ServeSettings, create_app

BASE = "http://127.0.0.1:8321"
TEXT = {"content-type": "text/plain; charset=utf-8"}
EVENTS = {**TEXT, "accept": "text/event-stream"}
MEMORY = {"content-type": "application/octet-stream"}
LINEAR = MemoryConfig(heads=2)
DEEP = MemoryConfig(heads=2, depth=2, expansion=2, chunk_size=4, momentum=True, decay="channel")


def build(variant: str = "mal", memory: MemoryConfig = LINEAR, seed: int = 0) -> TitansLM:
    """A model of bytes whose memory writes a lot."""
    torch.manual_seed(seed)
    config = TitansConfig(
        variant=variant,
        vocab_size=257,
        dim=16,
        layers=2,
        heads=2,
        ffn_hidden=24,
        window=6,
        segment=8,
        persistent=2,
        memory=memory,
    )
    model = TitansLM(config).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(10.0)
    return model


def application(folder: Path, model: Path, **changes):
    settings = {"models": {"tiny": model}, "folder": folder, "busy_s": 0.2, **changes}
    return create_app(ServeSettings(**settings))


def client(folder: Path, model: Path, **changes) -> TestClient:
    """Use it as a context manager: the engine runs inside."""
    app = application(folder, model, **changes)
    return TestClient(app, base_url=BASE, raise_server_exceptions=False)


def events(text: str) -> list[tuple[str | None, object]]:
    """Name and JSON of every server-sent event."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        data = lines["data"]
        found.append((lines.get("event"), data if data == "[DONE]" else json.loads(data)))
    return found


def create(c: TestClient, **content) -> str:
    answer = c.post("/v1/sessions", json=content)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def read(c: TestClient, session: str, text: str | bytes, **query):
    body = text.encode() if isinstance(text, str) else text
    return c.post(f"/v1/sessions/{session}/read", content=body, headers=TEXT, params=query)


def message(answer, status: int) -> str:
    """The one line of an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code"}
    assert "\n" not in error["message"]
    assert error["message"]
    return error["message"]
