"""titans convert: a model file <-> a folder for transformers."""

import argparse
import json
from pathlib import Path
from typing import Any

from titans.cli.parser import add_json, verb
from titans.cli.reading import check_target, open_model, open_tokenizer


def add_convert(verbs: Any) -> None:
    parser = verb(
        verbs, "convert", run_convert, "a model file to a folder for transformers, or back"
    )
    parser.add_argument("source", help="a model file, 'demo', or a folder of save_pretrained")
    parser.add_argument("target", type=Path, help="the folder, or the file, to write")
    parser.add_argument(
        "--tokenizer",
        help="put into the folder: 'bytes', a tokenizer.json, or 'none'; "
        "by default bytes where the vocabulary has 257 tokens",
    )
    add_json(parser)


def run_convert(options: argparse.Namespace) -> None:
    from titans.hf.convert import to_file, to_folder

    source = Path(options.source)
    if source.is_dir():
        if options.tokenizer is not None:
            raise ValueError("--tokenizer is for the way to a folder, a model file holds none")
        check_target(options.target, source.iterdir())
        model = to_file(source, options.target)
    else:
        model = open_model(options.source)
        name = options.tokenizer or ("bytes" if model.config.vocab_size == 257 else "none")
        to_folder(model, options.target, None if name == "none" else open_tokenizer(name, model))
    report = {
        "written": str(options.target),
        "variant": model.config.variant,
        "parameters": model.parameter_count,
    }
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{options.target}: {report['variant']}, {report['parameters']:,} parameters")
