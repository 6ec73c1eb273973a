"""What a process frees stays with it once `keep_freed` was called."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from titans.heap import keep_freed
kept = sys.argv[1] == "kept" and keep_freed()
def use():
    tensors = [torch.full((13 << 18,), 1.0) for _ in range(4)]  # 13 MB each
use()
use()
begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""


def faults(how: str, **environment: str) -> tuple[bool, int]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


def test_freed_memory_is_not_faulted_in_again() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("malloc is not glibc's")
    kept, few = faults("kept")
    assert kept
    _, many = faults("returned")
    assert few < many / 3


def test_settings_of_the_environment_stand() -> None:
    assert not faults("kept", MALLOC_TRIM_THRESHOLD_="131072")[0]
