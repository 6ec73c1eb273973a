"""The training loop: the file to read first, and to change.

    curriculum -> batch -> read it -> loss + cost of writing -> backward -> step

A document may be longer than one step's graph: then its segments are read one a step, and what
the model remembers goes along, without its gradient (truncated backpropagation through time).
A run that is killed and resumed gives the losses of one that was not; on a CPU, bit for bit.
Started by torchrun, each process has its share of every batch: `titans.train.processes`.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from titans.config import compared, differences
from titans.data.documents import expand_paths
from titans.data.facts import Batch
from titans.data.tokenizers import check_tokenizer, tokenizer_identity
from titans.models.lm import TitansLM, load
from titans.state import ModelState, read_notes
from titans.train.batches import Data, open_data
from titans.train.checkpoint import (
    MODEL,
    Training,
    batch_identity,
    checkpoints,
    held,
    is_sharded,
    last_batch,
    load_checkpoint,
    open_run,
    save_checkpoint,
)
from titans.train.config import RunConfig, write_cost_at
from titans.train.evaluate import evaluate
from titans.train.metrics import Logger, MetricsFile, Row, open_loggers, require_loggers
from titans.train.objective import (
    autocast,
    check_gradient,
    check_metrics,
    check_parameters,
    check_segment,
    read_segment,
    split_rows,
)
from titans.train.optim import build_optimizers, schedule, set_learning_rate
from titans.train.processes import (
    ALONE,
    Processes,
    gradient_norm,
    processes,
    spread,
    sum_shares,
    summing,
)
from titans.train.sharded import join_rows, load_sharded, own_memory, save_sharded
from titans.train.signals import StopRequest, stop_request


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended. step: steps taken. finished: False if a signal stopped it before the
    last. metrics: its last row. checkpoint: the newest. first: is this the run's only process,
    or the one of several that speaks for all?"""

    folder: Path
    step: int
    finished: bool
    metrics: Row
    checkpoint: Path
    first: bool = True


def train(
    config: RunConfig, folder: str | Path, resume: bool = True, progress: bool = True
) -> TrainResult:
    """Train a model in `folder`, from the start or from the newest checkpoint there.

    resume: False insists on a new folder. progress: show a bar on stderr, and say how to go on
    where a signal stopped it.

    SIGINT or SIGTERM lets the step finish and writes a checkpoint. Raises ValueError for data or
    a folder that does not fit the config, NonFiniteError for a loss, gradient or memory that is
    no number (the last good checkpoint stays), ImportError for a logger that is not installed.
    """
    folder = Path(folder)
    with thread_count(config.train.threads), ExitStack() as stack:
        device = choose_device(config.train.device)
        here = stack.enter_context(processes(config, device))
        # All that can be refused is tried before the run's folder is made.
        data = open_data(config)
        require_loggers(config.train.log)
        training = new_training(config, device, begun=bool(checkpoints(folder)))
        check_forward(training.model, config)
        check_tokenizer("train.initial_model", training.model.tokenizer, data.tokenizer)

        def begin() -> Path | None:
            if not folder.exists():
                folder.mkdir(parents=True)
            if folder.is_dir():
                stack.enter_context(held(folder))
            return open_run(folder, config, resume)

        start = here.on_first(begin)
        training = resume_training(training, start, config, device, here)
        if start is not None and training.step < config.train.steps:
            check_data(start, training.step, data)
        training.model.gradient_checkpointing = config.train.gradient_checkpointing
        known = None if start is None else read_notes(start / MODEL).get("tokenizer")
        check_tokenizer(f"{folder}: the model", known, data.tokenizer)
        training.model.tokenizer = tokenizer_identity(data.tokenizer)
        file: MetricsFile | None = None
        loggers: list[Logger] = []
        if here.first:
            file = MetricsFile(folder, training.step)
            loggers = [stack.enter_context(closing(file))]
            for logger in open_loggers(config, folder, training.step, progress):
                loggers.append(stack.enter_context(closing(logger)))
        stop = stack.enter_context(stop_request())
        checkpoint = run_steps(training, data, config, folder, loggers, stop, here) or start
    assert checkpoint is not None
    finished = training.step == config.train.steps
    if progress and not finished and here.first:
        print(
            f"stopped after step {training.step}; train with the same config and folder to go "
            f"on from {checkpoint}",
            file=sys.stderr,
        )
    return TrainResult(
        folder=folder,
        step=training.step,
        finished=finished,
        metrics={} if file is None else file.last,
        checkpoint=checkpoint,
        first=here.first,
    )


def resume_training(
    fresh: Training,
    start: Path | None,
    config: RunConfig,
    device: torch.device,
    here: Processes,
) -> Training:
    """The training of this process, from the checkpoint `start` or, without one, `fresh`."""
    if start is not None and is_sharded(start):
        training = spread(fresh, config, here)
        load_sharded(start, training, config.train.accumulate, here)
        return training
    training = fresh if start is None else load_checkpoint(start, config, device)
    if training.memories and not here.alone:
        whole = join_rows(training.memories)
        training.memories = own_memory(whole, config.train.accumulate, here)
    return spread(training, config, here)


def check_data(start: Path, step: int, data: Data) -> None:
    """ValueError unless the last batch before the checkpoint is drawn again as it was."""
    known = last_batch(start)
    if known and known != batch_identity(data.at(step - 1).train.batch(step - 1)):
        raise ValueError(
            f"{start}: the data are not those it was trained on (the batch of step {step} is "
            "another); bring those back, or begin in another folder with its "
            "model.safetensors as train.initial_model"
        )


