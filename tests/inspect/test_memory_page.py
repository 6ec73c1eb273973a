"""docs/memory.md: its example runs, and its commands are understood."""

import re
import shlex
from pathlib import Path

import torch

from titans.cli import build_parser
from titans.inspect import explain

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"


def test_the_example_runs_and_shows_what_it_says(capsys) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    scope: dict = {}
    exec(block, scope)
    assert chr(scope["text"][0, scope["token"]]) == "1"
    assert scope["text"][0, 8 : scope["token"] + 1].tolist() == list("«baku: 4821".encode())
    assert scope["erased"].position == scope["seen"].state.position - 12
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("16 [[[")
    # The note was written, and stays: the head that wrote it still returns what it was told.
    curve = scope["recall"].cosine
    assert float(curve.max()) > 0.99
    whole = explain(scope["model"], None, scope["text"][:, :16], 0, 1)
    assert torch.equal(scope["gradient"], whole.gradient[0][3])


def test_its_commands_are_understood() -> None:
    lines = [line.split("#")[0] for line in PAGE.read_text().splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("    titans ")]
    assert len(commands) == 7
    for _, *arguments in commands:
        options, rest = build_parser().parse_known_args(arguments)
        assert (options.verb, rest) == ("memory", [])
