"""Every baseline against an implementation or formula that is not ours.

Literal recurrences are written token by token with matrices, from the papers' equations; the
layer around them (projections, convolution, norm, gate) is written out below as well.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titans import MemoryConfig, TitansConfig, TitansLM
from titans.baselines import BASELINES
from titans.config import build, to_dict
from titans.layers.memory import NeuralMemory, at_decayed_memory
from titans.models.baselines.rwkv7 import RWKV7Mixer
from titans.ops import MemoryNetwork, RuleState, neural_memory
from titans.ops.native import BuildError, compiled
from titans.presets import count_parameters, matched, preset

DIM, HEADS, SIZE, LENGTH = 12, 2, 6, 37
RULES = [name for name, baseline in BASELINES.items() if baseline.memory]


def config_of(variant: str, **changes: object) -> TitansConfig:
    return TitansConfig(
        **{
            "variant": variant,
            "vocab_size": 31,
            "dim": DIM,
            "heads": HEADS,
            "layers": 2,
            "ffn_hidden": 16,
            "memory": MemoryConfig(heads=HEADS),
            **changes,
        }
    )


def memory_of(variant: str) -> NeuralMemory:
    """The variant's layer in float64, away from its initial values."""
    torch.manual_seed(0)
    layer = NeuralMemory(config_of(variant).memory).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def text(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, LENGTH, DIM, generator=generator, dtype=torch.float64).to(dtype)


def projections(layer: NeuralMemory, x: Tensor) -> list[Tensor]:
    """q, k, v, each (B, T, H, D), before any norm."""
    mixed = x @ layer.qkv.weight.T
    if layer.conv is not None:
        width = layer.conv.width
        before = torch.cat([torch.zeros_like(mixed[:, : width - 1]), mixed], 1)
        taps = (layer.conv.weight[j] * before[:, j : j + LENGTH] for j in range(width))
        mixed = sum(taps) + layer.conv.bias
    mixed = mixed * torch.sigmoid(mixed)
    return [part.unflatten(-1, (HEADS, SIZE)) for part in mixed.chunk(3, -1)]


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def gate_of(layer: NeuralMemory, x: Tensor, index: int) -> Tensor:
    """Pre-activation of the index-th gate, (B, T, H)."""
    raw = x @ layer.gates.map.weight.T + layer.gates.map.bias
    return raw[..., index * HEADS : (index + 1) * HEADS]


def emitted(layer: NeuralMemory, reads: Tensor, x: Tensor) -> Tensor:
    """RMSNorm per head, gate, output projection."""
    scale = (reads.square().mean(-1, keepdim=True) + layer.norm.eps).rsqrt()
    gate = x @ layer.output_gate.weight.T
    y = (reads * scale * layer.norm.weight).flatten(2) * gate * torch.sigmoid(gate)
    return y @ layer.output.weight.T


