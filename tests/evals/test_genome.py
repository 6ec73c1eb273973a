"""Next-base modelling: Markov chains by hand, and windows that are each read from the start."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from titans import MemoryConfig, TitansConfig, TitansLM
from titans.data.dna import encode_bases
from titans.evals.genome import (
    GenomeConfig,
    genome,
    markov_bits,
    plot_contexts,
    split_genome,
)


def build(**changes: object) -> TitansLM:
    torch.manual_seed(0)
    settings = {"variant": "mal", "dim": 16, "layers": 1, "window": 7, "persistent": 2}
    model = TitansLM(TitansConfig(**{**settings, "memory": MemoryConfig(heads=2), **changes}))
    with torch.no_grad():
        model.embedding.weight.normal_()
    return model.double()


def fasta(path: Path, text: str) -> str:
    path.write_text(">toy\n" + text + "\n")
    return str(path)


def test_order_zero_by_hand() -> None:
    """AAAC and its other strand GTTT: A 3, C 1, G 1, T 3, of 8."""
    bits = markov_bits(encode_bases("AAAC"), encode_bases("ACCN"), 0, smoothing=1.0)
    assert bits.bases == 3
    expected = -(math.log2(4 / 12) + 2 * math.log2(2 / 12)) / 3
    assert bits.bits_per_base == pytest.approx(expected, rel=1e-12)


def test_order_one_by_hand() -> None:
    """Pairs of AACA: AA AC CA; of its other strand TGTT: TG GT TT. In ACAGN follow AC (1 of the
    2 from A), CA (1 of 1), AG (0 of 2); the pair GN does not count."""
    bits = markov_bits(encode_bases("AACA"), encode_bases("ACAGN"), 1, smoothing=0.5)
    assert bits.bases == 3
    probabilities = [1.5 / 4, 1.5 / 3, 0.5 / 4]
    expected = -sum(map(math.log2, probabilities)) / 3
    assert bits.bits_per_base == pytest.approx(expected, rel=1e-12)


def test_unseen_contexts_are_uniform_and_a_cycle_is_learned() -> None:
    """GTAC is its own reverse complement: G follows it in the cycle, C on the other strand. So
    one base in five costs a bit at order 4, and none at order 5."""
    assert markov_bits(encode_bases("AAAA"), encode_bases("CGCG"), 2).bits_per_base == 2.0
    cycle = encode_bases("ACGGT" * 400)
    assert markov_bits(cycle, cycle, 0).bits_per_base > 1.9
    assert markov_bits(cycle, cycle, 4, 1e-6).bits_per_base == pytest.approx(0.2, abs=1e-3)
    assert markov_bits(cycle, cycle, 5, 1e-6).bits_per_base == pytest.approx(0.0, abs=1e-3)
    with pytest.raises(ValueError, match="has 6 known ones before it"):
        markov_bits(cycle, cycle[:6], 6)


def test_every_order_against_counting_with_dictionaries() -> None:
    random = np.random.default_rng(0)
    train, test = (random.integers(0, 5, n).astype(np.uint8) for n in (400, 60))
    complement = [3, 2, 1, 0, 4]
    for order in range(5):
        counts: dict[tuple[int, ...], int] = {}
        for strand in (train.tolist(), [complement[b] for b in train.tolist()[::-1]]):
            for i in range(order, len(strand)):
                gram = tuple(strand[i - order : i + 1])
                counts[gram] = counts.get(gram, 0) + (4 not in gram)
        losses = []
        for i in range(order, len(test)):
            *context, base = test[i - order : i + 1].tolist()
            if 4 not in (*context, base):
                total = sum(counts.get((*context, b), 0) for b in range(4))
                p = (counts.get((*context, base), 0) + 0.7) / (total + 2.8)
                losses.append(-math.log2(p))
        bits = markov_bits(train, test, order, smoothing=0.7)
        assert bits.bases == len(losses)
        assert bits.bits_per_base == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_the_split(tmp_path) -> None:
    path = fasta(tmp_path / "g.fa", "A" * 50 + "C" * 20 + "G" * 30)
    config = GenomeConfig(path=path, test=30, valid=20, contexts=(8,))
    parts = split_genome(config)
    assert [set(p.tolist()) for p in parts[1:]] == [{0}, {1}, {2}]
    assert parts.rule == ("bases 0 to 50 train, the next 20 validate, the last 30 test (of 100)")
    with pytest.raises(ValueError, match="100 bases are too few to hold out 90 and 20"):
        split_genome(dataclasses.replace(config, test=90))


@pytest.mark.parametrize("write", [True, False])
def test_windows_are_read_from_a_fresh_memory(tmp_path, write: bool) -> None:
    random = np.random.default_rng(1)
    text = "".join(random.choice(list("ACGT"), 760))
    text = text[:505] + "NN" + text[507:]
    config = GenomeConfig(
        path=fasta(tmp_path / "g.fa", text),
        test=360,
        valid=100,
        contexts=(300, 50),
        orders=(0, 2),
        piece=32,
        write=write,
    )
    model, seen = build(), []
    result = genome(model, config, seen.append)
    assert tuple(seen) == result.contexts
    held_out = [ord(c) for c in text[-360:]]
    for row, context in zip(result.contexts, (50, 300), strict=True):
        losses = []
        for start in range(0, 360, context):
            window = torch.tensor([held_out[start : start + context]])
            with torch.no_grad():
                logits, _ = model(window[:, :-1], None, write)
            losses.append(cross_entropy(logits[0], window[0, 1:], reduction="none"))
        known = [
            torch.tensor([c != ord("N") for c in held_out[s : s + context][1:]])
            for s in range(0, 360, context)
        ]
        scored = torch.cat(losses)[torch.cat(known)]
        assert row.context == context
        assert row.bases == len(scored) == 360 - 2 - math.ceil(360 / context)
        bits = scored.mean().item() / math.log(2)
        assert row.bits_per_base == pytest.approx(bits, rel=1e-6)
    assert sum(p.tokens for p in result.positions) == result.contexts[1].bases
    total = sum(p.tokens * p.loss for p in result.positions) / result.contexts[1].bases
    assert total / math.log(2) == pytest.approx(result.contexts[1].bits_per_base, rel=1e-9)
    assert [m.order for m in result.markov] == [0, 2]
    assert json.loads(json.dumps(dataclasses.asdict(result)))["record"] == "toy"
    plot_contexts({"mal": result.contexts}, result.markov, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_baselines_alone_and_models_that_do_not_fit(tmp_path) -> None:
    path = fasta(tmp_path / "g.fa", "ACGT" * 50)
    config = GenomeConfig(path=path, test=40, valid=0, contexts=(8,), orders=(1,))
    result = genome(None, config)
    assert (result.contexts, result.positions) == ((), ())
    assert result.markov[0].bits_per_base < 0.2  # ACGT is its own other strand
    with pytest.raises(ValueError, match=r"a model that reads bytes: .* the model 5: name"):
        genome(build(vocab_size=5), config)
    with pytest.raises(
        ValueError,
        match="a model that reads bytes: the tokenizer bytes has 257 tokens, the model 2048",
    ):
        genome(build(vocab_size=2048), config)  # it would read other tokens of its own
    with pytest.raises(ValueError, match="smoothing must lie above 0, up to 1e9, got nan"):
        dataclasses.replace(config, smoothing=math.nan)
    assert GenomeConfig(path=path, test=5000).contexts == (1024, 4096)
    assert GenomeConfig(path=path, test=40).contexts == (40,)
    with pytest.raises(ValueError, match=r"contexts must lie in 2\.\.1048576"):
        GenomeConfig(path=path, contexts=())
    with pytest.raises(ValueError, match=r"contexts must lie in 2\.\.40 \(test\), got \[8, 41\]"):
        dataclasses.replace(config, contexts=(8, 41))
    with pytest.raises(ValueError, match=r"orders must lie in 0\.\.24"):
        GenomeConfig(path=path, orders=(25,))


def test_what_is_too_short_for_a_chain_is_told_before_the_model_reads(tmp_path) -> None:
    path = fasta(tmp_path / "g.fa", "ACGT" * 50)
    config = GenomeConfig(path=path, test=3, valid=0, contexts=(2,), orders=(5,))
    seen = []
    with pytest.raises(ValueError, match="no base of the 3 held out has 5 known ones before it"):
        genome(build(), config, seen.append)
    assert seen == []
