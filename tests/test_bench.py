"""`titans bench`: the counts and the clock are right, and every subcommand says what it must.

The numbers themselves are the machine's; what is tested is that they are of the right thing.
"""

import importlib.util
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from titans.bench import contest, measure, report
from titans.bench.contest import outlook, peak_mb, row
from titans.bench.contestants import Contestant, Steps, make_steps
from titans.bench.flops import attention_flops, module_flops, useful_flops
from titans.bench.layer import LayerBench
from titans.bench.model import ModelBench
from titans.bench.rivals import match_size, transformer
from titans.cli import main
from titans.config import TitansConfig
from titans.fresh import FreshProcessError
from titans.models.lm import TitansLM

FIELDS = ("impl", "tokens_per_s_forward", "tokens_per_s_train", "peak_mb", "fraction_of_peak")
SCRIPTS = Path(__file__).parent.parent / "benchmarks"
TINY = TitansConfig(variant="sliding", dim=32, heads=2, layers=2, window=8, persistent=0)

pytestmark = pytest.mark.usefixtures("without_shape_checks")


@pytest.fixture(autouse=True)
def small_products(monkeypatch) -> None:
    """The matrix peak of toy sizes: what it is is not tested here, only that it is measured."""
    monkeypatch.setattr(measure, "CPU_PRODUCTS", ((1, 64), (1, 128), (2, 32)))


