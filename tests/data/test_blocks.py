"""Texts of any size come block by block, and as the same tokens as at once."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans.data.documents import Block, read_blocks, read_documents
from titans.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    encode_blocks,
    load_tokenizer,
    tokenizer_identity,
)

PROSE = "The cat sat on the mat,\nand so did she.\n\n  Indented twice.\nüber alles; 12 cats!\n" * 9


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return BPETokenizer.train([PROSE], 300, path)


def blocks_of(text: str, size: int) -> list[tuple[str, bool]]:
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    return [(part, i == len(parts) - 1) for i, part in enumerate(parts)]


def test_blocks_joined_are_the_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \xc3\xbc\r\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": ""}\n{"text": "four"}\n')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"five" * 10))
    paths = [tmp_path / name for name in ("c.txt.gz", "a.txt", "b.jsonl")]
    documents = [document.text for document in read_documents(paths)]
    for size in (1, 4, 1000):
        found, text = [], ""
        for block in read_blocks(paths, size=size):
            assert len(block.text) <= max(size, 5)  # a line of JSON is not cut
            text += block.text
            if block.last:
                found.append(text)
                text = ""
        assert found == documents
    assert next(read_blocks([tmp_path / "a.txt"], size=4)) == Block("one ", False)


def test_a_file_is_not_read_ahead(tmp_path):
    """An error far into a file comes when it is reached, and names the file."""
    for content, message in (
        (b"good " * 2**18 + b"\xff", r"a.txt: expected UTF-8 text, got byte 0xff"),
        (b"good " * 2**18 + b"\0", r"a.txt: expected text, got binary data"),
    ):
        (tmp_path / "a.txt").write_bytes(content)
        blocks = read_blocks([tmp_path / "a.txt"], size=2**16)
        assert next(blocks).text == ("good " * 2**18)[: 2**16]
        with pytest.raises(ValueError, match=message):
            list(blocks)


def test_what_cannot_be_read_is_known_before_anything_is(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"absent.txt: no such file or folder"):
        next(read_blocks([tmp_path / "a.txt", tmp_path / "absent.txt"]))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty.txt: no text in it"):
        list(read_blocks([tmp_path / "empty.txt"]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("grün".encode() * 3, "['grü', 'ngr', 'üng', 'rün']"),
        (b"", "-: no text in it"),
        (b"a\xff", "standard input: expected UTF-8 text, got byte 0xff"),
    ],
)
def test_standard_input_is_a_text(tmp_path, given, expected):
    (tmp_path / "given").write_bytes(given)
    kept = os.dup(0)
    try:
        with open(tmp_path / "given", "rb") as file:
            os.dup2(file.fileno(), 0)
        found = str([block.text for block in read_blocks(["-"], size=3)])
        os.fstat(0)  # still open, for who comes next
    except ValueError as error:
        found = str(error)
    finally:
        os.dup2(kept, 0)
        os.close(kept)
    assert found == expected


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 7))
def test_bytes_may_be_cut_anywhere(text, size):
    parts = list(encode_blocks(ByteTokenizer(), blocks_of(text, size)))
    assert b"".join(part.tobytes() for part in parts) == text.encode()


@given(st.text(alphabet="cat sT,\n\n", max_size=60), st.integers(1, 25))
def test_other_tokens_are_cut_at_lines_only(bpe, text, size):
    whole = bpe.encode(text)
    parts = list(encode_blocks(bpe, blocks_of(text, size)))
    assert [int(i) for part in parts for i in part] == whole


def test_prose_is_encoded_as_it_arrives(bpe):
    parts = list(encode_blocks(bpe, blocks_of(PROSE, 100)))
    assert np.concatenate(parts).tolist() == bpe.encode(PROSE)
    assert max(len(bpe.decode(part)) for part in parts) < 250


@pytest.mark.parametrize(
    "odd",
    [
        {"normalizer": {"type": "Prepend", "prepend": "_"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_a_tokenizer_that_marks_the_first_word_is_refused_where_a_text_is_cut(bpe, tmp_path, odd):
    (tmp_path / "odd.json").write_text(json.dumps(json.loads(bpe.rules) | odd))
    tokenizer = load_tokenizer(tmp_path / "odd.json")
    whole = list(encode_blocks(tokenizer, [(PROSE, True)]))
    assert np.concatenate(whole).tolist() == tokenizer.encode(PROSE)
    with pytest.raises(ValueError, match="gives a text in pieces other tokens than the whole"):
        list(encode_blocks(tokenizer, blocks_of(PROSE, 100)))


def test_documents_do_not_run_into_each_other(bpe):
    both = [("the c", True), ("at sat", True)]
    ids = np.concatenate(list(encode_blocks(bpe, both))).tolist()
    assert ids == bpe.encode("the c") + bpe.encode("at sat")


def test_identity_is_that_of_the_vocabulary(bpe, tmp_path):
    assert tokenizer_identity(ByteTokenizer()) == "bytes"
    moved = tmp_path / "elsewhere.json"
    moved.write_text(Path(bpe.name).read_text())
    assert tokenizer_identity(load_tokenizer(moved)) == tokenizer_identity(bpe)
    other = BPETokenizer.train([PROSE[::-1]], 300, tmp_path / "other.json")
    assert tokenizer_identity(other) != tokenizer_identity(bpe)
