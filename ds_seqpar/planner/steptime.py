"""Time of a step: the traced work at measured rates, and what data-parallel ranks send each other."""

from __future__ import annotations

from dataclasses import dataclass

from .memory import Zero
from .optimizer import step_bytes
from .rates import Rates
from .step import StepTrace

__all__ = ["StepTime", "predict"]


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one optimizer step of one rank, by kind."""

    gemm: float
    attention: float
    elementwise: float
    exposed: float  # communication of the tensor-parallel group that nothing hides
    data_parallel: float  # the same over the data-parallel ranks
    optimizer: float

    @property
    def forward_backward(self) -> float:
        """All micro batches, without what data-parallel ranks exchange."""
        return self.gemm + self.attention + self.elementwise + self.exposed

    @property
    def total(self) -> float:
        """The step."""
        return self.forward_backward + self.data_parallel + self.optimizer


def predict(trace: StepTrace, rates: Rates, zero: Zero, *, tp_size: int, dp_size: int, gpus_per_node: int) -> StepTime:
    """The time of a step of `zero.accumulation` micro batches.

    Data-parallel communication: stages 0 to 2 reduce gradients (twice their bytes at stage 0) and gather weights after the
    last micro batch, with nothing beside it, as DeepSpeed does without overlap_comm; stage 3 gathers weights twice a micro batch and
    scatters gradients, beside computation as far as that lasts. It is at the links' rate between nodes as soon as a
    data-parallel group spans more than one.
    """
    work, times = trace.work, zero.accumulation
    compute = [
        times * 1e3 * flops / 1e12 / rates.at(points, trace.tokens)
        for flops, points in (
            (work.gemm_flops, rates.gemm_tflops),
            (work.attention_flops, rates.attention_forward_tflops),
            (work.attention_backward_flops, rates.attention_backward_tflops),
        )
    ]
    elementwise = times * 1e3 * work.traffic_bytes / 1e9 / rates.traffic_gb_per_s
    transfers = (work.moves + work.waits) if tp_size > 1 else 0
    waited = work.waited_bytes * (tp_size - 1) / tp_size / 1e9 / rates.peer_gb_per_s
    exposed = times * (1e-3 * rates.exposed_us_per_transfer * transfers + 1e3 * waited)
    within = rates.peer_gb_per_s if tp_size * dp_size <= gpus_per_node else rates.node_gb_per_s
    share = (dp_size - 1) / dp_size / 1e9 / within * 1e3
    gradients, weights = trace.trainable * trace.dtype_bytes, trace.parameters * trace.dtype_bytes
    if zero.stage == 3:
        busy = sum(compute) + elementwise
        traffic = times * (2 * weights + gradients) * share
        data_parallel = max(0.05 * traffic, traffic - busy)
    else:
        data_parallel = (2 * gradients if zero.stage == 0 else gradients + gradients) * share
    updated = trace.trainable / (dp_size if zero.stage else 1)
    rate = rates.host_gb_per_s if zero.offload_optimizer else rates.optimizer_gb_per_s
    optimizer = updated * step_bytes(zero, trace.dtype_bytes) / 1e6 / rate
    return StepTime(compute[0], compute[1] + compute[2], elementwise, exposed, data_parallel, optimizer)
