"""The server under load and under kill -9, as its clients see it: `benchmarks/serve.py`."""

import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import torch

from titans.bench.measure import hardware
from titans.data.carrier import python_text
from titans.demo import asset
from titans.generate import stream
from titans.models.lm import TitansLM, load
from titans.state import ModelState

START_S = 120.0
REQUEST_S = 300.0
KILLED_SESSIONS = 8
JSON = {"Content-Type": "application/json"}
TEXT = {"Content-Type": "text/plain; charset=utf-8"}


class Server:
    """`titans serve` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.arguments = folder, arguments
        self.process: subprocess.Popen[str] | None = None
        self.port = 0

    def start(self) -> None:
        """Return when it listens. RuntimeError where it does not."""
        command = [sys.executable, "-m", "titans.cli", "serve", "--port", "0"]
        command += ["--folder", str(self.folder), *self.arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if line.startswith("Serving at "):
                self.port = int(line.rpartition(":")[2])
                return
        self._end()
        raise RuntimeError(f"the server did not start: {''.join(said).strip()}")

    def kill(self) -> None:
        """kill -9: no handler, no goodbye."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self._end()

    def stop(self) -> int:
        """Ctrl-C; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self._end()

    def _end(self) -> int:
        assert self.process is not None
        assert self.process.stdout is not None
        code = self.process.wait(START_S)
        self.process.stdout.close()
        return code

    def request(
        self, method: str, path: str, content: bytes | None = None, headers: Any = None
    ) -> tuple[int, bytes]:
        """Status and body. OSError or HTTPException when the server goes away."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_S)
        try:
            connection.request(method, path, content, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def call(self, method: str, path: str, content: Any = None) -> dict[str, Any]:
        """JSON in, JSON out; RuntimeError unless it is answered 200 or 201."""
        if isinstance(content, str):
            status, body = self.request(method, path, content.encode(), TEXT)
        else:
            status, body = self.request(method, path, json.dumps(content or {}).encode(), JSON)
        if status not in (200, 201):
            raise RuntimeError(f"{method} {path}: {status} {body.decode()[:200]}")
        return json.loads(body)


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Server]:
    server = Server(folder, *arguments)
    server.start()
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop()


