"""Every family, tp 2: loss, every parameter's gradient, five optimizer steps, against the unsharded model; what data files can say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from exactness import compare_adamw, compare_sgd
from model_types import batches_for, tiny_of
from models import FAMILIES
from parity import parity
from ranks import run_ranks

from ds_seqpar import families
from ds_seqpar.families import MEASURED_WITH, family, has_data_file
from ds_seqpar.families.relatives import RELATIVES


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


SAYINGS = {
    "albert": "a block adds its input to its output",
    "bitnet": "what goes into a row-parallel linear is normed",
    "ctrl": "a block is given its input three times",
    "deberta": "a block's heads own biases, and are given a table whole",
    "gpt_bigcode": "multi-query attention is repeated whole",
    "gpt_neox_japanese": "a layer adds a bias that its block owns",
    "led": "a stack pads its tokens, and repeated blocks read another stack's output",
    "marian": "a third module holds the vocabulary's table",
    "mllama": "a layer is given a mask of its tokens, and its heads images",
    "mpnet": "heads are given biases that are trained",
    "vit": "tokens are counted where the first layer is given them",
    "xlm": "the layers are the blocks",
    "zamba2": "blocks have adapters, layers share blocks",
}


PLAIN: dict[str, Any] = {"sequence_parallel": False}
SAMPLE: list[tuple[str, dict[str, Any]]] = [("albert", {}), ("albert", PLAIN), ("deberta", {}), ("led", {}), ("mllama", {}), ("vit", {})]


def _errors(cases: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    return {f"{name} {key}": parity(name, key=key)["bad"] for name, key in cases}


def test_what_only_some_data_files_say_is_exact() -> None:
    for results in run_ranks(2, _errors, SAMPLE):
        assert len(results) == len(SAMPLE)
        assert not {name: bad for name, bad in results.items() if bad}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("model_type", SAYINGS)
def test_what_only_some_data_files_say_is_exact_with_and_without_sequence_parallelism(
    model_type: str, world: int
) -> None:
    for results in run_ranks(world, _errors, [(model_type, {}), (model_type, PLAIN)]):
        assert not {name: bad for name, bad in results.items() if bad}


def test_a_relative_shares_a_file_that_exists_and_has_none_of_its_own() -> None:
    folder = Path(families.__file__).parent
    for name, of in RELATIVES.items():
        assert family(name) == family(of) and has_data_file(of), f"{name} shares the file of {of}"
        assert not (folder / f"{name.replace('-', '_')}.py").exists(), f"{name} has a file of its own, which is never read"
    assert not has_data_file("relatives-of-none") and family("relatives-of-none") == families.Family()


@pytest.mark.skipif(transformers.__version__ < MEASURED_WITH, reason=f"measured with transformers {MEASURED_WITH}")
def test_llama_4_with_images_still_fails_in_transformers_itself() -> None:
    """When this fails, transformers' model runs: measure the type (`python tests/parity.py llama4`) and take this test away."""
    model, batch = tiny_of("llama4").train(), batches_for(1, 3, 7, model_type="llama4")[0]
    with pytest.raises(AttributeError, match="image_outputs"):
        model(**batch)
