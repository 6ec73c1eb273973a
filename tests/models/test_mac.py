"""MAC from the paper's equations (v1 eq. 21-25), written out segment by segment."""

import math
from dataclasses import replace

import pytest
import torch
from cases import assert_same
from einops import rearrange

from titans import MemoryConfig, TitansConfig
from titans.layers.attention import rotate
from titans.models.mac import MACMixer
from titans.ops import read_memory

SEGMENT, HEADS, DIM, PREFIX = 6, 2, 16, 3


def made(stride, depth):
    torch.manual_seed(0)
    deep = {"residual": True, "norm": True, "chunk_size": 4} if depth > 1 else {}
    memory = MemoryConfig(heads=2, depth=depth, expansion=2, momentum=True, **deep)
    config = TitansConfig(
        variant="mac",
        dim=DIM,
        heads=HEADS,
        segment=SEGMENT,
        memory_token_stride=stride,
        persistent=PREFIX,
        memory=memory,
    )
    mixer = MACMixer(config).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.2 * torch.randn_like(p)
    return mixer


def attend(mixer, x, h, owners):
    """Softmax of every token over [persistent || h || segment], the prefix without a position."""
    attention, base = mixer.attention, mixer.attention.rope_base

    def heads(tokens):
        return rearrange(attention.qkv(tokens), "b t (n h d) -> n b h t d", n=3, h=HEADS)

    q, k, v = heads(x)
    _, hk, hv = heads(h)
    _, pk, pv = heads(mixer.persistent(x.shape[0]))
    rows = []
    for i in range(x.shape[1]):
        place = torch.tensor([i])
        turned = rotate(q[:, :, i : i + 1], place, base)
        scores, values = [q[:, :, i : i + 1] @ pk.mT], [pv]
        for keys, content, positions in ((hk, hv, owners), (k, v, range(x.shape[1]))):
            for j, position in enumerate(positions):
                if position <= i:
                    key = rotate(keys[:, :, j : j + 1], torch.tensor([position]), base)
                    scores.append(turned @ key.mT)
                    values.append(content[:, :, j : j + 1])
        weights = (torch.cat(scores, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        rows.append(weights @ torch.cat(values, 2))
    return attention.output(rearrange(torch.cat(rows, 2), "b h t d -> b t (h d)"))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("length", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 2])
def test_mac_is_its_equations(length, stride, depth):
    mixer = made(stride, depth)
    x = torch.randn(2, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, state, _ = mixer(x, mixer.init_state(2))

    memory = mixer.memory
    queries, _ = memory.recall_queries(x, memory.init_recall_tail(2))
    past, outputs = memory.init_state(2), []
    for begin in range(0, length, SEGMENT):
        part = slice(begin, min(begin + SEGMENT, length))
        read = read_memory(queries[:, part], past.rule.weights, memory.network, memory.anchor())
        h = memory.emit(read, memory.opening(x[:, part]))  # eq. 21
        owners = range(0, x[:, part].shape[1], stride)
        attended = x[:, part] + attend(mixer, x[:, part], h[:, ::stride], owners)  # eq. 22-23
        m, past = memory(attended, past)  # eq. 24
        outputs.append(mixer.output(mixer.combine(attended, m)))  # eq. 25
    assert_same({"y": y}, {"y": torch.cat(outputs, 1)})
    assert_same(state.memory.tensors(), past.tensors())


def test_a_state_with_another_tail_is_refused():
    mixer = made(1, 1)
    state = replace(mixer.init_state(3), tail=torch.zeros(1, 1, DIM, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"tail of queries must be \(3, 3, 16\), got \(1, 1, 16\)"):
        mixer(torch.zeros(3, 4, DIM, dtype=torch.float64), state)
