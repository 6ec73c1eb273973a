"""The main job with the checkpoints that ship: facts survive the text, and only by memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import titans
from titans import ModelState, demo
from titans.cli import main
from titans.data.facts import STATEMENT_SIZE
from titans.fresh import FreshProcessError
from titans.state import read_notes

SHORT = 4096


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> demo.DemoResult:
    return demo.run_demo(length=SHORT, out=tmp_path_factory.mktemp("demo"), streams=8, seed=3)


def test_the_memory_recalls_and_nothing_else_does(result) -> None:
    assert result.distances == (1024, 4096)
    assert min(result.recall[demo.MEMORY_ON]) >= 0.85
    assert max(result.recall[demo.MEMORY_OFF]) <= 0.1
    assert max(result.recall[demo.ATTENTION]) <= 0.1


def test_a_fresh_process_recalls_the_same_from_the_file(result) -> None:
    assert result.recall_fresh_process == result.recall[demo.MEMORY_ON]
    state = ModelState.load(Path(result.out) / "demo.memory")
    assert state.nbytes == result.state_bytes_last


def test_the_state_is_as_large_at_the_end_as_at_the_beginning(result) -> None:
    assert result.state_bytes_first == result.state_bytes_last


def test_the_two_models_are_of_one_size_and_fit_the_package(result) -> None:
    sizes = result.parameters
    assert abs(sizes["memory"] / sizes["attention"] - 1) < 0.05
    shipped = [demo.asset(n) for n in ("demo.safetensors", "demo-attention.safetensors")]
    assert sum(p.stat().st_size for p in shipped) < 10 * 2**20


def test_the_plots_are_pictures(result) -> None:
    for name in ("recall.png", "surprise.png"):
        content = (Path(result.out) / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5_000


def test_what_was_read_is_shown_though_the_fresh_process_fails(tmp_path, monkeypatch) -> None:
    def fail(*arguments: str) -> str:
        raise FreshProcessError("ended")

    monkeypatch.setattr(demo, "in_fresh_process", fail)
    with pytest.raises(FreshProcessError, match="ended"):
        demo.run_demo(length=1024, out=tmp_path, streams=1)
    assert (tmp_path / "recall.png").exists()
    assert (tmp_path / "surprise.png").exists()


def test_texts_without_a_character_are_refused(tmp_path) -> None:
    """Going around them for more had never come to an end."""
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n' * 3)
    with pytest.raises(ValueError, match="the texts are empty"):
        demo.run_demo(length=1024, out=tmp_path / "o", streams=1, texts=[str(path)])


def test_the_command_prints_a_table_and_json(tmp_path, capsys) -> None:
    (tmp_path / "own.txt").write_text("A quiet text of one's own, said again and again. " * 200)
    text, out = str(tmp_path / "own.txt"), str(tmp_path / "out")
    main(["demo", "--length", "1K", "--streams", "2", "--text", text, "--out", out, "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert any("memory on" in line for line in lines)
    report = json.loads(lines[-1])
    assert report["distances"] == [1024]
    assert set(report["recall"]) == {demo.MEMORY_ON, demo.MEMORY_OFF, demo.ATTENTION}


def test_a_damaged_demo_folder_is_one_line(result, tmp_path) -> None:
    for name in ("demo.memory", "questions.json"):
        (tmp_path / name).write_bytes((Path(result.out) / name).read_bytes())
    content = bytearray((tmp_path / "demo.memory").read_bytes())
    content[-3] ^= 4
    (tmp_path / "demo.memory").write_bytes(content)
    command = [sys.executable, "-m", "titans.cli", "demo", "--ask", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "damaged memory file" in done.stderr


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1024, (1024,)),
        (65536, (1024, 4096, 16384, 65536)),
        (100_000, (1024, 4096, 16384, 65536, 100_000)),
        (2**20, (1024, 4096, 16384, 65536, 262144, 2**20)),
    ],
)
def test_distances_up_to_a_length(length: int, expected: tuple[int, ...]) -> None:
    assert demo.distances_up_to(length) == expected


def test_numbers_are_readable() -> None:
    assert [demo.readable(n) for n in (1024, 65536, 2**20, 100_000)] == [
        "1K",
        "64K",
        "1M",
        "100,000",
    ]


def test_curves_follow_the_facts(result) -> None:
    """The learning rate of the memories peaks where a fact is stated."""
    from titans.data.carrier import python_text
    from titans.evals.facts import hide_facts, read

    hay = hide_facts(python_text(held_out=True), (500,), streams=1, seed=5)
    curve = demo.Curve()
    read(demo.load(demo.asset("demo.safetensors")), hay, watch=curve.add)
    rate = np.concatenate(curve.learning_rate)
    begin, end = len(rate) - 500 - STATEMENT_SIZE, len(rate) - 500
    assert rate[begin:end].max() > 10 * np.delete(rate, slice(begin, end)).mean()


def test_the_checkpoints_are_package_data() -> None:
    import tomllib

    root = Path(__file__).parent.parent
    content = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = content["tool"]["setuptools"]["package-data"]["titans"]
    shipped = {p for pattern in patterns for p in (root / "src" / "titans").glob(pattern)}
    assert demo.asset("demo.safetensors") in shipped
    assert demo.asset("demo-attention.safetensors") in shipped


def test_models_that_it_makes_no_sense_of(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    small = {"dim": 16, "heads": 2, "layers": 1, "window": 8, "segment": 8}
    titans.TitansLM(titans.TitansConfig(variant="sliding", **small)).save(path)
    with pytest.raises(ValueError, match=r"model\.safetensors: the model has no memory"):
        demo.run_demo(length=1024, out=tmp_path, streams=1, model_path=path)
    titans.TitansLM(titans.TitansConfig(variant="lmm", vocab_size=2048, **small)).save(path)
    with pytest.raises(ValueError, match="has 257 tokens, the model 2048"):
        demo.run_demo(length=1024, out=tmp_path, streams=1, model_path=path)


def test_what_asking_again_does_not_look_at_is_refused(result, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--ask", result.out, "--model", "other.safetensors"])
    assert "--model has no effect on a memory that is there" in capsys.readouterr().err


def test_the_memory_says_what_its_tokens_are(result) -> None:
    assert read_notes(Path(result.out) / "demo.memory")["tokenizer"] == "bytes"
