"""What memories write of held-out books, and of nothing else."""

import pytest
import torch

import titans
from titans.data.tokenizers import ByteTokenizer
from titans.evals.written import written
from titans.inspect import writes


def test_the_held_out_books_are_read_as_haystacks_are(tmp_path) -> None:
    torch.manual_seed(0)
    model = titans.TitansLM(titans.TitansConfig(variant="lmm", dim=32, layers=2, heads=2))
    (tmp_path / "austen-persuasion.txt").write_text("It rained.\nIt did not stop. " * 30)
    (tmp_path / "melville.txt").write_text("Call me. " * 100)
    (found, second) = written(model, ByteTokenizer(), [tmp_path], tokens=500)
    tokens = torch.tensor([list(("It rained. It did not stop. " * 30).encode()[:500])])
    expected, _ = writes(model, tokens)
    assert found.tokens == second.tokens == 500
    assert found.total == pytest.approx(expected.total, rel=1e-4)
    assert [w.position for w in found.strongest] == [w.position for w in expected.strongest]
    (whole, _) = written(model, ByteTokenizer(), [tmp_path])
    assert whole.tokens == 28 * 30
    with pytest.raises(ValueError, match="no such file or folder"):
        written(model, ByteTokenizer(), [tmp_path / "none"])
