"""RWKV-7's memory: decay per channel, and a removal key apart from the key that is written.

Per head, with M (K, V), w the decay per channel, c the removal key (unit norm), a its rate per
channel (the in-context learning rate), k, v what is written and r the query (receptance):

    M_t = diag(w_t) M_{t-1} - (a_t * c_t) (c_t M_{t-1}) + k_t v_t        y_t = r_t M_t

Inside a chunk this is a unit-triangular system for what is removed, u_t = c_t M_{t-1}, as in
`titans.ops.exact`. Its coefficients are products x_t diag(w_{i+1} ... w_t) z_i of two tokens and
the decay between them. Cumulative products would have to be divided by one another, and vanish;
here the chunk is built by doubling. Two neighbouring blocks of s tokens meet at their border: the
right one's queries hold the decay from the border up to them, the left one's keys that from
them to the border, so one matrix product gives all s x s pairs. Then each side takes the other's
whole decay, and the block has 2 s tokens. Nothing is divided, no factor is above 1, and w = 0 is
a number like any other.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Implementation = Literal["auto", "reference", "chunked"]
SEGMENT = 512  # tokens whose intermediate results exist at once, unless autograd keeps them


class RWKV7Output(NamedTuple):
    """output: (B, T, H, V) in the queries' dtype. state: M after the last token, (B, H, K, V)."""

    output: Tensor
    state: Tensor


