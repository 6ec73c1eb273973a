"""The page's files: nothing from elsewhere, nothing that its security policy would refuse."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "src" / "titans" / "studio" / "page"
FILES = sorted(p for p in PAGE.rglob("*") if p.is_file())
MODULES = sorted(PAGE.glob("js/*.js"))


def test_the_page_is_served_with_its_policy(c):
    answer = c.get("/")
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_every_file_that_the_page_names_is_served(c):
    named = re.findall(r'(?:src|href)="(/page/[^"]+)"', (PAGE / "index.html").read_text())
    assert len(named) == 4
    for url in named + [f"/page/js/{module.name}" for module in MODULES]:
        answer = c.get(url)
        assert answer.status_code == 200, url
        kind = "text/javascript" if url.endswith(".js") else "text/css" if "css" in url else "image"
        assert answer.headers["content-type"].startswith(kind)


@pytest.mark.parametrize("url", ["/page/../routes.py", "/page/%2e%2e/routes.py", "/page/none.js"])
def test_nothing_else_is_served(c, url):
    assert c.get(url).status_code == 404


def test_nothing_comes_from_elsewhere():
    for path in FILES:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import", text), path


def test_nothing_is_inline():
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)", html)
    assert "<style" not in html
    assert not re.search(r"\s(?:style|on[a-z]+)=", html)
    for module in MODULES:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", module.read_text())


def test_modules_import_only_what_is_there():
    for module in MODULES:
        for names, source in re.findall(
            r'import \{([^}]*)\} from "\./([^"]+)"', module.read_text()
        ):
            target = (PAGE / "js" / source).read_text()
            for name in (n.strip() for n in names.split(",") if n.strip()):
                exported = rf"export (?:async )?(?:const|function\*?|class) {name}\b"
                listed = rf"export \{{[^}}]*\b{name}\b"
                assert re.search(exported, target) or re.search(listed, target), (module, name)
                used = module.read_text().count(name)
                assert used > 1, f"{module.name} does not use {name}"


def test_ids_in_scripts_stand_in_the_page_or_are_made():
    html = (PAGE / "index.html").read_text()
    scripts = "".join(module.read_text() for module in MODULES)
    for name in set(re.findall(r'byId\("([^"]+)"\)', scripts)):
        made = re.search(rf'id: "{name}"', scripts)
        assert f'id="{name}"' in html or made, name


def colours(selector: str) -> dict[str, str]:
    block = re.search(rf"{selector} \{{(.*?)\}}", (PAGE / "studio.css").read_text(), re.DOTALL)
    assert block is not None
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", block[1]))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [":root", r':root\[data-theme="dark"\]'])
def test_contrast_is_that_of_wcag_aa(theme):
    """4.5 for text, 3 for lines and for the borders of what can be used."""
    found = colours(theme)

    def ratio(a: str, b: str) -> float:
        low, high = sorted((luminance(found[a]), luminance(found[b])))
        return (high + 0.05) / (low + 0.05)

    grounds = ("bg", "card", "sunk")
    text = [(ink, ground) for ink in ("ink", "muted") for ground in grounds]
    text += [("accent-ink", "accent"), ("bad", "bad-soft"), ("bad", "card"), ("good", "card")]
    text += [("ink", "accent-soft"), ("ink", "raised"), ("positive", "card")]
    lines = [(f"series-{i}", "card") for i in range(1, 9)]
    lines += [("accent", ground) for ground in grounds] + [("edge", "card"), ("edge", "bg")]
    for pairs, least in ((text, 4.5), (lines, 3.0)):
        for a, b in pairs:
            assert ratio(a, b) >= least, f"{a} on {b}: {ratio(a, b):.2f}"
