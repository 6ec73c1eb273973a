"""The session API: its numbers are the library's, and a request that fails changes nothing."""

import json
import math
from itertools import pairwise

import pytest
import torch
from served import (
    EVENTS,
    MEMORY,
    TEXT,
    build,
    client,
    create,
    events,
    message,
    read,
)
from starlette.routing import Route

from titans.data.tokenizers import BPETokenizer
from titans.generate import Sampling, generate, stream
from titans.inspect import watch
from titans.models.lm import load
from titans.serve import ServeSettings, create_app, reading
from titans.serve import folder as on_disk
from titans.state import ModelState, read_notes

LONG = "The quick brown fox — «baku: 4821» — jumps over 13 lazy dogs. Ä" * 3
UNKNOWN = "0" * 32


def tokens_of(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()))


def memory_of(c, session, tmp_path) -> ModelState:
    path = tmp_path / f"{session}.memory"
    path.write_bytes(c.get(f"/v1/sessions/{session}/memory").content)
    return ModelState.load(path)


def assert_same_state(got, expected, tolerance=0.0):
    assert got.position == expected.position
    for name, tensor in expected.tensors().items():
        found = got.tensors()[name]
        torch.testing.assert_close(found, tensor, rtol=tolerance, atol=tolerance, msg=name)


def test_a_session_from_the_model_to_its_end(c, model_file) -> None:
    answer = c.post("/v1/sessions", json={"name": "  My notes ä "})
    assert answer.status_code == 201
    made = answer.json()
    assert answer.headers["location"] == f"/v1/sessions/{made['id']}"
    assert made["name"] == "My notes ä"
    assert (made["model"], made["parent"], made["tokens_read"]) == ("tiny", None, 0)
    assert made["state_bytes"] == load(model_file).init_state(1).nbytes
    assert made["surprise"] == {"mean_nll": None, "bits_per_token": None, "last_nll": None}
    assert c.get(f"/v1/sessions/{made['id']}").json() == made
    assert c.get("/v1/sessions").json() == {"sessions": [made]}
    renamed = c.patch(f"/v1/sessions/{made['id']}", json={"name": "other"})
    assert renamed.json()["name"] == "other"
    assert c.delete(f"/v1/sessions/{made['id']}").status_code == 204
    assert message(c.get(f"/v1/sessions/{made['id']}"), 404) == "no such session"
    assert c.get("/v1/sessions").json() == {"sessions": []}


@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 27)])
def test_reading_gives_the_numbers_and_the_state_of_the_library(c, model_file, tmp_path, cuts):
    """Uploaded in chunks that cut characters apart; two requests, cut inside a character too."""
    session, content = create(c), LONG.encode()
    places = [0, *cuts, len(content)]

    def body():
        for start, stop in pairwise(places):
            yield content[start:stop]

    answer = c.post(f"/v1/sessions/{session}/read", content=body(), headers=TEXT)
    assert answer.status_code == 200, answer.text
    (whole,) = stream(load(model_file), tokens_of(LONG))
    expected = whole.nll[0, 1:].double()
    found = answer.json()
    assert found["read"] == found["tokens_read"] == len(content)
    assert found["surprise"]["mean_nll"] == pytest.approx(float(expected.mean()), rel=1e-5)
    bits = float(expected.mean()) / math.log(2)
    assert found["surprise"]["bits_per_token"] == pytest.approx(bits, rel=1e-5)
    assert found["surprise"]["last_nll"] == pytest.approx(float(expected[-1]), rel=1e-3)
    assert_same_state(memory_of(c, session, tmp_path), whole.state, 2e-5)
    again = read(c, session, "more").json()
    assert (again["read"], again["tokens_read"]) == (4, len(content) + 4)
    log = c.app.state.store.find(session).tokens()
    assert log.tolist() == list(content + b"more")


