"""What is particular to the compiled form: its build, its threads, the memory it points into.

That it computes the rule is test_equivalence.py's and test_laws.py's question.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from cases import LINEAR, MLP, assert_same, build, gradients, results

from titans.ops.native import build as building
from titans.ops.native import scan


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_gate_and_a_view_of_it_are_two_gates():
    """They begin at one address."""
    case = build(network=MLP, chunk_size=4, length=9)
    rate = case.tokens["learning_rate"]
    pair = [rate, rate[:, :1].expand_as(rate)]
    given = replace(case, tokens={**case.tokens, "learning_rate": pair})
    assert_same(results(given("native")), results(given("reference")))


def test_a_detached_gate_gets_no_gradient():
    case = build(network=MLP, chunk_size=4, length=9)
    leaf = case.tokens["learning_rate"].clone().requires_grad_()
    given = replace(case, tokens={**case.tokens, "learning_rate": [leaf, leaf.detach()]})
    slopes = [
        torch.autograd.grad(given(impl).output.sum(), leaf)[0] for impl in ("native", "reference")
    ]
    assert_same({"rate": slopes[0]}, {"rate": slopes[1]})


@pytest.mark.parametrize("network", [LINEAR, MLP], ids=["linear", "mlp"])
def test_threads_change_nothing(two_threads, monkeypatch, network):
    chunk_size = 1 if network is LINEAR else 4
    case = build(network=network, chunk_size=chunk_size, length=30, batch=3, heads=3)
    alone = gradients(case, "native")
    monkeypatch.setattr(scan, "SHARED_WORK", 0)
    shared = gradients(case, "native")
    for one, other in zip(alone, shared, strict=True):
        assert_same(one, other, 0.0)


def test_no_sequences_and_no_heads():
    for options in ({"batch": 0}, {"heads": 0}):
        case = build(length=5, **options)
        assert case("native").output.shape == case("chunked").output.shape


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_an_interrupt_waits_for_the_threads(two_threads, monkeypatch):
    """The tensors that a thread writes to outlive it, whatever is raised meanwhile."""
    monkeypatch.setattr(scan, "SHARED_WORK", 0)
    running, started = [0], threading.Event()

    class Slow:
        argtypes = None

        def __call__(self, call, first, last):
            running[0] += 1
            started.set()
            threading.Event().wait(0.3)
            running[0] -= 1
            return 0

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    call = scan.Call(batch=1, heads=2, length=8, depth=1)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.05)  # again and again
    try:
        with pytest.raises(KeyboardInterrupt):
            scan.run(Slow(), call)
        assert started.is_set()
        assert running[0] == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_process(cache, code, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"import torch, titans.ops.native as n; {code}"],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
    )


LOAD = "n.compiled(torch.float32); print('loaded')"


def test_a_damaged_library_is_built_again(tmp_path):
    quick = tmp_path / "cc"  # the last -O wins
    quick.write_text(f'#!/bin/sh\nexec {shlex.join(building.compiler())} "$@" -O0\n')
    quick.chmod(0o755)
    assert in_process(tmp_path, LOAD, CC=str(quick)).stdout == "loaded\n"
    (library,) = (tmp_path / "titans").glob("*.so")
    whole = library.read_bytes()
    library.write_bytes(whole[:30000])
    assert in_process(tmp_path, LOAD, CC=str(quick)).stdout == "loaded\n"
    assert library.read_bytes()[:4] == whole[:4]
    assert len(library.read_bytes()) > 30000
    (tmp_path / "titans" / f"{library.name}.sha256").write_bytes(b"\xff\xfe\x80")
    assert in_process(tmp_path, LOAD, CC=str(quick)).stdout == "loaded\n"
    assert sorted(p.suffix for p in (tmp_path / "titans").iterdir()) == [".sha256", ".so"]
    # What is built is found again without a compiler.
    assert in_process(tmp_path, LOAD, PATH="", CC="").stdout == "loaded\n"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "", "CC": ""}, "no C compiler found"),
        ({"CC": "false"}, "false failed: exit 1"),
    ],
    ids=["none", "broken"],
)
def test_without_a_compiler_auto_says_so_and_goes_on(tmp_path, environment, reason):
    code = (
        "from titans.ops import MemoryNetwork; from titans.ops.api import resolve_implementation;"
        "print(resolve_implementation('auto', MemoryNetwork(), 4))"
    )
    result = in_process(tmp_path, code, **environment)
    assert result.stdout == "chunked\n", result.stderr
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_cache_falls_back_to_temporary_files(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(building.tempfile, "gettempdir", lambda: str(tmp_path))
    building.cache_folder.cache_clear()
    try:
        folder = building.cache_folder()
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        building.cache_folder.cache_clear()
