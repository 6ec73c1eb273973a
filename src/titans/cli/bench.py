"""titans bench: speed and memory, beside rivals."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from titans.cli.parser import Parser, add_json, count, refuse_options, say, verb

LAYER: dict[str, Any] = {
    "length": 4096,
    "depth": 2,
    "chunk_size": [64, 16],
    "lengths": [2**n for n in range(10, 18)],
}
"""Defaults of `titans bench layer`, of what not every sweep reads."""


def add_bench(verbs: Any) -> None:
    group = verbs.add_parser("bench", help="measure speed and memory, beside rivals")
    actions = group.add_subparsers(dest="action", required=True, metavar="WHAT")

    layer = verb(actions, "layer", run_bench_layer, "time the rule and the memory layer")
    layer.add_argument("--length", type=count, default=LAYER["length"], help="tokens, e.g. 4K")
    layer.add_argument("--heads", type=count, default=6)
    layer.add_argument("--key-dim", type=count, default=64, help="size of a head")
    layer.add_argument(
        "--depth", type=count, default=LAYER["depth"], help="layers of the memory network"
    )
    layer.add_argument("--chunk-size", type=count, nargs="+", default=LAYER["chunk_size"])
    layer.add_argument(
        "--sweep", choices=("length", "chunk", "depth", "heads"), help="time and memory along this"
    )
    layer.add_argument(
        "--lengths", type=count, nargs="+", default=LAYER["lengths"], help="of a sweep"
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

    memory = verb(
        actions, "memory", run_bench_memory, "ask a text that was read once, or read it every time"
    )
    memory.add_argument("--text", nargs="+", default=[], metavar="FILE", help="what is read")
    memory.add_argument("--length", type=count, default=2**20, help="bytes at most, e.g. 1M")
    memory.add_argument("--facts", type=count, default=8, help="hidden in the text and asked for")
    memory.add_argument("--repeats", type=count, default=9)
    memory.add_argument("--limit", type=count, default=120, help="seconds for each way of asking")
    add_bench_model(memory)


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
    run = parser.get_default("run")

    def with_folder(options: argparse.Namespace) -> None:
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)  # now, and not when all is measured
        run(options)

    parser.set_defaults(run=with_folder)
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
    # What an axis, or none, makes nothing of.
    idle: dict[str | None, tuple[str, ...]] = {
        None: ("lengths",),
        "length": ("length",),
        "chunk": ("lengths", "chunk_size"),
        "depth": ("lengths", "depth"),
        "heads": ("lengths",),
    }
    what = "a bench without --sweep" if options.sweep is None else f"--sweep {options.sweep}"
    refuse_options(options, what, **{name: LAYER[name] for name in idle[options.sweep]})
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


def run_bench_memory(options: argparse.Namespace) -> None:
    from titans.bench.memory import MemoryBench, bench_memory

    bench = MemoryBench(
        model=options.model,
        text=tuple(options.text),
        length=options.length,
        facts=options.facts,
        repeats=options.repeats,
        limit_s=float(options.limit),
        device=options.device,
    )
    show_bench(bench_memory(bench, say), options)


def show_bench(result: dict[str, Any], options: argparse.Namespace) -> None:
    from rich.console import Console

    from titans.bench import report

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(report.table(result))
    for line in report.settings_lines(result["rows"]):
        print(line)
    content = report.finite(result)
    try:
        if options.out is not None:
            print("Wrote", *report.write(content, options.out))
    finally:  # what was measured is told, whatever becomes of the files
        if options.json:
            print(json.dumps(content, allow_nan=False))
