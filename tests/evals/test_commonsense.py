"""Multiple choice: a score is that of the whole text read alone, and accuracies count it."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from titans import MemoryConfig, TitansConfig, TitansLM, preset
from titans.data.choices import Item, Option
from titans.data.tokenizers import ByteTokenizer
from titans.evals import commonsense as module
from titans.evals.commonsense import CommonsenseConfig, commonsense, encode_item, score
from titans.state import NonFiniteError

DATA = Path(os.environ.get("TITANS_DATA_DIR", "absent")) / "commonsense"

ITEM = Item(
    (
        Option("Question: what is red?\nAnswer:", " an old apple"),
        Option("Question: what is red?\nAnswer:", " x"),
        Option("Question: what is red?\nAnswer:", " the sky at night, and the sea below it"),
        Option("Another question:", " an old apple"),
    ),
    0,
)


def build(variant: str) -> TitansLM:
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant,
        dim=16,
        layers=2,
        ffn_hidden=24,
        window=7,
        segment=6,
        persistent=2,
        memory=MemoryConfig(heads=2),
    )
    model = TitansLM(config).double()
    with torch.no_grad():
        model.embedding.weight.normal_()
    return model


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
@pytest.mark.parametrize("write", [True, False])
def test_scores_are_those_of_each_whole_text_alone(variant: str, write: bool) -> None:
    model = build(variant)
    scores = score(model, encode_item(ByteTokenizer(), ITEM), write)
    for option, got in zip(ITEM.options, scores.tolist(), strict=True):
        text = list((option.context + option.continuation).encode())
        with torch.no_grad():
            logits, _ = model(torch.tensor([text]), None, write)
        steps = [log_softmax(logits[0, i - 1], -1)[text[i]].item() for i in range(1, len(text))]
        assert got == pytest.approx(sum(steps[len(option.context) - 1 :]), rel=1e-10)


class Prefers(TitansLM):
    """Knows nothing but how likely each letter is, whatever came before."""

    def __init__(self, likely: str, weight: float) -> None:
        super().__init__(preset("lmm-tiny"))
        self.likely, self.weight = list(likely.encode()), weight

    def run(self, tokens, state=None, write=True):
        output = super().run(tokens, state, write)
        logits = torch.zeros_like(output.logits)
        logits[..., self.likely] = self.weight
        return output._replace(logits=logits)


def write_items(path: Path, *items: tuple[list[str], int]) -> str:
    rows = [{"query": "q", "choices": choices, "gold": gold} for choices, gold in items]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_known_preferences_give_known_accuracies(tmp_path) -> None:
    model = Prefers("a ", 5.0)
    path = write_items(
        tmp_path / "toy.jsonl",
        (["aaaa", "abab", "bbbb"], 0),  # right
        (["bbbb", "aaab"], 0),  # wrong
        (["bb", "aa", "ab", "ba"], 1),  # right
        (["aaa", "bbb"], 0),  # right
    )
    task = commonsense(model, CommonsenseConfig(paths=(path,))).tasks[0]
    assert (task.task, task.items) == ("toy", 4)
    assert task.accuracy == task.accuracy_norm == 0.75
    assert task.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4)
    # Standard deviation of (1, 0, 1, 1) with n - 1 is 0.5; of their mean 0.25.
    assert task.accuracy_error == pytest.approx(0.25)
    seen = []
    (first,) = commonsense(
        model, CommonsenseConfig(paths=(path,), limit=2), watch=seen.append
    ).tasks
    assert (first.items, first.accuracy) == (2, 0.5)
    assert seen == [first]


def test_length_matters_to_one_of_the_two_accuracies(tmp_path) -> None:
    """The short text of unlikely letters is likelier than the long one of likely letters; per
    byte it is not. An umlaut is two bytes."""
    model = Prefers("a ", 1.0)
    path = write_items(tmp_path / "length.jsonl", (["aaaaaaaa", "bb"], 0), (["aaaa", "ää"], 1))
    result = commonsense(model, CommonsenseConfig(paths=(path,)))
    assert (result.accuracy, result.accuracy_norm) == (0.0, 0.5)


def test_a_tokenizer_that_joins_across_the_border_is_split_there() -> None:
    class Pairs(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return list(text.encode()[::2])

    item = Item((Option("abc", " de"), Option("abcd", " ef")), 0)
    odd, even = encode_item(Pairs(), item)
    # "abc de" has a, c, d: what follows the context's a, c. "abcd ef" has a, c, ' ', f.
    assert bytes(odd.context) == b"ac"
    assert bytes(odd.continuation) == b"d"
    assert bytes(even.continuation) == b" f"


def test_a_whole_that_is_split_otherwise_is_scored_in_its_parts() -> None:
    class Reversing(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return list(text.encode()[::-1])

    (option, _) = encode_item(Reversing(), Item((Option("ab", " c"), Option("ab", " d")), 0))
    assert bytes(option.context) == b"ba"
    assert bytes(option.continuation) == b"c "


def test_a_file_that_cannot_be_read_is_told_before_any_question_is_asked(
    tmp_path, monkeypatch, without_shape_checks
) -> None:
    write_items(tmp_path / "a.jsonl", (["aa", "bb"], 0))
    (tmp_path / "b.jsonl").write_text("{}\n")
    monkeypatch.setattr(module, "judge", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match=r"b\.jsonl:1"):
        commonsense(Prefers("a", 1.0), CommonsenseConfig(paths=(str(tmp_path),)))


def test_errors() -> None:
    with pytest.raises(ValueError, match="paths is empty"):
        CommonsenseConfig(paths=())
    with pytest.raises(ValueError, match="limit must not be negative"):
        CommonsenseConfig(paths=("a",), limit=-1)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the commonsense files: set TITANS_DATA_DIR")
def test_a_few_real_questions_of_every_task(without_shape_checks) -> None:
    torch.manual_seed(0)
    result = commonsense(
        TitansLM(preset("lmm-tiny")), CommonsenseConfig(paths=(str(DATA),), limit=12)
    )
    assert json.loads(json.dumps(dataclasses.asdict(result)))["tasks"][0]["items"] == 12
    assert [task.chance for task in result.tasks] == [0.25, 0.25, 0.25, 0.5, 0.5]
    names = ["arc_challenge", "arc_easy", "hellaswag_val_full", "piqa", "winogrande"]
    assert [task.task for task in result.tasks] == names
    assert result.tasks[4].accuracy == result.tasks[4].accuracy_norm


def test_a_damaged_model_has_no_accuracy(tmp_path) -> None:
    """All scores NaN would make the first option the likeliest."""
    model = build("lmm")
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    path = write_items(tmp_path / "toy.jsonl", (["aaaa", "bbbb"], 0))
    with pytest.raises(NonFiniteError, match="is not finite"):
        commonsense(model, CommonsenseConfig(paths=(path,)))
