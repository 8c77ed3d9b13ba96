"""Every family, tp 2: loss, every parameter's gradient, five optimizer steps, against the unsharded model."""

from __future__ import annotations

import pytest
from exactness import compare_adamw, compare_sgd
from models import FAMILIES
from ranks import run_ranks


def _worst(results: list[dict[str, float]]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for result in results:
        for name, error in result.items():
            merged[name] = max(error, merged.get(name, 0.0))
    return merged


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_equals_the_unsharded_models(family: str) -> None:
    errors = _worst(run_ranks(2, compare_sgd, family, 2, 3))  # ZeRO-3's hooks see the most of a model's own code
    bad = {name: error for name, error in errors.items() if not error <= 1e-5}
    assert not bad, f"relative errors above 1e-5: {bad}"


@pytest.mark.parametrize("family", FAMILIES)
def test_five_clipped_adamw_steps_equal_the_unsharded_models(family: str) -> None:
    errors = _worst(run_ranks(2, compare_adamw, family, 2, 2))
    bad = {
        name: error
        for name, error in errors.items()
        if not error <= (1e-5 if name.startswith(("loss", "norm")) else 1e-4)
    }
    assert not bad, f"relative errors too large: {bad}"
    assert sum(name.startswith("norm") for name in errors) == 5
