"""An implementation written by others: titans-pytorch 0.5.5, in float64, within 1e-10.

Its `NeuralMemory` runs on a random sequence with random projections and gates; its projected
keys, values, queries and gates are handed to our op, its initial memory weights too. Retrieved
values, final weights and final momentum must agree. How its settings map to ours:

- `chunk_size=1`: its chunk is the span over which gates and values are pooled; ours never pools.
- `batch_size=C`: its gradients are taken at the weights of the last multiple of C, which is our
  `chunk_size=C`. 1 is the token-by-token rule.
- `store_memory_loss_fn`: summed over features, not its default mean. Its |M(k) - v|^2 has no
  half, so our theta is twice its adaptive step.
- Its "surprises" are negative gradients already multiplied by the step; momentum runs over
  those, so S has our sign. `to_momentum` gives eta, `to_decay_factor` gives alpha, by sigmoid.
- It stores a whole sequence first and keeps all versions of the weights; query t then reads
  version t + 1 of T + 1, that is after token t was written: our order.
- `mem_model_norm_add_residual=False`, since its ResidualNorm has a gain that is a memory weight
  and is written at test time; ours has none. M(x) = x + LN(MLP(x)) is compared through `model=`.
- `per_parameter_lr_modulation`: a sigmoid per layer that scales theta; our gates per layer.
- `pre_rmsnorm`, `post_rmsnorm`, `qk_rmsnorm` off. heads=1: more add an output gate and a map.
- Its MemoryMLP has GELU (erf) between x @ W layers without biases: our network, same layout.
"""

import pytest
import torch
from cases import assert_same
from titans_pytorch import NeuralMemory
from titans_pytorch.memory_models import MemoryMLP
from torch import nn

from titans.ops import MemoryNetwork, RuleState, neural_memory

DIM, LENGTH = 6, 10
LINEAR = MemoryNetwork(depth=1, residual=False, norm=False)
MLP = MemoryNetwork(depth=2, expansion=2, residual=False, norm=False)
RESIDUAL = MemoryNetwork(depth=2, expansion=2, residual=True, norm=True)


class ResidualNormWithoutGain(nn.Module):
    """Theirs, less the gain that learns at test time."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return x + nn.functional.layer_norm(self.model(x), x.shape[-1:], eps=1e-5)


def summed_loss(prediction, target):
    return (prediction - target).square().sum(-1)


def oracle(network, batch_size, momentum, per_layer):
    torch.manual_seed(3)
    model = MemoryMLP(DIM, depth=network.depth, expansion_factor=float(network.expansion))
    theirs = NeuralMemory(
        DIM,
        heads=1,
        chunk_size=1,
        batch_size=batch_size,
        model=ResidualNormWithoutGain(model) if network.residual else model,
        store_memory_loss_fn=summed_loss,
        default_step_transform_max_lr=0.2,
        momentum=momentum,
        per_parameter_lr_modulation=per_layer,
        pre_rmsnorm=False,
        mem_model_norm_add_residual=False,
    )
    return theirs.double()


def ours(theirs, x, network, batch_size):
    """The same sequence through our op, with everything learned taken from `theirs`."""
    batch = x.shape[0]

    def head(projected):
        return projected[:, :, None]  # (B, T, D) -> (B, T, 1, D)

    theta = theirs.adaptive_step_transform(theirs.to_adaptive_step(x))[:, :, None] * 2
    if theirs.to_layer_modulation is not None:
        theta = [theta * scale[:, :, None] for scale in theirs.to_layer_modulation(x)]
    eta = None if theirs.to_momentum is None else theirs.to_momentum(x)[0].sigmoid()
    state = RuleState.init(
        list(theirs.memory_model_parameters),
        batch,
        momentum=eta is not None,
        chunk_size=batch_size,
    )
    return neural_memory(
        head(theirs.to_queries(x)),
        head(theirs.to_keys(x)),
        head(theirs.to_values(x)),
        theta,
        state=state,
        network=network,
        momentum=eta,
        decay=theirs.to_decay_factor(x).sigmoid(),
        chunk_size=batch_size,
    )


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize(
    ("network", "per_layer"),
    [(LINEAR, False), (MLP, False), (MLP, True), (RESIDUAL, False)],
    ids=["linear", "mlp", "mlp per layer", "residual"],
)
def test_agrees_with_titans_pytorch(network, per_layer, momentum, batch_size):
    theirs = oracle(network, batch_size, momentum, per_layer)
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    retrieved, after = theirs(x)
    weights, momenta = after.states

    got = ours(theirs, x, network, batch_size)
    actual = {"output": got.output[:, :, 0]}
    expected = {"output": retrieved}
    for layer, name in enumerate(theirs.memory_model_parameter_names):
        actual[f"weights {layer}"] = got.state.weights[layer][:, 0]
        expected[f"weights {layer}"] = weights[name]
        if momentum:
            actual[f"momentum {layer}"] = got.state.momentum[layer][:, 0]
            expected[f"momentum {layer}"] = momenta[name][0]
    assert_same(actual, expected, 1e-10)

    learned = (weights[name] - theirs.memory_model_parameters[-1]).abs().max()
    assert learned > 1e-2, "the comparison would hold for a memory that never writes"


def test_outer_gradients_agree_with_titans_pytorch():
    """What a training step sees: d loss / d (projections, gates, initial memory)."""
    theirs = oracle(MLP, 4, True, False)
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    used = {
        name: p
        for name, p in theirs.named_parameters()
        if name.startswith(("to_", "memory_model_parameters"))
    }
    weight = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    slopes = [
        torch.autograd.grad((output * weight).sum(), list(used.values()))
        for output in (ours(theirs, x, MLP, 4).output[:, :, 0], theirs(x)[0])
    ]
    assert_same(*(dict(zip(used, s, strict=True)) for s in slopes), 1e-10)
