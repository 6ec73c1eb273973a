"""An explained step is the rule's own sums, and the layer's own state, to float64 precision."""

import pytest
import torch
from inspected import MODELS, build, text

from titans import MemoryConfig, TitansConfig, TitansLM
from titans.inspect import Step, explain, memories, observe


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def weights_of(model: TitansLM, state, memory: int, head: int) -> list[torch.Tensor]:
    """M of one head, from the state as it stands."""
    _, layer, held = memories(model, state)[memory]
    weights = [w[0, head] for w in held.rule.weights]
    if layer.anchored:
        return [m[head] + w for m, w in zip(layer.initial, weights, strict=True)]
    return weights


def check_sums(step: Step) -> None:
    """The three equations of the step's docstring, matrix by matrix and token by token."""
    for i, M in enumerate(step.weights):
        theta = step.learning_rate[i]
        for t in range(len(step.tokens)):
            S = -theta[t] * step.gradient[i][t]
            if step.momentum is not None:
                S = step.momentum[i][t] * step.past[i][t] + S
                close(step.past[i][t + 1], S)
            left = M[t]
            if step.decay is not None:
                alpha = step.decay[i][t]
                alpha = alpha[:, None] if alpha.ndim else alpha
                left = M[t] - alpha * (M[t] - step.resting[i])
            close(M[t + 1], left + S)


@pytest.mark.parametrize(("variant", "memory"), MODELS)
def test_the_sums_of_a_step_are_the_layers_state(variant: str, memory: str) -> None:
    model, tokens = build(variant, memory), text(31)
    before = model(tokens[:, :14])[1]
    piece = tokens[:, 14:25]
    seen = observe(model, piece, before)
    for index, head in ((0, 1), (1, 0)):
        step = explain(model, before, piece, index, head)
        check_sums(step)
        for i, (first, last) in enumerate(
            zip(
                weights_of(model, before, index, head),
                weights_of(model, seen.state, index, head),
                strict=True,
            )
        ):
            close(step.weights[i][0], first)
            close(step.weights[i][-1], last)
            close(step.initial[i], model.blocks[index].mixer.memory.initial[i][head])
        past = memories(model, seen.state)[index].state.rule.momentum
        assert (past is None) == (step.past is None)
        for i, matrix in enumerate(past or ()):
            close(step.past[i][-1], matrix[0, head])
        close(step.surprise, seen.surprise[0, :, index, head])
        close(torch.stack(step.learning_rate).mean(0), seen.learning_rate[0, :, index, head])
        if step.decay is not None:
            means = [a.reshape(len(a), -1).mean(1) for a in step.decay]
            close(torch.stack(means).mean(0), seen.decay[0, :, index, head])
        pairs = zip(step.weights, step.initial, strict=True)
        way = torch.cat([(w[-1] - learned).flatten() for w, learned in pairs])
        close(way.norm(), seen.moved[0, index, head])
        assert (step.position, step.memory, step.head) == (14, index, head)
        assert torch.equal(step.tokens, piece[0])


@pytest.mark.parametrize(("variant", "memory"), MODELS)
def test_gradients_are_those_of_the_inner_loss(variant: str, memory: str) -> None:
    """By autograd, at the weights where the open chunk began: 0.5 |M(k) - v|^2; in a memory that
    is not linear at most 1 long."""
    model, tokens = build(variant, memory), text(20)
    before = model(tokens[:, :10])[1]
    chunk = model.config.memory.chunk_size
    step = explain(model, before, tokens[:, 10:], 1, 1)
    network = model.blocks[1].mixer.memory.network
    assert step.chunk == chunk
    for t in range(10):
        begun = t - (step.offset + t) % chunk
        if begun < 0:
            continue
        M = [w[begun].clone().requires_grad_() for w in step.weights]
        answer = network.apply(M, step.keys[t : t + 1])[0]
        (0.5 * (answer - step.values[t]).square().sum()).backward()
        close(step.answers[t], answer.detach())
        for i, w in enumerate(M):
            close(step.gradient[i][t], w.grad / max(1, 0 if network.linear else w.grad.norm()))
        after = [w[t + 1] for w in step.weights]
        close(step.reads[t], network.apply(after, step.queries[t : t + 1])[0])


def test_a_step_begins_inside_a_chunk_where_the_state_does() -> None:
    model, tokens = build("mac", "deep"), text(18)
    before = model(tokens[:, :6])[1]
    step = explain(model, before, tokens[:, 6:], 0, 0)
    assert (step.chunk, step.offset) == (4, 2)
    whole = explain(model, None, tokens, 0, 0)
    for i in range(2):
        close(step.gradient[i], whole.gradient[i][6:])
        close(step.weights[i], whole.weights[i][6:])


@pytest.mark.parametrize("variant", ["gated-deltanet", "mamba2", "ttt-mlp", "linear-attention"])
def test_baselines_that_are_settings_of_the_rule_are_explained_too(variant: str) -> None:
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant, vocab_size=40, dim=16, layers=2, heads=2, memory=MemoryConfig(heads=2)
    )
    model, tokens = TitansLM(config).double().eval(), text(24)
    before = model(tokens[:, :9])[1]
    seen = observe(model, tokens[:, 9:], before)
    step = explain(model, before, tokens[:, 9:], 1, 0)
    check_sums(step)
    for got, expected in zip(step.weights, weights_of(model, seen.state, 1, 0), strict=True):
        close(got[-1], expected)
    close(step.surprise, seen.surprise[0, :, 1, 0])


def test_forgetting_rests_where_the_model_says() -> None:
    anchored = explain(build("lmm", "linear"), None, text(5), 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(anchored.resting, anchored.initial, strict=True))
    zero = explain(build("lmm", "linear, paper"), None, text(5), 0, 1)
    assert not any(w.any() for w in zero.resting)
    assert all(w.any() for w in zero.initial)


def test_memories_and_heads_that_are_not_there() -> None:
    model, tokens = build("mal"), text(5)
    with pytest.raises(ValueError, match=r"memory must lie in 0..1, got 2"):
        explain(model, None, tokens, 2, 0)
    with pytest.raises(ValueError, match=r"head must lie in 0..1, got -1"):
        explain(model, None, tokens, 0, -1)
    with pytest.raises(ValueError, match="this model has no memories"):
        explain(build("sliding"), None, tokens, 0, 0)
