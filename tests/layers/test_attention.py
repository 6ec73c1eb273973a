"""Both attention forms against a dense softmax with explicit masks, in float64."""

import math
from dataclasses import replace

import mpmath
import pytest
import torch
from cases import assert_same
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from titans.layers.attention import SegmentAttention, SlidingWindowAttention, rotate

DIM, HEADS, BASE = 12, 2, 100.0


@pytest.fixture(autouse=True, scope="module", params=["scores", "fused"])
def form(request):
    """What short blocks take, and what long ones do that nothing differentiates."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "fused":
            patch.setattr("titans.layers.attention.FUSED_FROM", 0)
        with torch.set_grad_enabled(request.param == "scores"):
            yield


def made(cls, *settings):
    torch.manual_seed(0)
    return cls(DIM, HEADS, *settings, BASE).double()


def tokens(length, seed=1, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, DIM, generator=generator, dtype=torch.float64)


def rotation(position, size):
    """The (D, D) matrix that turns the pairs (i, i + D/2) by position * base^(-2i/D)."""
    half = size // 2
    R = torch.zeros(size, size, dtype=torch.float64)
    for i in range(half):
        angle = position * BASE ** (-2 * i / size)
        R[i, i] = R[i + half, i + half] = math.cos(angle)
        R[i, i + half], R[i + half, i] = math.sin(angle), -math.sin(angle)
    return R


def heads(x, weight):
    q, k, v = rearrange(x @ weight.T, "b t (n h d) -> n b h t d", n=3, h=HEADS)
    return q, k, v


def read_segment(attention, x, memory, prefix, state):
    """`SegmentAttention` of tokens, memory tokens and persistent tokens as vectors."""
    return attention(attention.project(x), memory, attention.project(prefix)[1:], state)


def dense(attention, x, sources, source_positions, positions, prefix, seen):
    """One softmax over [prefix || sources], token by token. seen(i, j): may query i see source j?

    Every query meets the prefix as it is, and the sources after rotating both.
    """
    weight = attention.qkv.weight
    q = heads(x, weight)[0]
    _, k, v = heads(sources, weight)
    _, pk, pv = heads(prefix, weight)
    size = q.shape[-1]
    turned = torch.stack(
        [k[:, :, j] @ rotation(p, size) for j, p in enumerate(source_positions)], 2
    )
    rows = []
    for i, position in enumerate(positions):
        visible = [j for j in range(k.shape[2]) if seen(i, j)]
        query = q[:, :, i]
        scores = torch.cat(
            [
                torch.einsum("bhd,bhpd->bhp", query, pk),
                torch.einsum(
                    "bhd,bhsd->bhs", query @ rotation(position, size), turned[:, :, visible]
                ),
            ],
            -1,
        )
        weights = torch.exp(scores / math.sqrt(size))
        weights = weights / weights.sum(-1, keepdim=True)
        values = torch.cat([pv, v[:, :, visible]], 2)
        rows.append(torch.einsum("bhs,bhsd->bhd", weights, values))
    y = rearrange(torch.stack(rows, 2), "b h t d -> b t (h d)")
    return y @ attention.output.weight.T


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize(
    ("window", "length"), [(1, 5), (4, 1), (4, 3), (4, 4), (4, 13), (6, 12), (20, 7)]
)
def test_window_equals_dense(window, length, prefix):
    attention = made(SlidingWindowAttention, window)
    x, first = tokens(length), tokens(prefix, 2)
    y, state = attention(x, attention.init_state(first))
    expected = dense(
        attention, x, x, range(length), range(length), first, lambda i, j: i - window < j <= i
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert state.position == length
    assert state.keys.shape[2] == window - 1


@settings(max_examples=30)
@given(
    window=st.integers(1, 7),
    length=st.integers(2, 16),
    prefix=st.integers(0, 2),
    data=st.data(),
)
def test_window_any_split_is_one_pass(window, length, prefix, data):
    attention = made(SlidingWindowAttention, window)
    x, start = tokens(length), attention.init_state(tokens(prefix, 2))
    y, state = attention(x, start)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), min_size=1)))
    pieces, now = [], start
    for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
        piece, now = attention(x[:, begin:end], now)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), y, rtol=0, atol=1e-12)
    assert now.position == state.position
    assert_same(now.tensors(), state.tensors(), 1e-12)


@torch.enable_grad()
def test_long_windows_have_second_derivatives(monkeypatch):
    """The fused kernels have none, and gradients of gradients are what outer loops need."""
    monkeypatch.setattr("titans.layers.attention.FUSED_FROM", 0)
    attention = made(SlidingWindowAttention, 4)
    x = tokens(9).requires_grad_()
    state = attention.init_state(tokens(2, seed=2))
    (slope,) = torch.autograd.grad(attention(x, state)[0].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), x)
    assert second.abs().sum() > 0
    along = torch.func.jvp(lambda x: attention(x, state)[0], (x,), (torch.ones_like(x),))[1]
    assert along.isfinite().all()


def test_window_size_does_not_grow_and_the_past_is_not_modified():
    attention = made(SlidingWindowAttention, 4)
    state = attention.init_state(tokens(1, 2))
    kept = state.fork()
    _, after = attention(tokens(50), state)
    assert after.nbytes == state.nbytes
    assert_same(state.tensors(), kept.tensors(), 0.0)


@torch.enable_grad()
def test_what_left_the_window_has_no_influence():
    attention = made(SlidingWindowAttention, 4)
    x = tokens(9).requires_grad_()
    y, _ = attention(x, attention.init_state(tokens(2, 2)))
    for t in range(9):
        slope = torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)[0]
        reached = (slope != 0).any(-1).all(0)
        assert reached.nonzero().flatten().tolist() == list(range(max(0, t - 3), t + 1))


def segment_sources(length, stride, memory, x):
    """[h || s] with positions, and which of them query i sees: those that belong to j <= i."""
    owners = list(range(0, length, stride))
    positions = [*owners, *range(length)]
    return torch.cat([memory, x], 1), positions, lambda i, j: positions[j] <= i


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (8, 1), (5, 1), (8, 2), (7, 4)])
def test_segment_equals_dense(length, stride, prefix):
    attention = made(SegmentAttention, 8, stride)
    x, first = tokens(length), tokens(prefix, 2)
    memory = tokens(-(-length // stride), 3)
    y, state = read_segment(attention, x, memory, first, attention.init_state(2))
    sources, positions, seen = segment_sources(length, stride, memory, x)
    expected = dense(attention, x, sources, positions, range(length), first, seen)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert state.offset == length % 8


@settings(max_examples=30)
@given(
    stride=st.sampled_from([1, 2, 4]),
    cuts=st.sets(st.integers(1, 7), min_size=1),
    prefix=st.integers(0, 2),
)
def test_segment_any_split_is_one_pass(stride, cuts, prefix):
    attention = made(SegmentAttention, 8, stride)
    x, first, memory = tokens(8), tokens(prefix, 2), tokens(8 // stride, 3)
    y, state = read_segment(attention, x, memory, first, attention.init_state(2))
    pieces, now = [], attention.init_state(2)
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 8], strict=True):
        # h_j comes with the token it belongs to: 0, stride, 2 stride ...
        notes = memory[:, -(-begin // stride) : -(-end // stride)]
        piece, now = read_segment(attention, x[:, begin:end], notes, first, now)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), y, rtol=0, atol=1e-12)
    assert now.offset == state.offset == 0
    assert_same(now.tensors(), state.tensors(), 1e-12)


def test_a_segment_does_not_see_the_one_before():
    attention = made(SegmentAttention, 8, 2)
    first = tokens(1, 2)
    _, used = read_segment(attention, tokens(8), tokens(4, 3), first, attention.init_state(2))
    x, memory = tokens(5, 4), tokens(3, 5)
    fresh, _ = read_segment(attention, x, memory, first, attention.init_state(2))
    torch.testing.assert_close(
        read_segment(attention, x, memory, first, used)[0], fresh, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("position", [0, 1, 4095, 10_000_000])
def test_rotation_is_accurate_at_any_position(position):
    """Against 50 digits. Angles are float64: 10^7 rad with 2^-53 relative, so 2e-9 absolute;
    a float32 angle would be off by half a radian there."""
    mpmath.mp.dps = 50
    size, base = 64, 10_000
    x = torch.ones(1, size, dtype=torch.float64)
    got = rotate(x, torch.tensor([position]), float(base))[0]
    for i in range(size // 2):
        angle = position * mpmath.mpf(base) ** (mpmath.mpf(-2 * i) / size)
        expected = [mpmath.cos(angle) - mpmath.sin(angle), mpmath.cos(angle) + mpmath.sin(angle)]
        error = max(abs(got[i].item() - expected[0]), abs(got[i + size // 2].item() - expected[1]))
        assert error < 1e-15 * max(position, 4)
    single = rotate(x.float(), torch.tensor([position]), float(base))[0]
    assert (single - got).abs().max() < 4e-7


def test_only_distances_matter():
    """Scores of rotated queries and keys depend on i - j alone, also ten million tokens in."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 64, generator=generator, dtype=torch.float64)

    def score(i, j):
        return rotate(q, torch.tensor([i]), 1e4) @ rotate(k, torch.tensor([j]), 1e4).T

    torch.testing.assert_close(score(10_000_005, 10_000_000), score(5, 0), rtol=0, atol=1e-7)
    assert (score(6, 0) - score(5, 0)).abs() > 1e-2


def test_streams_far_from_the_start_attend_as_near_it():
    """With a prefix, whose weight must not drift with the position either."""
    attention = made(SlidingWindowAttention, 4)
    x = tokens(30)
    near, _ = attention(x, attention.init_state(tokens(2, 2)))
    far, _ = attention(x, replace(attention.init_state(tokens(2, 2)), position=10_000_000))
    # The first window differs: far from the start it sees the zero keys of what came before.
    torch.testing.assert_close(far[:, 3:], near[:, 3:], rtol=0, atol=1e-7)
