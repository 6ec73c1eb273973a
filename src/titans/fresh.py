"""Python in a process of its own: what a cold start costs or finds, and memory of nobody else."""

import subprocess
import sys


class FreshProcessError(RuntimeError):
    """The process has failed; the last line it said."""


def in_fresh_process(module: str, *arguments: str, input: str | None = None) -> str:
    """The last line that `python -m module arguments` writes. FreshProcessError where it fails."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, input=input, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise FreshProcessError(lines[-1])
    return done.stdout.splitlines()[-1]
