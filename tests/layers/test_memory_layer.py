"""NeuralMemory: its parts in the stated order, gates that close, splits, precision, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from titans import MemoryConfig, NeuralMemory, TitansConfig, TitansLM
from titans.ops import neural_memory, read_memory

DIM, HEADS = 12, 2

CONFIGS = {
    "default": {},
    "momentum": {"momentum": True},
    "letter of v1": {
        "depth": 2,
        "activation": "silu",
        "gates": "sigmoid",
        "momentum": True,
        "dampen_momentum": False,
        "decay_target": "zero",
        "chunk_size": 3,
        "max_surprise": 1.0,
    },
    "letter of NeurIPS": {
        "depth": 2,
        "residual": True,
        "norm": True,
        "gates": "sigmoid",
        "momentum": True,
        "decay": "channel",
        "decay_rank": 3,
        "decay_target": "zero",
        "per_layer_gates": True,
        "chunk_size": 3,
    },
    "tied, per channel and layer": {
        "depth": 3,
        "residual": True,
        "norm": True,
        "decay": "channel",
        "per_layer_gates": True,
        "chunk_size": 4,
    },
    "bare": {
        "decay": "none",
        "conv_width": 0,
        "qkv_activation": "none",
        "output_gate": False,
        "objective": "dot",
        "head_dim": 5,
    },
}
every_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())


def layer_of(dtype=torch.float64, noise=0.3, **options):
    """A layer away from its initial values, where many weights are zero."""
    torch.manual_seed(0)
    options = {"learning_rate_max": 0.5, "half_life_min": 4.0, "half_life_max": 64.0, **options}
    layer = NeuralMemory(MemoryConfig(dim=DIM, heads=HEADS, expansion=2, **options)).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p += noise * torch.randn_like(p)
    return layer


def text(length, batch=2, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, DIM, generator=generator, dtype=torch.float64).to(dtype)


def literal_gates(layer, x):
    """theta, eta, alpha as lists over layers, from the formulas in the config's docstrings."""
    c, gates = layer.config, layer.gates
    sets = c.depth if c.per_layer_gates else 1
    width = c.key_dim if c.decay == "channel" else 1
    raw = gates.map(x)
    if c.decay_rank is not None:
        raw = torch.cat([raw, gates.expand(gates.squeeze(x))], -1)
    count = sets * HEADS
    rate = raw[..., :count].unflatten(-1, (sets, HEADS))
    fraction = rate.sigmoid()
    if c.gates == "closing":
        fraction = (1.3 * fraction - 0.15).clamp(0, 1)
    theta, eta, alpha = fraction * c.learning_rate_max, None, None
    raw = raw[..., count:]
    if c.momentum:
        eta = raw[..., :count].sigmoid().unflatten(-1, (sets, HEADS))
        theta = theta * (1 - eta) ** 2 if c.dampen_momentum else theta
        raw = raw[..., count:]
    if c.decay != "none":
        raw = raw.unflatten(-1, (sets, HEADS, width))
        if c.gates == "sigmoid":
            alpha = raw.sigmoid()
        else:
            tied = fraction[..., None] if c.tie_forgetting else 1.0
            alpha = 1 - torch.exp(-tied * F.softplus(raw))

    def per_layer(gate):
        return [gate[:, :, i % sets] for i in range(c.depth)]

    def decay(i):
        if c.decay == "scalar":
            return alpha[:, :, i % sets, :, 0]
        return alpha[:, :, i % sets].repeat(1, 1, 1, 1 if i == 0 else c.expansion)

    return (
        per_layer(theta),
        None if eta is None else per_layer(eta),
        None if alpha is None else [decay(i) for i in range(c.depth)],
    )


def literal_projections(layer, x):
    """q, k, v (B, T, H, D): linear, causal convolution, activation, unit norm of q and k."""
    c = layer.config
    z = x @ layer.qkv.weight.T
    if c.conv_width:
        rows = []
        for t in range(x.shape[1]):
            taps = [
                layer.conv.weight[c.conv_width - 1 - back] * z[:, t - back]
                for back in range(min(c.conv_width, t + 1))
            ]
            rows.append(sum(taps) + layer.conv.bias)
        z = torch.stack(rows, 1)
    if c.qkv_activation == "silu":
        z = z * z.sigmoid()
    q, k, v = z.unflatten(-1, (3, HEADS, c.key_dim)).unbind(2)
    return q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v


