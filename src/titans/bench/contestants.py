"""What is run: a contestant is a name and JSON settings, from which any process can build it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.bench import rivals
from titans.bench.flops import attention_flops, module_flops, useful_flops
from titans.config import MemoryConfig, TitansConfig, build
from titans.layers.attention import SlidingWindowAttention
from titans.layers.memory import NeuralMemory
from titans.models.baselines.transformer import TransformerMixer
from titans.models.lm import TitansLM
from titans.ops import MemoryNetwork, RuleState, neural_memory
from titans.ops.tokens import unit_norm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """impl: its name in the table. kind: a key of BUILDERS. settings: its arguments, exactly."""

    impl: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    length: int
    batch: int = 1
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        return self.batch * self.length


class Steps(NamedTuple):
    """forward: without gradients. train: forward and backward, to inputs and parameters.

    flops: useful operations of one forward, or None where they are not counted.
    """

    forward: Callable[[], Tensor]
    train: Callable[[], Tensor]
    flops: float | None
    parameters: int


def make_steps(contestant: Contestant) -> Steps:
    """Build it, with seeded random weights and inputs."""
    torch.manual_seed(0)
    return BUILDERS[contestant.kind](contestant)


def op_steps(contestant: Contestant) -> Steps:
    """The bare rule: unit keys and queries, theta < 0.05, eta 0.3 to 0.7, alpha < 0.02.

    Gradients go to queries, keys, values, every gate and the initial weights.
    """
    s = contestant.settings
    depth, heads, size, chunk = s["depth"], s["heads"], s["key_dim"], s["chunk_size"]
    exact = depth == 1 and chunk == 1
    network = MemoryNetwork(
        depth=depth, expansion=s["expansion"], residual=not exact, norm=not exact
    )
    shape = (contestant.batch, contestant.length, heads)
    device, dtype = contestant.device, DTYPES[contestant.dtype]
    q, k = (unit_norm(torch.randn(*shape, size, device=device)).to(dtype) for _ in range(2))
    v = torch.randn(*shape, size, device=device).to(dtype)
    theta, eta, alpha = (
        low + (high - low) * torch.rand(*shape, device=device)
        for low, high in ((0.0, 0.05), (0.3, 0.7), (0.0, 0.02))
    )
    weights = [
        torch.randn(heads, i, o, device=device) * i**-0.5 for i, o in network.shapes(size, size)
    ]
    inputs = [q, k, v, theta, alpha, *weights]
    if s["momentum"]:
        inputs.append(eta)
    for x in inputs:
        x.requires_grad_()

    def run() -> Tensor:
        state = RuleState.init(weights, contestant.batch, momentum=s["momentum"], chunk_size=chunk)
        return neural_memory(
            q,
            k,
            v,
            theta,
            state=state,
            network=network,
            momentum=eta if s["momentum"] else None,
            decay=alpha,
            chunk_size=chunk,
            impl=s.get("impl", "auto"),
            precision=s.get("precision", "float32"),
        ).output

    flops = useful_flops(
        tokens=contestant.tokens,
        heads=heads,
        key_dim=size,
        expansion=s["expansion"],
        depth=depth,
        chunk_size=MemoryConfig().block_size if exact else chunk,
        momentum=s["momentum"],
        exact=exact,
    )
    return Steps(*forward_and_train(run, inputs), flops, 0)


def layer_steps(contestant: Contestant) -> Steps:
    layer = NeuralMemory(build(MemoryConfig, contestant.settings))
    flops = module_flops(layer, contestant.tokens, contestant.length)
    return sequence_steps(contestant, layer, layer.config.dim, lambda x: layer(x)[0], flops)


def titans_pytorch_steps(contestant: Contestant) -> Steps:
    """Its flops are the same rule's: gradients at the boundary of every `batch_size` tokens."""
    s = contestant.settings
    layer = rivals.titans_pytorch_memory(s)
    linear = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    rule = useful_flops(
        tokens=contestant.tokens,
        heads=s["heads"],
        key_dim=s["dim_head"],
        expansion=int(s["default_model_kwargs"]["expansion_factor"]),
        depth=s["default_model_kwargs"]["depth"],
        chunk_size=s["batch_size"],
        momentum=s["momentum"],
    )
    flops = 2.0 * linear * contestant.tokens + rule
    return sequence_steps(contestant, layer, s["dim"], lambda x: layer(x)[0], flops)


