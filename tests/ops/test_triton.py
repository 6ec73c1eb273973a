"""The GPU kernels, run by triton's interpreter on a CPU, compute the function of the reference.

The interpreter executes float64 as well, so the bound is that of every other form: 1e-10 for
values and every gradient. Whether the kernels compile is `test_triton_compile.py`'s question.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import LINEAR, Case, assert_same, build, join, pull_back, results

from titans.ops import MemoryNetwork, MemoryOutput
from titans.ops.rule import Gates
from titans.ops.triton import check_available, check_supported, neural_memory_triton

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernels run there: test_triton_gpu.py"
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

C = 8
LENGTHS = [1, 2, C - 1, C, C + 1, 13, 3 * C, 3 * C + 5]
RESIDUAL_LINEAR = MemoryNetwork(depth=1, residual=True, norm=False)
NORMED_LINEAR = MemoryNetwork(depth=1, residual=True, norm=True)
PLAIN = MemoryNetwork(depth=2, expansion=2, activation="silu", residual=False, norm=False)
RESIDUAL = MemoryNetwork(depth=2, expansion=4, activation="gelu", residual=True, norm=True)
SILU = MemoryNetwork(depth=2, expansion=4, activation="silu", residual=True, norm=True)
both_networks = pytest.mark.parametrize("network", [LINEAR, SILU], ids=["linear", "mlp"])


def run(case: Case, **options) -> MemoryOutput:
    """`neural_memory_triton` with its inputs prepared as `neural_memory` prepares them."""

    def gate(name):
        given = case.tokens.get(name)
        if given is None:
            return None
        if isinstance(given, list):
            return tuple(x.transpose(1, 2) for x in given)
        return (given.transpose(1, 2),) * case.settings["network"].depth

    output = neural_memory_triton(
        *(case.tokens[name].transpose(1, 2) for name in ("queries", "keys", "values")),
        Gates(gate("learning_rate"), gate("momentum"), gate("decay")),
        case.state,
        **case.settings,
        **options,
    )
    return MemoryOutput(
        output.output.transpose(1, 2), output.state, output.surprise.transpose(1, 2)
    )


def values_and_gradients(
    case: Case, compute=run, device: str = "cpu", **options
) -> dict[str, torch.Tensor]:
    case, leaves = case.with_gradients()
    output = compute(case.map(lambda x: x.to(device)), **options)
    result = {name: tensor.cpu() for name, tensor in results(output).items()}
    # In float64, where one seed draws the same weights for the sum whatever the case's dtype.
    parts = {name: tensor.double() for name, tensor in result.items() if name != "surprise"}
    slopes = pull_back(parts, leaves)
    return {**result, **{f"gradient of {name}": slope for name, slope in slopes.items()}}


def reference(case: Case) -> MemoryOutput:
    return case("reference")


def assert_equals_reference(case: Case, tolerance: float = 1e-10) -> None:
    assert_same(values_and_gradients(case), values_and_gradients(case, reference), tolerance)


def small(**settings) -> Case:
    """The least sizes there are kernels for."""
    return build(
        **{"key_dim": 16, "value_dim": 16, "batch": 1, "chunk_size": C, "block_size": C, **settings}
    )


@needs_triton
@pytest.mark.parametrize("length", LENGTHS)
@both_networks
def test_any_length(network, length):
    case = small(network=network, length=length, momentum=True, decay="scalar", anchor=True)
    assert_equals_reference(case)


LINEAR_SETTINGS = [
    {},
    {"momentum": True},
    {"decay": "scalar"},
    {"objective": "dot", "anchor": True},
    {"network": RESIDUAL_LINEAR, "anchor": True, "momentum": True, "heads": 1, "batch": 3},
    {"network": NORMED_LINEAR, "anchor": True, "momentum": True, "decay": "scalar"},
    {"network": NORMED_LINEAR, "objective": "dot"},
    {"network": NORMED_LINEAR, "offset": 3, "momentum": True},
    {"offset": 3, "momentum": True, "decay": "scalar", "anchor": True},
    {"key_dim": 32, "value_dim": 64, "length": 9, "momentum": True},
    {"network": NORMED_LINEAR, "chunk_size": 1, "length": 5, "momentum": True},
    {"chunk_size": 20, "length": 41},
]


@needs_triton
@pytest.mark.parametrize("settings", LINEAR_SETTINGS, ids=str)
def test_linear_settings(settings):
    assert_equals_reference(small(**{"length": 13, **settings}))


EXACT_SETTINGS = [
    {"momentum": True, "decay": "scalar", "anchor": True},
    {"network": RESIDUAL_LINEAR, "anchor": True, "value_dim": 16},
    {"momentum": True, "length": 1, "value_dim": 32},
    {"objective": "dot", "decay": "scalar", "anchor": True},
]


@needs_triton
@pytest.mark.parametrize("settings", EXACT_SETTINGS, ids=str)
def test_chunk_size_1_of_a_linear_memory_runs_in_blocks(settings):
    assert_equals_reference(small(**{"length": 3 * C + 5, "chunk_size": 1, **settings}))


MLP_SETTINGS = [
    {"network": PLAIN},
    {"network": PLAIN, "momentum": True, "anchor": True, "value_dim": 32},
    {"network": PLAIN, "objective": "dot", "decay": "scalar", "offset": 5},
    {"network": RESIDUAL, "objective": "dot", "momentum": True, "anchor": True},
    {"network": RESIDUAL, "heads": 1, "batch": 2, "offset": 3, "length": 3},
    {"network": SILU, "decay": "scalar", "anchor": True, "per_layer": True},
    {"network": SILU, "momentum": True, "per_layer": True, "offset": 3, "anchor": True},
    {"network": SILU, "chunk_size": 1, "length": 3, "momentum": True, "decay": "scalar"},
    {"network": SILU, "chunk_size": 20, "length": 21, "momentum": True},
]


@needs_triton
@pytest.mark.parametrize("settings", MLP_SETTINGS, ids=str)
def test_mlp_settings(settings):
    assert_equals_reference(small(**{"length": C + 1, **settings}))


@needs_triton
@both_networks
def test_segments_change_nothing(network, monkeypatch):
    """The boundary states of one chunk at a time, the others computed again in the backward."""
    from titans.ops.triton import launch

    case = small(network=network, length=3 * C + 1, heads=1, momentum=True, decay="scalar")
    once = values_and_gradients(case)
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 1)
    assert_same(values_and_gradients(case), once, 1e-12)


@needs_triton
@both_networks
def test_float32(network):
    case = small(
        network=network,
        length=70,
        momentum=True,
        decay="scalar",
        chunk_size=16,
        dtype=torch.float32,
    )
    assert_errs_no_more_than_the_reference(case)


def assert_errs_no_more_than_the_reference(case: Case, **options) -> None:
    """At most eight times as much as the float32 reference, against float64; 16 units in the
    last place are always allowed."""
    truth = values_and_gradients(case.to(torch.float64), reference)
    single = values_and_gradients(case, reference)
    for name, fast in values_and_gradients(case, **options).items():
        wanted = truth[name]
        scale = wanted.abs().max().clamp(min=1e-2)
        allowed = 8 * (single[name] - wanted).abs().max() + 16 * 2**-24 * scale
        error = (fast - wanted).abs().max()
        assert error <= allowed, f"{name}: {error:.1e}, reference {allowed / 8:.1e}"


DECODE_SETTINGS = [
    {"network": LINEAR, "momentum": True, "decay": "scalar", "anchor": True},
    {"network": LINEAR, "value_dim": 32, "objective": "dot"},
    {"network": NORMED_LINEAR, "momentum": True, "objective": "dot", "chunk_size": 1},
    {"network": RESIDUAL, "momentum": True, "decay": "scalar", "anchor": True},
    {"network": SILU, "per_layer": True, "momentum": True, "chunk_size": 1},
    {"network": PLAIN, "objective": "dot", "decay": "scalar"},
]


@needs_triton
@pytest.mark.parametrize("settings", DECODE_SETTINGS, ids=str)
def test_decoding_token_by_token(settings):
    """Without gradients, one token is one kernel; it begins and ends inside chunks as well."""
    case = small(**{"length": 7, "chunk_size": 3, "offset": 0, **settings})
    state, outputs = case.state, []
    with torch.no_grad():
        for t in range(case.length):
            outputs.append(run(replace(case.piece(t, t + 1), state=state)))
            state = outputs[-1].state
    assert_same(results(join(outputs)), results(case("reference")))


@needs_triton
@both_networks
def test_bfloat16_inputs(network):
    """Tokens come in the model's dtype; the memory and its reads stay float32."""
    case = small(network=network, length=C + 1, decay="scalar", dtype=torch.float32)
    names = ("queries", "keys", "values")
    short = {name: case.tokens[name].bfloat16() for name in names}
    rounded = {name: x.float() for name, x in short.items()}
    got = results(run(replace(case, tokens={**case.tokens, **short})))
    expected = results(replace(case, tokens={**case.tokens, **rounded})("reference"))
    assert_same(got, expected, 1e-5)


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        (MemoryNetwork(depth=3), {}, "depth 1 or 2, got depth 3"),
        (LINEAR, {"per_channel": True}, "decay per channel"),
        (LINEAR, {"max_surprise": 0.5}, "no max_surprise, got 0.5"),
        (LINEAR, {"key_dim": 48}, "key_dim in 16, 32, 64, 128, got 48"),
        (LINEAR, {"value_dim": 256}, "value_dim in 16, 32, 64, 128, got 256"),
        (MemoryNetwork(depth=2, expansion=3), {}, "expansion in 32, 64, 128, 256, 512, got 192"),
        (LINEAR, {"chunk_size": 256}, "at most 64 tokens, got 256"),
    ],
)
def test_what_has_no_kernel_is_refused(network, settings, message):
    with pytest.raises(ValueError, match=message):
        check_supported(network, **{"key_dim": 64, "value_dim": 64, "chunk_size": 16, **settings})


def test_float64_is_refused_on_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="float32 state, got float64"):
        check_supported(LINEAR, 64, 64, chunk_size=16, dtype=torch.float64)


@needs_triton
def test_without_a_gpu_or_the_interpreter_it_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu"):
        check_available("cpu")
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu"):
        run(small().to(torch.float32))


def test_without_triton_it_raises(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not installed: pip install -e '.\[triton\]'"):
        check_available("cuda")


def test_importing_titans_does_not_import_triton():
    script = "import sys, titans, titans.ops, titans.ops.triton; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env=dict(os.environ))


@needs_triton
@both_networks
def test_the_public_op_runs_it(network):
    """Tokens stay in their own precision, the state is float32."""
    chunk_size = 1 if network is LINEAR else C
    case = build(
        network=network,
        length=2 * C + 3,
        key_dim=16,
        value_dim=16,
        momentum=True,
        chunk_size=chunk_size,
        dtype=torch.float32,
    )
    assert_same(results(case("triton")), results(case("chunked")), 1e-4)
