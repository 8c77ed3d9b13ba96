"""The vocabulary-parallel head of a language model.

Legend: b batch, s sequence, T = b*s tokens, h hidden, V vocabulary, _r this rank's part.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..comm.regions import gather_columns
from .handles import is_deepspeeds
from .linear import between_users_hooks, has_hooks_beside_deepspeeds
from .logits import ShardedLogits
from .products import cast_for_autocast
from .region import ShardingState, TokenRegion
from .token_handles import TokenShard

__all__ = ["VocabParallelHead"]


class VocabParallelHead(nn.Linear):
    """This rank's rows of the language-model head; its logits are computed when somebody needs them.

        weight [V, h] -> [V_r, h]      input a TokenShard, or [b, s, h] equal on every rank -> ShardedLogits [b, s, V]

    The model's loss takes them in chunks (layers/loss.py); anyone else gets real logits. All work on the weight happens
    inside a call of this module, so that ZeRO-3 fetches and releases it.
    """

    seqpar: ShardingState
    vocab_size: int
    vocab_start: int
    vocab_widths: tuple[int, ...]

    def __call__(self, input: Tensor) -> Tensor:
        """Defers: returns the handle of the logits. The user's forward hooks see it, and may change it, before anything is computed."""
        return between_users_hooks(self, input, self._deferred)  # type: ignore[no-any-return]

    def _deferred(self, input: Tensor) -> Tensor:
        if isinstance(input, TokenShard) and input.is_untouched():
            return ShardedLogits(input.source, input.region, self)
        if isinstance(input, TokenShard):
            input = input.materialise("lm_head")
        flat = input if input.dim() == 3 else input.reshape(1, -1, input.shape[-1])
        region = TokenRegion(flat.shape[0], flat.shape[1], False, self.seqpar.groups)
        logits: Tensor = ShardedLogits(flat, region, self)
        return logits if input.dim() == 3 else logits.view(*input.shape[:-1], self.vocab_size)

    def gathered_logits(self, local: Tensor, region: TokenRegion) -> Tensor:
        """Real logits [b, s, V] on every rank; their gradient is complete on every rank."""
        return self._now(local, _region=region)  # type: ignore[no-any-return]

    def _now(self, *args: Any, **kwargs: Any) -> Any:
        """The call below, with DeepSpeed's hooks alone: the user's have seen the logits."""
        if not has_hooks_beside_deepspeeds(self):
            return super().__call__(*args, **kwargs)
        before, after = self._forward_pre_hooks, self._forward_hooks
        try:
            self._forward_pre_hooks, self._forward_hooks = (
                OrderedDict((n, h) for n, h in hooks.items() if is_deepspeeds(h)) for hooks in (before, after)
            )
            return super().__call__(*args, **kwargs)
        finally:
            self._forward_pre_hooks, self._forward_hooks = before, after

    def loss(self, local: Tensor, region: TokenRegion, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """(summed loss, counted labels), both fp32 scalars; see vocab_parallel_linear_cross_entropy."""
        return self._now(local, _region=region, _labels=labels, **options)  # type: ignore[no-any-return]

    def token_figures(self, local: Tensor, region: TokenRegion, targets: Tensor, **options: Any) -> Any:
        """TokenFigures of every token; see vocab_parallel_token_figures."""
        return self._now(local, _region=region, _labels=targets, _figures=True, **options)

    def forward(  # type: ignore[override]
        self, local: Tensor, _region: TokenRegion, _labels: Tensor | None = None, _figures: bool = False, **options: Any
    ) -> Any:
        """What `gathered_logits`, `loss` and `token_figures` do, below the module's hooks."""
        from .logprobs import vocab_parallel_token_figures
        from .loss import vocab_parallel_linear_cross_entropy

        hidden, weight, bias = cast_for_autocast(local, self.weight, self.bias)
        assert hidden is not None and weight is not None
        with torch.autocast(hidden.device.type, enabled=False):
            if _labels is not None:
                act = vocab_parallel_token_figures if _figures else vocab_parallel_linear_cross_entropy
                return act(
                    hidden.reshape(_region.rows, -1),
                    weight,
                    bias,
                    _labels,
                    _region,
                    vocab_start=self.vocab_start,
                    **options,
                )
            full = _region.full_for_partial(hidden)
            return gather_columns(linear(full, weight, bias), self.vocab_widths, _region.groups.tp_group)
