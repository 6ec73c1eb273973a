"""Random, well-conditioned inputs of the op, and how far two results may lie apart.

Keys have unit norm, and steps and weights are small enough that every trajectory contracts:
rounding errors are then not amplified, and 1e-10 in float64 tells apart right from wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.ops import MemoryNetwork, MemoryOutput, Network, RuleState, neural_memory
from titans.ops.rule import RecentTokens

LINEAR = MemoryNetwork(depth=1, residual=False, norm=False)
MLP = MemoryNetwork(depth=2, expansion=2, residual=False, norm=False)
RESIDUAL = MemoryNetwork(depth=2, expansion=2, residual=True, norm=True)
DEEP = MemoryNetwork(depth=4, expansion=2, activation="silu", residual=True, norm=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `neural_memory`. `tokens` holds what has a time axis (axis 1)."""

    tokens: dict[str, Any]
    state: RuleState
    settings: dict[str, Any]

    def __call__(self, impl: str, **overrides: Any) -> MemoryOutput:
        return neural_memory(
            **self.tokens, state=self.state, impl=impl, **{**self.settings, **overrides}
        )

    @property
    def length(self) -> int:
        return self.tokens["keys"].shape[1]

    def map_tokens(self, function: Callable[[Tensor], Tensor]) -> "Case":
        return replace(self, tokens=each(self.tokens, function))

    def piece(self, start: int, stop: int) -> "Case":
        """Only the tokens start..stop, from the same state."""
        return self.map_tokens(lambda x: x[:, start:stop])

    def rows(self, *indices: int) -> "Case":
        """Only these sequences of the batch."""
        at = list(indices)
        return replace(self.map_tokens(lambda x: x[at]), state=self.state.map(lambda x: x[at]))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Case":
        """`function` on every tensor there is: tokens, state and anchor."""
        return Case(
            tokens=each(self.tokens, function),
            state=self.state.map(function),
            settings=each(self.settings, function),
        )

    def to(self, dtype: torch.dtype) -> "Case":
        return self.map(lambda x: x.detach().to(dtype))

    def set(self, name: str, value: float) -> "Case":
        """A gate held at one value."""
        held = each(self.tokens[name], lambda x: torch.full_like(x, value))
        return replace(self, tokens={**self.tokens, name: held})

    def with_gradients(self) -> tuple["Case", dict[str, Tensor]]:
        """The case on fresh leaves, and those leaves by name."""
        case = self.map(lambda x: x.detach().clone().requires_grad_())
        found: dict[str, Tensor] = {}
        collect(case.tokens, "", found)
        collect(case.settings, "", found)
        for name, tensor in case.state.tensors().items():
            found[f"initial.{name}"] = tensor
        return case, found