@pytest.mark.parametrize("piece", [None, 24])
def test_events_are_the_observations_of_the_library(c, model_file, piece, tmp_path) -> None:
    session = create(c)
    read(c, session, "before")  # the first piece ends at a multiple of its size
    url = f"/v1/sessions/{session}/read"
    answer = c.post(
        url, content=LONG.encode(), headers=EVENTS, params={"piece": piece} if piece else {}
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert [name for name, _ in found[-2:]] == ["piece", "done"]
    seen = [data for name, data in found if name == "piece"]
    assert "".join(text for data in seen for text in data["text"]) == LONG
    assert [t for data in seen for t in data["ids"]] == list(LONG.encode())
    assert found[-1][1] == {**c.get(f"/v1/sessions/{session}").json(), "read": len(LONG.encode())}

    model = load(model_file)
    (first,) = stream(model, tokens_of("before"))
    size, position, parts, rest = piece or 64, 6, [], tokens_of(LONG)
    while len(rest):
        cut = size - position % size
        parts.append(rest[:cut])
        rest, position = rest[cut:], position + cut
    assert len(parts) == len(seen)
    for data, own in zip(seen, watch(model, parts, first.state), strict=True):
        assert data["start"] == own.state.position - len(data["ids"])
        nll = [float("nan") if v is None else v for v in data["nll"]]
        torch.testing.assert_close(torch.tensor(nll), own.nll[0], rtol=0, atol=0, equal_nan=True)
        for name in ("surprise", "learning_rate", "decay"):
            expected = getattr(own, name)[0].permute(1, 2, 0)
            torch.testing.assert_close(torch.tensor(data[name]), expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.tensor(data["moved"]), own.moved[0], rtol=0, atol=0)
        assert data["momentum"] is data["past_surprise"] is None
    assert_same_state(memory_of(c, session, tmp_path), own.state)


def test_asking_answers_as_the_library_and_leaves_the_session(c, model_file, tmp_path) -> None:
    session = create(c)
    read(c, session, LONG)
    before = c.get(f"/v1/sessions/{session}").json()
    state = memory_of(c, session, tmp_path)
    prompt = list(b"baku: ")
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=0.8, top_p=0.9, seed=3)):
        expected = generate(load(model_file), [prompt], 20, sampling=sampling, state=state)
        fields = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        body = {"prompt": "baku: ", "max_tokens": 20, "seed": sampling.seed, **fields}
        answer = c.post(f"/v1/sessions/{session}/ask", json=body).json()
        ids = expected.tokens[0]
        ids = ids[: ids.index(256)] if 256 in ids else ids
        assert answer["ids"] == ids
        assert answer["text"] == bytes(ids).decode(errors="replace")
        assert answer["tokens"] == len(ids)
        assert answer["finish_reason"] == ("length" if len(ids) == 20 else "stop")
        (own,) = stream(load(model_file), torch.tensor(prompt), state)
        nll = answer["nll_prompt"]
        assert nll[0] is None
        assert nll[1:] == pytest.approx(own.nll[0, 1:].tolist(), rel=1e-5)

        streamed = c.post(f"/v1/sessions/{session}/ask", json={**body, "stream": True})
        *deltas, (name, last) = events(streamed.text)
        assert name == "done"
        assert last == answer
        assert "".join(data["text"] for _, data in deltas) == answer["text"]
    assert c.get(f"/v1/sessions/{session}").json() == before
    assert_same_state(memory_of(c, session, tmp_path), state)


def test_a_fork_goes_its_own_way_and_a_reset_goes_back(c, tmp_path, model_file) -> None:
    session = create(c, name="one")
    read(c, session, "shared text")
    fork = c.post("/v1/sessions", json={"fork": session}).json()
    assert (fork["parent"], fork["name"], fork["tokens_read"]) == (session, "one (fork)", 11)
    kept = memory_of(c, session, tmp_path)
    read(c, fork["id"], " and more")
    assert_same_state(memory_of(c, session, tmp_path), kept)
    store = c.app.state.store
    assert store.find(fork["id"]).tokens().tolist() == list(b"shared text and more")
    assert store.find(session).tokens().tolist() == list(b"shared text")
    back = c.post(f"/v1/sessions/{session}/reset").json()
    assert (back["tokens_read"], back["surprise"]["mean_nll"]) == (0, None)
    assert_same_state(memory_of(c, session, tmp_path), load(model_file).init_state(1))
    assert len(store.find(session).tokens()) == 0


