"""`titans memory`: reading, asking, looking into, comparing and forking memories as files."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import titans
from titans import inspect
from titans.cli import main
from titans.data.tokenizers import BPETokenizer
from titans.demo import asset
from titans.state import read_notes


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """Random weights, whose memories write every token."""
    torch.manual_seed(0)
    path = tmp_path / "m.safetensors"
    memory = titans.MemoryConfig(heads=2, momentum=True)
    config = titans.TitansConfig(variant="mac", dim=32, layers=2, heads=2, memory=memory)
    titans.TitansLM(config).save(path)
    return path


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("It was the best of times, " * 20)
    second.write_text("it was the worst of times. " * 20)
    return first, second


def run(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    main(["memory", *(str(a) for a in arguments)])
    return capsys.readouterr().out


def report(capsys: pytest.CaptureFixture, *arguments: object) -> dict:
    return json.loads(run(capsys, *arguments, "--json").splitlines()[-1])


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The error line of a command that must fail."""
    with pytest.raises(SystemExit) as stop:
        main(["memory", *(str(a) for a in arguments)])
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.strip().splitlines()
    assert len(lines) == 1, output.err
    return lines[0]


def same(a: Path, b: Path) -> bool:
    ours, theirs = (titans.ModelState.load(path) for path in (a, b))
    return ours.position == theirs.position and all(
        torch.allclose(tensor, theirs.tensors()[name], rtol=1e-3, atol=1e-4)
        for name, tensor in ours.tensors().items()
    )


def test_a_memory_read_in_parts_or_from_a_pipe_is_the_one_read_at_once(
    capsys, tmp_path, model_file, texts
) -> None:
    whole, half, rest, piped = (tmp_path / f"{n}.memory" for n in "whrp")
    done = report(capsys, "read", model_file, *texts, "-o", whole)
    size = sum(len(path.read_text()) for path in texts)
    assert (done["tokens"], done["tokens_read"]) == (size, size)
    run(capsys, "read", model_file, texts[0], "-o", half)
    going_on = report(capsys, "read", model_file, texts[1], "--memory", half, "-o", rest)
    assert (going_on["tokens"], going_on["tokens_read"]) == (len(texts[1].read_text()), size)
    assert same(whole, rest)
    command = [sys.executable, "-m", "titans.cli", "memory", "read", model_file, "-", "-o", piped]
    given = b"".join(path.read_bytes() for path in texts)
    subprocess.run(list(map(str, command)), input=given, check=True, capture_output=True)
    assert same(whole, piped)
    # As the library has it.
    tokens = torch.tensor([list(given)])
    *_, last = titans.stream(titans.load(model_file), tokens)
    last.state.save(tmp_path / "library.memory")
    assert same(whole, tmp_path / "library.memory")


def test_the_demo_model_is_told_once_and_asked_many_times(capsys, tmp_path) -> None:
    text, memory = tmp_path / "a.py", tmp_path / "a.memory"
    code = Path(titans.__file__).with_name("state.py").read_text()[:4000]
    text.write_text(f"{code} «baku: 4821» {code[::-1]} «oslo: 1379» {code}")
    run(capsys, "read", "demo", text, "-o", memory)
    content = memory.read_bytes()
    questions = (" «baku: ", " «oslo: ")
    common = ("--max-tokens", 4, "--temperature", 0)
    asked = report(capsys, "ask", "demo", memory, *questions, *common)
    assert [answer["text"] for answer in asked["answers"]] == ["4821", "1379"]
    assert [answer["prompt"] for answer in asked["answers"]] == list(questions)
    assert asked["tokens_read"] == len(text.read_bytes())
    assert run(capsys, "ask", "demo", memory, questions[1], *common) == "1379\n"
    lines = run(capsys, "ask", "demo", memory, *questions, *common).splitlines()
    assert lines == ["> " + questions[0], "4821", "> " + questions[1], "1379"]
    # A text that ends answers does not swallow the questions that follow it.
    stopped = ("ask", "demo", memory, "--stop", "8", "--stop", "7", *questions, *common)
    assert run(capsys, *stopped).splitlines() == [
        "> " + questions[0],
        "4",
        "> " + questions[1],
        "13",
    ]
    (tmp_path / "q.txt").write_text(questions[0])
    assert run(capsys, "ask", asset("demo.safetensors"), memory, f"@{tmp_path / 'q.txt'}", *common)
    assert memory.read_bytes() == content


