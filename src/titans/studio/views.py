"""What the page shows of a memory, as JSON: computed by `titans.inspect`, shaped for drawing."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titans.data.tokenizers import Tokenizer
from titans.data.told import Decoder
from titans.inspect import (
    Step,
    distance,
    explain,
    memories,
    moved,
    observe,
    probe,
    reach,
    recall,
    replay,
    without_writing,
)
from titans.models.lm import TitansLM
from titans.serve.reading import plain
from titans.state import ModelState

CURVE_POINTS = 64  # of a recall curve, as far as the tokens between two of them are
CURVE_PIECE = (16, 2048)  # at least and at most so many


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a reader says. text: None where it cannot be asked, and `unavailable` says why."""

    text: str | None = None
    tokens_read: int = 0
    unavailable: str | None = None


def describe_model(name: str, model: TitansLM) -> dict[str, Any]:
    """What the page needs to know of a model."""
    config = model.config.memory
    count = len(memories(model, model.init_state(1)))
    return {
        "name": name,
        "variant": model.config.variant,
        "parameters": model.parameter_count,
        "memories": count,
        "heads": config.heads if count else 0,
        "momentum": config.momentum,
        "chunk": config.chunk_size,
        "decay_target": config.decay_target,
    }


def unavailable(model: TitansLM | None, tokens: np.ndarray) -> str | None:
    """Why a reader cannot be asked about `tokens`, or None."""
    if model is None:
        return "This server has no attention-only model."
    if tokens.size and int(tokens.max()) >= model.config.vocab_size:
        return "It has another vocabulary."
    return None


@torch.no_grad()
def never_written(model: TitansLM, tokens: np.ndarray) -> ModelState:
    """After `tokens`, (n,), without a write: only the last ones that can matter are read."""
    if not tokens.size:
        return model.init_state(1).fork()
    far = reach(model) or len(tokens)
    return without_writing(model, last(tokens, far), len(tokens))


def last(tokens: np.ndarray, count: int) -> np.ndarray:
    """The last tokens as an array that can be written, which a mapped file's cannot."""
    return np.array(tokens[max(0, len(tokens) - count) :])


def curve_piece(length: int) -> int:
    """Tokens between two points of a recall curve over `length`; each piece is read in one go."""
    least, most = CURVE_PIECE
    return min(max(least, -(-length // CURVE_POINTS)), most)


class Probed:
    """Recall of one token, from just after it on, as more is read."""

    def __init__(self, model: TitansLM, before: ModelState, token: int, index: int) -> None:
        one = torch.tensor([[token]])
        self.model, self.index = model, index
        self.pair = probe(model, before, one, 0)
        self.positions: list[int] = []
        self.cosines: list[Tensor] = []
        self.state = before
        self.read(np.array([token]))

    def read(self, tokens: np.ndarray) -> None:
        """Read on, (n,) token ids, and look again."""
        self.state = replay(self.model, tokens, state=self.state)
        self.positions.append(self.state.position)
        self.cosines.append(recall(self.model, self.state, self.pair).cosine[0])

    def as_json(self) -> dict[str, Any]:
        """Per memory and head: theta with which it was written, cosine `then` and `now`, and a
        `curve` at `positions`."""
        table = torch.stack(self.cosines, -1)  # (memories, heads, points)
        rates = self.pair.learning_rate[0]
        return {
            "index": self.index,
            "position": self.pair.position,
            "positions": self.positions,
            "memories": [
                [
                    {
                        "learning_rate": float(rates[m, head]),
                        "then": float(table[m, head, 0]),
                        "now": float(table[m, head, -1]),
                        "curve": table[m, head].tolist(),
                    }
                    for head in range(table.shape[1])
                ]
                for m in range(table.shape[0])
            ],
        }


def changed(model: TitansLM, old: ModelState, new: ModelState) -> dict[str, Any]:
    """How far the weights of two memories are apart, and how far the old ones had moved."""
    return {
        "distance": plain(distance(model, old, new)[0]),
        "moved": plain(moved(model, old)[0]),
    }


def explained(
    model: TitansLM,
    tokenizer: Tokenizer,
    state: ModelState | None,
    tokens: np.ndarray,
    *,
    memory: int | None,
    head: int | None,
    token: int | None,
) -> dict[str, Any]:
    """The writes of `tokens` by one head, and one of them in full.

    memory, head: None is the one with the largest learning rate. token: its place in `tokens`;
    None is the last that the head writes.
    """
    if token is not None and not 0 <= token < len(tokens):
        raise ValueError(f"token must lie in 0..{len(tokens) - 1}, got {token}")
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    if memory is None or head is None:
        memory, head = busiest(model, state, ids, token)
    step = explain(model, state, ids, memory, head)
    rates = torch.stack(step.learning_rate).amax(0)
    if token is None:
        written = torch.nonzero(rates).flatten().tolist()
        token = written[-1] if written else len(tokens) - 1
    decoder = Decoder(tokenizer)
    network = memories(model, model.init_state(1))[memory].layer.network
    told = network.apply(
        [w[token + 1][None, None] for w in step.weights], step.keys[token][None, None, None]
    )
    return {
        "memory": memory,
        "head": head,
        "position": step.position,
        "chunk": step.chunk,
        "tokens": [decoder.feed(int(i)) for i in tokens],
        "learning_rate": plain(rates),
        "surprise": plain(step.surprise),
        "token": token,
        "detail": {
            "key": plain(step.keys[token]),
            "value": plain(step.values[token]),
            "query": plain(step.queries[token]),
            "answer": plain(step.answers[token]),
            "error": plain(step.answers[token] - step.values[token]),
            "error_after": float((told[0, 0, 0] - step.values[token]).norm()),
            "read": plain(step.reads[token]),
            "surprise": float(step.surprise[token]),
            "matrices": [matrix(step, i, token) for i in range(len(step.weights))],
        },
    }


def busiest(
    model: TitansLM, state: ModelState | None, ids: Tensor, token: int | None
) -> tuple[int, int]:
    """Memory and head with the largest learning rate at a token, or anywhere."""
    rates = observe(model, ids, state).learning_rate[0]  # (T, memories, heads)
    if not rates.numel():
        raise ValueError("this model has no memory")
    seen = rates.amax(0)
    if token is not None and rates[token].amax() > 0:
        seen = rates[token]
    best = int(seen.argmax())
    return best // seen.shape[1], best % seen.shape[1]


def matrix(step: Step, i: int, t: int) -> dict[str, Any]:
    """One weight matrix of the memory network at token t, (in, out) as lists of rows.

    before, after: M - M_0. step: what is added, S_t, or without momentum -theta times gradient.
    """
    rate = step.learning_rate[i][t]
    weights, gradient = step.weights[i], step.gradient[i][t]
    past = None if step.past is None else step.past[i]
    return {
        "learning_rate": float(rate),
        "momentum": None if step.momentum is None else float(step.momentum[i][t]),
        "decay": None if step.decay is None else float(step.decay[i][t].mean()),
        "gradient": plain(gradient),
        "past_before": None if past is None else plain(past[t]),
        "past_after": None if past is None else plain(past[t + 1]),
        "step": plain(-rate * gradient if past is None else past[t + 1]),
        "before": plain(weights[t] - step.initial[i]),
        "after": plain(weights[t + 1] - step.initial[i]),
        "change": plain(weights[t + 1] - weights[t]),
    }
