"""A small Llama gets a memory: recall of pairs beyond the window that it was trained with.

    python results/adapt/run.py [--runs FOLDER] [--workers 2] [--seeds 0 1] [--table-only]

The base is a `LlamaForCausalLM` with random weights, trained as such on rows of at most 128
tokens: key-value pairs in noise (`titans.data.pairs`), and random tokens of which a quarter comes
again, without which it stays at guessing among a row's values. Then `titans.adapt` gives it
memories, and these alone, or all weights, are trained. Writes results.json and README.md beside
this file. Weights are kept in --runs; a finished training or measurement is not repeated.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from titans.config import MemoryConfig
from titans.data.pairs import IGNORED, VOCABULARY, PairBatch, PairTask, guess
from titans.evals.jobs import (
    command,
    diverged,
    kept,
    read_rows,
    run_jobs,
    runner_parser,
    split_diverged,
)
from titans.evals.recall import fit_pairs
from titans.evals.report import markdown_table, origin, readable, recalled, write_lines
from titans.hf.adapter import FILE_NAME, AdaptedForCausalLM, adapt, load_adapter
from titans.train.objective import descend

HERE = Path(__file__).parent
BASE = "Llama"
PAIRS, WINDOW, POSITIONS, TOKENS = 4, 64, 128, 4096
BASE_STEPS, BASE_RATE = 1800, 3e-3
STEPS, RATE, WRITE_COST = 600, 3e-3, 0.02
LENGTHS = (64, 128, 256, 1024, 4096, 16384, 65536)
MEMORY = MemoryConfig(heads=2, key_init="previous")
# Name in the table: style, and whether the base is frozen; of the base itself its window.
MODELS: dict[str, tuple[str, bool] | int | None] = {
    "Llama, attention over the whole row": None,
    "Llama, attention over 64 tokens": WINDOW,
    "MAG adapter, memory trained": ("mag", True),
    "MAL adapter, memory trained": ("mal", True),
    "MAG adapter, all trained": ("mag", False),
    "MAL adapter, all trained": ("mal", False),
}
ADAPTED: dict[str, tuple[str, bool]] = {n: m for n, m in MODELS.items() if isinstance(m, tuple)}


def new_base(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=176,
            max_position_embeddings=POSITIONS,
            initializer_range=0.1,
            tie_word_embeddings=True,
        )
    )


def rows_of(step: int, seed: int, length: int, pairs: int) -> PairBatch:
    task = PairTask(rows=TOKENS // length, length=length, pairs=pairs, seed=10**5 * seed + step)
    return task.batch(0)


def repeats(step: int, seed: int, length: int) -> PairBatch:
    """Random tokens, of which a quarter of the row's length comes twice; to say again is asked."""
    generator = torch.Generator().manual_seed(10**5 * seed + step)
    rows, part = TOKENS // length, length // 4

    def places(first: int, last: int) -> torch.Tensor:
        begin = torch.randint(first, last - part + 1, (rows, 1), generator=generator)
        return begin + torch.arange(part)

    tokens = torch.randint(0, VOCABULARY - 1, (rows, length), generator=generator)
    labels = torch.full_like(tokens, IGNORED)
    row = torch.arange(rows)[:, None]
    once, again = places(0, length // 2), places(length // 2, length)
    tokens[row, again] = tokens[row, once]
    labels[row, again[:, :-1]] = tokens[row, again[:, 1:]]
    return PairBatch(tokens, labels)


def base_of(seed: int) -> dict[str, Any]:
    """The job that trains it."""
    return {"stage": "base", "model": BASE, "seed": seed}


def train_base(job: dict[str, Any], runs: Path) -> dict[str, Any]:
    """Train the Llama on rows that its positions reach, and save it."""
    torch.set_num_threads(1)
    model, begin, curve = new_base(job["seed"]), time.perf_counter(), []
    optimizer = torch.optim.AdamW(
        model.parameters(), BASE_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    for step in range(BASE_STEPS):
        left = 1 - step / BASE_STEPS
        optimizer.param_groups[0]["lr"] = BASE_RATE * min(1.0, step / 100, 3 * left)
        late = left < 1 / 3
        if step % 2 == 0:
            tokens, labels = repeats(step, job["seed"], (16, 32, 64)[step % 3])
        else:
            length = ((32, 64, POSITIONS) if late else (18, 24, 32))[step % 3]
            tokens, labels = rows_of(step, job["seed"], length, PAIRS)
        logits = model(tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        descend(model, optimizer, loss, step + 1)
        if step % 50 == 49:
            right = (logits.argmax(-1) == labels)[labels != IGNORED].float().mean().item()
            curve.append([step + 1, right])
            print("base", job["seed"], step + 1, f"{right:.2f}", flush=True)
    model.save_pretrained(runs / f"base-{job['seed']}")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
        "minutes": (time.perf_counter() - begin) / 60,
    }


def load_base(seed: int, runs: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(kept(runs / f"base-{seed}", "the base"))


def train_adapter(job: dict[str, Any], runs: Path) -> dict[str, Any]:
    """Adapt the trained base, train on rows of up to 1,024 tokens, and save what was trained."""
    torch.set_num_threads(1)
    style, frozen = ADAPTED[job["model"]]
    base = load_base(job["seed"], runs)
    torch.manual_seed(job["seed"])
    model = adapt(base, [0, 1], style, MEMORY, WINDOW).freeze_base(frozen).train()
    begin, curve = time.perf_counter(), []

    def batch(step: int) -> PairBatch:
        # Rows that fit into the window would teach a memory nothing.
        length = ((96, 128, 192) if step < STEPS // 2 else (128, 256, 1024))[step % 3]
        return rows_of(step, 1000 + job["seed"], length, PAIRS + 4 * (step % 2))

    def watch(*point: float) -> None:
        curve.append(list(point))
        print(job["model"], *point, flush=True)

    fit_pairs(model.model, batch, STEPS, RATE, WRITE_COST, watch)
    folder = runs / f"{job['model']}-{job['seed']}"
    model.save_adapter(folder / FILE_NAME)
    if not frozen:
        model.base.save_pretrained(folder)
    return {
        "parameters": sum(p.numel() for p in model.memory_parameters()),
        "bytes": (folder / FILE_NAME).stat().st_size,
        "curve": curve,
        "minutes": (time.perf_counter() - begin) / 60,
    }


def model_of(job: dict[str, Any], runs: Path) -> AdaptedForCausalLM:
    """The model of a row of the table; the base itself as one whose memories add nothing."""
    base = load_base(job["seed"], runs)
    if job["model"] not in ADAPTED:
        return adapt(base, [0], window=MODELS[job["model"]]).eval()
    folder = kept(runs / f"{job['model']}-{job['seed']}", job["model"])
    _, frozen = ADAPTED[job["model"]]
    if not frozen:
        from transformers import LlamaForCausalLM

        base = LlamaForCausalLM.from_pretrained(folder)
    return load_adapter(base, folder).eval()


@torch.inference_mode()
def measure(job: dict[str, Any], runs: Path) -> dict[str, Any]:
    """Recall of pairs whose row has `length` tokens, read 1,024 at a time."""
    torch.set_num_threads(1)
    model, length = model_of(job, runs), job["length"]
    rows = max(4, min(64, 2**18 // length))
    task = PairTask(rows=rows, length=length, pairs=PAIRS, seed=10**6)
    cache, right, count, begin = None, 0, 0, time.perf_counter()
    for tokens, labels in task.stream(0, 1024):
        output = model(tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        asked = labels != IGNORED
        right += int((output.logits.argmax(-1) == labels)[asked].sum())
        count += int(asked.sum())
    return {
        "recall": right / count,
        "asked": count,
        "state_bytes": cache.state.nbytes // rows,
        "tokens_per_s": rows * length / (time.perf_counter() - begin),
    }


def write_page(rows: list[dict[str, Any]]) -> None:
    rows, failed = split_diverged(rows)
    asked = [r for r in rows if r["stage"] == "recall"]
    adapters = [r for r in rows if r["stage"] == "train"]
    if not asked or not adapters:
        return
    lengths = sorted({r["length"] for r in asked})
    table = []
    for name in MODELS:
        cells = []
        for n in lengths:
            found = [r for r in asked if (r["model"], r["length"]) == (name, n)]
            cells.append(recalled(found) if found else "")
        if not any(cells):
            continue
        longest = max((r for r in asked if r["model"] == name), key=lambda r: r["length"])
        own = next((r for r in adapters if r["model"] == name), None)
        size = ("", "", "")
        if own:
            size = (f"{own['parameters']:,}", f"{own['bytes']:,}", f"{own['minutes']:.1f}")
        table.append((name, *cells, f"{longest['state_bytes']:,}", *size))
    base = next(r for r in rows if r["stage"] == "base")  # adapters and questions have one
    counts = (next(r["asked"] for r in asked if r["length"] == n) for n in lengths)
    seeds = ", ".join(map(str, sorted({r["seed"] for r in asked})))
    lines = [
        "# A memory for a Llama",
        "",
        f"A Llama of {base['parameters']:,} parameters (two layers of width 64), random at first,",
        f"was trained as such: {BASE_STEPS:,} steps of {TOKENS:,} tokens, rows of at most",
        f"{POSITIONS} tokens, key-value pairs in noise or random tokens that repeat. Then",
        "`titans.adapt` put memories beside the attention of both layers, which from then on",
        f"reached {WINDOW} tokens, and the memories alone, or all weights, were trained for",
        f"{STEPS} steps on rows of up to 1,024 tokens.",
        "Percent of four pairs recalled, by tokens in the row (95 % interval where fewer than 100",
        f"were asked); saying any of its values gives {100 * guess(PAIRS):.0f}. State: bytes that",
        "a row carries after the longest text of its line; then an adapter's parameters, the bytes",
        "of its file, and minutes of training.",
        "By `python results/adapt/run.py`.",
        "",
        *markdown_table(
            ("model", *map(readable, lengths), "state", "parameters", "file", "minutes"), table
        ),
        "",
        "The first two lines are the base as it was trained, with its own attention over the whole",
        f"row (made for {POSITIONS} positions, and not asked beyond 4K) or in the window alone.",
        "",
        f"Minutes of the base's training: {base['minutes']:.1f}.",
        f"Questions asked per length: {', '.join(map(str, counts))}; seeds {seeds}.",
        f"{origin(rows)}.",
    ]
    write_lines(HERE / "README.md", [*lines, *failed])


def main() -> None:
    parser = runner_parser(__doc__, HERE.parents[1] / "runs/adapt")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    options = parser.parse_args()
    runs, path = options.runs.resolve(), HERE / "results.json"
    runs.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path)
    if not options.table_only:
        for stage, function, names in (
            ("base", train_base, [BASE]),
            ("train", train_adapter, [m for m in options.model if m in ADAPTED]),
        ):
            jobs = [
                {"stage": stage, "model": name, "seed": seed}
                for seed in options.seeds
                for name in names
                if not diverged(rows, base_of(seed))
            ]
            rows = run_jobs(path, jobs, partial(function, runs=runs), workers=options.workers)
        jobs = [
            {"stage": "recall", "model": name, "seed": seed, "length": length}
            for length in LENGTHS
            for seed in options.seeds
            for name in options.model
            # Attention over the whole row costs its square, and is lost beyond its positions.
            if MODELS[name] is not None or length <= 4096
            if not diverged(rows, base_of(seed))
            if not diverged(rows, {"stage": "train", "model": name, "seed": seed})
        ]
        rows = run_jobs(path, jobs, partial(measure, runs=runs), workers=options.workers)
    write_page(rows)


if __name__ == "__main__":
    command(main)
