"""The update of one memory on real numbers, term by term: what the equations of the rule say."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from titans.inspect.weights import memories, memory_inputs
from titans.layers.memory import MemoryState, NeuralMemory, at_decayed_memory
from titans.models.lm import TitansLM
from titans.ops import RuleState, neural_memory
from titans.ops.api import Gate
from titans.ops.own import weights_of
from titans.state import ModelState


@dataclass(frozen=True, kw_only=True)
class Step:
    """Some tokens written by one head of one memory, in the notation of the rule:

        S_t = momentum_t S_{t-1} - learning_rate_t gradient_t
        M_t = M_{t-1} - decay_t (M_{t-1} - resting) + S_t
        read_t = M_t(query_t)

    Where the rule has no momentum, the second term of S_t alone is added to M.

    position: tokens read before the first. tokens: (T,). chunk: tokens that share the weights
    which their gradients are taken at; offset: how many of them came before the first token.
    A layer with `decay_first` states its rule so that it reads as above; see `at_decayed_memory`.

    queries, keys, values: (T, D). answers: (T, D), what the memory said to the key before, at the
    weights of the gradient: its difference from the value is the error (with objective "l2").
    reads: (T, D). surprise: (T,), as `Observation` has it.

    A tuple has an item for every weight matrix (in, out) of the memory network:
    learning_rate, momentum, decay: (T,), decay per channel (T, in), or None;
    gradient: (T, in, out) of the inner loss; weights: (T + 1, in, out), M before the first token
    and after each; past: likewise S, or None; resting: (in, out), where forgetting leads;
    initial: (in, out), the learned M_0.
    """

    position: int
    memory: int
    head: int
    chunk: int
    offset: int
    tokens: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    answers: Tensor
    reads: Tensor
    surprise: Tensor
    learning_rate: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...] | None
    decay: tuple[Tensor, ...] | None
    gradient: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    past: tuple[Tensor, ...] | None
    resting: tuple[Tensor, ...]
    initial: tuple[Tensor, ...]


@torch.no_grad()
def explain(
    model: TitansLM, state: ModelState | None, tokens: Int[Tensor, "1 t"], memory: int, head: int
) -> Step:
    """What writing `tokens` after `state` does to one head of a memory, token by token.

    The reference form of the rule computes it, from what the layer is given in the model.
    Its size is T times that of the head's weights, so T is best a chunk, or a few dozen tokens.

    Raises ValueError for a memory or head that the model does not have, and for one whose
    retention, optimizer or window is not the rule's own: the equations of `Step` are not theirs.
    """
    if state is None:
        state = model.init_state(1)
    found = memories(model, state)
    if not found:
        raise ValueError("this model has no memories to explain")
    if not 0 <= memory < len(found):
        raise ValueError(f"memory must lie in 0..{len(found) - 1}, got {memory}")
    if not 0 <= head < model.config.memory.heads:
        raise ValueError(f"head must lie in 0..{model.config.memory.heads - 1}, got {head}")
    (_, layer, held), x = found[memory], memory_inputs(model, state, tokens)[memory]
    if layer.retention is not None or layer.optimizer is not None or len(layer.window) > 1:
        raise ValueError(
            "explain knows the rule's own retention, optimizer and window, got "
            f"{', '.join(layer.config.own)}"
        )
    given = given_to_rule(layer, held, x, head)
    initial = [w[head : head + 1] for w in layer.first_weights()]
    anchor = initial if layer.anchored else None
    rule = held.rule.map(lambda w: w[:, head : head + 1])
    states, written = [rule], []
    for t in range(tokens.shape[1]):
        written.append(write(layer, states[-1], given.token(t), anchor))
        states.append(written[-1].state)
    layers, reads = range(layer.network.depth), [one.read for one in written]
    return Step(
        position=state.position,
        memory=memory,
        head=head,
        chunk=layer.config.chunk_size,
        offset=held.rule.offset,
        tokens=tokens[0],
        queries=given.queries[0, :, 0],
        keys=given.keys[0, :, 0],
        values=given.values[0, :, 0],
        answers=torch.cat([one.answer for one in written], 2)[0, 0],
        reads=torch.cat(reads, 1)[0, :, 0],
        surprise=torch.cat([one.surprise for one in written], 1)[0, :, 0],
        learning_rate=tuple(each(given.learning_rate, i) for i in layers),
        momentum=None if rule.momentum is None else tuple(each(given.momentum, i) for i in layers),
        decay=None if given.decay is None else tuple(each(given.decay, i) for i in layers),
        gradient=tuple(torch.cat([one.gradient[i] for one in written])[:, 0] for i in layers),
        weights=tuple(full_weights(states, i, anchor) for i in layers),
        past=None if rule.momentum is None else tuple(past_weights(states, i) for i in layers),
        resting=tuple((torch.zeros_like(w) if anchor is None else w)[0] for w in initial),
        initial=tuple(w[0] for w in initial),
    )


class Given(NamedTuple):
    """What the rule is given for one head: (1, T, 1, D), and gates (1, T, 1[, in])."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    learning_rate: Gate
    momentum: Gate | None
    decay: Gate | None

    def token(self, t: int) -> "Given":
        return Given(*(cut(part, (slice(None), slice(t, t + 1))) for part in self))


