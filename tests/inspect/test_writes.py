"""The report of what was written is what `observe` sees, however the text is cut."""

import numpy as np
import pytest
import torch
from inspected import MODELS, build, text

from titans.inspect import observe, writes
from titans.state import NonFiniteError


@pytest.mark.parametrize(("variant", "memory"), MODELS)
def test_totals_and_the_strongest_writes_are_those_observed(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), text(41)
    seen = observe(model, tokens)
    rates = seen.learning_rate[0].mean(-1)
    for piece in (7, 512):
        found = writes(model, tokens, top=5, before=3, piece=piece)
        assert len(found) == rates.shape[1]
        for index, written in enumerate(found):
            ours = rates[:, index]
            assert written.tokens == 41
            assert written.total == pytest.approx(ours.sum().item())
            if seen.decay is None:
                assert written.forgetting == 0
            else:
                left = torch.log1p(-seen.decay[0, :, index]).mean(-1).sum()
                assert written.forgetting == pytest.approx(-left.item())
            best = ours.topk(5).values
            np.testing.assert_allclose([w.rate for w in written.strongest], best.numpy())
            assert len({w.position for w in written.strongest}) == 5  # some rates are equal
            for write in written.strongest:
                at = write.position
                assert write.rate == pytest.approx(ours[at].item())
                assert write.token == tokens[0, at]
                assert list(write.before) == tokens[0, max(at - 3, 0) : at].tolist()


def test_going_on_from_a_state() -> None:
    model, tokens = build(*MODELS[0]), text(41)
    whole, first = writes(model, tokens), observe(model, tokens[:, :20])
    begun, rest = writes(model, tokens[:, :20]), writes(model, tokens[:, 20:], first.state)
    for both, one, other in zip(whole, begun, rest, strict=True):
        assert both.total == pytest.approx(one.total + other.total)


def test_one_text_at_a_time() -> None:
    model = build(*MODELS[0])
    with pytest.raises(ValueError, match="expected one text, got 2 side by side"):
        writes(model, text(9, batch=2))
    with pytest.raises(ValueError, match="the text is empty"):
        writes(model, [])


def test_a_damaged_model_writes_nothing_that_could_be_told() -> None:
    model = build(*MODELS[0])
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="no finite rate in the first"):
        writes(model, torch.zeros(1, 8, dtype=torch.long))
