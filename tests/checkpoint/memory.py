"""What the kernel counted for this process: memory at its peak, bytes read."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["bytes_read", "peak_growth"]


def peak_growth(work: Callable[[], object]) -> int:
    """By how many bytes the anonymous memory in use rose above its start, at most, during `work`; looked at every few milliseconds.

    The kernel's own high-water mark counts mapped files too, which come and go with the memory of other processes. What was
    freed but is kept by malloc for later is given back before each look.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: most of what is freed goes back to the kernel at once
    libc.malloc_trim(0)  # what was freed before must not hide what is taken now
    before = peak = _anonymous()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            libc.malloc_trim(0)
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
    return max(peak, _anonymous()) - before


def bytes_read() -> int:
    """Bytes that this process asked of read calls so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
