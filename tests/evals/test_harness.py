"""lm-evaluation-harness: scores are those of our own suites and of whole texts read alone."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from titans import MemoryConfig, TitansConfig, TitansLM, preset
from titans.cli import build_parser, main
from titans.data.choices import read_choices
from titans.data.needle import NeedleTask
from titans.data.tokenizers import ByteTokenizer
from titans.evals.commonsense import CommonsenseConfig, commonsense, encode_item, score
from titans.evals.harness import TASKS, HarnessConfig, harness

pytest.importorskip("lm_eval", reason="needs `pip install -e '.[eval]'`")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from titans.data.told import Until, tell
from titans.evals.harness import data
from titans.evals.harness import model as harness_model
from titans.evals.harness.model import HarnessLM
from titans.evals.harness.until import GREEDY, parse_until

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TITANS_DATA_DIR", "absent")) / "commonsense"
END = 256


def build(variant: str = "lmm", **changes: object) -> TitansLM:
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
        **changes,
    )
    model = TitansLM(config).double()
    with torch.no_grad():
        model.embedding.weight.normal_()
    return model


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def alone(model: TitansLM, tokens: list[int]) -> torch.Tensor:
    """log p of every next token, from one pass over one row."""
    with torch.no_grad():
        return log_softmax(model(torch.tensor([tokens]))[0][0], -1)


# Questions.


def words(generator: np.random.Generator, count: int) -> str:
    letters = list("abcdeäöü日")
    return " ".join("".join(generator.choice(letters, 3)) for _ in range(count))


def write_questions(folder: Path, count: int = 6) -> None:
    """One file for each task, in the three layouts."""
    generator = np.random.default_rng(0)
    for name, choices in (("piqa", 2), ("arc_easy", 4), ("arc_challenge", 5)):
        rows = [
            {
                "query": f"Question: {words(generator, 3)}?  ",
                "choices": [
                    f" {words(generator, int(generator.integers(1, 4)))}" for _ in range(choices)
                ],
                "gold": int(generator.integers(choices)),
            }
            for _ in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    rows = [
        {
            "context_options": [words(generator, 4), words(generator, 3)],
            "continuation": words(generator, 2),
            "gold": int(generator.integers(2)),
        }
        for _ in range(count)
    ]
    (folder / "winogrande.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [
        [words(generator, 4), str(generator.integers(4))]
        + [words(generator, int(generator.integers(1, 5))) for _ in range(4)]
        for _ in range(count)
    ]
    (folder / "hellaswag_val.txt").write_text("".join("\n".join(i) + "\n" for i in items))


def test_accuracies_are_those_of_our_own_suite(tmp_path, without_shape_checks) -> None:
    write_questions(tmp_path)
    model = build()
    config = HarnessConfig(tasks=("titans_commonsense",), questions=str(tmp_path))
    result = harness(model, config)
    got = {(s.task, s.metric): s for s in result.scores}
    ours = commonsense(model, CommonsenseConfig(paths=(str(tmp_path),)))
    assert len({t.accuracy for t in ours.tasks}) > 1
    for task in ours.tasks:
        name = f"titans_{task.task.removesuffix('_val')}"
        accuracy = got[name, "acc"]
        assert (accuracy.items, accuracy.value) == (6, task.accuracy)
        assert accuracy.error == pytest.approx(task.accuracy_error)
        if name != "titans_winogrande":
            assert got[name, "acc_bytes"].value == task.accuracy_norm
            assert got[name, "acc_norm"].value == accuracy_per_character(model, tmp_path, task.task)
    assert len(got) == 4 * 3 + 1
    # Not two names for one number: here characters and bytes decide differently.
    assert any(
        got[t, "acc_norm"].value != got[t, "acc_bytes"].value for t, m in got if m == "acc_bytes"
    )
    (mean,) = result.groups
    assert (mean.task, mean.metric, mean.items) == ("titans_commonsense", "acc", 30)
    assert mean.value == pytest.approx(ours.accuracy)


def test_a_group_of_groups_counts_the_questions_of_all(tmp_path, without_shape_checks) -> None:
    """As lm-eval's mmlu has them."""
    write_questions(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    aggregate = "aggregate_metric_list: [{metric: acc}]"
    (folder / "inner.yaml").write_text(f"group: inner\ntask: [titans_piqa]\n{aggregate}\n")
    (folder / "outer.yaml").write_text(
        f"group: outer\ntask: [inner, titans_hellaswag]\n{aggregate}\n"
    )
    result = harness(
        build(),
        HarnessConfig(tasks=("outer",), include=(str(folder),), questions=str(tmp_path)),
    )
    assert {group.task: group.items for group in result.groups} == {"inner": 6, "outer": 12}


def accuracy_per_character(model: TitansLM, folder: Path, name: str) -> float:
    (path,) = folder.glob(f"{name}.*")
    right = []
    for item in read_choices(path):
        scores = score(model, encode_item(ByteTokenizer(), item))
        sizes = [len(option.continuation) - 1 for option in item.options]
        right.append(int((scores / torch.tensor(sizes)).argmax()) == item.gold)
    return sum(right) / len(right)


def test_memories_that_are_only_read_score_differently(tmp_path, without_shape_checks) -> None:
    write_questions(tmp_path)
    config = CommonsenseConfig(paths=(str(tmp_path / "piqa.jsonl"),), write=False)
    settings = HarnessConfig(tasks=("titans_piqa",), questions=str(tmp_path), write=False)
    result = harness(build(), settings)
    assert result.scores[0].value == commonsense(build(), config).accuracy
    (request,) = ask("loglikelihood", ("abcabc" * 9, "abcabc"))
    (one,), (other,) = (HarnessLM(build(), write=w).loglikelihood([request]) for w in (True, False))
    assert one[0] != pytest.approx(other[0], rel=1e-6)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the commonsense files: set TITANS_DATA_DIR")
def test_real_questions_too(without_shape_checks) -> None:
    torch.manual_seed(0)
    model = TitansLM(preset("lmm-tiny"))
    result = harness(model, HarnessConfig(tasks=("titans_commonsense",), limit=3))
    ours = commonsense(model, CommonsenseConfig(paths=(str(DATA),), limit=3))
    got = {(s.task.removeprefix("titans_"), s.metric): s.value for s in result.scores}
    for task in ours.tasks:
        name = task.task.removesuffix("_val_full")
        assert got[name, "acc"] == task.accuracy
        assert got.get((name, "acc_bytes"), task.accuracy) == task.accuracy_norm


# Requests.


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_likelihoods_are_those_of_whole_texts(variant: str) -> None:
    model = build(variant)
    pairs = [
        ("a context", " x"),
        ("another", " answer, which is longer"),
        ("a context", " answer"),
        ("", "no context"),
        ("it ends in a space ", "so the answer gets it"),
    ]
    found = HarnessLM(model).loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, answer), (got, greedy) in zip(pairs, found, strict=True):
        text = list((context + answer).encode())
        begin = len(context.rstrip().encode())
        if not context:
            text, begin = [END, *text], 1
        rows = alone(model, text)
        steps = range(begin, len(text))
        assert got == pytest.approx(sum(rows[i - 1, text[i]].item() for i in steps), rel=1e-10)
        assert greedy == all(int(rows[i - 1].argmax()) == text[i] for i in steps)


