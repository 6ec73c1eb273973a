"""The README's code runs as written, and the commands and files of all pages exist."""

import re
import shlex
from pathlib import Path

import pytest

from titans.cli import build_parser

README = Path(__file__).parent.parent / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_library_example_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    scope: dict = {}
    exec(block, scope)
    assert (tmp_path / "notes.memory").exists()
    assert scope["state"].position == 300
    assert len(scope["new"]) == 20


def test_it_is_short_enough_to_read() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_models_of_one_size(capsys) -> None:
    (block,) = re.findall(
        r"```python\n(.*?)```", (PAGES[0].parent / "docs/training.md").read_text(), re.S
    )
    exec(block, {})
    sizes = {line.split()[0]: int(line.split()[1]) for line in capsys.readouterr().out.splitlines()}
    assert list(sizes) == ["mac", "gated-deltanet", "mamba2", "ttt-mlp"]
    assert all(abs(size / sizes["mac"] - 1) < 0.02 for size in sizes.values())


@every_page
def test_every_command_line_is_understood(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    commands = [
        shlex.split(line, comments=True)
        for line in text.splitlines()
        if line.startswith("    titans ") and " VERB" not in line
    ]
    assert len(commands) >= 6 or page != README
    parser = build_parser()
    for _, *arguments in commands:
        options, rest = parser.parse_known_args(arguments)
        assert not rest or options.takes_overrides


@every_page
def test_files_it_names_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("path", sorted((README.parent / "configs").glob("*.toml")), ids=str)
def test_every_config_loads(path: Path) -> None:
    from titans.config import load_toml, to_toml
    from titans.train.config import RunConfig

    config = load_toml(path, RunConfig)
    assert to_toml(config)
