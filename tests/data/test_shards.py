"""Prepared folders: documents come back exactly, damage is refused, failure leaves nothing."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans.data.documents import Document
from titans.data.shards import Shards, prepare
from titans.data.tokenizers import BPETokenizer, ByteTokenizer

TEXTS = ["one", "", "three three three", "vier", "ünf"]


def documents(texts):
    return [Document(str(number), text) for number, text in enumerate(texts)]


def decoded(shards):
    tokenizer = shards.tokenizer()
    return [tokenizer.decode(shards.document(i)) for i in range(shards.documents)]


@pytest.fixture
def folder(tmp_path):
    prepare(documents(TEXTS), ByteTokenizer(), tmp_path / "out", shard_tokens=8)
    return tmp_path / "out"


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
    shard_tokens=st.integers(1, 40),
)
def test_any_documents_come_back(texts, shard_tokens):
    tokenizer = ByteTokenizer()
    with tempfile.TemporaryDirectory() as scratch:
        info = prepare(documents(texts), tokenizer, Path(scratch) / "out", shard_tokens)
        shards = Shards.open(info.folder, verify=True)
        assert decoded(shards) == texts
        lengths = [len(text.encode()) + 1 for text in texts]
        assert shards.lengths.tolist() == lengths
        assert info.documents == shards.documents == len(texts)
        assert info.tokens == shards.tokens == sum(lengths)
        assert all(shards.document(i)[-1] == 256 for i in range(shards.documents))
        # A shard is over its size only for a document that is so by itself.
        for path in info.folder.glob("tokens-*.bin"):
            content = np.fromfile(path, dtype="<u2")
            assert len(content) <= shard_tokens or (content == 256).sum() == 1
        assert len(list(info.folder.glob("tokens-*.bin"))) == info.shards


def test_what_is_written(folder):
    index = json.loads((folder / "index.json").read_text())
    assert index["version"] == 1
    assert (index["tokenizer"], index["vocab_size"], index["dtype"]) == ("bytes", 257, "uint16")
    assert (index["documents"], index["tokens"]) == (5, 3 + 17 + 4 + 4 + 5)
    assert [shard["tokens"] for shard in index["shards"]] == [5, 18, 5, 5]
    rows = np.fromfile(folder / "documents.bin", dtype="<i8").reshape(-1, 3)
    assert rows.tolist() == [[0, 0, 4], [0, 4, 5], [1, 0, 18], [2, 0, 5], [3, 0, 5]]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_documents_are_views_of_the_file(folder):
    document = Shards.open(folder).document(2)
    assert document.base is not None
    assert not document.flags.writeable
    for number in (-1, 5):
        with pytest.raises(ValueError, match=rf"expected a document in 0\.\.4, got {number}"):
            Shards.open(folder).document(number)


def test_a_tokenizer_file_travels_along(tmp_path):
    path = tmp_path / "mine.json"
    tokenizer = BPETokenizer.train(["the cat sat on the mat. "] * 9, 270, path)
    prepare(documents(TEXTS), tokenizer, tmp_path / "out")
    path.unlink()
    (tmp_path / "out").rename(tmp_path / "moved")
    shards = Shards.open(tmp_path / "moved")
    assert decoded(shards) == TEXTS
    assert (shards.vocab_size, shards.end_of_document) == (
        tokenizer.vocab_size,
        tokenizer.end_of_document,
    )

    BPETokenizer.train(["a"], 257, tmp_path / "moved" / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected 2\d\d tokens, got 257"):
        shards.tokenizer()
    (tmp_path / "moved" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: missing from the prepared folder"):
        Shards.open(tmp_path / "moved")


def test_wide_vocabularies_take_four_bytes(tmp_path):
    name = tmp_path / "wide.json"
    name.touch()

    class Wide(ByteTokenizer):
        """Stands for any tokenizer with more than 65,536 tokens."""

        def __init__(self):
            super().__init__()
            self.name, self.vocab_size, self.end_of_document = str(name), 100_000, 99_999

    prepare(documents(["ab", "c"]), Wide(), tmp_path / "out")
    shards = Shards.open(tmp_path / "out")
    assert shards.document(0).tolist() == [97, 98, 99_999]
    assert shards.document(1).tolist() == [99, 99_999]
    assert (tmp_path / "out" / "tokens-00000.bin").stat().st_size == 5 * 4


def test_validation_is_apart_and_stays_where_it_was(tmp_path):
    texts = [f"document {number}" for number in range(400)]
    info = prepare(documents(texts), ByteTokenizer(), tmp_path / "a", valid_fraction=0.1)
    train, valid = Shards.open(tmp_path / "a" / "train"), Shards.open(tmp_path / "a" / "valid")
    assert sorted(decoded(train) + decoded(valid)) == sorted(texts)
    assert (info.documents, info.valid_documents) == (400, valid.documents)
    assert (info.tokens, info.valid_tokens) == (train.tokens + valid.tokens, valid.tokens)
    # 40 expected, standard deviation 6.
    assert 16 <= valid.documents <= 64

    prepare(documents(["more", *texts, *texts]), ByteTokenizer(), tmp_path / "b", 99, 0.1)
    assert set(decoded(Shards.open(tmp_path / "b" / "valid"))) - {"more"} == set(decoded(valid))
    with pytest.raises(ValueError, match=r"not a prepared folder .* open its 'train' or 'valid'"):
        Shards.open(tmp_path / "a")


def test_failure_in_the_middle_leaves_nothing(tmp_path):
    def broken():
        yield from documents(TEXTS)
        raise ValueError("book.txt: cannot be read")

    with pytest.raises(ValueError, match=r"book\.txt: cannot be read"):
        prepare(broken(), ByteTokenizer(), tmp_path / "out", shard_tokens=2)
    assert list(tmp_path.iterdir()) == []


def test_prepare_refuses(tmp_path):
    tokenizer = ByteTokenizer()
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="expected at least one document, got none"):
        prepare([], tokenizer, out)
    with pytest.raises(ValueError, match="of 1 documents leaves"):
        prepare(documents(["a"]), tokenizer, out, valid_fraction=0.5)
    with pytest.raises(ValueError, match="expected shard_tokens >= 1, got 0"):
        prepare(documents(TEXTS), tokenizer, out, shard_tokens=0)
    with pytest.raises(ValueError, match=r"expected valid_fraction in \[0, 1\), got 1\.0"):
        prepare(documents(TEXTS), tokenizer, out, valid_fraction=1.0)
    tokenizer.name = "words"
    with pytest.raises(ValueError, match=r"expected a tokenizer called 'bytes' or .* got 'words'"):
        prepare(documents(TEXTS), tokenizer, out)
    assert list(tmp_path.iterdir()) == []


def test_only_a_new_or_empty_folder_is_written_to(tmp_path):
    out = tmp_path / "some" / "where"
    prepare(documents(["a"]), ByteTokenizer(), out)
    with pytest.raises(ValueError, match="where: expected a new or empty folder"):
        prepare(documents(["b"]), ByteTokenizer(), out)
    assert decoded(Shards.open(out)) == ["a"]
    (tmp_path / "empty").mkdir()
    prepare(documents(["c"]), ByteTokenizer(), tmp_path / "empty")
    assert decoded(Shards.open(tmp_path / "empty")) == ["c"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: expected a new or empty folder"):
        prepare(documents(["d"]), ByteTokenizer(), tmp_path / "file")


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents.bin"])
def test_missing_and_cut_files_are_refused(folder, name):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(
        ValueError, match=rf"{name}: expected {len(content)} bytes, got {len(content) - 2}"
    ):
        Shards.open(folder)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name}: missing from the prepared folder"):
        Shards.open(folder)


def test_changed_tokens_are_found_when_asked(folder):
    path = folder / "tokens-00001.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    Shards.open(folder)
    with pytest.raises(ValueError, match=r"tokens-00001\.bin: damaged \(wrong checksum\)"):
        Shards.open(folder, verify=True)


@pytest.mark.parametrize("row", [[0, 0, 6], [4, 0, 1], [-1, 0, 1], [0, -1, 2], [0, 3, 3]])
def test_documents_outside_their_shard_are_refused(folder, row):
    path = folder / "documents.bin"
    rows = np.fromfile(path, dtype="<i8").reshape(-1, 3)
    rows[1] = row
    rows.tofile(path)
    with pytest.raises(ValueError, match=r"documents\.bin: damaged \(a document lies outside"):
        Shards.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"index\.json: expected version 1, got 2"),
        ({"tokens": 7}, r"index\.json: damaged \(its counts contradict each other\)"),
        ({"dtype": "uint32"}, r"index\.json: damaged \(its counts contradict each other\)"),
        ({"tokenizer": "../tokenizer.json"}, r"index\.json: damaged \(its counts"),
        ({"documents": "many"}, r"index\.json: damaged \("),
        ({"shards": 3}, r"index\.json: damaged \("),
        ({"colour": "red"}, r"index\.json: damaged \(.*colour"),
    ],
)
def test_a_wrong_index_is_refused(folder, change, message):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Shards.open(folder)


def test_no_index_or_half_of_one(folder):
    path = folder / "index.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"index\.json: damaged \(JSONDecodeError") as caught:
        Shards.open(folder)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"out: not a prepared folder \(no index\.json in it\)"):
        Shards.open(folder)


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is the current folder, expected another to write to"):
        prepare(documents(["a"]), ByteTokenizer(), ".")
    assert list(tmp_path.iterdir()) == []
