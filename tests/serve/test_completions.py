"""OpenAI's completions: what its clients send and expect, with the library's tokens."""

import pytest
from served import client, create, events, message, read

from titans.generate import Sampling, generate
from titans.models.lm import load


def complete(c, **body):
    return c.post("/v1/completions", json=body)


def expected(model_file, prompts, count, sampling, state=None) -> list[str]:
    """Texts up to the end of a document, which ends an answer here."""
    found = []
    for ids in generate(load(model_file), prompts, count, sampling=sampling, state=state).tokens:
        ids = ids[: ids.index(256)] if 256 in ids else ids
        found.append(bytes(ids).decode(errors="replace"))
    return found


def test_the_models(c, model_file) -> None:
    listed = c.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert model["parameters"] == load(model_file).parameter_count
    assert c.get("/v1/models/tiny").json() == model
    assert "no model 'gpt'" in message(c.get("/v1/models/gpt"), 404)


def test_a_name_may_have_a_slash(tmp_path, model_file) -> None:
    with client(tmp_path / "sessions", model_file, models={"org/tiny": model_file}) as c:
        assert c.get("/v1/models/org/tiny").json()["id"] == "org/tiny"


def test_one_completion(c, model_file) -> None:
    answer = complete(c, model="tiny", prompt="Hello", max_tokens=12, temperature=0).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    (text,) = expected(model_file, [list(b"Hello")], 12, Sampling(temperature=0.0))
    assert choice["text"] == text
    assert (choice["index"], choice["logprobs"]) == (0, None)
    assert choice["finish_reason"] in ("length", "stop")
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 5
    assert usage["total_tokens"] == 5 + usage["completion_tokens"] <= 17


@pytest.mark.parametrize("form", ["texts", "ids"])
def test_several_prompts_and_answers_draw_as_the_library(c, model_file, form) -> None:
    """Answer i draws with seed + i, whatever else is answered beside it."""
    prompts = ["one", "another prompt", "third"]
    rows = [list(p.encode()) for p in prompts]
    sent = prompts if form == "texts" else rows
    body = {"prompt": sent, "n": 2, "max_tokens": 9, "temperature": 0.9, "seed": 7}
    choices = complete(c, **body).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    doubled = [row for row in rows for _ in range(2)]
    texts = expected(model_file, doubled, 9, Sampling(temperature=0.9, seed=7))
    assert [choice["text"] for choice in choices] == texts
    assert len(set(texts)) > 3
    ids = complete(c, prompt=rows[0], max_tokens=9, temperature=0.9, seed=7).json()
    assert ids["choices"][0]["text"] == texts[0]


def test_it_remembers_what_a_session_read(c, model_file) -> None:
    session = create(c)
    read(c, session, "«baku: 4821» " * 20)
    state = c.app.state.store.find(session).state
    body = {"prompt": "baku: ", "max_tokens": 8, "temperature": 0, "session": session}
    with_memory = complete(c, **body).json()["choices"][0]["text"]
    assert [with_memory] == expected(
        model_file, [list(b"baku: ")], 8, Sampling(temperature=0.0), state
    )
    assert complete(c, **{**body, "session": None}).json()["choices"][0]["text"] != with_memory
    assert "of model 'tiny', not 'y'" in message(complete(c, **{**body, "model": "y"}), 400)
    message(complete(c, **{**body, "session": "0" * 32}), 404)


def test_streamed_chunks_join_to_the_answer(c) -> None:
    body = {"prompt": ["ä", "b"], "n": 2, "max_tokens": 15, "temperature": 1, "seed": 1}
    whole = complete(c, **body).json()
    answer = complete(c, **body, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, (_, usage), (_, done) = events(answer.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    texts, reasons = [""] * 4, [None] * 4
    for name, chunk in chunks:
        assert name is None
        assert chunk["id"] == usage["id"]
        (part,) = chunk["choices"]
        assert reasons[part["index"]] is None  # the reason comes last
        texts[part["index"]] += part["text"]
        reasons[part["index"]] = part["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]


def test_a_stop_ends_the_text_before_it(c) -> None:
    body = {"prompt": "Hello", "max_tokens": 30, "temperature": 1, "seed": 5}
    text = complete(c, **body).json()["choices"][0]["text"]
    stop = text[4:6]
    cut = text[: text.index(stop)]
    for streamed in (False, True):
        answer = complete(c, **body, stop=["never", stop], stream=streamed)
        if streamed:
            parts = [data["choices"][0] for _, data in events(answer.text)[:-1]]
            got = "".join(part["text"] for part in parts), parts[-1]["finish_reason"]
        else:
            (choice,) = answer.json()["choices"]
            got = choice["text"], choice["finish_reason"]
        assert got == (cut, "stop")


BAD = [
    ({}, "prompt is missing"),
    ({"prompt": []}, "expected 1 to 16 prompts"),
    ({"prompt": ["x"] * 17}, "expected 1 to 16 prompts"),
    ({"prompt": ["x"] * 9, "n": 2}, "at most 16 answers"),
    ({"prompt": "x", "n": 17}, "n must be an integer in 1..16"),
    ({"prompt": ""}, "1 to 65,536 tokens, got 0"),
    ({"prompt": "x" * 65_537}, "1 to 65,536 tokens, got 65,537"),
    ({"prompt": [[]]}, "prompt must be a text"),
    ({"prompt": {"a": 1}}, "prompt must be a text"),
    ({"prompt": [1, "x"]}, "prompt must be a text"),
    ({"prompt": [-1]}, "prompt must be a text"),
    ({"prompt": [True]}, "prompt must be a text"),
    ({"prompt": [257]}, "token 257 is outside the vocabulary"),
    ({"prompt": [2**40]}, "prompt must be a text"),
    ({"prompt": "x", "best_of": 3}, "best_of is not supported"),
    ({"prompt": "x", "echo": True}, "echo is not supported"),
    ({"prompt": "x", "logprobs": 2}, "logprobs is not supported"),
    ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
    ({"prompt": "x", "messages": []}, "unknown field 'messages'"),
    ({"prompt": "x", "stream_options": 5}, "stream_options must be an object, got int"),
    ({"prompt": "x", "stream_options": {"include_usage": "no"}}, "include_usage must be true"),
]


@pytest.mark.parametrize(("body", "reason"), BAD, ids=lambda v: str(v)[:30])
def test_what_is_not_understood(c, body, reason) -> None:
    assert reason in message(complete(c, **body), 400)


def test_what_asks_for_nothing_is_let_through(c) -> None:
    neutral = {"best_of": 1, "echo": False, "suffix": None, "user": "me", "presence_penalty": 0}
    assert complete(c, prompt="x", max_tokens=1, **neutral).status_code == 200
    unknown = complete(c, prompt="x", model="gpt")
    assert "no model 'gpt'" in message(unknown, 404)
