"""`"replica_check_interval": N`: what all ranks of a tensor-parallel group hold alike, compared bit for bit.

A replica is a number of checksums: one for each replicated parameter, one for each tensor of its optimizer state, one for each
random stream. They are made where the tensors lie, added up over the data-parallel ranks where ZeRO has parts, and gathered over
the group in one message of 8 bytes each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..errors import ReplicaMismatchError
from ..groups import ParallelGroups
from ..plan.report import ParameterEntry
from .comparison import checksum

__all__ = ["Piece", "ReplicaCheck"]


@dataclass(frozen=True)
class Piece:
    """What a rank holds of one thing: `what` of a parameter ("" for its values), flat, from place `start` of the whole on.

    `start` is None where every data-parallel rank holds all of it. A rank that holds nothing of a thing gives an empty piece.
    """

    what: str
    values: Tensor
    start: int | None = None


class ReplicaCheck:
    """Compares the replicas of one model; `pieces(parameter)` gives the same things in the same order on every rank.

    Parts of key/value heads that several ranks hold are compared among those ranks. Random streams that differ when the run
    begins (ranks seeded apart on purpose) are never compared.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        entries: Mapping[int, ParameterEntry],
        groups: ParallelGroups,
        dp_group: ProcessGroup,
        pieces: Callable[[nn.Parameter], Iterable[Piece]],
    ) -> None:
        self._groups, self._dp_group, self._pieces = groups, dp_group, pieces
        self._replicated: list[tuple[str, nn.Parameter, tuple[int, ...]]] = []
        for name, parameter in parameters:
            cut = entries[id(parameter)].cut
            if cut is None or cut.copied:
                # Of every rank, the first rank that holds the same.
                firsts = (0,) * groups.tp_size if cut is None else tuple(cut.ranges.index(part) for part in cut.ranges)
                self._replicated.append((name, parameter, firsts))
        random = _random_sums()
        everyone = self._gathered(torch.stack(list(random.values())))
        self.compares_random_streams = bool((everyone == everyone[0]).all())

    def check(self, step: int) -> None:
        """Raises ReplicaMismatchError on every rank of the run if replicas differ in any group. Collective over the world."""
        names: list[str] = []
        firsts: list[tuple[int, ...]] = []
        sums: list[Tensor] = []
        in_parts: list[bool] = []
        for name, parameter, first in self._replicated:
            for piece in self._pieces(parameter):
                names.append(f"{piece.what} of {name}" if piece.what else name)
                firsts.append(first)
                sums.append(checksum(piece.values, piece.start or 0).to(parameter.device))
                in_parts.append(piece.start is not None)
        mine = torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)
        if any(in_parts):
            parts = torch.tensor(in_parts, device=mine.device)
            whole = torch.where(parts, mine, 0)
            dist.all_reduce(whole, group=self._dp_group)
            mine = torch.where(parts, whole, mine)
        mine = mine.cpu()
        if self.compares_random_streams:
            random = _random_sums()
            names += list(random)
            firsts += [(0,) * self._groups.tp_size] * len(random)
            mine = torch.cat([mine, torch.stack(list(random.values()))])
        self._judge(names, firsts, self._gathered(mine), step)

    def _gathered(self, mine: Tensor) -> Tensor:
        everyone = [torch.empty_like(mine) for _ in range(self._groups.tp_size)]
        dist.all_gather(everyone, mine, group=self._groups.tp_cpu_group)
        return torch.stack(everyone)

    def _judge(self, names: list[str], firsts: list[tuple[int, ...]], everyone: Tensor, step: int) -> None:
        """Every rank of the run learns of a difference anywhere, so that none waits for ranks that stopped."""
        found = None
        for rank in range(self._groups.tp_size):
            theirs = everyone[[first[rank] for first in firsts], range(len(names))]
            different = everyone[rank].ne(theirs).nonzero()
            if found is None and len(different):
                found = (names[int(different[0])], firsts[int(different[0])][rank], rank, len(different))
        anywhere = torch.tensor([found is not None], dtype=torch.int32)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=self._groups.world_cpu_group)
        if not int(anywhere):
            return
        if found is None:
            raise ReplicaMismatchError(
                f"after step {step} replicas differ in another tensor-parallel group; its ranks name them"
            )
        name, first, rank, count = found
        ranks = dist.get_process_group_ranks(self._groups.tp_group)
        more = f", and {count - 1} more" if count > 1 else ""
        raise ReplicaMismatchError(
            f"after step {step} {name} differs between rank {ranks[first]} and rank {ranks[rank]}, which must hold it alike "
            f"bit for bit{more}; go back to a checkpoint from before, and look for code that changes parameters, gradients or "
            "random numbers on some ranks only"
        )


def _random_sums() -> dict[str, Tensor]:
    states = {"the state of the CPU's random numbers": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["the state of the GPU's random numbers"] = torch.cuda.get_rng_state()
    return {name: checksum(state) for name, state in states.items()}
