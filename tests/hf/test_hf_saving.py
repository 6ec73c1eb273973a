"""Folders: what is saved loads as it was, also where only transformers is, and converts back."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import KINDS, small, small_config, some_tokens, wrapped
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import titans
from titans import TitansLM
from titans.cli import main
from titans.config import VARIANTS
from titans.data.tokenizers import BPETokenizer, ByteTokenizer
from titans.hf import TitansForCausalLM, TitansHFConfig
from titans.hf.convert import for_transformers, from_folder
from titans.hf.folder import code_files


def in_memory(model: TitansForCausalLM) -> TitansForCausalLM:
    """A copy whose weights do not lie in the file, at odd addresses there: matrix products of the
    same numbers are rounded differently with them."""
    return copy.deepcopy(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_keeps_every_field(variant: str, tmp_path: Path) -> None:
    config = small_config(variant, tie_embeddings=False)
    TitansHFConfig.from_titans(config, eos_token_id=3).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_titans() == config
    assert loaded.eos_token_id == 3
    assert (loaded.hidden_size, loaded.num_hidden_layers) == (16, 2)
    assert loaded.tie_word_embeddings is False


def test_config_takes_transformers_names_and_refuses_wrong_values() -> None:
    config = TitansHFConfig(
        hidden_size=32, num_hidden_layers=3, memory=titans.MemoryConfig(heads=4)
    )
    assert (config.dim, config.layers, config.memory["heads"]) == (32, 3, 4)
    assert not hasattr(config, "layer_types")  # refused on saving, unless from a fixed list
    with pytest.raises(ValueError, match=r"unknown key 'memory\.head'"):
        TitansHFConfig(memory={"head": 4})
    with pytest.raises(ValueError, match="variant"):
        TitansHFConfig(variant="mca")


@pytest.mark.parametrize(("kind", "tied"), [*((kind, True) for kind in KINDS), ("mac", False)])
def test_a_folder_loads_as_it_was_saved(kind: str, tied: bool, tmp_path: Path) -> None:
    model, tokens = wrapped(kind, tie_embeddings=tied), some_tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is TitansForCausalLM
    assert not loaded.training
    assert torch.equal(in_memory(loaded)(tokens).logits, model(tokens).logits)
    assert (loaded.model.head.weight is loaded.model.embedding.weight) is tied
    assert ("model.head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    # Buffers outside of the file would come back as whatever lay in memory: there are none.
    assert not list(loaded.named_buffers())


def test_stored_in_bf16_the_memory_stays_in_float32(tmp_path: Path) -> None:
    model = wrapped("mac-deep").float()
    model.save_pretrained(tmp_path / "single")
    half = TitansForCausalLM.from_pretrained(tmp_path / "single", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    loaded = TitansForCausalLM.from_pretrained(tmp_path / "half")  # as stored
    kept = 0
    for name, parameter in loaded.named_parameters():
        fine = "initial" in name or "gates" in name
        assert parameter.dtype == (torch.float32 if fine else torch.bfloat16), name
        if fine:
            kept += 1
            assert torch.equal(parameter, model.get_parameter(name)), name
    assert kept > 0
    output = loaded(some_tokens())
    for name, tensor in output.past_key_values.state.tensors().items():
        if ".rule." in name:
            assert tensor.dtype == torch.float32, name
    reference = model(some_tokens()).logits
    error = (output.logits.float() - reference).abs().max() / reference.abs().max()
    assert error < 0.2
    upcast = TitansForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert {p.dtype for p in upcast.parameters()} == {torch.float32}


def test_weights_missing_in_a_folder_start_as_in_a_new_model(tmp_path: Path) -> None:
    model = wrapped("mac-deep")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    missing = [n for n in tensors if "blocks.1" in n and ("gates" in n or "initial" in n)]
    kept = {n: t for n, t in tensors.items() if n not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = TitansForCausalLM.from_pretrained(tmp_path)
    fresh = dict(TitansLM(small_config("mac-deep")).double().named_parameters())
    for name, parameter in loaded.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name]), name
        elif name.endswith("map.bias"):  # half-lives and rates, the same in every new model
            assert torch.allclose(parameter, fresh[name.removeprefix("model.")], atol=1e-6), name
    assert missing
    assert torch.isfinite(loaded(some_tokens()).logits).all()


def test_a_missing_embedding_is_drawn_and_told(tmp_path: Path) -> None:
    """Tied to the head, it must not count as loaded: it would have no numbers at all."""
    model = wrapped("mac").float()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.embedding.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = TitansForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert "model.embedding.weight" in report["missing_keys"]
    assert 0.01 < float(loaded.model.embedding.weight.detach().std()) < 0.04
    assert loaded.model.head.weight is loaded.model.embedding.weight
    for name, tensor in stored.items():
        assert torch.equal(loaded.get_parameter(name), tensor), name
    with pytest.raises(ValueError, match="weights do not fit the config"):
        from_folder(tmp_path)


def test_weights_are_drawn_once(tmp_path: Path) -> None:
    """transformers and its users call `post_init` again, e.g. after resizing the embeddings."""
    model = TitansForCausalLM(TitansHFConfig.from_titans(small_config("mac", tie_embeddings=False)))
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path)
    for some in (model, wrapped("mac"), TitansForCausalLM.from_pretrained(tmp_path)):
        before = {name: p.clone() for name, p in some.named_parameters()}
        some.post_init()
        assert all(torch.equal(p, before[name]) for name, p in some.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_can_be_resized(tied: bool, tmp_path: Path) -> None:
    model, tokens = wrapped("mag", tie_embeddings=tied), some_tokens()
    before = model(tokens).logits
    model.resize_token_embeddings(50, mean_resizing=False)
    assert model.config.vocab_size == model.model.config.vocab_size == 50
    assert (model.model.head.weight is model.model.embedding.weight) is tied
    torch.testing.assert_close(model(tokens).logits[..., :40], before)
    assert 0 < model.model.embedding.weight[40:].std() < 0.05  # as new ones, not nn.Embedding's 1
    assert model(tokens + 10).logits.shape == (2, 11, 50)
    model.save_pretrained(tmp_path)
    loaded = TitansForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(in_memory(loaded)(tokens).logits, model(tokens).logits)


ALONE = """
import sys
for name in ("titans", "einops", "jaxtyping"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM
folder, again, result = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
tokens = torch.arange(22).view(2, 11)
mask = torch.ones_like(tokens)
mask[0, :4] = 0
options = {"max_new_tokens": 4, "pad_token_id": 0, "num_beams": 2, "do_sample": False}
torch.save(
    {
        "logits": model(tokens, attention_mask=mask).logits.detach(),
        "text": model.generate(tokens, attention_mask=mask, **options),
    },
    result,
)
model.save_pretrained(again)
"""


@pytest.mark.parametrize("kind", ["mac-deep", pytest.param("rwkv7", marks=pytest.mark.slow)])
def test_a_folder_loads_where_only_transformers_is(kind: str, tmp_path: Path) -> None:
    """In a fresh process without this package, and what that process saves again does too."""
    model = wrapped(kind)
    model.save_pretrained(tmp_path / "a")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment["HF_HUB_OFFLINE"] = "1"
    for source, target in (("a", "b"), ("b", "c")):
        paths = [str(tmp_path / name) for name in (source, target, f"{target}.pt")]
        done = subprocess.run(
            [sys.executable, "-c", ALONE, *paths], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert "slower" not in done.stderr
    tokens = torch.arange(22).view(2, 11)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    options = {"max_new_tokens": 4, "pad_token_id": 0, "num_beams": 2, "do_sample": False}
    text = model.generate(tokens, attention_mask=mask, **options)
    for name in ("b.pt", "c.pt"):
        result = torch.load(tmp_path / name)
        logits = model(tokens, attention_mask=mask).logits
        # Not bit for bit: the compiled form of the rule is not in the folder.
        torch.testing.assert_close(result["logits"], logits, rtol=1e-10, atol=1e-10)
        assert torch.equal(result["text"], text)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "c").iterdir()}


def test_the_installed_package_goes_before_the_copy(
    tmp_path: Path, tmp_path_factory, monkeypatch
) -> None:
    modules = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("sys.path", [*sys.path])
    wrapped("lmm").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is TitansForCausalLM
    again = tmp_path / "again"
    loaded.save_pretrained(again)  # a class of remote code: transformers would copy one file of it
    assert {p.name for p in again.iterdir()} == {p.name for p in tmp_path.iterdir()} - {"again"}
    assert json.loads((again / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_titans.TitansHFConfig",
        "AutoModelForCausalLM": "modeling_titans.TitansForCausalLM",
    }


def test_the_stand_ins_do_what_einops_does() -> None:
    import einops

    from titans.hf import standins

    x = torch.randn(2, 3, 12)
    for pattern, sizes in [
        ("b t (n h d) -> n b h t d", {"n": 3, "h": 2}),
        ("b t (s h c) -> s b t h c", {"s": 1, "h": 4}),
        ("b t c -> (c b) t", {}),
        ("b t (h c) -> b h (t c)", {"c": 6}),
    ]:
        wanted = einops.rearrange(x, pattern, **sizes)
        assert torch.equal(standins.rearrange(x, pattern, **sizes), wanted), pattern
    y, pattern = torch.randn(2, 12, 5), "b t h, b h k -> b t k"
    assert torch.equal(standins.einsum(x, y, pattern), einops.einsum(x, y, pattern))


def test_the_code_of_a_folder_imports_nothing_else() -> None:
    import ast

    from titans.hf import standins

    known = {"torch", "transformers", "numpy", "safetensors", *sys.stdlib_module_names}
    for name, text in code_files().items():
        tree = ast.parse(text)
        guarded = {id(n) for t in ast.walk(tree) if isinstance(t, ast.Try) for n in ast.walk(t)}
        for node in ast.walk(tree):
            if id(node) in guarded:
                continue
            if isinstance(node, ast.ImportFrom) and node.module == "titans_hf_standins":
                missing = {a.name for a in node.names} - set(vars(standins))
                assert not missing, (name, missing)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in known, (name, node.module)
            elif isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= known, name


@pytest.mark.parametrize("kind", ["mac-deep", "transformer"])
def test_convert_there_and_back(kind: str, tmp_path: Path, capsys) -> None:
    model, tokens = small(kind).float(), some_tokens()
    source, folder, back = (
        tmp_path / name for name in ("a.safetensors", "folder", "b.safetensors")
    )
    model.save(source)
    main(["convert", str(source), str(folder)])
    main(["convert", str(folder), str(back), "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["parameters"] == model.parameter_count
    wanted = model(tokens)[0]
    loaded = in_memory(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(loaded(tokens).logits, wanted)
    assert torch.equal(titans.load(back)(tokens)[0], wanted)
    assert titans.load(back).config_hash == model.config_hash  # its memories stay its own


def test_convert_brings_the_byte_tokenizer(tmp_path: Path) -> None:
    config = small_config("lmm", vocab_size=257)
    TitansLM(config).save(tmp_path / "a.safetensors")
    main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "folder")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert model.config.eos_token_id == tokenizer.eos_token_id == 256
    text = "Zürich «4821»\n\t naïve \x00 Ω 漢字"
    assert tokenizer(text)["input_ids"] == ByteTokenizer().encode(text)
    assert tokenizer.decode(ByteTokenizer().encode(text)) == text
    batch = tokenizer(["ab", "abcd"], return_tensors="pt", padding=True)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert model.generate(**batch, max_new_tokens=2).shape[0] == 2


def test_a_trained_tokenizer_keeps_its_ids(tmp_path: Path) -> None:
    ours = BPETokenizer.train(
        ["to be or not to be, that is the question"] * 20, 280, tmp_path / "t"
    )
    text = "not to be <|endoftext|>?"
    theirs = for_transformers(ours)
    assert theirs.eos_token_id == ours.end_of_document
    assert theirs("not to be?")["input_ids"] == ours.encode("not to be?")
    assert theirs.decode(ours.encode(text)) == text


def test_what_convert_refuses(tmp_path: Path, capsys) -> None:
    def error(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["convert", *map(str, arguments)])
        assert exit_.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "no such file" in error(tmp_path / "none", tmp_path / "x")
    assert "holds no config.json" in error(tmp_path, tmp_path / "x")
    file = tmp_path / "a.safetensors"
    small("lmm").save(file)
    assert "is a file, expected a folder" in error(file, file)
    step = tmp_path / "step-000001"  # a checkpoint's folder, which a resumed run goes on from
    step.mkdir()
    small("lmm").save(step / "model.safetensors")
    content = (step / "model.safetensors").read_bytes()
    assert "holds a model file that would be replaced" in error(step / "model.safetensors", step)
    assert (step / "model.safetensors").read_bytes() == content
    llama = tmp_path / "llama"  # of someone else
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama"}')
    (llama / "model-00001-of-00002.safetensors").write_bytes(b"weights")
    before = {path: path.read_bytes() for path in llama.iterdir()}
    assert "holds other files, expected a new or empty folder" in error(file, llama)
    assert {path: path.read_bytes() for path in llama.iterdir()} == before
    wrong = error(file, tmp_path / "f", "--tokenizer", "bytes")
    assert "has 257 tokens, the model 40: name the one" in wrong
    wrapped("lmm").save_pretrained(tmp_path / "g")
    main(["convert", str(file), str(tmp_path / "g")])  # a folder like this is made anew
    assert "is a folder" in error(tmp_path / "g", tmp_path)
    assert "--tokenizer" in error(tmp_path / "g", tmp_path / "x", "--tokenizer", "bytes")
    assert "is read here" in error(tmp_path / "g", tmp_path / "g" / "model.safetensors")
    tensors = load_file(tmp_path / "g" / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "g" / "model.safetensors", metadata={"format": "pt"})
    assert "do not fit the config (model.norm.weight)" in error(tmp_path / "g", tmp_path / "x")
    whole = (tmp_path / "g" / "model.safetensors").read_bytes()
    (tmp_path / "g" / "model.safetensors").write_bytes(whole[:1000])
    assert "not a readable model" in error(tmp_path / "g", tmp_path / "x")


@pytest.mark.parametrize("version", [None, "4.57.6"])
def test_without_transformers_one_line_names_the_extra(version: str | None, tmp_path: Path) -> None:
    if version is not None:
        (tmp_path / "transformers.py").write_text(f"__version__ = {version!r}\n")
    hide = "" if version else "sys.modules['transformers'] = None; "
    code = f"import sys; {hide}from titans.cli import main; main(['convert', 'demo', 'x'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"titans: titans.hf needs transformers 5 or later, found {version or 'none'}: "
        "pip install -e '.[hf]'"
    ]
