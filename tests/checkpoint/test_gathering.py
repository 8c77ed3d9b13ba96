"""What every rank holds of a parameter, gathered, is the parameter: for cuts of every form, in every dimension."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ds_seqpar.checkpoint.gathering import gather_parameter, part_of
from ds_seqpar.plan.cuts import Cut

EVEN = (((0, 4),), ((4, 8),))
CUTS = {
    "even": EVEN,
    "even, in pieces": (((0, 1), (1, 4)), ((4, 8),)),
    "uneven": (((0, 5),), ((5, 8),)),
    "packed": (((0, 2), (4, 6)), ((2, 4), (6, 8))),
    "the last first": (((4, 8),), ((0, 4),)),
    "copied": (((0, 8),), ((0, 8),)),
}


def _gathered() -> list[str]:
    wrong = []
    for name, ranges in CUTS.items():
        for dim, shape in ((0, (8,)), (0, (8, 3)), (1, (3, 8)), (1, (2, 8, 3)), (2, (2, 3, 8)), (-1, (3, 8))):
            cut = Cut(dim, 8, ranges)
            whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
            local = part_of(whole, cut, dist.get_rank())
            back = gather_parameter(local, cut, dist.group.WORLD)
            if not (torch.equal(back, whole) and back.is_contiguous()):
                wrong.append(f"{name}, dimension {dim} of {shape}")
            if back.untyped_storage().data_ptr() == local.untyped_storage().data_ptr():
                wrong.append(f"{name}, dimension {dim} of {shape}: in the part's own memory")
    return wrong


def test_gathered_parts_are_the_whole() -> None:
    assert run_ranks(2, _gathered, deepspeed=False) == [[], []]


@pytest.mark.parametrize(("name", "in_order"), [(n, n.startswith("even")) for n in CUTS])
def test_only_even_parts_in_rank_order_need_no_copy(name: str, in_order: bool) -> None:
    assert Cut(0, 8, CUTS[name]).in_order == in_order
