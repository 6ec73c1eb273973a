"""bAbI's facts in books: what is read of its files, what a sample holds, what rows teach."""

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from titans.data import babilong
from titans.data.babilong import BabiBatches, BabiTask, babi_file, read_questions
from titans.data.haystack import Ring, prose
from titans.data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
TEST = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary got the milk there.
5 What is Mary carrying? \tmilk,apple\t4
1 Daniel went to the office.
2 Where is Daniel?\toffice\t1
"""
TRAIN = """1 Daniel went to the office.
2 Where is Daniel?\toffice\t1
3 Daniel went to the garden.
4 Where is Daniel?\tgarden\t3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("babi")
    (folder / "qa1_a-task_test.txt").write_text(TEST)
    with gzip.open(folder / "10k_qa1_a-task_train.txt.gz", "wt") as stream:
        stream.write(TRAIN)
    (folder / "qa1_a-task_train.txt").write_text(TEST)
    (folder / "qa10_another_test.txt").write_text(TEST.replace("Mary", "Fred"))
    (folder / "book.md").write_text("".join(f"It rained on day {i} of it. " for i in range(999)))
    return folder


@pytest.fixture(scope="module")
def task(folder):
    text = prose([folder / "book.md"], BYTES, True)
    return BabiTask(babilong.test_questions(folder, 1), text, BYTES)


def read(pieces):
    return BYTES.decode(np.concatenate([piece.tokens for piece in pieces]))


def draw(seed=0):
    return np.random.default_rng(seed)


def test_every_question_comes_with_the_story_before_it(folder):
    first, second, third = babilong.test_questions(folder, 1)
    facts = ("Mary moved to the bathroom.", "John went to the hallway.")
    assert first.facts == facts
    assert (first.text, first.answer) == ("Where is Mary?", "bathroom")
    assert second.facts == (*facts, "Mary got the milk there.")
    assert second.answer == "milk,apple"
    assert [line.answer for line in second.before] == [None, None, "bathroom", None]
    assert third.facts == ("Daniel went to the office.",)


def test_training_leaves_out_what_tests_ask(folder):
    (question,) = babilong.training_questions(folder, 1)
    assert question.answer == "garden"  # of the file of 10,000; its first question is a test's


def test_training_rows_do_not_answer_what_tests_ask(tmp_path):
    """Not even as an earlier question of the story, which dense rows print with its answer."""
    first = "1 Ann is in.\n2 Where is Ann?\tin\t1\n"
    (tmp_path / "qa1_a_test.txt").write_text(first)
    (tmp_path / "qa1_a_train.txt").write_text(
        first + "3 Bob is out.\n4 Where is Bob?\tout\t3\n5 Where is Ann?\tin\t1\n"
    )
    bob, ann = babilong.training_questions(tmp_path, 1)
    assert [line.text for line in bob.before] == ["Ann is in.", "Bob is out."]
    assert [line.answer for line in ann.before] == [None, None, "out"]
    assert bob.facts == ("Ann is in.", "Bob is out.")


def test_facts_in_another_order_make_no_new_question(tmp_path):
    story = "1 The hall is east of the bath.\n2 The bed is west of the bath.\n"
    swapped = "1 The bed is west of the bath.\n2 The hall is east of the bath.\n"
    east, west = (
        "3 What is {} of the bath?\t{}\t1\n".format(*p) for p in (("east", "hall"), ("west", "bed"))
    )
    (tmp_path / "qa4_a_test.txt").write_text(story + east)
    (tmp_path / "qa4_a_train.txt").write_text(swapped + east + swapped + west)
    (left,) = babilong.training_questions(tmp_path, 4)
    assert left.answer == "bed"


