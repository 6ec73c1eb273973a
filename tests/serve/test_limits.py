"""Limits are answered clearly, count what they say, and lose nothing."""

import asyncio
import json
import threading
import time

import httpx2
import pytest
from served import BASE, EVENTS, MEMORY, TEXT, application, client, create, message, read

from titans.serve.folder import Folder
from titans.serve.openapi import description


def test_a_body_that_is_too_long(tmp_path, model_file) -> None:
    with client(tmp_path, model_file, body_bytes=100) as c:
        session = create(c)
        assert read(c, session, b"x" * 100).status_code == 200
        for headers in (TEXT, EVENTS):
            url = f"/v1/sessions/{session}/read"
            for body in (b"x" * 101, (b"x" * 60 for _ in range(2))):  # announced, and not
                answer = c.post(url, content=body, headers=headers)
                assert "longer than 100 bytes" in message(answer, 413)
                assert answer.json()["error"]["code"] == "body_too_long"
        assert c.get(f"/v1/sessions/{session}").json()["tokens_read"] == 100
        prompt = {"prompt": "x" * 200}
        message(c.post(f"/v1/sessions/{session}/ask", json=prompt), 413)
        message(c.post("/v1/completions", json=prompt), 413)
        message(c.post("/v1/sessions", content=b"x" * 200, headers=MEMORY), 413)
        assert not list(tmp_path.glob(".upload-*"))


def test_tokens_of_prompts_are_made_beside_the_event_loop(c, monkeypatch) -> None:
    """A long one takes seconds, in which others are answered."""
    tokenizer, threads = c.app.state.store.tokenizer, []
    encode = type(tokenizer).encode

    def spy(text):
        threads.append(threading.get_ident())
        return encode(tokenizer, text)

    monkeypatch.setattr(tokenizer, "encode", spy)
    session = create(c)
    for url in ("/v1/completions", f"/v1/sessions/{session}/ask"):
        assert c.post(url, json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert len(threads) == 2
    assert c.portal.call(threading.get_ident) not in threads


def test_a_memory_file_need_not_be_longer_than_one(c) -> None:
    largest = c.app.state.store.initial["tiny"].nbytes + 2**20
    message(c.post("/v1/sessions", content=b"x" * (largest + 1), headers=MEMORY), 413)


def test_as_many_sessions_as_may_be(tmp_path, model_file) -> None:
    with client(tmp_path, model_file, sessions=2) as c:
        first, _ = create(c), create(c)
        content = c.get(f"/v1/sessions/{first}/memory").content
        for answer in (
            c.post("/v1/sessions", json={}),
            c.post("/v1/sessions", json={"fork": first}),
            c.post("/v1/sessions", content=content, headers=MEMORY),
        ):
            assert "as many sessions as may be, 2" in message(answer, 429)
            assert answer.json()["error"]["code"] == "too_many_sessions"
            assert answer.headers["retry-after"] == "1"
        assert read(c, first, "goes on").status_code == 200
        c.delete(f"/v1/sessions/{first}")
        create(c)


def test_a_session_is_found_when_it_is_on_the_disk(tmp_path, model_file, monkeypatch) -> None:
    """Until then it only counts: what is listed can be forked, asked and saved."""
    begun, may_end = threading.Event(), threading.Event()
    create_really = Folder.create

    def slowly(*arguments, **named):
        begun.set()
        assert may_end.wait(20)
        return create_really(*arguments, **named)

    with client(tmp_path / "s", model_file, sessions=1) as c:
        monkeypatch.setattr(Folder, "create", slowly)
        thread = threading.Thread(target=create, args=(c,))
        thread.start()
        assert begun.wait(20)
        try:
            assert c.get("/v1/sessions").json()["sessions"] == []
            assert "as many sessions" in message(c.post("/v1/sessions", json={}), 429)
        finally:
            may_end.set()
            thread.join()
        (session,) = c.get("/v1/sessions").json()["sessions"]
        assert read(c, session["id"], "abc").status_code == 200


def test_no_room_on_the_disk(tmp_path, model_file) -> None:
    with client(tmp_path, model_file) as c:
        create(c)
        one = c.app.state.store.folder.used
    with client(tmp_path, model_file, disk_bytes=int(3.5 * one)) as c:
        (session,) = [s["id"] for s in c.get("/v1/sessions").json()["sessions"]]
        read(c, session, "kept")
        before = c.get(f"/v1/sessions/{session}").json()
        long = b"x" * (3 * one)
        assert "no room on the disk" in message(read(c, session, long), 507)
        events = c.post(f"/v1/sessions/{session}/read", content=long, headers=EVENTS)
        message(events, 507)
        assert c.get(f"/v1/sessions/{session}").json() == before
        second, statuses = create(c), []
        for _ in range(3):
            statuses.append(c.post("/v1/sessions", json={"fork": session}).status_code)
        assert statuses[-1] == 507
        assert c.app.state.store.folder.used <= 3.5 * one
        assert c.delete(f"/v1/sessions/{second}").status_code == 204
        assert read(c, session, "!").json()["tokens_read"] == 5


def test_as_many_requests_as_may_be_at_once(tmp_path, model_file) -> None:
    """While one is computed, one more waits; the third is turned away, and health is not."""
    app = application(tmp_path, model_file, requests=2)

    async def run():
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url=BASE) as c,
        ):
            release = threading.Event()
            blocked = asyncio.create_task(app.state.store.engine.call(release.wait))
            asked = [asyncio.create_task(c.post("/v1/completions", json={"prompt": "x"}))]
            asked.append(asyncio.create_task(c.post("/v1/completions", json={"prompt": "y"})))
            await asyncio.sleep(0.1)
            refused = await c.get("/v1/sessions")
            health = await c.get("/health")
            release.set()
            await blocked
            return refused, health, [answer.status_code for answer in await asyncio.gather(*asked)]

    refused, health, statuses = asyncio.run(run())
    assert "2 requests are being handled" in message(refused, 429)
    assert health.status_code == 200
    assert statuses == [200, 200]


