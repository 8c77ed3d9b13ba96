"""The borders that a forward crosses: model, layer, block, token-wise module, head.

Each is a mixin put before the Hugging Face class. `__call__` converts outside the module's hooks and `forward` inside
them, so that DeepSpeed's ZeRO-3 hooks only ever see plain tensors with their autograd history.

Legend: b batch, s sequence, h hidden, c = ceil(b*s/t).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..comm.regions import copy_for_partial, share_of_replicated, whole_of_share
from ..errors import CheckpointError, PlanError, SeqParError
from .attention import fastest_attention
from .handles import GatheredInput, Handle, NormedRows, ShardedLogits, TokenShard, UnsummedRows, is_watched
from .masking import positions_of_the_model
from .norm import remake_of
from .random import seed_of_state
from .region import ShardingState, TokenRegion
from .rotary import within_sharded_block

__all__ = [
    "HidesHandles",
    "Passage",
    "ShardedBlock",
    "ShardedLayer",
    "ShardedModel",
    "ShardedTopModel",
    "TokenDropout",
    "TokenwiseModule",
    "become",
]


Path = tuple[Any, ...]


@functools.cache
def _sharded_class(cls: type, mixins: tuple[type, ...], before: bool) -> type:
    bases = mixins if cls in mixins[0].__mro__ else (*mixins, cls) if before else (cls, *mixins)
    # The names stay Hugging Face's: config.architectures, output recording and kernels look classes up by name.
    namespace: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    if before and "forward" in vars(mixins[0]):
        namespace["forward"] = _with_signature_of(cls, mixins[0].forward)  # type: ignore[attr-defined]
    return type(cls.__name__, bases, namespace)


def _with_signature_of(cls: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that still shows the original's signature: generate() and the HF Trainer read it."""

    def sharded_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    functools.update_wrapper(sharded_forward, cls.forward)  # type: ignore[attr-defined]
    return sharded_forward


