"""Is it numbers that are computed with, or something that stands for them?"""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_traced(tensors: Sequence[Tensor]) -> bool:
    """Is a compiler or a transform of `torch.func` at work, or are these no plain tensors (fake,
    distributed)? Then there are no numbers in memory to point at."""
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    return torch.compiler.is_compiling() or is_transformed() or not plain


def is_transformed() -> bool:
    """Is a transform of `torch.func` at work? Backward passes of our own are not for it."""
    return torch._C._are_functorch_transforms_active()
