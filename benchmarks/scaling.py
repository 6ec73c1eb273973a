"""docs/scaling.md: what a training step takes from 170M to 1.3B parameters, 4K to 2M tokens.

    python benchmarks/scaling.py [--out docs/scaling.md]

Formulas are in `titans.bench.scaling`. Measured here, in some minutes on one core: what a block of
each size keeps of a token, and what a small model keeps in all beside what is computed for it.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from titans.bench.measure import processor
from titans.bench.scaling import (
    Spread,
    count_weights,
    held_bytes,
    received_bytes,
    smallest_sequence,
    step_flops,
)
from titans.config import MemoryConfig, TitansConfig
from titans.models.lm import Block, TitansLM
from titans.presets import preset

SIZES = ("170m", "340m", "760m", "1.3b")
LENGTHS = (4_096, 32_768, 262_144, 2_097_152)
BATCH = 2**21  # tokens of all texts of a step: the longest is one of them
SLICE = 32_768  # tokens of a text that one process should hold at most
GB = 1e9
# What is assumed of a machine: 8 GPUs of 80 GB.
MACHINE = 8
RATE = 0.35 * 989e12  # FLOP/s of a GPU: a share of its bf16 peak
NEAR, FAR = 300e9, 40e9  # bytes/s that reach a GPU from its machine, from another


@dataclass(frozen=True)
class Kept:
    """Bytes that a block keeps of a token for its backward pass, and of a text besides."""

    token: float
    text: float


def planned(size: str, deep: bool) -> TitansConfig:
    """MAL: of the paper's sizes, with a linear memory, or with the network of its NeurIPS text
    and one decay a token (channels keep the states of every chunk: that fits nowhere)."""
    config = preset(f"mal-{size}-paper_neurips")
    if deep:
        scalar = replace(config.memory, decay="scalar", decay_rank=None)
        return replace(config, memory=scalar)
    memory = MemoryConfig(
        heads=config.memory.heads,
        depth=1,
        norm=False,
        residual=False,
        chunk_size=1,
        momentum=True,
    )
    return replace(config, memory=memory)


def saved_bytes(model: torch.nn.Module, compute) -> int:
    """Bytes of what autograd keeps for the backward pass of compute(), parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = compute()  # alive while counted: freed memory would be counted twice
    assert result is not None
    return sum(found.values())


def block_kept(config: TitansConfig, lengths: tuple[int, int] = (256, 512)) -> Kept:
    """Measured at two lengths, since a part does not depend on it."""
    torch.manual_seed(0)
    block = Block(config, 0)
    few, many = (
        saved_bytes(block, lambda n=n: block(torch.randn(1, n, config.dim), None)) for n in lengths
    )
    token = (many - few) / (lengths[1] - lengths[0])
    return Kept(token, few - token * lengths[0])


