"""A sample of arbitrary keys, shapes and plans on every run; benchmarks/results holds the record of a long one."""

from __future__ import annotations

import datetime

import pytest
from fuzzing import cases, outcomes
from ranks import run_ranks

TODAY = datetime.date.today().toordinal()  # other cases every day, the same on every rank


@pytest.mark.parametrize(
    ("kind", "world", "count"), [("key", 4, 200), ("shape", 2, 16), ("shape", 3, 8), ("plan", 2, 16)]
)
def test_whatever_is_asked_is_exact_or_refused_in_words(kind: str, world: int, count: int) -> None:
    drawn = cases(kind, count, TODAY)
    everyone = run_ranks(world, outcomes, kind, drawn, timeout=200)
    for case, said in zip(drawn, zip(*everyone, strict=True), strict=True):
        assert len(set(said)) == 1, f"the ranks disagree on {case}: {said}"
        assert said[0].startswith(("exact", "accepted", "refused: ", "no model: ")), f"{case}: {said[0]}"


@pytest.mark.slow
def test_many_more() -> None:
    for kind, world, count in (
        ("key", 4, 1200),
        ("shape", 2, 250),
        ("shape", 3, 250),
        ("shape", 4, 250),
        ("plan", 2, 300),
    ):
        test_whatever_is_asked_is_exact_or_refused_in_words(kind, world, count)
