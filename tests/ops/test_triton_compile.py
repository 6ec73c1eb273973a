"""Every kernel compiles for NVIDIA and AMD GPUs, on a machine that has none.

Values are `test_triton.py`'s question. Compiling runs in a process of its own, where kernels are
decorated neither for the interpreter nor by the shape checks.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}

KERNELS = {
    "linear_kernels": "state_forward read_forward read_backward state_backward token_backward",
    "mlp_kernels": "state_forward read_forward",
    "mlp_backward_kernels": "read_backward state_backward",
    "decode": "decode_linear decode_mlp",
}
INTEGERS = {"N", "FIRST", "COUNT", "L", "HEADS"}
ABSENT = {  # pointers that a memory without momentum, decay, anchor or base does not have
    *("M", "CARRY", "LAST", "S0", "S_ALL", "DS_READ", "DS_END", "DS_ALL", "DM", "DLAST"),
    *("P", "R", "DP", "DR", "BIAS"),
    *(
        f"{name}{layer}"
        for name in ("M", "CARRY", "LAST", "S", "DS", "DM", "DLAST", "A", "BASE", "DBASE")
        for layer in (1, 2)
    ),
    *("DS1_READ", "DS2_READ", "DU1", "ETA1", "ETA2", "ALPHA1", "ALPHA2", "S1_NEW", "S2_NEW"),
}
SMALL = {"D": 16, "F": 32, "V": 16, "BLOCK_C": 16, "BLOCK_V": 16, "BLOCK_F": 32}
LARGE = {"D": 64, "F": 256, "V": 64, "BLOCK_C": 64, "BLOCK_V": 32, "BLOCK_F": 16}
FLAGS = {"GELU": True, "L2": True, "NORM": True, "RESIDUAL": True}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("target", "size"),
    [
        ("sm_90", "small"),
        ("gfx942", "small"),
        *(
            pytest.param(target, size, marks=pytest.mark.slow)
            for target, size in [("sm_80", "small"), *((name, "large") for name in TARGETS)]
        ),
    ],
)
def test_every_kernel_compiles(target, size, tmp_path):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import test_triton_compile as t; t.compile_all({target!r}, t.{size.upper()})",
        ],
        env={
            **environment,
            "PYTHONPATH": str(Path(__file__).parent),
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def compile_all(target, sizes):
    for module_name, names in KERNELS.items():
        module = importlib.import_module(f"titans.ops.triton.{module_name}")
        for name in names.split():
            for absent in (set(), ABSENT):
                precision = "tf32" if sizes is LARGE else "ieee"
                constants = {**sizes, **FLAGS, "PRECISION": precision}
                kernel = compile_one(getattr(module, name).fn, target, constants, absent)
                shared = kernel.metadata.shared
                assert shared <= SHARED_BYTES[target], f"{module_name}.{name}: {shared} bytes"


def compile_one(function, target, constants, absent):
    """`function` ahead of time, with float32 tensors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, aligned = {}, {}, {}
    for parameter in function.params:
        name, at = parameter.name, (parameter.num,)
        if name in constants or name in absent:
            signature[name] = "constexpr"
            values[at] = constants.get(name)
        elif name in INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = "*fp32"
            aligned[at] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, values, aligned)
    options = {"num_warps": 8, "num_stages": 1}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
