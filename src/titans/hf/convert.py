"""A model file of `TitansLM.save` <-> a folder that transformers loads; the same weights."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from titans.data.tokenizers import END_OF_TEXT, BPETokenizer, Tokenizer, tokenizer_of
from titans.hf.config import TitansHFConfig
from titans.hf.model import TitansForCausalLM
from titans.models.lm import TitansLM, is_model_file
from titans.train.checkpoint import INDEX


def to_folder(model: TitansLM, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write weights, configuration and code, and the tokenizer if one is given.

    A folder written like this may be written again. Raises ValueError for a file in its place, any
    other folder that is not empty, one with a checkpoint or a model file of ours in it, or a
    tokenizer that is not the model's.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder to write")
    if (folder / INDEX).exists() or is_model_file(folder / "model.safetensors"):
        raise ValueError(f"{folder}: holds a model file that would be replaced")
    if folder.exists() and any(folder.iterdir()) and not is_ours(folder):
        raise ValueError(f"{folder}: holds other files, expected a new or empty folder to write")
    given: dict[str, Any] = {}
    if tokenizer is not None:
        tokenizer = tokenizer_of(model, tokenizer)
        given = {"eos_token_id": tokenizer.end_of_document}
    TitansForCausalLM.from_titans(model, **given).save_pretrained(folder)
    if tokenizer is not None:
        for_transformers(tokenizer).save_pretrained(folder)


def is_ours(folder: Path) -> bool:
    """Is it one of `to_folder`, which another may replace?"""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == TitansHFConfig.model_type


def to_file(folder: str | Path, path: str | Path) -> TitansLM:
    """Write the model of a folder, which is returned, as one file; see `from_folder`."""
    model = from_folder(folder)
    model.save(path)
    return model


def from_folder(folder: str | Path) -> TitansLM:
    """The model in a folder of `save_pretrained`, in the precision it has there.

    Raises ValueError of one line for a folder without a whole Titans model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder}: holds no config.json of a Titans model")
    try:
        loaded: Any = TitansForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a readable model ({str(error).splitlines()[0]})") from None
    wrapped, report = loaded
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"]])
    if wrong:
        raise ValueError(f"{folder}: weights do not fit the config ({wrong[0]})")
    return wrapped.model


def for_transformers(tokenizer: Tokenizer) -> Any:
    """The tokenizer as transformers loads it with `AutoTokenizer`, with the same ids."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, BPETokenizer):
        inner = tokenizers.Tokenizer.from_str(tokenizer.rules)
    else:
        inner = byte_level(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def byte_level(tokenizer: Tokenizer) -> Any:
    """A BPE without merges, whose 256 letters are the bytes in order."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = {letter_of(byte): byte for byte in range(256)}
    inner = tokenizers.Tokenizer(models.BPE(letters | {END_OF_TEXT: 256}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def letter_of(byte: int) -> str:
    """The character that stands for a byte in byte-level vocabularies: itself if it prints, else
    the next one from U+0100 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in prints:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in prints].index(byte))
