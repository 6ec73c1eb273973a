"""Everything that a machine with a GPU is needed for, in one call.

    python benchmarks/gpu.py [--out DIR] [--only PART ...] [--impl triton] [--smoke]

Correctness of the kernels against the reference, speed of the rule and the layer at equal
tokens from 2K to 128K, decoding, models and their share of the matrix peak, and the rivals
that are installed. A part that fails is recorded and the others go on. Writes gpu.json after
every part, and GPU.md. --smoke runs all of it at toy sizes, also on a CPU.
"""

import argparse
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans.bench.contest import Row, contest
from titans.bench.contestants import Contestant
from titans.bench.decode import DecodeBench, bench_decode
from titans.bench.layer import LayerBench
from titans.bench.measure import hardware, one_line, versions
from titans.bench.report import markdown
from titans.bench.rivals import count, match_size, transformer
from titans.config import MemoryConfig, to_dict
from titans.layers.memory import unit_norm
from titans.models.lm import TitansLM
from titans.ops import MemoryNetwork, RuleState, neural_memory
from titans.presets import preset

HERE = Path(__file__).parent
PACKAGES = ("triton", "titans-pytorch", "flash-linear-attention", "mamba-ssm", "transformers")
LINEAR = MemoryNetwork(depth=1, residual=False, norm=False)
MLP = MemoryNetwork(depth=2, residual=False, norm=False)
RESIDUAL = MemoryNetwork(depth=2, residual=True, norm=True)
CASES = [("linear", LINEAR), ("MLP", MLP), ("x + LN(MLP(x))", RESIDUAL)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a run."""

    device: str
    dtype: str
    impl: str
    tokens: int
    """In one step, whatever the length."""
    lengths: tuple[int, ...]
    layer: LayerBench
    models: tuple[str, ...]
    model_length: int
    model_batch: int
    positions: tuple[int, ...]
    check_length: int
    repeats: int
    full: bool
    """False leaves out what only a whole run asks for."""


def plan(impl: str, smoke: bool) -> Plan:
    """The sizes of a whole run, or toy ones."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    if smoke:
        layer = LayerBench(heads=2, key_dim=16, chunk_sizes=(16,), device=device, dtype=dtype)
        return Plan(
            device=device,
            dtype=dtype,
            impl=impl,
            tokens=128,
            lengths=(64, 128),
            layer=layer,
            models=("mag-tiny",),
            model_length=64,
            model_batch=1,
            positions=(64, 128),
            check_length=40,
            repeats=1,
            full=False,
        )
    return Plan(
        device=device,
        dtype=dtype,
        impl=impl,
        tokens=2**17,
        lengths=tuple(2**n for n in range(11, 18)),
        layer=LayerBench(heads=16, key_dim=64, chunk_sizes=(64, 16), device=device, dtype=dtype),
        models=("lmm-340m-paper_v1", "mag-340m-paper_v1"),
        model_length=4096,
        model_batch=4,
        positions=(1024, 2**18),
        check_length=300,
        repeats=5,
        full=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results-gpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--impl", default="triton", help="the implementation under test")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on a CPU too")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("gpu.py: torch sees no CUDA device; --smoke runs toy sizes on a CPU")
    sizes = plan(options.impl, options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "hardware": hardware(sizes.device),
        "versions": versions(*PACKAGES),
        "impl": options.impl,
        "smoke": options.smoke,
        "parts": {},
    }
    for name in options.only:
        report["parts"][name] = guarded(PARTS[name], sizes)
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "GPU.md").write_text(write_report(report))
        print(f"{name}: {report['parts'][name].get('error', 'done')}", flush=True)
    print(options.out / "GPU.md")


def guarded(part: Callable[[Plan], dict[str, Any]], sizes: Plan) -> dict[str, Any]:
    """The part's result, or what stopped it; and the seconds it took."""
    begin = time.perf_counter()
    try:
        result = part(sizes)
    except Exception as error:  # whatever it is, the other parts are still worth the machine
        traceback.print_exc()
        result = {"error": one_line(error), "rows": []}
    if sizes.device == "cuda":
        torch.cuda.empty_cache()
    return {**result, "seconds": round(time.perf_counter() - begin, 1)}


def correctness(sizes: Plan) -> dict[str, Any]:
    """Largest error of outputs, final weights and every gradient, relative to the largest value.

    The truth is the token-by-token reference in float64 on the same (rounded) inputs; the
    chunked form in float32 stands beside it, as the measure of what float32 can do.
    """
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        for chunk in (64, 16):
            for name, network in CASES:
                inputs = random_inputs(sizes, network, dtype)
                truth = outcome("reference", inputs, network, chunk, torch.float64)
                for impl in ("chunked", sizes.impl):
                    case = f"{impl}: {name}, chunk {chunk}, {str(dtype).removeprefix('torch.')}"
                    try:
                        got = outcome(impl, inputs, network, chunk, torch.float32)
                    except Exception as error:
                        rows.append({"impl": case, "note": one_line(error)})
                        continue
                    rows.append({"impl": case, **worst(got, truth)})
    return {"rows": rows}