def test_asking_is_generating_after_the_memory(capsys, tmp_path, model_file, texts) -> None:
    memory = tmp_path / "a.memory"
    run(capsys, "read", model_file, texts[0], "-o", memory)
    common = ("--max-tokens", 30, "--seed", 3)
    asked = run(capsys, "ask", model_file, memory, "Once", *common)
    main(list(map(str, ("generate", model_file, "--prompt", "Once", "--memory", memory, *common))))
    assert asked == capsys.readouterr().out


def test_a_text_in_another_encoding_is_found_before_all_is_read(
    capsys, tmp_path, model_file, monkeypatch
) -> None:
    """Hours of reading are not lost to the last of many books; and it can be read."""
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("one book. " * 50, encoding="utf-8")
    (tmp_path / "books" / "b.txt").write_text("café", encoding="latin-1")
    memory = tmp_path / "books.memory"
    with monkeypatch.context() as patch:
        patch.setattr(titans.TitansLM, "run", lambda *a: pytest.fail("it began to read"))
        (tmp_path / "empty.txt").write_text("")
        late = (tmp_path / "books" / "a.txt", tmp_path / "empty.txt")
        for action in (("writes", model_file), ("read", model_file, "-o", memory)):
            assert "empty.txt: no text in it" in refused(capsys, *action, *late)
        wrong = refused(capsys, "read", model_file, tmp_path / "books", "-o", memory)
    assert "b.txt: expected UTF-8 text, got byte 0xe9" in wrong
    given = ("--encoding", "auto", "--json")
    told = run(capsys, "read", model_file, tmp_path / "books", "-o", memory, *given)
    assert json.loads(told)["tokens"] == 500 + len("café".encode())


def test_info_says_what_the_file_holds(capsys, tmp_path, model_file, texts) -> None:
    memory = tmp_path / "a.memory"
    run(capsys, "read", model_file, texts[0], "-o", memory)
    model, state = titans.load(model_file), titans.ModelState.load(memory)
    found = report(capsys, "info", memory)
    assert found == {
        "memory": str(memory),
        "file_bytes": memory.stat().st_size,
        "config_hash": model.config_hash,
        "tokenizer": "bytes",
        "tokens_read": len(texts[0].read_text()),
        "state_bytes": state.nbytes,
        "texts": 1,
        "memories": [
            {"block": block, "heads": 2, "weights": [[16, 16]], "momentum": True}
            for block in range(2)
        ],
    }
    found = report(capsys, "info", memory, "--model", model_file)
    assert found["moved"] == inspect.moved(model, state).tolist()
    assert found["past_surprise"] == inspect.momentum_norm(model, state).tolist()
    shown = run(capsys, "info", memory, "--model", model_file)
    assert f"{found['tokens_read']:,} tokens read" in shown
    assert all(f"{x:.4g}" in shown for rows in found["moved"][0] for x in rows)


def test_two_forks_read_on_apart(capsys, tmp_path, model_file, texts) -> None:
    parent, copy, other = (tmp_path / f"{n}.memory" for n in ("parent", "copy", "other"))
    run(capsys, "read", model_file, texts[0], "-o", parent)
    content = parent.read_bytes()
    assert report(capsys, "fork", parent, "-o", copy)["tokens_read"] == len(texts[0].read_text())
    assert read_notes(copy) == read_notes(parent) == {"tokenizer": "bytes"}
    alike = report(capsys, "diff", parent, copy)
    assert alike["equal"]
    assert alike["moved"] is None
    assert alike["distance"] == [[[0.0, 0.0], [0.0, 0.0]]]
    done = report(capsys, "fork", parent, "-o", other, "--model", model_file, "--text", texts[1])
    assert done["parent"] == str(parent)
    apart = report(capsys, "diff", copy, other, "--model", model_file)
    model = titans.load(model_file)
    first, second = titans.ModelState.load(copy), titans.ModelState.load(other)
    assert not apart["equal"]
    assert apart["tokens_read"] == [first.position, second.position]
    assert apart["distance"] == inspect.distance(model, first, second).tolist()
    assert apart["moved"] == [inspect.moved(model, s).tolist() for s in (first, second)]
    assert min(x for rows in apart["distance"][0] for x in rows) > 0
    assert "different memories" in run(capsys, "diff", copy, other)
    assert "the same memory" in run(capsys, "diff", copy, parent, "--model", model_file)
    run(capsys, "read", model_file, texts[1], "--memory", parent, "-o", copy)
    assert same(copy, other)
    assert parent.read_bytes() == content


