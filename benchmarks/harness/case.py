"""One case of the comparison: which arm runs what, and the work that it is, counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["LLAMA_8B", "SHAPES", "TINY", "Case", "Shape"]


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def matrix_parameters(self, layers: int) -> int:
        """Weights that multiply every token: all but the embedding and the norms."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return layers * (attention + 3 * self.hidden * self.intermediate) + self.vocab * self.hidden


LLAMA_8B = Shape(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256)
LLAMA_70B = Shape(hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256)
SHAPES = {"8b": LLAMA_8B, "70b": LLAMA_70B}
"""By the size of the Llama 3.1 whose layers they are."""
TINY = Shape(hidden=64, intermediate=96, heads=8, kv_heads=4, head_dim=8, vocab=256)


@dataclass(frozen=True)
class Case:
    """`tokens` of micro batch 1 through `layers` layers; `attention`, `recompute`, `dtype` and `seed` are every arm's.

    `tp`: ranks that share a sequence, by tensor or by sequence parallelism; the groups of so many are data parallel. 0: all ranks.
    """

    arm: str
    tokens: int
    layers: int
    attention: str  # flash, cudnn, or default: whatever torch picks
    recompute: str  # none, full
    dtype: str  # bfloat16, float32
    tiny: bool = False
    zero: int = 1  # ZeRO stage of the DeepSpeed arms that allow a choice
    seed: int = 0
    tp: int = 0
    model: str = "8b"

    @property
    def shape(self) -> Shape:
        return TINY if self.tiny else SHAPES[self.model]

    @property
    def tp_size(self) -> int:
        """`tp`, or the number of ranks."""
        return self.tp or dist.get_world_size()

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def full_recompute(self) -> bool:
        return self.recompute == "full"

    def model_flops(self) -> float:
        """FLOPs of one forward and backward: causal attention counted half, recompute not."""
        shape = self.shape
        attention = 6 * self.layers * self.tokens**2 * shape.heads * shape.head_dim
        return 6.0 * shape.matrix_parameters(self.layers) * self.tokens + attention

    def comparable(self) -> tuple[Any, ...]:
        """What must be equal for two rows to be compared, whatever their arms."""
        key = asdict(replace(self, arm="", zero=0, tp=0))
        return tuple(key.values())
