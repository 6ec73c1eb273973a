"""Share a compiled call among torch's number of threads."""

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import torch


def share(function: Any, call: ctypes.Structure, count: int, enough: bool) -> None:
    """`function(&call, first, last)` for items 0 ... count - 1, in ranges side by side.

    enough: is there work for more than one thread? Raises MemoryError if the function fails.
    """
    function.argtypes = (ctypes.POINTER(type(call)), ctypes.c_int64, ctypes.c_int64)
    threads = min(torch.get_num_threads(), count) if enough else 1
    if threads <= 1:
        failed = function(call, 0, count)
    else:
        edges = [count * i // threads for i in range(threads + 1)]
        pool = workers(threads, os.getpid())
        futures: list[Future[int]] = []
        try:
            for edge in pairwise(edges):
                futures.append(pool.submit(function, call, *edge))
            failed = any([future.result() for future in futures])
        finally:
            outlast(futures)
    if failed:
        raise MemoryError("the compiled memory found no memory to work in")


def outlast(futures: Sequence[Future[int]]) -> None:
    """Wait, also through interrupts: the tensors must stay while a thread writes to them."""
    interrupt = None
    while not all(future.done() for future in futures):
        try:
            wait(futures)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@functools.cache
def workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork: every process has its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="titans")
