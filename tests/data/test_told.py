"""Tokens told one by one join to what they say, up to the first string that ends it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans.data.tokenizers import BPETokenizer, ByteTokenizer
from titans.data.told import Decoder, Stops

BYTES = ByteTokenizer()
SAMPLE = "Ein Äffchen aß 3 Äpfel — «baku: 4821», 値は42。\n\n  Then: it's  «gone»\u2026 🙂\tok"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return BPETokenizer.train([SAMPLE * 20, "the theory of the thing " * 30], 330, path)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 256), max_size=40))
def test_bytes_told_one_by_one_join_to_their_text(ids) -> None:
    decoder = Decoder(BYTES)
    told = [decoder.feed(token) for token in ids]
    assert "".join(told) + decoder.finish() == BYTES.decode(ids)


def test_a_character_is_told_when_it_is_whole() -> None:
    decoder = Decoder(BYTES)
    assert [decoder.feed(t) for t in "aß🙂".encode()] == ["a", "", "ß", "", "", "", "🙂"]


def test_byte_pairs_told_one_by_one_join_to_their_text(bpe) -> None:
    text = SAMPLE + "\ufffd\ufffd" + " the" * 40
    decoder = Decoder(bpe)
    told = [decoder.feed(token) for token in bpe.encode(text)]
    assert "".join(told) + decoder.finish() == text
    assert "Äffchen" in "".join(told)


def test_a_character_that_never_comes_is_not_waited_for(bpe) -> None:
    """U+FFFD itself looks like an incomplete character: ten thousand must not cost their square."""
    (*ids,) = bpe.encode("\ufffd" * 10_000)
    decoder = Decoder(bpe)
    told = "".join(decoder.feed(token) for token in ids)
    assert len(decoder.ids) <= 9
    assert (told + decoder.finish()).count("\ufffd") >= 9_000


@settings(max_examples=40)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stops_cut_where_the_first_one_begins(text, stops) -> None:
    """Shown piece by piece or at once: the text before the stop that is complete first."""
    watcher = Stops(stops)
    shown = "".join(watcher.feed(char) for char in text) + watcher.feed("", last=True)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first = min((end for end, _ in ends), default=None)
    expected = text if first is None else text[: min(b for e, b in ends if e == first)]
    assert shown == expected
    assert watcher.hit == bool(ends)


def test_what_may_begin_a_stop_is_not_shown_yet() -> None:
    watcher = Stops(["END", "»"])
    assert [watcher.feed(t) for t in ("xE", "N", "y", "EN", "D", "z")] == [
        "x",
        "",
        "ENy",
        "",
        "",
        "",
    ]
    assert watcher.hit
