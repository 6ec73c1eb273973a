"""The one public op: validate once, then dispatch on `impl`."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from titans.ops.chunked import neural_memory_chunked
from titans.ops.compiled import neural_memory_compiled
from titans.ops.exact import neural_memory_exact
from titans.ops.native import BuildError, compiled, neural_memory_native, unsupported
from titans.ops.networks import OBJECTIVES, MemoryNetwork, Network, Objective
from titans.ops.own import Optimizer, Retention, weights_of
from titans.ops.reference import neural_memory_reference
from titans.ops.rule import Gates, MemoryOutput, RecentTokens, RuleState
from titans.ops.tracing import is_traced
from titans.ops.triton import check_available, neural_memory_triton

Implementation = Literal["auto", "reference", "chunked", "exact", "compile", "native", "triton"]
IMPLEMENTATIONS = get_args(Implementation)
Precision = Literal["float32", "bf16"]
Gate = Tensor | Sequence[Tensor]


def neural_memory(
    queries: Float[Tensor, "b t h k"],
    keys: Float[Tensor, "b t h k"],
    values: Float[Tensor, "b t h v"],
    learning_rate: Gate,
    *,
    state: RuleState,
    network: Network,
    momentum: Gate | None = None,
    decay: Gate | None = None,
    objective: Objective = "l2",
    window: Sequence[float] = (1.0,),
    retention: Retention | None = None,
    optimizer: Optimizer | None = None,
    chunk_size: int = 1,
    block_size: int = 64,
    anchor: Sequence[Float[Tensor, "h _ _"]] | None = None,
    max_surprise: float | None = None,
    impl: Implementation = "auto",
    precision: Precision = "float32",
) -> MemoryOutput:
    """Write every token into the memory, and read it right after (paper v1, eq. 13-18).

        S_t = eta_t S_{t-1} - theta_t grad l(M_base; k_t, v_t)
        M_t = (1 - alpha_t) M_{t-1} + S_t
        y_t = M_t(q_t)

    Args:
        queries, keys, values: (B, T, H, D), T >= 1. Keys should have unit norm.
        learning_rate: theta in [0, inf), (B, T, H); a sequence gives one tensor per layer.
        state: from `RuleState.init(...)` or from an earlier call; never modified.
        network: shape of the memory network, or a `Network` of one's own.
        momentum: eta in [0, 1], (B, T, H), or per layer; None for no momentum.
        decay: alpha in [0, 1], (B, T, H), or (B, T, H, in) for decay per input channel, or per
            layer; None for no forgetting.
        objective: "l2" is 0.5 |M(k) - v|^2 (the factor of v1 eq. 12 is absorbed in theta),
            "dot" is -<M(k), v>; or the slope of a loss, (M(k), v) -> d loss / d M(k).
        window: what the gradients of token t, t - 1, ... weigh in the step of token t, all taken
            at M_base (ATLAS' Omega rule); the state holds the tokens. (1.0,) is token t alone.
        retention, optimizer: of one's own, see there; None for the equations above.
        chunk_size: tokens that share the weights their gradients are taken at. 1 is the true
            per-token gradient; larger values change the function that is computed (eq. 16).
        block_size: tokens the exact form solves at once; a matter of speed only.
        anchor: one (H, in, out) per layer, a constant part of the weights: the memory is
            anchor + state.weights, and decay pulls it towards the anchor instead of zero.
        max_surprise: bound on the norm of each token's gradient, per layer; None for none.
        impl: "reference" (loop), "chunked" (any network), "exact" (linear network,
            chunk_size 1), "compile" (chunked, its whole chunks through torch.compile), "native"
            (chunked or exact in C, for the CPU), "triton" (GPU kernels), or "auto": native, exact
            or chunked, see `resolve_implementation`. With a network, objective or window of one's
            own it is chunked, with a retention or optimizer of one's own the reference.
            Twice differentiable are "reference", "exact", and "chunked" with a part of one's own.
        precision: "bf16" lets native and triton round the factors of matrix products to bf16
            where the processor is faster with them; sums, gates and states stay float32.

    Returns:
        MemoryOutput(output (B, T, H, V) in the queries' dtype, state, surprise (B, T, H)).

    Raises:
        ValueError: shapes, dtypes or settings that do not fit, naming what was expected.
        ImportError: impl="triton" without triton.
    """
    check_settings(chunk_size, block_size, objective, max_surprise, precision)
    check_inputs(queries, keys, values)
    slots = momentum is not None if optimizer is None else optimizer.slots
    check_state(state, keys, values, network, slots, chunk_size)
    check_window(window, state.recent, keys, values)
    check_anchor(anchor, state)
    compute = state.weights[0].dtype
    batch, length, heads, _ = keys.shape
    prepare = partial(
        prepare_gate,
        network=network,
        shape=(batch, length, heads),
        dtype=compute,
        device=keys.device,
    )
    gates = Gates(
        prepare("learning_rate", learning_rate),
        None if momentum is None else prepare("momentum", momentum),
        None if decay is None else prepare("decay", decay, channels=[*keys.shape, *values.shape]),
    )
    own = own_parts(network, objective, window, retention, optimizer)
    if own:
        form = resolve_own(impl, own)
    else:
        assert isinstance(network, MemoryNetwork)
        per_channel = any(a.ndim == 4 for a in each_gate(decay))
        form = resolve_implementation(
            impl,
            network,
            chunk_size,
            max_surprise,
            per_channel=per_channel,
            device=keys.device.type,
            dtype=compute,
            traced=is_traced([queries, keys, values, *state.weights]),
        )

    # The GPU kernels take short tokens as they are.
    tokens = (queries, keys, values)
    q, k, v = ((x if form == "triton" else x.to(compute)).transpose(1, 2) for x in tokens)
    options: dict[str, Any] = {"network": network, "objective": objective, "anchor": anchor}
    if form in ("exact", "triton"):
        options["block_size"] = block_size
    if form != "exact":
        options |= {"chunk_size": chunk_size, "max_surprise": max_surprise}
    if own:
        options["window"] = window
        options |= {part: given for part, given in own.items() if part in OWN_FORMS["reference"]}
    if precision == "bf16" and form == "native":
        options["scan"] = partial(neural_memory_native, bf16=True)
    if precision == "bf16" and form == "triton":
        options["precision"] = "bf16"
    with torch.autocast(q.device.type, enabled=False):  # the memory keeps its own precision
        result = FORMS[form](q, k, v, gates, state, **options)
    return MemoryOutput(
        result.output.transpose(1, 2).to(queries.dtype),
        result.state,
        result.surprise.transpose(1, 2),
    )


FORMS: dict[str, Callable[..., MemoryOutput]] = {
    "reference": neural_memory_reference,
    "chunked": neural_memory_chunked,
    "exact": neural_memory_exact,
    "triton": neural_memory_triton,
    "compile": partial(neural_memory_chunked, scan=neural_memory_compiled),
    "native": partial(neural_memory_chunked, scan=neural_memory_native),
}


def read_memory(
    queries: Float[Tensor, "b t h k"],
    weights: Sequence[Float[Tensor, "b h _ _"]],
    network: Network,
    anchor: Sequence[Float[Tensor, "h _ _"]] | None = None,
    retention: Retention | None = None,
) -> Float[Tensor, "b t h v"]:
    """M*(q): read without writing, all queries from the same weights (paper v1, eq. 21).

    ValueError for weights that are not the network's for queries of this batch, heads and size.
    """
    check_read(queries, weights, network)
    at = weights_of(weights, anchor, retention)
    q = queries.to(at[0].dtype).transpose(1, 2)
    with torch.autocast(q.device.type, enabled=False):
        y = network.apply(at, q)
    return y.transpose(1, 2).to(queries.dtype)


def resolve_implementation(
    impl: str,
    network: MemoryNetwork,
    chunk_size: int,
    max_surprise: float | None = None,
    *,
    per_channel: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    traced: bool = False,
) -> str:
    """What `impl` runs. An implementation that does not apply is refused, never replaced. (Only
    while torch.compile traces is "native" the plain closed form, which it can compile; and where
    torch.compile fails, "compile" runs the form it was to compile, with a warning.)

    "auto" is native where that applies and a C compiler is there, else exact where that applies,
    else chunked; the kernels of "triton" have to be asked for. What it is and why is logged once
    per setting (logger `titans`).
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    exact = network.linear and chunk_size == 1 and max_surprise is None
    if impl == "auto":
        if traced:  # only the plain forms can be
            return "exact" if exact else "chunked"
        return automatic(network, exact, per_channel, device, dtype)
    if impl == "exact" and not exact:
        raise ValueError(
            "impl='exact' needs a linear memory (depth 1, no norm), chunk_size 1 and no "
            f"max_surprise, got depth {network.depth}, norm {network.norm}, "
            f"chunk_size {chunk_size}, max_surprise {max_surprise}"
        )
    if impl == "triton":
        check_available(device)
    if impl == "compile" and per_channel:
        raise ValueError("impl='compile' needs decay per token, got decay per channel")
    if impl == "native":
        reason = unsupported(network, per_channel, device)
        if reason is not None:
            raise ValueError(f"impl='native' needs {reason}")
        try:
            compiled(dtype)
        except BuildError as error:
            raise ValueError(f"impl='native' is not to be had: {error}") from None
    return impl


# Which parts of one's own need which form: the others have the rule's own parts built in.
OWN_FORMS = {
    "chunked": ("network", "objective", "window"),
    "reference": ("retention", "optimizer"),
}


def own_parts(
    network: Network,
    objective: Objective,
    window: Sequence[float],
    retention: Retention | None,
    optimizer: Optimizer | None,
) -> dict[str, Any]:
    """What is not built in, by its name."""
    own: dict[str, Any] = {}
    if not isinstance(network, MemoryNetwork):
        own["network"] = network
    if callable(objective):
        own["objective"] = objective
    if len(window) > 1:
        own["window"] = window
    if retention is not None:
        own["retention"] = retention
    if optimizer is not None:
        own["optimizer"] = optimizer
    return own


def resolve_own(impl: str, own: dict[str, Any]) -> str:
    """As `resolve_implementation`, with parts of one's own; "auto" is the fastest that has them."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    in_loop = any(part in own for part in OWN_FORMS["reference"])
    forms = ("reference",) if in_loop else ("chunked", "reference")
    if impl != "auto" and impl not in forms:
        raise ValueError(
            f"impl={impl!r} has no {' and '.join(own)} of one's own; "
            f"{' and '.join(forms)} {'has' if in_loop else 'have'} it"
        )
    return forms[0] if impl == "auto" else impl


@functools.cache
def automatic(
    network: MemoryNetwork,
    exact: bool,
    per_channel: bool,
    device: str,
    dtype: torch.dtype,
) -> str:
    """What impl="auto" is for these settings."""
    log = logging.getLogger("titans")
    reason = unsupported(network, per_channel, device)
    if reason is None:
        try:
            compiled(dtype)
        except BuildError as error:
            said = "the compiled memory is not to be had, a slower form runs: %s"
            log.log(error.level, said, error)
            reason = "a C compiler"
    form = "native" if reason is None else "exact" if exact else "chunked"
    why = "" if reason is None else f" (native needs {reason})"
    log.info("impl='auto' is %r for %s on %s%s", form, network, device, why)
    return form


def each_gate(gate: Gate | None) -> Sequence[Tensor]:
    return [] if gate is None else [gate] if isinstance(gate, Tensor) else gate


def check_settings(
    chunk_size: int,
    block_size: int,
    objective: Objective,
    max_surprise: float | None,
    precision: str,
) -> None:
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be float32 or bf16, got {precision!r}")
    for name, size in (("chunk_size", chunk_size), ("block_size", block_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not callable(objective) and objective not in OBJECTIVES:
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)} or a function, got {objective!r}"
        )
    if max_surprise is not None and not max_surprise > 0:
        raise ValueError(f"max_surprise must be positive, got {max_surprise}")


def check_inputs(queries: Tensor, keys: Tensor, values: Tensor) -> None:
    for name, x in (("queries", queries), ("keys", keys), ("values", values)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be (B, T, H, D), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x.device != keys.device:
            raise ValueError(f"{name} must be on the keys' {keys.device}, got {x.device}")
    if queries.shape != keys.shape:
        raise ValueError(
            f"queries and keys must have one shape, got {tuple(queries.shape)} "
            f"and {tuple(keys.shape)}"
        )
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"values must be (B, T, H, V) with the keys' B, T, H {tuple(keys.shape[:3])}, "
            f"got {tuple(values.shape)}"
        )
    if keys.shape[1] == 0:
        raise ValueError("the sequence is empty: expected T >= 1 tokens")
    if keys.shape[3] == 0 or values.shape[3] == 0:
        raise ValueError("keys and values need at least one feature")


def check_read(queries: Tensor, weights: Sequence[Tensor], network: Network) -> None:
    if queries.ndim != 4 or not queries.is_floating_point():
        raise ValueError(
            f"queries must be floating point (B, T, H, D), got {queries.dtype} "
            f"{tuple(queries.shape)}"
        )
    batch, _, heads, key_dim = queries.shape
    got = [tuple(w.shape) for w in weights]
    if not got or len(got[-1]) != 4:
        raise ValueError(f"weights must be (B, H, in, out), one per layer, got shapes {got}")
    wanted = [(batch, heads, *s) for s in network.shapes(key_dim, got[-1][3])]
    if got != wanted:
        raise ValueError(f"weights must have shapes {wanted} for these queries, got {got}")
    check_alike("weights", weights, weights[0].dtype, queries.device)


def check_state(
    state: RuleState,
    keys: Tensor,
    values: Tensor,
    network: Network,
    slots: int,
    chunk_size: int,
) -> None:
    """slots: tensors kept per weight matrix; one for momentum, an `Optimizer` may have others."""
    batch, _, heads, key_dim = keys.shape
    expected = [(batch, heads, *s) for s in network.shapes(key_dim, values.shape[3])]
    for name, tensors in (
        ("weights", state.weights),
        ("base", state.base),
        ("momentum", state.momentum),
    ):
        if tensors is None:
            continue
        got = [tuple(w.shape) for w in tensors]
        wanted = expected * max(slots, 1) if name == "momentum" else expected
        if got != wanted:
            raise ValueError(f"state.{name} must have shapes {wanted}, got {got}")
        if any(w.dtype not in (torch.float32, torch.float64) for w in tensors):
            raise ValueError(
                f"state.{name} must be float32 or float64, got {[str(w.dtype) for w in tensors]}"
            )
        check_alike(f"state.{name}", tensors, state.weights[0].dtype, keys.device)
    if (slots > 0) != (state.momentum is not None):
        given, held = ("is", "none") if slots else ("is not", "some")
        raise ValueError(f"momentum {given} given but the state holds {held}")
    fits = chunk_size == 1 if state.base is None else chunk_size > 1
    if not fits:
        raise ValueError(
            f"the state was made for chunk_size {'1' if state.base is None else 'above 1'}, "
            f"got {chunk_size}"
        )
    if not 0 <= state.offset < chunk_size:
        raise ValueError(
            f"state.offset must be below the chunk size {chunk_size}, got {state.offset}"
        )


def check_window(
    window: Sequence[float], recent: RecentTokens | None, keys: Tensor, values: Tensor
) -> None:
    held = 0 if recent is None else recent.keys.shape[2]
    if len(window) != held + 1:
        raise ValueError(f"the state was made for a window of {held + 1}, got {len(window)}")
    if recent is None:
        if window[0] != 1.0:
            raise ValueError(f"a window of one token must weigh it 1, got {window[0]}")
        return
    if not all(math.isfinite(weight) for weight in window):
        raise ValueError(f"the weights of a window must be finite, got {tuple(window)}")
    batch, _, heads, _ = keys.shape
    grid = (batch, heads, held)
    expected = [(*grid, keys.shape[3]), (*grid, values.shape[3]), grid]
    got = [tuple(x.shape) for x in recent.tensors().values()]
    if got != expected:
        raise ValueError(f"state.recent must have shapes {expected}, got {got}")


def check_anchor(anchor: Sequence[Tensor] | None, state: RuleState) -> None:
    if anchor is None:
        return
    expected = [tuple(w.shape[1:]) for w in state.weights]
    got = [tuple(a.shape) for a in anchor]
    if got != expected:
        raise ValueError(f"anchor must have shapes {expected}, got {got}")
    check_alike("anchor", anchor, state.weights[0].dtype, state.weights[0].device)


def check_alike(
    name: str, tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    for x in tensors:
        if x.dtype != dtype or x.device != device:
            raise ValueError(f"{name} must be {dtype} on {device}, got {x.dtype} on {x.device}")


def prepare_gate(
    name: str,
    gate: Gate,
    network: Network,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    channels: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """One (B, H, T[, in]) tensor per layer; a shared gate is one shared object."""
    if isinstance(gate, Tensor):
        given: list[Tensor] = [gate] * network.depth
    elif isinstance(gate, Sequence) and all(isinstance(x, Tensor) for x in gate):
        given = list(gate)
    else:
        raise ValueError(f"{name} must be a tensor, or one per layer, got {gate!r}")
    if len(given) != network.depth:
        raise ValueError(
            f"{name} must have one tensor per layer ({network.depth}), got {len(given)}"
        )
    sizes = [i for i, _ in network.shapes(channels[3], channels[7])] if channels else []
    prepared: dict[int, Tensor] = {}
    for layer, x in enumerate(given):
        allowed = [shape, (*shape, sizes[layer])] if sizes else [shape]
        if tuple(x.shape) not in allowed:
            wanted = " or ".join(str(a) for a in allowed)
            raise ValueError(f"{name} of layer {layer} must be {wanted}, got {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(f"{name} must be on the keys' {device}, got {x.device}")
        if id(x) not in prepared:
            prepared[id(x)] = x.to(dtype).transpose(1, 2)
    return tuple(prepared[id(x)] for x in given)
