"""What DeepSpeed's optimizers read and write in a step: it is memory traffic, and takes the time of its bytes.

Source: deepspeed 0.19 runtime/zero/stage_1_and_2.py (step, has_overflow_partitioned_grads_serial, get_grad_norm_direct,
unscale_and_clip_grads), stage3.py and fp16/unfused_optimizer.py; tests/planner counts the bytes of their runs.
"""

from __future__ import annotations

from .memory import Zero

__all__ = ["ADAMW", "step_bytes"]

ADAMW = 28
"""Bytes of a fused AdamW an element, all in fp32: reads gradient, master and both moments, writes the last three."""


def step_bytes(zero: Zero, width: int) -> int:
    """Bytes read and written in a step for an element that a rank updates, weights and gradients of `width` bytes."""
    half = width == 2
    overflow = 2 * width if half and zero.stage < 3 else 0  # the gradients' maximum and minimum
    widened = width + 4 if half else 0
    if zero.stage == 0:
        norm, flattened, scaled = (width + 4 if half else 0) + 4, 0, 8
    else:
        norm = width + 8 + 8  # widened to float64, and read
        flattened = 2 * width
        scaled = 8 if zero.clips or zero.stage == 3 else 0
    written_back = 4 + width if half else 2 * width
    return overflow + norm + flattened + widened + scaled + ADAMW + written_back
