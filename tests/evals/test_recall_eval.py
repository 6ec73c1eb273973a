"""Associative recall: what is asked can be known, and a memory that can learn it does."""

import dataclasses

import pytest
import torch

from titans.data.pairs import IGNORED, PairTask
from titans.evals.recall import (
    BEGIN_PAIRS,
    RecallConfig,
    ask,
    build_model,
    recall,
    row_length,
    train,
)

EASY = RecallConfig(keys=8, most_trained=2, pairs=(2,), head_dim=16, dim=32, steps=350, tokens=1024)


@pytest.mark.parametrize("pairs", [1, 4, 64])
def test_every_key_is_asked_once(pairs):
    task = PairTask(rows=3, length=row_length(pairs), pairs=pairs, seed=0, keys=64)
    tokens, labels = task.batch(0)
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        asked = [row[i] for i in range(len(row)) if wanted[i] != IGNORED]
        stated = {row[i]: row[i + 1] for i in range(len(row) - 2 * pairs - 1) if row[i] < 64}
        assert sorted(asked) == sorted(stated)
        assert [stated[key] for key in asked] == [w for w in wanted if w != IGNORED]
    assert int(tokens.max()) < task.vocabulary


def test_a_linear_memory_learns_to_bind():
    cell = ask(train(EASY), EASY, 2)
    assert cell.asked == 128
    assert cell.accuracy > 0.9 > cell.guess


def test_state_is_counted_in_numbers():
    config = RecallConfig(
        keys=8, most_trained=1, pairs=(1,), head_dim=16, dim=32, steps=1, tokens=64
    )
    result = recall(config)
    tails = config.layers * 3 * 3 * config.head_dim  # width - 1 inputs of q, k and v
    assert result.state == config.layers * config.head_dim**2 + tails
    assert result.parameters == build_model(config).parameter_count


def test_the_same_seed_is_the_same_model():
    config = RecallConfig(
        keys=8, most_trained=2, pairs=(2,), head_dim=8, dim=16, steps=2, tokens=64
    )
    one, other = train(config), train(config)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_errors():
    with pytest.raises(ValueError, match=r"pairs must lie in 1\.\.4, got \[8\]"):
        RecallConfig(keys=4, pairs=(8,), most_trained=2)
    with pytest.raises(ValueError, match="most_trained must be a power of two, got 48"):
        RecallConfig(most_trained=48)
    with pytest.raises(ValueError, match="seed must not be negative"):
        RecallConfig(seed=-1)
    with pytest.raises(ValueError, match="tokens >= 322"):
        RecallConfig(tokens=100)


def test_how_attention_can_begin():
    """Embeddings with a part in common, and few pairs first."""
    config = RecallConfig(model="transformer", shared=1.0)
    alike = [
        torch.nn.functional.normalize(build_model(c).embedding.weight, dim=1).mean(0).norm()
        for c in (config, dataclasses.replace(config, shared=0.0))
    ]
    assert alike[0] > 0.6 > 0.2 > alike[1]
    read = []
    few = dataclasses.replace(EASY, begin=3, steps=2, tokens=64)

    def watched(model, batch, steps, *rest):
        read.extend(int((batch(step).labels[0] != IGNORED).sum()) for step in range(steps))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titans.evals.recall.fit_pairs", watched)
        train(few)
    assert read[:3] == [BEGIN_PAIRS] * 3
    assert len(read) == 5
    assert max(read[3:]) <= few.most_trained
