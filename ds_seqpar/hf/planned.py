"""Models that are planned, not run: from a config alone, without memory."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, masking_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..errors import ConfigError, PlanError

__all__ = ["is_encoder", "masks_as_with_values", "planned_config", "planned_model", "with_layers"]


def planned_config(source: str, sizes: Mapping[str, Any] | None = None) -> Any:
    """The config of a folder, a config.json, a model type (with `sizes` over its defaults) or a name on the Hub.

    Raises ConfigError in one line: unknown, gated, not reachable, or not what the config class takes.
    """
    path = Path(source)
    try:
        if source and (path.is_dir() or path.is_file()):
            config = AutoConfig.from_pretrained(path)
        elif source in CONFIG_MAPPING:
            _require_sizes(CONFIG_MAPPING[source](), sizes or {})
            return CONFIG_MAPPING[source](**(sizes or {}))
        elif source.count("/") == 1 and path.suffix != ".json" and source[0] not in "./~":
            config = AutoConfig.from_pretrained(source)
        else:
            raise ConfigError(
                f"{source!r} is neither a folder with a config.json, nor such a file, nor a model type of transformers "
                f"{transformers.__version__}"
            )
        _require_sizes(config, sizes or {})
        for name, value in (sizes or {}).items():
            setattr(config, name, value)
        return config
    except ConfigError:
        raise
    except Exception as problem:  # whatever a config class or the Hub's client throws at what a user typed
        here = path.exists() or source in CONFIG_MAPPING
        why = "is not one that can be used" if here else "cannot be had (gated, unknown, or unreachable?)"
        raise ConfigError(f"the config of {source!r} {why}: {_one_line(problem)}") from problem


def _one_line(problem: Exception) -> str:
    """The first line of its message, and the next where that only announces it."""
    lines = [text.strip() for text in str(problem).splitlines() if text.strip()] or [type(problem).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _require_sizes(config: Any, sizes: Mapping[str, Any]) -> None:
    """Raises ConfigError for a field that the config has not, or a size that no model can have."""
    for name, value in sizes.items():
        if not hasattr(config, name) and name != "head_dim":  # which many models read, and few configs name
            near = difflib.get_close_matches(name, config.to_dict(), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"the config of {config.model_type!r} has no field {name!r}{hint}")
        if name.endswith(("_size", "_layers", "_heads", "_dim")) and isinstance(value, int) and value < 1:
            raise ConfigError(f"{name}={value}: a size must be at least 1")


def is_encoder(config: Any) -> bool:
    """Whether the model of a config predicts masked tokens (or has an encoder that does), and no next ones."""
    return getattr(config, "is_decoder", None) is False and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def planned_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a config, without memory for its weights. Raises PlanError if there is none."""
    config = copy.deepcopy(config)
    config.use_cache = False
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as problem:  # a class that is not there, or sizes that its code cannot work with
        raise PlanError(
            f"transformers makes no causal language model of type {config.model_type!r}: {_one_line(problem)[:200]}"
        ) from problem


@contextmanager
def masks_as_with_values() -> Iterator[None]:
    """Attention masks of fake tensors are left out where those of real, unpadded and unpacked tokens are."""
    plain = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.is_tracing = plain


def with_layers(model: PreTrainedModel, keep: Mapping[str, list[int]]) -> None:
    """Keeps of each list of layers (by its name) these, and of the config's lists that have an entry a layer the same."""
    config = model.config
    for name, indices in keep.items():
        owner, _, attribute = name.rpartition(".")
        layers = getattr(model.get_submodule(owner), attribute)
        for key, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == len(layers):
                setattr(config, key, [value[i] for i in indices])
        setattr(model.get_submodule(owner), attribute, nn.ModuleList([layers[i] for i in indices]))
        config.num_hidden_layers = len(indices)
