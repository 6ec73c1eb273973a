"""Sampling, generation and streaming: equal to the plain model, whatever the batch or split."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import titans
from titans import Sampling, TitansConfig, TitansLM
from titans.config import VARIANTS, MemoryConfig
from titans.generate import sample

GREEDY = Sampling(temperature=0.0)


def build(variant: str = "mac") -> TitansLM:
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant,
        vocab_size=40,
        dim=16,
        layers=2,
        heads=2,
        ffn_hidden=24,
        window=5,
        segment=6,
        memory=MemoryConfig(heads=2),
    )
    return TitansLM(config).double().eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_generation_is_the_argmax_of_the_parallel_pass(variant: str) -> None:
    model = build(variant)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    new = titans.generate(model, [prompt], 10, sampling=GREEDY).tokens[0]
    logits, _ = model(torch.tensor([prompt + new]))
    assert new == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


def test_prompts_of_any_lengths_run_together_as_alone() -> None:
    model = build()
    prompts = [[1, 2, 3], [7], [4, 5, 6], [8, 9, 10, 11, 12, 13, 14]]
    for sampling in (GREEDY, Sampling(seed=3)):
        together = titans.generate(model, prompts, 6, sampling=sampling).tokens
        for index, prompt in enumerate(prompts):
            own = sampling if sampling is GREEDY else Sampling(seed=3 + index)
            assert titans.generate(model, [prompt], 6, sampling=own).tokens[0] == together[index]


def test_generation_goes_on_from_a_state_and_leaves_it_alone() -> None:
    model = build()
    text = torch.tensor([[5, 3, 8, 8, 1, 2, 7]])
    _, state = titans.prefill(model, text[:, :4])
    kept = state.map(torch.clone)
    continued = titans.generate(model, text[:, 4:], 5, sampling=GREEDY, state=state)
    assert continued.tokens == titans.generate(model, text, 5, sampling=GREEDY).tokens
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, kept.tensors()[name])
    # The returned state is that after the last token fed: going on from it changes nothing.
    whole = titans.generate(model, text, 8, sampling=GREEDY).tokens[0]
    last = [continued.tokens[0][-1]]
    rest = titans.generate(model, [last], 3, sampling=GREEDY, state=continued.states[0])
    assert continued.tokens[0] + rest.tokens[0] == whole


def test_stop_sequences_end_a_text_and_are_cut_off() -> None:
    model = build()
    free = titans.generate(model, [[1, 2], [3, 4]], 12, sampling=Sampling(seed=0)).tokens
    stop = free[0][4:6]
    first = next(i for i in range(11) if free[0][i : i + 2] == stop)
    cut = titans.generate(model, [[1, 2], [3, 4]], 12, sampling=Sampling(seed=0), stop=[stop])
    assert cut.tokens[0] == free[0][:first]
    assert not any(free[1][i : i + 2] == stop for i in range(11))
    assert cut.tokens[1] == free[1]


def test_sampling_filters() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def support(sampling: Sampling) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        return {int(sample(logits, sampling, [generator])) for _ in range(300)}

    assert support(Sampling()) == {0, 1, 2, 3}
    assert support(Sampling(temperature=0.0)) == {0}
    assert support(Sampling(top_k=2)) == {0, 1}
    assert support(Sampling(top_k=9)) == {0, 1, 2, 3}
    assert support(Sampling(top_p=0.5)) == {0}
    assert support(Sampling(top_p=1e-300)) == support(Sampling(temperature=1e-300)) == {0}
    assert support(Sampling(top_p=0.79)) == {0, 1}
    assert support(Sampling(min_p=0.25)) == {0, 1, 2}
    assert support(Sampling(top_k=3, top_p=0.9, min_p=0.5)) == {0, 1}


def test_sampling_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    generator = torch.Generator().manual_seed(0)
    drawn = [int(sample(probabilities.log()[None], Sampling(), [generator])) for _ in range(4000)]
    seen = torch.bincount(torch.tensor(drawn), minlength=3) / 4000
    # Four standard deviations of a binomial proportion.
    assert torch.all(
        (seen - probabilities).abs() < 4 * (probabilities * (1 - probabilities) / 4000).sqrt()
    )


def test_a_cold_temperature_is_greedy() -> None:
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    assert torch.equal(sample(logits, Sampling(temperature=1e-4), generators), logits.argmax(-1))


@pytest.mark.parametrize(
    ("prompts", "kwargs", "message"),
    [
        ([], {}, "no prompt given"),
        ([[1], []], {}, "the prompt is empty"),
        ([[1]], {"max_tokens": 0}, "max_tokens must be at least 1"),
        ([[1]], {"stop": [[]]}, "a stop sequence is empty"),
        ([[99]], {}, "token 99 is outside the vocabulary of 40"),
        ([1, 2], {}, "prompts must be token ids, one list or row a prompt"),
        (torch.tensor([1, 2]), {}, "prompts must be token ids, one list or row a prompt"),
        ([[1.7]], {}, "prompts must be token ids, one list or row a prompt"),
        ([["12"]], {}, "prompts must be token ids, one list or row a prompt"),
        (torch.tensor([[1.0]]), {}, "prompts must be token ids, one list or row a prompt"),
    ],
)
def test_bad_prompts_are_refused(prompts, kwargs, message, without_shape_checks) -> None:
    arguments = {"max_tokens": 3, **kwargs}
    with pytest.raises(ValueError, match=message):
        titans.generate(build(), prompts, **arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must lie in \(0, 1\]"),
    ],
)
def test_bad_sampling_settings_are_refused(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**kwargs)


def test_damaged_weights_do_not_sample_nonsense() -> None:
    model = build()
    with torch.no_grad():
        model.embedding.weight[1] = float("nan")
    with pytest.raises(ValueError, match="non-finite logit"):
        titans.generate(model, [[1, 2]], 3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("piece", [1, 7, 64])
def test_streaming_is_the_parallel_pass(variant: str, piece: int) -> None:
    model = build(variant)
    tokens = torch.randint(0, 40, (2, 45), generator=torch.Generator().manual_seed(2))
    readings = list(titans.stream(model, tokens, piece=piece))
    nll = torch.cat([r.nll for r in readings], 1)
    logits, state = model(tokens)
    expected = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    assert nll[:, 0].isnan().all()
    torch.testing.assert_close(nll[:, 1:].double(), expected, rtol=1e-5, atol=1e-5)
    for name, tensor in readings[-1].state.tensors().items():
        torch.testing.assert_close(tensor, state.tensors()[name], rtol=1e-10, atol=1e-10)


def test_streaming_takes_arrays_memory_maps_and_iterables(tmp_path) -> None:
    model = build("lmm")
    array = np.random.default_rng(0).integers(0, 40, 50).astype(np.uint16)
    array.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    sources = [array, mapped, torch.from_numpy(array.astype(np.int64)), [array[:20], array[20:]]]
    ends = [list(titans.stream(model, s, piece=16))[-1].logits for s in sources]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-10, atol=1e-10)


def test_streaming_goes_on_from_a_state() -> None:
    model = build("mag")
    tokens = torch.arange(30) % 40
    *_, half = titans.stream(model, tokens[:13])
    *_, rest = titans.stream(model, tokens[13:], half.state)
    *_, whole = titans.stream(model, tokens)
    torch.testing.assert_close(rest.logits, whole.logits, rtol=1e-10, atol=1e-10)


def test_an_empty_stream_is_refused(without_shape_checks) -> None:
    with pytest.raises(ValueError, match="the text is empty"):
        list(titans.stream(build(), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"tokens must be of shape \(B, T\), got \(3,\)"):
        titans.prefill(build(), torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="piece must be at least 1"):
        list(titans.stream(build(), torch.ones(3, dtype=torch.long), piece=0))


def test_states_of_inference_can_be_trained_on_from() -> None:
    model = build("mal")
    *_, last = titans.stream(model, torch.arange(20))
    after = titans.generate(model, [[1, 2]], 3).states[0]
    for state in (last.state, titans.prefill(model, torch.arange(9)[None])[1], after):
        model.zero_grad()
        model(torch.arange(6)[None], state)[0].sum().backward()
        assert model.embedding.weight.grad.abs().sum() > 0


def test_generation_leaves_the_callers_random_numbers_alone() -> None:
    model = build()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    titans.generate(model, [[1, 2]], 3)
    assert torch.equal(torch.rand(3), expected)


def test_the_coldest_temperature_does_not_overflow() -> None:
    model = build()
    greedy = titans.generate(model, [[1, 2]], 5, sampling=GREEDY).tokens
    cold = titans.generate(model, [[1, 2]], 5, sampling=Sampling(temperature=1e-40, seed=0)).tokens
    assert cold == greedy


def test_streams_of_anything_but_tokens_are_refused() -> None:
    for bad in (torch.tensor([1.5, 2.5]), np.array([1.0]), torch.zeros(1, 1, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"tokens must be integers of shape"):
            list(titans.stream(build(), bad))
    with pytest.raises(ValueError, match="expected tensors or arrays of tokens, got int"):
        list(titans.stream(build(), iter([1, 2])))
