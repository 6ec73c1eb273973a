"""Text to token ids and back: raw UTF-8 bytes, or a byte-pair encoding from a `tokenizer.json`."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt8

END_OF_TEXT = "<|endoftext|>"
# Letters and digits of codes such as 9f0d: a digit stands further on in the word or right before.
CODES = r"[\p{L}\p{N}](?=\p{L}*\p{N})|(?<=\p{N})[\p{L}\p{N}]|\p{N}"
# After a line end between two visible characters: no usual pre-tokenizer has a word there.
LINE = r"(?<=\S\n)(?=\S)"
_WHOLE_LINES = re.compile(f".*{LINE}", re.DOTALL)


@runtime_checkable
class Tokenizer(Protocol):
    """What the package asks of a tokenizer; a class of your own with these members will do."""

    name: str
    """What `load_tokenizer` turns back into this tokenizer."""
    vocab_size: int
    """Every id is below this number, `end_of_document` included."""
    end_of_document: int
    """The id that closes a document; `encode` never produces it, whatever the text says."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end of document."""
        ...

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of `ids`; ends of documents are dropped."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens: ids 0..255, and 256 for the end of a document."""

    def __init__(self) -> None:
        self.name = "bytes"
        self.vocab_size = 257
        self.end_of_document = 256

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(text.encode("utf-8"))

    def encode_array(self, text: str) -> UInt8[np.ndarray, "bytes"]:
        """`encode` as a read-only array, without a Python object per byte."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ends of documents vanish.

        Raises ValueError for an id outside 0..256.
        """
        array = np.fromiter(ids, dtype=np.int64)
        wrong = array[(array < 0) | (array > self.end_of_document)]
        if wrong.size:
            raise ValueError(f"expected byte ids in 0..{self.end_of_document}, got {wrong[0]}")
        kept = array[array != self.end_of_document]
        return kept.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class BPETokenizer:
    """A Hugging Face `tokenizers` file, with `<|endoftext|>` as the end of a document."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """Wraps a `tokenizers.Tokenizer`; `name` is the path it came from."""
        end_of_document = tokenizer.token_to_id(END_OF_TEXT)
        if end_of_document is None:
            raise ValueError(f"{name}: expected a token {END_OF_TEXT!r} in the vocabulary")
        # A text that spells a special token out must not be able to end its own document.
        tokenizer.encode_special_tokens = True
        # Files made for a fixed-length model carry these, and would cut documents short.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.name = name
        # Not the number of entries: a vocabulary may have gaps.
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.end_of_document: int = end_of_document

    @property
    def rules(self) -> str:
        """Vocabulary, merges and all that surrounds them, as JSON."""
        return self._tokenizer.to_str()

    @classmethod
    def from_file(cls, path: str | Path) -> "BPETokenizer":
        """Reads a `tokenizer.json`; ValueError where there is none or it is something else."""
        library = _library()
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such tokenizer file")
        try:
            tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizers JSON file ({error})") from error
        return cls(tokenizer, str(path))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        path: str | Path,
        isolate: str | None = None,
    ) -> "BPETokenizer":
        """Learns a byte-level BPE from `texts` and writes it to `path`.

        Any text round-trips, since all 256 bytes are in the vocabulary. A small corpus can yield
        fewer than `vocab_size` tokens; the result's `vocab_size` says how many there are. What the
        regular expression `isolate` matches (`CODES`, say) shares no token with what is around it,
        not even the space before it. The folder of `path` must exist.
        """
        library = _library()
        if vocab_size < 257:
            raise ValueError(
                f"expected vocab_size >= 257 (256 bytes and {END_OF_TEXT}), got {vocab_size}"
            )
        if not Path(path).parent.is_dir():
            raise ValueError(f"{path}: its folder does not exist")
        tokenizer = library.Tokenizer(library.models.BPE())
        pieces = library.pre_tokenizers
        words = pieces.ByteLevel(add_prefix_space=False)
        if isolate is None:
            tokenizer.pre_tokenizer = words
        else:
            apart = pieces.Split(library.Regex(isolate), "isolated")
            tokenizer.pre_tokenizer = pieces.Sequence([apart, words])
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        beside = f"{path}.{os.getpid()}"  # then renamed: another process may learn the same
        tokenizer.save(beside)
        os.replace(beside, path)
        return cls(tokenizer, str(path))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; special tokens spelled out in it are encoded as ordinary text."""
        try:
            # A batch of one: unlike `encode`, it lets other threads run.
            (encoded,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return encoded.ids
        except TypeError:
            text.encode("utf-8")  # half of a surrogate pair is the error that bytes have for it
            raise

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of `ids`; ends of documents vanish."""
        kept = [int(i) for i in ids if i != self.end_of_document]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


@runtime_checkable
class Trained(Protocol):
    """A `TitansLM`, as far as its tokens go. tokenizer: the identity of the one it was trained
    with, None where that is not known."""

    config: Any
    tokenizer: str | None


def tokenizer_of(model: Trained, tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer for a model; None is that of bytes.

    ValueError for another one than it was trained with, and for one with more tokens than the
    model; where it is not known, also for one with fewer than half of them.
    """
    tokenizer, vocab_size = tokenizer or ByteTokenizer(), model.config.vocab_size
    most = 2 * tokenizer.vocab_size if model.tokenizer is None else vocab_size
    if not tokenizer.vocab_size <= vocab_size <= most:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model "
            f"{vocab_size}: name the one it was trained with"
        )
    check_tokenizer("the model", model.tokenizer, tokenizer)
    return tokenizer


