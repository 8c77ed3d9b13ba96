"""Modules that handles go through: their hooks see the tensors that the handles are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .handles import Handle
from .logits import ShardedLogits
from .token_handles import TokenShard

__all__ = ["HidesHandles", "Passage", "Path", "map_tensors"]

Path = tuple[Any, ...]


class HidesHandles:
    """A module whose outputs are handles to its caller, but to its hooks the tensors that they are made of."""

    _handles: dict[Path, Handle] | None = None  # of the call that is running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Output tensors that were handles inside are handles again."""
        handles: dict[Path, Handle] = {}
        outer, self._handles = self._handles, handles
        try:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._handles = outer
        return map_tensors(output, lambda path, x: handles[path].over(x) if path in handles else x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward; handles leave as the tensors they are made of, for the hooks.

        A caller that takes `forward` itself gets what a call returns.
        """
        handles = self._handles
        if handles is None:
            return self(*args, **kwargs)

        def plain(path: Path, x: Tensor) -> Tensor:
            if not isinstance(x, Handle):
                return x
            if not x.is_untouched():
                return x.materialise("output")
            handles[path] = x
            return x.source

        return map_tensors(super().forward(*args, **kwargs), plain)  # type: ignore[misc]


class Passage(HidesHandles):
    """A module that handles go through: an encoder around its layers, a head around its linears.

    To its hooks the inputs and outputs are the tensors that they are made of; to its own code and its caller they are handles.
    """

    _given: dict[Path, Handle] | None = None  # to the call that is running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        given: dict[Path, Handle] = {}

        def plain(path: Path, x: Tensor) -> Tensor:
            if not isinstance(x, TokenShard | ShardedLogits):
                return x
            if not x.is_untouched():
                return x.materialise(type(self).__name__)
            given[path] = x
            return x.source

        args, kwargs = map_tensors(args, plain), map_tensors(kwargs, plain, ("keyword",))
        outer, self._given = self._given, given
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._given = outer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, on handles again."""
        given = self._given or {}

        def as_given(path: Path, x: Tensor) -> Tensor:
            return given[path].over(x) if path in given else x

        return super().forward(*map_tensors(args, as_given), **map_tensors(kwargs, as_given, ("keyword",)))


def map_tensors(output: Any, change: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """`output` (tensor, tuple, list or ModelOutput) with its tensors changed; mappings are changed in place."""
    if isinstance(output, Tensor):
        return change(path, output)
    if isinstance(output, dict):
        for key, value in list(output.items()):
            changed = map_tensors(value, change, (*path, key))
            if changed is not value:
                output[key] = changed
        return output
    if type(output) in (tuple, list):
        return type(output)(map_tensors(x, change, (*path, i)) for i, x in enumerate(output))
    return output
