"""The page's routes: every number is the library's, and a session changes only where it should."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from titans import TitansConfig, TitansLM
from titans.demo import asset
from titans.generate import Sampling, generate
from titans.inspect import distance, explain, moved, probe, recall, recall_curve, replay, watch
from titans.models.lm import load
from titans.serve import ServeSettings, create_app
from titans.state import ModelState
from titans.studio import views
from titans.studio.routes import ROUTES

TEXT = {"content-type": "text/plain; charset=utf-8"}


@pytest.fixture(scope="module")
def model():
    return load(asset("demo.safetensors"))


@pytest.fixture(scope="module")
def attention():
    return load(asset("demo-attention.safetensors"))


@pytest.fixture(scope="module")
def short(c):
    return c.get("/studio/texts").json()["texts"][0]


@pytest.fixture(scope="module")
def reader(c, short):
    """A session that has read the first built-in text."""
    id = c.post("/v1/sessions", json={"name": "test"}).json()["id"]
    answer = c.post(f"/v1/sessions/{id}/read", content=short["text"].encode(), headers=TEXT)
    assert answer.json()["read"] == len(short["text"].encode())
    return id


@pytest.fixture
def session(c, reader):
    """A fork of it, for one test."""
    return c.post("/v1/sessions", json={"fork": reader}).json()["id"]


def client_of(folder, **changes):
    app = create_app(ServeSettings(folder=folder, **changes), ROUTES)
    return TestClient(app, base_url="http://127.0.0.1:8321")


def ids(text: str) -> list[int]:
    return list(text.encode())


def tokens(short) -> torch.Tensor:
    return torch.tensor([ids(short["text"])])


def events(answer):
    blocks = [b.split("\n") for b in answer.text.strip().split("\n\n")]
    return [(b[0].removeprefix("event: "), json.loads(b[1].removeprefix("data: "))) for b in blocks]


def state_of(c, id, tmp_path) -> ModelState:
    path = tmp_path / "now.memory"
    path.write_bytes(c.get(f"/v1/sessions/{id}/memory").content)
    return ModelState.load(path)


def test_history_tells_again_what_was_read(c, session, short, model):
    *pieces, (kind, done) = events(c.get(f"/studio/sessions/{session}/history"))
    assert kind == "done"
    assert done["tokens_read"] == len(ids(short["text"]))
    assert done["skipped"] == 0
    assert "".join(t for _, p in pieces for t in p["text"]) == short["text"]
    seen = list(watch(model, tokens(short), piece=64))
    assert [p["start"] for _, p in pieces] == list(range(0, done["tokens_read"], 64))
    for (_, piece), expected in zip(pieces, seen, strict=True):
        for name in ("surprise", "learning_rate", "decay"):
            told = torch.tensor(piece[name]).permute(2, 0, 1)
            torch.testing.assert_close(told, getattr(expected, name)[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(piece["moved"]), expected.moved[0])


def test_history_of_a_long_past_shows_its_end(c, session, short, model, monkeypatch):
    monkeypatch.setattr("titans.studio.routes.SHOWN", 100)
    *pieces, (_, done) = events(c.get(f"/studio/sessions/{session}/history"))
    everything = ids(short["text"])
    assert done["skipped"] == len(everything) - 100
    assert pieces[0][1]["start"] == done["skipped"]
    assert [i for _, p in pieces for i in p["ids"]] == everything[-100:]
    # The numbers go on from the whole past, also the first token's.
    whole = torch.cat([o.nll for o in watch(model, tokens(short))], 1)[0, -100:]
    told = torch.tensor([n for _, p in pieces for n in p["nll"]])
    torch.testing.assert_close(told, whole, rtol=1e-4, atol=1e-4)


def test_three_readers_answer_as_the_library_does(c, session, short, model, attention, tmp_path):
    fact = short["facts"][0]
    content = {"prompt": fact["question"], "max_tokens": 4, "temperature": 0}
    answer = c.post(f"/studio/sessions/{session}/compare-ask", json=content)
    readers = answer.json()["readers"]
    assert readers["memory"]["text"] == fact["value"]
    for name, reader in (("off", model), ("attention", attention)):
        _, state = reader(tokens(short), None, False)
        text = []
        question = torch.tensor([ids(fact["question"])])
        for _ in range(4):
            logits, state = reader(question, state, False)
            question = logits[:, -1:, :256].argmax(-1)
            text.append(int(question))
        assert readers[name]["text"] == bytes(text).decode(errors="replace")
        assert readers[name]["text"] != fact["value"]
        assert readers[name]["tokens_read"] == tokens(short).shape[1]


def test_what_takes_long_is_done_beside_the_event_loop(c, session, monkeypatch):
    """Tokens of a long prompt, and a look through a long past: others are answered meanwhile."""
    tokenizer, threads = c.app.state.store.tokenizer, []

    def spied(function):
        def spy(*arguments):
            threads.append(threading.get_ident())
            return function(*arguments)

        return spy

    monkeypatch.setattr(tokenizer, "encode", spied(tokenizer.encode))
    monkeypatch.setattr(views, "unavailable", spied(views.unavailable))
    asked = {"prompt": "x", "max_tokens": 1}
    erased = {"start": 0, "stop": 1, "instead": "y", "questions": ["z"]}
    url = f"/studio/sessions/{session}"
    assert c.post(f"{url}/compare-ask", json=asked).status_code == 200
    assert c.post(f"{url}/erase", json=erased).status_code == 200
    assert c.post("/studio/explain", json={"text": "abc"}).status_code == 200
    assert len(threads) == 6
    assert c.portal.call(threading.get_ident) not in threads


def test_a_drawn_answer_is_the_one_that_generate_draws(c, session, model, tmp_path):
    content = {"prompt": "def ", "max_tokens": 24, "temperature": 0.8, "seed": 5}
    answer = c.post(f"/studio/sessions/{session}/compare-ask", json=content)
    state = state_of(c, session, tmp_path)
    sampling = Sampling(temperature=0.8, seed=5)
    drawn = generate(model, [ids("def ")], 24, sampling=sampling, state=state).tokens[0]
    expected = bytes(t for t in drawn if t < 256).decode(errors="replace")
    assert answer.json()["readers"]["memory"]["text"] == expected


def test_asking_and_probing_change_nothing(c, session, tmp_path):
    before = c.get(f"/v1/sessions/{session}/memory").content
    c.post(f"/studio/sessions/{session}/compare-ask", json={"prompt": "x", "max_tokens": 2})
    c.post(f"/studio/sessions/{session}/probe", json={"index": 7})
    c.post("/studio/explain", json={"session": session, "index": 7})
    assert c.get(f"/v1/sessions/{session}/memory").content == before


def test_a_probe_is_the_librarys_then_and_now(c, session, short, model, tmp_path):
    index = short["text"].encode().index(short["facts"][0]["value"].encode())
    seen = c.post(f"/studio/sessions/{session}/probe", json={"index": index}).json()
    all_tokens = tokens(short)
    pair = probe(model, None, all_tokens, index)
    _, then = model(all_tokens[:, : index + 1])
    now = recall(model, state_of(c, session, tmp_path), pair).cosine[0]
    at_once = recall(model, then, pair).cosine[0]
    for m, memory in enumerate(seen["memories"]):
        for h, head in enumerate(memory):
            assert head["now"] == pytest.approx(float(now[m, h]), abs=1e-4)
            assert head["then"] == pytest.approx(float(at_once[m, h]), abs=1e-4)
            assert head["learning_rate"] == pytest.approx(float(pair.learning_rate[0, m, h]))
            assert len(head["curve"]) == len(seen["positions"])
    assert seen["positions"][0] == index + 1
    assert seen["positions"][-1] == all_tokens.shape[1]
    assert max(head["then"] for memory in seen["memories"] for head in memory) > 0.99


def test_a_probe_is_computed_in_few_pieces(c, session, short, model):
    """Each piece waits for its turn, so on a busy machine their number is what counts."""
    all_tokens, index = tokens(short), 300
    before = c.app.state.metrics.batches
    seen = c.post(f"/studio/sessions/{session}/probe", json={"index": index}).json()
    assert c.app.state.metrics.batches - before <= views.CURVE_POINTS + 2
    rest = all_tokens[:, index + 1 :]
    size = views.curve_piece(rest.shape[1])
    state = replay(model, all_tokens[:, : index + 1])
    pair = probe(model, None, all_tokens, index)
    curve = list(recall_curve(model, state, pair, rest, piece=size))
    assert seen["positions"] == [position for position, _ in curve]
    drawn = torch.tensor([[head["curve"] for head in memory] for memory in seen["memories"]])
    expected = torch.stack([found.cosine[0] for _, found in curve], -1)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("length", "size"), [(0, 16), (1024, 16), (1025, 17), (131_072, 2048), (10_000_000, 2048)]
)
def test_points_of_a_curve_are_neither_too_near_nor_too_far(length, size):
    assert views.curve_piece(length) == size


def test_a_past_is_not_told_by_another_model(tmp_path):
    """The server was started with another one under the same name."""
    folder, path = tmp_path / "sessions", tmp_path / "other.safetensors"
    TitansLM(TitansConfig(variant="lmm", vocab_size=257, dim=8, layers=1, heads=1)).save(path)
    with client_of(folder) as first:
        id = first.post("/v1/sessions", json={}).json()["id"]
        first.post(f"/v1/sessions/{id}/read", content=b"some words", headers=TEXT)
    with client_of(folder, models={"demo": path}) as second:
        answers = [
            second.get(f"/studio/sessions/{id}/history"),
            second.post(f"/studio/sessions/{id}/probe", json={"index": 3}),
            second.post("/studio/explain", json={"session": id, "index": 3}),
        ]
        for answer in answers:
            assert answer.status_code == 409
            assert "another model" in answer.json()["error"]["message"]


def test_erasing_takes_one_fact_and_leaves_the_others(c, session, short, model, tmp_path):
    gone, *kept = short["facts"]
    text = short["text"].encode()
    statement = f" «{gone['name']}: {gone['value']}» ".encode()
    start = text.index(statement)
    content = {
        "start": start,
        "stop": start + len(statement),
        "questions": [fact["question"] for fact in short["facts"]],
    }
    before = state_of(c, session, tmp_path)
    answer = c.post(f"/studio/sessions/{session}/erase", json=content).json()
    assert answer["erased"] == len(statement)
    first, *others = answer["answers"]
    assert first["before"] == gone["value"]
    assert first["after"] != gone["value"]
    assert [a["after"] for a in others] == [fact["value"] for fact in kept]
    # It is the memory of a text in which the passage never stood.
    rest = text[:start] + text[start + len(statement) :]
    _, expected = model(torch.tensor([list(rest)]))
    after = state_of(c, session, tmp_path)
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(after.tensors()[name], tensor, rtol=1e-4, atol=1e-4)
    apart = distance(model, before, expected)[0]
    torch.testing.assert_close(torch.tensor(answer["distance"]), apart, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(answer["moved"]), moved(model, before)[0])
    assert answer["session"]["tokens_read"] == len(rest)
    told = events(c.get(f"/studio/sessions/{session}/history"))
    assert [i for kind, p in told if kind == "piece" for i in p["ids"]] == list(rest)


def test_after_an_erasure_the_mean_surprise_is_that_of_the_new_text(c, session, short):
    text = short["text"].encode()
    edited = c.post(f"/studio/sessions/{session}/erase", json={"start": 0, "stop": 50}).json()
    fresh = c.post("/v1/sessions", json={}).json()["id"]
    c.post(f"/v1/sessions/{fresh}/read", content=text[50:], headers=TEXT)
    expected = c.get(f"/v1/sessions/{fresh}").json()["surprise"]
    told = edited["session"]["surprise"]
    assert told["mean_nll"] == pytest.approx(expected["mean_nll"], rel=1e-5)


def test_others_are_served_while_a_long_past_is_probed(c, session, short):
    """Reading again is done in pieces: a question to another session is answered first."""
    text = short["text"].encode()
    long = c.post("/v1/sessions", json={}).json()["id"]
    c.post(f"/v1/sessions/{long}/read", content=text * (30_000 // len(text)), headers=TEXT)
    order = []

    def ask(name, url, content):
        answer = c.post(url, json=content)
        assert answer.status_code == 200, answer.text
        order.append(name)

    jobs = [
        ("probe", f"/studio/sessions/{long}/probe", {"index": 29_000 - len(text)}),
        ("ask", f"/v1/sessions/{session}/ask", {"prompt": "x", "max_tokens": 1}),
        ("read on", f"/v1/sessions/{long}/ask", {"prompt": "x", "max_tokens": 1}),
    ]
    threads = [threading.Thread(target=ask, args=job) for job in jobs]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert order[-1] == "probe"
    assert len(order) == 3


def test_an_erasure_can_be_stopped(c, session, short):
    """What it computed is thrown away, it computes no more, and the memory is free again."""
    text = short["text"].encode()
    c.post(f"/v1/sessions/{session}/read", content=text * (40_000 // len(text)), headers=TEXT)
    url, store = f"/studio/sessions/{session}/erase", c.app.state.store
    before = c.get(f"/v1/sessions/{session}").json()
    files = sorted(path.name for path in (store.folder.path / session).iterdir())
    stop = f"/studio/sessions/{session}/stop"
    assert c.post(stop).json() == {"stopped": False}
    told = []
    content = {"start": 0, "stop": 5, "instead": "x"}
    erasing = threading.Thread(target=lambda: told.append(c.post(url, json=content)))
    batches = store.engine.metrics.batches
    erasing.start()
    while store.engine.metrics.batches < batches + 2:
        time.sleep(0.01)
    assert c.post(stop).json() == {"stopped": True}
    erasing.join()
    assert told[0].status_code == 409
    assert told[0].json()["error"]["code"] == "stopped"
    computed = store.engine.metrics.batches
    assert computed < batches + 20  # whole, it takes 20 pieces
    time.sleep(0.2)
    assert store.engine.metrics.batches <= computed + 1
    assert c.get(f"/v1/sessions/{session}").json() == before
    assert sorted(path.name for path in (store.folder.path / session).iterdir()) == files
    erased = c.post(url, json={**content, "tokens_read": before["tokens_read"]}).json()
    assert erased["session"]["tokens_read"] == before["tokens_read"] - 4


def test_a_reading_can_be_stopped(c, session):
    """What it has read arrives, and counts; the rest is not read."""
    before = c.get(f"/v1/sessions/{session}").json()["tokens_read"]
    url, told = f"/v1/sessions/{session}/read", []
    headers = {**TEXT, "accept": "text/event-stream"}
    text = b"x = 1\n" * 5000
    reading = threading.Thread(
        target=lambda: told.append(c.post(url, content=text, headers=headers))
    )
    metrics = c.app.state.store.engine.metrics
    batches = metrics.batches
    reading.start()
    while metrics.batches < batches + 2:
        time.sleep(0.01)
    assert c.post(f"/studio/sessions/{session}/stop").json() == {"stopped": True}
    reading.join()
    found = events(told[0])
    assert [name for name, _ in found[-2:]] == ["piece", "done"]
    read = sum(len(data["ids"]) for name, data in found if name == "piece")
    assert found[-1][1]["read"] == read < len(text)
    assert c.get(f"/v1/sessions/{session}").json()["tokens_read"] == before + read


def test_an_erasure_that_is_being_written_is_not_stopped(c, session, monkeypatch):
    """Whoever asks then is told no, and the erasure is answered as done."""
    url, store, asked = f"/studio/sessions/{session}/erase", c.app.state.store, []
    before = c.get(f"/v1/sessions/{session}").json()
    commit = store.folder.commit

    def slow(*arguments):
        asked.append(c.post(f"/studio/sessions/{session}/stop").json())
        return commit(*arguments)

    monkeypatch.setattr(store.folder, "commit", slow)
    answer = c.post(url, json={"start": 0, "stop": 5})
    assert answer.status_code == 200
    assert asked == [{"stopped": False}]
    assert answer.json()["session"]["tokens_read"] == before["tokens_read"] - 5


def test_a_passage_can_be_replaced(c, session, short):
    fact = short["facts"][1]
    start = short["text"].encode().index(fact["value"].encode())
    content = {"start": start, "stop": start + 4, "instead": "7519"}
    content["questions"] = [fact["question"]]
    answer = c.post(f"/studio/sessions/{session}/erase", json=content).json()
    assert answer["answers"] == [{"before": fact["value"], "after": "7519"}]
    assert answer["inserted"] == 4


def test_a_place_in_a_text_that_has_changed_is_not_erased(c, session, short):
    """A second erasure that was sent before the first was done would take other tokens."""
    whole = len(ids(short["text"]))
    content = {"start": 0, "stop": 5, "tokens_read": whole}
    assert c.post(f"/studio/sessions/{session}/erase", json=content).status_code == 200
    again = c.post(f"/studio/sessions/{session}/erase", json=content)
    assert again.status_code == 409
    assert "nothing was erased" in again.json()["error"]["message"]
    assert c.get(f"/v1/sessions/{session}").json()["tokens_read"] == whole - 5


def test_everything_can_be_erased(c, session, model, short, tmp_path):
    content = {"start": 0, "stop": len(ids(short["text"]))}
    answer = c.post(f"/studio/sessions/{session}/erase", json=content).json()
    assert answer["session"]["tokens_read"] == 0
    fresh = model.init_state(1).tensors()
    for name, tensor in state_of(c, session, tmp_path).tensors().items():
        assert torch.equal(tensor, fresh[name])


@pytest.mark.parametrize("passage", [(5, 5), (6, 5), (0, 10**6)])
def test_a_passage_outside_the_text_is_refused(c, session, passage):
    content = {"start": passage[0], "stop": passage[1]}
    answer = c.post(f"/studio/sessions/{session}/erase", json=content)
    assert answer.status_code == 400
    assert "expected start < stop" in answer.json()["error"]["message"]


def test_a_loaded_memory_can_be_probed_and_erased_from_where_it_began(c, session, model, tmp_path):
    """Its past is unknown, and stays in it; what is read after loading can be erased again."""
    file = c.get(f"/v1/sessions/{session}/memory").content
    kind = {"content-type": "application/octet-stream"}
    loaded = c.post("/v1/sessions?name=loaded", content=file, headers=kind).json()["id"]
    c.post(f"/v1/sessions/{loaded}/read", content=b" and more", headers=TEXT)
    c.post(f"/studio/sessions/{loaded}/erase", json={"start": 0, "stop": 9})
    origin, after = state_of(c, session, tmp_path), state_of(c, loaded, tmp_path)
    for name, tensor in origin.tensors().items():
        assert torch.equal(after.tensors()[name], tensor)
    seen = c.post(f"/studio/sessions/{loaded}/probe", json={"index": 0})
    assert seen.status_code == 400  # nothing was read since


def test_distance_of_forks(c, session, model, tmp_path):
    fork = c.post("/v1/sessions", json={"fork": session}).json()["id"]
    url = f"/studio/sessions/{session}/compare?with={fork}"
    assert not np.any(c.get(url).json()["distance"])
    c.post(f"/v1/sessions/{fork}/read", content=" «qqqq: 1234» ".encode(), headers=TEXT)
    first, second = state_of(c, session, tmp_path), state_of(c, fork, tmp_path)
    told = torch.tensor(c.get(url).json()["distance"])
    torch.testing.assert_close(told, distance(model, first, second)[0])
    assert told.max() > 1


def test_an_explanation_adds_up(c, session, short, model):
    index = short["text"].encode().index(short["facts"][0]["value"].encode())
    seen = c.post("/studio/explain", json={"session": session, "index": index}).json()
    assert seen["tokens"][seen["token"]] == short["facts"][0]["value"][0]
    assert seen["learning_rate"][seen["token"]] > 0.9  # the head that writes it was chosen
    detail = seen["detail"]
    (one,) = detail["matrices"]
    key, value, error = (np.array(detail[n]) for n in ("key", "value", "error"))
    before, after, change = (np.array(one[n]) for n in ("before", "after", "change"))
    np.testing.assert_allclose(np.linalg.norm(key), 1, rtol=1e-5)
    # The gradient of 0.5 |k W - v|^2, the rule, and the answer after it.
    np.testing.assert_allclose(np.outer(key, error), np.array(one["gradient"]), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(error), detail["surprise"], rtol=1e-4)
    step = -one["learning_rate"] * np.array(one["gradient"])
    np.testing.assert_allclose(step, np.array(one["step"]), atol=1e-5)
    np.testing.assert_allclose((1 - one["decay"]) * before + step, after, atol=1e-4)
    np.testing.assert_allclose(after - before, change, atol=1e-4)
    assert detail["error_after"] < 0.01 * np.linalg.norm(value)
    # It is the step of the library, at the place in the text.
    start = index - seen["token"]
    _, state = model(tokens(short)[:, :start])
    part = tokens(short)[:, start : index + 1]
    step = explain(model, state, part, seen["memory"], seen["head"])
    np.testing.assert_allclose(step.reads[-1], detail["read"], atol=1e-4)


def test_an_explanation_of_a_text_in_a_fresh_memory(c):
    seen = c.post("/studio/explain", json={"text": " «baku: 4821» "}).json()
    assert "".join(seen["tokens"]) == " «baku: 4821» "
    assert seen["tokens"][seen["token"]] == "1"  # the last that is written
    again = {"text": " «baku: 4821» ", "memory": 1, "head": 0, "token": 2}
    assert c.post("/studio/explain", json=again).json()["memory"] == 1
    wrong = c.post("/studio/explain", json={"text": "ab", "memory": 9, "head": 0})
    assert wrong.status_code == 400
    assert "memory must lie in 0..1, got 9" in wrong.json()["error"]["message"]
    wrong = c.post("/studio/explain", json={"text": "abc", "token": 3})
    assert wrong.status_code == 400
    assert "token must lie in 0..2, got 3" in wrong.json()["error"]["message"]


def test_unknown_sessions_are_404(c):
    for url in ("history", "compare"):
        assert c.get(f"/studio/sessions/{'0' * 32}/{url}").status_code == 404
    for url in ("probe", "erase", "compare-ask"):
        content = {"index": 0, "start": 0, "stop": 1, "prompt": "x"}
        wanted = {"probe": ["index"], "erase": ["start", "stop"], "compare-ask": ["prompt"]}[url]
        body = {name: content[name] for name in wanted}
        assert c.post(f"/studio/sessions/{'0' * 32}/{url}", json=body).status_code == 404


def test_another_site_cannot_use_the_page(c, session):
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        answer = c.post(f"/studio/sessions/{session}/probe", json={"index": 0}, headers=headers)
        assert answer.status_code == 403
