"""The command line: verbs only. Bad input is one line on stderr and exit code 2."""

import re
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
    # First of all: argparse does not know them, and would take a value for the config.
    given, overrides = take_overrides(parser, sys.argv[1:] if arguments is None else arguments)
    options, unknown = parser.parse_known_args(given)
    if getattr(options, "takes_overrides", False):
        options.overrides = overrides
    else:
        unknown += [f"--{key}" for key in overrides]
    if unknown:
        parser.error(f"unrecognised argument {unknown[0]!r}")
    if arguments is None:  # the process is this command's
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
        if type(error).__module__.split(".")[0] in ("titans", "torch"):  # with a message of its own
            fail(" ".join(str(error).split()))
        if "allocate" in str(error) or "Storage size" in str(error):
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


def take_overrides(parser: Parser, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without `--section.key value` or `--section.key=value`, and these."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    left = iter(arguments)
    for argument in left:
        if argument == "--":  # what follows are no options
            rest += [argument, *left]
            break
        key, equals, value = argument.partition("=")
        if not re.fullmatch(r"--\w+(\.\w+)+", key):
            rest.append(argument)
            continue
        given = value if equals else next(left, None)
        if given is None:
            parser.error(f"{key} needs a value")
        overrides[key.removeprefix("--")] = given
    return rest, overrides
