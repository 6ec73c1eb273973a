"""How good a model is on held-out data, while it trains."""

import math

import torch

from titans.data.facts import DIGITS, Batch
from titans.models.lm import TitansLM
from titans.train.batches import Batches
from titans.train.config import RunConfig
from titans.train.objective import read_segment


@torch.no_grad()
def evaluate(
    model: TitansLM, batches: Batches, config: RunConfig, in_bytes: bool
) -> dict[str, float]:
    """Metrics over `eval_batches` batches, each a window of all its segments.

    Task text: `valid_loss` in nats per token, and bits per byte (the end of a document counts as
    a byte) or perplexity. Task facts: the training loss, and the shares of digits and of whole
    answers recalled, each digit after the true ones before it.
    """
    device = next(model.parameters()).device
    segments = config.data.segments
    loss, tokens = 0.0, 0
    correct: list[torch.Tensor] = []
    memory = None
    for number in range(config.train.eval_batches * segments):
        batch = Batch(*(column.to(device) for column in batches.batch(number)))
        if number % segments == 0:
            memory = None
        segment = read_segment(model, batch, memory, config.train.precision)
        memory = segment.state
        if config.data.task == "facts":
            loss += float((segment.nll * batch.weights).sum())
            hits = segment.logits.argmax(-1) == batch.labels
            correct.append(hits[batch.answers].cpu())
        else:
            loss += float(segment.nll.double().sum())
            tokens += int((batch.weights > 0).sum())
    if config.data.task == "facts":
        return {"valid_loss": loss / config.train.eval_batches, **recall(torch.cat(correct))}
    loss /= max(tokens, 1)
    if in_bytes:
        return {"valid_loss": loss, "valid_bits_per_byte": loss / math.log(2.0)}
    return {"valid_loss": loss, "valid_perplexity": torch.tensor(loss).exp().item()}


def recall(correct: torch.Tensor) -> dict[str, float]:
    """correct: (answers * DIGITS), answer after answer."""
    return {
        "valid_digit_recall": correct.float().mean().item(),
        "valid_answer_recall": correct.view(-1, DIGITS).all(1).float().mean().item(),
    }
