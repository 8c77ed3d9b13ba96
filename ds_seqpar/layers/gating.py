"""The activation of a gated MLP, deferred until the row-parallel linear that takes its product with the other branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import is_plain
from .deferred import GatedActivation
from .region import ShardingState

__all__ = ["DeferredActivation"]


class DeferredActivation:
    """Put before an activation module that the kernels know (`act_name`): while training its result is a GatedActivation."""

    seqpar: ShardingState
    act_name: str

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x -> act(x), which is computed when it is needed; hooks of the module run then."""
        call = super().__call__  # type: ignore[misc]
        plain = args or kwargs or not is_plain(input) or not self.seqpar.in_block or not torch.is_grad_enabled()
        if plain or not input.is_floating_point():
            return call(input, *args, **kwargs)  # type: ignore[no-any-return]
        handle: GatedActivation = GatedActivation.of(input, self.seqpar)
        handle.act, handle.compute = self.act_name, call
        return handle
