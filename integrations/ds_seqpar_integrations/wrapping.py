"""One way to wrap a method of a host's class: once, with the original at hand, looking like the original."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["wrap"]


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replaces `owner.name` by `around(plain, *args, **kwargs)`. A second call for the same name changes nothing."""
    plain, static = getattr(owner, name), isinstance(inspect.getattr_static(owner, name), staticmethod)
    if getattr(plain, "_knows_ds_seqpar", False):
        return

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(plain, *args, **kwargs)

    wrapped._knows_ds_seqpar = True  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)
