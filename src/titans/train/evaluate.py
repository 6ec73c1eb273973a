"""How good a model is on held-out data, while it trains."""

import math

import torch

from titans.data.facts import Batch
from titans.models.lm import TitansLM
from titans.train.batches import Batches
from titans.train.config import RunConfig
from titans.train.objective import read_segment
from titans.train.processes import ALONE, Processes


@torch.no_grad()
def evaluate(
    model: TitansLM, batches: Batches, config: RunConfig, in_bytes: bool, here: Processes = ALONE
) -> dict[str, float]:
    """Metrics over `eval_batches` batches, each a window of all its segments.

    Task text: `valid_loss` in nats per token, and bits per byte (the end of a document counts as
    a byte) or perplexity. The other tasks: the training loss, and the shares of the answers'
    tokens and of whole answers recalled, each token after the true ones before it. The same on
    every process, of whom each reads its share.
    """
    device = next(model.parameters()).device
    segments = config.data.segments
    loss, tokens = 0.0, 0
    recalled: list[torch.Tensor] = []
    memory = None
    for number in range(config.train.eval_batches * segments):
        batch = batches.batch(number)
        if number % segments == 0:
            memory = None
        own = Batch(*(column.to(device) for column in here.share(batch)))
        segment = read_segment(model, own, memory, config.train.precision)
        memory = segment.state
        if config.data.task != "text":
            loss += float((segment.nll * own.weights).sum())
            hits = segment.likeliest == own.labels
            recalled.append(recall(here.whole(hits), batch.answers))
        else:
            loss += float(segment.nll.double().sum())
            tokens += int((own.weights > 0).sum())
    loss, count = here.total(loss, float(tokens))
    if config.data.task != "text":
        right, asked = torch.stack(recalled).sum(0).T
        return {
            "valid_loss": loss / config.train.eval_batches,
            "valid_token_recall": (right[0] / asked[0]).item(),
            "valid_answer_recall": (right[1] / asked[1]).item(),
        }
    loss /= max(count, 1)
    if in_bytes:
        return {"valid_loss": loss, "valid_bits_per_byte": loss / math.log(2.0)}
    return {"valid_loss": loss, "valid_perplexity": math.exp(min(loss, 700.0))}


def recall(hits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """hits, answers: (B, T) bool; an answer is an unbroken run of `answers`.

    [[tokens right, tokens], [answers right, answers]], float64.
    """
    first = answers.clone()
    first[:, 1:] &= ~answers[:, :-1]
    count = int(first.sum())
    owner = first.flatten().cumsum(0)[answers.flatten()] - 1  # of each token of an answer
    wrong = torch.zeros(count).index_add_(0, owner, (~hits[answers]).float())
    return torch.tensor(
        [[hits[answers].sum(), answers.sum()], [(wrong == 0).sum(), count]], dtype=torch.float64
    )