def literal_output(layer, read, x):
    """RMSNorm per head, times silu of a linear map of the input, then the output projection."""
    rms = (read.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    y = (read / rms * layer.norm.weight).flatten(2)
    if layer.output_gate is not None:
        gate = x @ layer.output_gate.weight.T
        y = y * gate * gate.sigmoid()
    return y @ layer.output.weight.T


@every_config
def test_equals_its_parts_in_order(options):
    layer, x = layer_of(**options), text(9)
    c, start = layer.config, layer.init_state(2)
    y, state, record = layer.run(x, start)
    q, k, v = literal_projections(layer, x)
    theta, eta, alpha = literal_gates(layer, x)
    anchored = c.decay != "none" and c.decay_target == "initial"
    expected = neural_memory(
        q,
        k,
        v,
        theta,
        state=start.rule,
        network=layer.network,
        momentum=eta,
        decay=alpha,
        objective=c.objective,
        chunk_size=c.chunk_size,
        anchor=list(layer.initial) if anchored else None,
        max_surprise=c.surprise_limit,
        impl="reference",
    )
    torch.testing.assert_close(y, literal_output(layer, expected.output, x), rtol=1e-10, atol=1e-12)
    assert_same(state.rule.tensors(), expected.state.tensors(), 1e-10)
    torch.testing.assert_close(record.surprise, expected.surprise, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(record.learning_rate, torch.stack(theta).mean(0))
    if eta is not None:
        torch.testing.assert_close(record.momentum, torch.stack(eta).mean(0))
    if alpha is not None:
        means = [a.mean(-1) if a.ndim == 4 else a for a in alpha]
        torch.testing.assert_close(record.decay, torch.stack(means).mean(0))


@every_config
def test_begins_at_the_learned_weights(options):
    """The first state holds M_0 itself, or no deviation from it where M_0 is the anchor."""
    layer = layer_of(**options)
    weights = layer.init_state(3).rule.weights
    for first, held in zip(layer.initial, weights, strict=True):
        expected = torch.zeros_like(first) if layer.anchored else first
        assert torch.equal(held, expected.expand(3, *first.shape))
    y, _ = layer(text(5))
    assert torch.equal(y, layer(text(5), layer.init_state(2))[0])


@settings(max_examples=40)
@given(data=st.data())
def test_any_split_is_one_pass(data):
    """Through the convolution's tail and inside chunks."""
    options = CONFIGS[data.draw(st.sampled_from(list(CONFIGS)))]
    length = data.draw(st.integers(2, 12))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), min_size=1)))
    layer, x = layer_of(**options), text(length)
    y, whole = layer(x)
    pieces, state = [], layer.init_state(2)
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        piece, state = layer(x[:, start:stop], state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), y, rtol=1e-10, atol=1e-12)
    assert_same(state.tensors(), whole.tensors(), 1e-10)


@every_config
def test_every_parameter_learns(options):
    layer = layer_of(noise=0.05, **options)
    y, _ = layer(text(9))
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.abs().max() > 0, name


def set_gates(layer, **biases):
    """Gate pre-activations at constants, whatever the input."""
    c = layer.config
    count = HEADS * (c.depth if c.per_layer_gates else 1)
    spans = {"rate": slice(0, count), "momentum": slice(count, count * (1 + c.momentum))}
    spans["decay"] = slice(spans["momentum"].stop, None)
    with torch.no_grad():
        layer.gates.map.weight.zero_()
        for name, value in biases.items():
            layer.gates.map.bias[spans[name]] = value
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closing_gates_reach_both_ends_exactly(dtype):
    layer = layer_of(dtype, learning_rate_max=0.7)
    for raw, end in ((-3.0, 0.0), (3.0, 0.7)):  # not at infinity: at 3 already
        theta, _, _ = set_gates(layer, rate=raw).gates(text(4, dtype=dtype))
        assert torch.equal(theta, torch.full_like(theta, end))
    theta, _, _ = set_gates(layer, rate=0.0).gates(text(4, dtype=dtype))
    torch.testing.assert_close(theta, torch.full_like(theta, 0.7 * 0.5))


