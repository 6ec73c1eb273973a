"""A run small enough to train in a second, on a text of its own."""

import random

import pytest

from titans.config import MemoryConfig, TitansConfig
from titans.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Two documents of words, and one to hold out."""
    draw = random.Random(0)
    words = ["memory", "surprise", "decay", "gate", "token", "chunk", "key", "value", "titan"]
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("one", "two", "held_out"):
        (folder / f"{name}.txt").write_text(" ".join(draw.choices(words, k=600)))
    return folder


@pytest.fixture
def tiny(corpus):
    """tiny(task, ...) -> RunConfig; keywords go to the section that knows them."""

    def make(task="text", variant="lmm", model=None, data=None, optimizer=None, **train):
        memory = MemoryConfig(heads=2, conv_width=2, block_size=16)
        sizes = {"dim": 32, "ffn_hidden": 32, "window": 16, "segment": 16, "persistent": 2}
        files = {"paths": (str(corpus / "one.txt"), str(corpus / "two.txt"))}
        text = {"length": 24, "segments": 3, "valid_paths": (str(corpus / "held_out.txt"),)}
        return RunConfig(
            model=TitansConfig(variant=variant, memory=memory, **{**sizes, **(model or {})}),
            data=DataConfig(
                task=task, **{**files, **(text if task == "text" else {}), **(data or {})}
            ),
            train=TrainConfig(
                **{
                    "steps": 8,
                    "tokens_per_batch": 128,
                    "eval_every": 0,
                    "eval_batches": 2,
                    "checkpoint_every": 4,
                    "threads": 1,
                    **train,
                }
            ),
            optimizer=OptimizerConfig(**{"warmup": 2, **(optimizer or {})}),
        )

    return make
