"""The compiled kernels on a GPU, where there is one: values and every gradient, float32.

`test_triton.py` says what is right, without a GPU; this says that compiling kept it so.
"""

from dataclasses import replace

import pytest
import torch
from cases import LINEAR, assert_same, build, join, results
from test_triton import (
    DECODE_SETTINGS,
    EXACT_SETTINGS,
    LINEAR_SETTINGS,
    MLP_SETTINGS,
    RESIDUAL,
    C,
    assert_errs_no_more_than_the_reference,
    needs_triton,
    reference,
    run,
    small,
    values_and_gradients,
)

pytestmark = [
    needs_triton,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


SETTINGS = [*LINEAR_SETTINGS, *({"chunk_size": 1, **x} for x in EXACT_SETTINGS), *MLP_SETTINGS]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_small_sizes(settings):
    case = small(**{"length": 3 * C + 5, **settings, "dtype": torch.float32})
    assert_errs_no_more_than_the_reference(case, device="cuda")


FULL_SIZE = pytest.mark.parametrize(
    ("network", "chunk_size"), [(LINEAR, 1), (LINEAR, 64), (RESIDUAL, 16), (RESIDUAL, 64)], ids=str
)


def full_size(network, chunk_size):
    return build(
        network=network,
        chunk_size=chunk_size,
        block_size=64,
        length=200,
        key_dim=64,
        value_dim=64,
        momentum=True,
        decay="scalar",
        anchor=True,
        dtype=torch.float32,
    )


@FULL_SIZE
def test_full_size(network, chunk_size):
    case = full_size(network, chunk_size)
    assert_errs_no_more_than_the_reference(case, device="cuda")


@FULL_SIZE
@pytest.mark.parametrize(("precision", "tolerance"), [("tf32x3", 1e-4), ("tf32", 3e-2)])
def test_shorter_products(network, chunk_size, precision, tolerance):
    """tf32 keeps 10 bits of every factor, which sums and steps amplify some."""
    case = full_size(network, chunk_size)
    got = values_and_gradients(case, device="cuda", precision=precision)
    truth = values_and_gradients(case.to(torch.float64), reference)
    assert_same(got, truth, tolerance)


@pytest.mark.parametrize("settings", DECODE_SETTINGS, ids=str)
def test_decoding(settings):
    case = small(**{"length": 7, "chunk_size": 3, **settings, "dtype": torch.float32})
    on_gpu = case.map(lambda x: x.cuda())
    state, outputs = on_gpu.state, []
    with torch.no_grad():
        for t in range(case.length):
            outputs.append(run(replace(on_gpu.piece(t, t + 1), state=state)))
            state = outputs[-1].state
    got = {name: tensor.cpu() for name, tensor in results(join(outputs)).items()}
    assert_same(got, results(case.to(torch.float64)("reference")), 1e-5)
