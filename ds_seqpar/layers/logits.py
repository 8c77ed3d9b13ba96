"""The handle of the logits: computed where and as far as somebody reads them.

Legend: b batch, s sequence, T = b*s, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SeqParError
from .handles import Handle, is_deepspeeds, is_shape_of, name_of, refuse_outside_graph
from .region import TokenRegion
from .token_operations import ARITHMETIC

if TYPE_CHECKING:
    from .head import VocabParallelHead

__all__ = ["ShardedLogits"]


@dataclass(frozen=True)
class _OverVocabulary:
    """`func` of logits and one number for each entry of the vocabulary, `other` [V]; takes all of it or this rank's part."""

    func: Callable[..., Tensor]
    other: Tensor
    start: int
    stands_left: bool

    def __call__(self, logits: Tensor) -> Tensor:
        width = logits.shape[-1]
        other = self.other if width == self.other.numel() else self.other.narrow(0, self.start, width)
        return self.func(other, logits) if self.stands_left else self.func(logits, other)


class _Made:
    """What the logits of one call of the head depend on beside its input, and what became of them; all handles of them share it.

    `autocast`: the dtype that torch.autocast asked for, or None. `lost`: a fused loss was made of them, past their gradient;
    `derived`: other handles were computed from them.
    """

    def __init__(self, head: VocabParallelHead, device: torch.device) -> None:
        self.autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        self.lost = self.derived = False
        self.generation = head.seqpar.generation
        self.weights = [(p, p.data_ptr(), p._version, _sample(p)) for p in _weights_of(head)]

    def weights_changed(self, head: VocabParallelHead, *, look: bool) -> bool:
        """Whether the head's weights are others than they were; `look`: at some of the values too, which waits for a GPU."""
        if head.seqpar.generation != self.generation:
            return True
        now = _weights_of(head)
        if len(now) != len(self.weights):
            return True  # ZeRO-3 has taken them, or functional_call has given its own back
        for p, (then, address, version, sample) in zip(now, self.weights, strict=True):
            if p is not then or p.data_ptr() != address or p._version != version:
                return True
            if look and not torch.equal(_sample(p), sample):
                return True  # written through `.data`, which no version counts
        return False


def _weights_of(head: VocabParallelHead) -> list[Tensor]:
    """Its weight and bias, unless ZeRO-3 holds them, which moves them and whose steps the engine counts."""
    held = (head.weight, head.bias)
    return [p for p in held if p is not None and not hasattr(p, "ds_id")]


