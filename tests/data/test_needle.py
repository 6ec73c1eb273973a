"""RULER's tasks: the words, the places, the split, and what training rows teach."""

import os
import re
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from titans.data.carrier import is_held_out
from titans.data.haystack import NOISE, blocks, prose, prose_files, split_sentences
from titans.data.needle import KINDS, NeedleBatches, NeedleTask
from titans.data.tokenizers import BPETokenizer, ByteTokenizer

BYTES = ByteTokenizer()
SENTENCES = [f"Sentence number {i} says nothing of use. " for i in range(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Word lists and two books, one of which is held out by name."""
    folder = tmp_path_factory.mktemp("needle")
    (folder / "nounlist.txt").write_text("".join(f"noun{i}\n" for i in range(300)))
    (folder / "adjectivelist.txt").write_text("".join(f"quick{i}\n" for i in range(300)))
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_text("".join(SENTENCES))
    (folder / "books" / "1184-0.txt").write_text("".join(SENTENCES).replace("number", "count"))
    return folder


def make(folder, kind, held_out=True, tokenizer=BYTES, stray=0.0):
    text = prose([folder / "books"], tokenizer, held_out)
    return NeedleTask(kind, folder, text, tokenizer, held_out, stray)


def read(pieces):
    return BYTES.decode(np.concatenate([piece.tokens for piece in pieces]))


def draw(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("kind", "what", "value"),
    [("single-1", "number", r"\d{7}"), ("single-3", "uuid", r"[0-9a-f-]{36}")],
)
def test_a_single_needle_in_rulers_words(folder, kind, what, value):
    sample = make(folder, kind).sample(3000, draw())
    (expected,) = sample.expected
    text = read(sample.pieces())
    assert re.fullmatch(value, expected)
    key = re.search(r"for (quick\d+-noun\d+) is: " + expected, text)[1]
    head = (
        f"A special magic {what} is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {what} afterwards.\n"
    )
    needle = f"One of the special magic {what}s for {key} is: {expected}."
    question = (
        f"\nWhat is the special magic {what} for {key} mentioned in the provided text? The "
        f"special magic {what} for {key} mentioned in the provided text is"
    )
    assert text.startswith(head)
    assert text.endswith(question)
    context = text[len(head) : -len(question)]
    if kind == "single-1":
        first, *lines = context.split("\n")
        assert lines.count(needle) == 1
        assert set(lines) == {NOISE, needle}
        assert NOISE.endswith(first)
    else:
        rest = context.replace(needle + " ", "")
        assert len(rest) == len(context) - len(needle) - 1
        assert re.sub(r"^.*?\. (?=S)", "", rest) in "".join(SENTENCES * 2).replace(
            "number", "count"
        )
    assert BYTES.decode(sample.answer) == f" {expected}."


def test_several_needles_in_rulers_words(folder):
    sample = make(folder, "multiquery").sample(3000, draw(1))
    text = read(sample.pieces())
    stated = dict(re.findall(r"magic numbers for (\S+) is: (\d{7})\.", text))
    keys = re.search(r"are all the special magic numbers for (.*) mentioned", text)[1]
    keys = keys.split(" mentioned")[0].replace("and ", "").split(", ")
    assert len(keys) == len(stated) == 4
    assert [stated[key] for key in keys] == list(sample.expected)
    a, b, c, d = sample.expected
    assert BYTES.decode(sample.answer) == f" {a}, {b}, {c}, and {d}."
    assert "Some special magic numbers are hidden" in text

    sample = make(folder, "multivalue").sample(3000, draw(1))
    text = read(sample.pieces())
    stated = re.findall(r"magic numbers for (\S+) is: (\d{7})\.", text)
    assert len({key for key, _ in stated}) == 1
    assert tuple(value for _, value in stated) == sample.expected  # as the text has them


@pytest.mark.parametrize("kind", ["multikey-1", "multikey-2", "multikey-3"])
def test_other_keys_stand_around_the_one_asked_for(folder, kind):
    task = make(folder, kind)
    for seed in range(3):
        sample = task.sample(4000, draw(seed))
        text = read(sample.pieces())
        stated = re.findall(r"special magic \w+ for (\S+) is: (\S+)\.", text)
        asked = re.findall(r"the special magic \w+ for (\S+) mentioned", text)[0]
        assert [value for key, value in stated if key == asked] == list(sample.expected)
        assert len(stated) == 4 if kind == "multikey-1" else len(stated) > 20
        if kind == "multikey-3":
            assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]{21}", asked)


def test_variables_resolve_to_the_value_asked_for(folder):
    sample = make(folder, "variables").sample(2500, draw())
    text = read(sample.pieces())
    values = {}
    for name, value in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", text, re.MULTILINE):
        values[name] = values.get(value, value)
    asked = re.search(r"5 variables are assigned the value (\d{5}), they are:$", text)[1]
    assert [name for name, value in values.items() if value == asked] == list(sample.expected)
    assert len(sample.expected) == 5
    assert text.startswith("Memorize and track the chain(s) of variable assignment hidden in the")


def test_every_length_is_kept_and_every_depth(folder):
    for kind in KINDS:
        task = make(folder, kind)
        for length in (1499, 1500, 1553):
            sample = task.sample(length, draw(length))
            sizes = [len(block) for block in blocks(sample.pieces(), 512)]
            assert sum(sizes) == sample.length == length
            assert set(sizes[:-1]) == {512}
    for kind in ("single-1", "single-2", "multikey-2"):
        task = make(folder, kind)
        for depth in (0.0, 0.25, 0.5, 1.0):
            text = read(task.sample(4000, draw(), depth).pieces())
            head, tail = text.index("\n") + 1, text.rindex("\nWhat is")
            at = re.search("One of the .{,50} is: " + task.sample(4000, draw()).expected[0], text)
            room = tail - head - len(at[0])
            assert (at.start() - head) / room == pytest.approx(depth, abs=130 / room)


def test_a_sample_is_a_function_of_its_seed_and_read_as_often_as_wanted(folder):
    for kind in ("single-2", "multikey-2"):
        task = make(folder, kind)
        sample, again, other = (task.sample(2000, draw(seed)) for seed in (3, 3, 4))
        assert read(sample.pieces()) == read(sample.pieces()) == read(again.pieces())
        assert read(sample.pieces()) != read(other.pieces())


def test_a_million_tokens_take_no_room(folder, without_shape_checks):
    sample = make(folder, "single-2").sample(1_000_000, draw(), 1.0)
    tracemalloc.start()
    first = list(islice(blocks(sample.pieces(), 2048), 3))
    total = sum(len(block) for block in blocks(sample.pieces(), 2048))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(first) == 3
    assert total == 1_000_000
    assert peak < 200_000


def test_tests_share_nothing_with_training(folder):
    found = {False: set(), True: set()}
    for held_out in found:
        for kind in KINDS:
            task = make(folder, kind, held_out)
            for seed in range(6):
                text = read(task.sample(1500, draw(seed)).pieces())
                named = re.findall(r"for (\S+) is: (\S+)\.", text)
                named += re.findall(r"VAR (\w+) = (\d+)?", text)
                if kind != "multikey-3":
                    named = [(*key.split("-"), value) for key, value in named]
                found[held_out] |= {part for parts in named for part in parts if part}
                if KINDS[kind].haystack == "prose":
                    assert ("count" in text) == held_out
    assert not found[False] & found[True]
    assert min(map(len, found.values())) > 150
    assert {is_held_out(part) for part in found[True]} == {True}


def test_only_a_folder_with_the_projects_books_is_split(folder):
    books = folder / "books"
    assert prose_files([books], True) == [books / "1184-0.txt"]
    assert prose_files([books], False) == [books / "a.txt"]
    for held_out in (False, True):
        assert len(prose_files([folder], held_out)) == (1 if held_out else 3)
        assert prose_files([books / "a.txt"], held_out) == [books / "a.txt"]


def test_own_essays_are_taken_whole(tmp_path):
    (tmp_path / "essay.txt").write_bytes("Na\u00efve one.  And\n\ntwo.".encode("latin-1"))
    for held_out in (False, True):
        ring = prose([tmp_path], BYTES, held_out)
        assert BYTES.decode(ring.tokens) == "Na\u00efve one. And two. "
        assert ring.starts.tolist() == [0, 12]


def test_sentences_are_cut_where_they_end():
    text = 'He said: "Stop!" Then Mr. Smith left.  It was 3.5 miles.\nWas it? Yes'
    sentences = split_sentences(text)
    assert "".join(sentences) == " ".join(text.split()) + " "
    assert [s.strip() for s in sentences] == [
        'He said: "Stop!"',
        "Then Mr. Smith left.",
        "It was 3.5 miles.",
        "Was it?",
        "Yes",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "nothing here begins with a capital, nor does what follows. " * 400,
        "\u5915\u65b9\u306b\u306a\u308b\u3068\u98a8\u304c\u5439\u304f\u3002" * 1000,
        "for i in range(10): x[i] += y[i] # no end in sight " * 400,
        "x" * 30_000,
    ],
)
def test_prose_without_ends_has_gaps_too(folder, tmp_path, text):
    """Else a needle for the middle is put at the end, and the score is that of the end."""
    sentences = split_sentences(text)
    assert "".join(sentences) == " ".join(text.split()) + " "
    assert max(map(len, sentences)) <= 2000
    (tmp_path / "own.txt").write_text(text)
    task = NeedleTask(
        "single-2", folder, prose([tmp_path / "own.txt"], BYTES, True), BYTES, True, 0.0
    )
    for depth in (0.25, 0.5, 0.75):
        said = read(task.sample(20_000, draw(), depth).pieces())
        place = said.index("One of the special magic") / len(said)
        assert abs(place - depth) < 0.06, (place, depth)


def test_names_in_capitals_are_text_too_and_empty_files_are_none(tmp_path):
    (tmp_path / "ESSAY.TXT").write_text("One. Two.")
    (tmp_path / "empty.txt").touch()
    assert prose_files([tmp_path], held_out=True) == [tmp_path / "ESSAY.TXT"]


def test_other_tokenizers_count_their_own_tokens(folder, tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train(SENTENCES + [NOISE] * 9, 400, tmp_path / "tokenizer.json")
    for kind in ("single-1", "single-2", "multikey-2"):
        sample = make(folder, kind, tokenizer=tokenizer).sample(1000, draw())
        tokens = np.concatenate([piece.tokens for piece in sample.pieces()])
        assert len(tokens) == 1000
        assert f"is: {sample.expected[0]}." in tokenizer.decode(tokens)
        assert tokenizer.decode(sample.answer) == f" {sample.expected[0]}."


def batches(folder, kinds=("single-1",), lengths=(640,), dense=0.5, held_out=False, seed=0):
    return NeedleBatches(
        [make(folder, kind, held_out) for kind in kinds],
        lengths=lengths,
        tokens_per_batch=2560,
        questions=(2, 4),
        dense=dense,
        text_weight=0.25,
        seed=seed,
    )


@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_a_row_teaches_what_the_text_says(folder, dense):
    for kind in ("single-1", "single-3", "multikey-2"):
        source = batches(folder, (kind,), (960,), dense)
        batch = source.batch(0)
        assert batch.tokens.shape == (2, 960)
        for tokens, labels, answers in zip(batch.tokens, batch.labels, batch.answers, strict=True):
            assert torch.equal(tokens[1:], labels[:-1])
            text = BYTES.decode([int(tokens[0]), *labels.tolist()])
            stated = dict(re.findall(r"for (\S+) is: ([0-9a-f-]+)\.", text))
            asked = re.findall(r"for (\S+) mentioned in the provided text is ([0-9a-f-]+)\.", text)
            assert (len(asked) > 1) == bool(dense)
            for key, value in asked:
                assert stated[key] == value
                assert text.index(f"{key} is: {value}") < text.index(f"{key} mentioned")
            given = BYTES.decode(labels[answers].tolist())
            assert given == "".join(f" {value}." for _, value in asked)


def test_weights_share_one_among_answers_and_skip_what_no_one_can_know(folder):
    batch = batches(folder, ("single-1", "single-2", "variables"), (960,)).batch(3)
    assert batch.weights[batch.answers].sum().item() == pytest.approx(1.0, rel=1e-5)
    assert batch.weights[~batch.answers].sum().item() == pytest.approx(0.25, rel=1e-5)
    seen = 0
    for tokens, labels, weights in zip(batch.tokens, batch.labels, batch.weights, strict=True):
        text = BYTES.decode([int(tokens[0]), *labels.tolist()])
        zero = "".join(chr(b) for b in labels[weights == 0].tolist())
        stated = re.findall(r"is: (\d{7})\.|VAR [A-Z]{5} = (\d{5})", text)
        assert zero.split() == [a or b for a, b in stated]
        seen += len(stated)
    assert seen


def test_batches_are_a_function_of_seed_and_step(folder):
    one, same, other = (batches(folder, lengths=(640, 1280), seed=s) for s in (1, 1, 2))
    lengths = set()
    for step in range(6):
        batch = one.batch(step)
        lengths.add(batch.tokens.shape)
        assert torch.equal(batch.tokens, same.batch(step).tokens)
        assert not torch.equal(batch.tokens, other.batch(step).tokens)
        assert not torch.equal(batch.tokens, one.batch(step + 1).tokens)
    assert lengths == {(4, 640), (2, 1280)}


def test_a_row_too_short_for_the_tests_form_is_dense(folder):
    batch = batches(folder, lengths=(240,), dense=0.0).batch(0)
    text = BYTES.decode(batch.tokens[0].tolist())
    assert "Make sure to memorize it" not in text
    assert batch.answers.sum(1).ge(9).all()


def test_answers_in_the_tests_form_begin_anywhere_in_a_segment(folder):
    source = batches(folder, ("single-2", "multikey-2"), (960,), dense=0.0)
    answers = torch.cat([source.batch(step).answers for step in range(60)])
    begins = answers.int().argmax(1) % 64
    assert len(begins.unique()) > 32
    assert answers.sum(1).ge(9).all()  # none of them is cut off


@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_stray_numbers_stand_in_prose_and_are_not_learned(folder, dense):
    bare, stray = (
        NeedleBatches(
            [make(folder, kind, False, stray=count) for kind in ("single-1", "single-2")],
            lengths=(1920,),
            tokens_per_batch=1920,
            questions=(1, 2),
            dense=dense,
            text_weight=0.25,
            seed=4,
        )
        for count in (0.0, 10.0)
    )
    found = []
    for step in range(20):
        without, batch = bare.batch(step), stray.batch(step)
        assert batch.tokens.shape == without.tokens.shape
        text = BYTES.decode(batch.tokens[0].tolist())
        noise = "The grass is green" in text
        assert noise == torch.equal(batch.tokens, without.tokens)
        labels, weights = batch.labels[0], batch.weights[0]
        words = "".join(chr(b) if w == 0 else "|" for b, w in zip(labels, weights, strict=True))
        unknown = [word.strip() for word in words.split("|") if word]
        values = [word for word in unknown if re.fullmatch(r"\d{7}", word)]
        asked = "".join(chr(b) for b in labels[batch.answers[0]])
        assert asked
        assert set(asked.strip(" .").split(". ")) <= set(values)
        if not noise:
            found.append(len(unknown) - len(values))
    assert 14 < np.mean(found) < 24  # 19.2 are expected


def test_mistakes_are_named(folder, tmp_path):
    task = make(folder, "single-1")
    with pytest.raises(ValueError, match="a prompt of 300 tokens is too short for what it must"):
        task.sample(300, draw())
    with pytest.raises(ValueError, match=r"depth 1.5: expected a number in \[0, 1\]"):
        task.sample(3000, draw(), 1.5)
    with pytest.raises(ValueError, match="and one needle to find"):
        make(folder, "multivalue").sample(3000, draw(), 0.5)
    with pytest.raises(ValueError, match="unknown needle kind 'single-9'; known: single-1"):
        make(folder, "single-9")
    with pytest.raises(ValueError, match="'single-2' is hidden in prose"):
        NeedleTask("single-2", folder, None, BYTES, True)
    with pytest.raises(ValueError, match="a row of 128 tokens is too short for a needle and a q"):
        batches(folder, lengths=(128,))
    for name in ("nounlist.txt", "adjectivelist.txt"):
        (tmp_path / name).write_text("\n".join(w for w in "abcdef" if not is_held_out(w)))
    with pytest.raises(ValueError, match=r"nounlist\.txt: none of its words is for tests"):
        NeedleTask("single-1", tmp_path, None, BYTES, True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text files in it"):
        prose([tmp_path / "empty"], BYTES, True)


def test_the_real_words_and_books():
    root = Path(os.environ.get("TITANS_DATA_DIR", Path(__file__).parents[2] / "../shared/data"))
    if not (root / "needle" / "nounlist.txt").is_file() or not (root / "books").is_dir():
        pytest.skip("needs the folders needle and books of TITANS_DATA_DIR")
    task = NeedleTask("single-2", root / "needle", prose_of(root), BYTES, True)
    assert len(task.adjectives) * len(task.nouns) > 100_000
    text = read(task.sample(20_000, draw()).pieces())
    assert "Gutenberg" not in text
    assert not re.search(r"\s\s", text.replace(" \n", "\n"))


def prose_of(root):
    return prose([root / "books" / "chesterton-thursday.txt.gz"], BYTES, True)
