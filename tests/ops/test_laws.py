"""Laws that hold for every form: one stream is one stream however it is cut, nothing looks
ahead, rows and heads are alone, closed gates write nothing, nothing is modified in place."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DEEP,
    LINEAR,
    MLP,
    RESIDUAL,
    assert_same,
    build,
    collect,
    gradients,
    join,
    pull_back,
    results,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from own_rules import GATED, MUON, OMEGA, SLOPES, miras
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from titans.ops import native

FORMS = {
    "reference": ("reference", {"network": RESIDUAL, "chunk_size": 4}),
    "chunked": ("chunked", {"network": RESIDUAL, "chunk_size": 4}),
    "chunked of one": ("chunked", {"network": MLP}),
    "chunked linear": ("chunked", {"network": LINEAR, "chunk_size": 4}),
    "exact": ("exact", {"network": LINEAR}),
    "native": ("native", {"network": RESIDUAL, "chunk_size": 4}),
    "native of one": ("native", {"network": MLP}),
    "native exact": ("native", {"network": LINEAR}),
    "native bounded": ("native", {"network": MLP, "chunk_size": 4, "max_surprise": 0.3}),
    "own chunked": (
        "chunked",
        {
            "network": GATED,
            "value_dim": 4,
            "objective": SLOPES["l1.5"],
            "window": OMEGA,
            "chunk_size": 4,
        },
    ),
    "own loop": (
        "reference",
        {
            "network": RESIDUAL,
            "window": OMEGA,
            "retention": miras.kl_divergence,
            "optimizer": MUON,
            "chunk_size": 4,
        },
    ),
}
every_form = pytest.mark.parametrize(("impl", "options"), FORMS.values(), ids=FORMS.keys())
ALL_GATES = {"momentum": True, "decay": "scalar", "anchor": True}


def read_in_pieces(case, impl, cuts):
    outputs = []
    for start, stop in zip([0, *cuts], [*cuts, case.length], strict=True):
        piece = case.piece(start, stop)
        if outputs:
            piece = replace(piece, state=outputs[-1].state)
        outputs.append(piece(impl))
    return join(outputs)


@settings(max_examples=60)
@given(data=st.data())
def test_any_split_of_a_stream_is_one_pass(data):
    draw = data.draw
    length = draw(st.integers(2, 14), "length")
    impl = draw(st.sampled_from(["reference", "chunked", "exact"]), "impl")
    if impl == "exact":
        network, chunk_size = LINEAR, 1
    else:
        network = draw(st.sampled_from([LINEAR, MLP, RESIDUAL, DEEP]), "network")
        chunk_size = draw(st.integers(1, 6), "chunk_size")
    case = build(
        draw(st.integers(0, 99), "seed"),
        network=network,
        length=length,
        batch=1,
        momentum=draw(st.booleans(), "momentum"),
        decay=draw(st.sampled_from([None, "scalar", "channel"]), "decay"),
        anchor=draw(st.booleans(), "anchor"),
        chunk_size=chunk_size,
        offset=draw(st.integers(0, chunk_size - 1), "offset"),
        block_size=draw(st.integers(1, 6), "block_size"),
    )
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), min_size=1), "cuts"))
    pieces = read_in_pieces(case, impl, cuts)
    whole = case(impl)
    assert pieces.state.offset == whole.state.offset == (case.state.offset + length) % chunk_size
    assert_same(results(pieces), results(whole), 1e-12)


@every_form
def test_gradients_flow_through_a_split(impl, options):
    """Also where the cut lies inside a chunk: the base carries its graph."""
    case, leaves = build(length=11, **options, **ALL_GATES).with_gradients()
    expected = pull_back(results(case(impl)), leaves)
    assert_same(pull_back(results(read_in_pieces(case, impl, [1, 6])), leaves), expected)


@every_form
def test_a_row_alone_equals_the_row_in_a_batch(impl, options):
    case = build(length=9, batch=3, **options, **ALL_GATES)
    together = results(case(impl))
    for row in range(3):
        alone = results(case.rows(row)(impl))
        assert_same(alone, {name: t[[row]] for name, t in together.items()}, 1e-13)


@every_form
@pytest.mark.parametrize("axis", ["sequence", "head"])
def test_a_poisoned_neighbour_changes_nothing(impl, options, axis):
    """NaN in one sequence (or head) would show in any sum that crosses to another."""
    case = build(length=9, batch=2, heads=2, **options, **ALL_GATES)
    last = (1,) if axis == "sequence" else (slice(None), slice(None), 1)

    def poison(x):
        x = x.clone()
        x[last] = torch.nan
        return x

    clean, dirty = case(impl), case.map_tokens(poison)(impl)
    first = (0,) if axis == "sequence" else (slice(None), slice(None), 0)
    assert dirty.output[last].isnan().all()
    assert torch.equal(dirty.output[first], clean.output[first])
    assert torch.equal(dirty.surprise[first], clean.surprise[first])
    at = (0,) if axis == "sequence" else (slice(None), 0)
    wanted = clean.state.tensors()
    for name, tensor in dirty.state.tensors().items():
        assert torch.equal(tensor[at], wanted[name][at]), name


@every_form
@pytest.mark.parametrize("now", [1, 3, 4, 8])
def test_the_future_changes_nothing_before_it(impl, options, now):
    case = build(length=9, **options, **ALL_GATES)
    other = build(7, length=9, **options, **ALL_GATES)
    both = {}
    for name, x in case.tokens.items():
        both[name] = torch.cat([x[:, :now], other.tokens[name][:, now:] * 0.99], 1)
    changed, kept = replace(case, tokens=both)(impl), case(impl)
    for a, b in ((changed.output, kept.output), (changed.surprise, kept.surprise)):
        torch.testing.assert_close(a[:, :now], b[:, :now], rtol=0, atol=1e-14)
        assert (a[:, now:] - b[:, now:]).abs().amin(-1).min() > 1e-6


@every_form
def test_gradients_do_not_look_ahead(impl, options):
    """d output_t / d input_s = 0 for s > t, exactly; and not for s <= t."""
    case, leaves = build(length=6, **options, **ALL_GATES).with_gradients()
    output = case(impl).output
    for t in range(6):
        for name in case.tokens:
            slope = torch.autograd.grad(
                output[:, t].square().sum(), leaves[name], retain_graph=True
            )[0]
            assert (slope[:, t + 1 :] == 0).all(), (name, t)
            if name != "queries":
                assert (slope[:, : t + 1] != 0).any(), (name, t)


@every_form
@pytest.mark.parametrize("padding", [0.0, 1e3])
def test_padding_on_the_right_never_changes_earlier_outputs(impl, options, padding):
    case = build(length=9, **options, **ALL_GATES)
    gates = ("learning_rate", "momentum", "decay")

    def padded(name, x):
        fill = min(padding, 1.0) if name in gates else padding
        return F.pad(x.movedim(1, -1), (0, 6), value=fill).movedim(-1, 1)

    longer = replace(case, tokens={name: padded(name, x) for name, x in case.tokens.items()})
    torch.testing.assert_close(longer(impl).output[:, :9], case(impl).output, rtol=0, atol=1e-13)


@every_form
@pytest.mark.parametrize("decay", [None, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e18])
def test_a_closed_learning_rate_writes_nothing_bit_for_bit(impl, options, decay, scale):
    case = build(
        length=9, decay=None if decay is None else "scalar", dtype=torch.float32, **options
    ).set("learning_rate", 0.0)
    if decay is not None:
        case = case.set("decay", decay)
    case = replace(case, tokens={**case.tokens, "values": case.tokens["values"] * scale})
    after = case(impl).state
    for name, tensor in after.tensors().items():
        if name.startswith(("weights", "base")):  # a window has other tokens now
            assert torch.equal(tensor, case.state.tensors()[name]), name


@every_form
@pytest.mark.parametrize("length", [1, 2, 5])
def test_alpha_one_forgets_everything(impl, options, length):
    """After a token with alpha = 1 the memory is the anchor plus that token's own step."""
    case = build(length=length, **options, decay="scalar", anchor=True)
    case.tokens["decay"][:, -1] = 1.0
    case.tokens["learning_rate"][:, -1] = 0.0
    result = case(impl)
    for weights in result.state.weights:
        assert weights.abs().max() < 1e-28
    anchor = [a.expand(2, *a.shape) for a in case.settings["anchor"]]
    resting = replace(case.state, weights=tuple(torch.zeros_like(a) for a in anchor))
    last = case.piece(length - 1, length)
    still = replace(last, state=resting).set("learning_rate", 0.0).set("decay", 0.0)
    torch.testing.assert_close(result.output[:, -1:], still(impl).output, rtol=1e-12, atol=1e-14)