def together(app, *requests):
    """The answers to requests (method, path, keyword arguments) that run at the same time."""

    async def run():
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url=BASE) as c,
        ):
            made = await c.post("/v1/sessions", json={})
            session = made.json()["id"]
            sent = [
                c.request(method, f"/v1/sessions/{session}{path}", **named)
                for method, path, named in requests
            ]
            answers = await asyncio.gather(*sent)
            last = await c.get(f"/v1/sessions/{session}")
            return answers, last, app.state.store

    return asyncio.run(run())


def slow_body(seconds: float):
    async def body():
        yield b"slow text "
        await asyncio.sleep(seconds)
        yield b"and its end"

    return {"content": body(), "headers": TEXT}


def test_a_session_has_one_writer(tmp_path, model_file) -> None:
    """The second waits a while, then is told; asking and looking never wait."""
    app = application(tmp_path, model_file, busy_s=0.1)
    short = {"content": b"second", "headers": TEXT}
    answers, last, _ = together(
        app,
        ("POST", "/read", slow_body(0.5)),
        ("POST", "/read", short),
        ("POST", "/reset", {}),
        ("DELETE", "", {}),
        ("PATCH", "", {"json": {"name": "x"}}),
        ("POST", "/ask", {"json": {"prompt": "x", "max_tokens": 2}}),
        ("GET", "/memory", {}),
    )
    assert [a.status_code for a in answers] == [200, 409, 409, 409, 409, 200, 200]
    assert "busy" in message(answers[1], 409)
    assert last.json()["tokens_read"] == len(b"slow text and its end")
    patient = application(tmp_path / "t", model_file, busy_s=5.0)
    answers, last, _ = together(
        patient, ("POST", "/read", slow_body(0.2)), ("POST", "/read", short)
    )
    assert [a.status_code for a in answers] == [200, 200]
    assert last.json()["tokens_read"] == len(b"slow text and its end") + 6


