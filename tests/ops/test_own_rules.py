"""Rules of one's own by the ladder of the built-in one: the reference against their equations,
the closed form against the reference. The laws are in test_laws.py, models in test_own_models.py.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import LINEAR, MLP, RESIDUAL, assert_same, build, gradients, pull_back, results
from hypothesis import given, settings
from hypothesis import strategies as st
from own_rules import (
    ELASTIC,
    GATED,
    LOSSES,
    MUON,
    OMEGA,
    POLYNOMIAL,
    SCALED,
    SLOPES,
    atlas,
    miras,
    soft_threshold,
)
from torch.func import grad

from titans.distributed import neural_memory_sliced
from titans.ops import MemoryNetwork, Network, Retention, read_memory


def memory(network, W, x):
    """M(x) of one vector, by formulas of its own."""
    if network is POLYNOMIAL:
        products = torch.outer(x, x)
        upper = [products[i, j] * (1 if i == j else math.sqrt(2)) for i, j in pairs(len(x))]
        return torch.cat([x, torch.stack(upper)]) / math.sqrt(2) @ W[0]
    if network is GATED:
        gate = x @ W[0]
        y = (gate * torch.sigmoid(gate) * (x @ W[1])) @ W[2]
        return y + x[: len(y)]
    a = x @ W[0]
    if network.depth == 2:
        a = (a * 0.5 * (1 + torch.erf(a / math.sqrt(2)))) @ W[1]
    if network.norm:
        a = (a - a.mean()) / torch.sqrt(a.var(unbiased=False) + 1e-5)
    return x + a if network.residual else a


def pairs(size):
    return [(i, j) for i in range(size) for j in range(i, size)]


def orthogonal(matrix):
    """Newton-Schulz is a polynomial of the singular values, five times."""
    U, s, Vh = torch.linalg.svd(matrix / matrix.square().sum().sqrt(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return U @ torch.diag(s) @ Vh


def literal_step(optimizer, gradient, theta, eta, past):
    if optimizer is MUON:
        momentum = eta * past[0] + gradient
        return -theta * orthogonal(momentum), [momentum]
    if optimizer is SCALED:
        first, second = eta * past[0] + gradient, 0.9 * past[1] + gradient**2
        return -theta * first / (0.5 + second**2), [first, second]
    step = -theta * gradient + (eta * past[0] if past else 0.0)
    return step, [step] if past else []


def literal_weights(retention, held):
    if retention is None or retention is ELASTIC:
        return held
    if retention is miras.kl_divergence:  # by columns
        return torch.exp(held) / torch.exp(held).sum(0)
    return held / held.abs().pow(4).sum().pow(1 / 4) ** 2  # W = A / |A|_q^(q-2) with q = 4


def literal(case):
    """Outputs and final weights, one token, head and sequence at a time, by torch.func.grad."""
    options, network = case.settings, case.settings["network"]
    loss = next(
        (LOSSES[name] for name, slope in SLOPES.items() if slope is options["objective"]),
        lambda read, value: 0.5 * (read - value).square().sum(),
    )
    window = options.get("window", (1.0,))
    retention, optimizer = options.get("retention"), options.get("optimizer")
    batch, length, heads, _ = case.tokens["keys"].shape
    layers = range(network.depth)
    outputs, finals = {}, {}

    def gate(name, layer, b, t, h):
        given = case.tokens[name]
        value = (given if isinstance(given, torch.Tensor) else given[layer])[b, t, h]
        return value[:, None] if value.ndim else value

    def at(held, h):
        rest = options["anchor"]
        return [
            literal_weights(retention, held[i] if rest is None else rest[i][h] + held[i])
            for i in layers
        ]

    for b in range(batch):
        for h in range(heads):
            M = [w[b, h] for w in case.state.weights]
            base = [w[b, h] for w in case.state.base or case.state.weights]
            S = [s[b, h] for s in case.state.momentum or ()]
            seen = [(case.tokens["keys"][b, t, h], case.tokens["values"][b, t, h], 1.0)
                    for t in range(length)]  # fmt: skip
            recent = case.state.recent
            before = [] if recent is None else list(
                zip(recent.keys[b, h], recent.values[b, h], recent.present[b, h], strict=True)
            )  # fmt: skip
            seen = before + seen
            for t in range(length):
                if (case.state.offset + t) % options["chunk_size"] == 0:
                    base = list(M)

                def windowed(W, t=t, seen=seen, before=before):
                    """The window's losses, newest first."""
                    tokens = seen[: t + len(before) + 1][::-1][: len(window)]
                    return sum(
                        weight * present * loss(memory(network, W, k), v)
                        for weight, (k, v, present) in zip(window, tokens, strict=True)
                    )

                slopes = grad(windowed)(at(base, h))
                for i in layers:
                    theta = gate("learning_rate", i, b, t, h)
                    eta = gate("momentum", i, b, t, h) if "momentum" in case.tokens else None
                    past = S[i :: network.depth]
                    step, past = literal_step(optimizer, slopes[i], theta, eta, past)
                    S[i :: network.depth] = past
                    alpha = gate("decay", i, b, t, h) if "decay" in case.tokens else 0.0
                    M[i] = (1 - alpha) * M[i] + step
                    if retention is ELASTIC:
                        M[i] = M[i].sign() * torch.relu(M[i].abs() - 0.03)
                outputs[b, t, h] = memory(network, at(M, h), case.tokens["queries"][b, t, h])
            finals[b, h] = M, S

    def grid(entry):
        return torch.stack([torch.stack([entry(b, h) for h in range(heads)]) for b in range(batch)])

    found = {
        "output": grid(
            lambda b, h: torch.stack([outputs[b, t, h] for t in range(length)])
        ).transpose(1, 2)
    }
    for i in layers:
        found[f"state.weights.{i}"] = grid(lambda b, h, i=i: finals[b, h][0][i])
    for i in range(len(case.state.momentum or ())):
        found[f"state.momentum.{i}"] = grid(lambda b, h, i=i: finals[b, h][1][i])
    return found