class Written(NamedTuple):
    """One token written: the rule's state after it, its read (1, 1, 1, D), surprise (1, 1, 1),
    what the memory had answered to its key (1, 1, 1, D), a gradient (1, 1, in, out) a matrix."""

    state: RuleState
    read: Tensor
    surprise: Tensor
    answer: Tensor
    gradient: list[Tensor]


def given_to_rule(layer: NeuralMemory, held: MemoryState, x: Tensor, head: int) -> Given:
    """As `NeuralMemory.run` gives it, of one head."""
    (queries, keys, values), seen, _ = layer.mix(x, held.tail)
    rate, momentum, decay = layer.gates(seen)
    if layer.config.decay_first:
        assert isinstance(rate, Tensor)
        assert isinstance(decay, Tensor)
        rate, decay, values = at_decayed_memory(rate, decay, values)
    one = (slice(None), slice(None), slice(head, head + 1))
    return Given(*(cut(part, one) for part in (queries, keys, values, rate, momentum, decay)))


def write(
    layer: NeuralMemory, rule: RuleState, given: Given, anchor: list[Tensor] | None
) -> Written:
    """One token, by the reference form."""
    config, network = layer.config, layer.network
    base = rule.weights if rule.offset == 0 or rule.base is None else rule.base
    at = weights_of(base, anchor)
    key, value = (part.transpose(1, 2).to(at[0].dtype) for part in (given.keys, given.values))
    inputs, errors = network.error_signals(at, key, value, layer.objective, config.surprise_limit)
    result = neural_memory(
        *given[:4],
        state=rule,
        network=network,
        momentum=given.momentum,
        decay=given.decay,
        objective=layer.objective,
        chunk_size=config.chunk_size,
        anchor=anchor,
        max_surprise=config.surprise_limit,
        impl="reference",
    )
    surprise = result.surprise
    if config.decay_first:  # of the error at what is left of the memory, as the layer has it
        assert isinstance(given.decay, Tensor)
        surprise = surprise * (1.0 - given.decay)
    gradient = [a.mT @ error for a, error in zip(inputs, errors, strict=True)]
    return Written(result.state, result.output, surprise, network.apply(at, key), gradient)


def cut(part: Any, where: tuple[slice, ...]) -> Any:
    """Some tokens and heads of a tensor, of one a weight matrix, or of nothing."""
    if part is None:
        return None
    return part[where] if isinstance(part, Tensor) else [p[where] for p in part]


def each(gate: Any, matrix: int) -> Tensor:
    """The head's gate (T[, in]) for a weight matrix; the matrices may share it."""
    return (gate if isinstance(gate, Tensor) else gate[matrix])[0, :, 0]


def full_weights(
    states: list[RuleState], matrix: int, anchor: list[Tensor] | None
) -> Float[Tensor, "t _ _"]:
    """M of one head after every state, with the anchor where the states hold the deviation."""
    weights = torch.cat([state.weights[matrix] for state in states])[:, 0]
    return weights if anchor is None else weights + anchor[matrix]


def past_weights(states: list[RuleState], matrix: int) -> Float[Tensor, "t _ _"]:
    """S of one head after every state."""
    return torch.cat([state.momentum[matrix] for state in states if state.momentum])[:, 0]
