"""Loads of a Hugging Face checkpoint what this rank needs: its part of every cut weight, straight from the safetensors files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import groups_of
from ..errors import CheckpointError, PlanError
from ..groups import ParallelGroups
from ..hf import auto_from_pretrained, describe, loading_parts
from ..plan.cuts import Cut
from ..planning import PartlyLoaded, cuts_of, mark_whole_shape, plan_of
from .files import LazyTensor, MergedTensor, lazy_tensors
from .gathering import part_of

__all__ = ["from_pretrained", "loading"]


def from_pretrained(
    path: str | os.PathLike[str],
    config: Mapping[str, Any] | str | os.PathLike[str],
    *,
    model_class: Any = None,
    **hf_kwargs: Any,
) -> Any:
    """A Hugging Face model of which this rank holds its own part, to be given to `deepspeed.initialize` with the same config.

    Call it on all ranks. Each reads its ranges of the safetensors files and nothing else of the cut weights; beside the parts a
    rank holds one tensor at a time. Until `initialize` the model can neither run nor be saved.

    Args:
        config: the DeepSpeed config with the key, a dict or a path. Without the key the model is loaded whole.
        model_class: a class with Hugging Face's `from_pretrained`; AutoModelForCausalLM if not given.
        hf_kwargs: passed on to it (dtype, device_map, attn_implementation, revision, ...).

    Raises:
        CheckpointError: the checkpoint is damaged, lacks a weight, or is not in safetensors files.
        PlanError: the model cannot be sharded.
    """
    with loading(config):
        return auto_from_pretrained(os.fspath(path), model_class, hf_kwargs)


@contextmanager
def loading(config: Mapping[str, Any] | str | os.PathLike[str]) -> Iterator[None]:
    """Inside it every `from_pretrained` of transformers loads as `ds_seqpar.from_pretrained` does. On all ranks."""
    found = groups_of(config)
    if found is None:
        yield
        return
    groups, users = found[0], found[1].plan

    def prepare(model: Any, files: list[str]) -> _Parts:
        return _Parts(model, files, groups, users)

    with loading_parts(prepare):
        yield


class _Parts:
    """What one rank reads of one checkpoint. Gives the model's parameters, on the meta device, their local shapes."""

    def __init__(self, model: Any, files: list[str], groups: ParallelGroups, users: Mapping[str, str]) -> None:
        facts = describe(model)
        self._cuts: dict[str, Cut] = cuts_of(plan_of(model, facts, groups.tp_size, users))
        self._rank = groups.tp_rank
        self._placed: set[str] = set()
        self.cut_names = set(self._cuts)
        self._tensors: dict[str, LazyTensor | MergedTensor] = {}
        for file in files:
            self._tensors |= lazy_tensors(Path(file))
        done: set[int] = set()
        for name, cut in self._cuts.items():
            parameter = model.get_parameter(name)
            if id(parameter) not in done:
                done.add(id(parameter))
                shape = list(parameter.shape)
                shape[cut.dim] = cut.local_size(self._rank)
                parameter.data = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        model.seqpar_loaded = PartlyLoaded(facts, groups.tp_size, self._cuts, users)
        for call, way_out in REFUSED.items():
            vars(model)[call] = _refusal(call, way_out)

    def loaded(self, model: Any) -> None:
        for name, cut in self._cuts.items():
            mark_whole_shape(model.get_parameter(name), cut)

    @property
    def tensors(self) -> dict[str, LazyTensor | MergedTensor]:
        return self._tensors

    def merge(self, name: str, keys: list[list[str]], dim: int) -> None:
        stacks = [[self._tensors[key] for key in stack] for stack in keys]
        merged = MergedTensor(stacks, dim, self._cuts.get(name), self._rank)  # type: ignore[arg-type]  # merged once
        if merged.fits:
            for stack in keys:
                for key in stack:
                    del self._tensors[key]
            self._tensors[name] = merged
            self._placed.add(name)

    def place(self, tensor: LazyTensor, name: str) -> None:
        cut = self._cuts.get(name)
        if cut is None:
            return
        if len(tensor.shape) <= cut.dim or tensor.shape[cut.dim] != cut.size:
            raise CheckpointError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}; the config asks for {cut.size} in dimension {cut.dim}"
            )
        tensor.cut, tensor.rank = cut, self._rank
        self._placed.add(name)

    def part(self, name: str, value: Tensor) -> Tensor:
        cut = self._cuts.get(name)
        if cut is None or name in self._placed:
            return value.data if isinstance(value, nn.Parameter) else value
        return part_of(value.detach(), cut, self._rank)  # what transformers converted arrives whole


REFUSED = {
    "save_pretrained": "call deepspeed.initialize first",
    "resize_token_embeddings": (
        "make a checkpoint of the new size first, with transformers alone in one process: from_pretrained, resize_token_embeddings, "
        "save_pretrained; then load that in parts"
    ),
}
"""Calls that would take this rank's part for the model -> what to do."""


def _refusal(call: str, way_out: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PlanError(f"{call}: this model holds one rank's part and is not sharded yet; {way_out}")

    return refuse