def test_reading_and_deleting_at_once(tmp_path, model_file) -> None:
    """Whichever is first, the other gets a clear answer, and nothing is left of the session."""
    app = application(tmp_path, model_file, busy_s=5.0)
    reads = [("POST", "/read", {"content": b"text" * 50, "headers": TEXT})] * 3
    answers, last, store = together(app, *reads, ("DELETE", "", {}), *reads)
    assert {a.status_code for a in answers} <= {200, 204, 404}
    assert [a.status_code for a in answers].count(204) == 1
    message(last, 404)
    assert not store.sessions
    assert {p.name for p in tmp_path.iterdir()} == {".lock"}


def test_an_upload_that_stops_coming_is_given_up(tmp_path, model_file) -> None:
    app = application(tmp_path, model_file, stall_s=0.1)
    answers, last, _ = together(app, ("POST", "/read", slow_body(1.0)))
    assert "did not come" in message(answers[0], 408)
    assert last.json()["tokens_read"] == 0


DAMAGES = {
    "nothing": lambda content: b"",
    "text": lambda content: b"not a memory",
    "cut": lambda content: content[:-100],
    "a bit": lambda content: content[:-50] + bytes([content[-50] ^ 1]) + content[-49:],
    "zeros": lambda content: bytes(len(content)),
    "a huge header": lambda content: (2**60).to_bytes(8, "little") + content[8:],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_memory_file(c, tmp_path, name) -> None:
    content = DAMAGES[name](c.get(f"/v1/sessions/{create(c)}/memory").content)
    reason = message(c.post("/v1/sessions", content=content, headers=MEMORY), 400)
    assert ".upload-" not in reason
    assert str(tmp_path) not in reason
    assert len(c.get("/v1/sessions").json()["sessions"]) == 1
    assert not list((tmp_path / "sessions").glob(".upload-*"))


def forged(c, change, notes='{"tokenizer": "bytes"}'):
    """A memory file with a valid checksum, whose structure was changed by hand."""
    import safetensors.torch
    import torch

    from titans.state import digest, read_safetensors

    path = c.app.state.store.folder.path / "forged"
    path.write_bytes(c.get(f"/v1/sessions/{create(c)}/memory").content)
    tensors, metadata = read_safetensors(path)
    structure = json.loads(metadata["structure"])
    change(structure["fields"], tensors, torch)
    metadata["structure"] = json.dumps(structure)
    metadata["notes"] = notes
    metadata["sha256"] = digest(tensors, metadata["structure"] + notes)
    path.unlink()
    return safetensors.torch.save(tensors, metadata)


def set_position(value):
    def change(top, tensors, torch):
        top["position"]["value"] = value

    return change


def set_inner(name, value):
    def change(top, tensors, torch):
        block = top["blocks"]["tuple"][0]["fields"]
        part = block["attention"] if name == "position" else block["memory"]["fields"]["rule"]
        part["fields"][name]["value"] = value

    return change


def swap_tensor(top, tensors, torch):
    tensors["blocks.0.memory.tail"] = torch.zeros(1, 7, 48)
    top["blocks"]["tuple"][0]["fields"]["memory"]["fields"]["tail"]["tensor"] = [1, 7, 48]


def two_rows(top, tensors, torch):
    def widen(node):
        if "tensor" in node:
            node["tensor"][0] = 2
        for child in [*node.get("fields", {}).values(), *node.get("tuple", [])]:
            widen(child)

    for child in top.values():
        widen(child)
    for name in tensors:
        tensors[name] = torch.cat([tensors[name]] * 2)


def fewer_blocks(top, tensors, torch):
    del top["blocks"]["tuple"][1]
    for name in [n for n in tensors if n.startswith("blocks.1")]:
        del tensors[name]


def other_state(top, tensors, torch):
    top["blocks"]["tuple"][0]["state"] = "MAGState"


def eight_bits(top, tensors, torch):
    tail = tensors["blocks.0.memory.tail"].to(torch.float8_e4m3fn)
    tensors["blocks.0.memory.tail"] = tail
    header = top["blocks"]["tuple"][0]["fields"]["memory"]["fields"]["tail"]
    header["dtype"] = "float8_e4m3fn"


def no_tensors(top, tensors, torch):
    top["blocks"]["tuple"] = []


def not_finite(top, tensors, torch):
    tensors["blocks.0.memory.tail"][0, 0, 0] = float("nan")


FORGERIES = {
    "negative position": (set_position(-1), "position"),
    "position too far": (set_position(2**53), "position"),
    "position as text": (set_position("5"), "position"),
    "position as truth": (set_position(True), "position"),
    "other positions inside": (set_inner("position", 7), "position must lie in 0..0, got 7"),
    "offset beyond the chunk": (set_inner("offset", 1), "offset must lie in 0..0, got 1"),
    "offset as a list": (set_inner("offset", [0]), "offset must lie in 0..0"),
    "a tensor of another shape": (swap_tensor, "tail must be torch.float32[1, 3, 48]"),
    "two rows": (two_rows, "got torch.float32[2, "),
    "fewer blocks": (fewer_blocks, "blocks must have 2 parts, got 1"),
    "another kind of state": (other_state, "must be MALState, got MAGState"),
    "not finite": (not_finite, "non-finite"),
    "numbers of eight bits": (eight_bits, "holds torch.float8_e4m3fn in blocks.0.memory.tail"),
    "no tensors": (no_tensors, "holds no tensor"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_memory_file(c, name, without_shape_checks) -> None:
    change, reason = FORGERIES[name]
    content = forged(c, change)
    assert reason in message(c.post("/v1/sessions", content=content, headers=MEMORY), 400)
    assert len(c.get("/v1/sessions").json()["sessions"]) == 1


def test_a_nested_bomb(c) -> None:
    def change(top, tensors, torch):
        node = top["position"]
        for _ in range(200):
            node["tuple"] = [{}]
            node = node["tuple"][0]

    content = forged(c, change)
    deep = b'{"tuple":[' * 5000
    message(c.post("/v1/sessions", content=content, headers=MEMORY), 400)
    message(c.post("/v1/sessions", content=deep, headers=MEMORY), 400)


@pytest.mark.parametrize(
    ("notes", "status"),
    [("5", 400), ("{", 400), ('{"tokenizer": 5}', 409), ("[" * 20_000, 400)],
)
def test_forged_notes(c, without_shape_checks, notes, status) -> None:
    content = forged(c, lambda *_: None, notes)
    message(c.post("/v1/sessions", content=content, headers=MEMORY), status)
    assert len(c.get("/v1/sessions").json()["sessions"]) == 1


def test_an_unforged_file_is_taken(c) -> None:
    content = forged(c, lambda *_: None)
    assert c.post("/v1/sessions", content=content, headers=MEMORY).status_code == 201


def test_the_description_is_of_these_routes(c) -> None:
    described = c.get("/openapi.json").json()
    offered = {
        (route.path.replace(":path", ""), method.lower())
        for route in c.app.routes
        for method in route.methods - {"HEAD"}
    }
    paths = described["paths"].items()
    found = {(path, m) for path, item in paths for m in item if m != "parameters"}
    assert found == offered
    for path, item in paths:
        named = {p["name"] for p in item.get("parameters", [])}
        assert ("{id}" in path) == (named == {"id"})
    text = json.dumps(described)
    for name in described["components"]["schemas"]:
        assert f"#/components/schemas/{name}" in text
    for path, item in paths:
        for method, operation in item.items():
            if method == "parameters":
                continue
            codes = set(operation["responses"])
            taken = "requestBody" in operation or path.endswith("/reset")
            assert ({"400", "408", "413", "415"} <= codes) == taken, path
            public = path == "/health"
            assert ("401" in codes) != public
            assert operation.get("security") == ([] if public else None)
    assert "503" in described["paths"]["/health"]["get"]["responses"]
    asked = set(described["components"]["schemas"]["AskRequest"]["properties"])
    assert asked == {"prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream"}


def test_what_is_described_is_what_is_answered(c) -> None:
    schemas = description(c.app.state.settings)["components"]["schemas"]
    session = create(c)
    assert set(c.get(f"/v1/sessions/{session}").json()) == set(schemas["Session"]["properties"])
    answer = c.post(f"/v1/sessions/{session}/ask", json={"prompt": "x", "max_tokens": 1}).json()
    assert set(answer) == set(schemas["Answer"]["properties"])
    made = c.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).json()
    assert set(made) == set(schemas["Completion"]["properties"])
    stream = c.post(f"/v1/sessions/{session}/read", content=b"xy", headers=EVENTS).text
    piece = json.loads(stream.split("data: ", 1)[1].split("\n")[0])
    assert set(piece) == set(schemas["Piece"]["properties"])


def test_metrics_count(c) -> None:
    session = create(c)
    read(c, session, "x" * 300)
    c.post(f"/v1/sessions/{session}/ask", json={"prompt": "x", "max_tokens": 5, "temperature": 0})
    c.get("/nothing")
    lines = [line for line in c.get("/metrics").text.splitlines() if line[0] != "#"]
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    assert values["titans_tokens_read_total"] == 300
    assert 1 <= values["titans_tokens_generated_total"] <= 5
    assert values['titans_requests_total{method="GET",status="404"}'] == 1
    assert values['titans_requests_total{method="POST",status="201"}'] == 1
    assert values["titans_request_seconds_count"] == 4
    assert values['titans_request_seconds_bucket{le="+Inf"}'] == 4
    assert values["titans_requests_running"] == values["titans_sessions"] == 1
    assert values["titans_batch_rows_total"] >= values["titans_batches_total"] >= 3


def test_health_says_when_nothing_can_be_computed(c) -> None:
    assert c.get("/health").json() == {"status": "ok"}
    engine = c.app.state.store.engine
    engine.stop()
    time.sleep(0.05)
    assert c.get("/health").status_code == 503
    message(c.post("/v1/completions", json={"prompt": "x"}), 500)


def test_an_error_of_ours_says_nothing_of_the_inside(c, monkeypatch) -> None:
    monkeypatch.setattr(c.app.state.store, "find", lambda id: 1 / 0)
    assert message(c.get(f"/v1/sessions/{'0' * 32}"), 500) == (
        "internal error; the server's log has the details"
    )
    headers = c.get(f"/v1/sessions/{'0' * 32}").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


def test_a_fork_does_not_wait_for_a_read(tmp_path, model_file) -> None:
    """It is of the last commit, whatever is being read meanwhile."""
    app = application(tmp_path, model_file, busy_s=0.1)

    async def run():
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url=BASE) as c,
        ):
            session = (await c.post("/v1/sessions", json={})).json()["id"]
            await c.post(f"/v1/sessions/{session}/read", content=b"first", headers=TEXT)
            reading = asyncio.create_task(c.post(f"/v1/sessions/{session}/read", **slow_body(0.5)))
            await asyncio.sleep(0.2)
            fork = await c.post("/v1/sessions", json={"fork": session})
            assert not reading.done()
            assert (await reading).status_code == 200
            more = await c.post(
                f"/v1/sessions/{fork.json()['id']}/read", content=b"!", headers=TEXT
            )
            return fork.json(), more.json()

    fork, more = asyncio.run(run())
    assert fork["tokens_read"] == len("first")
    assert more["tokens_read"] == len("first!")


