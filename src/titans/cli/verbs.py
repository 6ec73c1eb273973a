"""demo, train, data, generate, stream, presets."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from titans.cli.parser import INTERRUPTED, add_json, count, verb


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
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--out", type=Path, help="run folder; default runs/NAME of the config")
    parser.add_argument("--fresh", action="store_true", help="refuse to resume an existing run")
    parser.set_defaults(takes_overrides=True)
    add_json(parser)


def run_train(options: argparse.Namespace) -> None:
    from titans.config import load_toml
    from titans.train.config import RunConfig
    from titans.train.loop import train

    config = load_toml(options.config, RunConfig, options.overrides)
    folder = options.out or Path("runs") / options.config.stem
    result = train(config, folder, resume=not options.fresh)
    print(f"{result.checkpoint / 'model.safetensors'}")
    if options.json:
        print(json.dumps({**dataclasses.asdict(result), "folder": str(folder)}, default=str))
    if not result.finished:
        sys.exit(INTERRUPTED)


def add_data(verbs: Any) -> None:
    group = verbs.add_parser("data", help="prepare text for training")
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    parser = verb(actions, "prepare", run_prepare, "write memory-mapped token shards")
    parser.add_argument(
        "paths", nargs="+", help="text, .gz, .jsonl files or folders; hub:NAME for a data set"
    )
    parser.add_argument("--tokenizer", default="bytes", help="'bytes' or a tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--text-key", default="text", help="field of a JSON line")
    parser.add_argument("--split", default="train", help="of a data set")
    parser.add_argument("--config", help="of a data set, e.g. sample-10BT")
    parser.add_argument("--valid-fraction", type=float, default=0.0, help="documents held out")
    parser.add_argument("--strip-gutenberg", action="store_true", help="drop Gutenberg's notices")
    parser.add_argument("--encoding", default="utf-8-sig", help="of plain text files")
    add_json(parser)


def run_prepare(options: argparse.Namespace) -> None:
    from titans.data.documents import hub_documents, read_documents
    from titans.data.shards import prepare
    from titans.data.tokenizers import load_tokenizer

    if len(options.paths) == 1 and options.paths[0].startswith("hub:"):
        documents = hub_documents(
            options.paths[0].removeprefix("hub:"),
            split=options.split,
            text_key=options.text_key,
            config=options.config,
        )
    else:
        documents = read_documents(
            options.paths,
            text_key=options.text_key,
            strip_gutenberg=options.strip_gutenberg,
            encoding=options.encoding,
        )
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
    parser.add_argument("model", type=Path, help="a model file (safetensors)")
    parser.add_argument("--prompt", required=True, help="text, or @FILE to read it from a file")
    parser.add_argument("--memory", type=Path, help="what was read before: a memory file")
    parser.add_argument("--max-tokens", type=count, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--stop", nargs="*", default=[], help="texts that end the answer")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--tokenizer", default="bytes", help="'bytes' or a tokenizer.json")
    add_json(parser)


def run_generate(options: argparse.Namespace) -> None:
    from titans.data.tokenizers import load_tokenizer
    from titans.generate import Sampling, generate
    from titans.models.lm import load
    from titans.state import ModelState

    tokenizer = load_tokenizer(options.tokenizer)
    model = load(options.model)
    prompt = options.prompt
    if prompt.startswith("@"):
        prompt = read_text(Path(prompt[1:]))
    result = generate(
        model,
        [tokenizer.encode(prompt)],
        options.max_tokens,
        sampling=Sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
        ),
        stop=[tokenizer.encode(text) for text in options.stop],
        state=None if options.memory is None else ModelState.load(options.memory),
    )
    text = tokenizer.decode(result.tokens[0])
    print(json.dumps({"text": text, "tokens": len(result.tokens[0])}) if options.json else text)


def add_stream(verbs: Any) -> None:
    parser = verb(verbs, "stream", run_stream, "read texts of any length, save the memory")
    parser.add_argument("model", type=Path, help="a model file (safetensors)")
    parser.add_argument("texts", nargs="+", help="files or folders, read one after the other")
    parser.add_argument("--memory", type=Path, help="continue from this memory file")
    parser.add_argument("--save", type=Path, help="write the memory here at the end")
    parser.add_argument("--tokenizer", default="bytes", help="'bytes' or a tokenizer.json")
    add_json(parser)


def run_stream(options: argparse.Namespace) -> None:
    import math
    import time

    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from titans.data.documents import read_documents
    from titans.data.tokenizers import load_tokenizer
    from titans.generate import stream
    from titans.models.lm import load
    from titans.state import ModelState

    if options.save is not None and options.save.is_dir():
        raise ValueError(f"{options.save}: is a folder, expected a file to write")
    tokenizer = load_tokenizer(options.tokenizer)
    model = load(options.model)
    state = None if options.memory is None else ModelState.load(options.memory)
    source = (np.array(tokenizer.encode(d.text)) for d in read_documents(options.texts))
    nats, tokens, begin = 0.0, 0, time.perf_counter()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=None)
        for reading in stream(model, source, state):
            state = reading.state
            nats += float(reading.nll[:, 0 if tokens else 1 :].sum())
            tokens += reading.tokens.shape[1]
            progress.update(task, description=f"{tokens:,} tokens read")
    assert state is not None
    state.check_finite()
    if options.save is not None:
        state.save(options.save)
    report = {
        "tokens": tokens,
        "bits_per_token": nats / math.log(2) / max(tokens - 1, 1),
        "tokens_per_s": tokens / (time.perf_counter() - begin),
        "state_bytes": state.nbytes,
        "memory": None if options.save is None else str(options.save),
    }
    if options.json:
        print(json.dumps(report))
    else:
        print(
            f"{tokens:,} tokens at {report['tokens_per_s']:,.0f} tokens/s, "
            f"{report['bits_per_token']:.3f} bits per token, state of {state.nbytes:,} bytes"
        )


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
        print(json.dumps(preset_names()) if options.json else "\n".join(preset_names()))
    else:
        config = preset(options.name)
        content = {"model": to_dict(config)}
        if config.variant in BASELINES and not options.json:
            print("# " + BASELINES[config.variant].formula)
        print(json.dumps(content) if options.json else table_to_toml(content).rstrip())


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
