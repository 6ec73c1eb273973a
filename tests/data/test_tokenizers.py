"""Tokenizers: any text comes back, and no text can end its own document."""

import json
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans.data.tokenizers import (
    CODES,
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    encode_document,
    identity_of,
    load_tokenizer,
    token_dtype,
    tokenizer_identity,
    tokenizer_of,
)

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return BPETokenizer.train(["the cat sat on the mat. "] * 50, 280, path)


@given(unicode_text)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    np.testing.assert_array_equal(tokenizer.encode_array(text), ids)
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text


def test_bytes_decode_replaces_what_is_not_utf8_and_refuses_other_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(np.array([0xC3, 65], dtype=np.uint16)) == "\ufffdA"
    with pytest.raises(ValueError, match=r"expected byte ids in 0\.\.256, got 257"):
        tokenizer.decode([65, 257])


def test_both_are_tokenizers(bpe):
    assert isinstance(ByteTokenizer(), Tokenizer)
    assert isinstance(bpe, Tokenizer)


@given(text=unicode_text)
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert all(0 <= i < bpe.vocab_size for i in ids)
    assert bpe.decode(np.array([*ids, bpe.end_of_document])) == text


def test_bpe_learns_and_comes_back_from_its_file(bpe):
    again = load_tokenizer(bpe.name)
    text = "the cat sat"
    assert again.encode(text) == bpe.encode(text)
    assert (again.vocab_size, again.end_of_document) == (bpe.vocab_size, bpe.end_of_document)
    assert 257 < bpe.vocab_size <= 280
    assert len(bpe.encode(text)) < len(text.encode())


def test_letters_and_digits_of_codes_stand_alone(tmp_path):
    """The same tokens after any word, whether the code starts with a letter or a digit."""
    texts = ["it is bead food or deaf: f0d5beadab12-44ad is 9f0 "] * 50
    joined = BPETokenizer.train(texts, 320, tmp_path / "joined.json")
    apart = BPETokenizer.train(texts, 320, tmp_path / "apart.json", isolate=CODES)
    assert " f" in pieces(joined, "is f0d5beadab12")
    for code in ("f0d5beadab12", "9f0", "1234567"):
        assert pieces(apart, f"it is {code} or") == ["it", " is", " ", *code, " or"]
        assert pieces(apart, f"or deaf: {code}")[-len(code) - 1 :] == [" ", *code]
    assert " bead" in pieces(apart, "it is bead food")  # words are not codes
    assert pieces(load_tokenizer(apart.name), "it 9f0") == ["it", " ", *"9f0"]


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_a_text_cannot_spell_the_end_of_its_document(bpe):
    ids = bpe.encode(f"a{END_OF_TEXT}b")
    assert bpe.end_of_document not in ids
    assert bpe.decode(ids) == f"a{END_OF_TEXT}b"


def test_half_of_a_surrogate_pair_is_refused_by_both(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
            tokenizer.encode("a\udcff")


def test_others_run_while_a_long_text_is_encoded(bpe):
    """A server answers meanwhile."""
    text, seconds, ticks = "the cat sat on the mat. " * 40_000, [], []

    def encode():
        begin = time.monotonic()
        bpe.encode(text)
        seconds.append((begin, time.monotonic()))

    thread = threading.Thread(target=encode)
    thread.start()
    while thread.is_alive():
        ticks.append(time.monotonic())
        time.sleep(0.001)
    ((begin, end),) = seconds
    assert sum(begin < tick < end for tick in ticks) > 10


def test_truncation_in_the_file_is_not_obeyed(bpe, tmp_path):
    with open(bpe.name, encoding="utf-8") as stream:
        fields = json.load(stream)
    fields["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    text = "the cat sat on the mat"
    assert BPETokenizer.from_file(path).encode(text) == bpe.encode(text)


def test_vocabulary_with_gaps_counts_to_its_last_id(bpe, tmp_path):
    with open(bpe.name, encoding="utf-8") as stream:
        fields = json.load(stream)
    model = fields["model"]
    last = max(model["vocab"], key=model["vocab"].get)
    model["vocab"][last] = 999
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    assert BPETokenizer.from_file(path).vocab_size == 1000


def test_load_tokenizer_refuses_what_is_not_one(bpe, tmp_path):
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    with pytest.raises(ValueError, match=r"expected the tokenizer 'bytes' or .* got 'letters'"):
        load_tokenizer("letters")
    with pytest.raises(ValueError, match=r"none\.json: no such tokenizer file"):
        BPETokenizer.from_file(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json: not a tokenizers JSON file"):
        load_tokenizer(broken)
    foreign = tmp_path / "foreign.json"
    with open(bpe.name, encoding="utf-8") as stream:
        foreign.write_text(stream.read().replace(END_OF_TEXT, "</s>"))
    with pytest.raises(ValueError, match=r"foreign\.json: expected a token '<\|endoftext\|>'"):
        load_tokenizer(foreign)


def test_train_refuses_before_it_works(tmp_path):
    with pytest.raises(ValueError, match=r"expected vocab_size >= 257 .* got 256"):
        BPETokenizer.train(["a"], 256, tmp_path / "t.json")
    with pytest.raises(ValueError, match="its folder does not exist"):
        BPETokenizer.train(["a"], 300, tmp_path / "none" / "t.json")


def test_a_missing_library_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[text\]'"):
        BPETokenizer.from_file(tmp_path / "tokenizer.json")


def test_encode_document_ends_it_and_picks_the_smallest_dtype(bpe):
    document = encode_document(ByteTokenizer(), "né")
    assert document.dtype == np.dtype("<u2")
    assert document.tolist() == [*"né".encode(), 256]
    assert encode_document(bpe, "the cat").tolist() == [*bpe.encode("the cat"), bpe.end_of_document]
    assert token_dtype(2**16) == np.dtype("<u2")
    assert token_dtype(2**16 + 1) == np.dtype("<u4")


def test_encode_document_refuses_ids_outside_the_vocabulary():
    class Strange:
        name, vocab_size, end_of_document = "strange", 10, 9

        def encode(self, text):
            return [3, 10]

        def decode(self, ids):
            return ""

    with pytest.raises(ValueError, match=r"tokenizer 'strange': expected ids in 0\.\.9, got 3"):
        encode_document(Strange(), "x")


def test_a_tokenizers_identity_is_what_its_ids_mean(bpe):
    """Releases of `tokenizers` write merges as pairs or with a space between, and new fields."""
    rules = json.loads(bpe.rules)
    merges = rules["model"]["merges"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for form in (pairs, [" ".join(pair) for pair in pairs]):
        rules["model"]["merges"] = form
        rules["something_new"] = None
        assert identity_of(json.dumps(rules)) == tokenizer_identity(bpe)
    rules["model"]["merges"] = pairs[:-1]
    assert identity_of(json.dumps(rules)) != tokenizer_identity(bpe)


def test_a_model_is_not_read_with_another_tokenizer(bpe):
    def model(vocab_size):
        config = SimpleNamespace(vocab_size=vocab_size)
        return SimpleNamespace(config=config, tokenizer=None)

    assert tokenizer_of(model(257), None).name == "bytes"
    assert tokenizer_of(model(bpe.vocab_size + 2), bpe) is bpe  # padded to a round number, say
    for vocab_size, tokenizer in ((2048, None), (200, None), (bpe.vocab_size - 1, bpe)):
        with pytest.raises(ValueError, match=f"the model {vocab_size}: name the one"):
            tokenizer_of(model(vocab_size), tokenizer)
