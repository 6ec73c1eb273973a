"""Train a small MAG on your own text from Python: `python train_on_your_text.py FILE...`.

`titans train CONFIG.toml` does the same with checkpoints, resume and evaluation.
"""

import sys

import torch
import torch.nn.functional as F

import titans
from titans.data.text import TextWindows, from_files
from titans.data.tokenizers import ByteTokenizer


def main(paths: list[str], steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    batches = TextWindows(
        from_files(paths, ByteTokenizer()), length=128, batch_size=4, seed=0, segments=2
    )
    model = titans.TitansLM(titans.preset("mag-tiny"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        tokens, labels = batches.batch(step)
        state = None
        # Two segments of one document: the memory is carried over, the graph is not.
        for piece, wanted in zip(tokens.split(128, 1), labels.split(128, 1), strict=True):
            logits, state = model(piece, state)
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = state.detach()
            losses.append(loss.item())
        print(f"step {step}: {losses[-1]:.3f} nats per byte")
    return losses


if __name__ == "__main__":
    main(sys.argv[1:] or [__file__, titans.__file__])
