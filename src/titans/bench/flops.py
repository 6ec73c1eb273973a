"""How much arithmetic the work itself asks for, whatever an implementation spends on it."""

from torch import nn

from titans.layers.attention import SlidingWindowAttention
from titans.layers.memory import NeuralMemory
from titans.models.mac import MACMixer
from titans.ops import MemoryNetwork


def useful_flops(
    *,
    tokens: int,
    heads: int,
    key_dim: int,
    expansion: int,
    depth: int,
    chunk_size: int,
    momentum: bool,
    exact: bool = False,
) -> float:
    """Floating point operations of the rule's matrix products; two per multiply-add.

    Multiply-adds of one token and head, for layers of sizes (i, o) with P = sum i o (depth 2,
    hidden size F = expansion d: P = 2dF), C tokens in a chunk:

        error signals   k W_1, a W_2, ... and delta W^T of all but the first    2P - i_1 o_1
        read            with W, and with S if there is momentum                 P (+ P)
        state update    of W, and of S if there is momentum                     P (+ P)
        in the chunk    <a_t, a_i>, then times delta_i, causal half only        (C+1)/2 sum(i + o)

    exact: a linear memory with the true per-token gradient, C tokens solved at once. Its errors
    also need k S (P more with momentum), <k_t, k_i> below the diagonal, and the triangular
    solve: (C-1)/2 (i + o).

    The backward asks for twice as many again. Recomputation, masks, activations and gates are not
    useful products. tokens counts every row of the batch.
    """
    shapes = MemoryNetwork(depth=depth, expansion=expansion).shapes(key_dim, key_dim)
    weights = sum(i * o for i, o in shapes)
    widths = sum(i + o for i, o in shapes)
    streams = 2 if momentum else 1  # W, and S
    errors = float(2 * weights - shapes[0][0] * shapes[0][1])
    if exact:
        errors = streams * weights + (chunk_size - 1) / 2 * widths
    per_token = errors + 2 * streams * weights + (chunk_size + 1) / 2 * widths
    return 2.0 * per_token * tokens * heads


def module_flops(module: nn.Module, tokens: int, length: int) -> float:
    """Forward of a layer or model of ours: every linear map, every memory, every attention.

    tokens: of the whole batch; length: of one row, which bounds what a token attends to.
    """
    flops = 0.0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            flops += 2.0 * part.weight.numel() * tokens
        elif isinstance(part, NeuralMemory):
            flops += memory_flops(part, tokens)
        elif isinstance(part, MACMixer):
            flops += recall_flops(part, tokens, length)
        elif isinstance(part, SlidingWindowAttention):
            flops += attention_flops(part.qkv.in_features, min(part.window, length), length, tokens)
    return flops


def recall_flops(mixer: MACMixer, tokens: int, length: int) -> float:
    """What MAC has besides linear maps and memory: attention inside a segment to its tokens and to
    what was recalled before it, one memory token every `stride`; their keys and values; and the
    recall, for which the memory's query, gate and output maps are used a second time."""
    stride, attention, memory = mixer.stride, mixer.attention, mixer.memory

    def seen(size: int) -> int:
        return sum(2 + i + i // stride for i in range(size))  # tokens and memory tokens up to i

    whole, rest = divmod(length, mixer.segment)
    mean = (whole * seen(mixer.segment) + seen(rest)) / length
    dim = attention.qkv.in_features
    flops = 4.0 * dim * mean * tokens
    recalled = tokens / stride
    flops += 2.0 * 2 * dim * dim * recalled
    inner = memory.config.heads * memory.config.key_dim
    flops += 2.0 * inner * dim * tokens
    if memory.output_gate is not None:
        flops += 2.0 * memory.output_gate.weight.numel() * tokens
    shapes = memory.network.shapes(memory.config.key_dim, memory.config.key_dim)
    flops += 2.0 * memory.config.heads * sum(i * o for i, o in shapes) * recalled
    return flops + 2.0 * memory.output.weight.numel() * recalled


def memory_flops(memory: NeuralMemory, tokens: int) -> float:
    """Forward of the rule inside a memory layer, without its projections."""
    config = memory.config
    exact = config.chunk_size == 1 and memory.network.linear
    return useful_flops(
        tokens=tokens,
        heads=config.heads,
        key_dim=config.key_dim,
        expansion=config.expansion,
        depth=config.depth,
        chunk_size=config.block_size if exact else config.chunk_size,
        momentum=config.momentum,
        exact=exact,
    )


def attention_flops(dim: int, window: int, length: int, tokens: int) -> float:
    """Scores and their weighted sum: a token sees itself and at most window - 1 before it."""
    seen = window - window * (window - 1) / 2 / length  # mean over the positions of a row
    return 4.0 * dim * seen * tokens
