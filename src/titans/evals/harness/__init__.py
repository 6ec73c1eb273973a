"""lm-evaluation-harness on Titans models: its tasks, ours from local files, one memory a document.

`harness` is what `titans eval harness` runs. `model.py` has the class that lm-eval knows as
`titans`; importing it, or anything of `data.py`, registers it. Needs the extra `eval`.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titans.data.tokenizers import Tokenizer
from titans.models.lm import TitansLM

TASKS = Path(__file__).parent / "tasks"
"""Folder of our task files, for lm-eval's `--include_path`."""


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """Which tasks, and where their files are."""

    tasks: tuple[str, ...]
    """Names: titans_commonsense, titans_piqa, titans_hellaswag, titans_winogrande,
    titans_arc_easy, titans_arc_challenge, titans_text, titans_needle, lm-eval's own (which it
    downloads), those of `include`, or the path of a task file."""
    include: tuple[str, ...] = ()
    """Folders with task files of your own."""
    questions: str = "$TITANS_DATA_DIR/commonsense"
    """Folder with the files of questions, in the layouts of `titans.data.choices`."""
    text: tuple[str, ...] = ("$TITANS_DATA_DIR/text/wikitext-2/test.txt.gz",)
    """What titans_text reads: files and folders, see `titans.data.documents`."""
    limit: int = 0
    """Only the first so many documents of each task; 0 takes all."""
    fewshot: int | None = None
    """Worked examples before each question; None: as many as the task file says, or none."""
    rows: int = 8
    """Documents or prompts read side by side: speed and memory only."""
    write: bool = True
    """False: memories are read and never written."""
    seed: int = 0
    """Of the worked examples, and of sampling in tasks that sample."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty: expected at least one name")
        for name in ("limit", "fewshot", "seed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")


@dataclass(frozen=True, kw_only=True)
class HarnessScore:
    """One metric of a task or a group, as lm-eval reports it. error: standard error, None where
    lm-eval gives none. items: documents asked."""

    task: str
    items: int
    metric: str
    value: float
    error: float | None


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """scores: by task; groups: means over their tasks. version: of lm-eval."""

    scores: tuple[HarnessScore, ...]
    groups: tuple[HarnessScore, ...]
    version: str
    write: bool


def harness(
    model: TitansLM, config: HarnessConfig, tokenizer: Tokenizer | None = None
) -> HarnessResult:
    """Run the tasks with lm-eval; the tokenizer defaults to bytes.

    Raises ImportError without the extra `eval`, and ValueError, in one line, for an unknown task,
    for a task file that is not YAML and for files that are missing.
    """
    from titans.evals.harness.model import HarnessLM  # also says what to install
    from lm_eval import __version__, evaluate  # isort: skip
    from yaml import YAMLError

    lm = HarnessLM(model, tokenizer or "bytes", batch_size=config.rows, write=config.write)
    with torch.random.fork_rng(devices=[]), errors_only():
        torch.manual_seed(config.seed)
        manager = task_manager(config, lm.text.name)
        try:
            loaded = manager.load(list(config.tasks))
        except YAMLError as error:
            where = " ".join(str(error).split())
            raise ValueError(f"a task file is not YAML: {where}") from None
        for task in loaded["tasks"].values():
            fixed = task.config.num_fewshot  # 0: the task has no examples
            shots = fixed if fixed == 0 or config.fewshot is None else config.fewshot
            task.set_config("num_fewshot", shots or 0)
            task.set_fewshot_seed(config.seed)
        results = evaluate(lm, loaded, limit=config.limit or None, log_samples=False)
    counts = {name: count["effective"] for name, count in results["n-samples"].items()}
    groups = results.get("groups", {})
    members = results["group_subtasks"]

    def size(name: str) -> int:
        """Documents of a task, or of a group, in which there may be others."""
        return counts[name] if name in counts else sum(map(size, members[name]))

    return HarnessResult(
        scores=tuple(scores({k: v for k, v in results["results"].items() if k in counts}, counts)),
        groups=tuple(scores(groups, {name: size(name) for name in groups})),
        version=__version__,
        write=config.write,
    )


def task_manager(config: HarnessConfig, tokenizer: str) -> Any:
    """lm-eval's index of task files. Its own thousands are read only if a name is not ours.

    Raises ValueError for a name in neither, and for a folder that is not there.
    """
    from lm_eval.tasks import TaskManager

    for folder in config.include:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder of task files")
    paths = [str(TASKS), *config.include]
    given = {"questions": config.questions, "text": list(config.text), "tokenizer": tokenizer}
    for defaults in (False, True):
        manager = TaskManager(include_path=paths, include_defaults=defaults, metadata=given)
        known = set(manager.all_tasks)
        unknown = [name for name in config.tasks if name not in known and not is_file(name)]
        if not unknown:
            return manager
    ours = ", ".join(name for name in sorted(known) if name.startswith("titans_"))
    raise ValueError(
        f"unknown task {unknown[0]!r}: expected {ours}, or one of lm-eval's own (lm_eval ls tasks)"
    )


@contextmanager
def errors_only() -> Iterator[None]:
    """lm-eval logs much as warnings that is none of a user's concern."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_file(name: str) -> bool:
    return name.endswith(".yaml") and Path(name).is_file()


def scores(
    results: Mapping[str, Mapping[str, Any]], items: Mapping[str, int]
) -> Iterator[HarnessScore]:
    """lm-eval's rows: {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}."""
    for task, row in results.items():
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = row.get(f"{metric}_stderr,{kind}")
            yield HarnessScore(
                task=task,
                items=items[task],
                metric=metric if kind == "none" else f"{metric} ({kind})",
                value=float(value),
                error=float(error) if isinstance(error, float | int) else None,
            )
