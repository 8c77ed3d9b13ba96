"""A checkpoint whose optimizer does not fit this run's is refused by name before a weight moves; its weights alone can be taken."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training import engine_at, run, weights

import ds_seqpar
from ds_seqpar.checkpoint.trained import require_same_optimizer
from ds_seqpar.errors import CheckpointError

SLOW = pytest.mark.slow
FREEZE = {"freeze": ("embed", "q_proj", "layernorm")}


def _reversed(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """The same groups of the same sizes, each in the other order."""
    return torch.optim.AdamW([{**group, "params": group["params"][::-1]} for group in groups], **options)


def _sgd(groups: list[dict[str, Any]], **_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "thawed": (FREEZE, {}, r"\d+ parameters that were frozen when it was saved are trained here \(model.embed_tokens.weight, .*\.\.\.\)"),
    "frozen": ({}, FREEZE, r"\d+ parameters that were trained when it was saved are frozen here \(model.embed_tokens.weight"),
    "both": ({"freeze": ("norm.weight",)}, {"freeze": ("q_proj",)}, r"were frozen when .* and \d+ parameters that were trained when"),
    "groups": ({}, {"groups": 1}, "holds 2 parameter groups of the optimizer, this run has 1"),
    "order": ({}, {"optimizer_class": _reversed}, r"in another order: in group 0, \S+ then and \S+ here"),
    "optimizer": ({}, {"optimizer_class": _sgd}, "holds the states of AdamW, this run has SGD"),
    "schedule": ({"scheduler": None}, {}, "was saved without a schedule, this run has WarmupDecayLR; .*load_lr_scheduler_states=False"),
}  # fmt: skip


def _save(stage: int, saved: dict[str, dict[str, Any]], folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint for every case; the weights that each holds. `latest` names another, as it may."""
    held = {}
    for name, settings in saved.items():
        engine = engine_at("llama", 2, stage, **settings)
        run(engine, 0, 1)
        engine.save_checkpoint(folder, tag=name)
        held[name] = weights(engine)
        run(engine, 1, 2)
        engine.save_checkpoint(folder, tag="latest of all")
    return held


def _load(stage: int, here: dict[str, dict[str, Any]], folder: str, held: dict[str, Any]) -> dict[str, str]:
    """What each refusal said; that nothing moved; and that the way out leads to the weights that were saved."""
    messages = {}
    for name, settings in here.items():
        engine = engine_at("llama", 2, stage, seed=1, **settings)
        before = weights(engine)
        with pytest.raises(ds_seqpar.CheckpointError) as caught:
            engine.load_checkpoint(folder, tag=name)
        messages[name] = str(caught.value)
        assert all(torch.equal(x, before[n]) for n, x in weights(engine).items()), f"{name}: refused, but something was loaded"
        assert engine.global_steps == 0
        if name == "schedule":
            assert engine.load_checkpoint(folder, tag=name, load_lr_scheduler_states=False)[0]
            _are_the_saved(engine, held[name], name)
            continue
        for alone in ({"load_module_only": True}, {"load_optimizer_states": False}):
            assert engine.load_checkpoint(folder, tag=name, **alone)[0]
            _are_the_saved(engine, held[name], f"{name} {alone}")
        assert engine.global_steps == 1, "counters came with load_optimizer_states=False"
        run(engine, 1, 4)  # of the warm-up; a first step of its has a rate of zero
        moved = weights(engine)
        assert all(not torch.equal(held[name][n], x) for n, x in moved.items() if "gate_proj.weight" in n), "what was loaded does not train"
    return messages


def _are_the_saved(engine: Any, held: dict[str, torch.Tensor], what: str) -> None:
    found = weights(engine)
    if torch.distributed.get_rank() == 0:
        assert [n for n, x in found.items() if not torch.equal(x, held[n])] == [], what


