"""What injection did, line by line: returned to the caller, logged once, and the truth that saving goes by."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .cuts import Cut

__all__ = ["Entry", "ParameterEntry", "Report"]


@dataclass(frozen=True)
class ParameterEntry:
    """One parameter: its kind (plan.cuts.Kind), its shape in the checkpoint and on this rank, and its cut if it has one."""

    kind: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    cut: Cut | None = None


@dataclass(frozen=True)
class Entry:
    """One module that owns parameters, or one that was left alone; `why` says on what ground."""

    module: str
    was: str
    becomes: str
    parameters: Mapping[str, ParameterEntry]
    why: str


@dataclass
class Report:
    """Every module with parameters, in the model's order, and remarks that the user should read once.

    `materialised` counts, while the model runs, what was gathered whole because code outside the sharded layers asked for
    it, by handle and operation: slower than staying sharded, never wrong.
    """

    model_type: str
    tp_size: int
    tp_rank: int
    sequence_parallel: bool
    entries: list[Entry] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    materialised: Counter[str] = field(default_factory=Counter)

    def parameters(self) -> dict[str, ParameterEntry]:
        """Full parameter name -> entry."""
        return {
            f"{entry.module}.{name}" if entry.module else name: parameter
            for entry in self.entries
            for name, parameter in entry.parameters.items()
        }

    def remark_later(self, remark: str) -> None:
        """Adds what is known only once the model runs, and logs it on the first rank of the group."""
        self.remarks.append(remark)
        if self.tp_rank == 0:
            logging.getLogger("ds_seqpar").info("ds_seqpar: %s", remark)

    def __str__(self) -> str:
        """A short table: one line for each distinct (old type, new type, kinds), with how many there are."""
        mode = "tensor + sequence parallel" if self.sequence_parallel else "tensor parallel"
        lines = [f"ds_seqpar: {self.model_type}, {mode}, tp_size={self.tp_size}"]
        groups: Counter[tuple[str, str, str, str]] = Counter()
        for entry in self.entries:
            kinds = ", ".join(
                f"{name} {p.kind} {list(p.shape)}" + (f"->{list(p.local_shape)}" if p.local_shape != p.shape else "")
                for name, p in entry.parameters.items()
            )
            name = ".".join("*" if part.isdigit() else part for part in entry.module.split("."))
            groups[(name, entry.was, entry.becomes, kinds)] += 1
        for (name, was, becomes, kinds), count in groups.items():
            change = was if was == becomes else f"{was} -> {becomes}"
            lines.append(f"  {count:4d} x {name:38s} {change}: {kinds}")
        lines += [f"  note: {remark}" for remark in self.remarks]
        return "\n".join(lines)
