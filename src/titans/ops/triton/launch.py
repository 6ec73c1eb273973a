"""How kernels are launched: tuned tilings on a GPU, one tiling under the interpreter."""

from collections.abc import Callable, Iterator
from typing import Any

import triton

SCRATCH_BYTES = 1 << 30
"""Chunk-boundary states held at once; longer sequences run segment by segment."""

KEY = ["D", "F", "V", "BLOCK_C", "PRECISION"]
"""What a tuned tiling depends on."""

COUNTS = ["N", "FIRST", "COUNT"]
"""Integers that vary from call to call; one compiled kernel serves all of them."""


def interpreting() -> bool:
    return bool(triton.knobs.runtime.interpret)


def tuned(*options: tuple[int, int], blocks: tuple[int, ...] = ()) -> Callable[[Any], Any]:
    """Autotune over (num_warps, num_stages) and BLOCK_F in `blocks`, once per `KEY`.

    The interpreter knows neither warps nor stages, and gets the first option without timing.
    """
    configs = [
        triton.Config({"BLOCK_F": block} if block else {}, num_warps=warps, num_stages=stages)
        for block in blocks or (0,)
        for warps, stages in options
    ]
    return triton.autotune(
        configs[:1] if interpreting() else configs,
        key=KEY,
        prune_configs_by={"early_config_prune": within_hidden},
    )


def within_hidden(configs: list[Any], named: dict[str, Any], **constants: Any) -> list[Any]:
    """Configurations whose block of hidden units is no larger than the hidden layer."""
    return [c for c in configs if c.kwargs.get("BLOCK_F", 0) <= constants.get("F", 0)]


def block_of(length: int) -> int:
    """Rows of a tile that holds a chunk: a power of two, and at least what tl.dot takes."""
    return max(16, triton.next_power_of_2(length))


def segments(chunks: int, bytes_per_chunk: int) -> Iterator[tuple[int, int]]:
    """(first chunk, number of chunks) of consecutive segments that fit into the scratch."""
    size = max(1, SCRATCH_BYTES // bytes_per_chunk)
    for first in range(0, chunks, size):
        yield first, min(size, chunks - first)
