"""No broken invariant goes unnoticed: by verify where it can see, and by a test."""

from __future__ import annotations

import re

import pytest
from mutants import MUTANTS
from mutations import TABLE, examine
from ranks import run_ranks

SAMPLE = [
    "norm gradients are not summed", "gradients are summed after accumulation", "a slice begins one row early",
    "a tied weight is two weights", "a row-parallel bias is added before the reduce-scatter", "the loss is divided by tp_size",
    "the optimizer decays on one rank only",
]  # fmt: skip
"""On every run; all of them with the slow tests."""


def _noticed(names: list[str], timeout: float) -> None:
    expected = {mutant.name: mutant for mutant in MUTANTS}
    everyone = run_ranks(2, examine, names, timeout=timeout)
    for rank, outcomes in enumerate(everyone):
        assert [outcome.name for outcome in outcomes] == [m.name for m in MUTANTS if m.name in names]
        for outcome in outcomes:
            by, seen = expected[outcome.name].by, expected[outcome.name].verify
            assert outcome.check or rank, (
                f"{outcome.name}: not noticed by {by}"
            )  # weights are compared on the first rank
            assert bool(outcome.verify) == seen, f"{outcome.name}: verify said {outcome.verify!r}"


def test_a_sample_of_broken_invariants_is_noticed() -> None:
    _noticed(SAMPLE, timeout=300)


@pytest.mark.slow
def test_every_broken_invariant_is_noticed() -> None:
    _noticed([mutant.name for mutant in MUTANTS], timeout=1800)


@pytest.mark.slow
def test_nothing_is_said_where_nothing_is_broken() -> None:
    for outcomes in run_ranks(2, examine, None, timeout=1800):
        assert [o for o in outcomes if o.verify or o.check] == []


def test_the_table_names_every_mutant() -> None:
    assert len(MUTANTS) >= 25 and len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    rows = re.findall(r"^\| (.+) \(\w+\) \|", TABLE.read_text(), re.MULTILINE)
    assert rows == [mutant.name for mutant in MUTANTS]
