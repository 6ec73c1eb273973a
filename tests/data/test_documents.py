"""Reading documents: what comes out, and one clear line for what cannot be read."""

import bz2
import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from titans.data.documents import (
    Document,
    hub_documents,
    read_blocks,
    read_documents,
    without_gutenberg,
)

BOOK = (
    "\r\nTitle: A Book\r\n\r\n"
    "*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\r\n\r\n\r\n"
    "  Chapter 1\r\n***\r\nOnce.\r\n\r\n"
    "*** END OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\r\nLicence\r\n"
)


def data_folder(name):
    root = Path(os.environ.get("TITANS_DATA_DIR", Path(__file__).parents[2] / "../shared/data"))
    if not (root / name).is_dir():
        pytest.skip(f"needs the folder {name!r} of TITANS_DATA_DIR")
    return root / name


def texts(*arguments, **options):
    return [document.text for document in read_documents(*arguments, **options)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2"])
def test_text_comes_as_it_is(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[suffix]
    text = "  Grüße\r\nto all\r\n\n"
    path.write_bytes(pack(text.encode()))
    assert list(read_documents(path)) == [Document(str(path), text)]
    # A byte-order mark is not text.
    path.write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))
    assert texts([path]) == [text]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_jsonl_is_a_document_a_line(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    rows = [{"body": "one\ntwo\u2028"}, {"body": ""}, {"body": "ü", "other": 1}]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert list(read_documents([path], text_key="body")) == [
        (f"{path}:1", "one\ntwo\u2028"),
        (f"{path}:3", ""),
        (f"{path}:5", "ü"),
    ]


def test_a_json_file_is_the_text_in_it(tmp_path):
    """RULER's essays are one object; what is something else is read as it stands."""
    path = tmp_path / "essays.json"
    path.write_text(json.dumps({"text": "one\n\ntwo \u2019"}))
    assert texts(path) == ["one\n\ntwo \u2019"]
    assert [block.text for block in read_blocks([path])] == ["one\n\ntwo \u2019"]
    for content in ('{"text": 3}', '["a"]', '{"text": "never'):
        path.write_text(content)
        assert texts(path) == [content]


def test_jsonl_is_read_a_line_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\nbroken\n')
    documents = read_documents(path)
    assert next(documents).text == "first"
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not a line of JSON \(Expecting value\)"):
        next(documents)


def test_a_folder_is_read_recursively_in_order_and_only_its_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.md").write_text("c")
    (tmp_path / "b" / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "d.TXT").write_text("d")
    (tmp_path / "a.rst.gz").write_bytes(gzip.compress(b"r"))
    (tmp_path / "empty.py").touch()
    (tmp_path / "picture.png").write_bytes(b"\0\xff")
    assert texts(tmp_path) == ["r", "a", "c", "d"]
    assert texts([tmp_path / "d.TXT", tmp_path / "b"]) == ["d", "a", "c"]


def test_gutenberg_header_and_footer():
    assert without_gutenberg(BOOK) == "  Chapter 1\r\n***\r\nOnce."
    assert without_gutenberg("a\n***END OF THE PROJECT GUTENBERG EBOOK B***\nc") == "a"
    assert without_gutenberg("a\nEnd of Project Gutenberg's A, by B\n\n*** END") == "a"
    wrapped = "x\n***START OF THE PROJECT GUTENBERG EBOOK A LONG\nTITLE***\n\nOnce.\n"
    assert without_gutenberg(wrapped) == "Once."
    assert without_gutenberg("\n*** START OF IT ***\n") == "\n*** START OF IT ***\n"


def test_gutenberg_is_kept_unless_asked(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(BOOK.encode())
    assert texts(path) == [BOOK]
    assert texts(path, strip_gutenberg=True) == ["  Chapter 1\r\n***\r\nOnce."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: no text in it"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), r"a\.txt\.gz: no text in it"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: no text in it"),
        ("a.txt", b"caf\xe9", r"a\.txt: expected UTF-8 text, got byte 0xe9"),
        ("a.jsonl", b'{"text": "\xe9"}', r"a\.jsonl: expected UTF-8 text, got byte 0xe9"),
        ("a.txt", b"ELF\0\0", r"a\.txt: expected text, got binary data"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz: cannot be read \(Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"cut off", mtime=0)[:-9], r"a\.txt\.gz: cannot be read \("),
        ("a.txt.bz2", b"not bzip2", r"a\.txt\.bz2: cannot be read \(Invalid data stream\)"),
        ("a.txt.bz2", bz2.compress(b"cut off")[:-9], r"a\.txt\.bz2: cannot be read \("),
        ("a.jsonl", b'{"text": "a"}\n{"text', r"a\.jsonl:2: not a line of JSON \("),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: expected a JSON object, got list"),
        ("a.jsonl", b'{"b": 1, "a": 2}', r"a\.jsonl:1: expected the key 'text', got \['a', 'b'\]"),
        ("a.jsonl", b'{"text": 1}', r"a\.jsonl:1: expected a string under 'text', got int"),
        ("a.jsonl", rb'{"text": "\ud800"}', r"a\.jsonl:1: 'text' is not valid Unicode"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_damage_in_the_middle_of_a_gzip_file(tmp_path):
    packed = bytearray(gzip.compress(bytes(range(65, 91)) * 200))
    packed[12] ^= 0xFF
    (tmp_path / "a.txt.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=r"a\.txt\.gz: cannot be read \("):
        texts(tmp_path / "a.txt.gz")


def test_paths_are_looked_up_before_any_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"b\.txt: no such file or folder"):
        next(read_documents([tmp_path / "a.txt", tmp_path / "b.txt"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no text files in it \(\.jsonl, \.md"):
        next(read_documents(tmp_path / "empty"))


def test_another_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    assert texts(tmp_path, encoding="latin-1") == ["café"]
    with pytest.raises(ValueError, match="expected the name of a text encoding, got 'latin-x'"):
        texts(tmp_path, encoding="latin-x")


def test_the_encoding_of_each_file_is_found(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("café".encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"caf\xe9"))
    assert texts(tmp_path, encoding="auto") == ["café"] * 3
    with pytest.raises(ValueError, match=r"d\.txt: no such file"):
        texts(tmp_path / "d.txt", encoding="auto")


def test_real_books_lose_their_licence_and_keep_their_text():
    path = data_folder("books") / "2600-0.txt.gz"
    [whole] = texts(path)
    [book] = texts(path, strip_gutenberg=True)
    assert "Project Gutenberg" in whole
    assert "Project Gutenberg" not in book
    assert book in whole
    assert 3_000_000 < len(book) < len(whole)


def test_a_real_book_in_latin_1_is_named():
    with pytest.raises(ValueError, match=r"chesterton-ball\.txt\.gz: expected UTF-8 text"):
        texts(data_folder("books"))


def test_real_jsonl():
    path = data_folder("commonsense") / "piqa.jsonl.gz"
    queries = texts(path, text_key="query")
    assert len(queries) == 1838
    assert queries[0].startswith("Question: How do I ready a guinea pig cage")


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_documents_from_local_data(tmp_path, monkeypatch, streaming):
    datasets = pytest.importorskip("datasets", reason="needs the extra `text`")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    path = folder / "train.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    for name in (str(path), str(folder)):
        assert list(hub_documents(name, "train", streaming=streaming)) == [
            (f"{name} [train] row 0", "a"),
            (f"{name} [train] row 1", "b"),
        ]
    with pytest.raises(ValueError, match=r"row 0: expected the key 'body', got \['text'\]"):
        list(hub_documents(str(path), text_key="body", streaming=streaming))


def test_hub_documents_that_cannot_be_had(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs the extra `text`")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=rf"{tmp_path} \[valid\]: .*valid") as caught:
        list(hub_documents(str(tmp_path), "valid"))
    assert "\n" not in str(caught.value)
    (tmp_path / "a.xml").touch()
    with pytest.raises(ValueError, match=r"a\.xml: expected one of .* got '\.xml'"):
        list(hub_documents(str(tmp_path / "a.xml")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[text\]'"):
        list(hub_documents("anything"))
