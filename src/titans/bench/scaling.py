"""What a training step takes on many processes: bytes held, bytes received, products, seconds.

Formulas over a config; docs/scaling.md is made of them. `tests/distributed` counts what really
travels, and `benchmarks/scaling.py` weighs what a step really keeps.
"""

import math
from dataclasses import dataclass

import torch

from titans.bench.flops import memory_flops, module_flops
from titans.config import MemoryConfig, TitansConfig, has_memory
from titans.distributed import composes
from titans.layers.memory import NeuralMemory
from titans.models.lm import LOGITS, TitansLM

FLOAT = 4  # bytes of a number in weights, states and what processes exchange


@dataclass(frozen=True, kw_only=True)
class Spread:
    """tokens: of a text. rows: texts of the batch. sequence: processes that share a text. shard:
    processes that share the weights (1: DDP)."""

    tokens: int
    rows: int
    processes: int
    sequence: int = 1
    shard: int = 1
    checkpointing: bool = True

    @property
    def slice(self) -> int:
        """Tokens of a row on one process."""
        return self.tokens // self.sequence

    @property
    def own_rows(self) -> float:
        return self.rows * self.sequence / self.processes


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters: all, and those of a block."""

    all: int
    block: int


def count_weights(config: TitansConfig) -> Weights:
    with torch.device("meta"):
        model = TitansLM(config)
    return Weights(model.parameter_count, sum(p.numel() for p in model.blocks[0].parameters()))


def held_bytes(
    config: TitansConfig, spread: Spread, block_bytes: float, weights: Weights
) -> dict[str, float]:
    """What one process holds at most. block_bytes: what a block keeps of a token for its backward
    pass, as measured."""
    tokens = spread.own_rows * spread.slice
    whole = 2 * weights.block + weights.all - config.layers * weights.block
    kept = block_bytes * config.layers
    if spread.checkpointing:
        kept = block_bytes + config.layers * config.dim * FLOAT
    return {
        # Weights, gradients, two moments; and in FSDP the gathered block, the next, the rest.
        "weights": 4 * FLOAT * weights.all / spread.shard
        + (whole * FLOAT if spread.shard > 1 else 0),
        "activations": tokens * kept,
        # Of one piece of the loss: logits, their logarithms, and their gradient.
        "logits": min(tokens * config.vocab_size, LOGITS) * 3 * FLOAT,
    }


def received_bytes(config: TitansConfig, spread: Spread, weights: Weights) -> dict[str, float]:
    """What one process receives in a step (of a text's processes one in the middle)."""
    passes = 2 if spread.checkpointing else 1  # forward passes of a block
    text = 0.0
    if spread.sequence > 1:
        text = config.layers * spread.own_rows * FLOAT * text_numbers(config, spread, passes)
    copies = spread.processes // spread.shard
    if spread.shard > 1:
        # Blocks are gathered forward and backward, the rest once; gradients are scattered.
        moved = 2 * weights.all + config.layers * weights.block
        between = moved * (spread.shard - 1) / spread.shard
        between += 2 * weights.all / spread.shard * (copies - 1) / copies
    else:
        between = 2 * weights.all * (copies - 1) / copies
    return {"text": text, "weights": between * FLOAT}


def text_numbers(config: TitansConfig, spread: Spread, passes: int) -> float:
    """Numbers that a layer receives for one row, forward and backward, and its state at the end."""
    numbers = 0.0
    if config.variant in ("mag", "mal", "sliding", "gated-deltanet-h2"):
        numbers += (passes + 1) * 2 * (config.window - 1) * config.dim
        state = 2 * (config.window - 1 + config.persistent) * config.dim
        numbers += state
    if has_memory(config.variant):
        numbers += memory_numbers(config.memory, spread, passes)
    return numbers


def memory_numbers(memory: MemoryConfig, spread: Spread, passes: int) -> float:
    """Likewise of its memory layer."""
    inner, d, heads = memory.heads * memory.key_dim, memory.key_dim, memory.heads
    others = spread.sequence - 1
    tail = max(memory.conv_width - 1, 0) * 3 * inner
    numbers = float((passes + 1) * tail + tail)
    with torch.device("meta"):
        layer = NeuralMemory(memory)
    shapes = layer.network.shapes(d, d)
    copies = 1 + memory.momentum
    # Weights, momentum and the weights at the chunk's start.
    state = (copies + (memory.chunk_size > 1)) * heads * sum(i * o for i, o in shapes)
    numbers += state
    if composes(layer.network, memory.chunk_size, memory.surprise_limit):
        rows = copies * d
        return numbers + others * heads * (passes * rows * (rows + d) + rows * d)
    share = others / spread.sequence
    sets = memory.depth if memory.per_layer_gates else 1
    decays = {"none": 0, "scalar": sets, "channel": sum(i for i, _ in shapes)}[memory.decay]
    token = 4 * inner + heads * (sets * copies + decays)
    numbers += share * spread.slice * ((passes + 1) * token + passes * heads)
    return numbers + passes * share * state  # of the heads of each, for all


def step_flops(config: TitansConfig, spread: Spread) -> float:
    """Floating point operations of a step, of all processes together."""
    with torch.device("meta"):
        model = TitansLM(config)
    tokens = spread.rows * spread.tokens
    flops = module_flops(model, tokens, spread.tokens)
    if spread.sequence > 1:
        for part in model.modules():
            if isinstance(part, NeuralMemory):
                memory = part.config
                if composes(part.network, memory.chunk_size, memory.surprise_limit):
                    # The slice's map: columns for the values, and for weights and momentum.
                    flops += memory_flops(part, tokens) * (2 + memory.momentum)
    if spread.checkpointing:
        return 4 * flops
    in_pieces = spread.own_rows * spread.slice * config.vocab_size > LOGITS
    return 3 * flops + (2.0 * tokens * config.dim * config.vocab_size if in_pieces else 0.0)


def smallest_sequence(tokens: int, slice_: int, processes: int) -> int:
    """Processes that share a text so that none has more than `slice_` tokens, if there are so
    many."""
    return min(processes, 2 ** math.ceil(math.log2(max(1, tokens / slice_))))