MONETA = miras.q_norm(4)
EVERY = {"momentum": True, "decay": "scalar", "anchor": True, "chunk_size": 3, "offset": 1}
CASES = {
    "huber": {"network": RESIDUAL, "objective": SLOPES["huber"], "decay": "scalar"},
    "huber linear": {"network": LINEAR, "objective": SLOPES["huber"]},
    "l3": {"network": MLP, "objective": SLOPES["l3"], "momentum": True},
    "l1.5": {"network": LINEAR, "objective": SLOPES["l1.5"], "chunk_size": 3},
    "polynomial": {"network": POLYNOMIAL, "value_dim": 3, "decay": "channel"},
    "gated": {"network": GATED, "value_dim": 3, "objective": SLOPES["huber"], **EVERY},
    "omega": {"network": MLP, "window": OMEGA, "decay": "scalar"},
    "omega at boundaries": {"network": RESIDUAL, "window": OMEGA, **EVERY},
    "omega channels": {"network": LINEAR, "window": OMEGA, **EVERY, "decay": "channel"},
    "l4": {"network": RESIDUAL, "retention": MONETA, "decay": "scalar"},
    "kl": {"network": MLP, "retention": miras.kl_divergence, **EVERY},
    "elastic": {"network": MLP, "retention": ELASTIC, "decay": "channel"},
    "muon": {"network": MLP, "optimizer": MUON, "momentum": True, "decay": "scalar"},
    "scaled": {"network": RESIDUAL, "optimizer": SCALED, **EVERY},
    "everything": {
        "network": GATED,
        "value_dim": 3,
        "objective": SLOPES["huber"],
        "window": OMEGA,
        "retention": MONETA,
        "optimizer": SCALED,
        **EVERY,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_equations(name):
    case, leaves = build(length=5, **CASES[name]).with_gradients()
    expected = literal(case)
    everything = results(case("reference"))
    got = {key: everything[key] for key in expected}
    # A singular value decomposition costs digits, which the polynomial's slope at zero,
    # 3.4445^5 = 485, makes more of; its gradient costs more still.
    loose = "muon" in name
    assert_same(got, expected, 1e-10 if loose else 1e-12)
    slopes = pull_back(got, leaves), pull_back(expected, leaves)
    assert_same(*slopes, 1e-8 if loose else 1e-10)


def test_memora_is_its_equation():
    """Eq. 27 on the weights themselves, W = softmax((1 - alpha) log W - theta g), by columns."""
    case = build(network=LINEAR, batch=1, heads=1, decay="scalar", retention=miras.kl_divergence)
    got = case("reference")
    W = case.state.weights[0][0, 0].softmax(0)
    for t in range(case.length):
        q, k, v, theta, alpha = (
            case.tokens[name][0, t, 0]
            for name in ("queries", "keys", "values", "learning_rate", "decay")
        )
        slope = torch.outer(k, k @ W - v)
        W = torch.softmax((1 - alpha) * W.log() - theta * slope, 0)
        torch.testing.assert_close(got.output[0, t, 0], q @ W, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got.state.weights[0][0, 0].softmax(0), W)


def test_newton_schulz_is_near_the_orthogonal_factor():
    """For any shape and scale, head by head; its singular values come near 1."""
    torch.manual_seed(0)
    for shape in ((3, 5), (5, 3), (4, 4)):
        U, s, Vh = torch.linalg.svd(torch.randn(2, 2, *shape).double(), full_matrices=False)
        matrices = 7 * U @ torch.diag_embed(s.clamp(min=0.3 * s.amax().item())) @ Vh
        got = atlas.newton_schulz(matrices)
        for b in range(2):
            for h in range(2):
                torch.testing.assert_close(got[b, h], orthogonal(matrices[b, h]))
                U, _, Vh = torch.linalg.svd(matrices[b, h], full_matrices=False)
                assert (torch.linalg.svdvals(got[b, h]) - 1).abs().max() < 0.4
                assert torch.linalg.matrix_norm(got[b, h] - U @ Vh, 2) < 0.4
    assert torch.equal(atlas.newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_polynomial_features_are_the_kernel_of_their_inner_product():
    """<phi(x), phi(y)> = (<x, y> + <x, y>^2) / 2: unit vectors stay so."""
    x, y = torch.randn(2, 3, 6, dtype=torch.float64)
    features = [POLYNOMIAL.forward(lambda layer, a: a, z) for z in (x, y)]
    inner = (x * y).sum(-1)
    torch.testing.assert_close((features[0] * features[1]).sum(-1), (inner + inner**2) / 2)


class OwnMLP(Network):
    """RESIDUAL, whose error signals are written out, by its forward pass alone."""

    depth = 2
    shapes = RESIDUAL.shapes
    forward = RESIDUAL.forward
    activation, residual, norm, expansion = "gelu", True, True, 2


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_error_signals_of_autograd_are_those_written_out(impl):
    options = {"chunk_size": 3, "momentum": True, "decay": "scalar", "max_surprise": 0.3}
    expected = gradients(build(network=RESIDUAL, **options), impl)
    got = gradients(build(network=OwnMLP(), value_dim=4, **options), impl)
    for mine, theirs in zip(got, expected, strict=True):
        assert_same(mine, theirs, 1e-12)


@pytest.mark.parametrize("graph", [True, False])
def test_autograd_leaves_no_graph_where_none_is_wanted(graph):
    case = build(network=GATED, value_dim=3, chunk_size=2)
    if graph:
        case, _ = case.with_gradients()
    result = case("chunked")
    assert all(x.requires_grad == graph for x in results(result).values() if x is not result[2])


def test_gradients_of_gradients():
    """An outer objective may hold a gradient itself: twice differentiable."""
    small = build(
        network=GATED,
        batch=1,
        heads=1,
        key_dim=2,
        value_dim=2,
        length=2,
        window=(0.7, 0.3),
        objective=SLOPES["l3"],
    )
    case, leaves = small.with_gradients()
    values = list(leaves.values())

    def run(*tensors):
        at = dict(zip(leaves, tensors, strict=True))
        tokens = {name: at.get(name, x) for name, x in case.tokens.items()}
        weights = tuple(at[f"initial.weights.{i}"] for i in range(3))
        state = replace(case.state, weights=weights)
        return replace(case, tokens=tokens, state=state)("chunked").output

    assert torch.autograd.gradgradcheck(run, values, atol=1e-6, fast_mode=True)


@settings(max_examples=40)
@given(data=st.data())
def test_the_closed_form_is_the_reference(data):
    draw = data.draw
    network = draw(
        st.sampled_from(
            [
                LINEAR,
                MLP,
                RESIDUAL,
                GATED,
                POLYNOMIAL,
                MemoryNetwork(depth=3, expansion=2, activation="silu", norm=False, residual=False),
            ]
        ),
        "network",
    )
    chunk_size = draw(st.integers(1, 6), "chunk_size")
    window = draw(st.sampled_from([(1.0,), (0.6, 0.4), OMEGA, (0.2,) * 5]), "window")
    case = build(
        draw(st.integers(0, 99), "seed"),
        network=network,
        value_dim=4,
        length=draw(st.integers(1, 13), "length"),
        batch=draw(st.integers(1, 2), "batch"),
        momentum=draw(st.booleans(), "momentum"),
        decay=draw(st.sampled_from([None, "scalar", "channel"]), "decay"),
        per_layer=draw(st.booleans(), "per_layer"),
        anchor=draw(st.booleans(), "anchor"),
        objective=draw(st.sampled_from(["l2", "dot", *SLOPES.values()]), "objective"),
        chunk_size=chunk_size,
        offset=draw(st.integers(0, chunk_size - 1), "offset"),
        max_surprise=draw(st.sampled_from([None, 0.3]), "max_surprise"),
        window=window,
    )
    got, got_slopes = gradients(case, "chunked")
    expected, slopes = gradients(case, "reference")
    assert_same(got, expected)
    assert_same(got_slopes, slopes)


def test_a_window_of_zeros_behind_is_no_window():
    """Weights (1, 0, 0) are the built-in rule, with tokens in the state that count nothing."""
    plain = build(network=RESIDUAL, length=11, chunk_size=4, momentum=True, decay="scalar")
    wide = build(
        network=RESIDUAL,
        length=11,
        chunk_size=4,
        momentum=True,
        decay="scalar",
        window=(1.0, 0.0, 0.0),
    )
    wide = replace(wide, tokens=plain.tokens)
    wide = replace(wide, state=replace(plain.state, recent=wide.state.recent))
    expected = results(plain("chunked"))
    got = {name: x for name, x in results(wide("chunked")).items() if "recent" not in name}
    assert_same(got, expected, 1e-12)


def test_the_state_keeps_the_last_tokens_of_the_window():
    case = build(length=5, window=OMEGA)
    for impl in ("reference", "chunked"):
        recent = case(impl).state.recent
        assert torch.equal(recent.keys, case.tokens["keys"][:, -2:].transpose(1, 2))
        assert torch.equal(recent.values, case.tokens["values"][:, -2:].transpose(1, 2))
        assert (recent.present == 1).all()
        one = case.piece(0, 1)(impl).state.recent
        assert torch.equal(one.keys[:, :, 0], case.state.recent.keys[:, :, 1])
        assert torch.equal(one.present[:, :, 0], case.state.recent.present[:, :, 1])


def test_reading_alone_uses_the_retentions_weights():
    case = build(network=MLP, retention=MONETA, anchor=True)
    weights = [a + w for a, w in zip(case.settings["anchor"], case.state.weights, strict=True)]
    W = [literal_weights(MONETA, w[0, 0]) for w in weights]
    got = read_memory(
        case.tokens["queries"], case.state.weights, MLP, case.settings["anchor"], MONETA
    )
    torch.testing.assert_close(got[0, 3, 0], memory(MLP, W, case.tokens["queries"][0, 3, 0]))


REFUSED = {
    "native objective": (
        "native",
        {"objective": SLOPES["l3"]},
        "impl='native' has no objective of one's own; chunked and reference have it",
    ),
    "exact window": ("exact", {"window": OMEGA}, "impl='exact' has no window of one's own"),
    "compiled network": ("compile", {"network": GATED, "value_dim": 3}, "has no network of"),
    "chunked loop": (
        "chunked",
        {"retention": ELASTIC, "optimizer": SCALED, "momentum": True},
        "impl='chunked' has no retention and optimizer of one's own; reference has it",
    ),
    "triton": ("triton", {"objective": SLOPES["l3"]}, "impl='triton' has no objective"),
    "unknown": ("fast", {"objective": SLOPES["l3"]}, "impl must be one of auto, "),
}


@pytest.mark.parametrize(("impl", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_form_has_not_is_refused(impl, options, message, without_shape_checks):
    with pytest.raises(ValueError, match=message) as caught:
        build(**options)(impl)
    assert "\n" not in str(caught.value)


def test_auto_is_the_fastest_form_that_has_it():
    for name, form in (("omega", "chunked"), ("gated", "chunked"), ("muon", "reference")):
        case = build(**CASES[name])
        assert_same(results(case("auto")), results(case(form)), 0.0)


def test_states_that_do_not_fit_are_refused(without_shape_checks):
    wide, plain = build(window=OMEGA), build()
    bad = {
        "the state was made for a window of 3, got 1": replace(plain, state=wide.state),
        "the state was made for a window of 1, got 3": replace(wide, state=plain.state),
        "a window of one token must weigh it 1, got 0.5": replace(
            plain, settings={**plain.settings, "window": (0.5,)}
        ),
        "the weights of a window must be finite": replace(
            wide, settings={**wide.settings, "window": (1.0, math.nan, 1.0)}
        ),
        r"state.recent must have shapes \[\(2, 2, 2, 4\)": replace(
            wide, state=replace(wide.state, recent=wide.state.recent.map(lambda x: x[:1]))
        ),
        r"state.momentum must have shapes \[\(2, 2, 4, 3\), \(2, 2, 4, 3\)\], got \[": replace(
            build(momentum=True), settings={**plain.settings, "optimizer": SCALED}
        ),
    }
    for message, case in bad.items():
        with pytest.raises(ValueError, match=message):
            case("reference")


def test_a_loss_instead_of_its_slope_is_refused(without_shape_checks):
    case = build(objective=lambda read, value: (read - value).square().sum(-1))
    message = r"a slope of the prediction's shape \(2, 2, 1, 3\), got \(2, 2, 1\)"
    with pytest.raises(ValueError, match=message):
        case("auto")


def test_processes_do_not_share_a_text_with_it(without_shape_checks):
    case = build(window=OMEGA, optimizer=MUON, momentum=True)
    message = "several processes cannot share a text with window and optimizer of one's own"
    with pytest.raises(ValueError, match=message):
        neural_memory_sliced(None, **case.tokens, state=case.state, **case.settings)


def test_a_network_must_apply_every_layer(without_shape_checks):
    class Lazy(Network):
        depth = 2

        def shapes(self, key_dim, value_dim):
            return [(key_dim, value_dim), (key_dim, value_dim)]

        def forward(self, apply_layer, x):
            return apply_layer(0, x)

    message = r"forward of Lazy must apply the layers 0..1, it applied \[0\]"
    with pytest.raises(ValueError, match=message):
        build(network=Lazy(), value_dim=4)("chunked")


def test_a_network_applies_a_layer_once(without_shape_checks):
    """A layer that is met twice has two error signals, of which one would be lost."""

    class Twice(Network):
        depth = 1

        def shapes(self, key_dim, value_dim):
            return [(key_dim, value_dim)]

        def forward(self, apply_layer, x):
            return apply_layer(0, torch.tanh(apply_layer(0, x)))

    for impl in ("chunked", "reference"):
        with pytest.raises(ValueError, match="forward of Twice must apply layer 0 once"):
            build(network=Twice(), value_dim=4)(impl)


def test_soft_thresholds_forget_small_weights_for_good():
    """What the elastic net is for: after some tokens that write nothing, only large ones stay."""
    case = build(length=9, retention=Retention(update=soft_threshold)).set("learning_rate", 0.0)
    (before,), (after,) = case.state.weights, case("auto").state.weights
    small = before.abs() < 9 * 0.03
    assert small.any()
    assert torch.equal(after == 0, small)
    torch.testing.assert_close(after[~small].abs(), before[~small].abs() - 9 * 0.03)


def test_huber_withstands_an_outlier():
    """One value a hundred times too large moves the memory no further than delta."""
    case = build(length=1, objective=SLOPES["huber"]).set("learning_rate", 1.0)
    case = replace(case, tokens={**case.tokens, "values": case.tokens["values"] * 100})
    moved = case("auto").state.weights[0] - case.state.weights[0]
    torch.testing.assert_close(moved.flatten(2).norm(dim=-1), torch.full((2, 2), 0.6).double())
    plain = build(length=1).set("learning_rate", 1.0)
    plain = replace(plain, tokens=case.tokens)
    free = plain("auto").state.weights[0] - plain.state.weights[0]
    assert free.flatten(2).norm(dim=-1).min() > 10


def test_unit_keys_are_needed_by_nothing_here():
    """Muon's steps have one size, whatever the values': near-orthogonal matrices, times theta."""
    case = build(length=1, optimizer=MUON, momentum=True).set("learning_rate", 0.01)
    case = case.set("momentum", 0.0)
    for scale in (1.0, 1e4):
        scaled = {**case.tokens, "values": F.normalize(case.tokens["values"], dim=-1) * scale}
        moved = replace(case, tokens=scaled)("auto").state.weights[0] - case.state.weights[0]
        size = torch.linalg.matrix_norm(moved, 2)
        assert ((size > 0.006) & (size < 0.014)).all()
