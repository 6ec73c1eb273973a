"""What each part of the memory is worth: the paper's ablation, at our scale.

    TITANS_DATA_DIR=... python results/ablation/run.py [--runs FOLDER] [--workers 2] [--table-only]

A small byte-level LMM (the paper's: two-layer memory, momentum, forgetting, convolution, persistent
tokens; our gates), and the same with one thing changed. Every model is trained on WikiText-2 alike
and tested on the test part's first TEST_BYTES in one stream. `chunks`: models trained at one chunk
size are tested at others. Finished rows of results.json are not repeated.
"""

import argparse
import dataclasses
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

from titans.config import MemoryConfig, TitansConfig, load_toml
from titans.evals.jobs import find, read_rows, run_jobs
from titans.evals.perplexity import PerplexityConfig, perplexity
from titans.evals.report import markdown_table
from titans.models.lm import TitansLM, load
from titans.train.config import RunConfig
from titans.train.loop import train
from titans.train.metrics import read_metrics

HERE = Path(__file__).parent
CONFIG = HERE.parent.parent / "configs" / "text.toml"
SEEDS = (0, 1)
TEST_BYTES = 2**18
CHUNKS = (1, 4, 16, 64)

MEMORY = MemoryConfig(heads=2, depth=2, residual=True, norm=True, momentum=True, chunk_size=16)
BASE = TitansConfig(
    variant="lmm",
    dim=64,
    layers=2,
    heads=2,
    ffn_hidden=160,
    window=64,
    segment=64,
    persistent=4,
    memory=MEMORY,
)


def memory(**changes: Any) -> TitansConfig:
    return dataclasses.replace(BASE, memory=dataclasses.replace(MEMORY, **changes))


LINEAR = {"depth": 1, "residual": False, "norm": False}
# The paper's perplexities of the same changes; what it does not have is None.
MODELS: dict[str, tuple[TitansConfig, float | None]] = {
    "LMM": (BASE, 27.01),
    "linear memory": (memory(**LINEAR), 28.49),
    "no convolution": (memory(conv_width=0), 28.73),
    "no momentum": (memory(momentum=False), 28.98),
    "no weight decay": (memory(decay="none"), 29.04),
    "no persistent memory": (dataclasses.replace(BASE, persistent=0), 27.63),
    "plus attention: MAC": (dataclasses.replace(BASE, variant="mac"), 26.67),
    "plus attention: MAG": (dataclasses.replace(BASE, variant="mag"), 25.70),
    "plus attention: MAL": (dataclasses.replace(BASE, variant="mal"), 25.91),
    "depth 1 (residual, norm)": (memory(depth=1), None),
    # Deeper memories need smaller steps to train through; depth 2 with them tells the two apart.
    "depth 2, learning rate at most 0.1": (memory(learning_rate_max=0.1), None),
    "depth 3, learning rate at most 0.1": (memory(depth=3, learning_rate_max=0.1), None),
    "depth 4, learning rate at most 0.1": (memory(depth=4, learning_rate_max=0.1), None),
    "linear memory, gradient of every token": (memory(**LINEAR, chunk_size=1), None),
    "sigmoid gates": (memory(gates="sigmoid", tie_forgetting=False), None),
    "gates per layer": (memory(per_layer_gates=True), None),
    "forgetting towards zero": (memory(decay_target="zero"), None),
    "chunk 1": (memory(chunk_size=1), None),
    "chunk 4": (memory(chunk_size=4), None),
    "chunk 64": (memory(chunk_size=64), None),
}
CHUNK_NAMES = {1: "chunk 1", 4: "chunk 4", 16: "LMM", 64: "chunk 64"}


def fit(job: dict[str, Any], runs: Path, root: Path) -> dict[str, Any]:
    """Train a model, or go on where it stopped, and test it."""
    folder = runs / f"{job['model']}-{job['seed']}".replace(" ", "_").replace(":", "")
    config = dataclasses.replace(
        load_toml(
            CONFIG,
            RunConfig,
            {
                "data.paths": f'["{root}/text/wikitext-2/train.txt.gz"]',
                "data.valid_paths": f'["{root}/text/wikitext-2/valid.txt.gz"]',
                "train.seed": str(job["seed"]),
                "train.threads": "1",
            },
        ),
        model=MODELS[job["model"]][0],
    )
    result = train(config, folder, progress=False)
    if not result.finished:
        raise KeyboardInterrupt
    rows = read_metrics(folder / "metrics.jsonl")
    tokens = config.train.tokens_per_batch
    weights = runs / f"{folder.name}.safetensors"
    load(result.checkpoint / "model.safetensors").save(weights)
    return {
        "parameters": TitansLM(config.model).parameter_count,
        "bits_per_byte": test(weights, root, None),
        "train_minutes": sum(tokens / r["tokens_per_s"] for r in rows) / 60,
    }