def checked(config: TitansConfig, length: int) -> tuple[float, float]:
    """What a whole small model keeps: computed from one block, and measured."""
    kept = block_kept(config, (length // 2, length))
    model = TitansLM(config)
    tokens = torch.zeros(1, length, dtype=torch.long)

    def compute() -> torch.Tensor:
        logits, _ = model(tokens)
        return F.cross_entropy(logits.transpose(1, 2), tokens)

    spread = Spread(tokens=length, rows=1, processes=1, checkpointing=False)
    held = held_bytes(config, spread, kept.token, count_weights(config))
    # Kept are two of the logits' three: their gradient comes later.
    computed = held["activations"] + config.layers * kept.text + held["logits"] / 3
    return computed, saved_bytes(model, compute)


def machines(count: int, deep: bool, kept: dict[str, Kept]) -> list[str]:
    """The table of so many machines."""
    lines = [
        "| size | tokens | processes a text | GB weights | GB activations | GB logits | PFLOP | "
        "GB for texts | GB for weights | seconds | tokens/s |",
        "|---" * 11 + "|",
    ]
    processes = count * MACHINE
    for size in SIZES:
        config = planned(size, deep)
        weights = count_weights(config)
        for tokens in LENGTHS:
            rows = max(BATCH // tokens, 1)
            sequence = max(smallest_sequence(tokens, SLICE, processes), processes // rows)
            spread = Spread(
                tokens=tokens,
                rows=rows,
                processes=processes,
                sequence=sequence,
                shard=MACHINE,
            )
            heads = config.memory.heads
            if deep and heads % sequence:
                lines.append(f"| {size} | {tokens:,} | {sequence} > {heads} heads | " + "| " * 8)
                continue
            held = held_bytes(config, spread, kept[size].token, weights)
            received = received_bytes(config, spread, weights)
            flops = step_flops(config, spread)
            seconds = (
                flops / processes / RATE
                + received["text"] / (NEAR if sequence <= MACHINE else FAR)
                + received["weights"] / NEAR
                + 2 * weights.all / MACHINE * 4 * (count - 1) / count / FAR
            )
            lines.append(
                f"| {size} | {tokens:,} | {sequence} | {held['weights'] / GB:.1f} | "
                f"{held['activations'] / GB:.1f} | {held['logits'] / GB:.1f} | "
                f"{flops / 1e15:.0f} | "
                f"{received['text'] / GB:.2f} | {received['weights'] / GB:.1f} | {seconds:.1f} | "
                f"{rows * tokens / seconds / 1e6:.2f}M |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "docs/scaling.md"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = {}
    for deep in (False, True):
        kept = {size: block_kept(planned(size, deep)) for size in SIZES}
        tables[deep] = kept, {count: machines(count, deep, kept) for count in (1, 64)}
    checks = []
    for name in ("lmm", "mag", "mal"):
        config = replace(preset(f"{name}-small"), layers=3)
        computed, measured = checked(config, 1024)
        checks.append(
            f"| {name} | {computed / 1e6:.1f} | {measured / 1e6:.1f} | {computed / measured:.3f} |"
        )
    options.out.write_text(report(tables, checks))
    print(options.out)


def report(tables, checks: list[str]) -> str:
    cost = "\n".join(
        f"| {size} | {tables[False][0][size].token / 1e3:.0f} | "
        f"{tables[True][0][size].token / 1e3:.0f} |"
        for size in SIZES
    )

    def table(deep: bool, count: int) -> str:
        return "\n".join(tables[deep][1][count])

    return TEXT.format(
        machine=processor(),
        cost=cost,
        checks="\n".join(checks),
        linear_8=table(False, 1),
        linear_512=table(False, 64),
        deep_8=table(True, 1),
        deep_512=table(True, 64),
        batch=f"{BATCH:,}",
        slice=f"{SLICE:,}",
    )


TEXT = """# What training takes on one machine and on 64

Written by `python benchmarks/scaling.py`; formulas in `titans.bench.scaling`. **Computed, not
run**: no such machine was at hand. Measured are the bytes a block keeps (below), and that the
bytes which the formulas say processes exchange for a text are those that they do exchange
(`tests/distributed/test_scaling.py`, exact).

The model is MAL in the paper's sizes. A step has {batch} tokens. Weights, gradients and moments
are float32, shared by the 8 GPUs of a machine (`strategy = "fsdp"`, `shard = 8`), blocks are
computed twice (`gradient_checkpointing`), and a text is shared by as few processes as leave each
at most {slice} tokens, or by as many as there are for each text.

Assumed of a GPU: 80 GB; 346 TFLOP/s, 35 % of 989; 300 GB/s from within its machine, 40 GB/s from
another one. Nothing is hidden: compute and exchanges are added up. Exchanges and what is kept are
counted in float32; bf16 keeps less.

Columns: GB are of one process, held or received in a step; PFLOP and tokens/s are of all.

## One machine, linear memory

{linear_8}

## 64 machines, linear memory

{linear_512}

A linear memory's exchange does not depend on the length: (2d)^2 + 2d d numbers a head and
process forward, and 2d d backward.

## One machine, the network of the NeurIPS text (two layers, chunks of 16)

{deep_8}

## 64 machines, the network of the NeurIPS text

{deep_512}

Its heads bound the processes of a text; beyond that it is read in turn.

## What stands in the way

- **Several rows at once.** The tables compute a step in one part. Where a process has several
  rows, `train.accumulate` divides activations and logits by the number of parts.
- **Logits.** 32,000 logits of every token would be the largest thing by far; the loss is computed
  in pieces, whose logits are not kept but computed again for the backward pass.
- **One machine and 2M tokens.** 262,144 tokens on each GPU do not fit in 80 GB; 64 machines hold
  such a text with room to spare.
- **Many processes and a linear memory with wide heads.** All maps go to all processes, so what
  travels grows with their number. With 512 processes and heads of 256 it takes longer than the
  products; a scan in log2(P) exchanges would not.

## Measured

Bytes that a block keeps of a token for its backward pass ({machine}, float32):

| size | KB, linear memory | KB, NeurIPS network |
|---|---|---|
{cost}

Models of three layers, 1,024 tokens: what the formula gives from one block, and what autograd
keeps in all.

| model | MB computed | MB measured | ratio |
|---|---|---|---|
{checks}
"""


if __name__ == "__main__":
    main()
