"""The arms of the comparison: a name, what it is, and how it is built.

An arm is a module with `build(case, **options) -> Workload`; it is imported on the ranks only.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.case import Case
from harness.workload import Workload

__all__ = ["ARMS", "Arm"]


@dataclass(frozen=True)
class Arm:
    """`module.build(case, **options)` on one rank or on all; `needs` names a package that may be missing.

    `data_parallel`: it can run groups of `tp` ranks beside each other. `takes_zero`: it runs at the ZeRO stage of the case.
    """

    title: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    one_rank: bool = False
    needs: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    data_parallel: bool = False
    takes_zero: bool = False

    def missing(self) -> bool:
        """Whether the package that it needs is not installed."""
        return self.needs is not None and importlib.util.find_spec(self.needs) is None

    def build(self, case: Case) -> Workload:
        """The arm's model and step. Collective over the ranks."""
        workload: Workload = importlib.import_module(f"arms.{self.module}").build(case, **self.options)
        return workload


ARMS: dict[str, Arm] = {
    "unsharded": Arm("one GPU, transformers", "unsharded", one_rank=True),
    "seqpar": Arm("ds_seqpar", "seqpar", data_parallel=True, takes_zero=True),
    "seqpar_loop": Arm("ds_seqpar, plain loop", "seqpar_loop"),
    "seqpar_overlap_off": Arm(
        "ds_seqpar, overlap off", "seqpar", {"overlap": "off"}, data_parallel=True, takes_zero=True
    ),
    "seqpar_tp_only": Arm(
        "ds_seqpar, sequence_parallel false",
        "seqpar",
        {"sequence_parallel": False},
        data_parallel=True,
        takes_zero=True,
    ),
    "autotp": Arm("DeepSpeed AutoTP", "autotp", data_parallel=True, takes_zero=True),
    "autotp_vocab": Arm(
        "AutoTP, vocab-parallel head, overlap",
        "autotp",
        {"vocab_parallel_lm_head": True, "tp_overlap_comm": True},
        data_parallel=True,
        takes_zero=True,
    ),
    "ulysses": Arm("DeepSpeed Ulysses, ZeRO-3", "ulysses", {"tiled": False}, data_parallel=True),
    "ulysses_alst": Arm("Ulysses, ZeRO-3, tiled loss and MLP (ALST)", "ulysses", {"tiled": True}, data_parallel=True),
    "zero3": Arm("DeepSpeed ZeRO-3, a sequence a GPU", "zero3"),
    "dtensor": Arm("torch DTensor TP+SP, eager", "dtensor", {"compiled": False}),
    "dtensor_compiled": Arm("torch DTensor TP+SP, layers compiled", "dtensor", {"compiled": True}),
    "megatron": Arm(
        "Megatron-core TP+SP", "megatron_core", needs="megatron", environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    ),
}
