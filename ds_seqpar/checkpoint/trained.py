"""Whether a checkpoint's optimizer and schedule can go into this run's: compared before anything is loaded. No torch.

DeepSpeed keeps an optimizer's state in flat buffers, or by number: of which parameters, and in which order, decides what a load
puts where. A buffer that fits by its length alone would give every parameter another's weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import CheckpointError

__all__ = ["describe_optimizer", "describe_tying", "require_same_optimizer", "require_same_scheduler"]

Layout = Sequence[Sequence[str]]
"""Names of parameters by the buffer (at ZeRO stage 0: the parameter group) that holds their states, in its order."""

_WEIGHTS_ALONE = "or take the weights alone, with load_optimizer_states=False, and start the optimizer anew"
_ADAMS = frozenset({"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"})
"""Optimizers that keep the same states."""


def describe_optimizer(engine: Any) -> dict[str, Any] | None:
    """Class, number of parameter groups and layout of what an engine steps on this rank; None if it steps nothing."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "param_groups"):
        return None
    if engine.zero_optimization():
        layout = [list(shapes) for shapes in engine._get_zero_param_shapes()]
    else:
        names = {id(p): name for name, p in engine.module.named_parameters()}
        groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
        layout = [[names[id(p)] for p in group if id(p) in names] for group in groups]
    inner = getattr(optimizer, "optimizer", optimizer)
    return {"class": type(inner).__name__, "groups": len(optimizer.param_groups), "layout": layout}


def describe_tying(named: Iterable[tuple[str, Any]]) -> list[list[str]]:
    """The names that stand for one parameter, for every parameter that has several."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in named:
        by_identity.setdefault(id(parameter), []).append(name)
    return [names for names in by_identity.values() if len(names) > 1]


def require_same_optimizer(where: object, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming the first difference that matters. What `saved` does not say is not compared."""
    theirs, ours = ({name for part in about["layout"] for name in part} for about in (saved, here))
    found = [
        f"{len(names)} {'parameter that was' if len(names) == 1 else 'parameters that were'} {was} when it was saved "
        f"{'is' if len(names) == 1 else 'are'} {now} here ({_some(names)})"
        for names, was, now in ((ours - theirs, "frozen", "trained"), (theirs - ours, "trained", "frozen"))
        if names
    ]
    if found:
        raise CheckpointError(f"{where}: {' and '.join(found)}; freeze and train the same as then, {_WEIGHTS_ALONE}")
    if saved.get("groups", here["groups"]) != here["groups"]:
        raise CheckpointError(
            f"{where} holds {saved['groups']} parameter groups of the optimizer, this run has {here['groups']}; make the same "
            f"groups, {_WEIGHTS_ALONE}"
        )
    if list(map(list, saved["layout"])) != list(map(list, here["layout"])):
        group, then, now = _first_difference(saved["layout"], here["layout"])
        raise CheckpointError(
            f"{where}: the optimizer's parameters are in other groups or in another order: in group {group}, {then} then and "
            f"{now} here; make the same groups in the same order, with the same sub_group_size and round_robin_gradients, "
            f"{_WEIGHTS_ALONE}"
        )
    then, now = saved.get("class", here["class"]), here["class"]
    if then != now and not {then, now} <= _ADAMS:
        raise CheckpointError(f"{where} holds the states of {then}, this run has {now}; use {then}, {_WEIGHTS_ALONE}")


def require_same_scheduler(where: object, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises CheckpointError if this run has a schedule whose state the checkpoint cannot hold."""
    now, then = here["scheduler"], saved.get("scheduler", here["scheduler"])
    if now is not None and then != now:
        raise CheckpointError(
            f"{where} was saved {f'with the schedule {then}' if then else 'without a schedule'}, this run has {now}; use the same, "
            "or load with load_lr_scheduler_states=False"
        )


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return ", ".join([first, *others[:3]]) + (", ..." if len(others) > 3 else "")


def _first_difference(saved: Layout, here: Layout) -> tuple[int, str, str]:
    for group in range(max(len(saved), len(here))):
        then, now = (list(layout[group]) if group < len(layout) else [] for layout in (saved, here))
        for i in range(max(len(then), len(now))):
            a, b = (names[i] if i < len(names) else "nothing" for names in (then, now))
            if a != b:
                return group, a, b
    raise AssertionError("the layouts are equal")