def test_forgetting_reaches_far_below_single_precision_of_one():
    """alpha of 1e-9 a token, in float32: its memory half-life is 690 million tokens."""
    layer = set_gates(layer_of(torch.float32), rate=5.0, decay=math.log(1e-9))
    _, _, alpha = layer.gates(text(4, dtype=torch.float32))
    torch.testing.assert_close(alpha, torch.full_like(alpha, 1e-9), rtol=1e-5, atol=0)
    # ... and the rule does not lose it: 1,000 tokens of 1e-6 take away a thousandth.
    layer = set_gates(
        layer_of(torch.float32, decay_target="zero", tie_forgetting=False),
        rate=-5.0,
        decay=math.log(1e-6),
    )
    start = layer.init_state(1)
    _, after = layer(text(1000, 1, dtype=torch.float32), start)
    lost = 1 - after.rule.weights[0] / start.rule.weights[0]
    torch.testing.assert_close(lost, torch.full_like(lost, 1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["default", "tied, per channel and layer"])
def test_a_token_that_writes_nothing_forgets_nothing(name):
    """Tied forgetting: theta = 0 makes alpha 0 exactly, and the memory stays bit for bit."""
    layer = layer_of(torch.float32, **CONFIGS[name])
    _, state = layer(text(8, dtype=torch.float32))
    closed = set_gates(layer, rate=-5.0, decay=2.0)
    x = text(8, seed=3, dtype=torch.float32)
    theta, _, alpha = closed.gates(x)
    for gate in (theta, alpha):
        for one in [gate] if isinstance(gate, torch.Tensor) else gate:
            assert (one == 0).all()
    _, after = closed(x, state)
    for before, now in zip(state.rule.weights, after.rule.weights, strict=True):
        assert before.abs().max() > 0
        assert torch.equal(before, now)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_forgetting": False},
        {"gates": "sigmoid"},
        {"decay": "channel", "depth": 2, "per_layer_gates": True},
        {"decay": "channel", "decay_rank": 2},
    ],
    ids=str,
)
def test_half_lives_of_a_fresh_layer(options):
    """Spread evenly in log space over the heads. A full write is theta = its maximum."""
    layer = NeuralMemory(
        MemoryConfig(dim=8, heads=4, half_life_min=10.0, half_life_max=80_000.0, **options)
    )
    x = torch.randn(2, 3, 8)
    theta, _, alpha = layer.gates(x)
    rates = theta if isinstance(theta, list) else [theta] * layer.config.depth
    decays = alpha if isinstance(alpha, list) else [alpha] * layer.config.depth
    expected = torch.tensor([10.0, 200.0, 4_000.0, 80_000.0])
    for rate, decay in zip(rates, decays, strict=True):
        rate = rate / layer.config.learning_rate_limit
        torch.testing.assert_close(rate, torch.full_like(rate, 0.2))
        lives = -math.log(2.0) / torch.log1p(-decay.double())
        if layer.config.gates == "closing" and layer.config.tie_forgetting:
            lives = lives * (rate if decay.ndim == 3 else rate[..., None])
        by_head = lives if decay.ndim == 3 else lives.movedim(-1, 0)
        torch.testing.assert_close(by_head, expected.double().expand_as(by_head), rtol=1e-5, atol=0)


def test_one_head_starts_with_a_half_life_between_the_two():
    gates = NeuralMemory(MemoryConfig(dim=8, heads=1, half_life_min=10.0, half_life_max=1e5)).gates
    assert math.log(2.0) / float(gates.initial_forgetting()) == pytest.approx(1_000.0)


@every_config
def test_without_writing_the_memory_is_read_and_kept(options):
    layer = layer_of(**options)
    _, state = layer(text(7))
    x = text(5, seed=4)
    y, after, record = layer.run(x, state, write=False)
    assert after.rule is state.rule
    q = literal_projections(layer, torch.cat([text(7), x], 1))[0][:, 7:]  # the tail is read on
    read = read_memory(q, state.rule.weights, layer.network, layer.anchor())
    torch.testing.assert_close(y, literal_output(layer, read, x), rtol=1e-10, atol=1e-12)
    assert (record.learning_rate == 0).all()
    assert (record.surprise == 0).all()
    if state.tail is not None:
        assert torch.equal(after.tail, layer(x, state)[1].tail)


@every_config
def test_recall_reads_given_weights(options):
    """By the queries alone, with a convolution tail of their own; any split is one pass."""
    layer = layer_of(**options)
    _, state = layer(text(7))
    x, weights = text(5, seed=4), state.rule.weights
    queries, _ = layer.recall_queries(x, layer.init_recall_tail(2))
    y = layer.recall(queries, layer.opening(x), weights)
    q = literal_projections(layer, x)[0]
    read = read_memory(q, weights, layer.network, layer.anchor())
    torch.testing.assert_close(y, literal_output(layer, read, x), rtol=1e-10, atol=1e-12)
    first, tail = layer.recall_queries(x[:, :2], layer.init_recall_tail(2))
    rest, _ = layer.recall_queries(x[:, 2:], tail)
    torch.testing.assert_close(torch.cat([first, rest], 1), queries, rtol=1e-10, atol=1e-12)


