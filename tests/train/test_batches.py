"""The data of a run, and evaluations on what is held out."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from titans.data.documents import Document, read_documents
from titans.data.facts import STATEMENT_SIZE
from titans.data.haystack import Ring
from titans.data.shards import prepare
from titans.data.text import IGNORED
from titans.data.tokenizers import ByteTokenizer
from titans.train import evaluate as evaluation
from titans.train.batches import EVALUATION_SEED, TextBatches, open_data
from titans.train.config import BabiRows, NeedleRows
from titans.train.evaluate import evaluate, recall
from titans.train.loop import new_training

CPU = torch.device("cpu")
TOO_SHORT = 2 * STATEMENT_SIZE - 2


def test_segments_follow_each_other_in_a_window(tiny):
    source = open_data(tiny()).at(0).train
    assert isinstance(source, TextBatches)
    for number in (0, 1):
        tokens, labels = source.windows.batch(number)
        parts = [source.batch(3 * number + segment) for segment in range(3)]
        assert torch.equal(torch.cat([p.tokens for p in parts], 1), tokens)
        assert torch.equal(torch.cat([p.labels for p in parts], 1), labels)
        assert tokens.shape == (5, 72)


def test_weights_are_the_mean_over_what_counts(tiny, tmp_path):
    (tmp_path / "short.txt").write_text("a short text of 30 characters.")
    source = open_data(tiny(data={"paths": (str(tmp_path / "short.txt"),)})).at(0).train
    for step, counted in enumerate((24, 6, 0)):
        batch = source.batch(step)
        assert torch.equal(batch.weights > 0, batch.labels != IGNORED)
        assert int((batch.weights[0] > 0).sum()) == counted
        assert batch.weights.sum().item() == pytest.approx(1.0 if counted else 0.0)


def test_a_curriculum_changes_lengths_and_facts(tiny):
    stages = {
        "facts_max": 1,
        "stages": (10, 20),
        "stage_lengths": ((128,), (256,)),
        "stage_facts": ((2, 2), (4, 4)),
    }
    data = open_data(tiny("facts", data=stages, tokens_per_batch=512))
    for step, length, facts in [(0, 64, 1), (9, 64, 1), (10, 128, 2), (19, 128, 2), (999, 256, 4)]:
        split = data.at(step)
        for batches in (split.train, split.valid):
            batch = batches.batch(step)
            rows = 512 // length
            assert batch.tokens.shape == (rows, length)
            assert batch.answers.sum().item() == 4 * facts * rows
        assert not torch.equal(split.train.batch(step).tokens, split.valid.batch(step).tokens)


def test_evaluations_have_batches_that_no_step_trains_on(tiny, tmp_path):
    (tmp_path / "text.txt").write_text("one and the same text for both, again and again. " * 20)
    data = {"paths": (str(tmp_path / "text.txt"),), "valid_paths": ()}
    split = open_data(tiny("facts", data=data, tokens_per_batch=64)).at(0)
    seen = {bytes(split.train.batch(step).tokens.numpy()) for step in range(600)}
    assert not any(bytes(split.valid.batch(n).tokens.numpy()) in seen for n in range(8))


def test_a_prepared_folder_brings_its_split_and_its_tokenizer(tiny, tmp_path):
    texts = [Document(str(i), f"text number {i} " * 20) for i in range(12)]
    prepare(texts, ByteTokenizer(), tmp_path / "shards", valid_fraction=0.4)
    paths = {"paths": (str(tmp_path / "shards"),), "valid_paths": ()}
    data = open_data(tiny(data=paths, eval_every=1))
    assert data.in_bytes
    tokens = data.at(0).valid.batch(0).tokens
    assert bytes(tokens[0].clamp(max=255).tolist()).count(b"t") > 2
    only = {"paths": (str(tmp_path / "shards" / "train"),), "valid_paths": ()}
    assert open_data(tiny(data=only)).at(0).valid is None
    held_out = {**only, "valid_paths": (str(tmp_path / "shards" / "valid"),)}
    again = open_data(tiny(data=held_out)).at(0)
    assert torch.equal(again.valid.batch(0).tokens, tokens)


def test_the_python_sources_are_there_without_paths(tiny):
    for task in ("text", "facts"):
        split = open_data(tiny(task, data={"paths": (), "valid_paths": ()}, eval_every=1)).at(0)
        assert not torch.equal(split.train.batch(0).tokens, split.valid.batch(0).tokens)


def test_the_shortest_row_holds_its_facts(tiny):
    config = tiny("facts", data={"lengths": (TOO_SHORT + 1,)}, tokens_per_batch=200)
    assert open_data(config).at(0).train.batch(0).answers.sum(1).eq(4).all()


@pytest.fixture
def questions(tmp_path):
    """questions(task) -> `data` of a run that asks about needles or bAbI's stories."""
    for name in ("nounlist.txt", "adjectivelist.txt"):
        (tmp_path / name).write_text("".join(f"{name[0]}{i}\n" for i in range(300)))
    places = ("kitchen", "garden", "office")
    story = "1 Mary went to the {}.\n2 Day {} came.\n3 Where is Mary?\t{}\t1\n"
    for split, first in (("train", 0), ("test", 200)):
        stories = [story.format(p, day, p) for day in range(first, first + 20) for p in places]
        (tmp_path / f"qa1_places_{split}.txt").write_text("".join(stories))
    needle = NeedleRows(words=str(tmp_path), kinds=("single-1", "single-2"))
    babi = BabiRows(folder=str(tmp_path))
    sections = {
        "facts": {},
        "needle": {"lengths": (512,), "needle": needle},
        "babi": {"lengths": (256,), "babi": babi},
    }
    return sections.__getitem__


