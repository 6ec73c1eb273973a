"""DNA classification: the coefficient, the strands, early stopping, and a motif that is learned."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from titans.data.dna import reverse_complement
from titans.evals import dna as module
from titans.evals.dna import (
    ClassifierScore,
    DNAConfig,
    dna,
    load_task,
    matthews,
    predict,
    train_and_test,
)
from titans.evals.report import Diverged
from titans.state import NonFiniteError

MOTIF = "GATTACA"


def random_bases(random: np.random.Generator, length: int) -> str:
    return "".join(random.choice(list("ACGT"), length))


def plant(folder: Path, sizes: dict[str, int]) -> str:
    """Label 1 where the motif is in the sequence, at a random place."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for part, size in sizes.items():
        lines = ["sequence,label"]
        for i in range(size):
            text = random_bases(random, 24)
            if i % 2:
                at = random.integers(0, 24 - len(MOTIF))
                text = text[:at] + MOTIF + text[at + len(MOTIF) :]
            lines.append(f"{text},{i % 2}")
        (folder / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_matthews_by_hand() -> None:
    labels = np.array([1] * 6 + [0] * 4)
    guesses = np.array([1, 1, 1, 1, 0, 0, 1, 0, 0, 0])
    tp, tn, fp, fn = 4, 3, 1, 2
    expected = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert matthews(labels, guesses) == pytest.approx(expected, rel=1e-12)
    assert matthews(labels, labels) == pytest.approx(1.0)
    assert matthews(labels, 1 - labels) == pytest.approx(-1.0)
    assert matthews(labels, np.ones(10, dtype=int)) == 0.0


def test_matthews_of_three_classes_is_the_correlation_of_indicators() -> None:
    """Gorodkin's definition: covariances of one-hot columns, summed over classes."""
    random = np.random.default_rng(0)
    labels, guesses = random.integers(0, 3, 50), random.integers(0, 3, 50)
    guesses[:30] = labels[:30]
    x, y = np.eye(3)[labels], np.eye(3)[guesses]

    def covariance(a, b):
        return ((a - a.mean(0)) * (b - b.mean(0))).sum()

    expected = covariance(x, y) / np.sqrt(covariance(x, x) * covariance(y, y))
    assert matthews(labels, guesses) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["lmm", "cnn"])
def test_a_planted_motif_is_found(tmp_path, name: str, without_shape_checks) -> None:
    folder = plant(tmp_path / "motif", {"train": 800, "dev": 60, "test": 100})
    config = DNAConfig(
        folder=folder,
        models=(name,),
        dim=32,
        channels=32,
        layers=1,
        epochs=5,
        batch_size=32,
        learning_rate=5e-3,
        reverse_complement=False,
        device="cpu",
    )
    seen: list[ClassifierScore] = []
    (score,) = dna(config, seen.append).scores
    assert seen == [score]
    assert score.test_mcc > 0.7
    assert score.dev_curve[score.best_epoch - 1] == max(score.dev_curve) == score.dev_mcc


def small(tmp_path: Path, **changes: object) -> DNAConfig:
    folder = tmp_path / "motif"
    if not folder.exists():
        plant(folder, {"train": 40, "dev": 20, "test": 20})
    settings = {"folder": str(folder), "dim": 16, "layers": 1, "channels": 8, "epochs": 2}
    return DNAConfig(**{**settings, "device": "cpu", **changes})


