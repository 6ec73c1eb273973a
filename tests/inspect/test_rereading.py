"""Erasing is reading the spliced text; not writing needs only the tokens that can matter."""

import numpy as np
import pytest
import torch
from inspected import MODELS, build, text

from titans import ModelState, TitansLM
from titans.inspect import reach, replay, without_writing

EVERY = [*MODELS, *((v, "linear") for v in ("sliding", "rwkv7", "gated-deltanet-h2", "mamba2"))]


def assert_equal_states(a: ModelState, b: ModelState) -> None:
    assert a.structure() == b.structure()  # shapes, positions and offsets
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(tensor, b.tensors()[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("variant", "memory"), MODELS)
def test_erasing_is_reading_the_spliced_text(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), text(41, batch=2)
    passages = [(30, 33), (5, 11), (6, 8), (9, 14), (20, 20)]
    spliced = torch.cat([tokens[:, :5], tokens[:, 14:30], tokens[:, 33:]], 1)
    assert_equal_states(replay(model, tokens, passages), model(spliced)[1])
    start = model(text(6, batch=2, seed=3))[1]
    kept = start.fork()
    assert_equal_states(replay(model, tokens, passages, start), model(spliced, start)[1])
    assert_equal_states(start, kept)
    assert_equal_states(replay(model, tokens), model(tokens)[1])


def test_arrays_are_replayed_as_tensors_are_and_all_may_be_erased() -> None:
    model, tokens = build("lmm"), text(20)
    array = tokens[0].numpy().astype(np.uint8)
    assert_equal_states(replay(model, array, [(3, 8)]), replay(model, tokens, [(3, 8)]))
    assert_equal_states(replay(model, array, [(0, 20)]), model.init_state())
    start = model(text(5, seed=2))[1]
    assert replay(model, array, [(0, 12), (7, 20)], start) is start
    for wrong in ((-1, 3), (4, 2), (18, 21)):
        with pytest.raises(ValueError, match=r"a passage must lie in 0..20 with start <= stop"):
            replay(model, array, [wrong])


def silent(model: TitansLM, tokens: torch.Tensor) -> ModelState:
    return model.run(tokens, write=False).state


@pytest.mark.parametrize(("variant", "memory"), EVERY)
def test_not_writing_needs_only_the_tokens_in_reach(variant: str, memory: str) -> None:
    model = build(variant, memory)
    far = reach(model)
    for length in (1, far - 1, far + 1, 2 * far + 4):
        tokens = text(length, batch=2)
        expected = silent(model, tokens)
        assert_equal_states(without_writing(model, tokens[:, -far:], length), expected)
        assert_equal_states(without_writing(model, tokens), expected)
    with pytest.raises(ValueError, match=f"the last {far} of {length} tokens can matter"):
        without_writing(model, tokens[:, 1 - far :], length)
    with pytest.raises(ValueError, match="of 4 tokens can matter to this model, got 9"):
        without_writing(model, tokens[:, :9], 4)


@pytest.mark.parametrize(("variant", "memory"), EVERY)
def test_tokens_out_of_reach_change_nothing_and_the_first_within_does(variant, memory) -> None:
    model = build(variant, memory)
    far = reach(model)
    for length in range(2 * far, 2 * far + (6 if variant == "mac" else 1)):  # 6: a segment
        tokens = text(length)
        outside, inside = tokens.clone(), tokens.clone()
        outside[:, : length - far] = (tokens[:, : length - far] + 7) % 40
        inside[:, length - far] = (tokens[:, length - far] + 7) % 40
        before, other, within = (model.run(t, write=False) for t in (tokens, outside, inside))
        assert_equal_states(before.state, other.state)
        torch.testing.assert_close(before.logits[:, -1], other.logits[:, -1])
        # Not so in MAC, where the segments of two blocks cannot both stand at their worst, and
        # where a memory is empty, and what is looked up in it goes for nothing.
        if variant not in ("mac", "gated-deltanet-h2", "rwkv7"):
            assert not torch.equal(before.logits[:, -1], within.logits[:, -1])


def test_full_attention_needs_everything() -> None:
    model, tokens = build("transformer"), text(30)
    assert reach(model) is None
    assert_equal_states(without_writing(model, tokens), silent(model, tokens))
    with pytest.raises(ValueError, match="the last 30 of 30 tokens can matter"):
        without_writing(model, tokens[:, 1:], 30)


def test_the_demo_model_reaches_a_page_and_answers_alike() -> None:
    from titans import load
    from titans.demo import asset

    model = load(asset("demo.safetensors"))
    assert reach(model) == 1 + 2 * (11 + 15)
    tokens = torch.randint(0, 256, (1, 3000), generator=torch.Generator().manual_seed(0))
    state, expected = without_writing(model, tokens[:, -53:], 3000), silent(model, tokens)
    question = text(9)
    got = model.run(question, state, write=False).logits
    torch.testing.assert_close(
        got, model.run(question, expected, write=False).logits, rtol=1e-4, atol=1e-4
    )
