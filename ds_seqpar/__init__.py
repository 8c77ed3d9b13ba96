"""Megatron tensor + sequence parallelism for Hugging Face models under DeepSpeed, from one key in the DeepSpeed JSON.

Importing this package makes `deepspeed.initialize` look for the key `ds_seqpar`; without the key nothing changes.
"""

from . import _deepspeed  # noqa: F401  the first that imports it

# isort: split
from ds_seqpar_integrations import install

from .checkpoint.export import full_state_dict, save_pretrained
from .checkpoint.loading import from_pretrained, loading
from .config import SeqParConfig
from .engine import initialize, patch, shard
from .errors import (
    CheckpointError,
    ConfigError,
    DataMismatchError,
    PlanError,
    RankLostError,
    ReplicaMismatchError,
    SeqParError,
    VerificationError,
)
from .layers.whole import parameter_sum
from .parameter_hooks import train_rows
from .plan.report import Report

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataMismatchError",
    "PlanError",
    "RankLostError",
    "ReplicaMismatchError",
    "Report",
    "SeqParConfig",
    "SeqParError",
    "VerificationError",
    "from_pretrained",
    "full_state_dict",
    "initialize",
    "loading",
    "parameter_sum",
    "save_pretrained",
    "shard",
    "train_rows",
]
__version__ = "0.1.0"

patch()
install()
