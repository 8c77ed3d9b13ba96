"""Random numbers: different on every rank where tokens or heads differ, equal where activations are replicated.

Inside a fork the *default* generators run a stream of this rank. They are the ones that torch.utils.checkpoint saves
and restores, so a recomputed layer draws the same masks. Outside, one number is drawn after a fork that drew anything, so
ranks that were seeded alike stay alike, a fixed seed gives the same run twice, and a model without dropout draws nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..groups import ParallelGroups

__all__ = ["ParallelRandom", "seed_of_state"]

_MIX = 0x9E3779B97F4A7C15  # odd 64-bit constant: consecutive ranks land far apart


def seed_of_state() -> int:
    """63 bits made of the default CPU generator's state, which stays as it is."""
    digest = hashlib.blake2b(bytes(torch.get_rng_state().numpy()), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class ParallelRandom:
    """Forks of the default generators (the CPU's, and the current GPU's) for one rank of a tensor-parallel group."""

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups = groups
        self._saved: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    @contextmanager
    def fork(self, seed: int, *, per_rank: bool) -> Iterator[None]:
        """Runs the body on a stream made of `seed` and, if `per_rank`, this rank; restores the generators after it.

        Args:
            seed: the same number on every rank of the group.
            per_rank: True for activations that differ between ranks, False for replicated ones.
        """
        depth = len(self._saved)
        self._enter((seed + _MIX * (self._groups.tp_rank + 1) * per_rank) % 2**63)
        try:
            yield
        finally:
            while len(self._saved) > depth:
                self.leave()

    def agree(self) -> None:
        """Sets this rank's default generators to the states of the group's first rank. Collective."""
        source = dist.get_global_rank(self._groups.tp_group, 0)
        state = torch.get_rng_state()
        dist.broadcast(state, source, group=self._groups.tp_cpu_group)
        torch.set_rng_state(state)
        if torch.cuda.is_initialized():
            state = torch.cuda.get_rng_state()
            dist.broadcast(state, source, group=self._groups.tp_cpu_group)
            torch.cuda.set_rng_state(state)

    def agreed_seed(self) -> int:
        """A seed made of the first rank's stream, on every rank. Collective; the same in a recompute."""
        seed = torch.tensor([seed_of_state()], dtype=torch.int64)
        dist.broadcast(seed, dist.get_global_rank(self._groups.tp_group, 0), group=self._groups.tp_cpu_group)
        return int(seed)

    def leave(self) -> None:
        """Ends the innermost fork early: where a block's output becomes replicated before the block returns."""
        if not self._saved:
            return
        outside, begun = self._saved.pop()
        drew = not all(torch.equal(a, b) for a, b in zip(self._states(), begun, strict=True))
        torch.set_rng_state(outside[0])
        if len(outside) > 1:
            torch.cuda.set_rng_state(outside[1])
        if drew:
            torch.rand(())  # the next fork must not start from the same state

    def _states(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]

    def _enter(self, seed: int) -> None:
        outside = self._states()
        torch.default_generator.manual_seed(seed)
        if len(outside) > 1:
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
        self._saved.append((outside, self._states()))
