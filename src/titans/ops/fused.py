"""The closed form of `chunked` with its backward pass written out.

Same function as `titans.ops.chunked`, for decay per token. What makes it faster and smaller than
autograd through the closed form:

- The forward pass keeps one state per `SEGMENT` of tokens and works without a graph; the backward
  pass runs each segment again (the last one was kept) and walks its chunks in reverse.
- Small chunks share their reads: error signals and states advance chunk by chunk, but a read
  needs only the state at the start of a group of chunks and the group's own coefficients.

Tensors are (N, T, D) with N = batch x heads, states contiguous (N, in, out).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from titans.ops.coefficients import coefficients
from titans.ops.networks import (
    Activation,
    MemoryNetwork,
    Objective,
    activate,
    activation_curvature,
    activation_slope,
    bound_gradient_backward,
    bounded,
    layer_norm,
    layer_norm_backward,
    output_error,
    output_error_backward,
)
from titans.ops.own import weights_of
from titans.ops.rule import Gates, GateSet

GROUP = 64  # tokens read at once
SEGMENT = 4096  # tokens whose intermediate results are kept at once


@dataclass(frozen=True)
class Plan:
    """What a call computes, and how it is cut up.

    gates: of every layer. chunk, group, segment: in tokens, each a multiple of the one before.
    """

    network: MemoryNetwork
    objective: Objective
    max_surprise: float | None
    gates: tuple[GateSet, ...]
    chunk: int
    group: int
    segment: int

    @property
    def depth(self) -> int:
        return self.network.depth

    @property
    def momentum(self) -> bool:
        return self.gates[0][1] is not None


def group_size(chunk_size: int) -> int:
    """Tokens read at once: whole chunks, about `GROUP` tokens."""
    return chunk_size * max(1, GROUP // chunk_size)


def neural_memory_fused(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    *,
    network: MemoryNetwork,
    objective: Objective,
    chunk_size: int,
    max_surprise: float | None,
    anchor: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Whole chunks from a chunk boundary on; tensors (B, H, T, D), weights (B, H, in, out).

    Returns outputs, surprise (B, H, T), and the weights and momentum after the last token.
    """
    batch, heads, length, _ = keys.shape
    group = min(group_size(chunk_size), length)
    segment = group * max(1, SEGMENT // group, math.isqrt(length // group))
    distinct, positions = gates.distinct()
    plan = Plan(network, objective, max_surprise, positions, chunk_size, group, segment)

    def merged(x: Tensor) -> Tensor:
        return x.flatten(0, 1).contiguous()

    inputs = [queries, keys, values, *distinct, *weights, *(momentum or [])]
    fixed = [merged(a.expand(batch, *a.shape)) for a in anchor or []]
    output, surprise, *final = FusedScan.apply(plan, *map(merged, inputs), *fixed)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, heads))

    after = tuple(split(w) for w in final)
    past = None if momentum is None else after[network.depth :]
    return split(output), split(surprise), after[: network.depth], past


class Rule(NamedTuple):
    """One layer between two chunks: weights and momentum, (N, in, out)."""

    weights: Tensor
    momentum: Tensor | None


class Mixing(NamedTuple):
    """Coefficients of one layer for a group of P tokens, r chunks of C.

    Of reads: beta, m (N, P), G (N, P, P). Of the state after each chunk: keep = beta_C,
    push = m_C, carry = H_C (N, r), write = G[C, :], last (N, r, C).
    """

    beta: Tensor
    m: Tensor | None
    G: Tensor
    keep: Tensor
    push: Tensor | None
    carry: Tensor | None
    write: Tensor
    last: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Mixing":
        made: dict[str, Any] = {
            name: None if t is None else function(t) for name, t in self._asdict().items()
        }
        return Mixing(**made)


