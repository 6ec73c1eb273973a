"""The memory network M: its forward pass and the analytic gradient of its loss.

M maps a key to a value. Depth 1 is a matrix; deeper ones are MLPs without biases. With
`norm` the output passes a LayerNorm without gain, with `residual` the key is added:

    M(x) = x + LN(... act(x W_1) ... W_L)        (NeurIPS text: depth 2, expansion 4, GELU)

For one token the gradient of the loss with respect to W_l is the outer product
a_l^T delta_l of the layer's input a_l and its error signal delta_l. Those two vectors are all
that any form of the rule needs, so no gradient matrix is ever built, and no autograd runs
inside the memory: it learns under `inference_mode` as well.

A network of one's own need not know its error signals: `Network` has them from autograd.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from titans.ops.tracing import is_transformed

Activation = Literal["gelu", "silu"]
BuiltInObjective = Literal["l2", "dot"]
# Else the slope of a loss: (prediction, target), both (B, H, T, V), -> d loss / d prediction.
Objective = BuiltInObjective | Callable[[Tensor, Tensor], Tensor]
ACTIVATIONS = get_args(Activation)
OBJECTIVES = get_args(BuiltInObjective)

LAYER_NORM_EPS = 1e-5


class Network(ABC):
    """A map of keys to values with `depth` weight matrices: what a memory network has to be.

    `shapes` and `forward` define it, in torch operations that treat every token alone. A subclass
    may also have `error_signals` that are faster than these.
    """

    depth: int

    @abstractmethod
    def shapes(self, key_dim: int, value_dim: int) -> list[tuple[int, int]]:
        """(in, out) of every weight matrix."""

    @abstractmethod
    def forward(self, apply_layer: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
        """M(x), (..., T, V), of x (..., T, K). `apply_layer(l, a)` computes a W_l by whatever
        form the caller has; it is called once for every layer."""

    @property
    def linear(self) -> bool:
        """Is the error linear in the weights, as the exact parallel form needs?"""
        return False

    def apply(
        self, weights: Sequence[Float[Tensor, "*b _ _"]], x: Float[Tensor, "*b t k"]
    ) -> Float[Tensor, "*b t v"]:
        """M(x) with the weights at hand."""
        return self.forward(lambda layer, a: a @ weights[layer], x)

    def error_signals(
        self,
        weights: Sequence[Float[Tensor, "*b _ _"]],
        keys: Float[Tensor, "*b t k"],
        values: Float[Tensor, "*b t v"],
        objective: Objective,
        max_surprise: float | None = None,
    ) -> tuple[list[Float[Tensor, "*b t _"]], list[Float[Tensor, "*b t _"]]]:
        """Inputs a_l and error signals delta_l of every layer; the gradient is a_l^T delta_l.

        `max_surprise` bounds the norm of each token's gradient, layer by layer, by rescaling
        delta_l. Differentiable where autograd is on; works without it, too.
        """
        return bounded(*differentiate(self, weights, keys, values, objective), max_surprise)


@dataclass(frozen=True, kw_only=True)
class MemoryNetwork(Network):
    """Shape of the memory network; its weights are values held elsewhere.

    depth: number of weight matrices, >= 1.
    expansion: hidden size over key size, for depth >= 2.
    activation: between layers. residual: add the key to the output (key size = value size).
    norm: LayerNorm (no gain, no bias) on the last layer's output.
    """

    depth: int = 2
    expansion: int = 4
    activation: Activation = "gelu"
    residual: bool = True
    norm: bool = True

    def __post_init__(self) -> None:
        for name in ("depth", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )

    def shapes(self, key_dim: int, value_dim: int) -> list[tuple[int, int]]:
        """(in, out) of every weight matrix."""
        if self.residual and key_dim != value_dim:
            raise ValueError(
                "a residual memory needs keys and values of one size, got "
                f"{key_dim} and {value_dim}"
            )
        hidden = [key_dim * self.expansion] * (self.depth - 1)
        return list(zip([key_dim, *hidden], [*hidden, value_dim], strict=True))

    @property
    def linear(self) -> bool:
        """Is the error linear in the weights, as the exact parallel form needs?"""
        return self.depth == 1 and not self.norm

    def forward(
        self, apply_layer: Callable[[int, Tensor], Tensor], x: Float[Tensor, "*n k"]
    ) -> Float[Tensor, "*n v"]:
        """M(x), where `apply_layer(l, a)` computes a W_l by whatever form the caller has."""
        a = x
        for layer in range(self.depth):
            z = apply_layer(layer, a)
            a = activate(self.activation, z) if layer < self.depth - 1 else z
        y = layer_norm(a)[0] if self.norm else a
        return x + y if self.residual else y

    def error_signals(
        self,
        weights: Sequence[Float[Tensor, "*b _ _"]],
        keys: Float[Tensor, "*b t k"],
        values: Float[Tensor, "*b t v"],
        objective: Objective,
        max_surprise: float | None = None,
    ) -> tuple[list[Float[Tensor, "*b t _"]], list[Float[Tensor, "*b t _"]]]:
        """As `Network` has them, written out.

        Losses: l2 is 0.5 |M(k) - v|^2, dot is -<M(k), v>.
        """
        inputs, outputs = [keys], []
        for layer in range(self.depth):
            z = inputs[-1] @ weights[layer]
            outputs.append(z)
            if layer < self.depth - 1:
                inputs.append(activate(self.activation, z))

        delta, _, _ = output_error(self, outputs[-1], keys, values, objective)
        deltas = [delta]
        for layer in range(self.depth - 1, 0, -1):
            back = deltas[0] @ weights[layer].transpose(-1, -2)
            deltas.insert(0, back * activation_slope(self.activation, outputs[layer - 1]))
        return bounded(inputs, deltas, max_surprise)


def differentiate(
    network: Network,
    weights: Sequence[Tensor],
    keys: Tensor,
    values: Tensor,
    objective: Objective,
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and error signals of every layer by autograd, whatever mode the caller is in."""
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (*weights, keys, values))
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad():
        if not graph:  # a copy, because autograd refuses what was made in inference mode
            keys, values, *weights = (
                x.clone() if x.is_inference() else x.detach() for x in (keys, values, *weights)
            )

        def apply_layer(layer: int, a: Tensor) -> Tensor:
            if layer in inputs:
                raise ValueError(
                    f"forward of {type(network).__name__} must apply layer {layer} once"
                )
            z = a @ weights[layer]
            inputs[layer] = a
            if not z.requires_grad:
                if is_transformed():
                    raise ValueError(
                        f"{type(network).__name__} inside a transform of torch.func: keys or "
                        "weights must be what it differentiates; built-in networks need no autograd"
                    )
                z.requires_grad_()
            outputs[layer] = z
            return z

        read = network.forward(apply_layer, keys)
        if sorted(inputs) != list(range(network.depth)):
            raise ValueError(
                f"forward of {type(network).__name__} must apply the layers "
                f"0..{network.depth - 1}, it applied {sorted(inputs)}"
            )
        deltas = torch.autograd.grad(
            read,
            [outputs[layer] for layer in range(network.depth)],
            loss_slope(objective, read, values),
            create_graph=graph,
            allow_unused=True,
            materialize_grads=True,
        )
    found = [inputs[layer] for layer in range(network.depth)]
    if graph:
        return found, list(deltas)
    return [a.detach() for a in found], [delta.detach() for delta in deltas]


