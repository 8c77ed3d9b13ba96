"""From a model's facts to a plan for every module, or a PlanError before anything is touched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import PlanError
from ..families import Family
from .cuts import Cut
from .facts import ModelFacts
from .heads import HeadPartition, even_bounds
from .styles import ROLES_BY_NAME, Role, Style

__all__ = ["BlockPlan", "ModelPlan", "ModulePlan", "resolve"]


@dataclass(frozen=True)
class ModulePlan:
    """One planned module: its style and the cut of each of its parameters (none for replicated ones)."""

    name: str
    style: Style
    cuts: Mapping[str, Cut]
    why: str


@dataclass
class BlockPlan:
    """An attention or MLP block: entered with gathered tokens, left by its row-parallel linears."""

    name: str
    columns: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    has_heads: bool = False


@dataclass
class ModelPlan:
    """What becomes of every module that owns parameters."""

    modules: dict[str, ModulePlan] = field(default_factory=dict)
    blocks: dict[str, BlockPlan] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    tokenwise: list[str] = field(default_factory=list)  # inside layers or after them, on this rank's tokens
    outside: list[str] = field(default_factory=list)  # not part of the base model: they see whole activations
    heads: HeadPartition | None = None


def resolve(facts: ModelFacts, family: Family, tp_size: int) -> ModelPlan:
    """Plans every module of the model. Raises PlanError with the name, the values and the way out."""
    if not facts.tp_plan:
        raise PlanError(
            f"model type {facts.model_type!r} has no tp_plan in transformers, so what may be cut is not known; it cannot be sharded"
        )
    planner = _Planner(facts, family, tp_size)
    return planner.plan()


class _Planner:
    def __init__(self, facts: ModelFacts, family: Family, tp_size: int) -> None:
        self.facts, self.family, self.tp_size = facts, family, tp_size
        self.result = ModelPlan()

    def plan(self) -> ModelPlan:
        for name, style, why in self._planned_modules():
            self._plan_module(name, style, why)
        self._plan_vocabulary()
        for block in self.result.blocks.values():
            if not (block.columns and block.rows):
                raise PlanError(
                    f"{block.name}: a block needs column-parallel and row-parallel linears, found {block.columns} and {block.rows}"
                )
        self._place_the_rest()
        return self.result

    def _planned_modules(self) -> list[tuple[str, Style, str]]:
        styles = {pattern: (style, "transformers' tp_plan") for pattern, style in self.facts.tp_plan.items()}
        for pattern, style in self.family.styles.items():
            styles[self.facts.full_name(pattern)] = (style, f"data file of {self.facts.model_type}")
        found: dict[str, tuple[Style, str]] = {}
        for pattern, (word, why) in styles.items():
            matches = [name for name in self.facts.modules if _matches(pattern, name)]
            if not matches:
                raise PlanError(
                    f"plan pattern {pattern!r} ({why}) matches no module of this {self.facts.model_type} model"
                )
            for name in matches:
                if name in found:
                    raise PlanError(f"{name} is matched by two plan patterns; the second is {pattern!r} ({why})")
                found[name] = (_style(word, name), why)
        order = list(self.facts.modules)
        return [(name, *found[name]) for name in sorted(found, key=order.index)]

    def _plan_module(self, name: str, style: Style, why: str) -> None:
        if style in (Style.HEAD, Style.EMBEDDING):
            if name not in (self.facts.head, self.facts.embedding):
                raise PlanError(f"{name}: style {style.value!r} is known for the vocabulary only, not inside the model")
            return
        module = self.facts.modules[name]
        block = self._block_of(name)
        if style is Style.PARTIAL:
            self.result.modules[name] = ModulePlan(name, style, {}, why)
            return
        roles = self._roles(name)
        if style is Style.CUT_NORM:
            cuts = {"weight": self._cut(name, 0, module.shapes["weight"][0], roles)}
            self.result.modules[name] = ModulePlan(name, style, cuts, why)
            return
        if module.role != "linear":
            raise PlanError(f"{name}: style {style.value!r} needs an nn.Linear, not {module.type_name}")
        block.has_heads |= roles[0] is not Role.EVEN
        out_features, in_features = module.shapes["weight"]
        if style is Style.ROW:
            block.rows.append(name)
            cuts = {"weight": self._cut(name, 1, in_features, roles)}
        else:
            block.columns.append(name)
            cut = self._cut(name, 0, out_features, roles)
            cuts = {parameter: cut for parameter in module.shapes}
        self.result.modules[name] = ModulePlan(name, style, cuts, why)

    def _plan_vocabulary(self) -> None:
        for name, style in ((self.facts.embedding, Style.EMBEDDING), (self.facts.head, Style.HEAD)):
            if name is None:
                continue
            module = self.facts.modules.get(name)
            if module is None or module.role != ("embedding" if style is Style.EMBEDDING else "linear"):
                kind = "not found" if module is None else module.type_name
                raise PlanError(
                    f"{name}: the vocabulary can be cut in an nn.Embedding and an nn.Linear only; it is {kind}"
                )
            cut = self._cut(name, 0, module.shapes["weight"][0], (Role.EVEN,))
            cuts = {parameter: cut for parameter in module.shapes}
            self.result.modules[name] = ModulePlan(name, style, cuts, "the vocabulary is always cut")

    def _place_the_rest(self) -> None:
        base = f"{self.facts.base}." if self.facts.base else ""
        for name, module in self.facts.modules.items():
            if name in self.result.modules:
                continue
            block = next((b for b in self.result.blocks if name == b or name.startswith(f"{b}.")), None)
            if block is not None:
                raise PlanError(
                    f"{name} ({module.type_name}) owns parameters {list(module.shapes)} in the sharded block {block}, but no plan "
                    f"says what becomes of it; {self.facts.model_type} needs a data file that does"
                )
            if not name.startswith(base) or name == self.facts.base:
                if name == self.facts.base or not name:
                    raise PlanError(
                        f"the model itself owns parameters {list(module.shapes)}; no plan says what becomes of them"
                    )
                self.result.outside.append(name)
                continue
            if name in self.result.layers:
                raise PlanError(
                    f"layer {name} itself owns parameters {list(module.shapes)}; no plan says what becomes of them"
                )
            self.result.tokenwise.append(name)

    def _block_of(self, name: str) -> BlockPlan:
        parent = name.rpartition(".")[0]
        layer = _layer_of(name)
        if layer is None or parent == layer:
            raise PlanError(f"{name}: a planned module must stand in a block (attention, MLP) of a numbered layer")
        if layer not in self.result.layers:
            self.result.layers.append(layer)
        return self.result.blocks.setdefault(parent, BlockPlan(parent))

    def _roles(self, name: str) -> tuple[Role, ...]:
        for pattern, words in self.family.roles.items():
            if _matches(self.facts.full_name(pattern), name):
                return tuple(Role(word) for word in words)
        return tuple(Role(word) for word in ROLES_BY_NAME.get(name.rpartition(".")[2], ("even",)))

    def _cut(self, name: str, dim: int, size: int, roles: tuple[Role, ...]) -> Cut:
        facts = self.facts
        sizes = {
            Role.QUERY: facts.num_heads * facts.head_dim,
            Role.KV: facts.num_kv_heads * facts.head_dim,
            Role.QKV: 3 * facts.num_heads * facts.head_dim,
        }
        evens = roles.count(Role.EVEN)
        left = size - sum(sizes[role] for role in roles if role is not Role.EVEN)
        if left < 0 or (left and not evens) or (evens and left % evens):
            raise PlanError(
                f"{name}: dimension {dim} of size {size} is not made of {[r.value for r in roles]} with "
                f"num_attention_heads={facts.num_heads}, num_key_value_heads={facts.num_kv_heads}, head_dim={facts.head_dim}"
            )
        ranges: list[list[tuple[int, int]]] = [[] for _ in range(self.tp_size)]
        start = 0
        for role in roles:
            width = left // evens if role is Role.EVEN else sizes[role]
            for rank, (a, b) in enumerate(self._bounds(name, role, width)):
                ranges[rank].append((start + a, start + b))
            start += width
        held = [piece for pieces in ranges for piece in pieces]
        if len(roles) > 1 and len(set(held)) < len(held):
            raise PlanError(
                f"{name}: {facts.num_kv_heads} kv heads over tp_size={self.tp_size} would be copied inside a weight that also holds "
                f"query heads, and DeepSpeed's gradient norm cannot count a part of a parameter once; use tp_size <= {facts.num_kv_heads}"
            )
        return Cut(dim, size, tuple(tuple(_joined(parts)) for parts in ranges))

    def _bounds(self, name: str, role: Role, width: int) -> list[tuple[int, int]]:
        if role is Role.EVEN:
            if width < self.tp_size:
                raise PlanError(
                    f"{name}: {width} features cannot be cut over tp_size={self.tp_size}; use at most {width}"
                )
            return even_bounds(width, self.tp_size)
        heads = self._head_partition()
        unit = self.facts.head_dim * (3 if role is Role.QKV else 1)
        counts = heads.kvs if role is Role.KV else heads.queries
        return [(a * unit, b * unit) for a, b in counts]

    def _head_partition(self) -> HeadPartition:
        if self.result.heads is None:
            self.result.heads = HeadPartition.of(self.facts.num_heads, self.facts.num_kv_heads, self.tp_size)
        return self.result.heads


def _style(word: str, name: str) -> Style:
    try:
        return Style(word)
    except ValueError:
        known = [style.value for style in Style]
        raise PlanError(
            f"{name}: style {word!r} has no sequence-parallel counterpart yet; known styles: {known}"
        ) from None


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None


def _layer_of(name: str) -> str | None:
    found = re.match(r"(.*?\.?[^.\d][^.]*\.\d+)\.", name)
    return found.group(1) if found else None


def _joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges made one, so that an uncut dimension is one range."""
    joined: list[tuple[int, int]] = []
    for start, stop in parts:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
