"""Whole tensors of a checkpoint that DeepSpeed wrote: its files mapped, the parts of its ranks put together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import manifest as manifests
from .gathering import whole_of

__all__ = ["SavedModules", "SavedPartitions", "read"]


class SavedModules:
    """ZeRO stages 0 to 2: every tensor-parallel rank's file holds its parts by name."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._parameters = manifest["parameters"]
        self._files = [folder / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(manifest["tp_size"])]
        self._modules = [read(path)["module"] for path in self._files]

    def buffers(self) -> dict[str, Tensor]:
        return {name: x for name, x in self._modules[0].items() if name not in self._parameters}

    def has(self, name: str) -> bool:
        return all(name in module for module in self._modules)

    def tensor(self, name: str) -> Tensor:
        for path, module in zip(self._files, self._modules, strict=True):
            if name not in module:
                raise CheckpointError(f"{path} lacks {name}: it was saved with exclude_frozen_parameters")
        cut = manifests.cut_of(self._parameters[name]) if name in self._parameters else None
        if cut is None:
            return self._modules[0][name]  # type: ignore[no-any-return]
        return whole_of([module[name] for module in self._modules], cut)


class SavedPartitions:
    """ZeRO stage 3: every rank's file holds a slice of each tensor, in flat groups, in fp32; frozen ones by name."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], *, frozen_only: bool = False) -> None:
        """`frozen_only`: the files of the optimizer, which hold what is trained, need not be there."""
        self._parameters, self._folder = manifest["parameters"], folder
        t, self._dp = manifest["tp_size"], manifest["dp_size"]
        half = "bf16_" if manifest["dtype"] == "bfloat16" else ""
        self._states, self._flat = [], []
        for tp in range(t):
            names = [f"zero_pp_rank_{dp}_mp_rank_{tp:02d}" for dp in range(self._dp)]
            self._states.append([read(folder / f"{name}_model_states.pt") for name in names])
            if frozen_only:
                continue
            optimizers = [read(folder / f"{half}{name}_optim_states.pt") for name in names]
            self._flat.append([o["optimizer_state_dict"]["fp32_flat_groups"] for o in optimizers])
        self._places = [{} if frozen_only else self._index(states[0]["param_shapes"]) for states in self._states]
        self._aliases = dict(self._states[0][0].get("shared_params") or {})

    def _index(self, groups: list[Mapping[str, Any]]) -> dict[str, tuple[int, int, int, torch.Size]]:
        """Name -> (group, offset in it, elements of it on each rank, shape)."""
        places = {}
        for i, shapes in enumerate(groups):
            offset = 0
            for name, shape in shapes.items():
                each = -(-math.prod(shape) // self._dp)
                places[name] = (i, offset, each, torch.Size(shape))
                offset += each
        return places

    def buffers(self) -> dict[str, Tensor]:
        state = self._states[0][0]
        return {name: state["module"][name] for name in state["buffer_names"]}

    def has(self, name: str) -> bool:
        name = self._aliases.get(name, name)
        return name in self._places[0] or name in (self._states[0][0].get("frozen_param_shapes") or {})

    def tensor(self, name: str) -> Tensor:
        buffers = self.buffers()
        if name in buffers:
            return buffers[name]
        described = self._parameters[name]
        parts = [self.part(tp, name) for tp in range(len(self._states))]
        cut = manifests.cut_of(described)
        return parts[0] if cut is None else whole_of(parts, cut)

    def part(self, tp: int, name: str) -> Tensor:
        """What a tensor-parallel rank has of a parameter, in the model's dtype."""
        dtype: torch.dtype = getattr(torch, self._parameters[name]["dtype"])
        return self._part(tp, name).to(dtype)

    def _part(self, tp: int, name: str) -> Tensor:
        name = self._aliases.get(name, name)
        if name in self._places[tp]:
            group, offset, each, shape = self._places[tp][name]
            flat = [f[group].view(-1)[offset : offset + each] for f in self._flat[tp]]
        else:
            shapes = self._states[tp][0].get("frozen_param_shapes") or {}
            if name not in shapes:
                raise CheckpointError(f"{self._folder} lacks {name}: it was saved with exclude_frozen_parameters")
            shape = torch.Size(shapes[name])
            flat = [state["frozen_param_fragments"][name].view(-1) for state in self._states[tp]]
        return torch.cat(flat)[: shape.numel()].view(shape)


def read(path: Path) -> Any:
    """A file of torch.save, mapped, as data only."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
