"""DNA: two tasks of the GUE benchmark, and the next base of E. coli at growing context.

    TITANS_DATA_DIR=... python results/dna/run.py [--only mouse_0 ecoli_k12_mg1655/mal ...]
        [--seeds 0 1] [--workers 1] [--threads 1] [--table-only]

TITANS_DATA_DIR holds `dna/prom_core_notata`, `dna/mouse_0` and `dna/ecoli_k12_mg1655.fna.gz`;
--task and --genome add folders and FASTA files of your own. A finished row of results.json is
not repeated, and a stopped training on a genome goes on from its last checkpoint in --runs.
"""

import dataclasses
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from titans.config import MemoryConfig, TitansConfig
from titans.data.dna import decode_bases, read_fasta
from titans.evals.dna import CNN, DNAConfig, load_task, train_and_test
from titans.evals.genome import (
    ContextBits,
    GenomeConfig,
    MarkovBits,
    genome,
    plot_contexts,
    split_genome,
)
from titans.evals.jobs import (
    at_least_one,
    by_name,
    command,
    data_folder,
    digest,
    read_rows,
    run_jobs,
    runner_parser,
    split_diverged,
    train_in_turn,
)
from titans.evals.perplexity import PositionLoss, plot_positions
from titans.evals.report import markdown_table, mean_and_range, origin, write_lines
from titans.models.lm import TitansLM, load
from titans.presets import count_parameters, matched
from titans.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from titans.train.loop import choose_device
from titans.train.metrics import training_seconds

HERE = Path(__file__).parent
TASKS = ("prom_core_notata", "mouse_0")
GENOME = "ecoli_k12_mg1655.fna.gz"
SEEDS = (0, 1)
NAMES = {
    "lmm": "Titans LMM",
    "mac": "Titans MAC",
    "mag": "Titans MAG",
    "mal": "Titans MAL",
    "mac-by-attention": "Titans MAC, memory times sigmoid(attention)",
    "mag-by-attention": "Titans MAG, memory times sigmoid(attention)",
    "transformer": "Transformer++",
    "sliding": "Sliding attention",
    "gated-deltanet": "Gated DeltaNet",
    CNN: "CNN",
    "markov": "Markov chains",
}
# With the product as it is by default these two begin late or not at all on mouse_0, which has few
# sequences (docs/results.md).
PRODUCT: dict[str, Any] = {
    "gate_branch": "attention",
    "gate_activation": "sigmoid",
    "combine_output": False,
}
PRODUCTS = {"mac-by-attention": "mac", "mag-by-attention": "mag"}
CLASSIFIERS = ("lmm", "mac", "mag", "mal", *PRODUCTS, "transformer", CNN)
LANGUAGE_MODELS = ("lmm", "mac", "mag", "mal", "sliding", "gated-deltanet")
# A sequence of prom_core_notata has 70 bases and is one of 42,452; one of mouse_0 101, of 6,478.
SETTINGS: dict[str, dict[str, Any]] = {"prom_core_notata": {"epochs": 3}}

# What the language models are matched to.
BASE = TitansConfig(
    variant="mag",
    dim=128,
    layers=2,
    heads=2,
    ffn_hidden=256,
    window=128,
    segment=128,
    memory=MemoryConfig(heads=2, conv_width=8),
)
STEPS, BATCH, LENGTH, SEGMENTS = 1000, 8192, 1024, 8


