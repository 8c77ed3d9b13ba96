"""ZeRO 1 and 2 where no other data-parallel rank has a say in the gradients: they stay where backward made them.

DeepSpeed handles them as ever: each goes into a bucket, is divided by one, is summed over one rank, and goes from the bucket into
a second copy of all gradients. That is the value it had, for three passes over all of them, a bucket, and at the end of a backward
the gradients twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from .translation import section

__all__ = ["leave_gradients", "left_in_place", "unshared", "wants_copies"]


def left_in_place(ds_config: Mapping[str, Any], dp_size: int, accumulation: int) -> bool:
    """Whether a run with this DeepSpeed config over `dp_size` data-parallel ranks is one of those."""
    stage = section(ds_config, "zero_optimization").get("stage", 0)
    return unshared(stage, dp_size, accumulation) and not wants_copies(ds_config, accumulation)


def unshared(stage: int, dp_size: int, accumulation: int) -> bool:
    """Whether one rank's gradients are the optimizer's, as they are: at stage 2 DeepSpeed adds micro batches up by itself.

    Parameters' gradients may share memory, which a copy ends: DeepSpeed must not add into them.
    """
    return dp_size == 1 and (stage == 1 or (stage == 2 and accumulation == 1))


def wants_copies(ds_config: Mapping[str, Any], accumulation: int) -> bool:
    """Whether DeepSpeed must handle gradients at these stages whatever their number of ranks: they go elsewhere, or are widened.

    `contiguous_gradients`, where the user names it, asks for the copies; with `overlap_comm` every micro batch is reduced; and
    without `managed_gradient_accumulation` the caller decides how many micro batches there are.
    """
    zero = section(ds_config, "zero_optimization")
    offloads = (section(zero, "offload_optimizer").get("device") or "none") != "none"
    widened = section(ds_config, "data_types").get("grad_accum_dtype") is not None
    each = zero.get("overlap_comm") and accumulation > 1
    unmanaged = ds_config.get("managed_gradient_accumulation") is False
    named = "contiguous_gradients" in zero
    return bool(offloads or widened or each or unmanaged or named or zero.get("zenflow"))


def leave_gradients(engine: Any, say: Callable[[str], None]) -> None:
    """Tells the ZeRO 1 or 2 optimizer of `engine` to leave the gradients alone, and says so, unless it does with them more than said above.

    At stage 2 until the caller first says that a micro batch is not the last of its step: DeepSpeed then adds into what it holds.
    """
    optimizer = engine.optimizer
    if not _leave(optimizer):
        return
    say("ZeRO leaves the gradients where backward makes them: no data-parallel rank shares them")
    if not optimizer.partition_gradients:
        return
    plain = engine.set_gradient_accumulation_boundary

    @functools.wraps(plain)
    def set_boundary(is_boundary: bool) -> None:
        if not is_boundary and not optimizer.contiguous_gradients:
            optimizer.contiguous_gradients = True
            del optimizer.buffered_reduce_fallback
            say(
                "ZeRO copies the gradients from here on: set_gradient_accumulation_boundary(False) makes DeepSpeed add micro batches "
                'up by itself; "gradient_accumulation_steps" in the JSON says so from the start'
            )
        plain(is_boundary)

    engine.set_gradient_accumulation_boundary = set_boundary


def _leave(optimizer: Any) -> bool:
    usual = optimizer.contiguous_gradients and not (optimizer.cpu_offload or optimizer.has_moe_layers)
    plain = optimizer.gradient_accumulation_dtype == optimizer.dtype and optimizer.sequence_parallel_size == 1
    if not usual or not plain or dist.get_world_size(optimizer.dp_process_group) > 1:
        return False
    # Without contiguous gradients there is neither bucket nor second copy, and this is all that is done with a bucket's gradients.
    optimizer.contiguous_gradients = False
    optimizer.buffered_reduce_fallback = _already_reduced
    return True


def _already_reduced(*args: Any, **kwargs: Any) -> None:
    pass
