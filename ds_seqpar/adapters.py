"""What becomes of the adapter layers that stand around sharded modules: low-rank factors cut with what they stand beside.

    beside            down (A)                                  up (B)
    column-parallel   whole                                     cut with the output
    row-parallel      cut with the input                        whole
    latent, or whole  whole                                     whole
    router            whole, complete gradient                  whole, complete gradient
    embedding         cut with the vocabulary                   whole, on this rank's tokens
    experts           cut where the parameter's inputs are cut  cut where its outputs are cut; the other factor is whole

The gradient of a whole factor is a part on every rank, and is summed over the group, but for a router's: routers run alike on
all tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

from torch import nn

from .errors import CheckpointError, PlanError
from .layers.adapters import AdapterDown, TakesHandles, VocabParallelLookup
from .layers.blocks import InnerModule, PartialSumLinear
from .layers.linear import RowParallelLinear
from .layers.passages import HidesHandles
from .layers.region import ShardingState
from .layers.surgery import become
from .plan.cuts import Cut
from .plan.facts import ModelFacts
from .plan.model_plan import ModelPlan
from .plan.report import Entry, ParameterEntry
from .plan.styles import Style
from .plan.wrappers import AdapterLayer, adapters_around

__all__ = ["check_adapters", "merge_gathered", "refuse_on_wrapper", "refuse_partitioned", "shard_adapters"]

WHOLE = (Style.LATENT, Style.PARTIAL)
BESIDE_LINEARS = (Style.COLUMN, Style.PACKED_COLUMN, Style.ROW, Style.ROUTER, *WHOLE)
Parameters = Callable[[nn.Parameter, "Cut | None", Style], ParameterEntry]


def check_adapters(model: nn.Module, facts: ModelFacts, plan: ModelPlan) -> None:
    """Raises PlanError for an adapter that cannot be sharded exactly, before anything is touched."""
    for name in facts.modules:
        planned = plan.modules.get(name)
        for outer, layer in adapters_around(model.get_submodule(name)):
            for attribute, meaning in layer.refused.items():
                if getattr(outer, attribute, None):
                    raise PlanError(f"{name} has {meaning}; it cannot be sharded exactly: use plain LoRA or rsLoRA")
            style = planned.style if planned is not None else None
            if layer.parameter:
                target = getattr(outer, layer.parameter)
                cut = planned is not None and style is Style.EXPERTS and target in planned.cuts
                if not cut and style is not Style.ROUTER:
                    raise PlanError(
                        f"{name}.{target} carries an adapter, and is neither a cut parameter of experts nor a router's; leave it out "
                        "of target_parameters"
                    )
            elif style is not Style.EMBEDDING if layer.lookup else style not in BESIDE_LINEARS:
                place = style.value if style else "not in a sharded block"
                instead = " and train it by modules_to_save" if style is Style.HEAD else ""
                raise PlanError(
                    f"{name} ({place}) carries an adapter; leave it out of the adapter's target_modules{instead}"
                )
            if planned is not None and style is not None:
                _require_whole_factors(name, outer, layer, style, planned.cuts)


def _require_whole_factors(
    name: str, outer: nn.Module, layer: AdapterLayer, style: Style, cuts: Mapping[str, Cut]
) -> None:
    """Raises PlanError for a factor that was made of this rank's part of a weight, not of the whole one."""
    if layer.lookup:
        cut = Cut(1, cuts["weight"].size, cuts["weight"].ranges)
        factors = [(key, factor, cut) for key, factor in getattr(outer, layer.lookup).items()]
    else:
        of_both = zip((layer.down, layer.up), _factor_cuts(outer, layer, style, cuts), strict=True)
        found = [(attribute, cut) for attribute, cut in of_both if cut is not None]
        factors = [(key, f.weight, cut) for attribute, cut in found for key, f in getattr(outer, attribute).items()]
    for adapter, factor, cut in factors:
        rest, each = divmod(factor.shape[cut.dim], cut.size)  # of a stack of experts a factor holds all
        if rest < 1 or each:
            raise PlanError(
                f"{name}: a factor of adapter {adapter!r} has shape {list(factor.shape)}, but the whole one has {cut.size} in dimension "
                f"{cut.dim}. An adapter whose first values are made of the weights (PiSSA, OLoRA, LoftQ, CorDA) must be put on a model "
                "that is loaded whole"
            )


def refuse_partitioned(model: nn.Module, zero_stage: object) -> None:
    """Raises PlanError for adapters that change single parameters in place, where ZeRO-3 would hold those in parts."""
    if zero_stage != 3:
        return
    named: dict[str, nn.Module] = dict(model.named_modules())
    adapted = next((n for n, m in named.items() if any(layer.parameter for _, layer in adapters_around(m))), None)
    if adapted is not None:
        raise PlanError(
            f"{adapted} has adapters of single parameters (target_parameters), which are changed while ZeRO-3 holds them in "
            'parts; use "zero_optimization": {"stage": 2} or lower'
        )


def refuse_on_wrapper(wrapper: nn.Module) -> None:
    """What a wrapper would do with this rank's part as if it were the whole."""
    plain_save = wrapper.save_pretrained

    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is None:
            raise CheckpointError(
                "model.save_pretrained would write this rank's shards; call ds_seqpar.save_pretrained(engine, folder) on all "
                "ranks, or pass state_dict=ds_seqpar.full_state_dict(engine)"
            )
        return plain_save(*args, **kwargs)  # type: ignore[operator]

    def later(*args: Any, **kwargs: Any) -> NoReturn:
        raise PlanError("adapters must be added or loaded before the model is sharded: before deepspeed.initialize")

    wrapper.save_pretrained = save_pretrained  # type: ignore[assignment]
    wrapper.add_adapter = wrapper.load_adapter = later  # type: ignore[assignment]


