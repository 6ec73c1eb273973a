"""Single needles in a haystack, far beyond the lengths of training: Titans and rivals.

    TITANS_DATA_DIR=... python results/needle/run.py [--model NAME ...] [--workers 2] [--table-only]

RULER's three single-needle tasks in RULER's words. Every model has the same size (within 2 %) and
the same training in four runs: short rows until values are copied, rows of up to 4,096 tokens on
which gates have to close, the longest rows alone, and rows with numbers that are no needle's
(configs below; those of `BEGINS_WITH_ONE` have a short run before them). Then it is asked at ever
longer prompts. Words, values and books of the tests do not occur in training
(`titans.data.haystack`).

TITANS_DATA_DIR holds `needle/{noun,adjective}list.txt`, `books/*.txt.gz` and
`text/wikitext-2/train.txt.gz` (training prose with numbers in it, which the books hardly have).
Finished rows of results.json are not repeated, and a stopped training or reading goes on from what
it last saved in --runs. Trained models are kept in `weights/` beside the table, with their
tokenizer, so that they can be asked further, here or by `titans eval needle`.
"""

import random
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from titans.config import MemoryConfig, TitansConfig, Variant, has_memory
from titans.data.documents import read_documents
from titans.data.haystack import NOISE, prose, prose_files
from titans.data.needle import word_list
from titans.data.tokenizers import CODES, BPETokenizer, load_tokenizer
from titans.evals.jobs import (
    Row,
    command,
    data_folder,
    diverged,
    find,
    kept,
    read_rows,
    run_jobs,
    runner_parser,
    split_diverged,
    train_in_turn,
)
from titans.evals.needle import NeedleCell, NeedleConfig, NeedleResult, needle, plot
from titans.evals.report import markdown_table, origin, percent, readable, write_lines
from titans.evals.written import sums
from titans.models.lm import TitansLM, load
from titans.presets import count_parameters, matched
from titans.train.config import DataConfig, NeedleRows, OptimizerConfig, RunConfig, TrainConfig
from titans.train.loop import choose_device
from titans.train.metrics import training_seconds

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
TOKENIZER = WEIGHTS / "tokenizer.json"
KINDS = ("single-1", "single-2", "single-3")
TRAINED = (*KINDS, "single-3", "single-3")  # most rows: a uuid has 36 tokens to get right
LENGTHS = (2048, 4096, 8192, 16384, 65536, 2**18, 2**20, 2**21, 10 * 2**20)
VOCABULARY = 2048
SEED = 0
BEGINNING_STEPS = 150
COPYING_STEPS, CLOSING_STEPS, KEEPING_STEPS, SEALING_STEPS = 600, 2400, 600, 600
STEPS = COPYING_STEPS + CLOSING_STEPS + KEEPING_STEPS + SEALING_STEPS
TOKENS = 4096  # of a step
STRAY = 6.0  # numbers of no needle in 1,000 tokens of prose
# On the first run's rows, up to three needles of any kind, it had learned nothing in 600 steps, and
# begins with one number a row after 50 (docs/results.md).
BEGINS_WITH_ONE = ("Mamba2",)
SWEEP_MODEL, SWEEP_LENGTHS = "Titans MAC", (2048, 4096, 8192, 16384)
SWEEP_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LOST = 0.05  # a model that finds no more than this is not asked at greater lengths

BASE = TitansConfig(
    variant="mal",
    vocab_size=VOCABULARY,
    dim=128,
    layers=2,
    heads=2,
    ffn_hidden=256,
    window=32,
    segment=64,
    persistent=0,
    # One head: a uuid binds 36 tokens at once, which is much for 64 key channels.
    memory=MemoryConfig(
        heads=1,
        conv_width=8,
        gate_input="window",
        qkv_activation="none",
        key_init="previous",
    ),
)
PAPER_LENGTHS = (2048, 4096, 8192, 16384)
TWO_LAYERS = {"depth": 2, "expansion": 2, "residual": True, "norm": True, "chunk_size": 16}


def based(variant: Variant, memory: dict[str, Any] | None = None, **changes: Any) -> TitansConfig:
    """A model of the table before it has the size of all: BASE, and what is its own."""
    return replace(BASE, variant=variant, memory=replace(BASE.memory, **memory or {}), **changes)


