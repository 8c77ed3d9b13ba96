"""From a model's facts to a plan for every module, or a PlanError before anything is touched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import PlanError
from ..families import Family
from .cuts import Cut
from .facts import ModelFacts, ModuleFacts
from .heads import HeadPartition, even_bounds
from .styles import CONVENTIONAL, NORMS_OVER_HEADS, ROLES_BY_NAME, ROUTER_NAMES, BlockKind, Role, Style

__all__ = ["BlockPlan", "ModelPlan", "ModulePlan", "matches", "resolve"]


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
    has_heads: bool = False
    heads: HeadPartition | None = None


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
        self.blocks[block] = BlockPlan(block, BlockKind.WHOLE)
        self.routers = [
            router for router in self.routers if router not in members and not router.startswith(f"{block}.")
        ]
        for module in members:
            self.modules[module] = ModulePlan(module, Style.WHOLE, {}, why)


Word = tuple[Style, str]
ANYWHERE = (Role.EVEN, Role.TILES, Role.PAIRS)
TRANSFORMERS, USERS, BY_NAME = (
    "transformers' tp_plan",
    "the plan in the ds_seqpar key",
    "its name is the usual one",
)


def resolve(facts: ModelFacts, family: Family, tp_size: int, users: Mapping[str, str] | None = None) -> ModelPlan:
    """Plans every module of the model. Raises PlanError with the name, the values and the way out.

    `users` is the user's own plan: full pattern -> style, with the roles of a packed weight's sections after a colon
    ("packed_colwise:q,kv,kv"). It goes before all others, and nothing in the blocks that it names may be left unsaid.
    """
    if family.refused:
        raise PlanError(f"model type {facts.model_type!r} cannot be sharded exactly: {family.refused}")
    if not facts.tp_plan and not family.styles and not users:
        raise PlanError(
            f"model type {facts.model_type!r} has no tp_plan in transformers, so what may be cut is not known; it cannot be "
            'sharded unless the "plan" field of the ds_seqpar key says how'
        )
    return _Planner(facts, family, tp_size, users or {}).plan()


class _Uncuttable(PlanError):
    """A weight is not made of the heads that the model has."""


class _Planner:
    def __init__(self, facts: ModelFacts, family: Family, tp_size: int, users: Mapping[str, str]) -> None:
        self.facts, self.family, self.tp_size, self.users = facts, family, tp_size, users
        self.users_roles: dict[str, tuple[str, ...]] = {}
        self.result = ModelPlan()
        self._by_file = f"data file of {facts.model_type}"
        self._counts = (0, 0)  # query and kv heads of the block that is being planned

    def plan(self) -> ModelPlan:
        words = self._words()
        self._find_layers(words)
        members = self._blocks()
        for name, modules in members.items():
            self._plan_block(name, modules, words)
        self._plan_vocabulary()
        self._place_the_rest({m for modules in members.values() for m in modules}, words)
        return self.result

    def _words(self) -> dict[str, Word]:
        """Module, parameter or block name -> style, from transformers' plan and, over it, the data file."""
        facts = self.facts
        found: dict[str, Word] = {}
        styles = {pattern: (word, TRANSFORMERS) for pattern, word in facts.tp_plan.items()}
        for pattern, word in self.family.styles.items():
            styles[facts.full_name(pattern)] = (word, self._by_file)
        for pattern, word in self.users.items():
            word, _, roles = word.partition(":")
            if roles:
                self.users_roles[pattern] = _roles_of(pattern, roles)
            styles[pattern] = (word, USERS)
        names = _all_names(facts.modules)
        for pattern, (word, why) in styles.items():
            hits = [name for name in names if matches(pattern, name)]
            if not hits and why != TRANSFORMERS:  # theirs is written for every configuration of the type
                close = difflib.get_close_matches(pattern, {_starred(name) for name in names}, n=3, cutoff=0.5)
                raise PlanError(
                    f"plan pattern {pattern!r} ({why}) matches no module of this {facts.model_type} model; near it are {close}"
                )
            for name in hits:
                if name in found and found[name][1] != why and why == USERS:
                    pass  # the user's word replaces transformers' and the data file's
                elif name in found:
                    raise PlanError(f"{name} is matched by two plan patterns; the second is {pattern!r} ({why})")
                found[name] = (_style(word, name), why)
        if not found:
            raise PlanError(f"no pattern of the plan matches a module of this {facts.model_type} model: {list(styles)}")
        return found

    def _find_layers(self, words: Mapping[str, Word]) -> None:
        """Layers are the numbered modules that hold planned ones, and their neighbours in the same list."""
        lists = {layer.rpartition(".")[0] for layer in map(_layer_of, words) if layer is not None}
        base = f"{self.facts.base}." if self.facts.base else ""
        for name in self.facts.modules:
            layer = _layer_of(f"{name}.")
            if (
                layer
                and layer.rpartition(".")[0] in lists
                and layer.startswith(base)
                and layer not in self.result.layers
            ):
                self.result.layers.append(layer)

    def _blocks(self) -> dict[str, list[str]]:
        """Child of a layer -> the modules with parameters in it (itself too)."""
        members: dict[str, list[str]] = {}
        for name in self.facts.modules:
            layer = _layer_of(name)
            if layer in self.result.layers:
                members.setdefault(self._block_of(layer, name), []).append(name)
        return members

    def _block_of(self, layer: str, name: str) -> str:
        parts = name.split(".")
        around = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        given = next((n for n in around if any(matches(self.facts.full_name(p), n) for p in self.family.blocks)), None)
        return given or _child_of(layer, name)

    def _plan_block(self, name: str, members: list[str], words: Mapping[str, Word]) -> None:
        planned = {m: words[m] for m in members if m in words}
        parameters = {
            m: {p: words[f"{m}.{p}"] for p in self.facts.modules[m].shapes if f"{m}.{p}" in words} for m in members
        }
        own = words.get(name)
        if own is not None and own[0] is Style.WHOLE:
            return self._whole(name, members, own[1])
        if own is not None and own[0] is Style.TOKENWISE:
            self.result.tokenwise.extend(members)
            self.result.asserted.update(members)
            return None
        if not planned and not any(parameters.values()):
            planned = self._conventional(name, members)
        if not planned and not any(parameters.values()):
            if members == [name] and len(self.facts.modules[name].shapes) and self._is_norm(name):
                self.result.tokenwise.append(name)
            else:
                self.result.blocks[name] = BlockPlan(name, BlockKind.UNDECIDED)
            return None
        block = BlockPlan(name)
        self._counts = self._head_counts(name, members)
        block.experts = [m for m in members if planned.get(m, (None, ""))[0] is Style.EXPERTS]
        if block.experts:
            block.kind = BlockKind.EXPERTS if block.experts == [name] else BlockKind.SUMMED
        for parent in {m.rpartition(".")[0] for m in members} - {name}:  # such as shared experts
            inner = [m for m in members if m.startswith(f"{parent}.")]
            if block.kind is BlockKind.SUMMED and not any(m in planned for m in inner):
                planned |= self._conventional(parent, inner)
        left, reason = [], ""
        exits = not any(
            style in (Style.COLUMN, Style.PACKED_COLUMN, Style.HEAD, Style.EXPERTS) for style, _ in planned.values()
        )
        is_attention = any(m.rpartition(".")[2] in ("o_proj", "k_proj", "kv_b_proj") for m in planned)
        for module in members:
            try:
                done = self._plan_module(block, module, planned.get(module), parameters[module], is_attention)
            except _Uncuttable as problem:
                if planned.get(module, (None, TRANSFORMERS))[1] != self._by_file:
                    raise
                done, reason = False, str(problem)
            if not done:
                if exits and self._is_norm(module) and module not in planned:
                    self.result.tokenwise.append(module)  # after the block's reduce-scatter
                    continue
                left.append(module)
                break
        if not left and any(why == self._by_file for _, why in planned.values()) and not block.experts:
            if block.columns and not block.rows:
                block.kind = BlockKind.ENTRY
            elif block.rows and not block.columns:
                block.kind = BlockKind.EXIT
        halves = block.kind in (BlockKind.ENTRY, BlockKind.EXIT)
        if left or not (halves or block.experts or (block.columns and block.rows)):
            self._refuse_unsaid(block, planned, left)
            for module in members:
                self.result.modules.pop(module, None)
            why = reason or "it has no row-parallel linear"
            if left and not reason:
                why = f"no plan says what becomes of {left[0]} ({self.facts.modules[left[0]].type_name})"
            self.result.remarks.append(f"{name} is repeated whole by every rank: {why}")
            return self._whole(name, members, why)
        self.result.blocks[name] = block
        return None

    def _refuse_unsaid(self, block: BlockPlan, planned: Mapping[str, Word], left: list[str]) -> None:
        """A user who plans a block plans all of it: what he forgot must not become a slower block behind his back."""
        if not any(why == USERS for _, why in planned.values()):
            return
        if left:
            raise PlanError(
                f"{left[0]} ({self.facts.modules[left[0]].type_name}) stands in the planned block {block.name}, but the plan does not "
                f'say what becomes of it; add it, or plan {_starred(block.name)!r} as "whole"'
            )
        raise PlanError(
            f"{block.name}: a block needs column-parallel and row-parallel linears, the plan names {block.columns} and {block.rows}"
        )

    def _whole(self, name: str, members: list[str], why: str) -> None:
        self.result.repeat_whole(name, members, why)

    def _conventional(self, name: str, members: list[str]) -> dict[str, Word]:
        """Styles for the linears that stand directly in `name`, if their names are the usual ones of such a block."""
        linears = {m: m.rpartition(".") for m in members if self.facts.modules[m].role == "linear"}
        for styles in CONVENTIONAL:
            rows = [m for m, (parent, _, leaf) in linears.items() if styles.get(leaf) is Style.ROW]
            if (
                linears
                and len(rows) == 1
                and all(parent == name and leaf in styles for parent, _, leaf in linears.values())
            ):
                return {m: (styles[leaf], BY_NAME) for m, (_, _, leaf) in linears.items()}
        return {}

    def _plan_module(
        self, block: BlockPlan, name: str, word: Word | None, parameters: Mapping[str, Word], is_attention: bool
    ) -> bool:
        """Plans one module of a block; False if nothing says what it is."""
        module, leaf = self.facts.modules[name], name.rpartition(".")[2]
        style, why = word or (None, "")
        if style is Style.EXPERTS or (parameters and style in (None, Style.LOCAL, Style.SUMMED)):
            return self._plan_parameters(block, name, parameters, why or TRANSFORMERS)
        if style is Style.LOCAL:
            style = None
        router = self._router_of(block, name) if style is None else None
        if router is not None:
            if router not in self.result.routers:
                self.result.routers.append(router)
            self.result.modules[name] = ModulePlan(name, Style.ROUTER, {}, "chooses experts")
            return True
        if style in (None, Style.PARTIAL, Style.CUT_NORM) and leaf in NORMS_OVER_HEADS:
            width = module.shapes.get("weight", (0,))
            over = Role.KV if leaf.startswith("k") else Role.QUERY
            heads = self._counts[over is Role.KV]
            if style is Style.CUT_NORM or (
                len(width) == 1 and heads > 1 and width[0] == self._projected(block.name, over)
            ):
                cuts = {"weight": self._cut(block, name, 0, width[0], (over,))}
                self.result.modules[name] = ModulePlan(name, Style.CUT_NORM, cuts, why or "an RMS norm over all heads")
                return True
        summed = block.kind is not BlockKind.GROUPED  # what is not linear in a partial sum would be wrong there
        inner = name.rpartition(".")[0] != block.name or leaf.endswith(("_a_proj", "_mqa"))
        known = not summed and is_attention and (self._is_norm(name) or (module.role == "linear" and inner))
        known |= summed and module.role == "linear" and module.shapes["weight"][0] == 1  # the weight of a shared expert
        if (
            style is None
            and is_attention
            and name == f"{block.name}.{leaf}"
            and leaf in ROLES_BY_NAME
            and module.role == "linear"
        ):
            style, why = Style.COLUMN, BY_NAME
        if style is Style.PARTIAL or (style is None and known):
            chosen = Style.LATENT if module.role == "linear" and not summed else Style.PARTIAL
            self.result.modules[name] = ModulePlan(name, chosen, {}, why or "repeated inside a sharded block")
            return True
        if style is Style.LATENT and not summed:
            self.result.modules[name] = ModulePlan(name, Style.LATENT, {}, why)
            return True
        if style in (None, Style.WHOLE, Style.LATENT):
            return False
        if style is Style.EMBEDDING:
            raise PlanError(f"{name}: style {style.value!r} is known for the vocabulary only, not inside the model")
        if module.role != "linear":
            raise PlanError(f"{name}: style {style.value!r} needs an nn.Linear, not {module.type_name}")
        roles = self._roles(name, is_attention)
        if why == BY_NAME and not self._fits(roles, module.shapes["weight"][style in (Style.ROW, Style.ROW_OF_WHOLE)]):
            return False
        block.has_heads |= roles[0] is not Role.EVEN
        rows, columns = (1, 0) if module.transposed else (0, 1)  # where weight [out, in] has its two
        if style in (Style.ROW, Style.ROW_OF_WHOLE):
            block.rows.append(name)
            cuts = {"weight": self._cut(block, name, columns, module.shapes["weight"][columns], roles)}
            style = Style.ROW
        else:
            block.columns.append(name)
            cut = self._cut(block, name, rows, module.shapes["weight"][rows], roles)
            cuts = {
                key: Cut(min(cut.dim, len(shape) - 1), cut.size, cut.ranges) for key, shape in module.shapes.items()
            }
            style = Style.PACKED_COLUMN if style is Style.PACKED_COLUMN else Style.COLUMN
        self.result.modules[name] = ModulePlan(name, style, cuts, why)
        return True

    def _router_of(self, block: BlockPlan, name: str) -> str | None:
        """The module in a mixture of experts that chooses among them and holds `name`, or is it."""
        if block.kind is not BlockKind.SUMMED:
            return None
        parts = name[len(block.name) + 1 :].split(".")
        at = next((i for i, part in enumerate(parts) if part in ROUTER_NAMES), None)
        return None if at is None else ".".join([block.name, *parts[: at + 1]])

    def _plan_parameters(self, block: BlockPlan, name: str, words: Mapping[str, Word], why: str) -> bool:
        """A module whose parameters are planned one by one: experts [E, out, in], attention sinks [heads]."""
        cuts, once = {}, []
        for key, shape in self.facts.modules[name].shapes.items():
            if key not in words:
                return False
            style = words[key][0]
            if style is Style.ONCE:
                once.append(key)
                continue
            column = style in (Style.COLUMN, Style.PACKED_COLUMN)
            dim = len(shape) - 2 if column and len(shape) == 3 else len(shape) - 1
            roles = self._roles(f"{name}.{key}")
            if len(shape) > 1:
                packed = "gate_up" in key or style in (Style.PACKED_COLUMN, Style.PACKED_ROW)
                interleaved = packed and self.facts.modules[name].interleaved
                roles = (Role.PAIRS,) if interleaved else (Role.TILES,) * (1 + packed)
            block.has_heads |= roles[0] in (Role.QUERY, Role.KV)
            cuts[key] = self._cut(block, f"{name}.{key}", dim, shape[dim], roles)
        style = Style.EXPERTS if name in block.experts else Style.LOCAL
        self.result.modules[name] = ModulePlan(name, style, cuts, why, tuple(once))
        return True

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
            if set(module.shapes) - {"weight", "bias"}:
                raise PlanError(
                    f"{name} ({module.type_name}) owns {sorted(module.shapes)}; only an embedding or head of a weight (and bias) can be cut"
                )
            cut = self._cut(None, name, 0, module.shapes["weight"][0], (Role.EVEN,))
            cuts = {parameter: cut for parameter in module.shapes}
            self.result.modules[name] = ModulePlan(name, style, cuts, "the vocabulary is always cut")

    def _place_the_rest(self, in_layers: set[str], words: Mapping[str, Word]) -> None:
        base = f"{self.facts.base}." if self.facts.base else ""
        for name, module in self.facts.modules.items():
            if name in self.result.modules or name in in_layers:
                continue
            if name in self.result.layers:
                unknown = [key for key in module.shapes if key not in self.family.layer_parameters]
                if unknown:
                    raise PlanError(f"layer {name} itself owns parameters {unknown}; no plan says what becomes of them")
                self.result.tokenwise.append(name)
            elif name.startswith(f"{self.facts.embedding}."):
                self.result.tokenwise.append(name)
            elif name.startswith(base) and name != self.facts.base:
                self.result.between.append(name)
                if words.get(name, (None, ""))[0] in (Style.COLUMN, Style.ROW, Style.PACKED_COLUMN):
                    raise PlanError(
                        f"{name}: a planned module must stand in a block (attention, MLP) of a numbered layer ({words[name][1]})"
                    )
                if words.get(name, (None, ""))[0] is Style.WHOLE:
                    self.result.modules[name] = ModulePlan(name, Style.WHOLE, {}, words[name][1])
            else:
                self.result.outside.append(name)

    def _fits(self, roles: tuple[Role, ...], size: int) -> bool:
        """False if a linear of a usual name has not the model's heads, so that the name means something else here."""
        n, kv = self._counts
        count = {Role.QUERY: n, Role.KV: kv}.get(roles[0], 1)
        return count > 0 and size % count == 0

    def _is_norm(self, name: str) -> bool:
        module = self.facts.modules[name]
        return (
            module.role == "other"
            and all(len(shape) == 1 for shape in module.shapes.values())
            and "weight" in module.shapes
        )

    def _projected(self, block: str, role: Role) -> int | None:
        projection = self.facts.modules.get(f"{block}.{'q' if role is Role.QUERY else 'k'}_proj")
        return projection.shapes["weight"][0] if projection is not None else None

    def _roles(self, name: str, is_attention: bool = False) -> tuple[Role, ...]:
        for pattern, words in self.users_roles.items():
            if matches(pattern, name):
                return tuple(Role(word) for word in words)
        for pattern, words in self.family.roles.items():
            if matches(self.facts.full_name(pattern), name):
                return tuple(Role(word) for word in words)
        leaf = name.rpartition(".")[2]
        if is_attention and leaf in (
            "gate_proj",
            "dense",
            "out_proj",
        ):  # a gate of the heads' outputs, or what mixes them
            return (Role.QUERY,)
        if leaf == "gate_up_proj":
            return (Role.EVEN, Role.EVEN)
        return tuple(Role(word) for word in ROLES_BY_NAME.get(leaf, ("even",)))

    def _head_counts(self, name: str, members: list[str]) -> tuple[int, int]:
        n, kv = self.facts.heads_of(name)
        # Latent attention expands the latent to one key and value a head.
        return (n, n) if any(m.rpartition(".")[2] == "kv_b_proj" for m in members) else (n, kv)

    def _cut(self, block: BlockPlan | None, name: str, dim: int, size: int, roles: tuple[Role, ...]) -> Cut:
        n, kv = self._counts if block is not None else (0, 0)
        widths = self._widths(name, dim, size, roles, n, kv)
        ranges: list[list[tuple[int, int]]] = [[] for _ in range(self.tp_size)]
        start = 0
        for role, width in zip(roles, widths, strict=True):
            for rank, (a, b) in enumerate(self._bounds(block, name, role, width, n, kv)):
                ranges[rank].append((start + a, start + b))
            start += width
        held = [piece for pieces in ranges for piece in pieces]
        if len(roles) > 1 and len(set(held)) < len(held):
            raise PlanError(
                f"{name}: {kv} kv heads over tp_size={self.tp_size} would be copied inside a weight that also holds "
                f"query heads, and DeepSpeed's gradient norm cannot count a part of a parameter once; use tp_size <= {kv}"
            )
        return Cut(dim, size, tuple(tuple(_joined(parts)) for parts in ranges))

    def _widths(self, name: str, dim: int, size: int, roles: tuple[Role, ...], n: int, kv: int) -> list[int]:
        """The size of each section. One section may have heads of any size; of several, all heads are head_dim wide."""
        d = self.facts.head_dim
        sizes = {Role.QUERY: n * d, Role.KV: kv * d, Role.QKV: 3 * n * d}
        if len(roles) == 1 and roles[0] in (Role.QUERY, Role.KV):
            count = n if roles[0] is Role.QUERY else kv
            if count and size % count == 0:
                return [size]
        evens = sum(role in ANYWHERE for role in roles)
        left = size - sum(sizes.get(role, 0) for role in roles)
        if left < 0 or (left and not evens) or (evens and left % evens):
            raise _Uncuttable(
                f"{name}: dimension {dim} of size {size} is not made of {[r.value for r in roles]} with "
                f"num_attention_heads={n}, num_key_value_heads={kv}, head_dim={d}"
            )
        return [sizes.get(role, left // evens if evens else 0) for role in roles]

    def _bounds(
        self, block: BlockPlan | None, name: str, role: Role, width: int, n: int, kv: int
    ) -> list[tuple[int, int]]:
        if role in ANYWHERE:
            unit = 2 if role is Role.PAIRS else 1
            if role is not Role.EVEN and width % (8 * unit) == 0 and width // (8 * unit) >= self.tp_size:
                unit *= 8
            if width // unit < self.tp_size:
                raise PlanError(
                    f"{name}: {width} features cannot be cut over tp_size={self.tp_size}; use at most {width // unit}"
                )
            return [(a * unit, b * unit) for a, b in even_bounds(width // unit, self.tp_size)]
        assert block is not None
        if block.heads is None:
            block.heads = HeadPartition.of(n, kv, self.tp_size)
        counts = block.heads.kvs if role is Role.KV else block.heads.queries
        unit = width // (kv if role is Role.KV else n)
        return [(a * unit, b * unit) for a, b in counts]


def _all_names(modules: Mapping[str, ModuleFacts]) -> list[str]:
    """Names that a pattern may match: modules with parameters, the modules around them, and the parameters."""
    names: dict[str, None] = {}
    for name, module in modules.items():
        parts = name.split(".")
        names.update({".".join(parts[:i]): None for i in range(1, len(parts) + 1)})
        names.update({f"{name}.{key}" if name else key: None for key in module.shapes})
    return list(names)


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _roles_of(pattern: str, words: str) -> tuple[str, ...]:
    roles = tuple(word.strip() for word in words.split(","))
    known = [role.value for role in Role]
    unknown = [role for role in roles if role not in known]
    if unknown:
        raise PlanError(f"plan pattern {pattern!r}: unknown role(s) {unknown} after the colon; known roles: {known}")
    return roles


def _style(word: str, name: str) -> Style:
    try:
        return Style(word)
    except ValueError:
        known = [style.value for style in Style]
        raise PlanError(
            f"{name}: style {word!r} has no sequence-parallel counterpart yet; known styles: {known}"
        ) from None


def matches(pattern: str, name: str) -> bool:
    """True if `name` is `pattern` with each `*` standing for one part of it."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None


def _layer_of(name: str) -> str | None:
    found = re.match(r"(.*?\.?[^.\d][^.]*\.\d+)\.", name)
    return found.group(1) if found else None


def _child_of(layer: str, name: str) -> str:
    """The child of `layer` that holds `name`; in a list of children, the one by number."""
    child, *rest = name[len(layer) + 1 :].split(".")
    return f"{layer}.{child}.{rest[0]}" if rest and rest[0].isdigit() else f"{layer}.{child}"


def _joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges made one, so that an uncut dimension is one range."""
    joined: list[tuple[int, int]] = []
    for start, stop in parts:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