def test_no_more_rows_than_asked_for_are_read_side_by_side() -> None:
    """lm-eval's BLiMP asks for 134,000 sentences after one empty context."""
    model, sizes = build(), []
    pairs = [("", f"sentence {number}") for number in range(7)]
    together = HarnessLM(model, batch_size=32).loglikelihood(ask("loglikelihood", *pairs))
    original = model.run

    def counted(tokens, *rest):
        sizes.append(len(tokens))
        return original(tokens, *rest)

    model.run = counted
    found = HarnessLM(model, batch_size=3).loglikelihood(ask("loglikelihood", *pairs))
    assert max(sizes) == 3
    assert [log for log, _ in found] == pytest.approx([log for log, _ in together], rel=1e-10)


def test_what_the_model_itself_says_is_greedy() -> None:
    model = build()
    text = list(b"who said")
    for _ in range(4):
        text.append(int(alone(model, text)[-1, :128].argmax()))
        model.head.weight.data[128:] = 0  # so that it says ASCII
    said = bytes(text[8:]).decode()
    pairs = [("who said", said), ("who said", said[:-1] + "~"), ("who said", said[:2])]
    found = HarnessLM(model).loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    rows = alone(model, text)
    assert [greedy for _, greedy in found] == [
        all(int(rows[i - 1].argmax()) == text[i] for i in range(8, 12)),
        False,
        all(int(rows[i - 1].argmax()) == text[i] for i in range(8, 10)),
    ]