def check_tokenizer(name: str, known: str | None, tokenizer: Tokenizer) -> None:
    """ValueError for another tokenizer than the one that a model is known to have been trained
    with."""
    given = tokenizer_identity(tokenizer)
    if known not in (None, given):
        raise ValueError(f"{name} was trained with the tokenizer {known}, this one is {given}")


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer called "bytes", or the one in a `tokenizer.json` file."""
    if str(name_or_path) == "bytes":
        return ByteTokenizer()
    if not Path(name_or_path).is_file():
        raise ValueError(
            f"expected the tokenizer 'bytes' or the path of a tokenizer.json, got '{name_or_path}'"
        )
    return BPETokenizer.from_file(name_or_path)


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that tokens are kept in: little-endian uint16 where the vocabulary fits."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encode(tokenizer: Tokenizer, text: str) -> Integer[np.ndarray, "tokens"]:
    """The ids of `text`, in `token_dtype`.

    Raises ValueError where the tokenizer gives an id outside its own vocabulary.
    """
    ids: np.ndarray
    if isinstance(tokenizer, ByteTokenizer):
        ids = tokenizer.encode_array(text)
    else:
        ids = np.array(tokenizer.encode(text), dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer.name!r}: expected ids in 0..{tokenizer.vocab_size - 1}, "
                f"got {ids.min()}..{ids.max()}"
            )
    return ids.astype(token_dtype(tokenizer.vocab_size), copy=False)


def encode_document(tokenizer: Tokenizer, text: str) -> Integer[np.ndarray, "tokens"]:
    """The ids of `text` followed by `end_of_document`, as `encode` has them."""
    ids = encode(tokenizer, text)
    return np.append(ids, ids.dtype.type(tokenizer.end_of_document))


AT_LINES, AT_SPACES = ("a\n", "b"), ("a", " b")  # where texts are cut that come in pieces


def check_cuts(tokenizer: Tokenizer, cuts: Iterable[tuple[str, str]]) -> None:
    """ValueError for one that gives a text other tokens where it is cut so: one that puts a space
    before the first word, say."""
    for first, second in cuts:
        whole = tokenizer.encode(first + second)
        if whole != [*tokenizer.encode(first), *tokenizer.encode(second)]:
            raise ValueError(
                f"tokenizer {tokenizer.name!r}: gives a text in pieces other tokens than "
                "the whole, as where it puts a space before the first word"
            )


def encode_blocks(
    tokenizer: Tokenizer, blocks: Iterable[tuple[str, bool]]
) -> Iterator[Integer[np.ndarray, "tokens"]]:
    """The ids of texts that come in blocks: (some of a text, does the text end with it?).

    Bytes may be cut anywhere. For other tokenizers a block is cut after its last line end that
    stands between two visible characters, where no usual pre-tokenizer has a word, and the rest
    waits for the next block. Raises ValueError for a tokenizer that cannot be cut there.
    """
    rest, checked = "", False
    for text, last in blocks:
        if isinstance(tokenizer, ByteTokenizer):
            yield tokenizer.encode_array(text)
            continue
        searched = max(len(rest) - 2, 0)
        text, rest = rest + text, ""
        if not last:
            lines = _WHOLE_LINES.match(text, searched)
            cut = lines.end() if lines else 0
            text, rest = text[:cut], text[cut:]
            if cut and not checked:
                check_cuts(tokenizer, (AT_LINES,))
                checked = True
        if text:
            yield np.array(tokenizer.encode(text), dtype=np.int64)


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """Names what the ids mean: "bytes", or a hash of the vocabulary and of how text is cut."""
    return identity_of(tokenizer.rules) if isinstance(tokenizer, BPETokenizer) else tokenizer.name


def identity_of(content: str) -> str:
    """That hash of a `tokenizer.json`, whichever way a release of `tokenizers` writes merges."""
    rules = json.loads(content)
    model = rules.get("model") or {}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", ())]
    added = [(token["id"], token["content"]) for token in rules.get("added_tokens", ())]
    cut = [rules.get("normalizer"), rules.get("pre_tokenizer")]
    cut += [model[name] for name in ("type", "ignore_merges", "byte_fallback") if model.get(name)]
    meaning = json.dumps([model.get("vocab"), merges, added, cut], sort_keys=True)
    return f"sha256:{hashlib.sha256(meaning.encode()).hexdigest()[:16]}"


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("a BPE tokenizer needs `pip install -e '.[text]'`") from error
    return tokenizers
