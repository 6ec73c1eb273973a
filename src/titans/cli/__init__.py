"""The command line: verbs only. Bad input is one line on stderr and exit code 2."""

import sys
from collections.abc import Sequence

from titans.cli.bench import add_bench
from titans.cli.convert import add_convert
from titans.cli.eval import add_eval
from titans.cli.memory import add_memory
from titans.cli.parser import EXIT_BAD_INPUT, INTERRUPTED, Parser, fail
from titans.cli.serve import add_serve, add_studio
from titans.cli.verbs import add_data, add_demo, add_generate, add_presets, add_stream, add_train
from titans.heap import keep_freed


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `titans VERB ...`."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "takes_overrides", False):
        parser.error(f"unrecognised argument {rest[0]!r}")
    if getattr(options, "takes_overrides", False):
        options.overrides = parse_overrides(parser, rest)
    keep_freed()
    try:
        options.run(options)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        sys.exit(EXIT_BAD_INPUT)
    except (ValueError, ImportError, OSError, OverflowError) as error:
        fail(" ".join(str(error).split()))
    except MemoryError:
        fail("out of memory")
    except RuntimeError as error:
        if type(error).__module__.startswith("titans."):  # with a message for the user
            fail(" ".join(str(error).split()))
        if "allocate" in str(error):
            fail(f"out of memory ({str(error).splitlines()[0]})")
        raise
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


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
    add_memory(verbs)
    add_convert(verbs)
    add_eval(verbs)
    add_presets(verbs)
    add_bench(verbs)
    add_serve(verbs)
    add_studio(verbs)
    return parser


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
