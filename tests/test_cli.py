"""The command line as a user meets it: results on stdout, bad input as one line and exit code 2."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import titans
from titans.cli import main
from titans.config import load_toml
from titans.data.shards import Shards
from titans.data.tokenizers import load_tokenizer
from titans.train.config import RunConfig


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "m.safetensors"
    titans.TitansLM(titans.preset("mag-tiny")).save(path)
    return path


def run(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    main([str(a) for a in arguments])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The error line of a command that must fail."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.strip().splitlines()
    assert len(lines) == 1, output.err
    return lines[0]


def test_presets_lists_and_prints_toml(capsys, tmp_path) -> None:
    names = run(capsys, "presets").splitlines()
    assert "mac-340m-paper_neurips" in names
    assert json.loads(run(capsys, "presets", "--json")) == {"presets": names}
    (tmp_path / "c.toml").write_text(run(capsys, "presets", "mal-tiny"))
    from titans.config import load_toml
    from titans.train.config import RunConfig

    assert load_toml(tmp_path / "c.toml", RunConfig).model == titans.preset("mal-tiny")


def test_the_settings_of_a_training_are_a_config(capsys, tmp_path) -> None:
    """Every field of every section, with its meaning, and what it reads back to is the default."""
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--settings"])
    text = capsys.readouterr().out
    (tmp_path / "all.toml").write_text(text)
    assert load_toml(tmp_path / "all.toml", RunConfig) == RunConfig()
    for line in ("# Largest norm of the whole gradient; 0 leaves it as it is.", "clip = 1.0"):
        assert line in text.splitlines()
    told = re.findall(r"^(?:# )?(\w+) = ", text, re.MULTILINE)
    assert sorted(told) == sorted(name.split(".")[-1] for name in leaves(RunConfig()))


def leaves(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_reading_a_text_in_two_parts_is_reading_it_at_once(capsys, tmp_path, model_file) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("It was the best of times, " * 40)
    second.write_text("it was the worst of times. " * 40)
    whole, half, rest = (tmp_path / f"{n}.memory" for n in ("whole", "half", "rest"))
    report = json.loads(run(capsys, "stream", model_file, first, second, "--save", whole, "--json"))
    assert report["tokens"] == len(first.read_text()) + len(second.read_text())
    assert 0 < report["bits_per_token"] < 20
    run(capsys, "stream", model_file, first, "--save", half)
    run(capsys, "stream", model_file, second, "--memory", half, "--save", rest)
    a, b = titans.ModelState.load(whole), titans.ModelState.load(rest)
    assert a.position == b.position == report["tokens"]
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(tensor, b.tensors()[name], rtol=1e-3, atol=1e-4)


def test_generate_repeats_with_its_seed_and_goes_on_from_a_memory(
    capsys, tmp_path, model_file
) -> None:
    common = ("generate", model_file, "--prompt", "Once", "--max-tokens", 40, "--seed", 8)
    one = run(capsys, *common)
    assert one == run(capsys, *common)
    (tmp_path / "t.txt").write_text("something else entirely. " * 20)
    memory = tmp_path / "t.memory"
    run(capsys, "stream", model_file, tmp_path / "t.txt", "--save", memory)
    assert run(capsys, *common, "--memory", memory) != one
    # A byte order mark is no text, as in every file that is read.
    (tmp_path / "prompt.txt").write_text("Once", encoding="utf-8-sig")
    again = ("generate", model_file, "--prompt", f"@{tmp_path / 'prompt.txt'}", *common[4:])
    assert run(capsys, *again) == one


def test_texts_that_look_like_overrides_are_texts(capsys, model_file) -> None:
    common = ("generate", model_file, "--max-tokens", 3, "--temperature", 0)
    assert run(capsys, *common, "--prompt", "--- title: a.b") != run(
        capsys, *common, "--prompt", "a"
    )
    assert "ACTION" in refused(capsys, "memory", "--", "--what is v1.2?")


def test_a_tokenizer_is_learned_and_prepares_text(capsys, tmp_path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("she sells sea shells by the sea shore 9f0d " * 9)
    (tmp_path / "b.jsonl").write_text('{"body": "one more of them"}\n')
    path = tmp_path / "made" / "tokenizer.json"
    told = run(
        capsys,
        *("data", "tokenizer", tmp_path / "a.txt", tmp_path / "b.jsonl", "--text-key", "body"),
        *("--size", 300, "--codes-apart", "--out", path, "--json"),
    )
    tokenizer = load_tokenizer(path)
    assert json.loads(told) == {"tokenizer": str(path), "tokens": tokenizer.vocab_size}
    assert 257 < tokenizer.vocab_size <= 300
    assert len(tokenizer.encode("9f0d")) == 4
    assert "expected vocab_size >= 257" in refused(
        capsys, "data", "tokenizer", tmp_path / "a.txt", "--size", 9, "--out", path
    )
    assert load_tokenizer(path).vocab_size == tokenizer.vocab_size
    run(
        capsys,
        *("data", "prepare", tmp_path / "a.txt", "--tokenizer", path, "--out", tmp_path / "s"),
    )
    assert Shards.open(tmp_path / "s").vocab_size == tokenizer.vocab_size


def test_data_prepare_writes_shards_that_open(capsys, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    out = tmp_path / "shards"
    paths = (tmp_path / "a.txt", tmp_path / "b.jsonl")
    line = run(capsys, "data", "prepare", *paths, "--out", out)
    assert "3 documents, 20 tokens" in line

    assert bytes(Shards.open(out).document(0)[:-1].astype("uint8")) == b"hello world"


BAD_COMMANDS = [
    ((), "required: VERB"),
    (("fly",), "invalid choice: 'fly'"),
    (("presets", "mac-tny"), "unknown preset 'mac-tny'; did you mean 'mac-tiny'"),
    (("presets", "mac-tiny", "extra"), "unrecognised argument 'extra'"),
    (("demo", "--length", "none"), "expected a positive number such as 64K"),
    (("demo", "--length", "12"), "length must be at least 1024"),
    (("demo", "--text", "absent.txt"), "absent.txt"),
    (("demo", "--model", "absent.safetensors"), "absent.safetensors: no such file"),
    (("demo", "--ask", "absent"), "absent: not a folder written by titans demo"),
    (("train", "absent.toml"), "absent.toml: no such file"),
    (("train", "absent.toml", "--train.steps"), "--train.steps needs a value"),
    (("train", "absent.toml", "--steps", "3"), "unrecognised argument '--steps'"),
    (("train", "--train.steps", "3", "absent.toml"), "absent.toml: no such file"),
    (("presets", "mac-tiny", "--train.steps=3"), "unrecognised argument '--train.steps'"),
    (("data", "prepare", "absent", "--out", "x"), "absent"),
    (("data", "prepare", "absent", "--tokenizer", "nope.json", "--out", "x"), "nope.json"),
    (("stream", "absent.safetensors", "x.txt"), "absent.safetensors: no such file"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_COMMANDS)
def test_bad_commands_are_one_line(capsys, tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)


def test_bad_files_and_values_are_one_line(capsys, tmp_path, model_file) -> None:
    text, memory = tmp_path / "t.txt", tmp_path / "t.memory"
    text.write_text("some text to read")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    run(capsys, "stream", model_file, text, "--save", memory)
    content = memory.read_bytes()
    damaged = tmp_path / "damaged.memory"
    damaged.write_bytes(content[:-9] + b"x" + content[-8:])
    other = tmp_path / "other.safetensors"
    titans.TitansLM(titans.preset("mag-small")).save(other)
    (tmp_path / "c.toml").write_text("[modle]\n")

    generate = ("generate", model_file, "--prompt")
    for arguments, message in (
        ((*generate, ""), "the prompt is empty"),
        ((*generate, "a", "--temperature", -1), "temperature must be at least 0"),
        ((*generate, "a", "--top-p", 7), "top_p must lie in"),
        ((*generate, "a", "--memory", damaged), "damaged memory file"),
        ((*generate, "a", "--memory", model_file), "not a memory file"),
        ((*generate, "@" + str(tmp_path / "binary.txt")), "expected UTF-8 text"),
        (("generate", other, "--prompt", "a", "--memory", memory), "belongs to another model"),
        (("generate", memory, "--prompt", "a"), "not a model file"),
        (("generate", text, "--prompt", "a"), "not a readable safetensors file"),
        (("stream", model_file, tmp_path / "empty.txt"), "empty"),
        (("stream", model_file, tmp_path / "binary.txt"), "binary.txt"),
        (("train", tmp_path / "c.toml"), "unknown key 'modle'; did you mean 'model'"),
        (("data", "prepare", text, tmp_path / "binary.txt", "--out", tmp_path / "o"), "binary"),
    ):
        assert message in refused(capsys, *arguments)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("verb", ["demo", "train", "data", "generate", "stream", "presets"])
def test_every_verb_documents_itself(capsys, verb) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "usage: titans" in capsys.readouterr().out


def test_memories_that_cannot_serve_are_one_line(capsys, tmp_path, model_file) -> None:
    text, memory = tmp_path / "t.txt", tmp_path / "t.memory"
    text.write_text("some text to read")
    run(capsys, "stream", model_file, text, "--save", memory)
    state = titans.ModelState.load(memory)

    wide = tmp_path / "wide.memory"
    state.map(torch.Tensor.double).save(wide)
    assert "another precision" in refused(capsys, "stream", model_file, text, "--memory", wide)

    broken = state.map(lambda t: t * float("nan"))
    with pytest.raises(ValueError, match="non-finite number in blocks"):
        broken.save(tmp_path / "nan.memory")
    assert not (tmp_path / "nan.memory").exists()
    broken.__class__.check_finite, kept = (lambda self: None), broken.__class__.check_finite
    try:
        broken.save(tmp_path / "nan.memory")
    finally:
        broken.__class__.check_finite = kept
    message = refused(capsys, "stream", model_file, text, "--memory", tmp_path / "nan.memory")
    assert "holds a non-finite number" in message


def test_targets_and_numbers_are_checked_before_the_work(capsys, tmp_path, model_file) -> None:
    text = tmp_path / "t.txt"
    text.write_text("some text to read")
    for arguments, message in (
        (("stream", model_file, text, "--save", tmp_path), "is a folder, expected a file"),
        (("demo", "--streams", 0, "--out", tmp_path / "o"), "streams must be at least 1"),
        (("demo", "--seed", -1, "--out", tmp_path / "o"), "seed must not be negative"),
        (
            ("data", "prepare", text, "--out", tmp_path / "s", "--encoding", "hex"),
            "text encoding, got 'hex'",
        ),
        (("data", "prepare", text, "--out", tmp_path / "s", "--split", "test"), "--split has no"),
        (
            ("data", "prepare", "hub:x", "--out", tmp_path / "s", "--strip-gutenberg"),
            "--strip-gutenberg has no effect on a data set",
        ),
        (("data", "prepare", "hub:x", text, "--out", tmp_path / "s"), "(hub:NAME) is prepared alo"),
    ):
        assert message in refused(capsys, *arguments)
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "s").exists()