def test_facts_and_questions_said_the_other_way_round_make_no_new_question(tmp_path):
    tested = "1 The hall is east of the bath.\n2 What is {}?\thall\t1\n"
    others = "1 The bath is west of the hall.\n2 What is {}?\t{}\t1\n"
    (tmp_path / "qa4_a_test.txt").write_text(tested.format("east of the bath"))
    (tmp_path / "qa4_a_train.txt").write_text(
        tested.format("the bath west of")
        + others.format("east of the bath", "hall")
        + others.format("the bath west of", "hall")
        + others.format("west of the hall", "bath")
        + others.format("the hall east of", "bath")
    )
    left = babilong.training_questions(tmp_path, 4)
    assert [q.answer for q in left] == ["bath", "bath"]
    assert len({q.identity for q in left}) == 1


def test_a_training_is_watched_by_questions_it_has_not_seen():
    def ask(number, times):
        line = babilong.Line(f"P{number} is in.")
        return [babilong.Question((line,), f"Where is P{number}?", "in")] * times

    questions = [*ask(0, 50), *(q for n in range(1, 40) for q in ask(n, 2)), *ask(0, 50)]
    known, asked = babilong.held_back(questions)
    assert len(known) + len(asked) == len(questions)
    assert {q.text for q in asked} == {"Where is P38?", "Where is P39?"}
    assert not {q.identity for q in known} & {q.identity for q in asked}
    with pytest.raises(ValueError, match="fewer than two different training questions"):
        babilong.held_back(ask(0, 50))


def test_task_1_is_not_task_10(folder):
    assert babi_file(folder, 1, "test").name == "qa1_a-task_test.txt"
    assert babi_file(folder, 10, "test").name == "qa10_another_test.txt"
    with pytest.raises(ValueError, match=r"no file qa2_\*_test.txt of bAbI in it"):
        babi_file(folder, 2, "test")


def test_mistakes_in_a_file_are_named(tmp_path):
    path = tmp_path / "qa1_x_test.txt"
    path.write_text("1 Mary moved.\nWhere is Mary?\n")
    with pytest.raises(ValueError, match=r"qa1_x_test.txt:2: expected `id text`"):
        read_questions(path)
    path.write_text("1 Mary moved.\n2 Where is Mary?\there\n\n1 John moved.\n\n")
    assert [question.answer for question in read_questions(path)] == ["here"]
    path.write_text("1 Mary moved.\n")
    with pytest.raises(ValueError, match="no question in it"):
        read_questions(path)