def test_a_context_is_read_once_for_its_choices(monkeypatch) -> None:
    model, read = build(), []
    run = TitansLM.run

    def watched(self, tokens, state=None, write=True):
        read.append(tuple(tokens.shape))
        return run(self, tokens, state, write)

    monkeypatch.setattr(TitansLM, "run", watched)
    pairs = [("c" * 50, " one"), ("d" * 50, " two"), ("c" * 50, " three")]
    HarnessLM(model, batch_size=2).loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    assert read == [(1, 50), (2, 5), (1, 50), (1, 3)]


def test_a_document_is_one_stream(monkeypatch) -> None:
    monkeypatch.setattr(harness_model, "PIECE", 7)
    model, longest = build(), []
    run = TitansLM.run

    def watched(self, tokens, state=None, write=True):
        longest.append(tokens.shape[1])
        return run(self, tokens, state, write)

    texts = ["short", "a text of some length, twice: a text of some length", "ä", "twice as short"]
    expected = []
    for text in texts:
        tokens = [END, *text.encode()]
        rows = alone(model, tokens)
        expected.append(sum(rows[i - 1, tokens[i]].item() for i in range(1, len(tokens))))
    monkeypatch.setattr(TitansLM, "run", watched)
    for rows in (1, 3):
        lm = HarnessLM(model, batch_size=rows)
        requests = ask("loglikelihood_rolling", *((text,) for text in texts))
        found = lm.loglikelihood_rolling(requests, disable_tqdm=True)
        assert found == pytest.approx(expected, rel=1e-6)  # nats of a token are float32
    assert max(longest) == 7  # however long the document


def test_text_is_scored_per_byte_and_word(tmp_path) -> None:
    texts = ["Ein Bär, zwei Bären.", "One more  text"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    model = build()
    config = HarnessConfig(tasks=("titans_text",), text=(str(tmp_path / "texts.jsonl"),))
    got = {s.metric: s.value for s in harness(model, config).scores}
    requests = ask("loglikelihood_rolling", *((text,) for text in texts))
    total = sum(HarnessLM(model).loglikelihood_rolling(requests, disable_tqdm=True))
    size = sum(len(text.encode()) for text in texts)
    assert got["bits_per_byte"] == pytest.approx(-total / size / np.log(2))
    assert got["byte_perplexity"] == pytest.approx(np.exp(-total / size))
    assert got["word_perplexity"] == pytest.approx(np.exp(-total / 7))


# Generation.


class Pieces:
    """Token i is the i-th of some strings; the last one ends a document."""

    name = "pieces"

    def __init__(self, *strings: str) -> None:
        self.strings = strings
        self.end_of_document = len(strings)
        self.vocab_size = len(strings) + 1

    def encode(self, text: str) -> list[int]:
        return [self.strings.index(text)] if text else []

    def decode(self, ids) -> str:
        return "".join(self.strings[i] for i in ids if i != self.end_of_document)


class Recites(TitansLM):
    """Says token i + 1 after token i, whatever it remembers."""

    def __init__(self) -> None:
        super().__init__(preset("lmm-tiny"))
        self.head = torch.nn.Identity()

    def hidden(self, tokens, state=None, write=True):
        output = super().hidden(tokens, state, write)
        known = torch.nn.functional.one_hot(tokens + 1, self.config.vocab_size).float()
        return output._replace(hidden=known)


def recite(until: Until, *strings: str, prompts: int = 1) -> list[str]:
    """What a model says that has read the first string and knows how it goes on."""
    until = dataclasses.replace(until, sampling=GREEDY)
    return [text for text, _ in tell(Recites(), Pieces(*strings), [[0]] * prompts, until)]


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (("\n\n",), "abc"),  # two tokens spell it, and more around it
        (("c\n",), "ab"),
        (("b", "abc"), "a"),  # the first in the text, not in the list
        (("d", "\n\n"), "abc"),
        (("äf",), "abc\n\nde"),  # a character of two bytes
        (("nowhere",), "abc\n\ndeäfg"),  # the end of the document
        (("fgh",), "abc\n\ndeäfg"),  # never complete
        ((), "abc\n\ndeäfg"),
    ],
)
def test_strings_end_a_text_whatever_their_tokens(stop, said) -> None:
    pieces = ("?", "ab", "c\n", "\nd", "e", "ä", "fg")
    assert recite(Until(stop=stop), *pieces, prompts=2) == [said, said]


def test_a_text_has_at_most_so_many_tokens() -> None:
    assert recite(Until(max_tokens=2), "?", "ab", "cd", "ef") == ["abcd"]
    assert recite(Until(max_tokens=2, stop=("e",)), "?", "ab", "cd", "ef") == ["abcd"]


