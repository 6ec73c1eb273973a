"""Stopping a run from outside without losing a step."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_PRESS_S = 1.0
"""A terminal's Ctrl-C reaches every process of a group, and is then handed on by their parents."""


class StopRequest:
    """Has someone asked the run to stop?"""

    def __init__(self) -> None:
        self.made = False


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within it SIGINT and SIGTERM are only noted; a second SIGINT acts as it used to.

    Not one within `SAME_PRESS_S` of the first signal: launchers hand on what the processes have
    had already, as torchrun does, and job schedulers stop both. A second SIGTERM is noted as well:
    who cannot wait sends SIGKILL.

    Python lets the main thread alone set handlers: in another one nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    first = math.inf

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if number == signal.SIGINT and time.monotonic() - first > SAME_PRESS_S:
            restore()
            signal.raise_signal(number)
        request.made, first = True, min(first, time.monotonic())

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
