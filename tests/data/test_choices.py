"""Multiple-choice files: every layout, compressed or not, and errors that name file and line."""

import bz2
import gzip
import json
import os
from pathlib import Path

import pytest

from titans.data.choices import Item, Option, choice_files, read_choices, task_name

DATA = Path(os.environ.get("TITANS_DATA_DIR", "absent")) / "commonsense"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="needs the commonsense files: set TITANS_DATA_DIR"
)


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_queries_with_choices(tmp_path) -> None:
    row = {"query": "Question: Why?\n", "choices": ["because ", "so"], "gold": 1}
    path = write_lines(tmp_path / "siqa.jsonl", row)
    context = "Question: Why?\nAnswer:"
    expected = Item((Option(context, " because"), Option(context, " so")), 1)
    assert list(read_choices(path)) == [expected]
    assert next(read_choices(path, " A:")).options[0].context == "Question: Why? A:"


def test_keys_of_another_layout_beside_its_own_change_nothing(tmp_path) -> None:
    row = {"query": "4 or 5?", "choices": ["4", "5"], "gold": 1}
    boolq = {"passage": "It is.", "question": "is it", "answer": "Paris"}
    assert list(read_choices(write_lines(tmp_path / "a.jsonl", row | boolq))) == list(
        read_choices(write_lines(tmp_path / "b.jsonl", row))
    )


def test_boolq_and_siqa_as_they_are_published(tmp_path) -> None:
    boolq = {"question": "is it so", "passage": "It is. ", "answer": True, "title": "It"}
    answers = {"answerA": "a", "answerB": "b", "answerC": "c"}
    siqa = {"context": "Ann ran.", "question": "Why?", **answers, "label": "3"}
    yes, last = read_choices(write_lines(tmp_path / "q.jsonl", boolq, siqa))
    asked = "It is.\nQuestion: is it so?\nAnswer:"
    assert yes == Item((Option(asked, " no"), Option(asked, " yes")), 1)
    assert last == Item(tuple(Option("Ann ran. Why?\nAnswer:", f" {x}") for x in "abc"), 2)
    for wrong in (boolq | {"answer": ["x"]}, siqa | {"label": "4"}):
        with pytest.raises(ValueError, match=r"w\.jsonl:1: expected a (gold in 0|label 1)"):
            list(read_choices(write_lines(tmp_path / "w.jsonl", wrong)))


def test_contexts_with_one_continuation(tmp_path) -> None:
    row = {"context_options": ["It rained so Ann", "It rained so Bob"]}
    path = tmp_path / "winogrande.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({**row, "continuation": "got wet.", "gold": 0}) + "\n\n")
    options = tuple(Option(context, " got wet.") for context in row["context_options"])
    assert list(read_choices(path)) == [Item(options, 0)]


def test_endings_of_six_lines(tmp_path) -> None:
    path = tmp_path / "hella.txt.bz2"
    path.write_bytes(bz2.compress(b"He\n3\na.\nb.\nc.\nd.\n\nShe\n0\n1\n2\n3\n4\n\n"))
    first, second = read_choices(path)
    assert first == Item(tuple(Option("He", f" {x}.") for x in "abcd"), 3)
    assert second == Item(tuple(Option("She", f" {x}") for x in "1234"), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"q\.jsonl:1: not a line of JSON"),
        pytest.param("[" * 100_000, r"q\.jsonl:1: not a line of JSON \(nested too deep", id="deep"),
        ("[1]", r"q\.jsonl:1: expected an object with query, choices and gold"),
        ('{"query": "a", "choices": ["b", "c"]}', r"q\.jsonl:1: expected a gold in 0\.\.1, got No"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', r"gold in 0\.\.1, got 2"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', r"got True"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "at least two choices, got 1"),
        ('{"query": "a", "choices": ["b", " "], "gold": 0}', "got an empty one"),
        ('{"query": "a", "choices": "bc", "gold": 0}', "expected choices to be text"),
        ('{"query": 3, "choices": ["b", "c"], "gold": 0}', "expected query to be text"),
        (
            '{"context": "a", "question": "b", "answerA": "c", "answerB": "d", "answerC": "e", '
            '"label": 0}',
            "expected a label 1, 2 or 3, got 0",
        ),
        (
            r'{"query": "a\ud800", "choices": ["b", "c"], "gold": 0}',
            r"q\.jsonl:1: 'query' is not valid Unicode",
        ),
        ("\n", "no questions in it"),
    ],
)
def test_bad_lines_are_named(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_choices(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["He\n4\na\nb\nc\nd\n", "He\n1\na\nb\nc\n", "He\n"])
def test_bad_endings_are_named(tmp_path, text: str) -> None:
    path = tmp_path / "h.txt"
    path.write_text("Ok\n0\na\nb\nc\nd\n" + text)
    with pytest.raises(ValueError, match=r"h\.txt:7: expected a context, the index of the right"):
        list(read_choices(path))


def test_a_missing_file_and_an_empty_folder(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"absent\.jsonl: cannot be read"):
        list(read_choices(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match="no question files in it"):
        choice_files((str(tmp_path),))


@needs_data
def test_the_real_files() -> None:
    counts = {task_name(f): len(list(read_choices(f))) for f in choice_files((str(DATA),))}
    assert counts == {
        "arc_challenge": 1172,
        "arc_easy": 2376,
        "hellaswag_val_full": 10042,
        "piqa": 1838,
        "winogrande": 1267,
    }