def test_a_seed_gives_the_same_result_and_another_another(tmp_path) -> None:
    config = small(tmp_path, models=("mac", "cnn"), seeds=(0, 1), dropout=0.2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two = dna(config), dna(config)
    assert torch.equal(before, torch.random.get_rng_state())
    without_time = [dataclasses.replace(s, seconds=0.0) for s in one.scores]
    assert without_time == [dataclasses.replace(s, seconds=0.0) for s in two.scores]
    assert [(s.model, s.seed) for s in one.scores] == [
        ("mac", 0),
        ("cnn", 0),
        ("mac", 1),
        ("cnn", 1),
    ]
    weights = [
        torch.cat([p.flatten() for p in trained(config, seed).parameters()]) for seed in (0, 1)
    ]
    assert not torch.equal(*weights)
    assert json.loads(json.dumps(dataclasses.asdict(one)))["majority"] == 0.5


def trained(config: DNAConfig, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = module.build_classifier(config, "cnn", 2)
    module.train_classifier(model, load_task(config), config, seed)
    return model


def test_it_stops_early_and_keeps_the_best_weights(tmp_path, monkeypatch) -> None:
    """Dev is best after epoch 2 and then only worse: two more are waited for."""
    config = small(tmp_path, epochs=9, patience=2)
    values = iter([0.1, 0.6, 0.5, 0.6, 0.9, 0.9])
    seen = []

    def judge(model, data, settings):
        seen.append({name: t.clone() for name, t in model.state_dict().items()})
        return module.Judgement(next(values), 0.0)

    monkeypatch.setattr(module, "judge", judge)
    model = module.build_classifier(config, "cnn", 2)
    curve = module.train_classifier(model, load_task(config), config, 0)
    assert curve == [0.1, 0.6, 0.5, 0.6]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, seen[1][name])


def test_a_model_that_begins_late_is_waited_for(tmp_path, monkeypatch) -> None:
    """MAC and MAG said one class for five epochs, and were tested with the weights of the first."""
    config = small(tmp_path, epochs=9, patience=2)
    guesses, begun = [0.0, 0.2, -0.1, 0.0], [0.6, 0.5, 0.5]  # of 20 sequences, a guess has 0.2
    values = iter([*guesses, *begun])
    monkeypatch.setattr(module, "judge", lambda *_: module.Judgement(next(values), 0.0))
    model = module.build_classifier(config, "cnn", 2)
    curve = module.train_classifier(model, load_task(config), config, 0)
    assert curve == [*guesses, *begun]


def test_the_product_of_mac_is_a_setting(tmp_path) -> None:
    product = {"gate_branch": "attention", "gate_activation": "sigmoid", "combine_output": False}
    backbone = small(tmp_path, **product).backbone("mac")
    assert {name: getattr(backbone, name) for name in product} == product


def test_both_strands_are_judged_alike(tmp_path) -> None:
    config = small(tmp_path, reverse_complement=True)
    task = load_task(config)
    turned = [reverse_complement(s) for s in task.test.sequences]
    torch.manual_seed(0)
    model = module.build_classifier(config, "lmm", 2).double()
    assert np.array_equal(
        predict(model, task.test.sequences, config), predict(model, turned, config)
    )
    one, other = (module.pad(s, torch.device("cpu")) for s in (task.test.sequences, turned))
    assert not torch.allclose(model(*one), model(*other))


def test_a_batch_holds_every_sequence_once_on_either_strand(tmp_path) -> None:
    config = small(tmp_path, batch_size=16)
    data = load_task(config).train
    model = module.build_classifier(config, "cnn", 2)
    found, turned = [], 0
    for batch in module.batches(data, config, np.random.default_rng(0), model):
        for row, length, label in zip(*batch, strict=True):
            codes = row[:length].numpy().astype(np.uint8)
            same = [i for i, s in enumerate(data.sequences) if np.array_equal(s, codes)]
            if not same:
                turned += 1
                codes = reverse_complement(codes)
                same = [i for i, s in enumerate(data.sequences) if np.array_equal(s, codes)]
            assert label == data.labels[same[0]]
            found += same
    assert sorted(found) == list(range(40))
    assert 10 < turned < 30


def test_a_diverging_training_is_named_and_the_others_go_on(tmp_path, monkeypatch) -> None:
    def fails(config, task, name, seed):
        if name == "lmm":
            raise NonFiniteError("step 3: the loss is not finite")
        return train_and_test(config, task, name, seed)

    monkeypatch.setattr("titans.evals.dna.train_and_test", fails)
    seen: list[ClassifierScore | Diverged] = []
    result = dna(small(tmp_path, models=("lmm", "cnn")), seen.append)
    assert [score.model for score in result.scores] == ["cnn"]
    assert result.diverged == (
        Diverged(model="lmm", seed=0, reason="step 3: the loss is not finite"),
    )
    assert seen == [*result.diverged, *result.scores]
    task = load_task(small(tmp_path))
    with pytest.raises(NonFiniteError, match="is not finite"):
        train_and_test(small(tmp_path, learning_rate=1e20), task, "transformer", 0)


def test_a_limit(tmp_path) -> None:
    task = load_task(small(tmp_path, limit=10))
    assert [len(p.labels) for p in (task.train, task.dev, task.test)] == [10, 10, 10]
    assert "10 of each" in task.split
    assert len(set(task.train.labels.tolist())) == 2


def test_errors(without_shape_checks) -> None:
    with pytest.raises(ValueError, match="unknown variant 'lmn'; did you mean 'lmm'"):
        DNAConfig(folder="x", models=("lmn",))
    with pytest.raises(ValueError, match="models and seeds must name"):
        DNAConfig(folder="x", seeds=())
    with pytest.raises(ValueError, match="dropout must lie in"):
        DNAConfig(folder="x", dropout=1.0)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        DNAConfig(folder="x", epochs=0)


def test_a_dev_part_of_one_class_is_refused(tmp_path) -> None:
    config = small(tmp_path)
    path = Path(config.folder) / "dev.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(x for x in lines if x.endswith(",1"))]) + "\n")
    with pytest.raises(ValueError, match="dev sequences are of one class"):
        load_task(config)