def loss_slope(objective: Objective, read: Tensor, values: Tensor) -> Tensor:
    """d loss / d read."""
    if objective == "l2":
        return read - values
    if objective == "dot":
        return -values
    slope = objective(read, values)
    if slope.shape != read.shape:
        raise ValueError(
            f"an objective must give a slope of the prediction's shape {tuple(read.shape)}, "
            f"got {tuple(slope.shape)}"
        )
    return slope


def output_error(
    network: MemoryNetwork, z: Tensor, keys: Tensor, values: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Error signal at the last layer's output z, and its LayerNorm: normed, inverse std."""
    normed, inverse_std = layer_norm(z) if network.norm else (z, None)
    if objective == "dot":
        error = -values
    else:
        error = loss_slope(objective, normed + keys if network.residual else normed, values)
    if inverse_std is None:
        return error, normed, None
    return layer_norm_backward(normed, inverse_std, error), normed, inverse_std


def output_error_backward(
    network: MemoryNetwork,
    normed: Tensor,
    inverse_std: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slope: Tensor,
    objective: Objective,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of z, keys (None where there is none) and values, from that of `output_error`."""
    l2 = objective == "l2"
    d_error = slope
    if inverse_std is not None:
        error = -values
        if l2:
            error = normed + error + keys if network.residual else normed + error
        d_error = layer_norm_backward(normed, inverse_std, slope)
    d_keys = d_error if l2 and network.residual else None
    if inverse_std is None:
        return d_error if l2 else torch.zeros_like(d_error), d_keys, -d_error
    # delta = r (e - mean(e) - n mean(e n)) depends on n and r as well as on e.
    of_error = (error * normed).mean(-1, keepdim=True)
    of_slope = (slope * normed).mean(-1, keepdim=True)
    d_normed = (slope * of_error + error * of_slope) * -inverse_std
    if l2:
        d_normed = d_normed + d_error
    # <slope, delta> / r, and dr/dz = -r^2 n / D
    d_std = (error * d_error).sum(-1, keepdim=True)
    d_z = layer_norm_backward(normed, inverse_std, d_normed)
    return d_z - normed * (d_std * inverse_std / normed.shape[-1]), d_keys, -d_error


def bounded(
    inputs: list[Tensor], deltas: list[Tensor], limit: float | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Error signals with `bound_gradient` in every layer, where there is a limit."""
    if limit is not None:
        deltas = [bound_gradient(a, d, limit) for a, d in zip(inputs, deltas, strict=True)]
    return inputs, deltas


def bound_gradient(a: Tensor, delta: Tensor, limit: float) -> Tensor:
    """Scale delta so that |a^T delta| = |a| |delta| <= limit; smaller ones are untouched."""
    squared = a.square().sum(-1, keepdim=True) * delta.square().sum(-1, keepdim=True)
    # The added constant keeps the square root's slope finite at zero.
    return delta * (limit / (squared + 1e-30).sqrt().clamp(min=limit))


def bound_gradient_backward(
    a: Tensor, bound: Tensor, free: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of delta and a, from that of `bound_gradient`. `free` is delta, `bound` the result.

    Where the two differ, the result is limit / |a| long and points where delta does.
    """
    length = free.square().sum(-1, keepdim=True)
    left = (bound * free).sum(-1, keepdim=True) / length
    along = (slope * free).sum(-1, keepdim=True)
    d_free = left * (slope - free * (along / length))
    d_a = a * (-left * along / a.square().sum(-1, keepdim=True))
    return torch.where(left < 1, d_free, slope), torch.where(left < 1, d_a, 0.0)


def activate(name: Activation, z: Tensor) -> Tensor:
    return F.gelu(z) if name == "gelu" else F.silu(z)


def activation_slope(name: Activation, z: Tensor) -> Tensor:
    """Derivative of `activate` at z, itself differentiable."""
    if name == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5)))
        return cdf + z * torch.exp(-0.5 * z * z) * (1.0 / math.sqrt(2.0 * math.pi))
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1.0 + z * (1.0 - sigmoid))


def activation_curvature(name: Activation, z: Tensor) -> Tensor:
    """Second derivative of `activate` at z."""
    if name == "gelu":
        density = torch.exp(z.square().mul_(-0.5)).mul_(1.0 / math.sqrt(2.0 * math.pi))
        return density.mul_(2.0 - z.square())
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1.0 - sigmoid) * (2.0 + z * (1.0 - 2.0 * sigmoid))


def layer_norm_backward(normed: Tensor, inverse_std: Tensor, slope: Tensor) -> Tensor:
    """Gradient of z, from that of LayerNorm(z)."""
    centred = slope - slope.mean(-1, keepdim=True)
    return inverse_std * (centred - normed * (slope * normed).mean(-1, keepdim=True))


def layer_norm(z: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm without gain, and the inverse standard deviation its backward needs."""
    centred = z - z.mean(-1, keepdim=True)
    inverse_std = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
    return centred * inverse_std, inverse_std
