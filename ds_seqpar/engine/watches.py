"""What is watched while an engine trains: memory against the plan, and that replicas stay alike."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn

from ..checks.replicas import Piece, ReplicaCheck
from ..config import SeqParConfig
from ..hf import require_model
from ..layers.region import ShardingState
from ..plan.report import Report
from ..planner.startup import CudaMeter, MemoryCheck, Meter, question_of
from .process_groups import data_parallel_group

__all__ = ["memory_check", "memory_meter", "replica_check"]


def memory_meter() -> Meter | None:
    """What counts this rank's memory; None on the CPU, where nothing does."""
    if get_accelerator().device_name() != "cuda":
        return None
    return CudaMeter(torch.device("cuda", get_accelerator().current_device()))


def memory_check(
    engine: Any, report: Report, config: SeqParConfig, ds_config: Mapping[str, Any], dp_size: int
) -> MemoryCheck | None:
    """On the first rank, if it trains: the others hold the same, or a little less."""
    meter = memory_meter() if comm.get_rank() == 0 and engine.optimizer is not None else None
    if meter is None:
        return None
    model = require_model(engine.module)
    if model is not engine.module:
        report.remark_later("memory is not compared with a plan: the model is inside a wrapper, such as an adapter's")
        return None
    on_gpu = isinstance(meter, CudaMeter)
    as_it_runs = {**ds_config, "gradient_accumulation_steps": engine.gradient_accumulation_steps()}
    check = MemoryCheck(engine, question_of(model, config, as_it_runs, dp_size, on_gpu), meter, report.remark_later)
    atexit.register(check.close)
    return check


def replica_check(engine: Any, state: ShardingState) -> ReplicaCheck:
    """Of every parameter of the engine, its fp32 copy and its optimizer state; what cannot be compared is said in the report."""
    pieces, dp_group = functools.partial(_pieces, engine), data_parallel_group()
    assert dp_group is not None, "the model is sharded"
    check = ReplicaCheck(engine.module.named_parameters(), state.entries, state.groups, dp_group, pieces)
    if not check.compares_random_streams:
        engine.seqpar_report.remark_later("ranks of one group were seeded apart: their random streams are not compared")
    if engine.zero_optimization_stage() == 0 and engine.optimizer is not engine.basic_optimizer:
        engine.seqpar_report.remark_later(
            "ZeRO stage 0 in half precision: optimizer state is not among the replicas compared"
        )
    return check


def _pieces(engine: Any, parameter: nn.Parameter) -> Iterator[Piece]:
    """What this rank holds of a parameter, of its fp32 copy and of its optimizer state, alike in number on every rank."""
    stage, basic = engine.zero_optimization_stage(), engine.basic_optimizer
    names = _state_names(basic) if parameter.requires_grad and basic is not None else []
    if stage == 3:
        yield from _pieces_in_zero3(parameter, names)
        return
    yield Piece("", parameter)
    if stage:
        yield from _pieces_in_partitions(parameter, names)
    elif engine.optimizer is basic:
        for name in names:
            yield Piece(name, basic.state.get(parameter, {}).get(name, parameter.new_empty(0)))


def _pieces_in_zero3(parameter: Any, names: Sequence[str]) -> Iterator[Piece]:
    """Each data-parallel rank holds a part of everything; the last one's runs past the end."""
    start = dist.get_rank(data_parallel_group()) * parameter.ds_tensor.numel()
    here = max(0, min(parameter.ds_tensor.numel(), parameter.ds_numel - start))
    yield Piece("", parameter.ds_tensor[:here], start)
    if names:
        yield Piece("fp32 copy", safe_get_local_fp32_param(parameter)[:here], start)
    for name in names:
        yield Piece(name, safe_get_local_optimizer_state(parameter, name)[:here], start)


def _pieces_in_partitions(parameter: Any, names: Sequence[str]) -> Iterator[Piece]:
    """ZeRO 1 and 2: a data-parallel rank holds the fragment that falls into its partition, or none."""
    nothing, fragment = parameter.new_empty(0), getattr(parameter, "_hp_mapping", None)
    start = 0 if fragment is None else fragment.lp_fragment_address.start
    if names:
        yield Piece("fp32 copy", nothing if fragment is None else fragment.hp_fragment, start)
    for name in names:
        states = {} if fragment is None else fragment.optim_fragment or {}
        yield Piece(name, states.get(name, nothing), start)


def _state_names(optimizer: Any) -> list[str]:
    """Names of what an optimizer keeps for each element of a parameter."""
    states = optimizer.state.values()
    return sorted({key for state in states for key, x in state.items() if isinstance(x, Tensor) and x.dim() > 0})
