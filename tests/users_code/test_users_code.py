"""A user's own code around the model does what it does unsharded, or is refused with the way out: recipes x models x ranks x trainers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import users_recipes  # noqa: F401  # fills RECIPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from users_combined import FROZEN, HOOKS, TERMS, WRITES, Combination
from users_run import KINDS, RECIPES, WAYS, cell, outcome

Cell = tuple[str, str, str]


def _outcomes(cells: list[Cell]) -> list[str]:
    return [cell(*one) for one in cells]


def _cells(way: str, kinds: tuple[str, ...] = tuple(KINDS)) -> list[Cell]:
    return [(name, kind, way) for name, r in RECIPES.items() for kind in kinds if kind in r.kinds and way in r.ways]


def _all_as_promised(cells: list[Cell], world: int) -> None:
    ranks = run_ranks(world, _outcomes, cells, timeout=20.0 * len(cells))
    faults = []
    for one, *outcomes in zip(cells, *ranks, strict=True):
        name, kind, way = one
        expected = RECIPES[name].expected(kind, way)
        for rank, came in enumerate(outcomes):
            fits = re.match(f"refused: .*{expected}", came, re.DOTALL) if expected else not came
            if not fits:
                promise = f"refused with {expected!r}" if expected else "equal"
                faults.append(f"{name} of {kind} by {way}, rank {rank} of {world}: {promise}, but {came or 'equal'}")
    assert not faults, "\n".join(faults)


def test_there_are_as_many_cells_as_promised() -> None:
    assert sum(len(_cells(way)) for way in WAYS) * 2 >= 300


def test_a_sample() -> None:
    """Each recipe once, its model and trainer by turns."""
    turns = itertools.cycle(itertools.product(KINDS, WAYS))
    sample = []
    for name, one in RECIPES.items():
        kind, way = next(turn for turn in turns if turn[0] in one.kinds and turn[1] in one.ways)
        sample.append((name, kind, way))
    assert len(sample) >= 40
    _all_as_promised(sample, 2)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("world", [2, 3])
def test_every_cell(world: int, kind: str, way: str) -> None:
    _all_as_promised(_cells(way, (kind,)), world)


def _subsets(pieces: dict[str, object], least: int = 0) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(list(pieces)), unique=True, min_size=least, max_size=3).map(tuple)


COMBINATIONS = st.builds(
    Combination,
    kind=st.sampled_from(list(KINDS)),
    way=st.sampled_from(WAYS),
    world=st.sampled_from([2, 3]),
    key=st.sampled_from(
        [(), (("sequence_parallel", False),), (("recompute", "selective"),), (("recompute", "full"),), (("overlap", "off"),)]
    ),
    terms=_subsets(TERMS, 1),
    writes=_subsets(WRITES),
    hooks=_subsets(HOOKS),
    frozen=st.sampled_from(list(FROZEN)),
    batches=st.sampled_from([1, 2]),
)


def _combined(one: Combination) -> str:
    return outcome(one.recipe(), one.kind, one.way)


def _is_equal(one: Combination) -> None:
    for rank, came in enumerate(run_ranks(one.world, _combined, one, timeout=60)):
        assert not came, f"rank {rank}: {came}"


def _drawn(examples: int) -> Callable[[Callable[[Combination], None]], Callable[[], None]]:
    limits = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    return lambda check: limits(given(COMBINATIONS)(check))


@_drawn(4)
def test_a_few_combinations(one: Combination) -> None:
    _is_equal(one)


@pytest.mark.slow
@_drawn(120)
def test_combinations(one: Combination) -> None:
    _is_equal(one)