def test_facts_stand_in_order_between_sentences(task):
    spread = set()
    for seed in range(20):
        for question in task.questions:
            sample = task.sample(question, 2000, draw(seed))
            text = read(sample.pieces())
            assert len(text) == sample.length == 2000
            head, tail = "<context>\n", f"\n</context>\n\nQuestion: {question.text}\nAnswer:"
            assert text.startswith(head)
            assert text.endswith(tail)
            context = text[len(head) : -len(tail)]
            rained = re.compile(r"It rained on day \d+ of it\. ")
            # Whole sentences after the first, and the facts alone are left of them.
            left = re.sub(r"^[^A-Z]+", "", rained.sub("", context))
            assert left.strip() == " ".join(question.facts)
            spread.add(context.index(question.facts[0]) // 400)
    assert spread == {0, 1, 2, 3, 4}


def test_length_0_has_facts_alone(task):
    question = task.questions[0]
    sample = task.sample(question, 0, draw())
    facts = "Mary moved to the bathroom. John went to the hallway. "
    text = f"<context>\n{facts}\n</context>\n\nQuestion: Where is Mary?\nAnswer:"
    assert read(sample.pieces()) == text
    assert sample.length == len(text)
    assert BYTES.decode(sample.answer) == " bathroom."
    assert sample.expected == ("bathroom",)
    shorter = task.sample(question, len(text) - 5, draw())
    assert read(shorter.pieces()) == text


def test_a_dense_row_asks_every_question_at_its_place(task):
    row = task.dense_row(task.questions[1], 700, draw())
    text = read(row)
    assert len(text) == 700
    answers = [BYTES.decode(piece.tokens) for piece in row if piece.kind == 2]
    assert answers == [" bathroom.", " milk,apple."]
    order = [
        text.index(part)
        for part in (
            "<context>",
            "John went",
            "\n</context>\n\nQuestion: Where is Mary?\nAnswer: bathroom.\n\n<context>\n",
            "Mary got the milk",
            "\n</context>\n\nQuestion: What is Mary carrying?\nAnswer: milk,apple.",
        )
    ]
    assert order == sorted(order)


def batches(task, lengths=(300,), dense=0.5, seed=0):
    return BabiBatches(
        [task], lengths=lengths, tokens_per_batch=1200, dense=dense, text_weight=0.5, seed=seed
    )


def test_rows_of_the_tests_form_have_one_answer_and_a_little_more_text(task):
    begins = set()
    for step in range(30):
        batch = batches(task, dense=0.0).batch(step)
        assert batch.tokens.shape == (4, 300)
        for labels, answers in zip(batch.labels, batch.answers, strict=True):
            text = BYTES.decode(labels.tolist())
            given = BYTES.decode(labels[answers].tolist())
            before, _, after = text.partition("Answer:")
            assert before.count("Question:") == 1
            assert after.startswith(given)
            left = after.removeprefix(given)
            assert left[:12] == "\n\n<context>\n"[: len(left)]
            assert len(left) < 64
            begins.add(int(answers.int().argmax()) % 64)
        assert batch.weights[batch.answers].sum().item() == pytest.approx(1.0, rel=1e-5)
        assert batch.weights[~batch.answers].sum().item() == pytest.approx(0.5, rel=1e-5)
    assert len(begins) > 32  # of a segment of 64, as those of the tests


@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_strays_are_ends_of_facts_that_no_one_asks_for(folder, dense):
    text = prose([folder / "book.md"], BYTES, True)
    questions = babilong.test_questions(folder, 1)[:2]
    bare, stray = (BabiTask(questions, text, BYTES, stray=rate) for rate in (0.0, 10.0))
    found = []
    for step in range(20):
        batch = batches(stray, lengths=(1200,), dense=dense).batch(step)
        assert batch.tokens.shape == (1, 1200)
        labels, weights = batch.labels[0], batch.weights[0]
        unknown = "".join(chr(b) if w == 0 else "|" for b, w in zip(labels, weights, strict=True))
        strays = [text.strip() for text in unknown.split("|") if text]
        for text in strays:
            assert text.endswith(babilong.STRAY_ENDS)
            assert not text.startswith(("Mary", "John"))
        known = BYTES.decode(labels[weights > 0].tolist())
        assert known.count("Mary moved to the bathroom. ") == 1
        assert known.count("Question:") == (2 if dense and "carrying" in known else 1)
        found.append(len(strays))
        plain = batches(bare, lengths=(1200,), dense=dense).batch(step)
        assert (plain.weights > 0).all()
    assert 8 < np.mean(found) < 14  # 12 are expected, and some stand side by side


@pytest.mark.parametrize(
    ("fact", "ends"),
    [
        ("Mary moved to the bathroom.", ("moved to X P", "to X P", "X P", "P")),
        ("Bill gave the football to Fred.", ("to P", "P")),
        ("", ("",)),
    ],
)
def test_a_stray_is_the_end_of_a_fact_said_of_someone_else(fact, ends):
    """Who gave what to whom is a question of task 5, so that no stray says it."""

    def one_of(words):
        return "|".join(re.escape(word) for word in sorted(set(words), key=len, reverse=True))

    last = fact.rstrip(".").split()[-1:]
    article, place = one_of(babilong.STRAY_ARTICLES), one_of([*last, *babilong.STRAY_PLACES])
    forms = "|".join(
        end.replace("X", f"(?:{article})").replace("P", f"(?:{place})") for end in ends
    )
    subject, close = one_of(babilong.STRAY_SUBJECTS), one_of(babilong.STRAY_ENDS)
    pattern = re.compile(rf"(?:{subject}) ?(?:{forms})(?:{close})")
    generator = draw()
    said = {babilong.stray_fact(fact, generator) for _ in range(300)}
    assert len(said) > 50
    assert not [text for text in said if not pattern.fullmatch(text)]


@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_echoes_are_sentences_of_the_text_that_say_a_word_of_the_facts(folder, dense):
    long = f"The bathroom {'and the hall ' * 9}were wet. "
    said = ["He saw a hallway. ", "All went well. ", "No one moved. "]
    rain = [f"It rained on day {day}. " for day in range(999)]
    text = Ring.of([*rain, said[0], long, *said[1:], *rain], BYTES)
    questions = babilong.test_questions(folder, 1)[:2]
    told = BabiTask(questions, text, BYTES, echo=10.0)
    assert sum(map(len, told.spoken)) == 3  # the long one is left out, no one says `milk`
    found = dict.fromkeys(said, 0)
    for step in range(20):
        row = batches(told, lengths=(1200,), dense=dense).batch(step)
        assert (row.weights > 0).all()  # text like other text
        for sentence in said:
            found[sentence] += BYTES.decode(row.labels[0].tolist()).count(sentence)
    assert 180 < sum(found.values()) < 300  # 240 are expected
    assert min(found.values()) > 40  # every word as often


def test_no_echo_where_the_text_says_no_word_of_the_facts(folder):
    task = BabiTask(
        babilong.test_questions(folder, 1), Ring.of(["It rained. "], BYTES), BYTES, echo=10.0
    )
    assert read(task.row(task.questions[0], 900, draw())).count("It rained. ") > 50


def test_strays_of_a_question_without_a_story(folder):
    question = babilong.Question((), "Where is Mary?", "bathroom")
    task = BabiTask([question], prose([folder / "book.md"], BYTES, True), BYTES, stray=10.0)
    assert "Where is Mary?" in read(task.row(question, 900, draw()))


def test_batches_are_a_function_of_seed_and_step(task):
    one, same, other = (batches(task, seed=s) for s in (1, 1, 2))
    for step in range(3):
        assert torch.equal(one.batch(step).tokens, same.batch(step).tokens)
        assert not torch.equal(one.batch(step).tokens, other.batch(step).tokens)
    for length in (2, 90):
        with pytest.raises(ValueError, match=f"a row of {length} tokens is too short for a"):
            batches(task, (length,))


def test_rows_that_few_stories_fit_are_found(folder):
    """One draw in 20 fits, and a training must not end for want of more."""
    there = babilong.Line("Mary went to the garden.", None)
    many = tuple(babilong.Line("John went to the kitchen.", None) for _ in range(14))
    short = babilong.Question((there,), "Where is Mary?", "garden")
    long = babilong.Question((*many, there), "Where is Mary?", "garden")
    haystack = prose([folder / "book.md"], BYTES, True)
    few = batches(BabiTask([short] + [long] * 19, haystack, BYTES), (300,), dense=0.0)
    for step in range(3):
        assert few.batch(step).answers.any(1).all()
    with pytest.raises(ValueError, match=r"300 tokens is too short .*: 0 of 300 fit, expected 10"):
        batches(BabiTask([long], haystack, BYTES), (300,))


def test_the_real_files():
    root = Path(os.environ.get("TITANS_DATA_DIR", Path(__file__).parents[2] / "../shared/data"))
    if not (root / "babi").is_dir():
        pytest.skip("needs the folder babi of TITANS_DATA_DIR")
    tests = babilong.test_questions(root / "babi", 4)
    train = babilong.training_questions(root / "babi", 4)
    assert len(tests) == 1000
    assert 3000 < len(train) < 3500  # the file repeats most of the tests' questions
    assert not {q.identity for q in tests} & {q.identity for q in train}
    lists = {q.answer for q in babilong.test_questions(root / "babi", 8)}
    assert "milk,football" in lists
