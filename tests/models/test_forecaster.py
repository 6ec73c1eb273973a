"""The forecaster's parts against their formulas, and what its output may depend on."""

import pytest
import torch
import torch.nn.functional as F

from titans.models.baselines.dlinear import DLinear
from titans.models.forecaster import (
    Attention,
    Forecaster,
    ForecasterConfig,
    denormalise,
    normalise,
)

SMALL = {"lookback": 24, "horizon": 5, "patch": 4, "dim": 8, "ffn_hidden": 12}


def made(**changes) -> Forecaster:
    torch.manual_seed(0)
    model = Forecaster(ForecasterConfig(**{**SMALL, **changes})).double().eval()
    with torch.no_grad():  # the output maps begin at zero
        for layer in (model.linear, model.head):
            torch.nn.init.normal_(layer.weight, std=0.1)
    return model


def test_normalisation_is_exactly_inverted() -> None:
    x = torch.randn(5, 40, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 50.0, 1e4, 0.0])[:, None]
    x = x + 7.0
    z, mean, deviation = normalise(x)
    assert torch.allclose(denormalise(z, mean, deviation), x, rtol=1e-12, atol=0)
    assert torch.allclose(z.mean(1), torch.zeros(5).double(), atol=1e-9)
    assert torch.allclose(z[1:4].std(1, correction=0), torch.ones(3).double(), atol=1e-4)


@pytest.mark.parametrize("mixer", ["memory", "attention"])
def test_a_shifted_and_stretched_window_gives_the_shifted_and_stretched_forecast(mixer) -> None:
    model = made(mixer=mixer)
    x = torch.randn(6, 24, dtype=torch.float64)
    y = model(x)
    assert torch.allclose(model(x + 30.0), y + 30.0, atol=1e-9)
    # Up to the 1e-5 under the root.
    assert torch.allclose(model(100.0 * x), 100.0 * y, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("mixer", ["memory", "attention"])
def test_windows_do_not_see_each_other(mixer) -> None:
    """The memory is reset for each window: no state, no neighbour, no order."""
    model = made(mixer=mixer)
    x = torch.randn(6, 24, dtype=torch.float64)
    together = model(x)
    alone = torch.cat([model(row[None]) for row in x])
    assert torch.allclose(together, alone, atol=1e-12)
    assert torch.equal(model(x), together)


@pytest.mark.parametrize("mixer", ["memory", "attention"])
def test_every_patch_reaches_the_forecast_through_the_mixer(mixer) -> None:
    """With the linear path cut."""
    model = made(mixer=mixer)
    with torch.no_grad():
        model.linear.weight.zero_()
    x = torch.randn(1, 24, dtype=torch.float64)
    x = (x - x.mean()) / x.std(correction=0)
    for patch in range(6):
        other = x.clone()
        # Swapping steps changes neither mean nor deviation.
        other[:, 4 * patch : 4 * patch + 4] = x[:, 4 * patch : 4 * patch + 4].flip(1)
        assert (model(other) - model(x)).abs().max() > 1e-6


def test_without_its_tokens_it_is_a_linear_map_of_the_normalised_window() -> None:
    model = made()
    with torch.no_grad():
        model.head.weight.zero_()
    x = torch.randn(3, 24, dtype=torch.float64)
    deviation = (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    z = (x - x.mean(1, keepdim=True)) / deviation
    wanted = (z @ model.linear.weight.T + model.linear.bias) * deviation + x.mean(1, keepdim=True)
    assert torch.allclose(model(x), wanted, atol=1e-12)


def test_a_fresh_model_forecasts_the_mean() -> None:
    x = torch.randn(3, 24)
    y = Forecaster(ForecasterConfig(**SMALL))(x)
    assert torch.allclose(y, x.mean(1, keepdim=True).expand(3, 5), atol=1e-6)


def test_a_look_back_that_the_patch_does_not_divide() -> None:
    """The oldest steps are in no token, but in the linear map and in the normalisation."""
    model = made(lookback=26)
    assert model.config.tokens == 6
    x = torch.randn(2, 26, dtype=torch.float64)
    other = x.clone()
    other[:, :2] = x[:, :2].flip(1)  # the same mean and deviation
    with torch.no_grad():
        assert not torch.allclose(model(other), model(x))
        model.linear.weight.zero_()
        assert torch.allclose(model(other), model(x), atol=1e-12)


def test_the_head_reads_the_last_token_or_all() -> None:
    """A change of the first token's read, and nothing else, reaches the head only with `all`."""
    x = torch.randn(2, 24, dtype=torch.float64)
    for head, reaches in (("last", False), ("all", True)):
        model = made(head=head, layers=1)
        before = model(x)
        kept = model.blocks[0].forward
        first = torch.zeros(1, 6, 8, dtype=torch.float64)
        first[:, 0, 0] = 1.0
        model.blocks[0].forward = lambda t, kept=kept, first=first: kept(t) + first
        assert bool((model(x) - before).abs().max() > 1e-6) is reaches


def test_attention_against_softmax() -> None:
    torch.manual_seed(1)
    layer = Attention(6, 2).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x).split(6, -1)
    heads = []
    for h in (slice(0, 3), slice(3, 6)):
        scores = q[..., h] @ k[..., h].transpose(1, 2) / 3**0.5
        heads.append(scores.softmax(-1) @ v[..., h])
    assert torch.allclose(layer(x), layer.output(torch.cat(heads, -1)), atol=1e-12)


def test_dlinear_against_its_formula() -> None:
    torch.manual_seed(2)
    model = DLinear(30, 4, kernel=5).double()
    x = torch.randn(3, 30, dtype=torch.float64)
    trend = torch.empty_like(x)
    for t in range(30):
        # Both ends are repeated.
        trend[:, t] = sum(x[:, min(max(t + o, 0), 29)] for o in (-2, -1, 0, 1, 2)) / 5
    wanted = F.linear(trend, model.trend.weight, model.trend.bias)
    wanted = wanted + F.linear(x - trend, model.remainder.weight, model.remainder.bias)
    assert torch.allclose(model(x), wanted, atol=1e-12)
    assert DLinear(30, 4).kernel == 25
    with pytest.raises(ValueError, match="kernel must be odd, got 4"):
        DLinear(30, 4, kernel=4)


def test_bad_settings(without_shape_checks) -> None:
    for changes, message in [
        ({"mixer": "mamba"}, "unknown mixer 'mamba'; known: memory, attention"),
        ({"head": "first"}, "unknown head 'first'; known: last, all"),
        ({"patch": 25}, "patch .25. must fit the look-back .24."),
        ({"heads": 3}, "dim .8. must be a multiple of heads .3."),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ForecasterConfig(**{**SMALL, **changes})


def test_bad_input(without_shape_checks) -> None:
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 24\), got \(2, 23\)"):
        Forecaster(ForecasterConfig(**SMALL))(torch.randn(2, 23))
