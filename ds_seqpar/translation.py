"""The DeepSpeed config that a run with the key hands on: plain dictionaries, no deepspeed, no torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .config import KEY, SeqParConfig
from .deepspeed_fields import refusal
from .errors import ConfigError

__all__ = ["section", "translated", "waits_to_time"]


def translated(
    ds_config: dict[str, Any], config: SeqParConfig, world: int, default_clipping: float, *, trains: bool = True
) -> dict[str, Any]:
    """The config that DeepSpeed gets: its own tensor-parallel switch on, batch sizes over the data-parallel ranks.

    `world`: how many ranks the run has; `default_clipping`: DeepSpeed's, where the config names none; `trains`: whether there is
    an optimizer. Raises ConfigError for what cannot be done.
    """
    t = config.tp_size
    if world % t:
        raise ConfigError(
            f'"{KEY}.tp_size": {t} does not divide the {world} ranks of this run; use a divisor of {world}'
        )
    refused = refusal(ds_config, KEY)
    if refused:
        raise ConfigError(refused)
    theirs = section(ds_config, "tensor_parallel")
    autotp = theirs.get("autotp_size", 0)
    if autotp not in (0, 1, t):
        raise ConfigError(
            f'"tensor_parallel.autotp_size": {autotp} and "{KEY}.tp_size": {t} contradict each other; remove autotp_size'
        )
    if ds_config.get("sequence_parallel_size", 1) not in (1, None):
        raise ConfigError(
            f'"sequence_parallel_size": {ds_config["sequence_parallel_size"]} (Ulysses) cannot be combined with "{KEY}"; remove one'
        )
    if trains:
        _refuse_wrong_norm(ds_config, t, default_clipping)
    result = copy.deepcopy(ds_config)
    if t > 1:
        result["tensor_parallel"] = {**theirs, "autotp_size": t}
    if not waits_to_time(ds_config):
        result["timers"] = {**section(ds_config, "timers"), "throughput": {"synchronized": False}}
    result.update(_batch_sizes(ds_config, world // t))
    result.pop("train_batch_size", None)  # DeepSpeed would divide it by the world, not by the data-parallel size
    return result


def waits_to_time(ds_config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's throughput timer is as the user has it. It waits for the GPU before every forward and after every step
    unless told otherwise, and then the host has launched nothing when the GPU begins a forward.
    """
    return "throughput" in section(ds_config, "timers")


def section(ds_config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object of the config; empty if it is not there. Raises ConfigError if it is something else."""
    section = ds_config.get(name)
    if section is not None and not isinstance(section, dict):
        raise ConfigError(f'"{name}" must be an object, not {section!r}')
    return section or {}


def _refuse_wrong_norm(ds_config: Mapping[str, Any], tp_size: int, default_clipping: float) -> None:
    """DeepSpeed's ZeRO-0 half-precision optimizer leaves the shards of every rank but the first out of the clipping norm."""
    half = [name for name in ("bf16", "bfloat16", "fp16") if section(ds_config, name).get("enabled")]
    stage = section(ds_config, "zero_optimization").get("stage", 0)
    clipping = ds_config.get("gradient_clipping", default_clipping)
    if tp_size > 1 and half and stage == 0 and clipping:
        raise ConfigError(
            f'"gradient_clipping": {clipping} (DeepSpeed\'s default is {default_clipping}) with "{half[0]}" at ZeRO stage 0 '
            "would clip by a norm that DeepSpeed computes over part of the gradients; set "
            '"zero_optimization": {"stage": 1}, or "gradient_clipping": 0'
        )


def _batch_sizes(ds_config: Mapping[str, Any], dp_size: int) -> dict[str, int]:
    """DeepSpeed's batch arithmetic with the data-parallel size: train = micro x accumulation x dp."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    values = [ds_config.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f'"{name}" must be an integer >= 1, not {value!r}')
    train, micro, accumulation = values
    if train is None:
        if micro is None:
            raise ConfigError('the DeepSpeed config needs "train_micro_batch_size_per_gpu" or "train_batch_size"')
        return {names[1]: micro, names[2]: accumulation or 1}
    if micro is None and accumulation is None:
        micro, accumulation = train // dp_size, 1
    elif micro is None:
        micro = train // (dp_size * accumulation)  # type: ignore[operator]
    elif accumulation is None:
        accumulation = train // (dp_size * micro)
    if micro * accumulation * dp_size != train:
        raise ConfigError(
            f'"train_batch_size": {train} is not micro batch {micro} x accumulation {accumulation} x data-parallel size {dp_size} '
            "(ranks / tp_size); correct it or leave it out"
        )
    return {names[1]: micro, names[2]: accumulation}
