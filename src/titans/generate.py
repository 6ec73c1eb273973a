"""Inference: prefill, decode one token, generate, and stream a text of any length.

All of it is `model(tokens, state)`; nothing here keeps a hidden cache.
"""

import operator
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from titans.models.lm import TitansLM
from titans.state import ModelState, NonFiniteError

PIECE = 2048


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. The filters apply in the order of the fields."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = None
    """Keep the fewest tokens whose probabilities sum to at least p."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the most likely one."""
    seed: int | None = None
    """Prompt i of a batch draws from its own generator, seeded with seed + i, so its text
    does not depend on the other prompts. None draws a fresh seed."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {value}")


class Generated(NamedTuple):
    """tokens: the new tokens of every prompt, without the stop sequence.
    states: for every prompt, what the model remembers after the last token it was fed; the
    final new token is not among them (it was drawn, not read)."""

    tokens: list[list[int]]
    states: list[ModelState]


class Reading(NamedTuple):
    """One piece of a streamed text.

    tokens: (B, T). nll: (B, T) nats, -log p(token | all before it); NaN for a stream's very
    first token. surprise, learning_rate: (B, T, memories), means over heads; memories is the
    number of blocks with one. logits: (B, V) after the piece. state: likewise.
    """

    tokens: Tensor
    nll: Tensor
    surprise: Tensor
    learning_rate: Tensor
    logits: Tensor
    state: ModelState


@torch.no_grad()
def prefill(
    model: TitansLM,
    tokens: Int[Tensor, "b t"],
    state: ModelState | None = None,
    write: bool = True,
) -> tuple[Float[Tensor, "b v"], ModelState]:
    """Read a prompt, piece by piece in constant memory; logits of the token after it.

    The head is computed at the end alone: with a small model that is half of the time of `stream`.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be of shape (B, T), got {tuple(tokens.shape)}")
    output = None
    for start in range(0, max(tokens.shape[1], 1), PIECE):
        output = model.hidden(tokens[:, start : start + PIECE], state, write)
        state = output.state
    assert output is not None
    return model.head(output.hidden[:, -1]), output.state


@torch.no_grad()
def decode_one(
    model: TitansLM, token: Int[Tensor, " b"], state: ModelState, write: bool = True
) -> tuple[Float[Tensor, "b v"], ModelState]:
    """Read one token a row; logits of the next. The cost does not depend on the position."""
    logits, state = model(token[:, None], state, write)
    return logits[:, -1], state


def generate(
    model: TitansLM,
    prompts: Sequence[Sequence[int]] | Int[Tensor, "b t"],
    max_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop: Sequence[Sequence[int]] = (),
    state: ModelState | None = None,
) -> Generated:
    """Continue every prompt by at most `max_tokens` tokens.

    prompts: lists of token ids, of any lengths; prompts of one length run as one batch.
    stop: token sequences that end a text. state: what the model has read before the prompt
    (batch 1, or one row a prompt); it is not modified.

    Raises ValueError for an empty prompt or list, a token outside the vocabulary, or a stop
    sequence without tokens.
    """
    try:
        rows = [[operator.index(t) for t in row] for row in prompts]
    except TypeError:
        raise ValueError("prompts must be token ids, one list or row a prompt") from None
    check_prompts(rows, max_tokens)
    if any(len(s) == 0 for s in stop):
        raise ValueError("a stop sequence is empty: expected at least one token")
    sampling = sampling or Sampling()
    tokens: list[list[int]] = [[] for _ in rows]

    def take(index: int, token: int) -> bool:
        tokens[index].append(token)
        hit = next((s for s in stop if tokens[index][-len(s) :] == list(s)), None)
        if hit is not None:
            del tokens[index][-len(hit) :]
        return hit is None

    seeds = seeds_of(sampling, rows)
    states = continue_prompts(
        model, rows, max_tokens, sampling, seeds, take, state=state, keep=True
    )
    return Generated(tokens, states)


