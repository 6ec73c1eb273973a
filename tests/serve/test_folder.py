"""What is on the disk is a whole session after every step at which a process can end."""

import errno
import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from served import build

from titans.serve.errors import ApiError
from titans.serve.folder import Folder, Record, new_id
from titans.state import ModelState

LIMIT = 10**9


class Died(BaseException):
    """The process ends here."""


@pytest.fixture(scope="module")
def model():
    return build()


def state_after(model, count):
    text = torch.arange(count)[None] % 256
    with torch.no_grad():
        return model(text)[1] if count else model.init_state(1).fork()


def record_of(held, **changes):
    record = Record(
        id=new_id(),
        name="n",
        model="tiny",
        parent=None,
        created=1.0,
        used=1.0,
        tokens_read=held.position,
        state_bytes=held.nbytes,
        state="0.memory",
        log="0.tokens",
        logged=0,
        token_bytes=2,
        origin=False,
    )
    return replace(record, **changes)


def snapshot(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def assert_is(folder, record, state, tokens):
    """The one session of the folder is this one, and has no file too many."""
    assert folder.recover() == [record]
    kept = ModelState.load(folder.file(record, record.state))
    for name, tensor in state.tensors().items():
        assert torch.equal(kept.tensors()[name], tensor)
    assert folder.tokens(record).tolist() == tokens
    named = {"session.json", record.state, record.log}
    assert {f.name for f in (folder.path / record.id).iterdir()} == named
    assert {f.name for f in folder.path.iterdir()} == {".lock", record.id}


def commit_read(folder, record, state, tokens):
    """What a read does: append, make it count, and remove what no longer does."""
    log = folder.append_to(record)
    try:
        log.append(np.array(tokens))
        log.finish()
        new = replace(record, tokens_read=state.position, logged=record.logged + len(tokens))
        record = folder.commit(new, state)
        with suppress(OSError):
            folder.sweep(record)
    finally:
        log.close(record)
    return record


def interrupt(monkeypatch, at: int, error: BaseException) -> list[int]:
    """Let call number `at` of what changes the disk raise instead. After a death nothing more
    happens either, whatever the code would still clean up."""
    calls = [0]

    def wrapped(function):
        def step(*arguments, **named):
            calls[0] += 1
            if calls[0] == at or (calls[0] > at and isinstance(error, Died)):
                raise error
            return function(*arguments, **named)

        return step

    for name in ("fsync", "replace", "truncate", "rename", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    monkeypatch.setattr(shutil, "copyfileobj", wrapped(shutil.copyfileobj))
    return calls


@pytest.mark.parametrize("what", ["read", "replace", "create", "delete"])
def test_it_is_whole_wherever_the_process_ends(tmp_path, model, monkeypatch, what) -> None:
    """Every call that changes the disk in turn is the last one that does not happen."""
    before, after = state_after(model, 5), state_after(model, 9)
    at, done = 0, False
    while not done:
        at += 1
        root = tmp_path / str(at)
        folder = Folder(root, LIMIT)
        old = folder.create(record_of(before), before)
        old = commit_read(folder, old, before, [1, 2, 3])
        kept = snapshot(root)
        with monkeypatch.context() as patch:
            calls = interrupt(patch, at, Died())
            try:
                if what == "read":
                    commit_read(folder, old, after, [4, 5])
                elif what == "replace":
                    new = replace(old, tokens_read=9)
                    folder.sweep(folder.commit(new, after, np.array([7, 8, 9])))
                elif what == "create":
                    folder.create(record_of(after, name="second"), after)
                else:
                    folder.delete(old)
            except Died:
                pass
            done = calls[0] < at
        folder.close()
        folder = Folder(root, LIMIT)
        found = folder.recover()
        if what == "create":
            assert sorted(r.name for r in found) in (["n"], ["n", "second"])
            assert folder.tokens(old).tolist() == [1, 2, 3]
            if done:
                assert len(found) == 2
        elif what == "delete":
            assert found in ([old], [])
            assert not found or not done
        elif found == [old]:
            assert not done
            assert_is(folder, old, before, [1, 2, 3])
            assert {k: v for k, v in snapshot(root).items() if k in kept} == kept
        else:
            new = [1, 2, 3, 4, 5] if what == "read" else [7, 8, 9]
            assert_is(folder, found[0], after, new)
        folder.close()
        shutil.rmtree(root)
    assert at > 4


def test_a_full_disk_is_an_answer_and_nothing_is_lost(tmp_path, model, monkeypatch) -> None:
    """Likewise, with the disk refusing and the server going on."""
    before, after = state_after(model, 5), state_after(model, 9)
    at, done, refused = 0, False, 0
    while not done:
        at += 1
        root = tmp_path / str(at)
        folder = Folder(root, LIMIT)
        old = commit_read(folder, folder.create(record_of(before), before), before, [1, 2, 3])
        with monkeypatch.context() as patch:
            calls = interrupt(patch, at, OSError(errno.ENOSPC, "No space left on device"))
            current = old
            try:
                current = commit_read(folder, old, after, [4, 5])
            except ApiError as error:
                refused += error.status == 507 and "No space left" in error.message
            done = calls[0] < at
        # The server goes on with what it knows, and the next commit works.
        current = commit_read(folder, current, after, [6])
        expected = [1, 2, 3, 4, 5, 6] if current.logged == 6 else [1, 2, 3, 6]
        assert folder.tokens(current).tolist() == expected
        folder.close()
        reopened = Folder(root, LIMIT)
        assert_is(reopened, current, after, expected)
        reopened.close()
        shutil.rmtree(root)
    assert refused > 3


def test_a_commit_leaves_what_somebody_may_be_reading(tmp_path, model) -> None:
    folder = Folder(tmp_path, LIMIT)
    state = state_after(model, 3)
    old = folder.create(record_of(state), state)
    new = folder.commit(replace(old, tokens_read=3), state, np.array([1, 2, 3]))
    assert ModelState.load(folder.file(old, old.state)).position == 3
    assert folder.tokens(old).tolist() == []
    folder.sweep(new)
    assert not folder.file(old, old.state).exists()
    assert folder.tokens(new).tolist() == [1, 2, 3]
    folder.close()


def test_a_log_that_was_being_written_is_cut_back(tmp_path, model) -> None:
    folder = Folder(tmp_path, LIMIT)
    state = state_after(model, 3)
    record = commit_read(folder, folder.create(record_of(state), state), state, [1, 2, 3])
    with folder.file(record, record.log).open("ab") as file:
        file.write(b"half a tok")
    folder.close()
    folder = Folder(tmp_path, LIMIT)
    assert_is(folder, record, state, [1, 2, 3])
    assert folder.used == sum(len(v) for k, v in snapshot(tmp_path).items() if "/" in k)
    folder.close()


def test_an_origin_counts_against_the_limit(tmp_path, model) -> None:
    """Room for one state, and not for the one that the session began with as well."""
    state = state_after(model, 3)
    state.save(tmp_path / "given.memory")
    record = replace(record_of(state), origin=True)
    folder = Folder(tmp_path / "sessions", int(1.5 * record.state_bytes))
    with pytest.raises(ApiError, match="no room on the disk"):
        folder.create(record, state, tmp_path / "given.memory")
    assert folder.used == 0
    folder.create(record_of(state), state)
    folder.close()


def test_leftovers_go_and_strangers_stay(tmp_path, model, caplog) -> None:
    folder = Folder(tmp_path, LIMIT)
    state = state_after(model, 0)
    record = folder.create(record_of(state), state)
    other = folder.create(record_of(state), state)
    folder.close()
    for name in (".new-x", ".gone-y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".upload-z").write_text("x")
    (tmp_path / "notes.txt").write_text("mine")
    for content in ("{", "[]", '{"version": 2}', '{"version": 1}', json.dumps({"version": 1})):
        (tmp_path / other.id / "session.json").write_text(content)
        folder = Folder(tmp_path, LIMIT)
        assert folder.recover() == [record]
        assert "left out, not a whole session" in caplog.text
        folder.close()
    names = {f.name for f in tmp_path.iterdir()}
    assert names == {".lock", record.id, other.id, "notes.txt"}
    assert (tmp_path / other.id / "0.memory").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"log": "../../etc/passwd"},
        {"state": "/etc/passwd"},
        {"id": "0" * 31},
        {"state": "origin.memory"},
    ],
)
def test_a_record_cannot_name_files_elsewhere(model, changes) -> None:
    with pytest.raises(ValueError, match="names files that are not a session's"):
        record_of(state_after(model, 0), **changes)