def test(weights: Path, root: Path, chunk_size: int | None) -> float:
    """Bits per byte of the test text, read at this chunk size (None: as in training)."""
    model = load(weights)
    if chunk_size is not None:
        changed = dataclasses.replace(model.config.memory, chunk_size=chunk_size)
        other = TitansLM(dataclasses.replace(model.config, memory=changed))
        other.load_state_dict(model.state_dict())
        model = other.eval()
    path = str(root / "text/wikitext-2/test.txt.gz")
    return perplexity(model, PerplexityConfig(paths=(path,), max_tokens=TEST_BYTES)).bits_per_byte


def at_chunk(job: dict[str, Any], runs: Path, root: Path) -> dict[str, Any]:
    name = f"{CHUNK_NAMES[job['trained']]}-{job['seed']}".replace(" ", "_")
    weights = runs / f"{name}.safetensors"
    if not weights.exists():  # its row came from another machine
        fit({"model": CHUNK_NAMES[job["trained"]], "seed": job["seed"]}, runs, root)
    return {"bits_per_byte": test(weights, root, job["read"])}


def write_page(rows: list[dict[str, Any]]) -> None:
    fitted = [r for r in rows if r["suite"] == "parts"]
    base = [r["bits_per_byte"] for r in fitted if r["model"] == "LMM"]
    table = []
    for name, (_, paper) in MODELS.items():
        seeds = [r for r in fitted if r["model"] == name]
        if not seeds:
            continue
        bits = [r["bits_per_byte"] for r in seeds]
        mean = sum(bits) / len(bits)
        change = mean - sum(base) / len(base) if base else math.nan
        spread = f" ({min(bits):.3f}-{max(bits):.3f})" if len(bits) > 1 else ""
        table.append(
            (
                name,
                f"{seeds[0]['parameters']:,}",
                f"{mean:.3f}{spread}",
                f"{change:+.3f}",
                "" if paper is None else f"{paper:.2f} ({paper - 27.01:+.2f})",
                f"{sum(r['train_minutes'] for r in seeds) / len(seeds):.1f}",
            )
        )
    lines = [
        "# What each part of the memory is worth",
        "",
        "Byte-level models of two layers of width 64 after 2.0M training bytes of WikiText-2,",
        f"tested on {TEST_BYTES:,} bytes read in one stream, by `python results/ablation/run.py`;",
        f"mean over seeds {', '.join(map(str, sorted({r['seed'] for r in fitted})))}. Sizes are",
        "not matched, as in the paper; its column has its perplexity and the change from its LMM.",
        "",
        *markdown_table(
            ("model", "parameters", "bits per byte", "change", "paper: perplexity", "minutes"),
            table,
        ),
        "",
    ]
    chunks = [r for r in rows if r["suite"] == "chunks"]
    if chunks:
        grid = []
        for trained in CHUNKS:
            cells = []
            for read in CHUNKS:
                found = [
                    r["bits_per_byte"]
                    for r in chunks
                    if (r["trained"], r["read"]) == (trained, read)
                ]
                cells.append(f"{sum(found) / len(found):.3f}" if found else "")
            grid.append((str(trained), *cells))
        lines += [
            "## Chunk size in training by chunk size at inference",
            "",
            "Bits per byte; the chunk is part of the function, not of its speed.",
            "",
            *markdown_table(("trained at", *(f"read at {c}" for c in CHUNKS)), grid),
            "",
        ]
    dates, machines = ({r[key] for r in rows} for key in ("date", "machine"))
    lines.append(
        f"{'; '.join(sorted(machines))}; one thread a training; {', '.join(sorted(dates))}."
    )
    (HERE / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--workers", type=int, default=1, help="trainings side by side")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--table-only", action="store_true", help="from the finished rows")
    options = parser.parse_args()
    path = HERE / "results.json"
    rows = read_rows(path)
    if not options.table_only:
        runs, root = options.runs.resolve(), Path(os.environ["TITANS_DATA_DIR"]).resolve()
        runs.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            parts = [{"suite": "parts", "model": name, "seed": seed} for name in MODELS]
            one = partial(fit, runs=runs, root=root)
            rows = run_jobs(path, parts, one, workers=options.workers)
            write_page(rows)
            chunks = [
                {"suite": "chunks", "trained": trained, "read": read, "seed": seed}
                for trained in CHUNKS
                for read in CHUNKS
                if find(rows, {"model": CHUNK_NAMES[trained], "seed": seed}) is not None
            ]
            other = partial(at_chunk, runs=runs, root=root)
            rows = run_jobs(path, chunks, other, workers=options.workers)
            write_page(rows)
    write_page(rows)


if __name__ == "__main__":
    main()
