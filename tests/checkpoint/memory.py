"""What the kernel counted for this process: memory at its peak, bytes read."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

__all__ = ["bytes_read", "peak_growth"]


def peak_growth(work: Callable[[], object]) -> int:
    """By how many bytes the resident memory rose above its start, at most, during `work`."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back to the kernel at once, and is not counted twice
    libc.malloc_trim(0)  # what was freed before must not hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def bytes_read() -> int:
    """Bytes that this process asked of read calls so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
