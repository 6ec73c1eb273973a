"""`generate` of transformers: as ours, as without padding, and as an exhaustive search."""

import copy
import itertools

import pytest
import torch
from tiny import KINDS, small, some_tokens, wrapped
from transformers import set_seed

import titans
from titans.hf import TitansCache, TitansForCausalLM

NEW = 5


def continued(model: TitansForCausalLM, tokens: torch.Tensor, **options) -> torch.Tensor:
    """The new tokens alone."""
    options = {"max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False, **options}
    return model.generate(tokens, **options)[:, tokens.shape[1] :]


def padded(tokens: torch.Tensor, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts side by side, the second one without its first `padding` tokens."""
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    return tokens * mask, mask


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_ours_with_and_without_padding(kind: str) -> None:
    model, tokens = wrapped(kind), some_tokens()
    prompts = [tokens[0].tolist(), tokens[1, 4:].tolist()]
    greedy = titans.Sampling(temperature=0.0)
    wanted = titans.generate(small(kind), prompts, NEW, sampling=greedy).tokens
    ids, mask = padded(tokens, 4)
    assert continued(model, ids, attention_mask=mask).tolist() == wanted
    assert continued(model, tokens[:1]).tolist() == wanted[:1]


@pytest.mark.parametrize("kind", ["mac-deep", "transformer"])
def test_with_and_without_a_cache_and_in_chunks(kind: str) -> None:
    model = wrapped(kind)
    ids, mask = padded(some_tokens(), 4)
    wanted = continued(model, ids, attention_mask=mask)
    assert torch.equal(continued(model, ids, attention_mask=mask, use_cache=False), wanted)
    for size in (1, 3, 100):  # with 3, the first chunk of the second row is padding
        got = continued(model, ids, attention_mask=mask, prefill_chunk_size=size)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["mal", "rwkv7"])
def test_padded_beams_are_those_of_each_prompt_alone(kind: str) -> None:
    model, tokens = wrapped(kind), some_tokens()
    ids, mask = padded(tokens, 4)
    options = {"num_beams": 3, "num_return_sequences": 2}
    together = continued(model, ids, attention_mask=mask, **options)
    first = continued(model, tokens[:1], **options)
    second = continued(model, tokens[1:, 4:], **options)
    assert torch.equal(together, torch.cat([first, second]))


def test_beams_that_keep_everything_find_the_likeliest_text() -> None:
    """With as many beams as tokens, beam search over two tokens is exhaustive."""
    model = wrapped("mag", vocab_size=6)
    tokens = some_tokens(1) % 6
    found = model.generate(
        tokens,
        max_new_tokens=2,
        num_beams=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    inside = small("mag", vocab_size=6)

    def likelihood(pair: tuple[int, int]) -> float:
        logits, _ = inside(torch.cat([tokens, torch.tensor([pair])], 1))
        scores = logits[0].detach().log_softmax(-1)
        return float(scores[-3, pair[0]] + scores[-2, pair[1]])

    best = max(itertools.product(range(6), repeat=2), key=likelihood)
    assert found.sequences[0, -2:].tolist() == list(best)
    # transformers adds up in float32, and divides by the length.
    assert float(found.sequences_scores[0]) == pytest.approx(likelihood(best) / 2, abs=1e-5)


def test_sampling_does_not_see_padding_and_returns_several() -> None:
    model, tokens = wrapped("mac"), some_tokens(1)
    ids = torch.cat([torch.zeros_like(tokens), tokens], 1)
    mask = torch.cat([torch.zeros_like(tokens), torch.ones_like(tokens)], 1)
    options = {"do_sample": True, "num_return_sequences": 4, "temperature": 3.0}
    set_seed(0)
    wanted = continued(model, tokens, **options)
    set_seed(0)
    assert torch.equal(continued(model, ids, attention_mask=mask, **options), wanted)
    assert len({tuple(row) for row in wanted.tolist()}) > 1


def test_sampled_frequencies_are_the_models_probabilities() -> None:
    model, tokens = wrapped("lmm", vocab_size=4), some_tokens(1) % 4
    set_seed(0)
    drawn = model.generate(tokens, do_sample=True, num_return_sequences=2000, max_new_tokens=1)
    wanted = small("lmm", vocab_size=4)(tokens)[0][0, -1].softmax(-1)
    counts = torch.bincount(drawn[:, -1], minlength=4) / 2000
    assert (counts - wanted).abs().max() < 4 * 0.5 / 2000**0.5


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2}])
def test_a_prefilled_state_goes_on(options: dict) -> None:
    """The whole text and the cache of its beginning, as transformers has it."""
    model, tokens = wrapped("mac"), some_tokens()
    if "num_return_sequences" in options:
        options = {**options, "do_sample": True, "top_k": 1}
    wanted = continued(model, tokens, **options)
    cache = model(tokens[:, :6]).past_key_values
    kept = copy.deepcopy(cache)
    for held in (cache, kept):  # a copy is not changed by what the other reads
        assert held.get_seq_length() == 6
        assert torch.equal(continued(model, tokens, past_key_values=held, **options), wanted)
    assert cache.get_seq_length() == 11 + NEW - 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_a_memory_from_elsewhere_goes_on_with_the_new_tokens_alone(options: dict) -> None:
    model, tokens = wrapped("mac-deep"), some_tokens()
    _, state = small("mac-deep")(tokens[:, :6])
    got = continued(model, tokens[:, 6:], past_key_values=TitansCache(state), **options)
    assert torch.equal(got, continued(model, tokens, **options))


def test_a_returned_cache_goes_on() -> None:
    """A conversation: generate, add a question, generate with what is remembered."""
    model, tokens = wrapped("mal"), some_tokens()
    first = model.generate(
        tokens, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
    )
    text = torch.cat([first.sequences, some_tokens(2, 4, seed=9)], 1)
    wanted = continued(model, text)
    assert torch.equal(continued(model, text, past_key_values=first.past_key_values), wanted)


def test_generation_from_embeddings() -> None:
    model, tokens = wrapped("mac"), some_tokens()
    embeddings = model.get_input_embeddings()(tokens)
    got = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, pad_token_id=0)
    assert torch.equal(got, continued(model, tokens))


def test_what_is_refused() -> None:
    model, tokens = wrapped("mac"), some_tokens()
    with pytest.raises(ValueError, match="expected no cache_implementation, got 'static'"):
        continued(model, tokens, cache_implementation="static")
    with pytest.raises(ValueError, match="stateful"):
        continued(model, tokens[:1], assistant_model=wrapped("mac"))
    read = model(tokens).past_key_values
    # What `generate` leaves of a text shorter than what was read; 5.0 fails before it gets here.
    with pytest.raises(ValueError, match="the whole text so far, or the new tokens and an att"):
        model(tokens[:, :0], past_key_values=read)