def mixing(plan: Plan, gates: Sequence[Tensor]) -> dict[GateSet, Mixing]:
    """Gates (N, P) of a group -> coefficients, once for all layers with the same gates."""
    made = {}
    for identity in dict.fromkeys(plan.gates):
        theta, eta, alpha = (None if i is None else gates[i] for i in identity)
        assert theta is not None
        read = coefficients(theta, eta, alpha)
        if plan.chunk == plan.group:
            end = read.map(lambda x: x[:, None])
        else:
            chunks = [None if g is None else g.unflatten(1, (-1, plan.chunk)) for g in (eta, alpha)]
            end = coefficients(theta.unflatten(1, (-1, plan.chunk)), *chunks)
        made[identity] = Mixing(
            beta=read.beta,
            m=read.m,
            G=read.G,
            keep=end.beta[..., -1],
            push=None if end.m is None else end.m[..., -1],
            carry=end.carry,
            write=end.G[..., -1, :],
            last=end.last,
        )
    return made


class Errors(NamedTuple):
    """One chunk's way to its error signals, layer by layer (depth L).

    inputs: a_l, L of them. outputs: z_l = a_l M_l. back: delta_l M_l^T, for l >= 1.
    deltas: L error signals; free: they before `max_surprise`. normed, inverse_std: of the
    LayerNorm, else None.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    back: list[Tensor]
    deltas: list[Tensor]
    free: list[Tensor]
    normed: Tensor
    inverse_std: Tensor | None


class Group(NamedTuple):
    """What the backward pass needs of a group besides its inputs.

    states: per chunk and layer, before the chunk. errors: per chunk. reads: the read path's z_l.
    scores: <x_t, a_i> per layer.
    """

    states: list[list[Rule]]
    errors: list[Errors]
    reads: list[Tensor]
    scores: list[Tensor]


def chunk_errors(plan: Plan, at: Sequence[Tensor], k: Tensor, v: Tensor) -> Errors:
    """Error signals of a chunk at the weights `at`, with what led to them."""
    network = plan.network
    inputs, outputs = [k], []
    for layer in range(plan.depth):
        outputs.append(torch.bmm(inputs[-1], at[layer]))
        if layer < plan.depth - 1:
            inputs.append(activate(network.activation, outputs[-1]))
    delta, normed, inverse_std = output_error(network, outputs[-1], k, v, plan.objective)
    deltas = [delta]
    back: list[Tensor] = []
    for layer in range(plan.depth - 1, 0, -1):
        back.insert(0, torch.bmm(deltas[0], at[layer].transpose(1, 2)))
        deltas.insert(0, times_slope(network.activation, back[0], outputs[layer - 1]))
    _, bound = bounded(inputs, deltas, plan.max_surprise)
    return Errors(inputs, outputs, back, bound, deltas, normed, inverse_std)


def chunk_errors_backward(
    plan: Plan,
    at: Sequence[Tensor],
    v: Tensor,
    errors: Errors,
    d_inputs: list[Tensor],
    d_deltas: list[Tensor],
    d_at: Sequence[list[Tensor]],
) -> tuple[Tensor, Tensor]:
    """Gradients of a chunk's keys and values, from those of its a_l and delta_l.

    Adds the gradient of `at` to every tensor of d_at[layer], in place.
    """
    network, depth = plan.network, plan.depth
    if plan.max_surprise is not None:
        for layer in range(depth):
            d_deltas[layer], d_input = bound_gradient_backward(
                errors.inputs[layer], errors.deltas[layer], errors.free[layer], d_deltas[layer]
            )
            d_inputs[layer] = d_inputs[layer] + d_input
    slopes = [activation_slope(network.activation, z) for z in errors.outputs[:-1]]
    d_outputs: list[Tensor] = []
    for layer in range(1, depth):
        z, back, grown = errors.outputs[layer - 1], errors.back[layer - 1], d_deltas[layer - 1]
        curvature = activation_curvature(network.activation, z)
        d_outputs.append(curvature.mul_(back).mul_(grown))
        d_back = grown * slopes[layer - 1]
        d_deltas[layer] = torch.baddbmm(d_deltas[layer], d_back, at[layer])
        add_product(d_at[layer], d_back, errors.free[layer])
    d_out, d_key, d_value = output_error_backward(
        network,
        errors.normed,
        errors.inverse_std,
        errors.inputs[0],
        v,
        d_deltas[-1],
        plan.objective,
    )
    d_outputs.append(d_out)
    for layer in range(depth - 1, -1, -1):
        add_product(d_at[layer], errors.inputs[layer], d_outputs[layer])
        d_input = torch.baddbmm(d_inputs[layer], d_outputs[layer], at[layer].transpose(1, 2))
        if layer > 0:
            d_outputs[layer - 1].addcmul_(d_input, slopes[layer - 1])
    return d_input if d_key is None else d_input + d_key, d_value


def add_product(targets: Sequence[Tensor], left: Tensor, right: Tensor) -> None:
    """left^T right, added to every target in place."""
    if len(targets) == 1:
        targets[0].baddbmm_(left.transpose(1, 2), right)
    else:
        product = torch.bmm(left.transpose(1, 2), right)
        for target in targets:
            target.add_(product)


def times_slope(activation: Activation, x: Tensor, z: Tensor) -> Tensor:
    """x * activate'(z), in one pass."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(x, z)
    return torch.ops.aten.silu_backward(x, z)