@dataclass
class Times:
    """Seconds of every request of a kind."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    read: int = 0
    drawn: int = 0


def load_test(server: Server, sessions: int, seconds: float, text: str) -> dict[str, Any]:
    """Each of `sessions` clients reads and asks in turn until the time is over.

    A read is 2,048 bytes, an ask 16 tokens of prompt and 32 of answer.
    """
    times, lock, begin = Times(), threading.Lock(), time.perf_counter()

    def client(number: int) -> None:
        chance = random.Random(number)
        session = server.call("POST", "/v1/sessions", {"name": f"client {number}"})["id"]
        while time.perf_counter() - begin < seconds:
            start = chance.randrange(len(text) - 2048)
            part = text[start : start + 2048]
            question = {"prompt": part[:16], "max_tokens": 32, "seed": number}
            for kind, body in (("read", part), ("ask", question)):
                at = time.perf_counter()
                try:
                    answer = server.call("POST", f"/v1/sessions/{session}/{kind}", body)
                except (OSError, HTTPException, RuntimeError) as error:
                    with lock:
                        times.errors.append(str(error))
                    continue
                with lock:
                    times.seconds.setdefault(kind, []).append(time.perf_counter() - at)
                    times.read += answer.get("read", 0)
                    times.drawn += answer.get("tokens", 0)

    with ThreadPoolExecutor(sessions) as pool:
        list(pool.map(client, range(sessions)))
    elapsed = time.perf_counter() - begin
    rows = []
    for kind, taken in times.seconds.items():
        cuts = statistics.quantiles(taken, n=100, method="inclusive")
        rows.append(
            {
                "request": kind,
                "requests": len(taken),
                "per_s": len(taken) / elapsed,
                "p50_s": cuts[49],
                "p95_s": cuts[94],
                "p99_s": cuts[98],
                "max_s": max(taken),
            }
        )
    return {
        "sessions": sessions,
        "seconds": elapsed,
        "rows": rows,
        "errors": len(times.errors),
        "first_errors": times.errors[:5],
        "tokens_read_per_s": times.read / elapsed,
        "tokens_drawn_per_s": times.drawn / elapsed,
        "rows_per_batch": rows_per_batch(server),
    }


def rows_per_batch(server: Server) -> float:
    """Pieces computed per computation, since the server began."""
    _, body = server.request("GET", "/metrics")
    values = dict(line.rsplit(" ", 1) for line in body.decode().splitlines() if line[0] != "#")
    return float(values["titans_batch_rows_total"]) / float(values["titans_batches_total"])


def kill_rounds(server: Server, rounds: int, sessions: int, text: str, seed: int = 0) -> int:
    """Kill the server in the middle of reads and asks, start it again, and look at every session.

    What was answered must be there; of the request in flight, all or nothing. Each session's
    state must be that of reading its log anew. Returns requests that were in flight.

    Raises RuntimeError when anything was lost.
    """
    chance = random.Random(seed)
    model = load(asset("demo.safetensors"))
    ids = [server.call("POST", "/v1/sessions", {"name": str(i)})["id"] for i in range(sessions)]
    answered = dict.fromkeys(ids, b"")
    in_flight = 0
    for number in range(rounds):
        sent = read_and_ask_until_killed(server, answered, text, chance)
        in_flight += sum(part is not None for part in sent.values())
        check_folder(server, answered, sent, model, chance.sample(ids, min(3, len(ids))))
        server.start()
        there = server.call("GET", "/v1/sessions")["sessions"]
        listed = {s["id"]: s["tokens_read"] for s in there if s["id"] in answered}
        expected = {id: len(content) for id, content in answered.items()}
        if listed != expected:
            raise RuntimeError(f"round {number}: the server has {listed}, expected {expected}")
    return in_flight


def read_and_ask_until_killed(
    server: Server, answered: dict[str, bytes], text: str, chance: random.Random
) -> dict[str, bytes | None]:
    """What each session's read in flight had sent; `answered` grows by what was acknowledged."""
    sent: dict[str, bytes | None] = dict.fromkeys(answered)
    starts = {id: chance.randrange(len(text) // 2) for id in answered}
    over, begun = threading.Event(), threading.Event()

    def client(id: str) -> None:
        place, question = starts[id], json.dumps({"prompt": "x", "max_tokens": 8}).encode()
        while not over.is_set():
            part = text[place : place + 700].encode()
            place += 700
            sent[id] = part
            try:
                status, _ = server.request("POST", f"/v1/sessions/{id}/read", part, TEXT)
                if status != 200:
                    raise RuntimeError(f"a read was answered {status}")
                answered[id] += part
                sent[id] = None
                begun.set()
                server.request("POST", f"/v1/sessions/{id}/ask", question, JSON)
            except (OSError, HTTPException):
                return

    with ThreadPoolExecutor(len(answered)) as pool:
        clients = [pool.submit(client, id) for id in answered]
        begun.wait(REQUEST_S)
        time.sleep(chance.uniform(0.0, 1.0))
        server.kill()
        over.set()
        for running in clients:
            running.result()
    return sent


def check_folder(
    server: Server,
    answered: dict[str, bytes],
    sent: dict[str, bytes | None],
    model: TitansLM,
    reread: list[str],
) -> None:
    """Every session.json, log and state of the dead server fit what its clients were told.

    reread: sessions whose log is read anew, to compare the state.
    """
    for id in answered:
        path = server.folder / id
        record = json.loads((path / "session.json").read_text())
        log = (path / record["log"]).read_bytes()[: record["logged"] * 2 : 2]  # uint16 of bytes
        part = sent[id]
        if part is not None and log == answered[id] + part:
            answered[id] += part  # it had counted; only the answer was lost
        if log != answered[id] or record["tokens_read"] != len(log):
            raise RuntimeError(f"session {id} has {len(log)} tokens, expected {len(answered[id])}")
        state = ModelState.load(path / record["state"])
        if state.position != len(log):
            raise RuntimeError(f"session {id}: its state has read {state.position}")
        if id in reread and log:
            *_, last = stream(model, torch.tensor(list(log)))
            for name, tensor in last.state.tensors().items():
                torch.testing.assert_close(state.tensors()[name], tensor, rtol=1e-3, atol=1e-3)


def bench_serve(folder: Path, *, sessions: int, seconds: float, kills: int) -> dict[str, Any]:
    """The load test, then the kills; what `benchmarks/serve.py` writes."""
    text = b"".join(part.tobytes() for part in python_text(held_out=True))[: 2**20]
    ascii_text = text.decode("ascii", "ignore")
    with serving(folder / "load") as server:
        result = load_test(server, sessions, seconds, ascii_text)
    begin = time.perf_counter()
    with serving(folder / "kills") as server:
        result["kills"] = kills
        result["in_flight"] = kill_rounds(server, kills, KILLED_SESSIONS, ascii_text)
    result["kill_seconds"] = time.perf_counter() - begin
    result["hardware"] = hardware()
    return result


def section(result: dict[str, Any]) -> str:
    """Its part of RESULTS.md."""
    machine = result["hardware"]
    lines = [
        "\n## serve\n",
        f"`titans serve` with the demo's model and {result['sessions']} clients at once, each with "
        "a session of its own: in turn it reads 2,048 bytes and asks with 16 tokens of prompt for "
        "32 of answer. Then kill -9 in the middle of such requests.\n",
        f"    {result['command']}\n",
        "| request | requests | a second | median s | 95 % s | 99 % s | slowest s |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['request']} | {row['requests']:,} | {row['per_s']:.1f} | {row['p50_s']:.2f} | "
            f"{row['p95_s']:.2f} | {row['p99_s']:.2f} | {row['max_s']:.2f} |"
            for row in result["rows"]
        ),
        f"\n{result['seconds']:.0f} s, {result['errors']} errors; "
        f"{result['tokens_read_per_s']:,.0f} tokens/s read and "
        f"{result['tokens_drawn_per_s']:,.0f} drawn, in batches of "
        f"{result['rows_per_batch']:.1f} sessions on average.\n",
        f"Killed {result['kills']} times with {result['in_flight']} reads in flight; every "
        "session was whole each time: no answered read was lost, one in flight was there as a "
        "whole or not at all, and the states were those of reading the logs anew.\n",
        f"{machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}; "
        f"{machine['date']}.\n",
    ]
    return "\n".join(lines)
