"""Imports run one way, and importing the package costs nothing it need not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "titans"

# A module may import from its own layer and from layers before it.
LAYERS = [
    ("config", "baselines", "registry", "state", "fresh", "heap"),
    ("ops",),
    ("distributed",),
    ("layers",),
    ("models",),
    ("presets", "generate"),
    ("inspect",),
    ("data",),
    ("train", "evals", "hf"),
    ("demo",),
    ("serve",),
    ("studio",),
    ("bench",),
    ("cli",),
    ("__main__",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def imported(path: Path) -> set[str]:
    """Top-level parts of `titans` that a module imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("titans."):
            parts = str(node.module).split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("titans.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in RANK, f"say in LAYERS where {own} stands"
    for other in imported(path):
        assert RANK[other] <= RANK[own], f"{own} imports {other}, which comes after it"


def test_optional_packages_are_not_imported_with_the_package() -> None:
    code = (
        "import sys, titans, titans.cli; "
        "heavy = {'matplotlib', 'transformers', 'tokenizers', 'datasets', 'wandb', "
        "'tensorboard', 'triton', 'rich', 'starlette', 'uvicorn', 'lm_eval'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
