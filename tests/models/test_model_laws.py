"""Laws that every model obeys: one pass = any split = token by token, causality, save and load."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, rms_norm, silu

import titans
from titans import MemoryConfig, ModelState, TitansConfig, TitansLM
from titans.baselines import BASELINES
from titans.config import VARIANTS
from titans.models.parts import Combine

VOCABULARY = 50
TOLERANCE = 1e-11  # float64; outputs are of order 1

LINEAR = MemoryConfig(heads=2)
DEEP = MemoryConfig(
    heads=2,
    depth=2,
    expansion=2,
    norm=True,
    residual=True,
    chunk_size=4,
    momentum=True,
    decay="channel",
    decay_rank=3,
    decay_target="zero",
    per_layer_gates=True,
    gates="sigmoid",
    dampen_momentum=False,
)
MEMORIES = {"linear": LINEAR, "deep": DEEP}
# A baseline's memory is what its variant says.
CASES = [(v, m) for v in VARIANTS for m in MEMORIES if not (v in BASELINES and m == "deep")]


def build(variant: str, memory: str = "linear", **changes: object) -> TitansLM:
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant,
        vocab_size=VOCABULARY,
        dim=16,
        layers=2,
        heads=2,
        ffn_hidden=24,
        window=7,
        segment=6,
        memory_token_stride=2,
        persistent=3,
        memory=MEMORIES[memory],
    )
    return TitansLM(replace(config, **changes)).double()


def some_tokens(batch: int = 2, length: int = 29, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def in_pieces(model: TitansLM, tokens: torch.Tensor, sizes: list[int]) -> tuple:
    state, logits = None, []
    for piece in tokens.split(sizes, 1):
        out, state = model(piece, state)
        logits.append(out)
    return torch.cat(logits, 1), state


def assert_equal_states(a: ModelState, b: ModelState, tolerance: float = TOLERANCE) -> None:
    mine, yours = a.tensors(), b.tensors()
    assert mine.keys() == yours.keys()
    assert a.position == b.position
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, yours[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(("variant", "memory"), CASES)
def test_decoding_token_by_token_equals_the_parallel_pass(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), some_tokens()
    parallel, state = model(tokens)
    decoded, after = in_pieces(model, tokens, [1] * tokens.shape[1])
    torch.testing.assert_close(decoded, parallel, rtol=TOLERANCE, atol=TOLERANCE)
    assert_equal_states(after, state)


@pytest.mark.parametrize(("variant", "memory"), CASES)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 28), min_size=1, max_size=6))
def test_any_split_equals_one_pass(variant: str, memory: str, cuts: set[int]) -> None:
    model, tokens = build(variant, memory), some_tokens()
    edges = [0, *sorted(cuts), 29]
    sizes = [b - a for a, b in pairwise(edges)]
    whole, state = model(tokens)
    pieces, after = in_pieces(model, tokens, sizes)
    torch.testing.assert_close(pieces, whole, rtol=TOLERANCE, atol=TOLERANCE)
    assert_equal_states(after, state)


@pytest.mark.parametrize(("variant", "memory"), CASES)
def test_the_future_changes_nothing_before_it(variant: str, memory: str) -> None:
    """Also the proof that MAC does not leak its segment: positions inside one are tried."""
    model, tokens = build(variant, memory), some_tokens()
    logits, _ = model(tokens)
    for position in (1, 5, 6, 8, 14, 28):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 7) % VOCABULARY
        after, _ = model(changed)
        before = slice(0, position)
        torch.testing.assert_close(after[:, before], logits[:, before], rtol=0, atol=1e-13)
        assert (after[:, position] - logits[:, position]).abs().max() > 1e-6


@pytest.mark.parametrize(("variant", "memory"), CASES)
def test_the_distant_past_matters_unless_attention_is_all(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), some_tokens(length=40)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 7) % VOCABULARY
    # Two layers of window 7 reach 12 tokens back at most.
    difference = (model(changed)[0] - model(tokens)[0])[:, 20:].abs().max()
    assert (difference == 0) if variant == "sliding" else (difference > 1e-9)


@pytest.mark.parametrize(("variant", "memory"), CASES)
def test_a_row_does_not_depend_on_the_others(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), some_tokens(batch=3)
    together, state = model(tokens)
    for row in range(3):
        alone, own = model(tokens[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=TOLERANCE, atol=TOLERANCE)
        assert_equal_states(own, state.map(lambda t, row=row: t[row : row + 1]))


@pytest.mark.parametrize(("variant", "memory"), CASES)
def test_right_padding_changes_nothing_before_it(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), some_tokens()
    padded = torch.nn.functional.pad(tokens, (0, 9))
    torch.testing.assert_close(
        model(padded)[0][:, :29], model(tokens)[0], rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize(("variant", "memory"), CASES)
def test_model_and_state_survive_a_file(variant: str, memory: str, tmp_path) -> None:
    model, tokens = build(variant, memory), some_tokens()
    _, state = model(tokens[:, :17])
    model.save(tmp_path / "m.safetensors")
    state.save(tmp_path / "s.memory")
    again = titans.load(tmp_path / "m.safetensors")
    back = ModelState.load(tmp_path / "s.memory")
    with torch.no_grad():
        assert torch.equal(again(tokens[:, 17:], back)[0], model(tokens[:, 17:], state)[0])


@pytest.mark.parametrize(("variant", "memory"), CASES)
def test_forks_go_their_own_ways(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), some_tokens()
    with torch.no_grad():
        _, state = model(tokens[:, :10])
        kept = state.map(torch.clone)
        model(some_tokens(seed=5), state.fork())
        assert_equal_states(state, kept, tolerance=0)
        expected = model(tokens)[0][:, 10:]
        torch.testing.assert_close(
            model(tokens[:, 10:], state)[0], expected, rtol=TOLERANCE, atol=TOLERANCE
        )


@pytest.mark.parametrize(("variant", "memory"), CASES)
def test_the_state_does_not_grow(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), some_tokens(length=40)
    with torch.no_grad():
        sizes = [model(tokens[:, :n])[1].nbytes for n in (1, 2, 6, 7, 8, 39, 40)]
    if variant == "transformer":  # the one exception: keys and values, 2 x 2 layers x 2 rows
        assert sizes == [8 * n * 16 * 8 for n in (1, 2, 6, 7, 8, 39, 40)]
    else:
        assert set(sizes) == {model.init_state(2).nbytes}


@pytest.mark.parametrize(("variant", "memory"), CASES)
def test_gradient_checkpointing_changes_no_gradient(variant: str, memory: str) -> None:
    """With the memory carried over two segments, where it is silently lost in other code."""
    tokens = some_tokens()

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = build(variant, memory)
        model.gradient_checkpointing = checkpointing
        first, state = model(tokens[:, :15])
        second, _ = model(tokens[:, 15:], state)
        logits = torch.cat([first, second], 1)
        cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return [p.grad for p in model.parameters()]

    for mine, yours in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(mine, yours, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant: str) -> None:
    model, tokens = build(variant), some_tokens()
    logits, _ = model(tokens)
    cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_the_map_after_the_product_can_be_left_out(variant: str) -> None:
    """o = y (x) M(y) as the paper has it goes into the residual stream as it is."""
    model, bare = build(variant), build(variant, combine_output=False)
    outputs = {n for n, _ in model.named_parameters() if "mixer.output" in n}
    assert len(outputs) == 2
    assert {n for n, _ in bare.named_parameters()} == {
        n for n, _ in model.named_parameters() if n not in outputs
    }
    shared = {n: p for n, p in model.state_dict().items() if n not in outputs}
    bare.load_state_dict(shared)
    with torch.no_grad():
        for name in outputs:
            model.get_parameter(name).copy_(torch.eye(16))
    tokens = some_tokens()
    torch.testing.assert_close(bare(tokens)[0], model(tokens)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_either_branch_can_be_the_gate(activation: str) -> None:
    """y act(m), or m act(y), of the normalised branches."""
    torch.manual_seed(0)
    y, m = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    act = {"silu": silu, "sigmoid": torch.sigmoid}[activation]
    for branch in ("memory", "attention"):
        config = TitansConfig(dim=16, gate_activation=activation, gate_branch=branch)
        combine = Combine(config).double()
        with torch.no_grad():
            combine.attention_norm.weight.fill_(2.0)
        a, b = 2 * rms_norm(y, (16,)), rms_norm(m, (16,))
        wanted = a * act(b) if branch == "memory" else b * act(a)
        torch.testing.assert_close(combine(y, m), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str) -> None:
    model = build(variant, layers=1, vocab_size=7, dim=4, ffn_hidden=4, persistent=1)
    tokens = some_tokens(batch=1, length=8) % 7
    names = [n for n, _ in model.named_parameters()]
    # Gates at their kinks and zero initial memories have no two-sided derivative.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "initial" in name:
                parameter.normal_(std=0.3)
    values = tuple(p.detach().clone().requires_grad_() for p in model.parameters())

    def loss(*parameters: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(
            model, dict(zip(names, parameters, strict=True)), tokens
        )
        return cross_entropy(logits[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    assert torch.autograd.gradcheck(loss, values, atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_writing_off_leaves_the_memory_alone(variant: str) -> None:
    model, tokens = build(variant), some_tokens()
    with torch.no_grad():
        _, state = model(tokens)
        _, after = model.forward(some_tokens(seed=9), state, write=False)
        _, written = model(some_tokens(seed=9), state)
    for before, read, wrote in zip(state.blocks, after.blocks, written.blocks, strict=True):
        assert torch.equal(before.memory.rule.weights[0], read.memory.rule.weights[0])
        assert not torch.equal(before.memory.rule.weights[0], wrote.memory.rule.weights[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_keeps_the_memory_in_float32(variant: str) -> None:
    model = build(variant).bfloat16()
    logits, state = model(some_tokens())
    assert logits.dtype == torch.bfloat16
    for name, tensor in state.tensors().items():
        if ".rule." in name or name.endswith(".memory"):
            assert tensor.dtype == torch.float32, name
    reference, _ = build(variant)(some_tokens())
    alike = torch.nn.functional.cosine_similarity(logits.double().flatten(), reference.flatten(), 0)
    assert alike > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["lmm", "mac", "deltanet"])
def test_decoding_in_half_precision_rounds_as_the_parallel_pass(variant: str, dtype) -> None:
    """The convolution of one token sums as wide as that of many. (Half an ulp of bf16 is 0.004.)"""
    model, tokens = build(variant).to(dtype), some_tokens()
    whole, _ = model(tokens)
    state, steps = None, []
    for t in range(tokens.shape[1]):
        logits, state = model(tokens[:, t : t + 1], state)
        steps.append(logits)
    apart = (torch.cat(steps, 1).double() - whole.double()).norm() / whole.double().norm()
    assert apart < (0.004 if dtype == torch.bfloat16 else 0.0005)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap
@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_models_can_be_traced(variant: str) -> None:
    """Their checks of values are for plain tensors: a gradient for each text, by torch.func."""
    model, tokens = build(variant), some_tokens()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        logits, _ = torch.func.functional_call(model, parameters, (row[None],))
        return logits.square().mean()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, tokens)
    for i, row in enumerate(tokens):
        model.zero_grad()
        model(row[None])[0].square().mean().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_bad_tokens_and_states_are_refused() -> None:
    model = build("mac")
    tokens = some_tokens()
    for bad, message in (
        (tokens[:, :0], r"tokens are empty: expected B, T >= 1, got \(2, 0\)"),
        (tokens[:0], r"tokens are empty"),
        (tokens[0], r"tokens must be integers of shape \(B, T\)"),
        (tokens.double(), r"tokens must be integers"),
        (tokens + VOCABULARY, "outside the vocabulary of 50"),
        (tokens - VOCABULARY, "token -[0-9]+ is outside the vocabulary of 50"),
    ):
        with pytest.raises(ValueError, match=message):
            model.check_tokens(bad)
    _, state = model(tokens)
    with pytest.raises(ValueError, match="the state is for a batch of 2, got tokens for 1"):
        model(tokens[:1], state)
    with pytest.raises(ValueError, match="this memory belongs to another model"):
        build("mac", window=9)(tokens, state)


def test_tokens_may_be_bytes() -> None:
    model, tokens = build("lmm"), some_tokens()
    assert torch.equal(model(tokens.to(torch.uint8))[0], model(tokens)[0])


def test_labels_have_the_shape_of_tokens(without_shape_checks) -> None:
    tokens = some_tokens()
    with pytest.raises(ValueError, match="tokens and labels must have one shape"):
        build("lmm").losses(tokens, tokens.T)


def test_labels_are_of_the_vocabulary_or_none() -> None:
    tokens = some_tokens()
    for wrong in (VOCABULARY, -1):
        labels = tokens.clone()
        labels[0, 1] = wrong
        with pytest.raises(ValueError, match=f"label {wrong} is outside the vocabulary of 50"):
            build("lmm").losses(tokens, labels)
    build("lmm").losses(tokens, torch.full_like(tokens, -100))


def test_a_whole_number_for_a_float_is_the_same_model(tmp_path, without_shape_checks) -> None:
    """Its hash is that of the model read back from a file, or its own memories were refused."""
    memory = MemoryConfig(max_surprise=1, half_life_min=16)
    model = TitansLM(TitansConfig(variant="lmm", dim=16, layers=1, rope_base=10000, memory=memory))
    tokens = some_tokens()
    _, state = model.eval()(tokens)
    model.save(tmp_path / "m.safetensors")
    state.save(tmp_path / "s.memory")
    again = titans.load(tmp_path / "m.safetensors")
    again(tokens, ModelState.load(tmp_path / "s.memory"))
    assert again.config.hash() == model.config.hash()


def test_a_wrong_model_file_is_one_clear_line(tmp_path) -> None:
    model = build("mal")
    path = tmp_path / "m.safetensors"
    model.save(path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="no such file"):
        titans.load(tmp_path / "absent.safetensors")
    _, state = model(some_tokens())
    state.save(tmp_path / "s.memory")
    with pytest.raises(ValueError, match="not a model file"):
        titans.load(tmp_path / "s.memory")
    with pytest.raises(ValueError, match="not a memory file"):
        ModelState.load(path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        titans.load(tmp_path / "text")
    for cut in (10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            titans.load(path)
    flipped = bytearray(content)
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="damaged model file"):
        titans.load(path)


def test_models_can_be_saved_smaller(tmp_path) -> None:
    model = build("mag").float()
    model.save(tmp_path / "half.safetensors", dtype=torch.bfloat16)
    model.save(tmp_path / "whole.safetensors")
    half, whole = (tmp_path / n for n in ("half.safetensors", "whole.safetensors"))
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    loaded = titans.load(half)
    for mine, yours in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, yours.bfloat16().float())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_holds_no_more_than_it_says(variant: str) -> None:
    """A view into the text's activations would keep all of them alive."""
    model = build(variant)
    with torch.no_grad():
        _, state = model(some_tokens(length=400))
    held = [t.untyped_storage() for t in state.tensors().values()]
    storages = {storage.data_ptr(): storage for storage in held}
    assert sum(s.nbytes() for s in storages.values()) <= 1.1 * state.nbytes


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_changes_neither_size_nor_precision_of_the_state(variant: str) -> None:
    model = build(variant).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, state = model(some_tokens())
    if variant != "transformer":
        assert state.nbytes == model.init_state(2).nbytes
    assert {t.dtype for t in state.tensors().values()} == {torch.float32}


