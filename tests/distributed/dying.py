"""`titans train` as torchrun starts it, but process 1 is killed before step 7, the first time."""

import os
import signal
import sys
from typing import Any

from titans.cli import main
from titans.train import loop

take_step = loop.take_step


def take_step_or_die(training: Any, *arguments: Any) -> Any:
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and training.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(training, *arguments)


if __name__ == "__main__":
    loop.take_step = take_step_or_die
    main(sys.argv[1:])