def test_a_memory_goes_out_as_a_file_and_comes_back(c, tmp_path, model_file) -> None:
    session = create(c, name='Mein "Buch" — ä/..')
    read(c, session, LONG)
    download = c.get(f"/v1/sessions/{session}/memory")
    disposition = download.headers["content-disposition"]
    assert 'filename="Mein _Buch_ _ __...memory"' in disposition
    assert "filename*=UTF-8''Mein%20%22Buch%22%20%E2%80%94%20%C3%A4%2F...memory" in disposition
    answer = c.post("/v1/sessions?name=back", content=download.content, headers=MEMORY)
    assert answer.status_code == 201, answer.text
    back = answer.json()
    assert (back["name"], back["tokens_read"]) == ("back", len(LONG.encode()))
    kept = memory_of(c, session, tmp_path)
    assert_same_state(memory_of(c, back["id"], tmp_path), kept)
    read(c, back["id"], "and on")
    held = c.app.state.store.find(back["id"])
    assert held.tokens().tolist() == list(b"and on")
    assert_same_state(held.origin(), kept)
    fork = c.post("/v1/sessions", json={"fork": back["id"]}).json()["id"]
    assert_same_state(c.app.state.store.find(fork).origin(), kept)


def notes_of(content, tmp_path):
    path = tmp_path / "noted.memory"
    path.write_bytes(content)
    return read_notes(path)


def test_a_memory_notes_its_tokenizer(c, tmp_path, model_file) -> None:
    """Whatever way it came about; then `titans memory` knows what its tokens mean."""
    made = create(c)
    load(model_file).init_state(1).save(tmp_path / "bare")
    bare = (tmp_path / "bare").read_bytes()
    ways = {
        "new": lambda: made,
        "read": lambda: read(c, made, "text").json()["id"],
        "renamed": lambda: c.patch(f"/v1/sessions/{made}", json={"name": "n"}).json()["id"],
        "fork": lambda: create(c, fork=made),
        "file": lambda: c.post("/v1/sessions", content=bare, headers=MEMORY).json()["id"],
        "reset": lambda: c.post(f"/v1/sessions/{made}/reset").json()["id"],
    }
    for way, get in ways.items():
        content = c.get(f"/v1/sessions/{get()}/memory").content
        assert notes_of(content, tmp_path) == {"tokenizer": "bytes"}, way


def test_a_memory_of_another_tokenizer_is_refused(c, tmp_path, model_file) -> None:
    path = tmp_path / "other.memory"
    state = load(model_file).init_state(1)
    for notes in ({"tokenizer": "sha256:0123456789abcdef"}, {"tokenizer": "x" * 10_000}):
        state.save(path, notes)
        answer = c.post("/v1/sessions", content=path.read_bytes(), headers=MEMORY)
        told = message(answer, 409)
        assert f"with the tokenizer {notes['tokenizer'][:50]}, this server's is bytes" in told
    assert c.get("/v1/sessions").json() == {"sessions": []}
    assert not list((tmp_path / "sessions").glob(".*-*"))


