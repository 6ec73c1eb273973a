"""Hidden facts: the generators keep their promises, and the score counts what it says."""

import numpy as np
import pytest
import torch

from titans import TitansLM, preset
from titans.data.carrier import endless, python_text
from titans.data.facts import (
    DIGITS,
    STATEMENT_SIZE,
    Fact,
    FactBatches,
    draw_facts,
    values_of,
)
from titans.evals.facts import ask, hide_facts, read

TEXT = [np.frombuffer(b"plain text without any digit in it. " * 400, dtype=np.uint8)]


def batches(**changes) -> FactBatches:
    settings = {
        "lengths": (128, 256),
        "tokens_per_batch": 1024,
        "facts": (2, 4),
        "text_weight": 0.5,
        "seed": 3,
    }
    return FactBatches(TEXT, **{**settings, **changes})


def test_facts_of_training_and_test_are_disjoint() -> None:
    train = draw_facts(300, np.random.default_rng(0), held_out=False)
    test = draw_facts(300, np.random.default_rng(0), held_out=True)
    assert not {f.name for f in train} & {f.name for f in test}
    assert not {f.value for f in train} & {f.value for f in test}
    assert len({f.value for f in test}) == len({f.name for f in test}) == 300


def test_more_facts_than_there_are_values_are_refused() -> None:
    """There is no end to drawing them."""
    draw = np.random.default_rng(0)
    most = values_of(held_out=True)
    assert most + values_of(held_out=False) == 10**4
    with pytest.raises(ValueError, match=f"at most {most:,} facts, got {most + 1:,}"):
        draw_facts(most + 1, draw, held_out=True)
    assert len({fact.value for fact in draw_facts(most, draw, held_out=True)}) == most


def test_the_library_text_is_split_by_module() -> None:
    train, test = python_text(held_out=False), python_text(held_out=True)
    assert len(train) > len(test) > 10
    assert not {t.tobytes() for t in train} & {t.tobytes() for t in test}


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    a, b, c = batches().batch(7), batches().batch(7), batches().batch(8)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
    assert a.tokens.shape != c.tokens.shape or not torch.equal(a.tokens, c.tokens)


def test_every_answer_was_stated_before_and_only_answers_are_scored() -> None:
    for step in range(5):
        batch = batches().batch(step)
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
        for tokens, labels, weights, answers in zip(*batch, strict=True):
            row = bytes(torch.cat([tokens[:1], labels]).tolist())
            ends = (answers[:-1] & ~answers[1:]).nonzero().flatten().tolist()
            assert ends
            for end in ends:
                value = row[end + 2 - DIGITS : end + 2]
                name = row[: end + 2 - DIGITS].rsplit("«".encode(), 1)[1]
                assert value.isdigit()
                assert row[: end - DIGITS].count("«".encode() + name + value) == 1
            # Digits of a statement are the only bytes without weight: no one can know them.
            stated = torch.tensor([48 <= x < 58 for x in labels.tolist()]) & ~answers
            assert (weights[stated] == 0).all()
            assert (weights[~stated] > 0).all()
        assert batch.weights[batch.answers].sum() == pytest.approx(1.0, rel=1e-5)
        assert batch.weights[~batch.answers].sum() == pytest.approx(0.5, rel=1e-5)


def test_statements_end_where_the_distance_says() -> None:
    distances = (100, 400, 1600)
    hay = hide_facts(TEXT, distances, streams=3, seed=1)
    length = hay.tokens.shape[1]
    for row, facts in zip(hay.tokens, hay.facts, strict=True):
        for distance, fact in zip(distances, facts, strict=True):
            end = length - distance
            assert row[end - STATEMENT_SIZE : end].tobytes() == fact.statement
    again = hide_facts(TEXT, distances, streams=3, seed=1)
    assert np.array_equal(again.tokens, hay.tokens)
    assert again.facts == hay.facts


def test_distances_must_leave_room() -> None:
    with pytest.raises(ValueError, match="distances must be 0 or more and at least"):
        hide_facts(TEXT, (100, 105), streams=1, seed=0)


def test_endless_text_repeats_as_needed() -> None:
    long = endless(TEXT, 50_000, np.random.default_rng(0))
    assert len(long) == 50_000
    assert b"plain text" in long.tobytes()


def test_only_whole_answers_count() -> None:
    """A model that always says 4821 is right exactly where the fact says so."""

    class Says4821(TitansLM):
        def forward(self, tokens, state=None, write=True):
            logits = torch.zeros(*tokens.shape, 257)
            for offset, digit in enumerate(b"4821"):
                logits[:, tokens.shape[1] - DIGITS + offset, digit] = 1.0
            return logits, self.init_state(tokens.shape[0])

    model = Says4821(preset("lmm-tiny"))
    facts = [[Fact("baku", "4821"), Fact("tino", "4822")], [Fact("rome", "4821")] * 2]
    assert ask(model, model.init_state(2), facts).tolist() == [[True, False], [True, True]]


def test_asking_changes_nothing() -> None:
    model = TitansLM(preset("mal-tiny")).eval()
    hay = hide_facts(TEXT, (50, 200), streams=2, seed=0)
    state = read(model, hay)
    kept = state.map(torch.clone)
    first, second = ask(model, state, hay.facts), ask(model, state, hay.facts)
    assert np.array_equal(first, second)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, kept.tensors()[name])
