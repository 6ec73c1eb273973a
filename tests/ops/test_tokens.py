"""What surrounds the rule: the compiled pass equals torch operations, and those the formulas."""

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same

from titans.ops.native import tokens as compiled
from titans.ops.tokens import emit_tokens, mix_tokens

# batch, length, parts, heads, size, width, unit, silu: one token, blocks of 128 and their seams,
# sizes that are no multiple of a vector, fewer tokens than the convolution is wide.
MIXES = [
    (2, 1, 3, 2, 64, 4, 2, True),
    (2, 300, 3, 2, 16, 4, 2, True),
    (1, 129, 1, 3, 5, 4, 1, True),
    (3, 128, 3, 1, 7, 3, 2, False),
    (2, 5, 3, 2, 16, 1, 2, True),
    (2, 2, 3, 2, 16, 4, 0, True),
    (2, 131, 3, 2, 24, None, 2, True),
]


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def results(outputs, leaves):
    """Outputs, and the gradients of a sum that weighs each of their numbers differently."""
    loss = sum((y * torch.arange(y.numel()).sin().view_as(y)).sum() for y in outputs)
    slopes = torch.autograd.grad(loss, leaves)
    return dict(enumerate([*outputs, *slopes]))


def mixed(case, impl):
    batch, length, parts, heads, size, width, unit, silu = case
    channels = parts * heads * size
    wide = draw(batch, length, channels + 8, seed=0)
    leaves = [wide]
    fixed = [None, None, None]
    if width is not None:
        fixed = [draw(batch, width - 1, channels, seed=1), draw(width, channels, seed=2)]
        fixed.append(draw(channels, seed=3))
        leaves += fixed
    x = wide[..., 4:-4]  # a view: rows do not lie one after the other
    return results(
        mix_tokens(x, *fixed, parts=parts, heads=heads, silu=silu, unit=unit, impl=impl), leaves
    )


@pytest.mark.parametrize("case", MIXES, ids=str)
def test_mixing_is_the_same_compiled(case):
    assert_same(mixed(case, "native"), mixed(case, "chunked"))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("length", [1, 130])
def test_emission_is_the_same_compiled(length, gated):
    def emitted(impl):
        read, gain = draw(2, 3, length, 21, seed=0), draw(21, seed=1)
        gate = draw(2, length, 63, seed=2) if gated else None
        y = emit_tokens(read.transpose(1, 2), gain, gate, eps=1e-5, impl=impl)
        return results([y], [x for x in (read, gain, gate) if x is not None])

    assert_same(emitted("native"), emitted("chunked"))


def test_a_zero_vector_stays_zero_and_has_a_finite_slope():
    x = torch.zeros(1, 3, 12, dtype=torch.float64, requires_grad=True)
    for impl in ("native", "chunked"):
        (y,) = mix_tokens(x, None, None, None, parts=1, heads=2, silu=False, unit=1, impl=impl)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert_same({"y": y, "slope": slope}, {"y": x.view_as(y), "slope": torch.full_like(x, 1e6)})


def test_mixing_from_its_formula():
    """One head of one channel, written out; the tail stands before the text."""
    x = draw(1, 5, 1, seed=0)
    weight, bias = torch.tensor([[0.5], [-2.0], [3.0]]).double(), torch.tensor([0.25]).double()
    tail = torch.tensor([[[7.0], [-1.0]]]).double()
    (y,) = mix_tokens(x, tail, weight, bias, parts=1, heads=1, silu=True, unit=0)
    line = [7.0, -1.0, *x.flatten().tolist()]
    z = [
        0.25 + 0.5 * a - 2.0 * b + 3.0 * c
        for a, b, c in zip(line, line[1:], line[2:], strict=False)
    ]
    expected = torch.tensor(z, dtype=torch.float64)
    assert_same({"y": y.flatten()}, {"y": expected * torch.sigmoid(expected)})


def test_threads_change_nothing(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = mixed(MIXES[1], "native")
        torch.set_num_threads(2)
        monkeypatch.setattr(compiled, "SHARED_NUMBERS", 0)
        shared = mixed(MIXES[1], "native")
    finally:
        torch.set_num_threads(before)
    assert_same(alone, shared, 0.0)


def test_float32_is_as_exact_as_torch():
    """Errors against float64, the compiled pass beside torch's operations."""

    def error(impl):
        errors = []
        for dtype_seed in range(3):
            x = draw(2, 140, 96, seed=dtype_seed)
            tail, weight, bias = draw(2, 3, 96, seed=5), draw(4, 96, seed=6), draw(96, seed=7)
            options = {"parts": 3, "heads": 2, "silu": True, "unit": 2}
            true = mix_tokens(x, tail, weight, bias, **options, impl="chunked")
            short = (t.float() for t in (x, tail, weight, bias))
            seen = mix_tokens(*short, **options, impl=impl)
            errors += [(a - b).abs().max().item() for a, b in zip(true, seen, strict=True)]
        return max(errors)

    assert error("native") < 2 * error("chunked")


def test_other_precisions_take_torch_operations():
    x = torch.randn(1, 6, 12).bfloat16()
    (y,) = mix_tokens(x, None, None, None, parts=1, heads=2, silu=True, unit=1)
    assert y.dtype == torch.bfloat16
    expected = F.normalize(F.silu(x).view(1, 6, 2, 6).float(), dim=-1).bfloat16()
    assert torch.equal(y, expected)


def test_shapes_that_do_not_fit_are_refused():
    """C is given addresses: it would read beyond them."""
    x, tail, weight, bias = (
        draw(3, 5, 12, seed=0),
        *(draw(*s, seed=1) for s in [(3, 2, 12), (3, 12), (12,)]),
    )
    options = {"parts": 3, "heads": 2, "silu": True, "unit": 2, "impl": "native"}
    for wrong in ([tail[:1], weight, bias], [tail[:, :1], weight, bias], [tail, weight, bias[:1]]):
        with pytest.raises(ValueError, match="must be"):
            mix_tokens(x, *wrong, **options)
    for short in (x[:, :0], x[..., :11]):
        with pytest.raises(ValueError, match="expected"):
            mix_tokens(short, None, None, None, **options)
    read, gain, gate = draw(2, 4, 3, 5, seed=2), draw(5, seed=3), draw(2, 4, 15, seed=4)
    for gains, gates in ((gain[:4], gate), (gain, gate[:1])):
        with pytest.raises(ValueError, match="must be"):
            emit_tokens(read, gains, gates, eps=1e-5, impl="native")


def test_tensors_without_numbers_take_torch_operations():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from titans import MemoryConfig, NeuralMemory

    layer = NeuralMemory(MemoryConfig(dim=12, heads=2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        y, *_ = layer.run(torch.empty(1, 5, 12), layer.init_state(1))
    assert y.shape == (1, 5, 12)
