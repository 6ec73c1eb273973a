"""Adapted models in use: padding, beams, files, checkpointing, Trainer."""

import json
import re
from pathlib import Path

import pytest
import torch
from adapt_bases import DEEP, LINEAR, STYLES, base, some_tokens, trained
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import titans.inspect
from titans import ModelState
from titans.hf import TitansCache
from titans.hf.adapter import FILE_NAME, adapt, load_adapter

EXACT = {"rtol": 1e-10, "atol": 1e-10}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize(
    ("family", "window", "memory"), [("llama", 8, DEEP), ("gpt2", 8, LINEAR), ("qwen3", None, DEEP)]
)
@torch.no_grad()
def test_padding_is_not_read(family: str, window: int | None, memory) -> None:
    adapted, tokens = trained(family, "mag", window, memory), some_tokens()
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    output = adapted(tokens, attention_mask=mask)
    for row, begin in ((0, 0), (1, 5)):
        alone = adapted(tokens[row : row + 1, begin:])
        torch.testing.assert_close(output.logits[row, begin:], alone.logits[0], **EXACT)
        state = alone.past_key_values.state.tensors()
        for name, tensor in output.past_key_values.row(row).tensors().items():
            torch.testing.assert_close(tensor, state[name], **EXACT, msg=name)
    # Beyond the window, so that blocks of the rows end at different columns.
    together = adapted.generate(tokens, attention_mask=mask, **GREEDY)
    for row, begin in ((0, 0), (1, 5)):
        alone = adapted.generate(tokens[row : row + 1, begin:], **GREEDY)
        assert torch.equal(together[row, begin:], alone[0])


@torch.no_grad()
def test_it_has_what_a_model_of_ours_has() -> None:
    adapted, tokens = trained(window=8), some_tokens()
    inner = adapted.model
    losses = inner.losses(tokens, tokens).nll
    logits = inner(tokens)[0]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(losses.mean(), wanted.to(losses.dtype), rtol=1e-5, atol=1e-5)
    assert inner.tokenizer is None
    state = inner.init_state(1)
    for look in (titans.inspect.reach, lambda model: titans.inspect.memories(model, state)):
        with pytest.raises(ValueError, match="an adapted model cannot be looked into"):
            look(inner)


@pytest.mark.parametrize("style", STYLES)
def test_generate_carries_the_memory(style: str) -> None:
    """With its cache it generates what reading all from the start again does; greedy and beams."""
    adapted, tokens = trained(style=style, window=8), some_tokens()
    for beams in (1, 3):
        options = {**GREEDY, "num_beams": beams, "num_return_sequences": beams}
        wanted = adapted.generate(tokens, use_cache=False, **options)
        assert torch.equal(adapted.generate(tokens, **options), wanted)
        assert torch.equal(adapted.generate(tokens, prefill_chunk_size=3, **options), wanted)
    cache = adapted(tokens[:, :11]).past_key_values
    wanted = adapted.generate(tokens, **GREEDY)
    assert torch.equal(adapted.generate(tokens, past_key_values=cache, **GREEDY), wanted)


@torch.no_grad()
def test_the_cache_reorders_repeats_and_goes_to_a_file(tmp_path: Path) -> None:
    adapted, tokens = trained(window=8), some_tokens(length=30)
    wanted = adapted(tokens).logits[:, 20:]

    def rest(cache: TitansCache, rows: list[int]) -> torch.Tensor:
        return adapted(tokens[rows, 20:], past_key_values=cache).logits

    cache = adapted(tokens[:, :20]).past_key_values
    cache.state.save(tmp_path / "read.memory")
    loaded = TitansCache(ModelState.load(tmp_path / "read.memory"))
    torch.testing.assert_close(rest(loaded, [0, 1]), wanted, **EXACT)
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(rest(cache, [1, 0]), wanted[[1, 0]], **EXACT)
    cache = adapted(tokens[:, :20]).past_key_values
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(rest(cache, [0, 0, 1, 1]), wanted[[0, 0, 1, 1]], **EXACT)
    with pytest.raises(ValueError, match="cannot unread"):
        cache.crop(-1)
    cache.reset()
    assert torch.equal(adapted(tokens, past_key_values=cache).logits, adapted(tokens).logits)