@every_config
def test_a_bfloat16_model_keeps_a_float32_memory(options):
    layer = layer_of(torch.float32, noise=0.05, **options)
    x = text(8, dtype=torch.float32)
    y, state = layer(x)
    half = layer.bfloat16()
    got, low = half(x.bfloat16())
    assert got.dtype == torch.bfloat16
    for name, tensor in low.rule.tensors().items():
        assert tensor.dtype == torch.float32, name
    # bfloat16 has 8 bits: 2^-8 an operation, a dozen operations on the way.
    assert (got.float() - y).norm() < 0.1 * y.norm()
    for name, tensor in state.rule.tensors().items():
        if tensor.norm() > 0:
            assert (low.rule.tensors()[name] - tensor).norm() < 0.1 * tensor.norm(), name


def test_errors_name_what_was_expected_and_what_came(without_shape_checks):
    layer = layer_of(momentum=True)
    with pytest.raises(ValueError, match=r"expected x of shape \(B, T, 12\), got \(2, 3, 11\)"):
        layer(torch.zeros(2, 3, 11, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected x of shape \(B, T, 12\), got \(3, 12\)"):
        layer(torch.zeros(3, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match="the sequence is empty: expected T >= 1 tokens"):
        layer(torch.zeros(2, 0, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match="the state is for a batch of 3, got x for 2"):
        layer(text(3), layer.init_state(3))
    with pytest.raises(ValueError, match="momentum is given but the state holds none"):
        layer(text(3), layer_of().init_state(2))
    with pytest.raises(ValueError, match="the state was made for chunk_size above 1, got 1"):
        layer(text(3), layer_of(momentum=True, chunk_size=4).init_state(2))
    with pytest.raises(ValueError, match="impl='exact' needs a linear memory"):
        layer_of(depth=2, impl="exact")(text(3))


BAD_CONFIGS = {
    "heads": ({"dim": 10, "heads": 3}, r"dim \(10\) must be a multiple of heads \(3\)"),
    "depth": ({"depth": 0}, "depth must be at least 1, got 0"),
    "chunk": ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    "conv": ({"conv_width": -1}, "conv_width must not be negative, got -1"),
    "keys": ({"conv_width": 1, "key_init": "previous"}, "a convolution of at least 2 tokens"),
    "rate init": ({"learning_rate_init": 1.0}, r"must lie in \(0, 1\)"),
    "momentum init": ({"momentum_init": 0.0}, r"must lie in \(0, 1\)"),
    "half-lives": ({"half_life_min": 9.0, "half_life_max": 8.0}, "half_life_min <= half_life_max"),
    "rate": ({"learning_rate_max": 0.0}, "learning_rate_max must be positive"),
    "surprise": ({"max_surprise": -1.0}, "max_surprise must not be negative"),
}


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_configs_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralMemory(MemoryConfig(**options))


@pytest.mark.parametrize("within_a_model", [False, True])
def test_keys_may_start_as_the_queries_of_the_token_before(within_a_model):
    memory = MemoryConfig(dim=DIM, heads=HEADS, conv_width=5, key_init="previous")
    layer = NeuralMemory(memory).double()
    if within_a_model:  # which initialises its linear maps itself
        layer = TitansLM(TitansConfig(variant="lmm", dim=DIM, layers=1, memory=memory)).double()
        layer = layer.blocks[0].mixer.memory
    (queries, keys, values), _, _ = layer.mix(text(9), layer.conv.init_tail(2).double())
    torch.testing.assert_close(keys[:, 1:], queries[:, :-1])
    assert (values[:, 1:] - queries[:, :-1]).abs().max() > 0.1


def test_non_finite_input_is_refused_before_it_is_remembered():
    for bad in (torch.nan, torch.inf):
        x = text(3)
        x[0, 1, 0] = bad
        with pytest.raises(ValueError, match="x holds a non-finite number"):
            layer_of()(x)


def test_states_of_other_layers_are_refused():
    x = text(3)
    with_conv, without = layer_of(), layer_of(conv_width=0)
    _, state = with_conv(x)
    for layer, foreign, message in (
        (without, state, "convolution tail must be None"),
        (with_conv, without(x)[1], "convolution tail must be .*, got None"),
        (layer_of(conv_width=3), state, "convolution tail must be"),
        (with_conv, state.map(torch.Tensor.float), "the state is torch.float32"),
        (layer_of(depth=2), state, "the state's weights must have shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, foreign)
        with pytest.raises(ValueError, match=message):
            layer.run(x, foreign, write=False)
