"""From a model's facts to a plan for every module, or a PlanError before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import PlanError
from ..families import Family
from .blocks import BlockPlanner
from .cuts import Cut
from .facts import ModelFacts
from .model_plan import ModelPlan, ModulePlan
from .patterns import child_of, layer_of, matches_in, starred
from .sections import Sections
from .styles import Role, Style
from .words import Word, read_words

__all__ = ["resolve"]


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


class _Planner:
    def __init__(self, facts: ModelFacts, family: Family, tp_size: int, users: Mapping[str, str]) -> None:
        self.facts, self.family, self.users = facts, family, users
        self.sections = Sections(tp_size, facts.head_dim)
        self.result = ModelPlan()

    def plan(self) -> ModelPlan:
        words = read_words(self.facts, self.family, self.users)
        self._find_layers(words.of)
        if not self.result.layers:
            planned = ", ".join(sorted(set(map(starred, words.of)))) or "empty"
            raise PlanError(
                f"model type {self.facts.model_type!r}: its plan, {planned}, names no module of a layer of the language model, so nothing "
                'in the layers would be divided; the "plan" field of the ds_seqpar key can say which linears are "colwise" and "rowwise"'
            )
        members = self._blocks()
        planner = BlockPlanner(self.facts, self.family, words, self.sections, self.result)
        for name, modules in members.items():
            planner.plan(name, modules)
        self._plan_vocabulary()
        self._place_the_rest({m for modules in members.values() for m in modules}, words.of)
        return self.result

    def _find_layers(self, words: Mapping[str, Word]) -> None:
        """Layers are the numbered modules that hold planned ones, and their neighbours in the same list."""
        lists = {layer.rpartition(".")[0] for layer in map(layer_of, words) if layer is not None}
        for name in self.facts.modules:
            layer = layer_of(f"{name}.")
            if layer and layer.rpartition(".")[0] in lists and self._in_base(layer) and layer not in self.result.layers:
                self.result.layers.append(layer)

    def _in_base(self, name: str) -> bool:
        """True if the module `name` stands in the base model, or in one of its stacks."""
        return any(name.startswith(f"{base}." if base else "") and name != base for base in self.facts.bases)

    def _blocks(self) -> dict[str, list[str]]:
        """Child of a layer -> the modules with parameters in it (itself too)."""
        members: dict[str, list[str]] = {}
        for name in self.facts.modules:
            layer = layer_of(name)
            if layer in self.result.layers:
                members.setdefault(self._block_of(layer, name), []).append(name)
        return members

    def _block_of(self, layer: str, name: str) -> str:
        parts = name.split(".")
        around = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        given = next((n for n in around if any(matches_in(self.facts, p, n) for p in self.family.blocks)), None)
        return given or child_of(layer, name)

    def _tables(self) -> list[str]:
        """The embeddings over the vocabulary."""
        return [name for name in (self.facts.embedding, *self.facts.more_embeddings) if name is not None]

    def _plan_vocabulary(self) -> None:
        tables = self._tables()
        head = () if self.facts.head is None else (self.facts.head,)
        held: dict[str, Cut] = {}
        for name, style in (*((t, Style.EMBEDDING) for t in tables), *((h, Style.HEAD) for h in head)):
            module = self.facts.modules.get(name)
            if module is None or module.role != ("embedding" if style is Style.EMBEDDING else "linear"):
                kind = "not found" if module is None else module.type_name
                raise PlanError(
                    f"{name}: the vocabulary can be cut in an nn.Embedding and an nn.Linear only; it is {kind}"
                )
            more = sorted(set(module.shapes) - {"weight", "bias"})
            if more and style is Style.HEAD:
                raise PlanError(
                    f"{name} ({module.type_name}) owns {more}; only a head of a weight (and bias) can be cut"
                )
            cut = self.sections.cut(None, name, 0, module.shapes["weight"][0], (Role.EVEN,))
            cuts = {parameter: cut for parameter in module.shapes if parameter not in more}
            self.result.modules[name] = ModulePlan(name, style, cuts, "the vocabulary is always cut")
            held |= {self._first(f"{name}.{key}"): cut for key, cut in cuts.items()}
        self._plan_tied(held)
        if self.facts.embedding is None:
            self.result.remarks.append(
                "no input embedding was found; what makes the hidden states is repeated by every rank"
            )

    def _first(self, parameter: str) -> str:
        return self.facts.tied.get(parameter, parameter)

    def _plan_tied(self, held: Mapping[str, Cut]) -> None:
        """A module that also holds a parameter of the vocabulary, such as the head's bias, holds its part of it."""
        for name, module in self.facts.modules.items():
            cuts = {key: held.get(self._first(f"{name}.{key}")) for key in module.shapes}
            if name in self.result.modules or not any(cuts.values()):
                continue
            if module.role == "linear" or not all(cuts.values()):
                raise PlanError(
                    f"{name} ({module.type_name}) shares {[key for key, cut in cuts.items() if cut]} with the embedding or the head, "
                    "which are cut by vocabulary; untie it"
                )
            shared = {key: cut for key, cut in cuts.items() if cut is not None}
            style, why = Style.SHARED, "shared with the head"
            if module.role == "embedding":  # the table from which the stacks' own are tied, such as Marian's
                style, why = Style.EMBEDDING, "the vocabulary is always cut"
            self.result.modules[name] = ModulePlan(name, style, shared, why)

    def _place_the_rest(self, in_layers: set[str], words: Mapping[str, Word]) -> None:
        tables = self._tables()
        for name, module in self.facts.modules.items():
            if name in self.result.modules or name in in_layers:
                continue
            if name in self.result.layers:
                unknown = [key for key in module.shapes if key not in self.family.layer_parameters]
                if unknown:
                    raise PlanError(f"layer {name} itself owns parameters {unknown}; no plan says what becomes of them")
                self.result.tokenwise.append(name)
            elif any(name.startswith(f"{table}.") for table in tables):
                self.result.tokenwise.append(name)
            elif self._in_base(name):
                self.result.between.append(name)
                if words.get(name, (None, ""))[0] in (Style.COLUMN, Style.ROW, Style.PACKED_COLUMN):
                    raise PlanError(
                        f"{name}: a planned module must stand in a block (attention, MLP) of a numbered layer ({words[name][1]})"
                    )
                if words.get(name, (None, ""))[0] is Style.WHOLE:
                    self.result.modules[name] = ModulePlan(name, Style.WHOLE, {}, words[name][1])
            else:
                self.result.outside.append(name)
