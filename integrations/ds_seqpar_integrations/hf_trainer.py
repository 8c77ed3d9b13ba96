"""HF Trainer: TrainingArguments(deepspeed=...) whose JSON holds the key. What accelerate does for it is in accelerate.py.

Private names it relies on, each held by a contract test:
`modeling_utils.is_deepspeed_zero3_enabled`, `HfTrainerDeepSpeedConfig.trainer_config_process`, `Trainer._track_num_input_tokens`,
`Trainer._get_num_items_in_batch`, `TrainingArguments.hf_deepspeed_config`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import modeling_utils
from transformers.integrations import deepspeed as hf_deepspeed

from ds_seqpar.config import KEY
from ds_seqpar.errors import ConfigError

from .accelerate import is_on, tp_size_of
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
    from transformers import Trainer

    wrap(Trainer, "_get_num_items_in_batch", _count_items_once)
    wrap(Trainer, "_track_num_input_tokens", _count_tokens_once)
    wrap(Trainer, "store_flos", _count_flos_once)


def _count_items_once(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The Trainer divides by tp_size also where it did not sum over the ranks (average_tokens_across_devices=False)."""
    items = plain(self, *args, **kwargs)
    return items if items is None or self.args.average_tokens_across_devices else items * self.get_tp_size()


def _count_tokens_once(plain: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """The Trainer sums over all ranks, and the ranks of a tensor-parallel group hold the same tokens."""
    before = self.state.num_input_tokens_seen
    plain(self, *args, **kwargs)
    self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.get_tp_size()


def _count_flos_once(plain: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    self.current_flos /= self.get_tp_size()
    plain(self, *args, **kwargs)