class Padded(Recites):
    """Most of all it would say an id that no tokenizer has: its vocabulary is filled up."""

    def hidden(self, tokens, state=None, write=True):
        output = super().hidden(tokens, state, write)
        output.hidden[..., -1] = 2.0
        return output


def test_ids_that_only_fill_the_vocabulary_are_not_said() -> None:
    ((said, tokens),) = tell(Padded(), Pieces("?", "ab", "c"), [[0]], Until(sampling=GREEDY))
    assert (said, tokens) == ("abc", 3)


def greedy(model: TitansLM, prompt: str, count: int) -> str:
    text = list(prompt.encode())
    for _ in range(count):
        token = int(alone(model, text)[-1].argmax())
        if token == END:
            break
        text.append(token)
    return bytes(text[len(prompt.encode()) :]).decode(errors="replace")


def test_generation_is_greedy_decoding_of_the_whole_text(without_shape_checks) -> None:
    model = build("mac")
    prompts = ["one prompt", "two of one", "longer than the two", "and of ten"]
    requests = ask("generate_until", *((p, {"until": [], "max_gen_toks": 6}) for p in prompts))
    said = HarnessLM(model, batch_size=2).generate_until(requests, disable_tqdm=True)
    assert said == [greedy(model, prompt, 6) for prompt in prompts]
    assert len(set(said)) > 1


def test_samples_depend_on_the_seed_and_not_on_the_rows(without_shape_checks) -> None:
    model = build()
    given = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 9.0, "top_k": 50}
    requests = ask("generate_until", *[("prompt", given)] * 4, ("another", given))

    def said(seed: int, rows: int) -> list[str]:
        torch.manual_seed(seed)
        return HarnessLM(model, batch_size=rows).generate_until(requests, disable_tqdm=True)

    assert said(0, 1) == said(0, 4) != said(1, 4)
    assert len(set(said(0, 4))) == 5


@pytest.mark.parametrize(
    ("given", "stop", "tokens", "temperature"),
    [
        ({"until": ["a", ""], "max_gen_toks": 5}, ("a",), 5, 0.0),
        ({"until": "\n", "max_new_tokens": 7, "temperature": 0.5}, ("\n",), 7, 0.5),
        ({"until": None, "do_sample": False, "temperature": 0.5}, (), 256, 0.0),
        ({"do_sample": True}, (), 256, 1.0),
        ({"max_tokens": "3", "temperature": 0}, (), 3, 0.0),
    ],
)
def test_settings_of_tasks(given, stop, tokens, temperature) -> None:
    until = parse_until(given)
    assert (until.stop, until.max_tokens) == (stop, tokens)
    assert until.sampling.temperature == temperature


# Needles.


def test_needles_are_those_of_our_own_suite(tmp_path, monkeypatch) -> None:
    for name in ("nounlist", "adjectivelist"):
        text = "\n".join(f"{name[:4]}{i}" for i in range(200))
        (tmp_path / f"{name}.txt").write_text(text)
    rows = data.needles(lengths=[700], samples=2, words=str(tmp_path), checkpoint="any")["test"]
    task = NeedleTask("single-1", tmp_path, None, ByteTokenizer(), held_out=True)
    for index, row in enumerate(rows):
        sample = task.sample(700, np.random.default_rng((0, index)))
        tokens = np.concatenate([piece.tokens for piece in sample.pieces()])
        assert row["prompt"].encode() == bytes(tokens.tolist())
        assert row["expected"][0] in row["prompt"]
        assert data.found(row, [f" It is {row['expected'][0]}."]) == {"found": 1.0}
        assert data.found(row, ["no"]) == {"found": 0.0}
    assert data.found({"expected": ["Ab", "cd"]}, ["AB."]) == {"found": 0.5}


# lm-eval's own command.