def test_forks_at_once_stay_below_the_limit_of_the_disk(tmp_path, model_file) -> None:
    with client(tmp_path, model_file) as c:
        session = create(c)
        read(c, session, "x" * 20_000)
        one = c.app.state.store.folder.used
    app = application(tmp_path, model_file, disk_bytes=int(3.5 * one))

    async def run():
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=BASE) as c,
        ):
            forks = [c.post("/v1/sessions", json={"fork": session}) for _ in range(12)]
            answers = await asyncio.gather(*forks)
            return [a.status_code for a in answers], app.state.store.folder.used

    statuses, used = asyncio.run(run())
    assert sorted(set(statuses)) == [201, 507]
    assert statuses.count(201) == 2
    assert used <= 3.5 * one


def test_files_of_the_last_commit_are_there_for_whoever_reads_them(tmp_path, model_file) -> None:
    """Downloads and forks beside many commits: never an error, whichever commit they see."""
    with client(tmp_path, model_file, busy_s=60.0, sessions=1000) as c:
        session, stop, seen = create(c), threading.Event(), []

        def look(get):
            while not stop.is_set():
                seen.append(get().status_code)

        looks = [
            lambda: c.get(f"/v1/sessions/{session}/memory"),
            lambda: c.get(f"/v1/sessions/{session}/memory"),
            lambda: c.post("/v1/sessions", json={"fork": session}),
        ]
        threads = [threading.Thread(target=look, args=(get,)) for get in looks]
        for thread in threads:
            thread.start()
        for _ in range(15):
            assert read(c, session, "some").status_code == 200
            assert c.post(f"/v1/sessions/{session}/reset").status_code == 200
        stop.set()
        for thread in threads:
            thread.join()
        assert set(seen) <= {200, 201}, seen
        assert len(seen) > 10