def _check(tmp_path: Path, stage: int, names: list[str], own: dict[str, Any]) -> None:
    saved, here = ({n: {**own, **DIFFERENT[n][i]} for n in names} for i in (0, 1))
    world = 2 * own.pop("dp", 1) if "dp" in own else 2
    for settings in (*saved.values(), *here.values()):
        settings.pop("dp", None)
    held = run_ranks(world, _save, stage, saved, str(tmp_path))[0]
    found = run_ranks(world, _load, stage, here, str(tmp_path), held)
    assert all(each == found[0] for each in found), "the ranks disagree"
    for name in names:
        assert re.search(DIFFERENT[name][2], found[0][name]), f"{name}: {found[0][name]}"
        assert name == "schedule" or "load_optimizer_states=False" in found[0][name]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW), 2, 3])
def test_a_frozen_set_that_differs_is_refused_by_name_before_a_weight_moves(tmp_path: Path, stage: int) -> None:
    _check(tmp_path, stage, ["thawed" if stage in (0, 3) else "frozen"], {})


@pytest.mark.slow
@pytest.mark.parametrize("own", [{}, {"dp": 2}, {"dtype": torch.bfloat16}], ids=["fp32", "dp 2", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_optimizer_that_differs_is_refused_by_name_before_a_weight_moves(tmp_path: Path, stage: int, own: dict[str, Any]) -> None:
    _check(tmp_path, stage, list(DIFFERENT), dict(own))


def test_what_differs_is_named() -> None:
    about = {"class": "AdamW", "groups": 2, "layout": [["a", "b"], ["c"]]}
    require_same_optimizer("x", about, about)
    require_same_optimizer("x", {"layout": about["layout"]}, about)  # all that an older version's files say
    require_same_optimizer("x", {**about, "class": "FusedAdam"}, about)
    for other, message in (
        ({**about, "layout": [["a", "b"], []]}, "1 parameter that was frozen when it was saved is trained here (c)"),
        ({**about, "layout": [["a", "b"], ["c", "d"]]}, "1 parameter that was trained when it was saved is frozen here (d)"),
        ({**about, "layout": [["a", "b", "c"]]}, "in group 0, c then and nothing here"),
        ({**about, "layout": [["b", "a"], ["c"]]}, "in group 0, b then and a here"),
        ({**about, "groups": 3}, "holds 3 parameter groups"),
        ({**about, "class": "Lion"}, "holds the states of Lion, this run has AdamW"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            require_same_optimizer("x", other, about)


def _save_old(stage: int, folder: str, settings: dict[str, Any]) -> None:
    engine = engine_at("llama", 2, stage, **settings)
    run(engine, 0, 1)
    engine.save_checkpoint(folder, tag="old")


def _load_old(stage: int, folder: str, settings: dict[str, Any], fits: bool) -> None:
    engine = engine_at("llama", 2, stage, seed=1, **settings)
    if fits:
        assert engine.load_checkpoint(folder)[0]
        run(engine, 1, 2)
        return
    before = weights(engine)
    with pytest.raises(ds_seqpar.CheckpointError, match="frozen when it was saved are trained here"):
        engine.load_checkpoint(folder)
    assert all(torch.equal(x, before[n]) for n, x in weights(engine).items())


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=SLOW) for stage in (1, 2, 3))])
def test_a_manifest_of_an_older_version_loads_and_what_does_not_fit_is_still_refused(tmp_path: Path, stage: int) -> None:
    run_ranks(2, _save_old, stage, str(tmp_path), FREEZE)
    path = tmp_path / "old" / "ds_seqpar_manifest.json"
    manifest = json.loads(path.read_text())
    for field in ("optimizers", "tied", "scaling", "scheduler", "without_frozen"):
        del manifest[field]
    path.write_text(json.dumps(manifest))
    run_ranks(2, _load_old, stage, str(tmp_path), FREEZE, True)
    run_ranks(2, _load_old, stage, str(tmp_path), {}, False)