@pytest.mark.parametrize("task", ["needle", "babi"])
def test_questions_in_prose(tiny, questions, corpus, task):
    held_out = {"valid_paths": (str(corpus / "held_out.txt"),)}
    stages = {"stages": (10,), "stage_lengths": ((768,),), "stage_facts": ((1, 1),)}
    data = {**questions(task), **held_out, **stages}
    opened = open_data(tiny(task, data=data, tokens_per_batch=1536))
    assert opened.in_bytes
    length = {"needle": 512, "babi": 256}[task]
    train, valid = opened.at(0).train, opened.at(0).valid
    assert train.batch(0).tokens.shape == (1536 // length, length)
    assert opened.at(10).train.batch(0).tokens.shape == (2, 768)
    texts = {}
    for name, source in (("train", train), ("valid", valid)):
        batches = [source.batch(step) for step in range(12)]
        texts[name] = "|".join(bytes(row.tolist()).decode() for b in batches for row in b.tokens)
        assert all(batch.answers.sum(1).gt(0).all() for batch in batches)
    if task == "needle":
        found = {name: set(re.findall(r"for (\S+) is: ", text)) for name, text in texts.items()}
    else:
        found = {name: set(re.findall(r"Day \d+", text)) for name, text in texts.items()}
        assert not any(int(day[4:]) >= 200 for days in found.values() for day in days)
    assert all(found.values())
    assert not found["train"] & found["valid"]
    again = open_data(tiny(task, data=data, tokens_per_batch=1536)).at(0).train
    assert torch.equal(again.batch(5).tokens, train.batch(5).tokens)


@pytest.mark.parametrize("task", ["needle", "babi"])
def test_garbled_prose_has_other_tokens_where_nothing_is_asked(tiny, questions, task, tmp_path):
    (tmp_path / "rain.txt").write_text("It rained all day. " * 50)
    paths = (str(tmp_path / "rain.txt"),)
    held_out = {"paths": paths, "valid_paths": paths}
    texts = {}
    for share in (0.0, 0.2):
        data = {**questions(task), **held_out, "garble": share}
        opened = open_data(tiny(task, data=data, tokens_per_batch=1536)).at(0)
        for split, source in (("train", opened.train), ("valid", opened.valid)):
            rows = torch.cat([source.batch(step).tokens for step in range(12)])
            texts[split, share] = "|".join(bytes(row.tolist()).decode() for row in rows)
        asked = r"Answer: \w+" if task == "babi" else r"provided text is \d"
        assert re.findall(asked, texts["train", share])
    assert texts["valid", 0.0] == texts["valid", 0.2]
    rained = [texts["train", share].count("rained all day") for share in (0.0, 0.2)]
    assert 0 < rained[1] < 0.2 * rained[0]  # 0.84 ** 14 are left whole


def test_garbling_puts_every_token_in_as_often() -> None:
    ring = Ring(np.array([7] * 9998 + [3, 250]), np.array([0, 5000]))
    found = ring.garbled(0.3, seed=1)
    assert np.array_equal(found.starts, ring.starts)
    for token in (3, 250):
        assert 900 < (found.tokens == token).sum() < 1100
    assert not np.array_equal(ring.garbled(0.3, seed=2).tokens, found.tokens)
    assert np.array_equal(ring.garbled(0.3, seed=1).tokens, found.tokens)
    assert (ring.tokens[:9998] == 7).all()


def test_needles_in_noise_need_no_prose(tiny, questions):
    data = questions("needle")
    noise = NeedleRows(words=data["needle"].words, kinds=("single-1", "variables"))
    nothing = {"paths": (), "valid_paths": ()}
    config = tiny("needle", data={**data, **nothing, "needle": noise}, tokens_per_batch=512)
    assert open_data(config).at(0).train.batch(0).answers.any()
    with pytest.raises(ValueError, match=r"data.paths is empty: the task needle hides sentences"):
        open_data(tiny("needle", data={**data, **nothing}, tokens_per_batch=512))


def test_a_prepared_folder_has_its_own_held_out_text(tiny, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"Day {number}: rain. " * 20)
    prepare(read_documents(text), ByteTokenizer(), tmp_path / "prep", valid_fraction=0.3)
    prepared = (str(tmp_path / "prep"),)
    data = open_data(tiny(eval_every=1, data={"paths": prepared, "valid_paths": prepared}))
    alone = open_data(tiny(eval_every=1, data={"paths": prepared, "valid_paths": ()}))
    for got, wanted in zip(data.at(0)[1:], alone.at(0)[1:], strict=True):
        assert torch.equal(got.batch(0).tokens, wanted.batch(0).tokens)


def test_too_short_rows_are_named(tiny, questions):
    for task, message in (("needle", "for a needle and a question"), ("babi", "for a story and")):
        data = {**questions(task), "lengths": (64,)}
        with pytest.raises(ValueError, match=f"a row of 64 tokens is too short {message}"):
            open_data(tiny(task, data=data))


def test_a_loss_beyond_single_precision_has_a_perplexity(tiny, monkeypatch):
    monkeypatch.setattr(
        evaluation,
        "read_segment",
        lambda model, batch, *rest: SimpleNamespace(
            nll=torch.where(batch.labels == IGNORED, 0.0, 100.0), state=None
        ),
    )
    config = tiny()
    data, model = open_data(config), new_training(config, torch.device("cpu")).model
    found = evaluate(model, data.at(0).valid, config, in_bytes=False)
    assert found["valid_perplexity"] == pytest.approx(math.exp(100.0))


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("text", {"data": {"valid_paths": ()}, "eval_every": 1}, "valid_paths is empty: name held"),
        (
            "text",
            {"data": {"length": 9000}, "tokens_per_batch": 9000},
            "segments is 3, and no document reaches the second",
        ),
        ("text", {"model": {"vocab_size": 200}}, r"model.vocab_size \(200\) is too small .* 257"),
        ("facts", {"model": {"vocab_size": 200}}, "too small for the data's 256 tokens"),
        ("facts", {"data": {"lengths": (TOO_SHORT,)}}, f"a row of {TOO_SHORT} tokens is too short"),
        ("text", {"seed": EVALUATION_SEED}, "train.seed must be below"),
        ("text", {"data": {"paths": ("$NO_SUCH_NAME/x",)}}, "variable NO_SUCH_NAME is not set"),
        ("text", {"data": {"tokenizer": "no.json"}}, "no.json"),
    ],
)
def test_mistakes_are_named(tiny, task, changes, message):
    with pytest.raises(ValueError, match=message):
        open_data(tiny(task, **changes))


