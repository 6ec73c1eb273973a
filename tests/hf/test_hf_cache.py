"""TitansCache: reset, reorder, repeat and select act on memories as on rows of a batch."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import KINDS, small, some_tokens, wrapped

from titans import ModelState
from titans.hf import TitansCache, TitansForCausalLM


def read(model: TitansForCausalLM, tokens: torch.Tensor, padding: int = 0) -> TitansCache:
    """A cache that has read the tokens; the last row `padding` fewer of them."""
    mask = torch.ones_like(tokens)
    mask[-1, :padding] = 0
    return model(tokens, attention_mask=mask).past_key_values


def assert_rows(cache: TitansCache, before: TitansCache, rows: list[int]) -> None:
    assert cache.memory.batch_size == len(rows)
    for new, old in enumerate(rows):
        got, wanted = cache.row(new), before.row(old)
        assert got.position == wanted.position
        for name, tensor in got.tensors().items():
            assert torch.equal(tensor, wanted.tensors()[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0, 4])
def test_rows_move_with_their_memories(kind: str, padding: int) -> None:
    model = wrapped(kind)
    before = read(model, some_tokens(3), padding)
    for verb, argument, rows in [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ]:
        cache = copy.deepcopy(before)
        getattr(cache, verb)(argument)
        assert_rows(cache, before, rows)
        assert cache.get_seq_length() == 11
    # And they go on as those rows would have.
    more = some_tokens(3, 3, seed=5)
    cache = copy.deepcopy(before)
    cache.reorder_cache(torch.tensor([2, 2, 1]))
    swapped = model(more[[2, 2, 1]], past_key_values=cache).logits
    straight = model(more, past_key_values=before).logits
    torch.testing.assert_close(swapped, straight[[2, 2, 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_reset_goes_back_to_the_learned_memory(kind: str) -> None:
    """Zeros would not do: M_0 is learned."""
    model, tokens = wrapped(kind), some_tokens()
    cache = read(model, some_tokens(seed=7))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(tokens, past_key_values=cache).logits, model(tokens).logits)
    if kind in ("lmm", "mac", "mag", "mal", "mac-deep"):
        state = cache.state
        zeroed = state.map(torch.zeros_like)
        assert not torch.equal(
            model(tokens, past_key_values=TitansCache(zeroed)).logits, model(tokens).logits
        )


def test_a_memory_file_goes_in_and_out(tmp_path: Path) -> None:
    """What titans saved, transformers reads on, and the other way round."""
    model, tokens, more = small("mac"), some_tokens(1), some_tokens(1, 4, seed=3)
    _, state = model(tokens)
    state.save(tmp_path / "a.memory")
    cache = TitansCache(ModelState.load(tmp_path / "a.memory"))
    assert cache.get_seq_length() == 0  # what was read before is no column of the new batch
    logits = wrapped("mac")(more, past_key_values=cache).logits
    assert torch.equal(logits, model(more, state)[0])
    cache.state.save(tmp_path / "b.memory")
    again = model(more, ModelState.load(tmp_path / "b.memory"))[0]
    assert torch.equal(again, wrapped("mac")(more, past_key_values=cache).logits)


def test_a_memory_of_one_row_serves_a_batch() -> None:
    model, tokens, more = small("mag"), some_tokens(1), some_tokens(3, 4, seed=3)
    _, state = model(tokens)
    logits = wrapped("mag")(more, past_key_values=TitansCache(state)).logits
    for row in range(3):
        torch.testing.assert_close(logits[row], model(more[row][None], state)[0][0])


def test_nothing_can_be_unread() -> None:
    cache = read(wrapped("mac"), some_tokens())
    before = cache.state
    cache.crop(0)
    assert cache.state is before
    with pytest.raises(ValueError, match=r"cannot unread tokens, got crop\(-1\)"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="holds memories, not keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_rows_of_other_lengths_have_no_common_state() -> None:
    cache = read(wrapped("mac"), some_tokens(), padding=3)
    with pytest.raises(ValueError, match="differently many"):
        _ = cache.state
    assert [cache.row(0).position, cache.row(1).position] == [11, 8]
    with pytest.raises(ValueError, match="expected a row below 2, got 2"):
        cache.row(2)
    assert TitansCache().state is None


def test_detached_memories_keep_their_values() -> None:
    model, tokens = wrapped("mac"), some_tokens()
    cache = read(model, tokens)
    assert any(t.requires_grad for t in cache.state.tensors().values())
    values = {name: t.clone() for name, t in cache.state.tensors().items()}
    cache.detach()
    for name, tensor in cache.state.tensors().items():
        assert not tensor.requires_grad
        assert torch.equal(tensor, values[name])
