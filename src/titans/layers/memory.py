"""NeuralMemory: the rule with its projections, gates, output norm and gate."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from titans.config import MemoryConfig
from titans.distributed import Peers, neural_memory_sliced
from titans.layers.convolution import CausalConv
from titans.ops import MemoryNetwork, Network, RuleState, neural_memory, read_memory
from titans.ops.api import Gate
from titans.ops.networks import Objective
from titans.ops.tokens import emit_tokens, mix_tokens, unit_norm
from titans.ops.tracing import is_traced
from titans.registry import find
from titans.state import State

# The read of an empty memory is zero: this bounds the slope of the norm after it.
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class MemoryState(State):
    """What one memory layer remembers.

    rule: weights, momentum and the open chunk. tail: last inputs of the convolution.
    """

    rule: RuleState
    tail: Tensor | None

    @classmethod
    def init(cls, layer: "NeuralMemory", batch_size: int = 1) -> "MemoryState":
        """The state before the first token: the layer's learned M_0."""
        return layer.init_state(batch_size)


class MemoryRecord(NamedTuple):
    """What a memory did with each token, (B, T, H); decay and rates are means over channels.

    learning_rate and decay keep their graph, so that a training loss may charge for writing.
    """

    learning_rate: Tensor
    momentum: Tensor | None
    decay: Tensor | None
    surprise: Tensor


