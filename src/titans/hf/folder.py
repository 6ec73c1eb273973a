"""The code in a model's folder, which loads it where this package is not installed.

`modeling_titans.py`, which config.json names, imports `titans.hf` where there is one. Else it
imports the files beside it: a copy of the modules that the model needs, made when the folder was
written. transformers copies such files one by one, without folders and only what relative imports
name, and refuses imports of packages that are not there. So `titans.ops.rule` becomes
`titans_ops_rule.py`, its imports relative, and jaxtyping and einops the few lines of `standins.py`.
Of the forms of the rule only those in torch come along.
"""

import ast
import os
from pathlib import Path

ENTRY = "modeling_titans"
AUTO_MAP = {
    "AutoConfig": f"{ENTRY}.TitansHFConfig",
    "AutoModelForCausalLM": f"{ENTRY}.TitansForCausalLM",
}
ENTRY_CODE = '''"""A Titans model, of the installed package or of the copy beside this file."""

try:
    from titans.hf import TitansCache, TitansForCausalLM, TitansHFConfig
except ImportError:
    from .titans_hf_cache import TitansCache
    from .titans_hf_config import TitansHFConfig
    from .titans_hf_model import TitansForCausalLM

__all__ = ["TitansCache", "TitansForCausalLM", "TitansHFConfig"]


def _files() -> None:
    """Never called. transformers 5.0 copies the files that this one names, and no others."""
'''
START = ("titans.hf.cache", "titans.hf.config", "titans.hf.model")
STAND_INS = ("einops", "jaxtyping")
LEFT_OUT = "titans.ops.triton."  # kernels: they import triton, which need not be there


def write_code(folder: str | os.PathLike) -> None:
    """Write the files; the folder is made if it is not there."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in code_files().items():
        (target / name).write_text(text, encoding="utf-8")


def code_files() -> dict[str, str]:
    """Name and content of every file."""
    here = Path(__file__)
    if not __name__.startswith("titans."):  # this is a copy itself: copy on
        copies = [*here.parent.glob("titans_*.py"), here.parent / f"{ENTRY}.py"]
        return {path.name: path.read_text(encoding="utf-8") for path in copies}
    package = here.parents[1]
    files = {f"{ENTRY}.py": ENTRY_CODE}
    waiting = list(START)
    while waiting:
        module = waiting.pop()
        if f"{flat(module)}.py" not in files:
            files[f"{flat(module)}.py"], needed = rewritten(source(package, module))
            waiting += needed
    names = sorted(name.removesuffix(".py") for name in files if name != f"{ENTRY}.py")
    files[f"{ENTRY}.py"] += "".join(f"    from .{name} import __doc__\n" for name in names)
    return files


def source(package: Path, module: str) -> str:
    path = package.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text(encoding="utf-8")


def flat(module: str) -> str:
    return module.replace(".", "_")


def rewritten(text: str) -> tuple[str, list[str]]:
    """A module with its imports of this package made relative, and which modules those are."""
    lines = text.splitlines(keepends=True)
    needed = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "titans" for alias in node.names), text
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        if f"{node.module}.".startswith(LEFT_OUT) and f"{node.module}." != LEFT_OUT:
            lines[first] = (
                f'{" " * node.col_offset}raise ImportError("{node.module} is not in this folder: '
                'install the package titans")\n'
            )
            lines[first + 1 : last] = [""] * (last - first - 1)
        elif node.module in STAND_INS or node.module.split(".")[0] == "titans":
            module = "titans.hf.standins" if node.module in STAND_INS else node.module
            needed.append(module)
            lines[first] = lines[first].replace(
                f"from {node.module} import", f"from .{flat(module)} import", 1
            )
    return "".join(lines), needed
