"""The seam to DeepSpeed: reads the key, shards the model, hands over to DeepSpeed's own tensor-parallel switch.

The only package that uses deepspeed. Beside its documented names it takes load_ds_config and GRADIENT_CLIPPING_DEFAULT from
their modules, and counts on `initialize` building a DeepSpeedEngine with keyword arguments.

Saves and loads go through its checkpoint_engine.save, its recovery script, its affine maps, and what waits for other ranks in them:
tests/checkpoint/test_private_names.py.

Private names it relies on, each held by a contract test:
`groups._init_tp_mesh_device`, `groups._TENSOR_MODEL_PARALLEL_GROUP`, `model.ds_autotp_parsed`, `parameter.tensor_model_parallel`,
`parameter.ds_is_replaced_module` with `gather_params` and `_tp_partition`, `engine.first_dataloader_check`,
`engine._config.train_batch_size`, `engine.tput_timer.batch_size`, `parameter._hp_mapping`, `parameter.ds_tensor`.
"""

from .entry import SAFE_CLASSES, initialize, patch
from .process_groups import data_parallel_group, groups_of
from .sharding import ADOPTED_FORWARDS, shard, verified
from .weights import export, whole_parameter

__all__ = [
    "ADOPTED_FORWARDS", "SAFE_CLASSES", "data_parallel_group", "export", "groups_of", "initialize", "patch", "shard", "verified",
    "whole_parameter",
]  # fmt: skip
