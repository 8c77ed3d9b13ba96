"""Everything that is known of transformers, which nothing else in ds_seqpar imports."""

from .facts import describe
from .files import (
    PartialLoad,
    as_saved,
    auto_from_pretrained,
    empty_model,
    loading_parts,
    names_in_file,
    saved_class,
    split_into_files,
    write_config,
)
from .model import causal_lm_loss, enable_full_recompute, leave_hub_kernels, require_model, uses_sdpa
from .planned import is_encoder, masks_as_with_values, planned_config, planned_model, with_layers

__all__ = [
    "PartialLoad",
    "as_saved",
    "auto_from_pretrained",
    "causal_lm_loss",
    "describe",
    "empty_model",
    "enable_full_recompute",
    "is_encoder",
    "leave_hub_kernels",
    "loading_parts",
    "masks_as_with_values",
    "names_in_file",
    "planned_config",
    "planned_model",
    "require_model",
    "saved_class",
    "split_into_files",
    "uses_sdpa",
    "with_layers",
    "write_config",
]
