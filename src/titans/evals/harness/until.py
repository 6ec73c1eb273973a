"""Text that ends where a string ends it, whatever tokens spell that string."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from titans.data.tokenizers import Tokenizer
from titans.data.told import Decoder, Stops
from titans.generate import Sampling, prefill, sample, select_rows
from titans.models.lm import TitansLM

MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
FILTERS = ("top_k", "top_p", "min_p")
GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Until:
    """How a text is generated. stop: strings that end it and are not part of it."""

    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    sampling: Sampling = GREEDY

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Until":
        """From a task's `generation_kwargs`: `until`, `max_gen_toks` (or one of its other
        names), `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`.

        Greedy unless `do_sample` or a temperature above 0 says otherwise; `do_sample: false`
        decides over a temperature. ValueError for anything else that would change the text.
        """
        unknown = sorted(set(given) - {"until", "do_sample", "temperature", *MAX_TOKENS, *FILTERS})
        if unknown:
            raise ValueError(
                f"generation setting {unknown[0]!r} is not supported: expected until, do_sample, "
                f"temperature, {', '.join(FILTERS)} or {MAX_TOKENS[0]}"
            )
        until = given.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        limits = [given[name] for name in MAX_TOKENS if given.get(name) is not None]
        limit = int(limits[0]) if limits else cls.max_tokens
        if limit < 1:
            raise ValueError(f"{MAX_TOKENS[0]} must be at least 1, got {limit}")
        temperature = given.get("temperature")
        if given.get("do_sample", bool(temperature)):
            filters = {name: given[name] for name in FILTERS if given.get(name) is not None}
            warmth = 1.0 if temperature is None else float(temperature)
            sampling = Sampling(temperature=warmth, **filters)
        else:
            sampling = GREEDY
        return cls(stop=tuple(s for s in stop if s), max_tokens=limit, sampling=sampling)


@torch.inference_mode()
def continuations(
    model: TitansLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    until: Until,
    seeds: Sequence[int],
    write: bool = True,
) -> list[str]:
    """What follows prompts of one length, read side by side; an end of document ends a text too.

    A row draws from its own seed: its text does not depend on the other rows. write=False:
    memories are only read, also of what is generated.
    """
    device = next(model.parameters()).device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    decoders = [Decoder(tokenizer) for _ in prompts]
    stops = [Stops(until.stop) for _ in prompts]
    texts = [""] * len(prompts)
    rows = list(range(len(prompts)))
    logits, state = prefill(model, torch.tensor(prompts, device=device), None, write)
    for count in range(1, until.max_tokens + 1):
        # A vocabulary may be padded; what the tokenizer does not know cannot be said.
        known = logits[:, : tokenizer.vocab_size]
        drawn = sample(known, until.sampling, [generators[row] for row in rows])
        going = []
        for place, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            if token != tokenizer.end_of_document:
                texts[row] += stops[row].feed(decoders[row].feed(token))
                if not stops[row].hit:
                    going.append(place)
        if not going or count == until.max_tokens:
            break
        if len(going) < len(rows):
            state, drawn = select_rows(state, going, len(rows)), drawn[going]
            rows = [rows[place] for place in going]
        output, state = model(drawn[:, None], state, write)
        logits = output[:, -1]
    ends = [s.feed(d.finish(), last=True) for s, d in zip(stops, decoders, strict=True)]
    return [text + end for text, end in zip(texts, ends, strict=True)]