def test_sessions_of_another_tokenizer_wait_for_their_own(tmp_path, model_file) -> None:
    """A server that is started again with another tokenizer changes none of them; they can be
    taken away as files, and are as before under the one that they were read with."""
    bpe = tmp_path / "tokenizer.json"
    BPETokenizer.train(["ab ab"], 257, bpe)
    question = {"prompt": "x", "temperature": 0, "max_tokens": 3}
    with client(tmp_path / "s", model_file) as c:
        session = create(c)
        read(c, session, "some text")
        answered = c.post(f"/v1/sessions/{session}/ask", json=question).json()
    with client(tmp_path / "s", model_file, tokenizer=str(bpe)) as d:
        url = f"/v1/sessions/{session}"
        refused = [
            d.post(f"{url}/ask", json=question),
            read(d, session, "x"),
            d.post(f"{url}/reset"),
            d.post("/v1/sessions", json={"fork": session}),
            d.post("/v1/completions", json={**question, "session": session}),
        ]
        for answer in refused:
            assert "read with the tokenizer bytes, this server's is sha256:" in message(answer, 409)
        assert d.patch(url, json={"name": "still here"}).status_code == 200
        content = d.get(f"{url}/memory").content
        assert notes_of(content, tmp_path) == {"tokenizer": "bytes"}
        assert "tokenizer bytes" in message(
            d.post("/v1/sessions", content=content, headers=MEMORY), 409
        )
    with client(tmp_path / "s", model_file) as c:
        assert c.post(f"/v1/sessions/{session}/ask", json=question).json() == answered


def test_half_of_a_surrogate_pair_is_no_text_for_any_tokenizer(tmp_path, model_file) -> None:
    bpe = BPETokenizer.train(["ab ab"], 257, tmp_path / "t.json")
    kind = {"content-type": "application/json"}
    with client(tmp_path / "s", model_file, tokenizer=bpe.name) as c:
        for url in ("/v1/completions", f"/v1/sessions/{create(c)}/ask"):
            answer = c.post(url, content=b'{"prompt": "a\\ud800"}', headers=kind)
            assert "got half of a surrogate pair" in message(answer, 400)


def test_a_tokenizer_that_texts_cannot_be_cut_for(tmp_path, model_file) -> None:
    tokenizer = tmp_path / "t.json"
    rules = json.loads(BPETokenizer.train(["ab ab"], 257, tokenizer).rules)
    rules["normalizer"] = {"type": "Prepend", "prepend": " "}
    tokenizer.write_text(json.dumps(rules))
    with pytest.raises(ValueError, match="gives a text in pieces other tokens than the whole"):
        client(tmp_path / "s", model_file, tokenizer=str(tokenizer))


def test_a_folder_of_before_tokenizers_were_noted(tmp_path, model_file) -> None:
    with client(tmp_path / "s", model_file) as c:
        session = create(c)
    kept = tmp_path / "s" / session / "session.json"
    content = json.loads(kept.read_text())
    del content["tokenizer"]
    kept.write_text(json.dumps(content))
    with client(tmp_path / "s", model_file) as c:
        assert read(c, session, "more").status_code == 200
    assert json.loads(kept.read_text())["tokenizer"] == "bytes"


def test_a_restart_loses_nothing(tmp_path, model_file) -> None:
    folder = tmp_path / "s"
    with client(folder, model_file) as c:
        sessions = [create(c, name=str(i)) for i in range(3)]
        for index, session in enumerate(sessions):
            read(c, session, LONG[: 50 + 7 * index])
        listed = c.get("/v1/sessions").json()
        question = {"prompt": "x", "temperature": 0, "max_tokens": 9}
        answers = [c.post(f"/v1/sessions/{s}/ask", json=question).json() for s in sessions]
    with client(folder, model_file) as c:
        assert c.get("/v1/sessions").json() == listed
        assert [c.post(f"/v1/sessions/{s}/ask", json=question).json() for s in sessions] == answers
        before = listed["sessions"][0]["tokens_read"]
        assert read(c, sessions[0], "more").json()["tokens_read"] == before + 4


