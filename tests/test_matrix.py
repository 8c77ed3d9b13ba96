"""llama and qwen3 over tp x dp x ZeRO stage x micro batch x recompute, accumulation 3, against the unsharded model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from exactness import compare_adamw, compare_sgd
from ranks import run_ranks

FAMILIES = ("llama", "qwen3")
GRID = [(tp, dp) for tp in (1, 2, 3, 4) for dp in (1, 2)]
EVERYTHING = list(itertools.product((0, 1, 2, 3), (1, 2), ("none", "full")))

MANY = 4
"""From so many ranks on, which are several for each of CI's two cores, the sample's families take turns."""


def _sample(tp: int, dp: int) -> list[tuple[int, int, str]]:
    """Every stage; micro batch and recompute alternate, the other way round for the next tp or dp."""
    return [(stage, 1 + (stage + tp + dp) % 2, ("none", "full")[(stage // 2 + tp) % 2]) for stage in (0, 1, 2, 3)]


def _cases(compare: str, tp: int, cases: Iterable[tuple[str, int, int, str]]) -> dict[str, dict[str, float]]:
    run = {"sgd": compare_sgd, "adamw": compare_adamw}[compare]
    return {
        f"{family} zero{stage} micro{micro} {recompute}": run(
            family, tp, stage, micro=micro, key={"recompute": recompute}
        )
        for family, stage, micro, recompute in cases
    }


def _check(compare: str, tp: int, dp: int, settings: Iterable[tuple[int, int, str]], *, each: bool = True) -> None:
    """`each`: every family with every setting; if not, one with each, so that over (2, 2) and (4, 2) every stage has both."""
    cases = [
        (family, stage, *setting)
        for stage, *setting in settings
        for family in (FAMILIES if each else [FAMILIES[(stage // 2 + tp // 2) % 2]])
    ]
    bad = {}
    for rank, results in enumerate(run_ranks(tp * dp, _cases, compare, tp, cases, timeout=1800)):
        assert len(results) == len(cases)
        for case, errors in results.items():
            for name, error in errors.items():
                exact = compare == "sgd" or name.startswith(("loss", "norm"))
                if not error <= (1e-5 if exact else 1e-4):
                    bad[f"{case}, rank {rank}, {name}"] = error
    assert not bad, f"relative errors too large: {bad}"


@pytest.mark.parametrize(("tp", "dp"), GRID)
def test_sgd_step_sample(tp: int, dp: int) -> None:
    _check("sgd", tp, dp, _sample(tp, dp), each=tp * dp < MANY)


@pytest.mark.parametrize(("tp", "dp"), [(1, 2), (2, 1), (2, 2), (3, 1)])
def test_adamw_steps_sample(tp: int, dp: int) -> None:
    """Every second stage; every stage where ranks share tokens and weights."""
    settings = _sample(tp, dp)
    _check("adamw", tp, dp, settings if tp * dp >= MANY else settings[(tp + dp) % 2 :: 2], each=tp * dp < MANY)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "dp"), GRID)
@pytest.mark.parametrize("compare", ["sgd", "adamw"])
def test_everything(compare: str, tp: int, dp: int) -> None:
    _check(compare, tp, dp, EVERYTHING)
