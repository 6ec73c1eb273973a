"""Training by transformers' means: checkpointing keeps the memory, Trainer trains, also with a
memory carried from batch to batch."""

from pathlib import Path

import pytest
import torch
from tiny import KINDS, small, small_config, some_tokens, wrapped

from titans import TitansLM
from titans.hf import TitansCache, TitansForCausalLM


def checkpointing(model: TitansForCausalLM, **options: object) -> None:
    """By its newer name where there is one: the older one then warns."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(**options)
    else:
        model.gradient_checkpointing_enable(**options)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_the_memory_and_its_gradients(kind: str) -> None:
    """transformers' own checkpointing layers drop past_key_values without a word."""
    tokens = some_tokens()

    def losses_and_gradients(checkpointed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = wrapped(kind).train()
        if checkpointed:
            checkpointing(model)
            assert model.model.gradient_checkpointing
        cache, losses = TitansCache(), []
        for piece in tokens.split([6, 5], 1):  # the second piece's loss reaches into the first
            output = model(piece, labels=piece, past_key_values=cache)
            assert output.past_key_values.get_seq_length() > 0
            losses.append(output.loss)
        assert cache.state.position == 11
        losses[1].backward()
        return torch.stack(losses).detach(), {n: p.grad for n, p in model.named_parameters()}

    plain, wanted = losses_and_gradients(False)
    got, gradients = losses_and_gradients(True)
    torch.testing.assert_close(got, plain, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-12, msg=name)
    # The second piece alone has another loss: what was carried matters.
    alone = wrapped(kind)(tokens[:, 6:], labels=tokens[:, 6:]).loss
    assert not torch.isclose(alone, plain[1])


class Documents(torch.utils.data.Dataset):
    """Four of the tokens, each twice: quickly learned."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (some_tokens(1, 8, seed=index)[0] % 4).repeat_interleave(2)
        return {"input_ids": tokens, "labels": tokens}


def arguments(folder: Path, **options: object):
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 12,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-2,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 0,
            **options,
        },
    )


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trainer_trains_and_its_checkpoint_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer

    def trainer(**options: object) -> Trainer:
        torch.manual_seed(0)
        model = TitansForCausalLM.from_titans(TitansLM(small_config("mac")))
        settings = arguments(tmp_path, save_strategy="steps", save_steps=6, **options)
        data = Documents()
        return Trainer(model=model, args=settings, train_dataset=data, eval_dataset=data)

    first = trainer()
    first.train()
    losses = losses_of(first)
    assert losses[-1] < losses[0] - 0.3
    assert first.evaluate()["eval_loss"] < losses[0]
    checkpointed = trainer(gradient_checkpointing=True, max_steps=3)
    checkpointed.train()
    assert losses_of(checkpointed) == pytest.approx(losses[:3], rel=1e-5)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert losses_of(resumed)[-3:] == pytest.approx(losses[-3:], rel=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trainer_carries_a_memory_from_batch_to_batch(tmp_path: Path) -> None:
    """The example of docs/transformers.md: truncated back-propagation over one long document."""
    pytest.importorskip("accelerate")
    from transformers import Trainer

    document = some_tokens(1, 40)

    class Carrying(Trainer):
        cache = None

        def compute_loss(self, model, inputs, return_outputs=False, **options):
            self.cache = self.cache or TitansCache()
            output = model(**inputs, past_key_values=self.cache)
            self.cache.detach()
            return (output.loss, output) if return_outputs else output.loss

        def _get_train_sampler(self, *dataset):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    pieces = [{"input_ids": p[0], "labels": p[0]} for p in document.split(10, 1)]
    settings = arguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=1,
        learning_rate=0.0,
        gradient_checkpointing=True,
    )
    trainer = Carrying(model=wrapped("mac-deep"), args=settings, train_dataset=pieces)
    trainer.train()
    # With a learning rate of zero: the losses of the document read in one go.
    with torch.no_grad():
        logits, _ = small("mac-deep")(document)
    nll = torch.nn.functional.cross_entropy(logits[0, :-1], document[0, 1:], reduction="none")
    wanted = [float(nll[begin : begin + 9].mean()) for begin in range(0, 40, 10)]
    assert losses_of(trainer) == pytest.approx(wanted, rel=1e-4)
    assert trainer.cache.state.position == 40