def test_prepared_folders_are_taken_alone(tiny, tmp_path):
    prepare([Document("a", "some text to prepare")], ByteTokenizer(), tmp_path / "shards")
    (tmp_path / "more.txt").write_text("and a text beside it")
    both = (str(tmp_path / "more.txt"), str(tmp_path / "shards"))
    for data in ({"paths": both}, {"valid_paths": both}):
        with pytest.raises(ValueError, match="shards: is a prepared folder, which is taken alone"):
            open_data(tiny(data=data))


def test_a_foreign_tokenizer_is_refused(tiny, tmp_path):
    from titans.data.tokenizers import BPETokenizer

    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    BPETokenizer.train(["many words, many tokens"] * 9, 300, path)
    texts = [Document("a", "some text to prepare"), Document("b", "and some more of it")]
    prepare(texts, ByteTokenizer(), tmp_path / "shards")
    shards = {"paths": (str(tmp_path / "shards"),), "tokenizer": str(path)}
    with pytest.raises(ValueError, match=r"was not prepared with data\.tokenizer"):
        open_data(tiny(data=shards))
    mixed = {"valid_paths": (str(tmp_path / "shards"),), "tokenizer": str(path)}
    with pytest.raises(ValueError, match="was prepared with the tokenizer bytes, the training te"):
        open_data(tiny(data=mixed, model={"vocab_size": 400}))
    # Another one of the same size is another one.
    other = tmp_path / "other.json"
    BPETokenizer.train(["tokens of a few other words"] * 9, 300, other)
    prepare(texts, BPETokenizer.from_file(path), tmp_path / "pieces")
    pieces = {"paths": (str(tmp_path / "pieces"),), "tokenizer": str(other)}
    with pytest.raises(ValueError, match=r"was not prepared with data\.tokenizer"):
        open_data(tiny(data=pieces, model={"vocab_size": 400}))
    python = {"paths": (), "tokenizer": str(path)}
    with pytest.raises(ValueError, match="the Python sources are read as bytes alone"):
        open_data(tiny(data=python))


