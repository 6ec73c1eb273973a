"""The command line: verbs only. Bad input is one line on stderr and exit code 2."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

EXIT_BAD_INPUT = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `titans VERB ...`."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "takes_overrides", False):
        parser.error(f"unrecognised argument {rest[0]!r}")
    if getattr(options, "takes_overrides", False):
        options.overrides = parse_overrides(parser, rest)
    try:
        options.run(options)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        sys.exit(EXIT_BAD_INPUT)
    except (ValueError, ImportError, OSError, LookupError) as error:
        fail(" ".join(str(error).split()))
    except MemoryError:
        fail("out of memory")
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # our own, with a message for the user
            fail(" ".join(str(error).split()))
        if "allocate" in str(error):
            fail(f"out of memory ({str(error).splitlines()[0]})")
        raise
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


def fail(message: str, code: int = EXIT_BAD_INPUT) -> NoReturn:
    print(f"titans: {message}", file=sys.stderr)
    sys.exit(code)


def version() -> str:
    from importlib.metadata import version as installed

    return f"titans {installed('titans')}"


def build_parser() -> Parser:
    parser = Parser(prog="titans", description="Neural memory that learns at test time.")
    parser.add_argument("--version", action="version", version=version())
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    add_demo(verbs)
    add_train(verbs)
    add_data(verbs)
    add_generate(verbs)
    add_stream(verbs)
    add_presets(verbs)
    add_bench(verbs)
    return parser


def verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Parser:
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_json(parser: Parser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="make the last line of stdout one JSON object"
    )


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
    from titans.config import table_to_toml, to_dict
    from titans.presets import preset, preset_names

    if options.name is None:
        print(json.dumps(preset_names()) if options.json else "\n".join(preset_names()))
    else:
        config = preset(options.name)
        content = {"model": to_dict(config)}
        print(json.dumps(content) if options.json else table_to_toml(content).rstrip())


def add_bench(verbs: Any) -> None:
    group = verbs.add_parser("bench", help="measure speed and memory, beside rivals")
    actions = group.add_subparsers(dest="action", required=True, metavar="WHAT")

    layer = verb(actions, "layer", run_bench_layer, "time the rule and the memory layer")
    layer.add_argument("--length", type=count, default=4096, help="tokens, e.g. 4K")
    layer.add_argument("--heads", type=count, default=6)
    layer.add_argument("--key-dim", type=count, default=64, help="size of a head")
    layer.add_argument("--depth", type=count, default=2, help="layers of the memory network")
    layer.add_argument("--chunk-size", type=count, nargs="+", default=[64, 16])
    layer.add_argument(
        "--sweep", choices=("length", "chunk", "depth", "heads"), help="time and memory along this"
    )
    layer.add_argument(
        "--lengths", type=count, nargs="+", default=[2**n for n in range(10, 18)], help="of a sweep"
    )
    add_contest(layer)

    model = verb(actions, "model", run_bench_model, "time a training step of whole models")
    model.add_argument("--lengths", type=count, nargs="+", default=[4096, 32768])
    model.add_argument("--dim", type=count, default=256, help="width")
    model.add_argument("--heads", type=count, default=4)
    model.add_argument("--layers", type=count, default=2)
    model.add_argument("--window", type=count, default=256, help="attention window and segment")
    add_contest(model)

    decode = verb(actions, "decode", run_bench_decode, "time a token after many others")
    decode.add_argument("--position", type=count, nargs="+", default=[1024, 2**20])
    decode.add_argument("--batch", type=count, default=8, help="independent states")
    decode.add_argument("--tokens", type=count, default=64, help="decoded per measurement")
    decode.add_argument("--repeats", type=count, default=9)
    decode.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True)
    add_bench_model(decode)

    stream = verb(actions, "stream", run_bench_stream, "read a long text in constant memory")
    stream.add_argument("--length", type=count, default=2**21, help="tokens, e.g. 2M")
    stream.add_argument("--marks", type=count, default=64, help="measurements on the way")
    add_bench_model(stream)


def add_contest(parser: Parser) -> None:
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--repeats", type=count, default=5, help="interleaved rounds")
    parser.add_argument(
        "--limit", type=count, default=300, help="seconds a contestant may take in one kind of step"
    )
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory too"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add_bench_output(parser)


def add_bench_model(parser: Parser) -> None:
    parser.add_argument("--model", type=Path, help="a model file instead of the packaged demo's")
    add_bench_output(parser)


def add_bench_output(parser: Parser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the result as JSON and plots")
    add_json(parser)


def run_bench_layer(options: argparse.Namespace) -> None:
    from titans.bench.layer import LayerBench, bench_layer, sweep

    bench = LayerBench(
        length=options.length,
        heads=options.heads,
        key_dim=options.key_dim,
        depth=options.depth,
        chunk_sizes=tuple(options.chunk_size),
        **contest_options(options),
    )
    if options.sweep is None:
        show_bench(bench_layer(bench), options)
    else:
        show_bench(sweep(bench, options.sweep, options.lengths), options)


def run_bench_model(options: argparse.Namespace) -> None:
    from titans.bench.model import ModelBench, bench_model

    bench = ModelBench(
        lengths=tuple(options.lengths),
        dim=options.dim,
        heads=options.heads,
        layers=options.layers,
        window=options.window,
        **contest_options(options),
    )
    show_bench(bench_model(bench), options)


def contest_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "batch": options.batch,
        "repeats": options.repeats,
        "limit_s": float(options.limit),
        "rivals": options.rivals,
        "memory": options.memory,
        "device": options.device,
        "dtype": options.dtype,
    }


def run_bench_decode(options: argparse.Namespace) -> None:
    from titans.bench.decode import DecodeBench, bench_decode

    bench = DecodeBench(
        model=options.model,
        positions=tuple(options.position),
        batch=options.batch,
        tokens=options.tokens,
        repeats=options.repeats,
        rivals=options.rivals,
        device=options.device,
    )
    show_bench(bench_decode(bench, say), options)


def run_bench_stream(options: argparse.Namespace) -> None:
    from titans.bench.stream import StreamBench, bench_stream

    bench = StreamBench(
        model=options.model, length=options.length, marks=options.marks, device=options.device
    )
    show_bench(bench_stream(bench, say), options)


def say(text: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)


def show_bench(result: dict[str, Any], options: argparse.Namespace) -> None:
    from rich.console import Console

    from titans.bench import report

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(report.table(result))
    for line in report.settings_lines(result["rows"]):
        print(line)
    if options.out is not None:
        print("Wrote", *report.write(result, options.out))
    if options.json:
        print(json.dumps(result))


def parse_overrides(parser: Parser, rest: Sequence[str]) -> dict[str, str]:
    """`--section.key value` or `--section.key=value` pairs."""
    overrides: dict[str, str] = {}
    position = 0
    while position < len(rest):
        key, equals, value = rest[position].partition("=")
        if not key.startswith("--") or "." not in key:
            parser.error(f"unrecognised argument {rest[position]!r}")
        if not equals:
            position += 1
            if position == len(rest):
                parser.error(f"{key} needs a value")
            value = rest[position]
        overrides[key.removeprefix("--")] = value
        position += 1
    return overrides


def count(text: str) -> int:
    """A number of tokens: 65536, 64K, 1M."""
    scale = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    digits = text if scale == 1 else text[:-1]
    if not digits.isdigit() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number such as 64K, got {text!r}")
    return int(digits) * scale


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None


if __name__ == "__main__":
    main()
