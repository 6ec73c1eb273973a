"""NeuralMemory: the rule with its projections, gates, output norm and gate."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from titans.config import MemoryConfig
from titans.layers.convolution import CausalConv
from titans.ops import MemoryNetwork, RuleState, neural_memory, read_memory
from titans.ops.api import Gate
from titans.ops.tokens import emit_tokens, mix_tokens, unit_norm
from titans.state import State


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
        self.network = MemoryNetwork(
            depth=config.depth,
            expansion=config.expansion,
            activation=config.activation,
            residual=config.residual,
            norm=config.norm,
        )
        inner = config.heads * config.key_dim
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.conv = CausalConv(3 * inner, config.conv_width) if config.conv_width else None
        self.gates = MemoryGates(config)
        shapes = self.network.shapes(config.key_dim, config.key_dim)
        self.initial = nn.ParameterList(
            nn.Parameter(torch.empty(config.heads, i, o)) for i, o in shapes
        )
        # The read of an empty memory is zero: eps bounds the norm's slope there.
        self.norm = nn.RMSNorm(config.key_dim, eps=1e-5)
        self.output_gate = nn.Linear(config.dim, inner, bias=False) if config.output_gate else None
        self.output = nn.Linear(inner, config.dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """M_0: a linear memory starts empty, a deep one at the scale of its inputs.

        A deep memory needs an output that is not nearly zero: its LayerNorm would multiply
        the inner step by the inverse of that scale.
        """
        for weight in self.initial:
            if self.config.depth == 1:
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if self.config.depth == 1 and self.config.norm:
            nn.init.normal_(self.initial[0], std=self.config.key_dim**-0.5)

    def init_state(self, batch_size: int = 1) -> MemoryState:
        weights = [w if w.dtype == torch.float64 else w.float() for w in self.initial]
        rule = RuleState.init(
            weights,
            batch_size,
            momentum=self.config.momentum,
            chunk_size=self.config.chunk_size,
            zero=self.anchored,
        )
        tail = None if self.conv is None else self.conv.init_tail(batch_size)
        return MemoryState(rule=rule, tail=tail)

    @property
    def anchored(self) -> bool:
        """Does forgetting lead back to M_0? Then the state holds the deviation from it."""
        return self.config.decay != "none" and self.config.decay_target == "initial"

    def anchor(self) -> list[Tensor] | None:
        if not self.anchored:
            return None
        return [w if w.dtype == torch.float64 else w.float() for w in self.initial]

    def forward(
        self, x: Float[Tensor, "b t d"], state: MemoryState | None = None
    ) -> tuple[Float[Tensor, "b t d"], MemoryState]:
        """Write and read every token of x; continue from `state`, or begin at M_0."""
        if not torch.isfinite(x).all():
            raise ValueError("x holds a non-finite number; it would stay in the memory for good")
        y, state, _ = self.run(x, self.init_state(x.shape[0]) if state is None else state)
        return y, state

    def run(
        self, x: Float[Tensor, "b t d"], state: MemoryState, write: bool = True
    ) -> tuple[Float[Tensor, "b t d"], MemoryState, MemoryRecord]:
        """`forward`, with a record of what the memory did.

        write: False reads the memory as it is and leaves it so.
        """
        config = self.config
        if x.ndim != 3 or x.shape[2] != config.dim:
            raise ValueError(f"expected x of shape (B, T, {config.dim}), got {tuple(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError("the sequence is empty: expected T >= 1 tokens")
        self.check_state(state, x.shape[0])
        (q, k, v), seen, tail = self.mix(x, state.tail)
        if not write:
            none = torch.zeros(q.shape[:3], device=x.device)
            read = read_memory(q, state.rule.weights, self.network, self.anchor())
            record = MemoryRecord(none, None, None, none)
            return self.emit(read, x), replace(state, tail=tail), record
        rate, momentum, decay = self.gates(seen)
        result = neural_memory(
            q,
            k,
            v,
            rate,
            state=state.rule,
            network=self.network,
            momentum=momentum,
            decay=decay,
            objective=config.objective,
            chunk_size=config.chunk_size,
            block_size=config.block_size,
            anchor=self.anchor(),
            max_surprise=config.max_surprise,
            impl=config.impl,
            precision=config.precision,
        )
        record = MemoryRecord(
            mean_gate(rate),
            None if momentum is None else mean_gate(momentum),
            None if decay is None else mean_gate(decay),
            result.surprise,
        )
        return self.emit(result.output, x), MemoryState(rule=result.state, tail=tail), record

    def check_state(self, state: MemoryState, batch_size: int) -> None:
        """ValueError for a state of another layer, batch size or precision."""
        if not isinstance(state, MemoryState):
            raise ValueError(f"state must be a MemoryState, got {type(state).__name__}")
        held = state.rule.weights[0].shape[0]
        if held != batch_size:
            raise ValueError(f"the state is for a batch of {held}, got x for {batch_size}")
        wide = torch.float64 if self.initial[0].dtype == torch.float64 else torch.float32
        if state.rule.weights[0].dtype != wide:
            raise ValueError(f"the state is {state.rule.weights[0].dtype}, this layer needs {wide}")
        expected = None
        if self.conv is not None:
            expected = (batch_size, self.conv.width - 1, self.conv.weight.shape[1])
        got = None if state.tail is None else tuple(state.tail.shape)
        if got != expected:
            raise ValueError(f"the state's convolution tail must be {expected}, got {got}")

    def mix(
        self, x: Tensor, tail: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Queries, keys (unit norm) and values, (B, T, H, D); what the gates see; the next tail."""
        if self.config.gate_input == "token":
            parts, tail = self.project(x, self.qkv.weight, tail, unit=2)
            return parts, x, tail
        (q, k, v), tail = self.project(x, self.qkv.weight, tail, unit=0)
        seen = torch.cat([x, *(part.flatten(2).to(x.dtype) for part in (q, k, v))], -1)
        return (unit_norm(q), unit_norm(k), v), seen, tail

    def project(
        self, x: Tensor, weight: Tensor, tail: Tensor | None, *, unit: int
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

    def emit(self, read: Float[Tensor, "b t h v"], x: Tensor) -> Tensor:
        """Normalise per head, gate by the input, project back to the model's width."""
        gate = None if self.output_gate is None else self.output_gate(x)
        y = emit_tokens(read, self.norm.weight, gate, eps=self.norm.eps, impl=self.config.impl)
        return self.output(y.to(x.dtype))

    def init_recall_tail(self, batch_size: int) -> Tensor | None:
        """Tail for a stream of `recall`: the convolution of the queries alone."""
        inner = self.config.heads * self.config.key_dim
        return None if self.conv is None else self.conv.init_tail(batch_size, inner)

    def recall(
        self, x: Float[Tensor, "b t d"], weights: tuple[Tensor, ...], tail: Tensor | None
    ) -> tuple[Float[Tensor, "b t d"], Tensor | None]:
        """M*(x W_Q): read fixed weights without writing (paper v1, eq. 21)."""
        inner = self.config.heads * self.config.key_dim
        (q,), tail = self.project(x, self.qkv.weight[:inner], tail, unit=1)
        return self.emit(read_memory(q, weights, self.network, self.anchor()), x), tail


class MemoryGates(nn.Module):
    """theta (learning rate), eta (momentum) and alpha (forgetting), (B, T, H), from the input.

    Their maps start at zero weight, so that a fresh model's gates are their biases: rates at
    `learning_rate_init`, momentum at `momentum_init`, and half-lives spread over the heads.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        heads, sets = config.heads, config.depth if config.per_layer_gates else 1
        channels = config.key_dim if config.decay == "channel" else 1
        self.sizes = [
            heads * sets,
            heads * sets if config.momentum else 0,
            heads * sets * channels if config.decay != "none" else 0,
        ]
        width = config.dim + (3 * heads * config.key_dim if config.gate_input == "window" else 0)
        # A low-rank map of the decay stands apart: its first half is `squeeze`.
        self.low_rank = config.decay_rank is not None
        self.map = nn.Linear(width, sum(self.sizes[:2] if self.low_rank else self.sizes))
        if config.decay_rank is not None:
            self.squeeze = nn.Linear(width, config.decay_rank, bias=False)
            self.expand = nn.Linear(config.decay_rank, self.sizes[2])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        config = self.config
        nn.init.zeros_(self.map.weight)
        rate = config.learning_rate_init
        if config.gates == "closing":
            rate = (rate + 0.15) / 1.3
        parts = [torch.full((self.sizes[0],), logit(rate))]
        parts.append(torch.full((self.sizes[1],), logit(config.momentum_init)))
        if self.sizes[2]:
            lives = torch.logspace(
                math.log10(config.half_life_min), math.log10(config.half_life_max), config.heads
            )
            forget = math.log(2.0) / lives.double()  # -log(1 - alpha) per token
            # The inverse of softplus at `forget` is also the logit of 1 - exp(-forget).
            bias = torch.log(torch.expm1(forget))
            per_head = self.sizes[2] // config.heads
            # Layout (sets, heads, channels): every set and channel of a head starts alike.
            channels = config.key_dim if config.decay == "channel" else 1
            parts.append(
                bias.float()[None, :, None]
                .expand(per_head // channels, config.heads, channels)
                .reshape(-1)
            )
        with torch.no_grad():
            if self.low_rank:
                self.squeeze.reset_parameters()
                nn.init.zeros_(self.expand.weight)
                self.expand.bias.copy_(parts.pop())
            self.map.bias.copy_(torch.cat(parts))

    def forward(self, x: Float[Tensor, "b t d"]) -> tuple[Gate, Gate | None, Gate | None]:
        """Gates for `titans.ops.neural_memory`, in at least float32."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            raw = linear(self.map, x.to(wide))
            if self.low_rank:
                raw = torch.cat([raw, linear(self.expand, linear(self.squeeze, x.to(wide)))], -1)
        raw_rate, raw_momentum, raw_decay = raw.split(self.sizes, -1)
        if config.gates == "closing":
            theta = (1.3 * torch.sigmoid(raw_rate) - 0.15).clamp(0.0, 1.0)
        else:
            theta = torch.sigmoid(raw_rate)
        eta = torch.sigmoid(raw_momentum) if config.momentum else None
        alpha = self.forgetting(raw_decay, theta) if config.decay != "none" else None
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
        if self.config.gates == "sigmoid":
            return torch.sigmoid(raw)
        log_forget = F.softplus(raw)
        if self.config.tie_forgetting:
            log_forget = log_forget * theta.repeat_interleave(raw.shape[-1] // theta.shape[-1], -1)
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
        sets = config.depth if config.per_layer_gates else 1
        split = rearrange(alpha, "b t (s h c) -> s b t h c", s=sets, h=config.heads)
        if config.depth == 1:
            return split[0]
        return [
            split[layer % sets]
            if layer == 0
            else split[layer % sets].repeat(1, 1, 1, config.expansion)
            for layer in range(config.depth)
        ]


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
