"""The application of `titans studio` in this process, on the packaged models."""

import pytest
from starlette.testclient import TestClient

from titans.serve import ServeSettings, create_app
from titans.studio.routes import ROUTES


@pytest.fixture(scope="module")
def c(tmp_path_factory):
    settings = ServeSettings(folder=tmp_path_factory.mktemp("studio") / "sessions", busy_s=0.2)
    app = create_app(settings, ROUTES)
    with TestClient(app, base_url="http://127.0.0.1:8321") as client:
        yield client
