"""demo, train, data, generate, stream, presets."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans.cli.parser import INTERRUPTED, Parser, add_json, count, refuse_options, verb
from titans.cli.reading import (
    add_model,
    add_read,
    add_sampling,
    add_tokenizer,
    check_target,
    open_all,
    read_prompt,
    run_read,
    until,
)

if TYPE_CHECKING:
    from titans.data.documents import Document


def add_demo(verbs: Any) -> None:
    parser = verb(verbs, "demo", run_demo, "read a long text, then ask for facts hidden in it")
    parser.add_argument(
        "--length", type=count, default=65536, help="largest distance in tokens, e.g. 64K, 1M"
    )
    parser.add_argument("--streams", type=int, help="texts read side by side (one fact each)")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="your own carrier")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a model file instead of the packaged one")
    parser.add_argument("--attention-model", type=Path, help="likewise, of the attention baseline")
    parser.add_argument(
        "--ask", type=Path, metavar="OUT", help="only ask the memory saved in that folder again"
    )
    add_json(parser)


def run_demo(options: argparse.Namespace) -> None:
    from rich.console import Console

    from titans import demo

    if options.ask is not None:
        refuse_options(options, "a memory that is there", length=65536, text=[], seed=0)
        refuse_options(options, "a memory that is there", streams=None, model=None)
        refuse_options(options, "a memory that is there", attention_model=None)
        recall = demo.ask_saved(options.ask)
        if options.json:
            print(json.dumps({"recall": recall}))
        else:
            print("recall per distance:", *(f"{100 * value:.0f} %" for value in recall))
        return
    result = demo.run_demo(
        length=options.length,
        out=options.out,
        texts=options.text,
        streams=options.streams,
        seed=options.seed,
        model_path=options.model,
        attention_path=options.attention_model,
    )
    console = Console()
    console.print(demo.table(result))
    console.print(
        f"State: {result.state_bytes_first:,} bytes at the first token, "
        f"{result.state_bytes_last:,} at the last. Parameters: "
        f"{result.parameters['memory']:,} with memory, {result.parameters['attention']:,} without."
    )
    print(f"Wrote recall.png, surprise.png and demo.memory to {result.out}/")
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))


def add_train(verbs: Any) -> None:
    parser = verb(verbs, "train", run_train, "train a model from a TOML config")
    parser.epilog = "Any field can be overridden: --train.steps 100 --model.variant mag"
    parser.add_argument(
        "--settings",
        action=PrintSettings,
        nargs=0,
        help="print every field, its meaning and its default as TOML, and exit",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--out", type=Path, help="run folder; default runs/NAME of the config")
    parser.add_argument("--fresh", action="store_true", help="refuse to resume an existing run")
    parser.set_defaults(takes_overrides=True)
    add_json(parser)


class PrintSettings(argparse.Action):
    """Like --help: it needs no config."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from titans.cli.fields import commented_toml
        from titans.train.config import RunConfig

        print(commented_toml(RunConfig()).lstrip())
        parser.exit()


def run_train(options: argparse.Namespace) -> None:
    from titans.config import load_toml
    from titans.train.config import RunConfig
    from titans.train.loop import train

    config = load_toml(options.config, RunConfig, options.overrides)
    folder = options.out or Path("runs") / options.config.stem
    result = train(config, folder, resume=not options.fresh)
    if result.first:
        print(f"{result.checkpoint / 'model.safetensors'}")
    if result.first and options.json:
        print(json.dumps({**dataclasses.asdict(result), "folder": str(folder)}, default=str))
    if not result.finished:
        sys.exit(INTERRUPTED)


def add_data(verbs: Any) -> None:
    group = verbs.add_parser("data", help="prepare text for training")
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    parser = verb(actions, "tokenizer", run_tokenizer, "learn a byte-pair encoding of texts")
    parser.add_argument("paths", nargs="+", help="text, .gz, .jsonl files or folders")
    parser.add_argument("--size", type=count, default=8192, help="tokens, at most [8192]")
    parser.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    parser.add_argument(
        "--codes-apart",
        action="store_true",
        help="letters and digits of codes such as 9f0d are tokens of their own",
    )
    add_reading(parser)
    add_json(parser)
    parser = verb(actions, "prepare", run_prepare, "write memory-mapped token shards")
    parser.add_argument(
        "paths", nargs="+", help="text, .gz, .jsonl files or folders; hub:NAME for a data set"
    )
    parser.add_argument("--tokenizer", default="bytes", help="'bytes' or a tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--split", help="of a data set [train]")
    parser.add_argument("--config", help="of a data set, e.g. sample-10BT")
    parser.add_argument("--valid-fraction", type=float, default=0.0, help="documents held out")
    add_reading(parser)
    add_json(parser)


