"""A server in a process of its own: killed, restarted, and left by its clients in mid-sentence."""

import json
import re
import socket
import subprocess
import sys
import time

import pytest
import torch
from served import MEMORY, TEXT

from titans.bench.serve import Server, check_folder, kill_rounds, serving
from titans.cli import main
from titans.demo import asset
from titans.generate import stream
from titans.models.lm import load
from titans.state import ModelState

SENTENCE = "def parse(text: str) -> int:  # reads a number\n    return int(text)\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served") / "sessions") as running:
        yield running


def new_session(server: Server) -> str:
    return server.call("POST", "/v1/sessions")["id"]


def tokens_read(server: Server, session: str) -> int:
    return server.call("GET", f"/v1/sessions/{session}")["tokens_read"]


def open_request(server: Server, path: str, headers: str, body: bytes = b"") -> socket.socket:
    """The head of a request and the beginning of its body, on a socket of our own."""
    connection = socket.socket()
    connection.settimeout(120)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # soon full
    connection.connect(("127.0.0.1", server.port))
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
    connection.sendall(head.encode() + headers.encode() + b"\r\n" + body)
    return connection


def settled(server: Server, session: str) -> int:
    """Tokens read, once the session is free again and nothing is being read into it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        status, _ = server.request(
            "PATCH",
            f"/v1/sessions/{session}",
            b'{"name": "x"}',
            {"Content-Type": "application/json"},
        )
        if status == 200:
            return tokens_read(server, session)
    raise AssertionError("the session stayed busy")


def assert_whole(server: Server, session: str, text: str) -> None:
    """Its log is a beginning of the text, and its state that of reading this beginning."""
    path = server.folder / session
    record = json.loads((path / "session.json").read_text())
    assert record["tokens_read"] == record["logged"]
    log = (path / record["log"]).read_bytes()[::2]
    assert len(log) == record["logged"]
    assert log == text.encode()[: len(log)]
    state = ModelState.load(path / record["state"])
    assert state.position == len(log)
    if log:
        *_, last = stream(load(asset("demo.safetensors")), torch.tensor(list(log)))
        for name, tensor in last.state.tensors().items():
            torch.testing.assert_close(state.tensors()[name], tensor, rtol=1e-3, atol=1e-3)


def test_killed_in_the_middle_of_reads_and_asks(server) -> None:
    """Three rounds; `python benchmarks/serve.py --kills 50` does fifty."""
    kill_rounds(server, 3, 4, SENTENCE * 2000)
    names = {path.name for path in server.folder.iterdir()}
    assert names == {".lock", *(s["id"] for s in sessions_of(server))}


def sessions_of(server: Server) -> list[dict]:
    return server.call("GET", "/v1/sessions")["sessions"]


def test_the_kill_test_sees_what_is_lost(server) -> None:
    """It would be worth nothing if it did not."""
    session = new_session(server)
    server.call("POST", f"/v1/sessions/{session}/read", SENTENCE)
    model = load(asset("demo.safetensors"))
    for heard in (SENTENCE + "x", SENTENCE[:-1], ""):
        with pytest.raises(RuntimeError, match="expected"):
            check_folder(server, {session: heard.encode()}, {session: None}, model, [])
    right = {session: SENTENCE.encode()}
    check_folder(server, right, {session: None}, model, [session])
    path = next((server.folder / session).glob("*.memory"))
    model.init_state(1).save(path)
    with pytest.raises(RuntimeError, match="its state has read 0"):
        check_folder(server, right, {session: None}, model, [])


def test_stopped_and_started_it_goes_on(server) -> None:
    session = new_session(server)
    server.call("POST", f"/v1/sessions/{session}/read", "«baku: 4821» " + SENTENCE)
    ask = {"prompt": "«baku: ", "max_tokens": 6, "temperature": 0}
    answer = server.call("POST", f"/v1/sessions/{session}/ask", ask)
    assert answer["text"].startswith("4821")
    listed = sessions_of(server)
    assert server.stop() == 0
    server.start()
    assert sessions_of(server) == listed
    assert server.call("POST", f"/v1/sessions/{session}/ask", ask) == answer
    with pytest.raises(RuntimeError, match="another server keeps its sessions there"):
        Server(server.folder).start()
    assert sessions_of(server) == listed


LENGTH = f"Content-Type: text/plain\r\nContent-Length: {len(SENTENCE) * 100}\r\n"
CHUNKED = "Content-Type: text/plain\r\nTransfer-Encoding: chunked\r\n"


@pytest.mark.parametrize("events", [False, True])
def test_an_upload_that_breaks_off_reads_nothing(server, events) -> None:
    session = new_session(server)
    accept = "Accept: text/event-stream\r\n" if events else ""
    content = (SENTENCE * 50).encode()
    chunk = f"{len(content):x}\r\n".encode() + content + b"\r\n"
    for headers, body in ((LENGTH, content), (CHUNKED, chunk), (CHUNKED, chunk + b"zz\r\n")):
        open_request(server, f"/v1/sessions/{session}/read", headers + accept, body).close()
        assert settled(server, session) == 0
        assert_whole(server, session, "")
    assert not list(server.folder.glob(".upload-*"))
    assert server.call("POST", f"/v1/sessions/{session}/read", SENTENCE)["read"] == len(SENTENCE)


def test_events_that_nobody_takes_any_more(server) -> None:
    """What was told of counts, the rest is not read, and the session is free at once."""
    session, text = new_session(server), SENTENCE * 3000
    headers = (
        f"Content-Type: text/plain\r\nAccept: text/event-stream\r\nContent-Length: {len(text)}"
    )
    path = f"/v1/sessions/{session}/read"
    connection = open_request(server, path, headers + "\r\n", text.encode())
    seen = b""
    while seen.count(b"event: piece") < 3:
        seen += connection.recv(65536)
    connection.close()
    read = settled(server, session)
    assert 3 * 64 <= read < len(text)
    assert_whole(server, session, text)
    more = server.call("POST", path, "go on")
    assert more["tokens_read"] == read + 5


def test_a_completion_that_nobody_waits_for(server) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 4096, "stream": True}).encode()
    headers = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    connection = open_request(server, "/v1/completions", headers, body)
    seen = b""
    while seen.count(b"data: ") < 2:
        seen += connection.recv(65536)
    connection.close()
    counts = []
    while len(counts) < 2 or counts[-1] != counts[-2]:  # it ends, long before 4,096
        time.sleep(0.5)
        _, metrics = server.request("GET", "/metrics")
        counts.append(re.search(rb"tokens_generated_total (\d+)", metrics).group(1))
        assert len(counts) < 100
    running = re.search(rb"requests_running (\d+)", metrics).group(1)
    assert running == b"1"  # this one


def test_a_refusal_is_heard_by_who_is_still_sending(server) -> None:
    """Ten megabytes to a session that does not exist: the answer comes, not a broken pipe."""
    for path, headers in (
        (f"/v1/sessions/{'0' * 32}/read", TEXT),
        ("/v1/sessions", MEMORY),
        ("/v1/sessions", {**MEMORY, "Origin": "http://evil.example"}),
    ):
        status, body = server.request("POST", path, b"x" * 10_000_000, headers)
        assert status in (403, 404, 413)
        assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /v1/sessions HTTP/1.1\r\n\r\n",
        b"GET /v1/sessions HTTP/1.0\r\n\r\n",
        b"GET /v1/sessions HTTP/1.1\r\nHost: x\r\nHost: localhost\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nHost: h\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\nContent-Length: 2\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /v1/sessions/\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["no host", "http/1.0", "two hosts", "negative", "two lengths", "long", "tls", "bytes"],
)
def test_what_is_not_http(server, request_head) -> None:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=120)
    with connection:
        connection.sendall(request_head)
        answer = connection.recv(65536)
    assert re.match(rb"HTTP/1\.1 4(00|21|31)", answer), answer[:100]
    assert server.request("GET", "/health")[0] == 200


def test_it_needs_a_token_on_a_network_and_gives_up_on_who_stalls(tmp_path) -> None:
    """One process for both: starting takes longest."""
    arguments = ("--host", "0.0.0.0", "--token", "abc", "--stall-s", "0.5")
    with serving(tmp_path / "sessions", *arguments) as server:
        assert server.request("GET", "/health")[0] == 200
        assert server.request("GET", "/v1/sessions")[0] == 401
        token = {"Authorization": "Bearer abc"}
        status, body = server.request("POST", "/v1/sessions", headers=token)
        assert status == 201
        session, text = json.loads(body)["id"], SENTENCE * 3000
        headers = f"Authorization: Bearer abc\r\nContent-Length: {len(text)}\r\n"
        headers += "Content-Type: text/plain\r\nAccept: text/event-stream\r\n"
        path = f"/v1/sessions/{session}"
        with open_request(server, f"{path}/read", headers, text.encode()) as deaf:
            assert deaf.recv(12) == b"HTTP/1.1 200"  # and then takes nothing any more
            deadline, read = time.monotonic() + 120, 0
            while not read and time.monotonic() < deadline:
                time.sleep(0.2)
                _, body = server.request("GET", path, headers=token)
                read = json.loads(body)["tokens_read"]
        assert 64 <= read < len(text)
        assert_whole(server, session, text)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "x"], "expected --model NAME=PATH, got 'x'"),
        (["--model", "a=b", "--model", "a=c"], "--model names 'a' twice"),
        (["--model", "a=absent.safetensors"], "absent.safetensors: no such file"),
        (["--port", "70000"], "port must be at most 65535"),
        (["--port", "x"], "invalid int value: 'x'"),
        (["--body-bytes", "1X"], "expected a positive number such as 64K, got '1X'"),
        (["--idle-s", "1X"], "invalid float value: '1X'"),
        (["--sessions", "0"], "sessions must be at least 1"),
        (["--idle-s", "nan"], "idle_s must be a positive number"),
        (["--host", "256.1.1.1", "--port", "0"], "cannot listen on 256.1.1.1:0"),
        (["--allow-host", "http://x", "--port", "0"], "expected a host such as box.local"),
        (["--token", "a b"], "token must not be empty or hold a space"),
        (["--tokenizer", "absent", "--port", "0"], "expected the tokenizer 'bytes'"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, arguments, reason) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["serve", *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line


def test_a_port_that_is_taken(capsys, tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["--port", str(taken.getsockname()[1]), "--folder", str(tmp_path / "s")]
        with pytest.raises(SystemExit):
            main(["serve", *arguments])
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['starlette'] = None\n"
        "from titans.cli import main; main(['serve', '--port', '0'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "titans: serving needs `pip install -e '.[studio]'`\n"
