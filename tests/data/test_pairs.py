"""The pairs task says what it should, and a stream of it is its batch."""

import pytest
import torch

from titans.data.pairs import IGNORED, KEYS, NOISE, VALUES, PairTask, guess


def test_every_question_has_its_answer_in_the_row_and_nowhere_revealed() -> None:
    task = PairTask(rows=6, length=48, pairs=5, seed=1)
    for step in range(5):
        tokens, labels = task.batch(step)
        for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
            stated = {
                row[i]: row[i + 1]
                for i in range(0, 38, 2)
                if row[i] < KEYS and KEYS <= row[i + 1] < KEYS + VALUES
            }
            assert len(stated) == 5
            asked = [i for i in range(48) if wanted[i] != IGNORED]
            assert len(asked) == 5
            for i in asked:
                assert row[i - 1] == task.query
                assert stated[row[i]] == wanted[i]
            noise = [t for t in row[:38] if t >= KEYS + VALUES]
            assert len(noise) == 28
            assert max(noise) < KEYS + VALUES + NOISE


def test_a_guess_is_right_as_often_as_said() -> None:
    """Of a row's values, which may be alike, the one of the next question."""
    labels = PairTask(rows=20_000, length=18, pairs=4, seed=3).batch(0).labels
    values = labels[labels != IGNORED].view(-1, 4)
    for shift in range(4):
        right = (values == values.roll(shift, 1)).float().mean().item()
        assert right == pytest.approx(1.0 if shift == 0 else 1 / VALUES, abs=0.003)
    assert guess(4) == pytest.approx((1 + 3 / VALUES) / 4)
    assert guess(1) == 1.0


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_a_stream_has_the_pairs_of_the_batch(piece: int) -> None:
    task = PairTask(rows=3, length=60, pairs=4, seed=2)
    whole = task.batch(3)
    parts = list(task.stream(3, piece))
    tokens = torch.cat([p.tokens for p in parts], 1)
    assert torch.equal(torch.cat([p.labels for p in parts], 1), whole.labels)
    # Noise is drawn piece by piece; all else is the same.
    signal = (whole.tokens < KEYS + VALUES) | (whole.tokens == task.query)
    assert torch.equal(tokens[signal], whole.tokens[signal])
    assert torch.equal(task.batch(3).tokens, whole.tokens)


def test_impossible_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="length must be at least 18 for 4 pairs"):
        PairTask(rows=1, length=17, pairs=4, seed=0)
    with pytest.raises(ValueError, match="pairs must lie in"):
        PairTask(rows=1, length=400, pairs=40, seed=0)
