"""What each part of the memory is worth: the paper's ablation, at our scale.

    TITANS_DATA_DIR=... python results/ablation/run.py [--runs FOLDER] [--workers 2] [--seeds 0 1]

`titans eval ablation` on WikiText-2, as a table that fills over several days: finished rows of
results.json are not repeated, and a stopped training goes on from its last checkpoint in --runs.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from titans.evals.ablation import PARTS, AblationConfig, at_chunk, bits_per_byte, train_part
from titans.evals.jobs import (
    command,
    data_folder,
    read_rows,
    run_jobs,
    runner_parser,
    split_diverged,
)
from titans.evals.report import markdown_table, mean_and_range, origin, write_lines

HERE = Path(__file__).parent
SEEDS = (0, 1)
CHUNKS = {1: "chunk-1", 4: "chunk-4", 16: "lmm", 64: "chunk-64"}


def config(root: Path) -> AblationConfig:
    text = root / "text/wikitext-2"
    return AblationConfig(
        paths=(str(text / "train.txt.gz"),), test_paths=(str(text / "test.txt.gz"),)
    )


def fit(job: dict[str, Any], runs: Path, root: Path) -> dict[str, Any]:
    """Train and test a model; those of `CHUNKS` also read at the other chunk sizes."""
    torch.set_num_threads(1)
    folder = runs / f"{job['part']}-{job['seed']}"
    trained, score = train_part(config(root), job["part"], job["seed"], folder)
    row = dataclasses.asdict(score)
    if job["part"] in CHUNKS.values():
        row["read_at"] = {
            str(size): bits_per_byte(config(root), at_chunk(trained, size)) for size in CHUNKS
        }
    return row


def write_page(rows: list[dict[str, Any]]) -> None:
    rows, failed = split_diverged(rows)
    fitted = [r for r in rows if r["table"] == "parts"]
    if not fitted:
        return
    whole = {r["seed"]: r["bits_per_byte"] for r in fitted if r["part"] == "lmm"}
    table = []
    for name, part in PARTS.items():
        seeds = [r for r in fitted if r["part"] == name]
        if not seeds:
            continue
        bits = [r["bits_per_byte"] for r in seeds]
        changes = [r["bits_per_byte"] - whole[r["seed"]] for r in seeds if r["seed"] in whole]
        change = sum(changes) / len(changes) if changes else math.nan
        paper = part.paper
        table.append(
            (
                part.text,
                f"{seeds[0]['parameters']:,}",
                mean_and_range(bits),
                f"{change:+.3f}",
                "" if paper is None else f"{paper:.2f} ({paper - PARTS['lmm'].paper:+.2f})",
                f"{sum(r['train_seconds'] for r in seeds) / len(seeds) / 60:.1f}",
            )
        )
    given = AblationConfig(paths=("",), test_paths=("",))
    lines = [
        "# What each part of the memory is worth",
        "",
        "Byte-level models of two layers of width 64 after",
        f"{given.steps * given.tokens_per_batch / 2**20:.2g}M training bytes of WikiText-2 "
        "(float32),",
        f"tested on {given.test_tokens:,} bytes read in one stream, by",
        "`python results/ablation/run.py`; mean over seeds",
        f"{', '.join(map(str, sorted({r['seed'] for r in fitted})))}. Sizes are not matched, as in",
        "the paper; its column has its perplexity and the change from its LMM. Attention sees 64",
        "bytes.",
        "",
        *markdown_table(
            ("model", "parameters", "bits per byte", "change", "paper: perplexity", "minutes"),
            table,
        ),
        "",
    ]
    lines += chunk_table([r for r in fitted if "read_at" in r])
    lines.append(f"{origin(rows, 'one thread a training')}.")
    write_lines(HERE / "README.md", [*lines, *failed])


def chunk_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    grid = []
    for trained, part in CHUNKS.items():
        seeds = [r["read_at"] for r in rows if r["part"] == part]
        if seeds:
            means = (sum(seed[str(read)] for seed in seeds) / len(seeds) for read in CHUNKS)
            grid.append((str(trained), *(f"{bits:.3f}" for bits in means)))
    return [
        "## Chunk size in training by chunk size at inference",
        "",
        "Bits per byte; the chunk is part of the function, not of its speed.",
        "",
        *markdown_table(("trained at", *(f"read at {c}" for c in CHUNKS)), grid),
        "",
    ]


def main() -> None:
    parser = runner_parser(__doc__, HERE.parents[1] / "runs/ablation")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    options = parser.parse_args()
    path = HERE / "results.json"
    rows = read_rows(path)
    if not options.table_only:
        runs, root = options.runs.resolve(), data_folder()
        runs.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            parts = [{"table": "parts", "part": name, "seed": seed} for name in options.parts]
            one = partial(fit, runs=runs, root=root)
            rows = run_jobs(path, parts, one, workers=options.workers)
            write_page(rows)
    write_page(rows)


if __name__ == "__main__":
    command(main)