def merge_gathered(model: nn.Module, gathered: Callable[..., AbstractContextManager[Any]]) -> None:
    """Makes every adapter layer merge (and unmerge) with its parameters there, where ZeRO-3 holds them in parts.

    `gathered(parameters, modifier_rank=0)` is DeepSpeed's: all ranks make the same change, the first one's is kept.
    """
    for module in model.modules():
        for outer, _ in adapters_around(module)[:1]:
            for name in ("merge", "unmerge"):
                setattr(outer, name, _around(getattr(outer, name), outer, gathered))


def _around(plain: Callable[..., Any], outer: nn.Module, gathered: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def act(*args: Any, **kwargs: Any) -> Any:
        held = [p for p in outer.parameters() if hasattr(p, "ds_id")]
        with gathered(held, modifier_rank=0) if held else nullcontext():
            return plain(*args, **kwargs)

    return act


def shard_adapters(
    name: str, outer: nn.Module, style: Style, cuts: Mapping[str, Cut], state: ShardingState, parameter: Parameters, *,
    summed: bool,
) -> list[Entry]:  # fmt: skip
    """Shards the adapters around the base layer `name`, which became `style`; returns what is reported of them.

    `parameter(p, cut, style)` cuts a parameter, or registers a whole one. `summed`: the block's output is a partial sum.
    """
    entries: list[Entry] = []
    for layer_of, layer in adapters_around(outer):
        if layer.lookup:
            entries += _embedding(name, layer_of, layer, cuts, state, parameter)
        else:
            entries += _linears(name, layer_of, layer, style, cuts, state, parameter, summed)
        name = f"{name}.{layer.base}"
    return entries


def _linears(
    name: str, outer: nn.Module, layer: AdapterLayer, style: Style, cuts: Mapping[str, Cut], state: ShardingState,
    parameter: Parameters, summed: bool,
) -> list[Entry]:  # fmt: skip
    down_cut, up_cut = _factor_cuts(outer, layer, style, cuts)
    if not layer.parameter and style is not Style.ROUTER:
        for module in (outer, *getattr(outer, layer.dropout).values()):
            become(module, TakesHandles)
    entries = []
    for attribute, cut in ((layer.down, down_cut), (layer.up, up_cut)):
        for adapter, factor in getattr(outer, attribute).items():
            kind = Style.ROUTER if style is Style.ROUTER else Style.ROW
            parameters = {key: parameter(p, cut, kind) for key, p in factor.named_parameters()}
            factor.out_features, factor.in_features = factor.weight.shape
            factor.seqpar, was = state, type(factor).__name__
            _become_factor(factor, style, summed, is_down=attribute == layer.down, is_parameter=bool(layer.parameter))
            entries.append(
                Entry(f"{name}.{attribute}.{adapter}", was, type(factor).__name__, parameters, "an adapter's factor")
            )
    return entries


def _factor_cuts(
    outer: nn.Module, layer: AdapterLayer, style: Style, cuts: Mapping[str, Cut]
) -> tuple[Cut | None, Cut | None]:
    """(cut of down [r, in], cut of up [out, r])."""
    if style in WHOLE or style is Style.ROUTER:
        return None, None
    if not layer.parameter:
        cut = cuts["weight"]
        return (Cut(1, cut.size, cut.ranges), None) if style is Style.ROW else (None, Cut(0, cut.size, cut.ranges))
    cut = cuts[getattr(outer, layer.parameter)]
    base = adapters_around(outer)[-1]
    inputs_last = not getattr(getattr(base[0], base[1].base), "is_transposed", False)  # [experts, out, in]
    if (cut.dim == 2) == inputs_last:
        return Cut(1, cut.size, cut.ranges), None
    return None, Cut(0, cut.size, cut.ranges)


def _become_factor(factor: nn.Module, style: Style, summed: bool, *, is_down: bool, is_parameter: bool) -> None:
    if is_parameter or style is Style.ROUTER:
        return
    if style in WHOLE:
        become(factor, InnerModule)
    elif style is Style.ROW and summed:
        factor.__class__ = PartialSumLinear  # up, too: its bias is added once
    elif is_down:
        factor.__class__ = RowParallelLinear if style is Style.ROW else AdapterDown


def _embedding(
    name: str,
    outer: nn.Module,
    layer: AdapterLayer,
    cuts: Mapping[str, Cut],
    state: ShardingState,
    parameter: Parameters,
) -> list[Entry]:
    cut = Cut(1, cuts["weight"].size, cuts["weight"].ranges)
    outer.seqpar = state  # type: ignore[assignment]
    become(outer, HidesHandles)
    become(outer, VocabParallelLookup)
    entries = []
    for attribute, own in ((layer.lookup, cut), (layer.mix, None)):
        parameters = {key: parameter(p, own, Style.ROW) for key, p in getattr(outer, attribute).items()}
        entries.append(Entry(f"{name}.{attribute}", "Parameter", "Parameter", parameters, "an adapter's factor"))
    return entries
