"""One small model file for all tests of the server, and a client of a fresh one."""

import pytest
from served import build, client


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    build().save(path)
    return path


@pytest.fixture
def c(tmp_path, model_file, without_shape_checks):
    """As users run it, and faster; what opens a `client` of its own is checked."""
    with client(tmp_path / "sessions", model_file) as opened:
        yield opened
