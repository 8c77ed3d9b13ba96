"""Neighbours in memory are found, and nothing else is."""

import torch

from ds_seqpar.kernels.adjacent import Room, joined, parted


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


def _three(width: int = 9) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A memory [4, width] whose first 6 columns are in use, and [4, 4], [4, 2] of it with [4, 3] from elsewhere."""
    whole = torch.arange(4.0 * width).view(4, width)
    return whole, [*whole[:, :6].split([4, 2], dim=1), torch.full((4, 3), -1.0)]


def test_room_beside_is_filled_where_it_was_offered_and_once() -> None:
    whole, parts = _three()
    before = whole.clone()
    assert Room.filled(parts) is None and torch.equal(whole, before)
    Room.offer(whole)
    joint = Room.filled(parts)
    assert joint is not None and joint.data_ptr() == whole.data_ptr()
    assert torch.equal(joint, torch.cat([before[:, :6], parts[2]], dim=1))
    assert Room.filled(parts) is None


def test_what_does_not_fit_the_room_is_left_alone() -> None:
    for change in (
        lambda whole, parts: parts[:2] + [parts[2][:, :2]],  # narrower than the room
        lambda whole, parts: [parts[0], parts[1].clone(), parts[2]],
        lambda whole, parts: [parts[1], parts[0], parts[2]],
        lambda whole, parts: parts[:2] + [parts[2].double()],
        lambda whole, parts: [*whole[:, 1:7].split([4, 2], dim=1), parts[2][:, :2]],
    ):
        whole, parts = _three()
        before = whole.clone()
        Room.offer(whole)
        assert Room.filled(change(whole, parts)) is None and torch.equal(whole, before)


def test_memory_that_took_the_place_of_other_memory_has_no_room() -> None:
    whole, parts = _three()
    Room.offer(whole)
    storage = whole.untyped_storage()
    Room._known[storage._cdata] = 9, storage.data_ptr() + 64, storage.nbytes()  # as what lay at this storage's place
    assert Room.filled(parts) is None
