"""Resuming at another size: what DeepSpeed's ds_to_universal must know of a cut, and what a load needs that it leaves out.

DeepSpeed describes a cut parameter by an affine map: views of the whole tensor and of each rank's part. The converter writes
whole tensors; a load takes a rank's part out of them again by the map of the run that loads.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..plan.cuts import Cut
from . import manifest as manifests
from .manifest import IDENTITY_KEY
from .saved import SavedModules, SavedPartitions

__all__ = ["affine_map", "affine_maps", "complete", "repair_optimizer", "require_groups", "require_universal"]

OPTIMIZER, COMPLETE = "optimizer_state.pt", "ds_seqpar_complete"
MOMENTS = ("exp_avg", "exp_avg_sq")


def affine_map(shape: tuple[int, ...], cut: Cut | None, tp_size: int) -> dict[str, Any]:
    """One parameter in DeepSpeed's affine format (checkpoint/affine.py), as plain values. Without a cut every rank has it whole."""
    dim = 0 if cut is None else cut.dim
    whole = ((0, shape[dim]),) if shape else ((0, 1),)
    ranges = tuple(whole for _ in range(tp_size)) if cut is None else cut.ranges
    ranks = {}
    for rank, parts in enumerate(ranges):
        local = shape if cut is None else (*shape[:dim], cut.local_size(rank), *shape[dim + 1 :])
        source, dest = _strides(shape), _strides(local)
        holders = [other for other, theirs in enumerate(ranges) if theirs == parts]
        pieces, offset = [], 0
        for start, stop in parts:
            pieces.append(
                {
                    "shape": [*shape[:dim], stop - start, *shape[dim + 1 :]] if shape else [],
                    "source": [start * source[dim] if shape else 0, list(source)],
                    "dest": [offset * dest[dim] if shape else 0, list(dest)],
                    "locations": holders,
                }
            )
            offset += stop - start
        ranks[rank] = {"shard_shape": list(local), "pieces": pieces}
    return {"logical_shape": list(shape), "ranks": ranks}


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def affine_maps(maps: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pattern -> map, one pattern for all layers whose maps agree: the converter tries every pattern on every name."""
    alike: dict[str, list[str]] = {}
    for name in maps:
        alike.setdefault(r"\.".join(r"\d+" if p.isdigit() else re.escape(p) for p in name.split(".")), []).append(name)
    patterns = {}
    for pattern, names in alike.items():
        if all(maps[name] == maps[names[0]] for name in names):
            patterns[f"^{pattern}$"] = maps[names[0]]
        else:
            patterns |= {f"^{re.escape(name)}$": maps[name] for name in names}
    return patterns


def require_universal(folder: Path, here: Mapping[str, Any], trained: Iterable[str]) -> dict[str, Any]:
    """Checks a folder that ds_to_universal wrote against the running model, of which `trained` has an optimizer's state.

    Returns what the folder says of itself.

    Raises CheckpointError naming what is missing or differs.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no universal checkpoint {folder}")
    if here["zero_stage"] == 0 and here["dtype"] == "float16":
        raise CheckpointError(
            f"{folder} is a universal checkpoint, which holds no loss scale for fp16 at ZeRO stage 0; use stage 1, 2 or 3, or bf16"
        )
    sources = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    if not sources:
        raise CheckpointError(f"{folder}/mp_rank_00_model_states.pt is missing: the conversion was not finished")
    saved = torch.load(sources[0], map_location="cpu", mmap=True).get(IDENTITY_KEY)
    if not isinstance(saved, dict):
        raise CheckpointError(f"{folder} was converted from a checkpoint that ds_seqpar did not save")
    manifests.require_same_model(folder, saved, here)
    for name in trained:
        for state in ("fp32", *MOMENTS):
            path = folder / "zero" / name / f"{state}.pt"
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing: the conversion was not finished, or {name} was frozen in the run that saved"
                )
    if not (folder / "zero" / OPTIMIZER).is_file():
        raise CheckpointError(f"{folder / 'zero' / OPTIMIZER} is missing: the conversion was not finished")
    return saved


