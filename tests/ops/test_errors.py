"""Every ValueError of the op says what was expected and what came.

The shape checks of the test run are off here: users run without them, and they would speak first.
"""

from dataclasses import replace

import pytest
import torch
from cases import MLP, RESIDUAL, build

from titans.ops import MemoryNetwork, read_memory

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def with_tokens(case, **tokens):
    return replace(case, tokens={**case.tokens, **tokens})


def with_state(case, **fields):
    return replace(case, state=replace(case.state, **fields))


def halves(tensors):
    return tuple(t.half() for t in tensors)


# 2 sequences of 7 tokens, 2 heads, keys of 4, values of 3 (4 where the memory is residual)
PLAIN = build(dtype=torch.float32)
MOMENTUM = build(dtype=torch.float32, momentum=True)
DECAY = build(dtype=torch.float32, decay="scalar")
ANCHORED = build(dtype=torch.float32, anchor=True)
CHUNKED = build(dtype=torch.float32, chunk_size=4)
DEEP = build(dtype=torch.float32, network=MLP, decay="channel", per_layer=True)
RESIDUALS = build(dtype=torch.float32, network=RESIDUAL)
x = torch.randn

INPUTS = {
    "queries rank": (
        with_tokens(PLAIN, queries=x(2, 7, 8)),
        r"queries must be \(B, T, H, D\), got shape \(2, 7, 8\)",
    ),
    "keys rank": (
        with_tokens(PLAIN, keys=x(7, 4)),
        r"keys must be \(B, T, H, D\), got shape \(7, 4\)",
    ),
    "values rank": (
        with_tokens(PLAIN, values=x(2, 7, 2, 3, 1)),
        r"values must be \(B, T, H, D\), got shape \(2, 7, 2, 3, 1\)",
    ),
    "integer values": (
        with_tokens(PLAIN, values=torch.ones(2, 7, 2, 3, dtype=torch.long)),
        "values must be floating point, got torch.int64",
    ),
    "queries of another length": (
        with_tokens(PLAIN, queries=x(2, 6, 2, 4)),
        r"one shape, got \(2, 6, 2, 4\) and \(2, 7, 2, 4\)",
    ),
    "values of another length": (
        with_tokens(PLAIN, values=x(2, 6, 2, 3)),
        r"keys' B, T, H \(2, 7, 2\), got \(2, 6, 2, 3\)",
    ),
    "empty": (PLAIN.piece(0, 0), "the sequence is empty: expected T >= 1 tokens"),
    "residual sizes": (
        with_tokens(RESIDUALS, values=x(2, 7, 2, 3)),
        "a residual memory needs keys and values of one size, got 4 and 3",
    ),
}

STATES = {
    "weights of another layer count": (
        with_state(DEEP, weights=DEEP.state.weights[:1]),
        r"state.weights must have shapes \[\(2, 2, 4, 8\), \(2, 2, 8, 3\)\], "
        r"got \[\(2, 2, 4, 8\)\]",
    ),
    "weights of another batch": (
        replace(PLAIN, state=PLAIN.rows(0).state),
        r"state.weights must have shapes \[\(2, 2, 4, 3\)\], got \[\(1, 2, 4, 3\)\]",
    ),
    "base of another shape": (
        with_state(CHUNKED, base=(x(2, 2, 3, 4),)),
        r"state.base must have shapes \[\(2, 2, 4, 3\)\], got \[\(2, 2, 3, 4\)\]",
    ),
    "momentum of another shape": (
        with_state(MOMENTUM, momentum=(x(2, 1, 4, 3),)),
        r"state.momentum must have shapes \[\(2, 2, 4, 3\)\], got \[\(2, 1, 4, 3\)\]",
    ),
    "half precision": (
        with_state(PLAIN, weights=halves(PLAIN.state.weights)),
        r"state.weights must be float32 or float64, got \['torch.float16'\]",
    ),
    "momentum without a state": (
        with_tokens(PLAIN, momentum=x(2, 7, 2)),
        "momentum is given but the state holds none",
    ),
    "a state without momentum": (
        replace(MOMENTUM, tokens=PLAIN.tokens),
        "momentum is not given but the state holds some",
    ),
    "state of chunk size 1": (
        replace(CHUNKED, state=PLAIN.state),
        "the state was made for chunk_size 1, got 4",
    ),
    "state of chunks": (
        replace(PLAIN, state=CHUNKED.state),
        "the state was made for chunk_size above 1, got 1",
    ),
    "offset too large": (
        with_state(CHUNKED, offset=4),
        "state.offset must be below the chunk size 4, got 4",
    ),
    "offset negative": (with_state(CHUNKED, offset=-1), "below the chunk size 4, got -1"),
}

