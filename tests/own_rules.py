"""Rules of one's own for the tests: those of the examples, and two networks and optimizers more."""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

import titans
from titans.ops import Network, Optimizer, Retention


def example(name: str) -> ModuleType:
    """A file of examples/ as a module; it registers its parts."""
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


miras, atlas = example("miras"), example("atlas")
POLYNOMIAL = atlas.Polynomial()
MUON = Optimizer(atlas.muon)


class Gated(Network):
    """x + (silu(x W_0) * (x W_1)) W_2: two layers read one input, and their outputs multiply."""

    depth = 3

    def shapes(self, key_dim, value_dim):
        return [(key_dim, 2 * key_dim), (key_dim, 2 * key_dim), (2 * key_dim, value_dim)]

    def forward(self, apply_layer, x):
        y = apply_layer(2, F.silu(apply_layer(0, x)) * apply_layer(1, x))
        return y + x[..., : y.shape[-1]]


GATED = Gated()


def scaled(gradient, theta, eta, past):
    """Two tensors kept, for different ends as in Adam: a mixed-up order shows."""
    first = eta * past[0] + gradient
    second = 0.9 * past[1] + gradient.square()
    return -theta * first / (0.5 + second.square()), (first, second)


SCALED = Optimizer(scaled, slots=2)


def soft_threshold(held, alpha, step, gamma=0.03):
    """The elastic net's (MIRAS, eq. 22): small weights are forgotten altogether."""
    moved = (held if alpha is None else (1 - alpha) * held) + step
    return moved.sign() * (moved.abs() - gamma).clamp(min=0.0)


ELASTIC = Retention(update=soft_threshold)

titans.register("network", "gated", lambda config: GATED)
titans.register("retention", "elastic", ELASTIC)
titans.register("optimizer", "scaled", SCALED)

OMEGA = (1.0, 0.5, 0.25)
SLOPES = {"huber": miras.huber(0.6), "l3": miras.power(3.0), "l1.5": miras.power(1.5)}


def huber_loss(read, value, delta=0.6):
    size = (read - value).square().sum().sqrt()
    return torch.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def power_loss(p):
    return lambda read, value: ((read - value).square() + 1e-6).pow(p / 2).sum()


LOSSES = {"huber": huber_loss, "l3": power_loss(3.0), "l1.5": power_loss(1.5)}
