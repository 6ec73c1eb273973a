"""What the verbs that read texts and ask models share."""

import argparse
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans.cli.parser import Parser, count

if TYPE_CHECKING:
    import torch

    from titans.data.tokenizers import Tokenizer
    from titans.data.told import Until
    from titans.models.lm import TitansLM
    from titans.state import ModelState

DEMO = "demo"


def add_model(parser: Parser) -> None:
    parser.add_argument("model", help="a model file (safetensors), or 'demo' for the packaged one")
    add_device(parser)


def add_device(parser: Parser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, ...; auto is the first GPU, where there is one",
    )


def add_encoding(parser: Parser) -> None:
    parser.add_argument(
        "--encoding", default="utf-8-sig", help="of plain text files, or auto [utf-8-sig]"
    )


def add_tokenizer(parser: Parser) -> None:
    parser.add_argument("--tokenizer", default="bytes", help="'bytes' or a tokenizer.json")


def add_sampling(parser: Parser) -> None:
    parser.add_argument("--max-tokens", type=count, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends the answer; may be given again; an end of document does too",
    )
    parser.add_argument("--seed", type=int)


def until(options: argparse.Namespace) -> "Until":
    """How `add_sampling` wants texts told."""
    from titans.data.told import Until
    from titans.generate import Sampling

    if not all(options.stop):
        raise ValueError("--stop is empty: expected a text")
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
    )
    return Until(stop=tuple(options.stop), max_tokens=options.max_tokens, sampling=sampling)


def open_model(name: str, device: "torch.device | str" = "cpu") -> "TitansLM":
    """The model in a file, or the packaged one under its name."""
    from titans.demo import asset
    from titans.models.lm import load

    return load(asset("demo.safetensors") if name == DEMO else name, device)


def open_all(
    options: argparse.Namespace,
) -> tuple["TitansLM", "Tokenizer", "ModelState | None"]:
    """The model, its tokenizer and, where one is named, the memory to go on from."""
    from titans.train.loop import choose_device

    model = open_model(options.model, choose_device(options.device))
    tokenizer = open_tokenizer(options.tokenizer, model)
    if options.memory is None:
        return model, tokenizer, None
    return model, tokenizer, open_memory(options.memory, model, tokenizer)


def open_tokenizer(name: str, model: "TitansLM") -> "Tokenizer":
    """The tokenizer of that name, which must be the model's."""
    from titans.data.tokenizers import load_tokenizer, tokenizer_of

    return tokenizer_of(model, load_tokenizer(name))


def open_memory(path: Path, model: "TitansLM", tokenizer: "Tokenizer") -> "ModelState":
    """A memory of this model, read with this tokenizer as far as the file says."""
    from titans.data.tokenizers import tokenizer_identity
    from titans.state import ModelState, read_notes

    state = ModelState.load(path, next(model.parameters()).device)
    model.check_state(state, state.batch_size)
    given = tokenizer_identity(tokenizer)
    noted = read_notes(path).get("tokenizer", given)
    if noted != given:
        raise ValueError(f"{path}: was read with the tokenizer {noted}, this one is {given}")
    return state


def save_memory(state: "ModelState", path: Path, tokenizer: "Tokenizer") -> None:
    """Write a memory whole or not at all; it notes what its tokens were."""
    from titans.data.tokenizers import tokenizer_identity

    state.save(path, {"tokenizer": tokenizer_identity(tokenizer)})


def check_target(path: Path, read: Iterable[str | Path] = ()) -> None:
    """ValueError, before the work, where a file could not be written, or would take the place of
    something else than a file, or of one that is read."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file to write")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no regular file, expected a file to write")
    from titans.data.documents import text_files

    for source in map(Path, read if path.exists() else ()):
        files = text_files(source) if source.is_dir() else [source]
        if any(file.exists() and path.samefile(file) for file in files):
            raise ValueError(f"{path}: is read here, expected another file to write")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{path}: cannot be written, {folder} is no folder to write to")


def read_texts(
    model: "TitansLM",
    tokenizer: "Tokenizer",
    texts: Sequence[str | Path],
    state: "ModelState | None",
    encoding: str = "utf-8-sig",
) -> tuple["ModelState", dict[str, Any]]:
    """Read files, folders or standard input ("-") in one stream and in constant memory.

    Returns the state, and a report: tokens read now and in all, bits per token, speed, bytes.
    """
    from rich.console import Console
    from rich.progress import Progress

    from titans.data.documents import check_readable, read_blocks
    from titans.data.tokenizers import encode_blocks
    from titans.generate import stream

    check_readable(texts, encoding)
    nats, tokens, begin = 0.0, 0, time.perf_counter()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=None)
        for reading in stream(model, encode_blocks(tokenizer, read_blocks(texts, encoding)), state):
            state = reading.state
            nats += float(reading.nll[:, 0 if tokens else 1 :].sum())
            tokens += reading.tokens.shape[1]
            progress.update(task, description=f"{tokens:,} tokens read")
    assert state is not None
    state.check_finite()
    seconds = time.perf_counter() - begin
    return state, {
        "tokens": tokens,
        "tokens_read": state.position,
        "bits_per_token": nats / math.log(2) / (tokens - 1) if tokens > 1 else None,
        "tokens_per_s": tokens / seconds,
        "state_bytes": state.nbytes,
    }


def add_read(parser: Parser, *output: str, required: bool) -> None:
    """The arguments of `run_read`; `output` are the names of the option for the memory's file."""
    add_model(parser)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="files, folders, or - for stdin")
    parser.add_argument("--memory", type=Path, help="continue from this memory file")
    parser.add_argument(
        *output, dest="output", type=Path, required=required, help="write the memory here"
    )
    add_tokenizer(parser)
    add_encoding(parser)


def run_read(options: argparse.Namespace) -> None:
    """Read texts, after a memory or from the beginning, and save what is remembered."""
    if options.output is not None:
        check_target(options.output, [options.model, *options.texts, options.tokenizer])
    model, tokenizer, state = open_all(options)
    state, report = read_texts(model, tokenizer, options.texts, state, options.encoding)
    if options.output is not None:
        save_memory(state, options.output, tokenizer)
    report["memory"] = None if options.output is None else str(options.output)
    if options.json:
        print(json.dumps(report))
    else:
        print(reading_line(report))


def reading_line(report: dict[str, Any]) -> str:
    bits = report["bits_per_token"]
    told = "" if bits is None else f"{bits:.3f} bits per token, "
    return (
        f"{report['tokens']:,} tokens at {report['tokens_per_s']:,.0f} tokens/s, "
        f"{told}state of {report['state_bytes']:,} bytes"
    )


def read_prompt(text: str) -> str:
    """A prompt as given, or the content of FILE for @FILE, read as texts are: no byte order mark,
    line ends as they are."""
    if not text.startswith("@"):
        return text
    from titans.data.documents import open_text

    with open_text(Path(text[1:]), "utf-8-sig") as file:
        return file.read()
