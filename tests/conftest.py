"""What all tests share: property tests draw the same examples on every machine and every run."""

import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "titans",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("titans")


@pytest.fixture
def without_shape_checks():
    """As users run: no jaxtyping. For long streams, and for the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
