"""The plan of a model: made in one place, for who shards it and for who reads it in parts, so that both cut alike."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from .errors import PlanError
from .families import family
from .layers.norm import rms_norm_epsilon
from .plan.cuts import Cut
from .plan.facts import ModelFacts
from .plan.model_plan import ModelPlan
from .plan.resolve import resolve
from .plan.styles import Style
from .plan.wrappers import places, unwrapped

__all__ = ["PartlyLoaded", "cuts_of", "forget_whole_shape", "mark_whole_shape", "parts_of", "plan_of"]


@dataclass(frozen=True)
class PartlyLoaded:
    """A mark on a model whose cut parameters were loaded in part: what it was when it was whole, and what was cut."""

    facts: ModelFacts
    tp_size: int
    cuts: Mapping[str, Cut]
    users: Mapping[str, str] = field(default_factory=dict)  # the plan in the key with which it was loaded

    def require_modules(self, modules: Collection[str]) -> None:
        """Raises PlanError unless the model has the modules with parameters that it had at loading; adapters around them are none."""
        for name in dict.fromkeys([*self.facts.modules, *modules]):
            if name not in modules or name not in self.facts.modules:
                done = "added" if name in modules else "taken out"
                raise PlanError(
                    f"{name} was {done} after the model was loaded in parts; do so with a model that is loaded whole, or save what comes "
                    "of it with transformers alone and load that"
                )

    def require(self, cuts: Mapping[str, Cut], users: Mapping[str, str]) -> None:
        """Raises PlanError unless what was cut at loading is what the plan now says."""
        for name in dict.fromkeys([*self.cuts, *cuts]):
            was, now = self.cuts.get(name), cuts.get(name)
            if was != now:
                raise PlanError(
                    f"{name} was {_said(was)} when the model was loaded in parts, with {_plan(self.users)}, and is to be {_said(now)} "
                    f"now, with {_plan(users)}; give from_pretrained (or loading) and deepspeed.initialize the same config"
                )


def plan_of(model: nn.Module, facts: ModelFacts, tp_size: int, users: Mapping[str, str] | None = None) -> ModelPlan:
    """What becomes of every module of `model`, whose weights may be on the meta device. Raises PlanError.

    All that is cut is decided here: of whatever is found later, no cut hangs.
    """
    plan = resolve(facts, family(facts.data_file), tp_size, users)
    for name, planned in list(plan.modules.items()):
        if planned.style is Style.CUT_NORM and rms_norm_epsilon(unwrapped(model.get_submodule(name))) is None:
            around = next(block for block in plan.blocks if _holds(block, name))
            why = f"{name} ({facts.modules[name].type_name}) is a norm over all heads but no plain RMS norm"
            plan.repeat_whole(around, [module for module in facts.modules if _holds(around, module)], why)
            plan.remarks.append(f"{around} is repeated whole by every rank: {why}")
    return plan


def cuts_of(plan: ModelPlan) -> dict[str, Cut]:
    """Full parameter name -> its cut."""
    return {f"{name}.{key}": cut for name, module in plan.modules.items() for key, cut in module.cuts.items()}


def parts_of(model: nn.Module, cuts: Mapping[str, Cut]) -> Iterator[tuple[str, nn.Parameter, Cut]]:
    """Every parameter that goes by the name of one that is cut: in the base layer of adapters, in each of several copies."""
    for name, cut in cuts.items():
        module, _, key = name.rpartition(".")
        for path, place in places(model.get_submodule(module)).items():
            yield f"{module}{path}.{key}", place.get_parameter(key), cut


def mark_whole_shape(parameter: nn.Parameter, cut: Cut) -> None:
    """Tells who makes adapters how large a parameter is that was loaded in part.

    The name is DeepSpeed's for one that ZeRO-3 partitioned; PEFT sizes its factors by it where a module's own attributes do not say.
    """
    shape = list(parameter.shape)
    shape[cut.dim] = cut.size
    parameter.ds_shape = torch.Size(shape)  # type: ignore[attr-defined]


def forget_whole_shape(parameter: nn.Parameter) -> None:
    """For ZeRO-3, which means something else by it."""
    vars(parameter).pop("ds_shape", None)


def _holds(block: str, name: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def _said(cut: Cut | None) -> str:
    return "whole" if cut is None else f"cut in dimension {cut.dim} at {[list(ranges) for ranges in cut.ranges]}"


def _plan(users: Mapping[str, str]) -> str:
    return f'the "plan" {dict(users)} in the ds_seqpar key' if users else 'no "plan" in the ds_seqpar key'
