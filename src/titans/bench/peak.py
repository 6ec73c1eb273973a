"""Run as `python -m titans.bench.peak` with a contestant as JSON on stdin: prints its peak memory.

A small step comes first, so that libraries and thread pools are not counted.
"""

import json
import sys
from dataclasses import replace

from titans.bench.contestants import Contestant, make_steps
from titans.bench.measure import peak_memory_mb

WARM_UP_TOKENS = 256


def main() -> None:
    contestant = Contestant(**json.load(sys.stdin))
    small = replace(contestant, length=min(WARM_UP_TOKENS, contestant.length), batch=1)
    make_steps(small).train()
    print(peak_memory_mb(make_steps(contestant).train, contestant.device))


if __name__ == "__main__":
    main()
