"""The rule, and what a layer does to each token around it, in C for a CPU.

scan.c and scan.py: the closed and the exact form. tokens.c and tokens.py: convolution, norms
and gates. build.py compiles both on first use.
"""

import ctypes

import torch

from titans.ops.native.build import BuildError, library
from titans.ops.native.scan import Call, neural_memory_native, unsupported
from titans.ops.native.tokens import BLOCK, MAX_WIDTH, Emission, Mixing, emit_native, mix_native

__all__ = [
    "BuildError",
    "compiled",
    "emit_native",
    "mix_native",
    "neural_memory_native",
    "unsupported",
]


def compiled(dtype: torch.dtype) -> None:
    """Build what is not built yet. BuildError when that cannot be."""
    loaded = library(dtype)
    assert (loaded.tokens_block(), loaded.tokens_width()) == (BLOCK, MAX_WIDTH)
    for name, mirror in (("call", Call), ("mixing", Mixing), ("emission", Emission)):
        size = getattr(loaded, f"{name}_size")
        size.restype = ctypes.c_int64
        assert size() == ctypes.sizeof(mirror), f"{mirror.__name__} is not what the C source says"
