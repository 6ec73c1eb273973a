"""Tokens to text while they are drawn, up to the first string that ends it."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from titans.data.tokenizers import ByteTokenizer, Tokenizer
from titans.generate import Sampling, check_prompts, continue_prompts, seeds_of
from titans.models.lm import TitansLM
from titans.state import ModelState

REPLACEMENT = "\ufffd"
CHARACTER = 8  # tokens: none is spread over more


class Decoder:
    """Feed it tokens one by one; what it returns joins to the text of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.ids: list[int] = []  # one that was told, as some decoders drop a first space, and new
        self.told = ""

    def feed(self, token: int) -> str:
        """What the token adds; nothing while a character is incomplete."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.utf8.decode(bytes([token]) if token < 256 else b"")
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith(REPLACEMENT) and len(self.ids) <= CHARACTER:
            return ""
        new = text[len(self.told) :]
        self.ids, self.told = [token], self.tokenizer.decode([token])
        return new

    def finish(self) -> str:
        """What an incomplete end adds."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.utf8.decode(b"", final=True)
        return self.tokenizer.decode(self.ids)[len(self.told) :]


class Stops:
    """Ends a text before the first of some strings, holding back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""
        self.hit = False

    def feed(self, text: str, last: bool = False) -> str:
        """What may be shown by now."""
        if self.hit:
            return ""
        self.held += text
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.hit = True
            return self.held[: min(places)]
        keep = 0 if last else max((self._overlap(stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of what is held that begins `stop`."""
        sizes = range(min(len(stop) - 1, len(self.held)), 0, -1)
        return next((n for n in sizes if stop.startswith(self.held[-n:])), 0)


@dataclass(frozen=True, kw_only=True)
class Until:
    """How a text is told. stop: strings that end it and are not part of it."""

    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)


class Told(NamedTuple):
    """text: without what ended it. tokens: how many were drawn."""

    text: str
    tokens: int


@torch.inference_mode()
def tell(
    model: TitansLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    until: Until,
    *,
    seeds: Sequence[int] | None = None,
    state: ModelState | None = None,
    write: bool = True,
) -> list[Told]:
    """What follows prompts, as text; an end of document ends a text too.

    seeds: of the prompts, by default as `Sampling.seed` has them; a text does not depend on the
    other prompts. state: as in `generate`. write=False: memories are only read, also of what is
    told. Raises ValueError as `generate` does.
    """
    check_prompts(prompts, until.max_tokens)
    seeds = seeds_of(until.sampling, prompts) if seeds is None else seeds
    decoders = [Decoder(tokenizer) for _ in prompts]
    stops = [Stops(until.stop) for _ in prompts]
    texts, counts = [""] * len(prompts), [0] * len(prompts)

    def take(index: int, token: int) -> bool:
        counts[index] += 1
        if token == tokenizer.end_of_document:
            return False
        texts[index] += stops[index].feed(decoders[index].feed(token))
        return not stops[index].hit

    continue_prompts(
        model,
        prompts,
        until.max_tokens,
        until.sampling,
        seeds,
        take,
        state=state,
        vocabulary=tokenizer.vocab_size,  # a model's may be padded, and the rest cannot be said
        write=write,
    )
    ends = [s.feed(d.finish(), last=True) for s, d in zip(stops, decoders, strict=True)]
    return [Told(text + end, n) for text, end, n in zip(texts, ends, counts, strict=True)]
