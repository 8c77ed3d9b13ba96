"""Neighbours in memory are found, and nothing else is."""

import torch

from ds_seqpar.kernels.adjacent import joined, parted


def test_rows_and_columns_that_follow_one_another_are_one():
    whole = torch.arange(40.0).view(8, 5)
    assert torch.equal(joined([whole[:3], whole[3:4], whole[4:]], 0), whole)
    assert torch.equal(joined([whole[:, :2], whole[:, 2:]], 1), whole)
    flat = torch.arange(100.0)
    weights = [flat[10:25].view(3, 5), flat[25:50].view(5, 5)]
    assert torch.equal(joined(weights, 0), flat[10:50].view(8, 5))


def test_anything_else_is_not():
    whole, other = torch.arange(40.0).view(8, 5), torch.arange(40.0).view(8, 5)
    assert joined([whole[:3]], 0) is None
    assert joined([whole[:3], whole[4:]], 0) is None  # a gap
    assert joined([whole[3:], whole[:3]], 0) is None  # the wrong order
    assert joined([whole[:3], other[3:]], 0) is None  # another storage
    assert joined([whole[:, :2], whole[:, 3:]], 1) is None
    assert joined([whole.t()[:2], whole.t()[2:]], 0) is None  # not row by row
    rows = torch.arange(20.0).view(4, 5)
    assert joined([rows[:2], rows[2:]], 1) is None  # follow one another, but not within a row


def test_parts_are_no_views_of_one_another():
    whole = torch.zeros(3, 5)
    left, right = parted(whole, [2, 3])
    before = right._version
    left += 1
    assert right._version == before
    right.mul_(2)
    assert whole[:, :2].eq(1).all() and whole[:, 2:].eq(0).all()
    assert not left._is_view() and not right._is_view()