def test_states_of_another_precision_are_refused() -> None:
    model = build("mal")
    _, state = model(some_tokens())
    with pytest.raises(ValueError, match=r"the state is torch.float64, this model needs"):
        build("mal").float()(some_tokens(), state)


@pytest.mark.parametrize("length", [3, 8, 29])
def test_losses_in_pieces_are_the_whole(length, monkeypatch):
    """Values and every gradient; the labels that count are those that are not ignored."""
    model = build("mal")
    tokens, labels = some_tokens(length=length), some_tokens(length=length, seed=2)
    labels[0, 0] = -100

    def read():
        model.zero_grad()
        output = model.losses(tokens, labels)
        (output.nll * torch.linspace(0.5, 1.5, length)).sum().backward()
        return output, [p.grad.clone() for p in model.parameters()]

    whole, slopes = read()
    logits, state = model(tokens)
    expected = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(whole.nll, expected, rtol=0, atol=TOLERANCE)
    assert whole.nll[0, 0] == 0
    assert torch.equal(whole.likeliest, logits.argmax(-1))
    monkeypatch.setattr("titans.models.lm.LOGITS", 4 * VOCABULARY)
    pieces, again = read()
    torch.testing.assert_close(pieces.nll, whole.nll, rtol=0, atol=TOLERANCE)
    assert torch.equal(pieces.likeliest, whole.likeliest)
    for a, b in zip(again, slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
    for name, tensor in state.tensors().items():
        assert torch.equal(pieces.state.tensors()[name], tensor)


def test_losses_in_pieces_keep_no_logits(monkeypatch):
    """What waits for the backward pass does not grow with the vocabulary times the tokens."""
    kept = {}
    for limit in (4 * 5000, 2**24):
        monkeypatch.setattr("titans.models.lm.LOGITS", limit)
        model = build("mal", vocab_size=5000)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.losses(some_tokens(), some_tokens(seed=2))
        kept[limit] = max(size for size in sizes if size != 5000 * 16)  # but for the head itself
    assert kept[2**24] == 2 * 29 * 5000
    assert kept[4 * 5000] < 4 * 5000


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_of_half_precision_is_read_on_with_in_full(variant: str) -> None:
    """Its tails and keys do not stay rounded at each piece's end."""
    model, tokens = build(variant).float(), some_tokens()
    _, state = build(variant).bfloat16()(tokens[:, :7])
    at_once, last = model(tokens[:, 7:], state)
    first, middle = model(tokens[:, 7:12], state)
    rest, _ = model(tokens[:, 12:], middle)
    torch.testing.assert_close(torch.cat([first, rest], 1), at_once, rtol=1e-4, atol=1e-4)
    assert not [name for name, t in last.tensors().items() if t.dtype == torch.bfloat16]