@every_form
@pytest.mark.parametrize("length", [1, 3])
def test_sequences_shorter_than_a_chunk_write(impl, options, length):
    options = {**options, "chunk_size": 16} if "chunk_size" in options else options
    case = build(length=length, **options)
    after = case(impl, block_size=64).state
    for before, now in zip(case.state.weights, after.weights, strict=True):
        assert (now - before).flatten(2).norm(dim=-1).min() > 1e-4
    # ... and what they write is what is read, by this very token.
    still = case.set("learning_rate", 0.0)(impl)
    assert (case(impl).output - still.output).abs().amin((1, 3)).min() > 1e-6


@every_form
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_learns_without_autograd(impl, options, mode):
    case = build(length=9, **options, **ALL_GATES)
    expected = results(case.with_gradients()[0](impl))
    with mode():
        got = results(case.map(torch.clone)(impl))
    # Autograd has other formulas, of the same value, where it keeps a graph.
    rounding = 1e-15 if options["network"] is GATED else 0.0
    assert_same(got, {name: t.detach() for name, t in expected.items()}, rounding)


@every_form
def test_checkpointing_changes_no_gradient(impl, options):
    case, leaves = build(length=9, **options, **ALL_GATES).with_gradients()
    plain = results(case(impl))
    again = results(checkpoint(case, impl, use_reentrant=False))
    assert_same(again, plain, 0.0)
    assert_same(pull_back(again, leaves), pull_back(plain, leaves), 0.0)