def classify(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train and test one classifier."""
    model = job["model"]
    settings = SETTINGS.get(job["task"], {}) | (PRODUCT if model in PRODUCTS else {})
    config = DNAConfig(folder=str(folder), **settings)
    task = load_task(config)
    score = train_and_test(config, task, PRODUCTS.get(model, model), job["seed"])
    return dataclasses.asdict(score) | {"split": task.split}


def model_genome(job: dict[str, Any], path: Path, runs: Path) -> dict[str, Any]:
    """Train one model on a genome's training part and read the held-out part with it; or, for
    `markov`, fit the chains."""
    settings = held_out(path)
    began = time.perf_counter()
    if job["model"] == "markov":
        result = dataclasses.asdict(genome(None, settings))
        return result | {"seconds": time.perf_counter() - began}
    texts = write_texts(
        settings, runs / f"{job['genome']}-{digest([path], settings.test, settings.valid)}"
    )
    config = RunConfig(
        model=matched(BASE, job["model"], count_parameters(BASE)),
        data=DataConfig(
            paths=(str(texts / "train.txt"),),
            valid_paths=(str(texts / "valid.txt"),),
            length=LENGTH,
            segments=SEGMENTS,
        ),
        train=TrainConfig(
            steps=STEPS,
            tokens_per_batch=BATCH,
            seed=job["seed"],
            write_cost=0.0,
            eval_every=200,
            eval_batches=2,
            checkpoint_every=25,
            keep_checkpoints=1,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=100),
    )
    run_name = f"{texts.name}-{job['model']}-{job['seed']}"
    trained, (rows,) = train_in_turn({run_name: config}, runs)
    model = load(trained, choose_device("auto"))
    began = time.perf_counter()
    settings = dataclasses.replace(settings, orders=())
    result = genome(model, settings)
    longest = dataclasses.replace(settings, contexts=(max(settings.contexts),), write=False)
    return dataclasses.asdict(result) | {
        "without_writing": genome(model, longest).contexts[0].bits_per_base,
        "parameters": TitansLM(config.model).parameter_count,
        "train_bases": STEPS * BATCH,
        "train_seconds": training_seconds(rows, BATCH),
        "seconds": time.perf_counter() - began,
    }


def held_out(path: Path) -> GenomeConfig:
    """To test on, the largest power of two of bases that is at most a quarter of them (of
    E. coli 2^20); an eighth of that to validate on; contexts from 1,024 up to the whole test."""
    _, codes = next(read_fasta(path))
    test = 1 << max(0, (len(codes) // 4).bit_length() - 1)
    contexts = (*(4**n for n in range(5, 16) if 4**n < test), test)
    return GenomeConfig(path=str(path), test=test, valid=test // 8, contexts=contexts)


def write_texts(settings: GenomeConfig, folder: Path) -> Path:
    """The training and validation parts as letters, for the training loop; made once."""
    names = ("train", "valid")
    if all((folder / f"{name}.txt").exists() for name in names):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    parts = split_genome(settings)
    for name, codes in zip(names, (parts.train, parts.valid), strict=True):
        # Renamed when it is whole: another process may make it too.
        beside = folder / f"{name}.{os.getpid()}"
        beside.write_text(decode_bases(codes), encoding="ascii")
        beside.replace(folder / f"{name}.txt")
    return folder


def run(job: dict[str, Any], paths: dict[str, Path], runs: Path, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    if job["part"] == "classification":
        return classify(job, paths[job["task"]]) | {"threads": threads}
    return model_genome(job, paths[job["genome"]], runs) | {"threads": threads}


def wanted(job: dict[str, Any], only: list[str] | None) -> bool:
    """Does one of `only`, NAME or NAME/MODEL, name it?"""
    name = job.get("task") or job["genome"]
    return not only or name in only or f"{name}/{job['model']}" in only


def write_page(rows: list[dict[str, Any]]) -> None:
    """README.md and the plots, from the rows that are there."""
    rows, failed = split_diverged(rows)
    lines = [
        "# DNA: classification, and the next base of a genome",
        "",
        "By `python results/dna/run.py`; every row is in results.json. Means over seeds, and their",
        "range where there are several.",
        "",
    ]
    lines += classification_page([r for r in rows if r["part"] == "classification"])
    found = [r for r in rows if r["part"] == "genome"]
    for name in dict.fromkeys(r["genome"] for r in found):
        lines += genome_page(name, [r for r in found if r["genome"] == name])
    threads = ", ".join(map(str, sorted({r["threads"] for r in rows})))
    lines.append(f"{origin(rows, f'threads: {threads}')}.")
    write_lines(HERE / "README.md", [*lines, *failed])


def classification_page(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "## Classification",
        "",
        "Matthews correlation and accuracy on test, of the weights that were best on dev. All are",
        "trained alike, on single sequences without any pre-training, on both strands. The paper",
        "has no row for these tasks (its DNA table is on GenomicBenchmarks, which the same command",
        "reads: `--task FOLDER`). In rows that say so, the product of MAC and MAG is what the",
        "memory recalls times the sigmoid of attention, with no map after it (`gate_branch`,",
        "`combine_output`; why: docs/results.md).",
        "",
    ]
    for task in dict.fromkeys(r["task"] for r in rows):
        ours = [r for r in rows if r["task"] == task]
        table = []
        for model in dict.fromkeys([*CLASSIFIERS, *(r["model"] for r in ours)]):
            seeds = [r for r in ours if r["model"] == model]
            if seeds:
                columns = [
                    mean_and_range([r[key] for r in seeds])
                    for key in ("dev_mcc", "test_mcc", "test_accuracy")
                ]
                minutes = sum(r["seconds"] for r in seeds) / len(seeds) / 60
                table.append(
                    [
                        NAMES.get(model, model),
                        f"{seeds[0]['parameters']:,}",
                        *columns,
                        str(len(seeds)),
                        f"{minutes:.1f}",
                    ]
                )
        epochs = max(len(r["dev_curve"]) for r in ours)
        lines += [
            f"### {task}",
            "",
            f"{ours[0]['train_sequences']:,} sequences to train on, at most {epochs} times; "
            f"{ours[0]['test_sequences']:,} to test; {ours[-1]['split']}.",
            "",
        ]
        header = ("model", "parameters", "dev MCC", "test MCC", "test accuracy", "seeds", "minutes")
        lines += [*markdown_table(header, table), ""]
    plot_curves(rows, HERE / "classification.png")
    return [*lines, "![MCC on dev while training](classification.png)", ""]


def genome_page(name: str, rows: list[dict[str, Any]]) -> list[str]:
    trained = [r for r in rows if r["model"] != "markov"]
    chains = [MarkovBits(**m) for r in rows for m in r["markov"]]
    lines = [
        f"## The next base: {name}",
        "",
        f"{rows[0]['record']}. Split: {rows[0]['split']}; no other genome is used. Bits per base",
        "of the held-out bases; two bits are a guess.",
        "",
    ]
    if chains:
        lines += [
            "Markov chains, counts of both strands of the training part plus one:",
            "",
            *markdown_table(
                ("order", *(str(m.order) for m in chains)),
                [("bits per base", *(f"{m.bits_per_base:.4f}" for m in chains))],
            ),
            "",
        ]
    if trained:
        contexts = [c["context"] for c in trained[0]["contexts"]]
        table, curves, positions = [], {}, {}
        for model in dict.fromkeys(r["model"] for r in trained):
            seeds = [r for r in trained if r["model"] == model]
            bits = [
                mean_and_range([r["contexts"][i]["bits_per_base"] for r in seeds], 4)
                for i in range(len(contexts))
            ]
            table.append(
                [
                    NAMES.get(model, model),
                    f"{seeds[0]['parameters']:,}",
                    *bits,
                    mean_and_range([r["without_writing"] for r in seeds], 4),
                    f"{sum(r['train_seconds'] for r in seeds) / len(seeds) / 60:.0f}",
                ]
            )
            curves[NAMES.get(model, model)] = [ContextBits(**c) for c in seeds[0]["contexts"]]
            positions[NAMES.get(model, model)] = [PositionLoss(**p) for p in seeds[0]["positions"]]
        lines += [
            f"Models, trained on {trained[0]['train_bases']:,} bases in windows of "
            f"{LENGTH * SEGMENTS:,}",
            "and tested with their memory reset every so many bases (last but one column: never,",
            "and never written):",
            "",
        ]
        header = ("model", "parameters", *(f"{n:,}" for n in contexts), "not written", "minutes")
        lines += [*markdown_table(header, table), ""]
        plot_contexts(curves, chains, HERE / f"{name}.png")
        plot_positions(positions, HERE / f"{name}-positions.png")
        lines += [
            f"![bits per base by context]({name}.png)",
            "",
            f"![bits per base by position]({name}-positions.png)",
            "",
        ]
    return lines


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """MCC on dev after every epoch, first seed."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r["task"] for r in rows))
    figure = Figure(figsize=(4 * len(tasks) + 3, 3.8), layout="constrained")
    lines = {}
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        first = {r["model"]: r for r in reversed(rows) if r["task"] == task}
        for place, model in enumerate(CLASSIFIERS):
            if model in first:
                curve = first[model]["dev_curve"]
                (line,) = axis.plot(range(1, len(curve) + 1), curve, "o-", ms=3, color=f"C{place}")
                lines[NAMES[model]] = line
        axis.set_title(task)
        axis.set_xlabel("epochs")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel("MCC on dev")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(lines.values(), lines, loc="outside right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = runner_parser(__doc__, HERE.parents[1] / "runs/dna")
    parser.add_argument("--only", nargs="+", metavar="NAME[/MODEL]", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--task", type=Path, nargs="+", default=[], help="folders besides GUE's")
    parser.add_argument("--genome", type=Path, nargs="+", default=[], help="FASTA files, likewise")
    parser.add_argument("--threads", type=at_least_one, default=1, help="of each")
    options = parser.parse_args()
    path = HERE / "results.json"
    rows = read_rows(path)
    if not options.table_only:
        data = data_folder() / "dna"
        tasks = by_name([*(data / t for t in TASKS), *options.task])
        genomes = by_name([data / GENOME, *options.genome])
        jobs = [
            {"part": "classification", "task": task, "model": model, "seed": seed}
            for seed in options.seeds
            for task in tasks
            for model in CLASSIFIERS
        ]
        jobs += [{"part": "genome", "genome": g, "model": "markov", "seed": 0} for g in genomes]
        jobs += [
            {"part": "genome", "genome": g, "model": model, "seed": seed}
            for seed in options.seeds
            for g in genomes
            for model in LANGUAGE_MODELS
        ]
        for name in options.only or []:
            if not any(wanted(job, [name]) for job in jobs):
                raise ValueError(f"--only {name}: expected a name, or name/model, of the data")
        jobs = [job for job in jobs if wanted(job, options.only)]
        one = partial(
            run, paths=tasks | genomes, runs=options.runs.resolve(), threads=options.threads
        )
        rows = run_jobs(path, jobs, one, workers=options.workers)
    if rows:
        write_page(rows)


if __name__ == "__main__":
    command(main)