def recurrence(step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Reads of S (value, key), from S_t = step(S_{t-1}, k_t, v_t, index) and y_t = S_t q_t."""
    reads = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(HEADS):
            S = torch.zeros(SIZE, SIZE, dtype=torch.float64)
            for t in range(LENGTH):
                S = step(S, k[b, t, h], v[b, t, h], (b, t, h))
                reads[b, t, h] = S @ q[b, t, h]
    return reads


def assert_layer_is(layer: NeuralMemory, reads: Tensor, x: Tensor) -> None:
    y, _ = layer(x)
    torch.testing.assert_close(y, emitted(layer, reads, x), rtol=1e-9, atol=1e-10)


def test_linear_attention_is_a_sum_of_outer_products() -> None:
    """Katharopoulos et al., eq. 10: causal sums instead of a recurrence."""
    layer, x = memory_of("linear-attention"), text()
    q, k, v = projections(layer, x)
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
    assert_layer_is(layer, torch.einsum("bhts,bshd->bthd", scores, v), x)


def test_lightning_decays_at_a_fixed_rate_per_head() -> None:
    """Lightning attention: y_t = sum_s lambda^(t - s) (q_t k_s) v_s, as a masked product."""
    layer, x = memory_of("lightning"), text()
    q, k, v = projections(layer, x)
    _, _, alpha = layer.gates(x)
    keep = (1 - alpha)[0, 0]
    slopes = torch.tensor([1 / 32, 1 / 512], dtype=torch.float64)
    torch.testing.assert_close(keep, torch.exp(-slopes), rtol=1e-6, atol=0)
    steps = torch.arange(LENGTH)
    distance = (steps[:, None] - steps[None]).clamp(min=0)
    mask = (keep[:, None, None] ** distance).tril()
    scores = torch.einsum("bthd,bshd->bhts", q, k) * mask
    assert_layer_is(layer, torch.einsum("bhts,bshd->bthd", scores, v), x)


def test_deltanet_is_its_recurrence() -> None:
    """S_t = S_{t-1} (I - b k k^T) + b v k^T."""
    layer, x = memory_of("deltanet"), text()
    q, k, v = projections(layer, x)
    beta = torch.sigmoid(gate_of(layer, x, 0))

    def step(S, key, value, at):
        return S - beta[at] * torch.outer(S @ key - value, key)

    assert_layer_is(layer, recurrence(step, unit(q), unit(k), v), x)


def test_gated_deltanet_is_its_recurrence() -> None:
    """S_t = a S_{t-1} (I - b k k^T) + b v k^T, log a = -A softplus(.)."""
    layer, x = memory_of("gated-deltanet"), text()
    q, k, v = projections(layer, x)
    beta = torch.sigmoid(gate_of(layer, x, 0))
    scale = layer.gates.log_scale.exp()
    a = torch.exp(-scale * F.softplus(gate_of(layer, x, 1)))
    assert a.min() < 0.2

    def step(S, key, value, at):
        left = a[at] * (S - beta[at] * torch.outer(S @ key, key))
        return left + beta[at] * torch.outer(value, key)

    assert_layer_is(layer, recurrence(step, unit(q), unit(k), v), x)


@pytest.mark.parametrize("variant", ["ttt-linear", "ttt-mlp"])
def test_ttt_descends_its_published_loss_by_mini_batches(variant: str) -> None:
    """Sun et al.: W_t = W_{t-1} - eta_t grad l(W_{t'}; x_t), with l the squared distance of
    LN(f(k)) from v - k and t' the end of the mini-batch of 16 before; z = q + LN(f(q; W_t)).
    Gradients by autograd."""
    layer, x = memory_of(variant), text()
    q, k, v = projections(layer, x)
    q, k = unit(q), unit(k)
    peak = (1 if variant == "ttt-linear" else 0.1) / 16
    eta = peak * torch.sigmoid(gate_of(layer, x, 0))

    def network(weights, token):
        z = token @ weights[0]
        if len(weights) == 2:
            z = F.gelu(z) @ weights[1]
        return F.layer_norm(z, (SIZE,), eps=1e-5)

    reads = torch.zeros_like(v)
    for b in range(2):
        for h in range(HEADS):
            W = [w[h].detach() for w in layer.initial]
            for t in range(LENGTH):
                if t % 16 == 0:
                    base = [w.clone().requires_grad_() for w in W]
                target = v[b, t, h] - k[b, t, h]
                loss = 0.5 * (network(base, k[b, t, h]) - target).square().sum()
                slopes = torch.autograd.grad(loss, base, retain_graph=True)
                W = [w - eta[b, t, h] * g for w, g in zip(W, slopes, strict=True)]
                reads[b, t, h] = q[b, t, h] + network(W, q[b, t, h])
    assert_layer_is(layer, reads, x)


def test_gated_deltanet_is_qwen3_nexts_layer() -> None:
    """The whole layer of transformers with our weights, in its own float32."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    theirs_config = modeling.Qwen3NextConfig(
        hidden_size=DIM,
        num_hidden_layers=1,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=SIZE,
        linear_value_head_dim=SIZE,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5 / SIZE,  # their reads are divided by the root of the head size
        layer_types=["linear_attention"],
    )
    theirs = modeling.Qwen3NextGatedDeltaNet(theirs_config, 0)
    ours = memory_of("gated-deltanet").float()
    q, k, v = (part.unflatten(0, (HEADS, SIZE)) for part in ours.qkv.weight.data.chunk(3))
    z = ours.output_gate.weight.data.unflatten(0, (HEADS, SIZE))
    with torch.no_grad():
        theirs.in_proj_qkvz.weight.copy_(torch.cat([q, k, v, z], 1).flatten(0, 1))
        of_rate, of_decay = ours.gates.map.weight.split(HEADS)
        theirs.in_proj_ba.weight.copy_(torch.stack([of_rate, of_decay], 1).flatten(0, 1))
        ours.gates.map.bias[:HEADS] = 0.0
        theirs.dt_bias.copy_(ours.gates.map.bias[HEADS:])
        theirs.A_log.copy_(ours.gates.log_scale)
        ours.conv.bias.zero_()
        theirs.conv1d.weight.copy_(ours.conv.weight.T[:, None])
        theirs.norm.weight.copy_(ours.norm.weight)
        theirs.out_proj.weight.copy_(ours.output.weight)
        x = text(torch.float32)
        y, _ = ours(x)
        expected = theirs(x)
    assert expected.std() > 0.05
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)


def test_mamba2_is_transformers_mixer() -> None:
    """The whole mixer of transformers with our weights, one group a head."""
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    theirs_config = modeling.Mamba2Config(
        hidden_size=DIM,
        num_hidden_layers=1,
        num_heads=HEADS,
        head_dim=SIZE,
        expand=1,
        state_size=SIZE,
        n_groups=HEADS,
        conv_kernel=4,
        chunk_size=16,
        use_bias=False,
        use_conv_bias=True,
        layer_norm_epsilon=1e-5,
    )
    theirs = modeling.Mamba2Mixer(theirs_config, 0).eval()
    ours = memory_of("mamba2").float()
    with torch.no_grad():
        q, k, v = ours.qkv.weight.chunk(3)
        gates = ours.gates.map
        theirs.in_proj.weight.copy_(torch.cat([ours.output_gate.weight, v, k, q, gates.weight]))
        theirs.dt_bias.copy_(gates.bias)
        theirs.A_log.copy_(ours.gates.log_scale)
        theirs.D.copy_(ours.skip)
        for mine, target in (
            (ours.conv.weight.T[:, None], theirs.conv1d.weight),
            (ours.conv.bias, theirs.conv1d.bias),
        ):
            target.copy_(torch.cat(mine.chunk(3)[::-1]))
        theirs.norm.weight.copy_(ours.norm.weight.repeat(HEADS))
        theirs.out_proj.weight.copy_(ours.output.weight)
        x = text(torch.float32)
        y, _ = ours(x)
        expected = theirs(x)
    assert expected.std() > 0.05
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)


