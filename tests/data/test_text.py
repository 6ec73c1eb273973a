"""Windows of text: every row inside one document, every batch a function of (seed, step)."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans.data.documents import Document
from titans.data.shards import Shards, prepare
from titans.data.text import IGNORED, TextWindows, from_files
from titans.data.tokenizers import ByteTokenizer

END = 256


def numbered(*lengths):
    """Documents whose tokens tell where they stand: 1000 * document + place, then the end."""
    return [
        np.array([*range(1000 * number, 1000 * number + length - 1), END])
        for number, length in enumerate(lengths, start=1)
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6).filter(lambda n: max(n) > 1),
    length=st.integers(1, 12),
    segments=st.integers(1, 3),
    step=st.integers(0, 2**40),
)
def test_rows_are_windows_of_one_document(lengths, length, segments, step):
    documents = numbered(*lengths)
    tokens, labels = TextWindows(documents, length, 4, seed=0, segments=segments).batch(step)
    time = length * segments
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens.shape == labels.shape == (4, time)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        # A window never starts on the end of a document, so its first token tells the document.
        document = documents[row[0] // 1000 - 1].tolist()
        start = row[0] % 1000
        inside = document[start : start + time]
        assert row == inside + [END] * (time - len(inside))
        following = document[start + 1 : start + time + 1]
        assert answers == following + [IGNORED] * (time - len(following))
        assert len(inside) == min(time, len(document))
        assert answers[0] != IGNORED
        assert answers.count(IGNORED) == max(time + 1 - len(document), 0)


def test_a_batch_depends_on_seed_and_step_alone():
    documents = numbered(500, 900, 40)
    first = TextWindows(documents, 16, 8, seed=3)
    history = [first.batch(step) for step in range(4)]
    resumed = TextWindows(documents, 16, 8, seed=3)
    for step in (3, 1):
        assert torch.equal(resumed.batch(step)[0], history[step][0])
        assert torch.equal(resumed.batch(step)[1], history[step][1])
    assert not torch.equal(history[0][0], history[1][0])
    assert not torch.equal(TextWindows(documents, 16, 8, seed=4).batch(0)[0], history[0][0])


def test_segments_only_lengthen_the_window():
    documents = numbered(500, 900)
    pieces = TextWindows(documents, 8, 4, seed=1, segments=4).batch(7)
    whole = TextWindows(documents, 32, 4, seed=1).batch(7)
    assert torch.equal(pieces[0], whole[0])
    assert torch.equal(pieces[1], whole[1])


def test_documents_are_drawn_by_their_tokens_and_starts_evenly():
    documents = numbered(100, 1, 300)
    tokens, _ = TextWindows(documents, 80, 40_000, seed=0).batch(0)
    drawn = (tokens[:, 0] // 1000).numpy()
    # Five standard deviations of a binomial with 40,000 draws.
    assert np.mean(drawn == 1) == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / 40_000))
    assert not np.any(drawn == 2)
    starts = (tokens[drawn == 1, 0] % 1000).numpy()
    counts = np.bincount(starts)
    assert len(counts) == 100 - 80
    assert np.all(np.abs(counts - 500) < 5 * np.sqrt(500))


def test_shards_and_memory_give_the_same_batches(tmp_path):
    texts = ["a first document", "ü", "", "and one more of them"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    tokenizer = ByteTokenizer()
    documents = [Document(text, text) for text in texts if text]
    prepare(documents, tokenizer, tmp_path / "out", shard_tokens=5)
    prepared = TextWindows(Shards.open(tmp_path / "out"), 10, 3, seed=5)
    files = sorted(tmp_path.glob("[013].txt"))
    loaded = TextWindows(from_files(files, tokenizer), 10, 3, seed=5)
    for step in range(5):
        for ours, theirs in zip(prepared.batch(step), loaded.batch(step), strict=True):
            assert torch.equal(ours, theirs)


def test_what_is_refused():
    documents = numbered(9)
    for name in ("length", "batch_size", "segments"):
        sizes = {"length": 2, "batch_size": 2, "segments": 2} | {name: 0}
        with pytest.raises(ValueError, match=f"expected {name} >= 1, got 0"):
            TextWindows(documents, seed=0, **sizes)
    with pytest.raises(ValueError, match="expected seed >= 0, got -1"):
        TextWindows(documents, 2, 2, seed=-1)
    with pytest.raises(ValueError, match="expected step >= 0, got -1"):
        TextWindows(documents, 2, 2, seed=0).batch(-1)
    for empty in ([], numbered(1, 1)):
        with pytest.raises(ValueError, match="expected a document of two tokens or more, got none"):
            TextWindows(empty, 2, 2, seed=0)


def test_windows_of_real_text():
    root = Path(os.environ.get("TITANS_DATA_DIR", Path(__file__).parents[2] / "../shared/data"))
    path = root / "text" / "tinyshakespeare.txt.gz"
    if not path.is_file():
        pytest.skip("needs text/tinyshakespeare.txt.gz of TITANS_DATA_DIR")
    tokenizer = ByteTokenizer()
    [document] = from_files(path, tokenizer)
    play = tokenizer.decode(document)
    assert play.startswith("First Citizen:")
    tokens, labels = TextWindows([document], 64, 8, seed=0, segments=2).batch(11)
    for row, answers in zip(tokens, labels, strict=True):
        assert tokenizer.decode(row.tolist()) in play
        assert torch.equal(row[1:], answers[:-1])
