"""Takes the screenshots of docs/studio.md and of the README.

    .venv/bin/python tests/studio/browser/pictures.py

They are written to docs/images/, as PNGs of 256 colours, each under 200 kB.
"""

import tempfile
from pathlib import Path

import driver
from PIL import Image

FOLDER = Path(__file__).parents[3] / "docs" / "images"
LARGEST = 200_000


def take(page, name: str, full: bool = False) -> None:
    path = FOLDER / f"studio-{name}.png"
    driver.picture(page, path, full)
    image = Image.open(path).convert("RGB")
    image.quantize(256, kmeans=3, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.relative_to(FOLDER.parents[1])}: {size:,} bytes")
    if size > LARGEST:
        raise SystemExit(f"{path}: {size:,} bytes, expected at most {LARGEST:,}")


def main() -> None:
    if reason := driver.missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder, driver.browser() as browser:
        server = driver.Server(Path(folder) / "sessions")
        try:
            light = browser.new_page(viewport={"width": 1280, "height": 1120})
            visit(light, server.url)
            small = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
            narrow(small, server.url)
        finally:
            server.stop()


def visit(page, url: str) -> None:
    """The way through the page that docs/studio.md describes."""
    driver.open_studio(page, url)
    driver.read(page)
    page.click("#token .suggestion >> nth=0")
    page.wait_for_selector("#token table")
    page.click("#ask .suggestion >> nth=0")
    page.wait_for_selector(".answer")
    take(page, "read")

    page.click("#erase .suggestion >> nth=0")
    page.click("#erase-button")
    page.wait_for_selector("#erase-result")
    page.wait_for_selector(".gap")
    page.locator("#erase").screenshot(path=FOLDER / "studio-erased.png")

    page.click("nav >> text=Memories")
    page.click("button:text-is('Compare') >> nth=0")
    page.wait_for_selector(".bars")
    for side in "ab":
        page.click(f"[data-side={side}] >> text=Let it read")
        page.wait_for_selector(f"[data-side={side}] >> text=Let it read")
        page.wait_for_timeout(500)
    page.click("text=Ask both")
    for side in "ab":
        page.wait_for_selector(f"[data-side={side}] .answer")
    take(page, "memories", full=True)

    page.click("nav >> text=How it works")
    page.wait_for_selector(".stage canvas")
    page.click("[data-key=step-5]")
    page.check("[name=kind][value=MAC]")
    page.click(".equations button >> nth=4")
    page.wait_for_timeout(900)
    take(page, "how", full=True)


def narrow(page, url: str) -> None:
    """A phone's width, in the dark."""
    driver.open_studio(page, url)
    page.click("#read")
    driver.until(page, "document.querySelectorAll('.t.written').length >= 4")
    page.evaluate("document.querySelector('#text').scrollIntoView()")
    take(page, "narrow")
    page.click("#stop")


if __name__ == "__main__":
    main()
