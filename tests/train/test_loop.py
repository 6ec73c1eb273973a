"""The loop: exact across kills, the same however a step is computed, and stopping in good order."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import titans
from titans.config import load_toml, to_toml
from titans.data.text import IGNORED
from titans.data.tokenizers import ByteTokenizer, tokenizer_of
from titans.models.lm import TitansLM
from titans.state import NonFiniteError
from titans.train import loop
from titans.train.batches import open_data
from titans.train.checkpoint import checkpoints, held, latest
from titans.train.config import RunConfig
from titans.train.loop import new_training, take_step, train
from titans.train.metrics import MetricsFile, read_metrics
from titans.train.objective import charge, read_segment, runs_bf16
from titans.train.signals import stop_request

# argv: config, folder, the step whose row is the last thing the process does.
TRAIN_AND_DIE = """
import os, signal, sys
from titans.config import load_toml
from titans.train.config import RunConfig
from titans.train.loop import train
from titans.train.metrics import MetricsFile

write = MetricsFile.write

def write_and_die(self, row):
    write(self, row)
    if row["step"] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

MetricsFile.write = write_and_die
train(load_toml(sys.argv[1], RunConfig), sys.argv[2], progress=False)
"""


def trace(folder):
    """The rows of a run without what the clock decides."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def weights(folder):
    return dict(titans.load(latest(folder) / "model.safetensors").named_parameters())


