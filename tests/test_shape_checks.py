"""Tests run with the shapes of annotations checked: a wrong one is more than a wrong comment."""

import jaxtyping
import pytest
import torch

from titans.layers.attention import rotate


def test_shapes_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError, match="rotate"):
        rotate(torch.zeros(4), torch.arange(4), 10_000.0)


def test_a_result_is_checked(monkeypatch):
    monkeypatch.setattr(torch, "cat", lambda parts, dim: parts[0])
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        rotate(torch.zeros(2, 4, 8), torch.arange(4), 10_000.0)


def test_a_user_has_no_checks(without_shape_checks):
    with pytest.raises(IndexError):
        rotate(torch.tensor(1.0), torch.arange(4), 10_000.0)