class NeuralMemory(nn.Module):
    """A long-term memory that learns while it reads: `y, state = layer(x)`, `layer(x, state)`.

    x, y: (B, T, dim). Writes every token, then reads it. The state is float32 (or float64 in
    a float64 model) whatever the model's dtype. Paper v1, section 3.1.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.network = build_network(config)
        built_in: Any = config.objective
        self.objective: Objective = find("objective", config.objective) or built_in
        self.retention = find("retention", config.retention)
        self.optimizer = find("optimizer", config.optimizer)
        self.window = window_weights(config.window, config.window_decay)
        self.team: Peers | None = None  # who has the other heads, where these are not all
        inner = config.heads * config.key_dim
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        behind = inner if config.key_init == "previous" else 0
        self.conv = CausalConv(3 * inner, config.conv_width, behind) if config.conv_width else None
        self.gates = MemoryGates(config)
        shapes = self.network.shapes(config.key_dim, config.key_dim)
        self.initial = nn.ParameterList(  # M_0; empty where it is not learned but zero
            nn.Parameter(torch.empty(config.heads, i, o))
            for i, o in (shapes if config.learn_initial else [])
        )
        self.norm = nn.RMSNorm(config.key_dim, eps=NORM_EPS)
        self.skip = nn.Parameter(torch.empty(config.heads)) if config.skip else None
        self.output_gate = nn.Linear(config.dim, inner, bias=False) if config.output_gate else None
        self.output = nn.Linear(inner, config.dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """M_0: a linear memory starts empty, a deep one at the scale of its inputs.

        A deep memory needs an output that is not nearly zero: its LayerNorm would multiply
        the inner step by the inverse of that scale.
        """
        for weight in self.initial:
            if self.config.starts_empty:
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if self.skip is not None:
            nn.init.ones_(self.skip)
        if self.config.key_init == "previous":  # the convolution puts them one token behind
            queries, keys, _ = self.qkv.weight.detach().chunk(3)
            keys.copy_(queries)

    def init_state(self, batch_size: int = 1) -> MemoryState:
        before = len(self.window) - 1
        rule = RuleState.init(
            self.first_weights(),
            batch_size,
            momentum=self.config.momentum if self.optimizer is None else self.optimizer.slots,
            chunk_size=self.config.chunk_size,
            zero=self.anchored,
            recent=None if before == 0 else (before, self.config.key_dim, self.config.key_dim),
        )
        tail = None if self.conv is None else self.conv.init_tail(batch_size)
        return MemoryState(rule=rule, tail=tail)

    def first_weights(self) -> list[Tensor]:
        """M_0, (heads, in, out) per layer, in at least float32."""
        if self.config.learn_initial:
            return [w if w.dtype == torch.float64 else w.float() for w in self.initial]
        size, like = self.config.key_dim, self.qkv.weight
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return [like.new_zeros(self.config.heads, size, size, dtype=wide)]

    @property
    def anchored(self) -> bool:
        """Does forgetting lead back to M_0? Then the state holds the deviation from it."""
        config = self.config
        return config.learn_initial and config.decay != "none" and config.decay_target == "initial"

    def anchor(self) -> list[Tensor] | None:
        if not self.anchored:
            return None
        return self.first_weights()

    def forward(
        self, x: Float[Tensor, "b t d"], state: MemoryState | None = None
    ) -> tuple[Float[Tensor, "b t d"], MemoryState]:
        """Write and read every token of x; continue from `state`, or begin at M_0."""
        if not is_traced([x]) and not torch.isfinite(x).all():
            raise ValueError("x holds a non-finite number; it would stay in the memory for good")
        y, state, _ = self.run(x, self.init_state(x.shape[0]) if state is None else state)
        return y, state

    def run(
        self,
        x: Float[Tensor, "b t d"],
        state: MemoryState,
        write: bool = True,
        peers: Peers | None = None,
    ) -> tuple[Float[Tensor, "b t d"], MemoryState, MemoryRecord]:
        """`forward`, with a record of what the memory did.

        write: False reads the memory as it is and leaves it so. peers: x is a slice of a text;
        they hold the others. Then `state` is that before the text, and the one returned counts
        on the last of them.
        """
        config = self.config
        if x.ndim != 3 or x.shape[2] != config.dim:
            raise ValueError(f"expected x of shape (B, T, {config.dim}), got {tuple(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError("the sequence is empty: expected T >= 1 tokens")
        self.check_state(state, x.shape[0])
        (q, k, v), seen, tail = self.mix(x, state.tail, peers)
        if not write:
            none = torch.zeros(q.shape[:3], device=x.device)
            read = self.read(q, state.rule.weights)
            record = MemoryRecord(none, None, None, none)
            return (
                self.emit(self.with_skip(read, v), self.opening(x)),
                replace(state, tail=tail),
                record,
            )
        rate, momentum, decay = self.gates(seen)
        step, target = rate, v
        if config.decay_first:
            assert isinstance(rate, Tensor)
            assert isinstance(decay, Tensor)
            step, decay, target = at_decayed_memory(rate, decay, v)
        rule = neural_memory if peers is None else partial(neural_memory_sliced, peers)
        result = rule(
            q,
            k,
            target,
            step,
            state=state.rule,
            network=self.network,
            momentum=momentum,
            decay=decay,
            objective=self.objective,
            window=self.window,
            retention=self.retention,
            optimizer=self.optimizer,
            chunk_size=config.chunk_size,
            block_size=config.block_size,
            anchor=self.anchor(),
            max_surprise=config.surprise_limit,
            impl=config.impl,
            precision=config.precision,
        )
        surprise = result.surprise
        if config.decay_first:  # of the error a k W - v, not k W - v / a
            surprise = surprise * (1.0 - mean_gate(decay)).detach()
        record = MemoryRecord(
            mean_gate(rate),
            None if momentum is None else mean_gate(momentum),
            None if decay is None else mean_gate(decay),
            surprise,
        )
        y = self.emit(self.with_skip(result.output, v), self.opening(x))
        return y, MemoryState(rule=result.state, tail=tail), record

    def check_state(self, state: MemoryState, batch_size: int) -> None:
        """ValueError for a state of other shapes, another batch size or precision. Two layers whose
        states have one shape are told apart by the config's hash, in `TitansLM`."""
        if not isinstance(state, MemoryState):
            raise ValueError(f"state must be a MemoryState, got {type(state).__name__}")
        held = state.rule.weights[0].shape[0]
        if held != batch_size:
            raise ValueError(f"the state is for a batch of {held}, got x for {batch_size}")
        config = self.config
        shapes = self.network.shapes(config.key_dim, config.key_dim)
        expected_weights = [(batch_size, config.heads, i, o) for i, o in shapes]
        got_weights = [tuple(w.shape) for w in state.rule.weights]
        if got_weights != expected_weights:
            raise ValueError(
                f"the state's weights must have shapes {expected_weights}, got {got_weights}"
            )
        wide = torch.float64 if self.qkv.weight.dtype == torch.float64 else torch.float32
        if state.rule.weights[0].dtype != wide:
            raise ValueError(f"the state is {state.rule.weights[0].dtype}, this layer needs {wide}")
        expected = None
        if self.conv is not None:
            expected = (batch_size, self.conv.width - 1, self.conv.weight.shape[1])
        got = None if state.tail is None else tuple(state.tail.shape)
        if got != expected:
            raise ValueError(f"the state's convolution tail must be {expected}, got {got}")

    def mix(
        self, x: Tensor, tail: Tensor | None, peers: Peers | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Queries, keys (unit norm) and values, (B, T, H, D); what the gates see; the next tail."""
        unit = 2 if self.config.unit_norm else 0
        if self.config.gate_input == "token":
            parts, tail = self.project(x, self.qkv.weight, tail, unit=unit, peers=peers)
            return parts, x, tail
        (q, k, v), tail = self.project(x, self.qkv.weight, tail, unit=0, peers=peers)
        whole = (q, k, v) if self.team is None else (self.team.gather(p, 2) for p in (q, k, v))
        seen = torch.cat([x, *(part.flatten(2).to(x.dtype) for part in whole)], -1)
        return ((unit_norm(q), unit_norm(k), v) if unit else (q, k, v)), seen, tail

    def project(
        self,
        x: Tensor,
        weight: Tensor,
        tail: Tensor | None,
        *,
        unit: int,
        peers: Peers | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Rows of the q, k, v map, convolution and activation: (B, T, H, D) each, `unit` of them
        at unit norm. Fewer channels than the convolution has meet the first of them."""
        config = self.config
        projected = F.linear(x, weight)
        channels = projected.shape[-1]
        kernel = bias = None
        if self.conv is not None:
            assert tail is not None
            kernel, bias = self.conv.weight[:, :channels], self.conv.bias[:channels]
            if peers is not None:
                tail = peers.before(projected, tail, 1)
        parts = mix_tokens(
            projected,
            tail,
            kernel,
            bias,
            parts=channels // (config.heads * config.key_dim),
            heads=config.heads,
            silu=config.qkv_activation == "silu",
            unit=unit,
            impl=config.impl,
        )
        if self.conv is not None and tail is not None:
            tail = self.conv.next_tail(projected, tail)
        return parts, tail

    def opening(self, x: Tensor) -> Tensor | None:
        """What gates the read of these inputs, before its SiLU, (B, T, H D)."""
        return None if self.output_gate is None else self.output_gate(x)

    def emit(self, read: Float[Tensor, "b t h v"], gate: Tensor | None) -> Tensor:
        """Normalise per head, gate, project back to the model's width."""
        if gate is not None and self.config.gate_before_norm:
            read, gate = read * F.silu(gate).unflatten(-1, read.shape[2:]), None
        y = emit_tokens(read, self.norm.weight, gate, eps=NORM_EPS, impl=self.config.impl)
        return self.output(y)

    def with_skip(self, read: Tensor, values: Tensor) -> Tensor:
        """The read, plus the token's own value where the layer has a skip."""
        if self.skip is None:
            return read
        return read + self.skip[:, None].to(values.dtype) * values

    def init_recall_tail(self, batch_size: int) -> Tensor | None:
        """Tail for a stream of `recall`: the convolution of the queries alone."""
        inner = self.config.heads * self.config.key_dim
        return None if self.conv is None else self.conv.init_tail(batch_size, inner)

    def recall_queries(
        self, x: Float[Tensor, "b t d"], tail: Tensor | None
    ) -> tuple[Float[Tensor, "b t h k"], Tensor | None]:
        """x W_Q, to `recall` with, and the next tail."""
        inner = self.config.heads * self.config.key_dim
        if self.conv is not None:
            expected = (x.shape[0], self.conv.width - 1, inner)
            got = None if tail is None else tuple(tail.shape)
            if got != expected:
                raise ValueError(f"the state's tail of queries must be {expected}, got {got}")
        unit = 1 if self.config.unit_norm else 0
        (q,), tail = self.project(x, self.qkv.weight[:inner], tail, unit=unit)
        return q, tail

    def recall(
        self, q: Float[Tensor, "b t h k"], gate: Tensor | None, weights: tuple[Tensor, ...]
    ) -> Float[Tensor, "b t d"]:
        """M*(q): read fixed weights without writing (paper v1, eq. 21); gate: of `opening`."""
        return self.emit(self.read(q, weights), gate)

    def read(self, q: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        return read_memory(q, weights, self.network, self.anchor(), self.retention)


class MemoryGates(nn.Module):
    """theta (learning rate), eta (momentum) and alpha (forgetting), (B, T, H), from the input.

    Their maps start at zero weight, so that a fresh model's gates are their biases: rates at
    `learning_rate_init`, momentum at `momentum_init`, and half-lives spread over the heads.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.part = (0, 1)  # these heads are the first of one part, which is all of them
        inner = config.heads * config.key_dim
        width = config.dim + (3 * inner if config.gate_input == "window" else 0)
        # A low-rank map of the decay stands apart: its first half is `squeeze`.
        self.low_rank = config.decay_rank is not None
        mapped = sum(self.sizes[:2] if self.low_rank else self.sizes)
        self.map = nn.Linear(width, mapped) if mapped else None
        scaled = self.decays and config.gates in ("exponential", "step")
        self.log_scale = nn.Parameter(torch.empty(self.decays)) if scaled else None  # log A
        if config.decay_rank is not None:
            self.squeeze = nn.Linear(width, config.decay_rank, bias=False)
            self.expand = nn.Linear(config.decay_rank, self.sizes[2])
        self.reset_parameters()

    @property
    def sets(self) -> int:
        return self.config.depth if self.config.per_layer_gates else 1

    @property
    def channels(self) -> int:
        """Of a head, each with its own decay."""
        return self.config.key_dim if self.config.decay == "channel" else 1

    @property
    def rates(self) -> int:
        return self.config.heads * self.sets

    @property
    def decays(self) -> int:
        return self.rates * self.channels if self.config.decay != "none" else 0

    @property
    def sizes(self) -> list[int]:
        """Rates, momenta and decays that the input decides."""
        config = self.config
        return [
            0 if config.gates == "constant" else self.rates,
            self.rates if config.momentum else 0,
            0 if config.gates in ("step", "constant") else self.decays,
        ]

    def reset_parameters(self) -> None:
        config = self.config
        rate = logit(config.learning_rate_init)
        if config.gates == "closing":
            rate = logit((config.learning_rate_init + 0.15) / 1.3)
        elif config.gates == "step":
            rate = math.log(math.expm1(config.learning_rate_init))
        parts = [torch.full((self.sizes[0],), rate)]
        parts.append(torch.full((self.sizes[1],), logit(config.momentum_init)))
        if self.sizes[2]:
            # The inverse of softplus at `forget` is also the logit of 1 - exp(-forget).
            parts.append(torch.log(torch.expm1(self.initial_forgetting())).float())
        with torch.no_grad():
            if self.low_rank:
                self.squeeze.reset_parameters()
                nn.init.zeros_(self.expand.weight)
                self.expand.bias.copy_(parts.pop())
            if self.map is not None:
                nn.init.zeros_(self.map.weight)
                self.map.bias.copy_(torch.cat(parts))
            if self.log_scale is not None and config.gates == "step":
                step = config.learning_rate_init
                self.log_scale.copy_(torch.log(self.initial_forgetting() / step))
            elif self.log_scale is not None:
                nn.init.zeros_(self.log_scale)

    def initial_forgetting(self) -> Tensor:
        """-log(1 - alpha) per token, (sets * heads * channels) in float64: half-lives are spread
        over the heads (one head has their geometric mean), and every set and channel of a head
        starts alike."""
        config = self.config
        low, high = math.log10(config.half_life_min), math.log10(config.half_life_max)
        part, parts = self.part
        heads = config.heads * parts
        if heads == 1:
            low = (low + high) / 2
        lives = torch.logspace(low, high, heads).chunk(parts)[part]
        forget = math.log(2.0) / lives.double()
        return forget[None, :, None].expand(self.sets, config.heads, self.channels).reshape(-1)

    def forward(self, x: Float[Tensor, "b t d"]) -> tuple[Gate, Gate | None, Gate | None]:
        """Gates for `titans.ops.neural_memory`, in at least float32."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            raw = x.new_empty(*x.shape[:2], 0, dtype=wide)
            if self.map is not None:
                raw = linear(self.map, x.to(wide))
            if self.low_rank:
                raw = torch.cat([raw, linear(self.expand, linear(self.squeeze, x.to(wide)))], -1)
        raw_rate, raw_momentum, raw_decay = raw.split(self.sizes, -1)
        if config.gates == "closing":
            theta = (1.3 * torch.sigmoid(raw_rate) - 0.15).clamp(0.0, 1.0)
        elif config.gates == "constant":
            theta = raw.new_ones(*raw.shape[:2], self.rates)
        elif config.gates == "step":
            theta = F.softplus(raw_rate)
        else:
            theta = torch.sigmoid(raw_rate)
        eta = torch.sigmoid(raw_momentum) if config.momentum else None
        alpha = self.forgetting(raw_decay, theta) if config.decay != "none" else None
        if config.gates != "step":
            theta = theta * config.learning_rate_limit
        if eta is not None and config.dampen_momentum:
            theta = theta * (1.0 - eta) ** 2
        return (
            self.per_layer(theta),
            None if eta is None else self.per_layer(eta),
            None if alpha is None else self.per_layer_decay(alpha),
        )

    def forgetting(self, raw: Tensor, theta: Tensor) -> Tensor:
        """alpha, (..., sets * heads * channels), from its pre-activation."""
        gates = self.config.gates
        if gates == "sigmoid":
            return torch.sigmoid(raw)
        if gates == "constant":
            fixed = -torch.expm1(-self.initial_forgetting())
            return fixed.to(theta).expand(*theta.shape[:2], -1)
        log_forget = F.softplus(raw) if self.sizes[2] else theta.new_ones(())
        if gates == "step" or (gates == "closing" and self.config.tie_forgetting):
            log_forget = log_forget * theta.repeat_interleave(self.decays // self.rates, -1)
        if self.log_scale is not None:
            log_forget = log_forget * self.log_scale.to(theta.dtype).exp()
        return -torch.expm1(-log_forget)

    def per_layer(self, gate: Tensor) -> Gate:
        """(..., sets * heads) -> (..., heads), one tensor per layer where layers have their own."""
        if not self.config.per_layer_gates:
            return gate
        return list(rearrange(gate, "b t (s h) -> s b t h", s=self.config.depth))

    def per_layer_decay(self, alpha: Tensor) -> Gate:
        """Likewise; channel-wise decay is repeated to the width of the hidden layers."""
        config = self.config
        if config.decay != "channel":
            return self.per_layer(alpha)
        sets = self.sets
        split = rearrange(alpha, "b t (s h c) -> s b t h c", s=sets, h=config.heads)
        if config.depth == 1:
            return split[0]
        return [
            split[layer % sets]
            if layer == 0
            else split[layer % sets].repeat(1, 1, 1, config.expansion)
            for layer in range(config.depth)
        ]


def build_network(config: MemoryConfig) -> Network:
    """The memory network that the config names. ValueError for one of another depth."""
    own = find("network", config.network)
    if own is None:
        return MemoryNetwork(
            depth=config.depth,
            expansion=config.expansion,
            activation=config.activation,
            residual=config.residual,
            norm=config.norm,
        )
    network = own(config)
    if network.depth != config.depth:
        raise ValueError(
            f"network {config.network!r} has {network.depth} weight matrices, "
            f"memory.depth must say so, got {config.depth}"
        )
    return network


def window_weights(size: int, decay: float) -> tuple[float, ...]:
    """Of the newest token first: decay^age, with sum 1."""
    weights = [decay**age for age in range(size)]
    return tuple(weight / sum(weights) for weight in weights)


def at_decayed_memory(
    rate: Float[Tensor, "b t h"], decay: Float[Tensor, "b t h"], values: Float[Tensor, "b t h v"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Learning rate, decay and values with which the rule takes the gradient at what is left of
    a linear memory, a W with a = 1 - alpha, instead of W:

        a W - b k (k a W - v) = a W - (a b) k (k W - v / a)

    a is at least 2^-20, so that the division is safe: a memory of which a millionth is left.
    """
    decay = decay.clamp(max=1.0 - 2.0**-20)
    keep = 1.0 - decay
    return rate * keep, decay, values / keep[..., None]


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the precision of x."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def mean_gate(gate: Gate) -> Tensor:
    """(B, T, H): mean over layers and channels."""
    parts = [gate] if isinstance(gate, Tensor) else list(gate)
    return torch.stack([g.mean(-1) if g.ndim == 4 else g for g in parts]).mean(0)


def logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))