def continue_prompts(
    model: TitansLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    take: Callable[[int, int], bool],
    *,
    state: ModelState | None = None,
    vocabulary: int | None = None,
    write: bool = True,
    keep: bool = False,
) -> list[ModelState]:
    """Read every prompt and draw what follows it, those of one length side by side.

    take: given the number of a prompt and each token drawn for it; False ends its text.
    vocabulary: tokens from this one on are not drawn. keep: return what the model remembers of
    each prompt and its text, but for the last token of it; else nothing is kept or returned.
    """
    device = next(model.parameters()).device
    states: dict[int, ModelState] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        group = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        batch = torch.tensor([list(prompts[i]) for i in group], device=device)
        past = None if state is None else select_rows(state, group, len(prompts))

        def of_group(row: int, token: int, group: list[int] = group) -> bool:
            return take(group[row], token)

        found = continue_rows(
            model,
            *prefill(model, batch, past, write),
            max_tokens,
            sampling,
            [seeds[i] for i in group],
            of_group,
            vocabulary=vocabulary,
            write=write,
            keep=keep,
        )
        states |= zip(group, found, strict=False)
    return [states[i] for i in range(len(states))]


def continue_rows(
    model: TitansLM,
    logits: Float[Tensor, "b v"],
    state: ModelState,
    max_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    take: Callable[[int, int], bool],
    *,
    vocabulary: int | None = None,
    write: bool = True,
    keep: bool = False,
) -> list[ModelState]:
    """`continue_prompts` of what was read already: logits and state are those after it."""
    generators = [torch.Generator(logits.device).manual_seed(seed) for seed in seeds]
    rows = list(range(len(seeds)))
    states: dict[int, ModelState] = {}
    for left in reversed(range(max_tokens)):
        drawn = sample(logits[:, :vocabulary], sampling, [generators[row] for row in rows])
        said = zip(rows, drawn.tolist(), strict=True)
        going = [place for place, (row, token) in enumerate(said) if take(row, token) and left]
        ended = sorted({*range(len(rows))} - {*going})
        if keep:
            states |= {rows[place]: select_rows(state, [place], len(rows)) for place in ended}
        if not going:
            break
        if ended:
            state, drawn = select_rows(state, going, len(rows)), drawn[going]
            rows = [rows[place] for place in going]
        logits, state = decode_one(model, drawn, state, write)
    return [states[row] for row in range(len(states))]


