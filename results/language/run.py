"""Language modelling at one size and one number of tokens: four Titans and their rivals.

    TITANS_DATA_DIR=... python results/language/run.py [--workers 2] [--corpus NAME] [--table-only]

Every variant has the parameters of the Transformer++ (within 2 %), the same tokens in the same
order, and the same budget for tuning: each learning rate of RATES for TUNE_TOKENS on WikiText-2,
the best by validation loss kept for everything after. Then every seed of every corpus is trained
for TOKENS and tested on held-out text: in windows, and in one stream a document. A finished row of
results.json is not repeated, and a stopped training goes on from its last checkpoint in --runs.

TITANS_DATA_DIR holds `text/wikitext-2/{train,valid,test}.txt.gz` and `books/*.txt.gz`.
"""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from titans.config import MemoryConfig, TitansConfig, Variant
from titans.data.documents import read_documents
from titans.data.haystack import prose_files
from titans.data.shards import prepare
from titans.data.tokenizers import BPETokenizer, load_tokenizer
from titans.evals.jobs import (
    command,
    data_folder,
    digest,
    read_rows,
    run_jobs,
    runner_parser,
    split_diverged,
    train_in_turn,
)
from titans.evals.perplexity import PerplexityConfig, PositionLoss, perplexity, plot_positions
from titans.evals.report import markdown_table, mean_and_range, origin, write_lines
from titans.models.lm import TitansLM, load
from titans.presets import count_parameters, matched
from titans.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from titans.train.loop import choose_device
from titans.train.metrics import training_seconds

HERE = Path(__file__).parent
VOCABULARY = 4096
TOKENS, TUNE_TOKENS, TEST_TOKENS = 2**19, 2**17, 2**17
RATES = (1e-3, 2e-3, 4e-3)
LENGTH, BATCH = 1024, 4096
SEEDS = (0, 1)
CORPORA = ("wikitext-2", "books")
# One of the held-out books; the others test.
VALID_BOOKS = ("chesterton-thursday",)

# What all are matched to; its feed-forward of 4 x 256 leaves some to those with two mixers.
BASE = TitansConfig(
    variant="transformer",
    vocab_size=VOCABULARY,
    dim=256,
    layers=3,
    heads=4,
    ffn_hidden=1024,
    window=128,
    segment=128,
    persistent=4,
    # The paper's memory, two layers with momentum and forgetting, written every 16 tokens, with
    # our gates and learned M_0.
    memory=MemoryConfig(
        dim=256, heads=4, depth=2, residual=True, norm=True, momentum=True, chunk_size=16
    ),
)
LINEAR = MemoryConfig(dim=256, heads=4)
MODELS: dict[str, tuple[Variant, MemoryConfig]] = {
    "Titans LMM": ("lmm", BASE.memory),
    "Titans MAC": ("mac", BASE.memory),
    "Titans MAG": ("mag", BASE.memory),
    "Titans MAL": ("mal", BASE.memory),
    "Titans LMM, linear memory": ("lmm", LINEAR),
    "Transformer++": ("transformer", LINEAR),
    "Sliding attention": ("sliding", LINEAR),
    "Gated DeltaNet": ("gated-deltanet", LINEAR),
    "Gated DeltaNet with sliding attention": ("gated-deltanet-h2", LINEAR),
    "TTT-MLP": ("ttt-mlp", LINEAR),
    "RWKV-7": ("rwkv7", LINEAR),
    "Mamba2": ("mamba2", LINEAR),
}


def model_config(name: str) -> TitansConfig:
    variant, memory = MODELS[name]
    return matched(dataclasses.replace(BASE, memory=memory), variant, count_parameters(BASE))


def files(root: Path, corpus: str, part: str) -> list[Path]:
    if corpus == "wikitext-2":
        return [root / f"text/wikitext-2/{part}.txt.gz"]
    books = prose_files([root / "books"], held_out=part != "train")
    return [
        b for b in books if part == "train" or b.name.startswith(VALID_BOOKS) == (part == "valid")
    ]