def test_states_that_are_not_used_are_on_disk_only(tmp_path, model_file) -> None:
    one = load(model_file).init_state(1).nbytes
    with client(tmp_path, model_file, memory_bytes=2 * one) as c:
        store = c.app.state.store
        sessions = [create(c) for _ in range(4)]
        for session in sessions:
            read(c, session, f"text of {session}")
        kept = [c.get(f"/v1/sessions/{s}/memory").content for s in sessions]
        question = {"prompt": "x", "temperature": 0, "max_tokens": 4}
        for session in [*sessions, *sessions[::-1]]:
            c.post(f"/v1/sessions/{session}/ask", json=question)
            assert sum(s.state is not None for s in store.sessions.values()) <= 2
        assert [c.get(f"/v1/sessions/{s}/memory").content for s in sessions] == kept
        store.settings.__dict__["idle_s"] = 1e-9
        store.drop_unused()
        assert not any(s.state for s in store.sessions.values())
        assert "titans_sessions_loaded 0.0" in c.get("/metrics").text
        assert read(c, sessions[2], "!").status_code == 200


FAILING = {
    "empty": (b"", "the text is empty"),
    "not UTF-8 at once": (b"\xff", "not UTF-8"),
    "not UTF-8 late": (b"good text " * 200 + b"\xc3\x28 and more", "not UTF-8"),
    "cut inside a character": ("good ä".encode()[:-1], "not UTF-8"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_reading_that_fails_reads_nothing(c, tmp_path, name) -> None:
    session = create(c)
    read(c, session, "kept")
    before, state = c.get(f"/v1/sessions/{session}").json(), memory_of(c, session, tmp_path)
    body, reason = FAILING[name]
    assert reason in message(read(c, session, body), 400)
    assert c.get(f"/v1/sessions/{session}").json() == before
    assert_same_state(memory_of(c, session, tmp_path), state)
    assert read(c, session, "!").json()["tokens_read"] == 5
    assert c.app.state.store.find(session).tokens().tolist() == list(b"kept!")


def test_events_before_an_error_count(c, monkeypatch) -> None:
    """Each event told of a piece that was read; then what is not text ends it."""
    monkeypatch.setattr(on_disk, "BLOCK", 512)
    session = create(c)
    body = b"good text " * 200 + b"\xff"
    answer = c.post(f"/v1/sessions/{session}/read", content=body, headers=EVENTS)
    *pieces, (name, data) = events(answer.text)
    assert name == "error"
    assert "not UTF-8" in data["error"]["message"]
    told = sum(len(piece["ids"]) for _, piece in pieces)
    assert told >= 1500
    assert c.get(f"/v1/sessions/{session}").json()["tokens_read"] == told
    answer = c.post(f"/v1/sessions/{session}/read", content=b"\xff", headers=EVENTS)
    assert "not UTF-8" in message(answer, 400)


def test_a_text_that_ruins_the_memory_is_not_kept(c, tmp_path, monkeypatch) -> None:
    session = create(c)
    read(c, session, "kept")
    state = memory_of(c, session, tmp_path)
    store = c.app.state.store
    real = store.engine.forward

    async def ruined(*arguments, **named):
        step = await real(*arguments, **named)
        return step._replace(state=step.state.map(lambda t: t * float("inf")))

    monkeypatch.setattr(store.engine, "forward", ruined)
    assert "non-finite" in message(read(c, session, "evil"), 400)
    monkeypatch.undo()
    assert_same_state(memory_of(c, session, tmp_path), state)
    assert read(c, session, "!").json()["tokens_read"] == 5


def test_a_model_with_chunks_reads_in_whole_ones(tmp_path) -> None:
    from served import DEEP

    path = tmp_path / "mac.safetensors"
    model = build("mac", DEEP)
    model.save(path)
    assert reading.piece_size(model, 64) == 64
    assert reading.piece_size(model, 63) == 56
    assert reading.piece_size(model, 5) == 5
    with client(tmp_path / "s", path) as c:
        session = create(c)
        text = LONG[:75]
        for part in (text[:13], text[13:]):
            assert read(c, session, part).status_code == 200
        (whole,) = stream(load(path), tokens_of(text))
        assert_same_state(memory_of(c, session, tmp_path), whole.state, 1e-4)


WRONG_IDS = [UNKNOWN, "x", "..", "%2e%2e", "..%2f..%2fetc", "%00", "A" * 32, "0" * 31, "0" * 33]
ACTIONS = [
    ("GET", "", None),
    ("DELETE", "", None),
    ("PATCH", "", {"name": "x"}),
    ("GET", "/memory", None),
    ("POST", "/reset", None),
    ("POST", "/ask", {"prompt": "x"}),
]


@pytest.mark.parametrize("id", WRONG_IDS)
def test_ids_that_are_none(c, tmp_path, id) -> None:
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for method, action, body in ACTIONS:
        answer = c.request(method, f"/v1/sessions/{id}{action}", json=body)
        assert answer.status_code in (404, 405), (method, action, answer.text)
    message(c.post(f"/v1/sessions/{id}/read", content=b"x", headers=TEXT), 404)
    message(c.post(f"/v1/sessions/{id}/read", content=b"x", headers=EVENTS), 404)
    if "%" not in id and id != "..":
        message(c.post("/v1/sessions", json={"fork": id}), 404)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


BAD_BODIES = [
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[]", "expected a JSON object, got list"),
    (b'{"prompt": NaN}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}", "not JSON"),
    (b'{"prompt": "\\ud800"}', "expected Unicode text, got half of a surrogate pair"),
    (b'{"prompt": ""}', "the prompt must have 1 to"),
    (b'{"prompt": 5}', "prompt must be a string, got int"),
    (b"{}", "prompt is missing"),
    (b'{"prompt": "x", "max_tokens": 0}', "max_tokens must be an integer in 1..4096, got 0"),
    (b'{"prompt": "x", "max_tokens": true}', "max_tokens must be an integer"),
    (b'{"prompt": "x", "max_tokens": 1e3}', "max_tokens must be an integer"),
    (b'{"prompt": "x", "temperature": -1}', "temperature must be at least 0"),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature must be a number"),
    (b'{"prompt": "x", "temperature": "1"}', "temperature must be a number"),
    (b'{"prompt": "x", "top_p": 2}', "top_p must lie in (0, 1]"),
    (b'{"prompt": "x", "seed": 1.5}', "seed must be an integer"),
    (b'{"prompt": "x", "stop": ""}', "stop must be a string or a list of strings"),
    (b'{"prompt": "x", "stop": [1]}', "stop must be a string or a list of strings"),
    (b'{"prompt": "x", "stream": 1}', "stream must be true or false"),
    (b'{"prompt": "x", "temprature": 1}', "unknown field 'temprature'"),
]


@pytest.mark.parametrize(("body", "reason"), BAD_BODIES, ids=lambda v: str(v)[:40])
def test_a_question_that_is_not_understood(c, body, reason) -> None:
    session = create(c)
    url, kind = f"/v1/sessions/{session}/ask", {"content-type": "application/json"}
    assert reason in message(c.post(url, content=body, headers=kind), 400)


@pytest.mark.parametrize("name", ["", "   ", "x" * 201, "a\nb", "a\x00", "\u2028", 5, ["x"]])
def test_names_that_nobody_should_see(c, name) -> None:
    assert "name" in message(c.post("/v1/sessions", json={"name": name}), 400)
    assert c.get("/v1/sessions").json() == {"sessions": []}


def test_kinds_of_bodies(c) -> None:
    session = create(c)
    url = f"/v1/sessions/{session}"
    for headers in ({}, {"content-type": "application/json"}, {"content-type": "text/html"}):
        message(c.post(f"{url}/read", content=b"x", headers=headers), 415)
    wrong = {"content-type": "text/plain; charset=latin-1"}
    assert "UTF-8" in message(c.post(f"{url}/read", content=b"x", headers=wrong), 415)
    zipped = {**TEXT, "content-encoding": "gzip"}
    assert "compressed" in message(c.post(f"{url}/read", content=b"x", headers=zipped), 415)
    flowed = "text/plain; charset=utf-8; format=flowed"
    for kind in ("text/plain", 'Text/Plain; Charset="UTF-8"', flowed):
        answer = c.post(f"{url}/read", content=b"x", headers={"content-type": kind})
        assert answer.status_code == 200
    plain = c.post(f"{url}/ask", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    message(plain, 415)
    for piece in ("0", "257", "-1", "x", "1" * 5000, "²", "000000001000000000"):
        answer = c.post(f"{url}/read", content=b"x", headers=TEXT, params={"piece": piece})
        assert "piece must be" in message(answer, 400)


def test_attention_is_loaded_for_a_page_alone(tmp_path) -> None:
    page = [Route("/page", lambda request: None)]
    for routes, expected in (([], None), (page, "sliding")):
        app = create_app(ServeSettings(folder=tmp_path), routes)
        app.state.store.folder.close()
        attention = app.state.attention
        assert (attention and attention.config.variant) == expected


def test_a_model_that_is_not_there(tmp_path, model_file) -> None:
    with client(tmp_path / "sessions", model_file) as c:
        wrong = c.post("/v1/sessions", json={"model": "x"})
        assert "no model 'x'; there is tiny" in message(wrong, 404)
        session = create(c, model="tiny")
        both = c.post("/v1/sessions", json={"model": "tiny", "fork": session})
        assert "one of model and fork" in message(both, 400)
        content = c.get(f"/v1/sessions/{session}/memory").content
        message(c.post("/v1/sessions?model=x", content=content, headers=MEMORY), 404)
    other = tmp_path / "other.safetensors"
    build("mag").save(other)
    with client(tmp_path / "sessions", model_file, models={"new": other}) as d:
        assert d.get(f"/v1/sessions/{session}").json()["model"] == "tiny"
        ask = {"prompt": "x"}
        assert "does not have" in message(d.post(f"/v1/sessions/{session}/ask", json=ask), 409)
        message(read(d, session, "x"), 409)
        message(d.post(f"/v1/sessions/{session}/reset"), 409)
        foreign = d.post("/v1/sessions", content=content, headers=MEMORY)
        assert "none of this server's models" in message(foreign, 409)
        assert d.delete(f"/v1/sessions/{session}").status_code == 204
    with client(tmp_path / "t", other) as d:
        kept = create(d)
    with client(tmp_path / "t", model_file) as d:  # the name stayed, the model did not
        ask = d.post(f"/v1/sessions/{kept}/ask", json={"prompt": "x"})
        assert "belongs to another model" in message(ask, 409)


def test_what_extra_routes_get(c) -> None:
    """`hold`, `past`, `reread` and `rewrite`, as the page uses them."""
    import numpy as np

    from titans.serve.reading import reread, rewrite

    session = create(c)
    read(c, session, "abc")
    store = c.app.state.store

    async def edit():
        async with store.hold(session) as held:
            tokens, _ = await store.past(held)
            new = await reread(store.engine, store.model_of(held), np.array([97, 99]), None)
            await rewrite(store, held, np.array([97, 99]), new)
        return tokens, held

    tokens, after = c.portal.call(edit)
    assert tokens.tolist() == [97, 98, 99]
    assert isinstance(tokens, np.memmap)  # a long past is not copied
    assert after.tokens().tolist() == [97, 99]
    other = create(c)
    read(c, other, "ac")
    same = [c.get(f"/v1/sessions/{id}").json() for id in (session, other)]
    assert same[0]["surprise"] == same[1]["surprise"]
    assert same[0]["surprise"]["mean_nll"] is not None
    assert json.loads((after.folder.path / session / "session.json").read_text())["logged"] == 2

    async def fail():
        await store.engine.call(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        c.portal.call(fail)
    assert read(c, session, "d").status_code == 200