def _sample(parameter: Tensor) -> Tensor:
    """A few of its values: in whatever way weights are swapped or averaged, it is all of them."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 64)].clone()


class ShardedLogits(Handle):
    """[b, s, V], or [T, V], over `source` (the hidden rows that this rank holds) and the head's vocabulary shard; not computed yet.

    Scalings, casts, tanh and a bias over the vocabulary are kept in `transforms` and replayed on whatever part of the logits is
    computed. torch's cross_entropy of [T, V] is the fused loss (layers/loss.py).
    """

    head: VocabParallelHead
    transforms: tuple[Callable[[Tensor], Tensor], ...]
    made: _Made

    def over(self, source: Tensor) -> Tensor:
        return self._like(source=source)

    def __new__(
        cls,
        source: Tensor,
        region: TokenRegion,
        head: VocabParallelHead,
        transforms: tuple[Callable[[Tensor], Tensor], ...] = (),
        dtype: torch.dtype | None = None,
        *,
        flat: bool = False,
        made: _Made | None = None,
    ) -> ShardedLogits:
        """`source` in `region.local_shape`; `dtype` of the logits if a transform changed it; `flat` for [T, V]; `made` of those
        that it is computed from."""
        made = _Made(head, source.device) if made is None else made
        tokens = (region.tokens,) if flat else (region.batch, region.seq)
        handle = cls._make((*tokens, head.vocab_size), source, region, head.seqpar, dtype or made.autocast or source.dtype)
        handle.head, handle.transforms, handle.made = head, transforms, made
        return handle  # type: ignore[no-any-return]

    def _like(
        self,
        *,
        source: Tensor | None = None,
        then: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        flat: bool | None = None,
    ) -> Tensor:
        transforms = self.transforms if then is None else (*self.transforms, then)
        return ShardedLogits(
            self.source if source is None else source,
            self.region,
            self.head,
            transforms,
            dtype or self.dtype,
            flat=self.dim() == 2 if flat is None else flat,
            made=self.made,
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = name_of(func)[0]
        result = None
        if name == "cross_entropy":
            from .loss import cross_entropy_of

            result = cross_entropy_of(*args, **(kwargs or {}))
        elif name in ("view", "reshape") and not kwargs and isinstance(args[0], ShardedLogits):
            result = args[0]._reshaped(args[1:])
        elif name in ARITHMETIC and not kwargs and len(args) == 2:
            result = _over_vocabulary(func, *args)
        return super().__torch_function__(func, types, args, kwargs) if result is None else result

    def _reshaped(self, sizes: tuple[Any, ...]) -> Tensor | None:
        """The handle as [b, s, V] or [T, V]; None for any other shape."""
        region, width = self.region, self.head.vocab_size
        for flat, shape in ((True, (region.tokens, width)), (False, (region.batch, region.seq, width))):
            if is_shape_of(self, sizes, shape):
                view = self._like(flat=flat)
                assert isinstance(view, Handle)
                return self.viewed_as(view)
        return None

    def _autograd(self, name: str) -> Any:
        """A head that is trained alone gives logits a gradient that their source does not have."""
        if self.source.requires_grad or not (self._grad_mode and self.head.weight.requires_grad):
            return getattr(self.source, name)
        # Some node of the graph, not None: enough for those who ask whether there is one, without gathering anything.
        if name == "grad_fn":
            return torch.autograd.graph.get_gradient_edge(self.head.weight).node
        return name == "requires_grad"

    def _gather(self) -> Tensor:
        self.refuse_other_weights(look=self.state.guarded_seed is None)
        with self.as_called():
            logits = self.head.gathered_logits(self.source, self.region)
        for transform in self.transforms:
            logits = transform(logits)
        return logits.view(self.shape)

    def refuse_other_weights(self, *, look: bool = False) -> None:
        """Raises SeqParError if the head's weights are not those of the forward any more; see _Made.weights_changed."""
        if self.made.weights_changed(self.head, look=look):
            raise SeqParError(
                "outputs.logits are computed when they are first read, and the weights have changed since their forward (engine.step() or "
                "another optimizer's step, load_state_dict, averaged weights swapped in or out, functional_call); read them before "
                "the step or the swap: logits = outputs.logits.clone()"
            )

    def as_called(self) -> AbstractContextManager[Any]:
        """Autocast as it was when the head was called."""
        return torch.autocast(self.device.type, dtype=self.made.autocast, enabled=self.made.autocast is not None)

    def _refuse_to_be_watched(self, name: str, args: Any) -> None:
        if name == "register_hook" and is_deepspeeds(args[1]):
            return  # it waits for the beginning of backward, wherever that is
        if self.made.lost or self.made.derived:
            raise SeqParError(
                f"{name} on logits that a loss was already made from would see no gradient of that loss, which does not go through them; "
                "call the model without labels, put the hook on, and make the loss from outputs.logits"
            )

    def _apply(self, act: Callable[[Tensor], Tensor]) -> Tensor:
        self.made.derived = True
        return self._like(then=act, dtype=act(torch.empty(1, dtype=self.dtype, device=self.device)).dtype)


def _over_vocabulary(func: Callable[..., Tensor], left: Any, right: Any) -> Tensor | None:
    """Logits and one number for each entry of the vocabulary, such as a bias that is no parameter; None for anything else."""
    logits, other = (left, right) if isinstance(left, ShardedLogits) else (right, left)
    if not isinstance(logits, ShardedLogits) or not isinstance(other, Tensor) or isinstance(other, Handle):
        return None
    vocabulary = other.dim() in range(1, logits.dim() + 1) and other.numel() == other.shape[-1] == logits.shape[-1]
    if not vocabulary or other.requires_grad or not logits.is_untouched():
        return None
    refuse_outside_graph(logits)
    act = _OverVocabulary(func, other.detach().clone().view(-1), logits.head.vocab_start, other is left)
    dtype = torch.promote_types(logits.dtype, other.dtype)
    logits.made.derived = True
    with torch.set_grad_enabled(logits._grad_mode and torch.is_grad_enabled()):
        return logits._like(then=act, dtype=dtype)
