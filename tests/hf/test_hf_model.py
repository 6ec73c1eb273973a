"""The wrapped model computes what `TitansLM` computes; padding is not read."""

import re

import pytest
import torch
import torch.nn.functional as F
from tiny import KINDS, VOCABULARY, small, some_tokens, wrapped
from transformers import AutoModelForCausalLM, DynamicCache

from titans.config import VARIANTS
from titans.hf import TitansCache, TitansHFConfig

TOLERANCE = 1e-11  # float64; logits are of order 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_state_are_those_of_the_model_inside(variant: str) -> None:
    model, tokens = small(variant), some_tokens()
    output = wrapped(variant)(tokens)
    logits, state = model(tokens)
    assert torch.equal(output.logits, logits)
    for name, tensor in output.past_key_values.state.tensors().items():
        assert torch.equal(tensor, state.tensors()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_padding_leaves_no_trace(kind: str) -> None:
    """Left, right, in the middle, and a whole row of it: each row reads as if it were alone."""
    model = wrapped(kind)
    mask = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ]
    ).bool()
    tokens = some_tokens(5).masked_fill(~mask, -100)
    output = model(tokens, attention_mask=mask.long(), output_hidden_states=True)
    for row in range(4):
        alone = model(tokens[row, mask[row]][None], output_hidden_states=True)
        assert_close(output.logits[row, mask[row]], alone.logits[0])
        for got, wanted in zip(output.hidden_states, alone.hidden_states, strict=True):
            assert_close(got[row, mask[row]], wanted[0])
        assert_same_state(output.past_key_values.row(row), alone.past_key_values.state)
    untouched = model.model.init_state(1)
    assert_same_state(output.past_key_values.row(4), untouched)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_with_padding_are_one_pass(kind: str) -> None:
    """Rows of other lengths go on side by side; the first piece of a row may be padding alone."""
    model, tokens = wrapped(kind), some_tokens(3)
    mask = torch.ones_like(tokens)
    mask[0, :5], mask[2, :2] = 0, 0
    whole = model(tokens, attention_mask=mask)
    cache, begin, logits = TitansCache(), 0, []
    for end in (4, 5, 9, 11):
        output = model(tokens[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        assert output.past_key_values is cache
        assert cache.get_seq_length() == end
        logits.append(output.logits)
        begin = end
    read = mask.bool()
    assert_close(torch.cat(logits, 1)[read], whole.logits[read])
    for row in range(3):
        assert_same_state(cache.row(row), whole.past_key_values.row(row))


def test_gradients_of_padded_rows_are_those_of_the_rows_alone() -> None:
    tokens = some_tokens()
    mask = torch.ones_like(tokens).bool()
    mask[0, :4] = False
    weights = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)).double()
    padded, alone = wrapped("mac-deep"), wrapped("mac-deep")
    (padded(tokens, attention_mask=mask.long()).logits[mask] * weights).sum().backward()
    for row in range(2):
        (alone(tokens[row, mask[row]][None]).logits * weights).sum().backward()
    for (name, mine), yours in zip(padded.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_loss_is_the_mean_over_labelled_next_tokens() -> None:
    model, tokens = wrapped("mag"), some_tokens()
    labels = tokens.clone()
    labels[1, 6:] = -100
    output = model(tokens, labels=labels)
    logits = small("mag")(tokens)[0]
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    counted = labels[:, 1:] != -100
    assert_close(output.loss, nll[counted].mean(), tolerance=1e-6)  # transformers': float32


def test_padding_counts_in_no_loss() -> None:
    """Labels as a collator gives them, the first token of a padded row among them."""
    model, tokens = wrapped("mag"), some_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    with torch.no_grad():
        model.model.head.weight.mul_(30.0)  # what an unread token adds, log V, is far from the rest
    losses = [model(row[None], labels=row[None]).loss for row in (tokens[0, 4:], tokens[1])]
    counts = torch.tensor([6.0, 10.0])
    wanted = (torch.stack(losses) * counts).sum() / counts.sum()
    assert_close(model(tokens, attention_mask=mask, labels=labels).loss, wanted, tolerance=1e-6)
    right, read = (torch.cat([x[:1, 4:], x[:1, :4]], 1) for x in (tokens, mask))
    padded = model(right, attention_mask=read, labels=right).loss  # its padding has labels
    assert_close(padded, losses[0], tolerance=1e-6)
    assert (labels[0, 4] == tokens[0, 4]).item()  # the caller's are not changed


def test_a_call_that_fails_has_not_read() -> None:
    model, tokens = wrapped("mac"), some_tokens()
    cache = TitansCache(model(tokens[:1]).past_key_values.state)
    before = cache.memory.parts
    with pytest.raises(ValueError, match=r"labels must be \(2, 11\) as the tokens, got \(2, 10\)"):
        model(tokens, past_key_values=cache, labels=tokens[:, 1:])
    with pytest.raises(IndexError):
        model(tokens, past_key_values=cache, logits_to_keep=torch.tensor([99]))
    assert cache.memory.parts is before
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_model_is_made_as_it_is_loaded(dtype: torch.dtype) -> None:
    config = TitansHFConfig.from_titans(small("lmm").config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    wide = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {n for n in dict(model.named_parameters()) if re.search(r"gates|initial", n)}
    assert wide
    assert model(some_tokens()).logits.dtype == dtype


def test_embeddings_instead_of_tokens() -> None:
    model, tokens = wrapped("mal"), some_tokens()
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(tokens).logits)


def test_hidden_states_are_what_blocks_and_head_read() -> None:
    model, tokens = wrapped("mac"), some_tokens()
    output = model(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.model.embedding(tokens))
    first = model.model.blocks[0](
        output.hidden_states[0], model.model.blocks[0].mixer.init_state(2)
    )
    assert torch.equal(output.hidden_states[1], first[0])
    assert torch.equal(model.model.head(output.hidden_states[-1]), output.logits)
    assert model(tokens).hidden_states is None


def test_chosen_hidden_states_stand_in_their_places() -> None:
    model, tokens = wrapped("mac"), some_tokens()
    every = model(tokens, output_hidden_states=True).hidden_states
    for given, wanted in [(0, [0]), (-1, [2]), ([0, -1], [0, 2]), ([], [])]:
        some = model(tokens, output_hidden_states=given).hidden_states
        assert [i for i, h in enumerate(some or ()) if h is not None] == wanted
        assert all(torch.equal(some[i], every[i]) for i in wanted)
    with pytest.raises(ValueError, match="output_hidden_states: there are 3, got index 3"):
        model(tokens, output_hidden_states=[0, 3])


def test_logits_to_keep() -> None:
    model, tokens = wrapped("mag"), some_tokens()
    every = model(tokens).logits
    assert_close(model(tokens, logits_to_keep=3).logits, every[:, -3:])
    places = torch.tensor([0, 4])
    assert_close(model(tokens, logits_to_keep=places).logits, every[:, places])


def test_without_a_cache_none_is_returned() -> None:
    model, tokens = wrapped("lmm"), some_tokens()
    assert model(tokens, use_cache=False).past_key_values is None
    cache = TitansCache()
    assert model(tokens, use_cache=False, past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == tokens.shape[1]


def test_what_is_refused(without_shape_checks) -> None:
    model, tokens = wrapped("mac"), some_tokens()
    with pytest.raises(ValueError, match="TitansCache, got DynamicCache"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=f"outside the vocabulary of {VOCABULARY}"):
        model(tokens + VOCABULARY - tokens.min())
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 11 or more\), got \(2, 5\)"):
        model(tokens, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="position_ids: tokens are read in their order"):
        model(tokens, position_ids=torch.arange(11) % 6)  # two texts packed into one row
    for given, got in ((tokens[0], r"\(11,\)"), (tokens[0, 0], r"\(\)"), ([[1]], "list")):
        with pytest.raises(ValueError, match=rf"input_ids must be .* \(B, T\), got {got}"):
            model(given)
    for shape in ((2, 3, 5), (2, 16)):
        with pytest.raises(ValueError, match=r"inputs_embeds must be .* \(B, T, 16\), got"):
            model(inputs_embeds=torch.zeros(shape))
    cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match="for 2 rows, got tokens for 3"):
        model(some_tokens(3), past_key_values=cache)
    with pytest.raises(ValueError, match="belongs to another model"):
        wrapped("mag")(tokens, past_key_values=cache)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, check_dtype=False)


def assert_same_state(got, wanted) -> None:
    assert got.position == wanted.position
    mine, yours = got.tensors(), wanted.tensors()
    assert mine.keys() == yours.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, yours[name], rtol=TOLERANCE, atol=TOLERANCE, msg=name)
