"""`titans` as lm-evaluation-harness sees it: text in, log-probabilities and text out.

What differs from its transformers model: a document is read as one stream, in constant memory, and
its memory is never reset; what choices share is read once. The first token of a document is
scored too, as the harness wants it: after an end of document, which training had before it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

try:
    import lm_eval.models  # noqa: F401  # its own names, which it reads into an empty registry only
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        "lm-evaluation-harness is not installed: `pip install -e '.[eval]'`"
    ) from error

from titans.data.choices import Item, Option
from titans.data.tokenizers import Tokenizer, encode, load_tokenizer, tokenizer_of
from titans.data.told import Until, tell
from titans.evals.commonsense import EncodedOption, encode_item, likelihoods
from titans.evals.harness.until import parse_until
from titans.evals.perplexity import read_together
from titans.generate import PIECE
from titans.models.lm import TitansLM, load


@register_model("titans")
class HarnessLM(LM):
    """`--model titans --model_args checkpoint=model.safetensors,tokenizer=tokenizer.json`."""

    def __init__(
        self,
        checkpoint: str | Path | TitansLM,
        tokenizer: str | Path | Tokenizer = "bytes",
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        write: bool = True,
        max_batch_size: int | None = None,
    ) -> None:
        """checkpoint: a model, or its file. tokenizer: one, "bytes", or a `tokenizer.json`.
        batch_size: documents or prompts read side by side. write=False: memories are only read.
        max_batch_size: of lm-eval's automatic sizes, which there are none of.

        Raises ValueError for a batch size that is no number, and for a tokenizer that is not the
        model's.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of at least 1, got {batch_size!r}")
        model = checkpoint if isinstance(checkpoint, TitansLM) else load(checkpoint)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # lm-eval's command says cuda:0 where the user says nothing
        self.model = model if device is None else model.to(device)
        given = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        self.text = tokenizer_of(self.model, given)
        self.rows, self.write = int(batch_size), write
        self._device = next(self.model.parameters()).device

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p in nats, and whether greedy decoding says it."""
        members: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            members.setdefault(request.args[0], []).append(index)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for context, indices in tqdm(members.items(), "contexts", disable=disable_tqdm or None):
            options = self.encode_options(context, [requests[i].args[1] for i in indices])
            likely = likelihoods(self.model, options, self.write, self.rows)
            for index, one in zip(indices, likely, strict=True):
                found[index] = (one.log, one.greedy)
                self.cache_hook.add_partial("loglikelihood", requests[index].args, found[index])
        return found

    def encode_options(self, context: str, answers: Sequence[str]) -> list[EncodedOption]:
        """White space at a context's end goes to the continuations, where a tokenizer has it. No
        context is an end of document."""
        if not all(answers):
            raise ValueError(f"a continuation of {context[-60:]!r} is empty: expected text")
        before = context.rstrip()
        space = context[len(before) :]
        item = Item(tuple(Option(before, space + answer) for answer in answers), 0)
        options = encode_item(self.text, item)
        return [o._replace(context=o.context or (self.text.end_of_document,)) for o in options]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each text, in nats: every token after all that stands before it."""
        found = [0.0] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].args[0]), reverse=True)
        for indices in tqdm(batches(order, self.rows), "documents", disable=disable_tqdm or None):
            documents = [
                np.append(self.text.end_of_document, encode(self.text, requests[i].args[0]))
                for i in indices
            ]
            losses = torch.zeros(len(documents), dtype=torch.float64)
            for part in read_together(self.model, documents, piece=PIECE, write=self.write):
                losses[part.rows] += part.nll.double().nansum(1)  # NaN: the end of document
            for index, loss in zip(indices, losses.tolist(), strict=True):
                found[index] = -loss
                self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, -loss)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What each (context, settings) goes on with; for the settings see `parse_until`.

        Prompts of one length and the same settings run side by side.
        """
        wanted = [parse_until(request.args[1]) for request in requests]
        prompts = [
            tuple(self.text.encode(request.args[0])) or (self.text.end_of_document,)
            for request in requests
        ]
        # Drawn in the order of the requests: texts depend on lm-eval's seed, not on the batches.
        seeds = torch.randint(2**62, (len(requests),)).tolist()
        alike: dict[tuple[Until, int], list[int]] = {}
        for index, (until, prompt) in enumerate(zip(wanted, prompts, strict=True)):
            alike.setdefault((until, len(prompt)), []).append(index)
        found = [""] * len(requests)
        for (until, _), group in tqdm(alike.items(), "prompts", disable=disable_tqdm or None):
            for indices in batches(group, self.rows):
                texts = tell(
                    self.model,
                    self.text,
                    [prompts[i] for i in indices],
                    until,
                    seeds=[seeds[i] for i in indices],
                    write=self.write,
                )
                for index, (text, _) in zip(indices, texts, strict=True):
                    found[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return found


def batches(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