MODELS: dict[str, TitansConfig] = {
    "Titans LMM": based("lmm"),
    "Titans MAC": based("mac"),
    "Titans MAG": based("mag"),
    "Titans MAL": based("mal"),
    "Titans LMM, two-layer memory": based("lmm", TWO_LAYERS),
    # Gated the other way round it had copied nothing after 300 steps (docs/results.md).
    "Titans MAC, two-layer memory": based(
        "mac", TWO_LAYERS, gate_branch="attention", gate_activation="sigmoid"
    ),
    "TTT-MLP": based("ttt-mlp"),
    "Gated DeltaNet": based("gated-deltanet"),
    "Mamba2": based("mamba2"),
    "Sliding attention": based("sliding"),
}
# The paper's rows at 2K, 4K, 8K and 16K, for those of the same name.
PAPER = {
    "Titans LMM": "99.8 98.4 98.2 96.2 | 100.0 99.8 93.4 80.2 | 90.4 89.4 85.8 80.6",
    "Titans MAC": "99.2 98.8 99.0 98.4 | 99.6 98.2 97.6 97.4 | 98.2 98.2 95.6 95.2",
    "Titans MAG": "99.4 98.0 97.4 97.4 | 99.2 98.8 97.2 98.6 | 98.0 98.0 90.2 88.2",
    "Titans MAL": "98.8 98.6 98.8 97.8 | 99.8 98.1 96.8 96.4 | 98.0 97.4 92.0 90.4",
    "TTT-MLP": "98.4 98.8 98.0 88.4 | 60.2 36.6 10.2 4.4 | 78.8 28.0 4.4 0.0",
    "Mamba2": "98.6 61.4 31.0 5.4 | 98.4 55.8 14.2 0.0 | 42.2 4.2 0.0 0.0",
}


def samples_at(length: int) -> int:
    """Questions of a cell: fewer where a prompt takes minutes."""
    return 100 if length <= 8192 else 48 if length <= 16384 else 16 if length <= 2**16 else 8


def model_config(name: str) -> TitansConfig:
    """The model of a row, at the size of all."""
    return matched(MODELS[name], MODELS[name].variant, count_parameters(BASE))


def prepare_tokenizer(root: Path, path: Path = TOKENIZER) -> None:
    """A byte-pair encoding of the training books and of the tasks' words, learned once.

    Letters of codes stand alone. Where one could be joined to the space before it, uuids were lost
    that begin with a letter: their first token is another one than that of numbers.
    """
    if path.exists():
        return
    files = prose_files([root / "books"], held_out=False)
    generator = random.Random(SEED)
    nouns, adjectives = (
        word_list(root / "needle" / f"{kind}list.txt", held_out=False)
        for kind in ("noun", "adjective")
    )

    def texts() -> Any:
        for document in read_documents(files, strip_gutenberg=True, encoding="auto"):
            yield document.text
        for _ in range(20_000):
            key = f"{generator.choice(adjectives)}-{generator.choice(nouns)}"
            yield (
                f"A special magic number is hidden within the following text. {NOISE} One of the "
                f"special magic numbers for {key} is: What is the special magic uuid for {key} "
                "mentioned in the provided text?"
            )

    path.parent.mkdir(parents=True, exist_ok=True)
    BPETokenizer.train(texts(), VOCABULARY, path, isolate=CODES)


def beginning(name: str, data: DataConfig) -> RunConfig:
    """Before the first run, for `BEGINS_WITH_ONE`: one number a row, and little else."""
    data = replace(
        data,
        lengths=(96,),
        facts_max=1,
        needle=replace(data.needle, kinds=("single-2",), dense=1.0),
    )
    return run_config(name, data, BEGINNING_STEPS, 3e-3, warmup=50, min_ratio=0.3)


def copying(name: str, data: DataConfig) -> RunConfig:
    """The first run: rows of 128 tokens with up to three needles, until values are copied."""
    data = replace(data, lengths=(128,), facts_max=3, needle=replace(data.needle, dense=1.0))
    return run_config(name, data, COPYING_STEPS, 3e-3, warmup=50, min_ratio=0.3)


