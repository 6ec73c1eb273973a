"""Needles asked of readers whose answers are known beforehand."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from titans.config import MemoryConfig, TitansConfig
from titans.data.haystack import Piece, Sample
from titans.data.needle import KINDS
from titans.evals.answers import answer, exact
from titans.evals.needle import (
    NeedleCell,
    NeedleConfig,
    NeedleResult,
    needle,
    plot,
    string_match,
)
from titans.evals.report import wilson
from titans.generate import Sampling, generate
from titans.models.lm import HiddenOutput, TitansLM

VARIANTS = ("lmm", "mac")


def tiny(variant="lmm"):
    memory = MemoryConfig(heads=2, conv_width=2, block_size=16)
    return TitansConfig(
        variant=variant, dim=16, layers=1, ffn_hidden=0, segment=16, persistent=1, memory=memory
    )


class Scripted(TitansLM):
    """Says what `speak(prompt)` makes of the whole text it has read, byte by byte."""

    def __init__(self, speak):
        super().__init__(tiny())
        self.speak = speak
        self.head = torch.nn.Identity()  # what is hidden are the logits themselves

    def hidden(self, tokens, state=None, write=True):
        if state is None:
            self.texts, self.said = ["" for _ in tokens], [None for _ in tokens]
            state = self.init_state(len(tokens))
        logits = torch.zeros(*tokens.shape, 257)
        for row, new in enumerate(tokens.tolist()):
            self.texts[row] += bytes(new).decode()
            if self.texts[row].endswith(("provided text is", "provided text are", "they are:")):
                self.said[row] = iter(self.speak(self.texts[row]).encode() + bytes(200))
            if self.said[row] is not None:
                logits[row, -1, next(self.said[row])] = 1.0
        return HiddenOutput(logits, state, [None])


def find(text):
    """What RULER's questions ask for, found by reading the whole prompt."""
    if "VAR" in text:
        value = re.search(r"assigned the value (\d{5}), they are:$", text)[1]
        values = {}
        for name, given in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", text, re.MULTILINE):
            values[name] = values.get(given, given)
        return [name for name, given in values.items() if given == value]
    stated = re.findall(r"special magic \w+ for (\S+) is: (\S+)\.", text)
    asked = re.search(r"text\? The special magic \w+ for (.*) mentioned in", text)[1]
    keys = re.sub("and ", "", asked).split(", ")
    return [value for key in keys for name, value in stated if name == key]


def right(text):
    found = find(text)
    if "VAR" in text:
        return f" {' '.join(found)}."
    return f" {found[0]}." if len(found) == 1 else f" {', '.join(found[:-1])}, and {found[-1]}."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needle")
    (folder / "nounlist.txt").write_text("".join(f"noun{i}\n" for i in range(300)))
    (folder / "adjectivelist.txt").write_text("".join(f"quick{i}\n" for i in range(300)))
    (folder / "essay.txt").write_text("".join(f"Day {i} of rain. " for i in range(300)))
    return folder


def config(folder, **values):
    return NeedleConfig(
        **{
            "lengths": (1500, 2500),
            "samples": 3,
            "rows": 3,
            "words": str(folder),
            "paths": (str(folder / "essay.txt"),),
            **values,
        }
    )


def test_who_reads_everything_finds_everything(folder):
    result = needle(Scripted(right), config(folder, kinds=tuple(KINDS), samples=3, rows=2))
    assert [(cell.kind, cell.length) for cell in result.cells] == [
        (kind, length) for kind in KINDS for length in (1500, 2500)
    ]
    assert {(cell.score, cell.exact, cell.asked) for cell in result.cells} == {(1.0, 1.0, 3)}
    assert result.prose_tokens == len((folder / "essay.txt").read_text().strip()) + 1
    assert result.cells[0].low == pytest.approx(3 / (3 + 1.96**2), abs=1e-4)
    assert result.cells[0].high == 1.0


def test_scores_are_rulers_and_exact_is_strict(folder):
    multi = config(folder, kinds=("multivalue", "single-3"), lengths=(1500,), samples=2)
    half = needle(Scripted(lambda text: f" {find(text)[0]}, {find(text)[-1]}."), multi)
    # two of four values in the one, the right value twice over in the other
    assert [(cell.score, cell.exact) for cell in half.cells] == [(0.5, 0.0), (1.0, 0.0)]
    loud = needle(Scripted(lambda text: right(text).upper()), multi)
    assert [(cell.score, cell.exact) for cell in loud.cells] == [(1.0, 0.0), (1.0, 0.0)]
    wordy = Scripted(lambda text: " well, " + find(text)[0])
    one = config(folder, kinds=("single-1",), lengths=(1500,), samples=1)
    assert needle(wordy, one).cells[0].score == 0.0  # no room to say it late
    assert needle(wordy, dataclasses.replace(one, generated=128)).cells[0].score == 1.0


