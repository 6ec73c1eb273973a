"""Multiple-choice questions from files: what is asked, what could be answered, which is right.

    NAME.jsonl      {"query": ..., "choices": [...], "gold": 0}: the query is answered by one of
                    the choices (PIQA, ARC)
    NAME.jsonl      {"context_options": [...], "continuation": ..., "gold": 0}: one of the
                    contexts makes the continuation likely (WinoGrande)
    NAME.jsonl      {"passage": ..., "question": ..., "answer": true}: BoolQ as it is published;
                    the choices are no and yes
    NAME.jsonl      {"context": ..., "question": ..., "answerA": ..., "answerB": ..., "answerC":
                    ..., "label": "1"}: SIQA as it is published, its labels beside the answers
    NAME.txt        six lines an item: context, index of the right ending, four endings
                    (HellaSwag)

All may be compressed (`.gz`, `.bz2`). Which layout a line of a `.jsonl` file has is told by its
keys; any other file is read as lines.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from titans.data.documents import check_unicode, json_line, open_text

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".txt", ".txt.gz", ".txt.bz2")
ENDINGS = 4
SIQA = ("answerA", "answerB", "answerC")
OWN_LAYOUTS = ({"query", "choices"}, {"context_options", "continuation"})


class Option(NamedTuple):
    """A text in two parts: the second is scored, given the first. It begins with a space that
    does not count as part of the answer."""

    context: str
    continuation: str


class Item(NamedTuple):
    """A question: its options, and the index of the right one."""

    options: tuple[Option, ...]
    gold: int


def read_choices(path: str | Path, answer: str = "\nAnswer:") -> Iterator[Item]:
    """The items of a file, in order.

    answer: what stands between a query and its answer, in place of the query's own white space
    at its end; files of the other layouts have contexts that run on into the continuation.

    Raises ValueError, in one line that names file and line: missing, unreadable, not one of the
    layouts, an empty context or choice, fewer than two choices, a `gold` that is none of them.
    """
    path = Path(path)
    items = read_json_lines(path, answer) if ".jsonl" in path.suffixes else read_endings(path)
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise ValueError(f"{path}: no questions in it")


def task_name(path: Path) -> str:
    """`arc_easy` for `folder/arc_easy.jsonl.gz`."""
    return path.name.split(".")[0]


def choice_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files themselves; of a folder, those with one of `SUFFIXES`, sorted."""
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(f for f in path.glob("*") if f.name.endswith(SUFFIXES))
        if path.is_dir() and not inside:
            raise ValueError(f"{path}: no question files in it ({', '.join(SUFFIXES)})")
        files += inside if path.is_dir() else [path]
    return files


def read_json_lines(path: Path, answer: str) -> Iterator[Item]:
    with open_text(path, "utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            yield read_row(json_line(line, where), where, answer)


def read_row(row: Any, where: str, answer: str) -> Item:
    if isinstance(row, dict) and not any(own <= row.keys() for own in OWN_LAYOUTS):
        row = as_query(row, where)
    keys = set(row) if isinstance(row, dict) else set()
    if {"query", "choices"} <= keys:
        choices = strings(row["choices"], "choices", where)
        (query,) = strings([row["query"]], "query", where)
        contexts = [query.rstrip() + answer] * len(choices)
    elif {"context_options", "continuation"} <= keys:
        contexts = strings(row["context_options"], "context_options", where)
        choices = strings([row["continuation"]], "continuation", where) * len(contexts)
    else:
        raise ValueError(
            f"{where}: expected an object with query, choices and gold, or with context_options, "
            "continuation and gold, or one of BoolQ or SIQA, "
            f"got {sorted(keys) or type(row).__name__}"
        )
    return item(contexts, choices, row.get("gold"), where)


def as_query(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of BoolQ or SIQA as one with query, choices and gold; any other as it is."""
    if {"passage", "question", "answer"} <= row.keys():
        passage, asked = strings([row["passage"], row["question"]], "passage and question", where)
        gold = int(row["answer"]) if isinstance(row["answer"], bool) else row["answer"]
        query = f"{passage.rstrip()}\nQuestion: {asked.rstrip().removesuffix('?')}?"
        return {"query": query, "choices": ["no", "yes"], "gold": gold}
    if {"context", "question", *SIQA, "label"} <= row.keys():
        context, asked = strings([row["context"], row["question"]], "context and question", where)
        if str(row["label"]) not in ("1", "2", "3"):
            raise ValueError(f"{where}: expected a label 1, 2 or 3, got {row['label']!r}")
        gold = int(row["label"]) - 1
        choices = [row[key] for key in SIQA]
        return {"query": f"{context.rstrip()} {asked}", "choices": choices, "gold": gold}
    return row


def read_endings(path: Path) -> Iterator[Item]:
    """HellaSwag as text: context, index of the right ending, four endings."""
    with open_text(path, "utf-8-sig") as stream:
        lines = enumerate((line.rstrip("\r\n") for line in stream), start=1)
        for number, context in lines:
            if not context:  # between items, and at the end
                continue
            block = [line for _, line in zip(range(1 + ENDINGS), lines, strict=False)]
            texts = [text for _, text in block]
            where = f"{path}:{number}"
            if len(texts) != 1 + ENDINGS or texts[0] not in map(str, range(ENDINGS)):
                raise ValueError(
                    f"{where}: expected a context, the index of the right ending and {ENDINGS} "
                    f"endings, got {texts[:1] or 'the end of the file'}"
                )
            yield item([context] * ENDINGS, texts[1:], int(texts[0]), where)


def item(contexts: list[str], choices: list[str], gold: Any, where: str) -> Item:
    if len(choices) < 2:
        raise ValueError(f"{where}: expected at least two choices, got {len(choices)}")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"{where}: expected a gold in 0..{len(choices) - 1}, got {gold!r}")
    if not all(text.strip() for text in [*contexts, *choices]):
        raise ValueError(f"{where}: expected text in every context and choice, got an empty one")
    pairs = zip(contexts, choices, strict=True)
    return Item(tuple(Option(c.rstrip(), " " + choice.strip()) for c, choice in pairs), gold)


def strings(value: Any, name: str, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{where}: expected {name} to be text, got {value!r}"[:200])
    for text in value:
        check_unicode(text, name, where)
    return value
