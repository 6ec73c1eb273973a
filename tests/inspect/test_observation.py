"""What is seen while reading is what reading computes, however the text is cut."""

import pytest
import torch
from inspected import MODELS, build, text
from torch.nn.functional import cross_entropy

import titans
from titans.inspect import Observation, distance, memories, momentum_norm, moved, observe, watch

PER_TOKEN = ("nll", "surprise", "learning_rate", "momentum", "decay")
AFTER = ("past_surprise", "moved", "logits")


def close(got: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert (got is None) == (expected is None)
    if got is not None:
        # The models are float64; nats are taken in float32.
        tolerance = 1e-10 if got.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def joined(parts: list[Observation], name: str) -> torch.Tensor | None:
    columns = [getattr(part, name) for part in parts]
    return None if columns[0] is None else torch.cat(columns, 1)


@pytest.mark.parametrize(("variant", "memory"), MODELS)
def test_an_observation_is_the_models_own_record(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), text(23, batch=2)
    seen = observe(model, tokens)
    output = model.run(tokens)
    for name in PER_TOKEN[1:]:
        columns = [getattr(record, name) for record in output.records]
        close(getattr(seen, name), None if columns[0] is None else torch.stack(columns, 2))
    assert (seen.momentum is None) == ("momentum" not in memory and "paper" not in memory)
    assert (seen.decay is None) == (memory == "no decay")
    expected = cross_entropy(output.logits[:, :-1].mT.float(), tokens[:, 1:], reduction="none")
    close(seen.nll[:, 1:], expected)
    assert torch.isnan(seen.nll[:, 0]).all()
    close(seen.logits, output.logits[:, -1])
    # The memories did something, each of its own: else the columns could be mixed up unseen.
    for name in ("surprise", "learning_rate"):
        flat = getattr(seen, name).flatten(2).unbind(-1)
        assert all(not torch.allclose(a, b) for i, a in enumerate(flat) for b in flat[:i])


@pytest.mark.parametrize(("variant", "memory"), MODELS)
def test_watching_in_any_pieces_is_observing_at_once(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), text(23, batch=2)
    whole = observe(model, tokens)
    for piece in (3, 7):
        parts = list(watch(model, tokens, piece=piece))
        for name in PER_TOKEN:
            close(joined(parts, name), getattr(whole, name))
        for name in AFTER:
            close(getattr(parts[-1], name), getattr(whole, name))
    # From a state on, and as `titans.stream` has it.
    first = observe(model, tokens[:, :11])
    rest = list(watch(model, tokens[:, 11:], first.state, piece=5))
    close(joined(rest, "surprise"), whole.surprise[:, 11:])
    readings = list(titans.stream(model, tokens[:, 11:], first.state, piece=5))
    for seen, reading in zip(rest, readings, strict=True):
        close(seen.nll, reading.nll)
        close(seen.surprise.mean(-1), reading.surprise)
    again = observe(model, tokens[:, 11:], first.state, first.logits)
    close(again.nll, whole.nll[:, 11:])


@pytest.mark.parametrize(("variant", "memory"), MODELS)
def test_how_far_memories_moved_is_counted_from_the_learned_weights(variant, memory) -> None:
    model, tokens = build(variant, memory), text(17, batch=2)
    state, other = model(tokens)[1], model(tokens.flip(1))[1]
    for index, block in enumerate(model.blocks):
        layer = block.mixer.memory
        for row in range(2):
            for head in range(2):
                deviations, differences, past = [], [], []
                for matrix, learned in enumerate(layer.initial):
                    rule, twin = (s.blocks[index].memory.rule for s in (state, other))
                    now = rule.weights[matrix][row, head]
                    if layer.anchored:
                        now = learned[head] + now
                    deviations.append((now - learned[head]).flatten())
                    then = twin.weights[matrix][row, head]
                    differences.append((rule.weights[matrix][row, head] - then).flatten())
                    if rule.momentum is not None:
                        past.append(rule.momentum[matrix][row, head].flatten())
                place = (row, index, head)
                for result, parts in (
                    (moved(model, state), deviations),
                    (distance(model, state, other), differences),
                    (momentum_norm(model, state), past),
                ):
                    expected = torch.cat(parts).square().sum().sqrt() if parts else None
                    close(None if result is None else result[place], expected)
    assert (moved(model, state) > 0.01).all()
    assert moved(model, state).shape == (2, 2, 2)
    assert (distance(model, state, state) == 0).all()
    close(distance(model, state, other), distance(model, other, state))
    # The persistent tokens have moved it before a text begins; in MAC attention alone sees them.
    written = moved(model, model.init_state(2))
    assert (written == 0).all() if variant == "mac" else (written > 0).any()


def test_without_writing_nothing_moves() -> None:
    model, tokens = build("mag", "linear, momentum"), text(12)
    seen = observe(model, tokens, write=False)
    assert (seen.surprise == 0).all()
    assert (seen.learning_rate == 0).all()
    assert seen.momentum is None
    assert seen.decay is None
    close(seen.moved, moved(model, model.init_state()))
    expected = model.run(tokens, write=False)
    close(seen.logits, expected.logits[:, -1])


@pytest.mark.parametrize("variant", ["sliding", "transformer", "rwkv7"])
def test_a_model_without_memories_has_none(variant: str) -> None:
    model, tokens = build(variant), text(9, batch=3)
    seen = observe(model, tokens)
    assert memories(model, seen.state) == []
    assert seen.surprise.shape == seen.learning_rate.shape == (3, 9, 0, 0)
    assert seen.moved.shape == distance(model, seen.state, seen.state).shape == (3, 0, 0)
    assert seen.momentum is seen.decay is seen.past_surprise is None
    assert torch.isfinite(seen.nll[:, 1:]).all()


def test_blocks_without_a_memory_are_passed_over() -> None:
    model, tokens = build("gated-deltanet-h2"), text(9)
    seen = observe(model, tokens)
    found = memories(model, seen.state)
    assert [memory.block for memory in found] == [0]
    close(seen.surprise[:, :, 0], model.run(tokens).records[0].surprise)
    expected = found[0].state.rule.weights[0] - found[0].layer.first_weights()[0]
    close(seen.moved[:, 0], expected.flatten(2).norm(dim=-1))


def test_states_that_do_not_fit_are_refused() -> None:
    model, tokens = build("mal"), text(6)
    state = model(tokens)[1]
    with pytest.raises(ValueError, match="belongs to another model"):
        moved(build("mag"), state)
    with pytest.raises(ValueError, match="for batches of 1 and 2"):
        distance(model, state, model(text(6, batch=2))[1])
    with pytest.raises(ValueError, match="piece must be at least 1, got 0"):
        next(watch(model, tokens, piece=0))
