"""Finds out, before any collective that depends on it, whether the ranks of a tensor-parallel group got the same inputs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DataMismatchError, SeqParError
from ..groups import ParallelGroups
from .fingerprints import fingerprint, gpu_hash, has_readable_content, leaves
from .random import seed_of_state

__all__ = ["InputGuard"]

_READS = 4  # beside the two flags of a forward: the rank reads an output


class InputGuard:
    """Compares a forward's inputs over the group: shapes and CPU contents at once, GPU contents one forward later.

    Shapes travel over gloo, so a GPU's queue never drains; contents on a GPU are hashed there and read when the next
    forward begins, which is early enough because equal shapes cannot hang.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups = groups
        self._late: tuple[Tensor, torch.cuda.Event, list[str]] | None = None
        self.any_hooked = False  # whether any rank was in the last check
        self.any_users_hooks = False

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, seeds: bool, hooked: bool = False, users_hooks: bool = False) -> int:
        """Raises DataMismatchError on every rank if any rank's inputs differ; returns a seed equal on all ranks.

        `seeds`: whether the seed is wanted; it is made of the default generator's state on the group's first rank. `hooked`: whether
        hooks of this rank see the model's modules, see `any_hooked`; `users_hooks`: whether some are the user's.
        """
        self._check_late()
        inputs = {f"argument {i}": x for i, x in enumerate(args)} | dict(kwargs)
        inputs |= {"the training mode": seeds, "the gradient mode": torch.is_grad_enabled()}
        found = leaves(inputs)
        prints = {path: fingerprint(x) for path, x in sorted(found.items())}
        mine = torch.tensor(
            [zlib.crc32(repr(prints).encode()), seed_of_state() if seeds else 0, hooked + 2 * users_hooks],
            dtype=torch.int64,
        )
        everyone = [torch.empty_like(mine) for _ in range(self._groups.tp_size)]
        agreed = dist.all_gather(everyone, mine, group=self._groups.tp_cpu_group, async_op=True)
        on_gpu = {path: x for path, x in found.items() if has_readable_content(x) and x.is_cuda}
        hashes = torch.stack([gpu_hash(x) for x in on_gpu.values()]) if on_gpu else None
        agreed.wait()
        self._refuse_strays(everyone, "begins a forward")
        if any(int(theirs[0]) != int(everyone[0][0]) for theirs in everyone):
            raise DataMismatchError(self._explain(prints))
        self.any_hooked = any(int(theirs[2]) & 1 for theirs in everyone)
        self.any_users_hooks = any(int(theirs[2]) & 2 for theirs in everyone)
        if hashes is not None:
            self._start_late(hashes, list(on_gpu))
        return int(everyone[0][1])

    def meet_to_read(self, what: str) -> None:
        """Returns once all ranks of the group read the same output; raises SeqParError where one begins a forward instead."""
        mine = torch.tensor([zlib.crc32(what.encode()), 0, _READS], dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self._groups.tp_size)]
        dist.all_gather(everyone, mine, group=self._groups.tp_cpu_group)
        self._refuse_strays(everyone, f"reads {what}")

    def _refuse_strays(self, everyone: Sequence[Tensor], does: str) -> None:
        """The ranks stand in different places: all are told, each where it stands, and none is left waiting."""
        reading = [int(theirs[2]) & _READS for theirs in everyone]
        apart = any(reading) and (not all(reading) or len({int(theirs[0]) for theirs in everyone}) > 1)
        if not apart:
            return
        ranks = dist.get_process_group_ranks(self._groups.tp_group)
        places = "; ".join(f"rank {rank} {place}" for rank, place in zip(ranks, self.everyones(does), strict=True))
        raise SeqParError(
            f"the ranks of one tensor-parallel group do different things: {places}. Reading logits or hidden states is a collective: "
            "do it on all of these ranks, outside `if rank == 0`"
        )

    def everyones(self, mine: Any) -> list[Any]:
        """What each rank of the group says. Collective."""
        everyone: list[Any] = [None] * self._groups.tp_size
        dist.all_gather_object(everyone, mine, group=self._groups.tp_cpu_group)
        return everyone

    def _explain(self, prints: dict[str, str]) -> str:
        everyone = self.everyones(prints)
        names = sorted(set().union(*everyone))
        first = next(name for name in names if len({p.get(name) for p in everyone}) > 1)
        ranks = dist.get_process_group_ranks(self._groups.tp_group)
        seen = "; ".join(f"rank {rank}: {p.get(first, 'not given')}" for rank, p in zip(ranks, everyone, strict=True))
        return (
            f"{first} differs between the ranks of one tensor-parallel group: {seen}. All {len(ranks)} ranks must be given "
            f"the same batch: shard the data by rank // {len(ranks)}, seed samplers and collators alike on these ranks"
        )

    def _start_late(self, mine: Tensor, names: list[str]) -> None:
        everyone = mine.new_empty((self._groups.tp_size, len(names)))
        dist.all_gather(list(everyone.unbind(0)), mine, group=self._groups.tp_group)
        differs = (everyone != everyone[0]).any(0)
        host = torch.empty(differs.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(differs, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._late = (host, done, names)

    def _check_late(self) -> None:
        if self._late is None:
            return
        host, done, names = self._late
        self._late = None
        done.synchronize()
        wrong = [name for name, differs in zip(names, host.tolist(), strict=True) if differs]
        if wrong:
            raise DataMismatchError(
                f"{wrong[0]} of the previous forward differed between the ranks of one tensor-parallel group; all "
                f"{self._groups.tp_size} ranks must be given the same batch: shard the data by rank // {self._groups.tp_size}"
            )
