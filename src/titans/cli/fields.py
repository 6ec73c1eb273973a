"""A frozen settings dataclass as command-line options: `--field-name`, its docstring the help."""

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from typing import Any, Literal

from titans.cli.parser import Parser, count


def add_fields(parser: Parser, cls: type) -> None:
    """One option for each field of `cls`; fields without a default must be given.

    Numbers may be written 64K; a tuple takes several values; a flag has its `--no-` form.
    """
    hints = typing.get_type_hints(cls)
    texts = field_docs(cls)
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING
        options: dict[str, Any] = {"help": texts.get(field.name, ""), "required": required}
        if not required:
            options["default"] = field.default
            options["help"] += shown(field.default)
        parser.add_argument(
            "--" + field.name.replace("_", "-"), **options, **kind_of(hints[field.name])
        )


def from_options(cls: type, options: argparse.Namespace) -> Any:
    """The dataclass that the options say."""
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(cls)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def shown(default: Any) -> str:
    """A default at the end of a help text: a flag's is on or off, and an empty one is not told."""
    if default is None or default in ("", ()):
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    values = default if isinstance(default, tuple) else (default,)
    text = " ".join(repr(v)[1:-1] if isinstance(v, str) else str(v) for v in values)
    return f" [{text}]".replace("%", "%%")


def kind_of(hint: Any) -> dict[str, Any]:
    """`add_argument`'s view of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is tuple:
        return {**kind_of(arguments[0]), "nargs": "+"}
    if origin is Literal:
        return {"choices": arguments}
    if origin in (typing.Union, types.UnionType):
        return kind_of(next(a for a in arguments if a is not type(None)))
    return {"type": whole if hint is int else hint, "metavar": hint.__name__.upper()}


def whole(text: str) -> int:
    """A whole number of 64 bits; positive ones may be written 64K, 1M or 2G."""
    number = int(text) if text.lstrip("-").isdigit() else count(text)
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a number of 64 bits, got {text}")
    return number


def commented_toml(config: Any, name: str = "") -> str:
    """A config as TOML, above every field what it means; a field that is None is a comment."""
    from titans.config import table_to_toml

    texts = field_docs(type(config))
    lines = [f"\n[{name}]"] if name else []
    tables = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            tables.append(commented_toml(value, f"{name}.{field.name}" if name else field.name))
            continue
        text = texts.get(field.name, "").replace("%%", "%")
        lines += textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="# ")
        lines.append(
            f"# {field.name} = none"
            if value is None
            else table_to_toml({field.name: value}).rstrip()
        )
    return "\n".join([*lines, *tables])


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the string that stands after it in the source, of the class or one it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= own_field_docs(base)
    return found


def own_field_docs(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found: dict[str, str] = {}
    for before, after in itertools.pairwise(body):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[before.target.id] = " ".join(after.value.value.split()).replace("%", "%%")
    return found
