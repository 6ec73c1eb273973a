"""Text that comes in any pieces is the text."""

import asyncio
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans.data.tokenizers import BPETokenizer, ByteTokenizer
from titans.serve import text as serve_text
from titans.serve.reading import in_pieces
from titans.serve.text import Encoder

BYTES = ByteTokenizer()
SAMPLE = "Ein Äffchen aß 3 Äpfel — «baku: 4821», 値は42。\n\n  Then: it's  «gone»\u2026 🙂\tok"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return BPETokenizer.train([SAMPLE * 20, "the theory of the thing " * 30], 330, path)


def encoded(tokenizer, content: bytes, cuts) -> list[int]:
    encoder, tokens = Encoder(tokenizer), []
    places = [0, *sorted(c % (len(content) + 1) for c in cuts), len(content)]
    for start, stop in pairwise(places):
        tokens += encoder.feed(content[start:stop]).tolist()
    return tokens + encoder.feed(b"", last=True).tolist()


@settings(max_examples=40)
@given(st.text(max_size=60), st.lists(st.integers(0, 300), max_size=12))
def test_bytes_in_any_pieces(text, cuts) -> None:
    assert encoded(BYTES, text.encode(), cuts) == BYTES.encode(text)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_byte_pair_encoding_in_any_pieces(bpe, size) -> None:
    text = SAMPLE + " the theory " + SAMPLE
    content = text.encode()
    assert encoded(bpe, content, range(0, len(content), size)) == bpe.encode(text)
    assert len(bpe.encode(text)) < len(content)


@pytest.mark.parametrize("between", ["\n", "\tx\n"])
def test_lines_are_places_to_cut_too(bpe, monkeypatch, between) -> None:
    """A text without spaces: a word, or a table, a line."""
    monkeypatch.setattr(serve_text, "LONGEST_WORD", 20)
    text = between.join(["the", "theory", "thing", "Äpfel"] * 20)
    content = text.encode()
    for size in (7, 64):
        assert encoded(bpe, content, range(0, len(content), size)) == bpe.encode(text)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_mark_of_the_byte_order_is_no_text(size) -> None:
    content = b"\xef\xbb\xbfhello \xef\xbb\xbf"
    found = encoded(BYTES, content, range(0, len(content), size))
    assert found == list(content[3:])


def test_a_word_without_end_does_not_fill_the_memory(bpe, monkeypatch) -> None:
    monkeypatch.setattr(serve_text, "LONGEST_WORD", 100)
    encoder = Encoder(bpe)
    tokens = [t for _ in range(50) for t in encoder.feed(b"abcdefghij").tolist()]
    assert len(encoder.held) <= 110
    assert bpe.decode(tokens) + encoder.held == "abcdefghij" * 50


@pytest.mark.parametrize(
    "wrong",
    [b"\xff", b"ab\xc3", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf"],
    ids=["byte", "cut", "pair", "surrogate", "beyond", "overlong"],
)
@pytest.mark.parametrize("size", [1, 100])
def test_what_is_not_utf8_is_refused_in_any_pieces(wrong, size) -> None:
    with pytest.raises(ValueError, match=r"not UTF-8: .* within the first [0-9]+ bytes"):
        encoded(BYTES, b"good \xc3\xa4 " + wrong, range(0, 100, size))


@settings(max_examples=40)
@given(st.lists(st.integers(0, 30), max_size=12), st.integers(0, 50), st.integers(1, 9))
def test_pieces_end_where_the_position_is_a_multiple(lengths, position, size) -> None:
    async def source():
        start = 0
        for length in lengths:
            yield np.arange(start, start + length)
            start += length

    async def cut():
        return [piece async for piece in in_pieces(source(), position, size)]

    found = asyncio.run(cut())
    assert [int(t) for piece in found for t in piece] == list(range(sum(lengths)))
    for piece in found[:-1]:
        position += len(piece)
        assert position % size == 0
    assert all(0 < len(piece) <= size for piece in found)
