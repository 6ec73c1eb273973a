"""Perplexity: equal to one plain forward pass, whatever the pieces, and split up by position."""

import dataclasses
import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from titans import MemoryConfig, TitansConfig, TitansLM
from titans.evals.perplexity import PerplexityConfig, Positions, perplexity, plot_positions
from titans.state import NonFiniteError

TEXTS = [
    "Ein Bär aß Öl. " * 20,
    "short",
    "some other text, in plain letters\n" * 16,
]
END = 256


def build(variant: str = "mal") -> TitansLM:
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant,
        dim=16,
        layers=2,
        ffn_hidden=24,
        window=7,
        segment=25,
        persistent=2,
        memory=MemoryConfig(heads=2),
    )
    model = TitansLM(config).double()
    with torch.no_grad():  # predictions that differ from token to token
        model.embedding.weight.normal_()
    return model


@pytest.fixture
def files(tmp_path):
    paths = []
    for number, text in enumerate(TEXTS):
        path = tmp_path / f"{number}.txt"
        path.write_text(text, encoding="utf-8")
        paths.append(str(path))
    return tuple(paths)


def plain_loss(model: TitansLM, tokens: list[int], write: bool = True) -> torch.Tensor:
    """Of tokens 1, 2, ... in one forward pass."""
    row = torch.tensor([tokens])
    with torch.no_grad():
        logits, _ = model(row[:, :-1], None, write)
    return cross_entropy(logits[0], row[0, 1:], reduction="none")


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
@pytest.mark.parametrize("write", [True, False])
def test_it_is_one_forward_pass(variant: str, write: bool, files) -> None:
    model = build(variant)
    result = perplexity(model, PerplexityConfig(paths=files[:1], piece=50, write=write))
    raw = list(TEXTS[0].encode())
    loss = plain_loss(model, raw, write)
    assert result.tokens == result.bytes == len(raw) - 1
    assert result.loss == pytest.approx(loss.mean().item(), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(loss.mean().item()), rel=1e-6)
    bits = loss.sum().item() / math.log(2) / (len(raw) - 1)
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-6)
    assert result.words == 80
    assert result.word_perplexity == pytest.approx(math.exp(loss.sum().item() / 80), rel=1e-5)


def test_what_the_memory_contributes_shows(files) -> None:
    config = PerplexityConfig(paths=files[:1])
    with_memory = perplexity(build(), config)
    without = perplexity(build(), dataclasses.replace(config, write=False))
    assert abs(with_memory.loss - without.loss) > 1e-4


@pytest.mark.parametrize("variant", ["mac", "mal"])
def test_pieces_and_rows_change_nothing(variant: str, files) -> None:
    """Also where documents of different lengths leave the batch one after the other."""
    model = build(variant)
    whole = perplexity(model, PerplexityConfig(paths=files))
    assert [d.tokens for d in whole.documents] == [len(t.encode()) - 1 for t in TEXTS]
    for rows, piece in [(1, 37), (3, 100)]:
        other = perplexity(model, PerplexityConfig(paths=files, rows=rows, piece=piece))
        for a, b in zip(whole.documents, other.documents, strict=True):
            assert (a.name, a.tokens, a.bytes) == (b.name, b.tokens, b.bytes)
            assert a.loss == pytest.approx(b.loss, rel=1e-6)
        for p, q in zip(whole.positions, other.positions, strict=True):
            assert p.tokens == q.tokens
            assert p.loss == pytest.approx(q.loss, rel=1e-6)


def test_position_buckets_are_the_mean_losses_of_their_tokens(files) -> None:
    model = build()
    result = perplexity(model, PerplexityConfig(paths=files))
    losses = [plain_loss(model, list(text.encode())) for text in TEXTS]
    edges = [(0, 256), (256, 512), (512, 1024)]
    assert [(p.begin, p.end) for p in result.positions] == edges
    for bucket, (begin, end) in zip(result.positions, edges, strict=True):
        # Token n of a document is the (n - 1)-th that is scored.
        inside = torch.cat([loss[max(begin - 1, 0) : end - 1] for loss in losses])
        assert bucket.tokens == len(inside)
        assert bucket.loss == pytest.approx(inside.mean().item(), rel=1e-6)
    total = sum(p.tokens * p.loss for p in result.positions)
    assert total == pytest.approx(result.loss * result.tokens, rel=1e-9)


def test_buckets_end_at_powers_of_two() -> None:
    positions = Positions()
    for at in (0, 255, 256, 511, 512, 1023, 1024, 2**20 - 1, 2**20):
        positions.add(at, torch.ones(1, 1))
    got = [(p.begin, p.end, p.tokens) for p in positions.buckets()]
    assert got == [
        (0, 256, 2),
        (256, 512, 2),
        (512, 1024, 2),
        (1024, 2048, 1),
        (2**19, 2**20, 1),
        (2**20, 2**21, 1),
    ]