DAMAGED = {
    "nested": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    **{
        f"{name} {value!s:.9}": {name: value}
        for name, value in [
            ("created", float("nan")),
            ("used", "x"),
            ("nll_sum", float("inf")),
            ("nll_sum", 10**400),
            ("last_nll", "x"),
            ("nll_count", 1.5),
            ("state_bytes", "x"),
            ("state_bytes", -1),
            ("model", ["a"]),
            ("name", 5),
            ("parent", 5),
            ("tokens_read", None),
            ("logged", True),
            ("token_bytes", 3),
            ("origin", 1),
            ("log", 5),
            ("tokenizer", {}),
        ]
    },
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_record_is_left_out(tmp_path, model, caplog, without_shape_checks, name) -> None:
    """Whatever it holds: the other sessions are there."""
    folder, state = Folder(tmp_path, LIMIT), state_after(model, 0)
    good, bad = (folder.create(record_of(state), state) for _ in range(2))
    path = folder.file(bad, "session.json")
    change = DAMAGED[name]
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    kept = snapshot(path.parent)
    assert folder.recover() == [good]
    assert "left out, not a whole session" in caplog.text
    assert snapshot(path.parent) == kept
    folder.close()


def test_one_server_at_a_time(tmp_path) -> None:
    first = Folder(tmp_path, LIMIT)
    with pytest.raises(ValueError, match="another server keeps its sessions there"):
        Folder(tmp_path, LIMIT)
    first.close()
    Folder(tmp_path, LIMIT).close()


def test_room_is_counted(tmp_path, model) -> None:
    state = state_after(model, 0)
    folder = Folder(tmp_path, 3 * state.nbytes)
    record = folder.create(record_of(state), state)
    assert state.nbytes < folder.used < 2 * state.nbytes
    log = folder.append_to(record)
    with pytest.raises(ApiError) as refused:
        log.append(np.zeros(2 * state.nbytes))
    log.close(record)
    assert refused.value.status == 507
    folder.limit = folder.used
    for attempt in (
        lambda: folder.create(record_of(state), state),
        lambda: folder.commit(record, state),
    ):
        with pytest.raises(ApiError, match="there is no room"):
            attempt()
    folder.commit(replace(record, name="a new name"), None)  # needs next to nothing
    folder.delete(record)
    assert folder.used == 0
    folder.close()
