"""A quiet transformers, and what its own tests expect of pytest (test_common_mixins.py)."""

import os

import pytest

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

MARKERS = (
    "generate",
    "is_pt_flax_cross_test",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "all_flash_attn_test",
    "torch_compile_test",
    "torch_export_test",
    "accelerate_tests",
    "device_map_test",
    "training_ci",
    "tensor_parallel_ci",
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' tests")