@every_form
def test_all_that_is_kept_for_the_backward_pass_can_be_let_go(impl, options):
    """Checkpointing and offloading see what autograd saves: nothing may be kept beside it."""
    case, _ = build(length=9, **options, **ALL_GATES).with_gradients()
    output = case(impl).output
    given = {id(x) for x in (*case.tokens.values(), *case.state.tensors().values())}
    assert not [x for x in held_by(output.grad_fn) if id(x) not in given]


def held_by(node):
    """Tensors that the Python side of a graph's nodes holds."""
    found, seen, waiting = [], set(), [node]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        waiting += [after for after, _ in node.next_functions]
        kept = [x for name, x in vars(node).items()] if hasattr(node, "__dict__") else []
        found += [x for x in tree_leaves(kept) if isinstance(x, torch.Tensor)]
    return found


@pytest.mark.parametrize(
    ("impl", "options"),
    [form for name, form in FORMS.items() if not name.startswith("own")],
    ids=str,
)
def test_transforms_of_torch_func(impl, options):
    """Without a compiled or written-out backward pass, and with the same gradient."""
    case = build(length=9, **options, **ALL_GATES)

    def total(values, impl):
        tokens = {**case.tokens, "values": values}
        return replace(case, tokens=tokens)(impl).output.square().sum()

    got = torch.func.grad(partial(total, impl="auto" if impl == "native" else impl))(
        case.tokens["values"]
    )
    values = case.tokens["values"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(values, "reference"), values)
    assert_same({"values": got}, {"values": expected}, 1e-10)


@every_form
def test_nothing_is_modified_in_place(impl, options):
    case = build(length=9, **options, **ALL_GATES)
    given = {}
    collect(case.tokens, "tokens", given)
    collect(case.settings, "settings", given)
    given |= case.state.tensors()
    copies = {name: (x.clone(), x._version) for name, x in given.items()}
    first = case(impl)
    kept = first.state.fork()
    replace(case, state=first.state)(impl)  # reading on must not touch the state it starts from
    for name, (copy, version) in copies.items():
        assert torch.equal(given[name], copy), name
        assert given[name]._version == version, name
    assert_same(first.state.tensors(), kept.tensors(), 0.0)


def test_block_size_changes_speed_only():
    case = build(length=23, **ALL_GATES)
    expected = results(case("exact", block_size=1))
    for block_size in (2, 7, 23, 64):
        assert_same(results(case("exact", block_size=block_size)), expected, 1e-12)


@every_form
def test_memory_keeps_its_own_precision_in_a_bfloat16_model(impl, options):
    """Low-precision tokens, and autocast around the call: the state stays float32."""
    case = build(length=9, dtype=torch.float32, **options, **ALL_GATES)
    tokens = {
        name: x.bfloat16() if name in ("queries", "keys", "values") else x
        for name, x in case.tokens.items()
    }
    rounded = replace(case, tokens={name: x.float() for name, x in tokens.items()})
    expected = rounded(impl)
    with torch.autocast("cpu", torch.bfloat16):
        got = replace(case, tokens=tokens)(impl)
    assert got.output.dtype == torch.bfloat16
    torch.testing.assert_close(got.output, expected.output.bfloat16(), rtol=0, atol=0)
    assert_same(got.state.tensors(), expected.state.tensors(), 0.0)


@pytest.mark.parametrize("network", [LINEAR, MLP], ids=["linear", "mlp"])
def test_native_bf16_products(network):
    """Factors carry 8 bits, so results are within some 2^-8; the state stays float32."""
    options = {"network": network, "chunk_size": 8, "length": 24, "key_dim": 16, "decay": "scalar"}
    case = build(dtype=torch.float32, **options)
    expected, slopes = gradients(case, "native")
    wide = dict(case.settings)
    wide["precision"] = "bf16"
    got, got_slopes = gradients(replace(case, settings=wide), "native")
    assert_same(got, expected, 0.05)
    assert_same(got_slopes, slopes, 0.05)
    assert {t.dtype for t in got.values()} == {torch.float32}
    if native.library(torch.float32).has_bf16():
        assert not torch.equal(got["output"], expected["output"])
