"""One server and one browser for all tests here; every test gets a page and no sessions.

What is missing on this machine is said by the tests that it skips. Screenshots are written to
browser-shots/ in the project's folder, or where TITANS_SCREENSHOTS says.
"""

import os
from pathlib import Path

import driver
import pytest

SHOTS = Path(os.environ.get("TITANS_SCREENSHOTS", Path(__file__).parents[3] / "browser-shots"))


def pytest_collection_modifyitems(items):
    reason = driver.missing()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    running = driver.Server(tmp_path_factory.mktemp("studio") / "sessions")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def browser():
    with driver.browser() as opened:
        yield opened


class Opener:
    """Opens pages, and remembers what their consoles said."""

    def __init__(self, browser) -> None:
        self.browser = browser
        self.contexts = []
        self.complaints = []
        self.expected = []  # parts of complaints that a test provokes

    def __call__(self, url, *, view="", size=driver.WIDE, scheme="light", motion="no-preference"):
        context = self.browser.new_context(
            viewport=size, color_scheme=scheme, reduced_motion=motion, accept_downloads=True
        )
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", self.heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        driver.open_studio(page, url, view)
        return page

    def heard(self, message) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def close(self) -> list[str]:
        for context in self.contexts:
            context.close()
        return [c for c in self.complaints if not any(part in c for part in self.expected)]


@pytest.fixture
def open_page(server, browser):
    """Opens pages of the studio; what the console complains of fails the test."""
    server.forget_all()
    opener = Opener(browser)
    yield opener
    assert opener.close() == []


@pytest.fixture
def shot(request):
    """Writes a screenshot, named after the test."""

    def take(page, name: str, full: bool = True) -> None:
        test = request.node.name.removeprefix("test_").partition("[")[0]
        driver.picture(page, SHOTS / f"{test}-{name}.png", full)

    return take
