"""Train the four models on WikiText-2 and on books, and write the table beside this file.

    TITANS_DATA_DIR=... python results/text/run.py [--runs FOLDER] [--table-only]

TITANS_DATA_DIR holds `text/wikitext-2/{train,valid}.txt.gz` and `books/*.txt.gz`. A run that
was stopped goes on from its last checkpoint; finished ones are not repeated.
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path

import torch

from titans.config import load_toml
from titans.data.documents import read_documents
from titans.data.haystack import prose_files
from titans.data.shards import prepare
from titans.data.tokenizers import ByteTokenizer
from titans.evals.jobs import data_folder
from titans.evals.report import machine
from titans.models.lm import TitansLM
from titans.train.config import RunConfig
from titans.train.loop import train
from titans.train.metrics import read_metrics

HERE = Path(__file__).parent
CONFIG = HERE.parent.parent / "configs" / "text.toml"
VARIANTS = ("lmm", "mac", "mag", "mal")


def corpora(root: Path, runs: Path) -> dict[str, tuple[Path, Path]]:
    """Training and validation shards of every corpus, prepared once."""
    sources = {
        "wikitext-2": (
            [root / "text/wikitext-2/train.txt.gz"],
            [root / "text/wikitext-2/valid.txt.gz"],
        ),
        "books": tuple(prose_files([root / "books"], held_out=side) for side in (False, True)),
    }
    prepared = {}
    for name, parts in sources.items():
        folders = (runs / f"{name}-train", runs / f"{name}-valid")
        for files, folder in zip(parts, folders, strict=True):
            if not folder.exists():
                texts = read_documents(files, strip_gutenberg=True, encoding="auto")
                prepare(texts, ByteTokenizer(), folder)
        prepared[name] = folders
    return prepared


def run(name: str, variant: str, folders: tuple[Path, Path], runs: Path) -> dict:
    overrides = {
        "model.variant": variant,
        "data.paths": json.dumps([str(folders[0])]),
        "data.valid_paths": json.dumps([str(folders[1])]),
    }
    config = load_toml(CONFIG, RunConfig, overrides)
    folder = runs / f"{name}-{variant}"
    begin = time.perf_counter()
    if not train(config, folder, progress=False).finished:
        raise KeyboardInterrupt
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if "valid_bits_per_byte" in r]
    tokens = config.train.tokens_per_batch
    record = {
        "corpus": name,
        "variant": variant,
        "parameters": TitansLM(config.model).parameter_count,
        "tokens": config.train.steps * tokens,
        "bits_per_byte": {str(r["step"] * tokens): r["valid_bits_per_byte"] for r in rows},
        "minutes": (time.perf_counter() - begin) / 60,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "machine": machine(),
    }
    (folder / "result.json").write_text(json.dumps(record))
    return record


def write_table(records: list[dict]) -> None:
    records = sorted(records, key=lambda r: (r["corpus"], r["variant"]))
    (HERE / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    points = list(records[0]["bits_per_byte"])
    lines = [
        "# Four models on real text",
        "",
        "Byte-level models of `configs/text.toml`, one seed, by `python results/text/run.py`.",
        f"Validation bits per byte after so many training tokens. {records[0]['machine']},",
        f"{records[0]['date']}. These are some minutes of training: they show that each model",
        "learns and stays finite, not which is best.",
        "",
        "| corpus | model | parameters | "
        + " | ".join(f"{int(p) / 1e6:.1f}M" for p in points)
        + " |",
        "|---|---|---|" + "---|" * len(points),
    ]
    for r in records:
        cells = " | ".join(f"{r['bits_per_byte'][p]:.3f}" for p in points)
        lines.append(f"| {r['corpus']} | {r['variant'].upper()} | {r['parameters']:,} | {cells} |")
    (HERE / "README.md").write_text("\n".join(lines) + "\n")
    plot(records)


def plot(records: list[dict]) -> None:
    from matplotlib.figure import Figure

    names = sorted({r["corpus"] for r in records})
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for r in records:
            if r["corpus"] == name:
                x = [int(p) / 1e6 for p in r["bits_per_byte"]]
                axis.plot(
                    x, list(r["bits_per_byte"].values()), marker="o", label=r["variant"].upper()
                )
        axis.set_title(name)
        axis.set_xlabel("million training tokens (bytes)")
        axis.set_ylabel("validation bits per byte")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(HERE / "bits_per_byte.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/text"))
    parser.add_argument("--corpus", choices=["wikitext-2", "books"], help="only this one")
    parser.add_argument("--table-only", action="store_true", help="from the finished runs")
    options = parser.parse_args()
    if not options.table_only:
        root = data_folder()
        for name, folders in corpora(root, options.runs).items():
            for variant in VARIANTS:
                done = options.runs / f"{name}-{variant}" / "result.json"
                if options.corpus in (None, name) and not done.exists():
                    print(run(name, variant, folders, options.runs), flush=True)
    finished = [json.loads(p.read_text()) for p in sorted(options.runs.glob("*/result.json"))]
    if finished:
        write_table(finished)


if __name__ == "__main__":
    main()
