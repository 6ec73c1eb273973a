"""titans eval: what a model can do, one suite a question."""

import argparse
import dataclasses
import importlib
import inspect
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from titans.cli.fields import add_fields, from_options
from titans.cli.parser import Parser, add_json, verb
from titans.cli.reading import add_device, open_model


class Suite(NamedTuple):
    """module: in `titans.evals`; its function has the module's name. config: its settings.
    reads: is it asked of a checkpoint? The others train their own models. tokenizer: does it
    take one?"""

    module: str
    config: str
    text: str
    reads: bool
    tokenizer: bool = True


SUITES = {
    "perplexity": Suite(
        "perplexity", "PerplexityConfig", "bits per byte of texts, also by position", True
    ),
    "needle": Suite("needle", "NeedleConfig", "RULER's needles in a haystack", True),
    "babilong": Suite("babilong", "BabilongConfig", "bAbI's facts in the text of books", True),
    "commonsense": Suite(
        "commonsense", "CommonsenseConfig", "multiple choice: PIQA, HellaSwag, ARC ...", True
    ),
    "harness": Suite("harness", "HarnessConfig", "tasks of lm-evaluation-harness", True),
    "genome": Suite("genome", "GenomeConfig", "next base of a genome, by context", True, False),
    "recall": Suite("recall", "RecallConfig", "train on pairs, and ask for ever more", False),
    "ablation": Suite("ablation", "AblationConfig", "train models with one thing changed", False),
    "dna": Suite("dna", "DNAConfig", "train and test classifiers of sequences", False),
    "forecast": Suite("forecast", "ForecastConfig", "train and test forecasters", False),
}


def add_eval(verbs: Any) -> None:
    group = verbs.add_parser("eval", help="measure what a model can do")
    actions = group.add_subparsers(
        dest="suite", required=True, metavar="SUITE", parser_class=SuiteParser
    )
    for name, suite in SUITES.items():
        parser = verb(actions, name, run_eval, suite.text)
        assert isinstance(parser, SuiteParser)
        parser.suite = suite


class SuiteParser(Parser):
    """Its options come from the suite's settings, which are imported when they are needed."""

    suite: Suite | None = None

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        if self.suite is not None:
            suite, self.suite = self.suite, None
            if suite.reads:
                self.add_argument(
                    "--checkpoint",
                    required=True,
                    help="a model file (safetensors), or 'demo' for the packaged one",
                )
            if suite.reads and suite.tokenizer:
                self.add_argument(
                    "--tokenizer", default="bytes", help="'bytes' or a tokenizer.json"
                )
            if suite.reads:
                add_device(self)
            add_fields(self, getattr(load_suite(suite), suite.config))
            self.add_argument(
                "--out",
                type=Path,
                help="folder for the result as JSON, and for its plot where there is one",
            )
            add_json(self)
        return super().parse_known_args(*arguments, **named)


def load_suite(suite: Suite) -> Any:
    return importlib.import_module(f"titans.evals.{suite.module}")


def run_eval(options: argparse.Namespace) -> None:
    suite = SUITES[options.suite]
    module = load_suite(suite)
    config = from_options(getattr(module, suite.config), options)
    function: Callable[..., Any] = getattr(module, suite.module)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)  # now, and not when the work is done
    part = None if options.out is None else free_name(options.out, options.suite)
    if "watch" in inspect.signature(function).parameters:
        function = partial(function, watch=partial(progress, part=part))
    if suite.reads:
        from titans.data.tokenizers import load_tokenizer
        from titans.train.loop import choose_device

        model = open_model(options.checkpoint, choose_device(options.device))
        extra = (load_tokenizer(options.tokenizer),) if suite.tokenizer else ()
        result = function(model, config, *extra)
    else:
        result = function(config)
    content = dataclasses.asdict(result)
    written = []
    if options.out is not None:
        from titans.evals.report import write_json

        written = [f"{options.suite}.json"]
        write_json(options.out / written[0], content)
        if hasattr(module, "plot") and not nothing_but_diverged(result):
            written.append(f"{options.suite}.png")
            module.plot(result, options.out / written[1])
        if part is not None:
            part.unlink(missing_ok=True)
    show(result)
    if nothing_but_diverged(result):
        raise ValueError(f"every training diverged ({result.diverged[0].reason})")
    if written:
        print(f"Wrote {' and '.join(written)} to {options.out}/")
    if options.json:
        print(json.dumps(content))


def nothing_but_diverged(result: Any) -> bool:
    """Are these the only records of a suite?"""
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return {name for name, v in values.items() if isinstance(v, tuple) and v} == {"diverged"}


def free_name(folder: Path, suite: str) -> Path:
    """For what is done so far; what a stopped run has left stays beside it."""
    names = (f"{suite}.part{n}.jsonl" for n in itertools.chain([""], itertools.count(2)))
    return next(folder / name for name in names if not (folder / name).exists())


def progress(cell: Any, part: Path | None) -> None:
    """A record on one line of stderr, as soon as it is there; and as JSON at the end of `part`,
    which is what is left of a suite that was stopped."""
    if part is not None:
        with part.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(cell)) + "\n")
    fields = (f"{f.name} {text_of(getattr(cell, f.name))}" for f in dataclasses.fields(cell))
    print(", ".join(fields), file=sys.stderr, flush=True)


def show(result: Any) -> None:
    """Plain fields one a line, lists of records as tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Names of files and records are shown as they are: brackets are no markup.
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if dataclasses.is_dataclass(value) or value == ():
            continue  # the settings, which the user knows, and what there is none of
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            names = [f.name for f in dataclasses.fields(value[0])]
            if any(isinstance(getattr(value[0], name), dict) for name in names):
                continue  # the plot shows it
            table = Table(*names, title=field.name)
            for row in value:
                table.add_row(*(Text(text_of(getattr(row, name))) for name in names))
            console.print(table)
        else:
            console.print(f"{field.name}: {text_of(value)}", highlight=False)


def text_of(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, tuple):
        return f"{len(value)} values" if len(value) > 8 else ", ".join(map(text_of, value))
    return str(value)
