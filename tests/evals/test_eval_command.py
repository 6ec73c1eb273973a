"""titans eval: the settings of a suite are its options, and its result comes whole."""

import dataclasses
import inspect
import json
from typing import Literal

import numpy as np
import pytest

from titans import TitansConfig, TitansLM
from titans.cli import main
from titans.cli.eval import SUITES, load_suite
from titans.cli.fields import add_fields, from_options
from titans.cli.parser import Parser
from titans.data.needle import NeedleTask
from titans.data.tokenizers import ByteTokenizer
from titans.evals import needle
from titans.evals.perplexity import PerplexityConfig, perplexity
from titans.evals.recall import RecallConfig, recall
from titans.models.lm import load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    where: str
    """No default: it must be given, 100 %."""
    sizes: tuple[int, ...] = (1, 2)
    """Several."""
    kind: Literal["one", "two"] = "one"
    share: float = 0.5
    write: bool = True
    quiet: bool = False
    between: str = "\n100 %"
    folder: str = ""
    others: tuple[str, ...] = ()
    limit: int | None = None


def parsed(*arguments):
    parser = Parser(prog="p")
    add_fields(parser, Settings)
    return from_options(Settings, parser.parse_args(arguments))


def test_fields_are_options():
    assert parsed("--where", "a") == Settings(where="a")
    text = "--where b --sizes 3 64K --kind two --share 0.25 --no-write --limit 7"
    given = parsed(*text.split())
    assert given == Settings(
        where="b", sizes=(3, 65536), kind="two", share=0.25, write=False, limit=7
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--where"),
        (["--where", "a", "--kind", "three"], "invalid choice: 'three'"),
        (["--where", "a", "--sizes", "few"], "expected a positive number such as 64K, got 'few'"),
        (
            ["--where", "a", "--limit", str(2**63)],
            f"--limit: expected a number of 64 bits, got {2**63}",
        ),
    ],
)
def test_a_bad_option_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        parsed(*arguments)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        parsed("--help")
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        *("it must be given, 100 %. --", "Several. [1 2]", "[one]", "[0.5]", "[on]", "[off]"),
        *(r"[\n100 %]", "--folder STR --others STR [STR ...] --limit INT"),
    ):
        assert text in said


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_describes_its_options(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        main(["eval", name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    config = getattr(load_suite(SUITES[name]), SUITES[name].config)
    for field in dataclasses.fields(config):
        assert f"--{field.name.replace('_', '-')}" in said


@pytest.mark.parametrize("name", SUITES)
def test_a_suites_plot_takes_its_result(name):
    """--out calls it with that, after minutes of work."""
    module = load_suite(SUITES[name])
    if hasattr(module, "plot"):
        first = next(iter(inspect.signature(module.plot).parameters.values()))
        assert first.annotation is inspect.signature(getattr(module, name)).return_annotation


def test_a_suite_of_a_checkpoint(tmp_path, capsys):
    model, text = tmp_path / "m.safetensors", tmp_path / "text.txt"
    TitansLM(TitansConfig(variant="lmm", dim=16, layers=1, heads=1, ffn_hidden=8)).save(model)
    text.write_text("What was said here is said again: what was said here.")
    main(
        [
            *("eval", "perplexity", "--checkpoint", str(model), "--paths", str(text)),
            *("--out", str(tmp_path / "out"), "--json"),
        ]
    )
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = perplexity(load(model), PerplexityConfig(paths=(str(text),)))
    assert last["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text()) == last


def test_brackets_in_names_are_no_markup(tmp_path, capsys):
    """NCBI's headers have them; `[/note=x]` ended a suite after its work."""
    model, path = tmp_path / "m.safetensors", tmp_path / "g.fa"
    TitansLM(TitansConfig(variant="lmm", dim=16, layers=1, heads=1, ffn_hidden=8)).save(model)
    path.write_text(">chr1 [organism=Homo sapiens] [/note=x]\n" + "ACGT" * 50)
    asked = ["--path", str(path), "--test", "40", "--valid", "0", "--contexts", "8"]
    main(["eval", "genome", "--checkpoint", str(model), *asked, "--orders", "1"])
    assert "chr1 [organism=Homo sapiens] [/note=x]" in capsys.readouterr().out
    text = tmp_path / "br[0].txt"
    text.write_text("What was said.")
    main(["eval", "perplexity", "--checkpoint", str(model), "--paths", str(text)])
    assert "br[0].txt" in capsys.readouterr().out.replace("\n", "")


def test_a_suite_that_trains(tmp_path, capsys):
    options = [
        "--steps",
        "3",
        "--tokens",
        "400",
        "--pairs",
        "2",
        "4",
        "--rows",
        "2",
        "--head-dim",
        "8",
        "--dim",
        "16",
    ]
    main(["eval", "recall", *options, "--out", str(tmp_path), "--json"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = recall(RecallConfig(steps=3, tokens=400, pairs=(2, 4), rows=2, head_dim=8, dim=16))
    assert last["cells"] == [dataclasses.asdict(cell) for cell in expected.cells]
    assert (tmp_path / "recall.png").stat().st_size > 1000


def test_a_missing_checkpoint_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "needle", "--checkpoint", str(tmp_path / "no")])
    assert capsys.readouterr().err == f"titans: {tmp_path / 'no'}: no such file\n"


def test_every_cell_is_told_and_kept_as_soon_as_it_is_there(tmp_path, capsys, monkeypatch):
    model = tmp_path / "m.safetensors"
    TitansLM(TitansConfig(variant="lmm", dim=16, layers=1, heads=1, ffn_hidden=8)).save(model)
    for name in ("noun", "adjective"):
        words = "".join(f"{name}{i}\n" for i in range(60))
        (tmp_path / f"{name}list.txt").write_text(words)
    kept = tmp_path / "out" / "needle.part.jsonl"
    seen = []

    def ask(*arguments):
        seen.append(len(kept.read_text().splitlines()) if kept.exists() else 0)
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        return real(*arguments)

    real, stop_at = needle.ask, 4
    monkeypatch.setattr(needle, "ask", ask)
    asked = ["--kinds", "single-1", "--lengths", "600", "640", "--samples", "1"]
    asked += ["--out", str(tmp_path / "out")]
    command = ["eval", "needle", "--checkpoint", str(model), "--words", str(tmp_path), *asked]
    main(command)
    assert seen == [0, 1]
    assert not kept.exists()  # all of it is in the result
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", depth")[0] for line in lines] == [
        "kind single-1, length 600",
        "kind single-1, length 640",
    ]
    with pytest.raises(SystemExit, match="130"):
        main(command)
    (cell,) = map(json.loads, kept.read_text().splitlines())
    assert cell["length"] == 600
    before, stop_at = kept.read_text(), len(seen) + 2
    with pytest.raises(SystemExit, match="130"):
        main(command)  # from the beginning, as a suite has no memory of itself
    assert kept.read_text() == before
    assert (tmp_path / "out" / "needle.part2.jsonl").read_text() == before


def test_a_length_too_short_is_refused_before_any_is_asked(tmp_path, capsys):
    model = tmp_path / "m.safetensors"
    TitansLM(TitansConfig(variant="lmm", dim=16, layers=1, heads=1, ffn_hidden=8)).save(model)
    for name in ("noun", "adjective"):
        words = "".join(f"{name}{i}\n" for i in range(60))
        (tmp_path / f"{name}list.txt").write_text(words)
    command = ["eval", "needle", "--checkpoint", str(model), "--words", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--kinds", "single-1", "--lengths", "600", "20", "--samples", "1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "20 tokens" in line
    # Questions differ in length: what holds the first may not hold another.
    task = NeedleTask("single-1", tmp_path, None, ByteTokenizer(), held_out=True)

    def fits(length: int, seed: int, index: int) -> bool:
        try:
            task.sample(length, np.random.default_rng((seed, index)))
        except ValueError:
            return False
        return True

    def shortest(seed: int, index: int) -> int:
        return next(n for n in range(300, 500) if fits(n, seed, index))

    seed = next(s for s in range(99) if shortest(s, 0) < shortest(s, 1))
    short = shortest(seed, 0)
    asked = ["--seed", str(seed), "--lengths", "900", str(short), "--samples", "2"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--kinds", "single-1", *asked])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{short} tokens" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["needle", "--checkpoint", "MODEL", "--device", "gpu7"], "device 'gpu7' cannot be used"),
        (["recall", "--steps", "100000", "--out", "MODEL"], "MODEL"),  # before it trains
        (
            ["recall", "--steps", "9", "--tokens", "400", "--learning-rate", "1e30"],
            "is not finite",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, arguments, message):
    path = tmp_path / "MODEL"
    TitansLM(TitansConfig(variant="lmm", dim=16, layers=1, heads=1, ffn_hidden=8)).save(path)
    with pytest.raises(SystemExit, match="2"):
        main(["eval", *(str(path) if a == "MODEL" else a for a in arguments)])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "perplexity --checkpoint demo --paths $NO_SUCH/x",
        "commonsense --checkpoint demo --paths $NO_SUCH/x",
        "genome --checkpoint demo --path $NO_SUCH/x",
        "needle --checkpoint demo --kinds single-1 --words $NO_SUCH/x",
        "babilong --checkpoint demo --folder $NO_SUCH/x",
        "dna --folder $NO_SUCH/x",
        "forecast --data $NO_SUCH/x",
        "ablation --paths README.md --test-paths $NO_SUCH/x",
    ],
)
def test_every_path_may_begin_with_a_variable(command, capsys):
    with pytest.raises(SystemExit):
        main(["eval", *command.split()])
    assert "$NO_SUCH/x: the environment variable NO_SUCH is not set" in capsys.readouterr().err
