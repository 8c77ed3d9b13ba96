"""Where a dimension is cut: between heads, or anywhere, section by section of a packed weight."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PlanError
from .cuts import Cut
from .heads import HeadPartition, even_bounds
from .model_plan import BlockPlan
from .styles import Role

__all__ = ["Sections", "UncuttableError"]

ANYWHERE = (Role.EVEN, Role.TILES, Role.PAIRS)


class UncuttableError(PlanError):
    """A weight is not made of the heads that the model has."""


@dataclass(frozen=True)
class Sections:
    """Cuts dimensions over `tp_size` ranks."""

    tp_size: int
    head_dim: int

    def cut(self, block: BlockPlan | None, name: str, dim: int, size: int, roles: tuple[Role, ...]) -> Cut:
        """The ranges of every rank. A first cut by heads deals out the block's heads; all its cuts follow that."""
        n, kv = block.counts if block is not None else (0, 0)
        widths = self._widths(name, dim, size, roles, n, kv)
        ranges: list[list[tuple[int, int]]] = [[] for _ in range(self.tp_size)]
        start = 0
        for role, width in zip(roles, widths, strict=True):
            for rank, (a, b) in enumerate(self._bounds(block, name, role, width, n, kv)):
                ranges[rank].append((start + a, start + b))
            start += width
        held = [piece for pieces in ranges for piece in pieces]
        if (len(roles) > 1 or Role.QKV in roles) and len(set(held)) < len(held):
            problem = UncuttableError if kv == 1 else PlanError  # no tp_size would do: a data file's block is repeated whole
            raise problem(
                f"{name}: {kv} kv heads over tp_size={self.tp_size} would be copied inside a weight that also holds "
                f"query heads, and DeepSpeed's gradient norm cannot count a part of a parameter once; use tp_size <= {kv}"
            )
        return Cut(dim, size, tuple(tuple(_joined(parts)) for parts in ranges))

    def _widths(self, name: str, dim: int, size: int, roles: tuple[Role, ...], n: int, kv: int) -> list[int]:
        """The size of each section. One section may have heads of any size; of several, all heads are head_dim wide."""
        d = self.head_dim
        sizes = {Role.QUERY: n * d, Role.KV: kv * d, Role.QKV: (n + 2 * kv) * d}
        if len(roles) == 1 and roles[0] in (Role.QUERY, Role.KV):
            count = n if roles[0] is Role.QUERY else kv
            if count and size % count == 0:
                return [size]
        evens = sum(role in ANYWHERE for role in roles)
        left = size - sum(sizes.get(role, 0) for role in roles)
        if left < 0 or (left and not evens) or (evens and left % evens):
            raise UncuttableError(
                f"{name}: dimension {dim} of size {size} is not made of {[r.value for r in roles]} with "
                f"num_attention_heads={n}, num_key_value_heads={kv}, head_dim={d}"
            )
        return [sizes.get(role, left // evens if evens else 0) for role in roles]

    def _bounds(
        self, block: BlockPlan | None, name: str, role: Role, width: int, n: int, kv: int
    ) -> list[tuple[int, int]]:
        if role in ANYWHERE:
            unit = 2 if role is Role.PAIRS else 1
            if role is not Role.EVEN:
                # Grouped products want rows of 16 bytes: what the whole width is made of, in float32 four numbers.
                fits = (n for n in (8, 4, 2) if width % (n * unit) == 0 and width // (n * unit) >= self.tp_size)
                unit *= next(fits, 1)
            if width // unit < self.tp_size:
                raise PlanError(
                    f"{name}: {width} features cannot be cut over tp_size={self.tp_size}; use at most {width // unit}"
                )
            return [(a * unit, b * unit) for a, b in even_bounds(width // unit, self.tp_size)]
        assert block is not None
        if block.heads is None:
            block.heads = HeadPartition.of(n, kv, self.tp_size)
        by_kv = role in (Role.KV, Role.QKV)
        counts = block.heads.kvs if by_kv else block.heads.queries
        unit = width // (kv if by_kv else n)
        return [(a * unit, b * unit) for a, b in counts]


def _joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges made one, so that an uncut dimension is one range."""
    joined: list[tuple[int, int]] = []
    for start, stop in parts:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
