"""What is saved of a sharded model against what plain transformers writes of the unsharded one, and what both read again."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from exactness import fresh_groups
from model_types import batches_for, causal, tiny_of
from safetensors.torch import load_file
from sharding import relative_error
from torch import Tensor

import ds_seqpar

__all__ = ["saved"]

Loss = Callable[[Any, dict[str, Tensor], str], Tensor]


def saved(model_type: str, head: str, loss_of: Loss, tolerance: float) -> str:
    """"" if the files are transformers' own, plain transformers and a load in parts give the same loss, and all generate alike.

    Otherwise what is not so. Every weight has moved since the model was made. Run on all ranks.
    """
    fresh_groups()
    model, reference = tiny_of(model_type, head=head), tiny_of(model_type, head=head)
    reference.config.architectures = [type(reference).__name__]  # as a save would write it, on every rank
    key = {"tp_size": dist.get_world_size(), "loss_chunk_tokens": 4}
    ds_seqpar.shard(model, key)
    for parameter in (*model.parameters(), *reference.parameters()):
        parameter.data.mul_(1.25)  # rounds alike wherever it is made
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box)
    folder = Path(box[0])
    try:
        ds_seqpar.save_pretrained(model, folder / "ours")
        problem = _on_first_rank(lambda: _files(reference, folder))
        if not problem:
            problem = _read_again(model_type, head, reference, folder, key, loss_of, tolerance)
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    return problem


def _on_first_rank(check: Callable[[], str]) -> str:
    box = [""]
    if dist.get_rank() == 0:
        try:
            box[0] = check()
        except Exception as problem:
            box[0] = f"{type(problem).__name__}: {problem}"[:300]
    dist.broadcast_object_list(box)
    return box[0]


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def _files(reference: Any, folder: Path) -> str:
    reference.save_pretrained(folder / "theirs")
    ours, theirs = _tensors(folder / "ours"), _tensors(folder / "theirs")
    if ours.keys() != theirs.keys() or not theirs:
        return f"other names in the files: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    wrong = [name for name, x in theirs.items() if ours[name].dtype != x.dtype or not torch.equal(ours[name], x)]
    return f"other tensors in the files: {wrong[:3]}" if wrong else ""


def _read_again(
    model_type: str, head: str, reference: Any, folder: Path, key: dict[str, Any], loss_of: Loss, tolerance: float
) -> str:
    batch = batches_for(1, 3, 7, model_type=model_type, head=head)[0]
    dtype = next(reference.parameters()).dtype

    def read(whose: str) -> Any:
        return type(reference).from_pretrained(folder / whose, config=copy.deepcopy(reference.config), dtype=dtype)

    def loss(model: Any) -> Tensor:
        with torch.no_grad():
            return loss_of(model.eval(), {name: x.clone() if isinstance(x, Tensor) else x for name, x in batch.items()}, head)

    plain = read("ours")
    expected = loss(read("theirs"))  # not the model that was saved: some of it, such as tables of sines, is in no file
    if relative_error(loss(plain), expected) > tolerance:
        return "plain transformers reads another model"
    fresh_groups()
    with ds_seqpar.loading({"train_micro_batch_size_per_gpu": 1, "ds_seqpar": key}):
        parts = read("ours")
    ds_seqpar.shard(parts, key)
    if relative_error(loss(parts), expected) > tolerance:
        return "loaded in parts it is another model"
    if head or not causal(reference.config) or set(batch) - {"input_ids", "labels"}:
        return ""
    asked = dict(input_ids=batch["input_ids"][:, :4], max_new_tokens=3, do_sample=False)
    same = torch.equal(parts.generate(**asked), plain.generate(**asked))
    return "" if same else "it generates other tokens"
