"""Compile the C sources once per machine and load them.

The library is kept in `$XDG_CACHE_HOME/titans` (or ~/.cache/titans) under a name made from the
sources, the flags and the processor, so a change of any of them builds anew. Its checksum lies
beside it: a damaged library is built again.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = ("scan.c", "tokens.c")
HEADERS = ("matrix.h",)
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-pthread")
REALS = {torch.float32: ("float", ()), torch.float64: ("double", ("-DREAL_IS_DOUBLE=1",))}


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message is one line."""

    level = logging.WARNING  # of saying that a slower form runs


class NoSourcesError(BuildError):
    """The package is here without its C files, as in a model's folder that brings its code."""

    level = logging.INFO


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled code for float32 or float64. BuildError when it cannot be had."""
    try:
        return load_or_build(*REALS[dtype])
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        if isinstance(error, BuildError):
            raise
        reason = str(error).splitlines() or [type(error).__name__]
        raise BuildError(reason[0]) from None


def load_or_build(real: str, defines: tuple[str, ...]) -> ctypes.CDLL:
    here = Path(__file__).parent
    if not (here / SOURCES[0]).exists():
        raise NoSourcesError("this copy of titans is without its C files")
    flags = [*FLAGS, tune_flag(), f"-DREAL={real}", *defines]
    identity = hashlib.sha256()
    for part in (*flags, processor()):
        identity.update(part.encode() + b"\0")
    for name in (*SOURCES, *HEADERS):
        identity.update((here / name).read_bytes())
    path = cache_folder() / f"memory-{real}-{identity.hexdigest()[:16]}.so"
    if not is_whole(path):
        sources = (str(here / name) for name in SOURCES)
        build([*compiler(), *flags, "-shared", "-fPIC", *sources], path)
    return ctypes.CDLL(str(path))


def compiler() -> list[str]:
    """The C compiler: $CC, else cc, gcc or clang. BuildError when there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in (named, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    raise BuildError("no C compiler found (set CC, or install gcc or clang)")


def build(command: list[str], path: Path) -> None:
    """Compile beside the target, then rename: another process may build at the same time."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", temporary, "-lm"], capture_output=True, text=True)
        if done.returncode:
            reason = next(iter(done.stderr.strip().splitlines()), f"exit {done.returncode}")
            raise BuildError(f"{command[0]} failed: {reason}")
        checksum = Path(f"{temporary}.sha256")
        checksum.write_text(digest(Path(temporary)))
        for name in (temporary, checksum):
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
        os.replace(checksum, f"{path}.sha256")
        os.replace(temporary, path)
    finally:
        for name in (temporary, f"{temporary}.sha256"):
            if os.path.exists(name):
                os.unlink(name)


def is_whole(path: Path) -> bool:
    """Is the library there, as it was written? Loading half of one would end the process."""
    checksum = Path(f"{path}.sha256")
    whole = path.exists() and checksum.exists()
    return whole and checksum.read_bytes() == digest(path).encode()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def cache_folder() -> Path:
    """The user's cache; where that cannot be written, a folder of this user's among temporary
    files."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "titans"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        pass
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"titans-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise BuildError(f"{folder} belongs to another user")
    return folder


def tune_flag() -> str:
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def processor() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        starts = ("model name", "flags", "Features")
        return "".join(sorted({line for line in lines if line.startswith(starts)}))
    return f"{platform.machine()} {platform.processor()}"
