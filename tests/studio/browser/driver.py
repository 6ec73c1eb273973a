"""`titans studio` in a process of its own, and Debian's Chromium on its page."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
WIDE, NARROW = {"width": 1360, "height": 860}, {"width": 400, "height": 800}


def chromium() -> str | None:
    """Path of the system's browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def missing() -> str | None:
    """Why the page cannot be driven here; None where it can."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "Playwright is not installed: pip install -e '.[browser]'"
    if chromium() is None:
        return "there is no Chromium: apt-get install chromium"
    return None


class Server:
    """A running studio: `url`, and what its HTTP interface answers."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "titans.cli", "studio", "--port=0", "--no-open"]
        self.process = subprocess.Popen(
            [*command, f"--folder={folder}", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.url = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"Serving at (\S+)", line):
                self.url = found[1]
                break
        if not self.url:
            raise RuntimeError("titans studio did not start")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path.lstrip("/")) as answer:
            return answer.read()

    def sessions(self) -> list[dict]:
        return json.loads(self.get("/v1/sessions"))["sessions"]

    def texts(self) -> dict[str, dict]:
        return {text["id"]: text for text in json.loads(self.get("/studio/texts"))["texts"]}

    def forget_all(self) -> None:
        for session in self.sessions():
            url = f"{self.url}v1/sessions/{session['id']}"
            urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def browser() -> Iterator:
    """A Playwright browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(
            executable_path=chromium(),
            args=[*sandbox, "--force-color-profile=srgb"],
            env={**os.environ, "FONTCONFIG_FILE": str(HERE / "fonts.conf")},
        )
        try:
            yield opened
        finally:
            opened.close()


def open_studio(page, url: str, view: str = "") -> None:
    """Go to the page, and wait until it is ready."""
    page.goto(url + view)
    page.wait_for_selector("html[data-ready]")


def read(page, text: str | None = None, hurry: bool = True) -> None:
    """Read a built-in text to its end."""
    if text is not None:
        page.select_option("#text-choice", text)
    if hurry:
        page.select_option("#pace", "30000")
    page.click("#read")
    # A short text is read before one could see that it is being read.
    until(page, "document.querySelector('#text-choice').value === ''", 60)
    page.wait_for_selector("#read:visible", timeout=60_000)


def until(page, expression: str, seconds: float = 10.0) -> None:
    """Wait for a condition; Playwright's own way would need a page that allows eval."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        if time.monotonic() > end:
            raise AssertionError(f"after {seconds} s still not: {expression}")
        page.wait_for_timeout(30)


def picture(page, path: Path, full: bool = True) -> None:
    """A screenshot from the top, when all is still."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page.mouse.move(0, 0)
    if full:
        page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(250)
    page.screenshot(path=path, full_page=full, animations="disabled")
