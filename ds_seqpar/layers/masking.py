"""Whether a batch is packed, answered without asking the GPU where it is known.

Hugging Face's mask code looks for packed sequences in the position ids of every forward that has no attention mask. Its
question waits until the GPU's queue is empty, so each forward would start on an idle GPU. Where the caller gave no position
ids, the model counts 0, 1, 2, ... itself, and there is nothing to find.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["answer_known_positions", "positions_of_the_model"]

_MODULE, _NAME = "transformers.masking_utils", "find_packed_sequence_indices"
_running = threading.local()


@contextmanager
def positions_of_the_model() -> Iterator[None]:
    """While a forward runs, in this thread, whose position ids are the model's own consecutive ones."""
    before, _running.known = getattr(_running, "known", False), True
    try:
        yield
    finally:
        _running.known = before


def answer_known_positions() -> bool:
    """Puts the answer before Hugging Face's function, once; False where there is none. Forwards of other models ask as ever."""
    module = sys.modules.get(_MODULE)
    original = getattr(module, _NAME, None)
    if original is None or getattr(original, "_seqpar", False):
        return original is not None

    @functools.wraps(original)
    def answered(*args: Any, **kwargs: Any) -> Any:
        return None if getattr(_running, "known", False) else original(*args, **kwargs)

    answered._seqpar = True  # type: ignore[attr-defined]
    setattr(module, _NAME, answered)
    return True
