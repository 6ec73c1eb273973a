"""Classifiers: what follows a row's end does not count, and what is pooled is what it says."""

import pytest
import torch
from torch import Tensor

from titans import MemoryConfig, TitansConfig
from titans.models.classifier import ConvolutionalClassifier, SequenceClassifier

LENGTHS = torch.tensor([9, 4, 13])


def config(variant: str, **changes: object) -> TitansConfig:
    return TitansConfig(
        variant=variant,
        vocab_size=5,
        dim=16,
        layers=2,
        ffn_hidden=24,
        window=6,
        segment=6,
        persistent=2,
        memory=MemoryConfig(heads=2),
        **changes,
    )


def rows() -> Tensor:
    return torch.randint(0, 5, (3, 13), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal", "cnn"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_does_not_count(variant: str, pooling: str) -> None:
    torch.manual_seed(0)
    if variant == "cnn":
        model = ConvolutionalClassifier(5, 3, channels=8, width=5)
    else:
        model = SequenceClassifier(config(variant), 3, pooling)
    model = model.double().eval()
    tokens = rows()
    together = model(tokens, LENGTHS)
    for row, length, got in zip(tokens, LENGTHS, together, strict=True):
        alone = model(row[None, :length], length[None])[0]
        assert torch.allclose(got, alone, atol=1e-11)


def test_pooling_is_the_mean_or_the_last_hidden_state() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(config("mal"), 3, "mean").double().eval()
    tokens = rows()[:1]
    hidden = model.backbone.hidden(tokens).hidden[0]
    for pooling, expected in [("mean", hidden.mean(0)), ("last", hidden[-1])]:
        model.pooling = pooling
        got = model(tokens, torch.tensor([13]))[0]
        assert torch.allclose(got, model.output(expected), atol=1e-12)


def test_hidden_states_are_what_the_head_reads() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(config("mac"), 2).backbone.double()
    tokens = rows()
    first, state, _ = model.hidden(tokens[:, :7])
    second = model.hidden(tokens[:, 7:], state)
    whole = model.run(tokens)
    logits = model.head(torch.cat([first, second.hidden], 1))
    assert torch.allclose(logits, whole.logits, atol=1e-11)
    assert second.state.position == 13


def test_nothing_is_trained_that_predicts_nothing() -> None:
    model = SequenceClassifier(config("lmm", tie_embeddings=False), 2)
    model(rows(), LENGTHS).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert not model.backbone.head.weight.requires_grad


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        SequenceClassifier(config("lmm"), 1)


def test_an_unknown_pooling_is_refused(without_shape_checks) -> None:
    with pytest.raises(ValueError, match="pooling must be one of mean, last, got 'max'"):
        SequenceClassifier(config("lmm"), 2, pooling="max")


@pytest.mark.parametrize("lengths", [[0, 3], [3, 9], [3]])
def test_lengths_that_no_row_has_are_refused(without_shape_checks, lengths) -> None:
    model = SequenceClassifier(config("lmm"), 2)
    with pytest.raises(ValueError, match=r"lengths must be 2 numbers from 1 to 8, got \["):
        model(torch.ones(2, 8, dtype=torch.long), torch.tensor(lengths))