def check_prompts(prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """ValueError of `generate`."""
    if not prompts:
        raise ValueError("no prompt given: expected at least one")
    if any(not len(prompt) for prompt in prompts):
        raise ValueError("the prompt is empty: expected at least one token")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")


def seeds_of(sampling: Sampling, prompts: Sequence[Any]) -> list[int]:
    """One for each prompt, see `Sampling.seed`."""
    first = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return [(first + i) % 2**63 for i in range(len(prompts))]


def sample(
    logits: Float[Tensor, "b v"], sampling: Sampling, generators: Sequence[torch.Generator]
) -> Int[Tensor, " b"]:
    """Draw one token a row."""
    if not torch.isfinite(logits).all():
        raise NonFiniteError("the model returned a non-finite logit; its weights are damaged")
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # Relative to the largest, so that the coldest temperature cannot overflow.
    # A temperature that float32 does not have is its smallest.
    scaled = (logits - logits.amax(-1, keepdim=True)).float()
    scaled = scaled / max(sampling.temperature, torch.finfo(torch.float32).tiny)
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        kth = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    if sampling.top_p is not None:
        ordered, order = scaled.softmax(-1).sort(dim=-1, descending=True)
        surplus = ordered.cumsum(-1) - ordered >= sampling.top_p  # enough without this token
        surplus[..., 0] = False
        drop = torch.zeros_like(surplus).scatter(-1, order, surplus)
        scaled = scaled.masked_fill(drop, float("-inf"))
    probabilities = scaled.softmax(-1)
    if sampling.min_p is not None:
        floor = sampling.min_p * probabilities.max(-1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    drawn = [
        torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)


def stream(
    model: TitansLM,
    source: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
    state: ModelState | None = None,
    *,
    piece: int = PIECE,
    write: bool = True,
) -> Iterator[Reading]:
    """Read a text of any length in constant memory, `piece` tokens at a time.

    source: token ids, (T,) or (B, T), as a tensor, an array (also a memory-mapped one), or an
    iterable of such pieces. write=False only reads the memories. How the text is cut into
    pieces does not change what is computed.
    """
    return read_through(read_piece, model, source, state, piece, write)


R = TypeVar("R", bound=tuple[Any, ...])


def read_through(
    read: Callable[[TitansLM, Tensor, ModelState | None, Tensor | None, bool], R],
    model: TitansLM,
    source: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
    state: ModelState | None,
    piece: int,
    write: bool,
) -> Iterator[R]:
    """`read` piece after piece; each goes on from the `state` and `logits` of the one before."""
    if piece < 1:
        raise ValueError(f"piece must be at least 1, got {piece}")
    device = next(model.parameters()).device
    logits: Tensor | None = None
    for tokens in pieces(source, piece):
        reading = read(model, tokens.to(device), state, logits, write)
        state, logits = reading.state, reading.logits  # type: ignore[attr-defined]
        yield reading
    if state is None:
        raise ValueError("the text is empty: expected at least one token")


@torch.no_grad()
def read_piece(
    model: TitansLM,
    tokens: Int[Tensor, "b t"],
    state: ModelState | None,
    logits: Float[Tensor, "b v"] | None,
    write: bool,
) -> Reading:
    """Read some tokens; `logits` are what was predicted for the first of them."""
    output = model.run(tokens, state, write)
    records = [r for r in output.records if r is not None]
    none = tokens.new_zeros(*tokens.shape, 0, dtype=torch.float32)
    return Reading(
        tokens,
        token_nll(tokens, output.logits, logits),
        torch.stack([r.surprise.mean(-1) for r in records], -1) if records else none,
        torch.stack([r.learning_rate.mean(-1) for r in records], -1) if records else none,
        output.logits[:, -1],
        output.state,
    )


def token_nll(
    tokens: Int[Tensor, "b t"],
    logits: Float[Tensor, "b t v"],
    before: Float[Tensor, "b v"] | None,
) -> Float[Tensor, "b t"]:
    """Nats of every token, from the logits after each; `before`: those ahead of the first."""
    first = logits[:, :1] * float("nan") if before is None else before[:, None]
    predicted = torch.cat([first, logits[:, :-1]], 1).float()
    return F.cross_entropy(predicted.transpose(1, 2), tokens, reduction="none")


def pieces(
    source: Tensor | np.ndarray | Iterable[Tensor | np.ndarray], piece: int
) -> Iterator[Int[Tensor, "b t"]]:
    """(B, T) int64 tensors of at most `piece` tokens; a memory map is read as it goes."""
    parts = [source] if isinstance(source, Tensor | np.ndarray) else source
    for part in parts:
        if not isinstance(part, Tensor | np.ndarray):
            raise ValueError(f"expected tensors or arrays of tokens, got {type(part).__name__}")
        floating = part.is_floating_point() if isinstance(part, Tensor) else part.dtype.kind == "f"
        if floating or part.ndim not in (1, 2):
            raise ValueError(
                f"tokens must be integers of shape (T,) or (B, T), got {part.dtype} "
                f"{tuple(part.shape)}"
            )
        for start in range(0, part.shape[-1], piece):
            cut = part[..., start : start + piece]
            tokens = cut if isinstance(cut, Tensor) else torch.from_numpy(cut.astype(np.int64))
            yield tokens.long() if tokens.ndim == 2 else tokens.long()[None]


def select_rows(state: ModelState, rows: list[int], batch_size: int) -> ModelState:
    """The states of some rows of a batch; a batch of one serves any number of rows."""
    held = state.batch_size
    if held == 1:
        return state.map(lambda t: t.expand(len(rows), *t.shape[1:]))
    if held != batch_size:
        raise ValueError(f"the state is for a batch of {held}, expected 1 or {batch_size}")
    return state.map(lambda t: t[rows])
