"""Read a text in one stream, save what is remembered, fork it, and go on in two ways.

The model is untrained (a trained one loads with `titans.load(path)`): what this shows is that
a memory is a value. The pieces a text is cut into, a file, or a fork change nothing.
"""

import tempfile
from pathlib import Path

import torch

import titans

torch.manual_seed(0)
model = titans.TitansLM(titans.preset("mac-tiny")).eval()
text = torch.tensor([list(b"The memory of this model is a value: it can be kept, copied, sent. ")])

with torch.inference_mode():
    logits, state = model(text[:, :40])
    print(f"read {state.position} tokens, the memory is {state.nbytes:,} bytes")

    path = Path(tempfile.mkdtemp()) / "first.memory"
    state.save(path)
    again = titans.ModelState.load(path)

    here, _ = model(text[:, 40:], state)
    there, _ = model(text[:, 40:], again)
    assert torch.equal(here, there)

    fork = state.fork()
    _, left = model(torch.tensor([list(b"left")]), fork)
    _, right = model(torch.tensor([list(b"right")]), fork)
    print(f"one fork has read {left.position} tokens, the other {right.position}")

for reading in titans.stream(model, text[0], piece=16):
    print(f"{reading.state.position:3d} tokens, surprise {reading.surprise.mean():.3f}")
