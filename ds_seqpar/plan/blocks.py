"""What becomes of one block of a layer, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import PlanError
from ..families import Family
from .cuts import Cut
from .facts import ModelFacts
from .model_plan import BlockPlan, ModelPlan, ModulePlan
from .patterns import matches, matches_in, starred
from .sections import Sections, UncuttableError
from .styles import CONVENTIONAL, NORMS_OVER_HEADS, ROLES_BY_NAME, ROUTER_NAMES, BlockKind, Role, Style
from .words import BY_NAME, TRANSFORMERS, USERS, Word, Words, data_file_of

__all__ = ["BlockPlanner"]

_CUT_ALIKE = (("gate_proj", "up_proj", "down_proj"), ("q_proj", "o_proj"), ("k_proj", "v_proj"))
"""Linears of one block whose cut dimensions meet."""


@dataclass(frozen=True)
class BlockPlanner:
    """Plans blocks into `result`. Raises PlanError for what the user's own plan leaves unsaid."""

    facts: ModelFacts
    family: Family
    words: Words
    sections: Sections
    result: ModelPlan

    def plan(self, name: str, members: list[str]) -> None:
        """Plans the block `name`, whose modules with parameters are `members`."""
        words = self.words.of
        planned = {m: words[m] for m in members if m in words}
        parameters = {
            m: {p: words[f"{m}.{p}"] for p in self.facts.modules[m].shapes if f"{m}.{p}" in words} for m in members
        }
        own = words.get(name)
        of_member = next((word for word in planned.values() if word[0] is Style.WHOLE and word[1] == data_file_of(self.facts)), None)
        whole = own if own is not None and own[0] is Style.WHOLE else of_member
        if whole is not None:
            return self.result.repeat_whole(name, members, whole[1])
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
        block.counts = self._head_counts(name, members)
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
            except UncuttableError as problem:
                if planned.get(module, (None, TRANSFORMERS))[1] != data_file_of(self.facts):
                    raise
                done, reason = False, str(problem)
            if not done:
                if exits and self._is_norm(module) and module not in planned:
                    self.result.tokenwise.append(module)  # after the block's reduce-scatter
                    continue
                left.append(module)
                break
        if not left and any(why == data_file_of(self.facts) for _, why in planned.values()) and not block.experts:
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
            return self.result.repeat_whole(name, members, why)
        self._refuse_torn(planned)
        self.result.blocks[name] = block
        return None

    def _refuse_torn(self, planned: Mapping[str, Word]) -> None:
        """A user's style that would hand a linear what it cannot multiply: its place in the block is said by its name."""
        for module, (style, why) in planned.items():
            leaf = module.rpartition(".")[2]
            if why != USERS or style is Style.WHOLE:
                continue
            entrance, exit_ = (
                leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
                leaf in ("o_proj", "down_proj"),
            )
            columns, rows = (Style.COLUMN, Style.PACKED_COLUMN, Style.HEAD), (Style.ROW, Style.ROW_OF_WHOLE)
            if (entrance and style not in columns) or (exit_ and style not in rows):
                fits = (
                    "reads the block's whole input: 'colwise'"
                    if entrance
                    else "reads this rank's heads or features: 'rowwise'"
                )
                raise PlanError(
                    f'{module}: style {style.value!r} of {USERS} does not fit, {leaf} {fits}, or plan the block as "whole"'
                )
            for others in _CUT_ALIKE:
                for other in others if leaf in others else ():
                    self._refuse_unlike(module, f"{module.rpartition('.')[0]}.{other}")

    def _refuse_unlike(self, module: str, other: str) -> None:
        """Raises PlanError if two weights that meet element by element are cut in different places."""
        cuts = [self.result.modules[name].cuts.get("weight") for name in (module, other) if name in self.result.modules]
        mine, theirs = cuts if len(cuts) == 2 else (None, None)
        if mine is not None and theirs is not None and mine.size == theirs.size and mine.ranges != theirs.ranges:
            raise PlanError(
                f"{module} and {other} must be cut in the same places, but by {USERS} the ranks hold {mine.ranges} and {theirs.ranges}; "
                "give both the same style and roles"
            )

    def _refuse_unsaid(self, block: BlockPlan, planned: Mapping[str, Word], left: list[str]) -> None:
        """A user who plans a block plans all of it: what he forgot must not become a slower block behind his back."""
        if not any(why == USERS for _, why in planned.values()):
            return
        if left:
            raise PlanError(
                f"{left[0]} ({self.facts.modules[left[0]].type_name}) stands in the planned block {block.name}, but the plan does not "
                f'say what becomes of it; add it, or plan {starred(block.name)!r} as "whole"'
            )
        raise PlanError(
            f"{block.name}: a block needs column-parallel and row-parallel linears, the plan names {block.columns} and {block.rows}"
        )

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
        if style is Style.TOKENWISE:  # behind the row-parallel linear
            self.result.tokenwise.append(name)
            self.result.asserted.add(name)
            return True
        if style is Style.EXPERTS or (parameters and style in (None, Style.LOCAL, Style.SUMMED)):
            return self._plan_parameters(block, name, parameters, why or TRANSFORMERS)
        if style is Style.LOCAL:
            style = None
        if style is None and self._plan_router(block, name):
            return True
        if style in (None, Style.PARTIAL, Style.CUT_NORM) and self._plan_norm_over_heads(block, name, style, why):
            return True
        named = is_attention and name == f"{block.name}.{leaf}" and leaf in ROLES_BY_NAME and module.role == "linear"
        if style is None and named:
            style, why = Style.COLUMN, BY_NAME
        summed = block.kind is not BlockKind.GROUPED  # what is not linear in a partial sum would be wrong there
        if style is Style.PARTIAL or (style is None and self._is_repeated(block, name, is_attention)):
            chosen = Style.LATENT if module.role == "linear" and not summed else Style.PARTIAL
            self.result.modules[name] = ModulePlan(name, chosen, {}, why or "repeated inside a sharded block")
            return True
        if style is Style.LATENT and not summed:
            self.result.modules[name] = ModulePlan(name, Style.LATENT, {}, why)
            return True
        if style in (None, Style.WHOLE, Style.LATENT):
            return False
        if style is Style.EMBEDDING_COLUMN and module.role == "embedding":
            cuts = {"weight": self.sections.cut(block, name, 1, module.shapes["weight"][1], self._roles(name))}
            self.result.modules[name] = ModulePlan(name, style, cuts, why)
            return True
        if style in (Style.EMBEDDING, Style.EMBEDDING_COLUMN):
            raise PlanError(f"{name}: style {style.value!r} is known for the vocabulary only, not inside the model")
        if module.role != "linear":
            raise PlanError(f"{name}: style {style.value!r} needs an nn.Linear, not {module.type_name}")
        return self._plan_linear(block, name, style, why, self._roles(name, is_attention))

    def _plan_router(self, block: BlockPlan, name: str) -> bool:
        """Plans a module of what chooses experts; False if it is none."""
        router = self._router_of(block, name)
        if router is None:
            return False
        if router not in self.result.routers:
            self.result.routers.append(router)
        self.result.modules[name] = ModulePlan(name, Style.ROUTER, {}, "chooses experts")
        return True

    def _plan_norm_over_heads(self, block: BlockPlan, name: str, style: Style | None, why: str) -> bool:
        """Plans an RMS norm over the width of all heads together, which is cut with them; False if it is none."""
        if style is Style.CUT_NORM and name.rpartition(".")[2] not in NORMS_OVER_HEADS:  # of what goes into a row-parallel linear
            cut = self.sections.cut(block, name, 0, self.facts.modules[name].shapes["weight"][0], self._roles(name))
            self.result.modules[name] = ModulePlan(name, Style.CUT_NORM, {"weight": cut}, why)
            return True
        leaf, width = name.rpartition(".")[2], self.facts.modules[name].shapes.get("weight", (0,))
        if leaf not in NORMS_OVER_HEADS:
            return False
        over = Role.KV if leaf.startswith("k") else Role.QUERY
        heads = block.counts[over is Role.KV]
        of_all = len(width) == 1 and heads > 1 and width[0] == self._projected(block.name, over)
        if style is not Style.CUT_NORM and not of_all:
            return False
        cuts = {"weight": self.sections.cut(block, name, 0, width[0], (over,))}
        self.result.modules[name] = ModulePlan(name, Style.CUT_NORM, cuts, why or "an RMS norm over all heads")
        return True

    def _is_repeated(self, block: BlockPlan, name: str, is_attention: bool) -> bool:
        """Whether every rank does the same with this module of a block, though nothing says so."""
        module = self.facts.modules[name]
        if block.kind is not BlockKind.GROUPED:
            return module.role == "linear" and module.shapes["weight"][0] == 1  # the weight of a shared expert
        inner = name.rpartition(".")[0] != block.name or name.endswith(("_a_proj", "_mqa"))
        return is_attention and (self._is_norm(name) or (module.role == "linear" and inner))

    def _plan_linear(self, block: BlockPlan, name: str, style: Style, why: str, roles: tuple[Role, ...]) -> bool:
        """Plans a linear that is cut; False if its name alone says so, and its size does not fit."""
        module = self.facts.modules[name]
        size = module.shapes["weight"]
        of_rows = style in (Style.ROW, Style.ROW_OF_WHOLE)
        if style is Style.PACKED_COLUMN and why == USERS and len(roles) == 1 and roles[0] is not Role.QKV:
            raise PlanError(
                f"{name}: 'packed_colwise' of {USERS} must say how the output is divided: the roles of its sections after a colon, such as "
                "'packed_colwise:q,kv,kv' for [query heads; key heads; value heads], 'packed_colwise:qkv' for one group of heads after "
                "another, or 'packed_colwise:even,even' for [gate; up]"
            )
        if why == BY_NAME and not self._fits(block, roles, size[of_rows]):
            return False
        block.has_heads |= roles[0] is not Role.EVEN
        rows, columns = (1, 0) if module.transposed else (0, 1)  # where weight [out, in] has its two
        if of_rows:
            block.rows.append(name)
            cuts = {"weight": self.sections.cut(block, name, columns, size[columns], roles)}
            style = Style.ROW
        else:
            block.columns.append(name)
            cut = self.sections.cut(block, name, rows, size[rows], roles)
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
        if all(words.get(key, (None, ""))[0] is Style.TOKENWISE for key in self.facts.modules[name].shapes):
            self.result.tokenwise.append(name)  # such as a bias that the layer adds to the block's output
            self.result.asserted.add(name)
            return True
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
            cuts[key] = self.sections.cut(block, f"{name}.{key}", dim, shape[dim], roles)
        style = Style.EXPERTS if name in block.experts else Style.LOCAL
        self.result.modules[name] = ModulePlan(name, style, cuts, why, tuple(once))
        return True

    def _fits(self, block: BlockPlan, roles: tuple[Role, ...], size: int) -> bool:
        """False if a linear of a usual name has not the model's heads, so that the name means something else here."""
        n, kv = block.counts
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
        for pattern, words in self.words.roles.items():
            if matches(pattern, name):
                return tuple(Role(word) for word in words)
        for pattern, words in self.family.roles.items():
            if matches_in(self.facts, pattern, name):
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
