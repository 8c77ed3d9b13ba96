"""What a run says of itself, to be compared with what a checkpoint says of the run that saved it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ..hf import require_model
from ..plan.report import Report
from . import manifest as manifests
from .saved import read
from .trained import describe_optimizer, describe_tying

__all__ = ["identity_of", "saved_optimizer"]


def identity_of(engine: Any) -> dict[str, Any]:
    """What the manifest says of the run, the same on every rank."""
    report: Report = engine.seqpar_report
    entries = require_model(engine.module).seqpar.entries
    named = dict(engine.module.named_parameters(remove_duplicate=False))
    dtypes = {name: str(p.dtype).removeprefix("torch.") for name, p in named.items()}
    return {
        "format": manifests.FORMAT,
        "model_type": report.model_type,
        "tp_size": report.tp_size,
        "dp_size": dist.get_world_size() // report.tp_size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "dtype": "bfloat16" if engine.bfloat16_enabled() else "float16" if engine.fp16_enabled() else "float32",
        "global_steps": engine.global_steps,
        "wrapper": None if engine.module is require_model(engine.module) else type(engine.module).__name__,
        "frozen": [name for name, p in engine.module.named_parameters() if not p.requires_grad],
        "tied": describe_tying(named.items()),
        "scaling": _scaling(engine.module),
        "scheduler": None if engine.lr_scheduler is None else type(engine.lr_scheduler).__name__,
        "parameters": manifests.describe_parameters({n: entries[id(p)] for n, p in named.items()}, dtypes),
    }


def _scaling(model: nn.Module) -> dict[str, dict[str, float]]:
    """What adapters multiply their products by: no parameter, and yet the model is another with another one."""
    found = {}
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and scaling:
            found[name] = {str(adapter): float(value) for adapter, value in scaling.items()}
    return found


def saved_optimizer(
    engine: Any, folder: Path, saved: Mapping[str, Any], tp_rank: int
) -> dict[str, Any] | None:
    """As `describe_optimizer` said it on this rank; of a checkpoint that an older version saved, as far as its files say it."""
    if "optimizers" in saved:
        return saved["optimizers"][tp_rank]  # type: ignore[no-any-return]
    if saved["zero_stage"] > 0:
        name = "mp_rank_{0:02d}_model_states.pt" if saved["zero_stage"] < 3 else "zero_pp_rank_0_mp_rank_{0:02d}_model_states.pt"
        shapes = read(folder / name.format(tp_rank)).get("param_shapes")
        return None if shapes is None else {"layout": [list(group) for group in shapes]}
    frozen = [name for name, p in engine.module.named_parameters() if not p.requires_grad]
    ours = describe_optimizer(engine)
    if ours is None or saved["frozen"] == frozen:
        return None
    trained = {name for group in ours["layout"] for name in group}
    if trained == {name for name, _ in engine.module.named_parameters()} - set(saved["frozen"]):
        return None
    names = [name for name, _ in engine.module.named_parameters() if name not in saved["frozen"]]
    return {"layout": [names]}
