"""Inner workings of one's own, by the name under which a config has them.

A memory is made of a network, an objective, a retention and an optimizer. The built-in ones are
fields' defaults; others are registered before a config names them:

    titans.register("objective", "huber", lambda read, value: (read - value).clamp(-1, 1))
    titans.MemoryConfig(objective="huber")

What each kind of thing has to be: docs/own_rules.md.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

Kind = Literal["network", "objective", "retention", "optimizer"]
KINDS = get_args(Kind)

BUILT_IN: dict[str, tuple[str, ...]] = {
    "network": ("mlp",),
    "objective": ("l2", "dot"),
    "retention": ("decay",),
    "optimizer": ("momentum",),
}
# By what they can do: the classes are in `titans.ops`, which comes after this module.
NEEDED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "network": (callable, "a function of the config"),
    "objective": (callable, "a function"),
    "retention": (lambda thing: hasattr(thing, "update"), "a titans.ops.Retention"),
    "optimizer": (lambda thing: hasattr(thing, "step"), "a titans.ops.Optimizer"),
}
_OWN: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


def register(kind: Kind, name: str, thing: Any) -> None:
    """Make `thing` what a `MemoryConfig` means by `name`, in this process.

    kind: "network": a function of the config that gives a `titans.ops.Network`; "objective": a
        function of prediction and target that gives the slope of the loss; "retention" and
        "optimizer": a `titans.ops.Retention`, a `titans.ops.Optimizer`.

    A saved model has the name only: register the same thing before it is loaded.

    Raises ValueError for another kind, and for a name that means something else already.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a {kind} must be a text, got {name!r}")
    fits, wanted = NEEDED[kind]
    if not fits(thing):
        raise ValueError(f"{kind} {name!r} must be {wanted}, got {type(thing).__name__}")
    if name in BUILT_IN[kind] or _OWN[kind].get(name, thing) != thing:
        raise ValueError(f"{kind} {name!r} is registered already; take another name")
    _OWN[kind][name] = thing


def registered(kind: str) -> list[str]:
    """The names a config may give, the built-in ones first."""
    return [*BUILT_IN[kind], *_OWN[kind]]


def find(kind: str, name: str) -> Any:
    """What was registered under a name, None for a built-in one."""
    return None if name in BUILT_IN[kind] else _OWN[kind][name]