def scaled_product(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """(scale_t x_t) W with the scale (N, C) on the narrower side."""
    if weight.shape[1] <= weight.shape[2]:
        return torch.bmm(x * scale[..., None], weight)
    return torch.bmm(x, weight).mul_(scale[..., None])


def read_layer(
    x: Tensor, rule: Rule, anchor: Tensor | None, mix: Mixing, inputs: Tensor, deltas: Tensor
) -> tuple[Tensor, Tensor]:
    """x_t M_t of one layer for a group of tokens, and the raw scores <x_t, a_i>."""
    z = scaled_product(x, mix.beta, rule.weights)
    if rule.momentum is not None and mix.m is not None:
        z += scaled_product(x, mix.m, rule.momentum)
    if anchor is not None:
        z.baddbmm_(x, anchor)
    scores = torch.bmm(x, inputs.transpose(1, 2))
    z.baddbmm_(scores * mix.G, deltas, alpha=-1)
    return z, scores


def read_layer_backward(
    dz: Tensor,
    x: Tensor,
    scores: Tensor,
    rule: Rule,
    anchor: Tensor | None,
    mix: Mixing,
    inputs: Tensor,
    deltas: Tensor,
    d_mix: Mixing,
    d_anchor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Rule]:
    """Gradients of x, a, delta and the state; adds those of coefficients and anchor in place."""
    d_scored = torch.bmm(dz, deltas.transpose(1, 2))
    d_mix.G.addcmul_(scores, d_scored, value=-1)
    d_scores = d_scored.mul_(mix.G).neg_()
    d_deltas = torch.bmm((scores * mix.G).transpose(1, 2), dz).neg_()
    d_inputs = torch.bmm(d_scores.transpose(1, 2), x)
    dx = torch.bmm(d_scores, inputs)
    d_rule = []
    for weight, scale, d_scale in (
        (rule.weights, mix.beta, d_mix.beta),
        (rule.momentum, mix.m, d_mix.m),
    ):
        if weight is None or scale is None or d_scale is None:
            continue
        column = scale[..., None]
        if weight.shape[1] <= weight.shape[2]:
            plain = torch.bmm(dz, weight.transpose(1, 2))
            d_scale += (plain * x).sum(-1)
            dx.addcmul_(plain, column)
            d_rule.append(torch.bmm((x * column).transpose(1, 2), dz))
        else:
            d_scale += (torch.bmm(x, weight) * dz).sum(-1)
            scaled = dz * column
            dx.baddbmm_(scaled, weight.transpose(1, 2))
            d_rule.append(torch.bmm(x.transpose(1, 2), scaled))
    if anchor is not None and d_anchor is not None:
        dx.baddbmm_(dz, anchor.transpose(1, 2))
        d_anchor.baddbmm_(x.transpose(1, 2), dz)
    return dx, d_inputs, d_deltas, Rule(d_rule[0], d_rule[1] if len(d_rule) > 1 else None)


def next_rule(rule: Rule, inputs: Tensor, deltas: Tensor, mix: Mixing, chunk: int) -> Rule:
    """One layer after a chunk."""
    weights = rule.weights * mix.keep[:, chunk, None, None]
    momentum = None
    if rule.momentum is not None:
        assert mix.push is not None
        assert mix.carry is not None
        assert mix.last is not None
        weights.addcmul_(rule.momentum, mix.push[:, chunk, None, None])
        momentum = rule.momentum * mix.carry[:, chunk, None, None]
        add_written(momentum, inputs, deltas, mix.last[:, chunk, :, None])
    add_written(weights, inputs, deltas, mix.write[:, chunk, :, None])
    return Rule(weights, momentum)


def add_written(target: Tensor, inputs: Tensor, deltas: Tensor, scale: Tensor) -> None:
    """target -= sum_i scale_i a_i^T delta_i."""
    if inputs.shape[2] <= deltas.shape[2]:
        inputs = inputs * scale
    else:
        deltas = deltas * scale
    target.baddbmm_(inputs.transpose(1, 2), deltas, alpha=-1)


def next_rule_backward(
    d_after: Rule,
    rule: Rule,
    inputs: Tensor,
    deltas: Tensor,
    mix: Mixing,
    chunk: int,
    d_mix: Mixing,
    d_inputs: Tensor,
    d_deltas: Tensor,
) -> Rule:
    """Gradient of a layer's state; adds those of a, delta and the coefficients in place."""
    for slope, scale, d_scale in (
        (d_after.weights, mix.write, d_mix.write),
        (d_after.momentum, mix.last, d_mix.last),
    ):
        if slope is None or scale is None or d_scale is None:
            continue
        column = scale[:, chunk, :, None]
        if inputs.shape[2] <= deltas.shape[2]:
            plain = torch.bmm(deltas, slope.transpose(1, 2))
            d_scale[:, chunk] -= (plain * inputs).sum(-1)
            d_inputs.addcmul_(plain, column, value=-1)
            d_deltas.baddbmm_(inputs * column, slope, alpha=-1)
        else:
            plain = torch.bmm(inputs, slope)
            d_scale[:, chunk] -= (plain * deltas).sum(-1)
            d_deltas.addcmul_(plain, column, value=-1)
            d_inputs.baddbmm_(deltas * column, slope.transpose(1, 2), alpha=-1)
    d_mix.keep[:, chunk] += inner(d_after.weights, rule.weights)
    weights = d_after.weights * mix.keep[:, chunk, None, None]
    if rule.momentum is None:
        return Rule(weights, None)
    assert d_after.momentum is not None
    assert mix.push is not None
    assert mix.carry is not None
    assert d_mix.push is not None
    assert d_mix.carry is not None
    d_mix.push[:, chunk] += inner(d_after.weights, rule.momentum)
    d_mix.carry[:, chunk] += inner(d_after.momentum, rule.momentum)
    momentum = d_after.momentum * mix.carry[:, chunk, None, None]
    momentum.addcmul_(d_after.weights, mix.push[:, chunk, None, None])
    return Rule(weights, momentum)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> over all but the first axis."""
    return (x * y).flatten(1).sum(1)


def join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def scan_group(
    plan: Plan,
    gates: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: list[Rule],
    anchor: Sequence[Tensor] | None,
) -> tuple[Tensor, list[Rule], Group]:
    """One group: the last layer's reads (before LayerNorm), the state after it, and the way."""
    layers = range(plan.depth)
    made = mixing(plan, gates)
    mix = [made[identity] for identity in plan.gates]
    group = Group([], [], [], [])
    start = rules
    chunks = zip(k.split(plan.chunk, 1), v.split(plan.chunk, 1), strict=True)
    for chunk, (keys, values) in enumerate(chunks):
        errors = chunk_errors(plan, weights_of([r.weights for r in rules], anchor), keys, values)
        group.states.append(rules)
        group.errors.append(errors)
        rules = [
            next_rule(rules[i], errors.inputs[i], errors.deltas[i], mix[i], chunk) for i in layers
        ]
    x = q
    for i in layers:
        inputs = join([e.inputs[i] for e in group.errors])
        deltas = join([e.deltas[i] for e in group.errors])
        fixed = None if anchor is None else anchor[i]
        z, scores = read_layer(x, start[i], fixed, mix[i], inputs, deltas)
        group.reads.append(z)
        group.scores.append(scores)
        x = activate(plan.network.activation, z) if i < plan.depth - 1 else z
    return x, rules, group


def scan_group_backward(
    plan: Plan,
    group: Group,
    gates: Sequence[Tensor],
    q: Tensor,
    v: Tensor,
    anchor: Sequence[Tensor] | None,
    d_output: Tensor,
    d_rules: list[Rule],
    d_anchor: list[Tensor] | None,
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor], list[Rule]]:
    """Gradients of the gates, of q, k, v and of the state before; adds the anchor's in place."""
    network, layers = plan.network, range(plan.depth)
    with torch.enable_grad():
        leaves = [g.detach().requires_grad_() for g in gates]
        graph = mixing(plan, leaves)
    made = {identity: m.map(Tensor.detach) for identity, m in graph.items()}
    d_made = {identity: m.map(torch.zeros_like) for identity, m in made.items()}
    mix, d_mix = [made[i] for i in plan.gates], [d_made[i] for i in plan.gates]

    start = group.states[0]
    xs = [q, *(activate(network.activation, z) for z in group.reads[:-1])]
    d_x = d_output
    d_start: list[Rule] = []
    d_inputs: list[Sequence[Tensor]] = []
    d_deltas: list[Sequence[Tensor]] = []
    for i in reversed(layers):
        z = group.reads[i]
        if i < plan.depth - 1:
            dz = times_slope(network.activation, d_x, z)
        else:
            dz = layer_norm_backward(*layer_norm(z), d_x) if network.norm else d_x
        d_x, d_input, d_delta, d_rule = read_layer_backward(
            dz,
            xs[i],
            group.scores[i],
            start[i],
            None if anchor is None else anchor[i],
            mix[i],
            join([e.inputs[i] for e in group.errors]),
            join([e.deltas[i] for e in group.errors]),
            d_mix[i],
            None if d_anchor is None else d_anchor[i],
        )
        d_inputs.insert(0, d_input.split(plan.chunk, 1))
        d_deltas.insert(0, d_delta.split(plan.chunk, 1))
        d_start.insert(0, d_rule)
    d_q = d_x + d_output if network.residual else d_x

    d_keys: list[Tensor] = []
    d_values: list[Tensor] = []
    values = v.split(plan.chunk, 1)
    for chunk in range(len(values) - 1, -1, -1):
        errors, rules = group.errors[chunk], group.states[chunk]
        of_inputs = [d[chunk] for d in d_inputs]
        of_deltas = [d[chunk] for d in d_deltas]
        d_rules = [
            next_rule_backward(
                d_rules[i],
                rules[i],
                errors.inputs[i],
                errors.deltas[i],
                mix[i],
                chunk,
                d_mix[i],
                of_inputs[i],
                of_deltas[i],
            )
            for i in layers
        ]
        targets = [[d.weights] for d in d_rules]
        if d_anchor is not None:
            targets = [[*t, a] for t, a in zip(targets, d_anchor, strict=True)]
        at = weights_of([r.weights for r in rules], anchor)
        d_key, d_value = chunk_errors_backward(
            plan, at, values[chunk], errors, of_inputs, of_deltas, targets
        )
        d_keys.insert(0, d_key)
        d_values.insert(0, d_value)
    for d_rule, d_read in zip(d_rules, d_start, strict=True):
        d_rule.weights.add_(d_read.weights)
        if d_rule.momentum is not None and d_read.momentum is not None:
            d_rule.momentum.add_(d_read.momentum)

    pairs = [
        (t, slope)
        for identity, m in graph.items()
        for t, slope in zip(m, d_made[identity], strict=True)
        if t is not None and t.requires_grad
    ]
    outputs, slopes = zip(*pairs, strict=True)
    d_gates = list(torch.autograd.grad(outputs, leaves, slopes))
    return d_gates, (d_q, join(d_keys), join(d_values)), d_rules