def complete(folder: Path, saved: Mapping[str, Any]) -> None:
    """Adds to a universal checkpoint what other ZeRO stages read from it; once, and safe to be cut off.

    The converter leaves a checkpoint that only the stages it was saved by can load: it names the model files, keeps the step
    and nests the optimizer's groups as they do, and from ZeRO-3 at tp_size 1 it writes flat tensors.
    """
    zero = folder / "zero"
    if (zero / COMPLETE).is_file():
        return
    optimizer = torch.load(zero / OPTIMIZER, map_location="cpu")
    nested = optimizer.get("optimizer_state_dict") or {}
    steps = [s["step"] for s in nested.get("state", {}).values() if "step" in s]
    _write_frozen(folder, saved)
    for name, described in saved["parameters"].items():
        shape = described["shape"]
        for state in ("fp32", *MOMENTS):
            path = zero / name / f"{state}.pt"
            held = torch.load(path, map_location="cpu", mmap=True) if path.is_file() else {}
            if isinstance(held, Tensor):
                _replace(path, {"param": held.view(shape)})
        path = zero / name / "step.pt"
        if path.is_file():
            steps.append(torch.load(path))
        elif steps and (zero / name / "exp_avg.pt").is_file():
            _replace(path, steps[0])
    if not steps:
        raise CheckpointError(f"{folder} says nowhere how many steps its optimizer made")
    heavy = ("fp32_flat_groups", "optimizer_state_dict", "fp32_groups")
    groups = [dict(group) for group in optimizer["param_groups"]]
    light = {key: value for key, value in optimizer.items() if key not in heavy} | {
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": steps[0]}}, "param_groups": groups},
    }
    light.setdefault("ds_version", "0.19.8")
    _replace(zero / OPTIMIZER, light)
    for path in folder.glob("*mp_rank_*_model_states.pt"):
        found = re.fullmatch(r"(?:zero_pp_rank_0_)?(mp_rank_\d+_model_states\.pt)", path.name)
        if found:
            for other in (folder / found[1], folder / f"zero_pp_rank_0_{found[1]}"):
                _link(path, other)
    (zero / COMPLETE).touch()


def _write_frozen(folder: Path, saved: Mapping[str, Any]) -> None:
    """What was frozen, whole: the converter leaves it out, or (up to stage 2) writes the part of one rank."""
    if not saved["frozen"]:
        return
    stage_3 = saved["zero_stage"] == 3
    source = SavedPartitions(folder, saved, frozen_only=True) if stage_3 else SavedModules(folder, saved)
    for name in saved["frozen"]:
        if source.has(name):
            (folder / "zero" / name).mkdir(exist_ok=True)
            _replace(folder / "zero" / name / "fp32.pt", {"param": source.tensor(name).clone()})


def require_groups(folder: Path, count: int) -> None:
    """Raises CheckpointError if the optimizer had another number of parameter groups; DeepSpeed would load as many as fit."""
    saved = len(torch.load(folder / "zero" / OPTIMIZER, map_location="cpu")["param_groups"])
    if saved != count:
        raise CheckpointError(
            f"{folder} holds {saved} parameter groups of the optimizer, this run has {count}; make the same groups"
        )


def _replace(path: Path, value: object) -> None:
    aside = path.with_name(f".{path.name}.partial")
    torch.save(value, aside)
    aside.replace(path)


def _link(path: Path, other: Path) -> None:
    if other.exists():
        return
    aside = other.with_name(f".{other.name}.partial")
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
    except OSError:  # a file system without hard links
        shutil.copy2(path, aside)
    aside.replace(other)


def repair_optimizer(optimizer: Any, folder: Path) -> None:
    """After DeepSpeed's ZeRO-3 load: every group its own hyperparameters, every part its own step.

    DeepSpeed gives all groups those of the first (weight decay!), and all parts one step tensor, which each of them then
    increments.
    """
    saved = torch.load(folder / "zero" / OPTIMIZER, map_location="cpu")["param_groups"]
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
