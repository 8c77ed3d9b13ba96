"""What TRL's trainers do by rank (GRPO and RLOO, which generate; a reference model that follows): done by data-parallel rank.

They deal prompts, group rewards and take their slice of the advantages by process, so that the ranks of a tensor-parallel
group must be one process to them. DistillationTrainer, whose loss reads the head's weight itself, is refused: a rank holds a part
of it. TRL is imported by whoever uses it, never here: its classes are adapted once they are there.

Private names it relies on, each held by a contract test:
`GRPOConfig.__post_init__`, `GRPOTrainer._generate_and_score_completions`, `GRPOTrainer._compute_loss`,
`gather`, `gather_object` and `set_seed` of `trl.trainer.grpo_trainer`, and the same of RLOO,
`SyncRefModelCallback.sync_target_model` and `_sync_target_model`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ds_seqpar.config import KEY
from ds_seqpar.errors import ConfigError, PlanError

from . import data_parallel
from .accelerate import tp_size_now, tp_size_of
from .wrapping import wrap

__all__ = ["adapt"]

TRAINERS = {"grpo": ("GRPOConfig", "GRPOTrainer"), "rloo": ("RLOOConfig", "RLOOTrainer")}


def adapt() -> None:
    """Adapts what of these trainers has been imported. Idempotent."""
    for name, (config, trainer) in TRAINERS.items():
        of_config = sys.modules.get(f"trl.trainer.{name}_config")
        if hasattr(of_config, config):
            _count_shares(getattr(of_config, config))
        module = sys.modules.get(f"trl.trainer.{name}_trainer")
        if hasattr(module, trainer):
            for method in ("_generate_and_score_completions", "_compute_loss"):
                wrap(getattr(module, trainer), method, _seen_by_shares)
            wrap(module, "gather", _gather)
            wrap(module, "gather_object", _gather_object)
            wrap(module, "set_seed", _set_seed)
    callback = getattr(sys.modules.get("trl.trainer.callbacks"), "SyncRefModelCallback", None)
    if callback is not None:
        wrap(callback, "sync_target_model", _sync_reference)
    distillation = getattr(sys.modules.get("trl.trainer.distillation_trainer"), "DistillationTrainer", None)
    for method in ("train", "evaluate") if distillation is not None else ():
        wrap(distillation, method, _refuse_distillation)


def _count_shares(config: Any) -> None:
    """The config sizes its generation batch by `world_size`, which it reads before both of its two sizes are known."""
    plain: property = config.world_size
    if getattr(plain.fget, "_knows_ds_seqpar", False):
        return

    def world_size(self: Any) -> int:
        ranks = int(plain.fget(self))  # type: ignore[misc]
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            return ranks
        tp_size = tp_size_of(getattr(getattr(self, "deepspeed_plugin", None), "deepspeed_config", None))
        if tp_size > 1:
            _refuse(self)
        return ranks // tp_size

    world_size._knows_ds_seqpar = True  # type: ignore[attr-defined]
    config.world_size = property(world_size, doc=plain.__doc__)


def _refuse(config: Any) -> None:
    for option, why in (
        ("use_vllm", "hands vLLM whole weights, which no rank holds"),
        ("use_transformers_continuous_batching", "keeps a paged cache of all heads, of which a rank holds its own"),
    ):
        if getattr(config, option, False):
            raise ConfigError(
                f'{option}=True {why} under "{KEY}"; set it to False: the sharded model generates by itself'
            )


def _sync_reference(plain: Callable[..., None], model: Any, reference: Any, alpha: float) -> None:
    """At ZeRO 3 TRL changes the parameters on the world's first rank alone, whose tensor-parallel peers hold other parts."""
    held = [p for p in (*model.parameters(), *reference.parameters()) if hasattr(p, "ds_id")]
    if tp_size_now() == 1 or not held:
        plain(model, reference, alpha)
        return
    import deepspeed

    # Every rank makes its change; the first of those that share a partition is kept.
    with deepspeed.zero.GatheredParameters(held, modifier_rank=0):
        sys.modules["trl.trainer.callbacks"].SyncRefModelCallback._sync_target_model(model, reference, alpha)


def _refuse_distillation(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.get_tp_size() > 1:
        raise PlanError(
            f'{type(self).__name__} multiplies by lm_head.weight itself, and under "{KEY}" a rank holds a part of it; train it without '
            "the key, or distil by another trainer that takes logits from the model"
        )
    return plain(self, *args, **kwargs)


def _seen_by_shares(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    tp_size = self.get_tp_size()
    if tp_size == 1:
        return plain(self, *args, **kwargs)
    accelerator, self.accelerator = self.accelerator, data_parallel.DataParallelView(self.accelerator, tp_size)
    try:
        return plain(self, *args, **kwargs)
    finally:
        self.accelerator = accelerator


def _gather(plain: Callable[..., Any], data: Any) -> Any:
    return plain(data) if tp_size_now() == 1 else data_parallel.gather(data, tp_size_now())


def _gather_object(plain: Callable[..., Any], objects: Any) -> Any:
    return plain(objects) if tp_size_now() == 1 else data_parallel.gather_object(objects, tp_size_now())


def _set_seed(plain: Callable[..., None], seed: int, device_specific: bool = False, **options: Any) -> None:
    """Ranks of a group draw alike: a seed "for each device" is one for each data-parallel rank."""
    tp_size = tp_size_now()
    if not device_specific or tp_size == 1:
        plain(seed, device_specific, **options)
        return
    from accelerate.state import PartialState

    plain(seed + PartialState().process_index // tp_size, False, **options)