def test_transformer_is_llama() -> None:
    """The whole model of transformers with our weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = TitansLM(config_of("transformer", dim=16))
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            rms_norm_eps=torch.finfo(torch.float32).eps,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p += 0.3 * torch.randn_like(p)
        theirs.model.embed_tokens.weight.copy_(ours.embedding.weight)
        theirs.model.norm.weight.copy_(ours.norm.weight)
        for mine, yours in zip(ours.blocks, theirs.model.layers, strict=True):
            yours.input_layernorm.weight.copy_(mine.mixer_norm.weight)
            yours.post_attention_layernorm.weight.copy_(mine.ffn_norm.weight)
            parts = (yours.self_attn.q_proj, yours.self_attn.k_proj, yours.self_attn.v_proj)
            for part, weight in zip(parts, mine.mixer.qkv.weight.chunk(3), strict=True):
                part.weight.copy_(weight)
            yours.self_attn.o_proj.weight.copy_(mine.mixer.output.weight)
            for name in ("gate", "up", "down"):
                weight = getattr(mine.ffn, name).weight
                getattr(yours.mlp, f"{name}_proj").weight.copy_(weight)
        tokens = torch.randint(0, 31, (2, LENGTH), generator=torch.Generator().manual_seed(3))
        logits, _ = ours(tokens)
        expected = theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_rwkv7_is_the_papers_time_mixing() -> None:
    """Peng et al., RWKV-7, eq. 3-17 but for the value residual, token by token."""
    torch.manual_seed(0)
    mixer = RWKV7Mixer(config_of("rwkv7")).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.3 * torch.randn_like(p)
    x = text()

    def low_rank(part, token, activation):
        y = part.expand.weight @ activation(part.squeeze.weight @ token)
        return y if part.expand.bias is None else y + part.expand.bias

    expected = torch.zeros_like(x)
    for b in range(2):
        S = torch.zeros(HEADS, SIZE, SIZE, dtype=torch.float64)  # (value, key)
        last = torch.zeros(DIM, dtype=torch.float64)
        for t in range(LENGTH):
            now = x[b, t]
            r_in, w_in, k_in, v_in, a_in, g_in = (torch.lerp(now, last, mu) for mu in mixer.blend)
            last = now
            r, k = mixer.receptance.weight @ r_in, mixer.key.weight @ k_in
            v = mixer.value.weight @ v_in
            d = low_rank(mixer.decay, w_in, torch.tanh)
            w = torch.exp(-math.exp(-0.5) * torch.sigmoid(d))
            a = torch.sigmoid(low_rank(mixer.rate, a_in, lambda z: z))
            g = low_rank(mixer.gate, g_in, torch.sigmoid)
            kappa = k * mixer.removal_scale
            k = k * (1 + (a - 1) * mixer.replacement)
            p = []
            for h in range(HEADS):
                at = slice(h * SIZE, (h + 1) * SIZE)
                c = unit(kappa[at])
                S[h] = S[h] @ (torch.diag(w[at]) - torch.outer(c, a[at] * c))
                S[h] = S[h] + torch.outer(v[at], k[at])
                read = S[h] @ r[at]
                normed = (read - read.mean()) / (read.var(correction=0) + 64e-5).sqrt()
                normed = normed * mixer.norm_gain[at] + mixer.norm_bias[at]
                p.append(normed + (r[at] * mixer.bonus[at]) @ k[at] * v[at])
            expected[b, t] = mixer.output.weight @ (g * torch.cat(p))
    y, _, _ = mixer(x, mixer.init_state(2))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)


def test_h2_alternates_gated_deltanet_and_sliding_attention() -> None:
    torch.manual_seed(0)
    model = TitansLM(config_of("gated-deltanet-h2", layers=4, window=5)).double()
    x = text()
    for layer, variant in ((0, "gated-deltanet"), (1, "sliding"), (3, "sliding")):
        mixer = TitansLM(config_of(variant, window=5)).double().blocks[0].mixer
        mixer.load_state_dict(model.blocks[layer].mixer.state_dict())
        assert torch.equal(
            mixer(x, mixer.init_state(2))[0],
            model.blocks[layer].mixer(x, model.blocks[layer].mixer.init_state(2))[0],
        )


@pytest.mark.parametrize("low", [0.3, 1e-5])
def test_the_gradient_at_the_decayed_memory(low: float) -> None:
    """The mapping onto the rule with its gradients, also where almost everything is forgotten."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(1, 20, 1, 4), F.normalize(normal(1, 20, 1, 4), dim=-1), normal(1, 20, 1, 4)
    keep = low + (1 - low) * torch.rand(1, 20, 1, generator=generator, dtype=torch.float64)
    keep[:, 5:9] = low
    beta = torch.sigmoid(normal(1, 20, 1))
    leaves = [x.requires_grad_() for x in (q, k, v, keep, beta)]

    rate, alpha, target = at_decayed_memory(beta, 1 - keep, v)
    result = neural_memory(
        q,
        k,
        target,
        rate,
        decay=alpha,
        state=RuleState.init([torch.zeros(1, 4, 4, dtype=torch.float64)], 1, momentum=False),
        network=MemoryNetwork(depth=1, residual=False, norm=False),
    )
    S, reads = torch.zeros(4, 4, dtype=torch.float64), []
    for t in range(20):
        key = k[0, t, 0]
        S = keep[0, t, 0] * S
        S = S - beta[0, t, 0] * torch.outer(S @ key - v[0, t, 0], key)
        reads.append(S @ q[0, t, 0])
    expected = torch.stack(reads)[None, :, None]
    torch.testing.assert_close(result.output, expected, rtol=1e-9, atol=1e-9)
    for mine, yours in zip(
        torch.autograd.grad(result.output.sin().sum(), leaves),
        torch.autograd.grad(expected.sin().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, yours, rtol=1e-8, atol=1e-8)


def test_a_memory_that_forgets_all_stays_finite() -> None:
    layer = memory_of("gated-deltanet").float()
    with torch.no_grad():
        layer.gates.log_scale += 8.0  # a = exp(-3000 softplus(.)) is zero in float32
    x = text(torch.float32).requires_grad_()
    y, state = layer(x)
    y.square().sum().backward()
    state.check_finite()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in (x, *layer.parameters()))


