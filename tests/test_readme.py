"""The README's code runs as written, and its commands exist."""

import re
from pathlib import Path

import pytest

from titans.cli import build_parser

README = Path(__file__).parent.parent / "README.md"


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


def test_every_command_line_is_understood() -> None:
    text = README.read_text().replace("\\\n", " ")
    commands = [line.split("#")[0].split() for line in text.splitlines() if "    titans " in line]
    assert len(commands) >= 6
    parser = build_parser()
    for _, *arguments in commands:
        if arguments[0].isupper():
            continue
        options, rest = parser.parse_known_args(arguments)
        assert not rest or options.takes_overrides


def test_files_it_names_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not link.startswith("http"):
            assert (README.parent / link).exists(), link


@pytest.mark.parametrize("path", sorted((README.parent / "configs").glob("*.toml")), ids=str)
def test_every_config_loads(path: Path) -> None:
    from titans.config import load_toml, to_toml
    from titans.train.config import RunConfig

    config = load_toml(path, RunConfig)
    assert to_toml(config)
