"""The process groups of a (data parallel, tensor parallel) run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _set_pg_timeout

from .errors import ConfigError

__all__ = ["ParallelGroups", "limit_waiting"]


@dataclass(frozen=True)
class ParallelGroups:
    """One rank's groups. The ranks of a tp_group are consecutive, as DeepSpeed lays them out.

    `tp_group` carries activations and gradients; `tp_cpu_group` holds the same ranks over gloo and carries the
    few bytes that decide whether ranks may enter a collective at all, so that the GPU queue never drains for them.
    `world_cpu_group` does so for all ranks of the run (None stands for the default group, where that is gloo's).
    """

    tp_group: ProcessGroup
    tp_cpu_group: ProcessGroup
    tp_size: int
    tp_rank: int
    world_cpu_group: ProcessGroup | None = None

    @classmethod
    def around(cls, tp_group: ProcessGroup) -> ParallelGroups:
        """Completes an existing tensor-parallel group. Collective over the world.

        Raises ConfigError if the group's ranks are not consecutive.
        """
        tp_size, tp_rank = dist.get_world_size(tp_group), dist.get_rank(tp_group)
        ranks = dist.get_process_group_ranks(tp_group)
        if ranks != list(range(ranks[0], ranks[0] + tp_size)) or ranks[0] % tp_size:
            raise ConfigError(f"a tensor-parallel group must hold consecutive ranks, not {ranks}")
        world = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        if dist.get_backend(tp_group) == "gloo":
            return cls(tp_group, tp_group, tp_size, tp_rank, world)
        cpu_group = tp_group
        for start in range(0, dist.get_world_size(), tp_size):  # every rank takes part in making every group
            group = dist.new_group(list(range(start, start + tp_size)), backend="gloo")
            if start == ranks[0]:
                cpu_group = group
        return cls(tp_group, cpu_group, tp_size, tp_rank, world)


def limit_waiting(seconds: int, groups: Iterable[ProcessGroup | None]) -> None:
    """Lets a rank that waits for another in any of these groups (None: the default one) give up after `seconds`; 0: as they are."""
    for group in groups if seconds else ():
        _set_pg_timeout(timedelta(seconds=seconds), group)
