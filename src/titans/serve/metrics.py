"""Counters in Prometheus' text format."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

BUCKETS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)


class Metrics:
    """Counts only go up; each is written by one thread."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.request_buckets: Counter[float] = Counter()
        self.request_seconds = 0.0
        self.running = 0
        self.tokens_read = 0
        self.tokens_generated = 0
        self.batches = 0
        self.batch_rows = 0
        self.engine_seconds = 0.0

    def answered(self, method: str, status: int, seconds: float) -> None:
        known = method if method in ("GET", "HEAD", "POST", "PATCH", "DELETE") else "other"
        self.requests[known, status] += 1
        self.request_seconds += seconds
        for bucket in BUCKETS:
            self.request_buckets[bucket] += seconds <= bucket

    def computed(self, items: list[Any], seconds: float) -> None:
        self.batches += 1
        self.batch_rows += len(items)
        self.engine_seconds += seconds

    def text(self, gauges: Iterable[tuple[str, str, float]]) -> str:
        """All of it; gauges: name, help and value of what others know."""
        lines: list[str] = []

        def write(name: str, kind: str, about: str, samples: Iterable[tuple[str, float]]) -> None:
            lines.extend((f"# HELP titans_{name} {about}", f"# TYPE titans_{name} {kind}"))
            lines.extend(f"titans_{name}{label} {value}" for label, value in samples)

        counted = [
            (f'{{method="{method}",status="{status}"}}', float(count))
            for (method, status), count in sorted(self.requests.items())
        ]
        write("requests_total", "counter", "Requests answered.", counted)
        answered = sum(self.requests.values())
        seconds = [
            *((f'_bucket{{le="{b}"}}', float(self.request_buckets[b])) for b in BUCKETS),
            ('_bucket{le="+Inf"}', float(answered)),
            ("_sum", self.request_seconds),
            ("_count", float(answered)),
        ]
        write("request_seconds", "histogram", "From a request's head to its end.", seconds)
        counters = (
            ("tokens_read_total", "Tokens read into sessions.", self.tokens_read),
            ("tokens_generated_total", "Tokens drawn.", self.tokens_generated),
            ("batches_total", "Computations of the engine.", self.batches),
            ("batch_rows_total", "Pieces computed in them.", self.batch_rows),
            ("engine_seconds_total", "Time the engine computed.", self.engine_seconds),
        )
        for name, about, value in counters:
            write(name, "counter", about, [("", float(value))])
        write("requests_running", "gauge", "Requests being handled.", [("", float(self.running))])
        for name, about, value in gauges:
            write(name, "gauge", about, [("", float(value))])
        return "\n".join(lines) + "\n"