def test_a_reader_of_the_end_finds_what_is_deep(folder):
    late = Scripted(lambda text: right(text) if find(text[-700:]) else " 0")
    watched = []
    setup = config(folder, kinds=("single-1", "single-2"), depths=(0.0, 1.0), samples=2)
    result = needle(late, setup, watch=watched.append)
    assert [cell.score for cell in result.cells] == [0.0, 1.0] * 4
    assert tuple(watched) == result.cells
    json.loads(json.dumps(dataclasses.asdict(result)))
    anywhere = needle(late, dataclasses.replace(setup, kinds=("single-1",), depths=()))
    for plotted in (result, anywhere):
        plot(plotted, folder / "plot.png")
        assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_answered_as_each_alone(variant):
    torch.manual_seed(0)
    model = TitansLM(tiny(variant))
    draw = np.random.default_rng(0)
    texts = [draw.integers(256, size=size) for size in (70, 70, 33, 70)]
    samples = [
        Sample(len(t), lambda t=t: iter([Piece(t[:20]), Piece(t[20:])]), t, ("",), "")
        for t in texts
    ]
    given = answer(model, samples, 5, 257)
    for row, text in zip(given, texts, strict=True):
        alone = generate(model, [text.tolist()], 5, sampling=Sampling(temperature=0.0))
        assert row.tolist() == alone.tokens[0]


def test_without_writing_nothing_is_remembered():
    torch.manual_seed(0)
    model = TitansLM(tiny())
    wrote = []
    original = model.hidden
    model.hidden = lambda tokens, state=None, write=True: (
        wrote.append(write) or original(tokens, state, write)
    )
    text = np.arange(40)
    sample = Sample(40, lambda: iter([Piece(text)]), text, ("",), "")
    answer(model, [sample], 3, 257, write=False)
    assert wrote == [False] * 3


def test_what_pads_a_vocabulary_is_never_said(folder):
    """Its logits are trained by nothing, and a tokenizer cannot decode what it does not have."""
    torch.manual_seed(0)
    model = TitansLM(dataclasses.replace(tiny(), vocab_size=512))
    with torch.no_grad():
        model.head.weight[257:] *= 50
    cells = needle(model, config(folder, kinds=("single-1",), samples=2)).cells
    assert {cell.asked for cell in cells} == {2}


def test_string_match_counts_the_expected():
    sample = Sample(1, lambda: iter([]), np.array([1]), ("1234567", "7654321"), "")
    assert string_match(" 1234567, and 765432", sample) == 0.5
    assert string_match(" 7654321 1234567", sample) == 1.0
    sample = Sample(1, lambda: iter([]), np.array([1, 2]), ("",), "")
    assert exact(np.array([1, 2, 3]), sample)
    assert not exact(np.array([1]), sample)
    assert not exact(np.array([1, 3]), sample)


def test_the_interval_is_wilsons():
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29
    for right_, asked, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(float(right_), asked) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_holds_the_share_whatever_was_rounded(tmp_path):
    for asked in range(1, 513):
        assert wilson(float(asked), asked)[1] == 1.0
        assert wilson(0.0, asked)[0] == 0.0
    low, high = wilson(4.0, 4)
    cell = NeedleCell(
        kind="single-1", length=512, depth=None, asked=4, score=1.0, exact=1.0, low=low, high=high
    )
    config = NeedleConfig(kinds=("single-1",), lengths=(512,))
    plot(NeedleResult(config=config, cells=(cell,)), tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kinds": ("single-4",)}, "unknown needle kind 'single-4'"),
        ({"kinds": ("variables",), "depths": (0.5,)}, "depths are for kinds with one needle"),
        ({"kinds": ()}, "kinds or lengths is empty"),
        ({"lengths": (0, 2048)}, "lengths must be at least 1"),
        ({"depths": (1.5,)}, r"depths must lie in \[0, 1\], got \[1.5\]"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"seed": -1}, "generated and seed must not be negative"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        NeedleConfig(**values)
