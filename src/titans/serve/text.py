"""Text to tokens while it arrives, and tokens to text while they are drawn."""

import codecs
import re
from collections.abc import Sequence

import numpy as np

from titans.data.tokenizers import ByteTokenizer, Tokenizer

# A byte-pair encoding may be cut before a space that follows a word: its words begin with one.
CUT = re.compile(r"(?<=\S) (?=\S)")
LONGEST_WORD = 2**16
REPLACEMENT = "\ufffd"
CHARACTER = 8  # tokens: none is spread over more


class Encoder:
    """Feed it the bytes of a UTF-8 text in any pieces; it gives the tokens of the whole text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.bytes_seen = 0
        self.held = ""

    def feed(self, chunk: bytes, last: bool = False) -> np.ndarray:
        """Tokens that are certain by now, (n,) int64. ValueError where it is not UTF-8."""
        try:
            text = self.decoder.decode(chunk, last)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the text is not UTF-8: {error.reason} within the first "
                f"{self.bytes_seen + len(chunk):,} bytes"
            ) from None
        self.bytes_seen += len(chunk)
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.tokenizer.encode_array(text).astype(np.int64)
        self.held += text
        ready, self.held = (self.held, "") if last else self._cut()
        return np.array(self.tokenizer.encode(ready), dtype=np.int64)

    def _cut(self) -> tuple[str, str]:
        places = [match.start() for match in CUT.finditer(self.held)]
        if places:
            return self.held[: places[-1]], self.held[places[-1] :]
        return (self.held, "") if len(self.held) > LONGEST_WORD else ("", self.held)


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