class FusedScan(torch.autograd.Function):
    """The scan over groups, with the gradients above.

    Inputs: q, k, v, the distinct gates, then per layer the weights, the momentum if there is
    any, and the anchor if there is one.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        q, k, v, gates, rules, anchor = unpack(plan, tensors)
        network = plan.network
        keep = any(ctx.needs_input_grad)
        output, surprise = torch.empty_like(v), v.new_empty(v.shape[:2])
        length = k.shape[1]
        last = (length - 1) // plan.segment * plan.segment
        boundaries, groups = [], []
        for begin in range(0, length, plan.group):
            cut = slice(begin, begin + plan.group)
            if begin % plan.segment == 0 and begin > 0:
                boundaries.append(rules)
            z, rules, group = scan_group(
                plan, [g[:, cut] for g in gates], q[:, cut], k[:, cut], v[:, cut], rules, anchor
            )
            y = layer_norm(z)[0] if network.norm else z
            output[:, cut] = q[:, cut] + y if network.residual else y
            for chunk, errors in enumerate(group.errors):
                first = begin + chunk * plan.chunk
                norm = torch.linalg.vector_norm(errors.deltas[-1], dim=-1)
                surprise[:, first : first + plan.chunk] = norm
            if keep and begin >= last:
                groups.append(group)
        ctx.mark_non_differentiable(surprise)
        if keep:
            # All tensors are saved in the one way that checkpointing and offloading know of.
            kept, ctx.structure = tree_flatten(groups)
            starts = [t for rules in boundaries for t in flat(rules)]
            ctx.plan, ctx.counts = plan, (len(tensors), len(starts))
            ctx.save_for_backward(*tensors, *starts, *kept)
        return output, surprise, *flat(rules)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, _: Tensor, *d_final: Tensor) -> tuple[Any, ...]:
        plan, (given, before) = ctx.plan, ctx.counts
        saved = ctx.saved_tensors
        tensors, starts = saved[:given], saved[given : given + before]
        groups = tree_unflatten(saved[given + before :], ctx.structure)
        del saved  # each group is let go as soon as the walk has passed it
        ctx.maybe_clear_saved_tensors()
        q, k, v, gates, rules, anchor = unpack(plan, tensors)
        states = [rules]
        width = len(flat(rules))
        states += [unflat(plan, starts[at : at + width]) for at in range(0, len(starts), width)]
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        d_gates = [torch.empty_like(g) for g in gates]
        d_anchor = None if anchor is None else [torch.zeros_like(a) for a in anchor]
        d_rules = unflat(plan, d_final)
        for index in range(len(states) - 1, -1, -1):
            first = index * plan.segment
            begins = range(first, min(first + plan.segment, k.shape[1]), plan.group)
            if not groups:
                rules = states[index]
                for begin in begins:
                    cut = slice(begin, begin + plan.group)
                    of_gates = [g[:, cut] for g in gates]
                    _, rules, group = scan_group(
                        plan, of_gates, q[:, cut], k[:, cut], v[:, cut], rules, anchor
                    )
                    groups.append(group)
            for begin in reversed(begins):
                cut = slice(begin, begin + plan.group)
                of_gates, (d_q[:, cut], d_k[:, cut], d_v[:, cut]), d_rules = scan_group_backward(
                    plan,
                    groups.pop(),
                    [g[:, cut] for g in gates],
                    q[:, cut],
                    v[:, cut],
                    anchor,
                    d_output[:, cut],
                    d_rules,
                    d_anchor,
                )
                for target, slope in zip(d_gates, of_gates, strict=True):
                    target[:, cut] = slope
        return None, d_q, d_k, d_v, *d_gates, *flat(d_rules), *(d_anchor or [])


Inputs = tuple[Tensor, Tensor, Tensor, Sequence[Tensor], list[Rule], Sequence[Tensor] | None]


def unpack(plan: Plan, tensors: Sequence[Tensor]) -> Inputs:
    """q, k, v, gates, rules, anchor: the inputs of `FusedScan`."""
    q, k, v, *rest = tensors
    count = 1 + max(i for identity in plan.gates for i in identity if i is not None)
    width = plan.depth * (2 if plan.momentum else 1)
    gates, rules, fixed = rest[:count], rest[count : count + width], rest[count + width :]
    return q, k, v, gates, unflat(plan, rules), fixed or None


def flat(rules: Sequence[Rule]) -> list[Tensor]:
    """All weights, then all momenta."""
    momenta = [r.momentum for r in rules if r.momentum is not None]
    return [*(r.weights for r in rules), *momenta]


def unflat(plan: Plan, tensors: Sequence[Tensor]) -> list[Rule]:
    weights, momenta = tensors[: plan.depth], tensors[plan.depth :]
    past: Sequence[Tensor | None] = momenta or [None] * plan.depth
    return [Rule(w, s) for w, s in zip(weights, past, strict=True)]
