"""HF Trainer: TrainingArguments(deepspeed=...) whose JSON holds the key. What accelerate does for it is in accelerate.py.

Private names it relies on, each held by a contract test:
`modeling_utils.is_deepspeed_zero3_enabled`, `HfTrainerDeepSpeedConfig.trainer_config_process`, `Trainer._track_num_input_tokens`,
`Trainer._get_num_items_in_batch`, `trainer.speed_metrics`, `TrainingArguments.hf_deepspeed_config`,
`neftune.neftune_post_forward_hook`.
"""

from __future__ import annotations

import contextvars
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_utils
from transformers.integrations import deepspeed as hf_deepspeed

from ds_seqpar.config import KEY
from ds_seqpar.errors import ConfigError
from ds_seqpar.layers.region import ShardingState
from ds_seqpar.plan.wrappers import unwrapped

from .accelerate import ONLY_WHAT_IS_SAVED, is_on, tp_size_of
from .wrapping import wrap

__all__ = ["install"]

_log = logging.getLogger("ds_seqpar")


def install() -> None:
    """Adapts transformers. Idempotent; the Trainer itself is imported when a config is first given to it."""
    wrap(modeling_utils, "is_deepspeed_zero3_enabled", _builds_partitioned)
    wrap(hf_deepspeed.HfTrainerDeepSpeedConfig, "trainer_config_process", _process_config)
    config = hf_deepspeed.deepspeed_config()
    if tp_size_of(config) > 1 and "autotp_size" not in config.get("tensor_parallel", {}):
        raise ConfigError(
            f'TrainingArguments read a DeepSpeed config with "{KEY}" before ds_seqpar was imported; import it first, or start '
            "the script with --module ds_seqpar.run"
        )


def _builds_partitioned(plain: Callable[[], bool]) -> bool:
    """Models that will be sharded are built whole: zero.Init would scatter parameters over all ranks before they are cut.

    ZeRO-3 partitions the shards when the engine is made.
    """
    return plain() and not is_on(hf_deepspeed.deepspeed_config())


def _process_config(plain: Callable[..., None], self: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
    tp_size = tp_size_of(self.config)
    if tp_size == 1:
        plain(self, args, *rest, **kwargs)
        return
    _adapt_trainer()
    if getattr(args, "use_liger_kernel", False) and (args.liger_kernel_config or {}).get(
        "fused_linear_cross_entropy", True
    ):
        _log.warning("Liger's fused loss is turned off: it reads the whole head, and ds_seqpar fuses the loss itself")
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
    if getattr(args, "hf_deepspeed_config", None) is None:
        args.hf_deepspeed_config = self  # the plugin came from accelerate's own config; get_tp_size() looks here
    theirs = self.config.pop("train_batch_size", None)
    try:
        plain(self, args, *rest, **kwargs)
    finally:
        if theirs is not None:
            self.config["train_batch_size"] = theirs
    if theirs is not None and not (rest or kwargs.get("auto_find_batch_size")):
        samples = args.world_size // tp_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.fill_match("train_batch_size", samples, "train_batch_size (calculated over data-parallel ranks)")


def _adapt_trainer() -> None:
    from transformers import Trainer, trainer
    from transformers.integrations import neftune

    wrap(Trainer, "_get_num_items_in_batch", _count_items_once)
    wrap(Trainer, "store_flos", _count_flos_once)
    wrap(Trainer, "save_model", _save_model)
    wrap(Trainer, "evaluate", _while_evaluating)
    wrap(Trainer, "predict", _while_evaluating)
    wrap(trainer, "speed_metrics", _speed)
    wrap(neftune, "neftune_post_forward_hook", _noise_of_own_rows)


def _count_items_once(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """`gather` counts each data-parallel rank once, and the Trainer goes on as if it had summed over all ranks.

    Up to transformers 5.23 it then multiplies the loss by all ranks, later it divides both by tp_size: either way tp_size is missing.
    """
    items, tp_size = plain(self, *args, **kwargs), self.get_tp_size()
    return items if items is None or tp_size == 1 else (items * tp_size).round()


def _count_flos_once(plain: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    self.current_flos /= self.get_tp_size()
    plain(self, *args, **kwargs)


def _save_model(plain: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    token = ONLY_WHAT_IS_SAVED.set(True)
    try:
        plain(self, *args, **kwargs)
    finally:
        ONLY_WHAT_IS_SAVED.reset(token)


def _noise_of_own_rows(plain: Callable[..., Any], embedding: Any, ids: Any, output: Tensor) -> Tensor:
    """NEFTune scales its noise by the sizes of the output, and hooks see this rank's rows: [1, c, h] of [b, s, h].

    Each rank draws for its own rows, as for a dropout.
    """
    state: ShardingState | None = getattr(unwrapped(embedding), "seqpar", None)
    region = None if state is None else state.region
    if region is None or not region.cut or tuple(output.shape) != region.local_shape(output.shape[-1]):
        return plain(embedding, ids, output)  # type: ignore[no-any-return]
    noise = plain(embedding, ids, torch.zeros_like(output))
    return output + noise * math.sqrt(region.rows / region.seq)  # type: ignore[no-any-return]


_evaluating: contextvars.ContextVar[Any] = contextvars.ContextVar("the Trainer that evaluates")


def _while_evaluating(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    token = _evaluating.set(self)
    try:
        return plain(self, *args, **kwargs)
    finally:
        _evaluating.reset(token)


def _speed(plain: Callable[..., Any], split: str, start_time: float, **counts: Any) -> Any:
    """The Trainer takes a step of an evaluation to be a batch on each rank; under the key it is one on each data-parallel rank."""
    trainer = _evaluating.get(None)
    tp_size = 1 if trainer is None else trainer.get_tp_size()
    if tp_size > 1 and counts.get("num_samples") is not None and counts.get("num_steps") is not None:
        rows = trainer.args.eval_batch_size * (trainer.args.world_size // tp_size)
        counts["num_steps"] = math.ceil(counts["num_samples"] / rows)
    return plain(split, start_time, **counts)
