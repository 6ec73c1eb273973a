"""DNA from files: genomes, labelled sequences in two layouts, strands."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from titans.data.dna import (
    decode_bases,
    encode_bases,
    read_fasta,
    read_task,
    reverse_complement,
)

DATA = Path(os.environ.get("TITANS_DATA_DIR", "absent")) / "dna"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs dna/: set TITANS_DATA_DIR")


def test_letters_and_codes() -> None:
    assert encode_bases("ACGTNacgtnuRy").tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 3, 4, 4]
    assert decode_bases(encode_bases("GATTACAN")) == "GATTACAN"


def test_the_other_strand() -> None:
    assert decode_bases(reverse_complement(encode_bases("AACGTTTN"))) == "NAAACGTT"
    codes = np.random.default_rng(0).integers(0, 5, 101).astype(np.uint8)
    assert np.array_equal(reverse_complement(reverse_complement(codes)), codes)
    assert not np.array_equal(reverse_complement(codes), codes)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fasta(tmp_path, suffix: str) -> None:
    path = tmp_path / f"two.fa{suffix}"
    opener = gzip.open if suffix else open
    with opener(path, "wt") as file:
        file.write(">one, complete\r\nACGT\nacg\n\n>two\nNN\n")
    records = [(name, decode_bases(codes)) for name, codes in read_fasta(path)]
    assert records == [("one, complete", "ACGTACG"), ("two", "NN")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ACGT\n", r"g\.fa:1: expected a FASTA header"),
        ("", "no FASTA record in it"),
        (">a\n>b\nAC\n", "record 'a' has no bases"),
        (">a\nAC-T\n", "record 'a': expected bases .*, got '-'"),
    ],
)
def test_bad_fasta_is_one_line(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "g.fa"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_fasta(path))
    assert "\n" not in str(caught.value)


def write_gue(folder: Path, **tables: str) -> Path:
    folder.mkdir(exist_ok=True)
    for part in ("train", "dev", "test"):
        text = tables.get(part, "ACGT,0\nTTT,1\n")
        (folder / f"{part}.csv").write_text("sequence,label\n" + text)
    return folder


def test_gue(tmp_path) -> None:
    folder = write_gue(tmp_path / "splice", test="A,2\n")
    (folder / "dev.csv").unlink()
    with gzip.open(folder / "dev.csv.gz", "wt") as file:
        file.write("sequence,label\nGG,1\n")
    task = read_task(folder)
    assert (task.name, task.classes) == ("splice", ("0", "1", "2"))
    assert [decode_bases(s) for s in task.train.sequences] == ["ACGT", "TTT"]
    assert task.train.labels.tolist() == [0, 1]
    assert decode_bases(task.dev.sequences[0]) == "GG"
    assert task.test.labels.tolist() == [2]
    assert "0 of 1 test sequences stand in train" in task.split
    known = read_task(write_gue(tmp_path / "known", test="TTT,0\nTT,1\n"))
    assert "1 of 2 test sequences stand in train" in known.split


def test_genomic_benchmarks(tmp_path) -> None:
    for part, count in (("train", 30), ("test", 3)):
        for label, name in enumerate(("negative", "positive")):
            folder = tmp_path / "ocr" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.txt").write_text("ACGT"[label] * (i + 1) + "\n")
    task = read_task(tmp_path / "ocr", seed=3)
    assert task.classes == ("negative", "positive")
    assert [len(p.labels) for p in (task.train, task.dev, task.test)] == [54, 6, 6]
    for part in (task.train, task.dev, task.test):
        assert [s[0] for s in part.sequences] == part.labels.tolist()  # A is 0, C is 1
    train = {decode_bases(s) for s in task.train.sequences}
    assert not train & {decode_bases(s) for s in task.dev.sequences}
    again = read_task(tmp_path / "ocr", seed=3)
    other = read_task(tmp_path / "ocr", seed=4)
    assert [s.tolist() for s in again.dev.sequences] == [s.tolist() for s in task.dev.sequences]
    assert [s.tolist() for s in other.dev.sequences] != [s.tolist() for s in task.dev.sequences]
    assert "dev is 6 of train" in task.split
    (tmp_path / "ocr" / "test" / "unheard").mkdir()
    with pytest.raises(ValueError, match=r"expected the classes of train, .* got .*'unheard'"):
        read_task(tmp_path / "ocr")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("ACGT\n", r"train\.csv:2: expected a sequence and a label"),
        ("ACGT,0\nAC,x\n", r"train\.csv:3: expected a sequence and a label"),
        ("AC GT,0\n", r"train\.csv:2: expected bases .*, got ' '"),
        ("", r"train\.csv: no sequences in it"),
        ("ACGT,1000000000000000000000000000000\n", r"train\.csv:2: .* at most 4 digits"),
        ("ACGT,0\rACGT,1\r", r"train\.csv:\d: not a line of CSV"),
    ],
)
def test_bad_tables_are_named(tmp_path, table: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_task(write_gue(tmp_path / "t", train=table))
    assert "\n" not in str(caught.value)


def test_a_sequence_may_be_longer_than_a_csv_cell_usually_is(tmp_path) -> None:
    table = f"{'ACGT' * 50_000},0\n\nAC,1\n"
    assert [len(s) for s in read_task(write_gue(tmp_path / "t", train=table)).train.sequences] == [
        200_000,
        2,
    ]


def test_folders_that_are_no_task(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"expected train, dev and test\.csv"):
        read_task(tmp_path)
    folder = write_gue(tmp_path / "t")
    (folder / "dev.csv").unlink()
    with pytest.raises(ValueError, match=r"expected dev\.csv or dev\.csv\.gz beside train\.csv"):
        read_task(folder)
    (folder / "train.csv").write_text("ACGT,0\n")
    (folder / "dev.csv").write_text("ACGT,0\n")
    with pytest.raises(ValueError, match=r"train\.csv:1: expected the header"):
        read_task(folder)
    one = tmp_path / "one"
    for part in ("train", "test"):
        (one / part / "only").mkdir(parents=True)
    with pytest.raises(ValueError, match="a folder for each of two classes"):
        read_task(one)


@needs_data
def test_the_real_files() -> None:
    task = read_task(DATA / "mouse_0")
    assert [len(p.labels) for p in (task.train, task.dev, task.test)] == [6478, 810, 810]
    assert {len(s) for s in task.train.sequences} == {101}
    ((name, codes),) = read_fasta(DATA / "lambda_phage.fa.gz")
    assert "lambda" in name
    assert len(codes) == 48_502
    # Its cohesive ends, and the known share of G and C.
    assert decode_bases(codes[:12]) == "GGGCGGCGACCT"
    assert np.isin(codes, [1, 2]).mean() == pytest.approx(0.4986, abs=1e-4)