def closing(name: str, data: DataConfig) -> RunConfig:
    """The second: ever longer rows, half of them just like a test, and a price on writing (which
    only gates that can close have; others pay none)."""
    data = replace(
        data,
        lengths=(128, 256, 512),
        facts_max=4,
        stages=(500, 1200, 1900),
        # Short rows stay among them: they have the most answers to learn from.
        stage_lengths=((256, 512, 1024), (512, 1024, 2048, 4096), (512, 2048, 4096)),
        stage_write_costs=(0.1, 0.5, 3.0) if pays(name) else (0.0, 0.0, 0.0),
    )
    return run_config(name, data, CLOSING_STEPS, 2e-3, write_cost=0.02)


def keeping(name: str, data: DataConfig) -> RunConfig:
    """The third: the longest rows alone, at the highest price. What is lost at great lengths is
    lost to what prose makes a memory write."""
    data = replace(data, lengths=(4096,), facts_max=4)
    return run_config(name, data, KEEPING_STEPS, 1e-3, write_cost=3.0)


def sealing(name: str, data: DataConfig) -> RunConfig:
    """The fourth: stray numbers in the prose, as pages and years are in books, and a price that
    few strong writes pay less of than many weak ones. The other price made all writes weak."""
    data = replace(
        data, lengths=(1024, 4096), facts_max=4, needle=replace(data.needle, stray=STRAY)
    )
    return run_config(name, data, SEALING_STEPS, 1e-3, write_cost=2.0, write_half=0.1)


RUNS = (copying, closing, keeping, sealing)


def pays(name: str) -> bool:
    return name.startswith("Titans")


def run_config(
    name: str,
    data: DataConfig,
    steps: int,
    rate: float,
    *,
    write_cost: float = 0.0,
    write_half: float = 0.0,
    warmup: int = 30,
    min_ratio: float = 0.05,
) -> RunConfig:
    return RunConfig(
        model=model_config(name),
        data=data,
        train=TrainConfig(
            steps=steps,
            tokens_per_batch=TOKENS,
            write_cost=write_cost if pays(name) else 0.0,
            write_half=write_half,
            eval_every=100,
            eval_batches=2,
            checkpoint_every=50,
            keep_checkpoints=1,
            threads=1,
        ),
        optimizer=OptimizerConfig(
            learning_rate=rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            warmup=warmup,
            min_ratio=min_ratio,
        ),
    )


def fit(job: Row, runs: Path, root: Path) -> Row:
    """All trainings of one model, or what is left of them; its weights are kept in `WEIGHTS`."""
    name = job["model"]
    data = DataConfig(
        task="needle",
        paths=(str(root / "books"), str(root / "text/wikitext-2/train.txt.gz")),
        tokenizer=str(TOKENIZER),
        text_weight=0.1,
        needle=NeedleRows(kinds=TRAINED, words=str(root / "needle"), dense=0.5),
    )
    seeds = {make: SEED + number for number, make in enumerate(RUNS)}
    if name in BEGINS_WITH_ONE:
        seeds = {beginning: SEED + len(RUNS), **seeds}
    configs = {}
    for make, seed in seeds.items():
        config = make(name, data)
        configs[make.__name__] = replace(config, train=replace(config.train, seed=seed))
    trained, logged = train_in_turn(configs, runs / name.replace(" ", "-"))
    load(trained).save(weights(name))
    return {
        "parameters": TitansLM(model_config(name)).parameter_count,
        "copied": [
            row["valid_token_recall"]
            for run in logged[len(logged) - len(RUNS) :]  # those that all have
            for row in run
            if "valid_loss" in row
        ],
        "open": logged[-1][-1]["open"],
        "train_minutes": sum(training_seconds(run, TOKENS) for run in logged) / 60,
    }


def weights(name: str) -> Path:
    return WEIGHTS / f"{name.replace(',', '').replace(' ', '-')}.safetensors"


def carried(name: str) -> int:
    """Numbers in the state of a model after a text longer than its window and its segments."""
    with torch.no_grad():
        _, state = TitansLM(model_config(name)).eval()(torch.zeros(1, 512, dtype=torch.long))
    return sum(tensor.numel() for tensor in state.tensors().values())


