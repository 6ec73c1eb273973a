"""Gates that close against the paper's sigmoids: recall of bound pairs, far beyond training.

    python results/recall/run.py [--runs FOLDER] [--workers 2] [--model NAME ...] [--table-only]

Every model has two layers of width 128 and reads key-value pairs in random noise
(`titans.data.pairs`); it is trained on rows of at most 1,024 tokens, and asked after ever longer
ones. Writes results.json, README.md and recall.png beside this file. Weights are kept in --runs;
a finished training or measurement is not repeated.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import titans
from titans import MemoryConfig, TitansConfig, TitansLM
from titans.data.pairs import IGNORED, VOCABULARY, PairBatch, PairTask, guess
from titans.evals.jobs import (
    command,
    diverged,
    find,
    kept,
    read_rows,
    run_jobs,
    runner_parser,
    split_diverged,
)
from titans.evals.recall import fit_pairs
from titans.evals.report import markdown_table, origin, recalled, write_lines

HERE = Path(__file__).parent
STEPS, SHORT_STEPS, TOKENS = 1000, 600, 4096
LEARNING_RATE, WRITE_COST = 2e-3, 0.02
PAIRS = 4
LENGTHS = (64, 1024, 16384, 262144, 1048576, 10485760)
LONG = 2**18  # beyond, a model that has already forgotten all is not asked again

CLOSING = MemoryConfig(heads=2)
SIGMOID = dataclasses.replace(CLOSING, gates="sigmoid", tie_forgetting=False)
BASE = TitansConfig(
    vocab_size=VOCABULARY,
    dim=128,
    layers=2,
    heads=2,
    ffn_hidden=176,
    window=64,
    segment=64,
    persistent=0,
)


def models() -> dict[str, TitansConfig]:
    """Gated DeltaNet with gates that close is LMM with them: the same rule."""
    found = {
        f"{variant.upper()}, {gates}": dataclasses.replace(BASE, variant=variant, memory=memory)
        for variant in ("lmm", "mac", "mag", "mal")
        for gates, memory in (("closing", CLOSING), ("sigmoid", SIGMOID))
    }
    found["Gated DeltaNet"] = dataclasses.replace(
        BASE, variant="gated-deltanet", memory=MemoryConfig(heads=2)
    )
    return found


def train(job: dict[str, Any], runs: Path) -> dict[str, Any]:
    """Train one model and save it; how well it recalls what it was trained on."""
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    model = TitansLM(models()[job["model"]])
    begin, curve = time.perf_counter(), []

    def batch(step: int) -> PairBatch:
        length = 64 if step < SHORT_STEPS else (64, 256, 1024)[step % 3]
        pairs = PAIRS if length == 64 else PAIRS + 4 * (step % 2)
        seed = STEPS * job["seed"] + step
        return PairTask(rows=TOKENS // length, length=length, pairs=pairs, seed=seed).batch(0)

    fit_pairs(
        model, batch, STEPS, LEARNING_RATE, WRITE_COST, lambda *point: curve.append(list(point))
    )
    model.save(runs / f"{job['model']}-{job['seed']}.safetensors")
    return {
        "parameters": model.parameter_count,
        "curve": curve,
        "minutes": (time.perf_counter() - begin) / 60,
    }


@torch.inference_mode()
def measure(job: dict[str, Any], runs: Path) -> dict[str, Any]:
    """Recall of pairs whose row has `length` tokens, in 2 to 16 rows."""
    torch.set_num_threads(1)
    model = titans.load(kept(runs / f"{job['model']}-{job['seed']}.safetensors", job["model"]))
    rows = max(2, min(16, 2**20 // job["length"]))
    task = PairTask(rows=rows, length=job["length"], pairs=PAIRS, seed=10**6)
    state, right, count, begin = None, 0, 0, time.perf_counter()
    for tokens, labels in task.stream(0, 1024):
        logits, state = model(tokens, state)
        asked = labels != IGNORED
        right += int((logits.argmax(-1) == labels)[asked].sum())
        count += int(asked.sum())
    speed = rows * job["length"] / (time.perf_counter() - begin)
    return {"recall": right / count, "asked": count, "tokens_per_s": speed}


def lost(rows: list[dict[str, Any]], job: dict[str, Any]) -> bool:
    """Was no more than any of the values left at a shorter length? Then this one is not asked."""
    shorter = [find(rows, job | {"length": n}) for n in LENGTHS if n < job["length"]]
    return job["length"] > LONG and any(
        r is not None and r.get("recall", 0.0) <= 1.1 * guess(PAIRS) for r in shorter
    )


def write_page(rows: list[dict[str, Any]]) -> None:
    rows, failed = split_diverged(rows)
    trained = [r for r in rows if r["stage"] == "train"]
    asked = [r for r in rows if r["stage"] == "recall"]
    lengths = sorted({r["length"] for r in asked})
    names = [name for name in models() if any(r["model"] == name for r in trained)]
    table, counts = [], {}
    for name in names:
        cells = []
        for n in lengths:
            found = [r for r in asked if (r["model"], r["length"]) == (name, n)]
            counts[n] = max(counts.get(n, 0), sum(r["asked"] for r in found))
            cells.append(recalled(found) if found else "")
        opened = [r["curve"][-1][2] for r in trained if r["model"] == name]
        table.append((name, *cells, f"{100 * sum(opened) / len(opened):.1f} %"))
    lines = [
        "# Recall against length: gates that close, and the paper's sigmoids",
        "",
        f"Two layers of width 128, exact linear memories, trained for {STEPS:,} steps on pairs in",
        "noise, rows of at most 1,024 tokens; by `python results/recall/run.py`. Percent of pairs",
        "recalled (95 % interval where fewer than 100 were asked). Four pairs a row;",
        f"saying any of its values gives {100 * guess(PAIRS):.0f}. Empty: not asked, so far",
        "or as nothing was left at a shorter length. Last column: the mean learning rate over",
        "its maximum at the end of training. Gated DeltaNet's gates are its own; with gates that",
        "close its rule is that of the LMM in the first row, which starts and forgets differently.",
        "",
        *markdown_table(("model, gates", *(f"{n:,}" for n in lengths), "open"), table),
        "",
        f"Questions asked per length: {', '.join(map(str, counts.values()))}.",
        f"Seeds {', '.join(map(str, sorted({r['seed'] for r in trained})))}; {origin(rows)}.",
        "",
        "![recall against length](recall.png)",
    ]
    write_lines(HERE / "README.md", [*lines, *failed])
    plot(asked, names)


def plot(asked: list[dict[str, Any]], names: list[str]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    colours = dict(zip(("LMM", "MAC", "MAG", "MAL", "Gated DeltaNet"), range(5), strict=True))
    for name in names:
        own = [r for r in asked if r["model"] == name]
        line = []  # over seeds, where there are several
        for length in sorted({r["length"] for r in own}):
            found = [r["recall"] for r in own if r["length"] == length]
            line.append((length, sum(found) / len(found)))
        family, _, gates = name.partition(", ")
        style = "-" if gates == "closing" else "--"
        x, y = zip(*line, strict=True) if line else ((), ())
        axis.plot(x, y, style, marker="o", color=f"C{colours[family]}", label=name)
    axis.axhline(guess(PAIRS), color="#888", linestyle=":", label="any of the row's values")
    axis.axvspan(64, 1024, color="#ddd", alpha=0.5, label="lengths in training")
    axis.set_xscale("log")
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("tokens in the row")
    axis.set_ylabel("pairs recalled")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(HERE / "recall.png", dpi=110)


def main() -> None:
    parser = runner_parser(__doc__, HERE.parents[1] / "runs/recall")
    parser.add_argument("--model", choices=models(), nargs="+", default=list(models()))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    options = parser.parse_args()
    runs, path = options.runs.resolve(), HERE / "results.json"
    runs.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path)
    if not options.table_only:
        who = [{"model": name, "seed": seed} for seed in options.seeds for name in options.model]
        training = [{"stage": "train"} | w for w in who]
        rows = run_jobs(path, training, partial(train, runs=runs), workers=options.workers)
        who = [w for w in who if not diverged(rows, {"stage": "train"} | w)]
        for length in sorted(options.lengths):
            asking = [{"stage": "recall"} | w | {"length": length} for w in who]
            asking = [job for job in asking if not lost(rows, job)]
            rows = run_jobs(path, asking, partial(measure, runs=runs), workers=options.workers)
            write_page(rows)
    write_page(rows)


if __name__ == "__main__":
    command(main)