def random_inputs(sizes: Plan, network: MemoryNetwork, dtype: torch.dtype) -> dict[str, Tensor]:
    """q, k, v rounded to dtype; gates and weights in float32. All on the device."""
    torch.manual_seed(0)
    heads, size = 2, sizes.layer.key_dim
    shape, device = (2, sizes.check_length, heads), sizes.device
    inputs = {
        "q": unit_norm(torch.randn(*shape, size, device=device)).to(dtype),
        "k": unit_norm(torch.randn(*shape, size, device=device)).to(dtype),
        "v": torch.randn(*shape, size, device=device).to(dtype),
        "theta": 0.05 * torch.rand(*shape, device=device),
        "eta": 0.3 + 0.4 * torch.rand(*shape, device=device),
        "alpha": 0.02 * torch.rand(*shape, device=device),
    }
    for layer, (i, o) in enumerate(network.shapes(size, size)):
        inputs[f"weights {layer}"] = torch.randn(heads, i, o, device=device) * i**-0.5
    return inputs


def outcome(
    impl: str,
    inputs: dict[str, Tensor],
    network: MemoryNetwork,
    chunk_size: int,
    state_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Outputs, final weights and gradients; `state_dtype` float64 computes in float64."""
    wide = state_dtype == torch.float64
    used = {
        name: (x.double() if wide else x.clone()).requires_grad_() for name, x in inputs.items()
    }
    weights = [used[f"weights {layer}"] for layer in range(network.depth)]
    state = RuleState.init(weights, 2, momentum=True, chunk_size=chunk_size)
    result = neural_memory(
        used["q"],
        used["k"],
        used["v"],
        used["theta"],
        state=state,
        network=network,
        momentum=used["eta"],
        decay=used["alpha"],
        chunk_size=chunk_size,
        impl=impl,  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(1)
    above = torch.randn(result.output.shape, generator=generator).to(result.output.device)
    (result.output.double() * above).sum().backward()
    found = {"output": result.output.detach()}
    found |= {f"final {i}": w.detach() for i, w in enumerate(result.state.weights)}
    found |= {f"d {name}": x.grad for name, x in used.items() if x.grad is not None}
    return found


def worst(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Any]:
    """Relative errors: of the output, of the final weights, and the worst gradient by name."""
    errors = {
        name: float((got[name].double() - x).abs().max() / x.abs().max().clamp(min=1e-30))
        for name, x in truth.items()
    }
    gradients = {name: e for name, e in errors.items() if name.startswith("d ")}
    return {
        "error_output": errors["output"],
        "error_state": max(e for name, e in errors.items() if name.startswith("final")),
        "error_gradient": max(gradients.values()),
        "worst_gradient": max(gradients, key=lambda name: gradients[name]),
    }


def rule_speed(sizes: Plan) -> dict[str, Any]:
    """The bare rule, both implementations, at equal tokens from the shortest to the longest."""

    def field(at: LayerBench) -> list[Contestant]:
        found = []
        for chunk in at.chunk_sizes:
            for depth in (2, 1):
                for impl in (sizes.impl, "chunked"):
                    c = at.op(chunk, depth)
                    found.append(
                        replace(c, impl=f"{c.impl}, {impl}", settings={**c.settings, "impl": impl})
                    )
        return [*found, at.op(1, depth=1)]

    return speeds(sizes, field)


def layer_speed(sizes: Plan) -> dict[str, Any]:
    """The whole layer beside attention and what else is installed, at equal tokens."""

    def field(at: LayerBench) -> list[Contestant]:
        found = []
        for chunk, depth in ((at.chunk_sizes[0], 2), (at.chunk_sizes[0], 1)):
            c = at.layer(chunk, depth)
            settings = {**c.settings, "impl": sizes.impl}
            found.append(replace(c, impl=f"{c.impl}, {sizes.impl}", settings=settings))
        found += [at.layer(at.chunk_sizes[0]), at.layer(1, depth=1), at.attention(None)]
        return found + package_rivals(at)

    return speeds(sizes, field)


def titans_pytorch_speed(sizes: Plan) -> dict[str, Any]:
    """titans-pytorch beside our layer at 4,096 tokens, batch 1: more does not fit its memory."""
    at = replace(sizes.layer, length=4096 if sizes.full else 64)
    c = at.layer(64)
    fast = replace(c, impl=f"{c.impl}, {sizes.impl}", settings={**c.settings, "impl": sizes.impl})
    rivals = [at.titans_pytorch(64, 64), at.titans_pytorch(1, 64)]
    peak, rows = contest([fast, c, *rivals], repeats=sizes.repeats, memory=sizes.full)
    return {"matrix_peak_gflops": peak, "rows": rows}


def speeds(sizes: Plan, field: Callable[[LayerBench], list[Contestant]]) -> dict[str, Any]:
    peaks, rows = [], []
    for length in sizes.lengths:
        at = replace(sizes.layer, length=length, batch=max(1, sizes.tokens // length))
        peak, measured = contest(field(at), repeats=sizes.repeats, limit_s=20, memory=sizes.full)
        peaks.append(peak)
        rows += measured
        print(markdown({"rows": measured}), flush=True)
    return {"matrix_peak_gflops": max(peaks), "rows": rows}


def package_rivals(at: LayerBench) -> list[Contestant]:
    """Layers of other packages with the same width and heads; absent ones say so in the table."""
    gated = {"hidden_size": at.dim, "head_dim": at.key_dim, "num_heads": at.heads, "expand_v": 1}
    mamba = {"d_model": at.dim, "d_state": 64, "headdim": at.key_dim, "expand": 2}
    table = (
        ("Gated DeltaNet (fla)", "fla.layers", "GatedDeltaNet", gated),
        ("Mamba2 (mamba_ssm)", "mamba_ssm", "Mamba2", mamba),
    )
    return [
        at.contestant(
            impl,
            "package layer",
            {"module": module, "class": name, "dim": at.dim, "arguments": arguments},
        )
        for impl, module, name, arguments in table
    ]


def models(sizes: Plan) -> dict[str, Any]:
    """Training throughput; `of peak` is the model's matrix work over the measured matrix peak.

    The paper's sizes with x + LN(MLP(x)) and one forgetting gate a head, which the kernels have,
    and with our exact linear memory; the Transformer++ has as many parameters.
    """
    contestants = []
    for name in sizes.models:
        config = preset(name)
        deep = replace(
            config.memory, depth=2, chunk_size=64, residual=True, norm=True, max_surprise=0.0
        )
        linear = MemoryConfig(dim=config.dim, heads=config.memory.heads)
        for memory, impl in ((deep, sizes.impl), (deep, "chunked"), (linear, "exact")):
            settings = to_dict(replace(config, memory=memory))
            settings["memory"]["impl"] = impl
            contestants.append(model_contestant(sizes, f"{name}, {impl}", "titans", settings))
    dense = replace(preset(sizes.models[-1]), variant="transformer")
    dense = match_size(dense, count(TitansLM, preset(sizes.models[-1])), transformer)
    contestants.append(model_contestant(sizes, "Transformer++", "transformer", to_dict(dense)))
    peak, rows = contest(contestants, repeats=sizes.repeats, limit_s=60, memory=sizes.full)
    return {"matrix_peak_gflops": peak, "rows": rows}


def model_contestant(sizes: Plan, impl: str, kind: str, settings: dict[str, Any]) -> Contestant:
    return Contestant(
        impl=impl,
        kind=kind,
        settings=settings,
        length=sizes.model_length,
        batch=sizes.model_batch,
        device=sizes.device,
        dtype=sizes.dtype,
    )


def decode(sizes: Plan) -> dict[str, Any]:
    """Latency of a token, early and late in a stream."""
    bench = DecodeBench(
        positions=sizes.positions,
        tokens=32 if sizes.full else 2,
        repeats=sizes.repeats,
        rivals=sizes.full,
        device=sizes.device,
    )
    result = bench_decode(bench)
    return {"matrix_peak_gflops": result["matrix_peak_gflops"], "rows": result["rows"]}


PARTS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "correctness": correctness,
    "rule": rule_speed,
    "layer": layer_speed,
    "titans-pytorch": titans_pytorch_speed,
    "models": models,
    "decode": decode,
}


def write_report(report: dict[str, Any]) -> str:
    """GPU.md: the machine, then a table per part."""
    machine = report["hardware"]
    name = machine.get("gpu", f"no GPU ({machine['cpu']})")
    installed = ", ".join(f"{k} {v or 'not installed'}" for k, v in report["versions"].items())
    parts = [
        f"# {name}{', toy sizes' if report['smoke'] else ''}\n",
        f"torch {machine['torch']}; {installed}; {machine['date']}; "
        f"implementation under test: {report['impl']}. Written by `python benchmarks/gpu.py`.\n",
    ]
    for part, result in report["parts"].items():
        parts.append(f"\n## {part}\n\n{inspect.getdoc(PARTS[part])}\n")
        if "error" in result:
            parts.append(f"Failed: {result['error']}\n")
        elif part == "correctness":
            parts.append(errors_table(result["rows"]) + "\n")
        else:
            peak = result["matrix_peak_gflops"] / 1000
            parts.append(markdown(result) + "\n")
            parts.append(f"Matrix peak {peak:,.1f} TFLOP/s; {result['seconds']} s.\n")
    return "\n".join(parts)


def errors_table(rows: list[Row]) -> str:
    lines = ["| case | output | final weights | worst gradient | of |", "|---|---|---|---|---|"]
    for line in rows:
        if "note" in line:
            lines.append(f"| {line['impl']} | {line['note']} | | | |")
        else:
            numbers = (line[f"error_{what}"] for what in ("output", "state", "gradient"))
            written = " | ".join(f"{n:.1e}" for n in numbers)
            lines.append(f"| {line['impl']} | {written} | {line['worst_gradient']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
