"""An ordinary Hugging Face checkpoint from a checkpoint that engine.save_checkpoint wrote: in one process, without a GPU."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine import SAFE_CLASSES
from ..errors import CheckpointError
from ..hf import empty_model
from . import manifest as manifests
from .gathering import whole_of
from .resume import safe_reading
from .writing import SAFE_WEIGHTS, begin, finish, plan_tensors, write_model

__all__ = ["export_checkpoint"]


def export_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    tag: str | None = None,
    max_shard_size: int | str = "50GB",
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Writes `target`, an ordinary Hugging Face checkpoint, from `source`: a folder of checkpoints, or one of them.

    The files are mapped, so that memory holds a few tensors at a time; their dtype is the model's. Written aside and renamed
    when complete. `progress` is told (bytes so far, bytes in all).

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or mixed (naming the file), or the target cannot be written.
    """
    folder = _folder(Path(source).resolve(), tag)
    manifest = manifests.read_manifest(folder)
    manifests.require_files(folder, manifest)
    out = Path(target).resolve()
    with safe_reading(SAFE_CLASSES):
        read = _Partitions(folder, manifest) if manifest["zero_stage"] == 3 else _Modules(folder, manifest)
        model = empty_model(folder / manifests.CONFIG_FOLDER)
        whole = {
            name: torch.empty(about["shape"], dtype=getattr(torch, about["dtype"]), device="meta")
            for name, about in manifest["parameters"].items()
        }
        whole |= {name: buffer.to("meta") for name, buffer in read.buffers().items()}
        planned = plan_tensors(model, whole)
        total = sum(math.prod(whole[n].shape) * whole[n].element_size() for group in planned for n in group.names)
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total)

        try:
            aside = begin(out)
            for file in (folder / manifests.CONFIG_FOLDER).iterdir():
                shutil.copy2(file, aside)
            write_model(
                model,
                aside,
                planned,
                read.tensor,
                max_shard_size=max_shard_size,
                weights_name=SAFE_WEIGHTS,
                progress=count,
            )
            finish(out)
        except OSError as problem:
            raise CheckpointError(f"{out} was not written: {problem}") from problem


def _folder(source: Path, tag: str | None) -> Path:
    if tag is not None:
        return source / tag
    if (source / manifests.MANIFEST).is_file():
        return source
    latest = source / "latest"
    if not latest.is_file():
        raise CheckpointError(
            f"{source} holds no checkpoint: neither {manifests.MANIFEST} nor the file latest is there"
        )
    return source / latest.read_text().strip()


class _Modules:
    """ZeRO stages 0 to 2: every tensor-parallel rank's file holds its parts by name."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._parameters = manifest["parameters"]
        self._files = [folder / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(manifest["tp_size"])]
        self._modules = [_load(path)["module"] for path in self._files]

    def buffers(self) -> dict[str, Tensor]:
        return {name: x for name, x in self._modules[0].items() if name not in self._parameters}

    def tensor(self, name: str) -> Tensor:
        for path, module in zip(self._files, self._modules, strict=True):
            if name not in module:
                raise CheckpointError(f"{path} lacks {name}: it was saved with exclude_frozen_parameters")
        cut = manifests.cut_of(self._parameters[name]) if name in self._parameters else None
        if cut is None:
            return self._modules[0][name]  # type: ignore[no-any-return]
        return whole_of([module[name] for module in self._modules], cut)


class _Partitions:
    """ZeRO stage 3: every rank's file holds a slice of each tensor, in flat groups, in fp32."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._parameters, self._folder = manifest["parameters"], folder
        t, self._dp = manifest["tp_size"], manifest["dp_size"]
        half = "bf16_" if manifest["dtype"] == "bfloat16" else ""
        self._states, self._flat = [], []
        for tp in range(t):
            names = [f"zero_pp_rank_{dp}_mp_rank_{tp:02d}" for dp in range(self._dp)]
            self._states.append([_load(folder / f"{name}_model_states.pt") for name in names])
            optimizers = [_load(folder / f"{half}{name}_optim_states.pt") for name in names]
            self._flat.append([o["optimizer_state_dict"]["fp32_flat_groups"] for o in optimizers])
        self._places = [self._index(states[0]["param_shapes"]) for states in self._states]
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

    def tensor(self, name: str) -> Tensor:
        buffers = self.buffers()
        if name in buffers:
            return buffers[name]
        described = self._parameters[name]
        parts = [self._part(tp, name).to(getattr(torch, described["dtype"])) for tp in range(len(self._states))]
        cut = manifests.cut_of(described)
        return parts[0] if cut is None else whole_of(parts, cut)

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


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
