"""The guard against different batches sees every tensor in a forward's arguments, and a container's plain values; it names the path."""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import batches, device
from ranks import ON_GPU, run_ranks
from sharding import twins
from transformers import BatchEncoding, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from ds_seqpar import DataMismatchError


@dataclasses.dataclass
class Extra:
    mask: Any
    scale: float = 1.0


Pair = namedtuple("Pair", "first second")
HOLDERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "itself": (lambda x: x, "given"),
    "a parameter": (lambda x: torch.nn.Parameter(x) if isinstance(x, torch.Tensor) else x, "given"),
    "dict": (lambda x: {"a": None, "full_attention": x}, "given['full_attention']"),
    "OrderedDict": (lambda x: OrderedDict(full=x), "given['full']"),
    "UserDict": (lambda x: UserDict(full=x), "given['full']"),
    "BatchEncoding": (lambda x: BatchEncoding({"ids": x}), "given['ids']"),
    "list": (lambda x: [None, x], "given[1]"),
    "tuple": (lambda x: ((x,), 3), "given[0][0]"),
    "namedtuple": (lambda x: Pair(0, x), "given[1]"),
    "ModelOutput": (lambda x: BaseModelOutput(last_hidden_state=x), "given['last_hidden_state']"),
    "dataclass": (lambda x: Extra(x), "given.mask"),
    "deep": (lambda x: {"layers": [{"masks": (None, Extra({"inner": [x]}))}]}, "given['layers'][0]['masks'][1].mask['inner'][0]"),
    "an object": (lambda x: types.SimpleNamespace(rows=[x]), "given.rows[0]"),
}  # fmt: skip
PLAIN = {"number": (1, 2), "text": ("a", "b"), "flag": (True, False), "nothing": (None, 0.5), "array": (np.ones(2), np.zeros(2))}


def _refused(model: Any, given: Any) -> str:
    try:
        model.seqpar.guard.check((), {"given": given}, seeds=False)
        model.seqpar.guard.check((), {}, seeds=False)  # contents on a GPU are compared one forward later
    except DataMismatchError as problem:
        return str(problem)
    return ""


def _what_is_seen() -> dict[str, str]:
    model, _ = twins()
    rank, seen = dist.get_rank(), {}
    same = torch.arange(6.0, device=device()).view(2, 3)
    tensors = {"content": same + rank, "shape": same[:, : 3 - rank], "dtype": same.to((torch.float32, torch.float64)[rank])}
    for holder, (hold, _) in HOLDERS.items():
        assert _refused(model, hold(same)) == "", holder
        for what, x in tensors.items():
            seen[f"{holder}: {what}"] = _refused(model, hold(x))
        if holder != "an object":  # whose plain attributes may be a rank's own
            for what, values in PLAIN.items():
                seen[f"{holder}: {what}"] = _refused(model, hold(values[rank]))
    return seen


def test_whatever_differs_in_whatever_holds_it_is_named_by_its_path_on_every_rank() -> None:
    for seen in run_ranks(2, _what_is_seen, timeout=120):
        for case, said in seen.items():
            holder, _, what = case.partition(": ")
            in_a_list = what in PLAIN and holder in ("list", "tuple", "namedtuple", "deep")  # plain values are shown together
            path = HOLDERS[holder][1].rpartition("[")[0] if in_a_list else HOLDERS[holder][1]
            late = f"{path} of the previous forward differed"
            assert said.startswith((f"{path} differs between the ranks", *([late] if ON_GPU else []))), (case, said)


def _what_may_differ() -> None:
    model, _ = twins()
    rank, guard = dist.get_rank(), model.seqpar.guard
    cache = DynamicCache()
    cache.update(torch.full((1, 1 + rank, 4, 8), float(rank)), torch.full((1, 1 + rank, 4, 8), float(rank)), 0)
    held = types.SimpleNamespace(rank=rank, device=f"cuda:{rank}")
    held.itself = held
    legacy = ((torch.full((1, 1 + rank, 4, 8), float(rank)),) * 2,)
    for given in ({"past_key_values": cache}, {"past_key_values": legacy}, {"extra": held}, {"hook": lambda: rank}):
        guard.check((), given, seeds=False)
    cache.update(torch.zeros(1, 1 + rank, 1 + rank, 8), torch.zeros(1, 1 + rank, 1 + rank, 8), 0)
    with pytest.raises(DataMismatchError, match=r"past_key_values\.layers\[0\]\.keys differs"):
        guard.check((), {"past_key_values": cache}, seeds=False)


def test_a_cache_holds_a_ranks_own_heads_and_an_object_its_own_attributes() -> None:
    run_ranks(2, _what_may_differ, timeout=120)


def _a_mask_in_a_dict() -> str:
    model, _ = twins("gemma3_text")
    batch = batches(1, 2)[0]
    mask = torch.tril(torch.ones(7, 7, dtype=torch.bool, device=device())).view(1, 1, 7, 7).repeat(2, 1, 1, 1)
    masks = {"full_attention": mask.clone(), "sliding_attention": mask}
    float(model(batch["input_ids"], attention_mask=masks).logits.sum())
    masks["full_attention"][1, 0, 5, 2] = bool(dist.get_rank())
    try:
        model(batch["input_ids"], attention_mask=masks)
        model(batch["input_ids"])
    except DataMismatchError as problem:
        return str(problem)
    return ""


def test_a_mask_by_kind_of_attention_that_differs_on_one_rank_is_refused() -> None:
    for said in run_ranks(2, _a_mask_in_a_dict, timeout=120):
        assert said.startswith("attention_mask['full_attention'] "), said
