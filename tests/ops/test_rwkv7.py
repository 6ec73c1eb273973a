"""RWKV-7's memory: the loop against the paper's matrices, the parallel form against the loop."""

import pytest
import torch
from torch.nn.functional import normalize

from titans.ops.rwkv7 import rwkv7

NAMES = ("queries", "decay", "keys", "values", "removal", "rate", "state")


def inputs(length, *, batch=2, heads=2, key_dim=5, value_dim=3, seed=0):
    """Float64 leaves in the order of the arguments; decays over the whole of [0, 1]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    tokens = (batch, length, heads)
    made = (
        normal(*tokens, key_dim),
        uniform(*tokens, key_dim),
        normal(*tokens, key_dim),
        normal(*tokens, value_dim),
        normalize(normal(*tokens, key_dim), dim=-1),
        uniform(*tokens, key_dim),
        normal(batch, heads, key_dim, value_dim),
    )
    return [x.requires_grad_() for x in made]


def with_gradients(arguments, **settings):
    """Output, state, and the gradient of every argument."""
    output, state = rwkv7(*arguments, **settings)
    return output, state, *torch.autograd.grad(output.sin().sum() + state.cos().sum(), arguments)


def assert_same(mine, yours, tolerance=1e-10):
    for name, a, b in zip(("output", "after", *NAMES), mine, yours, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


def test_the_loop_is_the_papers_recurrence() -> None:
    """S_t = S_{t-1} (diag(w) - c^T (a * c)) + v^T k, y = S r^T with rows, S (values, keys)."""
    r, w, k, v, c, a, state = inputs(9)
    output, after = rwkv7(r, w, k, v, c, a, state, impl="reference")
    for b in range(2):
        for h in range(2):
            S = state[b, h].T
            for t in range(9):
                at = (b, t, h)
                transition = torch.diag(w[at]) - torch.outer(c[at], a[at] * c[at])
                S = S @ transition + torch.outer(v[at], k[at])
                torch.testing.assert_close(output[at], S @ r[at], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(after[b, h], S.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 23, 32, 65])
@pytest.mark.parametrize("chunk_size", [1, 8, 32])
def test_parallel_is_the_loop_with_every_gradient(length, chunk_size) -> None:
    arguments = inputs(length)
    assert_same(
        with_gradients(arguments, impl="chunked", chunk_size=chunk_size),
        with_gradients(arguments, impl="reference"),
    )


def test_parallel_is_the_loop_over_several_segments() -> None:
    arguments = inputs(1100, batch=1, heads=1)
    assert_same(
        with_gradients(arguments, impl="chunked"), with_gradients(arguments, impl="reference")
    )


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e-30, 1.0])
def test_vanishing_decay_is_a_number_like_any_other(value) -> None:
    """Channels that forget all, also one token after another, and their gradients."""
    arguments = inputs(40)
    with torch.no_grad():
        arguments[1][:, 3:17, :, :2] = value
        arguments[1][:, 20] = value
    results = with_gradients(arguments, impl="chunked")
    assert all(x.isfinite().all() for x in results)
    assert_same(results, with_gradients(arguments, impl="reference"))


def test_float32_is_accurate_where_products_of_decays_underflow() -> None:
    wide = inputs(200)
    with torch.no_grad():
        wide[1][:, ::2] *= 1e-6
    short = [x.detach().float().requires_grad_() for x in wide]
    for a, b in zip(with_gradients(short), with_gradients(wide, impl="reference"), strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def test_any_split_is_one_pass() -> None:
    *tokens, state = inputs(50)
    whole, after = rwkv7(*tokens, state)
    outputs = []
    for piece in zip(*(x.split([1, 13, 20, 16], 1) for x in tokens), strict=True):
        y, state = rwkv7(*piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, after, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    arguments = inputs(6, batch=1, heads=1, key_dim=3, value_dim=2)
    assert torch.autograd.gradcheck(lambda *x: rwkv7(*x, chunk_size=4), arguments, fast_mode=True)


def test_short_tokens_leave_the_memory_in_its_own_precision() -> None:
    *tokens, state = (x.detach() for x in inputs(20))
    output, after = rwkv7(*(x.bfloat16() for x in tokens), state.float())
    assert (output.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    expected, _ = rwkv7(*(x.bfloat16().double() for x in tokens), state)
    assert (output.double() - expected).norm() < 0.01 * expected.norm()


def test_bad_arguments_are_refused(without_shape_checks) -> None:
    *tokens, state = inputs(4)
    with pytest.raises(ValueError, match="chunk_size must be a power of two, got 12"):
        rwkv7(*tokens, state, chunk_size=12)
    with pytest.raises(ValueError, match="impl must be one of auto, reference, chunked, got 'c'"):
        rwkv7(*tokens, state, impl="c")
    with pytest.raises(ValueError, match="the sequence is empty"):
        rwkv7(*(x[:, :0] for x in tokens), state)
    with pytest.raises(ValueError, match=r"state must be \(2, 2, 5, 3\) in float32 or float64"):
        rwkv7(*tokens, state.mT)
    r, w, k, v, c, a = tokens
    for given, message in (
        ((r, w[..., :1], k, v, c, a), "decay and keys must have one shape"),
        ((r, w, k, v, c, a[..., :1]), "rate and keys must have one shape"),
        ((r[:, :3], w, k, v, c, a), "queries and keys must have one shape"),
        ((r, w, k, v[:, :3], c, a), r"values must be \(B, T, H, V\)"),
    ):
        with pytest.raises(ValueError, match=message):
            rwkv7(*given, state)
