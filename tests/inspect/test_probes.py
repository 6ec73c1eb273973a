"""What memories return for a key, against what the layers' own equations say by hand."""

import pytest
import torch
from inspected import MODELS, build, text
from torch.nn.functional import gelu, layer_norm, silu

from titans.inspect import explain, probe, recall, recall_curve, replay


def network(layer: torch.nn.Module, weights: list[torch.Tensor], key: torch.Tensor) -> torch.Tensor:
    """M(k), written out for the memories of these tests."""
    config = layer.config
    y = key @ weights[0]
    if config.depth == 2:
        y = gelu(y) @ weights[1]
    if config.norm:
        y = layer_norm(y, y.shape[-1:])
    return key + y if config.residual else y


@pytest.mark.parametrize(("variant", "memory"), MODELS)
def test_a_recall_is_the_network_on_the_probed_key(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), text(19, batch=2)
    before = model(tokens[:, :7])[1]
    seen = probe(model, before, tokens[:, 7:15], 3)
    assert seen.position == 10
    assert torch.equal(seen.token, tokens[:, 10])
    state = model(tokens[:, 7:], before)[1]
    now = recall(model, state, seen)
    for index, block in enumerate(model.blocks):
        layer, rule = block.mixer.memory, state.blocks[index].memory.rule
        for row in range(2):
            for head in range(2):
                weights = [w[row, head] for w in rule.weights]
                if layer.anchored:
                    weights = [w + m[head] for w, m in zip(weights, layer.initial, strict=True)]
                key, value = seen.keys[row, index, head], seen.values[row, index, head]
                got, place = network(layer, weights, key), (row, index, head)
                torch.testing.assert_close(now.returned[place], got, rtol=1e-9, atol=1e-10)
                torch.testing.assert_close(
                    torch.stack([now.cosine[place], now.norm_ratio[place]]),
                    torch.stack(
                        [got @ value / got.norm() / value.norm(), got.norm() / value.norm()]
                    ),
                )
                error = (got - value).norm() / value.norm()
                torch.testing.assert_close(now.relative_error[place], error)


@pytest.mark.parametrize(("variant", "memory"), [("lmm", "linear"), ("lmm", "no decay")])
def test_the_first_blocks_pair_is_projected_convolved_and_normalised(variant, memory) -> None:
    """The pair by hand, from the text alone: the second block would need the first one's reads."""
    model, tokens = build(variant, memory), text(12)
    seen = probe(model, None, tokens, 8)
    block = model.blocks[0]
    layer = block.mixer.memory
    x = block.mixer_norm(model.embedding(tokens[0, 5:9]))
    mixed = silu((layer.conv.weight * (x @ layer.qkv.weight.T)).sum(0) + layer.conv.bias)
    _, key, value = mixed.unflatten(0, (3, 2, 8))
    key = key / key.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(seen.keys[0, 0], key)
    torch.testing.assert_close(seen.values[0, 0], value)
    torch.testing.assert_close(
        seen.learning_rate[0],
        model.run(tokens)
        .records[0]
        .learning_rate[0, 8]
        .new_tensor([r.learning_rate[0, 8].tolist() for r in model.run(tokens).records]),
    )


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_probes_do_not_depend_on_how_the_text_is_cut_or_goes_on(variant: str) -> None:
    model, tokens = build(variant, "linear, momentum"), text(20)
    whole = probe(model, None, tokens, 13)
    before = model(tokens[:, :9])[1]
    for later in (probe(model, None, tokens[:, :14], 13), probe(model, before, tokens[:, 9:], 4)):
        assert later.position == whole.position == 13
        for name in ("keys", "values", "learning_rate"):
            torch.testing.assert_close(getattr(later, name), getattr(whole, name))


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_a_full_write_into_a_linear_memory_is_recalled_at_once(variant: str) -> None:
    """With theta 1 and nothing forgotten the exact rule stores v for k: M(k) = v right after."""
    model, tokens = build(variant, "no decay"), text(15)
    with torch.no_grad():
        for block in model.blocks:
            gates = block.mixer.memory.gates
            gates.map.weight.zero_()
            gates.map.bias[:2] = 20.0
    seen = probe(model, None, tokens, 14)
    assert (seen.learning_rate == 1).all()
    exact = recall(model, model(tokens)[1], seen)
    assert (exact.relative_error < 1e-10).all()
    torch.testing.assert_close(exact.cosine, torch.ones_like(exact.cosine))
    # Before the write it was not there.
    assert (recall(model, model(tokens[:, :14])[1], seen).relative_error > 0.01).all()


def test_a_curve_is_a_recall_at_every_piece() -> None:
    model, tokens = build("mac", "deep, momentum"), text(40)
    state = replay(model, tokens[:, :13])
    seen = probe(model, None, tokens, 12)
    curve = list(recall_curve(model, state, seen, tokens[:, 13:], piece=10))
    assert [position for position, _ in curve] == [13, 23, 33, 40]
    for position, found in curve:
        expected = recall(model, model(tokens[:, :position])[1], seen)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    still = list(recall_curve(model, state, seen, tokens[:, 13:], piece=10, write=False))
    assert all(torch.equal(found.returned, curve[0][1].returned) for _, found in still)


@pytest.mark.parametrize("variant", ["sliding", "transformer", "rwkv7"])
def test_without_memories_there_is_nothing_to_recall(variant: str) -> None:
    model, tokens = build(variant), text(9, batch=2)
    seen = probe(model, None, tokens, 4)
    assert seen.keys.shape[:3] == (2, 0, 0)
    now = recall(model, model(tokens)[1], seen)
    assert now.cosine.shape == now.norm_ratio.shape == now.relative_error.shape == (2, 0, 0)


def test_probing_leaves_the_model_as_it_was() -> None:
    model, tokens = build("mal", "linear"), text(8)
    probe(model, None, tokens, 3)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        probe(model, None, tokens + 1000, 3)
    assert not any(block.mixer.memory.gates._forward_pre_hooks for block in model.blocks)
    with pytest.raises(ValueError, match=r"index must lie in 0..7, got 8"):
        probe(model, None, tokens, 8)
    other = build("transformer")
    with pytest.raises(ValueError, match="the probe is of a model with 2 memories, this has 0"):
        recall(other, other(tokens)[1], probe(model, None, tokens, 3))


def test_a_probe_is_the_pair_that_explaining_shows() -> None:
    model, tokens = build("mag", "deep"), text(11)
    seen = probe(model, None, tokens, 9)
    for memory in range(2):
        for head in range(2):
            step = explain(model, None, tokens, memory, head)
            torch.testing.assert_close(step.keys[9], seen.keys[0, memory, head])
            torch.testing.assert_close(step.values[9], seen.values[0, memory, head])
