"""What the caller gave `deepspeed.initialize`, and what of it goes on to DeepSpeed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import deepspeed
from deepspeed import comm
from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

from ..config import SeqParConfig
from ..translation import translated

__all__ = ["bound", "ds_config_of", "plain_initialize", "translate", "without_config"]

plain_initialize = deepspeed.initialize


def bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `deepspeed.initialize` by their names."""
    return dict(inspect.signature(plain_initialize).bind_partial(*args, **kwargs).arguments)


def ds_config_of(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The DeepSpeed config, wherever DeepSpeed would take it from; None where DeepSpeed itself must complain."""
    config = given.get("config")
    if config is None:
        config = given.get("config_params")
    if config is None:
        config = getattr(given.get("args"), "deepspeed_config", None)
    if config is None:
        return None
    return dict(config) if isinstance(config, dict) else load_ds_config(config)


def without_config(args: Any) -> Any:
    """`args` without the path of a config, beside which DeepSpeed takes no `config`."""
    if getattr(args, "deepspeed_config", None) is None:
        return args
    args = copy.copy(args)
    args.deepspeed_config = None
    return args


def translate(ds_config: dict[str, Any], config: SeqParConfig, trains: bool = True) -> dict[str, Any]:
    """What DeepSpeed is given in place of the user's JSON; see translation. Needs torch.distributed initialised."""
    return translated(ds_config, config, comm.get_world_size(), GRADIENT_CLIPPING_DEFAULT, trains=trains)
