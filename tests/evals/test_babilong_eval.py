"""bAbI's questions asked of readers whose answers are known beforehand."""

import dataclasses
import json
import re

import pytest
import torch

from titans.config import MemoryConfig, TitansConfig
from titans.evals.babilong import BabilongConfig, babilong, names_it, plot
from titans.models.lm import HiddenOutput, TitansLM

PLACES = ("kitchen", "garden", "office", "bedroom")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task 1: where Mary went last, eight stories; and some prose."""
    folder = tmp_path_factory.mktemp("babi")
    lines = []
    for story in range(8):
        place, other = PLACES[story % 4], PLACES[(story + 1) % 4]
        lines += [f"1 Mary went to the {other}.", f"2 Mary went to the {place}."]
        lines += [f"3 John went to the {other}.", f"4 Where is Mary? \t{place}\t2"]
    (folder / "qa1_places_test.txt").write_text("\n".join(lines) + "\n")
    (folder / "book.txt").write_text("".join(f"It rained on day {i}. " for i in range(300)))
    return folder


class Scripted(TitansLM):
    """Says what `speak(prompt)` makes of the whole text it has read, byte by byte."""

    def __init__(self, speak):
        memory = MemoryConfig(heads=2)
        super().__init__(TitansConfig(variant="lmm", dim=16, layers=1, memory=memory))
        self.speak = speak
        self.head = torch.nn.Identity()  # what is hidden are the logits themselves

    def hidden(self, tokens, state=None, write=True):
        if state is None:
            self.texts, self.said = ["" for _ in tokens], [None for _ in tokens]
            state = self.init_state(len(tokens))
        logits = torch.zeros(*tokens.shape, 257)
        for row, new in enumerate(tokens.tolist()):
            self.texts[row] += bytes(new).decode()
            if self.texts[row].endswith("Answer:"):
                self.said[row] = iter(self.speak(self.texts[row]).encode() + bytes(99))
            if self.said[row] is not None:
                logits[row, -1, next(self.said[row])] = 1.0
        return HiddenOutput(logits, state, [None])


def last(text):
    return re.findall("Mary went to the ([a-z]+)", text)[-1]


def config(folder, **values):
    return BabilongConfig(
        **{
            "tasks": (1,),
            "lengths": (0, 300, 3000),
            "rows": 3,
            "folder": str(folder),
            "paths": (str(folder / "book.txt"),),
            **values,
        }
    )


def test_who_reads_everything_knows_everything(folder):
    watched = []
    reader = Scripted(lambda text: f" {last(text)}.")
    result = babilong(reader, config(folder), watch=watched.append)
    assert [(c.length, c.asked, c.score, c.exact) for c in result.cells] == [
        (length, 8, 1.0, 1.0) for length in (0, 300, 3000)
    ]
    assert {cell.guess for cell in result.cells} == {0.25}
    assert tuple(watched) == result.cells
    json.loads(json.dumps(dataclasses.asdict(result)))
    plot(result, folder / "plot.png")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_facts_alone_need_no_prose(folder):
    reader = Scripted(lambda text: f" {last(text)}.")
    told = [
        babilong(reader, config(folder, lengths=(0,), **more)).cells
        for more in ({}, {"paths": (str(folder / "none"),)})
    ]
    assert told[0] == told[1]


def test_the_order_of_the_facts_tells_the_answer(folder):
    first = Scripted(lambda text: f" {re.findall('Mary went to the ([a-z]+)', text)[0]}.")
    assert {cell.score for cell in babilong(first, config(folder)).cells} == {0.0}


def test_scores_are_babilongs_and_exact_is_strict(folder):
    for form, score, exact in [
        (" {}, no.", 1.0, 0.0),
        (" THE {}", 1.0, 0.0),
        ("{}.", 1.0, 0.0),
        (" garden {}.", 0.25, 0.0),
        (" {}.", 1.0, 1.0),
        (" kitchen.", 0.25, 0.25),
    ]:
        reader = Scripted(lambda text, form=form: form.format(last(text)))
        (cell,) = babilong(reader, config(folder, lengths=(500,))).cells
        assert (cell.score, cell.exact) == (score, exact), form


def test_one_answer_and_no_other_must_be_named():
    labels = ("none", "one", "two", "bathroom", "office", "apple", "milk")
    assert names_it(" none. one", "none", "How many?", labels)
    assert not names_it(" none", "one", "How many?", labels)
    assert not names_it(" one or two", "one", "How many?", labels)
    assert names_it(" from the office to the bathroom", "bathroom", "Office?", labels)
    assert names_it(" milk,apple.", "apple,milk", "What?", labels)
    assert not names_it(" milk.", "apple,milk", "What?", labels)
    assert not names_it(" milk,apple.", "apple", "What?", labels)
    assert not names_it("", "milk", "What?", labels)
    # An answer of several words may share some with the question.
    gardens = ("the big garden", "the red garden")
    assert names_it(" the big garden.", "the big garden", "Where is the lady Mary?", gardens)
    assert not names_it(" the red garden.", "the big garden", "Where is the lady?", gardens)


def test_a_way_is_named_step_by_step():
    ways = tuple(f"{a},{b}" for a in "nesw" for b in "nesw")
    question = "How do you go from the kitchen to the garden?"
    assert names_it(" n,w.", "n,w", question, ways)
    assert not names_it(" w,n.", "n,w", question, ways)
    assert names_it(" s,s.", "s,s", question, ways)
    assert not names_it(" s.", "s,s", question, ways)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ()}, "tasks or lengths is empty"),
        ({"lengths": (-1,)}, "lengths and seed must not be negative"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        BabilongConfig(**values)


def test_a_missing_task_is_named(folder):
    with pytest.raises(ValueError, match=r"no file qa7_\*_test.txt"):
        babilong(Scripted(str), config(folder, tasks=(7,)))
