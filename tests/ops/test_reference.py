"""The reference against the paper's equations, written out again: one token, one head and one
sequence at a time, gradients by `torch.func.grad` on the loss itself, float64."""

import math

import pytest
import torch
from cases import DEEP, LINEAR, MLP, RESIDUAL, assert_same, build, pull_back, results
from torch.func import grad

from titans.ops import MemoryNetwork

THREE = MemoryNetwork(depth=3, expansion=2, activation="silu", residual=False, norm=False)
NORMED = MemoryNetwork(depth=1, residual=False, norm=True)


def memory(network, weights, x):
    """M(x) of one vector."""
    a = x
    for layer, weight in enumerate(weights):
        if layer > 0 and network.activation == "gelu":
            a = a * 0.5 * (1 + torch.erf(a / math.sqrt(2)))
        elif layer > 0:
            a = a / (1 + torch.exp(-a))
        a = a @ weight
    if network.norm:
        a = (a - a.mean()) / torch.sqrt(a.var(unbiased=False) + 1e-5)
    return x + a if network.residual else a


def loss(weights, network, key, value, objective):
    read = memory(network, weights, key)
    return -(read * value).sum() if objective == "dot" else 0.5 * (read - value).square().sum()


def literal(case):
    """Outputs and final weights (and momentum), by the names of `results`."""
    settings, network = case.settings, case.settings["network"]
    batch, length, heads, _ = case.tokens["keys"].shape
    layers = range(network.depth)

    def gate(name, layer, b, t, h):
        """One number, or one per input channel as a column."""
        given = case.tokens[name]
        value = (given if isinstance(given, torch.Tensor) else given[layer])[b, t, h]
        return value[:, None] if value.ndim else value

    outputs, finals = {}, {}
    for b in range(batch):
        for h in range(heads):
            rest = [
                0.0 if settings["anchor"] is None else settings["anchor"][layer][h]
                for layer in layers
            ]
            M = [rest[layer] + case.state.weights[layer][b, h] for layer in layers]
            held = case.state.base or case.state.weights
            base = [rest[layer] + held[layer][b, h] for layer in layers]
            past = case.state.momentum
            S = None if past is None else [past[layer][b, h] for layer in layers]
            for t in range(length):
                if (case.state.offset + t) % settings["chunk_size"] == 0:
                    base = list(M)  # eq. 16: M_{t'}
                q, k, v = (case.tokens[name][b, t, h] for name in ("queries", "keys", "values"))
                slopes = grad(loss)(base, network, k, v, settings["objective"])
                for layer in layers:
                    slope = slopes[layer]
                    if settings["max_surprise"] is not None:
                        slope = slope * (settings["max_surprise"] / slope.norm()).clamp(max=1.0)
                    step = -gate("learning_rate", layer, b, t, h) * slope
                    if S is not None:  # eq. 14
                        S[layer] = step = gate("momentum", layer, b, t, h) * S[layer] + step
                    keep = 1 - gate("decay", layer, b, t, h) if "decay" in case.tokens else 1.0
                    M[layer] = rest[layer] + keep * (M[layer] - rest[layer]) + step  # eq. 13
                outputs[b, t, h] = memory(network, M, q)  # eq. 15
            finals[b, h] = [M[layer] - rest[layer] for layer in layers], S

    def grid(entry):
        return torch.stack([torch.stack([entry(b, h) for h in range(heads)]) for b in range(batch)])

    found = {
        "output": grid(
            lambda b, h: torch.stack([outputs[b, t, h] for t in range(length)])
        ).transpose(1, 2)
    }
    for layer in layers:
        found[f"state.weights.{layer}"] = grid(lambda b, h, i=layer: finals[b, h][0][i])
        if case.state.momentum is not None:
            found[f"state.momentum.{layer}"] = grid(lambda b, h, i=layer: finals[b, h][1][i])
    return found


CASES = {
    "linear": {"network": LINEAR},
    "linear dot": {"network": LINEAR, "objective": "dot", "decay": "scalar"},
    "linear normed": {"network": NORMED, "momentum": True, "anchor": True},
    "linear all": {"network": LINEAR, "momentum": True, "decay": "channel", "anchor": True},
    "linear chunked": {"network": LINEAR, "momentum": True, "chunk_size": 3},
    "mlp": {"network": MLP, "decay": "scalar", "anchor": True, "chunk_size": 3, "offset": 2},
    "mlp bounded": {"network": MLP, "momentum": True, "max_surprise": 0.3},
    "residual": {"network": RESIDUAL, "momentum": True, "decay": "channel", "per_layer": True},
    "residual dot": {"network": RESIDUAL, "objective": "dot", "chunk_size": 5, "anchor": True},
    "three": {"network": THREE, "momentum": True, "decay": "scalar", "per_layer": True},
    "deep": {
        "network": DEEP,
        "momentum": True,
        "decay": "channel",
        "anchor": True,
        "per_layer": True,
        "chunk_size": 3,
        "max_surprise": 0.5,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_paper_in_values_and_in_every_gradient(name):
    case, leaves = build(length=5, **CASES[name]).with_gradients()
    expected = literal(case)
    everything = results(case("reference"))
    got = {key: everything[key] for key in expected}
    assert_same(got, expected, 1e-12)
    assert_same(pull_back(got, leaves), pull_back(expected, leaves))


@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_the_base_moves_at_chunk_boundaries_only(chunk_size):
    case = build(network=RESIDUAL, length=7, momentum=True, decay="scalar", chunk_size=chunk_size)
    expected = literal(case)
    got = results(case("reference"))
    assert_same({key: got[key] for key in expected}, expected, 1e-12)
    if chunk_size > 1:  # another base is another function
        other = literal(build(network=RESIDUAL, length=7, momentum=True, decay="scalar"))
        assert (other["output"] - expected["output"]).abs().max() > 1e-4


@pytest.mark.parametrize("network", [LINEAR, MLP, RESIDUAL], ids=["linear", "mlp", "residual"])
def test_surprise_is_the_norm_of_the_last_error(network):
    """At the last layer: |dl/dz| for the output z of the last matrix, as the docstring says."""
    case = build(network=network, length=1)
    W = [w[0, 0] for w in case.state.weights]
    k, v = case.tokens["keys"][0, 0, 0], case.tokens["values"][0, 0, 0]
    slope = grad(loss)(W, network, k, v, "l2")[-1]  # a^T delta
    a = k
    if network.depth == 2:
        z = k @ W[0]
        a = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    expected = slope.norm() / a.norm()
    torch.testing.assert_close(case("reference").surprise[0, 0, 0], expected)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_max_surprise_bounds_each_layers_gradient_and_spares_small_ones(impl):
    case = build(network=MLP, length=1).set("learning_rate", 1.0)
    before = case.state.weights

    def steps(limit):
        after = case(impl, max_surprise=limit).state.weights
        return [(a - b).flatten(2) for a, b in zip(after, before, strict=True)]

    free, limit = steps(None), 0.05
    bounded = steps(limit)
    norms = torch.cat([s.norm(dim=-1) for s in free])
    assert norms.min() > limit
    for one, other in zip(bounded, free, strict=True):
        torch.testing.assert_close(one.norm(dim=-1), torch.full(one.shape[:2], limit).double())
        torch.testing.assert_close(one / limit, other / other.norm(dim=-1, keepdim=True))
    for one, other in zip(steps(2 * norms.max().item()), free, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