def test_a_model_without_an_opinion_has_the_entropy_of_its_vocabulary(tiny):
    config = tiny()
    model = new_training(config, CPU).model
    torch.nn.init.zeros_(model.embedding.weight)
    valid = open_data(config).at(0).valid
    metrics = evaluate(model, valid, config, in_bytes=True)
    assert metrics["valid_loss"] == pytest.approx(math.log(257), rel=1e-6)
    assert metrics["valid_bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)
    metrics = evaluate(model, valid, config, in_bytes=False)
    assert metrics["valid_perplexity"] == pytest.approx(257, rel=1e-5)


def test_an_evaluation_reads_whole_windows(tiny):
    config = tiny(variant="mac", eval_batches=1)
    model = new_training(config, CPU).model
    valid = open_data(config).at(0).valid
    tokens, labels = valid.windows.batch(0)
    with torch.no_grad():
        logits = model(tokens)[0]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    metrics = evaluate(model, valid, config, in_bytes=True)
    assert metrics["valid_loss"] == pytest.approx(loss, rel=1e-5)


def test_recall_counts_tokens_and_whole_answers():
    # Answers of two, three and one token, the last two side by side in different rows.
    answers = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]]).bool()
    hits = torch.tensor([[0, 1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0, 0]]).bool()
    assert recall(hits, answers).tolist() == [[5, 6], [2, 3]]


@pytest.mark.parametrize("task", ["facts", "needle", "babi"])
def test_a_model_that_knows_recalls_all(tiny, questions, monkeypatch, task):
    config = tiny(task, data=questions(task), tokens_per_batch=1024)
    model = new_training(config, CPU).model
    valid = open_data(config).at(0).valid
    assert evaluate(model, valid, config, in_bytes=True)["valid_answer_recall"] < 0.1
    original = evaluation.read_segment

    def oracle(model, batch, memory, precision):
        segment = original(model, batch, memory, precision)
        return segment._replace(likeliest=batch.labels)

    monkeypatch.setattr(evaluation, "read_segment", oracle)
    metrics = evaluate(model, valid, config, in_bytes=True)
    assert metrics["valid_token_recall"] == metrics["valid_answer_recall"] == 1.0
