"""What Titans is compared with: variant -> formula, source, and its settings of the one rule.

Per head, with memory M (key, value): `W` is the memory before the token, `k, v, q` the token's.
Baselines with `memory` are `titans.ops.neural_memory` with these settings, inside the same layer
(`NeuralMemory`) and block as LMM; the others have an op of their own. Whoever wants another rule
takes variant "lmm" and says so in [memory].

Ours and not the sources', for all: the Llama block around the mixer, one RMSNorm gain for all
heads, and initial gates set by the config's half-lives.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """memory: `MemoryConfig` fields that make it what it is; a config that says otherwise is
    refused. starts: where the config leaves a field at its default, it is this instead."""

    formula: str
    source: str
    memory: Mapping[str, Any] = field(default_factory=dict)
    starts: Mapping[str, Any] = field(default_factory=dict)


# A matrix, empty at first, with the gradient of every token and no momentum.
MATRIX = {
    "depth": 1,
    "residual": False,
    "norm": False,
    "chunk_size": 1,
    "momentum": False,
    "decay_target": "zero",
    "learn_initial": False,
    "per_layer_gates": False,
    "max_surprise": 0.0,
}
# x + LN(network(x)), written by the gradients of mini-batches of 16.
MINI_BATCH = MATRIX | {
    "residual": True,
    "norm": True,
    "chunk_size": 16,
    "learn_initial": True,
    "gates": "sigmoid",
    "decay": "none",
}
GATED_DELTA = MATRIX | {"gates": "exponential", "decay": "scalar", "decay_first": True}

BASELINES: dict[str, Baseline] = {
    "transformer": Baseline(
        formula="softmax attention over all tokens so far, rotary positions",
        source="Transformer++ as in Touvron et al., Llama; its cache grows with the text",
    ),
    "sliding": Baseline(
        formula="softmax attention over the last `window` tokens and the persistent ones",
        source="Beltagy et al., Longformer",
    ),
    "linear-attention": Baseline(
        formula="M = W + k v",
        source="Katharopoulos et al., Transformers are RNNs; with SiLU for its feature map and "
        "a norm of the read for its sum of weights, as later linear models have them",
        memory=MATRIX
        | {"objective": "dot", "gates": "constant", "decay": "none", "unit_norm": False},
        starts={"conv_width": 0},
    ),
    "lightning": Baseline(
        formula="M = e^-s W + k v, s fixed per head from 1/32 to 1/512",
        source="Sun et al., RetNet; Qin et al., lightning attention (MiniMax-01), without rotary "
        "positions and without a slower decay in later layers",
        memory=MATRIX
        | {"objective": "dot", "gates": "constant", "decay": "scalar", "unit_norm": False},
        starts={
            "conv_width": 0,
            "half_life_min": 32 * math.log(2.0),
            "half_life_max": 512 * math.log(2.0),
        },
    ),
    "mamba2": Baseline(
        formula="M = e^(-A dt) W + dt k v, y = M q + D v, dt = softplus(.)",
        source="Dao and Gu, Transformers are SSMs, with as many groups as heads",
        memory=MATRIX
        | {
            "objective": "dot",
            "gates": "step",
            "decay": "scalar",
            "unit_norm": False,
            "skip": True,
            "gate_before_norm": True,
        },
        starts={"learning_rate_init": 0.05, "half_life_min": 1.0, "half_life_max": 1024.0},
    ),
    "deltanet": Baseline(
        formula="M = W - b k (k W - v), b = sigmoid(.)",
        source="Yang et al., Parallelizing linear transformers with the delta rule",
        memory=MATRIX | {"gates": "sigmoid", "decay": "none"},
        starts={"learning_rate_init": 0.5},
    ),
    "gated-deltanet": Baseline(
        formula="M = a W - b k (k a W - v), a = e^(-A softplus(.)), b = sigmoid(.)",
        source="Yang et al., Gated delta networks",
        memory=GATED_DELTA,
        starts={"learning_rate_init": 0.5, "half_life_min": 1.0, "half_life_max": 1024.0},
    ),
    "gated-deltanet-h2": Baseline(
        formula="layers of gated-deltanet, every second one sliding attention",
        source="Yang et al., Gated delta networks, H2 without its Mamba2 layers",
        memory=GATED_DELTA,
        starts={"learning_rate_init": 0.5, "half_life_min": 1.0, "half_life_max": 1024.0},
    ),
    "ttt-linear": Baseline(
        formula="M = W - b grad 0.5 |LN(k W') - (v - k)|^2, y = q + LN(q M), W' 16 tokens old "
        "at most",
        source="Sun et al., Learning to (learn at test time); LN without gain and bias, no bias "
        "in the network, unit keys for their 1/dim, and 1/16 for the mean over a mini-batch",
        memory=MINI_BATCH,
        starts={"learning_rate_init": 0.5, "learning_rate_max": 1 / 16},
    ),
    "ttt-mlp": Baseline(
        formula="the same with LN(gelu(k W1) W2)",
        source="as ttt-linear; its base learning rate is 0.1",
        memory=MINI_BATCH | {"depth": 2, "expansion": 4, "activation": "gelu"},
        starts={"learning_rate_init": 0.5, "learning_rate_max": 0.1 / 16},
    ),
    "rwkv7": Baseline(
        formula="M = diag(w) W - (a c) (c W) + k v, c a removal key of unit norm, a its rate",
        source="Peng et al., RWKV-7, without its residual of the first layer's values",
    ),
}


def has_convolution(variant: str) -> bool:
    """Do its queries, keys and values pass a convolution, unless told otherwise? True, without
    meaning, for those that have no memory of ours."""
    return variant not in BASELINES or BASELINES[variant].starts.get("conv_width") != 0
