"""Gates that close against the paper's sigmoids: recall of bound pairs, far beyond training.

    python results/recall/run.py [--runs FOLDER] [--lengths 1024 16384 ...]

A two-layer LMM reads key-value pairs in random noise (`titans.data.pairs`), is trained on rows of
at most 1,024 tokens, and is asked after ever longer ones. Writes results.json, README.md and
recall.png beside this file. Weights are kept in --runs; a finished training is not repeated.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import titans
from titans import MemoryConfig, TitansConfig, TitansLM
from titans.data.pairs import IGNORED, VOCABULARY, PairTask

HERE = Path(__file__).parent
STEPS, SHORT_STEPS, TOKENS = 1000, 600, 4096
LEARNING_RATE, WRITE_COST = 2e-3, 0.02
OWN = MemoryConfig(heads=2)
GATES = {
    "closing": OWN,
    "sigmoid": dataclasses.replace(OWN, gates="sigmoid", tie_forgetting=False),
}
PAIRS = 4


def build(gates: str) -> TitansLM:
    torch.manual_seed(0)
    config = TitansConfig(
        variant="lmm",
        vocab_size=VOCABULARY,
        dim=128,
        layers=2,
        ffn_hidden=176,
        persistent=0,
        memory=GATES[gates],
    )
    return TitansLM(config)


def train(gates: str, path: Path) -> None:
    model = build(gates)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    begin = time.perf_counter()
    for step in range(STEPS):
        warm, cosine = min(1.0, step / 100), 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * cosine
        length = 64 if step < SHORT_STEPS else (64, 256, 1024)[step % 3]
        pairs = PAIRS if length == 64 else PAIRS + 4 * (step % 2)
        tokens, labels = PairTask(
            rows=TOKENS // length, length=length, pairs=pairs, seed=step
        ).batch(0)
        logits, _, records = model.run(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        opened = torch.stack([r.learning_rate.mean() for r in records if r is not None]).mean()
        optimizer.zero_grad()
        (loss + WRITE_COST * opened).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == STEPS - 1:
            asked = labels != IGNORED
            right = (logits.argmax(-1) == labels)[asked].float().mean()
            spent = time.perf_counter() - begin
            print(
                f"{gates} {step}: loss {loss.item():.3f}, recall {right.item():.2f}, "
                f"gates {opened.item():.4f}, {spent:.0f} s",
                flush=True,
            )
    model.save(path)


@torch.inference_mode()
def recall(model: TitansLM, length: int) -> dict:
    """Recall of pairs whose row has `length` tokens, over rows of about a million tokens in all."""
    rows = max(2, min(16, 2**20 // length))
    state, right, count, begin = None, 0, 0, time.perf_counter()
    for tokens, labels in PairTask(rows=rows, length=length, pairs=PAIRS, seed=10**6).stream(
        0, 1024
    ):
        logits, state = model(tokens, state)
        asked = labels != IGNORED
        right += int((logits.argmax(-1) == labels)[asked].sum())
        count += int(asked.sum())
    speed = rows * length / (time.perf_counter() - begin)
    return {"length": length, "recall": right / count, "asked": count, "tokens_per_s": speed}


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    name = next(names, platform.machine())
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def write_table(results: dict) -> None:
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lengths = [r["length"] for r in results["recall"]["closing"]]
    lines = [
        "# Recall against length: gates that close, and the paper's sigmoids",
        "",
        "A two-layer LMM (exact linear memory, 2 heads of 64) trained for 1,000 steps on pairs in",
        "noise, rows of at most 1,024 tokens, one seed; by `python results/recall/run.py` on",
        f"{results['machine']}, {results['date']}. Four pairs a row; knowing which values",
        "occurred, but not whose they are, gives 0.25.",
        "",
        "| gates | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for gates, rows in results["recall"].items():
        by_length = {r["length"]: r for r in rows}
        cells = [f"{by_length[n]['recall']:.2f}" if n in by_length else "" for n in lengths]
        lines.append(f"| {gates} | " + " | ".join(cells) + " |")
    asked = ", ".join(f"{r['asked']}" for r in results["recall"]["closing"])
    lines += ["", f"Questions asked per length: {asked}."]
    (HERE / "README.md").write_text("\n".join(lines) + "\n")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for gates, rows in results["recall"].items():
        x, y = [r["length"] for r in rows], [r["recall"] for r in rows]
        axis.plot(x, y, marker="o", label=f"{gates} gates")
    axis.axhline(1 / PAIRS, color="#888", linestyle=":", label="the set alone")
    axis.axvspan(64, 1024, color="#ddd", alpha=0.5, label="lengths in training")
    axis.set_xscale("log")
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("tokens in the row")
    axis.set_ylabel("pairs recalled")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center left")
    figure.savefig(HERE / "recall.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/recall"))
    parser.add_argument("--lengths", type=int, nargs="+")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    lengths = options.lengths or [64, 1024, 16384, 262144, 1048576, 10485760]
    results: dict = {"machine": machine(), "date": date.today().isoformat(), "recall": {}}
    paths = {gates: options.runs / f"{gates}.safetensors" for gates in GATES}
    for gates, path in paths.items():
        if not path.exists():
            train(gates, path)
        results["recall"][gates] = []
    for length in lengths:
        for gates, path in paths.items():
            done = results["recall"][gates]
            if done and done[-1]["recall"] <= 1 / PAIRS and length > 10**6:
                continue  # it has forgotten all of it already
            done.append(recall(titans.load(path), length))
            print(gates, done[-1], flush=True)
        write_table(results)


if __name__ == "__main__":
    main()