GATES = {
    "learning rate shape": (
        with_tokens(PLAIN, learning_rate=x(2, 7)),
        r"learning_rate of layer 0 must be \(2, 7, 2\), got \(2, 7\)",
    ),
    "learning rate has no channels": (
        with_tokens(PLAIN, learning_rate=x(2, 7, 2, 4)),
        r"learning_rate of layer 0 must be \(2, 7, 2\), got \(2, 7, 2, 4\)",
    ),
    "momentum shape": (
        with_tokens(MOMENTUM, momentum=x(2, 6, 2)),
        r"momentum of layer 0 must be \(2, 7, 2\), got \(2, 6, 2\)",
    ),
    "decay channels": (
        with_tokens(DECAY, decay=x(2, 7, 2, 3)),
        r"decay of layer 0 must be \(2, 7, 2\) or \(2, 7, 2, 4\), got \(2, 7, 2, 3\)",
    ),
    "decay channels of the hidden layer": (
        with_tokens(DEEP, decay=x(2, 7, 2, 4)),
        r"decay of layer 1 must be \(2, 7, 2\) or \(2, 7, 2, 8\), got \(2, 7, 2, 4\)",
    ),
    "too few layers": (
        with_tokens(DEEP, learning_rate=[x(2, 7, 2)]),
        r"learning_rate must have one tensor per layer \(2\), got 1",
    ),
    "too many layers": (
        with_tokens(DECAY, decay=[x(2, 7, 2)] * 2),
        r"decay must have one tensor per layer \(1\), got 2",
    ),
}

BAD = {**INPUTS, **STATES, **GATES}


@pytest.mark.parametrize(("case", "message"), BAD.values(), ids=BAD.keys())
def test_tensors_that_do_not_fit(case, message):
    with pytest.raises(ValueError, match=message):
        case("auto")


SETTINGS = {
    "chunk_size": (PLAIN, {"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    "block_size": (PLAIN, {"block_size": -3}, "block_size must be at least 1, got -3"),
    "objective": (
        PLAIN,
        {"objective": "l1"},
        "objective must be one of l2, dot or a function, got 'l1'",
    ),
    "max_surprise": (PLAIN, {"max_surprise": 0.0}, "max_surprise must be positive, got 0.0"),
    "impl": (
        PLAIN,
        {"impl": "fast"},
        "impl must be one of auto, reference, chunked, exact.*, got 'fast'",
    ),
    "anchor": (
        ANCHORED,
        {"anchor": [x(2, 4, 4)]},
        r"anchor must have shapes \[\(2, 4, 3\)\], got \[\(2, 4, 4\)\]",
    ),
    "exact, deep": (
        RESIDUALS,
        {"impl": "exact"},
        r"impl='exact' needs a linear memory \(depth 1, no norm\).*got depth 2, norm True",
    ),
    "exact, normed": (
        build(dtype=torch.float32, network=MemoryNetwork(depth=1, residual=False, norm=True)),
        {"impl": "exact"},
        "got depth 1, norm True, chunk_size 1, max_surprise None",
    ),
    "exact, chunks": (CHUNKED, {"impl": "exact"}, "norm False, chunk_size 4"),
    "exact, bounded": (PLAIN, {"impl": "exact", "max_surprise": 1.0}, "max_surprise 1.0"),
}


@pytest.mark.parametrize(("case", "options", "message"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_do_not_fit(case, options, message):
    with pytest.raises(ValueError, match=message):
        case(**{"impl": "auto", **options})


LINEAR = MemoryNetwork(depth=1, residual=False, norm=False)
READS = {
    "heads": ((1, 5, 1, 4), [(1, 2, 4, 4)], r"weights must have shapes \[\(1, 1, 4, 4\)\]"),
    "batch": ((1, 5, 2, 4), [(3, 2, 4, 4)], r"for these queries, got \[\(3, 2, 4, 4\)\]"),
    "size": ((1, 5, 2, 3), [(1, 2, 4, 4)], r"weights must have shapes \[\(1, 2, 3, 4\)\]"),
    "layers": ((1, 5, 2, 4), [(1, 2, 4, 4)] * 2, "weights must have shapes"),
    "none": ((1, 5, 2, 4), [], r"one per layer, got shapes \[\]"),
    "matrix": ((1, 5, 2, 4), [(4, 4)], r"one per layer, got shapes \[\(4, 4\)\]"),
    "queries": ((5, 2, 4), [(1, 2, 4, 4)], r"queries must be floating point \(B, T, H, D\)"),
}


@pytest.mark.parametrize(("queries", "weights", "message"), READS.values(), ids=READS.keys())
def test_reads_that_do_not_fit(queries, weights, message):
    with pytest.raises(ValueError, match=message):
        read_memory(x(*queries), [x(*shape) for shape in weights], LINEAR)


NETWORKS = {
    "depth": ({"depth": 0}, "depth must be at least 1, got 0"),
    "expansion": ({"expansion": 0}, "expansion must be at least 1, got 0"),
    "activation": ({"activation": "relu"}, "activation must be one of gelu, silu, got 'relu'"),
}


@pytest.mark.parametrize(("options", "message"), NETWORKS.values(), ids=NETWORKS.keys())
def test_networks_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryNetwork(**options)


@pytest.mark.parametrize("case", [PLAIN, MOMENTUM, DECAY, ANCHORED, CHUNKED, DEEP, RESIDUALS])
def test_what_these_cases_were_made_from_is_accepted(case):
    assert torch.isfinite(case("auto").output).all()