def checkpointing(model) -> None:
    """By its newer name where there is one: the older one then warns."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("style", STYLES)
def test_checkpointing_keeps_what_was_read_and_its_gradients(family: str, style: str) -> None:
    """transformers' own checkpointing layers drop past_key_values without a word."""
    tokens = some_tokens()

    def losses_and_gradients(checkpointed: bool):
        adapted = trained(family, style, 8).train()
        if family == "gpt2":  # dropout off: two passes are compared
            adapted.base.eval()
        if checkpointed:
            checkpointing(adapted)
            assert adapted.model.gradient_checkpointing
        cache, losses = TitansCache(), []
        for piece in tokens.split([13, 7], 1):
            losses.append(adapted(piece, labels=piece, past_key_values=cache).loss)
        losses[1].backward()
        return torch.stack(losses).detach(), {n: p.grad for n, p in adapted.named_parameters()}

    plain, wanted = losses_and_gradients(False)
    got, gradients = losses_and_gradients(True)
    torch.testing.assert_close(got, plain, **EXACT)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], **EXACT, msg=name)
    assert gradients["model.memories.0.memory.gates.map.weight"].abs().max() > 0


@torch.no_grad()
def test_an_adapter_is_a_file_of_the_memories_alone(tmp_path: Path) -> None:
    adapted, tokens, path = trained(window=8), some_tokens(), tmp_path / "notes.safetensors"
    adapted.save_adapter(path)
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
    assert names == {name for name, _ in adapted.model.memories.named_parameters()}
    loaded = load_adapter(base(), path)
    assert loaded.adapter == adapted.adapter
    torch.testing.assert_close(loaded(tokens).logits, adapted(tokens).logits, **EXACT)
    # A state that one of them wrote is the other's too.
    cache = adapted(tokens).past_key_values
    wanted = adapted(tokens, past_key_values=TitansCache(cache.state)).logits
    torch.testing.assert_close(loaded(tokens, past_key_values=cache).logits, wanted, **EXACT)


def test_a_wrong_or_damaged_file_is_one_line(tmp_path: Path) -> None:
    adapted, path = trained(), tmp_path / "notes.safetensors"
    adapted.save_adapter(path)
    with pytest.raises(ValueError, match=r"made for a base whose model_type is llama, not qwen3"):
        load_adapter(base("qwen3"), path)
    with pytest.raises(ValueError, match="expected a causal language model"):
        load_adapter(base().model, path)
    with pytest.raises(ValueError, match="no such file"):
        load_adapter(base(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no such file"):
        load_adapter(base(), tmp_path)  # a folder without one
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged memory-adapter file") as error:
        load_adapter(base(), path)
    assert "\n" not in str(error.value)
    path.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_adapter(base(), path)
    adapted(some_tokens()).past_key_values.state.save(path)
    with pytest.raises(ValueError, match="not a memory-adapter file"):
        load_adapter(base(), path)


class Texts(torch.utils.data.Dataset):
    """Four of the tokens, each twice: quickly learned."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (some_tokens(1, 8, seed=index)[0] % 4).repeat_interleave(2)
        return {"input_ids": tokens, "labels": tokens}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trainer_trains_the_memories_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def trainer(**options: object) -> Trainer:
        model = base(dtype=torch.float32)
        torch.manual_seed(0)
        settings = {
            "output_dir": str(tmp_path),
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-2,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_steps": 4,
            "seed": 0,
        }
        return Trainer(
            model=adapt(model, [0, 2], "mal", window=8).freeze_base(),
            args=TrainingArguments(**{**settings, **options}),
            train_dataset=Texts(),
        )

    def losses(of: Trainer) -> list[float]:
        return [entry["loss"] for entry in of.state.log_history if "loss" in entry]

    first, untrained = trainer(), base(dtype=torch.float32)
    first.train()
    assert losses(first)[-1] < losses(first)[0] - 0.3
    for name, weight in first.model.base.named_parameters():
        assert torch.equal(weight, untrained.get_parameter(name)), name
    checkpointed = trainer(gradient_checkpointing=True, max_steps=2, save_strategy="no")
    checkpointed.train()
    assert losses(checkpointed) == pytest.approx(losses(first)[:2], rel=1e-5)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed)[-4:] == pytest.approx(losses(first)[-4:], rel=1e-5)
    # Its checkpoint is a folder of the base, with an adapter.
    folder = tmp_path / "checkpoint-8"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (folder / FILE_NAME).stat().st_size < 60_000
    again = load_adapter(AutoModelForCausalLM.from_pretrained(folder), folder)
    tokens = some_tokens()
    torch.testing.assert_close(again(tokens).logits, first.model.eval()(tokens).logits)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "adapt.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    scope: dict = {}
    exec(block, scope)
    assert ModelState.load("read.memory").position == 1000
    # The last token that was generated has not been read.
    assert scope["cache"].state.position == 1000 + scope["answer"].shape[1] - 1 > 1100
