"""One profile for every property test: the same examples on every machine and every run."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "titans",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("titans")
