"""What all verbs share: a parser with errors of one line, and kinds of arguments."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_BAD_INPUT = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


def fail(message: str, code: int = EXIT_BAD_INPUT) -> NoReturn:
    print(f"titans: {message}", file=sys.stderr)
    sys.exit(code)


def verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Parser:
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_json(parser: Parser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="make the last line of stdout one JSON object"
    )


def count(text: str) -> int:
    """A positive number: 65536, 64K, 1M, 2G."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper(), 1)
    digits = text if scale == 1 else text[:-1]
    if not digits.isdigit() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number such as 64K, got {text!r}")
    return int(digits) * scale


def say(text: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)


def refuse_options(options: argparse.Namespace, what: str, **defaults: object) -> None:
    """ValueError for the first of these options that has not its default: it would do nothing."""
    for name, default in defaults.items():
        if getattr(options, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} has no effect on {what}")
