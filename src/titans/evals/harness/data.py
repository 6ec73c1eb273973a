"""What our task files read: the package's own readers, as data sets that lm-eval takes.

Importing it makes `--model titans` known: lm-eval imports what a task file names before it looks
for the model, if it is given the file itself.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from titans.data.choices import SUFFIXES, Item, choice_files, read_choices, task_name
from titans.data.documents import expand_paths, read_documents
from titans.data.needle import NeedleTask
from titans.data.tokenizers import load_tokenizer
from titans.evals.harness import HarnessConfig
from titans.evals.harness import model as model  # registers
from titans.evals.needle import NeedleConfig


def questions(file: str, questions: str = HarnessConfig.questions, **others: Any) -> dict[str, Any]:
    """Items of the one file in the folder `questions` whose name begins with `file`.

    Rows: choices, gold, and `context`, which all choices have in common; or `contexts` and
    `continuation` where they have that in common (WinoGrande). others: of lm-eval.

    Raises ValueError, in one line, where there is no such file or several.
    """
    (folder,) = expand_paths((questions,))
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of questions")
    found = [path for path in choice_files([folder]) if task_name(path).startswith(file)]
    if len(found) != 1:
        raise ValueError(
            f"{folder}: expected one file named {file}... ({', '.join(SUFFIXES)}), got {len(found)}"
        )
    return dataset([row(item) for item in read_choices(found[0])])


def row(item: Item) -> dict[str, Any]:
    """lm-eval puts a space before the continuation, and divides by the length of what it has."""
    contexts = [option.context for option in item.options]
    choices = [option.continuation[1:] for option in item.options]
    if len(set(contexts)) == 1:
        return {"context": contexts[0], "choices": choices, "gold": item.gold}
    return {"contexts": contexts, "continuation": choices[0], "gold": item.gold}


def text(text: str | Sequence[str] = HarnessConfig.text, **others: Any) -> dict[str, Any]:
    """The documents of files and folders. Rows: name, text."""
    paths = expand_paths((text,) if isinstance(text, str) else tuple(text))
    return dataset([document._asdict() for document in read_documents(paths)])


def needles(
    lengths: Sequence[int],
    samples: int,
    words: str = NeedleConfig.words,
    tokenizer: str = "bytes",
    **others: Any,
) -> dict[str, Any]:
    """RULER's single needle in noise, as `titans eval needle --kinds single-1` has it.

    Rows: length (tokens of the tokenizer), prompt, expected (strings).
    """
    (folder,) = expand_paths((words,))
    encoding = load_tokenizer(tokenizer)
    task = NeedleTask("single-1", folder, None, encoding, held_out=True)
    rows = []
    for length in lengths:
        for index in range(samples):
            sample = task.sample(length, np.random.default_rng((0, index)))
            prompt = np.concatenate([piece.tokens for piece in sample.pieces()])
            rows.append(
                {
                    "length": length,
                    "prompt": encoding.decode(prompt),
                    "expected": list(sample.expected),
                }
            )
    return dataset(rows)


def found(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """RULER's score: the share of the expected strings that occur, whatever the case."""
    said = results[0].lower()
    return {"found": sum(e.lower() in said for e in doc["expected"]) / len(doc["expected"])}


def dataset(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """In memory: nothing is written to the cache of `datasets`, and nothing downloaded."""
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