def test_plain_lm_eval_knows_the_model_of_a_task_file(tmp_path) -> None:
    """lm-eval 0.4.13, which has no plugins, in a process that knows nothing of us. (Its own task
    files are thousands; without them it starts at once.)"""
    write_questions(tmp_path)
    build().save(tmp_path / "m.safetensors")
    code = (
        "import sys, lm_eval.tasks.manager as manager; "
        f"manager.__file__ = {str(tmp_path / 'manager.py')!r}; "
        "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-c", code, "run", "--model", "titans", "--model_args"),
            f"checkpoint={tmp_path / 'm.safetensors'}",
            *("--tasks", str(TASKS / "titans_piqa.yaml")),
            *("--metadata", f"questions={tmp_path}", "--output_path", str(tmp_path / "out.json")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out*.json")
    ours = commonsense(build(), CommonsenseConfig(paths=(str(tmp_path / "piqa.jsonl"),)))
    row = json.loads(path.read_text())["results"]["titans_piqa"]
    assert row["acc,none"] == ours.accuracy
    assert row["acc_bytes,none"] == ours.accuracy_norm


def test_later_releases_find_the_model_by_an_entry_point() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups == {"lm_eval.models": {"titans": "titans.evals.harness.model:HarnessLM"}}
    assert get_model("titans") is HarnessLM
    assert get_model("dummy")  # lm-eval's own are not hidden by ours


def test_the_command_writes_json(tmp_path, capsys) -> None:
    write_questions(tmp_path, 3)
    build().save(tmp_path / "m.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "m.safetensors"), "--questions", str(tmp_path)]
    main(["eval", "harness", *arguments, "--tasks", "titans_piqa", "--json"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    config = HarnessConfig(tasks=("titans_piqa",), questions=str(tmp_path))
    expected = dataclasses.asdict(harness(build(), config))
    assert last == json.loads(json.dumps(expected))


# docs/harness.md


def test_the_page_is_right(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "harness.md").read_text()
    Path("book.txt").write_text("A short book.")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(program, {})
    assert "titans_text bits_per_byte" in capsys.readouterr().out
    commands = [line.split("#")[0] for line in page.splitlines() if line.startswith("    titans ")]
    for command in commands:
        options, rest = build_parser().parse_known_args(shlex.split(command)[1:])
        assert (options.suite, rest) == ("harness", [])
    assert {name for task in TASKS.glob("titans_*") if (name := task.stem)} <= set(
        re.findall(r"`(titans_\w+)`", page)
    )
    # The task of one's own.
    Path("mine").mkdir()
    (task,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    Path("mine/quiz.yaml").write_text(task.replace("TASKS/", f"{TASKS}/", 1))
    Path("quiz.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 1}\n' * 3)
    config = HarnessConfig(tasks=("quiz",), include=("mine",), questions=".")
    assert [(s.task, s.items) for s in harness(build(), config).scores] == [("quiz", 3)] * 3


# Errors.


def test_errors_are_one_line(tmp_path, monkeypatch, capsys) -> None:
    import lm_eval.tasks.manager

    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tmp_path / "manager.py"))
    build().save(tmp_path / "m.safetensors")
    (tmp_path / "bad.yaml").write_text("task: a\n  b: [\n")
    start = ["eval", "harness", "--checkpoint", str(tmp_path / "m.safetensors"), "--tasks"]
    for arguments, message in [
        (["titans_piq"], "unknown task 'titans_piq': expected titans_arc_challenge, "),
        (["titans_piqa", "--include", "no"], "no: no such folder of task files"),
        ([str(tmp_path / "bad.yaml")], 'bad.yaml", line 2, column 4'),
        (["titans_piqa", "--questions", "no"], "no: no such folder of questions"),
        (["titans_piqa", "--questions", str(TASKS.parent.parent)], "no question files in it"),
        (["titans_text", "--text", "no"], "no: no such file or folder"),
        (["titans_piqa", "--limit", "-1"], "limit must not be negative"),
        (["titans_piqa", "--rows", "0"], "rows must be at least 1"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            main([*start, *arguments])
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_without_the_extra_it_is_named(tmp_path, monkeypatch, capsys) -> None:
    build().save(tmp_path / "m.safetensors")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    monkeypatch.delitem(sys.modules, "titans.evals.harness.model")
    start = ["eval", "harness", "--checkpoint", str(tmp_path / "m.safetensors")]
    with pytest.raises(SystemExit, match="2"):
        main([*start, "--tasks", "titans_piqa"])
    assert "pip install -e '.[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HarnessLM(build(), batch_size="auto"), "batch_size must be a number"),
        (lambda: HarnessLM(build(), Pieces(*"abc" * 99)), "has 298 tokens, the model"),
        (lambda: HarnessLM(build(vocab_size=2048)), "has 257 tokens, the model 2048: name the one"),
        (lambda: HarnessLM("no.safetensors"), "no such file"),
        (lambda: parse_until({"num_beams": 4}), "'num_beams' is not supported: expected until"),
        (lambda: parse_until({"max_gen_toks": 0}), "must be at least 1, got 0"),
        (
            lambda: HarnessLM(build()).loglikelihood(ask("loglikelihood", ("a", "")), True),
            "a continuation of 'a' is empty",
        ),
        (lambda: HarnessConfig(tasks=()), "tasks is empty"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
