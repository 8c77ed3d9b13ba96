"""A cut: which index ranges of one dimension each rank holds. Plain, packed, uneven and copied cuts are all of this form."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cut", "Kind"]

Range = tuple[int, int]


class Kind:
    """What a rank's gradient of a parameter is; see DESIGN, section 5."""

    CUT = "cut"
    PARTIAL = "partial"
    COPIED_KV = "replicated kv"
    FULL = "full"


@dataclass(frozen=True)
class Cut:
    """Dimension `dim` of size `size`; rank r holds `ranges[r]`, end to end in that order."""

    dim: int
    size: int
    ranges: tuple[tuple[Range, ...], ...]

    def local_size(self, rank: int) -> int:
        """Indices that a rank holds."""
        return sum(stop - start for start, stop in self.ranges[rank])

    def slot(self, rank: int) -> tuple[int, int]:
        """(which of the distinct parts a rank holds, how many distinct parts there are)."""
        distinct = sorted(set(self.ranges))
        return distinct.index(self.ranges[rank]), len(distinct)

    @property
    def in_order(self) -> bool:
        """True if the parts are of one size and, rank after rank, end to end the whole."""
        size = self.local_size(0)
        ends = [0, *(stop for ranges in self.ranges for _, stop in ranges)]
        starts = [*(start for ranges in self.ranges for start, _ in ranges), self.size]
        return starts == ends and all(self.local_size(rank) == size for rank in range(len(self.ranges)))

    @property
    def copied(self) -> bool:
        """True if two ranks hold the same part."""
        return len(set(self.ranges)) < len(self.ranges)

    def is_first_holder(self, rank: int) -> bool:
        """True for the lowest rank that holds this rank's part: the one that counts in a norm."""
        return self.ranges.index(self.ranges[rank]) == rank
