"""An ordinary Hugging Face checkpoint, written as its tensors come: rank 0 holds a few tensors at a time, never the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import get_rank as rank_in_run

from ..hf import as_saved, names_in_file, split_into_files, write_config
from .files import PickledFile, SafetensorsFile, WeightFile
from .placing import Stale, replacing
from .rendezvous import agreed

__all__ = [
    "PICKLED_WEIGHTS",
    "SAFE_WEIGHTS",
    "PlannedTensors",
    "plan_tensors",
    "weights_of_a_model",
    "write_model",
    "write_together",
    "write_wrapper_together",
]

SAFE_WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "pytorch_model.bin"


Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class PlannedTensors:
    """Tensors of the model (`names`) that together become tensors of the file (`becomes`, on the meta device), by `convert`."""

    names: tuple[str, ...]
    becomes: Mapping[str, Tensor]
    convert: Convert


Fetch = Callable[[str], Tensor]


def plan_tensors(model: nn.Module, whole: Mapping[str, Tensor]) -> list[PlannedTensors]:
    """What goes to the files, in the order of the model, in the smallest groups that can be converted by themselves.

    `whole`: the model's state dict on the meta device, every tensor whole. Names that are tied to another, or that the model
    does not save, are left out; names and layouts are those of the original checkpoint.
    """
    kept = names_in_file(model, whole)
    convert = partial(as_saved, model, whole=whole)
    full = convert(kept)
    planned, left = [], []
    for name, tensor in kept.items():
        alone = _fitting(convert, {name: tensor}, full)
        if alone is None:
            left.append(name)
        else:
            planned.append(PlannedTensors((name,), alone, convert))
    for names in _by_layer(left):
        together = _fitting(convert, {name: kept[name] for name in names}, full)
        if together is None:
            return [PlannedTensors(tuple(kept), full, convert)]
        planned.append(PlannedTensors(tuple(names), together, convert))
    covered = [name for group in planned for name in group.becomes]
    return planned if sorted(covered) == sorted(full) else [PlannedTensors(tuple(kept), full, convert)]


def _fitting(convert: Convert, part: dict[str, Tensor], full: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What `part` becomes by itself, if that is what it becomes in the whole."""
    try:
        becomes = convert(part)
    except Exception:  # a conversion that needs more than this part may fail in any way
        return None
    right = all(
        name in full and full[name].shape == x.shape and full[name].dtype == x.dtype for name, x in becomes.items()
    )
    return becomes if becomes and right else None


def _by_layer(names: list[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        groups.setdefault(".".join(parts[: first + 1]), []).append(name)
    return list(groups.values())


def write_model(
    model: nn.Module, folder: Path, planned: list[PlannedTensors], fetch: Fetch, *, max_shard_size: int | str,
    weights_name: str = SAFE_WEIGHTS, writes: bool = True, progress: Callable[[int], object] | None = None,
) -> None:  # fmt: skip
    """Config and weights into an empty `folder`. Where `writes` is False the tensors are fetched, in the same order, and dropped.

    After a first error nothing more is written, but everything is fetched: other ranks take part in that. The error is raised
    at the end. `progress` is told the bytes of each tensor that was fetched.
    """
    writer: _Writer | None = None
    error: Exception | None = None
    if writes:
        try:
            writer = _Writer(model, folder, planned, max_shard_size, weights_name)
        except Exception as problem:
            error = problem
    for group in planned:
        tensors = {}
        for name in group.names:
            tensor = fetch(name)
            if progress is not None:
                progress(tensor.numel() * tensor.element_size())
            if writer is not None and error is None:
                tensors[name] = tensor.cpu()
            del tensor
        if writer is not None and error is None:
            try:
                writer.take(group.convert(tensors))
            except Exception as problem:
                error = problem
    if writer is not None and error is None:
        writer.close()
    if error is not None:
        raise error


class _Writer:
    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        planned: list[PlannedTensors],
        max_shard_size: int | str,
        weights_name: str,
    ) -> None:
        tensors = {name: tensor for group in planned for name, tensor in group.becomes.items()}
        files, total = split_into_files(tensors, max_shard_size, weights_name)
        self._folder, self._index = folder, None
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            metadata = {"total_size": total, "total_parameters": sum(x.numel() for x in tensors.values())}
            self._index = f"{weights_name}.index.json", {"metadata": metadata, "weight_map": weight_map}
        kind = PickledFile if weights_name.endswith(".bin") else SafetensorsFile
        self._file_of: dict[str, WeightFile] = {}
        self._files: list[WeightFile] = []
        for file, names in files.items():
            self._files.append(kind(folder / file, {name: tensors[name] for name in names}))
            self._file_of |= dict.fromkeys(names, self._files[-1])

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._file_of[name].write(name, tensor)

    def close(self) -> None:
        for file in self._files:
            file.close()
        if self._index is not None:
            name, content = self._index
            (self._folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_together(
    model: nn.Module, target: Path, whole: Mapping[str, Tensor], fetch: Fetch, group: ProcessGroup | None, *,
    max_shard_size: int | str, weights_name: str, tokenizer: Any = None,
) -> None:  # fmt: skip
    """`write_model` by all ranks, of which rank 0 writes: aside, and put in place when complete; other files in `target` stay.

    Raises CheckpointError on every rank.
    """
    what, writes = f"the checkpoint {target}", rank_in_run() == 0
    with replacing(target, weights_of_a_model(weights_name), group, what) as aside:
        planned: list[PlannedTensors] = []
        with agreed(f"{what} was not written", group):
            planned += plan_tensors(model, whole)
            if writes:
                write_config(model, aside, tokenizer)
        error: Exception | None = None
        try:
            write_model(
                model, aside, planned, fetch, max_shard_size=max_shard_size, weights_name=weights_name, writes=writes
            )
        except Exception as problem:
            error = problem
        with agreed(f"{what} was not written", group):
            if error is not None:
                raise error


def write_wrapper_together(
    wrapper: nn.Module, target: Path, whole: Mapping[str, Tensor], fetch: Fetch, group: ProcessGroup | None, *,
    weights_name: str, tokenizer: Any = None,
) -> None:  # fmt: skip
    """What the `save_pretrained` of a wrapper (of adapters) writes, from whole tensors that rank 0 holds at once.

    Raises CheckpointError on every rank.
    """
    what, writes = f"the checkpoint {target}", rank_in_run() == 0
    with replacing(target, _is_weights_of_adapters, group, what) as aside:
        tensors: dict[str, Tensor] = {}
        for name in whole:
            tensor = fetch(name)
            if writes:
                tensors[name] = tensor.detach().cpu()
        with agreed(f"{what} was not written", group):
            if writes:
                wrapper.save_pretrained(  # type: ignore[operator]
                    str(aside), state_dict=tensors, safe_serialization=not weights_name.endswith(".bin")
                )
                if tokenizer is not None:
                    tokenizer.save_pretrained(str(aside))


def weights_of_a_model(weights_name: str) -> Stale:
    """Whether a file would be loaded with, or in the place of, the weights that are written under a name: those that they replace."""
    own = re.escape(weights_name.rpartition(".")[0] or weights_name)
    files = re.compile(rf"(model|pytorch_model|{own})(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
    return lambda name: files.fullmatch(name) is not None


def _is_weights_of_adapters(name: str) -> bool:
    """A base model's weights beside them are not theirs to replace."""
    return name in ("adapter_model.safetensors", "adapter_model.bin")