def test(job: Row, runs: Path, root: Path) -> Row:
    """One kind at one length."""
    torch.set_num_threads(1)
    path = kept(weights(job["model"]), job["model"])
    samples = samples_at(job["length"])
    keep = runs / "answers" / f"{path.stem}-{job['kind']}-{job['length']}"
    fresh = not keep.exists()
    config = NeedleConfig(
        kinds=(job["kind"],),
        lengths=(job["length"],),
        samples=samples,
        rows=8,
        words=str(root / "needle"),
        paths=(str(root / "books"),),
        keep=str(keep),
    )
    begin = time.perf_counter()
    (cell,) = needle(load(path, choose_device("auto")), config, load_tokenizer(TOKENIZER)).cells
    row = {key: getattr(cell, key) for key in ("asked", "score", "exact", "low", "high")}
    if fresh:  # else it goes on, and how long it took before is not known
        row["seconds"] = time.perf_counter() - begin
    return row


def sweep(job: Row, root: Path) -> Row:
    """Where in the prompt is it found? All kinds by length and depth."""
    torch.set_num_threads(1)
    config = NeedleConfig(
        kinds=KINDS,
        lengths=SWEEP_LENGTHS,
        depths=SWEEP_DEPTHS,
        samples=16,
        words=str(root / "needle"),
        paths=(str(root / "books"),),
    )
    tokenizer = load_tokenizer(TOKENIZER)
    result = needle(load(weights(job["model"]), choose_device("auto")), config, tokenizer)
    return {"cells": [asdict(cell) for cell in result.cells]}


def look(job: Row, root: Path) -> Row:
    """How much its memories write of held-out books, a million tokens in one stream."""
    torch.set_num_threads(1)
    path = kept(weights(job["model"]), job["model"])
    return sums(load(path, choose_device("auto")), load_tokenizer(TOKENIZER), [root / "books"])


def count_prose(job: Row, root: Path) -> Row:
    """Tokens of the tests' books: longer prompts read them again."""
    return {"tokens": len(prose([root / "books"], load_tokenizer(TOKENIZER), held_out=True).tokens)}


def lost(rows: list[Row], job: Row) -> bool:
    """Was hardly anything found at a shorter length? Then this one is not asked."""
    shorter = [find(rows, job | {"length": n}) for n in LENGTHS if n < job["length"]]
    return any(row is not None and row.get("score", 0.0) <= LOST for row in shorter)


