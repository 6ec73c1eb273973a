"""python -m titans, and `torchrun ... -m titans`."""

from titans.cli import main

if __name__ == "__main__":
    main()
