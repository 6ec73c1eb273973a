"""Continuing a prompt, token by token, with what a memory holds."""

import math
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from titans.data.tokenizers import Tokenizer
from titans.data.told import Decoder, Stops
from titans.generate import Sampling, sample
from titans.models.lm import TitansLM
from titans.serve.engine import Engine
from titans.serve.reading import PIECE, piece_size
from titans.state import ModelState


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is to be answered, and how."""

    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...] = ()


class Prompted(NamedTuple):
    """After the prompt: what the model predicts and holds, and nats of every token of it."""

    logits: Tensor
    state: ModelState
    nll: list[float | None]


class Delta(NamedTuple):
    """What one more token adds. token: None at the very end. finish: 'stop' or 'length', last."""

    text: str
    token: int | None
    finish: str | None


async def prompted(
    engine: Engine,
    model: TitansLM,
    state: ModelState,
    prompt: Sequence[int],
    write: bool = True,
) -> Prompted:
    """Read the prompt into a state that nobody keeps; write=False only reads its memories."""
    logits: Tensor | None = None
    nll: list[float | None] = []
    size, start = piece_size(model, PIECE), 0
    while start < len(prompt):
        stop = start + size - state.position % size
        step = await engine.forward(model, prompt[start:stop], state, logits, write=write)
        logits, state, start = step.logits, step.state, stop
        nll += [None if math.isnan(value) else value for value in step.nll.tolist()]
    if logits is None:
        raise ValueError("the prompt is empty: expected at least one token")
    return Prompted(logits, state, nll)


async def answer(
    engine: Engine,
    model: TitansLM,
    tokenizer: Tokenizer,
    start: Prompted,
    ask: Ask,
    write: bool = True,
) -> AsyncIterator[Delta]:
    """Draw tokens until a stop text, an end of document, or `max_tokens`; write as of `prompted`.

    Tokens are those of `titans.generate.generate` with the same sampling.
    """
    seed = secrets.randbits(63) if ask.sampling.seed is None else ask.sampling.seed
    generator = torch.Generator().manual_seed(seed % 2**63)
    decoder, stops = Decoder(tokenizer), Stops(ask.stop)
    logits, state = start.logits, start.state
    for count in range(1, ask.max_tokens + 1):
        # A vocabulary may be padded; what the tokenizer does not know cannot be said.
        known = logits[None, : tokenizer.vocab_size]
        token = int(sample(known, ask.sampling, [generator])[0])
        engine.metrics.tokens_generated += 1
        if token == tokenizer.end_of_document:
            yield Delta(stops.feed(decoder.finish(), last=True), None, "stop")
            return
        text = stops.feed(decoder.feed(token))
        if stops.hit:
            yield Delta(text, token, "stop")
            return
        yield Delta(text, token, None)
        if count < ask.max_tokens:
            step = await engine.forward(model, [token], state, write=write)
            logits, state = step.logits, step.state
    yield Delta(stops.feed(decoder.finish(), last=True), None, "length")


async def whole_answer(
    engine: Engine,
    model: TitansLM,
    tokenizer: Tokenizer,
    state: ModelState,
    prompt: Sequence[int],
    ask: Ask,
    write: bool = True,
) -> str:
    """The text of `answer` to a prompt."""
    start = await prompted(engine, model, state, prompt, write)
    deltas = answer(engine, model, tokenizer, start, ask, write)
    return "".join([delta.text async for delta in deltas])


def seeded(ask: Ask, index: int) -> Ask:
    """For answer `index` of several: its own draws, the same in any company."""
    if ask.sampling.seed is None:
        return ask
    return replace(ask, sampling=replace(ask.sampling, seed=ask.sampling.seed + index))