def kill_after(step, config, folder):
    """A process that trains until it has written the row of `step`, then SIGKILL."""
    toml = folder.with_suffix(".toml")
    toml.write_text(to_toml(config))
    command = [sys.executable, "-c", TRAIN_AND_DIE, str(toml), str(folder), str(step)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr


# PyTorch's remark, in bf16, that a norm with float32 weights is not a fused one.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize(
    ("task", "variant", "optimizer", "settings"),
    [
        ("text", "mac", "adamw", {"accumulate": 2}),
        ("text", "mag", "muon", {"precision": "bf16"}),
        ("facts", "lmm", "adamw", {"gradient_checkpointing": True}),
        ("facts", "lmm", "muon", {}),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tiny, tmp_path, task, variant, optimizer, settings):
    """Killed at step 6, resumed from step 4: for text, in the middle of a document."""
    facts = {"lengths": (64, 70), "stages": (5,), "stage_lengths": ((90,),)}
    config = tiny(
        task,
        variant,
        data=facts if task == "facts" else {},
        optimizer={"name": optimizer},
        eval_every=5,
        **settings,
    )
    whole = train(config, tmp_path / "whole", progress=False)
    killed = tmp_path / "killed"
    kill_after(6, config, killed)
    assert [row["step"] for row in trace(killed)] == [1, 2, 3, 4, 5, 6]
    assert latest(killed).name == "step-000004"
    assert len(list(latest(killed).glob("memory-*"))) == (
        0 if task == "facts" else config.train.accumulate
    )
    resumed = train(config, killed, progress=False)
    assert trace(killed) == trace(tmp_path / "whole")
    assert [row["step"] for row in trace(killed)] == list(range(1, 9))
    assert resumed.metrics["loss"] == whole.metrics["loss"]
    one, other = weights(killed), weights(tmp_path / "whole")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_killed_before_its_first_checkpoint_begins_again(tiny, tmp_path):
    config = tiny("facts", steps=3)
    train(config, tmp_path / "whole", progress=False)
    kill_after(2, config, tmp_path / "killed")
    assert latest(tmp_path / "killed") is None
    train(config, tmp_path / "killed", progress=False)
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")


def test_two_processes_do_not_train_in_one_folder(tiny, tmp_path):
    """The second would delete checkpoints of the first that are later than its own."""
    config = tiny(steps=2)
    train(config, tmp_path, progress=False)
    with held(tmp_path), pytest.raises(ValueError, match="another process trains in it"):
        train(config, tmp_path, progress=False)
    assert train(config, tmp_path, progress=False).finished


def test_a_model_knows_the_tokenizer_it_was_trained_with(tiny, tmp_path):
    """Another one of as many tokens would be taken, and every answer be wrong."""
    path = train(tiny(steps=2), tmp_path, progress=False).checkpoint / "model.safetensors"
    model = titans.load(path)
    assert model.tokenizer == "bytes"
    model.save(tmp_path / "copy.safetensors")
    assert titans.load(tmp_path / "copy.safetensors").tokenizer == "bytes"
    tokenizer_of(model, ByteTokenizer())

    other = ByteTokenizer()
    other.name = "backwards"
    with pytest.raises(ValueError, match="with the tokenizer bytes, this one is backwards"):
        tokenizer_of(model, other)
    model.tokenizer = None  # as files have it that are older
    tokenizer_of(model, other)
    # A vocabulary with room to spare is no reason to doubt the tokenizer that is known.
    wide = tiny(steps=1, model={"vocab_size": 2000})
    path = train(wide, tmp_path / "wide", progress=False).checkpoint / "model.safetensors"
    tokenizer_of(titans.load(path), ByteTokenizer())


def test_training_on_keeps_to_the_tokenizer(tiny, tmp_path):
    model = TitansLM(tiny().model)
    model.tokenizer = "sha256:of another"
    model.save(tmp_path / "other.safetensors")
    config = tiny(steps=2, initial_model=str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="initial_model was trained with the tokenizer sha256:of"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_other_manners(tiny, tmp_path):
    """What does not change its numbers may change, e.g. where it had run out of memory."""
    config = tiny("facts", steps=4, checkpoint_every=2)
    train(config, tmp_path / "whole", progress=False)
    kill_after(3, config, tmp_path / "killed")
    other = replace(
        config, train=replace(config.train, gradient_checkpointing=True, checkpoint_every=1)
    )
    train(other, tmp_path / "killed", progress=False)
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    assert load_toml(tmp_path / "killed" / "config.toml", RunConfig) == other
    assert [f.name for f in checkpoints(tmp_path / "killed")] == ["step-000003", "step-000004"]


def test_a_finished_run_is_left_as_it_is(tiny, tmp_path):
    config = tiny(steps=3)
    first = train(config, tmp_path, progress=False)
    before = {path: path.stat().st_mtime_ns for path in latest(tmp_path).iterdir()}
    again = train(config, tmp_path, progress=False)
    assert again.finished
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in latest(tmp_path).iterdir()} == before


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_a_resumed_run_goes_on(tiny, tmp_path, monkeypatch, capfd, name):
    config = tiny(steps=5, checkpoint_every=0)
    train(config, tmp_path / "whole", progress=False)
    write, before = MetricsFile.write, signal.getsignal(name)

    def write_and_signal(self, row):
        write(self, row)
        if row["step"] == 2:
            signal.raise_signal(name)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", write_and_signal)
        stopped = train(config, tmp_path / "stopped")
    assert signal.getsignal(name) == before
    assert (stopped.step, stopped.finished) == (2, False)
    assert stopped.checkpoint.name == "step-000002"
    message = capfd.readouterr().err
    assert "stopped after step 2; train with the same config and folder to go on" in message
    assert train(config, tmp_path / "stopped", progress=False).finished
    assert trace(tmp_path / "stopped") == trace(tmp_path / "whole")


@pytest.fixture
def python_handler():
    """Python's own handler, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_acts_at_once(python_handler, monkeypatch):
    monkeypatch.setattr("titans.train.signals.SAME_PRESS_S", 0.0)
    with stop_request() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.made
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signals_handed_on_are_one_request(python_handler, monkeypatch):
    """Ctrl-C reaches all processes of a terminal, and torchrun and job schedulers stop each of
    theirs once more: a run that is writing its last checkpoint must not die of that."""
    with stop_request() as stop:
        for name in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(name)
        assert stop.made
    monkeypatch.setattr("titans.train.signals.SAME_PRESS_S", 0.0)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # that would be an error
    try:
        with stop_request() as stop:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            assert stop.made
    finally:
        signal.signal(signal.SIGTERM, before)


def gradients(config, steps=2):
    """Rows, and the gradient of the last of some steps, in float64."""
    data = open_data(config)
    training = new_training(config, torch.device("cpu"))
    training.model.double().gradient_checkpointing = config.train.gradient_checkpointing
    rows = [take_step(training, data.at(s).train.batch(s), config) for s in range(steps)]
    return rows, {name: p.grad for name, p in training.model.named_parameters()}


@pytest.mark.parametrize("task", ["text", "facts"])
def test_accumulation_equals_a_big_batch(tiny, task):
    """Parts of unequal size too: 5 rows in 3 parts. Rounding in float64, over two steps."""
    tokens = 5 * 24 if task == "text" else 5 * 64
    rows, expected = gradients(tiny(task, tokens_per_batch=tokens))
    parts, got = gradients(tiny(task, tokens_per_batch=tokens, accumulate=3))
    for one, other in zip(rows, parts, strict=True):
        assert other == pytest.approx(one, rel=1e-10)
    for name, gradient in expected.items():
        if gradient is None:
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal", "sliding"])
def test_gradient_checkpointing_changes_nothing(tiny, tmp_path, variant):
    """Three steps: a memory is carried into the second and the third."""
    rows = [
        train(config, tmp_path / str(on), progress=False) and trace(tmp_path / str(on))
        for on in (False, True)
        for config in [tiny(variant=variant, steps=3, gradient_checkpointing=on)]
    ]
    assert rows[0] == rows[1]


def test_a_memory_is_carried_within_a_document_and_not_beyond(tiny):
    """The losses of a step are those of its segment read after the ones before it."""
    config = tiny(optimizer={"learning_rate": 1e-30})  # the weights stay where they are
    data = open_data(config)
    training = new_training(config, torch.device("cpu"))
    model = training.model
    with torch.no_grad():
        for p in model.parameters():  # a fresh model's memory says little
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    for step in range(6):
        batch = data.at(step).train.batch(step)
        row = take_step(training, batch, config)
        window = [data.at(0).train.batch(s).tokens for s in range(step - step % 3, step + 1)]
        with torch.no_grad():
            logits = model(torch.cat(window, 1))[0][:, -24:]
            alone = model(batch.tokens)[0]
        losses = [
            torch.nn.functional.cross_entropy(x.flatten(0, 1), batch.labels.flatten()).item()
            for x in (logits, alone)
        ]
        assert row["loss"] == pytest.approx(losses[0], rel=1e-5)
        assert (losses[0] == losses[1]) == (step % 3 == 0)
        assert bool(training.memories) == (step % 3 != 2)


def test_the_cost_of_writing_closes_the_gates(tiny, tmp_path):
    opened = {
        cost: train(tiny(write_cost=cost), tmp_path / str(cost), progress=False).metrics["open"]
        for cost in (0.0, 100.0)
    }
    assert opened[100.0] < 0.9 * opened[0.0]


def test_few_strong_writes_may_cost_less_than_many_weak_ones(tiny):
    half = 0.1
    gate = torch.tensor([0.0, 0.1, 0.9], requires_grad=True)
    assert charge(gate, 0.0) is gate
    charge(gate, half).sum().backward()
    assert charge(gate, half).tolist() == pytest.approx([0.0, 0.5, 0.9])
    assert gate.grad.tolist() == pytest.approx([10.0, 2.5, 0.1])
    config = tiny(write_cost=1.0, write_half=half)
    data, training = open_data(config), new_training(config, torch.device("cpu"))
    batch = data.at(0).train.batch(0)
    with torch.no_grad():
        records = [r for r in training.model.run(batch.tokens).records if r is not None]
        segment = read_segment(training.model, batch, None, "float32", half)
    wanted = sum(charge(g, half).mean() for r in records for g in (r.learning_rate, r.decay))
    assert segment.charged.item() == pytest.approx(wanted.item() / len(records), rel=1e-5)
    read = []

    def spy(*arguments):
        read.append(arguments[-1])
        return read_segment(training.model, *arguments)

    training.reader = spy
    take_step(training, batch, config)
    assert read == [half]  # the loop asks for it


def test_what_pads_a_document_costs_nothing(tiny):
    config = tiny()
    batch = open_data(config).at(0).train.batch(0)
    model = new_training(config, torch.device("cpu")).model
    with torch.no_grad():
        whole = read_segment(model, batch, None, "float32")
        labels = batch.labels.clone()
        labels[:, 10:] = IGNORED
        half = read_segment(model, batch._replace(labels=labels), None, "float32")
        records = [r for r in model.run(batch.tokens).records if r is not None]
        none = torch.full_like(labels, IGNORED)
        padding = read_segment(model, batch._replace(labels=none), None, "float32")
    wanted = [r.learning_rate[:, :10].sum() / r.learning_rate.numel() for r in records]
    assert half.open.item() == pytest.approx((sum(wanted) / len(wanted)).item(), rel=1e-5)
    assert half.open < whole.open
    assert half.charged < whole.charged
    assert padding.open == padding.charged == 0.0


def test_forgetting_costs_as_writing_does(tiny, tmp_path):
    """Gates that shut do not keep a memory whose decay, not tied to them, goes on."""
    decay = {}
    for cost in (0.0, 100.0):
        config = tiny(write_cost=cost, steps=20, optimizer={"learning_rate": 1e-2})
        memory = replace(config.model.memory, tie_forgetting=False)
        config = replace(config, model=replace(config.model, memory=memory))
        trained = train(config, tmp_path / str(cost), progress=False)
        model = titans.load(trained.checkpoint / "model.safetensors")
        tokens = open_data(config).at(0).train.batch(0).tokens
        with torch.no_grad():
            records = model.run(tokens, None).records
        decay[cost] = sum(record.decay.mean().item() for record in records)
    assert decay[100.0] < 0.3 * decay[0.0], decay


def test_a_model_learns(tiny, tmp_path):
    config = tiny(steps=40, eval_every=40, optimizer={"learning_rate": 1e-2})
    train(config, tmp_path, progress=False)
    rows = trace(tmp_path)
    assert rows[0]["loss"] == pytest.approx(5.5, abs=0.1)  # log 257
    assert rows[-1]["valid_bits_per_byte"] < 4.5  # the letters' frequencies alone: about 3.8


def poison_parameter(monkeypatch, step, name):
    """Put a NaN into a parameter after the update of `step`."""
    original = loop.take_step

    def poisoned(training, batch, config, here):
        row = original(training, batch, config, here)
        if training.step == step:
            with torch.no_grad():
                training.model.get_parameter(name).view(-1)[3] = float("nan")
        return row

    monkeypatch.setattr(loop, "take_step", poisoned)


def test_a_nan_names_step_and_layer_and_leaves_the_last_good_checkpoint(
    tiny, tmp_path, monkeypatch
):
    name = "blocks.1.mixer.memory.qkv.weight"
    poison_parameter(monkeypatch, 5, name)
    with pytest.raises(NonFiniteError, match=f"^step 6: the parameter {name} is not finite$"):
        train(tiny(variant="mac", checkpoint_every=2), tmp_path, progress=False)
    assert latest(tmp_path).name == "step-000004"
    assert all(p.isfinite().all() for p in weights(tmp_path).values())
    assert [row["step"] for row in trace(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_nan_is_never_saved(tiny, tmp_path, monkeypatch):
    poison_parameter(monkeypatch, 4, "norm.weight")
    with pytest.raises(NonFiniteError, match=r"step 4: the parameter norm\.weight is not finite"):
        train(tiny(checkpoint_every=2), tmp_path, progress=False)
    assert latest(tmp_path).name == "step-000002"


def test_a_nan_in_a_gradient_names_where_it_began(tiny, tmp_path, monkeypatch):
    def with_hook(*arguments, **named):
        training = new_training(*arguments, **named)
        weight = training.model.get_parameter("blocks.0.ffn.down.weight")
        weight.register_hook(lambda gradient: gradient * float("nan"))
        return training

    monkeypatch.setattr(loop, "new_training", with_hook)
    with pytest.raises(NonFiniteError, match=r"^step 1: the gradient of blocks.0.ffn.down.weight"):
        train(tiny(), tmp_path, progress=False)


def test_a_nan_in_a_memory_names_the_block(tiny, tmp_path, monkeypatch):
    original = loop.read_segment

    def poisoned(*arguments):
        segment = original(*arguments)
        last = segment.state.blocks[1]
        broken = last.map(lambda t: t * float("nan"))
        blocks = (segment.state.blocks[0], broken)
        state = type(segment.state)(
            blocks=blocks, position=segment.state.position, config_hash=segment.state.config_hash
        )
        return segment._replace(state=state)

    monkeypatch.setattr(loop, "read_segment", poisoned)
    with pytest.raises(NonFiniteError, match=r"^step 1: the memory blocks\.1\..* is not finite$"):
        train(tiny(), tmp_path, progress=False)
    assert latest(tmp_path) is None


def test_an_exploding_loss_is_refused(tiny, tmp_path, monkeypatch):
    original = loop.read_segment

    def exploded(*arguments):
        segment = original(*arguments)
        return segment._replace(nll=segment.nll * float("inf"))

    monkeypatch.setattr(loop, "read_segment", exploded)
    with pytest.raises(NonFiniteError, match=r"^step 1: the loss is not finite \(inf\)$"):
        train(tiny(), tmp_path, progress=False)


def test_mistakes_leave_no_folder(tiny, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="'gpu7' cannot be used"):
        train(tiny(device="gpu7"), folder, progress=False)
    with pytest.raises(ValueError, match="'meta' cannot be used"):
        train(tiny(device="meta"), folder, progress=False)
    with pytest.raises(ValueError, match=r"no\.txt: no such file"):
        train(tiny(data={"paths": ("no.txt",)}), folder, progress=False)
    config = tiny()
    memory = replace(config.model.memory, impl="exact", depth=2)
    with pytest.raises(ValueError, match="impl='exact' needs a linear memory"):
        train(replace(config, model=replace(config.model, memory=memory)), folder, progress=False)
    assert not folder.exists()


def test_a_folder_with_a_run_needs_resume(tiny, tmp_path):
    train(tiny(steps=2), tmp_path, progress=False)
    with pytest.raises(ValueError, match="there is a run in it already"):
        train(tiny(steps=2), tmp_path, resume=False, progress=False)
    with pytest.raises(ValueError, match=r"train\.steps is 2 there and 3 here"):
        train(tiny(steps=3), tmp_path, progress=False)


def test_a_run_that_failed_at_once_may_have_another_config(tiny, tmp_path, monkeypatch):
    """There is nothing in its folder to lose."""

    def fail(*_):
        raise NonFiniteError("step 1")

    data = {"paths": (), "valid_paths": ()}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "check_segment", fail)
        with pytest.raises(NonFiniteError):
            train(tiny(data=data), tmp_path, progress=False)
    config = tiny(data=data, steps=2)
    assert train(config, tmp_path, progress=False).finished
    assert load_toml(tmp_path / "config.toml", RunConfig) == config
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_only_looks_like_a_run_is_left_alone(tiny, tmp_path):
    (tmp_path / "site").mkdir()
    mine = tmp_path / "site" / "config.toml"
    mine.write_text('title = "blog"')
    with pytest.raises(ValueError, match="unknown key 'title'"):
        train(tiny(), tmp_path / "site", progress=False)
    assert mine.read_text() == 'title = "blog"'
    kill_after(2, tiny(checkpoint_every=0), tmp_path / "run")
    with pytest.raises(ValueError, match=r"train\.steps is 8 there and 9 here"):
        train(tiny(checkpoint_every=0, steps=9), tmp_path / "run", progress=False)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 2


def test_a_run_does_not_go_on_with_other_data(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Day {n}: rain. " for n in range(400)))
    data = {"paths": (str(text),), "valid_paths": ()}
    config = tiny(steps=3, eval_every=0, checkpoint_every=1, data=data)
    kill_after(2, config, tmp_path / "run")
    whole = text.read_text()
    text.write_text(whole.replace("rain", "snow"))
    step = rf"run/checkpoints/{latest(tmp_path / 'run').name}: the data are not those it was"
    with pytest.raises(ValueError, match=step):
        train(config, tmp_path / "run", progress=False)
    text.write_text(whole)
    assert train(config, tmp_path / "run", progress=False).finished
    text.write_text(whole + "More.")
    assert train(config, tmp_path / "run", progress=False).finished  # there is nothing to read


def test_checkpoints_that_know_no_batch_go_on(tiny, tmp_path):
    config = tiny(steps=3, checkpoint_every=1)
    kill_after(2, config, tmp_path)
    path = latest(tmp_path) / "training.json"
    index = json.loads(path.read_text())
    assert index.pop("batch")
    path.write_text(json.dumps(index))
    assert train(config, tmp_path, progress=False).finished


def test_threads_are_given_back(tiny, tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="no such file"):
        train(tiny(threads=before + 1, data={"paths": ("no.txt",)}), tmp_path / "run")
    assert torch.get_num_threads() == before


def test_progress_goes_to_stderr(tiny, tmp_path, capfd):
    train(tiny(steps=2), tmp_path)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "2/2 loss 5." in captured.err
    assert "tokens/s" in captured.err


def test_training_can_begin_with_the_weights_of_another_run(tiny, tmp_path):
    first = train(tiny(steps=2), tmp_path / "first", progress=False)
    given = first.checkpoint / "model.safetensors"
    config = tiny(steps=1, initial_model=str(given))
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-30))
    second = train(config, tmp_path / "second", progress=False)
    mine, yours = titans.load(second.checkpoint / "model.safetensors"), titans.load(given)
    for a, b in zip(mine.parameters(), yours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    given.unlink()  # what goes on from a checkpoint needs it no more
    assert train(config, tmp_path / "second", progress=False) == second
    with pytest.raises(ValueError, match="no such file"):
        train(config, tmp_path / "again", progress=False)
    mine.save(given)
    other = replace(config, model=replace(config.model, window=9))
    with pytest.raises(ValueError, match="its config is not that of the run's model"):
        train(other, tmp_path / "third", progress=False)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("found", "fast"), [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({}, False)]
)
def test_auto_precision_is_bf16_where_the_processor_multiplies_it(monkeypatch, found, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert runs_bf16("auto", "cpu") is fast
    assert runs_bf16("bf16", "cpu")
    assert not runs_bf16("float32", "cpu")