def test_a_text_whose_reader_has_gone_is_not_read(tmp_path, model_file) -> None:
    """Whoever got no answer can send it again: nothing was changed."""
    app = application(tmp_path, model_file)

    async def run():
        async with app.router.lifespan_context(app):
            session = await app.state.store.create(None, None)
            told = [
                {"type": "http.request", "body": b"all of the text", "more_body": False},
                {"type": "http.disconnect"},
            ]
            sent = []

            async def receive():
                return told.pop(0) if len(told) > 1 else told[0]

            async def send(event):
                sent.append(event)

            scope = {"type": "http", "method": "POST", "path": f"/v1/sessions/{session.id}/read"}
            scope |= {"headers": [(b"host", b"127.0.0.1:8321"), (b"content-type", b"text/plain")]}
            scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http"}
            await app(scope, receive, send)
            return session.record

    record = asyncio.run(run())
    assert (record.tokens_read, record.logged) == (0, 0)


def test_what_nobody_waits_for_is_not_computed(tmp_path, model_file) -> None:
    """The client goes while its answer is computed: that ends, and what others asked for not."""
    app = application(tmp_path, model_file)

    async def run():
        async with app.router.lifespan_context(app):
            metrics = app.state.metrics
            body = json.dumps({"prompt": "x", "max_tokens": 4096, "temperature": 0}).encode()
            told = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive():
                if told:
                    return told.pop()
                while metrics.tokens_generated < 20:
                    await asyncio.sleep(0.01)
                return {"type": "http.disconnect"}

            async def send(event):
                pass

            scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
            scope |= {
                "headers": [(b"host", b"127.0.0.1:8321"), (b"content-type", b"application/json")]
            }
            scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http"}
            await app(scope, receive, send)
            drawn = metrics.tokens_generated
            await asyncio.sleep(0.1)
            return drawn, metrics.tokens_generated, metrics.running

    drawn, later, running = asyncio.run(run())
    assert 20 <= drawn < 200
    assert later <= drawn + 1
    assert running == 0
