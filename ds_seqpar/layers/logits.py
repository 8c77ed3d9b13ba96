"""The handle of the logits: computed where and as far as somebody reads them.

Legend: b batch, s sequence, T = b*s, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SeqParError
from .handles import Handle, is_shape_of, name_of, refuse_outside_graph
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


class ShardedLogits(Handle):
    """[b, s, V], or [T, V], over `source` (the hidden rows that this rank holds) and the head's vocabulary shard; not computed yet.

    Scalings, casts, tanh and a bias over the vocabulary are kept in `transforms` and replayed on whatever part of the logits is
    computed. torch's cross_entropy of [T, V] is the fused loss (layers/loss.py).
    """

    head: VocabParallelHead
    transforms: tuple[Callable[[Tensor], Tensor], ...]
    generation: int

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
    ) -> ShardedLogits:
        """`source` in `region.local_shape`; `dtype` of the logits if a transform changed it; `flat` for [T, V]."""
        tokens = (region.tokens,) if flat else (region.batch, region.seq)
        handle = cls._make((*tokens, head.vocab_size), source, region, head.seqpar, dtype or source.dtype)
        handle.head, handle.transforms, handle.generation = head, transforms, head.seqpar.generation
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
                return self._like(flat=flat)
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
        if self.generation != self.state.generation:
            raise SeqParError(
                "outputs.logits were first read after engine.step() changed the weights; read them before the step"
            )
        logits = self.head.gathered_logits(self.source, self.region)
        for transform in self.transforms:
            logits = transform(logits)
        return logits.view(self.shape)

    def _apply(self, act: Callable[[Tensor], Tensor]) -> Tensor:
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
    with torch.set_grad_enabled(logits._grad_mode and torch.is_grad_enabled()):
        return logits._like(then=act, dtype=dtype)