def test_several_texts_side_by_side(capsys, tmp_path, model_file) -> None:
    memory, model = tmp_path / "two.memory", titans.load(model_file)
    tokens = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    model(tokens)[1].save(memory)
    found = report(capsys, "info", memory, "--model", model_file)
    assert (found["texts"], found["tokenizer"]) == (2, None)
    assert "2 texts side by side" in run(capsys, "info", memory, "--model", model_file)
    message = refused(capsys, "ask", model_file, memory, "Once")
    assert "holds 2 texts side by side, expected one" in message


def test_a_model_without_memories_has_a_state_to_keep(capsys, tmp_path, texts) -> None:
    memory, model = tmp_path / "a.memory", asset("demo-attention.safetensors")
    run(capsys, "read", model, texts[0], "-o", memory)
    assert report(capsys, "info", memory, "--model", model)["memories"] == []
    assert "tokens read" in run(capsys, "info", memory, "--model", model)
    assert report(capsys, "diff", memory, memory)["equal"]


def test_tokens_mean_what_they_meant_when_they_were_read(capsys, tmp_path, texts) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    BPETokenizer.train([texts[0].read_text()], 280, tokenizer)
    paths = {}
    for size in (257, 300):
        torch.manual_seed(0)
        config = titans.TitansConfig(variant="lmm", vocab_size=size, dim=16, layers=1)
        paths[size] = tmp_path / f"{size}.safetensors"
        titans.TitansLM(config).save(paths[size])
    memory = tmp_path / "a.memory"
    given = ("--tokenizer", tokenizer)
    ids = BPETokenizer.from_file(tokenizer).encode(texts[0].read_text())
    assert report(capsys, "read", paths[300], texts[0], "-o", memory, *given)["tokens"] == len(ids)
    assert run(capsys, "ask", paths[300], memory, "It", *given, "--max-tokens", 3)
    target = tmp_path / "b.memory"
    for arguments in (
        ("ask", paths[300], memory, "It"),
        ("read", paths[300], texts[1], "--memory", memory, "-o", target),
        ("fork", memory, "--model", paths[300], "--text", texts[1], "-o", target),
    ):
        message = refused(capsys, *arguments)
        assert "a.memory: was read with the tokenizer sha256:" in message
        assert message.endswith("this one is bytes")
    # A memory that was saved by hand says nothing of its tokenizer.
    state = titans.ModelState.load(memory)
    state.save(target)
    run(capsys, "read", paths[300], texts[1], "--memory", target, "-o", target)
    message = refused(capsys, "read", paths[257], texts[0], "-o", target, *given)
    size = BPETokenizer.from_file(tokenizer).vocab_size
    assert f"has {size} tokens, the model 257: name the one" in message


