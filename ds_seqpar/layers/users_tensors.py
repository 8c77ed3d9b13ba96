"""Tensors of the user's that a forward uses and the model does not know: what hooks bring in, and what arguments carry.

Their gradient arises where the ranks hold parts. Given as an argument, a tensor gets the edge that its use asks for, or is refused. What
hooks bring in is found once a forward, in the graph that the base model leaves: an edge to a leaf that is no parameter of the model's,
or to a graph that was there before, is one by which a gradient leaves. What becomes of it depends on where the hooks are:

    hooks on                                 tokens cut           tokens not cut
    layers, blocks, norms, embedding, rows   part, summed         complete on every rank, left as it is
    modules inside a block with heads        part, summed         part, summed
    outputs of row-parallel linears          part, summed         refused (parts before it, complete after it)
    everything else                          refused              refused

Legend: c rows a rank.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed import ProcessGroup

from ..comm.regions import copy_for_partial
from ..errors import PlanError
from .fingerprints import tensors_in
from .handles import Handle

__all__ = [
    "Found", "Gradient", "has_users_hooks", "hooks_on_all_modules", "is_ours", "leaving", "refuse_arguments", "sum_leaving",
    "with_edges",
]  # fmt: skip

_OF_HOSTS = ("deepspeed", "transformers", "accelerate", "ds_seqpar")
_WHOLE = ("inputs_embeds", "decoder_inputs_embeds", "hidden_states", "encoder_hidden_states", "encoder_outputs", "labels")
_OF_TOWERS = ("pixel_values", "image_", "input_features", "input_values")


class Gradient(enum.Enum):
    """What a hook's gradient is on one rank."""

    PART = "part"
    COMPLETE = "complete"
    UNCLEAR = "unclear"


def has_users_hooks(module: nn.Module, *, before: bool = True, after: bool = True) -> bool:
    """Whether forward hooks of the user's stand on `module`, and may change what it takes or returns."""
    hooks = [*module._forward_pre_hooks.values()] if before else []
    hooks += module._forward_hooks.values() if after else ()
    return any(map(_is_users, hooks))


def _is_users(hook: Callable[..., Any]) -> bool:
    inner = getattr(hook, "func", hook)  # of a partial
    return getattr(inner, "__module__", "").partition(".")[0] not in _OF_HOSTS and not getattr(hook, "only_looks", False)


def hooks_on_all_modules() -> bool:
    """Whether the user has put forward hooks on all modules of the process."""
    known = torch.nn.modules.module
    return any(map(_is_users, (*known._global_forward_pre_hooks.values(), *known._global_forward_hooks.values())))


@dataclass(frozen=True)
class Found:
    """An edge by which a gradient leaves the region: input `index` of `node`'s function, a leaf or a graph that was there before."""

    node: Node
    index: int
    leaf: Tensor | None

    def __str__(self) -> str:
        return "what was computed before this forward" if self.leaf is None else f"a tensor of shape {list(self.leaf.shape)}"


def leaving(outputs: Any, given: Any, since: int, is_known: Callable[[Tensor, Node], bool]) -> list[Found]:
    """The edges by which gradients leave what was computed since the autograd sequence number `since`, but into `given`.

    `is_known(leaf, the function that uses it)`: a leaf whose gradient is taken care of.
    """
    entered = {id(node): node for x in _plain(given) if (node := x.grad_fn) is not None}
    leaves = {id(x) for x in _plain(given)}
    found: list[Found] = []
    waiting = [x.grad_fn for x in _plain(outputs) if x.grad_fn is not None and id(x.grad_fn) not in entered]
    seen = {id(node): node for node in waiting}
    while waiting:
        node = waiting.pop()
        for index, (into, _) in enumerate(node.next_functions):
            if into is None or id(into) in entered:
                continue
            leaf: Tensor | None = getattr(into, "variable", None) if type(into).__name__ == "AccumulateGrad" else None
            if leaf is not None:
                if id(leaf) not in leaves and not is_known(leaf, node):
                    found.append(Found(node, index, leaf))
            elif into._sequence_nr() < since:
                found.append(Found(node, index, None))
            elif id(into) not in seen:
                seen[id(into)] = into
                waiting.append(into)
    return found


def _plain(holder: Any) -> Iterator[Tensor]:
    for _, x in tensors_in({"": holder}):
        if not isinstance(x, Handle):
            yield x
            continue
        yield x.source
        if x._full is not None:
            yield x._full


def sum_leaving(found: Iterable[Found], group: ProcessGroup) -> None:
    """Has the gradients that leave by these edges summed over the group, in fp32."""
    by_node: dict[int, tuple[Node, set[int]]] = {}
    for edge in found:
        by_node.setdefault(id(edge.node), (edge.node, set()))[1].add(edge.index)

    def hook_for(places: set[int]) -> Callable[..., Any]:
        def summed(into: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...]:
            return tuple(_sum(x, group) if i in places and x is not None else x for i, x in enumerate(into))

        return summed

    for node, places in by_node.values():
        node.register_hook(hook_for(places))


def _sum(part: Tensor, group: ProcessGroup) -> Tensor:
    total = part.to(torch.promote_types(part.dtype, torch.float32), copy=True).contiguous()
    dist.all_reduce(total, group=group)
    return total.to(part.dtype)


def refuse_arguments(
    inputs: Mapping[str, Any], mask_is_part: Callable[[], bool], is_parameter: Callable[[Tensor], bool]
) -> None:
    """Raises PlanError for a tensor that needs a gradient and of which it is not known what the ranks' gradients are."""
    for path, x in tensors_in(inputs):
        name = path.partition("[")[0].partition(".")[0]
        if not x.requires_grad or isinstance(x, Handle) or name in _WHOLE or name.startswith(_OF_TOWERS):
            continue
        if name == "attention_mask":
            if mask_is_part() and x.dim() == 4 and x.shape[1] == 1:
                continue
            why = "only one of shape [b, 1, q, k] for blocks that are cut by heads has the same gradient as without sharding"
        elif name in ("past_key_values", "cache_params"):
            if not _leads_to_the_user(x, is_parameter):
                continue  # of an earlier forward of this model
            why = "each rank's attention holds its own heads of it; give what is trained as inputs_embeds"
        else:
            why = "what each rank's gradient of it would be is not known; detach() it, or give what is trained as inputs_embeds"
        raise PlanError(f"{path} {list(x.shape)} needs a gradient: {why}")


def is_ours(node: Node) -> bool:
    """Whether it is the backward of an autograd function of ds_seqpar's."""
    return getattr(getattr(node, "_forward_cls", None), "__module__", "").startswith("ds_seqpar.")


def _leads_to_the_user(x: Tensor, is_parameter: Callable[[Tensor], bool]) -> bool:
    """Whether a gradient of `x` reaches a leaf that is no parameter, and by no function of ours."""
    if x.grad_fn is None:
        return True
    waiting, seen = [x.grad_fn], {}
    while waiting:
        node = waiting.pop()
        seen[id(node)] = node
        if is_ours(node):
            continue
        if type(node).__name__ == "AccumulateGrad" and not is_parameter(node.variable):  # type: ignore[attr-defined]
            return True
        waiting += [into for into, _ in node.next_functions if into is not None and id(into) not in seen]
    return False


def with_edges(mask: Any, group: ProcessGroup) -> Any:
    """An attention mask, or one for each kind of attention, whose gradient, a part on every rank's heads, is summed."""
    if isinstance(mask, dict):
        return {name: with_edges(x, group) for name, x in mask.items()}
    return copy_for_partial(mask, group) if isinstance(mask, Tensor) and mask.requires_grad else mask
