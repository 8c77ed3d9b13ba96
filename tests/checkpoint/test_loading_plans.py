"""A model that is loaded in parts with a plan of the user's in the key is the unsharded one, whatever the plan cuts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import fresh_groups
from models import batches, tiny
from ranks import RankError, run_ranks
from sharding import relative_error

import ds_seqpar
from ds_seqpar.checkpoint.gathering import gather_parameter
from ds_seqpar.errors import PlanError, SeqParError
from ds_seqpar.hf import describe, require_model
from ds_seqpar.plan.patterns import all_names, starred
from ds_seqpar.plan.styles import Style
from ds_seqpar.planning import cuts_of, plan_of

ROLES = ("", ":q", ":kv", ":even,even")
EAGER = {"experts_implementation": "eager"}


def _config(plan: Mapping[str, str]) -> dict[str, Any]:
    key = {"tp_size": 2, **({"plan": dict(plan)} if plan else {})}
    return {"train_micro_batch_size_per_gpu": 1, "ds_seqpar": key}


def _plans(family: str) -> list[dict[str, str]]:
    """Every one word of a user's that can be planned with: one for each different set of cuts that comes of it."""
    model = tiny(family)
    facts = describe(model)
    patterns = sorted({starred(name) for name in all_names(facts.modules)} - {""})
    found: dict[str, dict[str, str]] = {}
    for pattern in patterns:
        for word in [style.value + roles for style in Style for roles in ROLES]:
            try:
                plan = plan_of(model, facts, 2, {pattern: word})
            except PlanError:
                continue
            found.setdefault(repr(sorted(cuts_of(plan).items(), key=lambda item: item[0])), {pattern: word})
    return list(found.values())


def _gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model.train()(**batches(1, 2)[0]).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def _differ(folders: dict[str, tuple[str, list[dict[str, str]]]], may_refuse: bool) -> list[str]:
    """Plans with which a model that was loaded in parts computes another loss or gradient, or is refused where it may not."""
    wrong = []
    for family, (folder, plans) in folders.items():
        loss, gradients = _gradients(tiny(family, dtype=torch.float64))
        for plan in plans:
            fresh_groups()
            model = ds_seqpar.from_pretrained(folder, _config(plan), dtype=torch.float64, **EAGER)
            key = _config(plan)["ds_seqpar"] | ({} if may_refuse else {"verify": False})
            try:
                ds_seqpar.shard(model, key)
            except SeqParError as refusal:
                wrong += [] if may_refuse else [f"{family} {plan}: {refusal}"]
                continue
            mine, own = _gradients(model)
            state = require_model(model).seqpar
            errors = {"loss": relative_error(mine, loss)}
            for name, parameter in model.named_parameters():
                cut = state.entries[id(parameter)].cut
                whole = own[name] if cut is None else gather_parameter(own[name], cut, state.groups.tp_group)
                errors[name] = relative_error(whole, gradients[name])
            name, error = max(errors.items(), key=lambda item: item[1])
            wrong += [f"{family} {plan}: {name} {error:.1e}"] if not error <= 1e-6 else []
    return wrong


MLP, ATTENTION = "model.layers.*.mlp", "model.layers.*.self_attn"
PLANS: dict[str, list[dict[str, str]]] = {
    "llama": [
        {MLP: "whole"},
        {"model.layers.0.self_attn": "whole", "model.layers.1.mlp": "whole"},
        {f"{MLP}.gate_proj": "colwise_gather_output", f"{MLP}.up_proj": "colwise", f"{MLP}.down_proj": "rowwise_split_input"},
        {"model.embed_tokens": "replicate", "model.layers.*.input_layernorm": "tokenwise"},
    ],
    "glm4": [{MLP: "whole"}, {f"{MLP}.gate_up_proj": "packed_colwise:even,even", f"{MLP}.down_proj": "rowwise"}],
    "mixtral": [{MLP: "whole"}, {ATTENTION: "whole"}],
    "olmo2": [{ATTENTION: "whole"}],
}  # fmt: skip


def _saved(tmp_path: Path, plans: dict[str, list[dict[str, str]]]) -> dict[str, tuple[str, list[dict[str, str]]]]:
    for family in plans:
        tiny(family, dtype=torch.float64).save_pretrained(tmp_path / family)
    return {family: (str(tmp_path / family), found) for family, found in plans.items()}


def test_loaded_in_parts_with_a_users_plan_is_the_unsharded_model(tmp_path: Path) -> None:
    assert run_ranks(2, _differ, _saved(tmp_path, PLANS), False) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*PLANS, "phi3", "gpt_neox"])
def test_any_word_of_a_users_plan_is_refused_or_exact(tmp_path: Path, family: str) -> None:
    plans = _plans(family)
    assert any(word == "whole" for plan in plans for word in plan.values())
    assert run_ranks(2, _differ, _saved(tmp_path, {family: plans}), True, timeout=1200) == [[], []]


def _otherwise(folder: str, loaded: dict[str, str], now: dict[str, str]) -> None:
    fresh_groups()
    model = ds_seqpar.from_pretrained(folder, _config(loaded), **EAGER)
    before = {name: (id(p), p.shape, p.data_ptr()) for name, p in model.named_parameters()}
    try:
        ds_seqpar.shard(model, _config(now)["ds_seqpar"])
    finally:
        assert before == {name: (id(p), p.shape, p.data_ptr()) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("loaded", "now"), [({"model.layers.*.mlp": "whole"}, {}), ({}, {"model.layers.*.mlp": "whole"})])
def test_another_plan_than_at_loading_is_refused_by_name(
    tmp_path: Path, loaded: dict[str, str], now: dict[str, str]
) -> None:
    tiny("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(RankError) as caught:
        run_ranks(2, _otherwise, str(tmp_path / "llama"), loaded, now)
    for error in caught.value.errors:
        last = (error or "").strip().splitlines()[-1]
        assert "PlanError: model.layers.0.mlp." in last and "whole" in last, error
        assert 'no "plan" in the ds_seqpar key' in last and "the same config" in last
