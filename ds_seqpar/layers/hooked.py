"""Where the user's hooks stand in a sharded model, and what the gradients are of what they bring in (see users_tensors.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from ..errors import PlanError
from ..plan.cuts import Kind
from .blocks import ExpertsBlock, FirstRankOnly, PartialSumLinear, ReplicatedModule, Router, SummedBlock, WholeBlock
from .boundaries import ShardedBlock, ShardedLayer, TokenDropout, TokenwiseModule
from .embedding import VocabParallelEmbedding
from .linear import RowParallelLinear
from .passages import Passage
from .region import TokenRegion
from .users_tensors import Found, Gradient, has_users_hooks, hooks_on_all_modules, is_ours, leaving, sum_leaving

__all__ = ["settle_hooks"]

_ROWS = (ShardedLayer, ShardedBlock, TokenwiseModule, TokenDropout, VocabParallelEmbedding, Passage)
_WHOLE_INSIDE = (WholeBlock, SummedBlock, ExpertsBlock)
_UNCLEAR = (Router, ReplicatedModule, FirstRankOnly, PartialSumLinear)


def settle_hooks(base: Any, output: Any, given: Any, since: int, region: TokenRegion, *, reentrant: bool) -> None:
    """Sums what the user's hooks brought into the forward that made `output` out of `given`, or refuses it. Collective.

    `since` is autograd's sequence number when the forward began; `reentrant`: its layers' graphs are not made yet.

    Raises:
        PlanError: on every rank, if it is not known on one of them what the gradients are, or the ranks' hooks differ.
    """
    state = base.seqpar
    found, problem = _found(base, output, given, since, region, reentrant)
    everyone = state.guard.everyones((len(found), problem))
    said = next((problem for _, problem in everyone if problem), "")
    if said:
        raise PlanError(said)
    if len({count for count, _ in everyone}) > 1:
        raise PlanError(
            "hooks bring tensors that need gradients into the model on some ranks of a tensor-parallel group only; register the "
            "same hooks on all of them"
        )
    sum_leaving(found, state.groups.tp_group)


def _found(
    base: Any, output: Any, given: Any, since: int, region: TokenRegion, reentrant: bool
) -> tuple[list[Found], str]:
    """(edges whose gradients are to be summed, what is wrong)."""
    places = dict(_places(base, region.cut))
    in_layers = [name for name in places if any(name.startswith(f"{layer}.") or name == layer for layer in _layers(base))]
    if reentrant and in_layers:
        return [], (
            f"a hook stands on {in_layers[0]}, and with reentrant checkpointing what it brings in cannot be seen; use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}, or "recompute": "full" in the key'
        )
    found = leaving(output, given, since, _KnownLeaves(base, region))
    if not found:
        return [], ""
    what, where = str(found[0]), ", ".join(name or "the base model" for name in places) or "nothing"
    if not places:
        return [], (
            f"{what} needs a gradient and entered the model neither as an argument nor by a hook; make it a parameter of the model "
            "before it is sharded, or bring it in by a forward hook on a layer, an attention or MLP block, or a norm"
        )
    entries = (base.seqpar.entries.get(id(edge.leaf)) for edge in found)
    cut = next((entry for entry in entries if entry is not None and entry.kind != Kind.FULL), None)
    if cut is not None:
        return [], f"a hook on {where} uses a parameter of the model that is cut, {list(cut.shape)}; give it a copy of its own"
    if set(places.values()) == {Gradient.COMPLETE}:
        return [], ""
    if set(places.values()) == {Gradient.PART}:
        return found, ""
    return [], (
        f"hooks on {where} bring in {what} that needs a gradient, and what a rank's gradient of it is cannot be told there; put them "
        "on layers, attention or MLP blocks, or norms"
    )


class _KnownLeaves:
    """Leaves whose gradient is taken care of: the model's own parameters where its own code uses them.

    A parameter that is complete on every rank, and one that is cut, are not where hooks see rows: their modules do not run there.
    """

    def __init__(self, base: Any, region: TokenRegion) -> None:
        self._entries, self._spans = base.seqpar.entries, base.seqpar.hook_spans
        self._rows = region.local_shape(1)[:2]
        named = dict(base.named_modules())
        own = [named[name] for name in _layers(base)] + [m for m in named.values() if isinstance(m, _ROWS)]
        self._used_there = {id(p) for module in own for p in module.parameters()}
        self._used = {id(p) for p in base.parameters()}
        self._looked_up = {id(m.weight) for m in named.values() if isinstance(m, VocabParallelEmbedding)}

    def __call__(self, leaf: Tensor, user: Node) -> bool:
        entry = self._entries.get(id(leaf))
        if entry is None:
            # Model code makes leaves too, and throws them away: T5 its position biases, where layers are recomputed. Rows that were
            # made a leaf, as PEFT does with embeddings, are this rank's own.
            own_rows = tuple(leaf.shape[:2]) == self._rows
            return not isinstance(leaf, nn.Parameter) and (self._spans is None or own_rows)
        if self._spans is None:
            return True
        if id(leaf) in self._looked_up:
            return is_ours(user)
        if entry.kind not in (Kind.FULL, Kind.CUT) or id(leaf) in self._used_there:
            return True
        at = user._sequence_nr()
        return id(leaf) in self._used and not any(start <= at < end for start, end in self._spans)


def _layers(base: Any) -> list[str]:
    return [name for name, module in base.named_modules() if isinstance(module, ShardedLayer)]


def _places(base: Any, cut: bool) -> Iterator[tuple[str, Gradient]]:
    """(name, what the gradient is there) of everything below `base`, and itself, on which hooks of the user's stand."""
    if hooks_on_all_modules():
        yield "all modules", Gradient.UNCLEAR
    rows = Gradient.PART if cut else Gradient.COMPLETE
    if has_users_hooks(base, after=False):
        yield "", Gradient.UNCLEAR  # it sees whole embeddings
    elif has_users_hooks(base):
        yield "", rows
    yield from _below(base, "", None, cut, rows)


def _below(
    outer: nn.Module, prefix: str, inside: Gradient | None, cut: bool, rows: Gradient
) -> Iterator[tuple[str, Gradient]]:
    """`inside`: what it is within `outer`; None outside the layers, where only modules that are known to act on rows do."""
    for name, module in outer.named_children():
        path = f"{prefix}{name}"
        here, within = _of(module, inside, cut, rows)
        if has_users_hooks(module):
            yield path, here
        yield from _below(module, f"{path}.", within, cut, rows)


def _of(
    module: nn.Module, inside: Gradient | None, cut: bool, rows: Gradient
) -> tuple[Gradient, Gradient | None]:
    """(what it is at the module's own hooks, and within it)."""
    if inside is Gradient.UNCLEAR or isinstance(module, _UNCLEAR):
        return Gradient.UNCLEAR, Gradient.UNCLEAR
    if isinstance(module, _WHOLE_INSIDE):
        return rows, Gradient.UNCLEAR
    if isinstance(module, ShardedBlock):
        return rows, Gradient.PART
    if isinstance(module, ShardedLayer):
        return rows, rows
    if inside is Gradient.PART and not cut and any(isinstance(m, RowParallelLinear) for m in module.modules()):
        return Gradient.UNCLEAR, Gradient.PART
    if inside is None:
        return (rows if isinstance(module, _ROWS) else Gradient.UNCLEAR), None
    return inside, inside