def new_training(config: RunConfig, device: torch.device, begun: bool = False) -> Training:
    """A fresh model, drawn on the CPU so that every device starts from the same weights. begun:
    there are checkpoints, so that nothing depends on `initial_model` any more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = TitansLM(config.model)
    if config.train.initial_model is not None and not begun:
        (path,) = expand_paths((config.train.initial_model,))
        given = load(path)
        if given.config.hash() != config.model.hash():
            difference = compared(*next(differences(given.config, config.model)))
            raise ValueError(f"{path}: its config is not that of the run's model: {difference}")
        model.load_state_dict(given.state_dict())
        model.tokenizer = given.tokenizer
    model = model.to(device)
    return Training(model=model, optimizers=build_optimizers(model, config.optimizer))


@torch.no_grad()
def check_forward(model: TitansLM, config: RunConfig) -> None:
    """Read one token: what its memories' `impl` or an own rule cannot read is refused now. (Not
    with "compile", which takes long.)"""
    if config.model.memory.impl != "compile":
        device = next(model.parameters()).device
        with autocast(config.train.precision, device.type):
            model(torch.zeros(1, 1, dtype=torch.int64, device=device))


def run_steps(
    training: Training,
    data: Data,
    config: RunConfig,
    folder: Path,
    loggers: list[Logger],
    stop: StopRequest,
    here: Processes = ALONE,
) -> Path | None:
    """Step until the last one or until asked to stop; the newest checkpoint written."""
    steps = config.train.steps
    checkpoint = None
    stopping = training.step == steps
    while not stopping:
        began = time.perf_counter()
        split = data.at(training.step)
        batch = split.train.batch(training.step)
        row = take_step(training, batch, config, here)
        row["tokens_per_s"] = batch.tokens.numel() / (time.perf_counter() - began)
        last = training.step == steps
        if split.valid is not None and due(training.step, config.train.eval_every, last):
            row |= evaluate(training.model, split.valid, config, data.in_bytes, here)
        check_metrics(row)
        for logger in loggers:
            logger.write(row)
        stopping = last or here.any(stop.made)
        if stopping or due(training.step, config.train.checkpoint_every, last):
            check_parameters(training.step, training.model)
            keep = config.train.keep_checkpoints
            training.batch = batch_identity(batch)
            if here.alone:
                checkpoint = save_checkpoint(folder, training, keep)
            else:
                checkpoint = save_sharded(folder, training, keep, here, len(batch.tokens))
    return checkpoint


def take_step(
    training: Training, batch: Batch, config: RunConfig, here: Processes = ALONE
) -> dict[str, int | float]:
    """One optimizer step on one segment of the whole batch; its metrics."""
    model, train, step = training.model, config.train, training.step + 1
    factor = schedule(training.step, train.steps, config.optimizer)
    write_cost = write_cost_at(config, training.step)
    set_learning_rate(training.optimizers, factor)
    model.zero_grad()
    device = next(model.parameters()).device
    own = Batch(*(column.to(device) for column in here.share(batch)))
    parts = split_rows(own, here.parts(len(batch.tokens), train.accumulate))
    past: list[ModelState] | list[None] = training.memories or [None] * len(parts)
    goes_on = (training.step + 1) % config.data.segments > 0  # else the memories are let go
    loss, opened, memories = 0.0, 0.0, []
    read = partial(read_segment, model) if training.reader is None else training.reader
    for part, memory in zip(parts, past, strict=True):
        share = part.tokens.numel() / batch.tokens.numel()
        with summing(training, last=part is parts[-1]):
            segment = read(part, memory, train.precision, train.write_half)
            # The weights are those of the whole batch, so the parts' losses add up to its mean.
            part_loss = (segment.nll * part.weights).sum()
            check_segment(step, model, part_loss, segment.state)
            (here.loss_scale * (part_loss + write_cost * share * segment.charged)).backward()
        loss += part_loss.item()
        opened += share * segment.open.item()
        if goes_on:
            memories.append(carry(segment.state))
    loss, opened = here.total(loss, opened)
    sum_shares(model)
    norm = clip_gradient(step, model, train.clip)
    for optimizer in training.optimizers.values():
        optimizer.step()
    training.step = step
    training.memories = memories
    return {
        "step": step,
        "loss": loss,
        "lr": config.optimizer.learning_rate * factor,
        "grad_norm": norm,
        "open": opened,
    }


def carry(state: ModelState) -> ModelState:
    """A memory for the next step, without its graph.

    Copied: a view would keep all of the segment alive, and a matrix product may round by the
    layout of its operands, which must be that of a memory saved and loaded.
    """
    return state.map(lambda t: t.detach().clone(memory_format=torch.contiguous_format))


def clip_gradient(step: int, model: TitansLM, limit: float) -> float:
    """Scale the whole gradient to a norm of at most `limit` (0: leave it); the norm before."""
    norm = gradient_norm(model)
    check_gradient(step, model, norm)
    if limit:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm.item()


def due(step: int, every: int, last: bool) -> bool:
    """Is it time, at this step? Never if `every` is 0; always, else, at the last step."""
    return every > 0 and (last or step % every == 0)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # of torchrun: a GPU for each process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used ({reason})") from None
    return torch.device(name)


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Within it, PyTorch uses so many CPU threads; 0 changes nothing."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
