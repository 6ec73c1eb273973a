"""What all tests share: property tests draw the same examples on every machine and every run."""

import inspect
import os
from typing import Any, get_args

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton reads it when it is first imported, which any test may cause. With a GPU the kernels run
# there (tests/ops/test_triton_gpu.py), without one in the interpreter (test_triton.py).
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "titans",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("titans")


def has_shapes(hint: Any) -> bool:
    """Is it, or does it contain, a type like `Float[Tensor, "batch time"]`?"""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(has_shapes(part) for part in get_args(hint))


def check_shapes(*, typechecker):
    """jaxtyping's decorator, for what has shapes to check.

    The import hook (`--jaxtyping-packages`) would put it around every function. Nine calls in ten
    are of functions without shapes: mypy has checked those, and the laws take twice as long.
    """

    def decorate(fn):
        shapes = any(has_shapes(hint) for hint in getattr(fn, "__annotations__", {}).values())
        return jaxtyped(fn, typechecker=typechecker) if shapes else fn

    return decorate


jaxtyped, jaxtyping.jaxtyped = jaxtyping.jaxtyped, check_shapes


@pytest.fixture
def without_shape_checks():
    """As users run: no jaxtyping. For long streams, and for the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_collection_modifyitems(items):
    """A machine without a C compiler runs the torch forms, and tests those."""
    # Here, and not above: the package must be imported after the shape checks are set up.
    from titans.ops.native.build import BuildError, compiler

    try:
        compiler()
    except BuildError as error:
        for item in items:
            if "native" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=str(error)))
