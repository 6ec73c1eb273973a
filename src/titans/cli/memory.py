"""titans memory: what a model remembers of its texts, as files."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans.cli.parser import add_json, count, refuse_options, verb
from titans.cli.reading import (
    add_device,
    add_encoding,
    add_model,
    add_read,
    add_sampling,
    add_tokenizer,
    check_target,
    open_all,
    open_model,
    read_prompt,
    read_texts,
    reading_line,
    run_read,
    save_memory,
    until,
)

if TYPE_CHECKING:
    from rich.table import Table

    from titans.models.lm import TitansLM
    from titans.state import ModelState


def add_memory(verbs: Any) -> None:
    group = verbs.add_parser("memory", help="keep what a model has read as files, and ask them")
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")

    read = verb(actions, "read", run_read, "read texts of any length into a memory file")
    add_read(read, "-o", "--output", required=True)
    add_json(read)

    ask = verb(actions, "ask", run_ask, "continue prompts after a memory, which stays as it is")
    add_model(ask)
    ask.add_argument("memory", type=Path, help="a memory file")
    ask.add_argument("prompts", nargs="+", metavar="PROMPT", help="text, or @FILE to read it")
    add_sampling(ask)
    add_tokenizer(ask)
    add_json(ask)

    info = verb(actions, "info", run_info, "say what a memory file holds")
    info.add_argument("memory", type=Path, help="a memory file")
    info.add_argument("--model", help="its model: then also how far the memory has moved")
    add_json(info)

    diff = verb(actions, "diff", run_diff, "say how far two memories of one model lie apart")
    diff.add_argument("first", type=Path, help="a memory file")
    diff.add_argument("second", type=Path, help="another one")
    diff.add_argument("--model", help="their model: then also how far each has moved")
    add_json(diff)

    fork = verb(actions, "fork", run_fork, "copy a memory, and maybe read on with the copy")
    fork.add_argument("memory", type=Path, help="a memory file; it stays as it is")
    fork.add_argument("-o", "--output", type=Path, required=True, help="write the copy here")
    fork.add_argument("--model", help="its model, to read on with")
    fork.add_argument("--text", nargs="+", metavar="TEXT", help="read these on; - for stdin")
    add_device(fork)
    add_tokenizer(fork)
    add_encoding(fork)
    add_json(fork)

    writes = verb(
        actions, "writes", run_writes, "say which tokens of texts a model's memories write"
    )
    add_model(writes)
    writes.add_argument("texts", nargs="+", metavar="TEXT", help="files, folders, or - for stdin")
    writes.add_argument("--memory", type=Path, help="read on after this memory file")
    writes.add_argument("--top", type=count, default=10, help="tokens to name for each memory")
    writes.add_argument("--before", type=count, default=8, help="tokens to show before each")
    add_tokenizer(writes)
    add_encoding(writes)
    add_json(writes)


def run_ask(options: argparse.Namespace) -> None:
    from titans.data.told import tell

    how = until(options)
    model, tokenizer, state = open_all(options)
    assert state is not None
    if state.batch_size != 1:
        raise ValueError(
            f"{options.memory}: holds {state.batch_size} texts side by side, expected one"
        )
    prompts = [read_prompt(prompt) for prompt in options.prompts]
    told = tell(
        model, tokenizer, [tokenizer.encode(prompt) for prompt in prompts], how, state=state
    )
    answers = [text for text, _ in told]
    if options.json:
        answered = [
            {"prompt": prompt} | answer._asdict()
            for prompt, answer in zip(prompts, told, strict=True)
        ]
        print(json.dumps({"tokens_read": state.position, "answers": answered}))
    elif len(prompts) == 1:
        print(answers[0])
    else:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(f"> {prompt}\n{answer}")


def run_info(options: argparse.Namespace) -> None:
    from titans.inspect import momentum_norm, moved
    from titans.inspect.weights import memory_states
    from titans.state import ModelState, read_notes

    state = ModelState.load(options.memory)
    report: dict[str, Any] = {
        "memory": str(options.memory),
        "file_bytes": options.memory.stat().st_size,
        "config_hash": state.config_hash,
        "tokenizer": read_notes(options.memory).get("tokenizer"),
        "tokens_read": state.position,
        "state_bytes": state.nbytes,
        "texts": state.batch_size,
        "memories": [
            {
                "block": block,
                "heads": held.rule.weights[0].shape[1],
                "weights": [list(w.shape[2:]) for w in held.rule.weights],
                "momentum": held.rule.momentum is not None,
            }
            for block, held in memory_states(state)
        ],
    }
    columns: dict[str, Any] = {}
    if options.model is not None:
        model = matching_model(options.model, state)
        columns["moved"] = moved(model, state).tolist()
        past = momentum_norm(model, state)
        columns["past_surprise"] = None if past is None else past.tolist()
    report |= columns
    if options.json:
        print(json.dumps(report))
        return
    count = f", {report['texts']} texts side by side" if report["texts"] > 1 else ""
    noted = f", tokenizer {report['tokenizer']}" if report["tokenizer"] else ""
    print(
        f"{report['tokens_read']:,} tokens read{count}; state of {report['state_bytes']:,} bytes, "
        f"file of {report['file_bytes']:,}; model {report['config_hash']}{noted}"
    )
    for index, memory in enumerate(report["memories"]):
        shapes = ", ".join(" x ".join(map(str, shape)) for shape in memory["weights"])
        more = ", with momentum" if memory["momentum"] else ""
        print(f"memory {index} in block {memory['block']}: {memory['heads']} of {shapes}{more}")
    show(state, {"moved from M_0": columns.get("moved"), "|S|": columns.get("past_surprise")})


def run_diff(options: argparse.Namespace) -> None:
    from titans.inspect import moved
    from titans.inspect.weights import weights_apart
    from titans.state import ModelState

    first, second = (ModelState.load(path) for path in (options.first, options.second))
    apart = weights_apart(first, second).tolist()
    ways: list[Any] = [None, None]
    if options.model is not None:
        model = matching_model(options.model, first)
        ways = [moved(model, state).tolist() for state in (first, second)]
    report = {
        "config_hash": first.config_hash,
        "tokens_read": [first.position, second.position],
        "equal": equal(first, second),
        "distance": apart,
        "moved": ways if options.model is not None else None,
    }
    if options.json:
        print(json.dumps(report))
        return
    same = "the same memory" if report["equal"] else "different memories"
    print(f"{same}: {first.position:,} and {second.position:,} tokens read")
    show(first, {"apart": apart, "first moved": ways[0], "second moved": ways[1]})


def run_fork(options: argparse.Namespace) -> None:
    from titans.state import ModelState, read_notes

    read = [options.memory, *(options.text or ()), *([options.model] if options.model else ())]
    check_target(options.output, [*read, options.tokenizer])
    if (options.model is None) != (options.text is None):
        raise ValueError("to read on with the copy give both --model and --text")
    if options.text is None:
        defaults = {"device": "auto", "tokenizer": "bytes", "encoding": "utf-8-sig"}
        refuse_options(options, "a copy that reads nothing", **defaults)
    report: dict[str, Any] = {}
    if options.text is None:
        state = ModelState.load(options.memory)
        state.save(options.output, read_notes(options.memory))
        line = f"{state.position:,} tokens read, state of {state.nbytes:,} bytes"
    else:
        model, tokenizer, before = open_all(options)
        state, report = read_texts(model, tokenizer, options.text, before, options.encoding)
        save_memory(state, options.output, tokenizer)
        line = reading_line(report)
    report |= {
        "tokens_read": state.position,
        "state_bytes": state.nbytes,
        "parent": str(options.memory),
        "memory": str(options.output),
    }
    print(json.dumps(report) if options.json else line)


def run_writes(options: argparse.Namespace) -> None:
    from titans.data.documents import check_readable, read_blocks
    from titans.data.tokenizers import encode_blocks
    from titans.inspect import writes

    check_readable(options.texts, options.encoding)
    model, tokenizer, state = open_all(options)
    tokens = encode_blocks(tokenizer, read_blocks(options.texts, options.encoding))
    found = writes(model, tokens, state, top=options.top, before=options.before)
    report: list[dict[str, Any]] = []
    for number, written in enumerate(found):
        strongest = [
            {
                "rate": write.rate,
                "position": write.position,
                "before": tokenizer.decode(list(write.before)),
                "token": tokenizer.decode([write.token]),
            }
            for write in written.strongest
        ]
        counts = {"tokens": written.tokens, "total": written.total, "kept": written.kept}
        report.append({"memory": number} | counts | {"strongest": strongest})
    if options.json:
        print(json.dumps({"memories": report}))
        return
    if not report:
        print("the model has no memory")
    for memory in report:
        print(
            f"memory {memory['memory']}: learning rates sum to {memory['total']:.4g} in "
            f"{memory['tokens']:,} tokens; forgetting leaves {memory['kept']:.3g} "
            "of what was there"
        )
        for write in memory["strongest"]:
            shown = f"{write['before']!r} > {write['token']!r}"
            print(f"  {write['rate']:.3f} at {write['position']:,}: {shown}")


def matching_model(name: str, state: "ModelState") -> "TitansLM":
    """The model, if the memory is one of its."""
    model = open_model(name)
    model.check_state(state, state.batch_size)
    return model


def equal(first: "ModelState", second: "ModelState") -> bool:
    """Have both read as many tokens, and do they remember bit for bit the same?"""
    ours, theirs = first.tensors(), second.tensors()
    return (
        first.position == second.position
        and ours.keys() == theirs.keys()
        and all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    )


def show(state: "ModelState", columns: dict[str, Any]) -> None:
    """A table with a row per text, memory and head; columns that are None are left out."""
    from rich.console import Console

    kept = {name: values for name, values in columns.items() if values is not None}
    if kept:
        Console().print(table(state, kept))


def table(state: "ModelState", columns: dict[str, Any]) -> "Table":
    from rich.table import Table

    from titans.inspect.weights import memory_states

    several = state.batch_size > 1
    view = Table(*(["text"] if several else []), "memory", "block", "head")
    for name in columns:
        view.add_column(name, justify="right")
    for text in range(state.batch_size):
        for memory, (block, held) in enumerate(memory_states(state)):
            for head in range(held.rule.weights[0].shape[1]):
                place = [text] if several else []
                numbers = [f"{values[text][memory][head]:.4g}" for values in columns.values()]
                view.add_row(*map(str, [*place, memory, block, head]), *numbers)
    return view
