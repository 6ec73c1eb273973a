"""What `adapt` computes: nothing new at first, then the base with memories, in any pieces."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from adapt_bases import DEEP, FAMILIES, LINEAR, POSITIONS, STYLES, base, some_tokens, trained
from torch.nn import functional as F
from transformers import BertConfig, BertModel, DynamicCache

import titans
from titans import MemoryConfig, ModelState
from titans.hf import TitansCache
from titans.hf.adapter import adapt

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_at_first_the_outputs_are_the_bases_bit_for_bit(
    family: str, style: str, attention: str
) -> None:
    tokens = some_tokens()
    for dtype in (torch.float32, torch.bfloat16):
        model = base(family, dtype, attention)
        wanted = model(tokens, output_hidden_states=True)
        for window in (None, 20):  # the text is no longer than the window
            adapted = adapt(model, [0, 2], style, window=window)
            got = adapted(tokens, output_hidden_states=True)
            assert torch.equal(got.logits, wanted.logits)
            assert all(map(torch.equal, got.hidden_states, wanted.hidden_states))
        first = model(tokens[:, :12], use_cache=True)
        second = model(tokens[:, 12:], past_key_values=first.past_key_values)
        adapted = adapt(model, [1], style)
        ours = adapted(tokens[:, :12])
        assert torch.equal(ours.logits, first.logits)
        again = adapted(tokens[:, 12:], past_key_values=ours.past_key_values)
        assert torch.equal(again.logits, second.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_first_it_generates_what_the_base_does(family: str) -> None:
    model, tokens = base(family), some_tokens()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    adapted = adapt(model, [0, 2])
    assert torch.equal(adapted.generate(tokens, **options), model.generate(tokens, **options))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    wanted = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(adapted.generate(tokens, attention_mask=mask, **options), wanted)


def by_hooks(adapted, tokens: torch.Tensor) -> torch.Tensor:
    """The base's own forward pass, with the memories called from hooks into its modules."""
    model, style = adapted.base, adapted.adapter.style
    decoder = model.transformer if hasattr(model, "transformer") else model.model
    handles = []

    def add_memory(layer, beside) -> None:
        norm = getattr(layer, "input_layernorm", None) or layer.ln_1
        attention = getattr(layer, "self_attn", None) or layer.attn
        if style == "mal":
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, given: (given[0] + beside.memory(norm(given[0]))[0], *given[1:])
                )
            )
            return
        seen = []
        handles.append(norm.register_forward_hook(lambda _, given, out: seen.append(out)))

        def after(_, given, out):
            y, m = out[0], beside.memory(seen[-1])[0]
            size = y.shape[-1]
            a = F.rms_norm(y, (size,), beside.combine.attention_norm.weight)
            b = F.rms_norm(m, (size,), beside.combine.memory_norm.weight)
            return y + (a * F.silu(b)) @ beside.output.weight.T, *out[1:]

        handles.append(attention.register_forward_hook(after))

    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    for index, beside in adapted.model.memories.items():
        add_memory(layers[int(index)], beside)
    logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_is_the_base_with_memories_hooked_in(family: str, style: str) -> None:
    tokens = some_tokens()
    adapted = trained(family, style, memory=DEEP if family == "qwen3" else LINEAR)
    wanted = by_hooks(adapted, tokens)
    torch.testing.assert_close(adapted(tokens).logits, wanted, **EXACT)
    assert (wanted - adapted.base(tokens).logits).abs().max() > 0.1


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_any_split_gives_the_same_outputs_and_state(
    family: str, style: str, window: int | None
) -> None:
    tokens = some_tokens(length=45)
    adapted = trained(family, style, window, DEEP if family == "llama" else LINEAR)
    wanted = adapted(tokens)
    for sizes in ([1] * 45, [7, 1, 0, 8, 29], [8, 16, 21]):
        cache, logits = TitansCache(), []
        for piece in tokens.split(sizes, 1):
            if piece.shape[1]:
                logits.append(adapted(piece, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(logits, 1), wanted.logits, **EXACT)
        state = wanted.past_key_values.state.tensors()
        for name, tensor in cache.state.tensors().items():
            torch.testing.assert_close(tensor, state[name], **EXACT, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_window_is_the_bases_attention_under_a_band(family: str) -> None:
    """Against transformers' own loop with a mask, at positions that go on growing. The base rounds
    its rotations to float32: so does the comparison."""
    tokens, model = some_tokens(length=45), base(family)
    index = torch.arange(45)
    band = (index[None] <= index[:, None]) & (index[None] > index[:, None] - 8)
    masks = band[None, None].expand(2, 1, 45, 45)
    if family == "qwen2":
        masks = {"full_attention": masks, "sliding_attention": masks}
    wanted = model(tokens, attention_mask=masks, use_cache=False).logits
    got = adapt(model, [1], window=8)(tokens).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (model(tokens).logits - wanted).abs().max() > 1e-2


@torch.no_grad()
def test_gpt2_begins_anew_every_window() -> None:
    """Learned positions cannot be moved: only the memory crosses the border."""
    tokens, model = some_tokens(length=45), base("gpt2")
    wanted = torch.cat([model(piece).logits for piece in tokens.split(8, 1)], 1)
    torch.testing.assert_close(adapt(model, [1], window=8)(tokens).logits, wanted, **EXACT)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 40
    adapted = trained("gpt2", window=8)
    assert (adapted(changed).logits - adapted(tokens).logits)[:, 40:].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_with_a_window_positions_and_state_stay_bounded(family: str) -> None:
    adapted, seen, sizes = trained(family, window=8), [], []
    decoder = adapted.model.decoder
    if family == "llama":
        decoder.rotary_emb.register_forward_pre_hook(
            lambda _, given, named: seen.append(named["position_ids"].max()), with_kwargs=True
        )
    else:
        decoder.wpe.register_forward_pre_hook(lambda _, given: seen.append(given[0].max()))
    cache = TitansCache()
    for piece in some_tokens(length=3 * POSITIONS).split(16, 1):
        adapted(piece, past_key_values=cache)
        sizes.append(cache.state.nbytes)
    assert max(seen) == (15 if family == "llama" else 7)
    assert len(set(sizes)) == 1


@torch.no_grad()
def test_the_model_inside_streams_like_any_titans_model() -> None:
    adapted, tokens = trained(window=8), some_tokens(length=45)
    state, last = None, []
    for reading in titans.stream(adapted.model, tokens, piece=11):
        state, last = reading.state, [*last, reading.nll]
    logits = adapted(tokens).logits[:, :-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(torch.cat(last, 1)[:, 1:], wanted.view(2, -1).float())
    assert state.position == 45
    adapted.model.check_state(state, 2)


def test_the_base_is_not_touched_and_can_be_taken_back() -> None:
    model, tokens = base(), some_tokens()
    names, wanted = list(model.state_dict()), model(tokens).logits
    adapted = adapt(model, [0, 2]).freeze_base()
    optimizer = torch.optim.SGD(adapted.memory_parameters(), 1.0)
    adapted(tokens, labels=tokens).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert not torch.equal(adapted(tokens).logits, wanted)
    assert torch.equal(adapted.base(tokens).logits, wanted)
    assert list(model.state_dict()) == names
    adapted.freeze_base(False)
    assert all(p.requires_grad for p in adapted.parameters())
    own = sum(p.numel() for p in model.parameters())
    memories = sum(p.numel() for p in adapted.memory_parameters())
    assert sum(p.numel() for p in adapted.parameters()) == own + memories


@torch.no_grad()
def test_in_a_bf16_base_the_memory_stays_float32() -> None:
    adapted = trained(dtype=torch.bfloat16)
    assert {p.dtype for p in adapted.memory_parameters()} == {torch.float32}
    output = adapted(some_tokens())
    assert output.logits.dtype == torch.bfloat16
    state = output.past_key_values.state
    assert state.blocks[0].keys.dtype == torch.bfloat16
    assert state.blocks[0].memory.rule.weights[0].dtype == torch.float32
    # What the memory computes is not rounded to bf16 on its way: its own input is all it lacks.
    seen = adapted.base.model.layers[0].input_layernorm(
        adapted.base.model.embed_tokens(some_tokens())
    )
    wanted = adapted.model.memories["0"].memory(seen.float())[1].rule.weights[0]
    assert torch.equal(state.blocks[0].memory.rule.weights[0], wanted)


def test_embeddings_can_be_resized() -> None:
    adapted, tokens = trained(), some_tokens()
    wanted, state = adapted(tokens).logits.detach(), adapted(tokens).past_key_values.state
    adapted.resize_token_embeddings(50)
    assert adapted.base.config.vocab_size == 50
    logits = adapted(
        tokens, past_key_values=TitansCache(ModelState.rebuild(state.structure(), state.tensors()))
    ).logits
    assert logits.shape[-1] == 50
    torch.testing.assert_close(adapted(tokens).logits[..., :40].detach(), wanted, **EXACT)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": []}, r"distinct layers of 0 ... 2, got \[\]"),
        ({"layers": [1, 3]}, r"distinct layers of 0 ... 2, got \[1, 3\]"),
        ({"layers": [1, 1]}, r"got \[1, 1\]"),
        ({"layers": [-1]}, r"got \[-1\]"),
        ({"layers": [0], "style": "mac"}, "mac"),
        ({"layers": [0], "window": 0}, "window must be at least 1, got 0"),
        ({"layers": [0], "window": 33}, "window of 33 needs 66 positions, the base has 64"),
        ({"layers": [0], "memory": MemoryConfig(heads=3)}, "multiple of heads"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict, message: str, without_shape_checks) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(base(), **given)


def test_other_models_are_refused() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(intermediate_size=16, vocab_size=40, **small))
    with pytest.raises(ValueError, match="expected a causal language model of type llama"):
        adapt(bert, [0])
    with pytest.raises(ValueError, match="LlamaModel"):  # without a head
        adapt(base().model, [0])
    with pytest.raises(ValueError, match="adapted already"):
        adapt(adapt(base(), [0]), [1])
    model = base()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    with pytest.raises(ValueError, match="got 'dynamic'"):
        adapt(model, [0], window=8)


def test_misuse_is_an_error_and_not_another_result() -> None:
    adapted, tokens = trained(), some_tokens()
    with pytest.raises(ValueError, match="must be a TitansCache, got DynamicCache"):
        adapted(tokens, past_key_values=DynamicCache())
    other = trained(memory=replace(LINEAR, heads=4))
    with pytest.raises(ValueError, match="belongs to another model"):
        other(tokens, past_key_values=adapted(tokens).past_key_values)
    adapted.base.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="expected attention 'sdpa' or 'eager'"):
        adapted(tokens)
    with pytest.raises(ValueError, match="the base has 64 positions, the text 65 tokens"):
        trained("gpt2")(some_tokens(length=65))
    with pytest.raises(ValueError, match="then titans"):
        type(adapted).from_pretrained("folder")
    with pytest.raises(ValueError, match="save_adapter"):
        adapted.model.save("model.safetensors")


def test_it_is_a_public_name_that_imports_transformers_only_when_used() -> None:
    assert titans.adapt is adapt
    code = (
        "import sys\n"
        "import titans\n"
        "assert 'transformers' not in sys.modules\n"
        "assert {'adapt', 'load_adapter'} <= set(dir(titans))\n"
        "sys.modules['transformers'] = None\n"
        "try:\n"
        "    titans.adapt\n"
        "except ImportError as error:\n"
        "    assert \"pip install -e '.[hf]'\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
        "assert not hasattr(titans, 'adopt')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
