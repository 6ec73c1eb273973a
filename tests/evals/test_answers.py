"""Readings that were stopped go on, and only as what they were."""

import numpy as np
import pytest
import torch

from titans.config import MemoryConfig, TitansConfig
from titans.data.haystack import Piece, Sample
from titans.evals import answers
from titans.evals.answers import answer, keep_folder
from titans.models.lm import TitansLM

PIECE = 16


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(answers, "PIECE", PIECE)
    monkeypatch.setattr(answers, "SAVE_S", 0.0)


def tiny(seed=0, variant="mac"):
    torch.manual_seed(seed)
    memory = MemoryConfig(heads=2, conv_width=2, block_size=16)
    return TitansLM(
        TitansConfig(
            variant=variant, dim=16, layers=1, ffn_hidden=0, segment=16, persistent=1, memory=memory
        )
    )


def prompts(seed=0, size=100):
    draw = np.random.default_rng(seed)
    texts = [draw.integers(256, size=size) for _ in range(2)]
    return [Sample(size, lambda t=t: iter([Piece(t)]), t, ("",), "") for t in texts]


def counting(model, stop_at=None, error=KeyboardInterrupt):
    """The sizes that a model reads, and an error before one of them."""
    sizes, original = [], model.hidden

    def hidden(tokens, state=None, write=True):
        if stop_at is not None and len(sizes) == stop_at:
            raise error
        sizes.append(tokens.shape[1])
        return original(tokens, state, write)

    model.hidden = hidden
    return sizes


@pytest.mark.parametrize("variant", ["mac", "lmm"])
def test_a_stopped_reading_goes_on(tmp_path, variant):
    wanted = answer(tiny(variant=variant), prompts(), 5, 257)
    stopped = tiny(variant=variant)
    counting(stopped, stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        answer(stopped, prompts(), 5, 257, keep=tmp_path)
    (half,) = tmp_path.iterdir()
    assert half.suffix == ".safetensors"
    model = tiny(variant=variant)
    sizes = counting(model)
    assert (answer(model, prompts(), 5, 257, keep=tmp_path) == wanted).all()
    assert sizes[:3] == [PIECE] * 2 + [100 % PIECE]  # six of seven pieces, of which four were read
    (said,) = tmp_path.iterdir()
    assert said.suffix == ".json"
    sizes.clear()
    assert (answer(model, prompts(), 5, 257, keep=tmp_path) == wanted).all()
    assert sizes == []


def test_an_interruption_after_the_last_piece_is_no_trap(tmp_path, monkeypatch):
    side_by_side = answers.side_by_side

    def interrupted(samples):
        yield from side_by_side(samples)
        raise KeyboardInterrupt

    kept = answers.Kept(tmp_path, tiny(), prompts(), 5, "257 True")
    with monkeypatch.context() as patch:
        patch.setattr(answers, "side_by_side", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answers.read_and_say(tiny(), prompts(), 5, 257, True, kept)
    wanted = answer(tiny(), prompts(), 5, 257)
    assert (answer(tiny(), prompts(), 5, 257, keep=tmp_path) == wanted).all()


def test_nothing_is_taken_for_another(tmp_path):
    seen = set()
    for model, samples, count, vocabulary, write in (
        (tiny(), prompts(), 5, 257, True),
        (tiny(seed=1), prompts(), 5, 257, True),
        (tiny(), prompts(seed=1), 5, 257, True),
        (tiny(), prompts()[:1], 5, 257, True),
        (tiny(), prompts(), 6, 257, True),
        (tiny(), prompts(), 5, 250, True),
        (tiny(), prompts(), 5, 257, False),
    ):
        sizes = counting(model)
        kept = answer(model, samples, count, vocabulary, write, tmp_path)
        assert sizes
        assert (kept == answer(model, samples, count, vocabulary, write)).all()
        seen |= set(tmp_path.iterdir())
    assert len(seen) == 7


def test_prompts_of_several_lengths_are_kept_each_by_itself(tmp_path):
    samples = [*prompts(size=40), *prompts(size=33)]
    wanted = answer(tiny(), samples, 3, 257)
    for _ in range(2):
        assert (answer(tiny(), samples, 3, 257, keep=tmp_path) == wanted).all()
    assert len(list(tmp_path.iterdir())) == 2


def test_it_is_saved_only_so_often(tmp_path, monkeypatch):
    for seconds, files in ((1e9, 0), (0.0, 1)):
        monkeypatch.setattr(answers, "SAVE_S", seconds)
        failing = tiny()
        counting(failing, stop_at=4, error=MemoryError)
        with pytest.raises(MemoryError):
            answer(failing, prompts(), 5, 257, keep=tmp_path)
        assert len(list(tmp_path.iterdir())) == files


def test_who_interrupts_it_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "SAVE_S", 1e9)
    stopped = tiny()
    counting(stopped, stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        answer(stopped, prompts(), 5, 257, keep=tmp_path)
    model = tiny()
    sizes = counting(model)
    assert (
        answer(model, prompts(), 5, 257, keep=tmp_path) == answer(tiny(), prompts(), 5, 257)
    ).all()
    assert sizes[:3] == [PIECE] * 2 + [100 % PIECE]


def test_damaged_files_are_named(tmp_path):
    answer(tiny(), prompts(), 2, 257, keep=tmp_path)
    (said,) = tmp_path.iterdir()
    for content in ("[[1,", '{"a": 1}', "[[1, 2]]", '[[1, "b"], [2, 3]]'):
        said.write_text(content)
        with pytest.raises(ValueError, match=f"{said.name}: damaged"):
            answer(tiny(), prompts(), 2, 257, keep=tmp_path)
    said.unlink()
    said.with_suffix(".safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        answer(tiny(), prompts(), 2, 257, keep=tmp_path)


def test_the_setting_is_a_folder_or_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("WHERE", str(tmp_path))
    assert keep_folder("") is None
    assert keep_folder("$WHERE/a") == tmp_path / "a"
    with pytest.raises(ValueError, match="the environment variable NOWHERE is not set"):
        keep_folder("$NOWHERE/a")