def _on_object(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(getattr(forward, "__func__", forward))
    def of_class(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return of_class


def become(module: nn.Module, *mixins: type, before: bool = True) -> None:
    """Makes `module` an instance of its own class behind (or before) the mixins, in place: parameters, hooks and
    attributes stay the objects they are."""
    cls: Any = type(module)  # Module's metaclass hides from mypy that classes are hashable
    own = vars(module).pop("forward", None)
    if own is not None:  # a kernel library put it on the object, where it would hide the mixin's
        cls = type(
            cls.__name__,
            (cls,),
            {"forward": _on_object(own), "__module__": cls.__module__, "__qualname__": cls.__qualname__},
        )
    module.__class__ = _sharded_class(cls, mixins, before)


class TokenwiseModule:
    """A module outside the layers that treats each token alone (the final norm, a head's linear): acts on the shard of a
    TokenShard.

    Its gradients are parts that are summed over the group. Where every rank has the input whole (a pooled token) each rank
    contributes its share of the gradient that all of them compute alike. `summed` names the parameters whose gradients are summed
    as this module's code uses them, so that other code may use the same parameter on whole activations.
    """

    seqpar: ShardingState
    summed: tuple[str, ...] = ()

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """TokenShard -> TokenShard; a plain [b, s, h] of the running forward too, while training; other tensors as before."""
        call, state = super().__call__, self.seqpar  # type: ignore[misc]
        if isinstance(input, TokenShard):
            output = call(input.local(), *args, **kwargs)
            narrower = input._expected or output.shape[-1] < input.shape[-1]
            return TokenShard(output, input.region, state, meant_whole=narrower)
        if not (state.sequence_parallel and torch.is_grad_enabled()):
            return call(input, *args, **kwargs)  # type: ignore[no-any-return]
        if _is_all_tokens(input, state.region):
            assert state.region is not None
            return TokenShard(call(state.region.local_of_replicated(input), *args, **kwargs), state.region, state)
        group = state.groups.tp_group
        return share_of_replicated(call(whole_of_share(input, group), *args, **kwargs), group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with the parameters that are summed in place of those that it holds."""
        if not (self.summed and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        held, state = [getattr(self, name) for name in self.summed], self.seqpar
        values = state.partial.all_summed(held, state.region.together if state.region else None)
        shown = vars(self)  # found before the module's parameters are
        try:
            shown.update(zip(self.summed, values, strict=True))
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for name in self.summed:
                shown.pop(name, None)


class TokenDropout:
    """Dropout outside the layers: other masks on every rank for tokens that are held in parts, the same for what all have."""

    seqpar: ShardingState

    def __call__(self, input: Tensor) -> Tensor:
        """TokenShard -> TokenShard; a plain [b, s, h] of the running forward too, while training; other tensors as before."""
        call, state = super().__call__, self.seqpar  # type: ignore[misc]
        region = state.region
        if isinstance(input, TokenShard):
            # Within a forward the stream is this rank's already.
            alone = state.random.fork(seed_of_state(), per_rank=True) if region is None else nullcontext()
            with alone:
                return TokenShard(call(input.local()), input.region, state, meant_whole=input._expected)
        if region is not None and not region.cut:
            return call(input)  # type: ignore[no-any-return]
        if state.sequence_parallel and torch.is_grad_enabled() and _is_all_tokens(input, region):
            assert region is not None
            return TokenShard(call(region.local_of_replicated(input)), region, state)
        if not (self.training and self.p):  # type: ignore[attr-defined]
            return call(input)  # type: ignore[no-any-return]
        with state.random.fork(state.random.agreed_seed(), per_rank=False):
            return call(input)  # type: ignore[no-any-return]


def _is_all_tokens(x: Tensor, region: TokenRegion | None) -> bool:
    return region is not None and x.dim() == 3 and tuple(x.shape[:2]) == (region.batch, region.seq)


class ShardedBlock:
    """Attention or MLP: entered with the region's local tensor, which its own code sees as a GatheredInput [b, s, h]."""

    seqpar: ShardingState
    input_name: str
    recomputable: bool
    has_heads: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The input goes positionally, where ZeRO-3's hooks look for it."""
        if not args and self.input_name in kwargs:
            args = (kwargs.pop(self.input_name),)
        call = functools.partial(super().__call__, **kwargs)  # type: ignore[misc]
        state = self.seqpar
        replayed = state.recompute_mlp and self.recomputable and torch.is_grad_enabled() and self.training  # type: ignore[attr-defined]
        if args and isinstance(args[0], NormedRows) and (replayed or id(self) in args[0].region.watched):
            args = (args[0].materialise(), *args[1:])
        if replayed:
            region = state.region

            def replay(*inputs: Any) -> Any:
                with state.within(region):
                    return call(*inputs)

            return checkpoint(replay, *args, use_reentrant=False)
        return call(*args)

    def forward(self, local: Tensor, *args: Any, **kwargs: Any) -> Any:
        """local [1, c, h] (or [b, s, h] where tokens are not cut) -> what the block returns, its output local too."""
        state, region = self.seqpar, self.seqpar.region
        if region is None:
            raise SeqParError(
                f"{type(self).__name__} was called outside a forward of its model; a recomputed layer must go through "
                "gradient_checkpointing_enable() or the recompute field of the ds_seqpar key"
            )
        if isinstance(local, NormedRows):
            handle = GatheredInput.of_normed(local)
        else:
            handle = GatheredInput(local, region, state, remake_of(local))
        drops_heads = not region.cut and self.training and state.groups.tp_size > 1  # type: ignore[attr-defined]
        outer, state.in_block, state.block_forked = state.in_block, True, drops_heads
        state.sums_rows_later = not outer and torch.is_grad_enabled() and id(self) not in region.watched
        try:
            fork = state.random.fork(seed_of_state(), per_rank=True) if drops_heads else nullcontext()
            attention = fastest_attention(local.device, region.seq) if self.has_heads else nullcontext()
            with fork, attention, within_sharded_block():
                output = super().forward(handle, *args, **kwargs)  # type: ignore[misc]
        finally:
            state.in_block, state.block_forked, state.sums_rows_later = outer, False, False
        state.apart |= handle.unused()  # such as the keys of a cross-attention
        return output


@functools.cache
def _parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of its arguments, without self. Asking takes as long as launching ten kernels."""
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


class ShardedLayer:
    """A decoder layer: between its blocks it runs on this rank's tokens; its input and output are TokenShards.

    `token_inputs` names further arguments of its forward that hold something for each token, [b, s, ...].
    """

    seqpar: ShardingState
    token_inputs: tuple[str, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """TokenShard or full [b, s, h], the first argument -> TokenShard (or, where tokens are not cut, [b, s, h])."""
        region = self.seqpar.region
        if region is None:
            raise SeqParError(f"{type(self).__name__} was called outside a forward of its model")
        first, *names = _parameters_of(super().forward.__func__)  # type: ignore[misc]
        hidden_states, *rest = args or (kwargs.pop(first),)
        if isinstance(hidden_states, TokenShard):
            local = hidden_states.local()
        else:
            local = region.local_of_replicated(hidden_states)
        rest = [self._local(name, x, region) for name, x in zip(names, rest, strict=False)]
        kwargs = {name: self._local(name, x, region) for name, x in kwargs.items()}
        output = super().__call__(local, *rest, _region=region, **kwargs)  # type: ignore[misc]
        if isinstance(output, tuple):
            return (self._wrapped(output[0], region), *output[1:])
        return self._wrapped(output, region)

    def _local(self, name: str, x: Any, region: TokenRegion) -> Any:
        if isinstance(x, TokenShard):
            return x.local()
        if name in self.token_inputs and isinstance(x, Tensor):
            return region.local_of_replicated(x)
        return x

    def _wrapped(self, local: Tensor, region: TokenRegion) -> Tensor:
        return TokenShard(local, region, self.seqpar) if region.cut else local

    def forward(self, *args: Any, _region: TokenRegion, **kwargs: Any) -> Any:
        """The region travels as an argument, so a recompute during backward stands where its forward stood."""
        with self.seqpar.within(_region):
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
            if isinstance(output, tuple) and isinstance(output[0], UnsummedRows):
                return (output[0].materialise(), *output[1:])
            return output.materialise() if isinstance(output, UnsummedRows) else output


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

    @contextmanager
    def _guarded(self, args: Any, kwargs: Any) -> Iterator[int]:
        state = self.seqpar
        if state.guarded_seed is not None:
            yield state.guarded_seed
            return
        state.guarded_seed = state.guard.check(args, kwargs, seeds=self.training)  # type: ignore[attr-defined]
        try:
            yield state.guarded_seed
        finally:
            state.guarded_seed = None


class ShardedModel(_Guarded):
    """The base model, or one of its stacks: decides how this forward's tokens lie, and shows its outputs as TokenShards.

    `states` names arguments that are another stack's output; `stream` numbers the stacks, whose random numbers differ.
    """

    states: tuple[str, ...] = ()
    stream: int = 0

    _shards: set[Path] | None = None  # where in the output of the call that is running the shards are
    _sharded: dict[str, nn.Module] | None = None
    _seen_through: list[tuple[int, list[nn.Module]]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the Hugging Face model; hidden states come back as handles that become real when they are used."""
        state = self.seqpar
        state.partial.arm()
        self._refuse_replaced()
        with self._guarded(args, kwargs) as seed:
            self._refuse_attentions(kwargs)
            watched = self._watched()
            region = state.region_for(
                *self._batch_and_seq(args, kwargs), together=not self._recomputes_reentrantly(), watched=watched
            )
            args, kwargs = self._with_states(args, kwargs)
            fork = state.random.fork(seed + self.stream, per_rank=region.cut) if self.training else nullcontext()  # type: ignore[attr-defined]
            own_positions = positions_of_the_model() if self._only_tokens(args, kwargs) else nullcontext()
            shards: set[Path] = set()
            outer, self._shards = self._shards, shards
            try:
                with state.within(region), fork, own_positions:
                    output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            finally:
                self._shards = outer
        if not region.cut:
            return output
        local = region.local_shape(self.hidden_size)  # type: ignore[attr-defined]

        def is_shard(path: Path, x: Tensor) -> bool:
            return path in shards or tuple(x.shape) == local  # recorded hidden states never were handles

        return _map(output, lambda path, x: TokenShard(x, region, state) if is_shard(path, x) else x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The Hugging Face forward; handles leave as the shards they hold, for the hooks."""

        def held(path: Path, x: Tensor) -> Tensor:
            if not isinstance(x, TokenShard):
                return x
            if self._shards is not None:
                self._shards.add(path)
            return x.local()

        return _map(super().forward(*args, **kwargs), held)  # type: ignore[misc]

    def _only_tokens(self, args: Any, kwargs: Any) -> bool:
        """Whether the model was given nothing that its positions could depend on but the number of tokens."""
        more = [*args[1:], *(x for name, x in kwargs.items() if name not in ("input_ids", "inputs_embeds"))]
        return all(x is None or isinstance(x, bool | int | float | str) for x in more)

    def _batch_and_seq(self, args: Any, kwargs: Any) -> tuple[int, int]:
        names = _parameters_of(type(self).forward)
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in ("input_ids", "inputs_embeds", "hidden_states"):
            if given.get(name) is not None:
                shape = given[name].shape
                if len(shape) != (2 if name == "input_ids" else 3):
                    raise SeqParError(
                        f"{name} of shape {list(shape)}: a sharded model takes [batch, tokens], or [batch, tokens, h]"
                    )
                return int(shape[0]), int(shape[1])
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
        return frozenset(name for name, modules in self._seen_through if below_python or any(map(is_watched, modules)))

    def _with_states(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments, with another stack's output whole for the cross-attentions of all layers.

        It is gathered once, and the gradients that the layers' linears give it, which are parts, are reduce-scattered once.
        """
        if not self.states:
            return args, kwargs
        names = _parameters_of(type(self).forward)
        args = tuple(self._whole(x) if name in self.states else x for name, x in zip(names, args, strict=False))
        return args, {name: self._whole(x) if name in self.states else x for name, x in kwargs.items()}

    def _whole(self, x: Any) -> Any:
        if isinstance(x, TokenShard):
            if torch.is_grad_enabled():
                return x.region.full_for_partial(x.local())
            x._expected = True
            return x.materialise("cross-attention")  # kept: generate() gives the same one to every step
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            return copy_for_partial(x, self.seqpar.groups.tp_group)
        return x

    def _refuse_attentions(self, kwargs: dict[str, Any]) -> None:
        asked = kwargs.get("output_attentions")
        if asked or (asked is None and getattr(self.config, "output_attentions", False)):  # type: ignore[attr-defined]
            raise PlanError(
                "output_attentions=True is not available: each rank holds its own heads only; set it to False"
            )


class HidesHandles:
    """A module whose outputs are handles to its caller, but to its hooks the tensors that they are made of."""

    _handles: dict[Path, Handle] | None = None  # of the call that is running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Output tensors that were handles inside are handles again."""
        handles: dict[Path, Handle] = {}
        outer, self._handles = self._handles, handles
        try:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._handles = outer
        return _map(output, lambda path, x: handles[path].over(x) if path in handles else x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward; handles leave as the tensors they are made of, for the hooks.

        A caller that takes `forward` itself gets what a call returns.
        """
        handles = self._handles
        if handles is None:
            return self(*args, **kwargs)

        def plain(path: Path, x: Tensor) -> Tensor:
            if not isinstance(x, Handle):
                return x
            if not x.is_untouched():
                return x.materialise("output")
            handles[path] = x
            return x.source

        return _map(super().forward(*args, **kwargs), plain)  # type: ignore[misc]


class Passage(HidesHandles):
    """A module that handles go through: an encoder around its layers, a head around its linears.

    To its hooks the inputs and outputs are the tensors that they are made of; to its own code and its caller they are handles.
    """

    _given: dict[Path, Handle] | None = None  # to the call that is running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        given: dict[Path, Handle] = {}

        def plain(path: Path, x: Tensor) -> Tensor:
            if not isinstance(x, TokenShard | ShardedLogits):
                return x
            if not x.is_untouched():
                return x.materialise(type(self).__name__)
            given[path] = x
            return x.source

        args, kwargs = _map(args, plain), _map(kwargs, plain, ("keyword",))
        outer, self._given = self._given, given
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._given = outer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, on handles again."""
        given = self._given or {}

        def as_given(path: Path, x: Tensor) -> Tensor:
            return given[path].over(x) if path in given else x

        return super().forward(*_map(args, as_given), **_map(kwargs, as_given, ("keyword",)))


class ShardedTopModel(_Guarded, HidesHandles):
    """What the user calls, around the base model: shows `logits` (and hidden states) as handles."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the Hugging Face model; `outputs.logits` becomes real when it is used.

        What stands outside the base model (a vision tower, a classifier's dropout) is replicated, and draws alike on every rank.
        """
        with self._guarded(args, kwargs) as seed:
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


def _map(output: Any, change: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """`output` (tensor, tuple, list or ModelOutput) with its tensors changed; mappings are changed in place."""
    if isinstance(output, Tensor):
        return change(path, output)
    if isinstance(output, dict):
        for key, value in list(output.items()):
            changed = _map(value, change, (*path, key))
            if changed is not value:
                output[key] = changed
        return output
    if type(output) in (tuple, list):
        return type(output)(_map(x, change, (*path, i)) for i, x in enumerate(output))
    return output