def prepare_corpus(root: Path, runs: Path, corpus: str) -> Path:
    """A tokenizer learned from the training text, and shards of it; made once of the same files."""
    parts = ("train", "valid", "test")
    folder = runs / f"{corpus}-{digest(p for part in parts for p in files(root, corpus, part))}"
    if folder.exists():
        return folder
    runs.mkdir(parents=True, exist_ok=True)
    # Beside it and then renamed: another process may be at it too.
    with TemporaryDirectory(dir=runs, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / corpus
        made.mkdir()
        texts = [d.text for d in documents(files(root, corpus, "train"))]
        tokenizer = BPETokenizer.train(texts, VOCABULARY, made / "tokenizer.json")
        for part in ("train", "valid"):
            prepare(documents(files(root, corpus, part)), tokenizer, made / part)
        windows = []
        for document in documents(files(root, corpus, "test")):
            ids = tokenizer.encode(document.text)
            windows += [ids[n : n + LENGTH] for n in range(0, len(ids) - LENGTH, LENGTH)]
        every = max(1, len(windows) // (TEST_TOKENS // LENGTH))
        with open(made / "windows.jsonl", "w") as file:
            for ids in windows[::every]:
                file.write(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    return folder


def documents(paths: list[Path]) -> list[Any]:
    """Documents without Gutenberg's notices; two of the books are in Latin-1."""
    return list(read_documents(paths, strip_gutenberg=True, encoding="auto"))


def run(job: dict[str, Any], runs: Path, root: Path) -> dict[str, Any]:
    """Train and test one model; the row of results.json."""
    torch.set_num_threads(1)
    name, corpus, rate = job["model"], job["corpus"], job["rate"]
    data = prepare_corpus(root, runs, corpus)
    run_name = "-".join([data.name, *(str(v) for v in job.values())]).replace(" ", "_")
    steps = job["tokens"] // BATCH
    config = RunConfig(
        model=model_config(name),
        data=DataConfig(
            paths=(str(data / "train"),), valid_paths=(str(data / "valid"),), length=LENGTH
        ),
        train=TrainConfig(
            steps=steps,
            tokens_per_batch=BATCH,
            seed=job["seed"],
            write_cost=0.0,
            eval_every=max(1, steps // 4),
            eval_batches=8,
            checkpoint_every=16,
            keep_checkpoints=1,
            threads=1,
        ),
        optimizer=OptimizerConfig(learning_rate=rate, warmup=max(1, steps // 10)),
    )
    trained, (rows,) = train_in_turn({run_name: config}, runs)
    done = {
        "parameters": TitansLM(config.model).parameter_count,
        "valid_loss": rows[-1]["valid_loss"],
        "train_minutes": training_seconds(rows, BATCH) / 60,
    }
    if job["stage"] == "tune":
        return done
    model = load(trained, choose_device("auto"))
    tokenizer = load_tokenizer(data / "tokenizer.json")
    windows = PerplexityConfig(paths=(str(data / "windows.jsonl"),), rows=8)
    tested = perplexity(model, windows, tokenizer)
    done |= {"bits_per_byte": tested.bits_per_byte, "word_perplexity": tested.word_perplexity}
    if MODELS[name][0] == "transformer":  # it was trained on windows alone, and a stream grows
        return done
    texts = files(root, corpus, "test")
    streams = PerplexityConfig(
        paths=tuple(str(f) for f in texts),
        max_tokens=TEST_TOKENS // len(texts),
        strip_gutenberg=True,
        encoding="auto",
    )
    streamed = perplexity(model, streams, tokenizer)
    return done | {
        "stream_bits_per_byte": streamed.bits_per_byte,
        "positions": [dataclasses.asdict(p) for p in streamed.positions],
    }


def best_rates(rows: list[dict[str, Any]], names: list[str]) -> dict[str, float]:
    """Model -> the learning rate that was best in tuning, for those whose tuning is complete."""
    chosen = {}
    for name in names:
        tuned = [
            r for r in rows if r["stage"] == "tune" and r["model"] == name and r["rate"] in RATES
        ]
        if len(tuned) == len(RATES):
            chosen[name] = min(tuned, key=lambda r: r.get("valid_loss", math.inf))["rate"]
    return chosen


def write_page(rows: list[dict[str, Any]]) -> None:
    """README.md and the plots, from the rows that are there."""
    rates = best_rates(rows, list(MODELS))
    rows, failed = split_diverged(rows)
    # At other rates than the best of now: of an earlier choice of RATES.
    tested = [
        r for r in rows if r["stage"] == "test" and r["rate"] == rates.get(r["model"], r["rate"])
    ]
    tuned = [r for r in rows if r["stage"] == "tune"]
    coarse = sum("precision" in r for r in tuned)
    lines = [
        "# Language modelling at one size and one number of tokens",
        "",
        f"{TOKENS:,} training tokens (byte-pair encoding of {VOCABULARY:,} learned from the",
        f"training text), rows of {LENGTH:,}, batches of {BATCH:,}, by",
        "`python results/language/run.py`; float32, but for the seeds marked bf16 (bfloat16",
        "autocast, memories in float32). Bits per byte of held-out text: of at least",
        f"{TEST_TOKENS:,} tokens in windows of {LENGTH:,} all over it, as in training, and of the",
        f"first tokens of documents, {TEST_TOKENS:,} in all, each read in one stream (the",
        "Transformer++ has no such column: its cache grows, and it never saw longer rows); mean",
        "over seeds, and their range where there are several. Every model was tuned alike:",
        f"learning rates {', '.join(f'{r:g}' for r in RATES)} for {TUNE_TOKENS:,} tokens of",
        f"WikiText-2, the best by validation loss ({coarse} of these {len(tuned)} runs in",
        "bfloat16). Minutes: of a training in float32, on a CPU. The table ranks how fast these",
        "models learn at this size, not what they reach.",
        "",
    ]
    for corpus in CORPORA:
        ours = [r for r in tested if r["corpus"] == corpus]
        if not ours:
            continue
        table = []
        for name in MODELS:
            seeds = [r for r in ours if r["model"] == name]
            if seeds:
                bits = [r["bits_per_byte"] for r in seeds]
                words = [r["word_perplexity"] for r in seeds]
                mean = sum(bits) / len(bits)
                timed = [r for r in seeds if "precision" not in r]
                cells = (
                    name,
                    f"{seeds[0]['parameters']:,}",
                    f"{seeds[0]['rate']:g}",
                    ", ".join(str(r["seed"]) + " bf16" * ("precision" in r) for r in seeds),
                    mean_and_range(bits),
                    stream_cell(seeds),
                    f"{sum(words) / len(words):.1f}",
                    f"{sum(r['train_minutes'] for r in timed) / len(timed):.0f}" if timed else "",
                )
                table.append((mean, cells))
        lines += [f"## {corpus}", ""]
        lines += markdown_table(
            (
                *("model", "parameters", "rate", "seeds", "bits per byte", "in one stream"),
                *("word perplexity", "minutes"),
            ),
            [cells for _, cells in sorted(table)],
        )
        lines.append("")
        first = {
            r["model"]: [PositionLoss(**p) for p in r["positions"]]
            for r in reversed(ours)
            if "positions" in r
        }
        plot_positions({n: first[n] for n in MODELS if n in first}, HERE / f"{corpus}.png")
        lines += [f"![loss by position]({corpus}.png)", ""]
    lines.append(f"{origin(rows, 'one thread a training')}.")
    write_lines(HERE / "README.md", [*lines, *failed])


def stream_cell(seeds: list[dict[str, Any]]) -> str:
    bits = [r["stream_bits_per_byte"] for r in seeds if "stream_bits_per_byte" in r]
    return f"{sum(bits) / len(bits):.3f}" if bits else ""


def main() -> None:
    parser = runner_parser(__doc__, HERE.parents[1] / "runs/language")
    parser.add_argument("--corpus", choices=CORPORA, nargs="+", default=CORPORA)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    options = parser.parse_args()
    path = HERE / "results.json"
    rows = read_rows(path)
    if not options.table_only:
        root = data_folder()
        for corpus in {"wikitext-2", *options.corpus}:
            prepare_corpus(root, options.runs, corpus)
        one = partial(run, runs=options.runs.resolve(), root=root)
        tuning = [
            {"stage": "tune", "corpus": "wikitext-2", "model": name, "seed": 0}
            | {"tokens": TUNE_TOKENS, "rate": rate}
            for name in options.model
            for rate in RATES
        ]
        rows = run_jobs(path, tuning, one, workers=options.workers)
        rates = best_rates(rows, options.model)
        tests = [
            {"stage": "test", "corpus": corpus, "model": name, "seed": seed}
            | {"tokens": TOKENS, "rate": rates[name]}
            for seed in options.seeds
            for corpus in options.corpus
            for name in options.model
        ]
        rows = run_jobs(path, tests, one, workers=options.workers)
    write_page(rows)


if __name__ == "__main__":
    command(main)