def add_reading(parser: Parser) -> None:
    """How files are read; `encoding` is None where it is not given."""
    parser.add_argument("--text-key", default="text", help="field of a JSON line")
    parser.add_argument("--strip-gutenberg", action="store_true", help="drop Gutenberg's notices")
    parser.add_argument("--encoding", help="of plain text files, or auto [utf-8-sig]")


def read_files(options: argparse.Namespace) -> Iterator["Document"]:
    """The documents that `paths` and the options of `add_reading` name."""
    from titans.data.documents import read_documents

    return read_documents(
        options.paths,
        text_key=options.text_key,
        strip_gutenberg=options.strip_gutenberg,
        encoding=options.encoding or "utf-8-sig",
    )


def run_tokenizer(options: argparse.Namespace) -> None:
    from titans.data.tokenizers import CODES, BPETokenizer

    check_target(options.out, options.paths)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    texts = (document.text for document in read_files(options))
    isolate = CODES if options.codes_apart else None
    tokenizer = BPETokenizer.train(texts, options.size, options.out, isolate=isolate)
    report = {"tokenizer": str(options.out), "tokens": tokenizer.vocab_size}
    line = f"{options.out}: {tokenizer.vocab_size:,} tokens"
    print(json.dumps(report) if options.json else line)


def run_prepare(options: argparse.Namespace) -> None:
    from titans.data.documents import hub_documents
    from titans.data.shards import prepare
    from titans.data.tokenizers import load_tokenizer

    hub = any(path.startswith("hub:") for path in options.paths)
    if hub and len(options.paths) > 1:
        raise ValueError("a data set (hub:NAME) is prepared alone")
    if hub:
        refuse_options(options, "a data set", strip_gutenberg=False, encoding=None)
    else:
        refuse_options(options, "files", split=None, config=None)
    if hub:
        documents = hub_documents(
            options.paths[0].removeprefix("hub:"),
            split=options.split or "train",
            text_key=options.text_key,
            config=options.config,
        )
    else:
        documents = read_files(options)
    info = prepare(
        documents,
        load_tokenizer(options.tokenizer),
        options.out,
        valid_fraction=options.valid_fraction,
    )
    print(f"{info.documents:,} documents, {info.tokens:,} tokens in {info.shards} shards")
    if options.json:
        print(json.dumps(dataclasses.asdict(info), default=str))


def add_generate(verbs: Any) -> None:
    parser = verb(verbs, "generate", run_generate, "continue a prompt")
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="text, or @FILE to read it from a file")
    parser.add_argument("--memory", type=Path, help="what was read before: a memory file")
    add_sampling(parser)
    add_tokenizer(parser)
    add_json(parser)


def run_generate(options: argparse.Namespace) -> None:
    from titans.data.told import tell

    how = until(options)
    model, tokenizer, state = open_all(options)
    prompt = tokenizer.encode(read_prompt(options.prompt))
    (told,) = tell(model, tokenizer, [prompt], how, state=state)
    print(json.dumps(told._asdict()) if options.json else told.text)


def add_stream(verbs: Any) -> None:
    parser = verb(verbs, "stream", run_read, "read texts of any length, save the memory")
    add_read(parser, "--save", required=False)
    add_json(parser)


def add_presets(verbs: Any) -> None:
    parser = verb(
        verbs,
        "presets",
        run_presets,
        "list the named models, or print one as TOML",
    )
    parser.add_argument("name", nargs="?", help="print this one")
    add_json(parser)


def run_presets(options: argparse.Namespace) -> None:
    from titans.baselines import BASELINES
    from titans.config import table_to_toml, to_dict
    from titans.presets import preset, preset_names

    if options.name is None:
        names = preset_names()
        print(json.dumps({"presets": names}) if options.json else "\n".join(names))
    else:
        config = preset(options.name)
        content = {"model": to_dict(config)}
        if config.variant in BASELINES and not options.json:
            print("# " + BASELINES[config.variant].formula)
        print(json.dumps(content) if options.json else table_to_toml(content).rstrip())
