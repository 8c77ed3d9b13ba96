"""Memory of one rank over a step: what DeepSpeed keeps by ZeRO stage, and the traced step played through around it.

Sources: deepspeed 0.19 runtime/zero/stage_1_and_2.py, stage3.py and bf16_optimizer.py for what is kept and when; each term is
compared with a run (tests/planner).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..own_gradients import unshared, wants_copies
from .step import StepTrace

__all__ = ["OUTSIDE", "MemoryEstimate", "Zero", "estimate"]

OUTSIDE = 1_990_000_000
"""Bytes on a GPU beside torch's allocator and peer memory: CUDA context, libraries, NCCL's buffers. Measured on two H200."""


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed JSON decides memory. Elements are as in the JSON."""

    stage: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_bucket: int = 500_000_000
    live_parameters: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    accumulation: int = 1
    masters: bool = True  # fp32 masters of half-precision weights
    clips: bool = False  # gradients are scaled before the update: clipping, or fp16's loss scale
    in_place: bool = True  # gradients that no data-parallel rank shares stay where they are made (own_gradients.py)

    @classmethod
    def from_json(cls, ds_config: Mapping[str, Any]) -> Zero:
        """Reads the fields of a DeepSpeed config. Raises ConfigError for a stage that there is not."""
        section = ds_config.get("zero_optimization") or {}
        stage = section.get("stage", 0)
        if stage not in (0, 1, 2, 3):
            raise ConfigError(f'"zero_optimization.stage" must be 0, 1, 2 or 3, not {stage!r}')

        def number(name: str, plain: int) -> int:
            value = section.get(name, plain)
            return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else plain

        def offloads(name: str) -> bool:
            return bool((section.get(name) or {}).get("device", "none") != "none")

        accumulation = _whole(ds_config.get("gradient_accumulation_steps"))
        half = any((ds_config.get(name) or {}).get("enabled") for name in ("bf16", "bfloat16", "fp16"))
        return cls(
            stage,
            offloads("offload_optimizer"),
            offloads("offload_param"),
            number("reduce_bucket_size", cls.reduce_bucket),
            number("stage3_max_live_parameters", cls.live_parameters),
            number("sub_group_size", cls.sub_group),
            accumulation,
            bool(half),
            bool(ds_config.get("gradient_clipping")) or bool((ds_config.get("fp16") or {}).get("enabled")),
            not wants_copies(ds_config, accumulation),
        )


def _whole(value: Any) -> int:
    """1 for what a Trainer fills in ("auto")."""
    return value if isinstance(value, int) and value >= 1 else 1


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank. `peak` is the highest of torch's allocator in a step; `total` adds what lies beside it."""

    weights: int
    gradients: int
    optimizer: int
    held: Mapping[str, int]
    gathered: int  # weights that ZeRO-3 makes whole for a while
    logits: int  # what the head and its loss need while they run, beyond what is held
    static: int  # allocated after a backward
    peak: int
    peak_step: int  # in the optimizer's step
    beside: int  # peer memory and what is outside the allocator

    @property
    def held_bytes(self) -> int:
        """Activations kept for backward."""
        return sum(self.held.values())

    @property
    def total(self) -> int:
        """What the GPU must have."""
        return max(self.peak, self.peak_step) + self.beside


@dataclass(frozen=True)
class _Kept:
    """What DeepSpeed keeps on a rank, by kind."""

    weights: int
    gathered: int
    optimizer: int
    whole_gradients: int
    gradients: int  # after a backward
    bucket: int
    at_the_end: int  # more while ZeRO 1 makes its gradients
    in_step: int  # more while the optimizer steps


def _kept(trace: StepTrace, zero: Zero, dp_size: int) -> _Kept:
    width = trace.dtype_bytes
    trained, elements = trace.trainable, trace.parameters
    mine = -(-trained // dp_size) if zero.stage else trained
    weights = elements * width
    gathered = 0
    if zero.stage == 3:
        gathered = min(weights, zero.live_parameters * width)
        weights = 0 if zero.offload_parameters else -(-elements // dp_size) * width
    masters = 4 if (zero.masters and width == 2) or zero.stage else 0
    optimizer = 0 if zero.offload_optimizer else mine * (8 + masters)
    whole = trained * width
    in_place = zero.in_place and unshared(zero.stage, dp_size, zero.accumulation)
    bucket = zero.reduce_bucket * width if zero.stage and not in_place else 0
    kept = 0 if zero.offload_optimizer and zero.stage else mine * width
    step_elements = min(mine, zero.sub_group) if zero.stage == 3 else mine
    in_step = 0
    if not zero.offload_optimizer:
        widened = step_elements * (4 + (width if zero.stage in (1, 2) else 0)) if width == 2 else 0
        normed = 8 * min(mine, trace.largest_parameter) if zero.stage else 0  # in float64, a parameter at a time
        in_step = max(widened, normed)
    at_the_end = whole + trace.largest_parameter * width if zero.stage == 1 and not in_place else 0
    return _Kept(weights, gathered, optimizer, whole, kept, bucket, at_the_end, in_step)


def estimate(trace: StepTrace, zero: Zero, dp_size: int) -> MemoryEstimate:
    """Plays the traced step of a whole model through, with what DeepSpeed keeps at this stage over `dp_size` ranks."""
    kept = _kept(trace, zero, dp_size)
    always = kept.weights + kept.optimizer + (kept.bucket if zero.stage == 3 else 0)
    carried = kept.gradients if zero.stage == 3 else 0  # its partition of them is there for good
    if zero.accumulation > 1:
        carried = kept.whole_gradients if zero.stage < 2 else kept.gradients
    live = always + carried + kept.gathered
    peak = 0
    layers = range(trace.num_layers)
    for segment in (trace.before, *map(trace.forward, layers), trace.head):
        peak = max(peak, live + segment.peak)
        live += segment.growth
    after_forward = live
    live += kept.bucket if zero.stage < 3 else 0
    share = 1.0 if zero.stage < 2 else kept.gradients / max(1, kept.whole_gradients)
    for segment in (trace.backward_head, *map(trace.backward, reversed(layers)), trace.after):
        peak = max(peak, live + segment.peak)
        live += segment.growth - segment.gradients + (0 if carried else int(share * segment.gradients))
    static = always + kept.gradients
    peak = max(peak, static + kept.at_the_end)
    return MemoryEstimate(
        weights=kept.weights,
        gradients=kept.gradients,
        optimizer=kept.optimizer,
        held=trace.held,
        gathered=kept.gathered,
        logits=max(0, trace.head.peak - trace.head.growth),
        static=static,
        peak=max(peak, after_forward),
        peak_step=static + kept.in_step,
        beside=OUTSIDE + trace.symmetric_bytes,
    )
