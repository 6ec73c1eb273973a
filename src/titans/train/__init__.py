"""Training: `train(config, folder)` in `loop.py`, and what it is made of."""
