"""The training loop: the file to read first, and to change.

    curriculum -> batch -> read it -> loss + cost of writing -> backward -> step

A document may be longer than one step's graph: then its segments are read one a step, and what
the model remembers goes along, without its gradient (truncated backpropagation through time).
A run that is killed and resumed gives the losses of one that was not; on a CPU, bit for bit.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from titans.data.facts import Batch
from titans.models.lm import TitansLM, load
from titans.state import ModelState
from titans.train.batches import Data, open_data
from titans.train.checkpoint import Training, load_checkpoint, open_run, save_checkpoint
from titans.train.config import RunConfig, expand_paths, write_cost_at
from titans.train.evaluate import evaluate
from titans.train.metrics import Logger, MetricsFile, Row, open_loggers, require_loggers
from titans.train.objective import (
    check_gradient,
    check_metrics,
    check_parameters,
    check_segment,
    read_segment,
    split_rows,
)
from titans.train.optim import build_optimizers, schedule, set_learning_rate
from titans.train.signals import StopRequest, stop_request


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended. step: steps taken. finished: False if a signal stopped it before the
    last. metrics: its last row. checkpoint: the newest."""

    folder: Path
    step: int
    finished: bool
    metrics: Row
    checkpoint: Path


def train(
    config: RunConfig, folder: str | Path, resume: bool = True, progress: bool = True
) -> TrainResult:
    """Train a model in `folder`, from the start or from the newest checkpoint there.

    resume: False insists on a new folder. progress: show a bar on stderr.

    SIGINT or SIGTERM lets the step finish and writes a checkpoint. Raises ValueError for data or
    a folder that does not fit the config, NonFiniteError for a loss, gradient or memory that is
    no number (the last good checkpoint stays), ImportError for a logger that is not installed.
    """
    folder = Path(folder)
    with thread_count(config.train.threads), ExitStack() as stack:
        device = choose_device(config.train.device)
        # All that can be refused is tried before the run's folder is made.
        data = open_data(config)
        require_loggers(config.train.log)
        training = new_training(config, device)
        start = open_run(folder, config, resume)
        if start is not None:
            training = load_checkpoint(start, config, device)
        training.model.gradient_checkpointing = config.train.gradient_checkpointing
        file = MetricsFile(folder, training.step)
        loggers: list[Logger] = [stack.enter_context(closing(file))]
        for logger in open_loggers(config, folder, training.step, progress):
            loggers.append(stack.enter_context(closing(logger)))
        stop = stack.enter_context(stop_request())
        checkpoint = run_steps(training, data, config, folder, loggers, stop) or start
    assert checkpoint is not None
    finished = training.step == config.train.steps
    if not finished:
        print(
            f"stopped after step {training.step}; train with the same config and folder to go "
            f"on from {checkpoint}",
            file=sys.stderr,
        )
    return TrainResult(
        folder=folder,
        step=training.step,
        finished=finished,
        metrics=file.last,
        checkpoint=checkpoint,
    )


def new_training(config: RunConfig, device: torch.device) -> Training:
    """A fresh model, drawn on the CPU so that every device starts from the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = TitansLM(config.model)
    if config.train.initial_model is not None:
        (path,) = expand_paths((config.train.initial_model,))
        given = load(path)
        if given.config.hash() != config.model.hash():
            raise ValueError(f"{path}: its config is not that of the run's model")
        model.load_state_dict(given.state_dict())
    model = model.to(device)
    return Training(model=model, optimizers=build_optimizers(model, config.optimizer))


def run_steps(
    training: Training,
    data: Data,
    config: RunConfig,
    folder: Path,
    loggers: list[Logger],
    stop: StopRequest,
) -> Path | None:
    """Step until the last one or until asked to stop; the newest checkpoint written."""
    steps, device = config.train.steps, next(training.model.parameters()).device
    checkpoint = None
    stopping = training.step == steps
    while not stopping:
        began = time.perf_counter()
        split = data.at(training.step)
        batch = Batch(*(column.to(device) for column in split.train.batch(training.step)))
        row = take_step(training, batch, config)
        row["tokens_per_s"] = batch.tokens.numel() / (time.perf_counter() - began)
        last = training.step == steps
        if split.valid is not None and due(training.step, config.train.eval_every, last):
            row |= evaluate(training.model, split.valid, config, data.in_bytes)
        check_metrics(row)
        for logger in loggers:
            logger.write(row)
        stopping = last or stop.made
        if stopping or due(training.step, config.train.checkpoint_every, last):
            check_parameters(training.step, training.model)
            checkpoint = save_checkpoint(folder, training, config.train.keep_checkpoints)
    return checkpoint


def take_step(training: Training, batch: Batch, config: RunConfig) -> dict[str, int | float]:
    """One optimizer step on one segment; its metrics."""
    model, train, step = training.model, config.train, training.step + 1
    factor = schedule(training.step, train.steps, config.optimizer)
    write_cost = write_cost_at(config, training.step)
    set_learning_rate(training.optimizers, factor)
    model.zero_grad()
    parts = split_rows(batch, train.accumulate)
    past: list[ModelState] | list[None] = training.memories or [None] * len(parts)
    loss, opened, memories = 0.0, 0.0, []
    for part, memory in zip(parts, past, strict=True):
        share = len(part.tokens) / len(batch.tokens)
        segment = read_segment(model, part, memory, train.precision)
        # The weights are those of the whole batch, so the parts' losses add up to its mean.
        part_loss = (segment.nll * part.weights).sum()
        check_segment(step, model, part_loss, segment.state)
        (part_loss + write_cost * share * segment.open).backward()
        loss += part_loss.item()
        opened += share * segment.open.item()
        memories.append(carry(segment.state))
    norm = clip_gradient(step, model, train.clip)
    for optimizer in training.optimizers.values():
        optimizer.step()
    training.step = step
    training.memories = memories if step % config.data.segments else []
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
    gradients: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
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
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"train.device {name!r} cannot be used ({reason})") from None
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