def _other_models(folder: str) -> dict[str, str]:
    """Models of the same names and shapes that are others all the same."""
    engine_at("llama", 2, 1, lora=True).save_checkpoint(folder, tag="scaling")
    engine_at("llama", 2, 1).save_checkpoint(folder, tag="tied")
    frozen = engine_at("llama", 2, 2, **FREEZE)
    frozen.save_checkpoint(folder, tag="without frozen", exclude_frozen_parameters=True)
    messages = {}

    def refused(what: str, engine: Any, **options: Any) -> None:
        before = weights(engine)
        with pytest.raises(ds_seqpar.CheckpointError) as caught:
            engine.load_checkpoint(folder, tag=what, **options)
        messages[what] = str(caught.value)
        assert all(torch.equal(x, before[n]) for n, x in weights(engine).items())

    other = engine_at("llama", 2, 1, lora=True, seed=1)
    for module in other.module.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 2 * value for name, value in module.scaling.items()}
    refused("scaling", other)
    tie = not json.loads(Path(folder, "tied", "huggingface", "config.json").read_text())["tie_word_embeddings"]
    refused("tied", engine_at("llama", 2, 1, seed=1, own={"tie_word_embeddings": tie}), load_module_only=True)
    refused("without frozen", engine_at("llama", 2, 2, seed=1, **FREEZE))
    loose = engine_at("llama", 2, 2, seed=1, **FREEZE)
    assert loose.load_checkpoint(folder, tag="without frozen", load_module_strict=False)[0]
    refused_at_3 = engine_at("llama", 2, 3, seed=1)
    with pytest.raises(ds_seqpar.CheckpointError, match=r"saved at ZeRO stage 1 .* this run has stage 3 .* read other files"):
        refused_at_3.load_checkpoint(folder, tag="tied", load_module_only=True)
    return messages


def test_what_is_another_model_without_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    first, second = run_ranks(2, _other_models, str(tmp_path))
    assert first == second
    assert re.search(r"other adapters: \S*q_proj is scaled by .*: 1.66\d*\} there and .*: 3.3\d*\} here", first["scaling"])
    assert "use the same tie_word_embeddings" in first["tied"] and "lm_head.weight" in first["tied"]
    assert re.search(r"lacks \d+ frozen parameters \(model.embed_tokens.weight, .*load_module_strict=False", first["without frozen"])


def _nested(folder: str) -> list[str]:
    """Nested tags, and tags that are none."""
    engine = engine_at("llama", 2, 1)
    run(engine, 0, 1)
    engine.save_checkpoint(folder, tag="run1/step1")
    run(engine, 1, 2)
    engine.save_checkpoint(folder, tag="run1/step2")
    engine.save_checkpoint(folder, tag="run1/step2")
    other = engine_at("llama", 2, 1, seed=1)
    path, _ = other.load_checkpoint(folder)
    assert path is not None and "run1/step2" in path and other.global_steps == 2
    other.load_checkpoint(folder, tag="run1/step1")
    assert other.global_steps == 1
    messages = []
    for tag in ("", ".", "..", "../beside", "/beside", "latest", "run1/.."):
        with pytest.raises(ds_seqpar.CheckpointError) as caught:
            engine.save_checkpoint(folder, tag=tag)
        messages.append(str(caught.value))
    return messages


def test_a_nested_tag_is_the_latest_where_a_load_looks(tmp_path: Path) -> None:
    first, second = run_ranks(2, _nested, str(tmp_path / "in"))
    assert first == second
    for message in first:
        assert "names no folder in" in message or "names the latest checkpoint" in message
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["latest", "run1"]
    assert sorted(p.name for p in (tmp_path / "in" / "run1").iterdir()) == ["step1", "step2"]
    assert (tmp_path / "in" / "latest").read_text() == "run1/step2", "DeepSpeed joins it to the folder"
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    (tmp_path / "in" / "latest").unlink()
    said = run_ranks(2, _unnamed, str(tmp_path / "in"))
    assert len(said[0]) == 1 and "['run1/step1', 'run1/step2']; give one of them as tag" in said[0][0] and not said[1]


def _unnamed(folder: str) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_seqpar").addHandler(handler)
    assert engine_at("llama", 2, 1).load_checkpoint(folder) == (None, None)
    return [line for line in lines if "no file latest" in line]
