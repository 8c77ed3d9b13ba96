"""Shards a model in place: plan + groups + model -> Report. The only place that swaps modules.

Everything that can be refused is refused before the first parameter is touched.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from typing import Any

from torch import nn

from .adapters import shard_adapters
from .checkpoint.gathering import part_of
from .comm.exchange import Exchange
from .config import Overlap, Recompute, SeqParConfig
from .families import TESTED, family
from .groups import ParallelGroups
from .kernels.adjacent import lay_side_by_side
from .kernels.gating import known_activation
from .layers.adapters import PassesHandles, TakesHandles
from .layers.blocks import (
    AddedOnce,
    ExpertsBlock,
    FirstRankOnly,
    HeadInputs,
    InnerModule,
    PartialSumLinear,
    ReplicatedModule,
    Router,
    SummedBlock,
    WholeBlock,
    draws_random_numbers,
)
from .layers.boundaries import ShardedBlock, ShardedLayer, TokenDropout, TokenwiseModule
from .layers.conv1d import ColumnParallelConv1D, RowParallelConv1D
from .layers.embedding import VocabParallelEmbedding
from .layers.gating import DeferredActivation
from .layers.guard import InputGuard
from .layers.head import VocabParallelHead
from .layers.linear import ColumnParallelLinear, RowParallelLinear
from .layers.masking import answer_known_positions
from .layers.models import ShardedModel, ShardedTopModel
from .layers.norm import CutRMSNorm, FusedRMSNorm, rms_norm_epsilon
from .layers.partial import PartialGradients
from .layers.passages import HidesHandles, Passage
from .layers.random import ParallelRandom
from .layers.region import ShardingState
from .layers.rotary import fuse_rotary
from .layers.surgery import become
from .layers.tokenwise import is_tokenwise
from .layers.whole import remember
from .parameter_hooks import refuse_post_hooks, serve_hooks
from .plan.cuts import Cut, Kind
from .plan.facts import ModelFacts
from .plan.model_plan import BlockPlan, ModelPlan
from .plan.patterns import matches_in
from .plan.report import Entry, ParameterEntry, Report
from .plan.styles import BlockKind, Style
from .plan.wrappers import adapter_layer, inner_model_path, is_foreign, places, runs_copies
from .planning import PartlyLoaded, cuts_of, forget_whole_shape, parts_of, plan_of
from .preconditions import (
    check_modules,
    holds,
    module_at,
    refuse_different_weights,
    refuse_unfit,
    require_parts,
    width_of,
)

__all__ = ["inject", "report_of", "see_through"]

QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
"""Attributes of an attention module from which its own code takes the number of heads it views its projections as."""


def inject(
    model: nn.Module,
    facts: ModelFacts,
    config: SeqParConfig,
    groups: ParallelGroups,
    *,
    loaded: PartlyLoaded | None = None,
    has_values: bool = True,
) -> Report:
    """Shards `model` over `groups.tp_group` in place; every nn.Parameter stays the object it is and holds this rank's part.

    Args:
        model: a Hugging Face model, whole and equal on every rank, before any forward and any wrapper.
        facts: `hf.describe(model)`.
        loaded: of a model that was loaded in parts, whose cut parameters hold this rank's already; `facts` is of the whole model.
        has_values: False for a model that is only planned with, whose parameters are fake tensors: nothing can be compared.

    Returns:
        The Report, also kept as `model.seqpar_report`.

    Raises:
        PlanError: the model cannot be sharded exactly; nothing of it was touched.
    """
    if has_values:
        refuse_unfit(model)
        if groups.tp_size > 1:
            refuse_post_hooks(model)
    plan = plan_of(model, facts, groups.tp_size, config.plan)
    parts: set[int] = set()
    if loaded is not None:
        loaded.require(cuts_of(plan), config.plan)
        require_parts(model, loaded, groups.tp_rank)
        parts = {id(parameter) for _, parameter, _ in parts_of(model, loaded.cuts)}
    check_modules(model, facts, plan)
    if has_values:
        refuse_different_weights(model, groups, parts)
    report = Report(facts.model_type, groups.tp_size, groups.tp_rank, config.sequence_parallel)
    state = ShardingState(
        groups=groups,
        sequence_parallel=config.sequence_parallel,
        exchange=Exchange(groups.tp_group, groups.tp_cpu_group, config.overlap is Overlap.AUTO, report.remark_later),
        recompute_mlp=config.recompute is Recompute.SELECTIVE,
        loss_chunk_tokens=config.loss_chunk_tokens,
        partial=PartialGradients(groups.tp_group),
        random=ParallelRandom(groups),
        guard=InputGuard(groups),
        materialised=report.materialised,
    )
    for parameter in model.parameters() if loaded is not None else ():
        forget_whole_shape(parameter)
    _Injection(model, facts, plan, state, report, parts).run()
    entries = report.parameters()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state.entries[id(parameter)] = entries[name]
        remember(parameter, entries[name], groups)
    for parameter in model.parameters() if groups.tp_size > 1 else ():
        if (cut := state.entries[id(parameter)].cut) is not None:
            serve_hooks(parameter, cut, groups)
    untested = [name for name in dict.fromkeys((facts.model_type, facts.text_type)) if name not in TESTED]
    if untested:
        report.remarks.append(
            f"{untested[0]} is not among the {len(TESTED)} model types that are tested (python -m ds_seqpar families lists them); "
            "compare one step with the unsharded model before you rely on it"
        )
    model.seqpar_report = report  # type: ignore[assignment]
    model.seqpar = state  # type: ignore[assignment]
    return report


def see_through(wrapper: nn.Module) -> None:
    """Lets a known wrapper hand on what the sharded model inside it returns."""
    path, outer = inner_model_path(wrapper), wrapper
    for name in (path or "").split("."):
        become(outer, HidesHandles)
        outer = getattr(outer, name)


def report_of(model: nn.Module) -> Report | None:
    """The Report of a sharded model, also inside a known wrapper; None for any other."""
    path = inner_model_path(model)
    report = vars(model if path is None else model.get_submodule(path)).get("seqpar_report")
    return report if isinstance(report, Report) else None


class _ConfigView:
    """A block's view of the model's config: a few local counts, everything else read through at the time it is asked for."""

    def __init__(self, config: Any, local: dict[str, int]) -> None:
        self.__dict__["_config"], self.__dict__["_local"] = config, local

    def __getattr__(self, name: str) -> Any:
        local = self.__dict__["_local"]
        return local[name] if name in local else getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ConfigView:
        return _ConfigView(copy.deepcopy(self.__dict__["_config"], memo), dict(self.__dict__["_local"]))


class _Injection:
    def __init__(
        self,
        model: nn.Module,
        facts: ModelFacts,
        plan: ModelPlan,
        state: ShardingState,
        report: Report,
        parts: set[int],
    ) -> None:
        self.model, self.facts, self.plan, self.state = model, facts, plan, state
        self.entries, self.remarks = report.entries, report.remarks
        self._cut_already = set(parts)
        self._by_hook: set[int] = set()  # parameters that a hook sums at ZeRO 3: some module has no way to sum its own use
        self.fused: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()  # part of the model -> how many parameters of it are left alone

    def run(self) -> None:
        for name in self.facts.modules:
            outer = self.model.get_submodule(name)
            for path, module in places(outer).items():
                self._module(name, path, module)
            if runs_copies(outer):
                become(outer, PassesHandles)
        self._sum_by_use()
        for block in self.plan.blocks.values():
            self._block(block)
        for name in self.plan.routers:
            self._boundary(self.model.get_submodule(name), Router)
        self.remarks += self.plan.remarks
        for name, count in self.outside.items():
            part = type(self.model.get_submodule(name)).__name__
            self.remarks.append(
                f"{name or 'the model itself'} ({part}, {count:,} parameters) was left alone: it stands outside the base model and "
                "sees whole activations, alike on every rank"
            )
        token_inputs = family(self.facts.data_file).token_inputs
        for name in self.plan.layers:
            layer = self.model.get_submodule(name)
            layer.token_inputs = token_inputs  # type: ignore[assignment]
            self._boundary(layer, ShardedLayer)
        self._fuse_norms()
        for stream, name in enumerate(self.facts.bases):
            base = self.model.get_submodule(name)
            base.hidden_size = self.facts.hidden_size  # type: ignore[assignment]
            base.pads = family(self.facts.data_file).pads  # type: ignore[assignment]
            base.repeats_states = family(self.facts.data_file).repeats_states  # type: ignore[assignment]
            base.states, base.stream = family(self.facts.data_file).states, stream  # type: ignore[assignment]
            self._boundary(base, ShardedModel)
            inside = (self.model.get_submodule(layer) for layer in self.plan.layers if not name or holds(name, layer))
            self.state.partial.find_places(base, inside)
        answer_known_positions()
        if "" not in self.facts.bases:
            self._boundary(self.model, ShardedTopModel)
        self._between_boundaries()
        around = self.facts.base.split(".")[:-1]
        for depth in range(1, len(around) + 1):  # such as a vision-language model without its head
            module = self.model.get_submodule(".".join(around[:depth]))
            if not isinstance(module, HidesHandles):
                become(module, HidesHandles)

    def _between_boundaries(self) -> None:
        """What stands outside the layers and is no boundary itself: dropouts, and modules that handles go through."""
        planned = [*self.facts.modules, *self.plan.layers]
        for name, module in self.model.named_modules():
            if "seqpar" in vars(module) or any(holds(layer, name) for layer in self.plan.layers):
                continue
            in_base = any(holds(base, name) if base else True for base in self.facts.bases)
            if not in_base and self.facts.has_other_parts:
                continue  # a tower, whose tokens are not these
            if isinstance(module, nn.Dropout):
                self._boundary(module, TokenDropout)
            elif in_base and self._is_norm_without_weight(module):
                self._boundary(module, TokenwiseModule)
            elif isinstance(module, nn.ModuleList | nn.ModuleDict) or is_foreign(module) or adapter_layer(module):
                continue  # never called, or has boundaries of its own
            elif not in_base or any(inner.startswith(f"{name}.") for inner in planned) or _holds_nothing(module):
                self._boundary(module, Passage)

    def _is_norm_without_weight(self, module: nn.Module) -> bool:
        if "Norm" not in type(module).__name__ or next(module.parameters(), None) is not None:
            return False
        like = next(self.model.get_submodule(self.facts.base).parameters())
        return is_tokenwise(module, self.facts.hidden_size, like)

    def _fuse_norms(self) -> None:
        own_code: Counter[str] = Counter()
        before_blocks = {id(child) for name in self.plan.layers for child in self.model.get_submodule(name).children()}
        for module in (m for base in self.facts.bases for m in self.model.get_submodule(base).modules()):
            eps = rms_norm_epsilon(module)
            if eps is None and "Norm" in type(module).__name__:
                own_code[type(module).__name__] += 1
            if eps is not None:
                self.fused["RMS norms"] += 1
                module.fused_eps = eps  # type: ignore[assignment]
                module.weight_is_partial = self.state.partial.take_over(module.weight)  # type: ignore[assignment, arg-type]
                module.stands_before_blocks = id(module) in before_blocks  # type: ignore[assignment]
                self._boundary(module, FusedRMSNorm)
        if self.fused:
            self.remarks.append("fused: " + ", ".join(f"{count} {what}" for what, count in self.fused.items() if count))
        if own_code:
            listed = ", ".join(f"{count} {name}" for name, count in own_code.items())
            self.remarks.append(f"norms that run their own code: {listed}")

    def _defer_activation(self, block: nn.Module) -> None:
        for child in block.children():
            if isinstance(child, nn.Dropout):  # may stand between the product and the row-parallel linear
                become(child, TakesHandles)
            act = None if list(child.parameters()) or not callable(child) else _known_activation(child)
            if act is not None and not isinstance(child, DeferredActivation):
                self.fused[f"{act} activations with their products"] += 1
                child.act_name = act  # type: ignore[assignment]
                self._boundary(child, DeferredActivation)

    def _part_of(self, name: str) -> str:
        """The largest part of the model that holds the module `name` and nothing of the base model."""
        parts = name.split(".")
        around = (".".join(parts[:i]) for i in range(1, len(parts)))
        return next((part for part in around if not holds(part, self.facts.base)), name)

    def _boundary(self, module: nn.Module, mixin: type) -> None:
        module.seqpar = self.state  # type: ignore[assignment]
        become(module, mixin)

    def _module(self, name: str, path: str, module: nn.Module) -> None:
        """One planned module; it stands at `path` in what goes by its name."""
        was = self.facts.modules[name].type_name
        planned = self.plan.modules.get(name)
        if planned is None or planned.style is Style.WHOLE:
            self._unplanned(name, path, module, was)
            return
        parameters = {}
        self._summed = any(holds(b.name, name) and b.kind is BlockKind.SUMMED for b in self.plan.blocks.values())
        for key, parameter in module.named_parameters(recurse=False):
            parameters[key] = self._parameter(parameter, planned.cuts.get(key), planned.style)
        module.seqpar = self.state  # type: ignore[assignment]
        becomes = self._swap(name, module, planned.style, planned.cuts)
        outer = self.model.get_submodule(name)
        self.entries.append(Entry(name + path, was, becomes, parameters, planned.why))
        self.entries += shard_adapters(
            name, outer, planned.style, planned.cuts, self.state, self._parameter, summed=self._summed
        )

    def _unplanned(self, name: str, path: str, module: nn.Module, was: str) -> None:
        whole = next((b for b in self.plan.blocks.values() if holds(b.name, name) and b.kind is BlockKind.WHOLE), None)
        tokenwise = name in self.plan.tokenwise
        if tokenwise:
            why = "acts on each token alone"
        elif whole is not None:
            why = f"{whole.name} is repeated whole by every rank"
        elif name in self.plan.between:
            width = width_of(module, self.facts.hidden_size)
            tokenwise = name not in self.plan.modules and is_tokenwise(module, width)
            why = "acts on each token alone" if tokenwise else "between the layers; every rank repeats it on all tokens"
            self._boundary(module, TokenwiseModule if tokenwise else ReplicatedModule)
        elif self._is_token_head(module):
            tokenwise, why = True, "outside the base model; acts on each token alone"
            self._boundary(module, TokenwiseModule)
        else:
            why = "outside the base model; left alone, it sees whole activations"
            self.outside[self._part_of(name)] += sum(p.numel() for p in module.parameters(recurse=False))
        partial = tokenwise and self.state.sequence_parallel
        parameters = {}
        for key, parameter in module.named_parameters(recurse=False):
            if partial:
                self._sum(parameter, by_hook=not isinstance(module, TokenwiseModule))
            shape = tuple(parameter.shape)
            parameters[key] = ParameterEntry(Kind.PARTIAL if partial else Kind.FULL, shape, shape)
        self.entries.append(Entry(name + path, was, was, parameters, why))

    def _is_token_head(self, module: nn.Module) -> bool:
        if self.facts.has_other_parts or list(module.children()):
            return False
        return is_tokenwise(module, width_of(module, self.facts.hidden_size))

    def _sum_by_use(self) -> None:
        """Modules outside the layers sum the gradients of their own use: other code may use the same parameter on whole tokens."""
        for name in self.facts.modules:
            for module in places(self.model.get_submodule(name)).values():
                held = dict(module.named_parameters(recurse=False))
                if isinstance(module, TokenwiseModule):
                    module.summed = tuple(key for key, p in held.items() if self.state.partial.is_registered(p))
                    for key in module.summed:
                        if id(held[key]) not in self._by_hook:
                            self.state.partial.take_over(held[key])

    def _sum(self, parameter: nn.Parameter, *, by_hook: bool = True) -> None:
        """Has the gradient of `parameter` summed over the group, once however many modules hold it."""
        if by_hook:
            self._by_hook.add(id(parameter))
        self.state.partial.add(parameter)

    def _parameter(self, parameter: nn.Parameter, cut: Cut | None, style: Style) -> ParameterEntry:
        state, rank = self.state, self.state.groups.tp_rank
        if cut is None:
            shape = tuple(parameter.shape)
            partial = style not in (Style.ROUTER, Style.EMBEDDING) and (
                style is not Style.ROW or self._summed or state.sequence_parallel
            )
            if partial:
                self._sum(parameter)
            return ParameterEntry(Kind.PARTIAL if partial else Kind.FULL, shape, shape)
        if id(parameter) not in self._cut_already:
            self._cut_already.add(id(parameter))
            parameter.data = part_of(parameter.data, cut, rank)
        if cut.copied:
            state.partial.add(parameter, *cut.slot(rank))
        local = tuple(parameter.shape)
        shape = (*local[: cut.dim], cut.size, *local[cut.dim + 1 :])
        return ParameterEntry(Kind.COPIED_KV if cut.copied else Kind.CUT, shape, local, cut)

    def _swap(self, name: str, module: nn.Module, style: Style, cuts: Any) -> str:
        rank = self.state.groups.tp_rank
        if style in (Style.PARTIAL, Style.LATENT):
            become(module, InnerModule)
            return type(module).__name__
        if style is Style.ROUTER:
            return type(module).__name__
        if style in (Style.EXPERTS, Style.LOCAL):
            if self.plan.modules[name].once:
                module.once = self.plan.modules[name].once  # type: ignore[assignment]
                become(module, AddedOnce)
            for child in module.children():
                if isinstance(child, nn.Identity):  # an expert that returns its input
                    self._boundary(child, FirstRankOnly)
            return type(module).__name__
        if style is Style.SHARED:
            become(module, Passage)
            return type(module).__name__
        cut: Cut = cuts["weight"]
        if style is Style.EMBEDDING_COLUMN:
            module.embedding_dim = module.weight.shape[1]  # type: ignore[assignment, index]
            return type(module).__name__
        if style is Style.CUT_NORM:
            module.norm_width, module.norm_eps = cut.size, rms_norm_epsilon(module)  # type: ignore[assignment]
            module.norm_copies = cut.ranges.count(cut.ranges[rank])  # type: ignore[assignment]
            become(module, CutRMSNorm)
            return CutRMSNorm.__name__
        if style is Style.EMBEDDING:
            module.vocab_start = cut.ranges[rank][0][0]  # type: ignore[assignment]
            module.is_made_whole = set(module._parameters) != {"weight"}  # type: ignore[assignment]
            become(module, VocabParallelEmbedding, before=False)
            return VocabParallelEmbedding.__name__
        transposed = self.facts.modules[name].transposed
        shape = module.weight.shape[::-1] if transposed else module.weight.shape  # type: ignore[index]
        module.out_features, module.in_features = shape  # type: ignore[assignment, misc]
        if style is Style.HEAD:
            module.vocab_size, module.vocab_start = cut.size, cut.ranges[rank][0][0]  # type: ignore[assignment]
            # The logits it gives are shown whole, and model code sizes its loss by this.
            module.out_features = cut.size  # type: ignore[assignment]
            module.vocab_widths = tuple(cut.local_size(r) for r in range(self.state.groups.tp_size))  # type: ignore[assignment]
        row = PartialSumLinear if self._summed else RowParallelConv1D if transposed else RowParallelLinear
        column = ColumnParallelConv1D if transposed else ColumnParallelLinear
        module.__class__ = {Style.HEAD: VocabParallelHead, Style.ROW: row}.get(style, column)
        return type(module).__name__

    def _block(self, block: BlockPlan) -> None:
        module = self.model.get_submodule(block.name)
        module.input_name = _first_argument(module)  # type: ignore[assignment]
        mlps = (BlockKind.GROUPED, BlockKind.SUMMED)
        module.recomputable = block.kind in mlps and not block.has_heads  # type: ignore[assignment]
        module.has_heads = block.has_heads  # type: ignore[assignment]
        self._local_counts(block, module)
        self._head_inputs(block, module)
        if block.has_heads:
            self.fused["rotary embeddings"] += fuse_rotary(type(module).__module__)
        if block.kind is BlockKind.EXIT:
            return
        if block.kind not in (BlockKind.GROUPED, BlockKind.ENTRY):
            module.draws = draws_random_numbers(module)  # type: ignore[assignment]
            kinds = {BlockKind.SUMMED: SummedBlock, BlockKind.EXPERTS: ExpertsBlock, BlockKind.WHOLE: WholeBlock}
            self._boundary(module, kinds[block.kind])
            return
        for inner in list(module.modules())[1:]:
            if isinstance(inner, nn.Sequential):  # such as an adapter's two linears
                become(inner, TakesHandles)
        columns = [module_at(self.model, name) for name in block.columns]
        siblings = tuple(c for c in columns if c.in_features == self.facts.hidden_size)
        for column in columns:
            column.siblings = siblings if column in siblings else ()  # type: ignore[assignment]
            column.outputs_live_together = not block.has_heads  # type: ignore[assignment]
            # A norm of queries and keys would keep what they share memory with.
            column.outputs_are_short_lived = block.has_heads and not _has_norms(module)  # type: ignore[assignment]
        if siblings and all(type(c) is ColumnParallelLinear for c in siblings):
            lay_side_by_side([c.weight for c in siblings])  # type: ignore[misc]
        if (
            block.kind is BlockKind.GROUPED and not block.has_heads
        ):  # of an entry it would leave the block, past its hooks
            self._defer_activation(module)
        self._boundary(module, ShardedBlock)

    def _head_inputs(self, block: BlockPlan, module: nn.Module) -> None:
        if block.heads is None:
            return
        for pattern, inputs in family(self.facts.data_file).head_inputs.items():
            if matches_in(self.facts, pattern, block.name):
                module.head_inputs = dict(inputs)  # type: ignore[assignment]
                module.heads = (self.facts.heads_of(block.name)[0], block.heads.queries[self.state.groups.tp_rank])  # type: ignore[assignment]
                become(module, HeadInputs)

    def _local_counts(self, block: BlockPlan, module: nn.Module) -> None:
        heads, rank = block.heads, self.state.groups.tp_rank
        if heads is None or not block.has_heads:
            return
        counts = {"num_local_heads": heads.num_local_heads(rank), "num_local_kv_heads": heads.num_local_kv_heads(rank)}
        own = vars(module).get("head_dim")
        counts["local_width"] = counts["num_local_heads"] * (own if type(own) is int else self.facts.head_dim)
        n, kv = self.facts.heads_of(block.name)
        for part in module.modules():
            for names, whole, local in ((QUERY_COUNTS, n, "num_local_heads"), (KV_COUNTS, kv, "num_local_kv_heads")):
                for name in names:
                    if vars(part).get(name) == whole:
                        setattr(part, name, counts[local])
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = counts["num_local_heads"] // counts["num_local_kv_heads"]  # type: ignore[assignment]
        through_config = {}
        for pattern, attributes in family(self.facts.data_file).attributes.items():
            if matches_in(self.facts, pattern, block.name):
                for path, count in attributes.items():
                    if path.startswith("config."):
                        through_config[path.removeprefix("config.")] = counts[count]
                    else:
                        setattr(module, path, counts[count])
        if through_config:
            module.config = _ConfigView(module.config, through_config)  # type: ignore[assignment]


def _known_activation(module: nn.Module) -> str | None:
    try:
        return known_activation(module)
    except (RuntimeError, TypeError, ValueError):
        return None


def _holds_nothing(module: nn.Module) -> bool:
    """True for what only computes, such as an activation: DeepSpeed's hooks of ZeRO-3 see it, too."""
    return next(module.children(), None) is None and not module._parameters and not module._buffers


def _has_norms(module: nn.Module) -> bool:
    return any("norm" in type(m).__name__.lower() for m in module.modules())


def _first_argument(module: nn.Module) -> str:
    names = list(inspect.signature(module.forward).parameters)
    return names[0] if names else "hidden_states"
