"""Time of a step: the traced work at measured rates, and what data-parallel ranks send each other."""

from __future__ import annotations

from dataclasses import dataclass

from .memory import Zero
from .optimizer import step_bytes
from .rates import Rates
from .step import StepTrace
from .trace import Work

__all__ = ["StepTime", "launched", "predict"]


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one optimizer step of one rank, by kind."""

    gemm: float
    attention: float
    elementwise: float
    exposed: float  # communication of the tensor-parallel group that nothing hides
    host: float  # the GPU waits for Python to launch work
    data_parallel: float  # the same as `exposed` over the data-parallel ranks
    optimizer: float  # DeepSpeed's loops over the parameters in it

    @property
    def forward_backward(self) -> float:
        """All micro batches, without what data-parallel ranks exchange."""
        return self.gemm + self.attention + self.elementwise + self.exposed + self.host

    @property
    def total(self) -> float:
        """The step."""
        return self.forward_backward + self.data_parallel + self.optimizer


@dataclass(frozen=True)
class _OnGpu:
    """Milliseconds of a forward or a backward if the host were infinitely fast."""

    gemm: float
    attention: float
    elementwise: float
    exposed: float

    @property
    def total(self) -> float:
        return self.gemm + self.attention + self.elementwise + self.exposed


def predict(trace: StepTrace, rates: Rates, zero: Zero, *, tp_size: int, dp_size: int, gpus_per_node: int) -> StepTime:
    """The time of a step of `zero.accumulation` micro batches.

    Data-parallel communication: stages 0 to 2 reduce gradients (twice their bytes at stage 0) and gather weights after the
    last micro batch, with nothing beside it, as DeepSpeed does without overlap_comm; stage 3 gathers weights twice a micro batch and
    scatters gradients, beside computation as far as that lasts. It is at the links' rate between nodes as soon as a
    data-parallel group spans more than one.
    """
    times, tensors = zero.accumulation, trace.trained_tensors
    forward, backward = (
        _on_gpu(work, rates, trace.tokens, tp_size) for work in (trace.forward_work, trace.backward_work)
    )
    engine = 1e-3 * rates.host_engine_us * tensors
    host = _waits_for_host(trace, rates, forward.total, backward.total, tp_size, engine)
    within = rates.peer_gb_per_s if tp_size * dp_size <= gpus_per_node else rates.node_gb_per_s
    share = (dp_size - 1) / dp_size / 1e9 / within * 1e3
    gradients, weights = trace.trainable * trace.dtype_bytes, trace.parameters * trace.dtype_bytes
    if zero.stage == 3:
        busy = times * sum(x.gemm + x.attention + x.elementwise for x in (forward, backward))
        traffic = times * (2 * weights + gradients) * share
        data_parallel = max(0.05 * traffic, traffic - busy)
    else:
        data_parallel = (2 * gradients if zero.stage == 0 else gradients + gradients) * share
    updated = trace.trainable / (dp_size if zero.stage else 1)
    rate = rates.host_gb_per_s if zero.offload_optimizer else rates.optimizer_gb_per_s
    optimizer = updated * step_bytes(zero, trace.dtype_bytes) / 1e6 / rate + engine
    kinds = {name: times * (value + getattr(backward, name)) for name, value in vars(forward).items()}
    return StepTime(**kinds, host=times * host, data_parallel=data_parallel, optimizer=optimizer)


def _on_gpu(work: Work, rates: Rates, tokens: int, tp_size: int) -> _OnGpu:
    attention = work.attention_flops / rates.at(rates.attention_forward_tflops, tokens)
    attention += work.attention_backward_flops / rates.at(rates.attention_backward_tflops, tokens)
    transfers = (work.moves + work.waits) if tp_size > 1 else 0
    waited = work.waited_bytes * (tp_size - 1) / tp_size / 1e6 / rates.peer_gb_per_s
    return _OnGpu(
        gemm=work.gemm_flops / 1e9 / rates.at(rates.gemm_tflops, tokens),
        attention=attention / 1e9,
        elementwise=work.traffic_bytes / 1e6 / rates.traffic_gb_per_s,
        exposed=1e-3 * rates.exposed_us_per_transfer * transfers + waited,
    )


def launched(work: Work, tp_size: int) -> int:
    """Operations of the host. A transfer that overlaps is a barrier, and a piece of its product for every rank of the group."""
    return work.operations + (tp_size + 1) * work.moves


def _waits_for_host(
    trace: StepTrace, rates: Rates, forward: float, backward: float, tp_size: int, engine: float
) -> float:
    """Milliseconds a micro batch that the GPU waits, which needs `forward` and `backward` if it never does; `engine`: DeepSpeed's of it.

    A forward is taken to begin with nothing queued, though the host may be ahead by what the optimizer's step takes the GPU. From there
    the host launches and the GPU follows; backward can be launched while forward still runs.
    """
    rate = (
        (rates.host_plain_us, rates.host_plain_us) if trace.plain else (rates.host_forward_us, rates.host_backward_us)
    )
    host_forward = 1e-3 * rate[0] * launched(trace.forward_work, tp_size)
    host_backward = 1e-3 * rate[1] * launched(trace.backward_work, tp_size) + engine
    return max(0.0, host_forward - forward, host_forward + host_backward - forward - backward)