@pytest.mark.parametrize("variant", RULES)
def test_rule_baselines_run_compiled(variant: str) -> None:
    """impl="native" refuses what it cannot do; for these it must not."""
    try:
        compiled(torch.float32)
    except BuildError:
        pytest.skip("no C compiler")
    memory = replace(config_of(variant).memory, impl="native")
    y, _ = NeuralMemory(memory)(text(torch.float32))
    assert y.isfinite().all()


@pytest.mark.parametrize("variant", RULES)
def test_a_variant_means_its_rule(variant: str) -> None:
    config = config_of(variant, memory=MemoryConfig(heads=1, learning_rate_init=0.3))
    for name, value in BASELINES[variant].memory.items():
        assert getattr(config.memory, name) == value
    assert (config.memory.heads, config.memory.learning_rate_init) == (1, 0.3)
    assert build(TitansConfig, to_dict(config)) == config
    assert replace(config, window=9).memory == config.memory


@pytest.mark.parametrize(
    ("variant", "memory", "message"),
    [
        ("deltanet", {"depth": 2}, r"memory.depth is 1 in variant 'deltanet', got 2; other rules"),
        ("gated-deltanet", {"gates": "sigmoid"}, "memory.gates is 'exponential'"),
        ("ttt-mlp", {"chunk_size": 8}, "memory.chunk_size is 16 in variant 'ttt-mlp', got 8"),
        ("lmm", {"decay_first": True}, "decay_first needs a linear memory"),
        (
            "lmm",
            {"decay_first": True, "decay_target": "zero", "per_layer_gates": True},
            "decay_first needs .* no per_layer_gates",
        ),
        ("lmm", {"learn_initial": False, "depth": 2}, "learn_initial = false needs a linear"),
        ("lmm", {"gate_before_norm": True, "output_gate": False}, "needs output_gate"),
        ("lmm", {"decay": "channel", "decay_rank": 2, "gates": "step"}, "decay_rank needs a map"),
    ],
)
def test_contradictory_memories_are_refused(variant: str, memory: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(variant, memory=MemoryConfig(**memory))


@pytest.mark.parametrize("variant", [*BASELINES, "mac"])
def test_matched_parameters(variant: str) -> None:
    """Counted on the real model; the paper's own size is another story (tests/test_config.py)."""
    base = preset("mag-small")
    target = count_parameters(base)
    config = matched(base, variant, target)
    assert config.variant == variant
    assert config.ffn_hidden % 8 == 0
    assert abs(TitansLM(config).parameter_count / target - 1) < 0.02
    assert (config.layers, config.dim, config.memory.heads) == (4, 128, 2)


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(ValueError, match=r"variant 'rwkv7' of this width has .* expected 100,000"):
        matched(preset("mag-small"), "rwkv7", 100_000)
    rival = matched(preset("mag-small"), "gated-deltanet", 10_000_000)
    with pytest.raises(ValueError, match="the memory of this config is 'gated-deltanet''s: match"):
        matched(rival, "lmm", 10_000_000)