def write_page(rows: list[Row]) -> None:
    rows, failed = split_diverged(rows)
    trained = [r for r in rows if r["stage"] == "train"]
    if not trained:
        return
    tested = [r for r in rows if r["stage"] == "test"]
    lengths = sorted({r["length"] for r in tested})
    books = next(r["tokens"] for r in rows if r["stage"] == "prose")
    lines = [
        "# Single needles, far beyond the lengths of training",
        "",
        "RULER's single-needle tasks, found in percent, by `python results/needle/run.py`. Models",
        f"of {trained[0]['parameters']:,} parameters (within 2 %), two layers of width 128, tokens",
        f"of a byte-pair encoding of {VOCABULARY:,} (letters and digits of codes are tokens of",
        "their own, as digits are to Llama's); trained on rows of at most 4,096 tokens",
        f"({STEPS:,} steps of {TOKENS:,} tokens, float32)",
        "in the form of this task (the paper's are language models), one seed.",
        "Words, values and books of the tests do not occur in training: nouns, adjectives",
        "and values by a hash, books by name; training has WikiText-2 too. Below a model's row is",
        "the paper's, where there is one (170M to 760M parameters, Llama's tokens, two-layer",
        "memories in its Titans); the Titans' memories here are linear, one matrix a layer, where",
        "their name does not say otherwise, TTT-MLP's has two layers. The MAC with a two-layer",
        "memory has its product's gate on attention's side (`gate_branch`), without which it had",
        "not begun to copy. Keys start as",
        "the queries of the token before (`key_init`) in every model that has a memory. Empty: not",
        "asked, so far or because no more than 5 % were found at a shorter length. The books",
        f"of the tests hold {books:,} tokens: longer prompts read them again.",
        *(
            f"{r['model']} had {BEGINNING_STEPS} more steps first, on rows with one number."
            for r in trained
            if r["model"] in BEGINS_WITH_ONE
        ),
        "",
    ]
    titles = {
        "single-1": "pass-key in noise",
        "single-2": "number in prose",
        "single-3": "uuid in prose",
    }
    for position, kind in enumerate(KINDS):
        table = []
        for name in MODELS:
            cells = []
            for n in lengths:
                row = find(tested, {"model": name, "kind": kind, "length": n})
                cells.append("" if row is None else percent(row))
            if any(cells):
                table.append((name, *cells))
                if name in PAPER:
                    values = PAPER[name].split(" | ")[position].split()
                    paper = dict(zip(PAPER_LENGTHS, values, strict=True))
                    table.append(("the paper's", *(paper.get(n, "") for n in lengths)))
        lines += [f"## {kind}: {titles[kind]}", ""]
        lines += [*markdown_table(("model", *(readable(n) for n in lengths)), table), ""]
    asked = (next(r["asked"] for r in tested if r["length"] == n) for n in lengths)
    lines += [f"Questions per length: {', '.join(map(str, asked))}.", "", "## Training", ""]
    looked = {r["model"]: r for r in rows if r["stage"] == "writes"}
    lines += [
        "State: numbers (not bytes) that a model carries while it reads; TTT-MLP's are two sets of",
        "weights, of the last chunk and of this one.",
    ]
    if looked:
        tokens = next(iter(looked.values()))["tokens"]
        lines += [
            f"Written: the sum of each memory's learning rates over {tokens:,} tokens of",
            "the tests' books, in which there is nothing to remember.",
        ]
    lines += [""]
    lines += markdown_table(
        (
            "model",
            "parameters",
            "state",
            "value tokens copied, on the way",
            "gates open",
            "written",
            "minutes",
        ),
        [
            (
                r["model"],
                f"{r['parameters']:,}",
                f"{carried(r['model']):,}",
                " ".join(f"{100 * x:.0f}" for x in r["copied"]),
                f"{100 * r['open']:.2f} %" if r["model"].startswith("Titans") else "",
                ", ".join(f"{x:.3g}" for x in looked.get(r["model"], {}).get("written", [])),
                f"{r['train_minutes']:.0f}",
            )
            for r in trained
        ],
    )
    for row in rows:
        if row["stage"] == "depths":
            cells = tuple(NeedleCell(**cell) for cell in row["cells"])
            config = NeedleConfig(kinds=KINDS, lengths=SWEEP_LENGTHS, depths=SWEEP_DEPTHS)
            plot(NeedleResult(config=config, cells=cells), HERE / "depths.png")
            lines += ["", f"## {row['model']} by depth", ""]
            lines += ["![found, by length and depth](depths.png)", ""]
            lines += [f"{cells[0].asked} questions a cell; 0 % is the beginning of the prompt."]
    lines += ["", f"{origin(rows, 'one thread')}."]
    write_lines(HERE / "README.md", [*lines, *failed])


def main() -> None:
    parser = runner_parser(__doc__, HERE.parents[1] / "runs/needle")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options = parser.parse_args()
    path, rows = HERE / "results.json", read_rows(HERE / "results.json")
    if not options.table_only:
        runs, root = options.runs.resolve(), data_folder()
        prepare_tokenizer(root)
        rows = run_jobs(path, [{"stage": "prose"}], partial(count_prose, root=root))
        training = [{"stage": "train", "model": name} for name in options.model]
        one = partial(fit, runs=runs, root=root)
        rows = run_jobs(path, training, one, workers=options.workers)
        names = [job["model"] for job in training if not diverged(rows, job)]
        for length in sorted(options.lengths):
            asking = [
                {"stage": "test", "model": name, "kind": kind, "length": length}
                for name in names
                for kind in options.kind
            ]
            asking = [job for job in asking if not lost(rows, job)]
            one = partial(test, runs=runs, root=root)
            rows = run_jobs(path, asking, one, workers=options.workers)
            write_page(rows)
        looking = [
            {"stage": "writes", "model": name} for name in names if has_memory(MODELS[name].variant)
        ]
        rows = run_jobs(path, looking, partial(look, root=root), workers=options.workers)
        if SWEEP_MODEL in names:
            depths = [{"stage": "depths", "model": SWEEP_MODEL}]
            rows = run_jobs(path, depths, partial(sweep, root=root))
    write_page(rows)


if __name__ == "__main__":
    command(main)