def attention_layer_steps(contestant: Contestant) -> Steps:
    """Full causal attention, or a sliding window where the settings name one."""
    s = contestant.settings
    dim, window = s["dim"], s.get("window")
    layer: Any
    if window is None:
        layer = TransformerMixer(TitansConfig(variant="transformer", dim=dim, heads=s["heads"]))
        state = layer.init_state(contestant.batch)
    else:
        layer = SlidingWindowAttention(dim, s["heads"], window, 10_000.0)
        state = layer.init_state(torch.zeros(contestant.batch, 0, dim))
    state = state.to(contestant.device).map(lambda t: t.detach().to(DTYPES[contestant.dtype]))
    seen = min(window or contestant.length, contestant.length)
    flops = 2.0 * 4 * dim * dim * contestant.tokens
    flops += attention_flops(dim, seen, contestant.length, contestant.tokens)
    return sequence_steps(contestant, layer, dim, lambda x: layer(x, state)[0], flops)


def titans_steps(contestant: Contestant) -> Steps:
    model = TitansLM(build(TitansConfig, contestant.settings))
    flops = module_flops(model, contestant.tokens, contestant.length)
    return model_steps(contestant, model, lambda x: model(x)[0], flops)


def transformer_steps(contestant: Contestant) -> Steps:
    model = rivals.transformer(build(TitansConfig, contestant.settings))
    flops = module_flops(model, contestant.tokens, contestant.length)
    full = attention_flops(
        model.config.dim, contestant.length, contestant.length, contestant.tokens
    )
    flops += model.config.layers * full
    return model_steps(contestant, model, lambda x: model(x)[0], flops)


def mamba2_steps(contestant: Contestant) -> Steps:
    model = rivals.mamba2(contestant.settings)
    return model_steps(contestant, model, lambda x: model(x).logits, None)


def qwen3_next_steps(contestant: Contestant) -> Steps:
    model = rivals.qwen3_next(contestant.settings)
    return model_steps(contestant, model, lambda x: model(x).logits, None)


def package_layer_steps(contestant: Contestant) -> Steps:
    """A layer of another package: its module, class, width and arguments are the settings."""
    s = contestant.settings
    layer = getattr(importlib.import_module(s["module"]), s["class"])(**s["arguments"])

    def call(x: Tensor) -> Tensor:
        output = layer(x)
        return output if isinstance(output, Tensor) else output[0]

    return sequence_steps(contestant, layer, s["dim"], call, None)


BUILDERS: dict[str, Callable[[Contestant], Steps]] = {
    "op": op_steps,
    "layer": layer_steps,
    "titans-pytorch": titans_pytorch_steps,
    "attention layer": attention_layer_steps,
    "package layer": package_layer_steps,
    "titans": titans_steps,
    "transformer": transformer_steps,
    "mamba2": mamba2_steps,
    "qwen3-next": qwen3_next_steps,
}


def sequence_steps(
    contestant: Contestant,
    layer: nn.Module,
    dim: int,
    call: Callable[[Tensor], Tensor],
    flops: float | None,
) -> Steps:
    """A layer on a random (B, T, dim) sequence whose gradient is asked for too."""
    dtype = DTYPES[contestant.dtype]
    layer.to(device=contestant.device, dtype=dtype)
    x = torch.randn(contestant.batch, contestant.length, dim, device=contestant.device).to(dtype)
    x.requires_grad_()
    inputs = [x, *layer.parameters()]
    return Steps(*forward_and_train(lambda: call(x), inputs), flops, parameter_count(layer))


def model_steps(
    contestant: Contestant,
    model: nn.Module,
    call: Callable[[Tensor], Tensor],
    flops: float | None,
) -> Steps:
    """A language model on random tokens; training is the mean cross-entropy of the next one."""
    model.to(contestant.device).train()
    shape = (contestant.batch, contestant.length + 1)
    tokens = torch.randint(0, 256, shape, device=contestant.device)
    enabled = contestant.dtype != "float32"

    def logits() -> Tensor:
        kind = contestant.device.partition(":")[0]
        with torch.autocast(kind, dtype=DTYPES[contestant.dtype], enabled=enabled):
            return call(tokens[:, :-1])

    def loss() -> Tensor:
        return F.cross_entropy(logits().float().transpose(1, 2), tokens[:, 1:])

    forward, _ = forward_and_train(logits, [])
    _, train = forward_and_train(loss, list(model.parameters()))
    return Steps(forward, train, flops, parameter_count(model))


def forward_and_train(
    run: Callable[[], Tensor], inputs: list[Any]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The two timed calls. Gradients are dropped after each training step.

    The gradient that comes from above is random and drawn once: a constant one would be
    cancelled by a LayerNorm. The first call checks that what is timed is finite.
    """
    above: list[Tensor] = []

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    def train() -> Tensor:
        output = run()
        if not above:
            if not torch.isfinite(output).all():
                raise ValueError("the output is not finite")
            above.append(torch.randn_like(output))
        output.backward(above[0])
        for x in inputs:
            x.grad = None
        return output.detach()

    return forward, train


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