def rwkv7(
    queries: Float[Tensor, "b t h k"],
    decay: Float[Tensor, "b t h k"],
    keys: Float[Tensor, "b t h k"],
    values: Float[Tensor, "b t h v"],
    removal: Float[Tensor, "b t h k"],
    rate: Float[Tensor, "b t h k"],
    state: Float[Tensor, "b h k v"],
    *,
    chunk_size: int = 32,
    impl: Implementation = "auto",
) -> RWKV7Output:
    """Write every token, and read it right after (Peng et al., RWKV-7 "Goose", the WKV operator).

    Args:
        queries, keys, values: r, k, v; T >= 1.
        decay: w in [0, 1] per channel. What stays, unlike alpha of `neural_memory`.
        removal, rate: c with unit norm, and a in [0, 1] per channel.
        state: M before the first token, float32 or float64; never modified. The memory computes
            in its precision.
        chunk_size: a power of two; a matter of speed only.
        impl: "reference" (loop), "chunked", or "auto": chunked above one token.

    Raises:
        ValueError: shapes or settings that do not fit.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {', '.join(get_args(Implementation))}, got {impl!r}")
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}")
    for name, x in (
        ("queries", queries),
        ("decay", decay),
        ("removal", removal),
        ("rate", rate),
    ):
        if keys.ndim != 4 or x.shape != keys.shape:
            raise ValueError(
                f"{name} and keys must have one shape (B, T, H, K), got {tuple(x.shape)} "
                f"and {tuple(keys.shape)}"
            )
    if values.ndim != 4 or values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"values must be (B, T, H, V) with the keys' B, T, H {tuple(keys.shape[:3])}, "
            f"got {tuple(values.shape)}"
        )
    batch, length, heads, key_dim = keys.shape
    if length == 0:
        raise ValueError("the sequence is empty: expected T >= 1 tokens")
    expected = (batch, heads, key_dim, values.shape[-1])
    if tuple(state.shape) != expected or state.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"state must be {expected} in float32 or float64, "
            f"got {tuple(state.shape)} in {state.dtype}"
        )
    tokens = (queries, decay, keys, values, removal, rate)
    r, w, k, v, c, a = (x.to(state.dtype).transpose(1, 2) for x in tokens)
    with torch.autocast(state.device.type, enabled=False):  # the memory keeps its own precision
        inputs = (r, w, k, v, c, -a * c)
        if impl == "reference" or (impl == "auto" and length == 1):
            y, state = rwkv7_reference(*inputs, state)
        else:
            reads = []
            for start in range(0, length, SEGMENT):
                r, w, k, v, c, b = (x[:, :, start : start + SEGMENT] for x in inputs)
                y, state = rwkv7_chunked(r, w, k, v, c, b, state, chunk_size)
                reads.append(y)
            y = torch.cat(reads, 2)
    return RWKV7Output(y.transpose(1, 2).to(queries.dtype), state)


def rwkv7_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, c: Tensor, b: Tensor, M: Tensor
) -> tuple[Tensor, Tensor]:
    """Loop over tokens; tensors are (B, H, T, D), and b is -a * c."""
    reads = []
    for t in range(k.shape[2]):
        column, row = slice(t, t + 1), (slice(None), slice(None), t)
        removed = c[:, :, column] @ M
        M = w[row][..., None] * M + b[row][..., None] * removed
        M = M + k[row][..., None] * v[:, :, column]
        reads.append(r[:, :, column] @ M)
    return torch.cat(reads, 2), M


def rwkv7_chunked(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    b: Tensor,
    M: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """All chunks at once, but for one small product a chunk that carries the memory on; tensors
    are (B, H, T, D), and b is -a * c."""
    length = k.shape[2]
    size = min(chunk_size, 1 << (length - 1).bit_length())
    missing = -length % size

    def chunks(x: Tensor, value: float = 0.0) -> Tensor:
        # Tokens that write nothing, remove nothing and keep all fill the last chunk.
        x = torch.nn.functional.pad(x, (0, 0, 0, missing), value=value)
        return x.unflatten(2, (-1, size))

    v = chunks(v)
    pairs, rows, columns, total = pair_products(
        chunks(c), chunks(r), chunks(k), chunks(b), chunks(w, 1.0)
    )
    (removal, query), (key, erase) = rows.unbind(-3), columns.unbind(-3)
    (removal_key, removal_erase), (query_key, query_erase) = (
        x.unbind(-2) for x in pairs.unbind(-4)
    )
    # u = c M, in which the earlier u are erased and the earlier v are written.
    right = torch.cat([removal, removal_key @ v], -1)
    solved = torch.linalg.solve_triangular(-removal_erase, right, upper=False, unitriangular=True)
    of_memory, of_values = solved.split([k.shape[-1], v.shape[-1]], -1)
    carried = torch.diag_embed(total) + erase.mT @ of_memory
    added = key.mT @ v + erase.mT @ of_values
    starts = []
    for carry, add in zip(carried.unbind(2), added.unbind(2), strict=True):
        starts.append(M)
        M = carry @ M + add
    start = torch.stack(starts, 2)
    removed = of_memory @ start + of_values
    y = query @ start + query_key @ v + query_erase @ removed
    return y.flatten(2, 3)[:, :, :length], M


def pair_products(
    removal: Float[Tensor, "*n c k"],
    queries: Float[Tensor, "*n c k"],
    keys: Float[Tensor, "*n c k"],
    erasers: Float[Tensor, "*n c k"],
    decay: Float[Tensor, "*n c k"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The products of a chunk of C = 2^n tokens, by doubling.

    Returns:
        pairs (..., 2, C, 2, C): [x, t, z, i] is x_t diag(decay between) z_i, with x the removal
            keys (which meet the memory before token t, i < t) or the queries (after it, i <= t),
            and z the keys or the erasers.
        rows (..., 2, C, K): removal keys and queries, with the decay since the chunk began.
        columns (..., 2, C, K): keys and erasers, with the decay until its end.
        total (..., K): the decay of the whole chunk.
    """
    # Blocks of one token: (..., blocks, 2, 1, K).
    rows = torch.stack([removal, queries * decay], -2)[..., None, :]
    columns = torch.stack([keys, erasers], -2)[..., None, :]
    total = decay[..., None, None, :]
    own = queries[..., None, :] @ torch.stack([keys, erasers], -1)  # (..., C, 1, 2)
    pairs = torch.cat([torch.zeros_like(own), own], -2)[..., :, None, :, None]
    while total.shape[-4] > 1:
        size = rows.shape[-2]
        left_rows, right_rows = halves(rows)
        left_columns, right_columns = halves(columns)
        left_total, right_total = halves(total)
        left_pairs, right_pairs = halves(pairs, axis=-5)
        meet = right_rows.flatten(-3, -2) @ left_columns.flatten(-3, -2).mT
        meet = meet.unflatten(-1, (2, size)).unflatten(-3, (2, size))
        above = torch.zeros_like(meet)
        pairs = torch.cat(
            [torch.cat([left_pairs, above], -1), torch.cat([meet, right_pairs], -1)], -3
        )
        rows = torch.cat([left_rows, right_rows * left_total], -2)
        columns = torch.cat([left_columns * right_total, right_columns], -2)
        total = left_total * right_total
    return (
        pairs.squeeze(-5),
        rows.squeeze(-4),
        columns.squeeze(-4),
        total.squeeze(-4).squeeze(-2).squeeze(-2),
    )


def halves(blocks: Tensor, axis: int = -4) -> tuple[Tensor, Tensor]:
    """Every first and every second block."""
    left, right = blocks.unflatten(axis, (-1, 2)).unbind(axis)
    return left, right
