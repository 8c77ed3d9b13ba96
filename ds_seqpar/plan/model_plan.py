"""A plan: what becomes of every module of a model. Data alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .cuts import Cut
from .heads import HeadPartition
from .styles import BlockKind, Style

__all__ = ["BlockPlan", "ModelPlan", "ModulePlan"]


@dataclass(frozen=True)
class ModulePlan:
    """One planned module: its style and the cut of each of its parameters (none for replicated ones)."""

    name: str
    style: Style
    cuts: Mapping[str, Cut]
    why: str
    once: tuple[str, ...] = ()  # parameters that one rank alone adds to a partial sum


@dataclass
class BlockPlan:
    """A direct child of a layer that mixes tokens or features: attention, MLP, experts."""

    name: str
    kind: BlockKind = BlockKind.GROUPED
    columns: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    counts: tuple[int, int] = (0, 0)  # query and kv heads
    has_heads: bool = False
    heads: HeadPartition | None = None
    why: str = ""  # it is repeated whole


@dataclass
class ModelPlan:
    """What becomes of every module that owns parameters."""

    modules: dict[str, ModulePlan] = field(default_factory=dict)
    blocks: dict[str, BlockPlan] = field(default_factory=dict)
    routers: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    tokenwise: list[str] = field(default_factory=list)  # must prove to be: norms of layers, own parameters of layers
    between: list[str] = field(
        default_factory=list
    )  # of the base model, outside layers: token-wise or repeated by every rank
    outside: list[str] = field(default_factory=list)  # not part of the base model: they see whole activations
    asserted: set[str] = field(default_factory=set)  # token-wise by a data file's word
    remarks: list[str] = field(default_factory=list)

    def repeat_whole(self, block: str, members: list[str], why: str) -> None:
        """Every rank repeats the whole block."""
        self.blocks[block] = BlockPlan(block, BlockKind.WHOLE, why=why)
        self.routers = [
            router for router in self.routers if router not in members and not router.startswith(f"{block}.")
        ]
        for module in members:
            self.modules[module] = ModulePlan(module, Style.WHOLE, {}, why)
