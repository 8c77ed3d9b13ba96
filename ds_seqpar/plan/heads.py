"""Which attention heads a rank holds. Legend: n heads, k kv heads, t tp_size."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PlanError

__all__ = ["HeadPartition", "even_bounds"]


def even_bounds(size: int, parts: int) -> list[tuple[int, int]]:
    """`size` cut into `parts` consecutive ranges that differ by at most one, the longer ones first."""
    short, longer = divmod(size, parts)
    bounds, start = [], 0
    for part in range(parts):
        stop = start + short + (part < longer)
        bounds.append((start, stop))
        start = stop
    return bounds


@dataclass(frozen=True)
class HeadPartition:
    """Every rank's query heads and kv heads, as ranges over the model's heads.

    Where k >= t the kv heads are dealt out and each brings its whole group of query heads (3 kv heads over 2 ranks: 2 and
    1). Where k < t several ranks hold a copy of one kv head and share its group of query heads.
    """

    queries: tuple[tuple[int, int], ...]
    kvs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, tp_size: int) -> HeadPartition:
        """Raises PlanError, naming the sizes that work, if some rank would be left without a query head."""
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise PlanError(f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}")
        group = num_heads // num_kv_heads
        if tp_size > num_heads:
            raise PlanError(
                f"num_attention_heads={num_heads} cannot be cut over tp_size={tp_size}; use at most {num_heads}"
            )
        if num_kv_heads >= tp_size:
            kvs = even_bounds(num_kv_heads, tp_size)
            return cls(tuple((a * group, b * group) for a, b in kvs), tuple(kvs))
        queries: list[tuple[int, int]] = []
        copies: list[tuple[int, int]] = []
        for kv, (first, last) in enumerate(even_bounds(tp_size, num_kv_heads)):
            for start, stop in even_bounds(group, last - first):
                queries.append((kv * group + start, kv * group + stop))
                copies.append((kv, kv + 1))
        return cls(tuple(queries), tuple(copies))

    @property
    def copied(self) -> bool:
        """True if some kv head is held by more than one rank."""
        return len(set(self.kvs)) < len(self.kvs)

    def num_local_heads(self, rank: int) -> int:
        """Query heads of a rank."""
        return self.queries[rank][1] - self.queries[rank][0]

    def num_local_kv_heads(self, rank: int) -> int:
        """KV heads of a rank."""
        return self.kvs[rank][1] - self.kvs[rank][0]