def test_bad_input_is_one_line_and_leaves_files_alone(capsys, tmp_path, model_file, texts) -> None:
    memory, target = tmp_path / "a.memory", tmp_path / "target.memory"
    run(capsys, "read", model_file, texts[0], "-o", memory)
    target.write_bytes(b"what was there before")
    content = memory.read_bytes()
    damaged, half = tmp_path / "damaged.memory", tmp_path / "half.memory"
    damaged.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    half.write_bytes(content[: len(content) // 2])
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"good text " * 500 + b"\xff")
    out = ("-o", target)
    for arguments, message in (
        (("read", "absent.safetensors", texts[0], *out), "absent.safetensors: no such file"),
        (("read", model_file, tmp_path / "absent.txt", *out), "absent.txt: no such file"),
        (("read", model_file, binary, *out), "binary.txt: expected UTF-8 text, got byte 0xff"),
        (("read", model_file, texts[0], "--memory", damaged, *out), "damaged memory file"),
        (("read", "demo", texts[0], "--memory", memory, *out), "belongs to another model"),
        (("read", model_file, texts[0]), "required: -o/--output"),
        (("read", model_file, texts[0], "-o", tmp_path), "is a folder, expected a file"),
        (("read", model_file, texts[0], "-o", texts[0] / "x"), "is no folder to write to"),
        (("ask", model_file, half, "Once"), "half.memory: not a readable safetensors file"),
        (("ask", model_file, model_file, "Once"), "not a memory file"),
        (("ask", model_file, memory, ""), "the prompt is empty"),
        (("ask", "demo", memory, "Once"), "belongs to another model"),
        (("info", texts[0]), "not a readable safetensors file"),
        (("info", memory, "--model", "demo"), "belongs to another model"),
        (("diff", memory, damaged), "damaged memory file"),
        (("fork", half, *out), "half.memory: not a readable safetensors file"),
        (("fork", memory, *out, "--text", texts[1]), "give both --model and --text"),
        (("fork", memory, *out, "--model", model_file, "--text", binary), "binary.txt"),
        (("fork", memory, "-o", memory), "a.memory: is read here, expected another file"),
        (
            ("fork", memory, "-o", model_file, "--model", model_file, "--text", texts[1]),
            "is read here, expected another file",
        ),
        (("read", model_file, texts[0], "-o", texts[0]), "is read here, expected another file"),
        (("read", model_file, texts[0], "-o", model_file), "is read here, expected another file"),
        (("read", model_file, texts[0].parent, "-o", texts[0]), "is read here, expected another"),
        (("read", model_file, texts[0], "-o", half, "--tokenizer", half), "is read here, expected"),
        (("fork", memory, *out, "--encoding", "auto"), "--encoding has no effect on a copy that"),
        (("fork", memory, *out, "--device", "cpu"), "--device has no effect on a copy that"),
        (("read", model_file, "-", "-", *out), "-: standard input can be read once, not twice"),
        (("read", model_file, texts[0], "-o", "/dev/null"), "/dev/null: is no regular file"),
        (("read", model_file, texts[0], "--device", "gpu7", *out), "'gpu7' cannot be used"),
        (("read", model_file, texts[0], "--encoding", "hex8", *out), "text encoding, got 'hex8'"),
        (("ask", model_file, memory, "--stop", "", "Once"), "--stop is empty: expected a text"),
        ((), "required: ACTION"),
    ):
        assert message in refused(capsys, *arguments)
    assert target.read_bytes() == b"what was there before"
    assert memory.read_bytes() == content
    notes = tmp_path / "notes"  # a memory may lie beside the texts it is of, and is none of them
    notes.mkdir()
    (notes / "a.txt").write_text("Some text of one's own.")
    for _ in range(2):
        run(capsys, "read", model_file, notes, "-o", notes / "own.memory")
    other = tmp_path / "other.memory"
    run(capsys, "read", "demo", texts[0], "-o", other)
    assert "the memories belong to different models" in refused(capsys, "diff", memory, other)


@pytest.mark.parametrize("action", ["read", "ask", "info", "diff", "fork", "writes"])
def test_every_action_documents_itself(capsys, action) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["memory", action, "--help"])
    assert stop.value.code == 0
    assert f"usage: titans memory {action}" in capsys.readouterr().out


def test_writes_names_the_tokens_that_are_written(capsys, model_file, texts) -> None:
    found = report(capsys, "writes", model_file, texts[0], "--top", 3, "--before", 4)["memories"]
    model = titans.load(model_file)
    data = texts[0].read_bytes()
    expected = inspect.writes(model, torch.tensor([list(data)]), top=3, before=4)
    assert [memory["memory"] for memory in found] == [0, 1]
    for memory, written in zip(found, expected, strict=True):
        assert memory["tokens"] == len(data)
        assert memory["total"] == pytest.approx(written.total, rel=1e-4)
        assert memory["kept"] == pytest.approx(math.exp(-written.forgetting), rel=1e-4)
        for write in memory["strongest"]:
            at = write["position"]
            assert write["token"] == data[at : at + 1].decode()
            assert write["before"] == data[max(at - 4, 0) : at].decode()
    shown = run(capsys, "writes", model_file, texts[0], "--top", 3)
    assert shown.count("memory ") == 2
    assert shown.count(" at ") == 6
    assert "no text in it" in refused(capsys, "writes", model_file, "/dev/null")


def test_writes_of_a_model_without_a_memory(capsys, tmp_path, texts) -> None:
    path = tmp_path / "sliding.safetensors"
    titans.TitansLM(titans.TitansConfig(variant="sliding", dim=32, layers=1, heads=2)).save(path)
    assert report(capsys, "writes", path, texts[0]) == {"memories": []}
    assert run(capsys, "writes", path, texts[0]) == "the model has no memory\n"