def build(
    seed: int = 0,
    *,
    network: Network = LINEAR,
    length: int = 7,
    batch: int = 2,
    heads: int = 2,
    key_dim: int = 4,
    value_dim: int | None = None,
    momentum: bool = False,
    decay: str | None = None,
    per_layer: bool = False,
    anchor: bool = False,
    chunk_size: int = 1,
    offset: int = 0,
    objective: Any = "l2",
    max_surprise: float | None = None,
    block_size: int = 4,
    dtype: torch.dtype = torch.float64,
    **own: Any,
) -> Case:
    """decay: None, "scalar" or "channel". offset: begin inside a chunk, with a base of its own.
    own: window, retention and optimizer of `neural_memory`.

    A state with momentum begins with some, so that a wrong coefficient of S_0 shows; one with a
    window has tokens, of which the first sequence lacks the oldest.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        unit = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * unit).to(dtype)

    value_dim = value_dim or (key_dim if network.residual else key_dim - 1)
    shapes = network.shapes(key_dim, value_dim)
    grid = (batch, length, heads)
    step = 0.5 if network.depth == 1 else 0.1

    def gate(low: float, high: float, channels: bool = False) -> Any:
        def one(size: int) -> Tensor:
            return uniform(low, high, *grid, *([size] if channels else []))

        layered = per_layer or channels  # hidden layers have other widths than the keys
        return [one(i) for i, _ in shapes] if layered else one(0)

    def matrices(scale: float, *leading: int) -> list[Tensor]:
        return [normal(*leading, i, o) * scale * i**-0.5 for i, o in shapes]

    tokens: dict[str, Any] = {
        "queries": normal(*grid, key_dim),
        "keys": F.normalize(normal(*grid, key_dim), dim=-1),
        "values": normal(*grid, value_dim),
        "learning_rate": gate(0.1 * step, step),
    }
    if momentum:
        tokens["momentum"] = gate(0.1, 0.7)
    if decay is not None:
        tokens["decay"] = gate(0.02, 0.4, channels=decay == "channel")
    slots = own["optimizer"].slots if "optimizer" in own else int(momentum)
    weights = tuple(matrices(0.7, batch, heads))
    past = [tuple(matrices(0.1, batch, heads)) for _ in range(slots)]
    state = RuleState(
        weights=weights,
        momentum=sum(past, ()) or None,
        base=None,
        offset=offset,
    )
    if chunk_size > 1:
        base = tuple(matrices(0.7, batch, heads)) if offset else state.weights
        state = replace(state, base=base)
    before = len(own.get("window", (1.0,))) - 1
    if before:
        recent = RecentTokens(
            keys=F.normalize(normal(batch, heads, before, key_dim), dim=-1),
            values=normal(batch, heads, before, value_dim),
            present=torch.ones(batch, heads, before, dtype=dtype),
        )
        recent.present[0, :, 0] = 0.0
        state = replace(state, recent=recent)
    return Case(
        tokens=tokens,
        state=state,
        settings={
            "network": network,
            "objective": objective,
            "chunk_size": chunk_size,
            "block_size": block_size,
            "max_surprise": max_surprise,
            "anchor": matrices(0.5, heads) if anchor else None,
            **own,
        },
    )


def results(output: MemoryOutput) -> dict[str, Tensor]:
    """Output, surprise and every tensor of the final state, by name."""
    final = {f"state.{name}": tensor for name, tensor in output.state.tensors().items()}
    return {"output": output.output, "surprise": output.surprise, **final}


def gradients(
    case: Case, impl: str, backend: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`results`, and d(a weighted sum of output and final state) / d(every input).

    backend: of torch.compile; None runs eagerly.
    """
    case, leaves = case.with_gradients()
    call = torch.compile(case, dynamic=False, backend=backend) if backend else case
    result = results(call(impl))
    parts = {name: tensor for name, tensor in result.items() if name != "surprise"}
    return result, pull_back(parts, leaves)


def pull_back(parts: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random sum of everything in `parts`."""
    generator = torch.Generator().manual_seed(1)
    # Drawn in float64 whatever the precision: a seed gives other numbers in float32.
    weights = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for t in parts.values()
    ]
    loss = torch.stack([(t * w).sum() for t, w in zip(parts.values(), weights, strict=True)]).sum()
    slopes = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, slopes, strict=True))


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    """Every tensor within `tolerance` of its own largest entry (of 0.01 where that is smaller)."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got = actual[name]
        assert got.shape == wanted.shape, name
        if wanted.numel() == 0:
            continue
        assert torch.isfinite(got).all(), f"{name} is not finite"
        error = (got.double() - wanted.double()).abs().max().item()
        scale = max(wanted.abs().max().item(), 1e-2)
        assert error <= tolerance * scale, f"{name}: {error:.1e} with entries up to {scale:.1e}"


def each(node: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` on every tensor of nested dicts and lists; what is shared stays shared."""
    if isinstance(node, Tensor):
        return function(node)
    if isinstance(node, dict):
        return {key: each(child, function) for key, child in node.items()}
    if isinstance(node, list):
        return [each(child, function) for child in node]
    return node


def collect(node: Any, path: str, found: dict[str, Tensor]) -> None:
    if isinstance(node, Tensor):
        found[path] = node
    elif isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            collect(child, f"{path}.{key}" if path else str(key), found)


def join(outputs: Sequence[MemoryOutput]) -> MemoryOutput:
    """Consecutive pieces of one stream as one result."""
    return MemoryOutput(
        torch.cat([o.output for o in outputs], 1),
        outputs[-1].state,
        torch.cat([o.surprise for o in outputs], 1),
    )