def bench(capsys, *arguments: object) -> dict:
    """The JSON object in the last line of `titans bench ... --json`."""
    main(["bench", *(str(a) for a in arguments), "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["hardware"]["cpu"]
    assert result["hardware"]["torch"] == torch.__version__
    assert result["matrix_peak_gflops"] > 0
    for line in result["rows"]:
        assert set(FIELDS) <= set(line), line
    return result


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_useful_flops_by_hand() -> None:
    """d = 2, F = 6, C = 3, one token of one head; written out product by product."""
    errors = 2 * 6 + 6 * 2 + 2 * 6  # k W_1, a W_2, delta W_2^T
    matrices = 2 * 6 + 6 * 2
    inside = 2 * (2 + 6 + 6 + 2)  # two of the three tokens on average; scores and sums, two layers
    sizes = {"key_dim": 2, "expansion": 3, "depth": 2, "chunk_size": 3}
    one = {"tokens": 1, "heads": 1, **sizes}
    with_momentum = errors + 2 * matrices + 2 * matrices + inside
    assert useful_flops(**one, momentum=True) == 2 * with_momentum
    assert useful_flops(**one, momentum=False) == 2 * (errors + 2 * matrices + inside)
    many = useful_flops(tokens=10, heads=4, **sizes, momentum=True)
    assert many == 10 * 4 * 2 * with_momentum
    # Linear, exact, d = 2, 3 tokens solved at once: k W, k S, and <k, k>, solve: one below each.
    linear = (2 * 2 + 2 * 2 + 1 * (2 + 2)) + 2 * 4 + 2 * 4 + 2 * (2 + 2)
    exact = {"key_dim": 2, "expansion": 3, "depth": 1, "chunk_size": 3, "exact": True}
    assert useful_flops(tokens=1, heads=1, **exact, momentum=True) == 2 * linear


def test_flops_of_attention_and_models() -> None:
    # Four tokens, window 2: 1 + 2 + 2 + 2 keys seen, scores and sums, two flops each.
    assert attention_flops(8, 2, 4, 4) == pytest.approx(7 * 8 * 2 * 2)
    model = transformer(TINY)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert module_flops(model, 10, 10) == 2 * linear * 10


def test_contestants_take_turns(monkeypatch) -> None:
    called = []

    def clock(step, device):
        step()
        return {"fast": 1.0, "slow": 4.0, "long": 20.0}[called[-1]] + len(called) / 1000

    monkeypatch.setattr(measure, "seconds", clock)
    steps = {name: lambda name=name: called.append(name) for name in ("fast", "slow", "long")}

    def broken():
        raise RuntimeError("no\nluck")

    timings = measure.interleave({**steps, "broken": broken}, 3, limit_s=8.1)
    assert called == ["fast", "slow", "long", "fast", "slow", "fast", "slow", "fast"]
    assert [timings[name].repeats for name in steps] == [3, 2, 1]  # the long call counted itself
    assert timings["fast"].median_s == 1.006
    assert (timings["fast"].low_s, timings["fast"].high_s) == (1.004, 1.008)
    assert timings["broken"].failure == "RuntimeError: no luck"


def test_matrix_peak_is_the_best_median() -> None:
    peak = measure.MatrixPeak()
    times = dict(zip(peak.steps, (1.0, 0.5, 2.0), strict=True))
    timings = {name: measure.Timing(s, s, s, 5) for name, s in times.items()}
    best = max(peak.flops[name] / s for name, s in times.items())
    assert peak.gflops(timings) == best / 1e9


def test_peak_memory_is_what_a_step_holds() -> None:
    def step():
        return torch.ones(48, 2**18).sum()  # 48 MB, freed at the end

    assert measure.peak_memory_mb(step, "cpu") == pytest.approx(48, abs=6)
    assert measure.peak_memory_mb(lambda: None, "cpu") < 6


def test_memory_of_a_contestant_grows_with_its_length() -> None:
    settings = {"heads": 2, "key_dim": 32, "depth": 2, "expansion": 4, "chunk_size": 64}
    settings["momentum"] = True
    short, long = (
        peak_mb(Contestant(impl="op", kind="op", settings=settings, length=n)) for n in (1024, 4096)
    )
    assert 1 < short < long


def test_who_would_outgrow_the_machine_sits_out() -> None:
    before = row("x", tokens_per_s_train=100.0, peak_mb=1.0, length=100, batch=1)  # 1 s a step
    common = {"repeats": 5, "limit_s": 25.0}
    assert outlook(None, 400, quadratic=True, **common) is None
    assert outlook(before, 400, quadratic=False, **common) is None
    assert "about 16 s" in outlook(before, 400, quadratic=True, **common)
    assert "GB" in outlook({**before, "peak_mb": 1e9}, 400, quadratic=False, **common)
    failed = row("x", length=100, note="broken")
    assert outlook(failed, 400, quadratic=False, **common) == "broken"


def test_a_step_that_does_not_fit_is_shortened(monkeypatch) -> None:
    monkeypatch.setattr(contest, "peak_mb", lambda c: 2.0 * c.length)  # 2 MB a token
    monkeypatch.setattr(contest, "available_memory_mb", lambda: 2600.0)
    at = LayerBench(length=4096).layer(64)
    assert contest.shortened(replace(at, length=1024)) == (replace(at, length=1024), None)
    fitting, reason = contest.shortened(at)
    assert fitting == replace(at, length=1024)
    assert reason == "4,096 tokens would need about 8 GB"


def test_the_transformer_reads_a_text_in_any_pieces() -> None:
    torch.manual_seed(0)
    model = transformer(TINY).double()
    tokens = torch.randint(0, 256, (2, 23))
    whole, _ = model(tokens)
    parts, state = [], None
    for piece in tokens.split([1, 9, 1, 12], 1):
        logits, state = model(piece, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    torch.testing.assert_close(model(changed)[0][:, :-1], whole[:, :-1], rtol=0, atol=1e-12)
    # A window as long as the text is full attention: the same model with our attention.
    windowed = TitansLM(TitansConfig(**{**TINY.__dict__, "window": 23})).double()
    weights = {k.replace("mixer.", "mixer.attention."): v for k, v in model.state_dict().items()}
    missing = windowed.load_state_dict(weights, strict=False).missing_keys
    assert all(name.endswith("persistent.tokens") for name in missing)
    torch.testing.assert_close(windowed(tokens)[0], whole, rtol=1e-10, atol=1e-10)


def test_models_of_a_comparison_are_of_one_size() -> None:
    base = ModelBench(dim=64, heads=2).base()
    size = sum(p.numel() for p in transformer(base).parameters())
    for variant in ("lmm", "mac", "mag", "mal"):
        config = match_size(TitansConfig(**{**base.__dict__, "variant": variant}), size)
        assert TitansLM(config).parameter_count == pytest.approx(size, rel=0.01)
    with pytest.raises(ValueError, match="choose a larger dim"):
        match_size(base, 1000)


def test_titans_pytorch_is_given_the_same_memory() -> None:
    at = LayerBench(length=64, heads=2, key_dim=8)
    theirs = make_steps(at.titans_pytorch(64, 64))
    ours = make_steps(at.layer(64))
    from titans_pytorch import NeuralMemory

    memory = NeuralMemory(**at.titans_pytorch(64, 64).settings)
    shapes = [tuple(p.shape) for p in memory.memory_model_parameters]
    assert {(2, 8, 32), (2, 32, 8)} <= set(shapes)
    assert memory.to_momentum is not None
    assert theirs.train().shape == ours.train().shape == (1, 64, 16)


def test_bench_layer_and_its_report(capsys, tmp_path) -> None:
    small = ("--length", 128, "--heads", 2, "--key-dim", 8, "--repeats", 1, "--no-memory")
    result = bench(capsys, "layer", *small, "--out", tmp_path)
    names = [line["impl"] for line in result["rows"]]
    assert "titans-pytorch, per-token gates, batch 64" in names
    for line in result["rows"]:
        assert min(line["tokens_per_s_forward"], line["tokens_per_s_train"]) > 0, line
        assert line["settings"]
        if line["settings"].get("precision") != "bf16":
            assert 0 < line["fraction_of_peak"] < 1
    run = script("run")
    result |= {"command": "titans bench layer", "seconds": 1}
    text = run.write_report({"layer": result}, tmp_path, tmp_path)
    assert "training speed over titans-pytorch, chunk 64" in text
    assert '"default_model_kwargs"' in text
    assert json.loads((tmp_path / "layer.json").read_text())["rows"] == result["rows"]


@pytest.mark.parametrize("axis", ["length", "chunk", "depth", "heads"])
def test_bench_layer_sweeps(capsys, tmp_path, axis) -> None:
    small = ("--heads", 2, "--key-dim", 8, "--repeats", 1, "--no-memory", "--no-rivals")
    lengths = ("--lengths", 64, 128) if axis == "length" else ("--length", 64)
    arguments = (*small, *lengths, "--sweep", axis, "--out", tmp_path)
    result = bench(capsys, "layer", *arguments)
    assert len({line["x"] for line in result["rows"]}) > 1
    assert (tmp_path / f"layer-{axis}.png").stat().st_size > 1000


def test_a_rival_that_is_not_installed_says_so_and_the_rest_goes_on(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    small = ("--heads", 2, "--key-dim", 8, "--repeats", 1, "--no-memory")
    result = bench(capsys, "layer", *small, "--sweep", "length", "--lengths", 64)
    told = {line["impl"]: line for line in result["rows"]}
    absent = told.pop("titans-pytorch, one gate per 64, batch 64")
    assert "titans_pytorch" in absent["note"]
    assert absent["tokens_per_s_train"] is None
    assert all(line["tokens_per_s_train"] > 0 for line in told.values())
    monkeypatch.setitem(sys.modules, "transformers", None)
    small = ("--dim", 64, "--heads", 4, "--layers", 1, "--window", 16, "--lengths", 32)
    rows = bench(capsys, "model", *small, "--repeats", 1, "--no-memory")["rows"]
    absent = next(line for line in rows if line["impl"] == "Mamba2 (transformers)")
    assert "transformers" in absent["note"]


def test_a_memory_that_cannot_be_measured_loses_no_speed(monkeypatch) -> None:
    def fail(contestant):
        raise FreshProcessError("ended")

    monkeypatch.setattr(contest, "peak_mb", fail)
    monkeypatch.setattr(contest, "available_memory_mb", lambda: 1.0)
    at = LayerBench(length=512, heads=2, key_dim=8).layer(64)
    assert contest.shortened(at) == (at, None)
    _, (line,) = contest.contest([at], repeats=1)
    assert line["tokens_per_s_train"] > 0
    assert (line["peak_mb"], line["note"]) == (None, "its memory could not be measured: ended")


def test_bench_model(capsys) -> None:
    small = ("--dim", 64, "--heads", 4, "--layers", 1, "--window", 16, "--lengths", 32, 64)
    result = bench(capsys, "model", *small, "--repeats", 1, "--no-memory")
    measured = {(r["impl"], r["length"]): r for r in result["rows"]}
    for length in (32, 64):
        assert measured["Transformer++", length]["tokens_per_s_train"] > 0
        assert measured["mag", length]["memory_share"] > 0
        for impl in ("Mamba2 (transformers)", "Qwen3-Next, gated delta (transformers)"):
            assert measured[impl, length]["tokens_per_s_train"] > 0
    assert (
        len({r["parameters"] // 1000 for (n, _), r in measured.items() if n in ("mag", "lmm")}) == 1
    )


def test_bench_decode_and_stream(capsys, tmp_path) -> None:
    small = ("--position", 32, 64, "--batch", 2, "--tokens", 2, "--repeats", 1)
    rows = bench(capsys, "decode", *small)["rows"]
    ours = [r for r in rows if r["impl"] == "titans"]
    theirs = [r for r in rows if r["impl"] != "titans"]
    assert [(r["position"], r["batch"]) for r in ours] == [(32, 1), (64, 1), (32, 2)]
    assert ours[0]["state_bytes"] == ours[1]["state_bytes"] == ours[2]["state_bytes"] / 2
    assert theirs[0]["state_bytes"] * 2 == theirs[1]["state_bytes"]  # a cache grows

    result = bench(capsys, "stream", "--length", 6000, "--marks", 3, "--out", tmp_path)
    assert [m["tokens"] for m in result["series"]] == [2048, 4096, 6000]
    assert result["rows"][0]["peak_mb"] == result["series"][-1]["peak_rss_mb"]
    assert (tmp_path / "stream.png").exists()


def test_bench_memory_and_its_report(capsys, tmp_path, monkeypatch) -> None:
    text = tmp_path / "book.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200)
    small = ("--facts", 2, "--repeats", 1, "--out", tmp_path)
    # On a machine under load a first call may take so long that it counts, and is the only one.
    monkeypatch.setattr(measure, "LONG_CALL_S", float("inf"))
    result = bench(capsys, "memory", "--text", text, *small)
    reading, at_hand, from_file, command, again = result["rows"]
    assert reading["length"] == len(text.read_text())
    assert result["settings"]["text"] == "book.txt"
    for line in (at_hand, from_file, command, again):
        assert line["note"] == "2 of 2 answers right", line
    assert at_hand["seconds"] < again["seconds"]
    result |= {"command": "titans bench memory", "seconds": 1}
    report = script("run").write_report({"memory": result}, tmp_path, tmp_path)
    assert "| read the text again, then ask | - |" in report
    assert f"instead of to {reading['length']:,} bytes read again" in report

    from titans.bench.memory import MemoryBench, hidden_facts

    monkeypatch.delenv("TITANS_DATA_DIR", raising=False)
    name, haystack = hidden_facts(MemoryBench(length=20000, facts=3))
    assert name == "Python's standard library"
    assert haystack.tokens.shape == (1, 20000)
    stream = haystack.tokens.tobytes()
    ends = [stream.index(fact.statement) + len(fact.statement) for fact in haystack.facts[0]]
    assert ends == [20000 - distance for distance in haystack.distances]


def test_the_gpu_script_runs_without_one(capsys, tmp_path, monkeypatch) -> None:
    gpu = script("gpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="torch sees no CUDA device"):
            gpu.main()
    parts = ["correctness", "titans-pytorch", "models", "decode"]
    arguments = ["--smoke", "--impl", "chunked", "--only", *parts]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *arguments])
    gpu.main()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report["parts"]) == parts
    assert not [p for p in report["parts"].values() if "error" in p]
    for line in report["parts"]["correctness"]["rows"]:
        limit = 1e-4 if line["impl"].endswith("float32") else 3e-2
        assert line["error_gradient"] < limit, line
    assert "## decode" in (tmp_path / "GPU.md").read_text()


BAD = [
    (("bench",), "required: WHAT"),
    (("bench", "fly"), "invalid choice: 'fly'"),
    (("bench", "layer", "--length", "x"), "expected a positive number such as 64K"),
    (("bench", "layer", "--sweep", "width"), "invalid choice: 'width'"),
    (("bench", "model", "--dim", "30"), "even multiple of heads"),
    (("bench", "decode", "--model", "absent.safetensors"), "absent.safetensors: no such file"),
    (("bench", "stream", "--model", "absent.safetensors"), "absent.safetensors: no such file"),
    (("bench", "memory", "--length", "1K"), "1024 bytes are too few to hide 8 facts in"),
]
if not torch.cuda.is_available():
    BAD.append((("bench", "layer", "--device", "cuda"), "device cuda is not available"))


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_useful_flops_are_most_of_what_is_spent(variant: str) -> None:
    """Beside useful products torch spends masked halves, persistent tokens and solves."""
    base = ModelBench().base()
    memory = replace(base.memory, impl="exact")
    model = TitansLM(replace(base, variant=variant, memory=memory))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 512, dtype=torch.long))
    assert 1 < counter.get_total_flops() / module_flops(model, 512, 512) < 1.25


def test_a_step_that_fails_later_does_not_end_the_others() -> None:
    called = []

    def failing():
        called.append(1)
        if len(called) == 3:
            raise RuntimeError("no memory left")

    timings = measure.interleave({"failing": failing, "other": lambda: None}, 4)
    assert timings["failing"].failure == "RuntimeError: no memory left"
    assert len(called) == 3
    assert timings["other"].repeats == 4


def test_what_went_wrong_is_told_as_it_is() -> None:
    note = "RuntimeError: [enforce fail] cannot open [/tmp/x]"
    hardware = {"cpu": "c", "threads": 1, "torch": "t", "date": "d"}
    result = {"bench": "layer", "rows": [row("x", note=note)], "hardware": hardware}
    view = report.table(result | {"versions": {}, "matrix_peak_gflops": 1.0})
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(view)
    assert note in console.export_text()


def test_a_number_that_is_none_is_null() -> None:
    assert report.finite({"a": [math.nan, 1.0], "b": ({"c": math.inf},)}) == {
        "a": [None, 1.0],
        "b": [{"c": None}],
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--lengths", "1K"), "--lengths has no effect on a bench without --sweep"),
        (("--sweep", "chunk", "--chunk-size", "8"), "--chunk-size has no effect on --sweep chunk"),
        (("--sweep", "depth", "--depth", "3"), "--depth has no effect on --sweep depth"),
        (("--sweep", "length", "--length", "1K"), "--length has no effect on --sweep length"),
        (("--out", "FILE"), "File exists"),
    ],
)
def test_bench_refuses_before_it_measures(arguments, told, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("titans.bench.layer.bench_layer", None)
    (tmp_path / "file").touch()
    given = [str(tmp_path / "file") if a == "FILE" else a for a in arguments]
    with pytest.raises(SystemExit):
        main(["bench", "layer", *given])
    assert told in capsys.readouterr().err


def test_products_in_another_precision_are_no_share_of_the_peak() -> None:
    contestant = Contestant(impl="x", kind="op", settings={"precision": "bf16"}, length=8)
    timing = measure.Timing(1.0, 1.0, 1.0, 1)
    made = Steps(lambda: None, lambda: None, 1.0, 0)
    line = contest.result_row(contestant, made, timing, timing, 1.0)
    assert line["fraction_of_peak"] is None
    assert "fraction_of_peak_forward" not in line