def test_carried_over_all_documents_are_one_stream(files) -> None:
    """With an end of document between them, which is read and not scored."""
    model = build()
    result = perplexity(model, PerplexityConfig(paths=files, carry=True, piece=64))
    raw, ends = [], []
    for text in TEXTS:
        if raw:
            ends.append(len(raw))
            raw.append(END)
        raw += text.encode()
    loss = plain_loss(model, raw)
    scored = [i for i in range(1, len(raw)) if i not in ends]
    assert result.tokens == len(scored)
    assert result.loss == pytest.approx(loss[[i - 1 for i in scored]].mean().item(), rel=1e-6)
    last = [i for i in scored if 512 <= i < 1024]
    assert result.positions[2].tokens == len(last)
    assert result.positions[2].loss == pytest.approx(
        loss[[i - 1 for i in last]].mean().item(), rel=1e-6
    )


class Syllables:
    """Two letters a token, so that tokens are not bytes: id = position in a list of pairs."""

    name = "syllables"
    vocab_size = 200
    end_of_document = 199

    def __init__(self) -> None:
        self.known: list[str] = []

    def encode(self, text: str) -> list[int]:
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        self.known += [p for p in dict.fromkeys(pairs) if p not in self.known]
        return [self.known.index(p) for p in pairs]

    def decode(self, ids) -> str:
        return "".join(self.known[i] for i in ids)


def test_bits_per_byte_of_another_tokenizer_count_the_bytes_of_the_text(files) -> None:
    model = build()
    tokenizer = Syllables()
    result = perplexity(model, PerplexityConfig(paths=files[:1]), tokenizer)
    loss = plain_loss(model, tokenizer.encode(TEXTS[0])).sum().item()
    size = len(TEXTS[0].encode()) - len(TEXTS[0][:2].encode())  # its first token is not scored
    assert result.bytes == size > 1.5 * result.tokens
    assert result.bits_per_byte == pytest.approx(loss / math.log(2) / size, rel=1e-6)


def test_a_limit_on_the_tokens_of_a_document(files) -> None:
    model = build()
    result = perplexity(model, PerplexityConfig(paths=files, max_tokens=40))
    assert [d.tokens for d in result.documents] == [39, 4, 39]
    loss = plain_loss(model, list(TEXTS[2].encode())[:40])
    assert result.documents[2].loss == pytest.approx(loss.sum().item(), rel=1e-6)
    assert result.documents[2].words == len(TEXTS[2][:40].split())


def test_the_result_is_json_and_can_be_plotted(files, tmp_path) -> None:
    result = perplexity(build(), PerplexityConfig(paths=files))
    assert json.loads(json.dumps(dataclasses.asdict(result)))["tokens"] == result.tokens
    plot_positions({"mal": result.positions}, tmp_path / "positions.png")
    assert (tmp_path / "positions.png").stat().st_size > 1000


def test_a_damaged_model_has_no_perplexity(files) -> None:
    model = build()
    with torch.no_grad():
        model.embedding.weight[ord("l")] = float("nan")
    seen = []
    with pytest.raises(NonFiniteError, match="is not finite"):
        perplexity(model, PerplexityConfig(paths=files), watch=seen.append)
    assert seen == []


def test_a_document_is_told_as_soon_as_it_is_read(files) -> None:
    seen = []
    result = perplexity(build(), PerplexityConfig(paths=files), watch=seen.append)
    assert tuple(seen) == result.documents


def test_errors_are_one_line(tmp_path) -> None:
    model = build()
    lonely = tmp_path / "lonely.txt"
    lonely.write_text("x")
    with pytest.raises(ValueError, match="two tokens or more"):
        perplexity(model, PerplexityConfig(paths=(str(lonely),)))
    with pytest.raises(ValueError, match="no such file"):
        perplexity(model, PerplexityConfig(paths=(str(tmp_path / "absent.txt"),)))
    with pytest.raises(ValueError, match="paths is empty"):
        PerplexityConfig(paths=())
    with pytest.raises(ValueError, match="rows is 4"):
        PerplexityConfig(paths=("a",), carry=True, rows=4)
    with pytest.raises(ValueError, match="piece must be at least 1"):
        PerplexityConfig(paths=("a",), piece=0)
    big = Syllables()
    big.vocab_size = 300
    with pytest.raises(ValueError, match="tokenizer syllables has 300 tokens, the model 257"):
        perplexity(model, PerplexityConfig(paths=(str(lonely),)), big)
