"""An ordinary Hugging Face checkpoint from a checkpoint that engine.save_checkpoint wrote: in one process, without a GPU."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..engine import SAFE_CLASSES
from ..errors import CheckpointError
from ..hf import empty_model
from . import manifest as manifests
from .placing import begin, finish, surviving
from .resume import safe_reading
from .saved import SavedModules, SavedPartitions
from .writing import SAFE_WEIGHTS, plan_tensors, weights_of_a_model, write_model

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

    The files are mapped, so that memory holds a few tensors at a time; their dtype is the model's. Written aside and put in place
    when complete. `progress` is told (bytes so far, bytes in all).

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or mixed (naming the file), or the target is a file or cannot be written.
    """
    folder = _folder(Path(source).resolve(), tag)
    manifest = manifests.read_manifest(folder)
    manifests.require_files(folder, manifest)
    if manifest["wrapper"] is not None:
        raise CheckpointError(
            f"{folder} holds a {manifest['wrapper']}, whose adapters this tool cannot write; load it with engine.load_checkpoint and "
            "call ds_seqpar.save_pretrained"
        )
    out, stale = Path(target).resolve(), weights_of_a_model(SAFE_WEIGHTS)
    try:
        aside = begin(out, stale)
    except (OSError, CheckpointError) as problem:
        raise CheckpointError(f"{out} was not written: {problem}") from problem
    try:
        with safe_reading(SAFE_CLASSES):
            _write(folder, manifest, aside, max_shard_size, progress)
    except BaseException as problem:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(problem, OSError):
            raise CheckpointError(f"{out} was not written: {problem}") from problem
        raise
    finish(aside, out, stale)


def _write(
    folder: Path, manifest: Mapping[str, Any], aside: Path, max_shard_size: int | str,
    progress: Callable[[int, int], object] | None,
) -> None:  # fmt: skip
    read = SavedPartitions(folder, manifest) if manifest["zero_stage"] == 3 else SavedModules(folder, manifest)
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

    for file in (folder / manifests.CONFIG_FOLDER).iterdir():
        shutil.copy2(file, aside)
    write_model(
        model, aside, planned, read.tensor, max_shard_size=max_shard_size, weights_name=SAFE_WEIGHTS, progress=count
    )  # fmt: skip


def _folder(source: Path, tag: str | None) -> Path:
    if tag is not None:
        return surviving(source / tag)
    if (source / manifests.MANIFEST).is_file():
        return source
    latest = source / "latest"
    if not latest.is_file():
        raise CheckpointError(
            f"{source} holds no checkpoint: neither {manifests.MANIFEST} nor the file latest is there"
        )
    return surviving(source / latest.read_text().strip())
