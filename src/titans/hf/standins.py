"""What the models use of jaxtyping and einops, for folders that load without them."""

from typing import Any

import torch
from torch import Tensor


class Shaped:
    """`Float[Tensor, "b t"]` is Tensor: shapes are for the reader, and checked by the tests."""

    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        return item[0]


Float = Bool = Int = Int64 = Integer = Shaped


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """einops.rearrange for patterns of names and parentheses: "b t (h d) -> b h t d"."""
    left, right = (axes(side) for side in pattern.split("->"))
    known = dict(sizes)
    shape = []
    for group, size in zip(left, x.shape, strict=True):
        rest = 1
        for name in group:
            rest *= known.get(name, 1)
        known |= {name: size // rest for name in group if name not in known}
        shape += [known[name] for name in group]
    order = [name for group in left for name in group]
    x = x.reshape(shape).permute([order.index(name) for group in right for name in group])
    for axis, group in enumerate(right):
        if len(group) != 1:
            x = x.flatten(axis, axis + len(group) - 1)
    return x


def axes(side: str) -> list[list[str]]:
    """ "b t (h d)" -> [["b"], ["t"], ["h", "d"]]"""
    groups: list[list[str]] = []
    inside = False
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            groups.append([])
        elif word != ")" and inside:
            groups[-1].append(word)
        elif word != ")":
            groups.append([word])
        inside = word == "(" or (inside and word != ")")
    return groups


def einsum(*given: Any) -> Tensor:
    """einops.einsum, whose pattern comes last and whose axes have names of one letter."""
    *factors, pattern = given
    return torch.einsum(pattern.replace(" ", ""), *factors)
