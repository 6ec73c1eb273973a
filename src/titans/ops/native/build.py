"""Compile scan.c once per machine and load it.

The library is kept in `$XDG_CACHE_HOME/titans` (or ~/.cache/titans) under a name made from the
sources, the flags, the compiler and the processor, so a change of any of them builds anew.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = ("scan.c", "matrix.h")
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
REALS = {torch.float32: ("float", ()), torch.float64: ("double", ("-DREAL_IS_DOUBLE=1",))}


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message is one line."""


def compiler() -> str:
    """The C compiler: $CC, else cc, gcc or clang. BuildError when there is none."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("no C compiler found (set CC, or install gcc or clang)")


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled scan for float32 or float64. BuildError when it cannot be had."""
    command = compiler()
    real, defines = REALS[dtype]
    here = Path(__file__).parent
    flags = [*FLAGS, tune_flag(), f"-DREAL={real}", *defines]
    identity = hashlib.sha256()
    for part in (*flags, command, processor()):
        identity.update(part.encode() + b"\0")
    for name in SOURCES:
        identity.update((here / name).read_bytes())
    path = cache_folder() / f"scan-{real}-{identity.hexdigest()[:16]}.so"
    if not path.exists():
        build([command, *flags, "-shared", "-fPIC", str(here / "scan.c")], path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error})") from None


def build(command: list[str], path: Path) -> None:
    """Compile beside the target, then rename: another process may build at the same time."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", temporary, "-lm"], capture_output=True, text=True)
        if done.returncode:
            reason = next(iter(done.stderr.strip().splitlines()), f"exit {done.returncode}")
            raise BuildError(f"{command[0]} failed: {reason}")
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "titans"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="titans-"))


def tune_flag() -> str:
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def processor() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        return "".join(
            sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
        )
    return f"{platform.machine()} {platform.processor()}"
