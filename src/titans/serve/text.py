"""Text to tokens while it arrives."""

import codecs
import re

import numpy as np

from titans.data.tokenizers import LINE, ByteTokenizer, Tokenizer

# A byte-pair encoding may also be cut before a space between words: they begin with one.
CUT = re.compile(rf"(?<=\S)(?= \S)|{LINE}")
LONGEST_WORD = 2**16


class Encoder:
    """Feed it the bytes of a UTF-8 text in any pieces; it gives the tokens of the whole text.

    Where a byte-pair encoding finds no place to cut in `LONGEST_WORD` characters, the end of a
    piece is one, and the tokens next to it can be others than those of the whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
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
