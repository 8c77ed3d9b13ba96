"""The borders of a model: what the user calls, and the base model or stacks within it.

Mixins like those of the modules inside (boundaries.py).

Legend: b batch, s sequence, h hidden.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]
from torch.utils.hooks import RemovableHandle

from ..comm.regions import copy_for_partial
from ..errors import CheckpointError, PlanError, SeqParError
from .blocks import WholeBlock
from .boundaries import ShardedBlock, ShardedLayer
from .hooked import settle_hooks
from .masking import positions_of_the_model
from .passages import HidesHandles, Path, map_tensors
from .region import ShardingState, TokenRegion
from .surgery import parameters_of
from .token_handles import TokenShard
from .users_tensors import has_users_hooks, hooks_on_all_modules, refuse_arguments, with_edges

__all__ = ["ShardedModel", "ShardedTopModel"]

_TOKENS = ("input_ids", "inputs_embeds", "hidden_states")  # arguments that hold a model's tokens


class _Guarded:
    """Compares the inputs over the group once a forward, whichever module the caller entered by."""

    seqpar: ShardingState

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's, if it is given whole tensors; by itself it would write this rank's shards under the usual names."""
        if kwargs.get("state_dict") is None:
            raise CheckpointError(
                "model.save_pretrained would write this rank's shards; call ds_seqpar.save_pretrained(engine, folder) on all "
                "ranks, or pass state_dict=ds_seqpar.full_state_dict(engine)"
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the vocabulary is already cut."""
        raise PlanError(
            "resize_token_embeddings must come before the model is sharded: call it before deepspeed.initialize"
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Hugging Face's count, of the whole model."""
        entries, count = self.seqpar.entries, 0
        embeddings = {f"{n}.weight" for n, m in self.named_modules() if isinstance(m, nn.Embedding)}  # type: ignore[attr-defined]
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            if not (exclude_embeddings and name in embeddings) and (parameter.requires_grad or not only_trainable):
                count += math.prod(entries[id(parameter)].shape)
        return count

    _all_modules: list[nn.Module] | None = None
    _users_hooks: tuple[int, bool] | None = None

    @contextmanager
    def _guarded(self, args: Any, kwargs: Any) -> Iterator[tuple[int, Any, Any]]:
        """(a seed equal on all ranks, the arguments, with the edges that their gradients need)."""
        state = self.seqpar
        if state.guarded_seed is not None:
            yield state.guarded_seed, args, kwargs
            return
        if self._all_modules is None:
            self._all_modules = list(self.modules())  # type: ignore[attr-defined]
        hooked = any(map(_is_watched, self._all_modules[1:]))
        state.guarded_seed = state.guard.check(
            args, kwargs, seeds=self.training, hooked=hooked, users_hooks=self._has_users_hooks(self._all_modules)  # type: ignore[attr-defined]
        )
        try:
            state.hook_spans = [] if state.guard.any_users_hooks and torch.is_grad_enabled() else None
            yield state.guarded_seed, *self._with_edges(args, kwargs)
        finally:
            state.guarded_seed = state.hook_spans = None

    def _has_users_hooks(self, modules: list[nn.Module]) -> bool:
        """Looked for again whenever a hook was registered: ZeRO-3 has some on every module."""
        newest = RemovableHandle.next_id
        if self._users_hooks is None or self._users_hooks[0] != newest:
            self._users_hooks = newest, hooks_on_all_modules() or any(map(has_users_hooks, modules))
        return self._users_hooks[1]

    def _with_edges(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if not torch.is_grad_enabled():
            return args, kwargs
        state, names = self.seqpar, parameters_of(type(self).forward)  # type: ignore[attr-defined]
        modules = self._all_modules or []
        refuse_arguments(
            dict(zip(names, args, strict=False)) | kwargs,
            mask_is_part=lambda: not any(isinstance(m, WholeBlock) for m in modules),
            is_parameter=lambda x: id(x) in state.entries,
        )

        def edged(name: str, x: Any) -> Any:
            return with_edges(x, state.groups.tp_group) if name == "attention_mask" else x

        args = (*map(edged, names, args), *args[len(names) :])
        return args, {name: edged(name, x) for name, x in kwargs.items()}


class ShardedModel(_Guarded):
    """The base model, or one of its stacks: decides how this forward's tokens lie, and shows its outputs as TokenShards.

    `states` names arguments that are another stack's output, which blocks that are cut by heads read, or, where it `repeats_states`,
    blocks that every rank repeats. `stream` numbers the stacks, whose random numbers differ. One that `pads` has more tokens than it is
    given, and is asked for their number where its layers begin.
    """

    states: tuple[str, ...] = ()
    repeats_states: bool = False
    stream: int = 0
    pads: bool = False

    _shards: set[Path] | None = None  # where in the output of the call that is running the shards are
    _sharded: dict[str, nn.Module] | None = None
    _looked_at = False  # a first forward's graph, in which there may be what came by no hook
    _seen_through: list[tuple[int, list[nn.Module]]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the Hugging Face model; hidden states come back as handles that become real when they are used."""
        state = self.seqpar
        state.partial.arm()
        self._refuse_replaced()
        with self._guarded(args, kwargs) as (seed, args, kwargs):
            self._refuse_attentions(kwargs)
            watched, reentrant = self._watched(), self._recomputes_reentrantly()
            given, since = (args, kwargs), _get_sequence_nr()
            state.hook_spans = None if state.hook_spans is None else []
            make = functools.partial(state.region_for, by_layer=reentrant, watched=watched)
            shape = self._batch_and_seq(args, kwargs)
            region = None if shape is None else make(*shape)
            args, kwargs = self._with_states(args, kwargs)
            forked = functools.partial(self._forked, seed)
            fork = forked(region) if region is not None else state.beginning(make, forked)
            own_positions = positions_of_the_model() if self._only_tokens(args, kwargs) else nullcontext()
            shards: set[Path] = set()
            outer, self._shards = self._shards, shards
            try:
                aliases = state.partial.in_model(self, by_layer=reentrant)  # type: ignore[arg-type]
                with state.within(region), aliases, fork, own_positions:
                    output = super().__call__(*args, **kwargs)  # type: ignore[misc]
                    region = state.region
            finally:
                self._shards = outer
            if region is not None and torch.is_grad_enabled() and (state.guard.any_users_hooks or not self._looked_at):
                settle_hooks(self, output, given, since, region, reentrant=reentrant)
                self._looked_at = True
        if region is None or not region.cut:
            return output
        local = region.local_shape(self.hidden_size)  # type: ignore[attr-defined]

        def is_shard(path: Path, x: Tensor) -> bool:
            return path in shards or tuple(x.shape) == local  # recorded hidden states never were handles

        return map_tensors(output, lambda path, x: TokenShard(x, region, state) if is_shard(path, x) else x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The Hugging Face forward; handles leave as the shards they hold, for the hooks."""

        def held(path: Path, x: Tensor) -> Tensor:
            if not isinstance(x, TokenShard):
                return x
            if self._shards is not None:
                self._shards.add(path)
            return x.local()

        output = map_tensors(super().forward(*args, **kwargs), held)  # type: ignore[misc]
        if self.seqpar.hook_spans is not None:  # from here on the hooks of this module run
            self.seqpar.hook_spans.append((_get_sequence_nr(), sys.maxsize))
        return output

    def _only_tokens(self, args: Any, kwargs: Any) -> bool:
        """Whether the model was given nothing that its positions could depend on but the number of tokens."""
        more = [*args[1:], *(x for name, x in kwargs.items() if name not in ("input_ids", "inputs_embeds"))]
        return all(x is None or isinstance(x, bool | int | float | str) for x in more)

    def _forked(self, seed: int, region: TokenRegion) -> AbstractContextManager[None]:
        """The stream of random numbers that the layers draw from."""
        if not self.training:  # type: ignore[attr-defined]
            return nullcontext()
        return self.seqpar.random.fork(seed + self.stream, per_rank=region.cut)

    def _batch_and_seq(self, args: Any, kwargs: Any) -> tuple[int, int] | None:
        """(b, s) of the tokens that the model was given; None for one that pads them, or makes them itself, of images."""
        if self.pads:
            return None
        names = parameters_of(type(self).forward)
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in _TOKENS:
            if given.get(name) is not None:
                shape = given[name].shape
                if len(shape) != (2 if name == "input_ids" else 3):
                    raise SeqParError(
                        f"{name} of shape {list(shape)}: a sharded model takes [batch, tokens], or [batch, tokens, h]"
                    )
                return int(shape[0]), int(shape[1])
        if not set(_TOKENS).intersection(names):
            return None
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

    def _recomputes_reentrantly(self) -> bool:
        """Whether layers are checkpointed so that each runs a backward pass of its own."""
        layers = (m for m in (self._sharded or {}).values() if isinstance(m, ShardedLayer))
        recompute = (
            getattr(m, "_gradient_checkpointing_func", None)
            for m in layers
            if getattr(m, "gradient_checkpointing", False)
        )
        return any(getattr(function, "keywords", {}).get("use_reentrant") for function in recompute)

    def _refuse_replaced(self) -> None:
        """A forward that was put on a sharded module's object hides its own, and gives wrong gradients without an error."""
        if self._sharded is None:
            self._sharded = {name: m for name, m in self.named_modules() if "seqpar" in vars(m)}  # type: ignore[attr-defined]
        for name, module in self._sharded.items():
            if "forward" in vars(module):
                source = getattr(vars(module)["forward"], "__module__", "somebody")
                raise PlanError(
                    f"the forward of {name or type(module).__name__} was replaced by {source} after the model was sharded; apply "
                    "kernels before deepspeed.initialize (with the HF Trainer: train before the first evaluation)"
                )

    def _watched(self) -> frozenset[int]:
        """Ids of the norms before blocks that are watched, and of the blocks in which anything is: an output goes through wrappers."""
        if self._seen_through is None:
            modules = (self._sharded or {}).values()
            self._seen_through = [
                (id(m), list(m.modules()))
                for m in modules
                if isinstance(m, ShardedBlock) or getattr(m, "stands_before_blocks", False)
            ]
        # DeepSpeed's ZeRO-3 puts an autograd function in the place of F.linear, for all models of the process and for good; hooks of
        # all modules must take handles as they are, but those of backward put what a module returns through such a function too.
        hooks = torch.nn.modules.module
        below_python = bool(hooks._global_backward_hooks or hooks._global_backward_pre_hooks)
        below_python |= torch.nn.functional.linear.__module__ not in ("torch._C._nn", "torch.nn.functional")
        return frozenset(name for name, modules in self._seen_through if below_python or any(map(_is_watched, modules)))

    def _with_states(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments, with another stack's output whole for the cross-attentions of all layers.

        It is gathered once, and the gradients that the layers' linears give it, which are parts, are reduce-scattered once. Where every
        rank repeats the blocks that read it, they are whole on each.
        """
        if not self.states:
            return args, kwargs
        names = parameters_of(type(self).forward)
        args = tuple(self._whole(x) if name in self.states else x for name, x in zip(names, args, strict=False))
        return args, {name: self._whole(x) if name in self.states else x for name, x in kwargs.items()}

    def _whole(self, x: Any) -> Any:
        if isinstance(x, TokenShard):
            if torch.is_grad_enabled():
                region = x.region
                return region.full_for_replicated(x.local()) if self.repeats_states else region.full_for_partial(x.local())
            x._expected = True
            return x.materialise("cross-attention")  # kept: generate() gives the same one to every step
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled() and not self.repeats_states:
            return copy_for_partial(x, self.seqpar.groups.tp_group)
        return x

    def _refuse_attentions(self, kwargs: dict[str, Any]) -> None:
        asked = kwargs.get("output_attentions")
        if asked or (asked is None and getattr(self.config, "output_attentions", False)):  # type: ignore[attr-defined]
            raise PlanError(
                "output_attentions=True is not available: each rank holds its own heads only; set it to False"
            )


class ShardedTopModel(_Guarded, HidesHandles):
    """What the user calls, around the base model: shows `logits` (and hidden states) as handles."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the Hugging Face model; `outputs.logits` becomes real when it is used.

        What stands outside the base model (a vision tower, a classifier's dropout) is replicated, and draws alike on every rank.
        """
        with self._guarded(args, kwargs) as (seed, args, kwargs):
            fork = self.seqpar.random.fork(seed, per_rank=False) if self.training else nullcontext()  # type: ignore[attr-defined]
            with fork:
                return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the Hugging Face model's; see HidesHandles."""
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's generate, on every rank of the group; all sample alike, as the group's first rank was seeded."""
        self.seqpar.random.agree()
        return super().generate(*args, **kwargs)  # type: ignore[misc]


def _is_watched(module: Any) -> bool:
    """Whether hooks of the module's own see what it takes or returns, and may keep or change it.

    A hook with a true `only_looks` takes handles as they are.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if not any(hooks):  # asked of every module in every forward
        return False
    return any(not getattr(hook, "only_looks", False) for found in hooks for hook in found.values())
