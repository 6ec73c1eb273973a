"""How many pairs a state can hold: Titans and its rivals, at several state sizes.

    python results/capacity/run.py [--model NAME ...] [--workers 2] [--seeds 0 1] [--table-only]

Multi-query associative recall (`titans eval recall`): every model is trained from scratch on rows
of 1 to 64 pairs and asked for 4 to 128. Finished rows of results.json are not repeated.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from titans.evals.jobs import command, read_rows, run_jobs, runner_parser, split_diverged
from titans.evals.recall import BEGIN_PAIRS, RecallConfig, recall
from titans.evals.report import markdown_table, origin, write_lines

HERE = Path(__file__).parent
SIZES = (16, 32, 64)
STEPS = 1000  # Mamba2 has learned nothing after 300 (heads of 16)
DEEP = {"depth": 2, "momentum": True}
MODELS: dict[str, dict[str, Any]] = {
    "LMM, linear memory": {"model": "lmm"},
    "LMM, two-layer memory, momentum": {"model": "lmm"} | DEEP,
    "MAC, linear memory": {"model": "mac"},
    "Gated DeltaNet": {"model": "gated-deltanet"},
    "DeltaNet": {"model": "deltanet"},
    "TTT-MLP": {"model": "ttt-mlp"},
    "RWKV-7": {"model": "rwkv7"},
    "Mamba2": {"model": "mamba2"},
    "Linear attention": {"model": "linear-attention"},
    "Transformer++": {"model": "transformer"},
    "Sliding attention": {"model": "sliding"},
    # How attention can begin (docs/results.md): no memory above needed any of it.
    "Transformer++, a": {"model": "transformer", "shared": 1.0, "steps": 3000},
    "Transformer++, b": {"model": "transformer", "begin": 1500},
    "Transformer++, a and b": {"model": "transformer", "shared": 1.0, "begin": 1500},
    "Sliding attention, a and b": {"model": "sliding", "shared": 1.0, "begin": 1500},
}
NO_STATE_SIZE = ("transformer", "sliding", "rwkv7")  # two heads of half the width


def run(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = RecallConfig(
        **MODELS[job["name"]] | {"steps": job["steps"]}, head_dim=job["head_dim"], seed=job["seed"]
    )
    result = dataclasses.asdict(recall(config))
    return {key: result[key] for key in ("state", "parameters", "seconds", "cells")}


def write_page(rows: list[dict[str, Any]]) -> None:
    rows, failed = split_diverged(rows)
    if not rows:
        return
    pairs = [cell["pairs"] for cell in rows[0]["cells"]]
    table = []
    for name in MODELS:
        for size in SIZES:
            seeds = [r for r in rows if (r["name"], r["head_dim"]) == (name, size)]
            if seeds:
                means = [
                    sum(r["cells"][i]["accuracy"] for r in seeds) / len(seeds)
                    for i in range(len(pairs))
                ]
                cells = (f"{mean:.2f}" for mean in means)
                table.append((name, f"{seeds[0]['state']:,}", *cells))
    config = RecallConfig()
    lines = [
        "# How many pairs a state can hold",
        "",
        f"Models of two layers of width {config.dim} without feed-forward, one memory head of 16,",
        "32 or 64 (RWKV-7 and both with attention alone have two heads of 32),",
        f"trained from scratch on {STEPS:,} steps of {config.tokens:,} tokens",
        f"(rows of 1 to {config.most_trained} pairs out of {config.keys} keys and as many values),",
        "by `python results/capacity/run.py`. Accuracy by pairs in the row; every key is asked,",
        f"no answer is revealed, in {config.rows} rows of each number. State: numbers a model",
        "carries, attention's for the longest row. a: embeddings start with a vector in common",
        f"(3,000 steps where it is a alone); b: 1,500 steps on rows of {BEGIN_PAIRS} pairs come",
        "before.",
        "",
        *markdown_table(("model", "state", *(f"{n} pairs" for n in pairs)), table),
        "",
        f"Seeds {', '.join(map(str, sorted({r['seed'] for r in rows})))}; {origin(rows)}.",
    ]
    write_lines(HERE / "README.md", [*lines, *failed])


def main() -> None:
    parser = runner_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    options = parser.parse_args()
    path = HERE / "results.json"
    rows = read_rows(path)
    if not options.table_only:
        jobs = [
            {
                "name": name,
                "head_dim": size,
                "seed": seed,
                "steps": MODELS[name].get("steps", STEPS),
            }
            for seed in options.seeds
            for size in SIZES
            for name in options.model
            if size == SIZES[0] or MODELS[name]["model"] not in NO_STATE_SIZE
        ]
        rows = run_jobs(path, jobs, run, workers=options.workers)
    write_page(rows)


if __name__ == "__main__":
    command(main)
